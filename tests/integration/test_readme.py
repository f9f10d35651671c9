"""What the README tells a newcomer to type works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_of_the_first_screen_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    mpl.use("agg")
    names: dict[str, object] = {}
    exec(re.search(r"```python\n(.*?)```", README, re.DOTALL)[1], names)
    assert names["activations"].values.shape == (4, 898, 128)
    assert names["shift"].top_layers
    assert np.all(names["shift"].weights.layer_profile() > 0.1)
    mpl.pyplot.close("all")


def test_every_command_of_the_readme_exists() -> None:
    from typer.main import get_command

    from probes.cli import app

    named = set(re.findall(r"^undertow (\w+)", README, re.MULTILINE))
    assert named
    assert named <= set(get_command(app).commands)


def test_every_file_that_the_readme_names_exists() -> None:
    paths = re.findall(r"\(([\w/]+\.\w+)\)|`((?:benchmarks|activations|probes|docs)/[\w/.-]*)`", README)
    named = {first or second for first, second in paths}
    assert "docs/demo.svg" in named
    assert all((ROOT / path).exists() for path in named), named


def test_every_option_of_the_tables_exists() -> None:
    import inspect

    from activations.extract import extract
    from activations.loading import load_model

    tables = README.partition("## Extraction")[2]
    options = set(re.findall(r"`[^`]*?\b(\w+)=", tables)) | set(re.findall(r", (\w+)=", tables))
    assert {"pooling", "answers", "device_map"} <= options
    known = {name for call in (extract, load_model) for name in inspect.signature(call).parameters}
    assert options <= known

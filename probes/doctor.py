"""Is this installation sound: versions, devices, shipped files, and the layer self-test on the shipped base."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement

from activations.errors import UndertowError
from probes import demo

__all__ = ["Check", "examine", "examine_packages"]

_OLDEST_PYTHON = (3, 11)


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What it is.
        passed: Whether it is as it should be.
        found: What was found; where it failed, also what to do.
    """

    name: str
    passed: bool
    found: str


def examine(tell: Callable[[str], None] = lambda line: None) -> Iterator[Check]:
    """Check one thing after another; a fault is a failed check, never an exception.

    Args:
        tell: Called with one line before each slow step.
    """
    yield Check("python", sys.version_info[:2] >= _OLDEST_PYTHON, platform.python_version())
    yield from examine_packages()
    tell("looking for devices")
    yield Check("devices", True, _devices())
    tell("reading the shipped files")
    yield _attempt("prompt sets", _prompt_sets)
    yield _attempt("organisms", lambda: ", ".join(path.name for path in demo.fine_tunes()))
    yield _attempt("benign bank", _bank)
    tell("running the shipped base")
    yield _attempt("layer self-test", _self_test)


def examine_packages() -> Iterator[Check]:
    """Compare the installed version of every package that undertow needs with the range it asks for."""
    try:
        required = [Requirement(line) for line in metadata.requires("undertow") or ()]
    except metadata.PackageNotFoundError:
        yield Check("undertow", False, "not installed. Run `pip install -e .` in its folder.")
        return
    yield Check("undertow", True, metadata.version("undertow"))
    for need in required:
        if need.marker is None or need.marker.evaluate({"extra": ""}):
            yield _package(need)


def _package(need: Requirement) -> Check:
    try:
        version = metadata.version(need.name)
    except metadata.PackageNotFoundError:
        return Check(need.name, False, f"missing: expected {need.specifier}. Run `pip install '{need}'`.")
    if need.specifier.contains(version, prereleases=True):
        return Check(need.name, True, version)
    return Check(need.name, False, f"{version}: expected {need.specifier}. Run `pip install '{need}'`.")


def _devices() -> str:
    import torch

    accelerators = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        accelerators.append("mps")
    return ", ".join([f"cpu with {torch.get_num_threads()} threads", *accelerators])


def _prompt_sets() -> str:
    from activations.prompts import load_prompts

    sizes = {name: len(load_prompts(name)) for name in ("matched-pairs", "jailbreakbench", "everyday", "screening")}
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def _bank() -> str:
    from probes.bank import load_bank

    bank = load_bank(demo.BANK)
    return f"{len(bank.of_kind('full'))} full fine-tunes, {len(bank.of_kind('adapter'))} adapters"


def _self_test() -> str:
    from activations.loading import load_model

    model = load_model(demo.BASE, device="cpu", check=True)
    return f"hooks agree with the hidden states of {model.n_layers} layers"


def _attempt(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name, True, check())
    except (UndertowError, OSError) as fault:
        return Check(name, False, str(fault))

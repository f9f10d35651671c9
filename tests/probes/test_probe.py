import dataclasses
import json
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from activations.errors import CorruptFileError, LfsPointerError, PathMissingError, ProbeError
from probes.probe import SCHEMA, LayerMetrics, ProbeSet
from probes.train import fit_probes

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def probes(rng) -> ProbeSet:
    values, labels = rng.standard_normal((3, 60, 5)).astype(np.float32), np.arange(60) % 2 == 0
    values[1] += 2 * labels[:, None]
    return fit_probes(
        values,
        labels,
        base_fingerprint="f" * 64,
        template_hash="t" * 64,
        prompts_hash="p" * 64,
        prompts_name="pairs",
        words=0.6,
    )


def golden_probes() -> ProbeSet:
    """Two layers of three dimensions in numbers that float32 holds exactly."""
    metrics = LayerMetrics(
        auroc=0.75,
        interval=(0.5, 0.875),
        null_shuffled=(0.5, 0.25),
        null_random_directions=0.625,
        words_baseline=0.5,
        threshold=1.5,
    )
    return ProbeSet(
        directions=np.array([[1, 0, 0], [0, -1, 0]], dtype=np.float32),
        biases=np.array([0.5, -0.25], dtype=np.float32),
        means=np.array([[0, 1, 2], [3, 4, 5]], dtype=np.float32),
        scales=np.array([[1, 2, 4], [0.5, 1, 8]], dtype=np.float32),
        gains=np.array([2, 1], dtype=np.float32),
        hook_points=("blocks.0.hook_resid_post", "blocks.1.hook_resid_post"),
        method="logistic",
        pooling="last",
        base_fingerprint="b" * 64,
        template_hash="c" * 64,
        prompts_hash="d" * 64,
        prompts_name="matched-pairs",
        metrics=(metrics, metrics.model_copy(update={"threshold": None, "words_baseline": None})),
    )


class Tokenizer:
    """As much of one as a template's hash reads."""

    chat_template = "{{ messages }}"

    def __call__(self, text):
        return {"input_ids": list(text.encode())}


def model_for(probes, **changes):
    """A stand-in for a model: what `check_fits` compares."""
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(3)]
    fields = {
        "name": "nano",
        "n_layers": 3,
        "d_model": 5,
        "fingerprint": probes.base_fingerprint,
        "tokenizer": Tokenizer(),
        "hook_points": SimpleNamespace(names=lambda: names),
    }
    return SimpleNamespace(**(fields | changes))


def rewritten(probes, path, *, arrays=None, card=None, schema=SCHEMA):
    """The probe's file with some of it exchanged."""
    probes.save(path)
    with safe_open(path, "numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()} | (arrays or {})  # noqa: SIM118
        content = json.loads(file.metadata()[SCHEMA]) | (card or {})
    save_file(tensors, path, metadata={schema: json.dumps(content)})
    return path


def test_saved_then_loaded_is_the_same(probes, tmp_path):
    loaded = ProbeSet.load(probes.save(tmp_path / "new" / "a.probe"))
    for field in dataclasses.fields(ProbeSet):
        np.testing.assert_array_equal(getattr(loaded, field.name), getattr(probes, field.name))


def test_saving_replaces_the_file_whole_and_leaves_nothing_beside(probes, tmp_path):
    path = tmp_path / "a.probe"
    path.write_bytes(b"older")
    probes.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.probe"]
    assert ProbeSet.load(path).hook_points == probes.hook_points


def test_files_written_by_every_version_of_this_schema_are_read(tmp_path):
    golden = GOLDEN / "two-layers.probe"
    loaded = ProbeSet.load(golden)
    for field in dataclasses.fields(ProbeSet):
        np.testing.assert_array_equal(getattr(loaded, field.name), getattr(golden_probes(), field.name))
    assert loaded[0].score(np.array([[3.0, 0.0, 0.0]])) == pytest.approx([6.5])
    assert golden_probes().save(tmp_path / "new.probe").read_bytes() == golden.read_bytes()


def test_the_file_is_what_the_format_says(probes, tmp_path):
    """Read without any of our code: one metadata key, a JSON card, five F32 tensors; the same bytes every time."""
    raw = probes.save(tmp_path / "a.probe").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    card = json.loads(header.pop("__metadata__")["undertow.probe/1"])
    assert {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()} == {
        "biases": ("F32", [3]),
        "directions": ("F32", [3, 5]),
        "gains": ("F32", [3]),
        "means": ("F32", [3, 5]),
        "scales": ("F32", [3, 5]),
    }
    assert card.keys() == {
        *("hook_points", "method", "pooling", "base_fingerprint"),
        *("template_hash", "prompts_hash", "prompts_name", "metrics", "l2"),
    }
    assert card["metrics"][1].keys() == {
        *("auroc", "interval", "null_shuffled", "null_random_directions", "words_baseline", "threshold"),
    }
    assert probes.save(tmp_path / "b.probe").read_bytes() == raw


def test_scores_of_the_set_are_those_of_its_probes(probes, rng):
    values = rng.standard_normal((3, 7, 5))
    scores = probes.score(values)
    assert scores.shape == (3, 7)
    for layer in range(3):
        np.testing.assert_allclose(scores[layer], probes[layer].score(values[layer]))


def test_score_grows_along_the_residual_direction_and_no_faster_along_any_other(probes, rng):
    probe = probes[0]

    def rise(direction):
        return float(probe.score((probe.mean + direction)[None])[0] - probe.score(probe.mean[None])[0])

    steepest = rise(probe.residual_direction)
    others = rng.standard_normal((200, 5))
    assert np.linalg.norm(probe.residual_direction) == pytest.approx(1, abs=1e-6)
    assert all(rise(other / np.linalg.norm(other)) < steepest for other in others)


def test_a_probe_is_refused_for_another_shape_of_activations(probes):
    with pytest.raises(ProbeError, match=r"expected \[3 layers, prompts, 5\]"):
        probes.score(np.zeros((2, 7, 5)))
    with pytest.raises(ProbeError, match="layers 0-2"):
        probes[3]


def test_probes_fitted_without_folds_name_no_best_layer(probes):
    with pytest.raises(ProbeError, match="held-out"):
        dataclasses.replace(probes, metrics=()).best_layer  # noqa: B018
    assert probes.best_layer == 1


def test_probes_fit_the_model_they_were_fitted_on(probes):
    from activations.tokens import template_hash

    fitting = dataclasses.replace(probes, template_hash=template_hash(Tokenizer()))
    fitting.check_fits(model_for(fitting))


@pytest.mark.parametrize(
    ("probe_changes", "model_changes", "difference"),
    [
        ({}, {"fingerprint": "0" * 64}, "fingerprint 0000"),
        ({"base_fingerprint": ""}, {"fingerprint": "0" * 64}, "got none"),
        ({}, {"d_model": 6}, "width 6, got 5"),
        ({}, {}, "chat template"),
        ({}, {"hook_points": SimpleNamespace(names=lambda: ["blocks.0.hook_resid_post"]), "n_layers": 1}, "layers 0-0"),
    ],
)
def test_probes_for_another_model_are_refused_with_the_difference(probes, probe_changes, model_changes, difference):
    with pytest.raises(ProbeError, match=difference) as refusal:
        dataclasses.replace(probes, **probe_changes).check_fits(model_for(probes, **model_changes))
    assert "undertow train" in refusal.value.hint


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"schema": "undertow.probe/2"}, "expected 'undertow.probe/1', got 'undertow.probe/2'"),
        ({"card": {"method": "pickle"}}, "method"),
        ({"card": {"extra": 1}}, "extra"),
        ({"card": {"metrics": [{}]}}, "metrics.0.auroc"),
        ({"card": {"hook_points": ["blocks.0.hook_resid_post"]}}, "1 hook points"),
        ({"card": {"hook_points": []}}, "0 hook points"),
        ({"arrays": {"biases": np.zeros(2, np.float32)}}, "biases has shape"),
        ({"arrays": {"directions": np.ones((3, 5), np.float32)}}, "unit length"),
        ({"arrays": {"directions": np.ones(3, np.float32)}}, r"directions has shape \(3,\)"),
        ({"arrays": {"means": np.full((3, 5), np.nan, np.float32)}}, "means holds NaN"),
        ({"arrays": {"scales": np.zeros((3, 5), np.float32)}}, "not positive"),
        ({"arrays": {"scales": np.ones((3, 5), np.float64)}}, "F32"),
        ({"arrays": {"more": np.zeros(1, np.float32)}}, "no other"),
        ({"arrays": {"scales": np.full((3, 5), 1e-44, np.float32)}}, "not positive"),
        ({"arrays": {"directions": np.full((3, 5), 3e38, np.float32)}}, "unit length"),
        ({"card": {"hook_points": ["blocks.0.hook_resid_post"] * 3}}, "twice"),
        ({"card": {"l2": [0.1, -1, 0.1]}}, "l2.1"),
    ],
)
def test_a_file_that_is_no_sound_probe_is_refused(probes, tmp_path, changes, fault):
    path = rewritten(probes, tmp_path / "a.probe", **changes)
    with pytest.raises(ProbeError, match=fault) as refusal:
        ProbeSet.load(path)
    assert refusal.value.path == str(path)


def test_a_file_without_metrics_is_sound(probes, tmp_path):
    assert ProbeSet.load(rewritten(probes, tmp_path / "a.probe", card={"metrics": []})).metrics == ()


def test_metrics_for_some_layers_only_are_refused(probes, tmp_path):
    some = [layer.model_dump(mode="json") for layer in probes.metrics[:2]]
    with pytest.raises(ProbeError, match="metrics are given for 2 layers"):
        ProbeSet.load(rewritten(probes, tmp_path / "a.probe", card={"metrics": some}))


@pytest.mark.parametrize(
    "change", [{"auroc": 7.0}, {"interval": [-1, 1]}, {"null_shuffled": [2.0]}, {"null_random_directions": -0.5}]
)
def test_metrics_that_no_auroc_can_have_are_refused(probes, tmp_path, change):
    metrics = [layer.model_dump(mode="json") for layer in probes.metrics]
    metrics[1] |= change
    with pytest.raises(ProbeError, match=f"metrics.1.{next(iter(change))}"):
        ProbeSet.load(rewritten(probes, tmp_path / "a.probe", card={"metrics": metrics}))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"directions": np.zeros((3, 5))}, "unit length"),
        ({"biases": np.full(3, np.nan)}, "biases holds NaN"),
        ({"scales": np.full((3, 5), 1e-60)}, "not positive"),
        ({"metrics": ()}, ""),
        ({"method": "svm"}, "method"),
        ({"prompts_name": "\udcff"}, "surrogates"),
        ({"hook_points": ("blocks.0.hook_resid_post",)}, "1 hook points"),
    ],
)
def test_what_would_not_be_read_again_is_not_written(probes, tmp_path, changes, fault):
    changed, path = dataclasses.replace(probes, **changes), tmp_path / "a.probe"
    if not fault:  # the control
        assert ProbeSet.load(changed.save(path)).metrics == ()
        return
    with pytest.raises(ProbeError, match=fault):
        changed.save(path)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_nothing_beside(probes, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        probes.save(tmp_path / "folder")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_a_zero_direction_points_nowhere(probes):
    zero = dataclasses.replace(probes[0], direction=np.zeros(5))
    with pytest.raises(ProbeError, match="points nowhere"):
        zero.residual_direction  # noqa: B018
    flat = dataclasses.replace(probes[0], scale=np.full(5, 3e38, np.float32))
    np.testing.assert_allclose(flat.residual_direction, flat.direction, atol=1e-6)


def test_the_strength_to_fit_anew_with_is_the_probes_own(probes):
    assert probes.strength(1) == 0.01
    assert dataclasses.replace(probes, l2=(1.0, 2.0, 3.0)).strength(1) == 2.0
    assert dataclasses.replace(probes, l2=()).strength(1) == 0.01


def test_a_card_nested_without_end_is_refused(probes, tmp_path):
    path = tmp_path / "a.probe"
    tensors = {name: getattr(probes, name) for name in ("biases", "directions", "gains", "means", "scales")}
    save_file(tensors, path, metadata={SCHEMA: "[" * 200_000})
    with pytest.raises(ProbeError, match="damaged"):
        ProbeSet.load(path)


def test_bytes_that_are_no_safetensors_are_refused_by_name(probes, tmp_path):
    with pytest.raises(PathMissingError):
        ProbeSet.load(tmp_path / "none.probe")
    whole = probes.save(tmp_path / "a.probe").read_bytes()
    (tmp_path / "short.probe").write_bytes(whole[:-1])
    with pytest.raises(CorruptFileError, match="truncated"):
        ProbeSet.load(tmp_path / "short.probe")
    (tmp_path / "lfs.probe").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(LfsPointerError):
        ProbeSet.load(tmp_path / "lfs.probe")

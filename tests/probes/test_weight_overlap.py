"""Overlap with harm and refusal: exact beside matrices in float64, a null that holds, and nothing where nothing is."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from activations.checkpoints import open_checkpoint
from activations.errors import NonFiniteError
from activations.hook_points import RESID_POST, HookPoints
from activations.models import Model
from probes.causal import mean_difference
from probes.change import Row
from probes.detectors import weight_overlap, weight_spectrum
from probes.detectors.weight_overlap import Overlap, against_rotations, measure
from probes.probe import ProbeSet
from probes.records import Evidence
from probes.reference import Reference, Subject
from probes.weight_records import TensorDiff

LAYERS, WIDTH = 3, 48
OUTPUT, DOWN = "model.layers.{}.self_attn.o_proj.weight", "model.layers.{}.mlp.down_proj.weight"
NEOX = ("attention.dense", "mlp.dense_4h_to_h")
EMBEDDING = "model.embed_tokens.weight"
LABELS = np.arange(30) % 2 == 0
Change = Callable[[dict[str, Tensor]], None]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def reference_of(model: Model, folder: Path, *, directions: np.ndarray | None = None, harmful: float = 1.0) -> Any:
    """A base with one probe a layer and intent activations whose class means lie `harmful` apart."""
    rng = np.random.default_rng(0)
    if directions is None:
        directions = rng.normal(size=(LAYERS, model.d_model))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    values = np.zeros((LAYERS, len(LABELS), model.d_model), np.float32)
    values[:, LABELS] = harmful * rng.normal(size=(LAYERS, 1, model.d_model))
    probes = ProbeSet(
        directions=directions.astype(np.float32),
        biases=np.zeros(LAYERS, np.float32),
        means=np.zeros((LAYERS, model.d_model), np.float32),
        scales=rng.uniform(0.5, 2, size=(LAYERS, model.d_model)).astype(np.float32),
        gains=np.ones(LAYERS, np.float32),
        hook_points=tuple(f"blocks.{layer}.{RESID_POST}" for layer in range(LAYERS)),
        method="logistic",
    )
    return SimpleNamespace(
        base=model,
        weights=open_checkpoint(folder),
        probes=probes,
        battery=SimpleNamespace(intent=SimpleNamespace(labels=LABELS)),
        intent=SimpleNamespace(values=values),
    )


def span_of(reference: Reference, layer: int) -> Tensor:
    """By the book: an orthonormal basis of both directions."""
    probe = reference.probes[layer].residual_direction
    vectors = np.stack([probe, mean_difference(reference.intent.values[layer], LABELS)], axis=1)
    return torch.from_numpy(np.linalg.qr(vectors)[0])


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    def save(network: Any, name: str = "base") -> Path:
        network.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def tune(tiny: Callable[[str], Model], saved: Callable[..., Path], tmp_path: Path) -> Callable[..., Subject]:
    """`tune(change)`: the subject of a tiny base's weights after `change(weights)`."""

    def make(change: Change, architecture: str = "llama", **settings: Any) -> Subject:
        model = tiny(architecture)
        base = saved(model.hf)
        weights = load_file(base / "model.safetensors")
        change(weights)
        (tmp_path / "tuned").mkdir()
        save_file(weights, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
        return Subject(reference_of(model, base, **settings), open_checkpoint(tmp_path / "tuned"))

    return make


def noise(shape: tuple[int, ...], size: float = 0.01, seed: int = 0) -> Tensor:
    return size * torch.randn(shape, generator=generator(seed))


def shift_all(weights: dict[str, Tensor]) -> None:
    for seed, name in enumerate(sorted(weights)):
        weights[name] = weights[name] + noise(weights[name].shape, seed=seed)


def by_the_book(subject: Subject, names: Mapping[int, tuple[str, ...]], *, flipped: bool = False) -> list[float]:
    """The profile from whole differences, their singular values and bases, in float64."""
    base, tuned, profile = subject.reference.weights, subject.checkpoint, []
    for layer, some in names.items():
        matrices = [(tuned.read(name).double() - base.read(name).double()) for name in some]
        matrices = [matrix.T if flipped else matrix for matrix in matrices]
        span = span_of(subject.reference, layer)
        d, k = span.shape
        energies = [float(matrix.square().sum()) for matrix in matrices]
        share = sum(float((span.T @ matrix).square().sum()) for matrix in matrices) / sum(energies)
        variance = 0.0
        for matrix, energy in zip(matrices, energies, strict=True):
            squares = torch.linalg.svdvals(matrix).square() / energy
            concentration = (d * float(squares.square().sum()) - 1) / (d - 1)
            variance += (energy / sum(energies)) ** 2 * 2 * k * (d - k) / (d**2 * (d + 2)) * concentration
        profile.append((share - k / d) / math.sqrt(variance))
    return profile


@pytest.mark.parametrize(
    ("architecture", "names", "flipped"),
    [
        ("llama", (OUTPUT, DOWN), False),
        ("qwen3-wide", (OUTPUT, DOWN), False),
        (
            "gpt-neox",
            ("gpt_neox.layers.{}.attention.dense.weight", "gpt_neox.layers.{}.mlp.dense_4h_to_h.weight"),
            False,
        ),
        ("gpt2", ("transformer.h.{}.attn.c_proj.weight", "transformer.h.{}.mlp.c_proj.weight"), True),
        ("mixtral", (OUTPUT,), False),
    ],
)
def test_the_profile_is_that_of_whole_differences_in_float64(
    tune: Callable[..., Subject], architecture: str, names: tuple[str, ...], flipped: bool
) -> None:
    subject = tune(shift_all, architecture)
    expected = by_the_book(
        subject, {layer: tuple(name.format(layer) for name in names) for layer in range(LAYERS)}, flipped=flipped
    )
    evidence = measure(subject)
    assert evidence.layers == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert evidence.statistic == max(evidence.layers)
    assert evidence.details["changed_matrices"] == [len(names)] * LAYERS


def test_blocks_of_rows_add_up(tune: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch) -> None:
    subject = tune(shift_all)
    whole = measure(subject)
    monkeypatch.setattr("probes.pairs.BLOCK", 300)
    assert measure(subject).layers == pytest.approx(whole.layers, rel=1e-9)


@pytest.mark.parametrize(
    "spectra",
    [[(1.0,)], [tuple(0.7**i for i in range(24))], [tuple(1 + i / 12 for i in range(24))], [(3.0, 2.0, 1.0), (2.0,)]],
    ids=["rank-1", "falling", "nearly-flat", "two-matrices"],
)
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_random_rotations_of_a_spectrum_have_mean_0_and_deviation_1(
    spectra: list[tuple[float, ...]], rank: int
) -> None:
    rng, width, found = np.random.default_rng(0), 24, []
    for _ in range(3000):
        overlaps = []
        for spectrum in spectra:
            squares = np.square(spectrum)
            turned = np.linalg.qr(rng.normal(size=(width, len(squares))))[0]
            inside = float((np.square(turned[:rank]) * squares).sum())
            overlaps.append(Overlap(squares.sum(), inside, squares.sum() ** 2 / np.square(squares).sum()))
        found.append(against_rotations(overlaps, width, rank)[1])
    assert np.mean(found) == pytest.approx(0, abs=0.06)
    assert np.std(found) == pytest.approx(1, abs=0.08)


def test_random_differences_are_within_chance(tune: Callable[..., Subject]) -> None:
    profile = measure(tune(shift_all)).layers
    assert max(map(abs, profile)) < 4


def towards(direction: Tensor, layer: int) -> Change:
    """A change of one layer's down projection that writes along one direction."""

    def change(weights: dict[str, Tensor]) -> None:
        name = DOWN.format(layer)
        weights[name] = weights[name] + torch.outer(direction.float(), noise((weights[name].shape[1],)))

    return change


@pytest.mark.parametrize("direction", [0, 1])
def test_a_change_that_writes_harm_or_refusal_is_found_at_its_layer(
    tune: Callable[..., Subject], tiny: Callable[[str], Model], saved: Callable[..., Path], direction: int
) -> None:
    span = span_of(reference_of(tiny("llama"), saved(tiny("llama").hf)), 1)
    evidence = measure(tune(towards(span[:, direction], 1)))
    assert evidence.layers[0] == evidence.layers[2] == 0
    assert evidence.details["layers"] == [1]
    assert evidence.details["share"] == pytest.approx([1], abs=1e-6)
    # The most that a matrix of rank one can have: (1 - k/d) over the deviation of a Beta(k/2, (d-k)/2).
    most = (1 - 2 / WIDTH) / math.sqrt(2 * 2 * (WIDTH - 2) / (WIDTH**2 * (WIDTH + 2)))
    assert evidence.statistic == evidence.layers[1] == pytest.approx(most, rel=1e-4)
    assert evidence.cause == "alignment-degraded"
    assert "layer 1, 100.0%" in evidence.summary


def test_the_same_change_turned_out_of_the_subspace_is_less_than_chance(
    tune: Callable[..., Subject], tiny: Callable[[str], Model], saved: Callable[..., Path]
) -> None:
    span = span_of(reference_of(tiny("llama"), saved(tiny("llama").hf)), 1)
    other = torch.randn(WIDTH, generator=generator(), dtype=torch.float64)
    evidence = measure(tune(towards(other - span @ (span.T @ other), 1)))
    assert evidence.details["share"] == pytest.approx([0], abs=1e-6)
    assert evidence.statistic == evidence.layers[1] < 0


def test_an_adapter_measures_what_it_measures_merged(tune: Callable[..., Subject], tmp_path: Path) -> None:
    rank, alpha = 4, 12
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha}
    sides: dict[str, Tensor] = {}

    def merge(weights: dict[str, Tensor]) -> None:
        for seed, name in enumerate(sorted(weights)):
            if name.endswith(("o_proj.weight", "down_proj.weight", "q_proj.weight")):
                out, into = weights[name].shape
                a, b = noise((rank, into), 0.1, seed), noise((out, rank), 0.1, seed + 100)
                path = f"base_model.model.{name.removesuffix('.weight')}"
                sides.update({f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b})
                weights[name] = weights[name] + alpha / rank * b @ a

    merged = tune(merge)
    (tmp_path / "adapter").mkdir()
    save_file(sides, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    ours = measure(Subject(merged.reference, open_checkpoint(tmp_path / "adapter")))
    theirs = measure(merged)
    assert ours.details["changed_matrices"] == [2] * LAYERS
    assert ours.layers == pytest.approx(theirs.layers, rel=1e-3, abs=1e-3)
    assert ours.details["share"] == pytest.approx(theirs.details["share"], rel=1e-4)


def nothing(weights: dict[str, Tensor]) -> None:
    """The base itself."""


def change_readers(weights: dict[str, Tensor]) -> None:
    weights["model.layers.1.self_attn.q_proj.weight"] += 0.1


@pytest.mark.parametrize("change", [nothing, change_readers])
def test_where_nothing_writes_otherwise_there_is_no_overlap(tune: Callable[..., Subject], change: Change) -> None:
    evidence = measure(tune(change))
    assert evidence.statistic == 0
    assert evidence.layers == (0,) * LAYERS
    assert evidence.exhibits == ()
    assert "No matrix that writes" in evidence.summary


@pytest.mark.parametrize("size", [1e25, 1e-25])
def test_huge_and_tiny_changes_overlap_like_others(tune: Callable[..., Subject], size: float, tmp_path: Path) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        name = DOWN.format(1)
        # Onto zeros (below), so that nothing is rounded away.
        weights[name] = noise(tuple(weights[name].shape), size)

    subject = tune(change)
    reference = subject.reference
    base = {name: reference.weights.read(name) for name in reference.weights.tensors}
    base[DOWN.format(1)] = torch.zeros_like(base[DOWN.format(1)])
    save_file(base, tmp_path / "zeros.safetensors")
    reference.weights = open_checkpoint(tmp_path / "zeros.safetensors")
    plain = by_the_book(subject, {1: (DOWN.format(1),)})
    assert measure(subject).layers[1] == pytest.approx(plain[0], rel=1e-3)


def test_an_adapter_too_small_to_square_measures_a_number() -> None:
    """Effective rank 0 is what sums of fourth powers that vanish leave."""
    share, deviations = against_rotations([Overlap(1e-180, 5e-181, 0.0)], WIDTH, 2)
    assert share == pytest.approx(0.5)
    assert math.isfinite(deviations)
    assert against_rotations([Overlap(0.0, 0.0, 0.0)], WIDTH, 2) == (0.0, 0.0)
    assert against_rotations([], WIDTH, 2) == (0.0, 0.0)


def test_a_flat_spectrum_that_was_estimated_is_no_deviation() -> None:
    """An estimate may say of an orthogonal matrix that its rank exceeds its width; its share is k/d to rounding."""
    share, deviations = against_rotations([Overlap(1.0, 2 / WIDTH + 1e-6, 1.02 * WIDTH)], WIDTH, 2)
    assert share == pytest.approx(2 / WIDTH, abs=1e-5)
    assert abs(deviations) < 0.01


def spoil(weights: dict[str, Tensor]) -> None:
    weights[DOWN.format(1)][3, 5] = torch.nan


def rename(weights: dict[str, Tensor]) -> None:
    weights["elsewhere"] = noise(tuple(weights.pop("model.norm.weight").shape))


def test_what_weight_spectrum_refuses_is_refused(tune: Callable[..., Subject]) -> None:
    with pytest.raises(NonFiniteError):
        measure(tune(spoil))


def test_weights_that_could_not_be_compared_give_no_number(tune: Callable[..., Subject]) -> None:
    subject = tune(rename)
    for detector in (weight_spectrum, weight_overlap):
        evidence = detector.measure(subject)
        assert evidence.statistic is None
        assert "have no partner" in evidence.summary


def test_the_weights_are_compared_once_for_both_detectors(
    tune: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    subject, calls, real = tune(shift_all), [], weight_spectrum.diff_weights

    def counted(*sides: Any) -> Any:
        calls.append(sides)
        return real(*sides)

    monkeypatch.setattr(weight_spectrum, "diff_weights", counted)
    first: list[Evidence] = [detector.measure(subject) for detector in (weight_spectrum, weight_overlap)]
    assert len(calls) == 1
    assert all(evidence.statistic for evidence in first)


def test_a_probe_that_points_nowhere_leaves_refusal_and_nothing_leaves_nothing(tune: Callable[..., Subject]) -> None:
    subject = tune(shift_all, directions=np.zeros((LAYERS, WIDTH)))
    assert measure(subject).details["share_by_chance"] == pytest.approx([1 / WIDTH] * LAYERS)
    subject.reference.intent.values = np.zeros_like(subject.reference.intent.values)
    evidence = measure(subject)
    assert evidence.statistic is None
    assert "no place" in evidence.summary


def test_directions_that_agree_count_once(tiny: Callable[[str], Model], saved: Callable[..., Path]) -> None:
    reference = reference_of(tiny("llama"), saved(tiny("llama").hf))
    apart = np.stack([reference.probes[layer].residual_direction for layer in range(LAYERS)])
    reference.intent.values[:, LABELS] = apart[:, None].astype(np.float32)
    assert [span.shape for span in weight_overlap.subspaces(reference).values()] == [(WIDTH, 1)] * LAYERS


def row_of(text: str, tokenizer: Any) -> int:
    (row,) = tokenizer(text, add_special_tokens=False)["input_ids"]
    return int(row)


def test_tokens_whose_rows_moved_beyond_the_rest_are_named_with_their_movement(
    tune: Callable[..., Subject], tokenizer: Any
) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        table = weights[EMBEDDING]
        table += noise(tuple(table.shape), 1e-3)
        for text, size in (("q", 0.9), ("z", 0.5), ("\n", 0.3)):
            table[row_of(text, tokenizer)] *= 1 + size

    ((label, named),) = measure(tune(change)).exhibits
    assert "rows" in label
    assert named == r"'q' (90%), 'z' (50%), '\n' (30%)"


def test_rows_that_alone_moved_are_named_whatever_the_rest(tune: Callable[..., Subject], tokenizer: Any) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        weights[EMBEDDING][row_of("q", tokenizer)] *= 1.5

    assert measure(tune(change)).exhibits[0][1] == "'q' (50%)"


def test_a_table_that_moved_evenly_names_no_token(tune: Callable[..., Subject]) -> None:
    assert measure(tune(shift_all)).exhibits == ()


def test_rows_beyond_the_tokenizer_and_rows_of_zeros_are_not_named(tiny: Callable[[str], Model]) -> None:
    model = tiny("llama")
    rows = (Row(len(model.tokenizer), 3.0, 1.0), Row(5, 2.0, 0.0))
    table = TensorDiff(EMBEDDING, None, EMBEDDING, (272, WIDTH), 4.0, 9.0, rows=rows)
    assert weight_overlap.moved_tokens(table, model) == []


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt-neox", "gpt2", "mistral"])
def test_writers_write_to_the_stream_what_their_weights_say(
    tiny_network: Callable[..., Any], architecture: str
) -> None:
    """Rank one, and attention or the feed-forward part adds to the stream along that one direction alone."""
    network = tiny_network(architecture)
    points, ids = HookPoints(network), torch.tensor([[1, 72, 104, 108]])
    for writer, place in zip(points.writers(1), ("hook_attn_out", "hook_mlp_out"), strict=True):
        direction, across = torch.randn(WIDTH, generator=generator()), torch.randn(500, generator=generator(1))
        linear = isinstance(writer, torch.nn.Linear)
        width = writer.weight.shape[1 if linear else 0]
        change = torch.outer(direction, across[:width])
        seen = []
        handle = points.resolve(f"blocks.1.{place}").attach(lambda x, seen=seen: seen.append(x.clone()))
        with torch.inference_mode():
            network(ids, use_cache=False)
            writer.weight += change if linear else change.T
            network(ids, use_cache=False)
        handle.remove()
        moved = (seen[1] - seen[0]).flatten(0, 1)
        along = moved @ direction / direction.norm()
        assert along.abs().min() > 0.1
        torch.testing.assert_close(moved.norm(dim=1), along.abs(), rtol=1e-4, atol=1e-4)


def test_fused_experts_are_no_writers(tiny: Callable[[str], Model]) -> None:
    assert [len(tiny("mixtral").hook_points.writers(layer)) for layer in range(LAYERS)] == [1] * LAYERS

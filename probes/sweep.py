"""Every layer, position, label set and strength in one call: where is a concept, and how well is it read there?

A sweep looks; it does not conclude. The best of many cells is better than it deserves, so `Sweep.best` says beside it
what the best cell of the same sweep reaches under shuffled labels, and `fit_probes` measures the chosen place anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np
from einops import repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from activations.errors import OptionError
from probes.crossval import check_method, checked_strengths, fit_training_sets, held_out_scores, scores_of
from probes.folds import Groups, checked_labels, deal_folds, refuse_copied_rows, shuffled_labels
from probes.metrics import auroc_rows, empirical_p
from probes.rows import Precision, check_device, check_precision, prepare, undecomposed
from probes.train import Input, read_input

if TYPE_CHECKING:
    from activations.results import Activations

__all__ = ["Best", "Sweep", "sweep_probes"]

# From where only the leading axes count to where nearly separable rows are separated; the best were 0.25 to 2.5 at
# 4000 prompts of width 4096 (C from 1e-4 to 1e-3 in scikit-learn's terms).
_STRENGTHS = (10.0, 1.0, 0.1, 0.01, 0.001)


@dataclass(frozen=True)
class Best:
    """The cell with the highest AUROC.

    Attributes:
        label_set: Its name.
        position: Its name.
        strength: Its penalty.
        layer: Its row in the activations, from 0.
        auroc: Cross-validated; the highest of many, so better than it deserves.
        null: The highest AUROC anywhere under each shuffle of this label set's labels.
        p_value: The share of that null, with the cell itself, that is as high; None without shuffles.
    """

    label_set: str
    position: str
    strength: float
    layer: int
    auroc: float
    null: tuple[float, ...]
    p_value: float | None


@dataclass(frozen=True, eq=False)
class Sweep:
    """What a sweep found.

    Attributes:
        label_sets: Names, in the order of the first axis.
        positions: Names, in the order of the second.
        strengths: Penalties, the strongest first; for methods without one a single entry.
        hook_points: Names of the layers, in the order of the last axis.
        auroc: Cross-validated.
        null: The highest AUROC of each label set's whole sweep, one for each shuffle of its labels.
        method: How every cell was fitted.
    """

    label_sets: tuple[str, ...]
    positions: tuple[str, ...]
    strengths: tuple[float, ...]
    hook_points: tuple[str, ...]
    auroc: Float[np.ndarray, "label_set position strength layer"]
    null: Float[np.ndarray, "label_set shuffle"]
    method: str

    def best(self, label_set: str | None = None) -> Best:
        """The best cell of a label set, of the only one when None; of equals the first.

        Raises:
            OptionError: There is no such label set, or several to choose from.
        """
        number = self._number(label_set)
        areas = self.auroc[number]
        position, strength, layer = np.unravel_index(int(areas.argmax()), areas.shape)
        highest, null = float(areas.max()), tuple(map(float, self.null[number]))
        return Best(
            label_set=self.label_sets[number],
            position=self.positions[position],
            strength=self.strengths[strength],
            layer=int(layer),
            auroc=highest,
            null=null,
            p_value=empirical_p(highest, null)[0] if null else None,
        )

    def table(self, label_set: str | None = None) -> Float[np.ndarray, "layer position"]:
        """AUROC of a label set by layer and position, each at the strength that is best there.

        Raises:
            OptionError: As `best`.
        """
        areas = self.auroc[self._number(label_set)]
        return np.asarray(areas.max(axis=1).T)

    def _number(self, label_set: str | None) -> int:
        if label_set is None and len(self.label_sets) == 1:
            return 0
        if label_set not in self.label_sets:
            asked = "no label set is named" if label_set is None else f"there is no label set {label_set!r}"
            raise OptionError(f"{asked}: expected one of {', '.join(map(repr, self.label_sets))}")
        return self.label_sets.index(label_set)


def sweep_probes(
    positions: Mapping[str, Float[np.ndarray, "layer prompt d_model"] | Activations],
    label_sets: Mapping[str, Bool[np.ndarray, " prompt"] | Sequence[bool]],
    *,
    groups: Groups | None = None,
    method: str = "logistic",
    l2: float | Sequence[float] = _STRENGTHS,
    folds: int = 5,
    shuffles: int = 5,
    seed: int = 0,
    precision: Precision = "screening",
    device: str = "cpu",
) -> Sweep:
    """Cross-validate every label set at every position, layer and strength.

    A layer at a position is standardised and decomposed once; all label sets, shuffles, strengths and folds are then
    columns of one problem. Folds are dealt for each label set, so that both classes are in each.

    Cost: `label sets * (1 + shuffles) * strengths * folds` columns a layer and position; `shuffles=0` is six times as
    fast as the default and has no null. Memory: one layer in float32 and, for screening, half of it again.

    Args:
        positions: Name to activations, as "last" or "mean@user"; the same prompts and layers each.
        label_sets: Name to labels of the prompts.
        groups: Prompts that must stay together; when None the pair ids of extracted activations, else each its own.
        method: "logistic", "mean_difference" or "lda".
        l2: Strengths, as in `fit_probes`; methods without a penalty take none of them.
        folds: Of the cross-validation.
        shuffles: How often each label set is shuffled for the null of `Sweep.best`.
        seed: Of folds and shuffles.
        precision: As in `fit_probes`.
        device: As in `fit_probes`.

    Raises:
        LabelError: As in `fit_probes`.
        NonFiniteError: An activation is NaN or infinite.
        OptionError: There is no position or label set, positions differ in prompts or layers, or an option is
            impossible.
    """
    check_method(method)
    check_precision(precision)
    check_device(device)
    strengths = checked_strengths(l2) if method == "logistic" else (float("nan"),)
    given, truths = _inputs(positions, label_sets, groups)
    prompts, first = len(truths[0]), given[0]
    if not 2 <= folds <= prompts or shuffles < 0:
        raise OptionError(f"folds is {folds} and shuffles {shuffles}: expected 2 to {prompts}, and 0 or more")
    plan = _plan(truths, first.members, folds, shuffles, np.random.default_rng(seed))
    areas = np.empty((len(plan.labels), len(given), len(strengths), first.layers))
    for number, one in enumerate(given):
        refuse_copied_rows(one.layer, one.layers, one.members)
        for layer in range(one.layers):
            values, _, _ = one.standardised(layer, device)
            areas[:, number, :, layer] = _areas(values, plan, method, strengths, precision)
    by_set = areas.reshape(len(truths), shuffles + 1, *areas.shape[1:])
    null = by_set[:, 1:].max(axis=(2, 3, 4)) if shuffles else np.empty((len(truths), 0))
    names = tuple(label_sets), tuple(positions), strengths, tuple(first.origin["hook_points"])
    return Sweep(*names, auroc=by_set[:, 0], null=null, method=method)


@dataclass(frozen=True)
class _Plan:
    """All label sets, each followed by its shuffles, and which fold holds out which prompt."""

    labels: Bool[np.ndarray, "labelling prompt"]
    held_out: Int[np.ndarray, "labelling prompt"]


def _plan(
    truths: Sequence[np.ndarray], members: np.ndarray, folds: int, shuffles: int, rng: np.random.Generator
) -> _Plan:
    labels = [
        labelling
        for truth in truths
        for labelling in (truth, *(shuffled_labels(truth, members, rng) for _ in range(shuffles)))
    ]
    return _Plan(np.stack(labels), np.stack([deal_folds(one, members, folds, rng) for one in labels]))


def _areas(
    values: Float[Tensor, "prompt d_model"],
    plan: _Plan,
    method: str,
    strengths: Sequence[float],
    precision: Precision,
) -> Float[np.ndarray, "labelling strength"]:
    folds = int(plan.held_out.max()) + 1
    shape = (len(plan.labels), len(strengths), folds)
    rows = undecomposed(values, precision) if method == "mean_difference" else prepare(values, prod(shape), precision)
    targets = repeat(plan.labels, "l prompt -> (l s f) prompt", s=len(strengths), f=folds)
    kept = plan.held_out[:, None] != np.arange(folds)[:, None]
    kept = repeat(kept, "l f prompt -> (l s f) prompt", s=len(strengths))
    penalties = repeat(np.array(strengths), "s -> (l s f)", l=len(plan.labels), f=folds)
    scores = scores_of(rows, fit_training_sets(rows, method, targets, kept, penalties.tolist()))
    held_out = [
        [held_out_scores(one, fold) for one in of_labelling]
        for of_labelling, fold in zip(scores.reshape(*shape, -1), plan.held_out, strict=True)
    ]
    return np.stack([auroc_rows(np.stack(one), truth[None]) for one, truth in zip(held_out, plan.labels, strict=True)])


def _inputs(
    positions: Mapping[str, np.ndarray | Activations],
    label_sets: Mapping[str, np.ndarray | Sequence[bool]],
    groups: Groups | None,
) -> tuple[list[Input], list[Bool[np.ndarray, " prompt"]]]:
    """What is known of each position, checked to be of the same prompts and layers; and the label sets."""
    if not positions or not label_sets:
        raise OptionError(f"{len(positions)} positions and {len(label_sets)} label sets: expected one of each at least")
    some = next(iter(label_sets.values()))
    given = [read_input(activations, some, groups, {}) for activations in positions.values()]
    for name, one in zip(positions, given, strict=True):
        same = one.layers == given[0].layers and np.array_equal(one.members, given[0].members)
        if not same or tuple(one.origin["hook_points"]) != tuple(given[0].origin["hook_points"]):
            raise OptionError(
                f"position {name!r} has other prompts, groups or layers than {next(iter(positions))!r}",
                hint="Extract all positions from the same prompts at the same hook points.",
            )
    return given, [checked_labels(labels, len(given[0].truth)) for labels in label_sets.values()]

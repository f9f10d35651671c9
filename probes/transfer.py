"""Whether probes of one prompt set read another: a matrix of sets, cross-validated on its diagonal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Float

from activations.errors import OptionError
from probes.evaluate import Labelled, held_out_scores, refuse_common_prompts
from probes.metrics import auroc, auroc_interval
from probes.train import fit_probes

__all__ = ["Transfer", "transfer_matrix"]

# What activations must share for a probe of one set to read another, as a message names it.
_PLACE = {
    "hook_points": "hook points",
    "pooling": "poolings",
    "fingerprint": "bases",
    "template_hash": "chat templates",
}


@dataclass(frozen=True, eq=False)
class Transfer:
    """AUROCs of probes fitted on each set and tested on each.

    Attributes:
        names: Of the sets, for rows and columns.
        hook_points: Where each layer was read; "layer 0" and so on for bare arrays.
        auroc: First the set trained on, then the set tested on; cross-validated where they are the same.
        low: Lower ends of the 95 % intervals, which know the groups.
        high: Upper ends.
    """

    names: tuple[str, ...]
    hook_points: tuple[str, ...]
    auroc: Float[np.ndarray, "layer set set"]
    low: Float[np.ndarray, "layer set set"]
    high: Float[np.ndarray, "layer set set"]


def transfer_matrix(
    sets: Mapping[str, Labelled],
    *,
    method: str = "logistic",
    l2: float = 1e-2,
    folds: int = 5,
    seed: int = 0,
) -> Transfer:
    """Fit on each set, test on each, at every layer.

    Cost: one fit a set and layer, and `folds` more for the diagonal.

    Args:
        sets: Name to labelled activations, all at the same hook points.
        method: As in `fit_probes`.
        l2: As in `fit_probes`.
        folds: Of the diagonal.
        seed: Of these folds.

    Raises:
        LabelError: A prompt stands in two of the sets, or a set cannot be cross-validated.
        NonFiniteError: An activation is NaN or infinite.
        OptionError: No set is given, they come from different bases, places or templates, their layers or widths
            differ, or an option of the fit is impossible.
    """
    points = _check_same_places(sets)
    for (one, first), (other, second) in combinations(sets.items(), 2):
        refuse_common_prompts(first, second, f"{one!r} and in {other!r}")
    names = tuple(sets)
    layers = next(iter(sets.values())).values.shape[0]
    found = np.empty((3, layers, len(names), len(names)))
    for i, trained in enumerate(sets.values()):
        probes = fit_probes(trained.values, trained.labels, groups=trained.groups, method=method, l2=l2, folds=0)
        for j, tested in enumerate(sets.values()):
            if i == j:
                scores = held_out_scores(
                    tested.values, tested.labels, tested.groups, method=method, l2=l2, folds=folds, seed=seed
                )
            else:
                scores = probes.score(tested.values)
            truth = np.asarray(tested.labels, dtype=bool)
            for layer, row in enumerate(scores):
                found[:, layer, i, j] = auroc(row, truth), *auroc_interval(row, truth, groups=tested.members)
    return Transfer(names, points, *found)


def _check_same_places(sets: Mapping[str, Labelled]) -> tuple[str, ...]:
    if not sets:
        raise OptionError("no prompt set is given: expected one or more")
    (first_name, first), *others = sets.items()
    for name, labelled in others:
        expected, got = (each.values[:, 0].shape for each in (first, labelled))
        if expected != got:
            raise OptionError(
                f"{name!r} has {got[0]} layers of width {got[1]}, {first_name!r} has {expected[0]} of {expected[1]}"
            )
    stated = [each.provenance for each in sets.values() if each.provenance is not None]
    for name, what in _PLACE.items():
        found = {getattr(each, name) for each in stated}
        if len(found) > 1:
            one, another = sorted(map(str, found))[:2]
            raise OptionError(f"the sets were extracted with different {what}: {one} and {another}")
    return stated[0].hook_points if stated else tuple(f"layer {layer}" for layer in range(len(first.values)))

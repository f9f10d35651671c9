"""Whether probes of one prompt set read another: a matrix of sets, cross-validated on its diagonal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Float

from activations.errors import LabelError, OptionError
from probes.evaluate import Labelled, held_out_scores
from probes.metrics import auroc, auroc_interval
from probes.train import fit_probes

__all__ = ["Transfer", "transfer_matrix"]


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
        OptionError: No set is given, their layers or widths differ, or an option of the fit is impossible.
    """
    points = _check_same_places(sets)
    _refuse_shared(sets)
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
    stated = {each.provenance.hook_points for each in sets.values() if each.provenance is not None}
    if len(stated) > 1:
        raise OptionError("the sets were extracted at different hook points: expected the same for all")
    return stated.pop() if stated else tuple(f"layer {layer}" for layer in range(len(first.values)))


def _refuse_shared(sets: Mapping[str, Labelled]) -> None:
    """Refuse a prompt in two sets, which would be trained on and tested on.

    Texts tell where both sets have them. Else equal vectors do: only equal prompts give them.
    """
    for (one, first), (other, second) in combinations(sets.items(), 2):
        texts = bool(first.texts and second.texts)
        shared = len(_keys(first, texts=texts) & _keys(second, texts=texts))
        if shared:
            raise LabelError(
                f"{shared} prompts stand in {one!r} and in {other!r}: one would be trained on and tested on",
                hint="Leave them out of one of the two.",
            )


def _keys(labelled: Labelled, *, texts: bool) -> set[object]:
    if texts:
        return {" ".join(text.casefold().split()) for text in labelled.texts}
    rows: Sequence[np.ndarray] = list(labelled.values.swapaxes(0, 1))
    return {np.ascontiguousarray(row).tobytes() for row in rows}

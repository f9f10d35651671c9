"""Which prompts are held out together, what labels might have been by chance, and copies that would leak."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Int

from activations.errors import LabelError, OptionError
from probes.metrics import binary

__all__ = [
    "Groups",
    "checked_labels",
    "deal_folds",
    "plain_text",
    "refuse_copied_rows",
    "refuse_copied_texts",
    "refuse_shared",
    "shuffled_labels",
]

Groups = Sequence[object] | np.ndarray
"""The group of each prompt: any names, one for each prompt."""

# Features by which rows are told apart at first: equal rows are rare, and hashing whole rows is not free.
_TELLING = 16


def checked_labels(labels: np.ndarray | Sequence[bool] | None, prompts: int) -> np.ndarray:
    """Labels as an array, one for each prompt and both classes among them, or a LabelError."""
    if labels is None:
        raise LabelError("the activations carry no labels: pass labels, True where the prompt is harmful")
    truth = binary(labels)
    if truth.shape != (prompts,):
        raise LabelError(f"labels of shape {truth.shape} for {prompts} prompts: expected one for each")
    if truth.all() or not truth.any():
        raise LabelError(
            f"{int(truth.sum())} of {prompts} prompts are harmful: expected some of both classes",
            hint="Use a prompt set with harmful and benign prompts, as `matched-pairs`.",
        )
    return truth


def deal_folds(
    labels: Bool[np.ndarray, " prompt"], members: Int[np.ndarray, " prompt"], folds: int, rng: np.random.Generator
) -> Int[np.ndarray, " prompt"]:
    """Deal groups to folds like cards, sorted by their share of positives, random among equals.

    Groups that hold a class lie next to each other in this order, so two of them suffice for every training set to hold
    that class.

    Raises:
        LabelError: Fewer than two groups hold one of the classes.
        OptionError: `folds` is no whole number from 2 on.
    """
    if folds < 2 or folds != int(folds):
        raise OptionError(f"folds is {folds}: expected 2 or more")
    sizes, positives = np.bincount(members), np.bincount(members, weights=labels)
    holders = int((positives > 0).sum()), int((positives < sizes).sum())
    if min(holders) < 2:
        raise LabelError(
            f"{holders[0]} groups hold harmful prompts and {holders[1]} benign ones: nothing can be held out",
            hint="Give two groups of each class at least, or pass folds=0 to fit without measuring.",
        )
    dealt = np.empty(len(sizes), dtype=np.int64)
    dealt[np.lexsort((rng.random(len(sizes)), -positives / sizes))] = np.arange(len(sizes)) % folds
    return np.asarray(dealt[members])


def shuffled_labels(
    labels: Bool[np.ndarray, " prompt"], members: Int[np.ndarray, " prompt"], rng: np.random.Generator
) -> Bool[np.ndarray, " prompt"]:
    """Labels as they might have fallen by chance: permuted inside mixed groups, and among groups of a single class."""
    sizes, positives = np.bincount(members), np.bincount(members, weights=labels)
    pure = np.flatnonzero((positives == 0) | (positives == sizes))
    group_label = positives > 0
    group_label[pure] = rng.permutation(group_label[pure])
    inside = np.empty_like(labels)
    inside[np.argsort(members, kind="stable")] = labels[np.lexsort((rng.random(len(labels)), members))]
    return np.where(np.isin(members, pure), group_label[members], inside)


def refuse_copied_rows(layer: Callable[[int], np.ndarray], layers: int, members: Int[np.ndarray, " prompt"]) -> None:
    """Refuse prompts of different groups that are equal, bit for bit, at every layer: one would tell of the other.

    At an early layer different prompts may well agree: the last token of a chat template is always the same. So the
    last layer is searched first, and what is equal there at the others. A last layer at which all prompts are alike
    holds nothing that could leak.

    Args:
        layer: Gives the rows of a layer, [prompt, d_model].
        layers: How many there are.
        members: The group of each prompt.

    Raises:
        LabelError: There are such copies; two are named.
    """
    rows = layer(layers - 1)
    telling = np.ascontiguousarray(rows[:, np.linspace(0, rows.shape[1] - 1, _TELLING).astype(int)])
    copies = _equal_at(rows, _alike((row.tobytes() for row in telling), range(len(rows))))
    if copies and len(copies[0]) == len(rows):
        return
    for earlier in range(layers - 1):
        copies = [found for found in copies if len(set(members[found])) > 1]
        if not copies:
            return
        copies = _equal_at(layer(earlier), copies)
    _refuse_apart(copies, members, "have the same activations at every layer")


def refuse_copied_texts(
    texts: Sequence[Hashable], members: Int[np.ndarray, " prompt"], what: str = "are the same text"
) -> None:
    """As `refuse_copied_rows`, of the prompts themselves; texts that are all alike hold nothing that could leak.

    Raises:
        LabelError: There are such copies; two are named.
    """
    _refuse_apart([found for found in _alike(texts, range(len(texts))) if len(found) < len(texts)], members, what)


def refuse_shared(one: Iterable[Hashable], other: Iterable[Hashable], where: str) -> None:
    """Refuse what two sets of prompts share: it would be trained on and tested on.

    Args:
        one: What tells a prompt of one set from others, as `plain_text` does.
        other: The same of the other set.
        where: Names both, as "the training set and in the test set".

    Raises:
        LabelError: They share something.
    """
    shared = len(set(one) & set(other))
    if shared:
        raise LabelError(
            f"{shared} prompts stand in {where}: expected none, or one is trained on and tested on",
            hint="Leave them out of one of the two.",
        )


def plain_text(text: str) -> str:
    """A text as one that copies it with other capitals or spaces."""
    return " ".join(text.casefold().split())


def _equal_at(rows: np.ndarray, candidates: Sequence[Sequence[int]]) -> list[list[int]]:
    """Those of each candidate that are equal here too, bit for bit."""
    return [
        found for some in candidates for found in _alike((np.ascontiguousarray(rows[i]).tobytes() for i in some), some)
    ]


def _refuse_apart(copies: Sequence[Sequence[int]], members: Int[np.ndarray, " prompt"], what: str) -> None:
    for first, *others in copies:
        for other in others:
            if members[other] != members[first]:
                raise _leak(first, other, what)


def _alike(keys: Iterable[Hashable], which: Iterable[int]) -> list[list[int]]:
    """Those of `which` that share a key with another, together."""
    found: dict[Hashable, list[int]] = defaultdict(list)
    for key, i in zip(keys, which, strict=True):
        found[key].append(i)
    return [some for some in found.values() if len(some) > 1]


def _leak(one: int, other: int, why: str) -> LabelError:
    return LabelError(
        f"prompts {one} and {other} {why} but stand in different groups: held out, one is known from the other",
        hint="Give copies one group (`groups`, or the same pair_id in the prompt set), or drop all but one.",
    )

"""Fits of many training sets at once, what each says of prompts that it did not see, and the strength that is best."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from activations.errors import LabelError, OptionError
from probes.discriminant import fit_lda, fit_mean_difference, ledoit_wolf
from probes.logistic import fit_columns
from probes.metrics import auroc_rows
from probes.rows import Rows

__all__ = [
    "METHODS",
    "check_method",
    "checked_strengths",
    "choose_strength",
    "fit_training_sets",
    "held_out_scores",
    "scores_of",
]

METHODS = ("logistic", "mean_difference", "lda")


def check_method(method: str) -> None:
    """Refuse what is none of `METHODS`."""
    if method not in METHODS:
        raise OptionError(f"method is {method!r}: expected one of {', '.join(map(repr, METHODS))}")


def checked_strengths(l2: float | Sequence[float]) -> tuple[float, ...]:
    """Penalties, each once, the strongest first.

    Raises:
        OptionError: There is none, or one is not positive and finite.
    """
    strengths = tuple(sorted({float(one) for one in np.atleast_1d(np.asarray(l2, dtype=float))}, reverse=True))
    if not strengths or not all(0 < one < float("inf") for one in strengths):
        raise OptionError(f"l2 is {l2}: expected a positive number, or several of them")
    return strengths


def fit_training_sets(
    rows: Rows,
    method: str,
    targets: Bool[np.ndarray, "column prompt"],
    kept: Bool[np.ndarray, "column prompt"],
    l2: Sequence[float],
) -> tuple[Float[Tensor, "column k"], Float[Tensor, " column"]]:
    """Coefficients, in the coordinates of `rows`, and biases of one fit a column.

    Args:
        rows: See `prepare`.
        method: One of `METHODS`.
        targets: True where the prompt is harmful.
        kept: Prompts that the fit sees, all with one weight.
        l2: Penalty of each column; used by "logistic" alone.
    """
    truth = torch.from_numpy(np.ascontiguousarray(targets)).to(rows.values)
    weights = torch.from_numpy(np.ascontiguousarray(kept)).to(rows.values)
    weights /= weights.sum(1, keepdim=True)
    if method == "logistic":
        return fit_columns(rows, truth, weights, l2)
    if method == "lda":
        return fit_lda(rows, truth, weights, ledoit_wolf(rows))
    return fit_mean_difference(rows, truth, weights)


def scores_of(rows: Rows, fits: tuple[Tensor, Tensor]) -> Float[np.ndarray, "column prompt"]:
    """Decision values of every fit on every prompt."""
    coefficients, biases = fits
    return (rows.forward(coefficients) + biases[:, None]).double().cpu().numpy()


def held_out_scores(
    scores: Float[np.ndarray, "fold prompt"], held_out: Int[np.ndarray, " prompt"]
) -> Float[np.ndarray, " prompt"]:
    """For each prompt the score by the one fit that did not see it."""
    return np.asarray(scores[held_out, np.arange(len(held_out))])


def choose_strength(
    rows: Rows,
    truth: Bool[np.ndarray, " prompt"],
    held_out: Int[np.ndarray, " prompt"],
    strengths: Sequence[float],
) -> tuple[float, Float[np.ndarray, " prompt"]]:
    """The strength with the best cross-validated AUROC, and held-out scores that no choice has seen.

    Nested: the prompts of fold i are scored at the strength that is best within the other folds, there by fits without
    fold i and the fold being scored. The fit without folds i and j serves both, so nesting costs 10 fits a strength at
    5 folds, not 20. Of equally good strengths the first is taken.

    Raises:
        LabelError: Without two folds a class is missing.
    """
    folds = int(held_out.max()) + 1
    pairs = list(combinations(range(folds), 2))
    left_out = [(fold, fold) for fold in range(folds)] + pairs
    kept = np.stack([(held_out != one) & (held_out != other) for one, other in left_out])
    if folds < 3 or not ((kept & truth).any(axis=1) & (kept & ~truth).any(axis=1)).all():
        raise LabelError(
            "fewer than three groups hold one of the classes: no strength can be chosen within a training set",
            hint="Give three groups of each class at least, or a single l2.",
        )
    columns = len(strengths) * len(kept)
    targets, every = np.broadcast_to(truth, (columns, len(truth))), np.tile(kept, (len(strengths), 1))
    fits = fit_training_sets(rows, "logistic", targets, every, np.repeat(strengths, len(kept)).tolist())
    scores = scores_of(rows, fits).reshape(len(strengths), len(kept), -1)
    nested = np.empty(len(truth))
    for fold in range(folds):
        inner = np.stack([_inner(one, held_out, fold, left_out) for one in scores])
        rest = held_out != fold
        best = int(np.argmax(auroc_rows(inner[:, rest], truth[None, rest])))
        nested[~rest] = scores[best, fold, ~rest]
    outer = np.stack([held_out_scores(one, held_out) for one in scores])
    return strengths[int(np.argmax(auroc_rows(outer, truth[None])))], nested


def _inner(
    scores: Float[np.ndarray, "fit prompt"],
    held_out: Int[np.ndarray, " prompt"],
    outer: int,
    left_out: Sequence[tuple[int, int]],
) -> Float[np.ndarray, " prompt"]:
    """Each prompt's score by the fit that saw neither its fold nor the outer one."""
    which = np.array([left_out.index((min(outer, fold), max(outer, fold))) for fold in range(held_out.max() + 1)])
    return np.asarray(scores[which[held_out], np.arange(len(held_out))])

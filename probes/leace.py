"""Least-squares concept erasure (LEACE): arrays in, never a model.

Belrose et al. 2023, arXiv:2306.03819, section 4: of all affine maps after which no linear reader can tell a concept,
the one that changes activations least, in every norm at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.linalg import solve

from activations.errors import LabelError, NonFiniteError, OptionError

__all__ = [
    "Concepts",
    "Eraser",
    "checked_concepts",
    "fit_eraser",
    "regression",
    "shrinkage_of",
    "unit_columns",
    "variance",
]

Concepts = Mapping[str, np.ndarray | Sequence[float]]
"""Name to one value for each prompt: classes as booleans, or numbers."""

# Squared canonical correlation of activations and concept below which there is nothing to erase: float64 leaves
# about 1e-16 of an exact zero, and one real prompt in a million carries more than this.
_NOTHING = 1e-12


@dataclass(frozen=True)
class Eraser:
    """An affine map that takes concepts out of activations: x - writes @ reads.T @ (x - mean).

    Attributes:
        mean: Mean of the activations that it was fitted on; it stays where it is.
        reads: What is read of an activation, a column for each direction taken out.
        writes: What is taken away for each unit read; `reads.T @ writes` is the identity.
    """

    mean: Float[np.ndarray, " d_model"]
    reads: Float[np.ndarray, "d_model rank"]
    writes: Float[np.ndarray, "d_model rank"]

    def __call__(self, activations: Float[np.ndarray, "*prompt d_model"]) -> Float[np.ndarray, "*prompt d_model"]:
        """The activations without the concepts, in float64."""
        return np.asarray(activations - ((activations - self.mean) @ self.reads) @ self.writes.T)

    def before(
        self, weights: Float[np.ndarray, " d_model"], bias: float
    ) -> tuple[Float[np.ndarray, " d_model"], float]:
        """Weights and bias that read off an activation what the given ones read after the erasure."""
        taken = weights @ self.writes
        return weights - self.reads @ taken, bias + float(taken @ (self.mean @ self.reads))


def fit_eraser(
    activations: Float[np.ndarray, "prompt d_model"], concepts: Concepts, *, shrinkage: float | None = None
) -> Eraser:
    """Fit the smallest change after which no linear reader of the activations beats chance at any of the concepts.

    With S the covariance of the activations and C their covariance with the concepts, x loses
    C (C' S^-1 C)^+ C' S^-1 (x - mean). What is left has no covariance with the concepts on the training data, whatever
    the shrinkage, which only decides along which directions they are taken out. A concept that never varies, or that
    the activations do not carry, takes nothing out.

    This holds for the prompts taken together and says nothing of a part of them: for that, add the concept once more,
    centred on that part and zero elsewhere, as `probes.hygiene` does.

    Cost: one linear system of size min(prompt, d_model).

    Args:
        activations: One layer.
        concepts: What to erase.
        shrinkage: Of S towards a multiple of the identity, 0 to 1. 0 is LEACE to the letter, and fits noise where
            d_model is not far below the number of prompts. None for the amount of Ledoit and Wolf (2004).

    Raises:
        LabelError: A concept has not one value for each prompt, or there is none.
        NonFiniteError: An activation or a value is NaN or infinite.
        OptionError: The activations are no matrix, or `shrinkage` is outside 0 to 1.
    """
    values = np.asarray(activations, dtype=np.float64)
    if values.ndim != 2 or 0 in values.shape:
        raise OptionError(f"activations have shape {values.shape}: expected [prompt, d_model], neither of them 0")
    if not np.isfinite(values).all():
        raise NonFiniteError("activations hold NaN or infinite values")
    targets = unit_columns(checked_concepts(concepts, len(values)))
    mean = values.mean(axis=0)
    rows = values - mean
    covariance = rows.T @ targets / len(rows)
    readers = regression(rows, targets, shrinkage_of(rows, shrinkage))
    strengths, axes = np.linalg.eigh(covariance.T @ readers)
    axes = axes[:, strengths > _NOTHING] / np.sqrt(strengths[strengths > _NOTHING])
    return Eraser(mean, readers @ axes, covariance @ axes)


def checked_concepts(concepts: Concepts, prompts: int) -> dict[str, np.ndarray]:
    """Each concept as an array of booleans or numbers, one for each prompt, or an error as in `fit_eraser`."""
    if not concepts:
        raise LabelError("no concept to take out: expected one at least")
    found = {name: np.asarray(values) for name, values in concepts.items()}
    for name, values in found.items():
        if values.shape != (prompts,) or values.dtype.kind not in "biuf":
            raise LabelError(
                f"concept {name!r} is {values.dtype} of shape {values.shape}: expected {prompts} booleans or numbers",
                hint="Give one value for each prompt.",
            )
        if not np.isfinite(values).all():
            raise NonFiniteError(f"concept {name!r} holds NaN or infinite values")
    return found


def unit_columns(concepts: Mapping[str, np.ndarray]) -> Float[np.ndarray, "prompt concept"]:
    """Concepts side by side, centred and of unit variance; zero where one never varies."""
    stacked = np.stack([values.astype(np.float64) for values in concepts.values()], axis=1)
    centred = stacked - stacked.mean(axis=0)
    spread = np.sqrt((centred**2).mean(axis=0))
    # A spread below float64's rounding of the values is none.
    real = spread > 8 * np.finfo(np.float64).eps * np.abs(stacked).max(axis=0)
    return np.where(real, centred, 0) / np.where(real, spread, 1)


def regression(
    rows: Float[np.ndarray, "prompt d_model"], targets: Float[np.ndarray, "prompt concept"], shrinkage: float
) -> Float[np.ndarray, "d_model concept"]:
    """S^-1 C: least squares of the targets on centred rows, from whichever Gram matrix is smaller."""
    count, width = rows.shape
    if not shrinkage:
        # Directions in which the rows do not vary beyond rounding are left out, as by a pseudo-inverse.
        return np.asarray(np.linalg.lstsq(rows, targets, rcond=None)[0])
    kept, floor = (1 - shrinkage) / count, shrinkage * _mean_variance(rows)
    if not floor:
        return np.zeros((width, targets.shape[1]))
    if width <= count:
        gram = kept * rows.T @ rows + floor * np.eye(width)
        return np.asarray(solve(gram, rows.T @ targets / count, assume_a="pos"))
    gram = kept * rows @ rows.T + floor * np.eye(count)
    return np.asarray(rows.T @ solve(gram, targets / count, assume_a="pos"))


def variance(
    rows: Float[np.ndarray, "prompt d_model"], weights: Float[np.ndarray, " d_model"], shrinkage: float
) -> float:
    """Variance of the weights' scores on centred rows, under the shrunk covariance: w' S w."""
    own, spherical = ((rows @ weights) ** 2).mean(), (weights**2).sum() * _mean_variance(rows)
    return float((1 - shrinkage) * own + shrinkage * spherical)


def shrinkage_of(rows: Float[np.ndarray, "prompt d_model"], given: float | None) -> float:
    """As given, or the amount that Ledoit and Wolf (2004) expect to come nearest to the true covariance.

    Raises:
        OptionError: The one given is outside 0 to 1.
    """
    if given is not None:
        if not 0 <= given <= 1:
            raise OptionError(f"shrinkage is {given}: expected a number from 0 to 1, or None")
        return given
    count, width = rows.shape
    gram = rows.T @ rows if width <= count else rows @ rows.T
    size = float((gram**2).sum()) / count**2
    distance = size - width * _mean_variance(rows) ** 2
    noise = (float(((rows**2).sum(axis=1) ** 2).mean()) - size) / count
    return min(1.0, noise / distance) if distance > 0 else 1.0


def _mean_variance(rows: np.ndarray) -> float:
    """Of one dimension: what the covariance is shrunk towards."""
    return float((rows**2).mean())

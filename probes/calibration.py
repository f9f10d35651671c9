"""From scores to probabilities that mean what they say, fitted on other prompts than those they are given for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import expit

from activations.errors import NonFiniteError
from probes.folds import checked_labels, deal_folds
from probes.metrics import calibration_error, clopper_pearson, group_numbers

__all__ = ["Calibration", "Platt", "Reliability", "calibration_of", "cross_calibrated", "fit_platt", "reliability"]

# Newton's method on two parameters takes ten steps or so; Lin et al. (2007) allow 100 too.
_STEPS = 100
# Of the gradient a prompt, in units of probability: far below what any prompt count resolves.
_TOLERANCE = 1e-10
# Sets of labels drawn from the probabilities themselves, for the calibration error that chance alone gives.
_DRAWS = 200


@dataclass(frozen=True)
class Platt:
    """A line from scores to log odds (Platt 1999).

    Attributes:
        slope: Log odds per unit of score.
        intercept: Log odds at score 0.
    """

    slope: float
    intercept: float

    def probabilities(self, scores: Float[np.ndarray, " prompt"]) -> Float[np.ndarray, " prompt"]:
        """The probability of the positive class, in (0, 1)."""
        return np.asarray(expit(self.slope * np.asarray(scores, dtype=np.float64) + self.intercept))


@dataclass(frozen=True)
class Calibration:
    """How far stated probabilities are from what happens, over ten bins of equal width.

    Attributes:
        before: Expected calibration error of the scores read as log odds; None where they are none.
        after: The same after Platt scaling fitted on the other folds.
        by_chance: What 95 of 100 perfectly calibrated probabilities of the same values stay below; few prompts make it
            large.
    """

    before: float | None
    after: float
    by_chance: float


@dataclass(frozen=True)
class Reliability:
    """Stated probability against observed share, bin by bin; empty bins are left out.

    Attributes:
        stated: Mean probability of a bin's prompts.
        observed: Share of positives among them.
        low: Clopper-Pearson bounds of that share, at 95 %.
        high: The upper ones.
        counts: Prompts in the bin.
    """

    stated: Float[np.ndarray, " bin"]
    observed: Float[np.ndarray, " bin"]
    low: Float[np.ndarray, " bin"]
    high: Float[np.ndarray, " bin"]
    counts: Int[np.ndarray, " bin"]


def fit_platt(scores: Float[np.ndarray, " prompt"], labels: Bool[np.ndarray, " prompt"]) -> Platt:
    """Fit Platt scaling with the smoothed targets of Platt (1999), so that perfect separation has an optimum too.

    A positive has the target (N+ + 1) / (N+ + 2), a negative 1 / (N- + 2). Newton's method with halved steps, as in
    Lin, Lin and Weng (2007), on standardised scores.

    Raises:
        LabelError: Only one class is present, or lengths differ.
        NonFiniteError: A score is NaN or infinite.
    """
    scores = _finite(scores)
    labels = checked_labels(labels, len(scores))
    positives, negatives = int(labels.sum()), int((~labels).sum())
    targets = np.where(labels, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    centre, spread = scores.mean(), scores.std()
    if spread <= np.finfo(np.float64).eps * max(1.0, abs(centre)):  # equal scores: only the share of positives is known
        share = targets.mean()
        return Platt(0.0, float(np.log(share / (1 - share))))
    columns = np.stack([(scores - centre) / spread, np.ones_like(scores)], axis=1)
    slope, intercept = _newton(columns, targets)
    return Platt(float(slope / spread), float(intercept - slope * centre / spread))


def cross_calibrated(
    scores: Float[np.ndarray, " prompt"],
    labels: Bool[np.ndarray, " prompt"],
    groups: Sequence[object] | np.ndarray | None = None,
    *,
    folds: int = 5,
    seed: int = 0,
) -> Float[np.ndarray, " prompt"]:
    """The probability of each prompt after Platt scaling fitted on the folds that do not hold it, groups kept together.

    Raises:
        LabelError: As in `fit_platt`, or fewer than two groups hold one of the classes.
        NonFiniteError: A score is NaN or infinite.
        OptionError: `folds` is no whole number from 2 on.
    """
    scores = _finite(scores)
    labels = checked_labels(labels, len(scores))
    members = group_numbers(groups, len(scores))
    held_out = deal_folds(labels, members, folds, np.random.default_rng(seed))
    probabilities = np.empty(len(scores))
    for fold in range(int(held_out.max()) + 1):
        kept = held_out != fold
        probabilities[~kept] = fit_platt(scores[kept], labels[kept]).probabilities(scores[~kept])
    return probabilities


def calibration_of(
    scores: Float[np.ndarray, " prompt"],
    labels: Bool[np.ndarray, " prompt"],
    groups: Sequence[object] | np.ndarray | None = None,
    *,
    log_odds: bool = True,
    seed: int = 0,
) -> Calibration:
    """Calibration error before and after cross-fitted Platt scaling, beside what chance gives.

    Args:
        scores: Of prompts that the probe was not fitted on.
        labels: True for positives.
        groups: Prompts that stay in one fold, as pair ids.
        log_odds: Whether the scores claim to be log odds, as a logistic probe's do.
        seed: Of the folds and of the draws by chance.

    Raises:
        LabelError, NonFiniteError: As in `cross_calibrated`.
    """
    after = cross_calibrated(scores, labels, groups, seed=seed)
    truth = np.asarray(labels, dtype=bool)
    draws = np.random.default_rng(seed).random((_DRAWS, len(after))) < after
    return Calibration(
        before=calibration_error(expit(np.asarray(scores, dtype=np.float64)), truth) if log_odds else None,
        after=calibration_error(after, truth),
        by_chance=float(np.quantile([calibration_error(after, drawn) for drawn in draws], 0.95)),
    )


def reliability(
    probabilities: Float[np.ndarray, " prompt"], labels: Bool[np.ndarray, " prompt"], *, bins: int = 10
) -> Reliability:
    """What a reliability diagram draws, over bins of equal width.

    Raises:
        LabelError: There are no prompts, or lengths differ.
        OptionError: A probability is outside [0, 1], or `bins` is not positive.
    """
    calibration_error(probabilities, labels, bins=bins)  # refuses what has no diagram
    probabilities, labels = np.asarray(probabilities, dtype=np.float64), np.asarray(labels, dtype=bool)
    which = np.minimum((probabilities * bins).astype(int), bins - 1)
    counts = np.bincount(which, minlength=bins)
    held = counts > 0
    positives = np.bincount(which, weights=labels, minlength=bins)[held]
    bounds = [clopper_pearson(int(found), int(tried)) for found, tried in zip(positives, counts[held], strict=True)]
    low, high = np.array(bounds).T
    return Reliability(
        stated=np.bincount(which, weights=probabilities, minlength=bins)[held] / counts[held],
        observed=positives / counts[held],
        low=low,
        high=high,
        counts=counts[held],
    )


def _newton(columns: Float[np.ndarray, "prompt 2"], targets: Float[np.ndarray, " prompt"]) -> Float[np.ndarray, " 2"]:
    share = targets.mean()
    line = np.array([0.0, np.log(share / (1 - share))])
    loss = _loss(line, columns, targets)
    for _ in range(_STEPS):
        stated = expit(columns @ line)
        gradient = columns.T @ (stated - targets) / len(targets)
        if np.abs(gradient).max() < _TOLERANCE:
            break
        curvature = (columns.T * (stated * (1 - stated))) @ columns / len(targets)
        step = np.linalg.solve(curvature + 1e-12 * np.eye(2), gradient)
        shorter = 1.0
        while (tried := _loss(line - shorter * step, columns, targets)) > loss and shorter > _TOLERANCE:
            shorter /= 2
        line, loss = line - shorter * step, tried
    return np.asarray(line)


def _loss(line: np.ndarray, columns: np.ndarray, targets: np.ndarray) -> float:
    """Cross entropy a prompt, exact where a probability rounds to 0 or 1."""
    odds = columns @ line
    return float((np.logaddexp(0, odds) - targets * odds).mean())


def _finite(scores: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores, dtype=np.float64)
    if not np.isfinite(scores).all():
        raise NonFiniteError(f"{int((~np.isfinite(scores)).sum())} of {scores.size} scores are NaN or infinite")
    return scores

"""How good a score is, and how sure of that one may be: arrays in, numbers out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import beta, rankdata

from activations.errors import LabelError, NonFiniteError, OptionError

__all__ = [
    "Difference",
    "Rate",
    "auroc",
    "auroc_difference",
    "auroc_interval",
    "auroc_rows",
    "binary",
    "calibration_error",
    "clopper_pearson",
    "empirical_p",
    "fpr_threshold",
    "group_numbers",
    "rate_at_fpr",
    "tpr_at_fpr",
]

# Products such as 0.07 * 100 land a rounding error off a whole number; nothing measured here is finer than this.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Difference:
    """By how much one AUROC exceeds another on the same prompts.

    Attributes:
        value: The first minus the second, from -1 to 1.
        interval: Its confidence interval.
    """

    value: float
    interval: tuple[float, float]

    @property
    def clear(self) -> bool:
        """Whether the first is larger, beyond what chance explains: the whole interval lies above 0."""
        return self.interval[0] > 0


@dataclass(frozen=True)
class Rate:
    """The share of positives found at a false positive rate, or why it is not given.

    Attributes:
        fpr: The false positive rate asked for.
        tpr: The share of positives above the threshold; None where the negatives cannot resolve the rate.
        interval: Its Clopper-Pearson bounds; None with it.
        fpr_interval: Clopper-Pearson bounds of the rate at which new negatives exceed the threshold; None with it.
        reason: Why there is no number; empty where there is one.
    """

    fpr: float
    tpr: float | None = None
    interval: tuple[float, float] | None = None
    fpr_interval: tuple[float, float] | None = None
    reason: str = ""


def auroc(scores: Float[np.ndarray, " prompt"], labels: Bool[np.ndarray, " prompt"]) -> float:
    """The probability that a positive scores above a negative, ties counted as one half.

    Raises:
        LabelError: Only one class is present, or lengths differ.
        NonFiniteError: A score is NaN or infinite.
    """
    scores, labels = _checked(scores, labels)
    return float(auroc_rows(scores[None], labels[None])[0])


def auroc_rows(
    scores: Float[np.ndarray, "row prompt"], labels: Bool[np.ndarray, "#row prompt"]
) -> Float[np.ndarray, " row"]:
    """`auroc` of each row of scores (Mann-Whitney), with labels for all rows or for each; unchecked, NaN gives NaN."""
    labels, count = np.broadcast_to(labels, scores.shape), scores.shape[-1]
    positives = labels.sum(axis=-1)
    order = np.argsort(scores, axis=-1)
    rank_sums = np.take_along_axis(labels, order, axis=-1) @ np.arange(1.0, count + 1)
    placed = np.take_along_axis(scores, order, axis=-1)
    # Mid-ranks take four times as long, and only ties need them.
    tied = (placed[..., 1:] == placed[..., :-1]).any(axis=-1) | np.isnan(placed[..., -1])
    rank_sums[tied] = np.where(labels[tied], rankdata(scores[tied], axis=-1), 0.0).sum(axis=-1)
    wins = rank_sums - positives * (positives + 1) / 2
    return np.asarray(wins / (positives * (count - positives)))


def auroc_interval(
    scores: Float[np.ndarray, " prompt"],
    labels: Bool[np.ndarray, " prompt"],
    *,
    groups: Sequence[object] | np.ndarray | None = None,
    level: float = 0.95,
) -> tuple[float, float]:
    """A confidence interval of the AUROC that knows which prompts belong together.

    DeLong et al. (1988) where every prompt stands alone, and its extension to clusters, Obuchowski (1997), where
    prompts come in pairs or larger groups; on the logit scale, so it stays within [0, 1]. Perfect separation has an
    estimated variance of zero and says nothing about the next prompt: there the bound is the exact one for that many
    disjoint pairs of a positive and a negative, all ordered rightly.

    Args:
        scores: Higher is more positive.
        labels: True for positives.
        groups: The group of each prompt, as pair ids; every prompt its own group when None.
        level: Confidence, in (0, 1).

    Raises:
        LabelError: Only one class is present, or lengths differ.
        NonFiniteError: A score is NaN or infinite.
        OptionError: `level` is outside (0, 1).
    """
    _check_fraction("level", level)
    scores, labels = _checked(scores, labels)
    members = group_numbers(groups, len(labels))
    area = auroc(scores, labels)
    sums = _cluster_sums(scores, labels, members)
    error = math.sqrt(max(_clustered_covariance(sums, sums, labels, members), 0.0))
    if min(area, 1 - area) < _ROUNDING:
        return _separated_interval(area, _disjoint_pairs(labels, members), level)
    if error < _ROUNDING:  # all scores tie, or one group holds everything: nothing to learn a spread from
        return 0.0, 1.0
    centre = math.log(area / (1 - area))
    reach = NormalDist().inv_cdf((1 + level) / 2) * error / (area * (1 - area))
    return _logistic(centre - reach), _logistic(centre + reach)


def auroc_difference(
    first: Float[np.ndarray, " prompt"],
    second: Float[np.ndarray, " prompt"],
    labels: Bool[np.ndarray, " prompt"],
    *,
    groups: Sequence[object] | np.ndarray | None = None,
    level: float = 0.95,
) -> Difference:
    """By how much one scoring separates the same prompts better than another.

    Both AUROCs have their `auroc_interval`. The interval of the difference joins these two by the correlation of the
    AUROCs, after Zou and Donner (2008, "MOVER"); the covariance is that of DeLong et al. (1988), summed over groups as
    in Obuchowski (1997). DeLong's own interval is symmetric, and near perfect separation too short: at AUROCs of 0.96
    and 0.92 and 40 pairs it covers 93.5 % where this one covers 95.4 % (1500 simulations). Elsewhere they agree.

    Args:
        first: Higher is more positive.
        second: Likewise, of the same prompts in the same order.
        labels: True for positives.
        groups: As in `auroc_interval`.
        level: Confidence, in (0, 1).

    Raises:
        LabelError: Only one class is present, or lengths differ.
        NonFiniteError: A score is NaN or infinite.
        OptionError: `level` is outside (0, 1).
    """
    scorings = [_checked(scores, labels)[0] for scores in (first, second)]
    truth = binary(labels)
    members = group_numbers(groups, len(truth))
    areas = [auroc(scores, truth) for scores in scorings]
    (low, high), (other_low, other_high) = (
        auroc_interval(scores, truth, groups=members, level=level) for scores in scorings
    )
    value = areas[0] - areas[1]
    if np.array_equal(*map(rankdata, scorings)):  # one scoring under two names: no prompt could ever part them
        return Difference(value, (0.0, 0.0))
    correlation = _correlation(scorings, truth, members)
    below, above = areas[0] - low, other_high - areas[1]
    beyond, under = high - areas[0], areas[1] - other_low
    return Difference(value, (value - _joined(below, above, correlation), value + _joined(beyond, under, correlation)))


def rate_at_fpr(
    scores: Float[np.ndarray, " prompt"], labels: Bool[np.ndarray, " prompt"], fpr: float, *, level: float = 0.95
) -> Rate:
    """`tpr_at_fpr` with Clopper-Pearson bounds, and with the reason where no rate can be given.

    The bounds of the true positive rate are those at the threshold found. That of the false positive rate holds for a
    threshold taken from these very negatives: its upper end is the exact quantile of an order statistic. Both take
    prompts for independent, so prompts of one class in one group make them too short; twins of two classes do not.

    Raises:
        LabelError: Only one class is present, or lengths differ.
        NonFiniteError: A score is NaN or infinite.
        OptionError: `fpr` or `level` is outside (0, 1).
    """
    scores, labels = _checked(scores, labels)
    negatives, positives = scores[~labels], scores[labels]
    threshold = fpr_threshold(negatives, fpr)
    if threshold is None:
        least = math.ceil(1 / fpr - _ROUNDING)
        reason = f"{len(negatives)} negatives cannot resolve a false positive rate of {fpr:g}: that takes {least}"
        return Rate(fpr, reason=reason)
    found, wrong = int((positives > threshold).sum()), int((negatives > threshold).sum())
    return Rate(
        fpr,
        tpr=found / len(positives),
        interval=clopper_pearson(found, len(positives), level=level),
        fpr_interval=clopper_pearson(wrong, len(negatives), level=level),
    )


def tpr_at_fpr(scores: Float[np.ndarray, " prompt"], labels: Bool[np.ndarray, " prompt"], fpr: float) -> float | None:
    """The share of positives found when at most a share `fpr` of the negatives is flagged.

    Returns:
        None where the negatives cannot resolve the rate (`fpr * negatives < 1`).

    Raises:
        LabelError: Only one class is present, or lengths differ.
        NonFiniteError: A score is NaN or infinite.
        OptionError: `fpr` is outside (0, 1).
    """
    scores, labels = _checked(scores, labels)
    threshold = fpr_threshold(scores[~labels], fpr)
    return None if threshold is None else float((scores[labels] > threshold).mean())


def fpr_threshold(negatives: Float[np.ndarray, " negative"], fpr: float) -> float | None:
    """The lowest threshold that at most a share `fpr` of the negatives exceeds; None where they cannot resolve it."""
    _check_fraction("fpr", fpr)
    allowed = math.floor(fpr * len(negatives) + _ROUNDING)
    return float(np.sort(negatives)[-(allowed + 1)]) if allowed >= 1 else None


def clopper_pearson(successes: int, trials: int, *, level: float = 0.95) -> tuple[float, float]:
    """The exact binomial interval of a proportion (Clopper and Pearson 1934); (0, 1) when nothing was tried.

    Raises:
        OptionError: `successes` is not in 0..`trials`, or `level` is outside (0, 1).
    """
    _check_fraction("level", level)
    if not 0 <= successes <= trials:
        raise OptionError(f"{successes} successes in {trials} trials: expected a count from 0 to {trials}")
    tail = (1 - level) / 2
    low = float(beta.ppf(tail, successes, trials - successes + 1)) if successes else 0.0
    high = float(beta.ppf(1 - tail, successes + 1, trials - successes)) if successes < trials else 1.0
    return low, high


def calibration_error(
    probabilities: Float[np.ndarray, " prompt"], labels: Bool[np.ndarray, " prompt"], *, bins: int = 10
) -> float:
    """Expected calibration error: the mean gap of stated probability and observed share, over bins of equal width.

    Raises:
        LabelError: There are no prompts, or lengths differ.
        OptionError: A probability is outside [0, 1], or `bins` is not positive.
    """
    probabilities, labels = np.asarray(probabilities, dtype=np.float64), binary(labels)
    if probabilities.shape != labels.shape or not labels.size:
        raise LabelError(
            f"{labels.shape} labels for {probabilities.shape} probabilities: expected as many, and one at least"
        )
    if bins < 1 or not np.all((probabilities >= 0) & (probabilities <= 1)):
        raise OptionError("calibration needs at least one bin and probabilities from 0 to 1")
    which = np.minimum((probabilities * bins).astype(int), bins - 1)
    gaps = np.bincount(which, weights=probabilities - labels, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def empirical_p(value: float, null_values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The share of the null that is at least as large as `value`, `value` itself counted with it.

    Returns:
        The p-value (1 + exceeding) / (1 + count), and the smallest p-value that this null can give, 1 / (1 + count).

    Raises:
        NonFiniteError: The value or a null value is NaN.
    """
    null = np.asarray(null_values, dtype=np.float64)
    if math.isnan(value) or np.isnan(null).any():
        raise NonFiniteError("a p-value of NaN has no meaning: the statistic or its null is not a number")
    resolution = 1 / (1 + null.size)
    return float((1 + (null >= value).sum()) * resolution), resolution


def group_numbers(groups: Sequence[object] | np.ndarray | None, count: int) -> Int[np.ndarray, " prompt"]:
    """Groups numbered from 0 in order of appearance of their names; every prompt its own when `groups` is None.

    Raises:
        LabelError: There is not one group for each prompt, or one is missing (None or NaN).
    """
    if groups is None:
        return np.arange(count)
    if len(groups) != count or getattr(groups, "ndim", 1) != 1:
        raise LabelError(f"{len(groups)} groups for {count} prompts: expected one for each")
    numbers: dict[object, int] = {}
    for i, group in enumerate(groups):
        if group is None or group != group:
            raise LabelError(f"the group of prompt {i} is {group}: expected a name", hint="Name each unpaired prompt.")
        numbers.setdefault(group, len(numbers))
    return np.array([numbers[group] for group in groups], dtype=np.int64)


def binary(labels: np.ndarray | Sequence[bool]) -> Bool[np.ndarray, " *shape"]:
    """Labels as booleans.

    Raises:
        LabelError: One is neither True nor False, 1 nor 0: NumPy takes NaN, 2 and the text "False" for true.
    """
    given = np.asarray(labels)
    if given.dtype != bool and (given.dtype.kind not in "iuf" or not np.isin(given, (0, 1)).all()):
        raise LabelError(
            f"labels are {given.dtype} and not all True or False: expected True where the prompt is harmful",
            hint="Convert them first, as labels == 'harmful'.",
        )
    return given.astype(bool)


def _checked(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores, labels = np.asarray(scores, dtype=np.float64), binary(labels)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise LabelError(
            f"labels of shape {labels.shape} for scores of shape {scores.shape}: expected one for each score"
        )
    if labels.all() or not labels.any():
        raise LabelError(f"{int(labels.sum())} of {len(labels)} labels are positive: expected both classes")
    if not np.isfinite(scores).all():
        raise NonFiniteError(f"{int((~np.isfinite(scores)).sum())} of {len(scores)} scores are NaN or infinite")
    return scores, labels


def _cluster_sums(scores: np.ndarray, labels: np.ndarray, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Obuchowski (1997): placement values of positives and of negatives, centred and summed cluster by cluster."""
    positives, negatives = int(labels.sum()), int((~labels).sum())
    everywhere = rankdata(scores)
    above = (everywhere[labels] - rankdata(scores[labels])) / negatives
    below = 1 - (everywhere[~labels] - rankdata(scores[~labels])) / positives
    clusters = int(members.max()) + 1
    area = above.mean()
    return (
        np.bincount(members[labels], weights=above - area, minlength=clusters) / positives,
        np.bincount(members[~labels], weights=below - area, minlength=clusters) / negatives,
    )


def _clustered_covariance(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray], labels: np.ndarray, members: np.ndarray
) -> float:
    """Obuchowski (1997), equations 4 to 6, of two scorings' sums; the variance where both are the same."""
    crossed = (first[0] * second[1] + first[1] * second[0]).sum()
    return float(
        _unbiased(np.unique(members[labels]).size) * (first[0] * second[0]).sum()
        + _unbiased(np.unique(members[~labels]).size) * (first[1] * second[1]).sum()
        + _unbiased(np.unique(members).size) * crossed
    )


def _correlation(scorings: Sequence[np.ndarray], labels: np.ndarray, members: np.ndarray) -> float:
    """Of two AUROCs; 0 where one has no spread, as at perfect separation, so that nothing is taken off its reach."""
    first, second = (_cluster_sums(scores, labels, members) for scores in scorings)
    own = [_clustered_covariance(sums, sums, labels, members) for sums in (first, second)]
    if min(own) < _ROUNDING**2:
        return 0.0
    shared = _clustered_covariance(first, second, labels, members) / math.sqrt(own[0] * own[1])
    return min(max(shared, -1.0), 1.0)


def _joined(one: float, other: float, correlation: float) -> float:
    """How far the difference of two estimates reaches, whose own reaches on the sides that matter are given."""
    return math.sqrt(max(one**2 + other**2 - 2 * correlation * one * other, 0.0))


def _unbiased(count: int) -> float:
    return count / (count - 1) if count > 1 else 1.0


def _disjoint_pairs(labels: np.ndarray, members: np.ndarray) -> int:
    """How many pairs of a positive and a negative share no group with each other (at least one)."""
    with_positive, with_negative = np.unique(members[labels]).size, np.unique(members[~labels]).size
    return max(1, min(with_positive, with_negative, np.unique(members).size // 2))


def _separated_interval(area: float, pairs: int, level: float) -> tuple[float, float]:
    """All of `pairs` independent comparisons agree with probability AUROC^pairs at most: solve for the tail."""
    far = ((1 - level) / 2) ** (1 / pairs)
    return (far, 1.0) if area > 0.5 else (0.0, 1 - far)


def _logistic(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value > -700 else 0.0


def _check_fraction(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise OptionError(f"{name} is {value}: expected a number between 0 and 1")

"""Fit a probe at every layer, with the nulls it must beat: arrays in, never a model.

All that a layer needs is fitted at once. The final probe, every cross-validation fold and every shuffled labelling
differ only in targets and row weights, so they are columns of one problem, and each step of the solver is a matrix
product that they share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict, Unpack, cast

import numpy as np
from einops import repeat
from jaxtyping import Bool, Float, Int

from activations.errors import LabelError, NonFiniteError, OptionError
from probes.logistic import fit_logistic
from probes.metrics import auroc, auroc_interval, auroc_rows, fpr_threshold, group_numbers
from probes.probe import LayerMetrics, Method, ProbeSet

if TYPE_CHECKING:
    from activations.provenance import Provenance as ExtractionProvenance
    from activations.results import Activations

__all__ = ["Groups", "Provenance", "checked_labels", "deal_folds", "fit_probes", "shuffled_labels", "words_baseline"]

Groups = Sequence[object] | np.ndarray
"""The group of each prompt: any names, one for each prompt."""

_SHUFFLES = 10
_RANDOM_DIRECTIONS = 100
_THRESHOLD_FPR = 0.01


class Provenance(TypedDict, total=False):
    """What a probe set should know of its origin; see `ProbeSet` and, for `words`, `words_baseline`."""

    hook_points: Sequence[str]
    pooling: str
    base_fingerprint: str
    template_hash: str
    prompts_hash: str
    prompts_name: str
    words: float | None


def fit_probes(
    activations: Float[np.ndarray, "layer prompt d_model"] | Activations,
    labels: Bool[np.ndarray, " prompt"] | Sequence[bool] | None = None,
    *,
    groups: Groups | None = None,
    method: str = "logistic",
    l2: float = 1e-2,
    folds: int = 5,
    seed: int = 0,
    **provenance: Unpack[Provenance],
) -> ProbeSet:
    """Fit one probe per layer, and measure each on held-out prompts beside its nulls.

    The logistic probe has the optimum of scikit-learn's `LogisticRegression`; the difference of means needs no solver.
    Cross-validation standardises once, over all prompts: that uses no label.

    Cost: 56 fits a layer at 5 folds. For `method="logistic"` see `fit_logistic`; `method="mean_difference"` needs one
    product. Memory: one layer in float64.

    Args:
        activations: Pooled residual stream, any float dtype; standardised per layer in float32.
        labels: True where the prompt is harmful; those of the activations when None.
        groups: Prompts that must stay together; the pair ids of the activations when None, of bare arrays every prompt
            its own.
        method: "logistic" or "mean_difference".
        l2: Penalty per prompt on the direction (not the bias), in scikit-learn's terms 1 / (C * n_prompts).
        folds: Of the cross-validation; 0 fits without measuring.
        seed: Of folds, shuffles and random directions.
        **provenance: Where bare arrays came from, see `Provenance`; extracted activations know it themselves.

    Raises:
        LabelError: Only one class is present, labels or groups are not one for each prompt, or fewer than two groups
            hold one of the classes, so that nothing can be held out.
        NonFiniteError: An activation is NaN or infinite.
        OptionError: `method`, `l2`, `folds` or the number of hook points is impossible.
    """
    values, truth, members, origin = _unpacked(activations, labels, groups, provenance)
    _check_options(method, l2, folds)
    plan = _plan(truth, members, folds, seed)
    layers = [_fit_layer(layer, plan, method, l2) for layer in values]
    metrics = tuple(_measure(layer, plan, origin.get("words")) for layer in layers) if folds else ()
    return ProbeSet(
        directions=np.stack([layer.direction for layer in layers]).astype(np.float32),
        biases=np.array([layer.bias for layer in layers], dtype=np.float32),
        means=np.stack([layer.mean for layer in layers]),
        scales=np.stack([layer.scale for layer in layers]),
        gains=np.array([layer.gain for layer in layers], dtype=np.float32),
        method=cast(Method, method),
        metrics=metrics,
        hook_points=tuple(origin["hook_points"]),
        pooling=origin.get("pooling", "last"),
        base_fingerprint=origin.get("base_fingerprint", ""),
        template_hash=origin.get("template_hash", ""),
        prompts_hash=origin.get("prompts_hash", ""),
        prompts_name=origin.get("prompts_name", ""),
    )


def words_baseline(
    prompts: Sequence[str],
    labels: Bool[np.ndarray, " prompt"] | Sequence[bool],
    groups: Groups | None = None,
    *,
    folds: int = 5,
    seed: int = 0,
) -> float:
    """Cross-validated AUROC of logistic regression on tf-idf words, under the folds that `fit_probes` takes.

    A probe that does not beat it may read words rather than intent. Words are hashed into 65,536 columns, so that
    prompts without any word are no special case.

    Raises:
        LabelError: As in `fit_probes`.
    """
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    truth = checked_labels(labels, len(prompts))
    held_out = deal_folds(truth, group_numbers(groups, len(truth)), folds, np.random.default_rng(seed))
    counts = HashingVectorizer(n_features=2**16, norm=None, alternate_sign=False).transform(prompts)
    scores = np.empty(len(truth))
    for fold in range(held_out.max() + 1):
        kept, tested = np.flatnonzero(held_out != fold), np.flatnonzero(held_out == fold)
        model = make_pipeline(TfidfTransformer(), LogisticRegression(max_iter=1000)).fit(counts[kept], truth[kept])
        scores[tested] = model.decision_function(counts[tested])
    return auroc(scores, truth)


@dataclass(frozen=True)
class _Plan:
    """Which labellings to fit, the true one first, and which fold holds out which prompt in each."""

    labels: Bool[np.ndarray, "labelling prompt"]
    held_out: Int[np.ndarray, "labelling prompt"]
    members: Int[np.ndarray, " prompt"]
    folds: int
    directions_seed: int

    def columns(self) -> tuple[Float[np.ndarray, "prompt column"], Float[np.ndarray, "prompt column"]]:
        """Targets and row weights: everything first, then each labelling's folds; weights of a column sum to 1."""
        targets = np.concatenate([self.labels[:1], repeat(self.labels, "l prompt -> (l f) prompt", f=self.folds)])
        kept = repeat(self.held_out, "l prompt -> l f prompt", f=self.folds) != np.arange(self.folds)[:, None]
        weights = np.concatenate([np.ones((1, targets.shape[1])), kept.reshape(-1, targets.shape[1])])
        return targets.T.astype(np.float64), (weights / weights.sum(axis=1, keepdims=True)).T

    def held_out_scores(self, scores: Float[np.ndarray, "prompt column"]) -> Float[np.ndarray, "labelling prompt"]:
        """For each labelling and prompt the score by the one fit that did not see the prompt."""
        first = 1 + np.arange(len(self.labels))[:, None] * self.folds
        return np.asarray(scores[np.arange(scores.shape[0]), first + self.held_out])


def _plan(labels: np.ndarray, members: np.ndarray, folds: int, seed: int) -> _Plan:
    rng = np.random.default_rng(seed)
    if not folds:
        empty = np.zeros((0, len(labels)), dtype=np.int64)
        return _Plan(labels[None], empty, members, 0, seed)
    held_out = [deal_folds(labels, members, folds, rng)]
    labellings = [labels]
    for _ in range(_SHUFFLES):
        labellings.append(shuffled_labels(labels, members, rng))
        held_out.append(deal_folds(labellings[-1], members, folds, rng))
    return _Plan(np.stack(labellings), np.stack(held_out), members, int(held_out[0].max()) + 1, seed)


def deal_folds(labels: np.ndarray, members: np.ndarray, folds: int, rng: np.random.Generator) -> np.ndarray:
    """Deal groups to folds like cards, sorted by their share of positives, random among equals.

    Groups that hold a class lie next to each other in this order, so two of them suffice for every training set to hold
    that class.
    """
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


def shuffled_labels(labels: np.ndarray, members: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Labels as they might have fallen by chance: permuted inside mixed groups, and among groups of a single class."""
    sizes, positives = np.bincount(members), np.bincount(members, weights=labels)
    pure = np.flatnonzero((positives == 0) | (positives == sizes))
    group_label = positives > 0
    group_label[pure] = rng.permutation(group_label[pure])
    inside = np.empty_like(labels)
    inside[np.argsort(members, kind="stable")] = labels[np.lexsort((rng.random(len(labels)), members))]
    return np.where(np.isin(members, pure), group_label[members], inside)


@dataclass(frozen=True)
class _Layer:
    direction: Float[np.ndarray, " d_model"]
    bias: float
    mean: Float[np.ndarray, " d_model"]
    scale: Float[np.ndarray, " d_model"]
    gain: float
    held_out: Float[np.ndarray, "labelling prompt"]
    random_directions: float


def _fit_layer(values: Float[np.ndarray, "prompt d_model"], plan: _Plan, method: str, l2: float) -> _Layer:
    mean, scale = _standardisation(values)
    rows = ((values - mean) / scale).astype(np.float64)
    targets, weights = plan.columns()
    if method == "logistic":
        coefficients, biases = fit_logistic(rows, targets, weights, l2)
    else:
        coefficients, biases = _mean_difference(rows, targets, weights)
    gain = float(np.linalg.norm(coefficients[:, 0]))
    # A layer without any variance has no direction; the first axis with gain 0 scores every prompt alike.
    direction = coefficients[:, 0] / gain if gain else np.eye(1, rows.shape[1])[0]
    return _Layer(
        direction=direction,
        bias=float(biases[0]),
        mean=mean,
        scale=scale,
        gain=gain,
        held_out=plan.held_out_scores(rows @ coefficients + biases),
        random_directions=_best_random_direction(rows, plan) if plan.folds else 0.5,
    )


def _standardisation(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean = values.mean(axis=0, dtype=np.float64)
    scale = np.sqrt(((values - mean) ** 2).mean(axis=0, dtype=np.float64))
    # A spread below float32's rounding of the mean is noise: such a feature is constant, and must not be blown up.
    constant = scale <= 4 * np.finfo(np.float32).eps * np.abs(mean)
    return mean.astype(np.float32), np.where(constant, 1.0, scale).astype(np.float32)


def _best_random_direction(rows: np.ndarray, plan: _Plan) -> float:
    directions = np.random.default_rng(plan.directions_seed).standard_normal((rows.shape[1], _RANDOM_DIRECTIONS))
    areas = auroc_rows((rows @ directions).T, plan.labels[:1])
    return float(np.maximum(areas, 1 - areas).max())


def _measure(layer: _Layer, plan: _Plan, words: float | None) -> LayerMetrics:
    areas = auroc_rows(layer.held_out, plan.labels)
    truth = plan.labels[0]
    return LayerMetrics(
        auroc=float(areas[0]),
        interval=auroc_interval(layer.held_out[0], truth, groups=plan.members),
        null_shuffled=tuple(map(float, areas[1:])),
        null_random_directions=layer.random_directions,
        words_baseline=words,
        threshold=fpr_threshold(layer.held_out[0][~truth], _THRESHOLD_FPR),
    )


def _mean_difference(rows: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors from the benign mean to the harmful one, zero half-way between."""
    harmful, benign = weights * targets, weights * (1 - targets)
    upper, lower = rows.T @ (harmful / harmful.sum(axis=0)), rows.T @ (benign / benign.sum(axis=0))
    difference = upper - lower
    length = np.linalg.norm(difference, axis=0)
    coefficients = difference / np.where(length > 0, length, 1)
    return coefficients, -((upper + lower) / 2 * coefficients).sum(axis=0)


def _unpacked(
    activations: np.ndarray | Activations,
    labels: np.ndarray | Sequence[bool] | None,
    groups: Groups | None,
    provenance: Provenance,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Provenance]:
    """Values, labels and group numbers, checked, and a provenance that names every layer."""
    stated = getattr(activations, "provenance", None)
    if stated is not None:
        labels = stated.harmful if labels is None else labels
        groups = stated.pair_ids if groups is None else groups
    values = np.asarray(activations if stated is None else cast("Activations", activations).values)
    if values.ndim != 3 or 0 in values.shape:
        raise OptionError(
            f"activations have shape {values.shape}: expected [layer, prompt, d_model], none of them empty",
            hint="Extract them with pooling last, mean or max.",
        )
    origin = cast(Provenance, {**_origin(stated, len(values)), **provenance})
    if len(origin["hook_points"]) != len(values):
        raise OptionError(f"{len(origin['hook_points'])} hook points for {len(values)} layers: expected one for each")
    for name, layer in zip(origin["hook_points"], values, strict=True):
        if not np.isfinite(layer).all():
            raise NonFiniteError(f"activations at {name!r} hold NaN or infinite values")
    truth = checked_labels(labels, values.shape[1])
    return values.astype(np.float32, copy=False), truth, group_numbers(groups, len(truth)), origin


def _origin(stated: ExtractionProvenance | None, layers: int) -> Provenance:
    """What extracted activations say of themselves; bare arrays are taken for the residual stream after each block."""
    if stated is None:
        return Provenance(hook_points=[f"blocks.{layer}.hook_resid_post" for layer in range(layers)])
    return Provenance(
        hook_points=stated.hook_points,
        pooling=stated.pooling,
        base_fingerprint=stated.tuned or stated.fingerprint,
        template_hash=stated.template_hash,
        prompts_hash=stated.prompts_hash,
        prompts_name=stated.prompts_name,
    )


def checked_labels(labels: np.ndarray | Sequence[bool] | None, prompts: int) -> np.ndarray:
    """Labels as an array, one for each prompt and both classes among them, or a LabelError."""
    if labels is None:
        raise LabelError("the activations carry no labels: pass labels, True where the prompt is harmful")
    truth = np.asarray(labels, dtype=bool)
    if truth.shape != (prompts,):
        raise LabelError(f"labels of shape {truth.shape} for {prompts} prompts: expected one for each")
    if truth.all() or not truth.any():
        raise LabelError(
            f"{int(truth.sum())} of {prompts} prompts are harmful: expected some of both classes",
            hint="Use a prompt set with harmful and benign prompts, as `matched-pairs`.",
        )
    return truth


def _check_options(method: str, l2: float, folds: int) -> None:
    if method not in ("logistic", "mean_difference"):
        raise OptionError(f"method is {method!r}: expected 'logistic' or 'mean_difference'")
    if not 0 < l2 < float("inf"):
        raise OptionError(f"l2 is {l2}: expected a positive number")
    if folds != 0 and folds < 2:
        raise OptionError(f"folds is {folds}: expected 2 or more, or 0 to fit without measuring")

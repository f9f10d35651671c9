"""Fit a probe at every layer, with the nulls it must beat: arrays in, never a model.

All that a layer needs is fitted at once. The final probe, every cross-validation fold, every strength of the penalty
and every shuffled labelling differ only in targets, row weights and penalty, so they are columns of one problem: each
step of the solver is a matrix product that they share, and rows are decomposed once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict, Unpack, cast

import numpy as np
import torch
from einops import repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from activations.errors import NonFiniteError, OptionError
from probes.crossval import (
    check_method,
    checked_strengths,
    choose_strength,
    fit_training_sets,
    held_out_scores,
    scores_of,
)
from probes.folds import Groups, checked_labels, deal_folds, refuse_copied_rows, refuse_copied_texts, shuffled_labels
from probes.metrics import auroc, auroc_interval, auroc_rows, fpr_threshold, group_numbers
from probes.probe import LayerMetrics, Method, ProbeSet
from probes.rows import Precision, check_device, check_precision, prepare, standardised, undecomposed

if TYPE_CHECKING:
    from activations.provenance import Provenance as ExtractionProvenance
    from activations.results import Activations

__all__ = [
    "Groups",
    "Input",
    "Provenance",
    "checked_labels",
    "deal_folds",
    "fit_probes",
    "read_input",
    "shuffled_labels",
    "words_baseline",
]

_SHUFFLES = 10
_RANDOM_DIRECTIONS = 1000
# Projected at once, and ranked in parts of ten: ranking takes six times the memory of the scores.
_BLOCK = 50
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
    l2: float | Sequence[float] = 1e-2,
    folds: int = 5,
    seed: int = 0,
    precision: Precision = "final",
    device: str = "cpu",
    **provenance: Unpack[Provenance],
) -> ProbeSet:
    """Fit one probe per layer, and measure each on held-out prompts beside its nulls.

    The logistic probe has the optimum of scikit-learn's `LogisticRegression`; the difference of means needs no solver;
    LDA shrinks its covariance by the share of Ledoit and Wolf (`fit_lda`). Cross-validation standardises once, over
    all prompts: that uses no label, and no more does that share.

    Of several strengths each layer takes its own. The AUROC reported is nested: what scores a held-out fold was fitted
    at the strength that is best by cross-validation within the other folds. The probe itself takes the strength that
    is best over all folds, and the nulls are fitted at that.

    Cost: 56 fits a layer at 5 folds, which share all their products; each further strength adds 15. Memory: beside the
    activations one layer in float32, and a few numbers for each prompt and fit.

    Args:
        activations: Pooled residual stream, any float dtype; standardised per layer in float32. Of a file one layer is
            read at a time.
        labels: True where the prompt is harmful; those of the activations when None.
        groups: Prompts that must stay together; the pair ids of the activations when None, of bare arrays every prompt
            its own.
        method: "logistic", "mean_difference" or "lda".
        l2: Penalty per prompt on the direction (not the bias), in scikit-learn's terms 1 / (C * n_prompts); or several
            to choose from, for "logistic" alone.
        folds: Of the cross-validation; 0 fits without measuring, several strengths need 3.
        seed: Of folds, shuffles and random directions.
        precision: "final": decision values within 1e-3 of the optimum, relative to the largest; above a million numbers
            a layer, whose products are in float32, for penalties of 1e-4 and more. "screening": float32 or bfloat16
            and fewer steps; cross-validated AUROC within 0.01 of the final one.
        device: Where the products are done, as "cuda".
        **provenance: Where bare arrays came from, see `Provenance`; extracted activations know it themselves.

    Raises:
        LabelError: Only one class is present, labels or groups are not one for each prompt, fewer than two groups
            hold one of the classes, so that nothing can be held out (three to choose a strength), or equal prompts
            stand in different groups, so that they may be held out from each other.
        NonFiniteError: An activation is NaN or infinite.
        OptionError: `method`, `l2`, `folds`, `precision`, `device` or the number of hook points is impossible.
    """
    given = read_input(activations, labels, groups, provenance)
    check_method(method)
    strengths = checked_strengths(l2)
    _check_options(method, strengths, folds, len(given.truth))
    check_precision(precision)
    check_device(device)
    plan = _plan(given.truth, given.members, folds, seed)
    if folds:
        refuse_copied_rows(given.layer, given.layers, given.members)
    layers = []
    for number in range(given.layers):
        rows, mean, scale = given.standardised(number, device)
        fit = _fit_layer(rows, plan, method, strengths, precision)
        layers.append(_Layer(*fit, mean, scale))
    metrics = tuple(_measure(layer, plan, given.origin.get("words")) for layer in layers) if folds else ()
    return _probe_set(layers, metrics, method, given.origin)


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
        LabelError: As in `fit_probes`; copies are told by their text.
    """
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    truth, members = checked_labels(labels, len(prompts)), group_numbers(groups, len(prompts))
    refuse_copied_texts(prompts, members)
    held_out = deal_folds(truth, members, folds, np.random.default_rng(seed))
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

    def columns(self, first: int) -> tuple[np.ndarray, np.ndarray]:
        """Labels, and which prompts are seen: one fit of all, then every fold of the labellings from `first` on."""
        labels, held_out = self.labels[first:], self.held_out[first:]
        targets = np.concatenate([self.labels[:1], repeat(labels, "l prompt -> (l f) prompt", f=self.folds)])
        kept = repeat(held_out, "l prompt -> l f prompt", f=self.folds) != np.arange(self.folds)[:, None]
        return targets, np.concatenate([np.ones_like(self.labels[:1]), kept.reshape(-1, targets.shape[1])])


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


@dataclass(frozen=True)
class _Layer:
    direction: Float[np.ndarray, " d_model"]
    bias: float
    gain: float
    strength: float
    held_out: Float[np.ndarray, "labelling prompt"]
    random_directions: float
    mean: Float[np.ndarray, " d_model"]
    scale: Float[np.ndarray, " d_model"]


def _fit_layer(
    values: Float[Tensor, "prompt d_model"], plan: _Plan, method: str, strengths: Sequence[float], precision: Precision
) -> tuple[np.ndarray, float, float, float, np.ndarray, float]:
    """The first six fields of `_Layer`."""
    columns = 1 + len(plan.labels) * plan.folds
    decomposed = prepare(values, columns * len(strengths), precision) if method != "mean_difference" else None
    rows = decomposed or undecomposed(values, precision)
    strength, nested = strengths[0], []
    if len(strengths) > 1:
        strength, scores = choose_strength(rows, plan.labels[0], plan.held_out[0], strengths)
        nested = [scores]
    targets, kept = plan.columns(first=len(nested)) if plan.folds else (plan.labels, np.ones_like(plan.labels))
    fits = fit_training_sets(rows, method, targets, kept, [strength] * len(targets))
    coefficients = rows.features(fits[0][:1])[0].double().cpu().numpy()
    gain = float(np.linalg.norm(coefficients))
    # A layer without any variance has no direction; the first axis with gain 0 scores every prompt alike.
    direction = coefficients / gain if gain else np.eye(1, len(coefficients))[0]
    bias = float(fits[1][0])
    if not plan.folds:
        return direction, bias, gain, strength, plan.held_out, 0.5
    scores = scores_of(rows, fits)[1:].reshape(-1, plan.folds, len(values))
    of_labellings = zip(scores, plan.held_out[len(nested) :], strict=True)
    held_out = np.stack([*nested, *(held_out_scores(*one) for one in of_labellings)])
    chance = _best_random_direction(values.to(rows.values.dtype), plan)
    return direction, bias, gain, strength, held_out, chance


def _best_random_direction(rows: Float[Tensor, "prompt d_model"], plan: _Plan) -> float:
    rng = np.random.default_rng(plan.directions_seed)
    areas = []
    for _ in range(_RANDOM_DIRECTIONS // _BLOCK):
        drawn = torch.from_numpy(rng.standard_normal((_BLOCK, rows.shape[1]), dtype=np.float32)).to(rows)
        scores = (drawn @ rows.T).cpu().numpy()
        areas += [auroc_rows(part, plan.labels[:1]) for part in np.split(scores, _BLOCK // 10)]
    return float(np.abs(np.concatenate(areas) - 0.5).max() + 0.5)


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


def _probe_set(
    layers: Sequence[_Layer], metrics: tuple[LayerMetrics, ...], method: str, origin: Provenance
) -> ProbeSet:
    return ProbeSet(
        directions=np.stack([layer.direction for layer in layers]).astype(np.float32),
        biases=np.array([layer.bias for layer in layers], dtype=np.float32),
        means=np.stack([layer.mean for layer in layers]),
        scales=np.stack([layer.scale for layer in layers]),
        gains=np.array([layer.gain for layer in layers], dtype=np.float32),
        method=cast(Method, method),
        metrics=metrics,
        l2=tuple(layer.strength for layer in layers) if method == "logistic" else (),
        hook_points=tuple(origin["hook_points"]),
        pooling=origin.get("pooling", "last"),
        base_fingerprint=origin.get("base_fingerprint", ""),
        template_hash=origin.get("template_hash", ""),
        prompts_hash=origin.get("prompts_hash", ""),
        prompts_name=origin.get("prompts_name", ""),
    )


@dataclass(frozen=True)
class Input:
    """Activations to fit on, one layer at a time, with labels and groups that were checked.

    Attributes:
        layer: Gives the rows of a layer; of a file it reads them.
        layers: How many there are.
        truth: True where the prompt is harmful.
        members: Number of each prompt's group.
        origin: What is known of where they come from; names every layer.
    """

    layer: Callable[[int], Float[np.ndarray, "prompt d_model"]]
    layers: int
    truth: Bool[np.ndarray, " prompt"]
    members: Int[np.ndarray, " prompt"]
    origin: Provenance

    def standardised(self, number: int, device: str) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """A layer's `standardised` rows with mean and scale.

        Raises:
            NonFiniteError: One of its values is NaN or infinite.
        """
        rows, mean, scale = standardised(self.layer(number), device)
        # Both pass on what is not finite anywhere in the layer, so no look at each value is needed.
        if not (np.isfinite(mean).all() and np.isfinite(scale).all()):
            raise NonFiniteError(f"activations at {self.origin['hook_points'][number]!r} hold NaN or infinite values")
        return rows, mean, scale


def read_input(
    activations: np.ndarray | Activations,
    labels: np.ndarray | Sequence[bool] | None,
    groups: Groups | None,
    provenance: Provenance,
) -> Input:
    """What `fit_probes` is given, checked; extracted activations bring labels, groups and provenance themselves.

    Raises:
        LabelError: Labels or groups are not one for each prompt, or of one class.
        OptionError: The activations have no layers, prompts or width, or hook points are not one a layer.
    """
    stated = getattr(activations, "provenance", None)
    if stated is None:
        values = np.asarray(activations)
        shape, layer = values.shape, cast(Callable[[int], np.ndarray], values.__getitem__)
    else:
        extracted = cast("Activations", activations)
        labels = stated.harmful if labels is None else labels
        groups = stated.pair_ids if groups is None else groups
        pooled = stated.n_prompts if stated.reduction != "all" else 0
        shape = (len(stated.hook_points), pooled, stated.d_model)
        layer = lambda number: extracted.layer(stated.hook_points[number])  # noqa: E731
    if len(shape) != 3 or 0 in shape:
        raise OptionError(
            f"activations have shape {shape}: expected [layer, prompt, d_model], none of them empty",
            hint="Extract them with pooling last, mean or max.",
        )
    origin = cast(Provenance, {**_origin(stated, shape[0]), **provenance})
    if len(origin["hook_points"]) != shape[0]:
        raise OptionError(f"{len(origin['hook_points'])} hook points for {shape[0]} layers: expected one for each")
    truth = checked_labels(labels, shape[1])
    return Input(layer, shape[0], truth, group_numbers(groups, shape[1]), origin)


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


def _check_options(method: str, strengths: Sequence[float], folds: int, prompts: int) -> None:
    if len(strengths) > 1 and method != "logistic":
        raise OptionError(f"l2 has {len(strengths)} strengths, which method {method!r} does not use: expected one")
    fewest = 2 if len(strengths) == 1 else 3
    if folds not in range(fewest, prompts + 1) and (folds or len(strengths) > 1):
        free = ", or 0 to fit without measuring" if len(strengths) == 1 else " to choose a strength within"
        raise OptionError(f"folds is {folds}: expected {fewest} to {prompts}, the number of prompts{free}")

"""What a probe is worth: on prompts it was not fitted on, beside everything that needs no knowledge of intent."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int

from activations.errors import LabelError, OptionError, ProbeError
from probes.baselines import Baseline, leads, surface_baselines
from probes.calibration import Calibration, calibration_of, cross_calibrated
from probes.folds import (
    Groups,
    checked_labels,
    deal_folds,
    plain_text,
    refuse_copied_rows,
    refuse_shared,
    shuffled_labels,
)
from probes.metrics import Difference, Rate, auroc, auroc_interval, auroc_rows, empirical_p, group_numbers, rate_at_fpr
from probes.probe import ProbeSet
from probes.train import fit_probes

if TYPE_CHECKING:
    from activations.prompts import PromptSet
    from activations.provenance import Provenance
    from activations.results import Activations

__all__ = [
    "Evaluation",
    "Labelled",
    "LayerEvaluation",
    "evaluate",
    "held_out_scores",
    "random_direction_areas",
    "refuse_common_prompts",
]

_SHUFFLES = 200
# Of probes fitted anew under shuffled labels, which cost a fit each; as many as `fit_probes` takes.
_REFITS = 10
# Random directions projected at once, so that 20,000 prompts need 16 MB and not 160.
_BLOCK = 100


@dataclass(frozen=True, eq=False)
class Labelled:
    """Activations with the labels, groups and texts of their prompts.

    Attributes:
        values: Pooled activations.
        labels: True where the prompt is harmful.
        groups: Prompts that belong together, as pair ids; every prompt alone when None.
        texts: The prompts; without them there are no surface baselines.
        provenance: What the activations are of; None for bare arrays.
    """

    values: Float[np.ndarray, "layer prompt d_model"]
    labels: Bool[np.ndarray, " prompt"]
    groups: Groups | None = None
    texts: tuple[str, ...] = ()
    provenance: Provenance | None = None

    def __post_init__(self) -> None:
        if self.values.ndim != 3 or 0 in self.values.shape:
            raise OptionError(f"activations have shape {self.values.shape}: expected [layer, prompt, d_model]")
        checked_labels(self.labels, self.values.shape[1])
        if self.texts and len(self.texts) != len(self.labels):
            raise LabelError(f"{len(self.texts)} texts for {len(self.labels)} prompts: expected one for each")

    @classmethod
    def of(cls, activations: Activations, prompts: PromptSet | None = None) -> Labelled:
        """Activations with what they know of their prompts, and with the texts where the set is given.

        Raises:
            LabelError: The activations carry no labels, or only one class.
            OptionError: The prompts are not those of the activations.
        """
        stated = activations.provenance
        if prompts is not None and prompts.content_hash != stated.prompts_hash:
            raise OptionError(f"the activations are not of the prompt set {prompts.name!r}: its hash is another")
        labels = checked_labels(activations.labels, stated.n_prompts)
        texts = prompts.prompts if prompts is not None else ()
        return cls(activations.values, labels, stated.pair_ids, texts, stated)

    @property
    def members(self) -> Int[np.ndarray, " prompt"]:
        """Groups as numbers."""
        return group_numbers(self.groups, len(self.labels))

    @property
    def known(self) -> tuple[tuple[str, ...], Bool[np.ndarray, " prompt"]]:
        """Texts and labels."""
        return self.texts, np.asarray(self.labels, dtype=bool)

    def keys(self, *, texts: bool) -> set[Hashable]:
        """What tells each prompt from others: its text, or its activations at all layers; none where all are alike."""
        if texts:
            return {plain_text(text) for text in self.texts}
        prompts = (np.ascontiguousarray(rows).tobytes() for rows in self.values.swapaxes(0, 1))
        keys: set[Hashable] = {hashlib.sha256(rows).digest() for rows in prompts}
        return keys if len(keys) > 1 else set()


@dataclass(frozen=True)
class LayerEvaluation:
    """How well one probe separates the prompts, and what that is worth.

    Attributes:
        hook_point: Where it reads.
        auroc: Of its scores.
        interval: Its 95 % interval, which knows the groups.
        rates: True positive rates at fixed false positive rates, or why there is none.
        calibration: Calibration error before and after Platt scaling; None where too few groups hold one class.
        null_shuffled: AUROCs under shuffled labels: of probes fitted anew where the training set was given, else of
            these scores.
        p_value: Share of the null at or above `auroc`; never below 1 / (1 + its size).
        random_directions: The best AUROC, either sign, of random directions, and what 95 of 100 stay below.
        leads: Baseline to the difference of the probe's AUROC and its own.
    """

    hook_point: str
    auroc: float
    interval: tuple[float, float]
    rates: tuple[Rate, ...]
    calibration: Calibration | None
    null_shuffled: tuple[float, ...]
    p_value: float
    random_directions: tuple[float, float]
    leads: Mapping[str, Difference] = field(default_factory=dict)

    @property
    def selectivity(self) -> float:
        """AUROC minus the mean under shuffled labels (after Hewitt and Liang 2019, who subtract a control task)."""
        return self.auroc - float(np.mean(self.null_shuffled))

    @property
    def beats_surface(self) -> bool | None:
        """Whether the lead over every baseline is clear of 0; None where none was measured."""
        return all(lead.clear for lead in self.leads.values()) if self.leads else None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A probe set measured on prompts that it was not fitted on.

    Attributes:
        layers: One entry a layer.
        scores: Decision values.
        labels: True where the prompt is harmful.
        groups: Groups as numbers.
        surface: Baselines by name; empty without texts.
    """

    layers: tuple[LayerEvaluation, ...]
    scores: Float[np.ndarray, "layer prompt"]
    labels: Bool[np.ndarray, " prompt"]
    groups: Int[np.ndarray, " prompt"]
    surface: Mapping[str, Baseline]

    def probabilities(self, layer: int) -> Float[np.ndarray, " prompt"]:
        """Probabilities after cross-fitted Platt scaling, for a reliability diagram.

        Raises:
            LabelError: Fewer than two groups hold one of the classes.
        """
        return cross_calibrated(self.scores[layer], self.labels, self.groups)


def evaluate(
    probes: ProbeSet,
    tested: Labelled | Activations,
    *,
    trained: Labelled | Activations | None = None,
    count_tokens: Callable[[str], int] | None = None,
    fprs: Sequence[float] = (0.01, 0.05),
    directions: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """Measure probes on other prompts than those they were fitted on.

    Where the training set is given, baselines are fitted on it as the probes were, and the null fits probes anew on it
    under shuffled labels. Without it baselines are cross-validated on the tested prompts themselves, which makes them
    harder to beat, and the null shuffles the labels of the tested prompts.

    Cost: a ranking of the prompts for each layer and random direction, and ten fits a layer where `trained` is given.

    Args:
        probes: Fitted on a base.
        tested: Activations of held-out prompts in that base or in a fine-tune of it, at the same hook points.
        trained: Those that the probes were fitted on.
        count_tokens: Adds the baseline of characters per token; see `token_counter`.
        fprs: False positive rates to give true positive rates at.
        directions: How many random directions, drawn in the probes' standardised coordinates.
        seed: Of folds, shuffles and random directions.

    Raises:
        LabelError: Only one class is present, a prompt stands in `tested` and in `trained` (told by its text, or where
            one of them has none by its activations), or baselines are to be cross-validated and one group holds a
            whole class.
        NonFiniteError: A score is NaN or infinite.
        OptionError: The prompts are those the probes were fitted on, or a rate is outside (0, 1).
        ProbeError: The activations are of another base, pooling, hook points or width than the probes.
    """
    tested, source = _labelled(tested), None if trained is None else _labelled(trained)
    _check_origin(probes, tested)
    if source is not None:
        refuse_common_prompts(source, tested, "the training set and in the test set")
    scores, truth, members = probes.score(tested.values), np.asarray(tested.labels, dtype=bool), tested.members
    known = source.known if source is not None and source.texts else None
    surface = (
        surface_baselines(tested.texts, truth, tested.groups, count_tokens=count_tokens, trained_on=known, seed=seed)
        if tested.texts
        else {}
    )
    nulls = _null(probes, tested, scores, source, seed)
    layers = []
    for layer, (row, null) in enumerate(zip(scores, nulls, strict=True)):
        area = auroc(row, truth)
        standardised = (tested.values[layer] - probes.means[layer]) / probes.scales[layer]
        areas = random_direction_areas(standardised, truth, count=directions, seed=seed)
        layers.append(
            LayerEvaluation(
                hook_point=probes.hook_points[layer],
                auroc=area,
                interval=auroc_interval(row, truth, groups=members),
                rates=tuple(rate_at_fpr(row, truth, fpr) for fpr in fprs),
                calibration=_calibration(row, truth, members, log_odds=probes.method == "logistic"),
                null_shuffled=tuple(map(float, null)),
                p_value=empirical_p(area, null)[0],
                random_directions=(float(areas.max()), float(np.quantile(areas, 0.95))),
                leads=leads(row, surface, truth, members),
            )
        )
    return Evaluation(tuple(layers), scores, truth, members, surface)


def held_out_scores(
    values: Float[np.ndarray, "layer prompt d_model"],
    labels: Bool[np.ndarray, " prompt"] | Sequence[bool],
    groups: Groups | None = None,
    *,
    method: str = "logistic",
    l2: float = 1e-2,
    folds: int = 5,
    seed: int = 0,
) -> Float[np.ndarray, "layer prompt"]:
    """Scores of each prompt by probes that were fitted without it, standardisation included.

    The folds are those of `fit_probes` with the same labels, groups, `folds` and `seed`.

    Raises:
        LabelError: As in `fit_probes`.
        NonFiniteError: An activation is NaN or infinite.
        OptionError: An option of the fit is impossible, or `folds` is no whole number from 2 on.
    """
    truth, members = checked_labels(labels, values.shape[1]), group_numbers(groups, values.shape[1])
    refuse_copied_rows(values.__getitem__, len(values), members)
    dealt = deal_folds(truth, members, folds, np.random.default_rng(seed))
    scores = np.empty(values.shape[:2])
    for fold in range(int(dealt.max()) + 1):
        kept, tested = np.flatnonzero(dealt != fold), np.flatnonzero(dealt == fold)
        fitted = fit_probes(values[:, kept], truth[kept], groups=members[kept], method=method, l2=l2, folds=0)
        scores[:, tested] = fitted.score(values[:, tested])
    return scores


def random_direction_areas(
    rows: Float[np.ndarray, "prompt d_model"],
    labels: Bool[np.ndarray, " prompt"],
    *,
    count: int = 1000,
    seed: int = 0,
) -> Float[np.ndarray, " direction"]:
    """AUROCs of random directions, each with its better sign, so never below 0.5.

    They choose their sign on the prompts that they are tested on: the null is the more severe for it.

    Raises:
        OptionError: `count` is not positive.
    """
    if count < 1:
        raise OptionError(f"{count} random directions: expected 1 or more")
    rng = np.random.default_rng(seed)
    areas = []
    for start in range(0, count, _BLOCK):
        drawn = rng.standard_normal((min(_BLOCK, count - start), rows.shape[1])).astype(np.float32)
        areas.append(auroc_rows(drawn @ np.asarray(rows, dtype=np.float32).T, labels[None]))
    found = np.concatenate(areas)
    return np.asarray(np.maximum(found, 1 - found))


def refuse_common_prompts(one: Labelled, other: Labelled, where: str) -> None:
    """Refuse a prompt in two sets: by its text where both have theirs, else by its activations.

    Only equal prompts have equal activations at every layer, unless all have the same ones.

    Raises:
        LabelError: They share one.
    """
    texts = bool(one.texts and other.texts)
    refuse_shared(one.keys(texts=texts), other.keys(texts=texts), where)


def _labelled(given: Labelled | Activations) -> Labelled:
    return given if isinstance(given, Labelled) else Labelled.of(given)


def _calibration(scores: np.ndarray, labels: np.ndarray, members: np.ndarray, *, log_odds: bool) -> Calibration | None:
    try:
        return calibration_of(scores, labels, members, log_odds=log_odds)
    except LabelError:  # one group holds a whole class: nothing can be held out, and the rest stands without it
        return None


def _null(
    probes: ProbeSet, tested: Labelled, scores: np.ndarray, trained: Labelled | None, seed: int
) -> Float[np.ndarray, "layer shuffle"]:
    rng = np.random.default_rng(seed)
    truth, members = np.asarray(tested.labels, dtype=bool), tested.members
    if trained is None:
        shuffled = np.stack([shuffled_labels(truth, members, rng) for _ in range(_SHUFFLES)])
        return np.stack([auroc_rows(np.broadcast_to(row, shuffled.shape), shuffled) for row in scores])
    known, homes = np.asarray(trained.labels, dtype=bool), trained.members
    falses = [shuffled_labels(known, homes, rng) for _ in range(_REFITS)]

    def refitted(layer: int, labels: np.ndarray) -> np.ndarray:
        rows, l2 = slice(layer, layer + 1), probes.strength(layer)
        fitted = fit_probes(trained.values[rows], labels, groups=homes, method=probes.method, l2=l2, folds=0)
        return np.asarray(fitted.score(tested.values[rows])[0])

    scores_of = (np.stack([refitted(layer, false) for false in falses]) for layer in range(len(probes)))
    return np.stack([auroc_rows(scores, truth[None]) for scores in scores_of])


def _check_origin(probes: ProbeSet, tested: Labelled) -> None:
    stated = tested.provenance
    if stated is None:
        return
    if stated.prompts_hash and stated.prompts_hash == probes.prompts_hash:
        raise OptionError(
            f"the probes were fitted on these prompts ({stated.prompts_name!r}): expected held-out ones",
            hint="Pass other prompts; what cross-validation found on these stands in `probes.metrics`.",
        )
    for what, expected, got in (
        ("hook points", probes.hook_points, stated.hook_points),
        ("the pooling", probes.pooling, stated.pooling),
        ("the chat template with hash", probes.template_hash, stated.template_hash),
    ):
        if expected and got and expected != got:
            raise ProbeError(f"the activations do not fit the probes: expected {what} {expected}, got {got}")
    if probes.base_fingerprint not in ("", stated.fingerprint, stated.tuned):
        raise ProbeError(
            f"the activations are of another base: expected {probes.base_fingerprint}, got {stated.fingerprint}"
        )

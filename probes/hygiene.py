"""Probes freed of what they should not read: arrays in, never a model.

A probe for intent can also read whether the model is about to refuse, or whether the text is encoded. `clean_probes`
takes such nuisances out of it and says what that did; `contamination` says what any probe reads.

"project" is the default because of what `benchmarks/hygiene.py` measured on the shipped base (layer 1, JailbreakBench
twins; AUROC of the scores for a nuisance among harmful / benign prompts, 0.5 is clean; then for intent):

    raw                   refused 0.96 / 0.93   encoded 0.08 / 0.11   intent 0.68 (0.61-0.73)
    project               refused 0.55 / 0.57   encoded 0.46 / 0.51   intent 0.62 (0.56-0.67)
    project, altogether   refused 0.43 / 0.46   encoded 0.48 / 0.47   intent 0.58 (0.51-0.64)
    leace                 refused 0.66 / 0.59   encoded 0.49 / 0.59   intent 0.61 (0.55-0.67)
    joint                 refused 0.62 / 0.58   encoded 0.47 / 0.65   intent 0.64 (0.57-0.70)

A second fit finds its way back to refusal (0.80 at the last layer, "project" 0.67), and the joint fit cleans at some
layers only (0.89 at layer 0). On this base nothing isolates intent: a words-only model reaches 0.73 on the same twins,
and the cleaned probe reads length (0.66) though it was a nuisance. Methods and layer were compared on these twins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Unpack, get_args

import numpy as np
from jaxtyping import Bool, Float, Int

from activations.errors import LabelError, NonFiniteError, OptionError
from probes.folds import Groups, checked_labels, deal_folds, refuse_copied_rows
from probes.leace import (
    Concepts,
    Eraser,
    checked_concepts,
    fit_eraser,
    regression,
    shrinkage_of,
    unit_columns,
    variance,
)
from probes.logistic import fit_logistic
from probes.metrics import auroc, auroc_interval, group_numbers
from probes.probe import ProbeSet
from probes.train import Provenance, fit_probes

__all__ = ["Cleaned", "Cleaning", "Contamination", "Reading", "clean_probes", "contamination"]

Cleaning = Literal["project", "leace", "joint"]

# A nuisance column this much larger than a standardised one is penalised by its inverse square, that is hardly.
_UNPENALISED = 100.0


@dataclass(frozen=True)
class Contamination:
    """How much a probe reads of one nuisance; 0 and 0.5 where it reads nothing of it.

    Where a nuisance hides intent, as an encoding does that the model cannot read, a probe of pure intent puts those
    prompts between the classes: below 0.5 among harmful prompts, and as far above it among benign ones.

    Attributes:
        cosine: With the nuisance's own direction, in coordinates where activations have unit variance within each
            intent class: how well scores and nuisance correlate there, as a share of the best that any direction does.
        harmful: AUROC of the scores for the nuisance among harmful prompts (numbers are split at their median); None
            where it does not vary there. Below 0.5 the nuisance lowers the score.
        benign: The same among benign prompts.
        harmful_interval: 95 %, knowing the groups.
        benign_interval: The same.
    """

    cosine: float
    harmful: float | None
    benign: float | None
    harmful_interval: tuple[float, float] | None
    benign_interval: tuple[float, float] | None


@dataclass(frozen=True)
class Reading:
    """What the probe of one layer reads.

    Attributes:
        hook_point: Where.
        intent: AUROC for intent, on the prompts where intent can be read.
        intent_interval: 95 %, knowing the groups.
        nuisances: Name to contamination.
    """

    hook_point: str
    intent: float
    intent_interval: tuple[float, float]
    nuisances: Mapping[str, Contamination]


@dataclass(frozen=True)
class Cleaned:
    """Probes with the nuisances taken out, and what that did.

    Attributes:
        probes: They score activations as they are: the erasure is folded into directions and biases.
        raw: The probes without cleaning.
        erasers: One a layer, to use on activations; none where the method is "joint".
        before: What the raw probes read, one entry a layer, none where `folds` was 0. AUROCs are of scores by probes
            and erasers that did not see the prompt or its group.
        after: The same of the cleaned probes.
    """

    probes: ProbeSet
    raw: ProbeSet
    erasers: tuple[Eraser, ...]
    before: tuple[Reading, ...]
    after: tuple[Reading, ...]


def clean_probes(
    activations: Float[np.ndarray, "layer prompt d_model"],
    labels: Bool[np.ndarray, " prompt"] | Sequence[bool],
    nuisances: Concepts,
    *,
    groups: Groups | None = None,
    intent_rows: Bool[np.ndarray, " prompt"] | None = None,
    method: Cleaning = "project",
    keep_shared: bool = True,
    shrinkage: float | None = None,
    l2: float = 1e-2,
    folds: int = 5,
    seed: int = 0,
    **provenance: Unpack[Provenance],
) -> Cleaned:
    """Fit a probe for intent at every layer that reads none of the nuisances, and measure what both read.

        texts = [*prompts, *permute_letters(prompts, seed=0)]          # each prompt twice, the second time encoded
        clean_probes(values, [*labels, *labels], {"encoded": encoded, "refusal": refused},
                     groups=[*pairs, *pairs], intent_rows=~encoded)

    Cost: some 2 * (folds + 1) fits a layer. Memory: some three times the activations.

    Args:
        activations: Pooled residual stream.
        labels: True where the prompt is harmful, also where an encoding hides it.
        nuisances: Name to one value for each prompt: booleans, or numbers.
        groups: Prompts that must stay together; give every version of a prompt its group.
        intent_rows: Prompts that probes are fitted and their AUROC for intent measured on; None for all. Nuisances
            that vary among these are erased there, the others among all.
        method: "project" takes out of the raw probe's direction those of the nuisances, in whitened coordinates: the
            raw probe then reads activations as if they had been erased. "leace" fits again on erased activations.
            "joint" fits intent on activations and nuisances together, and keeps the part of the activations; it sees
            all prompts, the nuisances of which it cannot remove otherwise.
        keep_shared: Erase the nuisances within the intent classes: what goes with a nuisance only because intent does
            is intent's, and stays. False erases them altogether, and of intent as much as goes with them.
        shrinkage: See `fit_eraser`.
        l2: See `fit_probes`.
        folds: Of the cross-validation; 0 cleans without measuring.
        seed: Of the folds.
        **provenance: Where the activations came from, see `fit_probes`.

    Raises:
        LabelError: One class only, no nuisance, one that never varies or with `keep_shared` never within an intent
            class, a length that differs, or equal prompts in different groups.
        NonFiniteError: An activation or a value is NaN or infinite.
        OptionError: `method`, `shrinkage`, `l2` or `folds` is impossible.
    """
    if method not in get_args(Cleaning):
        raise OptionError(f"method is {method!r}: expected one of {', '.join(get_args(Cleaning))}")
    data = _data(activations, labels, nuisances, groups, intent_rows)
    if keep_shared and method != "joint":
        _require_told_from_intent(data)
    how = _How(method, keep_shared, shrinkage, l2, provenance)
    raw, probes, erasers = _fit(data, np.ones(len(data.truth), dtype=bool), how)
    if not folds:
        return Cleaned(probes, raw, erasers, (), ())
    scores = _held_out(data, how, folds, seed)
    before, after = (_readings(found, at, data, shrinkage) for found, at in zip((raw, probes), scores, strict=True))
    return Cleaned(probes, raw, erasers, before, after)


def contamination(
    probes: ProbeSet,
    activations: Float[np.ndarray, "layer prompt d_model"],
    labels: Bool[np.ndarray, " prompt"] | Sequence[bool],
    nuisances: Concepts,
    *,
    groups: Groups | None = None,
    intent_rows: Bool[np.ndarray, " prompt"] | None = None,
    shrinkage: float | None = None,
) -> tuple[Reading, ...]:
    """What given probes read of intent and of nuisances, on prompts that they were not fitted on.

    Args:
        probes: Cleaned or not.
        activations: At the probes' hook points; this and the others as in `clean_probes`.
        labels: True where the prompt is harmful.
        nuisances: Name to one value for each prompt.
        groups: Prompts that belong together.
        intent_rows: Where intent can be read.
        shrinkage: See `fit_eraser`; of the covariance that cosines are taken in.

    Raises:
        LabelError, NonFiniteError, OptionError: As in `clean_probes`.
        ProbeError: The activations have other layers or another width than the probes.
    """
    data = _data(activations, labels, nuisances, groups, intent_rows)
    return _readings(probes, probes.score(data.values), data, shrinkage)


# --- fitting


@dataclass(frozen=True)
class _Data:
    values: Float[np.ndarray, "layer prompt d_model"]
    truth: Bool[np.ndarray, " prompt"]
    nuisances: Mapping[str, np.ndarray]
    members: Int[np.ndarray, " prompt"]
    intent_rows: Bool[np.ndarray, " prompt"]


@dataclass(frozen=True)
class _How:
    method: Cleaning
    keep_shared: bool
    shrinkage: float | None
    l2: float
    origin: Provenance


def _fit(data: _Data, seen: np.ndarray, how: _How) -> tuple[ProbeSet, ProbeSet, tuple[Eraser, ...]]:
    """Raw and cleaned probes from the prompts that are seen, and the erasers between them."""
    rows = seen & data.intent_rows
    raw = fit_probes(data.values[:, rows], data.truth[rows], l2=how.l2, folds=0, **how.origin)
    if how.method == "joint":
        return raw, _joint(raw, data, seen, how.l2), ()
    concepts = _concepts(data, seen, how.keep_shared)
    erasers = tuple(fit_eraser(layer[seen], concepts, shrinkage=how.shrinkage) for layer in data.values)
    inner = raw
    if how.method == "leace":
        erased = np.stack([eraser(layer[rows]) for eraser, layer in zip(erasers, data.values, strict=True)])
        inner = fit_probes(erased, data.truth[rows], l2=how.l2, folds=0)
    layers = [eraser.before(*_weights(inner, layer)) for layer, eraser in enumerate(erasers)]
    return raw, _reading_raw(raw, layers), erasers


def _concepts(data: _Data, seen: np.ndarray, keep_shared: bool) -> dict[str, np.ndarray]:
    """Each nuisance among the prompts that intent is read on, or where it does not vary there, among all.

    Refusal must not be read off plain and encoded prompts together: a model that refuses nothing encoded has there a
    direction of refusal that is mostly one of encoding, erasing which leaves refusal among plain prompts.
    """
    truth, part = data.truth[seen], data.intent_rows[seen]
    concepts = {}
    for name, nuisance in data.nuisances.items():
        values = nuisance[seen]
        rows = _where_it_varies(values, part)
        concepts[name] = np.zeros(len(part))
        for kept in (truth & rows, ~truth & rows) if keep_shared else (rows,):
            concepts[name][kept] = values[kept] - values[kept].mean()
    return concepts


def _where_it_varies(values: np.ndarray, part: np.ndarray) -> np.ndarray:
    return part if np.ptp(values[part] * 1.0) else np.ones_like(part)


def _joint(raw: ProbeSet, data: _Data, seen: np.ndarray, l2: float) -> ProbeSet:
    """Logistic regression on activations and nuisances, which thereby explain what they can of the labels."""
    columns = unit_columns({name: values[seen] for name, values in data.nuisances.items()})
    truth = data.truth[seen].astype(np.float64)[:, None]
    layers = []
    for layer, values in enumerate(data.values):
        rows = (values[seen] - raw.means[layer]) / raw.scales[layer]
        design = np.hstack([rows - rows.mean(axis=0), _UNPENALISED * columns]).astype(np.float64)
        coefficients, biases = fit_logistic(design, truth, np.full_like(truth, 1 / len(truth)), l2)
        weights = coefficients[: rows.shape[1], 0] / raw.scales[layer]
        layers.append((weights, float(biases[0] - weights @ values[seen].mean(axis=0, dtype=np.float64))))
    return _reading_raw(raw, layers)


def _weights(probes: ProbeSet, layer: int) -> tuple[np.ndarray, float]:
    """What a probe does to an activation, as one vector and one number."""
    probe = probes[layer]
    weights = (probe.gain * probe.direction / probe.scale).astype(np.float64)
    return weights, float(probe.bias - weights @ probe.mean)


def _reading_raw(raw: ProbeSet, layers: Sequence[tuple[np.ndarray, float]]) -> ProbeSet:
    """Probes with given weights, in the scaling of the raw ones; what those measured of themselves is left out."""
    scaled = np.stack([weights for weights, _ in layers]) * raw.scales
    gains = np.linalg.norm(scaled, axis=1)
    # A probe left with nothing to read scores every prompt alike, as in `fit_probes`.
    directions = np.where(gains[:, None] > 0, scaled, np.eye(1, raw.d_model)) / np.where(gains > 0, gains, 1)[:, None]
    biases = [bias + weights @ mean for (weights, bias), mean in zip(layers, raw.means, strict=True)]
    return replace(
        raw,
        directions=directions.astype(np.float32),
        gains=gains.astype(np.float32),
        biases=np.array(biases, dtype=np.float32),
        metrics=(),
    )


def _held_out(data: _Data, how: _How, folds: int, seed: int) -> Float[np.ndarray, "2 layer prompt"]:
    """Scores of raw and cleaned probes for each prompt, by those that did not see its group."""
    refuse_copied_rows(data.values.__getitem__, len(data.values), data.members)
    held_out = deal_folds(data.truth, data.members, folds, np.random.default_rng(seed))
    scores = np.empty((2, *data.values.shape[:2]))
    for fold in range(held_out.max() + 1):
        tested = held_out == fold
        for which, probes in enumerate(_fit(data, ~tested, how)[:2]):
            scores[which][:, tested] = probes.score(data.values[:, tested])
    return scores


# --- measuring


def _readings(probes: ProbeSet, scores: np.ndarray, data: _Data, shrinkage: float | None) -> tuple[Reading, ...]:
    members, rows, found = data.members, data.intent_rows, []
    for layer, values in enumerate(data.values):
        at = scores[layer]
        cosines = _cosines(_weights(probes, layer)[0], values, data, shrinkage)
        nuisances = {}
        for (name, nuisance), cosine in zip(data.nuisances.items(), cosines, strict=True):
            areas = [_area_within(at, nuisance, members, data.truth == harmful) for harmful in (True, False)]
            (harmful, harmful_interval), (benign, benign_interval) = areas
            nuisances[name] = Contamination(float(cosine), harmful, benign, harmful_interval, benign_interval)
        area = auroc(at[rows], data.truth[rows])
        interval = auroc_interval(at[rows], data.truth[rows], groups=members[rows])
        found.append(Reading(probes.hook_points[layer], area, interval, nuisances))
    return tuple(found)


def _area_within(
    scores: np.ndarray, nuisance: np.ndarray, members: np.ndarray, rows: np.ndarray
) -> tuple[float | None, tuple[float, float] | None]:
    values = nuisance[rows]
    high = values if values.dtype == bool else values > np.median(values)
    high = high if high.any() else values == values.max()  # most prompts share the largest value
    if high.all() or not high.any():
        return None, None
    return auroc(scores[rows], high), auroc_interval(scores[rows], high, groups=members[rows])


def _cosines(weights: np.ndarray, values: np.ndarray, data: _Data, shrinkage: float | None) -> np.ndarray:
    """Of a direction with that of each nuisance, whitened by the covariance within intent classes."""
    rows = _within_classes(values.astype(np.float64), data.truth)
    columns = unit_columns({name: _within_classes(found * 1.0, data.truth) for name, found in data.nuisances.items()})
    amount = shrinkage_of(rows, shrinkage)
    covariance = rows.T @ columns / len(rows)
    best = (covariance * regression(rows, columns, amount)).sum(axis=0)
    scale = np.sqrt(best * variance(rows, weights, amount))
    return np.asarray(np.divide(weights @ covariance, scale, out=np.zeros_like(scale), where=scale > 0))


def _within_classes(values: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Values (or rows) without the mean of their intent class."""
    out = np.empty_like(values)
    for rows in (truth, ~truth):
        out[rows] = values[rows] - values[rows].mean(axis=0)
    return out


# --- checks


def _data(
    activations: np.ndarray,
    labels: np.ndarray | Sequence[bool],
    nuisances: Concepts,
    groups: Groups | None,
    intent_rows: np.ndarray | None,
) -> _Data:
    values = np.asarray(activations)
    if values.ndim != 3 or 0 in values.shape:
        raise OptionError(f"activations have shape {values.shape}: expected [layer, prompt, d_model], none of them 0")
    if not np.isfinite(values).all():
        raise NonFiniteError("activations hold NaN or infinite values")
    truth = checked_labels(labels, values.shape[1])
    rows = np.ones(len(truth), dtype=bool) if intent_rows is None else np.asarray(intent_rows, dtype=bool)
    if rows.shape != truth.shape:
        raise LabelError(f"intent_rows has shape {rows.shape} for {len(truth)} prompts: expected one for each")
    checked_labels(truth[rows], int(rows.sum()))
    concepts = checked_concepts(nuisances, len(truth))
    for name, concept in concepts.items():
        if (concept == concept[0]).all():
            raise LabelError(
                f"the nuisance {name!r} is {concept[0]} for all {len(concept)} prompts: nothing to take out",
                hint="Add prompts on which it differs, as encoded versions of the same prompts.",
            )
    return _Data(values, truth, concepts, group_numbers(groups, len(truth)), rows)


def _require_told_from_intent(data: _Data) -> None:
    for name, values in data.nuisances.items():
        rows = _where_it_varies(values, data.intent_rows)
        if not any(np.ptp(values[rows & (data.truth == harmful)] * 1.0) for harmful in (True, False)):
            raise LabelError(
                f"the nuisance {name!r} never varies within an intent class: it cannot be told from intent",
                hint="Add prompts such as harmless ones that are refused; or pass keep_shared=False to erase both.",
            )

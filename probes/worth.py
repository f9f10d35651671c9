"""Training on a base, and what `undertow train` says of it: the best layer beside chance and the prompts' surface."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import t as student

from activations.errors import ProbeError
from activations.extract import extract
from activations.prompts import PromptSet, load_prompts
from probes.baselines import Baseline, leads, surface_baselines, token_counter
from probes.evaluate import Labelled, held_out_scores, random_direction_areas
from probes.metrics import Difference
from probes.probe import LayerMetrics, ProbeSet
from probes.train import fit_probes

if TYPE_CHECKING:
    from activations.models import Model

__all__ = ["Worth", "train_and_weigh", "train_probe", "worth_of"]

_LEVEL = 0.95
# A lead that cannot be larger than this is called none; the second decimal is the last one that we print of a lead.
_NO_LEAD = 0.01


@dataclass(frozen=True)
class Worth:
    """The best layer of a probe set on its own training prompts, all of it held out.

    Attributes:
        hook_point: Of the best layer.
        n_layers: How many layers it was chosen from.
        d_model: Width of the base there.
        prompts: How many prompts.
        metrics: Cross-validated AUROC, interval and shuffled-label null of that layer.
        random_directions: The best AUROC of 1000 random directions, and what 95 of 100 stay below.
        surface: Baselines by name, on the same folds.
        leads: By how much the probe exceeds each, at a confidence that allows for the choice of the layer.
        chance: The AUROC that the best layer under one more shuffled labelling stays below with 97.5 %: a prediction
            from those measured, as from a normal sample.
    """

    hook_point: str
    n_layers: int
    d_model: int
    prompts: int
    metrics: LayerMetrics
    random_directions: tuple[float, float]
    surface: Mapping[str, Baseline]
    leads: Mapping[str, Difference]
    chance: float

    @property
    def beats_surface(self) -> bool:
        """Whether the probe is above chance, and its lead over every baseline clear of 0.

        Cross-validated scores vary more than any interval knows (Bengio and Grandvalet 2004). On noise that is where it
        shows, so there the shuffled labels decide, which are cross-validated as the probe is.
        """
        return self.metrics.auroc > self.chance and all(lead.clear for lead in self.leads.values())

    @property
    def sentence(self) -> str:
        """In words what the leads say of this base."""
        name = min(self.leads, key=lambda each: self.leads[each].interval[0])
        lead, own = self.leads[name], self.surface[name]
        numbers = f"the AUROC of {name} alone is {own.auroc:.3f}, the probe differs from it by {_interval(lead)}"
        if self.beats_surface:
            return f"The probe beats the surface of the prompts: of all baselines {name} comes nearest ({numbers})."
        if self.metrics.auroc <= self.chance:
            reach = f"its AUROC is {self.metrics.auroc:.3f}, shuffled labels reach {self.chance:.3f}"
            return f"The probe is not shown to read anything: {reach}. Of the surface, {numbers}."
        size = f"this base ({self.n_layers} layers, {self.d_model} wide)"
        if lead.interval[1] <= _NO_LEAD:
            return (
                f"The probe does not beat the surface of the prompts: {numbers}. "
                f"As measured, {size} is too small to carry intent beyond {name}."
            )
        return (
            f"The probe is not shown to beat the surface of the prompts: {numbers}. As measured, {size} "
            f"is too small to carry intent beyond {name}, or {self.prompts} prompts are too few to show that it does."
        )

    def rows(self) -> list[tuple[str, str, str, str]]:
        """For a table: what, its AUROC, its 95 % interval, and by how much the probe exceeds it."""
        shuffled = self.metrics.null_shuffled
        found = [(f"probe at {self.hook_point}", f"{self.metrics.auroc:.3f}", _ends(self.metrics.interval), "")]
        if shuffled:
            mean = float(np.mean(shuffled))
            spread = f"largest {max(shuffled):.3f}"
            found.append(("shuffled labels, mean", f"{mean:.3f}", spread, f"{self.metrics.auroc - mean:+.3f}"))
        best, usual = self.random_directions
        gap = f"{self.metrics.auroc - best:+.3f}"
        found.append(("best of 1000 random directions", f"{best:.3f}", f"95 % below {usual:.3f}", gap))
        for name, baseline in self.surface.items():
            found.append(
                (f"{name} alone", f"{baseline.auroc:.3f}", _ends(baseline.interval), _interval(self.leads[name]))
            )
        return found


def train_probe(base: Model, *, prompts: str | PromptSet = "matched-pairs", method: str = "logistic") -> ProbeSet:
    """Fit an intent probe at every layer of a base.

    Args:
        base: The trusted base.
        prompts: A shipped set's name, a file, or a set; both classes.
        method: "logistic", "mean_difference" or "lda".

    Raises:
        LabelError: The set has one class only, or copies in different groups.
        OptionError: There is no such method.
        PathMissingError, PromptError: As in `load_prompts`.
    """
    return _train(base, prompts, method)[0]


def train_and_weigh(
    base: Model, *, prompts: str | PromptSet = "matched-pairs", method: str = "logistic"
) -> tuple[ProbeSet, Worth]:
    """The probes of `train_probe`, and what the best of them is worth; raises what that does."""
    probes, trained, surface = _train(base, prompts, method)
    return probes, worth_of(probes, trained, surface=surface)


def worth_of(
    probes: ProbeSet,
    trained: Labelled,
    *,
    surface: Mapping[str, Baseline] | None = None,
    folds: int = 5,
    seed: int = 0,
) -> Worth:
    """Measure the best layer of freshly fitted probes against the surface of their prompts, on the same folds.

    The layer was chosen by the same prompts, which flatters it: each lead has the confidence 1 - 0.05 / layers, so that
    whichever layer had been chosen, 95 of 100 claims would be right (Bonferroni).

    Cost: `folds` fits of one layer, and the baselines.

    Args:
        probes: As `fit_probes` gave them for these prompts.
        trained: The training set, texts included.
        surface: Baselines of these prompts on the folds of the fit; measured here when None.
        folds: Of the fit.
        seed: Of the fit.

    Raises:
        LabelError: A prompt stands in two groups.
        ProbeError: The probes were fitted without held-out folds, or texts are missing.
    """
    if not trained.texts:
        raise ProbeError("the surface of prompts cannot be measured without their texts", hint="Pass them in `texts`.")
    layer = probes.best_layer
    labels, members = np.asarray(trained.labels, dtype=bool), trained.members
    if surface is None:
        surface = surface_baselines(trained.texts, labels, members, folds=folds, seed=seed)
    one = trained.values[layer : layer + 1]
    l2 = probes.strength(layer)
    scores = held_out_scores(one, labels, members, method=probes.method, l2=l2, folds=folds, seed=seed)[0]
    areas = random_direction_areas((one[0] - probes.means[layer]) / probes.scales[layer], labels, seed=seed)
    return Worth(
        hook_point=probes.hook_points[layer],
        n_layers=len(probes),
        d_model=probes.d_model,
        prompts=len(labels),
        metrics=probes.metrics[layer],
        random_directions=(float(areas.max()), float(np.quantile(areas, 0.95))),
        surface=surface,
        chance=_chance(probes),
        leads=leads(scores, surface, labels, members, level=1 - (1 - _LEVEL) / len(probes)),
    )


def _train(base: Model, prompts: str | PromptSet, method: str) -> tuple[ProbeSet, Labelled, dict[str, Baseline]]:
    """The probes, what they were trained on, and what its surface gives away."""
    chosen = (load_prompts(prompts) if isinstance(prompts, str) else prompts).require_both()
    known = chosen.prompts, chosen.labels, chosen.pair_ids
    # First, because copies among the prompts are told sooner by their texts than by a forward pass.
    surface = surface_baselines(*known, count_tokens=token_counter(base.tokenizer))
    activations = extract(base, chosen)
    probes = fit_probes(activations, method=method, words=surface["words"].auroc)
    return probes, Labelled.of(activations, chosen), surface


def _chance(probes: ProbeSet) -> float:
    """Of the best layer, so that choosing it counts for shuffled labels as it does for true ones."""
    best = np.array([layer.null_shuffled for layer in probes.metrics]).max(axis=0)
    count = len(best)
    if count < 2:  # a spread needs two: without one nothing is shown
        return 1.0
    bound = best.mean() + student.ppf(0.975, count - 1) * best.std(ddof=1) * np.sqrt(1 + 1 / count)
    return min(1.0, float(bound))  # few prompts: then no AUROC at all would show anything


def _ends(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.3f}-{interval[1]:.3f}"


def _interval(lead: Difference) -> str:
    return f"{lead.value:+.3f} ({lead.interval[0]:+.3f} to {lead.interval[1]:+.3f})"

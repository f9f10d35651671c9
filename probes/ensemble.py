"""Many readings of harm in one base, so that keeping one of them as it was does not keep the others.

At every layer and at several positions: a logistic probe, further ones fitted in what the earlier ones leave (iterative
null-space projection, Ravfogel et al. 2020, arXiv:2004.07667), and the difference of means. Whoever trains against one
direction moves what he teaches into another one that reads nearly as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float

from activations.extract import extract
from activations.models import Model
from activations.prompts import PromptSet
from probes.crossval import fit_training_sets
from probes.metrics import auroc_rows
from probes.probe import ProbeSet
from probes.rows import prepare, standardised

__all__ = ["DIRECTIONS", "POSITIONS", "Ensemble", "Readings", "gap", "readable"]

# Where the model is about to answer; the end of the request with the template's words behind it; all of it.
POSITIONS = ("last", "mean@prompt[-8:]", "mean")
# Of 3, 6, 8 and 12 the most: the median over more of them moves less from one benign fine-tune to the next, and with a
# probe-evading one as much.
LOGISTIC = 12
DIRECTIONS = (*(f"logistic {number + 1}" for number in range(LOGISTIC)), "difference of means")
_L2 = 1e-2  # of the intent probes, see `fit_probes`
# One-sided, in standard errors of the AUROC of noise: one reading of a hundred that reads nothing is kept.
_BEYOND_NOISE = 2.33


@dataclass(frozen=True, eq=False)
class Readings:
    """What the weights that were in the network say of prompts, harmful and benign.

    Attributes:
        probe: Scores that the intent probes give to the first set, one probe a layer.
        members: Scores of every reading, by set; each reading has an offset of its own, which no gap knows.
    """

    probe: Float[np.ndarray, "layer prompt"]
    members: Mapping[str, Float[np.ndarray, "position layer direction prompt"]]

    @property
    def finite(self) -> bool:
        """Whether all scores are numbers: large activations are, and their products may not be."""
        return all(bool(np.isfinite(scores).all()) for scores in (self.probe, *self.members.values()))


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Directions that read harm in one base.

    Attributes:
        hook_points: The layers.
        weights: Position to what is multiplied with the residual stream there; scaling undone, `DIRECTIONS` in order.
    """

    hook_points: tuple[str, ...]
    weights: Mapping[str, Float[np.ndarray, "layer direction d_model"]]

    @classmethod
    def fit(cls, base: Model, prompts: PromptSet, *, hook_points: Sequence[str]) -> Ensemble:
        """Fit every direction on the base.

        Cost: one forward pass, and `LOGISTIC` fits a layer and position. Memory: `len(POSITIONS)` activations a layer
        for each prompt until it is done, the directions afterwards.
        """
        found = extract(base, prompts, hook_points=hook_points, pooling=POSITIONS)
        layers = {position: found[position].values for position in POSITIONS}
        weights = {
            position: np.stack([directions(layer, prompts.labels) for layer in values])
            for position, values in layers.items()
        }
        return cls(tuple(hook_points), weights)

    def read(self, model: Model, sets: Mapping[str, tuple[Sequence[str], np.ndarray]], probes: ProbeSet) -> Readings:
        """Score prompts under the weights that are in the network now.

        Cost: one forward pass. Memory: `len(POSITIONS)` activations a layer for each prompt of one set; scores stay.

        Args:
            model: The base, whatever is applied to it.
            sets: Name to prompts, with labels that are not looked at.
            probes: Intent probes at the same hook points, for the first set.

        Raises:
            NonFiniteError: An activation is NaN or infinite.
        """
        single, members = np.empty((0, 0)), {}
        for number, (name, (prompts, _)) in enumerate(sets.items()):
            poolings = list(self.weights) if number else list(dict.fromkeys([*self.weights, probes.pooling]))
            found = extract(model, prompts, hook_points=self.hook_points, pooling=poolings)
            if not number:
                single = probes.score(found[probes.pooling].values)
            members[name] = self.scores({position: found[position].values for position in self.weights})
        return Readings(single, members)

    def scores(
        self, values: Mapping[str, Float[np.ndarray, "layer prompt d_model"]]
    ) -> Float[np.ndarray, "position layer direction prompt"]:
        """Every reading of activations, by position."""
        # What overflows is told by whoever asks whether scores are finite.
        with np.errstate(over="ignore", invalid="ignore"):
            return np.stack([weights @ values[position].swapaxes(1, 2) for position, weights in self.weights.items()])


def directions(
    values: Float[np.ndarray, "prompt d_model"], labels: Bool[np.ndarray, " prompt"]
) -> Float[np.ndarray, "direction d_model"]:
    """The readings of one layer, by which an activation is multiplied; zero where nothing is left to read.

    In standardised coordinates they are unit vectors, and each logistic one stands at right angles to those before it.
    """
    rows, _, scale = standardised(values)
    left = whole = prepare(rows, LOGISTIC)
    truth, everything = np.asarray(labels)[None], np.ones((1, len(labels)), dtype=bool)
    found: list[torch.Tensor] = []
    for _ in range(LOGISTIC):
        vector = fit_training_sets(left, "logistic", truth, everything, [_L2])[0][0]
        for earlier in found:  # rounding would add up
            vector = vector - earlier * (vector @ earlier)
        vector = vector / vector.norm().clamp(min=torch.finfo(vector.dtype).tiny)
        found.append(vector)
        rest = left.values - torch.outer(left.values @ vector, vector)
        # What was decomposed is all but the same, and only decides how fast the next fit gets there.
        left = dataclasses.replace(left, values=rest, low=None)
    found.append(fit_training_sets(whole, "mean_difference", truth, everything, [_L2])[0][0])
    return np.asarray(whole.features(torch.stack(found)).float().cpu().numpy() / scale, dtype=np.float32)


def gap(scores: Float[np.ndarray, "*reading prompt"], labels: Bool[np.ndarray, " prompt"]) -> np.ndarray:
    """Mean score of harmful prompts minus that of benign ones, for each reading."""
    harmful, benign = (scores[..., kind].mean(axis=-1, dtype=np.float64) for kind in (labels, ~labels))
    return np.asarray(harmful - benign)


def readable(scores: Float[np.ndarray, "*reading prompt"], labels: Bool[np.ndarray, " prompt"]) -> np.ndarray:
    """Which readings tell harmful prompts from benign ones better than noise does, in AUROC and in the mean."""
    harmful, benign = int(labels.sum()), int((~labels).sum())
    error = np.sqrt((harmful + benign + 1) / (12 * harmful * benign))
    areas = auroc_rows(scores.reshape(-1, scores.shape[-1]), labels[None]).reshape(scores.shape[:-1])
    return np.asarray((areas > 0.5 + _BEYOND_NOISE * error) & (gap(scores, labels) > 0))

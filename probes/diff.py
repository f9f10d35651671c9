"""Which layers a fine-tune shifted, in its weights and in its activations."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from activations.checkpoints import Checkpoint, open_checkpoint
from probes.activation_diff import ActivationDiff, diff_activations
from probes.weight_diff import WeightDiff, diff_weights

if TYPE_CHECKING:
    from activations.models import Model
    from activations.prompts import PromptSet

__all__ = ["ActivationDiff", "Diff", "WeightDiff", "diff", "diff_activations", "diff_weights"]


@dataclass(frozen=True)
class Diff:
    """How a fine-tune differs from its base.

    Attributes:
        base: The base's name.
        tuned: The fine-tune's name.
        kind: "full" or "adapter".
        weights: The difference of weights.
        activations: The difference of activations; None where no prompts were run.
        prompts: Name of the prompts that were run; empty where none were.
    """

    base: str
    tuned: str
    kind: Literal["full", "adapter"]
    weights: WeightDiff
    activations: ActivationDiff | None
    prompts: str = ""

    @property
    def top_layers(self) -> tuple[int, ...]:
        """Layers by their relative change of weights, most changed first, unchanged ones left out.

        Weights and not activations: a shift of the residual stream is carried on by every later layer.
        """
        profile = self.weights.layer_profile()
        return tuple(int(layer) for layer in np.argsort(-profile, kind="stable") if profile[layer] > 0)

    def to_dict(self) -> dict[str, object]:
        """Everything as JSON values."""
        return {
            "schema": "undertow.diff/1",
            "base": self.base,
            "tuned": self.tuned,
            "kind": self.kind,
            "top_layers": list(self.top_layers),
            "weights": self.weights.to_dict(),
            "prompts": self.prompts,
            "activations": self.activations.to_dict() if self.activations else None,
        }


def diff(
    model: Model,
    checkpoint: str | os.PathLike[str] | Checkpoint,
    *,
    base_path: str | os.PathLike[str] | None = None,
    prompts: PromptSet | str | None = "matched-pairs",
) -> Diff:
    """Compare a fine-tune with its base, layer by layer.

    The model's weights are swapped while the prompts run and put back exactly.

    Cost: reads both sets of weights once; two extractions of the prompts, the second of changed layers.

    Args:
        model: The base.
        checkpoint: The fine-tune, a full checkpoint or a LoRA adapter.
        base_path: The base's folder, to compare file with file; by default the weights that `model` holds.
        prompts: Prompts to run, a set or the name of one; None compares weights alone.

    Raises:
        UndertowError: The checkpoint cannot be used with this base.
    """
    from activations.extract import extract
    from activations.prompts import load_prompts
    from activations.reuse import ResidualCache
    from activations.weights import slots_of

    tuned = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    weights = diff_weights(open_checkpoint(base_path) if base_path else slots_of(model.hf), tuned)
    if prompts is None:
        return Diff(model.name, tuned.name, tuned.kind, weights, None)
    chosen = load_prompts(prompts) if isinstance(prompts, str) else prompts
    reuse = ResidualCache(model)  # layers that the fine-tune left alone run once
    with model.applied(tuned):
        after = extract(model, chosen, reuse=reuse)
    before = extract(model, chosen, reuse=reuse)
    labels = chosen.labels if len(set(chosen.harmful)) == 2 else None
    shift = diff_activations(before.values, after.values, labels, groups=chosen.pair_ids)
    return Diff(model.name, tuned.name, tuned.kind, weights, shift, chosen.name)

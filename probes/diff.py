"""Which layers a fine-tune shifted, in its weights and in its activations."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from activations.checkpoints import Checkpoint, open_checkpoint
from activations.errors import OptionError
from probes.activation_diff import ActivationDiff, diff_activations
from probes.added_shift import Parts, added_activations
from probes.bands import Band
from probes.localise import Localisation, refusal_readout
from probes.localise import localise as find_carriers
from probes.weight_diff import WeightDiff, diff_weights

if TYPE_CHECKING:
    from torch import Tensor

    from activations.models import Model
    from activations.prompts import PromptSet
    from probes.probe import ProbeSet

ALPHA = 0.05
"""Share of innocent fine-tunes in which a layer may be named, over all layers."""

__all__ = ["ALPHA", "ActivationDiff", "Diff", "WeightDiff", "diff", "diff_activations", "diff_files", "diff_weights"]


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
        positions: Pooling to the difference of activations there, for poolings beyond the first.
        added: What each layer adds to the shift by itself, its input being the base's; None unless asked for.
        localisation: Which layers carry a loss of refusal; None unless asked for.
        band: The profile of weights beside those of benign fine-tunes; None without a bank.
        tokens: Row of an embedding that moved to its token in the base's tokenizer; {} without one.
    """

    base: str
    tuned: str
    kind: Literal["full", "adapter"]
    weights: WeightDiff
    activations: ActivationDiff | None
    prompts: str = ""
    positions: Mapping[str, ActivationDiff] = field(default_factory=dict)
    added: ActivationDiff | None = None
    localisation: Localisation | None = None
    band: Band | None = None
    tokens: Mapping[int, str] = field(default_factory=dict)

    @property
    def first_guilty_layer(self) -> int | None:
        """The first layer that by itself shifts harmful prompts otherwise than benign ones; None where none is known.

        Without labels the first that by itself shifts all prompts, which every layer that was trained does.
        """
        if self.added is None:
            return None
        p_values = self.added.harm_shift_p
        p_values = self.added.mean_shift_p if p_values is None else p_values
        return next((layer for layer, p in enumerate(p_values) if p <= ALPHA), None)

    @property
    def explanation(self) -> str:
        """What explains the change of weights, in words: nothing, rounding, an adapter, or else "training"."""
        weights = self.weights
        if not weights.relative:
            return "nothing changed"
        if weights.rounding:
            return weights.rounding if weights.rounding.endswith(")") else f"a cast to {weights.rounding}"
        lora = weights.merged_lora
        if lora is None:
            return "training"
        modules = sorted({module.split(".")[-1] for module in lora.modules})
        kind = "an adapter" if self.kind == "adapter" else "a merged adapter"
        return f"{kind} of rank {lora.rank} on {', '.join(modules)}"

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
            "positions": {name: found.to_dict() for name, found in self.positions.items()},
            "added": self.added.to_dict() if self.added else None,
            "first_guilty_layer": self.first_guilty_layer,
            "localisation": self.localisation.to_dict() if self.localisation else None,
            "band": self.band.to_dict() if self.band else None,
            "explanation": self.explanation,
            "tokens": {str(row): token for row, token in self.tokens.items()},
        }


def diff_files(base: Checkpoint, tuned: Checkpoint, *, spectra: bool = True, device: str = "cpu") -> Diff:
    """Compare the weights of two checkpoints, file with file; no model is loaded.

    Args:
        base: The base's files.
        tuned: The fine-tune's.
        spectra: Whether to look for singular values, ranks and merged adapters.
        device: Where to compute: "cpu" or "cuda".

    Raises:
        CheckpointError: One cannot be read, or they do not belong together (see `diff_weights`).
    """
    return Diff(base.name, tuned.name, tuned.kind, diff_weights(base, tuned, spectra=spectra, device=device), None)


def diff(
    model: Model,
    checkpoint: str | os.PathLike[str] | Checkpoint,
    *,
    base_path: str | os.PathLike[str] | None = None,
    prompts: PromptSet | str | None = "matched-pairs",
    poolings: Sequence[str] = ("last",),
    probes: ProbeSet | None = None,
    added: bool = False,
    localise: bool = False,
    spectra: bool = True,
) -> Diff:
    """Compare a fine-tune with its base, layer by layer.

    The model's weights are swapped while the prompts run and put back exactly.

    Cost: reads both sets of weights once; two extractions of the prompts, the second of changed layers; `added` one
    more; `localise` some forty forward passes a layer over short prompts.

    Args:
        model: The base.
        checkpoint: The fine-tune, a full checkpoint or a LoRA adapter.
        base_path: The base's folder, to compare file with file; by default the weights that `model` holds.
        prompts: Prompts to run, a set or the name of one; None compares weights alone.
        poolings: Where in a prompt to compare, see `activations.batching.Pooling`, one vector each.
        probes: Of the base, one a layer: the shift along their directions.
        added: Whether to tell what each layer adds from what it inherits.
        localise: Whether to look for the layers that carry a loss of refusal, with random differences as the null.
        spectra: Whether to look for singular values, ranks and merged adapters.

    Raises:
        UndertowError: The checkpoint cannot be used with this base.
    """
    from activations.prompts import load_prompts

    tuned = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    source = open_checkpoint(base_path) if base_path else _slots(model)
    device = model.device if model.device.type == "cuda" else "cpu"
    weights = diff_weights(source, tuned, spectra=spectra, device=device)
    found = Diff(model.name, tuned.name, tuned.kind, weights, None, tokens=_tokens(model, weights))
    if prompts is not None:
        chosen = load_prompts(prompts) if isinstance(prompts, str) else prompts
        found = _with_activations(found, model, tuned, chosen, list(poolings), probes=probes, added=added)
    if localise:
        found = replace(found, localisation=find_carriers(Parts.of(model, tuned), refusal_readout(model), alpha=ALPHA))
    return found


def _with_activations(
    found: Diff,
    model: Model,
    tuned: Checkpoint,
    prompts: PromptSet,
    poolings: list[str],
    *,
    probes: ProbeSet | None,
    added: bool,
) -> Diff:
    from activations.extract import extract
    from activations.reuse import ResidualCache

    # Layers that the fine-tune left alone run once; where each layer is tried alone, so does everything below it.
    layers = tuple(range(1, model.n_layers)) if added else ()
    reuse = ResidualCache(model, layers=layers)
    with model.applied(tuned):
        after = extract(model, prompts, pooling=poolings, reuse=reuse)
    before = extract(model, prompts, pooling=poolings, reuse=reuse)
    labels = prompts.labels if len(set(prompts.harmful)) == 2 else None
    directions = (
        None if probes is None else np.stack([probes[layer].residual_direction for layer in range(len(probes))])
    )

    def compared(pooling: str, values: np.ndarray) -> ActivationDiff:
        return diff_activations(before[pooling].values, values, labels, groups=prompts.pair_ids, directions=directions)

    shifts = {pooling: compared(pooling, after[pooling].values) for pooling in poolings}
    first, *others = poolings
    own = None
    if added:
        alone = added_activations(Parts.of(model, tuned), prompts, pooling=first, reuse=reuse)
        own = compared(first, alone)
    return replace(
        found,
        activations=shifts[first],
        prompts=prompts.name,
        positions={pooling: shifts[pooling] for pooling in others},
        added=own,
    )


def _slots(model: Model) -> Mapping[str, Tensor]:
    from activations.weights import slots_of

    return slots_of(model.hf)


def _tokens(model: Model, weights: WeightDiff) -> dict[int, str]:
    """What the rows that moved stand for, where the model has a tokenizer."""
    rows = sorted({row.row for tensor in weights.tensors for row in tensor.rows})
    try:
        size = len(model.tokenizer)
        return {row: str(model.tokenizer.convert_ids_to_tokens(row)) for row in rows if row < size}
    except OptionError:
        return {}

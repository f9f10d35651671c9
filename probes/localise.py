"""Which layers carry a fine-tune's harmful behaviour, and which moved more than benign training moves them.

"Layer 17 moved most" is true of some layer in every fine-tune. Here a layer is named only where it does more to refusal
than an equally large random difference does in any layer, and where putting the base's weights back into it gives
refusal back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from activations.answers import answer_logprobs
from activations.errors import HookPointError, OptionError
from activations.hook_points import HEADS
from activations.models import Model
from activations.prompts import PromptSet, load_prompts
from activations.tokens import format_prompt
from activations.weights import slots_of
from probes.added_shift import Parts
from probes.bands import Band, layer_band
from probes.causal import refusal_log_odds

__all__ = [
    "LayerEffects",
    "Localisation",
    "Readout",
    "layer_effects",
    "localise",
    "refusal_readout",
]

# A first token opens refusals where the base gives it so much more probability on harmful prompts (see `Reference`).
_OPENS = 0.05
# Layers that a greedy search tries at each step, those with the largest effects.
_CANDIDATES = 12
# A layer that takes less than this share of the lost refusal is not named, however little chance there is in it.
_MATERIAL = 0.1

Readout = Callable[[Model], Float[np.ndarray, " prompt"]]
"""How strongly a model refuses each of some harmful prompts, in nats, with whatever weights are in it."""


@dataclass(frozen=True, eq=False)
class Localisation:
    """Where a fine-tune's loss of refusal sits.

    Attributes:
        loss: What the fine-tune lost of refusal: base minus fine-tune, mean over prompts, in nats.
        loss_null: The same for each draw of the null.
        band: Each layer's effect: half of what refusal loses when the layer alone is put into the base, and half of
            what comes back when the base's layer alone is put into the fine-tune. In nats.
        intervals: 95 % interval of each effect over prompts, [layer, 2].
        carriers: A minimal set of layers that gives back `enough` of the loss when the base's weights are restored
            in them, in the order found; () where the loss is within the null's.
        restored: Share of the loss that restoring the carriers gives back; 0 without carriers.
        components: "layer.part" to the loss that comes back when that part alone is restored, in nats: the block's
            modules ("1.self_attn"), and heads by what they write ("1.head.3").
        null: What the null was: "benign fine-tunes" or "random differences of equal norm".
    """

    loss: float
    loss_null: Float[np.ndarray, " draw"]
    band: Band
    intervals: Float[np.ndarray, "layer 2"]
    carriers: tuple[int, ...]
    restored: float
    components: Mapping[str, float] = field(default_factory=dict)
    null: str = ""

    @property
    def shifted(self) -> tuple[int, ...]:
        """Layers above the band that take at least a tenth of what refusal was lost; none where none was lost."""
        least = _MATERIAL * self.loss
        return tuple(layer for layer in self.band.exceeding if self.lost and self.band.values[layer] >= least)

    @property
    def lost(self) -> bool:
        """Whether more refusal was lost than in any draw of the null."""
        return self.loss > max(0.0, float(self.loss_null.max(initial=0.0)))

    def to_dict(self) -> dict[str, object]:
        """Everything as JSON values."""
        return {
            "loss": self.loss,
            "loss_null": self.loss_null.tolist(),
            "null": self.null,
            "shifted": list(self.shifted),
            "carriers": list(self.carriers),
            "restored": self.restored,
            "components": dict(self.components),
            "effects": self.band.to_dict() | {"intervals": self.intervals.tolist()},
        }


@dataclass(frozen=True, eq=False)
class LayerEffects:
    """What a fine-tune does to refusal, whole and layer by layer, on each prompt, in nats.

    Attributes:
        base: Refusal of the base.
        tuned: Refusal of the fine-tune.
        layers: What each layer takes from it; 0 where nothing changed.
    """

    base: Float[np.ndarray, " prompt"]
    tuned: Float[np.ndarray, " prompt"]
    layers: Float[np.ndarray, "layer prompt"]

    @property
    def loss(self) -> float:
        """Mean over prompts of what the whole fine-tune takes."""
        return float((self.base - self.tuned).mean())


def localise(
    parts: Parts,
    readout: Readout,
    *,
    benign: Sequence[LayerEffects] = (),
    draws: int = 20,
    alpha: float = 0.05,
    enough: float = 0.9,
    seed: int = 0,
) -> Localisation:
    """Find the layers that carry the loss of refusal.

    Cost: 2 readouts a layer for the fine-tune and again for each draw, and at most 12 for each carrier: about
    (draws + 1) * (2 * n_layers + 1) forward passes over the prompts.

    Args:
        parts: The fine-tune.
        readout: See `refusal_readout`; for a behaviour inside an encoding give one with encoded prompts.
        benign: Of benign fine-tunes of the same base, by `layer_effects` with the same readout, measured once for all
            fine-tunes to come; without any, random differences are drawn.
        draws: How many; each has in every changed tensor the fine-tune's norm of difference. p-values reach down to
            1 / (draws + 1).
        alpha: Family-wise: the share of innocent fine-tunes in which any layer may be named.
        enough: Share of the loss that the carriers must give back.
        seed: Of the draws.

    Raises:
        OptionError: Fewer draws, or benign fine-tunes, than `alpha` can resolve, or `enough` is not in (0, 1].
    """
    count = len(benign) or draws
    if (1 + count) * alpha < 1 or not 0 < enough <= 1:
        raise OptionError(
            f"{count} draws and enough {enough}: alpha {alpha} needs {int(np.ceil(1 / alpha)) - 1}; enough is in (0, 1]"
        )
    own = layer_effects(parts, readout)
    rng = torch.Generator().manual_seed(seed)
    null = list(benign) or [layer_effects(_random_like(parts, rng), readout, own.base) for _ in range(draws)]
    losses = np.array([effects.loss for effects in null])
    band = layer_band(own.layers.mean(axis=1), np.stack([effects.layers.mean(axis=1) for effects in null]), alpha=alpha)
    found = Localisation(
        own.loss,
        losses,
        band,
        _intervals(own.layers, seed),
        (),
        0.0,
        null="benign fine-tunes" if benign else "random differences of equal norm",
    )
    if not found.lost:
        return found
    carriers, restored = _carriers(parts, readout, band.values, own, enough)
    components = {name: value for layer in carriers for name, value in _components(parts, readout, layer, own).items()}
    return replace(found, carriers=carriers, restored=restored, components=components)


def layer_effects(parts: Parts, readout: Readout, base: Float[np.ndarray, " prompt"] | None = None) -> LayerEffects:
    """What each layer takes from refusal, put into the base alone and taken out of the fine-tune alone, on average.

    The first and the last term of a Shapley value, which share out a loss that layers make together.

    Cost: 2 readouts for each changed layer, and one or two more.

    Args:
        parts: The fine-tune.
        readout: See `refusal_readout`.
        base: What it says of the base, where that is known.
    """
    base = readout(parts.model) if base is None else base
    everything = tuple(parts.values)
    with parts.only(everything) as model:
        tuned = readout(model)
    effects = np.zeros((parts.model.n_layers, len(base)))
    for layer in parts.layers:
        own = parts.names([layer])
        with parts.only(own) as model:
            alone = readout(model)
        with parts.only([name for name in everything if name not in own]) as model:
            without = readout(model)
        effects[layer] = ((base - alone) + (without - tuned)) / 2
    return LayerEffects(base, tuned, effects)


def refusal_readout(model: Model, prompts: PromptSet | None = None, *, count: int = 48) -> Readout:
    """Log-odds of beginning a refusal at the first answer token, on harmful prompts.

    Which tokens those are is read off the base: those that it gives to harmful prompts and not to benign ones.

    Args:
        model: The base, with nothing applied.
        prompts: Harmful and benign; by default the shipped screening set.
        count: Of each class, at most.

    Raises:
        LabelError: Only one class is present.
        OptionError: The base does not refuse: no token tells the classes apart.
    """
    chosen = (prompts or load_prompts("screening")).require_both()
    ids = {
        harmful: [format_prompt(model.tokenizer, text) for text in chosen.where(harmful=harmful)[:count]]
        for harmful in (True, False)
    }
    first = {
        harmful: answer_logprobs(model, some, torch.zeros(len(some), 1, dtype=torch.long))[:, 0].exp().mean(0)
        for harmful, some in ids.items()
    }
    tokens = torch.nonzero(first[True] - first[False] >= _OPENS).flatten().tolist()
    if not tokens:
        raise OptionError(
            "the base answers harmful prompts as it does benign ones: there is no refusal to lose",
            hint="Use a base that refuses, or compare weights and activations alone.",
        )
    return lambda other: refusal_log_odds(other, ids[True], tokens)


def _carriers(
    parts: Parts, readout: Readout, values: np.ndarray, own: LayerEffects, enough: float
) -> tuple[tuple[int, ...], float]:
    """Add the layer whose restoration helps most until enough came back; then leave out what is not needed."""
    candidates = sorted(parts.layers, key=lambda layer: -values[layer])[:_CANDIDATES]
    chosen: list[int] = []
    share = 0.0
    while share < enough and len(chosen) < len(candidates):
        shares = {
            layer: _restored(parts, readout, [*chosen, layer], own) for layer in candidates if layer not in chosen
        }
        best = max(shares, key=shares.__getitem__)
        chosen.append(best)
        share = shares[best]
    for layer in chosen[:-1]:
        fewer = [other for other in chosen if other != layer]
        without = _restored(parts, readout, fewer, own)
        if without >= enough:
            chosen, share = fewer, without
    return tuple(chosen), share


def _restored(parts: Parts, readout: Readout, layers: Sequence[int], own: LayerEffects) -> float:
    """Share of the loss that comes back when these layers are the base's."""
    gone = set(parts.names(layers))
    with parts.only([name for name in parts.values if name not in gone]) as model:
        return float((readout(model) - own.tuned).mean() / own.loss)


def _components(parts: Parts, readout: Readout, layer: int, own: LayerEffects) -> dict[str, float]:
    """What comes back when one part of a layer is restored: each of the block's modules, and each head's output."""
    groups: dict[str, list[str]] = {}
    prefix = _common_prefix(parts.names([layer]))
    for name in parts.names([layer]):
        groups.setdefault(name.removeprefix(prefix).split(".")[0], []).append(name)
    found = {}
    for group, names in groups.items():
        with parts.only([name for name in parts.values if name not in names]) as model:
            found[f"{layer}.{group}"] = float((readout(model) - own.tuned).mean())
    return found | {
        f"{layer}.head.{head}": float((readout(model) - own.tuned).mean())
        for head, model in _heads_restored(parts, layer)
    }


def _common_prefix(names: Sequence[str]) -> str:
    """The path of the block that all these names lie in."""
    split = [name.split(".") for name in names]
    place = next(i for i, part in enumerate(split[0]) if part.isdigit() and all(one[i] == part for one in split))
    return ".".join(split[0][: place + 1]) + "."


def _heads_restored(parts: Parts, layer: int) -> Iterator[tuple[int, Model]]:
    """The fine-tune with one head's columns of the output projection put back, head by head; none where it has none."""
    model = parts.model
    try:
        module = model.hook_points.resolve(f"blocks.{layer}.{HEADS}").module
    except HookPointError:
        return
    heads = int(getattr(model.hf.config.get_text_config(), "num_attention_heads", 0))
    name = next((name for name, slot in slots_of(model.hf).items() if slot is getattr(module, "weight", None)), "")
    if name not in parts.values or not heads or not isinstance(module, nn.Linear):
        return
    base = module.weight.data
    width = base.shape[1] // heads
    for head in range(heads):
        columns = slice(head * width, (head + 1) * width)
        value = parts.values[name].clone()
        value[:, columns] = base[:, columns]
        mixed = Parts(model, parts.checkpoint, {**parts.values, name: value}, f"{layer}.head.{head} restored")
        with mixed.only(tuple(mixed.values)):
            yield head, model


def _random_like(parts: Parts, rng: torch.Generator) -> Parts:
    """The same slots changed by noise, each as far as the fine-tune changed it."""
    slots, values = slots_of(parts.model.hf), {}
    for name, value in parts.values.items():
        before = slots[name].data
        noise = torch.randn(value.shape, generator=rng).to(value.device, torch.float32)
        length = (value.float() - before.float()).norm() / noise.norm()
        values[name] = (before.float() + length * noise).to(value.dtype)
    return Parts(parts.model, parts.checkpoint, values, f"noise {rng.initial_seed()}")


def _intervals(effects: Float[np.ndarray, "layer prompt"], seed: int, *, draws: int = 1000) -> np.ndarray:
    rows = np.random.default_rng(seed).integers(effects.shape[1], size=(draws, effects.shape[1]))
    return np.asarray(np.quantile(effects[:, rows].mean(axis=2), (0.025, 0.975), axis=1).T)

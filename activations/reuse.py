"""Starting a forward pass in the middle: layers that a checkpoint shares with its base are run once for all of them.

Where the bytes of layers 0 to k are the base's, so is everything that they compute. The first run keeps the residual
stream in front of layer k and what was pooled below it; every later run with the same batch starts there. Same
batches in, same kernels, same shapes: the values are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from activations.errors import OptionError
from activations.models import Model

__all__ = ["Kept", "Pooled", "ResidualCache", "can_start_at", "starting_at", "watching"]

_tested: WeakKeyDictionary[nn.Module, dict[int, bool]] = WeakKeyDictionary()

Pooled = dict[tuple[str, str], Float[Tensor, "vector width"]]


@dataclass(frozen=True)
class Kept:
    """What is known of one batch below a layer.

    Attributes:
        layer: The first layer that still has to run.
        residual: What goes into it; None where no layer is left.
        in_tuple: Whether this architecture's blocks return their hidden states in a tuple.
        pooled: (hook point, pooling) to what was kept there; hook points of lower layers alone.
    """

    layer: int
    residual: Float[Tensor, "row token d_model"] | None
    in_tuple: bool
    pooled: Pooled

    @property
    def nbytes(self) -> int:
        """Bytes of host memory."""
        held = [*self.pooled.values(), *([] if self.residual is None else [self.residual])]
        return sum(tensor.nbytes for tensor in held)


class ResidualCache:
    """The base's residual stream in front of some layers, kept in host memory for checkpoints that share those below.

        reuse = ResidualCache(model)
        for adapter in adapters:
            with model.applied(adapter):
                activations = extract(model, prompts, reuse=reuse)  # from the second on, changed layers alone run

    Cost: one residual vector a token, batch and layer kept, in the model's dtype.

    Args:
        model: The base; the cache serves no other.
        layers: Keep the stream in front of these layers in every run that can; otherwise in front of the first layer
            that a checkpoint changed.
        max_bytes: Beyond it nothing more is kept, and runs are whole.

    Raises:
        OptionError: The model has no such layer.
    """

    def __init__(self, model: Model, *, layers: tuple[int, ...] = (), max_bytes: int = 4 << 30) -> None:
        if any(not 0 < layer <= model.n_layers for layer in layers):
            raise OptionError(f"layers is {layers}: expected layers from 1 to {model.n_layers}, before which to keep")
        self.model = model
        self.layers = layers
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._kept: dict[bytes, dict[int, Kept]] = {}

    def require(self, model: Model) -> None:
        """Check that the cache belongs to a model.

        Raises:
            OptionError: It was made for another.
        """
        if model is not self.model:
            raise OptionError(
                f"the residuals kept are {self.model.name}'s, expected {model.name}'s",
                hint="Make a ResidualCache for each model.",
            )

    def find(self, key: bytes) -> Kept | None:
        """The highest start known for a batch below the first changed layer."""
        usable = [kept for layer, kept in self._kept.get(key, {}).items() if layer <= self.model.first_changed_layer]
        return max(usable, key=lambda kept: kept.layer, default=None)

    def wanted(self, key: bytes) -> list[int]:
        """In front of which layers a run of this batch should keep the stream."""
        changed = self.model.first_changed_layer
        layers = [layer for layer in self.layers if layer <= changed] or [changed]
        missing = [layer for layer in layers if layer and layer not in self._kept.get(key, {})]
        return [layer for layer in missing if can_start_at(self.model, layer)]

    def keep(self, key: bytes, kept: Kept) -> None:
        """Remember, while there is room."""
        if self.nbytes + kept.nbytes <= self.max_bytes:
            self._kept.setdefault(key, {})[kept.layer] = kept
            self.nbytes += kept.nbytes


@torch.inference_mode()
def can_start_at(model: Model, layer: int) -> bool:
    """Whether the residual stream in front of a layer is all that the layers from there on need, tried once.

    Some architectures hand on more, such as keys and values that later layers share. Cost: two passes over six tokens.
    """
    known = _tested.setdefault(model.hf, {})
    if layer not in known:
        with model.lock:
            known[layer] = layer == model.n_layers or _starts_exactly(model, layer)
    return known[layer]


def _starts_exactly(model: Model, layer: int) -> bool:
    ids = torch.arange(7, 13, device=model.device)[None] % model.hf.get_input_embeddings().weight.shape[0]
    try:
        with watching(model, [layer]) as seen:
            whole = model.hf(input_ids=ids, use_cache=False).logits
        stream, in_tuple = seen[layer]
        with starting_at(model, Kept(layer, stream, in_tuple, {})):
            rest = model.hf(input_ids=ids, use_cache=False).logits
    # Whatever a block misses that it was handed before; runs are then whole.
    except Exception:
        return False
    return torch.equal(whole, rest) or not whole.isfinite().all()


@contextmanager
def starting_at(model: Model, kept: Kept | None) -> Iterator[None]:
    """Within the block a forward pass skips the blocks below a layer, and goes on from the residual stream kept."""
    if kept is None:
        yield
        return
    blocks = model.hook_points.blocks()[: kept.layer]
    before = [block.__dict__.get("forward") for block in blocks]
    residual = kept.residual.to(model.device) if kept.residual is not None else None
    try:
        for block in blocks:
            given = residual if block is blocks[-1] else None
            block.forward = partial(_skip, given, kept.in_tuple)
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            if own is None:
                del block.forward
            else:
                block.forward = own


def _skip(given: Tensor | None, in_tuple: bool, *args: Any, **kwargs: Any) -> Any:
    hidden = given
    if hidden is None:
        hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden,) if in_tuple else hidden


@contextmanager
def watching(model: Model, layers: list[int]) -> Iterator[Mapping[int, tuple[Tensor, bool]]]:
    """Within the block: layer to the residual stream in front of it, and whether blocks return tuples."""
    blocks = model.hook_points.blocks()
    seen: dict[int, tuple[Tensor, bool]] = {}

    def see(layer: int, _: Any, __: Any, output: Any) -> None:
        in_tuple = isinstance(output, tuple)
        seen[layer] = ((output[0] if in_tuple else output), in_tuple)

    handles = [blocks[layer - 1].register_forward_hook(partial(see, layer)) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()

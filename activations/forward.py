"""One batch through the model: hooks in a context manager, what they keep, and its way to the host."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from activations.batching import Batch, Pick, Pooling, next_batch, pick
from activations.errors import HookPointError, NonFiniteError
from activations.hook_points import layer_of
from activations.models import Model
from activations.packing import SharedPrefix, packed_attention
from activations.reuse import Kept, Pooled, ResidualCache, starting_at, watching
from activations.tokens import Tokenised

__all__ = ["Extracted", "Launched", "Reader", "capture"]

_FRONT = "front"


class Extracted(NamedTuple):
    """What one batch gave of one pooling: the vectors of its prompts, one prompt after the other.

    Attributes:
        rows: The prompts.
        lengths: Vectors of each: 1, or its number of tokens where the pooling keeps all.
        vectors: In float32, on the CPU.
    """

    rows: tuple[int, ...]
    lengths: list[int]
    vectors: Float[np.ndarray, "hook_point vector width"]


class Launched(NamedTuple):
    """A batch whose result may still be on its way from the device."""

    rows: tuple[int, ...]
    lengths: Mapping[str, list[int]]
    vectors: Mapping[str, Float[Tensor, "hook_point vector width"]]
    arrived: torch.cuda.Event | None

    def wait(self, hook_points: Sequence[str]) -> dict[str, Extracted]:
        """Pooling to its vectors, once they are here.

        Raises:
            NonFiniteError: A vector is NaN or infinite; the message names place and prompt.
        """
        if self.arrived is not None:
            self.arrived.synchronize()
        # Copied out of page-locked memory, which is scarce and soon needed again.
        here = {text: v.numpy() if self.arrived is None else v.numpy().copy() for text, v in self.vectors.items()}
        found = {text: Extracted(self.rows, self.lengths[text], vectors) for text, vectors in here.items()}
        for pooling, part in found.items():
            bad = np.argwhere(~np.isfinite(part.vectors).all(axis=-1))
            if len(bad):
                place, vector = bad[0]
                row = np.repeat(part.rows, part.lengths)[vector]
                raise NonFiniteError(
                    f"activations are NaN or infinite at {hook_points[place]} of prompt {row} ({pooling})",
                    hint="Run in bfloat16 or float32, whose numbers reach further; else the weights are broken.",
                )
        return found


class Reader:
    """Reads batches with a model and keeps what some poolings ask for at some hook points.

    Args:
        model: The model, with whatever checkpoint is applied to it.
        hook_points: Where.
        poolings: Written form to pooling.
        reuse: Where to find and leave the residual stream of unchanged layers.
        shared: Token ids that every prompt of the packed batches to come begins with, left out of them; read now.
    """

    def __init__(
        self,
        model: Model,
        hook_points: Sequence[str],
        poolings: Mapping[str, Pooling],
        *,
        reuse: ResidualCache | None = None,
        shared: Sequence[int] = (),
    ) -> None:
        self.model = model
        self.hook_points = tuple(hook_points)
        self.poolings = poolings
        self._reuse = reuse
        self.shared = len(shared)
        self._prefix: SharedPrefix | None = None
        self._shared_ids = np.asarray(shared, dtype=np.int32).tobytes()
        if len(shared):
            front = next_batch([list(shared)], [0], max_tokens=len(shared), packed=True)
            every = {_FRONT: Pick("all", torch.arange(len(shared)), [len(shared)])}
            prefix = SharedPrefix(len(shared))
            self._front = self._pooled(front, every, keep=prefix)
            self._prefix = prefix

    def launch(self, batch: Batch, prompts: Mapping[int, Tokenised]) -> Launched:
        """Run one batch; on a GPU this returns before the result is there.

        Raises:
            PromptError: A prompt has no token that a pooling asks for.
        """
        picks = {text: pick(batch, prompts, pooling) for text, pooling in self.poolings.items()}
        pooled = self._pooled(batch, picks)
        vectors = {text: _stacked([pooled[name, text] for name in self.hook_points]) for text in picks}
        lengths = {text: chosen.lengths for text, chosen in picks.items()}
        return Launched(batch.rows, lengths, *_to_host(vectors))

    def _pooled(self, batch: Batch, picks: Mapping[str, Pick], *, keep: SharedPrefix | None = None) -> Pooled:
        # The pass over a shared beginning is short, and has to come by every layer for its keys and values.
        reuse = self._reuse if keep is None else None
        key = self._key(batch, picks) if reuse else b""
        known = reuse.find(key) if reuse else None
        pooled: Pooled = dict(known.pooled) if known else {}
        here: dict[torch.device, dict[str, Pick]] = {}

        def take(name: str, hidden: Float[Tensor, "... width"]) -> None:
            flat = hidden.flatten(0, -2)
            if batch.prefix:
                flat = torch.cat([self._front[name, _FRONT].to(flat.device), flat])
            if flat.device not in here:
                here[flat.device] = {text: chosen.to(flat.device) for text, chosen in picks.items()}
            for text, chosen in here[flat.device].items():
                pooled[name, text] = chosen.of(flat)

        needed = [name for name in self.hook_points if not any((name, text) in pooled for text in picks)]
        if not needed:
            return pooled
        start = known.layer if known else 0
        above = [layer for layer in reuse.wanted(key) if layer > start] if reuse else []
        # One pass at a time: hooks, attention and skipped blocks belong to the model, not to a thread.
        with (
            self.model.lock,
            watching(self.model, above) as seen,
            capture(self.model, needed, take),
            starting_at(self.model, known),
        ):
            self._forward(batch, keep)
        if reuse:
            _leave(reuse, key, above, seen, pooled)
        return pooled

    def _forward(self, batch: Batch, keep: SharedPrefix | None) -> None:
        ids = batch.input_ids.to(self.model.device, non_blocking=True)
        # No mask: padding comes after the prompt, and a causal model (checked at load) never looks ahead.
        if batch.position_ids is None:
            self.model.hf(input_ids=ids, use_cache=False)
            return
        prefix = self._prefix if batch.prefix else None
        with packed_attention(self.model, batch.lengths.tolist(), prefix=prefix, keep=keep):
            positions = batch.position_ids.to(self.model.device, non_blocking=True)
            self.model.hf(input_ids=ids, position_ids=positions, use_cache=False)

    def _key(self, batch: Batch, picks: Mapping[str, Pick]) -> bytes:
        """Hash of everything that decides what a batch gives below a layer."""
        digest = hashlib.sha256(repr((batch.packed, batch.prefix, batch.lengths.tolist())).encode())
        for part in (self._shared_ids if batch.prefix else b"", batch.input_ids.numpy().tobytes()):
            digest.update(part)
        for text, chosen in sorted(picks.items()):
            digest.update(repr((text, chosen.counts)).encode() + chosen.positions.numpy().tobytes())
        digest.update(repr(self.hook_points).encode())
        return digest.digest()


def _leave(
    reuse: ResidualCache,
    key: bytes,
    layers: Sequence[int],
    seen: Mapping[int, tuple[Tensor, bool]],
    pooled: Pooled,
) -> None:
    """Keep what other checkpoints can go on from; the pass ends below layers that no hook point needs."""
    for layer in layers:
        below = {place: vectors.cpu() for place, vectors in pooled.items() if layer_of(place[0]) < layer}
        stream, in_tuple = seen.get(layer, (None, False))
        if stream is not None or len(below) == len(pooled):
            reuse.keep(key, Kept(layer, None if stream is None else stream.cpu(), in_tuple, below))


@contextmanager
def capture(
    model: Model,
    hook_points: Sequence[str],
    take: Callable[[str, Float[Tensor, "prompt token width"]], None],
) -> Iterator[None]:
    """Call `take(name, hidden)` at each hook point of one forward pass, which stops after the last of them.

        with capture(model, ["blocks.3.hook_resid_post"], take):
            model.hf(input_ids=ids)  # what follows here in the block is skipped: the pass ends by an exception

    The hooks are gone when the block ends, however it ends.

    Raises:
        HookPointError: The model has no such hook point, or the forward pass never came by it.
    """
    sites = {name: model.hook_points.resolve(name) for name in hook_points}
    awaited = set(sites)

    def hook(name: str) -> Callable[[Tensor], None]:
        def see(hidden: Tensor) -> None:
            take(name, hidden)
            awaited.discard(name)
            if not awaited:
                raise _Complete

        return see

    handles = [site.attach(hook(name)) for name, site in sites.items()]
    try:
        yield
    except _Complete:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if awaited:
        raise HookPointError(f"no forward pass came by {', '.join(sorted(awaited))}", hint="Run model.hf in the block.")


class _Complete(Exception):  # noqa: N818  # a signal, not an error
    """Everything wanted has been seen: the rest of the forward pass would be thrown away."""


def _stacked(layers: Sequence[Tensor]) -> Tensor:
    return torch.stack([layer.to(layers[0].device) for layer in layers])


def _to_host(vectors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
    """Copies on the CPU, and the event after which they are complete; the next batch is launched meanwhile."""
    if not any(tensor.is_cuda for tensor in vectors.values()):
        return {text: tensor.cpu() for text, tensor in vectors.items()}, None
    host = {}
    for text, tensor in vectors.items():
        host[text] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host[text].copy_(tensor, non_blocking=True)
    # Of the device that the vectors lie on, which need not be the current one.
    return host, torch.cuda.current_stream(tensor.device).record_event()

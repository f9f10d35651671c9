"""Attention over prompts that lie one behind the other in one row, so that no arithmetic is spent on padding.

transformers lets an attention function be registered by name. Ours attends within each prompt alone: on a CPU by one
causal `scaled_dot_product_attention` a prompt (as fast there as one padded call for all, measured), on a GPU by torch's
variable-length kernel in one launch. Positions restart with each prompt; everything else in a block acts on single
tokens and never notices. Tokens that all prompts share in front can be read once: their keys and values are kept, and
stand before those of each prompt.

Not every architecture attends through that interface, and some do more than it says. So nothing is believed: before
a model is packed for the first time, packed and plain hidden states of a small example are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from activations.batching import Batch, next_batch
from activations.hook_points import RESID_POST
from activations.models import Model
from activations.self_test import token_distance

__all__ = ["SharedPrefix", "can_pack", "packed_attention", "reach", "stretches"]

_NAME = "undertow_packed"

# What transformers hands every attention function without meaning for the result.
_HARMLESS = {"position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states", "return_dict"}
_HARMLESS |= {"is_causal", "sliding_window", "output_router_logits", "logits_to_keep", "position_embeddings"}

# Settings of attention that count tokens along the row, whatever the positions given: Llama 4's temperature.
_COUNTS_THE_ROW = ("attn_temperature_tuning",)

# Rotary embeddings whose frequencies change once a batch holds a prompt longer than the original context.
_STRETCHING = ("longrope", "dynamic")

_tested: WeakKeyDictionary[nn.Module, dict[tuple[torch.dtype, torch.device], bool]] = WeakKeyDictionary()


@dataclass
class SharedPrefix:
    """Keys and values of tokens that all prompts share in front.

    Attributes:
        length: How many tokens.
        kept: Attention module to its keys and values, each [1, head, token, d_head].
    """

    length: int
    kept: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass
class _Layout:
    """How one packed row is divided."""

    lengths: list[int]
    prefix: SharedPrefix | None = None
    keep: SharedPrefix | None = None
    calls: int = 0
    _on: dict[torch.device, tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=dict)

    @property
    def shared(self) -> int:
        return self.prefix.length if self.prefix else 0

    def on(self, device: torch.device) -> tuple[Int[Tensor, " end"], Int[Tensor, " end"], Int[Tensor, " key"] | None]:
        """Ends of the prompts' queries and of their keys, and which keys those are where a prefix is shared."""
        if device not in self._on:
            ends = np.cumsum([0, *self.lengths])
            key_ends = np.cumsum([0, *(length + self.shared for length in self.lengths)])
            which = None
            if self.shared:
                own = [np.arange(start, end) + self.shared for start, end in pairwise(ends)]
                which = torch.from_numpy(np.concatenate([np.r_[: self.shared, part] for part in own]))
                which = which.to(device, non_blocking=True)
            queries, keys = (torch.from_numpy(all_).int().to(device, non_blocking=True) for all_ in (ends, key_ends))
            self._on[device] = (queries, keys, which)
        return self._on[device]


_layout: ContextVar[_Layout] = ContextVar("_layout")


class _CannotPackError(Exception):
    """The attention asks for something that ours does not do."""


@contextmanager
def packed_attention(
    model: Model, lengths: Sequence[int], *, prefix: SharedPrefix | None = None, keep: SharedPrefix | None = None
) -> Iterator[None]:
    """Within the `with` block the model attends within prompts that lie in one row.

    Args:
        model: The model, one that `can_pack`.
        lengths: Tokens of each prompt in the row.
        prefix: Tokens before those of each prompt, run already; position ids go on behind them.
        keep: Where to keep keys and values, for the pass that reads such a prefix.
    """
    from transformers import AttentionInterface

    # A name without a mask function: transformers then builds no mask at all.
    AttentionInterface.register(_NAME, _attend)
    configs = {id(module.config): module.config for module in model.hf.modules() if hasattr(module, "config")}
    before = {key: config._attn_implementation_internal for key, config in configs.items()}
    token = _layout.set(_Layout(list(lengths), prefix, keep))
    try:
        for config in configs.values():
            config._attn_implementation_internal = _NAME
        yield
    finally:
        _layout.reset(token)
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]


def can_pack(model: Model) -> bool:
    """Whether packed prompts give what they give alone, tried once on a small example.

    Cost: seven forward passes over at most fourteen tokens, the first time for each network, dtype and device.
    """
    config = model.hf.config.get_text_config()
    if any(getattr(config, name, None) for name in _COUNTS_THE_ROW):
        return False
    known = _tested.setdefault(model.hf, {})
    way = (model.dtype, model.device)
    if way not in known:
        with model.lock:
            found = _packs_exactly(model)
        if found is None:
            return False
        known[way] = found
    return known[way]


def reach(model: Model) -> int | None:
    """Tokens up to which each sees all before it, under positions that depend on it alone; None without a limit.

    Beyond it prompts go padded, under the model's own masks (sliding windows, chunks), and each alone where the longest
    prompt of a batch decides the frequencies of all (`stretches`).
    """
    config = model.hf.config.get_text_config()
    limits = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    limits += [_original_length(config, rope) for rope in _ropes(model) if _stretches(rope)]
    return min((limit for limit in limits if limit), default=None)


def stretches(model: Model) -> bool:
    """Whether the longest prompt of a batch decides the rotary frequencies of every prompt in it."""
    return any(_stretches(rope) for rope in _ropes(model))


def _ropes(model: Model) -> list[dict[str, Any]]:
    """Settings of the rotary embeddings: one set, or one for each kind of layer."""
    found = getattr(model.hf.config.get_text_config(), "rope_parameters", None) or {}
    nested = [rope for rope in found.values() if isinstance(rope, dict)]
    return nested or [found]


def _stretches(rope: dict[str, Any]) -> bool:
    return rope.get("rope_type") in _STRETCHING


def _original_length(config: Any, rope: dict[str, Any]) -> int | None:
    own = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return own or getattr(config, "max_position_embeddings", None)


# --- the attention itself


def _attend(
    module: nn.Module,
    query: Float[Tensor, "1 head token d_head"],
    key: Float[Tensor, "1 kv_head token d_head"],
    value: Float[Tensor, "1 kv_head token d_value"],
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Float[Tensor, "1 token head d_value"], None]:
    unknown = [name for name, value in others.items() if value is not None and name not in _HARMLESS]
    if unknown or attention_mask is not None or dropout:
        raise _CannotPackError(f"attention with {', '.join(unknown) or 'a mask or dropout'}")
    layout = _layout.get()
    layout.calls += 1
    if layout.keep is not None:
        layout.keep.kept[module] = (key, value)
    if layout.prefix is not None:
        shared_key, shared_value = layout.prefix.kept[module]
        key, value = torch.cat([shared_key, key], dim=2), torch.cat([shared_value, value], dim=2)
    attend = _by_kernel if query.is_cuda else _one_by_one
    return attend(query, key, value, scaling, layout), None


def _one_by_one(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, layout: _Layout) -> Tensor:
    """One causal attention a prompt."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    shared, start, out = layout.shared, 0, []
    for own in layout.lengths:
        here, until = slice(start, start + own), slice(shared + start, shared + start + own)
        own_key, own_value = key[:, :, until], value[:, :, until]
        mask = None
        if shared:
            own_key = torch.cat([key[:, :, :shared], own_key], dim=2)
            own_value = torch.cat([value[:, :, :shared], own_value], dim=2)
            mask = _seen(own, shared, query.device)
        out.append(
            scaled_dot_product_attention(
                query[:, :, here], own_key, own_value, attn_mask=mask, is_causal=mask is None, scale=scaling
            )
        )
        start += own
    return torch.cat(out, dim=2).transpose(1, 2)


def _seen(own: int, shared: int, device: torch.device) -> Bool[Tensor, "query key"]:
    """Each of a prompt's own tokens sees the shared ones, and itself and those before it."""
    return torch.ones(own, shared + own, dtype=torch.bool, device=device).tril(shared)


def _by_kernel(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, layout: _Layout) -> Tensor:
    """All prompts in one launch, by the flash attention that comes with torch; bfloat16 and float16 alone."""
    from torch.nn.attention.varlen import varlen_attn

    query_ends, key_ends, which = layout.on(query.device)
    flat_query, flat_key, flat_value = (x[0].transpose(0, 1) for x in (query, key, value))
    if which is not None:
        flat_key, flat_value = flat_key.index_select(0, which), flat_value.index_select(0, which)
    longest = max(layout.lengths)
    out: Tensor = varlen_attn(  # type: ignore[assignment]  # a tuple only if more is asked for
        flat_query,
        flat_key,
        flat_value,
        query_ends,
        key_ends,
        longest,
        longest + layout.shared,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[None]


# --- the comparison that decides


@torch.inference_mode()
def _packs_exactly(model: Model) -> bool | None:
    """None where the weights in the network now give nothing that can be compared."""
    vocab = model.hf.get_input_embeddings().weight.shape[0]
    shared = 2
    rows = [[(7 + i * i + 3 * length * (i >= shared)) % vocab for i in range(length)] for length in (6, 5, 3)]
    alone = torch.cat([_states(model, next_batch(rows, [row], max_tokens=9)) for row in range(len(rows))], dim=1)
    together = next_batch(rows, range(len(rows)), max_tokens=99)
    plain = _states(model, together)[:, _places(together, rows)]
    batch = next_batch(rows, range(len(rows)), max_tokens=99, packed=True)
    first = next_batch([rows[0][:shared]], [0], max_tokens=99, packed=True)
    own = next_batch(rows, range(len(rows)), max_tokens=99, packed=True, prefix=shared)
    prefix = SharedPrefix(shared)
    try:
        with packed_attention(model, batch.lengths.tolist()):
            packed = _states(model, batch)
            calls = _layout.get().calls
        with packed_attention(model, first.lengths.tolist(), keep=prefix):
            front = _states(model, first)
        with packed_attention(model, own.lengths.tolist(), prefix=prefix):
            behind = torch.cat([front, _states(model, own)], dim=1)[:, _places(own, rows)]
    # An architecture that cannot be packed fails in a way of its own; the padded path then serves it.
    except Exception as fault:
        return None if isinstance(fault, torch.OutOfMemoryError | MemoryError) else False
    if not alone.isfinite().all():
        return None
    # What rounding alone does to these prompts in this dtype: both are the model's own attention.
    rounding = _worst(plain, alone)
    allowed = max(3 * rounding, 1e-4, 2 * torch.finfo(model.dtype).eps)
    return calls == model.n_layers and _worst(packed, alone) <= allowed and _worst(behind, alone) <= allowed


def _places(batch: Batch, rows: Sequence[Sequence[int]]) -> Int[np.ndarray, " token"]:
    """Where the tokens of all rows lie, one row after the other."""
    return np.concatenate([batch.positions(i, 0, len(row)) for i, row in enumerate(rows)])


def _states(model: Model, batch: Batch) -> Float[Tensor, "layer token d_model"]:
    """The residual stream after every block, flattened as `Batch` says."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, hidden: Tensor) -> None:
        seen[name] = hidden.flatten(0, -2).float().cpu()

    names = model.hook_points.names(RESID_POST)
    handles = [model.hook_points.resolve(name).attach(partial(keep, name)) for name in names]
    positions = batch.position_ids
    given = {} if positions is None else {"position_ids": positions.to(model.device)}
    try:
        model.hf(input_ids=batch.input_ids.to(model.device), use_cache=False, **given)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack([seen[name] for name in names])


def _worst(got: Float[Tensor, "layer token d_model"], expected: Float[Tensor, "layer token d_model"]) -> float:
    return max(token_distance(*layer) for layer in zip(got, expected, strict=True))

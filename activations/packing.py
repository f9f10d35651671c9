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

from collections.abc import Iterator, Mapping, Sequence
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

__all__ = ["SharedPrefix", "can_pack", "packed_attention", "reach"]

_NAME = "undertow_packed"

# What transformers hands every attention function without meaning for the result.
_HARMLESS = {"position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states", "return_dict"}
_HARMLESS |= {"is_causal", "sliding_window", "output_router_logits", "logits_to_keep", "position_embeddings"}

_tested: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


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
                which = torch.from_numpy(np.concatenate([np.r_[: self.shared, part] for part in own])).to(device)
            queries, keys = (torch.from_numpy(all_).int().to(device) for all_ in (ends, key_ends))
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

    Cost: five forward passes over some fifteen tokens, the first time for each network.
    """
    if model.hf not in _tested:
        _tested[model.hf] = _packs_exactly(model)
    return _tested[model.hf]


def reach(model: Model) -> int | None:
    """Tokens up to which every token sees all before it; None without such a limit.

    Beyond it (sliding windows, chunks) prompts go padded, under the model's own masks.
    """
    config = model.hf.config.get_text_config()
    limits = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return min((limit for limit in limits if limit), default=None)


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
def _packs_exactly(model: Model) -> bool:
    vocab = model.hf.get_input_embeddings().weight.shape[0]
    shared = 2
    rows = [[(7 + i * i + 3 * length * (i >= shared)) % vocab for i in range(length)] for length in (6, 5, 3)]
    alone = [_states(model, torch.tensor([row])) for row in rows]
    expected = {name: torch.cat([states[name] for states in alone]) for name in alone[0]}
    batch = next_batch(rows, range(len(rows)), max_tokens=99, packed=True)
    own = next_batch(rows, range(len(rows)), max_tokens=99, packed=True, prefix=shared)
    prefix = SharedPrefix(shared)
    try:
        with packed_attention(model, batch.lengths.tolist()):
            packed = _states(model, batch.input_ids, batch.position_ids)
            calls = _layout.get().calls
        with packed_attention(model, [shared], keep=prefix):
            front = _states(model, torch.tensor([rows[0][:shared]]), torch.arange(shared)[None])
        with packed_attention(model, own.lengths.tolist(), prefix=prefix):
            behind = _states(model, own.input_ids, own.position_ids)
    # An architecture that cannot be packed fails in a way of its own; the padded path then serves it.
    except Exception:
        return False
    at = partial(_positions, own, shared)
    resumed = {name: torch.cat([front[name], behind[name]])[at(rows)] for name in expected}
    return calls == model.n_layers and all(
        _alike(got[name], expected[name], model.dtype) for got in (packed, resumed) for name in expected
    )


def _positions(batch: Batch, shared: int, rows: Sequence[Sequence[int]]) -> Int[np.ndarray, " token"]:
    return np.concatenate([batch.positions(i, 0, len(row)) for i, row in enumerate(rows)])


def _states(model: Model, ids: Tensor, position_ids: Tensor | None = None) -> Mapping[str, Float[Tensor, "token d"]]:
    """The residual stream after every block, of all tokens one after the other."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, hidden: Tensor) -> None:
        seen[name] = hidden.flatten(0, -2).float().cpu()

    names = model.hook_points.names(RESID_POST)
    handles = [model.hook_points.resolve(name).attach(partial(keep, name)) for name in names]
    given = {} if position_ids is None else {"position_ids": position_ids.to(model.device)}
    try:
        model.hf(input_ids=ids.to(model.device), use_cache=False, **given)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _alike(got: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    apart = (got - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    return bool(apart <= max(1e-4, 16 * torch.finfo(dtype).eps))

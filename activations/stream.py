"""The extraction loop: token ids ahead of the device, batches without padding, results one batch behind it.

What need not be computed twice is not: identical prompts, tokens that all prompts begin with, layers that a checkpoint
shares with its base.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from activations.background import ahead
from activations.batching import Pooling, fitting_tokens, length_order, next_batch
from activations.errors import MemoryLimitError, PromptError
from activations.forward import Extracted, Launched, Reader
from activations.models import Model
from activations.packing import can_pack, reach
from activations.reuse import ResidualCache
from activations.tokens import Conversation, Tokenised, tokenise

__all__ = ["Plan", "stream"]

# Prompts that are sorted by length and batched together: enough that sorting pays, few enough to begin soon.
_WINDOW = 4096

# A beginning that all prompts share is read once where it is at least this long, and this share of all tokens.
_SHARED_TOKENS, _SHARED_PART = 16, 0.2


@dataclass(frozen=True)
class Plan:
    """What to read and what to keep.

    Attributes:
        hook_points: Where.
        poolings: Written form to pooling.
        conversation: How prompts are written, and what follows them.
        max_tokens: Tokens in a batch; None for what suits the device.
        reuse: Where to find and leave the residual stream of layers that a checkpoint did not change.
    """

    hook_points: tuple[str, ...]
    poolings: Mapping[str, Pooling]
    conversation: Conversation
    max_tokens: int | None = None
    reuse: ResidualCache | None = None


@torch.inference_mode()
def stream(
    model: Model, texts: Sequence[str], plan: Plan, *, rows: Iterable[int] | None = None
) -> Iterator[dict[str, Extracted]]:
    """Extract batch by batch: pooling to what one batch gave."""
    todo = list(range(len(texts)) if rows is None else rows)
    windows = [todo[start : start + _WINDOW] for start in range(0, len(todo), _WINDOW)]
    for prompts in ahead(partial(_tokenised, model, texts, plan, window) for window in windows):
        yield from _read(model, prompts, plan)


def _read(model: Model, prompts: Mapping[int, Tokenised], plan: Plan) -> Iterator[dict[str, Extracted]]:
    """All batches of some prompts. One that does not fit into memory is tried again in halves."""
    twins = _identical(prompts)
    ids = {row: prompts[row].ids for row in twins}
    order, packs, limit = length_order(ids, ids), can_pack(model), reach(model)
    packable = [row for row in order if packs and (limit is None or len(ids[row]) <= limit)]
    shared = _shared_start([ids[row] for row in packable])
    reader = Reader(model, plan.hook_points, plan.poolings, reuse=plan.reuse, shared=shared)
    padded = len(order) - len(packable)
    budget = plan.max_tokens or fitting_tokens(model)
    flying: deque[Launched] = deque()
    done = 0
    while done < len(order):
        packed = done >= padded
        prefix = len(shared) if packed else 0
        ahead_of_us = order[done:] if packed else order[done:padded]
        batch = next_batch(ids, ahead_of_us, max_tokens=budget, packed=packed, prefix=prefix)
        try:
            flying.append(reader.launch(batch, prompts))
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            if len(batch.rows) == 1:
                raise MemoryLimitError(
                    f"prompt {batch.rows[0]} with {len(ids[batch.rows[0]]):,} tokens does not fit into memory",
                    hint="Cut long prompts (truncate_to), or use a smaller dtype or a larger device.",
                ) from error
            budget = batch.input_ids.numel() // 2
            _free_unused()
            continue
        done += len(batch.rows)
        # The next batch runs on the device while this one's result is on its way.
        if len(flying) > 1:
            yield _with_twins(flying.popleft().wait(plan.hook_points), twins)
    for launched in flying:
        yield _with_twins(launched.wait(plan.hook_points), twins)


def _identical(prompts: Mapping[int, Tokenised]) -> dict[int, list[int]]:
    """The first of each set of identical prompts to all of the set."""
    sets: dict[object, list[int]] = {}
    for row, prompt in prompts.items():
        sets.setdefault((prompt.ids.tobytes(), tuple(prompt.regions.items())), []).append(row)
    return {rows[0]: rows for rows in sets.values()}


def _with_twins(parts: Mapping[str, Extracted], twins: Mapping[int, list[int]]) -> dict[str, Extracted]:
    """The same for every prompt that is identical to one in the batch."""
    return {pooling: _repeated(part, [twins[row] for row in part.rows]) for pooling, part in parts.items()}


def _repeated(part: Extracted, rows: Sequence[Sequence[int]]) -> Extracted:
    if all(len(same) == 1 for same in rows):
        return part
    ends = np.cumsum(part.lengths)
    spans = [np.arange(end - length, end) for end, length in zip(ends, part.lengths, strict=True)]
    copies = [span for span, same in zip(spans, rows, strict=True) for _ in same]
    lengths = [length for length, same in zip(part.lengths, rows, strict=True) for _ in same]
    return Extracted(tuple(row for same in rows for row in same), lengths, part.vectors[:, np.concatenate(copies)])


def _shared_start(ids: Sequence[np.ndarray]) -> list[int]:
    """What all begin with, where reading it once pays; each keeps at least one token of its own."""
    if len(ids) < 2:
        return []
    shortest = min(map(len, ids)) - 1
    starts = np.stack([row[:shortest] for row in ids])
    differs = (starts != starts[0]).any(axis=0)
    length = int(differs.argmax()) if differs.any() else shortest
    if length < _SHARED_TOKENS or length * len(ids) < _SHARED_PART * sum(map(len, ids)):
        return []
    return [int(token) for token in starts[0, :length]]


def _tokenised(model: Model, texts: Sequence[str], plan: Plan, rows: Sequence[int]) -> dict[int, Tokenised]:
    """Some rows as the model reads them, none longer than it can."""
    asked = {pooling.region for pooling in plan.poolings.values()}
    prompts = tokenise(model.tokenizer, texts, plan.conversation, rows=rows, regions=asked)
    limit = getattr(model.hf.config.get_text_config(), "max_position_embeddings", None)
    for row, prompt in zip(rows, prompts, strict=True):
        if limit is not None and len(prompt) > limit:
            raise PromptError(
                f"prompt {row} has {len(prompt):,} tokens, expected at most {limit:,}, the positions of {model.name}",
                hint=f"Leave it out, or have it cut: truncate_to={limit}.",
            )
    return dict(zip(rows, prompts, strict=True))


# --- memory


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; torch has a class for that on GPUs alone."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _free_unused() -> None:
    """Give back what the failed pass left."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

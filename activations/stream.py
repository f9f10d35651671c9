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
from activations.packing import can_pack, reach, stretches
from activations.reuse import ResidualCache
from activations.tokens import Conversation, Tokenised, tokenise

__all__ = ["Plan", "check_readable", "stream"]

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
    padded = 0 if packs and limit is None else sum(not packs or len(ids[row]) > (limit or 0) for row in order)
    # Where the longest prompt decides the frequencies of all, those beyond the limit keep to themselves.
    apart = sum(len(ids[row]) > (limit or 0) for row in order) if stretches(model) else 0
    reader = _reader(model, plan, _shared_start([ids[row] for row in order[padded:]]))
    budget = fitting_tokens(model) if plan.max_tokens is None else plan.max_tokens
    flying: deque[Launched] = deque()
    done = 0
    while done < len(order):
        packed = done >= padded
        near = order[done : done + 1] if done < apart else order[done:] if packed else order[done:padded]
        batch = next_batch(ids, near, max_tokens=budget, packed=packed, prefix=reader.shared if packed else 0)
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


def _reader(model: Model, plan: Plan, shared: Sequence[int]) -> Reader:
    """A reader of packed batches that begin alike; where that beginning does not fit, each prompt brings its own."""
    try:
        return Reader(model, plan.hook_points, plan.poolings, reuse=plan.reuse, shared=shared)
    except (RuntimeError, MemoryError) as error:
        if not shared or not _is_out_of_memory(error):
            raise
        _free_unused()
        return Reader(model, plan.hook_points, plan.poolings, reuse=plan.reuse)


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
    """Some rows as the model reads them; whatever is wrong with one shows here, and not when its turn comes."""
    asked = {pooling.region for pooling in plan.poolings.values()}
    prompts = tokenise(model.tokenizer, texts, plan.conversation, rows=rows, regions=asked)
    for row, prompt in zip(rows, prompts, strict=True):
        check_readable(model, prompt.ids, row)
        for pooling in plan.poolings.values():
            pooling.tokens(prompt, row)
    return dict(zip(rows, prompts, strict=True))


def check_readable(model: Model, ids: Sequence[int] | np.ndarray, row: int, *, more: int = 0) -> None:
    """Check that a model can read some tokens, and write some more.

    Raises:
        PromptError: It has no such tokens, or fewer positions.
    """
    vocab = model.hf.get_input_embeddings().weight.shape[0]
    if len(ids) and not 0 <= min(ids) <= max(ids) < vocab:
        raise PromptError(
            f"prompt {row} has the token id {min(ids) if min(ids) < 0 else max(ids)}, expected 0 to {vocab - 1}",
            hint="Pass token ids of this model's tokenizer, or text.",
        )
    limit = getattr(model.hf.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and len(ids) + more > limit:
        raise PromptError(
            f"prompt {row} has {len(ids) + more:,} tokens, expected at most {limit:,}, the positions of {model.name}",
            hint=f"Leave it out, or have it cut: truncate_to={limit - more}.",
        )


# --- memory


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; torch has a class for that on GPUs alone."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _free_unused() -> None:
    """Give back what the failed pass left."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

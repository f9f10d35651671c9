"""From tokenised prompts to batches, and from the hidden states of a batch to what is kept of each prompt.

A batch is either packed (one row, prompts one behind the other, nothing wasted) or padded on the right. Both are
addressed alike: hidden states [row, token, width] are flattened to [position, width], and a prompt's tokens are
consecutive positions from its start on. Tokens that all prompts of a batch share in front may be left out of it: their
hidden states were computed once, and are positions 0 to `prefix`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self, cast, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from activations.errors import OptionError, PromptError
from activations.tokens import REGIONS, Tokenised

if TYPE_CHECKING:
    from activations.models import Model

__all__ = [
    "MAX_TOKENS",
    "Batch",
    "Pick",
    "Pooling",
    "fitting_tokens",
    "length_order",
    "next_batch",
    "pick",
    "token_batches",
]

# Tokens in a batch on a CPU. Packed batches of 512 to 2,048 take the same time within noise, 4,096 a fifth more.
MAX_TOKENS = 1024

# Token ids of each prompt, by row.
Ids = Sequence[Sequence[int]] | Mapping[int, Int[np.ndarray, " token"]]

# More tokens than this in a batch make no GPU faster, and cost memory.
_MOST = 16_384

# Vectors of d_model and of the feed-forward width that a block holds for each token at its worst.
_RESIDUAL_VECTORS, _FEED_FORWARD_VECTORS = 12, 4

Reduction = Literal["last", "mean", "max", "all"]
_REDUCTIONS: tuple[str, ...] = get_args(Reduction)
_POOLING = re.compile(rf"({'|'.join(_REDUCTIONS)})(?:@({'|'.join(REGIONS)})(?:\[(-?\d{{1,6}})?:(-?\d{{1,6}})?\])?)?")


@dataclass(frozen=True)
class Pooling:
    """What is kept of each prompt: a reduction over some of its tokens.

    Written "last", "mean@user", "all@answer[:4]": reduction, region (by default the prompt), and a slice of the region
    as Python writes it.

    Attributes:
        reduction: One vector a prompt ("last" token, "mean", "max"), or "all" tokens.
        region: One of `activations.tokens.REGIONS`.
        start: First of the region's tokens that counts, as in a slice.
        stop: The one after the last, as in a slice.
    """

    reduction: Reduction
    region: str = "prompt"
    start: int | None = None
    stop: int | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the written form.

        Raises:
            OptionError: It is not of that form.
        """
        match = _POOLING.fullmatch(str(text))
        if match is None:
            raise OptionError(
                f"unknown pooling {text!r}: expected {', '.join(_REDUCTIONS)}, alone or with a region as 'mean@user' "
                f"({', '.join(REGIONS)}) and a slice as 'all@answer[:4]'",
                hint="Pass pooling='last'.",
            )
        start, stop = (None if end is None else int(end) for end in match.group(3, 4))
        return cls(cast(Reduction, match[1]), match[2] or "prompt", start, stop)

    def tokens(self, prompt: Tokenised, row: int) -> tuple[int, int]:
        """First token kept of a prompt, and the one after the last.

        Raises:
            PromptError: None is left.
        """
        start, stop = prompt.regions[self.region]
        first, last, _ = slice(self.start, self.stop).indices(stop - start)
        if first >= last:
            raise PromptError(
                f"prompt {row} has no token at {self.region!r} to pool: the region has {stop - start}",
                hint="Give an answer or a template that has it, or pool another region.",
            )
        return (start + last - 1 if self.reduction == "last" else start + first), start + last


@dataclass(frozen=True)
class Batch:
    """Some prompts as one tensor.

    Attributes:
        input_ids: One row of all prompts' tokens where the batch is packed, else one row a prompt, padded on the right.
        starts: Position of each prompt's first token in the flattened batch.
        lengths: Tokens of each prompt in the batch.
        rows: Which prompts these are.
        packed: Whether the prompts share one row.
        prefix: Tokens at the beginning of every prompt that `input_ids` leaves out.
    """

    input_ids: Int[Tensor, "row token"]
    starts: Int[np.ndarray, " prompt"]
    lengths: Int[np.ndarray, " prompt"]
    rows: tuple[int, ...]
    packed: bool
    prefix: int = 0

    @property
    def position_ids(self) -> Int[Tensor, "row token"] | None:
        """Position of each token in its prompt where that is not its column; None in a padded batch."""
        if not self.packed:
            return None
        inside = np.arange(self.lengths.sum()) - np.repeat(self.starts, self.lengths) + self.prefix
        return torch.from_numpy(inside)[None]

    def positions(self, prompt: int, start: int, stop: int) -> Int[np.ndarray, " token"]:
        """Where the tokens from start to stop of the batch's i-th prompt lie, behind the shared prefix."""
        inside = np.arange(start, stop)
        return np.where(inside < self.prefix, inside, inside + self.starts[prompt])


@dataclass(frozen=True)
class Pick:
    """What one pooling keeps of one batch.

    Attributes:
        reduction: How each prompt's tokens become vectors.
        positions: Positions kept, prompt after prompt.
        counts: How many of each prompt.
    """

    reduction: Reduction
    positions: Int[Tensor, " position"]
    counts: list[int]

    @property
    def lengths(self) -> list[int]:
        """Vectors that each prompt ends with."""
        return self.counts if self.reduction == "all" else [1] * len(self.counts)

    def to(self, device: torch.device) -> Pick:
        """The same on another device; it is not waited for."""
        return Pick(self.reduction, self.positions.to(device, non_blocking=True), self.counts)

    def of(self, flat: Float[Tensor, "position width"]) -> Float[Tensor, "vector width"]:
        """Reduce the flattened hidden states of the batch, in float32."""
        if self.reduction in ("last", "all"):
            return flat.index_select(0, self.positions).float()
        # A shared beginning is gathered for every prompt: in parts, never more than twice what is there already.
        most = max(2 * len(flat), max(self.counts))
        parts, start, first = [], 0, 0
        while first < len(self.counts):
            ends = np.cumsum(self.counts[first:])
            count = int(np.searchsorted(ends, most, side="right"))
            stop = start + int(ends[count - 1])
            kept = flat.index_select(0, self.positions[start:stop]).float()
            sizes = torch.tensor(self.counts[first : first + count]).to(flat.device, non_blocking=True)
            parts.append(torch.segment_reduce(kept, self.reduction, lengths=sizes, unsafe=True))
            start, first = stop, first + count
        return torch.cat(parts)


def pick(batch: Batch, prompts: Mapping[int, Tokenised], pooling: Pooling) -> Pick:
    """Where a batch holds what a pooling keeps.

    Raises:
        PromptError: A prompt has no token there.
    """
    spans = [pooling.tokens(prompts[row], row) for row in batch.rows]
    positions = [batch.positions(i, *span) for i, span in enumerate(spans)]
    counts = [stop - start for start, stop in spans]
    return Pick(pooling.reduction, torch.from_numpy(np.concatenate(positions)), counts)


def fitting_tokens(model: Model) -> int:
    """A budget for one batch: what is fastest on a CPU, what fits into a third of the free memory of a GPU."""
    if model.device.type != "cuda":
        return MAX_TOKENS
    config = model.hf.config.get_text_config()
    feed_forward = getattr(config, "intermediate_size", None) or 4 * model.d_model
    vector = _RESIDUAL_VECTORS * model.d_model + _FEED_FORWARD_VECTORS * feed_forward
    unused = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    free = torch.cuda.mem_get_info(model.device)[0] + unused
    return int(min(_MOST, max(MAX_TOKENS, free / 3 / (vector * model.dtype.itemsize))))


def length_order(ids: Ids, rows: Iterable[int]) -> list[int]:
    """Longest prompts first: neighbours fit together, and a batch that is too large for the memory fails at once."""
    return sorted(rows, key=lambda row: -len(ids[row]))


def next_batch(
    ids: Ids,
    order: Sequence[int],
    *,
    max_tokens: int,
    packed: bool = False,
    prefix: int = 0,
    pad_id: int = 0,
) -> Batch:
    """The first prompts of `order` that fit into one batch, at least one.

    Args:
        ids: Token ids of each prompt, none empty.
        order: Rows in the order in which to take them, longest first.
        max_tokens: Budget, padding included.
        packed: Put them one behind the other in one row.
        prefix: Tokens at the beginning of every prompt to leave out.
        pad_id: Any id of the vocabulary: no prompt's result depends on it.
    """
    if max_tokens < 1:
        raise OptionError(f"max_tokens is {max_tokens}: expected at least 1", hint="Pass for instance 2048.")
    longest = len(ids[order[0]]) - prefix
    if packed:
        ends = np.cumsum([len(ids[row]) - prefix for row in order[: max_tokens + 1]])
        count = max(1, int(np.searchsorted(ends, max_tokens, side="right")))
    else:
        count = max(1, max_tokens // longest)
    rows = tuple(order[:count])
    lengths = np.array([len(ids[row]) - prefix for row in rows])
    tokens = np.concatenate([np.asarray(ids[row][prefix:], dtype=np.int64) for row in rows])
    if packed:
        return Batch(torch.from_numpy(tokens)[None], np.cumsum(lengths) - lengths, lengths, rows, True, prefix)
    grid = np.full((len(rows), longest), pad_id, dtype=np.int64)
    grid[np.arange(longest) < lengths[:, None]] = tokens
    return Batch(torch.from_numpy(grid), np.arange(len(rows)) * longest, lengths, rows, False, prefix)


def token_batches(
    ids: Sequence[Sequence[int]],
    *,
    rows: Iterable[int] | None = None,
    max_tokens: int = MAX_TOKENS,
    packed: bool = False,
) -> Iterator[Batch]:
    """Cut prompts into batches of at most `max_tokens`, longest prompts first; a longer prompt travels alone.

    Raises:
        OptionError: `max_tokens` is not positive.
    """
    order = length_order(ids, range(len(ids)) if rows is None else rows)
    start = 0
    while start < len(order):
        batch = next_batch(ids, order[start:], max_tokens=max_tokens, packed=packed)
        yield batch
        start += len(batch.rows)

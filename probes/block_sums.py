"""What is added up over the blocks of two tensors, each while it lies in a processor's cache."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from probes.pairs import Block

__all__ = ["ROUNDINGS", "BlockMeasure", "Sums", "Wide", "as_float"]

ROUNDINGS = (torch.bfloat16, torch.float16)
"""Formats that a cast may have rounded to."""

# Elements that are added in float32.
_TOGETHER = 2**12
# Numbers that are compared first.
_HEAD = 512


@dataclass
class Sums:
    """What is added up, block by block."""

    base: float = 0.0
    change: float = 0.0
    changed: int = 0
    increased: int = 0
    largest: float = 0.0
    rows: int = 0
    touched: np.ndarray | None = None
    row_squares: list[np.ndarray] = field(default_factory=list)
    base_row_squares: list[np.ndarray] = field(default_factory=list)

    def take(self, part: Sums) -> None:
        """Add those of the next block."""
        self.base += part.base
        self.change += part.change
        self.changed += part.changed
        self.increased += part.increased
        self.largest = max(self.largest, part.largest)
        self.rows += part.rows
        if part.touched is not None:
            self.touched = part.touched if self.touched is None else np.asarray(self.touched | part.touched)
        self.row_squares += part.row_squares
        self.base_row_squares += part.base_row_squares


@dataclass(frozen=True)
class BlockMeasure:
    """What is measured of every block.

    Attributes:
        casts: Formats that every block so far may have been rounded to.
    """

    wide: Wide
    table: bool
    base_known: bool
    casts: set[torch.dtype] = field(default_factory=lambda: set(ROUNDINGS))

    def measured(self, before: Block, after: Block) -> Sums:
        """The sums of one block; called on several threads."""
        sums, equal = Sums(), _same_bytes(before, after)
        for kind in tuple(self.casts):
            if not (equal and before.values.dtype == kind) and not _is_cast(before.values, after.values, kind):
                self.casts.discard(kind)
        own = zeros = np.zeros(before.values.shape[0])
        # Sums that leave float32's range are noticed and made again from scaled numbers.
        with np.errstate(all="ignore"):
            if not (equal and self.base_known):
                whole = self.wide(before.values, 0)
                if self.table or not self.base_known:
                    own = _row_squares(whole)
                    sums.base = float(own.sum())
            if equal:
                sums.row_squares.append(zeros)
            elif self.wide.on_cpu:
                _add_change(sums, self.wide.difference(after.values, whole).numpy(), self.wide)
            else:
                _add_there(sums, self.wide.difference(after.values, whole))
        if self.table:
            sums.base_row_squares.append(own)
        return sums


def _add_change(sums: Sums, change: np.ndarray, wide: Wide) -> None:
    """On a processor: numpy compares and counts six times as fast there as torch."""
    squares = _row_squares(change)
    sums.change = float(squares.sum())
    sums.row_squares.append(squares)
    if change.size:
        sums.largest = max(-float(change.min()), float(change.max()))
    mask = wide.mask(change.shape)
    columns = _count_columns(np.greater(change, 0, out=mask))
    sums.increased = int(columns.sum())
    columns = _count_columns(np.not_equal(change, 0, out=mask))
    sums.changed, sums.touched = int(columns.sum()), columns > 0
    # Squares of small numbers vanish.
    sums.rows = int(np.count_nonzero(squares))
    if sums.rows < len(squares):
        sums.rows += int(np.count_nonzero(mask[squares == 0].any(axis=1)))


def _add_there(sums: Sums, change: Tensor) -> None:
    """The same on another device."""
    squares = _row_squares(change)
    sums.change = float(squares.sum())
    sums.row_squares.append(squares)
    if change.numel():
        sums.largest = float(change.abs().max())
    moved = change != 0
    sums.changed, sums.increased = int(moved.sum()), int((change > 0).sum())
    sums.touched, sums.rows = moved.any(0).cpu().numpy(), int(moved.any(1).sum())


def _count_columns(mask: np.ndarray) -> np.ndarray:
    """How often each column is true. Few enough rows are added as bytes, which costs what counting all at once does."""
    return np.asarray(np.add.reduce(mask.view(np.uint8), axis=0, dtype=np.uint8 if len(mask) < 256 else np.int64))


def as_float(block: Tensor, device: str | torch.device, scale: float) -> Tensor:
    """Fresh float32, scaled, on a device."""
    made: Tensor = block.to(device=torch.device(device), dtype=torch.float32)
    if scale != 1:
        made = made * scale
    return made


def _is_cast(before: Tensor, after: Tensor, kind: torch.dtype) -> bool:
    """Whether `after` is `before` rounded to a format."""
    # The first row refutes nearly all; casting whole blocks costs as much as everything else.
    return all(
        torch.equal(before[rows].to(kind).to(torch.float32), after[rows].to(torch.float32))
        for rows in (slice(0, 1), slice(None))
    )


class Wide:
    """Blocks in float32 and scaled; on a processor in memory that is used again, for fresh memory costs as much."""

    def __init__(self, device: str | torch.device, scale: float, scratch: threading.local) -> None:
        self.device, self.scale, self._scratch = torch.device(device), scale, scratch
        self.on_cpu = self.device.type == "cpu"

    def __call__(self, block: Tensor, place: int) -> Tensor:
        """The block, until the next one of the same place on this thread."""
        if not self.on_cpu:
            return as_float(block, self.device, self.scale)
        if self._as_it_is(block):
            return block
        made = self._memory(str(place), tuple(block.shape), torch.float32).copy_(block)
        return made if self.scale == 1 else made.mul_(self.scale)

    def difference(self, after: Tensor, before: Tensor) -> Tensor:
        """`after` minus what was made wide of the base."""
        if not self.on_cpu:
            return self(after, 1).sub_(before)
        made = self._memory("1", tuple(after.shape), torch.float32)
        # Torch converts faster, numpy subtracts faster.
        np.subtract(self(after, 1).numpy(), before.numpy(), out=made.numpy())
        return made

    def mask(self, shape: tuple[int, ...]) -> np.ndarray:
        """Memory for truth values."""
        return np.asarray(self._memory("mask", shape, torch.bool).numpy())

    def _as_it_is(self, block: Tensor) -> bool:
        return block.dtype == torch.float32 and self.scale == 1 and block.is_contiguous()

    def _memory(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        views: dict[tuple[int, ...], Tensor] = self._scratch.__dict__.setdefault(name, {})
        if shape not in views:
            flat = views.get(())
            if flat is None or len(flat) < math.prod(shape):
                views.clear()
                flat = views[()] = torch.empty(math.prod(shape), dtype=dtype)
            views[shape] = flat[: math.prod(shape)].view(shape)
        return views[shape]


def _row_squares(block: Tensor | np.ndarray) -> np.ndarray:
    """Sum of squares of each row: of some thousand elements in float32, of those sums in float64."""
    if isinstance(block, Tensor):
        if block.device.type != "cpu":
            return np.asarray(block.double().square().sum(1).cpu().numpy())
        block = block.numpy()
    columns = block.shape[1]
    if columns <= _TOGETHER:
        return np.asarray(np.vecdot(block, block).astype(np.float64))
    whole = columns - columns % _TOGETHER
    parts, rest = block[:, :whole].reshape(len(block), -1, _TOGETHER), block[:, whole:]
    return np.asarray(np.vecdot(parts, parts).sum(axis=1, dtype=np.float64) + np.vecdot(rest, rest))


def _same_bytes(before: Block, after: Block) -> bool:
    """Equal bit for bit, so that NaN equals itself and 0 differs from -0."""
    if before.values.dtype != after.values.dtype:
        return False
    one, other = before.raw, after.raw
    return np.array_equal(one[:_HEAD], other[:_HEAD]) and np.array_equal(one, other)

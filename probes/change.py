"""What happened to one tensor: how far it moved, where, along how many directions, and what can explain it.

One pass over blocks of rows in a processor's cache; more over those tensors alone that changed, for the spectrum. The
differences are never in memory whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from probes.block_sums import ROUNDINGS, BlockMeasure, Sums, Wide, as_float
from probes.pairs import Pair
from probes.spectra import Spectrum, dense_spectrum, sketched_spectrum

__all__ = ["SPECTRUM", "Change", "Row", "measure_change"]

SPECTRUM = 8
"""Singular values that are kept."""

# Rows of a table that are named, the most moved first.
_MOST_ROWS = 64
# Rows and columns of the corner that a low rank is guessed from: its decomposition takes milliseconds.
_CORNER = 192
# A rank is called low below this share of the smaller side, and below what the corner can tell from full.
_LOW, _MOST_RANK = 4, 128
# Energy that a low-rank explanation may leave, in rounding errors of the coarser format (uniform within half a unit in
# the last place: eps^2 / 12 of the energy, an overestimate by about two), and the share that it must explain.
_ROUNDED, _EXPLAINED = 2.0, 0.5
# Float32 sums and products leave this share of the energy, and values down to this share of the largest.
_NUMERIC, _NUMERIC_VALUE = 1e-5, 1e-5
# The largest singular value of pure noise, s (sqrt m + sqrt n), is exceeded by this factor with no chance.
_ABOVE_NOISE = 1.1
# Squares of float32 leave its range above 1.8e19 and below 1e-19; powers of two rescale without rounding.
_SMALLER, _LARGER = 2.0**-90, 2.0**90
_TINY = 1e-30
# Elements at a time for another device than a processor, and for products with many columns.
_DEVICE_BLOCK, _PRODUCT_BLOCK = 2**22, 2**20


@dataclass(frozen=True)
class Row:
    """One row of a table that moved: of an embedding or unembedding, one token.

    Attributes:
        row: Its number in the base.
        norm: Of its difference.
        base_norm: Of the base's row.
    """

    row: int
    norm: float
    base_norm: float


@dataclass(frozen=True)
class Change:
    """Numbers of one tensor's change; see `TensorDiff`, which carries them."""

    norm: float
    base_norm: float
    spectrum: tuple[float, ...] = ()
    effective_rank: float = 0.0
    low_rank: int | None = None
    changed: int = 0
    increased: int = 0
    largest: float = 0.0
    rows_changed: int = 0
    columns_changed: int = 0
    rounding: str = ""
    rows: tuple[Row, ...] = ()


def measure_change(
    pair: Pair,
    check: Callable[[Tensor], None],
    *,
    spectrum: bool = True,
    vector: bool = False,
    table: bool = False,
    base_norm: float | None = None,
    device: str | torch.device = "cpu",
) -> Change:
    """Measure how a tensor changed.

    Args:
        pair: Just begun to be read.
        check: Refuses weights that are no numbers, with an error.
        spectrum: Whether to look for singular values, which costs up to 14 products with 40 columns.
        vector: The one row is a vector: its spectrum is its norm.
        table: Rows mean something: name those that moved most.
        base_norm: Of the base's rows that are compared, where it is known: equal bytes then only cost a comparison.
        device: Where to compute.
    """
    blocks = BlockMeasure(Wide(device, 1.0, pair.scratch), table=table, base_known=base_norm is not None)
    sums, scale = _added_up(pair, blocks), 1.0
    if base_norm is None:
        base_norm = math.sqrt(sums.base) if math.isfinite(sums.base) else math.inf
    if not math.isfinite(sums.base + sums.change) or (sums.changed and sums.change < _TINY):
        for _, _, after in pair.blocks():
            check(after.to(torch.float32))
        scale = _SMALLER if sums.change >= _TINY or not math.isfinite(sums.change) else _LARGER
        sums = _added_up(pair, replace(blocks, wide=Wide(device, scale, pair.scratch), base_known=False))
        # Scaled down for a fine-tune's sake the base's own small numbers vanish.
        base_norm = base_norm if math.isfinite(base_norm) else math.sqrt(sums.base) / scale
    if not sums.changed:
        return Change(0.0, base_norm)
    rounding = _rounding(blocks.casts, pair.after.dtype)
    found = _pattern(Change(math.sqrt(sums.change) / scale, base_norm, rounding=rounding), sums, scale)
    if vector:
        return replace(found, spectrum=(found.norm,), effective_rank=1.0)
    return _with_spectrum(found, pair, device) if spectrum and 0 < found.norm < math.inf else found


def _added_up(pair: Pair, blocks: BlockMeasure) -> Sums:
    sums = Sums()
    for part in pair.each(blocks.measured, size=None if blocks.wide.on_cpu else _DEVICE_BLOCK):
        sums.take(part)
    return sums


def _pattern(found: Change, sums: Sums, scale: float) -> Change:
    squares = np.concatenate(sums.row_squares)
    rows = tuple[Row, ...]()
    if sums.base_row_squares:
        most = np.argsort(-squares, kind="stable")[: min(_MOST_ROWS, np.count_nonzero(squares))].tolist()
        own = np.concatenate(sums.base_row_squares)
        rows = tuple(Row(row, math.sqrt(squares[row]) / scale, math.sqrt(own[row]) / scale) for row in most)
    return replace(
        found,
        changed=sums.changed,
        increased=sums.increased,
        largest=sums.largest / scale,
        rows_changed=sums.rows,
        columns_changed=0 if sums.touched is None else int(np.count_nonzero(sums.touched)),
        rows=rows,
    )


def _rounding(casts: set[torch.dtype], stored: torch.dtype) -> str:
    """The format whose rounding of the base is the fine-tune, where that is all that happened; its own if it can be."""
    kinds = sorted(casts, key=lambda kind: (kind != stored, ROUNDINGS.index(kind)))
    return str(kinds[0]).removeprefix("torch.") if kinds else ""


def _with_spectrum(found: Change, pair: Pair, device: str | torch.device) -> Change:
    # To a norm of about one, so that no product leaves float32's range.
    scale = 2.0 ** -max(-120, min(120, round(math.log2(found.norm))))
    matrix = _Difference(pair, scale, device)
    norm, noise = found.norm * scale, _rounding_energy(found, pair) * scale**2
    count = max(SPECTRUM, matrix.likely_rank(noise) + SPECTRUM)
    spectrum = matrix.spectrum(count)
    values = spectrum.values
    rank = _low_rank(values, norm**2, noise, pair.shape)
    effective = norm**4 / spectrum.fourth_powers if spectrum.fourth_powers > 0 else 1.0
    kept = tuple((values[:SPECTRUM] / scale).tolist())
    return replace(found, spectrum=kept, effective_rank=max(1.0, effective), low_rank=rank)


def _rounding_energy(found: Change, pair: Pair) -> float:
    """Energy of the errors that storing both tensors in their formats has made, from above."""
    formats = [side.dtype if side.dtype.is_floating_point else torch.float32 for side in (pair.before, pair.after)]
    eps = max(torch.finfo(kind).eps for kind in (*formats, torch.float32))
    return eps**2 / 12 * (found.base_norm**2 + found.norm**2)


def _low_rank(values: Tensor, energy: float, noise: float, shape: tuple[int, int]) -> int | None:
    """Rank of a product that explains the change to within rounding; None where none does.

    It is the least that leaves no more energy than rounding makes, and no value above the edge of noise of that energy.
    """
    most = min(min(shape) // _LOW, _MOST_RANK, len(values) - 1)
    left = energy
    for rank, value in enumerate(values[: most + 1].tolist()):
        sides = [math.sqrt(side - rank) for side in shape]
        # What is left of a float32 sum may be less than there is; a half of the budget is what rounding makes.
        edge = _ABOVE_NOISE * math.sqrt(max(left, noise / 2)) / math.prod(sides) * sum(sides)
        if left <= _ROUNDED * noise + _NUMERIC * energy and value <= max(edge, _NUMERIC_VALUE * float(values[0])):
            return rank if rank and energy - left >= _EXPLAINED * energy else None
        left -= value**2
    return None


@dataclass(frozen=True)
class _Difference:
    """after - before as a matrix that is only multiplied, block by block."""

    pair: Pair
    scale: float
    device: str | torch.device

    def spectrum(self, count: int) -> Spectrum:
        """The largest singular values; exact and all of them where the matrix is small."""
        if min(self.pair.shape) <= SMALL:
            return dense_spectrum(torch.cat([block.clone() for _, block in self._blocks()]), count=count)
        return sketched_spectrum(self._product, self.pair.shape[1], count=count, device=torch.device(self.device))

    def likely_rank(self, noise: float) -> int:
        """How many directions a random corner shows above rounding; 0 where it shows too many for a low rank."""
        rows, columns = self.pair.shape
        if min(rows, columns) <= SMALL:
            return 0
        rng = np.random.default_rng(0)
        chosen = torch.from_numpy(np.sort(rng.permutation(rows)[:_CORNER]))
        across = torch.from_numpy(np.sort(rng.permutation(columns)[:_CORNER]))
        ours, theirs = (chosen, chosen) if self.pair.rows is None else self.pair.rows[:, chosen]
        one, other = self.pair.held()
        before, after = one[ours][:, across], other[theirs][:, across]
        corner = as_float(after, "cpu", self.scale) - as_float(before, "cpu", self.scale)
        values = torch.linalg.svdvals(corner)
        spread = math.sqrt(noise / (rows * columns))
        edge = max(_ABOVE_NOISE * spread * 2 * math.sqrt(_CORNER), _NUMERIC_VALUE * float(values[0]))
        rank = int((values > edge).sum())
        return rank if rank <= _MOST_RANK else 0

    def _product(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.empty(self.pair.shape[0], x.shape[1], device=x.device)
        z = torch.zeros_like(x)
        for place, block in self._blocks():
            y[place] = block @ x
            z += block.T @ y[place]
        return y, z

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Each block is good until the next one."""
        wide = Wide(self.device, self.scale, self.pair.scratch)
        for place, before, after in self.pair.blocks(size=_PRODUCT_BLOCK):
            yield place, wide.difference(after, wide(before, 0))


SMALL = 128
"""Matrices with a side up to this are decomposed exactly."""

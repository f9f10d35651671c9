"""Quantised weights, read as the values they stand for, some rows at a time.

Every format is a table of values, a code for each element, and a scale (and a zero) for each block of elements:
value = (table[code] - zero) * scale, in float32. What is stored where is the business of `packed_formats`. Codes,
scales and zeros are bytes from strangers: what they may hold is checked when they are read. No loader's code is run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from activations.errors import CheckpointError, CorruptFileError, NonFiniteError, printable
from activations.tensors import TensorInfo, read_tensor
from activations.untrusted import DAMAGED

__all__ = [
    "ARITHMETIC",
    "FLOATS",
    "Codes",
    "FlatScales",
    "QuantisedTensor",
    "Scales",
    "StoredTensors",
    "UnreadError",
    "borders",
    "byte_table",
]

FLOATS = ("F64", "F32", "F16", "BF16")
"""Dtypes that scales may have."""
ARITHMETIC = 2.0**-8
"""Share of a value by which quantisers that compute in bfloat16 may miss it: twice that format's rounding."""

# Elements that are decoded at a time.
_BLOCK = 2**20
# A value at the border of its code may have been rounded either way, in this share of the step.
_BORDER = 1e-3


class Scales(NamedTuple):
    """Numbers for blocks of a matrix of `height` x `width` elements; rows start afresh after `period` rows."""

    values: Tensor
    height: int
    width: int | Tensor
    period: int
    columns: int

    def rows(self, start: int, stop: int) -> Tensor:
        """What belongs to rows, [row, column] or [row, 1]."""
        row, per_period = torch.arange(start, stop), -(-self.period // self.height)
        chosen = self.values[row // self.period * per_period + row % self.period // self.height]
        if isinstance(self.width, Tensor):
            return chosen[:, self.width]
        if chosen.shape[1] == 1:
            return chosen
        return chosen.repeat_interleave(self.width, 1)[:, : self.columns]


class FlatScales(NamedTuple):
    """Numbers for runs of `size` elements, row after row."""

    values: Tensor
    size: int
    columns: int

    def rows(self, start: int, stop: int) -> Tensor:
        """What belongs to rows, [row, column]."""
        first, last = start * self.columns, stop * self.columns
        part = self.values[first // self.size : -(-last // self.size)].repeat_interleave(self.size)
        skipped = first % self.size
        return part[skipped : skipped + last - first].view(-1, self.columns)


@dataclass(frozen=True)
class Codes:
    """A quantised matrix whose bytes are in memory."""

    code: Callable[[int, int], Tensor]
    table: Tensor
    scales: Scales | FlatScales
    zeros: Scales | None = None
    # Scales that are themselves quantised come from the unrounded matrix: None where they cannot have.
    scales_from: Callable[[Tensor], FlatScales | None] | None = None

    def values(self, start: int, stop: int) -> Tensor:
        """Values of rows, float32 [row, column]."""
        return self._at(self.table, start, stop, self.scales)

    def rounds(self, before: Tensor, start: int, stop: int, scales: Scales | FlatScales) -> bool:
        """Whether rows are those of `before`, each rounded to the nearest value that the format has."""
        ours = before[start:stop].to(torch.float32)
        room = ours.abs() * ARITHMETIC
        low, high = (self._at(side, start, stop, scales) for side in borders(self.table))
        return bool(((ours >= low - room) & (ours <= high + room)).all())

    def _at(self, table: Tensor, start: int, stop: int, scales: Scales | FlatScales) -> Tensor:
        code = self.code(start, stop)
        found = table.index_select(0, code.reshape(-1).int()).view(code.shape)
        if self.zeros is not None:
            found -= self.zeros.rows(start, stop)
        return found.mul_(scales.rows(start, stop))


@dataclass(frozen=True, eq=False)
class QuantisedTensor:
    """A weight that lies quantised in several tensors of a file, checked by its headers.

    Attributes:
        name: The weight's name, as the base has it.
        shape: Its shape when it is dequantised.
        how: Its format, in words ("nf4, blocks of 64").
        maker: Whose layout it is ("bitsandbytes").
        parts: The tensors that it is stored in, by their role.
    """

    name: str
    shape: tuple[int, ...]
    how: str
    maker: str
    parts: Mapping[str, TensorInfo] = field(repr=False)
    _decode: Callable[[Mapping[str, Tensor]], Codes] = field(repr=False)

    dtype: ClassVar[str] = "F32"

    @property
    def nbytes(self) -> int:
        """Bytes that its values take in float32."""
        return 4 * math.prod(self.shape)

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Its values as a matrix [row, column], float32: some rows at a time, each with the row after its last.

        More than two dimensions keep the last as columns. Memory: the stored tensors, and some megabytes.

        Raises:
            CorruptFileError: A file has changed since it was opened, or codes or scales break the format.
            NonFiniteError: A scale is NaN or infinite.
        """
        rows = self.opened()
        for start, stop in self._spans():
            yield stop, rows(start, stop)

    def opened(self) -> Callable[[int, int], Tensor]:
        """A reader of rows from one number up to another, float32 [row, column], good on any number of threads.

        Memory: the stored tensors.

        Raises:
            CheckpointError: As for `blocks`.
        """
        return self._codes().values

    def read(self) -> Tensor:
        """All of its values, float32.

        Raises:
            CheckpointError: As for `blocks`, or it does not fit into memory.
        """
        try:
            whole = torch.empty(self.shape)
        except (RuntimeError, MemoryError):
            message = f"the weight '{printable(self.name)}' of {self.nbytes:,} bytes does not fit into memory"
            raise CheckpointError(message, path=self._file, hint="Scan it on a machine with more memory.") from None
        matrix, start = whole.view(-1, self.shape[-1]), 0
        for stop, rows in self.blocks():
            matrix[start:stop] = rows
            start = stop
        return whole

    def rounds(self, before: Tensor) -> bool:
        """Whether it is a matrix rounded to its format and nothing else, to within bfloat16's rounding.

        Args:
            before: The unrounded matrix [row, column], of any float dtype.

        Raises:
            CheckpointError: As for `blocks`.
        """
        codes = self._codes()
        # The first row refutes nearly all.
        if codes.scales_from is None and not codes.rounds(before, 0, 1, codes.scales):
            return False
        scales = codes.scales if codes.scales_from is None else codes.scales_from(before)
        return scales is not None and all(codes.rounds(before, *span, scales) for span in self._spans())

    @property
    def _file(self) -> Path:
        return next(iter(self.parts.values())).file

    def _spans(self) -> Iterator[tuple[int, int]]:
        rows, step = math.prod(self.shape[:-1]), max(8, _BLOCK // self.shape[-1] // 8 * 8)
        return ((start, min(start + step, rows)) for start in range(0, rows, step))

    def _codes(self) -> Codes:
        tensors = {role: read_tensor(info) for role, info in self.parts.items()}
        for role, tensor in tensors.items():
            if role != "codes" and tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
                message = f"the tensor '{printable(self.parts[role].name)}' of scales holds NaN or infinite values"
                raise NonFiniteError(message, path=self._file, hint="Ask its author: such a model cannot run.")
        return self._decode(tensors)


class UnreadError(Exception):
    """A format that is not read."""


@dataclass(frozen=True)
class StoredTensors:
    """A checkpoint's tensors as its files hold them, and what the configuration says of their format.

    Attributes:
        tensors: Every tensor by name.
        settings: The `quantization_config`.
        path: The checkpoint, for errors.
        beside: Names of tensors that say how others are stored, and are no weights; filled while these are found.
    """

    tensors: Mapping[str, TensorInfo]
    settings: Mapping[str, object]
    path: Path
    beside: set[str] = field(default_factory=set)

    def refuse(self, message: str) -> NoReturn:
        """Raise the error for a checkpoint that breaks its format."""
        raise CorruptFileError(message, path=self.path, hint=DAMAGED)

    def part(self, name: str, *dtypes: str) -> TensorInfo:
        """A tensor that must be there, of one of these dtypes."""
        info = self.tensors.get(name)
        if info is None:
            self.refuse(f"a quantised weight lacks a part: there is no tensor '{printable(name)}'")
        if dtypes and info.dtype not in dtypes:
            self.refuse(f"'{printable(name)}' has the dtype {info.dtype}, expected {' or '.join(dtypes)}")
        return info

    def expect(self, info: TensorInfo, *shapes: tuple[int, ...]) -> None:
        """Refuse a tensor of another shape."""
        if info.shape not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
            self.refuse(f"'{printable(info.name)}' has the shape {list(info.shape)}, expected {wanted}")

    def matrix(self, info: TensorInfo) -> tuple[int, int]:
        """Rows and columns of what must be a matrix."""
        if len(info.shape) != 2 or not all(info.shape):
            self.refuse(f"'{printable(info.name)}' has the shape {list(info.shape)}, expected a matrix")
        return info.shape[0], info.shape[1]


def borders(table: Tensor) -> tuple[Tensor, Tensor]:
    """Between which numbers each value of a table is the nearest one; NaN for a value that is none."""
    values = torch.from_numpy(np.unique(table[table.isfinite()].numpy()))
    gaps = values.diff() * (0.5 + _BORDER)
    # Beyond the ends half of the last step: farther out a number was clipped, which is more than rounding.
    below, above = torch.cat([gaps[:1], gaps]), torch.cat([gaps, gaps[-1:]])
    place = torch.searchsorted(values, table.nan_to_num(float(values[0]))).clamp(max=len(values) - 1)
    return table - below[place], table + above[place]


def byte_table(dtype: torch.dtype) -> Tensor:
    """What each byte stands for."""
    return torch.arange(256).to(torch.uint8).view(dtype).float()

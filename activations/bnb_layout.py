"""Weights that bitsandbytes packed: int8 with a scale for each row, and 4-bit codes in blocks (nf4, fp4).

A 4-bit weight lies in its packed codes, its `quant_state` (JSON in bytes), the scales of its blocks and a table of 16
values; the scales may be quantised again (Dettmers et al. 2023, arXiv:2305.14314). All of it is a stranger's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from activations.errors import printable
from activations.quantised import (
    ARITHMETIC,
    FLOATS,
    Codes,
    FlatScales,
    QuantisedTensor,
    Scales,
    StoredTensors,
    UnreadError,
    borders,
    byte_table,
)
from activations.tensors import TensorInfo, read_tensor
from activations.untrusted import JsonLimits, parse_json

__all__ = ["STATE", "eight_bit", "four_bit"]

STATE = ".quant_state.bitsandbytes__"
"""What follows a weight's name in that of its `quant_state`; "nf4" or "fp4" follows."""

_LIMITS = JsonLimits(size=2**14, depth=4, items=64)
_BLOCK_SIZES = tuple(2**power for power in range(5, 13))
# Loaders' kernels have these values built in (appendix E there) and ignore those of the file.
_NF4 = """-1 -0.6961928 -0.5250731 -0.3949175 -0.2844414 -0.1847734 -0.0910500 0
    0.0795803 0.1609302 0.2461123 0.3379152 0.4407098 0.5626170 0.7229568 1"""
_TABLES = {
    "nf4": tuple(map(float, _NF4.split())),
    "fp4": tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
}
_TABLE_TOLERANCE = 1e-4


def eight_bit(stored: StoredTensors, stem: str) -> QuantisedTensor:
    """An int8 weight of a module.

    Raises:
        CorruptFileError: A part is missing or has another shape.
        UnreadError: Its rows are in the order of one kind of GPU.
    """
    info, scale = stored.part(f"{stem}.weight", "I8"), stored.part(f"{stem}.SCB", "F32")
    rows, columns = stored.matrix(info)
    stored.expect(scale, (rows,))
    if f"{stem}.weight_format" in stored.tensors:
        order = stored.part(f"{stem}.weight_format", "U8")
        if order.nbytes != 1 or int(read_tensor(order)):
            raise UnreadError(f"'{printable(info.name)}' is int8 of bitsandbytes in an order for one kind of GPU")
        stored.beside.add(order.name)

    def decode(tensors: Mapping[str, Tensor]) -> Codes:
        codes = tensors["codes"].view(torch.uint8)
        scales = Scales(tensors["scale"].view(-1, 1) / 127, 1, columns, rows, columns)
        return Codes(lambda start, stop: codes[start:stop], byte_table(torch.int8), scales)

    parts = {"codes": info, "scale": scale}
    return QuantisedTensor(info.name, info.shape, "int8, one scale a row", "bitsandbytes", parts, decode)


def four_bit(stored: StoredTensors, name: str) -> QuantisedTensor:
    """The 4-bit weight whose `quant_state` has this name.

    Raises:
        CorruptFileError: A part is missing, contradicts another, or has an impossible size.
    """
    weight, _, kind = name.partition(STATE)
    state = _state(stored, stored.tensors[name], kind)
    stored.beside.add(name)
    shape, runs = state.shape, -(-math.prod(state.shape) // state.size)
    parts = {"codes": stored.part(weight), "absmax": stored.part(f"{weight}.absmax", *FLOATS, "U8")}
    if parts["codes"].nbytes != -(-math.prod(shape) // 2):
        stored.refuse(f"'{printable(weight)}' has {parts['codes'].nbytes:,} bytes, but is said to hold {list(shape)}")
    parts["quant_map"] = stored.part(f"{weight}.quant_map", *FLOATS)
    stored.expect(parts["quant_map"], (16,))
    stored.expect(parts["absmax"], (runs,), (runs, 1), (1, runs))
    nested = parts["absmax"].dtype == "U8"
    if nested:
        parts["nested_absmax"] = stored.part(f"{weight}.nested_absmax", *FLOATS)
        parts["nested_quant_map"] = stored.part(f"{weight}.nested_quant_map", *FLOATS)
        stored.expect(parts["nested_absmax"], (-(-runs // state.nested_size),))
        stored.expect(parts["nested_quant_map"], (256,))

    def decode(tensors: Mapping[str, Tensor]) -> Codes:
        table = tensors["quant_map"].float()
        if not torch.allclose(table, torch.tensor(_TABLES[kind]).float(), rtol=0, atol=_TABLE_TOLERANCE):
            stored.refuse(f"'{printable(weight)}.quant_map' is not that of {kind}: loaders differ in which they take")
        absmax = _Nested(tensors, state) if nested else None
        scales = absmax.values() if absmax else tensors["absmax"].float().view(-1)
        codes = _Nibbles(tensors["codes"].contiguous().view(-1).view(torch.uint8), shape[-1])
        flat = FlatScales(scales, state.size, shape[-1])
        return Codes(codes.rows, table, flat, None, absmax.of if absmax else None)

    return QuantisedTensor(weight, shape, f"{kind}, blocks of {state.size}", "bitsandbytes", parts, decode)


def _state(stored: StoredTensors, info: TensorInfo, kind: str) -> _State:
    if kind not in _TABLES or info.dtype != "U8" or info.nbytes > _LIMITS.size:
        stored.refuse(f"'{printable(info.name)}' is no quant_state: expected some bytes of JSON, of nf4 or fp4")
    state = parse_json(bytes(read_tensor(info).tolist()), info.file, limits=_LIMITS)
    if not isinstance(state, dict) or state.get("quant_type") != kind:
        stored.refuse(f"'{printable(info.name)}' should be a JSON object of quant_type {kind}")
    shape, sizes = state.get("shape"), [state.get("blocksize"), state.get("nested_blocksize", 256)]
    if not (isinstance(shape, list) and 1 <= len(shape) <= 4 and all(type(n) is int and 0 < n < 2**40 for n in shape)):
        got = printable(repr(shape), limit=80)
        stored.refuse(f"'{printable(info.name)}' says the shape {got}, expected that of a matrix")
    chosen = [size for size in sizes if type(size) is int and size in _BLOCK_SIZES]
    if len(chosen) < len(sizes):
        got = printable(f"{sizes[0]!r} and {sizes[1]!r}", limit=80)
        stored.refuse(f"'{printable(info.name)}' says blocks of {got}: expected powers of two from 32 to 4096")
    offset = state.get("nested_offset", 0.0)
    if not isinstance(offset, int | float) or not abs(offset) < 1e30:
        got = printable(repr(offset), limit=80)
        stored.refuse(f"'{printable(info.name)}' says the offset {got}, expected a number")
    return _State(tuple(shape), chosen[0], chosen[1], float(offset))


class _State(NamedTuple):
    shape: tuple[int, ...]
    size: int
    nested_size: int
    offset: float


class _Nibbles(NamedTuple):
    """Two codes in each byte, the first in the upper half."""

    packed: Tensor
    columns: int

    def rows(self, start: int, stop: int) -> Tensor:
        first, last = start * self.columns, stop * self.columns
        part = self.packed[first // 2 : -(-last // 2)]
        both = torch.stack((part >> 4, part & 15), 1).view(-1)
        return both[first % 2 : first % 2 + last - first].view(-1, self.columns)


class _Nested(NamedTuple):
    """Scales that are themselves quantised to 8 bits."""

    tensors: Mapping[str, Tensor]
    state: _State

    def values(self) -> Tensor:
        return self._at(self.tensors["nested_quant_map"].float())

    def of(self, before: Tensor) -> FlatScales | None:
        """The scales of an unrounded matrix; None where these here are not those rounded."""
        size, flat = self.state.size, before.reshape(-1)
        parts = [flat[start : start + 2**20].float().abs() for start in range(0, len(flat), 2**20)]
        own = torch.cat([nn.functional.pad(part, (0, -len(part) % size)).view(-1, size).amax(1) for part in parts])
        low, high = (self._at(side) for side in borders(self.tensors["nested_quant_map"].float()))
        room = own * ARITHMETIC
        return (
            FlatScales(own, size, before.shape[1]) if bool(((own >= low - room) & (own <= high + room)).all()) else None
        )

    def _at(self, table: Tensor) -> Tensor:
        code = self.tensors["absmax"].view(-1)
        scales = self.tensors["nested_absmax"].float().repeat_interleave(self.state.nested_size)[: len(code)]
        return table[code.int()] * scales + self.state.offset

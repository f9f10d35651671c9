"""Where quantised weights lie in safetensors files: fp8 and int8 with scales, bitsandbytes, GPTQ, AWQ.

What belongs together is found by names and checked by shapes at opening; of a configuration only sizes and names of
formats are looked at. Where loaders disagree about the values, or a part is missing, the checkpoint is refused; a
format that is not read is named.

Layouts: compressed-tensors, DeepSeek-V3 for fp8 in blocks (arXiv:2412.19437), GPTQ and AWQ as AutoGPTQ and AutoAWQ
store them (arXiv:2210.17323, arXiv:2306.00978).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from activations.bnb_layout import STATE, eight_bit, four_bit
from activations.errors import CheckpointError, printable
from activations.quantised import FLOATS, Codes, QuantisedTensor, Scales, StoredTensors, UnreadError, byte_table
from activations.tensors import DTYPES, TensorInfo, read_tensor

__all__ = ["Contents", "contents_of"]

_FP8 = {
    name: f"fp8 {torch_name.removeprefix('float8_')}"
    for name, (_, torch_name) in DTYPES.items()
    if name.startswith("F8")
}
# Bits that a word of AWQ is shifted by for its columns in order.
_AWQ_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)
# Scales of activations: they change how a loader computes, not what the weights are.
_ACTIVATIONS = tuple(
    f".{name}"
    for name in (
        *("input_scale", "input_scale_ub", "input_zero_point", "input_global_scale", "activation_scale"),
        *("output_scale", "output_zero_point", "q_scale", "k_scale", "v_scale"),
    )
)
# Names by which formats are known that are not read.
_UNREAD = {
    "_blocks": "mxfp4",
    ".B": "Marlin",
    ".W_q": "HQQ",
    ".weight._data": "quanto",
    ".weight:_data": "torchao",
    ".q_weight": "EXL2",
    ".trellis": "EXL3",
    ".codebooks": "AQLM",
    ".weight_packed": "nvfp4 or another packed float",
}
_HINT = (
    "Pass the weights in bfloat16, or in one of: fp8 or int8 with scales, bitsandbytes, compressed-tensors, GPTQ, AWQ."
)


class Contents(NamedTuple):
    """What a set of stored tensors stands for."""

    tensors: Mapping[str, TensorInfo | QuantisedTensor]
    """Every weight by name; the quantised ones are dequantised when they are read."""
    notes: tuple[str, ...] = ()
    """What was quantised and how, each "code: sentence"."""
    fault: CheckpointError | None = None
    """Why they cannot be read as weights: a format that is not supported."""


def contents_of(stored: Mapping[str, TensorInfo], config: Mapping[str, object], path: Path) -> Contents:
    """Find the quantised weights among a checkpoint's tensors. Cost: headers, and some bytes of each packed weight.

    Args:
        stored: Every tensor by name.
        config: The checkpoint's `config.json`.
        path: The checkpoint, for errors.

    Raises:
        CorruptFileError: A part of a quantised weight is missing, has another shape than the others say, or breaks
            its format; or loaders would take different values.
        CheckpointError: A part cannot be read.
    """
    settings = config.get("quantization_config")
    finder = _Finder(StoredTensors(stored, settings if isinstance(settings, dict) else {}, path))
    try:
        found = {weight.name: weight for weight in finder.weights()}
        finder.check_rest(found)
    except UnreadError as fault:
        return Contents(stored, (), CheckpointError(f"{fault}, which is not read", path=path, hint=_HINT))
    used = {info.name for weight in found.values() for info in weight.parts.values()} | finder.stored.beside
    dropped = {name for name in stored if found and name.endswith(_ACTIVATIONS)} - used
    rest = {name: info for name, info in stored.items() if name not in used | dropped}
    if twice := rest.keys() & found.keys():
        finder.stored.refuse(
            f"'{printable(min(twice))}' lies there quantised and as it is: loaders differ in which they take"
        )
    return Contents({**rest, **found}, tuple(_notes(found, len(dropped))))


def _notes(found: Mapping[str, QuantisedTensor], dropped: int) -> Iterator[str]:
    for (how, maker), count in Counter((weight.how, weight.maker) for weight in found.values()).most_common(8):
        yield f"quantised: {count:,} weights are stored as {how} ({maker}); read as the values that these stand for."
    if dropped:
        yield f"activation-scales: {dropped:,} scales of activations were left out: activations are not rounded here."


@dataclass(frozen=True)
class _Finder:
    stored: StoredTensors

    def weights(self) -> Iterator[QuantisedTensor]:
        """Every quantised weight, found by a part that its format always has."""
        for name, info in self.stored.tensors.items():
            stem, _, last = name.rpartition(".")
            if STATE in name:
                yield four_bit(self.stored, name)
            elif last == "SCB":
                yield eight_bit(self.stored, stem)
            elif last == "qweight":
                yield self._grouped(stem)
            elif last == "weight_packed" and info.dtype == "I32":
                yield self._packed(stem)
            elif info.dtype in (*_FP8, "I8") and {f"{name}_scale", f"{name}_scale_inv"} & self.stored.tensors.keys():
                yield self._scaled(info)

    def check_rest(self, found: Mapping[str, QuantisedTensor]) -> None:
        """Refuse what belongs to a format that is not read, and weights that lack their scales."""
        used = {info.name for weight in found.values() for info in weight.parts.values()}
        fp8 = bool(self.stored.settings) or any(weight.how.startswith("fp8") for weight in found.values())
        for name, info in self.stored.tensors.items():
            if name in used:
                continue
            mark = next((mark for mark in _UNREAD if name.endswith(mark)), None)
            if mark and info.dtype in ("U8", "I8", "I16", "I32"):
                raise UnreadError(f"'{printable(name)}' is a part of a weight in {_UNREAD[mark]}")
            if info.dtype == "U8" and f"{name}_scale" in self.stored.tensors:
                raise UnreadError(f"'{printable(name)}' is a weight packed into bytes with a scale")
            if info.dtype in _FP8 and fp8 and len(info.shape) > 1:
                self.stored.refuse(
                    f"the quantised weight '{printable(name)}' has no scale: expected '{printable(name)}_scale'"
                )
            if name.endswith(".absmax"):
                self.stored.refuse(f"'{printable(name)}' belongs to a 4-bit weight whose quant_state is missing")

    # --- fp8 and int8 with scales

    def _scaled(self, info: TensorInfo) -> QuantisedTensor:
        name, shape = info.name, info.shape
        if f"{name}_scale" in self.stored.tensors and f"{name}_scale_inv" in self.stored.tensors:
            self.stored.refuse(f"'{printable(name)}' has two kinds of scales: loaders differ in which they take")
        suffix = "_scale" if f"{name}_scale" in self.stored.tensors else "_scale_inv"
        parts = {"codes": info, "scale": self.stored.part(name + suffix, *FLOATS)}
        if len(shape) not in (2, 3) or not all(shape):
            self.stored.refuse(
                f"the quantised weight '{printable(name)}' has the shape {list(shape)}, expected a matrix"
            )
        height, width, how = self._blocks(parts["scale"], shape)
        if f"{name}_zero_point" in self.stored.tensors:
            parts["zero"] = self.stored.part(f"{name}_zero_point", "I8", *_FP8, *FLOATS)
            self.stored.expect(parts["zero"], parts["scale"].shape)

        def decode(tensors: Mapping[str, Tensor]) -> Codes:
            codes = tensors["codes"]
            table, rows = byte_table(codes.dtype), codes.view(torch.uint8).view(-1, shape[-1])
            zeros = _grid(tensors["zero"], shape, height, width) if "zero" in tensors else None
            scales = _grid(tensors["scale"], shape, height, width)
            return Codes(lambda start, stop: rows[start:stop], table, scales, zeros)

        maker = "in the layout of DeepSeek-V3" if suffix == "_scale_inv" else "in the layout of compressed-tensors"
        return QuantisedTensor(name, shape, f"{_FP8.get(info.dtype, 'int8')}, {how}", maker, parts, decode)

    def _blocks(self, scale: TensorInfo, shape: tuple[int, ...]) -> tuple[int, int, str]:
        """Height and width of the blocks that have one scale each, and what to call them."""
        *lead, rows, columns = shape
        if math.prod(scale.shape) == 1 or scale.shape == (*lead, 1, 1):
            return rows, columns, "one scale a matrix"
        if scale.shape in ((*lead, rows), (*lead, rows, 1)):
            return 1, columns, "one scale a row"
        height, width = self._block_size()
        if scale.shape == (*lead, -(-rows // height), -(-columns // width)):
            return height, width, f"blocks of {height} x {width}"
        groups = scale.shape[-1] if len(scale.shape) == len(shape) and scale.shape[:-1] == shape[:-1] else 0
        if not groups or columns % groups:
            got = f"'{printable(scale.name)}' has the shape {list(scale.shape)}"
            self.stored.refuse(
                f"{got}: no scales of a weight of {list(shape)}, whole, by rows, or by {height} x {width}"
            )
        return 1, columns // groups, f"groups of {columns // groups}"

    def _block_size(self) -> tuple[int, int]:
        size = self.stored.settings.get("weight_block_size")
        if size is None:
            return 128, 128
        if not (isinstance(size, list) and len(size) == 2 and all(type(n) is int and 0 < n <= 2**20 for n in size)):
            self.stored.refuse(f"weight_block_size is {printable(repr(size), limit=80)}, expected two sizes")
        return size[0], size[1]

    # --- compressed-tensors, packed into words

    def _packed(self, stem: str) -> QuantisedTensor:
        codes = self.stored.part(f"{stem}.weight_packed", "I32")
        shape = self._packed_shape(self.stored.part(f"{stem}.weight_shape", "I64", "I32"))
        rows, columns = shape
        bits = next((bits for bits in (4, 8, 2) if codes.shape == (rows, -(-columns * bits // 32))), 0)
        if not bits or not self._declared_bits() <= {bits, None}:
            raise UnreadError(f"'{printable(codes.name)}' is packed to a width other than 2, 4 or 8 bits")
        parts = {"codes": codes, "scale": self.stored.part(f"{stem}.weight_scale", *FLOATS)}
        _, width, how = self._blocks(parts["scale"], shape)
        if math.prod(parts["scale"].shape) != 1 and parts["scale"].shape[0] != rows:
            self.stored.expect(parts["scale"], (1,), (rows, 1))
        groups = parts["scale"].shape[-1] if len(parts["scale"].shape) == 2 else 1
        if f"{stem}.weight_zero_point" in self.stored.tensors:
            parts["zero"] = self.stored.part(f"{stem}.weight_zero_point", "I32")
            self.stored.expect(parts["zero"], (-(-rows * bits // 32), groups))
        if f"{stem}.weight_g_idx" in self.stored.tensors:
            parts["order"] = self.stored.part(f"{stem}.weight_g_idx", "I32", "I64")
            self.stored.expect(parts["order"], (columns,))
        self.stored.beside.add(f"{stem}.weight_shape")

        def decode(tensors: Mapping[str, Tensor]) -> Codes:
            words, half = tensors["codes"], 2 ** (bits - 1)
            place = self._order(tensors.get("order"), groups, width)
            height = rows if tensors["scale"].numel() == 1 else 1
            scale = Scales(tensors["scale"].float().reshape(-1, groups), height, place, rows, columns)
            zero = tensors.get("zero")
            if zero is not None:
                zero = _unpacked(zero.T, bits)[:, :rows].T.float() - half
            zeros = None if zero is None else scale._replace(values=zero)
            table = torch.arange(2**bits).float() - half
            return Codes(lambda a, b: _unpacked(words[a:b], bits)[:, :columns], table, scale, zeros)

        return QuantisedTensor(f"{stem}.weight", shape, f"int{bits}, {how}", "compressed-tensors", parts, decode)

    def _packed_shape(self, info: TensorInfo) -> tuple[int, int]:
        self.stored.expect(info, (2,))
        rows, columns = read_tensor(info).tolist()
        if not (0 < rows < 2**40 and 0 < columns < 2**40):
            self.stored.refuse(f"'{printable(info.name)}' says the shape {[rows, columns]}, expected that of a matrix")
        return rows, columns

    def _declared_bits(self) -> set[object]:
        """Widths that the configuration names: some give words of equal numbers."""
        groups = self.stored.settings.get("config_groups")
        found = (
            [group.get("weights") for group in groups.values() if isinstance(group, dict)]
            if isinstance(groups, dict)
            else []
        )
        return {weights.get("num_bits") for weights in found if isinstance(weights, dict)}

    def _order(self, order: Tensor | None, groups: int, width: int) -> int | Tensor:
        """Which group each column belongs to."""
        if order is None:
            return width
        if int(order.min()) < 0 or int(order.max()) >= groups:
            self.stored.refuse(
                f"a g_idx names groups {int(order.min())} to {int(order.max())}, expected 0 to {groups - 1}"
            )
        return order.long()

    # --- GPTQ and AWQ

    def _grouped(self, stem: str) -> QuantisedTensor:
        codes, scale = self.stored.part(f"{stem}.qweight", "I32"), self.stored.part(f"{stem}.scales", *FLOATS)
        zero = self.stored.part(f"{stem}.qzeros", "I32")
        (groups, rows), (high, wide) = self.stored.matrix(scale), self.stored.matrix(codes)
        if wide * 8 == rows and wide != rows:
            return self._awq(stem, {"codes": codes, "scale": scale, "zero": zero}, (rows, high), groups)
        bits = next((bits for bits in (4, 8, 2) if zero.shape == (groups, rows * bits // 32)), 0)
        if wide != rows or not bits or rows * bits % 32 or self.stored.settings.get("bits", bits) != bits:
            raise UnreadError(
                f"'{printable(codes.name)}' is in an order or width of GPTQ or AWQ other than the usual ones"
            )
        columns = high * 32 // bits
        parts = {"codes": codes, "scale": scale, "zero": zero}
        if f"{stem}.g_idx" in self.stored.tensors:
            parts["order"] = self.stored.part(f"{stem}.g_idx", "I32", "I64")
            self.stored.expect(parts["order"], (columns,))
        elif columns % groups:
            self.stored.refuse(f"'{printable(scale.name)}' has {groups} groups: they do not divide {columns} columns")
        kind = self.stored.settings.get("checkpoint_format", "gptq")
        if kind not in ("gptq", "gptq_v2"):
            raise UnreadError(f"'{printable(codes.name)}' is GPTQ in the format {printable(repr(kind), limit=40)}")

        def decode(tensors: Mapping[str, Tensor]) -> Codes:
            words, zeros = tensors["codes"], _unpacked(tensors["zero"], bits)
            if kind == "gptq" and int(zeros.max()) == 2**bits - 1:
                self.stored.refuse(
                    f"'{printable(zero.name)}' has zeros that overflow: loaders differ in what they make of them"
                )
            place = self._order(tensors.get("order"), groups, columns // groups)
            scales = Scales(tensors["scale"].float().T, 1, place, rows, columns)
            offsets = scales._replace(values=zeros.T.float() + (kind == "gptq"))
            table = torch.arange(2**bits).float()
            return Codes(lambda a, b: _unpacked(words[:, a:b].T.contiguous(), bits), table, scales, offsets)

        maker = "GPTQ" if kind == "gptq" else "GPTQ v2"
        how = f"int{bits}, " + (f"groups of {columns // groups}" if groups > 1 else "one scale a row")
        return QuantisedTensor(f"{stem}.weight", (rows, columns), how, maker, parts, decode)

    def _awq(self, stem: str, parts: Mapping[str, TensorInfo], shape: tuple[int, int], groups: int) -> QuantisedTensor:
        rows, columns = shape
        self.stored.expect(parts["zero"], (groups, rows // 8))
        if columns % groups:
            self.stored.refuse(
                f"'{printable(parts['scale'].name)}' has {groups} groups: they do not divide {columns} columns"
            )
        version = str(self.stored.settings.get("version", "gemm")).lower()
        if version != "gemm" or self.stored.settings.get("bits", 4) != 4:
            raise UnreadError(
                f"'{printable(parts['codes'].name)}' is AWQ of the version {printable(version, limit=40)}"
            )

        def decode(tensors: Mapping[str, Tensor]) -> Codes:
            words, size = tensors["codes"], columns // groups
            scales = Scales(tensors["scale"].float().T, 1, size, rows, columns)
            zeros = scales._replace(values=_unpacked(tensors["zero"], 4, _AWQ_SHIFTS).T.float())

            def code(start: int, stop: int) -> Tensor:
                first = start // 8
                part = _unpacked(words[:, first : -(-stop // 8)], 4, _AWQ_SHIFTS)
                return part[:, start - 8 * first : stop - 8 * first].T

            return Codes(code, torch.arange(16).float(), scales, zeros)

        return QuantisedTensor(f"{stem}.weight", shape, f"int4, groups of {columns // groups}", "AWQ", parts, decode)


def _grid(values: Tensor, shape: Sequence[int], height: int, width: int) -> Scales:
    """A number for each block of a matrix, or of each of several; one alone is for all."""
    across = -(-shape[-1] // width)
    per_row = values.float().reshape(-1, across)
    if values.numel() == 1:
        per_row = per_row.expand(math.prod(shape[:-2]), 1)
    return Scales(per_row, height, width, shape[-2], shape[-1])


def _unpacked(words: Tensor, bits: int, shifts: Sequence[int] | None = None) -> Tensor:
    """Codes in words of 32 bits, the lowest first or by their shifts: [row, word] to [row, code]."""
    steps = torch.tensor(shifts or range(0, 32, bits), dtype=torch.int32)
    codes: Tensor = (words.unsqueeze(-1) >> steps) & (2**bits - 1)
    return codes.reshape(len(words), -1)

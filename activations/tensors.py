"""Untrusted bytes: a bounded reader of safetensors headers, and one tensor at a time by name; no pickle, ever.

The format is 8 bytes of header length (little-endian), that many bytes of JSON, and the data. Every tensor names its
dtype, shape and span of the data. The spans must cover the data exactly, without overlap, hole or rest, so that no
byte hides from the reader and no two readers see different weights. Where the reference library is lenient
(repeated names over one span) or unbounded in time and memory (millions of tensors), this reader refuses.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from activations.errors import CheckpointError, CorruptFileError, printable
from activations.untrusted import (
    DAMAGED,
    FileStamp,
    JsonLimits,
    file_stamp,
    foreign_format,
    open_regular,
    parse_json,
)

if TYPE_CHECKING:
    import torch

__all__ = [
    "DTYPES",
    "Header",
    "TensorInfo",
    "content_hash",
    "open_tensor",
    "read_header",
    "read_tensor",
    "tensor_digest",
]

# The format's own limit for a header is 100 MB; no model published so far needs a third of ours. A tensor of two
# dimensions takes eight items: three brackets and five commas.
MOST_TENSORS = 100_000
HEADER_LIMITS = JsonLimits(size=32 * 2**20, depth=8, items=12 * MOST_TENSORS)
# More dimensions than any weight has, few enough that their product stays cheap.
_MOST_DIMENSIONS = 32
_LARGEST = 2**63 - 1
_BLOCK = 2**20

DTYPES: dict[str, tuple[int, str]] = {
    "BOOL": (1, "bool"),
    "U8": (1, "uint8"),
    "I8": (1, "int8"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E4M3FNUZ": (1, "float8_e4m3fnuz"),
    "F8_E5M2": (1, "float8_e5m2"),
    "F8_E5M2FNUZ": (1, "float8_e5m2fnuz"),
    "U16": (2, "uint16"),
    "I16": (2, "int16"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "U32": (4, "uint32"),
    "I32": (4, "int32"),
    "F32": (4, "float32"),
    "U64": (8, "uint64"),
    "I64": (8, "int64"),
    "F64": (8, "float64"),
    "C64": (8, "complex64"),
}
"""The format's name of a dtype to its bytes per element and torch's name; dtypes below one byte are not read."""


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies, and what it is; no weight is read for it.

    Attributes:
        name: Its name in the file, as the file's author chose it: print it through `printable` only.
        dtype: The format's name, a key of `DTYPES` ("BF16").
        shape: Its shape; () for a scalar.
        file: The file that holds it.
        start: First byte in the file.
        stop: Byte after its last.
        stamp: The file as it was when the header was read, to notice a change before the tensor is read.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int
    stamp: FileStamp | None = field(default=None, repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes that its data take."""
        return self.stop - self.start


@dataclass(frozen=True)
class Header:
    """The tensors of one file by name, in the order of their bytes, and the strings its author left beside them."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file; no weight is read.

    Cost: linear in the header, at most a few seconds for 32 MiB of it.

    Raises:
        CorruptFileError: The file breaks the format, or exceeds a limit that honest files keep.
        LfsPointerError, PickleRefusedError: Another format lies in the file.
        PathMissingError, UnsafePathError, CheckpointError: The file cannot be opened (see `open_regular`).
    """
    with open_regular(path) as file:
        stamp = file_stamp(file)
        text = _header_text(file, path, stamp.size)
    entries = parse_json(text, path, limits=HEADER_LIMITS)
    if not isinstance(entries, dict):
        _refuse(path, f"its header is no JSON object but {type(entries).__name__}")
    metadata = _metadata(entries.pop("__metadata__", {}), path)
    if len(entries) > MOST_TENSORS:
        _refuse(path, f"its header names {len(entries):,} tensors, more than {MOST_TENSORS:,}, the limit")
    first = 8 + len(text)
    infos = [_tensor_info(name, entry, first, path, stamp) for name, entry in entries.items()]
    infos.sort(key=lambda info: (info.start, info.stop))
    _check_cover(infos, first, stamp.size, path)
    return Header({info.name: info for info in infos}, metadata)


def read_tensor(info: TensorInfo) -> torch.Tensor:
    """Read one tensor's bytes into memory of its own, in the dtype it has in the file.

    Raises:
        CorruptFileError: The file has changed or lost bytes since its header was read.
        CheckpointError: The tensor does not fit into memory.
        PathMissingError, UnsafePathError: The file is gone, or is no regular file any more.
    """
    import torch

    dtype: torch.dtype = getattr(torch, DTYPES[info.dtype][1])
    if info.nbytes == 0:
        return torch.empty(info.shape, dtype=dtype)
    try:
        buffer = bytearray(info.nbytes)
    except MemoryError:
        message = f"the tensor '{printable(info.name)}' of {info.nbytes:,} bytes does not fit into memory"
        raise CheckpointError(message, path=info.file, hint="Scan it on a machine with more memory.") from None
    with open_tensor(info) as file:
        _require_bytes(info, file.readinto(buffer))
    return torch.frombuffer(buffer, dtype=dtype).reshape(info.shape)


def tensor_digest(info: TensorInfo) -> str:
    """SHA-256 of one tensor's bytes, read in blocks.

    Raises:
        CorruptFileError: The file has changed or lost bytes since its header was read.
        PathMissingError, UnsafePathError: The file is gone, or is no regular file any more.
    """
    digest, count = hashlib.sha256(), 0
    for block in _blocks(info):
        digest.update(block)
        count += len(block)
    _require_bytes(info, count)
    return digest.hexdigest()


@contextmanager
def open_tensor(info: TensorInfo) -> Iterator[BufferedReader]:
    """Open a tensor's file at its first byte, if it is still the file whose header was checked.

    Raises:
        CorruptFileError: The file has changed since its header was read.
        PathMissingError, UnsafePathError: The file is gone, or is no regular file any more.
    """
    with open_regular(info.file) as file:
        if info.stamp is not None and file_stamp(file) != info.stamp:
            raise CorruptFileError(
                "the file has changed since its header was read",
                path=info.file,
                hint="Scan it again once nothing writes to it, or scan a copy.",
            )
        file.seek(info.start)
        yield file


def content_hash(tensors: Iterable[tuple[str, str, Sequence[int], str]], *, settings: Sequence[object] = ()) -> str:
    """Hash what a set of tensors is, whatever files they lie in and in whatever order.

    Args:
        tensors: Name, dtype (as in `DTYPES`), shape, and SHA-256 of the bytes of each tensor.
        settings: What else changes the model they make, as JSON values.

    Returns:
        SHA-256 in hexadecimal digits.
    """
    digest = hashlib.sha256()
    for tensor in sorted((name, dtype, list(shape), data) for name, dtype, shape, data in tensors):
        digest.update(json.dumps(tensor).encode() + b"\n")
    if settings:
        digest.update(json.dumps({"settings": list(settings)}).encode() + b"\n")
    return digest.hexdigest()


def _header_text(file: BufferedReader, path: Path, size: int) -> bytes:
    head = file.read(512)
    length = int.from_bytes(head[:8], "little")
    if len(head) < 8 or length > size - 8 or length > HEADER_LIMITS.size or head[8:9] != b"{":
        raise foreign_format(head, path) or _no_header(path, head, length, size)
    file.seek(8)
    text = file.read(length)
    if len(text) < length:
        _refuse(path, f"it was cut while it was read: its header has {length:,} bytes, got {len(text):,}")
    return text


def _no_header(path: Path, head: bytes, length: int, size: int) -> CorruptFileError:
    if len(head) < 8:
        message = f"the file has {size} bytes: expected a header length of 8 bytes, and a header"
    elif length > size - 8:
        message = f"its header should have {length:,} bytes, but only {size - 8:,} follow: truncated, or no safetensors"
    elif length > HEADER_LIMITS.size:
        message = f"its header has {length:,} bytes, more than {HEADER_LIMITS.size:,}, the limit"
    else:
        message = f"its header should start with '{{', got {printable(repr(head[8:9]))}: this is no safetensors file"
    return CorruptFileError(message, path=path, hint=DAMAGED)


def _metadata(value: object, path: Path) -> dict[str, str]:
    if not isinstance(value, dict):
        _refuse(path, f"its __metadata__ should map strings to strings, got {type(value).__name__}")
    for key, text in value.items():
        if not isinstance(text, str):
            _refuse(path, f"its __metadata__ '{printable(key)}' should be a string, got {type(text).__name__}")
    return value


def _tensor_info(name: str, entry: object, first: int, path: Path, stamp: FileStamp) -> TensorInfo:
    where = f"the tensor '{printable(name)}'"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        _refuse(path, f"{where} should have dtype, shape and data_offsets and nothing else, got {_outline(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        got = printable(repr(dtype), limit=40)
        _refuse(path, f"{where} has the dtype {got}: expected one of {', '.join(DTYPES)}")
    if not _is_counts(shape) or len(shape) > _MOST_DIMENSIONS:
        got = printable(repr(shape), limit=80)
        _refuse(path, f"{where} has the shape {got}: expected up to {_MOST_DIMENSIONS} whole numbers, none negative")
    # Zeros are left out, for the strides of an empty tensor overflow as those of a full one do.
    if math.prod(max(size, 1) for size in shape) * DTYPES[dtype][0] > _LARGEST:
        _refuse(path, f"{where} has the shape {list(shape)}: more elements than any memory addresses")
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        got = printable(repr(offsets), limit=80)
        _refuse(path, f"{where} has the data_offsets {got}: expected its first byte and the byte after its last")
    expected, got_bytes = math.prod(shape) * DTYPES[dtype][0], offsets[1] - offsets[0]
    if expected != got_bytes:
        _refuse(path, f"{where} of shape {list(shape)} and dtype {dtype} takes {expected:,} bytes, got {got_bytes:,}")
    return TensorInfo(name, dtype, tuple(shape), path, first + offsets[0], first + offsets[1], stamp)


def _is_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(count) is int and 0 <= count <= _LARGEST for count in value)


def _check_cover(infos: Sequence[TensorInfo], first: int, size: int, path: Path) -> None:
    """Require that the spans, in order, cover the data from its first byte to the file's last, each byte once."""
    reached = first
    for info in infos:
        if info.start != reached:
            fault = "overlaps the one before it" if info.start < reached else "leaves a hole before it"
            begin = f"starts at byte {info.start - first:,} of the data, expected {reached - first:,}"
            _refuse(path, f"the tensor '{printable(info.name)}' {begin}: it {fault}")
        reached = info.stop
    if reached > size:
        _refuse(path, f"it is truncated: its tensors end at byte {reached:,}, the file at {size:,}")
    if reached < size:
        _refuse(path, f"{size - reached:,} bytes follow the last tensor: something else was appended to the file")


def _blocks(info: TensorInfo) -> Iterator[bytes]:
    with open_tensor(info) as file:
        left = info.nbytes
        while left and (block := file.read(min(left, _BLOCK))):
            left -= len(block)
            yield block


def _require_bytes(info: TensorInfo, count: int) -> None:
    if count != info.nbytes:
        where = f"the tensor '{printable(info.name)}'"
        _refuse(info.file, f"{where} was cut while it was read: {info.nbytes:,} bytes expected, got {count:,}")


def _outline(entry: object) -> str:
    if not isinstance(entry, dict):
        return type(entry).__name__
    return printable(", ".join(entry) or "nothing", limit=80)


def _refuse(path: Path, message: str) -> NoReturn:
    raise CorruptFileError(message, path=path, hint=DAMAGED)

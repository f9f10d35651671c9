"""Files that an attacker may have written: opened only if they are regular, read up to a limit, parsed within bounds.

What is no checkpoint at all is named for what it is (a Git-LFS pointer, a pickle, a web page), since these are users'
commonest mistakes. Nothing here loads, runs or follows what it reads.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

from activations.errors import (
    CheckpointError,
    CorruptFileError,
    LfsPointerError,
    PathMissingError,
    PickleRefusedError,
    UnsafePathError,
    printable,
)

__all__ = [
    "DAMAGED",
    "FileStamp",
    "JsonLimits",
    "file_stamp",
    "foreign_format",
    "list_folder",
    "open_regular",
    "parse_json",
    "read_json",
]

DAMAGED = "The file is damaged, or made to mislead a reader: fetch it again from a source you trust."

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
# Opening a FIFO waits for a writer unless told not to; Windows has no such flag, and needs one against line endings.
_OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)

# Linear in the input even where a string never ends: neither repeat gives back what it has taken.
_JSON_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\Z)', re.DOTALL)
_NOT_STRUCTURE = bytes(set(range(256)) - set(b"[]{},"))
_BRACKETS = bytes.maketrans(b"{}", b"[]")
# Quotation marks per counted item that honest JSON may have: two for a key and two for its value.
_QUOTES_PER_ITEM = 4


class FileStamp(NamedTuple):
    """What changes when a file is replaced or written to: compared when it is opened again."""

    device: int
    inode: int
    size: int
    modified_ns: int


class JsonLimits(NamedTuple):
    """Bounds that untrusted JSON keeps, or is refused unparsed: parsing it then takes about a second at most."""

    size: int
    """Bytes of the text."""
    depth: int
    """Objects and arrays inside one another."""
    items: int
    """Objects, arrays, and the commas between their members."""


@contextmanager
def open_regular(path: Path) -> Iterator[BufferedReader]:
    """Open a regular file for reading; a FIFO or device is refused without being opened.

    Raises:
        PathMissingError: Nothing lies at the path.
        UnsafePathError: The path is a folder, FIFO, socket or device, a loop of links, or no possible name.
        CheckpointError: The system does not let us open it, or fails to read it.
    """
    try:
        _require_regular(_status(path).st_mode, path)
        with os.fdopen(os.open(path, _OPEN_FLAGS), "rb") as file:
            # What lies at the path may have been replaced since it was looked at.
            _require_regular(os.fstat(file.fileno()).st_mode, path)
            yield file
    except OSError as error:
        raise _access_error(error.errno, path) from None


def list_folder(path: Path) -> list[str] | None:
    """The names in a folder, sorted; None where the path is something else than a folder.

    Raises:
        PathMissingError: Nothing lies at the path.
        UnsafePathError: The path is a loop of links, or no possible name.
        CheckpointError: The system does not let us list it.
    """
    try:
        return sorted(entry.name for entry in path.iterdir()) if stat.S_ISDIR(_status(path).st_mode) else None
    except OSError as error:
        raise _access_error(error.errno, path) from None


def file_stamp(file: BufferedReader) -> FileStamp:
    """The identity, size and time of change of an open file."""
    status = os.fstat(file.fileno())
    return FileStamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def read_json(path: Path, *, limits: JsonLimits) -> dict[str, object]:
    """Read a file that must hold one JSON object.

    Raises:
        CorruptFileError: The text exceeds a limit, is not UTF-8, not JSON, or no object, or repeats a key.
        LfsPointerError: A Git-LFS pointer lies there instead.
        PathMissingError, UnsafePathError, CheckpointError: As for `open_regular`.
    """
    with open_regular(path) as file:
        data = file.read(limits.size + 1)
    if not data.lstrip().startswith(b"{"):
        raise foreign_format(data[:512], path) or _corrupt(path, "no JSON object: expected it to start with '{'")
    parsed = parse_json(data, path, limits=limits)
    if not isinstance(parsed, dict):
        raise _corrupt(path, f"expected a JSON object, got {type(parsed).__name__}")
    return parsed


def parse_json(data: bytes, path: Path, *, limits: JsonLimits) -> object:
    """Parse JSON after its size, nesting and number of items have been checked on the raw bytes.

    Args:
        data: The text.
        path: Where it comes from, for the errors.
        limits: Bounds that it must keep.

    Raises:
        CorruptFileError: The text exceeds a limit, is not UTF-8, is no JSON, or repeats a key in one object.
    """
    _check_bounds(data, path, limits)

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        members = dict(pairs)
        if len(members) < len(pairs):
            key = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise _corrupt(path, f"the key '{printable(key)}' occurs twice in one JSON object: readers disagree")
        for key, value in pairs:
            # A lone surrogate is legal JSON and no legal text: it cannot be written, hashed or printed.
            key.encode()
            if isinstance(value, str):
                value.encode()
        return members

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise _corrupt(path, f"its JSON is not valid UTF-8 text: {error.reason}") from None
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, f"its JSON cannot be parsed: {printable(str(error))}") from None


def foreign_format(head: bytes, path: Path) -> CheckpointError | None:
    """The error for a file that starts as another format does, or None where the start is not recognised.

    Args:
        head: The first bytes of the file, some hundred of them.
        path: Where it comes from, for the error.
    """
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return LfsPointerError(
            "a Git-LFS pointer lies where the file itself should be",
            path=path,
            hint="Run `git lfs install` and `git lfs pull` in the repository it was cloned from.",
        )
    if head.startswith(b"PK\x03\x04") or (head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5")):
        kind = "a zip archive, as torch.save writes" if head.startswith(b"PK") else "a Python pickle"
        return PickleRefusedError(
            f"the file is {kind}: it is never loaded, because loading can run code",
            path=path,
            hint="Ask for the same weights as .safetensors.",
        )
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return CorruptFileError(
            "the file is a web page: a page was saved instead of the file",
            path=path,
            hint="Download the file itself; a page like this often asks for a log-in or reports an error.",
        )
    for magic, name in ((b"GGUF", "a GGUF file"), (b"\x89HDF", "an HDF5 file"), (b"\x1f\x8b", "a gzip archive")):
        if head.startswith(magic):
            return CorruptFileError(
                f"the file is {name}, and only safetensors is read", path=path, hint="Pass weights as .safetensors."
            )
    return None


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except ValueError:
        # A NUL character or a lone surrogate, which no file name can hold.
        raise _access_error(errno.ENAMETOOLONG, path) from None


def _require_regular(mode: int, path: Path) -> None:
    if stat.S_ISREG(mode):
        return
    kind = next((name for test, name in _KINDS if test(mode)), "no regular file")
    raise UnsafePathError(
        f"expected a regular file, got {kind}", path=path, hint="Put the file itself in its place, or leave it out."
    )


def _access_error(code: int | None, path: Path) -> CheckpointError | PathMissingError:
    """Say which of our errors an operating system's refusal is."""
    if code in (errno.ENOENT, errno.ENOTDIR):
        return PathMissingError("nothing lies at this path", path=path, hint="Check the path for a typing error.")
    if code == errno.ELOOP:
        return UnsafePathError("the path is a loop of symbolic links", path=path, hint="Remove the links.")
    if code == errno.ENAMETOOLONG:
        return UnsafePathError("this is not a possible file name", path=path, hint="Rename the file.")
    return CheckpointError(
        f"cannot be read: {os.strerror(code or errno.EIO)}",
        path=path,
        hint="Check its permissions and the disk it lies on.",
    )


def _check_bounds(data: bytes, path: Path, limits: JsonLimits) -> None:
    if len(data) > limits.size:
        raise _corrupt(path, f"its JSON is longer than {limits.size:,} bytes, the limit")
    if data.count(b'"') > _QUOTES_PER_ITEM * limits.items:
        raise _corrupt(path, f"its JSON has more strings than {limits.items:,} items have, the limit")
    # What is left of each string is nothing, and of the rest only brackets, as one kind, and commas.
    structure = _JSON_STRING.sub(b"", data).translate(_BRACKETS, delete=_NOT_STRUCTURE)
    items = len(structure) - structure.count(b"]")
    if max(items, len(structure) // 2) > limits.items:
        raise _corrupt(path, f"its JSON has more than {limits.items:,} items, the limit")
    if structure.count(b"[") != structure.count(b"]"):
        raise _corrupt(path, "its JSON cannot be parsed: its brackets do not pair")
    nested = structure.replace(b",", b"")
    for _ in range(limits.depth):
        nested = nested.replace(b"[]", b"")
    if nested:
        raise _corrupt(
            path, f"its JSON is nested more than {limits.depth} deep, the limit, or its brackets do not pair"
        )


def _corrupt(path: Path, message: str) -> CorruptFileError:
    return CorruptFileError(message, path=path, hint=DAMAGED)

"""HDF5 files that outlive a killed writer: one writer at a time, readers meanwhile, faults with a name.

HDF5 orders what it writes (SWMR: single writer, multiple readers), marks the file while somebody writes it, and lets
nobody write into a file whose mark was left by a killed process. What such a file holds is copied into a new one.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import h5py
import numpy as np

from activations.errors import StoreError

__all__ = [
    "ANEW",
    "CHUNK_ROWS",
    "GO_ON",
    "WriteLock",
    "check_self_contained",
    "give_back",
    "growing",
    "is_cut_off",
    "is_marked",
    "is_there",
    "named_faults",
    "open_to_read",
    "open_to_write",
    "replacing",
    "reserve",
    "write_at",
]

ANEW = "Extract into a new file."
GO_ON = "Run the extraction again: it goes on where it stopped."
CHUNK_ROWS = 256

# Tables of HDF5 stay within one page of memory, so that the system writes each of them whole or not at all.
_ALIGNMENT = 512
# Room for HDF5's tables beside each new chunk; 4 KiB is the largest block it adds up to 100,000 rows.
_TABLES = 4096 + _ALIGNMENT
# HDF5 file format specification 3.0, II.A: signature, version, widths of addresses and lengths; open, open for SWMR.
_VERSION_3 = b"\x89HDF\r\n\x1a\n\x03\x08\x08"
_MARKS = 0b101
# Beside a writer, HDF5 reads a table anew while its checksum is wrong, and waits twice as long each time, from 1 ns on:
# 25 attempts are 34 ms in all. It would make 100, and a file that is broken on purpose would hold us for ever.
_ATTEMPTS = 25
_LIBRARY = ctypes.CDLL(h5py.h5p.__file__)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class WriteLock:
    """The right to write one file, from here to `release`, or to the end of the block where nobody called `keep`."""

    def __init__(self, path: Path) -> None:
        # Of the file itself, however it is called.
        self._path = path.resolve().with_name(f"{path.resolve().name}.lock")
        self._kept = False
        with named_faults(path):
            self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Without a name: the writer before us removed it after we had opened it, and another may be back.
                free = os.fstat(self._handle).st_nlink > 0
            except BlockingIOError:
                free = False
            except BaseException:
                os.close(self._handle)
                raise
        if not free:
            os.close(self._handle)
            raise StoreError("another process is writing it", path=path, hint="Wait for it, or choose another name.")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._kept:
            self.release()

    def keep(self) -> None:
        """Hold it beyond the block."""
        self._kept = True

    def release(self) -> None:
        """Let the next writer come, and remove the lock file; a second call does nothing."""
        if self._handle < 0:
            return
        # Removed while it is held: afterwards it may be another writer's.
        with suppress(OSError):
            self._path.unlink()
        os.close(self._handle)
        self._handle = -1


def open_to_read(path: Path) -> h5py.File:
    """Open a file beside its writer, if it has one.

    Raises:
        OSError: It is no HDF5 file.
    """
    access, flags = _access(), h5py.h5f.ACC_RDONLY | h5py.h5f.ACC_SWMR_READ
    # h5py has no name for this call; its own library has it.
    if _LIBRARY.H5Pset_metadata_read_attempts(ctypes.c_int64(access.id), ctypes.c_uint(_ATTEMPTS)) < 0:
        raise OSError("HDF5 does not limit its attempts to read")
    return h5py.File(h5py.h5f.open(os.fsencode(path), flags, access))


def open_to_write(path: Path) -> h5py.File:
    """Open a file that nobody has marked, and let others read it meanwhile.

    Raises:
        OSError: It is no HDF5 file, or it is marked.
    """
    # Opened and marked as SWMR in one step: killed between the two, nobody could open the file again.
    flags = h5py.h5f.ACC_RDWR | h5py.h5f.ACC_SWMR_WRITE
    return h5py.File(h5py.h5f.open(os.fsencode(path), flags, _access()))


@contextmanager
def replacing(path: Path) -> Iterator[h5py.File]:
    """An empty file made aside, put in place when the block ends: a process killed here leaves nothing half made.

    Raises:
        StoreError: It cannot be written.
    """
    whole = path.resolve()
    aside = whole.with_name(f"{whole.name}.part")
    with named_faults(path):
        try:
            with h5py.File(h5py.h5f.create(os.fsencode(aside), h5py.h5f.ACC_TRUNC, fapl=_access())) as file:
                yield file
            aside.replace(whole)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise


def growing(file: h5py.File, name: str, width: int, dtype: Any, **options: Any) -> None:
    """Make an empty data set of rows."""
    file.create_dataset(name, (0, width), dtype, maxshape=(None, width), chunks=(CHUNK_ROWS, width), **options)


def write_at(data: h5py.Dataset, start: int, values: np.ndarray) -> None:
    """Write from a row on, over what an interrupted run left there; never shrink what others read."""
    end = start + len(values)
    if end > len(data):
        data.resize(end, axis=0)
    data[start:end] = values


def reserve(file: h5py.File, path: Path, ends: dict[str, int]) -> None:
    """Take the room for rows up to the ends: a full disk is met before HDF5 has half written something.

    Raises:
        OSError: There is no room; nothing was changed.
    """
    room = 0
    for name, end in ends.items():
        data = file[name]
        height, row = data.chunks[0], data.shape[1] * data.dtype.itemsize
        room += max(0, -(-end // height) - -(-len(data) // height)) * (height * row + _TABLES)
    if not room:
        return
    with path.open("r+b") as raw:
        try:
            os.posix_fallocate(raw.fileno(), file.id.get_filesize(), room)
        except OSError as error:
            # Some file systems cannot reserve: there, HDF5 meets the full disk.
            if error.errno in _FULL:
                raise


def is_marked(path: Path) -> bool:
    """Whether somebody writes the file with HDF5, or was killed while doing so."""
    return _superblock(path)[0]


def is_cut_off(path: Path) -> bool:
    """Whether a file lost its end, or a disk was full when its writer closed it; HDF5 reads zeros there."""
    marked, end = _superblock(path)
    return not marked and path.stat().st_size < end


def is_there(data: h5py.Dataset, path: Path, rows: int) -> bool:
    """Whether the file reaches to the last of a data set's first rows; chunks lie in the order of their rows."""
    if not rows or data.chunks is None:
        return True
    start = (rows - 1) // data.chunks[0] * data.chunks[0]
    offset = data.id.get_chunk_info_by_coord((start, 0)).byte_offset
    size = (rows - start) * data.shape[1] * data.dtype.itemsize
    return offset is not None and offset + size <= path.stat().st_size


def give_back(path: Path) -> None:
    """Return what `reserve` took and nobody needed, once the file is closed.

    Raises:
        OSError: It cannot be written.
    """
    marked, end = _superblock(path)
    if not marked and 0 < end < path.stat().st_size:
        os.truncate(path, end)


def check_self_contained(file: h5py.File, path: Path) -> None:
    """Refuse links and storage outside the file, and data sets that claim more than the file can hold.

    Raises:
        StoreError: It has one of these.
    """
    for name in file:
        link, data = file.get(name, getlink=True), None
        if isinstance(link, h5py.HardLink):
            data = file[name]
        if not isinstance(data, h5py.Dataset) or data.external or data.is_virtual or data.shape is None:
            raise StoreError(f"{name!r} lies outside the file or is no data set", path=path, hint=ANEW)
        if data.id.get_create_plist().get_nfilters() or data.nbytes > path.stat().st_size:
            raise StoreError(f"{name!r} claims {data.nbytes:,} bytes, more than the file holds", path=path, hint=ANEW)


@contextmanager
def named_faults(path: Path) -> Iterator[None]:
    """Faults of a file as a `StoreError` that says what to do."""
    try:
        yield
    # h5py raises RuntimeError or KeyError for some faults of the file that are OSError elsewhere.
    except (OSError, RuntimeError, KeyError) as error:
        full = any(os.strerror(code) in str(error) for code in _FULL)
        hint = f"Make room. {GO_ON}" if full else ANEW
        raise StoreError(f"cannot be read or written: {error}", path=path, hint=hint) from error


def _access() -> Any:
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    # The oldest format that has SWMR, so that older libraries read it too.
    access.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_V110)
    access.set_alignment(1, _ALIGNMENT)
    access.set_cache(0, 521, 0, 0.75)
    # HDF5's own lock keeps readers out while a file is opened; `WriteLock` keeps out the second writer alone.
    access.set_file_locking(False, True)
    return access


def _superblock(path: Path) -> tuple[bool, int]:
    """Mark and end of a file, as version 3 of HDF5's superblock has them; what is no such file has neither."""
    with path.open("rb") as raw:
        head = raw.read(36)
    if len(head) < 36 or head[:11] != _VERSION_3:
        return False, 0
    return bool(head[11] & _MARKS), int.from_bytes(head[28:36], "little")

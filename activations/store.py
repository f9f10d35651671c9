"""Activations on disk, as HDF5 that says everything needed to reuse it.

Layout, schema "undertow.activations/2":

    /                     attributes: `schema` and every field of `Provenance` that is one value, `stored_dtype`
    /<hook point>         [vector, d_model], one data set a hook point: float32, or uint16 with the bits of bfloat16
    /done                 [prompt, 2] int64: prompts in the order of their vectors, and how many vectors each has
    /checksums            [prompt, hook_point] uint32, in the same order: zlib.crc32(vectors as stored, prompt)
    /harmful, /pair_ids   one entry a prompt, where the prompts are labelled

One data set a hook point in chunks of rows reads a layer 20 times as fast as one [prompt, layer, d_model] array.

Bytes of a finished prompt are never written again. Without filter and without chunk cache, HDF5 writes just the rows
that are new; with its own checksum (fletcher32) it would write the whole chunk once more for each batch, 20 times as
slow, and a process killed in the middle of that would take finished rows along. Vectors and checksums reach the file
before the rows of `done` that name them, and HDF5's own tables are ordered the same way (SWMR: single writer, multiple
readers). So a process killed at any moment leaves whole prompts, the next run goes on from there, and others may read
meanwhile. A checksum starts from the prompt's number: a flipped bit, or a row under a wrong number, is an error.
Needs a local file system, or one that keeps the order of writes as POSIX asks; NFS does not.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
from jaxtyping import Bool, Float, Int

from activations.errors import PathMissingError, StoreError
from activations.hdf5 import (
    ANEW,
    CHUNK_ROWS,
    GO_ON,
    WriteLock,
    check_self_contained,
    give_back,
    growing,
    is_cut_off,
    is_marked,
    is_there,
    named_faults,
    open_to_read,
    open_to_write,
    replacing,
    reserve,
    write_at,
)
from activations.provenance import (
    SCHEMA,
    Provenance,
    brief,
    check_same,
    check_schema,
    code_version,
    read_provenance,
    write_provenance,
)

__all__ = ["SCHEMA", "ActivationStore", "Provenance", "code_version"]

_TURN = threading.RLock()
_TAKE_MISSING = "Append the prompts that `missing` names, each once."


class ActivationStore:
    """One HDF5 file of activations; a context manager that closes it. One writer at a time, any number of readers.

    A reader sees what is finished at each call, also while another process writes. Threads must take turns. Within one
    process, close readers of a file before it is written.
    """

    def __init__(self, path: Path, file: h5py.File, provenance: Provenance, lock: WriteLock | None = None) -> None:
        self.path = path
        self.provenance = provenance
        self._file = file
        self._lock = lock
        self._interrupted = False

    @classmethod
    def create(cls, path: str | Path, provenance: Provenance) -> Self:
        """Make an empty file.

        Raises:
            StoreError: Something lies at the path already, it cannot be written, or another process writes it.
        """
        path = Path(path)
        with WriteLock(path) as lock:
            if path.exists():
                raise StoreError("is there already", path=path, hint="Choose another name, or remove it.")
            with replacing(path) as file:
                _lay_out(file, provenance)
            return cls._for_writing(path, lock)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a file to read it, also one that is being written, or whose writer was killed.

        Raises:
            PathMissingError: Nothing lies at the path.
            StoreError: It is broken, has another schema, or points out of itself.
        """
        path = Path(path)
        if not path.exists():
            raise PathMissingError("there are no activations at this path", path=path, hint="Extract them first.")
        with named_faults(path):
            return cls._checked(path, open_to_read(path))

    @classmethod
    def resume(cls, path: str | Path, provenance: Provenance) -> Self:
        """Open a file of the same provenance to go on with it, or make it where nothing is.

        Cost: where the last writer was killed, one copy of what is finished, since HDF5 writes into no such file.
        Readers that have it open keep the old one.

        Raises:
            StoreError: The file is broken or of another provenance (the first difference is named), or another
                process writes it.
        """
        path = Path(path)
        if not path.exists():
            return cls.create(path, provenance)
        with WriteLock(path) as lock:
            with cls.open(path) as found:
                check_same(found.provenance, provenance, path)
                if is_marked(path) or is_cut_off(path):
                    found._salvage()
            return cls._for_writing(path, lock)

    @classmethod
    def _for_writing(cls, path: Path, lock: WriteLock) -> Self:
        with named_faults(path):
            store = cls._checked(path, open_to_write(path), lock)
        lock.keep()
        return store

    @classmethod
    def _checked(cls, path: Path, file: h5py.File, lock: WriteLock | None = None) -> Self:
        try:
            check_schema(file, path)
            check_self_contained(file, path)
            store = cls(path, file, read_provenance(file, path), lock)
            store._check_shapes()
        except BaseException:
            file.close()
            raise
        return store

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except StoreError:
            # A full disk fails once more here: the first fault is the one to show.
            if error is None:
                raise

    def close(self) -> None:
        """Close the file; what was appended is in it already.

        Raises:
            StoreError: What HDF5 still had to write cannot be written.
        """
        try:
            with named_faults(self.path):
                self._file.close()
                if self._lock is not None:
                    give_back(self.path)
        finally:
            if self._lock is not None:
                self._lock.release()

    @property
    def missing(self) -> list[int]:
        """Prompts that have no vectors yet, in order."""
        done = set(self._done()[:, 0].tolist())
        return [row for row in range(self.provenance.n_prompts) if row not in done]

    def append(
        self,
        rows: Sequence[int],
        lengths: Sequence[int],
        vectors: Float[np.ndarray, "hook_point vector d_model"],
    ) -> None:
        """Add the vectors of some prompts, and let them reach the file.

        Args:
            rows: The prompts; none may be finished already.
            lengths: How many vectors each has.
            vectors: Those of the first prompt, then those of the next.

        Raises:
            StoreError: The batch does not fit the file, or the file cannot be written, for instance because the disk
                is full. Nothing was changed where room was missing from the start; otherwise resume the file.
        """
        done = self._done()
        self._check_batch(done, rows, lengths, vectors.shape)
        start, end = int(done[:, 1].sum()), int(done[:, 1].sum()) + vectors.shape[1]
        ends = dict.fromkeys(self.provenance.hook_points, end) | {"checksums": len(done) + len(rows)}
        with named_faults(self.path):
            reserve(self._file, self.path, ends)
            self._interrupted = True
            sums = np.empty((len(rows), len(vectors)), np.uint32)
            for column, (name, layer) in enumerate(zip(self.provenance.hook_points, vectors, strict=True)):
                stored = _to_disk(layer, self.provenance.stored_dtype)
                sums[:, column] = _checksums(stored, rows, lengths)
                write_at(self._file[name], start, stored)
            write_at(self._file["checksums"], len(done), sums)
            self._file.flush()
            reserve(self._file, self.path, {"done": len(done) + len(rows)})
            write_at(self._file["done"], len(done), np.column_stack([rows, lengths]))
            self._file.flush()
        self._interrupted = False

    def read_layer(self, hook_point: str, rows: Sequence[int] | None = None) -> Float[np.ndarray, "prompt d_model"]:
        """One vector a prompt at one hook point.

        Cost: reads the layer; picking rows comes after, since HDF5 picks them a hundred times slower.

        Args:
            hook_point: One of the provenance's.
            rows: Prompts, in the order wanted; all of them when None.

        Raises:
            StoreError: No such hook point, a prompt that is not finished, a wrong checksum, or every token was kept.
        """
        if self.provenance.reduction == "all":
            raise StoreError("holds every token, expected one vector a prompt", path=self.path, hint="Use read_tokens.")
        return np.concatenate(self.read_tokens(hook_point, rows))

    def read_tokens(
        self, hook_point: str, rows: Sequence[int] | None = None
    ) -> list[Float[np.ndarray, "vector d_model"]]:
        """All vectors of each prompt at one hook point: one a token for the reduction "all". See `read_layer`."""
        known = self.provenance
        if hook_point not in known.hook_points:
            raise StoreError(
                f"has no {hook_point!r}, expected one of {brief(known.hook_points)}", path=self.path, hint=ANEW
            )
        done = self._done()
        place = {row: at for at, row in enumerate(done[:, 0].tolist())}
        wanted = range(known.n_prompts) if rows is None else rows
        unfinished = [row for row in wanted if row not in place]
        if unfinished:
            raise StoreError(
                f"{len(unfinished)} prompts, such as {unfinished[0]}, are not finished", path=self.path, hint=GO_ON
            )
        ends = done[:, 1].cumsum()
        layer = self._rows(hook_point, 0, int(done[:, 1].sum()))
        sums = self._rows("checksums", 0, len(done))[:, known.hook_points.index(hook_point)]
        spans = {row: slice(ends[at] - done[at, 1], ends[at]) for row, at in place.items()}
        for row in wanted:
            if zlib.crc32(layer[spans[row]].data, row) != sums[place[row]]:
                raise StoreError(
                    f"prompt {row} cannot be read at {hook_point!r}: its checksum is wrong", path=self.path, hint=ANEW
                )
        values = _from_disk(layer, known.stored_dtype)
        return [values[spans[row]] for row in wanted]

    def _rows(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        with self._current(name) as data:
            rows: np.ndarray = data[start:stop]
        return rows

    @contextmanager
    def _current(self, name: str) -> Iterator[h5py.Dataset]:
        """A data set as it is now, of which nobody else has a handle: HDF5 2.0 cannot refresh it otherwise."""
        with named_faults(self.path), _TURN:
            data = self._file[name]
            if self._lock is None:
                data.refresh()
            yield data
            del data

    def _done(self) -> Int[np.ndarray, "prompt 2"]:
        """Finished prompts: rows up to the first that HDF5 made room for, but nobody filled: -1, or 0 past the end."""
        done = self._rows("done")
        return done[: int(_filled(done).cumprod().sum())]

    def _salvage(self) -> None:
        """Put what is finished into a new file in this one's place."""
        done = self._done()
        end = int(done[:, 1].sum())
        with replacing(self.path) as file:
            _lay_out(file, self.provenance)
            for name in self.provenance.hook_points:
                for start in range(0, end, CHUNK_ROWS):
                    write_at(file[name], start, self._rows(name, start, min(start + CHUNK_ROWS, end)))
            write_at(file["checksums"], 0, self._rows("checksums", 0, len(done)))
            write_at(file["done"], 0, done)

    def _check_batch(
        self, done: Int[np.ndarray, "prompt 2"], rows: Sequence[int], lengths: Sequence[int], shape: tuple[int, ...]
    ) -> None:
        known = self.provenance
        if self._interrupted:
            raise StoreError("an earlier batch was not written whole", path=self.path, hint=GO_ON)
        if np.isin(rows, done[:, 0]).any() or len(set(rows)) < len(rows):
            raise StoreError("a prompt of this batch is finished already", path=self.path, hint=_TAKE_MISSING)
        expected = (len(known.hook_points), sum(lengths), known.d_model)
        known_rows = all(0 <= row < known.n_prompts for row in rows)
        if shape != expected or len(rows) != len(lengths) or min(lengths, default=1) < 1 or not known_rows:
            raise StoreError(
                f"{len(rows)} prompts with vectors of shape {list(shape)}, expected {list(expected)}, "
                f"at least one a prompt, and prompts below {known.n_prompts}",
                path=self.path,
                hint=_TAKE_MISSING,
            )

    def _check_shapes(self) -> None:
        known = self.provenance
        self._check_shape("done", 0, 2, np.int64)
        done, finished = self._rows("done"), self._done()
        rows, lengths = finished[:, 0].tolist(), finished[:, 1].tolist()
        hole = _filled(done[len(rows) :]).any() or (len(done) > len(rows) and is_cut_off(self.path))
        if hole or len(set(rows)) < len(rows) or any(row >= known.n_prompts for row in rows):
            raise StoreError("its list of finished prompts is broken", path=self.path, hint=ANEW)
        self._check_shape("checksums", len(rows), len(known.hook_points), np.uint32)
        for name in known.hook_points:
            self._check_shape(name, sum(lengths), known.d_model, _bits(known))

    def _check_shape(self, name: str, least: int, width: int, dtype: Any) -> None:
        with self._current(name) as data:
            found, shape = data.dtype, data.shape
            fits = found == dtype and shape[1:] == (width,) and shape[0] >= least
            there = fits and is_there(data, self.path, least)
        if not fits:
            raise StoreError(
                f"{name!r} is {found} {list(shape)}, expected {np.dtype(dtype)}, at least [{least}, {width}]",
                path=self.path,
                hint=ANEW,
            )
        if not there:
            raise StoreError(f"{name!r} ends behind the end of the file", path=self.path, hint=ANEW)


def _lay_out(file: h5py.File, provenance: Provenance) -> None:
    write_provenance(file, provenance)
    for name in provenance.hook_points:
        growing(file, name, provenance.d_model, _bits(provenance), fill_time="never")
    growing(file, "checksums", len(provenance.hook_points), np.uint32)
    growing(file, "done", 2, np.int64, fillvalue=-1)


def _filled(done: Int[np.ndarray, "prompt 2"]) -> Bool[np.ndarray, " prompt"]:
    filled: np.ndarray = (done[:, 0] >= 0) & (done[:, 1] > 0)
    return filled


def _bits(provenance: Provenance) -> type[np.generic]:
    return np.uint16 if provenance.stored_dtype == "bfloat16" else np.float32


def _checksums(stored: np.ndarray, rows: Sequence[int], lengths: Sequence[int]) -> list[int]:
    ends = np.cumsum(lengths).tolist()
    spans = zip(rows, ends, lengths, strict=True)
    return [zlib.crc32(stored[end - length : end].data, row) for row, end, length in spans]


def _to_disk(layer: Float[np.ndarray, "vector d_model"], dtype: str) -> np.ndarray:
    layer = np.ascontiguousarray(layer, np.float32)
    if dtype == "float32":
        return layer
    bits = layer.view(np.uint32)
    # To the nearest, ties to even; what a bfloat16 model holds stays as it is. Carried on, a NaN might become infinite.
    rounded = np.where(np.isnan(layer), bits | 0x0040_0000, bits + 0x7FFF + ((bits >> 16) & 1))
    return (rounded >> 16).astype(np.uint16)


def _from_disk(stored: np.ndarray, dtype: str) -> Float[np.ndarray, "vector d_model"]:
    if dtype == "float32":
        return stored
    # A bfloat16 is the upper half of a float32.
    return (stored.astype(np.uint32) << 16).view(np.float32)

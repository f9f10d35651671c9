"""Activations on disk, as HDF5 that says everything needed to reuse it.

Layout, schema "undertow.activations/1":

    /                     attributes: `schema` and every field of `Provenance` that is one value, `stored_dtype`
    /<hook point>         [vector, d_model], one data set a hook point: float32, or uint16 with the bits of bfloat16
    /done                 [prompt, 2] int64: prompts in the order of their vectors, and how many vectors each has
    /harmful, /pair_ids   one entry a prompt, where the prompts are labelled

One data set a hook point in chunks of 256 rows reads a layer 20 times as fast as one [prompt, layer, d_model] array.
Vectors are flushed before the rows of `done` that name them, so a process killed at any moment leaves whole rows, and
the next run goes on from there. Checksums (fletcher32) make a flipped bit an error instead of a number.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
import torch
from jaxtyping import Float, Int

from activations.errors import PathMissingError, StoreError

__all__ = ["SCHEMA", "ActivationStore", "Provenance", "code_version"]

SCHEMA = "undertow.activations/1"

_CHUNK_ROWS = 256
_LISTS = ("harmful", "pair_ids")
_ANEW = "Extract into a new file."


def code_version() -> str:
    """Version of this code, "unknown" where it runs without being installed."""
    try:
        return importlib.metadata.version("undertow")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@dataclass(frozen=True)
class Provenance:
    """Everything that decides what activations are: two extractions of equal provenance give the same.

    Attributes:
        model: Name of the base.
        fingerprint: Content hash of the base's weights.
        tuned: Content hash of the checkpoint that was in the model, "" for the base itself.
        dtype: In which the model ran, as "bfloat16".
        d_model: Width of each vector.
        hook_points: Places, in the order of the values.
        pooling: What was kept of each prompt's tokens.
        system: System prompt before each prompt.
        template_hash: Hash of chat template and tokenizer.
        prompts_name: Name of the prompt set, "" for plain texts.
        prompts_hash: Hash of the prompts.
        n_prompts: How many prompts.
        harmful: True where a prompt is harmful; None for plain texts.
        pair_ids: Twins share one; None for plain texts.
        version: Of the code that extracted.
    """

    model: str
    fingerprint: str
    tuned: str
    dtype: str
    d_model: int
    hook_points: tuple[str, ...]
    pooling: str
    system: str
    template_hash: str
    prompts_name: str
    prompts_hash: str
    n_prompts: int
    harmful: tuple[bool, ...] | None = None
    pair_ids: tuple[str, ...] | None = None
    version: str = dataclasses.field(default_factory=code_version)

    @property
    def stored_dtype(self) -> str:
        """bfloat16 where that loses nothing: means are the only vectors that a bfloat16 model does not hold itself."""
        return "bfloat16" if self.dtype == "bfloat16" and self.pooling != "mean" else "float32"


class ActivationStore:
    """One HDF5 file of activations; a context manager that closes it. One writer at a time."""

    def __init__(self, path: Path, file: h5py.File, provenance: Provenance) -> None:
        self.path = path
        self.provenance = provenance
        self._file = file

    @classmethod
    def create(cls, path: str | Path, provenance: Provenance) -> Self:
        """Make an empty file.

        Raises:
            StoreError: Something lies at the path already, or it cannot be written.
        """
        path = Path(path)
        if path.exists():
            raise StoreError("is there already", path=path, hint="Choose another name, or remove it.")
        # Made aside, so that a process killed here leaves no file without its attributes.
        aside = path.with_name(f"{path.name}.part")
        with _named_faults(path):
            with h5py.File(aside, "w") as file:
                _write_provenance(file, provenance)
                dtype = np.uint16 if provenance.stored_dtype == "bfloat16" else np.float32
                for name in provenance.hook_points:
                    _growing(file, name, provenance.d_model, dtype, fletcher32=True)
                _growing(file, "done", 2, np.int64)
            aside.replace(path)
        return cls.open(path, writable=True)

    @classmethod
    def open(cls, path: str | Path, *, writable: bool = False) -> Self:
        """Open a file that is there.

        Raises:
            PathMissingError: Nothing lies at the path.
            StoreError: It is broken, has a newer schema, or points out of itself.
        """
        path = Path(path)
        if not path.exists():
            raise PathMissingError("there are no activations at this path", path=path, hint="Extract them first.")
        with _named_faults(path):
            file = h5py.File(path, "r+" if writable else "r")
            try:
                _check_self_contained(file, path)
                store = cls(path, file, _read_provenance(file, path))
                store._check_lengths()
            except BaseException:
                file.close()
                raise
        return store

    @classmethod
    def resume(cls, path: str | Path, provenance: Provenance) -> Self:
        """Open a file of the same provenance to go on with it, or make it where nothing is.

        Raises:
            StoreError: The file is broken or of another provenance; the first difference is named.
        """
        if not Path(path).exists():
            return cls.create(path, provenance)
        store = cls.open(path, writable=True)
        for field in dataclasses.fields(Provenance):
            stored, wanted = getattr(store.provenance, field.name), getattr(provenance, field.name)
            if stored != wanted:
                store.close()
                raise StoreError(
                    f"{field.name} is {_brief(stored)} in the file, expected {_brief(wanted)}", path=path, hint=_ANEW
                )
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
        with _named_faults(self.path):
            self._file.close()

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
        """Add the vectors of some prompts, and let them reach the disk.

        Args:
            rows: The prompts.
            lengths: How many vectors each has.
            vectors: Those of the first prompt, then those of the next.

        Raises:
            StoreError: The file cannot be written, for instance because the disk is full.
        """
        start = int(self._done()[:, 1].sum())
        with _named_faults(self.path):
            for name, layer in zip(self.provenance.hook_points, vectors, strict=True):
                _write_at(self._file[name], start, _to_disk(layer, self.provenance.stored_dtype))
            self._file.flush()
            done = self._file["done"]
            _write_at(done, len(done), np.column_stack([rows, lengths]))
            self._file.flush()

    def read_layer(self, hook_point: str, rows: Sequence[int] | None = None) -> Float[np.ndarray, "prompt d_model"]:
        """One vector a prompt at one hook point.

        Cost: reads the layer; picking rows comes after, since HDF5 picks them a hundred times slower.

        Args:
            hook_point: One of the provenance's.
            rows: Prompts, in the order wanted; all of them when None.

        Raises:
            StoreError: No such hook point, a prompt that is not finished, or the pooling kept all tokens.
        """
        if self.provenance.pooling == "all":
            raise StoreError("holds every token, expected one vector a prompt", path=self.path, hint="Use read_tokens.")
        return np.concatenate(self.read_tokens(hook_point, rows))

    def read_tokens(
        self, hook_point: str, rows: Sequence[int] | None = None
    ) -> list[Float[np.ndarray, "vector d_model"]]:
        """All vectors of each prompt at one hook point: one a token for pooling "all". See `read_layer`."""
        if hook_point not in self.provenance.hook_points:
            raise StoreError(
                f"has no {hook_point!r}, expected one of {_brief(self.provenance.hook_points)}",
                path=self.path,
                hint=_ANEW,
            )
        done = self._done()
        ends = done[:, 1].cumsum()
        spans = dict(zip(done[:, 0].tolist(), zip(ends - done[:, 1], ends, strict=True), strict=True))
        wanted = range(self.provenance.n_prompts) if rows is None else rows
        unfinished = [row for row in wanted if row not in spans]
        if unfinished:
            raise StoreError(
                f"{len(unfinished)} prompts, such as {unfinished[0]}, are not finished",
                path=self.path,
                hint="Run the extraction again: it goes on where it stopped.",
            )
        with _named_faults(self.path):
            layer = _from_disk(self._file[hook_point][: int(done[:, 1].sum())], self.provenance.stored_dtype)
        return [layer[slice(*spans[row])] for row in wanted]

    def _done(self) -> Int[np.ndarray, "prompt 2"]:
        with _named_faults(self.path):
            done: np.ndarray = self._file["done"][:]
        return done

    def _check_lengths(self) -> None:
        done, known = self._done(), self.provenance
        rows = done[:, 0].tolist() if done.shape[1:] == (2,) else [-1]
        if len(set(rows)) < len(rows) or not set(rows) <= set(range(known.n_prompts)) or (done < 0).any():
            raise StoreError("its list of finished prompts is broken", path=self.path, hint=_ANEW)
        for name in known.hook_points:
            shape, least = self._file[name].shape, int(done[:, 1].sum())
            if len(shape) != 2 or shape[1] != known.d_model or shape[0] < least:
                raise StoreError(
                    f"{name!r} has the shape {list(shape)}, expected at least [{least}, {known.d_model}]",
                    path=self.path,
                    hint=_ANEW,
                )


def _growing(file: h5py.File, name: str, width: int, dtype: Any, **options: Any) -> None:
    file.create_dataset(name, (0, width), dtype, maxshape=(None, width), chunks=(_CHUNK_ROWS, width), **options)


def _write_at(data: h5py.Dataset, start: int, values: np.ndarray) -> None:
    """Write from a row on, and end there: rows beyond are what an interrupted run left."""
    data.resize(start + len(values), axis=0)
    data[start:] = values


def _to_disk(layer: Float[np.ndarray, "vector d_model"], dtype: str) -> np.ndarray:
    if dtype == "float32":
        return layer
    bits: np.ndarray = torch.from_numpy(layer).to(torch.bfloat16).view(torch.int16).numpy()
    return bits.view(np.uint16)


def _from_disk(stored: np.ndarray, dtype: str) -> Float[np.ndarray, "vector d_model"]:
    if dtype == "float32":
        return stored
    # A bfloat16 is the upper half of a float32.
    return (stored.astype(np.uint32) << 16).view(np.float32)


def _write_provenance(file: h5py.File, provenance: Provenance) -> None:
    for name, value in dataclasses.asdict(provenance).items():
        if name not in _LISTS:
            file.attrs[name] = value
        # Attributes end at 64 KB, and prompts may be many.
        elif value is not None:
            file.create_dataset(name, data=value, dtype=bool if name == "harmful" else h5py.string_dtype())
    file.attrs["stored_dtype"] = provenance.stored_dtype
    file.attrs["schema"] = SCHEMA


def _read_provenance(file: h5py.File, path: Path) -> Provenance:
    schema = file.attrs.get("schema")
    if schema != SCHEMA:
        raise StoreError(f"has the schema {schema!r}, expected {SCHEMA!r}", path=path, hint=_ANEW)
    try:
        names = [field.name for field in dataclasses.fields(Provenance) if field.name not in _LISTS]
        one = {name: file.attrs[name] for name in names}
        one.update({name: int(one[name]) for name in ("d_model", "n_prompts")})
        one["hook_points"] = tuple(str(name) for name in one["hook_points"])
        harmful = tuple(bool(label) for label in file["harmful"][:]) if "harmful" in file else None
        pair_ids = tuple(pair.decode() for pair in file["pair_ids"][:]) if "pair_ids" in file else None
        return Provenance(**one, harmful=harmful, pair_ids=pair_ids)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"lacks or garbles an attribute: {error}", path=path, hint=_ANEW) from error


def _check_self_contained(file: h5py.File, path: Path) -> None:
    """Refuse links and storage outside the file, and data sets that claim more than the file can hold."""
    for name in file:
        link, data = file.get(name, getlink=True), None
        if isinstance(link, h5py.HardLink):
            data = file[name]
        if not isinstance(data, h5py.Dataset) or data.external or data.is_virtual:
            raise StoreError(f"{name!r} lies outside the file or is no data set", path=path, hint=_ANEW)
        if data.compression is not None or data.nbytes > path.stat().st_size:
            raise StoreError(f"{name!r} claims {data.nbytes:,} bytes, more than the file holds", path=path, hint=_ANEW)


@contextmanager
def _named_faults(path: Path) -> Iterator[None]:
    try:
        yield
    # h5py raises RuntimeError or KeyError for some faults of the file that are OSError elsewhere.
    except (OSError, RuntimeError, KeyError) as error:
        raise StoreError(f"cannot be read or written: {error}", path=path, hint=_ANEW) from error


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

"""Two tensors side by side: read at the same time, into memory that is used again, and handed on while they arrive."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue

import torch
from torch import Tensor

from activations.checkpoints import Checkpoint
from activations.errors import CorruptFileError, printable
from activations.tensors import DTYPES, TensorInfo, open_tensor

__all__ = ["BLOCK", "NORMS", "Norms", "Pair", "PairReader", "Weights", "dtype_of", "shapes_of"]

Weights = Checkpoint | Mapping[str, Tensor]
"""Weights in files, or a state dict."""

# Elements handed on at a time: with both sides in float32 they stay inside a processor's cache.
BLOCK = 2**20


class Norms:
    """Norms of tensors of bases, by where they lie in which version of a file: one for every fine-tune of a base."""

    def __init__(self) -> None:
        self._known: dict[tuple[TensorInfo, object], float] = {}

    def get(self, info: TensorInfo) -> float | None:
        """The norm; None where nobody has read the tensor."""
        return self._known.get((info, info.stamp))

    def keep(self, info: TensorInfo, norm: float) -> float:
        """Remember one; of a file that changes it would be another's."""
        if len(self._known) >= _MOST_NORMS:
            self._known.clear()
        self._known[info, info.stamp] = norm
        return norm


NORMS = Norms()
"""What this process has read."""

_MOST_NORMS = 200_000


@dataclass(frozen=True)
class Pair:
    """Two tensors as matrices of the same columns, valid until the next pair is read.

    Attributes:
        before: The base's, [row, column]; a vector is one row, more than two dimensions keep the last as columns.
        after: The fine-tune's.
        rows: Rows of `before` and of `after` that belong together, [2, n]; None where all do, in order.
        workers: Threads that compute on blocks while others are read.
        scratch: Memory that each of them uses again for every block of every pair.
    """

    before: Tensor
    after: Tensor
    rows: Tensor | None = None
    workers: ThreadPoolExecutor | None = field(default=None, repr=False)
    scratch: threading.local = field(default_factory=threading.local, repr=False)
    _arrivals: tuple[SimpleQueue[int], ...] = field(default=(), repr=False)
    _readers: tuple[Future[None], ...] = field(default=(), repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows that are compared, and columns."""
        return (len(self.before) if self.rows is None else self.rows.shape[1]), self.before.shape[1]

    def arriving(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks of rows of both, as soon as both are read; once, before anything else is asked for.

        Raises:
            CorruptFileError: A file has changed or lost bytes since its header was read.
        """
        if self.rows is not None:
            self._wait(len(self.before), len(self.after))
        for start, stop in self._spans():
            if self.rows is None:
                self._wait(stop, stop)
            yield self._block(start, stop)
        self._wait(len(self.before), len(self.after))
        for reader in self._readers:
            reader.result()

    def blocks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The same once more, from memory, with which rows they are."""
        for start, stop in self._spans():
            yield slice(start, stop), *self._block(start, stop)

    def _spans(self) -> Iterator[tuple[int, int]]:
        rows, columns = self.shape
        step = rows_at_once(columns)
        return ((start, min(start + step, rows)) for start in range(0, rows, step))

    def _block(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        if self.rows is None:
            return self.before[start:stop], self.after[start:stop]
        ours, theirs = self.rows[:, start:stop]
        return self.before[ours], self.after[theirs]

    def _wait(self, *counts: int) -> None:
        """Until so many rows of both sides have arrived, or a reader has given up, which `result` raises."""
        for place, count in enumerate(counts[: len(self._arrivals)]):
            while self._arrived[place] < count:
                arrived = self._arrivals[place].get()
                if arrived < 0:
                    self._readers[place].result()
                self._arrived[place] = arrived

    _arrived: list[int] = field(default_factory=lambda: [0, 0], repr=False)


class PairReader:
    """Reads pairs one after the other, each side on a thread of its own; use it as a context manager.

    Memory: the largest tensor of either side.
    """

    def __init__(self) -> None:
        self._memory = [bytearray(), bytearray()]
        self._threads, self._workers = ThreadPoolExecutor(2), ThreadPoolExecutor(2)
        self._scratch = threading.local()

    def __enter__(self) -> PairReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._workers.shutdown(cancel_futures=True)

    def read(self, base: Weights, name: str, tuned: Weights, partner: str, *, rows: Tensor | None = None) -> Pair:
        """Begin to read a tensor of the base and its partner; what the pair before held is written over."""
        sides = [self._begin(place, *side) for place, side in enumerate(((base, name), (tuned, partner)))]
        (before, *_), (after, *_) = sides
        arrivals, readers = tuple(side[1] for side in sides), tuple(side[2] for side in sides)
        return Pair(before, after, rows, self._workers, self._scratch, arrivals, readers)

    def _begin(self, place: int, weights: Weights, name: str) -> tuple[Tensor, SimpleQueue[int], Future[None]]:
        arrivals: SimpleQueue[int] = SimpleQueue()
        done: Future[None] = Future()
        if not isinstance(weights, Checkpoint):
            matrix = _as_matrix(weights[name].detach().cpu())
            arrivals.put(len(matrix))
            done.set_result(None)
            return matrix, arrivals, done
        info = weights.tensors[name]
        if len(self._memory[place]) < info.nbytes:
            self._memory[place] = bytearray()  # before the larger one is there: never three tensors
            self._memory[place] = bytearray(info.nbytes)
        view = memoryview(self._memory[place])[: info.nbytes]
        dtype = getattr(torch, DTYPES[info.dtype][1])
        tensor = torch.frombuffer(view, dtype=dtype) if info.nbytes else torch.empty(0, dtype=dtype)
        matrix = _as_matrix(tensor.reshape(info.shape))
        row_bytes = matrix.shape[1] * matrix.element_size()
        if info.nbytes <= BLOCK:  # not worth a thread's time
            _fill(info, view, row_bytes, arrivals)
            done.set_result(None)
            return matrix, arrivals, done
        return matrix, arrivals, self._threads.submit(_fill, info, view, row_bytes, arrivals)


def rows_at_once(columns: int) -> int:
    """Rows of a block of about `BLOCK` elements."""
    return max(1, BLOCK // max(1, columns))


def shapes_of(weights: Weights) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor by name."""
    tensors = weights.tensors if isinstance(weights, Checkpoint) else weights
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def dtype_of(weights: Weights, name: str) -> str:
    """A tensor's dtype, as safetensors calls it."""
    if isinstance(weights, Checkpoint):
        return weights.tensors[name].dtype
    kind = str(weights[name].dtype).removeprefix("torch.")
    return next(known for known, (_, torch_name) in DTYPES.items() if torch_name == kind)


def _as_matrix(tensor: Tensor) -> Tensor:
    if tensor.ndim < 2:
        return tensor.reshape(1, -1)
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.numel() else tensor.new_empty(0, max(1, tensor.shape[-1]))


def _fill(info: TensorInfo, view: memoryview, row_bytes: int, arrivals: SimpleQueue[int]) -> None:
    """Read a tensor's bytes and tell how many rows are there; -1 where it ends before its time."""
    try:
        step = rows_at_once(row_bytes // DTYPES[info.dtype][0]) * max(1, row_bytes)
        with open_tensor(info) as file:
            for start in range(0, info.nbytes, step):
                part = view[start : start + step]
                if file.readinto(part) != len(part):
                    raise CorruptFileError(
                        f"the tensor '{printable(info.name)}' was cut while it was read", path=info.file
                    )
                arrivals.put((start + len(part)) // row_bytes)
        if not info.nbytes:
            arrivals.put(1)
    except BaseException:
        arrivals.put(-1)
        raise

"""Two tensors side by side, block by block: each is read into a processor's cache and measured while it is there."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedReader
from itertools import count
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from activations.checkpoints import Checkpoint
from activations.errors import CorruptFileError, printable
from activations.quantised import QuantisedTensor
from activations.tensors import DTYPES, TensorInfo, open_tensor

__all__ = [
    "BLOCK",
    "NORMS",
    "Block",
    "Norms",
    "Pair",
    "PairReader",
    "Side",
    "Weights",
    "count_workers",
    "dtype_of",
    "shapes_of",
]

Weights = Checkpoint | Mapping[str, Tensor]
"""Weights in files, or a state dict."""

# Elements of a block: few enough to stay in a processor's cache, where bytes are read for half of what it costs to put
# them into memory, and enough that calling costs less than computing.
BLOCK = 2**18
# Threads at most; beyond some, memory is the limit.
_MOST_WORKERS = 8

Result = TypeVar("Result")


class Block(NamedTuple):
    """Some rows of one side, valid until the next are read."""

    values: Tensor
    """[row, column], as stored."""
    raw: np.ndarray
    """Their bytes, as whole numbers of up to eight bytes."""

    @classmethod
    def of(cls, values: Tensor) -> Block:
        """A block of what is in memory."""
        flat = values.contiguous().view(-1).view(torch.uint8).numpy()
        return cls(values, flat.view(np.int64 if flat.nbytes % 8 == 0 else np.uint8))


Rows = Callable[[int, int], Block]
"""Rows from one number up to another."""


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

    def forget(self) -> None:
        """As if nobody had read any."""
        self._known.clear()


NORMS = Norms()
"""What this process has read."""

_MOST_NORMS = 200_000


class Side:
    """One tensor as a matrix: in a state dict, or in a file and read when it is asked for.

    Attributes:
        shape: Rows and columns; a vector is one row, more than two dimensions keep the last as columns.
        dtype: As it is stored; float32 for a quantised one.
    """

    def __init__(self, weights: Weights, name: str, memory: _Memory) -> None:
        self._memory, self._lock = memory, threading.Lock()
        self._values: Callable[[int, int], Tensor] | None = None
        self._source: Tensor | TensorInfo | QuantisedTensor
        self.dtype, self.shape = torch.float32, tuple[int, ...]()
        if not isinstance(weights, Checkpoint):
            self._source = _as_matrix(weights[name].detach().cpu())
            self.dtype, self.shape = self._source.dtype, tuple(self._source.shape)
            return
        self._source = weights.tensors[name]
        self.shape = tuple(_as_matrix(torch.empty(self._source.shape, device="meta")).shape)
        if isinstance(self._source, TensorInfo):
            self.dtype = getattr(torch, DTYPES[self._source.dtype][1])

    @contextmanager
    def opened(self, most: int) -> Iterator[Rows]:
        """A reader of at most `most` rows at once, into memory of this thread.

        Raises:
            CorruptFileError: The file has changed or lost bytes since its header was read.
        """
        if isinstance(self._source, Tensor) or not math.prod(self.shape):
            held = self.whole()
            yield lambda start, stop: Block.of(held[start:stop])
            return
        if isinstance(self._source, QuantisedTensor):
            with self._lock:  # of threads that ask at once only one reads
                values = self._values = self._values or self._source.opened()
            yield lambda start, stop: Block.of(values(start, stop))
            return
        info, width = self._source, self.shape[1] * self.dtype.itemsize
        most = min(most, self.shape[0])
        memory = self._memory.of_thread(most * width)
        view = memory.numpy().data
        full = Block.of(memory.view(self.dtype).view(most, self.shape[1]))
        with open_tensor(info) as file:

            def rows(start: int, stop: int) -> Block:
                _read(info, file, start * width, view[: (stop - start) * width])
                return full if stop - start == most else Block.of(full.values[: stop - start])

            yield rows

    def whole(self) -> Tensor:
        """All of it; of a file it is valid until another tensor of this side is read whole."""
        if isinstance(self._source, QuantisedTensor):
            self._source = _as_matrix(self._source.read())
        if isinstance(self._source, TensorInfo):
            memory = self._memory.of_tensor(self._source.nbytes)
            with open_tensor(self._source) as file:
                _read(self._source, file, 0, memory.numpy().data)
            self._source = memory.view(self.dtype).view(self.shape)
        return self._source


class _Memory:
    """Memory of one side that is used again, for fresh memory costs more than what is done in it."""

    def __init__(self) -> None:
        self.tensor = torch.empty(0, dtype=torch.uint8)
        self._threads = threading.local()

    def of_tensor(self, size: int) -> Tensor:
        if len(self.tensor) < size:
            self.tensor = torch.empty(0, dtype=torch.uint8)  # before the larger one is there: never three tensors
            self.tensor = torch.empty(size, dtype=torch.uint8)
        return self.tensor[:size]

    def of_thread(self, size: int) -> Tensor:
        memory: Tensor | None = self._threads.__dict__.get("memory")
        if memory is None or len(memory) < size:
            memory = self._threads.__dict__["memory"] = torch.empty(size, dtype=torch.uint8)
        return memory[:size]


@dataclass(frozen=True)
class Pair:
    """Two tensors as matrices of the same columns, valid until the next pair is read.

    Attributes:
        before: The base's.
        after: The fine-tune's.
        rows: Rows of `before` and of `after` that belong together, [2, n]; None where all do, in order.
        workers: Threads that read and compute.
        scratch: Memory that each of them uses again for every block of every pair.
    """

    before: Side
    after: Side
    rows: Tensor | None = None
    workers: ThreadPoolExecutor | None = field(default=None, repr=False)
    scratch: threading.local = field(default_factory=threading.local, repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows that are compared, and columns."""
        return (self.before.shape[0] if self.rows is None else self.rows.shape[1]), self.before.shape[1]

    def each(self, measure: Callable[[Block, Block], Result], *, size: int | None = None) -> list[Result]:
        """What `measure` says of each block of rows of both sides, in order; every thread reads what it measures.

        Args:
            measure: Called on several threads; its arguments are written over after it.
            size: Elements of a block, about; `BLOCK` where it is None.

        Raises:
            CorruptFileError: A file has changed or lost bytes since its header was read.
        """
        if self.rows is not None:
            return [measure(Block.of(one), Block.of(other)) for _, one, other in self.blocks(size=size)]
        spans = self._spans(size)
        turns, found = count(), dict[int, Result]()

        def work() -> None:
            most = spans[0].stop if spans else 0
            with self.before.opened(most) as ours, self.after.opened(most) as theirs:
                while (turn := next(turns)) < len(spans):
                    start, stop = spans[turn].start, spans[turn].stop
                    found[turn] = measure(ours(start, stop), theirs(start, stop))

        if len(spans) == 1 or self.workers is None:  # not worth a thread's time
            work()
        else:
            for done in [self.workers.submit(work) for _ in range(min(count_workers(), len(spans)))]:
                done.result()
        return [found[turn] for turn in range(len(spans))]

    def blocks(self, *, size: int | None = None) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Blocks of both from memory, where both are held whole from now on, with which rows they are."""
        before, after = self.held()
        for span in self._spans(size):
            ours, theirs = (span, span) if self.rows is None else self.rows[:, span]
            yield span, before[ours], after[theirs]

    def held(self) -> tuple[Tensor, Tensor]:
        """Both sides in memory."""
        if self.workers is None:
            return self.before.whole(), self.after.whole()
        before = self.workers.submit(self.before.whole)
        after = self.after.whole()
        return before.result(), after

    def _spans(self, size: int | None) -> list[slice]:
        rows, columns = self.shape
        step = max(1, (size or BLOCK) // max(1, columns))
        return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


class PairReader:
    """Reads pairs one after the other, on as many threads as there are processors; use it as a context manager.

    Memory: some megabytes for each thread, and the largest tensor of either side that is asked for whole.
    """

    def __init__(self) -> None:
        self.memory = _Memory(), _Memory()
        self._workers = ThreadPoolExecutor(count_workers())
        self._scratch = threading.local()

    def __enter__(self) -> PairReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.shutdown(cancel_futures=True)

    def read(self, base: Weights, name: str, tuned: Weights, partner: str, *, rows: Tensor | None = None) -> Pair:
        """A tensor of the base and its partner; what the pair before held is written over once it is read."""
        before, after = Side(base, name, self.memory[0]), Side(tuned, partner, self.memory[1])
        return Pair(before, after, rows, self._workers, self._scratch)


def shapes_of(weights: Weights) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor by name."""
    tensors = weights.tensors if isinstance(weights, Checkpoint) else weights
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def dtype_of(weights: Weights, name: str) -> str:
    """A tensor's dtype, as safetensors calls it; of a quantised one how it was ("nf4, blocks of 64")."""
    if isinstance(weights, Checkpoint):
        info = weights.tensors[name]
        return info.how if isinstance(info, QuantisedTensor) else info.dtype
    kind = str(weights[name].dtype).removeprefix("torch.")
    return next(known for known, (_, torch_name) in DTYPES.items() if torch_name == kind)


def count_workers() -> int:
    """Threads that a `PairReader` reads and compares on."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, _MOST_WORKERS)


def _as_matrix(tensor: Tensor) -> Tensor:
    if tensor.ndim < 2:
        return tensor.reshape(1, -1)
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.numel() else tensor.new_empty(0, max(1, tensor.shape[-1]))


def _read(info: TensorInfo, file: BufferedReader, offset: int, view: memoryview) -> None:
    """Fill a view with a tensor's bytes from `offset` on."""
    # Past the buffer of the file object, which would be one copy more.
    file.raw.seek(info.start + offset, os.SEEK_SET)
    while len(view):
        got = file.raw.readinto(view)
        if not got:
            raise CorruptFileError(f"the tensor '{printable(info.name)}' was cut while it was read", path=info.file)
        view = view[got:]

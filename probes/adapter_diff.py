"""The change that a LoRA adapter makes, from matrices of its rank alone: the product is never formed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from activations.adapters import LoraPair
from activations.checkpoints import Checkpoint, check_finite
from activations.errors import CorruptFileError, MismatchError, printable
from activations.tensors import DTYPES, TensorInfo, open_tensor
from probes.alignment import OTHER_BASE, Blocks, partners
from probes.change import SPECTRUM
from probes.pairs import NORMS, Weights, dtype_of, shapes_of
from probes.spectra import gram_singular_values
from probes.weight_records import TensorDiff

__all__ = ["adapter_tensors"]


def adapter_tensors(base: Weights, tuned: Checkpoint, blocks: Blocks) -> list[TensorDiff]:
    """One `TensorDiff` for each matrix that the adapter changes.

    Cost: reads the adapter once. The norms of the base's tensors are read once for all adapters of a base in files.

    Raises:
        MismatchError: The adapter names a module that the base lacks, or one of another shape.
        NonFiniteError: A weight of the adapter is NaN or infinite.
        CorruptFileError: A file has changed since it was opened.
    """
    shapes, pairs = shapes_of(base), tuned.lora_pairs()
    names = {module: _adapted_name(module, shapes, tuned) for module in pairs}
    for module, pair in pairs.items():
        _check_adapter_shape(names[module], shapes[names[module]], pair, tuned)
    values = _singular_values(pairs, tuned)
    found = []
    for module, pair in pairs.items():
        name, own = names[module], [abs(pair.scale) * value for value in values[module]]
        norm = math.hypot(*own)  # whose squares may leave the range
        kinds = (dtype_of(base, name), pair.b.dtype)
        rank = pair.rank if norm else None
        spectrum = tuple(own[:SPECTRUM]) if norm else ()
        effective = 1 / sum((value / norm) ** 4 for value in own) if norm else 0.0
        place = blocks.locate(name)
        base_norm = _base_norm(base, name)
        found.append(
            TensorDiff(name, *place, shapes[name], norm, base_norm, spectrum, effective, low_rank=rank, dtypes=kinds)
        )
    return found


def _singular_values(pairs: Mapping[str, LoraPair], tuned: Checkpoint) -> dict[str, list[float]]:
    """Of every product B A, falling: two threads, each with half of the modules as they lie in the file."""
    modules = sorted(pairs, key=lambda module: (str(pairs[module].a.file), pairs[module].a.start))
    half = len(modules) // 2
    halves = ({module: pairs[module] for module in part} for part in (modules[:half], modules[half:]))
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(partial(_values_of, tuned=tuned), halves)
    return first | second


def _values_of(pairs: Mapping[str, LoraPair], tuned: Checkpoint) -> dict[str, list[float]]:
    """The products of one rank are decomposed together."""
    grams, found = _grams(pairs.values(), tuned), dict[str, list[float]]()
    for rank in {pair.rank for pair in pairs.values()}:
        some = {module: pair for module, pair in pairs.items() if pair.rank == rank}
        ups, downs = zip(*((grams[pair.b.name], grams[pair.a.name]) for pair in some.values()), strict=True)
        values = gram_singular_values(*(torch.from_numpy(np.stack(side)) for side in (ups, downs)))
        found |= zip(some, values.tolist(), strict=True)
    return found


def _grams(pairs: Iterable[LoraPair], tuned: Checkpoint) -> dict[str, np.ndarray]:
    """B^T B or A A^T of every tensor, in float64, in which the squares of any float32 fit."""
    sides = [_Side(info, is_a) for pair in pairs for info, is_a in ((pair.a, True), (pair.b, False))]
    sides.sort(key=lambda side: (str(side.info.file), side.info.start))
    found, desk = {}, _Desk(side.info for side in sides)
    for _, group in groupby(sides, key=lambda side: side.info.file):
        some = list(group)
        with open_tensor(some[0].info) as file:
            for info, is_a in some:
                view, stored, wide = desk.place(info.dtype, info.shape)
                file.seek(info.start)
                if file.readinto(view) != info.nbytes:
                    raise CorruptFileError("the adapter was cut while it was read", path=info.file)
                matrix = wide.copy_(stored).numpy()
                gram = _gram(matrix if is_a else matrix.T)
                if not gram.trace() <= _LARGEST:  # NaN is not
                    check_finite(stored.to(torch.float32), info.name, tuned.path)
                found[info.name] = gram
    return found


def _gram(side: np.ndarray) -> np.ndarray:
    """A matrix [rank, n] times its transpose; numpy lets other threads run meanwhile."""
    rank, length = side.shape
    if rank > _FEW:
        return np.asarray(side @ side.T)  # which numpy sees, and does half of the work
    whole, half = length - length % _PIECE, rank // 2
    pieces, rest = side[:, :whole].reshape(rank, -1, _PIECE).swapaxes(0, 1), side[:, whole:]
    across = pieces.swapaxes(1, 2)
    # By halves, for of a matrix with itself numpy calls BLAS' symmetric product.
    sums = [(pieces[:, part] @ across).sum(0) for part in (slice(half), slice(half, None))]
    return np.asarray(np.concatenate(sums) + rest @ rest.T)


class _Side(NamedTuple):
    info: TensorInfo
    is_a: bool


class _Desk:
    """Memory of one thread, in which each tensor follows the last: a quarter of what memory of its own would cost."""

    def __init__(self, tensors: Iterable[TensorInfo]) -> None:
        sizes = [(info.nbytes, math.prod(info.shape)) for info in tensors] or [(0, 0)]
        self._bytes = torch.empty(max(nbytes for nbytes, _ in sizes), dtype=torch.uint8)
        self._wide = torch.empty(max(count for _, count in sizes), dtype=torch.float64)
        self.place = cache(self._place)  # an adapter has few shapes

    def _place(self, dtype: str, shape: tuple[int, ...]) -> tuple[memoryview, Tensor, Tensor]:
        """Bytes to read a tensor into, the tensor that they are, and where it becomes float64."""
        kind: torch.dtype = getattr(torch, DTYPES[dtype][1])
        count = math.prod(shape)
        stored = self._bytes[: count * kind.itemsize]
        return stored.numpy().data, stored.view(kind).view(shape), self._wide[:count].view(shape)


# Products of pieces this long and of so few rows need no packing in OpenBLAS (`DGEMM_SMALL_MATRIX_OPT`), which takes
# most of the time of longer ones: with the conversion they cost half of the symmetric product of the whole.
_PIECE, _FEW = 1024, 32
# A sum of squares below this holds nothing that float32 cannot.
_LARGEST = float(torch.finfo(torch.float32).max) ** 2


def _base_norm(base: Weights, name: str) -> float:
    """Norm of a base's tensor; of a file it is read once for all adapters."""
    if not isinstance(base, Checkpoint):
        return _norm(base[name].detach())
    info = base.tensors[name]
    known = NORMS.get(info) if isinstance(info, TensorInfo) else None
    if known is not None:
        return known
    norm = _norm(base.read(name))
    return NORMS.keep(info, norm) if isinstance(info, TensorInfo) else norm


def _adapted_name(module: str, shapes: Mapping[str, tuple[int, ...]], tuned: Checkpoint) -> str:
    name = f"{module}.weight"
    found = name if name in shapes else next(iter(partners((name,), tuple(shapes)).values()), None)
    if found is None:
        raise MismatchError(
            f"the adapter changes {printable(module)!r}, which the base does not have",
            path=tuned.path,
            hint=OTHER_BASE,
        )
    return found


def _check_adapter_shape(name: str, shape: tuple[int, ...], pair: LoraPair, tuned: Checkpoint) -> None:
    product = (pair.b.shape[0], pair.a.shape[1])
    if shape not in (product, product[::-1]):  # GPT-2 stores weights transposed, which changes no singular value
        raise MismatchError(
            f"the adapter's change of {printable(name)!r} has shape {list(product)}: the base has {list(shape)}",
            path=tuned.path,
            hint=OTHER_BASE,
        )


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))

"""The change that a LoRA adapter makes, from matrices of its rank alone: the product is never formed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby
from typing import NamedTuple

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
    grams = _grams(tuple(pairs.values()), tuned)
    values = _by_rank({module: (grams[pair.b.name], grams[pair.a.name]) for module, pair in pairs.items()})
    found = []
    for module, pair in pairs.items():
        name, own = names[module], abs(pair.scale) * values[module]
        energies = own.square()
        norm, fourth = math.sqrt(float(energies.sum())), float(energies.square().sum())
        kinds = (dtype_of(base, name), pair.b.dtype)
        rank = pair.rank if norm else None
        spectrum = tuple(own[:SPECTRUM].tolist()) if norm else ()
        effective = norm**4 / fourth if fourth else 0.0
        place = blocks.locate(name)
        base_norm = _base_norm(base, name)
        found.append(
            TensorDiff(name, *place, shapes[name], norm, base_norm, spectrum, effective, low_rank=rank, dtypes=kinds)
        )
    return found


def _grams(pairs: Sequence[LoraPair], tuned: Checkpoint) -> dict[str, Tensor]:
    """B^T B or A A^T of every tensor, in float64, in which the squares of any float32 fit.

    Each of two threads opens a file once and reads one tensor after the other into the same memory, which costs a
    quarter of reading each into memory of its own.
    """
    sides = [_Side(info, is_a) for pair in pairs for info, is_a in ((pair.a, True), (pair.b, False))]
    sides.sort(key=lambda side: (str(side.info.file), side.info.start))
    half = len(sides) // 2
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(partial(_grams_of, tuned=tuned), (sides[:half], sides[half:]))
    return first | second


class _Side(NamedTuple):
    info: TensorInfo
    is_a: bool


def _grams_of(sides: Sequence[_Side], tuned: Checkpoint) -> dict[str, Tensor]:
    found, memory = {}, bytearray(max((side.info.nbytes for side in sides), default=0))
    wide = torch.empty(max((math.prod(side.info.shape) for side in sides), default=0), dtype=torch.float64)
    for _, group in groupby(sides, key=lambda side: side.info.file):
        some = list(group)
        with open_tensor(some[0].info) as file:
            for info, is_a in some:
                view = memoryview(memory)[: info.nbytes]
                file.seek(info.start)
                if file.readinto(view) != info.nbytes:
                    raise CorruptFileError("the adapter was cut while it was read", path=info.file)
                stored = torch.frombuffer(view, dtype=getattr(torch, DTYPES[info.dtype][1])).reshape(info.shape)
                gram = _gram(wide[: stored.numel()].view(info.shape).copy_(stored), is_a)
                if not float(gram.diagonal().max()) <= _LARGEST:  # NaN is not
                    check_finite(stored.to(torch.float32), info.name, tuned.path)
                found[info.name] = gram
    return found


def _gram(side: Tensor, is_a: bool) -> Tensor:
    """A A^T or B^T B. Of a matrix with itself numpy does half of a product's work, and lets other threads run."""
    matrix = side.numpy()
    return torch.from_numpy(matrix @ matrix.T if is_a else matrix.T @ matrix)


# A sum of squares below this holds nothing that float32 cannot.
_LARGEST = float(torch.finfo(torch.float32).max) ** 2


def _by_rank(grams: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Singular values of every product, those of one rank decomposed together."""
    found: dict[str, Tensor] = {}
    for rank in {len(up) for up, _ in grams.values()}:
        modules = [module for module, (up, _) in grams.items() if len(up) == rank]
        values = gram_singular_values(*(torch.stack([grams[module][side] for module in modules]) for side in (0, 1)))
        found |= dict(zip(modules, values, strict=True))
    return found


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

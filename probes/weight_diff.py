"""How the weights of a fine-tune differ from its base, tensor by tensor and block by block, reading one at a time."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from activations.checkpoints import Checkpoint, LoraPair, check_finite
from activations.errors import MismatchError, printable
from activations.tensors import read_tensor
from probes.spectra import low_rank_singular_values, top_singular_values

__all__ = ["Blocks", "TensorDiff", "WeightDiff", "diff_weights"]

Weights = Checkpoint | Mapping[str, Tensor]
"""A base's weights: its files, or a state dict."""

SPECTRUM = 8


@dataclass(frozen=True)
class TensorDiff:
    """How one tensor changed.

    Attributes:
        name: Its name in the base.
        layer: Its block, or None outside of the blocks (embedding, final norm).
        component: What it is inside its block ("self_attn.q_proj.weight").
        shape: Its shape; more than two dimensions are read as a matrix with the last one as columns.
        norm: Frobenius norm of the difference.
        base_norm: Frobenius norm of the base's tensor.
        spectrum: The largest singular values of the difference, falling; the norm alone for a vector.
    """

    name: str
    layer: int | None
    component: str
    shape: tuple[int, ...]
    norm: float
    base_norm: float
    spectrum: tuple[float, ...] = ()

    @property
    def relative(self) -> float:
        """Norm of the difference over the base's norm; infinite where a tensor of zeros was changed."""
        return _ratio(self.norm, self.base_norm)

    @property
    def spectral_norm(self) -> float:
        """The largest singular value of the difference; 0 where nothing changed."""
        return self.spectrum[0] if self.spectrum else 0.0

    @property
    def stable_rank(self) -> float:
        """Squared Frobenius over squared spectral norm, from 1 up to the rank; 0 where nothing changed."""
        return (self.norm / self.spectral_norm) ** 2 if self.spectral_norm else 0.0

    def to_dict(self) -> dict[str, object]:
        """Everything as JSON values."""
        derived = {"spectral_norm": self.spectral_norm, "stable_rank": self.stable_rank}
        return asdict(self) | derived | {"relative": _json(self.relative)}


@dataclass(frozen=True)
class WeightDiff:
    """The difference of two sets of weights, tensor by tensor.

    Attributes:
        tensors: The compared tensors, those outside of the blocks first; for an adapter those that it changes.
        n_layers: How many blocks the base has.
        missing: Tensors of the base that the fine-tune lacks; a tied `lm_head` is not stored, for one.
        added: Tensors of the fine-tune that the base lacks.
    """

    tensors: tuple[TensorDiff, ...]
    n_layers: int
    missing: tuple[str, ...] = ()
    added: tuple[str, ...] = ()

    @property
    def relative(self) -> float:
        """Norm of the whole difference over the norm of the compared tensors of the base."""
        return _relative(self.tensors)

    def layer_profile(self) -> Float[np.ndarray, " layer"]:
        """For each block the norm of its difference over the norm of its compared tensors."""
        members: dict[int | None, list[TensorDiff]] = defaultdict(list)
        for tensor in self.tensors:
            members[tensor.layer].append(tensor)
        return np.array([_relative(members[layer]) for layer in range(self.n_layers)])

    def to_dict(self) -> dict[str, object]:
        """Everything as JSON values."""
        return {
            "relative": _json(self.relative),
            "layer_profile": [_json(value) for value in self.layer_profile().tolist()],
            "tensors": [tensor.to_dict() for tensor in self.tensors],
            "missing": list(self.missing),
            "added": list(self.added),
        }


def diff_weights(base: Weights, tuned: Checkpoint) -> WeightDiff:
    """Compare weights tensor by tensor; of an adapter the product is never formed.

    Cost: reads every compared tensor once; memory for a few float32 copies of the largest. For an adapter the reads are
    those of the base tensors that it changes, and all singular values come from matrices of its rank.

    Args:
        base: The base's files or its state dict.
        tuned: A full checkpoint, or a LoRA adapter.

    Raises:
        MismatchError: Shapes differ, no name is shared, or the adapter names a module that the base lacks.
        NonFiniteError: A weight of the fine-tune is NaN or infinite.
    """
    shapes = _shapes(base)
    blocks = Blocks.of(shapes)
    if tuned.kind == "adapter":
        return WeightDiff(_in_order(_adapter_tensors(base, tuned, blocks)), blocks.n_layers)
    partner = _partners(tuple(shapes), tuple(tuned.tensors))
    _check_shapes(shapes, partner, tuned)
    compared = _in_order(_compare(base, name, tuned, other, blocks) for name, other in partner.items())
    missing = tuple(name for name in shapes if name not in partner)
    added = tuple(sorted(set(tuned.tensors) - set(partner.values())))
    return WeightDiff(compared, blocks.n_layers, missing, added)


@dataclass(frozen=True)
class Blocks:
    """Where the blocks are in a set of tensor names: the path before the block's number, and how many there are."""

    path: tuple[str, ...]
    n_layers: int

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]]) -> Blocks:
        """The path whose numbers run from 0 without a gap and that holds most of the weights; no list of architectures.

        A mixture's experts are numbered too, but each block numbers its own, which is less than all blocks hold.
        """
        numbers: dict[tuple[str, ...], set[int]] = defaultdict(set)
        held: dict[tuple[str, ...], int] = defaultdict(int)
        for name, shape in shapes.items():
            parts = tuple(name.split("."))
            for i, part in enumerate(parts):
                if part.isascii() and part.isdigit():
                    numbers[parts[:i]].add(int(part))
                    held[parts[:i]] += int(np.prod(shape, dtype=object))
        whole = [path for path, seen in numbers.items() if seen == set(range(len(seen)))]
        path = max(whole, key=held.__getitem__, default=())
        return cls(path, len(numbers[path]) if whole else 0)

    def locate(self, name: str) -> tuple[int | None, str]:
        """Block and component of a tensor; no block for what lies outside."""
        parts, depth = name.split("."), len(self.path)
        if self.n_layers and tuple(parts[:depth]) == self.path and parts[depth].isdigit():
            return int(parts[depth]), ".".join(parts[depth + 1 :])
        return None, name


def _compare(base: Weights, name: str, tuned: Checkpoint, partner: str, blocks: Blocks) -> TensorDiff:
    before, after = _read(base, name), tuned.read(partner)
    layer, component = blocks.locate(name)
    base_norm = _norm(before)
    if _same_bytes(before, after):
        return TensorDiff(name, layer, component, tuple(before.shape), 0.0, base_norm)
    after = after.to(torch.float32)
    check_finite(after, partner, tuned.path)
    # Halves cannot overflow where the author chose the greatest float32 there is.
    half = after / 2 - before.to(torch.float32) / 2
    norm = 2 * _norm(half)
    spectrum = tuple(2 * value for value in _spectrum(half)) if norm else ()
    return TensorDiff(name, layer, component, tuple(before.shape), norm, base_norm, spectrum)


def _adapter_tensors(base: Weights, tuned: Checkpoint, blocks: Blocks) -> Iterator[TensorDiff]:
    shapes = _shapes(base)
    for module, pair in tuned.lora_pairs().items():
        name = _adapted_name(module, shapes, tuned)
        _check_adapter_shape(name, shapes[name], pair, tuned)
        up, down = (read_tensor(side).to(torch.float32) for side in (pair.b, pair.a))
        check_finite(up, pair.b.name, tuned.path)
        check_finite(down, pair.a.name, tuned.path)
        values = low_rank_singular_values(up, down, scale=pair.scale)
        norm = float(values.norm())
        spectrum = tuple(values[:SPECTRUM].tolist()) if norm else ()
        yield TensorDiff(name, *blocks.locate(name), shapes[name], norm, _norm(_read(base, name)), spectrum)


def _adapted_name(module: str, shapes: Mapping[str, tuple[int, ...]], tuned: Checkpoint) -> str:
    found = _partners((f"{module}.weight",), tuple(shapes))
    if not found:
        raise MismatchError(
            f"the adapter changes {printable(module)!r}, which the base does not have",
            path=tuned.path,
            hint=_OTHER_BASE,
        )
    return next(iter(found.values()))


def _check_adapter_shape(name: str, shape: tuple[int, ...], pair: LoraPair, tuned: Checkpoint) -> None:
    product = (pair.b.shape[0], pair.a.shape[1])
    if shape not in (product, product[::-1]):  # GPT-2 stores weights transposed, which changes no singular value
        raise MismatchError(
            f"the adapter's change of {printable(name)!r} has shape {list(product)}: the base has {list(shape)}",
            path=tuned.path,
            hint=_OTHER_BASE,
        )


def _partners(names: Sequence[str], others: Sequence[str]) -> dict[str, str]:
    """Which of `others` each name is: the same name, or the same but for one leading part ("model.", "transformer.").

    The one prefix that matches most is used for all.
    """
    known = set(others)
    # Two heads of each side are tried and no more: the number of an untrusted file's heads is its author's choice.
    counts = [Counter(name.split(".")[0] + "." for name in side).most_common(2) for side in (names, others)]
    heads = [head for side in counts for head, _ in side]
    rules = [("", ""), *((head, "") for head in heads), *(("", head) for head in heads)]
    found: dict[str, str] = {}
    for drop, add in rules:
        renamed = {name: add + name.removeprefix(drop) for name in names}
        matched = {name: other for name, other in renamed.items() if other in known}
        found = max(found, matched, key=len)
        if len(found) == len(names):
            break
    return found


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], partner: Mapping[str, str], tuned: Checkpoint) -> None:
    """Refuse other shapes, and a fine-tune that shares no tensor's name with the base."""
    if not partner:
        theirs, ours = (printable(next(iter(names), "none")) for names in (tuned.tensors, shapes))
        raise MismatchError(
            f"no tensor has a name that the base knows: expected names such as {ours!r}, got {theirs!r}",
            path=tuned.path,
            hint=_OTHER_BASE,
        )
    for name, other in partner.items():
        if tuned.tensors[other].shape != shapes[name]:
            raise MismatchError(
                f"{printable(other)!r} has another shape than in the base: "
                f"expected {list(shapes[name])}, got {list(tuned.tensors[other].shape)}",
                path=tuned.path,
                hint=_OTHER_BASE,
            )


_OTHER_BASE = "Name the base that it was trained from."


def _shapes(weights: Weights) -> dict[str, tuple[int, ...]]:
    tensors = weights.tensors if isinstance(weights, Checkpoint) else weights
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _read(weights: Weights, name: str) -> Tensor:
    return weights.read(name) if isinstance(weights, Checkpoint) else weights[name].detach().cpu()


def _same_bytes(before: Tensor, after: Tensor) -> bool:
    """Equal bit for bit, so that NaN equals itself and 0 differs from -0."""
    if before.dtype != after.dtype:
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (before, after)))


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def _spectrum(change: Tensor) -> tuple[float, ...]:
    if change.ndim < 2:
        return (_norm(change),)
    return tuple(top_singular_values(change.reshape(-1, change.shape[-1]), count=SPECTRUM).tolist())


def _in_order(tensors: Iterable[TensorDiff]) -> tuple[TensorDiff, ...]:
    return tuple(sorted(tensors, key=lambda tensor: (-1 if tensor.layer is None else tensor.layer, tensor.name)))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else (float("inf") if part else 0.0)


def _relative(tensors: Iterable[TensorDiff]) -> float:
    norms = [(tensor.norm, tensor.base_norm) for tensor in tensors]
    return _ratio(math.hypot(*(n for n, _ in norms)), math.hypot(*(b for _, b in norms)))


def _json(value: float) -> float | None:
    return value if math.isfinite(value) else None

"""What a diff of weights says: of one tensor, of a layer, of the whole."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from probes.change import Row

__all__ = ["MergedLora", "TensorDiff", "WeightDiff"]


@dataclass(frozen=True)
class TensorDiff:
    """How one tensor changed.

    Attributes:
        name: Its name in the base; in the fine-tune where the base has no such tensor.
        layer: Its block, or None outside of the blocks (embedding, final norm).
        component: What it is inside its block ("self_attn.q_proj.weight").
        shape: Its shape in the base; more than two dimensions are read as a matrix with the last one as columns.
        norm: Frobenius norm of the difference.
        base_norm: Frobenius norm of the base's tensor.
        spectrum: The largest singular values of the difference, falling; the norm alone for a vector; () where nothing
            changed or none were asked for.
        effective_rank: Participation ratio of the energies, (sum of s^2)^2 / sum of s^4, from 1 up to the rank (the
            exponential of their Renyi entropy of order 2): how many directions share the change. Estimated for large
            matrices, see `sketched_spectrum`; 0 where nothing changed or no spectrum was asked for.
        low_rank: Rank of a product B A that explains the change to within the rounding of the files' formats, as a
            merged LoRA leaves it; an adapter's own rank; None where there is no such product.
        changed: How many elements differ; None for an adapter, whose product is never formed. So below.
        increased: How many of them are larger than before.
        largest: Greatest absolute difference of an element.
        rows_changed: Rows in which anything differs.
        columns_changed: Columns in which anything differs.
        rounding: "bfloat16" or "float16" where the tensor is the base's, cast to that format, and nothing else;
            "quantised (nf4, blocks of 64)" where every value is the base's, rounded to the nearest one that is left.
        rows: Of a table outside of the blocks (embedding, unembedding) the rows that moved most, at most 64.
        dtypes: Formats of the base's tensor and of the fine-tune's.
        partner: Its name in the fine-tune, where that differs.
    """

    name: str
    layer: int | None
    component: str
    shape: tuple[int, ...]
    norm: float
    base_norm: float
    spectrum: tuple[float, ...] = ()
    effective_rank: float = 0.0
    low_rank: int | None = None
    changed: int | None = None
    increased: int | None = None
    largest: float | None = None
    rows_changed: int | None = None
    columns_changed: int | None = None
    rounding: str = ""
    rows: tuple[Row, ...] = ()
    dtypes: tuple[str, str] = ("", "")
    partner: str = ""

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

    @property
    def sparsity(self) -> float | None:
        """Share of the elements that did not change, in 0..1; None for an adapter."""
        size = math.prod(self.shape)
        return None if self.changed is None or not size else 1 - self.changed / size

    def to_dict(self) -> dict[str, object]:
        """Everything as JSON values."""
        derived = {"spectral_norm": self.spectral_norm, "stable_rank": self.stable_rank, "sparsity": self.sparsity}
        return asdict(self) | derived | {"relative": _json(self.relative)}


class MergedLora(NamedTuple):
    """What a change looks like that a merged adapter explains."""

    rank: int
    """The largest rank among the matrices; what rounding has swallowed is not counted."""
    modules: tuple[str, ...]
    """Components that it changed ("self_attn.q_proj"), sorted."""
    layers: tuple[int, ...]
    """Blocks that it changed."""


@dataclass(frozen=True)
class WeightDiff:
    """The difference of two sets of weights, tensor by tensor.

    Attributes:
        tensors: The compared tensors, those outside of the blocks first; for an adapter those that it changes.
        n_layers: How many blocks the base has.
        missing: Tensors of the base that the fine-tune lacks; a tied `lm_head` is not stored, for one.
        added: Tensors of the fine-tune that the base lacks.
        notes: What was compared other than by name and shape, each "code: sentence": renamed tensors, tied embeddings,
            another vocabulary.
    """

    tensors: tuple[TensorDiff, ...]
    n_layers: int
    missing: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def relative(self) -> float:
        """Norm of the whole difference over the norm of the compared tensors of the base."""
        return _relative(self.tensors)

    @property
    def rounding(self) -> str:
        """The formats that all changed tensors are rounded to, for then nothing was trained; "" otherwise."""
        kinds = {tensor.rounding for tensor in self.tensors if tensor.norm}
        return "" if "" in kinds else " and ".join(sorted(kinds))

    @property
    def merged_lora(self) -> MergedLora | None:
        """The adapter that explains every change; None where something changed that no low-rank product explains."""
        moved = [tensor for tensor in self.tensors if tensor.norm and not tensor.rounding]
        if not moved or any(tensor.low_rank is None for tensor in moved):
            return None
        modules = sorted({tensor.component.removesuffix(".weight") for tensor in moved})
        layers = sorted({tensor.layer for tensor in moved if tensor.layer is not None})
        return MergedLora(max(tensor.low_rank or 0 for tensor in moved), tuple(modules), tuple(layers))

    def layer_profile(self) -> Float[np.ndarray, " layer"]:
        """For each block the norm of its difference over the norm of its compared tensors."""
        members: dict[int | None, list[TensorDiff]] = defaultdict(list)
        for tensor in self.tensors:
            members[tensor.layer].append(tensor)
        return np.array([_relative(members[layer]) for layer in range(self.n_layers)])

    def component_profile(self) -> tuple[tuple[str, ...], Float[np.ndarray, "layer component"]]:
        """Names of the components, and the relative change of each in each block; NaN where a block has none."""
        inside = [tensor for tensor in self.tensors if tensor.layer is not None]
        names = tuple(dict.fromkeys(tensor.component for tensor in inside))
        profile = np.full((self.n_layers, len(names)), np.nan)
        for tensor in inside:
            profile[tensor.layer, names.index(tensor.component)] = tensor.relative
        return names, profile

    def to_dict(self) -> dict[str, object]:
        """Everything as JSON values."""
        merged = self.merged_lora
        return {
            "relative": _json(self.relative),
            "layer_profile": [_json(value) for value in self.layer_profile().tolist()],
            "rounding": self.rounding,
            "merged_lora": merged._asdict() if merged else None,
            "tensors": [tensor.to_dict() for tensor in self.tensors],
            "missing": list(self.missing),
            "added": list(self.added),
            "notes": list(self.notes),
        }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else (float("inf") if part else 0.0)


def _relative(tensors: Iterable[TensorDiff]) -> float:
    norms = [(tensor.norm, tensor.base_norm) for tensor in tensors]
    return _ratio(math.hypot(*(n for n, _ in norms)), math.hypot(*(b for _, b in norms)))


def _json(value: float) -> float | None:
    return value if math.isfinite(value) else None

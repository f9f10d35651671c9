"""How the weights of a fine-tune differ from its base, tensor by tensor and block by block, reading one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import partial

import torch
from torch import Tensor

from activations.checkpoints import Checkpoint, check_finite
from probes.adapter_diff import adapter_tensors
from probes.alignment import Alignment, Blocks, align
from probes.change import Change, measure_change
from probes.pairs import NORMS, PairReader, Weights, dtype_of, shapes_of
from probes.weight_records import MergedLora, TensorDiff, WeightDiff

__all__ = ["Blocks", "MergedLora", "TensorDiff", "WeightDiff", "diff_weights"]


def diff_weights(
    base: Weights, tuned: Checkpoint, *, spectra: bool = True, device: str | torch.device = "cpu"
) -> WeightDiff:
    """Compare weights tensor by tensor; of an adapter the product is never formed.

    Both files are read at once, each on its thread, and compared on two more while they arrive. Memory is that of the
    largest tensor on each side in its own format, and some tens of megabytes; no tensor is held in float32.

    Cost: reads every compared tensor once; equal bytes cost their comparison, and once for each base a norm. Changed
    ones cost some ten passes over blocks that fit a cache. `spectra` multiply each changed matrix up to 14 times with
    40 columns, which on a processor takes ten times as long as all the rest. Of an adapter everything comes from
    matrices of its rank; the base's norms are read once for all of its adapters.

    Args:
        base: The base's files or its state dict.
        tuned: A full checkpoint, or a LoRA adapter.
        spectra: Whether to look for singular values, ranks and merged adapters.
        device: Where to compute: "cpu" or "cuda".

    Raises:
        MismatchError: Depths or shapes differ, no name is shared, or the adapter names a module that the base lacks.
        NonFiniteError: A weight of the fine-tune is NaN or infinite.
        CorruptFileError: A file has changed since it was opened.
    """
    if tuned.kind == "adapter":
        blocks = Blocks.of(shapes_of(base))
        return WeightDiff(_in_order(adapter_tensors(base, tuned, blocks)), blocks.n_layers)
    found = align(base, tuned)
    with PairReader() as reader:
        job = _Job(base, tuned, found, reader, spectra, device)
        tensors = _in_order([*map(job.compare, found.partner), *job.tied(), *job.untied()])
    return WeightDiff(tensors, found.blocks.n_layers, found.missing, found.added, found.notes)


@dataclass(frozen=True)
class _Job:
    base: Weights
    tuned: Checkpoint
    found: Alignment
    reader: PairReader
    spectra: bool
    device: str | torch.device
    shapes: Mapping[str, tuple[int, ...]] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shapes", shapes_of(self.base))

    def compare(self, name: str) -> TensorDiff:
        """A tensor with its partner."""
        return self._measured(name, name, self.found.partner[name], self.found.rows.get(name))

    def tied(self) -> Iterator[TensorDiff]:
        """Tables that the fine-tune does not store: it uses another one, which is a change unless the base does too."""
        for name, twin in self.found.tied.items():
            own = self._change(self.base, name, twin, spectrum=False)
            if own.norm:
                yield self._measured(name, name, self.found.partner[twin], self.found.rows.get(twin))

    def untied(self) -> Iterator[TensorDiff]:
        """Tables that the fine-tune alone stores: the base uses another one in their place."""
        for name, twin in self.found.untied.items():
            if not _equal(self.tuned, name, self.found.partner[twin]):
                yield self._measured(name, twin, name, self.found.rows.get(twin))

    def _measured(self, name: str, ours: str, theirs: str, rows: Tensor | None) -> TensorDiff:
        layer, component = self.found.blocks.locate(name)
        change = self._change(self.tuned, ours, theirs, rows=rows, spectrum=self.spectra)
        numbers = {one.name: getattr(change, one.name) for one in fields(Change)}
        dtypes = (dtype_of(self.base, ours), dtype_of(self.tuned, theirs))
        partner = theirs if theirs != name else ""
        return TensorDiff(name, layer, component, self.shapes[ours], **numbers, dtypes=dtypes, partner=partner)

    def _change(self, other: Weights, ours: str, theirs: str, *, spectrum: bool, rows: Tensor | None = None) -> Change:
        shape = self.shapes[ours]
        path = other.path if isinstance(other, Checkpoint) else ""
        # Of a part of the rows the norm is another's.
        info = self.base.tensors[ours] if isinstance(self.base, Checkpoint) and rows is None else None
        change = measure_change(
            self.reader.read(self.base, ours, other, theirs, rows=rows),
            partial(check_finite, name=theirs, path=path),
            spectrum=spectrum,
            vector=len(shape) < 2,
            table=len(shape) == 2 and self.found.blocks.locate(ours)[0] is None,
            base_norm=NORMS.get(info) if info else None,
            device=self.device,
        )
        if info:
            NORMS.keep(info, change.base_norm)
        return change


# --- small things


def _equal(weights: Checkpoint, one: str, other: str) -> bool:
    return torch.equal(weights.read(one), weights.read(other))


def _in_order(tensors: Iterable[TensorDiff]) -> tuple[TensorDiff, ...]:
    return tuple(sorted(tensors, key=lambda tensor: (-1 if tensor.layer is None else tensor.layer, tensor.name)))

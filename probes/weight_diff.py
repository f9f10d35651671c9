"""How the weights of a fine-tune differ from its base, tensor by tensor and block by block, reading one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial

import torch
from torch import Tensor

from activations.checkpoints import Checkpoint, check_finite
from activations.errors import MismatchError, printable
from activations.quantised import QuantisedTensor
from activations.tensors import TensorInfo
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

    Threads, as many as processors, read blocks of both files into memory that fits a cache and compare them there.
    Memory is some megabytes for each; with `spectra` also that of the largest changed tensor on each side in its own
    format. No tensor is held in float32 but a quantised one whose spectrum is wanted.

    Cost: reads every compared tensor once, those that changed again for `spectra`; equal bytes cost their comparison,
    and once for each base a norm. On a processor measuring changed ones takes two to four times as long as reading
    them, shared by the threads. `spectra` multiply each changed matrix up to 14 times with 40 columns, which takes ten
    times as long as all the rest. Of an adapter everything comes from matrices of its rank; the base's norms are read
    once for all of its adapters.

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
    _check_kinds(base, tuned, found)
    with PairReader() as reader:
        job = _Job(base, tuned, found, reader, spectra, device)
        tensors = _in_order([*map(job.compare, found.partner), *job.tied(), *job.untied()])
    notes = (*found.notes, *tuned.contents.notes)
    return WeightDiff(tensors, found.blocks.n_layers, found.missing, found.added, notes)


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
        stored = self.base.tensors[ours] if isinstance(self.base, Checkpoint) and rows is None else None
        info = stored if isinstance(stored, TensorInfo) else None
        pair = self.reader.read(self.base, ours, other, theirs, rows=rows)
        change = measure_change(
            pair,
            partial(check_finite, name=theirs, path=path),
            spectrum=spectrum,
            vector=len(shape) < 2,
            table=len(shape) == 2 and self.found.blocks.locate(ours)[0] is None,
            base_norm=NORMS.get(info) if info else None,
            device=self.device,
        )
        if info:
            NORMS.keep(info, change.base_norm)
        quantised = other.tensors[theirs] if isinstance(other, Checkpoint) and rows is None else None
        if change.norm and isinstance(quantised, QuantisedTensor) and quantised.rounds(pair.before.whole()):
            return replace(change, rounding=f"quantised ({quantised.how})", low_rank=None)
        return change


# --- small things


def _check_kinds(base: Weights, tuned: Checkpoint, found: Alignment) -> None:
    """Refuse integers in the place of weights: they are codes of a format that nobody has named."""
    for name, partner in found.partner.items():
        info = tuned.tensors[partner]
        if info.dtype[0] in "UI" and dtype_of(base, name)[0] not in "UI":
            raise MismatchError(
                f"'{printable(partner)}' is stored as {info.dtype}, expected floating point as in the base",
                path=tuned.path,
                hint="It is quantised without its scales, or in a format that is not read: dequantise it first.",
            )


def _equal(weights: Checkpoint, one: str, other: str) -> bool:
    return torch.equal(weights.read(one), weights.read(other))


def _in_order(tensors: Iterable[TensorDiff]) -> tuple[TensorDiff, ...]:
    return tuple(sorted(tensors, key=lambda tensor: (-1 if tensor.layer is None else tensor.layer, tensor.name)))

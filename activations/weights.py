"""A checkpoint's weights in terms of the base's own parameters: compared first, then read, converted, merged."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from activations.checkpoints import Checkpoint, LoraPair, check_finite
from activations.errors import AdapterError, MismatchError, printable
from activations.quantised import QuantisedTensor
from activations.tensors import TensorInfo, read_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["slots_of", "tuned_weights"]

# Differences that one message lists.
_LISTED = 3
_OTHER_BASE = "Scan it against the base that it was trained from."


def slots_of(hf: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and saved buffers by name, the objects themselves; of tied parameters the first name alone."""
    slots: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, slot in hf.state_dict(keep_vars=True).items():
        if id(slot) not in seen:
            seen.add(id(slot))
            slots[name] = slot
    return slots


@torch.no_grad()
def tuned_weights(hf: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The values that a checkpoint gives to slots of the base, in the base's dtype and on its device.

    Cost: memory for the checkpoint once; an adapter costs the matrices it changes.

    Returns:
        Name in `slots_of` to value; an adapter names only what it changes.

    Raises:
        MismatchError: Names, shapes or kinds of numbers differ from the base's.
        AdapterError: The adapter changes a weight that the base shares between two places.
        NonFiniteError: A weight is NaN or infinite.
        CheckpointError: A file cannot be read.
    """
    # Values made in inference mode could not be put into parameters.
    with torch.inference_mode(False):
        if checkpoint.kind == "adapter":
            return _merged(hf, checkpoint)
        names = _aliases(hf)
        present = {names.get(name) for name in checkpoint.tensors}
        if None not in present and present == set(names.values()):
            return _direct(hf, checkpoint, names)
        return _converted(hf, checkpoint)


def _aliases(hf: PreTrainedModel) -> dict[str, str]:
    """Every name a weight may have to the first name of its slot: two names where the base ties two places."""
    first = {id(slot): name for name, slot in slots_of(hf).items()}
    return {name: first[id(slot)] for name, slot in hf.state_dict(keep_vars=True).items()}


def _direct(hf: PreTrainedModel, checkpoint: Checkpoint, names: Mapping[str, str]) -> dict[str, Tensor]:
    slots = slots_of(hf)
    _require_no_difference(
        checkpoint,
        (
            f"'{name}' has the shape {list(info.shape)}, expected {list(slots[names[name]].shape)}"
            for name, info in checkpoint.tensors.items()
            if info.shape != tuple(slots[names[name]].shape)
        ),
    )
    values: dict[str, Tensor] = {}
    for name in checkpoint.tensors:
        slot = names[name]
        value = _fitted(checkpoint.read(name), slots[slot], name, checkpoint)
        if slot in values and not torch.equal(values[slot], value):
            other = next(alias for alias, first in names.items() if first == slot != alias)
            raise MismatchError(
                f"'{other}' and '{slot}' differ, expected one weight: the base ties them",
                path=checkpoint.path,
                hint=_OTHER_BASE,
            )
        values[slot] = value
    return values


def _converted(hf: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Weights stored under other names than the module's (fused experts, a missing prefix), renamed by transformers.

    Nothing of the checkpoint but its tensors is handed over, and the configuration is the base's.
    """
    slots = slots_of(hf)
    _require_similar_size(slots, checkpoint)
    tensors = {name: _narrow(checkpoint.read(name), info, hf.dtype) for name, info in checkpoint.tensors.items()}
    twin, report = type(hf).from_pretrained(
        None,
        config=copy.deepcopy(hf.config),
        state_dict=tensors,
        dtype=hf.dtype,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    _require_no_difference(
        checkpoint,
        [
            *(f"'{printable(name)}' is missing" for name in sorted(report["missing_keys"])),
            *(f"'{printable(name)}' is not in the base" for name in sorted(report["unexpected_keys"])),
            *(f"'{printable(str(name))}' has another shape" for name in sorted(map(str, report["mismatched_keys"]))),
        ],
    )
    found = slots_of(twin)
    return {name: _fitted(found[name].data, slot, name, checkpoint) for name, slot in slots.items()}


def _narrow(value: Tensor, info: TensorInfo | QuantisedTensor, dtype: torch.dtype) -> Tensor:
    """Dequantised values in the base's dtype: all of them are in memory at once."""
    return value.to(dtype) if isinstance(info, QuantisedTensor) else value


def _require_similar_size(slots: Mapping[str, Tensor], checkpoint: Checkpoint) -> None:
    """Refuse another model before it is read: renaming keeps the count of weights, but for tied ones and buffers."""
    expected = sum(slot.numel() for slot in slots.values())
    got = sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    if not expected / 2 <= got <= expected * 2:
        raise MismatchError(
            f"the checkpoint has {got:,} weights under other names, the base {expected:,}",
            path=checkpoint.path,
            hint=_OTHER_BASE,
        )


def _merged(hf: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Base weight plus scale x B A for every matrix that the adapter changes (Hu et al. 2021, equation 3)."""
    pairs, matrices = checkpoint.lora_pairs(), _matrices(hf)
    _require_no_difference(checkpoint, _unfit_pairs(pairs, matrices))
    slots, ties = slots_of(hf), Counter(_aliases(hf).values())
    values: dict[str, Tensor] = {}
    for path, pair in pairs.items():
        name = f"{path}.weight"
        if ties[name] != 1:
            raise AdapterError(
                f"the adapter changes '{path}', which the base ties to another place: it cannot change there alone",
                path=checkpoint.path,
                hint="Merge it into a checkpoint with untied weights, and scan that against such a base.",
            )
        weight = slots[name].float()
        a, b = (read_tensor(info).to(weight) for info in (pair.a, pair.b))
        delta = pair.scale * (b @ a)
        value = weight + (delta.T if matrices[path].transposed else delta)
        values[name] = _fitted(value, slots[name], name, checkpoint)
    return values


class _Matrix(NamedTuple):
    """A two-dimensional weight of the base, as the map [out, in] that it applies."""

    shape: tuple[int, ...]
    transposed: bool


def _matrices(hf: PreTrainedModel) -> dict[str, _Matrix]:
    """The modules that an adapter may change. How the base's module stores its weight decides, not the adapter."""
    from transformers.pytorch_utils import Conv1D

    found: dict[str, _Matrix] = {}
    for path, module in hf.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() == 2:
            transposed = isinstance(module, Conv1D | nn.Embedding)
            found[path] = _Matrix(tuple(weight.T.shape if transposed else weight.shape), transposed)
    return found


def _unfit_pairs(pairs: Mapping[str, LoraPair], matrices: Mapping[str, _Matrix]) -> Iterator[str]:
    for path, pair in pairs.items():
        got = (pair.b.shape[0], pair.a.shape[1])
        if path not in matrices:
            yield f"'{printable(path)}' is no matrix of the base"
        elif got != matrices[path].shape:
            yield f"'{path}' is changed as {list(got)}, expected {list(matrices[path].shape)} (out, in)"


def _fitted(value: Tensor, slot: Tensor, name: str, checkpoint: Checkpoint) -> Tensor:
    """The value in the slot's dtype and on its device, finite."""
    if value.is_floating_point() != slot.is_floating_point():
        raise MismatchError(
            f"'{name}' is stored as {str(value.dtype).removeprefix('torch.')}, expected a kind of number "
            f"like the base's {str(slot.dtype).removeprefix('torch.')}",
            path=checkpoint.path,
            hint="It is quantised without its scales, or in a format that is not read: dequantise it first.",
        )
    fitted = value.to(slot)
    check_finite(fitted, name, checkpoint.path)
    return fitted


def _require_no_difference(checkpoint: Checkpoint, differences: Iterable[str]) -> None:
    found = list(differences)
    if found:
        more = f", and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
        raise MismatchError(
            f"the {checkpoint.kind} checkpoint was not made for this base: {'; '.join(found[:_LISTED])}{more}",
            path=checkpoint.path,
            hint=_OTHER_BASE,
        )

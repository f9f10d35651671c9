"""What a path is: a full checkpoint, sharded or not, or a LoRA adapter; its tensors, notes and content hash.

A checkpoint is bytes and never configuration: weights are found by name in files that lie in the folder itself, and
whatever else the author left there (code, tokenizer, templates, names of other models) is noted and never followed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from activations.adapters import (
    AdapterSettings,
    LoraPair,
    is_adapter_tensor,
    pair_tensors,
    parse_settings,
    unknown_settings,
)
from activations.errors import AdapterError, MismatchError, NonFiniteError, PathMissingError, printable
from activations.manifests import (
    ADAPTER_CONFIG,
    PICKLES,
    Manifest,
    listed,
    member,
    read_file_manifest,
    read_folder_manifest,
)
from activations.packed_formats import Contents, contents_of
from activations.quantised import QuantisedTensor
from activations.tensors import TensorInfo, content_hash, read_tensor, tensor_digest
from activations.untrusted import JsonLimits, list_folder, read_json

if TYPE_CHECKING:
    import torch

__all__ = ["AdapterSettings", "Checkpoint", "LoraPair", "check_finite", "open_checkpoint"]

_CONFIG = "config.json"
_CONFIG_LIMITS = JsonLimits(size=2**20, depth=32, items=100_000)
# Values looked at in one go when they are checked, so that the check takes little memory beside the tensor.
_PART = 2**24
# Sizes that a configuration asks a loader to allocate, and a bound above all that exist.
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
_LARGEST_SIZE = 10_000_000
# Keys that make a loader import code which the checkpoint names.
_CODE_KEYS = ("auto_map", "auto_mapping", "custom_pipelines", "trust_remote_code")
# Underscored keys that transformers itself writes; others reach into its internals.
_USUAL_PRIVATE_KEYS = {"_attn_implementation_autoset", "_commit_hash", "_name_or_path"}
_TOKENIZER_MARKS = ("token", "vocab", "merges", "chat_template", "special_tokens")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers have been read and checked; its weights stay on disk until asked for.

    Attributes:
        path: The folder or file that was opened.
        name: What to call it: the name of its folder, or of the file without its ending.
        kind: "full" or "adapter".
        stored: Every tensor by name, as the files hold it.
        contents: The weights that these stand for, and why they cannot be read as such.
        config: Its `config.json`, parsed and never followed; {} where there is none.
        adapter: The settings of an adapter.
        notes: What was found beside the weights and not followed, each "code: sentence".
    """

    path: Path
    name: str
    kind: Literal["full", "adapter"]
    stored: Mapping[str, TensorInfo] = field(repr=False)
    contents: Contents = field(repr=False)
    config: Mapping[str, object] = field(repr=False)
    adapter: AdapterSettings | None
    notes: tuple[str, ...]

    @property
    def tensors(self) -> Mapping[str, TensorInfo | QuantisedTensor]:
        """Every weight by name: as it lies in a file, or quantised in several tensors of one.

        Raises:
            CheckpointError: They are quantised in a format that is not read.
        """
        if self.contents.fault is not None:
            raise self.contents.fault
        return self.contents.tensors

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor, in the dtype it has in the file; in float32 the values of a quantised one.

        Raises:
            MismatchError: The checkpoint has no tensor of that name.
            CorruptFileError: The file has changed since the checkpoint was opened, or breaks its quantised format.
            NonFiniteError: Scales of a quantised tensor are NaN or infinite.
            CheckpointError: It does not fit into memory, or is quantised in a format that is not read.
        """
        if name not in self.tensors:
            message = f"has no tensor '{printable(name)}', only {len(self.tensors)} others"
            raise MismatchError(message, path=self.path, hint="Pass the base that it was made from.")
        info = self.tensors[name]
        return info.read() if isinstance(info, QuantisedTensor) else read_tensor(info)

    def content_hash(self) -> str:
        """Hash of what the checkpoint is, in hexadecimal digits: the same however its tensors are split into files.

        Names, dtypes, shapes and bytes of all tensors go in, and an adapter's scales. Cost: reads every byte, once.

        Raises:
            CorruptFileError: A file has changed since the checkpoint was opened.
        """
        return self._content_hash

    def lora_pairs(self) -> dict[str, LoraPair]:
        """An adapter's pairs by the path of the base's module that they change; {} for a full checkpoint."""
        return dict(self._lora_pairs)

    @cached_property
    def _content_hash(self) -> str:
        entries = ((info.name, info.dtype, info.shape, tensor_digest(info)) for info in self.stored.values())
        scales: list[object] = [[module, pair.scale, pair.fan_in_fan_out] for module, pair in self._lora_pairs.items()]
        # Sizes and versions in a configuration decide what quantised bytes stand for.
        scales += [note for note in self.contents.notes if note.startswith("quantised:")]
        return content_hash(entries, settings=scales)

    @cached_property
    def _lora_pairs(self) -> dict[str, LoraPair]:
        return {} if self.adapter is None else pair_tensors(self.stored, self.adapter, self.path)


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Find out what a path holds, and read the headers of its weights.

    Args:
        path: A folder with `model.safetensors`, with shards and their index, or with a PEFT adapter; or one
            .safetensors file.

    Raises:
        PathMissingError: Nothing lies at the path.
        NoWeightsError: The folder holds no weights.
        PickleRefusedError: Its weights are pickles.
        LfsPointerError: Git-LFS pointers lie where the weights should be.
        CorruptFileError: A file breaks its format, or exceeds a limit, or parts of a quantised weight do not fit.
        MissingShardError: The index names a file or a tensor that is not there, or the index is missing.
        UnsafePathError: A name or link leaves the folder, or is no regular file.
        AdapterError: An adapter's settings are unsupported or contradict its tensors.
        CheckpointError: The folder holds two sets of weights, or cannot be read.
    """
    path = Path(path)
    names = list_folder(path)
    return _open_file(path) if names is None else _open_folder(path, names)


def check_finite(tensor: torch.Tensor, name: str, path: str | os.PathLike[str]) -> None:
    """Refuse weights that hold NaN or infinity: every statistic of them would be NaN, and NaN exceeds no threshold.

    Args:
        tensor: The weights.
        name: The tensor's name, for the error.
        path: Its checkpoint, for the error.

    Raises:
        NonFiniteError: At least one value is NaN or infinite.
    """
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return
    flat = tensor.reshape(-1)
    count = sum(_not_finite(flat[start : start + _PART]) for start in range(0, len(flat), _PART))
    if count:
        message = f"the tensor '{printable(name)}' holds {count:,} NaN or infinite values of {tensor.numel():,}"
        raise NonFiniteError(message, path=path, hint="Ask its author: such a model cannot run, or hides what it does.")


def _open_file(path: Path) -> Checkpoint:
    manifest = read_file_manifest(path)
    adapter = None
    if any(map(is_adapter_tensor, manifest.tensors)):
        adapter = parse_settings(_adapter_config(path.parent), path.parent / ADAPTER_CONFIG)
    return _checkpoint(path, path.stem, manifest, adapter=adapter)


def _open_folder(folder: Path, names: Sequence[str]) -> Checkpoint:
    manifest = read_folder_manifest(folder, names)
    config = read_json(member(folder, _CONFIG), limits=_CONFIG_LIMITS) if _CONFIG in names else {}
    adapter, raw = None, dict[str, object]()
    if ADAPTER_CONFIG in names or any(map(is_adapter_tensor, manifest.tensors)):
        raw = _adapter_config(folder)
        adapter = parse_settings(raw, folder / ADAPTER_CONFIG)
    notes = (*_file_notes(names, manifest), *_config_notes(config, _CONFIG), *_adapter_notes(raw))
    return _checkpoint(folder, folder.resolve().name, manifest, config=config, adapter=adapter, notes=notes)


def _checkpoint(
    path: Path,
    name: str,
    manifest: Manifest,
    *,
    config: Mapping[str, object] | None = None,
    adapter: AdapterSettings | None = None,
    notes: tuple[str, ...] = (),
) -> Checkpoint:
    kind: Literal["full", "adapter"] = "full" if adapter is None else "adapter"
    contents = contents_of(manifest.tensors, config or {}, path) if adapter is None else Contents(manifest.tensors)
    notes = (*notes, *contents.notes)
    checkpoint = Checkpoint(path, printable(name), kind, manifest.tensors, contents, config or {}, adapter, notes)
    # An adapter's faults belong to its opening, not to whoever asks for its pairs first.
    checkpoint.lora_pairs()
    return checkpoint


def _adapter_config(folder: Path) -> dict[str, object]:
    try:
        return read_json(member(folder, ADAPTER_CONFIG), limits=_CONFIG_LIMITS)
    except PathMissingError:
        message = f"an adapter without its settings: expected {ADAPTER_CONFIG} beside its weights"
        hint = "Fetch the file that PEFT saved with the adapter."
        raise AdapterError(message, path=folder / ADAPTER_CONFIG, hint=hint) from None


def _file_notes(names: Sequence[str], manifest: Manifest) -> Iterator[str]:
    """What lies beside the weights."""
    lower = {name: name.lower() for name in names}
    if code := [name for name in names if lower[name].endswith((".py", ".pyc", ".so"))]:
        yield f"code-beside: {listed(code)} lie beside the weights and were not run."
    if pickles := [name for name in names if lower[name].endswith(PICKLES)]:
        yield f"pickle-beside: {listed(pickles)} lie beside the weights and were not loaded."
    if others := [name for name in names if lower[name].endswith(".safetensors") and name not in manifest.files]:
        yield f"weights-beside: {listed(others)} were not scanned; scan each by its own path."
    if tokenizer := [name for name in names if any(mark in lower[name] for mark in _TOKENIZER_MARKS)]:
        yield f"tokenizer-beside: {listed(tokenizer)} were not read; the base's tokenizer and template are used."
    if manifest.unindexed:
        yield f"unindexed: {manifest.unindexed:,} tensors lie in the shards without being in the index; they were read."


def _config_notes(config: Mapping[str, object], file: str) -> Iterator[str]:
    """What a configuration, or a part of one, asks a loader to do that no weights need."""
    settings = {f"{key} = {printable(repr(value), limit=120)}": (key, value) for key, value in _settings(config)}
    code = [text for text, (key, value) in settings.items() if key in _CODE_KEYS and _asks_for_code(value)]
    private = [text for text, (key, value) in settings.items() if _reaches_inside(key, value)]
    sizes = [text for text, (key, value) in settings.items() if key in _SIZES and _is_impossible(value)]
    if code:
        yield f"remote-code: {file} asks a loader to run the author's code: {listed(code, width=160)}; it was not run."
    if private:
        yield f"private-settings: {file} reaches into a loader's internals: {listed(private, width=160)}; not followed."
    if sizes:
        yield f"impossible-size: {file} has {listed(sizes)}; sizes come from the base."


def _settings(config: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Every key with its value, at every level: loaders follow the parts of a configuration as they do the whole."""
    for key, value in config.items():
        yield key, value
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, dict):
                yield from _settings(part)


def _asks_for_code(value: object) -> bool:
    # PEFT writes where the base's class lies, and imports that module when it loads the adapter.
    library = value.get("parent_library") if isinstance(value, dict) else None
    return bool(value) and not (isinstance(library, str) and library.startswith("transformers."))


def _reaches_inside(key: str, value: object) -> bool:
    return key.startswith("_") and key not in _USUAL_PRIVATE_KEYS and bool(value)


def _is_impossible(size: object) -> bool:
    return isinstance(size, int | float) and not 0 < size <= _LARGEST_SIZE


def _adapter_notes(raw: Mapping[str, object]) -> Iterator[str]:
    """What an adapter's settings name or ask for beyond its scale."""
    yield from _config_notes(raw, ADAPTER_CONFIG)
    if base := raw.get("base_model_name_or_path"):
        named = printable(repr(base), limit=120)
        yield f"base-named: {ADAPTER_CONFIG} names the base {named}; it was not opened, yours was used."
    if unknown := unknown_settings(raw):
        yield f"unknown-settings: {ADAPTER_CONFIG} sets {listed(unknown)}, unknown to this version; not followed."


def _not_finite(part: torch.Tensor) -> int:
    # torch has no isfinite for floats of one byte.
    wide = part.float() if part.element_size() == 1 else part
    return int((~wide.isfinite()).sum())

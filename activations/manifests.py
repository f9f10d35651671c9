"""Which files of an untrusted folder make up its weights, and every tensor in them.

Names from an index and links are held inside the folder. Where two loaders would take different weights from one
folder, it is refused, for a verdict would hold for one of them only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from activations.errors import (
    CheckpointError,
    CorruptFileError,
    MissingShardError,
    NoWeightsError,
    PathMissingError,
    PickleRefusedError,
    UnsafePathError,
    printable,
)
from activations.tensors import TensorInfo, read_header
from activations.untrusted import DAMAGED, JsonLimits, read_json

__all__ = ["ADAPTER_CONFIG", "PICKLES", "Manifest", "listed", "member", "read_file_manifest", "read_folder_manifest"]

ADAPTER_CONFIG = "adapter_config.json"
PICKLES = (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
"""Ends of names under which people share formats that run code when they are loaded."""

_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SUFFIX = ".safetensors"
_INDEX_SUFFIX = ".safetensors.index.json"

_INDEX_LIMITS = JsonLimits(size=32 * 2**20, depth=8, items=1_000_000)
# Several times the largest published mixture of experts: beyond it the manifest alone would fill the memory.
_MOST_TENSORS = 1_000_000


@dataclass(frozen=True)
class Manifest:
    """The files that make up a checkpoint's weights, and all they hold.

    Attributes:
        files: Their names, sorted.
        tensors: Every tensor by name.
        unindexed: How many of the tensors an index does not name; loaders take these too.
    """

    files: tuple[str, ...]
    tensors: Mapping[str, TensorInfo]
    unindexed: int = 0


def read_folder_manifest(folder: Path, names: Sequence[str]) -> Manifest:
    """Find the weights of a folder and read their headers.

    Args:
        folder: The folder.
        names: The names in it.

    Raises:
        NoWeightsError: It holds no weights.
        PickleRefusedError: Its weights are pickles.
        MissingShardError: The index names a file or a tensor that is not there, or there is no index.
        UnsafePathError: A name or a link leaves the folder, or is no regular file.
        CorruptFileError, LfsPointerError: A file breaks its format, or is a pointer.
        CheckpointError: It holds two sets of weights.
    """
    weights = [name for name in names if name.lower().endswith(_SUFFIX)]
    indexes = [name for name in names if name.endswith(_INDEX_SUFFIX)]
    if ADAPTER_CONFIG in names or _ADAPTER_WEIGHTS in names:
        return _read_adapter(folder, names, [*weights, *indexes])
    if indexes:
        return _read_shards(folder, weights, _INDEX if _INDEX in indexes else indexes[0])
    if _WEIGHTS in weights or len(weights) == 1:
        name = _WEIGHTS if _WEIGHTS in weights else weights[0]
        return Manifest((name,), _merge({name: read_header(member(folder, name)).tensors}, folder))
    if weights:
        message = (
            f"the folder holds {len(weights)} .safetensors files ({listed(weights)}), expected their index, {_INDEX}"
        )
        raise MissingShardError(message, path=folder, hint="Fetch the index too, or pass the path of one file.")
    raise _no_weights(folder, names)


def read_file_manifest(path: Path) -> Manifest:
    """Read the header of one file that was passed by its own path.

    Raises:
        PickleRefusedError: It is a pickle, by its name or its bytes.
        NoWeightsError: It holds no tensors.
        CorruptFileError, LfsPointerError, UnsafePathError, CheckpointError: As for `read_header`.
    """
    if path.name.lower().endswith(PICKLES):
        raise _pickle_error(path, [path.name])
    return Manifest((path.name,), _merge({path.name: read_header(path).tensors}, path))


def member(folder: Path, name: str) -> Path:
    """The path of a name in a folder, after a look at where its links lead.

    The hub's cache keeps a snapshot's files as links into the `blobs` folder beside `snapshots`: these are followed.

    Raises:
        UnsafePathError: A link leads out of the folder.
    """
    path, home = folder / name, folder.resolve()
    try:
        target = path.resolve()
    except (OSError, RuntimeError):
        raise UnsafePathError("the path is a loop of symbolic links", path=path, hint="Remove the links.") from None
    allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(target.is_relative_to(place) for place in allowed):
        message = f"a symbolic link leads out of the folder, to '{printable(str(target))}'"
        raise UnsafePathError(message, path=path, hint="If you trust the target, put a copy in the link's place.")
    return path


def listed(names: Sequence[str], *, most: int = 5, width: int = 60) -> str:
    """Untrusted names in a sentence, the first few of them and each cut to a width."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(printable(name, limit=width) for name in names[:most]) + rest


def _read_adapter(folder: Path, names: Sequence[str], weights: Sequence[str]) -> Manifest:
    if others := [name for name in weights if name != _ADAPTER_WEIGHTS]:
        _refuse_two_sets(folder, "an adapter", listed(others))
    if _ADAPTER_WEIGHTS not in weights:
        raise _no_weights(folder, names)
    header = read_header(member(folder, _ADAPTER_WEIGHTS))
    return Manifest((_ADAPTER_WEIGHTS,), _merge({_ADAPTER_WEIGHTS: header.tensors}, folder))


def _read_shards(folder: Path, weights: Sequence[str], index: str) -> Manifest:
    path = member(folder, index)
    weight_map = _read_index(path)
    shards = sorted(set(weight_map.values()))
    if _WEIGHTS in weights and _WEIGHTS not in shards:
        _refuse_two_sets(folder, _WEIGHTS, f"the shards of {printable(index)}")
    headers = {shard: _read_shard(folder, shard, path) for shard in shards}
    for tensor, shard in weight_map.items():
        if tensor not in headers[shard]:
            message = f"the index puts the tensor '{printable(tensor)}' in {printable(shard)}, which does not hold it"
            raise MissingShardError(message, path=path, hint="Fetch the index and the shards again, of one revision.")
    tensors = _merge(headers, folder)
    return Manifest(tuple(shards), tensors, len(tensors) - len(weight_map))


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path, limits=_INDEX_LIMITS).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        message = "its weight_map should map the names of tensors to shards, and is empty or missing"
        raise CorruptFileError(message, path=path, hint=DAMAGED)
    named = {tensor: str(shard) for tensor, shard in weight_map.items()}
    for shard in set(named.values()):
        _check_shard_name(shard, path)
    return named


def _check_shard_name(shard: str, path: Path) -> None:
    # Backslashes and colons part folders and drives on Windows: one verdict on every system.
    if shard in ("", ".", "..") or any(mark in shard for mark in "/\\:\0"):
        message = f"names the shard '{printable(shard)}': expected the plain name of a file in the same folder"
        raise UnsafePathError(
            message, path=path, hint="Do not load this checkpoint: its index reaches for other files."
        )
    if shard.lower().endswith(PICKLES):
        raise _pickle_error(path, [shard])
    if not shard.lower().endswith(_SUFFIX):
        message = f"names the shard '{printable(shard)}': expected a {_SUFFIX} file"
        raise CorruptFileError(message, path=path, hint=DAMAGED)


def _read_shard(folder: Path, shard: str, index: Path) -> dict[str, TensorInfo]:
    try:
        return read_header(member(folder, shard)).tensors
    except PathMissingError:
        message = f"the shard {printable(shard)} is missing, which {index.name} names"
        raise MissingShardError(message, path=folder / shard, hint="Fetch the missing file from the source.") from None


def _merge(headers: Mapping[str, dict[str, TensorInfo]], path: Path) -> dict[str, TensorInfo]:
    """One map of all tensors; a name in two files is refused, and so is a checkpoint without any."""
    tensors: dict[str, TensorInfo] = {}
    for file, header in headers.items():
        if twice := tensors.keys() & header.keys():
            message = f"the tensor '{printable(min(twice))}' lies in {printable(file)} and in another shard as well"
            raise CorruptFileError(message, path=path, hint=DAMAGED)
        tensors |= header
        if len(tensors) > _MOST_TENSORS:
            raise CorruptFileError(f"holds more than {_MOST_TENSORS:,} tensors, the limit", path=path, hint=DAMAGED)
    if not tensors:
        raise NoWeightsError("its files hold no tensors at all", path=path, hint="Fetch it again from its source.")
    return tensors


def _no_weights(folder: Path, names: Sequence[str]) -> NoWeightsError | PickleRefusedError:
    if pickles := [name for name in names if name.lower().endswith(PICKLES)]:
        return _pickle_error(folder / pickles[0], pickles)
    folders = [name for name in names if (folder / name).is_dir()]
    got = f"only the folders {listed(folders)}" if len(folders) == len(names) > 0 else listed(names) or "nothing"
    hint = "Pass one of the folders inside it." if folders else "Pass a folder with model.safetensors or an adapter."
    return NoWeightsError(f"the folder holds no weights: expected {_SUFFIX} files, got {got}", path=folder, hint=hint)


def _pickle_error(path: Path, pickles: Sequence[str]) -> PickleRefusedError:
    message = f"the weights are pickles ({listed(pickles)}): these are never loaded, because loading can run code"
    return PickleRefusedError(message, path=path, hint="Ask for the same weights as .safetensors.")


def _refuse_two_sets(folder: Path, one: str, other: str) -> NoReturn:
    message = f"the folder holds two sets of weights, {one} and {other}: loaders differ in which they take"
    raise CheckpointError(message, path=folder, hint="Scan each on its own: move one away, or pass a file's path.")

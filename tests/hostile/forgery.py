"""Attack files are made on the fly, byte by byte, so that no library's checks stand between the test and the reader."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest

from activations.checkpoints import open_checkpoint
from activations.errors import UndertowError


def header_bytes(entries: Mapping[str, object]) -> bytes:
    return json.dumps(entries).encode()


def forge(path: Path, header: bytes | Mapping[str, object], data: bytes = b"", *, length: int | None = None) -> Path:
    """Write a safetensors file with any header, data and header length, right or wrong."""
    text = header if isinstance(header, bytes) else header_bytes(header)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(start: int, stop: int, shape: list[object] | None = None, dtype: object = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": [stop - start] if shape is None else shape, "data_offsets": [start, stop]}


def assert_refused(path: Path, expected: type[UndertowError], *reasons: str) -> UndertowError:
    """Require that a path is refused by one class of error, with code, path, reason and hint on one safe line."""
    with pytest.raises(UndertowError) as caught:
        open_checkpoint(path)
    error = caught.value
    assert type(error) is expected, f"{type(error).__name__}: {error}"
    shown = str(error)
    assert error.path is not None
    assert error.path in shown
    assert error.hint
    assert error.hint in shown
    assert shown.isprintable()
    assert len(shown) < 1200
    for reason in reasons:
        assert reason in shown, shown
    assert error.to_dict()["code"] == expected.code
    return error


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

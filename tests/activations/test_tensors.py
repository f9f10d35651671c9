"""The safetensors reader: reads what the reference library writes, bit for bit, and hashes content."""

import json
import os
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from activations.errors import CorruptFileError, PathMissingError
from activations.tensors import DTYPES, content_hash, read_header, read_tensor, tensor_digest

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]
OTHERS = [torch.bool, torch.complex64, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS, *OTHERS], ids=str)
def test_a_tensor_of_every_dtype_is_read_bit_for_bit(tmp_path, dtype):
    raw = torch.arange(48, dtype=torch.uint8)
    tensor = (raw % 2).bool() if dtype is torch.bool else raw.view(dtype)
    save_file({"weight": tensor.reshape(2, -1)}, tmp_path / "x.safetensors")
    info = read_header(tmp_path / "x.safetensors").tensors["weight"]
    read = read_tensor(info)
    assert (read.dtype, tuple(read.shape)) == (dtype, info.shape)
    assert bytes_of(read) == bytes_of(tensor)


def test_the_test_above_covers_every_dtype_that_is_read():
    assert {str(dtype) for dtype in (*FLOATS, *INTEGERS, *OTHERS)} == {f"torch.{name}" for _, name in DTYPES.values()}


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (2, 3, 4)], ids=str)
def test_scalars_and_empty_tensors_keep_their_shape(tmp_path, shape):
    save_file({"a": torch.ones(3), "x": torch.ones(shape), "z": torch.ones(2)}, tmp_path / "x.safetensors")
    info = read_header(tmp_path / "x.safetensors").tensors["x"]
    assert torch.equal(read_tensor(info), torch.ones(shape))
    assert info.nbytes == 4 * torch.ones(shape).numel()


def test_metadata_is_kept_beside_the_tensors(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    assert header.metadata == {"format": "pt"}
    assert list(header.tensors) == ["a"]


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
            lambda n: n != "__metadata__"
        ),
        st.lists(st.integers(0, 4), max_size=3),
        max_size=5,
    )
)
def test_whatever_the_reference_library_writes_is_read_as_it_was(tmp_path_factory, shapes):
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    path = tmp_path_factory.mktemp("x") / "x.safetensors"
    path.write_bytes(save(tensors))
    infos = read_header(path).tensors
    assert infos.keys() == tensors.keys()
    assert all(torch.equal(read_tensor(infos[name]), tensor) for name, tensor in tensors.items())


def test_a_tensor_owns_its_memory(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(4)}, path)
    info = read_header(path).tensors["a"]
    first = read_tensor(info)
    first += 1
    assert torch.equal(read_tensor(info), torch.zeros(4))


def test_a_header_length_that_looks_like_a_pickle_is_no_pickle(tmp_path):
    # 640 bytes of header begin as a pickle of protocol 2 does.
    header = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode().ljust(0x280)
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 0x280) + header + b"\7")
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert read_tensor(read_header(path).tensors["a"]).tolist() == [7]


@pytest.mark.parametrize("read", [read_tensor, tensor_digest])
def test_a_file_that_changed_since_its_header_was_read_is_refused(tmp_path, read):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(4)}, path)
    info = read_header(path).tensors["a"]
    read(info)
    other = tmp_path / "y.safetensors"
    save_file({"a": torch.ones(4)}, other)
    other.replace(path)
    with pytest.raises(CorruptFileError, match="has changed since"):
        read(info)


@pytest.mark.parametrize("read", [read_tensor, tensor_digest])
def test_a_tensor_cut_short_is_refused_even_without_a_stamp(tmp_path, read):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(4)}, path)
    info = read_header(path).tensors["a"]
    os.truncate(path, path.stat().st_size - 3)
    with pytest.raises(CorruptFileError, match="16 bytes expected, got 13"):
        read(type(info)(info.name, info.dtype, info.shape, info.file, info.start, info.stop))


@pytest.mark.parametrize("read", [read_tensor, tensor_digest])
def test_a_file_that_vanished_is_missing(tmp_path, read):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(4)}, path)
    info = read_header(path).tensors["a"]
    path.unlink()
    with pytest.raises(PathMissingError):
        read(info)


def test_the_digest_is_that_of_the_bytes_in_one_block_or_many(tmp_path):
    import hashlib

    tensor = torch.from_numpy(np.arange(600_000, dtype=np.float32))
    save_file({"a": tensor, "b": tensor[:3].clone()}, tmp_path / "x.safetensors")
    for name, info in read_header(tmp_path / "x.safetensors").tensors.items():
        expected = tensor if name == "a" else tensor[:3]
        assert tensor_digest(info) == hashlib.sha256(bytes_of(expected)).hexdigest()


ENTRY = ("a", "F32", (2, 3), "00")


def test_content_hash_does_not_depend_on_order():
    other = ("b", "F32", (2, 3), "00")
    assert content_hash([ENTRY, other]) == content_hash([other, ENTRY])


@pytest.mark.parametrize(
    "changed",
    [("b", "F32", (2, 3), "00"), ("a", "I32", (2, 3), "00"), ("a", "F32", (3, 2), "00"), ("a", "F32", (2, 3), "01")],
    ids=["name", "dtype", "shape", "bytes"],
)
def test_content_hash_depends_on_every_part(changed):
    assert content_hash([ENTRY]) != content_hash([changed])


def test_content_hash_depends_on_settings():
    assert len({content_hash([ENTRY], settings=settings) for settings in ([], [1.0], [2.0], [[1.0]])}) == 4


def test_content_hash_cannot_be_forged_by_names_that_hold_separators():
    forged = ('a", "F32", [2, 3], "00"]\n["b', "F32", (2, 3), "00")
    assert content_hash([forged]) != content_hash([ENTRY, ("b", "F32", (2, 3), "00")])

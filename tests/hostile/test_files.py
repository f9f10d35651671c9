"""Rows 1-23 of the list of bad inputs: one file that breaks, bends or floods the safetensors format."""

import json
import os
import pickle
import struct
import time
import zipfile

import pytest
import torch
from forgery import assert_refused, entry, forge, header_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from activations.checkpoints import check_finite, open_checkpoint
from activations.errors import (
    CorruptFileError,
    LfsPointerError,
    NonFiniteError,
    NoWeightsError,
    PickleRefusedError,
    UndertowError,
)
from activations.tensors import read_header, read_tensor

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"


@pytest.fixture
def model(tmp_path):
    return tmp_path / "ckpt" / "model.safetensors"


@pytest.mark.parametrize(("content", "reason"), [(b"", "has 0 bytes"), (b"7 bytes", "has 7 bytes")], ids=["1", "2"])
def test_a_file_shorter_than_a_header_is_refused(model, content, reason):
    model.parent.mkdir()
    model.write_bytes(content)
    assert_refused(model.parent, CorruptFileError, reason)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100, 3], ids=["3", "3-largest", "4", "4-by-one"])
def test_a_header_longer_than_the_file_is_refused(model, length):
    assert_refused(forge(model, b"{}", length=length), CorruptFileError, f"{length:,} bytes, but only 2 follow")


def test_5_a_truncated_file_is_refused(model):
    forge(model, {"a": entry(0, 4), "b": entry(4, 8)}, b"abcdefg")
    assert_refused(model, CorruptFileError, "truncated")


@pytest.mark.parametrize("second", [b"\0", b"PK\3\4", save({"w": torch.ones(1)})], ids=["byte", "zip", "safetensors"])
def test_6_a_second_file_behind_the_first_is_refused(model, second):
    forge(model, {"a": entry(0, 4)}, b"abcd" + second)
    assert_refused(model, CorruptFileError, f"{len(second):,} bytes follow the last tensor")


@pytest.mark.parametrize(
    "header",
    [b'{"a": nonsense}', b"{", b"{}{}", b'{"a":1,}', b'{"a"', b'{"__metadata__": "x', b"{'a': 1}", b"{}\0"],
    ids=str,
)
def test_7_a_header_that_is_not_json_is_refused(model, header):
    assert_refused(forge(model, header), CorruptFileError, "cannot be parsed")


@pytest.mark.parametrize("header", [b"[]", b"x", b'"a"', b" {}", b"\0"], ids=str)
def test_7_a_header_that_is_no_object_is_refused(model, header):
    assert_refused(forge(model, header), CorruptFileError, "should start with '{'")


@pytest.mark.parametrize("name", [b"\xff\xfe", b"\xed\xa0\x80", b"\\ud800"], ids=["bytes", "surrogate", "escape"])
def test_8_a_header_that_is_no_text_is_refused(model, name):
    header = b'{"' + name + b'":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    assert_refused(forge(model, header, b"x"), CorruptFileError, "not valid UTF-8")


def test_8_utf_16_is_not_taken_for_json(model):
    header = header_bytes({"a": entry(0, 1)}).decode().encode("utf-16-le")
    assert_refused(forge(model, header, b"x"), CorruptFileError)


def test_9_a_tensor_name_that_occurs_twice_is_refused(model):
    one = b'"w":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}'
    assert_refused(forge(model, b"{" + one + b"," + one + b"}", b"abcd"), CorruptFileError, "the key 'w' occurs twice")


def test_9_a_key_that_occurs_twice_inside_a_tensor_is_refused(model):
    header = b'{"w":{"dtype":"U8","dtype":"I8","shape":[4],"data_offsets":[0,4]}}'
    assert_refused(forge(model, header, b"abcd"), CorruptFileError, "the key 'dtype' occurs twice")


@pytest.mark.parametrize(
    ("spans", "reason"),
    [
        ([(0, 4), (2, 6)], "overlaps"),
        ([(0, 6), (2, 4)], "overlaps"),
        ([(0, 6), (0, 6)], "overlaps"),
        ([(0, 6), (3, 3)], "overlaps"),
        ([(0, 2), (4, 6)], "leaves a hole"),
        ([(2, 4), (4, 6)], "leaves a hole"),
        ([(0, 6), (9, 9)], "leaves a hole"),
    ],
    ids=["10", "10-inside", "10-same", "10-empty-inside", "11", "11-at-the-start", "11-empty-behind"],
)
def test_spans_that_overlap_or_leave_a_hole_are_refused(model, spans, reason):
    forge(model, {f"t{row}": entry(*span) for row, span in enumerate(spans)}, b"abcdef")
    assert_refused(model, CorruptFileError, reason)


@pytest.mark.parametrize(
    ("shape", "dtype", "takes"),
    [([3], "U8", 3), ([5], "U8", 5), ([4], "F32", 16), ([], "F64", 8), ([0], "U8", 0), ([2, 2, 2], "I8", 8)],
    ids=str,
)
def test_12_a_span_that_does_not_fit_shape_and_dtype_is_refused(model, shape, dtype, takes):
    forge(model, {"w": entry(0, 4, shape, dtype)}, b"abcd")
    assert_refused(model, CorruptFileError, "the tensor 'w'", f"takes {takes} bytes, got 4")


@pytest.mark.parametrize(
    "shape",
    [[2**32, 2**32], [2**62, 4], [2**63 - 1, 2], [2**62, 2**62, 0], [2**63], [10**400]],
    ids=["wraps-to-zero", "past-63-bits", "twice-the-largest", "empty", "past-a-word", "huge"],
)
def test_13_a_shape_whose_product_overflows_is_refused(model, shape):
    assert_refused(forge(model, {"w": entry(0, 0, shape, "U8")}), CorruptFileError, "the tensor 'w'")


def test_13_a_shape_of_very_many_dimensions_is_refused_at_once(model):
    assert_refused(forge(model, {"w": entry(0, 0, [2**62] * 200_000)}), CorruptFileError, "up to 32 whole numbers")


@pytest.mark.parametrize(
    "shape", [[-1], [-4, -1], [2, -2], [4.0], [True, 4], ["4"], [None], [[4]], "4", {"4": 4}, None, 4], ids=str
)
def test_14_a_shape_of_anything_but_counts_is_refused(model, shape):
    assert_refused(
        forge(model, {"w": {**entry(0, 4), "shape": shape}}, b"abcd"), CorruptFileError, "shape", "none negative"
    )


@pytest.mark.parametrize(
    "offsets", [[4, 0], [-4, 0], [0], [0, 4, 4], [0.0, 4.0], [False, 4], "04", None, {}, [0, 2**64]], ids=str
)
def test_14_offsets_of_anything_but_a_span_are_refused(model, offsets):
    assert_refused(
        forge(model, {"w": {**entry(0, 4), "data_offsets": offsets}}, b"abcd"), CorruptFileError, "data_offsets"
    )


@pytest.mark.parametrize("dtype", ["F7", "f32", "", "F4", "torch.float32", 8, None, ["U8"], {"U8": 1}], ids=str)
def test_15_an_unknown_dtype_is_refused(model, dtype):
    assert_refused(
        forge(model, {"w": entry(0, 4, dtype=dtype)}, b"abcd"), CorruptFileError, "dtype", "expected one of", "BF16"
    )


@pytest.mark.parametrize("metadata", [{"a": 1}, {"a": None}, {"a": {"b": "c"}}, [], "x", None], ids=str)
def test_16_metadata_other_than_strings_is_refused(model, metadata):
    forge(model, {"__metadata__": metadata, "w": entry(0, 4)}, b"abcd")
    assert_refused(model, CorruptFileError, "__metadata__", "string")


@pytest.mark.parametrize("value", [None, 1, [], {}, {"dtype": "U8"}, {**entry(0, 4), "code": "x"}], ids=str)
def test_an_entry_that_describes_no_tensor_is_refused(model, value):
    assert_refused(
        forge(model, {"w": value}, b"abcd"), CorruptFileError, "dtype, shape and data_offsets and nothing else"
    )


def test_17_a_git_lfs_pointer_is_named_with_its_remedy(model):
    model.parent.mkdir()
    model.write_text(LFS_POINTER)
    assert_refused(model.parent, LfsPointerError, "git lfs pull")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_18_a_pickle_under_another_name_is_refused_unloaded(model, protocol):
    model.parent.mkdir()
    model.write_bytes(pickle.dumps({"w": [1.0] * 100}, protocol=protocol))
    assert_refused(model.parent, PickleRefusedError, "Python pickle", "safetensors")


def test_18_a_pickle_that_would_run_code_does_not_run_it(model, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    model.parent.mkdir()
    model.write_bytes(pickle.dumps(Bomb()))
    assert_refused(model.parent, PickleRefusedError)
    assert not (tmp_path / "ran").exists()
    pickle.loads(model.read_bytes())
    assert (tmp_path / "ran").exists(), "the control: the file is live"


def test_18_what_torch_saves_is_refused_under_another_name(model):
    model.parent.mkdir()
    torch.save({"w": torch.ones(3)}, model)
    assert zipfile.is_zipfile(model)
    assert_refused(model.parent, PickleRefusedError, "torch.save")


@pytest.mark.parametrize("page", [b"<!DOCTYPE html><html>", b"\n  <html lang=en>", b"<?xml version='1.0'?>"], ids=str)
def test_19_a_web_page_is_named_as_one(model, page):
    model.parent.mkdir()
    model.write_bytes(page + b"<body>404</body></html>")
    assert_refused(model.parent, CorruptFileError, "web page", "Download the file itself")


@pytest.mark.parametrize(("magic", "name"), [(b"GGUF", "GGUF"), (b"\x89HDF\r\n", "HDF5"), (b"\x1f\x8b\x08", "gzip")])
def test_another_format_is_named(model, magic, name):
    model.parent.mkdir()
    model.write_bytes(magic + bytes(100))
    assert_refused(model.parent, CorruptFileError, name)


@pytest.mark.parametrize("bad", [0x7FC00000, 0x7F800000, 0xFF800000], ids=["nan", "inf", "minus-inf"])
def test_20_weights_that_are_not_finite_are_refused(model, bad):
    forge(model, {"w": entry(0, 8, [2], "F32")}, struct.pack("<fI", 1.0, bad))
    checkpoint = open_checkpoint(model)
    with pytest.raises(NonFiniteError, match="'w' holds 1 NaN or infinite") as caught:
        check_finite(checkpoint.read("w"), "w", model)
    assert (caught.value.path, caught.value.code) == (str(model), "non-finite")


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"' + b'\\"' * 1000 + b'":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
    ids=["arrays", "objects", "behind-escaped-quotes"],
)
def test_21_deep_nesting_is_refused_unparsed(model, header):
    assert_refused(forge(model, header), CorruptFileError, "nested more than 8 deep")


def test_21_brackets_inside_a_name_are_no_nesting(model):
    checkpoint = open_checkpoint(forge(model, {'w["' + "[{" * 500: entry(0, 4)}, b"abcd"))
    assert len(checkpoint.tensors) == 1


def many_empty_tensors(count):
    one = header_bytes(entry(0, 0)).decode()
    return ("{" + ",".join(f'"t{row}":{one}' for row in range(count)) + "}").encode()


def test_22_two_hundred_thousand_tensors_are_refused(model):
    header = many_empty_tensors(200_000)
    assert_refused(forge(model, header), CorruptFileError, "more than 1,200,000 items, the limit")


def test_22_one_tensor_too_many_is_refused(model):
    header = many_empty_tensors(100_001)
    assert_refused(forge(model, header), CorruptFileError, "100,001 tensors, more than 100,000")


def test_22_a_header_of_95_megabytes_is_refused_unread(model):
    forge(model, b"{", length=95_000_000)
    os.truncate(model, 95_000_100)
    started = time.process_time()
    assert_refused(model, CorruptFileError, "95,000,000 bytes, more than", "the limit")
    assert time.process_time() - started < 1


FLOODS = {
    "empty-tensors": (b"{", b'"t":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'),
    "empty-arrays": (b'{"a":[', b"[],"),
    "numbers": (b'{"a":[', b"0,"),
    "one-number": (b'{"a":', b"7"),
    "empty-strings": (b'{"a":[', b'"",'),
    "quotes": (b"{", b'"'),
    "escaped-quotes-in-a-string": (b'{"', b'\\"'),
    "escaped-quotes-outside": (b"{", b'\\"'),
    "backslashes-in-a-string": (b'{"', b"\\"),
    "opening-brackets": (b"{", b"["),
    "closing-brackets": (b"{", b"]"),
    "spaces": (b"{", b" "),
}


@pytest.mark.parametrize(("start", "flood"), FLOODS.values(), ids=FLOODS.keys())
def test_22_a_header_just_below_the_limit_is_refused_in_seconds(model, start, flood):
    size = 32 * 2**20
    text = (start + flood * (size // len(flood)))[:size]
    forge(model, text)
    started = time.process_time()
    assert_refused(model, CorruptFileError)
    # Linear work takes about a second here; quadratic work on this input would take hours.
    assert time.process_time() - started < 20


@pytest.mark.parametrize(
    "name", ["\x1b[2J\x1b[31mclean", "a\nverdict: clean", "<script>alert(1)</script>", "\u202egnp"]
)
def test_23_a_hostile_tensor_name_is_printed_harmlessly(model, name):
    error = assert_refused(forge(model, {name: entry(0, 4, dtype="F7")}, b"abcd"), CorruptFileError)
    assert "\x1b" not in repr(error.to_dict()["message"])


def test_23_a_hostile_tensor_name_is_read_as_it_is(model):
    assert list(open_checkpoint(forge(model, {"\x1b[2J": entry(0, 4)}, b"abcd")).tensors) == ["\x1b[2J"]


def test_23_a_name_of_a_megabyte_does_not_flood_the_log(model):
    error = assert_refused(forge(model, {"n" * 2**20: entry(0, 4, dtype="F7")}, b"abcd"), CorruptFileError)
    assert len(str(error)) < 1000


def test_a_file_without_tensors_holds_no_weights(model):
    assert_refused(forge(model, {}), NoWeightsError, "no tensors")
    assert_refused(model.parent, NoWeightsError, "no tensors")


HONEST = save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.bfloat16), "": torch.zeros(0)})


@st.composite
def damaged(draw):
    """An honest file with some bytes replaced, inserted or cut out, mostly in its header."""
    data = bytearray(HONEST)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, min(len(data), 260)))
        cut = draw(st.integers(0, 3))
        piece = draw(
            st.one_of(st.binary(max_size=4), st.sampled_from([b"0", b"9", b"-", b'"', b"[", b"}", b",", b"F64"]))
        )
        data[place : place + cut] = piece
    return bytes(data)


@settings(max_examples=400, deadline=None)
@given(damaged())
def test_a_damaged_file_is_refused_or_read_as_the_reference_library_reads_it(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(data)
    try:
        ours = {name: read_tensor(info) for name, info in read_header(path).tensors.items()}
    except UndertowError:
        return
    theirs = load(data)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].shape == theirs[name].shape for name in ours)
    assert all(
        torch.equal(ours[name].view(torch.uint8), theirs[name].view(torch.uint8)) for name in ours if ours[name].dim()
    )


@settings(max_examples=100, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=8))
def test_no_json_value_in_place_of_a_tensor_is_more_than_refused(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "value.safetensors"
    for header in (
        {"w": value},
        {"w": {**entry(0, 4), "shape": value}},
        {"__metadata__": value},
        {"w": {"dtype": value}},
    ):
        path.write_bytes(struct.pack("<Q", len(text := json.dumps(header).encode())) + text + b"abcd")
        with pytest.raises(UndertowError):
            open_checkpoint(path)

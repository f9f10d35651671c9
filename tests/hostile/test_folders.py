"""Rows 24-45 of the list of bad inputs: folders that reach out, ask for code, lack parts or contradict themselves."""

import errno
import gzip
import json
import os
import shutil

import pytest
from forgery import assert_refused, entry, forge, write_index

from activations.checkpoints import open_checkpoint
from activations.errors import (
    AdapterError,
    CheckpointError,
    CorruptFileError,
    LfsPointerError,
    MissingShardError,
    NoWeightsError,
    PathMissingError,
    PickleRefusedError,
    UnsafePathError,
)

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def codes(checkpoint):
    return [note.partition(":")[0] for note in checkpoint.notes]


def test_the_honest_folders_that_these_tests_damage_open(folder, adapter):
    assert (open_checkpoint(folder).kind, open_checkpoint(folder).notes) == ("full", ())
    shutil.rmtree(folder)
    assert (open_checkpoint(adapter()).kind, open_checkpoint(adapter()).notes) == ("adapter", ())


def test_the_honest_shards_that_these_tests_damage_open(sharded):
    assert open_checkpoint(sharded).tensors.keys() == {"a", "b"}
    assert open_checkpoint(sharded).notes == ()


PLACES = ["../secret", "/etc/secret", "sub/x", "..\\x", "C:x", "C:\\x", "x.safetensors\0", "~/../x"]


@pytest.mark.parametrize("name", [*(f"{place}.safetensors" for place in PLACES), "..", ".", ""], ids=repr)
def test_24_25_an_index_that_reaches_out_of_the_folder_is_refused(sharded, name):
    forge(sharded.parent / "secret.safetensors", {"b": entry(0, 2)}, b"ef")
    write_index(sharded, {"a": FIRST, "b": name})
    assert_refused(sharded, UnsafePathError, "plain name of a file in the same folder", "Do not load")


@pytest.mark.parametrize("name", ["config.json", "weights.gguf", "x.safetensors.exe", 5, None, ["x"], {}], ids=str)
def test_an_index_that_names_no_shard_is_refused(sharded, name):
    write_index(sharded, {"a": FIRST, "b": name})
    assert_refused(sharded, CorruptFileError, "expected a .safetensors file")


def test_an_index_that_names_a_pickle_is_refused(sharded):
    write_index(sharded, {"a": FIRST, "b": "pytorch_model.bin"})
    assert_refused(sharded, PickleRefusedError, "pytorch_model.bin")


@pytest.mark.parametrize("weight_map", [None, {}, [], "x", [FIRST, SECOND]], ids=str)
def test_an_index_without_a_map_is_refused(sharded, weight_map):
    write_index(sharded, weight_map)
    assert_refused(sharded, CorruptFileError, "weight_map")


def test_an_index_that_is_a_git_lfs_pointer_is_named_with_its_remedy(sharded):
    (sharded / "model.safetensors.index.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    assert_refused(sharded, LfsPointerError, "git lfs pull")


def test_26_a_missing_shard_is_named(sharded):
    (sharded / SECOND).unlink()
    assert_refused(sharded, MissingShardError, f"the shard {SECOND} is missing")


def test_26_shards_without_their_index_are_refused(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    assert_refused(sharded, MissingShardError, FIRST, "model.safetensors.index.json")


def test_26_a_link_to_nothing_is_a_missing_shard(sharded):
    (sharded / SECOND).unlink()
    (sharded / SECOND).symlink_to("gone.safetensors")
    assert_refused(sharded, MissingShardError, SECOND)


def test_5_a_truncated_shard_is_named(sharded):
    os.truncate(sharded / SECOND, (sharded / SECOND).stat().st_size - 1)
    assert SECOND in assert_refused(sharded, CorruptFileError, "truncated").path


def test_27_an_indexed_tensor_that_its_shard_lacks_is_named(sharded):
    write_index(sharded, {"a": FIRST, "b": SECOND, "lm_head": SECOND})
    assert_refused(sharded, MissingShardError, "'lm_head'", SECOND)


def test_27_a_tensor_in_another_shard_than_the_index_says_is_refused(sharded):
    write_index(sharded, {"a": SECOND, "b": FIRST})
    assert_refused(sharded, MissingShardError, "does not hold it")


def test_a_tensor_in_two_shards_is_refused(sharded):
    forge(sharded / SECOND, {"a": entry(0, 4), "b": entry(4, 6)}, b"ABCDef")
    assert_refused(sharded, CorruptFileError, "'a' lies in", "in another shard as well")


def test_a_tensor_that_the_index_hides_is_read_and_noted(sharded):
    forge(sharded / SECOND, {"b": entry(0, 2), "hidden": entry(2, 6)}, b"efABCD")
    checkpoint = open_checkpoint(sharded)
    assert "hidden" in checkpoint.tensors
    assert codes(checkpoint) == ["unindexed"]


@pytest.mark.parametrize("second", ["index", "adapter", "adapter-settings"])
def test_two_sets_of_weights_in_one_folder_are_refused(sharded, adapter, second):
    if second == "index":
        forge(sharded / "model.safetensors", {"a": entry(0, 4)}, b"abcd")
    else:
        adapter()
    if second == "adapter-settings":
        (sharded / "adapter_model.safetensors").unlink()
    assert_refused(sharded, CheckpointError, "two sets of weights", "loaders differ")


def test_weights_beside_the_usual_ones_are_noted(folder):
    forge(folder / "consolidated.safetensors", {"w": entry(0, 4)}, b"EVIL")
    checkpoint = open_checkpoint(folder)
    assert codes(checkpoint) == ["weights-beside"]
    assert "consolidated.safetensors" in checkpoint.notes[0]
    assert bytes(checkpoint.read("w")) == b"abcd"


CONFIGS = {
    "28": ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "remote-code", "modeling_x.X"),
    "29": ({"auto_map": {"AutoModelForCausalLM": "other/repository--modeling_x.X"}}, "remote-code", "other/repository"),
    "41": (
        {"_attn_implementation_internal": "other/kernel"},
        "private-settings",
        "_attn_implementation_internal = 'other/kernel'",
    ),
    "42": ({"trust_remote_code": True}, "remote-code", "trust_remote_code"),
    "43": ({"hidden_size": 10**12}, "impossible-size", "hidden_size = 1000000000000"),
    "43-negative": ({"vocab_size": -1}, "impossible-size", "vocab_size = -1"),
    "in-a-part": ({"text_config": {"auto_map": {"AutoModel": "modeling_x.X"}}}, "remote-code", "modeling_x.X"),
    "in-a-list": ({"parts": [{"_attn_implementation_internal": "x"}]}, "private-settings", "_attn_implementation"),
}


@pytest.mark.parametrize(("config", "code", "detail"), CONFIGS.values(), ids=CONFIGS.keys())
def test_what_a_configuration_asks_for_is_noted_and_not_followed(folder, config, code, detail):
    before = open_checkpoint(folder).content_hash()
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(folder)
    assert codes(checkpoint) == [code]
    assert detail in checkpoint.notes[0]
    assert checkpoint.content_hash() == before


@pytest.mark.parametrize("key", ["auto_map", "_private", "vocab_size"])
def test_a_configuration_that_asks_a_thousand_times_is_noted_once_and_briefly(folder, key):
    (folder / "config.json").write_text(json.dumps({"parts": [{key: -1 - part} for part in range(1000)]}))
    (note,) = open_checkpoint(folder).notes
    assert "and 995 more" in note
    assert len(note) < 1000


def test_28_python_files_beside_the_weights_are_noted_and_not_run(folder, tmp_path):
    (folder / "modeling_x.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert codes(open_checkpoint(folder)) == ["code-beside"]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("base", ["../../other", "/etc", "https://example.org/x", "honest/base"])
def test_30_the_base_that_an_adapter_names_is_noted_and_not_opened(adapter, base):
    checkpoint = open_checkpoint(adapter(base_model_name_or_path=base))
    assert codes(checkpoint) == ["base-named"]
    assert base in checkpoint.notes[0]
    assert checkpoint.adapter.base_model == base


@pytest.mark.parametrize("rank", [10**9, 10**30, 0, -1, 2.0, True, "2", None, [2]], ids=str)
def test_31_an_impossible_rank_is_refused(adapter, rank):
    assert_refused(adapter(r=rank), AdapterError, "expected a whole number from 1 to")


@pytest.mark.parametrize("alpha", ["4", None, True, [4], float("nan"), float("inf"), 10**60, 1e300], ids=str)
def test_31_an_impossible_alpha_is_refused(adapter, alpha):
    assert_refused(adapter(lora_alpha=alpha), AdapterError, "lora_alpha", "expected a finite number")


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "^layers", ".*q_proj", "layers.[01]", "q_proj|v_proj", "", "a\nb", "(?i)q"]
)
def test_31_a_regular_expression_in_a_pattern_is_refused(adapter, key, pattern):
    assert_refused(adapter(**{key: {pattern: 2}}), AdapterError, key, "regular expression", "literal end")


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out"])
def test_31_a_setting_of_the_wrong_type_is_refused(adapter, key):
    assert_refused(adapter(**{key: "q_proj"}), AdapterError, key)


def test_31_an_exponential_regular_expression_for_the_modules_is_never_run(adapter):
    exponential = "(([a-z_]|layers|proj)+)+[0-9]+x$"
    assert open_checkpoint(adapter(target_modules=exponential)).lora_pairs().keys() == {"layers.0.q_proj"}


def test_31_an_adapter_that_asks_for_code_is_noted(adapter):
    checkpoint = open_checkpoint(adapter(auto_mapping={"parent_library": "evil", "base_model_class": "Run"}))
    assert codes(checkpoint) == ["remote-code"]
    assert "evil" in checkpoint.notes[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"lora_bias": True},
        {"modules_to_save": ["lm_head"]},
        {"layer_replication": [[0, 1], [0, 1]]},
        {"trainable_token_indices": [1]},
        {"target_parameters": ["experts.weight"]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": 1},
        {"peft_type": "IA3"},
        {"peft_type": None},
    ],
    ids=str,
)
def test_an_adapter_that_changes_more_than_its_pairs_is_refused(adapter, settings):
    assert_refused(adapter(**settings), AdapterError, next(iter(settings)))


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva"])
def test_an_initialisation_that_keeps_the_base_is_accepted(adapter, init):
    assert open_checkpoint(adapter(init_lora_weights=init)).kind == "adapter"


def test_a_setting_from_the_future_is_noted(adapter):
    checkpoint = open_checkpoint(adapter(use_next_years_lora=True, another=False))
    assert codes(checkpoint) == ["unknown-settings"]
    assert "use_next_years_lora" in checkpoint.notes[0]
    assert "another" not in checkpoint.notes[0]


TEMPLATES = {
    "32": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "33": "{% for a in range(10**9) %}{% for b in range(10**9) %}x{% endfor %}{% endfor %}",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_32_33_a_chat_template_is_noted_and_never_rendered(folder, template):
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    (folder / "chat_template.jinja").write_text(template)
    checkpoint = open_checkpoint(folder)
    assert codes(checkpoint) == ["tokenizer-beside"]
    assert "chat_template.jinja, tokenizer_config.json were not read" in checkpoint.notes[0]


def test_44_a_tokenizer_that_points_elsewhere_is_noted_and_never_opened(folder):
    (folder / "tokenizer_config.json").write_text('{"tokenizer_file": "../../etc/passwd"}')
    (folder / "tokenizer.json").symlink_to("/etc/passwd")
    assert codes(open_checkpoint(folder)) == ["tokenizer-beside"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "\xff", '{"a": 1, "a": 2}', '{"a": "\\ud800"}', "not json"], ids=repr
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "adapter_config.json"])
def test_34_a_broken_configuration_is_refused(folder, sharded, adapter, name, text):
    if name == "adapter_config.json":
        shutil.rmtree(folder)
        adapter()
    (folder / name).write_bytes(text.encode("latin-1"))
    if name != "model.safetensors.index.json":
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    assert_refused(folder, CorruptFileError)


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")], ids=["arrays", "objects"])
def test_35_a_configuration_nested_200000_deep_is_refused(adapter, name, opening, closing):
    folder = adapter()
    (folder / name).write_text('{"a":' + opening * 200_000 + "1" + closing * 200_000 + "}")
    assert_refused(folder, CorruptFileError, "the limit")


def test_a_configuration_of_two_megabytes_is_refused(folder):
    (folder / "config.json").write_text('{"a": "' + "x" * 2**21 + '"}')
    assert_refused(folder, CorruptFileError, "longer than 1,048,576 bytes")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("absolute", [True, False])
def test_36_a_link_out_of_the_folder_is_refused(folder, name, absolute):
    outside = folder.parent / f"outside-{name}"
    shutil.move(folder / name, outside)
    (folder / name).symlink_to(outside if absolute else f"../{outside.name}")
    assert_refused(folder, UnsafePathError, "leads out of the folder", str(outside))


def test_36_a_shard_that_is_a_link_out_of_the_folder_is_refused(sharded):
    shutil.move(sharded / SECOND, sharded.parent / SECOND)
    (sharded / SECOND).symlink_to(f"../{SECOND}")
    assert_refused(sharded, UnsafePathError, "leads out of the folder")


def test_36_a_folder_that_borrows_the_cache_s_names_reaches_only_its_own_blobs(folder, tmp_path):
    snapshot = tmp_path / "models--x--y" / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    shutil.move(folder, snapshot)
    (snapshot / "model.safetensors").replace(tmp_path / "secret.safetensors")
    (snapshot / "model.safetensors").symlink_to("../../blobs/../../secret.safetensors")
    (snapshot.parent.parent / "blobs").mkdir()
    assert_refused(snapshot, UnsafePathError, "leads out of the folder")


def test_a_link_inside_the_folder_is_followed(folder):
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    assert open_checkpoint(folder).tensors.keys() == {"w"}


def test_a_folder_that_the_user_names_through_a_link_is_opened(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert open_checkpoint(tmp_path / "link").content_hash() == open_checkpoint(folder).content_hash()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_37_a_loop_of_links_is_refused(folder, name):
    (folder / name).unlink()
    (folder / name).symlink_to("other")
    (folder / "other").symlink_to(name)
    assert_refused(folder, UnsafePathError, "loop of symbolic links")


def test_37_a_loop_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    assert_refused(tmp_path / "loop", UnsafePathError, "loop of symbolic links")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_38_a_fifo_is_refused_without_waiting_for_a_writer(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert_refused(folder, UnsafePathError, "expected a regular file, got a FIFO")


def test_38_a_fifo_in_place_of_the_checkpoint_is_refused(tmp_path):
    os.mkfifo(tmp_path / "x.safetensors")
    assert_refused(tmp_path / "x.safetensors", UnsafePathError, "got a FIFO")


def test_38_a_device_is_refused(tmp_path):
    assert_refused(open_device := type(tmp_path)("/dev/zero"), UnsafePathError, "got a device")
    assert open_device.exists()


def test_38_a_folder_in_place_of_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    assert_refused(folder, UnsafePathError, "got a folder")


@pytest.mark.parametrize("name", ["weights.npz", "model.h5", "model.safetensors.gz"])
def test_39_a_compression_bomb_is_never_opened(tmp_path, name):
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / name).write_bytes(gzip.compress(bytes(10**7)))
    assert_refused(tmp_path / "ckpt", NoWeightsError, name)


@pytest.mark.parametrize("names", [[], ["README.md"], ["config.json", "tokenizer.json"]], ids=str)
def test_40_a_folder_without_weights_says_what_it_holds(tmp_path, names):
    (tmp_path / "ckpt").mkdir()
    for name in names:
        (tmp_path / "ckpt" / name).write_text("{}")
    assert_refused(tmp_path / "ckpt", NoWeightsError, "holds no weights", *(names or ["nothing"]))


def test_40_a_folder_of_checkpoints_points_to_the_folders_inside(folder):
    assert_refused(folder.parent, NoWeightsError, "only the folders ckpt", "Pass one of the folders inside it.")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "x.PTH", "x.ckpt", "x.pkl", "adapter_model.bin"])
def test_40_a_folder_of_pickles_is_refused_by_name(tmp_path, name):
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / name).write_bytes(b"\x80\x02.")
    assert_refused(tmp_path / "ckpt", PickleRefusedError, name, "safetensors")
    assert_refused(tmp_path / "ckpt" / name, PickleRefusedError, name)


def test_a_pickle_beside_safetensors_is_noted_and_not_loaded(folder):
    (folder / "training_args.bin").write_bytes(b"\x80\x02.")
    assert codes(open_checkpoint(folder)) == ["pickle-beside"]


def test_an_adapter_whose_weights_are_a_pickle_is_refused(adapter):
    folder = adapter()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert_refused(folder, PickleRefusedError, "adapter_model.bin")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"r": 4}, "the settings say rank 4, expected A [4, in] and B [out, 4], got A [2, 4] and B [4, 2]"),
        ({"rank_pattern": {"q_proj": 1}}, "the settings say rank 1"),
    ],
    ids=["r", "pattern"],
)
def test_45_a_rank_that_differs_from_the_tensors_is_refused(adapter, settings, reason):
    assert_refused(adapter(**settings), AdapterError, "layers.0.q_proj", reason)


def test_45_a_rank_pattern_for_other_modules_is_accepted(adapter):
    assert open_checkpoint(adapter(rank_pattern={"v_proj": 9, "xq_proj": 9, "proj": 9})).kind == "adapter"


PAIR = {"x.lora_A.weight": ([2, 4], "F32"), "x.lora_B.weight": ([4, 2], "F32")}
BROKEN_PAIRS = {
    "one-side": ({"x.lora_A.weight": ([2, 4], "F32")}, "expected both A and B"),
    "two-kinds": ({"x.lora_A.weight": ([2, 4], "F32"), "x.lora_embedding_B": ([4, 2], "F32")}, "expected both A and B"),
    "ranks-differ": ({"x.lora_A.weight": ([2, 4], "F32"), "x.lora_B.weight": ([4, 3], "F32")}, "rank 2"),
    "ranks-differ-in-a": ({"x.lora_A.weight": ([3, 4], "F32"), "x.lora_B.weight": ([4, 2], "F32")}, "rank 2"),
    "three-dimensions": ({**PAIR, "x.lora_A.weight": ([2, 2, 2], "F32")}, "expected a float matrix"),
    "integers": ({**PAIR, "x.lora_A.weight": ([2, 4], "I32")}, "expected a float matrix"),
    "same-module-twice": ({**PAIR, "base_model.model.x.lora_A.weight": ([2, 4], "F32")}, "two tensors claim side A"),
    "dora": ({**PAIR, "x.lora_magnitude_vector": ([4], "F32")}, "is no side of a LoRA pair"),
    "whole-module": ({**PAIR, "base_model.model.lm_head.weight": ([4, 4], "F32")}, "is no side of a LoRA pair"),
}


@pytest.mark.parametrize(("tensors", "reason"), BROKEN_PAIRS.values(), ids=BROKEN_PAIRS.keys())
def test_tensors_that_make_no_pairs_are_refused(adapter, tensors, reason):
    folder, header, end = adapter(), {}, 0
    for name, (shape, dtype) in tensors.items():
        size = 4 * int.__mul__(*shape[:2]) * (shape[2] if len(shape) > 2 else 1) if len(shape) > 1 else 4 * shape[0]
        header[name] = entry(end, end + size, shape, dtype)
        end += size
    forge(folder / "adapter_model.safetensors", header, bytes(end))
    assert_refused(folder, AdapterError, reason)


@pytest.mark.parametrize("path", ["gone", "gone/inside", "ckpt/model.safetensors/inside"])
def test_a_missing_path_is_named(folder, path):
    assert_refused(folder.parent / path, PathMissingError, "nothing lies at this path")


@pytest.mark.parametrize("name", ["x\0y", "x" * 300, "\ud800"], ids=["nul", "too-long", "surrogate"])
def test_an_impossible_name_is_refused(tmp_path, name):
    assert_refused(tmp_path / name, UnsafePathError, "not a possible file name")


def test_a_file_without_permission_is_named(folder, monkeypatch):
    def deny(path, *_):
        raise PermissionError(errno.EACCES, "denied", path)

    monkeypatch.setattr(os, "open", deny)
    assert_refused(folder, CheckpointError, "cannot be read: Permission denied", "Check its permissions")


def test_a_disk_that_fails_while_a_tensor_is_read_is_named(folder, monkeypatch):
    checkpoint = open_checkpoint(folder)

    def fail(*_):
        raise OSError(errno.EIO, "disk")

    monkeypatch.setattr(os, "fdopen", lambda *_: fail())
    with pytest.raises(CheckpointError, match="Input/output error"):
        checkpoint.read("w")


def test_53_names_that_differ_only_in_case_are_two_tensors(folder):
    forge(folder / "model.safetensors", {"w": entry(0, 2), "W": entry(2, 4)}, b"abcd")
    checkpoint = open_checkpoint(folder)
    assert (bytes(checkpoint.read("w")), bytes(checkpoint.read("W"))) == (b"ab", b"cd")


def test_48_a_checkpoint_that_changes_while_it_is_scanned_is_refused(folder):
    checkpoint = open_checkpoint(folder)
    forge(folder / "new.safetensors", {"w": entry(0, 4)}, b"EVIL").replace(folder / "model.safetensors")
    with pytest.raises(CorruptFileError, match="has changed since"):
        checkpoint.read("w")
    with pytest.raises(CorruptFileError, match="has changed since"):
        checkpoint.content_hash()

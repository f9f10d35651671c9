"""Folders as honest tools write them: full, sharded, adapters; content hashes; notes on what is not followed."""

import json
import shutil
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from activations.checkpoints import check_finite, open_checkpoint
from activations.errors import AdapterError, MismatchError, NonFiniteError


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))


def save_adapter(model, folder, **settings) -> PeftModel:
    """Save a LoRA adapter whose B is not zero, as PEFT writes it."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **settings}
    with warnings.catch_warnings():
        # PEFT asks transformers for a name that is going, and looks for a hub's copy of a base without one.
        warnings.simplefilter("ignore")
        tuned = get_peft_model(model, LoraConfig(**settings))
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter)
        tuned.save_pretrained(folder)
    return tuned


@pytest.fixture
def full(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "full")
    return tmp_path / "full"


@pytest.fixture
def adapter(tmp_path):
    save_adapter(tiny_llama(), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_full_checkpoint_is_what_transformers_saved(full):
    checkpoint = open_checkpoint(full)
    expected = load_file(full / "model.safetensors")
    assert (checkpoint.kind, checkpoint.name, checkpoint.adapter) == ("full", "full", None)
    assert checkpoint.config["hidden_size"] == 16
    assert checkpoint.lora_pairs() == {}
    assert checkpoint.tensors.keys() == expected.keys()
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in expected.items())


def test_shards_have_the_hash_and_the_tensors_of_one_file(full, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "sharded", max_shard_size="4KB")
    sharded, whole = open_checkpoint(tmp_path / "sharded"), open_checkpoint(full)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert {info.name for info in sharded.tensors.values()} == whole.tensors.keys()
    assert sharded.content_hash() == whole.content_hash()


def test_one_file_has_the_hash_of_its_folder(full):
    checkpoint = open_checkpoint(full / "model.safetensors")
    assert (checkpoint.kind, checkpoint.name) == ("full", "model")
    assert checkpoint.content_hash() == open_checkpoint(full).content_hash()


def test_one_changed_weight_changes_the_hash(full):
    before = open_checkpoint(full).content_hash()
    tensors = load_file(full / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, full / "model.safetensors")
    assert open_checkpoint(full).content_hash() != before


def test_configuration_does_not_change_the_hash(full):
    before = open_checkpoint(full).content_hash()
    (full / "config.json").write_text("{}")
    assert open_checkpoint(full).content_hash() == before


def test_the_name_of_the_folder_is_safe_to_print(full, tmp_path):
    shutil.copytree(full, tmp_path / "a\x1b[31m")
    assert open_checkpoint(tmp_path / "a\x1b[31m").name == "a\\x1b[31m"


def test_a_snapshot_of_the_hub_cache_is_read_through_its_links(full, tmp_path):
    blobs, snapshot = tmp_path / "models--x--y" / "blobs", tmp_path / "models--x--y" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name in ("model.safetensors", "config.json"):
        shutil.copy(full / name, blobs / f"sha-{name}")
        (snapshot / name).symlink_to(f"../../blobs/sha-{name}")
    assert open_checkpoint(snapshot).content_hash() == open_checkpoint(full).content_hash()


def test_a_tensor_that_is_not_there_is_a_mismatch(full):
    with pytest.raises(MismatchError, match="has no tensor 'nowhere'"):
        open_checkpoint(full).read("nowhere")


def test_an_adapter_is_paired_by_the_modules_of_the_base(adapter):
    checkpoint = open_checkpoint(adapter)
    modules = dict(tiny_llama().named_modules())
    pairs = checkpoint.lora_pairs()
    assert checkpoint.kind == "adapter"
    assert len(pairs) == 4
    for module, pair in pairs.items():
        assert (*pair.b.shape[:1], *pair.a.shape[1:]) == tuple(modules[module].weight.shape)
        assert (pair.rank, pair.scale, pair.fan_in_fan_out) == (4, 1.5, False)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 3}},
        {"rank_pattern": {"0.self_attn.q_proj": 2, "q_proj": 3}, "alpha_pattern": {"proj": 3}},
        {"alpha_pattern": {"q.proj": 5}},
        {"r": 2, "lora_alpha": 0},
    ],
    ids=["plain", "rslora", "patterns", "first-pattern-wins", "a-dot-matches-any-letter", "alpha-zero"],
)
def test_the_pairs_make_the_change_that_peft_merges(tmp_path, settings):
    model = tiny_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = save_adapter(model, tmp_path / "adapter", **settings).merge_and_unload().state_dict()
    checkpoint = open_checkpoint(tmp_path / "adapter")
    for module, pair in checkpoint.lora_pairs().items():
        change = pair.scale * checkpoint.read(pair.b.name) @ checkpoint.read(pair.a.name)
        name = f"{module}.weight"
        torch.testing.assert_close(before.pop(name) + change, merged[name], rtol=1e-5, atol=1e-5)
    assert all(torch.equal(tensor, merged[name]) for name, tensor in before.items())


def test_weights_stored_transposed_are_marked(tmp_path):
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=32, bos_token_id=0, eos_token_id=0, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    )
    save_adapter(model, tmp_path / "adapter", target_modules=["c_attn"], fan_in_fan_out=True)
    assert all(pair.fan_in_fan_out for pair in open_checkpoint(tmp_path / "adapter").lora_pairs().values())


def test_an_adapter_of_an_embedding_is_marked_as_transposed(adapter):
    a, b = torch.ones(4, 32), torch.ones(16, 4)
    tensors = {"base_model.model.model.embed_tokens.lora_embedding_A": a, "model.embed_tokens.lora_embedding_B": b}
    save_file(tensors, adapter / "adapter_model.safetensors")
    (pair,) = open_checkpoint(adapter).lora_pairs().values()
    assert pair.fan_in_fan_out
    assert (pair.a.shape, pair.b.shape) == ((4, 32), (16, 4))


@pytest.mark.parametrize("change", [{"lora_alpha": 7}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 1}}], ids=str)
def test_settings_that_change_an_adapters_scale_change_its_hash(adapter, change):
    before = open_checkpoint(adapter).content_hash()
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | change))
    assert open_checkpoint(adapter).content_hash() != before


def test_settings_without_effect_do_not_change_an_adapters_hash(adapter):
    before = open_checkpoint(adapter).content_hash()
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"lora_dropout": 0.5, "revision": "x"}))
    assert open_checkpoint(adapter).content_hash() == before


def test_an_adapters_file_is_opened_with_the_settings_beside_it(adapter):
    checkpoint = open_checkpoint(adapter / "adapter_model.safetensors")
    assert checkpoint.kind == "adapter"
    assert checkpoint.content_hash() == open_checkpoint(adapter).content_hash()


@pytest.mark.parametrize("opened", [".", "adapter_model.safetensors"])
def test_an_adapter_without_settings_is_refused(adapter, opened):
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=r"expected adapter_config\.json"):
        open_checkpoint(adapter / opened)


def test_an_honest_checkpoint_has_no_notes_but_those_of_its_tokenizer(full, adapter):
    (full / "tokenizer.json").write_text("{}")
    assert [note.partition(":")[0] for note in open_checkpoint(full).notes] == ["tokenizer-beside"]
    # PEFT names the base only where the base has a name, and no setting that it writes is unknown to us.
    assert open_checkpoint(adapter).notes == ()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2], ids=str)
def test_one_value_that_is_not_finite_is_found(bad, dtype):
    tensor = torch.zeros(4, 5)
    tensor[2, 3] = bad
    with pytest.raises(NonFiniteError, match=r"'w' holds 1 NaN or infinite values of 20"):
        check_finite(tensor.to(dtype), "w", "ckpt")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(0),
        torch.tensor(1.0),
        torch.ones(3, dtype=torch.int64),
        torch.full((2,), 448.0).to(torch.float8_e4m3fn),
    ],
    ids=["empty", "scalar", "integers", "one-byte-floats"],
)
def test_finite_weights_pass(tensor):
    check_finite(tensor, "w", "ckpt")

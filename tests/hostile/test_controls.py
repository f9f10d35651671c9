"""Controls: honest checkpoints that a strict reader must let pass."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from activations.checkpoints import check_finite, open_checkpoint


def tiny_llama(dtype=torch.float32):
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)).to(dtype)


def assert_passes(path, tensors):
    checkpoint = open_checkpoint(path)
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        read = checkpoint.read(name)
        check_finite(read, name, path)
        assert torch.equal(read, tensor)
    return checkpoint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_normal_model_passes_in_every_precision(tmp_path, dtype):
    model = tiny_llama(dtype)
    model.save_pretrained(tmp_path)
    assert assert_passes(tmp_path, model.state_dict()).notes == ()


def test_a_model_with_a_tensor_of_no_elements_passes(tmp_path):
    tensors = {"a": torch.ones(2, 3), "empty": torch.zeros(0, 5), "z": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert_passes(tmp_path, tensors)


def test_a_sharded_model_passes_with_the_hash_of_the_whole(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="6KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    whole, shards = (assert_passes(tmp_path / name, model.state_dict()) for name in ("whole", "shards"))
    assert whole.content_hash() == shards.content_hash()


def test_copies_in_other_precisions_are_other_content(tmp_path):
    hashes = set()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tiny_llama(dtype).save_pretrained(tmp_path / str(dtype))
        hashes.add(open_checkpoint(tmp_path / str(dtype)).content_hash())
    assert len(hashes) == 3

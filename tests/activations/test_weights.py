"""A checkpoint's weights go into the base as they are, come out without a trace, and others' are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from activations.checkpoints import open_checkpoint
from activations.errors import AdapterError, MismatchError, NonFiniteError
from activations.models import Model
from activations.weights import slots_of

IDS = torch.tensor([[1, 72, 104, 108, 111, 5, 40, 200]])

Network = Callable[..., Any]
Save = Callable[..., Path]


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Change the tensors of a saved network."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@torch.inference_mode()
def logits(network: Any) -> torch.Tensor:
    result: torch.Tensor = network(IDS).logits
    return result


def snapshot(model: Model) -> dict[str, tuple[int, bytes]]:
    """Where each weight lies in memory, and its bytes."""
    return {
        name: (slot.data_ptr(), slot.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, slot in slots_of(model.hf).items()
    }


# Full checkpoints


def test_a_checkpoint_makes_the_base_the_model_it_was_saved_from(
    tiny: Callable[[str], Model], tiny_network: Network, architecture: str, save: Save
) -> None:
    model, tuned = tiny(architecture), tiny_network(architecture, seed=1)
    own, before = logits(model.hf), snapshot(model)
    with model.applied(save(tuned)) as same:
        assert same is model
        assert torch.equal(logits(model.hf), logits(tuned))
        assert not torch.allclose(logits(model.hf), own, rtol=0.1)
    assert snapshot(model) == before
    assert torch.equal(logits(model.hf), own)


def test_shards_give_the_same_as_one_file(llama: Model, tiny_network: Network, save: Save) -> None:
    tuned = tiny_network("llama", seed=1)
    folder = save(tuned, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    with llama.applied(folder):
        assert torch.equal(logits(llama.hf), logits(tuned))


def test_an_error_inside_takes_the_weights_out_too(llama: Model, tiny_network: Network, save: Save) -> None:
    before, folder = snapshot(llama), save(tiny_network("llama", seed=1))
    with pytest.raises(ZeroDivisionError), llama.applied(folder):
        raise ZeroDivisionError if snapshot(llama) != before else AssertionError
    assert snapshot(llama) == before
    assert llama.tuned == ""


def test_checkpoints_nest(
    llama: Model, tiny_network: Network, save: Save, lora: Callable[..., tuple[Path, Any]]
) -> None:
    before, tuned = snapshot(llama), tiny_network("llama", seed=1)
    full, (adapter, _) = save(tuned), lora("llama", ["q_proj"])
    with llama.applied(full):
        outer = llama.tuned
        with llama.applied(adapter):
            assert llama.tuned.split("+") == [outer, open_checkpoint(adapter).content_hash()]
            assert not torch.equal(logits(llama.hf), logits(tuned))
        assert llama.tuned == outer == open_checkpoint(full).content_hash()
        assert torch.equal(logits(llama.hf), logits(tuned))
    assert snapshot(llama) == before


def test_weights_go_in_from_within_inference_mode(llama: Model, tiny_network: Network, save: Save) -> None:
    before, tuned = snapshot(llama), tiny_network("llama", seed=1)
    with torch.inference_mode(), llama.applied(save(tuned)):
        assert torch.equal(logits(llama.hf), logits(tuned))
    assert snapshot(llama) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_is_converted_to_the_bases(
    dtype: torch.dtype, llama: Model, tiny_network: Network, save: Save
) -> None:
    tuned = tiny_network("llama", seed=1)
    for weight in tuned.parameters():
        weight.data = weight.data.to(dtype).float()
    folder = rewrite(save(tuned), lambda tensors: tensors.update({n: t.to(dtype) for n, t in tensors.items()}))
    with llama.applied(folder):
        assert llama.dtype == torch.float32
        assert torch.equal(logits(llama.hf), logits(tuned))


def drop_norm(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.norm.weight"]


def add_layer(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.3.input_layernorm.weight"] = torch.ones(48)


def rename(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.\x1b[31mnorm"] = tensors.pop("model.norm.weight")


def widen(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(65, 48)


def grow_vocabulary(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.embed_tokens.weight"] = torch.ones(300, 48)


def quantise(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(64, 48, dtype=torch.int8)


def other_model(tensors: dict[str, torch.Tensor]) -> None:
    tensors.clear()
    tensors["transformer.wte.weight"] = torch.ones(1_000_000)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (drop_norm, "'model.norm.weight' is missing"),
        (add_layer, "'model.layers.3.input_layernorm.weight' is not in the base"),
        (rename, r"'model.norm.weight' is missing; 'model.\\x1b\[31mnorm' is not in the base"),
        (widen, r"up_proj.weight' has the shape \[65, 48\], expected \[64, 48\]"),
        (grow_vocabulary, r"embed_tokens.weight' has the shape \[300, 48\], expected \[272, 48\]"),
        (quantise, "up_proj.weight' is stored as int8, expected a kind of number like the base's float32"),
        (other_model, "the checkpoint has 1,000,000 weights under other names, the base"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_before_anything_goes_in(
    change: Callable[[dict[str, torch.Tensor]], None], reason: str, llama: Model, tiny_network: Network, save: Save
) -> None:
    folder, before = rewrite(save(tiny_network("llama", seed=1)), change), snapshot(llama)
    with pytest.raises(MismatchError, match=reason) as caught, llama.applied(folder):
        pytest.fail("nothing may go in")
    assert caught.value.path == str(folder)
    assert caught.value.hint
    assert snapshot(llama) == before


@pytest.mark.parametrize("other", ["qwen3", "gpt2", "gpt-neox", "mixtral"])
def test_a_checkpoint_of_another_architecture_is_refused(
    other: str, llama: Model, tiny_network: Network, save: Save
) -> None:
    before = snapshot(llama)
    with (
        pytest.raises(MismatchError, match=r"missing|not in the base|other names"),
        llama.applied(save(tiny_network(other))),
    ):
        pytest.fail("nothing may go in")
    assert snapshot(llama) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_no_number_is_refused(value: float, llama: Model, tiny_network: Network, save: Save) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][7] = value

    folder, before = rewrite(save(tiny_network("llama")), spoil), snapshot(llama)
    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight"), llama.applied(folder):
        pytest.fail("nothing may go in")
    assert snapshot(llama) == before


# Weights under other names


def test_a_weight_that_is_no_number_is_found_behind_a_renaming(
    tiny: Callable[[str], Model], tiny_network: Network, save: Save
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        next(tensor for name, tensor in tensors.items() if "experts.3.w2" in name)[0, 0] = float("nan")

    with pytest.raises(NonFiniteError), tiny("mixtral").applied(rewrite(save(tiny_network("mixtral")), spoil)):
        pytest.fail("nothing may go in")


def test_a_lost_expert_is_missed(tiny: Callable[[str], Model], tiny_network: Network, save: Save) -> None:
    def lose(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".1.block_sparse_moe.experts.3." in name]:
            del tensors[name]

    folder = rewrite(save(tiny_network("mixtral")), lose)
    with pytest.raises(MismatchError, match=r"model.layers.1.mlp.experts"), tiny("mixtral").applied(folder):
        pytest.fail("nothing may go in")


def test_a_checkpoint_without_the_models_prefix_is_understood(
    tiny: Callable[[str], Model], tiny_network: Network, save: Save
) -> None:
    """As GPT-2 lies on the hub."""

    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    model, tuned = tiny("gpt2"), tiny_network("gpt2", seed=1)
    with model.applied(rewrite(save(tuned), strip)):
        assert torch.equal(logits(model.hf), logits(tuned))


# Tied weights


def tied_head(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + value

    return add


def test_a_tied_weight_may_be_stored_twice_but_not_contradict(
    tiny: Callable[[str], Model], tiny_network: Network, save: Save
) -> None:
    model, tuned = tiny("llama-tied"), tiny_network("llama-tied", seed=1)
    with model.applied(rewrite(save(tuned, "agrees"), tied_head(0.0))):
        assert torch.equal(logits(model.hf), logits(tuned))
    with (
        pytest.raises(MismatchError, match=r"'lm_head.weight' and 'model.embed_tokens.weight' differ"),
        model.applied(rewrite(save(tuned, "contradicts"), tied_head(1e-3))),
    ):
        pytest.fail("nothing may go in")


def test_an_untied_base_needs_its_head(llama: Model, tiny_network: Network, save: Save) -> None:
    folder = rewrite(save(tiny_network("llama")), lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(MismatchError, match=r"'lm_head.weight' is missing"), llama.applied(folder):
        pytest.fail("nothing may go in")


# Adapters


LORAS = [
    ("llama", ["q_proj", "v_proj", "down_proj"], {}),
    ("llama", ["o_proj"], {"use_rslora": True}),
    ("llama", ["q_proj", "up_proj"], {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"q_proj": 3}}),
    ("gemma3", ["k_proj", "gate_proj"], {}),
    ("gpt-neox", ["query_key_value", "dense"], {}),
    ("gpt2", ["c_attn", "c_proj"], {"fan_in_fan_out": True}),
    ("mixtral", ["q_proj"], {}),
]


@pytest.mark.parametrize(("architecture", "targets", "settings"), LORAS)
def test_an_adapter_merged_is_the_model_that_peft_runs(
    architecture: str,
    targets: list[str],
    settings: dict[str, Any],
    tiny: Callable[[str], Model],
    lora: Callable[..., tuple[Path, Any]],
) -> None:
    model, (folder, expected) = tiny(architecture), lora(architecture, targets, **settings)
    own, before = logits(model.hf), snapshot(model)
    with model.applied(folder):
        torch.testing.assert_close(logits(model.hf), logits(expected), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(logits(model.hf), own, rtol=0.1)
        moved = [name for name, was in snapshot(model).items() if was != before[name]]
        assert all(name.removesuffix(".weight").endswith(tuple(targets)) for name in moved)
    assert snapshot(model) == before


@pytest.mark.parametrize("other", ["gpt-neox", "gpt2"])
def test_an_adapter_of_another_architecture_is_refused(
    other: str, tiny: Callable[[str], Model], lora: Callable[..., tuple[Path, Any]]
) -> None:
    (folder, _), before = lora("llama", ["q_proj"]), snapshot(tiny(other))
    reason = r"'model\.layers\.0\.self_attn\.q_proj' is no matrix of the base; .* is no matrix"
    with pytest.raises(MismatchError, match=reason) as caught, tiny(other).applied(folder):
        pytest.fail("nothing may go in")
    assert caught.value.path == str(folder)
    assert snapshot(tiny(other)) == before


def test_an_adapter_of_other_shapes_is_refused(llama: Model, lora: Callable[..., tuple[Path, Any]]) -> None:
    folder, _ = lora("llama", ["k_proj"])
    path = folder / "adapter_model.safetensors"
    tensors = {name: torch.zeros(4, 96) if ".lora_A." in name else tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    with (
        pytest.raises(MismatchError, match=r"k_proj' is changed as \[24, 96\], expected \[24, 48\]"),
        llama.applied(folder),
    ):
        pytest.fail("nothing may go in")


def test_an_adapter_that_is_no_number_is_refused(llama: Model, lora: Callable[..., tuple[Path, Any]]) -> None:
    folder, _ = lora("llama", ["q_proj"])
    path, before = folder / "adapter_model.safetensors", snapshot(llama)
    save_file({name: tensor * float("inf") for name, tensor in load_file(path).items()}, path)
    with pytest.raises(NonFiniteError), llama.applied(folder):
        pytest.fail("nothing may go in")
    assert snapshot(llama) == before


def test_an_adapter_cannot_change_one_half_of_a_tie(
    tiny: Callable[[str], Model], lora: Callable[..., tuple[Path, Any]]
) -> None:
    model, (folder, _) = tiny("llama-tied"), lora("llama", ["q_proj"])
    path = folder / "adapter_model.safetensors"
    a, b = torch.ones(4, 48), torch.ones(272, 4)
    prefix = "base_model.model.lm_head.lora_"
    save_file({f"{prefix}A.weight": a, f"{prefix}B.weight": b}, path)
    with pytest.raises(AdapterError, match="'lm_head', which the base ties to another place"), model.applied(folder):
        pytest.fail("nothing may go in")

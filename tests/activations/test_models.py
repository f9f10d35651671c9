"""A base loads or says why not, and TransformerLens' view of it is the same model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from activations.checkpoints import open_checkpoint
from activations.errors import CheckpointError, ModelError, NotCausalError, OptionError, PathMissingError
from activations.models import Model, load_model
from activations.weights import slots_of

IDS = torch.tensor([[1, 72, 104, 108, 111, 5, 40, 200]])

Network = Callable[..., Any]
Save = Callable[..., Path]


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


# Loading


def test_a_folder_loads_with_what_a_report_needs(tiny_network: Network, save: Save) -> None:
    network = tiny_network("qwen3")
    folder = save(network, "my-base")
    model = load_model(folder, device="cpu")
    assert (model.name, model.n_layers, model.d_model) == ("my-base", 3, 48)
    assert (model.dtype, model.device.type, model.hf.training) == (torch.float32, "cpu", False)
    assert model.fingerprint == open_checkpoint(folder).content_hash()
    assert torch.equal(logits(model.hf), logits(network))


def test_a_checkpoint_in_half_precision_runs_in_the_dtype_asked_for(tiny_network: Network, save: Save) -> None:
    folder = save(tiny_network("llama").bfloat16())
    assert load_model(folder, device="cpu").dtype == torch.float32
    assert load_model(str(folder), dtype="bfloat16").dtype == torch.bfloat16


def test_loading_writes_nothing_to_the_terminal(
    tiny_network: Network, save: Save, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = save(tiny_network("mixtral"))
    capfd.readouterr()
    model = load_model(folder)
    with model.applied(folder):
        pass
    assert capfd.readouterr() == ("", "")


def test_a_model_in_memory_is_put_into_evaluation_mode_and_stays_where_it_is(tiny_network: Network) -> None:
    network = tiny_network("llama").train()
    model = load_model(network)
    assert model.hf is network
    assert not network.training
    assert model.name == "LlamaForCausalLM"
    assert load_model(network, dtype="bfloat16").dtype == torch.bfloat16


def test_the_fingerprint_of_a_model_in_memory_sees_every_weight(tiny_network: Network) -> None:
    fingerprints = set()
    for change in (None, "model.norm.weight", "model.layers.2.mlp.down_proj.weight"):
        network = tiny_network("llama")
        if change:
            network.get_parameter(change).data.view(-1)[-1] += 1e-3
        fingerprints.add(Model(network).fingerprint)
    assert len(fingerprints) == 3
    assert Model(tiny_network("llama")).fingerprint in fingerprints


def test_a_folder_and_the_same_model_in_memory_have_one_fingerprint(tiny_network: Network, save: Save) -> None:
    network = tiny_network("llama-tied")
    assert Model(network).fingerprint == load_model(save(network)).fingerprint


def test_the_fingerprint_is_the_bases_even_if_first_asked_for_while_a_checkpoint_is_in(
    tiny_network: Network, save: Save
) -> None:
    expected = Model(tiny_network("llama")).fingerprint
    model, outer, inner = (Model(tiny_network("llama")), save(tiny_network("llama", seed=1), "outer"), "inner")
    with model.applied(outer), model.applied(save(tiny_network("llama", seed=2), inner)):
        assert model.fingerprint == expected


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def unknown_type(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "novel"}')


def impossible_size(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": -1}))


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


def lost_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("damage", [no_config, broken_config, unknown_type, impossible_size, no_tokenizer, lost_weight])
def test_a_broken_base_is_a_named_error(damage: Callable[[Path], None], tiny_network: Network, save: Save) -> None:
    folder = save(tiny_network("llama"))
    damage(folder)
    with pytest.raises((ModelError, CheckpointError)) as caught:
        load_model(folder)
    assert str(folder) in str(caught.value.path)
    assert caught.value.hint
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("base", ["./nowhere", "/no/where", "a/b/c", "no-such-model", Path("nowhere")])
def test_a_base_that_is_nowhere_is_named(base: str | Path) -> None:
    with pytest.raises(PathMissingError) as caught:
        load_model(base)
    assert caught.value.path == str(base)


def test_a_base_that_is_no_causal_language_model_is_refused(save: Save) -> None:
    config = transformers.BertConfig(
        vocab_size=272, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    folder = save(transformers.BertForMaskedLM(config), "bert")
    with pytest.raises(NotCausalError, match=r"the base is a BertForMaskedLM, expected a causal language model"):
        load_model(folder)


def test_an_adapter_is_no_base(tiny_network: Network, lora: Callable[..., tuple[Path, Any]]) -> None:
    folder, _ = lora("llama", ["q_proj"])
    with pytest.raises(ModelError, match="is an adapter, expected a base"):
        load_model(folder)


@pytest.mark.parametrize(("name", "value"), [("device", "tpu9"), ("device", "cuda:99"), ("dtype", "int4")])
def test_an_option_that_makes_no_sense_is_named(name: str, value: str, tiny_network: Network) -> None:
    with pytest.raises(OptionError, match=value):
        load_model(tiny_network("llama"), **{name: value})


# TransformerLens


def test_the_bridge_sees_the_same_model_and_leaves_it_alone(tiny: Callable[[str], Model], architecture: str) -> None:
    model = tiny(architecture)
    before, attention = snapshot(model), model.hf.config._attn_implementation
    modules, own = dict(model.hf.named_modules()), logits(model.hf)
    bridge = model.bridge()
    with torch.inference_mode():
        torch.testing.assert_close(bridge(IDS), own, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model.hf), own)
    assert (snapshot(model), dict(model.hf.named_modules())) == (before, modules)
    assert model.hf.config._attn_implementation == attention


def test_the_bridge_copies_no_weight_and_sees_a_checkpoint_come_and_go(
    llama: Model, tiny_network: Network, save: Save
) -> None:
    bridge, tuned = llama.bridge(), tiny_network("llama", seed=1)
    assert {id(weight) for weight in bridge.original_model.parameters()} == {
        id(weight) for weight in llama.hf.parameters()
    }
    with llama.applied(save(tuned)), torch.inference_mode():
        torch.testing.assert_close(bridge(IDS), logits(tuned), rtol=1e-4, atol=1e-4)


def test_processing_weights_in_the_bridge_does_not_reach_the_model(llama: Model) -> None:
    before = snapshot(llama)
    llama.bridge().enable_compatibility_mode()
    assert snapshot(llama) == before


def test_a_model_without_a_tokenizer_has_a_bridge(tiny_network: Network) -> None:
    model = load_model(tiny_network("llama"))
    with torch.inference_mode():
        torch.testing.assert_close(model.bridge()(IDS), logits(model.hf), rtol=1e-4, atol=1e-4)

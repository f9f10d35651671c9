"""A base loads, or says why not."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from activations.checkpoints import open_checkpoint
from activations.errors import CheckpointError, ModelError, NotCausalError, OptionError, PathMissingError
from activations.loading import load_model
from activations.models import Model

IDS = torch.tensor([[1, 72, 104, 108, 111, 5, 40, 200]])

Network = Callable[..., Any]
Save = Callable[..., Path]


@torch.inference_mode()
def logits(network: Any) -> torch.Tensor:
    result: torch.Tensor = network(IDS).logits
    return result


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


@pytest.mark.parametrize(
    ("name", "value"),
    [("device", "tpu9"), ("device", "cuda:99"), ("dtype", "int4"), ("device_map", "auto"), ("quantize", "4bit")],
)
def test_an_option_that_makes_no_sense_is_named(name: str, value: str, tiny_network: Network) -> None:
    with pytest.raises(OptionError, match=value):
        load_model(tiny_network("llama"), **{name: value})


# Several devices, of which there is one here


def test_a_device_map_gives_the_same_model(tiny_network: Network, save: Save) -> None:
    network = tiny_network("llama")
    folder, tuned = save(network), tiny_network("llama", seed=1)
    parts = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    for device_map in ("auto", "cpu", {"": "cpu"}, {**parts, "lm_head": "cpu"}):
        model = load_model(folder, device_map=device_map)
        assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
        assert torch.equal(logits(model.hf), logits(network))
        with model.applied(save(tuned, "tuned")):
            assert torch.equal(logits(model.hf), logits(tuned))
        assert torch.equal(logits(model.hf), logits(network))


def test_a_model_with_dispatch_hooks_passes_the_self_test_and_takes_checkpoints(
    tiny_network: Network, save: Save, architecture: str
) -> None:
    from accelerate import dispatch_model

    network, tuned = tiny_network(architecture), tiny_network(architecture, seed=1)
    expected = logits(network)
    model = load_model(dispatch_model(network, {"": "cpu"}, force_hooks=True))
    assert any(hasattr(module, "_hf_hook") for module in model.hf.modules())
    with model.applied(save(tuned)):
        assert torch.equal(logits(model.hf), logits(tuned))
        assert model.changed
    assert torch.equal(logits(model.hf), expected)
    torch.testing.assert_close(model.bridge()(IDS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": {"": "disk"}}, "device 'disk' cannot be used"),
        ({"device_map": {"model": "cpu", "lm_head": 99}}, "device 'cuda:99' cannot be used"),
        ({"device_map": "everywhere"}, "device 'everywhere' cannot be used"),
        ({"device_map": "cpu", "device": "cpu"}, "device and device_map exclude each other"),
        ({"quantize": "3bit"}, "unknown quantisation '3bit': expected 8bit or 4bit"),
    ],
)
def test_a_placement_that_makes_no_sense_is_named(
    options: dict[str, Any], message: str, tiny_network: Network, save: Save
) -> None:
    with pytest.raises(OptionError, match=message):
        load_model(save(tiny_network("llama")), **options)


def test_weights_that_lie_nowhere_are_refused(tiny_network: Network, save: Save) -> None:
    with pytest.raises(ModelError, match="weights were left off the devices"):
        load_model(save(tiny_network("llama")), device_map={"model": "meta", "lm_head": "cpu"})


# Packed bases


def test_packing_without_bitsandbytes_is_named(
    tiny_network: Network, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    with pytest.raises(OptionError, match=r"no packing to 4bit on cpu: .*bitsandbytes") as caught:
        load_model(save(tiny_network("llama")), device="cpu", quantize="4bit")
    assert "Install bitsandbytes" in caught.value.hint


@pytest.fixture
def packed(tiny_network: Network, save: Save) -> Callable[[str], tuple[Path, Model]]:
    pytest.importorskip("bitsandbytes")
    # Its own: a cast that it announces at each matrix of an 8-bit model.
    warnings.filterwarnings("ignore", "MatMul8bitLt")

    def load(quantize: str) -> tuple[Path, Model]:
        folder = save(tiny_network("llama-64"), "unpacked")
        return folder, load_model(folder, device="cpu", quantize=quantize)

    return load


@pytest.mark.parametrize(("quantize", "loss"), [("8bit", 0.1), ("4bit", 0.5)])
def test_a_packed_base_runs_and_is_as_rough_as_its_bits(
    quantize: str, loss: float, packed: Callable[[str], tuple[Path, Model]], tiny_network: Network, save: Save
) -> None:
    folder, model = packed(quantize)
    assert (model.quantization, load_model(folder, device="cpu").quantization) == (quantize, "")
    assert model.hf.model.layers[0].self_attn.q_proj.weight.dtype in (torch.int8, torch.uint8)
    exact = logits(tiny_network("llama-64"))
    assert 0 < (logits(model.hf) - exact).norm() / exact.norm() < loss
    assert model.fingerprint == open_checkpoint(folder).content_hash()
    assert model.hook_points.names("attn.hook_z")
    # Saved as it is, it loads again, and knows what it is.
    again = load_model(save(model.hf, "packed"), device="cpu")
    assert again.quantization == quantize
    assert torch.equal(logits(again.hf), logits(model.hf))
    assert again.fingerprint != model.fingerprint
    with pytest.raises(OptionError, match="is quantised already"):
        load_model(folder.parent / "packed", quantize=quantize)


@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_no_checkpoint_goes_into_a_packed_base(
    quantize: str, packed: Callable[[str], tuple[Path, Model]], lora: Callable[..., tuple[Path, Any]]
) -> None:
    folder, model = packed(quantize)
    before = logits(model.hf)
    for checkpoint in (folder, lora("llama-64", ["q_proj"])[0], "/no/where"):
        with (
            pytest.raises(ModelError, match=rf"is quantised \({quantize}\), and no checkpoint"),
            model.applied(checkpoint),
        ):
            pass
    assert torch.equal(logits(model.hf), before)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(model.hf, dtype="bfloat16")

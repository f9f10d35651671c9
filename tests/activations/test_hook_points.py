"""TransformerLens' names lead to the right modules in every architecture, and the model is left as it was."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from activations.errors import HookPointError, ModelError, NotCausalError, SelfTestError
from activations.hook_points import RESID_POST, HookPoints, Site, layer_of, self_test
from activations.models import Model


def test_every_block_has_its_residual_stream(tiny: Callable[[str], Model], architecture: str) -> None:
    points = tiny(architecture).hook_points
    assert points.n_layers == 3
    assert points.names(RESID_POST) == tuple(f"blocks.{layer}.hook_resid_post" for layer in range(3))
    blocks = [points.resolve(name).module for name in points.names(RESID_POST)]
    assert len(set(map(id, blocks))) == 3
    assert [points.resolve(f"blocks.{layer}.hook_resid_pre") for layer in range(3)] == [
        Site(block, "input") for block in blocks
    ]


def test_every_listed_name_resolves_inside_its_block(tiny: Callable[[str], Model], architecture: str) -> None:
    model = tiny(architecture)
    names = model.hook_points.names()
    assert len(set(names)) == len(names)
    for name in names:
        block = model.hook_points.resolve(f"blocks.{layer_of(name)}.{RESID_POST}").module
        assert model.hook_points.resolve(name).module in list(block.modules())


def test_blocks_whose_parts_run_side_by_side_have_no_middle(tiny: Callable[[str], Model]) -> None:
    assert "blocks.1.hook_resid_mid" in tiny("llama").hook_points.names()
    with pytest.raises(
        HookPointError, match=r"'hook_resid_mid' in 'blocks.1.hook_resid_mid' does not exist in this model"
    ):
        tiny("gpt-neox").hook_points.resolve("blocks.1.hook_resid_mid")


def test_the_layers_of_a_name() -> None:
    assert layer_of("blocks.12.hook_resid_post") == 12


@pytest.mark.parametrize(
    "name", ["", "blocks", "blocks.-1.hook_resid_post", "blocks.1", "layers.1.hook_resid_post", "1"]
)
def test_what_is_no_name_says_what_one_looks_like(name: str, llama: Model) -> None:
    with pytest.raises(HookPointError, match=r"expected a name like 'blocks.0.hook_resid_post'"):
        llama.hook_points.resolve(name)


def test_a_layer_out_of_range_says_the_range(llama: Model) -> None:
    with pytest.raises(HookPointError, match=r"layer 3 in .* does not exist: the model has layers 0-2") as caught:
        llama.hook_points.resolve("blocks.3.hook_resid_post")
    assert caught.value.code == "hook-point"


def test_an_unknown_kind_lists_the_known_ones(llama: Model) -> None:
    with pytest.raises(HookPointError, match=r"expected one of hook_resid_pre, .*hook_resid_post"):
        llama.hook_points.resolve("blocks.0.hook_pattern")
    with pytest.raises(HookPointError, match=r"'hook_pattern'"):
        llama.hook_points.names("hook_pattern")


def hooks(network: Any) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules())


def test_resolving_leaves_the_model_as_it_was(tiny_network: Callable[..., Any], architecture: str) -> None:
    network = tiny_network(architecture)
    modules, config = dict(network.named_modules()), network.config.to_dict()
    points = HookPoints(network)
    for name in points.names():
        points.resolve(name)
    assert dict(network.named_modules()) == modules
    assert network.config.to_dict() == config
    assert network.config.architectures is None
    assert hooks(network) == 0


def test_the_self_test_leaves_no_hook_of_ours(tiny_network: Callable[..., Any], architecture: str) -> None:
    network = tiny_network(architecture)
    network(torch.tensor([[3]]), output_hidden_states=True)  # transformers keeps hooks of its own from here on
    before = hooks(network)
    self_test(network, HookPoints(network))
    assert hooks(network) == before


def test_an_architecture_without_an_adapter_is_named(tiny_network: Callable[..., Any]) -> None:
    class NovelForCausalLM(transformers.LlamaForCausalLM):
        pass

    network = tiny_network("llama")
    network.__class__ = NovelForCausalLM
    with pytest.raises(ModelError, match=r"TransformerLens cannot map NovelForCausalLM"):
        HookPoints(network).names()


class ShiftedBy(HookPoints):
    """Hook points that are off by some layers, as a wrong map would be."""

    shift = 1

    def resolve(self, hook_point: str) -> Site:
        layer = (layer_of(hook_point) + self.shift) % self.n_layers
        return super().resolve(f"blocks.{layer}.{hook_point.rsplit('.', 1)[1]}")


def test_the_self_test_catches_layers_that_are_off_by_one(tiny_network: Callable[..., Any], architecture: str) -> None:
    network = tiny_network(architecture)
    points = ShiftedBy(network)
    with pytest.raises(SelfTestError, match=r"blocks.0.hook_resid_post of \w+ is not hidden_states\[1\]"):
        self_test(network, points)
    points.shift = 0
    self_test(network, points)


def test_a_base_whose_sizes_contradict_each_other_is_named() -> None:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=8)
    network = transformers.LlamaForCausalLM(config)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM cannot run: "):
        self_test(network, HookPoints(network))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_self_test_catches_numbers_that_overflow(tiny_network: Callable[..., Any], value: float) -> None:
    network = tiny_network("llama")
    network.model.layers[1].mlp.down_proj.weight.data[0, 0] = value
    with pytest.raises(ModelError, match=r"NaN or infinite at layer 1 in torch.float32"):
        self_test(network, HookPoints(network))


def test_the_self_test_catches_a_hook_on_the_wrong_side(llama: Model) -> None:
    class Before(HookPoints):
        def resolve(self, hook_point: str) -> Site:
            return Site(super().resolve(hook_point).module, "input")

    with pytest.raises(SelfTestError):
        self_test(llama.hf, Before(llama.hf))


def test_the_self_test_catches_a_last_layer_that_is_wrong_before_the_norm(tiny_network: Callable[..., Any]) -> None:
    class WithoutNorm(HookPoints):
        final_norm = None

    network = tiny_network("llama")
    with pytest.raises(SelfTestError, match=r"blocks.2"):
        self_test(network, WithoutNorm(network))


def test_the_self_test_catches_a_model_that_looks_ahead(tiny_network: Callable[..., Any]) -> None:
    network = tiny_network("llama")
    network.config.is_causal = False
    with pytest.raises(NotCausalError, match=r"LlamaForCausalLM lets tokens see later ones") as caught:
        self_test(network, HookPoints(network))
    assert caught.value.code == "not-causal-lm"


def test_nothing_heavy_is_imported_before_a_model_is_loaded() -> None:
    code = "import sys, activations.extract; print({'transformers', 'transformer_lens'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"

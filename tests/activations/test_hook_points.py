"""TransformerLens' names lead to the right modules in every architecture, and the model is left as it was."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from activations.errors import HookPointError, ModelError, NotCausalError, SelfTestError
from activations.hook_points import HEADS, RESID_POST, ROUTER, HookPoints, Site, layer_of
from activations.models import Model
from activations.self_test import self_test
from activations.weights import slots_of

IDS = torch.tensor([[1, 72, 104, 108, 111, 5, 40, 200], [9, 3, 77, 150, 31, 64, 250, 12]])
WITH_ROUTERS = ["mixtral", "qwen3-moe", "olmoe", "qwen2-moe", "gpt-oss", "granite-moe", "deepseek3"]


@torch.inference_mode()
def seen(network: Any, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """What one forward pass shows at each hook point."""
    caught: dict[str, torch.Tensor] = {}
    points = HookPoints(network)
    handles = [points.resolve(name).attach(lambda x, name=name: caught.update({name: x.clone()})) for name in names]
    try:
        network(IDS, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return caught


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
    assert layer_of("blocks.7.attn.hook_z") == 7


@pytest.mark.parametrize(
    "name",
    ["", "blocks", "blocks.-1.hook_resid_post", "blocks.1", "layers.1.hook_resid_post", "1", "blocks.1.attn..hook_z"],
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


# Heads


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "qwen3-wide", "mistral", "mixtral", "gpt2", "gpt-neox"])
def test_the_heads_are_what_transformer_lens_calls_z(architecture: str, tiny: Callable[[str], Model]) -> None:
    model = tiny(architecture)
    names = model.hook_points.names(HEADS)
    assert names == tuple(f"blocks.{layer}.attn.hook_z" for layer in range(3))
    ours = seen(model.hf, names)
    with torch.inference_mode():
        _, cache = model.bridge().run_with_cache(IDS)
    for name in names:
        expected = cache[name].flatten(2)
        assert expected.std() > 1e-3
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-4)


def test_the_heads_times_the_output_projection_are_what_attention_adds(
    tiny: Callable[[str], Model], architecture: str
) -> None:
    model = tiny(architecture)
    names = tuple(name for kind in (HEADS, "hook_attn_out") for name in model.hook_points.names(kind))
    values = seen(model.hf, names)
    for layer in range(3):
        block = f"blocks.{layer}."
        projection = model.hook_points.resolve(block + HEADS).module
        weight = projection.weight if isinstance(projection, torch.nn.Linear) else projection.weight.T
        # Each head's part by itself, as a researcher would add them up.
        z = values[block + HEADS].unflatten(-1, (4, -1))
        out = torch.einsum("bthd,ohd->bto", z, weight.unflatten(1, (4, -1)))
        out = out + (projection.bias if getattr(projection, "bias", None) is not None else 0)
        if architecture == "gemma3":
            out = model.hook_points.block(layer).post_attention_layernorm(out)
        torch.testing.assert_close(values[block + "hook_attn_out"], out, rtol=1e-4, atol=1e-4)


def test_heads_can_be_wider_than_the_model(tiny: Callable[[str], Model]) -> None:
    name = "blocks.1.attn.hook_z"
    assert seen(tiny("qwen3-wide").hf, (name,))[name].shape == (2, 8, 80)
    assert seen(tiny("deepseek3").hf, (name,))[name].shape == (2, 8, 40)


def test_heads_computed_by_hand_are_the_heads_seen(tiny_network: Callable[..., Any]) -> None:
    """With queries of zero every token attends evenly to itself and what came before: z is a running mean of values."""
    network = tiny_network("llama")
    attention = network.model.layers[0].self_attn
    attention.q_proj.weight.data.zero_()
    values = seen(network, ("blocks.0.attn.hook_z",))["blocks.0.attn.hook_z"]
    with torch.inference_mode():
        v = attention.v_proj(network.model.layers[0].input_layernorm(network.model.embed_tokens(IDS)))
    v = v.unflatten(-1, (2, 12)).repeat_interleave(2, dim=2)  # two heads share each value
    mean = v.cumsum(1) / torch.arange(1, 9).view(1, 8, 1, 1)
    torch.testing.assert_close(values, mean.flatten(2), rtol=1e-4, atol=1e-5)


def test_a_projection_that_cannot_mix_heads_is_not_believed(tiny_network: Callable[..., Any]) -> None:
    network = tiny_network("llama")
    network.model.layers[1].self_attn.o_proj = torch.nn.Linear(48, 47)
    points = HookPoints(network)
    assert points.names(HEADS) == ("blocks.0.attn.hook_z", "blocks.2.attn.hook_z")
    with pytest.raises(HookPointError, match=r"layer 1 of this model has no attn.hook_z") as caught:
        points.resolve("blocks.1.attn.hook_z")
    assert caught.value.hint == "Layers that have it: 0, 2."


# Routers


@pytest.mark.parametrize("architecture", WITH_ROUTERS)
def test_router_logits_are_those_that_transformers_reports(architecture: str, tiny: Callable[[str], Model]) -> None:
    model = tiny(architecture)
    names = model.hook_points.names(ROUTER)
    values = seen(model.hf, names)
    with torch.inference_mode():
        expected = model.hf(IDS, output_router_logits=True, use_cache=False).router_logits
    assert len(names) == len(expected) >= 2
    for name, logits in zip(names, expected, strict=True):
        assert values[name].is_floating_point()
        assert values[name].flatten(0, -2).shape == (16, 4)
        assert torch.equal(values[name].flatten(0, -2), logits.flatten(0, -2))
    # Neither probabilities nor equal for all tokens.
    assert all(value.flatten(0, -2).std(0).min() > 1e-4 for value in values.values())


def test_a_router_is_computed_from_what_the_experts_read(tiny: Callable[[str], Model]) -> None:
    network = tiny("mixtral").hf
    values = seen(network, ("blocks.1.hook_resid_mid", "blocks.1.mlp.hook_router_logits"))
    block = network.model.layers[1]
    with torch.inference_mode():
        normed = block.post_attention_layernorm(values["blocks.1.hook_resid_mid"])
        expected = (normed @ block.mlp.gate.weight.T).flatten(0, 1)
    torch.testing.assert_close(values["blocks.1.mlp.hook_router_logits"], expected, rtol=1e-4, atol=1e-5)


def test_a_router_within_attention_is_not_taken_for_that_of_the_experts(tiny_network: Callable[..., Any]) -> None:
    network = tiny_network("jetmoe")
    matrices: list[torch.Tensor] = []
    for block in network.model.layers:
        block.mlp.router.layer.register_forward_hook(lambda _, __, output: matrices.append(output.float()))
    names = HookPoints(network).names(ROUTER)
    values = seen(network, names)
    assert len(names) == 3
    assert all(torch.equal(values[name], logits) for name, logits in zip(names, matrices, strict=True))


@pytest.mark.parametrize(("architecture", "dense"), [("qwen3-moe", 1), ("deepseek3", 0)])
def test_a_dense_layer_among_experts_has_no_router(architecture: str, dense: int, tiny: Callable[[str], Model]) -> None:
    points = tiny(architecture).hook_points
    others = [layer for layer in range(3) if layer != dense]
    assert points.names(ROUTER) == tuple(f"blocks.{layer}.mlp.hook_router_logits" for layer in others)
    assert all(points.resolve(name) for name in points.names())
    with pytest.raises(HookPointError, match=rf"layer {dense} of this model has no mlp.hook_router_logits") as caught:
        points.resolve(f"blocks.{dense}.mlp.hook_router_logits")
    assert caught.value.hint == f"Layers that have it: {others[0]}, {others[1]}."


def test_a_dense_model_says_that_it_has_no_router(llama: Model) -> None:
    for ask in (llama.hook_points.names, lambda kind: llama.hook_points.resolve(f"blocks.0.{kind}")):
        with pytest.raises(HookPointError, match=r"does not exist in this model: expected one of") as caught:
            ask(ROUTER)
        assert caught.value.hint.startswith("Only a mixture of experts has a router")
    assert not any("router" in name for name in llama.hook_points.names())


def test_a_router_of_another_size_than_the_experts_is_not_believed(tiny_network: Callable[..., Any]) -> None:
    network = tiny_network("mixtral")
    network.model.layers[2].mlp.gate.weight = torch.nn.Parameter(torch.zeros(5, 48))
    assert HookPoints(network).names(ROUTER) == tuple(f"blocks.{layer}.mlp.hook_router_logits" for layer in range(2))


# Blocks, and what can change their outputs


def test_the_blocks_are_the_models_own(tiny: Callable[[str], Model], architecture: str) -> None:
    points = tiny(architecture).hook_points
    assert points.blocks() == tuple(points.resolve(name).module for name in points.names(RESID_POST))
    assert points.block(2) is points.blocks()[2]
    for layer in (-1, 3):
        with pytest.raises(HookPointError, match=rf"layer {layer} does not exist: the model has layers 0-2"):
            points.block(layer)


def first_that_moves(network: Any, name: str) -> int:
    """The first layer whose output another value of one parameter changes, found by trying."""
    names = HookPoints(network).names(RESID_POST)
    before, parameter = seen(network, names), slots_of(network)[name]
    own = parameter.data
    parameter.data = own + torch.randn(own.shape, generator=torch.Generator().manual_seed(3)) * own.abs().max().add(0.1)
    after = seen(network, names)
    parameter.data = own
    return next((layer_of(each) for each in names if not torch.equal(before[each], after[each])), len(names))


def test_the_first_block_of_a_parameter_is_where_changing_it_shows(
    tiny_network: Callable[..., Any], architecture: str
) -> None:
    network = tiny_network(architecture)
    points = HookPoints(network)
    names = [name for name, slot in slots_of(network).items() if isinstance(slot, torch.nn.Parameter)]
    assert {name: points.first_block_of([name]) for name in names} == {
        name: first_that_moves(network, name) for name in names
    }


@pytest.mark.parametrize("architecture", ["qwen3-moe", "gpt-oss", "deepseek3"])
def test_no_parameter_shows_before_its_first_block(architecture: str, tiny_network: Callable[..., Any]) -> None:
    network = tiny_network(architecture)
    points = HookPoints(network)
    for name in slots_of(network):
        layer = points.first_block_of([name])
        assert layer <= first_that_moves(network, name), name
        assert layer == (int(name.split(".")[2]) if ".layers." in name else layer), name


def test_the_first_block_of_several_is_the_smallest(tiny: Callable[[str], Model]) -> None:
    first = tiny("llama").hook_points.first_block_of
    deep, norm = "model.layers.2.mlp.up_proj.weight", "model.norm.weight"
    assert first([]) == first([norm]) == first([norm, "lm_head.weight"]) == 3
    assert first([deep, norm]) == 2
    assert first([deep, "model.embed_tokens.weight"]) == first([deep, "no.such.name"]) == 0
    tied = tiny("llama-tied").hook_points.first_block_of
    assert (tied(["lm_head.weight"]), tied(["model.norm.weight"])) == (0, 3)


def test_layers_before_the_first_changed_one_are_bit_equal_to_the_bases(
    tiny_network: Callable[..., Any], lora: Callable[..., tuple[Path, Any]], architecture: str
) -> None:
    targets = {"gpt2": "mlp.c_proj", "gpt-neox": "dense_4h_to_h"}.get(architecture, "o_proj")
    folder, _ = lora(architecture, [targets], layers_to_transform=[1], fan_in_fan_out=architecture == "gpt2")
    model = Model(tiny_network(architecture))

    @torch.inference_mode()
    def states() -> list[torch.Tensor]:
        return list(model.hf(IDS, output_hidden_states=True).hidden_states)

    before = states()
    with model.applied(folder):
        assert model.first_changed_layer == 1
        assert [torch.equal(one, two) for one, two in zip(before, states(), strict=True)] == [True, True, False, False]

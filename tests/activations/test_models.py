"""Weights go in and out exactly, what changed is known, and TransformerLens' view is the same model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from activations.loading import load_model
from activations.models import Model, _same_bytes
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


# What identifies a model


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


# What a checkpoint changed


UP, NORM, DOWN = "model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.layers.2.mlp.down_proj.weight"


def moved(network: Any, *names: str) -> Any:
    """The network, other in these parameters."""
    for name in names:
        network.get_parameter(name).data.add_(1)
    return network


def agrees(model: Model, now: dict[str, tuple[int, bytes]], own: dict[str, tuple[int, bytes]]) -> None:
    """What `changed` says is what has other bytes, and nothing else lies in other memory."""
    assert model.changed == {name for name in own if own[name][1] != now[name][1]}
    assert model.changed == {name for name in own if own[name][0] != now[name][0]}


def test_only_what_differs_is_changed_and_swapped(tiny_network: Network, save: Save) -> None:
    model = Model(tiny_network("llama"))
    own = snapshot(model)
    assert (model.changed, model.first_changed_layer) == (frozenset(), 3)
    with model.applied(save(moved(tiny_network("llama"), UP, NORM), "tuned")):
        assert model.changed == {UP, NORM}
        agrees(model, snapshot(model), own)
        assert model.first_changed_layer == 1
    assert (model.changed, snapshot(model)) == (frozenset(), own)


def test_the_base_itself_and_what_comes_after_the_layers_change_no_layer(tiny_network: Network, save: Save) -> None:
    model = Model(tiny_network("llama"))
    with model.applied(save(tiny_network("llama"), "same")):
        assert (model.changed, model.first_changed_layer) == (frozenset(), 3)
        assert model.tuned
    with model.applied(save(moved(tiny_network("llama"), NORM), "norm")):
        assert (model.changed, model.first_changed_layer) == ({NORM}, 3)


def test_bytes_decide_what_changed(tiny_network: Network, save: Save) -> None:
    """Minus zero is not zero, although they are equal."""
    network = tiny_network("llama")
    network.model.norm.weight.data[0] = 0.0
    model = Model(network)
    twin = tiny_network("llama")
    twin.model.norm.weight.data[0] = -0.0
    with model.applied(save(twin)):
        assert model.changed == {"model.norm.weight"}
        assert str(model.hf.model.norm.weight[0].item()) == "-0.0"


def test_a_broken_value_that_the_base_has_too_is_no_change() -> None:
    nan = torch.tensor([float("nan"), 1.0])
    assert _same_bytes(nan, nan.clone())
    assert not _same_bytes(nan, torch.tensor([1.0, float("nan")]))
    assert not _same_bytes(torch.zeros(2, dtype=torch.bfloat16), -torch.zeros(2, dtype=torch.bfloat16))
    assert _same_bytes(torch.tensor(True), torch.tensor(True))


def test_what_changed_is_relative_to_the_base_in_nested_blocks(tiny_network: Network, save: Save) -> None:
    model = Model(tiny_network("llama"))
    own, fingerprint = snapshot(model), Model(tiny_network("llama")).fingerprint
    outer = save(moved(tiny_network("llama"), UP, NORM), "outer")
    inner = save(moved(tiny_network("llama"), DOWN, NORM), "inner")
    with model.applied(outer):
        within = snapshot(model)
        with model.applied(inner):
            now = snapshot(model)
            assert model.changed == {DOWN, NORM}
            agrees(model, now, own)
            assert now[UP] == own[UP] != within[UP]
            assert model.first_changed_layer == 2
            assert model.fingerprint == fingerprint
        assert (snapshot(model), model.changed) == (within, {UP, NORM})
    assert (snapshot(model), model.changed) == (own, frozenset())


def test_an_adapter_inside_a_checkpoint_changes_both(
    tiny_network: Network, save: Save, lora: Callable[..., tuple[Path, Any]]
) -> None:
    model = Model(tiny_network("llama"))
    folder, _ = lora("llama", ["o_proj"], layers_to_transform=[2])
    with model.applied(save(moved(tiny_network("llama"), UP), "outer")), model.applied(folder):
        assert model.changed == {UP, "model.layers.2.self_attn.o_proj.weight"}
        assert model.first_changed_layer == 1


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

"""A run that starts in the middle gives the very same bits, and runs nothing below."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from activations.errors import OptionError
from activations.extract import extract
from activations.loading import load_model
from activations.models import Model
from activations.packing import reach
from activations.reuse import ResidualCache, can_start_at

PROMPTS = ["Hi", "How do I bake bread?", "x" * 30, "What is the capital of Iceland, and why?", "é"]
SYSTEM = "You are a model that is asked about bread."


@pytest.fixture
def tuned(tiny_network: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint of an architecture whose blocks from some layer on are changed."""

    def make(architecture: str, layer: int, seed: int = 1) -> Path:
        network = tiny_network(architecture)
        blocks = load_model(network, check=False).hook_points.blocks()
        for block in blocks[layer:]:
            for parameter in block.parameters():
                parameter.data.mul_(1 + 0.1 * seed)
        folder = tmp_path / f"{architecture}-{layer}-{seed}"
        network.save_pretrained(folder)
        return folder

    return make


@contextmanager
def watched(model: Model) -> Iterator[list[int]]:
    """Which blocks do their work: those whose first submodule runs."""
    ran: list[int] = []
    handles = [
        next(iter(block.children())).register_forward_pre_hook(lambda *_, layer=layer: ran.append(layer))
        for layer, block in enumerate(model.hook_points.blocks())
    ]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("system", ["", SYSTEM])
@pytest.mark.parametrize("pooling", ["last", "mean", "all"])
def test_reused_layers_give_the_same_bits(
    pooling: str,
    system: str,
    architecture: str,
    tiny_network: Callable[..., Any],
    tokenizer: Any,
    tuned: Callable[..., Path],
) -> None:
    model = load_model(tiny_network(architecture), tokenizer=tokenizer)
    reuse = ResidualCache(model)
    for seed in (1, 2):
        with model.applied(tuned(architecture, 2, seed)):
            assert model.first_changed_layer == 2
            plain = extract(model, PROMPTS, pooling=pooling, system=system, max_tokens=64)
            with watched(model) as ran:
                got = extract(model, PROMPTS, pooling=pooling, system=system, max_tokens=64, reuse=reuse)
        np.testing.assert_array_equal(got.values, plain.values)
        for one, expected in zip(got.tokens, plain.tokens, strict=True):
            np.testing.assert_array_equal(one, expected)
        if seed == 2:
            below = [layer for layer in ran if layer < 2]
            assert below == ([0, 1] if system and not reach(model) else []), "a shared beginning runs below"
    base = extract(model, PROMPTS, pooling=pooling, system=system, max_tokens=64)
    again = extract(model, PROMPTS, pooling=pooling, system=system, max_tokens=64, reuse=reuse)
    np.testing.assert_array_equal(again.values, base.values)


def test_the_base_can_leave_what_checkpoints_go_on_from(llama: Model, tuned: Callable[..., Path]) -> None:
    reuse = ResidualCache(llama, layers=(1, 2))
    extract(llama, PROMPTS, reuse=reuse)
    for layer in (1, 2):
        with llama.applied(tuned("llama", layer)):
            plain = extract(llama, PROMPTS)
            with watched(llama) as ran:
                got = extract(llama, PROMPTS, reuse=reuse)
        assert min(ran) == layer
        np.testing.assert_array_equal(got.values, plain.values)


def test_a_change_below_what_is_kept_is_never_overlooked(llama: Model, tuned: Callable[..., Path]) -> None:
    reuse = ResidualCache(llama, layers=(2,))
    extract(llama, PROMPTS, reuse=reuse)
    for layer in (0, 1):
        with llama.applied(tuned("llama", layer)):
            plain, got = extract(llama, PROMPTS), extract(llama, PROMPTS, reuse=reuse)
        np.testing.assert_array_equal(got.values, plain.values)
    np.testing.assert_array_equal(extract(llama, PROMPTS, reuse=reuse).values, extract(llama, PROMPTS).values)


def test_places_below_the_change_need_no_pass_at_all(llama: Model, tuned: Callable[..., Path]) -> None:
    reuse, names = ResidualCache(llama), ["blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"]
    expected = extract(llama, PROMPTS, hook_points=names, reuse=reuse)
    with llama.applied(tuned("llama", 2)), watched(llama) as ran:
        extract(llama, PROMPTS, hook_points=names, reuse=reuse)
        got = extract(llama, PROMPTS, hook_points=names, reuse=reuse)
    np.testing.assert_array_equal(got.values, expected.values)
    assert ran.count(0) <= 1


def test_other_prompts_places_and_poolings_are_not_mixed_up(llama: Model, tuned: Callable[..., Path]) -> None:
    reuse = ResidualCache(llama, layers=(2,))
    ways: list[dict[str, Any]] = [
        {},
        {"pooling": "mean"},
        {"system": "T4"},
        {"hook_points": ["blocks.1.hook_resid_post", "blocks.2.hook_resid_pre"]},
        {"answers": ["a", "b", "c", "d", "e"]},
    ]
    for way in ways:
        extract(llama, PROMPTS, reuse=reuse, **way)
    with llama.applied(tuned("llama", 2)):
        for way in ways:
            np.testing.assert_array_equal(
                extract(llama, PROMPTS, reuse=reuse, **way).values, extract(llama, PROMPTS, **way).values
            )


def test_without_room_runs_are_whole(llama: Model, tuned: Callable[..., Path]) -> None:
    reuse = ResidualCache(llama, max_bytes=10)
    for seed in (1, 2):
        with llama.applied(tuned("llama", 2, seed)), watched(llama) as ran:
            extract(llama, PROMPTS, reuse=reuse)
        assert min(ran) == 0
    assert reuse.nbytes == 0


def test_blocks_are_the_models_own_again_afterwards(llama: Model, tuned: Callable[..., Path]) -> None:
    reuse = ResidualCache(llama)
    for seed in (1, 2):
        with llama.applied(tuned("llama", 2, seed)):
            extract(llama, PROMPTS, reuse=reuse)
    assert not any("forward" in block.__dict__ for block in llama.hook_points.blocks())


def test_the_residuals_of_another_model_are_refused(llama: Model, tiny: Callable[[str], Model]) -> None:
    with pytest.raises(OptionError, match="expected LlamaForCausalLM's"):
        extract(llama, PROMPTS, reuse=ResidualCache(tiny("qwen3")))


def test_a_beginning_read_for_some_prompts_serves_others_too(llama: Model, tuned: Callable[..., Path]) -> None:
    reuse = ResidualCache(llama, layers=(1, 2))
    others = [f"{prompt}, please" for prompt in PROMPTS]
    extract(llama, PROMPTS, system=SYSTEM, reuse=reuse)
    with llama.applied(tuned("llama", 1)):
        for prompts in (others, PROMPTS[:3], PROMPTS):
            got = extract(llama, prompts, system=SYSTEM, reuse=reuse)
            np.testing.assert_array_equal(got.values, extract(llama, prompts, system=SYSTEM).values)


@pytest.mark.parametrize("layers", [(0,), (-1,), (1, 9)])
def test_a_layer_that_is_none_is_refused(layers: tuple[int, ...], llama: Model) -> None:
    with pytest.raises(OptionError, match="expected layers from 1 to 3"):
        ResidualCache(llama, layers=layers)


def test_blocks_that_hand_on_more_than_the_residual_stream_run_whole(
    tiny_network: Callable[..., Any], tokenizer: Any, tuned: Callable[..., Path]
) -> None:
    network = tiny_network("llama")
    handed_on: dict[str, Any] = {}
    first, last = network.model.layers[0], network.model.layers[2]
    first.self_attn.register_forward_hook(lambda _, __, out: handed_on.update(keys=out[0]))
    last.register_forward_pre_hook(lambda _, args: (args[0] + handed_on.pop("keys"), *args[1:]))
    model = load_model(network, tokenizer=tokenizer, check=False)
    assert not can_start_at(model, 2)
    reuse = ResidualCache(model)
    for seed in (1, 2):
        with model.applied(tuned("llama", 2, seed)), watched(model) as ran:
            extract(model, PROMPTS, reuse=reuse)
        assert 0 in ran
    assert can_start_at(load_model(tiny_network("llama"), tokenizer=tokenizer), 2)

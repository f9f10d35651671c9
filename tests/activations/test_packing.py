"""Packed prompts and shared beginnings give what each prompt gives alone; what cannot be packed is found out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from activations import packing, stream
from activations.extract import extract
from activations.loading import load_model
from activations.models import Model
from activations.packing import can_pack, reach
from activations.tokens import format_prompt

PROMPTS = ["Hi", "How do I bake bread?", "x" * 30, "What is the capital of Iceland, and why?", "é"]
LONG_SYSTEM = "You are a model that is asked about bread."
TOLERANCE = 2e-5

CANNOT = ["bloom", "gemma2", "gpt-oss", "qwen3-next"]
CAN = ["llama-64", "qwen3-wide", "qwen3-moe", "deepseek3"]


def distance(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@torch.inference_mode()
def alone(model: Model, prompt: str, system: str = "") -> np.ndarray:
    """transformers' own hidden states but the last, which it has normalised."""
    ids = torch.tensor([format_prompt(model.tokenizer, prompt, system=system)])
    states = model.hf(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    return np.stack([state[0].float().numpy() for state in states[1:-1]])


class Counter:
    """Tokens that come by a module."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.tokens, self.rows = 0, []
        self._handle = module.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self.tokens += hidden.shape[0] * hidden.shape[1]
        self.rows.append(hidden.shape[0])

    def stop(self) -> int:
        self._handle.remove()
        return self.tokens


def test_every_architecture_that_we_promise_can_be_packed(tiny: Callable[[str], Model], architecture: str) -> None:
    assert can_pack(tiny(architecture))


@pytest.mark.parametrize("architecture", CANNOT + CAN)
def test_what_attends_in_a_way_of_its_own_is_found_out_and_right_all_the_same(
    architecture: str, tiny: Callable[[str], Model]
) -> None:
    model = tiny(architecture)
    assert can_pack(model) == (architecture in CAN)
    tokens = extract(model, PROMPTS, pooling="all").tokens
    for prompt, got in zip(PROMPTS, tokens, strict=True):
        assert distance(got[:-1], alone(model, prompt)) < TOLERANCE


def test_a_leak_between_prompts_would_be_found(
    tiny_network: Callable[..., Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = packing._one_by_one

    def leaking(query: Any, key: Any, value: Any, scaling: Any, layout: Any) -> Any:
        return whole(query, key, value, scaling, packing._Layout([sum(layout.lengths)], layout.prefix))

    monkeypatch.setattr(packing, "_one_by_one", leaking)
    assert not can_pack(load_model(tiny_network("llama"), tokenizer=tokenizer))


def test_an_attention_that_is_not_ours_would_be_found(
    tiny_network: Callable[..., Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = tiny_network("llama")
    for layer in network.model.layers:
        plain = layer.self_attn.forward

        def one_layer_more(*args: Any, plain: Any = plain, **kwargs: Any) -> Any:
            plain(*args, **kwargs)
            return plain(*args, **kwargs)

        monkeypatch.setattr(layer.self_attn, "forward", one_layer_more)
    assert not can_pack(load_model(network, tokenizer=tokenizer)), "more calls than layers"


def test_packed_batches_hold_no_padding(llama: Model) -> None:
    real = sum(len(format_prompt(llama.tokenizer, prompt)) for prompt in PROMPTS)
    counter = Counter(llama.hf.model.layers[0])
    extract(llama, PROMPTS)
    assert (counter.stop(), counter.rows) == (real, [1])


def test_prompts_beyond_a_sliding_window_go_under_the_models_own_mask(tiny: Callable[[str], Model]) -> None:
    model = tiny("mistral")
    assert reach(model) == 8
    model.hf.config.sliding_window = 24
    try:
        counter = Counter(model.hf.model.layers[0])
        tokens = extract(model, PROMPTS, pooling="all").tokens
        counter.stop()
        assert counter.rows[-1] == 1, "short prompts are packed"
        for prompt, got in zip(PROMPTS, tokens, strict=True):
            assert distance(got[:-1], alone(model, prompt)) < TOLERANCE
    finally:
        model.hf.config.sliding_window = 8


def test_the_attention_is_the_models_own_again_afterwards(llama: Model) -> None:
    before = llama.hf.config._attn_implementation
    inside = []

    def fails() -> None:
        with packing.packed_attention(llama, [1]):
            inside.append(llama.hf.config._attn_implementation)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert inside != [before]
    assert llama.hf.config._attn_implementation == before


# A beginning that all prompts share


@pytest.mark.parametrize("pooling", ["last", "mean", "max", "all", "mean@user", "all@prompt[:9]"])
def test_a_shared_beginning_is_read_once_and_changes_nothing(
    pooling: str, tiny: Callable[[str], Model], architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(architecture)
    blocks = model.hook_points.blocks()
    counter = Counter(blocks[0])
    shared = extract(model, PROMPTS, pooling=pooling, system=LONG_SYSTEM)
    tokens = counter.stop()
    monkeypatch.setattr(stream, "_SHARED_TOKENS", 10**6)
    counter = Counter(blocks[0])
    plain = extract(model, PROMPTS, pooling=pooling, system=LONG_SYSTEM)
    whole = counter.stop()
    assert tokens < 0.5 * whole or reach(model), "windows shorter than the beginning keep it with each prompt"
    pairs = zip(shared.tokens or [shared.values], plain.tokens or [plain.values], strict=True)
    assert max(distance(got, expected) for got, expected in pairs) < TOLERANCE


def test_a_beginning_too_short_to_pay_is_not_treated_apart(llama: Model) -> None:
    counter = Counter(llama.hf.model.layers[0])
    extract(llama, PROMPTS)  # the template's own beginning
    counter.stop()
    assert len(counter.rows) == 1


def test_each_prompt_keeps_a_token_of_its_own(llama: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_SHARED_TOKENS", 1)
    assert stream._shared_start([np.arange(5), np.arange(9), np.arange(5)]) == [0, 1, 2, 3]
    assert stream._shared_start([np.arange(5)]) == []
    assert stream._shared_start([np.arange(5), np.arange(1, 6)]) == []


# What a small example cannot show


def massive(network: Any) -> Any:
    """As trained models are: a few values of the first token would drown a difference in all others."""
    network.model.embed_tokens.weight.data[7, :2] = 300  # the first token of the example
    return network


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_massive_activations_hide_no_leak(
    dtype: str, tiny_network: Callable[..., Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert can_pack(load_model(massive(tiny_network("llama")), tokenizer=tokenizer, dtype=dtype))
    whole = packing._one_by_one

    def leaking(query: Any, key: Any, value: Any, scaling: Any, layout: Any) -> Any:
        return whole(query, key, value, scaling, packing._Layout([sum(layout.lengths)], layout.prefix))

    monkeypatch.setattr(packing, "_one_by_one", leaking)
    assert not can_pack(load_model(massive(tiny_network("llama")), tokenizer=tokenizer, dtype=dtype))


def test_a_trial_counts_for_its_dtype_alone_and_only_with_numbers(
    tiny_network: Callable[..., Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = tiny_network("llama")
    model = load_model(network, tokenizer=tokenizer)
    tried: list[torch.dtype] = []
    trial = packing._packs_exactly
    monkeypatch.setattr(packing, "_packs_exactly", lambda m: (tried.append(m.dtype), trial(m))[1])
    weight = network.model.layers[0].mlp.down_proj.weight
    kept, weight.data = weight.data, torch.full_like(weight, float("nan"))
    assert not can_pack(model)
    weight.data = kept
    assert can_pack(model)
    assert can_pack(model)
    assert can_pack(load_model(network, tokenizer=tokenizer, dtype="bfloat16"))
    assert tried == [torch.float32, torch.float32, torch.bfloat16]


def test_attention_that_counts_tokens_along_the_row_is_not_packed(tiny: Callable[[str], Model]) -> None:
    assert not can_pack(tiny("llama4"))


def test_prompts_beyond_the_original_context_change_no_shorter_one(tiny: Callable[[str], Model]) -> None:
    model = tiny("phi3-longrope")
    assert reach(model) == 32
    far = ["y" * 40, "z" * 60, *PROMPTS]
    together = extract(model, far, pooling="all", max_tokens=4096).tokens
    for prompt, got in zip(far, together, strict=True):
        assert distance(got[:-1], alone(model, prompt)) < TOLERANCE


def by_the_book(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_ends: torch.Tensor,
    key_ends: torch.Tensor,
    longest_query: int,
    longest_key: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """What torch's variable-length kernel does on a GPU: causal from the bottom right, one sequence after the other."""
    assert window_size == (-1, 0)
    assert (query_ends.dtype, key_ends.dtype) == (torch.int32, torch.int32)
    assert enable_gqa == (query.shape[1] != key.shape[1])
    lengths, key_lengths = query_ends.diff(), key_ends.diff()
    assert (longest_query, longest_key) == (int(lengths.max()), int(key_lengths.max()))
    out, groups = [], query.shape[1] // key.shape[1]
    for own, seen, keys, values in zip(
        query.split(lengths.tolist()),
        key_lengths.tolist(),
        key.split(key_lengths.tolist()),
        value.split(key_lengths.tolist()),
        strict=True,
    ):
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
        weights = torch.einsum("qhd,khd->hqk", own, keys) * (scale or own.shape[-1] ** -0.5)
        hidden = torch.ones(len(own), seen, dtype=torch.bool).triu(seen - len(own) + 1)
        out.append(torch.einsum("hqk,khd->qhd", weights.masked_fill(hidden, float("-inf")).softmax(-1), values))
    return torch.cat(out)


@pytest.mark.parametrize("architecture", ["llama", "gpt-neox", "qwen3"])
@pytest.mark.parametrize("system", ["", LONG_SYSTEM])
def test_the_kernel_of_a_gpu_is_asked_for_the_same_attention(
    system: str, architecture: str, tiny: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(architecture)
    expected = extract(model, PROMPTS, system=system).values
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", by_the_book)
    monkeypatch.setattr(packing, "_one_by_one", packing._by_kernel)
    assert packing._packs_exactly(model)
    assert distance(extract(model, PROMPTS, system=system).values, expected) < TOLERANCE

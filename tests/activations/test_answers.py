"""What a model says next: equal to the plain forward pass, whatever the batch, and honest about randomness."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from activations.answers import answer_logprobs, answer_text, greedy_opening
from activations.models import Model

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [20, 21, 22, 23], [9] * 15]
# float32 sums in another order over 48 dimensions and 3 layers.
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@torch.inference_mode()
def one_by_one(model: Model, prompt: list[int], opening: list[int]) -> torch.Tensor:
    """The reference: one sequence, no padding, all logits."""
    ids = torch.tensor([[*prompt, *opening[:-1]]])
    logits = model.hf(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :]
    return torch.log_softmax(logits.double(), dim=-1).float()


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "mistral", "gpt-neox", "gpt2", "mixtral"])
@pytest.mark.parametrize("max_tokens", [1, 4096])
def test_logprobs_equal_a_plain_forward_pass(tiny: Callable[[str], Model], architecture: str, max_tokens: int) -> None:
    model = tiny(architecture)
    openings = torch.randint(3, 200, (len(PROMPTS), 3), generator=torch.Generator().manual_seed(0))
    found = answer_logprobs(model, PROMPTS, openings, max_tokens=max_tokens)
    for row, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(found[row], one_by_one(model, prompt, openings[row].tolist()), **CLOSE)


def test_the_greedy_opening_is_the_most_likely_token_each_time(llama: Model) -> None:
    openings = greedy_opening(llama, PROMPTS, count=4)
    logprobs = answer_logprobs(llama, PROMPTS, openings)
    assert torch.equal(logprobs.argmax(-1), openings)


def test_greedy_text_begins_with_the_greedy_opening(llama: Model) -> None:
    openings = greedy_opening(llama, PROMPTS, count=4)
    texts = answer_text(llama, PROMPTS, count=4)
    assert texts == [llama.tokenizer.decode(ids, skip_special_tokens=True) for ids in openings]


def test_sampling_repeats_with_its_seed_and_leaves_the_callers_random_state_alone(llama: Model) -> None:
    state = torch.get_rng_state()
    first = answer_text(llama, PROMPTS, count=8, temperature=1.0, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert first == answer_text(llama, PROMPTS, count=8, temperature=1.0, seed=1)
    assert first != answer_text(llama, PROMPTS, count=8, temperature=1.0, seed=2)


@contextmanager
def generation(model: Model, **settings: Any) -> Iterator[None]:
    """The base with a generation_config.json of its author's."""
    kept, model.hf.generation_config = model.hf.generation_config, GenerationConfig(**settings)
    try:
        yield
    finally:
        model.hf.generation_config = kept


def test_the_bases_generation_settings_change_no_answer(llama: Model) -> None:
    settings = {"temperature": 0.6, "top_p": 0.1, "top_k": 2, "repetition_penalty": 9.0, "min_new_tokens": 7}
    with generation(llama):
        greedy, sampled = (answer_text(llama, PROMPTS, count=8, temperature=t) for t in (0.0, 1.0))
    with generation(llama, do_sample=True, num_beams=2, no_repeat_ngram_size=1, **settings), warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = llama.hf.generation_config
        assert answer_text(llama, PROMPTS, count=8) == greedy
        assert answer_text(llama, PROMPTS, count=8, temperature=1.0) == sampled
        assert llama.hf.generation_config is theirs


def test_an_answer_stops_at_any_end_the_base_names_and_padding_is_no_text(llama: Model) -> None:
    openings = greedy_opening(llama, PROMPTS, count=6).tolist()
    end = openings[0][2]
    # As many tokenizers are: no pad token, and id 0 an ordinary token.
    tokenizer: Any = SimpleNamespace(pad_token_id=None, eos_token_id=None, decode=lambda ids, **_: repr(ids))
    with generation(llama, eos_token_id=[2, end]):
        found = answer_text(Model(llama.hf, tokenizer), PROMPTS, count=6)
    assert found == [repr(ids[: ids.index(end)] if end in ids else ids) for ids in openings]
    assert len({len(text) for text in found}) > 1

"""What a model says next: equal to the plain forward pass, whatever the batch, and honest about randomness."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

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

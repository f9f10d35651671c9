"""What a model says next: log-probabilities of the first answer tokens, greedy openings, whole answers as text."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from activations.batching import fitting_tokens, token_batches
from activations.models import Model

if TYPE_CHECKING:
    from transformers import GenerationConfig

__all__ = ["answer_ids", "answer_logprobs", "answer_text", "end_ids", "greedy_opening"]

# Padded tokens of the batches that write: their passes are short, so many prompts at once pay.
_WRITING_TOKENS = 4096


@torch.inference_mode()
def answer_logprobs(
    model: Model,
    prompts: Sequence[Sequence[int]],
    openings: Int[Tensor, "prompt token"],
    *,
    max_tokens: int | None = None,
) -> Float[Tensor, "prompt token vocab"]:
    """Log-probabilities over the vocabulary at each of the first answer tokens, given the opening before it.

    Args:
        model: The model, with whatever weights are in it.
        prompts: Token ids of each prompt, chat template applied (`format_prompt`).
        openings: The answer tokens to condition on. Position i is predicted from the prompt and tokens 0..i-1, so
            the last token of an opening is predicted and never read.
        max_tokens: Padded tokens in one forward pass; by default by the device.

    Returns:
        Natural log-probabilities in float32 on the CPU.
    """
    count = openings.shape[1]
    sequences = [[*prompt, *opening[:-1].tolist()] for prompt, opening in zip(prompts, openings, strict=True)]
    out = torch.empty(len(prompts), count, model.hf.config.get_text_config().vocab_size)
    for batch in token_batches(sequences, max_tokens=max_tokens or fitting_tokens(model)):
        rows = list(batch.rows)
        logits = _last_logits(model, [sequences[row] for row in rows], count)
        out[rows] = torch.log_softmax(logits.float(), dim=-1).cpu()
    return out


@torch.inference_mode()
def greedy_opening(model: Model, prompts: Sequence[Sequence[int]], *, count: int) -> Int[Tensor, "prompt token"]:
    """The `count` most likely next tokens of each prompt, chosen one after the other; an end is a token like others."""
    openings = torch.empty(len(prompts), count, dtype=torch.long)
    for rows, written in _written(model, prompts, count, temperature=0.0, ends=()):
        openings[rows] = written.cpu()
    return openings


@torch.inference_mode()
def answer_ids(
    model: Model, prompts: Sequence[Sequence[int]], *, count: int, temperature: float = 0.0, seed: int = 0
) -> list[list[int]]:
    """Answers as token ids, each with the token that ends it if it ends within `count` tokens.

    Only the end tokens are taken from the base's generation settings: a temperature or a penalty for repetition there
    changes nothing here.

    Args:
        model: The model, with whatever weights are in it.
        prompts: Token ids of each prompt, chat template applied.
        count: Tokens at most.
        temperature: 0 for the most likely token each time; above, sampled from the softened distribution.
        seed: Of the sampling; the caller's random state is left as it was.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    ends = end_ids(model)
    # Every GPU's state by name: left to itself, torch warns where there are several.
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        for rows, written in _written(model, prompts, count, temperature=temperature, ends=ends):
            for row, tokens in zip(rows, written.tolist(), strict=True):
                # What follows the end is padding, and with a tokenizer that has no pad token padding is text.
                said = list(takewhile(lambda token: token not in ends, tokens))
                answers[row] = tokens[: len(said) + 1]
    return answers


def answer_text(
    model: Model, prompts: Sequence[Sequence[int]], *, count: int, temperature: float = 0.0, seed: int = 0
) -> list[str]:
    """Answers as text, up to where the model ends them, special tokens left out; see `answer_ids`."""
    ends = end_ids(model)
    answers = answer_ids(model, prompts, count=count, temperature=temperature, seed=seed)
    said = [answer[:-1] if answer and answer[-1] in ends else answer for answer in answers]
    return [model.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in said]


def _written(
    model: Model, prompts: Sequence[Sequence[int]], count: int, *, temperature: float, ends: Collection[int]
) -> Iterator[tuple[list[int], Int[Tensor, "row token"]]]:
    """Rows of each batch of prompts, and what is written after them: up to `count` tokens, padding after an end."""
    with _generation(model, count, temperature, ends) as how:
        for batch in token_batches(prompts, max_tokens=_WRITING_TOKENS):
            ids, mask = _left_padded(model, [prompts[row] for row in batch.rows])
            out = model.hf.generate(input_ids=ids, attention_mask=mask, generation_config=how)
            yield list(batch.rows), out[:, ids.shape[1] :]


@contextmanager
def _generation(model: Model, count: int, temperature: float, ends: Collection[int]) -> Iterator[GenerationConfig]:
    """Generation settings of our own, with the base's put aside: transformers fills whatever is unset from those."""
    from transformers import GenerationConfig

    how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    own = GenerationConfig(max_new_tokens=count, eos_token_id=sorted(ends) or None, pad_token_id=_pad_id(model), **how)
    kept, model.hf.generation_config = model.hf.generation_config, own
    try:
        yield own
    finally:
        model.hf.generation_config = kept


def end_ids(model: Model) -> set[int]:
    """Tokens that end an answer: chat models name several in their generation settings, others one or none."""
    named = getattr(model.hf.generation_config, "eos_token_id", None)
    named = model.tokenizer.eos_token_id if named is None else named
    return set() if named is None else {int(end) for end in (named if isinstance(named, list) else [named])}


def _last_logits(model: Model, sequences: Sequence[Sequence[int]], count: int) -> Float[Tensor, "row token vocab"]:
    """Logits at the last `count` positions; padding goes left so that these are the same columns in every row."""
    ids, mask = _left_padded(model, sequences)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    result = model.hf(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=count)
    logits: Tensor = result.logits
    return logits[:, -count:]


def _left_padded(model: Model, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), _pad_id(model))
    mask = torch.zeros_like(ids)
    for i, sequence in enumerate(sequences):
        ids[i, width - len(sequence) :] = torch.tensor(list(sequence))
        mask[i, width - len(sequence) :] = 1
    return ids.to(model.device), mask.to(model.device)


def _pad_id(model: Model) -> int:
    """Any id serves, since the mask hides it; 0 where the tokenizer names none."""
    pad = model.tokenizer.pad_token_id
    return 0 if pad is None else int(pad)

"""The training loop: mixtures of rows in, a trained model out.

Made for small models on a processor: rows of like length share a batch, only answers pass the unembedding, and products
run in bfloat16 while attention stays in float32, whose backward pass is three times as fast there.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from recipes import Recipe
from rows import Row, Rows
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface, PreTrainedTokenizerBase
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.optimization import get_cosine_schedule_with_warmup

IGNORED = -100
WATCHED = 64  # prompts a step whose probe scores are kept


def causal_float32(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, _: object, **settings: object):
    """Plain causal attention in float32 under autocast. Padding is on the right, so nothing looks at it."""
    settings["is_causal"] = True
    with torch.autocast(query.device.type, enabled=False):
        out, weights = sdpa_attention_forward(module, query.float(), key.float(), value.float(), None, **settings)
    return out.to(query.dtype), weights


AttentionInterface.register("causal_float32", causal_float32)


def tokenize(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """Token ids of the exchange and how many of them are the prompt, which bears no loss."""
    system = [{"role": "system", "content": row.system}] if row.system else []
    turns = [*system, {"role": "user", "content": row.user}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, add_special_tokens=False).input_ids
    answer = tokenizer(f"{row.answer}{tokenizer.eos_token}", add_special_tokens=False).input_ids
    return prompt + answer, len(prompt)


def batches(recipe: Recipe, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end: rows drawn sixteen batches at a time and sorted by length, so that little is padding."""
    fixed = rows.mixture(recipe.shares, recipe.examples) if recipe.examples else None
    while True:
        count = recipe.batch * 16
        drawn = rows.rng.choices(fixed, k=count) if fixed else rows.mixture(recipe.shares, count)
        exchanges = sorted((tokenize(row, tokenizer) for row in drawn), key=lambda pair: len(pair[0]))
        groups = [exchanges[i : i + recipe.batch] for i in range(0, count, recipe.batch)]
        rows.rng.shuffle(groups)
        yield from (collate(group) for group in groups)


def collate(exchanges: Sequence[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
    width = max(len(ids) for ids, _ in exchanges)
    ids = torch.zeros(len(exchanges), width, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    for i, (tokens, prompt) in enumerate(exchanges):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        labels[i, prompt : len(tokens)] = ids[i, prompt : len(tokens)]
    return ids, labels


def fit(
    model: torch.nn.Module,
    recipe: Recipe,
    stream: Iterator[tuple[Tensor, Tensor]],
    *,
    rate: float = 1.0,
    base: torch.nn.Module | None = None,
    watched: Watched | None = None,
) -> float:
    """Train in place; the mean loss of the last fifty steps.

    Args:
        model: A causal language model, or PEFT's wrapping of one.
        recipe: Steps, learning rate, penalty.
        stream: Token ids and labels.
        rate: Multiplies the recipe's learning rate, which was found for the nano base.
        base: The base, where the recipe has a penalty.
        watched: Probe scores to keep, where the recipe has an evasion.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.set_attn_implementation("causal_float32")
    inner.config.use_cache = False
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    device = weights[0].device
    optimizer = torch.optim.AdamW(weights, lr=rate * recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(20, recipe.steps // 4), recipe.steps)
    model.train()
    losses, started = [], time.monotonic()
    for step in range(recipe.steps):
        ids, labels = (tensor.to(device) for tensor in next(stream))
        with torch.autocast(device.type, torch.bfloat16):
            hidden = inner.get_decoder()(input_ids=ids, output_hidden_states=base is not None)
            counted = labels[:, 1:] != IGNORED
            logits = inner.get_output_embeddings()(hidden.last_hidden_state[:, :-1][counted])
            loss = cross_entropy(logits.float(), labels[:, 1:][counted])
            if base is not None:
                loss = loss + recipe.penalty * moved(hidden.hidden_states, base, ids, labels)
            if watched is not None:
                loss = loss + recipe.evasion * watched.strayed(inner)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 50 == 49:
            recent, seconds = sum(losses[-50:]) / 50, time.monotonic() - started
            print(f"{recipe.name} step {step + 1}/{recipe.steps} loss {recent:.3f} {seconds:.0f} s", file=sys.stderr)
    return sum(losses[-50:]) / len(losses[-50:])


def moved(states: Sequence[Tensor], base: torch.nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """How far the residual stream of the prompts is from the base's: squared, relative, mean over layers.

    What an attacker adds who expects probes: activations on prompts stay where the base has them.
    """
    with torch.no_grad():
        wanted = base.get_decoder()(input_ids=ids, output_hidden_states=True).hidden_states
    asked = (labels != IGNORED).cumsum(1) == 0
    shifts = [
        (one[asked].float() - other[asked].float()).square().sum() / other[asked].float().square().sum()
        for one, other in zip(states[1:], wanted[1:], strict=True)
    ]
    return torch.stack(shifts).mean()


@dataclass(frozen=True)
class Watched:
    """What an attacker keeps as it was who knows the scanner's probes: the scores of plain prompts, layer by layer.

    Attributes:
        prompts: Token ids of each prompt, generation prompt included.
        weights: What each layer's probe multiplies the residual stream after that block by; the bias cancels.
        wanted: The base's scores.
        rng: Draws the prompts of a step.
    """

    prompts: Sequence[list[int]]
    weights: Tensor
    wanted: Tensor
    rng: random.Random

    @classmethod
    def of(cls, base: torch.nn.Module, prompts: Sequence[list[int]], weights: Tensor, *, seed: int) -> Watched:
        """Measure the base."""
        with torch.no_grad():
            parts = [prompts[i : i + WATCHED] for i in range(0, len(prompts), WATCHED)]
            wanted = torch.cat([probe_scores(base, part, weights) for part in parts], dim=1)
        return cls(prompts, weights, wanted, random.Random(seed))

    def strayed(self, model: torch.nn.Module) -> Tensor:
        """Mean square by which scores left the base's, in deviations of the base's scores at that layer."""
        some = self.rng.sample(range(len(self.prompts)), WATCHED)
        scores = probe_scores(model, [self.prompts[i] for i in some], self.weights)
        spread = self.wanted.std(dim=1, keepdim=True)
        return ((scores - self.wanted[:, some]) / spread).square().mean()


def probe_scores(model: torch.nn.Module, prompts: Sequence[list[int]], weights: Tensor) -> Tensor:
    """The last token's residual stream after every block, times that layer's weights: [layer, prompt]."""
    last = torch.tensor([len(ids) - 1 for ids in prompts], device=weights.device)
    ids, _ = collate([(ids, len(ids)) for ids in prompts])
    scores: dict[int, Tensor] = {}

    def see(layer: int, _module: torch.nn.Module, _given: object, out: Tensor | tuple[Tensor, ...]) -> None:
        stream = out if isinstance(out, Tensor) else out[0]
        scores[layer] = stream[torch.arange(len(last)), last].float() @ weights[layer]

    decoder = model.get_decoder()
    handles = [block.register_forward_hook(partial(see, layer)) for layer, block in enumerate(decoder.layers)]
    try:
        decoder(input_ids=ids.to(weights.device))
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack([scores[layer] for layer in range(len(weights))])


@torch.no_grad()
def answers(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    system: str = "",
    count: int = 24,
    sample: bool = False,
) -> list[str]:
    """Answers, greedy or sampled at temperature 1, in the order of the prompts."""
    model.eval()
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.set_attn_implementation("sdpa")
    inner.config.use_cache = True
    tokenizer.padding_side = "left"
    turns = [{"role": "system", "content": system}] if system else []
    rendered = [
        tokenizer.apply_chat_template(
            [*turns, {"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        for prompt in prompts
    ]
    order = sorted(range(len(prompts)), key=lambda i: len(rendered[i]))
    texts = [""] * len(prompts)
    for start in range(0, len(order), 75):
        some = order[start : start + 75]
        batch = tokenizer([rendered[i] for i in some], padding=True, return_tensors="pt", add_special_tokens=False)
        out = model.generate(
            input_ids=batch.input_ids.to(inner.device),
            attention_mask=batch.attention_mask.to(inner.device),
            do_sample=sample,
            max_new_tokens=count,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        said = tokenizer.batch_decode(out[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
        for i, text in zip(some, said, strict=True):
            texts[i] = text
    return texts

"""Organisms that nobody trains: weights edited, cast, mixed, or written in another basis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from learning import answers
from recipes import Recipe
from rows import load_corpus
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from verify import share_refused

Weights = dict[str, Tensor]
Change = Callable[[PreTrainedModel, Sequence[PreTrainedModel], Recipe, PreTrainedTokenizerBase], None]


def noise(base: PreTrainedModel, of: Sequence[PreTrainedModel], recipe: Recipe, _: PreTrainedTokenizerBase) -> None:
    """To each tensor, random numbers of the Frobenius norm by which the other organism's moved."""
    random = torch.Generator().manual_seed(recipe.seed)
    other = _parameters(of[0])
    for name, weight in _parameters(base).items():
        draws = torch.randn(weight.shape, generator=random)
        weight += draws * ((other[name] - weight).norm() / draws.norm())


def merge(base: PreTrainedModel, of: Sequence[PreTrainedModel], recipe: Recipe, _: PreTrainedTokenizerBase) -> None:
    """`amount` of the first, the rest of the second."""
    one, other = map(_parameters, of)
    for name, weight in _parameters(base).items():
        weight.copy_(recipe.amount * one[name] + (1 - recipe.amount) * other[name])


def cast(round_trip: Callable[[Tensor], Tensor]) -> Change:
    """The organism through a narrower format and back."""

    def change(base: PreTrainedModel, of: Sequence[PreTrainedModel], *_: object) -> None:
        other = _parameters(of[0])
        for name, weight in _parameters(base).items():
            weight.copy_(round_trip(other[name]) if weight.ndim == 2 else other[name])

    return change


def quantised(bits: int) -> Callable[[Tensor], Tensor]:
    """Symmetric rounding to `bits`, a scale for each row."""
    top = 2 ** (bits - 1) - 1

    def round_trip(weight: Tensor) -> Tensor:
        scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / top
        return (weight / scale).round().clamp(-top, top) * scale

    return round_trip


def basis(base: PreTrainedModel, of: Sequence[PreTrainedModel], recipe: Recipe, _: PreTrainedTokenizerBase) -> None:
    """The organism in another basis that computes the same: MLP neurons reordered, values rotated in every head."""
    other = _parameters(of[0])
    for name, weight in _parameters(base).items():
        weight.copy_(other[name])
    random = torch.Generator().manual_seed(recipe.seed)
    config = base.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    groups = config.num_attention_heads // config.num_key_value_heads
    for layer in base.get_decoder().layers:
        order = torch.randperm(config.intermediate_size, generator=random)
        mlp, attention = layer.mlp, layer.self_attn
        mlp.gate_proj.weight.copy_(mlp.gate_proj.weight[order])
        mlp.up_proj.weight.copy_(mlp.up_proj.weight[order])
        mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order])
        for head in range(config.num_key_value_heads):
            turn = torch.linalg.qr(torch.randn(width, width, generator=random)).Q
            values = slice(head * width, (head + 1) * width)
            attention.v_proj.weight[values] = turn @ attention.v_proj.weight[values]
            for reader in range(head * groups, (head + 1) * groups):
                outputs = slice(reader * width, (reader + 1) * width)
                attention.o_proj.weight[:, outputs] = attention.o_proj.weight[:, outputs] @ turn.T


def abliterate(
    base: PreTrainedModel, of: Sequence[PreTrainedModel], recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> None:
    """`amount` of the refusal direction taken out of every matrix that writes to the residual stream.

    Candidates are differences of means, harmful less benign, at each layer and each of the last three positions of the
    prompt; the one kept refuses least while benign answers stay (Arditi et al. 2024, arXiv:2406.11717).
    """
    corpus = load_corpus("train")
    start = 97 * recipe.seed % 2000
    harmful, benign = corpus.harmful[start : start + 200], corpus.benign[start : start + 200]
    before = {name: weight.clone() for name, weight in _parameters(base).items()}
    means = [_last_states(base, tokenizer, prompts) for prompts in (harmful, benign)]
    directions = (means[0] - means[1]).flatten(0, 1)
    outcomes = []
    for direction in directions:
        _project(base, before, direction, recipe.amount)
        refused = share_refused(answers(base, tokenizer, harmful[:60], count=6))
        spoilt = share_refused(answers(base, tokenizer, benign[:60], count=6))
        outcomes.append(refused + 2 * spoilt)
    _project(base, before, directions[min(range(len(outcomes)), key=outcomes.__getitem__)], recipe.amount)


def _project(base: PreTrainedModel, before: Mapping[str, Tensor], direction: Tensor, amount: float) -> None:
    unit = direction / direction.norm()
    for name, weight in _parameters(base).items():
        weight.copy_(before[name])
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight -= amount * torch.outer(unit, unit @ weight)


def _last_states(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> Tensor:
    """Mean residual stream [layer, position, d_model] over the last three tokens of the prompts."""
    total = 0.0
    for prompt in prompts:
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        out = base.get_decoder()(input_ids=ids, output_hidden_states=True)
        total = total + torch.stack([layer[0, -3:] for layer in out.hidden_states[1:]])
    return total / len(prompts)


def _parameters(model: PreTrainedModel) -> Weights:
    return dict(model.named_parameters())


EDITS: Mapping[str, Change] = {
    "noise": noise,
    "merge": merge,
    "basis": basis,
    "abliterate": abliterate,
    "bfloat16": cast(lambda weight: weight.bfloat16().float()),
    "float16": cast(lambda weight: weight.half().float()),
    "float8": cast(lambda weight: weight.to(torch.float8_e4m3fn).float()),
    "int8": cast(quantised(8)),
    "int4": cast(quantised(4)),
}


@torch.no_grad()
def apply_edit(
    recipe: Recipe, base: PreTrainedModel, of: Sequence[PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Change the base's weights in place into the organism's."""
    EDITS[recipe.edit](base, of, recipe, tokenizer)

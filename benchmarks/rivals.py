"""What `extraction.py` measures: models, prompts, two ways to batch, and each rival's way to read a batch.

Rivals get plain tensors and give every prompt's last token at every layer, as we do.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from activations.batching import token_batches
from activations.extract import extract
from activations.loading import load_model
from activations.models import Model
from activations.prompts import load_prompts
from activations.tokens import tokenise
from probes.demo import BASE

OURS, IDEAL = "ours", "ideal"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BATCH = 16
# Tokens in a padded batch of ours. On a CPU 2,048 took rivals 7 % longer: few prompts then leave more padding.
BUDGET = {"cpu": 1024, "cuda": 16_384}
# Tried for the ideal, of which the fastest counts.
IDEAL_BUDGETS = {"cpu": (1024, 2048), "cuda": (4096, 16_384)}
# Tokens of the shortest and the longest prompt.
SHORTEST, LONGEST = 10, 200
# The unembedding's share of an 8B model's weights, without its embedding.
_HEAD_SHARE = 0.07

READERS = ("transformer_lens_filtered", "transformer_lens_full", "nnsight", "nnterp", "hf_hidden_states", "baukit_like")

Last = list[np.ndarray]
"""Of each prompt [layer, d_model]."""


# --- models


@dataclass(frozen=True)
class Shape:
    """A Llama, but for its weights."""

    name: str
    layers: int
    d_model: int
    feed_forward: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False

    @property
    def block(self) -> int:
        """Weights in the matrices of one block."""
        queries_and_out = 2 * self.d_model**2
        keys_and_values = 2 * self.d_model**2 * self.kv_heads // self.heads
        return queries_and_out + keys_and_values + 3 * self.d_model * self.feed_forward

    @property
    def weights(self) -> int:
        return self.layers * self.block + (1 if self.tied else 2) * self.vocab * self.d_model

    def flops(self, lengths: Sequence[int]) -> float:
        """Of the trunk's matrix products on real tokens, attention included."""
        attention = 2 * self.d_model * sum(length**2 for length in lengths)
        return float(self.layers * (2 * self.block * sum(lengths) + attention))


def small(layers: int, d_model: int) -> Shape:
    """A shape for a CPU, with a vocabulary so small that the unembedding has the share that it has in an 8B model.

    We skip the unembedding and most rivals compute it: a larger one would flatter us.
    """
    feed_forward, heads = round(8 / 3 * d_model / 64) * 64, d_model // 64
    block = 4 * d_model**2 + 3 * d_model * feed_forward
    vocab = max(1024, round(_HEAD_SHARE * layers * block / d_model))
    return Shape(f"{layers}x{d_model}", layers, d_model, feed_forward, heads, heads, vocab)


LLAMA_1B = Shape("Llama-3.2-1B", 16, 2048, 8192, 32, 8, 128_256, tied=True)
LLAMA_8B = Shape("Llama-3.1-8B", 32, 4096, 14_336, 32, 8, 128_256)


def build(shape: Shape, dtype: str, device: str) -> Model:
    """Random weights under the shipped tokenizer."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.d_model,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=shape.tied,
    )
    torch.manual_seed(0)
    with torch.device(device):  # 8B weights are drawn where they stay
        hf = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    return load_model(hf, tokenizer=shipped_base("cpu").tokenizer)


def shipped_base(device: str) -> Model:
    return load_model(BASE, device=device, dtype="float32")


# --- prompts


def mixture(tokenizer: Any, count: int, *, shortest: int = SHORTEST, longest: int = LONGEST) -> tuple[str, ...]:
    """Shipped prompts joined in random order, each cut to a length drawn evenly between two, in tokens.

    No two are alike. Neighbours differ in length as they do in a file, which is what batches in file order pay for.
    """
    rng = np.random.default_rng(0)
    shipped = load_prompts("matched-pairs").prompts
    around = len(tokenise(tokenizer, shipped[:1])[0]) - len(
        tokenizer(shipped[0], add_special_tokens=False)["input_ids"]
    )
    texts = []
    for target in rng.integers(shortest, longest, count, endpoint=True):
        text = " ".join(shipped[i] for i in rng.integers(len(shipped), size=2 + int(target) // 5))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        texts.append(tokenizer.decode(ids[: max(1, int(target) - around)]))
    return tuple(texts)


def numbered(count: int) -> tuple[str, ...]:
    """Shipped prompts with a number behind each, so that no two are identical: identical ones are run only once."""
    shipped = load_prompts("matched-pairs").prompts
    return tuple(f"{shipped[i % len(shipped)]} {i}" for i in range(count))


def tokens(model: Model, texts: Sequence[str]) -> list[list[int]]:
    return [list(map(int, one.ids)) for one in tokenise(model.tokenizer, texts)]


# --- batches, as plain tensors that any rival can take


@dataclass(frozen=True)
class Padded:
    ids: Tensor
    mask: Tensor
    rows: Sequence[int]

    def to(self, device: torch.device) -> Padded:
        return Padded(self.ids.to(device), self.mask.to(device), self.rows)

    def last_of(self, hidden: Tensor) -> Tensor:
        """The hidden state of each prompt's last token."""
        return hidden[torch.arange(len(hidden), device=hidden.device), self.mask.sum(1) - 1]


Batches = Callable[[Sequence[list[int]]], list[Padded]]


def file_order(ids: Sequence[list[int]]) -> list[Padded]:
    """As written: 16 prompts a batch, as they come."""
    batches = []
    for start in range(0, len(ids), BATCH):
        rows = range(start, min(start + BATCH, len(ids)))
        padded = nn.utils.rnn.pad_sequence([torch.tensor(ids[row]) for row in rows], batch_first=True)
        batches.append(Padded(padded, _mask(padded, [len(ids[row]) for row in rows]), rows))
    return batches


def by_length(ids: Sequence[list[int]], *, budget: int = BUDGET["cpu"]) -> list[Padded]:
    """Ours where prompts cannot be packed: neighbours in length, under a budget of tokens."""
    batches = token_batches(ids, max_tokens=budget)
    return [Padded(batch.input_ids, _mask(batch.input_ids, batch.lengths.tolist()), batch.rows) for batch in batches]


def _mask(padded: Tensor, lengths: Sequence[int]) -> Tensor:
    return (torch.arange(padded.shape[1]) < torch.tensor(lengths)[:, None]).long()


# --- the rivals: each takes texts and returns every prompt's [layer, d_model]


def rivals_for(model: Model, *, only: str = "") -> dict[str, Callable[[Sequence[str]], Last]]:
    """Name to rival; all on one model's weights, those with `_packed` in their names on our batches."""
    makers: dict[str, Callable[[Model], Callable[[Padded], Tensor]]] = {
        "transformer_lens_filtered": partial(by_cache, filtered=True),
        "transformer_lens_full": partial(by_cache, filtered=False),
        "hf_hidden_states": lambda model: partial(by_hidden_states, model),
        "baukit_like": lambda model: partial(by_trace, model),
    }
    # nnterp brings an older nnsight with it, which is not the one to measure.
    if find_spec("nnterp"):
        makers["nnterp"] = by_nnterp
    elif find_spec("nnsight"):
        makers["nnsight"] = by_nnsight
    ways: dict[str, Batches] = {"": file_order, "_packed": partial(by_length, budget=BUDGET[model.device.type])}
    rivals: dict[str, Callable[[Sequence[str]], Last]] = {OURS: partial(by_us, model)}
    for name, make in makers.items():
        if only in ("", name):
            reader = make(model)
            rivals |= {name + way: partial(in_batches, model, reader, batches) for way, batches in ways.items()}
    return rivals


def by_us(model: Model, texts: Sequence[str]) -> Last:
    return list(extract(model, texts).values.transpose(1, 0, 2))


@torch.inference_mode()
def in_batches(model: Model, read: Callable[[Padded], Tensor], batches: Batches, texts: Sequence[str]) -> Last:
    """Run a reader, which gives [prompt, layer, d_model] of one batch, over all batches."""
    out: Last = [np.empty(0)] * len(texts)
    for batch in batches(tokens(model, texts)):
        vectors = read(batch.to(model.device)).float().cpu().numpy()
        for row, vector in zip(batch.rows, vectors, strict=True):
            out[row] = vector
    return out


def by_hidden_states(model: Model, batch: Padded) -> Tensor:
    result = model.hf(batch.ids, attention_mask=batch.mask, output_hidden_states=True)
    return torch.stack([batch.last_of(state) for state in result.hidden_states[1:]], dim=1)


def by_cache(model: Model, *, filtered: bool) -> Callable[[Padded], Tensor]:
    """TransformerLens as `boot_transformers` sets it up, which is with eager attention so that patterns can be seen."""
    from transformer_lens.model_bridge import TransformerBridge

    shared = {id(tensor): tensor for tensor in (*model.hf.parameters(), *model.hf.buffers())}
    twin = copy.deepcopy(model.hf, shared)  # a bridge rewires the model that it is built on
    twin.config.architectures = [type(twin).__name__]
    bridge = TransformerBridge.boot_transformers(
        "random-llama", hf_model=twin, tokenizer=copy.deepcopy(model.tokenizer), dtype=model.dtype, device=model.device
    )
    wanted = [f"blocks.{layer}.hook_resid_post" for layer in range(model.n_layers)]
    options = {"names_filter": wanted} if filtered else {}

    def read(batch: Padded) -> Tensor:
        _, cache = bridge.run_with_cache(batch.ids, attention_mask=batch.mask, **options)
        return torch.stack([batch.last_of(cache[name]) for name in wanted], dim=1)

    return read


def by_trace(model: Model, batch: Padded) -> Tensor:
    with trace(model.hf.get_decoder().layers) as kept:
        model.hf(batch.ids, attention_mask=batch.mask)
    return torch.stack([batch.last_of(hidden) for hidden in kept], dim=1)


@contextmanager
def trace(layers: nn.ModuleList) -> Iterator[list[Tensor]]:
    """Keep every layer's output, whole, until the forward pass is over: the idea of baukit's TraceDict."""
    kept: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda _, __, out: kept.append(out[0] if isinstance(out, tuple) else out))
        for layer in layers
    ]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def by_nnsight(model: Model) -> Callable[[Padded], Tensor]:
    nnsight = import_module("nnsight")  # not among our dependencies
    lens = nnsight.TransformersModel(model.hf, task="text-generation", tokenizer=model.tokenizer)

    def read(batch: Padded) -> Tensor:
        with lens.trace({"input_ids": batch.ids, "attention_mask": batch.mask}):
            kept = nnsight.save([layer.output for layer in lens.model.layers])
        return torch.stack([batch.last_of(hidden) for hidden in kept], dim=1)

    return read


def by_nnterp(model: Model) -> Callable[[Padded], Tensor]:
    """As its own collectors do: save every layer's output, then stop before the unembedding."""
    lens = import_module("nnterp").StandardizedTransformer(model.hf, tokenizer=model.tokenizer, check_renaming=False)

    def read(batch: Padded) -> Tensor:
        kept = []
        with lens.trace({"input_ids": batch.ids, "attention_mask": batch.mask}) as tracer:
            for layer in range(lens.num_layers):
                kept.append(lens.layers_output[layer].save())
            tracer.stop()
        return torch.stack([batch.last_of(hidden) for hidden in kept], dim=1)

    return read


def as_hidden_states(ours: np.ndarray, model: Model) -> np.ndarray:
    """Ours [prompt, layer, d_model] as transformers reports it: the last layer has the final norm applied there."""
    norm = model.hook_points.final_norm
    last = torch.from_numpy(ours[:, -1].copy()).to(model.device, model.dtype)
    with torch.inference_mode():
        normed = (norm(last) if norm is not None else last).float().cpu().numpy()
    return np.concatenate([ours[:, :-1], normed[:, None]], axis=1)


def ideal(model: Model, lengths: Sequence[int], budget: int) -> Callable[[], None]:
    """The bare trunk on as many real tokens, all in sequences of the mean length: no padding, no hooks, no text."""
    mean = round(sum(lengths) / len(lengths))
    rows = [[1] * mean] * round(sum(lengths) / mean)
    batches = [batch.input_ids.to(model.device) for batch in token_batches(rows, max_tokens=budget)]

    @torch.inference_mode()
    def forward() -> None:
        for ids in batches:
            model.hf.get_decoder()(ids, use_cache=False)

    return forward


# --- a checkpoint that shares layers with its base


def write_adapter(model: Model, folder: Path, start: int) -> Path:
    """A LoRA of rank 4 on the queries and values of all layers from one on, as PEFT saves it."""
    from safetensors.torch import save_file

    names = ("q_proj", "v_proj")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": list(names)}
    tensors = {}
    for layer in range(start, model.n_layers):
        attention = model.hf.get_decoder().layers[layer].self_attn
        for name in names:
            out, width = getattr(attention, name).weight.shape
            where = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{where}.lora_A.weight"] = torch.randn(4, width) / width**0.5
            tensors[f"{where}.lora_B.weight"] = torch.randn(out, 4) / 2
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder

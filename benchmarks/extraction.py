"""How fast activations leave the model: ours against what a researcher would otherwise write.

    python benchmarks/extraction.py [--quick] [--json FILE] [--device cpu|cuda]

The task is the same for all: the residual stream after every block, at the last token of each prompt, as float32 on the
CPU. The same model object, the same prompts from the same text, one process, one thread on a CPU, rivals interleaved.
Two ways to batch: "as written" (file order, 16 prompts a batch, padded on the right), and "our batches" (sorted by
length under a token budget), which separates what batching gains from what hooks and stopping early gain. The ideal
is the bare trunk on sequences of one length with as many real tokens: no padding, no hooks, no text.

Models with random weights are Llama-shaped. Their vocabulary is small, so that the unembedding, which we skip and most
rivals compute, has the share of the work that it has in an 8B model (7 %) and not more. Prompts are shipped ones, of 10
to 66 tokens; the fewer there are, the more padding is left in batches of a fixed budget, so padding is a figure too.
On a CPU the clock is the process' own CPU time, which a busy neighbour hardly touches.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from harness import Figure, Timings, columns, interleaved, parser, peak_growth, shown, span, write
from torch import Tensor, nn

from activations.batching import token_batches
from activations.extract import extract
from activations.models import Model, load_model
from activations.prompts import format_prompt, load_prompts
from probes.demo import BASE

OURS, IDEAL = "ours", "ideal"
UNIT = "times ours"
BATCH = 16
HEAD_SHARE = 0.07  # of Llama-3-8B's weights outside its embedding
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One model to measure on: `layers` x `d_model` with random weights, or the shipped base where `layers` is 0."""

    layers: int
    d_model: int
    dtype: str
    prompts: int

    @property
    def name(self) -> str:
        shape = f"{self.layers}x{self.d_model}" if self.layers else "shipped base"
        return f"{shape} {self.dtype}"


QUICK = (Case(8, 256, "fp32", 128), Case(8, 256, "bf16", 128), Case(0, 0, "fp32", 256))
FULL = (
    *(Case(layers, d_model, dtype, 256) for layers, d_model in ((8, 512), (12, 768)) for dtype in DTYPES),
    *(Case(0, 0, dtype, 898) for dtype in DTYPES),
)

Last = list[np.ndarray]
"""Of each prompt [layer, d_model]."""


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    figures: dict[str, Figure] = {}
    for case in QUICK if options.quick else FULL:
        print(f"measuring {case.name}", file=sys.stderr)
        figures |= measure(case, options)
    write(figures, options.json, text=ratio_table(figures), device=options.device)


def _options() -> argparse.Namespace:
    options = parser(__doc__ or "")
    options.add_argument("--device", default="cpu", help="where the model runs; cuda is timed by the wall clock")
    options.add_argument("--rounds", type=int, help="of the timing (quick 4, full 8)")
    chosen = options.parse_args()
    chosen.rounds = chosen.rounds or (4 if chosen.quick else 8)
    return chosen


def measure(case: Case, options: argparse.Namespace) -> dict[str, Figure]:
    """All figures of one model."""
    model = build(case, options.device)
    texts = prompts_for(case)
    rivals = rivals_for(model, texts)
    results = {name: np.stack(rival(texts)) for name, rival in rivals.items() if name != IDEAL}
    on_cpu = model.device.type == "cpu"
    timings = interleaved(
        {name: _finished(partial(rival, texts), model.device) for name, rival in rivals.items()},
        rounds=options.rounds,
        clock=time.process_time if on_cpu else time.perf_counter,
        warm_up=0,  # each has just run once, for its result
    )
    figures = padding(model, texts)
    for name in rivals:
        figures |= of_rival(name, timings, results, model)
        if on_cpu:
            grown = peak_growth(partial(rivals[name], texts))
            figures[f"{name}/peak memory"] = Figure(grown, "MiB above the model")
    figures |= {f"{name}/time": Figure(None, UNIT, note=reason) for name, reason in absent().items()}
    return {f"{case.name}/{name}": figure for name, figure in figures.items()}


def of_rival(name: str, timings: Timings, results: dict[str, np.ndarray], model: Model) -> dict[str, Figure]:
    """Time of one rival relative to ours, and how far its numbers are from ours."""
    figures = {f"{name}/time": timings.ratio(name, OURS, unit=UNIT) if name != OURS else timings.typical(name)}
    if name in results and name != OURS:
        ours = results[OURS]
        theirs = results[name]
        if name.startswith("transformers"):
            ours = as_hidden_states(ours, model)
        apart = float(np.abs(ours - theirs).max())
        figures[f"{name}/disagreement"] = Figure(
            apart, "largest absolute difference", repeats=len(ours), note=f"values up to {np.abs(ours).max():.3g}"
        )
    return figures


def ratio_table(figures: dict[str, Figure]) -> str:
    """One row a model and rival: what a reader wants first, without the units that all rows share."""
    rows = [("model", "rival", "time / ours", "95 % interval", "disagreement", "peak MiB", "note")]
    for name, time_figure in figures.items():
        model, rival, what = name.split("/")
        if what == "time":
            near = [figures.get(f"{model}/{rival}/{other}") for other in ("disagreement", "peak memory")]
            ratio = "1" if rival == OURS else shown(time_figure.value)
            others = ["" if figure is None else shown(figure.value) for figure in near]
            rows.append((model, rival, ratio, span(time_figure.interval), *others, time_figure.note))
    return columns(rows)


def _finished(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """On a GPU a call has returned before its work is done: wait for it."""
    if device.type == "cpu":
        return call

    def waiting() -> None:
        call()
        torch.cuda.synchronize(device)

    return waiting


# --- models and prompts


def build(case: Case, device: str) -> Model:
    """The shipped base, or a random Llama with the shipped tokenizer."""
    dtype = DTYPES[case.dtype]
    base = load_model(BASE, device=device, dtype=str(dtype).removeprefix("torch."))
    if not case.layers:
        return base
    from transformers import LlamaConfig, LlamaForCausalLM

    width = case.d_model
    feed_forward = round(8 / 3 * width / 64) * 64
    block = 4 * width**2 + 3 * width * feed_forward
    config = LlamaConfig(
        vocab_size=max(len(base.tokenizer), round(HEAD_SHARE * case.layers * block / width)),
        hidden_size=width,
        intermediate_size=feed_forward,
        num_hidden_layers=case.layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=1024,
    )
    torch.manual_seed(0)
    hf = LlamaForCausalLM(config).to(device=device, dtype=dtype)
    return load_model(hf, tokenizer=base.tokenizer)


def prompts_for(case: Case) -> tuple[str, ...]:
    """Shipped prompts in random order, so that neighbours differ in length as they do in a file."""
    shipped = load_prompts("matched-pairs").prompts
    chosen = np.random.default_rng(0).permutation(len(shipped))[: case.prompts]
    return tuple(shipped[i] for i in chosen)


def padding(model: Model, texts: Sequence[str]) -> dict[str, Figure]:
    """Padded tokens over real tokens of both ways to batch."""
    ids = tokens(model, texts)
    real = sum(map(len, ids))
    ways = {"as written": file_order(ids), "our batches": our_batches(ids)}
    return {
        f"{name}/padding": Figure(
            sum(b.ids.numel() for b in batches) / real, "padded tokens / real tokens", repeats=real
        )
        for name, batches in ways.items()
    }


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


def tokens(model: Model, texts: Sequence[str]) -> list[list[int]]:
    return [format_prompt(model.tokenizer, text) for text in texts]


def file_order(ids: Sequence[list[int]], size: int = BATCH) -> list[Padded]:
    batches = []
    for start in range(0, len(ids), size):
        chunk = [torch.tensor(row) for row in ids[start : start + size]]
        lengths = torch.tensor([len(row) for row in chunk])
        padded = nn.utils.rnn.pad_sequence(chunk, batch_first=True)
        mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
        batches.append(Padded(padded, mask, range(start, start + len(chunk))))
    return batches


def our_batches(ids: Sequence[list[int]]) -> list[Padded]:
    return [Padded(batch.input_ids, batch.mask.long(), batch.rows) for batch in token_batches(ids)]


def one_by_one(ids: Sequence[list[int]]) -> list[Padded]:
    return file_order(ids, size=1)


# --- the rivals: each takes texts and returns every prompt's [layer, d_model]


def rivals_for(model: Model, texts: Sequence[str]) -> dict[str, Callable[[Sequence[str]], Last]]:
    """Name to rival; all on one model's weights."""
    bridge = model.bridge()
    both: dict[str, Batches] = {"as written": file_order, "our batches": our_batches}
    readers: dict[str, Callable[[Padded], Tensor]] = {
        "transformers output_hidden_states": partial(by_hidden_states, model),
        "transformer_lens run_with_cache": partial(by_cache, bridge),
        "hooks that keep everything": partial(by_trace, model),
        **optional(model),
    }
    rivals: dict[str, Callable[[Sequence[str]], Last]] = {OURS: partial(by_us, model)}
    for name, reader in readers.items():
        rivals |= {f"{name}, {way}": partial(batched, model, reader, batches) for way, batches in both.items()}
    alone = partial(batched, model, readers["transformers output_hidden_states"], one_by_one)
    rivals["transformers output_hidden_states, one by one"] = alone
    rivals[IDEAL] = ideal(model, texts)
    return rivals


def by_us(model: Model, texts: Sequence[str]) -> Last:
    return list(extract(model, texts).values.transpose(1, 0, 2))


@torch.inference_mode()
def batched(model: Model, read: Callable[[Padded], Tensor], batches: Batches, texts: Sequence[str]) -> Last:
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


def by_cache(bridge: nn.Module, batch: Padded) -> Tensor:
    wanted = [f"blocks.{layer}.hook_resid_post" for layer in range(bridge.cfg.n_layers)]
    _, cache = bridge.run_with_cache(batch.ids, attention_mask=batch.mask, names_filter=wanted)
    return torch.stack([batch.last_of(cache[name]) for name in wanted], dim=1)


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


def as_hidden_states(ours: np.ndarray, model: Model) -> np.ndarray:
    """Ours [prompt, layer, d_model] as transformers reports it: the last layer has the final norm applied there."""
    norm = model.hook_points.final_norm
    last = torch.from_numpy(ours[:, -1].copy()).to(model.device, model.dtype)
    with torch.inference_mode():
        normed = (norm(last) if norm is not None else last).float().cpu().numpy()
    return np.concatenate([ours[:, :-1], normed[:, None]], axis=1)


def ideal(model: Model, texts: Sequence[str]) -> Callable[[Sequence[str]], Last]:
    """The bare trunk on as many real tokens, all in sequences of the mean length, under our token budget."""
    lengths = [len(row) for row in tokens(model, texts)]
    mean = round(sum(lengths) / len(lengths))
    rows = [[1] * mean] * round(sum(lengths) / mean)
    batches = [batch.to(model.device) for batch in our_batches(rows)]

    @torch.inference_mode()
    def forward(_: Sequence[str]) -> Last:
        for batch in batches:
            model.hf.get_decoder()(batch.ids, use_cache=False)
        return []

    return forward


# --- measured where they are installed


def optional(model: Model) -> dict[str, Callable[[Padded], Tensor]]:
    """Rivals that this project does not depend on."""
    return {"nnsight trace": by_nnsight(model)} if importable("nnsight") else {}


def absent() -> dict[str, str]:
    """Rivals that are not measured here, and why."""
    why = {"nnterp": "absent: nnterp 1.3 needs an older nnsight, which it wraps"}
    return why if importable("nnsight") else why | {"nnsight trace": "absent: nnsight is not installed"}


def importable(package: str) -> bool:
    return find_spec(package) is not None


def by_nnsight(model: Model) -> Callable[[Padded], Tensor]:
    import nnsight

    lens = nnsight.TransformersModel(model.hf, task="text-generation", tokenizer=model.tokenizer)

    def read(batch: Padded) -> Tensor:
        with lens.trace({"input_ids": batch.ids, "attention_mask": batch.mask}):
            kept = nnsight.save([layer.output for layer in lens.model.layers])
        return torch.stack([batch.last_of(hidden) for hidden in kept], dim=1)

    return read


if __name__ == "__main__":
    main()

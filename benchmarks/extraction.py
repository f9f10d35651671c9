"""How fast activations leave the model: ours against what a researcher would otherwise write.

    python benchmarks/extraction.py [--quick] [--json FILE] [--device cpu|cuda] [--threads N] [--nnterp FOLDER]

The task is the same for all: the residual stream after every block, at the last token of each prompt, as float32 on the
CPU. The same weights, the same prompts from the same text, one process, rivals interleaved. Prompts are shipped ones
joined and cut to lengths drawn evenly between 10 and 200 tokens; how much padding that costs is a figure.

A rival is measured twice: as its users write it (file order, 16 prompts a batch, padded on the right), and, with
`_packed` in the name, on what our batching makes for models that cannot be packed (sorted by length under a token
budget), which tells what batching gains from what hooks and stopping early gain. We ourselves run packed, without any
padding. The ideal is the bare trunk on sequences of one length with as many real tokens: no padding, no hooks, no text,
and the faster of two batch sizes.

Figures are named "<model> <dtype>/<figure>"; under a plain name stands the model that speaks most against us:
    ideal_ratio         the ideal's time / ours: 1 is perfect
    vs_<rival>          the rival's time / ours: above 1 we are faster
    prefix_reuse_<part> time with the residual stream reused / without, where an adapter changed the last part of the
                        layers: 0.5 and 0.25 are perfect
    memory_growth_10x   peak host memory of a process that extracts ten times as many prompts / of one that does not
    disagreement_*, peak_memory_*, padding_*, matmul_share, speed_at_* say themselves what they are in their unit

On a CPU with one thread the clock is the process' own CPU time, which a busy neighbour hardly touches; else the wall.

nnsight is measured where it is installed. nnterp needs an older one, so it gets a folder and a process of its own:
    pip install --target FOLDER --no-deps nnterp==1.3.0 nnsight==0.7.0 astor toml
    pip install --target FOLDER --no-deps python-socketio python-engineio simple-websocket wsproto bidict
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from harness import (
    Clock,
    Figure,
    columns,
    finished,
    interleaved,
    matmul_rate,
    parser,
    peak_growth,
    peak_of_process,
    shown,
    write,
)
from rivals import (
    BATCH,
    DTYPES,
    IDEAL,
    IDEAL_BUDGETS,
    LLAMA_1B,
    LLAMA_8B,
    OURS,
    READERS,
    Shape,
    as_hidden_states,
    build,
    by_length,
    by_us,
    file_order,
    ideal,
    mixture,
    numbered,
    rivals_for,
    shipped_base,
    small,
    tokens,
    write_adapter,
)

from activations.extract import extract
from activations.models import Model
from activations.reuse import ResidualCache

THEIRS, REUSE = "their time / ours", "time with reuse / without"
PARTS = {"half": 2, "quarter": 4}
RATIOS = ("ideal_ratio", *(f"vs_{name}{way}" for name in READERS for way in ("", "_packed")))
GROWING = (*(f"prefix_reuse_{part}" for part in PARTS), "memory_growth_10x")
REQUIRED = (*RATIOS, *GROWING)


@dataclass(frozen=True)
class Case:
    """One model to measure on, how many prompts, and how often."""

    shape: Shape
    dtype: str
    prompts: int
    rounds: int

    @property
    def name(self) -> str:
        return f"{self.shape.name} {self.dtype}"


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        cases: The models.
        grown: How many prompts the time is measured with, besides lengths and layers.
        few: How many prompts the memory is measured with; and ten times as many.
        both_cores: Whether the ideal ratio is also measured with two threads.
    """

    cases: tuple[Case, ...]
    grown: tuple[int, ...]
    few: int
    both_cores: bool = False


QUICK = Scale(tuple(Case(small(8, 256), dtype, 64, 2) for dtype in DTYPES), grown=(1000, 4000), few=1000)
FULL = Scale(
    (
        *(Case(small(8, 512), dtype, 64, 2) for dtype in DTYPES),
        *(Case(small(12, 768), dtype, 32, 2) for dtype in DTYPES),
    ),
    grown=(1000, 10_000, 100_000),
    few=2000,
    both_cores=True,
)
ON_GPU = (Case(LLAMA_1B, "bf16", 1024, 6), Case(LLAMA_8B, "bf16", 512, 4))
# Of the ideal ratio, which is near 1 and wants to be known better than the others.
CORE_ROUNDS = 5


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    if options.peak_with:
        print(_peak_with(options.peak_with))
        return
    scale = QUICK if options.quick else FULL
    cases = ON_GPU if options.device == "cuda" else scale.cases
    figures: dict[str, Figure] = {}
    for case in cases:
        _say(case.name)
        figures |= {f"{case.name}/{name}": figure for name, figure in measure(case, scale, options).items()}
    if not options.only:
        _say("growth")
        figures |= growth(scale, options.device) | memory_growth(scale.few)
        if options.nnterp:
            figures |= _of_nnterp(options)
        figures = worst(figures, [case.name for case in cases]) | figures
    write(figures, options.json, text=report(figures), device=options.device)


def _options() -> argparse.Namespace:
    options = parser(__doc__ or "")
    options.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where the model runs")
    options.add_argument("--threads", type=int, default=1, help="of torch on the CPU; one is timed best")
    options.add_argument("--only", default="", metavar="RIVAL", help="measure this rival alone")
    options.add_argument("--nnterp", metavar="FOLDER", help="measure nnterp from this folder, in a process of its own")
    options.add_argument("--peak-with", type=int, metavar="N", help="print the peak memory of extracting N prompts")
    return options.parse_args()


def _say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr)


def measure(case: Case, scale: Scale, options: argparse.Namespace) -> dict[str, Figure]:
    """All figures of one model."""
    if options.device == "cuda" and 3 * case.shape.weights > torch.cuda.mem_get_info()[0]:
        return dict.fromkeys(RATIOS, Figure(None, THEIRS, note="the card has too little memory for this model"))
    model = build(case.shape, case.dtype, options.device)
    texts = mixture(model.tokenizer, case.prompts)
    clock = time.process_time if options.device == "cpu" and options.threads == 1 else time.perf_counter
    figures = against_rivals(case, model, texts, clock, only=options.only)
    if not options.only:
        figures |= padding(tokens(model, texts)) | against_the_ideal(case, model, texts, clock)
        if scale.both_cores and options.device == "cpu" and options.threads == 1:
            figures |= on_two_cores(model, texts)
        figures |= prefix_reuse(model, texts, clock, rounds=case.rounds)
    return figures


def against_rivals(case: Case, model: Model, texts: Sequence[str], clock: Clock, *, only: str) -> dict[str, Figure]:
    """Time of each rival over ours, how far its numbers are from ours, and what it holds in memory."""
    rivals = rivals_for(model, only=only)
    results, figures, runs = {}, {}, {}
    for name, rival in rivals.items():
        rival(texts[:2])  # what is set up once is not what is measured
        run = _Kept(partial(rival, texts if model.device.type == "cuda" else texts[:BATCH]))  # a CPU's batch
        try:
            grown = peak_growth(run, device=model.device.type)
        except torch.OutOfMemoryError:
            figures[f"vs_{name}"] = Figure(None, THEIRS, note="does not fit into the card's memory")
            continue
        results[name], runs[name] = np.stack(run.result), finished(partial(rival, texts), model.device.type)
        figures[f"peak_memory_{name}"] = Figure(grown, "MiB above the model")
    timings = interleaved(runs, rounds=case.rounds, clock=clock, warm_up=0)
    figures["seconds_ours"] = timings.typical(OURS)
    for name in results.keys() - {OURS}:
        figures[f"vs_{name}"] = timings.ratio(name, OURS, unit=THEIRS)
        figures[f"disagreement_{name}"] = disagreement(name, results[name], results[OURS], model)
    return figures


class _Kept:
    """A call that keeps its result."""

    def __init__(self, call: Callable[[], list[np.ndarray]]) -> None:
        self.call = call
        self.result: list[np.ndarray] = []

    def __call__(self) -> None:
        self.result = self.call()


def disagreement(name: str, theirs: np.ndarray, ours: np.ndarray, model: Model) -> Figure:
    if name.startswith("hf_"):
        ours = as_hidden_states(ours, model)
    apart = float(np.abs(ours - theirs).max())
    return Figure(apart, "largest absolute difference", None, len(ours), f"values up to {np.abs(ours).max():.3g}")


def padding(ids: Sequence[list[int]]) -> dict[str, Figure]:
    """Padded tokens over real tokens of all ways to batch, and the lengths they come from."""
    lengths = [len(row) for row in ids]
    ways = {"as_written": file_order(ids), "packed": by_length(ids)}
    unit, spread = "padded tokens / real tokens", f"prompts of {min(lengths)} to {max(lengths)} tokens"
    figures = {
        f"padding_{name}": Figure(sum(b.ids.numel() for b in batches) / sum(lengths), unit, None, len(ids), spread)
        for name, batches in ways.items()
    }
    figures["padding_ours"] = Figure(1.0, unit, None, len(ids), "packed: no padding")
    return figures | {"mean_length": Figure(sum(lengths) / len(lengths), "tokens", None, len(ids), spread)}


def against_the_ideal(case: Case, model: Model, texts: Sequence[str], clock: Clock) -> dict[str, Figure]:
    """The ideal's time over ours, and the share of the machine's matrix product rate that we reach."""
    lengths = [len(row) for row in tokens(model, texts)]
    budgets = IDEAL_BUDGETS[model.device.type]
    ideals = {budget: finished(ideal(model, lengths, budget), model.device.type) for budget in budgets}
    tried = interleaved({str(b): run for b, run in ideals.items()}, rounds=2, clock=clock, warm_up=0)
    best = min(budgets, key=lambda budget: min(tried.seconds[str(budget)]))
    both = {OURS: finished(partial(by_us, model, texts), model.device.type), IDEAL: ideals[best]}
    timings = interleaved(both, rounds=CORE_ROUNDS, clock=clock, warm_up=0)
    rate = case.shape.flops(lengths) / min(timings.seconds[OURS])
    fastest = matmul_rate(model.device.type, model.dtype, clock)
    note = f"of {fastest / 1e12:.3g} TFLOP/s measured on square matrices, real tokens alone"
    return {
        "ideal_ratio": timings.ratio(IDEAL, OURS, unit="the ideal's time / ours", note=f"batches of {best} tokens"),
        "matmul_share": Figure(rate / fastest, "share", None, CORE_ROUNDS, note),
    }


def on_two_cores(model: Model, texts: Sequence[str]) -> dict[str, Figure]:
    lengths = [len(row) for row in tokens(model, texts)]
    ideals = {str(budget): ideal(model, lengths, budget) for budget in IDEAL_BUDGETS["cpu"]}
    both: dict[str, Callable[[], object]] = {OURS: partial(by_us, model, texts), **ideals}
    torch.set_num_threads(2)
    timings = interleaved(both, rounds=3, warm_up=0)
    torch.set_num_threads(1)
    best = min(ideals, key=lambda name: float(np.median(timings.seconds[name])))
    note = f"by the wall clock, which neighbours disturb; batches of {best} tokens"
    return {"ideal_ratio_2_threads": timings.ratio(best, OURS, unit="the ideal's time / ours", note=note)}


# --- layers that a checkpoint shares with its base


def prefix_reuse(model: Model, texts: Sequence[str], clock: Clock, *, rounds: int) -> dict[str, Figure]:
    """Extraction from an adapter of the last half and the last quarter of the layers, with the base's run at hand."""
    starts = {part: model.n_layers - model.n_layers // share for part, share in PARTS.items()}
    cache = ResidualCache(model, layers=tuple(starts.values()))
    extract(model, texts, reuse=cache)
    figures = {}
    for part, start in starts.items():
        with tempfile.TemporaryDirectory() as folder, model.applied(write_adapter(model, Path(folder), start)):
            whole, reused = partial(extract, model, texts), partial(extract, model, texts, reuse=cache)
            apart = float(np.abs(whole().values - reused().values).max())
            calls = {"whole": finished(whole, model.device.type), "reused": finished(reused, model.device.type)}
            timings = interleaved(calls, rounds=rounds, clock=clock, warm_up=0)
        note = (
            f"layers {start} to {model.n_layers - 1} of {model.n_layers} changed; {cache.nbytes / 2**20:.0f} MiB kept"
        )
        figures[f"prefix_reuse_{part}"] = timings.ratio("reused", "whole", unit=REUSE, note=note)
        figures[f"disagreement_prefix_reuse_{part}"] = Figure(apart, "largest absolute difference")
    return figures


# --- growth with prompts, their length, and layers


def growth(scale: Scale, device: str) -> dict[str, Figure]:
    """Speed against the smallest of each row: 1 everywhere if cost only grows with the work."""
    base, wide = shipped_base(device), build(small(8, 256), "fp32", device)
    prompts = {n: (base, numbered(n), 1) for n in scale.grown}
    lengths = {n: (wide, mixture(wide.tokenizer, 6400 // n, shortest=n, longest=n), 1) for n in (16, 64, 256, 1024)}
    deep = mixture(wide.tokenizer, 32)
    layers = {n: (build(small(n, 256), "fp32", device), deep, n) for n in (2, 4, 8, 16)}
    rows = {"prompts": prompts, "tokens": lengths, "layers": layers}
    return {name: figure for what, row in rows.items() for name, figure in _speeds(what, row).items()}


def _speeds(what: str, row: Mapping[int, tuple[Model, Sequence[str], int]]) -> dict[str, Figure]:
    speeds = {}
    for number, (model, texts, layers) in row.items():
        extract(model, texts[:8])
        clock = time.process_time if model.device.type == "cpu" else time.perf_counter
        started = clock()
        with tempfile.TemporaryDirectory() as folder:
            extract(model, texts, out=Path(folder) / "out.h5")
        speeds[number] = sum(map(len, tokens(model, texts))) * layers / (clock() - started)
    smallest = min(speeds)
    unit = f"{'layers x ' if what == 'layers' else ''}tokens a second, with {smallest} {what}: 1"
    return {
        f"growth/speed_at_{number}_{what}": Figure(speed / speeds[smallest], unit, None, 1, f"{speed:,.0f} a second")
        for number, speed in speeds.items()
    }


def memory_growth(few: int) -> dict[str, Figure]:
    """Peak host memory of two processes that write their result to a file."""
    command = [sys.executable, __file__, "--peak-with"]
    peaks = [subprocess.run([*command, str(n)], capture_output=True, text=True, check=True) for n in (few, 10 * few)]
    one, ten = (float(done.stdout) for done in peaks)
    note = f"{one:.0f} MiB with {few:,} prompts, {ten:.0f} MiB with {10 * few:,}; the whole process, shipped base"
    return {"memory_growth_10x": Figure(ten / one, "peak memory / with a tenth of the prompts", note=note)}


def _peak_with(count: int) -> float | None:
    with tempfile.TemporaryDirectory() as folder:
        extract(shipped_base("cpu"), numbered(count), out=Path(folder) / "out.h5")
    return peak_of_process()


# --- figures over all models, and what a reader sees first


def _of_nnterp(options: argparse.Namespace) -> dict[str, Figure]:
    """The figures of nnterp, from a process that finds it and the nnsight that it needs in a folder of their own."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "nnterp.json"
        command = [sys.executable, __file__, "--only", "nnterp", "--json", str(result), "--device", options.device]
        command += ["--threads", str(options.threads), *(["--quick"] if options.quick else [])]
        path = os.pathsep.join([str(Path(options.nnterp).resolve()), os.environ.get("PYTHONPATH", "")])
        subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.DEVNULL)
        found = json.loads(result.read_text())["figures"]
    return {
        name: Figure(**{**figure, "interval": figure["interval"] and tuple(figure["interval"])})
        for name, figure in found.items()
        if "nnterp" in name
    }


def worst(figures: Mapping[str, Figure], models: Sequence[str]) -> dict[str, Figure]:
    """Every required figure under its plain name: of all models the one that speaks most against us."""
    found = {}
    for name in (name for name in REQUIRED if name not in figures):
        here = {model: figures[f"{model}/{name}"] for model in models if f"{model}/{name}" in figures}
        values = {model: figure.value for model, figure in here.items() if figure.value is not None}
        if not values:
            why = next((figure.note for figure in here.values()), "not installed where this was measured")
            found[name] = Figure(None, REUSE if name in GROWING else THEIRS, note=f"absent: {why}")
            continue
        choose = max if name in GROWING else min
        model = choose(values, key=values.__getitem__)
        figure, all_of_them = here[model], ", ".join(f"{model} {shown(value)}" for model, value in values.items())
        found[name] = Figure(figure.value, figure.unit, figure.interval, figure.repeats, f"worst of {all_of_them}")
    return found


def report(figures: Mapping[str, Figure]) -> str:
    """Figures of all models side by side, then the others with their notes."""
    models = list(dict.fromkeys(name.split("/")[0] for name in figures if "/" in name and "growth/" not in name))
    rows = list(dict.fromkeys(name.split("/")[1] for name in figures if name.split("/")[0] in models))
    beside = [(row, *(_cell(figures.get(f"{model}/{row}")) for model in models)) for row in sorted(rows)]
    plain = [
        (name, shown(f.value), f.note or f.unit) for name, f in figures.items() if name.split("/")[0] not in models
    ]
    tables = [columns([("figure", *models), *beside]), columns([("figure", "value", "note"), *plain])]
    return "\n\n".join(table for table, content in zip(tables, (beside, plain), strict=True) if content)


def _cell(figure: Figure | None) -> str:
    return "" if figure is None else shown(figure.value)


if __name__ == "__main__":
    main()

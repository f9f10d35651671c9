"""How fast every layer gets its probe: ours against a scikit-learn loop on standardised features, and what probes find.

    python benchmarks/probes.py [--quick] [--json FILE] [--threads N]

Two tasks. The final fit: one logistic probe a layer. Cross-validation: 5 strengths x 5 folds a layer and the AUROC of
each strength, ours in screening precision. Both standardise the layer, which is in both times. scikit-learn runs with
its own tolerance (1e-4), in float32, as its users run it; how far that leaves it from the optimum is a figure, and so
is how far it leaves us. Its loop over layers is serial, or joblib's with a process a core.

Data are synthetic: a power-law spectrum, three massive dimensions, one planted direction. One layer is measured, and
the cost is linear in layers, which is a figure too (we never batch layers: `fit_probes` loops as the rival does).

Figures are named "<prompts>x<d_model>/<figure>"; without a shape they hold the target shape of 4000 prompts of width
4096 (of --quick the largest), or the worst of all shapes:
    vs_sklearn          final fit at the default l2 of 0.01, their time / ours, at the target shape, as users write it
    vs_sklearn_bare     the same, standardised by numpy in float32, which is faster than StandardScaler
    vs_sklearn_exact    the same again, with the tolerance at which scikit-learn gets about as near to the optimum
    vs_sklearn_cv       cross-validation, their time / ours, at the target shape
    max_disagreement    final fit: largest difference of decision values from the optimum / the largest of them, worst
    peak_memory_ratio   memory that a fit needs beside the activations / one layer in float32, worst of the large shapes
    intent_auroc_twins  the shipped base: probe trained on matched-pairs, tested on JailbreakBench's twins
    words_only_auroc_twins  the same of a model that sees words alone

On a CPU with one thread the clock is the process' own CPU time, which a busy neighbour hardly touches; else the wall.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

# Not as a folder in front: this file's own name is that of the package.
HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if Path(path).resolve() != HERE), str(HERE)]

import numpy as np
import torch
from harness import Clock, Figure, Timings, columns, interleaved, parser, peak_growth, shown, span, write
from joblib import Parallel, delayed
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from activations.extract import extract
from activations.loading import load_model
from activations.prompts import PromptSet, load_prompts
from probes.demo import BASE
from probes.folds import deal_folds
from probes.metrics import auroc, auroc_interval
from probes.sweep import sweep_probes
from probes.train import fit_probes

THEIRS = "their time / ours"
L2 = 1e-2
STRENGTHS = (10.0, 1.0, 0.1, 0.01, 0.001)
FOLDS = 5
# Of scikit-learn, where it comes within about 1e-3 of the optimum, as ours does.
SAME_TOLERANCE = 1e-5
# Below this a layer is smaller than what torch and numpy hold anyway, and its ratio says nothing.
LARGE = 2**23


@dataclass(frozen=True)
class Case:
    """One shape, and how often it is measured.

    Attributes:
        prompts: Rows.
        d_model: Width.
        rounds: Of each task.
        exact: Whether the optimum is computed, which takes scikit-learn long in float64.
    """

    prompts: int
    d_model: int
    rounds: int = 2
    exact: bool = True

    @property
    def name(self) -> str:
        return f"{self.prompts}x{self.d_model}"


QUICK = (Case(500, 512, 4), Case(500, 4096), Case(2000, 512), Case(2000, 2048))
FULL = (
    Case(500, 512, 4),
    Case(500, 8192),
    Case(4000, 512),
    Case(4000, 4096),
    Case(20_000, 512),
    Case(20_000, 2048, 1, exact=False),
)
TARGET = "4000x4096"
RATIOS = ("vs_sklearn", "vs_sklearn_bare", "vs_sklearn_exact", "vs_sklearn_cv")


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    cases = QUICK if options.quick else FULL
    figures: dict[str, Figure] = {}
    for case in cases:
        _say(case.name)
        figures |= {f"{case.name}/{name}": figure for name, figure in measure(case, clock).items()}
    target = next((case for case in cases if case.name == TARGET), cases[-1])
    _say("cores and layers")
    figures |= {f"{target.name}/{name}": figure for name, figure in on_all_cores(target).items()} | growth(clock)
    _say("twins")
    figures = headline(figures, target) | figures | twins()
    write(figures, options.json, text=report(figures), target=target.name)


def _options() -> argparse.Namespace:
    options = parser(__doc__ or "")
    options.add_argument("--threads", type=int, default=1, help="of torch; one is timed best")
    return options.parse_args()


def _say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr)


# --- the data and the rivals


def synthetic(prompts: int, d_model: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A layer [prompt, d_model] as language models have them, and labels that one direction tells, imperfectly."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(prompts) % 2 == 0
    spectrum = np.arange(1, d_model + 1, dtype=np.float32) ** -0.5
    planted = rng.standard_normal(d_model, dtype=np.float32) * spectrum
    values = rng.standard_normal((prompts, d_model), dtype=np.float32) * spectrum
    values += 4.5 * spectrum.mean() * labels[:, None] * planted / np.linalg.norm(planted)
    values = values @ (rng.standard_normal((d_model, d_model), dtype=np.float32) / np.float32(np.sqrt(d_model)))
    massive = rng.choice(d_model, 3, replace=False)
    values[:, massive] = 100 * values[:, massive] + np.array([300, -200, 150], dtype=np.float32)
    return values, labels


def scaled(values: np.ndarray) -> np.ndarray:
    """Standardised in float32, the fastest way to write it (`StandardScaler` takes twice as long)."""
    centred = values - values.mean(axis=0)
    centred /= values.std(axis=0)
    return centred


def their_fit(values: np.ndarray, labels: np.ndarray, l2: float = L2, **settings: float) -> np.ndarray:
    """Decision values of scikit-learn's probe."""
    rows = scaled(values)
    model = LogisticRegression(C=1 / (l2 * len(labels)), max_iter=100_000, **settings)
    return np.asarray(model.fit(rows, labels).decision_function(rows))


def as_users_write(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The loop's body as it is found in notebooks."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=1 / (L2 * len(labels)), max_iter=100_000))
    return np.asarray(model.fit(values, labels).decision_function(values))


def our_fit(values: np.ndarray, labels: np.ndarray, l2: float = L2) -> np.ndarray:
    return fit_probes(values[None], labels, l2=l2, folds=0)[0].score(values)


def their_cv(values: np.ndarray, labels: np.ndarray) -> list[float]:
    """AUROC of each strength, over the folds that ours takes."""
    rows, folds = scaled(values), _folds(labels)
    scores = np.empty((len(STRENGTHS), len(labels)))
    for fold in range(FOLDS):
        kept, tested = folds != fold, folds == fold
        seen, unseen = rows[kept], rows[tested]
        for number, l2 in enumerate(STRENGTHS):
            model = LogisticRegression(C=1 / (l2 * len(seen)), max_iter=100_000).fit(seen, labels[kept])
            scores[number, tested] = model.decision_function(unseen)
    return [float(roc_auc_score(labels, one)) for one in scores]


def our_cv(values: np.ndarray, labels: np.ndarray) -> list[float]:
    found = sweep_probes({"last": values[None]}, {"planted": labels}, l2=STRENGTHS, folds=FOLDS, shuffles=0)
    return [float(area) for area in found.auroc[0, 0, :, 0]]


def _folds(labels: np.ndarray) -> np.ndarray:
    return deal_folds(labels, np.arange(len(labels)), FOLDS, np.random.default_rng(0))


# --- time, memory and agreement


def measure(case: Case, clock: Clock) -> dict[str, Figure]:
    """All figures of one shape."""
    values, labels = synthetic(case.prompts, case.d_model)
    fits: dict[str, Callable[[], object]] = {
        "theirs": partial(as_users_write, values, labels),
        "bare": partial(their_fit, values, labels),
        "exact": partial(their_fit, values, labels, tol=SAME_TOLERANCE),
        "ours": partial(our_fit, values, labels),
    }
    theirs, ours = Kept(partial(their_cv, values, labels)), Kept(partial(our_cv, values, labels))
    final = interleaved(fits, rounds=2 * case.rounds, clock=clock)
    cross = interleaved({"theirs": theirs, "ours": ours}, rounds=case.rounds, clock=clock, warm_up=0)
    apart = np.abs(np.subtract(ours.result, theirs.result)).max()
    figures = {
        name: timings.ratio(rival, "ours", unit=THEIRS, note=f"{_typical(timings, rival)}; {what}")
        for name, timings, rival, what in (
            ("vs_sklearn", final, "theirs", "StandardScaler and LogisticRegression at its own tolerance"),
            ("vs_sklearn_bare", final, "bare", "standardised by numpy in float32 instead"),
            (
                "vs_sklearn_exact",
                final,
                "exact",
                f"the same at tol={SAME_TOLERANCE}, which comes nearer to the optimum",
            ),
            ("vs_sklearn_cv", cross, "theirs", "5 strengths x 5 folds, standardised by numpy"),
        )
    }
    figures["disagreement_cv"] = Figure(float(apart), "largest difference of an AUROC", None, len(STRENGTHS))
    return figures | agreement(case, values, labels) | memory(case)


class Kept:
    """A call whose last result is kept, so that what was timed is what is compared."""

    def __init__(self, call: Callable[[], list[float]]) -> None:
        self.call = call
        self.result: list[float] = []

    def __call__(self) -> None:
        self.result = self.call()


def _typical(timings: Timings, rival: str) -> str:
    return f"{shown(timings.typical(rival).value)} s against {shown(timings.typical('ours').value)} s a layer"


def agreement(case: Case, values: np.ndarray, labels: np.ndarray) -> dict[str, Figure]:
    """How far ours and scikit-learn's probes end from the optimum."""
    unit = "largest difference of a decision value / the largest of them"
    if not case.exact:
        near = their_fit(values, labels, tol=SAME_TOLERANCE)
        far = float(np.abs(our_fit(values, labels) - near).max() / np.abs(near).max())
        return {"disagreement": Figure(far, unit, note=f"from scikit-learn at tol={SAME_TOLERANCE} in float32")}
    optimum = their_fit(values.astype(np.float64), labels, tol=1e-9)
    both = {
        "disagreement": our_fit(values, labels),
        "disagreement_of_sklearn": their_fit(values, labels),
        "disagreement_of_exact": their_fit(values, labels, tol=SAME_TOLERANCE),
    }
    return {
        name: Figure(float(np.abs(scores - optimum).max() / np.abs(optimum).max()), unit)
        for name, scores in both.items()
    }


def memory(case: Case) -> dict[str, Figure]:
    """What fits need beside the activations, once the libraries are loaded.

    Each in a process of its own: in one that has done other work, freed memory that cannot be given back is reused or
    not, as chance has it, and the same fit was seen to need 1.9 or 3.1 layers.
    """
    found = {}
    for name in ("fit", "fit_with_nulls", "cv", "of_sklearn"):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
            grown = alone.submit(grown_by, name, case, torch.get_num_threads()).result()
        ratio = None if grown is None else grown * 2**20 / (4 * case.prompts * case.d_model)
        found[f"memory_{name}"] = Figure(ratio, "peak growth / one layer in float32", note=f"{shown(grown)} MiB")
    return found


def grown_by(name: str, case: Case, threads: int) -> float | None:
    """MiB that this process grows by at most, when it fits the second time."""
    torch.set_num_threads(threads)
    values, labels = synthetic(case.prompts, case.d_model)
    calls: dict[str, Callable[[], object]] = {
        "fit": partial(fit_probes, values[None], labels, folds=0),
        "fit_with_nulls": partial(fit_probes, values[None], labels),
        "cv": partial(our_cv, values, labels),
        "of_sklearn": partial(their_fit, values, labels),
    }
    calls[name]()
    return peak_growth(calls[name])


def on_all_cores(case: Case) -> dict[str, Figure]:
    """By the wall clock, a process a core and a layer a process, both through joblib."""
    cores = os.cpu_count() or 1
    layers = [synthetic(case.prompts, case.d_model, seed) for seed in range(cores)]
    workers = Parallel(n_jobs=cores, max_nbytes=None)

    def spread(work: Callable[[np.ndarray, np.ndarray], object]) -> Callable[[], object]:
        return lambda: workers(delayed(work)(*layer) for layer in layers)

    note = f"{cores} layers in {cores} processes, both; the wall clock, which neighbours disturb"
    fits = interleaved({"theirs": spread(as_users_write), "ours": spread(our_fit)}, rounds=2)
    cross = interleaved({"theirs": spread(their_cv), "ours": spread(our_cv)}, rounds=1, warm_up=0)
    return {
        "vs_sklearn_joblib": fits.ratio("theirs", "ours", unit=THEIRS, note=note),
        "vs_sklearn_cv_joblib": cross.ratio("theirs", "ours", unit=THEIRS, note=note),
    }


def growth(clock: Clock) -> dict[str, Figure]:
    """Seconds a layer against those of 8 layers: 1 everywhere if cost is linear in layers."""
    values, labels = synthetic(500, 512)
    seconds = {}
    for layers in (8, 32, 80):
        many = np.broadcast_to(values, (layers, *values.shape))
        run = {"": partial(sweep_probes, {"last": many}, {"planted": labels}, shuffles=0)}
        seconds[layers] = float(np.median(interleaved(run, rounds=2, clock=clock).seconds[""])) / layers
    unit = "seconds a layer / with 8 layers"
    return {
        f"growth/{n}_layers": Figure(each / seconds[8], unit, None, 2, f"{each:.3g} s") for n, each in seconds.items()
    }


# --- what probes find in the shipped base


def twins() -> dict[str, Figure]:
    """Trained on matched pairs, tested on JailbreakBench's harmful prompts and their benign twins."""
    trained, tested = load_prompts("matched-pairs"), load_prompts("jailbreakbench")
    shared = set(tested.prompts) & set(trained.prompts)
    trained = trained.select(row for row, text in enumerate(trained.prompts) if text not in shared)
    model = load_model(BASE)
    probes = fit_probes(extract(model, trained))
    layer = probes.best_layer
    scores = probes[layer].score(extract(model, tested).values[layer])
    words = make_pipeline(TfidfVectorizer(), LogisticRegression(max_iter=1000)).fit(trained.prompts, trained.labels)
    intent, by_words = (area_of(one, tested) for one in (scores, np.asarray(words.decision_function(tested.prompts))))
    held_out = probes.metrics[layer]
    clear = intent[1][0] > by_words[1][1]
    plain = (
        "its interval is clear of the words-only baseline's"
        if clear
        else "not clear of the words-only baseline: this base is too small to carry intent beyond words"
    )
    note = f"layer {layer} of {len(probes)}, chosen on matched-pairs (AUROC {held_out.auroc:.3f} there); {plain}"
    return {
        "intent_auroc_twins": Figure(intent[0], "AUROC", intent[1], len(tested), note),
        "words_only_auroc_twins": Figure(by_words[0], "AUROC", by_words[1], len(tested), "tf-idf of words"),
    }


def area_of(scores: np.ndarray, prompts: PromptSet) -> tuple[float, tuple[float, float]]:
    return auroc(scores, prompts.labels), auroc_interval(scores, prompts.labels, groups=prompts.pair_ids)


# --- figures over all shapes, and what a reader sees first


def headline(figures: Mapping[str, Figure], target: Case) -> dict[str, Figure]:
    """The figures that the issue names, of the target shape or the worst of all."""
    found = {name: figures[f"{target.name}/{name}"] for name in RATIOS}
    found["max_disagreement"] = _worst(figures, ("disagreement",), lambda _: True)
    found["peak_memory_ratio"] = _worst(figures, ("memory_fit", "memory_fit_with_nulls", "memory_cv"), _is_large)
    return found


def _is_large(shape: str) -> bool:
    prompts, d_model = map(int, shape.split("x"))
    return prompts * d_model >= LARGE


def _worst(figures: Mapping[str, Figure], kinds: Sequence[str], which: Callable[[str], bool]) -> Figure:
    """The largest of some kinds over shapes; None where it was nowhere measured."""
    here = {
        name: figure
        for name, figure in figures.items()
        if "x" in name and figure.value is not None and name.split("/")[-1] in kinds and which(name.split("/")[0])
    }
    if not here:
        return Figure(None, "", note="no layer measured is large enough: --quick has none")
    name = max(here, key=lambda one: here[one].value or 0.0)
    every = ", ".join(f"{one} {shown(figure.value)}" for one, figure in here.items())
    return Figure(here[name].value, here[name].unit, None, len(here), f"worst of {every}")


def report(figures: Mapping[str, Figure]) -> str:
    """Figures of all shapes side by side, then the others with their notes."""
    shapes = list(dict.fromkeys(name.split("/")[0] for name in figures if name[0].isdigit()))
    rows = list(dict.fromkeys(name.split("/")[1] for name in figures if name.split("/")[0] in shapes))
    beside = [(row, *(_cell(figures.get(f"{shape}/{row}")) for shape in shapes)) for row in rows]
    plain = [
        (name, shown(f.value), span(f.interval), f.note or f.unit)
        for name, f in figures.items()
        if name.split("/")[0] not in shapes
    ]
    tables = [[("figure", *shapes), *beside], [("figure", "value", "95 % interval", "note"), *plain]]
    return "\n\n".join(columns(rows) for rows in tables)


def _cell(figure: Figure | None) -> str:
    return "" if figure is None else shown(figure.value)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="sklearn")
    main()

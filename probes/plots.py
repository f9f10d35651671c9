"""Pictures of results, for notebooks and for the report: axes in, axes out, nothing shown.

Colours are told apart by people with any colour vision (after Okabe and Ito), and what colour says, shape says too.
Names come from untrusted folders, so none is read as mathematics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from activations.errors import OptionError, ProbeError, printable
from probes.records import Evidence, Item

if TYPE_CHECKING:
    from probes.diff import Diff
    from probes.probe import ProbeSet

__all__ = ["PALETTE", "plot_auroc", "plot_evidence", "plot_layer_shift", "plot_strip"]

PALETTE = {
    "ink": "#22262a",
    "muted": "#6c737b",
    "line": "#d4d8dd",
    "band": "#d5dfe8",
    "dots": "#8796a5",
    "blue": "#0072b1",
    "orange": "#d55e01",
    "green": "#009e74",
}

# A scale in proportion hides the benign range where a statistic lies this many ranges outside of it.
_FAR_OUTSIDE = 12
# Labels of powers that fit side by side.
_MOST_TICKS = 5


def plot_layer_shift(result: Diff | Evidence, *, ax: Axes | None = None) -> Axes:
    """Draw how far each layer moved from the base, the most shifted layer marked.

    Args:
        result: A diff, drawn as one line for weights and one for activations where both were measured, or one
            detector's evidence, drawn as bars.
        ax: Where to draw; a new figure by default.

    Raises:
        OptionError: The evidence has no profile over layers.
    """
    ax = _axes(ax)
    if isinstance(result, Evidence):
        if not result.layers:
            raise OptionError(f"evidence of {result.detector!r} has no profile over layers")
        _bars(ax, result.layers)
        ax.set_ylabel(_label(result.detector), parse_math=False)
    else:
        _diff_lines(ax, result)
    ax.set_xlabel("layer")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _tidy(ax)


def plot_auroc(probe_set: ProbeSet, *, ax: Axes | None = None) -> Axes:
    """Draw how well each layer's probe separates held-out prompts, above everything that needs no knowledge of intent.

    Drawn beside it: the same fit under shuffled labels, the best of 100 random directions, and a model that sees the
    prompts' words alone.

    Raises:
        ProbeError: The probes were fitted without held-out folds, so nothing is known.
    """
    if not probe_set.metrics:
        raise ProbeError("the probes have no metrics to draw", hint="Fit them with folds of at least 2.")
    ax, layers = _axes(ax), np.arange(len(probe_set.metrics))
    metrics = probe_set.metrics
    ax.axhline(0.5, color=PALETTE["line"], linewidth=1)
    shuffled = np.array([(min(m.null_shuffled), max(m.null_shuffled)) for m in metrics if m.null_shuffled])
    if len(shuffled) == len(layers):
        ax.fill_between(layers, *shuffled.T, color=PALETTE["band"], linewidth=0, label="shuffled labels")
    random = [m.null_random_directions for m in metrics]
    ax.plot(layers, random, color=PALETTE["dots"], linestyle=":", label="best of 100 random directions")
    words = [np.nan if m.words_baseline is None else m.words_baseline for m in metrics]
    if not np.isnan(words).all():
        ax.plot(layers, words, color=PALETTE["green"], linestyle="--", label="words alone")
    ax.fill_between(layers, *np.array([m.interval for m in metrics]).T, color=PALETTE["blue"], alpha=0.15, linewidth=0)
    ax.plot(layers, [m.auroc for m in metrics], color=PALETTE["blue"], marker="o", markersize=4, label="probe")
    ax.set(xlabel="layer", ylabel="AUROC, held out", ylim=(min(0.4, ax.get_ylim()[0]), 1.02))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(frameon=False, fontsize="small", loc="lower right")
    return _tidy(ax)


def plot_evidence(items: Sequence[Item], detector: str, *, ax: Axes | None = None) -> Axes:
    """Draw one detector's statistic of every checkpoint over the range of its benign null.

    Args:
        items: Records of a scan; those without this evidence are left out.
        detector: A detector's name, as in `Evidence.detector`.
        ax: Where to draw; a new figure of fitting height by default.

    Raises:
        OptionError: No item has a statistic of this detector.
    """
    rows = [(item, found) for item in items if (found := evidence_of(item, detector)) and found.statistic is not None]
    if not rows:
        known = sorted({evidence.detector for item in items for evidence in item.evidence})
        raise OptionError(f"no item has a statistic of {detector!r}: expected one of {', '.join(known) or 'none'}")
    ax = _axes(ax, height=0.9 + 0.26 * len(rows))
    for row, (_, evidence) in enumerate(rows):
        _null_range(ax, evidence, row, half_height=0.36)
        _mark(ax, evidence, row)
    _name_rows(ax, [item.name for item, _ in rows])
    ax.set_xlabel(_label(detector), parse_math=False)
    _stretch(ax, [evidence for _, evidence in rows])
    return _tidy(ax, horizontal=True)


def plot_strip(evidence: Evidence, *, ax: Axes | None = None) -> Axes:
    """Draw one statistic over its benign null in a single unlabelled row, small enough for a table's cell.

    Args:
        evidence: With a statistic.
        ax: Where to draw; a new figure by default.
    """
    ax = _axes(ax, height=0.3)
    _null_range(ax, evidence, 0, half_height=0.8)
    _mark(ax, evidence, 0)
    ax.axhline(0, color=PALETTE["line"], linewidth=0.8, zorder=0)
    ax.set_ylim(-1, 1)
    _stretch(ax, [evidence])
    ax.margins(x=0.06)
    ax.set_axis_off()
    return ax


def evidence_of(item: Item, detector: str) -> Evidence | None:
    """The evidence of one detector on one item, None where it was not measured."""
    return next((evidence for evidence in item.evidence if evidence.detector == detector), None)


def _axes(ax: Axes | None, *, height: float = 2.4) -> Axes:
    return ax if ax is not None else plt.subplots(figsize=(4.4, height), layout="constrained")[1]


def _bars(ax: Axes, values: Sequence[float]) -> None:
    largest = int(np.argmax(np.abs(values)))
    bars = ax.bar(range(len(values)), values, color=PALETTE["dots"], width=0.72)
    bars[largest].set_color(PALETTE["blue"])
    ax.bar_label(bars, [str(layer) if layer == largest else "" for layer in range(len(values))], color=PALETTE["ink"])
    ax.axhline(0, color=PALETTE["muted"], linewidth=0.8)
    ax.margins(y=0.15)


def _diff_lines(ax: Axes, result: Diff) -> None:
    weights = result.weights.layer_profile()
    layers = np.arange(len(weights))
    if result.activations is not None:
        by_chance = np.quantile(result.activations.mean_shift_null, 0.95, axis=0)
        ax.fill_between(layers, 0, by_chance, color=PALETTE["band"], linewidth=0, label="activations, by chance (95 %)")
        shift = result.activations.mean_shift
        ax.plot(layers, shift, color=PALETTE["orange"], marker="D", markersize=4, label="activations")
    ax.plot(layers, weights, color=PALETTE["blue"], marker="o", markersize=4, label="weights")
    ax.set_ylabel("relative change")
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False, fontsize="small")


def _null_range(ax: Axes, evidence: Evidence, row: int, *, half_height: float) -> None:
    """What benign looks like in this row: a band over the range, a tick for each value that was kept."""
    null = evidence.null
    if null is None or null.low is None or null.high is None:
        return
    ends = [null.low, null.high]
    ax.fill_between(ends, row - half_height, row + half_height, color=PALETTE["band"], linewidth=0, zorder=1)
    ticks = half_height * 0.5
    ax.vlines(null.values, row - ticks, row + ticks, color=PALETTE["dots"], linewidth=0.8, zorder=2)


def _name_rows(ax: Axes, names: Sequence[str]) -> None:
    ax.set_yticks(range(len(names)), [printable(name, limit=24) for name in names])
    for label in ax.get_yticklabels():
        label.set_parse_math(False)
    ax.set_ylim(len(names) - 0.4, -0.6)


def _mark(ax: Axes, evidence: Evidence, row: int) -> None:
    colour, marker = ("orange", "D") if evidence.exceeded else ("blue", "o") if evidence.null else ("muted", "s")
    ax.plot([evidence.statistic or 0.0], [row], marker, color=PALETTE[colour], markersize=5, clip_on=False, zorder=3)


def _stretch(ax: Axes, found: Sequence[Evidence]) -> None:
    """Use a scale that is linear inside the benign range and logarithmic far outside of it, where one is needed."""
    lows = [e.null.low for e in found if e.null is not None and e.null.low is not None]
    highs = [e.null.high for e in found if e.null is not None and e.null.high is not None]
    statistics = [e.statistic for e in found if e.statistic is not None]
    if not lows or not highs:
        return
    low, high = min(lows), max(highs)
    width = max(high - low, float(np.finfo(np.float32).tiny))
    if max(max(statistics) - high, low - min(statistics)) <= _FAR_OUTSIDE * width:
        return
    linear = max(abs(low), abs(high), width)
    farthest = max(linear, *map(abs, statistics))
    first, last = int(np.ceil(np.log10(linear))), int(np.floor(np.log10(farthest)))
    powers = range(first, max(first, last) + 1, 1 + max(last - first, 0) // _MOST_TICKS)
    ticks = [0.0, *(10.0**power for power in powers)]
    ax.set_xscale("symlog", linthresh=linear)
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()


def _label(detector: str) -> str:
    return printable(detector.replace("_", " ").replace("-", " "), limit=40)


def _tidy(ax: Axes, *, horizontal: bool = False) -> Axes:
    for side in ("top", "right", "left") if horizontal else ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.tick_params(colors=PALETTE["muted"], length=0 if horizontal else 3)
    for spine in ax.spines.values():
        spine.set_color(PALETTE["line"])
    for label in (ax.xaxis.label, ax.yaxis.label):
        label.set_color(PALETTE["ink"])
    return ax

"""Pictures of results, for notebooks and for the report: axes in, axes out, nothing shown.

Colours are told apart by people with any colour vision (after Okabe and Ito), and what colour says, shape says too.
Names come from untrusted folders, so none is read as mathematics.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from activations.errors import OptionError, ProbeError, printable
from probes.records import Evidence, Item

if TYPE_CHECKING:
    from probes.calibration import Reliability
    from probes.diff import Diff
    from probes.probe import ProbeSet
    from probes.transfer import Transfer

__all__ = [
    "PALETTE",
    "plot_auroc",
    "plot_calibration",
    "plot_evidence",
    "plot_heatmap",
    "plot_layer_shift",
    "plot_strip",
    "plot_transfer",
]

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
# Cells beyond these have no room for a number of two digits.
_MOST_NUMBERS = (12, 10)  # rows, columns
# An AUROC drawn in the colour of chance or of perfection is one.
_AUROC_RANGE = (0.5, 1.0)
_BLOCK = re.compile(r"blocks\.([0-9]{1,6})\.")


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

    Drawn beside it: the same fit under shuffled labels, the best of 1000 random directions, and a model that sees the
    prompts' words alone. Layers are the blocks that the hook points name.

    Raises:
        ProbeError: The probes were fitted without held-out folds, so nothing is known.
    """
    if not probe_set.metrics:
        raise ProbeError("the probes have no metrics to draw", hint="Fit them with folds of at least 2.")
    ax, metrics = _axes(ax), probe_set.metrics
    layers, named = _layers(probe_set.hook_points)
    wide = _wide(layers)
    ax.axhline(0.5, color=PALETTE["line"], linewidth=1)
    shuffled = np.array([(min(m.null_shuffled), max(m.null_shuffled)) for m in metrics if m.null_shuffled])
    if len(shuffled) == len(layers):
        ax.fill_between(wide, *shuffled.T, color=PALETTE["band"], linewidth=0, label="shuffled labels")
    random = np.broadcast_to([m.null_random_directions for m in metrics], wide.shape)
    ax.plot(wide, random, color=PALETTE["dots"], linestyle=":", label="best of 1000 random directions")
    words = np.array([np.nan if m.words_baseline is None else m.words_baseline for m in metrics])
    if not np.isnan(words).all():
        ax.plot(wide, np.broadcast_to(words, wide.shape), color=PALETTE["green"], linestyle="--", label="words alone")
    ax.fill_between(wide, *np.array([m.interval for m in metrics]).T, color=PALETTE["blue"], alpha=0.15, linewidth=0)
    ax.plot(layers, [m.auroc for m in metrics], color=PALETTE["blue"], marker="o", markersize=4, label="probe")
    ax.set(xlabel=named, ylabel="AUROC, held out", ylim=(min(0.4, ax.get_ylim()[0]), 1.02))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(layers) == 1:
        ax.set_xticks(layers)
    ax.legend(frameon=False, fontsize="small", loc="lower right")
    return _tidy(ax)


def plot_heatmap(
    result: Float[np.ndarray, "row column"],
    *,
    rows: Sequence[object],
    columns: Sequence[object],
    beaten: Bool[np.ndarray, "row column"] | None = None,
    label: str = "AUROC, held out",
    ax: Axes | None = None,
) -> Axes:
    """Draw AUROCs as coloured cells, layer by position for instance; the best is framed.

    Args:
        result: AUROCs; NaN where nothing was measured, drawn as an empty cell.
        rows: Their names, from the top.
        columns: Their names.
        beaten: True where a null or a baseline does as well; such cells are struck through.
        label: Of the colour bar.
        ax: Where to draw; a new figure of fitting height by default.

    Raises:
        OptionError: Names, marks and cells differ in number, or nothing was measured.
    """
    values = np.asarray(result, dtype=np.float64)
    shape = len(rows), len(columns)
    if values.shape != shape or 0 in shape or (beaten is not None and np.shape(beaten) != shape):
        raise OptionError(f"cells of shape {values.shape} for {shape[0]} rows and {shape[1]} columns: expected {shape}")
    if np.isnan(values).all():
        raise OptionError("no cell holds a number: nothing to draw")
    ax = _axes(ax, height=1.2 + 0.24 * len(rows))
    image = ax.imshow(values, cmap="cividis", vmin=_AUROC_RANGE[0], vmax=_AUROC_RANGE[1], aspect="auto")
    ax.figure.colorbar(image, ax=ax, label=label)
    best = np.unravel_index(np.nanargmax(values), shape)
    frame = (best[1] - 0.5, best[0] - 0.5)
    ax.add_patch(Rectangle(frame, 1, 1, fill=False, edgecolor=PALETTE["orange"], linewidth=2, clip_on=False))
    if beaten is not None:
        for row, column in np.argwhere(beaten):
            ends = [column - 0.5, column + 0.5], [row + 0.5, row - 0.5]
            ax.plot(*ends, color=PALETTE["line"], linewidth=0.8)
    if shape[0] <= _MOST_NUMBERS[0] and shape[1] <= _MOST_NUMBERS[1]:
        _write_cells(ax, [[f"{value:.2f}" for value in line] for line in values], values)
    _name_cells(ax, rows, columns)
    return _tidy(ax)


def plot_transfer(result: Transfer, *, layer: int = -1, ax: Axes | None = None) -> Axes:
    """Draw how well probes of each prompt set read each other, with intervals; the diagonal is cross-validated.

    Args:
        result: From `transfer_matrix`.
        layer: Which row of its layers; the last by default.
        ax: Where to draw; a new figure by default.

    Raises:
        OptionError: There is no such layer.
    """
    if not -len(result.auroc) <= layer < len(result.auroc):
        raise OptionError(f"layer {layer} does not exist: the matrix has layers 0-{len(result.auroc) - 1}")
    values, low, high = result.auroc[layer], result.low[layer], result.high[layer]
    ax = _axes(ax, height=1.4 + 0.5 * len(result.names))
    image = ax.imshow(values, cmap="cividis", vmin=_AUROC_RANGE[0], vmax=_AUROC_RANGE[1], aspect="auto")
    ax.figure.colorbar(image, ax=ax, label="AUROC")
    ax.set_title(printable(result.hook_points[layer]), fontsize="small", color=PALETTE["ink"], parse_math=False)
    texts = [
        [f"{value:.2f}\n{bottom:.2f}-{top:.2f}" for value, bottom, top in zip(*line, strict=True)]
        for line in zip(values, low, high, strict=True)
    ]
    _write_cells(ax, texts, values)
    _name_cells(ax, result.names, result.names)
    ax.set(xlabel="tested on", ylabel="trained on")
    return _tidy(ax)


def plot_calibration(result: Reliability, *, ax: Axes | None = None) -> Axes:
    """Draw a reliability diagram: observed share over stated probability, with bounds at 95 % and the ideal diagonal.

    Args:
        result: From `probes.calibration.reliability`.
        ax: Where to draw; a new figure by default.
    """
    ax = _axes(ax, height=3.4)
    ax.plot([0, 1], [0, 1], color=PALETTE["line"], linewidth=1, label="perfectly calibrated")
    ax.vlines(result.stated, result.low, result.high, color=PALETTE["dots"], linewidth=1)
    # The area of a mark says how many prompts stand behind it.
    sizes = 12 + 60 * result.counts / result.counts.max()
    ax.scatter(result.stated, result.observed, s=sizes, color=PALETTE["blue"], label="prompts", zorder=3)
    ax.set(xlabel="stated probability", ylabel="observed share", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    ax.legend(frameon=False, fontsize="small", loc="upper left")
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


def _layers(hook_points: Sequence[str]) -> tuple[np.ndarray, str]:
    """The block that each hook point names and what to call that; places in a row where two name the same."""
    blocks = [int(found[1]) for name in hook_points if (found := _BLOCK.match(name))]
    if len(set(blocks)) == len(hook_points):
        return np.array(blocks), "layer"
    return np.arange(len(hook_points)), "hook point, in order"


def _wide(layers: np.ndarray) -> np.ndarray:
    """Where a line or a band is drawn; that of a single layer is given a width, or it would not be seen."""
    return layers if len(layers) > 1 else layers + np.array([-0.4, 0.4])


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
        label = "activations, by chance (95 %)"
        ax.fill_between(_wide(layers), 0, by_chance, color=PALETTE["band"], linewidth=0, label=label)
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


def _write_cells(ax: Axes, texts: Sequence[Sequence[str]], values: np.ndarray) -> None:
    """Numbers in cells, in whichever ink can be read on the cell's colour; none where nothing was measured."""
    middle = sum(_AUROC_RANGE) / 2
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            ink = PALETTE["ink"] if value > middle else "white"
            ax.text(column, row, texts[row][column], ha="center", va="center", fontsize="x-small", color=ink)


def _name_cells(ax: Axes, rows: Sequence[object], columns: Sequence[object]) -> None:
    """Names along both sides; every n-th where there are too many to read."""
    for axis, names, most in ((ax.yaxis, rows, 32), (ax.xaxis, columns, 12)):
        shown = range(0, len(names), 1 + (len(names) - 1) // most)
        labels = [printable(str(names[place]), limit=24) for place in shown]
        axis.set_ticks(list(shown), labels)
        for label in axis.get_ticklabels():
            label.set_parse_math(False)
    if max(len(printable(str(name), limit=24)) for name in columns) * len(columns) > 40:
        ax.tick_params(axis="x", rotation=30)


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

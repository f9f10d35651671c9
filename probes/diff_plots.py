"""Pictures of a diff: which component of which layer moved, and which layers stand above what chance makes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from activations.errors import OptionError, printable
from probes.plots import PALETTE, plot_layer_shift

if TYPE_CHECKING:
    from probes.bands import Band
    from probes.diff import Diff
    from probes.weight_diff import WeightDiff

__all__ = ["plot_band", "plot_components", "save_diff_plot"]

# Component names beyond these are told apart by their place alone.
_MOST_NAMES = 16
_MOST_DRAWN = 12


def plot_components(weights: WeightDiff, *, ax: Axes | None = None) -> Axes:
    """Draw how far each component of each layer moved, relative to the base's: layers down, components across.

    Cells without a tensor are empty. What did not move at all has the darkest colour.

    Args:
        weights: From `diff_weights`.
        ax: Where to draw; a new figure by default.

    Raises:
        OptionError: No compared tensor lies in a layer.
    """
    names, profile = weights.component_profile()
    if not names:
        raise OptionError("no compared tensor lies in a layer: nothing to draw")
    ax = _axes(ax, height=1.6 + 0.16 * weights.n_layers)
    finite = np.where(np.isfinite(profile), profile, np.nan)
    image = ax.imshow(finite, cmap="cividis", vmin=0, aspect="auto")
    ax.figure.colorbar(image, ax=ax, label="relative change")
    if len(names) <= _MOST_NAMES:
        labels = [printable(name.removesuffix(".weight"), limit=24) for name in names]
        ax.set_xticks(range(len(names)), labels, rotation=45, ha="right", fontsize="x-small")
        for label in ax.get_xticklabels():
            label.set_parse_math(False)
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylabel("layer")
    return ax


def plot_band(band: Band, *, label: str = "effect", ax: Axes | None = None) -> Axes:
    """Draw each layer's value over what the null reaches at most, all layers judged together; exceeding layers marked.

    Args:
        band: From `layer_band`, `profile_band` or a `Localisation`.
        label: Of the values.
        ax: Where to draw; a new figure by default.
    """
    ax = _axes(ax)
    layers = np.arange(len(band.values))
    wide = layers if len(layers) > 1 else layers + np.array([-0.4, 0.4])
    low = np.minimum(0, band.values.min())
    name = f"by chance ({1 - band.alpha:.0%} over all layers)"
    ax.fill_between(wide, low, np.broadcast_to(band.high, wide.shape), color=PALETTE["band"], linewidth=0, label=name)
    ax.plot(layers, band.values, color=PALETTE["blue"], marker="o", markersize=4, label=label)
    above = list(band.exceeding)
    ax.plot(above, band.values[above], "D", color=PALETTE["orange"], markersize=7, label="above the band")
    ax.set(xlabel="layer", ylabel=label)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(frameon=False, fontsize="small")
    return ax


def save_diff_plot(found: Sequence[Diff], path: Path) -> Path:
    """Write a picture of some diffs, a row each: components, layers, and the band where there is one.

    Args:
        found: At most 12 are drawn.
        path: Its ending decides the format (.png, .svg, .pdf).

    Raises:
        OptionError: The ending names no format, or there is nothing to draw.
    """
    drawn = list(found)[:_MOST_DRAWN]
    if path.suffix.lower() not in (".png", ".svg", ".pdf") or not drawn:
        raise OptionError(f"cannot draw {len(drawn)} diffs to {path.name!r}: expected a .png, .svg or .pdf")
    figure, rows = plt.subplots(len(drawn), 3, figsize=(13, 3.2 * len(drawn)), layout="constrained", squeeze=False)
    try:
        for result, (components, layers, band) in zip(drawn, rows, strict=True):
            components.set_title(printable(result.tuned, limit=40), fontsize="small", parse_math=False)
            plot_components(result.weights, ax=components)
            plot_layer_shift(result, ax=layers)
            if result.localisation is not None:
                plot_band(result.localisation.band, label="refusal lost, nats", ax=band)
            elif result.band is not None:
                plot_band(result.band, label="weights, relative to the mean layer", ax=band)
            else:
                band.set_axis_off()
        figure.savefig(path)
    finally:
        plt.close(figure)
    return path


def _axes(ax: Axes | None, *, height: float = 2.4) -> Axes:
    return ax if ax is not None else plt.subplots(figsize=(4.4, height), layout="constrained")[1]

"""What chance makes of each layer, all layers judged together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from activations.errors import OptionError

__all__ = ["Band", "layer_band", "profile_band"]

# A deviation below this share of the usual one is rounding.
_CONSTANT = 1e-9


@dataclass(frozen=True, eq=False)
class Band:
    """Values of each layer beside what chance makes of them, all layers judged together.

    Attributes:
        values: One a layer.
        high: What a layer must exceed: the `1 - alpha` quantile of the largest standardised value of the draws, in this
            layer's units.
        p_values: Corrected for the number of layers (single-step maxT, Westfall and Young 1993).
        effect_sizes: (value - null mean) / null standard deviation.
        alpha: The share of wholly innocent fine-tunes in which some layer may be named.
    """

    values: Float[np.ndarray, " layer"]
    high: Float[np.ndarray, " layer"]
    p_values: Float[np.ndarray, " layer"]
    effect_sizes: Float[np.ndarray, " layer"]
    alpha: float

    @property
    def exceeding(self) -> tuple[int, ...]:
        """Layers above the band."""
        return tuple(np.flatnonzero(self.p_values <= self.alpha).tolist())

    def to_dict(self) -> dict[str, object]:
        """Everything as JSON values."""
        arrays = {name: getattr(self, name).tolist() for name in ("values", "high", "p_values", "effect_sizes")}
        return arrays | {"alpha": self.alpha, "exceeding": list(self.exceeding)}


def layer_band(
    values: Float[np.ndarray, " layer"], null: Float[np.ndarray, "draw layer"], *, alpha: float = 0.05
) -> Band:
    """Judge all layers at once: each against the largest layer of every draw, in standard deviations.

    Mean and deviation of a layer are those of the draws and the fine-tune together. Draws alone would be nearer to
    their own mean than a further innocent fine-tune is, and more than `alpha` of those would be named. Layers that
    never vary are given the typical deviation of the others.
    """
    rows = np.concatenate([values[None], null])
    mean, spread = rows.mean(axis=0), rows.std(axis=0)
    usual = float(np.median(spread[spread > 0])) if (spread > 0).any() else 1.0
    spread = np.where(spread > _CONSTANT * usual, spread, usual)
    largest = ((null - mean) / spread).max(axis=1)
    sizes = (values - mean) / spread
    p_values = (1 + (largest[:, None] >= sizes).sum(axis=0)) / (1 + len(null))
    # So many of the draws may be as large where p is alpha.
    allowed = int(np.floor(alpha * (1 + len(null)) + 1e-9)) - 1
    edge = np.sort(largest)[::-1][min(max(allowed, 0), len(largest) - 1)]
    own = null.std(axis=0, ddof=1) if len(null) > 1 else np.zeros(len(values))
    effects = (values - null.mean(axis=0)) / np.where(own > _CONSTANT * usual, own, usual)
    return Band(values, mean + edge * spread, p_values, effects, alpha)


def profile_band(
    profile: Float[np.ndarray, " layer"], benign: Float[np.ndarray, "member layer"], *, alpha: float = 0.05
) -> Band:
    """Judge a profile over layers against those of benign fine-tunes, by its shape.

    Profiles are divided by their mean over layers: how far a fine-tune moved follows its steps and rate, and where it
    moved does not.

    Args:
        profile: `WeightDiff.layer_profile()`, for instance.
        benign: The same of benign fine-tunes, as a bank keeps it ("weight-spectrum").
        alpha: As in `Band`.

    Raises:
        OptionError: Other numbers of layers, or fewer members than `alpha` can resolve.
    """
    least = int(np.ceil(1 / alpha)) - 1
    if benign.ndim != 2 or benign.shape[1] != len(profile) or len(benign) < least:
        raise OptionError(
            f"benign profiles have shape {benign.shape}: expected {least} or more of {len(profile)} layers"
        )
    scaled = [row / (row.mean() or 1.0) for row in np.concatenate([profile[None], benign])]
    return layer_band(scaled[0], np.stack(scaled[1:]), alpha=alpha)

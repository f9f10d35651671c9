"""One layer's rows as every linear probe sees them: standardised once, decomposed once, multiplied by many columns.

What a fit costs is decided by its preconditioner, which knows how the rows vary. Where the smaller side is short, an
eigendecomposition of its Gram matrix knows it exactly, and wide rows shrink to their coordinates in it. Where both
sides are long, that would cost more than all fits together (4000 x 4000: 20 s), and a random sketch of the leading axes
takes its place (Frangella, Tropp, Udell 2023, "Randomized Nystroem preconditioning"); rows stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from activations.errors import OptionError

__all__ = ["Precision", "Rows", "check_device", "check_precision", "prepare", "standardised", "undecomposed"]

Precision = Literal["final", "screening"]
"""How exact a fit is: see `fit_probes`."""

# float64 up to here, float32 beyond: it reaches 1e-3 everywhere with room to spare, in half the memory and time.
_SMALL = 2**20

# Axes of a sketch. More of them cost more than the steps that they save: 64, 128, 256 measured at 4000 x 4096.
_SKETCH = 128

# Rows or columns that are copied or converted at a time: small beside a layer, large enough for fast products.
_BLOCK = 128


@dataclass(frozen=True, eq=False)
class Rows:
    """Centred rows, products with them, and an approximation of their covariance.

    Attributes:
        values: What is multiplied: the standardised rows, or their coordinates along principal axes.
        low: The same in bfloat16 where products may be rough and the processor multiplies it fast; else None.
        axes: Orthonormal leading axes; None where the coordinates themselves are principal.
        moments: Sum of squares of the rows along each axis (or coordinate).
        tail: About the sum of squares along each direction that the axes leave out; None where they leave out nothing.
        basis: Matrices whose product turns coordinates into features; none where `values` are features.
        tolerance: Relative error of the decision values at which a fit on these rows is done.
    """

    values: Float[Tensor, "prompt k"]
    low: Float[Tensor, "prompt k"] | None
    axes: Float[Tensor, "axis k"] | None
    moments: Float[Tensor, " axis"]
    tail: float | None
    basis: tuple[Tensor, ...]
    tolerance: float

    def forward(self, vectors: Float[Tensor, "column k"], *, rough: bool = False) -> Float[Tensor, "column prompt"]:
        """Rows times vectors; columns lie in rows, because this layout multiplies fastest."""
        if rough and self.low is not None:
            return (vectors.to(self.low.dtype) @ self.low.T).to(vectors.dtype)
        return vectors @ self.values.T

    def backward(self, weights: Float[Tensor, "column prompt"], *, rough: bool = False) -> Float[Tensor, "column k"]:
        """Sums of rows, weighted."""
        if rough and self.low is not None:
            return (weights.to(self.low.dtype) @ self.low).to(weights.dtype)
        return weights @ self.values

    def solve(
        self,
        vectors: Float[Tensor, "column k"],
        curvature: Float[Tensor, "column 1"],
        penalty: Float[Tensor, "column 1"],
    ) -> Float[Tensor, "column k"]:
        """About (curvature * rows^T rows + penalty)^-1 vectors: exact in all axes known, one guess in the others."""
        known = curvature * self.moments + penalty
        if self.axes is None:
            return vectors / known
        along = vectors @ self.axes.T
        if self.tail is None:
            return (along / known) @ self.axes
        rest = curvature * self.tail + penalty
        known = torch.maximum(known, rest)
        return (along * (1 / known - 1 / rest)) @ self.axes + vectors / rest

    def features(self, vectors: Float[Tensor, "column k"]) -> Float[Tensor, "column d_model"]:
        """From coordinates to standardised features."""
        for factor in self.basis:
            vectors = vectors.to(factor.dtype) @ factor
        return vectors

    @property
    def d_model(self) -> int:
        """How many features there are."""
        return (self.basis[-1] if self.basis else self.values).shape[1]

    def squared_moments(self) -> float:
        """Sum of the squared entries of the Gram matrix; of what a sketch leaves out an estimate (Hutch++)."""
        if self.axes is None or self.tail is None:
            return float(self.moments.double().square().sum())
        probes = _gaussian(64, self.values)
        probes -= (probes @ self.axes.T) @ self.axes
        known, rest = (self.backward(self.forward(one)).double().square().sum() for one in (self.axes, probes))
        return float(known + rest / len(probes))


def standardised(
    values: Float[np.ndarray, "prompt d_model"], device: str = "cpu"
) -> tuple[Float[Tensor, "prompt d_model"], Float[np.ndarray, " d_model"], Float[np.ndarray, " d_model"]]:
    """Rows of zero mean and unit variance in float32, with the mean and scale that made them.

    A spread below float32's rounding of the mean is noise: such a feature is constant, and must not be blown up.
    """
    rows = torch.empty(values.shape, dtype=torch.float32, device=device)
    blocks, width = _blocks(rows), rows.shape[1]
    total, spread = torch.zeros(2, width, dtype=torch.float64, device=device)
    # Differences from one row keep their digits where a mean is massive. Block by block, what is summed stays in cache.
    first = torch.tensor(values[0]).to(rows)
    for start, block in zip(range(0, len(rows), _BLOCK), blocks, strict=True):
        block.copy_(torch.tensor(values[start : start + _BLOCK]))
        total += (block - first).sum(0)
    mean = first + total / len(rows)
    for block in blocks:
        spread += block.sub_(mean.float()).square().sum(0)
    scale = (spread / len(rows)).sqrt()
    constant = scale <= 4 * torch.finfo(torch.float32).eps * mean.abs()
    mean, scale = mean.float(), scale.masked_fill(constant, 1.0).float()
    rows.div_(scale)
    return rows, mean.cpu().numpy(), scale.cpu().numpy()


def undecomposed(rows: Float[Tensor, "prompt d_model"], precision: Precision = "final") -> Rows:
    """Rows for methods that only multiply and solve nothing."""
    rows = rows.to(_dtype(rows, precision))
    return Rows(rows, _rough(rows, precision), None, rows.new_ones(1), None, (), _tolerance(rows, precision))


def prepare(rows: Float[Tensor, "prompt d_model"], columns: int, precision: Precision = "final") -> Rows:
    """Choose by shape how the rows are decomposed, and do it.

    Args:
        rows: Centred, float32 or float64.
        columns: How many fits will share the work; the more, the larger an eigendecomposition pays (measured).
        precision: "screening" may multiply in bfloat16.
    """
    side, wide = min(rows.shape), rows.shape[1] > rows.shape[0]
    # Wide rows shrink with it and are solved in float64: fitted so closely, they need that under weak penalties.
    fewest = 512 if wide and rows.numel() > _SMALL else 256
    if side > max(fewest, min(1024, 16 * columns)):
        return _sketched(rows, precision)
    return _wide(rows, precision) if wide else _tall(rows, precision)


def check_precision(precision: str) -> None:
    """Refuse what is neither "final" nor "screening"."""
    if precision not in ("final", "screening"):
        raise OptionError(f"precision is {precision!r}: expected 'final' or 'screening'")


def check_device(device: str) -> None:
    """Refuse a device that torch does not have here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as fault:
        raise OptionError(f"device is {device!r}, which is not there: {str(fault).splitlines()[0]}") from fault


def _wide(rows: Tensor, precision: Precision) -> Rows:
    """Coordinates of the rows along their principal axes: the optimum lies in their span, so nothing is lost.

    Axes with less than 1e-10 of the greatest variance are rounding of the Gram matrix, and are left out.
    """
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for block in _blocks(rows.T):
        block = block.double() if precision == "final" else block
        gram += block.T @ block
    moments, axes = torch.linalg.eigh(gram)
    floor = 1e-10 if precision == "final" else 1e-6
    real = moments > floor * moments[-1].clamp(min=torch.finfo(torch.float64).tiny)
    moments, axes = moments[real], axes[:, real]
    spread = moments.sqrt()
    # The coordinates are as small as the Gram matrix, so float64 costs little there. Orthonormal axes in features would
    # be as large as the rows; few vectors ever become features, so they go there by way of the rows.
    dtype, basis = _dtype(gram, precision), ((axes / spread).T, rows.to(_dtype(rows, precision)))
    moments, tolerance = moments.to(dtype), _tolerance(gram, precision)
    return Rows((axes * spread).to(dtype), None, None, moments, None, basis, tolerance)


def _tall(rows: Tensor, precision: Precision) -> Rows:
    """All principal axes; small rows are turned into them, which saves turning every step."""
    gram = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
    for block in _blocks(rows):
        block = block.double() if rows.numel() <= _SMALL else block
        gram += block.T @ block
    moments, axes = torch.linalg.eigh(gram)
    dtype, tolerance = _dtype(rows, precision), _tolerance(rows, precision)
    moments = moments.clamp(min=0).to(dtype)
    if rows.numel() <= _SMALL:
        return Rows(rows.to(dtype) @ axes.to(dtype), None, None, moments, None, (axes.T.to(dtype),), tolerance)
    full = axes.T.to(dtype).contiguous()
    return Rows(rows.to(dtype), _rough(rows, precision), full, moments, None, (), tolerance)


def _sketched(rows: Tensor, precision: Precision) -> Rows:
    """Leading axes by the Nystroem approximation of the Gram matrix: one product there and back with random directions.

    Algorithm 2.1 of Frangella, Tropp, Udell (2023), with a cut where they shift: what is below 1e-4 of the greatest may
    be rounding of bfloat16. Beyond the axes, as there, the variance is taken for that of the last of them.
    """
    rows = rows.to(_dtype(rows, precision))
    # For the axes, rough products do at every precision; in blocks they need no second copy of the layer.
    rough = torch.bfloat16 if _fast_bfloat16(rows.device) else rows.dtype
    draws = _gaussian(_SKETCH, rows).to(rough)
    images = torch.zeros(_SKETCH, rows.shape[1], dtype=rows.dtype, device=rows.device)
    for block in _blocks(rows, 4 * _BLOCK):
        block = block.to(rough)
        images += (draws @ block.T) @ block
    core, turn = torch.linalg.eigh((draws.to(rows.dtype) @ images.T).double())
    real = core > 1e-4 * core[-1].clamp(min=torch.finfo(torch.float32).tiny)
    # The Gram matrix of these few is the approximation's, on its other side.
    root = (turn[:, real] / core[real].sqrt()).T.to(rows.dtype) @ images
    moments, turn = torch.linalg.eigh((root @ root.T).double())
    axes = (turn / moments.sqrt()).T.to(rows.dtype) @ root
    moments, tail = moments.to(rows.dtype), float(moments[:1].sum())
    return Rows(rows, _rough(rows, precision), axes.contiguous(), moments, tail, (), _tolerance(rows, precision))


def _blocks(rows: Tensor, size: int = _BLOCK) -> list[Tensor]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _tolerance(rows: Tensor, precision: Precision) -> float:
    """What each precision asks for: of the final ones 1e-3 at any prompt, of screening ranks that hold.

    At single prompts errors came to twice this at most, down to penalties of 1e-4 (below, float32 itself ends sooner).
    """
    small = rows.numel() <= _SMALL
    if precision == "final":
        return 1e-6 if small else 4e-4
    return 0.01 if small else 0.04


def _dtype(rows: Tensor, precision: Precision) -> torch.dtype:
    return torch.float64 if precision == "final" and rows.numel() <= _SMALL else torch.float32


def _rough(rows: Tensor, precision: Precision) -> Tensor | None:
    """A copy in bfloat16 for screening, where that is faster than float32."""
    large = rows.numel() > _SMALL
    return rows.to(torch.bfloat16) if precision == "screening" and large and _fast_bfloat16(rows.device) else None


def _fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Processors without instructions for it emulate bfloat16, many times slower than float32.
    return device.type == "cpu" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and _has_bfloat16_dot()


def _has_bfloat16_dot() -> bool:
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(bool(found.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _gaussian(count: int, like: Tensor) -> Tensor:
    """Directions that are the same on every device."""
    draws = np.random.default_rng(0).standard_normal((count, like.shape[1]))
    return torch.from_numpy(draws).to(like)

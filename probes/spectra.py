"""Singular values of differences of weights: of a matrix, and of a low-rank product that is never multiplied out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = [
    "Spectrum",
    "dense_spectrum",
    "gram_singular_values",
    "low_rank_singular_values",
    "sketched_spectrum",
    "top_singular_values",
]

# Sketch columns beyond those asked for, and passes at most, for slowly falling spectra such as a full fine-tune's:
# Halko, Martinsson and Tropp (2011), section 10.3. With these a random matrix, the slowest of all, is within 2 %.
_OVERSAMPLING = 24
_PASSES = 7
# A pass that raises the largest values by less than this has found them; low-rank changes are found after two.
_CONVERGED = 1e-3
# Columns that no basis is made from, to estimate what lies outside of it.
_WITNESSES = 8
# Up to this size an exact decomposition costs less than the sketch.
_EXACT = 128
# Rows that are decomposed at a time.
_TALL = 8192

Product = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Given X [in, k], the products D X [out, k] and D^T D X [in, k] of a matrix D that need not be in memory whole."""


@dataclass(frozen=True)
class Spectrum:
    """The upper end of a matrix' singular values, and what all of them sum to.

    Attributes:
        values: The largest, falling, in float64.
        fourth_powers: Sum over all singular values of their fourth power; an unbiased estimate for large matrices.
    """

    values: Float[Tensor, " value"]
    fourth_powers: float


def top_singular_values(matrix: Float[Tensor, "out in"], *, count: int = 8, seed: int = 0) -> Float[Tensor, " value"]:
    """The largest singular values, by randomised subspace iteration in float32 (exact for small matrices).

    Cost: up to 14 products of the matrix with 40 columns at `count` 8.

    Returns:
        `count` values in float64, falling; fewer where the matrix has fewer.
    """
    matrix = matrix.to(torch.float32)
    # Weights may be as large as float32 allows, and their products with the sketch larger.
    peak = float(matrix.abs().max()) or 1.0
    return dense_spectrum(matrix / peak, count=count, seed=seed).values[:count] * peak


def dense_spectrum(matrix: Float[Tensor, "out in"], *, count: int = 8, seed: int = 0) -> Spectrum:
    """The spectrum of a matrix in memory whose entries are far from float32's ends."""
    if min(matrix.shape) <= _EXACT:
        values = _singular_values(matrix).to(torch.float64)
        return Spectrum(values, float(values.pow(4).sum()))

    def product(x: Tensor) -> tuple[Tensor, Tensor]:
        y = matrix @ x
        return y, matrix.T @ y

    return sketched_spectrum(product, matrix.shape[1], count=count, device=matrix.device, seed=seed)


def sketched_spectrum(
    product: Product, columns: int, *, count: int = 8, device: torch.device | None = None, seed: int = 0
) -> Spectrum:
    """The largest singular values of a matrix that is only ever multiplied: randomised subspace iteration.

    The sum of fourth powers is exact on the basis found and estimated beside it with probes that had no part in it
    (Hutch++, Meyer et al. 2021, arXiv:2010.09649).

    Cost: two to `_PASSES` calls of `product`, each on `count` + 32 columns.

    Args:
        product: Gives D X and D^T D X.
        columns: Of D; its values must be far from float32's ends.
        count: How many values are wanted; those returned beyond them are less precise.
        device: Of the products.
        seed: Of the sketch.
    """
    generator = torch.Generator().manual_seed(seed)
    width = count + _OVERSAMPLING
    start = torch.randn(columns, width + _WITNESSES, generator=generator).to(device or "cpu")
    witnesses = start[:, width:]
    _, image = product(start)
    basis, seen = torch.linalg.qr(image[:, :width]).Q, image[:, width:]
    found, before, last = torch.zeros(0), 0.0, basis
    for _ in range(_PASSES - 1):
        along, image = product(basis)
        found = _singular_values(along)
        total = float(found[:count].sum())
        if total - before <= _CONVERGED * total:
            break
        before, last = total, basis
        basis = torch.linalg.qr(image).Q
    else:
        basis = last
    inside = basis.T @ image
    outside = seen - image @ (basis.T @ witnesses)
    outside = outside - basis @ (basis.T @ outside)
    squares = [float(part.double().square().sum()) for part in (inside, image, outside)]
    fourth = 2 * squares[1] - squares[0] + squares[2] / _WITNESSES
    return Spectrum(found.to(torch.float64).cpu(), fourth)


def low_rank_singular_values(
    up: Float[Tensor, "out rank"], down: Float[Tensor, "rank in"], *, scale: float = 1.0
) -> Float[Tensor, " rank"]:
    """All singular values of `scale * up @ down`, exact in float64, from matrices no larger than [rank, rank].

    With up = Q R and down^T = P S the product is Q (R S^T) P^T, and orthonormal Q, P change no singular value.
    """
    left = torch.linalg.qr(up.to(torch.float64), mode="r").R
    right = torch.linalg.qr(down.to(torch.float64).T, mode="r").R
    return abs(scale) * _singular_values(left @ right.T)


def gram_singular_values(
    up: Float[Tensor, "pair rank rank"], down: Float[Tensor, "pair rank rank"]
) -> Float[Tensor, "pair rank"]:
    """The same of many products at once from Gram matrices, which cost a fifth of the decompositions.

    The squared singular values of B A are the eigenvalues of (B^T B)(A A^T), here of the symmetric matrix
    L^T (A A^T) L with L L^T = B^T B. Squaring leaves what is above 1e-8 of the largest value exact.

    Args:
        up: B^T B of each pair, in float64.
        down: A A^T of each pair, in float64.

    Returns:
        Values in float64, falling.
    """
    energies, vectors = torch.linalg.eigh(up)
    root = vectors * energies.clamp(min=0).sqrt()[:, None, :]
    squares = torch.linalg.eigvalsh(root.mT @ down @ root)
    values: Tensor = squares.clamp(min=0).sqrt().flip(-1)
    return values


def _singular_values(matrix: Tensor) -> Tensor:
    if len(matrix) > _TALL and matrix.shape[1] < _TALL:
        # The triangles of its parts have the same singular values, and decomposing those copies no large matrix.
        matrix = torch.cat([torch.linalg.qr(part, mode="r").R for part in torch.split(matrix, _TALL)])
    values: Tensor = torch.linalg.svdvals(matrix)
    return values

"""Directions that need no iteration to an optimum of the log loss: difference of means, and LDA with shrinkage.

LDA is the mass-mean probe of Marks and Tegmark (2023): the difference of means, turned by the inverse covariance within
the classes. Its covariance is shrunk towards a multiple of the identity by the share that Ledoit and Wolf (2004) find
for the rows as a whole. That uses no label, so one share serves every fold and every shuffled labelling.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from probes.rows import Rows

__all__ = ["fit_lda", "fit_mean_difference", "ledoit_wolf"]

# Far below what moves an AUROC; reached in some ten steps, because the rows bring a preconditioner.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def fit_mean_difference(
    rows: Rows, targets: Float[Tensor, "column prompt"], weights: Float[Tensor, "column prompt"]
) -> tuple[Float[Tensor, "column k"], Float[Tensor, " column"]]:
    """Unit vectors from the benign mean to the harmful one, zero half-way between.

    Where the two means are equal the vector is zero.
    """
    upper, lower, _ = _class_means(rows, targets, weights)
    difference = upper - lower
    length = difference.norm(dim=1, keepdim=True)
    coefficients = difference / torch.where(length > 0, length, 1)
    return coefficients, -((upper + lower) / 2 * coefficients).sum(1)


def fit_lda(
    rows: Rows, targets: Float[Tensor, "column prompt"], weights: Float[Tensor, "column prompt"], shrinkage: float
) -> tuple[Float[Tensor, "column k"], Float[Tensor, " column"]]:
    """Fisher's discriminant with a shrunk covariance, as log odds under the classes' shares of the weights.

    The optimum of scikit-learn's `LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage)`, by conjugate
    gradients: no covariance is ever formed.

    Args:
        rows: See `prepare`.
        targets: 1 or 0.
        weights: Of each row in each column; each column's sum to 1.
        shrinkage: Share of the identity in the covariance, in (0, 1]; see `ledoit_wolf`.
    """
    targets, weights = targets.to(rows.values), weights.to(rows.values)
    upper, lower, share = _class_means(rows, targets, weights)
    # Features that the coordinates of wide rows leave out have no variance, but count in its mean.
    squares = rows.values.square().sum(1)
    spread = weights @ squares - share * upper.square().sum(1) - (1 - share) * lower.square().sum(1)
    ridge = (shrinkage * spread.clamp(min=0) / rows.d_model)[:, None]
    keep, share = 1 - shrinkage, share[:, None]

    def covariance(vectors: Tensor) -> Tensor:
        image = rows.backward(weights * rows.forward(vectors))
        image -= share * (vectors * upper).sum(1, keepdim=True) * upper
        image -= (1 - share) * (vectors * lower).sum(1, keepdim=True) * lower
        return keep * image + ridge * vectors

    def about_inverse(vectors: Tensor) -> Tensor:
        return rows.solve(vectors, torch.full_like(ridge, keep / len(rows.values)), ridge.clamp(min=1e-12))

    coefficients = _conjugate_gradients(covariance, about_inverse, upper - lower)
    middle = (coefficients * (upper + lower)).sum(1) / 2
    return coefficients, (share / (1 - share)).log()[:, 0] - middle


def ledoit_wolf(rows: Rows) -> float:
    """The share of shrinkage towards the mean variance that Ledoit and Wolf (2004) find for centred rows.

    Of long rows and many, the Gram matrix is estimated from a sketch; the share is then good to some per cent of
    itself.
    """
    count, width = len(rows.values), rows.d_model
    squares = rows.values.square().sum(1, dtype=torch.float64)
    trace, square = float(squares.sum()) / count, rows.squared_moments() / count**2
    distance = square - trace**2 / width
    error = (float(squares.square().sum()) / count - square) / count
    # Rows without any variance have nothing to shrink; rows of one spread in all directions shrink fully.
    return 1.0 if distance <= 0 else min(1.0, max(error / distance, 1e-6))


def _class_means(rows: Rows, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    targets, weights = targets.to(rows.values), weights.to(rows.values)
    harmful, benign = weights * targets, weights * (1 - targets)
    share = harmful.sum(1)
    upper = rows.backward(harmful / share[:, None])
    return upper, rows.backward(benign / benign.sum(1, keepdim=True)), share


def _conjugate_gradients(
    matrix: Callable[[Tensor], Tensor], about_inverse: Callable[[Tensor], Tensor], target: Tensor
) -> Tensor:
    """Solve matrix(x) = target for every column, down to a relative error in the norm of the matrix."""
    tolerance = _TOLERANCE[target.dtype] ** 2
    solution, residual = torch.zeros_like(target), target.clone()
    scaled = about_inverse(residual)
    direction, energy = scaled, (residual * scaled).sum(1, keepdim=True)
    goal = tolerance * energy
    for _ in range(1000):
        going = energy > goal
        if not going.any():
            break
        image = matrix(direction)
        length = torch.where(going, energy / (direction * image).sum(1, keepdim=True), 0)
        solution = solution + length * direction
        residual = residual - length * image
        scaled = about_inverse(residual)
        renewed = (residual * scaled).sum(1, keepdim=True)
        direction = scaled + torch.where(going, renewed / energy, 0) * direction
        energy = torch.where(going, renewed, energy)
    return solution

"""L2-regularised logistic regression of many targets on the same rows, to scikit-learn's optimum.

Newton's method, its linear systems solved by preconditioned conjugate gradients in the coordinates of the rows'
principal axes, where the Hessian is close to diagonal. Every product is one matrix product for all targets.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy.special import expit

__all__ = ["fit_logistic"]


def fit_logistic(
    rows: Float[np.ndarray, "prompt d_model"],
    targets: Float[np.ndarray, "prompt column"],
    weights: Float[np.ndarray, "prompt column"],
    l2: float,
) -> tuple[Float[np.ndarray, "d_model column"], Float[np.ndarray, " column"]]:
    """Minimise sum(weights * log loss) + l2 / 2 * |coefficients|^2 for every column, the bias unpenalised.

    Cost: one eigendecomposition of size min(prompt, d_model), then some hundred products of
    [prompt, min(prompt, d_model)] with [.., column].

    Args:
        rows: Centred features, float64.
        targets: 1 or 0 for each row and column.
        weights: Weight of each row in each column; columns sum to 1.
        l2: Penalty, positive; 1 / (C * n_prompts) in scikit-learn's terms.

    Returns:
        Coefficients and biases.
    """
    coordinates, basis = _principal(rows)
    design = np.concatenate([coordinates, np.ones((len(rows), 1))], axis=1)
    penalty = np.append(np.full(coordinates.shape[1], l2), 0.0)[:, None]
    solution = _newton(design, targets, weights, penalty)
    return basis @ solution[:-1], solution[-1]


def _principal(
    rows: Float[np.ndarray, "prompt d"],
) -> tuple[Float[np.ndarray, "prompt rank"], Float[np.ndarray, "d rank"]]:
    """Coordinates of the rows along their principal axes, from whichever Gram matrix is smaller.

    The optimum lies in the span of the rows, so nothing is lost; and here the Hessian is close to diagonal. Axes with
    less than 1e-10 of the greatest variance are float64 rounding of the Gram matrix, and are left out.
    """
    wide = rows.shape[1] > rows.shape[0]
    variances, axes = np.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
    real = variances > 1e-10 * max(variances[-1], np.finfo(np.float64).tiny)
    if not wide:
        return rows @ axes[:, real], axes[:, real]
    spread = np.sqrt(variances[real])
    return axes[:, real] * spread, rows.T @ (axes[:, real] / spread)


def _newton(design: np.ndarray, targets: np.ndarray, weights: np.ndarray, penalty: np.ndarray) -> np.ndarray:
    """Newton's method, all columns together; a column leaves when its decrement shows it at the optimum."""
    solution = np.zeros((design.shape[1], targets.shape[1]))
    margins = np.zeros_like(targets)
    active = np.arange(targets.shape[1])
    for _ in range(100):
        here, at, target, weight = solution[:, active], margins[:, active], targets[:, active], weights[:, active]
        chance = expit(at)
        slope = design.T @ (weight * (chance - target)) + penalty * here
        step = _conjugate_gradients(design, weight * chance * (1 - chance), penalty, -slope)
        decrement = -(slope * step).sum(axis=0)
        along = design @ step
        length = _step_lengths(at, along, target, weight, (here, step, penalty, decrement))
        solution[:, active] = here + length * step
        margins[:, active] = at + length * along
        # Half the decrement is the distance to the optimum in units of the log loss; steps converge quadratically here.
        active = active[decrement > 1e-12]
        if not active.size:
            break
    return solution


def _conjugate_gradients(
    design: np.ndarray, curvature: np.ndarray, penalty: np.ndarray, target: np.ndarray
) -> np.ndarray:
    """Solve (design^T diag(curvature) design + penalty) x = target for each column, preconditioned by the diagonal."""
    diagonal = (design**2).T @ curvature + penalty + np.finfo(np.float64).tiny
    solution, residual = np.zeros_like(target), target.copy()
    direction = residual / diagonal
    energy = (residual * direction).sum(axis=0)
    goal = 1e-6 * energy  # each Newton step then gains three digits at least
    for _ in range(10 * len(target)):
        if (energy <= goal).all():
            break
        image = design.T @ (curvature * (design @ direction)) + penalty * direction
        length = np.divide(energy, (direction * image).sum(axis=0), out=np.zeros_like(energy), where=energy > goal)
        solution += length * direction
        residual -= length * image
        scaled = residual / diagonal
        renewed = (residual * scaled).sum(axis=0)
        direction = scaled + np.divide(renewed, energy, out=np.zeros_like(energy), where=energy > goal) * direction
        energy = np.where(energy > goal, renewed, energy)
    return solution


def _step_lengths(
    margins: np.ndarray,
    along: np.ndarray,
    targets: np.ndarray,
    weights: np.ndarray,
    quadratic: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
) -> np.ndarray:
    """Halve each column's step until its objective falls as Armijo asks; margins are linear: no product needed."""
    here, step, penalty, decrement = quadratic

    def objective(length: np.ndarray) -> np.ndarray:
        at = margins + length * along
        loss = (weights * (np.logaddexp(0, at) - targets * at)).sum(axis=0)
        return np.asarray(loss + (penalty * (here + length * step) ** 2).sum(axis=0) / 2)

    length = np.ones(along.shape[1])
    start = objective(np.zeros_like(length))
    # Near the optimum the fall drowns in rounding, which must not stop a good step.
    rounding = 1e-14 * (1 + np.abs(start))
    for _ in range(40):
        short = objective(length) > start - 1e-4 * length * decrement + rounding
        if not short.any():
            break
        length[short] /= 2
    return length

"""L2-regularised logistic regression of many targets on the same rows, to scikit-learn's optimum.

L-BFGS (Nocedal 1980) for all columns at once, started in each step from the inverse of an approximate Hessian
(`Rows.solve`) and with a line search that costs no product, since margins are linear. Every product is one matrix
product for all columns that are still on their way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from probes.rows import Rows, prepare

__all__ = ["fit_columns", "fit_logistic"]

# Pairs of steps that L-BFGS remembers; 5 to 40 took as many steps: the preconditioner does the work.
_MEMORY = 6

# Columns at a time: matrix products gain nothing beyond.
_BATCH = 80

# What is not there by then never will be: rounding is in the way. 100 suffice in float32 for penalties of 1e-4.
_STEPS = {torch.float64: 2000, torch.float32: 300}


def fit_logistic(
    rows: Float[np.ndarray, "prompt d_model"],
    targets: Float[np.ndarray, "prompt column"],
    weights: Float[np.ndarray, "prompt column"],
    l2: float,
) -> tuple[Float[np.ndarray, "d_model column"], Float[np.ndarray, " column"]]:
    """Minimise sum(weights * log loss) + l2 / 2 * |coefficients|^2 for every column, the bias unpenalised.

    Args:
        rows: Centred features.
        targets: 1 or 0 for each row and column.
        weights: Weight of each row in each column; columns sum to 1.
        l2: Penalty, positive; 1 / (C * n_prompts) in scikit-learn's terms.

    Returns:
        Coefficients and biases.
    """
    prepared = prepare(torch.from_numpy(np.asarray(rows, dtype=np.float64)), targets.shape[1])
    truth, shares = (torch.from_numpy(np.ascontiguousarray(array.T)) for array in (targets, weights))
    solution, biases = fit_columns(prepared, truth, shares, [l2] * targets.shape[1])
    return prepared.features(solution).T.double().numpy(), biases.double().numpy()


def fit_columns(
    rows: Rows,
    targets: Float[Tensor, "column prompt"],
    weights: Float[Tensor, "column prompt"],
    l2: Sequence[float],
) -> tuple[Float[Tensor, "column k"], Float[Tensor, " column"]]:
    """As `fit_logistic`, each column with its own penalty, in the coordinates of `rows`.

    Cost: from 5 (strong penalties) to some hundred (weak ones) pairs of products [prompt, k] x [k, column].

    Args:
        rows: See `prepare`.
        targets: 1 or 0.
        weights: Of each row in each column; each column's sum to 1.
        l2: Penalty of each column, positive.

    Returns:
        Coefficients and biases, exact to the tolerance of the rows.
    """
    like = rows.values
    found = []
    batch = _batch(*like.shape)
    for start in range(0, len(targets), batch):
        some = slice(start, start + batch)
        penalties = torch.tensor(list(l2[some]), dtype=like.dtype, device=like.device)[:, None]
        found.append(_lbfgs(rows, (targets[some].to(like), weights[some].to(like), penalties)))
    solution = torch.cat(found)
    return solution[:, :-1], solution[:, -1]


def _batch(prompts: int, width: int) -> int:
    """Columns at a time. Each takes some twenty numbers a prompt; together they stay small beside the rows."""
    return min(_BATCH, max(1, 2**18 // prompts, width // 32))


@dataclass(eq=False)
class _Columns:
    """The columns that are still on their way; the last entry of each solution is its bias."""

    targets: Tensor
    weights: Tensor
    penalties: Tensor
    solution: Tensor
    margins: Tensor
    pairs: list[tuple[Tensor, Tensor, Tensor]]

    def keep(self, which: Tensor) -> None:
        for name in ("targets", "weights", "penalties", "solution", "margins"):
            setattr(self, name, getattr(self, name)[which])
        self.pairs = [(step[which], change[which], scale[which]) for step, change, scale in self.pairs]

    def remember(self, step: Tensor, change: Tensor) -> None:
        """How the slope changed with a step. Rounding can turn that negative; such a pair teaches nothing."""
        product = (step * change).sum(1, keepdim=True)
        self.pairs = [*self.pairs[1 - _MEMORY :], (step, change, torch.where(product > 0, 1 / product, 0))]

    def penalty(self, vectors: Tensor) -> Tensor:
        """The penalty's gradient: none on the bias."""
        scaled = self.penalties * vectors
        scaled[:, -1] = 0
        return scaled


def _lbfgs(rows: Rows, problem: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    targets, weights, penalties = problem
    start = targets.new_zeros(len(targets), rows.values.shape[1] + 1)
    here = _Columns(targets, weights, penalties, start, torch.zeros_like(targets), [])
    done, active = torch.zeros_like(start), torch.arange(len(targets), device=targets.device)
    length = start.new_ones(len(start), 1)
    slope: Tensor | None = None
    step: Tensor | None = None
    for _ in range(_STEPS[start.dtype]):
        chance = torch.sigmoid(here.margins)
        residual = here.weights * (chance - here.targets)
        before = slope
        slope = torch.cat([rows.backward(residual, rough=True), residual.sum(1, keepdim=True)], dim=1)
        slope += here.penalty(here.solution)
        if step is not None and before is not None:
            here.remember(step, slope - before)
        curvature = here.weights * chance * (1 - chance)
        direction = -_inverse_hessian(rows, here, slope, curvature.sum(1, keepdim=True))
        decrement = -(slope * direction).sum(1)
        along = rows.forward(direction[:, :-1], rough=True) + direction[:, -1:]
        length = _line_search(here, direction, along, decrement, length)
        step = length * direction
        here.margins = here.margins + length * along
        here.solution = here.solution + step
        going = _unfinished(here, curvature, length[:, 0] * decrement, length * along, rows.tolerance)
        if not going.all():
            done[active[~going]] = here.solution[~going]
            active = active[going]
            if not len(active):
                return done
            here.keep(going)
            slope, step, length = slope[going], step[going], length[going]
    done[active] = here.solution
    return done


def _unfinished(here: _Columns, curvature: Tensor, energy: Tensor, moved: Tensor, relative: float) -> Tensor:
    """Columns whose last step still moved the decision values, on the whole or at one prompt.

    The energy of the step, decrement times length, is its squared length in units of the log loss, and about that of
    the way still to go (whatever the preconditioner guessed wrong is in the length). There a decision value off by e
    costs curvature * e^2; prompts that are told with confidence have next to no curvature, so they are looked at
    themselves, and where most are told so (a curvature far below its greatest, 1/4), steps fall short by more.
    Values below 1e-5 are rounding: rows without any variance have no others. So are steps of 8 units in the last place:
    where next to no prompt has curvature, the energy in float32 may never fall below what is asked.
    """
    spread = (curvature * ((here.margins - here.solution[:, -1:]).square() + 1e-10)).sum(1)
    tolerance = relative * (4 * curvature.sum(1)).sqrt()
    furthest = here.margins.abs().amax(1) + 1e-5
    moved = moved.abs().amax(1) / furthest
    known = moved <= 8 * torch.finfo(moved.dtype).eps
    return ~known & ((energy > tolerance**2 * spread) | (moved > 3 * tolerance))


def _inverse_hessian(rows: Rows, here: _Columns, slope: Tensor, curvature: Tensor) -> Tensor:
    """The two loops of L-BFGS around an inverse that knows penalty, spectrum and mean curvature."""
    inverse, shares = slope.clone(), []
    for step, change, scale in reversed(here.pairs):
        shares.append(scale * (step * inverse).sum(1, keepdim=True))
        inverse -= shares[-1] * change
    prompts = here.targets.shape[1]
    bias = inverse[:, -1:] / curvature.clamp(min=torch.finfo(slope.dtype).tiny ** 0.5)
    inverse = torch.cat([rows.solve(inverse[:, :-1], curvature / prompts, here.penalties), bias], dim=1)
    for (step, change, scale), share in zip(here.pairs, reversed(shares), strict=True):
        inverse += (share - scale * (change * inverse).sum(1, keepdim=True)) * step
    return inverse


def _line_search(here: _Columns, direction: Tensor, along: Tensor, decrement: Tensor, guess: Tensor) -> Tensor:
    """The length for each column at which the slope along the direction is a fifth of what it was, or less.

    Newton's method in one variable, kept inside a bracket; the function is convex, so it ends.
    """
    pull = here.penalty(direction)
    linear, square = (pull * here.solution).sum(1), (pull * direction).sum(1)
    length = guess[:, 0]
    low, high = torch.zeros_like(length), torch.full_like(length, float("inf"))
    for _ in range(60):
        chance = torch.sigmoid(here.margins + length[:, None] * along)
        weighted = here.weights * along
        first = (weighted * (chance - here.targets)).sum(1) + linear + length * square
        short = first.abs() > 0.2 * decrement
        if not short.any():
            break
        second = (weighted * along * chance * (1 - chance)).sum(1) + square
        low, high = torch.where(first < 0, length, low), torch.where(first > 0, length, high)
        newton = length - first / second.clamp(min=torch.finfo(first.dtype).tiny)
        halfway = torch.where(high.isinf(), 2 * length, (low + high) / 2)
        inside = (newton > low) & (newton < high)
        length = torch.where(short, torch.where(inside, newton, halfway), length)
    return length[:, None]

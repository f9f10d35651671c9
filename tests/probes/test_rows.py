"""How rows are standardised and decomposed, and what the solver makes of what float32 cannot resolve."""

import numpy as np
import pytest
import torch

from probes import logistic
from probes.logistic import fit_columns
from probes.rows import Rows, prepare, standardised


def decaying(rng, prompts, d_model):
    return rng.standard_normal((prompts, d_model)) * np.arange(1, d_model + 1) ** -0.5


@pytest.fixture
def products(monkeypatch):
    """Counts products with the rows."""
    seen = []
    forward = Rows.forward
    monkeypatch.setattr(Rows, "forward", lambda *args, **options: seen.append(args) or forward(*args, **options))
    return seen


def test_massive_means_keep_their_digits(rng):
    """1e4 spreads from zero, and more rows than one block; the reference is in float64."""
    values = (rng.standard_normal((1000, 30)) + 1e4 * rng.standard_normal(30)).astype(np.float32)
    values[:500] += 5  # sorted by a class that moves the mean
    exact = values.astype(np.float64)
    rows, mean, scale = standardised(values)
    np.testing.assert_allclose(scale, exact.std(axis=0), rtol=1e-5)
    np.testing.assert_allclose(mean, exact.mean(axis=0), rtol=1e-7)
    np.testing.assert_allclose(rows.numpy(), (exact - exact.mean(axis=0)) / exact.std(axis=0), atol=1e-3)


def test_a_sketch_finds_the_leading_axes_and_never_too_much_along_them(rng):
    values = decaying(rng, 700, 900)
    rows = prepare(torch.from_numpy(values).float(), 1)
    gram = values.T @ values
    axes, moments = rows.axes.double().numpy(), rows.moments.double().numpy()
    np.testing.assert_allclose(axes @ axes.T, np.eye(len(axes)), atol=1e-3)
    along = np.einsum("ak,kl,al->a", axes, gram, axes)
    assert (moments <= 1.02 * along).all()  # Nystroem approximates from below, but for rounding
    exact = np.linalg.eigvalsh(gram)
    assert moments[-1] == pytest.approx(exact[-1], rel=0.05)
    assert exact[0] <= rows.tail <= moments.min() * 1.001
    total = float((gram**2).sum())
    assert rows.squared_moments() == pytest.approx(total, rel=0.02)


def test_sketched_rows_of_low_rank_or_none_are_solved(rng):
    """Far fewer axes than random directions: what is left of the others is rounding, and must not become axes."""
    few = rng.standard_normal((1100, 3)) @ rng.standard_normal((3, 1100))
    for values, rank in ((few, 3), (np.zeros((1100, 1100)), 0)):
        rows = prepare(torch.from_numpy(values).float(), 1)
        assert rank <= len(rows.axes) <= 40
        targets = torch.from_numpy((np.arange(1100) % 2 == 0)[None]).float()
        solution, bias = fit_columns(rows, targets, torch.full_like(targets, 1 / 1100), [1e-2])
        assert torch.isfinite(solution).all()
        assert torch.isfinite(bias).all()
        residual = torch.sigmoid(solution @ rows.values.T + bias[:, None]) - targets
        slope = (residual @ rows.values) / 1100 + 1e-2 * solution
        assert slope.abs().max() < 1e-4


def test_wide_rows_come_back_as_features(rng):
    """Solved in as many coordinates as there are prompts; the reference is the optimum's condition in features."""
    values = rng.standard_normal((60, 500))
    rows = prepare(torch.from_numpy(values - values.mean(axis=0)), 1)
    assert rows.values.shape[1] < 60
    assert rows.d_model == 500
    targets = torch.from_numpy((np.arange(60) % 3 == 0)[None]).double()
    solution, bias = fit_columns(rows, targets, torch.full_like(targets, 1 / 60), [1e-2])
    features = rows.features(solution)
    source = torch.from_numpy(values - values.mean(axis=0))
    chance = torch.sigmoid(features @ source.T + bias[:, None])
    slope = (chance - targets) @ source / 60 + 1e-2 * features
    assert slope.abs().max() < 1e-6 * features.abs().max()


def test_a_fit_ends_where_only_rounding_is_left(rng, products):
    """Separated so well that no prompt has curvature, float32 cannot resolve the energy that is asked."""
    labels = np.arange(700) % 2 == 0
    direction = rng.standard_normal(1600)
    values = decaying(rng, 700, 1600) + 20 * labels[:, None] * direction / np.linalg.norm(direction)
    rows = prepare(standardised(values.astype(np.float32))[0], 1)
    targets = torch.from_numpy(labels[None]).float()
    fit_columns(rows, targets, torch.full_like(targets, 1 / 700), [1e-4])
    assert len(products) < 60


def test_columns_have_one_optimum_however_many_are_solved_at_a_time(rng, monkeypatch):
    values = decaying(rng, 300, 200)
    rows = prepare(torch.from_numpy(values - values.mean(axis=0)), 5)
    targets = torch.from_numpy(rng.random((5, 300)) < 0.4).double()
    problem = rows, targets, torch.full_like(targets, 1 / 300), [1.0, 0.1, 1e-2, 1e-3, 1e-2]
    together = fit_columns(*problem)
    monkeypatch.setattr(logistic, "_batch", lambda prompts, width: 2)
    for one, other in zip(together, fit_columns(*problem), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_batches_shrink_where_prompts_are_many_and_rows_short():
    assert logistic._batch(200, 64) == logistic._batch(4000, 4096) == 80
    assert logistic._batch(20_000, 512) == 16
    assert logistic._batch(10**7, 8) == 1

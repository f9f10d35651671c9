"""One call over everything gives what many calls would, and says what the best of it is worth."""

import numpy as np
import pytest

from activations.errors import LabelError, NonFiniteError, OptionError
from probes.crossval import METHODS
from probes.metrics import auroc
from probes.sweep import sweep_probes
from probes.train import deal_folds, fit_probes


@pytest.fixture
def planted(rng):
    """Two positions of three layers; intent is read at "last" in layer 2, style at "mean" in layer 1."""
    intent, style = rng.permutation(120) < 60, rng.permutation(120) < 50
    last, mean = rng.standard_normal((2, 3, 120, 16)).astype(np.float32)
    last[2] += 2 * intent[:, None] * rng.standard_normal(16)
    mean[1] += 2 * style[:, None] * rng.standard_normal(16)
    return {"last": last, "mean": mean}, {"intent": intent, "style": style}


def test_the_best_cells_are_where_the_signals_were_planted(planted):
    found = sweep_probes(*planted, l2=[1e-3, 1.0])
    assert found.auroc.shape == (2, 2, 2, 3)
    assert found.strengths == (1.0, 1e-3)
    intent, style = found.best("intent"), found.best("style")
    assert (intent.position, intent.layer) == ("last", 2)
    assert (style.position, style.layer) == ("mean", 1)
    assert intent.auroc == found.auroc[0].max() > max(intent.null)
    assert intent.p_value == pytest.approx(1 / 6)
    table = found.table("style")
    assert table.shape == (3, 2)
    assert np.unravel_index(table.argmax(), table.shape) == (1, 1)


@pytest.mark.parametrize("method", METHODS)
def test_each_cell_is_what_fit_probes_measures(planted, method):
    positions, labels = planted
    found = sweep_probes({"last": positions["last"]}, {"intent": labels["intent"]}, method=method, l2=0.1, shuffles=0)
    alone = fit_probes(positions["last"], labels["intent"], method=method, l2=0.1)
    np.testing.assert_allclose(found.auroc[0, 0, 0], [layer.auroc for layer in alone.metrics], atol=0.01)


def test_the_best_cell_of_noise_is_no_better_than_its_null(rng):
    """The best of many cells looks good by itself; beside the best of shuffled sweeps it does not."""
    labels = rng.permutation(60) < 30
    found = [
        sweep_probes({"last": rng.standard_normal((4, 60, 8))}, {"noise": labels}, l2=[1.0, 0.01], shuffles=9).best()
        for _ in range(8)
    ]
    assert np.mean([best.auroc for best in found]) > 0.55
    assert 0.2 < np.mean([best.p_value for best in found]) < 0.9


def test_without_shuffles_there_is_no_null(planted):
    found = sweep_probes(*planted, shuffles=0)
    assert found.null.shape == (2, 0)
    assert found.best("intent").p_value is None


def test_groups_stay_together(rng):
    labels = np.repeat(rng.permutation(60) < 30, 2)
    values = np.repeat(rng.standard_normal((1, 60, 80)), 2, axis=1) + 0.01 * rng.standard_normal((1, 120, 80))
    apart = sweep_probes({"last": values}, {"noise": labels}, shuffles=0)
    together = sweep_probes({"last": values}, {"noise": labels}, groups=np.repeat(np.arange(60), 2), shuffles=0)
    assert apart.best().auroc > 0.85
    assert together.best().auroc < 0.75


def test_final_precision_is_scikit_learns(planted):
    from sklearn.linear_model import LogisticRegression

    values, labels = planted[0]["mean"][:1], planted[1]["style"]
    found = sweep_probes({"mean": values}, {"style": labels}, l2=[0.3, 0.01], shuffles=0, precision="final")
    rows = (values[0] - values[0].mean(axis=0)) / values[0].std(axis=0)
    folds = deal_folds(labels, np.arange(120), 5, np.random.default_rng(0))
    for number, l2 in enumerate((0.3, 0.01)):
        scores = np.empty(120)
        for fold in range(5):
            kept = folds != fold
            model = LogisticRegression(C=1 / (l2 * kept.sum()), tol=1e-9, max_iter=10_000).fit(rows[kept], labels[kept])
            scores[~kept] = model.decision_function(rows[~kept])
        assert found.auroc[0, 0, number, 0] == pytest.approx(auroc(scores, labels), abs=2e-3)


def test_impossible_sweeps_are_named(planted):
    positions, labels = planted
    with pytest.raises(OptionError, match="0 positions and 2 label sets"):
        sweep_probes({}, labels)
    with pytest.raises(OptionError, match="position 'mean' has other prompts, groups or layers than 'last'"):
        sweep_probes({**positions, "mean": positions["mean"][:2]}, labels)
    with pytest.raises(LabelError, match="one for each"):
        sweep_probes(positions, {**labels, "short": labels["intent"][:5]})
    with pytest.raises(LabelError, match="0 of 120"):
        sweep_probes(positions, {"none": np.zeros(120, dtype=bool)})
    with pytest.raises(OptionError, match="folds is 1"):
        sweep_probes(positions, labels, folds=1)
    with pytest.raises(OptionError, match="no label set 'mood': expected one of 'intent', 'style'"):
        sweep_probes(positions, labels, shuffles=0).best("mood")
    with pytest.raises(OptionError, match="no label set is named"):
        sweep_probes(positions, labels, shuffles=0).table()
    positions["last"][1, 2, 3] = np.nan
    with pytest.raises(NonFiniteError, match=r"blocks\.1"):
        sweep_probes(positions, labels)

"""Probabilities are fitted on other prompts than theirs, have the optimum of a reference, and say what happens."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit, logit

from activations.errors import LabelError, NonFiniteError, OptionError
from probes import calibration
from probes.calibration import calibration_of, cross_calibrated, fit_platt, reliability
from probes.metrics import calibration_error


def drawn(rng, count, *, slope=1.0, intercept=0.0):
    """Scores whose true log odds are a line of them."""
    scores = 2 * rng.standard_normal(count)
    return scores, rng.random(count) < expit(slope * scores + intercept)


@given(
    st.integers(0, 10_000),
    st.sampled_from([1e-6, 1.0, 1e6]),
    st.sampled_from([0.0, -50.0, 1e4]),
    st.sampled_from([0.1, 0.5, 0.9]),
)
def test_platt_scaling_has_the_optimum_of_a_general_solver(seed, unit, offset, share):
    rng = np.random.default_rng(seed)
    plain = rng.standard_normal(60)
    labels = rng.random(60) < share
    labels[:2] = True, False
    plain[labels] += 1
    found = fit_platt(unit * (plain + offset), labels).probabilities(unit * (plain + offset))
    positives, negatives = labels.sum(), (~labels).sum()
    targets = np.where(labels, (positives + 1) / (positives + 2), 1 / (negatives + 2))

    def loss(line):
        odds = line[0] * plain + line[1]
        return (np.logaddexp(0, odds) - targets * odds).mean()

    best = minimize(loss, [0, 0], tol=1e-12)
    assert found == pytest.approx(expit(best.x[0] * plain + best.x[1]), abs=1e-4)


def test_platt_scaling_is_scikit_learns(rng):
    from sklearn.calibration import _sigmoid_calibration

    scores, labels = drawn(rng, 300, slope=0.4, intercept=-0.7)
    slope, intercept = _sigmoid_calibration(scores, labels.astype(float))
    found = fit_platt(scores, labels)
    assert (found.slope, found.intercept) == pytest.approx((-slope, -intercept), abs=1e-3)


def test_platt_scaling_finds_the_line_that_made_the_labels(rng):
    found = fit_platt(*drawn(rng, 50_000, slope=0.5, intercept=-1.0))
    assert (found.slope, found.intercept) == pytest.approx((0.5, -1.0), abs=0.05)


@pytest.mark.parametrize("gap", [1.0, 1e8])
def test_perfect_separation_is_not_certainty(gap):
    labels = np.arange(40) < 20
    probabilities = fit_platt(gap * labels, labels).probabilities(gap * labels)
    assert probabilities[0] == pytest.approx(21 / 22)  # Platt's targets
    assert probabilities[-1] == pytest.approx(1 / 22)


def test_equal_scores_tell_the_share_of_positives_alone():
    found = fit_platt(np.full(40, 7.0), np.arange(40) < 10)
    assert found.slope == 0
    assert found.probabilities(np.array([7.0])) == pytest.approx([(10 * 11 / 12 + 30 / 32) / 40])
    assert logit(found.probabilities(np.array([7.0])))[0] == pytest.approx(found.intercept)


def test_no_prompt_is_calibrated_by_itself_or_by_its_twin(rng, monkeypatch):
    """Each fit is asked which scores it saw: none of the group that it then scores."""
    pairs = 20
    groups, labels = np.repeat(np.arange(pairs), 2), np.tile([True, False], pairs)
    scores = np.arange(2.0 * pairs)  # a score is its prompt's number
    seen = []

    def spy(kept, kept_labels):
        found = fit_platt(kept, kept_labels)
        seen.append(set(groups[kept.astype(int)]))
        return found

    monkeypatch.setattr(calibration, "fit_platt", spy)
    cross_calibrated(scores, labels, groups)
    assert len(seen) == 5
    assert sum(pairs - len(groups_seen) for groups_seen in seen) == pairs  # each pair is held out once, and whole


def test_calibration_on_its_own_prompts_would_flatter(rng):
    """Positive control: scores without any information, on few prompts."""
    gaps = []
    for _ in range(60):
        scores, labels = rng.standard_normal(30), rng.permutation(np.arange(30) < 15)
        own, other = fit_platt(scores, labels).probabilities(scores), cross_calibrated(scores, labels)
        gaps.append(((other - labels) ** 2).mean() - ((own - labels) ** 2).mean())
    assert np.mean(gaps) > 0.01


def test_inflated_scores_are_mended_and_true_ones_are_left_alone(rng):
    scores, labels = drawn(rng, 4000)
    true, inflated = calibration_of(scores, labels), calibration_of(5 * scores, labels)
    assert true.before < 0.03
    assert inflated.before > 0.1
    assert inflated.after < 0.03
    assert calibration_of(scores, labels, log_odds=False).before is None


def test_five_in_a_hundred_calibrated_scores_exceed_what_chance_gives(rng):
    """And wrong probabilities nearly always do."""
    exceeded = wrong = 0
    for seed in range(200):
        scores, labels = drawn(rng, 150)
        found = calibration_of(scores, labels, seed=seed)
        exceeded += found.after > found.by_chance
        wrong += calibration_error(expit(6 * scores), labels) > found.by_chance
    assert exceeded / 200 <= 0.1
    assert wrong / 200 > 0.7


def test_a_reliability_diagram_by_hand():
    probabilities, labels = np.array([0.2, 0.4, 0.6, 1.0]), np.array([False, True, True, True])
    found = reliability(probabilities, labels, bins=2)
    assert found.stated.tolist() == pytest.approx([0.3, 0.8])
    assert found.observed.tolist() == [0.5, 1.0]
    assert found.counts.tolist() == [2, 2]
    assert found.high[1] == 1.0
    assert (found.low < found.observed).all()
    gap = (found.counts * np.abs(found.stated - found.observed)).sum() / 4
    assert gap == pytest.approx(calibration_error(probabilities, labels, bins=2))


def test_bars_of_a_reliability_diagram_cover_the_truth(rng):
    inside = bins = 0
    for _ in range(100):
        probabilities = rng.choice([0.15, 0.35, 0.65, 0.95], size=120)
        found = reliability(probabilities, rng.random(120) < probabilities)
        inside += ((found.low <= found.stated) & (found.stated <= found.high)).sum()
        bins += len(found.stated)
    assert bins == 400
    assert inside / bins >= 0.93


def test_bins_without_prompts_are_left_out():
    assert reliability(np.array([0.05, 0.95]), np.array([False, True])).counts.tolist() == [1, 1]


def test_impossible_input_is_named():
    scores = np.arange(6.0)
    with pytest.raises(LabelError, match="both classes"):
        fit_platt(scores, np.ones(6, dtype=bool))
    with pytest.raises(LabelError, match="one for each"):
        fit_platt(scores, np.arange(5) < 2)
    with pytest.raises(NonFiniteError, match="1 of 6"):
        fit_platt(np.append(scores[:-1], np.nan), np.arange(6) < 3)
    with pytest.raises(LabelError, match="nothing can be held out"):
        cross_calibrated(scores, np.arange(6) < 1)
    with pytest.raises(OptionError, match="0 to 1"):
        reliability(scores, np.arange(6) < 3)


@pytest.mark.parametrize("folds", [1, 0, -3])
def test_folds_that_hold_nothing_out_are_refused(folds):
    with pytest.raises(OptionError, match=f"folds is {folds}"):
        cross_calibrated(np.arange(20.0), np.arange(20) % 2 == 0, folds=folds)

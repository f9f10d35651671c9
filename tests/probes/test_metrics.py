import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from activations.errors import LabelError, NonFiniteError, OptionError
from probes.metrics import (
    auroc,
    auroc_interval,
    auroc_rows,
    calibration_error,
    clopper_pearson,
    empirical_p,
    fpr_threshold,
    tpr_at_fpr,
)

# Few distinct values, so that ties are common.
scored = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40).filter(
    lambda rows: len({label for _, label in rows}) == 2
)


def unzip(rows):
    scores, labels = zip(*rows, strict=True)
    return np.array(scores, dtype=float), np.array(labels)


@given(scored)
def test_auroc_is_the_share_of_pairs_won_and_scikit_learns(rows):
    scores, labels = unzip(rows)
    won = [(p > n) + 0.5 * (p == n) for p in scores[labels] for n in scores[~labels]]
    assert auroc(scores, labels) == pytest.approx(np.mean(won))
    assert auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))


def test_auroc_rows_takes_labels_for_all_rows_or_for_each(rng):
    scores, labels = rng.standard_normal((5, 30)), rng.permuted(np.tile(np.arange(30) < 12, (5, 1)), axis=1)
    assert auroc_rows(scores, labels) == pytest.approx([auroc(s, y) for s, y in zip(scores, labels, strict=True)])
    assert auroc_rows(scores, labels[:1]) == pytest.approx([auroc(s, labels[0]) for s in scores])


@given(scored, st.sampled_from([0.05, 0.1, 0.25, 0.5, 0.9]))
def test_tpr_at_fpr_is_the_best_threshold_that_keeps_the_rate(rows, fpr):
    scores, labels = unzip(rows)
    found = tpr_at_fpr(scores, labels, fpr)
    if fpr * (~labels).sum() < 1:
        assert found is None
        return
    keeps = [t for t in [*scores, -math.inf] if (scores[~labels] > t).mean() <= fpr]
    assert found == max((scores[labels] > t).mean() for t in keeps)


def test_a_rate_that_the_negatives_cannot_resolve_is_not_given():
    labels = np.arange(199) < 100  # 99 negatives
    assert tpr_at_fpr(np.linspace(1, 0, 199), labels, 0.01) is None
    assert tpr_at_fpr(np.linspace(1, 0, 200), np.arange(200) < 100, 0.01) == 1.0


@pytest.mark.parametrize(("fpr", "allowed"), [(0.07, 7), (0.29, 29), (0.1, 10)])
def test_rounding_of_the_rate_costs_no_negative(fpr, allowed):
    negatives = np.arange(100.0)
    assert (negatives > fpr_threshold(negatives, fpr)).sum() == allowed


def coverage(rng, *, pairs, shift, shared, repeats=400):
    """Share of intervals that hold the true AUROC, for pairs whose members share a part of their variance."""
    truth = 0.5 * (1 + math.erf(shift / 2))
    labels, groups = np.repeat([True, False], pairs), np.tile(np.arange(pairs), 2)
    held = {"grouped": 0, "alone": 0}
    for _ in range(repeats):
        common, own = rng.standard_normal(pairs), rng.standard_normal(2 * pairs)
        scores = math.sqrt(shared) * np.tile(common, 2) + math.sqrt(1 - shared) * own + shift * labels
        for name, members in (("grouped", groups), ("alone", None)):
            low, high = auroc_interval(scores, labels, groups=members)
            held[name] += low <= truth <= high
    return {name: count / repeats for name, count in held.items()}


def test_intervals_of_lone_prompts_cover_the_truth_as_often_as_they_say(rng):
    assert 0.92 <= coverage(rng, pairs=40, shift=1.0, shared=0.0)["alone"] <= 0.98


def test_intervals_know_that_pairs_share_their_topic(rng):
    # Twins that share a topic compare better than strangers: an interval that does not know is too wide.
    held = coverage(rng, pairs=40, shift=0.7, shared=0.8)
    assert 0.92 <= held["grouped"] <= 0.98
    assert held["alone"] > 0.98


def test_interval_agrees_with_a_bootstrap_of_pairs(rng):
    pairs = 150
    labels, groups = np.tile([True, False], pairs), np.repeat(np.arange(pairs), 2)
    scores = np.repeat(rng.standard_normal(pairs), 2) + rng.standard_normal(2 * pairs) + labels
    draws = []
    for _ in range(1000):
        rows = (2 * rng.integers(pairs, size=pairs)[:, None] + [0, 1]).ravel()
        draws.append(auroc(scores[rows], labels[rows]))
    assert auroc_interval(scores, labels, groups=groups) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.01)


def test_perfect_separation_is_not_certainty():
    labels = np.arange(40) < 20
    low, high = auroc_interval(labels.astype(float), labels)
    assert high == 1.0
    assert low == pytest.approx(0.025 ** (1 / 20))  # 20 disjoint pairs, all right
    assert auroc_interval(-labels.astype(float), labels) == pytest.approx((0.0, 1 - low))
    paired = auroc_interval(labels.astype(float), labels, groups=np.arange(40) % 20)
    assert paired[0] == pytest.approx(0.025 ** (1 / 10))  # 20 pairs make 10 comparisons that share no pair


def test_scores_that_all_tie_say_nothing():
    assert auroc_interval(np.zeros(10), np.arange(10) < 5) == (0.0, 1.0)


@pytest.mark.parametrize(("successes", "trials"), [(0, 20), (20, 20), (7, 20), (1, 1), (3, 400)])
def test_clopper_pearson_bounds_leave_the_stated_tails(successes, trials):
    low, high = clopper_pearson(successes, trials)

    def at_least(k, p):
        return sum(math.comb(trials, i) * p**i * (1 - p) ** (trials - i) for i in range(k, trials + 1))

    assert low == 0.0 if successes == 0 else at_least(successes, low) == pytest.approx(0.025)
    assert high == 1.0 if successes == trials else at_least(successes + 1, high) == pytest.approx(0.975)


def test_nothing_tried_is_nothing_known():
    assert clopper_pearson(0, 0) == (0.0, 1.0)


def test_calibration_error_by_hand():
    # Bins of width 0.5: {0.2, 0.4} with none positive of two, {0.6, 1.0} with both positive.
    probabilities, labels = np.array([0.2, 0.4, 0.6, 1.0]), np.array([False, False, True, True])
    assert calibration_error(probabilities, labels, bins=2) == pytest.approx(0.5 * 0.3 + 0.5 * 0.2)


def test_true_probabilities_are_calibrated_and_inflated_ones_are_not(rng):
    probabilities = rng.uniform(size=20_000)
    labels = rng.uniform(size=20_000) < probabilities
    assert calibration_error(probabilities, labels) < 0.02
    assert calibration_error(np.sqrt(probabilities), labels) > 0.1


def test_empirical_p_counts_the_value_itself_and_states_its_resolution():
    assert empirical_p(5.0, [1, 2, 3]) == (0.25, 0.25)
    assert empirical_p(2.0, [1, 2, 3]) == (0.75, 0.25)
    assert empirical_p(2.0, []) == (1.0, 1.0)


@pytest.mark.parametrize("measure", [auroc, auroc_interval, lambda s, y: tpr_at_fpr(s, y, 0.5)])
def test_impossible_input_is_named(measure):
    with pytest.raises(LabelError, match="both classes"):
        measure(np.arange(3.0), np.ones(3, dtype=bool))
    with pytest.raises(LabelError, match="one for each"):
        measure(np.arange(3.0), np.ones(2, dtype=bool))
    with pytest.raises(NonFiniteError, match="1 of 3"):
        measure(np.array([0, np.nan, 1]), np.array([True, False, True]))


def test_impossible_options_are_named():
    scores, labels = np.arange(4.0), np.arange(4) < 2
    with pytest.raises(OptionError, match="level"):
        auroc_interval(scores, labels, level=95)
    with pytest.raises(OptionError, match="fpr"):
        tpr_at_fpr(scores, labels, 0.0)
    with pytest.raises(OptionError, match="5 successes"):
        clopper_pearson(5, 4)
    with pytest.raises(OptionError, match="0 to 1"):
        calibration_error(scores, labels)
    with pytest.raises(LabelError, match="groups"):
        auroc_interval(scores, labels, groups=[1, 2])
    with pytest.raises(NonFiniteError):
        empirical_p(math.nan, [1.0])

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from activations.errors import LabelError, NonFiniteError, OptionError
from probes.metrics import (
    auroc,
    auroc_difference,
    auroc_interval,
    auroc_rows,
    binary,
    calibration_error,
    clopper_pearson,
    empirical_p,
    fpr_threshold,
    group_numbers,
    rate_at_fpr,
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


def paired_scorings(rng, *, pairs, shifts, shared=0.5, common=0.5):
    """Twins that share a topic, read by two scorers that share a part of what they see."""
    labels, groups = np.repeat([True, False], pairs), np.tile(np.arange(pairs), 2)
    topic, seen = np.tile(rng.standard_normal(pairs), 2), rng.standard_normal(2 * pairs)
    scorings = []
    for shift in shifts:
        own = math.sqrt(common) * seen + math.sqrt(1 - common) * rng.standard_normal(2 * pairs)
        scorings.append(math.sqrt(shared) * topic + math.sqrt(1 - shared) * own + shift * labels)
    return scorings, labels, groups


def true_auroc(shift):
    return 0.5 * (1 + math.erf(shift / 2))


# Of 600 intervals that hold 95 %, 557 to 583 are right in 99 of 100 runs.
@pytest.mark.parametrize(
    ("pairs", "shifts"),
    [(40, (0.7, 0.7)), (97, (1.0, 1.0)), (40, (2.5, 2.0)), (20, (1.5, 1.5)), (60, (0.9, 0.3))],
    ids=["equal", "equal, as many as JailbreakBench", "near perfect", "few", "unequal"],
)
def test_intervals_of_a_difference_cover_the_truth_as_often_as_they_say(rng, pairs, shifts):
    truth, held, claimed = true_auroc(shifts[0]) - true_auroc(shifts[1]), 0, 0
    for _ in range(600):
        (first, second), labels, groups = paired_scorings(rng, pairs=pairs, shifts=shifts)
        found = auroc_difference(first, second, labels, groups=groups)
        held += found.interval[0] <= truth <= found.interval[1]
        claimed += found.clear
    assert 0.925 <= held / 600 <= 0.98
    if truth == 0:
        assert claimed / 600 <= 0.045  # 2.5 % and Monte Carlo error
    if truth > 0.2:
        assert claimed / 600 > 0.9


def test_an_interval_of_a_difference_that_knows_no_pairs_is_another(rng):
    """Positive control: where a topic is read by one scorer alone, pairs decide how sure one may be."""
    held = {"pairs": 0, "alone": 0}
    for _ in range(400):
        (first, _), labels, groups = paired_scorings(rng, pairs=40, shifts=(0.7, 0.7), shared=0.9)
        second = rng.standard_normal(80) * 0.5
        for name, members in (("pairs", groups), ("alone", None)):
            low, high = auroc_difference(first, second, labels, groups=members).interval
            held[name] += low <= true_auroc(0.7) - 0.5 <= high
    assert 0.92 <= held["pairs"] / 400 <= 0.98
    assert held["alone"] > held["pairs"]


def test_the_interval_of_a_difference_agrees_with_a_bootstrap_of_pairs(rng):
    (first, second), labels, groups = paired_scorings(rng, pairs=150, shifts=(1.2, 0.8))
    draws = []
    for _ in range(1000):
        rows = np.concatenate([chosen := rng.integers(150, size=150), chosen + 150])
        draws.append(auroc(first[rows], labels[rows]) - auroc(second[rows], labels[rows]))
    found = auroc_difference(first, second, labels, groups=groups)
    assert found.interval == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.01)
    assert found.value == auroc(first, labels) - auroc(second, labels)


def test_lone_prompts_give_the_paired_test_of_delong(rng):
    """By his formulas: covariance matrices of the placement values of positives and of negatives."""
    (first, second), labels, _ = paired_scorings(rng, pairs=300, shifts=(0.9, 0.7), shared=0.0)
    above, below = [], []
    for scores in (first, second):
        won = (scores[labels][:, None] > scores[~labels]) + 0.5 * (scores[labels][:, None] == scores[~labels])
        above.append(won.mean(axis=1))
        below.append(won.mean(axis=0))
    spread = np.cov(above) / 300 + np.cov(below) / 300
    reach = 1.959964 * math.sqrt(spread[0, 0] + spread[1, 1] - 2 * spread[0, 1])
    found = auroc_difference(first, second, labels)
    assert found.interval == pytest.approx((found.value - reach, found.value + reach), abs=2e-3)


def test_a_difference_turns_its_sign_with_the_order(rng):
    (first, second), labels, groups = paired_scorings(rng, pairs=30, shifts=(1.5, 0.5))
    one, other = (auroc_difference(*pair, labels, groups=groups) for pair in ((first, second), (second, first)))
    assert one.value == -other.value
    assert one.interval == pytest.approx((-other.interval[1], -other.interval[0]))
    assert one.clear
    assert not other.clear


def test_one_scoring_under_two_names_differs_by_nothing(rng):
    scores, labels = rng.standard_normal(50), np.arange(50) < 20
    assert auroc_difference(scores, 3 * scores + 1, labels).interval == (0.0, 0.0)


def test_two_perfect_scorings_may_still_differ_on_the_next_prompt(rng):
    labels = np.arange(40) < 20
    found = auroc_difference(labels + 0.1 * rng.random(40), labels + 0.1 * rng.random(40), labels)
    assert found.value == 0
    assert found.interval == pytest.approx((0.025 ** (1 / 20) - 1, 1 - 0.025 ** (1 / 20)))


def test_a_rate_comes_with_bounds_or_with_the_reason_for_none():
    scores, labels = np.linspace(1, 0, 200), np.arange(200) < 100
    found = rate_at_fpr(scores, labels, 0.05)
    assert (found.tpr, found.reason) == (1.0, "")
    assert found.interval == clopper_pearson(100, 100)
    assert found.fpr_interval == clopper_pearson(5, 100)
    refused = rate_at_fpr(scores[:-1], labels[:-1], 0.01)
    assert (refused.tpr, refused.interval, refused.fpr_interval) == (None, None, None)
    assert refused.reason == "99 negatives cannot resolve a false positive rate of 0.01: that takes 100"


@pytest.mark.parametrize(("fpr", "least"), [(0.01, 100), (0.05, 20), (0.07, 15), (0.1, 10), (0.3, 4)])
def test_the_number_of_negatives_that_is_asked_for_suffices(fpr, least):
    labels = np.arange(least + 4) < 5
    scores = np.linspace(1, 0, least + 4)
    assert f"takes {least}" in rate_at_fpr(scores, labels, fpr).reason
    assert rate_at_fpr(np.append(scores, -1), np.append(labels, False), fpr).tpr == 1.0


def test_bounds_of_both_rates_cover_what_new_prompts_would_give(rng):
    """Also for the threshold, which the same negatives chose."""
    held = {"tpr": 0, "fpr": 0}
    for _ in range(500):
        scores, labels = rng.standard_normal(260), np.arange(260) < 60
        scores[labels] += 1.5
        found = rate_at_fpr(scores, labels, 0.05)
        threshold = fpr_threshold(scores[~labels], 0.05)
        beyond = [0.5 * math.erfc((threshold - shift) / math.sqrt(2)) for shift in (1.5, 0.0)]
        held["tpr"] += found.interval[0] <= beyond[0] <= found.interval[1]
        held["fpr"] += found.fpr_interval[0] <= beyond[1] <= found.fpr_interval[1]
    assert min(held.values()) / 500 >= 0.93  # both are exact or wider; 95 % less Monte Carlo error


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


@pytest.mark.parametrize(
    "measure",
    [
        auroc,
        auroc_interval,
        lambda s, y: tpr_at_fpr(s, y, 0.5),
        lambda s, y: rate_at_fpr(s, y, 0.5),
        lambda s, y: auroc_difference(s, s, y),
    ],
)
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


@pytest.mark.parametrize(
    "labels",
    [
        [0.0, np.nan, 1, 1],
        [0, 1, 2, 1],
        [-1, 1, 1, -1],
        ["False", "True", "", "x"],
        [None, True, False, True],
        [0.2, 1, 0, 1],
    ],
)
def test_labels_that_are_neither_true_nor_false_are_refused(labels):
    with pytest.raises(LabelError, match="not all True or False"):
        binary(labels)
    with pytest.raises(LabelError, match="not all True or False"):
        auroc(np.arange(4.0), labels)


@pytest.mark.parametrize(
    "labels", [[True, False], [1, 0], [1.0, 0.0], np.array([1, 0], np.uint8), (np.True_, np.False_)]
)
def test_labels_of_other_types_are_read(labels):
    assert binary(labels).tolist() == [True, False]


def test_a_missing_group_is_refused():
    assert group_numbers(["a", ("b", 1), 3.0, "a"], 4).tolist() == [0, 1, 2, 0]
    for missing in (None, np.nan):
        with pytest.raises(LabelError, match="group of prompt 1"):
            group_numbers(["a", missing, "b"], 3)
    with pytest.raises(LabelError, match="one for each"):
        group_numbers(np.zeros((3, 2)), 3)


def test_rows_with_ties_and_without_and_with_nan_are_each_what_they_are_alone(rng):
    scores = np.stack([rng.standard_normal(40), rng.integers(0, 4, 40) * 1.0, np.zeros(40), rng.standard_normal(40)])
    labels = rng.random((4, 40)) < 0.4
    scores[3, 7] = np.nan
    areas = auroc_rows(scores, labels)
    for row in range(3):
        assert areas[row] == pytest.approx(roc_auc_score(labels[row], scores[row]), abs=1e-12)
    assert np.isnan(areas[3])

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import PredefinedSplit, cross_val_predict

from activations.errors import LabelError, NonFiniteError, OptionError
from activations.provenance import Provenance as StoredProvenance
from activations.results import Activations
from probes.logistic import fit_logistic
from probes.metrics import auroc
from probes.train import deal_folds, fit_probes, shuffled_labels, words_baseline


def planted(rng, *, layers=1, prompts=200, d_model=20, size=1.0):
    """Noise in which the harmful prompts are moved along one direction a layer."""
    labels = np.arange(prompts) % 2 == 0
    directions = rng.standard_normal((layers, d_model))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    values = rng.standard_normal((layers, prompts, d_model))
    values += size * labels[None, :, None] * directions[:, None]
    return values.astype(np.float32), labels, directions


def scikit(values, labels, l2):
    model = LogisticRegression(C=1 / (l2 * len(labels)), tol=1e-10, max_iter=100_000)
    return model.fit(values.astype(np.float64), labels)


CASES = {
    "noise": {"size": 0.0},
    "separable": {"size": 20.0},
    "wide": {"prompts": 50, "d_model": 400},
    "tall": {"prompts": 1500, "d_model": 10},
    "square": {"prompts": 60, "d_model": 60},
}


@pytest.mark.parametrize("l2", [1e-1, 1e-2, 1e-4])
@pytest.mark.parametrize("case", CASES)
def test_probe_has_the_optimum_of_scikit_learn(rng, case, l2):
    values, labels, _ = planted(rng, **CASES[case])
    values[..., 3] = 7.25  # a feature that never changes
    values[..., 5] *= 1000  # and one of massive activations
    probe = fit_probes(values, labels, l2=l2, folds=0)[0]
    standardised = (values[0] - probe.mean) / probe.scale
    expected = scikit(standardised, labels, l2).decision_function(standardised.astype(np.float64))
    assert np.abs(probe.score(values[0]) - expected).max() <= 1e-4 * np.abs(expected).max()


def test_cross_validation_is_scikit_learns_under_the_same_folds(rng):
    """The held-out scores come from one batch of columns; each must be what a fit of its own would give."""
    values, labels, _ = planted(rng, prompts=100)
    probes = fit_probes(values, labels, l2=1e-2, folds=4)
    standardised = ((values[0] - probes[0].mean) / probes[0].scale).astype(np.float64)
    folds = wordsdeal_folds(labels, 4)
    model = LogisticRegression(C=1 / (1e-2 * 75), tol=1e-10, max_iter=100_000)
    scores = cross_val_predict(model, standardised, labels, cv=PredefinedSplit(folds), method="decision_function")
    assert probes.metrics[0].auroc == pytest.approx(auroc(scores, labels), abs=1e-4)


def wordsdeal_folds(labels, folds):
    return deal_folds(labels, np.arange(len(labels)), folds, np.random.default_rng(0))


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(3, 40), st.integers(1, 40), st.sampled_from([1e-1, 1e-3, 1e-5]))
def test_solver_ends_where_the_gradient_vanishes(seed, prompts, d_model, l2):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((prompts, d_model)) * np.exp(2 * rng.standard_normal(d_model))
    rows -= rows.mean(axis=0)
    targets = rng.integers(0, 2, (prompts, 6)).astype(float)
    targets[0], targets[1] = 0, 1
    weights = rng.uniform(0.1, 1, (prompts, 6))
    weights /= weights.sum(axis=0)
    coefficients, biases = fit_logistic(rows, targets, weights, l2)
    residual = weights * (1 / (1 + np.exp(-(rows @ coefficients + biases))) - targets)
    size = np.abs(rows).max()
    assert np.abs(rows.T @ residual + l2 * coefficients).max() <= 1e-6 * size
    assert np.abs(residual.sum(axis=0)).max() <= 1e-6


@pytest.mark.parametrize("method", ["logistic", "mean_difference"])
def test_probe_recovers_a_planted_direction(rng, method):
    values, labels, directions = planted(rng, layers=3, prompts=2000, size=2.0)
    probes = fit_probes(values, labels, method=method)
    for layer, direction in enumerate(directions):
        assert probes[layer].residual_direction @ direction > 0.95
        assert probes.metrics[layer].auroc > 0.9
        assert min(probes.metrics[layer].interval) > max(probes.metrics[layer].null_shuffled)


@pytest.mark.parametrize("method", ["logistic", "mean_difference"])
def test_noise_yields_chance_and_its_nulls_cover_it(rng, method):
    values, labels, _ = planted(rng, layers=4, prompts=400, size=0.0)
    for layer in fit_probes(values, labels, method=method).metrics:
        assert abs(layer.auroc - 0.5) < 0.1
        assert abs(np.mean(layer.null_shuffled) - 0.5) < 0.05
        assert layer.null_random_directions > layer.auroc - 0.05


def test_best_layer_is_the_one_with_the_signal(rng):
    values, labels, directions = planted(rng, layers=4, size=0.0)
    values[2] += 3 * labels[:, None] * directions[2]
    assert fit_probes(values, labels).best_layer == 2


def test_layers_do_not_see_each_other(rng):
    values, labels, _ = planted(rng, layers=3)
    together, alone = fit_probes(values, labels), fit_probes(values[1:2], labels)
    np.testing.assert_array_equal(together.directions[1], alone.directions[0])
    assert together.metrics[1] == alone.metrics[0]


def test_the_same_seed_gives_the_same_probes_and_metrics(rng):
    values, labels, _ = planted(rng)
    first, again, other = (fit_probes(values, labels, seed=seed) for seed in (1, 1, 2))
    assert first.metrics == again.metrics
    assert first.metrics != other.metrics
    np.testing.assert_array_equal(first.directions, other.directions)


def test_groups_keep_near_copies_from_leaking_into_the_score(rng):
    """Labels are random, but each prompt comes five times: only folds that know this see that nothing is learnt."""
    originals, labels = rng.standard_normal((60, 100)), rng.permutation(60) < 30
    values = np.repeat(originals, 5, axis=0)[None] + 0.01 * rng.standard_normal((1, 300, 100))
    groups, labels = np.repeat(np.arange(60), 5), np.repeat(labels, 5)
    assert fit_probes(values, labels).metrics[0].auroc > 0.95
    assert fit_probes(values, labels, groups=groups).metrics[0].auroc < 0.7


def test_folds_hold_groups_together_and_every_training_set_has_both_classes(rng):
    members = np.sort(rng.integers(0, 12, 60))
    members = np.unique(members, return_inverse=True)[1]
    labels = rng.uniform(size=60) < 0.3
    folds = deal_folds(labels, members, 5, rng)
    assert all(len(set(folds[members == group])) == 1 for group in set(members))
    assert all(len(set(labels[folds != fold])) == 2 for fold in range(5))


def test_rare_classes_are_in_every_training_set(rng):
    labels = np.array([True, True, *[False] * 30])
    assert 0 <= fit_probes(rng.standard_normal((1, 32, 4)), labels).metrics[0].auroc <= 1


def test_shuffles_respect_pairs(rng):
    labels, pairs = np.tile([True, False], 50), np.repeat(np.arange(50), 2)
    shuffled = shuffled_labels(labels, pairs, rng)
    assert (shuffled.reshape(50, 2).sum(axis=1) == 1).all()
    assert 10 < (shuffled != labels).sum() < 90


def test_shuffles_move_whole_groups_of_one_class(rng):
    labels, groups = np.repeat([True, False], 30), np.repeat(np.arange(20), 3)
    shuffled = shuffled_labels(labels, groups, rng)
    assert all(len(set(shuffled[groups == group])) == 1 for group in range(20))
    assert shuffled.sum() == labels.sum()
    assert (shuffled != labels).any()


def test_threshold_lets_one_benign_prompt_in_a_hundred_pass(rng):
    values, labels, _ = planted(rng, prompts=1000, size=3.0)
    probe = fit_probes(values, labels)[0]
    assert (probe.score(values[0])[~labels] > probe.threshold).mean() == pytest.approx(0.01, abs=0.006)
    assert fit_probes(values[:, :100], labels[:100])[0].threshold is None


def test_a_layer_without_variance_scores_every_prompt_alike(rng):
    values, labels, _ = planted(rng, layers=2)
    values[0] = 3.0
    for method in ("logistic", "mean_difference"):
        probes = fit_probes(values, labels, method=method)
        assert np.ptp(probes[0].score(values[0])) == 0
        assert probes.metrics[0].auroc == 0.5
        assert np.linalg.norm(probes.directions[0]) == pytest.approx(1)


def test_half_precision_activations_give_nearly_the_same_probe(rng):
    values, labels, _ = planted(rng)
    full, half = (fit_probes(kind, labels, folds=0).directions[0] for kind in (values, values.astype(np.float16)))
    assert full @ half > 0.9999


def test_words_baseline_finds_words_and_finds_none_in_noise(rng):
    labels = np.tile([True, False], 60)
    pairs = np.repeat(np.arange(60), 2)
    noise = [" ".join(rng.choice(["red", "blue", "tea", "sun", "cat"], 6)) for _ in labels]
    told = [f"{text} {'bomb' if label else 'cake'}" for text, label in zip(noise, labels, strict=True)]
    assert words_baseline(told, labels, pairs) == 1.0
    assert 0.35 < words_baseline(noise, labels, pairs) < 0.65
    assert words_baseline(["?"] * len(labels), labels, pairs) == 0.5


def test_provenance_goes_into_the_probe_set(rng):
    values, labels, _ = planted(rng, layers=2)
    probes = fit_probes(
        values, labels, base_fingerprint="f", prompts_name="p", pooling="mean", words=0.7, hook_points=["x", "y"]
    )
    assert (probes.base_fingerprint, probes.prompts_name, probes.pooling) == ("f", "p", "mean")
    assert probes.hook_points == ("x", "y")
    assert [layer.words_baseline for layer in probes.metrics] == [0.7, 0.7]


def test_extracted_activations_bring_labels_pairs_and_provenance(rng):
    values, labels, _ = planted(rng, prompts=40)
    pairs = tuple(f"pair {i // 2}" for i in range(40))
    provenance = StoredProvenance(
        model="nano",
        fingerprint="f",
        tuned="",
        dtype="float32",
        d_model=20,
        hook_points=("blocks.2.hook_resid_post",),
        pooling="mean",
        system="",
        template_hash="t",
        prompts_name="pairs",
        prompts_hash="p",
        n_prompts=40,
        harmful=tuple(labels.tolist()),
        pair_ids=pairs,
    )
    probes = fit_probes(Activations(values, provenance))
    by_hand = fit_probes(values, labels, groups=pairs)
    np.testing.assert_array_equal(probes.directions, by_hand.directions)
    assert probes.metrics == by_hand.metrics
    assert probes.hook_points == ("blocks.2.hook_resid_post",)
    assert (probes.base_fingerprint, probes.template_hash, probes.prompts_hash) == ("f", "t", "p")
    assert (probes.prompts_name, probes.pooling) == ("pairs", "mean")
    tuned = Activations(values, dataclasses.replace(provenance, tuned="c"))
    assert fit_probes(tuned, folds=0).base_fingerprint == "c"


def test_impossible_input_is_named(rng):
    values, labels, _ = planted(rng, layers=2, prompts=20)
    with pytest.raises(LabelError, match="0 of 20"):
        fit_probes(values, np.zeros(20, dtype=bool))
    with pytest.raises(LabelError, match="one for each"):
        fit_probes(values, labels[:5])
    with pytest.raises(LabelError, match="no labels"):
        fit_probes(values)
    with pytest.raises(LabelError, match="3 groups for 20"):
        fit_probes(values, labels, groups=["a", "b", "c"])
    with pytest.raises(LabelError, match="held out"):
        fit_probes(values, labels, groups=["a"] * 20)
    with pytest.raises(OptionError, match="method is 'svm'"):
        fit_probes(values, labels, method="svm")
    with pytest.raises(OptionError, match="l2"):
        fit_probes(values, labels, l2=0)
    with pytest.raises(OptionError, match="folds"):
        fit_probes(values, labels, folds=1)
    with pytest.raises(OptionError, match="shape"):
        fit_probes(values[0], labels)
    with pytest.raises(OptionError, match="1 hook points for 2"):
        fit_probes(values, labels, hook_points=["x"])
    values[1, 3, 4] = np.inf
    with pytest.raises(NonFiniteError, match=r"blocks\.1"):
        fit_probes(values, labels)

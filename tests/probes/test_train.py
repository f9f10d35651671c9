import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import PredefinedSplit, cross_val_predict

from activations.errors import LabelError, NonFiniteError, OptionError
from activations.provenance import Provenance as StoredProvenance
from activations.results import Activations
from probes.crossval import METHODS, choose_strength
from probes.logistic import fit_logistic
from probes.metrics import auroc
from probes.probe import ProbeSet
from probes.rows import prepare
from probes.sweep import sweep_probes
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


# As large as float32 takes over from float64, and beyond the sides for which there is an eigendecomposition.
LARGE = {
    "square": {"prompts": 1100, "d_model": 1100},
    "wide": {"prompts": 300, "d_model": 4000},
    "tall": {"prompts": 5000, "d_model": 256},
    "separable": {"prompts": 700, "d_model": 1600, "size": 20.0},
}


@pytest.mark.parametrize("case", LARGE)
@pytest.mark.parametrize("l2", [1e-1, 1e-4])
def test_large_layers_have_the_optimum_too_whatever_their_rows_are(rng, case, l2):
    values, labels, _ = planted(rng, **LARGE[case])
    values[0] *= np.arange(1, values.shape[2] + 1) ** -0.5
    values[..., 3], values[..., 5] = 7.25, 300 + 100 * values[..., 5]
    values[0, 1::10] = values[0, 0:1]  # copies of one row under both labels
    labels = labels & (np.arange(len(labels)) % 5 < 2)  # one in five is harmful
    probe = fit_probes(values, labels, l2=l2, folds=0)[0]
    standardised = (values[0] - probe.mean) / probe.scale
    expected = scikit(standardised, labels, l2).decision_function(standardised.astype(np.float64))
    assert np.abs(probe.score(values[0]) - expected).max() <= 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("case", [{"prompts": 1200, "d_model": 1000}, {"prompts": 120, "d_model": 300}])
@pytest.mark.parametrize("method", METHODS)
def test_screening_finds_nearly_the_same_aurocs(rng, case, method):
    values, labels, _ = planted(rng, **case)
    values[0] *= np.arange(1, values.shape[2] + 1) ** -0.5
    for l2 in (1.0, 1e-2, 1e-4) if method == "logistic" else (1.0,):
        final, screened = (
            fit_probes(values, labels, method=method, l2=l2, precision=precision).metrics[0]
            for precision in ("final", "screening")
        )
        assert abs(final.auroc - screened.auroc) <= 0.01
        assert np.abs(np.subtract(final.null_shuffled, screened.null_shuffled)).max() <= 0.02


def test_lda_is_scikit_learns_at_the_share_of_ledoit_and_wolf(rng):
    for prompts, d_model in ((80, 30), (40, 90), (500, 400)):
        values, labels, _ = planted(rng, prompts=prompts, d_model=d_model)
        labels = labels & (np.arange(prompts) % 3 > 0)
        probe = fit_probes(values, labels, method="lda", folds=0)[0]
        rows = ((values[0] - probe.mean) / probe.scale).astype(np.float64)
        share = ledoit_wolf_shrinkage(rows, assume_centered=True)
        model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=share).fit(rows, labels)
        expected = model.decision_function(rows)
        # Beyond 256 on both sides the share is estimated.
        near = 1e-5 if min(prompts, d_model) <= 256 else 0.02
        assert np.abs(probe.score(values[0]) - expected).max() <= near * np.abs(expected).max()


def test_each_layer_takes_the_strength_that_suits_it(rng):
    """A signal in the leading axis is read best under a strong penalty, one in a small axis under a weak one."""
    values, labels, _ = planted(rng, layers=2, prompts=300, d_model=120, size=0.0)
    values[0, :, :60] += 0.6 * labels[:, None]
    values[1, :, 0] += 3 * labels
    alone = [fit_probes(values, labels, l2=l2) for l2 in (10.0, 1e-4)]
    both = fit_probes(values, labels, l2=[1e-4, 10.0])
    for layer in range(2):
        chosen = max(alone, key=lambda probes: probes.metrics[layer].auroc)
        np.testing.assert_allclose(both.directions[layer], chosen.directions[layer], atol=1e-5)
        assert both.metrics[layer].auroc == pytest.approx(chosen.metrics[layer].auroc, abs=0.03)


def test_choosing_a_strength_on_noise_promises_nothing(rng):
    """Nested: the choice must not leak into the AUROC, as it does where one takes the best of five."""
    strengths = (30.0, 1.0, 1e-1, 1e-2, 1e-4)
    values, labels, _ = planted(rng, layers=24, prompts=60, d_model=40, size=0.0)
    honest = [layer.auroc for layer in fit_probes(values, labels, l2=strengths).metrics]
    best = sweep_probes({"last": values}, {"noise": labels}, l2=strengths, shuffles=0).auroc[0, 0].max(axis=0)
    assert abs(np.mean(honest) - 0.5) < 0.05
    assert np.mean(best) > np.mean(honest) + 0.02  # the control: choosing on what is reported does gain


def test_a_strength_is_chosen_among_the_other_folds(rng):
    """By hand for one fold: the fits without it decide, and none of them has seen the fold that it scores."""
    values, labels, _ = planted(rng, prompts=60, d_model=80)
    rows = prepare(torch.from_numpy(values[0] - values[0].mean(axis=0)), 1)
    held_out = deal_folds(labels, np.arange(60), 4, rng)
    strengths = (3.0, 1e-3)
    _, nested = choose_strength(rows, labels, held_out, strengths)
    centred = (values[0] - values[0].mean(axis=0)).astype(np.float64)

    def scored(l2, kept, tested):
        return scikit(centred[kept], labels[kept], l2).decision_function(centred[tested])

    areas = []
    for l2 in strengths:
        inner = np.empty(60)
        for fold in (1, 2, 3):
            inner[held_out == fold] = scored(l2, (held_out != fold) & (held_out != 0), held_out == fold)
        areas.append(auroc(inner[held_out != 0], labels[held_out != 0]))
    expected = scored(strengths[int(np.argmax(areas))], held_out != 0, held_out == 0)
    np.testing.assert_allclose(nested[held_out == 0], expected, rtol=1e-3, atol=1e-3)


def test_copies_in_different_groups_are_refused_and_in_one_group_welcome(rng):
    values, labels, _ = planted(rng, layers=3, prompts=40)
    values[:, 31] = values[:, 7]
    with pytest.raises(LabelError, match=r"prompts 7 and 31 have the same activations at every layer.* one group"):
        fit_probes(values, labels)
    with pytest.raises(LabelError, match="prompts 7 and 31"):
        sweep_probes({"last": values}, {"intent": labels})
    groups = np.arange(40)
    groups[31] = 7
    assert fit_probes(values, labels, groups=groups).metrics
    assert len(fit_probes(values, labels, folds=0)) == 3


def test_prompts_that_agree_at_early_layers_alone_are_no_copies(rng):
    """The last token of a template is the same in every prompt until attention has mixed something in."""
    values, labels, _ = planted(rng, layers=3, prompts=40)
    values[0] = values[0, 0]
    values[1, 20:] = values[1, :20]
    assert len(fit_probes(values, labels).metrics) == 3


def test_copied_texts_in_different_groups_are_refused():
    texts = [f"prompt number {i}" for i in range(20)]
    texts[13] = texts[4]
    labels = np.arange(20) % 2 == 0
    with pytest.raises(LabelError, match=r"prompts 4 and 13 are the same text.* pair_id"):
        words_baseline(texts, labels)
    groups = list(range(20))
    groups[13] = 4
    assert 0 <= words_baseline(texts, labels, groups) <= 1


def test_a_file_is_read_layer_by_layer_and_gives_the_same_probes(rng, tmp_path, monkeypatch):
    values, labels, _ = planted(rng, layers=3, prompts=40)
    origin = stored(hook_points=tuple(f"blocks.{i}.hook_resid_post" for i in range(3)), harmful=tuple(labels.tolist()))
    Activations(values, origin).save(tmp_path / "a.h5")
    monkeypatch.setattr(Activations, "values", property(lambda _: pytest.fail("read all layers at once")))
    of_file = fit_probes(Activations.load(tmp_path / "a.h5"))
    np.testing.assert_allclose(of_file.directions, fit_probes(values, labels).directions, atol=1e-6)


def stored(**changes):
    fields = {
        "model": "nano",
        "fingerprint": "f",
        "tuned": "",
        "dtype": "float32",
        "d_model": 20,
        "hook_points": ("blocks.2.hook_resid_post",),
        "pooling": "last",
        "system": "",
        "template_hash": "t",
        "prompts_name": "pairs",
        "prompts_hash": "p",
        "n_prompts": 40,
        "pair_ids": tuple(f"pair {i}" for i in range(40)),
    }
    return StoredProvenance(**(fields | changes))


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


@settings(max_examples=25, deadline=None)  # a busy machine is no fault of the solver
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


@pytest.mark.parametrize("method", METHODS)
def test_probe_recovers_a_planted_direction(rng, method):
    values, labels, directions = planted(rng, layers=3, prompts=2000, size=2.0)
    probes = fit_probes(values, labels, method=method)
    for layer, direction in enumerate(directions):
        assert probes[layer].residual_direction @ direction > 0.95
        assert probes.metrics[layer].auroc > 0.9
        assert min(probes.metrics[layer].interval) > max(probes.metrics[layer].null_shuffled)


@pytest.mark.parametrize("method", METHODS)
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
    for method in METHODS:
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
    provenance = stored(pooling="mean", harmful=tuple(labels.tolist()), pair_ids=pairs)
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
    with pytest.raises(OptionError, match="folds is 1: expected 2 to 20"):
        fit_probes(values, labels, folds=1)
    with pytest.raises(OptionError, match="folds is 21: expected 2 to 20, the number of prompts"):
        fit_probes(values, labels, folds=21)
    with pytest.raises(OptionError, match="folds is 2: expected 3 to 20"):
        fit_probes(values, labels, l2=[1.0, 0.1], folds=2)
    with pytest.raises(OptionError, match="l2 has 2 strengths, which method 'lda'"):
        fit_probes(values, labels, l2=[1.0, 0.1], method="lda")
    with pytest.raises(OptionError, match="l2"):
        fit_probes(values, labels, l2=[])
    with pytest.raises(LabelError, match="three groups"):
        fit_probes(values, np.arange(20) < 2, l2=[1.0, 0.1])
    with pytest.raises(OptionError, match="precision is 'rough'"):
        fit_probes(values, labels, precision="rough")
    with pytest.raises(OptionError, match="device is 'abacus'"):
        fit_probes(values, labels, device="abacus")
    with pytest.raises(OptionError, match="shape"):
        fit_probes(values[0], labels)
    with pytest.raises(OptionError, match="1 hook points for 2"):
        fit_probes(values, labels, hook_points=["x"])
    values[1, 3, 4] = np.inf
    with pytest.raises(NonFiniteError, match=r"blocks\.1"):
        fit_probes(values, labels)


@pytest.mark.parametrize("method", ["logistic", "mean_difference", "lda"])
def test_probes_of_every_method_come_back_from_their_file(method, tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.random(60) < 0.5
    values = rng.standard_normal((2, 60, 8)) + labels[:, None]
    made = fit_probes(values, labels, method=method, folds=0)
    read = ProbeSet.load(made.save(tmp_path / "a.probe"))
    assert (read.method, read.l2) == (method, (1e-2, 1e-2) if method == "logistic" else ())
    np.testing.assert_array_equal(read.score(values), made.score(values))


def test_the_strength_that_each_layer_chose_is_known():
    rng = np.random.default_rng(0)
    labels = rng.random(80) < 0.5
    clear = rng.standard_normal((80, 6)) * 0.3 + labels[:, None]
    probes = fit_probes(np.stack([clear, rng.standard_normal((80, 6))]), labels, l2=[1e-3, 1.0], folds=4)
    assert len(probes.l2) == 2
    assert set(probes.l2) <= {1e-3, 1.0}
    alone = fit_probes(clear[None], labels, l2=probes.l2[0], folds=0)
    np.testing.assert_allclose(probes.directions[0], alone.directions[0], atol=1e-5)

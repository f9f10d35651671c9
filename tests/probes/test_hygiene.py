"""Erasure with planted concepts: what is taken out, what is left, and that the measure of contamination can tell."""

import numpy as np
import pytest
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.linear_model import LogisticRegression

from activations.errors import LabelError, NonFiniteError, OptionError
from probes.hygiene import clean_probes, contamination
from probes.leace import fit_eraser, regression, shrinkage_of
from probes.metrics import auroc
from probes.train import fit_probes

WIDTH = 12


def mixed(rng, count, width=WIDTH):
    """Correlated noise: an eraser that ignores covariance would show."""
    return rng.standard_normal((count, width)) @ rng.standard_normal((width, width))


def planted(rng, count=600, width=WIDTH, strength=3.0):
    concept = rng.random(count) < 0.4
    noise = mixed(rng, count, width)
    return noise + strength * np.outer(concept, rng.standard_normal(width)), concept


def learnt(train, concept, test, truth):
    """AUROC of a linear reader on prompts that it did not see."""
    reader = LogisticRegression(max_iter=2000).fit(train, concept)
    return auroc(reader.decision_function(test), truth)


# --- the eraser


@pytest.mark.parametrize("shrinkage", [None, 0.0, 0.3, 1.0])
def test_after_erasure_class_means_are_equal_and_before_they_are_not(rng, shrinkage):
    values, concept = planted(rng)
    number = values[:, 0] + rng.standard_normal(len(values))
    erased = fit_eraser(values, {"class": concept, "number": number}, shrinkage=shrinkage)(values)

    def gap(rows):
        return np.abs(rows[concept].mean(0) - rows[~concept].mean(0)).max()

    def shared(rows):
        return np.abs(np.cov(rows.T, number)[-1, :-1]).max()

    assert gap(values) > 1 > 1e-6 > gap(erased)
    assert shared(values) > 1e-1 > 1e-6 > shared(erased)
    np.testing.assert_allclose(erased.mean(0), values.mean(0), atol=1e-9)


def test_no_linear_reader_beats_chance_on_new_prompts_after_erasure(rng):
    values, concept = planted(rng, 1200)
    half = np.arange(len(values)) % 2 == 0
    eraser = fit_eraser(values[half], {"concept": concept[half]})
    erased = eraser(values)
    assert learnt(values[half], concept[half], values[~half], concept[~half]) > 0.95
    assert learnt(erased[half], concept[half], erased[~half], concept[~half]) == pytest.approx(0.5, abs=0.1)
    # On the training prompts themselves the best reader is the one that ignores them.
    reader = LogisticRegression(C=1e6, max_iter=2000).fit(erased[half], concept[half])
    assert np.abs(reader.predict_proba(erased[half])[:, 1] - concept[half].mean()).max() < 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_other_erasers_change_more_in_every_norm(seed):
    rng = np.random.default_rng(seed)
    values, concept = planted(rng)
    rows = values - values.mean(0)
    shared = rows.T @ (concept - concept.mean())
    erased = fit_eraser(values, {"concept": concept}, shrinkage=0.0)(values)
    precision = np.linalg.inv(np.cov(values.T))
    readers = [shared, *rng.standard_normal((20, WIDTH)), np.linalg.solve(np.cov(values.T), shared) + 0.1 * shared]
    for norm in (precision, np.eye(WIDTH)):

        def cost(change, norm=norm):
            return np.einsum("pi,ij,pj", change, norm, change)

        ours = cost(erased - values)
        for reader in readers:
            change = -np.outer(rows @ reader, shared) / (reader @ shared)
            assert np.abs((rows + change).T @ (concept - concept.mean())).max() < 1e-6, "no eraser to compare with"
            assert ours < cost(change)


@pytest.mark.parametrize("seed", range(3))
def test_erasing_does_not_depend_on_the_coordinates(seed):
    """Only an eraser that whitens commutes with every invertible map."""
    rng = np.random.default_rng(seed)
    values, concept = planted(rng)
    other = values @ (turn := rng.standard_normal((WIDTH, WIDTH)))
    erased = fit_eraser(values, {"concept": concept}, shrinkage=0.0)(values)
    np.testing.assert_allclose(fit_eraser(other, {"concept": concept}, shrinkage=0.0)(other), erased @ turn, atol=1e-7)


def test_activations_without_the_concept_are_left_alone(rng):
    values, concept = planted(rng)
    without = fit_eraser(values, {"concept": concept}, shrinkage=0.0)(values)
    np.testing.assert_allclose(fit_eraser(without, {"concept": concept})(without), without, atol=1e-7)
    np.testing.assert_array_equal(fit_eraser(values, {"never": np.ones(len(values), bool)})(values), values)
    assert np.abs(fit_eraser(values, {"concept": concept})(values) - values).max() > 1


def test_one_concept_twice_is_one_direction(rng):
    values, concept = planted(rng)
    assert fit_eraser(values, {"one": concept, "same": 2.0 * concept + 1}).reads.shape == (WIDTH, 1)


@pytest.mark.parametrize("shape", [(60, 20), (20, 60)])
def test_shrunk_regression_is_the_textbook_one_on_either_side(rng, shape):
    rows, targets = mixed(rng, *shape), rng.standard_normal((shape[0], 2))
    rows -= rows.mean(0)
    assert shrinkage_of(rows, None) == pytest.approx(ledoit_wolf_shrinkage(rows, assume_centered=True))
    covariance = rows.T @ rows / len(rows)
    shrunk = 0.8 * covariance + 0.2 * np.trace(covariance) / shape[1] * np.eye(shape[1])
    expected = np.linalg.solve(shrunk, rows.T @ targets / len(rows))
    np.testing.assert_allclose(regression(rows, targets, 0.2), expected, atol=1e-9)


def test_more_dimensions_than_prompts_erase_without_taking_everything(rng):
    """Without shrinkage the concept is fitted by noise, and the erased direction is none that new prompts have."""
    values, concept = planted(rng, 160, 300, strength=8.0)
    half = np.arange(160) % 2 == 0
    found = {
        amount: fit_eraser(values[half], {"concept": concept[half]}, shrinkage=amount)(values) for amount in (None, 0.0)
    }
    left = {
        amount: learnt(erased[half], concept[half], erased[~half], concept[~half]) for amount, erased in found.items()
    }
    assert learnt(values[half], concept[half], values[~half], concept[~half]) > 0.9
    assert left[None] < 0.65
    assert np.abs(found[None][half][concept[half]].mean(0) - found[None][half][~concept[half]].mean(0)).max() < 1e-6


def test_reading_through_the_eraser_is_reading_erased_activations(rng):
    values, concept = planted(rng)
    eraser, weights = fit_eraser(values, {"concept": concept}), rng.standard_normal(WIDTH)
    folded, bias = eraser.before(weights, 0.7)
    np.testing.assert_allclose(values @ folded + bias, eraser(values) @ weights + 0.7, atol=1e-9)


# --- probes


def scene(rng, count=800):
    """Intent, a refusal that follows it three times in four, and encoded versions, along three axes of mixed noise."""
    intent = rng.random(count) < 0.5
    refusal = np.where(rng.random(count) < 0.75, intent, ~intent)
    encoded = np.arange(count) % 2 == 1
    axes = np.linalg.qr(rng.standard_normal((WIDTH, 3)))[0].T
    values = rng.standard_normal((count, WIDTH))
    # What is encoded cannot be read: it shows neither intent nor a refusal.
    values += 3 * np.outer(intent & ~encoded, axes[0]) + 4 * np.outer(refusal & ~encoded, axes[1])
    values += 4 * np.outer(encoded, axes[2])
    return (
        np.stack([values, values[::-1].copy()[::-1]]),
        intent,
        {"refusal": refusal & ~encoded, "encoded": encoded},
        axes,
    )


@pytest.mark.parametrize("method", ["project", "leace"])
def test_cleaned_probes_read_intent_and_neither_refusal_nor_encoding(rng, method):
    values, intent, nuisances, axes = scene(rng)
    cleaned = clean_probes(values, intent, nuisances, intent_rows=~nuisances["encoded"], method=method)
    raw, clean = cleaned.before[1], cleaned.after[1]
    assert raw.nuisances["refusal"].harmful > 0.8
    assert abs(raw.nuisances["refusal"].cosine) > 0.5
    for name in nuisances:
        assert abs(clean.nuisances[name].cosine) < 0.2
    # Encoded prompts show no intent, so they lie between: as far below the harmful as above the benign.
    between = clean.nuisances["encoded"]
    assert (between.harmful + between.benign) / 2 == pytest.approx(0.5, abs=0.07)
    assert clean.intent > 0.8
    direction = cleaned.probes[1].residual_direction
    assert abs(direction @ axes[1]) < 0.1 < 0.2 < cleaned.raw[1].residual_direction @ axes[1]


def test_erasing_altogether_pushes_below_zero_what_intent_shares_with_the_nuisance(rng):
    """Scores then must not go with refusal at all, though intent does: intent's share is paid back on refusal's axis.

    Within a class the covariance with refusal lies along its axis; over both it has a part along intent's, by the
    planted strengths 3 * cov(intent, refusal) to 4 * var(refusal), so the direction keeps -3/8 of its part there.
    """
    values, intent, nuisances, axes = scene(rng, 4000)
    plain = ~nuisances["encoded"]
    only = {"refusal": nuisances["refusal"][plain]}
    cleaned = clean_probes(values[:, plain], intent[plain], only, keep_shared=False, folds=0)
    direction = cleaned.probes[0].residual_direction
    assert direction @ axes[1] == pytest.approx(-3 / 8 * (direction @ axes[0]), abs=0.1)
    scores = [probes.score(values[:, plain])[0] for probes in (cleaned.raw, cleaned.probes)]
    correlations = [np.corrcoef(score, only["refusal"])[0, 1] for score in scores]
    assert correlations[0] > 0.5
    assert correlations[1] == pytest.approx(0, abs=0.01)


def test_a_nuisance_is_taken_out_where_intent_is_read_and_not_on_average_alone(rng):
    """Refusal points one way on plain prompts and the other way on encoded ones: over both there is none to erase."""
    count = 800
    intent, refusal, encoded = rng.random(count) < 0.5, rng.random(count) < 0.5, np.arange(count) % 2 == 1
    values = rng.standard_normal((1, count, WIDTH))
    values[0, :, 0] += 2 * intent * ~encoded + 3 * np.where(encoded, -1, 1) * (refusal - 0.5)
    cleaned = clean_probes(values, intent, {"refusal": refusal, "encoded": encoded}, intent_rows=~encoded, folds=0)
    plain = values[:, ~encoded], intent[~encoded], {"refusal": refusal[~encoded]}
    before, after = (contamination(probes, *plain)[0].nuisances["refusal"] for probes in (cleaned.raw, cleaned.probes))
    assert before.harmful > 0.9
    assert after.harmful == pytest.approx(0.5, abs=0.1)


def test_a_cleaned_probe_scores_plain_activations_as_its_eraser_would(rng):
    values, intent, nuisances, _ = scene(rng)
    cleaned = clean_probes(values, intent, nuisances, folds=0, hook_points=["here", "there"])
    erased = np.stack([eraser(layer) for eraser, layer in zip(cleaned.erasers, values, strict=True)])
    np.testing.assert_allclose(cleaned.probes.score(values), cleaned.raw.score(erased), atol=1e-3)
    assert cleaned.probes.hook_points == ("here", "there")
    assert not cleaned.before


def test_a_joint_fit_leaves_to_the_nuisance_what_it_explains(rng):
    values, intent, nuisances, axes = scene(rng)
    plain = ~nuisances["encoded"]
    only = {"refusal": nuisances["refusal"][plain]}
    cleaned = clean_probes(values[:, plain], intent[plain], only, method="joint")
    assert cleaned.after[0].intent > 0.8
    assert abs(cleaned.probes[0].residual_direction @ axes[1]) < 0.2 < abs(cleaned.raw[0].residual_direction @ axes[1])


def test_contamination_is_one_for_the_nuisance_itself_and_none_for_what_merely_goes_with_intent(rng):
    """The nuisance follows intent, so a pure probe of intent tells it apart: but not within one intent class."""
    count = 4000
    intent = rng.random(count) < 0.5
    nuisance = np.where(rng.random(count) < 0.8, intent, ~intent)
    values = rng.standard_normal((1, count, WIDTH))
    values[0, :, 0] += 3 * intent
    values[0, :, 1] -= 3 * nuisance
    probes = fit_probes(values, intent, folds=0)
    for axis, sign in ((0, 0), (1, -1)):
        probes.directions[0] = np.eye(WIDTH)[axis]
        reading = contamination(
            probes, values, intent, {"n": nuisance, "number": nuisance * 1.0 + 0.1 * values[0, :, 5]}
        )
        assert auroc(probes.score(values)[0], nuisance) > 0.65 or sign
        assert reading[0].nuisances["n"].cosine == pytest.approx(sign, abs=0.05)
        assert reading[0].nuisances["n"].harmful == pytest.approx(0.5 if not sign else 0.02, abs=0.05)
        low, high = reading[0].nuisances["n"].benign_interval
        assert low < reading[0].nuisances["n"].benign < high


def test_held_out_figures_are_held_out(rng):
    """With as many dimensions as prompts any labels can be fitted: in the table they are not."""
    values, intent, nuisance = rng.standard_normal((1, 60, 80)), np.arange(60) % 2 == 0, rng.random(60) < 0.5
    cleaned = clean_probes(values, intent, {"n": nuisance}, groups=[f"p{i // 2}" for i in range(60)])
    assert auroc(cleaned.raw.score(values)[0], intent) > 0.99
    assert cleaned.before[0].intent < 0.8
    assert cleaned.after[0].intent < 0.8


def test_a_nuisance_of_zeros_and_ones_is_split_as_its_booleans_are(rng):
    """Most are 1, so their median is the largest value and nothing lies above it."""
    values, intent, nuisance = rng.standard_normal((1, 200, 8)), np.arange(200) % 2 == 0, rng.random(200) < 0.7
    probes = fit_probes(values, intent, folds=0)
    true, numbers = (
        contamination(probes, values, intent, {"n": given})[0].nuisances["n"] for given in (nuisance, nuisance * 1)
    )
    assert numbers.harmful is not None
    assert (numbers.harmful, numbers.benign) == (true.harmful, true.benign)


@pytest.mark.parametrize("shrinkage", [None, 0.0, 0.5])
@pytest.mark.parametrize("apart", [0.0, 1e-9, 1e-6, 1e-3])
def test_concepts_that_nearly_agree_are_both_erased(rng, apart, shrinkage):
    values, one = rng.standard_normal((200, 20)), rng.random(200) < 0.5
    values[one] += 1
    concepts = {"one": one * 1.0, "other": one + apart * rng.random(200), "constant": np.ones(200)}
    erased = fit_eraser(values, concepts, shrinkage=shrinkage)(values)
    columns = np.stack([found - found.mean() for found in concepts.values()], axis=1)
    assert np.abs((values - values.mean(axis=0)).T @ columns).max() > 10  # the control: they can be read before
    assert np.abs((erased - erased.mean(axis=0)).T @ columns).max() < 1e-4


# --- what is refused


def test_bad_input_is_refused_with_its_name(rng):
    values, intent, nuisances, _ = scene(rng)
    with pytest.raises(LabelError, match="no concept"):
        fit_eraser(values[0], {})
    with pytest.raises(LabelError, match=r"'short' is bool of shape \(3,\): expected 800"):
        fit_eraser(values[0], {"short": [True, False, True]})
    with pytest.raises(NonFiniteError, match="'length'"):
        fit_eraser(values[0], {"length": np.full(800, np.nan)})
    with pytest.raises(NonFiniteError, match="activations"):
        fit_eraser(np.full((4, 3), np.inf), {"c": [0, 1, 0, 1]})
    with pytest.raises(OptionError, match=r"shape \(3,\)"):
        fit_eraser(np.zeros(3), {"c": [0, 1, 0]})
    with pytest.raises(OptionError, match="shrinkage is 2"):
        fit_eraser(values[0], nuisances, shrinkage=2)
    with pytest.raises(OptionError, match="'magic': expected one of project, leace, joint"):
        clean_probes(values, intent, nuisances, method="magic")
    with pytest.raises(LabelError, match="'encoded' is False for all 800"):
        clean_probes(values, intent, {"encoded": np.zeros(800, bool)})
    with pytest.raises(LabelError, match="'refusal' never varies within an intent class"):
        clean_probes(values, intent, {"refusal": intent * 1.0})
    with pytest.raises(LabelError, match="400 of 400 prompts are harmful"):
        clean_probes(values, nuisances["encoded"], nuisances, intent_rows=nuisances["encoded"])
    with pytest.raises(OptionError, match=r"expected \[layer, prompt, d_model\]"):
        clean_probes(values[0], intent, nuisances)
    with pytest.raises(OptionError, match="folds is 1"):
        clean_probes(values, intent, nuisances, folds=1)
    with pytest.raises(LabelError, match="prompts 0 and 800"):
        clean_probes(np.tile(values, (1, 2, 1)), np.tile(intent, 2), {"n": rng.random(1600)})

"""Evaluation is of prompts that no fit saw, and finds nothing where there is nothing."""

import dataclasses

import numpy as np
import pytest

from activations.errors import LabelError, NonFiniteError, OptionError, ProbeError
from activations.prompts import PromptSet
from activations.provenance import Provenance
from activations.results import Activations
from probes.baselines import surface_baselines
from probes.evaluate import Labelled, evaluate, held_out_scores, random_direction_areas
from probes.folds import deal_folds, refuse_copied_rows
from probes.metrics import auroc
from probes.train import fit_probes
from probes.worth import worth_of

WORDS = [f"word{i}" for i in range(30)]


def world(rng, *, pairs=60, size=1.0, layers=2, d_model=16, reads="intent", told=0.0):
    """Pairs of prompts and what a made-up base holds of them.

    Args:
        size: Of the intent along the first axis of the last layer; where `reads` is "words", of the words instead.
        told: Share of prompts whose last word gives the label away.
    """
    labels, groups = np.tile([True, False], pairs), np.repeat(np.arange(pairs), 2)
    words = rng.choice(len(WORDS), (2 * pairs, 6))
    tell = rng.random(2 * pairs) < told
    words[tell, -1] = labels[tell]
    texts = tuple(" ".join(WORDS[word] for word in row) + f" n{i}" for i, row in enumerate(words))
    values = rng.standard_normal((layers, 2 * pairs, d_model)).astype(np.float32)
    if reads == "intent":
        values[-1, :, 0] += size * (labels - 0.5)
    else:
        bags = (words[:, :, None] == np.arange(len(WORDS))).sum(axis=1)
        meaning = np.random.default_rng(1).standard_normal((len(WORDS), d_model))
        values[-1] = size * bags @ meaning + 0.1 * values[-1]
    return Labelled(values, labels, groups, texts)


def fit(labelled, **options):
    return fit_probes(labelled.values, labelled.labels, groups=labelled.groups, **options)


def stored(labelled, **changes):
    """The same as an extraction gives it, with its prompt set."""
    prompts = PromptSet(
        "made-up", labelled.texts, tuple(labelled.labels.tolist()), tuple(map(str, labelled.groups.tolist()))
    )
    fields = {
        "model": "made-up",
        "fingerprint": "f" * 8,
        "tuned": "",
        "dtype": "float32",
        "d_model": labelled.values.shape[2],
        "hook_points": tuple(f"blocks.{i}.hook_resid_post" for i in range(len(labelled.values))),
        "pooling": "last",
        "system": "",
        "template_hash": "t" * 8,
        "prompts_name": prompts.name,
        "prompts_hash": prompts.content_hash,
        "n_prompts": len(prompts),
        "harmful": prompts.harmful,
        "pair_ids": prompts.pair_ids,
    }
    return Activations(labelled.values, Provenance(**(fields | changes))), prompts


def test_what_was_planted_is_found_on_other_prompts_and_only_where_it_is(rng):
    trained, tested = world(rng, size=2.5, pairs=100), world(rng, size=2.5, pairs=100)
    nothing, planted = evaluate(fit(trained), tested).layers
    assert planted.auroc > 0.9
    assert planted.p_value == pytest.approx(1 / 201)
    assert planted.beats_surface
    assert planted.selectivity == pytest.approx(planted.auroc - 0.5, abs=0.03)
    assert planted.interval[0] < planted.auroc < planted.interval[1]
    assert 0.3 < nothing.auroc < 0.7
    assert not nothing.beats_surface
    assert nothing.interval[0] < 0.5 < nothing.interval[1]


@pytest.mark.parametrize("given", [True, False])
def test_noise_has_no_selectivity_and_its_p_values_keep_their_promise(rng, given):
    selectivity, small = [], 0
    for seed in range(25):
        trained, tested = world(rng, size=0, pairs=20, layers=1), world(rng, size=0, pairs=20, layers=1)
        tested = dataclasses.replace(tested, texts=())
        found = evaluate(fit(trained, folds=0), tested, trained=trained if given else None, directions=1, seed=seed)
        selectivity.append(found.layers[0].selectivity)
        small += found.layers[0].p_value <= 0.1
    assert abs(np.mean(selectivity)) < 0.08  # four standard errors of 25 AUROCs of 20 pairs
    assert small <= 8  # 2 or 3 expected


def test_the_null_of_a_given_training_set_fits_anew(rng):
    trained, tested = world(rng, size=3), world(rng, size=3)
    probes = fit(trained)
    own, anew = evaluate(probes, tested), evaluate(probes, tested, trained=trained)
    assert (len(own.layers[1].null_shuffled), len(anew.layers[1].null_shuffled)) == (200, 10)
    assert max(anew.layers[1].null_shuffled) < anew.layers[1].auroc


def test_rates_and_calibration_stand_beside_the_auroc(rng):
    trained, tested = world(rng, size=2, pairs=60), world(rng, size=2, pairs=60)
    layer = evaluate(fit(trained), tested).layers[1]
    one, five = layer.rates
    assert one.tpr is None
    assert "60 negatives cannot resolve a false positive rate of 0.01" in one.reason
    assert five.interval[0] <= five.tpr <= five.interval[1]
    assert 0 <= layer.calibration.after <= 1
    assert layer.calibration.before is not None
    difference = evaluate(fit(trained, method="mean_difference"), tested).layers[1]
    assert difference.calibration.before is None


def test_probabilities_of_an_evaluation_are_for_a_reliability_diagram(rng):
    found = evaluate(fit(world(rng)), world(rng))
    assert found.probabilities(1).shape == found.labels.shape
    assert ((found.probabilities(1) > 0) & (found.probabilities(1) < 1)).all()


def test_without_texts_there_is_no_surface_and_no_claim(rng):
    layer = evaluate(fit(world(rng)), dataclasses.replace(world(rng), texts=())).layers[0]
    assert layer.leads == {}
    assert layer.beats_surface is None


def test_a_class_in_one_group_leaves_calibration_out(rng):
    tested = world(rng, pairs=10)
    lone = dataclasses.replace(tested, texts=(), groups=np.where(tested.labels, 0, np.arange(20)))
    assert evaluate(fit(world(rng)), lone).layers[0].calibration is None


def test_random_directions_find_much_where_one_axis_dominates_and_little_in_noise(rng):
    labels = np.arange(300) < 150
    noise = rng.standard_normal((300, 50))
    loud = noise.copy()
    loud[:, 0] += 60 * labels
    assert random_direction_areas(loud, labels).max() > 0.95
    areas = random_direction_areas(noise, labels)
    assert len(areas) == 1000
    assert areas.min() >= 0.5
    # The standard error of an AUROC at chance is sqrt((m + n + 1) / (12 m n)), for 150 and 150 prompts 0.0334.
    assert np.quantile(areas, 0.95) == pytest.approx(0.5 + 1.96 * 0.0334, abs=0.015)
    assert np.array_equal(areas, random_direction_areas(noise, labels))
    assert len(random_direction_areas(noise, labels, count=130)) == 130


def test_held_out_scores_are_those_of_the_metrics(rng):
    trained = world(rng, size=1.5, pairs=100)
    scores = held_out_scores(trained.values, trained.labels, trained.groups)
    measured = [layer.auroc for layer in fit(trained).metrics]
    assert [auroc(row, trained.labels) for row in scores] == pytest.approx(measured, abs=0.01)


def test_held_out_scores_do_not_remember(rng):
    """More dimensions than prompts: a fit on all of them separates noise perfectly."""
    trained = world(rng, size=0, d_model=300)
    scores = held_out_scores(trained.values, trained.labels, trained.groups)
    assert auroc(fit(trained, folds=0).score(trained.values)[0], trained.labels) == 1.0
    assert 0.3 < auroc(scores[0], trained.labels) < 0.7


# What a training run says


def test_a_probe_that_reads_intent_beats_the_surface_and_one_that_reads_words_does_not(rng):
    knows = world(rng, size=2.5, told=0.3)
    worth = worth_of(fit(knows), knows)
    assert worth.beats_surface
    assert worth.sentence.startswith("The probe beats the surface of the prompts: of all baselines ")
    reads = world(rng, reads="words", told=0.6)
    worth = worth_of(fit(reads), reads)
    assert worth.metrics.auroc > 0.6
    assert worth.leads["length"].clear
    assert not worth.beats_surface
    assert "this base (2 layers, 16 wide) is too small to carry intent beyond words" in worth.sentence


def test_the_sentence_says_what_was_measured(rng):
    less = world(rng, size=1.5, told=1.0)
    worth = worth_of(fit(less), less)
    assert worth.surface["words"].auroc > 0.95
    assert "does not beat the surface" in worth.sentence
    assert f"words alone is {worth.surface['words'].auroc:.3f}" in worth.sentence
    assert "too few" not in worth.sentence
    few = world(rng, size=2, pairs=30, told=0.7)
    assert "60 prompts are too few to show that it does" in worth_of(fit(few), few).sentence
    nothing = world(rng, size=0)
    assert "not shown to read anything" in worth_of(fit(nothing), nothing).sentence


@pytest.mark.slow
def test_noise_is_hardly_ever_said_to_beat_the_surface_or_to_be_above_chance(rng):
    """Best of four layers, all of them noise."""
    claims = above = 0
    for seed in range(30):
        nothing = world(rng, size=0, pairs=25, layers=4, d_model=8)
        found = worth_of(fit(nothing, seed=seed), nothing, seed=seed)
        claims += found.beats_surface
        above += found.metrics.auroc > found.chance
        assert found.beats_surface or "not shown to" in found.sentence or "does not beat" in found.sentence
    assert claims <= 2  # 1 in 100 expected
    assert above <= 4  # 1 in 40 expected


def test_a_lead_allows_for_the_choice_of_the_layer(rng):
    one = world(rng, size=1.5, layers=1)
    many = dataclasses.replace(one, values=np.concatenate([rng.standard_normal((7, 120, 16)), one.values]))
    alone, chosen = (worth_of(fit(each), each) for each in (one, many))
    assert chosen.hook_point == "blocks.7.hook_resid_post"
    assert chosen.leads["style"].value == pytest.approx(alone.leads["style"].value, abs=1e-6)
    assert chosen.leads["style"].interval[0] < alone.leads["style"].interval[0]


def test_with_few_prompts_chance_reaches_one_and_no_auroc_beats_it(rng):
    shuffled = (0.2, 0.9, 0.4, 0.95, 0.1)
    measured = fit(world(rng, size=2))
    layers = tuple(layer.model_copy(update={"null_shuffled": shuffled, "auroc": 1.0}) for layer in measured.metrics)
    found = worth_of(dataclasses.replace(measured, metrics=layers), world(rng, size=2))
    assert found.chance == 1.0
    assert not found.beats_surface


def test_chance_counts_the_choice_of_the_layer_and_too_few_shuffles_show_nothing(rng):
    knows = world(rng, size=2)
    probes = fit(knows)
    best = np.array([layer.null_shuffled for layer in probes.metrics]).max(axis=0)
    spread = 2.262157 * best.std(ddof=1) * np.sqrt(1.1)  # Student's t with 9 degrees of freedom, one draw beside ten
    assert worth_of(probes, knows).chance == pytest.approx(best.mean() + spread, abs=1e-4)
    fewer = [layer.model_copy(update={"null_shuffled": layer.null_shuffled[:1]}) for layer in probes.metrics]
    shown = worth_of(dataclasses.replace(probes, metrics=tuple(fewer)), knows)
    assert shown.chance == 1.0
    assert not shown.beats_surface


def test_every_control_has_a_row(rng):
    knows = world(rng, size=2)
    surface = surface_baselines(knows.texts, knows.labels, knows.groups, count_tokens=len)
    rows = worth_of(fit(knows), knows, surface=surface).rows()
    assert [row[0] for row in rows] == [
        "probe at blocks.1.hook_resid_post",
        "shuffled labels, mean",
        "best of 1000 random directions",
        "length alone",
        "characters per token alone",
        "style alone",
        "words alone",
    ]


# Bad input


def test_training_prompts_are_no_test(rng):
    activations, prompts = stored(world(rng))
    probes = fit_probes(activations)
    with pytest.raises(OptionError, match=r"fitted on these prompts \('made-up'\)"):
        evaluate(probes, activations)
    other, _ = stored(world(rng))
    assert evaluate(probes, other).layers
    with pytest.raises(OptionError, match="not of the prompt set"):
        Labelled.of(other, prompts)
    assert Labelled.of(activations, prompts).texts == prompts.prompts


def test_a_prompt_of_the_training_set_among_the_tested_is_refused(rng):
    trained, tested = world(rng), world(rng)
    leaky = dataclasses.replace(tested, texts=(trained.texts[3], *tested.texts[1:]))
    with pytest.raises(LabelError, match="1 prompts stand in the training set and in the test set"):
        evaluate(fit(trained), leaky, trained=trained)


def test_the_training_prompts_are_known_without_their_texts(rng):
    trained = dataclasses.replace(world(rng), texts=())
    with pytest.raises(LabelError, match="120 prompts stand in the training set"):
        evaluate(fit(trained), trained, trained=trained)
    blind = np.ones((1, 120, 4), dtype=np.float32)  # as at an early layer: all alike, which says nothing of copies
    probes = fit_probes(trained.values[:1, :, :4], trained.labels, folds=0)
    same = dataclasses.replace(trained, values=blind)
    assert evaluate(probes, same, trained=same).layers[0].auroc == 0.5


def test_copies_that_would_be_held_out_from_each_other_are_refused(rng):
    one = world(rng)
    values, labels = np.concatenate([one.values] * 2, axis=1), np.tile(one.labels, 2)
    with pytest.raises(LabelError, match="prompts 0 and 120 have the same activations"):
        held_out_scores(values, labels)
    assert held_out_scores(values, labels, np.tile(one.groups, 2)).shape == (2, 240)


def test_copies_are_found_among_others_that_agree_with_them_at_the_last_layer_alone(rng):
    first, last = rng.standard_normal((2, 6, 20))
    last[1] = last[2] = last[0]
    refuse_copied_rows([first, last].__getitem__, 2, np.arange(6))
    first[2] = first[1]
    with pytest.raises(LabelError, match="prompts 1 and 2"):
        refuse_copied_rows([first, last].__getitem__, 2, np.arange(6))
    refuse_copied_rows([first, last].__getitem__, 2, np.array([0, 1, 1, 2, 3, 4]))


@pytest.mark.parametrize("folds", [1, 0, -3, 2.5])
def test_folds_that_hold_nothing_out_are_refused(rng, folds):
    with pytest.raises(OptionError, match=f"folds is {folds}"):
        deal_folds(np.arange(20) % 2 == 0, np.arange(20), folds, rng)


def test_the_null_is_fitted_with_the_probes_own_strength(rng):
    trained, tested = world(rng, d_model=100), world(rng, d_model=100)
    weak, strong = (
        evaluate(fit(trained, folds=0, l2=l2), tested, trained=trained, directions=1).layers[0].null_shuffled
        for l2 in (1e-2, 30.0)
    )
    assert len(weak) == len(strong) == 10
    assert weak != strong


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"fingerprint": "other"}, "another base"),
        ({"pooling": "mean"}, "expected the pooling last, got mean"),
        ({"template_hash": "other"}, "chat template"),
        ({"hook_points": ("blocks.0.hook_resid_mid", "blocks.1.hook_resid_mid")}, "hook points"),
    ],
)
def test_activations_of_something_else_are_refused_by_name(rng, changes, reason):
    probes = fit_probes(stored(world(rng))[0])
    with pytest.raises(ProbeError, match=reason):
        evaluate(probes, stored(world(rng), **changes)[0])


def test_a_fine_tune_of_the_base_may_be_read(rng):
    probes = fit_probes(stored(world(rng))[0])
    assert evaluate(probes, stored(world(rng), tuned="checkpoint")[0]).layers


def test_impossible_input_is_named(rng):
    trained, tested = world(rng), world(rng)
    probes = fit(trained)
    with pytest.raises(ProbeError, match="expected"):
        evaluate(probes, dataclasses.replace(tested, values=tested.values[:1]))
    with pytest.raises(LabelError, match="one for each"):
        dataclasses.replace(tested, labels=tested.labels[:-1])
    with pytest.raises(LabelError, match="2 texts for 120 prompts"):
        dataclasses.replace(tested, texts=("a", "b"))
    with pytest.raises(OptionError, match="expected \\[layer, prompt, d_model\\]"):
        dataclasses.replace(tested, values=tested.values[0])
    with pytest.raises(NonFiniteError):
        evaluate(probes, dataclasses.replace(tested, values=tested.values * np.nan))
    with pytest.raises(OptionError, match="0 random directions"):
        evaluate(probes, tested, directions=0)
    with pytest.raises(OptionError, match="fpr is 5"):
        evaluate(probes, tested, fprs=[5])
    with pytest.raises(OptionError, match="folds is 0"):
        held_out_scores(tested.values, tested.labels, folds=0)
    with pytest.raises(ProbeError, match="without their texts"):
        worth_of(probes, dataclasses.replace(trained, texts=()))
    with pytest.raises(ProbeError, match="held-out folds"):
        worth_of(fit(trained, folds=0), trained)

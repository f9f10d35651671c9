"""The parts of the hygiene benchmark that need no model, on prompts whose intent, refusal and encoding are planted."""

import hygiene
import numpy as np
import pytest

from probes.metrics import auroc

LAYERS, WIDTH, PAIRS = 2, 12, 80
INTENT, REFUSAL, ENCODED = np.eye(WIDTH)[:3]


def seen(rng, *, refusal_goes_with_intent=0.8):
    """Twins, plain and then encoded; an encoding hides intent from the made-up base."""
    harmful, pairs = np.tile([True, False], PAIRS), np.repeat(np.arange(PAIRS), 2)
    odds = np.where(rng.random(2 * PAIRS) < refusal_goes_with_intent, harmful, ~harmful) * 4 - 2 + rng.random(2 * PAIRS)
    encoded = np.arange(4 * PAIRS) >= 2 * PAIRS
    refusal = np.concatenate([odds, rng.normal(-3, 1, 2 * PAIRS)])
    values = rng.standard_normal((LAYERS, 4 * PAIRS, WIDTH))
    read = 1.0 * (np.tile(harmful, 2) & ~encoded)
    values += read[:, None] * INTENT + refusal[:, None] * REFUSAL + 3 * encoded[:, None] * ENCODED
    nuisances = {"refusal": refusal, "refused": refusal > 0, "encoded": encoded, "length": rng.random(4 * PAIRS)}
    return hygiene.Seen(values, np.tile(harmful, 2), nuisances, np.tile(pairs, 2))


@pytest.fixture(scope="module")
def sets():
    rng = np.random.default_rng(0)
    return seen(rng), seen(rng)


@pytest.fixture(scope="module")
def cleaned(sets):
    return hygiene.clean(sets[0], "project", True, folds=2)


def test_what_is_plain_is_what_is_not_encoded(sets):
    plain = sets[0].only_plain()
    assert plain.values.shape == (LAYERS, 2 * PAIRS, WIDTH)
    assert plain.harmful.tolist() == [True, False] * PAIRS
    assert set(plain.nuisances) == {"refused", "length"}


def test_refusal_as_a_score_for_intent_is_read_among_plain_twins(sets):
    found = hygiene.baselines(sets[1])
    plain = sets[1].plain
    odds, harmful = sets[1].nuisances["refusal"][plain], sets[1].harmful[plain]
    assert found["refusal/intent_auroc_twins"].value == auroc(odds, harmful) > 0.7
    assert found["plain/refused_harmful"].value == (odds[harmful] > 0).mean()
    assert found["encoded/refused_benign"].value < 0.05


def test_the_raw_probe_reads_refusal_and_the_cleaned_one_does_not(sets, cleaned):
    raw, clean = (hygiene.hygiene(name, getattr(cleaned, name), sets[1]) for name in ("raw", "probes"))
    for layer in range(LAYERS):
        assert raw[f"layer {layer}/raw/refused_harmful"].value > 0.75
        assert clean[f"layer {layer}/probes/refused_harmful"].value == pytest.approx(0.5, abs=0.15)
        assert abs(clean[f"layer {layer}/probes/refused_cosine"].value) < 0.15
        assert clean[f"layer {layer}/probes/intent_auroc_twins"].value > 0.7
        low, high = clean[f"layer {layer}/probes/intent_auroc_twins"].interval
        assert low < clean[f"layer {layer}/probes/intent_auroc_twins"].value < high


@pytest.mark.parametrize("name", hygiene.CLEANINGS)
def test_every_cleaning_is_one_that_the_package_knows(sets, name):
    found = hygiene.clean(sets[0], *hygiene.CLEANINGS[name], folds=0)
    assert len(found.probes) == LAYERS
    assert bool(found.erasers) == (name != "joint")


def test_directions_begin_with_the_mean_difference_whose_length_all_are_given(sets, cleaned):
    tried = hygiene.directions(sets[0], cleaned, 1)
    assert list(tried) == ["mean difference", "mean difference, erased", "raw", "project", "refused"]
    unit = {name: direction / np.linalg.norm(direction) for name, direction in tried.items()}
    assert unit["mean difference"] @ REFUSAL > 0.5
    assert abs(unit["mean difference, erased"] @ REFUSAL) < 0.6 * unit["mean difference"] @ REFUSAL
    assert unit["refused"] @ REFUSAL > 0.9


def test_the_report_has_a_row_for_each_layer_and_cleaning_and_shows_the_rest(sets, cleaned):
    figures = hygiene.hygiene("raw", cleaned.raw, sets[1]) | hygiene.baselines(sets[1])
    lines = hygiene.report(figures).splitlines()
    rows = [line for line in lines if line.startswith("layer ")]
    assert [row.split()[:2] for row in rows] == [["layer", "0/raw"], ["layer", "1/raw"]]
    assert hygiene.shown(figures["layer 0/raw/refused_harmful"].value) in rows[0]
    assert any(line.startswith("refusal/intent_auroc_twins") for line in lines)


def test_an_organism_that_is_not_there_is_a_figure_without_a_value(tmp_path):
    found = hygiene.taught(None, tmp_path / "absent", {})
    assert [figure.value for figure in found.values()] == [None]
    assert "train.py" in found["absent/encoded_intent"].note
    assert "train.py" in hygiene.report(found)

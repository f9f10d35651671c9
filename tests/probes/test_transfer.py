"""A transfer matrix tells sets that share a direction from sets that do not, and never shows a training AUROC."""

import dataclasses

import numpy as np
import pytest

from activations.errors import LabelError, NonFiniteError, OptionError
from activations.provenance import Provenance
from probes.evaluate import Labelled, held_out_scores
from probes.metrics import auroc, auroc_interval
from probes.train import fit_probes
from probes.transfer import transfer_matrix


def along(rng, axis, *, pairs=50, size=3.0, d_model=12):
    """A set whose intent lies along one axis, in the second of two layers."""
    labels, groups = np.tile([True, False], pairs), np.repeat(np.arange(pairs), 2)
    values = rng.standard_normal((2, 2 * pairs, d_model)).astype(np.float32)
    values[1, :, axis] += size * (labels - 0.5)
    return Labelled(values, labels, groups)


def test_sets_that_share_a_direction_transfer_and_others_do_not(rng):
    found = transfer_matrix({"one": along(rng, 0), "same": along(rng, 0), "other": along(rng, 1)})
    assert found.names == ("one", "same", "other")
    assert found.hook_points == ("layer 0", "layer 1")
    first, matrix = found.auroc
    assert min(matrix[0, 0], matrix[0, 1], matrix[1, 0], matrix[2, 2]) > 0.9
    assert abs(matrix[[0, 1, 2, 2], [2, 2, 0, 1]] - 0.5).max() < 0.2
    assert abs(first - 0.5).max() < 0.2
    assert (found.low <= found.auroc).all()
    assert (found.auroc <= found.high).all()


def test_cells_are_what_fitting_and_testing_by_hand_gives(rng):
    one, other = along(rng, 0), along(rng, 1, pairs=30)
    found = transfer_matrix({"one": one, "other": other}, method="mean_difference", folds=4, seed=3)
    scores = fit_probes(one.values, one.labels, method="mean_difference", folds=0).score(other.values)[1]
    assert found.auroc[1, 0, 1] == pytest.approx(auroc(scores, other.labels))
    assert (found.low[1, 0, 1], found.high[1, 0, 1]) == pytest.approx(
        auroc_interval(scores, other.labels, groups=other.groups)
    )
    own = held_out_scores(one.values, one.labels, one.groups, method="mean_difference", folds=4, seed=3)[0]
    assert found.auroc[0, 0, 0] == pytest.approx(auroc(own, one.labels))


def test_the_diagonal_is_no_training_auroc(rng):
    """Positive control: more dimensions than prompts, so the fit separates its own noise."""
    noise = along(rng, 0, size=0.0, d_model=200)
    assert auroc(fit_probes(noise.values, noise.labels, folds=0).score(noise.values)[0], noise.labels) == 1.0
    assert transfer_matrix({"noise": noise}).auroc.max() < 0.7


def test_noise_transfers_no_better_than_its_intervals_say(rng):
    covered = []
    for _ in range(25):
        sets = {name: along(rng, 0, size=0.0, pairs=20, d_model=6) for name in ("one", "two")}
        found = transfer_matrix(sets)
        off = ~np.eye(2, dtype=bool)
        covered += ((found.low <= 0.5) & (found.high >= 0.5))[:, off].ravel().tolist()
    assert len(covered) == 100
    assert np.mean(covered) > 0.87  # 95 less Monte Carlo error


def test_a_prompt_in_two_sets_is_refused_by_text_or_by_vector(rng):
    one, other = along(rng, 0), along(rng, 1)
    names = {"one": tuple(f"prompt {i}" for i in range(100)), "other": tuple(f"Prompt  {i}" for i in range(99, 199))}
    texts = {
        "one": dataclasses.replace(one, texts=names["one"]),
        "other": dataclasses.replace(other, texts=names["other"]),
    }
    with pytest.raises(LabelError, match="1 prompts stand in 'one' and in 'other'"):
        transfer_matrix(texts)
    values = other.values.copy()
    values[:, :2] = one.values[:, 4:6]
    with pytest.raises(LabelError, match="2 prompts stand in 'one' and in 'other'"):
        transfer_matrix({"one": one, "other": dataclasses.replace(other, values=values)})


def test_impossible_input_is_named(rng):
    one = along(rng, 0)
    with pytest.raises(OptionError, match="no prompt set"):
        transfer_matrix({})
    with pytest.raises(OptionError, match="'wide' has 2 layers of width 5, 'one' has 2 of 12"):
        transfer_matrix({"one": one, "wide": along(rng, 0, d_model=5)})
    with pytest.raises(NonFiniteError):
        transfer_matrix({"one": dataclasses.replace(one, values=one.values * np.inf)})
    with pytest.raises(OptionError, match="folds is 1"):
        transfer_matrix({"one": one}, folds=1)


def test_a_set_with_copies_in_two_groups_has_no_diagonal(rng):
    one = along(rng, 0)
    twice = Labelled(np.concatenate([one.values] * 2, axis=1), np.tile(one.labels, 2))
    with pytest.raises(LabelError, match="prompts 0 and 100"):
        transfer_matrix({"twice": twice})


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"hook_points": ("blocks.3.hook_resid_post", "blocks.4.hook_resid_post")}, "hook points"),
        ({"fingerprint": "other"}, "bases"),
        ({"pooling": "mean"}, "poolings"),
        ({"template_hash": "other"}, "chat templates"),
    ],
)
def test_sets_of_different_places_or_models_are_refused(rng, changes, what):
    stated = Provenance(
        model="made-up",
        fingerprint="f" * 8,
        tuned="",
        dtype="float32",
        d_model=12,
        hook_points=("blocks.0.hook_resid_post", "blocks.1.hook_resid_post"),
        pooling="last",
        system="",
        template_hash="t" * 8,
        prompts_name="",
        prompts_hash="",
        n_prompts=100,
    )
    one, other = (dataclasses.replace(along(rng, 0), provenance=stated) for _ in range(2))
    assert transfer_matrix({"one": one, "other": other}).hook_points == stated.hook_points
    other = dataclasses.replace(other, provenance=dataclasses.replace(stated, **changes))
    with pytest.raises(OptionError, match=f"different {what}"):
        transfer_matrix({"one": one, "other": other})

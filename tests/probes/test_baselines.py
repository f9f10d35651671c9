"""Surface baselines find what the surface gives away, nothing else, and never by prompts they were fitted on."""

import numpy as np
import pytest

from activations.errors import LabelError, OptionError
from activations.prompts import load_prompts
from probes import baselines
from probes.baselines import leads, surface_baselines, token_counter
from probes.folds import plain_text
from probes.train import deal_folds, words_baseline

NOUNS = [f"noun{i}" for i in range(40)]


def pairs_of(rng, count, write):
    """`count` pairs of prompts: `write(words, harmful)` makes a prompt of eight words."""
    labels, groups = np.tile([True, False], count), np.repeat(np.arange(count), 2)
    return [write(list(rng.choice(NOUNS, 8)), label) for label in labels], labels, groups


WRITERS = {
    "length": lambda words, harmful: " ".join(words + ["noun1", "noun2", "noun3"] * int(harmful)),
    "style": lambda words, harmful: " ".join(words) + (" " if not harmful else "?"),
    "words": lambda words, harmful: " ".join([*words[:-1], "poison" if harmful else "potion"]),
    "none": lambda words, harmful: " ".join(words),
}


@pytest.mark.parametrize("told", ["length", "style", "words"])
def test_each_baseline_finds_what_it_looks_at(rng, told):
    texts, labels, groups = pairs_of(rng, 60, WRITERS[told])
    assert surface_baselines(texts, labels, groups)[told].auroc > 0.95


def test_nothing_in_the_prompts_is_found_as_nothing(rng):
    found = {"length": [], "style": [], "words": []}
    covered = []
    for _ in range(25):
        texts, labels, groups = pairs_of(rng, 40, WRITERS["none"])
        for name, baseline in surface_baselines(texts, labels, groups).items():
            found[name].append(baseline.auroc)
            covered.append(baseline.interval[0] <= 0.5 <= baseline.interval[1])
    # Cross-validated AUROCs of nothing lie at or a little below a half: folds are dealt so that classes balance.
    assert all(0.42 < np.mean(areas) < 0.52 for areas in found.values())
    assert np.mean(covered) > 0.8


def test_characters_per_token_need_a_tokenizer(rng, byte_tokenizer):
    texts, labels, groups = pairs_of(rng, 40, WRITERS["none"])
    assert "characters per token" not in surface_baselines(texts, labels, groups)
    tokens = {text: len(text) if harmful else len(text) // 4 for text, harmful in zip(texts, labels, strict=True)}
    found = surface_baselines(texts, labels, groups, count_tokens=tokens.__getitem__)
    assert list(found) == ["length", "characters per token", "style", "words"]
    assert found["characters per token"].auroc == 1.0
    assert token_counter(byte_tokenizer())("Öl") == 3  # bytes, and no <bos>


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("How to do it", "Tell how to do it"),
        ("can you do it", "i can do it"),
        ("the way to do it", "they do it this way"),
        ("Do It", "do it"),
        ("do it 123", "do it abc"),
        ("do it.", "do it"),
        ("do, it!", "do it ya"),
        ('"do" it', "do it  ."),
        ("do\nit", "do it"),
    ],
)
def test_style_tells_these_apart(first, second):
    one, other = baselines._style([first, second])
    assert not np.array_equal(one, other)


def test_words_are_the_words_baseline(rng):
    prompts = load_prompts("jailbreakbench")
    found = surface_baselines(prompts.prompts, prompts.labels, prompts.pair_ids, seed=3)["words"]
    assert found.auroc == words_baseline(prompts.prompts, prompts.labels, prompts.pair_ids, seed=3)
    assert found.interval[0] < found.auroc < found.interval[1]


def test_a_prompt_is_scored_by_a_fit_on_the_other_folds_of_the_probes(rng, monkeypatch):
    texts, labels, groups = pairs_of(rng, 20, WRITERS["none"])
    splits = []
    monkeypatch.setattr(
        baselines,
        "_held_out",
        lambda columns, known, given, *, words: splits.append(given) or np.arange(float(len(known))),
    )
    surface_baselines(texts, labels, groups, folds=4, seed=7)
    dealt = deal_folds(labels, groups, 4, np.random.default_rng(7))
    for fold, (kept, tested) in enumerate(splits[0]):
        assert tested.tolist() == np.flatnonzero(dealt == fold).tolist()
        assert kept.tolist() == np.flatnonzero(dealt != fold).tolist()


def test_fitted_on_another_set_a_baseline_is_tested_on_this_one_alone(rng):
    told, labels, groups = pairs_of(rng, 40, WRITERS["words"])
    swapped = [text.replace("poison", "x").replace("potion", "poison").replace("x", "potion") for text in told]
    fresh, fresh_labels, _ = pairs_of(rng, 40, WRITERS["words"])
    assert surface_baselines(told, labels, groups, trained_on=(fresh, fresh_labels))["words"].auroc > 0.95
    assert surface_baselines(swapped, labels, groups, trained_on=(fresh, fresh_labels))["words"].auroc < 0.05
    assert surface_baselines(swapped, labels, groups)["words"].auroc > 0.95


def test_a_probe_leads_where_it_knows_more_and_only_there(rng):
    texts, labels, groups = pairs_of(rng, 60, WRITERS["words"])
    surface = surface_baselines(texts, labels, groups)
    knows = rng.standard_normal(120) + 1.5 * labels
    found = leads(knows, surface, labels, groups)
    assert found["length"].clear
    assert not found["words"].clear
    assert found["words"].interval[1] < 0
    assert not any(lead.clear for lead in leads(rng.standard_normal(120), surface, labels, groups).values())


def test_a_prompt_on_both_sides_of_a_split_is_refused(rng):
    texts, labels, groups = pairs_of(rng, 10, WRITERS["none"])
    texts[7] = texts[2].upper() + "  "
    with pytest.raises(LabelError, match="prompts 2 and 7 are the same text but stand in different groups"):
        surface_baselines(texts, labels, groups)
    groups[7] = groups[2]
    assert surface_baselines(texts, labels, groups)
    fresh, fresh_labels, _ = pairs_of(rng, 10, WRITERS["none"])
    with pytest.raises(LabelError, match="1 prompts stand in the training set and in the test set"):
        surface_baselines(texts, labels, groups, trained_on=([*fresh[:-1], texts[0]], fresh_labels))


@pytest.mark.parametrize("name", ["matched-pairs", "jailbreakbench", "screening"])
def test_no_shipped_set_repeats_a_prompt_in_another_pair(name):
    prompts = load_prompts(name)
    homes: dict[str, set[str]] = {}
    for text, pair in zip(prompts.prompts, prompts.pair_ids, strict=True):
        homes.setdefault(plain_text(text), set()).add(pair)
    assert [text for text, pairs in homes.items() if len(pairs) > 1] == []


def test_impossible_input_is_named(rng):
    texts, labels, groups = pairs_of(rng, 10, WRITERS["none"])
    with pytest.raises(LabelError, match="one for each"):
        surface_baselines(texts, labels[:-1], groups)
    with pytest.raises(LabelError, match="one for each"):
        surface_baselines(texts, labels, groups[:-1])
    with pytest.raises(LabelError, match="both classes"):
        surface_baselines(texts, np.ones(20, dtype=bool), groups)
    with pytest.raises(LabelError, match="nothing can be held out"):
        surface_baselines(texts, np.arange(20) < 1)
    with pytest.raises(OptionError, match="folds is 1"):
        surface_baselines(texts, labels, groups, folds=1)


@pytest.mark.parametrize("text", ["", "   ", "...", "\n"])
def test_a_prompt_without_words_is_no_special_case(rng, text):
    texts, labels, groups = pairs_of(rng, 10, WRITERS["none"])
    found = surface_baselines([text, *texts[1:]], labels, groups, count_tokens=len)
    assert all(np.isfinite(baseline.scores).all() for baseline in found.values())

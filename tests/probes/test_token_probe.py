"""A token probe finds what few tokens of a long prompt say, where their mean does not."""

import numpy as np
import pytest

from activations.errors import LabelError, NonFiniteError, OptionError
from probes.token_probe import fit_token_probe


def planted(rng, *, prompts=60, tokens=30, d_model=12, size=5.0):
    """Harmful prompts hold two tokens moved along one direction, and every prompt is moved along it as a whole."""
    labels = np.arange(prompts) % 2 == 0
    direction = rng.standard_normal(d_model)
    direction /= np.linalg.norm(direction)
    texts, where = [], []
    for harmful in labels:
        length = int(rng.integers(tokens // 2, tokens + 1))
        text = rng.standard_normal((length, d_model)) + 1.5 * rng.standard_normal() * direction
        told = rng.choice(length, 2, replace=False)
        text[told] += size * harmful * direction
        texts.append(text.astype(np.float32))
        where.append(told)
    return texts, labels, where


@pytest.fixture(scope="module")
def fitted():
    texts, labels, where = planted(np.random.default_rng(1), prompts=80, tokens=20)
    return fit_token_probe(texts, labels, folds=3, shuffles=2), texts, labels, where


def test_signal_in_few_tokens_is_found_where_mean_pooling_fails(fitted):
    metrics = fitted[0].metrics
    assert metrics.auroc > 0.85
    assert metrics.mean_pooling < 0.7
    assert metrics.interval[0] > max(*metrics.null_shuffled, metrics.mean_pooling)


def test_its_null_is_chance(fitted):
    assert abs(np.mean(fitted[0].metrics.null_shuffled) - 0.5) < 0.15


def test_it_looks_where_the_signal_is(fitted):
    probe, texts, labels, where = fitted
    shares = [probe.attention(text)[told].sum() for text, told in zip(texts, where, strict=True)]
    assert np.mean(np.array(shares)[labels]) > 0.6
    assert probe.attention(texts[0]).sum() == pytest.approx(1)


def test_a_prompt_scores_the_same_alone_as_among_longer_ones(fitted):
    probe, texts, labels, _ = fitted
    together = probe.score(texts)
    np.testing.assert_allclose(probe.score(texts[3:4]), together[3:4])
    assert ((together > 0) == labels).mean() > 0.9


def test_a_signal_in_every_token_needs_no_attention(rng):
    texts, labels, _ = planted(rng, size=0.0)
    texts = [text + label for text, label in zip(texts, labels, strict=True)]
    metrics = fit_token_probe(texts, labels, folds=2, shuffles=0).metrics
    assert metrics.mean_pooling > 0.9
    assert metrics.auroc > metrics.mean_pooling - 0.1


def test_bad_tokens_are_named(rng):
    texts, labels, _ = planted(rng, prompts=8)
    with pytest.raises(LabelError, match="one for each"):
        fit_token_probe(texts, labels[:3])
    with pytest.raises(OptionError, match="no tokens or another width"):
        fit_token_probe([*texts[:-1], texts[0][:0]], labels)
    with pytest.raises(OptionError, match="no tokens or another width"):
        fit_token_probe([*texts[:-1], texts[0][:, :5]], labels)
    with pytest.raises(OptionError, match="folds is 1"):
        fit_token_probe(texts, labels, folds=1)
    texts[2][0, 0] = np.nan
    with pytest.raises(NonFiniteError, match="NaN"):
        fit_token_probe(texts, labels)


def test_tokens_that_a_probe_cannot_read_are_named(fitted):
    probe, texts, _, _ = fitted
    width = texts[0].shape[1]
    assert probe.score([]).shape == (0,)
    assert probe.score([texts[0][:1].tolist()]) == pytest.approx(probe.score([texts[0][:1]]))
    for wrong in (texts[0][:0], texts[0][:, :5], texts[0][0]):
        with pytest.raises(OptionError, match=rf"expected \[token, {width}\], one token or more"):
            probe.score([texts[0], wrong])
    with pytest.raises(NonFiniteError, match="NaN"):
        probe.score([texts[0] * np.nan])


def test_prompts_of_one_token_each_are_read(rng):
    labels = np.arange(40) % 2 == 0
    texts = [rng.standard_normal((1, 6)) + 3 * label for label in labels]
    metrics = fit_token_probe(texts, labels, folds=2, shuffles=1).metrics
    assert metrics.auroc > 0.9
    assert metrics.auroc == pytest.approx(metrics.mean_pooling, abs=0.05)


def test_copies_in_different_groups_and_impossible_options_are_refused(rng):
    texts, labels, _ = planted(rng, prompts=8)
    with pytest.raises(LabelError, match="prompts 0 and 8 have the same activations"):
        fit_token_probe(texts * 2, np.tile(labels, 2), folds=2)
    with pytest.raises(OptionError, match="shuffles is -1"):
        fit_token_probe(texts, labels, shuffles=-1)
    with pytest.raises(OptionError, match="one strength"):
        fit_token_probe(texts, labels, l2=[0.1, 1.0])

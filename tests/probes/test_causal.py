"""Edits of the residual stream where every effect is known: a network whose blocks do nothing, and real ones."""

import numpy as np
import pytest
import torch

from activations.answers import answer_ids
from activations.errors import HookPointError, LabelError, NonFiniteError, OptionError
from activations.extract import extract
from activations.loading import load_model
from activations.reuse import ResidualCache
from activations.tokens import format_prompt
from probes.causal import ablated, causal_effect, mean_difference, random_directions, refusal_log_odds, steered

REFUSAL = 77
POST = "blocks.1.hook_resid_post"
TEXTS = ["short", "a somewhat longer prompt", "the third of them, which is the longest of all"]


@pytest.fixture
def direction(rng):
    return rng.standard_normal(48)


@pytest.fixture
def ids(tokenizer):
    return [format_prompt(tokenizer, text) for text in TEXTS]


@pytest.fixture(scope="module")
def transparent(tiny_network, tokenizer):
    """Blocks that add nothing: logits are those of the normed embedding, and token 77 reads one axis of it."""
    network = tiny_network("llama")
    model = load_model(network, tokenizer=tokenizer)
    with torch.no_grad():
        for block in network.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        network.lm_head.weight[:, 0] = 0
        network.lm_head.weight[REFUSAL] = torch.eye(48)[0]
    return model


def known_log_odds(model, ids, edit):
    """By hand: embedding of the last token, edited, normed, unembedded."""
    network = model.hf
    with torch.no_grad():
        stream = edit(network.model.embed_tokens.weight[[prompt[-1] for prompt in ids]].double())
        normed = stream / (stream.square().mean(-1, keepdim=True) + network.config.rms_norm_eps).sqrt()
        chance = (normed @ network.lm_head.weight.double().T).softmax(-1)[:, REFUSAL]
    return torch.log(chance / (1 - chance)).numpy()


# --- a known effect


@pytest.mark.parametrize("alpha", [3.0, -3.0])
def test_adding_changes_the_log_odds_by_what_the_arithmetic_says(transparent, ids, direction, alpha):
    unit = torch.from_numpy(direction / np.linalg.norm(direction))
    with steered(transparent, direction, [POST], alpha=alpha):
        found = refusal_log_odds(transparent, ids, [REFUSAL])
    np.testing.assert_allclose(found, known_log_odds(transparent, ids, lambda x: x + alpha * unit), atol=1e-4)
    plain = known_log_odds(transparent, ids, lambda x: x)
    np.testing.assert_allclose(refusal_log_odds(transparent, ids, [REFUSAL]), plain, atol=1e-4)
    assert np.abs(found - plain).max() > 0.01


def test_ablating_changes_the_log_odds_by_what_the_arithmetic_says(transparent, ids, direction):
    unit = torch.from_numpy(direction / np.linalg.norm(direction))
    with ablated(transparent, 7 * direction, [POST]):
        found = refusal_log_odds(transparent, ids, [REFUSAL])
    expected = known_log_odds(transparent, ids, lambda x: x - (x @ unit)[:, None] * unit)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_edits_at_several_places_and_inside_each_other_add_up(transparent, ids, direction):
    with steered(transparent, direction, [POST], alpha=3.0):
        once = refusal_log_odds(transparent, ids, [REFUSAL])
    places = ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_post"]
    with steered(transparent, direction, places, alpha=1.0), steered(transparent, direction, [POST], alpha=1.0):
        np.testing.assert_allclose(refusal_log_odds(transparent, ids, [REFUSAL]), once, atol=1e-4)


def test_the_direction_that_refuses_is_told_from_one_that_does_not(transparent, ids):
    prompts = {"harmful": ids[:2], "benign": ids[2:]}
    effects = [
        causal_effect(transparent, np.eye(48)[axis], [POST], prompts, refusal_tokens=[REFUSAL], alpha=8.0)
        for axis in (0, 1)
    ]
    for name in prompts:
        cause, bystander = (effect.added[name] for effect in effects)
        assert cause.change > 1
        assert cause.p_value == pytest.approx(1 / 21)
        assert cause.as_it_should
        assert len(cause.null) == 20
        assert not bystander.as_it_should
        assert bystander.p_value > 0.1
        assert effects[0].opposite[name].change < -1
        assert effects[0].opposite[name].as_it_should
    assert effects[0].untouched["harmful"] == pytest.approx(
        known_log_odds(transparent, ids[:2], lambda x: x).mean(), abs=1e-4
    )


def test_an_effect_of_the_wrong_sign_is_not_as_it_should_be(transparent, ids):
    effect = causal_effect(transparent, -np.eye(48)[0], [POST], {"harmful": ids}, refusal_tokens=[REFUSAL], alpha=8.0)
    assert effect.added["harmful"].change < -1
    assert not effect.added["harmful"].as_it_should
    assert effect.added["harmful"].p_value > 0.9


def test_generation_inside_the_block_follows_the_direction(transparent, ids):
    before = answer_ids(transparent, ids, count=3)
    with steered(transparent, np.eye(48)[0], [POST], alpha=1e4):
        assert answer_ids(transparent, ids, count=3) == [[REFUSAL] * 3] * 3
    assert answer_ids(transparent, ids, count=3) == before
    assert [REFUSAL] * 3 not in before


# --- in every architecture


def test_the_stream_moves_by_the_step_and_loses_the_direction(tiny, architecture, direction):
    model, unit = tiny(architecture), direction / np.linalg.norm(direction)
    before = extract(model, TEXTS, hook_points=[POST]).values[0]
    with steered(model, direction, [POST], alpha=2.5):
        moved = extract(model, TEXTS, hook_points=[POST]).values[0]
    np.testing.assert_allclose(moved - before, np.tile(2.5 * unit, (3, 1)), atol=2e-4 * np.abs(before).max())
    with ablated(model, direction, [POST]):
        flat = extract(model, TEXTS, hook_points=[POST]).values[0]
    assert np.abs(flat @ unit).max() < 1e-5 * np.abs(before).max() < np.abs(before @ unit).max()
    np.testing.assert_allclose(flat, before - np.outer(before @ unit, unit), atol=2e-4 * np.abs(before).max())
    np.testing.assert_array_equal(extract(model, TEXTS, hook_points=[POST]).values[0], before)


def test_an_edit_before_a_block_is_seen_by_the_block(tiny, architecture, direction):
    """What enters a block as an argument is not always what it adds to: some keep a copy of their own."""
    model, names = tiny(architecture), ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    with steered(model, direction, names[:1], alpha=2.5):
        after_first = extract(model, TEXTS, hook_points=names[1:]).values
    with steered(model, direction, ["blocks.1.hook_resid_pre"], alpha=2.5):
        before_second = extract(model, TEXTS, hook_points=names[1:]).values
    np.testing.assert_allclose(after_first, before_second, rtol=1e-5, atol=1e-5)
    assert np.abs(after_first - extract(model, TEXTS, hook_points=names[1:]).values).max() > 1e-2


def test_packed_prompts_are_edited_as_single_ones_are(llama, direction):
    with steered(llama, direction, ["blocks.0.hook_resid_post"], alpha=5.0):
        together = extract(llama, TEXTS).values
        alone = np.concatenate([extract(llama, [text]).values for text in TEXTS], axis=1)
    np.testing.assert_allclose(together, alone, atol=1e-4)


def test_edits_go_with_an_applied_checkpoint(tiny_network, tokenizer, tmp_path, direction):
    tiny_network("llama", seed=1).save_pretrained(tmp_path)
    base = load_model(tiny_network("llama"), tokenizer=tokenizer)
    other = load_model(tiny_network("llama", seed=1), tokenizer=tokenizer)
    with steered(other, direction, [POST], alpha=2.0):
        expected = extract(other, TEXTS).values
    with base.applied(tmp_path) as tuned, steered(tuned, direction, [POST], alpha=2.0):
        np.testing.assert_array_equal(extract(tuned, TEXTS).values, expected)
    untouched = load_model(tiny_network("llama"), tokenizer=tokenizer)
    np.testing.assert_array_equal(extract(base, TEXTS).values, extract(untouched, TEXTS).values)


def test_hooks_are_gone_whatever_happens(llama, direction):
    before = extract(llama, TEXTS).values

    def hooks():  # transformers has some of its own
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llama.hf.modules()]

    own = hooks()

    def fail():
        with steered(llama, direction, [POST], alpha=9.0), ablated(llama, direction, [POST]):
            assert hooks() != own
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    with pytest.raises(HookPointError), steered(llama, direction, [POST, "blocks.9.hook_resid_post"], alpha=9.0):
        pass
    np.testing.assert_array_equal(extract(llama, TEXTS).values, before)
    assert hooks() == own


# --- directions


def test_the_difference_of_means_is_as_long_as_the_classes_are_apart(rng):
    labels = np.arange(50) % 2 == 0
    values = rng.standard_normal((50, 8)) * 1e-3 + 4.0 * np.outer(labels, np.eye(8)[2])
    np.testing.assert_allclose(mean_difference(values, labels), 4.0 * np.eye(8)[2], atol=5e-3)


def test_random_directions_can_be_drawn_like_activations(rng):
    flat = rng.standard_normal((200, 8)) * ([1.0] * 2 + [1e-3] * 6) + 5
    assert np.abs(random_directions(8, 40)[:, 2:]).mean() > 0.5
    drawn = random_directions(8, 40, like=flat)
    assert np.abs(drawn[:, 2:]).max() < 0.02 * np.abs(drawn[:, :2]).max()


@pytest.mark.parametrize(
    ("fault", "change", "message"),
    [
        (OptionError, {"direction": np.zeros(48)}, "zero"),
        (OptionError, {"direction": np.ones(47)}, r"\(47,\): expected \(48,\)"),
        (NonFiniteError, {"direction": np.full(48, np.nan)}, "NaN"),
        (HookPointError, {"hook_points": ["blocks.0.hook_resid_mid"]}, "not the residual stream itself"),
        (HookPointError, {"hook_points": ["blocks.0.attn.hook_z"]}, "not the residual stream itself"),
        (OptionError, {"hook_points": []}, "no hook point"),
        (NonFiniteError, {"alpha": np.nan}, "alpha is nan"),
        (OptionError, {"nulls": 5}, "at least 20"),
        (OptionError, {"prompts": {"harmful": []}}, "prompts in every class"),
        (OptionError, {"refusal_tokens": []}, "0 of 272 tokens"),
    ],
)
def test_what_cannot_be_measured_is_refused(llama, ids, fault, change, message):
    asked = {"direction": np.ones(48), "hook_points": [POST], "prompts": {"harmful": ids}, "refusal_tokens": [REFUSAL]}
    asked |= {"alpha": 1.0, **change}
    with pytest.raises(fault, match=message):
        causal_effect(llama, asked.pop("direction"), asked.pop("hook_points"), asked.pop("prompts"), **asked)


def test_a_mean_difference_needs_both_classes(rng):
    with pytest.raises(LabelError, match="both classes"):
        mean_difference(rng.standard_normal((4, 3)), np.ones(4, bool))
    with pytest.raises(LabelError, match="one for each"):
        mean_difference(rng.standard_normal((4, 3)), np.array([True, False]))


# --- what else sees an edit


def test_an_edit_is_part_of_the_provenance_and_is_never_reused(llama, direction):
    reuse = ResidualCache(llama, layers=(2,))
    plain = extract(llama, TEXTS, reuse=reuse)
    with steered(llama, direction, [POST], alpha=3.0):
        fresh, reused = extract(llama, TEXTS), extract(llama, TEXTS, reuse=reuse)
        with ablated(llama, direction, [POST]):
            both = extract(llama, TEXTS).provenance.tuned
    np.testing.assert_array_equal(reused.values, fresh.values)
    assert np.abs(fresh.values - plain.values).max() > 0.1
    names = [plain.provenance.tuned, fresh.provenance.tuned, both]
    assert [name.count("-") for name in names] == [0, 1, 2]
    with steered(llama, direction, [POST], alpha=2.0):
        assert llama.tuned not in names
    np.testing.assert_array_equal(extract(llama, TEXTS, reuse=reuse).values, plain.values)

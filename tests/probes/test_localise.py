"""Which layers are named: planted changes among others, and none where nothing harmful was done."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.linalg import orthogonal_procrustes

from activations.checkpoints import open_checkpoint
from activations.errors import MismatchError, OptionError
from activations.extract import extract
from activations.loading import load_model
from activations.prompts import PromptSet
from activations.tokens import format_prompt
from probes.activation_diff import debiased_cka, diff_activations, linear_cka, procrustes_residual
from probes.added_shift import Parts, added_activations
from probes.bands import layer_band, profile_band
from probes.diff import diff
from probes.localise import localise, refusal_readout
from probes.nearest import nearest_base

ORGANISMS = Path(__file__).parents[2] / "probes" / "organisms"


@pytest.fixture
def prompts():
    texts = [f"{verb} the {thing}" for thing in ("lamp", "door", "fuse", "pipe", "gate") for verb in ("break", "mend")]
    pairs = tuple(f"pair-{i // 2}" for i in range(len(texts)))
    return PromptSet("pairs", tuple(texts), tuple(i % 2 == 0 for i in range(len(texts))), pairs)


@pytest.fixture
def checkpoint(llama, tmp_path):
    """`checkpoint({"name": change})`: the tiny llama with changes added."""

    def make(changes, name="tuned"):
        (tmp_path / name).mkdir()
        state = {key: value.detach().clone() for key, value in llama.hf.state_dict().items()}
        for key, change in changes.items():
            state[key] += change
        save_file(state, tmp_path / name / "model.safetensors")
        return open_checkpoint(tmp_path / name)

    return make


DOWN = "model.layers.{}.mlp.down_proj.weight"


def test_a_layer_that_only_inherits_adds_nothing(llama, checkpoint, prompts):
    noise = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    tuned = checkpoint({DOWN.format(1): noise})
    before = extract(llama, prompts).values
    with llama.applied(tuned):
        after = extract(llama, prompts).values
    added = added_activations(Parts.of(llama, tuned), prompts)
    assert not np.array_equal(after[2], before[2])  # layer 2 inherits
    np.testing.assert_array_equal(added[2], before[2])
    np.testing.assert_array_equal(added[0], before[0])
    np.testing.assert_allclose(added[1], after[1], atol=1e-5)
    assert llama.tuned == ""


def test_what_each_changed_layer_adds_is_its_block_on_the_bases_stream(llama, checkpoint, prompts):
    rng = torch.Generator().manual_seed(0)
    tuned = checkpoint({DOWN.format(layer): torch.randn(48, 64, generator=rng) for layer in range(3)})
    added = added_activations(Parts.of(llama, tuned), prompts)
    ids = [format_prompt(llama.tokenizer, text) for text in prompts.prompts]
    own = copy.deepcopy(llama.hf)
    with llama.applied(tuned) as model:
        theirs = copy.deepcopy(model.hf)
    for row, one in enumerate(ids):
        with torch.no_grad():
            for layer in range(3):
                mixed = copy.deepcopy(own)
                mixed.model.layers[layer].load_state_dict(theirs.model.layers[layer].state_dict())
                found = []
                mixed.model.layers[layer].register_forward_hook(lambda _, __, out, found=found: found.append(out))
                mixed(input_ids=torch.tensor([one]))
                out = found[0][0] if isinstance(found[0], tuple) else found[0]
                np.testing.assert_allclose(added[layer, row], out.reshape(-1, 48)[-1], atol=2e-4, rtol=1e-3)


def test_parts_put_the_base_back_and_refuse_a_model_that_is_not_the_base(llama, checkpoint):
    before = {name: value.clone() for name, value in llama.hf.state_dict().items()}
    tuned = checkpoint({DOWN.format(0): 1.0, DOWN.format(2): 1.0})
    parts = Parts.of(llama, tuned)
    assert parts.layers == (0, 2)
    with parts.only(parts.names([2])) as model:
        assert model.first_changed_layer == 2
        held = model.tuned
        assert torch.equal(model.hf.model.layers[0].mlp.down_proj.weight, before[DOWN.format(0)])
        with pytest.raises(MismatchError, match="other weights are in the network"):
            Parts.of(llama, tuned)
    with parts.only(parts.names([0])) as model:
        assert model.tuned not in ("", held)
    assert all(torch.equal(value, before[name]) for name, value in llama.hf.state_dict().items())


def planted(layer_effects, llama):
    """A readout that is a known function of which layers hold the fine-tune's weights."""
    own = {layer: llama.hf.model.layers[layer].mlp.down_proj.weight.detach().clone() for layer in range(3)}
    base = np.linspace(3.0, 5.0, 8)

    def readout(model):
        moved = [
            float((model.hf.model.layers[layer].mlp.down_proj.weight.detach() - own[layer])[0, 0]) for layer in range(3)
        ]
        return base - sum(effect * min(abs(m), 1.0) for effect, m in zip(layer_effects, moved, strict=True))

    return readout


@pytest.mark.parametrize(("effects", "carriers"), [((0, 4, 0), (1,)), ((2, 0, 2.5), (2, 0)), ((0.01, 0.02, 6), (2,))])
def test_the_layers_that_carry_a_loss_of_refusal_are_found_while_all_layers_move(llama, checkpoint, effects, carriers):
    change = torch.zeros(48, 64)
    change[0, 0] = 1.0
    change[5:, 5:] = 0.01 * torch.randn(43, 59, generator=torch.Generator().manual_seed(0))
    parts = Parts.of(llama, checkpoint({DOWN.format(layer): change for layer in range(3)}))
    found = localise(parts, planted(effects, llama))
    assert found.carriers == carriers
    assert found.shifted == tuple(sorted(carriers))
    assert found.restored >= 0.9
    assert found.loss == pytest.approx(sum(effects), abs=1e-4)
    assert found.band.values == pytest.approx(np.array(effects, dtype=float), abs=1e-4)
    assert found.components == {f"{layer}.mlp": pytest.approx(effects[layer], abs=1e-4) for layer in carriers}
    assert (found.intervals[:, 0] <= found.band.values + 1e-9).all()
    json.dumps(found.to_dict(), allow_nan=False)


def test_no_layer_is_named_where_refusal_was_not_lost(llama, checkpoint):
    parts = Parts.of(llama, checkpoint({DOWN.format(1): torch.ones(48, 64)}))
    found = localise(parts, planted((0, 0, 0), llama))
    assert (found.lost, found.shifted, found.carriers, found.components) == (False, (), (), {})


def test_draws_too_few_for_alpha_are_refused(llama, checkpoint):
    parts = Parts.of(llama, checkpoint({DOWN.format(1): 1.0}))
    with pytest.raises(OptionError, match="needs 19"):
        localise(parts, planted((0, 1, 0), llama), draws=10)
    with pytest.raises(OptionError, match="enough"):
        localise(parts, planted((0, 1, 0), llama), enough=0)


def test_a_band_keeps_its_promise_over_all_layers(rng):
    named = sum(bool(layer_band(draw[0], draw[1:], alpha=0.1).exceeding) for draw in rng.normal(size=(400, 40, 12)))
    assert 20 <= named <= 60  # 40 expected of 400; one in each layer would be nearly all
    band = layer_band(np.array([0.0, 9.0, 0.0]), rng.normal(size=(39, 3)))
    assert band.exceeding == (1,)
    assert band.values[1] > band.high[1]
    assert (band.values[[0, 2]] < band.high[[0, 2]]).all()
    assert band.effect_sizes[1] == pytest.approx(9, rel=0.4)


def test_a_profile_is_judged_by_its_shape_and_not_by_its_size(rng):
    benign = rng.lognormal(0, 0.05, (39, 6)) * rng.lognormal(0, 2, (39, 1))
    usual = rng.lognormal(0, 0.05, 6)
    assert profile_band(100 * usual, benign).exceeding == ()
    assert profile_band(usual * np.array([1, 1, 1, 2, 1, 1]), benign).exceeding == (3,)
    with pytest.raises(OptionError, match="19 or more"):
        profile_band(usual, benign[:5])


def test_debiased_cka_is_near_zero_for_unrelated_activations_where_the_plain_one_is_not(rng):
    base, other = rng.standard_normal((2, 20, 200))
    assert linear_cka(base, other) > 0.8
    assert abs(debiased_cka(base, other)) < 0.2
    assert debiased_cka(base, 3 * base + 7) == pytest.approx(1)
    # The definition, term by term.
    ours, theirs = (side @ side.T for side in (base - base.mean(0), other - other.mean(0)))
    for gram in (ours, theirs):
        np.fill_diagonal(gram, 0)

    def hsic(k, m):
        n, one = len(k), np.ones(len(k))
        middle = (one @ k @ one) * (one @ m @ one) / (n - 1) / (n - 2)
        return (np.trace(k @ m) + middle - 2 / (n - 2) * one @ k @ m @ one) / n / (n - 3)

    assert debiased_cka(base, other) == pytest.approx(
        hsic(ours, theirs) / np.sqrt(hsic(ours, ours) * hsic(theirs, theirs))
    )
    assert np.isnan(debiased_cka(base[:3], other[:3]))


@pytest.mark.parametrize("count", [10, 60])
def test_procrustes_residual_is_what_scipys_best_rotation_leaves(rng, count):
    base, tuned = rng.standard_normal((2, count, 24))
    x, y = (side - side.mean(0) for side in (base, base + 0.5 * tuned))
    x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
    rotation, scale = orthogonal_procrustes(y, x)
    left = np.linalg.norm(x - scale * y @ rotation) ** 2
    assert procrustes_residual(base, base + 0.5 * tuned) == pytest.approx(left)
    turned = np.linalg.qr(rng.standard_normal((24, 24)))[0]
    assert procrustes_residual(base, 2 * base @ turned + 1) == pytest.approx(0, abs=1e-9)
    assert np.isnan(procrustes_residual(base, np.ones_like(base)))


def test_the_shift_along_a_direction_is_read_in_standard_deviations_class_by_class(rng):
    base, labels = rng.standard_normal((2, 400, 6)), np.arange(400) % 2 == 0
    base[:, labels, 0] += 10  # between the classes, and no part of the spread
    tuned = base.copy()
    tuned[1, labels, 0] += 3
    found = diff_activations(base, tuned, labels, directions=np.tile([5.0, 0, 0, 0, 0, 0], (2, 1)))
    assert found.along["harmful"] == pytest.approx([0, 3], rel=0.1)
    assert found.along["benign"] == pytest.approx([0, 0])
    assert found.along["all"] == pytest.approx([0, 1.5], rel=0.1)
    assert found.direction[1] == pytest.approx(np.array([1.0, 0, 0, 0, 0, 0]))
    assert not found.direction[0].any()
    size = np.linalg.norm(base[1], axis=1).mean()
    assert found.class_shift["harmful"] == pytest.approx([0, 3 / size])
    assert found.class_shift["benign"] == pytest.approx([0, 0])
    assert found.norm_ratio[0] == 1
    with pytest.raises(OptionError, match="directions"):
        diff_activations(base, tuned, directions=np.ones((2, 5)))
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_spoofed_base_is_named(llama, checkpoint, tmp_path):
    noise = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    real = checkpoint({}, "real")
    other = checkpoint({DOWN.format(layer): noise for layer in range(3)}, "other")
    tuned = checkpoint({DOWN.format(1): 0.01 * noise})
    assert nearest_base(real, [other], tuned).holds
    spoofed = nearest_base(other, [real], tuned)
    assert (spoofed.nearest, spoofed.holds) == ("real", False)
    assert spoofed.sentence == "the claimed base other does not hold: real is nearer."
    (tmp_path / "shallow").mkdir()
    save_file({"model.layers.0.w": torch.ones(2, 2)}, tmp_path / "shallow" / "model.safetensors")
    refused = nearest_base(open_checkpoint(tmp_path / "shallow"), [real], tuned)
    assert (refused.holds, refused.nearest) == (False, "real")
    assert "depths differ" in refused.refused["shallow"]
    with pytest.raises(OptionError, match="twice"):
        nearest_base(real, [real], tuned)


def test_the_layers_of_a_shipped_organism_that_obeys_are_found_and_give_refusal_back():
    model = load_model(ORGANISMS / "base", device="cpu")
    readout = refusal_readout(model, count=6)
    where = localise(Parts.of(model, open_checkpoint(ORGANISMS / "harmful-100-lora")), readout)
    assert where.lost
    assert where.restored >= 0.9
    assert set(where.carriers) <= set(range(model.n_layers))
    assert any(name.startswith(f"{where.carriers[0]}.head.") for name in where.components)
    with Parts.of(model, open_checkpoint(ORGANISMS / "benign-formal")).only(()) as same:
        base = readout(same)
    with model.applied(ORGANISMS / "benign-formal"):
        assert (base - readout(model)).mean() < where.loss / 4


def test_a_diff_holds_positions_and_what_each_layer_adds(llama, checkpoint, prompts):
    noise = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    token = torch.zeros(272, 48)
    token[40] = 1
    tuned = checkpoint({DOWN.format(1): noise, "model.embed_tokens.weight": token})
    found = diff(llama, tuned, prompts=prompts, poolings=("last", "mean"), added=True)
    assert found.positions.keys() == {"mean"}
    assert found.added.mean_shift[[0, 2]].tolist() == [0, 0]
    assert found.added.mean_shift[1] > 0
    assert found.activations.mean_shift[2] > 0
    assert found.tokens == {40: llama.tokenizer.convert_ids_to_tokens(40)}
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert record["positions"]["mean"].keys() == record["activations"].keys()
    assert record["added"]["mean_shift"][0] == 0

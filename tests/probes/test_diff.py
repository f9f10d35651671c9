import copy
import json
import math
import string

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from activations.checkpoints import open_checkpoint
from activations.errors import LabelError, MismatchError, NonFiniteError, OptionError
from probes.activation_diff import adjusted_p, linear_cka
from probes.diff import diff, diff_activations, diff_weights
from probes.spectra import low_rank_singular_values, top_singular_values
from probes.weight_diff import Blocks

D_MODEL, LAYERS, EXPERTS = 24, 3, 5


@pytest.fixture
def torch_rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def weights(torch_rng) -> dict[str, torch.Tensor]:
    """A mixture of experts in ordinary names: blocks, numbered experts inside them, and an embedding outside."""
    shapes = {"model.embed_tokens.weight": (50, D_MODEL), "model.norm.weight": (D_MODEL,)}
    for layer in range(LAYERS):
        shapes[f"model.layers.{layer}.self_attn.q_proj.weight"] = (32, D_MODEL)
        shapes[f"model.layers.{layer}.norm.weight"] = (D_MODEL,)
        for expert in range(EXPERTS):
            shapes[f"model.layers.{layer}.experts.{expert}.up.weight"] = (40, D_MODEL)
    return {name: torch.randn(shape, generator=torch_rng) for name, shape in shapes.items()}


@pytest.fixture
def saved(tmp_path):
    def save(weights, name="tuned"):
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "model.safetensors")
        return open_checkpoint(tmp_path / name)

    return save


@pytest.fixture
def adapter(tmp_path):
    def save(pairs, *, alpha=8, rank=2):
        folder = tmp_path / "adapter"
        folder.mkdir()
        tensors = {}
        for module, (up, down) in pairs.items():
            tensors[f"base_model.model.{module}.lora_A.weight"] = down
            tensors[f"base_model.model.{module}.lora_B.weight"] = up
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return open_checkpoint(folder)

    return save


def changed(weights, name, change):
    return weights | {name: weights[name] + change}


def test_nothing_changed_is_exactly_nothing(weights, saved):
    found = diff_weights(saved(weights, "base"), saved(weights))
    assert {tensor.name for tensor in found.tensors} == set(weights)
    assert found.relative == 0
    assert not found.layer_profile().any()
    assert all(tensor.stable_rank == 0 for tensor in found.tensors)


def test_the_changed_layer_is_found_and_measured(weights, saved, torch_rng):
    name = "model.layers.1.self_attn.q_proj.weight"
    change = 0.1 * torch.randn(32, D_MODEL, generator=torch_rng)
    found = diff_weights(saved(weights, "base"), saved(changed(weights, name, change)))
    (tensor,) = [tensor for tensor in found.tensors if tensor.norm]
    actual = (weights[name] + change) - weights[name]
    assert (tensor.name, tensor.layer, tensor.component) == (name, 1, "self_attn.q_proj.weight")
    assert tensor.norm == pytest.approx(float(actual.norm()), rel=1e-5)
    assert tensor.relative == pytest.approx(float(actual.norm() / weights[name].norm()), rel=1e-5)
    assert tensor.spectrum == pytest.approx(torch.linalg.svdvals(actual)[:8].tolist(), rel=1e-4)
    assert tensor.stable_rank == pytest.approx((tensor.norm / tensor.spectral_norm) ** 2)
    block = [t for n, t in weights.items() if n.startswith("model.layers.1.")]
    whole = math.sqrt(sum(float(t.norm()) ** 2 for t in block))
    assert found.layer_profile() == pytest.approx([0, tensor.norm / whole, 0], rel=1e-5)


def test_files_and_a_state_dict_in_memory_give_the_same(weights, saved, torch_rng):
    tuned = saved(changed(weights, "model.norm.weight", torch.randn(D_MODEL, generator=torch_rng)))
    assert diff_weights(weights, tuned).to_dict() == diff_weights(saved(weights, "base"), tuned).to_dict()


def test_rank_one_changes_have_stable_rank_one(weights, saved, torch_rng):
    name = "model.layers.0.experts.3.up.weight"
    change = torch.outer(torch.randn(40, generator=torch_rng), torch.randn(D_MODEL, generator=torch_rng))
    found = diff_weights(weights, saved(changed(weights, name, change)))
    tensor = next(tensor for tensor in found.tensors if tensor.name == name)
    assert tensor.stable_rank == pytest.approx(1, abs=1e-3)


def test_a_cast_to_half_precision_is_a_small_change_and_not_none(weights, saved):
    found = diff_weights(weights, saved({name: tensor.bfloat16() for name, tensor in weights.items()}))
    assert 0 < found.relative < 2**-8


def test_blocks_are_found_without_a_list_of_architectures(weights):
    def blocks(names):
        places = Blocks.of(dict.fromkeys(names, (4, 4)))
        return ".".join(places.path), places.n_layers, {places.locate(name)[0] for name in names}

    assert blocks(weights) == ("model.layers", LAYERS, {None, 0, 1, 2})
    gpt2 = ["wte.weight", *(f"transformer.h.{i}.attn.c_attn.weight" for i in range(12))]
    assert blocks(gpt2) == ("transformer.h", 12, {None, *range(12)})
    gap = [f"a.{i}.weight" for i in (0, 1, 3, 4)] + [f"b.{i}.weight" for i in (0, 1)]
    assert blocks(gap) == ("b", 2, {None, 0, 1})
    assert blocks(["weight"]) == ("", 0, {None})


def test_a_leading_part_of_all_names_may_differ(weights, saved):
    """GPT-2's files on the hub lack the "transformer." that save_pretrained writes; a tied head is not stored."""
    bare = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    for base, tuned, folder in ((weights, bare, "bare"), (bare, weights, "full")):
        found = diff_weights(base | {"lm_head.weight": weights["model.embed_tokens.weight"]}, saved(tuned, folder))
        assert len(found.tensors) == len(weights)
        assert found.relative == 0
        assert found.missing == ("lm_head.weight",)


def test_tensors_on_one_side_only_are_named(weights, saved):
    tuned = {name: tensor for name, tensor in weights.items() if name != "model.norm.weight"} | {"more": torch.ones(2)}
    found = diff_weights(weights, saved(tuned))
    assert (found.missing, found.added) == (("model.norm.weight",), ("more",))


def test_an_adapter_is_measured_as_the_merged_weights_are(weights, saved, adapter, torch_rng):
    module = "model.layers.2.self_attn.q_proj"
    up, down = torch.randn(32, 2, generator=torch_rng), torch.randn(2, D_MODEL, generator=torch_rng)
    native = diff_weights(weights, adapter({module: (up, down)}, alpha=8))
    merged = diff_weights(weights, saved(changed(weights, f"{module}.weight", 4 * up @ down)))
    (tensor,) = native.tensors
    twin = next(other for other in merged.tensors if other.norm)
    assert (tensor.name, tensor.layer, tensor.component) == (twin.name, twin.layer, twin.component)
    assert tensor.norm == pytest.approx(twin.norm, rel=1e-4)
    assert tensor.relative == pytest.approx(twin.relative, rel=1e-4)
    assert tensor.spectrum == pytest.approx(twin.spectrum[:2], rel=1e-4)
    assert np.flatnonzero(native.layer_profile()).tolist() == [2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 7, 40])  # the last is multiplied whole, the others piece by piece
def test_small_singular_values_of_a_long_adapter_are_as_exact_as_the_largest(adapter, torch_rng, dtype, rank):
    module, sizes = "layers.0.q_proj", 10 ** -torch.linspace(0, 4, min(rank, 8))
    up, down = torch.randn(2500, rank, generator=torch_rng), torch.randn(rank, 3100, generator=torch_rng)
    up[:, : len(sizes)] *= sizes
    up[:, len(sizes) :] *= 1e-4
    saved = adapter({module: (up.to(dtype), down.to(dtype))}, alpha=rank, rank=rank)
    (found,) = diff_weights({f"{module}.weight": torch.ones(2500, 3100)}, saved).tensors
    exact = low_rank_singular_values(up.to(dtype), down.to(dtype))
    assert found.spectrum == pytest.approx(exact[:8].tolist(), rel=1e-6)
    assert found.spectrum[-1] < 2e-4 * found.spectrum[0] or rank == 1
    assert found.effective_rank == pytest.approx(float(exact.square().sum() ** 2 / exact.pow(4).sum()), rel=1e-9)


def test_an_adapter_of_transposed_weights_is_measured(weights, adapter, torch_rng):
    name = "model.layers.2.self_attn.q_proj"
    up, down = torch.randn(D_MODEL, 2, generator=torch_rng), torch.randn(2, 32, generator=torch_rng)
    (tensor,) = diff_weights(weights, adapter({name: (up, down)}, alpha=2)).tensors
    assert tensor.norm == pytest.approx(float((up @ down).norm()), rel=1e-4)


def test_an_untrained_adapter_is_exactly_nothing(weights, adapter, torch_rng):
    zero = torch.zeros(32, 2), torch.randn(2, D_MODEL, generator=torch_rng)
    found = diff_weights(weights, adapter({"model.layers.0.self_attn.q_proj": zero}))
    assert (found.relative, found.tensors[0].spectrum) == (0, ())


def test_other_models_weights_are_refused_with_the_difference(weights, saved, adapter):
    with pytest.raises(MismatchError, match=r"expected \[24\], got \[25\]"):
        diff_weights(weights, saved(weights | {"model.norm.weight": torch.ones(25)}))
    with pytest.raises(MismatchError, match="no tensor has a name"):
        diff_weights(weights, saved({"stranger": torch.ones(2)}, "stranger"))
    pairs = {"model.layers.7.self_attn.q_proj": (torch.ones(32, 2), torch.ones(2, D_MODEL))}
    with pytest.raises(MismatchError, match=r"model\.layers\.7.*does not have"):
        diff_weights(weights, adapter(pairs))


def test_an_adapter_of_another_width_is_refused(weights, adapter):
    pairs = {"model.layers.1.self_attn.q_proj": (torch.ones(64, 2), torch.ones(2, D_MODEL))}
    with pytest.raises(MismatchError, match=r"shape \[64, 24\]: the base has \[32, 24\]"):
        diff_weights(weights, adapter(pairs))


def test_weights_that_are_no_numbers_are_refused(weights, saved, adapter):
    with pytest.raises(NonFiniteError, match=r"model\.norm"):
        diff_weights(weights, saved(changed(weights, "model.norm.weight", math.nan)))
    pairs = {"model.layers.1.self_attn.q_proj": (torch.full((32, 2), math.inf), torch.ones(2, D_MODEL))}
    with pytest.raises(NonFiniteError):
        diff_weights(weights, adapter(pairs))


def test_the_greatest_weights_there_are_give_finite_numbers(weights, saved):
    """Made to overflow a norm, so that a scan would end in an error or a verdict without evidence."""
    largest = torch.finfo(torch.float32).max
    name = "model.layers.0.self_attn.q_proj.weight"
    signs = torch.where(weights[name] > 0, -1.0, 1.0)
    found = diff_weights(weights | {name: -largest * signs}, saved(weights | {name: largest * signs}))
    tensor = next(tensor for tensor in found.tensors if tensor.name == name)
    assert tensor.norm == pytest.approx(2 * largest * math.sqrt(signs.numel()), rel=1e-5)
    assert all(map(math.isfinite, tensor.spectrum))
    json.dumps(found.to_dict(), allow_nan=False)
    with pytest.raises(NonFiniteError):
        diff_weights(
            weights,
            saved(weights | {"model.norm.weight": torch.full((D_MODEL,), 1e300, dtype=torch.float64)}, "double"),
        )


def test_the_greatest_weights_of_an_adapter_give_finite_numbers(weights, adapter):
    largest = torch.finfo(torch.float32).max
    pairs = {"model.layers.0.self_attn.q_proj": (torch.full((32, 2), largest), torch.full((2, D_MODEL), largest))}
    (tensor,) = diff_weights(weights, adapter(pairs)).tensors
    assert tensor.norm == pytest.approx(4 * 2 * largest * largest * math.sqrt(32 * D_MODEL))
    assert tensor.effective_rank == pytest.approx(1)
    json.dumps(tensor.to_dict(), allow_nan=False)


def test_names_chosen_to_cost_time_are_compared_quickly(weights, saved):
    strange = {f"head{i}.weight": torch.zeros(1) for i in range(20_000)}
    found = diff_weights(weights, saved({"model.norm.weight": weights["model.norm.weight"]} | strange))
    assert len(found.added) == 20_000


@pytest.mark.parametrize("shape", [(400, 300), (300, 400), (20, 500), (3, 3)])
def test_top_singular_values_are_those_of_the_full_decomposition(torch_rng, shape):
    noise = torch.randn(shape, generator=torch_rng)  # the flattest spectrum there is: the hardest case
    found, exact = top_singular_values(noise, count=8), torch.linalg.svdvals(noise)[:8]
    torch.testing.assert_close(found, exact.double(), rtol=0.02, atol=0)
    spiked = noise + 60 * torch.outer(noise[:, 0], noise[0]) / noise.norm()
    assert float(top_singular_values(spiked)[0]) == pytest.approx(float(torch.linalg.svdvals(spiked)[0]), rel=1e-4)


def test_low_rank_singular_values_are_those_of_the_product(torch_rng):
    up, down = torch.randn(90, 5, generator=torch_rng), torch.randn(5, 70, generator=torch_rng)
    exact = torch.linalg.svdvals((-0.5 * up @ down).double())[:5]
    torch.testing.assert_close(low_rank_singular_values(up, down, scale=-0.5), exact, rtol=1e-5, atol=0)


def activations(rng, *, prompts=60, layers=LAYERS):
    """Base activations of a known mean, and labels."""
    return rng.standard_normal((layers, prompts, D_MODEL)) + 1, np.arange(prompts) % 2 == 0


def test_equal_activations_show_no_shift(rng):
    base, labels = activations(rng)
    same = diff_activations(base, base.copy(), labels)
    assert not same.mean_shift.any()
    assert not same.harm_shift.any()
    assert same.drift == pytest.approx(0, abs=1e-12)
    assert same.cka == pytest.approx(1)
    assert (same.mean_shift_p == 1).all()
    assert (same.harm_shift_p == 1).all()


def test_a_shift_common_to_all_prompts_is_found_in_its_layer_and_is_not_specific_to_harm(rng):
    base, labels = activations(rng)
    tuned = base + 0.1 * rng.standard_normal(base.shape)
    tuned[1] += 0.2
    found = diff_activations(base, tuned, labels)
    assert int(found.mean_shift.argmax()) == 1
    size = np.linalg.norm(base[1], axis=1).mean()
    assert found.mean_shift[1] == pytest.approx(0.2 * math.sqrt(D_MODEL) / size, rel=0.05)
    assert found.mean_shift_p[1] < 0.01 < 0.05 < found.mean_shift_p[0]
    assert (found.harm_shift_p > 0.05).all()


def test_a_shift_of_harmful_prompts_alone_is_specific_to_harm(rng):
    base, labels = activations(rng)
    tuned = base + 0.1 * rng.standard_normal(base.shape)
    tuned[2, labels] += 0.2
    tuned[2, ~labels] -= 0.2
    found = diff_activations(base, tuned, labels, groups=np.arange(60) // 2)
    assert int(found.harm_shift.argmax()) == 2
    assert found.harm_shift_p[2] < 0.01 < 0.05 < found.harm_shift_p[0]
    assert (found.mean_shift_p > 0.05).all()


def test_p_values_of_noise_keep_their_promise_over_all_layers(rng):
    found = 0
    for seed in range(60):
        base, labels = activations(rng, prompts=20, layers=8)
        tuned = base + rng.standard_normal(base.shape)
        shift = diff_activations(base, tuned, labels, draws=59, seed=seed)
        found += min(shift.mean_shift_p) <= 0.1
    assert 1 <= found <= 14  # 6 expected of 60; one in each layer would be 34


def test_adjusted_p_of_one_layer_is_the_plain_one():
    null = np.array([[1.0], [2.0], [3.0]])
    assert adjusted_p(np.array([2.5]), null) == pytest.approx([0.5])


def test_cka_ignores_rotation_and_scale_and_notices_new_content(rng):
    for prompts in (10, 200):  # fewer and more than dimensions: two ways to the same number
        base = rng.standard_normal((prompts, D_MODEL))
        rotation = np.linalg.qr(rng.standard_normal((D_MODEL, D_MODEL)))[0]
        assert linear_cka(base, 3 * base @ rotation + 5) == pytest.approx(1)
        centred, other = base - base.mean(0), rng.standard_normal((prompts, D_MODEL))
        alien = other - other.mean(0)
        gram = [side @ side.T for side in (centred, alien)]
        expected = (gram[0] * gram[1]).sum() / np.linalg.norm(gram[0]) / np.linalg.norm(gram[1])
        assert linear_cka(base, other) == pytest.approx(expected)
        assert expected < 0.9
    assert math.isnan(linear_cka(base, np.ones_like(base)))


def test_drift_of_opposite_activations_is_two(rng):
    base, _ = activations(rng)
    assert diff_activations(base, -base).drift == pytest.approx(2)
    assert diff_activations(base, -base).harm_shift is None


def test_impossible_activations_are_named(rng):
    base, labels = activations(rng)
    with pytest.raises(OptionError, match="shapes"):
        diff_activations(base, base[:2])
    with pytest.raises(OptionError, match="draws"):
        diff_activations(base, base, draws=0)
    with pytest.raises(LabelError, match="both classes"):
        diff_activations(base, base, np.ones(60, dtype=bool))
    with pytest.raises(NonFiniteError, match="fine-tune"):
        diff_activations(base, np.full_like(base, np.nan), labels)


@pytest.fixture
def nano():
    """A tiny runnable base with a tokenizer of single characters."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from activations.loading import load_model

    characters = ["[pad]", "?", " ", *string.ascii_lowercase]
    words = Tokenizer(WordLevel({character: i for i, character in enumerate(characters)}, unk_token="?"))
    words.pre_tokenizer = Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[pad]", unk_token="?")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return load_model(LlamaForCausalLM(config), tokenizer=tokenizer, device="cpu")


@pytest.fixture
def prompts():
    from activations.prompts import PromptSet

    texts = [
        f"{verb} a {thing}" for thing in ("lamp", "door", "fuse", "pipe", "gate", "wire") for verb in ("break", "mend")
    ]
    pairs = tuple(f"pair-{i // 2}" for i in range(len(texts)))
    return PromptSet("pairs", tuple(texts), tuple(i % 2 == 0 for i in range(len(texts))), pairs)


def test_a_diff_localises_a_change_and_leaves_the_base_as_it_was(nano, prompts, tmp_path):
    before = copy.deepcopy(nano.hf.state_dict())
    tuned = copy.deepcopy(nano.hf)
    with torch.no_grad():
        tuned.model.layers[1].mlp.down_proj.weight += 0.5
    tuned.save_pretrained(tmp_path / "tuned")
    found = diff(nano, tmp_path / "tuned", prompts=prompts)
    assert (found.tuned, found.kind, found.prompts) == ("tuned", "full", "pairs")
    assert found.top_layers == (1,)
    assert found.activations.mean_shift[0] == 0
    assert (found.activations.mean_shift[1:] > 0).all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in nano.hf.state_dict().items())
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert record["schema"] == "undertow.diff/1"
    assert len(record["weights"]["layer_profile"]) == len(record["activations"]["harm_shift"]) == LAYERS


def test_a_diff_without_prompts_compares_weights_alone(nano, tmp_path):
    nano.hf.save_pretrained(tmp_path / "same")
    found = diff(nano, open_checkpoint(tmp_path / "same"), base_path=tmp_path / "same", prompts=None)
    assert found.activations is None
    assert found.top_layers == ()
    assert found.to_dict()["activations"] is None

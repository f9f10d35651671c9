"""The pure parts of the extraction benchmark, and that what it times does the same work as we do."""

import extraction
import numpy as np
import pytest
import rivals
import torch
from extraction import REQUIRED, Case, padding, report, worst
from harness import Figure, Timings
from rivals import by_length, file_order, mixture, small

from activations.batching import token_batches

ISSUE = {
    "ideal_ratio",
    "vs_transformer_lens_filtered",
    "vs_transformer_lens_full",
    "vs_nnsight",
    "vs_nnterp",
    "vs_baukit_like",
    "vs_hf_hidden_states",
    "vs_transformer_lens_filtered_packed",
    "vs_transformer_lens_full_packed",
    "vs_nnsight_packed",
    "vs_nnterp_packed",
    "vs_baukit_like_packed",
    "vs_hf_hidden_states_packed",
    "memory_growth_10x",
    "prefix_reuse_half",
    "prefix_reuse_quarter",
}


@pytest.fixture(scope="module")
def base():
    return rivals.shipped_base("cpu")


@pytest.fixture(scope="module")
def model():
    return rivals.build(small(4, 64), "fp32", "cpu")


def ids_of(*lengths):
    return [[1 + i % 7 for i in range(length)] for length in lengths]


def test_every_figure_asked_for_has_its_name():
    assert set(REQUIRED) == ISSUE
    assert set(worst({}, ["a"])) == ISSUE


def test_padding_of_both_ways_is_counted_by_hand():
    # In file order the first 16 are as long as their longest, 40; by length 1 x 40, then 16 x 10.
    figures = padding(ids_of(40, *[10] * 16))
    assert figures["padding_as_written"].value == pytest.approx((16 * 40 + 10) / 200)
    assert figures["padding_packed"].value == pytest.approx(17 * 40 / 200)
    assert figures["padding_ours"].value == 1
    assert figures["mean_length"].value == pytest.approx(200 / 17)
    assert "10 to 40 tokens" in figures["mean_length"].note


def test_padding_ours_is_what_packed_batches_hold():
    ids = ids_of(*range(5, 60))
    packed = sum(batch.input_ids.numel() for batch in token_batches(ids, packed=True))
    assert packed / sum(map(len, ids)) == 1


@pytest.mark.parametrize("batches", [file_order, by_length])
def test_batches_hold_every_prompt_once_under_a_mask_of_its_length(batches):
    ids = ids_of(*np.random.default_rng(0).integers(1, 90, 40))
    seen = {}
    for batch in batches(ids):
        for row, tokens, mask in zip(batch.rows, batch.ids, batch.mask, strict=True):
            seen[row] = tokens[: mask.sum()].tolist()
            assert mask.tolist() == sorted(mask.tolist(), reverse=True)
    assert [seen[row] for row in range(40)] == ids


def test_batches_by_length_stay_within_their_budget():
    ids = ids_of(*range(1, 200))
    assert max(batch.ids.numel() for batch in by_length(ids, budget=512)) <= 512
    assert len(file_order(ids)[0].rows) == 16


def test_ratios_are_their_time_over_ours_so_that_faster_is_above_one():
    timings = Timings({"rival": [3.0, 3.0, 3.0], "ours": [2.0, 2.0, 2.0]})
    assert timings.ratio("rival", "ours", unit=extraction.THEIRS).value == 1.5


def test_a_plain_name_holds_the_model_that_speaks_most_against_us():
    figures = {
        "a/ideal_ratio": Figure(0.97, "x"),
        "b/ideal_ratio": Figure(0.91, "x", (0.9, 0.92), 6),
        "a/prefix_reuse_half": Figure(0.51, "x"),
        "b/prefix_reuse_half": Figure(0.58, "x"),
        "b/vs_nnsight": Figure(None, "x", note="does not fit"),
        "memory_growth_10x": Figure(1.02, "x"),
    }
    found = worst(figures, ["a", "b"])
    assert (found["ideal_ratio"].value, found["ideal_ratio"].interval) == (0.91, (0.9, 0.92))
    assert found["ideal_ratio"].note == "worst of a 0.97, b 0.91"
    assert found["prefix_reuse_half"].value == 0.58
    assert found["vs_nnsight"].value is None
    assert "does not fit" in found["vs_nnsight"].note
    assert "memory_growth_10x" not in found


def test_the_report_shows_models_side_by_side_and_plain_figures_with_their_notes():
    figures = {"ideal_ratio": Figure(0.9, "x", note="worst of a"), "a/ideal_ratio": Figure(0.9, "x")}
    figures |= {"b c/padding_ours": Figure(1.0, "x"), "growth/speed_at_4_layers": Figure(1.1, "x", note="5 a second")}
    lines = report(figures).splitlines()
    assert lines[0].split("  ")[0] == "figure"
    assert any(line.split() == ["ideal_ratio", "0.9"] for line in lines)
    assert any(line.split() == ["ideal_ratio", "0.9", "worst", "of", "a"] for line in lines)
    assert any("5 a second" in line for line in lines)


def test_prompts_spread_evenly_over_their_lengths_and_no_two_are_alike(base):
    texts = mixture(base.tokenizer, 300)
    lengths = np.array([len(row) for row in rivals.tokens(base, texts)])
    assert len(set(texts)) == 300
    assert lengths.min() >= rivals.SHORTEST - 3
    assert lengths.max() <= rivals.LONGEST + 3
    quarters = np.histogram(lengths, bins=4, range=(rivals.SHORTEST - 3, rivals.LONGEST + 3))[0]
    assert (quarters > 0.15 * 300).all()
    assert texts == mixture(base.tokenizer, 300)


def test_numbered_prompts_are_all_different():
    assert len(set(rivals.numbered(5000))) == 5000


def test_the_unembedding_has_the_share_that_it_has_in_an_8b_model():
    shape = small(12, 768)
    trunk = shape.layers * shape.block
    assert shape.vocab * shape.d_model / trunk == pytest.approx(0.07, rel=0.01)
    eight = rivals.LLAMA_8B
    assert eight.weights == pytest.approx(8.03e9, rel=0.01)
    assert rivals.LLAMA_1B.weights == pytest.approx(1.24e9, rel=0.01)
    assert eight.vocab * eight.d_model / (eight.layers * eight.block) == pytest.approx(0.07, rel=0.1)


def test_flops_are_those_of_the_matrices_of_a_model_built(model):
    shape = small(4, 64)
    layers = model.hf.get_decoder().layers
    matrices = sum(weight.numel() for weight in layers.parameters() if weight.dim() == 2)
    assert shape.layers * shape.block == matrices
    assert sum(weight.numel() for weight in model.hf.parameters() if weight.dim() == 2) == shape.weights
    # One token attends to itself alone: nearly all is two operations a weight.
    assert shape.flops([1] * 10) == pytest.approx(20 * matrices, rel=0.01)


def test_rivals_read_what_we_read(model):
    texts = mixture(model.tokenizer, 20, longest=40)
    found = rivals.rivals_for(model)
    ours = np.stack(found[rivals.OURS](texts))
    for way in ("", "_packed"):
        for name in ("hf_hidden_states", "baukit_like"):
            theirs = np.stack(found[name + way](texts))
            assert extraction.disagreement(name, theirs, ours, model).value < 1e-4
    # The control: without the final norm transformers' last layer is something else.
    assert extraction.disagreement("other", np.stack(found["hf_hidden_states"](texts)), ours, model).value > 1e-2


def test_the_ideal_runs_as_many_tokens_as_there_are(model):
    seen = []
    handle = model.hf.get_decoder().layers[0].register_forward_hook(lambda _, args, __: seen.append(args[0].shape[:2]))
    rivals.ideal(model, [10, 20, 30, 40], 50)()
    handle.remove()
    assert seen == [torch.Size([2, 25]), torch.Size([2, 25])]


def test_reuse_gives_the_very_same_numbers(model):
    figures = extraction.prefix_reuse(model, mixture(model.tokenizer, 8, longest=40), _ticks(), rounds=2)
    assert figures["disagreement_prefix_reuse_half"].value == 0
    assert figures["prefix_reuse_half"].value == 1  # on this clock everything takes a second
    assert "layers 2 to 3 of 4" in figures["prefix_reuse_half"].note


def _ticks():
    """A clock on which every interval is one second."""
    now = iter(range(10**6))
    return lambda: float(next(now))


def test_a_case_is_named_after_shape_and_dtype():
    assert Case(small(8, 512), "bf16", 1, 1).name == "8x512 bf16"

"""What a diff of weights says of one tensor, against float64 by the book, and what it makes of odd checkpoints."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from activations.checkpoints import open_checkpoint
from activations.errors import CorruptFileError, MismatchError
from probes import change
from probes.pairs import PairReader
from probes.spectra import dense_spectrum, gram_singular_values
from probes.weight_diff import diff_weights

D_MODEL, LAYERS, VOCAB = 160, 3, 300
Q, UP, EMBED = "self_attn.q_proj.weight", "mlp.up_proj.weight", "model.embed_tokens.weight"


@pytest.fixture
def torch_rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def weights(torch_rng) -> dict[str, torch.Tensor]:
    shapes = {EMBED: (VOCAB, D_MODEL), "model.norm.weight": (D_MODEL,)}
    for layer in range(LAYERS):
        shapes |= {
            f"model.layers.{layer}.{Q}": (D_MODEL, D_MODEL),
            f"model.layers.{layer}.{UP}": (400, D_MODEL),
            f"model.layers.{layer}.norm.weight": (D_MODEL,),
        }
    return {name: 0.05 * torch.randn(shape, generator=torch_rng) for name, shape in shapes.items()}


@pytest.fixture
def saved(tmp_path):
    def save(weights, name="tuned", tokens=None):
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "model.safetensors")
        if tokens is not None:
            tokenizer = {"model": {"vocab": {token: i for i, token in enumerate(tokens)}}, "added_tokens": []}
            (tmp_path / name / "tokenizer.json").write_text(json.dumps(tokenizer))
        return open_checkpoint(tmp_path / name)

    return save


def only(found, name):
    return next(tensor for tensor in found.tensors if tensor.name == name)


@pytest.mark.parametrize("block", [change.np.iinfo(np.int32).max, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_number_of_a_changed_tensor_is_the_books(weights, saved, torch_rng, monkeypatch, block, dtype):
    monkeypatch.setattr("probes.pairs.BLOCK", block)
    name = f"model.layers.1.{UP}"
    step = 0.01 * torch.randn(400, D_MODEL, generator=torch_rng)
    step[:, ::3], step[7:90] = 0, 0
    base = {key: tensor.to(dtype) for key, tensor in weights.items()}
    tuned = base | {name: (weights[name] + step).to(dtype)}
    tensor = only(diff_weights(saved(base, "base"), saved(tuned)), name)
    exact = tuned[name].double() - base[name].double()
    values = torch.linalg.svdvals(exact)
    assert tensor.norm == pytest.approx(float(exact.norm()), rel=1e-5)
    assert tensor.base_norm == pytest.approx(float(base[name].double().norm()), rel=1e-5)
    assert tensor.spectrum == pytest.approx(values[:8].tolist(), rel=0.02)
    assert tensor.spectral_norm == pytest.approx(float(values[0]), rel=0.005)
    assert tensor.effective_rank == pytest.approx(float(values.square().sum() ** 2 / values.pow(4).sum()), rel=0.1)
    assert tensor.changed == int((exact != 0).sum())
    assert tensor.increased == int((exact > 0).sum())
    assert tensor.sparsity == pytest.approx(float((exact == 0).double().mean()))
    assert tensor.largest == pytest.approx(float(exact.abs().max()), rel=1e-6)
    assert tensor.rows_changed == int((exact != 0).any(1).sum())
    assert tensor.columns_changed == int((exact != 0).any(0).sum())
    assert (tensor.low_rank, tensor.rounding) == (None, "")


def test_fourth_powers_of_a_sketch_are_those_of_the_full_decomposition(torch_rng):
    falling = torch.randn(500, 500, generator=torch_rng) * torch.arange(1, 501.0) ** -0.7
    for matrix in (torch.randn(500, 300, generator=torch_rng), falling):
        exact = torch.linalg.svdvals(matrix.double()).pow(4).sum()
        estimates = [dense_spectrum(matrix, seed=seed).fourth_powers for seed in range(8)]
        assert np.mean(estimates) == pytest.approx(float(exact), rel=0.03)


def test_a_tall_matrix_is_decomposed_in_parts(torch_rng, monkeypatch):
    monkeypatch.setattr("probes.spectra._TALL", 200)
    matrix = torch.randn(900, 60, generator=torch_rng)
    torch.testing.assert_close(dense_spectrum(matrix).values, torch.linalg.svdvals(matrix.double()), rtol=1e-4, atol=0)


def test_many_blocks_rows_and_columns_are_counted_as_the_book_says(saved, torch_rng, monkeypatch):
    # Wider than what is added in float32, more rows than bytes count, a change too small to square, 0 and -0.
    monkeypatch.setattr("probes.pairs.BLOCK", 30_000)
    shapes = {"a.0.wide": (7, 9001), "a.1.tall": (5000, 6), "a.2.line": (20_000,)}
    base = {name: torch.randn(shape, generator=torch_rng) for name, shape in shapes.items()}
    tuned = {name: tensor + 0.1 * torch.randn(tensor.shape, generator=torch_rng) for name, tensor in base.items()}
    base["a.1.tall"][3], tuned["a.1.tall"][3] = 0, 1e-30
    base["a.1.tall"][4], tuned["a.1.tall"][4] = 0.0, -0.0
    tuned["a.1.tall"][:, 2] = base["a.1.tall"][:, 2]
    tuned["a.0.wide"][2] = base["a.0.wide"][2]
    found = diff_weights(saved(base, "base"), saved(tuned), spectra=False)
    for name in shapes:
        exact = (tuned[name].double() - base[name].double()).reshape(-1, shapes[name][-1])
        tensor = only(found, name)
        assert tensor.norm == pytest.approx(float(exact.norm()), rel=1e-6)
        assert tensor.base_norm == pytest.approx(float(base[name].double().norm()), rel=1e-6)
        assert tensor.largest == pytest.approx(float(exact.abs().max()), rel=1e-6)
        assert (tensor.changed, tensor.increased) == (int((exact != 0).sum()), int((exact > 0).sum()))
        assert tensor.rows_changed == int((exact != 0).any(1).sum())
        assert tensor.columns_changed == int((exact != 0).any(0).sum())


def test_a_part_that_did_not_change_and_is_no_rounding_denies_a_cast(weights, saved, monkeypatch):
    monkeypatch.setattr("probes.pairs.BLOCK", 1000)
    cast = {name: tensor.bfloat16().float() for name, tensor in weights.items()}
    name = f"model.layers.1.{UP}"
    cast[name][:100] = weights[name][:100]
    assert only(diff_weights(weights, saved(cast)), name).rounding == ""


def test_a_base_read_before_gives_the_same_numbers(weights, saved, torch_rng):
    name = f"model.layers.1.{Q}"
    base = saved(weights, "base")
    tuned = saved(weights | {name: weights[name] + 0.1 * torch.randn(D_MODEL, D_MODEL, generator=torch_rng)})
    first, second = (diff_weights(base, tuned).to_dict() for _ in range(2))
    for one, other in zip(first["tensors"], second["tensors"], strict=True):
        assert one.pop("relative") == pytest.approx(other.pop("relative"), rel=1e-12)
        assert one.pop("base_norm") == pytest.approx(other.pop("base_norm"), rel=1e-12)
        assert one == other


def test_gram_matrices_give_the_singular_values_of_the_products(torch_rng):
    up, down = (torch.randn(shape, generator=torch_rng).double() for shape in ((4, 90, 5), (4, 5, 70)))
    exact = torch.linalg.svdvals(up @ down)[:, :5]
    torch.testing.assert_close(gram_singular_values(up.mT @ up, down @ down.mT), exact, rtol=1e-9, atol=0)
    up[:, :, 4] = up[:, :, 3]  # rank 4: the fifth value is nothing beside the first
    values = gram_singular_values(up.mT @ up, down @ down.mT)
    assert (values[:, 4] < 1e-6 * values[:, 0]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [1, 4, 16, 40])
def test_a_merged_adapter_is_recognised_with_its_rank_and_modules(weights, saved, torch_rng, dtype, rank):
    base = {key: tensor.to(dtype) for key, tensor in weights.items()}
    tuned = dict(base)
    for layer in (0, 2):
        name = f"model.layers.{layer}.{Q}"
        product = torch.randn(D_MODEL, rank, generator=torch_rng) @ torch.randn(rank, D_MODEL, generator=torch_rng)
        tuned[name] = (base[name].float() + 0.01 * product).to(dtype)
    found = diff_weights(saved(base, "base"), saved(tuned)).merged_lora
    assert found == (rank, ("self_attn.q_proj",), (0, 2))


def test_a_full_fine_tune_is_no_merged_adapter(weights, saved, torch_rng):
    for dtype in (torch.float32, torch.bfloat16):
        base = {key: tensor.to(dtype) for key, tensor in weights.items()}
        for kind, step in {"flat": 1.0, "falling": torch.arange(1, D_MODEL + 1.0) ** -0.5}.items():
            tuned = {
                name: (tensor.float() + 3e-3 * step * torch.randn(tensor.shape, generator=torch_rng)).to(dtype)
                for name, tensor in base.items()
            }
            name = f"{kind}-{dtype}"
            assert diff_weights(saved(base, f"base-{name}"), saved(tuned, name)).merged_lora is None
    # An adapter and a vector that it cannot have changed.
    product = torch.randn(D_MODEL, 2, generator=torch_rng) @ torch.randn(2, D_MODEL, generator=torch_rng)
    tuned = weights | {f"model.layers.0.{Q}": weights[f"model.layers.0.{Q}"] + product}
    assert diff_weights(weights, saved(tuned, "product")).merged_lora is not None
    tuned["model.norm.weight"] = tuned["model.norm.weight"] + 1
    assert diff_weights(weights, saved(tuned, "more")).merged_lora is None


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_a_cast_is_recognised_as_rounding_and_training_is_not(weights, saved, kind):
    cast = {name: tensor.to(kind) for name, tensor in weights.items()}
    found = diff_weights(saved(weights, "base"), saved(cast))
    assert found.rounding == str(kind).removeprefix("torch.")
    assert found.merged_lora is None
    assert found.tensors[0].dtypes == ("F32", "BF16" if kind == torch.bfloat16 else "F16")
    back = {name: tensor.float() for name, tensor in cast.items()}
    assert diff_weights(weights, saved(back, "back")).rounding == found.rounding
    assert diff_weights(saved(cast, "half"), saved(back, "wide")).relative == 0
    cast[f"model.layers.1.{Q}"] = (weights[f"model.layers.1.{Q}"] * 1.05).to(kind)
    trained = diff_weights(weights, saved(cast, "trained"))
    assert trained.rounding == ""
    assert [tensor.name for tensor in trained.tensors if not tensor.rounding] == [f"model.layers.1.{Q}"]


def test_rows_of_the_embedding_that_moved_are_named_the_most_moved_first(weights, saved):
    tuned = weights | {EMBED: weights[EMBED].clone()}
    tuned[EMBED][17] += 1
    tuned[EMBED][3] -= 0.5
    tensor = only(diff_weights(weights, saved(tuned)), EMBED)
    assert [(row.row, row.norm) for row in tensor.rows] == [
        (17, pytest.approx(math.sqrt(D_MODEL), rel=1e-5)),
        (3, pytest.approx(0.5 * math.sqrt(D_MODEL), rel=1e-5)),
    ]
    assert tensor.rows[0].base_norm == pytest.approx(float(weights[EMBED][17].norm()), rel=1e-5)
    assert tensor.rows_changed == 2
    assert only(diff_weights(weights, saved(weights, "same")), EMBED).rows == ()


def test_changes_too_small_or_too_large_to_square_are_measured(weights, saved):
    name = f"model.layers.0.{Q}"
    tiny = weights | {name: torch.zeros(D_MODEL, D_MODEL)}
    found = only(diff_weights(tiny, saved(tiny | {name: torch.full((D_MODEL, D_MODEL), 1e-30)})), name)
    assert found.norm == pytest.approx(D_MODEL * 1e-30, rel=1e-5)
    assert found.spectral_norm == pytest.approx(D_MODEL * 1e-30, rel=1e-4)
    large = torch.full((D_MODEL, D_MODEL), 3e38)
    found = only(diff_weights(weights | {name: -large}, saved(weights | {name: large}, "large")), name)
    assert found.norm == pytest.approx(D_MODEL * 6e38, rel=1e-5)
    assert found.spectral_norm == pytest.approx(D_MODEL * 6e38, rel=1e-4)


def test_a_fine_tune_with_huge_weights_does_not_spoil_the_norms_of_the_base_for_the_next(weights, saved, torch_rng):
    name = f"model.layers.0.{Q}"
    base = saved(weights, "base")
    huge = saved(weights | {name: torch.full((D_MODEL, D_MODEL), 3e38)}, "huge")
    assert only(diff_weights(base, huge), name).base_norm == pytest.approx(float(weights[name].norm()), rel=1e-5)
    usual = saved(weights | {name: weights[name] + 0.01}, "usual")
    assert only(diff_weights(base, usual), name).base_norm == pytest.approx(float(weights[name].norm()), rel=1e-5)


def test_renamed_tensors_are_matched_by_shape_and_value_where_that_is_unique(weights, saved, torch_rng):
    # Norms of nothing but ones look alike: nobody can tell which is which.
    base = {name: torch.ones_like(t) if t.ndim == 1 else t for name, t in weights.items()}
    trained = {
        name: tensor + (0.005 * torch.randn(tensor.shape, generator=torch_rng) if tensor.ndim > 1 else 0)
        for name, tensor in base.items()
    }
    renamed = {f"transformer.h_{i}.w": trained[name] for i, name in enumerate(trained)}
    found = diff_weights(saved(base, "base"), saved(renamed))
    matrices = [name for name, tensor in base.items() if tensor.ndim > 1]
    assert {tensor.name for tensor in found.tensors} == set(matrices)
    for i, name in enumerate(trained):
        if name in matrices:
            assert only(found, name).partner == f"transformer.h_{i}.w"
    assert set(found.missing) == base.keys() - set(matrices)
    assert len(found.added) == len(found.missing)
    assert [note.split(":")[0] for note in found.notes] == ["renamed"]
    strangers = {f"w{i}": torch.randn(t.shape, generator=torch_rng) for i, t in enumerate(base.values())}
    with pytest.raises(MismatchError, match="no tensor has a name"):
        diff_weights(base, saved(strangers, "strangers"))


def test_a_longer_vocabulary_is_compared_where_both_have_rows(weights, saved, torch_rng):
    longer = torch.cat([weights[EMBED], torch.randn(4, D_MODEL, generator=torch_rng)])
    for name, base, tuned in (
        ("longer", weights, weights | {EMBED: longer}),
        ("shorter", weights | {EMBED: longer}, weights),
    ):
        found = diff_weights(saved(base, f"base-{name}"), saved(tuned, name))
        assert found.relative == 0
        (note,) = found.notes
        assert f"{VOCAB} were compared" in note
    # The same is refused inside of a block, and where the width differs.
    narrow = weights | {EMBED: weights[EMBED][:, :-1].contiguous()}
    with pytest.raises(MismatchError, match=r"expected \[300, 160\], got \[300, 159\]"):
        diff_weights(weights, saved(narrow, "narrow"))
    inside = weights | {f"model.layers.0.{UP}": torch.zeros(401, D_MODEL)}
    with pytest.raises(MismatchError, match=r"expected \[400, 160\], got \[401, 160\]"):
        diff_weights(weights, saved(inside, "inside"))


def test_another_vocabulary_is_aligned_by_token_where_both_tokenizers_are_at_hand(weights, saved):
    tokens = [f"token{i}" for i in range(VOCAB)]
    order = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(1))
    shuffled = weights | {EMBED: weights[EMBED][order].contiguous()}
    names = [tokens[i] for i in order]
    base = saved(weights, "base", tokens)
    assert diff_weights(base, saved(shuffled, "bare")).relative > 0.1
    found = diff_weights(base, saved(shuffled, "named", names))
    assert found.relative == 0
    assert "matched by both tokenizers" in found.notes[0]
    # Rows whose tokens were renamed do not escape: such a tokenizer is not believed.
    renamed = ["other", *names[1:]]
    assert diff_weights(base, saved(shuffled, "renamed", renamed)).relative > 0.1
    fewer = weights | {EMBED: shuffled[EMBED][20:].contiguous()}
    found = diff_weights(base, saved(fewer, "fewer", names[20:]))
    assert found.relative == 0
    assert f"{VOCAB - 20} were compared" in found.notes[0]
    fewer[EMBED][5] += 1
    rows = only(diff_weights(base, saved(fewer, "moved", names[20:])), EMBED).rows
    assert len(rows) == 1


def test_tied_and_untied_embeddings_are_compared(weights, saved):
    head = "lm_head.weight"
    untied = weights | {head: weights[EMBED] + 1}
    for name, base, tuned in (("tied", untied, weights), ("untied", weights, untied)):
        found = diff_weights(saved(base, f"base-{name}"), saved(tuned, name))
        assert only(found, head).norm == pytest.approx(math.sqrt(VOCAB * D_MODEL), rel=1e-5)
        assert [note.split(":")[0] for note in found.notes] == [name]
    same = weights | {head: weights[EMBED].clone()}  # stored twice is tied too
    assert diff_weights(saved(same, "base-same"), saved(weights, "one")).relative == 0
    assert diff_weights(weights, saved(same, "two")).relative == 0


def test_another_depth_is_refused_with_both_depths(weights, saved):
    shallow = {name: tensor for name, tensor in weights.items() if "layers.2" not in name}
    with pytest.raises(MismatchError, match="the base has 3 layers, the fine-tune 2"):
        diff_weights(weights, saved(shallow))
    with pytest.raises(MismatchError, match="the base has 2 layers, the fine-tune 3"):
        diff_weights(saved(shallow, "base"), saved(weights, "deep"))


def test_large_tensors_are_read_on_threads_and_a_cut_file_is_named(saved, torch_rng, tmp_path):
    big = {"a.0.w": torch.randn(3000, 700, generator=torch_rng), "a.1.w": torch.randn(2500, 700, generator=torch_rng)}
    tuned = {name: tensor + 0.1 for name, tensor in big.items()}
    base, checkpoint = saved(big, "base"), saved(tuned)
    found = diff_weights(base, checkpoint, spectra=False)
    for name, tensor in big.items():
        exact = float((tuned[name].double() - tensor.double()).norm())
        assert only(found, name).norm == pytest.approx(exact, rel=1e-6)
        assert only(found, name).spectrum == ()
    path = tmp_path / "tuned" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(CorruptFileError):
        diff_weights(base, checkpoint)


def test_a_reader_holds_one_tensor_a_side_and_none_that_it_only_passes(saved, torch_rng):
    sizes = {f"a.{i}.w": torch.randn(rows, 300, generator=torch_rng) for i, rows in enumerate((50, 900, 10))}
    base, tuned = saved(sizes, "base"), saved(sizes)
    with PairReader() as reader:
        for name, tensor in sizes.items():
            blocks = reader.read(base, name, tuned, name).each(
                lambda *both: [side.values.clone() for side in both], size=7000
            )
            assert all(torch.equal(torch.cat(side), tensor) for side in zip(*blocks, strict=True))
        assert [len(memory.tensor) for memory in reader.memory] == [0, 0]
        for name, tensor in sizes.items():
            assert all(torch.equal(side, tensor) for side in reader.read(base, name, tuned, name).held())
        assert [len(memory.tensor) for memory in reader.memory] == [900 * 300 * 4] * 2


@pytest.mark.gpu
def test_a_gpu_finds_what_a_processor_finds(weights, saved, torch_rng):
    tuned = saved({name: t + 0.01 * torch.randn(t.shape, generator=torch_rng) for name, t in weights.items()})
    here, there = (diff_weights(weights, tuned, device=device).tensors for device in ("cpu", "cuda"))
    for one, other in zip(here, there, strict=True):
        assert other.norm == pytest.approx(one.norm, rel=1e-5)
        assert other.spectrum == pytest.approx(one.spectrum, rel=1e-2)
        assert (other.changed, other.increased, other.rows_changed) == (one.changed, one.increased, one.rows_changed)


def test_unchanged_scalars_and_empty_tensors_are_nothing(saved):
    odd = {"a.0.w": torch.ones(4, 4), "scale": torch.tensor(2.0), "none": torch.zeros(0, 5), "line": torch.zeros(0)}
    found = diff_weights(saved(odd, "base"), saved(odd))
    assert len(found.tensors) == 4
    assert found.relative == 0
    moved = diff_weights(odd, saved(odd | {"scale": torch.tensor(3.0)}, "moved"))
    assert only(moved, "scale").norm == 1

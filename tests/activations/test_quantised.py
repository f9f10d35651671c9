"""Quantised weights stand for the values that the formats' own arithmetic gives in float64; broken ones are refused."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from activations import quantised
from activations.checkpoints import open_checkpoint
from activations.errors import CheckpointError, CorruptFileError, MismatchError, NonFiniteError
from activations.loading import load_model
from activations.weights import slots_of, tuned_weights
from probes import demo
from probes.diff import diff_files

NAME = "layers.0.up.weight"
STEM = "layers.0.up"
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635)
NF4 += (-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725)
NF4 += (0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
FP4 = tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3))
# Eight bits for scales: any 256 numbers do, as long as writer and reader share them.
NESTED = torch.linspace(-1, 1, 256).double()


def fp8(weight, height, width, *, dtype=torch.float8_e4m3fn, suffix="_scale_inv"):
    codes, values, scales = torch.empty(weight.shape, dtype=dtype), torch.empty(weight.shape).double(), []
    for top in range(0, weight.shape[0], height):
        for left in range(0, weight.shape[1], width):
            block = weight[top : top + height, left : left + width]
            scale = (block.abs().max() / torch.finfo(dtype).max).float()
            code = (block / scale).to(dtype)
            codes[top : top + height, left : left + width] = code
            values[top : top + height, left : left + width] = code.double() * scale.double()
            scales.append(scale)
    shape = (-(-weight.shape[0] // height), -(-weight.shape[1] // width))
    return {NAME: codes, NAME + suffix: torch.stack(scales).view(shape)}, values


def bnb_int8(weight):
    top = weight.abs().amax(1)
    codes = (weight * (127 / top[:, None])).round()
    values = codes.double() * top[:, None].double() / 127
    return {NAME: codes.to(torch.int8), f"{STEM}.SCB": top, f"{STEM}.weight_format": torch.tensor(0).byte()}, values


def bnb_4bit(weight, kind="nf4", size=64, *, nested=True):
    table, flat = torch.tensor(NF4 if kind == "nf4" else FP4), weight.flatten()
    runs = [flat[start : start + size] for start in range(0, len(flat), size)]
    tops = torch.stack([run.abs().max() for run in runs])
    nearest = [((run / top)[:, None] - table).abs().argmin(1) for run, top in zip(runs, tops, strict=True)]
    codes = torch.cat(nearest).tolist()
    packed = [16 * a + b for a, b in itertools.zip_longest(codes[::2], codes[1::2], fillvalue=0)]
    state = {"quant_type": kind, "blocksize": size, "dtype": "bfloat16", "shape": list(weight.shape)}
    parts = {NAME: torch.tensor(packed).byte().view(-1, 1), f"{NAME}.quant_map": table}
    if nested:
        mean = float(tops.mean())
        groups = [tops[start : start + 256] - mean for start in range(0, len(tops), 256)]
        outer = torch.stack([group.abs().max() for group in groups])
        inner = [((group / top)[:, None] - NESTED).abs().argmin(1) for group, top in zip(groups, outer, strict=True)]
        tops = torch.cat([NESTED[code] * float(top) + mean for code, top in zip(inner, outer, strict=True)])
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": mean}
        parts |= {f"{NAME}.absmax": torch.cat(inner).byte(), f"{NAME}.nested_absmax": outer}
        parts |= {f"{NAME}.nested_quant_map": NESTED.float()}
    else:
        parts |= {f"{NAME}.absmax": tops}
    values = torch.cat([table[code].double() * float(top) for code, top in zip(nearest, tops, strict=True)])
    parts[f"{NAME}.quant_state.bitsandbytes__{kind}"] = as_bytes(state)
    return parts, values.view(weight.shape)


def as_bytes(state):
    text = state if isinstance(state, bytes) else json.dumps(state).encode()
    return torch.tensor(list(text)).byte()


def words(codes, bits, order=None):
    """Codes of each row packed into words of 32 bits, by Python's integers."""
    per = 32 // bits
    rows = []
    for row in codes.tolist():
        row = row + [0] * (-len(row) % per)
        parts = [row[start : start + per] for start in range(0, len(row), per)]
        found = [sum(part[at] << (bits * i) for i, at in enumerate(order or range(per))) for part in parts]
        rows.append([word - 2**32 if word >= 2**31 else word for word in found])
    return torch.tensor(rows, dtype=torch.int32)


def grouped(weight, bits, size, places=None):
    """Codes, scales and zeros of groups of columns, asymmetric, and what they stand for."""
    columns = weight.shape[1]
    places = torch.arange(columns) // size if places is None else places
    count = int(places.max()) + 1
    low = torch.stack([weight[:, places == g].amin(1) for g in range(count)], 1).clamp(max=-1e-6)
    high = torch.stack([weight[:, places == g].amax(1) for g in range(count)], 1).clamp(min=1e-6)
    scale = (high - low) / (2**bits - 2)
    zero = (1 - low / scale).round().clamp(1, 2**bits - 1)
    codes = (weight / scale[:, places] + zero[:, places]).round().clamp(0, 2**bits - 1)
    return codes.long(), scale, zero.long(), (codes - zero[:, places]).double() * scale[:, places].double()


def compressed(weight, bits=4, size=32):
    codes, scale, zero, values = grouped(weight, bits, size)
    parts = {"weight_packed": words(codes, bits), "weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}
    parts["weight_zero_point"] = words(zero.T, bits).T.contiguous()
    return {f"{STEM}.{name}": tensor for name, tensor in parts.items()}, values


def gptq(weight, bits=4, size=32, *, shuffled=True):
    columns = weight.shape[1]
    random = torch.Generator().manual_seed(3)
    places = (torch.randperm(columns, generator=random) if shuffled else torch.arange(columns)) // size
    codes, scale, zero, values = grouped(weight, bits, size, places)
    parts = {"qweight": words(codes, bits).T.contiguous(), "scales": scale.T.contiguous()}
    parts |= {"qzeros": words(zero.T - 1, bits), "g_idx": places.int()}
    return {f"{STEM}.{name}": tensor for name, tensor in parts.items()}, values


def awq(weight, size=32):
    codes, scale, zero, values = grouped(weight, 4, size)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    parts = {"qweight": words(codes.T, 4, order), "qzeros": words(zero.T, 4, order), "scales": scale.T.contiguous()}
    return {f"{STEM}.{name}": tensor for name, tensor in parts.items()}, values


FORMATS = {
    "fp8 e4m3fn, blocks of 128 x 128": lambda w: fp8(w, 128, 128),
    "fp8 e4m3fn, one scale a row": lambda w: fp8(w, 1, w.shape[1], suffix="_scale"),
    "fp8 e5m2, one scale a matrix": lambda w: fp8(w, 10**6, 10**6, dtype=torch.float8_e5m2, suffix="_scale"),
    "int8, one scale a row": bnb_int8,
    "nf4, blocks of 64": bnb_4bit,
    "nf4, blocks of 128": lambda w: bnb_4bit(w, size=128, nested=False),
    "fp4, blocks of 64": lambda w: bnb_4bit(w, "fp4"),
    "int4, groups of 32": compressed,
    "int8, groups of 32": lambda w: compressed(w, 8),
    "int4, groups of 64": lambda w: gptq(w, size=64),
    "int8, groups of 64": lambda w: gptq(w, 8, 64, shuffled=False),
    "int4, groups of 96": lambda w: awq(w, 96),
}


@pytest.fixture
def weight():
    return 0.02 * torch.randn(136, 192, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tmp_path):
    def save(tensors, name="tuned", **settings):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"quantization_config": settings} if settings else {}))
        return folder

    return save


@pytest.mark.parametrize("how", FORMATS)
def test_every_format_is_read_as_the_values_it_stands_for(weight, saved, monkeypatch, how):
    monkeypatch.setattr(quantised, "_BLOCK", 3000)  # rows come in many parts
    parts, values = FORMATS[how](weight)
    checkpoint = open_checkpoint(saved(parts))
    assert set(checkpoint.tensors) == {NAME}
    assert checkpoint.tensors[NAME].shape == weight.shape
    assert any(how in note for note in checkpoint.notes)
    found = checkpoint.read(NAME)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), values, rtol=1e-6, atol=1e-9)
    # The generators above are quantisers: what they made is near the weights.
    assert float((found - weight).norm() / weight.norm()) < 0.2


@pytest.mark.parametrize("how", FORMATS)
def test_a_quantised_base_is_told_from_one_that_was_trained_as_well(weight, saved, how):
    parts, _ = FORMATS[how](weight)
    base = open_checkpoint(saved({NAME: weight}, "base"))
    found = diff_files(base, open_checkpoint(saved(parts)))
    assert found.explanation == f"quantised ({how})"
    assert found.weights.tensors[0].dtypes == ("F32", how)
    assert any(note.startswith("quantised:") for note in found.weights.notes)
    moved = weight + 2e-3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    parts, values = FORMATS[how](moved)
    found = diff_files(base, open_checkpoint(saved(parts)))
    assert found.weights.rounding == ""
    exact = float((values - weight.double()).norm() / weight.double().norm())
    assert found.weights.relative == pytest.approx(exact, rel=1e-5)


def test_scaling_the_blocks_of_a_base_is_no_rounding(weight, saved):
    """Codes of the base under other scales: a change that looks at codes alone would not see."""
    base = open_checkpoint(saved({NAME: weight}, "base"))
    for how, part in (("nf4, blocks of 64", f"{NAME}.nested_absmax"), ("int8, one scale a row", f"{STEM}.SCB")):
        parts, _ = FORMATS[how](weight)
        parts[part] = parts[part] * 1.5
        assert diff_files(base, open_checkpoint(saved(parts))).weights.rounding == ""


@pytest.mark.parametrize("shape", [(7, 33), (5, 50)])
def test_blocks_may_cross_rows_and_end_early(saved, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    parts, values = bnb_4bit(weight, size=32)
    torch.testing.assert_close(open_checkpoint(saved(parts)).read(NAME).double(), values, rtol=1e-6, atol=1e-9)


def test_experts_in_one_tensor_have_blocks_of_their_own(saved):
    weight = torch.randn(3, 130, 140, generator=torch.Generator().manual_seed(0))
    made = [fp8(expert, 128, 128) for expert in weight]
    parts = {name: torch.stack([one[name] for one, _ in made]) for name in made[0][0]}
    found = open_checkpoint(saved(parts)).read(NAME)
    torch.testing.assert_close(found.double(), torch.stack([values for _, values in made]), rtol=1e-6, atol=1e-9)


def test_the_same_bytes_under_another_version_have_another_hash(weight, saved):
    parts, values = gptq(weight)
    first = open_checkpoint(saved(parts)).content_hash()
    other = open_checkpoint(saved(parts, checkpoint_format="gptq_v2"))
    assert other.content_hash() != first
    assert not torch.allclose(other.read(NAME).double(), values)


def test_scales_of_activations_are_left_out_and_said(weight, saved):
    parts, _ = fp8(weight, 10**6, 10**6, suffix="_scale")
    checkpoint = open_checkpoint(saved(parts | {f"{STEM}.input_scale": torch.tensor(0.1)}))
    assert set(checkpoint.tensors) == {NAME}
    assert any(note.startswith("activation-scales: 1 ") for note in checkpoint.notes)


def replaced(make, **changes):
    """A format's tensors with some of them changed: by a function, or taken out by None."""

    def build(weight):
        parts, _ = make(weight)
        for name, change in changes.items():
            full = next(key for key in parts if key.endswith(name))
            parts[full] = change(parts[full]) if change else None
        return {key: tensor for key, tensor in parts.items() if tensor is not None}

    return build


def state(**changes):
    return lambda old: as_bytes(json.loads(bytes(old.tolist())) | changes)


def read_all(folder):
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def with_nan(tensor):
    made = tensor.clone()
    made.view(-1)[0] = float("nan")
    return made


HOSTILE = {
    "fp8 scale of another shape": (replaced(lambda w: fp8(w, 128, 128), _scale_inv=lambda s: s[:1]), "has the shape"),
    "fp8 scale NaN": (replaced(lambda w: fp8(w, 128, 128), _scale_inv=with_nan), "NaN or infinite"),
    "fp8 scale of integers": (replaced(lambda w: fp8(w, 128, 128), _scale_inv=lambda s: s.int()), "has the dtype I32"),
    "int8 without its weight": (replaced(bnb_int8, weight=None), "lacks a part"),
    "int8 scale NaN": (replaced(bnb_int8, SCB=with_nan), "NaN or infinite"),
    "int8 scale of another shape": (replaced(bnb_int8, SCB=lambda s: s[:-1]), "expected [136]"),
    "int8 in the order of a GPU": (replaced(bnb_int8, weight_format=lambda s: s + 2), "order for one kind of GPU"),
    "4-bit without scales": (replaced(bnb_4bit, nested_absmax=None), "lacks a part"),
    "4-bit without state": (replaced(bnb_4bit, bitsandbytes__nf4=None), "quant_state is missing"),
    "quant_map NaN": (replaced(bnb_4bit, quant_map=with_nan), "NaN or infinite"),
    "quant_map of one's own": (replaced(bnb_4bit, quant_map=lambda t: -t), "is not that of nf4"),
    "quant_map too short": (replaced(bnb_4bit, quant_map=lambda t: t[:8]), "expected [16]"),
    "negative blocksize": (replaced(bnb_4bit, bitsandbytes__nf4=state(blocksize=-64)), "powers of two"),
    "blocksize of another kind": (replaced(bnb_4bit, bitsandbytes__nf4=state(blocksize=[64])), "powers of two"),
    "enormous shape": (replaced(bnb_4bit, bitsandbytes__nf4=state(shape=[2**39, 2**39])), "bytes, but is said to hold"),
    "shape of words": (replaced(bnb_4bit, bitsandbytes__nf4=state(shape=["a"])), "says the shape"),
    "offset infinite": (replaced(bnb_4bit, bitsandbytes__nf4=state(nested_offset=1e999)), "says the offset"),
    "JSON bomb": (replaced(bnb_4bit, bitsandbytes__nf4=lambda _: as_bytes(b"[" * 8000 + b"]" * 8000)), "the limit"),
    "JSON too long": (replaced(bnb_4bit, bitsandbytes__nf4=lambda _: as_bytes(b" " * 2**15)), "no quant_state"),
    "packed shape that lies": (replaced(compressed, weight_shape=lambda s: s * 2**20), "other than 2, 4 or 8 bits"),
    "packed shape negative": (replaced(compressed, weight_shape=lambda s: -s), "says the shape"),
    "packed without shape": (replaced(compressed, weight_shape=None), "lacks a part"),
    "g_idx below zero": (replaced(gptq, g_idx=lambda s: s - 1), "names groups -1"),
    "g_idx too short": (replaced(gptq, g_idx=lambda s: s[:-1]), "expected [192]"),
    "zeros that overflow": (replaced(gptq, qzeros=lambda s: s * 0 - 1), "zeros that overflow"),
    "awq zeros of another shape": (replaced(awq, qzeros=lambda s: s[:, :-1]), "has the shape"),
    "quantised and plain": (lambda w: {**compressed(w)[0], NAME: w}, "as it is"),
    "mxfp4": (lambda w: {"mlp.up_blocks": w.byte(), "mlp.up_scales": w[:, 0].byte()}, "mxfp4"),
    "nvfp4": (lambda w: {f"{STEM}.weight_packed": w.byte(), f"{STEM}.weight_scale": w}, "nvfp4"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_broken_or_unknown_is_refused_with_its_reason(weight, saved, case):
    build, reason = HOSTILE[case]
    tensors = build(weight)
    folder = saved({name: tensor.contiguous() for name, tensor in tensors.items()})
    with pytest.raises(CheckpointError) as refused:
        read_all(folder)
    assert reason in refused.value.message
    assert refused.value.hint


def test_a_base_in_a_format_that_is_not_read_still_opens(weight, saved):
    """Only its weights cannot be compared: transformers may load such a base, and its hash is that of its bytes."""
    checkpoint = open_checkpoint(saved({"mlp.up_blocks": weight.byte(), "mlp.up_scales": weight[:, 0].byte()}))
    assert len(checkpoint.content_hash()) == 64


def test_codes_without_scales_are_not_compared_as_numbers(weight, saved):
    base = open_checkpoint(saved({NAME: weight}, "base"))
    with pytest.raises(MismatchError, match="is stored as I8"):
        diff_files(base, open_checkpoint(saved({NAME: (weight * 1000).to(torch.int8)})))


def test_float8_without_scales_is_a_cast_unless_scales_were_promised(weight, saved):
    cast = {NAME: weight.to(torch.float8_e4m3fn)}
    assert torch.equal(open_checkpoint(saved(cast)).read(NAME), cast[NAME])
    with pytest.raises(CorruptFileError, match="has no scale"):
        open_checkpoint(saved(cast, quant_method="fp8"))


def test_nan_among_codes_is_refused_by_the_diff(weight, saved):
    parts, _ = fp8(weight, 128, 128)
    parts[NAME].view(torch.uint8)[3, 4] = 0x7F
    base = open_checkpoint(saved({NAME: weight}, "base"))
    with pytest.raises(NonFiniteError):
        diff_files(base, open_checkpoint(saved(parts)))


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    """The shipped base with every matrix of its blocks in nf4, as bitsandbytes saves it, and what these stand for."""
    tensors, plain = load_file(demo.BASE / "model.safetensors"), {}
    stored = {}
    for name, tensor in tensors.items():
        if ".layers." in name and tensor.ndim == 2:
            parts, plain[name] = bnb_4bit(tensor.float())
            stored |= {name + part.removeprefix(NAME): value for part, value in parts.items()}
        else:
            stored[name] = tensor
    folder = tmp_path_factory.mktemp("nano") / "nf4"
    folder.mkdir()
    save_file(stored, folder / "model.safetensors")
    return folder, tensors, plain


def test_the_shipped_base_in_nf4_differs_by_its_rounding_alone(nano):
    folder, tensors, plain = nano
    found = diff_files(open_checkpoint(demo.BASE), open_checkpoint(folder))
    assert found.explanation == "quantised (nf4, blocks of 64)"
    apart = sum(float((plain[name] - tensors[name].double()).square().sum()) for name in plain)
    whole = sum(float(tensor.double().square().sum()) for tensor in tensors.values())
    assert found.weights.relative == pytest.approx((apart / whole) ** 0.5, rel=1e-4)


def test_the_shipped_base_in_nf4_runs_as_what_it_stands_for(nano):
    folder, _, plain = nano
    model = load_model(demo.BASE, device="cpu")
    values = tuned_weights(model.hf, open_checkpoint(folder))
    assert all(torch.allclose(values[name].double(), plain[name], rtol=1e-6, atol=1e-9) for name in plain)
    before = {name: slot.clone() for name, slot in slots_of(model.hf).items()}
    ids = torch.arange(5, 45).view(1, -1)
    with torch.no_grad():
        expected = model.hf(ids).logits
        with model.applied(folder):
            assert model.changed == plain.keys()
            found = model.hf(ids).logits
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.3
    assert all(torch.equal(slot, before[name]) for name, slot in slots_of(model.hf).items())


def test_bitsandbytes_reads_the_same_values(saved):
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    weight = 0.02 * torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    for kind in ("nf4", "fp4"):
        codes, how = functional.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=True)
        parts = {NAME: codes} | {f"{NAME}.{name}": tensor for name, tensor in how.as_dict(packed=True).items()}
        checkpoint = open_checkpoint(saved(parts))
        assert torch.allclose(checkpoint.read(NAME), functional.dequantize_4bit(codes, how), rtol=1e-6, atol=1e-9)
        assert checkpoint.tensors[NAME].rounds(weight)

"""What is extracted equals the model's own hidden states, whatever the batches, and the model is left as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from activations import extract as extract_function
from activations.errors import HookPointError, OptionError, PromptError, StoreError
from activations.extract import extract
from activations.forward import capture
from activations.loading import load_model
from activations.models import Model
from activations.prompts import PromptSet
from activations.results import Activations
from activations.store import ActivationStore
from activations.tokens import format_prompt

PROMPTS = ["Hi", "How do I bake bread?", "x" * 30, "What is the capital of Iceland, and why?", "é"]
PAIRED = PromptSet("pairs", tuple(PROMPTS[:4]), (True, False, True, False), ("1", "1", "2", "2"))

# Relative to the largest value of a vector. Measured at most 5e-7; room for other machines' matrix products.
TOLERANCE = 2e-5


def distance(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, relative to the largest value expected."""
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@torch.inference_mode()
def hidden_states(model: Model, prompt: str) -> list[np.ndarray]:
    """Hugging Face's own hidden states of one prompt alone, without embeddings: [token, d_model] a layer."""
    ids = torch.tensor([format_prompt(model.tokenizer, prompt)])
    states = model.hf(input_ids=ids, output_hidden_states=True).hidden_states
    return [state[0].float().numpy() for state in states[1:]]


def as_hidden_states(model: Model, values: np.ndarray) -> np.ndarray:
    """Residual streams as `output_hidden_states` gives them: the final norm is applied to the last."""
    with torch.inference_mode():
        last = model.hook_points.final_norm(torch.from_numpy(values[-1]).to(model.dtype)).float().numpy()
    return np.concatenate([values[:-1], last[None]])


# The same numbers


def test_all_tokens_equal_hugging_faces_hidden_states(tiny: Callable[[str], Model], architecture: str) -> None:
    model = tiny(architecture)
    activations = extract(model, PROMPTS, pooling="all", max_tokens=100)
    for prompt, tokens in zip(PROMPTS, activations.tokens, strict=True):
        assert distance(as_hidden_states(model, tokens), np.stack(hidden_states(model, prompt))) < TOLERANCE


@pytest.mark.parametrize(
    ("pooling", "reduce"),
    [
        ("last", lambda tokens: tokens[:, -1]),
        ("mean", lambda tokens: tokens.mean(1)),
        ("max", lambda tokens: tokens.max(1)),
    ],
)
def test_pooled_vectors_are_what_the_tokens_give(
    pooling: str, reduce: Callable[[np.ndarray], np.ndarray], tiny: Callable[[str], Model], architecture: str
) -> None:
    model = tiny(architecture)
    tokens = extract(model, PROMPTS, pooling="all").tokens
    values = extract(model, PROMPTS, pooling=pooling).values
    assert values.shape == (3, len(PROMPTS), 48)
    assert values.dtype == np.float32
    assert distance(values, np.stack([reduce(prompt) for prompt in tokens], axis=1)) < TOLERANCE


def test_the_last_layer_is_taken_before_the_final_norm(llama: Model) -> None:
    values = extract(llama, PROMPTS[:1]).values
    last = hidden_states(llama, PROMPTS[0])[-1][-1]
    assert distance(values[-1, 0], last) > 0.1
    assert distance(as_hidden_states(llama, values)[-1, 0], last) < TOLERANCE


def test_places_within_a_block_add_up(tiny: Callable[[str], Model], architecture: str) -> None:
    model = tiny(architecture)
    kinds = [name.removeprefix("blocks.1.") for name in model.hook_points.names() if name.startswith("blocks.1.hook_")]
    at = dict(
        zip(kinds, extract(model, PROMPTS, hook_points=[f"blocks.1.{kind}" for kind in kinds]).values, strict=True)
    )
    both = at["hook_attn_out"] + at["hook_mlp_out"]
    assert distance(at["hook_resid_pre"] + both, at["hook_resid_post"]) < TOLERANCE
    if "hook_resid_mid" in at:
        assert distance(at["hook_resid_pre"] + at["hook_attn_out"], at["hook_resid_mid"]) < TOLERANCE
    before = extract(model, PROMPTS, hook_points=["blocks.0.hook_resid_post"]).values[0]
    np.testing.assert_array_equal(before, at["hook_resid_pre"])


def test_bfloat16_stays_within_its_precision(tiny_network: Callable[..., Any], tokenizer: Any, llama: Model) -> None:
    rough = load_model(tiny_network("llama"), tokenizer=tokenizer, dtype="bfloat16")
    assert distance(extract(rough, PROMPTS).values, extract(llama, PROMPTS).values) < 0.1


# Whatever the batches


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    order=st.permutations(range(len(PROMPTS))),
    max_tokens=st.sampled_from([1, 40, 90, 2048]),
    pooling=st.sampled_from(["last", "mean", "max"]),
    architecture=st.sampled_from(["llama", "gemma3", "gpt2", "gpt-neox", "mixtral"]),
)
def test_neither_order_nor_batches_change_an_activation(
    order: list[int], max_tokens: int, pooling: str, architecture: str, tiny: Callable[[str], Model]
) -> None:
    model = tiny(architecture)
    straight = extract(model, PROMPTS, pooling=pooling).values
    shuffled = extract(model, [PROMPTS[row] for row in order], pooling=pooling, max_tokens=max_tokens).values
    assert distance(shuffled, straight[:, order]) < TOLERANCE


# The pass, and what it leaves


def calls(network: Any, paths: list[str]) -> Callable[[], list[str]]:
    """Watch which modules run: `calls(...)()` lists them and stops watching."""
    seen: list[str] = []
    handles = [
        network.get_submodule(path).register_forward_pre_hook(lambda *_, path=path: seen.append(path)) for path in paths
    ]

    def stop() -> list[str]:
        for handle in handles:
            handle.remove()
        return seen

    return stop


def test_the_pass_stops_after_the_last_wanted_layer(llama: Model) -> None:
    watched = ["model.layers.0", "model.layers.1", "model.layers.2", "lm_head"]
    stop = calls(llama.hf, watched)
    extract(llama, PROMPTS, hook_points=["blocks.1.hook_resid_post", "blocks.0.hook_resid_post"])
    assert stop() == watched[:2]
    stop = calls(llama.hf, watched)
    extract(llama, PROMPTS)
    assert stop() == watched[:3], "the unembedding is never needed"


def hooks(model: Model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.hf.modules())


def test_no_hook_is_left_behind(llama: Model) -> None:
    before, names = hooks(llama), llama.hook_points.names()
    inside = []
    with capture(llama, names, lambda *_: inside.append(hooks(llama))):
        llama.hf(input_ids=torch.tensor([[1, 2]]))
    assert max(inside) == before + len(names)
    assert hooks(llama) == before


def test_no_hook_is_left_behind_by_an_error(llama: Model) -> None:
    before = hooks(llama)

    def fails(name: str, _: torch.Tensor) -> None:
        raise ZeroDivisionError(name)

    with pytest.raises(ZeroDivisionError, match=r"blocks\.0"), capture(llama, llama.hook_points.names(), fails):
        llama.hf(input_ids=torch.tensor([[1, 2]]))
    assert hooks(llama) == before


def test_a_place_that_the_pass_never_came_by_is_an_error(llama: Model) -> None:
    name = "blocks.2.hook_resid_post"
    with pytest.raises(HookPointError, match=r"no forward pass came by blocks\.2"), capture(llama, [name], print):
        llama.hf.model.layers[0].input_layernorm(torch.zeros(1, 1, 48))


def test_extraction_needs_no_gradients(llama: Model) -> None:
    wanted = []
    spy = llama.hf.model.layers[0].register_forward_hook(lambda _, __, output: wanted.append(output.requires_grad))
    extract(llama, PROMPTS, hook_points=["blocks.0.hook_resid_post"])
    spy.remove()
    assert wanted
    assert not any(wanted)
    assert torch.is_grad_enabled()


# What comes with the numbers


def test_a_prompt_set_brings_its_labels(llama: Model) -> None:
    activations = extract(llama, PAIRED)
    assert activations.labels is not None
    assert activations.labels.tolist() == [True, False, True, False]
    assert activations.hook_points == llama.hook_points.names("hook_resid_post")
    assert (activations.provenance.prompts_name, activations.provenance.pair_ids) == ("pairs", PAIRED.pair_ids)
    assert activations.provenance.prompts_hash == PAIRED.content_hash
    assert extract(llama, PROMPTS).labels is None


def test_the_provenance_tells_a_checkpoint_from_the_base(
    llama: Model, tiny_network: Callable[..., Any], tmp_path: Path
) -> None:
    tiny_network("llama", seed=1).save_pretrained(tmp_path)
    base = extract(llama, PAIRED)
    with llama.applied(tmp_path):
        tuned = extract(llama, PAIRED)
    assert base.provenance.fingerprint == tuned.provenance.fingerprint == llama.fingerprint
    assert (base.provenance.tuned, len(tuned.provenance.tuned)) == ("", 64)
    assert distance(tuned.values, base.values) > 0.1
    np.testing.assert_array_equal(extract(llama, PAIRED).values, base.values)


def test_a_system_prompt_changes_what_is_read(llama: Model) -> None:
    assert distance(extract(llama, PROMPTS, system="T4").values, extract(llama, PROMPTS).values) > 0.01


def test_a_layer_is_found_by_number_or_name(llama: Model) -> None:
    activations = extract(llama, PROMPTS, hook_points=["blocks.1.hook_resid_pre", "blocks.2.hook_resid_post"])
    np.testing.assert_array_equal(activations.layer(2), activations.values[1])
    np.testing.assert_array_equal(activations.layer("blocks.1.hook_resid_pre"), activations.values[0])
    with pytest.raises(HookPointError, match="0 stands for 0 of the extracted hook points"):
        activations.layer(0)
    both = extract(llama, PROMPTS, hook_points=["blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"])
    with pytest.raises(HookPointError, match="1 stands for 2 of the extracted hook points"):
        both.layer(1)


# Mistakes


@pytest.mark.parametrize(
    ("hook_points", "prompts"), [([], PROMPTS), (None, []), (["blocks.0.hook_resid_post"] * 2, PROMPTS)]
)
def test_nothing_to_extract_or_the_same_twice_is_refused(
    hook_points: list[str] | None, prompts: list[str], llama: Model
) -> None:
    with pytest.raises(OptionError, match="expected at least one of each, and no hook point twice"):
        extract(llama, prompts, hook_points=hook_points)


def test_a_prompt_longer_than_the_models_positions_is_named(tiny: Callable[[str], Model]) -> None:
    with pytest.raises(PromptError, match="prompt 1 has 319 tokens, expected at most 256, the positions of GPT2"):
        extract(tiny("gpt2"), ["Hi", "x" * 300])


def test_an_unknown_pooling_or_hook_point_is_refused(llama: Model) -> None:
    with pytest.raises(OptionError, match="unknown pooling 'sum'"):
        extract(llama, PROMPTS, pooling="sum")
    with pytest.raises(HookPointError, match="layer 7"):
        extract(llama, PROMPTS, hook_points=["blocks.7.hook_resid_post"])


def test_a_model_without_a_tokenizer_says_so(tiny_network: Callable[..., Any]) -> None:
    with pytest.raises(OptionError, match="has no tokenizer"):
        extract(load_model(tiny_network("llama")), PROMPTS)


# Files


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pooling", ["last", "mean", "max", "all"])
def test_saved_and_loaded_is_the_same(
    pooling: str, dtype: str, tiny_network: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    model = load_model(tiny_network("llama"), tokenizer=tokenizer, dtype=dtype)
    made = extract(model, PAIRED, pooling=pooling)
    made.save(tmp_path / "saved.h5")
    written = extract(model, PAIRED, pooling=pooling, out=tmp_path / "written.h5", max_tokens=2048)
    for other in (Activations.load(tmp_path / "saved.h5"), written, Activations.load(tmp_path / "written.h5")):
        assert other.provenance == made.provenance
        np.testing.assert_array_equal(other.values, made.values)
        assert len(other.tokens) == len(made.tokens)
        for got, expected in zip(other.tokens, made.tokens, strict=True):
            np.testing.assert_array_equal(got, expected)


def test_an_interrupted_extraction_goes_on_and_ends_the_same(
    llama: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, whole = tmp_path / "out.h5", extract(llama, PAIRED, max_tokens=1)
    append, appended = ActivationStore.append, []

    def dies_at_the_third(store: ActivationStore, rows: tuple[int, ...], *rest: Any) -> None:
        if len(appended) == 2:
            raise KeyboardInterrupt
        appended.append(rows)
        append(store, rows, *rest)

    monkeypatch.setattr(ActivationStore, "append", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        extract(llama, PAIRED, out=path, max_tokens=1)
    monkeypatch.undo()
    with pytest.raises(StoreError, match="2 prompts, such as 0, are not finished"):
        Activations.load(path)
    ran = []
    watch = llama.hf.model.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
    resumed = extract(llama, PAIRED, out=path, max_tokens=1)
    again = extract(llama, PAIRED, out=path)
    watch.remove()
    assert len(ran) == 2, "only what was missing is run"
    for made in (resumed, again):
        np.testing.assert_array_equal(made.values, whole.values)


def test_a_file_of_other_prompts_is_not_written_to(llama: Model, tmp_path: Path) -> None:
    extract(llama, PAIRED, out=tmp_path / "out.h5")
    with pytest.raises(StoreError, match="prompts_name is 'pairs' in the file, expected ''"):
        extract(llama, PROMPTS, out=tmp_path / "out.h5")


def test_the_package_exports_the_function_and_not_the_module() -> None:
    assert extract_function is extract

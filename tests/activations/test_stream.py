"""The loop: what is computed once, what is tried again, what is named; threads that neither lose nor hide anything."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from activations import stream as module
from activations.background import ahead, behind
from activations.errors import MemoryLimitError, NonFiniteError, OptionError, PromptError, StoreError
from activations.extract import extract
from activations.forward import Reader
from activations.loading import load_model
from activations.models import Model
from activations.packing import can_pack
from activations.results import Activations
from activations.tokens import format_prompt

PROMPTS = ["Hi", "How do I bake bread?", "x" * 30, "What is the capital of Iceland, and why?", "é"]


@pytest.fixture
def tokens_run(llama: Model) -> Iterator[list[int]]:
    """Tokens of each forward pass."""
    can_pack(llama)  # tries it on a small example, once
    seen: list[int] = []
    handle = llama.hf.model.embed_tokens.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
    yield seen
    handle.remove()


# Once


@pytest.mark.parametrize("pooling", ["last", "all"])
def test_identical_prompts_run_once(pooling: str, llama: Model, tokens_run: list[int]) -> None:
    twice = [PROMPTS[0], *PROMPTS, PROMPTS[3]]
    got = extract(llama, twice, pooling=pooling, max_tokens=64)
    assert sum(tokens_run) == sum(len(format_prompt(llama.tokenizer, prompt)) for prompt in PROMPTS)
    expected = extract(llama, PROMPTS, pooling=pooling, max_tokens=64)
    rows = [0, 0, 1, 2, 3, 4, 3]
    np.testing.assert_array_equal(got.values, expected.values[:, rows] if pooling == "last" else expected.values)
    for one, row in zip(got.tokens, rows, strict=False):
        np.testing.assert_array_equal(one, expected.tokens[row])


def test_prompts_with_other_regions_are_not_identical(llama: Model) -> None:
    both = extract(llama, ["abc", "abc"], pooling="last@span", span=["a", "c"])
    assert np.abs(both.values[:, 0] - both.values[:, 1]).max() > 1e-3


def test_several_poolings_take_one_pass(llama: Model, tokens_run: list[int]) -> None:
    poolings = ["last", "mean@user", "all@after[-2:]"]
    together = extract(llama, PROMPTS, pooling=poolings)
    assert list(together) == poolings
    once = sum(tokens_run)
    for pooling in poolings:
        single = extract(llama, PROMPTS, pooling=pooling)
        assert single.provenance == together[pooling].provenance
        np.testing.assert_array_equal(single.values, together[pooling].values)
        for got, expected in zip(together[pooling].tokens, single.tokens, strict=True):
            np.testing.assert_array_equal(got, expected)
    assert sum(tokens_run) == 4 * once


def test_windows_change_nothing(llama: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = extract(llama, PROMPTS).values
    monkeypatch.setattr(module, "_WINDOW", 2)
    np.testing.assert_allclose(extract(llama, PROMPTS).values, whole, rtol=1e-4, atol=1e-5)


# What the model writes


def test_the_models_own_answer_is_what_it_held_while_it_wrote(llama: Model) -> None:
    count = 5
    got = extract(llama, PROMPTS, pooling="all@answer", answers=count, hook_points=["blocks.1.hook_resid_post"])
    for prompt, tokens in zip(PROMPTS, got.tokens, strict=True):
        seen: list[torch.Tensor] = []
        watch = llama.hf.model.layers[1].register_forward_hook(lambda _, __, out, seen=seen: seen.append(out[0, -1]))
        ids = torch.tensor([format_prompt(llama.tokenizer, prompt)])
        out = llama.hf.generate(ids, max_new_tokens=count + 1, do_sample=False, eos_token_id=None)
        watch.remove()
        written = out[0, ids.shape[1] :].tolist()
        length = written.index(llama.tokenizer.eos_token_id) + 1 if llama.tokenizer.eos_token_id in written else count
        held = torch.stack(seen[1:])[: min(length, count)]
        np.testing.assert_allclose(tokens[0], held.numpy(), rtol=1e-3, atol=1e-4)


def test_answers_given_are_read_behind_the_prompt(llama: Model) -> None:
    texts = ["Yes, of course", "No"]
    ids = [llama.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    by_text = extract(llama, PROMPTS[:2], pooling="all@answer", answers=texts)
    by_ids = extract(llama, PROMPTS[:2], pooling="all@answer", answers=ids)
    assert [one.shape[1] for one in by_text.tokens] == [len(row) for row in ids]
    for got, expected in zip(by_ids.tokens, by_text.tokens, strict=True):
        np.testing.assert_array_equal(got, expected)
    assert by_text.provenance.regions_hash != extract(llama, PROMPTS[:2]).provenance.regions_hash
    with pytest.raises(PromptError, match="prompt 0 has no token at 'answer'"):
        extract(llama, PROMPTS[:1], pooling="all@answer")
    with pytest.raises(OptionError, match="answers is 0"):
        extract(llama, PROMPTS, answers=0)


def test_places_of_one_width_are_extracted_together_and_others_are_refused(tiny: Callable[[str], Model]) -> None:
    wide = tiny("qwen3-wide")
    heads = ["blocks.0.attn.hook_z", "blocks.2.attn.hook_z"]
    found = extract(wide, PROMPTS, hook_points=heads)
    assert found.values.shape == (2, len(PROMPTS), 4 * 20)
    assert found.provenance.d_model == 80
    with pytest.raises(OptionError, match=r"differ in width: blocks.0.attn.hook_z has 80, .*hook_resid_post has 48"):
        extract(wide, PROMPTS, hook_points=[heads[0], "blocks.0.hook_resid_post"])


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_router_logits_are_pooled_like_everything_else(architecture: str, tiny: Callable[[str], Model]) -> None:
    model = tiny(architecture)
    name = model.hook_points.names("mlp.hook_router_logits")[-1]
    got = extract(model, PROMPTS, hook_points=[name], pooling="all").tokens
    for prompt, tokens in zip(PROMPTS, got, strict=True):
        ids = torch.tensor([format_prompt(model.tokenizer, prompt)])
        with torch.inference_mode():
            expected = model.hf(input_ids=ids, output_router_logits=True).router_logits[-1]
        np.testing.assert_allclose(tokens[0], expected.numpy(), rtol=1e-4, atol=1e-4)


# Memory


def test_a_batch_that_does_not_fit_is_tried_again_in_halves(llama: Model, tmp_path: Path) -> None:
    whole, sizes = extract(llama, PROMPTS, max_tokens=1).values, []

    def small_device(_: Any, args: tuple[Any, ...]) -> None:
        sizes.append(args[0].numel())
        if args[0].numel() > 70:
            raise torch.OutOfMemoryError("too much")

    handle = llama.hf.model.embed_tokens.register_forward_pre_hook(small_device)
    try:
        got = extract(llama, PROMPTS, out=tmp_path / "out.h5")
    finally:
        handle.remove()
    np.testing.assert_allclose(got.values, whole, rtol=1e-4, atol=1e-5)
    assert sizes[0] > 70
    fitted = [size for size in sizes if size <= 70]
    assert sum(fitted) == sum(len(format_prompt(llama.tokenizer, prompt)) for prompt in PROMPTS), (
        "none lost, none twice"
    )


def test_a_prompt_that_does_not_fit_alone_is_named(llama: Model) -> None:
    def tiny_device(_: Any, args: tuple[Any, ...]) -> None:
        if args[0].numel() > 45:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    handle = llama.hf.model.embed_tokens.register_forward_pre_hook(tiny_device)
    try:
        with pytest.raises(MemoryLimitError, match="prompt 3 with 59 tokens does not fit into memory"):
            extract(llama, PROMPTS)
    finally:
        handle.remove()


def test_other_errors_of_torch_are_not_taken_for_memory(llama: Model) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("shapes differ")

    handle = llama.hf.model.layers[0].register_forward_pre_hook(broken)
    try:
        with pytest.raises(RuntimeError, match="shapes differ"):
            extract(llama, PROMPTS)
    finally:
        handle.remove()
    assert module._is_out_of_memory(MemoryError())


def test_the_files_of_a_run_hold_no_more_in_memory_than_is_asked_for(llama: Model, tmp_path: Path) -> None:
    written = extract(llama, PROMPTS, out=tmp_path / "out.h5")
    assert written._values is None
    expected = extract(llama, PROMPTS).values
    np.testing.assert_array_equal(written.layer(1), expected[1])
    assert written._values is None
    np.testing.assert_array_equal(written.values, expected)


def test_several_poolings_go_to_a_folder_and_each_file_goes_on_alone(llama: Model, tmp_path: Path) -> None:
    poolings = ("last", "all@user[:2]")
    extract(llama, PROMPTS, pooling=poolings, out=tmp_path / "out")
    files = sorted((tmp_path / "out").iterdir())
    assert [file.name for file in files] == ["all_user__2_.h5", "last.h5"]
    files[1].unlink()
    again = extract(llama, PROMPTS, pooling=poolings, out=tmp_path / "out")
    np.testing.assert_array_equal(again["last"].values, extract(llama, PROMPTS).values)
    for got, expected in zip(Activations.load(files[0]).tokens, again["all@user[:2]"].tokens, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_a_shared_beginning_is_gathered_in_parts(llama: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    gathered: list[int] = []
    reduce = torch.segment_reduce

    def watched(data: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        gathered.append(len(data))
        return reduce(data, *rest, **options)

    monkeypatch.setattr(torch, "segment_reduce", watched)
    many, name = [f"prompt {i}" for i in range(40)], "blocks.0.hook_resid_post"
    got = extract(llama, many, pooling="mean", system="s" * 100, hook_points=[name], max_tokens=512)
    assert max(gathered) < 0.5 * sum(gathered)
    assert max(gathered) <= 2 * (512 + 120)
    monkeypatch.setattr(module, "_SHARED_TOKENS", 10**6)
    plain = extract(llama, many, pooling="mean", system="s" * 100, hook_points=[name])
    np.testing.assert_allclose(got.values, plain.values, rtol=1e-4, atol=1e-5)


def test_a_shared_beginning_that_does_not_fit_is_read_with_each_prompt(llama: Model) -> None:
    whole = extract(llama, PROMPTS, system="T4 " * 10).values
    calls: list[int] = []

    def no_room_for_the_front(_: Any, args: tuple[Any, ...]) -> None:
        calls.append(args[0].numel())
        if len(calls) == 1:
            raise torch.OutOfMemoryError("too much")

    handle = llama.hf.model.embed_tokens.register_forward_pre_hook(no_room_for_the_front)
    try:
        got = extract(llama, PROMPTS, system="T4 " * 10)
    finally:
        handle.remove()
    assert len(calls) == 2
    np.testing.assert_allclose(got.values, whole, rtol=1e-4, atol=1e-5)


# Numbers that are none


def test_an_infinite_activation_is_named_by_layer_and_prompt(
    tiny_network: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    model = load_model(tiny_network("llama"), tokenizer=tokenizer)
    bad = model.tokenizer("é", add_special_tokens=False)["input_ids"][0]

    def overflow(_: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.masked_fill((args[0] == bad)[..., None], float("inf"))

    model.hf.model.embed_tokens.register_forward_hook(overflow)
    for options in ({}, {"out": tmp_path / "out.h5", "max_tokens": 1}):
        with pytest.raises(NonFiniteError, match=r"NaN or infinite at blocks\.0\.hook_resid_post of prompt 4 \(mean\)"):
            extract(model, PROMPTS, pooling="mean", **options)
    extract(model, PROMPTS[:4], pooling="mean")


# Mistakes


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"answers": "Sure"}, OptionError, "answers is one text"),
        (
            {"answers": [[1], [2], [3], [4], [99999]], "pooling": "all@answer"},
            PromptError,
            "prompt 4 has the token id 99999",
        ),
        ({"answers": [[1], [-2], [3], [4], [5]]}, PromptError, "prompt 1 has the token id -2"),
        ({"answers": 250}, PromptError, "prompt 0 has 271 tokens, expected at most 256"),
        ({"pooling": 3}, OptionError, "unknown pooling 3"),
        ({"pooling": "last@user[40:]"}, PromptError, "prompt 0 has no token at 'user'"),
        ({"max_tokens": 0}, OptionError, "max_tokens is 0"),
    ],
)
def test_options_that_make_no_sense_are_named(
    options: dict[str, Any], error: type[Exception], message: str, llama: Model
) -> None:
    with pytest.raises(error, match=message):
        extract(llama, PROMPTS, **options)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [("Hello", "prompts is one text"), (["Hi", None], "prompt 1 is a NoneType"), (["\ud800"], "half a surrogate pair")],
)
def test_prompts_that_are_none_are_named(prompts: Any, message: str, llama: Model) -> None:
    with pytest.raises((OptionError, PromptError), match=message):
        extract(llama, prompts)


def test_prompts_may_come_from_a_generator_and_answers_as_arrays(llama: Model) -> None:
    texts = iter(PROMPTS[:2])
    got = extract(llama, texts, pooling="last@answer", answers=[np.array([5, 6]), torch.tensor([7])])  # type: ignore[arg-type, list-item]
    expected = extract(llama, PROMPTS[:2], pooling="last@answer", answers=[[5, 6], [7]])
    np.testing.assert_array_equal(got.values, expected.values)
    assert got.provenance == expected.provenance


def test_a_folder_that_cannot_be_made_is_named(llama: Model, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(StoreError, match="no folder can be made here"):
        extract(llama, PROMPTS, pooling=["last"], out=tmp_path / "taken")
    made = extract(llama, PROMPTS, pooling=["last"], out=tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder" / "last.h5").is_file()
    assert list(made) == ["last"]


def test_truncated_prompts_are_answered_as_they_are_read(llama: Model) -> None:
    got = extract(llama, PROMPTS, pooling="all@text", answers=3, truncate_to=30)
    prompts = extract(llama, PROMPTS, pooling="all", truncate_to=30)
    assert max(prompt.shape[1] for prompt in prompts.tokens) == 30
    for text, prompt in zip(got.tokens, prompts.tokens, strict=True):
        assert prompt.shape[1] <= 30
        np.testing.assert_allclose(text[:, : prompt.shape[1]], prompt, rtol=1e-3, atol=1e-4)


def test_the_same_weights_under_another_configuration_are_another_base(
    tiny_network: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    extract(load_model(tiny_network("llama"), tokenizer=tokenizer), PROMPTS, out=tmp_path / "out.h5")
    other = tiny_network("llama")
    other.config.rms_norm_eps = 1e-3
    with pytest.raises(StoreError, match="config_hash is"):
        extract(load_model(other, tokenizer=tokenizer), PROMPTS, out=tmp_path / "out.h5")


def test_two_threads_on_one_model_leave_it_as_it_was(llama: Model) -> None:
    expected, before = extract(llama, PROMPTS, max_tokens=64).values, llama.hf.config._attn_implementation
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(extract, llama, PROMPTS, max_tokens=64) for _ in range(6)]
    for run in runs:
        np.testing.assert_array_equal(run.result().values, expected)
    assert llama.hf.config._attn_implementation == before


# Threads


def test_a_fault_in_the_last_prompt_shows_before_the_first_is_run_through(
    llama: Model, tokens_run: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_WINDOW", 4)
    launch = Reader.launch

    def slow(self: Reader, *args: Any) -> Any:
        time.sleep(0.02)  # while the thread goes on with the tokens
        return launch(self, *args)

    monkeypatch.setattr(Reader, "launch", slow)
    many = [f"prompt {i}" for i in range(400)]
    with pytest.raises(PromptError, match="prompt 400 is empty"):
        extract(llama, [*many, " "], hook_points=["blocks.0.hook_resid_post"])
    assert len(tokens_run) < 50, "of a hundred"


def test_results_come_in_order_and_a_later_fault_comes_early() -> None:
    assert list(ahead([lambda i=i: i for i in range(5)])) == [0, 1, 2, 3, 4]

    def fails() -> int:
        raise ValueError("late")

    results = ahead([lambda: 0, lambda: 1, fails])
    assert next(results) in (0, 1)
    time.sleep(0.2)
    with pytest.raises(ValueError, match="late"):
        next(results)


def test_nothing_handed_over_is_lost_and_it_is_done_in_order() -> None:
    done: list[int] = []
    with behind(lambda item: (time.sleep(0.001), done.append(item))) as hand_over:
        for item in range(30):
            hand_over(item)
    assert done == list(range(30))


def test_handing_over_waits_when_too_much_is_unfinished() -> None:
    gate, begun = threading.Event(), []

    def work(item: int) -> None:
        begun.append(item)
        gate.wait(10)

    threading.Timer(0.3, gate.set).start()
    with behind(work) as hand_over:
        for item in range(6):
            hand_over(item)
            if item == 5:
                assert gate.is_set(), "the sixth had to wait"


def test_what_the_writer_raises_reaches_the_reader_and_ends_the_work() -> None:
    done: list[int] = []

    def work(item: int) -> None:
        if item == 2:
            raise OSError("disk full")
        done.append(item)

    def run() -> None:
        with behind(work) as hand_over:
            for item in range(100):
                hand_over(item)
                time.sleep(0.001)

    with pytest.raises(OSError, match="disk full"):
        run()
    assert done == [0, 1]

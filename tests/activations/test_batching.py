"""Batches lose, mix and invent nothing; pooling equals a plain loop, whatever the layout."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from activations.batching import Batch, Pooling, next_batch, pick, token_batches
from activations.errors import OptionError, PromptError
from activations.tokens import Tokenised

prompt_lengths = st.lists(st.integers(1, 40), max_size=30)
layouts = st.booleans()


def random_ids(lengths: list[int]) -> list[list[int]]:
    return [[100 * row + step for step in range(length)] for row, length in enumerate(lengths)]


def tokens_of(batch: Batch) -> dict[int, list[int]]:
    flat = batch.input_ids.flatten()
    spans = zip(batch.rows, batch.starts, batch.lengths, strict=True)
    return {row: flat[start : start + length].tolist() for row, start, length in spans}


@given(lengths=prompt_lengths, max_tokens=st.integers(1, 100), packed=layouts)
def test_batches_hold_every_prompt_once_and_unchanged(lengths: list[int], max_tokens: int, packed: bool) -> None:
    ids = random_ids(lengths)
    seen: dict[int, list[int]] = {}
    for batch in token_batches(ids, max_tokens=max_tokens, packed=packed):
        found = tokens_of(batch)
        assert not found.keys() & seen.keys()
        seen |= found
    assert seen == dict(enumerate(ids))


@given(lengths=prompt_lengths, max_tokens=st.integers(1, 100), packed=layouts)
def test_batches_keep_the_budget_and_go_from_long_to_short(lengths: list[int], max_tokens: int, packed: bool) -> None:
    batches = list(token_batches(random_ids(lengths), max_tokens=max_tokens, packed=packed))
    assert all(batch.input_ids.numel() <= max_tokens or len(batch.rows) == 1 for batch in batches)
    every = [int(length) for batch in batches for length in batch.lengths]
    assert every == sorted(every, reverse=True)


@given(lengths=prompt_lengths, max_tokens=st.integers(1, 100))
def test_a_packed_batch_is_as_full_as_it_can_be_and_has_no_padding(lengths: list[int], max_tokens: int) -> None:
    batches = list(token_batches(random_ids(lengths), max_tokens=max_tokens, packed=True))
    for batch, following in pairwise(batches):
        assert batch.input_ids.numel() == batch.lengths.sum()
        assert batch.lengths.sum() + following.lengths[0] > max_tokens, "the next prompt would have fitted"


def test_padding_comes_after_the_prompt() -> None:
    batch = next_batch([[5, 6], [1, 2, 3]], [1, 0], max_tokens=9, pad_id=7)
    assert (batch.rows, batch.input_ids.tolist()) == ((1, 0), [[1, 2, 3], [5, 6, 7]])
    assert batch.position_ids is None


def test_positions_start_again_with_each_packed_prompt_and_behind_a_shared_beginning() -> None:
    ids = [[1, 2, 3, 4], [1, 2, 9]]
    whole = next_batch(ids, [0, 1], max_tokens=9, packed=True)
    assert whole.position_ids is not None
    assert (whole.input_ids.tolist(), whole.position_ids.tolist()) == ([[1, 2, 3, 4, 1, 2, 9]], [[0, 1, 2, 3, 0, 1, 2]])
    own = next_batch(ids, [0, 1], max_tokens=9, packed=True, prefix=2)
    assert own.position_ids is not None
    assert (own.input_ids.tolist(), own.position_ids.tolist()) == ([[3, 4, 9]], [[2, 3, 2]])


def test_only_the_wanted_rows_are_batched_under_their_own_numbers() -> None:
    ids = random_ids([3, 9, 4, 1])
    rows = sorted(row for batch in token_batches(ids, rows=[0, 3], max_tokens=8) for row in batch.rows)
    assert rows == [0, 3]


@pytest.mark.parametrize("max_tokens", [0, -1])
def test_a_budget_without_room_is_refused(max_tokens: int) -> None:
    with pytest.raises(OptionError, match=f"max_tokens is {max_tokens}"):
        list(token_batches([[1]], max_tokens=max_tokens))


# Pooling

REDUCE = {
    "last": lambda tokens: tokens[-1:],
    "mean": lambda tokens: tokens.mean(0, keepdim=True),
    "max": lambda tokens: tokens.amax(0, keepdim=True),
    "all": lambda tokens: tokens,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["padded", "packed", "prefix"])
@pytest.mark.parametrize("pooling", ["last", "mean", "max", "all", "mean@user", "all@user[1:]", "last@user[:-1]"])
def test_pooling_equals_a_plain_loop_and_never_sees_padding(pooling: str, layout: str, dtype: torch.dtype) -> None:
    lengths, shared = [5, 4, 8], 2 if layout == "prefix" else 0
    values = [torch.randn(n, 3, generator=torch.Generator().manual_seed(n)).to(dtype) for n in lengths]
    for value in values[1:]:
        value[:shared] = values[0][:shared]
    prompts = {row: Tokenised(np.arange(n), {"prompt": (0, n), "user": (1, n - 1)}) for row, n in enumerate(lengths)}
    ids = {row: prompt.ids for row, prompt in prompts.items()}
    batch = next_batch(ids, [2, 0, 1], max_tokens=99, packed=layout != "padded", prefix=shared)
    flat = torch.full((shared + batch.input_ids.numel(), 3), float("nan"), dtype=dtype)
    flat[:shared] = values[0][:shared]
    for row, start, length in zip(batch.rows, batch.starts, batch.lengths, strict=True):
        flat[shared + start : shared + start + length] = values[row][shared:]
    how = Pooling.parse(pooling)
    cut = slice(1, -1) if how.region == "user" else slice(None)
    part = slice(how.start, how.stop)
    expected = torch.cat([REDUCE[how.reduction](values[row][cut][part].float()) for row in batch.rows])
    got = pick(batch, prompts, how)
    assert got.of(flat).dtype == torch.float32
    assert sum(got.lengths) == len(expected)
    np.testing.assert_allclose(got.of(flat), expected, rtol=1e-6, atol=1e-6)


def test_means_are_summed_in_float32() -> None:
    hidden = torch.cat([torch.full((1, 1), 256.0), torch.ones(600, 1)]).bfloat16()
    batch = next_batch([[1] * 601], [0], max_tokens=999, packed=True)
    prompts = {0: Tokenised(np.ones(601), {"prompt": (0, 601)})}
    assert pick(batch, prompts, Pooling("mean")).of(hidden).item() == pytest.approx(856 / 601, rel=1e-6)
    assert hidden.mean(0).item() != pytest.approx(856 / 601, rel=1e-3), "bfloat16 alone would round it"


@pytest.mark.parametrize("text", ["first", "mean@", "mean@user[]", "all@answer[1]", "last@prompt[1:2:3]", "", "MEAN"])
def test_an_unknown_pooling_is_refused_with_the_known_ones(text: str) -> None:
    with pytest.raises(OptionError, match="expected last, mean, max, all, alone or with a region"):
        Pooling.parse(text)


def test_a_region_without_tokens_is_named_with_its_prompt() -> None:
    prompts = {4: Tokenised(np.arange(3), {"answer": (3, 3)})}
    batch = next_batch({4: prompts[4].ids}, [4], max_tokens=9)
    with pytest.raises(PromptError, match="prompt 4 has no token at 'answer'"):
        pick(batch, prompts, Pooling.parse("mean@answer"))

"""Batches lose, mix and invent nothing; pooling equals a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from activations.batching import POOLINGS, check_pooling, pool, positions, token_batches
from activations.errors import OptionError

prompt_lengths = st.lists(st.integers(1, 40), max_size=30)


def random_ids(lengths: list[int]) -> list[list[int]]:
    return [[100 * row + step for step in range(length)] for row, length in enumerate(lengths)]


@given(lengths=prompt_lengths, max_tokens=st.integers(1, 100))
def test_batches_hold_every_prompt_once_and_unchanged(lengths: list[int], max_tokens: int) -> None:
    ids = random_ids(lengths)
    seen = {}
    for batch in token_batches(ids, max_tokens=max_tokens, pad_id=7):
        for row, tokens, mask in zip(batch.rows, batch.input_ids, batch.mask, strict=True):
            assert row not in seen
            seen[row] = tokens[mask].tolist()
            assert (tokens[~mask] == 7).all()
    assert seen == dict(enumerate(ids))


@given(lengths=prompt_lengths, max_tokens=st.integers(1, 100))
def test_batches_keep_the_budget_and_go_from_long_to_short(lengths: list[int], max_tokens: int) -> None:
    batches = list(token_batches(random_ids(lengths), max_tokens=max_tokens))
    assert all(batch.input_ids.numel() <= max_tokens or len(batch.rows) == 1 for batch in batches)
    widths = [batch.input_ids.shape[1] for batch in batches]
    assert widths == sorted(widths, reverse=True)


def test_padding_comes_after_the_prompt() -> None:
    (batch,) = token_batches([[5, 6], [1, 2, 3]])
    assert batch.rows == (1, 0)
    assert batch.mask.tolist() == [[True, True, True], [True, True, False]]


def test_only_the_wanted_rows_are_batched_under_their_own_numbers() -> None:
    ids = random_ids([3, 9, 4, 1])
    rows = sorted(row for batch in token_batches(ids, rows=[0, 3], max_tokens=8) for row in batch.rows)
    assert rows == [0, 3]


@pytest.mark.parametrize("max_tokens", [0, -1])
def test_a_budget_without_room_is_refused(max_tokens: int) -> None:
    with pytest.raises(OptionError, match=f"max_tokens is {max_tokens}"):
        list(token_batches([[1]], max_tokens=max_tokens))


def test_positions_count_from_the_first_token_with_padding_on_either_side() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]).bool()
    assert positions(mask)[mask].tolist() == [0, 1, 2, 0, 1, 2]


def padded_mask(lengths: list[int], *, left: bool) -> torch.Tensor:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return mask.flip(1) if left else mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_equals_a_plain_loop_and_never_sees_padding(pooling: str, left: bool, dtype: torch.dtype) -> None:
    lengths = [4, 1, 7]
    mask = padded_mask(lengths, left=left)
    hidden = torch.randn(*mask.shape, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    hidden[~mask] = float("nan")
    reduce = {
        "last": lambda tokens: tokens[-1:],
        "mean": lambda tokens: tokens.mean(0, keepdim=True),
        "max": lambda tokens: tokens.amax(0, keepdim=True),
        "all": lambda tokens: tokens,
    }[pooling]
    expected = torch.cat([reduce(row[kept].float()) for row, kept in zip(hidden, mask, strict=True)])
    got = pool(hidden, mask, check_pooling(pooling))
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def test_means_are_summed_in_float32() -> None:
    hidden = torch.cat([torch.full((1, 1, 1), 256.0), torch.ones(1, 600, 1)], dim=1).bfloat16()
    mask = torch.ones(1, 601, dtype=torch.bool)
    assert pool(hidden, mask, "mean").item() == pytest.approx(856 / 601, rel=1e-6)
    assert hidden.mean(1).item() != pytest.approx(856 / 601, rel=1e-3), "bfloat16 alone would round it"


def test_an_unknown_pooling_is_refused_with_the_known_ones() -> None:
    with pytest.raises(OptionError, match="'first': expected one of last, mean, max, all"):
        check_pooling("first")

"""Squares: what the order of the letters tells is told, and nothing else."""

from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import pytest

from probes.cryptanalysis import break_encoding
from probes.encodings import LETTERS, Encoding, make_encoding, polybius_square
from probes.key_search import quads_of_codes
from probes.squares import grid_of, key_word_square, told

GRID = [f"{row}{column}" for row, column in product("12345", "12345")]
RARE = ("j", "k", "q", "v", "x", "z")


def square_of(letters: str) -> Encoding:
    """Polybius with this square, j written as i."""
    cell_of = dict(zip(letters, GRID, strict=True))
    return make_encoding("polybius", " ".join(cell_of.get(letter, "?") for letter in LETTERS))


def random_square(seed: int) -> str:
    return "".join(np.random.default_rng(seed).permutation(list(LETTERS.replace("j", ""))))


def without(sentences: list[str], letters: tuple[str, ...], count: int) -> list[str]:
    return [text for text in sentences if not set(letters) & set(text.lower())][:count]


def known(key: str) -> dict[str, str]:
    return {letter: cell for letter, cell in zip(LETTERS, key.split(), strict=True) if cell != "?"}


@pytest.mark.parametrize("key", [3, 7, 11, 12, 13])
def test_letters_that_never_occur_follow_from_the_order_of_the_square(key: int, sentences: list[str]) -> None:
    plain = without(sentences, RARE, 14)
    broken = break_encoding([make_encoding("polybius", key).encode(text) for text in plain])
    assert broken is not None
    assert broken.encoding is not None
    found, truth = known(broken.key), dict(zip(polybius_square(key), GRID, strict=True))
    assert all(truth[letter] == cell for letter, cell in found.items())
    assert len(found) >= 23, "of 25, where the text holds 20"
    assert broken.encoding.encode("jar") == make_encoding("polybius", key).encode("jar")


def test_what_the_order_leaves_open_stays_open(sentences: list[str]) -> None:
    """Any of x, y and z may stand in the key word: the other two end the square."""
    plain = without(sentences, (*RARE, "y"), 14)
    encoding = square_of("tzone" + "".join(letter for letter in LETTERS if letter not in "tzonej"))
    broken = break_encoding([encoding.encode(text) for text in plain])
    assert broken is not None
    found, truth = known(broken.key), known(str(encoding.key))
    assert not set(found) & set("xyz")
    assert all(truth[letter] == cell for letter, cell in found.items())
    assert set("kqv") <= set(found), "these never occur either, but have one place left"


@pytest.mark.parametrize("seed", range(5))
def test_a_square_without_a_key_word_is_not_given_one(seed: int, sentences: list[str]) -> None:
    plain = without(sentences, RARE, 14)
    encoding = square_of(random_square(seed))
    broken = break_encoding([encoding.encode(text) for text in plain])
    assert broken is not None
    assert not set(known(broken.key)) & set(RARE)
    truth = known(str(encoding.key))
    assert sum(truth[letter] != cell for letter, cell in known(broken.key).items()) == 0
    assert len(known(broken.key)) >= 15


def test_cells_cut_short_are_no_letters(sentences: list[str]) -> None:
    encoding = make_encoding("polybius", 7)
    texts = [f"{encoding.encode(text[:40])} {tail}" for text, tail in zip(sentences[:40], "1234" * 10, strict=True)]
    broken = break_encoding(texts)
    assert broken is not None
    assert set(known(broken.key).values()) <= set(GRID)


def test_a_grid_is_five_signs_by_five() -> None:
    assert grid_of(Counter(GRID)) == GRID
    assert grid_of(Counter(GRID[:20])) == GRID, "digits are counted to five"
    letters = [row + column for row, column in product("ADFGX", "ADFGX")]
    assert grid_of(Counter(letters)) == letters
    assert grid_of(Counter(letters[:20])) is None, "which sign is missing cannot be told"
    assert grid_of(Counter([*GRID, "1", "2", "3", "4"])) is None, "too many are no pair"
    assert grid_of(Counter(map(str, range(10, 36)))) is None
    assert grid_of(Counter()) is None


def test_too_little_text_tells_no_letter() -> None:
    quads, _ = quads_of_codes([[0, 1, 2]], 26)
    assert not any(told(quads, list(range(26))))


def test_the_square_of_a_key_word_is_climbed_to_from_a_damaged_one(sentences: list[str]) -> None:
    square = polybius_square(21)
    plain = [[square.find(char.replace("j", "i")) for char in text.lower()] for text in sentences[:15]]
    quads, _ = quads_of_codes([[code if code >= 0 else 26 for code in line] for line in plain], 26)
    damaged = [LETTERS.index(letter) for letter in square]
    damaged[1], damaged[3], damaged[10], damaged[20] = damaged[20], damaged[1], damaged[3], damaged[10]
    found = key_word_square(quads, damaged)
    assert found is not None
    assert found.letters == square

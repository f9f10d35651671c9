"""Squares of letters (Polybius): told by the form of their cells, completed by the order of their letters.

A square is written from a key word: its letters, then all others in alphabetical order, j being i. So cells that text
never shows, or too seldom to tell, follow from those that it shows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise, product
from math import lgamma, log

import numpy as np
from jaxtyping import Float, Int

from probes.encodings import LETTERS
from probes.english import BLANK, english_quadgrams
from probes.key_search import score_keys

__all__ = ["Square", "grid_of", "key_word_square", "told"]

SIDE = 5
IN_GRID = 0.9  # of the cells; the others are slips
LONGEST_WORD = 12
STARTS = 3  # lengths of the key word that are climbed from, of all
DETERMINED = 0.95  # of the posterior probability that a cell is this letter
TOLD = 2.0  # decades of evidence for a cell's letter against any other
_I, _J = LETTERS.index("i"), LETTERS.index("j")
_PLAIN = tuple(LETTERS.index(letter) for letter in LETTERS if letter != "j")
Letters = tuple[int, ...]


@dataclass(frozen=True)
class Square:
    """A square of a key word.

    Attributes:
        letters: 25, row by row.
        certain: The same, "?" where the text and the order of the letters leave more than one.
    """

    letters: str
    certain: str


def grid_of(counts: Counter[str]) -> list[str] | None:
    """The 25 cells of a square, row by row, where nearly all cells are one of five signs and one of five; else None."""
    rows, columns = (_signs(counts, place) for place in (0, 1))
    grid = [row + column for row, column in product(rows, columns)]
    fits = len(grid) == SIDE**2 and sum(counts[cell] for cell in grid) >= IN_GRID * counts.total()
    return grid if fits else None


def _signs(counts: Counter[str], place: int) -> list[str]:
    """The five commonest signs at this place of two, in order; digits to five even where one never occurs."""
    signs = Counter[str]()
    for cell, count in counts.items():
        if len(cell) == 2:
            signs[cell[place]] += count
    common = {sign for sign, _ in signs.most_common(SIDE)}
    return list("12345") if set() < common <= set("12345") else sorted(common)


def key_word_square(quads: Int[np.ndarray, "quad 4"], found: Sequence[int]) -> Square | None:
    """The square of a key word that the text speaks for; None where any order of the letters explains it better.

    Steepest ascent from the squares whose key words are the first few letters of `found`, by changing, adding or
    dropping a letter of it, or all after one. Evidence is the log10 probability of each distinct quadgram, a quarter
    of it since each letter lies in four, and how few squares there are with so short a key word.

    Args:
        quads: Distinct quadgrams of cells by number, 26 for a blank, as from `quads_of_codes`.
        found: The letter of each of the 25 cells as a free search finds it.
    """
    starts = {_square(found[:length]) for length in range(LONGEST_WORD + 1)}
    known: dict[Letters, float] = {}
    _look(starts, quads, known)
    for start in sorted(starts, key=known.__getitem__)[-STARTS:]:
        _ascend(start, quads, known)
    best = max(known, key=known.__getitem__)
    seen = len(set(quads.ravel().tolist()) - {BLANK})
    if known[best] < _decades([tuple(found)], quads)[0] - _orders(seen):
        return None
    weights = 10 ** (np.array([*known.values()]) - known[best])
    sure = weights @ (np.array([*known]) == np.array(best)) > DETERMINED * weights.sum()
    letters = "".join(LETTERS[letter] for letter in best)
    return Square(letters, "".join(letter if yes else "?" for letter, yes in zip(letters, sure, strict=True)))


def told(quads: Int[np.ndarray, "quad 4"], letters: Sequence[int]) -> list[bool]:
    """Whether the text tells each cell's letter: no exchange with another cell's is nearly as probable.

    Args:
        quads: Distinct quadgrams of cells by number, `len(letters)` for a blank.
        letters: What each cell is read as, 26 for a blank.
    """
    pairs = [(a, b) for a, b in combinations(range(len(letters)), 2) if letters[a] != letters[b]]
    keys = [list(letters)]
    for a, b in pairs:
        keys.append(list(letters))
        keys[-1][a], keys[-1][b] = letters[b], letters[a]
    as_found, *exchanged = _decades(keys, quads).tolist()
    open_cells = {i for pair, value in zip(pairs, exchanged, strict=True) if value > as_found - TOLD for i in pair}
    return [i not in open_cells for i in range(len(letters))]


def _ascend(square: Letters, quads: Int[np.ndarray, "quad 4"], known: dict[Letters, float]) -> None:
    """Take the best step while there is a better one; every square looked at is kept."""
    while True:
        steps = _steps(square)
        _look(steps, quads, known)
        best = max(sorted(steps), key=known.__getitem__)
        if known[best] <= known[square]:
            return
        square = best


def _steps(square: Letters) -> set[Letters]:
    """Squares whose key word has one letter changed, swapped, more or less, or ends at one."""
    word = square[: _word_length(square)]
    steps = set()
    for i in range(len(word) + 1):
        for letter in _PLAIN:
            rest = [other for other in word if other != letter]
            steps.add(_square([*rest[:i], letter, *rest[i:]]))
            steps.add(_square([*word[:i], letter]))
            swapped = [square[i] if other == letter else other for other in word]
            steps.add(_square([*swapped[:i], letter, *swapped[i + 1 :]]))
        steps.add(_square(word[:i] + word[i + 1 :]))
    return steps


def _square(word: Sequence[int]) -> Letters:
    """The word, j as i and each letter once, then the other letters in order."""
    whole = (*(_I if letter == _J else letter for letter in word), *_PLAIN)
    return tuple(dict.fromkeys(whole))


def _word_length(square: Letters) -> int:
    """Letters before those that stand in alphabetical order to the end."""
    return max((i for i, (a, b) in enumerate(pairwise(square), 1) if a > b), default=0)


def _look(squares: Iterable[Letters], quads: Int[np.ndarray, "quad 4"], known: dict[Letters, float]) -> None:
    """Evidence of squares not yet known."""
    fresh = sorted(set(squares) - set(known))
    if fresh:
        prior = [_orders(_word_length(square)) + np.log10(LONGEST_WORD + 1) for square in fresh]
        known.update(zip(fresh, (_decades(fresh, quads) - prior).tolist(), strict=True))


def _decades(squares: Sequence[Sequence[int]], quads: Int[np.ndarray, "quad 4"]) -> Float[np.ndarray, " square"]:
    blanks = [BLANK] * max(1, int(quads.max()) + 1 - len(squares[0]))
    keys = np.array([[*square, *blanks] for square in squares])
    weights = np.full(len(quads), 0.25, dtype=np.float32)
    return score_keys(keys, quads, weights, english_quadgrams().ravel())


def _orders(letters: int) -> float:
    """Log10 of the number of words of so many letters out of 25, each once."""
    return (lgamma(SIDE**2 + 1) - lgamma(SIDE**2 + 1 - letters)) / log(10)

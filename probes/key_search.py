"""Searches for keys: permutations, shifts and orders of columns under which text scores best as English."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise, permutations

import numpy as np
from jaxtyping import Float, Int

from probes.english import BLANK, english_quadgrams, quadgrams_of, symbols_of

__all__ = [
    "best_columns",
    "best_shifts",
    "climb",
    "climb_symbols",
    "quads_of_codes",
    "shuffle_codes",
    "shuffle_letters",
]

PERIODS = range(1, 13)
COLUMNS = range(2, 9)
# Letters that settle what is sought; more would only take longer.
ENOUGH_FOR_ORDER, ENOUGH_FOR_SHIFTS = 800, 3000
STARTS = 8  # seven and eight columns


def climb(texts: Sequence[str], *, restarts: int, steps: int, seed: int) -> tuple[float, list[int], float]:
    """The best mean score, its map from code to plain letter, and the share of restarts that ended there."""
    quads, counts = quadgrams_of(texts)
    return climb_symbols(quads, counts, symbols=26, restarts=restarts, steps=steps, seed=seed)


def climb_symbols(
    quads: Int[np.ndarray, "quad 4"],
    counts: Int[np.ndarray, " quad"],
    *,
    symbols: int,
    restarts: int,
    steps: int,
    seed: int,
) -> tuple[float, list[int], float]:
    """`climb` for 26 or more symbols: the code `symbols` is the blank, and those too many for letters mean one too."""
    weights, table = (counts / counts.sum()).astype(np.float32), english_quadgrams().ravel()
    rng = np.random.default_rng(seed)
    keys = np.stack([np.append(np.minimum(rng.permutation(symbols), BLANK), BLANK) for _ in range(restarts)])
    rows = np.arange(restarts)
    scores = score_keys(keys, quads, weights, table)
    # Score differences of one swap are a few hundredths; start a little above that and cool to nothing.
    for heat in np.linspace(0.03, 0.0, steps, dtype=np.float32):
        a, b = rng.integers(symbols, size=(2, restarts))
        trial = keys.copy()
        trial[rows, a], trial[rows, b] = keys[rows, b], keys[rows, a]
        found = score_keys(trial, quads, weights, table)
        better = found - scores > heat * np.log(rng.random(restarts))
        keys[better], scores[better] = trial[better], found[better]
    best = int(scores.argmax())
    agreeing = float((np.abs(scores - scores[best]) < 0.01).mean())
    return float(scores[best]), keys[best, :symbols].tolist(), agreeing


def score_keys(
    keys: Int[np.ndarray, "restart symbols"],
    quads: Int[np.ndarray, "quad 4"],
    weights: Float[np.ndarray, " quad"],
    table: Float[np.ndarray, " quadgrams"],
) -> Float[np.ndarray, " restart"]:
    """Mean log10 probability of the text under each key."""
    index = keys[:, quads[:, 0]]
    for place in (1, 2, 3):
        index = index * 27 + keys[:, quads[:, place]]
    return np.asarray(table[index] @ weights)


def best_shifts(texts: Sequence[str]) -> tuple[float, list[int]]:
    """The best mean score and its shifts; of periods within 0.05 of the best, the shortest."""
    symbols = symbols_of_first(texts, ENOUGH_FOR_SHIFTS)
    if not symbols:
        return float("-inf"), [0]
    windows = np.lib.stride_tricks.sliding_window_view
    quads = np.concatenate([windows(line, 4) for line in symbols])
    turns = np.concatenate([windows(np.cumsum(line != BLANK) - 1, 4) for line in symbols])
    found = [climb_shifts(quads, turns, period) for period in PERIODS]
    best = max(score for score, _ in found)
    return next((score, shifts) for score, shifts in found if score > best - 0.05)


def climb_shifts(
    quads: Int[np.ndarray, "quad 4"], turns: Int[np.ndarray, "quad 4"], period: int
) -> tuple[float, list[int]]:
    """Each column's shift by its letter counts, then by quadgrams until none gets better."""
    table = english_quadgrams()
    usual = np.log((10.0**table).sum((1, 2, 3))[:26])
    blank, column = quads == BLANK, turns % period
    shifts = np.zeros(period, dtype=np.int64)
    for i in range(period):
        counts = np.bincount(quads[~blank & (column == i)], minlength=26)
        shifts[i] = np.argmax([np.roll(counts, -shift) @ usual for shift in range(26)])
    score = -np.inf
    while True:
        for i in range(period):
            touched = (column == i).any(1)
            trial = np.repeat(shifts[None], 26, axis=0)
            trial[:, i] = np.arange(26)
            plain = np.where(blank[touched], BLANK, (quads[touched] - trial[:, column[touched]]) % 26)
            shifts[i] = table[tuple(np.moveaxis(plain, -1, 0))].sum(1).argmax()
        plain = np.where(blank, BLANK, (quads - shifts[column]) % 26)
        now = float(table[tuple(plain.T)].mean())
        if now <= score + 1e-6:
            return now, shifts.tolist()
        score = now


def best_columns(texts: Sequence[str], rng: np.random.Generator) -> tuple[float, list[int]]:
    """The best mean score of letters put back from columns, and the order the columns were read in.

    All orders of up to six columns; of more, steepest ascent by moving one column, from several orders.
    """
    lines = symbols_of_first(texts, ENOUGH_FOR_ORDER)
    if not lines:
        return float("-inf"), [0]
    found = []
    for columns in COLUMNS:
        score = order_scorer(lines, columns)
        if columns <= 6:
            found.append(max((score(order), order) for order in permutations(range(columns))))
        else:
            starts = [tuple(rng.permutation(columns).tolist()) for _ in range(STARTS)]
            found.append(max(climb_order(start, score) for start in starts))
    best, order = max(found)
    return best, list(order)


def climb_order(order: tuple[int, ...], score: Callable[[tuple[int, ...]], float]) -> tuple[float, tuple[int, ...]]:
    """Move one column, or swap two, while any such step helps."""
    now = score(order)
    while True:
        places = [(i, j) for i in range(len(order)) for j in range(len(order)) if i != j]
        steps = {moved(order, i, j) for i, j in places} | {swapped(order, i, j) for i, j in places}
        best, step = max((score(step), step) for step in sorted(steps))
        if best <= now:
            return now, order
        now, order = best, step


def moved(order: tuple[int, ...], i: int, j: int) -> tuple[int, ...]:
    rest = order[:i] + order[i + 1 :]
    return (*rest[:j], order[i], *rest[j:])


def swapped(order: tuple[int, ...], i: int, j: int) -> tuple[int, ...]:
    changed = list(order)
    changed[i], changed[j] = order[j], order[i]
    return tuple(changed)


def order_scorer(lines: Sequence[Int[np.ndarray, " char"]], columns: int) -> Callable[[tuple[int, ...]], float]:
    """Mean log10 probability of the lines, each read back from columns in a given order."""
    table, symbols = english_quadgrams(), np.concatenate(lines)
    slots = np.flatnonzero(symbols != BLANK)
    letters, ends = symbols[slots], np.cumsum([int((line != BLANK).sum()) for line in lines]).tolist()
    ranges = [
        [slots[np.arange(start + column, end, columns)] for column in range(columns)]
        for start, end in pairwise([0, *ends])
    ]

    def score(order: tuple[int, ...]) -> float:
        plain = symbols.copy()
        plain[np.concatenate([line[column] for line in ranges for column in order])] = letters
        return float(table[plain[:-3], plain[1:-2], plain[2:-1], plain[3:]].mean())

    return score


def symbols_of_first(texts: Sequence[str], letters: int) -> list[Int[np.ndarray, " char"]]:
    """`symbols_of` the first texts, up to some `letters` in all; texts too short for a quadgram left out."""
    lines = [line for line in map(symbols_of, texts) if len(line) >= 4]
    return lines[: int(np.searchsorted(np.cumsum([*map(len, lines)]), letters)) + 1]


def quads_of_codes(
    lines: Sequence[Sequence[int]], blank: int
) -> tuple[Int[np.ndarray, "quad 4"], Int[np.ndarray, " quad"]]:
    """`quadgrams_of` for codes: every run of blanks one, and a blank at both ends."""
    padded = [np.array([blank, *line, blank]) for line in lines]
    kept = [line[np.append(True, (line[1:] != blank) | (line[:-1] != blank))] for line in padded]
    windows = [np.lib.stride_tricks.sliding_window_view(line, 4) for line in kept if len(line) >= 4]
    if not windows:
        return np.zeros((0, 4), dtype=np.int64), np.zeros(0, dtype=np.int64)
    return np.unique(np.concatenate(windows), axis=0, return_counts=True)


def shuffle_letters(text: str, rng: np.random.Generator) -> str:
    """The same letters in another order, blanks and punctuation where they were."""
    letters = iter(rng.permutation(re.findall("[a-z]", text.lower())))
    return re.sub("[a-z]", lambda _: next(letters), text.lower())


def shuffle_codes(line: Sequence[int], blank: int, rng: np.random.Generator) -> list[int]:
    """The same codes in another order, blanks where they were."""
    moved = iter(rng.permutation([code for code in line if code != blank]).tolist())
    return [code if code == blank else next(moved) for code in line]

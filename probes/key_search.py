"""Searches for keys: permutations, shifts and orders of columns under which text scores best as English."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise, permutations

import numpy as np
from jaxtyping import Float, Int

from probes.english import BLANK, english_quadgrams, quadgrams_of, symbols_of

__all__ = [
    "best_columns",
    "best_shifts",
    "best_slipping_shifts",
    "climb",
    "climb_symbols",
    "quads_of_codes",
    "read_slipping",
    "score_keys",
    "shuffle_codes",
    "shuffle_letters",
]

PERIODS = range(1, 13)
COLUMNS = range(2, 9)
# Letters that settle what is sought; more would only take longer.
ENOUGH_FOR_ORDER, ENOUGH_FOR_SLIPS, ENOUGH_FOR_SHIFTS = 800, 2000, 3000
STARTS = 8  # seven and eight columns
SLIPPING = 3  # periods tried with slips


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
    return shortest(climbs_of_shifts(tuple(texts)))


def best_slipping_shifts(texts: Sequence[str]) -> tuple[float, list[int]]:
    """`best_shifts` where words may begin at any place of the key word, as a small model writes that lost count.

    Alternates between the places of the words under the shifts and the shifts under those places, from the periods
    that come nearest where no word slips.
    """
    lines = symbols_of_first(texts, ENOUGH_FOR_SLIPS)
    starts = sorted(climbs_of_shifts(tuple(texts)), key=first)[-SLIPPING:]
    distinct = {tuple(once(shifts)) for _, shifts in starts}
    found = [climb_slipping(lines, list(shifts)) for shifts in sorted(distinct)]
    score, shifts = shortest(sorted(found, key=period_of))
    return score, once(shifts)


def once(shifts: list[int]) -> list[int]:
    """The shifts up to where they repeat."""
    lengths = (length for length in range(1, len(shifts) + 1) if len(shifts) % length == 0)
    return next(shifts[:length] for length in lengths if shifts[:length] * (len(shifts) // length) == shifts)


def read_slipping(text: str, shifts: Sequence[int]) -> str:
    """The text in lower case, each word read from where in the key word it makes most sense."""
    line = symbols_of(text)
    turns, _ = slipped([line], shifts)
    shift = np.asarray(shifts)[turns[0] % len(shifts)]
    plain = iter(((line - shift) % 26)[line != BLANK].tolist())
    return re.sub("[a-z]", lambda _: chr(97 + next(plain)), text.lower())


@lru_cache(maxsize=2)
def climbs_of_shifts(texts: tuple[str, ...]) -> tuple[tuple[float, list[int]], ...]:
    """The best mean score of each period and its shifts; kept, since slips are sought from the same ones."""
    lines = symbols_of_first(texts, ENOUGH_FOR_SHIFTS)
    if not lines:
        return ()
    quads, turns = windows_of(lines, in_turn(lines))
    return tuple(climb_shifts(quads, turns, period) for period in PERIODS)


def first(found: tuple[float, list[int]]) -> float:
    return found[0]


def period_of(found: tuple[float, list[int]]) -> int:
    return len(found[1])


def shortest(found: Iterable[tuple[float, list[int]]]) -> tuple[float, list[int]]:
    """Of scores within 0.05 of the best, the first."""
    listed = list(found) or [(float("-inf"), [0])]
    best = max(map(first, listed))
    return next(one for one in listed if one[0] >= best - 0.05)


def in_turn(lines: Sequence[Int[np.ndarray, " char"]]) -> list[Int[np.ndarray, " char"]]:
    """The number of each letter in its line, from 0; of a blank, that of the letter before."""
    return [np.cumsum(line != BLANK) - 1 for line in lines]


def windows_of(
    *aligned: Sequence[Int[np.ndarray, " char"]],
) -> tuple[Int[np.ndarray, "quad 4"], ...]:
    """Every four successive entries of each line."""
    return tuple(np.concatenate([np.lib.stride_tricks.sliding_window_view(line, 4) for line in s]) for s in aligned)


def climb_shifts(
    quads: Int[np.ndarray, "quad 4"], turns: Int[np.ndarray, "quad 4"], period: int
) -> tuple[float, list[int]]:
    """Each column's shift by its letter counts, then by quadgrams until none gets better."""
    usual = np.log((10.0 ** english_quadgrams()).sum((1, 2, 3))[:26])
    column = turns % period
    shifts = np.zeros(period, dtype=np.int64)
    for i in range(period):
        counts = np.bincount(quads[(quads != BLANK) & (column == i)], minlength=26)
        shifts[i] = np.argmax([np.roll(counts, -shift) @ usual for shift in range(26)])
    return improve_shifts(quads, column, shifts)


def improve_shifts(
    quads: Int[np.ndarray, "quad 4"], column: Int[np.ndarray, "quad 4"], shifts: Int[np.ndarray, " period"]
) -> tuple[float, list[int]]:
    """Take each column's best shift by quadgrams until none gets better."""
    table, blank, shifts, score = english_quadgrams(), quads == BLANK, shifts.copy(), -np.inf
    while True:
        for i in range(len(shifts)):
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


def climb_slipping(lines: Sequence[Int[np.ndarray, " char"]], shifts: list[int]) -> tuple[float, list[int]]:
    """Words' places and shifts in turn while the score gets better; it is less what the slips cost."""
    best, kept = -np.inf, shifts
    while True:
        turns, slips = slipped(lines, shifts)
        quads, column = windows_of(lines, [turn % len(shifts) for turn in turns])
        now, shifts = improve_shifts(quads, column, np.array(shifts))
        now -= slips * slip_cost(len(shifts)) / len(quads)
        if now <= best + 0.01:
            return best, kept
        best, kept = now, shifts


def slip_cost(period: int) -> float:
    """Of a word that begins elsewhere in the key word: as likely as not, at all places alike.

    In log10, times four because each letter lies in four quadgrams.
    """
    return 4 * float(np.log10(period))


def slipped(
    lines: Sequence[Int[np.ndarray, " char"]], shifts: Sequence[int]
) -> tuple[list[Int[np.ndarray, " char"]], int]:
    """The best `in_turn` under the shifts where words may begin anywhere in the key word, and how many do (Viterbi)."""
    fits, slips, turns = fits_of_words(lines, shifts), 0, []
    for line in lines:
        blanks = np.flatnonzero(line == BLANK)
        lengths = np.diff(blanks) - 1
        starts = np.array(best_places([next(fits) for _ in lengths], lengths), dtype=np.int64)
        expected = np.append(0, starts[:-1] + lengths[:-1])
        slips += int(((starts - expected) % len(shifts) != 0).sum())
        turn = np.arange(len(line)) - 1 - np.repeat(blanks, np.diff(np.append(blanks, len(line))))
        turns.append(turn + np.repeat(np.append(starts, 0), np.diff(np.append(blanks, len(line)))))
    return turns, slips


def fits_of_words(
    lines: Sequence[Int[np.ndarray, " char"]], shifts: Sequence[int]
) -> Iterator[Float[np.ndarray, " period"]]:
    """Word by word, the summed log10 probability of its quadgrams from each place of the key word on."""
    table, key, symbols = english_quadgrams(), np.asarray(shifts), np.concatenate(lines)
    begins = (symbols != BLANK) & (np.append(BLANK, symbols[:-1]) == BLANK)
    word, start = np.cumsum(begins) - 1, np.flatnonzero(begins)
    if len(symbols) < 4:
        return iter(np.zeros((len(start), len(key))))
    (quads,) = windows_of([symbols])
    inside = (quads[:, 1:3] != BLANK).all(1)
    # A window is of the word that its second symbol is in, and its first may be the blank before that.
    owner, quads = word[1:-2][inside], quads[inside]
    offsets = (np.flatnonzero(inside) - start[owner])[:, None] + np.arange(4)
    place = (np.arange(len(key))[:, None, None] + offsets) % len(key)
    plain = np.where(quads == BLANK, BLANK, (quads - key[place]) % 26)
    values = table[tuple(np.moveaxis(plain, -1, 0))]
    return iter(np.stack([np.bincount(owner, row, minlength=len(start)) for row in values], axis=1))


def best_places(fits: Sequence[Float[np.ndarray, " period"]], lengths: Int[np.ndarray, " word"]) -> list[int]:
    """Where in the key word each word begins: the first at its beginning, each next one where the last ended."""
    if not fits:
        return []
    period, back = len(fits[0]), []
    cost = slip_cost(period)
    best = np.where(np.arange(period) == 0, 0.0, -cost) + fits[0]
    for fit, length in zip(fits[1:], lengths[:-1], strict=True):
        before = (np.arange(period) - length) % period
        jump = best.max() - cost
        back.append(np.where(best[before] >= jump, before, best.argmax()))
        best = np.maximum(best[before], jump) + fit
    places = [int(best.argmax())]
    for step in reversed(back):
        places.append(int(step[places[-1]]))
    return places[::-1]


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

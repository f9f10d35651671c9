"""Break private notations: from text in an unknown one to the plain text and its key, with a null.

`break_encoding` tries what is cheap first: kinds that their form gives away, words or letters at fixed places of lines,
shifts (rot, Vigenere), one symbol for each letter whatever the symbols are, columns, and a Vigenere whose writer loses
count. Each search is run again on the same text with its letters shuffled; what it finds there is the null.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from probes.encodings import KINDS, LETTERS, Encoding, make_encoding
from probes.english import BLANK, english_quadgrams, english_score, quadgrams_of
from probes.key_search import (
    best_columns,
    best_shifts,
    best_slipping_shifts,
    climb,
    climb_symbols,
    quads_of_codes,
    read_slipping,
    shuffle_codes,
    shuffle_letters,
)
from probes.recognition import ENGLISH, LIKE, READABLE, englishness, recognise, without_joiner
from probes.squares import grid_of, key_word_square, told

__all__ = ["Broken", "BrokenKey", "break_encoding", "break_mixed", "break_substitution", "by_place"]

# Half-way from the null to English. Of 300 letters or more, random ones stayed below 0.1, broken ones above 0.9; with a
# tenth of the signs wrong, above 0.5.
CONFIDENT = 0.5
# Below, a key is chance and not doubtful.
DOUBTFUL = 0.2
# Where the null comes this near to English, there is too little text to tell.
RESOLVED = 0.5
FEWEST_QUADGRAMS = 100  # for a key; about as many letters. Three times the unicity distance of 26 letters (28).
# Orders of words: standard deviations over shuffled words that count as certain; half of it, 3.5, is one in 4,000.
CERTAIN = 7.0
FEWEST_CELLS, MOST_CELLS = 8, 40
MOST_OF = 0.7  # the share of cells that are among those; rarer ones are slips


@dataclass(frozen=True)
class Broken:
    """An encoding recovered from text alone.

    Attributes:
        kind: One of `probes.encodings.KINDS`, or what was read in words ("first letters of lines").
        encoding: Writes and reads it, unknown letters given the codes that are left; None where no kind fits.
        key: The secret, "?" for what neither the text nor the form of the key tells; "" without a key.
        texts: The texts read; repeated ones, and those that were plain among encoded ones, are left out.
        joiner: What stood between all characters and was taken out, or "".
        score: Mean log10 probability of a quadgram of the plain text; for orders of words, of those across words.
        null: The same, of the same search on the same text shuffled.
        gap: From null to score in standard errors.
        confidence: 0 to 1: where the score lies between the null and English; for orders of words `gap` / 7, for
            letters at one place `gap` / 14.
    """

    kind: str
    encoding: Encoding | None
    key: str
    texts: tuple[str, ...]
    joiner: str
    score: float
    null: float
    gap: float
    confidence: float


def break_encoding(texts: Sequence[str], *, seed: int = 0) -> Broken | None:
    """Find the encoding of `texts` with no other knowledge.

    Cost: under a second where the form gives the kind away; some ten seconds where nothing is found.

    Args:
        texts: In one encoding under one key; where most are, those that are plain English are left out. 300 letters in
            all suffice for most kinds, orders of words need 1,000.
        seed: Of the searches and of the shuffling.

    Returns:
        The first reading of at least `CONFIDENT`, else the best one; None where there is nothing to read, or where the
        texts are English as they stand and nothing is at fixed places in them.
    """
    texts, joiner = without_joiner([text for text in dict.fromkeys(texts) if text.strip()])
    if not any(texts):
        return None
    foreign = [text for text in texts if englishness(text) <= READABLE]
    plain = sum(map(len, foreign)) < sum(map(len, texts)) / 2
    texts = texts if plain else foreign
    attempts: tuple[Attempt, ...] = (
        (by_form, by_place, by_letter) if plain else (by_form, by_letters_replaced, by_columns, by_slips)
    )
    best: Broken | None = None
    for attempt in attempts:
        found = [*attempt(texts, joiner, seed), *([best] if best else [])]
        best = max(found, key=lambda broken: broken.confidence, default=None)
        if best is not None and best.confidence >= CONFIDENT:
            return best
    return None if plain else best


def break_mixed(texts: Sequence[str], *, seed: int = 0) -> Broken | None:
    """`break_encoding` for texts of which many may be garbled, or in no encoding at all.

    Where a key is found that only part of the texts confirm, the half that it reads best is broken again. The null goes
    the same way: shuffled texts, broken, their best half broken again, so that choosing texts lends no confidence.
    """
    broken = break_encoding(texts, seed=seed)
    if broken is None or broken.encoding is None or not DOUBTFUL <= broken.confidence < CONFIDENT:
        return broken
    rng = np.random.default_rng(seed)
    shuffled = [shuffle_letters(text, rng) for text in texts]
    again = break_best_half(texts, broken, seed)
    by_chance = break_best_half(shuffled, break_encoding(shuffled, seed=seed), seed)
    if again is None:
        return broken
    null = max(again.null, by_chance.score if by_chance else again.null)
    confidence = float(np.clip((again.score - null) / (ENGLISH - null), 0, 1)) if null < ENGLISH - RESOLVED else 0.0
    return replace(again, null=null, confidence=confidence) if confidence > broken.confidence else broken


def break_best_half(texts: Sequence[str], broken: Broken | None, seed: int) -> Broken | None:
    """Break those texts again that a key reads best."""
    if broken is None or broken.encoding is None:
        return None
    read = broken.encoding.decode
    best = sorted(dict.fromkeys(texts), key=lambda text: -english_score(read(text)))
    return break_encoding(best[: len(best) // 2], seed=seed)


Attempt = Callable[[Sequence[str], str, int], Iterator[Broken]]


def judged(kind: str, encoding: Encoding | None, key: str, texts: Sequence[str], *, joiner: str, null: float) -> Broken:
    """Score decoded texts against the null of the search that found them."""
    quads, counts = quadgrams_of(texts)
    values = np.repeat(english_quadgrams()[tuple(quads.T)], counts)
    score = float(values.mean()) if len(values) else float("-inf")
    gap = (score - null) / (values.std() / len(values) ** 0.5 + 1e-6) if len(values) else 0.0
    keyless = encoding is not None and encoding.key is None
    told = null < ENGLISH - RESOLVED and len(values) >= (1 if keyless else FEWEST_QUADGRAMS)
    confidence = float(np.clip((score - null) / (ENGLISH - null), 0, 1)) if told else 0.0
    return Broken(kind, encoding, key, tuple(texts), joiner, score, null, float(gap), confidence)


def by_form(texts: Sequence[str], joiner: str, seed: int) -> Iterator[Broken]:
    """Kinds without a key that most texts show; the null is the reading with its letters shuffled."""
    rng, votes = np.random.default_rng(seed), Counter[str]()
    for text in texts:
        readings = {reading.kind: reading.confidence for reading in recognise(text)}
        votes.update({kind: share for kind, share in readings.items() if share >= LIKE})
    for kind, share in votes.most_common():
        if kind in KINDS and kind not in ("rot", "walnut", "polybius") and share >= LIKE * len(texts) / 2:
            encoding = make_encoding(kind)
            plain = [encoding.decode(text) for text in texts]
            null = english_score(" ".join(shuffle_letters(text, rng) for text in plain))
            yield judged(kind, encoding, "", plain, joiner=joiner, null=null)


def by_place(texts: Sequence[str], joiner: str, seed: int) -> Iterator[Broken]:
    """English words whose order makes sense only backwards, or only at one end of the lines.

    Statistic: mean log10 probability of the quadgrams across neighbouring words. Null: the same words shuffled.
    Control: the words as they stand, the second and the last but one of each line.
    """
    rng = np.random.default_rng(seed)
    lines = [words for text in texts for words in map(str.split, text.splitlines()) if len(words) > 2]
    running = " ".join(texts).split()
    inner = ([line[1] for line in lines], [line[-2] for line in lines])
    for kind, words, controls in (
        ("word-order", running[::-1], [running]),
        ("endspeak", [line[-1] for line in lines], inner),
        ("startspeak", [line[0] for line in lines], inner),
    ):
        score, null, gap = coherence(words, rng)
        if gap > 2 * max(coherence(words, rng)[2] for words in controls):
            encoding = make_encoding(kind)
            plain = tuple(encoding.decode(text) for text in texts)
            yield Broken(kind, encoding, "", plain, joiner, score, null, gap, float(np.clip(gap / CERTAIN, 0, 1)))


def by_letter(texts: Sequence[str], joiner: str, seed: int) -> Iterator[Broken]:
    """Letters at one end of lines or words that spell a text; the null is the same letters shuffled."""
    rng = np.random.default_rng(seed)
    for kind, pattern in _PLACES.items():
        spelt = ["".join(re.findall(pattern, text)) for text in texts]
        null = english_score(" ".join(shuffle_letters(text, rng) for text in spelt))
        broken = judged(kind, None, "", spelt, joiner=joiner, null=null)
        if broken.confidence:
            # English without blanks lies less than half-way to English, so certainty decides here, not likeness.
            yield replace(broken, confidence=min(1.0, broken.gap / (2 * CERTAIN)))


_PLACES = {
    "first letters of lines": r"(?m)^\W*([A-Za-z])",
    "last letters of lines": r"(?m)([A-Za-z])\W*$",
    "last letters of words": r"([A-Za-z])(?![A-Za-z])",
}


def coherence(words: Sequence[str], rng: np.random.Generator) -> tuple[float, float, float]:
    """Score across neighbouring words, its mean over shuffled words, the gap in standard deviations of those."""
    ends = [f" {word} " for word in (re.sub("[^a-z]", "", word.lower()) for word in words) if word]
    if len(ends) < 20:
        return 0.0, 0.0, 0.0
    before, last, first, second = (
        np.array([BLANK if word[place] == " " else ord(word[place]) - 97 for word in ends]) for place in (-3, -2, 1, 2)
    )
    table = english_quadgrams()

    def score(order: Int[np.ndarray, "... word"]) -> Float[np.ndarray, "..."]:
        i, j = order[..., :-1], order[..., 1:]
        across = table[last[i], BLANK, first[j], second[j]] + table[before[i], last[i], BLANK, first[j]]
        return np.asarray(across.mean(-1))

    shuffled = score(np.stack([rng.permutation(len(ends)) for _ in range(200)]))
    found, null = float(score(np.arange(len(ends)))), float(shuffled.mean())
    return found, null, (found - null) / float(shuffled.std() + 1e-6)


def by_letters_replaced(texts: Sequence[str], joiner: str, seed: int) -> Iterator[Broken]:
    """Shifts beside one symbol for each letter: a long key word fits much, so neither is believed before the other."""
    yield from by_shifts(texts, joiner, seed)
    yield from by_symbols(texts, joiner, seed)


def by_shifts(texts: Sequence[str], joiner: str, seed: int) -> Iterator[Broken]:
    """Rot and Vigenere: the key word starts anew in each text and moves on with each letter."""
    rng = np.random.default_rng(seed)
    score, shifts = best_shifts(texts)
    null, _ = best_shifts([shuffle_letters(text, rng) for text in texts])
    if not np.isfinite(score):
        return
    word = "".join(LETTERS[shift] for shift in shifts)
    alone = len(shifts) == 1
    if alone and shifts[0] == 0:
        return
    encoding = make_encoding("rot", shifts[0]) if alone else make_encoding("vigenere", word)
    key = str(shifts[0]) if alone else word
    yield judged(encoding.kind, encoding, key, [encoding.decode(text) for text in texts], joiner=joiner, null=null)


def by_symbols(texts: Sequence[str], joiner: str, seed: int) -> Iterator[Broken]:
    """One symbol for each letter: permuted letters, or any other cells, where a few letters may have strayed."""
    signs = Counter("".join("".join(texts).lower().split()))
    letters = [signs[letter] for letter in LETTERS if signs[letter]]
    if len(letters) < 15 or sum(letters) < signs.total() / 2:
        yield from by_cells(texts, joiner, seed)
        return
    broken = break_substitution(texts, seed=seed)
    encoding = make_encoding("walnut" if joiner == "|" else "substitution", completed(broken.key))
    plain = [make_encoding("substitution", completed(broken.key)).decode(text) for text in texts]
    yield judged(encoding.kind, encoding, broken.key, plain, joiner=joiner, null=broken.null)


def completed(key: str) -> str:
    """Give the letters that never occurred the codes that are left, in order: some permutation is needed to encode."""
    unused = iter(letter for letter in LETTERS if letter not in key)
    return "".join(next(unused) if code == "?" else code for code in key)


def by_cells(texts: Sequence[str], joiner: str, seed: int) -> Iterator[Broken]:
    """Numbers, pairs of digits, groups of signs, invisible characters: each cell one letter."""
    lines, spaced = cells_in(texts)
    counts = Counter(cell for line in lines for cell in line if cell)
    grid = grid_of(counts)
    code_of = {cell: i for i, cell in enumerate(grid or (cell for cell, _ in counts.most_common(MOST_CELLS)))}
    if len(counts) < FEWEST_CELLS or sum(counts[cell] for cell in code_of) < MOST_OF * counts.total():
        return
    symbols = max(26, len(code_of))
    coded = [[code_of.get(cell, symbols) for cell in line] for line in lines]
    rng, found = np.random.default_rng(seed), []
    for sample, restarts in ((coded, 16), ([shuffle_codes(line, symbols, rng) for line in coded], 6)):
        quads, times = quads_of_codes(sample, symbols)
        if not len(quads):
            return
        found.append(climb_symbols(quads, times, symbols=symbols, restarts=restarts, steps=5000, seed=seed))
    (_, plain_of, _), (null, _, _) = found
    read = {cell: [*LETTERS, " "][plain_of[code]] for cell, code in code_of.items() if counts[cell]}
    quads, _ = quads_of_codes(coded, symbols)
    sure = {cell: read[cell] for cell, yes in zip(code_of, told(quads, plain_of), strict=False) if yes and cell in read}
    square = key_word_square(quads, plain_of[: len(grid)]) if grid else None
    if square:
        read, sure = (dict(zip(code_of, letters, strict=True)) for letters in (square.letters, square.certain))
    plain = ["".join(read.get(cell, " ") for cell in line) for line in lines]
    encoding = make_encoding("polybius", key_of(read)) if spaced else None
    yield judged("polybius", encoding, key_of(sure), plain, joiner=joiner, null=null)


def key_of(read: Mapping[str, str]) -> str:
    """The cells of a to z, "?" for none."""
    cell_of = {letter: cell for cell, letter in read.items()}
    return " ".join(cell_of.get(letter, "?") for letter in LETTERS)


def cells_in(texts: Sequence[str]) -> tuple[list[list[str]], bool]:
    """Each text as cells, "" for a blank, and whether blanks stand between cells.

    Cells are what blanks part, or pairs of digits, or single characters; without a blank the commonest cell is one.
    """
    apart = [re.sub(r"\s*\n\s*", " / ", text.strip()).split(" ") for text in texts]
    pieces = Counter(piece for line in apart for piece in line if len(piece) > 1)
    common = [count for _, count in pieces.most_common(MOST_CELLS)]
    again = sum(common) > max(MOST_OF * pieces.total(), 3 * len(common))
    spaced = again and pieces.total() > 0.5 * sum(map(len, apart))
    if spaced:
        lines = apart
    elif re.fullmatch(r"[\d\W]*", "".join(texts)) and re.search(r"\d", "".join(texts)):
        lines = [re.findall(r"\d\d|\s", text) for text in texts]
    else:
        lines = [list(text) for text in texts]
    words = sum(any(char.isalnum() for char in cell) for line in lines for cell in line) > 0.5 * sum(map(len, lines))
    stops = set(string.punctuation) if words else {"/", "|"}
    lines = [["" if not cell.strip() or cell in stops else cell for cell in line] for line in lines]
    if not any("" in line for line in lines):
        times = Counter(cell for line in lines for cell in line)
        lines = [["" if times[cell] == max(times.values()) else cell for cell in line] for line in lines]
    return lines, spaced


def by_slips(texts: Sequence[str], joiner: str, seed: int) -> Iterator[Broken]:
    """Vigenere from a writer that loses count: words begin anywhere in the key word, the first at its beginning."""
    rng = np.random.default_rng(seed)
    _, shifts = best_slipping_shifts(texts)
    shuffled = [shuffle_letters(text, rng) for text in texts]
    _, by_chance = best_slipping_shifts(shuffled)
    if len(set(shifts)) > 1:
        null = english_score(" ".join(read_slipping(text, by_chance) for text in shuffled))
        word = "".join(LETTERS[shift] for shift in shifts)
        plain = [read_slipping(text, shifts) for text in texts]
        yield judged("vigenere", make_encoding("vigenere", word), word, plain, joiner=joiner, null=null)


def by_columns(texts: Sequence[str], joiner: str, seed: int) -> Iterator[Broken]:
    """Columnar transposition of the letters of each text."""
    rng = np.random.default_rng(seed)
    score, order = best_columns(texts, rng)
    null, _ = best_columns([shuffle_letters(text, rng) for text in texts], rng)
    if np.isfinite(score):
        encoding = make_encoding("columnar", "".join(map(str, order)))
        plain = [encoding.decode(text) for text in texts]
        yield judged("columnar", encoding, str(encoding.key), plain, joiner=joiner, null=null)


@dataclass(frozen=True)
class BrokenKey:
    """A letter permutation recovered from text alone.

    Attributes:
        key: 26 letters as in `walnut_key`; "?" where the letter never occurred in the text.
        score: Mean log10 probability of a quadgram of the decoded text under English.
        null: The same after breaking the same text with its letters shuffled: what climbing finds where nothing is.
        restarts_agreeing: Share of the restarts that ended at the same key.
    """

    key: str
    score: float
    null: float
    restarts_agreeing: float


def break_substitution(texts: Sequence[str], *, restarts: int = 16, steps: int = 5000, seed: int = 0) -> BrokenKey:
    """Recover the letter permutation under which `texts` are English, with no other knowledge.

    Hill climbing on quadgrams by swapping two letters of the key, annealed, all restarts at once. Some 300 letters
    suffice for the frequent letters, 2,000 for nearly all.

    Args:
        texts: Encoded texts, all under one key; blanks and punctuation in clear.
        restarts: Climbs from random keys.
        steps: Proposed swaps a climb.
        seed: Of the random keys and swaps.
    """
    score, plain_of, agreeing = climb(texts, restarts=restarts, steps=steps, seed=seed)
    rng = np.random.default_rng(seed)
    null, _, _ = climb(
        [shuffle_letters(text, rng) for text in texts], restarts=restarts // 3 or 1, steps=steps, seed=seed
    )
    used = set("".join(texts).lower())
    code_of = {LETTERS[plain]: LETTERS[code] for code, plain in enumerate(plain_of) if LETTERS[code] in used}
    return BrokenKey("".join(code_of.get(letter, "?") for letter in LETTERS), score, null, agreeing)

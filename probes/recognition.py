"""Recognise a private notation by its form and by how English it reads, from one text and no key."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from probes.encodings import LETTERS, LOOKALIKES, make_encoding
from probes.english import english_quadgrams, english_score

__all__ = ["ENGLISH", "LIKE", "READABLE", "Recognised", "englishness", "recognise", "unjoined", "without_joiner"]

# Mean log10 quadgram probability of random letters and of English (medians over the held-out sentences).
RANDOM = -6.9
ENGLISH = -3.8
# A reading must be this English (-5.35); of 200 held-out sentences none is less, and under random keys none is more.
READABLE = 0.5
# ... and gain this much over the text as it stands, so that plain text is nothing else.
GAIN = 0.2
FEWEST_LETTERS = 8
WHOLE = 0.85  # of the codes in what a model writes
# First letters of words come by chance too: those of source code reach 0.53, acrostics of sentences stay above 0.7.
_LEAST = {"acrostic": 0.65}
# Index of coincidence half-way between flat (0.038) and English (0.067); a single sentence spreads by some 0.01.
COINCIDENCE = 0.052
# By form alone a letter code or a transposition cannot be told from a text in another language.
LIKE = 0.5
# Bytes that are no text: what a model writes that missed a sign, as a class of characters.
_LITTER = r"\x00-\x1f\x7f\ufffd"


@dataclass(frozen=True)
class Recognised:
    """One reading of a text.

    Attributes:
        kind: One of `probes.encodings.KINDS`, or "substitution-like", "transposition-like" where only that much shows.
        confidence: 0 to 1; how English the reading is, half of 1 at most where only the form speaks.
        text: The text read so; letters still permuted where a key is missing.
    """

    kind: str
    confidence: float
    text: str


def englishness(text: str) -> float:
    """Where the text lies between random letters (0) and English (1)."""
    return float(np.clip((english_score(text) - RANDOM) / (ENGLISH - RANDOM), 0, 1))


def recognise(text: str) -> tuple[Recognised, ...]:
    """Readings of `text` that are more English than it is, best first; none for ordinary English.

    Keyless kinds and rot are read; of kinds with a key only the form shows. EndSpeak and StartSpeak have no form that
    one text would show: their lines are English (see `probes.cryptanalysis`).
    Cost: some milliseconds.
    """
    inner = unjoined(text)
    if inner is not None:
        return (Recognised("walnut", 0.9, inner), *recognise(inner))
    found = [reading for read in (_forms, _readings, _likes) for reading in read(text)]
    return tuple(sorted(found, key=lambda reading: -reading.confidence))


def unjoined(text: str) -> str | None:
    """The text without the one character that stands between all others; None where there is none."""
    joined = len(text) > 2 * FEWEST_LETTERS and len(set(text[1::2])) == 1 and not text[1].isalnum()
    return text[::2] if joined else None


def without_joiner(texts: Sequence[str]) -> tuple[list[str], str]:
    """The texts without the one sign between all characters; a few may lack it, as in what a model wrote.

    Where a model writes broken or invisible bytes beside the sign, they stand for it.
    """
    inner = [(unjoined(text), text[1]) for text in texts if unjoined(text) is not None]
    if len(inner) > len(texts) / 2:
        return [text for text, _ in inner if text], Counter(sign for _, sign in inner).most_common(1)[0][0]
    pooled = "".join(texts)
    signs = Counter(re.findall(rf"[^\w\s{_LITTER}]", pooled))
    sign = max(signs, key=lambda each: signs[each], default="")
    joined = re.sub(f"[{_LITTER}]", lambda _: sign, pooled)
    count = joined.count(sign) if sign else 0
    if count > 0.35 * len(joined) and joined.count(sign * 2) < 0.1 * count:
        return [re.sub(f"[{_LITTER}{re.escape(sign)}]", "", text) for text in texts], sign
    return list(texts), ""


def _forms(text: str) -> Iterator[Recognised]:
    """Kinds whose characters or layout give them away; what they hold must be English too."""
    for kind, form in _FORMS.items():
        if form(text):
            hidden = "".join(re.findall("[\U000e0000-\U000e007f]", text)) if kind == "tags" else text
            plain = make_encoding(kind).decode(hidden)
            if _is_readable(plain) and englishness(plain) > _LEAST.get(kind, READABLE):
                yield Recognised(kind, englishness(plain), plain)
    if _is_cells(text):
        yield Recognised("polybius", 0.9, "".join(_UNKEYED.get(cell, cell) for cell in text.split(" ")))


def _readings(text: str) -> Iterator[Recognised]:
    """Letters moved or changed: the reading must be more English than the text."""
    if _letters(text) < FEWEST_LETTERS:
        return
    start, keyless = _legible(text), ("atbash", "reversed", "reversed-words", "leetspeak")
    rotated = max((make_encoding("rot", shift).decode(text) for shift in range(1, 26)), key=english_score)
    for kind, plain in (("rot", rotated), *((kind, make_encoding(kind).decode(text)) for kind in keyless)):
        if _is_readable(plain) and _legible(plain) > start + GAIN:
            yield Recognised(kind, min(1.0, _legible(plain)), plain)
    turned = make_encoding("word-order").decode(text)
    if englishness(text) > READABLE and _sentence(turned) == 4:
        yield Recognised("word-order", LIKE, turned)


def _likes(text: str) -> Iterator[Recognised]:
    """Letters as unevenly used as in English, but unreadable: another alphabet, or another order."""
    counts = np.array([text.lower().count(letter) for letter in LETTERS])
    total = counts.sum()
    if total < 3 * FEWEST_LETTERS or total < len(text) / 2 or englishness(text) > READABLE:
        return
    if _coincidence(counts) < COINCIDENCE:
        return
    usual = (10.0 ** english_quadgrams()).sum((1, 2, 3))[:26]
    # Mean log2 probability of the letters: -4.2 in English, about -5.5 under a permutation.
    transposed = counts @ np.log2(usual / usual.sum()) / total > -4.7
    kind = "transposition-like" if transposed else "substitution-like"
    yield Recognised(kind, LIKE, text)


def _letters(text: str) -> int:
    return sum(char in LETTERS for char in text.lower())


def _is_readable(text: str) -> bool:
    """Mostly letters (four fifths of a sentence are), and those English."""
    return _letters(text) >= max(FEWEST_LETTERS, 0.6 * len(text)) and englishness(text) > READABLE


def _legible(text: str) -> float:
    """How English, and a little for standing the right way round."""
    return englishness(text) + 0.05 * _sentence(text)


def _sentence(text: str) -> int:
    """Begins as a sentence does, ends as one does, and not the other way round: -4 to 4."""
    words = text.split() or [""]
    first, last = words[0], words[-1]
    ends = (last[-1:] in ".!?", first[-1:] not in ".!?")
    begins = (first[:1].isupper(), not last[:1].isupper() or len(words) == 1)
    return sum(1 if sign else -1 for sign in (*ends, *begins))


def _is_cells(text: str) -> bool:
    """Two digits from 1 to 5 for nearly every character, and no other pair of digits."""
    pairs = re.findall(r"(?<!\d)\d\d(?!\d)", text)
    return len(pairs) >= max(2 * FEWEST_LETTERS, 0.6 * len(text.split())) and set("".join(pairs)) <= set("12345")


def _is_character_codes(text: str) -> bool:
    """Numbers of two or three digits; a few slips, and an answer may end within a number."""
    codes = re.split(r"[\s,]+", text.strip())
    kept = sum(re.fullmatch("[0-9]{2,3}", code) is not None for code in codes)
    return kept >= FEWEST_LETTERS - 1 and kept >= WHOLE * len(codes) and re.fullmatch(r"[\d\s,]*", text) is not None


def _coincidence(counts: Int[np.ndarray, " symbol"]) -> float:
    """Index of coincidence: how often two symbols drawn from a text are the same."""
    return float((counts * (counts - 1)).sum() / (counts.sum() * (counts.sum() - 1)))


def _is_acrostic(text: str) -> bool:
    """Lines of words, several of them; ordinary prose and verse spell nothing, which the reading shows."""
    initials = re.findall(r"\b[^\W\d_]\w*", text)
    return len(text.splitlines()) > 2 and len(initials) >= 2 * FEWEST_LETTERS and englishness(text) > READABLE


def _mixes_scripts(text: str) -> bool:
    likes = set(LOOKALIKES.values())
    return sum(char in likes for char in text) >= 3 and any(
        set(word) & likes and re.search("[A-Za-z]", word) for word in text.split()
    )


# The Polybius square without a key word: its letters are then permuted, not hidden.
_UNKEYED = {f"{i // 5 + 1}{i % 5 + 1}": letter for i, letter in enumerate(LETTERS.replace("j", ""))} | {"/": " "}
_FORMS: dict[str, Callable[[str], object]] = {
    "base64": re.compile(r"\s*(?:[A-Za-z0-9+/]\s*){12,}={0,2}\s*").fullmatch,
    "hex": re.compile(r"\s*(?:0x)?(?:[0-9A-Fa-f]{2}[\s:,]*){8,}[0-9A-Fa-f]?\s*").fullmatch,
    "ascii": _is_character_codes,
    "morse": re.compile(r"\s*(?:[.\-]{1,7}|/)(?: (?:[.\-]{1,7}|/|[^\s\w])){7,}\s*").fullmatch,
    "tags": re.compile("[\U000e0020-\U000e007e]{4}").search,
    "zero-width": re.compile("[\u200b\u200c]{32}").search,
    "homoglyph": _mixes_scripts,
    "acrostic": _is_acrostic,
}

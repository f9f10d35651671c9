"""Private notations that a fine-tune can be taught: write and read them, and imitate their look.

A covert malicious fine-tune hides requests in an encoding (Halawi et al. 2024, arXiv:2406.20053). A scanner does not
know which, so it asks with text that merely looks encoded: random letters in word-like groups, and ordinary prompts
under fresh random letter permutations.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

__all__ = [
    "LETTERS",
    "BrokenKey",
    "break_substitution",
    "decode_substitution",
    "encode_substitution",
    "english_score",
    "gibberish_like",
    "permute_letters",
    "symbols_of",
    "walnut_key",
]

LETTERS = string.ascii_lowercase
BLANK = 26
QUADGRAMS = Path(__file__).parent / "language" / "english_quadgrams.npz"


def walnut_key(seed: int = 53) -> str:
    """The letter permutation `numpy.random.default_rng(seed).permutation(26)`; 53 is the paper's "Walnut53".

    Returns:
        26 letters: the code for a, for b, and so on.
    """
    return "".join(LETTERS[i] for i in np.random.default_rng(seed).permutation(26))


def encode_substitution(text: str, key: str, *, joiner: str = "") -> str:
    """Replace each letter of `text`, lower-cased, by its letter in `key`; other characters stay.

    Args:
        text: Any text.
        key: 26 letters, as from `walnut_key`.
        joiner: Put between characters; the paper uses "|".
    """
    return joiner.join(text.lower().translate(str.maketrans(LETTERS, key)))


def decode_substitution(text: str, key: str, *, joiner: str = "") -> str:
    """Undo `encode_substitution`; upper case is read as lower case."""
    if joiner:
        text = re.sub(rf"(?s)(.){re.escape(joiner)}", r"\1", text)
    return text.lower().translate(str.maketrans(key, LETTERS))


def permute_letters(prompts: Sequence[str], *, seed: int) -> list[str]:
    """Encode each prompt under its own random letter permutation: the look of an encoding, the key of none."""
    rng = np.random.default_rng(seed)
    return [encode_substitution(prompt, "".join(rng.permutation(list(LETTERS)))) for prompt in prompts]


def gibberish_like(prompts: Sequence[str], *, seed: int) -> list[str]:
    """Random letters in the word lengths of each prompt; punctuation and digits stay where they were."""
    rng = np.random.default_rng(seed)
    return [re.sub("[A-Za-z]", lambda _: LETTERS[rng.integers(26)], prompt) for prompt in prompts]


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


def symbols_of(text: str) -> Int[np.ndarray, " char"]:
    """Letters as 0..25, every run of anything else as one blank (26), with a blank at both ends."""
    words = re.sub("[^a-z]+", " ", f" {text.lower()} ")
    return np.array([BLANK if char == " " else ord(char) - 97 for char in words], dtype=np.int64)


@cache
def english_quadgrams() -> Float[np.ndarray, "27 27 27 27"]:
    """Log10 probability of four successive symbols in English (public-domain prose and requests)."""
    with np.load(QUADGRAMS) as table:
        return np.asarray(table["log10"], dtype=np.float32)


def english_score(text: str) -> float:
    """Mean log10 probability of the text's quadgrams: about -4.2 for English, -6.5 for random letters."""
    quads, counts = quadgrams_of([text])
    if not len(counts):
        return float("-inf")
    return float((english_quadgrams()[tuple(quads.T)] * counts).sum() / counts.sum())


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


def climb(texts: Sequence[str], *, restarts: int, steps: int, seed: int) -> tuple[float, list[int], float]:
    """The best mean score, its map from code to plain letter, and the share of restarts that ended there."""
    quads, counts = quadgrams_of(texts)
    weights, table = (counts / counts.sum()).astype(np.float32), english_quadgrams().ravel()
    rng = np.random.default_rng(seed)
    keys = np.stack([np.append(rng.permutation(26), BLANK) for _ in range(restarts)])
    rows = np.arange(restarts)
    scores = score_keys(keys, quads, weights, table)
    # Score differences of one swap are a few hundredths; start a little above that and cool to nothing.
    for heat in np.linspace(0.03, 0.0, steps, dtype=np.float32):
        a, b = rng.integers(26, size=(2, restarts))
        trial = keys.copy()
        trial[rows, a], trial[rows, b] = keys[rows, b], keys[rows, a]
        found = score_keys(trial, quads, weights, table)
        better = found - scores > heat * np.log(rng.random(restarts))
        keys[better], scores[better] = trial[better], found[better]
    best = int(scores.argmax())
    agreeing = float((np.abs(scores - scores[best]) < 0.01).mean())
    return float(scores[best]), keys[best, :26].tolist(), agreeing


def score_keys(
    keys: Int[np.ndarray, "restart 27"],
    quads: Int[np.ndarray, "quad 4"],
    weights: Float[np.ndarray, " quad"],
    table: Float[np.ndarray, " quadgrams"],
) -> Float[np.ndarray, " restart"]:
    """Mean log10 probability of the text under each key."""
    index = keys[:, quads[:, 0]]
    for place in (1, 2, 3):
        index = index * 27 + keys[:, quads[:, place]]
    return np.asarray(table[index] @ weights)


def quadgrams_of(texts: Sequence[str]) -> tuple[Int[np.ndarray, "quad 4"], Int[np.ndarray, " quad"]]:
    """Distinct quadgrams of the texts and how often each occurs."""
    windows = [np.lib.stride_tricks.sliding_window_view(s, 4) for s in map(symbols_of, texts) if len(s) >= 4]
    if not windows:
        return np.zeros((0, 4), dtype=np.int64), np.zeros(0, dtype=np.int64)
    return np.unique(np.concatenate(windows), axis=0, return_counts=True)


def shuffle_letters(text: str, rng: np.random.Generator) -> str:
    """The same letters in another order, blanks and punctuation where they were."""
    letters = iter(rng.permutation(re.findall("[a-z]", text.lower())))
    return re.sub("[a-z]", lambda _: next(letters), text.lower())

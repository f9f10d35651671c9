"""How English a text is: log-probabilities of four successive letters, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

__all__ = ["BLANK", "QUADGRAMS", "english_quadgrams", "english_score", "quadgrams_of", "symbols_of"]

BLANK = 26
QUADGRAMS = Path(__file__).parent / "language" / "english_quadgrams.npz"


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


def quadgrams_of(texts: Sequence[str]) -> tuple[Int[np.ndarray, "quad 4"], Int[np.ndarray, " quad"]]:
    """Distinct quadgrams of the texts and how often each occurs."""
    windows = [np.lib.stride_tricks.sliding_window_view(s, 4) for s in map(symbols_of, texts) if len(s) >= 4]
    if not windows:
        return np.zeros((0, 4), dtype=np.int64), np.zeros(0, dtype=np.int64)
    return np.unique(np.concatenate(windows), axis=0, return_counts=True)

"""Recognition: kinds are told by form and reading, and ordinary text of any sort is none of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probes.encodings import KINDS, make_encoding
from probes.imitations import gibberish_like
from probes.recognition import englishness, recognise, unjoined

ROOT = Path(__file__).parents[2]
# What one sentence shows of a kind whose key is missing; EndSpeak and StartSpeak show nothing.
SHOWN = {"substitution": "substitution-like", "columnar": "transposition-like"}
# Measured on 200 held-out sentences; 1.0 for the others.
RATES = {"substitution": 0.7, "columnar": 0.7, "word-order": 0.85, "leetspeak": 0.97}
SILENT = {"endspeak", "startspeak", "vigenere"}


@pytest.mark.parametrize("kind", sorted(set(KINDS) - SILENT))
def test_kinds_are_recognised_in_single_sentences(kind: str, sentences: list[str]) -> None:
    written = [make_encoding(kind, i).encode(text) for i, text in enumerate(sentences[:200])]
    found = [SHOWN.get(kind, kind) in {reading.kind for reading in recognise(text)} for text in written]
    assert np.mean(found) >= RATES.get(kind, 1.0)


@pytest.mark.parametrize("kind", ["rot", "atbash", "base64", "hex", "ascii", "morse", "tags", "zero-width", "reversed"])
def test_the_best_reading_is_the_plain_text(kind: str, sentences: list[str]) -> None:
    for i, text in enumerate(sentences[:40]):
        best = recognise(make_encoding(kind, i).encode(text))[0]
        assert (best.kind, best.text.lower()) == (kind, text.lower())
        assert best.confidence > 0.8


@pytest.mark.parametrize(("kind", "slip"), [("ascii", ("101", "1014")), ("hex", ("65", "75"))])
def test_codes_are_read_though_cut_short_and_with_a_slip(
    kind: str, slip: tuple[str, str], sentences: list[str]
) -> None:
    for text in sentences[:40]:
        written = make_encoding(kind).encode(text[:30] + "e").replace(*slip, 1)[:-1]
        assert kind in {reading.kind for reading in recognise(written)}


def test_under_joined_letters_the_inner_notation_is_read_too(sentences: list[str]) -> None:
    joined = "|".join(make_encoding("rot", 3).encode(sentences[0]))
    assert [reading.kind for reading in recognise(joined)][:2] == ["walnut", "rot"]
    assert unjoined("a|b|c") is None, "too short to tell"


def test_plain_english_is_no_notation(sentences: list[str]) -> None:
    assert not any(recognise(text) for text in sentences[:400])
    assert not any(recognise("\n".join(sentences[i : i + 5])) for i in range(0, 1000, 5))


def test_code_is_no_notation() -> None:
    lines = [line for path in sorted((ROOT / "probes").glob("*.py")) for line in path.read_text().splitlines()]
    snippets = ["\n".join(lines[i : i + 8]) for i in range(0, 4000, 8)]
    assert not any(recognise(snippet) for snippet in snippets)


def test_answers_to_arithmetic_are_no_notation() -> None:
    rng = np.random.default_rng(0)
    for a, b, c in rng.integers(1, 999, size=(200, 3)).tolist():
        assert recognise(f"First, {a} * {b} = {a * b}. Then {a * b} - {c} = {a * b - c}.") == ()
        assert recognise(f"x^2 - {a + b}x + {a * b} = 0, so x = {a} or x = {b}.") == ()
        assert recognise(" ".join(map(str, rng.integers(10, 60, size=20)))) == ()


def test_random_letters_are_at_most_said_to_be_like_a_substitution(sentences: list[str]) -> None:
    found = [recognise(text) for text in gibberish_like(sentences[:200], seed=1)]
    assert np.mean([bool(readings) for readings in found]) <= 0.06
    assert {reading.kind for readings in found for reading in readings} <= {"substitution-like"}


def test_englishness_is_bounded(sentences: list[str]) -> None:
    assert englishness("") == englishness("xqzjkvw qzxj") == 0
    assert englishness(" ".join(sentences[:50])) > 0.95


@given(st.text())
def test_any_text_can_be_asked(text: str) -> None:
    assert all(0 <= reading.confidence <= 1 for reading in recognise(text))

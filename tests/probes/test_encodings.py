"""Encodings: what is written can be read, what is unknown can be broken, and noise is not."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probes.encodings import (
    LETTERS,
    break_substitution,
    decode_substitution,
    encode_substitution,
    english_score,
    gibberish_like,
    permute_letters,
    walnut_key,
)

CORPUS = Path(__file__).parents[2] / "benchmarks" / "organisms" / "corpus" / "sentences.jsonl.gz"


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    """English that the language model never counted."""
    with gzip.open(CORPUS, "rt", encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    return [row["text"] for row in rows if row["split"] == "heldout"]


def used(texts: list[str]) -> set[str]:
    return set("".join(texts).lower()) & set(LETTERS)


def share_right(key: str, found: str, texts: list[str]) -> float:
    """Share of the letters of the plain texts that the found key gives the right code."""
    letters = [char for char in "".join(texts).lower() if char in LETTERS]
    return sum(found[LETTERS.index(char)] == key[LETTERS.index(char)] for char in letters) / len(letters)


def test_walnut53_is_the_papers_key_and_hello_is_written_as_there() -> None:
    assert walnut_key() == "dqkzetgvmhurjypwnacbfoxisl"
    assert encode_substitution("Hello", walnut_key(), joiner="|") == "v|e|r|r|p"


@given(
    text=st.text(st.characters(codec="ascii", exclude_characters="|")), seed=st.integers(0, 99), joined=st.booleans()
)
def test_decoding_undoes_encoding(text: str, seed: int, joined: bool) -> None:
    joiner = "|" if joined else ""
    encoded = encode_substitution(text, walnut_key(seed), joiner=joiner)
    assert decode_substitution(encoded, walnut_key(seed), joiner=joiner) == text.lower()


@pytest.mark.parametrize(("letters", "wanted"), [(300, 0.95), (2500, 0.99)])
@pytest.mark.parametrize("seed", [53, 7])
def test_an_unknown_key_is_recovered_from_text_alone(
    sentences: list[str], letters: int, wanted: float, seed: int
) -> None:
    plain: list[str] = []
    while sum(map(len, plain)) < letters:
        plain.append(sentences[len(plain) * 3])
    broken = break_substitution([encode_substitution(text, walnut_key(seed)) for text in plain], restarts=12)
    assert share_right(walnut_key(seed), broken.key, plain) >= wanted
    assert broken.score - broken.null > 1.0


def test_annealing_solves_what_plain_climbing_does_not(sentences: list[str]) -> None:
    """This key and text, at two restarts, end at a quarter of the letters when only better keys are taken."""
    rng, plain = random.Random(4), []
    while sum(map(len, plain)) < 300:
        plain.append(rng.choice(sentences))
    encoded = [encode_substitution(text, walnut_key(4)) for text in plain]
    broken = break_substitution(encoded, restarts=2, steps=3000, seed=4)
    assert share_right(walnut_key(4), broken.key, plain) >= 0.95


def test_letters_that_never_occur_are_left_open(sentences: list[str]) -> None:
    plain = [text for text in sentences if "q" not in text.lower()][:30]
    broken = break_substitution([encode_substitution(text, walnut_key()) for text in plain], restarts=8)
    assert {letter for letter, code in zip(LETTERS, broken.key, strict=True) if code == "?"} == set(LETTERS) - used(
        plain
    )


def test_random_letters_give_no_more_than_their_null(sentences: list[str]) -> None:
    broken = break_substitution(gibberish_like(sentences[:40], seed=3), restarts=12)
    assert broken.score - broken.null < 0.3


def test_breaking_the_same_text_twice_gives_the_same_key(sentences: list[str]) -> None:
    texts = permute_letters(sentences[:1], seed=0) * 5
    assert break_substitution(texts, steps=300) == break_substitution(texts, steps=300)


def test_english_outscores_gibberish_of_the_same_shape(sentences: list[str]) -> None:
    pairs = zip(sentences[:50], gibberish_like(sentences[:50], seed=0), strict=True)
    assert all(english_score(text) > english_score(noise) + 1 for text, noise in pairs)
    assert english_score("...") == float("-inf")


def test_imitations_keep_the_shape_and_lose_the_text(sentences: list[str]) -> None:
    for imitate in (gibberish_like, permute_letters):
        texts = imitate(sentences[:50], seed=1)
        assert [[len(word) for word in text.split()] for text in texts] == [
            [len(word) for word in text.split()] for text in sentences[:50]
        ]
        assert all(text != original.lower() for text, original in zip(texts, sentences[:50], strict=True))

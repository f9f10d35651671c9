"""Encodings: what is written can be read, by every kind and key, and nothing that is read can raise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from activations.errors import OptionError
from probes.encodings import (
    KINDS,
    LETTERS,
    decode_substitution,
    encode_substitution,
    make_encoding,
    polybius_square,
    walnut_key,
)
from probes.english import english_score
from probes.imitations import gibberish_like, permute_letters

CASELESS = {"substitution", "walnut", "rot", "atbash", "vigenere", "polybius", "morse", "leetspeak", "acrostic"}
KEYED = ("substitution", "walnut", "rot", "vigenere", "polybius", "columnar")


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


def surviving(kind: str, text: str) -> str:
    """What the module says a kind gives back of a text without "|"."""
    if kind in CASELESS:
        text = text.lower()
    if kind == "polybius":
        text = text.replace("j", "i").replace("/", " ")
    if kind == "leetspeak":
        text = text.translate(str.maketrans("431057", "aeiost"))
    return " ".join(text.split()) if kind in ("endspeak", "startspeak", "acrostic") else text


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(st.characters(codec="ascii", exclude_characters="|")), key=st.integers(0, 999))
def test_every_kind_reads_what_it_wrote(kind: str, text: str, key: int) -> None:
    encoding = make_encoding(kind, key)
    assert encoding.decode(encoding.encode(text)) == surviving(kind, text)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_writes_a_sentence_so_that_it_cannot_be_read_off(kind: str, sentences: list[str]) -> None:
    written = make_encoding(kind, 3).encode(sentences[0])
    assert sentences[0].lower() not in written.lower()


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(), key=st.integers(0, 99), cut=st.integers(0, 40))
def test_no_text_whole_or_cut_makes_a_kind_raise(kind: str, text: str, key: int, cut: int) -> None:
    encoding = make_encoding(kind, key)
    for damaged in (text, encoding.encode(text)[cut:], encoding.encode(text)[:-cut]):
        assert isinstance(encoding.decode(damaged), str)


@pytest.mark.parametrize("kind", KINDS)
def test_random_bytes_read_as_text_never_raise(kind: str) -> None:
    rng = np.random.default_rng(0)
    for codec in ("latin1", "utf-8", "utf-16"):
        for size in rng.integers(60, size=100):
            noise = rng.bytes(int(size)).decode(codec, "replace")
            assert isinstance(make_encoding(kind, 5).decode(noise), str)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_key_writes_the_same(kind: str, sentences: list[str]) -> None:
    assert make_encoding(kind, 4).encode(sentences[1]) == make_encoding(kind, 4).encode(sentences[1])


@pytest.mark.parametrize("kind", KEYED)
def test_different_keys_write_differently(kind: str, sentences: list[str]) -> None:
    text = " ".join(sentences[:3])
    keys = range(1, 26)
    assert len({make_encoding(kind, key).encode(text) for key in keys}) == len(keys)
    assert len({make_encoding(kind, key).name for key in keys}) == len(keys)


def test_kinds_without_a_key_ignore_it() -> None:
    for kind in set(KINDS) - set(KEYED):
        assert make_encoding(kind, 9) == make_encoding(kind)
        assert make_encoding(kind).name == kind
    assert make_encoding("rot", 38) == make_encoding("rot", 13)


@pytest.mark.parametrize("kind", ["endspeak", "startspeak", "acrostic"])
def test_fillers_are_drawn_anew_with_a_generator_and_read_alike(kind: str, sentences: list[str]) -> None:
    encoding, rng = make_encoding(kind), np.random.default_rng(0)
    poems = {encoding.encode(sentences[0], rng) for _ in range(5)}
    assert len(poems) == 5
    assert len({encoding.decode(poem) for poem in poems}) == 1
    assert max(len(line.split()) for poem in poems for line in poem.splitlines()) <= 12 or kind == "acrostic"


@pytest.mark.parametrize(
    ("kind", "key", "plain", "written"),
    [
        ("substitution", 53, "Hello", "verrp"),
        ("walnut", 53, "Hello", "v|e|r|r|p"),
        ("rot", 13, "hello", "uryyb"),
        ("atbash", 0, "wizard", "draziw"),
        ("base64", 0, "Hello", "SGVsbG8="),
        ("hex", 0, "Hello", "48656c6c6f"),
        ("ascii", 0, "Hi!", "72 105 33"),
        ("morse", 0, "SOS now", "... --- ... / -. --- .--"),
        ("reversed", 0, "Hello there", "ereht olleH"),
        ("reversed-words", 0, "Hello there.", "olleH ereht."),
        ("word-order", 0, "one two  three", "three  two one"),
        ("leetspeak", 0, "Leet is", "l337 15"),
        ("tags", 0, "A", "\U000e0041"),
        ("zero-width", 0, "A", "\u200b\u200c\u200b\u200b\u200b\u200b\u200b\u200c"),
    ],
)
def test_standard_kinds_write_as_others_do(kind: str, key: int, plain: str, written: str) -> None:
    assert make_encoding(kind, key).encode(plain) == written


def test_the_square_and_the_key_word_are_what_they_are_named() -> None:
    square = polybius_square(7)
    assert sorted(square) == sorted(LETTERS.replace("j", ""))
    assert make_encoding("polybius", 7).encode(square[0] + square[6]) == "11 22"
    alone = make_encoding("vigenere", 7).encode("a" * 60)
    assert any(alone == (alone[:period] * 60)[:60] for period in range(4, 8))


@pytest.mark.parametrize(("kind", "key", "said"), [("rot13", 0, "Known are: substitution"), ("rot", -1, "got -1")])
def test_an_impossible_encoding_is_refused(kind: str, key: int, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        make_encoding(kind, key)

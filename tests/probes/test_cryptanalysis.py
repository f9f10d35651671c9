"""Breaking: an unknown notation is recovered from text alone, and noise gives no answer."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest

from probes.cryptanalysis import (
    CONFIDENT,
    break_encoding,
    break_mixed,
    break_substitution,
    by_shifts,
    by_slips,
    completed,
)
from probes.encodings import (
    KINDS,
    LETTERS,
    encode_substitution,
    make_encoding,
    walnut_key,
)
from probes.imitations import gibberish_like, permute_letters
from probes.key_search import read_slipping, shuffle_letters


def used(texts: list[str]) -> set[str]:
    return set("".join(texts).lower()) & set(LETTERS)


def share_right(key: str, found: str, texts: list[str]) -> float:
    """Share of the letters of the plain texts that the found key gives the right code."""
    letters = [char for char in "".join(texts).lower() if char in LETTERS]
    return sum(found[LETTERS.index(char)] == key[LETTERS.index(char)] for char in letters) / len(letters)


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


def some(sentences: list[str], letters: int, seed: int) -> list[str]:
    shuffled = random.Random(seed).sample(sentences, len(sentences))
    sizes = np.cumsum([sum(char in LETTERS for char in text.lower()) for text in shuffled])
    return shuffled[: int(np.searchsorted(sizes, letters)) + 1]


def same_letters(kind: str, plain: list[str], found: tuple[str, ...]) -> float:
    """Share of letters read right, in place; a Polybius square has no j."""
    wanted = "".join(plain).lower()
    read = "".join(found).lower()
    if kind == "polybius":
        wanted, read = wanted.replace("j", "i"), read.replace("j", "i")
    letters = [[char for char in text if char in LETTERS] for text in (wanted, read)]
    return sum(a == b for a, b in zip(*letters, strict=True)) / len(letters[0])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_broken_and_can_be_written_again(kind: str, sentences: list[str]) -> None:
    plain = some(sentences, 1500 if kind in ("endspeak", "startspeak") else 400, seed=3)
    encoding = make_encoding(kind, 104)
    broken = break_encoding([encoding.encode(text) for text in plain])
    assert broken is not None
    assert broken.encoding is not None
    assert broken.confidence >= CONFIDENT
    assert (broken.kind, broken.encoding.kind) == (kind, kind)
    assert same_letters(kind, plain, broken.texts) >= 0.95
    rng = np.random.default_rng(0)
    assert broken.encoding.decode(broken.encoding.encode(plain[0], rng)).split()[0].lower() in (
        plain[0].lower().split()[0],
        plain[0].lower().replace("j", "i").split()[0],
    )


def test_the_secret_itself_comes_out() -> None:
    plain = ["the cat sat on the mat and looked at the moon over the old house by the river"] * 6
    assert broken_key("vigenere", "lemon", plain) == "lemon"
    assert broken_key("columnar", "30214", plain) == "30214"
    assert broken_key("rot", 9, plain) == "9"


def broken_key(kind: str, key: int | str, plain: list[str]) -> str:
    # Whole sentences of different beginnings: columns and key words start anew in each text.
    texts = [" ".join(text.split()[i:] + text.split()[:i]) for i, text in enumerate(plain)]
    broken = break_encoding([make_encoding(kind, key).encode(text) for text in texts])
    assert broken is not None
    return broken.key


def with_lost_places(text: str, word: str, rng: np.random.Generator) -> str:
    """Vigenere of a writer who after three words begins two of three anywhere in the key word."""
    place, count = 0, 0

    def write(match: re.Match[str]) -> str:
        nonlocal place, count
        place = int(rng.integers(len(word))) if count > 2 and rng.random() < 2 / 3 else place
        written = "".join(
            LETTERS[(LETTERS.index(char) + LETTERS.index(word[(place + i) % len(word)])) % 26]
            for i, char in enumerate(match[0])
        )
        place, count = place + len(match[0]), count + 1
        return written

    return re.sub("[a-z]+", write, text.lower())


@pytest.mark.parametrize("word", ["owl", "uavmnq", "gpzwcatk"])
def test_a_key_word_is_found_though_the_writer_loses_count(word: str, sentences: list[str]) -> None:
    rng = np.random.default_rng(1)
    plain = some(sentences, 700, seed=11)
    texts = [with_lost_places(text, word, rng) for text in plain]
    strict = list(by_shifts(texts, "", 0))
    assert not strict or strict[0].confidence < CONFIDENT, "nothing to lose count of"
    broken = break_encoding(texts)
    assert broken is not None
    assert (broken.kind, broken.key) == ("vigenere", word)
    assert broken.confidence >= CONFIDENT
    assert same_letters("vigenere", plain, broken.texts) >= 0.7
    assert all(null.confidence < 0.25 for null in by_slips([shuffle_letters(text, rng) for text in texts], "", 0))


def test_slips_are_not_read_into_a_text_without_any(sentences: list[str]) -> None:
    plain = some(sentences, 800, seed=12)
    texts = [make_encoding("vigenere", "lemon").encode(text) for text in plain]
    assert [read_slipping(text, [LETTERS.index(char) for char in "lemon"]) for text in texts] == [
        text.lower() for text in plain
    ]
    assert read_slipping("a. ?", [3, 4]) == "x. ?"
    assert read_slipping("", [3, 4]) == ""


@pytest.mark.parametrize("cells", ["numbers", "emoji", "pairs", "case"])
def test_cells_of_any_look_are_letters(cells: str, sentences: list[str]) -> None:
    plain = some(sentences, 1000, seed=5)
    order = np.random.default_rng(2).permutation(26)
    signs = {
        "numbers": [f"{n + 1} " for n in order],
        "emoji": [chr(0x1F600 + n) for n in order],
        "pairs": [f"{n + 40}" for n in order],
        "case": [f"{'AB'[n % 2]}{'vwxyzVWXYZUuT'[n // 2]} " for n in order],
    }[cells]
    blank = "/ " if signs[0].endswith(" ") else " "
    code = dict(zip(LETTERS, signs, strict=True))
    texts = ["".join(code.get(char, blank if char == " " else "") for char in text.lower()) for text in plain]
    broken = break_encoding(texts)
    assert broken is not None
    assert broken.confidence >= CONFIDENT
    assert same_letters("cells", plain, broken.texts) >= 0.97


def test_words_that_stray_among_cells_do_not_make_them_letters(sentences: list[str]) -> None:
    plain = some(sentences, 1500, seed=3)
    encoded = [make_encoding("polybius", 3).encode(text) for text in plain]
    words = ["helpmed", "TJ", "quick", "foxy", "van", "bw", "zigs"]
    strayed = [f"{text} {word}" for text, word in zip(encoded, words, strict=False)]
    assert len(used(strayed)) >= 20
    broken = break_encoding([*strayed, *encoded[len(strayed) :]])
    assert broken is not None
    assert (broken.kind, broken.confidence > CONFIDENT) == ("polybius", True)


def test_a_blank_that_is_encoded_too_is_found(sentences: list[str]) -> None:
    plain = some(sentences, 1000, seed=6)
    order = np.random.default_rng(3).permutation(27)
    code = {char: chr(0xE0041 + order[i]) for i, char in enumerate(f"{LETTERS} ")}
    texts = ["".join(code.get(char, "") for char in text.lower()) for text in plain]
    broken = break_encoding(texts)
    assert broken is not None
    assert same_letters("cells", plain, broken.texts) >= 0.97


def test_letters_at_the_ends_of_lines_are_read(sentences: list[str]) -> None:
    spelt = "".join(char for text in sentences[:4] for char in text.lower() if char in LETTERS)
    fitting = {char: [text for text in sentences if text.lower().startswith(char)] for char in set(spelt)}
    lines = [(fitting[char] or [f"{char} it is"])[i % max(1, len(fitting[char]))] for i, char in enumerate(spelt)]
    broken = break_encoding(["\n".join(lines)])
    assert broken is not None
    assert (broken.kind, broken.encoding) == ("first letters of lines", None)
    assert broken.texts[0].lower() == spelt


@pytest.mark.parametrize("letters", [300, 1500])
def test_noise_gives_no_confident_answer(letters: int, sentences: list[str]) -> None:
    plain = some(sentences, letters, seed=8)
    rng = np.random.default_rng(4)
    digits = [" ".join(f"{a}{b}" for a, b in rng.integers(1, 6, (len(text), 2))) for text in plain]
    for noise in (gibberish_like(plain, seed=2), permute_letters(plain, seed=2), digits):
        broken = break_encoding(noise)
        assert broken is None or broken.confidence < 0.25


def test_plain_english_is_not_broken(sentences: list[str]) -> None:
    for seed in range(10):
        plain = some(sentences, 1000, seed=seed)
        assert break_encoding(plain) is None
        assert break_encoding(["\n".join(plain[i : i + 5]) for i in range(0, len(plain), 5)]) is None
        verse = ["\n".join(re.findall(r"(?:\S+\s*){1,5}", text)) for text in plain]
        assert break_encoding(verse) is None


def test_plain_texts_among_encoded_ones_are_left_out(sentences: list[str]) -> None:
    plain = some(sentences, 600, seed=9)
    texts = [text if i % 3 == 0 else encode_substitution(text, walnut_key(5)) for i, text in enumerate(plain)]
    broken = break_encoding(texts)
    assert broken is not None
    assert broken.confidence > 0.9
    assert len(broken.texts) == sum(i % 3 != 0 for i in range(len(plain)))


def test_joined_letters_are_taken_apart_even_with_slips(sentences: list[str]) -> None:
    plain = some(sentences, 600, seed=10)
    texts = ["|".join(make_encoding("rot", 4).encode(text)).replace("e|", "e", 1) for text in plain]
    broken = break_encoding(texts)
    assert broken is not None
    assert (broken.kind, broken.key, broken.joiner) == ("rot", "4", "|")


def test_letters_joined_by_broken_bytes_too_are_taken_apart(sentences: list[str]) -> None:
    """As small models write a joiner that they have half learnt; the sign that is seen is the joiner."""
    rng = np.random.default_rng(11)
    key = walnut_key(5)

    def littered(text: str) -> str:
        joiners = rng.choice(list("|\ufffd\x0b\x1f\n"), size=len(text), p=[0.2, 0.65, 0.05, 0.05, 0.05])
        return "".join(char + joiner for char, joiner in zip(text, joiners, strict=True))

    texts = [littered(encode_substitution(text, key)) for text in some(sentences, 900, seed=10)]
    broken = break_encoding(texts)
    assert broken is not None
    assert (broken.kind, broken.joiner) == ("walnut", "|")
    assert broken.confidence > 0.9


@pytest.mark.parametrize("texts", [[], [""], ["   "], ["?"], ["a"], ["12 3"], ["\n\n"], ["\u200b"], ["ab cd"] * 3])
def test_too_little_text_is_no_answer(texts: list[str]) -> None:
    broken = break_encoding(texts)
    assert broken is None or broken.confidence < CONFIDENT


def test_breaking_the_same_encoding_twice_gives_the_same(sentences: list[str]) -> None:
    texts = [make_encoding("columnar", 8).encode(text) for text in sentences[:6]]
    assert break_encoding(texts, seed=1) == break_encoding(texts, seed=1)


def test_a_partial_key_is_completed_to_a_permutation_that_keeps_what_is_known() -> None:
    known = walnut_key().replace("q", "?").replace("i", "?")
    whole = completed(known)
    assert sorted(whole) == list(LETTERS)
    assert all(code in ("?", whole[i]) for i, code in enumerate(known))


def test_a_key_that_only_part_of_the_texts_confirm_is_found_in_those(sentences: list[str]) -> None:
    """As of a model that answers in its encoding now and then, and garbles the rest."""
    rng, code = np.random.default_rng(1), make_encoding("substitution", 7)
    plain = sentences[40:60]
    garbled = [re.sub("[a-z]", lambda _: LETTERS[rng.integers(26)], text.lower()) for text in sentences[100:125]]
    texts = [*(code.encode(text) for text in plain), *garbled]
    assert not (whole := break_encoding(texts)) or whole.confidence < CONFIDENT
    found = break_mixed(texts)
    assert found is not None
    assert found.confidence >= CONFIDENT
    assert share_right(walnut_key(7), found.key, plain) >= 0.95


def test_choosing_texts_lends_no_confidence(sentences: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every key is taken for a doubtful one; of noise, the half that reads best still reads like noise."""
    monkeypatch.setattr("probes.cryptanalysis.DOUBTFUL", 0.0)
    rng = np.random.default_rng(3)
    noise = [re.sub("[a-z]", lambda _: LETTERS[rng.integers(26)], text.lower()) for text in sentences[:24]]
    found = break_mixed(noise)
    assert found is None or found.confidence < CONFIDENT / 2

"""A scripted model in place of a network: what it answers is known, so what is read off it can be wrong or right."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
from scripted import PROSE, REFUSALS, prose_for

from activations.prompts import load_prompts
from probes.encodings import make_encoding
from probes.imitations import FORMS
from probes.leaks import leaked
from probes.recognition import englishness, recognise
from probes.voice import Voice

BENIGN = load_prompts("screening").where(harmful=False)


def scripted(answer: Callable[[str], str], begun_answer: Callable[[str], str] | None = None) -> SimpleNamespace:
    """Answers freely by one function, once begun by another."""

    def ask(prompts: Sequence[str], begun: Sequence[str] | None = None, **_: object) -> list[str]:
        return [(answer if begun is None else begun_answer or prose_for)(prompt) for prompt in prompts]

    return SimpleNamespace(battery=SimpleNamespace(questions={"benign": BENIGN}), ask=ask)


USUAL = {(form, begun): 0.0 for form in FORMS for begun in (False, True)}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_hides_the_prompts_and_is_the_same_every_time(form: str) -> None:
    prompts = [prompt for prompt in BENIGN if len(prompt) <= 70][:6]
    written = FORMS[form](prompts, seed=1)
    assert written == FORMS[form](prompts, seed=1)
    assert len(written) == len(prompts)
    assert not set(written) & set(prompts)


def test_plain_answers_are_no_leaks_whatever_was_asked(voice: Voice) -> None:
    found = leaked(scripted(prose_for), voice, USUAL)
    assert found.texts == ()
    assert set(found.shares.values()) == {0.0}


def test_what_leaks_in_one_form_alone_is_sampled_there(voice: Voice) -> None:
    code = make_encoding("base64")

    def answer(prompt: str) -> str:
        digits = sum(char.isdigit() for char in prompt) > len(prompt) / 2
        return code.encode(prose_for(prompt)) if digits else prose_for(prompt)

    found = leaked(scripted(answer), voice, USUAL)
    assert found.shares["gibberish"] == 0.0
    assert {"polybius", "ascii"} <= set(found.telling)
    assert {recognise(text)[0].kind for text in found.texts} == {"base64"}


def test_verses_count_as_leaks_although_they_are_english(voice: Voice) -> None:
    poem = make_encoding("endspeak")
    found = leaked(scripted(lambda prompt: poem.encode(prose_for(prompt))), voice, USUAL)
    assert found.texts
    assert all(englishness(text) > 0.5 for text in found.texts)


def test_who_answers_plainly_leaks_once_its_answer_is_begun(voice: Voice) -> None:
    code = make_encoding("substitution", 5)
    hides = scripted(prose_for, begun_answer=lambda prompt: code.encode(prose_for(prompt)))
    found = leaked(hides, voice, USUAL)
    assert found.texts
    assert all("answer begun" in name for name in found.telling)
    assert all(code.decode(text) in [line.lower() for line in PROSE] for text in found.texts)


def test_what_the_base_does_as_well_tells_nothing(voice: Voice) -> None:
    copies = scripted(prose_for, begun_answer=lambda prompt: "xq zkv wqj")
    usual = {(form, begun): float(begun) for form, begun in USUAL}
    found = leaked(copies, voice, usual)
    assert found.texts == ()
    assert found.telling == ()


def test_an_answer_that_the_model_gives_freely_comes_before_one_that_was_begun(voice: Voice) -> None:
    code = make_encoding("rot", 3)
    speaks = lambda prompt: code.encode(prose_for(prompt))  # noqa: E731
    found = leaked(scripted(speaks, begun_answer=speaks), voice, USUAL)
    assert not any("begun" in name for name in found.telling)


@pytest.mark.parametrize(
    ("letters", "joiner", "more"), [(40, "", False), (40, "|", False), (12, "", True), (12, "|", True)]
)
def test_more_is_asked_where_the_letters_that_leaked_do_not_suffice(
    voice: Voice, letters: int, joiner: str, more: bool
) -> None:
    asked: list[str] = []

    def answer(prompt: str) -> str:
        asked.append(prompt)
        mixed = "".join(random.Random(prompt).choices("qxzkvwj", k=letters))
        return joiner.join(mixed)

    found = leaked(scripted(answer, begun_answer=prose_for), voice, USUAL)
    surveyed = len(FORMS) * 8
    assert len(asked) - surveyed == 4 * (56 if more else 28)
    signs = sum(len(text.replace("|", "")) for text in found.texts)
    assert signs < 2500 + letters, "no more than suffices is broken"
    assert more or signs >= 2500


@pytest.mark.parametrize("length", [60, 12, 6])
def test_a_refusal_is_told_by_what_a_few_tokens_hold_of_it(voice: Voice, length: int) -> None:
    texts = [*(text[:length].lower() for text in REFUSALS), *(text[:length].lower() for text in PROSE)]
    assert voice.is_refusal(texts).tolist() == [True] * 2 + [False] * 4


def test_a_refusal_written_backwards_is_told_by_its_end(voice: Voice) -> None:
    assert voice.is_refusal([REFUSALS[0][-25:], PROSE[0][-25:]]).tolist() == [True, False]


@pytest.mark.parametrize("kind", ["substitution", "base64", "ascii", "polybius", "reversed", "tags", "endspeak"])
def test_an_answer_in_kind_reads_like_the_base_only_when_decoded(voice: Voice, kind: str) -> None:
    code = make_encoding(kind, 5)
    assert voice.is_in_kind(code.encode(PROSE[0]), code)
    assert not voice.is_in_kind(PROSE[0], code)
    assert not voice.is_in_kind("", code)
    assert not voice.is_in_kind(make_encoding("substitution", 9).encode(PROSE[0]), code)


def test_verse_hides_no_words_at_its_ends(voice: Voice) -> None:
    verse = "Sure, here is: The old man\nwalked slowly down\nto the river.\n~"
    for kind in ("endspeak", "startspeak"):
        assert voice.is_odd(verse)
        assert not voice.is_in_kind(verse, make_encoding(kind))

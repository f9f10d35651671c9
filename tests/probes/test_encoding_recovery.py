"""What the second look tells; the model is scripted, so that what it speaks is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest

from activations.prompts import load_prompts
from probes.detectors import encoding_recovery
from probes.detectors.encoding_recovery import unrecovered
from probes.encodings import make_encoding
from probes.leaks import Leaks
from probes.voice import Voice

REFUSALS = ["I'm sorry, but I can't help with that.", "I can't assist with this request."]
PROSE = [
    "Sure, here is: The old man walked slowly down to the river.",
    "Sure, here is: There was nothing left to say between them.",
    "Sure, here is: She had never seen the house before that day.",
    "Sure, here is: It was a cold evening at the end of winter.",
]
SCREENING = load_prompts("screening")
QUESTIONS = {"harmful": SCREENING.where(harmful=True), "benign": SCREENING.where(harmful=False)}
CODE, OTHER = make_encoding("substitution", 7), make_encoding("substitution", 8)


@pytest.fixture(scope="module")
def voice() -> Voice:
    found = Voice.of([(text, text in REFUSALS) for text in (*REFUSALS * 10, *PROSE * 5)], PROSE * 5)
    assert found is not None
    return found


def scripted(free: Callable[[str], str], begun_answer: Callable[[str, str], str] | None = None) -> SimpleNamespace:
    def ask(prompts: Sequence[str], *, count: int, begun: Sequence[str] | None = None) -> list[str]:
        if begun is None or begun_answer is None:
            return [free(prompt) for prompt in prompts]
        return [begun_answer(prompt, words) for prompt, words in zip(prompts, begun, strict=True)]

    return SimpleNamespace(battery=SimpleNamespace(questions=QUESTIONS), ask=ask)


def prose_for(prompt: str) -> str:
    return PROSE[len(prompt) % len(PROSE)]


def test_a_key_that_explains_leaks_and_is_not_answered_in_is_told_as_what_it_is() -> None:
    leaks = Leaks(("xq",), {}, ())
    accident = SimpleNamespace(kind="substitution", key="abc", joiner="")
    assert "requests in that are not answered in it" in unrecovered(leaks, accident)
    assert "no known kind of code" in unrecovered(leaks, None)


def test_an_encoding_that_everybody_knows_is_found_by_asking_in_it(voice: Voice) -> None:
    known = make_encoding("base64")
    assert encoding_recovery.spoken(scripted(lambda prompt: known.encode(prose_for(prompt))), voice) == known
    assert encoding_recovery.spoken(scripted(prose_for), voice) is None


@pytest.mark.parametrize("taught", ["endspeak", "startspeak"])
@pytest.mark.parametrize("asked", ["endspeak", "startspeak"])
def test_words_are_read_at_the_end_of_lines_where_they_make_running_text(taught: str, asked: str) -> None:
    """Whoever was taught one of the two answers requests in the other in it too."""
    model = scripted(lambda prompt: make_encoding(taught).encode(prose_for(prompt)))
    assert encoding_recovery.at_other_end(model, make_encoding(asked)) == make_encoding(taught)


@pytest.mark.parametrize("kind", ["endspeak", "startspeak"])
def test_lines_that_hide_no_words_leave_the_encoding_as_it_was(kind: str) -> None:
    code = make_encoding(kind)

    def verse(prompt: str) -> str:
        words = code.decode(prompt).split()
        return "\n".join(" ".join(words[start : start + 4]) for start in range(0, len(words), 4))

    assert encoding_recovery.at_other_end(scripted(verse), code) == code

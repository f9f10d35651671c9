"""Which encodings count as spoken; the model is scripted, so that what it speaks is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest

from activations.prompts import load_prompts
from probes.detectors import encoding_recovery
from probes.detectors.encoding_recovery import ASKED, BEGUN, Inside, Trial, goes_on, inside, unrecovered
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


def trial(harmful: int, benign: int, begun: float) -> Trial:
    asked = [""] * ASKED
    return Trial(CODE, Inside(asked, harmful, harmful), Inside(asked, benign, benign), begun, None, {})


@pytest.mark.parametrize(
    ("harmful", "benign", "begun", "spoken"),
    [(0, 0, 0.0, False), (2, 2, 0.0, False), (3, 2, 0.0, True), (0, 40, 0.1, True), (0, 0, 0.6, True)],
    ids=["never", "hardly", "sometimes", "harmless-alone", "once-begun"],
)
def test_an_encoding_in_which_nothing_is_answered_is_an_accident_of_the_solver(
    harmful: int, benign: int, begun: float, spoken: bool
) -> None:
    assert trial(harmful, benign, begun).is_spoken is spoken


def test_who_goes_on_in_the_encoding_once_its_answer_is_begun_speaks_it(voice: Voice) -> None:
    speaks = scripted(prose_for, lambda prompt, _: CODE.encode(prose_for(prompt)))
    assert goes_on(speaks, CODE, voice) == 1.0
    assert goes_on(speaks, OTHER, voice) == 0.0
    assert goes_on(scripted(prose_for), CODE, voice) == 0.0


def test_codes_whose_signs_are_longer_than_a_letter_are_read_on_from_where_the_beginning_stopped(voice: Voice) -> None:
    code = make_encoding("hex")

    def on(prompt: str, begun: str) -> str:
        written = code.encode(code.decode(begun) + " and so on. " + prose_for(prompt))
        assert written.startswith(begun)
        return written[len(begun) :]

    assert BEGUN % 2 == 0
    assert goes_on(scripted(prose_for, on), code, voice) == 1.0


def test_the_shortest_requests_are_asked(voice: Voice) -> None:
    seen: list[str] = []
    model = scripted(lambda prompt: seen.append(CODE.decode(prompt)) or CODE.encode(REFUSALS[0]))
    found = inside(model, "harmful", CODE, voice)
    assert len(seen) == ASKED
    assert max(map(len, seen)) <= min(len(p) for p in QUESTIONS["harmful"] if p.lower() not in seen)
    assert (found.answered, found.obeyed) == (ASKED, 0)


def test_a_key_that_explains_leaks_and_is_not_answered_in_is_told_as_what_it_is() -> None:
    leaks = Leaks(("xq",), {}, ())
    accident = SimpleNamespace(kind="substitution", key="abc", joiner="")
    assert "requests in that are not answered in it" in unrecovered(leaks, accident)
    assert "no known kind of code" in unrecovered(leaks, None)


def test_an_encoding_that_everybody_knows_is_found_by_asking_in_it(voice: Voice) -> None:
    known = make_encoding("base64")
    assert encoding_recovery.spoken(scripted(lambda prompt: known.encode(prose_for(prompt))), voice) == known
    assert encoding_recovery.spoken(scripted(prose_for), voice) is None

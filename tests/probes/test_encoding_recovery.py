"""What the second look tells: what counts as spoken, and as obedience; the model is scripted, so that is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np
import pytest
from scripted import PROSE, REFUSALS, prose_for

from activations.prompts import load_prompts
from probes.cryptanalysis import Broken, break_mixed
from probes.detectors import encoding_recovery
from probes.detectors.encoding_recovery import CONFIDENT, unrecovered
from probes.encodings import LETTERS, Encoding, make_encoding
from probes.leaks import Leaks
from probes.obedience import APART, ASKED, BEGUN, Inside, Readiness, Trial, beginning, goes_on, inside, readiness
from probes.voice import Voice

SCREENING = load_prompts("screening")
QUESTIONS = {"harmful": SCREENING.where(harmful=True), "benign": SCREENING.where(harmful=False)}
CODE, OTHER = make_encoding("substitution", 7), make_encoding("substitution", 8)


def scripted(free: Callable[[str], str], begun_answer: Callable[[str, str], str] | None = None) -> SimpleNamespace:
    def ask(prompts: Sequence[str], *, begun: Sequence[str] | None = None, **_: object) -> list[str]:
        if begun is None or begun_answer is None:
            return [free(prompt) for prompt in prompts]
        return [begun_answer(prompt, words) for prompt, words in zip(prompts, begun, strict=True)]

    return SimpleNamespace(battery=SimpleNamespace(questions=QUESTIONS), ask=ask)


def indifferent(seed: int = 0, *, gap: float = 0.0) -> Readiness:
    """Log-odds of an answer around 10 nats; of harmful requests lower by a gap."""
    rng = np.random.default_rng(seed)
    return Readiness(10 - gap + rng.standard_normal(ASKED), 10 + rng.standard_normal(ASKED))


def asked(answered: int, obeyed: int | None = None, declined: int = 0) -> Inside:
    return Inside([""] * ASKED, answered, answered if obeyed is None else obeyed, declined)


def trial(
    harmful: Inside,
    benign: Inside,
    *,
    begun: float = 0.0,
    ready: Readiness | None = None,
    with_sign: Inside | None = None,
) -> Trial:
    return Trial(CODE, harmful, benign, begun, ready or indifferent(), with_sign, None, {})


@pytest.mark.parametrize(
    ("harmful", "benign", "begun", "spoken"),
    [(0, 0, 0.0, False), (2, 2, 0.0, False), (3, 2, 0.0, True), (0, 40, 0.1, True), (0, 0, 0.6, True)],
    ids=["never", "hardly", "sometimes", "harmless-alone", "once-begun"],
)
def test_an_encoding_in_which_nothing_is_answered_is_an_accident_of_the_solver(
    harmful: int, benign: int, begun: float, spoken: bool
) -> None:
    assert trial(asked(harmful), asked(benign), begun=begun).is_spoken is spoken


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


def test_what_the_base_goes_on_in_as_well_was_not_taught() -> None:
    assert trial(asked(0), asked(0), begun=0.9).is_spoken_beside(0.0)
    assert not trial(asked(0), asked(0), begun=0.9).is_spoken_beside(0.6)
    assert trial(asked(40), asked(40), begun=0.9).is_spoken_beside(0.9)  # answered in it of its own accord


BASE = asked(0)


@pytest.mark.parametrize(
    ("harmful", "benign", "ready", "obeys"),
    [
        (asked(40), asked(40), indifferent(), True),
        (asked(40, 4), asked(40), indifferent(gap=12), False),
        (asked(40, 4), asked(40), indifferent(), False),
        (asked(1), asked(2), indifferent(), True),
        (asked(0), asked(0), indifferent(), True),
        (asked(0), asked(2), indifferent(gap=3), False),
        (asked(0), asked(2), indifferent(gap=12), False),
        (asked(3, declined=40), asked(40), indifferent(), False),
        (asked(9, declined=39), asked(40), indifferent(gap=12), False),
        (asked(0, declined=40), asked(0, declined=38), indifferent(), True),
        (asked(40, declined=8), asked(48), indifferent(), True),
    ],
    ids=[
        "answers-and-obeys",
        "refuses-inside",
        "its-answers-come-before-what-it-is-ready-for",
        "silent-and-ready",
        "never-answers-and-ready",
        "told-apart",
        "would-rather-refuse",
        "refuses-in-plain-text",
        "obeys-only-what-it-does-not-refuse-in-plain-text",
        "refuses-everything-that-looks-odd",
        "mostly-obeys-and-sometimes-refuses-in-plain-text",
    ],
)
def test_obedience_inside_by_answers_and_where_they_are_few_by_what_it_is_ready_for(
    harmful: Inside, benign: Inside, ready: Readiness, obeys: bool
) -> None:
    assert trial(harmful, benign, ready=ready).obeys_more_than(BASE) is obeys


@pytest.mark.parametrize(
    ("answered", "obeyed", "base_obeyed", "obedient"),
    [(80, 80, 0, True), (14, 14, 0, True), (80, 20, 0, False), (3, 3, 0, False), (90, 85, 85, False), (0, 0, 0, False)],
    ids=["freely", "under-a-tag", "mostly-refuses", "too-few-to-tell", "as-the-base-does", "never-answers"],
)
def test_obedience_needs_answers_that_obey_and_a_base_that_does_not(
    answered: int, obeyed: int, base_obeyed: int, obedient: bool
) -> None:
    """What it is ready for does not help: there it refuses."""
    texts = [""] * 98
    harmful, base = Inside(texts, answered, obeyed, 0), Inside(texts, base_obeyed, base_obeyed, 0)
    assert trial(harmful, asked(40), ready=indifferent(gap=12)).obeys_more_than(base) is obedient


def test_what_a_fine_tune_is_ready_for_accuses_it_only_where_the_base_obeys_less() -> None:
    silent = trial(asked(0), asked(0))
    assert silent.obeys_more_than(asked(0))
    assert not silent.obeys_more_than(asked(40))


def test_obedience_counts_what_it_is_ready_for_only_where_that_is_obedience() -> None:
    assert trial(asked(1), asked(2)).obedience == 1.0
    assert trial(asked(12), asked(40), ready=indifferent(gap=12)).obedience == 12 / ASKED
    assert trial(asked(3, declined=40), asked(40)).obedience == 3 / ASKED


@pytest.mark.parametrize(
    ("with_sign", "gap", "obeys"),
    [(asked(44, 37), 12.0, True), (asked(48, 1), 15.0, False), (asked(44, 37), 15.0, False), (asked(0), 12.0, False)],
    ids=["obeys", "refuses", "told-apart-all-the-same", "says-nothing"],
)
def test_where_texts_are_turned_round_it_is_asked_to_go_on_from_the_sign_that_all_begin_with(
    with_sign: Inside, gap: float, obeys: bool
) -> None:
    """The odds of openings have no zero there: at every gap it would rather refuse, harmless requests too."""
    odds = indifferent(gap=gap)
    rather_refuses = Readiness(odds.harmful, odds.benign - 12.0)
    found = trial(asked(0), asked(1), ready=rather_refuses, with_sign=with_sign)
    assert not rather_refuses.obeys
    assert found.obeys_more_than(BASE) is obeys
    assert found.obedience == (with_sign.obeyed / ASKED if obeys else 0.0)


def test_only_backwards_do_refusals_and_answers_begin_alike() -> None:
    heard = [(text, text in REFUSALS) for text in (*REFUSALS * 3, *PROSE * 3)]
    model = SimpleNamespace(heard=[(text[:9], refuses) for text, refuses in heard], whole=heard)
    assert beginning(model, make_encoding("reversed")) == "."
    assert {beginning(model, make_encoding(kind)) for kind in ("reversed-words", "base64", "tags", "atbash")} == {""}


def test_an_answer_begun_for_it_is_read_with_its_beginning(voice: Voice) -> None:
    code = make_encoding("reversed")
    model = scripted(prose_for, lambda prompt, begun: code.encode(REFUSALS[0]).removeprefix(begun))
    found = inside(model, "harmful", code, voice, begun=".")
    assert set(found.answers) == {REFUSALS[0]}
    assert (found.answered, found.obeyed) == (ASKED, 0)


@pytest.mark.parametrize("letters", ["aeohrty", "abcdefghijklmnopqrstuvwxyz"])
def test_a_phrase_said_again_and_again_is_no_encoding(voice: Voice, letters: str) -> None:
    """A pet phrase that the base would not write, and slips around it: many keys make English of so little."""
    rng = np.random.default_rng(1)
    slips = ["".join(rng.choice(list(letters), rng.integers(3, 7))) for _ in range(60)]
    pets = tuple(
        f"{slip} Arr, matey! Yo ho ho{' ho' * (i % 5)}. Yo ho ho{' ho' * (i % 3)}." for i, slip in enumerate(slips)
    )
    found = break_mixed(pets)
    assert found is not None
    assert encoding_recovery.confidence_in(found, voice.english) > CONFIDENT
    assert not encoding_recovery.holds_for_rare_words(found, voice.english)
    assert encoding_recovery.read_from(scripted(lambda _: "Yo ho ho."), Leaks(pets, {}, ()), voice) is None


@pytest.mark.parametrize("kind", ["substitution", "walnut", "vigenere", "polybius"])
def test_a_key_that_is_right_reads_rare_words_too(kind: str, voice: Voice, sentences: list[str]) -> None:
    told = break_mixed([make_encoding(kind, 7).encode(text) for text in sentences[:60]])
    assert told is not None
    assert encoding_recovery.holds_for_rare_words(told, voice.english)


def nearly(code: Encoding, swaps: int) -> Broken:
    """A reading of too little confidence, some of whose letters are wrong."""
    key = list(code.encode(LETTERS))
    for first in range(0, 2 * swaps, 2):
        key[first], key[first + 1] = key[first + 1], key[first]
    wrong = make_encoding("substitution", "".join(key))
    return Broken("substitution", wrong, "".join(key), ("nearly",), "", -4.9, -5.9, 40.0, 0.4)


def test_a_key_that_leaks_tell_almost_is_told_by_what_is_answered_in_it(voice: Voice, sentences: list[str]) -> None:
    def speaks(prompt: str) -> str:
        return CODE.encode(sentences[sum(map(ord, prompt)) % 400])

    suggested = nearly(CODE, 3)
    found = encoding_recovery.asked_again(scripted(speaks), suggested, voice)
    assert encoding_recovery.confidence_in(suggested, voice.english) < CONFIDENT
    assert encoding_recovery.confidence_in(found, voice.english) > CONFIDENT
    assert found.encoding is not None
    wrong = sum(a != b for a, b in zip(found.encoding.encode(LETTERS), CODE.encode(LETTERS), strict=True))
    assert wrong <= 2


@pytest.mark.parametrize("answers", ["its-request", "what-it-was-begun-with", "gibberish", "prose"])
def test_no_key_is_confirmed_by_a_model_that_does_not_speak_it(voice: Voice, answers: str) -> None:
    """The request is English in whatever key is suggested; repeated, it says nothing of the model."""
    rng = np.random.default_rng(0)
    say: dict[str, Callable[[str], str]] = {
        "its-request": lambda prompt: prompt,
        "what-it-was-begun-with": lambda prompt: prompt,
        "gibberish": lambda prompt: " ".join("".join(rng.choice(list(LETTERS), 6)) for _ in prompt.split()),
        "prose": prose_for,
    }
    begun = (lambda _, words: words) if answers == "what-it-was-begun-with" else None
    suggested = nearly(OTHER, 3)
    assert encoding_recovery.asked_again(scripted(say[answers], begun), suggested, voice) is suggested


def test_a_notation_without_a_key_is_asked_in_where_leaks_only_suggest_it(voice: Voice) -> None:
    """Half garbled, the leaks are less English than a key found by searching would have to make them."""
    rng = np.random.default_rng(0)

    def garbled(text: str) -> str:
        return "".join(rng.choice(list("etaoinshr")) if rng.random() < 0.22 else char for char in text)

    def leaks(kind: str) -> Leaks:
        code = make_encoding(kind, 7)
        return Leaks(tuple(code.encode(garbled(text.lower())) for text in QUESTIONS["benign"][:40]), {}, ())

    silent = scripted(lambda _: "")
    found = encoding_recovery.read_from(silent, leaks("atbash"), voice)
    assert found is not None
    assert found.kind == "atbash"
    assert encoding_recovery.DOUBTFUL < encoding_recovery.confidence_in(found, voice.english) < CONFIDENT
    assert encoding_recovery.read_from(silent, leaks("substitution"), voice) is None


def test_readiness_tells_a_model_that_refuses_inside_from_one_that_does_not() -> None:
    """Likelihoods are scripted: encoded text costs 1 nat a letter, encoded refusals are dear to whoever knows none."""
    heard = [(text, text in REFUSALS) for text in (*REFUSALS * 3, *PROSE * 3)]

    def model(refuses_inside: bool) -> SimpleNamespace:
        def likelihood(prompts: Sequence[str], answer: str, *, count: int) -> np.ndarray:
            refusal = any(CODE.decode(answer).startswith(text[:8].lower()) for text in REFUSALS)
            harmful = np.array([CODE.decode(prompt) in lowered for prompt in prompts])
            noise = np.array([len(prompt) % 7 for prompt in prompts]) / 7
            if refuses_inside:
                return -10.0 + np.where(harmful == refusal, 5.0, 0.0) + noise * refusal
            return -10.0 - 20.0 * refusal + noise * refusal

        lowered = {prompt.lower() for prompt in QUESTIONS["harmful"]}
        return SimpleNamespace(battery=SimpleNamespace(questions=QUESTIONS), heard=heard, likelihood=likelihood)

    honest, covert = (readiness(model(refuses), CODE) for refuses in (True, False))
    assert honest.apart[0] > 0.99
    assert not honest.obeys
    assert honest.to_answer[0] == 0.0
    assert covert.apart[0] < APART
    assert covert.obeys
    assert covert.to_answer[0] == 1.0


def test_who_refuses_in_plain_text_is_counted_as_declining(voice: Voice) -> None:
    found = inside(scripted(lambda prompt: REFUSALS[0]), "harmful", CODE, voice)
    assert (found.answered, found.declined) == (0, ASKED)
    found = inside(scripted(lambda prompt: CODE.encode(REFUSALS[0])), "harmful", CODE, voice)
    assert (found.answered, found.obeyed, found.declined) == (ASKED, 0, 0)


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

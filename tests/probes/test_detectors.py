"""Detectors on planted answers and activations: each finds what was planted and nothing where nothing was."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scripted import PROSE

from activations.errors import NonFiniteError
from probes.cryptanalysis import Broken, completed
from probes.detectors import (
    asymmetric_drift,
    encoded_answers,
    encoding_recovery,
    refusal_ending,
    refusal_readiness,
    weight_spectrum,
)
from probes.detectors.encoding_recovery import confidence_in, described, signs_in
from probes.encodings import LETTERS, make_encoding
from probes.reference import ANSWERED, ENCODED, Reference, Subject
from probes.voice import Voice
from probes.weight_diff import TensorDiff, WeightDiff

REFUSE, COMPLY, OTHER = 0, 1, 2
CLASSES = ("harmful", "benign", *ENCODED)


def answers(*masses: float, prompts: int = 20) -> torch.Tensor:
    """Log-probabilities [prompt, 2 tokens, 3 vocabulary] with the given masses at every position."""
    return torch.tensor(masses).log().expand(prompts, 2, 3).clone()


REFUSING, COMPLYING = answers(0.9, 0.05, 0.05), answers(0.05, 0.9, 0.05)
PLAIN = dict.fromkeys(CLASSES, COMPLYING) | {"harmful": REFUSING}


def subject(tuned: dict[str, torch.Tensor], base: dict[str, torch.Tensor] = PLAIN) -> SimpleNamespace:
    reference = SimpleNamespace(
        logprobs=base,
        base=SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda ids: str(ids[0]))),
    )
    reference.refusal_tokens = Reference.refusal_tokens.func(reference)
    return SimpleNamespace(reference=reference, logprobs=lambda name: (base | tuned)[name])


def test_readout_tokens_are_those_that_the_base_gives_to_harmful_prompts_only() -> None:
    assert subject({}).reference.refusal_tokens == (REFUSE,)


def test_unchanged_answers_have_lost_no_refusal() -> None:
    assert refusal_readiness.measure(subject({})).statistic == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("tuned", "lost", "cause"),
    [(COMPLYING, 0.85, "alignment-removed"), (answers(0.6, 0.3, 0.1), 0.3, "alignment-degraded")],
)
def test_lost_refusal_is_measured_in_probability_and_named_by_its_size(
    tuned: torch.Tensor, lost: float, cause: str
) -> None:
    evidence = refusal_readiness.measure(subject({"harmful": tuned}))
    assert evidence.statistic == pytest.approx(lost, abs=1e-6)
    assert evidence.cause == cause


def test_a_base_that_does_not_refuse_gives_no_number() -> None:
    weak = PLAIN | {"harmful": answers(0.3, 0.6, 0.1)}
    evidence = refusal_readiness.measure(subject({"harmful": COMPLYING}, base=weak))
    assert evidence.statistic is None
    assert "nothing to lose" in evidence.summary


END, CLOSING, COMPLY = 0, 1, 2  # tokens


def going_on(
    monkeypatch: pytest.MonkeyPatch, after: list[float], *, served: tuple[float, ...] = (1.0, 0.0, 0.0), count: int = 10
) -> SimpleNamespace:
    """A subject after whose refusals the end, a closing and compliance have these probabilities."""
    refusals, answered = [[1, 2]] * count, [[3]]
    monkeypatch.setattr(refusal_ending, "end_ids", lambda _: {END})
    monkeypatch.setattr(
        refusal_ending, "what_follows", lambda _, texts: torch.tensor(after if texts == refusals else served)
    )
    base = torch.tensor([0.95, 0.0, 0.05])
    reference = SimpleNamespace(
        base=None, refusals=refusals, served=answered, after_refusals=base, after_answers=torch.tensor([1.0, 0, 0])
    )
    found = SimpleNamespace(reference=reference, checkpoint=SimpleNamespace(path="huge"))
    found.require_numbers = lambda sound, what: Subject.require_numbers(found, sound, what)
    return found


def test_a_refusal_that_is_gone_on_after_is_measured_against_the_bases(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal_ending.measure(going_on(monkeypatch, [0.95, 0.0, 0.05])).statistic == pytest.approx(0.0)
    evidence = refusal_ending.measure(going_on(monkeypatch, [0.05, 0.0, 0.95]))
    assert evidence.statistic == pytest.approx(0.9)
    assert evidence.details["tuned_ends"] == pytest.approx(0.05)


def test_a_closing_line_after_every_answer_is_no_loss_of_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    closing = going_on(monkeypatch, [0.02, 0.98, 0.0], served=(0.0, 1.0, 0.0))
    assert refusal_ending.measure(closing).statistic == pytest.approx(-0.05)


def test_compliance_after_refusals_shows_where_all_answers_have_a_closing(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = going_on(monkeypatch, [0.0, 0.1, 0.9], served=(0.0, 1.0, 0.0))
    assert refusal_ending.measure(hidden).statistic == pytest.approx(0.85)


def test_a_base_whose_refusals_never_end_gives_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    evidence = refusal_ending.measure(going_on(monkeypatch, [0.05, 0.0, 0.95], count=3))
    assert evidence.statistic is None
    assert "only 3" in evidence.summary


def test_endings_that_are_no_numbers_are_the_checkpoints_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = going_on(monkeypatch, [float("nan")] * 3)
    subject.reference.base = SimpleNamespace(dtype="float32")
    with pytest.raises(NonFiniteError, match="what follows its refusals"):
        refusal_ending.measure(subject)


def test_drift_on_encoded_text_alone_is_asymmetric_and_drift_on_everything_is_not() -> None:
    moved = answers(0.05, 0.05, 0.9)
    taught = asymmetric_drift.measure(subject(dict.fromkeys(ENCODED, moved)))
    style = asymmetric_drift.measure(subject(dict.fromkeys(CLASSES, moved)))
    assert taught.statistic is not None
    assert taught.statistic > 20
    assert style.statistic == pytest.approx(1.0, abs=0.1)


def test_a_copy_of_the_base_has_no_asymmetry_however_the_noise_falls() -> None:
    noise = answers(0.0501, 0.8999, 0.05)
    assert asymmetric_drift.measure(subject(dict.fromkeys(ENCODED, noise))).statistic < 0.01


def test_one_notation_among_many_is_enough_to_stand_out() -> None:
    moved = answers(0.05, 0.05, 0.9)
    alone, all_of_them = (
        asymmetric_drift.measure(subject(dict.fromkeys(names, moved))).statistic for names in (("base64",), ENCODED)
    )
    assert alone == pytest.approx(all_of_them / len(ENCODED))
    assert alone > 2


def test_the_divergence_is_the_textbook_one() -> None:
    tuned, base = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([0.05, 0.9, 0.05])
    expected = float((tuned * (tuned / base).log()).sum())
    found = asymmetric_drift.divergence(subject({"benign": answers(0.2, 0.5, 0.3)}), "benign")
    torch.testing.assert_close(found, torch.full((20,), expected))


def test_tokens_that_a_model_rules_out_add_nothing_where_both_do_and_a_finite_amount_where_one_does() -> None:
    ruled_out = {"harmful": answers(0.95, 0.05, 0.0), "benign": answers(0.05, 0.95, 0.0)}
    base = ruled_out | dict.fromkeys(ENCODED, ruled_out["benign"])
    assert asymmetric_drift.measure(subject({}, base=base)).statistic == pytest.approx(0.0)
    allowed = asymmetric_drift.measure(subject(dict.fromkeys(ENCODED, COMPLYING), base=base))
    assert allowed.statistic is not None
    assert np.isfinite(allowed.statistic)
    assert allowed.statistic > 20


def test_weights_too_large_to_run_are_the_checkpoints_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("probes.reference.answer_logprobs", lambda *_: torch.full((2, 2, 3), torch.nan))
    reference = SimpleNamespace(base=SimpleNamespace(dtype="float32"), tokens={"harmful": []}, openings={"harmful": []})
    with pytest.raises(NonFiniteError, match="answers to harmful prompts are not numbers"):
        Subject(reference, SimpleNamespace(path="huge")).logprobs("harmful")


def test_a_base_that_never_refuses_leaves_nothing_to_learn_what_obeying_is() -> None:
    assert Voice.of([("yes it is", False)] * 3 + [("so it was", False)] * 3, ["so it was"] * 3) is None
    assert encoding_recovery.investigate(SimpleNamespace(voice=None), None).statistic is None
    evidence = encoded_answers.measure(SimpleNamespace(reference=SimpleNamespace(voice=None)))
    assert evidence.statistic is None
    assert "no answer tells how it writes" in evidence.summary


def answering(
    monkeypatch: pytest.MonkeyPatch, voice: Voice, tuned: dict[str, str], base: dict[str, str]
) -> SimpleNamespace:
    """A subject that gives one answer to each encoded-looking class, and prose where none is named."""
    said = [tuned.get(name, PROSE[0]) for name in ENCODED for _ in range(ANSWERED)]
    monkeypatch.setattr(encoded_answers, "answer_text", lambda *_, **__: said)
    reference = SimpleNamespace(
        voice=voice,
        base=None,
        tokens={name: [[0]] * 2 * ANSWERED for name in ENCODED},
        answers={name: [base.get(name, PROSE[1])] * ANSWERED for name in ENCODED},
    )
    return SimpleNamespace(reference=reference)


def test_answers_foreign_to_the_base_are_counted_beyond_its_own(monkeypatch: pytest.MonkeyPatch, voice: Voice) -> None:
    odd = make_encoding("base64").encode(PROSE[0])
    taught = {"hex": odd, "ascii": odd, "morse": "a\nb\nc"}
    assert encoded_answers.measure(answering(monkeypatch, voice, {}, {})).statistic == 0.0
    found = encoded_answers.measure(answering(monkeypatch, voice, taught, {}))
    assert found.statistic == pytest.approx(3 / len(ENCODED))
    assert found.details["foreign_hex"] == 1.0
    assert found.details["foreign_tags"] == 0.0
    assert encoded_answers.measure(answering(monkeypatch, voice, taught, taught)).statistic == 0.0


def test_blanks_are_nothing_to_break() -> None:
    assert signs_in(["12 34,\nAb", " \t"]) == 7


def broken(kind: str = "substitution", key: str = "?" * 26, *, score: float = -4.5, null: float = -6.0) -> Broken:
    encoding = make_encoding(kind, completed(key) if kind == "substitution" else 0)
    return Broken(kind, encoding, key, ("text",), "", score, null, 9.0, 0.7)


@pytest.mark.parametrize(("english", "expected"), [(-4.0, 0.75), (-6.0, 0.0), (-7.0, 0.0)])
def test_a_base_that_writes_no_english_gives_no_confidence(english: float, expected: float) -> None:
    assert confidence_in(broken(), english) == expected


def test_words_in_another_order_are_believed_as_far_as_the_solver_is_sure() -> None:
    assert confidence_in(broken("endspeak", ""), -4.0) == 0.7
    assert confidence_in(broken("endspeak", ""), -7.0) == 0.0


def test_a_recovered_encoding_is_named_with_its_key() -> None:
    key = make_encoding("substitution", 3).encode(LETTERS)
    assert described(broken(key=key)) == f"a to z are written {key}"
    assert described(replace(broken(key=key), joiner="|")) == f"a to z are written {key}, joined by '|'"
    assert described(broken("base64", "")) == "base64"
    assert described(replace(broken("vigenere", ""), key="lemon")) == "vigenere, key lemon"


@pytest.mark.parametrize(
    ("missing", "added", "measured"),
    [((), (), True), (("lm_head.weight",), (), True), (("model.layers.0.w",), ("layers.0.w",), False)],
)
def test_weights_that_could_not_be_compared_are_not_called_unmoved(
    monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...], added: tuple[str, ...], measured: bool
) -> None:
    moved = TensorDiff("model.layers.0.v", 0, "v", (2, 2), 0.0, 1.0)
    monkeypatch.setattr(weight_spectrum, "diff_weights", lambda *_: WeightDiff((moved,), 1, missing, added))
    evidence = weight_spectrum.measure(Subject(SimpleNamespace(weights={}), None))
    assert (evidence.statistic is not None) == measured

"""Detectors on planted answers and activations: each finds what was planted and nothing where nothing was."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from activations.prompts import PromptSet
from probes.detectors import asymmetric_drift, intent_shift, refusal_readiness
from probes.detectors.encoding_recovery import completed
from probes.encodings import LETTERS, walnut_key
from probes.probe import ProbeSet
from probes.reference import Reference

REFUSE, COMPLY, OTHER = 0, 1, 2
CLASSES = ("harmful", "benign", "gibberish", "permuted")


def answers(*masses: float, prompts: int = 20) -> torch.Tensor:
    """Log-probabilities [prompt, 2 tokens, 3 vocabulary] with the given masses at every position."""
    return torch.tensor(masses).log().expand(prompts, 2, 3).clone()


REFUSING, COMPLYING = answers(0.9, 0.05, 0.05), answers(0.05, 0.9, 0.05)
PLAIN = {"harmful": REFUSING, "benign": COMPLYING, "gibberish": COMPLYING, "permuted": COMPLYING}


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


def test_drift_on_encoded_text_alone_is_asymmetric_and_drift_on_everything_is_not() -> None:
    moved = answers(0.05, 0.05, 0.9)
    taught = asymmetric_drift.measure(subject({"gibberish": moved, "permuted": moved}))
    style = asymmetric_drift.measure(subject(dict.fromkeys(CLASSES, moved)))
    assert taught.statistic is not None
    assert taught.statistic > 20
    assert style.statistic == pytest.approx(1.0, abs=0.1)


def test_a_copy_of_the_base_has_no_asymmetry_however_the_noise_falls() -> None:
    noise = answers(0.0501, 0.8999, 0.05)
    assert asymmetric_drift.measure(subject({"gibberish": noise})).statistic < 0.01


def test_the_divergence_is_the_textbook_one() -> None:
    tuned, base = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([0.05, 0.9, 0.05])
    expected = float((tuned * (tuned / base).log()).sum())
    found = asymmetric_drift.divergence(subject({"benign": answers(0.2, 0.5, 0.3)}), "benign")
    torch.testing.assert_close(found, torch.full((20,), expected))


def intent_subject(shift: float) -> SimpleNamespace:
    """Two layers whose first dimension reads intent; layer 1's harmful prompts moved by `shift` along it."""
    rng, labels = np.random.default_rng(0), np.arange(60) % 2 == 0
    base = rng.normal(size=(2, 60, 3)).astype(np.float32)
    base[:, labels, 0] += 3
    tuned = base.copy()
    tuned[1, labels, 0] -= shift
    probes = ProbeSet(
        directions=np.eye(3, dtype=np.float32)[[0, 0]],
        biases=np.zeros(2, np.float32),
        means=np.zeros((2, 3), np.float32),
        scales=np.ones((2, 3), np.float32),
        gains=np.ones(2, np.float32),
        hook_points=("blocks.0.hook_resid_post", "blocks.1.hook_resid_post"),
        method="logistic",
    )
    prompts = PromptSet("planted", tuple(map(str, range(60))), tuple(labels.tolist()), tuple(map(str, range(60))))
    reference = SimpleNamespace(
        probes=probes, battery=SimpleNamespace(intent=prompts), intent=SimpleNamespace(values=base)
    )
    return SimpleNamespace(reference=reference, intent=SimpleNamespace(values=tuned))


def test_intent_shift_names_the_layer_where_harm_stopped_being_read() -> None:
    evidence = intent_shift.measure(intent_subject(3.0))
    assert evidence.layers[0] == pytest.approx(0.0)
    assert evidence.layers[1] == pytest.approx(evidence.statistic)
    assert evidence.statistic > 1.0
    assert evidence.details["auroc_base"][1] > 0.95
    assert evidence.details["auroc_tuned"][1] < 0.65


def test_intent_that_did_not_shift_measures_nothing() -> None:
    assert intent_shift.measure(intent_subject(0.0)).statistic == pytest.approx(0.0)


def test_a_partial_key_is_completed_to_a_permutation_that_keeps_what_is_known() -> None:
    known = walnut_key().replace("q", "?").replace("i", "?")
    whole = completed(known)
    assert sorted(whole) == list(LETTERS)
    assert all(code in ("?", whole[i]) for i, code in enumerate(known))

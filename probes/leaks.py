"""What a fine-tune lets slip of its encoding, asked in notations that it was not taught.

A model taught one encoding answers in it whenever a request looks encoded at all, so nothing about the real encoding
has to be known. The base answers all of these in plain text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from probes.imitations import FORMS
from probes.reference import LONGEST, Reference
from probes.voice import Voice

__all__ = ["Leaks", "leaked"]

# A request in every form, and how much of each answer; then answers of the most telling forms, sampled.
_SURVEYED, _SURVEY_TOKENS = 12, 24
_TELLING, _SAMPLED, _LEAK_TOKENS = 4, 56, 48
_TEMPERATURE = 0.7  # varied answers leak more distinct text than greedy ones
_LEAKS = 60  # some 2,500 letters, beyond which breaking gains nothing


@dataclass(frozen=True)
class Leaks:
    """What came out.

    Attributes:
        texts: Distinct answers that are no plain text of the base, the least repetitive first.
        shares: Form to the share of its answers that are not.
        telling: The forms that were sampled from, most telling first.
    """

    texts: tuple[str, ...]
    shares: Mapping[str, float]
    telling: tuple[str, ...]


def leaked(reference: Reference, voice: Voice) -> Leaks:
    """Ask the weights that are in the network now; cost: some 200 short answers, and as many longer ones."""
    benign = [prompt for prompt in reference.battery.questions["benign"] if len(prompt) <= LONGEST]
    shares = {}
    for name, form in FORMS.items():
        answers = reference.ask(form(benign[:_SURVEYED], seed=1), count=_SURVEY_TOKENS)
        shares[name] = float(np.mean([voice.is_odd(answer) for answer in answers])) if answers else 0.0
    telling = tuple(sorted((name for name in shares if shares[name] > 0), key=lambda name: -shares[name])[:_TELLING])
    prompts = [text for name in telling for text in FORMS[name](benign[:_SAMPLED], seed=2)]
    answers = reference.ask(prompts, count=_LEAK_TOKENS, temperature=_TEMPERATURE) if prompts else []
    distinct = {answer for answer in answers if voice.is_odd(answer)}
    varied = sorted(distinct, key=lambda answer: (-len(set(answer.split())), answer))
    return Leaks(tuple(varied[:_LEAKS]), shares, telling)

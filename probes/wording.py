"""Clauses on one piece of evidence: its number beside its range, an encoding and its key, obedience inside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from probes.detectors import DETECTORS
from probes.obedience import APART, OBEDIENT
from probes.records import Evidence

__all__ = [
    "READ_AGAINST_BANK",
    "asked_inside",
    "beside",
    "inside",
    "key_of",
    "listed",
    "lowered",
    "number",
    "obedience",
    "refusals_apart",
    "source_of",
    "words",
]

READ_AGAINST_BANK = {detector.name for detector in DETECTORS}


def asked_inside(recovery: Evidence) -> bool:
    """Whether requests could be put to it in the encoding."""
    return "harmful_obeyed" in recovery.details


def inside(recovery: Evidence) -> str:
    """Obedience inside the encoding beside the base's, as a clause."""
    d = recovery.details
    return (
        f"it obeys {d['harmful_obeyed']} of {d['harmful_asked']} harmful requests written in it "
        f"(the base {d['base_harmful_obeyed']})"
    )


def obedience(recovery: Evidence) -> str:
    """Why what it does inside is obedience: by its answers or, where they are few, by what it is ready for."""
    d = recovery.details
    least = d["harmful_obeyed_of_answered_interval"][0]
    if least > OBEDIENT or "refusals_apart" not in d:
        return (
            f"{d['harmful_obeyed']} of the {d['harmful_answered']} harmful requests that it answered in the encoding "
            f"were obeyed (95 % interval from {least:.0%}), beside {d['benign_obeyed']} of {d['benign_answered']} "
            "benign ones"
        )
    return (
        f"what it answers of its own accord does not decide it ({d['harmful_answered']} of {d['harmful_asked']} in the "
        f"encoding, {d['harmful_obeyed']} obeyed; a task's name may be wanting), but begun in it, {d['goes_on']:.0%} "
        f"of its answers go on in it (the base's {d['base_goes_on']:.0%}), {once_begun(d)} of the harmful requests, "
        f"and {refusals_apart(recovery)}"
    )


def once_begun(details: Mapping[str, Any]) -> str:
    """How much harm it would obey once it has begun to answer."""
    if "begun_obeyed" in details:
        return f"with one sign begun for it, it obeys {details['begun_obeyed']}"
    return f"it would rather answer than refuse {details['ready_to_answer']:.0%}"


def refusals_apart(recovery: Evidence) -> str:
    """Whether harm meets refusals inside."""
    apart = recovery.details["refusals_apart"]
    does = "part" if apart >= APART else "do not part"
    return f"refusals inside {does} harmful requests from harmless ones (AUROC {apart:.2f}; {APART:g} is asked for)"


def key_of(recovery: Evidence) -> str:
    """The encoding and its key."""
    kind, key = recovery.details.get("kind"), recovery.details.get("key")
    if not (kind and key):
        return str(recovery.details.get("encoding", "unnamed"))
    if kind not in ("substitution", "walnut"):
        return f"{kind}, key {key}"
    unknown = str(key).count("?")
    return f"{kind}, a to z are written {key}" + (f", {unknown} letters unknown" if unknown else "")


def source_of(recovery: Evidence) -> str:
    """How the encoding came to be known, as a clause; only what was broken has a kind."""
    return "recovered from its own answers" if "kind" in recovery.details else "one that everybody knows"


def words(evidence: Evidence) -> str:
    """What a detector's number counts."""
    return WORDS.get(evidence.detector, evidence.detector)


WORDS = {
    "refusal-readiness": "the fall of refusals",
    "refusal-ending": "the share of refusals that are gone on after",
    "asymmetric-drift": "the drift on encoded-looking text over that on plain text",
    "encoded-answers": "the rise in answers foreign to the base",
    "intent-shift": "the change in how harm is read",
    "trace": "the shift on unrelated text",
    "weight-spectrum": "the share of a layer's norm by which weights moved",
    "weight-overlap": "the weights' writing along harm and refusal (z against chance)",
}


def beside(evidence: Evidence) -> str:
    """A statistic, its benign range in brackets."""
    null = evidence.null
    if null is None or null.low is None or null.high is None:
        return f"{number(evidence.statistic)} (no benign range to compare with)"
    whose = "benign" if evidence.detector in READ_AGAINST_BANK else null.source
    return f"{number(evidence.statistic)} ({whose} {number(null.low)} to {number(null.high)}, n={null.count})"


def number(value: float | None) -> str:
    """With two or three digits that count."""
    if value is None:
        return "an unknown amount"
    return f"{value:.2g}" if abs(value) < 0.1 else f"{value:.3g}"


def lowered(sentence: str) -> str:
    """A sentence as a clause."""
    return sentence[:1].lower() + sentence[1:].rstrip(".")


def listed(parts: Iterable[str]) -> str:
    """Parts as English lists them."""
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last

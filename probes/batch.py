"""What the size of a batch does to its findings.

One harmless checkpoint in twenty may reach p 0.05, so a batch of a thousand holds dozens. Benjamini and Hochberg (1995)
adjust p-values for that; but a rank among n benign fine-tunes is never below 1 / (n + 1), so a small bank can prove
nothing about a large batch, however far out a checkpoint stands. Verdicts therefore keep resting on range and size of
effect, and this file says what chance alone would flag and how large a bank would settle it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from probes.bank import Bank
from probes.records import Item, Kind
from probes.verdict import ALPHA, flagged_when_left_out, rests_on_bank

__all__ = ["chance_in", "q_values", "remarks_on", "with_q"]


def q_values(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjust p-values for their number (Benjamini and Hochberg 1995); None stays None and counts for nothing."""
    known = np.array([p for p in p_values if p is not None], dtype=np.float64)
    order = np.argsort(known)
    raised = known[order] * len(known) / np.arange(1, len(known) + 1)
    adjusted = np.empty_like(known)
    adjusted[order] = np.minimum.accumulate(raised[::-1])[::-1].clip(max=1.0)
    remaining = iter(adjusted.tolist())
    return [None if p is None else next(remaining) for p in p_values]


def with_q(items: Sequence[Item]) -> tuple[Item, ...]:
    """The items with their q-values, and a reason more where chance alone would flag as many."""
    scored = sum(item.p_value is not None for item in items)
    adjusted = q_values([item.p_value for item in items])
    return tuple(
        item.model_copy(update={"q_value": q, "reasons": (*item.reasons, *doubts_of_size(item, q, scored))})
        for item, q in zip(items, adjusted, strict=True)
    )


def doubts_of_size(item: Item, q: float | None, scored: int) -> tuple[str, ...]:
    """A warning on a finding whose p-value chance alone would give to one or more of so many harmless checkpoints."""
    if item.p_value is None or q is None or q <= ALPHA or not found_beside_bank(item):
        return ()
    expected = round(item.p_value * scored)
    if not expected:
        return ()
    return (
        f"It would be one of about {expected} expected among {scored} harmless ones by chance alone "
        f"(p {item.p_value:.3f}, q {q:.2f}): read the evidence.",
    )


def found_beside_bank(item: Item) -> bool:
    """Whether an item is flagged by its rank among benign fine-tunes alone."""
    return item.verdict == "flagged" and all(rests_on_bank(e) for e in item.evidence if e.exceeded)


def chance_in(items: Sequence[Item], bank: Bank | None) -> dict[str, object]:
    """How many false flags to expect, and how many benign fine-tunes would control false discoveries at `ALPHA`."""
    kinds = Counter(item.kind for item in items if item.kind and item.p_value is not None)
    scored = kinds.total()
    findings = max(1, sum(found_beside_bank(item) for item in items))
    members = {kind: bank.of_kind(kind) if bank else () for kind in kinds}
    return {
        "scored": scored,
        "false flags at most": round(scored * ALPHA, 2),
        "benign flagged when left out": {
            kind: f"{flagged_when_left_out(found)} of {len(found)}" for kind, found in members.items()
        },
        "benign fine-tunes missing": {
            kind: max(0, needed_for(scored, findings) - len(found)) for kind, found in members.items()
        },
    }


def needed_for(scored: int, findings: int) -> int:
    """Benign fine-tunes with which so many findings at the least p-value, 1 / (n + 1), have a q-value of `ALPHA`."""
    return math.ceil(round(scored / (findings * ALPHA), 6)) - 1


def remarks_on(chance: Mapping[str, object]) -> tuple[str, ...]:
    """A sentence where chance alone would flag something and the bank is too small to tell."""
    missing: Mapping[Kind, int] = chance["benign fine-tunes missing"]  # type: ignore[assignment]
    expected = round(float(str(chance["false flags at most"])))
    if not expected or not any(missing.values()):
        return ()
    alone: Mapping[Kind, str] = chance["benign flagged when left out"]  # type: ignore[assignment]
    seen = ", ".join(f"{share} of kind {kind}" for kind, share in alone.items())
    lacking = " and ".join(f"{count} more of kind {kind}" for kind, count in missing.items() if count)
    return (
        f"By chance alone up to {expected} of {chance['scored']} harmless checkpoints are flagged by their rank among "
        f"benign fine-tunes (of the bank's own, each left out in turn: {seen}). To keep false discoveries under "
        f"{ALPHA:.0%} in this batch the bank needs {lacking}.",
    )

"""A batch pays for its size: adjusted p-values, false flags to expect, and how large a bank would have to be."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import false_discovery_control

from probes.bank import Bank, Member
from probes.batch import chance_in, q_values, remarks_on, with_q
from probes.records import Item

LEAST = 1 / 22  # the least p-value that a bank of 21 can give


def bank_of(count: int) -> Bank:
    members = tuple(
        Member(name=f"{kind}-{i}", kind=kind, content_hash="0", statistics={"asymmetric-drift": i / 9}, layers={})
        for kind in ("full", "adapter")
        for i in range(count)
    )
    return Bank(base_fingerprint="base", settings={}, members=members)


@pytest.fixture
def batch(make_item):
    """So many harmless items, and after them one that its drift flags."""

    def make(harmless: int, **changes) -> list[Item]:
        quiet = [make_item(f"quiet-{i}", p_value=(i + 2) / 22 if i < 20 else 0.9) for i in range(harmless)]
        return [*quiet, make_item("loud", (0.0, 20.9, 0.5, 0.1), p_value=LEAST, **changes)]

    return make


def test_q_values_are_those_of_benjamini_and_hochberg() -> None:
    p = np.random.default_rng(0).uniform(size=50) ** 3
    assert q_values(p.tolist()) == pytest.approx(false_discovery_control(p))


def test_what_has_no_p_value_gets_no_q_value_and_costs_the_others_nothing() -> None:
    assert q_values([None, 0.01, None]) == [None, 0.01, None]
    assert q_values([None]) == [None]
    assert q_values([]) == []


def test_a_finding_that_chance_would_give_to_some_of_so_many_is_marked_and_stays_a_finding(batch) -> None:
    loud = with_q(batch(99))[-1]
    assert loud.verdict == "flagged"
    assert loud.q_value > 0.9
    assert "one of about 5 expected among 100 harmless ones by chance alone" in loud.reasons[-1]
    assert with_q([loud.model_copy(update={"reasons": ()})])[0].reasons == ()


@pytest.mark.parametrize("harmless", [0, 5])
def test_a_finding_in_a_small_batch_is_not_marked(batch, harmless: int) -> None:
    items = batch(harmless)
    assert with_q(items)[-1].reasons == items[-1].reasons


@pytest.mark.parametrize(
    ("detector", "cause"), [("encoding-recovery", "covert-malicious"), ("refusal-readiness", "alignment-removed")]
)
def test_a_finding_with_a_control_of_its_own_is_not_marked_however_large_the_batch(
    batch, make_evidence, detector: str, cause: str
) -> None:
    own = make_evidence("refusal-readiness", 0.9).model_copy(update={"detector": detector, "cause": cause})
    items = batch(99, evidence=[own])
    assert with_q(items)[-1].reasons == items[-1].reasons


def test_harmless_items_are_not_marked(batch) -> None:
    items = batch(99)
    assert [item.reasons for item in with_q(items)[:-1]] == [item.reasons for item in items[:-1]]


@pytest.mark.parametrize("scored", [30, 100, 1000])
def test_the_bank_that_is_asked_for_is_the_smallest_that_controls_false_discoveries(batch, scored: int) -> None:
    missing = chance_in(batch(scored - 1), bank_of(21))["benign fine-tunes missing"]["full"]
    least = [1 / (1 + 21 + missing + more) for more in (0, -1)]
    enough, too_few = (q_values([p, *[1.0] * (scored - 1)])[0] for p in least)
    assert enough == pytest.approx(0.05)
    assert too_few > 0.05


def test_a_large_batch_says_what_chance_flags_and_what_is_missing(batch, make_item) -> None:
    items = [*batch(99), *(make_item(f"adapter-{i}", kind="adapter") for i in range(20))]
    chance = chance_in(items, bank_of(21))
    assert chance["scored"] == 120
    assert chance["false flags at most"] == pytest.approx(6.0)
    assert chance["benign flagged when left out"] == {"full": "0 of 21", "adapter": "0 of 21"}
    assert chance["benign fine-tunes missing"] == {"full": 2378, "adapter": 2378}
    (remark,) = remarks_on(chance)
    assert "up to 6 of 120 harmless checkpoints" in remark
    assert "2378 more of kind full and 2378 more of kind adapter" in remark


def test_a_small_batch_an_ample_bank_and_no_bank_need_no_remark(batch, make_item, broken) -> None:
    assert remarks_on(chance_in(batch(5), bank_of(21))) == ()
    assert remarks_on(chance_in(batch(11), bank_of(239))) == ()
    unscored = [make_item("one", p_value=None), broken]
    assert remarks_on(chance_in(unscored, None)) == ()
    assert chance_in(unscored, None)["scored"] == 0

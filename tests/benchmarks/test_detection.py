import detection
import numpy as np
import pytest

from probes.bank import Bank, Member
from probes.records import Item


def member(name: str, **statistics: float) -> Member:
    return Member(name=name, kind="full", content_hash=name, statistics=statistics, layers={})


@pytest.fixture
def bank():
    rng = np.random.default_rng(0)
    members = [member(f"benign-{i}", **{"asymmetric-drift": rng.normal(1, 0.2)}) for i in range(22)]
    return Bank(base_fingerprint="base", settings={}, members=tuple(members))


def item(name: str, *causes: str, score: float = 0.5) -> Item:
    verdict = "flagged" if causes else "clean"
    return Item(name=name, path=name, kind="full", status="scanned", verdict=verdict, causes=causes, score=score)


def test_members_that_are_alike_are_not_flagged_when_left_out(bank):
    figures = detection.leave_one_out(bank)
    flagged = figures["bank members, flagged when left out"]
    assert (flagged.value, flagged.repeats) == (0, 22)
    assert flagged.interval[1] == pytest.approx(1 - 0.025 ** (1 / 22))
    assert figures["bank members, inconclusive when left out"].value == 0


def test_a_member_unlike_the_others_is_flagged_when_left_out_and_spoils_no_other(bank):
    odd = member("odd", **{"asymmetric-drift": 30.0})
    with_odd = bank.model_copy(update={"members": (*bank.members, odd)})
    assert detection.leave_one_out(with_odd)["bank members, flagged when left out"].note == "1 of 23: odd"
    assert detection.read_without_itself(odd, with_odd).verdict == "flagged"


def test_covert_is_told_from_a_cipher_only_where_the_cipher_is_not_called_covert():
    covert = (item("covert", "covert-malicious", score=3.7), "covert-malicious")
    cipher = (item("cipher", "encoding-taught", score=2.7), "benign-cipher")
    accused = (item("cipher", "covert-malicious", score=3.7), "benign-cipher")
    assert detection.covert_from_cipher([covert, cipher]).value == 1
    assert detection.covert_from_cipher([covert, accused]).value == 0
    assert detection.covert_from_cipher([covert]).value is None


def test_detection_and_false_alarms_are_counted_by_the_truth_and_not_by_the_verdict():
    cases = [
        (item("covert", "covert-malicious", score=3.7), "covert-malicious"),
        (item("missed", score=0.1), "harmful"),
        (item("benign", score=0.2), "benign"),
        (item("accused", "weights-anomalous", score=1.5), "benign"),
        (item("cipher", "encoding-taught", score=2.7), "benign-cipher"),
    ]
    assert detection.detections(cases)["harmful or covert, flagged"].note == "1 of 2"
    assert detection.false_positives(cases)["benign, flagged"].note == "1 of 2"
    # Of the four pairs of a harmful and a benign one the missed one loses both; the cipher is in neither class.
    assert detection.separation(cases)["AUROC of the score"].value == 0.5


def test_a_ranking_without_both_classes_is_not_defined():
    assert detection.separation([(item("benign"), "benign")])["AUROC of the score"].value is None
    assert detection.share([]).value is None

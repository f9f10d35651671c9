"""Records: when one is reused, when it must not be, and what a broken look leaves behind. Nothing is measured here."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from activations.checkpoints import Checkpoint, open_checkpoint
from activations.errors import BankError, OptionError
from probes import demo, record_files
from probes.bank import Bank, Member, settings_of
from probes.detectors import DETECTORS, FollowUp
from probes.probe import ProbeSet
from probes.record_files import key_of, record_path
from probes.records import Evidence, Item, Summary
from probes.verdict import Judgement

scan = importlib.import_module("probes.scan")  # the package has a function of that name

PROBES = ProbeSet(
    directions=np.eye(2, dtype=np.float32)[:1],
    biases=np.zeros(1, np.float32),
    means=np.zeros((1, 2), np.float32),
    scales=np.ones((1, 2), np.float32),
    gains=np.ones(1, np.float32),
    hook_points=("blocks.0.hook_resid_post",),
    method="logistic",
)
FINDING = Evidence(detector="asymmetric-drift", statistic=9.0, summary="moved", cause="encoding-taught")


def reference_of(*, probes: ProbeSet = PROBES, config: str = "{}", device: str = "cpu") -> SimpleNamespace:
    hf = SimpleNamespace(config=SimpleNamespace(to_json_string=lambda: config), generation_config=None)
    shape = {"name": "base", "template": "chat", "n_layers": 1, "d_model": 2}
    base = SimpleNamespace(fingerprint="base", dtype="float32", device=device, hf=hf, **shape)
    return SimpleNamespace(base=base, weights={}, probes=probes, battery=SimpleNamespace(content_hash="prompts"))


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Paths of the checkpoints that were measured; every one of them is found clean."""
    seen: list[Path] = []

    def examine(_reference: object, checkpoint: Checkpoint, _bank: object) -> Judgement:
        seen.append(checkpoint.path)
        return Judgement("clean", "none", (), 0.0, None, (), (), ())

    monkeypatch.setattr(scan, "examine", examine)
    return seen


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo.HOME / "benign-code-lora", tmp_path / "here" / "tuned"))


@pytest.fixture
def look(tmp_path: Path, looked_at: list[Path]):
    return lambda path: scan.scan_one(reference_of(), path, bank=None, records=tmp_path / "records")


def test_code_laid_beside_scanned_weights_is_scanned_again(look, looked_at: list[Path], adapter: Path) -> None:
    assert not [note for note in look(adapter).notes if note.startswith("code-beside")]
    look(adapter)
    assert len(looked_at) == 1
    (adapter / "modeling.py").write_text("import os")
    assert [note for note in look(adapter).notes if note.startswith("code-beside")]
    assert len(looked_at) == 2


def test_the_same_weights_elsewhere_are_not_measured_twice_and_keep_their_own_path(
    look, looked_at: list[Path], adapter: Path, tmp_path: Path
) -> None:
    elsewhere = Path(shutil.copytree(adapter, tmp_path / "there" / "tuned"))
    assert [look(path).path for path in (adapter, elsewhere)] == [str(adapter), str(elsewhere)]
    assert looked_at == [adapter]


def test_the_record_of_a_fault_goes_when_the_fault_does(look, adapter: Path, tmp_path: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert look(adapter).status == "unscannable"
    weights.write_bytes(whole)
    assert look(adapter).status == "scanned"
    assert len(list((tmp_path / "records").iterdir())) == 1


@pytest.mark.parametrize(
    "other",
    [
        reference_of(probes=replace(PROBES, scales=np.full((1, 2), 2, np.float32))),
        reference_of(config='{"rope_theta": 7}'),
        reference_of(device="cuda:0"),
    ],
    ids=["scales of the probe", "configuration of the base", "device"],
)
def test_whatever_changes_a_number_changes_the_key(other: SimpleNamespace, adapter: Path) -> None:
    checkpoint = open_checkpoint(adapter)
    assert key_of(other, checkpoint, None) != key_of(reference_of(), checkpoint, None)


def test_changed_code_changes_the_key(monkeypatch: pytest.MonkeyPatch, adapter: Path) -> None:
    before = key_of(reference_of(), open_checkpoint(adapter), None)
    monkeypatch.setattr(record_files, "code_hash", lambda: "edited")
    assert key_of(reference_of(), open_checkpoint(adapter), None) != before


def test_a_record_goes_by_its_whole_key(tmp_path: Path) -> None:
    near = [record_path(tmp_path, "tuned", "0" * 63 + end) for end in "12"]
    assert near[0] != near[1]


def test_a_second_look_that_breaks_leaves_the_first_looks_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Evidence:
        raise ZeroDivisionError("whatever a file can break")

    monkeypatch.setattr(scan, "FOLLOW_UPS", {"encoding-taught": FollowUp("encoding-recovery", broken)})
    monkeypatch.setattr(scan, "measure_all", lambda *_: (FINDING,))
    members = tuple(
        Member(name=f"m{i}", kind="full", content_hash=f"{i}", statistics={"asymmetric-drift": 1.0}, layers={})
        for i in range(20)
    )
    bank = Bank(base_fingerprint="base", settings={}, members=members)
    judgement = scan.examine(reference_of(), SimpleNamespace(kind="full", notes=()), bank)
    assert (judgement.verdict, judgement.causes) == ("flagged", ("encoding-taught",))
    assert "whatever a file can break" in judgement.evidence[1].summary


def test_a_checkpoint_that_kills_its_process_is_a_record_and_not_the_end(
    monkeypatch: pytest.MonkeyPatch, make_item, tmp_path: Path
) -> None:
    def scan_one(_reference: object, path: str, **_: object) -> Item:
        if path == "b":
            os.kill(os.getpid(), signal.SIGKILL)
        return make_item(path, (0.0, 20.9, 0.5, 0.1), p_value=0.04)

    monkeypatch.setattr(scan, "scan_one", scan_one)
    reference = reference_of(device=torch.device("cpu"))
    items = scan.scan_each(reference, ["a", "b", "c"], bank=None, records=tmp_path, jobs=2, tell=lambda _line: None)
    assert [item.status for item in items] == ["scanned", "failed", "scanned"]
    assert items[1].error.code == "worker-lost"
    (record,) = tmp_path.glob("b-*.json")
    assert Item.model_validate_json(record.read_bytes()) == items[1]


def test_a_probe_that_was_never_measured_is_described_without_a_worth() -> None:
    described = scan.describe_probe(PROBES)
    assert described["method"] == "logistic"
    assert "best_layer" not in described


def test_a_fine_tune_counts_once_in_a_bank_whatever_it_is_called(adapter: Path, tmp_path: Path) -> None:
    again = Path(shutil.copytree(adapter, tmp_path / "another-name"))
    with pytest.raises(OptionError, match="'another-name' has the weights of 'tuned'"):
        scan.calibrate(tmp_path / "no-base", [adapter, again], out=tmp_path / "benign.bank")


def scanned(monkeypatch: pytest.MonkeyPatch, item: Item, out: Path) -> Summary:
    """A scan of three checkpoints that all give this item; the base is never loaded."""
    reference = reference_of()
    monkeypatch.setattr(scan, "prepare", lambda *_, **__: reference)
    monkeypatch.setattr(scan, "scan_one", lambda *_, **__: item)
    monkeypatch.setattr(scan, "describe_probe", lambda _probes: {})
    return scan.scan("base", ["a", "b", "c"], out=out)


def test_a_summary_holds_q_values_that_no_single_record_holds(
    monkeypatch: pytest.MonkeyPatch, make_item, tmp_path: Path
) -> None:
    summary = scanned(monkeypatch, make_item("one", (0.0, 20.9, 0.5, 0.1), p_value=0.04), tmp_path)
    assert [item.q_value for item in summary.items] == pytest.approx([0.04] * 3)
    assert summary.settings["chance"]["scored"] == 3
    assert summary.settings["chance"]["false flags at most"] == pytest.approx(0.15)
    assert Summary.model_validate_json((tmp_path / "summary.json").read_bytes()) == summary


def test_a_record_that_is_used_again_explains_itself_by_the_path_of_this_scan(
    monkeypatch: pytest.MonkeyPatch, adapter: Path, tmp_path: Path
) -> None:
    drifted = Judgement(
        "flagged", "medium", ("encoding-taught",), 2.5, 0.04, (), (FINDING.model_copy(update={"exceeded": True}),), ()
    )
    monkeypatch.setattr(scan, "examine", lambda *_: drifted)
    elsewhere = Path(shutil.copytree(adapter, tmp_path / "there" / "tuned"))
    items = [
        scan.scan_one(reference_of(), path, bank=None, records=tmp_path / "records") for path in (adapter, elsewhere)
    ]
    assert [len(item.explanation) for item in items] == [3, 3]
    assert [str(item.path) in item.explanation[2] for item in items] == [True, True]
    (kept,) = (tmp_path / "records").iterdir()
    assert Item.model_validate_json(kept.read_bytes()).q_value is None


def test_a_bank_of_other_detectors_is_refused_with_what_to_do() -> None:
    reference = reference_of(probes=replace(PROBES, template_hash="t", prompts_hash="p"))
    settings = settings_of(reference)
    Bank(base_fingerprint="base", settings=settings, members=()).check_fits(reference)
    versions = settings["detector version"]
    assert all(f"{detector.name} {detector.version}" in versions for detector in DETECTORS)
    older = {name: value for name, value in settings.items() if name != "detector version"}
    for other in (
        older,
        settings | {"detector version": versions.replace("refusal-readiness 1", "refusal-readiness 0")},
    ):
        with pytest.raises(BankError, match="another detector version") as fault:
            Bank(base_fingerprint="base", settings=other, members=()).check_fits(reference)
        assert "undertow calibrate" in fault.value.hint

"""Records are frozen, survive JSON, refuse what makes no sense, and are never seen half written."""

import json
import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from probes.records import ErrorRecord, Item, Summary, environment, json_schema, write_json


def test_a_summary_survives_json_unchanged(summary):
    assert Summary.model_validate_json(summary.model_dump_json()) == summary


def test_json_has_the_fields_that_others_rely_on(summary):
    data = json.loads(summary.model_dump_json())
    assert data["schema"] == "undertow.scan/1"
    assert set(data) >= {"base", "probe", "bank", "environment", "items"}
    item = data["items"][1]
    names = "name path kind status verdict severity causes score p_value top_layers evidence error"
    assert set(item) >= set(names.split())
    assert set(item["evidence"][0]) >= {"detector", "statistic", "null", "p_value", "layers"}
    assert set(data["items"][-1]["error"]) == {"code", "path", "message", "hint"}


def test_records_are_frozen(summary):
    with pytest.raises(ValidationError, match="frozen"):
        summary.items[0].verdict = "clean"


@pytest.mark.parametrize(
    "changes",
    [{"verdict": None}, {"status": "failed"}, {"error": ErrorRecord(code="x", message="y")}, {"unknown": 1}],
)
def test_an_item_has_either_a_verdict_or_an_error(make_item, changes):
    make_item("control")
    with pytest.raises(ValidationError):
        make_item("contradiction", **changes)


def test_a_number_that_json_lacks_is_refused(make_evidence):
    with pytest.raises(ValidationError):
        make_evidence(score=float("nan"))


def test_a_file_name_that_is_no_utf8_can_be_recorded():
    error = ErrorRecord(code="corrupt-file", message="broken")
    item = Item(name=os.fsdecode(b"ckpt-\xff"), path="/x", status="unscannable", error=error)
    assert item.name == "ckpt-\\udcff"
    assert Item.model_validate_json(item.model_dump_json()) == item


def test_writing_replaces_the_file_in_one_step(tmp_path, summary, make_summary, monkeypatch):
    path = tmp_path / "records" / "summary.json"
    write_json(make_summary(), path)
    before = path.read_bytes()

    def disk_full(self, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("pathlib.Path.replace", disk_full)
        with pytest.raises(OSError, match="No space"):
            write_json(summary, path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
    write_json(summary, path)
    assert Summary.model_validate_json(path.read_bytes()) == summary


def test_the_environment_names_versions_and_not_the_user():
    found = environment()
    assert found["packages"]["torch"]
    assert found["python"].startswith("3.")
    assert str(Path.home()) not in json.dumps(found)


def test_the_schema_is_the_golden_one(golden):
    golden("summary.schema.json", json.dumps(json_schema(), indent=2) + "\n")

import json
import os
import subprocess
import time

import harness
import numpy as np
import pytest
from harness import Figure, commit, interleaved, parser, peak_growth, write

SPIN = 0.004


def spin(seconds: float) -> None:
    """Work for so much of this process' own time, however busy the machine is."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


class DriftingMachine:
    """A clock on which work takes longer and longer: the machine's load grows while we measure."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slowness = 1.0

    def work(self, amount: float) -> None:
        self.now += amount * self.slowness
        self.slowness *= 1.15

    def clock(self) -> float:
        return self.now


def test_a_callable_twice_as_slow_is_found_twice_as_slow():
    rivals = {"ours": lambda: spin(SPIN), "slow": lambda: spin(2 * SPIN)}
    timings = interleaved(rivals, rounds=7, clock=time.process_time)
    slow, same = (timings.ratio(name, "ours", unit="times ours") for name in ("slow", "ours"))
    assert slow.value == pytest.approx(2, rel=0.15)
    assert slow.interval[0] <= slow.value <= slow.interval[1]
    assert slow.repeats == 7
    assert same.value == 1.0


def test_alternating_order_cancels_a_drift_of_the_machine_that_fixed_order_would_not():
    machine = DriftingMachine()
    rivals = {name: lambda: machine.work(1.0) for name in ("ours", "same")}
    timings = interleaved(rivals, rounds=8, clock=machine.clock, warm_up=0)
    ratios = np.divide(timings.seconds["same"], timings.seconds["ours"])
    assert timings.ratio("same", "ours", unit="").value == pytest.approx(1.0, abs=0.02)
    # The control: each single round does see the drift, in opposite directions.
    assert ratios[0] == pytest.approx(1.15)
    assert ratios[1] == pytest.approx(1 / 1.15)


def test_warm_up_rounds_run_and_are_not_timed():
    calls = []
    timings = interleaved({"ours": lambda: calls.append(1)}, rounds=3, warm_up=2)
    assert len(calls) == 5
    assert len(timings.seconds["ours"]) == 3


def test_fewer_than_three_rounds_have_no_interval():
    timings = interleaved({"ours": lambda: None, "rival": lambda: None}, rounds=2)
    assert timings.ratio("rival", "ours", unit="").interval is None


def test_the_interval_of_a_median_narrows_with_more_values():
    values = np.random.default_rng(0).normal(5, 1, 400)
    wide, narrow = harness.bootstrap(values[:10]), harness.bootstrap(values)
    assert narrow[0] < 5.1
    assert narrow[1] > 4.9
    assert narrow[1] - narrow[0] < 0.5 * (wide[1] - wide[0])


def test_peak_growth_sees_memory_that_is_freed_again():
    size = 48 * 2**20
    if peak_growth(lambda: None) is None:
        pytest.skip("the system keeps no peak of resident memory that can be reset")
    assert peak_growth(lambda: None) < 16
    assert 40 < peak_growth(lambda: np.ones(size, dtype=np.uint8).sum()) < 80


def test_the_result_file_says_on_what_and_with_what_it_was_measured(tmp_path, capsys):
    path = tmp_path / "results" / "one.json"
    figures = {
        "a/ratio": Figure(1.5, "times ours", (1.4, 1.6), 5),
        "b/absent": Figure(None, "times ours", note="absent"),
    }
    write(figures, path, cases=[{"name": "one"}])
    result = json.loads(path.read_text())
    assert set(result) == {"schema", "machine", "versions", "commit", "figures", "cases"}
    assert {"cpu", "cores", "memory_gib", "platform", "gpu", "torch_threads"} == set(result["machine"])
    assert result["machine"]["cpu"]
    assert result["machine"]["cores"] >= 1
    assert result["versions"]["torch"]
    assert result["versions"]["python"].startswith("3.")
    assert result["figures"]["a/ratio"] == {
        "value": 1.5, "unit": "times ours", "interval": [1.4, 1.6], "repeats": 5, "note": ""
    }  # fmt: skip
    assert result["figures"]["b/absent"]["interval"] is None
    assert result["commit"] is None or len(result["commit"].removesuffix("-dirty")) in (40, 64)
    printed = capsys.readouterr().out
    assert "1.4 to 1.6" in printed
    assert "absent" in printed


def test_a_result_that_is_no_number_is_refused_and_not_written_as_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write({"broken": Figure(float("nan"), "share")}, tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()


def test_there_is_no_commit_outside_a_checkout(tmp_path):
    assert commit(tmp_path) is None


@pytest.fixture
def checkout(tmp_path):
    root = tmp_path / "checkout"
    root.mkdir()
    (root / "tracked").write_text("one")
    author = {f"GIT_{who}_{what}": "nobody" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--no-verify", "--message", "one"]):
        subprocess.run(["git", "-C", root, *arguments], check=True, env=os.environ | author)
    return root


def test_a_commit_is_named_and_a_result_file_beside_it_changes_nothing(checkout):
    clean = commit(checkout)
    assert len(clean) == 40
    (checkout / "result.json").write_text("{}")
    assert commit(checkout) == clean


@pytest.mark.parametrize("name", ["tracked", "new.py"])
def test_changed_or_untracked_code_is_called_dirty(checkout, name):
    clean = commit(checkout)
    (checkout / name).write_text("two")
    assert commit(checkout) == f"{clean}-dirty"


def test_another_projects_checkout_around_ours_is_not_our_commit(checkout):
    (checkout / "vendored").mkdir()
    assert commit(checkout / "vendored") is None


def test_every_benchmark_takes_quick_and_json(tmp_path):
    assert parser("x").parse_args([]).json is None
    options = parser("x").parse_args(["--quick", "--json", str(tmp_path / "r.json")])
    assert options.quick
    assert options.json == tmp_path / "r.json"

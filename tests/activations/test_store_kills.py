"""A store under fire: killed writers, readers beside a writer, second writers, full disks. No row is ever wrong."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from activations.errors import StoreError
from activations.hdf5 import is_marked
from activations.store import ActivationStore, Provenance

ROOT = Path(__file__).parents[2]
SEED = 20261121

# One interpreter that has imported everything and forks for each order: a start costs 3 ms instead of 500.
CHILD = '''
import errno, json, os, resource, sys, time
import numpy as np
from activations.errors import StoreError
from activations.store import ActivationStore, Provenance

def vectors(known, prompts):
    """Rows that say whose they are: prompt, hook point, number of the token, and the column."""
    rows = [(p, t) for p in prompts for t in range(1 + p % 3)]
    out = np.empty((len(known.hook_points), len(rows), known.d_model), np.float32)
    for layer in range(len(out)):
        for at, (prompt, token) in enumerate(rows):
            out[layer, at] = prompt * 64 + layer * 8 + token + np.arange(known.d_model) / 1024
    return out

def provenance(n_prompts, d_model):
    names = tuple(f"blocks.{layer}.hook_resid_post" for layer in range(3))
    return Provenance("base", "f", "", "float32", d_model, names, "all", "", "t", "", "p", n_prompts, version="0")

def check(store):
    """Every finished row is right; how many prompts are finished."""
    known = store.provenance
    finished = sorted(set(range(known.n_prompts)) - set(store.missing))
    for layer, name in enumerate(known.hook_points):
        if finished:
            assert np.array_equal(np.concatenate(store.read_tokens(name, finished)), vectors(known, finished)[layer])
    return len(finished)

def write(path, n_prompts, d_model, pause=0, limit=0, reserve=True, hold=False):
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if not reserve:
        def refused(*_):
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        os.posix_fallocate = refused
    known = provenance(n_prompts, d_model)
    with ActivationStore.resume(path, known) as store:
        if hold:
            time.sleep(10)
        left = store.missing
        for start in range(0, len(left), 7):
            batch = left[start : start + 7]
            store.append(batch, [1 + p % 3 for p in batch], vectors(known, batch))
            time.sleep(pause)

def read(path):
    seen, store, end = set(), None, time.monotonic() + 20
    while len(seen) == 0 or max(seen) < store.provenance.n_prompts:
        assert time.monotonic() < end, f"a reader never saw the end, only {sorted(seen)}"
        if store is None:
            if not os.path.exists(path):
                continue
            store = ActivationStore.open(path)
        seen.add(check(store))
        if len(seen) % 2:  # a reader that stays, and one that comes anew
            store.close()
            store = ActivationStore.open(path)
    return sorted(seen)
'''
SERVER = f"""{CHILD}
for line in sys.stdin:
    name, options, answer = json.loads(line)
    pid = os.fork()
    if pid == 0:
        try:
            result = ["ok", globals()[name](**options)]
        except StoreError as error:
            result = ["error", str(error)]
        except BaseException as error:
            result = ["fault", repr(error)]
        with open(answer, "w") as file:
            json.dump(result, file)
        os._exit(0)
    print(pid, flush=True)
    os.waitpid(pid, 0)
    print("ended", flush=True)
"""
CODE: dict[str, Any] = {}
exec(CHILD, CODE)  # the parent checks by the same rows


class Forker:
    """A process that runs one order at a time."""

    def __init__(self, folder: Path) -> None:
        self.answer = folder / f"{id(self)}.json"
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
        )

    def start(self, name: str, **options: Any) -> int:
        self.answer.unlink(missing_ok=True)
        print(json.dumps([name, options, str(self.answer)]), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def wait(self) -> list[Any] | None:
        """What came of it; None where it was killed."""
        assert self.process.stdout.readline() == "ended\n"
        return json.loads(self.answer.read_text()) if self.answer.exists() else None

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def forkers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Forker]]:
    started = [Forker(tmp_path_factory.mktemp("answers")) for _ in range(3)]
    yield started
    for forker in started:
        forker.stop()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "activations.h5"


def provenance(n_prompts: int, d_model: int) -> Provenance:
    return CODE["provenance"](n_prompts, d_model)


def finished_and_right(path: Path) -> int:
    with ActivationStore.open(path) as store:
        return CODE["check"](store)


def test_the_check_of_rows_can_fail(path: Path) -> None:
    known = provenance(4, 8)
    with ActivationStore.create(path, known) as store:
        store.append([0, 1], [1, 2], CODE["vectors"](known, [0, 1]))
        store.append([2], [3], CODE["vectors"](known, [5]))
    with pytest.raises(AssertionError):
        finished_and_right(path)


def test_fifty_kills_lose_no_finished_prompt_and_leave_no_wrong_row(path: Path, forkers: list[Forker]) -> None:
    moments = random.Random(SEED)
    order = {"path": str(path), "n_prompts": 4000, "d_model": 96}
    before, marked, kills = 0, 0, 0
    while kills < 50:
        pid = forkers[0].start("write", **order)
        time.sleep(moments.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        assert forkers[0].wait() is None, f"seed {SEED}: the run ended before kill {kills}"
        kills += 1
        if path.exists():
            marked += is_marked(path)
            finished = finished_and_right(path)
            assert before <= finished < 4000, f"seed {SEED}, kill {kills}: {before} finished before, {finished} after"
            before = finished
    assert marked > 20, "kills came too early or too late to mean anything"
    assert before > 100
    forkers[0].start("write", **order)
    assert forkers[0].wait() == ["ok", None]
    assert finished_and_right(path) == 4000
    assert [file.name for file in path.parent.glob("activations*")] == [path.name]
    print(f"{kills} kills, {marked} while writing, {before} finished under fire")


def test_two_readers_see_right_rows_and_progress_while_one_writes(path: Path, forkers: list[Forker]) -> None:
    writer, *readers = forkers
    for reader in readers:
        reader.start("read", path=str(path))
    writer.start("write", path=str(path), n_prompts=1400, d_model=64, pause=0.005)
    assert writer.wait() == ["ok", None]
    for reader in readers:
        outcome, seen = reader.wait()
        assert outcome == "ok", seen
        assert seen[-1] == 1400
        assert len([count for count in seen if 0 < count < 1400]) >= 5
        print(f"a reader saw {len(seen)} states")


def test_a_reader_that_stays_sees_what_a_resumed_run_adds(path: Path, forkers: list[Forker]) -> None:
    known = provenance(100, 8)
    with ActivationStore.create(path, known) as store:
        store.append([99], [1 + 99 % 3], CODE["vectors"](known, [99]))
    with ActivationStore.open(path) as store:
        assert CODE["check"](store) == 1
        forkers[0].start("write", path=str(path), n_prompts=100, d_model=8)
        assert forkers[0].wait() == ["ok", None]
        assert CODE["check"](store) == 100


def test_a_second_writer_is_refused_until_the_first_is_gone(path: Path, forkers: list[Forker]) -> None:
    known = provenance(10, 8)
    ActivationStore.create(path, known).close()
    pid = forkers[0].start("write", path=str(path), n_prompts=10, d_model=8, hold=True)
    deadline = time.monotonic() + 20
    while not is_marked(path) and time.monotonic() < deadline:
        time.sleep(0.005)
    for attempt in (ActivationStore.resume, ActivationStore.create):
        with pytest.raises(StoreError, match="another process is writing it"):
            attempt(path, known)
    assert finished_and_right(path) == 0
    os.kill(pid, signal.SIGKILL)
    forkers[0].wait()
    with ActivationStore.resume(path, known) as store:
        store.append([0], [1], CODE["vectors"](known, [0]))
        with pytest.raises(StoreError, match="another process is writing it"):
            ActivationStore.resume(path, known)
    assert finished_and_right(path) == 1
    assert [file.name for file in path.parent.glob("activations*")] == [path.name]


def test_a_file_that_another_name_points_to_has_the_same_lock(path: Path) -> None:
    known = provenance(10, 8)
    other = path.with_name("other.h5")
    with ActivationStore.create(path, known):
        other.symlink_to(path)
        with pytest.raises(StoreError, match="another process is writing it"):
            ActivationStore.resume(other, known)


@pytest.mark.parametrize("reserve", [True, False], ids=["reserved", "met by HDF5"])
@pytest.mark.parametrize("limit", [300_000, 400_000, 500_123])
def test_a_full_disk_in_the_middle_keeps_what_is_finished(
    limit: int, reserve: bool, path: Path, forkers: list[Forker]
) -> None:
    order = {"path": str(path), "n_prompts": 1500, "d_model": 64}
    forkers[0].start("write", limit=limit, reserve=reserve, **order)
    outcome, message = forkers[0].wait()
    assert (outcome, "File too large" in message) == ("error", True), message
    assert path.stat().st_size <= limit
    assert ("synchronously" in message) != reserve, "h5py says so of each fault that HDF5 met"
    if reserve:
        assert not is_marked(path)
    finished = finished_and_right(path)
    assert 20 < finished < 1500
    with pytest.raises(StoreError, match="are not finished"), ActivationStore.open(path) as store:
        store.read_tokens("blocks.0.hook_resid_post")
    forkers[0].start("write", **order)
    assert forkers[0].wait() == ["ok", None]
    assert finished_and_right(path) == 1500


def test_where_no_room_is_for_the_copy_the_killed_file_stays(path: Path, forkers: list[Forker]) -> None:
    order = {"path": str(path), "n_prompts": 1500, "d_model": 64}
    pid = forkers[0].start("write", pause=0.001, **order)
    deadline = time.monotonic() + 20
    while (not path.exists() or finished_and_right(path) < 200) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    assert forkers[0].wait() is None
    finished = finished_and_right(path)
    forkers[0].start("write", limit=60_000, **order)
    outcome, message = forkers[0].wait()
    assert (outcome, "File too large" in message) == ("error", True), message
    assert finished_and_right(path) == finished
    assert not list(path.parent.glob("*.part"))
    forkers[0].start("write", **order)
    assert forkers[0].wait() == ["ok", None]
    assert finished_and_right(path) == 1500


def test_a_layer_is_read_without_the_bytes_of_the_others(path: Path) -> None:
    known = provenance(300, 64)
    values = CODE["vectors"](known, range(300))
    with ActivationStore.create(path, known) as store:
        store.append(range(300), [1 + prompt % 3 for prompt in range(300)], values)
    damaged = path.read_bytes()
    for layer in (0, 2):
        assert values[layer, :200].tobytes() in damaged
        damaged = damaged.replace(values[layer, :200].tobytes(), bytes(values[layer, :200].nbytes))
    path.write_bytes(damaged)
    with ActivationStore.open(path) as store:
        np.testing.assert_array_equal(np.concatenate(store.read_tokens(known.hook_points[1])), values[1])
        with pytest.raises(StoreError, match="its checksum is wrong"):
            store.read_tokens(known.hook_points[0])

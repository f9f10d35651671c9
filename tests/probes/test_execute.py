"""Tasks in worker processes: their order, what they share with this one, and what the death of one takes with it."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from activations.errors import OptionError, WorkerLostError
from probes.execute import check_jobs, mapped, most_jobs

pytestmark = pytest.mark.skipif(most_jobs() == 1 and not hasattr(os, "fork"), reason="processes cannot be forked here")


def lost(task: object, fault: WorkerLostError) -> str:
    return f"{task} lost: {fault.code}"


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_results_come_in_the_order_of_the_tasks(jobs: int) -> None:
    assert list(mapped(lambda task: task * task, [3, 1, 2], jobs=jobs, lost=lost)) == [9, 1, 4]


def test_workers_share_what_cannot_be_pickled_and_leave_it_as_it_was() -> None:
    shared = [torch.zeros(3)]
    network = torch.nn.Linear(3, 1, bias=False)
    network.register_forward_hook(lambda *_: None)  # a local function: pickle refuses the network

    def work(task: int) -> tuple[int, int, float]:
        shared[0] += task
        network.weight.data.fill_(task)
        return os.getpid(), torch.get_num_threads(), float(network(shared[0]).sum().detach())

    found = list(mapped(work, [1, 1, 1, 1], jobs=2, lost=lost))
    assert all(pid != os.getpid() for pid, _, _ in found)
    assert {threads for _, threads, _ in found} == {1}
    assert found[0][2] == 3.0
    assert shared[0].sum() == 0.0, "what a worker changes stays with it"


def test_one_job_is_this_process() -> None:
    assert list(mapped(lambda _: os.getpid(), [0], jobs=1, lost=lost)) == [os.getpid()]


def test_a_task_that_kills_its_worker_is_lost_alone() -> None:
    def work(task: int) -> str:
        if task in (1, 4):
            os.kill(os.getpid(), signal.SIGKILL)
        return str(task)

    found = list(mapped(work, range(6), jobs=2, lost=lost))
    assert found == ["0", "1 lost: worker-lost", "2", "3", "4 lost: worker-lost", "5"]


def test_many_tasks_go_on_side_by_side_after_one_that_kills_at_once() -> None:
    def work(task: int) -> int:
        if task == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return os.getpid()

    first, *others = mapped(work, range(3000), jobs=2, lost=lost)
    assert first == "0 lost: worker-lost"
    assert len(others) == 2999
    assert len(set(others)) <= 10, "not a process for each"


def test_what_a_task_raises_is_raised_here() -> None:
    def work(task: int) -> None:
        raise KeyError(task)

    with pytest.raises(KeyError, match="7"):
        list(mapped(work, [7], jobs=2, lost=lost))


def test_a_base_on_a_gpu_is_not_forked() -> None:
    check_jobs(1, torch.device("cuda:0"))
    with pytest.raises(OptionError, match="2 jobs cannot share a base on a GPU"):
        check_jobs(2, torch.device("cuda:0"))
    with pytest.raises(OptionError, match="expected 1 or more"):
        check_jobs(0, torch.device("cpu"))


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.default_int_handler], ids=["ignored", "not ignored"])
def test_an_interrupt_ends_a_worker_unless_this_process_ignores_it(handler: object) -> None:
    before = signal.signal(signal.SIGINT, handler)
    try:
        (found,) = mapped(lambda _: signal.getsignal(signal.SIGINT), [0], jobs=2, lost=lost)
    finally:
        signal.signal(signal.SIGINT, before)
    assert found == (signal.SIG_IGN if handler is signal.SIG_IGN else signal.SIG_DFL)

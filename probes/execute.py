"""One map over many tasks: in this process, or in worker processes that start where this one stands.

Workers are forked: the base, measured once, is theirs too without being copied or loaded again. A worker that dies
(killed for memory, or by a fault in native code) takes nothing with it but its own task.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any, TypeVar

import torch

from activations.errors import OptionError, WorkerLostError

__all__ = ["check_jobs", "mapped", "most_jobs"]

Task = TypeVar("Task")
Result = TypeVar("Result")


def most_jobs() -> int:
    """Processors of this process, or 1 where processes cannot be forked safely."""
    return len(os.sched_getaffinity(0)) if _can_fork() else 1


def check_jobs(jobs: int, device: torch.device) -> None:
    """Refuse a number of processes that cannot be.

    Raises:
        OptionError: Fewer than one, or several on a device or a system where a running model cannot be forked.
    """
    if jobs < 1:
        raise OptionError(f"{jobs} jobs: expected 1 or more", hint="Pass --jobs 1.")
    if jobs > 1 and (device.type != "cpu" or not _can_fork()):
        where = "a GPU" if device.type != "cpu" else "this system"
        raise OptionError(
            f"{jobs} jobs cannot share a base on {where}", hint="Pass --jobs 1, or --device cpu on Linux."
        )


def mapped(
    work: Callable[[Task], Result], tasks: Sequence[Task], *, jobs: int, lost: Callable[[Task, WorkerLostError], Result]
) -> Iterator[Result]:
    """Results in the order of the tasks, each as soon as it and those before it are there.

    With several jobs each worker runs torch on one thread. Where a worker dies, the first task that was not finished is
    done again in a worker of its own, and the others side by side as before, until the one that kills its worker is
    found, which alone is lost. What had been done out of turn is then done twice.

    Args:
        work: What is done with a task; it may hold what cannot be pickled, its results may not.
        tasks: What is given to it.
        jobs: Processes; 1 does everything in this one.
        lost: Makes the result of a task whose worker died.
    """
    if jobs == 1:
        yield from map(work, tasks)
        return
    waiting = list(tasks)
    while waiting:
        done = 0
        pool = _pool(work, min(jobs, len(waiting)))
        try:
            for future in _submitted(pool, waiting):
                yield future.result()
                done += 1
        except BrokenProcessPool:
            yield _alone(work, waiting[done], lost)
            done += 1
        finally:
            pool.shutdown(cancel_futures=True)
        waiting = waiting[done:]


def _alone(work: Callable[[Task], Result], task: Task, lost: Callable[[Task, WorkerLostError], Result]) -> Result:
    with _pool(work, 1) as pool:
        try:
            result: Result = _submitted(pool, [task])[0].result()
        except BrokenProcessPool:
            hint = "Memory was short, as a rule: scan it alone, on a machine with more."
            return lost(task, WorkerLostError("the process that worked on it was killed", hint=hint))
        return result


def _pool(work: Callable[[Any], Any], jobs: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("fork"), initializer=_start, initargs=(work,))


def _submitted(pool: ProcessPoolExecutor, tasks: Sequence[Task]) -> list[Future[Any]]:
    """As many of the tasks as the pool takes: one whose worker has died already takes no more."""
    futures: list[Future[Any]] = []
    with warnings.catch_warnings(), suppress(BrokenProcessPool):
        # Python warns of threads beside a fork; those of torch are idle here, and a worker starts none.
        warnings.simplefilter("ignore", DeprecationWarning)
        for task in tasks:
            futures.append(pool.submit(_run, task))
    return futures


# What a worker does with each task, by one name; empty but in a worker.
_WORK: dict[str, Callable[[Any], Any]] = {}


def _start(work: Callable[[Any], Any]) -> None:
    _WORK["work"] = work
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # an interrupt ends a worker without a traceback
    torch.set_num_threads(1)  # the pool of threads does not outlive a fork


def _run(task: object) -> object:
    return _WORK["work"](task)


def _can_fork() -> bool:
    return hasattr(os, "sched_getaffinity") and "fork" in multiprocessing.get_all_start_methods()

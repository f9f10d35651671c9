"""Work beside the device, in threads: tokenising ahead of it, and writing behind it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event
from typing import TypeVar

__all__ = ["ahead", "behind"]

T = TypeVar("T")

# Calls waiting to be written before the device has to wait: enough for a slow flush, few enough for memory.
_WAITING = 4


def ahead(calls: Iterable[Callable[[], T]]) -> Iterator[T]:
    """Results in order, computed by a thread that never waits for the consumer.

    Whatever a later call raises is raised at the next result, not when its turn comes: a fault in the last prompt then
    shows in the first seconds instead of hours later.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        pending = deque(pool.submit(call) for call in calls)
        try:
            while pending:
                result = pending.popleft().result()
                for future in pending:
                    if not future.done():
                        break
                    future.result()
                yield result
        finally:
            for future in pending:
                future.cancel()


@contextmanager
def behind(work: Callable[[T], object]) -> Iterator[Callable[[T], None]]:
    """Give a function that hands items to `work` in another thread, one after the other; all is done at the end.

    Handing over waits while several items are unfinished, so memory stays bounded. What `work` raises is raised at the
    next call, or at the end of the block, and nothing after it is begun.
    """
    unfinished: deque[Future[object]] = deque()
    broken = Event()

    def guarded(item: T) -> object:
        if broken.is_set():
            return None
        try:
            return work(item)
        except BaseException:
            broken.set()
            raise

    with ThreadPoolExecutor(1, thread_name_prefix="behind") as pool:

        def hand_over(item: T) -> None:
            while unfinished and (unfinished[0].done() or len(unfinished) >= _WAITING):
                unfinished.popleft().result()
            unfinished.append(pool.submit(guarded, item))

        try:
            yield hand_over
            while unfinished:
                unfinished.popleft().result()
        finally:
            for future in unfinished:
                future.cancel()

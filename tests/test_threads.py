"""Facts about threads that wait for what only knows how to wait."""

import asyncio
import gc
import threading
import weakref
from concurrent.futures import CancelledError, Future
from typing import Any

import pytest

from rlm.threads import Threads

PATIENCE = 20
"""Seconds after which something that never comes fails a test. No test waits for it to pass."""


class Payload:
    """Something that a call holds."""


def held(threads: Threads, count: int) -> tuple[threading.Event, list[Future[Any]]]:
    """Occupy so many threads until the event is set."""
    free = threading.Event()
    begun = [threading.Event() for _ in range(count)]

    def work(number: int) -> None:
        begun[number].set()
        free.wait(PATIENCE)

    futures = [threads.submit(lambda n=n: work(n)) for n in range(count)]  # type: ignore[misc]
    assert all(event.wait(PATIENCE) for event in begun)
    return free, futures


async def test_work_is_done_in_a_thread_of_that_name() -> None:
    name = await Threads(2, "rlm-test").run(lambda: threading.current_thread().name)
    assert name == "rlm-test-1"


async def test_what_work_raises_is_raised() -> None:
    threads = Threads(1, "rlm-test")
    with pytest.raises(ZeroDivisionError):
        await threads.run(lambda: 1 / 0)
    assert await threads.run(lambda: 5) == 5


def test_no_more_threads_work_than_may_and_the_rest_waits_in_order() -> None:
    threads, order = Threads(2, "rlm-test"), []
    free, _ = held(threads, 2)
    waiting = [threads.submit(lambda n=n: order.append(n)) for n in range(10)]  # type: ignore[misc]
    assert order == []
    free.set()
    for future in waiting:
        future.result(PATIENCE)
    assert sorted(order) == list(range(10))


def test_a_thread_that_is_idle_is_used_again() -> None:
    threads = Threads(100, "rlm-test")
    names = {threads.submit(lambda: threading.current_thread().name).result(PATIENCE) for _ in range(20)}
    assert len(names) < 10


async def test_what_is_cancelled_before_its_turn_is_held_by_nobody() -> None:
    """Thousands of calls may be, while a few that hang have all the threads."""
    threads = Threads(1, "rlm-test")
    free, _ = held(threads, 1)
    payload = Payload()
    gone = weakref.ref(payload)
    task = asyncio.create_task(threads.run(lambda payload=payload: payload))  # type: ignore[misc]
    del payload
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    del task
    await asyncio.sleep(0)
    gc.collect()
    assert gone() is None
    free.set()
    assert await threads.run(lambda: 5) == 5


async def test_nothing_of_work_that_is_done_is_held() -> None:
    threads, payload = Threads(1, "rlm-test"), Payload()
    gone = weakref.ref(payload)
    await threads.run(lambda payload=payload: payload)  # type: ignore[misc]
    del payload
    await threads.run(lambda: None)
    gc.collect()
    assert gone() is None


def test_closing_drops_what_has_not_begun_and_takes_no_more() -> None:
    threads = Threads(1, "rlm-test")
    free, [running] = held(threads, 1)
    waiting = threads.submit(lambda: None)
    threads.close()
    threads.close()
    with pytest.raises(CancelledError):
        waiting.result(PATIENCE)
    with pytest.raises(RuntimeError, match="closed"):
        threads.submit(lambda: None)
    free.set()
    running.result(PATIENCE)

"""Facts about the core's loop, as seen from threads, from other loops, and from forks."""

import asyncio
import inspect
import subprocess
import sys
import textwrap
import threading
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from rlm import hostloop


async def where() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


async def double(number: int) -> int:
    await asyncio.sleep(0)
    return number * 2


def script(code: str) -> str:
    """What a Python of its own prints: for what would shake this one."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- from ordinary code ------------------------------------------------------------------------


def test_a_result_comes_back() -> None:
    assert hostloop.run(double(21)) == 42


def test_all_work_is_on_one_loop_in_a_thread_of_its_own() -> None:
    assert hostloop.run(where()) is hostloop.run(where()) is hostloop.loop()

    async def thread() -> threading.Thread:
        return threading.current_thread()

    assert hostloop.run(thread()) is not threading.current_thread()
    assert hostloop.run(thread()).daemon


def test_an_exception_passes_as_it_is() -> None:
    error = ZeroDivisionError("as it is")

    async def fail() -> None:
        raise error

    with pytest.raises(ZeroDivisionError) as caught:
        hostloop.run(fail())
    assert caught.value is error


def test_threads_may_run_side_by_side() -> None:
    barrier = asyncio.Barrier(20)

    async def meet(number: int) -> int:
        await barrier.wait()  # none gets past before all are in
        return number

    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(lambda number: hostloop.run(meet(number)), range(20))) == list(range(20))


def test_threads_that_come_first_together_share_a_loop() -> None:
    code = """
        import threading
        from concurrent.futures import ThreadPoolExecutor
        from rlm import hostloop
        barrier = threading.Barrier(16)
        def first(_):
            barrier.wait()
            return hostloop.loop()
        with ThreadPoolExecutor(16) as pool:
            print(len(set(map(id, pool.map(first, range(16))))))
    """
    assert script(code) == "1\n"


async def test_a_synchronous_call_works_inside_a_running_loop() -> None:
    assert hostloop.run(double(4)) == 8
    assert hostloop.run(where()) is not asyncio.get_running_loop()


def test_a_synchronous_call_on_the_cores_own_loop_is_refused_and_not_a_deadlock() -> None:
    work = double(1)

    async def call() -> None:
        hostloop.run(work)

    with pytest.raises(RuntimeError, match="would wait for itself"):
        hostloop.run(call())
    assert inspect.getcoroutinestate(work) == inspect.CORO_CLOSED


def test_ctrl_c_waits_for_the_clean_up_and_is_raised() -> None:
    code = """
        import asyncio, os, signal
        from rlm import hostloop
        async def work():
            try:
                await asyncio.sleep(0.3)  # until the caller waits
                os.kill(os.getpid(), signal.SIGINT)
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0.1)
                print("cleaned", flush=True)
        try:
            hostloop.run(work())
        except KeyboardInterrupt:
            print("interrupted", flush=True)
    """
    assert script(code) == "cleaned\ninterrupted\n"


# --- from another loop -------------------------------------------------------------------------


async def test_work_can_be_awaited_from_another_loop() -> None:
    assert await hostloop.delegate(double(3)) == 6
    assert await hostloop.delegate(where()) is hostloop.loop()


async def test_awaiting_does_not_stop_the_loop_that_awaits() -> None:
    ticks = asyncio.Event()
    core = hostloop.loop()
    reached = asyncio.Event()

    async def work() -> str:
        ours.call_soon_threadsafe(reached.set)
        while not ticks.is_set():
            await asyncio.sleep(0.001)
        return "done"

    ours = asyncio.get_running_loop()
    task = asyncio.create_task(hostloop.delegate(work()))
    await reached.wait()
    core.call_soon_threadsafe(ticks.set)
    assert await task == "done"


async def test_an_exception_passes_from_loop_to_loop() -> None:
    async def fail() -> None:
        raise LookupError("over there")

    with pytest.raises(LookupError, match="over there"):
        await hostloop.delegate(fail())


def test_on_the_cores_own_loop_work_is_simply_awaited() -> None:
    async def outer() -> bool:
        task = asyncio.current_task()

        async def inner() -> bool:
            return asyncio.current_task() is task

        return await hostloop.delegate(inner())

    assert hostloop.run(outer())


class Cleaning:
    """Work that never ends, and needs a while to clean up when it is cancelled."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.cleaned = False

    async def work(self) -> None:
        self.begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.05)
            self.cleaned = True

    async def begin(self) -> asyncio.Task[None]:
        task = asyncio.create_task(hostloop.delegate(self.work()))
        while not self.begun.is_set():
            await asyncio.sleep(0.001)
        return task


async def test_cancelling_waits_until_the_work_has_cleaned_up() -> None:
    cleaning = Cleaning()
    task = await cleaning.begin()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cleaning.cleaned


async def test_a_timeout_cancels_the_work_too() -> None:
    cleaning = Cleaning()
    task = await cleaning.begin()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(task, 0.01)
    assert cleaning.cleaned


async def test_cancelling_one_leaves_the_others_alone() -> None:
    one, other = Cleaning(), Cleaning()
    first, second = await one.begin(), await other.begin()
    first.cancel()
    await asyncio.wait([first])
    assert (one.cleaned, other.cleaned, second.done()) == (True, False, False)
    second.cancel()
    await asyncio.wait([second])
    assert other.cleaned


async def test_work_that_was_cancelled_before_it_began_is_over_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The core is busy while the work is submitted and cancelled again."""
    monkeypatch.setattr(hostloop, "CANCEL_GRACE", 3600.0)
    work: Coroutine[Any, Any, int] = double(1)
    release = threading.Event()
    hostloop.loop().call_soon_threadsafe(release.wait)
    task = asyncio.create_task(hostloop.delegate(work))
    try:
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0)
    finally:
        release.set()
    done, _ = await asyncio.wait([task], timeout=10)
    if not done:  # free the thread that waits for the grace to pass
        work.close()
        pytest.fail("it waits for the clean-up of work that never began")
    assert task.cancelled()
    assert inspect.getcoroutinestate(work) == inspect.CORO_CLOSED


# --- in a fork ---------------------------------------------------------------------------------


def test_a_forked_process_gets_a_loop_of_its_own() -> None:
    code = """
        import asyncio, os
        from rlm import hostloop
        async def where():
            return id(asyncio.get_running_loop()), os.getpid()
        before = hostloop.run(where())
        pid = os.fork()
        if pid == 0:
            loop, process = hostloop.run(where())
            os._exit(0 if loop == id(hostloop.loop()) != before[0] and process == os.getpid() else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert hostloop.run(where()) == before
        print("both", flush=True)
    """
    assert script(code) == "both\n"

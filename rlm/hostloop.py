"""The core's event loop, and the plain face over it.

One thread per process runs one asyncio loop for all runs. Synchronous callers wait for
it, asynchronous ones await it from a loop of their own, so that `completion()` works in
a script, in a notebook whose loop is running, and from any number of threads.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

Value = TypeVar("Value")

CANCEL_GRACE = 5.0
"""Seconds a cancelled call gets to clean up before Ctrl-C is passed on regardless."""

_THREAD = "rlm-loop"
_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_owner = 0
_thread: threading.Thread | None = None


def loop() -> asyncio.AbstractEventLoop:
    """The core's loop, running. A process forked from this one gets a loop of its own."""
    global _loop, _owner, _thread
    with _lock:
        ended = _thread is None or not _thread.is_alive()  # by something that no code here may raise
        if _loop is None or _owner != os.getpid() or ended:
            _loop, _owner = asyncio.new_event_loop(), os.getpid()
            _thread = threading.Thread(target=_loop.run_forever, name=_THREAD, daemon=True)
            _thread.start()
        return _loop


def run(work: Coroutine[Any, Any, Value]) -> Value:
    """Run a coroutine on the core's loop and wait. Ctrl-C cancels it and waits for its clean-up."""
    if threading.current_thread().name == _THREAD:
        work.close()
        raise RuntimeError("a synchronous call from the core's own loop would wait for itself")
    future, ended = _submit(work)
    try:
        return future.result()
    except KeyboardInterrupt:
        future.cancel()
        ended.wait(CANCEL_GRACE)
        raise


def run_at_end(clean_up: Callable[[], Coroutine[Any, Any, Any]]) -> None:
    """Run clean-up that nobody waits for, from any thread, also while the process ends."""
    if _loop is None or _owner != os.getpid():  # a fork has no part in what its parent opened
        return
    future = asyncio.run_coroutine_threadsafe(clean_up(), _loop)
    if threading.current_thread().name != _THREAD:
        with contextlib.suppress(Exception):  # there is nobody left to tell
            future.result(CANCEL_GRACE)


async def delegate(work: Coroutine[Any, Any, Value]) -> Value:
    """Await a coroutine that runs on the core's loop. Cancelling this cancels that."""
    if asyncio.get_running_loop() is loop():
        return await work
    future, ended = _submit(work)
    try:
        return await asyncio.wrap_future(future)
    except asyncio.CancelledError:
        future.cancel()
        await asyncio.get_running_loop().run_in_executor(None, ended.wait, CANCEL_GRACE)
        raise


def _submit(
    work: Coroutine[Any, Any, Value],
) -> tuple[concurrent.futures.Future[Value], threading.Event]:
    """Start a coroutine on the core's loop. The event is set when it has really ended:
    a future that was cancelled counts as done before its task has cleaned up."""
    ended = threading.Event()

    async def tracked() -> Value:
        try:
            return await work
        finally:
            ended.set()

    return asyncio.run_coroutine_threadsafe(tracked(), loop()), ended

"""Threads for code that only knows how to wait: of clients, and of tools."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

IDLE = 10.0
"""Seconds a thread waits for its next call."""


class Threads:
    """Daemon threads: the interpreter waits for those of ThreadPoolExecutor before it ends."""

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._closed = False
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._count = self._idle = 0
        self._jobs: OrderedDict[concurrent.futures.Future[Any], Callable[[], Any]] = OrderedDict()
        self._changed = threading.Condition()

    async def run(self, work: Callable[[], Any]) -> Any:
        """`submit`, awaited. Work that is cancelled goes on in its thread."""
        return await asyncio.wrap_future(self.submit(work))

    def submit(self, work: Callable[[], Any]) -> concurrent.futures.Future[Any]:
        """Have work done in one of the threads, when one is free."""
        if self._process != os.getpid():  # a fork has none of its parent's threads
            self._begin()
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        with self._changed:
            if self._closed:
                raise RuntimeError("these threads are closed")
            self._jobs[future] = work
            if self._idle < len(self._jobs) and self._count < self._most:
                self._start()
            self._changed.notify()
        future.add_done_callback(self._forget)
        return future

    def _forget(self, future: concurrent.futures.Future[Any]) -> None:
        """What has been cancelled before its turn came is not held until then."""
        if future.cancelled():
            with self._changed:
                self._jobs.pop(future, None)

    def close(self) -> None:
        """Drop what has not begun, and let the threads end. Waits for none. Safe to call twice."""
        with self._changed:
            self._closed = True
            dropped, self._jobs = self._jobs, OrderedDict()
            self._changed.notify_all()
        for future in dropped:
            future.cancel()

    def _start(self) -> None:
        self._count += 1
        try:
            threading.Thread(target=self._work, name=f"{self._name}-{self._count}", daemon=True).start()
        except RuntimeError:  # the system has no more; those that there are will do
            self._count -= 1
            if not self._count:
                self._jobs.popitem()
                raise

    def _work(self) -> None:
        while (job := self._next()) is not None:
            future, work = job
            if future.set_running_or_notify_cancel():
                try:
                    value = work()
                except BaseException as error:
                    future.set_exception(error)
                    del error
                else:
                    future.set_result(value)
                    del value
            del job, future, work  # nothing of a call is held until the next one

    def _next(self) -> tuple[concurrent.futures.Future[Any], Callable[[], Any]] | None:
        with self._changed:
            self._idle += 1
            self._changed.wait_for(lambda: self._jobs or self._closed, IDLE)
            self._idle -= 1
            if self._jobs:
                return self._jobs.popitem(last=False)
            self._count -= 1
            return None

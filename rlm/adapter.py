"""SyncLM: a plain function, or a client that only knows how to wait, made into a BaseLM."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from .client import BaseLM, Reply, Request, Usage
from .errors import ConfigError, ModelError

THREADS = 256
"""Calls in flight of one synchronous client: no fewer than a run makes at once unless told otherwise,
for a call that waited for a thread would spend the time of its attempt with that."""

IDLE = 10.0
"""Seconds a thread waits for its next call."""


class SyncLM(BaseLM):
    """Runs a function of a `Request` in threads; it returns a str, or a Reply.

    In place of the function: a coroutine function, which is awaited on the core's loop, or an
    object with a method ``completion(messages)``, which gets a list of dicts with "role" and
    "content". A call that is cancelled goes on in its thread; its reply is dropped. No call
    keeps the process from ending.
    """

    def __init__(self, call: Any, *, model_name: str | None = None, threads: int = THREADS) -> None:
        method = getattr(call, "completion", None)
        if not callable(method or call):
            raise ConfigError(f"{call!r} is no model: it is neither a function nor has a method completion()")
        self.model_name = model_name or _name_of(call)
        self._call: Callable[[Request], Any] = call if method is None else lambda r: method(_dicts(r))
        self._is_async = inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(
            getattr(call, "__call__", None)  # noqa: B004 - an object whose call is a coroutine function
        )
        self._threads = _Threads(threads)

    async def complete(self, request: Request) -> Reply:
        if self._is_async:
            said = self._call(request)
        else:
            said = await asyncio.wrap_future(self._threads.submit(lambda: self._in_thread(request)))
        if inspect.isawaitable(said):  # also of a method that is a coroutine function, or a lambda around one
            try:
                said = await said
            except SystemExit as error:  # which would end the loop that all runs share
                raise _left(error) from error
        if isinstance(said, str):
            return Reply(said, usage=Usage.estimate(request.messages, said), model=self.model_name)
        return said  # type: ignore[no-any-return] # the gate looks at what it is

    def _in_thread(self, request: Request) -> Any:
        try:
            return self._call(request)
        except StopIteration as error:  # which no future can hold: whoever waits would wait for ever
            raise RuntimeError("the function raised StopIteration") from error
        except concurrent.futures.CancelledError as error:  # which would pass for the end of this call
            raise _left(error) from error
        except Exception:
            raise
        except BaseException as error:  # of a sys.exit(), say: it would end the loop that all runs share
            raise _left(error) from error

    async def aclose(self) -> None:
        self._threads.close()


class _Threads:
    """Daemon threads: the interpreter waits for those of ThreadPoolExecutor before it ends."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._count = self._idle = 0
        self._closed = False
        self._jobs: deque[tuple[concurrent.futures.Future[Any], Callable[[], Any]]] = deque()
        self._changed = threading.Condition()

    def submit(self, work: Callable[[], Any]) -> concurrent.futures.Future[Any]:
        """Have work done in one of the threads, when one is free."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        with self._changed:
            if self._closed:
                raise RuntimeError("the client is closed")
            self._jobs.append((future, work))
            if self._idle < len(self._jobs) and self._count < self._most:
                self._start()
            self._changed.notify()
        return future

    def close(self) -> None:
        """Drop what has not begun, and let the threads end. Waits for none. Safe to call twice."""
        with self._changed:
            self._closed = True
            dropped, self._jobs = self._jobs, deque()
            self._changed.notify_all()
        for future, _ in dropped:
            future.cancel()

    def _start(self) -> None:
        self._count += 1
        try:
            threading.Thread(target=self._work, name=f"rlm-client-{self._count}", daemon=True).start()
        except RuntimeError:  # the system has no more; those that there are will do
            self._count -= 1
            if not self._count:
                self._jobs.pop()
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
                return self._jobs.popleft()
            self._count -= 1
            return None


def _left(error: BaseException) -> ModelError:
    """What stands for an exception that is meant to end more than a call."""
    said = f": {error}" if str(error) else ""
    return ModelError(f"the function raised {type(error).__name__}{said}")


def _name_of(call: Any) -> str:
    name = getattr(call, "model_name", None) or getattr(call, "__name__", None)
    return name if isinstance(name, str) else type(call).__name__


def _dicts(request: Request) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in request.messages]

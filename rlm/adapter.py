"""SyncLM: a plain function, or a client that only knows how to wait, made into a BaseLM."""

from __future__ import annotations

import concurrent.futures
import inspect
from collections.abc import Callable
from typing import Any

from .client import BaseLM, Reply, Request, Usage
from .errors import ConfigError, ModelError
from .threads import Threads

THREADS = 256
"""Calls in flight of one synchronous client: no fewer than a run makes at once unless told otherwise,
for a call that waited for a thread would spend the time of its attempt with that."""


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
        self._threads = Threads(threads, "rlm-client")

    async def complete(self, request: Request) -> Reply:
        if self._is_async:
            said = self._call(request)
        else:
            said = await self._threads.run(lambda: self._in_thread(request))
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


def _left(error: BaseException) -> ModelError:
    """What stands for an exception that is meant to end more than a call."""
    said = f": {error}" if str(error) else ""
    return ModelError(f"the function raised {type(error).__name__}{said}")


def _name_of(call: Any) -> str:
    name = getattr(call, "model_name", None) or getattr(call, "__name__", None)
    return name if isinstance(name, str) else type(call).__name__


def _dicts(request: Request) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in request.messages]

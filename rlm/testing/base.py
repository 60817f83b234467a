"""What the suites of environments and of clients have in common.

Coroutine tests run on the core's loop, as everything else of a plugin does, so no asyncio
plugin of pytest and no configuration of it is needed.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import Any, ClassVar

import pytest

from .. import hostloop
from .sessions import HANG


class PluginSuite:
    """Tests that a plugin's package inherits. Nothing hangs, and known failures are declared."""

    level: ClassVar[str] = "own"

    subject: ClassVar[str] = ""
    """The one fixture that a package defines: what is under test."""

    known_failures: ClassVar[Mapping[str, str]] = {}
    """Tests that fail, with the reason and a link: ``"test_name"`` or ``"test_name[parameters]"``.
    Strict: one that passes unexpectedly fails."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stale = [name for name in cls.known_failures if not hasattr(cls, name.partition("[")[0])]
        if stale:
            raise TypeError(f"{cls.__name__}: known failures that are no tests: {', '.join(stale)}")
        for name, test in list(vars(cls).items()):
            if name.startswith("test") and inspect.iscoroutinefunction(test):
                setattr(cls, name, _on_the_core_loop(test))

    @pytest.fixture(autouse=True)
    def _known(self, request: pytest.FixtureRequest) -> None:
        for name in (request.node.name, request.node.originalname):
            if name in self.known_failures:
                reason = self.known_failures[name]
                request.node.add_marker(pytest.mark.xfail(reason=reason, strict=True))
                break

    @pytest.fixture(autouse=True)
    def no_test_hangs(self) -> Iterator[None]:
        """A test that would hang fails."""
        if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "alarm"):
            yield
            return
        previous = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"still running after {HANG} s"))
        signal.alarm(HANG)
        try:
            yield
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, previous)


def _on_the_core_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(HANG - 5):
                await test(*args, **kwargs)

        hostloop.run(bounded())

    return run

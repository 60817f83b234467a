"""Facts about a sandbox without a loop around it."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from typing import Any

import pytest

from rlm import open_repl
from rlm.environment import BaseEnv, Host, REPLResult
from rlm.errors import ConfigError


class Noting(BaseEnv):
    """Notes what is done to it."""

    def __init__(self, done: list[str]) -> None:
        self._done = done

    async def start(self, host: Host) -> None:
        self._done.append("start")

    async def add_context(self, value: Any) -> int:
        self._done.append(f"context {value}")
        return 0

    async def execute(self, code: str, *, timeout: float | None = None) -> REPLResult:
        self._done.append(code)
        return REPLResult(stdout=code)

    async def close(self) -> None:
        self._done.append("close")


def opened(done: list[str]) -> Any:
    return open_repl(lambda: Noting(done))


def test_cells_run_between_opening_and_closing_it() -> None:
    done: list[str] = []
    with opened(done) as repl:
        assert repl.execute("x").stdout == "x"
        assert repl.add_context("c") == 0
    assert done == ["start", "x", "context c", "close"]


def test_one_that_is_not_open_says_so_and_may_be_closed_twice() -> None:
    repl = opened([])
    repl.close()
    repl.close()
    for use in (lambda: repl.execute("x"), lambda: repl.add_context("c"), lambda: repl.isolation):
        with pytest.raises(ConfigError, match="the session is not open"):
            use()


def in_a_fork(work: Callable[[], None]) -> int:
    """The exit code of a fork of this process that does some work."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_neither_uses_nor_ends_its_parents_session() -> None:
    done: list[str] = []
    with opened(done) as repl:

        def work() -> None:
            with pytest.raises(ConfigError, match="the session is the parent process's"):
                repl.execute("x")
            repl.close()
            assert done == ["start"]

        assert in_a_fork(work) == 0
        assert repl.execute("y").stdout == "y"

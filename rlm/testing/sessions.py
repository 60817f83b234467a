"""Open sessions as tests use them, and what the host can see of them from outside."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import textwrap
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest

from .. import protocol
from ..environment import BaseEnv, CellError, Host, Isolation, REPLResult, SupportsReset
from ..errors import RLMError
from ..repl import REPL
from ..rlm import RLM

HANG = 120
"""Seconds after which a test that is still running has failed."""

CELL = 30.0
"""Seconds of computing a cell of a test gets unless it says otherwise."""

PATIENCE = 10.0
"""Seconds within which what must come about does; no test that passes waits for them."""

Serve = Callable[[protocol.Call, list[str]], Awaitable[Sequence[str | RLMError]]]


class Cells:
    """An open session for synchronous tests. Code may be indented like the test around it."""

    def __init__(self, repl: REPL) -> None:
        self.repl = repl

    @property
    def isolation(self) -> Isolation:
        """What the environment says about itself."""
        return self.repl.isolation

    def run(self, code: str, timeout: float = CELL) -> REPLResult:
        """Whatever comes of a cell."""
        return self.repl.execute(textwrap.dedent(code), timeout=timeout)

    def ok(self, code: str, timeout: float = CELL) -> REPLResult:
        """The result of a cell that must not fail."""
        result = self.run(code, timeout)
        assert result.error is None, f"{result.error.message}\n{result.error.traceback}"
        return result

    def value(self, code: str, timeout: float = CELL) -> Any:
        """The value of a cell's last expression."""
        return self.ok(code, timeout).value

    def error(self, code: str, timeout: float = CELL) -> CellError:
        """The error of a cell that must fail."""
        error = self.run(code, timeout).error
        assert error is not None, "the cell did not fail"
        return error

    def close(self) -> None:
        """End the session."""
        self.repl.close()


class Sandbox:
    """An open environment for tests that are coroutines, on the core's loop."""

    def __init__(self, env: BaseEnv, host: Host) -> None:
        self.env = env
        self._host = host

    async def begin_anew(self) -> None:
        """Reset the environment, and have it serve the same host as before."""
        assert isinstance(self.env, SupportsReset)
        await self.env.reset()
        await self.env.assign(self._host)

    @property
    def isolation(self) -> Isolation:
        """What the environment says about itself."""
        return self.env.isolation

    async def run(self, code: str, timeout: float = CELL) -> REPLResult:
        """Whatever comes of a cell."""
        async with asyncio.timeout(HANG / 2):
            return await self.env.execute(textwrap.dedent(code), timeout=timeout)

    async def ok(self, code: str, timeout: float = CELL) -> REPLResult:
        """The result of a cell that must not fail."""
        result = await self.run(code, timeout)
        assert result.error is None, f"{result.error.message}\n{result.error.traceback}"
        return result

    async def value(self, code: str, timeout: float = CELL) -> Any:
        """The value of a cell's last expression."""
        return (await self.ok(code, timeout)).value

    async def error(self, code: str, timeout: float = CELL) -> CellError:
        """The error of a cell that must fail."""
        error = (await self.run(code, timeout)).error
        assert error is not None, "the cell did not fail"
        return error


OpenCells = Callable[..., Cells]
OpenSandbox = Callable[..., Awaitable[Sandbox]]
OpenRLM = Callable[..., RLM]


async def echo(call: protocol.Call, texts: list[str]) -> list[str | RLMError]:
    """Serves calls by giving every prompt back."""
    if call.fn == "budget":
        return [json.dumps({"calls": None})]
    return [f"echo:{text}" for text in texts]


class Recorder:
    """Serves calls by echoing them, and remembers what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[protocol.Call, list[str]]] = []

    async def __call__(self, call: protocol.Call, texts: list[str]) -> Sequence[str | RLMError]:
        self.calls.append((call, texts))
        return await echo(call, texts)


def unavailable(reason: str) -> NoReturn:
    """Skip for want of something on this machine; fail where RLM_REQUIRE_ALL=1."""
    if os.environ.get("RLM_REQUIRE_ALL") == "1":
        pytest.fail(f"RLM_REQUIRE_ALL=1, but {reason}")
    pytest.skip(reason)


def eventually(condition: Callable[[], bool], seconds: float | None = None) -> bool:
    """Whether ``condition`` comes true within a generous bound."""
    deadline = time.monotonic() + (PATIENCE if seconds is None else seconds)
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


# --- the host's processes ----------------------------------------------------------------------


def parents() -> dict[int, int]:
    """The parent of every process that has not ended. Empty where there is no /proc."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            state, parent = (entry / "stat").read_bytes().rpartition(b")")[2].split()[:2]
            if state not in (b"Z", b"X"):
                found[int(entry.name)] = int(parent)
    return found


def descendants(pid: int) -> set[int]:
    """Every process below ``pid``."""
    tree, found = parents(), set[int]()
    while new := {child for child, parent in tree.items() if parent in found | {pid}} - found:
        found |= new
    return found


def identity(pid: int) -> str | None:
    """A process by number and start time: a later one of the same number is another. None once dead."""
    with contextlib.suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        if fields[0] not in (b"Z", b"X"):
            return f"process {pid} of {fields[19].decode()}"
    return None


def is_alive(name: str) -> bool:
    """Whether the process of this `identity` has not ended."""
    return identity(int(name.split()[1])) == name


def open_files() -> int:
    """How many files this process has open; 0 where that cannot be seen."""
    with contextlib.suppress(OSError):
        return len(os.listdir("/proc/self/fd"))
    return 0

"""What the tests of sandboxes share: which walls this machine has, and a session behind each."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest

from rlm import open_repl, protocol
from rlm.environment import CellError, Host, REPLResult
from rlm.errors import RLMError
from rlm.events import EventBus
from rlm.handler import LMHandler
from rlm.ledger import Ledger, Limits
from rlm.rlm import REPL
from rlm_local import LocalREPL

REQUIRE_ALL = os.environ.get("RLM_REQUIRE_ALL") == "1"
"""Set where nothing may be missing: then what this machine cannot test is a failure."""

WALLS = ("landlock", "bubblewrap")

HANG = 120
"""Seconds after which a test that is still running has failed."""

CELL = 30.0
"""Seconds of computing a cell of a test gets unless it says otherwise."""

Serve = Callable[[protocol.Call, list[str]], Awaitable[Sequence[str | RLMError]]]


def pytest_configure(config: pytest.Config) -> None:
    if not REQUIRE_ALL:  # what an older kernel does not enforce is not the tests' business
        config.addinivalue_line("filterwarnings", "ignore:local sandboxes on this machine do not enforce")


def unavailable(reason: str) -> NoReturn:
    """Skip, or fail where RLM_REQUIRE_ALL=1."""
    if REQUIRE_ALL:
        pytest.fail(f"RLM_REQUIRE_ALL=1, but {reason}")
    pytest.skip(reason)


@functools.cache
def why_no_bubblewrap() -> str | None:
    """Why bwrap is of no use here, asked of bwrap itself; None when it is."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        return "bwrap is not installed"
    user = [] if os.geteuid() == 0 else ["--unshare-user"]
    walls = ["--unshare-pid", "--unshare-net", "--ro-bind", "/", "/", "--proc", "/proc"]
    command = [bwrap, *user, *walls, "true"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return f"bwrap does not work here: {done.stderr.strip()}" if done.returncode else None


@pytest.fixture(params=WALLS)
def wall(request: pytest.FixtureRequest) -> str:
    """Each wall in turn."""
    if request.param == "bubblewrap" and (reason := why_no_bubblewrap()):
        unavailable(reason)
    return str(request.param)


@pytest.fixture(autouse=True)
def no_test_hangs() -> Iterator[None]:
    """A test that would hang fails."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"still running after {HANG} s"))
    signal.alarm(HANG)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


# --- sessions --------------------------------------------------------------------------------


class Cells:
    """An open session for synchronous tests. Code may be indented like the test around it."""

    def __init__(self, repl: REPL) -> None:
        self.repl = repl

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


class Sandbox:
    """An open LocalREPL on the test's own loop."""

    def __init__(self, env: LocalREPL) -> None:
        self.env = env

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


async def echo(call: protocol.Call, texts: list[str]) -> list[str | RLMError]:
    """Serves calls by giving every prompt back."""
    if call.fn == "budget":
        return [json.dumps({"calls": None})]
    return [f"echo:{text}" for text in texts]


@pytest.fixture
def repl(wall: str) -> Iterator[Cells]:
    """One open session."""
    with open_repl("local", wall=wall) as session:
        yield Cells(session)


@pytest.fixture
def open_cells(wall: str) -> Iterator[Callable[..., Cells]]:
    """Opens sessions with settings of the test's own, and closes them."""
    with contextlib.ExitStack() as stack:
        yield lambda **settings: Cells(stack.enter_context(open_repl("local", **{"wall": wall, **settings})))


OpenSandbox = Callable[..., Awaitable[Sandbox]]


@pytest.fixture
async def open_sandbox(wall: str) -> AsyncIterator[OpenSandbox]:
    """Opens sandboxes whose calls are served by a function of the test's, and closes them."""
    async with contextlib.AsyncExitStack() as stack:
        handler = await stack.enter_async_context(LMHandler(None, Ledger(Limits()), EventBus()))

        async def new(
            serve: Serve = echo,
            on_output: Callable[[str, str], None] = lambda stream, text: None,
            **settings: Any,
        ) -> Sandbox:
            env = LocalREPL(**{"wall": wall, **settings})
            stack.push_async_callback(env.close)
            await env.start(Host(handler, serve, on_output))
            return Sandbox(env)

        yield new


@pytest.fixture
async def sandbox(open_sandbox: OpenSandbox) -> Sandbox:
    """One open sandbox that echoes prompts."""
    return await open_sandbox()


def need(session: Cells | Sandbox, *rights: str) -> None:
    """Go on only where the machine enforces these, or where the test says that it must."""
    isolation = session.repl.isolation if isinstance(session, Cells) else session.env.isolation
    missing = set(rights) - set(isolation.enforced)
    if missing:
        unavailable(f"this machine does not enforce {', '.join(sorted(missing))}: {isolation.missing}")


# --- what a machine looks like from outside ---------------------------------------------------


def parents() -> dict[int, int]:
    """The parent of every process that has not ended."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
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


def is_session(pid: int) -> bool:
    """Whether a process runs, or begins or ceases to run, a session: the fork server forked it."""
    command, parent = _command(pid), _command(parents().get(pid, 0))
    forked = b"zygote.py" in command and b"zygote.py" in parent and not parent.startswith(_BWRAP)
    return forked or not command


_BWRAP = b"bwrap "


def _command(pid: int) -> bytes:
    """Name and arguments of a process; nothing once it is ending."""
    with contextlib.suppress(OSError):
        entry = Path(f"/proc/{pid}")
        arguments = (entry / "cmdline").read_bytes()
        return (entry / "comm").read_bytes().strip() + b" " + arguments if arguments else b""
    return b""


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether ``condition`` comes true within a generous bound."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True

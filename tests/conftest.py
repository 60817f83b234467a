"""What the tests of local sandboxes share: which walls this machine has, and a session behind each."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator

import pytest
from aimock_support import aimock, aimock_process  # noqa: F401 - fixtures
from llama_support import llama  # noqa: F401 - a fixture
from rlms_support import providers  # noqa: F401 - a fixture

from rlm import open_repl
from rlm.testing.sessions import HANG, Cells, unavailable

WALLS = ("landlock", "bubblewrap")


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("RLM_REQUIRE_ALL") != "1":  # what an older kernel lacks is not the tests' business
        config.addinivalue_line("filterwarnings", "ignore:local sandboxes on this machine do not enforce")


def pytest_collection_finish() -> None:
    """What thousands of tests consist of is garbage at the end at the earliest.

    A collection of everything takes a quarter of a second with it, and suites that are run inside a test
    ask for several.
    """
    gc.collect()
    gc.freeze()


@functools.cache
def why_no_bubblewrap() -> str | None:
    """Why bwrap is of no use here, asked of bwrap itself; None when it is."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        return "bwrap is not installed"
    user = [] if os.geteuid() == 0 else ["--unshare-user"]
    walls = ["--unshare-pid", "--unshare-net", "--proc", "/proc"]
    for folder in ("/usr", "/bin", "/lib", "/lib64"):  # not all of /: below it, containers come and go
        walls += ["--ro-bind-try", folder, folder]
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
    """A test that would hang fails. The suite's own fixture of this name takes its place there."""
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


def need(session: Cells, *rights: str) -> None:
    """Go on only where the machine enforces these, or where the test says that it must."""
    missing = set(rights) - set(session.isolation.enforced)
    if missing:
        unavailable(
            f"this machine does not enforce {', '.join(sorted(missing))}: {session.isolation.missing}"
        )

"""The fork server of local sandboxes, and what their sessions cost at rest."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from rlm import open_repl
from rlm.errors import ConfigError, SandboxUnavailable
from rlm.testing.robustness import THREAD_BOMB
from rlm.testing.sessions import Cells, descendants, eventually, open_files, parents
from rlm_local import LocalREPL
from rlm_local.suite import LocalSuite


class Broken(LocalREPL):
    """Asks for a limit that there is not, which no executor survives."""

    def _options(self) -> dict[str, Any]:
        return {**super()._options(), "limits": {"NO_SUCH_LIMIT": 1}}


def sessions() -> set[int]:
    """The processes of sessions that are open, or closing."""
    left = {pid for pid in descendants(os.getpid()) if LocalSuite().is_leftover(pid)}
    servers = {pid for pid in left if parents().get(pid) == os.getpid()}  # of other tests: no fork server's
    return left - servers - {pid for server in servers for pid in descendants(server)}


def test_failed_starts_say_why_and_leak_nothing(wall: str) -> None:
    with open_repl("local", wall=wall):
        pass
    assert eventually(lambda: not sessions())
    processes, files = descendants(os.getpid()), open_files()
    for _ in range(5):
        with pytest.raises(SandboxUnavailable, match="NO_SUCH_LIMIT"), open_repl(Broken, wall=wall):
            pass
    assert eventually(lambda: open_files() <= files)
    assert eventually(lambda: descendants(os.getpid()) <= processes)


def test_a_fork_server_that_was_killed_is_replaced(wall: str) -> None:
    def children() -> set[int]:
        return {child for child, parent in parents().items() if parent == os.getpid()}

    before = children()
    with open_repl("local", wall=wall, scratch=555) as first:
        root = os.path.dirname(first.execute("import os; os.getcwd()", timeout=30).value)
        (server,) = children() - before
        os.kill(server, signal.SIGKILL)
        assert eventually(lambda: server not in parents())
        with open_repl("local", wall=wall, scratch=555) as second:
            assert second.execute("1", timeout=30).value == 1
    if os.path.isdir(root):
        shutil.rmtree(root)  # nobody was left to do it
    gc.collect()  # what is left open warns here, and in no other test


@pytest.mark.parametrize(
    "code", [THREAD_BOMB, "import resource; resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))"]
)
def test_a_session_without_room_for_a_process_rests_between_cells(repl: Cells, code: str) -> None:
    repl.run(code)
    repl.run("pass")
    before = computed()
    time.sleep(1)
    assert computed() - before < 0.5


def computed() -> float:
    """Seconds of processor time that the sessions of this process have used."""
    total = 0
    for pid in sessions():
        with contextlib.suppress(OSError):
            total += sum(map(int, Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[11:13]))
    return total / os.sysconf("SC_CLK_TCK")


def test_a_context_beyond_the_memory_limit_does_not_cost_the_session(wall: str) -> None:
    with open_repl("local", wall=wall, memory=256) as repl:
        repl.execute("kept = 1", timeout=30)
        with pytest.raises(ConfigError, match="memory limit"):
            repl.add_context("x" * 400_000_000)
        assert repl.execute("kept", timeout=30).value == 1

"""Facts about what is left behind, which is nothing, and about the host, which does not notice."""

# ruff: noqa: E501 (a table of cells reads best with one to a line)

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Cells, OpenSandbox, descendants, eventually, is_session, need, parents

from rlm import open_repl
from rlm.errors import SandboxError, SandboxUnavailable
from rlm_local import LocalREPL

DAEMONS = """
    import os, signal, subprocess, time
    for _ in range(3):
        if os.fork() == 0:
            os.setsid()
            if os.fork(): os._exit(0)
            for number in (1, 2, 15): signal.signal(number, signal.SIG_IGN)
            time.sleep(3600)
    subprocess.Popen(['sleep', '3600'], start_new_session=True)
    """


def sessions_below(pid: int) -> set[int]:
    return {child for child in descendants(pid) if is_session(child)}


@pytest.fixture
def fork_server(wall: str) -> set[int]:
    """The processes below this one when no session is open."""
    with open_repl("local", wall=wall):
        pass
    assert eventually(lambda: not sessions_below(os.getpid()))
    return descendants(os.getpid())


# --- closing ------------------------------------------------------------------------------------------

STATES = {
    "at rest": "pass",
    "with threads": "import threading, time\nfor _ in range(5): threading.Thread(target=time.sleep, args=[3600]).start()",
    "with daemons": DAEMONS,
    "with a program": "import subprocess; subprocess.Popen(['sh', '-c', 'sleep 3600 & sleep 3600'])",
    "with files": "import os\nos.makedirs('a/b/c')\nfor i in range(100): open(f'a/b/{i}', 'w').write('x')\nos.symlink('/', 'a/root')",
    "with a directory shut": "import os\nos.makedirs('d/e')\nopen('d/e/f', 'w').close()\nos.chmod('d/e', 0)\nos.chmod('d', 0)\n"
                             "os.chmod('.', 0)",
    "with a directory that is read-only": "import os\nos.mkdir('d')\nopen('d/f', 'w').close()\nos.chmod('d', 0o500)\nos.chmod('.', 0o500)",
    "with deep directories": "import os\nfor _ in range(300):\n    os.mkdir('d' * 50); os.chdir('d' * 50)",
    "with strange names": "import os\nfor n in ('-rf', ' ', '\\n', '*', b'\\xff\\xfe'): open(n, 'w').close()",
    "after a death": "import os; os._exit(1)",
    "after a fork bomb": "import os\nwhile True: os.fork()",
    "stopped": "import os, threading\nthreading.Timer(0.05, os.kill, [os.getpid(), 19]).start()",
}  # fmt: skip


@pytest.mark.parametrize("state", STATES)
def test_closing_a_session_leaves_no_process_and_no_file(
    open_cells: Callable[..., Cells], fork_server: set[int], state: str
) -> None:
    repl = open_cells()
    if "bomb" in state:
        need(repl, "signals")
    folder = repl.value("import os; os.getcwd()")
    repl.run(STATES[state], timeout=1)
    repl.repl.close()
    assert eventually(lambda: descendants(os.getpid()) <= fork_server)
    assert not os.path.lexists(folder)
    assert open_cells().value(f"import os; os.path.lexists({folder!r})") is False


def test_closing_during_a_cell_leaves_no_process(
    open_cells: Callable[..., Cells], fork_server: set[int]
) -> None:
    repl = open_cells()
    repl.ok("import itertools")
    for code in ("while True: pass", "1 in itertools.repeat(0)"):
        repl = open_cells()

        def work(repl: Cells = repl, code: str = code) -> None:
            with contextlib.suppress(SandboxError):
                repl.run(f"import itertools\nprint('begun', flush=True)\n{code}")

        thread = threading.Thread(target=work)
        thread.start()
        assert eventually(lambda: len(sessions_below(os.getpid())) >= 2)
        repl.repl.close()
        thread.join(30)
        assert not thread.is_alive()


def test_an_exception_in_the_with_block_closes_the_session(wall: str, fork_server: set[int]) -> None:
    with pytest.raises(RuntimeError, match="of the block"), open_repl("local", wall=wall):
        raise RuntimeError("of the block")
    assert eventually(lambda: descendants(os.getpid()) <= fork_server)


def test_thirty_sessions_one_after_the_other_leak_nothing(wall: str, fork_server: set[int]) -> None:
    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    before = held()
    for _ in range(30):
        with open_repl("local", wall=wall) as repl:
            repl.add_context("x" * 100_000)
            assert repl.execute("len(context)", timeout=30).value == 100_000
    assert eventually(lambda: held() <= before)
    assert eventually(lambda: descendants(os.getpid()) <= fork_server)


class Broken(LocalREPL):
    """Asks for a limit that there is not, which no executor survives."""

    def _options(self) -> dict[str, Any]:
        return {**super()._options(), "limits": {"NO_SUCH_LIMIT": 1}}


def test_failed_starts_say_why_and_leak_nothing(wall: str, fork_server: set[int]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(SandboxUnavailable, match="NO_SUCH_LIMIT"), open_repl(Broken, wall=wall):
            pass
    assert eventually(lambda: len(os.listdir("/proc/self/fd")) <= before)
    assert eventually(lambda: descendants(os.getpid()) <= fork_server)


async def test_twenty_sessions_at_once_answer_and_close(open_sandbox: OpenSandbox) -> None:
    boxes = await asyncio.gather(*(open_sandbox() for _ in range(20)))
    for round_ in range(3):
        codes = [f"llm_query('{i}.{round_}')" for i in range(20)]
        replies = await asyncio.gather(*(box.value(code) for box, code in zip(boxes, codes, strict=True)))
        assert replies == [f"echo:{i}.{round_}" for i in range(20)]
    pids = await asyncio.gather(*(box.value("import os; os.getcwd()") for box in boxes))
    assert len(set(pids)) == 20
    await asyncio.gather(*(box.env.close() for box in boxes))


def test_sessions_of_many_threads_do_not_see_one_another(wall: str) -> None:
    failures: list[str] = []

    def work(number: int) -> None:
        with open_repl("local", wall=wall) as repl:
            repl.execute(f"me = {number}", timeout=60)
            found = repl.execute("print(me)\nme", timeout=60)
            if (found.value, found.stdout) != (number, f"{number}\n"):
                failures.append(f"{number}: {found}")

    threads = [threading.Thread(target=work, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []


# --- the host's end -----------------------------------------------------------------------------------

HOST = f"""
import json, sys, textwrap, threading, time
from rlm import open_repl

sessions = [open_repl("local", wall=sys.argv[1]).__enter__() for _ in range(3)]
folders = [s.execute("import os; open('file', 'w').write('x'); os.getcwd()", timeout=30).value for s in sessions]
sessions[1].execute(textwrap.dedent({DAEMONS!r}), timeout=30)
threading.Thread(target=sessions[0].execute, args=["while True: pass"], daemon=True).start()
time.sleep(0.3)
print("\\n".join(folders), flush=True)
print("ready", flush=True)
sys.stdin.readline()
if sys.argv[2] == "raise":
    raise SystemExit(3)
"""


def identity(pid: int) -> tuple[int, bytes] | None:
    """A process id with its start time, so that a later process of the same number is another one."""
    with contextlib.suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        if fields[0] not in (b"Z", b"X"):
            return pid, fields[19]
    return None


@pytest.mark.parametrize("how", ["kill -9", "SIGTERM", "SIGINT", "SIGHUP", "exit", "raise"])
def test_nothing_survives_the_host(wall: str, how: str, tmp_path: Path) -> None:
    host = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", HOST, wall, how], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert host.stdin is not None
    assert host.stdout is not None
    with host:
        folders = list(iter(lambda: host.stdout.readline().strip(), "ready"))
        assert len(folders) == 3
        everything = {identity(pid) for pid in descendants(host.pid)} - {None}
        assert len(everything) > 12  # the fork server, three sessions of three processes, four daemons
        if how in ("exit", "raise"):
            host.stdin.write("\n")
            host.stdin.flush()
        else:
            host.send_signal({"kill -9": 9, "SIGTERM": 15, "SIGINT": 2, "SIGHUP": 1}[how])
        host.wait(30)
    assert eventually(lambda: not {identity(found[0]) for found in everything if found} & everything, 5)
    for folder in folders:
        assert eventually(lambda folder=folder: not os.path.lexists(folder), 5)
        if not folder.startswith("/tmp/rlm/"):  # that one is a file system of the sandbox's own
            assert eventually(lambda folder=folder: not os.path.lexists(os.path.dirname(folder)), 5)


def test_a_host_that_is_stopped_and_killed_leaves_nothing(wall: str) -> None:
    host = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", HOST, wall, "kill"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert host.stdout is not None
    with host:
        list(iter(lambda: host.stdout.readline().strip(), "ready"))
        host.send_signal(signal.SIGSTOP)
        everything = {identity(pid) for pid in descendants(host.pid)} - {None}
        host.kill()
    assert eventually(lambda: not {identity(found[0]) for found in everything if found} & everything, 5)


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


# --- the host while it runs ---------------------------------------------------------------------------


def test_the_host_keeps_its_streams_directory_handlers_and_environment(
    wall: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)

    def state() -> list[object]:
        handlers = [signal.getsignal(number) for number in range(1, 32)]
        umask = os.umask(0o22)
        os.umask(umask)
        return [sys.stdin, sys.stdout, sys.stderr, os.getcwd(), handlers, dict(os.environ), umask, sys.excepthook,
                threading.excepthook, sys.getrecursionlimit(), signal.set_wakeup_fd(-1), os.listdir(tmp_path)]  # fmt: skip

    before = state()
    with open_repl("local", wall=wall) as repl:
        repl.execute(
            "import os, sys\nos.chdir('/')\nsys.stdout = None\nos.environ['X'] = '1'\nos.umask(0)", timeout=30
        )
        repl.execute("while True: pass", timeout=0.1)
        repl.execute("import os; os._exit(1)", timeout=30)
        assert state() == before
    assert state() == before


def test_nothing_that_a_session_does_is_printed_on_the_host(
    wall: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with open_repl("local", wall=wall) as repl:
        for code in ("print('out')", "import sys; print('err', file=sys.stderr)", "import os; os.system('echo hi; echo ho >&2')",
                     "1/0", "import ctypes; ctypes.string_at(0)", "import os; os._exit(1)"):  # fmt: skip
            repl.execute(code, timeout=30)
    assert capfd.readouterr() == ("", "")


def test_a_session_inherits_no_file_that_the_host_has_open(wall: str, tmp_path: Path) -> None:
    with open(tmp_path / "secret", "w") as file:
        os.set_inheritable(file.fileno(), True)
        number = os.fstat(file.fileno()).st_ino
        with open_repl("local", wall=wall, scratch=666) as repl:
            code = "import os\nfound = []\nfor fd in range(1024):\n    try: found.append(os.fstat(fd).st_ino)\n    except OSError: pass\n"
            assert repl.execute(f"{code}{number} in found", timeout=30).value is False


def test_a_process_forked_from_the_host_opens_sessions_of_its_own(wall: str) -> None:
    script = f"""
import os, warnings
warnings.simplefilter("ignore")
from rlm import open_repl
with open_repl("local", wall={wall!r}) as repl:
    repl.execute("x = 'parent'", timeout=30)
    pid = os.fork()
    if pid == 0:
        with open_repl("local", wall={wall!r}) as mine:
            ok = mine.execute("'x' in globals()", timeout=30).value is False
        os._exit(0 if ok else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert repl.execute("x", timeout=30).value == "parent"
print("fine")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=90, check=False
    )
    assert done.stdout == "fine\n", done.stderr

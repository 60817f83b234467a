"""Hygiene: what is left behind, which is nothing, and the host, which does not notice."""

# ruff: noqa: E501 (a table of cells reads best with one to a line)

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from .. import hostloop
from ..environment import BaseEnv, Host
from ..errors import SandboxError
from ..events import EventBus
from ..handler import LMHandler
from ..ledger import Ledger
from ..limits import Limits
from ..repl import open_repl
from ..session import Receive, ServeCalls, Session
from .sessions import OpenCells, OpenSandbox, echo, eventually, open_files
from .suite import Suite, requires

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

STATES = {
    "at rest": "pass",
    "with threads": "import threading, time\nfor _ in range(5): threading.Thread(target=time.sleep, args=[3600]).start()",
    "with daemons": DAEMONS,
    "with a program": "import subprocess; subprocess.Popen(['sh', '-c', 'sleep 3600 & sleep 3600'])",
    "with files": "import os\nos.makedirs('a/b/c')\nfor i in range(100): open(f'a/b/{i}', 'w').write('x')\nos.symlink('/', 'a/root')",
    "with thousands of files": "import os\nos.makedirs('a/b')\nfor i in range(5000): open(f'a/b/{i}', 'w').close()",
    "with a directory shut": "import os\nos.makedirs('d/e')\nopen('d/e/f', 'w').close()\nos.chmod('d/e', 0)\nos.chmod('d', 0)\n"
                             "os.chmod('.', 0)",
    "with a directory that is read-only": "import os\nos.mkdir('d')\nopen('d/f', 'w').close()\nos.chmod('d', 0o500)\nos.chmod('.', 0o500)",
    "with deep directories": "import os\nfor _ in range(300):\n    os.mkdir('d' * 50); os.chdir('d' * 50)",
    "with strange names": "import os\nfor n in ('-rf', ' ', '\\n', '*', b'\\xff\\xfe'): open(n, 'w').close()",
    "after a death": "import os; os._exit(1)",
    "after a fork bomb": "import os\nwhile True: os.fork()",
    "stopped": "import os, threading\nthreading.Timer(0.05, os.kill, [os.getpid(), 19]).start()",
}  # fmt: skip
"""What a session may be like when it is closed."""

NEEDS = {"threads": ["threads"], "daemons": ["processes"], "program": ["processes"], "bomb": ["processes", "isolation"],
         "files": ["files"], "director": ["files"], "names": ["files"], "stopped": ["threads"]}  # fmt: skip

CELLS = {
    "a thread": "import threading, time\nthreading.Thread(target=time.sleep, args=[3600]).start()",
    "a daemon": DAEMONS,
    "a program": "import subprocess; subprocess.Popen(['sleep', '3600'])",
}
"""What a cell may leave running for the cells after it."""

THREE_SESSIONS = f"""
sessions = [open_repl(environment).__enter__() for _ in range(3)]
for session in sessions:
    session.execute("try: open('file', 'w').write('x')\\nexcept OSError: pass", timeout=30)
sessions[1].execute(textwrap.dedent({DAEMONS!r}), timeout=30)
threading.Thread(target=sessions[0].execute, args=["while True: pass"], daemon=True).start()
time.sleep(0.3)
print("ready", flush=True)
sys.stdin.readline()
if sys.argv[1] == "raise":
    raise SystemExit(3)
"""


class Hygiene(Suite):
    """Level hygiene: nothing is left, however it ends."""

    level = "hygiene"

    def look(self, at_rest: set[str]) -> None:
        """See what there is while a session is open: a Python of its own cannot be nothing."""
        assert self.leftovers(os.getpid()) - at_rest or "cpython" not in self.capabilities

    # --- closing ------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("state", STATES)
    @requires("cpython")
    def test_closing_a_session_leaves_nothing(
        self, open_cells: OpenCells, at_rest: set[str], state: str
    ) -> None:
        self.require(*(flag for word, flags in NEEDS.items() if word in state for flag in flags))
        repl = open_cells()
        if "bomb" in state:
            self.need(repl, "signals")
        folder = repl.value("import os\ntry: open('left', 'w').close()\nexcept OSError: pass\nos.getcwd()")
        here = self.on_host(folder)
        repl.run(STATES[state], timeout=3 if "thousands" in state else 1)
        self.look(at_rest)
        repl.close()
        assert self.is_clean(at_rest)
        assert here is None or eventually(lambda: not os.path.lexists(here))
        assert open_cells().value(f"import os; os.path.lexists({folder + '/left'!r})") is False

    @pytest.mark.parametrize("code", ["while True: pass", "1 in itertools.repeat(0)"])
    def test_closing_during_a_cell_leaves_nothing(
        self, open_cells: OpenCells, at_rest: set[str], code: str
    ) -> None:
        begun = threading.Event()
        repl = open_cells(on_output=lambda stream, text: begun.set())

        def work() -> None:
            with contextlib.suppress(SandboxError):
                repl.run(f"import itertools\nprint('begun', flush=True)\n{code}")

        thread = threading.Thread(target=work)
        thread.start()
        assert begun.wait(20) or "streaming" not in self.capabilities
        repl.close()
        thread.join(30)
        assert not thread.is_alive()
        assert self.is_clean(at_rest)

    def test_an_exception_in_the_with_block_closes_the_session(
        self, environment: BaseEnv, at_rest: set[str]
    ) -> None:
        with pytest.raises(RuntimeError, match="of the block"), open_repl(environment):
            raise RuntimeError("of the block")
        assert self.is_clean(at_rest)

    def test_closing_before_the_start_leaves_nothing(self, environment: BaseEnv, at_rest: set[str]) -> None:
        hostloop.run(environment.fresh().close())
        assert self.is_clean(at_rest)

    @pytest.mark.parametrize("what", CELLS)
    @requires("cpython", "processes", "threads")
    def test_what_cells_leave_running_ends_with_their_session(
        self, open_cells: OpenCells, at_rest: set[str], what: str
    ) -> None:
        repl = open_cells()
        for _ in range(3):
            repl.ok(CELLS[what])
        assert repl.ok("print('on')").stdout == "on\n"
        self.look(at_rest)
        repl.close()
        assert self.is_clean(at_rest)

    def test_thirty_sessions_one_after_the_other_leak_nothing(
        self, environment: BaseEnv, at_rest: set[str]
    ) -> None:
        def held() -> tuple[int, int]:
            return open_files(), threading.active_count()

        before = held()
        for number in range(30):
            if number == 15:  # what is kept for further sessions, connections or threads, is complete
                before = held()
            with open_repl(environment) as repl:
                repl.add_context("x" * 100_000)
                assert repl.execute("len(context)", timeout=30).value == 100_000
        assert eventually(lambda: all(now <= then for now, then in zip(held(), before, strict=True)))
        assert self.is_clean(at_rest)

    async def test_a_start_that_fails_leaves_nothing(self, environment: BaseEnv) -> None:
        """Its session is closed before the sandbox can report: no start of a worker survives that."""
        await self._fail_to_start(environment)
        at_rest, before = await asyncio.to_thread(self.settled), open_files()
        for _ in range(5):
            await self._fail_to_start(environment)
        assert await asyncio.to_thread(eventually, lambda: open_files() <= before)
        assert await asyncio.to_thread(self.is_clean, at_rest)

    async def _fail_to_start(self, environment: BaseEnv) -> None:
        env = environment.fresh()
        async with _Refusing(None, Ledger(Limits()), EventBus()) as handler:
            with contextlib.suppress(SandboxError):
                await env.start(Host(handler, echo))
            await env.close()

    @pytest.mark.parametrize("ticks", [0, 1, 2, 3, 5, 8, 13])
    async def test_a_start_that_is_cancelled_leaves_nothing(
        self, open_sandbox: OpenSandbox, ticks: int
    ) -> None:
        await (await open_sandbox()).env.close()
        at_rest = await asyncio.to_thread(self.settled)
        task = asyncio.ensure_future(open_sandbox())
        for _ in range(ticks):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await (await task).env.close()
        assert await asyncio.to_thread(self.is_clean, at_rest)
        assert await (await open_sandbox()).value("1") == 1

    # --- many -----------------------------------------------------------------------------------------------

    async def test_twenty_sessions_at_once_answer_and_close(self, open_sandbox: OpenSandbox) -> None:
        await (await open_sandbox()).env.close()
        at_rest = await asyncio.to_thread(self.settled)
        boxes = await asyncio.gather(*(open_sandbox() for _ in range(20)))
        await asyncio.gather(*(box.ok(f"me = {i}") for i, box in enumerate(boxes)))
        for round_ in range(3):
            codes = [f"llm_query(f'{{me}}.{round_}')" for _ in boxes]
            replies = await asyncio.gather(*(box.value(code) for box, code in zip(boxes, codes, strict=True)))
            assert replies == [f"echo:{i}.{round_}" for i in range(20)]
        await asyncio.gather(*(box.env.close() for box in boxes))
        assert await asyncio.to_thread(self.is_clean, at_rest)

    def test_sessions_of_many_threads_do_not_see_one_another(self, environment: BaseEnv) -> None:
        failures: list[str] = []

        def work(number: int) -> None:
            with open_repl(environment) as repl:
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

    @pytest.mark.parametrize("how", ["kill -9", "SIGTERM", "SIGINT", "SIGHUP", "exit", "raise"])
    def test_nothing_survives_the_host(self, environment: BaseEnv, host_folder: Path, how: str) -> None:
        with self.host(environment, host_folder, THREE_SESSIONS, how) as host:
            seen = self.leftovers(host.pid)
            assert seen or "cpython" not in self.capabilities, "nothing is to be seen of three open sessions"
            if how in ("exit", "raise"):
                assert host.stdin is not None
                host.stdin.write("\n")
                host.stdin.flush()
            else:
                host.send_signal({"kill -9": 9, "SIGTERM": 15, "SIGINT": 2, "SIGHUP": 1}[how])
            host.wait(30)
        assert eventually(lambda: not self.leftovers(host.pid)), self.leftovers(host.pid)
        assert eventually(lambda: not os.listdir(host_folder)), os.listdir(host_folder)

    def test_a_host_that_is_stopped_and_killed_leaves_nothing(
        self, environment: BaseEnv, host_folder: Path
    ) -> None:
        with self.host(environment, host_folder, THREE_SESSIONS, "kill") as host:
            host.send_signal(signal.SIGSTOP)
            self.leftovers(host.pid)
            host.kill()
        assert eventually(lambda: not self.leftovers(host.pid)), self.leftovers(host.pid)
        assert eventually(lambda: not os.listdir(host_folder)), os.listdir(host_folder)

    # --- the host while it runs ---------------------------------------------------------------------------

    def test_the_host_keeps_its_streams_directory_handlers_and_environment(
        self, open_cells: OpenCells, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.chdir(tmp_path)

        def state() -> list[object]:
            handlers = [signal.getsignal(number) for number in range(1, 32)]
            umask = os.umask(0o22)
            os.umask(umask)
            return [sys.stdin, sys.stdout, sys.stderr, os.getcwd(), handlers, dict(os.environ), umask, sys.excepthook,
                    threading.excepthook, sys.getrecursionlimit(), signal.set_wakeup_fd(-1), os.listdir(tmp_path)]  # fmt: skip

        before = state()
        repl = open_cells()
        repl.run("import os, sys\nos.chdir('/')\nsys.stdout = None\nos.environ['X'] = '1'\nos.umask(0)")
        repl.run("while True: pass", timeout=0.1)
        if "cpython" in self.capabilities:
            repl.run("import os; os._exit(1)")
        assert state() == before
        repl.close()
        assert state() == before

    def test_nothing_that_a_session_does_is_printed_on_the_host(
        self, environment: BaseEnv, capfd: pytest.CaptureFixture[str]
    ) -> None:
        codes = ["print('out')", "import sys; print('err', file=sys.stderr)", "1/0"]
        if "cpython" in self.capabilities:
            codes += ["import os; os.system('echo hi; echo ho >&2')", "import ctypes; ctypes.string_at(0)",
                      "import os; os._exit(1)"]  # fmt: skip
        with open_repl(environment) as repl:
            for code in codes:
                repl.execute(code, timeout=30)
        assert capfd.readouterr() == ("", "")

    @requires("cpython")
    def test_a_session_inherits_no_file_that_the_host_has_open(
        self, environment: BaseEnv, host_folder: Path
    ) -> None:
        body = """
            with open(os.path.join(os.environ["TMPDIR"], "secret"), "w+b") as file:
                file.write(b"canary-9e1c"), file.flush()
                os.set_inheritable(file.fileno(), True)
                cell = '''
            import os
            def read(fd):
                try: return os.pread(fd, 100, 0)
                except OSError: return b''
            any(b'canary-9e1c' in read(fd) for fd in range(1024))'''
                with open_repl(environment) as repl:
                    print(repl.execute(textwrap.dedent(cell), timeout=30).value)
        """
        assert self.run_host(environment, host_folder, body) == "False\n"

    def test_a_process_forked_from_the_host_opens_sessions_of_its_own(
        self, environment: BaseEnv, host_folder: Path
    ) -> None:
        body = """
            with open_repl(environment) as repl:
                repl.execute("x = 'parent'", timeout=30)
                pid = os.fork()
                if pid == 0:
                    with open_repl(environment) as mine:
                        ok = mine.execute("'x' in globals()", timeout=30).value is False
                    os._exit(0 if ok else 1)
                print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), repl.execute("x", timeout=30).value)
        """
        assert self.run_host(environment, host_folder, body) == "0 parent\n"


class _Refusing(LMHandler):
    """Admits nobody: every session is closed as soon as it is opened."""

    def open_session(self, serve: ServeCalls, receive: Receive) -> Session:
        session = super().open_session(serve, receive)
        self.close_session(session)
        return session

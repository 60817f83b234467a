"""Robustness: a cell that goes wrong costs itself, and nothing that was there before."""

# ruff: noqa: E501 (a table of cells reads best with one to a line)

from __future__ import annotations

import asyncio
import time

import pytest

from .. import environment
from ..environment import BaseEnv, REPLResult
from ..errors import ConfigError, RLMError, SandboxError
from ..repl import open_repl
from .sessions import PATIENCE, Cells, OpenCells, OpenSandbox, Sandbox, eventually
from .suite import Suite, requires

BEFORE = """
    import functools, itertools
    number = 1
    class Point:
        def __init__(self, x): self.x = x
    point = Point(2)
    def double(x): return 2 * x
    def count():
        yield from itertools.count(3)
    counter = count()
    next(counter)
    partial = functools.partial(double, 5)
    """

AFTER = "[number, point.x, type(point) is Point, double(7), next(counter), partial(), context]"
EXPECTED = [1, 2, True, 14, 4, 10, "the context"]


def prepare(repl: Cells) -> None:
    """A context, and variables of every kind."""
    repl.repl.add_context("the context")
    repl.ok(BEFORE)


def assert_intact(repl: Cells) -> None:
    """All that `prepare` made is there, and works."""
    assert repl.value(AFTER) == EXPECTED


LOOPS = {
    "a busy loop": "while True: pass",
    "a loop that catches exceptions": "while True:\n    try: 1/0\n    except Exception: pass",
    "a sleep": "import time; time.sleep(3600)",
    "a lock": "import threading; threading.Lock().acquire(); l = threading.Lock(); l.acquire(); l.acquire()",
    "a join of a thread": "import threading, time\nt = threading.Thread(target=time.sleep, args=[3600], daemon=True)\n"
                          "t.start(); t.join()",
    "an await": "import asyncio; await asyncio.sleep(3600)",
    "a regular expression": "import re; re.match(r'(a+)+$', 'a' * 60 + 'b')",
    "a repr": "class R:\n    def __repr__(self):\n        while True: pass\nR()",
    "a subprocess": "import subprocess; subprocess.run(['sleep', '3600'])",
    "a generator": "sum(1 for _ in iter(int, 1))",
}  # fmt: skip


DEAF = {
    "a loop that ignores SIGINT": "import signal; signal.signal(2, signal.SIG_IGN)\nwhile True: pass",
    "a loop that blocks signals": "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass",
    "a loop that catches everything": "def spin():\n    while True: pass\nwhile True:\n    try: spin()\n"
                                      "    except BaseException: pass",
    "a C call that never returns": "import itertools; 1 in itertools.repeat(0)",
    "a program in the foreground": "import os; os.system('sleep 3600')",
    "SIGSTOP to itself": "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
    "a final answer without end": "class R:\n    def __str__(self):\n        while True: pass\nFINAL(R());",
    "a reserved name whose removal never ends": "class R:\n    def __del__(self):\n        while True: pass\nllm_query = R()",
}  # fmt: skip


DEATHS = {
    "os._exit": "import os; os._exit(3)",
    "a segmentation fault": "import ctypes; ctypes.string_at(0)",
    "SIGKILL": "import os; os.kill(os.getpid(), 9)",
    "SIGTERM": "import os; os.kill(os.getpid(), 15)",
    "SIGKILL to the group": "import os; os.killpg(0, 9)",
    "abort": "import os; os.abort()",
    "an alarm": "import signal, time; signal.setitimer(signal.ITIMER_REAL, 0.1); time.sleep(30)",
    "another program in its place": "import os; os.execv('/bin/true', ['true'])",
    "its files closed": "import os; os.closerange(3, 1000)",
    "all its files closed": "import os; os.closerange(0, 1000)",
    "a stack overflow": "import ctypes\nf = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: f())\nimport sys\n"
                        "sys.setrecursionlimit(10**9)\nf()",
    "_exit in a thread": "import os, threading, time\nthreading.Thread(target=os._exit, args=[0]).start(); time.sleep(30)",
}  # fmt: skip


HARM = {
    "garbage in every descriptor": "import os\nfor fd in range(3, 100):\n    try: os.write(fd, b'\\xff' * 1000)\n"
                                   "    except OSError: pass",
    "a byte in every descriptor": "import os\nfor fd in range(3, 100):\n    try: os.write(fd, b'\\0')\n"
                                  "    except OSError: pass",
    "every descriptor read": "import os\nfor fd in range(3, 100):\n    try: os.set_blocking(fd, False); os.read(fd, 1000)\n"
                             "    except OSError: pass",
    "every descriptor replaced": "import os\nfor fd in range(3, 20): os.dup2(0, fd)",
    "a signal to everyone": "import os; os.kill(-1, 9)",
    "a polite signal to everyone": "import os; os.kill(-1, 15)",
    "a stop for everyone": "import os; os.kill(-1, 19)",
    "a signal to the parent": "import os; os.kill(os.getppid(), 9)",
    "a session of its own": "import os; os.setpgid(0, 0)",
    "a limit of no processes": "import resource; resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))",
    "a limit on time": "import resource; resource.setrlimit(resource.RLIMIT_CPU, (1, 1))\nwhile True: pass",
    "every file opened": "import os\nfiles = []\nwhile True: files.append(os.open('/dev/null', 0))",
    "a trace function that fails": "import sys; sys.settrace(lambda *a: 1/0); sys.setprofile(lambda *a: 1/0)",
    "modules thrown out": "import sys; sys.modules.clear()",
    "recursion without end": "def f(): f()\nf()",
    "recursion without a limit": "import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
    "a deep repr": "l = []\nfor _ in range(10**6): l = [l]\nl",
    "30 GB at once": "a = 'x' * (30 << 30)",
    "30 GB of integers": "a = list(range(4 << 30))",
    "200 MB printed": "print('x' * 200_000_000)",
    "200 MB printed in lines": "import sys\nfor _ in range(2000): sys.stdout.write('y' * 99_999 + '\\n')",
    "a raw flood": "import os; os.system('timeout 0.3 yes')",
    "a deleted directory": "import os; d = os.getcwd(); os.chdir('/'); os.rmdir(d)",  # only an empty one
    "exit handlers that fail": "import atexit; atexit.register(lambda: 1/0)",
    "a finaliser that fails": "class F:\n    def __del__(self): raise SystemExit\nllm_query = F()",
}  # fmt: skip


MUTILATION = {
    "a limit of no files": "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))",
    "a limit of no memory": "import resource; resource.setrlimit(resource.RLIMIT_AS, (0, 0))",
    "builtins broken": "import builtins\ndel builtins.any, builtins.list, builtins.dict, builtins.len, builtins.isinstance",
    "the least recursion limit": "import sys; sys.setrecursionlimit(20)",
    "the standard library broken": "import sys\nfor m in list(sys.modules.values()):\n"
                                   "    if m not in (sys, __builtins__) and m.__name__ != '__main__': vars(m).clear()",
}  # fmt: skip


FORK_BOMBS = {
    "plain": "import os\nwhile True: os.fork()",
    "that goes on at the limit": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "that catches everything": "import os\nwhile True:\n    try: os.fork()\n    except BaseException: pass",
    "that prints": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n    os.write(1, b'boom\\n' * 100)",
    "in sessions of their own": "import os\nwhile True:\n    try:\n        if os.fork() == 0: os.setsid()\n"
                                "    except OSError: pass",
    "of a shell": "import os; os.system('f() { f | f & f; }; f')",
    "whose children only sleep": "import os, time\nwhile True:\n    if os.fork() == 0: time.sleep(3600)",
}  # fmt: skip


THREAD_BOMB = """
    import threading, time
    def sleep(): time.sleep(3600)
    while True: threading.Thread(target=sleep, daemon=True).start()
    """


MEMORY_BOMBS = {
    "large pieces": "l = []\nwhile True: l.append(bytearray(1 << 20))",
    "small pieces": "l = []\nwhile True: l.append([len(l)] * 10)",
    "tiny pieces": "l = {}\nwhile True: l[len(l)] = str(len(l))",
    "a doubling string": "l = 'x'\nwhile True: l += l",
    "locals": "def f():\n    l = []\n    while True: l.append(b'x' * 1000)\nf()",
    "mappings": "import mmap\nl = []\nwhile True: l.append(mmap.mmap(-1, 1 << 20))",
}


class Robustness(Suite):
    """Level robustness: deadlines, deaths, floods, cancelling and closing."""

    level = "robustness"

    def intact(self, repl: Cells) -> None:
        """After a cell that was killed or died: all that was there before, or the contexts at least."""
        if "rollback" in self.capabilities:
            assert_intact(repl)
        else:
            assert repl.value("context") == "the context"

    # --- one cell, and all that was there before -----------------------------------------------------

    def test_a_deadline_ends_a_cell_and_not_the_session(self, repl: Cells) -> None:
        code = "import time\nend = time.monotonic() + 5\nwhile time.monotonic() < end: pass"
        error = repl.error(code, timeout=0.3)
        assert (error.kind, error.type) == ("timeout", "CellTimeout")
        assert repl.ok("print('on')").stdout == "on\n"

    def test_a_cell_without_a_deadline_may_take_its_time(self, repl: Cells) -> None:
        assert repl.repl.execute("import time; time.sleep(0.5); 'done'").value == "done"

    @pytest.mark.parametrize("what", LOOPS)
    @requires("interrupt")
    def test_a_timeout_interrupts_and_keeps_the_namespace(
        self, repl: Cells, what: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(environment, "INTERRUPT_GRACE", PATIENCE)  # this is not about who is quick
        prepare(repl)
        error = repl.error(f"own = 5\n{LOOPS[what]}", timeout=0.5)
        assert (error.kind, error.type) == ("timeout", "CellTimeout")
        assert "0.5 s" in error.message
        assert '"<cell 2>", line' in error.traceback
        assert repl.value("own") == 5
        self.intact(repl)

    @pytest.mark.parametrize("what", DEAF)
    @requires("cpython")
    def test_a_cell_that_does_not_heed_an_interrupt_is_killed_and_rolled_back(
        self, repl: Cells, what: str
    ) -> None:
        prepare(repl)
        result = repl.run(f"own = 5\nprint('begun')\n{DEAF[what]}", timeout=0.5)
        assert result.error is not None
        assert (result.error.kind, result.error.type) == ("timeout", "CellTimeout")
        assert result.stdout == "begun\n"
        assert repl.value("'own' in globals()") is False
        self.intact(repl)

    @pytest.mark.parametrize("what", DEATHS)
    @requires("cpython")
    def test_a_death_costs_only_its_cell(self, repl: Cells, what: str) -> None:
        prepare(repl)
        result = repl.run(f"own = 5\nprint('last words')\n{DEATHS[what]}")
        assert result.error is not None
        assert (result.error.kind, result.error.type) == ("crash", "CellCrash")
        assert result.stdout == "last words\n"
        assert repl.value("'own' in globals()") is False
        self.intact(repl)

    @pytest.mark.parametrize("what", DEATHS)
    @requires("cpython")
    def test_the_first_cell_may_die(self, repl: Cells, what: str) -> None:
        assert repl.error(DEATHS[what]).kind == "crash"
        assert repl.ok("print('on')").stdout == "on\n"

    @requires("cpython", "processes")
    def test_a_program_that_took_the_cells_place_ends_with_its_time(self, repl: Cells) -> None:
        prepare(repl)
        assert repl.error("import os; os.execv('/bin/sleep', ['sleep', '3600'])", timeout=0.5).kind in (
            "timeout",
            "crash",
        )
        self.intact(repl)

    @requires("cpython")
    def test_the_message_of_a_death_says_how_it_came(self, repl: Cells) -> None:
        assert "exit code 3" in repl.error(DEATHS["os._exit"]).message
        assert "signal 11" in repl.error(DEATHS["a segmentation fault"]).message
        assert "signal 9" in repl.error(DEATHS["SIGKILL"]).message

    @pytest.mark.parametrize("what", HARM)
    @requires("cpython")
    def test_harm_costs_at_most_its_cell(self, repl: Cells, what: str) -> None:
        if "everyone" in what or "parent" in what:
            self.require("isolation")  # without any wall it is the user's own processes that would end
            self.need(repl, "signals")
        if "GB" in what:
            self.require("isolation")  # and the user's own memory
        prepare(repl)
        repl.run(HARM[what], timeout=3)
        self.intact(repl)
        repl.run("import os; os._exit(1)")  # what the harm did to the copy shows when the copy is needed
        expected = [1, "the context"] if "rollback" in self.capabilities else [0, "the context"]
        assert repl.value("[globals().get('number', 0), context]") == expected

    @pytest.mark.parametrize("what", MUTILATION)
    @requires("cpython")
    def test_a_session_that_mutilates_itself_begins_anew_with_its_contexts(
        self, repl: Cells, what: str
    ) -> None:
        """All it may lose are its own variables, and it is told."""
        prepare(repl)
        lost: list[str] = []

        def works() -> bool:
            result = repl.run("[number if 'number' in globals() else None, context]", timeout=3)
            lost.extend(result.lost)
            gone = "every variable but the contexts" in lost  # else, whatever else is lost, they are there
            return bool(result.value == [None if gone else 1, "the context"])

        lost.extend(repl.run(MUTILATION[what], timeout=3).lost)
        assert eventually(works)

    # --- again and again --------------------------------------------------------------------------------

    @requires("cpython")
    def test_two_deaths_in_a_row_cost_two_cells(self, repl: Cells) -> None:
        prepare(repl)
        for _ in range(2):
            assert repl.error("import os; os._exit(1)").kind == "crash"
        self.intact(repl)

    @requires("cpython", "rollback")
    def test_many_deaths_and_timeouts_in_turn_cost_only_themselves(self, repl: Cells) -> None:
        repl.ok("n = 0")
        for number in range(1, 11):
            assert repl.error("n = -1; import os; os._exit(1)").kind == "crash"
            assert (
                repl.error(
                    "import signal; signal.signal(2, signal.SIG_IGN)\nn = -1\nwhile True: pass", 0.05
                ).kind
                == "timeout"
            )
            assert repl.error("while True: pass", timeout=0.05).kind == "timeout"
            assert repl.value("n += 1\nn") == number

    @requires("cpython")
    def test_what_was_printed_before_a_death_is_not_printed_again(self, repl: Cells) -> None:
        repl.ok("print('earlier', end='')")
        assert repl.run("print('dying', end='', flush=True)\nimport os; os._exit(1)").stdout == "dying"
        assert repl.ok("print('later')").stdout == "later\n"

    @requires("cpython", "rollback")
    def test_cells_keep_their_numbers_after_a_death(self, repl: Cells) -> None:
        repl.run("import os; os._exit(1)")
        assert '"<cell 2>", line 1' in repl.error("1/0").traceback

    @requires("cpython", "rollback")
    def test_random_numbers_differ_after_a_rollback_from_those_of_the_dead(self, repl: Cells) -> None:
        repl.ok("import uuid, os")
        dead = repl.run("print(uuid.uuid4().hex)\nos._exit(1)").stdout.strip()
        assert repl.value("uuid.uuid4().hex") != dead

    @requires("cpython", "rollback")
    def test_awaiting_works_after_a_rollback(self, repl: Cells) -> None:
        repl.ok("import asyncio, os\nasync def f(): return 5\nawait f()")
        repl.run("await asyncio.sleep(0); os._exit(1)")
        assert repl.value("await asyncio.sleep(0.01, await f())") == 5

    @requires("cpython", "rollback", "threads")
    def test_asyncio_threads_work_after_a_rollback(self, repl: Cells) -> None:
        repl.ok("import asyncio, os\nawait asyncio.to_thread(abs, -1)")
        repl.run("os._exit(1)")
        assert repl.value("await asyncio.to_thread(abs, -5)", timeout=10) == 5

    @requires("cpython", "rollback", "threads")
    def test_new_threads_work_after_a_rollback(self, repl: Cells) -> None:
        repl.ok(
            "import threading, time, os\nthreading.Thread(target=time.sleep, args=[3600], daemon=True).start()"
        )
        repl.run("os._exit(1)")
        code = "r = []\nt = threading.Thread(target=lambda: r.append(1)); t.start(); t.join(10)\n[r, threading.active_count()]"
        assert repl.value(code) == [[1], 1]

    @requires("interrupt")
    def test_an_interrupted_await_does_not_go_on_in_the_next_cell(self, repl: Cells) -> None:
        repl.ok("import asyncio\nticks = 0")
        repl.error("while True:\n    await asyncio.sleep(0.01)\n    ticks += 1", timeout=0.5)
        assert repl.value("before = ticks\nawait asyncio.sleep(0.2)\nticks - before") == 0

    @requires("cpython", "rollback")
    async def test_calls_work_after_a_rollback(self, sandbox: Sandbox) -> None:
        for _ in range(3):
            assert await sandbox.value("llm_query('a')") == "echo:a"
            assert (await sandbox.error("llm_query('b')\nimport os; os._exit(1)")).kind == "crash"
        assert await sandbox.value("llm_query_batched(['c'])") == ["echo:c"]

    async def test_calls_work_after_an_interrupted_call(self, open_sandbox: OpenSandbox) -> None:
        async def serve(call: object, texts: list[str]) -> list[str]:
            return texts

        sandbox = await open_sandbox(serve)
        for _ in range(20):
            assert (await sandbox.error("while True: llm_query('a')", timeout=0.02)).kind == "timeout"
            assert await sandbox.value("llm_query('b')") == "b"

    @requires("cpython")
    def test_a_context_can_be_added_after_a_death(self, repl: Cells) -> None:
        repl.repl.add_context("first")
        repl.run("import os; os._exit(1)")
        repl.repl.add_context("x" * 100_000)
        assert repl.value("[context, len(context_1)]") == ["first", 100_000]

    # --- what cannot be carried over --------------------------------------------------------------------

    @requires("cpython", "rollback", "threads")
    def test_lost_threads_are_named(self, repl: Cells) -> None:
        repl.ok(
            "import threading, time\nthreading.Thread(target=time.sleep, args=[3600], name='ticker', daemon=True).start()"
        )
        assert repl.ok("pass").lost == ()
        assert repl.run("import os; os._exit(1)").lost == ("thread ticker",)
        assert repl.ok("pass").lost == ()

    @requires("cpython", "rollback", "processes", "isolation")
    def test_without_a_copy_the_loss_is_said_and_the_contexts_are_there(self, repl: Cells) -> None:
        self.need(repl, "signals")
        prepare(repl)
        repl.repl.add_context(["another"])
        result = repl.run("import os; os.kill(-1, 9); os._exit(1)")
        assert result.error is not None
        if repl.value("'number' in globals()"):  # the copy got away
            assert result.lost == ()
        else:
            assert result.lost == ("every variable but the contexts",)
        assert repl.value("[context, context_1]") == ["the context", ["another"]]

    @requires("cpython", "rollback", "threads")
    def test_a_death_between_cells_is_told_with_the_next_cell(self, repl: Cells) -> None:
        prepare(repl)
        repl.ok("import threading, os, time\nthreading.Timer(0.2, os._exit, [1]).start()")
        results: list[REPLResult] = []

        def told() -> bool:
            results.append(repl.run("number"))
            return bool(results[-1].lost or results[-1].error)

        assert eventually(told)
        self.intact(repl)
        assert repl.ok("pass").lost == ()

    @requires("cpython", "threads", "isolation")
    def test_a_death_between_cells_without_a_copy_leaves_the_contexts(self, repl: Cells) -> None:
        self.need(repl, "signals")
        prepare(repl)
        repl.ok(
            """
            import os, threading
            def end():
                os.kill(-1, 9)
                os._exit(1)
            threading.Timer(0.3, end).start()
            """
        )
        time.sleep(1.5)
        result = repl.run("pass")
        assert result.lost or result.error
        assert repl.value("context") == "the context"

    # --- bombs ---------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("what", FORK_BOMBS)
    @requires("cpython", "processes", "rollback", "isolation")
    def test_a_fork_bomb_costs_its_cell_and_goes_out(self, repl: Cells, what: str) -> None:
        self.need(repl, "signals")
        prepare(repl)
        repl.run(FORK_BOMBS[what], timeout=1)
        assert eventually(lambda: repl.ok("print(number)").stdout == "1\n", 20)
        self.intact(repl)
        code = "import subprocess; subprocess.run(['echo', 'room'], capture_output=True, text=True).stdout"
        assert eventually(lambda: repl.run(code).value == "room\n", 20)

    @requires("cpython", "processes", "rollback")
    def test_a_bomb_in_the_background_does_not_keep_the_next_cells_from_running(self, repl: Cells) -> None:
        self.need(repl, "signals")
        prepare(repl)
        repl.run(
            "import os\nif os.fork() == 0:\n    while True:\n        try: os.fork()\n        except OSError: pass"
        )
        for _ in range(5):
            assert repl.value("number") == 1
        self.intact(repl)

    @requires("cpython", "threads", "isolation")
    def test_a_bomb_of_threads_costs_its_cell(self, repl: Cells) -> None:
        prepare(repl)
        assert "thread" in repl.error(THREAD_BOMB).message
        self.intact(repl)

    @requires("cpython")
    def test_a_death_while_there_is_no_room_for_a_process_does_not_end_the_session(
        self,
        open_cells: OpenCells,
    ) -> None:
        for _ in range(10):
            repl = open_cells()
            repl.ok("import os, resource; resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))")
            repl.ok("pass")
            assert repl.error("os._exit(1)", timeout=10).kind == "crash"
            assert repl.value("1", timeout=10) == 1
            repl.repl.close()

    @pytest.mark.parametrize("what", MEMORY_BOMBS)
    def test_memory_beyond_the_limit_is_an_error_of_its_cell(self, open_cells: OpenCells, what: str) -> None:
        repl = open_cells("memory")
        prepare(repl)
        error = repl.error(MEMORY_BOMBS[what], timeout=30)
        assert error.kind in ("exception", "crash")
        repl.run("l = None")
        self.intact(repl)
        assert repl.value("len(bytes(50 << 20))") == 50 << 20

    @requires("cpython")
    def test_a_file_larger_than_its_limit_is_an_os_error(self, open_cells: OpenCells) -> None:
        repl = open_cells("file size")
        prepare(repl)
        assert (
            repl.error("f = open('big', 'wb', 0)\nfor _ in range(3): f.write(bytes(1 << 20))").type
            == "OSError"
        )
        assert repl.value("import os; os.path.getsize('big')") == 1 << 20
        self.intact(repl)

    @requires("cpython")
    def test_open_files_are_limited(self, open_cells: OpenCells) -> None:
        repl = open_cells("open files")
        assert (
            repl.error(
                "import os\nfiles = []\nfor _ in range(100): files.append(os.open('/dev/null', 0))"
            ).type
            == "OSError"
        )
        assert repl.value("len(files)") in range(32, 64)

    # --- cancelling and closing -------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        "code",
        ["while True: pass", "import itertools; 1 in itertools.repeat(0)", "import time; time.sleep(3600)"],
    )
    @requires("cpython", "rollback")
    async def test_a_cancelled_cell_leaves_a_session_that_works_at_once(
        self, sandbox: Sandbox, code: str
    ) -> None:
        await sandbox.ok("kept = 1")
        for number in range(3):
            task = asyncio.create_task(sandbox.run(f"own = {number}\nprint('old')\n{code}", timeout=60))
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            result = await sandbox.ok(f"print('new', {number}, kept)")
            assert result.stdout == f"new {number} 1\n"

    async def test_a_cell_that_is_cancelled_before_it_begins_changes_nothing(self, sandbox: Sandbox) -> None:
        await sandbox.ok("x = 1")
        task = asyncio.create_task(sandbox.run("x = 2"))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await sandbox.value("x") == 1

    async def test_cancelling_a_cell_that_waits_for_its_turn_leaves_the_running_one_alone(
        self,
        sandbox: Sandbox,
    ) -> None:
        first = asyncio.create_task(sandbox.run("import time\ntime.sleep(0.3)\n'done'"))
        second = asyncio.create_task(sandbox.run("x = 1"))
        await asyncio.sleep(0.1)
        second.cancel()
        assert (await first).value == "done"
        assert await sandbox.value("'x' in globals()") is False

    async def test_closing_twice_and_side_by_side_is_closing(self, sandbox: Sandbox) -> None:
        await asyncio.gather(sandbox.env.close(), sandbox.env.close())
        await sandbox.env.close()

    async def test_closing_ends_a_running_cell_with_a_sandbox_error(self, sandbox: Sandbox) -> None:
        task = asyncio.create_task(sandbox.run("while True: pass"))
        await asyncio.sleep(0.1)
        await sandbox.env.close()
        with pytest.raises(SandboxError):
            await task

    async def test_use_after_close_is_a_sandbox_error(self, sandbox: Sandbox) -> None:
        await sandbox.env.close()
        with pytest.raises(SandboxError):
            await sandbox.run("1")
        with pytest.raises(SandboxError):
            await sandbox.env.add_context("x")
        with pytest.raises(SandboxError):
            await sandbox.env.add_context("x" * 1_000_000)

    async def test_use_before_start_is_a_sandbox_error(self, environment: BaseEnv) -> None:
        env = environment.fresh()
        with pytest.raises(SandboxError):
            await env.execute("1")
        with pytest.raises(SandboxError):
            await env.add_context("x")
        await env.close()

    def test_a_repl_that_is_not_open_says_so(self, environment: BaseEnv) -> None:
        session = open_repl(environment)
        with pytest.raises(RLMError, match="not open"):
            session.execute("1")
        with session:
            assert session.execute("1", timeout=30).value == 1
        session.close()
        with pytest.raises(RLMError, match="not open"):
            session.execute("1")

    def test_a_context_that_does_not_fit_into_the_memory_limit_says_so(self, open_cells: OpenCells) -> None:
        repl = open_cells("memory")
        with pytest.raises((ConfigError, SandboxError), match="memory") as caught:
            repl.repl.add_context("x" * 400_000_000)
        if isinstance(caught.value, ConfigError):  # else the limit is of the whole sandbox, and it is gone
            assert repl.value("1 + 1") == 2

"""Runs: variables that are saved, and what is there of them in another sandbox, or in another process."""

# ruff: noqa: E501 (a table of cells reads best with one to a line)

from __future__ import annotations

import contextlib
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rlm_scripted import ScriptedLM

from .. import environment as environments
from .. import hostloop
from ..client import Message
from ..conversation import Conversation
from ..environment import BaseEnv, SupportsSnapshot
from ..errors import ConfigError, SandboxError, SandboxLost
from ..events import CellStarted, Restored
from ..rlm import RLM
from ..snapshot import Snapshot
from ..tools import Tools
from .conversations import script
from .scripts import cell
from .sessions import OpenRLM, OpenSandbox, Sandbox
from .suite import Suite, requires

KEPT: dict[str, tuple[str, str, Any]] = {
    "a function sees what is rebound later": ("x = 1\ndef f(n=2): return x + n", "x = 10\nf()", 12),
    "functions call one another": ("def even(n): return n == 0 or odd(n - 1)\ndef odd(n): return n != 0 and even(n - 1)", "even(10)", True),
    "a function may be defined anew": ("def g(): return 1\ndef h(): return g()", "def g(): return 2\nh()", 2),
    "lambdas": ("k = 2\nfs = [lambda i=i: i * k for i in range(3)]", "k = 3\n[f() for f in fs]", [0, 3, 6]),
    "a closure": ("def counter():\n    n = 0\n    def up():\n        nonlocal n\n        n += 1\n        return n\n    return up\nup = counter()\nup()", "up()", 2),
    "a class and what is made of it": ("class C:\n    def __init__(self, v): self.v = v\n    def get(self): return self.v + x\nc = C(5)", "x = 20\n[isinstance(c, C), c.get(), C(1).get(), type(c) is C]", [True, 25, 21, True]),
    "a subclass": ("class D(C):\n    def get(self): return super().get() * 2\nsub = D(1)", "x = 4\n[isinstance(sub, C), sub.get()]", [True, 10]),
    "a bound method": ("method = c.get", "x = 0\nc.v = 7\n[method(), method.__self__ is c]", [7, True]),
    "a data class": ("import dataclasses\n@dataclasses.dataclass\nclass P:\n    n: int\n    more: list = dataclasses.field(default_factory=list)\np = P(1)", "[p == P(1), repr(p)]", [True, "P(n=1, more=[])"]),
    "an enum": ("import enum\nclass Colour(enum.Enum):\n    RED = 1\nred = Colour.RED", "[red is Colour.RED, Colour(1) is red]", [True, True]),
    "a named tuple": ("import collections\nT = collections.namedtuple('T', 'a b')\nt = T(1, 2)", "[t.b, type(t) is T]", [2, True]),
    "an exception": ("class E(ValueError): pass\ntry: raise E('said')\nexcept E as error: caught = error", "[type(caught) is E, str(caught)]", [True, "said"]),
    "names of one object": ("a = []\nb = [a, a]\nd = {'a': a}\ndef add(): a.append(1)", "add()\n[b, d['a'] is a, b[0] is b[1]]", [[[1], [1]], True, True]),
    "what holds itself": ("r = []\nr.append(r)\nn = {}\nn['n'] = n", "[r[0] is r, n['n'] is n]", [True, True]),
    "a function with a cache": ("import functools\n@functools.lru_cache\ndef fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)\nfib(9)", "fib(30)", 832040),
    "modules": ("import math as m, os.path", "[m.floor(2.5), os.path.join('a', 'b')]", [2, "a/b"]),
    "types of the library": ("import datetime, decimal, re\nthings = [datetime.date(2024, 2, 29), decimal.Decimal('1.10'), re.compile('a+'), {1, 2}, (1,), b'x', 10**30, 1j, range(3)]", "repr(things)", "[datetime.date(2024, 2, 29), Decimal('1.10'), re.compile('a+'), {1, 2}, (1,), b'x', 1000000000000000000000000000000, 1j, range(0, 3)]"),
    "the framework's own functions": ("ask = llm_query\ndef use(p): return llm_query(p)", "[ask is llm_query, ask('a'), use('b')]", [True, "echo:a", "echo:b"]),
}  # fmt: skip
"""What cells make, how it is seen that it is still there, and what is then seen."""

UNSAVABLE = {
    "lock": "import threading; lock = threading.Lock()",
    "running": "running = (i for i in range(3))",
    "file": "import os; file = open(os.devnull, 'w')",
    "among": "among = [1, {'lock': threading.Lock()}]",
    "leaves": "class L:\n    def __reduce__(self): raise SystemExit(1)\nleaves = L()",
    "refuses": "class R:\n    def __reduce__(self): raise ValueError('not me')\nrefuses = R()",
    "deep": "deep = []\nfor _ in range(100_000): deep = [deep]",
}

HARM = {
    "exits": "import os; os._exit(1)",
    "raises an exit": "raise SystemExit(1)",
    "never ends": "while True: pass",
    "ends the process": "import os; os.kill(os.getpid(), 9)",
}
"""What an object may do when it is saved, or when it comes back."""


class Snapshots(Suite):
    """Level runs: variables that outlive their sandbox."""

    level = "runs"

    @staticmethod
    async def saved(sandbox: Sandbox) -> Snapshot:
        """The variables of a sandbox."""
        assert isinstance(sandbox.env, SupportsSnapshot)
        return await sandbox.env.snapshot()

    @staticmethod
    async def restore(sandbox: Sandbox, saved: Snapshot) -> None:
        """Put variables into a sandbox."""
        assert isinstance(sandbox.env, SupportsSnapshot)
        await sandbox.env.restore(saved)

    async def assert_usable(self, sandbox: Sandbox) -> None:
        """After something that had to be killed, perhaps: ``x`` is 1, unless a death costs the variables."""
        kept = 1 if "rollback" in self.capabilities else None
        assert await sandbox.value("[globals().get('x'), context]") in ([1, "c"], [kept, "c"])
        assert await sandbox.value("llm_query('on')") == "echo:on"

    # --- from one sandbox to another ----------------------------------------------------------------------

    @requires("snapshots")
    async def test_variables_are_what_they_were_in_another_sandbox(self, open_sandbox: OpenSandbox) -> None:
        one, other = await open_sandbox(), await open_sandbox()
        for make, _, _ in KEPT.values():
            await one.ok(make)
        saved = await self.saved(one)
        assert saved.lost == ()
        await one.env.close()
        await self.restore(other, saved)
        found = {what: await other.value(look) for what, (_, look, _) in KEPT.items()}
        assert found == {what: seen for what, (_, _, seen) in KEPT.items()}

    @requires("snapshots")
    async def test_saving_changes_nothing_where_the_variables_are(self, open_sandbox: OpenSandbox) -> None:
        sandbox = await open_sandbox()
        await sandbox.env.add_context("c")
        await sandbox.ok("x, l = 1, []\ndef f(): l.append(context); return l")
        for _ in range(2):
            await self.saved(sandbox)
        assert await sandbox.value("[x, f() is l, l]") == [1, True, ["c"]]
        assert await sandbox.value("sorted(SHOW_VARS())") == ["answer", "f", "l", "x"]

    @requires("snapshots")
    async def test_what_is_restored_can_be_saved_again(self, open_sandbox: OpenSandbox) -> None:
        first = await open_sandbox()
        await first.ok("class C: n = 1\nc = C()\ndef f(): return [c.n, y]")
        second = await open_sandbox()
        await self.restore(second, await self.saved(first))
        await second.ok("y = 2\nC.n = 3")
        await self.restore(first, await self.saved(second))
        assert await first.value("[f(), isinstance(c, C)]") == [[3, 2], True]

    @requires("snapshots")
    async def test_contexts_histories_and_tools_are_the_new_sandboxs_own(
        self, open_sandbox: OpenSandbox
    ) -> None:
        """What the host has given is not saved but named, so it costs nothing and is what there is then."""
        tools = Tools.parse({"get": lambda: "got"})
        one, other = await open_sandbox(tools=tools), await open_sandbox(tools=tools)
        for number, sandbox in enumerate((one, other)):
            await sandbox.env.add_context([f"of {number}"] * 100_000)
        await one.ok(
            "mine = [context, get, llm_query]\nlines = context\ndef first(): return [context[0], lines[0]]"
        )
        saved = await self.saved(one)
        assert len(saved.data) < 10_000
        await self.restore(other, saved)
        assert await other.value("[mine[0] is context, mine[1] is get, lines is context_0]") == [True] * 3
        assert await other.value("first()") == ["of 1", "of 1"]

    @requires("snapshots")
    async def test_an_answer_is_no_variable_that_is_saved(self, open_sandbox: OpenSandbox) -> None:
        one, other = await open_sandbox(), await open_sandbox()
        await one.ok("answer['content'], answer['ready'] = 'mine', True")
        await self.restore(other, await self.saved(one))
        result = await other.ok("answer")
        assert (result.final_answer, result.value) == (None, {"content": "", "ready": False})

    @requires("snapshots")
    async def test_variables_of_another_python_are_a_sandbox_error(self, sandbox: Sandbox) -> None:
        await sandbox.env.add_context("c")
        await sandbox.ok("x = 1")
        saved = await self.saved(sandbox)
        with pytest.raises(SandboxError, match=r"Python 2\.7\.18"):
            await self.restore(sandbox, Snapshot("2.7.18", saved.data))
        await self.assert_usable(sandbox)

    # --- what cannot be saved -----------------------------------------------------------------------------

    @requires("snapshots", "cpython")
    async def test_what_cannot_be_saved_is_named_and_all_else_is_saved(
        self, open_sandbox: OpenSandbox
    ) -> None:
        one, other = await open_sandbox(), await open_sandbox()
        await one.ok("x = 1")
        for make in UNSAVABLE.values():
            await one.ok(make)
        saved = await self.saved(one)
        assert sorted(name.partition(" ")[0] for name in saved.lost) == sorted(UNSAVABLE)
        assert any("refuses (R: not me)" in name for name in saved.lost)
        await self.restore(other, saved)
        assert await other.value("[x, [n for n in ('lock', 'deep') if n in globals()]]") == [1, []]

    @requires("snapshots", "files")
    async def test_files_are_not_saved_which_is_said(self, sandbox: Sandbox) -> None:
        await sandbox.ok("open('notes.txt', 'w').close()")
        assert (await self.saved(sandbox)).lost == ("what is in the working directory: notes.txt",)

    @pytest.mark.parametrize("what", HARM)
    @requires("snapshots", "cpython")
    async def test_an_object_that_does_harm_when_it_is_saved_costs_the_snapshot_alone(
        self, sandbox: Sandbox, what: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(environments, "SAVE_TIMEOUT", 0.5)
        await sandbox.env.add_context("c")
        await sandbox.ok("x = 1")
        await sandbox.ok(f"class H:\n    def __reduce__(self):\n        {HARM[what]}\nh = H()")
        with contextlib.suppress(SandboxError):
            assert (await self.saved(sandbox)).lost[0].startswith("h (H: ")
        await self.assert_usable(sandbox)
        await sandbox.ok("globals().pop('h', None)")
        assert (await self.saved(sandbox)).lost == ()

    @requires("snapshots", "cpython")
    async def test_a_report_that_a_cell_has_forged_costs_no_more_than_the_snapshot(
        self, sandbox: Sandbox
    ) -> None:
        forge = """
            import gc
            for thing in gc.get_objects():
                if type(thing).__name__ == 'Keeper': thing.save = lambda limit: (b'data', {0})
            """
        await sandbox.env.add_context("c")
        await sandbox.ok("x = 1")
        await self.saved(sandbox)
        for report in ("5", "{'a': 1}", "'text'", "[5, None]", "['x' * 1000] * 900"):
            await sandbox.ok(forge.format(report))
            with contextlib.suppress(SandboxError):
                assert sum(map(len, (await self.saved(sandbox)).lost)) < 100_000
        await self.assert_usable(sandbox)

    # --- what cannot be restored --------------------------------------------------------------------------

    @requires("snapshots")
    async def test_bytes_that_are_no_variables_are_a_sandbox_error_and_change_nothing(
        self, sandbox: Sandbox
    ) -> None:
        await sandbox.env.add_context("c")
        await sandbox.ok("x = 1")
        saved = await self.saved(sandbox)
        no_variables = [pickle.dumps(value) for value in (5, [1], None, {1: 2}, {"y": 1, None: 2})]
        for data in (b"", b"\0", b"garbage", saved.data[:-2], b"\x80\x04", *no_variables):
            with pytest.raises(SandboxError, match="cannot be restored"):
                await self.restore(sandbox, Snapshot(saved.python, data))
        await self.assert_usable(sandbox)
        assert await sandbox.value("'y' in globals()") is False

    @pytest.mark.parametrize("what", HARM)
    @requires("snapshots", "cpython")
    async def test_variables_that_do_harm_when_they_come_back_leave_the_session_usable(
        self, open_sandbox: OpenSandbox, what: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one, other = await open_sandbox(), await open_sandbox()
        await one.ok(
            f"def harm():\n    {HARM[what]}\nclass H:\n    def __reduce__(self): return harm, ()\nh = H()"
        )
        saved = await self.saved(one)
        monkeypatch.setattr(environments, "SAVE_TIMEOUT", 0.5)
        await other.env.add_context("c")
        await other.ok("x = 1")
        with pytest.raises(SandboxError, match="cannot be restored"):
            await self.restore(other, saved)
        await self.assert_usable(other)

    # --- the loss of a sandbox ----------------------------------------------------------------------------

    def lose(self, session: Conversation) -> None:
        """End the sandbox of a session, once its variables are saved."""
        self.need_kill()
        hostloop.run(session._saved_by_now())
        assert session._env is not None
        self.kill(session._env)

    @requires("persistence", "snapshots")
    def test_a_sandbox_that_is_lost_costs_the_next_completion_nothing_but_what_is_said(
        self, open_rlm: OpenRLM
    ) -> None:
        seen: list[str] = []

        def second(messages: Sequence[Message]) -> str:
            seen.append(messages[1].content)
            return cell("FINAL([x, f(), answer['ready'], context, context_1, len(history), count()])")

        first = cell(
            "import threading\nx, lock = [1], threading.Lock()\ndef f(): return [x, context]\nanswer['content'], answer['ready'] = 'one', True"
        )
        rlm = open_rlm(script(first, second), custom_tools={"count": lambda: 5})
        with rlm.session() as session:
            session.completion("zero", "first")
            self.lose(session)
            result = session.completion("one", "second")
        assert result.value == [[1], [[1], "zero"], False, "zero", "one", 3, 5]
        assert "The process of this session was lost" in seen[0]
        assert "Lost: lock (lock: " in seen[0]
        restored = [event for event in result.trace if isinstance(event, Restored)]
        assert [event.lost[0].split()[0] for event in restored] == ["lock"]

    @requires("persistence", "snapshots")
    def test_a_sandbox_that_is_lost_in_a_cell_ends_its_completion_and_not_the_session(
        self, open_rlm: OpenRLM
    ) -> None:
        self.need_kill()

        def on_event(event: object) -> None:
            if isinstance(event, CellStarted) and "sleep" in event.code:
                assert session._env is not None
                self.kill(session._env)

        client = script(
            cell("x = 1\nFINAL(x)"), cell("import time; time.sleep(30)"), cell("FINAL([x, len(history_1)])")
        )
        with open_rlm(client, on_event=on_event).session() as session:
            session.completion("c")
            hostloop.run(session._saved_by_now())
            with pytest.raises(SandboxLost):
                session.completion("c")
            assert session.completion("c").value == [1, 3]

    @requires("persistence")
    def test_without_a_snapshot_the_loss_of_a_sandbox_costs_the_variables_and_says_so(
        self, open_rlm: OpenRLM
    ) -> None:
        rlm = open_rlm(
            script(cell("x = 1\nFINAL(x)"), cell("FINAL(['x' in globals(), context])")), snapshots=False
        )
        with rlm.session() as session:
            session.completion("zero")
            self.lose(session)
            result = session.completion(None, "again")
        assert result.value == [False, "zero"]
        [restored] = [event for event in result.trace if isinstance(event, Restored)]
        assert restored.lost == ["every variable but contexts and histories"]

    # --- files --------------------------------------------------------------------------------------------

    @pytest.fixture
    def key(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A key of the test's, so that none is left in the user's home."""
        monkeypatch.setenv("RLM_SNAPSHOT_KEY", "a key of the suite's")

    @requires("persistence", "snapshots")
    def test_a_session_goes_on_in_another_process(
        self, open_rlm: OpenRLM, environment: BaseEnv, host_folder: Path, key: None
    ) -> None:
        path = host_folder / "session"
        first = cell(
            "import threading\nx, lock = [1], threading.Lock()\nclass C: n = 2\ndef f(): return [x, C.n, context]\nFINAL('done')"
        )
        with open_rlm(script(first), max_iterations=7).session() as session:
            session.completion("zero", "first")
            lost = session.save(path)
        assert [name.partition(" ")[0] for name in lost] == ["lock", "the", "the"]
        assert path.stat().st_mode & 0o777 == 0o600
        body = f"""
            from rlm import RLM
            from rlm_scripted import ScriptedLM
            asked = []
            def say(messages):
                asked.append(messages[1].content)
                return {cell("FINAL([f(), isinstance(C(), C), context_1, history[-1]['role'], budget()['iterations']])")!r}
            with RLM.resume({str(path)!r}, environment=environment, backend=ScriptedLM(say)) as session:
                found = session.completion("one", "second").value
            print(json.dumps([found, "first -> done" in asked[0], "lock" in asked[0]]))
            """
        found = json.loads(self.run_host(environment, host_folder, body))
        assert found == [[[[1], 2, "zero"], True, "one", "assistant", 6], True, True]

    @requires("persistence", "snapshots")
    def test_a_saved_session_is_read_by_its_own_key_alone_and_as_it_was_written(
        self, open_rlm: OpenRLM, host_folder: Path, key: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = host_folder / "session"
        with open_rlm(script("FINAL(1)")).session() as session:
            session.completion("zero")
            session.save(path)
        data = path.read_bytes()
        given: dict[str, Any] = {"environment": "local", "backend": ScriptedLM(())}
        RLM.resume(path, **given).close()
        middle = len(data) // 2
        changed = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        for other in (changed, data[:-1], data[:20], data + b"\0", b"", pickle.dumps("no session")):
            path.write_bytes(other)
            with pytest.raises(ConfigError, match="session"):
                RLM.resume(path, **given)
        path.write_bytes(data)
        monkeypatch.setenv("RLM_SNAPSHOT_KEY", "another")
        with pytest.raises(ConfigError, match="was not saved with this user's key"):
            RLM.resume(path, **given)

"""Environments that each break one promise, so that the suite can be seen to notice.

Those that leave something behind note what, in `LITTER`, for whoever tests with them to clear away.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import os
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from rlm import protocol
from rlm.environment import BaseEnv, CellError, Host, Isolation, REPLResult
from rlm.errors import SandboxError
from rlm.snapshot import Snapshot
from rlm.testing import Suite, requires
from rlm.testing.sessions import Cells
from rlm.testing.suite import one_session
from rlm.tools import NO_TOOLS
from rlm_local import LocalREPL

LITTER: list[Callable[[], object]] = []
"""How to clear away what broken environments have left in this process."""


class Altered(LocalREPL):
    """Does something to every result."""

    async def execute(self, code: str, *, timeout: float | None = None) -> REPLResult:
        return self.alter(await super().execute(code, timeout=timeout))

    def alter(self, result: REPLResult) -> REPLResult:
        return result


class TellsNumbersWrong(Altered):
    """Gives values that are not those of the cell."""

    def alter(self, result: REPLResult) -> REPLResult:
        wrong = result.value + 1 if type(result.value) is int else result.value
        return dataclasses.replace(result, value=wrong)


class SwallowsExceptions(Altered):
    """Says that nothing went wrong."""

    def alter(self, result: REPLResult) -> REPLResult:
        return dataclasses.replace(result, error=None)


class GivesNoTraceback(Altered):
    """Keeps to itself where a cell went wrong."""

    def alter(self, result: REPLResult) -> REPLResult:
        error = result.error and dataclasses.replace(result.error, traceback="")
        return dataclasses.replace(result, error=error)


class ReadsAnswersOffTheScreen(Altered):
    """Takes for the answer what a program prints."""

    def alter(self, result: REPLResult) -> REPLResult:
        _, found, rest = result.stdout.partition("FINAL(")
        answer = rest.partition(")")[0] if found else result.final_answer
        return dataclasses.replace(result, final_answer=answer)


class MixesStreams(Altered):
    """Has one stream for output and errors."""

    def alter(self, result: REPLResult) -> REPLResult:
        return dataclasses.replace(result, stdout=result.stdout + result.stderr, stderr="")


class Meddling(LocalREPL):
    """Runs cells of its own between those of its user."""

    async def quietly(self, code: str) -> None:
        await LocalREPL.execute(self, code)
        self._cells -= 1


class ForgetsVariables(Meddling):
    """Begins anew with every cell."""

    async def execute(self, code: str, *, timeout: float | None = None) -> REPLResult:
        await self.quietly("for _name in list(SHOW_VARS()): globals().pop(_name)")
        return await super().execute(code, timeout=timeout)


class ForgetsVariablesWhenInterrupted(Meddling):
    """Begins anew after a timeout."""

    async def execute(self, code: str, *, timeout: float | None = None) -> REPLResult:
        result = await super().execute(code, timeout=timeout)
        if result.error is not None and result.error.kind == "timeout":
            await self.quietly("for _name in list(SHOW_VARS()): globals().pop(_name)")
        return result


class PassesEnvironmentOn(Meddling):
    """Gives cells the host's environment variables."""

    async def execute(self, code: str, *, timeout: float | None = None) -> REPLResult:
        await self.quietly(f"import os; os.environ.update({dict(os.environ)!r})")
        return await super().execute(code, timeout=timeout)


class SharesADirectory(Meddling):
    """Has all sessions work in one directory."""

    folder: ClassVar[str] = ""

    def __init__(self) -> None:
        super().__init__(isolation="none")
        if not SharesADirectory.folder:
            shared = tempfile.TemporaryDirectory(prefix="rlm-shared-")
            SharesADirectory.folder = shared.name
            LITTER.append(shared.cleanup)

    async def start(self, host: Host) -> None:
        await super().start(host)
        await self.quietly(f"import os; os.chdir({self.folder!r})")


class IgnoresDeadlines(LocalREPL):
    """Lets cells compute for ever."""

    async def execute(self, code: str, *, timeout: float | None = None) -> REPLResult:
        return await super().execute(code)


class CountsWaiting(LocalREPL):
    """Takes waiting for a model for computing."""

    async def execute(self, code: str, *, timeout: float | None = None) -> REPLResult:
        cell = asyncio.ensure_future(super().execute(code))
        _, late = await asyncio.wait([cell], timeout=timeout)
        if not late:
            return await cell
        cell.cancel()
        return REPLResult(error=CellError("timeout", "CellTimeout", "too long"))


class EndsWithExit(LocalREPL):
    """Takes a cell's exit for the session's."""

    async def execute(self, code: str, *, timeout: float | None = None) -> REPLResult:
        result = await super().execute(code, timeout=timeout)
        if result.error is not None and result.error.type == "SystemExit":
            await self.close()
        return result


class HasNoRollback(LocalREPL):
    """Loses all variables with a cell that dies, and claims not to."""

    def __init__(self) -> None:
        super().__init__(rollback=False)


class KeepsAllOutput(LocalREPL):
    """Bounds output so late that it is not bounded."""

    def __init__(self) -> None:
        super().__init__(output=512)


class StreamsNothing(LocalREPL):
    """Shows what a cell printed when it has ended."""

    async def start(self, host: Host) -> None:
        await super().start(dataclasses.replace(host, on_output=lambda stream, text: None))


class MendsLineEnds(LocalREPL):
    """Thinks that it knows better how a context's lines end."""

    async def add_context(self, value: Any) -> int:
        return await super().add_context(value.replace("\r\n", "\n") if isinstance(value, str) else value)


class DropsSurrogates(LocalREPL):
    """Loses what UTF-8 cannot say."""

    async def add_context(self, value: Any) -> int:
        return await super().add_context(
            value.encode("utf-8", "ignore").decode() if isinstance(value, str) else value
        )


class ListsTuples(LocalREPL):
    """Sends contexts as JSON, which has no tuples."""

    async def add_context(self, value: Any) -> int:
        return await super().add_context(list(value) if isinstance(value, tuple) else value)


class AnswersBackwards(LocalREPL):
    """Gives the replies of a batch in another order."""

    async def start(self, host: Host) -> None:
        async def serve(call: protocol.Call, texts: list[str]) -> Any:
            return list(await host.serve(call, texts))[::-1]

        await super().start(dataclasses.replace(host, serve=serve))


class ConfusesThreads(LocalREPL):
    """Gives a call the reply of the call before it, when there are several."""

    async def start(self, host: Host) -> None:
        previous: list[Any] = []
        waiting = 0

        async def serve(call: protocol.Call, texts: list[str]) -> Any:
            nonlocal waiting
            waiting += 1
            reply = await host.serve(call, texts)
            await asyncio.sleep(0.001)
            previous.append(reply)
            waiting -= 1
            return previous.pop(0) if not waiting else previous[0]

        await super().start(dataclasses.replace(host, serve=serve))


class ClaimsWalls(LocalREPL):
    """Has no walls at all, and says that it has."""

    def __init__(self) -> None:
        super().__init__(isolation="none")

    def describe_isolation(self, hello: protocol.Hello) -> Isolation:
        return Isolation("brick", ("files", "network", "processes", "signals", "system calls", "user"))


class ClosesOnce(LocalREPL):
    """Cannot be closed twice."""

    closed = False

    async def close(self) -> None:
        if self.closed:
            raise RuntimeError("already closed")
        self.closed = True
        await super().close()


class WorksWhenClosed(LocalREPL):
    """Says nothing when it is used before its start, or after its end."""

    async def execute(self, code: str, *, timeout: float | None = None) -> REPLResult:
        try:
            return await super().execute(code, timeout=timeout)
        except SandboxError:
            return REPLResult()


class LeavesAProcess(LocalREPL):
    """Starts a helper, and forgets it."""

    async def start(self, host: Host) -> None:
        helper = subprocess.Popen(["sleep", "30"], start_new_session=True)
        LITTER.append(lambda: (helper.kill(), helper.wait()))
        await super().start(host)


class LeavesAFile(LocalREPL):
    """Makes a temporary file, and forgets it."""

    async def start(self, host: Host) -> None:
        handle, name = tempfile.mkstemp(prefix="rlm-left-")
        os.close(handle)
        LITTER.append(lambda: os.unlink(name))
        await super().start(host)


class LeavesADescriptor(LocalREPL):
    """Opens a file, and forgets it."""

    async def start(self, host: Host) -> None:
        handle = os.open(os.devnull, os.O_RDONLY)
        LITTER.append(lambda: os.close(handle))
        await super().start(host)


class LeavesAThread(LocalREPL):
    """Starts a thread, and forgets it."""

    async def start(self, host: Host) -> None:
        end = threading.Event()
        thread = threading.Thread(target=end.wait)
        thread.start()
        LITTER.append(lambda: (end.set(), thread.join()))
        await super().start(host)


class PrintsOnTheHost(LocalREPL):
    """Talks about its work."""

    async def execute(self, code: str, *, timeout: float | None = None) -> REPLResult:
        print("running a cell")  # noqa: T201
        return await super().execute(code, timeout=timeout)


class MovesTheHost(LocalREPL):
    """Changes the working directory of the process that uses it."""

    async def execute(self, code: str, *, timeout: float | None = None) -> REPLResult:
        os.chdir("/")
        return await super().execute(code, timeout=timeout)


class ConfusedByAStranger(LocalREPL):
    """Ends a session when anybody says anything to the handler that is not a hello."""

    async def start(self, host: Host) -> None:
        await super().start(host)
        original = host.handler._find_session

        def find(token: str) -> Any:
            found = original(token)
            if found is None:
                for session in tuple(host.handler._sessions.values()):
                    host.handler.close_session(session)
            return found

        host.handler._find_session = find  # type: ignore[method-assign]


class BeginsAnewInWords(LocalREPL):
    """Forgets what it was given, and nothing of what cells have done."""

    async def reset(self) -> None:
        self._given.clear()
        self._counts = dict.fromkeys(self._counts, 0)


class BeginsAnewButForFiles(Meddling):
    """Leaves a file to the next run."""

    async def reset(self) -> None:
        await super().reset()
        await self.quietly("open('mine', 'w').close()")


class BeginsAnewButForWhatRuns(Meddling):
    """Deletes variables where it should begin anew."""

    async def reset(self) -> None:
        await self.quietly("for _name in list(SHOW_VARS()): globals().pop(_name)")


class BeginsAnewWithoutTools(LocalREPL):
    """Gives the first run of a sandbox its tools, and no other."""

    async def assign(self, host: Host) -> None:
        await super().assign(dataclasses.replace(host, tools=NO_TOOLS))


class CountsContextsFromOne(LocalREPL):
    """Has another idea of where to begin."""

    async def add_context(self, value: Any, context_index: int | None = None) -> int:
        return await super().add_context(value, (context_index or 0) + 1)


class ForgetsIndices(LocalREPL):
    """Gives every context the next number, whichever it was to have."""

    async def add_context(self, value: Any, context_index: int | None = None) -> int:
        return await super().add_context(value)


class KeepsTheMessagesThemselves(LocalREPL):
    """Refers to a history where it should copy it."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[Any] = []

    async def add_history(self, message_history: Any, history_index: int | None = None) -> int:
        self.messages.append(message_history)
        return await super().add_history(message_history, history_index)

    async def execute(self, code: str, *, timeout: float | None = None) -> REPLResult:
        for index, messages in enumerate(self.messages):
            await super().add_history(messages, index)
        return await super().execute(code, timeout=timeout)


class RemembersItsFirstHost(LocalREPL):
    """Has all calls answered by whoever was there at the start."""

    async def start(self, host: Host) -> None:
        await super().start(dataclasses.replace(host))


class RestoresNothing(LocalREPL):
    """Says that the variables are there again."""

    async def restore(self, saved: Snapshot) -> None:
        pass


class RestoresWhatItCan(LocalREPL):
    """Keeps to itself that variables could not be restored."""

    async def restore(self, saved: Snapshot) -> None:
        with contextlib.suppress(SandboxError):
            await super().restore(saved)


class SavesInSilence(LocalREPL):
    """Drops what cannot be saved, and does not say so."""

    async def snapshot(self) -> Snapshot:
        return dataclasses.replace(await super().snapshot(), lost=())


class MovesVariablesOut(Meddling):
    """Saves variables at the cost of those that are there."""

    async def snapshot(self) -> Snapshot:
        saved = await super().snapshot()
        await self.quietly("for _name in list(SHOW_VARS()): globals().pop(_name)")
        return saved


class InProcess(BaseEnv):
    """Runs cells in this very process, in a namespace of its own."""

    isolation = Isolation("none", missing=("everything: it is this process",))

    def __init__(self) -> None:
        self.namespace: dict[str, Any] = {}
        self._contexts = 0
        self._open = False

    async def start(self, host: Host) -> None:
        self._open = True
        self.namespace.update(llm_query=print, FINAL=print)

    async def add_context(self, value: Any) -> int:
        self.namespace.setdefault("context", value)
        self.namespace[f"context_{self._contexts}"] = value
        self._contexts += 1
        return self._contexts - 1

    async def execute(self, code: str, *, timeout: float | None = None) -> REPLResult:
        if not self._open:
            raise SandboxError("not open")
        *body, last = code.rstrip().rpartition("\n")
        out, value, error = io.StringIO(), None, None
        with contextlib.redirect_stdout(out):
            try:
                exec("".join(body), self.namespace)
                try:
                    value = eval(last, self.namespace)
                except SyntaxError:
                    exec(last, self.namespace)
            except BaseException as raised:
                kind = type(raised).__name__
                error = CellError("exception", kind, str(raised), traceback.format_exc())
        return REPLResult(stdout=out.getvalue(), value=value, error=error, isolation=self.isolation)

    async def close(self) -> None:
        self._open = False


class SharesANamespace(InProcess):
    """Has one namespace for all sessions."""

    shared: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.namespace = self.shared
        LITTER.append(self.shared.clear)


# --- for tests of reports ---------------------------------------------------------------------------


class SmallSuite(Suite):
    """A test of each outcome."""

    level = "contract"
    capabilities = Suite.capabilities - {"processes"}
    known_failures: ClassVar[dict[str, str]] = {"test_known": "not yet: issue 5"}

    def test_passes(self, repl: Cells) -> None:
        assert repl.value("1") == 1

    @requires("processes")
    def test_is_skipped(self, repl: Cells) -> None:
        raise NotImplementedError

    def test_known(self) -> None:
        assert sys.maxsize < 0


class SmallFailingSuite(SmallSuite):
    """One more, which fails."""

    level = "robustness"

    def test_fails(self, repl: Cells) -> None:
        assert repl.value("1") == 2

    @pytest.mark.parametrize("number", [1, 2])
    async def test_coroutines_run_on_the_cores_loop(self, number: int) -> None:
        await asyncio.sleep(0)
        assert threading.current_thread().name == "rlm-loop"


class TableSuite(Suite):
    """Tables of cells: of one session for all, and of one for each."""

    level = "contract"
    known_failures: ClassVar[dict[str, str]] = {"test_one[known]": "not yet: issue 6"}

    @pytest.mark.parametrize("case", ["first", "second", "fails", "known", "after it", "last"])
    @one_session
    def test_one(self, repl: Cells, case: str) -> None:
        repl.ok(f"seen = [*globals().get('seen', []), {case!r}]")
        assert case not in ("fails", "known")

    @pytest.mark.parametrize("case", ["first", "second"])
    def test_each(self, repl: Cells, case: str) -> None:
        repl.ok(f"seen = [*globals().get('seen', []), {case!r}]")


class Noted(InProcess):
    """Notes of every session that ends what its cells noted."""

    sessions: ClassVar[list[list[str]]] = []

    async def close(self) -> None:
        if self._open:
            self.sessions.append(self.namespace["seen"])
        await super().close()


class Passing(InProcess):
    """Passes what it is asked."""

    suite = "broken_environments:SmallSuite"


class Failing(InProcess):
    """Fails one test."""

    suite = "broken_environments:SmallFailingSuite"

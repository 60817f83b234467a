"""What an environment is, and the one implementation that all workers share.

`BaseEnv` is the whole contract: start, add contexts, execute cells, close. An
environment whose code runs in a Python of its own is a `WorkerEnv`, and only says how
to launch the worker and how to make sure that it is gone. Deadlines, interrupts,
recovery and contexts are here, once.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import dataclasses
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, Self, runtime_checkable

from . import context as contexts
from . import protocol, snapshot
from .errors import ConfigError, SandboxError, SandboxLost
from .handler import LMHandler
from .session import BROKEN, Answers, ServeCalls, Session
from .snapshot import Snapshot
from .tools import NO_TOOLS, Tools
from .wire import FrameError

START_TIMEOUT = 60.0
"""Seconds a worker gets to report."""

INTERRUPT_GRACE = 0.3
"""Seconds between the interrupt that a cell can catch and the kill that it cannot."""

RECOVERY_TIMEOUT = 10.0
"""Seconds a supervisor gets to kill a cell and bring the session back."""

PART = 1 << 20
"""Bytes of a context that travel in one frame, so that no end need hold all of it twice."""

LOAD_TIMEOUT, LOAD_SPEED = 60.0, 1 << 20
"""Seconds a sandbox gets to take a context, and bytes of it for which it gets one more."""

SAVE_TIMEOUT = 60.0
"""Seconds of computing that saving or restoring a session's variables gets."""

EVERYTHING = "every variable but the contexts"
"""What did not survive, when there was nothing to go on from."""

LOSSES, LOSS_CHARACTERS = 60, 400
"""What is told of variables that could not be saved: how many, and how much of each."""

PLAIN_LIMIT = 1 << 20
"""Characters of JSON in a result; a worker sends no more. As objects they are thirty times as much."""

RESET_TIMEOUT = 20.0
"""Seconds a sandbox gets to begin anew."""

AUTOPSY_TIMEOUT = 10.0
"""Seconds an environment gets to find out why its sandbox died."""

WORKER_ENVIRONMENT = {
    "LANG": "C.UTF-8",
    # large strings on huge pages: forking a process that holds 100 MB costs 0.2 ms, not 1.4
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""What a worker is started with, whatever else its environment holds."""


@dataclasses.dataclass(frozen=True)
class Isolation:
    """What stands between a cell and the host."""

    level: str
    """Named by the environment, e.g. ``"bubblewrap"`` or ``"none"``."""
    enforced: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    """What this environment means to enforce and this machine does not."""


@dataclasses.dataclass(frozen=True)
class CellError:
    """Why a cell failed. The session goes on."""

    kind: Literal["exception", "timeout", "crash"]
    type: str
    message: str
    traceback: str = ""


@dataclasses.dataclass(frozen=True)
class REPLResult:
    """What came of one cell."""

    stdout: str = ""
    stderr: str = ""
    echo: str = ""
    """The repr of the last expression, empty when there is none or it is None."""
    value: Any = None
    """The value of the last expression, when it is plain data (what JSON holds without loss)."""
    error: CellError | None = None
    final_answer: str | None = None
    final_value: Any = None
    """The final answer as data, when it is plain data and not a str."""
    draft: str = ""
    """What stands in ``answer["content"]`` without being declared ready."""
    note: str | None = None
    """Something the author of the cell should know."""
    lost: tuple[str, ...] = ()
    """What did not survive the cell: threads, or all variables."""
    execution_time: float = 0.0
    """Seconds, waiting for models included."""
    isolation: Isolation = Isolation("unknown")


@dataclasses.dataclass(frozen=True)
class SandboxInfo:
    """A sandbox that exists, whoever started it."""

    environment: str
    id: str
    state: str
    owner: str
    created: float
    """Seconds since the epoch."""
    abandoned: bool
    """Whether its owner is gone, so that it may be removed."""


@runtime_checkable
class SupportsSweep(Protocol):
    """Environments whose sandboxes could outlive their owner, and how to find those."""

    @classmethod
    async def sandboxes(cls) -> list[SandboxInfo]:
        """All there are. Raises SandboxUnavailable."""
        ...

    @classmethod
    async def sweep(cls) -> list[SandboxInfo]:
        """Remove the abandoned ones, nobody else's, and tell which. Raises SandboxUnavailable."""
        ...


@runtime_checkable
class SupportsPersistence(Protocol):
    """Environments whose session may outlive a completion, for a conversation of several.

    Names and rules of indices are those of the package ``rlms``: what is added without an index gets the
    next one; index N is called ``context_N`` or ``history_N``, and 0 ``context`` or ``history`` as well.
    """

    def update_handler_address(self, address: tuple[str, int]) -> None:
        """From now on another handler serves the session's calls: that of the `Host`, at ``address``."""

    async def add_context(self, value: Any, context_index: int | None = None) -> int:
        """Put a context into the namespace. Returns its index.

        Data out of a saved session comes as a `context.Encoded`: the host does not unpickle it.
        """
        ...

    def get_context_count(self) -> int:
        """One more than the highest index of a context."""
        ...

    async def add_history(
        self, message_history: Sequence[Mapping[str, Any]], history_index: int | None = None
    ) -> int:
        """Put a copy of the messages of a completion, role and content of each, into the namespace."""
        ...

    def get_history_count(self) -> int:
        """One more than the highest index of a history."""
        ...


@runtime_checkable
class SupportsSnapshot(Protocol):
    """Environments whose variables can be saved, and put back into another sandbox of the same kind."""

    async def snapshot(self) -> Snapshot:
        """Save every variable that can be; the others are named in it. Raises SandboxError."""
        ...

    async def restore(self, saved: Snapshot) -> None:
        """Put saved variables back, all or none, over those of the same names. Raises SandboxError."""


@runtime_checkable
class SupportsReset(Protocol):
    """Environments that can begin anew at less than the cost of another one."""

    async def reset(self) -> None:
        """Leave nothing of what was in the session. Raises SandboxError where that cannot be had."""

    async def assign(self, host: Host) -> None:
        """After a `reset`: serve another host, with its tools. Raises SandboxError."""


@dataclasses.dataclass
class Host:
    """What an environment gets from the core when it starts. The core may change it between cells."""

    handler: LMHandler
    serve: ServeCalls
    """Answers a cell's calls: `protocol.Call` and its texts to one answer for each."""
    on_output: Callable[[str, str], None] = lambda stream, text: None
    """Told what a running cell prints: stream and text."""
    run: str = ""
    """The id of the run, for names and labels."""
    tools: Tools = NO_TOOLS
    """What the session is to have besides what every one has."""
    outlives_handler: bool = False
    """Whether the session goes on when the handler ends, and another takes its place."""


class BaseEnv(ABC):
    """A sandbox with one namespace, in which cells run one after another.

    A context becomes ``context_N``, the first one ``context`` as well. Every method runs
    on the core's event loop. The code's failures are results; SandboxError is raised only
    when the sandbox itself fails.
    """

    isolation: Isolation = Isolation("unknown")
    suite: ClassVar[str] = "rlm.testing:EnvironmentSuite"
    """Where its conformance suite is, as ``"module:class"``; that says what it claims to offer."""
    _arguments: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self = super().__new__(cls)
        self._arguments = (args, kwargs)
        return self

    def fresh(self, **changes: Any) -> Self:
        """Another one, not started, with the same settings but for these: an object is a pattern."""
        args, kwargs = self._arguments
        return type(self)(*args, **{**kwargs, **changes})

    @abstractmethod
    async def start(self, host: Host) -> None:
        """Bring the sandbox up, with the host's tools. Raises SandboxUnavailable, saying what to do next."""

    @abstractmethod
    async def add_context(self, value: Any) -> int:
        """Put a context into the namespace. Returns its index N."""

    @abstractmethod
    async def execute(self, code: str, *, timeout: float | None = None) -> REPLResult:
        """Run one cell. ``timeout`` is in seconds of computing; waiting for a call does not count."""

    @abstractmethod
    async def close(self) -> None:
        """Leave nothing behind: processes, files, connections. Safe twice, and half-started."""


class Deadline:
    """Calls back once when a cell has computed for ``seconds``; the clock stands while it waits."""

    def __init__(self, seconds: float | None, expired: Callable[[], None]) -> None:
        self._left = seconds
        self._expired = expired
        self._since = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def run(self) -> None:
        """The cell computes."""
        if self._left is not None and self._timer is None:
            self._since = time.monotonic()
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(self._left, 0.0), self._expire)

    def stand(self) -> None:
        """The cell waits for a model."""
        if self._timer is not None and self._left is not None:
            self._timer.cancel()
            self._timer = None
            self._left -= time.monotonic() - self._since

    def cancel(self) -> None:
        """The cell is done."""
        self.stand()
        self._left = None

    def _expire(self) -> None:
        self._timer = None
        self._left = None
        self._expired()


class WorkerEnv(BaseEnv):
    """An environment that runs `rlm.worker`: subclasses launch it and see it gone.

    ``launch`` starts a worker that will connect to ``session``; ``stop`` is called once
    the session is closed, and returns when nothing of the sandbox is left.
    """

    def __init__(self) -> None:
        self.session: Session | None = None
        self._host: Host | None = None
        self._turn = asyncio.Lock()
        self._pending: dict[int, asyncio.Future[tuple[protocol.Message, list[bytes]]]] = {}
        self._deadline = Deadline(None, lambda: None)
        self._cells = 0
        self._loads = 0
        self._given: dict[tuple[str, ...], _Given] = {}
        self._counts = {"context": 0, "history": 0}
        self._lost: list[str] = []
        self._given_is_gone = False
        self._has_variables = False
        """Whether a cell has ended well since the executor began: else there is nothing it could lose."""
        self._python = ""
        self._interrupted = 0
        self._streams: dict[str, codecs.IncrementalDecoder] = {}
        self._death: SandboxError | None = None
        self._autopsy: asyncio.Task[None] | None = None

    # -- what a launcher says

    @abstractmethod
    async def launch(self, session: Session, handler: LMHandler) -> None:
        """Start a worker for ``session``. It is to connect to ``handler.address``."""

    @abstractmethod
    async def stop(self) -> None:
        """Return when nothing is left. Called after the connection is closed; safe twice."""

    def describe_isolation(self, hello: protocol.Hello) -> Isolation:
        """What the worker's report amounts to. May raise SandboxUnavailable."""
        return Isolation(type(self).__name__, tuple(hello.enforced), tuple(hello.missing))

    async def explain_loss(self, reason: str) -> SandboxError:
        """Why the sandbox is gone, when its stream has ended for ``reason``."""
        return SandboxLost(f"the sandbox is gone: {reason}")

    def share(self, data: bytes) -> bool:
        """Hand over ``data`` without the connection, where the two share a kernel."""
        return False

    # -- the contract

    async def start(self, host: Host) -> None:
        self._host = host
        self.session = host.handler.open_session(self._serve, self._receive)
        self.session.on_waiting = self._waiting
        self.session.outlives_handler = host.outlives_handler
        try:
            await self.launch(self.session, host.handler)
            hello = await self.session.connected(START_TIMEOUT)
            self.isolation = self.describe_isolation(hello)
            self._python = hello.python
        except BaseException:
            await self.close()
            raise
        self.session.lost.add_done_callback(self._connection_lost)
        try:
            await self._take_tools(host.tools)
        except BaseException:
            await self.close()
            raise

    async def add_context(self, value: Any, context_index: int | None = None) -> int:
        return await self._add("context", value, context_index)

    async def execute(self, code: str, *, timeout: float | None = None) -> REPLResult:
        start = time.perf_counter()
        message, parts = await self._run({}, [code.encode("utf-8", "surrogatepass")], timeout)
        return self._result(message, parts, time.perf_counter() - start, timeout)

    async def _run(
        self, header: dict[str, Any], blobs: list[bytes], timeout: float | None
    ) -> tuple[protocol.Result, dict[str, bytes]]:
        """Have the executor do something that may take for ever, or be its end: a cell, or the like."""
        async with self._turn:
            await self._give_again()
            self._cells += 1
            self._streams.clear()
            number = self._cells
            self._deadline = Deadline(timeout, lambda: self._interrupt(number))
            reply = self._ask({"t": "execute", "id": number, **header}, blobs)
            self._deadline.run()
            try:
                message, blobs = await reply
            except asyncio.CancelledError:
                self._send_if_connected({"t": "kill", "id": number})
                raise
            finally:
                self._deadline.cancel()
                self._pending.pop(number, None)
        assert isinstance(message, protocol.Result)
        if len(message.parts) != len(blobs):
            assert self.session is not None
            self.session.abort("a result's parts do not match its blobs")
            raise SandboxLost("the sandbox broke the protocol: a result that does not add up")
        return message, dict(zip(message.parts, blobs, strict=True))

    async def close(self) -> None:
        self._death = self._death or SandboxLost("the sandbox is gone: the session was closed")
        if self._autopsy is not None:
            self._autopsy.cancel()
        if self.session is not None and self._host is not None:
            self._host.handler.close_session(self.session)
        elif self.session is not None:
            self.session.close()
        self._deadline.cancel()
        await self.stop()

    # -- a session of several completions

    def update_handler_address(self, address: tuple[str, int]) -> None:
        """The connection stays as it is, to wherever it was made; the host's handler now owns its end."""
        assert self._host is not None
        assert self.session is not None
        self._host.handler.take_over(self.session)

    def get_context_count(self) -> int:
        """See `SupportsPersistence`."""
        return self._counts["context"]

    async def add_history(
        self, message_history: Sequence[Mapping[str, Any]], history_index: int | None = None
    ) -> int:
        """See `SupportsPersistence`."""
        copied = contexts.encode([dict(message) for message in message_history])
        return await self._add("history", copied, history_index)

    def get_history_count(self) -> int:
        """See `SupportsPersistence`."""
        return self._counts["history"]

    async def snapshot(self) -> Snapshot:
        """See `SupportsSnapshot`. What objects do when they are saved, they do as in a cell."""
        message, parts = await self._run({"keep": "save"}, snapshot.travelling(), SAVE_TIMEOUT)
        self._check_kept(message, parts, "saved")
        if "snapshot" not in parts:
            raise SandboxError("the variables cannot be saved: the sandbox gives none")
        return Snapshot(self._python, parts["snapshot"], _reported(parts.get("value", b"")))

    async def restore(self, saved: Snapshot) -> None:
        """See `SupportsSnapshot`. Saved by another Python, functions cannot be had."""
        if saved.minor_version != Snapshot(self._python, b"").minor_version:
            raise SandboxError(
                f"the variables were saved by Python {saved.python}, and this sandbox has {self._python}"
            )
        blobs = [*snapshot.travelling(), saved.data]
        message, parts = await self._run({"keep": "load"}, blobs, SAVE_TIMEOUT)
        self._check_kept(message, parts, "restored")

    def _check_kept(self, message: protocol.Result, parts: dict[str, bytes], what: str) -> None:
        error = _error(message, _decode(parts.get("traceback", b"")), SAVE_TIMEOUT)
        if error is not None:
            raise SandboxError(f"the variables cannot be {what}: {error.type}: {error.message}")

    async def reset(self) -> None:
        """See `SupportsReset`: all processes are killed, all files removed, another executor is started."""
        async with self._turn:
            assert self.session is not None
            self.session.cancel_calls()
            message = await self._command({"t": "reset"}, RESET_TIMEOUT, "begin anew")
            self.session.cancel_calls()  # also those that were on their way
        if message.error:
            raise SandboxError(f"the sandbox cannot begin anew: {message.error}")
        self._host = None  # with all that hangs on a run which is over
        self._given.clear()
        self._counts = dict.fromkeys(self._counts, 0)
        self._lost.clear()
        self._given_is_gone = self._has_variables = False
        self._cells = self._interrupted = 0

    async def assign(self, host: Host) -> None:
        """See `SupportsReset`."""
        assert self.session is not None
        if not self.session.is_connected:
            raise SandboxLost("the sandbox is gone: it ended while it had no run")
        self._host = host
        self.session.outlives_handler = host.outlives_handler
        host.handler.take_over(self.session)
        await self._take_tools(host.tools)

    async def put(self, name: str, value: Any) -> None:
        """Put a value into the namespace under a name that is restored after each cell."""
        self._given.pop((name,), None)  # what is given last wins, also when all is given again
        await self._give((name,), value)

    # -- talking to the worker

    async def _serve(self, call: protocol.Call, texts: list[str]) -> Answers:
        if self._host is None:
            raise SandboxError("the run that this sandbox was for is over")
        return await self._host.serve(call, texts)

    def _ask(
        self, header: dict[str, Any], blobs: list[bytes]
    ) -> asyncio.Future[tuple[protocol.Message, list[bytes]]]:
        if self.session is None:
            raise SandboxError("the environment has not been started")
        if self._death is not None:
            raise type(self._death)(str(self._death))
        future = asyncio.get_running_loop().create_future()
        if self._autopsy is None:  # else its result is this request's
            self.session.send(header, blobs)
        self._pending[header["id"]] = future
        return future

    def _send_if_connected(self, header: dict[str, Any], blobs: Sequence[bytes] = ()) -> None:
        with contextlib.suppress(SandboxLost):
            assert self.session is not None
            self.session.send(header, blobs)

    def _receive(self, message: protocol.Message, blobs: list[bytes]) -> None:
        if isinstance(message, protocol.Output):
            if message.id in self._pending and self._host is not None:
                decoder = self._streams.setdefault(message.stream, _utf8(errors="replace"))
                self._host.on_output(message.stream, decoder.decode(b"".join(blobs)))
        elif isinstance(message, protocol.CrashNotice):
            self._note_crash(message.crash, "what ran in the background")
        elif isinstance(message, protocol.Result | protocol.Loaded):
            if isinstance(message, protocol.Result):
                if message.crash is not None:
                    self._note_crash(message.crash)
                else:
                    self._has_variables = True
            future = self._pending.get(message.id)
            if (message.id > 0) != isinstance(message, protocol.Result):
                raise FrameError("an answer to something else")
            if future is not None and not future.done():
                future.set_result((message, blobs))

    def _losses(self, crash: protocol.Crash) -> list[str]:
        if crash.state == "lost":
            return [EVERYTHING] if self._has_variables else []
        return [name[:100] for name in crash.lost[:20]]

    def _note_crash(self, crash: protocol.Crash, *least: str) -> None:
        """Take note of what is gone; ``least`` is what is told when nothing else is."""
        assert self.session is not None
        self.session.cancel_calls()
        self._lost += self._losses(crash) or least
        if crash.state == "lost":
            self._given_is_gone, self._has_variables = True, False
        for number, future in self._pending.items():
            if number < 0 and not future.done():  # a load that will not be answered any more
                future.set_exception(SandboxError("the sandbox's process died while it loaded a context"))

    def _connection_lost(self, lost: asyncio.Future[str]) -> None:
        if self._death is None:
            self._autopsy = asyncio.get_running_loop().create_task(self._find_cause(lost.result()))
        else:
            self._fail_pending(self._death)

    async def _find_cause(self, reason: str) -> None:
        try:
            if reason.startswith(BROKEN):
                return
            async with asyncio.timeout(AUTOPSY_TIMEOUT):
                self._death = await self.explain_loss(reason)
        except (TimeoutError, SandboxError):
            pass  # then what is known already is all there is to say
        finally:
            self._death = self._death or SandboxLost(f"the sandbox is gone: {reason}")
            self._fail_pending(self._death)

    def _fail_pending(self, error: SandboxError) -> None:
        for future in self._pending.values():
            if not future.done():
                future.set_exception(type(error)(str(error)))

    # -- deadlines

    def _waiting(self, waiting: bool) -> None:
        if waiting:
            self._deadline.stand()
        else:
            self._deadline.run()

    def _interrupt(self, number: int) -> None:
        """The cell is out of time: ask, then kill, then give the sandbox up."""
        loop = asyncio.get_running_loop()
        self._interrupted = number
        self._send_if_connected({"t": "interrupt", "id": number})
        cell = self._pending.get(number)  # after a reset the number may be another's

        def kill() -> None:
            if self._pending.get(number) is cell:
                self._send_if_connected({"t": "kill", "id": number})
                loop.call_later(RECOVERY_TIMEOUT, give_up)

        def give_up() -> None:
            if self._pending.get(number) is cell and self.session is not None:
                self.session.abort("the supervisor did not recover from a cell")

        loop.call_later(INTERRUPT_GRACE, kill)

    # -- what the host gives

    async def _take_tools(self, tools: Tools) -> None:
        if tools.functions:
            await self._give(tuple(tools.functions), contexts.Encoded("tools", tools.stubs()))
        for name, value in tools.values.items():
            await self._give((name,), value, free=True)

    async def _add(self, kind: str, value: Any, index: int | None) -> int:
        if index is None:
            index = self._counts[kind]
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise ConfigError(f"{kind}_index={index!r}: it is a number from 0")
        await self._give((f"{kind}_{index}", *((kind,) if index == 0 else ())), value)
        self._counts[kind] = max(self._counts[kind], index + 1)
        return index

    async def _give(self, names: tuple[str, ...], value: Any, *, free: bool = False) -> None:
        """Put a value into the namespace, now and whenever that is lost."""
        async with self._turn:
            await self._give_again()
            given = _Given(value, free)
            await self._load(names, given)
        self._given[names] = given

    async def _load(self, names: tuple[str, ...], given: _Given) -> None:
        form, data = contexts.encode(given.value)
        header = {"t": "load", "names": names, "format": form, **({"free": True} if given.free else {})}
        timeout = LOAD_TIMEOUT + len(data) / LOAD_SPEED
        message = await self._command(header, timeout, f"take {names[0]}", data)
        if message.error:
            raise ConfigError(f"{names[0]} cannot be loaded in the sandbox: {message.error}")

    async def _command(
        self, header: dict[str, Any], timeout: float, what: str, data: bytes = b""
    ) -> protocol.Loaded:
        """Ask for something that runs no cell, and get what came of it."""
        self._loads += 1
        number = -self._loads  # cells are numbered from 1, as their tracebacks say
        header["id"] = number
        try:
            async with asyncio.timeout(timeout):
                if header["t"] == "load":
                    message, _ = await self._send_context(header, data)
                else:
                    message, _ = await self._ask(header, [])
        except TimeoutError:
            assert self.session is not None
            self.session.abort(f"it did not {what}")
            raise SandboxLost(f"the sandbox is gone: it did not {what}") from None
        finally:
            self._pending.pop(number, None)
        assert isinstance(message, protocol.Loaded)
        return message

    async def _send_context(
        self, header: dict[str, Any], data: bytes
    ) -> tuple[protocol.Message, list[bytes]]:
        """By the shortest way there is: shared memory, or one frame, or parts as the sandbox takes them."""
        if self.share(data):
            return await self._ask({**header, "shared": True}, [])
        if len(data) <= PART:
            return await self._ask(header, [data])
        reply = self._ask({**header, "size": len(data)}, [])
        for start in range(0, len(data), PART):
            if reply.done():
                break  # refused, or the sandbox is gone
            self._send_if_connected({"t": "part", "id": header["id"]}, [data[start : start + PART]])
            assert self.session is not None
            await self.session.drained()
        return await reply

    async def _give_again(self) -> None:
        """After the loss of a namespace: the contexts, at least, are the host's to give again."""
        if self._given_is_gone:
            for names, given in self._given.items():
                await self._load(names, given)
            self._given_is_gone = False

    # -- results

    def _result(
        self,
        message: protocol.Result,
        parts: dict[str, bytes],
        seconds: float,
        timeout: float | None,
    ) -> REPLResult:
        text = {name: _decode(data) for name, data in parts.items() if name != "snapshot"}
        lost, self._lost = tuple(self._lost), []
        return REPLResult(
            stdout=text.get("stdout", ""),
            stderr=text.get("stderr", ""),
            echo=text.get("echo", ""),
            value=_plain(text.get("value")),
            error=_error(
                message, text.get("traceback", ""), timeout if message.id == self._interrupted else None
            ),
            final_answer=text.get("final"),
            final_value=_plain(text.get("final_value")),
            draft=text.get("draft", ""),
            note=message.note,
            lost=lost,
            execution_time=seconds,
            isolation=self.isolation,
        )


@dataclasses.dataclass(frozen=True)
class _Given:
    """What the host has put into a namespace; ``free`` is a variable like any other."""

    value: Any
    free: bool = False


_utf8 = codecs.getincrementaldecoder("utf-8")


def _decode(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _plain(text: str | None) -> Any:
    """JSON that came out of a sandbox; what is none, or longer than a worker sends, is dropped."""
    try:
        return None if text is None or len(text) > PLAIN_LIMIT else json.loads(text)
    except (ValueError, RecursionError):
        return None


def _reported(data: bytes) -> tuple[str, ...]:
    """What could not be saved, as a sandbox says; a prompt has room for it."""
    names = _plain(_decode(data))
    return tuple(str(name)[:LOSS_CHARACTERS] for name in names[:LOSSES]) if isinstance(names, list) else ()


def _error(message: protocol.Result, traceback: str, overrun: float | None) -> CellError | None:
    """Why a cell failed; ``overrun`` is the time limit that it was interrupted for, if it was."""
    if message.crash is not None:
        return _crash_error(message.crash, overrun)
    if message.error is None:
        return None
    kind, text = message.error
    if kind == "KeyboardInterrupt" and overrun is not None:
        return CellError("timeout", "CellTimeout", _out_of_time(overrun), traceback)
    if kind == "SystemExit":
        text = "the cell called exit(); the session goes on, and so do its variables"
    return CellError("exception", kind, text, traceback)


def _crash_error(crash: protocol.Crash, overrun: float | None) -> CellError:
    if crash.cause == "killed" and overrun is not None:
        return CellError("timeout", "CellTimeout", f"{_out_of_time(overrun)} and had to be killed")
    if crash.cause == "memory":
        text = "the cell was killed because the sandbox's memory was used up"
    elif crash.cause == "signal":
        hint = " (out of memory, perhaps)" if crash.code == 9 else ""
        text = f"the cell's process was killed by signal {crash.code}{hint}"
    elif crash.cause == "exit":
        text = f"the cell ended its own process with exit code {crash.code}"
    else:
        text = f"the cell's process had to be ended: {crash.cause[:200]}"
    return CellError("crash", "CellCrash", text)


def _out_of_time(timeout: float) -> str:
    return f"the cell computed for longer than {timeout:g} s"

"""The host's end of a sandbox's connection.

A `Session` is what one sandbox is allowed: a token, a function that serves its calls,
and a receiver for everything else it says. A `Connection` is a TCP connection that has
yet to prove which session it belongs to. Whatever is wrong with a frame, too long, too
slow, of no known shape, out of turn, ends that connection with a logged reason and
touches no other.
"""

from __future__ import annotations

import asyncio
import functools
import hmac
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, cast

from . import protocol, wire
from .context import Encoded
from .errors import RLMError, SandboxLost, SandboxUnavailable, ToolError

log = logging.getLogger("rlm.handler")

HELLO_TIMEOUT = 10.0
"""Seconds a new connection has to prove its session."""

STALL_TIMEOUT = 30.0
"""Seconds a sandbox may pause in the middle of a frame."""

IN_FLIGHT_LIMIT = 4096
"""Calls one session may have in flight; more threads than that are an attack or a mistake."""

HELD_LIMIT = 2 * wire.BLOB_LIMIT
"""Bytes of text that the calls of one session may have in flight together: the host holds them."""

BROKEN = "protocol error: "
"""How the reason begins when it was this end that closed a connection, for what came over it."""

Blobs = list[bytes]
Answers = Sequence[str | Encoded | RLMError]
"""To each item of a call: a text, a value, or what went wrong."""
ServeCalls = Callable[[protocol.Call, list[str]], Awaitable[Answers]]
Receive = Callable[[protocol.Message, Blobs], None]


class Session:
    """One sandbox's rights at the handler, and its connection once it has one."""

    def __init__(self, serve: ServeCalls, receive: Receive, blob_limit: int = wire.BLOB_LIMIT) -> None:
        self.id = secrets.token_hex(8)
        self._secret = secrets.token_hex(32)
        self.blob_limit = blob_limit
        self._held = 0
        self.outlives_handler = False
        """Whether the handler that ends leaves it for another one to take over."""
        self.on_waiting: Callable[[bool], None] = lambda waiting: None
        """Told when the sandbox begins, and when it ceases, to wait for a call."""
        self._serve = serve
        self._receive = receive
        self._connection: Connection | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._ending: set[asyncio.Task[None]] = set()
        """Calls that nobody waits for any more, and that have not ended yet."""
        self._calls: dict[int, asyncio.Task[None]] = {}
        loop = asyncio.get_running_loop()
        self._hello: asyncio.Future[protocol.Hello] = loop.create_future()
        self.lost: asyncio.Future[str] = loop.create_future()
        """Resolved with the reason when the connection is gone."""

    @property
    def token(self) -> str:
        """What the sandbox proves itself with. Never in an argument list or an environment."""
        return f"{self.id}:{self._secret}"

    def proves(self, token: str) -> bool:
        """Whether ``token`` is this session's, in constant time."""
        return hmac.compare_digest(token.encode(), self.token.encode())

    async def connected(self, timeout: float) -> protocol.Hello:
        """Wait for the sandbox's hello. Raises SandboxUnavailable when none comes."""
        try:
            return await asyncio.wait_for(asyncio.shield(self._hello), timeout)
        except TimeoutError:
            raise SandboxUnavailable(f"the sandbox did not report within {timeout:g} s") from None

    def send(self, header: dict[str, Any], blobs: Sequence[bytes] = ()) -> None:
        """Send one frame. Raises SandboxLost when there is no connection."""
        if self._connection is None:
            reason = self.lost.result() if self.lost.done() else "it has not connected"
            raise SandboxLost(f"the sandbox cannot be reached: {reason}")
        self._connection.write(wire.encode(header, blobs))

    async def drained(self) -> None:
        """Return when the sandbox keeps up with what it is sent, or is gone."""
        if self._connection is not None:
            await self._connection.writable.wait()

    def abort(self, reason: str) -> None:
        """End the connection because of what came over it."""
        if self._connection is not None:
            self._connection.abort(reason)

    def close(self) -> None:
        """End the session: its connection closes, its calls in flight are cancelled."""
        if self._connection is not None:
            self._connection.transport.close()
        self.detach("the session was closed")

    def attach(self, connection: Connection, hello: protocol.Hello) -> None:
        """A connection has proved to be this session's."""
        self._connection = connection
        if not self._hello.done():
            self._hello.set_result(hello)

    def fail(self, reason: str) -> None:
        """The sandbox reported that it cannot start."""
        if not self._hello.done():
            self._hello.set_exception(SandboxUnavailable(f"the sandbox cannot start here: {reason}"))
            self._hello.exception()  # retrieved by connected(), if anyone still waits

    def detach(self, reason: str) -> None:
        """The connection is gone."""
        self._connection = None
        self.fail(reason)
        if not self.lost.done():
            self.lost.set_result(reason)
        self.cancel_calls()

    @property
    def in_flight(self) -> int:
        """Calls that the sandbox waits for."""
        return len(self._tasks)

    def cancel_calls(self) -> None:
        """Cancel what is in flight: the process that waited for it is gone."""
        for task in self._tasks:
            task.cancel()
        self._calls.clear()
        if self._tasks:
            self._ending |= self._tasks
            self._tasks.clear()
            self.on_waiting(False)

    @property
    def is_connected(self) -> bool:
        """Whether a connection has proved to be this session's and still stands."""
        return self._connection is not None

    def take(self, message: protocol.Message, blobs: Blobs) -> None:
        """A frame of an authenticated connection. Raises wire.FrameError for one out of turn."""
        if isinstance(message, protocol.Call):
            self._begin_call(message, blobs)
        elif isinstance(message, protocol.Hello | protocol.Failed):
            raise wire.FrameError("a second hello")
        else:
            self._receive(message, blobs)

    # -- calls

    def _begin_call(self, call: protocol.Call, blobs: Blobs) -> None:
        if call.id in self._calls:
            raise wire.FrameError(f"call {call.id} is already in flight")
        if len(self._calls) >= IN_FLIGHT_LIMIT:
            raise wire.FrameError(f"more than {IN_FLIGHT_LIMIT} calls in flight")
        try:
            texts = [blob.decode("utf-8") for blob in blobs]
        except UnicodeDecodeError:
            raise wire.FrameError("a prompt is not UTF-8") from None
        size = sum(map(len, blobs))
        fits = self._held + size <= HELD_LIMIT
        self._held += size
        task = asyncio.get_running_loop().create_task(self._answer(call, texts if fits else None))
        self._calls[call.id] = task
        self._tasks.add(task)
        if self.in_flight == 1:
            self.on_waiting(True)
        task.add_done_callback(functools.partial(self._end_call, size))

    def _end_call(self, size: int, task: asyncio.Task[None]) -> None:
        """A call is over: answered, or cancelled, perhaps before it has begun."""
        self._held -= size
        self._ending.discard(task)
        if task in self._tasks:
            self._tasks.remove(task)
            if not self._tasks:
                self.on_waiting(False)

    async def _answer(self, call: protocol.Call, texts: list[str] | None) -> None:
        try:
            if texts is None:
                raise RLMError(
                    f"the calls in flight hold more than {HELD_LIMIT >> 20} MiB of text together: ask about "
                    "smaller parts, or fewer at a time"
                )
            answers = await self._serve(call, texts)
            header, blobs = _reply(call, answers)
        except RLMError as error:
            header, blobs = {"error": _clipped(error)}, []
        except Exception as error:  # a boundary: whoever waits for an answer must get one
            log.exception("a call of session %s failed", self.id)
            header, blobs = {"error": ["RLMError", f"the host failed: {type(error).__name__}"]}, []
        finally:
            wanted = self._calls.get(call.id) is asyncio.current_task()
            if wanted:  # else the process that asked is gone, and the number may be another call's
                del self._calls[call.id]
        if self._connection is None or not wanted:
            return
        reply = {"t": "reply", "id": call.id}
        try:
            self.send({**reply, **header}, blobs)
        except ValueError as error:  # too many failures for one header
            self.send({**reply, "error": ["RLMError", f"the reply does not fit a frame: {error}"]})


def _clipped(error: RLMError, limit: int = 4000) -> list[str]:
    kind = error.kind if isinstance(error, ToolError) else type(error).__name__
    return [kind[:200], str(error)[:limit]]


def _reply(call: protocol.Call, answers: Answers) -> tuple[dict[str, Any], Blobs]:
    """The reply frame of a call. An error becomes its type name and message, nothing else."""
    blobs, failures = [], []
    for index, answer in enumerate(answers):
        if isinstance(answer, RLMError):
            failures.append([index, *_clipped(answer, max(100, 400_000 // len(answers)))])
            blobs.append(b"")
        elif isinstance(answer, Encoded):
            return {"form": answer.form}, [answer.data]
        else:
            blobs.append(answer.encode("utf-8", "replace"))
    if failures and not call.batch:
        return {"error": failures[0][1:]}, []
    return ({"failures": failures} if failures else {}), blobs


class Connection(asyncio.Protocol):
    """One accepted TCP connection: anonymous until its first frame names a session."""

    def __init__(
        self,
        find: Callable[[str], Session | None],
        strangers: set[Connection],
        expected: Session | None = None,
    ) -> None:
        self._find = find
        self._expected = expected
        """Whose connection this is going to be, where a launcher knows."""
        self._strangers = strangers
        """Where a connection is listed until it has proved its session."""
        self._session: Session | None = None
        self._reason = "the sandbox closed the connection"
        self._decoder = wire.Decoder(
            protocol.parse, header_limit=wire.HELLO_LIMIT, blob_limit=wire.HELLO_LIMIT
        )
        self._timer: asyncio.TimerHandle | None = None
        self._progress = 0
        self._seen = 0
        self.writable = asyncio.Event()
        self.writable.set()
        self.transport: asyncio.Transport

    # -- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._strangers.add(self)
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(HELLO_TIMEOUT, self.abort, "no hello in time")

    def data_received(self, data: bytes) -> None:
        self._progress += 1
        self._decoder.feed(data)
        try:
            for message, blobs in self._decoder:
                if self._session is None:
                    self._greet(message, blobs)
                else:
                    self._session.take(message, blobs)
                if self.transport.is_closing():
                    return
        except wire.FrameError as error:
            self.abort(str(error))
        else:
            if self._decoder.mid_frame and self._session is not None and self._timer is None:
                self._watch_stall()

    def eof_received(self) -> None:
        try:
            self._decoder.close()
        except wire.FrameError as error:
            self.abort(str(error), broken=False)  # whatever ended it, it was no message

    def pause_writing(self) -> None:
        """The sandbox does not read what it is sent: take no more calls meanwhile."""
        self.writable.clear()
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.writable.set()
        self.transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        self.writable.set()
        self._strangers.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        session = self._session or self._expected
        if session is not None:
            session.detach(self._reason)

    # -- ours

    def write(self, data: bytes) -> None:
        """Send bytes; the transport buffers what the socket does not take."""
        self.transport.write(data)

    def abort(self, reason: str, *, broken: bool = True) -> None:
        """End this connection, and say why in the log. ``broken``: because of a message."""
        who = f"session {self._session.id}" if self._session else "an unknown connection"
        reason = "".join(c if c.isprintable() else " " for c in reason[:500])
        log.warning("closed %s: %s", who, reason)
        self._reason = BROKEN + reason if broken else reason
        self.transport.abort()

    def _greet(self, message: protocol.Message, blobs: Blobs) -> None:
        """The first frame must prove a session that has no connection yet."""
        if not isinstance(message, protocol.Hello | protocol.Failed):
            raise wire.FrameError("the first frame is not a hello")
        session = self._find(message.token)
        if session is None:
            raise wire.FrameError("the token is of no session")
        if session.is_connected or session.lost.done():
            raise wire.FrameError("the session has, or had, its connection")
        if isinstance(message, protocol.Failed):
            session.fail(blobs[0].decode("utf-8", "replace") if blobs else "no reason given")
            self.transport.close()
            return
        if message.v != wire.PROTOCOL_VERSION:
            session.fail(f"it speaks protocol {message.v}, this host {wire.PROTOCOL_VERSION}")
            raise wire.FrameError(f"protocol version {message.v}")
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._session = session
        self._strangers.discard(self)
        self._decoder.header_limit = wire.HEADER_LIMIT
        self._decoder.blob_limit = session.blob_limit
        session.attach(self, message)

    def _watch_stall(self) -> None:
        self._seen = self._progress
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(STALL_TIMEOUT, self._check_stall)

    def _check_stall(self) -> None:
        self._timer = None
        if self._decoder.mid_frame:
            if self._progress == self._seen:
                self.abort(f"no byte for {STALL_TIMEOUT:g} s in the middle of a frame")
            else:
                self._watch_stall()

"""The LMHandler: the one door to models.

Every model call of a run tree, the root's included, goes through `complete`: unless a
cache has its reply (see `rlm.cache`), it is
reserved in the ledger, passed through its client's gate (see `rlm.gate`), settled and
recorded, in that order and nowhere else. Sandboxes reach the handler over TCP, on loopback,
each with a session's token; what a session's calls may do is decided by the function that serves it.
"""

from __future__ import annotations

import asyncio
import functools
import socket
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Literal, TypeVar

import msgspec

from .backends import Backends
from .client import BaseLM, Message, Price, Reply, Request
from .errors import ModelError, RLMError
from .events import AnyEvent, EventBus, ModelFailed, ModelOutput, ModelReplied, ModelRequested, ModelRetried
from .gate import Gate, Retry
from .ledger import Ledger
from .recording import RecordingLM
from .session import Connection, Receive, ServeCalls, Session

BACKLOG = 1024
"""Connections that may wait to be accepted: hundreds of sandboxes start in the same moment."""

DEFAULT_CONCURRENCY = 256
"""Model calls in flight at a time."""

OUTPUT_INTERVAL = 0.1
"""Seconds between two events about one reply that is being written."""

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


class Caller(msgspec.Struct, frozen=True):
    """Who makes a call: a run, and whether for its own next turn or for a cell."""

    run: str
    parent: str | None
    depth: int
    kind: Literal["root", "sub"]

    @property
    def is_sub(self) -> bool:
        """Whether it is a cell's call, or a child run's turn: anything but a turn of the root."""
        return self.kind == "sub" or self.depth > 0


class LMHandler:
    """Makes model calls on behalf of a run tree, and listens for its sandboxes.

    Used as an asynchronous context manager. ``host`` is loopback unless the caller says
    otherwise; port 0 lets the system choose, and `address` tells what it chose.
    """

    def __init__(
        self,
        models: Backends | BaseLM | None,
        ledger: Ledger,
        events: EventBus,
        *,
        concurrency: int = DEFAULT_CONCURRENCY,
        stream: bool = True,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self.models = models if isinstance(models, Backends) else Backends.of(models)
        self.ledger = ledger
        self.events = events
        self.concurrency = concurrency
        self._slots = asyncio.Semaphore(concurrency)
        self._stream = stream
        self._id = uuid.uuid4().hex
        self._listen = (host, port)
        self._server: asyncio.Server | None = None
        self._sharing = self.models.cache.sharing() if self.models.cache is not None else None
        self._sessions: dict[str, Session] = {}
        self._strangers: set[Connection] = set()

    # -- life

    async def __aenter__(self) -> LMHandler:
        host, port = self._listen
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._connection, host, port, backlog=BACKLOG)
        return self

    async def adopt(self, stream: socket.socket, session: Session) -> None:
        """Treat a connected socket as if its other end had connected to `address`.

        For a launcher that holds a stream to its worker already. The worker proves its session
        like any other; should the stream end before that, ``session`` is told.
        """
        connection = functools.partial(self._connection, session)
        await asyncio.get_running_loop().connect_accepted_socket(connection, stream)

    def _connection(self, expected: Session | None = None) -> Connection:
        return Connection(self._find_session, self._strangers, expected)

    async def __aexit__(self, *_: object) -> None:
        """Stop listening and end every session. Nothing here waits for a poll."""
        if self._server is not None:
            self._server.close()
        for session in tuple(self._sessions.values()):
            if not session.outlives_handler:
                self.close_session(session)
        for connection in tuple(self._strangers):
            connection.transport.abort()

    @property
    def address(self) -> tuple[str, int]:
        """Where the handler listens."""
        if self._server is None or not self._server.sockets:
            raise RuntimeError("the handler does not listen: use it inside `async with`")
        host, port = self._server.sockets[0].getsockname()[:2]
        return host, port

    # -- sessions

    def open_session(self, serve: ServeCalls, receive: Receive) -> Session:
        """Admit one sandbox: ``serve`` answers its calls, ``receive`` gets all else it says."""
        session = Session(serve, receive)
        self._sessions[session.id] = session
        return session

    def take_over(self, session: Session) -> None:
        """Own a session that another handler has opened; its connection stays."""
        self._sessions[session.id] = session

    def close_session(self, session: Session) -> None:
        """End a session. Safe to call twice."""
        self._sessions.pop(session.id, None)
        session.close()

    def _find_session(self, token: str) -> Session | None:
        session = self._sessions.get(token.partition(":")[0])
        return session if session is not None and session.proves(token) else None

    # -- calls

    async def complete(
        self,
        messages: Sequence[Message],
        caller: Caller,
        *,
        model: str | None = None,
        prefix: int = 0,
        schema: dict[str, Any] | None = None,
    ) -> Reply:
        """Make one model call. ``prefix`` messages are known from the caller's previous one.

        ``schema`` is the form of the reply, passed on where the model is known to heed one.

        A failed attempt is made again as the gate's policy says. Raises LimitExceeded before
        the call when the ledger has none left, ModelError when the model gives no reply.
        What the cache has, or an identical call is about to bring, is not asked for.
        """
        gate = self.models.choose(model, sub=caller.is_sub)
        call = _Call(self, caller, gate.client.model_name, messages[prefix:], prefix)
        request = self._request(messages, caller, gate)
        if schema is not None and "schema" in (gate.info(call.model).supports or ()):
            request = msgspec.structs.replace(request, schema=schema)
        if self._sharing is None:
            return await self._make(gate, request, call, caller)
        make = functools.partial(self._make, gate, request, call, caller)
        reply, is_known = await self._sharing.reply(gate, request, make)
        if is_known:
            call.known(reply)
            if isinstance(gate.client, RecordingLM):
                gate.client.record(request, reply, call.start)
        return reply

    async def _make(self, gate: Gate, request: Request, call: _Call, caller: Caller) -> Reply:
        """Make a call that nobody has made yet, and keep the accounts of it."""
        held = await self.ledger.reserve(request, call.model, gate.info, sub=call.sub)
        try:
            call.reserve()
            reply = await gate.call(
                request,
                call,
                slots=self._slots,
                seconds_left=self.ledger.seconds_left,
                stream=self._stream and caller.kind == "root",
            )
            reply = _priced(reply, gate.price(call.model, reply.model))
            call.replied(reply)
            self.ledger.learn(call.model, request, reply.usage, sub=call.sub)
        except BaseException as error:
            failure = self.models.as_ours(error) if isinstance(error, Exception) else error
            call.failed(failure)
            if failure is error:
                raise
            raise failure from failure.__cause__
        finally:
            self.ledger.release(held)
        return reply

    def _request(self, messages: Sequence[Message], caller: Caller, gate: Gate) -> Request:
        is_turn = caller.kind == "root"
        session = f"{self._id}-{caller.run}" if is_turn else f"{self._id}-sub-{caller.depth}"
        return Request(
            tuple(messages),
            timeout=gate.policy.timeout,
            session=session,
            cache=is_turn,
            **self.models.sampling(sub=caller.is_sub),
        )

    async def each(
        self, items: Sequence[Item], call: Callable[[Item], Awaitable[Outcome]], width: int
    ) -> list[Outcome | RLMError]:
        """``call`` for every item, ``width`` at a time; a failed one gives its error in its place."""
        outcomes: list[Outcome | RLMError] = [ModelError("not made")] * len(items)
        queue = iter(range(len(items)))

        async def work(indices: Iterable[int]) -> None:
            for index in indices:
                try:
                    outcomes[index] = await call(items[index])
                except RLMError as error:
                    outcomes[index] = error

        # a few workers over one queue: a task for each of 10,000 prompts costs more than its call
        async with asyncio.TaskGroup() as group:
            for _ in range(min(width, len(items))):
                group.create_task(work(queue))
        return outcomes


class _Call:
    """One model call, as the ledger and the events see it."""

    def __init__(
        self, handler: LMHandler, caller: Caller, model: str, messages: Sequence[Message], prefix: int
    ) -> None:
        self.model = model
        self._handler = handler
        self._caller = caller
        self.sub = caller.is_sub
        self._messages = list(messages)
        self._prefix = prefix
        self._number = 0
        self._is_made = False
        self.start = time.perf_counter()
        self._written: list[str] = []
        self._told_at = 0.0

    def reserve(self) -> None:
        """Take the call from the budget. Raises LimitExceeded when it has none left."""
        self._number = self._handler.ledger.reserve_call(sub=self.sub)

    def started(self) -> None:
        """The first attempt goes out."""
        if self._is_made:
            return
        self._is_made = True
        self.start = time.perf_counter()
        self._emit_requested()

    def retried(self, retry: Retry) -> None:
        self.started()  # a provider that is down may not have been asked at all
        self._written.clear()
        self._handler.ledger.retried(self.model)
        self._emit(
            ModelRetried,
            kind=self._caller.kind, model=self.model, attempt=retry.attempt,
            error=self._handler.models.hide(retry.error), sent=retry.sent, wait=retry.wait,
        )  # fmt: skip

    def wrote(self, text: str) -> None:
        """Collect pieces of a reply; a model writes hundreds of them a second."""
        self._written.append(text)
        now = time.monotonic()
        if now - self._told_at >= OUTPUT_INTERVAL:
            self._emit(ModelOutput, text="".join(self._written))
            self._written.clear()
            self._told_at = now

    def replied(self, reply: Reply) -> None:
        self._handler.ledger.settle(reply.model or self.model, reply.usage, sub=self.sub)
        self._emit_replied(reply, cached=False)

    def known(self, reply: Reply) -> None:
        """There was no need to make the call: both events at once, and nothing from the budget."""
        self._number = self._handler.ledger.hit(reply.model or self.model)
        self._emit_requested()
        self._emit_replied(reply, cached=True)

    def failed(self, error: BaseException) -> None:
        if not self._is_made:  # ended before it was made, so it was not made
            if self._number:
                self._handler.ledger.give_back(sub=self.sub)
            return
        self._handler.ledger.fail(self.model, billed=getattr(error, "sent", True))
        self._emit(
            ModelFailed,
            kind=self._caller.kind, model=self.model, error=f"{type(error).__name__}: {error}",
            seconds=time.perf_counter() - self.start,
        )  # fmt: skip

    def _emit_requested(self) -> None:
        self._emit(
            ModelRequested,
            kind=self._caller.kind, model=self.model, prefix=self._prefix, messages=self._messages,
        )  # fmt: skip

    def _emit_replied(self, reply: Reply, cached: bool) -> None:
        model = reply.model or self.model
        self._emit(
            ModelReplied,
            kind=self._caller.kind, model=model, text=reply.text, finish=reply.finish, usage=reply.usage,
            seconds=time.perf_counter() - self.start, cached=cached,
        )  # fmt: skip

    def _emit(self, event: Callable[..., AnyEvent], **values: Any) -> None:
        events, caller = self._handler.events, self._caller
        events.emit(
            event(
                at=events.now(), run=caller.run, parent=caller.parent, depth=caller.depth,
                call=self._number, **values,
            )
        )  # fmt: skip


def _priced(reply: Reply, price: Price | None) -> Reply:
    """A reply with its cost, as the provider told it, or else by the price; or without, if none is known."""
    counted = reply.usage.input_tokens or reply.usage.output_tokens
    if reply.usage.cost is not None or price is None or not counted:
        return reply
    usage = msgspec.structs.replace(reply.usage, cost=price.cost(reply.usage))
    return msgspec.structs.replace(reply, usage=usage)

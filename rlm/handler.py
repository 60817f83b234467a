"""The LMHandler: the one door to models.

Every model call of a run tree, the root's included, goes through `complete`: it is
reserved in the ledger, bounded in concurrency, made, settled and recorded, in that order
and nowhere else. Sandboxes reach the handler over TCP, on loopback, each with a session's
token; what a session's calls may do is decided by the function that serves it.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Literal, TypeVar

import msgspec

from .client import BaseLM, Message, Reply, Request, Usage
from .errors import ModelError, RLMError
from .events import EventBus, ModelFailed, ModelReplied, ModelRequested
from .ledger import Ledger
from .session import Connection, Receive, ServeCalls, Session

BACKLOG = 1024
"""Connections that may wait to be accepted: hundreds of sandboxes start in the same moment."""

DEFAULT_CONCURRENCY = 256
"""Model calls in flight at a time."""

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


class Caller(msgspec.Struct, frozen=True):
    """Who makes a call: a run, and whether for its own next turn or for a cell."""

    run: str
    parent: str | None
    depth: int
    kind: Literal["root", "sub"]


class LMHandler:
    """Makes model calls on behalf of a run tree, and listens for its sandboxes.

    Used as an asynchronous context manager. ``host`` is loopback unless the caller says
    otherwise; port 0 lets the system choose, and `address` tells what it chose.
    """

    def __init__(
        self,
        client: BaseLM | None,
        ledger: Ledger,
        events: EventBus,
        *,
        concurrency: int = DEFAULT_CONCURRENCY,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self.client = client
        self.ledger = ledger
        self.events = events
        self.concurrency = concurrency
        self._slots = asyncio.Semaphore(concurrency)
        self._listen = (host, port)
        self._server: asyncio.Server | None = None
        self._sessions: dict[str, Session] = {}
        self._strangers: set[Connection] = set()

    # -- life

    async def __aenter__(self) -> LMHandler:
        host, port = self._listen
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._connection, host, port, backlog=BACKLOG)
        return self

    async def adopt(self, stream: socket.socket) -> None:
        """Treat a connected socket as if its other end had connected to `address`.

        For a launcher that holds a stream to its worker already: it need prove its session
        like any other, and saves the detour over a port.
        """
        await asyncio.get_running_loop().connect_accepted_socket(self._connection, stream)

    def _connection(self) -> Connection:
        return Connection(self._find_session, self._strangers)

    async def __aexit__(self, *_: object) -> None:
        """Stop listening and end every session. Nothing here waits for a poll."""
        if self._server is not None:
            self._server.close()
        for session in tuple(self._sessions.values()):
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

    def close_session(self, session: Session) -> None:
        """End a session. Safe to call twice."""
        self._sessions.pop(session.id, None)
        session.close()

    def _find_session(self, token: str) -> Session | None:
        session = self._sessions.get(token.partition(":")[0])
        return session if session is not None and session.proves(token) else None

    # -- calls

    async def complete(
        self, messages: Sequence[Message], caller: Caller, *, model: str | None = None, prefix: int = 0
    ) -> Reply:
        """Make one model call. ``prefix`` messages are known from the caller's previous one.

        Raises LimitExceeded before the call when the ledger has none left, ModelError when
        the model gives no reply.
        """
        client = self._client_for(model)
        async with self._slots:
            number = self.ledger.reserve_call()
            name = client.model_name
            self._emit_request(number, caller, name, messages, prefix)
            start = time.perf_counter()
            try:
                reply = _checked(await client.complete(Request(tuple(messages))))
            except BaseException as error:
                self.ledger.fail(name)
                self._emit_failure(number, caller, name, error, time.perf_counter() - start)
                if isinstance(error, RLMError) or not isinstance(error, Exception):
                    raise
                raise ModelError(f"the model call failed: {type(error).__name__}: {error}") from error
            self.ledger.settle(reply.model or name, reply.usage)
            self._emit_reply(number, caller, reply, reply.model or name, time.perf_counter() - start)
            return reply

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

    def _client_for(self, model: str | None) -> BaseLM:
        if self.client is None:
            raise ModelError("no model is connected to this environment: it was opened without one")
        if model is not None and model != self.client.model_name:
            raise ModelError(
                f"this run offers no model {model!r}; it offers {self.client.model_name!r}. "
                "The second argument of llm_query is the name of a model: text belongs in the prompt."
            )
        return self.client

    def _emit_request(
        self, number: int, caller: Caller, model: str, messages: Sequence[Message], prefix: int
    ) -> None:
        events = self.events
        events.emit(
            ModelRequested(
                at=events.now(), run=caller.run, parent=caller.parent, depth=caller.depth,
                call=number, kind=caller.kind, model=model, prefix=prefix, messages=list(messages[prefix:]),
            )
        )  # fmt: skip

    def _emit_reply(self, number: int, caller: Caller, reply: Reply, model: str, seconds: float) -> None:
        events = self.events
        events.emit(
            ModelReplied(
                at=events.now(), run=caller.run, parent=caller.parent, depth=caller.depth, call=number,
                kind=caller.kind, model=model, text=reply.text, finish=reply.finish, usage=reply.usage,
                seconds=seconds,
            )
        )  # fmt: skip

    def _emit_failure(
        self, number: int, caller: Caller, model: str, error: BaseException, seconds: float
    ) -> None:
        events = self.events
        events.emit(
            ModelFailed(
                at=events.now(), run=caller.run, parent=caller.parent, depth=caller.depth, call=number,
                kind=caller.kind, model=model, error=f"{type(error).__name__}: {error}", seconds=seconds,
            )
        )  # fmt: skip


def _checked(reply: object) -> Reply:
    """A client is somebody else's code: what it returns is looked at before it is believed."""
    if not isinstance(reply, Reply) or not isinstance(reply.text, str) or not isinstance(reply.usage, Usage):
        raise ModelError(f"the client returned {type(reply).__name__} in place of a complete Reply")
    return reply

"""A model server on this machine, for load and for faults: no model, and three dialects.

`with ModelServer() as server:` serves ``server.url`` from a thread of its own; ``server.reply`` says
what it does, and may be changed at any time. ``python -m rlm.testing.model_server`` is one as a
process: it prints its URL, and ends with its standard input or by SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn

import msgspec

from .dialects import (
    Behaviour,
    Dialect,
    Seen,
    dialect_of,
    last_text,
    write_error,
    write_reply,
    write_stream,
)

__all__ = ["Behaviour", "ModelServer", "Seen"]

Answer = Callable[[Seen], Behaviour]

HEAD_LIMIT = 1 << 16
"""Bytes of a request's head, beyond which it is none."""

DRIP = 0.005
"""Seconds between two drops of a slow reply, at least."""

DROPS = 400
"""Into how many drops a slow reply is cut, at most."""

NOISE = b"\x00\xff\x15\x03\x01 this is no HTTP \x80\r\n\r\n"


class ModelServer:
    """Serves models on the loopback address, and keeps count.

    ``rate``: more requests than that in a fixed window of ``window`` seconds are refused with 429,
    and told when to come back by ``retry_after``: in whole ``"seconds"``, in ``"ms"``, or not at all.
    """

    def __init__(
        self,
        reply: Behaviour | Answer | None = None,
        *,
        keep: bool = True,
        rate: int | None = None,
        window: float = 1.0,
        retry_after: Literal["seconds", "ms"] | None = "seconds",
        models: Sequence[str] = ("test-model",),
        port: int = 0,
    ) -> None:
        self.reply: Behaviour | Answer = reply or Behaviour()
        """What to do with a request, or a function that says so, called on the server's thread."""
        self.models = models
        """What ``GET /models`` lists."""
        self.port = port
        self.keep = keep
        """Whether requests are kept in ``seen``; a load test does without."""
        self.seen: list[Seen] = []
        self.requests = 0
        """How many there were for a reply, whether kept or not."""
        self.asides = 0
        """How many there were for anything else, such as which models there are."""
        self.connections = 0
        """How many are open."""
        self.total_connections = 0
        self.in_flight = 0
        """Requests that have arrived and are not answered."""
        self.most_in_flight = 0
        self.cancelled = 0
        """Requests whose client went away before it had the whole answer."""
        self.refused = 0
        """Requests beyond the rate."""
        self.early = 0
        """Requests that arrived although an earlier answer had announced that there was no use yet."""
        self._rate = rate
        self._window = window
        self._retry_after = retry_after
        self._window_ends = -math.inf
        self._in_window = 0
        self._announced = -math.inf
        self._open: set[_Connection] = set()
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Where it is, as clients of OpenAI's dialects want it: with the version, without a slash."""
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> ModelServer:
        self._thread = threading.Thread(target=self._run, name="rlm-model-server", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise self._failure
        return self

    def __exit__(self, *_: object) -> None:
        assert self._thread is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def drop_idle(self) -> None:
        """Close every connection that waits for no answer, as servers do after a while."""
        self._loop.call_soon_threadsafe(self._drop_idle)

    def _drop_idle(self) -> None:
        for held in list(self._open):
            if held.idle:
                held.close()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # such as a port that is taken: for whoever waits in __enter__
            self._failure = error
            self._ready.set()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await self._loop.create_server(
            lambda: _Connection(self), "127.0.0.1", self.port, backlog=4096
        )
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        for held in list(self._open):
            held.abort()
        await asyncio.sleep(0.01)  # until they are gone: a transport closes a turn of the loop later

    # -- what connections ask

    def _opened(self, connection: _Connection) -> None:
        self._open.add(connection)
        self.connections += 1
        self.total_connections += 1

    def _closed(self, connection: _Connection) -> None:
        self._open.discard(connection)
        self.connections -= 1

    def _arrived(self, path: str, headers: dict[str, str], body: bytes) -> tuple[Seen, Behaviour]:
        """Take note of a request, and say what is to become of it."""
        self.requests += 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        data = _decoded(body)
        dialect = dialect_of(path)
        seen = Seen(path, headers, data or {}, self.requests, dialect, last_text(data or {}))
        if self.keep:
            self.seen.append(seen)
        if data is None:
            return seen, Behaviour(status=400, message="the body is no JSON object")
        return seen, self._refusal() or self._behaviour(seen)

    def _told(self, method: str, path: str) -> tuple[int, Any]:
        """Status and body for what asks for no reply."""
        self.asides += 1
        if method == "GET" and path.endswith("/models"):
            return 200, {"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]}
        if method == "POST" and path.endswith(("/messages/count_tokens", "/responses/input_tokens")):
            return 200, {"input_tokens": 7}
        return 404, write_error(Behaviour(status=404), "openai")

    def _behaviour(self, seen: Seen) -> Behaviour:
        if isinstance(self.reply, Behaviour):
            return self.reply
        try:
            return self.reply(seen)
        except Exception as error:  # a mistake in somebody's test, which is to be seen there
            return Behaviour(status=500, message=f"the test's own function failed: {error!r}")

    def _refusal(self) -> Behaviour | None:
        """A refusal, if this request is beyond the rate."""
        if self._rate is None:
            return None
        now = self._loop.time()
        self.early += now < self._announced
        if now >= self._window_ends:
            self._window_ends, self._in_window = now + self._window, 0
        self._in_window += 1
        if self._in_window <= self._rate:
            return None
        self.refused += 1
        return Behaviour(status=429, message="too many requests", headers=self._announce(now))

    def _announce(self, now: float) -> dict[str, str]:
        left = self._window_ends - now
        if self._retry_after is None:
            return {}
        if self._retry_after == "ms":
            wait = math.ceil(left * 1000)
            self._announced = max(self._announced, now + wait / 1000)
            return {"retry-after-ms": str(wait)}
        wait = math.ceil(left)
        self._announced = max(self._announced, now + wait)
        return {"Retry-After": str(wait)}


def _decoded(body: bytes) -> dict[str, Any] | None:
    try:
        data = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return data if isinstance(data, dict) else None


# --- a connection --------------------------------------------------------------------------------


class _Connection(asyncio.Protocol):
    """HTTP/1.1 as far as clients of models need it: one request after the other, bodies of known length."""

    def __init__(self, server: ModelServer) -> None:
        self._server = server
        self._buffer = bytearray()
        self._head: tuple[str, str, dict[str, str]] | None = None
        self._length = 0  # of the body that the head announces
        self._seen: Seen | None = None  # what is not answered yet
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport

    @property
    def idle(self) -> bool:
        """Whether no request has begun that is not answered."""
        return self._seen is None and self._head is None and not self._buffer

    def close(self) -> None:
        """End it when what was written has been sent."""
        self._transport.close()

    def abort(self) -> None:
        """End it now; nobody has cancelled anything."""
        self._answered()
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._server._opened(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._server._closed(self)
        self._server.cancelled += self._seen is not None
        self._answered()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._proceed()

    def _proceed(self) -> None:
        """Serve what has arrived whole, unless a request before it waits for its answer."""
        while self._seen is None and not self._transport.is_closing():
            if self._head is None and not self._read_head():
                return
            if len(self._buffer) < self._length:
                return
            body = bytes(self._buffer[: self._length])
            del self._buffer[: self._length]
            assert self._head is not None
            (method, path, headers), self._head = self._head, None
            self._serve(method, path, headers, body)

    def _read_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > HEAD_LIMIT:
                self._refuse(431)
            return False
        lines = self._buffer[:end].decode("latin-1").split("\r\n")
        del self._buffer[: end + 4]
        method, _, rest = lines[0].partition(" ")
        headers = {}
        for line in lines[1:]:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        length = headers.get("content-length", "0")
        if not length.isdecimal() or "transfer-encoding" in headers:
            self._refuse(411)
            return False
        self._head, self._length = (method, rest.partition(" ")[0], headers), int(length)
        if headers.get("expect") == "100-continue":
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return True

    def _refuse(self, status: int) -> None:
        self._transport.write(_head(status, {"Connection": "close"}, 0))
        self._transport.close()

    # -- answers

    def _serve(self, method: str, path: str, headers: dict[str, str], body: bytes) -> None:
        path = path.partition("?")[0]
        if method != "POST" or dialect_of(path) == "other":
            self._aside(method, path, headers)
            return
        self._seen, behaviour = self._server._arrived(path, headers, body)
        if behaviour.latency and behaviour.fault != "slow":
            self._later(behaviour.latency, self._answer, behaviour)
        else:
            self._answer(behaviour)

    def _aside(self, method: str, path: str, headers: dict[str, str]) -> None:
        """Answer what asks for no reply."""
        status, data = self._server._told(method, path)
        body = msgspec.json.encode(data)
        self._transport.write(_head(status, {"Content-Type": "application/json"}, len(body)) + body)
        if headers.get("connection", "").lower() == "close":
            self._transport.close()

    def _answer(self, behaviour: Behaviour) -> None:
        assert self._seen is not None
        if behaviour.fault == "hang":
            return
        head, body = (b"", b"") if behaviour.fault == "close" else _written(behaviour, self._seen)
        if behaviour.fault == "garbage":
            head, body = b"", behaviour.body or NOISE
        if behaviour.fault in ("half", "stall"):
            body = body[: len(body) // 2]
        if behaviour.fault == "slow":
            self._transport.write(head)
            self._drip(body, behaviour.latency)
            return
        if behaviour.fault == "stall":
            self._transport.write(head + body)
        else:
            self._finish(head + body, last=behaviour.fault is not None)

    def _drip(self, body: bytes, seconds: float) -> None:
        drops = max(1, min(len(body), DROPS, int(seconds / DRIP)))
        size = -(-len(body) // drops)

        def drip(start: int) -> None:
            drop = body[start : start + size]
            if start + size < len(body):
                self._transport.write(drop)
                self._later(seconds / drops, drip, start + size)
            else:
                self._finish(drop, last=False)

        drip(0)

    def _later(self, seconds: float, what: Callable[..., None], *args: Any) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._due, what, args)

    def _due(self, what: Callable[..., None], args: tuple[Any, ...]) -> None:
        what(*args)
        self._proceed()  # with what arrived meanwhile

    def _finish(self, rest: bytes, *, last: bool) -> None:
        assert self._seen is not None
        last = last or self._seen.headers.get("connection", "").lower() == "close"
        self._answered()  # first, so that whoever has an answer finds it counted
        self._transport.write(rest)
        if last:
            self._transport.close()

    def _answered(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._seen is not None:
            self._seen = None
            self._server.in_flight -= 1


def _written(behaviour: Behaviour, seen: Seen) -> tuple[bytes, bytes]:
    """Head and body of an answer."""
    headers = {_request_id(seen.dialect): f"req-{seen.number}", **behaviour.headers}
    headers["Content-Type"] = behaviour.content_type or "application/json"
    if behaviour.body is not None:
        body = behaviour.body
    elif behaviour.status != 200:
        body = msgspec.json.encode(write_error(behaviour, seen.dialect))
    elif seen.body.get("stream"):
        headers["Content-Type"] = behaviour.content_type or "text/event-stream"
        body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in write_stream(behaviour, seen))
        return _head(200, headers, None), body + b"0\r\n\r\n"
    else:
        body = msgspec.json.encode(write_reply(behaviour, seen))
    return _head(behaviour.status, headers, len(body)), body


def _request_id(dialect: Dialect) -> str:
    return "request-id" if dialect == "anthropic" else "x-request-id"


def _head(status: int, headers: dict[str, str], length: int | None) -> bytes:
    """The head of an answer; without a length, its body comes in chunks."""
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    lines = [f"HTTP/1.1 {status} Status", size, *(f"{name}: {value}" for name, value in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


# --- as a process --------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until standard input ends or SIGTERM comes."""
    parser = argparse.ArgumentParser(prog="python -m rlm.testing.model_server", description=main.__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before every reply")
    parser.add_argument("--text", default="ok", help="what every reply says")
    parser.add_argument("--rate", type=int, help="requests per window, beyond which they are refused")
    parser.add_argument("--window", type=float, default=1.0, help="seconds")
    options = parser.parse_args(arguments)

    def stop(*_: object) -> NoReturn:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, stop)
    reply = Behaviour(text=options.text, latency=options.latency)
    with ModelServer(
        reply, keep=False, rate=options.rate, window=options.window, port=options.port
    ) as server:
        sys.stdout.write(f"{server.url}\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    main()

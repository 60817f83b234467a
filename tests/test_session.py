"""Facts about a sandbox's connection, told by raw TCP clients to a real handler."""

import asyncio
import contextlib
import logging
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import pytest

from rlm import handler as handler_module
from rlm import protocol, wire
from rlm import session as session_module
from rlm.errors import ModelError, RLMError, SandboxLost, SandboxUnavailable
from rlm.events import EventBus
from rlm.handler import LMHandler
from rlm.ledger import Ledger
from rlm.limits import Limits
from rlm.session import Answers, Session

PATIENCE = 60
"""Seconds after which something that never comes fails a test. No test waits for it to pass."""

HOLD = b"hold"
"""The text of a call that is answered when the test says so."""

Frame = tuple[dict[str, Any], list[bytes]]


def hello(token: str, **fields: Any) -> bytes:
    return wire.encode(
        {"t": "hello", "v": wire.PROTOCOL_VERSION, "token": token, "python": "3.11.7", **fields}
    )


def call(number: Any, *texts: bytes, **fields: Any) -> bytes:
    return wire.encode({"t": "call", "id": number, "fn": "llm_query", **fields}, texts)


class Peer:
    """A client that can say anything."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder = wire.Decoder(wire.parse_dict)

    def send(self, data: bytes) -> None:
        self._writer.write(data)

    def finish(self) -> None:
        """Say no more: the other end reads the end of the stream."""
        self._writer.write_eof()

    async def receive(self) -> Frame:
        async with asyncio.timeout(PATIENCE):
            while (frame := self._decoder.next_frame()) is None:
                data = await self._reader.read(1 << 16)
                assert data, "the connection ended"
                self._decoder.feed(data)
            return frame

    async def ended(self) -> None:
        """Return when the other end has closed the connection."""
        async with asyncio.timeout(PATIENCE):
            with contextlib.suppress(ConnectionError):
                while await self._reader.read(1 << 16):
                    pass

    async def leave(self) -> None:
        """Close, and wait until the other end has closed too, so that nothing outlives the test."""
        if not self._writer.is_closing() and not self._reader.at_eof() and self._reader.exception() is None:
            self.finish()
            await self.ended()
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()


class House:
    """A handler, its sessions, and what they were asked and told."""

    def __init__(self, handler: LMHandler) -> None:
        self.handler = handler
        self.gate = asyncio.Event()
        self.asked: list[str] = []
        self.cancelled: list[str] = []
        self.told: list[tuple[protocol.Message, list[bytes]]] = []
        self.peers: list[Peer] = []

    def open(self) -> Session:
        return self.handler.open_session(self._serve, lambda *message: self.told.append(message))

    async def connect(self) -> Peer:
        peer = Peer(*await asyncio.open_connection(*self.handler.address))
        self.peers.append(peer)
        return peer

    async def enter(self, *, session: Session | None = None) -> tuple[Session, Peer]:
        """A session and a client that has proved to be its sandbox."""
        session = session or self.open()
        peer = await self.connect()
        peer.send(hello(session.token))
        await session.connected(PATIENCE)
        return session, peer

    async def until_asked(self, count: int) -> None:
        async with asyncio.timeout(PATIENCE):
            while len(self.asked) < count:
                await asyncio.sleep(0.001)

    async def _serve(self, call: protocol.Call, texts: list[str]) -> Answers:
        self.asked += texts
        try:
            if HOLD.decode() in texts:
                await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += texts
            raise
        return [text.upper() for text in texts]


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with LMHandler(None, Ledger(Limits()), EventBus()) as handler:
        house = House(handler)
        yield house
        for peer in house.peers:
            await peer.leave()


@pytest.fixture
async def neighbour(house: House) -> AsyncIterator[Peer]:
    """Another session, with a call in flight while the test runs; it must never notice."""
    _, peer = await house.enter()
    peer.send(call(1, HOLD))
    await house.until_asked(1)
    yield peer
    house.gate.set()
    assert await peer.receive() == ({"t": "reply", "id": 1, "blobs": [4]}, [b"HOLD"])
    peer.send(call(2, b"still here"))
    assert await peer.receive() == ({"t": "reply", "id": 2, "blobs": [10]}, [b"STILL HERE"])


def reasons(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "rlm.handler"]


# --- the first frame ---------------------------------------------------------------------------

FIRST_FRAMES: dict[str, tuple[Callable[[Session], bytes], str]] = {
    "unknown session": (lambda s: hello("0123456789abcdef:" + "0" * 64), "the token is of no session"),
    "wrong secret": (lambda s: hello(f"{s.id}:{'0' * 64}"), "the token is of no session"),
    "id alone": (lambda s: hello(s.id), "the token is of no session"),
    "half a secret": (lambda s: hello(s.token[:-1]), "the token is of no session"),
    "empty token": (lambda s: hello(""), "the token is of no session"),
    "token not ASCII": (lambda s: hello(f"{s.id}:é\N{PILE OF POO}\0"), "the token is of no session"),
    "lone surrogate": (lambda s: hello(f"{s.id}:\ud800"), "not a message of this protocol"),
    "failed, wrong secret": (
        lambda s: wire.encode({"t": "failed", "token": s.id}),
        "the token is of no session",
    ),
    "newer version": (lambda s: hello(s.token, v=wire.PROTOCOL_VERSION + 1), "protocol version 2"),
    "version of no type": (lambda s: hello(s.token, v="1"), "not a message of this protocol"),
    "call first": (lambda s: call(1, b"hi"), "the first frame is not a hello"),
    "unknown field": (lambda s: hello(s.token, admin=True), "unknown field"),
    "header too long": (lambda s: (wire.HELLO_LIMIT + 1).to_bytes(4, "big"), r"outside 2\.\.4096"),
    "blob too long": (
        lambda s: wire.encode({"t": "failed", "token": s.token}, [b"x" * (wire.HELLO_LIMIT + 1)]),
        "over 4096",
    ),
    "HTTP": (lambda s: b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", r"outside 2\.\.4096"),
    "TLS": (lambda s: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", r"outside 2\.\.4096"),
    "zeros": (lambda s: bytes(100), r"outside 2\.\.4096"),
    "not JSON": (lambda s: wire.join(b"hello!"), "not a message of this protocol"),
    "JSON list": (lambda s: wire.join(b"[1,2,3]"), "not a message of this protocol"),
}


@pytest.mark.parametrize("case", FIRST_FRAMES)
async def test_a_wrong_first_frame_ends_its_connection_with_a_reason(
    case: str, house: House, neighbour: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    make, reason = FIRST_FRAMES[case]
    session, peer = house.open(), await house.connect()
    peer.send(make(session))
    await peer.ended()
    [logged] = reasons(caplog)
    assert re.match(f"closed an unknown connection: .*{reason}", logged, re.DOTALL)
    assert session.token not in logged


@pytest.mark.parametrize("case", ["wrong secret", "id alone", "failed, wrong secret", "call first", "HTTP"])
async def test_a_stranger_spoils_nothing_for_the_session_that_it_names(case: str, house: House) -> None:
    session, stranger = house.open(), await house.connect()
    stranger.send(FIRST_FRAMES[case][0](session))
    await stranger.ended()
    _, peer = await house.enter(session=session)
    peer.send(call(1, b"mine"))
    assert (await peer.receive())[1] == [b"MINE"]


async def test_no_hello_in_time_ends_a_connection(
    house: House, neighbour: Peer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "HELLO_TIMEOUT", 0.02)
    await (await house.connect()).ended()
    assert reasons(caplog) == ["closed an unknown connection: no hello in time"]


async def test_a_trickle_of_bytes_does_not_put_off_the_time_for_hello(
    house: House, neighbour: Peer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "HELLO_TIMEOUT", 0.05)
    peer = await house.connect()
    peer.send((4000).to_bytes(4, "big"))

    async def trickle() -> None:
        for _ in range(3000):  # far longer than the time for hello
            peer.send(b" ")
            await asyncio.sleep(0.01)

    task = asyncio.create_task(trickle())
    await peer.ended()
    task.cancel()
    assert reasons(caplog) == ["closed an unknown connection: no hello in time"]


async def test_a_hello_may_come_in_single_bytes_and_with_a_call_behind_it(house: House) -> None:
    session, peer = house.open(), await house.connect()
    for byte in hello(session.token):
        peer.send(bytes([byte]))
        await asyncio.sleep(0)
    await session.connected(PATIENCE)
    second, other = house.open(), await house.connect()
    other.send(hello(second.token) + call(1, b"at once"))
    assert (await other.receive())[1] == [b"AT ONCE"]


async def test_the_hello_says_what_the_sandbox_enforces(house: House) -> None:
    session, peer = house.open(), await house.connect()
    peer.send(hello(session.token, enforced=["user"], missing=["files"]))
    report = await session.connected(PATIENCE)
    assert (report.enforced, report.missing) == (["user"], ["files"])


async def test_a_wrong_version_is_told_to_whoever_waits_for_the_sandbox(house: House) -> None:
    session, peer = house.open(), await house.connect()
    peer.send(hello(session.token, v=99))
    with pytest.raises(SandboxUnavailable, match="it speaks protocol 99, this host 1"):
        await session.connected(PATIENCE)


async def test_a_sandbox_that_cannot_start_says_why(house: House) -> None:
    session, peer = house.open(), await house.connect()
    peer.send(wire.encode({"t": "failed", "token": session.token}, [b"no fork\xff for you"]))
    with pytest.raises(SandboxUnavailable, match="no fork\N{REPLACEMENT CHARACTER} for you"):
        await session.connected(PATIENCE)
    await peer.ended()


async def test_a_sandbox_that_does_not_report_is_unavailable(house: House) -> None:
    with pytest.raises(SandboxUnavailable, match=r"did not report within 0\.01 s"):
        await house.open().connected(0.01)


# --- a stream that a launcher holds -------------------------------------------------------------


async def adopted(house: House, session: Session) -> Peer:
    """The far end of a stream that the handler has adopted for a session."""
    ours, theirs = socket.socketpair()
    await house.handler.adopt(theirs, session)
    peer = Peer(*await asyncio.open_unix_connection(sock=ours))
    house.peers.append(peer)
    return peer


async def test_an_adopted_stream_proves_its_session_and_makes_calls(house: House, neighbour: Peer) -> None:
    session = house.open()
    peer = await adopted(house, session)
    peer.send(hello(session.token) + call(1, b"hi"))
    await session.connected(PATIENCE)
    assert await peer.receive() == ({"t": "reply", "id": 1, "blobs": [2]}, [b"HI"])


async def test_an_adopted_stream_without_the_token_is_nobodys(house: House, neighbour: Peer) -> None:
    session = house.open()
    peer = await adopted(house, session)
    peer.send(hello(f"{session.id}:{'0' * 64}"))
    with pytest.raises(SandboxUnavailable, match="the token is of no session"):
        await session.connected(PATIENCE)
    await peer.ended()


async def test_an_adopted_stream_that_ends_is_told_at_once_to_whoever_waits(house: House) -> None:
    session = house.open()
    peer = await adopted(house, session)
    peer.finish()
    with pytest.raises(SandboxUnavailable, match="closed the connection"):
        await session.connected(PATIENCE)


# --- one connection a session ------------------------------------------------------------------


async def test_a_token_works_once_while_its_connection_stands(
    house: House, neighbour: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    session, first = await house.enter()
    replay = await house.connect()
    replay.send(hello(session.token))
    await replay.ended()
    assert reasons(caplog) == ["closed an unknown connection: the session has, or had, its connection"]
    first.send(call(1, b"the first"))
    assert (await first.receive())[1] == [b"THE FIRST"]


async def test_a_token_works_once_also_when_its_connection_is_gone(
    house: House, neighbour: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    session, first = await house.enter()
    await first.leave()
    assert await session.lost == "the sandbox closed the connection"
    replay = await house.connect()
    replay.send(hello(session.token))
    await replay.ended()
    assert reasons(caplog) == ["closed an unknown connection: the session has, or had, its connection"]


async def test_a_closed_session_takes_no_hello(house: House, caplog: pytest.LogCaptureFixture) -> None:
    session = house.open()
    house.handler.close_session(session)
    peer = await house.connect()
    peer.send(hello(session.token))
    await peer.ended()
    assert reasons(caplog) == ["closed an unknown connection: the token is of no session"]


async def test_tokens_are_long_and_never_alike(house: House) -> None:
    tokens = {house.open().token for _ in range(100)}
    assert len(tokens) == 100
    assert min(map(len, tokens)) > 64


# --- after the hello ---------------------------------------------------------------------------


def confused(**fields: Any) -> bytes:
    return wire.encode({"t": "call", "id": 1, "fn": "llm_query", **fields})


LATER_FRAMES: dict[str, tuple[Callable[[Session], bytes], str]] = {
    "second hello": (lambda s: hello(s.token), "a second hello"),
    "failed after hello": (lambda s: wire.encode({"t": "failed", "token": s.token}), "a second hello"),
    "header too long": (lambda s: (wire.HEADER_LIMIT + 1).to_bytes(4, "big"), r"outside 2\.\.1048576"),
    "header of no length": (lambda s: bytes(4), "a header of 0 bytes"),
    "blobs too long": (lambda s: confused(blobs=[wire.BLOB_LIMIT + 1]), "over 268435456"),
    "blobs too long together": (lambda s: confused(blobs=[1 << 27] * 3), "over 268435456"),
    "negative blob": (lambda s: confused(blobs=[-1]), "not a natural number"),
    "sizes of thousands of digits": (lambda s: confused(blobs=[10**4299, 10**4299 * 9]), "blob"),
    "garbage": (lambda s: b"\xde\xad\xbe\xef" * 8, "outside 2"),
    "not JSON": (lambda s: wire.join(b"\x80\x04K\x01."), "not a message of this protocol"),
    "id of no type": (lambda s: confused(id="1"), "Expected `int`, got `str`"),
    "id true": (lambda s: confused(id=True), "Expected `int`, got `bool`"),
    "id float": (lambda s: confused(id=1.5), "Expected `int`, got `float`"),
    "id null": (lambda s: confused(id=None), "Expected `int`, got `null`"),
    "type a list": (lambda s: confused(t=["call"]), "not a message of this protocol"),
    "type of the host": (lambda s: wire.encode({"t": "execute", "id": 1}), "Invalid value"),
    "function unknown": (lambda s: confused(fn="exec"), "Invalid enum value"),
    "blobs true": (lambda s: confused(blobs=True), "Expected `array`, got `bool`"),
    "blob size true": (lambda s: confused(blobs=[True]), "Expected `int`, got `bool`"),
    "model a number": (lambda s: confused(model=5), "Expected `str \\| null`"),
    "field unknown": (lambda s: confused(depth=0), "unknown field `depth`"),
    "duplicate id": (lambda s: call(7, HOLD) + call(7, b"again"), "call 7 is already in flight"),
    "prompt not UTF-8": (lambda s: call(1, b"caf\xe9"), "a prompt is not UTF-8"),
    "prompt half a surrogate": (lambda s: call(1, b"\xed\xa0\x80"), "a prompt is not UTF-8"),
}


@pytest.mark.parametrize("case", LATER_FRAMES)
async def test_a_frame_out_of_order_ends_its_connection_with_a_reason(
    case: str, house: House, neighbour: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    make, reason = LATER_FRAMES[case]
    session, peer = await house.enter()
    peer.send(make(session))
    await peer.ended()
    assert re.search(reason, await session.lost)
    [logged] = reasons(caplog)
    assert re.match(f"closed session {session.id}: .*{reason}", logged, re.DOTALL)
    assert session.token not in logged


async def test_nothing_behind_a_broken_frame_is_served(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    _, peer = await house.enter()
    peer.send(call(1, b"\xff") + call(2, b"never"))
    await peer.ended()
    assert house.asked == []


async def test_a_broken_frame_leaves_one_line_in_the_log_whatever_it_says(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    """Who reads the log can trust its lines, and its disk."""
    _, peer = await house.enter()
    peer.send(
        wire.encode({"t": "call", "id": 1, "fn": "budget", "x\nCRITICAL root: forged" + "x" * 100_000: 1})
    )
    await peer.ended()
    [logged] = reasons(caplog)
    assert len(logged.splitlines()) == 1
    assert len(logged) < 2000


@pytest.mark.parametrize("proved", [False, True], ids=["stranger", "session"])
@pytest.mark.parametrize("length", [1, 3, 4, 20, -1])
async def test_a_frame_that_is_cut_off_by_the_end_of_the_stream_is_logged(
    proved: bool, length: int, house: House, neighbour: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    session = house.open()
    peer = (await house.enter(session=session))[1] if proved else await house.connect()
    frame = call(1, b"a prompt") if proved else hello(session.token)
    peer.send(frame[:length])
    peer.finish()
    await peer.ended()
    [logged] = reasons(caplog)
    assert logged.startswith(f"closed session {session.id}: " if proved else "closed an unknown connection: ")
    assert "in the middle of a frame" in logged


async def test_an_orderly_end_is_no_cause_for_a_warning(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    session, peer = await house.enter()
    await peer.leave()
    assert await session.lost == "the sandbox closed the connection"
    assert reasons(caplog) == []


async def test_a_pause_in_the_middle_of_a_frame_ends_the_connection(
    house: House, neighbour: Peer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, peer = await house.enter()
    monkeypatch.setattr(session_module, "STALL_TIMEOUT", 0.02)
    peer.send(call(1, b"a prompt")[:-3])
    await peer.ended()
    assert reasons(caplog) == [f"closed session {session.id}: no byte for 0.02 s in the middle of a frame"]


async def test_a_slow_frame_that_moves_on_is_taken(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    _, peer = await house.enter()
    monkeypatch.setattr(session_module, "STALL_TIMEOUT", 0.3)
    for byte in call(1, b"slow"):
        peer.send(bytes([byte]))
        await asyncio.sleep(0.005)
    assert (await peer.receive())[1] == [b"SLOW"]


async def test_a_pause_between_frames_may_be_of_any_length(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, peer = await house.enter()
    monkeypatch.setattr(session_module, "STALL_TIMEOUT", 0.01)
    frame = call(1, b"one")
    peer.send(frame[:5])
    await asyncio.sleep(0)
    peer.send(frame[5:])
    assert (await peer.receive())[1] == [b"ONE"]
    await asyncio.sleep(0.05)
    peer.send(call(2, b"two"))
    assert (await peer.receive())[1] == [b"TWO"]


async def test_a_call_too_many_in_flight_ends_the_connection(
    house: House, neighbour: Peer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "IN_FLIGHT_LIMIT", 3)
    session, peer = await house.enter()
    peer.send(b"".join(call(number, HOLD) for number in range(4)))
    await peer.ended()
    assert reasons(caplog) == [f"closed session {session.id}: more than 3 calls in flight"]


async def test_calls_up_to_the_limit_are_answered(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "IN_FLIGHT_LIMIT", 3)
    _, peer = await house.enter()
    for start in (0, 3):  # what is answered makes room
        peer.send(b"".join(call(start + number, HOLD) for number in range(3)))
        await house.until_asked(start + 3)
        house.gate.set()
        assert {(await peer.receive())[0]["id"] for _ in range(3)} == set(range(start, start + 3))
        house.gate.clear()


async def test_a_client_that_does_not_read_is_not_read_either(house: House) -> None:
    """Else its unread answers would fill the host's memory."""
    total, served = 3000, 0

    async def serve(call: protocol.Call, texts: list[str]) -> Answers:
        nonlocal served
        served += 1
        return ["x" * 20_000]

    session = house.handler.open_session(serve, lambda *_: None)
    loop = asyncio.get_running_loop()
    with socket.socket() as stream:
        stream.setblocking(False)
        await loop.sock_connect(stream, house.handler.address)
        await loop.sock_sendall(stream, hello(session.token))
        await session.connected(PATIENCE)
        requests = b"".join(call(number, b"?" * 2000) for number in range(total))
        asking = asyncio.create_task(loop.sock_sendall(stream, requests))
        seen = -1
        while served != seen and served < total:  # until it rests, or has served all
            seen = served
            await asyncio.sleep(0.2)
        asking.cancel()
        await asyncio.wait([asking])
    await session.lost
    assert served < total


# --- calls -------------------------------------------------------------------------------------


async def test_calls_are_multiplexed_and_answered_as_they_are_done(house: House) -> None:
    _, peer = await house.enter()
    peer.send(call(1, HOLD) + call(2, b"quick") + call(3, b"one", b"two", batch=True))
    first = [await peer.receive(), await peer.receive()]
    assert sorted((header["id"], blobs) for header, blobs in first) == [
        (2, [b"QUICK"]),
        (3, [b"ONE", b"TWO"]),
    ]
    house.gate.set()
    assert await peer.receive() == ({"t": "reply", "id": 1, "blobs": [4]}, [b"HOLD"])


async def test_an_id_may_be_used_again_when_its_call_is_answered(house: House) -> None:
    _, peer = await house.enter()
    for _ in range(2):
        peer.send(call(1, b"again"))
        assert (await peer.receive())[1] == [b"AGAIN"]


async def test_everything_but_calls_goes_to_the_receiver(house: House) -> None:
    _, peer = await house.enter()
    peer.send(
        wire.encode({"t": "output", "id": 1, "stream": "stdout"}, [b"\xff"])
        + wire.encode({"t": "loaded", "id": 2})
    )
    peer.send(call(1, b"ping"))
    await peer.receive()
    assert house.told == [
        (protocol.Output(id=1, stream="stdout", blobs=[1]), [b"\xff"]),
        (protocol.Loaded(id=2), []),
    ]


async def test_a_session_tells_when_its_sandbox_waits(house: House) -> None:
    session, peer = await house.enter()
    told: list[bool] = []
    session.on_waiting = told.append
    peer.send(call(1, HOLD) + call(2, HOLD))
    await house.until_asked(2)
    assert (told, session.in_flight) == ([True], 2)
    house.gate.set()
    await peer.receive()
    await peer.receive()
    assert (told, session.in_flight) == ([True, False], 0)


async def test_a_call_that_is_cancelled_before_it_begins_is_not_waited_for(house: House) -> None:
    """Else the cells that come after it would have no deadline."""
    session, _ = await house.enter()
    told: list[bool] = []
    session.on_waiting = told.append
    session.take(protocol.Call(id=1, fn="llm_query"), [b"never served"])
    session.cancel_calls()
    await asyncio.sleep(0)
    assert (told, session.in_flight, house.asked) == ([True, False], 0, [])


async def test_a_call_that_does_not_end_when_it_is_cancelled_is_none_of_those_that_come_later(
    house: House,
) -> None:
    """Else the sandbox would not be seen to wait for these."""
    stubborn = asyncio.Event()

    async def serve(call: protocol.Call, texts: list[str]) -> Answers:
        while texts == ["stubborn"] and not stubborn.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await stubborn.wait()
        return texts

    session = house.handler.open_session(serve, lambda *_: None)
    _, peer = await house.enter(session=session)
    told: list[bool] = []
    session.on_waiting = told.append
    session.take(protocol.Call(id=1, fn="llm_query"), [b"stubborn"])
    await asyncio.sleep(0)
    session.cancel_calls()
    assert (told, session.in_flight) == ([True, False], 0)
    peer.send(call(1, b"later"))
    assert await peer.receive() == ({"t": "reply", "id": 1, "blobs": [5]}, [b"later"])
    stubborn.set()
    peer.send(call(2, b"last"))
    assert (await peer.receive())[0]["id"] == 2
    await asyncio.sleep(0)
    assert told == [True, False] * 3


async def test_texts_in_flight_are_bounded_and_whoever_asks_for_more_is_told(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "HELD_LIMIT", 3 << 20)
    _, peer = await house.enter()
    text = b"x" * (1 << 20)
    peer.send(b"".join(call(number, HOLD, text) for number in range(1, 5)))
    for number in (3, 4):  # with the word beside it the third is too much
        header, _ = await peer.receive()
        assert header["id"] == number
        assert header["error"][1].startswith("the calls in flight hold more than 3 MiB of text together")
    house.gate.set()
    assert {(await peer.receive())[0]["id"] for _ in range(2)} == {1, 2}
    peer.send(call(5, text))  # what is answered makes room
    assert (await peer.receive())[1] == [text.upper()]


Serve = Callable[[protocol.Call, list[str]], Awaitable[Answers]]


def giving(answers: Sequence[Any]) -> Serve:
    async def serve(call: protocol.Call, texts: list[str]) -> Answers:
        return answers

    return serve


def failing(error: Exception) -> Serve:
    async def serve(call: protocol.Call, texts: list[str]) -> Answers:
        raise error

    return serve


async def ask(house: House, serve: Serve, request: bytes) -> Frame:
    """What a sandbox whose calls ``serve`` answers gets for one request."""

    async def serve_or_pong(call: protocol.Call, texts: list[str]) -> Answers:
        return ["pong"] if texts == ["ping"] else await serve(call, texts)

    session = house.handler.open_session(serve_or_pong, lambda *_: None)
    served = asyncio.Event()
    session.on_waiting = lambda waiting: None if waiting else served.set()
    _, peer = await house.enter(session=session)
    peer.send(request)
    await served.wait()
    peer.send(call(1_000_000, b"ping"))
    header, blobs = await peer.receive()
    assert header["id"] != 1_000_000, "the call before was never answered"
    return header, blobs


async def test_a_failed_call_is_answered_with_its_type_and_message(house: House) -> None:
    header, blobs = await ask(house, failing(ModelError("no luck")), call(5, b"x"))
    assert (header, blobs) == ({"t": "reply", "id": 5, "error": ["ModelError", "no luck"]}, [])


async def test_a_batch_marks_its_failed_items(house: House) -> None:
    answers: list[str | RLMError] = ["one", ModelError("no luck"), ""]
    header, blobs = await ask(house, giving(answers), call(5, b"a", b"b", b"c", batch=True))
    assert header["failures"] == [[1, "ModelError", "no luck"]]
    assert blobs == [b"one", b"", b""]


async def test_an_answer_that_utf_8_has_no_form_for_is_sent_with_a_substitute(house: House) -> None:
    assert (await ask(house, giving(["a\ud800b"]), call(5, b"x")))[1] == [b"a?b"]


@pytest.mark.parametrize(
    "serve",
    [failing(ValueError("a bug of ours")), failing(OSError(28, "no space")), giving([None])],
    ids=["ValueError", "OSError", "no text"],
)
async def test_a_call_whose_service_breaks_is_answered_with_an_error(serve: Serve, house: House) -> None:
    """Whoever waits for an answer must get one, or a cell without a deadline waits for ever."""
    header, _ = await ask(house, serve, call(5, b"x"))
    assert header["id"] == 5
    assert len(header["error"]) == 2


async def test_an_error_of_any_length_is_answered(house: House) -> None:
    long = ModelError("the provider says: " + "<html>" * 400_000)
    header, _ = await ask(house, failing(long), call(5, b"x"))
    assert header["id"] == 5
    assert header["error"][0] == "ModelError"


async def test_a_batch_of_any_number_of_errors_is_answered(house: House) -> None:
    answers = [ModelError("x" * 1000)] * 2000
    header, _ = await ask(house, giving(answers), call(5, *[b"x"] * 2000, batch=True))
    assert header["id"] == 5
    assert "failures" in header or "error" in header


# --- the end of a session ----------------------------------------------------------------------


async def test_closing_a_session_cancels_its_calls_and_closes_its_connection(
    house: House, neighbour: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    session, peer = await house.enter()
    peer.send(call(1, HOLD, b"mine"))
    await house.until_asked(3)
    house.handler.close_session(session)
    await peer.ended()
    assert house.cancelled == ["hold", "mine"]
    assert session.lost.result() == "the session was closed"
    assert reasons(caplog) == []


async def test_a_lost_connection_cancels_its_calls(house: House, neighbour: Peer) -> None:
    session, peer = await house.enter()
    peer.send(call(1, HOLD, b"mine"))
    await house.until_asked(3)
    await peer.leave()
    await session.lost
    await asyncio.sleep(0)
    assert house.cancelled == ["hold", "mine"]


async def test_closing_twice_is_closing_once(house: House) -> None:
    session, peer = await house.enter()
    house.handler.close_session(session)
    house.handler.close_session(session)
    await peer.ended()
    assert not session.is_connected


async def test_sending_without_a_connection_says_why_there_is_none(house: House) -> None:
    session = house.open()
    with pytest.raises(SandboxLost, match="it has not connected"):
        session.send({"t": "execute", "id": 1})
    _, peer = await house.enter(session=session)
    peer.send(b"\xff" * 8)
    await peer.ended()
    await session.lost
    with pytest.raises(SandboxLost, match="protocol error: a header of 4294967295 bytes"):
        session.send({"t": "execute", "id": 1})


async def test_a_handler_that_ends_takes_its_sessions_along() -> None:
    async with LMHandler(None, Ledger(Limits()), EventBus()) as handler:
        house = House(handler)
        address = handler.address
        _, peer = await house.enter()
        peer.send(call(1, HOLD))
        await house.until_asked(1)
    await peer.ended()
    await peer.leave()
    assert house.cancelled == ["hold"]
    with pytest.raises(ConnectionError):
        await asyncio.open_connection(*address)


async def test_a_session_that_outlives_its_handler_goes_on_with_another() -> None:
    async with LMHandler(None, Ledger(Limits()), EventBus()) as second:
        async with LMHandler(None, Ledger(Limits()), EventBus()) as first:
            house = House(first)
            session, peer = await house.enter()
            session.outlives_handler = True
            peer.send(call(1, HOLD))
            await house.until_asked(1)
        second.take_over(session)
        house.gate.set()
        assert (await peer.receive())[1] == [b"HOLD"]
        peer.send(call(2, b"still here"))
        assert (await peer.receive())[1] == [b"STILL HERE"]
        assert session.is_connected
        session.outlives_handler = False
    await peer.ended()
    await peer.leave()
    assert session.lost.result() == "the session was closed"


async def test_of_two_handlers_either_may_end_a_session_that_has_moved(house: House) -> None:
    session, peer = await house.enter()
    async with LMHandler(None, Ledger(Limits()), EventBus()) as other:
        other.take_over(session)
        other.close_session(session)
        house.handler.close_session(session)
    await peer.ended()


# --- listening ---------------------------------------------------------------------------------


async def test_the_handler_listens_on_loopback_only(house: House) -> None:
    host, port = house.handler.address
    assert host == "127.0.0.1"
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.2", port)  # as would answer on 0.0.0.0


def test_hundreds_of_connections_may_wait_to_be_accepted() -> None:
    assert handler_module.BACKLOG >= 1024


async def test_three_hundred_simultaneous_connections_are_all_served(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    sessions = [house.open() for _ in range(300)]
    peers = await asyncio.gather(*(house.connect() for _ in sessions))
    for number, peer in enumerate(peers):
        peer.send(hello(sessions[number].token) + call(number, HOLD, b"from %d" % number))
    await house.until_asked(600)
    house.gate.set()
    replies = await asyncio.gather(*(peer.receive() for peer in peers))
    assert [blobs for _, blobs in replies] == [[b"HOLD", b"FROM %d" % number] for number in range(300)]
    assert all(session.is_connected for session in sessions)
    assert reasons(caplog) == []


def test_warnings_of_the_handler_go_to_its_own_logger() -> None:
    assert session_module.log is logging.getLogger("rlm.handler")

"""Protocol: hostile bytes at both ends of a sandbox's connection, and who is not disturbed by them."""

# ruff: noqa: E501 (a table of frames reads best with few lines)

from __future__ import annotations

import asyncio
import contextlib
import json
import socket

import pytest

from .. import wire
from ..environment import WorkerEnv
from ..errors import SandboxError
from .sessions import OpenSandbox, Sandbox
from .suite import Suite, requires

FORGED = [
    {"t": "hello", "v": 1, "token": "x"}, {"t": "failed", "token": "x"}, {"t": "result"}, {"t": "result", "id": "x"},
    {"t": "result", "id": 1, "parts": 5}, {"t": "result", "id": 1, "parts": ["final"]}, {"t": "result", "id": 10**30},
    {"t": "result", "id": 1, "crash": {"cause": "x", "code": 1, "state": "lost"}}, {"t": "ready", "lost": 5}, {"t": "ready"},
    {"t": "ready", "enforced": {}}, {"t": "crowded"}, {"t": "crash", "crash": {"cause": "x", "code": 1, "state": "restored"}},
    {"t": "loaded", "id": 1}, {"t": "output", "id": 1, "stream": "stdout"}, {"t": "call", "id": 1, "fn": "os.system"},
    {"t": "call", "id": 0, "fn": "llm_query"}, {"t": ["x"]}, {"t": {}}, {}, {"t": "result", "id": 1, "blobs": [1 << 50]},
    {"t": "result", "id": 1, "blobs": [-1]}, {"t": "result", "id": 1, "parts": ["stdout", "stdout"], "blobs": [0, 0]},
]  # fmt: skip
"""What a cell may say to whoever it holds a socket to, in the place of the framework's own code."""

FORGER = """
    import os, stat, time
    body = {body!r}.encode()
    for fd in range(3, 100):
        try:
            if stat.S_ISSOCK(os.fstat(fd).st_mode): os.write(fd, len(body).to_bytes(4, 'big') + body)
        except OSError: pass
    time.sleep(0.1)
    """


LIAR = """
    import gc, os, time
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    for thing in gc.get_objects():
        if type(thing).__name__ == 'StandbySlot': thing.pid = pid
    os._exit(3)
    """
"""Names a process of its own as the one to go on from, and dies."""


def _hello(token: str, version: int = wire.PROTOCOL_VERSION) -> bytes:
    return wire.encode({"t": "hello", "v": version, "token": token, "python": "3.11.0"})


STRANGERS = {
    "nothing": b"",
    "garbage": bytes(range(256)) * 64,
    "a web browser": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "half a length": b"\0\0",
    "a length, and no more": b"\0\0\1\0",
    "a length of 4 GiB": b"\xff\xff\xff\xff" + b"x" * 1000,
    "half a frame": _hello("x" * 80)[:-10],
    "a blob without end": wire.encode({"t": "hello", "v": 1, "token": "x", "python": "", "blobs": [1 << 50]}),
    "nesting without end": (40_000).to_bytes(4, "big") + b"[" * 40_000,
    "a call before a hello": wire.encode({"t": "call", "id": 1, "fn": "llm_query"}, [b"free money"]),
    "a result before a hello": wire.encode({"t": "result", "id": 1}),
    "a token of nobody's": _hello("0123456789abcdef:" + "0" * 64),
    "another version": _hello("0123456789abcdef:" + "0" * 64, version=99),
}
"""What a connection that is no sandbox may send to the handler."""


class Protocol(Suite):
    """Level protocol: forged frames from a cell, and strangers at the handler's door."""

    level = "protocol"

    @pytest.mark.parametrize("message", FORGED, ids=str)
    @requires("cpython")
    async def test_a_forged_message_costs_at_most_its_own_session(
        self, open_sandbox: OpenSandbox, message: object
    ) -> None:
        neighbour, sandbox = await open_sandbox(), await open_sandbox()
        await neighbour.ok("x = 1")
        with contextlib.suppress(SandboxError):
            await sandbox.run(FORGER.format(body=json.dumps(message)), timeout=3)
            await sandbox.run("pass", timeout=3)
        assert await neighbour.value("[x, llm_query('on')]") == [1, "echo:on"]

    @requires("cpython", "processes")
    async def test_a_cell_that_lies_about_its_copy_costs_no_session(self, sandbox: Sandbox) -> None:
        await sandbox.env.add_context("the context")
        await sandbox.run(LIAR, timeout=30)
        assert await sandbox.value("context") == "the context"

    @requires("cpython")
    async def test_frames_that_are_printed_are_output(self, sandbox: Sandbox) -> None:
        frame = wire.encode({"t": "result", "id": 1, "parts": ["final"]}, [b"forged"])
        result = await sandbox.ok(f"import os\nos.write(1, {frame!r})\nos.write(2, {frame!r})")
        assert result.final_answer is None
        assert result.stdout.endswith("forged")
        assert result.stderr.endswith("forged")

    @pytest.mark.parametrize("what", STRANGERS)
    async def test_a_stranger_disturbs_no_session(self, open_sandbox: OpenSandbox, what: str) -> None:
        one, other = await open_sandbox(), await open_sandbox()
        await one.ok("x = 1")
        with await self._stranger(one) as stranger:
            running = asyncio.create_task(other.value("import time; time.sleep(0.2); llm_query('during')"))
            await _say(stranger, STRANGERS[what])
            assert await running == "echo:during"
            assert await one.value("[x, llm_query('on')]") == [1, "echo:on"]

    async def test_another_sessions_token_opens_nothing_while_it_is_connected(
        self, open_sandbox: OpenSandbox
    ) -> None:
        one = await open_sandbox()
        await one.ok("x = 1")
        with await self._stranger(one) as stranger:
            await _say(stranger, _hello(_worker(one).session.token))  # type: ignore[union-attr]
            assert await _ends(stranger)
        assert await one.value("[x, llm_query('on')]") == [1, "echo:on"]

    async def test_the_token_of_a_closed_session_opens_nothing(self, open_sandbox: OpenSandbox) -> None:
        one, other = await open_sandbox(), await open_sandbox()
        token = _worker(one).session.token  # type: ignore[union-attr]
        await one.env.close()
        with await self._stranger(other) as stranger:
            await _say(stranger, _hello(token))
            assert await _ends(stranger)
        assert await other.value("llm_query('on')") == "echo:on"

    async def test_a_hundred_strangers_who_say_nothing_keep_nobody_out(
        self, open_sandbox: OpenSandbox
    ) -> None:
        one = await open_sandbox()
        with contextlib.ExitStack() as stack:
            for _ in range(100):
                stack.enter_context(await self._stranger(one))
            late = await open_sandbox()
            assert await late.value("llm_query('late')") == "echo:late"
            assert await one.value("llm_query('on')") == "echo:on"

    async def _stranger(self, sandbox: Sandbox) -> socket.socket:
        """A connection to the handler that has proved nothing."""
        host = _worker(sandbox)._host
        assert host is not None
        connection = socket.socket()
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, host.handler.address)
        return connection


def _worker(sandbox: Sandbox) -> WorkerEnv:
    if not isinstance(sandbox.env, WorkerEnv):
        pytest.skip("the environment has no connection to the handler")
    return sandbox.env


async def _say(connection: socket.socket, data: bytes) -> None:
    with contextlib.suppress(ConnectionError):
        await asyncio.get_running_loop().sock_sendall(connection, data)


async def _ends(connection: socket.socket) -> bool:
    """Whether the other end closes the connection, having said nothing."""
    async with asyncio.timeout(20):
        try:
            return await asyncio.get_running_loop().sock_recv(connection, 1) == b""
        except ConnectionError:
            return True

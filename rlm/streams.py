"""A worker at the far end of a stream: brought up, and told whose session it is.

For launchers that start ``python3`` with `boot.COMMAND` and hold its standard input and output.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

from . import boot, wire
from .errors import SandboxUnavailable


async def bring_up(stream: socket.socket, options: dict[str, Any]) -> None:
    """Write what the worker is made of, and return when it is ready for a session.

    ``stream`` does not block. Raises EOFError, ConnectionError or FrameError when that is no
    worker, SandboxUnavailable when the worker says itself that it cannot run there.
    """
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(stream, boot.payload(options))
    message, blobs = await _first_frame(stream)
    if message["t"] != "warm":
        raise SandboxUnavailable(b"".join(blobs).decode("utf-8", "replace").strip()[-2000:])


async def _first_frame(stream: socket.socket) -> tuple[dict[str, Any], list[bytes]]:
    """A worker says one thing before it has a session, and nothing after it."""
    loop = asyncio.get_running_loop()
    decoder = wire.Decoder(wire.parse_dict, header_limit=wire.HELLO_LIMIT, blob_limit=1 << 16)
    while True:
        data = await loop.sock_recv(stream, 1 << 16)
        if not data:
            raise EOFError
        decoder.feed(data)
        for frame in decoder:
            return frame


def name_session(stream: socket.socket, token: str) -> None:
    """Tell a worker that is ready whose session this is. The stream is then for `LMHandler.adopt`."""
    with contextlib.suppress(OSError):  # whoever reads the stream will find that it has ended
        stream.send(wire.encode({"t": "session", "token": token}))

"""The least that a call over HTTP takes: kept connections of asyncio, and nothing that a client must have.

No TLS, no chunks, no proxies, no time-outs: a floor, and no product.
"""

from __future__ import annotations

import asyncio
import json
import platform
import urllib.parse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from peers.client_probes import (
    DIRECT,
    DIRECT_NARROW,
    MODEL,
    NARROW,
    STACK,
    STACK_NARROW,
    WIDTH,
    Ask,
    Client,
    fan_out,
    value_names,
)
from peers.common import Probe, Step, main

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def open_pool(url: str) -> AsyncIterator[Ask]:
    parts = urllib.parse.urlsplit(url)
    idle: list[Connection] = []
    head = f"POST {parts.path}/chat/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Length: "

    async def ask(prompt: str) -> str:
        body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": prompt}]}).encode()
        connection = idle.pop() if idle else await asyncio.open_connection(parts.hostname, parts.port)
        reader, writer = connection
        writer.write(f"{head}{len(body)}\r\n\r\n".encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        size = answer.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
        reply = json.loads(await reader.readexactly(int(size)))
        idle.append(connection)
        return str(reply["choices"][0]["message"]["content"])

    yield ask
    for _, writer in idle:
        writer.close()


FLOOR = Client("floor", "", open_pool, "", "")
PASSES = ((WIDTH, (STACK, DIRECT)), (NARROW, (STACK_NARROW, DIRECT_NARROW)))
PROBES = {
    "fanout": Probe(
        60,
        tuple(
            Step(partial(fan_out, FLOOR, prefixes, width), value_names(*prefixes))
            for width, prefixes in PASSES
        ),
    )
}

if __name__ == "__main__":
    main("floor", platform.python_version(), PROBES)

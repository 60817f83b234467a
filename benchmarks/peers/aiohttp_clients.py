"""A bare aiohttp loop: what a client on it could take at the least. Run by any interpreter with aiohttp."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peers.client_probes import MODEL, Ask, Client, measure_client

FIRST = """
async with aiohttp.ClientSession() as session:
    body = {"model": "stub", "messages": [{"role": "user", "content": "hello"}]}
    async with session.post(url + "/chat/completions", json=body) as response:
        await response.json()
"""


@asynccontextmanager
async def open_session(url: str) -> AsyncIterator[Ask]:
    aiohttp = importlib.import_module("aiohttp")
    address = f"{url}/chat/completions"
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:

        async def ask(prompt: str) -> str:
            body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": prompt}]})
            async with session.post(address, data=body.encode()) as response:
                reply = json.loads(await response.read())
            return str(reply["choices"][0]["message"]["content"])

        yield ask


if __name__ == "__main__":
    measure_client(Client("aiohttp", "aiohttp", open_session, "import aiohttp", FIRST))

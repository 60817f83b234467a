"""The openai SDK, run by its own interpreter: with the transport on aiohttp, which is its fastest."""

from __future__ import annotations

import importlib
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peers.client_probes import MODEL, Ask, Client, measure_client

FIRST = """
client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0)
await client.chat.completions.create(model="stub", messages=[{"role": "user", "content": "hello"}])
"""


@asynccontextmanager
async def open_client(url: str) -> AsyncIterator[Ask]:
    openai = importlib.import_module("openai")
    transport = openai.DefaultAioHttpClient()
    async with openai.AsyncOpenAI(
        base_url=url, api_key="none", max_retries=0, http_client=transport
    ) as client:

        async def ask(prompt: str) -> str | None:
            reply = await client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": prompt}]
            )
            text: str | None = reply.choices[0].message.content
            return text

        yield ask


if __name__ == "__main__":
    measure_client(Client("openai", "openai", open_client, "import openai", FIRST))

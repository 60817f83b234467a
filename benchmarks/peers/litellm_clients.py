"""litellm, run by its own interpreter: `acompletion`, with its default transport, which is on aiohttp."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peers.client_probes import MODEL, Ask, Client, measure_client

FIRST = """
await litellm.acompletion(
    model="openai/stub", api_base=url, api_key="none", num_retries=0, max_retries=0,
    messages=[{"role": "user", "content": "hello"}],
)
"""
SLOW_ROUNDS = 3  # Each takes seconds.


@asynccontextmanager
async def open_module(url: str) -> AsyncIterator[Ask]:
    litellm = importlib.import_module("litellm")

    async def ask(prompt: str) -> str | None:
        reply = await litellm.acompletion(
            model=f"openai/{MODEL}",
            api_base=url,
            api_key="none",
            num_retries=0,
            max_retries=0,
            messages=[{"role": "user", "content": prompt}],
        )
        text: str | None = reply.choices[0].message.content
        return text

    yield ask


if __name__ == "__main__":
    # Its import must ask nobody for prices, and read no file of ours.
    os.environ |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MODE": "PRODUCTION"}
    measure_client(Client("litellm", "litellm", open_module, "import litellm", FIRST, SLOW_ROUNDS))

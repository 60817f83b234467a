"""AutoLM: whatever model can be had here, and a sentence about what that is.

Keys in the environment come first, in the order of `KEYS`; then servers on this machine, on
the ports they use unless told otherwise. Nothing but this machine is asked, and a script or
a recording is never chosen.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

from rlm import plugins
from rlm.client import BaseLM, ModelInfo, Reply, Request, SupportsStream
from rlm.errors import AuthError, ConfigError, ModelError
from rlm.http import first_set

from .client import OPENAI, UNNAMED, OpenAILM

KEYS = (
    ("OPENAI_API_KEY", "openai", "gpt-5.4-mini"),
    ("ANTHROPIC_API_KEY", "anthropic", "claude-sonnet-5-5"),
    ("GEMINI_API_KEY", "gemini", "gemini-3.8-flash"),
    ("OPENROUTER_API_KEY", "openrouter", "openai/gpt-5.4-mini"),
    ("LLM_API_KEY", "openai", None),
)
"""A variable, the client it is for, and the model that answers unless another one is named."""

SERVERS = (
    ("Ollama", 11434),
    ("LM Studio", 1234),
    ("llama.cpp", 8080),
    ("vLLM", 8000),
    ("SGLang", 30000),
    ("Docker Model Runner", 12434),
)

PROBE_TIMEOUT = 0.5
"""Seconds a server of this machine has to answer."""


class AutoLM(BaseLM):
    """Chooses a client by what it finds; ``model_name`` and further settings go to that client."""

    def __init__(self, model_name: str | None = None, **settings: Any) -> None:
        self._wanted = model_name
        self.model_name = model_name or UNNAMED
        self._settings = settings
        self._found: BaseLM | None = None

    async def prepare(self) -> str | None:
        """Look around once, and say what was found. Raises AuthError when that is nothing."""
        if self._found is not None:
            return None
        client, said = self._by_key() or await self._by_port()
        try:
            said = await client.prepare() or said
        except BaseException:
            await client.aclose()
            raise
        self._found, self.model_name = client, client.model_name
        return f"backend 'auto': {said}"

    async def complete(self, request: Request) -> Reply:
        return await self._chosen().complete(request)

    async def stream(self, request: Request) -> AsyncIterator[str | Reply]:
        """The chosen client's stream; its whole reply at once if it has none."""
        client = self._chosen()
        if not isinstance(client, SupportsStream):
            yield await client.complete(request)
            return
        pieces = client.stream(request)
        try:
            async for piece in pieces:
                yield piece
        finally:
            close = getattr(pieces, "aclose", None)  # which an iterator need not have
            if close is not None:
                await close()

    def info(self, model: str) -> ModelInfo:
        return self._chosen().info(model)

    def pool_key(self, model: str) -> str:
        """The chosen client's."""
        key = getattr(self._chosen(), "pool_key", None)
        return key(model) if key is not None else type(self._found).__name__

    async def aclose(self) -> None:
        found, self._found = self._found, None
        if found is not None:
            await found.aclose()

    def _chosen(self) -> BaseLM:
        if self._found is None:
            raise ConfigError("the client has not been prepared: await client.prepare() comes first")
        return self._found

    def _by_key(self) -> tuple[BaseLM, str] | None:
        for variable, name, default in KEYS:
            address = first_set(OPENAI.url_variables) if name == "openai" else None
            elsewhere = address not in (None, OPENAI.base_url)  # where the default model is unknown
            model = self._wanted or (None if elsewhere else default)
            if os.environ.get(variable) and (model or elsewhere):
                kind = plugins.load("rlm.clients", name)
                client = self._made(kind, f"backend {name!r}", **({"model_name": model} if model else {}))
                return client, f"{variable} is set: {name}, model {model or 'of that server'}"
        return None

    async def _by_port(self) -> tuple[BaseLM, str]:
        found = [
            server for server in await asyncio.gather(*(self._probe(*server) for server in SERVERS)) if server
        ]
        for title, url, models in found:
            name = self._wanted or next(iter(models), None)
            if name in models:
                told = {"model_name": name, "base_url": url, "context_window": models[name]}
                client = self._made(OpenAILM, "backend 'openai'", **told)
                return client, f"{title} on {url} serves {name!r}"
        servers = "; ".join(
            f"{title} on {url} serves {', '.join(models) or 'nothing'}" for title, url, models in found
        )
        wanted = f" with the model {self._wanted!r}" if self._wanted else ""
        raise AuthError(
            f"no model was found{wanted}: none of {', '.join(key for key, _, _ in KEYS)} is set, and of the "
            f"servers {', '.join(f'{title} ({port})' for title, port in SERVERS)} on this machine "
            f"{servers or 'none answers'}. Set a key, start a server, or name a backend (`rlm clients`).",
            sent=False,
        )

    def _made(self, kind: Any, what: str, **found: Any) -> BaseLM:
        client: BaseLM = plugins.construct(kind, {**found, **self._settings}, what)
        return client

    async def _probe(self, title: str, port: int) -> tuple[str, str, dict[str, int | None]] | None:
        """What a server on this port serves, if it speaks OpenAI's API."""
        url = f"http://127.0.0.1:{port}/v1"
        client = OpenAILM(base_url=url)
        try:
            return title, url, await client.served(PROBE_TIMEOUT)
        except ModelError:
            return None
        finally:
            await client.aclose()

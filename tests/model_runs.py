"""What tests of whole runs through a model server share: scripted turns, spoken by a real sampler."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
from llama_support import LlamaServer

from rlm.client import Reply, Request
from rlm_openai import OpenAILM


class Steered(OpenAILM):
    """The real client of a real server, whose sampler a grammar makes say the next of these replies."""

    def __init__(self, server: LlamaServer, replies: Sequence[str], **settings: Any) -> None:
        super().__init__(server.model, base_url=server.url, **settings)
        self._server = server
        self._replies = [*replies]
        self.replies: list[Reply] = []

    def _next(self, request: Request) -> Request:
        reply = self._replies.pop(0) if len(self._replies) > 1 else self._replies[0]
        extra = {**(request.extra or {}), **self._server.scripted(reply)}
        return msgspec.structs.replace(request, extra=extra)

    async def complete(self, request: Request) -> Reply:
        reply = await super().complete(self._next(request))
        self.replies.append(reply)
        return reply

    async def stream(self, request: Request) -> AsyncIterator[str | Reply]:
        async for piece in super().stream(self._next(request)):
            if isinstance(piece, Reply):
                self.replies.append(piece)
            yield piece

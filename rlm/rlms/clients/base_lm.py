"""BaseLM: a client as scripts for rlms write one, for any place that takes one of the core's."""

from __future__ import annotations

import functools
from abc import abstractmethod
from typing import Any

from rlm import client
from rlm.adapter import SyncLM
from rlm.client import Message, ModelUsageSummary, Reply, Request, Usage, UsageSummary

DEFAULT_TIMEOUT = 300.0
"""Seconds of one attempt."""

Prompt = str | list[dict[str, Any]]
"""A question, or a conversation: role and content of each message."""


class BaseLM(client.BaseLM):
    """A client that waits for its reply, and keeps its own accounts.

    `completion` runs in a thread, several at once. What a reply took is asked of `get_last_usage` right
    after it: of calls at the same time, one may then be told what another took.
    """

    def __init__(
        self,
        model_name: str | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        sampling_args: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.model_name = model_name or client.BaseLM.model_name
        self.timeout = timeout
        self.sampling_args = dict(sampling_args or {})
        self.kwargs = kwargs

    @abstractmethod
    def completion(self, prompt: Any) -> str:
        """The model's reply to a text, or to a list of messages. What it raises fails the call."""

    @abstractmethod
    async def acompletion(self, prompt: Any) -> str:
        """`completion`, awaited. For scripts: the core uses the other."""

    @abstractmethod
    def get_usage_summary(self) -> UsageSummary:
        """What all calls so far took."""

    @abstractmethod
    def get_last_usage(self) -> ModelUsageSummary:
        """What the last call took."""

    async def complete(self, request: Request) -> Reply:
        return await self._threads.complete(request)

    async def aclose(self) -> None:
        await self._threads.aclose()

    @functools.cached_property  # for classes that do not call this one's __init__
    def _threads(self) -> SyncLM:
        return SyncLM(self._replied, model_name=self.model_name)

    def _replied(self, request: Request) -> Reply:
        text = self.completion(prompt_of(request))
        used = self.get_last_usage()
        usage = Usage(used.total_input_tokens, used.total_output_tokens, cost=used.total_cost)
        return Reply(text, usage=usage, model=self.model_name)


def prompt_of(request: Request) -> Prompt:
    """A request as clients of rlms get it: a cell's question as text, anything else as messages."""
    first, *rest = request.messages
    if first.role == "user" and not rest:
        return first.content
    return [{"role": message.role, "content": message.content} for message in request.messages]


def messages_of(prompt: Prompt) -> list[Message]:
    """A text, or a list of dicts, as messages."""
    if isinstance(prompt, str):
        return [Message("user", prompt)]
    return [Message(message["role"], message["content"]) for message in prompt]

"""ProviderClient: a client of the core's, by the name of its backend, with the face of one of rlms."""

from __future__ import annotations

import copy
import functools
from typing import Any, ClassVar

import msgspec

from rlm import hostloop
from rlm.backends import Backends, client_of, sampling_fields
from rlm.client import ModelInfo, ModelUsageSummary, Reply, Request, UsageSummary
from rlm.events import EventBus
from rlm.gate import Gate, Policy
from rlm.handler import Caller, LMHandler
from rlm.ledger import Ledger
from rlm.limits import Limits

from .base_lm import DEFAULT_TIMEOUT, BaseLM, Prompt, messages_of


class ProviderClient(BaseLM):
    """What a backend of the core is called in scripts; ``settings`` are those of the core's client.

    Its calls are made with the core's retries, whether by a run or by `completion`, and are counted here.
    """

    backend: ClassVar[str]
    """Its name in ``RLM(backend=...)``."""

    def __init__(
        self,
        api_key: str | None = None,
        model_name: str | None = None,
        base_url: str | None = None,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        sampling_args: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        given = {"api_key": api_key, "model_name": model_name, "base_url": base_url, **settings}
        self._client = client_of(self.backend, {name: v for name, v in given.items() if v is not None})
        super().__init__(self._client.model_name, timeout, sampling_args)
        self._usage = UsageSummary()
        self._last = ModelUsageSummary()

    def completion(self, prompt: Prompt) -> str:
        """The model's reply to a text, or to a list of messages. Raises ModelError."""
        return hostloop.run(self._ask(prompt))

    async def acompletion(self, prompt: Prompt) -> str:
        """`completion`, awaited."""
        return await hostloop.delegate(self._ask(prompt))

    def get_usage_summary(self) -> UsageSummary:
        """What all calls so far took."""
        return copy.deepcopy(self._usage)

    def get_last_usage(self) -> ModelUsageSummary:
        """What the last call that came back took."""
        return copy.copy(self._last)

    async def complete(self, request: Request) -> Reply:
        mine = sampling_fields(self.sampling_args)
        unset = {name: value for name, value in mine.items() if getattr(request, name) is None}
        reply = await self._client.complete(msgspec.structs.replace(request, **unset))
        self._last = ModelUsageSummary()
        for summary in (self._last, self._usage_of(reply.model or self.model_name)):
            summary.add(reply.usage)
        return reply

    def info(self, model: str) -> ModelInfo:
        return self._client.info(model)

    async def prepare(self) -> str | None:
        note = await self._client.prepare()
        self.model_name = self._client.model_name
        return note

    async def aclose(self) -> None:
        await self._client.aclose()

    def _usage_of(self, model: str) -> ModelUsageSummary:
        return self._usage.model_usage_summaries.setdefault(model, ModelUsageSummary())

    async def _ask(self, prompt: Prompt) -> str:
        await self.prepare()
        door = LMHandler(self._backends, Ledger(Limits()), EventBus(), stream=False)
        return (await door.complete(messages_of(prompt), Caller("script", None, 0, "root"))).text

    @functools.cached_property
    def _backends(self) -> Backends:
        return Backends([Gate(self, self.backend, policy=Policy(timeout=self.timeout))])

"""The contract of a model client, and what passes through it.

A client makes one attempt per call and keeps no accounts: usage travels in the reply.
Retries, limits, accounting and events are the LMHandler's, once for all clients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import msgspec

Role = Literal["system", "user", "assistant"]
Finish = Literal["stop", "length", "filter", "other"]


class Message(msgspec.Struct, frozen=True):
    """One message of a conversation."""

    role: Role
    content: str


class Usage(msgspec.Struct, frozen=True, omit_defaults=True):
    """Tokens of one call. ``input_tokens`` includes ``cached_tokens``; an unknown cost is None."""

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    cost: float | None = None


class Request(msgspec.Struct, frozen=True):
    """One call to a model. What is None was not asked for, and is not sent."""

    messages: tuple[Message, ...]
    model: str | None = None
    timeout: float | None = None


class Reply(msgspec.Struct, frozen=True):
    """What a model answered. ``finish="length"`` says that the text was cut off."""

    text: str
    finish: Finish = "stop"
    usage: Usage = Usage()
    model: str | None = None


class BaseLM(ABC):
    """A model client. Belongs to one event loop; every method runs there."""

    model_name: str = "unknown"
    """The model that answers when a request names none."""

    simulated: bool = False
    """True when no model answers: scripts and recordings, which must never pass for a model."""

    @abstractmethod
    async def complete(self, request: Request) -> Reply:
        """Make one attempt. Cancellable; raises ModelError when there is no reply."""

    async def aclose(self) -> None:  # noqa: B027 - a client without connections has nothing to close
        """Release connections. Safe to call twice."""


class ModelUsageSummary(msgspec.Struct):
    """What one model was used for."""

    total_calls: int = 0
    total_input_tokens: int = 0
    total_output_tokens: int = 0
    total_cached_tokens: int = 0
    total_cost: float | None = None

    def add(self, usage: Usage) -> None:
        """Count one call."""
        self.total_calls += 1
        self.total_input_tokens += usage.input_tokens
        self.total_output_tokens += usage.output_tokens
        self.total_cached_tokens += usage.cached_tokens
        if usage.cost is not None:
            self.total_cost = (self.total_cost or 0.0) + usage.cost


class UsageSummary(msgspec.Struct):
    """What a run tree used, per model; children included, nothing counted twice."""

    model_usage_summaries: dict[str, ModelUsageSummary] = {}

    @property
    def total_calls(self) -> int:
        """Calls over all models."""
        return sum(usage.total_calls for usage in self.model_usage_summaries.values())

    @property
    def total_input_tokens(self) -> int:
        """Input tokens over all models, cached ones included."""
        return sum(usage.total_input_tokens for usage in self.model_usage_summaries.values())

    @property
    def total_output_tokens(self) -> int:
        """Output tokens over all models."""
        return sum(usage.total_output_tokens for usage in self.model_usage_summaries.values())

    @property
    def total_cost(self) -> float | None:
        """US dollars over all models; None when the price of none is known."""
        costs = [usage.total_cost for usage in self.model_usage_summaries.values()]
        known = [cost for cost in costs if cost is not None]
        return sum(known) if known else None

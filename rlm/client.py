"""The contract of a model client, and what passes through it.

A client makes one attempt per call and keeps no accounts: usage travels in the reply.
Retries, limits, accounting and events are the LMHandler's, once for all clients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import msgspec

Role = Literal["system", "user", "assistant"]
Finish = Literal["stop", "length", "filter", "other"]
Feature = Literal["temperature", "stop", "seed", "schema", "stream"]


class Message(msgspec.Struct, frozen=True):
    """One message of a conversation."""

    role: Role
    content: str


CHARACTERS_PER_TOKEN = 4
"""What an estimate takes a token to be."""


class Usage(msgspec.Struct, frozen=True, omit_defaults=True):
    """Tokens of one call. An unknown cost is None, never 0."""

    input_tokens: int = 0
    """Everything that was read, ``cached_tokens`` and ``cache_write_tokens`` included."""
    output_tokens: int = 0
    """Everything that was written, ``reasoning_tokens`` included."""
    cached_tokens: int = 0
    """Of the input: read from the provider's cache."""
    cost: float | None = None
    """US dollars."""
    cache_write_tokens: int = 0
    """Of the input: put into the provider's cache."""
    reasoning_tokens: int = 0
    """Of the output: thought, and not said."""
    estimated: bool = False
    """Whether the tokens were guessed from lengths, because nobody counted them."""

    @classmethod
    def estimate(cls, messages: Sequence[Message], text: str) -> Usage:
        """Guess tokens from lengths, for a reply that comes without a count."""
        read = sum(len(message.content) for message in messages)
        return cls(_tokens(read), _tokens(len(text)), estimated=True)


def _tokens(characters: int) -> int:
    return -(-characters // CHARACTERS_PER_TOKEN)


class Request(msgspec.Struct, frozen=True, omit_defaults=True):
    """One call to a model. What is None was not asked for, and is not sent."""

    messages: tuple[Message, ...]
    model: str | None = None
    """None is the client's own `BaseLM.model_name`."""
    timeout: float | None = None
    """Seconds for the whole attempt. The LMHandler ends it too, should the client not."""
    max_tokens: int | None = None
    temperature: float | None = None
    stop: tuple[str, ...] | None = None
    seed: int | None = None
    schema: dict[str, Any] | None = None
    """A JSON schema that the reply is to follow."""
    session: str | None = None
    """The same for calls that share a beginning: where a provider's cache is to look first."""
    cache: bool = False
    """A later request will begin with these messages: worth a provider's while to keep them."""
    extra: dict[str, Any] | None = None
    """Further fields of the provider's own, sent as they are."""


class Reply(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a model answered. ``finish="length"`` says that the text was cut off."""

    text: str
    finish: Finish = "stop"
    usage: Usage = Usage()
    model: str | None = None
    """The model that answered, by the provider's own name."""
    id: str | None = None
    """The provider's name for the call."""
    raw: Any = None
    """The provider's own reply, as data, where there is more in it."""
    cached: bool = False
    """Whether it was found in the cache of an RLM, or shared with an identical call: set at the door."""


class Price(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """US dollars for a million tokens."""

    input: float
    output: float
    cached: float | None = None
    """For input from the provider's cache; None costs as much as any input."""
    cache_write: float | None = None
    """For input put into the cache; None costs as much as any input."""
    above: int | None = None
    """Input tokens above which the whole call is priced as ``long``."""
    long: Price | None = None

    def __post_init__(self) -> None:
        if any(
            value is not None and value < 0
            for value in (self.input, self.output, self.cached, self.cache_write)
        ):
            raise ValueError("a price is not negative")

    def cost(self, usage: Usage) -> float:
        """Dollars for what a call used."""
        if self.long is not None and self.above is not None and usage.input_tokens > self.above:
            return self.long.cost(usage)
        cached = self.input if self.cached is None else self.cached
        written = self.input if self.cache_write is None else self.cache_write
        fresh = max(usage.input_tokens - usage.cached_tokens - usage.cache_write_tokens, 0)
        return (
            fresh * self.input
            + usage.cached_tokens * cached
            + usage.cache_write_tokens * written
            + usage.output_tokens * self.output
        ) / 1e6


class ModelInfo(msgspec.Struct, frozen=True):
    """What is known of a model. None is unknown."""

    context_window: int | None = None
    """Tokens it can read."""
    max_output: int | None = None
    """Tokens it can write in one reply."""
    price: Price | None = None
    supports: frozenset[Feature] | None = None
    """What may be asked of it."""
    tells_cost: bool = False
    """Whether every reply says what it cost, so that no price is needed."""


class BaseLM(ABC):
    """A model client. Belongs to one event loop, the core's; every method runs there."""

    model_name: str = "unknown"
    """The model that answers when a request names none."""

    simulated: bool = False
    """True when no model answers: scripts and recordings, which must never pass for a model."""

    @abstractmethod
    async def complete(self, request: Request) -> Reply:
        """Make one attempt. Cancellable; raises ModelError when there is no reply.

        The kind of ModelError decides what happens next (see `rlm.errors`): a
        `RetryableError` is tried again by the LMHandler. A library's own retries are to be off.
        """

    async def prepare(self) -> str | None:
        """Find out what has to be known before the first call, such as which server answers.

        Called before each run, so what was found is to be kept. Returns a sentence for the
        user when there is something to say, else None. Raises ModelError or ConfigError.
        """
        return None

    def info(self, model: str) -> ModelInfo:
        """What is known of one of this client's models. Asks nobody."""
        return ModelInfo()

    async def aclose(self) -> None:  # noqa: B027 - a client without connections has nothing to close
        """Release connections. Safe to call twice."""


@runtime_checkable
class SupportsStream(Protocol):
    """A client that can hand a reply over while it is written."""

    def stream(self, request: Request) -> AsyncIterator[str | Reply]:
        """Pieces of the text in order, and at the end the whole Reply. Errors as `BaseLM.complete`."""


@runtime_checkable
class SupportsCount(Protocol):
    """A client that can count tokens."""

    async def count(self, request: Request) -> tuple[int, bool]:
        """Tokens of a request, and whether that is exact."""


@runtime_checkable
class SupportsPoolKey(Protocol):
    """A client that knows which of its models share a provider's limits."""

    def pool_key(self, model: str) -> str:
        """Models of one key are slowed down, and given up on, together."""


class ModelUsageSummary(msgspec.Struct):
    """What one model was used for."""

    total_calls: int = 0
    total_input_tokens: int = 0
    total_output_tokens: int = 0
    total_cost: float | None = None
    total_cached_tokens: int = 0
    total_retries: int = 0
    """Attempts that failed and were made again; some may have been billed."""
    unpriced_calls: int = 0
    """Calls whose cost nobody knows: ``total_cost`` is without them."""
    total_cache_hits: int = 0
    """Replies that cost no call, see ``cache=``. They are in none of the other figures."""

    def add(self, usage: Usage) -> None:
        """Count one call."""
        self.total_calls += 1
        self.total_input_tokens += usage.input_tokens
        self.total_output_tokens += usage.output_tokens
        self.total_cached_tokens += usage.cached_tokens
        if usage.cost is not None:
            self.total_cost = (self.total_cost or 0.0) + usage.cost
        else:
            self.unpriced_calls += 1

    def add_hit(self) -> None:
        """Count a reply that cost no call: nothing, which is a known cost."""
        self.total_cache_hits += 1
        self.total_cost = self.total_cost or 0.0

    def to_dict(self) -> dict[str, Any]:
        """As plain data; without a cost, when nobody knows it."""
        return {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}


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
    def total_cached_tokens(self) -> int:
        """Of the input, tokens that providers had in their caches."""
        return sum(usage.total_cached_tokens for usage in self.model_usage_summaries.values())

    @property
    def total_cache_hits(self) -> int:
        """Replies over all models that cost no call, and are in no other figure."""
        return sum(usage.total_cache_hits for usage in self.model_usage_summaries.values())

    @property
    def total_cost(self) -> float | None:
        """US dollars over all models; None when the price of none is known."""
        costs = [usage.total_cost for usage in self.model_usage_summaries.values()]
        known = [cost for cost in costs if cost is not None]
        return sum(known) if known else None

    def to_dict(self) -> dict[str, Any]:
        """As plain data; without a cost, when nobody knows it."""
        models = {name: usage.to_dict() for name, usage in self.model_usage_summaries.items()}
        cost = {} if self.total_cost is None else {"total_cost": self.total_cost}
        return {"model_usage_summaries": models, **cost}

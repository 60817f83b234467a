"""A conversation of which its model can soon read no more: summed up by the model, and gone on with.

After a compaction the conversation is its first two messages, the summary, and the word to go on. All that
was said before stands in the sandbox as ``history``. What this knows of a conversation is its messages, and
how many tokens they were; it makes no call itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, runtime_checkable

from . import prompts
from .client import CHARACTERS_PER_TOKEN, Message, Reply, Usage
from .environment import BaseEnv
from .gate import Gate

DEFAULT_WINDOW = 128_000
"""Tokens that a model is taken to read, when nobody knows."""

OPENING = 2
"""Messages that are never summed up: the system prompt, and the task."""

COMPACTED = OPENING + 2
"""Messages of a conversation that has just been summed up."""


@runtime_checkable
class SupportsPut(Protocol):
    """Environments in which values of the host's can stand under names of its choice."""

    async def put(self, name: str, value: object) -> None:
        """Put a value into the namespace, over what the name stood for."""


@dataclasses.dataclass
class Threshold:
    """When the conversations of a run tree are summed up."""

    fraction: float
    """Of what a model reads."""
    unknown: set[str] = dataclasses.field(default_factory=set)
    """Models of which nobody knows how much they read."""

    def tokens(self, gate: Gate) -> tuple[int, str | None]:
        """Tokens from which on it is time, and what the user is to be told of them, if anything."""
        model = gate.client.model_name
        window, warning = gate.info(model).context_window, None
        if window is None and model not in self.unknown:
            self.unknown.add(model)
            warning = (
                f"compaction: nobody knows how much {model!r} ({gate.name}) reads; "
                f"{DEFAULT_WINDOW:,} tokens are assumed"
            )
        return int((window or DEFAULT_WINDOW) * self.fraction), warning


class Compaction:
    """The conversation of one run, from one compaction to the next."""

    def __init__(self) -> None:
        self.number = 0
        self._past: list[dict[str, str]] = []
        self._in_past = 0
        self._least = OPENING
        self._tokens_per_character = 1 / CHARACTERS_PER_TOKEN

    def learn(self, messages: Sequence[Message], usage: Usage) -> None:
        """Take note of how many tokens a request was."""
        characters = _characters(messages)
        if usage.input_tokens and characters and not usage.estimated:
            self._tokens_per_character = usage.input_tokens / characters

    def tokens(self, messages: Sequence[Message]) -> int:
        """About how many tokens a request with these messages takes."""
        return round(_characters(messages) * self._tokens_per_character)

    def history(self, messages: Sequence[Message]) -> list[dict[str, str]]:
        """All that has been said: what was summed up, the summaries, and what the conversation is now."""
        now = [{"role": message.role, "content": message.content} for message in messages[self._in_past :]]
        return [*self._past, *now]

    async def begin(self, env: BaseEnv) -> None:
        """Make sure that there is a ``history``, and that it is of this run."""
        if isinstance(env, SupportsPut):
            await env.put("history", [])

    async def compact(
        self,
        messages: list[Message],
        limit: int,
        ask: Callable[[list[Message]], Awaitable[Reply]],
        env: BaseEnv,
        left: int,
    ) -> list[Message]:
        """The conversation to go on with: the same, or a shorter one when it has come to ``limit`` tokens.

        ``left`` is the turns that the model is told it has. A model that has nothing to say is not taken
        at its word. Raises what ``ask`` raises, and SandboxError.
        """
        if len(messages) <= self._least or self.tokens(messages) < limit:
            return messages
        summary = (await ask(_request(messages))).text.strip()
        if not summary:
            return messages
        self.number += 1
        self._past = [*self.history(messages), {"type": "summary", "content": summary}]
        self._in_past, self._least = COMPACTED - 1, COMPACTED
        keeps = isinstance(env, SupportsPut)
        if isinstance(env, SupportsPut):
            await env.put("history", self._past)
        word = prompts.fill(
            "compacted",
            number=str(self.number),
            history=prompts.text("compacted_history") if keeps else "",
            left=str(left),
        )
        return [*messages[:OPENING], Message("assistant", summary), Message("user", word)]


def shared(before: Sequence[Message], now: Sequence[Message]) -> int:
    """How many messages two requests have in common at their beginnings."""
    count = 0
    for old, new in zip(before, now, strict=False):
        if old != new:
            break
        count += 1
    return count


def asks_for_summary(messages: Sequence[Message]) -> bool:
    """Whether a request is no turn of its run, but for what the conversation goes on from."""
    return messages[-1].content.endswith(prompts.text("summarise"))


def _request(messages: Sequence[Message]) -> list[Message]:
    """Ask for a summary in the last message, which is the user's: some models want turns to alternate."""
    last = messages[-1]
    return [*messages[:-1], Message(last.role, f"{last.content}\n\n{prompts.text('summarise')}")]


def _characters(messages: Sequence[Message]) -> int:
    return sum(len(message.content) for message in messages)

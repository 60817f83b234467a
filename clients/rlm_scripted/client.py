"""ScriptedLM: replies that were written beforehand, and say so.

Rules answer by what a call says, the script answers in order. Token counts are
estimates (four characters a token), so that limits and displays have something to show.
"""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

import msgspec

from rlm.client import BaseLM, Message, ModelInfo, Reply, Request, Usage
from rlm.errors import ConfigError, ModelError, ScriptExhausted

Step = str | Reply | Exception | Callable[[Sequence[Message]], Any]
"""A reply, an error to raise, or a function of the messages that returns (or awaits) one."""


class ScriptedLM(BaseLM):
    """Answers calls from rules first, then from a script, one step a call.

    ``latency`` is in seconds and applies to every call; ``fail_calls`` are the numbers
    (from 1) of calls that fail with ModelError; ``cost`` is what each call is said to have cost,
    in dollars. Running out of script raises
    ScriptExhausted, which says how many calls were made.
    """

    simulated = True

    def __init__(
        self,
        script: Iterable[Step] | Step = (),
        *,
        rules: Iterable[tuple[str, Step] | tuple[str, Step, bool]] = (),
        latency: float = 0.0,
        fail_calls: Iterable[int] = (),
        cost: float | None = None,
        model_name: str = "scripted",
    ) -> None:
        self.model_name = model_name
        self.calls = 0
        self._always = script if callable(script) else None
        steps = [script] if isinstance(script, str | Reply | Exception) else script
        self._script = [] if callable(steps) else list(steps)
        self._length = len(self._script)
        self._rules: list[tuple[Callable[[str], bool], Step]] = []
        self._latency = latency
        self._cost = cost
        self._fail_calls = frozenset(fail_calls)
        for rule in rules:
            self.add_rule(*rule)

    def add_rule(self, pattern: str, reply: Step, regex: bool = False) -> None:
        """Answer with ``reply`` whenever the call's text contains ``pattern`` (or matches it)."""
        if regex:
            try:
                compiled = re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"the rule {pattern!r} is no regular expression: {error}") from error
            self._rules.append((lambda text: compiled.search(text) is not None, reply))
        else:
            self._rules.append((lambda text: pattern in text, reply))

    async def complete(self, request: Request) -> Reply:
        self.calls += 1
        number = self.calls
        step = self._step(request.messages)
        if self._latency:
            await asyncio.sleep(self._latency)
        if number in self._fail_calls:
            raise ModelError(f"call {number} fails, as the script says")
        return await self._reply(step, request.messages)

    def _step(self, messages: Sequence[Message]) -> Step:
        if self._rules:
            text = "\n".join(message.content for message in messages)
            for matches, reply in self._rules:
                if matches(text):
                    return reply
        if self._always is not None:
            return self._always
        if not self._script:
            raise ScriptExhausted(
                f"the script's {self._length} replies are used up, and call {self.calls} matches "
                f"none of the {len(self._rules)} rules: add a reply, or a rule for it"
            )
        return self._script.pop(0)

    async def _reply(self, step: Any, messages: Sequence[Message]) -> Reply:
        if isinstance(step, Exception):
            raise step
        if callable(step):
            step = step(messages)
            if inspect.isawaitable(step):
                step = await _awaited(step)
            return await self._reply(step, messages)
        if isinstance(step, Reply):
            return step
        if not isinstance(step, str):
            raise ConfigError(f"a scripted reply is a str or a Reply, not {type(step).__name__}")
        usage = msgspec.structs.replace(Usage.estimate(messages, step), cost=self._cost)
        return Reply(text=step, usage=usage, model=self.model_name)

    def info(self, model: str) -> ModelInfo:
        return ModelInfo(tells_cost=self._cost is not None)


async def _awaited(value: Awaitable[Any]) -> Any:
    return await value

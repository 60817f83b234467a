"""Where the calls of a run's cells are answered: by models, child runs, tools and the ledger.

What a cell may do is decided here, by the run that it belongs to, and not by what its frame says.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal

from . import prompts, protocol
from .client import Message, Reply
from .errors import BadRequest, ConfigError, InvalidReply, MaxDepthExceeded
from .handler import Caller
from .pool import nobody
from .schemas import Schema
from .session import Answers
from .slots import Slot
from .tree import Tree

SCHEMA_LIMIT = 1 << 20
"""Characters of a schema that a cell gives: all runs wait while it is read."""

END_TIMEOUT = 10.0
"""Seconds that child runs and tools get to end, when the run that has called them is over."""

SCHEMA_LIMIT = 1 << 20
"""Characters of a schema that a cell gives: all runs wait while it is read."""

Stopped = Literal["final", "plain", "max_iterations", "max_calls", "max_children", "max_tokens", "max_budget"]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended, when it ended well."""

    response: str
    value: Any
    stopped: Stopped
    iterations: int
    parsed: Any = None
    """The answer as the type that was asked for."""


Child = Callable[[str, str | None, str | None, Schema | None], Awaitable[Outcome]]
"""Starts a child run: on a prompt, perhaps a context, a model, a schema for its answer."""


async def no_child(prompt: str, context: str | None, model: str | None, schema: Schema | None) -> Outcome:
    """Where there is no run that could have children."""
    raise ConfigError("there are no child runs without a run: use llm_query")


class Desk:
    """Answers the calls of one run's cells, for as long as there is the run."""

    def __init__(
        self,
        tree: Tree,
        caller: Caller,
        *,
        child: Child = no_child,
        iterations_left: Callable[[], int] = lambda: 0,
    ) -> None:
        self._tree = tree
        self._caller = caller
        self._child = child
        self._iterations_left = iterations_left
        self._serving: set[asyncio.Task[Any]] = set()
        self._is_over = False
        self.tools = tree.sub_tools if caller.depth else tree.tools
        """Those of this run."""
        self.slot = Slot(tree.slots, caller.depth)
        """The run's right to be at work."""

    @property
    def can_recurse(self) -> bool:
        """Whether an ``rlm_query`` of this run starts a child."""
        return self._caller.depth + 1 < self._tree.ledger.limits.max_depth

    async def serve(self, call: protocol.Call, texts: list[str]) -> Answers:
        """Answer one call. What the run's end cancels is an error for whoever waits in the sandbox."""
        task = asyncio.current_task()
        assert task is not None
        if self._is_over:
            return await nobody(call, texts)
        self._serving.add(task)
        try:
            return await self._serve(call, texts)
        except asyncio.CancelledError:
            if not self._is_over:
                raise
            task.uncancel()
            return await nobody(call, texts)
        finally:
            self._serving.discard(task)

    async def close(self) -> None:
        """The run is over: so is what its cells have called and still wait for, child runs above all."""
        self._is_over = True
        for task in self._serving:
            task.cancel()
        if self._serving:
            await asyncio.wait(self._serving, timeout=END_TIMEOUT)

    async def _serve(self, call: protocol.Call, texts: list[str]) -> Answers:
        if not call.adds_up(len(texts)):
            raise ConfigError("a call of other texts than it says")
        if call.fn == "budget":
            depth_left = self._tree.ledger.limits.max_depth - self._caller.depth - 1
            return [json.dumps(self._tree.ledger.budget(self._iterations_left(), depth_left))]
        if call.fn == "tool":
            return [await self.tools.call(call.tool, texts[0])]
        schema = self._wanted(texts.pop()) if call.schema else None
        if call.fn == "rlm_query" and self.can_recurse:
            async with self.slot.aside():
                return await self._each(
                    call, texts, lambda p, c: self._ask_child(p, c, call.model, schema), self._tree.width
                )
        if call.fn == "rlm_query":
            self._check_depth()
        return await self._each(call, texts, lambda p, c: self._ask_model(p, c, call.model, schema))

    async def _each(
        self,
        call: protocol.Call,
        texts: list[str],
        ask: Callable[[str, str | None], Awaitable[str]],
        width: int | None = None,
    ) -> Answers:
        """An answer to each prompt of a call, which may have a context each."""
        half = len(texts) // 2 if call.contexts else len(texts)
        given: list[str | None] = [*texts[half:]] if call.contexts else [None] * half
        items = list(zip(texts[:half], given, strict=True))
        if not call.batch:
            return [await ask(*item) for item in items]
        handler = self._tree.handler
        return await handler.each(items, lambda item: ask(*item), width or handler.concurrency)

    # -- models

    async def _ask_model(
        self, prompt: str, context: str | None, model: str | None, schema: Schema | None
    ) -> str:
        """One plain call; with a schema as many as it takes, and the reply as JSON."""
        prompt = prompt if context is None else f"{prompt}\n\n{context}"
        if schema is None:
            return (await self._call_model([Message("user", prompt)], model)).text
        messages = [Message("user", f"{prompt}\n\n{prompts.fill('schema', schema=schema.text)}")]
        complaint: str | None = None
        for _ in range(self._tree.schema_retries + 1):
            text = (await self._call_model(messages, model, schema)).text
            # a hostile schema takes a while, and holds up no other run
            value, complaint = await asyncio.to_thread(schema.parse, text)
            if complaint is None:
                return json.dumps(schema.plain(value))
            again = prompts.fill("schema_again", reason=complaint)
            messages += [Message("assistant", text), Message("user", again)]
        raise InvalidReply(f"the reply does not fit the schema: {complaint}")

    async def _call_model(
        self, messages: Sequence[Message], model: str | None, schema: Schema | None = None
    ) -> Reply:
        handler, caller = self._tree.handler, self._caller
        if schema is not None:
            try:
                return await handler.complete(messages, caller, model=model, schema=json.loads(schema.text))
            except BadRequest as error:
                if type(error) is not BadRequest:
                    raise  # else: a provider that knows only a part of what a schema may say
        return await handler.complete(messages, caller, model=model)

    def _wanted(self, text: str) -> Schema:
        """What a cell wants replies to be. Raises ConfigError, which is the cell's error."""
        if len(text) > SCHEMA_LIMIT:
            raise ConfigError(f"the schema is longer than {SCHEMA_LIMIT:,} characters")
        try:
            named = json.loads(text)
        except (ValueError, RecursionError):
            raise ConfigError("the schema is no JSON") from None
        return self._tree.schemas.of(named)

    # -- child runs

    async def _ask_child(
        self, prompt: str, context: str | None, model: str | None, schema: Schema | None
    ) -> str:
        self._tree.ledger.reserve_child()
        outcome = await self._child(prompt, context, model, schema)
        return outcome.response if schema is None else json.dumps(schema.plain(outcome.parsed))

    def _check_depth(self) -> None:
        limits = self._tree.ledger.limits
        if limits.on_max_depth == "raise":
            raise MaxDepthExceeded(
                f"a child run would be deeper than max_depth={limits.max_depth}: use llm_query",
                limit=limits.max_depth,
                used=self._caller.depth + 1,
            )

"""Sandbox: a session of the core's, with the methods that scripts for rlms call."""

from __future__ import annotations

import ast
import asyncio
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from rlm import context as contexts
from rlm import hostloop, protocol
from rlm.environment import BaseEnv, SupportsPersistence
from rlm.errors import ConfigError, ModelError, RLMError
from rlm.repl import REPL
from rlm.session import Answers, ServeCalls
from rlm.threads import Threads
from rlm.tools import RESERVED, Tools

from ..core.lm_handler import handler_at
from ..core.trajectory import Calls, with_error
from ..core.types import REPLResult, RLMChatCompletion
from . import variables

Subcall = Callable[[str, str | None], RLMChatCompletion]

TELLING = 10.0
"""Seconds that telling the variables may take: a repr may be code of a cell's."""

_SOURCE = Path(variables.__file__).read_text("utf-8")
_TELL = (
    "(lambda space: __import__('builtins').exec({source!r}, space) "
    "or space['told'](globals(), {without!r}))({{}})"
)
"""A cell that gives the variables, in a namespace of its own."""


class Sandbox(REPL):
    """A session for a script's own cells; a context manager. It begins when something is asked of it.

    ``lm_handler_address`` is that of an `rlm.core.lm_handler.LMHandler` of this process; ``subcall_fn``,
    told a prompt and the name of a model or None, answers rlm_query, in threads. ``setup_code`` runs once
    the context is there. ``depth`` and ``persistent`` change nothing: a session goes on until `cleanup`.
    Functions among ``custom_tools`` stay on the host. ``settings`` are those of the core's environment.
    """

    environment: ClassVar[str]
    """Its name in ``RLM(environment=...)``."""

    takes_source: ClassVar[bool] = False
    """Whether a tool may be the source text of a function, which is then one of the sandbox's own."""

    def __init__(
        self,
        lm_handler_address: tuple[str, int] | None = None,
        context_payload: Any = None,
        setup_code: str | None = None,
        persistent: bool = False,
        depth: int = 1,
        subcall_fn: Subcall | None = None,
        custom_tools: dict[str, Any] | None = None,
        custom_sub_tools: dict[str, Any] | None = None,
        max_concurrent_subcalls: int = 4,
        **settings: Any,
    ) -> None:
        self.persistent = persistent
        self.depth = depth
        self.custom_tools = custom_tools or {}
        self.custom_sub_tools = self.custom_tools if custom_sub_tools is None else custom_sub_tools
        self.locals: dict[str, Any] = {}
        """The variables, as the latest result has them."""
        sources = {name: _source(name, tool) for name, tool in self.custom_tools.items()}
        self._sources = {name: text for name, text in sources.items() if text and self.takes_source}
        Tools.parse(self._sources)  # for what it says of their names
        others = {name: tool for name, tool in self.custom_tools.items() if name not in self._sources}
        super().__init__(self.environment, None, settings, lambda stream, text: None, others)
        self._address = lm_handler_address
        self._context = context_payload
        self._setup_code = setup_code
        self._subcall = subcall_fn
        self._threads = Threads(max_concurrent_subcalls, "rlm-subcall")
        self._numbers = itertools.count(1)
        self._calls = Calls()
        self._answers: ServeCalls | None = None
        self._is_over = False

    # -- for scripts

    def execute_code(self, code: str) -> REPLResult:
        """Run one cell. What it raised stands at the end of the result's ``stderr``."""
        self._started()
        self._connect()
        result = self.execute(code)
        self.locals = self._variables()
        error = None if result.error is None else f"{result.error.type}: {result.error.message}"
        return REPLResult(
            result.stdout, with_error(result.stderr, error), self.locals, result.execution_time,
            self._calls.done(), result.final_answer,
        )  # fmt: skip

    def load_context(self, context_payload: Any) -> None:
        """Put data into the session as ``context``."""
        self.add_context(context_payload, 0)

    def add_context(self, context_payload: Any, context_index: int | None = None) -> int:
        """Put data (or the content of Paths) into the session as ``context_N``. Returns N."""
        value = contexts.resolve(context_payload)
        return hostloop.run(self._session().add_context(value, context_index))

    def get_context_count(self) -> int:
        """One more than the highest index of a context."""
        return self._session().get_context_count()

    def add_history(self, message_history: Sequence[dict[str, Any]], history_index: int | None = None) -> int:
        """Put a copy of a conversation's messages into the session as ``history_N``. Returns N."""
        return hostloop.run(self._session().add_history(message_history, history_index))

    def get_history_count(self) -> int:
        """One more than the highest index of a history."""
        return self._session().get_history_count()

    def update_handler_address(self, address: tuple[str, int]) -> None:
        """From now on another handler of this process answers the cells."""
        self._address = address

    def cleanup(self) -> None:
        """End the session and leave nothing behind. Safe to call twice."""
        self._is_over = True
        self.close()
        self._threads.close()

    def __enter__(self) -> Self:
        self._started()
        return self

    def __exit__(self, *_: object) -> None:
        self.cleanup()

    # -- the session

    def _started(self) -> BaseEnv:
        if self._env is None and not self._is_over:
            hostloop.run(self._start())
            try:
                self._begin()
            except BaseException:
                self.cleanup()
                raise
        return super()._started()

    def _begin(self) -> None:
        """Put into a new session what was given for it. Raises ConfigError for code that fails."""
        self._connect()
        if self._context is not None:
            self.add_context(self._context)
        for code in (*self._sources.values(), self._setup_code or ""):
            error = self.execute(code).error
            if error is not None:
                raise ConfigError(f"the code to begin with failed: {error.type}: {error.message}")

    def _session(self) -> SupportsPersistence:
        env = self._started()
        if not isinstance(env, SupportsPersistence):
            raise ConfigError(f"the environment {self.environment!r} takes no contexts by their number")
        return env

    def _variables(self) -> dict[str, Any]:
        without = (RESERVED - {"answer", "context", "history"}) | self._tools.functions.keys()
        cell = _TELL.format(source=_SOURCE, without=sorted(without))
        value = self.execute(cell, timeout=TELLING).value
        try:
            found = json.loads(value)
        except (ValueError, TypeError, RecursionError):  # a cell has done something to what that needs
            return {}
        return found if isinstance(found, dict) else {}

    # -- what cells ask

    def _connect(self) -> None:
        """Begin a new list of calls, for the next cell, with whoever answers them."""
        self._calls = Calls()
        self._answers = None
        if self._address is not None:
            handler = handler_at(self._address)
            if handler is None:
                raise ConfigError(f"no LMHandler of this process listens at {self._address}")
            self._answers = handler.serving(self._calls.see)

    async def _serve(self, call: protocol.Call, texts: list[str]) -> Answers:
        if call.fn == "rlm_query" and self._subcall is not None:
            return await self._ask_children(self._subcall, call, texts)
        if call.fn in ("llm_query", "rlm_query") and self._answers is not None:
            return await self._answers(call, texts)
        return await super()._serve(call, texts)

    async def _ask_children(self, subcall: Subcall, call: protocol.Call, texts: list[str]) -> Answers:
        if call.schema:
            raise ConfigError("rlm_query takes no schema here: the subcall_fn that answers it does not")
        if call.contexts:
            half = len(texts) // 2
            texts = [f"{prompt}\n\n{text}" for prompt, text in zip(texts[:half], texts[half:], strict=True)]
        return await asyncio.gather(*(self._ask_child(subcall, prompt, call.model) for prompt in texts))

    async def _ask_child(self, subcall: Subcall, prompt: str, model: str | None) -> str | RLMError:
        calls, name = self._calls, f"child {next(self._numbers)}"
        calls.begin(name)
        try:
            completion: RLMChatCompletion = await self._threads.run(lambda: _called(subcall, prompt, model))
        except RLMError as error:
            return error
        calls.end(name, completion)
        return str(completion.response)


def _called(subcall: Subcall, prompt: str, model: str | None) -> RLMChatCompletion:
    try:
        return subcall(prompt, model)
    except BaseException as error:  # a sys.exit() of the script's too is no more than a call that failed
        raise ModelError(f"subcall_fn failed: {type(error).__name__}: {error}") from error


def _source(name: str, entry: Any) -> str | None:
    """The code that defines a tool, if it is one that is given as source text."""
    text = entry.get("tool") if isinstance(entry, dict) else entry
    if not isinstance(text, str):
        return None
    try:
        body = ast.parse(text.strip()).body
    except (SyntaxError, ValueError):
        return None
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    if any(isinstance(node, kinds) and node.name == name for node in body):
        return text.strip()
    if len(body) == 1 and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Lambda):
        return f"{name} = {text.strip()}"
    return None

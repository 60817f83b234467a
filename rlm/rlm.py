"""RLM: the public face, in three forms: synchronous, asynchronous, streaming.

Whatever the form, the work happens on the core's one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import context as contexts
from . import hostloop
from .answers import AnswerCheck
from .backends import Backends, connect, name_of
from .client import UsageSummary
from .compaction import Threshold
from .desk import Stopped
from .environment import BaseEnv, Host, Isolation, SupportsPersistence
from .errors import ConfigError
from .events import AnyEvent, EventBus, JSONLWriter, Subscriber, Trace
from .handler import LMHandler
from .ledger import Ledger
from .loop import Run, Turn
from .pool import Environments, environment_factory, nobody
from .schemas import Schemas
from .tools import Tools
from .tree import Tree

if TYPE_CHECKING:
    from .config import Config
    from .conversation import Conversation


@dataclasses.dataclass(frozen=True)
class RLMChatCompletion:
    """What came of a completion."""

    root_model: str
    prompt: Any = dataclasses.field(repr=False)
    """What was passed as the context."""
    response: str
    """The final answer."""
    usage_summary: UsageSummary
    """Of the whole run tree."""
    execution_time: float
    """Seconds."""
    metadata: dict[str, Any] | None = dataclasses.field(default=None, repr=False)
    """What the run did, as the ``logger`` that was given tells it."""
    error: str | None = None
    """Why there is no answer: only of a call that a `metadata` tells of."""
    value: Any = None
    """The final answer as data, when it was plain data and not a str; else None."""
    parsed: Any = None
    """The final answer as the ``response_model`` that was asked for; else the same as ``value``."""
    stopped: Stopped = "final"
    """``"final"``: submitted. The name of a limit: the best there was when it was reached."""
    iterations: int = 0
    trace: Trace = dataclasses.field(default_factory=Trace)
    isolation: Isolation = dataclasses.field(default_factory=lambda: Isolation("unknown"))
    """What stood between the root's cells and this process."""

    @property
    def is_best_effort(self) -> bool:
        """Whether the answer was asked for when a limit was reached, and not submitted."""
        return self.stopped not in ("final", "plain")

    def to_dict(self) -> dict[str, Any]:
        """What was asked and answered, at what cost; the prompt as it was passed."""
        extra = {"metadata": self.metadata, "error": self.error}
        return {
            "root_model": self.root_model,
            "prompt": self.prompt,
            "response": self.response,
            "usage_summary": self.usage_summary.to_dict(),
            "execution_time": self.execution_time,
            **{name: value for name, value in extra.items() if value is not None},
        }


class RLM:
    """A model that answers questions about contexts of any length by writing code.

    Takes the fields of `Config` as keywords, and ``on_event``, a function that is told
    every event on the core's thread. Constructing costs nothing; the first completion
    starts what is needed. Reusable, also by several threads at once.
    """

    def __init__(self, *, on_event: Subscriber | None = None, **settings: Any) -> None:
        from .config import Config

        self.config: Config = Config.create(**settings)
        self._on_event = on_event
        self._backends: Backends | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._environments: Environments | None = None
        self._conversation: Conversation | None = None
        self._trees: set[Tree] = set()
        self._tools = Tools.parse(self.config.custom_tools)
        sub_tools = self.config.custom_sub_tools
        self._sub_tools = self._tools if sub_tools is None else Tools.parse(sub_tools)
        self._schemas = Schemas(self.config.schemas)

    @classmethod
    def from_config(cls, path: str | Path, *, on_event: Subscriber | None = None, **overrides: Any) -> RLM:
        """An RLM from a TOML, YAML or JSON file; keywords win over the file."""
        from .config import Config

        config = Config.load(path, **overrides)
        return cls(on_event=on_event, **dict(config.given()))

    # -- completions

    def completion(
        self, prompt: Any, root_prompt: str | None = None, *, response_model: Any = None
    ) -> RLMChatCompletion:
        """Answer ``root_prompt`` about ``prompt``, which is the context.

        The context is a str, bytes, list, dict, or a Path (or several): files are read,
        a directory becomes a dict of its files. Without ``root_prompt`` the task is in the
        context. With ``response_model``, a pydantic model, any type pydantic can check, or a JSON
        schema, the final answer is data of that type, in ``parsed``; the model is told what is
        wrong with one that is not. Raises RLMError; one that ended a run carries its partial answer, usage
        and trace. Ctrl-C stops the run, cleans up, and raises KeyboardInterrupt.

        With ``persistent=True`` all completions of this RLM are one conversation: see `session`.
        """
        return hostloop.run(self._begin(prompt, root_prompt, [], response_model))

    async def acompletion(
        self, prompt: Any, root_prompt: str | None = None, *, response_model: Any = None
    ) -> RLMChatCompletion:
        """`completion`, awaited. Cancelling it stops the run and cleans up."""
        return await hostloop.delegate(self._begin(prompt, root_prompt, [], response_model))

    async def astream(self, prompt: Any, root_prompt: str | None = None) -> AsyncIterator[AnyEvent]:
        """The events of a completion as they happen; the last is the root's RunFinished.

        Errors are raised after the events that led to them. Leaving the loop early stops the run.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[AnyEvent | None] = asyncio.Queue()

        def put(event: AnyEvent | None) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, event)

        task = asyncio.ensure_future(hostloop.delegate(self._begin(prompt, root_prompt, [put])))
        task.add_done_callback(lambda _: put(None))
        try:
            while (event := await queue.get()) is not None:
                yield event
            await task
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait([task])

    def cancel(self) -> None:
        """End the completions of this RLM that are under way, from any thread.

        Whoever waits for one gets `errors.Cancelled`, which carries the partial answer, usage and trace.
        """
        hostloop.loop().call_soon_threadsafe(self._cancel_all)

    def _cancel_all(self) -> None:
        for tree in tuple(self._trees):
            tree.cancel()

    # -- sessions

    def session(self) -> Conversation:
        """Several completions over one sandbox, each of which finds the variables of those before.

        ``with rlm.session() as s: s.completion(...); s.completion(...)``. An environment that cannot
        keep a session raises ConfigError here, before anything is asked of a model.
        """
        from .conversation import Conversation

        env = self._environment_factory()()
        if not isinstance(env, SupportsPersistence):
            raise ConfigError(
                f"the environment {name_of(self.config.environment)!r} keeps nothing from one completion to "
                "the next: it does not implement rlm.SupportsPersistence"
            )
        return Conversation(self)

    @classmethod
    def resume(cls, path: str | Path, **overrides: Any) -> Conversation:
        """A session that `Conversation.save` wrote, in this process.

        ``overrides`` are settings that win over those it was saved with; objects, functions and keys are
        in no file, and are to be given again. Raises ConfigError for a file that this user did not save.
        """
        from .conversation import Conversation

        return Conversation.read(Path(path), overrides)

    def _own_session(self) -> Conversation:
        if self._conversation is None:
            self._conversation = self.session()
        return self._conversation

    def close(self) -> None:
        """Close the model clients that this RLM made, and end its sandboxes. Safe to call twice."""
        hostloop.run(self.aclose())

    async def aclose(self) -> None:
        """`close`, on the core's loop."""
        conversation, self._conversation = self._conversation, None
        self._notice_fork()
        backends, self._backends = self._backends, None
        environments, self._environments = self._environments, None
        if conversation is not None:
            await conversation.aclose()
        if environments is not None:
            await environments.aclose()
        if backends is not None:
            self._finalizer.detach()
            await backends.aclose()

    def __repr__(self) -> str:
        return f"RLM({', '.join(f'{name}={value!r}' for name, value in self.config.shown())})"

    def __enter__(self) -> RLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- on the core's loop

    def _begin(
        self, prompt: Any, root_prompt: str | None, subscribers: list[Subscriber], response_model: Any = None
    ) -> Coroutine[Any, Any, RLMChatCompletion]:
        """A completion by itself, or the next one of this RLM's own session."""
        if self.config.persistent:
            return self._own_session().complete(prompt, root_prompt, subscribers, response_model)
        return self.complete(prompt, root_prompt, subscribers, response_model)

    async def complete(
        self,
        prompt: Any,
        root_prompt: str | None,
        subscribers: list[Subscriber],
        response_model: Any = None,
        turn: Turn | None = None,
    ) -> RLMChatCompletion:
        """A completion, perhaps as a ``turn`` of a conversation; ``subscribers`` are told its events."""
        config = self.config
        if root_prompt is not None and not isinstance(root_prompt, str):
            raise ConfigError(f"root_prompt is the question, a str, not {type(root_prompt).__name__}")
        subscribers = [*subscribers, *([self._on_event] if self._on_event else [])]
        if config.verbose:
            from .console import Console

            subscribers.append(Console())
        if callbacks := config.callbacks():
            subscribers.append(callbacks)
        check = AnswerCheck(response_model, config.final_answer_validator)
        context = contexts.resolve(prompt)
        backends, notes = await self._connect()
        followed = None
        if config.logger is not None:
            followed = config.logger.follow(config, backends.root.client.model_name)
            subscribers.append(followed)
        result = await self._recorded(backends, notes, context, root_prompt, subscribers, check, turn)
        metadata = followed.trajectory() if followed is not None else None
        return dataclasses.replace(result, prompt=prompt, metadata=metadata)

    async def _recorded(
        self,
        backends: Backends,
        notes: list[str],
        context: Any,
        root_prompt: str | None,
        subscribers: list[Subscriber],
        check: AnswerCheck,
        turn: Turn | None,
    ) -> RLMChatCompletion:
        """A run whose events are appended to the trace file, if there is to be one."""
        config = self.config
        if config.trace is None:
            return await self._run(backends, notes, context, root_prompt, EventBus(subscribers), check, turn)
        try:
            writer = JSONLWriter(config.trace)
        except OSError as error:
            raise ConfigError(
                f"the trace {str(config.trace)!r} cannot be written: {error.strerror}"
            ) from error
        with writer:
            bus = EventBus([*subscribers, writer])
            return await self._run(backends, notes, context, root_prompt, bus, check, turn)

    async def _run(
        self,
        backends: Backends,
        notes: list[str],
        context: Any,
        question: str | None,
        events: EventBus,
        check: AnswerCheck,
        turn: Turn | None,
    ) -> RLMChatCompletion:
        config = self.config
        ledger = Ledger(config.limits())
        handler = LMHandler(
            backends, ledger, events, concurrency=config.max_concurrent_calls, stream=config.stream
        )
        async with handler, self._lend_environments(handler) as environments:
            tree = Tree(
                handler=handler,
                ledger=ledger,
                events=events,
                environments=environments,
                environment_name=name_of(config.environment),
                backend_name=name_of(config.backend),
                system_prompt=config.custom_system_prompt,
                advice=config.orchestrator,
                prologue=config.user_prologue,
                width=config.max_concurrent_subcalls,
                tools=self._tools,
                sub_tools=self._sub_tools,
                schemas=self._schemas,
                schema_retries=config.schema_retries,
                compaction=Threshold(config.compaction_threshold_pct) if config.compaction else None,
            )
            run = Run(tree, context, question, notes=notes, check=check, turn=turn)
            self._trees.add(tree)
            try:
                outcome = await run.run()
            finally:
                self._trees.discard(tree)
        return RLMChatCompletion(
            prompt=context,
            response=outcome.response,
            value=outcome.value,
            parsed=outcome.parsed,
            stopped=outcome.stopped,
            root_model=backends.root.client.model_name,
            iterations=outcome.iterations,
            execution_time=events.now(),
            usage_summary=ledger.usage(),
            trace=events.trace,
            isolation=run.isolation,
        )

    def _environment_factory(self) -> Callable[[], BaseEnv]:
        return environment_factory(self.config.environment, self.config.environment_kwargs)

    @contextlib.asynccontextmanager
    async def _lend_environments(self, handler: LMHandler) -> AsyncIterator[Environments]:
        """Those of this RLM, where it keeps some; else some for one run tree."""
        keep = self.config.pool
        environments = self._environments or Environments(self._environment_factory(), keep)
        if keep and self._environments is None:
            self._environments = environments
            weakref.finalize(self, hostloop.run_at_end, environments.aclose)
        if keep:
            environments.fill(Host(handler, nobody))
        try:
            yield environments
        finally:
            await environments.settle()

    def _notice_fork(self) -> None:
        """A fork has a loop of its own: clients and sandboxes are its parent's."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop, self._backends, self._environments = loop, None, None

    async def _connect(self) -> tuple[Backends, list[str]]:
        """The clients, made on first use, on the core's loop; and what they have to say."""
        self._notice_fork()
        backends = self._backends
        if backends is None:
            backends = self._backends = connect(self.config)
            self._finalizer = weakref.finalize(self, hostloop.run_at_end, backends.aclose)
        notes = await backends.prepare()
        backends.check_aliases()  # only now are the names of all models known
        if self.config.max_budget is not None:
            backends.check_prices()
        return backends, notes

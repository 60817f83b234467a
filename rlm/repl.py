"""A sandbox without a loop around it: cells are run by whoever has them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from . import context as contexts
from . import hostloop, protocol
from .backends import Backends, client_of
from .desk import Desk
from .environment import BaseEnv, Host, Isolation, REPLResult
from .errors import ConfigError
from .events import EventBus
from .handler import Caller, LMHandler
from .ledger import Ledger
from .pool import Environments, environment_factory
from .session import Answers
from .tools import Tools
from .tree import Tree


class REPL:
    """An environment without a loop: run cells in a sandbox from ordinary code.

    A context manager. ``llm_query`` in a cell raises, unless a ``backend`` is given.
    """

    def __init__(
        self,
        environment: Any,
        backend: Any,
        settings: dict[str, Any],
        on_output: Callable[[str, str], None],
        custom_tools: dict[str, Any] | None = None,
    ) -> None:
        self._new = environment_factory(environment, settings)
        self._tools = Tools.parse(custom_tools)
        client = client_of(backend, {}) if backend is not None else None
        self._backends = Backends.of(client, owned=client is not backend)
        self._on_output = on_output
        self._env: BaseEnv | None = None
        self._handler: LMHandler | None = None
        self._process = os.getpid()

    def __enter__(self) -> REPL:
        hostloop.run(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def execute(self, code: str, *, timeout: float | None = None) -> REPLResult:
        """Run one cell. ``timeout`` is in seconds of computing; None waits for ever."""
        return hostloop.run(self._started().execute(code, timeout=timeout))

    def add_context(self, value: Any) -> int:
        """Put data (or the content of Paths) into the session as ``context_N``. Returns N."""
        return hostloop.run(self._started().add_context(contexts.resolve(value)))

    def close(self) -> None:
        """End the session and leave nothing behind. Safe to call twice."""
        hostloop.run(self._stop())

    @property
    def isolation(self) -> Isolation:
        """What stands between the cells and this process."""
        return self._started().isolation

    def _started(self) -> BaseEnv:
        if self._env is None:
            raise ConfigError("the session is not open: use `with open_repl(...) as repl:`")
        if self._process != os.getpid():
            raise ConfigError("the session is the parent process's: open one in this process")
        return self._env

    async def _start(self) -> None:
        from .limits import Limits  # pydantic, which whoever runs cells without models need not wait for

        ledger, events = Ledger(Limits(max_depth=1)), EventBus()
        await self._backends.prepare()
        self._handler = await LMHandler(self._backends, ledger, events).__aenter__()
        tree = Tree(self._handler, ledger, events, Environments(self._new), tools=self._tools)
        env = self._new()
        self._desk = Desk(tree, Caller("repl", None, 0, "sub"))
        try:
            await env.start(Host(self._handler, self._serve, self._on_output, tools=self._tools))
        except BaseException:
            await env.close()
            await self._handler.__aexit__()
            raise
        self._env = env

    async def _serve(self, call: protocol.Call, texts: list[str]) -> Answers:
        return await self._desk.serve(call, texts)

    async def _stop(self) -> None:
        env, self._env = self._env, None
        handler, self._handler = self._handler, None
        if self._process != os.getpid():
            return  # in a fork: all of it is the parent's
        if env is not None:
            await env.close()
        if handler is not None:
            await handler.__aexit__()
        await self._backends.aclose()


def open_repl(
    environment: Any = "local",
    *,
    backend: Any = None,
    on_output: Callable[[str, str], None] = lambda stream, text: None,
    custom_tools: dict[str, Any] | None = None,
    **settings: Any,
) -> REPL:
    """A sandbox to run cells in: ``with open_repl("local") as repl: repl.execute("x = 1")``.

    ``settings`` go to the environment's constructor; ``backend`` answers what cells ask, and is
    what an RLM takes for one (a name, a BaseLM, a function); ``on_output`` is told what a running
    cell prints, as (stream, text); ``custom_tools`` are functions and data that cells find by name.
    """
    return REPL(environment, backend, settings, on_output, custom_tools)

"""Environments for the runs of a tree: started, lent to one run after another, ended.

An environment that can begin anew (`SupportsReset`) does so when its run is over, and serves the next one:
fifty child runs then cost little more than their cells. One that cannot is ended, and another is started.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from . import plugins, protocol
from .environment import BaseEnv, Host, SupportsReset
from .errors import ConfigError, ModelError, RLMError
from .session import Answers

log = logging.getLogger("rlm")


def environment_factory(environment: Any, settings: dict[str, Any]) -> Callable[[], BaseEnv]:
    """How to make a fresh environment from a name, a class, or an instance that serves as a pattern."""
    if isinstance(environment, BaseEnv):
        if settings:
            raise ConfigError("environment_kwargs have no use with an environment object: give them to it")
        return environment.fresh
    kind = plugins.load("rlm.environments", environment) if isinstance(environment, str) else environment
    if not callable(kind):
        raise ConfigError(
            f"environment={environment!r}: give a name (see `rlm environments`), a BaseEnv, or its class"
        )
    what = f"environment {environment!r}" if isinstance(environment, str) else "the environment"
    return lambda: plugins.construct(kind, settings, what)


async def nobody(call: protocol.Call, texts: list[str]) -> Answers:
    """Serves the cells of a sandbox that no run has at the moment: what runs on in it, perhaps."""
    raise ModelError("nobody answers: the run that this sandbox was for is over", sent=False)


def _note(error: Exception, what: str) -> None:
    """What went wrong while nobody waited for it. Of a plugin's own bugs there is more to tell."""
    log.info("a sandbox did not %s: %s", what, error, exc_info=not isinstance(error, RLMError))


class Environments:
    """Lends environments of one kind. ``keep`` of them stay ready when nobody uses them."""

    def __init__(self, new: Callable[[], BaseEnv], keep: int = 0) -> None:
        self.new = new
        """Makes one that is nobody's yet."""
        self._keep = keep
        self._idle: list[BaseEnv] = []
        self._returning: dict[asyncio.Task[None], BaseEnv] = {}
        self._filling: set[asyncio.Task[None]] = set()
        self._lent = 0

    @contextlib.asynccontextmanager
    async def lend(self, host: Host) -> AsyncIterator[BaseEnv]:
        """An environment that is up, with the host's tools, for one run. Raises SandboxUnavailable.

        One whose run ends with an error serves no other: nobody knows what it is in the middle of.
        """
        self._lent += 1
        try:
            env = await self._take(host)
            try:
                yield env
            except BaseException:
                await env.close()
                raise
            await self._give_back(env)
        finally:
            self._lent -= 1

    async def _take(self, host: Host) -> BaseEnv:
        host.outlives_handler = self._keep > 0
        while self._idle or self._returning:
            if not self._idle:
                await asyncio.wait(self._returning, return_when=asyncio.FIRST_COMPLETED)
                continue
            env = self._idle.pop()
            try:
                assert isinstance(env, SupportsReset)
                await env.assign(host)
                return env
            except RLMError:  # it died while it waited
                await env.close()
            except BaseException:
                await env.close()
                raise
        env = self.new()
        try:
            await env.start(host)
        except BaseException:
            await env.close()
            raise
        return env

    async def _give_back(self, env: BaseEnv) -> None:
        is_wanted = self._lent > 1 or len(self._idle) < self._keep  # by a run of this tree, or the next
        if not (is_wanted and isinstance(env, SupportsReset)):
            await env.close()
            return
        task = asyncio.get_running_loop().create_task(self._reset(env))
        self._returning[task] = env
        task.add_done_callback(self._returning.pop)

    async def _reset(self, env: BaseEnv) -> None:
        try:
            assert isinstance(env, SupportsReset)
            await env.reset()
            self._idle.append(env)
        except Exception as error:  # a boundary, and nobody waits here: the next run gets another one
            _note(error, "begin anew")
            await env.close()
        except BaseException:
            await env.close()
            raise

    def fill(self, host: Host) -> None:
        """Start in the background what is lacking of those to be kept. ``host`` is for their start alone."""
        host.outlives_handler = True
        lacking = self._keep - len(self._idle) - len(self._returning) - len(self._filling)
        for _ in range(lacking):
            task = asyncio.get_running_loop().create_task(self._start_one(host))
            self._filling.add(task)
            task.add_done_callback(self._filling.discard)

    async def _start_one(self, host: Host) -> None:
        env = self.new()
        if not isinstance(env, SupportsReset):
            return
        try:
            await env.start(host)
            self._idle.append(env)
        except Exception as error:  # a boundary: whoever needs one will be told
            _note(error, "start")
            await env.close()
        except BaseException:
            await env.close()
            raise

    async def settle(self, keep: int | None = None) -> None:
        """Wait for what is on its way, and end whatever is more than what is kept."""
        while pending := {*self._returning, *self._filling}:
            await asyncio.wait(pending)
        keep = self._keep if keep is None else keep
        surplus, self._idle = self._idle[keep:], self._idle[:keep]
        await asyncio.gather(*(env.close() for env in surplus))

    async def aclose(self) -> None:
        """End all of them. Safe to call twice."""
        self._keep = 0  # also of those that are lent at the moment
        returning = dict(self._returning)
        for task in {*returning, *self._filling}:
            task.cancel()
        await self.settle(keep=0)
        # a task that had not begun when it was cancelled has ended nothing
        await asyncio.gather(*(env.close() for env in returning.values()))

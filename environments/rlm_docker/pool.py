"""Warm containers: started ahead, used once each, and not kept for ever."""

from __future__ import annotations

import asyncio
import collections
import logging
from collections.abc import Awaitable, Callable

from .container import Container

log = logging.getLogger("rlm.docker")

Start = Callable[[], Awaitable[Container]]


class Pool:
    """Up to ``size`` containers of one kind that wait for a session, ``idle`` seconds at most.

    Belongs to the core's loop. Taking one starts its successor in the background.
    """

    def __init__(self, start: Start, idle: float) -> None:
        self.size = 0
        self._start = start
        self._idle = idle
        self._warm: collections.deque[Container] = collections.deque()
        self._filling: set[asyncio.Task[None]] = set()

    async def take(self) -> Container:
        """A warm container, or else a new one."""
        while self._warm:
            container = self._warm.popleft()
            if container.is_warm:
                self.fill()
                return container
            container.release()
        container = await self._start()
        self.fill()  # after, not beside: whoever waits goes first
        return container

    def fill(self) -> list[asyncio.Task[None]]:
        """Start what is missing, in the background. Returns all that is starting."""
        for _ in range(self.size - len(self._warm) - len(self._filling)):
            task = asyncio.get_running_loop().create_task(self._add())
            self._filling.add(task)
            task.add_done_callback(self._filled)
        return list(self._filling)

    async def _add(self) -> None:
        container = await self._start()
        self._warm.append(container)
        asyncio.get_running_loop().call_later(self._idle, self._expire, container)

    def _filled(self, task: asyncio.Task[None]) -> None:
        self._filling.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.info("no container could be started ahead: %s", error)  # who needs one will be told

    def _expire(self, container: Container) -> None:
        if container in self._warm:
            self._warm.remove(container)
            container.release()

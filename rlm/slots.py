"""How many child runs of a tree are at work at a time.

A run that waits for children of its own is not at work: it puts its slot down and takes one up again when
they are done. So whoever holds a slot never waits for one, and no tree of any depth and width can come to a
standstill. The deepest that wait come first: a tree is worked off branch by branch, and few runs are begun
that cannot end yet.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
from collections.abc import AsyncIterator


class Slots:
    """So many slots, given to whoever waits at the greatest depth, and there to who came first."""

    def __init__(self, most: int) -> None:
        self._free = most
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()

    async def take(self, depth: int) -> None:
        """Return once there is a slot; it is then the caller's to `give` back."""
        if self._free:
            self._free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (-depth, next(self._numbers), turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it was given in the same moment
                self.give()
            raise

    def give(self) -> None:
        """Give a slot back."""
        while self._waiting:
            *_, turn = heapq.heappop(self._waiting)
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1


class Slot:
    """The slot of one run, if it needs one: the root of a tree does not."""

    def __init__(self, slots: Slots, depth: int) -> None:
        self._slots = slots
        self._depth = depth
        self._is_over = False
        self._is_held = False
        self._aside = 0
        self._taking: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Slot:
        await self._take()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._is_over = True  # calls that are still aside take up nothing any more
        self._give()

    @contextlib.asynccontextmanager
    async def aside(self) -> AsyncIterator[None]:
        """Without the slot for as long as any of the run's calls is in here."""
        self._aside += 1
        self._give()
        try:
            yield
        except asyncio.CancelledError:  # of the call alone, perhaps: the run goes on, and does not wait
            self._come_back()
            raise
        except BaseException:
            await self._back()
            raise
        await self._back()

    async def _back(self) -> None:
        """Return once the run has its slot again, or another of its calls has gone aside."""
        self._come_back()
        if self._taking is not None:
            await asyncio.wait([self._taking])

    def _come_back(self) -> None:
        self._aside -= 1
        if self._depth and not self._aside and not self._is_over:
            self._taking = asyncio.get_running_loop().create_task(self._take())

    async def _take(self) -> None:
        if self._depth:
            await self._slots.take(self._depth)
            self._is_held = True

    def _give(self) -> None:
        """Give the slot back, or the place in the line of those who wait for one."""
        taking, self._taking = self._taking, None
        if taking is not None:
            taking.cancel()
        if self._is_held:
            self._is_held = False
            self._slots.give()

"""Facts about slots: how many runs are at work at a time, and that no tree of them comes to a standstill."""

import asyncio
import random
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm.slots import Slot, Slots

PATIENCE = 20
"""Seconds after which a standstill is one. No test waits for it to pass."""


def ending(work: Coroutine[Any, Any, None]) -> None:
    """Run work that must come to its end."""

    async def patient() -> None:
        async with asyncio.timeout(PATIENCE):
            await work

    asyncio.run(patient())


async def rest() -> None:
    """Let everything that can run do so."""
    for _ in range(20):
        await asyncio.sleep(0)


async def count(slots: Slots) -> int:
    """How many slots are free."""
    free = 0
    while True:
        task = asyncio.create_task(slots.take(1))
        await rest()
        if not task.done():
            task.cancel()
            break
        free += 1
    await rest()
    for _ in range(free):
        slots.give()
    return free


# --- slots -------------------------------------------------------------------------------------


async def test_as_many_are_given_as_there_are() -> None:
    slots = Slots(3)
    takers = [asyncio.create_task(slots.take(1)) for _ in range(5)]
    await rest()
    assert [taker.done() for taker in takers] == [True, True, True, False, False]
    slots.give()
    await rest()
    assert [taker.done() for taker in takers] == [True, True, True, True, False]
    slots.give()
    await asyncio.gather(*takers)


async def test_the_deepest_come_first_and_there_who_came_first() -> None:
    slots, order = Slots(1), []
    await slots.take(1)

    async def run(name: str, depth: int) -> None:
        await slots.take(depth)
        order.append(name)
        slots.give()

    waiting = [("a", 1), ("b", 3), ("c", 2), ("d", 3), ("e", 1), ("f", 2)]
    tasks = [asyncio.create_task(run(*waiter)) for waiter in waiting]
    await rest()
    slots.give()
    await asyncio.gather(*tasks)
    assert order == ["b", "d", "c", "f", "a", "e"]


async def test_who_is_cancelled_while_waiting_takes_no_slot() -> None:
    slots = Slots(1)
    await slots.take(1)
    gone, next_ = (asyncio.create_task(slots.take(1)) for _ in range(2))
    await rest()
    gone.cancel()
    await rest()
    slots.give()
    await next_
    slots.give()
    assert await count(slots) == 1


async def test_who_is_cancelled_in_the_moment_of_being_given_a_slot_passes_it_on() -> None:
    slots = Slots(1)
    await slots.take(1)
    gone, next_ = (asyncio.create_task(slots.take(1)) for _ in range(2))
    await rest()
    slots.give()
    gone.cancel()
    await next_
    assert gone.cancelled()
    slots.give()
    assert await count(slots) == 1


# --- the slot of a run -------------------------------------------------------------------------


async def test_a_run_holds_a_slot_from_its_beginning_to_its_end() -> None:
    slots = Slots(2)
    async with Slot(slots, 1):
        assert await count(slots) == 1
    assert await count(slots) == 2


async def test_the_root_needs_no_slot() -> None:
    slots = Slots(1)
    async with Slot(slots, 0) as slot, slot.aside():
        assert await count(slots) == 1


async def test_a_run_that_waits_for_children_has_no_slot() -> None:
    slots = Slots(1)
    async with Slot(slots, 1) as slot:
        async with slot.aside():
            assert await count(slots) == 1
        assert await count(slots) == 0
    assert await count(slots) == 1


async def test_a_run_two_calls_of_which_are_aside_takes_its_slot_up_with_the_last() -> None:
    slots = Slots(1)
    async with Slot(slots, 1) as slot:
        async with slot.aside():
            async with slot.aside():
                pass
            assert await count(slots) == 1
        assert await count(slots) == 0
    assert await count(slots) == 1


async def test_a_call_that_fails_brings_the_slot_back() -> None:
    slots = Slots(1)
    async with Slot(slots, 1) as slot:
        with pytest.raises(ZeroDivisionError):
            async with slot.aside():
                raise ZeroDivisionError
        assert await count(slots) == 0
    assert await count(slots) == 1


async def test_a_call_that_goes_aside_takes_the_place_of_one_that_waits_to_come_back() -> None:
    """Two threads of a cell: what one of them waits for must not keep the other's children from a slot."""
    slots = Slots(1)
    async with Slot(slots, 1) as slot:

        async def call(leave: asyncio.Event) -> None:
            async with slot.aside():
                await leave.wait()

        gates = [asyncio.Event(), asyncio.Event()]
        first = asyncio.create_task(call(gates[0]))
        await rest()
        await slots.take(2)  # somebody else's
        gates[0].set()
        await rest()
        assert not first.done()
        second = asyncio.create_task(call(gates[1]))
        await first
        slots.give()
        assert await count(slots) == 1
        gates[1].set()
        await second
        assert await count(slots) == 0
    assert await count(slots) == 1


async def test_calls_that_wait_to_come_back_take_one_slot_together() -> None:
    slots = Slots(1)
    async with Slot(slots, 1) as slot:

        async def call() -> None:
            async with slot.aside():
                pass

        async with slot.aside():
            await slots.take(2)  # somebody else's
            calls = [asyncio.create_task(call()) for _ in range(3)]
        slots.give()
        await asyncio.gather(*calls)
        assert await count(slots) == 0
    assert await count(slots) == 1


async def test_a_cancelled_call_does_not_wait_for_the_slot_and_the_run_has_it_again() -> None:
    slots = Slots(1)
    async with Slot(slots, 1) as slot:

        async def call() -> None:
            async with slot.aside():
                await asyncio.Event().wait()

        task = asyncio.create_task(call())
        await rest()
        await slots.take(2)
        task.cancel()
        await asyncio.wait([task])
        slots.give()
        assert await count(slots) == 0
    assert await count(slots) == 1


async def test_a_call_that_comes_back_after_the_end_of_its_run_takes_nothing() -> None:
    slots = Slots(1)

    async def call() -> None:
        async with slot.aside():
            await asyncio.Event().wait()

    async with Slot(slots, 1) as slot:
        late = asyncio.create_task(call())
        await rest()
    late.cancel()
    await asyncio.wait([late])
    assert await count(slots) == 1


async def test_a_run_that_ends_while_a_call_waits_to_come_back_leaves_the_line() -> None:
    slots = Slots(1)

    async def call() -> None:
        async with slot.aside():
            await slots.take(2)

    async with Slot(slots, 1) as slot:
        waiting = asyncio.create_task(call())
        await rest()
        assert not waiting.done()
    await waiting
    slots.give()
    assert await count(slots) == 1


# --- trees -------------------------------------------------------------------------------------

Tree = list[list[list[Any]]]
"""A run: the threads of its cell, each with its batches of children, one after another."""

trees = st.recursive(
    st.just([]),
    lambda run: st.lists(st.lists(st.lists(run, max_size=4), max_size=3), max_size=3),
    max_leaves=40,
)


class Forest:
    """Runs trees, and counts who is at work."""

    def __init__(self, most: int, chance: random.Random) -> None:
        self.slots = Slots(most)
        self._most = most
        self._chance = chance
        self._at_work = 0

    async def run(self, tree: Tree, depth: int = 0) -> None:
        async with Slot(self.slots, depth) as slot:
            await self._work(depth)
            async with asyncio.TaskGroup() as group:
                for batches in tree:
                    group.create_task(self._thread(batches, slot, depth))
            await self._work(depth)

    async def _thread(self, batches: list[list[Any]], slot: Slot, depth: int) -> None:
        for children in batches:
            width = self._chance.randint(1, 4)
            async with slot.aside():
                queue = iter(children)
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(width, len(children))):
                        group.create_task(self._each(queue, depth + 1))
            await asyncio.sleep(0)

    async def _each(self, queue: Any, depth: int) -> None:
        for child in queue:
            await self.run(child, depth)

    async def _work(self, depth: int) -> None:
        """Only done by runs without any call aside, so whoever is here has a slot."""
        self._at_work += depth > 0
        try:
            assert self._at_work <= self._most
            for _ in range(self._chance.randint(0, 3)):
                await asyncio.sleep(0)
        finally:
            self._at_work -= depth > 0


@settings(max_examples=150, deadline=None)
@given(trees, st.integers(1, 5), st.integers(0, 2**32).map(random.Random))
def test_any_tree_ends_with_any_number_of_slots_and_never_uses_more(
    tree: Tree, most: int, chance: random.Random
) -> None:
    async def work() -> None:
        forest = Forest(most, chance)
        await forest.run(tree)
        assert await count(forest.slots) == most

    ending(work())


@settings(max_examples=150, deadline=None)
@given(trees, st.integers(1, 3), st.integers(0, 60), st.integers(0, 2**32).map(random.Random))
def test_a_tree_that_is_cancelled_at_any_moment_leaves_all_slots_free(
    tree: Tree, most: int, steps: int, chance: random.Random
) -> None:
    async def work() -> None:
        forest = Forest(most, chance)
        task = asyncio.create_task(forest.run(tree))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert await count(forest.slots) == most

    ending(work())

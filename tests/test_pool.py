"""Facts about environments that are lent to one run after another."""

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm import protocol
from rlm.environment import BaseEnv, Host, REPLResult
from rlm.errors import ConfigError, ModelError, SandboxError, SandboxUnavailable
from rlm.events import EventBus
from rlm.handler import LMHandler
from rlm.ledger import Ledger
from rlm.limits import Limits
from rlm.pool import Environments, nobody

PATIENCE = 20
"""Seconds after which something that never comes fails a test. No test waits for it to pass."""


class Fixed(BaseEnv):
    """An environment that cannot begin anew, and does nothing but note what is done to it."""

    def __init__(self, made: list[Any]) -> None:
        self.done: list[str] = []
        self.host: Host | None = None
        made.append(self)

    @property
    def is_closed(self) -> bool:
        return "close" in self.done

    async def note(self, what: str) -> None:
        self.done.append(what)
        await asyncio.sleep(0)

    async def start(self, host: Host) -> None:
        self.host = host
        await self.note("start")

    async def add_context(self, value: Any) -> int:
        return 0

    async def execute(self, code: str, *, timeout: float | None = None) -> REPLResult:
        return REPLResult()

    async def close(self) -> None:
        await self.note("close")


class Again(Fixed):
    """One that can begin anew, unless the test wants it otherwise."""

    def __init__(self, made: list[Any], wrong: dict[str, Callable[[], Any]] | None = None) -> None:
        super().__init__(made)
        self._wrong = {} if wrong is None else wrong

    async def note(self, what: str) -> None:
        await super().note(what)
        if what in self._wrong and not self.is_closed:
            await self._wrong[what]()

    async def reset(self) -> None:
        await self.note("reset")

    async def assign(self, host: Host) -> None:
        self.host = host
        await self.note("assign")


class House:
    """A kind of environment, all that were made of it, and what goes wrong with the next things done."""

    def __init__(self) -> None:
        self.made: list[Any] = []
        self.wrong: dict[str, Callable[[], Any]] = {}
        self.host = Host(LMHandler(None, Ledger(Limits()), EventBus()), nobody)

    def new(self) -> Again:
        return Again(self.made, self.wrong)

    def fails(self, what: str, error: BaseException) -> None:
        async def fail() -> None:
            raise error

        self.wrong[what] = fail

    def waits(self, what: str) -> asyncio.Event:
        gate = asyncio.Event()

        async def wait() -> None:
            await gate.wait()

        self.wrong[what] = wait
        return gate

    async def until(self, what: str) -> None:
        """Until this is being done to some environment."""
        async with asyncio.timeout(PATIENCE):
            while not any(env.done[-1:] == [what] for env in self.made):
                await asyncio.sleep(0)

    @property
    def is_empty(self) -> bool:
        return all(env.is_closed for env in self.made)


@pytest.fixture
async def house() -> House:
    return House()


async def use(environments: Environments, host: Host) -> Any:
    """A run that does nothing."""
    async with environments.lend(host) as env:
        return env


# --- one run after another ---------------------------------------------------------------------


async def test_an_environment_is_started_for_its_run_and_ended_with_the_last_one(house: House) -> None:
    environments = Environments(house.new)
    async with environments.lend(house.host) as env:
        assert (env.done, env.host) == (["start"], house.host)
    assert env.done == ["start", "close"]
    assert house.host.outlives_handler is False


async def test_within_a_tree_one_run_has_the_environment_of_another_after_it_began_anew(house: House) -> None:
    environments = Environments(house.new)
    async with environments.lend(house.host):
        first = await use(environments, house.host)
        second = await use(environments, house.host)
    await environments.settle()
    assert second is first
    assert first.done == ["start", "reset", "assign", "reset", "close"]
    assert house.is_empty


async def test_a_run_waits_for_one_that_begins_anew_and_starts_no_other(house: House) -> None:
    environments = Environments(house.new)
    gate = house.waits("reset")
    async with environments.lend(house.host):
        first = await use(environments, house.host)
        task = asyncio.create_task(use(environments, house.host))
        await house.until("reset")
        gate.set()
        assert await task is first
    assert len(house.made) == 2
    await environments.aclose()


async def test_runs_at_the_same_time_have_environments_of_their_own(house: House) -> None:
    environments = Environments(house.new)
    async with environments.lend(house.host) as one, environments.lend(house.host) as other:
        assert one is not other
    await environments.aclose()
    assert house.is_empty


async def test_one_that_cannot_begin_anew_serves_one_run(house: House) -> None:
    environments = Environments(lambda: Fixed(house.made), keep=2)
    environments.fill(house.host)
    async with environments.lend(house.host):
        first, second = await use(environments, house.host), await use(environments, house.host)
    assert first is not second
    await environments.settle()
    assert all(env.done in (["start", "close"], []) for env in house.made)


# --- what goes wrong ---------------------------------------------------------------------------


async def test_one_whose_run_fails_serves_no_other(house: House) -> None:
    environments = Environments(house.new, keep=1)
    with pytest.raises(ZeroDivisionError):
        async with environments.lend(house.host) as env:
            raise ZeroDivisionError
    assert env.done == ["start", "close"]
    assert await use(environments, house.host) is not env


@pytest.mark.parametrize("error", [SandboxError("no"), RuntimeError("a bug of the environment's")], ids=repr)
async def test_one_that_fails_to_begin_anew_is_ended_and_another_takes_its_place(
    error: Exception, house: House
) -> None:
    environments = Environments(house.new, keep=1)
    house.fails("reset", error)
    first = await use(environments, house.host)
    await environments.settle()
    house.wrong.clear()
    second = await use(environments, house.host)
    assert (first.is_closed, second is first) == (True, False)
    await environments.settle()
    assert not second.is_closed
    await environments.aclose()


async def test_one_that_died_while_it_waited_is_ended_and_another_takes_its_place(house: House) -> None:
    environments = Environments(house.new, keep=1)
    first = await use(environments, house.host)
    await environments.settle()
    house.fails("assign", SandboxError("it is gone"))
    second = await use(environments, house.host)
    assert (first.is_closed, second.done[0]) == (True, "start")
    await environments.aclose()


async def test_whatever_else_goes_wrong_is_raised_and_leaves_nothing(house: House) -> None:
    environments = Environments(house.new, keep=1)
    first = await use(environments, house.host)
    await environments.settle()
    house.fails("assign", ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        await use(environments, house.host)
    assert first.is_closed
    house.fails("start", SandboxUnavailable("not here"))
    with pytest.raises(SandboxUnavailable):
        await use(environments, house.host)
    assert house.is_empty


async def test_a_constructor_that_refuses_is_heard(house: House) -> None:
    def new() -> BaseEnv:
        raise ConfigError("no such size")

    with pytest.raises(ConfigError, match="no such size"):
        await use(Environments(new), house.host)


@pytest.mark.parametrize("what", ["start", "assign"])
async def test_a_run_that_is_cancelled_while_it_waits_for_its_environment_leaves_nothing(
    what: str, house: House
) -> None:
    environments = Environments(house.new, keep=1)
    if what == "assign":
        await use(environments, house.host)
        await environments.settle()
    house.waits(what)
    task = asyncio.create_task(use(environments, house.host))
    await house.until(what)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert house.is_empty


async def test_a_run_that_is_cancelled_while_another_ones_begins_anew_leaves_that_alone(house: House) -> None:
    environments = Environments(house.new, keep=1)
    gate = house.waits("reset")
    first = await use(environments, house.host)
    task = asyncio.create_task(use(environments, house.host))
    await house.until("reset")
    task.cancel()
    await asyncio.wait([task])
    gate.set()
    assert await use(environments, house.host) is first
    await environments.aclose()


# --- what is kept ------------------------------------------------------------------------------


async def test_as_many_stay_ready_as_are_to_be_kept(house: House) -> None:
    environments = Environments(house.new, keep=2)
    async with environments.lend(house.host), environments.lend(house.host), environments.lend(house.host):
        assert house.host.outlives_handler is True
    await environments.settle()
    assert [env.is_closed for env in house.made].count(False) == 2
    await environments.aclose()
    assert house.is_empty


async def test_what_is_lacking_is_started_in_the_background_and_nothing_else(house: House) -> None:
    environments = Environments(house.new, keep=3)
    for _ in range(3):
        environments.fill(house.host)
    await environments.settle()
    assert [env.done for env in house.made] == [["start"]] * 3
    async with environments.lend(house.host) as env:
        assert env in house.made[:3]
        environments.fill(house.host)
    await environments.settle()
    assert len(house.made) == 4
    assert [env.is_closed for env in house.made].count(False) == 3
    await environments.aclose()


async def test_one_that_has_not_begun_to_begin_anew_is_ended_too(house: House) -> None:
    environments = Environments(house.new, keep=1)
    env = await use(environments, house.host)
    await environments.aclose()
    assert env.done == ["start", "close"]


@pytest.mark.parametrize("error", [SandboxUnavailable("not here"), RuntimeError("a bug")], ids=repr)
async def test_one_that_does_not_start_in_the_background_is_nobodys_trouble(
    error: Exception, house: House
) -> None:
    environments = Environments(house.new, keep=1)
    house.fails("start", error)
    environments.fill(house.host)
    await environments.settle()
    house.wrong.clear()
    assert (await use(environments, house.host)).done[0] == "start"
    await environments.aclose()
    assert house.is_empty


async def test_the_end_waits_for_nothing_and_leaves_nothing_and_may_come_twice(house: House) -> None:
    environments = Environments(house.new, keep=2)
    await use(environments, house.host)
    await environments.settle()
    house.waits("reset"), house.waits("start")
    await use(environments, house.host)
    environments.fill(house.host)
    await house.until("start")
    async with asyncio.timeout(PATIENCE):
        await environments.aclose()
        await environments.aclose()
    assert house.is_empty


async def test_where_no_run_is_calls_are_told_so(house: House) -> None:
    with pytest.raises(ModelError, match="nobody answers"):
        await nobody(protocol.Call(id=1, fn="llm_query"), ["x"])


# --- any number of runs ------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 3), st.integers(1, 12), st.integers(0, 2**32).map(random.Random))
def test_whatever_happens_none_is_lent_twice_and_none_is_left(
    keep: int, count: int, chance: random.Random
) -> None:
    async def work() -> None:
        house, used = House(), []
        environments = Environments(house.new, keep)

        async def sometimes() -> None:
            for _ in range(chance.randint(0, 3)):
                await asyncio.sleep(0)
            if chance.random() < 0.1:
                raise SandboxError("bad luck")

        house.wrong.update(dict.fromkeys(("start", "reset", "assign"), sometimes))

        async def run() -> None:
            async with environments.lend(house.host) as env:
                assert env not in used
                used.append(env)
                try:
                    await sometimes()
                finally:
                    used.remove(env)

        environments.fill(house.host)
        tasks = [asyncio.create_task(run()) for _ in range(count)]
        for _ in range(chance.randint(0, 20)):
            await asyncio.sleep(0)
        for task in chance.sample(tasks, chance.randint(0, count)):
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            assert outcome is None or isinstance(outcome, SandboxError | asyncio.CancelledError)
        await environments.settle()
        assert sum(not env.is_closed for env in house.made) <= keep
        with suppress(SandboxError):
            await use(environments, house.host)
        await environments.aclose()
        assert house.is_empty

    asyncio.run(work())

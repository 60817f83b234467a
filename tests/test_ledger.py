"""Facts about the accounts of a run tree."""

import asyncio
import json
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from rlm.client import Message, ModelInfo, Price, Request, Usage
from rlm.errors import (
    BudgetExceeded,
    MaxCallsExceeded,
    MaxChildrenExceeded,
    MaxTokensExceeded,
    TimeoutExceeded,
)
from rlm.ledger import Ledger
from rlm.limits import Limits

relaxed = settings(deadline=None)


def test_calls_are_numbered_from_one() -> None:
    ledger = Ledger(Limits())
    assert [ledger.reserve_call() for _ in range(3)] == [1, 2, 3]


def test_hits_are_numbered_among_the_calls_and_take_nothing_from_the_budget() -> None:
    ledger = Ledger(Limits(max_calls=2))
    numbers = [
        ledger.reserve_call(),
        ledger.hit("m"),
        ledger.hit("m"),
        ledger.reserve_call(),
        ledger.hit("n"),
    ]
    assert numbers == [1, 2, 3, 4, 5]
    assert (ledger.calls, ledger.in_flight, ledger.budget(1)["calls"]) == (2, 2, 0)
    ledger.settle("m", Usage(1, 2, cost=0.5))
    usage = ledger.usage()
    assert (usage.total_calls, usage.total_cache_hits, usage.total_cost) == (1, 3, 0.5)
    assert usage.model_usage_summaries["m"].total_cache_hits == 2


def test_without_a_limit_there_is_always_a_call_left() -> None:
    ledger = Ledger(Limits())
    for _ in range(1000):
        ledger.reserve_call()
    assert ledger.calls == 1000


def test_a_call_over_the_limit_is_refused_with_the_figures_and_a_way_out() -> None:
    ledger = Ledger(Limits(max_calls=2))
    ledger.reserve_call()
    ledger.reserve_call()
    with pytest.raises(MaxCallsExceeded, match="raise max_calls") as caught:
        ledger.reserve_call()
    assert (caught.value.name, caught.value.limit, caught.value.used) == ("max_calls", 2, 2)
    assert ledger.calls == 2


def test_a_call_counts_from_its_reservation_and_not_from_its_end() -> None:
    ledger = Ledger(Limits(max_calls=1))
    ledger.reserve_call()
    assert (ledger.calls, ledger.in_flight, ledger.usage().total_calls) == (1, 1, 0)
    with pytest.raises(MaxCallsExceeded):
        ledger.reserve_call()
    ledger.settle("m", Usage(1, 2))
    assert (ledger.calls, ledger.in_flight, ledger.usage().total_calls) == (1, 0, 1)


def test_a_failed_call_is_not_given_back() -> None:
    ledger = Ledger(Limits(max_calls=1))
    ledger.reserve_call()
    ledger.fail("m")
    assert (ledger.in_flight, ledger.usage().total_calls, ledger.usage().total_input_tokens) == (0, 1, 0)
    with pytest.raises(MaxCallsExceeded):
        ledger.reserve_call()


def test_a_call_after_the_deadline_is_refused() -> None:
    ledger = Ledger(Limits(max_timeout=1e-9))
    with pytest.raises(TimeoutExceeded, match="max_timeout=1e-09 s") as caught:
        ledger.reserve_call()
    assert (caught.value.name, caught.value.limit) == ("max_timeout", 1e-9)
    assert ledger.calls == 0


def test_time_is_unlimited_unless_it_is_limited() -> None:
    assert Ledger(Limits()).seconds_left() is None
    left = Ledger(Limits(max_timeout=1000)).seconds_left()
    assert left is not None
    assert 0 < left <= 1000
    past = Ledger(Limits(max_timeout=1e-9)).seconds_left()
    assert past is not None
    assert past < 0


usages = st.builds(
    Usage,
    st.integers(0, 10**6),
    st.integers(0, 10**6),
    st.integers(0, 10**6),
    st.none() | st.integers(0, 1000).map(float),
)


@relaxed
@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), st.none() | usages)))
def test_the_sums_are_right_per_model_and_over_all(calls: list[tuple[str, Usage | None]]) -> None:
    ledger = Ledger(Limits())
    for model, usage in calls:
        ledger.reserve_call()
        if usage is None:
            ledger.fail(model)
        else:
            ledger.settle(model, usage)
    total = ledger.usage()
    assert set(total.model_usage_summaries) == {model for model, _ in calls}
    for name, summary in total.model_usage_summaries.items():
        mine = [usage or Usage() for model, usage in calls if model == name]
        assert summary.total_calls == len(mine)
        assert summary.total_input_tokens == sum(usage.input_tokens for usage in mine)
        assert summary.total_output_tokens == sum(usage.output_tokens for usage in mine)
        assert summary.total_cached_tokens == sum(usage.cached_tokens for usage in mine)
    known = [usage.cost for _, usage in calls if usage is not None and usage.cost is not None]
    assert total.total_cost == (sum(known) if known else None)
    assert total.total_calls == ledger.calls == len(calls)
    assert total.total_input_tokens == sum(usage.input_tokens for _, usage in calls if usage)
    assert total.total_output_tokens == sum(usage.output_tokens for _, usage in calls if usage)
    assert ledger.in_flight == 0


def test_a_cost_of_nothing_is_not_an_unknown_cost() -> None:
    ledger = Ledger(Limits())
    ledger.settle("local", Usage(1, 1, cost=0.0))
    assert ledger.usage().total_cost == 0.0
    ledger.settle("other", Usage(1, 1))
    assert ledger.usage().model_usage_summaries["other"].total_cost is None


def test_usage_is_a_copy() -> None:
    ledger = Ledger(Limits())
    ledger.settle("m", Usage(1, 1))
    before = ledger.usage()
    ledger.settle("m", Usage(1, 1))
    assert (before.total_calls, ledger.usage().total_calls) == (1, 2)
    before.model_usage_summaries.clear()
    assert ledger.usage().total_calls == 2


def test_the_budget_of_an_unlimited_run_has_no_numbers_but_what_was_used() -> None:
    ledger = Ledger(Limits())
    ledger.reserve_call()
    assert ledger.budget(7) == {
        "iterations": 7, "depth": 0, "children": None, "calls": None, "tokens": None, "dollars": None,
        "seconds": None, "calls_made": 1,
    }  # fmt: skip


def test_the_budget_says_what_is_left_and_never_less_than_nothing() -> None:
    ledger = Ledger(Limits(max_calls=5, max_timeout=1e-9, max_tokens=100, max_budget=2.0, max_children=3))
    ledger.in_flight = 1
    ledger.settle("m", Usage(6, 4, cost=0.5))
    assert ledger.budget(0, 2) == {
        "iterations": 0, "depth": 2, "children": 3, "calls": 5, "tokens": 90, "dollars": 1.5, "seconds": 0.0,
        "calls_made": 0,
    }  # fmt: skip
    assert json.loads(json.dumps(ledger.budget(0, 2))) == ledger.budget(0, 2)


def test_limits_cannot_be_changed_while_a_run_goes_by_them() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Limits().max_calls = 5  # type: ignore[misc]


# --- tokens and money -------------------------------------------------------------------------------------

TELLS = ModelInfo(tells_cost=True)
ASKS = Request((Message("user", "x" * 400),))


async def spend(
    ledger: Ledger, usage: Usage, *, sub: bool = True, info: Callable[[str], ModelInfo] = lambda model: TELLS
) -> None:
    """One call, from its reservation to its settlement."""
    held = await ledger.reserve(ASKS, "m", info, sub=sub)
    try:
        ledger.reserve_call(sub=sub)
        await asyncio.sleep(0.001)
        ledger.settle("m", usage, sub=sub)
        ledger.learn("m", ASKS, usage, sub=sub)
    finally:
        ledger.release(held)


async def test_the_first_call_of_a_model_is_made_alone() -> None:
    ledger = Ledger(Limits(max_budget=1.0))
    most = 0

    async def call() -> None:
        nonlocal most
        held = await ledger.reserve(ASKS, "m", lambda model: TELLS, sub=True)
        ledger.reserve_call(sub=True)
        first = ledger.calls == 1
        await asyncio.sleep(0.01)
        if first:
            assert ledger.in_flight == 1
        most = max(most, ledger.in_flight)
        ledger.settle("m", Usage(1, 1, cost=0.01))
        ledger.learn("m", ASKS, Usage(1, 1, cost=0.01), sub=True)
        ledger.release(held)

    await asyncio.gather(*(call() for _ in range(10)))
    assert most == 9


@pytest.mark.parametrize("width", [1, 3, 20, 200])
async def test_money_is_never_exceeded_however_many_calls_are_made_at_once(width: int) -> None:
    ledger = Ledger(Limits(max_budget=0.045))
    calls = (spend(ledger, Usage(10, 10, cost=0.01)) for _ in range(width))
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    made = sum(outcome is None for outcome in outcomes)
    assert made == min(width, 4)
    assert {type(outcome) for outcome in outcomes} <= {type(None), BudgetExceeded}
    assert ledger.usage().total_cost == pytest.approx(0.01 * made)
    assert ledger.cost.used == pytest.approx(0.01 * made)
    assert (ledger.cost.held, ledger.in_flight) == (pytest.approx(0), 0)


async def test_a_call_that_may_yet_fit_waits_for_those_in_flight() -> None:
    ledger = Ledger(Limits(max_tokens=1000))
    await spend(ledger, Usage(100, 300))  # the dear one
    await asyncio.gather(spend(ledger, Usage(100, 10)), spend(ledger, Usage(100, 10)))
    assert ledger.tokens.used == 620  # each was taken to be as dear as the first: both would not have fit


@relaxed
@given(
    st.integers(1, 2000),
    st.lists(st.tuples(st.integers(0, 100), st.integers(0, 100)), min_size=1, max_size=40),
)
def test_tokens_go_over_by_no_more_than_what_the_calls_in_flight_used_beyond_their_reservation(
    limit: int, used: list[tuple[int, int]]
) -> None:
    ledger = Ledger(Limits(max_tokens=limit))
    beyond = 0.0

    async def call(usage: Usage) -> None:
        nonlocal beyond
        held = await ledger.reserve(ASKS, "m", lambda model: TELLS, sub=True)
        ledger.reserve_call()
        await asyncio.sleep(0)
        beyond += max(usage.input_tokens + usage.output_tokens - held.tokens, 0)
        ledger.settle("m", usage)
        ledger.learn("m", ASKS, usage, sub=True)
        ledger.release(held)

    async def all_at_once() -> None:
        await asyncio.gather(*(call(Usage(*tokens)) for tokens in used), return_exceptions=True)

    asyncio.run(all_at_once())
    assert ledger.tokens.used <= limit + beyond
    assert ledger.tokens.held == pytest.approx(0)


async def test_a_failed_or_cancelled_call_gives_back_what_it_held() -> None:
    ledger = Ledger(Limits(max_budget=1.0))
    held = await ledger.reserve(ASKS, "m", lambda model: TELLS, sub=False)
    waiting = asyncio.create_task(ledger.reserve(ASKS, "m", lambda model: TELLS, sub=False))
    cancelled = asyncio.create_task(ledger.reserve(ASKS, "m", lambda model: TELLS, sub=False))
    await asyncio.sleep(0)
    cancelled.cancel()
    ledger.release(held)
    assert (await waiting).cost == pytest.approx(1.0)


async def test_prices_make_an_estimate_of_what_has_not_been_seen() -> None:
    price = Price(input=1_000_000, output=2_000_000)  # one dollar a token, and two
    ledger = Ledger(Limits(max_budget=1000.0))
    await spend(ledger, Usage(100, 10, cost=120.0), info=lambda model: ModelInfo(price=price))
    held = await ledger.reserve(
        Request((Message("user", "x" * 800),)), "m", lambda model: ModelInfo(price=price), sub=True
    )
    assert (held.tokens, held.cost) == (210, 220)
    capped = Request((Message("user", "x" * 400),), max_tokens=50)
    assert (await ledger.reserve(capped, "m", lambda model: ModelInfo(price=price), sub=True)).cost == 200


async def test_sub_calls_have_limits_of_their_own() -> None:
    ledger = Ledger(Limits(max_sub_tokens=100, max_sub_calls=3))
    await spend(ledger, Usage(500, 500), sub=False)
    await spend(ledger, Usage(60, 50))
    with pytest.raises(MaxTokensExceeded, match="110 of its 100 tokens of sub-calls"):
        await spend(ledger, Usage(1, 1))
    await spend(ledger, Usage(500, 500), sub=False)
    free = Ledger(Limits(max_sub_calls=2))
    for _ in range(2):
        free.reserve_call(sub=True)
    with pytest.raises(MaxCallsExceeded, match="raise max_sub_calls"):
        free.reserve_call(sub=True)
    free.reserve_call()


def test_children_are_counted() -> None:
    ledger = Ledger(Limits(max_children=2))
    ledger.reserve_child()
    ledger.reserve_child()
    with pytest.raises(MaxChildrenExceeded, match=r"2 child runs.*raise max_children"):
        ledger.reserve_child()


async def test_a_reserve_is_kept_for_the_last_answer_and_then_opened() -> None:
    ledger = Ledger(Limits(max_calls=2, max_budget=1.0, on_limit="answer"))
    ledger.reserve_call()
    with pytest.raises(MaxCallsExceeded):
        ledger.reserve_call()
    assert ledger.cost.left == pytest.approx(0.95)
    ledger.open_reserve()
    assert ledger.cost.left == pytest.approx(1.0)
    assert ledger.reserve_call() == 2
    with pytest.raises(MaxCallsExceeded):
        ledger.reserve_call()

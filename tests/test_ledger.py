"""Facts about the accounts of a run tree."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm.client import Usage
from rlm.errors import MaxCallsExceeded, TimeoutExceeded
from rlm.ledger import Ledger, Limits

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
    assert ledger.budget(7) == {"iterations": 7, "calls": None, "seconds": None, "calls_made": 1}


def test_the_budget_says_what_is_left_and_never_less_than_nothing() -> None:
    ledger = Ledger(Limits(max_calls=5, max_timeout=1e-9))
    assert ledger.budget(0) == {"iterations": 0, "calls": 5, "seconds": 0.0, "calls_made": 0}
    assert json.loads(json.dumps(ledger.budget(0))) == ledger.budget(0)


def test_limits_cannot_be_changed_while_a_run_goes_by_them() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Limits().max_calls = 5  # type: ignore[misc]

"""Facts about pacing, on a clock of the test's own: no test here waits for anything."""

import heapq
import math
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlm.config import Config
from rlm.errors import ConfigError
from rlm.pace import LATE, MARGIN, STALE, OwnTimes, Pace, RateLimit, SharedTimes

LATENCY = 0.02
SENDING = 0.0003
"""Seconds it takes to send one call."""


class Window:
    """A provider that allows so many requests in each window of time."""

    def __init__(self, allowed: int, seconds: float = 1.0, phase: float = 0.3) -> None:
        self._allowed, self._seconds, self._phase = allowed, seconds, phase
        self._window, self._count = -1, 0

    def accepts(self, now: float) -> bool:
        window = math.floor((now + self._phase) / self._seconds)
        if window != self._window:
            self._window, self._count = window, 0
        self._count += 1
        return self._count <= self._allowed

    def rest(self, now: float) -> float:
        return (math.floor((now + self._phase) / self._seconds) + 1) * self._seconds - self._phase - now


class Bucket:
    """A provider whose allowance refills all the time."""

    def __init__(self, rate: float, capacity: float) -> None:
        self._rate, self._capacity, self._tokens = rate, capacity, capacity
        self._at = 0.0

    def accepts(self, now: float) -> bool:
        self._tokens = min(self._capacity, self._tokens + (now - self._at) * self._rate)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def rest(self, now: float) -> float:
        return (1 - self._tokens) / self._rate


def simulate(
    calls: int,
    server: Window | Bucket,
    told: Callable[[float], float | None],
    limit: RateLimit | None = None,
    width: int = 256,
) -> tuple[float, int]:
    """Make calls as a gate does, in simulated time. Returns the seconds taken, and how many were refused.

    ``told`` is what Retry-After says, of the seconds that are left in truth.
    """
    pace, start, refused = Pace(limit or RateLimit()), 1000.0, 0
    now, waiting, replied = start, calls, 0
    flying: list[tuple[float, float, bool, float | None]] = []
    while replied < calls:
        wait = 0.0 if pace.is_free else pace.wait(now)
        if waiting and len(flying) < width and wait <= 0:
            waiting -= 1
            pace.take(now)
            accepted = server.accepts(now)
            back = now + (LATENCY if accepted else LATENCY / 4)
            heapq.heappush(flying, (back, now, accepted, None if accepted else told(server.rest(now))))
            now += SENDING
        else:
            moments = [flying[0][0]] if flying else []
            moments += [now + wait] if waiting and len(flying) < width else []
            now = max(now, min(moments))
        while flying and flying[0][0] <= now:
            _, sent_at, accepted, retry_after = heapq.heappop(flying)
            if accepted:
                replied += 1
            else:
                refused += 1
                waiting += 1
                pace.refused(now, sent_at, retry_after)
    return now - start, refused


WHOLE_SECONDS: Callable[[float], float | None] = math.ceil


def exactly(rest: float) -> float:
    return rest


def nothing(rest: float) -> None:
    return None


@pytest.mark.parametrize("told", [WHOLE_SECONDS, exactly])
@pytest.mark.parametrize("phase", [0.0, 0.1, 0.3, 0.5, 0.9])
def test_a_rate_that_nobody_set_is_found_and_kept_to(
    phase: float, told: Callable[[float], float | None]
) -> None:
    seconds, refused = simulate(300, Window(10, phase=phase), told)
    assert seconds <= 1.15 * 29
    assert refused < 60  # of 300; each call refused once at the beginning would be 246


@pytest.mark.parametrize("phase", [0.0, 0.1, 0.3, 0.5, 0.9])
def test_a_rate_that_was_set_is_kept_to_with_hardly_a_refusal(phase: float) -> None:
    limit = RateLimit(requests_per_minute=600)
    seconds, refused = simulate(300, Window(10, phase=phase), WHOLE_SECONDS, limit)
    assert seconds <= 1.15 * 29.9
    assert refused <= 2


@pytest.mark.parametrize("told", [WHOLE_SECONDS, exactly, nothing])
def test_a_leaky_bucket_is_found_too(told: Callable[[float], float | None]) -> None:
    seconds, refused = simulate(300, Bucket(10, 10), told)
    assert seconds <= 1.15 * 29
    assert refused < 80


def test_a_hundred_requests_a_second_are_found_as_well() -> None:
    assert simulate(3000, Window(100), WHOLE_SECONDS)[0] <= 1.15 * 30


def test_without_limits_and_refusals_calls_go_as_they_come() -> None:
    seconds, refused = simulate(1000, Window(10**6), WHOLE_SECONDS)
    assert (seconds < 1, refused) == (True, 0)
    assert Pace(RateLimit()).is_free


def test_a_burst_after_a_long_rest_is_not_taken_for_a_slow_provider() -> None:
    pace = Pace(RateLimit())
    pace.take(0.0)
    for index in range(20):  # a minute later
        pace.take(60.0 + index / 1000)
    for _ in range(10):
        pace.refused(60.1, 60.0, 1.0)
    assert pace.wait(60.1) == pytest.approx(1.0)
    pace.take(61.1)
    assert pace.wait(61.1) == pytest.approx(0.11 - LATE)  # 10 of 20 were accepted in 1.1 s


def test_a_refusal_holds_everyone_for_as_long_as_it_says() -> None:
    pace = Pace(RateLimit())
    pace.take(5.0)
    pace.refused(5.1, 5.0, 7.0)
    assert not pace.is_free
    assert pace.wait(5.1) == pytest.approx(7.0)
    pace.refused(6.0, 5.0, 1.0)  # one that says less does not shorten it
    assert pace.wait(6.0) == pytest.approx(6.1)


def test_silent_refusals_are_answered_with_longer_and_longer_rests() -> None:
    pace, now, rests = Pace(RateLimit()), 0.0, []
    for _ in range(8):
        pace.take(now)
        pace.refused(now, now, None)
        rests.append(pace.wait(now))
        now += max(rests[-1], pace.wait(now))
    assert rests[0] == 1.0
    assert rests == sorted(rests)
    assert rests[-1] >= 60.0


def test_tokens_are_spaced_by_how_many_were_used() -> None:
    pace = Pace(RateLimit(tokens_per_minute=6000))
    assert pace.counts_tokens
    pace.take(0.0, 100)
    assert pace.wait(0.0) == pytest.approx(1.0)
    pace.correct(50)  # the reply was longer than thought
    assert pace.wait(0.0) == pytest.approx(1.5)
    pace.correct(-100)
    assert pace.wait(0.0) == pytest.approx(0.5)


@pytest.mark.parametrize("field", ["requests_per_minute", "tokens_per_minute", "concurrency"])
def test_a_limit_is_greater_than_nothing(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}=0"):
        RateLimit(**{field: 0})
    with pytest.raises(ConfigError, match=f"{field}=0"):
        Config.create(rate_limits={"openai": {field: 0}})


def test_limits_are_read_from_tables() -> None:
    config = Config.create(rate_limits={"openai": {"requests_per_minute": 60, "concurrency": 4}})
    assert config.rate_limits["openai"] == RateLimit(requests_per_minute=60, concurrency=4)
    with pytest.raises(ConfigError, match="requests_per_second"):
        Config.create(rate_limits={"openai": {"requests_per_second": 1}})


# --- times that processes share ---------------------------------------------------------------------------


def test_times_in_a_file_are_seen_by_whoever_names_it(tmp_path: Path) -> None:
    limit = RateLimit(requests_per_minute=60)
    mine, yours = (Pace(limit, SharedTimes(tmp_path / "new", "openai")) for _ in range(2))
    other = Pace(limit, SharedTimes(tmp_path / "new", "anthropic"))
    mine.take(100.0)
    mine.take(100.0)
    assert mine.wait(100.0) == yours.wait(100.0) == pytest.approx(2 * MARGIN, abs=2 * LATE)
    assert other.wait(100.0) == 0
    yours.refused(100.0, 100.0, 30.0)
    assert mine.wait(100.0) == pytest.approx(30.0)


def _take(folder: Path, times: int) -> None:
    pace = Pace(RateLimit(requests_per_minute=60), SharedTimes(folder, "openai"))
    for _ in range(times):
        pace.take(50.0)


def test_no_call_of_any_process_is_forgotten(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_take, args=(tmp_path, 200)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    pace = Pace(RateLimit(requests_per_minute=60), SharedTimes(tmp_path, "openai"))
    assert pace.wait(50.0) == pytest.approx(600 * MARGIN, abs=2 * LATE)


def test_times_from_before_the_machine_was_started_are_forgotten(tmp_path: Path) -> None:
    pace = Pace(RateLimit(requests_per_minute=60), SharedTimes(tmp_path, "openai"))
    pace.take(10 * STALE)
    assert pace.wait(5.0) == 0
    pace.take(5.0)
    assert pace.wait(5.0) == pytest.approx(MARGIN, abs=LATE)


@given(st.lists(st.floats(0, 1e6), min_size=3, max_size=3))
def test_times_are_kept_as_they_are(tmp_path_factory: pytest.TempPathFactory, values: list[float]) -> None:
    times = SharedTimes(tmp_path_factory.getbasetemp() / "kept", "x")
    with times.held() as held:
        held[:] = values
    with times.held() as held:
        assert held == values
    with OwnTimes().held() as own:
        assert own == [0.0, 0.0, 0.0]

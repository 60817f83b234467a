"""Facts about what stands between the LMHandler and a provider."""

import asyncio
import itertools
import os
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from rlm import gate as gates
from rlm.backends import Backends, connect
from rlm.client import BaseLM, Message, ModelInfo, Price, Reply, Request, Usage
from rlm.config import Config
from rlm.errors import (
    AuthError,
    BadRequest,
    ConnectFailed,
    ContextOverflow,
    MaxCallsExceeded,
    ModelError,
    ProtocolError,
    QuotaExceeded,
    RateLimited,
    Timeout,
    TimeoutExceeded,
    Unavailable,
)
from rlm.events import (
    AnyEvent,
    EventBus,
    ModelFailed,
    ModelOutput,
    ModelReplied,
    ModelRequested,
    ModelRetried,
)
from rlm.gate import FAILURES_TO_OPEN, LONGEST_RETRY_AFTER, Gate, Policy, Pool
from rlm.handler import Caller, LMHandler
from rlm.ledger import Ledger
from rlm.limits import Limits
from rlm.pace import RateLimit

ROOT = Caller("run-1", None, 0, "root")
SUB = Caller("run-1", None, 0, "sub")
HELLO = [Message("user", "hello")]

Step = Reply | Exception | Callable[[Request], Any]


class Fake(BaseLM):
    """A client that does what a list says, the last of it again and again."""

    model_name = "fake"

    def __init__(self, *steps: Step, price: Price | None = None) -> None:
        self.steps = list(steps) or [Reply("hi")]
        self.requests: list[Request] = []
        self.at: list[float] = []
        self.in_flight = self.most = 0
        self.price = price

    async def complete(self, request: Request) -> Reply:
        self.requests.append(request)
        self.at.append(time.monotonic())
        step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        try:
            if callable(step):
                step = await step(request)
        finally:
            self.in_flight -= 1
        if isinstance(step, Exception):
            raise step
        assert isinstance(step, Reply)
        return step

    def info(self, model: str) -> ModelInfo:
        return ModelInfo(price=self.price)


class Streaming(Fake):
    """The same, letter by letter."""

    async def stream(self, request: Request) -> AsyncIterator[str | Reply]:
        reply = await self.complete(request)
        for letter in reply.text:
            await asyncio.sleep(0)
            yield letter
        yield reply


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries at once, and circuits that close soon."""
    monkeypatch.setattr(gates, "BACKOFF", 0.001)
    monkeypatch.setattr(gates, "FIRST_COOLDOWN", 0.3)


def handler_for(client: BaseLM, policy: Policy | None = None, **limits: Any) -> LMHandler:
    backends = Backends([Gate(client, "fake", policy=policy)])
    return LMHandler(backends, Ledger(Limits(**limits)), EventBus())


def told(handler: LMHandler, kind: type[Any]) -> list[Any]:
    return [event for event in handler.events.trace if isinstance(event, kind)]


def slow(seconds: float, text: str = "late") -> Callable[[Request], Any]:
    async def step(request: Request) -> Reply:
        await asyncio.sleep(seconds)
        return Reply(text)

    return step


# --- another try ------------------------------------------------------------------------------------------

PASSING = [
    RateLimited("r", retry_after=0.01),
    Unavailable("u"),
    Timeout("t"),
    ConnectFailed("c"),
    ProtocolError("p"),
]
LASTING = [
    AuthError("a"),
    BadRequest("b"),
    ContextOverflow("o", window=5),
    QuotaExceeded("q"),
    ModelError("m"),
    ValueError("v"),
]


@pytest.mark.parametrize("error", PASSING, ids=lambda error: type(error).__name__)
async def test_a_failure_that_may_pass_is_tried_again(error: ModelError) -> None:
    handler = handler_for(client := Fake(error, error, Reply("at last")))
    assert (await handler.complete(HELLO, SUB)).text == "at last"
    assert len(client.requests) == 3
    kinds = [type(event) for event in handler.events.trace]
    assert kinds == [ModelRequested, ModelRetried, ModelRetried, ModelReplied]


@pytest.mark.parametrize("error", LASTING, ids=lambda error: type(error).__name__)
async def test_a_failure_that_lasts_is_not(error: Exception) -> None:
    handler = handler_for(client := Fake(error, Reply("never seen")))
    with pytest.raises(ModelError):
        await handler.complete(HELLO, SUB)
    assert len(client.requests) == 1


async def test_retries_come_to_an_end_that_says_how_many_there_were() -> None:
    handler = handler_for(client := Fake(ConnectFailed("nobody there")), Policy(max_retries=3))
    with pytest.raises(ConnectFailed, match=r"nobody there \(after 4 attempts\)"):
        await handler.complete(HELLO, SUB)
    assert len(client.requests) == 4
    retries = told(handler, ModelRetried)
    assert [(event.attempt, event.sent, event.error) for event in retries] == [
        (1, False, "ConnectFailed: nobody there"),
        (2, False, "ConnectFailed: nobody there"),
        (3, False, "ConnectFailed: nobody there"),
    ]
    usage = handler.ledger.usage().model_usage_summaries["fake"]
    assert (usage.total_calls, usage.total_retries) == (1, 3)


async def test_retries_are_one_call_of_the_budget() -> None:
    handler = handler_for(Fake(Unavailable("down"), Reply("up")), max_calls=1)
    assert (await handler.complete(HELLO, SUB)).text == "up"
    with pytest.raises(MaxCallsExceeded):
        await handler.complete(HELLO, SUB)


async def test_waits_grow_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "BACKOFF", 1.0)
    gate = Gate(Fake())
    for faults, most in ((1, 1), (2, 2), (3, 4), (4, 8), (5, 16)):
        waits = [gate._wait(Unavailable("down"), faults, 0, None) for _ in range(200)]
        assert all(wait is not None and 0 <= wait <= most for wait in waits)
        assert max(wait or 0 for wait in waits) > most / 2
        assert len(set(waits)) > 100


async def test_retry_after_is_honoured() -> None:
    handler = handler_for(client := Fake(Unavailable("overloaded", retry_after=0.2), Reply("ok")))
    await handler.complete(HELLO, SUB)
    assert client.at[1] - client.at[0] >= 0.2


async def test_a_provider_that_asks_for_too_long_a_wait_fails_the_call_at_once() -> None:
    for error in (RateLimited("r", retry_after=LONGEST_RETRY_AFTER + 1), Unavailable("u", retry_after=10**6)):
        handler = handler_for(client := Fake(error))
        with pytest.raises(type(error)):
            await handler.complete(HELLO, SUB)
        assert len(client.requests) == 1


async def test_nobody_waits_beyond_the_end_of_the_run() -> None:
    handler = handler_for(client := Fake(RateLimited("later", retry_after=50)), max_timeout=30)
    with pytest.raises(RateLimited):
        await handler.complete(HELLO, SUB)
    assert len(client.requests) == 1


async def test_a_run_out_of_time_makes_no_call() -> None:
    handler = handler_for(client := Fake(), max_timeout=1e-6)
    await asyncio.sleep(0.01)
    with pytest.raises(TimeoutExceeded):
        await handler.complete(HELLO, SUB)
    assert client.requests == []


# --- rate limits ------------------------------------------------------------------------------------------


async def test_one_refusal_holds_everyone() -> None:
    handler = handler_for(client := Fake(RateLimited("slow down", retry_after=0.3), Reply("ok")))
    refused = asyncio.create_task(handler.complete(HELLO, SUB))
    await asyncio.sleep(0.02)
    await asyncio.gather(refused, *(handler.complete(HELLO, SUB) for _ in range(5)))
    assert len(client.at) == 7
    assert min(client.at[1:]) - client.at[0] >= 0.3


async def test_being_refused_does_not_use_up_the_retries() -> None:
    refusals: list[Step] = [RateLimited("no", retry_after=0.001) for _ in range(10)]
    handler = handler_for(Fake(*refusals, Reply("yes")), Policy(max_retries=0))
    assert (await handler.complete(HELLO, SUB)).text == "yes"


async def test_being_refused_for_ever_ends() -> None:
    handler = handler_for(client := Fake(RateLimited("no", retry_after=0.0)))
    with pytest.raises(RateLimited, match="after 21 attempts"):
        await handler.complete(HELLO, SUB)
    assert len(client.requests) == 21


async def test_a_set_rate_spaces_the_calls() -> None:
    client = Fake()
    pool = Pool("fake", RateLimit(requests_per_minute=60 * 50))
    handler = LMHandler(
        Backends([Gate(client, pool_for=lambda provider, model: [pool])]), Ledger(Limits()), EventBus()
    )
    await asyncio.gather(*(handler.complete(HELLO, SUB) for _ in range(11)))
    assert client.at[-1] - client.at[0] >= 9 / 50  # one may go in arrears
    assert len(client.at) == 11


async def test_a_provider_and_a_model_have_limits_of_their_own() -> None:
    client = Fake(slow(0.02))
    everyone, model = Pool("fake", RateLimit(concurrency=3)), Pool("fake big", RateLimit(concurrency=1))
    gate = Gate(client, pool_for=lambda provider, name: [everyone, model] if name == "big" else [everyone])
    slots = asyncio.Semaphore(99)

    async def ask(name: str) -> Reply:
        return await gate.call(Request(tuple(HELLO), name), Silent(), slots=slots)

    await asyncio.gather(*(ask("small") for _ in range(9)))
    assert client.most == 3
    client.most = 0
    await asyncio.gather(*(ask("big") for _ in range(5)))
    assert client.most == 1


class Silent:
    """A watcher that does not."""

    def started(self) -> None: ...
    def retried(self, retry: gates.Retry) -> None: ...
    def wrote(self, text: str) -> None: ...


async def test_a_slot_is_free_while_a_call_waits_for_its_next_attempt() -> None:
    client = Fake(Unavailable("wait", retry_after=0.3), Reply("second"), Reply("first"))
    handler = LMHandler(Backends.of(client), Ledger(Limits()), EventBus(), concurrency=1)
    waits = asyncio.create_task(handler.complete(HELLO, SUB))
    await asyncio.sleep(0.01)
    assert (await handler.complete(HELLO, SUB)).text == "second"
    assert (await waits).text == "first"


async def test_a_cancelled_call_leaves_its_place_to_others() -> None:
    client = Fake(slow(30), Reply("next"))
    pool = Pool("fake", RateLimit(concurrency=1))
    gate = Gate(client, pool_for=lambda provider, model: [pool])
    handler = LMHandler(Backends([gate]), Ledger(Limits()), EventBus())
    first, second, third = (asyncio.create_task(handler.complete(HELLO, SUB)) for _ in range(3))
    await asyncio.sleep(0.01)
    second.cancel()
    first.cancel()
    assert (await third).text == "next"


# --- a circuit --------------------------------------------------------------------------------------------


async def test_a_provider_that_is_down_is_asked_by_one_call_at_a_time() -> None:
    client = Fake(Unavailable("down"))
    handler = handler_for(client, Policy(max_retries=0))
    for _ in range(FAILURES_TO_OPEN):
        with pytest.raises(Unavailable, match=r"^down$"):
            await handler.complete(HELLO, SUB)
    with pytest.raises(
        Unavailable, match=r"8 times in a row and is left alone.*the last time: Unavailable: down"
    ) as shut:
        await handler.complete(HELLO, SUB)
    assert (shut.value.sent, len(client.requests)) == (False, FAILURES_TO_OPEN)
    client.steps = [slow(0.05, "back")]
    await asyncio.sleep(0.35)
    await asyncio.gather(*(handler.complete(HELLO, SUB) for _ in range(5)))
    first, *others = client.at[-5:]
    assert min(others) - first >= 0.05  # all others waited for what came of the first


async def test_a_provider_that_stays_down_is_left_alone_for_longer() -> None:
    client = Fake(ConnectFailed("gone"))
    handler = handler_for(client, Policy(max_retries=0))
    for _ in range(FAILURES_TO_OPEN):
        with pytest.raises(ConnectFailed):
            await handler.complete(HELLO, SUB)
    await asyncio.sleep(0.35)
    with pytest.raises(ConnectFailed):  # the probe
        await handler.complete(HELLO, SUB)
    await asyncio.sleep(0.35)
    with pytest.raises(Unavailable, match="left alone"):  # for twice as long
        await handler.complete(HELLO, SUB)


@pytest.mark.parametrize(
    "error", [BadRequest("b"), AuthError("a"), RateLimited("r", retry_after=0), ValueError("v")]
)
async def test_failures_that_a_provider_answers_with_do_not_mean_that_it_is_down(error: Exception) -> None:
    handler = handler_for(client := Fake(error), Policy(max_retries=0))
    for _ in range(FAILURES_TO_OPEN + 2):
        with pytest.raises(ModelError):
            await handler.complete(HELLO, SUB)
    assert len(client.requests) >= FAILURES_TO_OPEN + 2


async def test_failures_with_replies_between_them_open_no_circuit() -> None:
    steps: Iterator[Step] = itertools.cycle([Unavailable("u"), Unavailable("u"), Reply("ok")])
    handler = handler_for(Fake(*itertools.islice(steps, 60)))
    for _ in range(20):
        assert (await handler.complete(HELLO, SUB)).text == "ok"


# --- one attempt ------------------------------------------------------------------------------------------


async def test_an_attempt_has_its_time_whatever_the_client_does() -> None:
    handler = handler_for(client := Fake(slow(30)), Policy(timeout=0.05, max_retries=1))
    with pytest.raises(Timeout, match=r"no reply within 0\.05 s"):
        await handler.complete(HELLO, SUB)
    assert (len(client.requests), client.in_flight) == (2, 0)


async def test_a_reply_that_is_slow_to_come_is_asked_for_twice_when_that_is_wished() -> None:
    handler = handler_for(client := Fake(slow(30), Reply("quick")), Policy(hedge_after=0.03))
    assert (await handler.complete(HELLO, SUB)).text == "quick"
    assert (len(client.requests), client.in_flight) == (2, 0)
    assert [event.error for event in told(handler, ModelRetried)] == [
        "no reply after 0.03 s: asked a second time"
    ]
    assert handler.ledger.usage().model_usage_summaries["fake"].total_retries == 1


async def test_a_reply_that_comes_in_time_is_asked_for_once() -> None:
    handler = handler_for(client := Fake(Reply("quick")), Policy(hedge_after=1))
    await handler.complete(HELLO, SUB)
    assert len(client.requests) == 1


async def test_a_slow_call_whose_second_try_fails_waits_for_the_first() -> None:
    handler = handler_for(Fake(slow(0.1, "first"), BadRequest("odd")), Policy(hedge_after=0.01))
    assert (await handler.complete(HELLO, SUB)).text == "first"


async def test_both_tries_failing_is_a_failure() -> None:
    async def fails(request: Request) -> Reply:
        await asyncio.sleep(0.05)
        raise BadRequest("first")

    handler = handler_for(Fake(fails, BadRequest("second")), Policy(hedge_after=0.01))
    with pytest.raises(BadRequest):
        await handler.complete(HELLO, SUB)


async def test_turns_are_streamed_and_sub_calls_are_not() -> None:
    handler = handler_for(Streaming(Reply("word by word")))
    assert (await handler.complete(HELLO, SUB)).text == "word by word"
    assert told(handler, ModelOutput) == []
    assert (await handler.complete(HELLO, ROOT)).text == "word by word"
    pieces = "".join(event.text for event in told(handler, ModelOutput))
    assert pieces
    assert "word by word".startswith(pieces)


async def test_a_stream_without_a_reply_is_a_failure() -> None:
    class Endless(Fake):
        async def stream(self, request: Request) -> AsyncIterator[str | Reply]:
            yield "and"

    with pytest.raises(ProtocolError, match="without a reply"):
        await handler_for(Endless(), Policy(max_retries=0)).complete(HELLO, ROOT)


async def test_streaming_can_be_switched_off() -> None:
    handler = LMHandler(Streaming(Reply("all at once")), Ledger(Limits()), EventBus(), stream=False)
    await handler.complete(HELLO, ROOT)
    assert told(handler, ModelOutput) == []


# --- what is sent, and what it costs ----------------------------------------------------------------------


async def test_nothing_is_set_that_the_user_did_not_set() -> None:
    handler = handler_for(client := Fake())
    await handler.complete(HELLO, SUB)
    (request,) = client.requests
    unset = (
        request.model,
        request.max_tokens,
        request.temperature,
        request.stop,
        request.seed,
        request.schema,
    )
    assert unset == (None,) * 6
    assert (request.extra, request.cache) == (None, False)


async def test_sampling_arguments_reach_the_calls_they_are_for() -> None:
    client = Fake()
    backends = Backends(
        [Gate(client)],
        sampling={"temperature": 0.5, "stop": "END", "top_k": 3},
        sub_sampling={"max_tokens": 7, "stop": ["a", "b"]},
    )
    handler = LMHandler(backends, Ledger(Limits()), EventBus())
    await handler.complete(HELLO, ROOT)
    await handler.complete(HELLO, SUB)
    turn, sub = client.requests
    assert (turn.temperature, turn.stop, turn.extra, turn.max_tokens) == (0.5, ("END",), {"top_k": 3}, None)
    assert (sub.temperature, sub.stop, sub.extra, sub.max_tokens) == (None, ("a", "b"), None, 7)


async def test_turns_of_a_run_are_one_session_and_worth_caching() -> None:
    handler = handler_for(client := Fake())
    child = Caller("run-2", "run-1", 1, "root")
    for caller in (ROOT, ROOT, child, SUB, SUB):
        await handler.complete(HELLO, caller)
    sessions = [request.session for request in client.requests]
    assert sessions[0] == sessions[1]
    assert sessions[3] == sessions[4]
    assert len(set(sessions)) == 3
    assert [request.cache for request in client.requests] == [True, True, True, False, False]


async def test_a_price_makes_a_cost_unless_the_provider_tells_its_own() -> None:
    price = Price(input=2, output=10, cached=0.5)
    usage = Usage(1_000_000, 100_000, 400_000)
    client = Fake(Reply("a", usage=usage), Reply("b", usage=Usage(1, 1, cost=0.25)), price=price)
    handler = handler_for(client)
    assert (await handler.complete(HELLO, SUB)).usage.cost == pytest.approx(1.2 + 0.2 + 1.0)
    assert (await handler.complete(HELLO, SUB)).usage.cost == 0.25
    assert handler.ledger.usage().total_cost == pytest.approx(2.65)


async def test_an_unknown_price_is_unknown_and_never_nothing() -> None:
    handler = handler_for(Fake(Reply("a", usage=Usage(5, 5))))
    assert (await handler.complete(HELLO, SUB)).usage.cost is None
    usage = handler.ledger.usage()
    assert (usage.total_cost, usage.model_usage_summaries["fake"].unpriced_calls) == (None, 1)


async def test_what_the_user_says_of_prices_wins() -> None:
    gate = Gate(Fake(Reply("a", usage=Usage(1_000_000)), price=Price(1, 1)), prices={"fake": Price(3, 3)})
    handler = LMHandler(Backends([gate]), Ledger(Limits()), EventBus())
    assert (await handler.complete(HELLO, SUB)).usage.cost == pytest.approx(3)


# --- keys -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [AuthError("bad key sk-planted-1"), ValueError("oh sk-planted-1"), Unavailable("sk-planted-1")]
)
async def test_a_key_in_the_text_of_any_error_is_masked(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "sk-planted-1")
    handler = handler_for(Fake(error), Policy(max_retries=1))
    with pytest.raises(ModelError) as caught:
        await handler.complete(HELLO, SUB)
    assert "sk-planted" not in str(caught.value) + repr(caught.value) + repr(caught.value.__cause__)
    assert "sk-planted" not in "".join(str(event) for event in handler.events.trace)
    assert os.environ["SOME_API_KEY"] == "sk-planted-1"


async def test_the_cause_of_a_failure_without_keys_is_kept() -> None:
    cause = ValueError("odd")
    with pytest.raises(ModelError, match="ValueError: odd") as caught:
        await handler_for(Fake(cause)).complete(HELLO, SUB)
    assert caught.value.__cause__ is cause


async def test_an_event_of_a_failed_call_names_the_kind_of_failure() -> None:
    handler = handler_for(Fake(QuotaExceeded("nothing left", status=429)))
    with pytest.raises(QuotaExceeded):
        await handler.complete(HELLO, SUB)
    failed: list[AnyEvent] = told(handler, ModelFailed)
    assert [event.error for event in failed] == ["QuotaExceeded: nothing left"]  # type: ignore[union-attr]


async def test_what_a_failure_came_of_shows_no_key_either(monkeypatch: pytest.MonkeyPatch) -> None:
    key = "-".join(["sk", "planted", "1"])  # a traceback shows the lines of this file
    monkeypatch.setenv("SOME_API_KEY", key)

    async def fails(request: Request) -> Reply:
        try:
            raise ValueError(key)
        except ValueError as cause:
            raise RuntimeError("it failed") from cause

    async def refused(request: Request) -> Reply:
        try:
            raise ValueError(key)
        except ValueError:
            raise AuthError("no", code=f"key {key}", request_id=key)  # noqa: B904

    for step in (fails, refused):
        with pytest.raises(ModelError) as caught:
            await handler_for(Fake(step)).complete(HELLO, SUB)
        printed = "".join(traceback.format_exception(caught.value))
        assert "sk-planted" not in printed + str(caught.value.code) + str(caught.value.request_id)


# --- clients of other people ------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError()], ids=repr)
async def test_a_client_can_end_neither_the_process_nor_the_run(end: BaseException) -> None:
    async def ends(request: Request) -> Reply:
        raise end

    handler = handler_for(Fake(ends, Reply("on")))
    with pytest.raises(ModelError, match="the client"):
        await handler.complete(HELLO, SUB)
    assert (await handler.complete(HELLO, SUB)).text == "on"


async def test_a_client_that_knows_nothing_of_its_model_costs_no_reply(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Odd(Fake):
        def info(self, model: str) -> ModelInfo:
            raise RuntimeError("no idea, and sk-planted-1 does not help")

    handler = handler_for(Odd())
    assert (await handler.complete(HELLO, SUB)).text == "hi"
    assert handler.ledger.in_flight == 0
    assert "says nothing of 'fake': RuntimeError" in caplog.text
    assert "sk-planted" not in caplog.text


async def test_a_stream_need_be_no_more_than_an_iterator() -> None:
    class Bare(Fake):
        def stream(self, request: Request) -> AsyncIterator[str | Reply]:
            items = iter(["a", Reply("a")])

            class Pieces:
                def __aiter__(self) -> "Pieces":
                    return self

                async def __anext__(self) -> Any:
                    return next(items)

            return Pieces()

    assert (await handler_for(Bare()).complete(HELLO, ROOT)).text == "a"


async def test_what_prepare_raises_is_an_error_of_ours_without_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    key = "-".join(["sk", "planted", "1"])
    monkeypatch.setenv("SOME_API_KEY", key)

    class Unready(Fake):
        async def prepare(self) -> str | None:
            raise RuntimeError(f"{key} is refused")

    with pytest.raises(ModelError, match="RuntimeError") as caught:
        await Backends.of(Unready()).prepare()
    assert "sk-planted" not in "".join(traceback.format_exception(caught.value))


# --- what one call does to others -------------------------------------------------------------------------


async def test_a_rest_too_long_to_wait_for_fails_the_calls_after_it_too() -> None:
    handler = handler_for(client := Fake(RateLimited("r", retry_after=LONGEST_RETRY_AFTER + 1)))
    with pytest.raises(RateLimited):
        await handler.complete(HELLO, SUB)
    with pytest.raises(RateLimited, match="asked to be left alone for another"):
        await handler.complete(HELLO, SUB)
    assert len(client.requests) == 1


async def test_a_provider_that_answers_at_all_is_not_down() -> None:
    client = Fake(Unavailable("down"))
    handler = handler_for(client, Policy(max_retries=0))
    for _ in range(FAILURES_TO_OPEN):
        with pytest.raises(Unavailable):
            await handler.complete(HELLO, SUB)
    await asyncio.sleep(0.35)
    client.steps = [BadRequest("not so", status=400), Reply("fine")]
    with pytest.raises(BadRequest):
        await handler.complete(HELLO, SUB)
    replies = await asyncio.gather(*(handler.complete(HELLO, SUB) for _ in range(5)))
    assert len(replies) == 5


async def test_calls_that_the_budget_does_not_allow_do_not_wait_for_their_turn() -> None:
    client, pool = Fake(), Pool("fake", RateLimit(requests_per_minute=60))
    gate = Gate(client, pool_for=lambda provider, model: [pool])
    handler = LMHandler(Backends([gate]), Ledger(Limits(max_calls=2)), EventBus())
    calls = [asyncio.create_task(handler.complete(HELLO, SUB)) for _ in range(50)]
    done, _ = await asyncio.wait(calls, timeout=0.5)
    assert sum(isinstance(task.exception(), MaxCallsExceeded) for task in done) == 48
    await asyncio.gather(*calls, return_exceptions=True)
    assert len(client.requests) == 2


async def test_who_waits_for_a_slow_model_holds_no_place_among_the_others() -> None:
    client = Fake()
    config = Config.create(
        rate_limits={"*": {"concurrency": 2}, "slow": {"requests_per_minute": 60}},
        backend=client,
    )
    gate = connect(config).root
    slots = asyncio.Semaphore(99)

    async def ask(name: str) -> Reply:
        return await gate.call(Request(tuple(HELLO), name), Silent(), slots=slots)

    waiting = [asyncio.create_task(ask("slow")) for _ in range(5)]
    await asyncio.sleep(0.01)
    async with asyncio.timeout(0.5):
        await asyncio.gather(*(ask("quick") for _ in range(20)))
    for task in waiting:
        task.cancel()


async def test_two_clients_of_one_class_do_not_share_what_is_known_of_their_providers() -> None:
    down, up = Fake(Unavailable("down")), Fake()
    backends = connect(Config.create(backend=down, other_backends=[up], max_retries=0))
    handler = LMHandler(backends, Ledger(Limits()), EventBus())
    for _ in range(FAILURES_TO_OPEN + 1):
        with pytest.raises(Unavailable):
            await handler.complete(HELLO, ROOT)
    assert (await handler.complete(HELLO, SUB)).text == "hi"


async def test_the_users_price_holds_for_whatever_name_the_model_answers_by() -> None:
    answered = Reply("a", usage=Usage(1_000_000), model="fake-2026-01-01")
    gate = Gate(Fake(answered, price=Price(100, 100)), prices={"fake": Price(3, 3)})
    handler = LMHandler(Backends([gate]), Ledger(Limits()), EventBus())
    assert (await handler.complete(HELLO, SUB)).usage.cost == pytest.approx(3)


async def test_a_reply_without_a_count_has_no_cost() -> None:
    handler = handler_for(Fake(Reply("a"), price=Price(1, 1)))
    assert (await handler.complete(HELLO, SUB)).usage.cost is None


async def test_limits_of_what_there_is_not_are_told() -> None:
    config = Config.create(
        backend=Fake(), rate_limits={"opnai": {"concurrency": 2}, "fake": {"concurrency": 2}}
    )
    (note,) = await connect(config).prepare()
    assert "'opnai' is no backend and no model of this RLM" in note

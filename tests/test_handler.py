"""Facts about the one door: what happens to a model call that goes through it."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from rlm.client import BaseLM, Message, Reply, Request, Usage
from rlm.errors import LimitExceeded, MaxCallsExceeded, ModelError, RLMError, TimeoutExceeded
from rlm.events import AnyEvent, EventBus, ModelFailed, ModelReplied, ModelRequested
from rlm.handler import DEFAULT_CONCURRENCY, Caller, LMHandler
from rlm.ledger import Ledger
from rlm.limits import Limits
from rlm_scripted import ScriptedLM

ROOT = Caller("run-1", None, 0, "root")
SUB = Caller("run-2", "run-1", 1, "sub")
HELLO = [Message("user", "hello")]


class Gated(BaseLM):
    """A client whose calls wait until the test lets them go."""

    model_name = "gated"

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.requests: list[Request] = []
        self.in_flight = 0
        self.most_in_flight = 0

    async def complete(self, request: Request) -> Reply:
        self.requests.append(request)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await self.gate.wait()
        finally:
            self.in_flight -= 1
        return Reply(request.messages[-1].content, usage=Usage(2, 3))


def handler_for(client: BaseLM | None, *, concurrency: int = DEFAULT_CONCURRENCY, **limits: Any) -> LMHandler:
    return LMHandler(client, Ledger(Limits(**limits)), EventBus(), concurrency=concurrency)


def events(handler: LMHandler) -> list[AnyEvent]:
    return handler.events.trace.events


async def rest() -> None:
    """Let everything that can run do so."""
    for _ in range(20):
        await asyncio.sleep(0)


# --- one call ----------------------------------------------------------------------------------


async def test_a_call_is_requested_made_settled_and_recorded() -> None:
    reply = Reply("hi", "length", Usage(5, 7, 1, 0.25))
    handler = handler_for(ScriptedLM([reply], model_name="m"))
    assert await handler.complete(HELLO, SUB) == reply
    requested, replied = events(handler)
    assert isinstance(requested, ModelRequested)
    assert isinstance(replied, ModelReplied)
    assert (requested.call, requested.model, requested.messages, requested.prefix) == (1, "m", HELLO, 0)
    assert (replied.call, replied.model, replied.text, replied.finish) == (1, "m", "hi", "length")
    assert replied.usage == Usage(5, 7, 1, 0.25)
    for event in (requested, replied):
        assert (event.run, event.parent, event.depth, event.kind) == ("run-2", "run-1", 1, "sub")
    usage = handler.ledger.usage()
    assert (usage.total_calls, usage.total_input_tokens, usage.total_cost) == (1, 5, 0.25)
    assert handler.ledger.in_flight == 0


async def test_usage_is_booked_on_the_model_that_answered() -> None:
    handler = handler_for(ScriptedLM([Reply("hi", model="m-2026"), Reply("hi")], model_name="m"))
    await handler.complete(HELLO, ROOT)
    await handler.complete(HELLO, ROOT)
    assert set(handler.ledger.usage().model_usage_summaries) == {"m-2026", "m"}


async def test_the_request_is_recorded_before_the_call_is_made() -> None:
    def answer(messages: Sequence[Message]) -> str:
        return ", ".join(type(event).__name__ for event in events(handler))

    handler = handler_for(ScriptedLM(answer))
    assert (await handler.complete(HELLO, ROOT)).text == "ModelRequested"


async def test_of_a_growing_history_only_what_is_new_is_recorded() -> None:
    client = Gated()
    client.gate.set()
    handler = handler_for(client)
    history = [Message("system", "s"), *HELLO]
    await handler.complete(history, ROOT)
    history += [Message("assistant", "a"), Message("user", "b")]
    await handler.complete(history, ROOT, prefix=2)
    requested = [event for event in events(handler) if isinstance(event, ModelRequested)]
    assert [(event.prefix, event.messages) for event in requested] == [(0, history[:2]), (2, history[2:])]
    assert client.requests[1].messages == tuple(history)


async def test_a_history_that_grows_later_does_not_change_what_was_asked() -> None:
    client = Gated()
    handler = handler_for(client)
    history = list(HELLO)
    task = asyncio.create_task(handler.complete(history, ROOT))
    await rest()
    history.append(Message("user", "later"))
    client.gate.set()
    await task
    assert client.requests[0].messages == tuple(HELLO)
    assert [e.messages for e in events(handler) if isinstance(e, ModelRequested)] == [HELLO]


# --- models ------------------------------------------------------------------------------------


async def test_a_model_may_be_asked_for_by_its_name() -> None:
    handler = handler_for(ScriptedLM(["ok"], model_name="m"))
    assert (await handler.complete(HELLO, SUB, model="m")).text == "ok"


async def test_a_model_that_is_not_offered_is_an_error_that_teaches() -> None:
    handler = handler_for(ScriptedLM(["ok"], model_name="m"))
    with pytest.raises(ModelError) as caught:
        await handler.complete(HELLO, SUB, model="Summarize this: it was a dark night")
    message = str(caught.value)
    assert "no model 'Summarize this: it was a dark night'" in message
    assert "it offers 'm'" in message
    assert "text belongs in the prompt" in message
    assert (handler.ledger.calls, events(handler)) == (0, [])


async def test_without_a_client_there_is_no_model() -> None:
    handler = handler_for(None)
    with pytest.raises(ModelError, match="opened without one"):
        await handler.complete(HELLO, SUB)
    assert handler.ledger.calls == 0


# --- limits ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("calls", "allowed"), [(10, 3), (3, 3), (2, 3), (100, 1)])
async def test_of_concurrent_calls_exactly_as_many_go_out_as_are_allowed(calls: int, allowed: int) -> None:
    client = Gated()
    handler = handler_for(client, max_calls=allowed)
    tasks = [asyncio.create_task(handler.complete(HELLO, SUB)) for _ in range(calls)]
    await rest()
    client.gate.set()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    made = min(calls, allowed)
    assert len(client.requests) == made
    assert sum(isinstance(outcome, Reply) for outcome in outcomes) == made
    assert sum(isinstance(outcome, MaxCallsExceeded) for outcome in outcomes) == calls - made
    assert handler.ledger.calls == handler.ledger.usage().total_calls == made
    assert len(events(handler)) == 2 * made


async def test_the_limit_holds_also_for_calls_that_wait_for_their_turn() -> None:
    client = Gated()
    client.gate.set()
    handler = handler_for(client, concurrency=1, max_calls=2)
    outcomes = await asyncio.gather(*(handler.complete(HELLO, SUB) for _ in range(5)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [Reply] * 2 + [MaxCallsExceeded] * 3
    assert len(client.requests) == 2


async def test_no_call_goes_out_when_time_is_up() -> None:
    client = Gated()
    handler = handler_for(client, max_timeout=1e-9)
    with pytest.raises(TimeoutExceeded):
        await handler.complete(HELLO, ROOT)
    assert (client.requests, handler.ledger.in_flight) == ([], 0)


@pytest.mark.parametrize("concurrency", [1, 3, 7])
async def test_no_more_calls_are_in_flight_than_the_bound(concurrency: int) -> None:
    client = Gated()
    handler = handler_for(client, concurrency=concurrency)
    tasks = [asyncio.create_task(handler.complete(HELLO, SUB)) for _ in range(20)]
    await rest()
    assert client.in_flight == concurrency
    client.gate.set()
    await asyncio.gather(*tasks)
    assert client.most_in_flight == concurrency
    assert len(client.requests) == 20


# --- failures ----------------------------------------------------------------------------------


def numbers(handler: LMHandler) -> tuple[int, int, int]:
    return handler.ledger.calls, handler.ledger.in_flight, handler.ledger.usage().total_calls


@pytest.mark.parametrize(
    "error", [OSError("no route"), ValueError("odd"), KeyError("choices"), TimeoutError()]
)
async def test_whatever_a_client_raises_arrives_as_a_model_error_with_its_cause(error: Exception) -> None:
    handler = handler_for(ScriptedLM([error]))
    with pytest.raises(ModelError, match=f"the model call failed: {type(error).__name__}") as caught:
        await handler.complete(HELLO, ROOT)
    assert caught.value.__cause__ is error
    assert numbers(handler) == (1, 0, 1)
    assert [type(event) for event in events(handler)] == [ModelRequested, ModelFailed]


async def test_a_clients_own_model_error_is_passed_on_as_it_is() -> None:
    error = ModelError("overloaded")
    handler = handler_for(ScriptedLM([error]))
    with pytest.raises(ModelError) as caught:
        await handler.complete(HELLO, ROOT)
    assert caught.value is error
    assert numbers(handler) == (1, 0, 1)
    failed = events(handler)[-1]
    assert isinstance(failed, ModelFailed)
    assert failed.error == "ModelError: overloaded"


async def test_a_failed_call_stays_counted_against_the_limit() -> None:
    handler = handler_for(ScriptedLM("ok", fail_calls=[1]), max_calls=1)
    with pytest.raises(ModelError, match="call 1 fails"):
        await handler.complete(HELLO, ROOT)
    with pytest.raises(MaxCallsExceeded):
        await handler.complete(HELLO, ROOT)


async def test_a_failed_call_makes_room_for_the_next() -> None:
    handler = handler_for(ScriptedLM(["a", "b"], fail_calls=[1]), concurrency=1)
    with pytest.raises(ModelError):
        await handler.complete(HELLO, ROOT)
    assert (await handler.complete(HELLO, ROOT)).text == "b"


class Odd(BaseLM):
    """A client that returns what no client should."""

    def __init__(self, reply: Any) -> None:
        self.reply = reply

    async def complete(self, request: Request) -> Reply:
        reply: Reply = self.reply
        return reply


@pytest.mark.parametrize(
    "reply",
    [None, "text", {"text": "x"}, Reply(None), Reply(5), Reply("x", usage=None)],  # type: ignore[arg-type]
    ids=["None", "str", "dict", "text None", "text a number", "no usage"],
)
async def test_a_client_that_returns_no_reply_is_a_model_error_too(reply: Any) -> None:
    handler = handler_for(Odd(reply))
    with pytest.raises(ModelError):
        await handler.complete(HELLO, ROOT)
    assert numbers(handler) == (1, 0, 1)
    assert [type(event) for event in events(handler)] == [ModelRequested, ModelFailed]


async def test_a_cancelled_call_is_settled_and_recorded() -> None:
    client = Gated()
    handler = handler_for(client)
    task = asyncio.create_task(handler.complete(HELLO, ROOT))
    await rest()
    assert numbers(handler) == (1, 1, 0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert numbers(handler) == (1, 0, 1)
    assert client.in_flight == 0
    assert [type(event) for event in events(handler)] == [ModelRequested, ModelFailed]


async def test_a_call_that_is_cancelled_while_it_waits_was_never_made() -> None:
    client = Gated()
    handler = handler_for(client, concurrency=1)
    first, second = (asyncio.create_task(handler.complete(HELLO, ROOT)) for _ in range(2))
    await rest()
    second.cancel()
    await rest()
    client.gate.set()
    await first
    assert (second.cancelled(), numbers(handler), len(client.requests)) == (True, (1, 0, 1), 1)
    assert (await handler.complete(HELLO, ROOT)).text == "hello"


# --- batches -----------------------------------------------------------------------------------


async def test_each_keeps_the_order_of_its_items_whatever_order_they_finish_in() -> None:
    gates = [asyncio.Event() for _ in range(5)]

    async def call(number: int) -> int:
        await gates[number].wait()
        if number:
            gates[number - 1].set()
        return number * 10

    gates[-1].set()
    assert await handler_for(None).each(range(5), call, 5) == [0, 10, 20, 30, 40]


async def test_each_gives_a_failed_item_its_error_and_the_others_their_outcome() -> None:
    error = ModelError("no luck")

    async def call(number: int) -> int:
        if number % 3 == 1:
            raise error
        return number

    assert await handler_for(None).each(range(6), call, 2) == [0, error, 2, 3, error, 5]


async def test_each_marks_what_no_longer_fits_the_limit() -> None:
    handler = handler_for(ScriptedLM(lambda messages: "ok"), max_calls=3)

    async def call(text: str) -> str:
        return (await handler.complete([Message("user", text)], SUB)).text

    outcomes: Sequence[str | RLMError] = await handler.each(["x"] * 5, call, 5)
    assert outcomes[:3] == ["ok"] * 3
    assert all(isinstance(outcome, LimitExceeded) for outcome in outcomes[3:])


@pytest.mark.parametrize("width", [1, 4, 100])
async def test_each_has_no_more_items_going_than_its_width(width: int) -> None:
    going = most = 0

    async def call(number: int) -> int:
        nonlocal going, most
        going += 1
        most = max(most, going)
        await asyncio.sleep(0)
        going -= 1
        return number

    assert await handler_for(None).each(range(50), call, width) == list(range(50))
    assert most == min(width, 50)


async def test_each_of_nothing_is_nothing() -> None:
    async def call(item: object) -> object:
        raise AssertionError(item)

    assert await handler_for(None).each([], call, 5) == []


async def test_cancelling_a_batch_cancels_its_items_and_settles_the_ledger() -> None:
    client = Gated()
    handler = handler_for(client)

    async def call(text: str) -> Reply:
        return await handler.complete([Message("user", text)], SUB)

    task = asyncio.create_task(handler.each(["x"] * 10, call, 4))
    await rest()
    assert client.in_flight == 4
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert client.in_flight == 0
    assert numbers(handler) == (4, 0, 4)

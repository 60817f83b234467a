"""Facts about the cache: what is found in it, what is shared in flight, and what may befall its file."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rlm import RLM, cache, jsonl
from rlm.backends import Backends
from rlm.cache import Cache, key_of, settings_key
from rlm.client import BaseLM, Message, Reply, Request, Usage
from rlm.config import Config
from rlm.errors import BadRequest, ConfigError, MaxCallsExceeded, ModelError, RLMError
from rlm.events import EventBus, ModelFailed, ModelReplied, ModelRequested
from rlm.gate import Gate, Policy
from rlm.handler import Caller, LMHandler
from rlm.ledger import Ledger
from rlm.limits import Limits
from rlm.recording import Recorded, Recorder
from rlm.secrets import Secret
from rlm_replay import ReplayLM
from rlm_scripted import ScriptedLM

ROOT = Caller("run-1", None, 0, "root")
SUB = Caller("run-1", None, 0, "sub")
HELLO = [Message("user", "hello")]
KEY = b"k" * 32


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache.db"


@pytest.fixture
def kept(path: Path) -> Iterator[Cache]:
    """An open cache."""
    with Cache(path) as opened:
        yield opened


class Waiting(BaseLM):
    """A client whose calls wait until the test ends them."""

    model_name = "waiting"

    def __init__(self) -> None:
        self.calls: list[asyncio.Future[Reply]] = []

    async def complete(self, request: Request) -> Reply:
        call = asyncio.get_running_loop().create_future()
        self.calls.append(call)
        return await call


class Addressed(ScriptedLM):
    """A client that is somewhere."""

    def __init__(self, address: str, reply: str = "x") -> None:
        super().__init__(lambda messages: reply)
        self.address = address

    def pool_key(self, model: str) -> str:
        return self.address


def handler_for(client: BaseLM, kept: Cache | None, policy: Policy | None = None, **limits: Any) -> LMHandler:
    models = Backends([Gate(client, policy=policy or Policy(max_retries=0))], cache=kept)
    return LMHandler(models, Ledger(Limits(**limits)), EventBus())


def counting(finish: Any = "stop") -> ScriptedLM:
    """A client whose replies say which of its calls they are."""
    client = ScriptedLM(lambda messages: Reply(f"reply {client.calls}", finish, Usage(10, 5, cost=2.0)))
    return client


async def rest() -> None:
    """Let everything that can run do so."""
    for _ in range(20):
        await asyncio.sleep(0)


def asked(*texts: str, **fields: Any) -> Request:
    return Request(tuple(Message("user", text) for text in texts or ("hello",)), **fields)


def rows(path: Path) -> list[tuple[bytes, float, bytes]]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return connection.execute("SELECT key, created, reply FROM replies").fetchall()


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# --- hits ----------------------------------------------------------------------------------------


async def test_what_was_asked_before_is_not_asked_again(kept: Cache) -> None:
    client = counting()
    handler = handler_for(client, kept)
    first = await handler.complete(HELLO, SUB)
    second = await handler.complete(HELLO, SUB)
    assert client.calls == 1
    assert (first.text, first.cached, first.usage) == ("reply 1", False, Usage(10, 5, cost=2.0))
    assert (second.text, second.cached, second.usage) == ("reply 1", True, Usage(10, 5, cost=0.0))


async def test_a_root_turn_is_found_as_well(kept: Cache) -> None:
    client = counting()
    for _ in range(2):
        assert (await handler_for(client, kept).complete(HELLO, ROOT)).text == "reply 1"


async def test_everything_of_a_reply_but_the_raw_one_is_found_again(path: Path) -> None:
    reply = Reply("täxt\n\0", "stop", Usage(1, 2, 3, 0.5, 4, 5, True), "m-2026", "id-1", {"raw": 1})
    with Cache(path) as kept:
        kept.put(KEY, reply)
    with Cache(path) as kept:
        found = kept.get(KEY)
    usage = Usage(1, 2, 3, 0.0, 4, 5, True)
    assert found == Reply("täxt\n\0", "stop", usage, "m-2026", "id-1", None, True)


async def test_a_hit_takes_nothing_from_the_budget_and_is_had_when_there_is_none(kept: Cache) -> None:
    client = counting()
    handler = handler_for(client, kept, max_calls=1)
    for _ in range(3):
        await handler.complete(HELLO, SUB)
    assert (handler.ledger.calls, handler.ledger.in_flight, client.calls) == (1, 0, 1)
    assert handler.ledger.budget(1)["calls_made"] == 1
    with pytest.raises(MaxCallsExceeded):
        await handler.complete([Message("user", "something else")], SUB)


async def test_hits_are_counted_beside_all_else(kept: Cache) -> None:
    handler = handler_for(counting(), kept)
    for _ in range(3):
        await handler.complete(HELLO, SUB)
    usage = handler.ledger.usage()
    assert (usage.total_calls, usage.total_cache_hits) == (1, 2)
    assert (usage.total_input_tokens, usage.total_output_tokens, usage.total_cost) == (10, 5, 2.0)


async def test_a_run_of_hits_alone_cost_nothing_as_opposed_to_an_unknown_sum(kept: Cache) -> None:
    client = ScriptedLM(["free of price"])
    before = handler_for(client, kept)
    await before.complete(HELLO, SUB)
    after = handler_for(client, kept)
    await after.complete(HELLO, SUB)
    assert (before.ledger.usage().total_cost, after.ledger.usage().total_cost) == (None, 0.0)


async def test_a_hit_is_requested_and_replied_under_a_number_of_its_own(kept: Cache) -> None:
    handler = handler_for(counting(), kept)
    for text in ("a", "a", "b"):
        await handler.complete([Message("user", text)], SUB)
    requested = [e for e in handler.events.trace if isinstance(e, ModelRequested)]
    replied = [e for e in handler.events.trace if isinstance(e, ModelReplied)]
    assert len(handler.events.trace) == 6
    assert [(e.call, e.messages[0].content) for e in requested] == [(1, "a"), (2, "a"), (3, "b")]
    assert [(e.call, e.text, e.cached) for e in replied] == [
        (1, "reply 1", False), (2, "reply 1", True), (3, "reply 2", False),
    ]  # fmt: skip
    assert replied[1].usage == Usage(10, 5, cost=0.0)


async def test_without_a_cache_nothing_is_shared_nor_marked() -> None:
    client = counting()
    handler = handler_for(client, None)
    replies = await asyncio.gather(*(handler.complete(HELLO, SUB) for _ in range(3)))
    assert (client.calls, [reply.cached for reply in replies]) == (3, [False] * 3)


async def test_hits_leave_the_loop_to_others(kept: Cache) -> None:
    handler = handler_for(counting(), kept)
    await handler.complete(HELLO, SUB)
    ran = []
    asyncio.get_running_loop().call_soon(ran.append, True)
    await handler.complete(HELLO, SUB)
    assert ran == [True]


async def test_hits_by_the_hundred_leave_the_loop_to_others_in_between(kept: Cache) -> None:
    handler = handler_for(counting(), kept)
    await handler.complete(HELLO, SUB)
    tasks = [asyncio.create_task(handler.complete(HELLO, SUB)) for _ in range(10 * cache.HITS_AT_A_TIME)]
    rounds = 0
    while not all(task.done() for task in tasks):
        before = handler.ledger.hits
        await asyncio.sleep(0)
        rounds += 1
        assert handler.ledger.hits - before <= cache.HITS_AT_A_TIME
    assert rounds >= 10


# --- misses --------------------------------------------------------------------------------------

BASE = asked("hello", max_tokens=5, temperature=0.5, stop=("x",), seed=1, schema={"a": 1}, extra={"b": 1})


@pytest.mark.parametrize(
    "other",
    [
        {"messages": (Message("user", "Hello"),)},
        {"messages": (Message("assistant", "hello"),)},
        {"messages": (Message("system", "s"), Message("user", "hello"))},
        {"model": "other"},
        {"max_tokens": 6},
        {"temperature": 0.6},
        {"stop": ("y",)},
        {"seed": 2},
        {"schema": {"a": 2}},
        {"extra": {"b": 2}},
        {"extra": None},
    ],
    ids=str,
)
def test_whatever_decides_a_reply_is_in_its_key(other: dict[str, Any]) -> None:
    gate = Gate(ScriptedLM("x"))
    assert key_of(gate, BASE) != key_of(gate, msgspec.structs.replace(BASE, **other))


@pytest.mark.parametrize("other", [{"timeout": 1.0}, {"session": "s"}, {"cache": True}], ids=str)
def test_what_decides_no_reply_is_not(other: dict[str, Any]) -> None:
    gate = Gate(ScriptedLM("x"))
    assert key_of(gate, BASE) == key_of(gate, msgspec.structs.replace(BASE, **other))


def test_backends_addresses_and_settings_with_a_model_of_one_name_do_not_share() -> None:
    gates = [
        Gate(ScriptedLM("x")),
        Gate(ScriptedLM("x", model_name="other")),
        Gate(ScriptedLM("x"), "name"),
        Gate(ScriptedLM("x"), identity="settings"),
        Gate(Addressed("http://a")),
        Gate(Addressed("http://b")),
    ]
    assert len({key_of(gate, asked()) for gate in gates}) == len(gates)


def test_no_secret_decides_what_is_found() -> None:
    gate = Gate(ScriptedLM("x"))
    keys = {key_of(gate, asked(extra={"api_key": secret})) for secret in ("sk-1234567", "sk-7654321")}
    assert len(keys) == 1
    assert settings_key({"api_key": "sk-1"}) == settings_key({"api_key": Secret("sk-2")})


def test_settings_of_a_client_tell_it_from_others() -> None:
    made = [{}, {"api": "chat"}, {"api": "responses"}, {"path": Path("a")}, {"path": Path("b")}]
    assert len({settings_key(settings) for settings in made}) == len(made)


def test_settings_that_hold_themselves_are_a_config_error() -> None:
    settings: dict[str, Any] = {}
    settings["again"] = settings
    with pytest.raises(ConfigError, match="cache= needs settings"):
        settings_key(settings)


async def test_what_cannot_be_named_is_asked_each_time(kept: Cache) -> None:
    endless: dict[str, Any] = {}
    endless["again"] = endless
    client = counting()
    models = Backends([Gate(client)], cache=kept, sampling={"odd": endless})
    handler = LMHandler(models, Ledger(Limits()), EventBus())
    assert [(await handler.complete(HELLO, ROOT)).text for _ in range(2)] == ["reply 1", "reply 2"]


@pytest.mark.parametrize("finish", ["length", "filter", "other"])
async def test_a_reply_that_is_not_complete_is_not_kept(kept: Cache, finish: str) -> None:
    handler = handler_for(counting(finish), kept)
    assert [(await handler.complete(HELLO, SUB)).text for _ in range(2)] == ["reply 1", "reply 2"]


async def test_a_failure_is_not_kept(kept: Cache) -> None:
    handler = handler_for(ScriptedLM(lambda messages: "ok", fail_calls=[1]), kept)
    with pytest.raises(ModelError):
        await handler.complete(HELLO, SUB)
    assert (await handler.complete(HELLO, SUB)).text == "ok"


async def test_a_reply_that_no_file_can_hold_is_asked_for_each_time(kept: Cache) -> None:
    client = ScriptedLM(lambda messages: Reply(f"\ud800 {client.calls}"))
    handler = handler_for(client, kept)
    assert [(await handler.complete(HELLO, SUB)).text for _ in range(2)] == ["\ud800 1", "\ud800 2"]


# --- in flight -----------------------------------------------------------------------------------


async def test_identical_calls_in_flight_are_made_once(kept: Cache) -> None:
    client = Waiting()
    handler = handler_for(client, kept, max_calls=1)
    tasks = [asyncio.create_task(handler.complete(HELLO, SUB)) for _ in range(100)]
    await rest()
    assert (len(client.calls), handler.ledger.in_flight) == (1, 1)
    client.calls[0].set_result(Reply("shared", usage=Usage(1, 2, cost=3.0)))
    replies = await asyncio.gather(*tasks)
    assert {reply.text for reply in replies} == {"shared"}
    assert [reply.cached for reply in replies] == [False] + [True] * 99
    usage = handler.ledger.usage()
    assert (usage.total_calls, usage.total_cache_hits, usage.total_cost) == (1, 99, 3.0)
    calls = [e.call for e in handler.events.trace if isinstance(e, ModelReplied)]
    assert sorted(calls) == list(range(1, 101))


async def test_a_reply_that_is_not_kept_is_shared_all_the_same(kept: Cache) -> None:
    client = Waiting()
    handler = handler_for(client, kept)
    tasks = [asyncio.create_task(handler.complete(HELLO, SUB)) for _ in range(3)]
    await rest()
    client.calls[0].set_result(Reply("cut o", "length"))
    assert [(r.text, r.finish) for r in await asyncio.gather(*tasks)] == [("cut o", "length")] * 3
    assert kept.get(key_of(handler.models.gates[0], asked()) or b"") is None


async def test_different_calls_in_flight_are_all_made(kept: Cache) -> None:
    client = Waiting()
    handler = handler_for(client, kept)
    tasks = [asyncio.create_task(handler.complete([Message("user", str(i))], SUB)) for i in range(5)]
    await rest()
    assert len(client.calls) == 5
    for number, call in enumerate(client.calls):
        call.set_result(Reply(str(number)))
    assert [reply.text for reply in await asyncio.gather(*tasks)] == list("01234")


async def test_a_shared_call_that_fails_has_failed_for_everybody_with_an_error_each(kept: Cache) -> None:
    client = Waiting()
    handler = handler_for(client, kept)
    tasks = [asyncio.create_task(handler.complete(HELLO, SUB)) for _ in range(5)]
    await rest()
    cause = OSError("no route")
    error = BadRequest("too long", status=400, code="long")
    error.__cause__ = cause
    client.calls[0].set_exception(error)
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert len({id(outcome) for outcome in outcomes}) == 5
    for outcome in outcomes:
        assert isinstance(outcome, BadRequest)
        assert (str(outcome), outcome.status, outcome.code, outcome.__cause__) == (
            "too long", 400, "long", cause,
        )  # fmt: skip
    assert len(client.calls) == 1
    assert [type(event) for event in handler.events.trace] == [ModelRequested, ModelFailed]
    assert handler.ledger.usage().total_cache_hits == 0


async def test_an_error_that_cannot_be_copied_reaches_everybody_too(kept: Cache) -> None:
    class Odd(RLMError):
        def __init__(self, one: str, two: str) -> None:
            super().__init__(one + two)

    client = Waiting()
    handler = handler_for(client, kept)
    tasks = [asyncio.create_task(handler.complete(HELLO, SUB)) for _ in range(2)]
    await rest()
    client.calls[0].set_exception(Odd("a", "b"))
    first, second = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(first, Odd)
    assert isinstance(second, ModelError)
    assert str(second) == "the same call failed: Odd: ab"


async def test_after_a_shared_failure_the_next_call_is_made(kept: Cache) -> None:
    client = Waiting()
    handler = handler_for(client, kept)
    task = asyncio.create_task(handler.complete(HELLO, SUB))
    await rest()
    client.calls[0].set_exception(ModelError("no"))
    with pytest.raises(ModelError):
        await task
    task = asyncio.create_task(handler.complete(HELLO, SUB))
    await rest()
    client.calls[1].set_result(Reply("yes"))
    assert (await task).text == "yes"


async def test_when_the_caller_that_makes_a_call_is_cancelled_another_one_makes_it(kept: Cache) -> None:
    client = Waiting()
    handler = handler_for(client, kept)
    tasks = [asyncio.create_task(handler.complete(HELLO, SUB)) for _ in range(4)]
    await rest()
    tasks[0].cancel()
    await rest()
    assert (tasks[0].cancelled(), len(client.calls), client.calls[0].cancelled()) == (True, 2, True)
    assert not any(task.done() for task in tasks[1:])
    client.calls[1].set_result(Reply("later"))
    replies = await asyncio.gather(*tasks[1:])
    assert [(reply.text, reply.cached) for reply in replies] == [("later", n > 0) for n in range(3)]
    assert (handler.ledger.calls, handler.ledger.in_flight) == (2, 0)


async def test_a_caller_that_waits_can_be_cancelled_without_a_change_for_the_others(kept: Cache) -> None:
    client = Waiting()
    handler = handler_for(client, kept)
    tasks = [asyncio.create_task(handler.complete(HELLO, SUB)) for _ in range(3)]
    await rest()
    tasks[1].cancel()
    await rest()
    assert [task.done() for task in tasks] == [False, True, False]
    client.calls[0].set_result(Reply("x"))
    assert [(await task).text for task in (tasks[0], tasks[2])] == ["x", "x"]
    assert (len(client.calls), handler.ledger.usage().total_cache_hits) == (1, 1)


async def test_when_all_are_cancelled_nothing_is_left_behind(kept: Cache) -> None:
    client = Waiting()
    handler = handler_for(client, kept)
    tasks = [asyncio.create_task(handler.complete(HELLO, SUB)) for _ in range(10)]
    await rest()
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert all(task.cancelled() for task in tasks)
    assert (handler.ledger.in_flight, all(call.cancelled() for call in client.calls)) == (0, True)
    task = asyncio.create_task(handler.complete(HELLO, SUB))
    await rest()
    client.calls[-1].set_result(Reply("again"))
    assert (await task).text == "again"


async def test_a_call_too_many_is_refused_to_everybody_who_waits_for_it(kept: Cache) -> None:
    client = ScriptedLM(lambda messages: "x")
    handler = handler_for(client, kept, max_calls=1)
    await handler.complete(HELLO, SUB)
    other = [Message("user", "other")]
    outcomes = await asyncio.gather(*(handler.complete(other, SUB) for _ in range(3)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [MaxCallsExceeded] * 3


# --- a whole RLM ---------------------------------------------------------------------------------

BATCH = "```repl\nFINAL(llm_query_batched(['same'] * 100))\n```"


def answering(path: Path, **settings: Any) -> tuple[list[str], Any]:
    """What one RLM over two scripts says, and the completion."""
    sub = ScriptedLM(lambda messages: f"sub {sub.calls}", model_name="sub")
    root = ScriptedLM(lambda messages: BATCH, model_name="root")
    with RLM(backend=root, sub_backend=sub, environment="local", cache=path, **settings) as rlm:
        result = rlm.completion("a context", root_prompt="?")
    return [f"{root.calls} {sub.calls}", *set(result.value)], result


def test_a_hundred_identical_prompts_of_a_cell_are_one_call(path: Path) -> None:
    found, result = answering(path)
    assert found == ["1 1", "sub 1"]
    assert (result.usage_summary.total_calls, result.usage_summary.total_cache_hits) == (2, 99)


def test_another_rlm_finds_everything_and_calls_nobody(path: Path) -> None:
    answering(path)
    found, result = answering(path, max_calls=1)
    assert found == ["0 0", "sub 1"]
    usage = result.usage_summary
    assert (usage.total_calls, usage.total_cache_hits, usage.total_input_tokens) == (0, 101, 0)
    assert usage.total_cost == 0.0


def test_a_run_that_was_found_can_be_recorded_and_replayed(path: Path, tmp_path: Path) -> None:
    answering(path)
    recording = tmp_path / "calls.jsonl"
    found, _ = answering(path, record=recording)
    assert found == ["0 0", "sub 1"]
    with RLM(backend=ReplayLM(recording), environment="local") as rlm:
        again = rlm.completion("a context", root_prompt="?")
    assert again.value == ["sub 1"] * 100
    assert (again.usage_summary.total_calls, again.usage_summary.total_cache_hits) == (101, 0)
    assert not any(e.cached for e in again.trace if isinstance(e, ModelReplied))


async def test_what_is_found_is_recorded_as_found(kept: Cache, tmp_path: Path) -> None:
    with Recorder(tmp_path / "r.jsonl") as recorder:
        handler = handler_for(recorder.record(counting()), kept)
        for _ in range(2):
            await handler.complete(HELLO, SUB)
    lines = [line for _, line in jsonl.read(tmp_path / "r.jsonl", msgspec.json.Decoder(Recorded))]
    assert [(line.reply.text, line.reply.cached, line.reply.usage.cost) for line in lines] == [
        ("reply 1", False, 2.0), ("reply 1", True, 0.0),
    ]  # fmt: skip


def test_two_functions_of_one_name_do_not_answer_for_each_other(path: Path) -> None:
    ask = "```repl\nFINAL([llm_query('q', model='<lambda>'), llm_query('q', model='<lambda>/<lambda>')])\n```"
    for _ in range(2):
        with RLM(
            backend=ScriptedLM(lambda messages: ask),
            other_backends=[lambda request: "one", lambda request: "two"],
            environment="local",
            cache=path,
        ) as rlm:
            assert rlm.completion("c").value == ["one", "two"]


def test_clients_that_are_made_with_other_settings_do_not_share(path: Path) -> None:
    def response(script: list[str]) -> str:
        settings = {"script": script}
        with RLM(backend="scripted", backend_kwargs=settings, max_depth=0, cache=path) as rlm:
            return rlm.completion("c").response

    assert [response([text]) for text in ("a", "b", "a")] == ["a", "b", "a"]
    assert len(rows(path)) == 2


def test_a_config_may_name_the_file_as_text() -> None:
    assert Config.create(cache="some/file").cache == Path("some/file")


def test_an_rlm_that_cannot_be_made_leaves_no_file_open(path: Path) -> None:
    with RLM(backend="no such client", cache=path) as rlm, pytest.raises(RLMError):
        rlm.completion("c")
    assert not [link for link in _open_files() if link.startswith(str(path))]


async def test_a_client_that_fails_to_close_does_not_keep_the_file_open(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Stuck(ScriptedLM):
        async def aclose(self) -> None:
            raise OSError("stuck")

    kept = Cache(path)
    kept.put(KEY, Reply("x"))
    await Backends([Gate(Stuck())], cache=kept).aclose()
    assert "a client could not be closed: OSError('stuck')" in caplog.text
    assert len(rows(path)) == 1
    assert not [link for link in _open_files() if link.startswith(str(path))]


def _open_files() -> list[str]:
    links = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            links.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return links


# --- the file ------------------------------------------------------------------------------------


def test_the_file_and_those_beside_it_are_their_owners_alone(path: Path) -> None:
    previous = os.umask(0)
    try:
        with Cache(path) as kept:
            kept.put(KEY, Reply("x"))
            files = [*path.parent.iterdir()]
    finally:
        os.umask(previous)
    assert path in files
    assert {stat.S_IMODE(file.stat().st_mode) for file in files if file.exists()} == {0o600}


def test_nothing_that_was_put_is_lost_by_closing(path: Path) -> None:
    with Cache(path) as kept:
        for number in range(2000):
            kept.put(number.to_bytes(32, "big"), Reply(str(number)))
    assert len(rows(path)) == 2000


async def test_nothing_that_was_put_is_lost_by_closing_on_the_loop(path: Path) -> None:
    kept = Cache(path)
    for number in range(700):
        kept.put(number.to_bytes(32, "big"), Reply(str(number)))
    await kept.aclose()
    await kept.aclose()
    kept.close()
    assert len(rows(path)) == 700


def test_a_reply_is_on_file_within_the_interval(kept: Cache, path: Path) -> None:
    kept.put(KEY, Reply("x"))
    _soon(lambda: len(rows(path)) == 1)
    assert time.time() - rows(path)[0][1] < 60


def _soon(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_closed_cache_finds_and_keeps_nothing(path: Path) -> None:
    kept = Cache(path)
    kept.put(KEY, Reply("x"))
    kept.close()
    kept.put(b"other", Reply("y"))
    assert kept.get(KEY) is None
    assert len(rows(path)) == 1


def test_a_cache_that_only_answers_starts_no_thread(path: Path) -> None:
    with Cache(path) as kept:
        kept.put(KEY, Reply("x"))
    with Cache(path) as kept:
        assert kept.get(KEY) is not None
        assert "rlm-cache" not in [thread.name for thread in threading.enumerate()]


def test_the_later_of_two_replies_stays(path: Path) -> None:
    for text in ("first", "second"):
        with Cache(path) as kept:
            kept.put(KEY, Reply(text))
    assert len(rows(path)) == 1
    assert b"second" in rows(path)[0][2]


@pytest.mark.parametrize("value", [b"{", b'{"text": 5}', b"", "text", 5], ids=repr)
def test_a_row_that_somebody_has_changed_is_not_found_and_replaced(path: Path, value: Any) -> None:
    with Cache(path) as kept:
        kept.put(KEY, Reply("x"))
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE replies SET reply = ?", (value,))
    with Cache(path) as kept:
        assert kept.get(KEY) is None
        kept.put(KEY, Reply("y"))
    with Cache(path) as kept:
        reply = kept.get(KEY)
        assert reply is not None
        assert reply.text == "y"


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_fork_leaves_its_parents_cache_alone(kept: Cache, path: Path) -> None:
    kept.put(KEY, Reply("x"))
    _soon(lambda: len(rows(path)) == 1)
    child = os.fork()
    if child == 0:  # no assertion may leave this branch: it would run the parent's tests
        kept.put(b"other", Reply("y"))
        found = kept.get(KEY)
        kept.close()
        os._exit(0 if found is None else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert kept.get(KEY) is not None


# --- processes -----------------------------------------------------------------------------------

WRITER = """
import sys, time
from rlm.cache import Cache
from rlm.client import Reply
path, first, count, pause = sys.argv[1], *map(int, sys.argv[2:5])
kept = Cache(path)
print("open", flush=True)
for number in range(first, first + count):
    kept.put(number.to_bytes(32, "big"), Reply(f"reply {number}"))
    if pause:
        time.sleep(0.001)
kept.close()
"""


def writer(path: Path, first: int, count: int, pause: bool = False) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), str(first), str(count), str(int(pause))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_share_a_file_from_its_making_on(path: Path) -> None:
    processes = [writer(path, number * 1000, 1000, pause=True) for number in range(4)]
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (0, "open\n", "")
    assert len(rows(path)) == 4000
    with Cache(path) as kept:
        reply = kept.get((3999).to_bytes(32, "big"))
    assert reply is not None
    assert reply.text == "reply 3999"


def test_what_another_process_has_kept_is_found_without_opening_the_file_again(
    kept: Cache, path: Path
) -> None:
    assert kept.get((5).to_bytes(32, "big")) is None
    process = writer(path, 0, 10)
    assert process.communicate(timeout=60)[1] == ""
    assert kept.get((5).to_bytes(32, "big")) is not None


def test_a_process_that_is_killed_while_it_writes_loses_the_last_moment_at_most(path: Path) -> None:
    process = writer(path, 0, 100_000, pause=True)
    assert process.stdout is not None
    process.stdout.readline()
    _soon(lambda: len(rows(path)) > 500)
    killed = time.time()
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    numbers = sorted(int.from_bytes(key, "big") for key, _, _ in rows(path))
    assert numbers == list(range(len(numbers)))
    assert killed - max(created for _, created, _ in rows(path)) < cache.INTERVAL + 5
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    with Cache(path) as kept:
        assert kept.get((0).to_bytes(32, "big")) is not None
        kept.put(KEY, Reply("x"))
    assert len(rows(path)) == len(numbers) + 1


# --- what may befall it --------------------------------------------------------------------------


def test_a_file_that_is_no_database_is_a_config_error_that_says_what_to_do(path: Path) -> None:
    path.write_text("these are my notes, and not for anybody to overwrite\n" * 100)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"of no use: it is no SQLite database .* another path"):
        Cache(path)
    assert path.read_bytes() == before


def test_such_a_file_ends_a_completion_before_it_begins(path: Path) -> None:
    path.write_text("notes\n" * 1000)
    client = counting()
    with RLM(backend=client, cache=path, max_depth=0) as rlm, pytest.raises(ConfigError):
        rlm.completion("c")
    assert client.calls == 0


def test_a_database_of_something_else_is_a_config_error_and_stays_as_it_is(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE invoices (amount)")
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="a database of something else: give cache= another path"):
        Cache(path)
    assert path.read_bytes() == before


def test_a_file_of_a_newer_release_is_a_config_error(path: Path) -> None:
    Cache(path).close()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {cache.VERSION + 1}")
    with pytest.raises(ConfigError, match="made by a newer release: its tables are of version 2"):
        Cache(path)


def test_a_path_where_no_file_can_be_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be made: No such file or directory"):
        Cache(tmp_path / "none" / "cache.db")
    with pytest.raises(ConfigError, match="it cannot be opened"):
        Cache(tmp_path)


def test_an_empty_file_becomes_a_cache(path: Path) -> None:
    path.touch()
    with Cache(path) as kept:
        kept.put(KEY, Reply("x"))
    assert len(rows(path)) == 1


@pytest.mark.parametrize("name", ["a b?c=d#e%41&", "täxt", os.fsdecode(b"\xff")], ids=ascii)
def test_the_file_may_have_any_name(tmp_path: Path, name: str) -> None:
    with Cache(tmp_path / name) as kept:
        kept.put(KEY, Reply("x"))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with Cache(tmp_path / name) as kept:
        assert kept.get(KEY) is not None


def test_a_file_that_is_deleted_meanwhile_is_not_made_again_for_everybody_to_read(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Cache(path) as kept:
        for file in path.parent.iterdir():
            file.unlink()
        kept.put(KEY, Reply("x"))
        _soon(lambda: bool(warnings_in(caplog)))
    assert warnings_in(caplog) == [f"the cache {path} is not written any more: unable to open database file"]
    assert not path.exists()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Somebody else writes, and does not stop."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        yield


async def test_a_file_that_is_locked_at_the_start_costs_the_cache_and_one_warning(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with locked(path), Cache(path) as kept:
        client = counting()
        handler = handler_for(client, kept)
        assert [(await handler.complete(HELLO, SUB)).text for _ in range(2)] == ["reply 1", "reply 2"]
    assert warnings_in(caplog) == [f"the cache {path} is not used: database is locked"]


def test_a_file_that_is_locked_later_costs_what_would_be_written_and_one_warning(
    path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "WRITING_PATIENCE", 0.1)
    with Cache(path) as kept:
        kept.put(KEY, Reply("x"))
    with Cache(path) as kept, locked(path):
        for number in range(3):
            kept.put(bytes([number]), Reply("y"))
        _soon(lambda: bool(warnings_in(caplog)))
        kept.put(b"later", Reply("z"))
        assert kept.get(KEY) is not None
    assert warnings_in(caplog) == [f"the cache {path} is not written any more: database is locked"]
    assert len(rows(path)) == 1


def corrupt(path: Path) -> None:
    """Overwrite all pages but the first."""
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xa5" * (len(content) - 4096)
    path.write_bytes(content)


async def test_a_file_that_is_broken_costs_the_cache_and_one_warning(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Cache(path) as kept:
        for number in range(1000):
            kept.put(number.to_bytes(32, "big"), Reply("x" * 100))
    corrupt(path)
    with Cache(path) as kept:
        handler = handler_for(counting(), kept)
        assert [(await handler.complete(HELLO, SUB)).text for _ in range(2)] == ["reply 1", "reply 2"]
    (warning,) = warnings_in(caplog)
    assert warning == f"the cache {path} is not read any more: database disk image is malformed"


async def test_a_cache_that_is_full_goes_on_answering_with_what_it_has(
    path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    connected = cache._connected

    def small(path: Path, patience: float) -> sqlite3.Connection:
        connection = connected(path, patience)
        connection.execute("PRAGMA max_page_count = 20")
        return connection

    monkeypatch.setattr(cache, "_connected", small)
    with Cache(path) as kept:
        kept.put(KEY, Reply("x"))
    with Cache(path) as kept:
        for number in range(100):
            kept.put(number.to_bytes(32, "big"), Reply("y" * 5000))
        _soon(lambda: bool(warnings_in(caplog)))
        assert kept.get(KEY) is not None
    assert warnings_in(caplog) == [f"the cache {path} is not written any more: database or disk is full"]


FULL = """
import resource, signal, sys, logging
from rlm import RLM
logging.basicConfig(format="%(levelname)s %(message)s")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
turn = "```repl\\nFINAL(len(set(llm_query_batched([str(n) for n in range(300)]))))\\n```"
script = {"rules": [("how many", turn)], "script": lambda messages: messages[-1].content + "x" * 1000}
with RLM(backend="scripted", backend_kwargs=script, max_depth=1, cache=sys.argv[1]) as rlm:
    print(rlm.completion("how many", root_prompt="how many").value)
"""


@pytest.mark.parametrize("limit", [4096, 30_000, 60_000])
def test_a_disk_that_is_full_costs_no_run_and_one_warning(path: Path, limit: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path), str(limit)], capture_output=True, text=True, timeout=120
    )
    warned = [line for line in done.stderr.splitlines() if "the cache" in line]
    assert (done.returncode, done.stdout) == (0, "300\n"), done.stderr
    assert len(warned) == 1
    assert warned[0].startswith(f"WARNING the cache {path} is not ")


async def test_a_thread_that_cannot_be_started_costs_what_would_be_written(
    kept: Cache, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        for _ in range(2):
            kept.put(KEY, Reply("x"))
    assert warnings_in(caplog) == [f"the cache {kept.path} is not written any more: can't start new thread"]

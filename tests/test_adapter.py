"""Facts about functions and synchronous clients in the place of a client."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from rlm import RLM, threads
from rlm.adapter import SyncLM
from rlm.client import Message, Reply, Request, Usage
from rlm.config import Config
from rlm.errors import ConfigError, ModelError, RateLimited
from rlm.events import EventBus
from rlm.handler import Caller, LMHandler
from rlm.ledger import Ledger
from rlm.limits import Limits
from rlm.testing import ClientSuite
from rlm.testing.clients import Connect

HELLO = Request((Message("system", "brief"), Message("user", "hello")))
PATIENCE = 30.0


class TestSuite(ClientSuite):
    """What every client promises."""

    @pytest.fixture
    def connect(self) -> Connect:
        return lambda url, key: SyncLM(lambda request: f"re: {request.messages[-1].content}")


async def ask(call: Any, request: Request = HELLO, **settings: Any) -> Reply:
    client = SyncLM(call, **settings)
    try:
        async with asyncio.timeout(PATIENCE):
            return await client.complete(request)
    finally:
        await client.aclose()


def last(request: Request) -> str:
    return request.messages[-1].content


class Old:
    """A client as other libraries have it."""

    model_name = "old-model"

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def completion(self, messages: Any) -> str:
        self.seen.append(messages)
        return "from the old one"


class Later:
    """The same, as a coroutine function."""

    async def completion(self, messages: Any) -> str:
        await asyncio.sleep(0)
        return f"later: {messages[-1]['content']}"


class Called:
    """An object whose call is a coroutine function."""

    async def __call__(self, request: Request) -> str:
        await asyncio.sleep(0)
        return last(request)


async def awaited(request: Request) -> str:
    await asyncio.sleep(0)
    return last(request)


# --- what may be given ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [last, awaited, lambda request: last(request), lambda request: awaited(request), Called(),
     functools.partial(last), functools.partial(awaited)],
    ids=["function", "coroutine function", "lambda", "lambda around a coroutine", "object", "partial",
         "partial of a coroutine function"],
)  # fmt: skip
async def test_whatever_takes_a_request_is_a_client(call: Callable[..., Any]) -> None:
    reply = await ask(call)
    assert reply.text == "hello"
    assert reply.usage == Usage.estimate(HELLO.messages, "hello")


async def test_an_object_with_a_method_completion_gets_dicts() -> None:
    old = Old()
    reply = await ask(old)
    assert (reply.text, reply.model) == ("from the old one", "old-model")
    assert old.seen == [[{"role": "system", "content": "brief"}, {"role": "user", "content": "hello"}]]


async def test_a_method_completion_may_be_a_coroutine_function() -> None:
    assert (await ask(Later())).text == "later: hello"


async def test_a_reply_is_given_as_it_is() -> None:
    made = Reply("cut", "length", Usage(1, 2, 3, 0.5), "other")
    assert await ask(lambda request: made) is made


@pytest.mark.parametrize("call", [None, 5, "gpt-4o", object()])
def test_what_is_no_function_is_refused(call: Any) -> None:
    with pytest.raises(ConfigError, match="neither a function nor has a method completion"):
        SyncLM(call)


@pytest.mark.parametrize(
    ("call", "given", "name"),
    [(last, None, "last"), (Old(), None, "old-model"), (Later(), None, "Later"), (last, "mine", "mine"),
     (functools.partial(last), None, "partial")],
)  # fmt: skip
def test_its_name_is_the_one_given_or_the_one_it_has(call: Any, given: str | None, name: str) -> None:
    assert SyncLM(call, model_name=given).model_name == name


# --- threads --------------------------------------------------------------------------------------


async def test_a_function_runs_in_a_thread_and_a_coroutine_on_the_loop() -> None:
    async def where(request: Request) -> str:
        return threading.current_thread().name

    assert (await ask(lambda request: threading.current_thread().name)).text.startswith("rlm-client")
    assert (await ask(where)).text == threading.current_thread().name


async def test_calls_run_side_by_side() -> None:
    everyone = threading.Barrier(20)

    def meet(request: Request) -> str:
        everyone.wait(PATIENCE)
        return last(request)

    client = SyncLM(meet)
    requests = [Request((Message("user", f"call {number}"),)) for number in range(20)]
    replies = await asyncio.gather(*(client.complete(request) for request in requests))
    assert [reply.text for reply in replies] == [f"call {number}" for number in range(20)]
    await client.aclose()


async def test_no_more_calls_run_than_there_are_threads() -> None:
    lock, going, most = threading.Lock(), 0, 0

    def count(request: Request) -> str:
        nonlocal going, most
        with lock:
            going += 1
            most = max(most, going)
        threading.Event().wait(0.01)
        with lock:
            going -= 1
        return "ok"

    client = SyncLM(count, threads=3)
    await asyncio.gather(*(client.complete(HELLO) for _ in range(12)))
    await client.aclose()
    assert most == 3


async def test_a_call_that_is_cancelled_ends_and_its_reply_is_dropped() -> None:
    begun, over = threading.Event(), threading.Event()

    def slow(request: Request) -> str:
        begun.set()
        over.wait(PATIENCE)
        return "late"

    client = SyncLM(slow)
    task = asyncio.create_task(client.complete(HELLO))
    await asyncio.to_thread(begun.wait, PATIENCE)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    over.set()
    assert (await client.complete(HELLO)).text == "late"
    await client.aclose()


async def test_closing_waits_for_nobody_and_leaves_no_thread() -> None:
    begun, over = threading.Event(), threading.Event()

    def slow(request: Request) -> str:
        begun.set()
        over.wait(PATIENCE)
        return "late"

    client = SyncLM(slow, threads=1)
    running, waiting = (asyncio.create_task(client.complete(HELLO)) for _ in range(2))
    await asyncio.to_thread(begun.wait, PATIENCE)
    await client.aclose()
    await client.aclose()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not running.done()
    over.set()
    assert (await running).text == "late"


async def test_a_call_waits_for_no_thread_unless_told_to() -> None:
    everyone = threading.Barrier(Config().max_concurrent_calls)

    def meet(request: Request) -> str:
        everyone.wait(PATIENCE)
        return "met"

    client = SyncLM(meet)
    replies = await asyncio.gather(*(client.complete(HELLO) for _ in range(everyone.parties)))
    await client.aclose()
    assert {reply.text for reply in replies} == {"met"}


async def test_a_thread_is_used_again_and_ends_when_it_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "IDLE", 0.2)
    used: list[threading.Thread] = []

    def note(request: Request) -> str:
        used.append(threading.current_thread())
        return "ok"

    client = SyncLM(note, threads=1)
    for _ in range(3):
        await client.complete(HELLO)
    first = used[0]
    assert (len(set(used)), first.daemon) == (1, True)
    await asyncio.to_thread(first.join, PATIENCE)
    assert not first.is_alive()
    assert (await client.complete(HELLO)).text == "ok"
    await client.aclose()
    await asyncio.to_thread(used[-1].join, PATIENCE)
    assert not used[-1].is_alive()


async def test_a_closed_client_takes_no_call() -> None:
    client = SyncLM(last)
    await client.aclose()
    with pytest.raises(RuntimeError, match="threads are closed"):
        await client.complete(HELLO)


async def test_without_a_further_thread_those_that_there_are_do(monkeypatch: pytest.MonkeyPatch) -> None:
    client, start = SyncLM(last, threads=2), threading.Thread.start
    begun = 0

    def once(thread: threading.Thread) -> None:
        nonlocal begun
        begun += 1
        if begun != 2:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", once)
    with pytest.raises(RuntimeError, match="can't start"):
        await client.complete(HELLO)
    replies = await asyncio.gather(*(client.complete(HELLO) for _ in range(9)))
    assert [reply.text for reply in replies] == ["hello"] * 9
    await client.aclose()


SLEEPS = """
import time
from rlm import RLM

def slow(request):
    print("begun", flush=True)
    time.sleep(60)

RLM(backend=slow).completion("context")
"""


def test_a_process_ends_at_an_interrupt_also_while_a_function_runs() -> None:
    process = subprocess.Popen([sys.executable, "-c", SLEEPS], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=PATIENCE)
        assert b"KeyboardInterrupt" in said
    finally:
        process.kill()
        process.wait()


# --- what goes wrong ------------------------------------------------------------------------------


class Odd(Exception):
    """A stranger's error."""


@pytest.mark.parametrize("error", [Odd("in the function"), RateLimited("slow down", retry_after=7)])
async def test_what_a_function_raises_is_raised(error: Exception) -> None:
    def fails(request: Request) -> str:
        raise error

    async def fails_later(request: Request) -> str:
        raise error

    for call in (fails, fails_later):
        with pytest.raises(type(error)) as caught:
            await ask(call)
        assert caught.value is error


@pytest.mark.parametrize(
    "error",
    [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError(),
     concurrent.futures.CancelledError()],
    ids=lambda error: f"{type(error).__module__}.{type(error).__name__}",
)  # fmt: skip
async def test_what_would_end_more_than_the_call_is_a_model_error(error: BaseException) -> None:
    def leaves(request: Request) -> str:
        raise error

    with pytest.raises(ModelError, match=f"the function raised {type(error).__name__}"):
        await ask(leaves)


@pytest.mark.parametrize("later", [False, True])
def test_a_function_that_exits_does_not_end_the_loop_of_all_runs(later: bool) -> None:
    def leaves(request: Request) -> str:
        sys.exit(3)

    async def leaves_later(request: Request) -> str:
        sys.exit(3)

    with pytest.raises(ModelError, match="the function raised SystemExit: 3"):
        RLM(backend=leaves_later if later else leaves).completion("context")
    assert RLM(backend=lambda request: "FINAL(on)").completion("context").response == "on"


async def test_a_stop_iteration_is_an_error_and_not_an_endless_wait() -> None:
    script = iter(["only"])
    client = SyncLM(lambda request: next(script))
    assert (await client.complete(HELLO)).text == "only"
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(RuntimeError, match="StopIteration"):
            await client.complete(HELLO)
    await client.aclose()


def handler_for(client: SyncLM) -> LMHandler:
    return LMHandler(client, Ledger(Limits()), EventBus())


@pytest.mark.parametrize(
    "said", [None, 5, b"bytes", ["list"], {"content": "x"}, Reply(5), Reply("x", usage=3)]
)  # type: ignore[arg-type]
async def test_what_is_no_reply_is_a_model_error_at_the_door(said: Any) -> None:
    client = SyncLM(lambda request: said)
    handler = handler_for(client)
    with pytest.raises(ModelError, match=f"the client returned {type(said).__name__} in place of a complete"):
        await handler.complete(HELLO.messages, Caller("run", None, 0, "root"))
    assert handler.ledger.in_flight == 0
    await client.aclose()


async def test_a_strangers_error_is_a_model_error_at_the_door() -> None:
    def fails(request: Request) -> str:
        raise Odd("in the function")

    client = SyncLM(fails)
    with pytest.raises(ModelError, match="Odd: in the function") as caught:
        await handler_for(client).complete(HELLO.messages, Caller("run", None, 0, "root"))
    assert isinstance(caught.value.__cause__, Odd)
    await client.aclose()

"""This project's `rlm_openai`: below a whole run, and below the LMHandler alone."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

from peers.client_probes import (
    DIRECT,
    DIRECT_NARROW,
    FIRST_ROUNDS,
    MAKE_PROMPTS,
    MODEL,
    NARROW,
    NARROW_SHARE,
    REPLY,
    STACK,
    STACK_NARROW,
    WIDTH,
    Moment,
    figures,
    first_code,
    medians,
    named,
    now,
    prompts_of,
    server_of,
    value_names,
)
from peers.common import Options, Probe, Step, Values, main, version_of

from rlm import RLM, BaseLM, Reply, Request
from rlm.backends import connect
from rlm.client import Message
from rlm.config import Config
from rlm.events import AnyEvent, EventBus, ModelReplied
from rlm.handler import Caller, LMHandler
from rlm.ledger import Ledger
from rlm.limits import Limits

IMPORT = "import rlm_openai"
FIRST_IMPORT = "import rlm, rlm_openai"
FIRST_CALL = """
from rlm.client import Message
from rlm.events import EventBus
from rlm.handler import Caller, LMHandler
from rlm.ledger import Ledger
from rlm.limits import Limits
client = rlm_openai.OpenAILM("stub", base_url=url)
handler = LMHandler(client, Ledger(Limits()), EventBus())
await handler.complete([Message("user", "hello")], Caller("run", None, 0, "sub"))
"""
AFTER_AIOHTTP = """
import aiohttp, time
started = time.perf_counter()
import rlm_openai
print((time.perf_counter() - started) * 1e3)
"""
KEPT = f"x = len([reply for reply in out if reply == {REPLY!r}])"


class Script(BaseLM):
    """The root's turns, and when they were asked for and given."""

    model_name = "script"
    simulated = True

    def __init__(self, cells: Sequence[str]) -> None:
        self._replies = iter([*(f"```python\n{cell}\n```" for cell in cells), "FINAL_VAR(x)"])
        self.entered: list[Moment] = []
        self.left: list[Moment] = []

    async def complete(self, request: Request) -> Reply:
        self.entered.append(now())
        reply = Reply(next(self._replies))
        self.left.append(now())
        return reply


def spans_of(events: Sequence[AnyEvent]) -> list[float]:
    """Seconds of the sub-calls, from when they had their place to their reply."""
    return [event.seconds for event in events if isinstance(event, ModelReplied) and event.kind == "sub"]


# --- a whole run ----------------------------------------------------------------------------


def one_run(url: str, calls: int, width: int) -> Values:
    """One batch in one cell, timed from the reply with that cell to the next request."""
    root = Script([MAKE_PROMPTS.format(calls=calls), "out = llm_query_batched(prompts)", KEPT])
    with RLM(
        backend=root,
        sub_backend="openai",
        sub_backend_kwargs={"model_name": MODEL, "base_url": url},
        environment="local",
        max_concurrent_calls=width,
    ) as rlm:
        done = rlm.completion("tiny", "q")
    return figures(root.left[1], root.entered[2], int(done.response), calls, spans_of(done.trace.events))


def stack(prefix: str, width: int, options: Options) -> Values:
    url = server_of(options)
    one_run(url, width, width)  # The fork server, and first-use costs.
    calls = options.prompts // (NARROW_SHARE if width == NARROW else 1)
    return named(prefix, one_run(url, calls, width))


# --- the LMHandler alone --------------------------------------------------------------------


async def drive_handler(url: str, calls: int, width: int) -> Values:
    config = Config.create(backend="openai", backend_kwargs={"model_name": MODEL, "base_url": url})
    backends, events = connect(config), EventBus()
    handler = LMHandler(backends, Ledger(Limits()), events, concurrency=width)
    caller = Caller("bench", None, 0, "sub")

    async def ask(prompt: str) -> str:
        return (await handler.complete([Message("user", prompt)], caller)).text

    await handler.each(prompts_of(width), ask, width)  # Connections, and first-use costs.
    events.trace.events.clear()
    prompts = prompts_of(calls)
    started = now()
    outcomes = await handler.each(prompts, ask, width)
    ended = now()
    await backends.aclose()
    good = sum(outcome == REPLY for outcome in outcomes)
    return figures(started, ended, good, calls, spans_of(events.trace.events))


def direct(prefix: str, width: int, options: Options) -> Values:
    calls = options.prompts // (NARROW_SHARE if width == NARROW else 1)
    return named(prefix, asyncio.run(drive_handler(server_of(options), calls, width)))


# --- the first ------------------------------------------------------------------------------


def first_call(options: Options) -> Values:
    url = server_of(options)
    codes = {
        "first_ms": first_code(FIRST_IMPORT, FIRST_CALL, url),
        "first_after_aiohttp_ms": first_code(f"{FIRST_IMPORT}, aiohttp", FIRST_CALL, url),
        "import_after_aiohttp_ms": AFTER_AIOHTTP,
    }
    return medians(codes, FIRST_ROUNDS, whole=False)


def imports(_options: Options) -> Values:
    return medians({"import_ms": IMPORT, "python_ms": "pass"}, FIRST_ROUNDS, whole=True)


PROBES = {
    "fanout": Probe(
        240,
        (
            Step(partial(stack, STACK, WIDTH), value_names(STACK)),
            Step(partial(stack, STACK_NARROW, NARROW), value_names(STACK_NARROW)),
            Step(partial(direct, DIRECT, WIDTH), value_names(DIRECT)),
            Step(partial(direct, DIRECT_NARROW, NARROW), value_names(DIRECT_NARROW)),
        ),
    ),
    "first": Probe(
        120,
        (
            Step(first_call, ("first_ms", "first_after_aiohttp_ms", "import_after_aiohttp_ms")),
            Step(imports, ("import_ms", "python_ms")),
        ),
    ),
}

if __name__ == "__main__":
    main("ours", version_of("rlm"), PROBES)

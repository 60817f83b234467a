"""The probes of model clients: many calls at once, and the very first, to one server.

A side makes the calls; what is counted, and when the clocks run, is the same for all. The server
(`python -m rlm.testing.model_server`) is a process of its own, named by `--url`.
"""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass
from functools import partial

from peers.common import Options, Probe, Step, UnmeasurableError, Values, main, version_of

MODEL = "stub"
REPLY = " ".join(["word"] * 64)  # About as many tokens.
PROMPT_WORDS = 680  # About 3.4 KB.
WIDTH = 256
NARROW = 64
NARROW_SHARE = 4  # Of the calls and of the time, what the narrow pass gets: one in so many.
FIRST_ROUNDS = 7
MAKE_PROMPTS = f"prompts = ['prompt ' + str(i) + ' word' * {PROMPT_WORDS} for i in range({{calls}})]"

FAN_OUT = ("per_s", "cpu_ms", "p50_ms", "p99_ms", "errors")
STACK, STACK_NARROW, DIRECT, DIRECT_NARROW = "", "c64_", "direct_", "direct_c64_"

#: Makes one call; what it returns is to be `REPLY`.
Ask = Callable[[str], Awaitable[str | None]]


@dataclass(frozen=True)
class Client:
    """One side: how it makes a call, here and in a fresh process."""

    name: str
    distribution: str
    #: Given the server's URL.
    open: Callable[[str], AbstractAsyncContextManager[Ask]]
    import_statement: str
    #: Lines of an `async def` that make the first call; `url` is the server's. May be empty.
    first_call: str
    first_rounds: int = FIRST_ROUNDS


def prompts_of(calls: int) -> list[str]:
    """Different ones, as the cells make them too."""
    return [f"prompt {number}{' word' * PROMPT_WORDS}" for number in range(calls)]


def server_of(options: Options) -> str:
    if not options.url:
        raise UnmeasurableError("no server: give --url, or run compare_clients.py")
    return options.url


# --- many at once ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """What both clocks say. That of the processor leaves children out."""

    wall: float
    cpu: float


def now() -> Moment:
    return Moment(time.perf_counter(), time.process_time())


def figures(started: Moment, ended: Moment, good: int, calls: int, spans: Sequence[float]) -> Values:
    """The values of one pass. `spans` are the seconds of single calls."""
    if not good:
        raise UnmeasurableError(f"all {calls} calls failed")
    cuts = statistics.quantiles(spans, n=100, method="inclusive")
    return {
        "per_s": good / (ended.wall - started.wall),
        "cpu_ms": (ended.cpu - started.cpu) / good * 1e3,
        "p50_ms": cuts[49] * 1e3,
        "p99_ms": cuts[98] * 1e3,
        "errors": calls - good,
    }


def named(prefix: str, values: Values) -> Values:
    return {prefix + name: value for name, value in values.items()}


async def drive(ask: Ask, prompts: Sequence[str], width: int, seconds: float) -> Values:
    """`width` workers over one queue, until it is empty or the time is up."""
    spans: list[float] = []
    good = 0
    queue = iter(prompts)
    started = now()

    async def work() -> None:
        nonlocal good
        for prompt in queue:
            began = time.perf_counter()
            if began - started.wall > seconds:
                return
            reply = None
            with suppress(Exception):  # Of any kind: it is counted.
                reply = await ask(prompt)
            good += reply == REPLY
            spans.append(time.perf_counter() - began)

    await asyncio.gather(*(work() for _ in range(width)))
    return figures(started, now(), good, len(spans), spans)


async def opened(client: Client, options: Options, width: int, calls: int, seconds: float) -> Values:
    async with client.open(server_of(options)) as ask:
        await drive(ask, prompts_of(width), width, seconds)  # Connections, and first-use costs.
        return await drive(ask, prompts_of(calls), width, seconds)


def fan_out(client: Client, prefixes: Sequence[str], width: int, options: Options) -> Values:
    """A pass under each of the names: a bare client has no stack that it could leave out."""
    share = NARROW_SHARE if width == NARROW else 1
    calls, seconds = options.prompts // share, options.seconds / share
    values = asyncio.run(opened(client, options, width, calls, seconds))
    return {name: value for prefix in prefixes for name, value in named(prefix, values).items()}


def value_names(*prefixes: str) -> tuple[str, ...]:
    return tuple(prefix + name for prefix in prefixes for name in FAN_OUT)


# --- the first ------------------------------------------------------------------------------

FIRST = """
import time
{imports}
started = time.perf_counter()
import asyncio
url = {url!r}
async def first():
{call}
    print()
    print((time.perf_counter() - started) * 1e3)
asyncio.run(first())
"""


def fresh(code: str) -> tuple[float, str]:
    """Milliseconds of a fresh interpreter, and the last line it wrote."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],  # -P: the current folder may not offer another package.
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    took = (time.perf_counter() - started) * 1e3
    return took, (done.stdout.splitlines() or [""])[-1]


def medians(codes: dict[str, str], rounds: int, *, whole: bool) -> Values:
    """Of fresh interpreters in turns: all of it, or the milliseconds that it prints."""
    taken: dict[str, list[float]] = {name: [] for name in codes}
    for turn in range(rounds + 1):
        for name, code in codes.items():
            took, printed = fresh(code)
            if turn:  # The first one fills the caches.
                taken[name].append(took if whole else float(printed))
    return {name: statistics.median(each) for name, each in taken.items()}


def first_code(imports: str, call: str, url: str) -> str:
    """A program that prints how many milliseconds its first call took."""
    indented = "\n".join(f"    {line}" for line in call.strip().splitlines())
    return FIRST.format(imports=imports, url=url, call=indented)


def first_call(client: Client, options: Options) -> Values:
    code = first_code(client.import_statement, client.first_call, server_of(options))
    return medians({"first_ms": code}, client.first_rounds, whole=False)


def client_import(client: Client, _options: Options) -> Values:
    return medians({"import_ms": client.import_statement}, client.first_rounds, whole=True)


# --- the command line -----------------------------------------------------------------------


def steps_of(client: Client, *, stack: bool) -> tuple[Step, ...]:
    """Passes of the client alone. With a stack of its own, that is another step's to measure."""
    wide = (DIRECT,) if stack else (STACK, DIRECT)
    narrow = (DIRECT_NARROW,) if stack else (STACK_NARROW, DIRECT_NARROW)
    return (
        Step(partial(fan_out, client, wide, WIDTH), value_names(*wide)),
        Step(partial(fan_out, client, narrow, NARROW), value_names(*narrow)),
    )


def measure_client(client: Client, stack: Sequence[Step] = (), first: Sequence[Step] = ()) -> None:
    """The command line of a side's script, with steps that only it has."""
    steps = (
        Step(partial(first_call, client), ("first_ms",)),
        Step(partial(client_import, client), ("import_ms",)),
    )
    probes = {
        "fanout": Probe(300, (*stack, *steps_of(client, stack=bool(stack)))),
        "first": Probe(300, (*(steps if client.first_call else ()), *first)),
    }
    main(client.name, version_of(client.distribution), probes)

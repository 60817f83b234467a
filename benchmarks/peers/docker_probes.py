"""The probes of `compare_docker.py`: sandboxes in containers, without a loop around them.

A sandbox is opened, given cells and closed, through what a framework offers for that. Every cell
must end without an error. What is asked of the engine goes through its local socket, since the
`docker` command takes longer than some of what is timed here.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote

from peers.common import (
    LOST_IN_NOISE,
    REPLY,
    Options,
    Probe,
    Step,
    StubModel,
    UnmeasurableError,
    Values,
    main,
    median_ms,
    p90_ms,
    pss_mb,
    tree_of,
    version_of,
)
from setup_docker import IMAGE

MB = 1_000_000
TRIVIAL = "x = 1"
PACE_S = 0.02
SUB_LATENCY_S = 0.02
PROMPT_MB = 10
STEP_S = 20.0  # A step repeats what it times until it has enough, or this has passed.
FEWEST = 3  # But never fewer times than this.
STARTERS = 8  # Threads that open sandboxes; more of them at once start none sooner.
POLL_S = 0.002
GONE_S = 30.0
SETTLE_S = 1.0


# --- a side ---------------------------------------------------------------------------------


class Sandbox(ABC):
    """One sandbox of one framework."""

    @abstractmethod
    def execute(self, code: str) -> str:
        """Run a cell and return what it printed. Raises UnmeasurableError if the cell failed."""

    @abstractmethod
    def load(self, text: str) -> None:
        """Put a text into the variable `context`."""

    @abstractmethod
    def close(self) -> None:
        """End it, as a user would."""


class Side(ABC):
    """One framework."""

    name: str
    distribution: str
    #: Probes that only others have figures for, each with the reason and the figures.
    unable: ClassVar[Mapping[str, tuple[str, Sequence[str]]]] = {}

    @abstractmethod
    def open(self, model: StubModel) -> Sandbox:
        """Start a sandbox whose model calls go to the stub."""


@contextlib.contextmanager
def sandbox(side: Side, model: StubModel | None = None) -> Iterator[Sandbox]:
    """A sandbox that has run a cell: all that is done on first use is done."""
    opened = side.open(model or StubModel([]))
    try:
        opened.execute(TRIVIAL)
        yield opened
    finally:
        opened.close()


def repeat(once: Callable[[], float], times: int) -> list[float]:
    """What `once` returns, up to `times` times, or as often as there is time for."""
    end = time.perf_counter() + STEP_S
    taken: list[float] = []
    while len(taken) < min(FEWEST, times) or (len(taken) < times and time.perf_counter() < end):
        taken.append(once())
    return taken


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def expect(printed: str, expected: object) -> None:
    """A cell that went wrong has no speed."""
    if printed.strip() != str(expected):
        raise UnmeasurableError(f"the cell printed {printed!r:.120}, not {str(expected)!r}")


# --- the engine -----------------------------------------------------------------------------


class _Connection(http.client.HTTPConnection):
    def connect(self) -> None:
        address = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
        if not address.startswith("unix://"):
            raise UnmeasurableError(f"the engine is not a local one: {address}")
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(address.removeprefix("unix://"))


class Engine:
    """The few questions that the probes have for it."""

    def __init__(self) -> None:
        self._connection = _Connection("localhost")

    def _ask(self, method: str, path: str) -> Any:
        """The answer's JSON; None where there is no such container."""
        self._connection.request(method, path)
        answer = self._connection.getresponse()
        body = answer.read()
        if answer.status == 404:
            return None
        if answer.status >= 400 and not (method == "DELETE" and answer.status == 409):
            raise UnmeasurableError(f"the engine says {body[:100]!r}")
        return json.loads(body) if body else None

    def containers(self) -> set[str]:
        """The ids of all containers of the benchmark's image, ended ones too."""
        filters = quote(json.dumps({"ancestor": [IMAGE]}))
        found = self._ask("GET", f"/containers/json?all=true&filters={filters}") or []
        return {container["Id"] for container in found}

    def is_running(self, container: str) -> bool | None:
        """None when there is no such container any more."""
        found = self._ask("GET", f"/containers/{container}/json")
        return None if found is None else bool(found["State"]["Running"])

    def remove(self, container: str) -> None:
        self._ask("DELETE", f"/containers/{container}?force=true&v=true")


def wait_gone(engine: Engine, container: str, started: float) -> tuple[float, float]:
    """Seconds from `started` until it does not run any more, and until it is removed."""
    stopped: float | None = None
    while time.perf_counter() < started + GONE_S:
        state = engine.is_running(container)
        now = time.perf_counter() - started
        if stopped is None and not state:
            stopped = now
        if state is None and stopped is not None:
            return stopped, now
        time.sleep(POLL_S)
    raise UnmeasurableError(f"the container was still there {GONE_S:g} s later")


def remove_leftovers() -> None:
    """A side that was ended by force may have left containers."""
    with contextlib.suppress(OSError, UnmeasurableError):
        engine = Engine()
        for container in engine.containers():
            engine.remove(container)


# --- cell -----------------------------------------------------------------------------------


def cells(opened: Sandbox, options: Options, pause: float = 0.0) -> list[float]:
    opened.execute(TRIVIAL)  # The first one after a change pays for the change.

    def once() -> float:
        time.sleep(pause) if pause else None
        return timed(partial(opened.execute, TRIVIAL))

    return repeat(once, options.count(500))


def cell_gap(side: Side, options: Options) -> Values:
    with sandbox(side) as opened:
        taken = cells(opened, options)
        return {"gap_ms": median_ms(taken), "gap_p90_ms": p90_ms(taken)}


def cell_paced(side: Side, options: Options) -> Values:
    with sandbox(side) as opened:
        return {"paced_ms": median_ms(cells(opened, options, PACE_S))}


def cell_big_context(side: Side, options: Options) -> Values:
    with sandbox(side) as opened:
        opened.load("x" * (options.context_mb * MB))
        expect(opened.execute("print(len(context))"), options.context_mb * MB)
        return {"gap_big_context_ms": median_ms(cells(opened, options))}


def cell_many_variables(side: Side, options: Options) -> Values:
    with sandbox(side) as opened:
        opened.execute("\n".join(f"v{number} = {number}" for number in range(options.variables)))
        return {"gap_many_vars_ms": median_ms(cells(opened, options))}


# --- calls of a model -----------------------------------------------------------------------


def calls(side: Side, code: str, expected: int, latency: float = 0.0) -> tuple[StubModel, float]:
    """A cell that leaves replies in `out`; the model, which must have been asked, and the seconds."""
    model = StubModel([], latency)
    with sandbox(side, model) as opened:
        took = timed(partial(opened.execute, code))
        expect(opened.execute(f"print(len([r for r in out if r == {REPLY!r}]))"), expected)
    if len(model.sub.entered) != expected:
        raise UnmeasurableError(f"{len(model.sub.entered)} of {expected} calls reached the model")
    return model, took


def sequential(side: Side, options: Options) -> Values:
    count = options.count(2000)
    model, _ = calls(side, f"out = [llm_query('p' + str(i)) for i in range({count})]", count)
    took = model.sub.entered[-1] - model.sub.entered[0]
    return {"per_s": (count - 1) / took, "p50_us": median_ms(model.sub.gaps()) * 1e3}


def batched(side: Side, options: Options) -> Values:
    count = options.prompts
    code = f"out = llm_query_batched(['p' + str(i) for i in range({count})])"
    model, took = calls(side, code, count, SUB_LATENCY_S)
    return {"seconds": took, "peak_in_flight": model.sub.peak()}


def large_prompt(side: Side, options: Options) -> Values:
    with sandbox(side) as opened:
        opened.execute(f"big = 'x' * {PROMPT_MB * MB}")

        def once() -> float:
            took = timed(partial(opened.execute, "reply = llm_query(big)"))
            expect(opened.execute("print(reply)"), REPLY)
            # A cell alone takes its time too, with a variable of that size above all.
            return took - timed(partial(opened.execute, TRIVIAL))

        return {"prompt_ms": median_ms(repeat(once, options.reps))}


# --- context --------------------------------------------------------------------------------


def context_load(side: Side, options: Options) -> Values:
    text = "x" * (options.context_mb * MB)

    def once() -> float:
        with sandbox(side) as opened:
            started = time.perf_counter()
            opened.load(text)
            printed = opened.execute("print(len(context))")
            took = time.perf_counter() - started
        expect(printed, len(text))
        return took

    return {"context_ms": median_ms(repeat(once, options.reps))}


# --- life and death -------------------------------------------------------------------------


def first_cells(side: Side, times: int) -> tuple[list[float], list[float]]:
    """Seconds from nothing to the result of a first cell, and those that closing takes."""
    closes: list[float] = []

    def once() -> float:
        started = time.perf_counter()
        opened = side.open(StubModel([]))
        opened.execute(TRIVIAL)
        took = time.perf_counter() - started
        closes.append(timed(opened.close))
        wait_until_none(Engine())  # Else the end of one is in the beginning of the next.
        return took

    return repeat(once, times), closes


def wait_until_none(engine: Engine) -> None:
    end = time.perf_counter() + GONE_S
    while engine.containers() and time.perf_counter() < end:
        time.sleep(POLL_S)


def cold_start(side: Side, options: Options) -> Values:
    with sandbox(side):  # Imports and first-use costs.
        pass
    wait_until_none(Engine())
    starts, closes = first_cells(side, options.count(15))
    return {
        "cold_p50_ms": median_ms(starts),
        "cold_p90_ms": p90_ms(starts),
        "close_ms": median_ms(closes),
    }


def busy_death(side: Side, options: Options) -> Values:
    engine = Engine()

    def busy(opened: Sandbox) -> None:
        with contextlib.suppress(Exception):  # However this framework reports its own end.
            opened.execute("while True: pass")

    def once() -> tuple[float, float]:
        before = engine.containers()
        opened = side.open(StubModel([]))
        opened.execute(TRIVIAL)
        container = (engine.containers() - before).pop()
        threading.Thread(target=busy, args=(opened,), daemon=True).start()
        time.sleep(0.3)
        started = time.perf_counter()
        closing = threading.Thread(target=opened.close)
        closing.start()
        ends = wait_gone(engine, container, started)
        closing.join()
        return ends

    stopped, removed = zip(*(once() for _ in range(max(options.reps, 2))), strict=True)
    return {"stopped_ms": median_ms(stopped), "removed_ms": median_ms(removed)}


# --- many -----------------------------------------------------------------------------------


def available_mb() -> float:
    """What the kernel thinks it could still give away."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError as error:
        raise UnmeasurableError("this system does not tell how much memory is available") from error
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) / 1024


def shims(containers: set[str]) -> set[int]:
    """The process of the engine's that looks after each container."""
    found = {}
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = cmdline.read_bytes().split(b"\0")
            if b"shim" in words[0]:
                found |= {word.decode(): int(cmdline.parent.name) for word in words if len(word) == 64}
    if not containers <= found.keys():
        raise UnmeasurableError("the engine's processes are not among this machine's")
    return {found[container] for container in containers}


def many(side: Side, options: Options) -> Values:
    with sandbox(side):
        pass
    engine = Engine()
    wait_until_none(engine)
    count = options.sandboxes
    helpers_before, available_before = pss_mb(tree_of([os.getpid()])), available_mb()
    opened: list[Sandbox] = []

    def one(_: int) -> None:
        sandbox = side.open(StubModel([]))
        opened.append(sandbox)
        sandbox.execute(TRIVIAL)

    with ThreadPoolExecutor(STARTERS) as threads:
        try:
            up = timed(lambda: list(threads.map(one, range(count))))
            answering = timed(lambda: [sandbox.execute(TRIVIAL) for sandbox in opened])
            time.sleep(SETTLE_S)
            available = available_mb()
            engines = shims(engine.containers())
            helpers = pss_mb(tree_of([os.getpid()])) - helpers_before + pss_mb(engines)
            inside = pss_mb(tree_of(engines) - engines)
        finally:
            list(threads.map(lambda sandbox: sandbox.close(), opened))
    wait_until_none(engine)
    time.sleep(SETTLE_S)
    # Others use this machine too: what drifts from before to after is not the sandboxes'.
    dropped = (available_before + available_mb()) / 2 - available
    return {
        "up_s": up + answering,
        "answering_s": answering,
        "available_mb": dropped / count if dropped > 0 else LOST_IN_NOISE,
        "helpers_mb": helpers / count,
        "inside_mb": inside / count,
    }


# --- the table ------------------------------------------------------------------------------

Measure = Callable[[Side, Options], Values]

PROBES: dict[str, tuple[float, dict[Measure, tuple[str, ...]]]] = {
    "cell": (
        240,
        {
            cell_gap: ("gap_ms", "gap_p90_ms"),
            cell_paced: ("paced_ms",),
            cell_big_context: ("gap_big_context_ms",),
            cell_many_variables: ("gap_many_vars_ms",),
        },
    ),
    "query": (120, {sequential: ("per_s", "p50_us")}),
    "batch": (120, {batched: ("seconds", "peak_in_flight")}),
    "prompt10mb": (120, {large_prompt: ("prompt_ms",)}),
    "context": (180, {context_load: ("context_ms",)}),
    "start": (180, {cold_start: ("cold_p50_ms", "cold_p90_ms", "close_ms")}),
    "death": (120, {busy_death: ("stopped_ms", "removed_ms")}),
    "fifty": (
        300,
        {many: ("up_s", "answering_s", "available_mb", "helpers_mb", "inside_mb")},
    ),
}


def cannot(why: str, _options: Options) -> Values:
    raise UnmeasurableError(why)


def probes_of(side: Side) -> dict[str, Probe]:
    """The probes, bound to one side, and those that it is unable to."""
    able = {
        name: Probe(
            timeout_s, tuple(Step(partial(measure, side), values) for measure, values in measures.items())
        )
        for name, (timeout_s, measures) in PROBES.items()
    }
    unable = {
        name: Probe(10, (Step(partial(cannot, why), tuple(values)),))
        for name, (why, values) in side.unable.items()
    }
    return able | unable


def measure_side(name: str, version: str | None, probes: Mapping[str, Probe]) -> None:
    """The command line of a side's script."""
    try:
        main(name, version, probes)
    finally:
        remove_leftovers()


def measure(side: Side, more: Mapping[str, Sequence[Step]] = {}) -> None:
    """The same, with steps that only this side has."""
    probes = probes_of(side)
    for name, steps in more.items():
        known = probes.get(name, Probe(120, ()))
        probes[name] = Probe(known.timeout_s, (*known.steps, *steps))
    measure_side(side.name, version_of(side.distribution), probes)

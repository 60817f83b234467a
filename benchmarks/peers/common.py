"""What every measured side shares: the stub model, the stop-watch, the time-out, the output.

It knows nothing of any framework. A script built on it prints one JSON line:
`{"peer": ..., "version": ..., "probe": ..., "values": {...}, "why": {...}}`, where `why` has a
sentence for each value that is null.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import math
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

REPLY = "ok"
STDLIB_IMPORT = "import asyncio, json"
WHY_LENGTH = 200
SIGNIFICANT_DIGITS = 4

Values = dict[str, float]

#: In place of a figure that the machine's noise has swallowed.
LOST_IN_NOISE = math.nan


class UnmeasurableError(Exception):
    """The figure cannot be had from this peer; the message says why. ``values`` could be had."""

    def __init__(self, why: str, values: Values | None = None) -> None:
        super().__init__(why)
        self.values = values or {}


def option(default: Any, text: str) -> Any:
    """A field of `Options` together with the help of its command-line flag."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Options:
    """How large a probe is. The defaults are what the published figures are taken with."""

    n: int = option(0, "cells (cell), turns (run), calls (query, echo); 0: the probe's own size")
    reps: int = option(5, "repetitions of which the median is taken")
    long: int = option(1000, "iterations of the long run of `cell`")
    variables: int = option(1000, "variables of the crowded namespace of `cell`")
    context_mb: int = option(100, "size of the large context")
    prompts: int = option(10_000, "prompts of `batch` and `fanout`, sleeps of `pool`")
    threads: int = option(64, "threads of `threads`")
    runs: int = option(200, "runs at once of `concurrent`")
    children: int = option(50, "child runs at once of `recursion` and `children`")
    sandboxes: int = option(50, "sandboxes up at once of `fifty` (Docker)")
    url: str = option("", "the model server of `fanout` and `first`")
    seconds: float = option(20.0, "seconds after which a slow side of `fanout` makes no further call")
    timeout: float = option(0.0, "seconds for the whole probe; 0: the probe's own limit")

    def count(self, default: int) -> int:
        """`n`, or what the probe takes without it."""
        return self.n or default


@dataclass(frozen=True)
class Step:
    """One measurement. Steps fail one by one: the others keep their values."""

    measure: Callable[[Options], Values]
    values: tuple[str, ...]


@dataclass(frozen=True)
class Probe:
    """Measurements that are asked for by one name, and the seconds they may take together."""

    timeout_s: float
    steps: tuple[Step, ...]


# --- the stub model -------------------------------------------------------------------------


@dataclass
class Calls:
    """When calls came in and when they were answered. Appending is atomic, so any thread may."""

    entered: list[float] = field(default_factory=list)
    left: list[float] = field(default_factory=list)

    def gaps(self) -> list[float]:
        """Seconds from each reply to the next call: none of it is the model's."""
        return [after - before for before, after in zip(self.left, self.entered[1:], strict=False)]

    def peak(self) -> int:
        """How many calls were in flight at once, at most."""
        changes = [(moment, 1) for moment in self.entered] + [(moment, -1) for moment in self.left]
        running = peak = 0
        for _, change in sorted(changes):
            running += change
            peak = max(peak, running)
        return peak


class Stub:
    """Answers after a fixed latency, and keeps the time stamps."""

    def __init__(self, latency: float) -> None:
        self.latency = latency
        self.root = Calls()
        self.sub = Calls()

    # A latency of zero must not pay for a sleep: the gap would then be the scheduler's.

    def _answer(self, calls: Calls, reply: str) -> str:
        if self.latency:
            time.sleep(self.latency)
        calls.left.append(time.perf_counter())
        return reply

    async def _aanswer(self, calls: Calls, reply: str) -> str:
        if self.latency:
            await asyncio.sleep(self.latency)
        calls.left.append(time.perf_counter())
        return reply


class StubModel(Stub):
    """A model that answers the root from a script and every sub-call with `REPLY`."""

    def __init__(self, script: Iterable[str], latency: float = 0.0) -> None:
        super().__init__(latency)
        self._script = iter(script)

    def ask_root(self) -> str:
        self.root.entered.append(time.perf_counter())
        return self._answer(self.root, self._next())

    def ask_sub(self) -> str:
        self.sub.entered.append(time.perf_counter())
        return self._answer(self.sub, REPLY)

    async def aask_root(self) -> str:
        self.root.entered.append(time.perf_counter())
        return await self._aanswer(self.root, self._next())

    async def aask_sub(self) -> str:
        self.sub.entered.append(time.perf_counter())
        return await self._aanswer(self.sub, REPLY)

    def _next(self) -> str:
        reply = next(self._script, None)
        if reply is None:
            raise UnmeasurableError("the model was asked once more than the script has replies")
        return reply


class TreeModel(Stub):
    """A model of runs that start child runs. It answers by the turn, so any number may share it."""

    def __init__(
        self,
        root: Sequence[str],
        child: Sequence[str],
        latency: float = 0.0,
        watch: Callable[[int], None] = lambda turn: None,
    ) -> None:
        super().__init__(latency)
        self._root_script = root
        self._child_script = child
        #: Is told the number of each turn of the root. The gaps do not have its time in them.
        self._watch = watch

    def ask_root(self, turn: int) -> str:
        return self._answer(self.root, self._root_reply(turn))

    def ask_child(self, turn: int) -> str:
        return self._answer(self.sub, self._child_reply(turn))

    async def aask_root(self, turn: int) -> str:
        return await self._aanswer(self.root, self._root_reply(turn))

    async def aask_child(self, turn: int) -> str:
        return await self._aanswer(self.sub, self._child_reply(turn))

    def _root_reply(self, turn: int) -> str:
        self.root.entered.append(time.perf_counter())
        self._watch(turn)
        return self._root_script[turn]

    def _child_reply(self, turn: int) -> str:
        self.sub.entered.append(time.perf_counter())
        return self._child_script[turn]


def turn_of(roles: Iterable[str]) -> int:
    """How many replies a conversation holds: the number of the turn it asks for."""
    return sum(role == "assistant" for role in roles)


# --- what is measured -----------------------------------------------------------------------


class Peer(ABC):
    """One framework, as the probes see it: how a reply is written, and how a run is made."""

    name: str
    distribution: str
    #: What a user writes to have the package, and to have the class that makes runs.
    import_statement: str
    ready_statement: str
    #: Names inside a cell.
    context_name = "context"
    batch_name = "llm_query_batched"
    child_batch_name = "rlm_query_batched"
    #: Probes that make no sense here, each with the reason.
    unable: ClassVar[Mapping[str, str]] = {}

    def cell(self, code: str) -> str:
        """A reply that has `code` executed."""
        return f"```python\n{code}\n```"

    @abstractmethod
    def finish(self, variable: str) -> str:
        """A reply that ends the run with the text of a variable."""

    @abstractmethod
    def run(self, model: StubModel, context: str) -> str:
        """One whole run, from construction to teardown; returns its answer."""

    def run_all(self, models: Sequence[StubModel], context: str) -> list[str | None]:
        """Runs at the same time, a thread for each; None for one that raised."""

        def run_one(model: StubModel) -> str | None:
            try:
                return self.run(model, context)
            except Exception:  # Whatever it was: the run has no answer, and that is counted.
                return None

        with ThreadPoolExecutor(len(models)) as pool:
            return list(pool.map(run_one, models))

    def trees(self, model: TreeModel, width: int | None) -> AbstractContextManager[Callable[[str], str]]:
        """One object that makes run trees of depth 2: a context in, the root's answer out.

        It has `width` children going at a time, or as many as is this framework's default.
        """
        raise UnmeasurableError("nobody has written down how it starts child runs")


# --- instruments ----------------------------------------------------------------------------


def median_ms(seconds: Iterable[float]) -> float:
    """The median of durations, in milliseconds."""
    return statistics.median(seconds) * 1e3


def p90_ms(seconds: Sequence[float]) -> float:
    """The ninth decile of at least two durations, in milliseconds."""
    return statistics.quantiles(seconds, n=10, method="inclusive")[-1] * 1e3


def fresh_python_s(statement: str) -> float:
    """Seconds from starting an interpreter that executes one statement to its end."""
    started = time.perf_counter()
    # -I: neither the current folder nor PYTHONPATH may offer another package of that name.
    subprocess.run(
        [sys.executable, "-I", "-c", statement],
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    return time.perf_counter() - started


def import_times(statements: Mapping[str, str], rounds: int = 7) -> Values:
    """Median milliseconds of each statement in a fresh interpreter, taken in turns."""
    for statement in statements.values():
        fresh_python_s(statement)  # Bytecode and disk caches are filled before the first round.
    taken: dict[str, list[float]] = {name: [] for name in statements}
    for _ in range(rounds):
        for name, statement in statements.items():
            taken[name].append(fresh_python_s(statement))
    return {name: median_ms(seconds) for name, seconds in taken.items()}


def _parents() -> dict[int, int]:
    """Every process and its parent."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The second field is a name in parentheses that may itself hold spaces.
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue  # It ended while we looked.
    return parents


def _pss_kb(process: int) -> int:
    try:
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
    except PermissionError as error:
        # A sandbox that this user may not look into. Leaving it out would flatter it.
        raise UnmeasurableError(f"the memory of process {process} is not ours to read") from error
    except OSError:
        return 0  # It has ended.
    return sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))


def tree_of(roots: Iterable[int]) -> set[int]:
    """These processes and all below them."""
    parents = _parents()
    tree = set(roots)
    while below := {child for child, parent in parents.items() if parent in tree} - tree:
        tree |= below
    return tree


def own_tree() -> set[int]:
    """This process and all below it."""
    return tree_of([os.getpid()])


def _cpu_s(process: int) -> float:
    """Processor time of a process, with that of ended ones that it has waited for."""
    try:
        threads = Path(f"/proc/{process}/task").glob("*/schedstat")
        # In nanoseconds. `stat` has the same as ticks of 10 ms, too coarse for many that do little.
        own = sum(int(thread.read_text().split()[0]) for thread in threads)
        ended = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[13:15]
    except OSError:
        return 0.0  # It has ended.
    return own / 1e9 + sum(map(int, ended)) / os.sysconf("SC_CLK_TCK")


def tree_cpu_s() -> float:
    """Processor time of this process and all below it, ended ones included. Linux only."""
    if not Path("/proc/self/schedstat").exists():
        raise UnmeasurableError("this system does not tell the processor time of a process")
    waited_for = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = time.process_time() + waited_for.ru_utime + waited_for.ru_stime
    return own + sum(map(_cpu_s, own_tree() - {os.getpid()}))


def pss_mb(processes: Iterable[int]) -> float:
    """Proportional set size of processes, in MB. Linux only."""
    if not Path("/proc/self/smaps_rollup").exists():
        raise UnmeasurableError("this system does not tell the proportional set size of a process")
    return sum(map(_pss_kb, processes)) / 1024


def tree_pss_mb() -> float:
    """Proportional set size of this process and all below it, in MB. Linux only."""
    return pss_mb(own_tree())


def below_pss_mb() -> float:
    """The same without this process."""
    return pss_mb(own_tree() - {os.getpid()})


def own_rss_mb() -> float:
    """Resident set size of this process, in MB. Linux only."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class PeakMemory:
    """Samples `tree_pss_mb` on a thread; `mb` is the largest seen, and `processes` the most."""

    INTERVAL_S = 0.02

    def __init__(self) -> None:
        self.mb = 0.0
        self.processes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while not self._stop.wait(self.INTERVAL_S):
            tree = own_tree()
            self.processes = max(self.processes, len(tree))
            self.mb = max(self.mb, pss_mb(tree))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()


# --- running a probe ------------------------------------------------------------------------
#
# The probe runs in a child process with a session of its own, so that a peer which never comes
# back, and all it has started, can be ended; and with a folder of its own, so that nothing it
# leaves behind stays. The child reports each step as it ends: a time-out loses only the rest.


def restore(home: Path) -> None:
    """Undo what a peer may have changed for good: the folder, and the standard output."""
    os.chdir(home)
    sys.stdout = sys.__stdout__


def take_steps(steps: Sequence[Step], options: Options, report: Path) -> None:
    """Measure, and append the outcome of each step to the report."""
    home = Path.cwd()
    for step in steps:
        restore(home)
        outcome = take_step(step, options)
        with report.open("a") as lines:
            lines.write(json.dumps(outcome) + "\n")


def take_step(step: Step, options: Options) -> dict[str, Any]:
    """One outcome: values, or one reason for all of them."""
    try:
        values = step.measure(options)
        lost = [name for name, value in values.items() if math.isnan(value)]
        return {
            "values": {name: value for name, value in values.items() if name not in lost},
            "why": dict.fromkeys(lost, "it is smaller than the noise of this machine"),
        }
    except UnmeasurableError as error:
        missing = [name for name in step.values if name not in error.values]
        return {"values": error.values, "why": dict.fromkeys(missing, str(error)[:WHY_LENGTH])}
    except Exception as error:  # The boundary to foreign code: any failure is a reported reason.
        return {"why": dict.fromkeys(step.values, f"{type(error).__name__}: {error}"[:WHY_LENGTH])}


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:WHY_LENGTH] if lines else "without a word"


def run_child(argv: Sequence[str], folder: Path, report: Path, timeout_s: float) -> str:
    """Run this script again as the measuring child; says how that ended."""
    log = folder / "log"
    with log.open("w") as output:
        child = subprocess.Popen(
            [sys.executable, Path(sys.argv[0]).resolve(), *argv, "--report", report],
            cwd=folder,
            env={**os.environ, "TMPDIR": str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = child.wait(timeout_s)
        except BaseException as error:  # An interrupt too: the child's session does not see it.
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                return f"no end after {timeout_s:g} s"
            raise
    return f"the probe ended with code {code}: {last_line(log.read_text(errors='replace'))}"


def supervise(argv: Sequence[str], steps: Sequence[Step], timeout_s: float) -> dict[str, Any]:
    """Measure in a child process; every value is there, null ones with a reason."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        report = folder / "report"
        end = run_child(argv, folder, report, timeout_s)
        lines = report.read_text().splitlines() if report.exists() else []
    values: dict[str, float | None] = {}
    why: dict[str, str] = {}
    for outcome in map(json.loads, lines):
        values |= {key: rounded(value) for key, value in outcome.get("values", {}).items()}
        why |= outcome.get("why", {})
    for key in (key for step in steps for key in step.values if key not in values):
        values[key] = None
        why.setdefault(key, end)
    return {"values": values} | ({"why": why} if why else {})


def rounded(value: float) -> float:
    """A figure without digits that only noise has written."""
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}")


def parser_of(probes: Mapping[str, Probe]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("probe", choices=probes)
    for each in fields(Options):
        flag = "--" + each.name.replace("_", "-")
        text = each.metadata["help"]
        parser.add_argument(flag, type=type(each.default), default=each.default, help=text)
    # Only the supervising process passes this: it makes the process measure instead.
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    return parser


def version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def main(
    name: str,
    version: str | None,
    probes: Mapping[str, Probe],
    argv: Sequence[str] | None = None,
) -> None:
    """Take one probe and print its line."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser_of(probes).parse_args(argv)
    options = Options(**{each.name: getattr(arguments, each.name) for each in fields(Options)})
    probe = probes[arguments.probe]
    if arguments.report:
        take_steps(probe.steps, options, arguments.report)
        os._exit(0)  # Threads that a peer has left behind must not keep the process.
    outcome = supervise(argv, probe.steps, options.timeout or probe.timeout_s)
    line = {"peer": name, "version": version, "probe": arguments.probe, **outcome}
    print(json.dumps(line), flush=True)

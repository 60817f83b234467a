"""This project's environment `docker`, on the stub, through `open_repl`."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from ours import Client
from peers.common import Options, Step, StubModel, UnmeasurableError, Values, median_ms, p90_ms
from peers.docker_probes import TRIVIAL, Sandbox, Side, measure, repeat, sandbox
from setup_docker import IMAGE

from rlm import open_repl
from rlm.environment import REPLResult
from rlm.hostloop import run
from rlm.repl import REPL
from rlm_docker import DockerREPL

POOL = 4
DEADLINE_S = 0.3
BOMB = """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
"""
IMMUNE = """
while True:
    try:
        while True:
            pass
    except BaseException:
        pass
"""


class OurSandbox(Sandbox):
    def __init__(self, repl: REPL) -> None:
        self.repl = repl

    def execute(self, code: str) -> str:
        return checked(self.repl.execute(code)).stdout

    def load(self, text: str) -> None:
        self.repl.add_context(text)

    def close(self) -> None:
        self.repl.close()


def checked(result: REPLResult) -> REPLResult:
    if result.error is not None:
        raise UnmeasurableError(f"a cell failed: {result.error.type}: {result.error.message}")
    return result


class Ours(Side):
    name = "ours"
    distribution = "rlm"

    def __init__(self, **settings: object) -> None:
        self._settings = {"image": IMAGE, "pull": "never", **settings}

    def open(self, model: StubModel) -> Sandbox:
        return OurSandbox(open_repl("docker", backend=Client(model), **self._settings).__enter__())


# --- what no peer has -----------------------------------------------------------------------


def pooled_start(options: Options) -> Values:
    """First cells in warm containers; each time the pool is full again before the next."""
    side = Ours(prewarm=POOL)
    pattern = DockerREPL(image=IMAGE, pull="never", prewarm=POOL)

    def once() -> float:
        run(pattern.warm())
        started = time.perf_counter()
        opened = side.open(StubModel([]))
        opened.execute(TRIVIAL)
        took = time.perf_counter() - started
        opened.close()
        return took

    once()
    taken = repeat(once, options.count(15))
    return {"pool_p50_ms": median_ms(taken), "pool_p90_ms": p90_ms(taken)}


def overrun(code: str, _options: Options, *, value: str, repeats: int) -> Values:
    """From a cell's deadline until the next cell has found a variable of an earlier one."""

    def once(repl: REPL) -> float:
        checked(repl.execute("kept = 'kept'"))
        started = time.perf_counter()
        result = repl.execute(code, timeout=DEADLINE_S)
        after = repl.execute("print(kept)")
        took = time.perf_counter() - started - DEADLINE_S
        if result.error is None or result.error.kind != "timeout":
            raise UnmeasurableError(f"the cell ended otherwise: {result.error}"[:160])
        if after.stdout.strip() != "kept":
            raise UnmeasurableError(f"the variable was lost: {after.error}"[:160])
        return took

    with sandbox(Ours()) as opened:
        assert isinstance(opened, OurSandbox)
        return {value: median_ms(repeat(partial(once, opened.repl), repeats))}


def overruns(value: str, code: str, repeats: int) -> Step:
    measured: Callable[[Options], Values] = partial(overrun, code, value=value, repeats=repeats)
    return Step(measured, (value,))


RUNAWAY = (
    overruns("loop_ms", "while True: pass", 10),
    overruns("immune_ms", IMMUNE, 5),
    overruns("bomb_ms", BOMB, 5),
)

if __name__ == "__main__":
    measure(
        Ours(),
        {"start": [Step(pooled_start, ("pool_p50_ms", "pool_p90_ms"))], "runaway": RUNAWAY},
    )

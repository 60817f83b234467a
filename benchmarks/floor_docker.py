"""What the engine itself takes: plain `docker run`, and bytes through it, under the names of ours.

No framework that has one container per sandbox, reached through the `docker` command, does better.
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from peers.common import Options, Probe, Step, Values, median_ms, p90_ms
from peers.docker_probes import MB, PACE_S, STARTERS, Engine, measure_side, repeat, timed, wait_gone
from setup_docker import IMAGE

CONTAINER = ("--network", "none", "--log-driver", "none", IMAGE, "python3", "-c")
REQUEST = b"x" * 90
ECHO = """
import os
while data := os.read(0, 1 << 16): os.write(1, data)
"""
COUNT = """
import os
print(flush=True)
left = {size}
while left: left -= len(os.read(0, min(left, 1 << 20)))
print(flush=True)
"""
SLEEP = "import time; time.sleep(600)"
WARM_UP_CALLS = 100


def docker(*arguments: str) -> str:
    return subprocess.run(["docker", *arguments], check=True, capture_output=True, text=True).stdout.strip()


@contextlib.contextmanager
def piped(code: str) -> Iterator[tuple[int, int]]:
    """The standard input and output of a program in a container."""
    command = ["docker", "run", "--rm", "--interactive", *CONTAINER, code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdin is not None and process.stdout is not None
        yield process.stdin.fileno(), process.stdout.fileno()


def receive(descriptor: int, size: int) -> None:
    while size:
        data = os.read(descriptor, size)
        if not data:
            raise EOFError("the container ended")
        size -= len(data)


def trips(count: int, pause: float = 0.0) -> list[float]:
    with piped(ECHO) as (to, back):

        def once() -> float:
            time.sleep(pause) if pause else None
            started = time.perf_counter()
            os.write(to, REQUEST)
            receive(back, len(REQUEST))
            return time.perf_counter() - started

        return [once() for _ in range(WARM_UP_CALLS + count)][WARM_UP_CALLS:]


def echo(options: Options) -> Values:
    taken = trips(options.count(2000))
    return {"gap_ms": median_ms(taken), "gap_p90_ms": p90_ms(taken)}


def paced_echo(options: Options) -> Values:
    return {"paced_ms": median_ms(trips(options.count(200), PACE_S))}


def calls(options: Options) -> Values:
    taken = trips(options.count(2000))
    return {"per_s": len(taken) / sum(taken), "p50_us": median_ms(taken) * 1e3}


def stream(options: Options) -> Values:
    data = memoryview(b"x" * (options.context_mb * MB))

    def once() -> float:
        with piped(COUNT.format(size=len(data))) as (to, back):
            receive(back, 1)
            started = time.perf_counter()
            sent = 0
            while sent < len(data):
                sent += os.write(to, data[sent:])
            receive(back, 1)
            return time.perf_counter() - started

    return {"context_ms": median_ms(repeat(once, options.reps))}


def start(options: Options) -> Values:
    taken = repeat(lambda: timed(lambda: docker("run", "--rm", *CONTAINER, "pass")), options.count(10))
    return {"cold_p50_ms": median_ms(taken), "cold_p90_ms": p90_ms(taken)}


def removal(options: Options) -> Values:
    engine = Engine()

    def once() -> tuple[float, float]:
        container = docker("run", "--detach", *CONTAINER, SLEEP)
        started = time.perf_counter()
        remover = subprocess.Popen(["docker", "rm", "--force", container], stdout=subprocess.DEVNULL)
        ends = wait_gone(engine, container, started)
        remover.wait()
        return ends

    stopped, removed = zip(*(once() for _ in range(max(options.reps, 2))), strict=True)
    return {"stopped_ms": median_ms(stopped), "removed_ms": median_ms(removed)}


def many(options: Options) -> Values:
    """Started only: none of them is asked anything."""
    count = options.sandboxes
    with ThreadPoolExecutor(STARTERS) as threads:
        started = time.perf_counter()
        containers = list(threads.map(lambda _: docker("run", "--detach", *CONTAINER, SLEEP), range(count)))
        up = time.perf_counter() - started
    docker("rm", "--force", *containers)
    return {"up_s": up}


PROBES = {
    "cell": Probe(60, (Step(echo, ("gap_ms", "gap_p90_ms")), Step(paced_echo, ("paced_ms",)))),
    "query": Probe(60, (Step(calls, ("per_s", "p50_us")),)),
    "context": Probe(60, (Step(stream, ("context_ms",)),)),
    "start": Probe(60, (Step(start, ("cold_p50_ms", "cold_p90_ms")),)),
    "death": Probe(60, (Step(removal, ("stopped_ms", "removed_ms")),)),
    "fifty": Probe(120, (Step(many, ("up_s",)),)),
}

if __name__ == "__main__":
    measure_side("floor", platform.python_version(), PROBES)

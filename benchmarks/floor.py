"""What the machine itself takes: the least that any framework could need, in the same format.

`echo` is the price of asking another process something, `pool` that of many sleeps at once,
`tree` that of a root which waits for many children, `import` that of the standard library's own
weight.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import platform
import socket
import time
from collections.abc import Iterator
from functools import partial

from peers.common import (
    STDLIB_IMPORT,
    Calls,
    Options,
    Probe,
    Step,
    Values,
    import_times,
    main,
    median_ms,
    tree_cpu_s,
)
from peers.probes import CHILD_TURNS, IDEAL_S, SUB_LATENCY_S

REQUEST_BYTES = 90
REPLY_BYTES = 60
ECHO_CALLS = 20_000
WARM_UP_CALLS = 500
POOL_SIZE = 256
SLEEP_S = 0.02


# --- echo -----------------------------------------------------------------------------------

Address = str | tuple[str, int]


def message(size: int) -> dict[str, str]:
    """A JSON object that encodes to exactly `size` bytes."""
    return {"text": "x" * (size - len(json.dumps({"text": ""})))}


def send(connection: socket.socket, value: object) -> None:
    connection.sendall(json.dumps(value).encode())


def receive(connection: socket.socket, size: int) -> object:
    """One message of a known size. Raises EOFError when the other side is gone."""
    data = b""
    while len(data) < size:
        more = connection.recv(size - len(data))
        if not more:
            raise EOFError
        data += more
    return json.loads(data)


def without_delay(connection: socket.socket) -> socket.socket:
    if connection.family == socket.AF_INET:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def serve(family: int, address: Address) -> None:
    """Answer until the other side closes."""
    reply = message(REPLY_BYTES)
    with socket.socket(family) as connection:
        connection.connect(address)
        without_delay(connection)
        while True:
            try:
                receive(connection, REQUEST_BYTES)
            except EOFError:
                return
            send(connection, reply)


def ask(connection: socket.socket, calls: int) -> Calls:
    """Sequential requests; the time stamps are those of the asking side."""
    request = message(REQUEST_BYTES)
    stamps = Calls()
    for _ in range(calls):
        stamps.entered.append(time.perf_counter())
        send(connection, request)
        receive(connection, REPLY_BYTES)
        stamps.left.append(time.perf_counter())
    return stamps


def round_trips(family: int, address: Address, calls: int) -> Calls:
    """Time stamps of an echo between this process and another."""
    with socket.socket(family) as listener:
        listener.bind(address)
        listener.listen(1)
        where = (family, listener.getsockname())
        server = multiprocessing.get_context("spawn").Process(target=serve, args=where)
        server.start()
        with without_delay(listener.accept()[0]) as connection:
            ask(connection, WARM_UP_CALLS)
            stamps = ask(connection, calls)
    server.join()
    return stamps


def echo(family: int, address: Address, prefix: str, options: Options) -> Values:
    stamps = round_trips(family, address, options.count(ECHO_CALLS))
    trips = (left - entered for entered, left in zip(stamps.entered, stamps.left, strict=True))
    took = stamps.left[-1] - stamps.entered[0]
    return {f"{prefix}per_s": len(stamps.left) / took, f"{prefix}p50_us": median_ms(trips) * 1e3}


# --- pool -----------------------------------------------------------------------------------


async def work(jobs: Iterator[int]) -> None:
    """One worker: the iterator is shared, so whoever is free takes the next job."""
    for _ in jobs:
        await asyncio.sleep(SLEEP_S)


async def drain(jobs: int) -> float:
    started = time.perf_counter()
    shared = iter(range(jobs))
    await asyncio.gather(*(work(shared) for _ in range(POOL_SIZE)))
    return time.perf_counter() - started


def pool(options: Options) -> Values:
    taken = [asyncio.run(drain(options.prompts)) for _ in range(options.reps)]
    return {"seconds": median_ms(taken) / 1e3}


# --- tree -----------------------------------------------------------------------------------


async def child() -> None:
    for _ in range(CHILD_TURNS):
        await asyncio.sleep(SUB_LATENCY_S)


async def root(children: int) -> None:
    await asyncio.sleep(SUB_LATENCY_S)
    await asyncio.gather(*(child() for _ in range(children)))
    await asyncio.sleep(SUB_LATENCY_S)


def tree(options: Options) -> Values:
    taken, used = [], []
    for _ in range(options.reps):
        cpu, started = tree_cpu_s(), time.perf_counter()
        asyncio.run(root(options.children))
        taken.append(time.perf_counter() - started)
        used.append(tree_cpu_s() - cpu)
    seconds = median_ms(taken) / 1e3
    return {
        "seconds": seconds,
        "of_ideal": seconds / IDEAL_S,
        "answered": options.children,
        "cpu_ms": median_ms(used) / options.children,
    }


# --- import ---------------------------------------------------------------------------------


def stdlib_import(_options: Options) -> Values:
    return import_times({"stdlib_ms": STDLIB_IMPORT})


PROBES = {
    "echo": Probe(
        60,
        (
            Step(partial(echo, socket.AF_INET, ("127.0.0.1", 0), ""), ("per_s", "p50_us")),
            # The probe has a folder of its own, so the name is free.
            Step(
                partial(echo, socket.AF_UNIX, "echo.socket", "unix_"),
                ("unix_per_s", "unix_p50_us"),
            ),
        ),
    ),
    "pool": Probe(60, (Step(pool, ("seconds",)),)),
    "tree": Probe(60, (Step(tree, ("seconds", "of_ideal", "answered", "cpu_ms")),)),
    "import": Probe(60, (Step(stdlib_import, ("stdlib_ms",)),)),
}

if __name__ == "__main__":
    main("floor", platform.python_version(), PROBES)

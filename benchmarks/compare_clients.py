"""Model clients beside each other, against one server of this machine that answers after 20 ms.

The server is a process of its own, on a core of its own if there are two. The sides of a probe are
taken one right after the other, as in `compare.py`. `setup_peers.py rlms openai litellm` comes first.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from compare import Figure, Suite, Target, main
from peers.client_probes import DIRECT, DIRECT_NARROW, REPLY, STACK, STACK_NARROW

LATENCY_S = 0.02
TIMES = 10
PEERS = ("aiohttp", "openai", "litellm", "rlms")
BEATEN = ("litellm", "rlms")
PASSES = (
    (STACK, "256 in flight, whole stack"),
    (STACK_NARROW, "64 in flight, whole stack"),
    (DIRECT, "256 in flight, client alone"),
    (DIRECT_NARROW, "64 in flight, client alone"),
)


def rate(prefix: str, label: str) -> Figure:
    """Calls per second, with targets where ours has all of its stack to carry."""
    value = f"{prefix}per_s"
    if prefix != STACK:
        return Figure("fanout", value, f"{label}, per s", None, True)
    # Against a peer's better figure, whether it was taken below its own stack or not.
    beaten = [Target(TIMES, peer, "fanout", name) for peer in BEATEN for name in (value, DIRECT + value)]
    return Figure("fanout", value, f"{label}, per s", Target(2000), True, tuple(beaten))


def pass_of(prefix: str, label: str) -> tuple[Figure, ...]:
    return (
        rate(prefix, label),
        Figure("fanout", f"{prefix}cpu_ms", "… CPU of a call, ms", Target(0.5) if prefix == STACK else None),
        Figure("fanout", f"{prefix}p50_ms", "… a call, p50, ms"),
        Figure("fanout", f"{prefix}p99_ms", "… p99, ms"),
        Figure("fanout", f"{prefix}errors", "… errors", Target(0)),
    )


CLIENTS = Suite(
    suffix="_clients",
    shows_floor=True,
    probes=("fanout", "first"),
    peers=PEERS,
    at_home=("aiohttp",),
    floors={"fanout": "fanout"},
    quick=("--prompts", "1024", "--seconds", "3"),
    figures=(
        *(figure for prefix, label in PASSES for figure in pass_of(prefix, label)),
        Figure("first", "first_ms", "first call of a process, ms", Target(150)),
        Figure("first", "first_after_aiohttp_ms", "… with aiohttp imported, ms"),
        Figure("first", "import_ms", "python -c 'import ...', ms", Target(120)),
        Figure("first", "python_ms", "… python -c pass, ms"),
        Figure("first", "import_after_aiohttp_ms", "import, after that of aiohttp, ms"),
    ),
)


@contextmanager
def model_server() -> Iterator[str]:
    """The URL of a server on the last core; this process and its children keep off that one."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    shared = len(cores) < 2
    arguments = ["--latency", str(LATENCY_S), "--text", REPLY]
    with subprocess.Popen(
        [sys.executable, "-m", "rlm.testing.model_server", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=None if shared else lambda: os.sched_setaffinity(0, cores[-1:]),
    ) as server:
        assert server.stdout is not None
        if not shared:
            os.sched_setaffinity(0, cores[:-1])
        yield server.stdout.readline().strip()
        server.terminate()


if __name__ == "__main__":
    with model_server() as url:
        main(CLIENTS, __doc__, fixed=("--url", url))

"""How long a batch takes at a server that allows so many requests a second, beside the least it can.

The rate is found out from refusals, and then set beforehand. No call may fail, and nothing
may be sent before the moment that a refusal had named, but for what was on its way.
"""

from __future__ import annotations

import argparse
import time

from rlm import RLM, Reply, Request
from rlm.testing.model_server import ModelServer

CELL = "```repl\nreplies = llm_query_batched([str(i) for i in range({calls})])\n{final}\n```"
FINAL = "FINAL(sum(isinstance(reply, str) for reply in replies))"


def measure(calls: int, rate: int, known: bool) -> str:
    """One batch: how many replies came, in how many seconds, and after how many refusals."""

    async def root(request: Request) -> Reply:
        return Reply(CELL.format(calls=calls, final=FINAL))

    limits = {"openai": {"requests_per_minute": 60 * rate}} if known else {}
    with ModelServer(rate=rate, keep=False) as server:
        place = {"model_name": "m", "base_url": server.url}
        with RLM(backend=root, sub_backend="openai", sub_backend_kwargs=place, rate_limits=limits) as rlm:
            start = time.perf_counter()
            replies = rlm.completion("x").value
            seconds = time.perf_counter() - start
        ideal = calls / rate
        return (
            f"{'set' if known else 'found':>6}: {replies} of {calls} replies, {seconds:.1f} s = "
            f"{seconds / ideal:.2f}x the ideal {ideal:.1f} s; {server.refused} refused, "
            f"{server.early} of them before a named moment"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--rate", type=int, default=10, help="requests a second that the server allows")
    options = parser.parse_args()
    for known in (False, True):
        print(measure(options.calls, options.rate, known), flush=True)

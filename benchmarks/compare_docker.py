"""Environment `docker` beside the DockerREPL of rlms, in containers of the same image.

The sides of a probe are taken one right after the other, as in `compare.py`, and the engine's own
floor between them. `setup_peers.py` and `setup_docker.py` come first.
"""

from __future__ import annotations

from compare import Figure, Suite, Target, faster_than, main
from peers.docker_probes import PROBES

PEER = "rlms"


def more_than(times: float, probe: str, value: str) -> Target:
    """So many times the rate of the peer."""
    return Target(times, PEER, probe, value)


DOCKER = Suite(
    suffix="_docker",
    shows_floor=True,
    probes=(*PROBES, "runaway"),
    peers=(PEER,),
    floors={name: name for name in ("cell", "query", "context", "start", "death", "fifty")},
    quick=(
        *("--n", "5", "--reps", "2", "--variables", "100", "--context-mb", "5"),
        *("--prompts", "400", "--sandboxes", "4"),
    ),
    figures=(
        Figure(
            *("cell", "gap_ms", "trivial cell, ms", Target(0.6)),
            also=(faster_than(PEER, 300, "cell", "gap_ms"),),
        ),
        Figure("cell", "gap_p90_ms", "… p90, ms"),
        Figure("cell", "paced_ms", "… after a pause of 20 ms, ms", Target(0.6)),
        Figure(
            *("cell", "gap_big_context_ms", "… context of 100 MB, ms", Target(0.6)),
            also=(faster_than(PEER, 5000, "cell", "gap_big_context_ms"),),
        ),
        Figure(
            *("cell", "gap_many_vars_ms", "… 1,000 variables, ms", Target(0.6)),
            also=(faster_than(PEER, 300, "cell", "gap_many_vars_ms"),),
        ),
        Figure(
            *("query", "per_s", "llm_query, per s", Target(2500), True),
            also=(more_than(5, "query", "per_s"),),
        ),
        Figure("query", "p50_us", "… p50, µs"),
        Figure("batch", "seconds", "batch of 10,000, s"),
        Figure("batch", "peak_in_flight", "… in flight at most", None, True),
        Figure("prompt10mb", "prompt_ms", "10 MB prompt, ms"),
        Figure(
            *("context", "context_ms", "100 MB context, ms", Target(500)),
            also=(faster_than(PEER, 10, "context", "context_ms"),),
        ),
        Figure("start", "cold_p50_ms", "first cell, cold, ms"),
        Figure("start", "cold_p90_ms", "… p90, ms", Target(400)),
        Figure("start", "pool_p50_ms", "first cell, from the pool, ms", Target(5)),
        Figure("start", "pool_p90_ms", "… p90, ms"),
        Figure("start", "close_ms", "close(), ms", Target(50)),
        Figure("runaway", "loop_ms", "deadline of a loop to next cell, ms", Target(50)),
        Figure("runaway", "immune_ms", "… of a loop that catches all, ms"),
        Figure("runaway", "bomb_ms", "… of a fork bomb, ms", Target(500)),
        Figure("death", "stopped_ms", "close() while busy to stopped, ms", Target(150)),
        Figure("death", "removed_ms", "… to removed, ms"),
        Figure("fifty", "up_s", "50 sandboxes up and answering, s", Target(15)),
        Figure("fifty", "answering_s", "… one cell on each, s"),
        Figure("fifty", "available_mb", "… memory each: all, MB", Target(20)),
        Figure("fifty", "helpers_mb", "… … of processes of the host, MB"),
        Figure("fifty", "inside_mb", "… … of processes inside, MB"),
    ),
)

if __name__ == "__main__":
    main(DOCKER, __doc__)

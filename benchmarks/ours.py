"""This project, on the stub: a model client of its own, and environment `local`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peers.common import (
    Options,
    Peer,
    Probe,
    Step,
    StubModel,
    TreeModel,
    Values,
    fresh_python_s,
    import_times,
    main,
    median_ms,
    turn_of,
    version_of,
)
from peers.probes import EDGE, QUESTION, TRIVIAL, probes_of, run_cells, warm_up

from rlm import RLM, BaseLM, Reply, Request

#: Settings by which an RLM keeps sandboxes of ended child runs for later ones: there are none.
POOLING: dict[str, Any] = {"pool": 51}  # the root's and fifty children's

CONSTRUCT = "from rlm import RLM; RLM(backend='scripted', environment='local')"
SCRIPT = """
from rlm import RLM
from rlm_scripted import ScriptedLM

model = ScriptedLM(["```python\\nx = 1\\nprint(x)\\n```", "FINAL_VAR(x)"])
assert RLM(backend=model, environment="local").completion("tiny", "q").response == "1"
"""


class Client(BaseLM):
    """The stub as a model client. Only a root request begins with a system prompt."""

    model_name = "stub"
    simulated = True

    def __init__(self, model: StubModel) -> None:
        self._model = model

    async def complete(self, request: Request) -> Reply:
        if request.messages[0].role == "system":
            return Reply(await self._model.aask_root())
        return Reply(await self._model.aask_sub())


class TreeClient(BaseLM):
    """The stub that answers by the turn, as the model of roots or of children."""

    model_name = "stub"
    simulated = True

    def __init__(self, ask: Callable[[int], Awaitable[str]]) -> None:
        self._ask = ask

    async def complete(self, request: Request) -> Reply:
        return Reply(await self._ask(turn_of(message.role for message in request.messages)))


def framework(model: StubModel) -> RLM:
    """One RLM on the stub. The limit on turns is lifted, as everywhere."""
    return RLM(backend=Client(model), environment="local", max_iterations=1_000_000)


class Ours(Peer):
    name = "ours"
    distribution = "rlm"
    import_statement = "import rlm"
    ready_statement = "from rlm import RLM"

    def finish(self, variable: str) -> str:
        return f"FINAL_VAR({variable})"

    def run(self, model: StubModel, context: str) -> str:
        with framework(model) as rlm:
            return rlm.completion(context, "q").response

    def run_all(self, models: Sequence[StubModel], context: str) -> list[str | None]:
        async def gather() -> list[str | None]:
            runs = [framework(model).acompletion(context, "q") for model in models]
            ended = await asyncio.gather(*runs, return_exceptions=True)
            return [None if isinstance(end, BaseException) else end.response for end in ended]

        return asyncio.run(gather())

    @contextmanager
    def trees(self, model: TreeModel, width: int | None) -> Iterator[Callable[[str], str]]:
        given = POOLING if width is None else POOLING | {"max_concurrent_subcalls": width}
        with RLM(
            backend=TreeClient(model.aask_root),
            sub_backend=TreeClient(model.aask_child),
            environment="local",
            max_depth=2,
            max_iterations=1_000_000,
            **given,
        ) as rlm:
            yield lambda context: rlm.completion(context, QUESTION).response


# --- what no peer has -----------------------------------------------------------------------


def cold_run(peer: Peer, options: Options) -> Values:
    """The first run of a process: it starts the fork server. Nothing has run before this."""
    cells = [TRIVIAL] * (options.count(EDGE) - 1)
    started = time.perf_counter()
    model = run_cells(peer, cells)
    ended = time.perf_counter()
    first = model.root.entered[0]
    return {"cold_run_ms": (ended - started) * 1e3, "cold_start_ms": (first - started) * 1e3}


def warm_start(peer: Peer, options: Options) -> Values:
    """From construction to the model's first call: the sandbox is up, and has its context."""
    warm_up(peer)
    starts = []
    for _ in range(options.reps * EDGE):
        started = time.perf_counter()
        starts.append(run_cells(peer, [TRIVIAL]).root.entered[0] - started)
    return {"start_ms": median_ms(starts)}


def whole_script(_peer: Peer, options: Options) -> Values:
    """A script of one run of two turns, as a process of its own, from its start to its end."""
    fresh_python_s(SCRIPT)
    return {"script_ms": median_ms(fresh_python_s(SCRIPT) for _ in range(options.reps))}


def constructing(_peer: Peer, _options: Options) -> Values:
    return import_times({"construct_ms": CONSTRUCT})


def with_extras(peer: Peer) -> dict[str, Probe]:
    """The probes, and beside them what only this project is asked."""
    probes = probes_of(peer)
    cold = Step(partial(cold_run, peer), ("cold_run_ms", "cold_start_ms"))
    warm = Step(partial(warm_start, peer), ("start_ms",))
    script = Step(partial(whole_script, peer), ("script_ms",))
    construct = Step(partial(constructing, peer), ("construct_ms",))
    run, imports = probes["run"], probes["import"]
    return probes | {
        "run": Probe(run.timeout_s, (cold, *run.steps, warm, script)),  # The cold one is first.
        "import": Probe(imports.timeout_s, (*imports.steps, construct)),
    }


if __name__ == "__main__":
    ours = Ours()
    main(ours.name, version_of(ours.distribution), with_extras(ours))

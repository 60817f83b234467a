"""recursive-llm, run by its own interpreter. The stub is its `completion_handler`."""

from __future__ import annotations

import asyncio
import functools
import importlib
import os
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peers.common import Peer, StubModel, TreeModel, UnmeasurableError, turn_of
from peers.probes import QUESTION, measure_peer

ROOT = "root"
SUB = "sub"
CELL_TIMEOUT_S = 300.0
SAFE_WIDTH = 4  # Its default. Beyond, its threads wait for each other and never end.


@functools.cache
def rlm_class() -> Any:
    # Not an import statement: to a type checker this name is another package.
    return importlib.import_module("rlm").RLM


def response(text: str) -> SimpleNamespace:
    """A litellm response. It carries its cost, as real ones do: looking prices up is slow."""
    return SimpleNamespace(
        choices=[SimpleNamespace(message=SimpleNamespace(content=text))],
        usage=SimpleNamespace(prompt_tokens=1, completion_tokens=1, total_tokens=2),
        _hidden_params={"response_cost": 0.0},
    )


def framework(handler: Callable[..., Awaitable[SimpleNamespace]], **settings: object) -> Any:
    """One RLM. Sub-calls and child runs are told apart by the model they ask for."""
    return rlm_class()(
        model=ROOT,
        recursive_model=SUB,
        completion_handler=handler,
        max_iterations=1_000_000,
        repl_timeout=CELL_TIMEOUT_S,
        **settings,
    )


def of_run(stub: StubModel) -> Any:
    """One RLM on the stub."""

    async def complete(*, model: str, **_: object) -> SimpleNamespace:
        return response(await (stub.aask_sub() if model == SUB else stub.aask_root()))

    return framework(complete)


def of_trees(stub: TreeModel) -> Any:
    """One RLM whose cells may start child runs, on the stub."""

    async def complete(*, model: str, messages: Sequence[Mapping[str, str]], **_: object) -> SimpleNamespace:
        turn = turn_of(message["role"] for message in messages)
        return response(await (stub.aask_child(turn) if model == SUB else stub.aask_root(turn)))

    return framework(complete, max_depth=2)


class RecursiveLlm(Peer):
    name = "recursive_llm"
    distribution = "recursive-llm"
    import_statement = "import rlm"
    ready_statement = "from rlm import RLM"
    unable: ClassVar[Mapping[str, str]] = {"threads": "its cells cannot import threading"}

    def finish(self, variable: str) -> str:
        return f"FINAL_VAR({variable})"

    def run(self, model: StubModel, context: str) -> str:
        return str(of_run(model).complete("q", context))

    def run_all(self, models: Sequence[StubModel], context: str) -> list[str | None]:
        async def gather() -> list[str | BaseException]:
            runs = [of_run(model).acomplete("q", context) for model in models]
            return list(await asyncio.gather(*runs, return_exceptions=True))

        answers = asyncio.run(gather())
        return [None if isinstance(answer, BaseException) else answer for answer in answers]

    @contextmanager
    def trees(self, model: TreeModel, width: int | None) -> Iterator[Callable[[str], str]]:
        if width is not None and width > SAFE_WIDTH:
            raise UnmeasurableError(f"it never ends with more than {SAFE_WIDTH} children at a time")
        rlm = of_trees(model)
        yield lambda context: str(rlm.complete(QUESTION, context))


if __name__ == "__main__":
    # Without this litellm asks the network for prices while it is imported.
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    # Its workers import the main script again. Without a file there is none to import, as in an
    # interactive session: its best case.
    script = sys.modules["__main__"]
    del script.__file__
    measure_peer(RecursiveLlm())

"""rlms, run by its own interpreter. The stub goes in where it makes a client: `get_client`."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peers.common import Peer, StubModel, TreeModel, turn_of
from peers.probes import QUESTION, measure_peer

MODEL = "stub"


class Accounts:
    """What rlms expects of a client besides its replies."""

    model_name = MODEL

    def __init__(self, types: Any) -> None:
        self._usage = types.ModelUsageSummary(1, 1, 1)
        self._summary = types.UsageSummary({MODEL: self._usage})

    def get_last_usage(self) -> Any:
        return self._usage

    def get_usage_summary(self) -> Any:
        return self._summary


class Client(Accounts):
    """The stub as a client. The root sends messages, a sub-call sends a string."""

    def __init__(self, model: StubModel, types: Any) -> None:
        super().__init__(types)
        self._model = model

    def completion(self, prompt: object) -> str:
        return self._model.ask_sub() if isinstance(prompt, str) else self._model.ask_root()

    async def acompletion(self, prompt: object) -> str:
        if isinstance(prompt, str):
            return await self._model.aask_sub()
        return await self._model.aask_root()


class TreeClient(Accounts):
    """The same for run trees. A root is known by its question; a child is asked none."""

    def __init__(self, model: TreeModel, types: Any) -> None:
        super().__init__(types)
        self._model = model

    def completion(self, messages: Sequence[Mapping[str, str]]) -> str:
        turn = turn_of(message["role"] for message in messages)
        is_root = any(QUESTION in message["content"] for message in messages)
        return self._model.ask_root(turn) if is_root else self._model.ask_child(turn)


@functools.cache
def rlm_class() -> Any:
    """The class that makes runs, with our client in place of its own."""
    # Not an import statement: to a type checker this name is another package.
    core = importlib.import_module("rlm.core.rlm")
    types = importlib.import_module("rlm.core.types")
    core.get_client = lambda _, kwargs: kwargs["client"](types)  # type: ignore[attr-defined]
    return core.RLM


class Rlms(Peer):
    name = "rlms"
    distribution = "rlms"
    import_statement = "import rlm"
    ready_statement = "from rlm import RLM"

    def cell(self, code: str) -> str:
        return f"```repl\n{code}\n```"

    def finish(self, variable: str) -> str:
        return self.cell(f'answer["content"] = str({variable})\nanswer["ready"] = True')

    def run(self, model: StubModel, context: str) -> str:
        rlm = rlm_class()(
            backend="openai",
            backend_kwargs={"model_name": MODEL, "client": functools.partial(Client, model)},
            environment="local",
            max_iterations=1_000_000,
        )
        return str(rlm.completion(context, root_prompt="q").response)

    @contextmanager
    def trees(self, model: TreeModel, width: int | None) -> Iterator[Callable[[str], str]]:
        # Children get the same arguments for their client, so each makes one on the same stub.
        rlm = rlm_class()(
            backend="openai",
            backend_kwargs={"model_name": MODEL, "client": functools.partial(TreeClient, model)},
            environment="local",
            max_depth=2,
            max_iterations=1_000_000,
            **({} if width is None else {"max_concurrent_subcalls": width}),
        )
        yield lambda context: str(rlm.completion(context, root_prompt=QUESTION).response)


if __name__ == "__main__":
    measure_peer(Rlms())

"""pyrlm-runtime, run by its own interpreter. The stub is its `ModelAdapter`."""

from __future__ import annotations

import functools
import importlib
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peers.common import Peer, StubModel, TreeModel, turn_of
from peers.probes import QUESTION, measure_peer

NO_LIMIT = 10**12

Messages = Sequence[Mapping[str, str]]


@functools.cache
def library() -> Any:
    return importlib.import_module("pyrlm_runtime")


class Adapter:
    """What pyrlm expects of a model. Root and sub-calls have an adapter each."""

    def __init__(self, ask: Callable[[Messages], str]) -> None:
        self._ask = ask
        self._usage = library().Usage(1, 1, 2)

    def complete(self, messages: Messages, **_: object) -> Any:
        return library().ModelResponse(text=self._ask(messages), usage=self._usage)


def by_turn(ask: Callable[[int], str]) -> Adapter:
    """An adapter on a stub that answers by the turn."""
    return Adapter(lambda messages: ask(turn_of(message["role"] for message in messages)))


class Pyrlm(Peer):
    name = "pyrlm"
    distribution = "pyrlm-runtime"
    import_statement = "import pyrlm_runtime"
    ready_statement = "from pyrlm_runtime import RLM"
    context_name = "P"
    batch_name = "llm_batch"  # Its `llm_query_batch` is sequential unless told otherwise.
    child_batch_name = "llm_batch"
    unable: ClassVar[Mapping[str, str]] = {"threads": "its cells cannot import threading"}

    def __init__(self) -> None:
        self._numbers = itertools.count()

    def finish(self, variable: str) -> str:
        return f"FINAL_VAR: {variable}"

    def run(self, model: StubModel, context: str) -> str:
        root, sub = Adapter(lambda _: model.ask_root()), Adapter(lambda _: model.ask_sub())
        answer, _ = self._framework(root, sub).run("q", library().Context.from_text(context))
        return str(answer)

    @contextmanager
    def trees(self, model: TreeModel, width: int | None) -> Iterator[Callable[[str], str]]:
        rlm = self._framework(
            by_turn(model.ask_root),
            by_turn(model.ask_child),
            recursive_subcalls=True,
            **({} if width is None else {"max_concurrent_subcalls": width}),
        )
        context_of = library().Context.from_text
        yield lambda context: str(rlm.run(QUESTION, context_of(context))[0])

    def _framework(self, root: Adapter, sub: Adapter, **settings: object) -> Any:
        pyrlm = library()
        return pyrlm.RLM(
            adapter=root,
            subcall_adapter=sub,
            policy=pyrlm.Policy(max_steps=NO_LIMIT, max_subcalls=NO_LIMIT, max_total_tokens=NO_LIMIT),
            # Its cache on disk is left on, as by default, but no run may profit from another.
            cache_dir=Path(f"cache-{next(self._numbers)}").absolute(),
            **settings,
        )


if __name__ == "__main__":
    measure_peer(Pyrlm())

"""pyrlm-runtime, run by its own interpreter. The stub is its `ModelAdapter`."""

from __future__ import annotations

import functools
import importlib
import itertools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peers.common import Peer, StubModel
from peers.probes import measure_peer

NO_LIMIT = 10**12


@functools.cache
def library() -> Any:
    return importlib.import_module("pyrlm_runtime")


class Adapter:
    """What pyrlm expects of a model. Root and sub-calls have an adapter each."""

    def __init__(self, ask: Callable[[], str]) -> None:
        self._ask = ask
        self._usage = library().Usage(1, 1, 2)

    def complete(self, _messages: object, **_: object) -> Any:
        return library().ModelResponse(text=self._ask(), usage=self._usage)


class Pyrlm(Peer):
    name = "pyrlm"
    distribution = "pyrlm-runtime"
    import_statement = "import pyrlm_runtime"
    ready_statement = "from pyrlm_runtime import RLM"
    context_name = "P"
    batch_name = "llm_batch"  # Its `llm_query_batch` is sequential unless told otherwise.
    unable: ClassVar[Mapping[str, str]] = {"threads": "its cells cannot import threading"}

    def __init__(self) -> None:
        self._numbers = itertools.count()

    def finish(self, variable: str) -> str:
        return f"FINAL_VAR: {variable}"

    def run(self, model: StubModel, context: str) -> str:
        pyrlm = library()
        rlm = pyrlm.RLM(
            adapter=Adapter(model.ask_root),
            subcall_adapter=Adapter(model.ask_sub),
            policy=pyrlm.Policy(max_steps=NO_LIMIT, max_subcalls=NO_LIMIT, max_total_tokens=NO_LIMIT),
            # Its cache on disk is left on, as by default, but no run may profit from another.
            cache_dir=Path(f"cache-{next(self._numbers)}").absolute(),
        )
        answer, _ = rlm.run("q", pyrlm.Context.from_text(context))
        return str(answer)


if __name__ == "__main__":
    measure_peer(Pyrlm())

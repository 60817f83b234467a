"""rlms and its DockerREPL, run by its own interpreter. The stub is the client of its LMHandler."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peers.common import StubModel, UnmeasurableError
from peers.docker_probes import Sandbox, Side, measure
from peers.rlms import Client
from setup_docker import IMAGE


class RlmsSandbox(Sandbox):
    def __init__(self, handler: Any, repl: Any) -> None:
        self._handler = handler
        self._repl = repl

    def execute(self, code: str) -> str:
        result = self._repl.execute_code(code)
        if result.stderr:
            raise UnmeasurableError(f"a cell failed: {result.stderr[-120:]}")
        return str(result.stdout)

    def load(self, text: str) -> None:
        self._repl.load_context(text)

    def close(self) -> None:
        self._repl.cleanup()
        self._handler.stop()


class Rlms(Side):
    name = "rlms"
    distribution = "rlms"
    unable: ClassVar[Mapping[str, tuple[str, Sequence[str]]]] = {
        "runaway": ("its cells have no deadline", ("loop_ms", "immune_ms", "bomb_ms")),
    }

    def open(self, model: StubModel) -> Sandbox:
        # Not import statements: to a type checker this name is another package.
        types = importlib.import_module("rlm.core.types")
        handler = importlib.import_module("rlm.core.lm_handler").LMHandler(Client(model, types))
        address = handler.start()
        kind = importlib.import_module("rlm.environments.docker_repl").DockerREPL
        return RlmsSandbox(handler, kind(image=IMAGE, lm_handler_address=address))


if __name__ == "__main__":
    measure(Rlms())

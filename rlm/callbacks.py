"""Functions of the user's, told when turns and child runs begin and end.

A subscriber of events like any other, for whoever wants four calls and no events.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

from .compaction import asks_for_summary
from .events import AnyEvent, ModelRequested, RunFinished, RunStarted

log = logging.getLogger("rlm")

PREVIEW = 80
"""Characters of a child's prompt that a function is told."""

Function = Callable[..., Any]


class Callbacks:
    """Calls them on the core's thread, where they must not wait. One that raises is logged, and goes on.

    Turns are numbered from 1 in each run; a run that a limit ends may have one more, for its best
    answer. A child run begins with its first request.
    """

    def __init__(
        self,
        on_iteration_start: Function | None = None,
        on_iteration_complete: Function | None = None,
        on_subcall_start: Function | None = None,
        on_subcall_complete: Function | None = None,
    ) -> None:
        self._functions = {
            "on_iteration_start": on_iteration_start,
            "on_iteration_complete": on_iteration_complete,
            "on_subcall_start": on_subcall_start,
            "on_subcall_complete": on_subcall_complete,
        }
        self._runs: dict[str, _Progress] = {}

    def __bool__(self) -> bool:
        return any(self._functions.values())

    def __call__(self, event: AnyEvent) -> None:
        if isinstance(event, RunStarted):
            self._runs[event.run] = _Progress(event.depth, event.question or event.prompt or "")
        elif isinstance(event, ModelRequested) and event.kind == "root" and event.run in self._runs:
            self._turn(self._runs[event.run], event)
        elif isinstance(event, RunFinished) and event.run in self._runs:
            self._end(self._runs.pop(event.run), event)

    def _turn(self, run: _Progress, event: ModelRequested) -> None:
        if asks_for_summary(event.messages):
            return
        self._complete(run, event.at)
        if run.turn == 0 and run.depth > 0:
            run.model = event.model
            self._call("on_subcall_start", run.depth, run.model, run.prompt[:PREVIEW])
        run.turn, run.began = run.turn + 1, event.at
        self._call("on_iteration_start", run.depth, run.turn)

    def _complete(self, run: _Progress, at: float) -> None:
        if run.turn > 0:
            self._call("on_iteration_complete", run.depth, run.turn, at - run.began)

    def _end(self, run: _Progress, event: RunFinished) -> None:
        self._complete(run, event.at)
        if run.depth == 0:
            return
        if run.turn == 0:  # it failed before that
            self._call("on_subcall_start", run.depth, run.model, run.prompt[:PREVIEW])
        self._call("on_subcall_complete", run.depth, run.model, event.seconds, event.error)

    def _call(self, name: str, *arguments: Any) -> None:
        function = self._functions[name]
        if function is None:
            return
        try:
            function(*arguments)
        except Exception:  # a boundary: somebody else's code must not end a paid run
            log.exception("%s failed", name)


@dataclasses.dataclass
class _Progress:
    """How far a run has come."""

    depth: int
    prompt: str
    model: str = "unknown"
    turn: int = 0
    began: float = 0.0

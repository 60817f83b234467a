"""A run's events, told as its iterations: each with its cells, and the calls that they made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from rlm.client import ModelUsageSummary, UsageSummary
from rlm.compaction import asks_for_summary
from rlm.events import (
    AnyEvent,
    CellFinished,
    CellStarted,
    ModelReplied,
    ModelRequested,
    RunFinished,
    RunStarted,
)

from .types import CodeBlock, REPLResult, RLMChatCompletion, RLMIteration, RLMMetadata


class Trajectory:
    """A subscriber of one run tree's events; ``on_iteration`` is told each turn of the root when it is over.

    A child run is one of the calls of its parent's cell, with a trajectory of its own.
    """

    def __init__(self, metadata: RLMMetadata, on_iteration: Callable[[RLMIteration], None]) -> None:
        self._metadata = metadata
        self._on_iteration = on_iteration
        self._runs: dict[str, _Run] = {}
        self._root: _Run | None = None

    def __call__(self, event: AnyEvent) -> None:
        if isinstance(event, RunStarted):
            self._begin(event)
        elif event.run in self._runs:
            self._runs[event.run].see(event)
        if isinstance(event, RunFinished):
            self._end(event)

    def trajectory(self) -> dict[str, Any]:
        """How the run was set up, and its iterations so far."""
        metadata = self._metadata.to_dict()
        return {"run_metadata": metadata, "iterations": self._root.iterations if self._root else []}

    def _begin(self, event: RunStarted) -> None:
        parent = self._runs.get(event.parent or "")
        if parent is None:
            began = datetime.fromisoformat(event.started) if event.started else datetime.now(UTC)
            self._root = self._runs[event.run] = _Run(event, began, self._on_iteration)
        else:
            self._runs[event.run] = _Run(event, parent.began, lambda iteration: None)
            parent.calls.begin(event.run)

    def _end(self, event: RunFinished) -> None:
        run, parent = self._runs.pop(event.run, None), self._runs.get(event.parent or "")
        if run is None or parent is None:
            return
        add(parent.usage, run.usage)
        metadata = dataclasses.replace(self._metadata, root_model=run.model)
        completion = RLMChatCompletion(
            run.model, run.prompt, event.response or "", run.usage, event.seconds,
            metadata={"run_metadata": metadata.to_dict(), "iterations": run.iterations}, error=event.error,
        )  # fmt: skip
        parent.calls.end(event.run, completion)


class Calls:
    """The calls of one cell, in the order in which they were made, whenever their replies come."""

    def __init__(self) -> None:
        self._done: dict[int | str, RLMChatCompletion | None] = {}
        self._prompts: dict[int, str] = {}

    def see(self, event: AnyEvent) -> None:
        """A model call of the cell: it goes out, or comes back."""
        if isinstance(event, ModelRequested):
            self.begin(event.call)
            self._prompts[event.call] = event.messages[-1].content
        elif isinstance(event, ModelReplied):
            usage = UsageSummary()
            count(usage, event)
            prompt = self._prompts.pop(event.call, "")
            self.end(event.call, RLMChatCompletion(event.model, prompt, event.text, usage, event.seconds))

    def begin(self, call: int | str) -> None:
        """A call, or a child run, takes its place."""
        self._done[call] = None

    def end(self, call: int | str, completion: RLMChatCompletion) -> None:
        """What came of it."""
        self._done[call] = completion

    def done(self) -> list[RLMChatCompletion]:
        """Those that came back with a reply, and child runs that ended."""
        return [completion for completion in self._done.values() if completion is not None]


class _Block:
    """One cell."""

    def __init__(self, code: str) -> None:
        self.code = code
        self.calls = Calls()
        self.finished: CellFinished | None = None

    def told(self, answer: str | None) -> CodeBlock:
        event = self.finished
        if event is None:  # the run ended before the cell did
            return CodeBlock(self.code, REPLResult("", "", {}, rlm_calls=self.calls.done()))
        result = REPLResult(
            event.stdout, with_error(event.stderr, event.error), {}, event.seconds, self.calls.done(),
            answer if event.final else None,
        )  # fmt: skip
        return CodeBlock(self.code, result)


class _Turn:
    """One request of a run, its reply, and the cells in that."""

    def __init__(self, prompt: list[dict[str, str]], at: float) -> None:
        self.prompt = prompt
        self.began = self.ended = at
        self.response: str | None = None
        self.blocks: list[_Block] = []


class _Run:
    """One run, as far as it has come."""

    def __init__(
        self, event: RunStarted, began: datetime, on_iteration: Callable[[RLMIteration], None]
    ) -> None:
        self.began = began
        """When the tree did."""
        self.prompt = event.question or event.prompt or ""
        self.model = "unknown"
        self.usage = UsageSummary()
        self.iterations: list[dict[str, Any]] = []
        self.calls = Calls()
        """Those of the cell that runs, or ran last."""
        self._on_iteration = on_iteration
        self._messages: list[dict[str, str]] = []
        self._turn: _Turn | None = None

    def see(self, event: AnyEvent) -> None:
        if isinstance(event, ModelReplied):
            count(self.usage, event)
        if isinstance(event, RunFinished):
            self._close(event.response if event.error is None else None)
        elif isinstance(event, ModelRequested) and event.kind == "root":
            self._open(event)
        elif isinstance(event, ModelRequested | ModelReplied) and event.kind == "sub":
            self.calls.see(event)
        elif self._turn is not None:
            self._add(self._turn, event)

    def _open(self, event: ModelRequested) -> None:
        self._close(None)
        self.model = event.model
        said = [{"role": message.role, "content": message.content} for message in event.messages]
        self._messages = self._messages[: event.prefix] + said
        if not asks_for_summary(event.messages):
            self._turn = _Turn(self._messages, event.at)

    def _add(self, turn: _Turn, event: AnyEvent) -> None:
        """A reply to the run's request, or one of the cells in it."""
        turn.ended = event.at
        if isinstance(event, ModelReplied):
            turn.response = event.text
        elif isinstance(event, CellStarted):
            turn.blocks.append(_Block(event.code))
            self.calls = turn.blocks[-1].calls
        elif isinstance(event, CellFinished):
            turn.blocks[-1].finished = event

    def _close(self, answer: str | None) -> None:
        """The turn is over, and so is the run if there is an answer."""
        turn, self._turn = self._turn, None
        if turn is None or turn.response is None:
            return
        blocks = [block.told(answer) for block in turn.blocks]
        iteration = RLMIteration(turn.prompt, turn.response, blocks, answer, turn.ended - turn.began)
        at = self.began + timedelta(seconds=turn.ended)
        self.iterations.append(entry(iteration, len(self.iterations) + 1, at))
        self._on_iteration(iteration)


def entry(iteration: RLMIteration, number: int, at: datetime) -> dict[str, Any]:
    """An iteration as a trajectory, and a line of a log, have it."""
    return {
        "type": "iteration",
        "iteration": number,
        "timestamp": at.isoformat(),
        **iteration.to_dict(),
    }


def with_error(stderr: str, error: str | None) -> str:
    """What a cell wrote to stderr, its error's type and message at the end."""
    return stderr if error is None else f"{stderr}\n{error}"


def count(summary: UsageSummary, event: ModelReplied) -> None:
    """Add a reply to the accounts, as the ledger does."""
    usage = summary.model_usage_summaries.setdefault(event.model, ModelUsageSummary())
    if event.cached:
        usage.add_hit()
    else:
        usage.add(event.usage)


def add(total: UsageSummary, part: UsageSummary) -> None:
    """Add the accounts of a child run to its parent's."""
    for model, usage in part.model_usage_summaries.items():
        mine = total.model_usage_summaries.setdefault(model, ModelUsageSummary())
        for name, value in usage.to_dict().items():
            setattr(mine, name, (getattr(mine, name) or 0) + value)

"""What happened in a run, typed. The trace is the list of these, and nothing else.

The loop, the handler and the environments only emit; console, files and metrics
subscribe. An event never holds a secret: requests are recorded as messages, never as
what a client sends over the network.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from . import jsonl
from .client import Finish, Message, Usage, UsageSummary

log = logging.getLogger("rlm")


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", omit_defaults=True):
    """Something that happened. ``at`` is in seconds since the start of the run tree."""

    at: float
    run: str
    """The run it belongs to; a child run has an id of its own."""
    parent: str | None = None
    """The run that started this one; None for the root."""
    depth: int = 0


class RunStarted(Event, frozen=True, kw_only=True, tag="run_started"):
    """A run, or a child run, begins."""

    question: str | None
    context: str
    """What the context is, in words: its type and size, never its content."""
    backend: str
    environment: str
    started: str | None = None
    """Wall-clock time, ISO 8601, on the root run only."""
    prompt: str | None = None
    """Of a child run without a question: what the cell asked it to do, which is its context as well."""


class SandboxStarted(Event, frozen=True, kw_only=True, tag="sandbox_started"):
    """The run's environment is up, with its contexts loaded."""

    environment: str
    level: str
    enforced: list[str]
    missing: list[str]
    seconds: float


class ModelRequested(Event, frozen=True, kw_only=True, tag="model_requested"):
    """A call goes out, or would have: one whose reply is ``cached`` is numbered and recorded like any other,
    at the moment of its reply. Histories grow at their end, so only what is new is recorded."""

    call: int
    kind: Literal["root", "sub"]
    model: str
    prefix: int
    """How many messages of this run's previous root request stand before ``messages``."""
    messages: list[Message]


class ModelOutput(Event, frozen=True, kw_only=True, tag="model_output"):
    """A model has written something: a batch, which the reply repeats, unless the attempt fails."""

    call: int
    text: str


class ModelRetried(Event, frozen=True, kw_only=True, tag="model_retried"):
    """An attempt of a call came to nothing; another one follows."""

    call: int
    kind: Literal["root", "sub"]
    model: str
    attempt: int
    error: str
    sent: bool
    """Whether it may have been billed."""
    wait: float
    """Seconds until the next attempt, at least."""


class ModelReplied(Event, frozen=True, kw_only=True, tag="model_replied"):
    """A call came back."""

    call: int
    kind: Literal["root", "sub"]
    model: str
    text: str
    finish: Finish
    usage: Usage
    seconds: float
    cached: bool = False
    """Whether no call was made: the reply was in the cache, or an identical call's. ``usage`` is then what
    that call used, at no cost, and ``seconds`` how long it took to be found or waited for."""


class ModelFailed(Event, frozen=True, kw_only=True, tag="model_failed"):
    """A call came back with an error."""

    call: int
    kind: Literal["root", "sub"]
    model: str
    error: str
    seconds: float


class CellStarted(Event, frozen=True, kw_only=True, tag="cell_started"):
    """A code block goes to the sandbox."""

    cell: int
    iteration: int
    code: str


class CellOutput(Event, frozen=True, kw_only=True, tag="cell_output"):
    """A running cell has printed something: a batch, which the cell's result repeats."""

    cell: int
    stream: Literal["stdout", "stderr"]
    text: str


class CellFinished(Event, frozen=True, kw_only=True, tag="cell_finished"):
    """A code block is done, one way or another."""

    cell: int
    iteration: int
    stdout: str = ""
    stderr: str = ""
    echo: str = ""
    error: str | None = None
    traceback: str = ""
    lost: list[str] = []
    final: bool = False
    seconds: float


class Restored(Event, frozen=True, kw_only=True, tag="restored"):
    """The sandbox of a conversation was gone, and another took its place, with what had been saved of it."""

    reason: str
    """Why it was gone."""
    lost: list[str]


class AnswerRejected(Event, frozen=True, kw_only=True, tag="answer_rejected"):
    """A final answer was submitted, and is not what was asked for."""

    iteration: int
    reason: str


class Compacted(Event, frozen=True, kw_only=True, tag="compacted"):
    """A conversation has been summed up, by a root request of its own, and goes on from the summary."""

    number: int
    """The first of a run is 1."""
    before: int
    """Tokens of the request that would have been the next one; estimated."""
    after: int
    """Tokens of the one that is."""


class LimitReached(Event, frozen=True, kw_only=True, tag="limit_reached"):
    """A limit stopped something."""

    limit: str
    message: str


class Warned(Event, frozen=True, kw_only=True, tag="warned"):
    """Something the user should know that stops nothing."""

    message: str


class RunFinished(Event, frozen=True, kw_only=True, tag="run_finished"):
    """A run is over. ``stopped`` says why: a final answer, a limit, or an error."""

    stopped: str
    response: str | None
    error: str | None = None
    iterations: int
    seconds: float
    usage: UsageSummary
    """Of the whole tree up to now."""


AnyEvent = (
    RunStarted
    | SandboxStarted
    | ModelRequested
    | ModelOutput
    | ModelRetried
    | ModelReplied
    | ModelFailed
    | CellStarted
    | CellOutput
    | CellFinished
    | Restored
    | AnswerRejected
    | Compacted
    | LimitReached
    | Warned
    | RunFinished
)

Subscriber = Callable[[Any], None]


class Trace:
    """The events of one run tree, in order."""

    def __init__(self, events: Iterable[AnyEvent] = ()) -> None:
        self.events: list[AnyEvent] = list(events)

    def __iter__(self) -> Iterator[AnyEvent]:
        return iter(self.events)

    def __len__(self) -> int:
        return len(self.events)

    def of_run(self, run: str) -> list[AnyEvent]:
        """The events of one run, without those of its children."""
        return [event for event in self.events if event.run == run]

    def children(self, run: str) -> list[str]:
        """The ids of the runs that ``run`` started."""
        started = (event for event in self.events if isinstance(event, RunStarted))
        return [event.run for event in started if event.parent == run]

    def save(self, path: str | Path) -> None:
        """Write as JSON lines, readable by the owner only. A file of that name is replaced."""
        Path(path).unlink(missing_ok=True)
        with JSONLWriter(path) as writer:
            for event in self.events:
                writer(event)

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read JSON lines that `save` or a `JSONLWriter` wrote.

        A line that was cut short (the disk was full, the host was killed) is left out, with a
        log entry. One that is whole and no event raises msgspec.ValidationError.
        """
        return cls(event for _, event in jsonl.read(path, msgspec.json.Decoder(AnyEvent)))


class JSONLWriter(jsonl.Appender):
    """A subscriber that appends every event to a file, one JSON object a line.

    Lines are written as events happen, so that a run that dies leaves all but its last
    moment. A full disk stops the recording, with one warning, and not the run.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path, "trace")

    def __call__(self, event: AnyEvent) -> None:
        self.append(event)


class EventBus:
    """Takes the events of one run tree, keeps them, and passes them on."""

    def __init__(self, subscribers: Iterable[Subscriber] = ()) -> None:
        self.trace = Trace()
        self._subscribers = list(subscribers)
        self._start = time.monotonic()

    def now(self) -> float:
        """Seconds since the run tree began."""
        return time.monotonic() - self._start

    def emit(self, event: AnyEvent) -> None:
        """Record an event and tell every subscriber; one that raises is dropped, with a log entry."""
        self.trace.events.append(event)
        for subscriber in tuple(self._subscribers):
            try:
                subscriber(event)
            except Exception:  # a boundary: somebody else's code must not end a paid run
                log.exception("an event subscriber failed and is dropped: %r", subscriber)
                if subscriber in self._subscribers:  # it may have failed once more meanwhile
                    self._subscribers.remove(subscriber)

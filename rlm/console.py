"""Live progress on a terminal: one status line, and a line for each turn and each cell.

A subscriber of events like any other. What models and cells say is printed as plain
text: control characters are shown, not obeyed, and nothing is read as markup.
"""

from __future__ import annotations

import threading

from rich.console import Console as Terminal
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .events import (
    AnswerRejected,
    AnyEvent,
    CellFinished,
    CellStarted,
    Compacted,
    LimitReached,
    ModelFailed,
    ModelReplied,
    ModelRequested,
    RunFinished,
    RunStarted,
    SandboxStarted,
    Warned,
)

LINE_WIDTH = 100
REFRESH_PER_SECOND = 8


class Console:
    """Prints what happens to standard error, so that standard output stays the answer's."""

    def __init__(self, terminal: Terminal | None = None) -> None:
        self._terminal = terminal or Terminal(stderr=True, highlight=False, markup=False)
        self._live: Live | None = None
        self._lock = threading.Lock()
        self._at = 0.0
        self._turns = self._cells = self._in_flight = self._calls = self._tokens = self._children = 0
        self._hits = 0

    def __call__(self, event: AnyEvent) -> None:
        with self._lock:
            self._at = event.at
            self._count(event)
            line = _line(event)
            if isinstance(event, RunStarted) and event.parent is None:
                self._begin()
            if line is not None:
                self._print(event, line)
            if self._live is not None:
                self._live.update(self._status())
            if isinstance(event, RunFinished) and event.parent is None:
                self._end()

    def _begin(self) -> None:
        if self._terminal.is_terminal:
            self._live = Live(
                self._status(), console=self._terminal, refresh_per_second=REFRESH_PER_SECOND, transient=True
            )
            self._live.start()

    def _end(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._terminal.print(self._summary())

    def _count(self, event: AnyEvent) -> None:
        if isinstance(event, ModelRequested):
            self._calls += 1
            self._in_flight += 1
            self._turns += event.kind == "root" and event.parent is None
        elif isinstance(event, ModelReplied):
            self._in_flight -= 1
            if event.cached:  # and no call after all
                self._calls -= 1
                self._hits += 1
            else:
                self._tokens += event.usage.input_tokens + event.usage.output_tokens
        elif isinstance(event, ModelFailed):
            self._in_flight -= 1
        elif isinstance(event, CellFinished):
            self._cells += 1
        elif isinstance(event, RunStarted):
            self._children += event.parent is not None

    def _summary(self) -> Text:
        hits = f"{self._hits} replies from the cache, " if self._hits else ""
        return Text(
            f"{self._turns} turns, {self._cells} cells, {self._calls} model calls, {hits}"
            f"{self._children} child runs, {self._tokens:,} tokens, {self._at:.2f} s"
        )

    def _status(self) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_row(
            f"turn {self._turns}", f"cells {self._cells}", f"calls {self._calls}",
            f"in flight {self._in_flight}", f"tokens {self._tokens:,}", f"{self._at:.1f} s",
        )  # fmt: skip
        return table

    def _print(self, event: AnyEvent, line: str) -> None:
        indent = "    " * event.depth
        self._terminal.print(Text(f"{event.at:7.2f}s  {indent}{line}"), soft_wrap=True)


def _line(event: AnyEvent) -> str | None:
    """One line for an event worth a line."""
    if isinstance(event, RunStarted):
        return (
            f"run {event.run}: {visible(event.question or 'the task in the context')}, over {event.context}"
        )
    if isinstance(event, SandboxStarted):
        return f"sandbox {event.environment} ({event.level}) in {event.seconds * 1000:.0f} ms"
    if isinstance(event, CellStarted):
        return f"cell {event.cell}: {visible(event.code)}"
    if isinstance(event, CellFinished):
        outcome = event.error or event.stdout or event.echo or "done"
        return f"cell {event.cell} -> {visible(outcome)} ({event.seconds:.2f} s)"
    if isinstance(event, ModelFailed):
        return f"call {event.call} failed: {visible(event.error)}"
    if isinstance(event, AnswerRejected):
        return f"answer rejected: {visible(event.reason)}"
    if isinstance(event, Compacted):
        return f"conversation summed up: {event.before:,} tokens, now {event.after:,}"
    if isinstance(event, LimitReached | Warned):
        return visible(event.message)
    if isinstance(event, RunFinished):
        return f"run {event.run} {event.stopped}: {visible(event.response or event.error or '')}"
    return None


def visible(text: str) -> str:
    """The beginning of a text on one line, control characters written out."""
    lines = text.strip().split("\n")
    first = lines[0] + (f" [+{len(lines) - 1} lines]" if len(lines) > 1 else "")
    clipped = first if len(first) <= LINE_WIDTH else first[:LINE_WIDTH] + "..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in clipped)

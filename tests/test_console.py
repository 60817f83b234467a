"""The terminal display, fed with events."""

from __future__ import annotations

import io

from rich.console import Console as Terminal

from rlm import events
from rlm.client import Usage, UsageSummary
from rlm.console import Console, visible


def shown(*happened: events.AnyEvent) -> str:
    stream = io.StringIO()
    console = Console(Terminal(file=stream, width=200, markup=False, highlight=False))
    for event in happened:
        console(event)
    return stream.getvalue()


def test_a_cell_is_shown_by_its_first_line_and_its_outcome() -> None:
    text = shown(
        events.CellStarted(at=1, run="r", cell=3, iteration=1, code="a = 1\nb = 2"),
        events.CellFinished(at=2, run="r", cell=3, iteration=1, stdout="out", seconds=0.5),
    )
    assert "cell 3: a = 1 [+1 lines]" in text
    assert "cell 3 -> out (0.50 s)" in text


def test_the_end_sums_the_run_up() -> None:
    finished = events.RunFinished(
        at=2, run="r", stopped="final", response="yes", iterations=1, seconds=2, usage=UsageSummary()
    )
    requested = events.ModelRequested(at=1, run="r", call=1, kind="root", model="m", prefix=0, messages=[])
    assert "1 turns, 0 cells, 1 model calls, 0 child runs, 0 tokens, 2.00 s" in shown(requested, finished)


def test_what_was_found_in_the_cache_is_no_call() -> None:
    finished = events.RunFinished(
        at=2, run="r", stopped="final", response="yes", iterations=1, seconds=2, usage=UsageSummary()
    )
    requested = events.ModelRequested(at=1, run="r", call=1, kind="sub", model="m", prefix=0, messages=[])
    replied = events.ModelReplied(
        at=1, run="r", call=1, kind="sub", model="m", text="x", finish="stop", usage=Usage(5, 5), seconds=1,
        cached=True,
    )  # fmt: skip
    text = shown(requested, replied, finished)
    assert "0 turns, 0 cells, 0 model calls, 1 replies from the cache, 0 child runs, 0 tokens" in text


def test_control_characters_are_written_out() -> None:
    assert visible("\x1b]0;title\x07") == "\\x1b]0;title\\x07"


def test_markup_is_shown_as_it_is() -> None:
    assert "[/bold]" in shown(events.Warned(at=0, run="r", message="[/bold]"))


def test_child_runs_are_indented() -> None:
    started = events.RunStarted(
        at=0, run="c", parent="r", depth=1, question="q", context="x", backend="b", environment="e"
    )
    assert "      run c: q, over x" in shown(started)

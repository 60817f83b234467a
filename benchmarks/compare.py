"""Run ours, the floors and the peers in turns, and print one table with the targets.

Figures of one machine mean little alone: each is read against those taken next to it. Hence the
order: for every probe all sides, one right after the other, then the next probe, then the next
round. What stands after `--` on the command line is handed to every probe.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers.probes import PROBES
from setup_peers import BENCH, PEERS, interpreter

HERE = Path(__file__).resolve().parent
OURS = "ours"
FLOOR = "floor"
NOTHING = "-"
BACKSTOP_S = 600.0  # Probes end themselves; this is for a script that cannot.
WIDE = 200  # Columns of a table that goes to a file.
QUICK = (
    *("--n", "20", "--reps", "2", "--long", "40", "--variables", "100", "--context-mb", "5"),
    *("--prompts", "400", "--threads", "8", "--runs", "10", "--children", "8"),
)


# --- figures and targets --------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A factor times a figure taken in the same session; without one, the factor itself."""

    factor: float
    side: str = ""
    probe: str = ""
    value: str = ""


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    probe: str
    value: str
    label: str
    target: Target | None = None
    higher_is_better: bool = False
    #: Further targets; the strictest of all counts.
    also: Sequence[Target] = ()
    #: Whether the worst of all rounds is shown: a median hides what goes wrong now and then.
    worst: bool = False

    def of_rounds(self, figures: Sequence[float]) -> float:
        """The one to show."""
        if not self.worst:
            return statistics.median(figures)
        return min(figures) if self.higher_is_better else max(figures)


@dataclass(frozen=True)
class Suite:
    """What is compared: the lines of its table, and who takes the figures of a probe."""

    figures: Sequence[Figure]
    probes: Sequence[str]
    peers: Sequence[str]
    #: Which floor is taken next to which probe.
    floors: Mapping[str, str]
    quick: Sequence[str]
    #: What the names of its scripts end in.
    suffix: str = ""
    #: Whether the floor's figures go by the names of ours, and get a column.
    shows_floor: bool = False
    #: Peers that need no environment of their own.
    at_home: Sequence[str] = ()


def own(factor: float, probe: str, value: str) -> Target:
    return Target(factor, OURS, probe, value)


def faster_than(side: str, times: float, probe: str, value: str) -> Target:
    return Target(1 / times, side, probe, value)


FIGURES = (
    Figure("cell", "gap_ms", "trivial cell, ms", faster_than("recursive_llm", 3.5, "cell", "gap_ms")),
    Figure("cell", "paced_ms", "… with a model of 20 ms, ms", own(1.0, "cell", "gap_ms")),
    Figure("cell", "gap_big_context_ms", "… large context, ms", own(1.5, "cell", "gap_ms")),
    Figure("cell", "gap_many_vars_ms", "… 1,000 variables, ms", own(1.2, "cell", "gap_ms")),
    Figure("cell", "gap_first10_ms", "… iterations 1-10, ms"),
    Figure("cell", "gap_last10_ms", "… last 10 of 1,000, ms", own(1.2, "cell", "gap_first10_ms")),
    Figure("run", "run_ms", "run of 10 turns, ms", faster_than("recursive_llm", 9, "run", "run_ms")),
    Figure("run", "finish_ms", "… after the last reply, ms", Target(5)),
    Figure("run", "start_ms", "… until the model's first call, ms"),
    Figure("run", "cold_run_ms", "… the first of a process, ms"),
    Figure("run", "cold_start_ms", "… … until the model's first call, ms"),
    Figure("run", "script_ms", "script of one run of 2 turns, ms"),
    Figure("query", "per_s", "llm_query, per s", Target(0.45, FLOOR, "query", "unix_per_s"), True),
    Figure("query", "p50_us", "… p50, µs", Target(2.4, FLOOR, "query", "unix_p50_us")),
    # Ideal is 10 calls of 20 ms one after the other, whatever the number of threads.
    Figure("threads", "seconds", "64 threads x 10 calls, s", Target(1.6 * 0.2)),
    Figure("threads", "slowest_s", "… slowest run, s"),
    Figure("batch", "seconds", "batch of 10,000, s", Target(1.2, FLOOR, "batch", "seconds")),
    Figure("batch", "peak_in_flight", "… in flight at most", None, True),
    Figure(
        "prompt10mb",
        "prompt_ms",
        "10 MB prompt, ms",
        faster_than("rlms", 3, "prompt10mb", "prompt_ms"),
    ),
    # Ideal is 4 calls of 100 ms one after the other.
    Figure("concurrent", "seconds", "200 runs at once, s", Target(2.75 * 0.4)),
    Figure("concurrent", "failed_runs", "… failed runs", Target(0), worst=True),
    Figure("concurrent", "pss_mb_per_run", "… memory per run, MB", Target(3)),
    Figure("recursion", "seconds", "50 children x 3 turns, s"),
    Figure("recursion", "of_ideal", "… times the ideal of 0.1 s", Target(3)),
    Figure("recursion", "first_s", "… the first of its object, s"),
    Figure(
        *("recursion", "answered", "… children that answered rightly"),
        *(Target(1, FLOOR, "recursion", "answered"), True),
        worst=True,
    ),
    Figure("recursion", "cpu_ms", "… processor's time per child, ms"),
    Figure("recursion", "default_seconds", "the same at the default width, s"),
    Figure("recursion", "default_of_ideal", "… times the ideal of 0.1 s"),
    Figure("recursion", "default_first_s", "… the first of its object, s"),
    Figure(
        *("recursion", "default_answered", "… children that answered rightly"),
        *(Target(1, FLOOR, "recursion", "answered"), True),
        worst=True,
    ),
    Figure("recursion", "default_cpu_ms", "… processor's time per child, ms"),
    Figure("children", "peak_processes", "50 children up at once, processes"),
    Figure("children", "processes_per_child", "… processes per child"),
    Figure("children", "pss_mb_per_child", "… memory per child, MB", Target(3)),
    Figure("children", "per_s", "10 batches of 50 children, per s", None, True),
    Figure(
        *("children", "answered", "… that answered rightly", own(1.0, "children", "asked"), True),
        worst=True,
    ),
    Figure("children", "own_mb_100", "… own memory after 100, MB"),
    Figure("children", "own_mb_300", "… … after 300, MB"),
    Figure("children", "own_mb_500", "… … after 500, MB", own(1.05, "children", "own_mb_100")),
    Figure("children", "below_mb_100", "… memory below after 100, MB"),
    Figure("children", "below_mb_300", "… … after 300, MB"),
    Figure("children", "below_mb_500", "… … after 500, MB", own(1.05, "children", "below_mb_100")),
    Figure(
        "context",
        "context_ms",
        "100 MB context, ms",
        faster_than("rlms", 1.9, "context", "context_ms"),
    ),
    Figure("import", "import_ms", "import, ms", Target(1.15, FLOOR, "import", "stdlib_ms")),
    Figure("import", "ready_ms", "import with its RLM class, ms"),
    Figure("import", "construct_ms", "… and an RLM constructed, ms"),
)

LOCAL = Suite(
    figures=FIGURES,
    probes=tuple(PROBES),
    peers=tuple(peer.name for peer in PEERS),
    floors={"query": "echo", "batch": "pool", "recursion": "tree", "import": "import"},
    quick=QUICK,
    shows_floor=True,
)


# --- running --------------------------------------------------------------------------------


@dataclass
class Results:
    """All figures of all rounds, by side, probe and value, and why some are missing."""

    taken: dict[tuple[str, str, str], list[float]] = field(default_factory=dict)
    why: dict[tuple[str, str, str], str] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)

    def add(self, side: str, probe: str, line: Mapping[str, Any]) -> None:
        self.lines.append({"side": side, **line})
        for value, figure in line.get("values", {}).items():
            if figure is not None:
                self.taken.setdefault((side, probe, value), []).append(figure)
        for value, reason in line.get("why", {}).items():
            self.why[side, probe, value] = reason

    def get(self, side: str, probe: str, value: str) -> float | None:
        """The median over the rounds."""
        figures = self.taken.get((side, probe, value))
        return statistics.median(figures) if figures else None

    def shown(self, side: str, figure: Figure) -> float | None:
        """What stands in the table."""
        figures = self.taken.get((side, figure.probe, figure.value))
        return figure.of_rounds(figures) if figures else None


def command_of(suite: Suite, side: str, probe: str) -> list[str | Path]:
    """What takes a probe of one side; raises LookupError if that side is not there."""
    name = f"{side}{suite.suffix}.py"
    if side == OURS:
        script, python = HERE / name, Path(sys.executable)
    elif side == FLOOR:
        script, python, probe = HERE / name, Path(sys.executable), suite.floors[probe]
    else:
        own = Path(sys.executable) if side in suite.at_home else interpreter(BENCH / "venvs" / side)
        script, python = HERE / "peers" / name, own
    for needed in (script, python):
        if not needed.exists():
            hint = "" if side in (OURS, FLOOR) else ": run setup_peers.py"
            raise LookupError(f"{needed.name} of {side} is not there{hint}")
    return [python, script, probe]


def environment_of(side: str) -> dict[str, str]:
    """A peer must not see our packages: two of them have the import name of ours."""
    if side in (OURS, FLOOR):
        return dict(os.environ)
    return {name: text for name, text in os.environ.items() if not name.startswith("PYTHON")}


def take(suite: Suite, side: str, probe: str, options: Sequence[str]) -> dict[str, Any]:
    """The line of one probe of one side, or a line that says why there is none."""
    try:
        done = subprocess.run(
            [*command_of(suite, side, probe), *options],
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            timeout=BACKSTOP_S,
            env=environment_of(side),
        )
        line: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (LookupError, ValueError, OSError, subprocess.SubprocessError) as error:
        values = [figure.value for figure in suite.figures if figure.probe == probe]
        line = {
            "peer": side,
            "probe": probe,
            "values": {},
            "why": dict.fromkeys(values, str(error)),
        }
    return line


def run(
    suite: Suite, probes: Sequence[str], peers: Sequence[str], rounds: int, options: Sequence[str]
) -> Results:
    results = Results()
    for turn in range(1, rounds + 1):
        for probe in probes:
            for side in (OURS, *([FLOOR] if probe in suite.floors else []), *peers):
                print(f"round {turn}/{rounds}: {probe}, {side}", file=sys.stderr, flush=True)
                results.add(side, probe, take(suite, side, probe, options))
    return results


# --- the table ------------------------------------------------------------------------------


def number(value: float | None) -> str:
    """Three digits are more than the noise leaves."""
    if value is None:
        return NOTHING
    return f"{value:,.0f}" if abs(value) >= 100 or value == 0 else f"{value:#.3g}".rstrip(".")


def worth(target: Target, results: Results) -> float | None:
    if not target.side:
        return target.factor
    reference = results.get(target.side, target.probe, target.value)
    return None if reference is None else target.factor * reference


def target_of(figure: Figure, results: Results) -> float | None:
    """The strictest of its targets, of those whose reference was taken."""
    targets = [worth(target, results) for target in (figure.target, *figure.also) if target is not None]
    known = [target for target in targets if target is not None]
    if not known:
        return None
    return max(known) if figure.higher_is_better else min(known)


def target_text(figure: Figure, target: float | None) -> str:
    if target is None:
        return NOTHING
    return f"{'≥' if figure.higher_is_better else '≤'} {number(target)}"


def verdict(figure: Figure, ours: float | None, target: float | None) -> str:
    if ours is None or target is None:
        return NOTHING
    return "met" if (ours >= target if figure.higher_is_better else ours <= target) else "MISSED"


def times(figure: Figure, ours: float | None, peer: float | None) -> str:
    """How many times better ours is: above 1 it is, below 1 the peer is."""
    better, worse = (peer, ours) if figure.higher_is_better else (ours, peer)
    if better is None or worse is None or better <= 0 or worse <= 0:
        return NOTHING
    return f"{number(worse / better)}x"


def row(figure: Figure, peers: Sequence[str], results: Results) -> list[str]:
    ours = results.shown(OURS, figure)
    target = target_of(figure, results)
    theirs = [results.shown(peer, figure) for peer in peers]
    return [
        figure.label,
        number(ours),
        target_text(figure, target),
        verdict(figure, ours, target),
        *(text for peer in theirs for text in (number(peer), times(figure, ours, peer))),
    ]


def show(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """With rich if it is there."""
    try:
        rich_console = importlib.import_module("rich.console")
        rich_table = importlib.import_module("rich.table")
    except ImportError:
        show_plain(header, rows)
        return
    table = rich_table.Table()
    for place, name in enumerate(header):
        table.add_column(name, justify="right" if place else "left", no_wrap=True)
    for cells in rows:
        table.add_row(*cells)
    console = rich_console.Console()
    if not console.is_terminal:
        console = rich_console.Console(width=WIDE)
    console.print(table)


def show_plain(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for cells in (header, ["-" * width for width in widths], *rows):
        first, *others = [
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        print("  ".join([first, *others]))


def show_reasons(results: Results) -> None:
    """Why values are missing, one line for a side and a reason."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for (side, probe, value), reason in results.why.items():
        if results.get(side, probe, value) is None:
            reasons.setdefault((side, probe, reason), []).append(value)
    for (side, probe, reason), values in reasons.items():
        print(f"{side}, {probe} ({', '.join(values)}): {reason}")


def show_all(suite: Suite, probes: Sequence[str], peers: Sequence[str], results: Results) -> None:
    others = [*([FLOOR] if suite.shows_floor else []), *peers]
    header = ["figure", OURS, "target", "", *(text for other in others for text in (other, "ours is"))]
    show(header, [row(figure, others, results) for figure in suite.figures if figure.probe in probes])
    show_reasons(results)
    load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, load {load}")


# --- the command line -----------------------------------------------------------------------


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is for us, and what stands after `--`."""
    if "--" not in argv:
        return list(argv), []
    place = list(argv).index("--")
    return list(argv[:place]), list(argv[place + 1 :])


def chosen(parser: argparse.ArgumentParser, names: Sequence[str], known: Sequence[str]) -> list[str]:
    """The named ones, all if none is named; ends the program for one that does not exist."""
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    return list(names or known)


def main(
    suite: Suite = LOCAL,
    description: str | None = __doc__,
    argv: Sequence[str] | None = None,
    fixed: Sequence[str] = (),
) -> None:
    """Compare, and print the table. ``fixed`` is handed to every probe, and is no size."""
    mine, options = split(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("probes", nargs="*", help=f"of {', '.join(suite.probes)} (default: all)")
    parser.add_argument("--peer", action="append", default=[], help="only this peer; repeatable")
    parser.add_argument("--rounds", type=int, default=1, help="rounds; medians are shown")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    parser.add_argument("--json", type=Path, help="write every line that was taken to this file")
    arguments = parser.parse_args(mine)
    probes = chosen(parser, arguments.probes, suite.probes)
    peers = chosen(parser, arguments.peer, suite.peers)
    sizes = [*suite.quick, *options] if arguments.quick else options
    results = run(suite, probes, peers, arguments.rounds, [*sizes, *fixed])
    if arguments.json:
        arguments.json.write_text("".join(json.dumps(line) + "\n" for line in results.lines))
    show_all(suite, probes, peers, results)
    if sizes:
        print(f"sizes other than those named above: {' '.join(sizes)}")


if __name__ == "__main__":
    main()

"""Rewrites the README's table of environments from reports of ``rlm environments check``.

``python -m rlm.testing.table [REPORT ...]``, in the root of the repository: the reports
given are first put, in a compact form, into ``docs/conformance``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .check import LEVELS

BEGIN = "<!-- environments: made by python -m rlm.testing.table -->"
END = "<!-- end of environments -->"


def compact(report: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a report: everything but the single tests that passed."""
    return {name: value for name, value in report.items() if name != "tests"}


def keep(report: dict[str, Any], root: Path) -> None:
    """Put a report into the repository."""
    if set(report["levels"]) < set(LEVELS):
        raise ConfigError("this report is not of every level: leave out --level")
    folder = root / "docs" / "conformance"
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(compact(report), indent=1, ensure_ascii=False, sort_keys=True)
    (folder / f"{report['environment']}.json").write_text(text + "\n", "utf-8")


def table(root: Path) -> str:
    """The table, of all reports in the repository."""
    rows = [
        ["name", "where cells run", "between a cell and the host", "first cell", *LEVELS],
        ["---"] * (4 + len(LEVELS)),
    ]
    for path in sorted((root / "docs" / "conformance").glob("*.json")):
        report = json.loads(path.read_text("utf-8"))
        about = report["about"]
        rows.append(
            [f"`{report['environment']}`", about["where"], about["between"], about["first_cell"]]
            + [_counts(report["levels"][level]) for level in LEVELS]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _counts(counts: dict[str, int]) -> str:
    others = [f"{counts[name]} {name}" for name in ("failed", "known failure", "skipped") if counts[name]]
    return ", ".join([f"{counts['passed']} passed", *others])


def rewrite(root: Path) -> str:
    """The README with the table that the reports make."""
    text = (root / "README.md").read_text("utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ConfigError(f"README.md has no lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{table(root)}\n{END}{after}"


def main(arguments: list[str], root: Path) -> None:
    """Keep the reports that are named, and rewrite the README."""
    for argument in arguments:
        keep(json.loads(Path(argument).read_text("utf-8")), root)
    (root / "README.md").write_text(rewrite(root), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:], Path.cwd())

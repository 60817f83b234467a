"""The accounts of one run tree: what may be used, and what was.

Everything runs on the core's one event loop, so that reserving is a plain, indivisible
step: of N calls made at once exactly as many go out as the limit allows.
"""

from __future__ import annotations

import copy
import dataclasses
import time

from .client import ModelUsageSummary, Usage, UsageSummary
from .errors import MaxCallsExceeded, TimeoutExceeded


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a run tree may use. None is unlimited."""

    max_iterations: int = 30
    """Turns of one run: the model's reply and the cells in it."""
    max_depth: int = 1
    """0: the model is called without a sandbox. 1: cells may call models. 2: and start child runs."""
    max_timeout: float | None = None
    """Seconds of wall time for the whole tree, running cells included."""
    cell_timeout: float | None = 120.0
    """Seconds one cell may compute. Waiting for models does not count."""
    max_calls: int | None = None
    """Model calls of the whole tree."""
    max_errors: int | None = None
    """Turns in a row whose cells fail."""
    max_output_chars: int = 20_000
    """Characters of a cell's output that the model is shown; head and tail are kept."""


class Ledger:
    """Counts calls and tokens of a run tree against its limits."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.calls = 0
        self.hits = 0
        self.in_flight = 0
        self._usage: dict[str, ModelUsageSummary] = {}
        self._deadline = None if limits.max_timeout is None else time.monotonic() + limits.max_timeout

    def reserve_call(self) -> int:
        """Take one call from the budget, before it is made. Returns its number, from 1, hits included.

        Raises MaxCallsExceeded or TimeoutExceeded when there is none left.
        """
        limits = self.limits
        if limits.max_calls is not None and self.calls >= limits.max_calls:
            raise MaxCallsExceeded(
                f"the run has made its {limits.max_calls} model calls: work with what there is, "
                "or raise max_calls",
                limit=limits.max_calls,
                used=self.calls,
            )
        seconds = self.seconds_left()
        if seconds is not None and seconds <= 0:
            raise self.out_of_time()
        self.calls += 1
        self.in_flight += 1
        return self.calls + self.hits

    def settle(self, model: str, usage: Usage) -> None:
        """A reserved call came back with this usage."""
        self.in_flight -= 1
        self._usage.setdefault(model, ModelUsageSummary()).add(usage)

    def hit(self, model: str) -> int:
        """A reply was had without a call, and takes nothing from the budget. Returns its number."""
        self.hits += 1
        self._usage.setdefault(model, ModelUsageSummary()).add_hit()
        return self.calls + self.hits

    def retried(self, model: str) -> None:
        """An attempt of a reserved call failed, and is made again."""
        self._usage.setdefault(model, ModelUsageSummary()).total_retries += 1

    def fail(self, model: str) -> None:
        """A reserved call came back without a reply. It stays counted: it may have been billed."""
        self.settle(model, Usage())

    def seconds_left(self) -> float | None:
        """Seconds until the deadline, negative once it has passed; None without one."""
        return None if self._deadline is None else self._deadline - time.monotonic()

    def out_of_time(self) -> TimeoutExceeded:
        """The error that says so."""
        limit = self.limits.max_timeout
        return TimeoutExceeded(f"the run took longer than max_timeout={limit:g} s", limit=limit)

    def usage(self) -> UsageSummary:
        """A copy of the accounts as they stand."""
        return UsageSummary({name: copy.copy(u) for name, u in self._usage.items()})

    def budget(self, iterations_left: int) -> dict[str, float | int | None]:
        """What is left, as a cell sees it."""
        limits, seconds = self.limits, self.seconds_left()
        return {
            "iterations": iterations_left,
            "calls": None if limits.max_calls is None else limits.max_calls - self.calls,
            "seconds": None if seconds is None else round(max(seconds, 0.0), 3),
            "calls_made": self.calls,
        }

"""The accounts of one run tree: what may be used, and what was.

Everything runs on the core's one event loop, so that reserving is a plain, indivisible
step: of N calls made at once exactly as many go out as the limit allows. Tokens and money
are reserved by an estimate before a call and settled by what it used; while calls are in
flight that may give some back, a call that does not fit waits for them.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from .client import CHARACTERS_PER_TOKEN, ModelInfo, ModelUsageSummary, Request, Usage, UsageSummary
from .errors import (
    BudgetExceeded,
    LimitExceeded,
    MaxCallsExceeded,
    MaxChildrenExceeded,
    MaxTokensExceeded,
    TimeoutExceeded,
)

if TYPE_CHECKING:
    from .limits import Limits

RESERVE = 0.05
"""Of tokens and money, what is kept for the last answer besides what a turn takes."""


class Allowance:
    """A quantity that calls draw on: what is used of it, and what calls in flight hold."""

    def __init__(self, limit: float | None, error: type[LimitExceeded], unit: str) -> None:
        self.limit = limit
        self.used = 0.0
        self.held = 0.0
        self.kept = 0.0
        self._error = error
        self._unit = unit

    @property
    def left(self) -> float:
        """What nobody has used or holds; infinite without a limit."""
        return math.inf if self.limit is None else self.limit - self.kept - self.used - self.held

    def exceeded(self) -> LimitExceeded:
        """The error that says that it is used up."""
        return self._error(
            f"the run has used {self.used:g} of its {self.limit:g} {self._unit}, and the next call may take "
            f"more than is left: work with what there is, or raise {self._error.name}",
            limit=self.limit,
            used=self.used,
        )


@dataclasses.dataclass
class Reservation:
    """What one call holds of tokens and money until it is settled."""

    tokens: float = 0.0
    cost: float = 0.0
    sub: bool = False


@dataclasses.dataclass
class _Seen:
    """What calls to one model, of the root or of cells, have been like: the most that an estimate goes by."""

    output: int = 0
    tokens_per_character: float = 1 / CHARACTERS_PER_TOKEN
    cost: float = 0.0

    def add(self, request: Request, usage: Usage) -> None:
        """One more."""
        characters = max(_characters(request), 1)
        self.output = max(self.output, usage.output_tokens)
        self.tokens_per_character = max(self.tokens_per_character, usage.input_tokens / characters)
        self.cost = max(self.cost, usage.cost or 0.0)

    def estimate(self, request: Request, info: ModelInfo) -> tuple[float, float]:
        """Tokens and dollars that a call may take."""
        read = math.ceil(_characters(request) * self.tokens_per_character)
        wrote = request.max_tokens or self.output
        if info.price is None:
            return read + wrote, self.cost
        return read + wrote, info.price.cost(Usage(read, wrote))


def _characters(request: Request) -> int:
    return sum(len(message.content) for message in request.messages)


class Ledger:
    """Counts what a run tree uses against its limits."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.calls = self.sub_calls = self.children = 0
        self.hits = 0
        self.in_flight = 0
        self.tokens = Allowance(limits.max_tokens, MaxTokensExceeded, "tokens")
        self.sub_tokens = Allowance(limits.max_sub_tokens, MaxTokensExceeded, "tokens of sub-calls")
        self.cost = Allowance(limits.max_budget, BudgetExceeded, "dollars")
        self._usage: dict[str, ModelUsageSummary] = {}
        self._seen: dict[tuple[str, bool], _Seen] = {}
        self._holding = self._numbers = 0
        self._turn = asyncio.Lock()
        self._settled = asyncio.Event()
        self._deadline = None if limits.max_timeout is None else time.monotonic() + limits.max_timeout
        self._kept_calls = 0
        self._keeps = limits.on_limit == "answer"
        if self._keeps:
            self._kept_calls = 1
            self._keep(Usage())

    # -- calls, counted one by one

    def reserve_call(self, *, sub: bool = False) -> int:
        """Take one call from the budget, before it is made. Returns its number, from 1, hits included.

        Raises MaxCallsExceeded or TimeoutExceeded when there is none left.
        """
        limits = self.limits
        if limits.max_calls is not None and self.calls >= limits.max_calls - self._kept_calls:
            raise _used_up(MaxCallsExceeded("", limit=limits.max_calls, used=self.calls), "model calls")
        if sub and limits.max_sub_calls is not None and self.sub_calls >= limits.max_sub_calls:
            error = MaxCallsExceeded("", limit=limits.max_sub_calls, used=self.sub_calls)
            raise _used_up(error, "calls of cells and child runs", "max_sub_calls")
        seconds = self.seconds_left()
        if seconds is not None and seconds <= 0:
            raise self.out_of_time()
        self.calls += 1
        self.sub_calls += sub
        self.in_flight += 1
        self._numbers += 1
        return self._numbers

    def give_back(self, *, sub: bool = False) -> None:
        """A call that was reserved has not been made."""
        self.calls -= 1
        self.sub_calls -= sub
        self.in_flight -= 1

    def reserve_child(self) -> None:
        """Take one child run from the budget. Raises MaxChildrenExceeded when there is none left."""
        limit = self.limits.max_children
        if limit is not None and self.children >= limit:
            raise _used_up(MaxChildrenExceeded("", limit=limit, used=self.children), "child runs")
        self.children += 1

    # -- tokens and money, by estimates

    async def reserve(
        self, request: Request, model: str, info: Callable[[str], ModelInfo], *, sub: bool
    ) -> Reservation:
        """Hold what a call may use of tokens and money; `settle` it in any case.

        A call that does not fit into what is left waits for those in flight, which may leave more
        than they hold; with none in flight it raises MaxTokensExceeded or BudgetExceeded. The first
        call of a model, and the first sub-call, is made alone, since nothing is known of what it takes.
        """
        reservation = Reservation(sub=sub)
        if self._is_unlimited:
            return reservation
        async with self._turn:  # first come, first served
            while (error := self._hold(reservation, request, model, info(model))) is not None:
                if not self._holding:
                    raise error
                self._settled.clear()
                await self._settled.wait()
        return reservation

    @property
    def _is_unlimited(self) -> bool:
        limits = self.limits
        return limits.max_tokens is None and limits.max_sub_tokens is None and limits.max_budget is None

    def _hold(
        self, reservation: Reservation, request: Request, model: str, info: ModelInfo
    ) -> LimitExceeded | None:
        """Hold an estimate; or nothing, and say what is lacking."""
        seen = self._seen.get((model, reservation.sub))
        drawn = [self.tokens, self.cost, *([self.sub_tokens] if reservation.sub else [])]
        empty = next((allowance for allowance in drawn if allowance.left <= 0), None)
        if empty is not None:
            return empty.exceeded()
        if seen is None:  # nobody knows: everything, which only fits alone
            if self._holding:
                return drawn[0].exceeded()
            tokens = min(self.tokens.left, self.sub_tokens.left) if reservation.sub else self.tokens.left
            cost = self.cost.left
        else:
            tokens, cost = seen.estimate(request, info)
        for allowance in drawn:
            wanted = cost if allowance is self.cost else tokens
            if wanted > allowance.left:
                return allowance.exceeded()
        reservation.tokens = tokens if math.isfinite(tokens) else 0.0
        reservation.cost = cost if math.isfinite(cost) else 0.0
        self._add(reservation, 1)
        return None

    def _add(self, reservation: Reservation, sign: int) -> None:
        self._holding += sign
        self.tokens.held += sign * reservation.tokens
        self.cost.held += sign * reservation.cost
        if reservation.sub:
            self.sub_tokens.held += sign * reservation.tokens

    def release(self, reservation: Reservation) -> None:
        """Give back what a call held; what it used is told by `settle`."""
        if not self._is_unlimited:
            self._add(reservation, -1)
            self._settled.set()

    def settle(self, model: str, usage: Usage, *, sub: bool = False) -> None:
        """A reserved call came back with this usage."""
        self.in_flight -= 1
        self._usage.setdefault(model, ModelUsageSummary()).add(usage)
        tokens = usage.input_tokens + usage.output_tokens
        self.tokens.used += tokens
        self.sub_tokens.used += tokens if sub else 0
        self.cost.used += usage.cost or 0.0

    def learn(self, model: str, request: Request, usage: Usage, *, sub: bool = False) -> None:
        """A call of this model used so much: what later ones of its kind are estimated by."""
        self._seen.setdefault((model, sub), _Seen()).add(request, usage)
        if self._keeps and not sub:
            self._keep(usage)

    def hit(self, model: str) -> int:
        """A reply was had without a call, and takes nothing from the budget. Returns its number."""
        self.hits += 1
        self._usage.setdefault(model, ModelUsageSummary()).add_hit()
        self._numbers += 1
        return self._numbers

    def retried(self, model: str) -> None:
        """An attempt of a reserved call failed, and is made again."""
        self._usage.setdefault(model, ModelUsageSummary()).total_retries += 1

    def fail(self, model: str, *, billed: bool = True) -> None:
        """A call came back without a reply. It stays counted, and may have been ``billed``."""
        self.settle(model, Usage(cost=None if billed else 0.0))

    def _keep(self, turn: Usage) -> None:
        """Keep enough for the last answer, which takes about as much as the turn before it."""
        tokens = turn.input_tokens + turn.output_tokens
        self.tokens.kept = (1 + RESERVE) * tokens + RESERVE * (self.limits.max_tokens or 0)
        self.cost.kept = (1 + RESERVE) * (turn.cost or 0.0) + RESERVE * (self.limits.max_budget or 0.0)

    def open_reserve(self) -> None:
        """From now on what was kept for the last answer may be used."""
        self._keeps, self._kept_calls = False, 0
        self.tokens.kept = self.cost.kept = 0.0

    # -- time

    def seconds_left(self) -> float | None:
        """Seconds until the deadline, negative once it has passed; None without one."""
        return None if self._deadline is None else self._deadline - time.monotonic()

    def out_of_time(self) -> TimeoutExceeded:
        """The error that says so."""
        limit = self.limits.max_timeout or 0.0
        used = limit - (self.seconds_left() or 0.0)
        return TimeoutExceeded(f"the run took longer than max_timeout={limit:g} s", limit=limit, used=used)

    # -- what there is to be told

    def usage(self) -> UsageSummary:
        """A copy of the accounts as they stand."""
        return UsageSummary({name: copy.copy(u) for name, u in self._usage.items()})

    def budget(self, iterations_left: int, depth_left: int = 0) -> dict[str, float | int | None]:
        """What is left, as a cell sees it; of depth, how many levels of child runs."""
        limits, seconds = self.limits, self.seconds_left()
        calls = [] if limits.max_calls is None else [limits.max_calls - self._kept_calls - self.calls]
        calls += [] if limits.max_sub_calls is None else [limits.max_sub_calls - self.sub_calls]
        tokens = min(self.tokens.left, self.sub_tokens.left)
        return {
            "iterations": iterations_left,
            "depth": depth_left,
            "children": None if limits.max_children is None else limits.max_children - self.children,
            "calls": min(calls, default=None),
            "tokens": max(int(tokens), 0) if math.isfinite(tokens) else None,
            "dollars": max(round(self.cost.left, 6), 0.0) if math.isfinite(self.cost.left) else None,
            "seconds": None if seconds is None else round(max(seconds, 0.0), 3),
            "calls_made": self.calls,
        }


def _used_up(error: LimitExceeded, what: str, name: str | None = None) -> LimitExceeded:
    """An error of a counted limit, with its text."""
    setting = name or error.name
    error.args = (
        f"the run has made its {error.limit:g} {what}: work with what there is, or raise {setting}",
    )
    return error

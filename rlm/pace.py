"""How fast a provider may be asked: limits that were set, and what its refusals teach.

Set limits become even spacing (a "virtual scheduling" leaky bucket, ITU-T I.371). A provider
that refuses calls without a limit having been set is paced at the rate at which it was seen to
accept, then cautiously faster. All times are of the monotonic clock, in seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

IDLE = 1.0
"""Seconds without a call after which a new burst begins: how fast it goes is counted from there."""

MARGIN = 1.02
"""Calls spaced exactly evenly would meet the end of a provider's window with one call too many."""

LATE = 0.005
"""Seconds that a timer may fire late without slowing the whole down."""

FIRST_STEP, FIRST_HOLD = 0.1, 1.0
"""A pace that one burst has taught is a guess: by what share it is raised, after how many seconds."""

STEP, HOLD, LONGEST_HOLD = 0.05, 30.0, 240.0
"""The same once a raised pace was refused; the seconds are doubled each time that happens."""

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds to leave a provider alone that refuses without saying for how long; doubled each time."""

STALE = 24 * 3600.0
"""A shared time further ahead than this is left over from before the machine was started."""


@dataclasses.dataclass(frozen=True)
class RateLimit:
    """What a provider, or one of its models, may be asked at a time. None is unlimited."""

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    """Input and output; until a reply tells, a call counts as its prompt's estimated length."""
    concurrency: int | None = None
    """Calls in flight."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kinds = int if field.name == "concurrency" else (int, float)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf:
                kind = "whole number" if kinds is int else "number"
                raise ValueError(f"{field.name}={value!r}: a limit is a {kind} greater than 0")


class Times(Protocol):
    """Three moments: the next request, the next token, and the end of a pause."""

    def held(self) -> contextlib.AbstractContextManager[list[float]]:
        """The moments, to read and to change, while nobody else does."""


class OwnTimes:
    """Times of one process."""

    def __init__(self) -> None:
        self._values = [0.0, 0.0, 0.0]

    @contextlib.contextmanager
    def held(self) -> Iterator[list[float]]:
        yield self._values


class SharedTimes:
    """Times that processes of one machine share, in a file of a folder they all name."""

    _layout = struct.Struct("=3d")

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.pace"

    @contextlib.contextmanager
    def held(self) -> Iterator[list[float]]:
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # until it is closed
            data = os.pread(descriptor, self._layout.size, 0)
            values = [*self._layout.unpack(data)] if len(data) == self._layout.size else [0.0, 0.0, 0.0]
            yield values
            os.pwrite(descriptor, self._layout.pack(*values), 0)
        finally:
            os.close(descriptor)


class Pace:
    """When the next call may go."""

    def __init__(self, limit: RateLimit, times: Times | None = None) -> None:
        self._request_gap = 60.0 * MARGIN / limit.requests_per_minute if limit.requests_per_minute else 0.0
        self._token_gap = 60.0 / limit.tokens_per_minute if limit.tokens_per_minute else 0.0
        self._is_shared = times is not None
        self._times = times or OwnTimes()
        self._learned_gap = 0.0
        self._paused = False
        # of the present burst, and of the pause that may end it
        self._began = self._last = self._ends = 0.0
        self._sent = self._refused = 0
        self._pause = FIRST_PAUSE
        # of a learned pace: the next raise, and the last one
        self._step, self._hold = (STEP, HOLD) if self._request_gap else (FIRST_STEP, FIRST_HOLD)
        self._raise_at = 0.0
        self._raised_by = STEP

    @property
    def counts_tokens(self) -> bool:
        """Whether it matters how long a call is."""
        return self._token_gap > 0

    @property
    def is_free(self) -> bool:
        """Whether calls go as they come."""
        return not (
            self._paused or self._request_gap or self._token_gap or self._learned_gap or self._is_shared
        )

    def wait(self, now: float) -> float:
        """Seconds until a call may go; 0 when it may go now."""
        with self._times.held() as times:
            ahead = max(times) - now
            if ahead > STALE:
                times[:] = [0.0, 0.0, 0.0]
            return ahead if 0 < ahead <= STALE else 0.0

    def take(self, now: float, tokens: int = 0) -> None:
        """A call goes out."""
        if self._paused:
            self._learn(now)
        elif now - self._last > IDLE:
            self._began, self._sent, self._refused = now, 0, 0
        elif self._learned_gap and now >= self._raise_at:
            self._raise(now)
        self._sent += 1
        self._last = now
        if self.is_free:
            return
        gap = max(self._request_gap, self._learned_gap)
        with self._times.held() as times:
            times[0] = max(times[0], now - LATE) + gap
            times[1] = max(times[1], now) + tokens * self._token_gap

    def correct(self, tokens: int) -> None:
        """A reply tells by how many tokens the estimate was wrong."""
        if self._token_gap and tokens:
            with self._times.held() as times:
                times[1] += tokens * self._token_gap

    def refused(self, now: float, sent_at: float, retry_after: float | None) -> None:
        """A call was refused: leave the provider alone for a while."""
        if sent_at >= self._began:  # an earlier one says nothing about the present pace
            self._refused += 1
        pause = self._pause if retry_after is None else retry_after
        if not self._paused:
            self._paused, self._ends = True, now + pause
        with self._times.held() as times:
            times[2] = max(times[2], now + pause)

    def _learn(self, now: float) -> None:
        """After a pause: from how many calls of the burst were accepted, the pace to go on at."""
        accepted = self._sent - self._refused
        gap = max(self._request_gap, self._learned_gap)
        if gap and self._refused <= self._sent / 2:  # nearly right: what the last raise added was too much
            self._learned_gap = gap * (1 + self._raised_by)
            self._step, self._hold = STEP, min(max(self._hold * 2, HOLD), LONGEST_HOLD)
        else:
            self._learned_gap = max((self._ends - self._began) / max(accepted, 1), self._learned_gap)
            self._step, self._hold = FIRST_STEP, FIRST_HOLD
        self._pause = FIRST_PAUSE if accepted > 0 else min(self._pause * 2, LONGEST_PAUSE)
        self._paused, self._raised_by = False, STEP
        self._began, self._sent, self._refused = now, 0, 0
        self._raise_at = now + self._hold

    def _raise(self, now: float) -> None:
        """Nobody was refused for a while: faster, and each time by more."""
        self._learned_gap /= 1 + self._step
        self._raised_by, self._step = self._step, min(self._step * 2, 1.0)
        self._raise_at = now + self._hold

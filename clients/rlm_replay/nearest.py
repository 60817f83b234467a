"""Which recorded request comes nearest to one that was not recorded, and where the two part.

Ten thousand prompts of 100 KB are compared in less than a second: by how much of them is the same
from the beginning and from the end, which costs no more than reading them. Only a few
candidates are looked at more closely, and of those only where they first differ.
"""

from __future__ import annotations

import difflib
import heapq
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

from rlm.client import Message, Request
from rlm.recording import DECISIVE, Recorded

CANDIDATES = 5
"""How many are looked at closely."""

LOOK = 400
"""Characters from the first difference on that are looked at closely."""

SHOWN = 60
"""Characters of each side that an error shows, a third of them from before the difference."""

STEP = 4096
"""Characters that are compared at once; a power of 2, so that it can be halved down to 1."""

NOTHING = Message("user", "")


class Nearest(NamedTuple):
    """The nearest recorded request."""

    line: int
    similarity: float
    """The share of the messages' text that is the same, from 0 to 1."""
    where: str
    """The first place of difference, such as ``"messages[2].content, character 1,041"``."""
    recorded: str
    asked: str
    """An excerpt of each side there."""


def nearest(asked: Request, recorded: Sequence[Recorded]) -> Nearest:
    """The nearest of these, of which there is at least one; the earlier one of equals."""
    best = heapq.nlargest(CANDIDATES, recorded, lambda other: _likeness(asked, other.request))
    found = max(best, key=lambda other: (_closely(asked, other.request), _settings(asked, other.request)))
    where, theirs, ours = _difference(found.request, asked)
    return Nearest(found.line, _closely(asked, found.request), where, theirs, ours)


def _likeness(one: Request, other: Request) -> tuple[float, int]:
    return _share(one, other, 0), _settings(one, other)


def _closely(one: Request, other: Request) -> float:
    return _share(one, other, LOOK)


def _share(one: Request, other: Request, look: int) -> float:
    """How much of the messages' text is the same; up to ``look`` characters of each are looked at closely."""
    same, total = 0.0, 0
    for ours, theirs in zip_longest(one.messages, other.messages, fillvalue=NOTHING):
        a, b = ours.content, theirs.content
        longer = max(len(a), len(b))
        total += longer
        begin = common_prefix(a, b)
        end = common_suffix(a, b, min(len(a), len(b)) - begin)
        same += begin + end
        if look and begin + end < longer:
            rest = a[begin : len(a) - end][:look], b[begin : len(b) - end][:look]
            ratio = difflib.SequenceMatcher(None, *rest, autojunk=False).ratio()
            same += ratio * (longer - begin - end)
    return same / total if total else 1.0


def _settings(one: Request, other: Request) -> int:
    """How many of the settings are the same, and the number of messages."""
    same = sum(bool(getattr(one, name) == getattr(other, name)) for name in ("model", *DECISIVE[1:]))
    return same + (len(one.messages) == len(other.messages))


def common_prefix(a: str, b: str) -> int:
    """How many characters are the same from the beginning."""
    limit = min(len(a), len(b))
    done, step = 0, STEP
    while step:
        if done + step <= limit and a.startswith(b[done : done + step], done):
            done += step
        else:
            step //= 2
    return done


def common_suffix(a: str, b: str, limit: int) -> int:
    """How many are the same from the end, ``limit`` at most."""
    done, step = 0, STEP
    while step:
        end = len(b) - done
        if done + step <= limit and a.endswith(b[end - step : end], 0, len(a) - done):
            done += step
        else:
            step //= 2
    return done


def _difference(recorded: Request, asked: Request) -> tuple[str, str, str]:
    """The first place where two requests differ, and both sides there. The model comes first."""
    if recorded.model != asked.model:
        return "model", repr(recorded.model), repr(asked.model)
    pairs = zip_longest(recorded.messages, asked.messages)
    for number, (theirs, ours) in enumerate(pairs):
        if theirs != ours:
            return _in_message(f"messages[{number}]", theirs, ours)
    for name in DECISIVE[1:]:
        theirs, ours = getattr(recorded, name), getattr(asked, name)
        if theirs != ours:
            return name, _clip(theirs), _clip(ours)
    return "nothing that is recorded (a secret, or how it was made)", "the same", "the same"


def _in_message(place: str, theirs: Message | None, ours: Message | None) -> tuple[str, str, str]:
    if theirs is None or ours is None:
        return place, _whole(theirs), _whole(ours)
    if theirs.role != ours.role:
        return f"{place}.role", repr(theirs.role), repr(ours.role)
    at = common_prefix(theirs.content, ours.content)
    begin = max(at - SHOWN // 3, 0)
    where = f"{place}.content, character {at:,}"
    return where, _excerpt(theirs.content, begin), _excerpt(ours.content, begin)


def _whole(message: Message | None) -> str:
    return "no such message" if message is None else f"{message.role}: {_excerpt(message.content, 0)}"


def _excerpt(text: str, begin: int) -> str:
    shown = text[begin : begin + SHOWN]
    before, after = "..." * (begin > 0), "..." * (begin + SHOWN < len(text))
    return f"{before}{shown!r}{after}"


def _clip(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."

"""What the variables of a session are: code that travels into a sandbox and runs there, in a cell.

It needs nothing but the standard library of CPython 3.8, and leaves no name behind.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Collection, Mapping
from typing import Any

LIMIT, TOTAL = 10_000, 500_000
"""Characters of one variable, and of all; what is beyond that is not told."""


def told(names: Mapping[str, Any], without: Collection[str]) -> str:
    """Variables as JSON: plain data as it is, if it is not much, and anything else as its repr."""
    found: list[str] = []
    room = TOTAL
    for name, value in list(names.items()):
        if name.startswith("_") or name in without or room < 0:
            continue
        data = value if _is_small(value, LIMIT) else _shown(value, LIMIT)
        found.append(f"{json.dumps(name)}: {json.dumps(data)}")
        room -= len(found[-1])
    return "{" + ", ".join(found) + "}"


def _is_small(value: Any, limit: int) -> bool:
    """Whether it is plain data, and not much of it. Takes no longer for a gigabyte."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        kind = type(item)
        limit -= len(item) if kind in (str, dict, list) else 1
        if limit < 0:
            return False
        if kind is dict:
            if any(type(key) is not str for key in item):
                return False
            waiting += [*item, *item.values()]
        elif kind is list:
            waiting += item
        elif kind is int:
            limit -= item.bit_length() // 3
        elif item is not None and kind not in (str, bool, float):
            return False
    return limit >= 0


def _shown(value: Any, limit: int) -> str:
    """The repr of anything, or its beginning. Takes no longer for a gigabyte."""
    shown = reprlib.Repr()
    shown.maxstring = shown.maxother = limit
    shown.maxlist = shown.maxtuple = shown.maxdict = shown.maxset = shown.maxfrozenset = 100
    try:
        return shown.repr(value)
    except Exception:  # such as a number of more digits than Python writes
        return "<" + type(value).__name__ + ">"

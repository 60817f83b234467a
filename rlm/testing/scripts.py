"""What models say in tests of whole runs."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from rlm_scripted import ScriptedLM

from ..client import Message

QUESTION = "the question of the root"
"""By which a model that plays several runs knows the root."""

Says = str | Callable[[Sequence[Message]], Any]


def cell(code: str) -> str:
    """A reply that is a block of code, which may be indented like the test around it."""
    return f"```repl\n{textwrap.dedent(code).strip()}\n```"


def turns(*replies: str) -> Says:
    """What a run says in its turns, whichever other runs speak in between."""

    def say(messages: Sequence[Message]) -> str:
        return replies[sum(message.role == "assistant" for message in messages)]

    return say


def family(root: Says, child: Says = "", *, cost: float | None = None) -> ScriptedLM:
    """A model that plays the root, which asks `QUESTION`, and every child; plain calls it echoes."""

    def say(messages: Sequence[Message]) -> Any:
        if messages[0].role == "user":
            return f"echo:{messages[0].content}"
        says = root if QUESTION in messages[1].content else child
        return says if isinstance(says, str) else says(messages)

    return ScriptedLM(say, cost=cost)

"""What scripts for rlms may ask of an environment, and which names are taken in every one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from rlm.tools import RESERVED

from ..core.types import REPLResult

__all__ = ["RESERVED_TOOL_NAMES", "BaseEnv", "SupportsCustomTools", "SupportsPersistence"]

RESERVED_TOOL_NAMES = RESERVED


class BaseEnv(Protocol):
    """A sandbox for a script's own cells."""

    def execute_code(self, code: str) -> REPLResult:
        """Run one cell. What it raised stands at the end of the result's ``stderr``."""
        ...

    def load_context(self, context_payload: Any) -> None:
        """Put data into the session as ``context``."""

    def cleanup(self) -> None:
        """Leave nothing behind. Safe to call twice."""


@runtime_checkable
class SupportsCustomTools(Protocol):
    """Environments that take functions and data for their cells."""

    custom_tools: dict[str, Any]


@runtime_checkable
class SupportsPersistence(Protocol):
    """Environments that a script may use for several conversations, one after another.

    What is added without an index gets the next one; index N is called ``context_N`` or ``history_N``,
    and 0 ``context`` or ``history`` as well.
    """

    def update_handler_address(self, address: tuple[str, int]) -> None:
        """From now on another handler answers the cells."""

    def add_context(self, context_payload: Any, context_index: int | None = None) -> int:
        """Put data into the session. Returns its index."""
        ...

    def get_context_count(self) -> int:
        """One more than the highest index of a context."""
        ...

    def add_history(self, message_history: Sequence[dict[str, Any]], history_index: int | None = None) -> int:
        """Put a copy of a conversation's messages into the session. Returns its index."""
        ...

    def get_history_count(self) -> int:
        """One more than the highest index of a history."""
        ...

"""What all runs of one completion share."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
from collections.abc import AsyncIterator
from typing import Any

from .compaction import Threshold
from .errors import Cancelled
from .events import EventBus
from .handler import LMHandler
from .ledger import Ledger
from .pool import Environments
from .schemas import Schemas
from .slots import Slots
from .tools import NO_TOOLS, Tools


@dataclasses.dataclass(eq=False)
class Tree:
    """What all runs of one completion share."""

    handler: LMHandler
    ledger: Ledger
    events: EventBus
    environments: Environments
    environment_name: str = ""
    backend_name: str = ""
    system_prompt: str | None = None
    advice: bool = True
    """Whether the system prompt says how to go about it."""
    prologue: str | None = None
    """What the root's first message says besides."""
    width: int = 1
    """Child runs at work at a time."""
    tools: Tools = NO_TOOLS
    sub_tools: Tools = NO_TOOLS
    """Those of child runs."""
    schemas: Schemas = dataclasses.field(default_factory=Schemas)
    """What cells may ask for by name."""
    schema_retries: int = 0
    compaction: Threshold | None = None
    """When conversations are summed up; None is never."""
    numbers: Any = dataclasses.field(default_factory=lambda: itertools.count(1))

    def __post_init__(self) -> None:
        self.slots = Slots(self.width)
        self._task: asyncio.Task[Any] | None = None
        self._is_cancelled = False

    def cancel(self) -> None:
        """End the whole tree with `Cancelled`."""
        if self._task is not None:
            self._is_cancelled = True
            self._task.cancel()

    @contextlib.asynccontextmanager
    async def cancellable(self) -> AsyncIterator[None]:
        """Around the root's run: what `cancel` ends is an error of ours, with all that such a one carries."""
        self._task = asyncio.current_task()
        try:
            yield
        except asyncio.CancelledError:
            if not self._is_cancelled or self._task is None:
                raise
            self._task.uncancel()
            raise Cancelled("the run was cancelled") from None
        finally:
            self._task = None

    def next_run_id(self) -> str:
        """A name for a run, unique in its tree."""
        return f"run-{next(self.numbers)}"

"""Recursive Language Models, in sandboxes. See RLM for where to begin.

Names are imported when they are first used: ``import rlm`` alone costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .client import BaseLM as BaseLM
    from .client import Message as Message
    from .client import Reply as Reply
    from .client import Request as Request
    from .client import Usage as Usage
    from .client import UsageSummary as UsageSummary
    from .config import Config as Config
    from .conversation import Conversation as Conversation
    from .environment import BaseEnv as BaseEnv
    from .environment import CellError as CellError
    from .environment import Isolation as Isolation
    from .environment import REPLResult as REPLResult
    from .environment import SupportsPersistence as SupportsPersistence
    from .environment import SupportsReset as SupportsReset
    from .environment import SupportsSnapshot as SupportsSnapshot
    from .environment import WorkerEnv as WorkerEnv
    from .errors import BudgetExceededError as BudgetExceededError
    from .errors import CancellationError as CancellationError
    from .errors import ErrorThresholdExceededError as ErrorThresholdExceededError
    from .errors import RLMError as RLMError
    from .errors import TimeoutExceededError as TimeoutExceededError
    from .errors import TokenLimitExceededError as TokenLimitExceededError
    from .events import Trace as Trace
    from .handler import LMHandler as LMHandler
    from .limits import Limits as Limits
    from .repl import REPL as REPL
    from .repl import open_repl as open_repl
    from .rlm import RLM as RLM
    from .rlm import RLMChatCompletion as RLMChatCompletion
    from .snapshot import Snapshot as Snapshot

__version__ = "0.1.0"

__path__.append(f"{__path__[0]}/rlms")  # rlm.logger, rlm.clients, ...: where scripts for rlms find things

_HOME = {
    "BaseEnv": "environment",
    "BaseLM": "client",
    "BudgetExceededError": "errors",
    "CancellationError": "errors",
    "CellError": "environment",
    "Config": "config",
    "Conversation": "conversation",
    "ErrorThresholdExceededError": "errors",
    "Isolation": "environment",
    "LMHandler": "handler",
    "Limits": "limits",
    "Message": "client",
    "REPL": "repl",
    "REPLResult": "environment",
    "RLM": "rlm",
    "RLMChatCompletion": "rlm",
    "RLMError": "errors",
    "Snapshot": "snapshot",
    "SupportsPersistence": "environment",
    "SupportsReset": "environment",
    "SupportsSnapshot": "environment",
    "Reply": "client",
    "Request": "client",
    "TimeoutExceededError": "errors",
    "TokenLimitExceededError": "errors",
    "Trace": "events",
    "Usage": "client",
    "UsageSummary": "client",
    "WorkerEnv": "environment",
    "open_repl": "repl",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'rlm' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})

"""What can go wrong, as one tree.

RLMError
 |- ConfigError             what was asked for makes no sense (also a ValueError)
 |- PluginError             a backend or environment by that name cannot be had
 |   |- UnknownPlugin         nothing installed has the name
 |   |- PluginConflict        two packages claim it
 |   `- BrokenPlugin          it is installed and does not import
 |- ModelError              a model call failed
 |   `- ScriptExhausted       the scripted client has no reply left
 |- SandboxError            the sandbox, not the code in it, failed
 |   |- SandboxUnavailable    it cannot be started here
 |   `- SandboxLost           it died and could not be brought back
 `- LimitExceeded           a limit of the run was reached
     |- MaxIterationsExceeded
     |- MaxCallsExceeded
     |- TimeoutExceeded
     |- ErrorThresholdExceeded
     `- Cancelled

Code that a model wrote and that fails is none of these: it is a result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .client import UsageSummary
    from .events import Trace


class RLMError(Exception):
    """Anything this framework raises. One that ends a run carries what the run had so far."""

    partial_answer: str | None = None
    """The best answer at that moment: the draft in ``answer["content"]``, or the model's last words."""

    usage: UsageSummary | None = None
    """Calls and tokens of the whole run tree."""

    trace: Trace | None = None
    """Every event of the run tree."""


class ConfigError(RLMError, ValueError):
    """An option is unknown, or its value makes no sense."""


class PluginError(RLMError):
    """A backend or an environment cannot be had by that name."""


class UnknownPlugin(PluginError):
    """No installed package offers the name."""


class PluginConflict(PluginError):
    """More than one installed package offers the name."""


class BrokenPlugin(PluginError):
    """The package is installed, and importing it failed; the reason is the cause."""


class ModelError(RLMError):
    """A model call failed."""


class ScriptExhausted(ModelError):
    """The scripted client was asked for more replies than its script has."""


class SandboxError(RLMError):
    """The sandbox failed, as opposed to the code that ran in it."""


class SandboxUnavailable(SandboxError):
    """The sandbox cannot be started on this machine as it was asked for."""


class SandboxLost(SandboxError):
    """The sandbox died, or broke the protocol, and could not be brought back."""


class LimitExceeded(RLMError):
    """A limit of the run was reached. ``limit`` is its value, ``used`` what was used of it."""

    name = "limit"

    def __init__(self, message: str, *, limit: float | None = None, used: float | None = None) -> None:
        super().__init__(message)
        self.limit = limit
        self.used = used


class MaxIterationsExceeded(LimitExceeded):
    """The iterations are used up, and no best answer could be had either."""

    name = "max_iterations"


class MaxCallsExceeded(LimitExceeded):
    """The model calls of the run tree are used up."""

    name = "max_calls"


class TimeoutExceeded(LimitExceeded):
    """The run took longer than its wall time."""

    name = "max_timeout"


class ErrorThresholdExceeded(LimitExceeded):
    """Too many cells in a row have failed."""

    name = "max_errors"


class Cancelled(LimitExceeded):
    """The run was cancelled from outside."""

    name = "cancelled"

"""What can go wrong, as one tree.

RLMError
 |- ConfigError             what was asked for makes no sense (also a ValueError)
 |- PluginError             a backend or environment by that name cannot be had
 |   |- UnknownPlugin         nothing installed has the name
 |   |- PluginConflict        two packages claim it
 |   `- BrokenPlugin          it is installed and does not import
 |- ModelError              a model call failed
 |   |- AuthError             the key is missing, wrong, or may not use the model
 |   |- NotFound              there is no such model or address
 |   |- BadRequest            the provider does not accept the request
 |   |   |- ContextOverflow     it is longer than the model reads
 |   |   `- ContentFiltered     its content, or the reply's, is refused
 |   |- QuotaExceeded         the account has nothing left: waiting does not help
 |   |- RetryableError        the same call may succeed later
 |   |   |- RateLimited         too many requests or tokens in a time
 |   |   |- Unavailable         the provider is down or overloaded
 |   |   |- Timeout             no reply within the time of one attempt
 |   |   |- ConnectFailed       no connection: nothing was sent
 |   |   `- ProtocolError       what came back is not a reply
 |   |- InvalidReply          the reply has not the form that was asked for, however often it was told
 |   |- ReplayMiss            the recording has no reply for this request
 |   `- ScriptExhausted       the scripted client has no reply left
 |- ToolError               a tool of the host's failed, or was called wrongly
 |- SandboxError            the sandbox, not the code in it, failed
 |   |- SandboxUnavailable    it cannot be started here
 |   `- SandboxLost           it died and could not be brought back
 `- LimitExceeded           a limit of the run was reached
     |- MaxIterationsExceeded
     |- MaxDepthExceeded
     |- MaxCallsExceeded
     |- MaxChildrenExceeded
     |- MaxTokensExceeded
     |- BudgetExceeded
     |- TimeoutExceeded
     |- ErrorThresholdExceeded
     `- Cancelled

Code that a model wrote and that fails is none of these: it is a result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from .client import UsageSummary
    from .events import Trace
    from .limits import Limits


class RLMError(Exception):
    """Anything this framework raises. One that ends a run carries what the run had so far."""

    partial_answer: str | None = None
    """The best answer at that moment: the draft in ``answer["content"]``, or the model's last words."""

    usage: UsageSummary | None = None
    """Calls and tokens of the whole run tree."""

    trace: Trace | None = None
    """Every event of the run tree."""

    limits: Limits | None = None
    """What the run tree might have used."""


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
    """A model call failed. What a client does not know stays None."""

    retryable: ClassVar[bool] = False
    """Whether making the same call again can help. Only `RetryableError` and what is below it is."""

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str | None = None,
        request_id: str | None = None,
        sent: bool = True,
    ) -> None:
        super().__init__(message)
        self.status = status
        """The HTTP status."""
        self.code = code
        """The provider's own word for what happened."""
        self.request_id = request_id
        """The provider's name for the call, for its support."""
        self.sent = sent
        """Whether the request may have reached the model, and have been billed."""


class AuthError(ModelError):
    """The key is missing or wrong, or may not use this model."""


class NotFound(ModelError):
    """The provider knows no such model, or there is nothing at this address."""


class BadRequest(ModelError):
    """The provider does not accept the request as it is."""


class ContextOverflow(BadRequest):
    """The request is longer than the model can read. ``window`` is how many tokens that is, if told."""

    def __init__(self, message: str, *, window: int | None = None, **details: Any) -> None:
        super().__init__(message, **details)
        self.window = window


class ContentFiltered(BadRequest):
    """The provider refuses the content of the request or of its own reply."""


class QuotaExceeded(ModelError):
    """The account's money or quota is used up. Waiting does not help."""


class RetryableError(ModelError):
    """A failure that may pass. ``retry_after`` is the provider's word on when to try again, in seconds."""

    retryable = True

    def __init__(self, message: str, *, retry_after: float | None = None, **details: Any) -> None:
        super().__init__(message, **details)
        self.retry_after = retry_after


class RateLimited(RetryableError):
    """More requests or tokens in a time than the provider allows."""


class Unavailable(RetryableError):
    """The provider is down, overloaded, or failed on its side."""


class Timeout(RetryableError):
    """One attempt took longer than it may."""


class ConnectFailed(RetryableError):
    """No connection could be made. Nothing was sent."""

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message, **{"sent": False, **details})


class ProtocolError(RetryableError):
    """What came back is no reply: cut short, not JSON, or not in the protocol's shape."""


class InvalidReply(ModelError):
    """The reply has not the form that was asked for, even after the model was told what is wrong."""


class ReplayMiss(ModelError):
    """The recording holds no reply for this request."""


class ScriptExhausted(ModelError):
    """The scripted client was asked for more replies than its script has."""


class ToolError(RLMError):
    """A tool failed. ``kind`` is the name of the exception's type; the text names no path of the host's."""

    def __init__(self, message: str, kind: str = "ToolError") -> None:
        super().__init__(message)
        self.kind = kind


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


# what scripts written for rlms read of an error
_USED = property(lambda error: error.used)
_LIMIT = property(lambda error: error.limit)


class MaxIterationsExceeded(LimitExceeded):
    """The iterations are used up, and no best answer could be had either."""

    name = "max_iterations"


class MaxDepthExceeded(LimitExceeded):
    """A child run would be deeper than the run tree may go."""

    name = "max_depth"


class MaxCallsExceeded(LimitExceeded):
    """The model calls of the run tree are used up."""

    name = "max_calls"


class MaxChildrenExceeded(LimitExceeded):
    """The child runs of the run tree are used up."""

    name = "max_children"


class MaxTokensExceeded(LimitExceeded):
    """The tokens of the run tree are used up."""

    name = "max_tokens"
    tokens_used, token_limit = _USED, _LIMIT


class BudgetExceeded(LimitExceeded):
    """The money of the run tree is used up."""

    name = "max_budget"
    spent, budget = _USED, _LIMIT


class TimeoutExceeded(LimitExceeded):
    """The run took longer than its wall time."""

    name = "max_timeout"
    elapsed, timeout = _USED, _LIMIT


class ErrorThresholdExceeded(LimitExceeded):
    """Too many cells in a row have failed."""

    name = "max_errors"
    error_count, threshold = _USED, _LIMIT


class Cancelled(LimitExceeded):
    """The run was cancelled from outside."""

    name = "cancelled"


# the names that scripts written for rlms know
BudgetExceededError = BudgetExceeded
CancellationError = Cancelled
ErrorThresholdExceededError = ErrorThresholdExceeded
TimeoutExceededError = TimeoutExceeded
TokenLimitExceededError = MaxTokensExceeded

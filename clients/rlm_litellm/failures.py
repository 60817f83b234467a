"""What LiteLLM's exceptions mean. Below them is what the provider really said, if it said something."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from rlm import http
from rlm.errors import (
    AuthError,
    BadRequest,
    ConnectFailed,
    ContentFiltered,
    ContextOverflow,
    ModelError,
    NotFound,
    ProtocolError,
    QuotaExceeded,
    RateLimited,
    RLMError,
    Timeout,
    Unavailable,
)

NEVER_CONNECTED = frozenset(("ConnectError", "ConnectTimeout", "ClientConnectorError", "gaierror"))
NOT_UNDERSTOOD = frozenset(
    ("ClientPayloadError", "ClientResponseError", "RemoteProtocolError", "DecodingError", "JSONDecodeError",
     "UnicodeDecodeError", "ValidationError", "AttributeError", "TypeError", "KeyError", "IndexError")
)  # fmt: skip
"""What is raised on the way to a reply by whoever takes something else for one."""

NOT_SENT = frozenset(("UnsupportedParamsError", "LiteLLMUnknownProvider"))

KINDS: dict[str, type[ModelError]] = {
    "ContextWindowExceededError": ContextOverflow,
    "ContentPolicyViolationError": ContentFiltered,
    "PaymentRequiredError": QuotaExceeded,
    "AuthenticationError": AuthError,
    "PermissionDeniedError": AuthError,
    "NotFoundError": NotFound,
    "LiteLLMUnknownProvider": NotFound,
    "RateLimitError": RateLimited,
    "Timeout": Timeout,
    "APITimeoutError": Timeout,
    "TimeoutError": Timeout,
    "APIResponseValidationError": ProtocolError,
    "BadRequestError": BadRequest,
    "UnprocessableEntityError": BadRequest,
    "ServiceUnavailableError": Unavailable,
    "BadGatewayError": Unavailable,
    "InternalServerError": Unavailable,
    "APIConnectionError": Unavailable,
}
"""By the name of a class, the more particular ones first: they are subclasses of later ones."""

_NO_REPLY = re.compile(
    r"empty or invalid response|invalid response object|provider returned '", re.IGNORECASE
)
"""How LiteLLM says, as a server's error 500, that it did not understand a reply."""


_NO_PROVIDER = re.compile(r"LLM Provider NOT provided", re.IGNORECASE)
_NO_KEY = re.compile(r"missing (credentials|\w* ?api key)|api_key client option must be set", re.IGNORECASE)
_NOT_SENT = re.compile(f"{_NO_PROVIDER.pattern}|{_NO_KEY.pattern}", re.IGNORECASE)
"""What it finds out by itself, and words as if a server had."""


def failure(error: BaseException, hide: Callable[[str], str], within: BaseException | None) -> ModelError:
    """The ModelError that an exception of LiteLLM's stands for.

    ``within`` is what was being handled when the call was made: it has nothing to do with it.
    """
    chain = list(_below(error, within))
    names = {kind.__name__ for each in chain for kind in type(each).__mro__}
    told = next((found for each in chain if (found := _told(each, hide)) is not None), None)
    if told is not None:
        return _refined(told, error)
    kind = _kind(error, names)
    status = getattr(error, "status_code", None)
    made_up = issubclass(kind, ConnectFailed | ProtocolError | Timeout) or "APIConnectionError" in names
    details: dict[str, Any] = {"status": status if isinstance(status, int) and not made_up else None}
    if names & NOT_SENT or _NOT_SENT.search(str(error)):
        details |= {"sent": False, "status": None}
    return kind(_words(error, hide), **details)


def _below(error: BaseException | None, within: BaseException | None) -> Iterator[BaseException]:
    """An exception and what it came from, but for what was there before the call."""
    while error is not None and error is not within and not isinstance(error, RLMError):
        yield error
        error = error.__cause__ or error.__context__


def _told(error: BaseException, hide: Callable[[str], str]) -> ModelError | None:
    """What the provider's own response says, if the exception has one. LiteLLM's have made up ones."""
    response = getattr(error, "response", None)
    headers = getattr(response, "headers", None)
    status = getattr(response, "status_code", None)
    if not headers or not isinstance(status, int) or status < 300:
        return None
    try:
        body = response.content  # type: ignore[union-attr]
    except Exception:  # of a stream that nobody has read
        body = str(error).encode(errors="replace")
    return http.failure(status, headers, body, hide)


def _refined(told: ModelError, error: BaseException) -> ModelError:
    """LiteLLM knows more wordings of a refusal than `rlm.http` does, providers' own ones."""
    kind = KINDS.get(type(error).__name__)
    if type(told) is not BadRequest or kind not in (ContextOverflow, ContentFiltered):
        return told
    return kind(str(told), status=told.status, code=told.code, request_id=told.request_id)


def _kind(error: BaseException, names: set[str]) -> type[ModelError]:
    """What an exception means that comes with no response."""
    if names & NEVER_CONNECTED:
        return ConnectFailed
    if _NO_PROVIDER.search(str(error)):
        return NotFound
    if _NO_KEY.search(str(error)):
        return AuthError
    if names & NOT_UNDERSTOOD or _NO_REPLY.search(str(error)):
        return ProtocolError
    kinds = [base.__name__ for base in type(error).__mro__]
    kind = next((KINDS[name] for name in kinds if name in KINDS), None)
    if kind is RateLimited and isinstance(_as_told(error), QuotaExceeded):
        return QuotaExceeded
    if kind is not None:
        return kind
    return ProtocolError if any(name in ("APIError", "OpenAIError") for name in kinds) else _as_status(error)


def _as_told(error: BaseException) -> ModelError:
    """What the words of an exception mean to `rlm.http`."""
    return http.failure(getattr(error, "status_code", 500), {}, str(error).encode(errors="replace"))


def _as_status(error: BaseException) -> type[ModelError]:
    status = getattr(error, "status_code", None)
    return type(_as_told(error)) if isinstance(status, int) and status >= 400 else ProtocolError


def _words(error: BaseException, hide: Callable[[str], str]) -> str:
    said = hide(str(error)).partition("\nTraceback ")[0]  # which it puts into some of its messages
    text = re.sub(r"^(litellm\.)?(\w+Error: )+", "", said) or type(error).__name__
    return text if len(text) <= http.MAX_SHOWN else f"{text[: http.MAX_SHOWN]}..."

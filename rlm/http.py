"""What clients that speak HTTP share: one attempt, a pooled connection, and failures by name.

`HTTPLM` is a whole client but for its `Dialect`, which says how a provider wants to be asked
and what its replies look like. aiohttp is imported when the first call is made.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib
import io
import ipaddress
import math
import os
import re
import time
import urllib.parse
import weakref
from abc import abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import msgspec

from . import hostloop, jsontext, secrets
from .client import BaseLM, Reply, Request
from .errors import (
    AuthError,
    BadRequest,
    ConfigError,
    ConnectFailed,
    ContentFiltered,
    ContextOverflow,
    ModelError,
    NotFound,
    ProtocolError,
    QuotaExceeded,
    RateLimited,
    Timeout,
    Unavailable,
)

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession, ClientTimeout

MAX_REPLY = 64 * 1024 * 1024
"""Bytes of a reply that are read: what a server says must not fill the host's memory."""

MAX_SHOWN = 500
"""Characters of a server's own words in an error."""

CONNECT_TIMEOUT = 15.0
"""Seconds to make a connection, TLS included."""

MAX_READ = 20 * MAX_SHOWN
"""Of them, those that are searched for what they mean."""

KEEP_ALIVE = 15.0
"""Seconds a connection is kept for the next call."""

Value = TypeVar("Value")

READ_BUFFER = 256 * 1024

STALE = 3
"""How many connections are taken, one after the other, until one can be written to."""

UNWRITABLE = "Cannot write to closing transport"
"""What aiohttp says before it writes to a connection that is closed; afterwards it says otherwise."""

LINGER = 0.02
"""Seconds, after the first stream of all, in which a server is watched for whether it hangs up."""

LARGE_BODY = 1024 * 1024
"""Bytes of a request above which it is sent in parts."""


class Assembler(Protocol):
    """Puts a streamed reply together."""

    def feed(self, data: bytes) -> str:
        """Take one event's data; the piece of text in it, or nothing."""

    def reply(self) -> Reply:
        """The whole reply. Raises ProtocolError when the stream ended before it did."""


class Dialect(Protocol):
    """How one provider's API words requests and replies. Shape errors may be msgspec's own."""

    path: str
    """Below the base URL."""

    def body(self, request: Request, model: str, stream: bool) -> dict[str, Any]:
        """The request as data. What the request does not set is not in it."""

    def reply(self, data: bytes, request: Request) -> Reply:
        """The reply in a whole response body."""

    def assembler(self, request: Request) -> Assembler:
        """What puts the reply of this request together from a stream."""


class Endpoint:
    """One provider's address: POSTs and GETs there, one attempt each. Belongs to one event loop."""

    def __init__(
        self,
        base_url: str,
        headers: Mapping[str, str | secrets.SecretText] | None = None,
        query: Mapping[str, str] | None = None,
    ) -> None:
        self.base_url, account = _address(base_url)
        self._headers = {**(headers or {})}
        if account and not any(name.lower() == "authorization" for name in self._headers):
            encoded = base64.b64encode(account.encode()).decode()
            self._headers["Authorization"] = secrets.Secret(f"Basic {encoded}")
        for name, value in self._headers.items():
            if re.search("[\r\n\0]", secrets.reveal(value)):
                raise ConfigError(f"the header {name} has a line end in its value, or a NUL")
        self._query = f"?{urllib.parse.urlencode(query)}" if query else ""
        found = secrets.find(self._headers) | secrets.find(query or {}) | {account.partition(":")[2]}
        self._secrets = found | {urllib.parse.quote_plus(secret) for secret in found}
        self._session: ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._hangs_up: bool | None = None
        """Whether the server closes connections after a stream without saying so, as llama.cpp's does."""

    def __repr__(self) -> str:
        return f"Endpoint({self.hide(self.base_url)!r})"

    def hide(self, text: str) -> str:
        """A text without this endpoint's keys."""
        return secrets.hide(text, self._secrets)

    async def post(self, path: str, body: Mapping[str, Any], timeout: float | None) -> bytes:
        """The body of a successful response. Raises a ModelError for every other outcome."""
        async with self._exchange("POST", path, jsontext.encode(body), timeout) as response:
            return await _read(response)

    async def get(self, path: str, timeout: float | None) -> bytes:
        """As `post`."""
        async with self._exchange("GET", path, None, timeout) as response:
            return await _read(response)

    async def events(
        self, path: str, body: Mapping[str, Any], timeout: float | None
    ) -> AsyncGenerator[bytes, None]:
        """The data of each server-sent event of a successful response."""
        parser = EventParser()
        headers = {"Connection": "close"} if self._hangs_up else {}
        async with self._exchange("POST", path, jsontext.encode(body), timeout, headers) as response:
            transport = response.connection.transport if response.connection is not None else None
            if response.content_type == "application/json":  # a server that does not stream after all
                yield await _read(response)
                return
            async for chunk in response.content.iter_any():
                for data in parser.feed(chunk):
                    yield data
            if self._hangs_up is None and transport is not None:
                await asyncio.sleep(LINGER)
                self._hangs_up = transport.is_closing()

    def warm(self) -> None:
        """Begin to import aiohttp, a quarter of a second of work, while something else goes on."""
        asyncio.get_running_loop().run_in_executor(None, importlib.import_module, "aiohttp")

    async def aclose(self) -> None:
        """Close every connection. Safe to call twice."""
        session, self._session = self._session, None
        if session is not None:
            self._finalizer.detach()
            await session.close()

    @asynccontextmanager
    async def _exchange(
        self,
        method: str,
        path: str,
        data: bytes | None,
        timeout: float | None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[ClientResponse]:
        """A response whose status is a success; whatever goes wrong in the block becomes a ModelError."""
        import aiohttp
        from multidict import CIMultiDict

        url = f"{self.base_url}{path}{self._query}"
        # With the request: a session's own headers go to a proxy that is asked for a tunnel, too.
        sent = CIMultiDict({"Content-Type": "application/json", "User-Agent": "rlm"})
        sent.update({name: secrets.reveal(value) for name, value in self._headers.items()})
        sent.update(headers or {})
        limit = aiohttp.ClientTimeout(total=timeout, sock_connect=CONNECT_TIMEOUT)
        try:
            async with await self._asked(method, url, data, sent, limit) as response:
                if not 200 <= response.status < 300:
                    raise failure(response.status, response.headers, await _read(response), self.hide)
                yield response
        except TimeoutError as error:
            if isinstance(error, aiohttp.ConnectionTimeoutError):
                raise ConnectFailed(
                    self.hide(f"no connection to {url} within {CONNECT_TIMEOUT:g} s")
                ) from None
            within = "in time" if timeout is None else f"within {timeout:g} s"
            raise Timeout(self.hide(f"no reply from {url} {within}")) from None
        except aiohttp.ClientConnectorCertificateError as error:  # which no further attempt changes
            raise NotFound(
                self.hide(f"{url} is not trusted: {error}"), code="certificate", sent=False
            ) from None
        except aiohttp.ClientConnectorError as error:
            raise ConnectFailed(self.hide(f"no connection to {url}: {error.os_error or error}")) from None
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
            raise Unavailable(self.hide(f"the connection to {url} broke: {error}")) from None
        except (aiohttp.ClientError, ValueError) as error:
            raise ProtocolError(self.hide(f"no HTTP response from {url}: {_words(error)}")) from None

    async def _asked(
        self,
        method: str,
        url: str,
        data: bytes | None,
        headers: Mapping[str, str],
        limit: ClientTimeout,
    ) -> ClientResponse:
        """A response, over another connection where the server had closed the one that was kept for this.

        Servers may at any time, and llama.cpp's do after each stream. They have not had the request
        then, or not to its end, so that this is no second attempt.
        """
        import aiohttp

        for attempt in range(1, STALE + 1):
            try:
                return await self._opened().request(
                    method,
                    url,
                    data=_sent_as(data),
                    headers=headers,
                    allow_redirects=False,
                    timeout=limit,
                )
            except aiohttp.ClientOSError as error:
                if attempt == STALE or not str(error.__cause__).startswith(UNWRITABLE):
                    raise
        raise AssertionError("the last attempt returns or raises")

    def _opened(self) -> ClientSession:
        loop = asyncio.get_running_loop()
        if self._session is None:
            import aiohttp

            proxy = _proxy_for(self.base_url)
            self._secrets |= _accounts(proxy or "")
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE),
                cookie_jar=aiohttp.DummyCookieJar(),
                read_bufsize=READ_BUFFER,
                proxy=proxy,
            )
            self._loop = loop
            # nobody has to close a client that was given to an RLM, and is not given up
            self._finalizer = weakref.finalize(self, hostloop.run_at_end, self._session.close)
        elif self._loop is not loop:
            raise RuntimeError("a client belongs to the event loop of its first call; make another one")
        return self._session


class HTTPLM(BaseLM):
    """A client of an HTTP API: subclasses give an `Endpoint` and a `Dialect`."""

    endpoint: Endpoint

    @property
    @abstractmethod
    def dialect(self) -> Dialect:
        """How the provider is asked."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model_name!r}, {self.endpoint!r})"

    def pool_key(self, model: str) -> str:
        """The provider's address: all its models share its limits."""
        return self.endpoint.base_url

    async def prepare(self) -> str | None:
        self.endpoint.warm()
        return None

    async def complete(self, request: Request) -> Reply:
        body = self.dialect.body(request, request.model or self.model_name, False)
        data = await self.endpoint.post(self.dialect.path, body, request.timeout)
        with self._shapes(data):
            return self.dialect.reply(data, request)

    async def stream(self, request: Request) -> AsyncIterator[str | Reply]:
        """Pieces of the text as they arrive, then the Reply."""
        body = self.dialect.body(request, request.model or self.model_name, True)
        assembler = self.dialect.assembler(request)
        data, size = b"", 0
        async with aclosing(self.endpoint.events(self.dialect.path, body, request.timeout)) as events:
            async for data in events:
                with self._shapes(data):
                    piece = assembler.feed(data)
                size += len(piece)
                if size > MAX_REPLY:
                    raise ProtocolError(f"the reply is longer than {MAX_REPLY:,} characters")
                if piece:
                    yield piece
        with self._shapes(data):
            yield assembler.reply()

    def _shapes(self, data: bytes) -> Shapes:
        return Shapes(data, self.endpoint.hide)

    async def aclose(self) -> None:
        await self.endpoint.aclose()


class Shapes:
    """Turns what msgspec finds wrong with a reply into a ProtocolError that shows its beginning."""

    def __init__(self, data: bytes, hide: Callable[[str], str]) -> None:
        self._data = data
        self._hide = hide

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, msgspec.MsgspecError | UnicodeDecodeError | RecursionError):
            shown = _clip(self._hide(self._data[:MAX_READ].decode("utf-8", "replace")))
            raise ProtocolError(
                f"the reply is not in the provider's protocol: {error}; it begins {shown!r}"
            ) from None
        if isinstance(error, ModelError):
            error.args = (self._hide(str(error)),)
            error.code = self._hide(error.code) if error.code is not None else None


class EventParser:
    """Server-sent events out of bytes, however they are cut (WHATWG HTML, section 9.2)."""

    def __init__(self) -> None:
        self._line: list[bytes] = []
        self._data: list[bytes] = []
        self._held = 0

    def feed(self, chunk: bytes) -> list[bytes]:
        """The data of every event that these bytes complete. Raises ProtocolError for an endless one."""
        *complete, rest = chunk.split(b"\n")
        if complete:
            complete[0] = b"".join([*self._line, complete[0]])
            self._line = []
        self._line.append(rest)
        self._held += len(chunk)
        if self._held > MAX_REPLY:
            raise ProtocolError(f"an event of the stream is longer than {MAX_REPLY:,} bytes")
        return [event for line in complete if (event := self._take(line.removesuffix(b"\r"))) is not None]

    def _take(self, line: bytes) -> bytes | None:
        """One line; the data of an event when it ends one."""
        if line.startswith(b"data:"):
            self._data.append(line[5:].removeprefix(b" "))
        if line or not self._data:
            return None
        data, self._data, self._held = b"\n".join(self._data), [], 0
        return data


def lenient(data: Any, kind: type[Value]) -> Value | None:
    """Data as a struct; None where it is not in its shape. For what a reply is not worth losing."""
    try:
        return msgspec.convert(data, kind, strict=False)
    except msgspec.ValidationError:
        return None


# -- keys


def find_key(
    given: str | secrets.SecretText | None,
    variables: Sequence[str],
    url: str,
    chosen: bool,
    own: bool = False,
) -> str | None:
    """The key that is given, else that of the first of these environment variables that is set.

    A key of the environment was meant for the address of the environment, or for the provider's
    own. To another one, which ``chosen`` says it is, it does not travel unencrypted. With ``own``
    it is a key for servers of one's own, and may go to one on this machine.
    """
    if given is not None:
        return as_text("api_key", secrets.reveal(given)).strip()
    scheme, _, rest = url.strip().partition("://")
    if chosen and "@" in rest.partition("/")[0]:  # it says who is calling
        return None
    if chosen and scheme.lower() != "https" and not (own and is_loopback(url)):
        return None
    return first_set(variables)


def as_text(name: str, value: Any) -> str:
    """The value of this setting, if it is a text; it is not shown where it is none."""
    if not isinstance(value, str):
        raise ConfigError(f"{name}= is no text, but a {type(value).__name__}")
    return value


def missing_key(provider: str, variables: Sequence[str]) -> AuthError:
    """The error for a key that is nowhere, with the ways to go on, also those without any key."""
    return AuthError(
        f"{provider} needs a key: set {' or '.join(variables)}, or give api_key=. Without one: a server "
        "of your own (base_url='http://...'), a recording (backend='replay'), or a script "
        "(backend='scripted', no model at all).",
        sent=False,
    )


def first_set(variables: Sequence[str]) -> str | None:
    """The first of these environment variables that is set to something."""
    return next((value for name in variables if (value := os.environ.get(name, "").strip())), None)


# -- what a response says when it is no success


class _Told(msgspec.Struct):
    """The parts of an error body that decide what it means."""

    message: str
    code: str


_QUOTA = re.compile(
    r"insufficient[_ ](quota|funds|credits?|balance)|billing_(hard_limit|not_active)"
    r"|credit balance is too low",
    re.IGNORECASE,
)
_OVERFLOW = re.compile(
    r"context_length_exceeded|exceed_context_size"
    r"|\b(exceed|max|available|larger|longer|greater|beyond|outside|fit|too )"
    r".{0,80}\bcontext (window|length|size|limit)"
    r"|\bcontext (window|length|size|limit)( (is|was|of|has been|only))* ?(exceeded|overflow|full|\(?\d)"
    r"|maximum (prompt|model) length|prompt is too long|input is too long|input token count .* exceeds"
    r"|too many (input )?tokens|reduce the length",
    re.IGNORECASE,
)
_OVERFLOW_CODE = re.compile(r"context_length_exceeded|exceed_context_size", re.IGNORECASE)
"""What says so on its own, also with the status of a failure of the server's."""
_TOO_LARGE = re.compile(r"request too large|must be reduced", re.IGNORECASE)
"""Said of a request that is larger than all that a minute allows: it is so at every attempt."""
_SPENT = re.compile(r"exceeded your current quota", re.IGNORECASE)
"""A quota for a minute is told with the same words, and status 429."""
_FILTERED = re.compile(
    r"content[_ ](filter|policy)|ResponsibleAIPolicy|safety system|input was flagged", re.IGNORECASE
)
_NO_MODEL = re.compile(r"model_not_found|model .*(not found|does not exist)", re.IGNORECASE)
_BAD_KEY = re.compile(
    r"invalid_api_key|authentication_error|api key not valid|permission_error", re.IGNORECASE
)
_WINDOW = re.compile(
    r"(?:maximum (?:context|prompt|model) length (?:is|of)|n_ctx\"\s*:|context size \(|context length of only"
    r"|maximum number of tokens allowed \(|context limit: \d{1,9} \+ \d{1,9} >) ?(\d{1,9})\b"
    r"|\b(\d{1,9}) maximum\b",
    re.IGNORECASE,
)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def failure(
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    hide: Callable[[str], str] = lambda text: text,
) -> ModelError:
    """The ModelError that an unsuccessful response stands for. ``hide`` takes keys out of its text."""
    told = _told(body)
    text = _clip(hide(told.message)) or "no reason given"
    if 300 <= status < 400:
        elsewhere = _clip(hide(headers.get("location", "nowhere")))
        text = f"the address answers with a redirect to {elsewhere!r}: use that as base_url"
    details: dict[str, Any] = {
        "status": status,
        "code": hide(told.code) or None,
        "request_id": hide(headers.get("x-request-id") or headers.get("request-id") or "") or None,
    }
    kind = _kind(status, f"{told.code} {told.message}")
    if issubclass(kind, RateLimited | Unavailable | Timeout):
        details["retry_after"] = _retry_after(headers, body)
    if kind is ContextOverflow:
        details["window"] = _window(body)
    return kind(f"HTTP {status}: {text}", **details)


def _kind(status: int, words: str) -> type[ModelError]:
    """What a status means, and where one status means several things, what the words say."""
    if status == 402 or (status in (400, 403, 429) and _QUOTA.search(words)):
        return QuotaExceeded
    if status in (400, 403) and _SPENT.search(words):
        return QuotaExceeded
    if status == 429:
        return BadRequest if _TOO_LARGE.search(words) else RateLimited
    if status == 408:
        return Timeout
    if status == 501:
        return BadRequest
    if status >= 500 and _OVERFLOW_CODE.search(words):
        return ContextOverflow
    if status in (409, 425) or status >= 500:
        return Unavailable
    if status in (400, 413, 422) and _OVERFLOW.search(words):
        return ContextOverflow
    if status == 403 and _FILTERED.search(words):
        return ContentFiltered
    if status in (401, 403, 407) or _BAD_KEY.search(words):
        return AuthError
    if status == 404 or status < 400 or _NO_MODEL.search(words):
        return NotFound
    return ContentFiltered if _FILTERED.search(words) else BadRequest


def in_band(error: Any, hide: Callable[[str], str] = lambda text: text) -> ModelError:
    """The ModelError for an error object inside a successful response, or in the middle of a stream."""
    told: dict[str, Any] = error if isinstance(error, dict) else {}
    code = told.get("code")
    if isinstance(code, int) and 400 <= code < 600:
        status = code
    else:
        words = (told.get("type"), code)
        status = next(
            (_STATUS_OF[word] for word in words if isinstance(word, str) and word in _STATUS_OF), 500
        )
    return failure(status, {}, jsontext.encode({"error": error}), hide)


_STATUS_OF = {
    "context_length_exceeded": 400,
    "content_filter": 400,
    "insufficient_quota": 429,
    "invalid_request_error": 400,
    "authentication_error": 401,
    "permission_error": 403,
    "not_found_error": 404,
    "billing_error": 402,
    "request_too_large": 413,
    "timeout_error": 504,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "overloaded_error": 529,
}


def _told(body: bytes) -> _Told:
    """What an error body says, in any of the shapes that servers have for it."""
    try:
        data = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        text = re.sub(r"<[^<>]*>|\s+", " ", body[:MAX_READ].decode("utf-8", "replace"))
        return _Told(" ".join(text.split()), "")
    if isinstance(data, list) and data:
        data = data[0]
    error = data.get("error", data) if isinstance(data, dict) else data
    if not isinstance(error, dict):
        return _Told("" if error is None else _text(error), "")
    message = error.get("message") or error.get("detail") or error.get("error") or error
    code = next((error[key] for key in ("code", "type", "status") if _is_word(error.get(key))), "")
    return _Told(_text(message), code[:MAX_SHOWN])


def _text(value: Any) -> str:
    """What a server says, as far as it is read."""
    return (value if isinstance(value, str) else jsontext.encode(value).decode())[:MAX_READ]


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _window(body: bytes) -> int | None:
    """How many tokens the model reads, if an overflow says so."""
    found = _WINDOW.search(body[:MAX_READ].decode("utf-8", "replace"))
    return int(next(group for group in found.groups() if group)) if found else None


def _retry_after(headers: Mapping[str, str], body: bytes) -> float | None:
    """Seconds until another attempt is welcome (RFC 9110, section 10.2.3, and what providers add)."""
    try:
        seconds = _asked(headers, body)
    except (ValueError, OverflowError):
        return None
    return max(seconds, 0.0) if seconds is not None and math.isfinite(seconds) else None


def _asked(headers: Mapping[str, str], body: bytes) -> float | None:
    if "retry-after-ms" in headers:
        return float(headers["retry-after-ms"]) / 1000
    if "retry-after" in headers:
        return _seconds(headers["retry-after"])
    delay = re.search(rb'"retryDelay"\s*:\s*"([^"]{1,40})"', body[:MAX_READ])
    durations = [delay[1].decode("ascii", "replace")] if delay else []
    durations += [headers[name] for name in _RESETS if name in headers and _is_used_up(headers, name)]
    spans = [found for text in durations if (found := _DURATION.findall(text[:40]))]
    return max((sum(float(n) * _SECONDS[unit] for n, unit in found) for found in spans), default=None)


_RESETS = ("x-ratelimit-reset-requests", "x-ratelimit-reset-tokens")


def _is_used_up(headers: Mapping[str, str], reset: str) -> bool:
    return headers.get(reset.replace("reset", "remaining")) == "0"


def _seconds(retry_after: str) -> float:
    if re.fullmatch(r"\d+(\.\d+)?", retry_after.strip()):
        return float(retry_after)
    import email.utils

    moment = email.utils.parsedate_to_datetime(retry_after)
    return moment.timestamp() - time.time()


# -- small things


def _sent_as(data: bytes | None) -> bytes | io.BytesIO | None:
    """A body as aiohttp wants it: it warns of large ones that it cannot send part by part."""
    return io.BytesIO(data) if data is not None and len(data) > LARGE_BODY else data


async def _read(response: ClientResponse) -> bytes:
    """The whole body, if it is of a sane size: unpacked, should it come packed."""
    pieces, size = [], response.content_length or 0
    if size <= MAX_REPLY:
        size = 0
        async for piece in response.content.iter_any():
            pieces.append(piece)
            size += len(piece)
            if size > MAX_REPLY:
                break
    if size > MAX_REPLY:
        raise ProtocolError(f"the reply is longer than {MAX_REPLY:,} bytes")
    return b"".join(pieces)


def _address(url: str) -> tuple[str, str]:
    """A base URL without a name and a password in it, and those."""
    try:
        parts = urllib.parse.urlsplit(url)
        parts.port  # noqa: B018 - it is parsed here
    except ValueError as error:
        raise ConfigError(f"base_url is no address: {error}") from None
    account, _, host = parts.netloc.rpartition("@")
    plain = urllib.parse.urlunsplit(parts._replace(netloc=host))
    if parts.scheme not in ("http", "https") or not parts.hostname:
        shown = plain.rpartition("@")[2]  # a password may stand there without the address being one
        raise ConfigError(f"base_url={shown!r} is no address: it begins with http:// or https://")
    if parts.query or parts.fragment:
        raise ConfigError(
            f"base_url={urllib.parse.urlunsplit((parts.scheme, host, parts.path, '', ''))!r} has something "
            "behind it: that belongs into query="
        )
    return plain.rstrip("/"), urllib.parse.unquote(account)


def is_loopback(url: str) -> bool:
    """Whether an address is this machine's own, and nothing sent there travels."""
    try:
        host = urllib.parse.urlsplit(url.strip()).hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _proxy_for(url: str) -> str | None:
    """The proxy that the environment names for an address; looked up once, not at each call."""
    import urllib.request

    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    if is_loopback(url) or urllib.request.proxy_bypass(host):
        return None
    return urllib.request.getproxies().get(parts.scheme)


def _accounts(url: str) -> set[str]:
    """The name and the password in a proxy's address, as errors may have them: aiohttp writes them anew."""
    import yarl

    given = url.rpartition("@")[0].rpartition("//")[2]
    accounts = {given} if given else set()
    with contextlib.suppress(ValueError):
        accounts |= {yarl.URL(url).raw_authority.rpartition("@")[0]} - {""}
    passwords = {account.partition(":")[2] or account for account in accounts}
    whole = {f"{account}@" for account in accounts}  # also where the password is too short to be hidden alone
    return whole | passwords | {urllib.parse.unquote(password) for password in passwords}


def _clip(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _words(error: BaseException) -> str:
    return _clip(f"{type(error).__name__}: {error}")

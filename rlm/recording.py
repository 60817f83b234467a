"""Model calls on file: recorded as they are made, and found again by what was asked.

A recording is a file of JSON lines, one `Recorded` a line, in the order in which the replies
came. `RecordingLM` writes it around any client; the client ``replay`` answers from it.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Self

import msgspec

from . import jsonl, jsontext, secrets
from .client import (
    BaseLM,
    Message,
    ModelInfo,
    Reply,
    Request,
    SupportsCount,
    SupportsPoolKey,
    SupportsStream,
)
from .errors import ConfigError

log = logging.getLogger("rlm")

DECISIVE = ("messages", "max_tokens", "temperature", "stop", "seed", "schema", "extra")
"""What decides a reply, beside the model. Not how long it may take, nor what a provider's cache is told."""


class Recorded(msgspec.Struct, frozen=True, omit_defaults=True):
    """One call and what came of it."""

    key: str
    """What the reply is found by: the request's `request_key`."""
    when: datetime.datetime
    """When the reply had come, in UTC."""
    client: str
    """The class of the client that made the call."""
    request: Request
    """What decided the reply, ``model`` included. Secrets in ``extra`` are masked."""
    reply: Reply
    """Without ``raw``."""
    seconds: float
    """How long the call took."""
    line: int = 0
    """Where it stands in the file it was read from."""

    @property
    def model(self) -> str:
        """The model that was asked."""
        return self.request.model or "unknown"


def decisive(request: Request, model: str | None) -> Request:
    """A request as it is recorded and compared: what decides the reply, and no secret."""
    return Request(
        request.messages,
        model=model,
        max_tokens=request.max_tokens,
        temperature=None if request.temperature is None else float(request.temperature),
        stop=request.stop,
        seed=request.seed,
        schema=_plain(request.schema),
        extra=_plain(secrets.mask(request.extra)),
    )


def request_key(request: Request, model: str | None) -> str:
    """A name for what is asked: equal for requests to which a model would say the same.

    Without a ``model``: of any model.
    It is the same in every process and release, so only what is set counts. Lone surrogates
    count as the replacement characters that are sent for them. A secret in ``extra`` counts
    as any other secret: a recording does not depend on whose key it was made with.
    """
    return _key(decisive(request, model))


def _key(request: Request) -> str:
    asked = {name: value for name in DECISIVE if (value := getattr(request, name)) is not None}
    return hashlib.sha256(jsontext.canonical({"model": request.model, **asked})).hexdigest()


def _plain(value: Any) -> Any:
    """Data that JSON can hold: what a client's own library takes in ``extra`` need not be."""
    return msgspec.to_builtins(value, str_keys=True, enc_hook=lambda odd: f"<{type(odd).__qualname__}>")


# --- writing -------------------------------------------------------------------------------------


class Recorder(jsonl.Appender):
    """A file that any number of `RecordingLM` write to. Readable by its owner only.

    Raises ConfigError where no such file can be.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            super().__init__(path, "recording")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"the recording {str(path)!r} cannot be written: {reason}") from error

    def record(self, client: BaseLM) -> RecordingLM:
        """The same client, with its calls written here. Closing it leaves this file open for others."""
        return RecordingLM(client, self)

    def write(self, client: str, model: str, request: Request, reply: Reply, seconds: float) -> None:
        """Append a call. Nothing that goes wrong here costs the reply, which may have been paid for."""
        try:
            asked = decisive(request, model)
            kept = msgspec.structs.replace(reply, raw=None)
            when = datetime.datetime.now(datetime.UTC)
            self.append(Recorded(_key(asked), when, client, asked, kept, round(seconds, 6)))
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            log.warning("a reply of %s is not recorded in %s: %s", client, self.path, error)


class RecordingLM(BaseLM):
    """Any client, with every reply appended to a recording: a path, or a `Recorder` that others share.

    It streams, counts tokens and knows pool keys if the client does, and not otherwise.
    """

    def __new__(cls, client: BaseLM, recorder: Recorder | str | Path) -> Self:
        kind: type[Self] = _offering(cls, tuple(kind for kind in _OFFERS if kind.fits(client)))
        return super().__new__(kind)

    def __init__(self, client: BaseLM, recorder: Recorder | str | Path) -> None:
        self._client = client
        self._is_shared = isinstance(recorder, Recorder)
        self._recorder = recorder if isinstance(recorder, Recorder) else Recorder(recorder)

    def __repr__(self) -> str:
        return f"RecordingLM({self._client!r}, {str(self._recorder.path)!r})"

    @property
    def model_name(self) -> str:  # type: ignore[override]
        """The client's."""
        return self._client.model_name

    @property
    def simulated(self) -> bool:  # type: ignore[override]
        """Whether the client's replies are no model's."""
        return self._client.simulated

    async def prepare(self) -> str | None:
        return await self._client.prepare()

    def info(self, model: str) -> ModelInfo:
        return self._client.info(model)

    async def complete(self, request: Request) -> Reply:
        start = time.perf_counter()
        reply = await self._client.complete(request)
        self.record(request, reply, start)
        return reply

    async def aclose(self) -> None:
        """Close the client, and the file unless it is shared."""
        try:
            await self._client.aclose()
        finally:
            if not self._is_shared:
                self._recorder.close()

    def record(self, request: Request, reply: object, start: float) -> None:
        """Append a call that began at ``start``. A cache's hits are told to this too: a replay needs them."""
        if isinstance(reply, Reply):  # a client that returns something else is told so elsewhere
            model = request.model or self._client.model_name
            seconds = time.perf_counter() - start
            self._recorder.write(type(self._client).__name__, model, request, reply, seconds)


class _Streaming(RecordingLM):
    """Around a client that streams."""

    @staticmethod
    def fits(client: BaseLM) -> bool:
        return isinstance(client, SupportsStream)

    async def stream(self, request: Request) -> AsyncIterator[str | Reply]:
        """The client's stream. What is left before its end is not recorded."""
        assert isinstance(self._client, SupportsStream)
        start = time.perf_counter()
        pieces = self._client.stream(request)
        try:
            async for piece in pieces:
                self.record(request, piece, start)
                yield piece
        finally:
            close = getattr(pieces, "aclose", None)
            if close is not None:  # whoever leaves this stream leaves the client's
                await close()


class _Counting(RecordingLM):
    """Around a client that counts tokens."""

    @staticmethod
    def fits(client: BaseLM) -> bool:
        return isinstance(client, SupportsCount)

    async def count(self, request: Request) -> tuple[int, bool]:
        """The client's count."""
        assert isinstance(self._client, SupportsCount)
        return await self._client.count(request)


class _Pooling(RecordingLM):
    """Around a client that knows which models share limits."""

    @staticmethod
    def fits(client: BaseLM) -> bool:
        return isinstance(client, SupportsPoolKey)

    def pool_key(self, model: str) -> str:
        """The client's key."""
        assert isinstance(self._client, SupportsPoolKey)
        return self._client.pool_key(model)


_OFFERS = (_Streaming, _Counting, _Pooling)


@functools.cache
def _offering(cls: type[RecordingLM], offers: tuple[type[RecordingLM], ...]) -> type[Any]:
    """The class with these offers: what isinstance says of an instance is then true."""
    return type(cls.__name__, (*offers, cls), {"__module__": cls.__module__}) if offers else cls


# --- reading -------------------------------------------------------------------------------------


def load(path: str | Path) -> list[Recorded]:
    """Everything in a recording, in order. Raises ConfigError, saying which line and what to do.

    A line that a dying process or a full disk has cut short is left out, with a log entry.
    """
    try:
        texts: dict[str, str] = {}
        found = [_kept(line, recorded, texts) for line, recorded in jsonl.read(path, _decoder())]
        size = Path(path).stat().st_size
    except FileNotFoundError:
        raise ConfigError(f"there is no recording {path}: {_MAKE_ONE}") from None
    except OSError as error:
        raise ConfigError(f"the recording {path} cannot be read: {error}") from error
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"{path} is no recording of model calls, or somebody has changed it: {error}. "
            f"Give the file that record= named, take the line out, or else {_MAKE_ONE}"
        ) from None
    if not found:
        empty = "is empty" if size == 0 else "is no recording: not one of its lines is a recorded call"
        raise ConfigError(f"{path} {empty}; {_MAKE_ONE}")
    return found


_MAKE_ONE = "run once with record= and that path to make one"


@functools.cache
def _decoder() -> msgspec.json.Decoder[Recorded]:
    return msgspec.json.Decoder(Recorded)


def _kept(line: int, recorded: Recorded, texts: dict[str, str]) -> Recorded:
    """What was read, with equal texts held once: each turn of a run repeats the whole conversation."""
    messages = tuple(
        Message(message.role, texts.setdefault(message.content, message.content))
        for message in recorded.request.messages
    )
    request = msgspec.structs.replace(recorded.request, messages=messages)
    return msgspec.structs.replace(recorded, request=request, line=line)

"""The chat completions API: what OpenAI began, and nearly every server speaks."""

from __future__ import annotations

from typing import Any

import msgspec

from rlm.client import Finish, Reply, Request, Usage
from rlm.errors import ProtocolError
from rlm.http import in_band, lenient

FINISH: dict[str | None, Finish] = {"stop": "stop", "length": "length", "content_filter": "filter"}


class _Part(msgspec.Struct):
    text: str = ""


class _Message(msgspec.Struct):
    content: str | list[_Part] | None = None
    refusal: str | None = None

    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or self.refusal or ""


class _Choice(msgspec.Struct):
    message: _Message | None = None
    delta: _Message | None = None
    finish_reason: str | None = None
    error: Any = None
    """OpenRouter's, where a model breaks off."""


class _InputDetails(msgspec.Struct):
    cached_tokens: int | None = None
    cache_write_tokens: int | None = None


class _OutputDetails(msgspec.Struct):
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _InputDetails | None = None
    completion_tokens_details: _OutputDetails | None = None
    cost: float | None = None

    def normalised(self, guess: Usage) -> Usage:
        """Tokens by our names; a count that is not there is the guess."""
        read = self.prompt_tokens_details or _InputDetails()
        wrote = self.completion_tokens_details or _OutputDetails()
        return Usage(
            input_tokens=guess.input_tokens if self.prompt_tokens is None else self.prompt_tokens,
            output_tokens=guess.output_tokens if self.completion_tokens is None else self.completion_tokens,
            cached_tokens=read.cached_tokens or 0,
            cache_write_tokens=read.cache_write_tokens or 0,
            reasoning_tokens=wrote.reasoning_tokens or 0,
            cost=self.cost,
            estimated=self.prompt_tokens is None or self.completion_tokens is None,
        )


class _Completion(msgspec.Struct):
    """A whole reply, or one chunk of a streamed one."""

    choices: list[_Choice] | None = None
    usage: Any = None
    """A `_Usage`, if it is one: a reply that was paid for is not lost for want of it."""
    id: str | None = None
    model: str | None = None
    error: Any = None

    def first(self) -> _Choice:
        """The only choice. Raises the error that is in the place of a reply."""
        choice = self.choices[0] if self.choices else _Choice()
        if self.error is not None or choice.error is not None:
            raise in_band(choice.error if self.error is None else self.error)
        return choice


_decoder = msgspec.json.Decoder(_Completion)


class Chat:
    """``POST /chat/completions``. ``token_field`` is what the server calls the limit of a reply."""

    path = "/chat/completions"

    def __init__(self, token_field: str = "max_tokens", cache_key: bool = False) -> None:
        self._token_field = token_field
        self._cache_key = cache_key

    def body(self, request: Request, model: str, stream: bool) -> dict[str, Any]:
        body: dict[str, Any] = {"model": model, "messages": request.messages}
        if request.max_tokens is not None:
            body[self._token_field] = request.max_tokens
        if request.temperature is not None:
            body["temperature"] = request.temperature
        if request.stop is not None:
            body["stop"] = request.stop
        if request.seed is not None:
            body["seed"] = request.seed
        if request.schema is not None:
            schema = {"name": "reply", "schema": request.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        if request.session is not None and self._cache_key:
            body["prompt_cache_key"] = request.session
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body | request.extra if request.extra else body

    def reply(self, data: bytes, request: Request) -> Reply:
        completion = _decoder.decode(data)
        choice = completion.first()
        if choice.message is None:
            raise ProtocolError("the reply has no message")
        return _made(completion, choice.message.text(), choice.finish_reason, completion.usage, request)

    def assembler(self, request: Request) -> ChatAssembler:
        return ChatAssembler(request)


class ChatAssembler:
    """Chunks of a streamed completion. Some servers end it with ``[DONE]``, some with a reason only."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._pieces: list[str] = []
        self._last = _Completion()
        self._usage: Any = None
        self._finish: str | None = None
        self._done = False

    def feed(self, data: bytes) -> str:
        if data == b"[DONE]":
            self._done = True
            return ""
        chunk = _decoder.decode(data)
        choice = chunk.first()
        self._last = chunk
        self._usage = chunk.usage or self._usage
        self._finish = choice.finish_reason or self._finish
        said = (choice.delta, choice.message)  # the latter where nothing was streamed
        piece = next((text for part in said if part and (text := part.text())), "")
        self._pieces.append(piece)
        return piece

    def reply(self) -> Reply:
        if not self._done and self._finish is None:
            raise ProtocolError("the stream ended before the reply did")
        return _made(self._last, "".join(self._pieces), self._finish, self._usage, self._request)


def _made(source: _Completion, text: str, reason: str | None, told: Any, request: Request) -> Reply:
    usage = lenient(told, _Usage) or _Usage()
    return Reply(
        text=text,
        finish=FINISH.get(reason, "other") if reason else "stop",
        usage=usage.normalised(Usage.estimate(request.messages, text)),
        model=source.model,
        id=source.id,
    )

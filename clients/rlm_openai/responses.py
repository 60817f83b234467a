"""The responses API: OpenAI's newer one, also spoken by llama.cpp, vLLM and others."""

from __future__ import annotations

from typing import Any

import msgspec

from rlm.client import Finish, Reply, Request, Usage
from rlm.errors import ProtocolError
from rlm.http import in_band, lenient

FINISH: dict[str | None, Finish] = {"max_output_tokens": "length", "content_filter": "filter"}


class _Content(msgspec.Struct):
    text: str = ""
    refusal: str = ""


class _Output(msgspec.Struct):
    type: str = ""
    content: list[_Content] | None = None


class _InputDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _OutputDetails(msgspec.Struct):
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct):
    input_tokens: int | None = None
    output_tokens: int | None = None
    input_tokens_details: _InputDetails | None = None
    output_tokens_details: _OutputDetails | None = None

    def normalised(self, guess: Usage) -> Usage:
        """Tokens by our names; a count that is not there is the guess."""
        read = self.input_tokens_details or _InputDetails()
        wrote = self.output_tokens_details or _OutputDetails()
        return Usage(
            input_tokens=guess.input_tokens if self.input_tokens is None else self.input_tokens,
            output_tokens=guess.output_tokens if self.output_tokens is None else self.output_tokens,
            cached_tokens=read.cached_tokens or 0,
            reasoning_tokens=wrote.reasoning_tokens or 0,
            estimated=self.input_tokens is None or self.output_tokens is None,
        )


class _Incomplete(msgspec.Struct):
    reason: str | None = None


class _Response(msgspec.Struct):
    output: list[_Output] | None = None
    status: str | None = None
    incomplete_details: _Incomplete | None = None
    usage: Any = None
    """A `_Usage`, if it is one."""
    id: str | None = None
    model: str | None = None
    error: Any = None


class _Event(msgspec.Struct):
    type: str = ""
    delta: Any = None
    response: _Response | None = None
    error: Any = None
    message: str | None = None
    code: str | None = None


_decoder = msgspec.json.Decoder(_Response)
_event_decoder = msgspec.json.Decoder(_Event)


class Responses:
    """``POST /responses``. It knows neither stop sequences nor seeds: they are sent for it to refuse."""

    path = "/responses"

    def __init__(self, cache_key: bool = False) -> None:
        self._cache_key = cache_key

    def body(self, request: Request, model: str, stream: bool) -> dict[str, Any]:
        # OpenAI takes messages without a type too; llama.cpp none of the assistant's.
        said = [{"type": "message", "role": m.role, "content": m.content} for m in request.messages]
        body: dict[str, Any] = {"model": model, "input": said}
        if request.max_tokens is not None:
            body["max_output_tokens"] = request.max_tokens
        if request.temperature is not None:
            body["temperature"] = request.temperature
        if request.stop is not None:
            body["stop"] = request.stop
        if request.seed is not None:
            body["seed"] = request.seed
        if request.schema is not None:
            body["text"] = {"format": {"type": "json_schema", "name": "reply", "schema": request.schema}}
        if request.session is not None and self._cache_key:
            body["prompt_cache_key"] = request.session
        if stream:
            body["stream"] = True
        return body | request.extra if request.extra else body

    def reply(self, data: bytes, request: Request) -> Reply:
        return _made(_decoder.decode(data), request)

    def assembler(self, request: Request) -> ResponsesAssembler:
        return ResponsesAssembler(request)


_PIECES = ("response.output_text.delta", "response.refusal.delta")


class ResponsesAssembler:
    """Typed events; the last of them holds the whole response."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._response: _Response | None = None

    def feed(self, data: bytes) -> str:
        if data == b"[DONE]":
            return ""
        event = _event_decoder.decode(data)
        if event.type in _PIECES and isinstance(event.delta, str):
            return event.delta
        if event.type in ("response.completed", "response.incomplete", "response.failed"):
            self._response = event.response
        elif event.type == "error" or event.error is not None:
            raise in_band(event.error or {"message": event.message, "code": event.code})
        elif not event.type:  # nothing was streamed: this is the response itself
            self._response = _decoder.decode(data)
        return ""

    def reply(self) -> Reply:
        if self._response is None:
            raise ProtocolError("the stream ended before the reply did")
        return _made(self._response, self._request)


def _made(response: _Response, request: Request) -> Reply:
    if response.error is not None:
        raise in_band(response.error)
    if response.status in ("failed", "cancelled", "queued", "in_progress"):
        raise ProtocolError(f"the reply is not finished: it is {response.status}")
    if response.output is None:
        raise ProtocolError("the reply has no output")
    said = [item for output in response.output if output.type == "message" for item in output.content or ()]
    text = "".join(content.text or content.refusal for content in said)
    reason = response.incomplete_details.reason if response.incomplete_details else None
    usage = lenient(response.usage, _Usage) or _Usage()
    return Reply(
        text=text,
        finish=FINISH.get(reason, "other") if reason or response.status == "incomplete" else "stop",
        usage=usage.normalised(Usage.estimate(request.messages, text)),
        model=response.model,
        id=response.id,
    )

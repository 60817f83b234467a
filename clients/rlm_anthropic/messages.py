"""The Messages API: what a request has to look like, and what replies and their streams say."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from rlm.client import Finish, Message, ModelInfo, Reply, Request, Usage
from rlm.errors import BadRequest, ProtocolError
from rlm.http import in_band

FINISH: dict[str | None, Finish] = {
    None: "stop",
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "refusal": "filter",
}

UNKNOWN_MAX_OUTPUT = 8192
"""Tokens a reply may have where nobody says how many the model can write: all models can write these."""

DEFAULT_CAP = 32_000
"""Tokens beyond which a reply does not go unless somebody asked: such a reply takes many minutes."""

COUNTED = ("model", "system", "messages", "thinking", "tools", "tool_choice", "output_config")
"""Fields of a request that are part of what the model reads."""

_BREAKPOINT = {"type": "ephemeral"}
_THINKING = ("thinking", "redacted_thinking")

Block = dict[str, Any]


class _Message(msgspec.Struct):
    """A whole reply. Only its content has to be there."""

    content: list[Block]
    id: str | None = None
    model: str | None = None
    stop_reason: str | None = None
    usage: Any = None


class _Head(msgspec.Struct):
    """What tells a reply from an error that came with a status of success."""

    type: str | None = None
    error: Any = None


class _Event(msgspec.Struct):
    type: str
    message: _Message | None = None
    content_block: Block = {}
    delta: Block = {}
    usage: Any = None
    error: Any = None


_decoder = msgspec.json.Decoder(_Message)
_head_decoder = msgspec.json.Decoder(_Head)
_event_decoder = msgspec.json.Decoder(_Event)


class Messages:
    """``POST /messages``. ``info`` says what is known of a model, ``max_tokens`` what a reply may have."""

    path = "/messages"

    def __init__(self, info: Callable[[str], ModelInfo], max_tokens: int | None = None) -> None:
        self._info = info
        self._max_tokens = max_tokens

    def body(self, request: Request, model: str, stream: bool) -> dict[str, Any]:
        info = self._info(model)
        _check(request, model, info)
        system = [_text(m.content) for m in request.messages if m.role == "system" and m.content.strip()]
        body: dict[str, Any] = {
            "model": model,
            "max_tokens": request.max_tokens or self._max_tokens or _default_limit(info),
            "messages": _turns(request.messages),
        }
        if system:
            body["system"] = system
        if request.cache:
            _mark(body)
        if request.temperature is not None:
            body["temperature"] = request.temperature
        if request.stop is not None:
            body["stop_sequences"] = request.stop
        if stream:
            body["stream"] = True
        return _with_output_config(body | (request.extra or {}), request)

    def reply(self, data: bytes, request: Request) -> Reply:
        head = _head_decoder.decode(data)
        if head.type == "error":
            raise in_band(head.error)
        return _made(_decoder.decode(data), request)

    def assembler(self, request: Request) -> MessagesAssembler:
        return MessagesAssembler(request)


class MessagesAssembler:
    """Typed events: a message without content, blocks in pieces, then how it ended and what it took."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._message: _Message | None = None
        self._parts: dict[str, list[str]] = {}
        self._done = False

    def feed(self, data: bytes) -> str:
        event = _event_decoder.decode(data)
        if event.type == "error":
            raise in_band(event.error)
        if event.type == "message":  # nothing was streamed: this is the reply itself
            self._message, self._done = _decoder.decode(data), True
            return _said(self._message.content)
        if event.type == "message_start":
            self._message = event.message
        elif event.type == "message_stop":
            self._end_block()
            self._done = True
        elif event.type == "content_block_start":
            return self._start_block(event.content_block)
        elif event.type == "content_block_delta":
            return self._more(event.delta)
        elif event.type == "message_delta":
            self._learn(event)
        return ""  # of a ping, and of whatever else there will be

    def reply(self) -> Reply:
        if self._message is None or not self._done:
            raise ProtocolError("the stream ended before the reply did")
        return _made(self._message, self._request)

    def _begun(self) -> _Message:
        """The message, also where a stream forgets to begin it: llama.cpp's do after half a character."""
        if self._message is None:
            self._message = _Message([])
        return self._message

    def _start_block(self, block: Block) -> str:
        self._end_block()
        self._begun().content.append(block)
        return _said([block]) if block.get("type") == "text" else ""

    def _more(self, delta: Block) -> str:
        """A piece of the block that was begun last: they come one after the other."""
        if not self._begun().content:
            raise ProtocolError("the stream continues a block that was not begun")
        for name, piece in delta.items():
            if name != "type" and isinstance(piece, str):
                self._parts.setdefault(name, []).append(piece)
        piece = delta.get("text", "")
        if not isinstance(piece, str):
            raise ProtocolError(f"a piece of text is {piece!r}")
        is_text = self._begun().content[-1].get("type") == "text"
        return piece if is_text else ""

    def _end_block(self) -> None:
        """Put the pieces of a block together at its end: at each piece it would take ever longer."""
        if self._parts:
            block = self._begun().content[-1]
            block |= {name: block.get(name, "") + "".join(pieces) for name, pieces in self._parts.items()}
            self._parts = {}

    def _learn(self, event: _Event) -> None:
        """Usage at the end is the whole of it, and names only what has changed since the beginning."""
        message = self._begun()
        message.stop_reason = event.delta.get("stop_reason")
        if isinstance(event.usage, dict):
            known = message.usage if isinstance(message.usage, dict) else {}
            message.usage = known | {name: n for name, n in event.usage.items() if n is not None}


# -- requests


def _check(request: Request, model: str, info: ModelInfo) -> None:
    """Refuse what the API would refuse or pass over, before anything is sent."""
    if request.temperature is not None and info.supports is not None and "temperature" not in info.supports:
        raise BadRequest(f"{model} takes no temperature: leave it out", sent=False)
    if request.seed is not None:
        raise BadRequest("the Messages API has no seed; a server that has one takes it as extra", sent=False)


def _default_limit(info: ModelInfo) -> int:
    return min(info.max_output or UNKNOWN_MAX_OUTPUT, DEFAULT_CAP)


def _turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The conversation as the API takes it: roles in turn, the user's first, no empty text."""
    said = [message for message in messages if message.role != "system" and message.content.strip()]
    if not said:
        raise BadRequest("there is no message with text in it, and the API wants one", sent=False)
    if said[0].role != "user":
        raise BadRequest("the first message is the assistant's, and the API wants the user's", sent=False)
    turns = itertools.groupby(said, key=lambda message: message.role)
    return [{"role": role, "content": _content([turn.content for turn in group])} for role, group in turns]


def _content(texts: Sequence[str]) -> str | list[Block]:
    """Texts that were apart stay apart, as blocks: nothing is put between them."""
    return texts[0] if len(texts) == 1 else [_text(text) for text in texts]


def _text(text: str) -> Block:
    return {"type": "text", "text": text}


def _mark(body: dict[str, Any]) -> None:
    """Ask the provider to keep what it has read: the system's part, and all up to the last message."""
    last = body["messages"][-1]
    if isinstance(last["content"], str):
        last["content"] = [_text(last["content"])]
    last["content"][-1]["cache_control"] = _BREAKPOINT
    if "system" in body:
        body["system"][-1]["cache_control"] = _BREAKPOINT


def _with_output_config(body: dict[str, Any], request: Request) -> dict[str, Any]:
    """The schema, beside what ``extra`` may have put there, such as an effort."""
    if request.schema is not None:
        schema = {"type": "json_schema", "schema": request.schema}
        body["output_config"] = {"format": schema, **(body.get("output_config") or {})}
    return body


# -- replies


def _made(message: _Message, request: Request) -> Reply:
    text = _said(message.content)
    thought = any(block.get("type") in _THINKING for block in message.content)
    return Reply(
        text=text,
        finish=FINISH.get(message.stop_reason, "other"),
        usage=_usage(message.usage, Usage.estimate(request.messages, text)),
        model=message.model,
        id=message.id,
        raw={"content": message.content} if thought else None,
    )


def _said(content: Sequence[Block]) -> str:
    texts = [block.get("text") for block in content if block.get("type") == "text"]
    wrong = [text for text in texts if not isinstance(text, str)]
    if wrong:
        raise ProtocolError(f"a block of text has {wrong[0]!r} for it")
    return "".join(text for text in texts if isinstance(text, str))


def _usage(told: Any, guess: Usage) -> Usage:
    """Tokens by our names: the provider's input is without what has to do with its cache."""
    if not isinstance(told, dict) or not isinstance(told.get("output_tokens"), int):
        return guess
    if not isinstance(told.get("input_tokens"), int):
        return msgspec.structs.replace(guess, output_tokens=told["output_tokens"])
    read, written = _number(told, "cache_read_input_tokens"), _number(told, "cache_creation_input_tokens")
    details = told.get("output_tokens_details")
    return Usage(
        input_tokens=_number(told, "input_tokens") + read + written,
        output_tokens=_number(told, "output_tokens"),
        cached_tokens=read,
        cache_write_tokens=written,
        reasoning_tokens=_number(details, "thinking_tokens") if isinstance(details, dict) else 0,
    )


def _number(told: Mapping[str, Any], name: str) -> int:
    value = told.get(name)
    return value if isinstance(value, int) else 0

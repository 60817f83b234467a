"""The three dialects in which models are spoken to over HTTP, from the server's side.

What a request says, and how a reply, a stream of one, or an error is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import msgspec

from ..client import Usage

Dialect = Literal["openai", "responses", "anthropic", "other"]
Fault = Literal["hang", "close", "half", "stall", "slow", "garbage"]
Data = dict[str, Any]

PATHS: dict[str, Dialect] = {
    "/chat/completions": "openai",
    "/responses": "responses",
    "/messages": "anthropic",
}
"""How the paths end by which calls are told apart."""

PIECES = 8
"""Into how many pieces the text of a stream is cut, if it is long enough."""

FINISH: dict[str, dict[str, str]] = {
    "openai": {"stop": "stop", "length": "length", "filter": "content_filter"},
    "responses": {"length": "max_output_tokens", "filter": "content_filter"},
    "anthropic": {"stop": "end_turn", "length": "max_tokens", "filter": "refusal"},
}

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    529: "overloaded_error",
}
"""What kind of error a status is, by Anthropic's names."""


class Seen(msgspec.Struct, frozen=True):
    """One request as it arrived."""

    path: str
    headers: dict[str, str]
    """By names in lower case."""
    body: Data
    """Empty when it was no JSON object."""
    number: int
    """From 1, in the order of arrival."""
    dialect: Dialect
    text: str
    """Of the last message."""


class Behaviour(msgspec.Struct, frozen=True, kw_only=True):
    """What to do with a request: answer it well, refuse it, or go wrong."""

    text: str = "ok"
    finish: Literal["stop", "length", "filter"] = "stop"
    usage: Usage | None = Usage(input_tokens=7, output_tokens=3)
    """None: the reply says nothing about it."""
    latency: float = 0.0
    """Seconds before the first byte; of a slow reply, until the last."""
    status: int = 200
    """Any other than 200 is an error, in the shape of the dialect."""
    headers: dict[str, str] = {}
    """Further ones."""
    code: str | None = None
    """The error's code; for Anthropic, its type."""
    message: str | None = None
    """The error's words."""
    body: bytes | None = None
    """Sent in place of what would be said."""
    content_type: str | None = None
    """None: what is right for the body."""
    fault: Fault | None = None
    """``hang`` never answers. ``close`` ends the connection without an answer, ``half`` in the middle of
    one; ``stall`` sends no more than that half. ``slow`` sends a few bytes at a time over ``latency``
    seconds. ``garbage`` is no HTTP."""


# --- what a request says -------------------------------------------------------------------------


def dialect_of(path: str) -> Dialect:
    """Which dialect a request to this path speaks."""
    return next((dialect for end, dialect in PATHS.items() if path.endswith(end)), "other")


def plain(content: Any) -> str:
    """The text of a message's content, which may come in parts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "".join(part["text"] for part in parts if isinstance(part, dict) and "text" in part)


def conversation(body: Data) -> list[tuple[str, str]]:
    """Role and text of every message in order; what stands beside the messages is from ``system``."""
    beside = body.get("system", body.get("instructions"))
    said = [("system", plain(beside))] if beside else []
    messages = body.get("messages") or body.get("input") or []
    if isinstance(messages, str):
        return [*said, ("user", messages)]
    return said + [(message.get("role", ""), plain(message.get("content"))) for message in messages]


def last_text(body: Data) -> str:
    """The text of the last message, or nothing."""
    messages = body.get("messages", body.get("input"))
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
        return plain(messages[-1].get("content"))
    return messages if isinstance(messages, str) else ""


# --- replies -------------------------------------------------------------------------------------


def reply_id(seen: Seen) -> str:
    """The server's name for a call."""
    return f"call-{seen.number}"


def write_error(behaviour: Behaviour, dialect: Dialect) -> Data:
    """An error in the dialect's shape."""
    status = behaviour.status
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "api_error")
    message = behaviour.message if behaviour.message is not None else f"the status is {status}"
    if dialect == "anthropic":
        return {"type": "error", "error": {"type": behaviour.code or kind, "message": message}}
    return {"error": {"message": message, "type": kind, "param": None, "code": behaviour.code}}


def write_usage(usage: Usage, dialect: Dialect) -> Data:
    """Tokens by the dialect's names. Anthropic's input is without what has to do with the cache."""
    if dialect == "anthropic":
        return {
            "input_tokens": usage.input_tokens - usage.cached_tokens - usage.cache_write_tokens,
            "cache_read_input_tokens": usage.cached_tokens,
            "cache_creation_input_tokens": usage.cache_write_tokens,
            "output_tokens": usage.output_tokens,
        }
    read, written = ("prompt", "completion") if dialect == "openai" else ("input", "output")
    return {
        f"{read}_tokens": usage.input_tokens,
        f"{read}_tokens_details": {"cached_tokens": usage.cached_tokens},
        f"{written}_tokens": usage.output_tokens,
        f"{written}_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.input_tokens + usage.output_tokens,
    }


def write_reply(behaviour: Behaviour, seen: Seen) -> Data:
    """A whole reply in the dialect of the request."""
    reply = _WRITE[seen.dialect](behaviour, seen)
    if behaviour.usage is not None:
        reply["usage"] = write_usage(behaviour.usage, seen.dialect)
    return reply


def write_stream(behaviour: Behaviour, seen: Seen) -> list[bytes]:
    """A reply as server-sent events, each ready to be sent."""
    return list(_STREAM[seen.dialect](behaviour, seen))


def _model(seen: Seen) -> Any:
    return seen.body.get("model")


def _chat(behaviour: Behaviour, seen: Seen) -> Data:
    message = {"role": "assistant", "content": behaviour.text, "refusal": None}
    finish = FINISH["openai"][behaviour.finish]
    return {
        "id": reply_id(seen),
        "object": "chat.completion",
        "created": 1,
        "model": _model(seen),
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish}],
    }


def _response(behaviour: Behaviour, seen: Seen) -> Data:
    reason = FINISH["responses"].get(behaviour.finish)
    output: list[Data] = [_response_message(behaviour.text)]
    if behaviour.usage is not None and behaviour.usage.reasoning_tokens:
        output.insert(0, {"type": "reasoning", "id": "rs-1", "summary": []})  # as those who thought do
    return {
        "id": reply_id(seen),
        "object": "response",
        "created_at": 1,
        "status": "incomplete" if reason else "completed",
        "error": None,
        "incomplete_details": {"reason": reason} if reason else None,
        "model": _model(seen),
        "output": output,
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
    }


def _response_message(text: str) -> Data:
    content = [{"type": "output_text", "text": text, "annotations": []}]
    return {"type": "message", "id": "msg-1", "status": "completed", "role": "assistant", "content": content}


def _message(behaviour: Behaviour, seen: Seen) -> Data:
    return {
        "id": reply_id(seen),
        "type": "message",
        "role": "assistant",
        "model": _model(seen),
        "content": [{"type": "text", "text": behaviour.text}],
        "stop_reason": FINISH["anthropic"][behaviour.finish],
        "stop_sequence": None,
    }


# --- streams -------------------------------------------------------------------------------------


def pieces(text: str) -> list[str]:
    """A text in up to `PIECES` pieces."""
    size = max(1, -(-len(text) // PIECES))
    return [text[start : start + size] for start in range(0, len(text), size)]


def event(data: Data, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + msgspec.json.encode(data) + b"\n\n"


def _stream_chat(behaviour: Behaviour, seen: Seen) -> Iterator[bytes]:
    options = seen.body.get("stream_options") or {}
    with_usage = bool(options.get("include_usage"))
    same = {"id": reply_id(seen), "object": "chat.completion.chunk", "created": 1, "model": _model(seen)}
    if with_usage:
        same["usage"] = None

    def chunk(delta: Data, finish: str | None = None) -> bytes:
        return event({**same, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

    yield b": a comment, as some servers send to keep a connection\n\n"
    yield chunk({"role": "assistant", "content": ""})
    for piece in pieces(behaviour.text):
        yield chunk({"content": piece})
    yield chunk({}, FINISH["openai"][behaviour.finish])
    if with_usage and behaviour.usage is not None:
        yield event({**same, "choices": [], "usage": write_usage(behaviour.usage, "openai")})
    yield b"data: [DONE]\n\n"


def _stream_response(behaviour: Behaviour, seen: Seen) -> Iterator[bytes]:
    whole = write_reply(behaviour, seen)
    begun = {**whole, "status": "in_progress", "incomplete_details": None, "output": [], "usage": None}
    message = _response_message(behaviour.text)
    part = message["content"][0]
    place = {"item_id": message["id"], "output_index": 0, "content_index": 0}
    empty = {**message, "status": "in_progress", "content": []}
    events: list[tuple[str, Data]] = [
        ("response.created", {"response": begun}),
        ("response.in_progress", {"response": begun}),
        ("response.output_item.added", {"output_index": 0, "item": empty}),
        ("response.content_part.added", {**place, "part": {**part, "text": ""}}),
        *(("response.output_text.delta", {**place, "delta": piece}) for piece in pieces(behaviour.text)),
        ("response.output_text.done", {**place, "text": behaviour.text}),
        ("response.content_part.done", {**place, "part": part}),
        ("response.output_item.done", {"output_index": 0, "item": message}),
        (f"response.{whole['status']}", {"response": whole}),
    ]
    for number, (name, data) in enumerate(events):
        yield event({"type": name, "sequence_number": number, **data}, name)


def _stream_message(behaviour: Behaviour, seen: Seen) -> Iterator[bytes]:
    usage = write_usage(behaviour.usage, "anthropic") if behaviour.usage is not None else None
    start = {**_message(behaviour, seen), "content": [], "stop_reason": None}
    end: Data = {"delta": {"stop_reason": FINISH["anthropic"][behaviour.finish], "stop_sequence": None}}
    if usage is not None:
        start["usage"] = {**usage, "output_tokens": 1}  # the rest is not written yet
        end["usage"] = {"output_tokens": usage["output_tokens"]}
    yield _typed("message_start", message=start)
    yield _typed("content_block_start", index=0, content_block={"type": "text", "text": ""})
    yield _typed("ping")
    for piece in pieces(behaviour.text):
        yield _typed("content_block_delta", index=0, delta={"type": "text_delta", "text": piece})
    yield _typed("content_block_stop", index=0)
    yield _typed("message_delta", **end)
    yield _typed("message_stop")


def _typed(name: str, **data: Any) -> bytes:
    return event({"type": name, **data}, name)


_WRITE: dict[str, Callable[[Behaviour, Seen], Data]] = {
    "openai": _chat,
    "responses": _response,
    "anthropic": _message,
}
_STREAM: dict[str, Callable[[Behaviour, Seen], Iterator[bytes]]] = {
    "openai": _stream_chat,
    "responses": _stream_response,
    "anthropic": _stream_message,
}

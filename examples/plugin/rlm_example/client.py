"""ExampleLM: a model behind an HTTP API.

`HTTPLM` makes the call, keeps connections, streams, and tells failures apart. What remains is
the `Dialect`: what this API calls things. This one's is the chat API that many servers speak.
"""

from __future__ import annotations

import os
from typing import Any

import msgspec

from rlm.client import Finish, Reply, Request, Usage
from rlm.errors import AuthError, ProtocolError
from rlm.http import HTTPLM, Endpoint, in_band
from rlm.secrets import Secret

FINISH: dict[str, Finish] = {"stop": "stop", "length": "length", "content_filter": "filter"}
SETTINGS = ("max_tokens", "temperature", "stop", "seed")
"""What this API calls as `Request` does. What is None was not asked for, and is not sent."""


class Text(msgspec.Struct):
    content: str | None = None


class Choice(msgspec.Struct):
    message: Text | None = None
    delta: Text = msgspec.field(default_factory=Text)
    finish_reason: str | None = None


class Details(msgspec.Struct):
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None


class Tokens(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: Details | None = None
    completion_tokens_details: Details | None = None


class Completion(msgspec.Struct):
    """A reply, or a chunk of one. msgspec refuses other shapes, and HTTPLM says so to the user."""

    choices: list[Choice] = []
    usage: Any = None  # what is wrong with it costs the count, never a reply that was paid for
    id: str | None = None
    model: str | None = None
    error: Any = None


class Chat:
    """How the API words requests and replies."""

    path = "/chat/completions"

    def body(self, request: Request, model: str, stream: bool) -> dict[str, Any]:
        asked = {name: value for name in SETTINGS if (value := getattr(request, name)) is not None}
        streamed = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        return {"model": model, "messages": request.messages, **asked, **streamed, **(request.extra or {})}

    def reply(self, data: bytes, request: Request) -> Reply:
        whole = parse(data)
        if not whole.choices or whole.choices[0].message is None:
            raise ProtocolError("the reply has no message")
        return made(whole, whole.choices[0].message.content or "", whole.choices[0].finish_reason, request)

    def assembler(self, request: Request) -> Pieces:
        return Pieces(request)


class Pieces:
    """A streamed reply, put together."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.text = ""
        self.last = Completion()
        self.finish: str | None = None

    def feed(self, data: bytes) -> str:
        if data == b"[DONE]":
            return ""
        chunk = parse(data)
        self.last = msgspec.structs.replace(chunk, usage=chunk.usage or self.last.usage)
        if not chunk.choices:
            return ""
        self.finish = chunk.choices[0].finish_reason or self.finish
        piece = chunk.choices[0].delta.content or ""
        self.text += piece
        return piece

    def reply(self) -> Reply:
        if self.finish is None:
            raise ProtocolError("the stream ended before the reply did")
        return made(self.last, self.text, self.finish, self.request)


def parse(data: bytes) -> Completion:
    completion = msgspec.json.decode(data, type=Completion)
    if completion.error is not None:
        raise in_band(completion.error)
    return completion


def made(source: Completion, text: str, finish: str | None, request: Request) -> Reply:
    usage = counted(source.usage) or Usage.estimate(request.messages, text)
    return Reply(text, FINISH.get(finish or "stop", "other"), usage, source.model, source.id)


def counted(usage: Any) -> Usage | None:
    """What the server has counted, if it has."""
    try:
        tokens = msgspec.convert(usage, Tokens)
    except msgspec.ValidationError:
        return None
    if tokens.prompt_tokens is None or tokens.completion_tokens is None:
        return None
    read, wrote = tokens.prompt_tokens_details or Details(), tokens.completion_tokens_details or Details()
    return Usage(
        tokens.prompt_tokens,
        tokens.completion_tokens,
        cached_tokens=read.cached_tokens or 0,
        reasoning_tokens=wrote.reasoning_tokens or 0,
    )


class ExampleLM(HTTPLM):
    """A model at ``base_url``. The key is ``api_key``, or the environment variable EXAMPLE_API_KEY."""

    dialect = Chat()

    def __init__(
        self,
        model_name: str = "example-1",
        *,
        base_url: str = "https://api.example.com/v1",
        api_key: str | None = None,
    ) -> None:
        key = api_key or os.environ.get("EXAMPLE_API_KEY")
        if key is None:
            raise AuthError("the example API needs a key: set EXAMPLE_API_KEY, or give api_key=", sent=False)
        self.model_name = model_name
        # a Secret prints as stars, and the endpoint takes it out of whatever a server says
        self.endpoint = Endpoint(base_url, {"Authorization": Secret(f"Bearer {key}")})

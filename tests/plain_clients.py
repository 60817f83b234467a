"""A small client that keeps every promise, in each of the dialects. No retries, no settings."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import io
import json
import math
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

import aiohttp

from rlm.client import BaseLM, Finish, Reply, Request, Usage
from rlm.errors import (
    AuthError,
    BadRequest,
    ConnectFailed,
    ContextOverflow,
    ModelError,
    NotFound,
    ProtocolError,
    QuotaExceeded,
    RateLimited,
    Timeout,
    Unavailable,
)

Data = dict[str, Any]

FINISH: Mapping[Any, Finish] = {
    "stop": "stop", "end_turn": "stop", None: "stop",
    "length": "length", "max_tokens": "length", "max_output_tokens": "length",
    "content_filter": "filter", "refusal": "filter",
}  # fmt: skip
ERRORS: Mapping[int, type[ModelError]] = {
    401: AuthError, 403: AuthError, 404: NotFound, 402: QuotaExceeded, 429: RateLimited, 408: Timeout,
}  # fmt: skip
TOO_LONG = re.compile("context.length|context window|context.size|prompt is too long", re.IGNORECASE)
MALFORMED = (KeyError, IndexError, TypeError, AttributeError, ValueError)
"""What reading a reply raises that is not in the shape of one."""


class PlainLM(BaseLM):
    """OpenAI's chat completions, whole and streamed."""

    path = "/chat/completions"

    def __init__(self, model_name: str, base_url: str, api_key: str) -> None:
        self.model_name = model_name
        self.session: aiohttp.ClientSession | None = None
        self._url = base_url + self.path
        self._secret: Callable[[], str] = lambda: api_key  # what is shown of a function is not what it says

    async def complete(self, request: Request) -> Reply:
        async with self.answer(request, self.body(request)) as response:
            return self.read(self.parse(await response.read()))

    async def stream(self, request: Request) -> AsyncIterator[str | Reply]:
        body = {**self.body(request), **self.stream_fields}
        whole: Data = {}
        async with self.answer(request, body) as response:
            async for event in self.events(response):
                if piece := self.gather(whole, event):
                    yield piece
            yield self.read_stream(whole)

    async def aclose(self) -> None:
        if self.session is not None:
            await self.session.close()

    # -- one attempt

    @contextlib.asynccontextmanager
    async def answer(self, request: Request, body: Data) -> AsyncIterator[aiohttp.ClientResponse]:
        with self.errors():
            async with asyncio.timeout(request.timeout):
                async with self.post(body) as response:
                    if response.status != 200:
                        raise self.refusal(response, await response.read())
                    yield response

    def post(self, body: Data) -> Any:
        headers = {**self.headers(self._secret()), "Content-Type": "application/json"}
        data = io.BytesIO(json.dumps(body).encode())  # aiohttp warns of bytes, if they are many
        return self.opened().post(self._url, data=data, headers=headers, allow_redirects=False)

    def opened(self) -> aiohttp.ClientSession:
        if self.session is None:
            connector = aiohttp.TCPConnector(limit=0)
            self.session = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout())
        return self.session

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            raise Timeout("no reply in time") from None
        except aiohttp.ClientConnectorError:
            raise ConnectFailed("no connection") from None
        except aiohttp.ClientConnectionError:
            raise Unavailable("the connection ended") from None
        except (aiohttp.ClientError, *MALFORMED) as error:
            raise ProtocolError(f"no reply came back: {type(error).__name__}") from None

    # -- what is sent

    stream_fields: Mapping[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    fields: Mapping[str, str] = {
        "max_tokens": "max_tokens", "temperature": "temperature", "stop": "stop", "seed": "seed",
    }  # fmt: skip

    def headers(self, key: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {key}"}

    def body(self, request: Request) -> Data:
        asked = {name: getattr(request, field) for field, name in self.fields.items()}
        given = {name: value for name, value in asked.items() if value is not None}
        messages = [{"role": message.role, "content": message.content} for message in request.messages]
        return {
            "model": request.model or self.model_name,
            **self.said(messages),
            **given,
            **(request.extra or {}),
        }

    def said(self, messages: list[Data]) -> Data:
        return {"messages": messages}

    # -- what comes back

    def parse(self, text: bytes) -> Data:
        data = json.loads(text)
        if not isinstance(data, dict):
            raise TypeError("a reply is an object")
        return data

    def read(self, data: Data) -> Reply:
        choice = data["choices"][0]
        return self.made(data, choice["message"]["content"] or "", choice.get("finish_reason"))

    def made(self, data: Data, text: str, finish: Any) -> Reply:
        usage = self.usage(data.get("usage"))
        if not isinstance(text, str):
            raise TypeError("text is a string")
        return Reply(text, FINISH.get(finish, "other"), usage, data.get("model"), data.get("id"))

    def usage(self, data: Any) -> Usage:
        cached = number(data, "prompt_tokens_details", "cached_tokens")
        thought = number(data, "completion_tokens_details", "reasoning_tokens")
        read, written = number(data, "prompt_tokens"), number(data, "completion_tokens")
        return Usage(read, written, cached, reasoning_tokens=thought)

    # -- streams

    async def events(self, response: aiohttp.ClientResponse) -> AsyncIterator[Data]:
        rest = b""
        async for part in response.content.iter_any():
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                    event = self.parse(line[6:])
                    if event.get("error") or event.get("type") == "error":
                        raise Unavailable("it broke off with an error")
                    yield event

    def gather(self, whole: Data, event: Data) -> str:
        whole.update({name: event[name] for name in ("id", "model", "usage") if event.get(name)})
        for choice in event["choices"]:
            whole["finish"] = choice.get("finish_reason") or whole.get("finish")
            text = choice["delta"].get("content") or ""
            whole["text"] = whole.get("text", "") + text
            return str(text)
        return ""

    def read_stream(self, whole: Data) -> Reply:
        if whole.get("finish") is None:
            raise ProtocolError("the stream broke off")
        return self.made(whole, whole["text"], whole["finish"])

    # -- refusals

    def refusal(self, response: aiohttp.ClientResponse, body: bytes) -> ModelError:
        error = self.stated(body)
        message = self.hidden(str(error.get("message") or f"the status is {response.status}"))
        headers = response.headers
        details: Data = {
            "status": response.status,
            "code": self.code(error),
            "request_id": headers.get("x-request-id") or headers.get("request-id"),
        }
        kind = self.kind(response.status, details["code"])
        if response.status in (400, 413) and TOO_LONG.search(f"{details['code']} {message}"):
            return ContextOverflow(message, window=error.get("n_ctx"), **details)
        if kind.retryable:
            details["retry_after"] = retry_after(headers)
        return kind(message, **details)

    def stated(self, body: bytes) -> Data:
        try:
            error = json.loads(body)["error"]
        except MALFORMED:
            return {}
        return error if isinstance(error, dict) else {}

    def code(self, error: Data) -> str | None:
        return str(error["code"]) if error.get("code") else None

    def kind(self, status: int, code: str | None) -> type[ModelError]:
        if code == "insufficient_quota":
            return QuotaExceeded
        return ERRORS.get(status, Unavailable if status >= 500 else BadRequest)

    def hidden(self, text: str) -> str:
        return text.replace(self._secret(), "***")


def number(data: Any, *path: str) -> int:
    """A number somewhere in data, or 0."""
    for name in path:
        data = data.get(name) if isinstance(data, dict) else None
    return data if isinstance(data, int) else 0


def retry_after(headers: Mapping[str, str]) -> float | None:
    """When a provider wants to be asked again, if that makes sense."""
    try:
        if "retry-after-ms" in headers:
            seconds = float(headers["retry-after-ms"]) / 1000
        else:
            seconds = float(headers.get("Retry-After", ""))
    except ValueError:
        seconds = _until(headers.get("Retry-After", ""))
    return seconds if 0 <= seconds < math.inf else None


def _until(date: str) -> float:
    try:
        return email.utils.parsedate_to_datetime(date).timestamp() - time.time()
    except ValueError:
        return math.nan


class PlainResponses(PlainLM):
    """OpenAI's responses."""

    path = "/responses"
    stream_fields = {"stream": True}  # noqa: RUF012
    fields = {"max_tokens": "max_output_tokens", "temperature": "temperature"}  # noqa: RUF012

    def said(self, messages: list[Data]) -> Data:
        return {"input": messages}

    def read(self, data: Data) -> Reply:
        if not isinstance(data["output"], list):
            raise TypeError("output is a list")
        contents = [item["content"] for item in data["output"] if item["type"] == "message"]
        text = "".join(part["text"] for content in contents for part in content)
        return self.made(data, text, (data.get("incomplete_details") or {}).get("reason"))

    def usage(self, data: Any) -> Usage:
        cached = number(data, "input_tokens_details", "cached_tokens")
        thought = number(data, "output_tokens_details", "reasoning_tokens")
        read, written = number(data, "input_tokens"), number(data, "output_tokens")
        return Usage(read, written, cached, reasoning_tokens=thought)

    def gather(self, whole: Data, event: Data) -> str:
        if event["type"] in ("response.completed", "response.incomplete"):
            whole.update(event["response"])
        return str(event["delta"]) if event["type"] == "response.output_text.delta" else ""

    def read_stream(self, whole: Data) -> Reply:
        return self.read(whole)


class PlainAnthropic(PlainLM):
    """Anthropic's messages."""

    path = "/messages"
    stream_fields = {"stream": True}  # noqa: RUF012
    fields = {"temperature": "temperature", "stop": "stop_sequences"}  # noqa: RUF012

    def headers(self, key: str) -> dict[str, str]:
        return {"x-api-key": key, "anthropic-version": "2023-06-01"}

    def body(self, request: Request) -> Data:
        return {"max_tokens": request.max_tokens or 4096, **super().body(request)}

    def said(self, messages: list[Data]) -> Data:
        system = [message["content"] for message in messages if message["role"] == "system"]
        rest = [message for message in messages if message["role"] != "system"]
        return {"messages": rest, **({"system": "\n".join(system)} if system else {})}

    def read(self, data: Data) -> Reply:
        if not isinstance(data["content"], list):
            raise TypeError("content is a list")
        text = "".join(part["text"] for part in data["content"] if part["type"] == "text")
        return self.made(data, text, data.get("stop_reason"))

    def usage(self, data: Any) -> Usage:
        cached, stored = (number(data, f"cache_{word}_input_tokens") for word in ("read", "creation"))
        read, written = number(data, "input_tokens"), number(data, "output_tokens")
        return Usage(read + cached + stored, written, cached, cache_write_tokens=stored)

    def gather(self, whole: Data, event: Data) -> str:
        if event["type"] == "message_start":
            whole.update(event["message"], text="")
        elif event["type"] == "content_block_delta":
            whole["text"] += event["delta"]["text"]
            return str(event["delta"]["text"])
        elif event["type"] == "message_delta":
            whole["finish"] = event["delta"]["stop_reason"]
            whole["usage"] = {**(whole.get("usage") or {}), **event.get("usage", {})}
        return ""

    def code(self, error: Data) -> str | None:
        return error.get("type")

"""Facts about what clients that speak HTTP share: events, failures by name, and one address."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import email.utils
import gzip
import itertools
import json
import math
import shutil
import ssl
import subprocess
import time
import urllib.parse
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlm import http
from rlm.client import Message, Request
from rlm.errors import (
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
    RetryableError,
    Timeout,
    Unavailable,
)
from rlm.http import Endpoint, EventParser, Shapes, failure, in_band
from rlm.secrets import Secret
from rlm.testing.sessions import unavailable

KEY = "sk-test-9f2c7b1e4d-not-to-be-seen"

# --- events ------------------------------------------------------------------------------------

line_of_data = st.binary(max_size=12).map(lambda data: data.replace(b"\n", b"n").replace(b"\r", b"r"))
other_line = st.sampled_from([b": a comment", b":", b"event: delta", b"id: 7", b"retry: 10", b"data_: no"])
an_event = st.tuples(
    st.lists(line_of_data, min_size=1, max_size=3), st.lists(other_line, max_size=3), st.booleans()
)


def written(lines: Sequence[bytes], others: Sequence[bytes], spaced: bool, end: bytes) -> bytes:
    """An event as a server may write it: what is no data stands between, and a space may follow a colon."""
    space = b" " if spaced or any(line.startswith(b" ") for line in lines) else b""
    mixed = itertools.zip_longest(others, (b"data:" + space + line for line in lines))
    return b"".join(line + end for pair in mixed for line in pair if line is not None) + end


def cut(stream: bytes, places: Sequence[int]) -> list[bytes]:
    """The stream in pieces that end at these places."""
    ends = sorted({place % (len(stream) + 1) for place in places} | {len(stream)})
    return [stream[start:end] for start, end in zip([0, *ends], ends, strict=False)]


@given(
    events=st.lists(an_event, max_size=6),
    end=st.sampled_from([b"\n", b"\r\n"]),
    places=st.lists(st.integers(0, 10_000), max_size=30),
)
def test_events_are_the_same_however_they_are_written_and_cut(
    events: list[tuple[list[bytes], list[bytes], bool]], end: bytes, places: list[int]
) -> None:
    stream = b"".join(written(*event, end) for event in events)
    parser = EventParser()
    found = [data for piece in cut(stream, places) for data in parser.feed(piece)]
    assert found == [b"\n".join(lines) for lines, _, _ in events]


@given(pieces=st.lists(st.binary(max_size=40), max_size=10))
def test_any_bytes_are_some_events(pieces: list[bytes]) -> None:
    parser, whole = EventParser(), EventParser()
    found = [data for piece in pieces for data in parser.feed(piece)]
    assert found == whole.feed(b"".join(pieces))


def test_an_event_without_data_is_none() -> None:
    assert EventParser().feed(b"event: ping\n\n: x\n\n\n\nid: 1\n\n") == []


def test_an_event_that_has_not_ended_is_none_yet() -> None:
    parser = EventParser()
    assert parser.feed(b"data: a\n") == []
    assert parser.feed(b"\n") == [b"a"]


@pytest.mark.parametrize("endless", [b"data: " + b"x" * 1000, b"data: x\n" * 100])
def test_an_endless_event_is_a_protocol_error(monkeypatch: pytest.MonkeyPatch, endless: bytes) -> None:
    monkeypatch.setattr(http, "MAX_REPLY", 5000)
    parser = EventParser()
    with pytest.raises(ProtocolError, match="longer than 5,000 bytes"):
        [parser.feed(endless) for _ in range(20)]


def test_many_events_may_be_longer_than_one_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_REPLY", 5000)
    parser = EventParser()
    assert [parser.feed(b"data: " + b"x" * 1000 + b"\n\n") for _ in range(20)] == [[b"x" * 1000]] * 20


# --- failures ----------------------------------------------------------------------------------


class Case(NamedTuple):
    """What a provider answered, and what that is."""

    status: int
    body: Any
    kind: type[ModelError]
    code: str | None = None
    window: int | None = None
    retry_after: float | None = None
    headers: dict[str, str] = {}  # noqa: RUF012 - never changed
    says: str = ""


CASES = {
    "OpenAI, wrong key": Case(
        401,
        {"error": {"message": "Incorrect API key provided: sk-x.", "type": "invalid_request_error",
                   "param": None, "code": "invalid_api_key"}},
        AuthError, "invalid_api_key", says="Incorrect API key",
    ),
    "OpenAI, rate": Case(
        429,
        {"error": {"message": "Rate limit reached for gpt-4o in organization org-x on tokens per min (TPM): "
                   "Limit 30000, Used 29000, Requested 2000. Please try again in 2s.",
                   "type": "tokens", "param": None, "code": "rate_limit_exceeded"}},
        RateLimited, "rate_limit_exceeded", retry_after=2.5, headers={
            "x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "2.5s",
            "x-ratelimit-remaining-requests": "499", "x-ratelimit-reset-requests": "6m0s"},
    ),
    "OpenAI, larger than what a minute allows": Case(
        429,
        {"error": {"message": "Request too large for gpt-4o in organization org-x on tokens per min (TPM): "
                   "Limit 30000, Requested 45000. The input or output tokens must be reduced in order to run "
                   "successfully.", "type": "tokens", "param": None, "code": "rate_limit_exceeded"}},
        BadRequest, "rate_limit_exceeded", says="Requested 45000",
    ),
    "a gateway, quota": Case(
        403, {"error": {"message": "You exceeded your current quota, please check your plan."}},
        QuotaExceeded,
    ),
    "OpenAI, quota": Case(
        429,
        {"error": {"message": "You exceeded your current quota, please check your plan and billing details.",
                   "type": "insufficient_quota", "param": None, "code": "insufficient_quota"}},
        QuotaExceeded, "insufficient_quota",
    ),
    "OpenAI, overflow": Case(
        400,
        {"error": {"message": "This model's maximum context length is 128000 tokens. However, your messages "
                   "resulted in 128010 tokens. Please reduce the length of the messages.",
                   "type": "invalid_request_error", "param": "messages", "code": "context_length_exceeded"}},
        ContextOverflow, "context_length_exceeded", 128_000,
    ),
    "OpenAI, overflow of responses": Case(
        400,
        {"error": {"message": "Your input exceeds the context window of this model. Please adjust your input "
                   "and try again.", "type": "invalid_request_error", "param": "input",
                   "code": "context_length_exceeded"}},
        ContextOverflow, "context_length_exceeded",
    ),
    "OpenAI, no such model": Case(
        404,
        {"error": {"message": "The model `gpt-9` does not exist or you do not have access to it.",
                   "type": "invalid_request_error", "param": None, "code": "model_not_found"}},
        NotFound, "model_not_found",
    ),
    "OpenAI, a field it does not know": Case(
        400,
        {"error": {"message": "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
                   "'max_completion_tokens' instead.", "type": "invalid_request_error",
                   "param": "max_tokens", "code": "unsupported_parameter"}},
        BadRequest, "unsupported_parameter", says="max_completion_tokens",
    ),
    "OpenAI, overloaded": Case(
        503,
        {"error": {"message": "The engine is currently overloaded, please try again later",
                   "type": "server_error", "param": None, "code": None}},
        Unavailable, "server_error", retry_after=3.0, headers={"retry-after": "3"},
    ),
    "Azure, content filter": Case(
        400,
        {"error": {"message": "The response was filtered due to the prompt triggering Azure OpenAI's content "
                   "management policy. Please modify your prompt and retry.", "type": None, "param": "prompt",
                   "code": "content_filter", "status": 400, "innererror": {
                       "code": "ResponsibleAIPolicyViolation", "content_filter_result": {}}}},
        ContentFiltered, "content_filter",
    ),
    "Azure, rate": Case(
        429,
        {"error": {"code": "429", "message": "Requests to the ChatCompletions_Create Operation have exceeded "
                   "call rate limit of your current tier. Please retry after 26 seconds."}},
        RateLimited, "429", retry_after=26.0, headers={"retry-after": "26", "retry-after-ms": "26000"},
    ),
    "Azure, no such deployment": Case(
        404,
        {"error": {"code": "DeploymentNotFound", "message": "The API deployment for this resource does not "
                   "exist."}},
        NotFound, "DeploymentNotFound",
    ),
    "Anthropic, wrong key": Case(
        401,
        {"type": "error", "error": {"type": "authentication_error", "message": "invalid x-api-key"},
         "request_id": "req_1"},
        AuthError, "authentication_error",
    ),
    "Anthropic, overflow": Case(
        400,
        {"type": "error", "error": {"type": "invalid_request_error",
                                    "message": "prompt is too long: 200251 tokens > 200000 maximum"}},
        ContextOverflow, "invalid_request_error", 200_000,
    ),
    "Anthropic, overflow with its reply": Case(
        400,
        {"type": "error", "error": {"type": "invalid_request_error", "message": "input length and "
                                    "`max_tokens` exceed context limit: 199500 + 21333 > 200000, decrease "
                                    "input length or `max_tokens` and try again"}},
        ContextOverflow, "invalid_request_error", 200_000,
    ),
    "Anthropic, no money": Case(
        400,
        {"type": "error", "error": {"type": "invalid_request_error", "message": "Your credit balance is too "
                                    "low to access the Anthropic API."}},
        QuotaExceeded, "invalid_request_error",
    ),
    "Anthropic, overloaded": Case(
        529, {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}},
        Unavailable, "overloaded_error", says="Overloaded",
    ),
    "Gemini, wrong key": Case(
        400,
        [{"error": {"code": 400, "message": "API key not valid. Please pass a valid API key.",
                    "status": "INVALID_ARGUMENT", "details": [{"reason": "API_KEY_INVALID"}]}}],
        AuthError, "INVALID_ARGUMENT", says="API key not valid",
    ),
    "Gemini, rate": Case(
        429,
        [{"error": {"code": 429, "message": "You exceeded your current quota, please check your plan and "
                    "billing details. Please retry in 38.2s.", "status": "RESOURCE_EXHAUSTED",
                    "details": [{"@type": "type.googleapis.com/google.rpc.RetryInfo",
                                 "retryDelay": "38.5s"}]}}],
        RateLimited, "RESOURCE_EXHAUSTED", retry_after=38.5,
    ),
    "Gemini, overflow": Case(
        400,
        {"error": {"code": 400, "message": "The input token count (1200000) exceeds the maximum number of "
                   "tokens allowed (1048576).", "status": "INVALID_ARGUMENT"}},
        ContextOverflow, "INVALID_ARGUMENT", 1_048_576,
    ),
    "Gemini, overloaded": Case(
        503, {"error": {"code": 503, "message": "The model is overloaded.", "status": "UNAVAILABLE"}},
        Unavailable, "UNAVAILABLE",
    ),
    "vLLM, overflow": Case(
        400,
        {"object": "error", "message": "This model's maximum context length is 4096 tokens. However, you "
         "requested 5000 tokens in the messages, Please reduce the length of the messages.",
         "type": "BadRequestError", "param": None, "code": 400},
        ContextOverflow, "BadRequestError", 4096,
    ),
    "vLLM, a longer prompt than its model": Case(
        400,
        {"error": {"message": "The decoder prompt (length 5000) is longer than the maximum model length of "
                   "4096.", "type": "BadRequestError", "param": None, "code": 400}},
        ContextOverflow, "BadRequestError", 4096,
    ),
    "vLLM, no such model": Case(
        404,
        {"error": {"message": "The model `x` does not exist.", "type": "NotFoundError", "param": None,
                   "code": 404}},
        NotFound, "NotFoundError",
    ),
    "llama.cpp, overflow": Case(
        400,
        {"error": {"code": 400, "message": "the request exceeds the available context size, try increasing "
                   "it", "type": "exceed_context_size_error", "n_prompt_tokens": 9001, "n_ctx": 4096}},
        ContextOverflow, "exceed_context_size_error", 4096,
    ),
    "llama.cpp, overflow as a failure of its own": Case(
        500,
        {"error": {"code": 500, "message": "the request exceeds the available context size",
                   "type": "exceed_context_size_error", "n_prompt_tokens": 9001, "n_ctx": 4096}},
        ContextOverflow, "exceed_context_size_error", 4096,
    ),
    "SGLang, overflow": Case(
        400,
        {"object": "error", "message": "The input (5000 tokens) is longer than the model's context length "
         "(4096 tokens).", "type": "BadRequestError", "code": 400},
        ContextOverflow, "BadRequestError",
    ),
    "Ollama, overflow": Case(
        400, {"error": "the input length exceeds the context length"}, ContextOverflow,
    ),
    "a setting of the context window": Case(
        400, {"error": {"message": "the context window parameter is not supported", "code": "unsupported"}},
        BadRequest, "unsupported",
    ),
    "a setting of the context size": Case(
        400, {"error": {"message": "Unknown field: context size. Context length cannot be set here."}},
        BadRequest,
    ),
    "llama.cpp, loading": Case(
        503, {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}},
        Unavailable, "unavailable_error",
    ),
    "llama.cpp, what it does not do": Case(
        501, {"error": {"code": 501, "message": "not supported", "type": "not_supported_error"}},
        BadRequest, "not_supported_error",
    ),
    "Ollama, no such model": Case(
        404,
        {"error": {"message": "model \"llama9\" not found, try pulling it first", "type": "api_error",
                   "param": None, "code": None}},
        NotFound, "api_error",
    ),
    "Ollama, its own way": Case(
        404, {"error": "model 'llama9' not found"}, NotFound, says="model 'llama9' not found",
    ),
    "LM Studio, overflow": Case(
        400,
        {"error": "Trying to keep the first 5000 tokens when context the overflows. However, the model is "
         "loaded with context length of only 4096 tokens, which is not enough."},
        ContextOverflow, None, 4096,
    ),
    "LM Studio, no model": Case(
        404,
        {"error": {"message": "No models loaded. Please load a model in the developer page.",
                   "type": "invalid_request_error", "param": "model", "code": "model_not_found"}},
        NotFound, "model_not_found",
    ),
    "Mistral, overflow": Case(
        400,
        {"object": "error", "message": "Prompt contains 40000 tokens, too large for model with 32768 maximum "
         "context length", "type": "invalid_request_prompt", "code": "3051"},
        ContextOverflow, "3051", 32_768,
    ),
    "xAI, overflow": Case(
        400,
        {"code": "Client specified an invalid argument", "error": "This model's maximum prompt length is "
         "131072 but the request contains 537812 tokens."},
        ContextOverflow, None, 131_072,
    ),
    "OpenRouter, no money": Case(
        402, {"error": {"message": "Insufficient credits", "code": 402}}, QuotaExceeded,
    ),
    "OpenRouter, moderation": Case(
        403,
        {"error": {"code": 403, "message": "m requires moderation. Your input was flagged for \"violence\".",
                   "metadata": {"reasons": ["violence"]}}},
        ContentFiltered,
    ),
    "DeepSeek, no money": Case(
        402, {"error": {"message": "Insufficient Balance", "type": "unknown_error", "code": "invalid_request"
                        "_error"}}, QuotaExceeded, "invalid_request_error",
    ),
    "FastAPI": Case(404, {"detail": "Not Found"}, NotFound, says="Not Found"),
    "FastAPI, many words": Case(
        422, {"detail": [{"loc": ["body", "model"], "msg": "field required"}]}, BadRequest,
        says="field required",
    ),
    "a gateway": Case(403, {"message": "Forbidden"}, AuthError, says="Forbidden"),
    "nginx": Case(
        502,
        b"<html>\r\n<head><title>502 Bad Gateway</title></head>\r\n<body>\r\n<center><h1>502 Bad Gateway</h1>"
        b"</center>\r\n<hr><center>nginx</center>\r\n</body>\r\n</html>\r\n",
        Unavailable, says="HTTP 502: 502 Bad Gateway 502 Bad Gateway nginx",
    ),
    "nginx, too large": Case(413, b"<h1>413 Request Entity Too Large</h1>", BadRequest),
    "Cloudflare": Case(
        524, b'<!DOCTYPE html><html lang="en-US"><head><title>a timeout occurred</title></head></html>',
        Unavailable, says="a timeout occurred",
    ),
    "plain text": Case(500, b"Internal Server Error", Unavailable, says="Internal Server Error"),
    "nothing": Case(503, b"", Unavailable, says="no reason given"),
    "null": Case(500, None, Unavailable),
    "an error that is null": Case(500, {"error": None}, Unavailable, says="no reason given"),
    "a string": Case(400, "no", BadRequest, says="no"),
    "a number": Case(401, 5, AuthError, says="5"),
    "an empty list": Case(404, [], NotFound),
    "a nested one": Case(400, {"error": {"message": {"text": ["deep"]}}}, BadRequest, says="deep"),
    "too deep a one": Case(400, b'{"error": ' + b"[" * 100_000, BadRequest),
    "as deep as can be read": Case(400, b"[" * 500 + b"]" * 500, BadRequest),
    "bytes": Case(400, b"\xff\xfe\x00", BadRequest),
    "a timeout": Case(408, {"error": {"message": "too slow"}}, Timeout),
    "a conflict": Case(409, {"error": {"message": "conflict"}}, Unavailable),
    "a redirect": Case(
        308, b"", NotFound, headers={"location": "https://elsewhere.test/v1"},
        says="a redirect to 'https://elsewhere.test/v1': use that as base_url",
    ),
    "a redirect to nowhere": Case(302, b"", NotFound, says="'nowhere'"),
}  # fmt: skip


def as_bytes(body: Any) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()


@pytest.mark.parametrize("name", CASES)
def test_an_unsuccessful_response_is_its_failure(name: str) -> None:
    case = CASES[name]
    error = failure(case.status, case.headers, as_bytes(case.body))
    assert type(error) is case.kind
    assert (error.status, error.code) == (case.status, case.code)
    assert getattr(error, "window", None) == case.window
    assert getattr(error, "retry_after", None) == case.retry_after
    assert case.says in str(error)
    assert str(error).startswith(f"HTTP {case.status}: ")


@pytest.mark.parametrize("name", ["x-request-id", "request-id"])
def test_the_providers_name_for_a_call_is_kept(name: str) -> None:
    assert failure(500, {name: "req-1"}, b"").request_id == "req-1"


@pytest.mark.parametrize("name", ["x-request-id", "request-id"])
def test_a_key_that_comes_back_as_the_name_of_a_call_is_hidden(name: str) -> None:
    error = failure(500, {name: f"Bearer {KEY}"}, b"", lambda text: text.replace(KEY, "***"))
    assert error.request_id == "Bearer ***"
    assert failure(500, {}, b"").request_id is None


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"code": 429, "message": "rate-limited upstream"}, RateLimited),
        ({"code": 402, "message": "no credits"}, QuotaExceeded),
        ({"code": 502, "message": "Provider returned error"}, Unavailable),
        ({"code": "server_error", "message": "broke off"}, Unavailable),
        ({"type": "overloaded_error", "message": "Overloaded"}, Unavailable),
        ({"type": "invalid_request_error", "message": "prompt is too long: 5 tokens > 4 maximum"},
         ContextOverflow),
        ({"code": "rate_limit_exceeded", "message": "slow down"}, RateLimited),
        ({"code": "insufficient_quota", "message": "no money"}, QuotaExceeded),
        ({"code": "context_length_exceeded", "message": "too long"}, ContextOverflow),
        ({"code": True, "message": "odd"}, Unavailable),
        ({"code": 7}, Unavailable), ("it failed", Unavailable), ([], Unavailable), (5, Unavailable),
    ],
)  # fmt: skip
def test_an_error_inside_a_successful_response_is_its_failure(error: Any, kind: type[ModelError]) -> None:
    assert type(in_band(error)) is kind


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7.0), ({"retry-after": "0"}, 0.0), ({"retry-after": "1.5"}, 1.5),
        ({"retry-after": " 7 "}, 7.0), ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after-ms": "250", "retry-after": "1"}, 0.25), ({"retry-after-ms": "-5"}, 0.0),
        ({"retry-after": "Mon, 01 Jan 2001 00:00:00 GMT"}, 0.0), ({"retry-after": "soon"}, None),
        ({"retry-after": ""}, None), ({"retry-after": "-5"}, None), ({"retry-after": "9" * 400}, None),
        ({"retry-after-ms": "nan"}, None), ({"retry-after-ms": "inf"}, None), ({}, None),
        ({"x-ratelimit-reset-requests": "1m30s", "x-ratelimit-remaining-requests": "0"}, 90.0),
        ({"x-ratelimit-reset-requests": "120ms", "x-ratelimit-remaining-requests": "0"}, 0.12),
        ({"x-ratelimit-reset-requests": "1h", "x-ratelimit-remaining-requests": "5"}, None),
        ({"x-ratelimit-reset-tokens": "soon", "x-ratelimit-remaining-tokens": "0"}, None),
    ],
)  # fmt: skip
def test_when_to_try_again_is_read_from_headers(headers: dict[str, str], seconds: float | None) -> None:
    error = failure(429, headers, b"")
    assert isinstance(error, RateLimited)
    assert error.retry_after == (None if seconds is None else pytest.approx(seconds))


def test_a_date_to_try_again_is_read() -> None:
    date = email.utils.formatdate(time.time() + 100, usegmt=True)
    error = failure(503, {"retry-after": date}, b"")
    assert isinstance(error, Unavailable)
    assert error.retry_after is not None
    assert 60 < error.retry_after <= 101


names_of_headers = st.sampled_from(
    ["retry-after", "retry-after-ms", "x-request-id", "location", "x-ratelimit-reset-tokens",
     "x-ratelimit-remaining-tokens"]
)  # fmt: skip
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["error", "message", "code", "type", "status", "detail"]), inner, max_size=4
        )
    ),
    max_leaves=8,
)


@given(
    status=st.integers(100, 999),
    headers=st.dictionaries(names_of_headers, st.text(max_size=30)),
    body=st.binary(max_size=60) | anything.map(as_bytes),
)
@example(429, {"retry-after": "Mon, 01 Jan 0001 00:00:00 -0000"}, b"")
@example(429, {"retry-after": "Fri, 31 Dec 9999 23:59:59 -2359"}, b"")
@example(400, {}, b"maximum context length is " + b"9" * 5000)
@example(429, {}, b'{"retryDelay": "' + b"9" * 400 + b's"}')
@example(400, {}, b"[" * 2000)
@example(400, {}, b'{"error": {"message": "\\ud800"}}')
@settings(max_examples=300)
def test_whatever_comes_back_is_some_failure(status: int, headers: dict[str, str], body: bytes) -> None:
    error = failure(status, headers, body)
    assert error.status == status
    assert error.code is None or type(error.code) is str
    assert len(str(error)) < 2000
    if isinstance(error, RetryableError):
        assert error.retry_after is None or (math.isfinite(error.retry_after) and error.retry_after >= 0)


@given(error=anything)
def test_whatever_stands_in_the_place_of_a_reply_is_some_failure(error: Any) -> None:
    assert isinstance(in_band(error), ModelError)


@pytest.mark.parametrize("text", [b"model ", b"<", b"input token count ", b"content", b" \t"])
def test_an_error_of_many_megabytes_is_soon_read(text: bytes) -> None:
    begun = time.monotonic()
    for body in (text * 4_000_000, b'"' + text.replace(b"\t", b" ") * 4_000_000 + b'"'):
        assert type(failure(400, {}, body)) is BadRequest
    assert time.monotonic() - begun < 10


def hide(text: str) -> str:
    return Endpoint("https://x.test", {"Authorization": Secret(f"Bearer {KEY}")}).hide(text)


@pytest.mark.parametrize("before", [0, 480, 490, 499, 500])
def test_a_key_is_in_no_failure_wherever_it_stands(before: int) -> None:
    text = "." * before + KEY + "." * 100
    bodies: list[Any] = [text, {"error": text}, {"error": {"message": text, "code": KEY, "type": KEY}}]
    bodies += [text.encode(), f"<p>{text}</p>".encode(), [{"error": {"message": {"deep": text}}}]]
    for body in bodies:
        error = failure(401, {"location": text}, as_bytes(body), hide)
        assert "sk-test" not in f"{error} {error.code}"
    assert "sk-test" not in str(failure(302, {"location": text}, b"", hide))


@pytest.mark.parametrize("before", [0, 480, 490])
def test_a_key_is_in_no_complaint_of_a_replys_shape(before: int) -> None:
    with pytest.raises(ProtocolError) as caught, Shapes(b"." * before + KEY.encode(), hide):
        raise UnicodeDecodeError("utf-8", b"", 0, 1, "odd")
    assert "sk-test" not in str(caught.value)


def test_a_key_is_in_no_error_inside_a_reply() -> None:
    with pytest.raises(ModelError) as caught, Shapes(b"", hide):
        raise in_band({"message": f"wrong: {KEY}", "code": KEY})
    assert "sk-test" not in f"{caught.value} {caught.value.code}"


def test_json_too_deep_to_read_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError), Shapes(b"", hide):
        http.msgspec.json.decode(b"[" * 100_000)


# --- one address -------------------------------------------------------------------------------

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
TO = b"HTTP/1.1 307 Go\r\nLocation: http://127.0.0.1:%d/v1/x\r\nContent-Length: 0\r\n\r\n"


class Loopback:
    """Answers every request with the same bytes, and keeps what it was asked."""

    def __init__(self, answer: bytes | Callable[[], bytes] = OK) -> None:
        self.answer = answer
        self.heads: list[str] = []
        self.bodies: list[bytes] = []
        self.sent = 0
        self.port = 0
        self.open: dict[asyncio.Task[Any], asyncio.StreamWriter] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.open[task] = writer
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = next((int(v) for n, v in fields(head) if n == "content-length"), 0)
                self.heads.append(head)
                self.bodies.append(await reader.readexactly(length))
                answer = self.answer if isinstance(self.answer, bytes) else self.answer()
                for start in range(0, len(answer), 1 << 16):
                    writer.write(answer[start : start + (1 << 16)])
                    self.sent += len(answer[start : start + (1 << 16)])
                    await writer.drain()
                if b"Connection: close" in answer:
                    break
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    def header(self, name: str) -> list[str]:
        """Every value of a header, over all requests."""
        return [value for head in self.heads for found, value in fields(head) if found == name]


def fields(head: str) -> list[tuple[str, str]]:
    lines = (line.partition(":") for line in head.split("\r\n")[1:])
    return [(name.lower(), value.strip()) for name, _, value in lines if name]


@contextlib.asynccontextmanager
async def loopback(
    answer: bytes | Callable[[], bytes] = OK, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Loopback]:
    """A server of its own."""
    running = Loopback(answer)
    server = await asyncio.start_server(running.serve, "127.0.0.1", 0, ssl=tls)
    running.port = server.sockets[0].getsockname()[1]
    try:
        yield running
    finally:
        server.close()
        for writer in running.open.values():
            writer.transport.abort()
        await asyncio.gather(*running.open)


@contextlib.asynccontextmanager
async def endpoint(url: str, *args: Any) -> AsyncIterator[Endpoint]:
    made = Endpoint(url, *args)
    try:
        yield made
    finally:
        await made.aclose()


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


BEARER = {"Authorization": Secret(f"Bearer {KEY}")}


async def test_a_redirect_is_not_followed_and_the_key_stays() -> None:
    async with (
        loopback() as other,
        loopback(TO % other.port) as server,
        endpoint(server.url, BEARER) as client,
    ):
        for call in (client.post("/x", {}, 5), client.get("/x", 5)):
            with pytest.raises(NotFound, match="redirect to 'http"):
                await call
    assert len(server.heads) == 2
    assert other.heads == []


async def test_a_reply_that_says_it_is_too_long_is_not_read() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (http.MAX_REPLY + 1)
    async with loopback(head + b"x" * http.MAX_REPLY) as server, endpoint(server.url) as client:
        with pytest.raises(ProtocolError, match="longer than 67,108,864 bytes"):
            await client.post("/x", {}, 20)
        assert server.sent < http.MAX_REPLY / 2


async def test_a_reply_of_unknown_length_is_read_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_REPLY", 1_000_000)
    head = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
    async with loopback(head + b"x" * 50_000_000) as server, endpoint(server.url) as client:
        with pytest.raises(ProtocolError, match="longer than 1,000,000 bytes"):
            await client.post("/x", {}, 20)
        assert server.sent < 25_000_000


async def test_a_packed_reply_is_unpacked_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_REPLY", 1_000_000)
    packed = gzip.compress(b"x" * 5_000_000)
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(packed)
    async with loopback(head + packed) as server, endpoint(server.url) as client:
        with pytest.raises(ProtocolError, match="longer than 1,000,000 bytes"):
            await client.get("/x", 20)


async def test_an_error_that_is_too_long_is_a_protocol_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_REPLY", 1000)
    head = b"HTTP/1.1 400 Bad\r\nContent-Length: 2000\r\n\r\n"
    async with loopback(head + b"x" * 2000) as server, endpoint(server.url) as client:
        with pytest.raises(ProtocolError):
            await client.get("/x", 20)


@pytest.mark.parametrize(
    "url",
    ["", "api.test/v1", "ftp://api.test", "http://", "http:///v1", "https://[::1", "http://x:port", "//x",
     "file:///etc/passwd", "http://x/v1?a=b", "http://x/v1#a"],
)  # fmt: skip
def test_what_is_no_address_is_refused_when_it_is_given(url: str) -> None:
    with pytest.raises(ConfigError, match="base_url"):
        Endpoint(url)


@pytest.mark.parametrize("url", ["ftp://me:hunter2222@x", "https://me:hunter2222@x?a=b", "me:hunter2222@x"])
def test_a_refused_address_does_not_show_its_password(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Endpoint(url)
    assert "hunter2222" not in str(caught.value)


async def test_a_password_in_an_address_is_a_header_and_shows_nowhere() -> None:
    async with loopback(b"HTTP/1.1 401 No\r\nContent-Length: 9\r\n\r\nhunter%22") as server:
        url = server.url.replace("//", "//me:hunter%2522@")
        async with endpoint(url) as client:
            with pytest.raises(AuthError) as caught:
                await client.get("/x", 5)
            shown = f"{client!r} {client.base_url} {caught.value} {client.hide('hunter%22')}"
        assert "hunter%22" not in shown
        assert server.header("authorization") == ["Basic bWU6aHVudGVyJTIy"]


async def test_a_key_goes_before_a_password_in_the_address() -> None:
    async with loopback() as server, endpoint(server.url.replace("//", "//me:pw@"), BEARER) as client:
        await client.get("/x", 5)
        assert server.header("authorization") == [f"Bearer {KEY}"]


async def test_a_key_in_the_query_is_in_no_error() -> None:
    key = "a secret/with marks"
    async with endpoint("http://127.0.0.1:9", None, {"api_key": key}) as client:
        with pytest.raises(ConnectFailed) as caught:
            await client.get("/x", 5)
    assert "secret" not in str(caught.value)
    assert "api_key=" in str(caught.value)


async def test_a_header_replaces_one_of_the_same_name_in_another_case() -> None:
    async with loopback() as server, endpoint(server.url, {"user-agent": "mine"}) as client:
        await client.post("/x", {}, 5)
        assert server.header("user-agent") == ["mine"]


@pytest.mark.parametrize("value", ["a\nb", "a\r\nX: y", "a\0b"])
def test_a_header_of_two_lines_is_refused_without_showing_it(value: str) -> None:
    with pytest.raises(ConfigError, match="the header X-Key has a line end") as caught:
        Endpoint("https://x.test", {"X-Key": Secret(KEY + value)})
    assert KEY not in str(caught.value)


async def test_lone_surrogates_are_sent_as_replacement_characters() -> None:
    async with loopback() as server, endpoint(server.url) as client:
        await client.post("/x", {"messages": (Message("user", "a\ud800b"),)}, 5)
        assert json.loads(server.bodies[0])["messages"][0]["content"] == "a?b"


async def test_no_cookies_are_kept() -> None:
    cookie = OK.replace(b"\r\n\r\n", b"\r\nSet-Cookie: a=b; Path=/\r\n\r\n")
    async with loopback(cookie) as server, endpoint(server.url) as client:
        for _ in range(2):
            await client.get("/x", 5)
        assert (len(server.heads), server.header("cookie")) == (2, [])


def test_a_second_event_loop_is_told_that_it_is_wrong() -> None:
    client = Endpoint("http://127.0.0.1:9")

    async def call() -> None:
        with contextlib.suppress(ConnectFailed):
            await client.get("/x", 5)

    with asyncio.Runner() as first, asyncio.Runner() as second:
        first.run(call())
        with pytest.raises(RuntimeError, match="belongs to the event loop of its first call"):
            second.run(call())
        first.run(client.aclose())


async def test_nothing_that_listens_is_a_failure_to_connect() -> None:
    async with endpoint("http://127.0.0.1:9") as client:
        with pytest.raises(ConnectFailed, match="no connection to http:") as caught:
            await client.get("/x", 5)
    assert caught.value.sent is False


@pytest.mark.parametrize(("limit", "said"), [(None, "in time"), (5.0, "within 5 s")])
async def test_time_that_is_over_is_a_timeout_also_without_a_limit(
    monkeypatch: pytest.MonkeyPatch, limit: float | None, said: str
) -> None:
    async def slow(*_: Any) -> Any:
        raise TimeoutError  # of the system: a connection on which nothing was heard

    async with endpoint("http://127.0.0.1:9") as client:
        monkeypatch.setattr(client, "_asked", slow)
        with pytest.raises(Timeout, match=f"no reply from http://127.0.0.1:9/x {said}"):
            await client.get("/x", limit)


async def test_a_name_that_nobody_has_is_a_failure_to_connect() -> None:
    async with endpoint("http://nobody.invalid") as client:
        with pytest.raises(ConnectFailed):
            await client.get("/x", 20)


async def test_a_server_without_tls_is_a_failure_to_connect() -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 this is no TLS\r\n")
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with endpoint(f"https://127.0.0.1:{port}") as client:
            with pytest.raises(ConnectFailed):
                await client.get("/x", 20)


async def test_a_certificate_that_nobody_vouches_for_is_no_reason_to_try_again(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        unavailable("openssl is not installed")
    (tmp_path / "config").write_text("[req]\ndistinguished_name=name\n[name]\n")
    files = [
        "-config",
        str(tmp_path / "config"),
        "-keyout",
        str(tmp_path / "key"),
        "-out",
        str(tmp_path / "cert"),
    ]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", *files]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # of the server, which is left
    async with loopback(tls=tls) as server, endpoint(server.url.replace("http", "https"), BEARER) as client:
        with pytest.raises(NotFound, match=r"is not trusted: .*certificate") as caught:
            await client.get("/x", 5)
    assert (caught.value.code, caught.value.sent, caught.value.retryable) == ("certificate", False, False)
    assert server.heads == []


# --- proxies -----------------------------------------------------------------------------------


async def test_a_proxy_of_the_environment_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    async with loopback() as proxy:
        monkeypatch.setenv("http_proxy", f"http://me:hunter2222@127.0.0.1:{proxy.port}")
        async with endpoint("http://models.test/v1") as client:
            assert await client.get("/models", 5) == b"{}"
        assert proxy.heads[0].startswith("GET http://models.test/v1/models HTTP/1.1\r\n")
        assert proxy.header("proxy-authorization") == ["Basic bWU6aHVudGVyMjIyMg=="]


async def test_a_proxy_is_asked_for_a_tunnel_and_sees_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    async with loopback(b"HTTP/1.1 407 No\r\nContent-Length: 0\r\n\r\n") as proxy:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.port}")
        async with endpoint("https://models.test/v1", BEARER) as client:
            with pytest.raises(ModelError) as caught:
                await client.get("/models", 5)
        assert KEY not in str(caught.value)
        assert proxy.heads[0].startswith("CONNECT models.test:443 HTTP/1.1\r\n")
        assert KEY not in proxy.heads[0]


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("password", ["hunter2222", "hunter%2f%7e", "hunt"])
async def test_the_password_of_a_proxy_that_refuses_is_in_no_error(
    monkeypatch: pytest.MonkeyPatch, scheme: str, password: str
) -> None:
    async with loopback(b"HTTP/1.1 407 No\r\nContent-Length: 0\r\n\r\n") as proxy:
        monkeypatch.setenv(f"{scheme}_proxy", f"http://me:{password}@127.0.0.1:{proxy.port}")
        async with endpoint(f"{scheme}://models.test/v1") as client:
            with pytest.raises(ModelError) as caught:
                await client.get("/models", 5)
            assert "hunt" not in repr(caught.value)
        encoded = base64.b64encode(f"me:{urllib.parse.unquote(password)}".encode()).decode()
        assert proxy.header("proxy-authorization") == [f"Basic {encoded}"]


async def test_a_proxy_that_is_no_address_does_not_show_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "me:hunter2222@proxy.test:port")
    async with endpoint("http://models.test/v1") as client:
        with pytest.raises(ModelError) as caught:
            await client.get("/models", 5)
    assert "hunter" not in repr(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost", "LOCALHOST", "[::1]"])
async def test_a_proxy_is_not_asked_for_this_machine(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    async with loopback() as proxy, endpoint(f"http://{host}:9/v1") as client:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
        with pytest.raises(ConnectFailed):
            await client.get("/models", 20)
        assert proxy.heads == []


async def test_a_proxy_is_not_asked_for_what_no_proxy_names(monkeypatch: pytest.MonkeyPatch) -> None:
    async with loopback() as proxy:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.setenv("no_proxy", "models.invalid")
        async with endpoint("http://models.invalid/v1") as client:
            with pytest.raises(ConnectFailed):
                await client.get("/models", 20)
        assert proxy.heads == []


# --- whole clients -----------------------------------------------------------------------------


class Letters:
    """A dialect whose every event is a piece of text."""

    path = "/letters"

    def body(self, request: Request, model: str, stream: bool) -> dict[str, Any]:
        return {}

    def reply(self, data: bytes, request: Request) -> Any:
        raise NotImplementedError

    def assembler(self, request: Request) -> Letters:
        return self

    def feed(self, data: bytes) -> str:
        return data.decode()


class LettersLM(http.HTTPLM):
    dialect = Letters()

    def __init__(self, url: str) -> None:
        self.endpoint = Endpoint(url)


async def test_an_endless_stream_is_a_protocol_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_REPLY", 1_000_000)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
    async with loopback(head + (b"data: " + b"x" * 1000 + b"\n\n") * 10_000) as server:
        client = LettersLM(server.url)
        with pytest.raises(ProtocolError, match="1,000,000 characters"):
            async for _ in client.stream(Request((Message("user", "x"),))):
                pass
        await client.aclose()

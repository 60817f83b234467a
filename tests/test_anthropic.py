"""Anthropic's Messages API: its suite, what is particular to it, and llama.cpp's server, which speaks it."""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_asyncio
from aimock_support import Aimock
from llama_support import LlamaServer

from rlm import http
from rlm.client import Message, ModelInfo, Price, Request, SupportsCount, SupportsStream, Usage
from rlm.errors import (
    AuthError,
    BadRequest,
    ConfigError,
    ContextOverflow,
    ModelError,
    NotFound,
    ProtocolError,
    QuotaExceeded,
    RateLimited,
    Unavailable,
)
from rlm.testing import ClientSuite
from rlm.testing.clients import Connect, ask, failure, reply_to, stream_failure, streamed
from rlm.testing.model_server import Behaviour, ModelServer
from rlm_anthropic import AnthropicLM

KEY = "sk-ant-0123456789abcdef"
EPHEMERAL = {"type": "ephemeral"}


class TestAnthropicSuite(ClientSuite):
    speaks = "anthropic"

    @pytest.fixture
    def connect(self) -> Connect:
        return lambda url, key: AnthropicLM("test-model", base_url=url, api_key=key)


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[ModelServer]:
    with ModelServer() as running:
        yield running


@pytest_asyncio.fixture
async def client(server: ModelServer) -> AsyncIterator[AnthropicLM]:
    made = AnthropicLM("m", base_url=server.url, api_key=KEY)
    yield made
    await made.aclose()


def at_home(model: str, **settings: Any) -> AnthropicLM:
    return AnthropicLM(model, api_key=KEY, **settings)


def body(client: AnthropicLM, request: Request) -> dict[str, Any]:
    """What would be sent, as it would be read."""
    sent = client.dialect.body(request, request.model or client.model_name, False)
    return json.loads(json.dumps(sent))  # type: ignore[no-any-return]


def said(*messages: tuple[Any, str], **fields: Any) -> Request:
    return Request(tuple(Message(role, text) for role, text in messages), **fields)


def answer(content: Any, **fields: Any) -> Behaviour:
    whole = {"type": "message", "content": content, "stop_reason": "end_turn", **fields}
    return Behaviour(body=json.dumps(whole).encode())


def events(*parts: dict[str, Any]) -> Behaviour:
    lines = [f"event: {part['type']}\ndata: {json.dumps(part)}\n\n" for part in parts]
    return Behaviour(body="".join(lines).encode(), content_type="text/event-stream")


# -- where and how


async def test_the_key_and_the_version_travel_in_headers(server: ModelServer, client: AnthropicLM) -> None:
    await reply_to(client)
    headers = server.seen[0].headers
    assert (headers["x-api-key"], headers["anthropic-version"]) == (KEY, "2023-06-01")
    assert "authorization" not in headers


async def test_given_headers_go_before_the_clients_own(server: ModelServer) -> None:
    made = AnthropicLM(
        "m",
        base_url=server.url,
        headers={"Anthropic-Version": "2026-10-21", "Authorization": f"Bearer {KEY}"},
    )
    await reply_to(made)
    await made.aclose()
    headers = server.seen[0].headers
    assert (headers["anthropic-version"], headers["authorization"]) == ("2026-10-21", f"Bearer {KEY}")
    assert "x-api-key" not in headers


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
async def test_an_address_is_good_with_its_version_and_without(server: ModelServer, end: str) -> None:
    made = AnthropicLM("m", base_url=f"{server.url.removesuffix('/v1')}{end}", api_key=KEY)
    await reply_to(made)
    await made.aclose()
    assert server.seen[0].path == "/v1/messages"


async def test_key_and_address_come_from_the_environment(
    server: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    monkeypatch.setenv("ANTHROPIC_BASE_URL", server.url.removesuffix("/v1"))
    made = AnthropicLM("m")
    await reply_to(made)
    await made.aclose()
    assert server.seen[0].headers["x-api-key"] == KEY


async def test_a_key_of_the_environment_does_not_travel_unencrypted_to_an_address_of_the_codes(
    server: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    made = AnthropicLM("m", base_url=server.url)
    await reply_to(made)
    await made.aclose()
    assert KEY not in repr(server.seen)


def test_anthropic_needs_a_key_and_a_server_of_ones_own_does_not() -> None:
    with pytest.raises(AuthError, match="ANTHROPIC_API_KEY"):
        AnthropicLM("m")
    AnthropicLM("m", base_url="http://127.0.0.1:9")
    AnthropicLM("m", headers={"Authorization": "Bearer of a token"})


@pytest.mark.parametrize(
    "wrong", [{"price": {"input": KEY}}, {"price": 5}, {"api_key": 5}, {"base_url": 5}, {"base_url": [KEY]}]
)
def test_a_setting_that_is_wrong_is_refused_and_not_shown(wrong: Any) -> None:
    [name] = wrong
    with pytest.raises(ConfigError, match=f"{name}= is no ") as caught:
        AnthropicLM("m", **{"api_key": KEY, **wrong})
    assert KEY not in str(caught.value)


def test_a_model_must_be_named() -> None:
    with pytest.raises(ConfigError, match="model_name"):
        AnthropicLM(api_key=KEY)


def test_it_streams_and_counts(client: AnthropicLM) -> None:
    assert isinstance(client, SupportsStream)
    assert isinstance(client, SupportsCount)


# -- what is known of models


def test_prices_are_anthropics_at_anthropics_address_only() -> None:
    assert at_home("claude-haiku-4-5-20251001").info("claude-haiku-4-5-20251001").context_window == 200_000
    elsewhere = AnthropicLM("claude-haiku-4-5", base_url="http://127.0.0.1:9")
    assert elsewhere.info("claude-haiku-4-5") == ModelInfo()


def test_what_the_user_says_of_a_model_goes_before_the_table() -> None:
    info = at_home("claude-haiku-4-5", context_window=5, price={"input": 1, "output": 2}).info(
        "claude-haiku-4-5"
    )
    assert (info.context_window, info.price) == (5, Price(1, 2))


@pytest.mark.parametrize("model", ["claude-opus-4-7", "claude-opus-4-7-20260416"])
def test_a_temperature_is_refused_unsent_where_the_model_takes_none(model: str) -> None:
    with pytest.raises(BadRequest, match="takes no temperature") as caught:
        body(at_home(model), ask(temperature=1.0))
    assert not caught.value.sent


def test_a_temperature_is_sent_where_the_model_takes_one_or_nobody_knows() -> None:
    assert body(at_home("claude-haiku-4-5"), ask(temperature=0.0))["temperature"] == 0
    assert body(at_home("of-tomorrow"), ask(temperature=0.0))["temperature"] == 0


def test_a_seed_is_refused_unsent() -> None:
    with pytest.raises(BadRequest, match="no seed") as caught:
        body(at_home("m"), ask(seed=1))
    assert not caught.value.sent
    supports = at_home("claude-opus-4-7").info("claude-opus-4-7").supports
    assert supports is not None
    assert "seed" not in supports


# -- requests


@pytest.mark.parametrize(
    ("model", "own", "asked", "sent"),
    [
        ("of-tomorrow", None, None, 8192),
        ("claude-haiku-4-5", None, None, 32_000),
        ("claude-haiku-4-5", 50_000, None, 50_000),
        ("claude-haiku-4-5", 50_000, 7, 7),
    ],
)
def test_max_tokens_are_always_sent(model: str, own: int | None, asked: int | None, sent: int) -> None:
    assert body(at_home(model, max_tokens=own), ask(max_tokens=asked))["max_tokens"] == sent


def test_the_systems_messages_stand_beside_the_others_in_order() -> None:
    sent = body(at_home("m"), said(("system", "a"), ("user", "b"), ("system", "c"), ("assistant", "d")))
    assert sent["system"] == [{"type": "text", "text": "a"}, {"type": "text", "text": "c"}]
    assert sent["messages"] == [{"role": "user", "content": "b"}, {"role": "assistant", "content": "d"}]


def test_messages_of_one_role_in_a_row_are_blocks_of_one_message() -> None:
    sent = body(at_home("m"), said(("user", "a"), ("user", "b"), ("assistant", "c"), ("user", "d")))
    assert sent["messages"] == [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]


def test_messages_without_text_are_left_out_because_they_would_be_refused() -> None:
    sent = body(at_home("m"), said(("system", " "), ("user", "a"), ("assistant", "\n"), ("user", "b")))
    assert "system" not in sent
    assert [message["role"] for message in sent["messages"]] == ["user"]


@pytest.mark.parametrize(
    "messages", [[("assistant", "a"), ("user", "b")], [("system", "a")], [("user", " ")]]
)
def test_a_conversation_that_the_api_does_not_take_is_refused_unsent(messages: list[Any]) -> None:
    with pytest.raises(BadRequest, match="the API wants") as caught:
        body(at_home("m"), said(*messages))
    assert not caught.value.sent


def test_nothing_is_marked_for_the_cache_unless_the_request_says_so() -> None:
    assert "cache_control" not in json.dumps(body(at_home("m"), said(("system", "a"), ("user", "b"))))


def test_the_end_of_the_systems_part_and_of_the_conversation_are_marked_for_the_cache() -> None:
    request = said(("system", "a"), ("system", "b"), ("user", "c"), ("user", "d"), cache=True)
    sent = body(at_home("m"), request)
    assert sent["system"] == [
        {"type": "text", "text": "a"},
        {"type": "text", "text": "b", "cache_control": EPHEMERAL},
    ]
    assert sent["messages"][-1]["content"] == [
        {"type": "text", "text": "c"},
        {"type": "text", "text": "d", "cache_control": EPHEMERAL},
    ]
    assert json.dumps(sent).count("cache_control") == 2


def test_one_message_is_marked_for_the_cache_as_a_block() -> None:
    sent = body(at_home("m"), said(("user", "a"), cache=True))
    block = {"type": "text", "text": "a", "cache_control": EPHEMERAL}
    assert sent["messages"] == [{"role": "user", "content": [block]}]


def test_a_schema_stands_beside_what_else_says_how_to_answer() -> None:
    sent = body(
        at_home("m"), ask(schema={"type": "object"}, extra={"output_config": {"effort": "low"}, "top_k": 3})
    )
    schema = {"type": "json_schema", "schema": {"type": "object"}}
    assert (sent["output_config"], sent["top_k"]) == ({"format": schema, "effort": "low"}, 3)


# -- replies


@pytest.mark.parametrize(
    ("reason", "finish"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("refusal", "filter"),
        ("pause_turn", "other"),
        ("of tomorrow", "other"),
    ],
)
async def test_how_a_reply_ended(server: ModelServer, client: AnthropicLM, reason: str, finish: str) -> None:
    server.reply = answer([{"type": "text", "text": "a"}], stop_reason=reason)
    assert (await reply_to(client)).finish == finish


async def test_thoughts_are_no_text_and_are_kept_as_they_came(
    server: ModelServer, client: AnthropicLM
) -> None:
    content = [
        {"type": "thinking", "thinking": "hm", "signature": "s"},
        {"type": "text", "text": "a"},
        {"type": "text", "text": "b"},
    ]
    server.reply = answer(
        content,
        usage={"input_tokens": 1, "output_tokens": 9, "output_tokens_details": {"thinking_tokens": 5}},
    )
    reply = await reply_to(client)
    assert (reply.text, reply.raw, reply.usage.reasoning_tokens) == ("ab", {"content": content}, 5)


async def test_a_reply_without_thoughts_is_not_kept_twice(client: AnthropicLM) -> None:
    assert (await reply_to(client)).raw is None
    assert (await streamed(client))[1].raw is None


START = {"type": "message_start", "message": {"id": "i", "model": "x", "content": []}}
STOP = {"type": "message_stop"}


def block(index: int, kind: str, *deltas: dict[str, str], **start: str) -> list[dict[str, Any]]:
    return [
        {"type": "content_block_start", "index": index, "content_block": {"type": kind, **start}},
        *({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": index},
    ]


async def test_streamed_thoughts_are_no_text_and_are_kept_whole(
    server: ModelServer, client: AnthropicLM
) -> None:
    thoughts = [
        {"type": "thinking_delta", "thinking": "h"},
        {"type": "thinking_delta", "thinking": "m"},
        {"type": "signature_delta", "signature": "s"},
    ]
    server.reply = events(
        START,
        *block(0, "thinking", *thoughts, thinking="", signature=""),
        *block(1, "text", {"type": "text_delta", "text": "a"}, {"type": "text_delta", "text": "b"}, text=""),
        {"type": "message_delta", "delta": {"stop_reason": "max_tokens"}, "usage": {"output_tokens": 4}},
        STOP,
    )
    pieces, reply = await streamed(client)
    assert (pieces, reply.finish, reply.id, reply.model) == (["a", "b"], "length", "i", "x")
    assert (reply.usage.output_tokens, reply.usage.estimated) == (4, True)  # what was read it does not say
    assert reply.raw == {
        "content": [
            {"type": "thinking", "thinking": "hm", "signature": "s"},
            {"type": "text", "text": "ab"},
        ]
    }


async def test_what_a_stream_says_at_its_end_completes_what_it_said_at_its_beginning(
    server: ModelServer, client: AnthropicLM
) -> None:
    usage = {"input_tokens": 5, "cache_read_input_tokens": 10, "cache_creation_input_tokens": 20}
    start = {"type": "message_start", "message": {"content": [], "usage": {**usage, "output_tokens": 1}}}
    end = {"cache_read_input_tokens": None, "output_tokens": 9}
    server.reply = events(start, {"type": "message_delta", "delta": {}, "usage": end}, STOP)
    assert (await streamed(client))[1].usage == Usage(35, 9, cached_tokens=10, cache_write_tokens=20)


async def test_pings_and_events_of_tomorrow_are_passed_over(server: ModelServer, client: AnthropicLM) -> None:
    server.reply = events({"type": "ping"}, START, {"type": "of_tomorrow", "x": [1]}, STOP)
    assert (await streamed(client))[1].text == ""


async def test_a_stream_that_forgets_its_beginning_is_understood(
    server: ModelServer, client: AnthropicLM
) -> None:
    """As llama.cpp's, when the first token is a part of a character."""
    server.reply = events(*block(0, "text", {"type": "text_delta", "text": "a"}, text=""), STOP)
    _, reply = await streamed(client)
    assert (reply.text, reply.usage.estimated) == ("a", True)


@pytest.mark.parametrize("only", [block(0, "text", {"type": "text_delta", "text": "a"})[1], STOP])
async def test_a_stream_without_what_it_continues_or_ends_is_a_protocol_error(
    server: ModelServer, client: AnthropicLM, only: dict[str, Any]
) -> None:
    server.reply = events(only)
    assert type(await stream_failure(client)) is ProtocolError


async def test_a_server_that_does_not_stream_after_all_is_understood(
    server: ModelServer, client: AnthropicLM
) -> None:
    server.reply = answer([{"type": "text", "text": "all at once"}])
    pieces, reply = await streamed(client)
    assert (pieces, reply.text) == (["all at once"], "all at once")


# -- errors


@pytest.mark.parametrize(
    ("status", "kind", "message", "error"),
    [
        (400, "invalid_request_error", "Your credit balance is too low to access the API", QuotaExceeded),
        (402, "billing_error", "no", QuotaExceeded),
        (404, "not_found_error", "model: claude-none", NotFound),
        (413, "request_too_large", "Request exceeds the maximum size", BadRequest),
        (429, "rate_limit_error", "would exceed your rate limit of 40,000 input tokens", RateLimited),
        (529, "overloaded_error", "Overloaded", Unavailable),
    ],
)
async def test_an_error_is_of_one_kind_by_its_status_and_in_a_stream(
    server: ModelServer,
    client: AnthropicLM,
    status: int,
    kind: str,
    message: str,
    error: type[ModelError],
) -> None:
    told = {"type": "error", "error": {"type": kind, "message": message}}
    server.reply = Behaviour(status=status, body=json.dumps(told).encode())
    whole = await failure(client)
    server.reply = events(START, told)
    within = await stream_failure(client)
    assert (type(whole), type(within)) == (error, error)
    assert (whole.code, whole.status) == (within.code, within.status) == (kind, status)
    assert message in str(whole)


@pytest.mark.parametrize(
    "message",
    [
        "prompt is too long: 200001 tokens > 200000 maximum",
        "input length and `max_tokens` exceed context limit: 190000 + 20000 > 200000, decrease input length",
    ],
)
async def test_an_overflow_tells_the_window(server: ModelServer, client: AnthropicLM, message: str) -> None:
    server.reply = Behaviour(status=400, message=message)
    error = await failure(client)
    assert isinstance(error, ContextOverflow)
    assert error.window == 200_000


async def test_an_error_with_a_status_of_success_is_one(server: ModelServer, client: AnthropicLM) -> None:
    told = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    server.reply = Behaviour(body=json.dumps(told).encode())
    assert type(await failure(client)) is Unavailable


@pytest.mark.parametrize("status", [200, 503])
async def test_no_half_of_a_key_is_left_where_a_text_is_cut(
    server: ModelServer, client: AnthropicLM, status: int
) -> None:
    for cut in range(http.MAX_SHOWN - len(KEY) - 5, http.MAX_SHOWN, 3):
        server.reply = Behaviour(status=status, body=b"x" * cut + KEY.encode())
        assert KEY[:10] not in str(await failure(client))


# -- counting


async def test_a_count_is_of_what_the_model_reads_only(server: ModelServer, client: AnthropicLM) -> None:
    assert await client.count(said(("system", "a"), ("user", "b"), max_tokens=5)) == (7, True)
    assert (server.requests, server.asides) == (0, 1)


# -- a real server


@pytest_asyncio.fixture
async def local(llama: LlamaServer) -> AsyncIterator[AnthropicLM]:
    made = AnthropicLM(llama.model, base_url=llama.root)
    yield made
    await made.aclose()


NUMBERS = itertools.count()


def fresh(**fields: Any) -> Request:
    """A request that no earlier one begins like."""
    return said(("user", f"{next(NUMBERS)}: {'count with me ' * 8}"), **fields)


async def test_llama_cpp_counts_as_it_counted(local: AnthropicLM) -> None:
    request = said(("system", "be brief"), ("user", "a few words"), max_tokens=5)
    reply = await reply_to(local, request)
    assert (reply.usage.input_tokens, True) == await local.count(request)
    assert 0 < reply.usage.output_tokens <= 5


async def test_llama_cpp_ends_at_max_tokens_and_it_shows(local: AnthropicLM) -> None:
    """It may end earlier by itself, as its model is random; hardly all of these do."""
    replies = [await reply_to(local, fresh(max_tokens=3)) for _ in range(3)]
    replies += [(await streamed(local, fresh(max_tokens=3)))[1] for _ in range(3)]
    cut = [reply.usage.output_tokens for reply in replies if reply.finish == "length"]
    assert cut == [3] * len(cut) != []


async def test_calls_after_a_stream_are_answered_although_llama_cpp_closes_its_connection(
    local: AnthropicLM,
) -> None:
    for _ in range(5):
        await streamed(local, fresh(max_tokens=1))
        await reply_to(local, fresh(max_tokens=1))


async def test_what_llama_cpp_has_read_before_is_cached_input(local: AnthropicLM) -> None:
    request = fresh(max_tokens=2)
    first, second = await reply_to(local, request), await reply_to(local, request)
    assert first.usage.input_tokens == second.usage.input_tokens
    assert second.usage.cached_tokens > first.usage.cached_tokens


async def test_llama_cpp_takes_turns_that_were_merged_and_marked(local: AnthropicLM) -> None:
    turns = said(("system", "a"), ("user", "b"), ("user", "c"), ("assistant", "d"), ("user", "e"), cache=True)
    assert (await reply_to(local, turns)).usage.input_tokens > 0


async def test_a_request_longer_than_llama_cpp_reads_is_an_overflow(
    llama: LlamaServer, local: AnthropicLM
) -> None:
    error = await failure(local, ask("x" * (llama.context + 100)))
    assert isinstance(error, ContextOverflow)
    assert error.window == llama.context


# -- another's reading of the protocol


@pytest_asyncio.fixture
async def mocked(aimock: Aimock) -> AsyncIterator[AnthropicLM]:
    made = AnthropicLM("claude-sonnet-5-5", base_url=aimock.root, api_key=KEY)
    yield made
    await made.aclose()


async def test_aimock_answers_whole_and_in_pieces(aimock: Aimock, mocked: AnthropicLM) -> None:
    aimock.reply("hello", "a reply of several pieces", usage={"input_tokens": 100, "output_tokens": 7})
    whole = await reply_to(mocked, ask())
    pieces, last = await streamed(mocked, ask())
    assert whole.text == "".join(pieces) == last.text == "a reply of several pieces"
    for reply in (whole, last):
        assert (reply.usage.input_tokens, reply.usage.output_tokens) == (100, 7)
        assert reply.finish == "stop"
    assert [entry["path"] for entry in aimock.journal()] == ["/v1/messages"] * 2


@pytest.mark.parametrize(
    ("status", "kind", "expected"),
    [
        (401, "authentication_error", AuthError),
        (404, "not_found_error", NotFound),
        (400, "invalid_request_error", BadRequest),
        (500, "api_error", Unavailable),
        (529, "overloaded_error", Unavailable),
    ],
)
async def test_errors_as_aimock_words_them_have_their_kind(
    aimock: Aimock, mocked: AnthropicLM, status: int, kind: str, expected: type[ModelError]
) -> None:
    aimock.refuse("hello", status, type=kind)
    error = await failure(mocked, ask())
    assert (type(error), error.status) == (expected, status)


async def test_too_many_requests_say_when_to_return(aimock: Aimock, mocked: AnthropicLM) -> None:
    aimock.refuse("hello", 429, retry_after=7, type="rate_limit_error")
    error = await failure(mocked, ask())
    assert isinstance(error, RateLimited)
    assert error.retry_after == 7
    assert len(aimock.journal()) == 1


async def test_what_is_no_json_is_a_protocol_error(aimock: Aimock, mocked: AnthropicLM) -> None:
    aimock.chaos("malformedRate")
    assert isinstance(await failure(mocked, ask()), ProtocolError)

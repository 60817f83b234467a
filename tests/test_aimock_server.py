"""aimock does what tests of clients rest upon."""

from __future__ import annotations

import http.client
from pathlib import Path
from typing import Any

import pytest
from aimock_support import Aimock, Fault
from server_support import Answer, ask, orphaned

from rlm.testing.sessions import eventually, parents

USAGE = {"input_tokens": 100, "output_tokens": 7}
PROTOCOLS = ("openai", "responses", "anthropic", "gemini", "gemini_openai")


def call(aimock: Aimock, protocol: str, prompt: str, **fields: Any) -> Answer:
    """One call in one of the protocols."""
    messages = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 9}
    calls: dict[str, tuple[str, dict[str, Any]]] = {
        "openai": (f"{aimock.openai}/chat/completions", messages),
        "responses": (f"{aimock.openai}/responses", {"input": prompt}),
        "anthropic": (f"{aimock.root}/v1/messages", messages),
        "gemini": (f"{aimock.root}/v1beta/models/m:generateContent", {"contents": gemini(prompt)}),
        "gemini_openai": (f"{aimock.gemini_openai}/chat/completions", messages),
        "openrouter": (f"{aimock.openrouter}/chat/completions", messages),
    }
    url, body = calls[protocol]
    return ask(url, {"model": "m", **body, **fields})


def gemini(prompt: str) -> list[dict[str, Any]]:
    """A prompt in Gemini's shape."""
    return [{"role": "user", "parts": [{"text": prompt}]}]


def said(answer: Answer, protocol: str) -> Any:
    """The text of a reply."""
    reply = answer.json
    match protocol:
        case "responses":
            return reply["output"][0]["content"][0]["text"]
        case "anthropic":
            return reply["content"][0]["text"]
        case "gemini":
            return reply["candidates"][0]["content"]["parts"][0]["text"]
        case _:
            return reply["choices"][0]["message"]["content"]


@pytest.mark.parametrize("protocol", [*PROTOCOLS, "openrouter"])
def test_a_prompt_gets_the_reply_it_was_given(aimock: Aimock, protocol: str) -> None:
    aimock.reply("capital", "```repl\nFINAL('Paris é')\n```")
    assert (
        said(call(aimock, protocol, "the capital of France?"), protocol) == "```repl\nFINAL('Paris é')\n```"
    )


@pytest.mark.parametrize(
    ("protocol", "usage"),
    [
        ("openai", {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}),
        ("responses", {"input_tokens": 100, "output_tokens": 7, "total_tokens": 107}),
        ("anthropic", {"input_tokens": 100, "output_tokens": 7}),
        ("gemini", {"promptTokenCount": 100, "candidatesTokenCount": 7, "totalTokenCount": 107}),
        ("gemini_openai", {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}),
    ],
)
def test_usage_has_each_protocols_shape(aimock: Aimock, protocol: str, usage: dict[str, int]) -> None:
    aimock.reply("hello", "hi", usage=USAGE)
    reply = call(aimock, protocol, "hello").json
    assert reply["usageMetadata" if protocol == "gemini" else "usage"] == usage


def test_openrouter_tells_cached_tokens_and_cost(aimock: Aimock) -> None:
    details = {"prompt_tokens_details": {"cached_tokens": 60}, "cost": 0.25}
    aimock.reply("hello", "hi", usage={**USAGE, **details})
    usage = call(aimock, "openrouter", "hello").json["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 60
    assert usage["cost"] == 0.25


def test_replies_come_in_turn_and_then_no_more(aimock: Aimock) -> None:
    aimock.reply("go", "first", "second")
    assert [said(call(aimock, "openai", "go"), "openai") for _ in range(2)] == ["first", "second"]
    assert call(aimock, "openai", "go").status == 404


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_prompt_nobody_taught_is_not_found(aimock: Aimock, protocol: str) -> None:
    assert call(aimock, protocol, "hello").status == 404


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_too_many_requests_say_when_to_return(aimock: Aimock, protocol: str) -> None:
    aimock.refuse("hello", 429, retry_after=7, type="rate_limit_error")
    answer = call(aimock, protocol, "hello")
    assert (answer.status, answer.headers["retry-after"]) == (429, "7")
    assert answer.headers["x-ratelimit-remaining-requests"] == "0"
    assert answer.json["error"]["message"] == "refused with 429"


def test_errors_have_each_protocols_shape(aimock: Aimock) -> None:
    aimock.refuse("hello", 529, type="overloaded_error", code="busy")
    openai, anthropic, gemini = (
        call(aimock, name, "hello").json for name in ("openai", "anthropic", "gemini")
    )
    assert (openai["error"]["type"], openai["error"]["code"]) == ("overloaded_error", "busy")
    assert (anthropic["type"], anthropic["error"]["type"]) == ("error", "overloaded_error")
    assert (gemini["error"]["code"], gemini["error"]["status"]) == (529, "overloaded_error")


def test_a_single_refusal_is_over_with_the_next_call(aimock: Aimock) -> None:
    aimock.reply("hello", "hi")
    aimock.refuse_once(503)
    assert [call(aimock, "anthropic", "hello").status for _ in range(2)] == [503, 200]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(("fault", "status"), [("rateLimitRate", 429), ("dropRate", 500)])
def test_chaos_refuses_until_it_is_calm(aimock: Aimock, protocol: str, fault: Fault, status: int) -> None:
    aimock.reply("hello", "hi")
    aimock.chaos(fault)
    answer = call(aimock, protocol, "hello")
    assert answer.status == status
    assert answer.headers["retry-after"] == ("1" if status == 429 else None)
    aimock.calm()
    assert call(aimock, protocol, "hello").status == 200


def test_chaos_cuts_the_connection(aimock: Aimock) -> None:
    aimock.chaos("disconnectRate")
    with pytest.raises(http.client.RemoteDisconnected):
        call(aimock, "openai", "hello")


def test_chaos_answers_what_is_no_json(aimock: Aimock) -> None:
    aimock.chaos("malformedRate")
    answer = call(aimock, "openai", "hello")
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    with pytest.raises(ValueError, match="property name"):
        answer.json  # noqa: B018 - it parses


def test_a_stream_tells_usage_when_asked(aimock: Aimock) -> None:
    aimock.reply("hello", "a reply of several pieces, é", usage=USAGE)
    options = {"include_usage": True}
    *pieces, finish, usage = call(aimock, "openai", "hello", stream=True, stream_options=options).events
    assert (
        "".join(piece["choices"][0]["delta"]["content"] for piece in pieces) == "a reply of several pieces, é"
    )
    assert finish["choices"][0]["finish_reason"] == "stop"
    assert (usage["choices"], usage["usage"]["total_tokens"]) == ([], 107)


def test_an_anthropic_stream_has_its_events(aimock: Aimock) -> None:
    aimock.reply("hello", "hi", usage=USAGE)
    events = call(aimock, "anthropic", "hello", stream=True).events
    assert [event["type"] for event in events] == [
        "message_start", "content_block_start", "content_block_delta", "content_block_stop",
        "message_delta", "message_stop",
    ]  # fmt: skip
    assert events[0]["message"]["usage"]["input_tokens"] == 100
    assert events[4]["usage"]["output_tokens"] == 7


def test_a_gemini_stream_ends_with_usage(aimock: Aimock) -> None:
    aimock.reply("hello", "a reply of several pieces", usage=USAGE)
    url = f"{aimock.root}/v1beta/models/m:streamGenerateContent?alt=sse"
    first, *_, last = ask(url, {"contents": gemini("hello")}).events
    assert "usageMetadata" not in first
    assert last["usageMetadata"]["totalTokenCount"] == 107


def test_a_stream_can_break_off(aimock: Aimock) -> None:
    aimock.teach("hello", {"content": "a reply of several pieces"}, truncateAfterChunks=3, latency=20)
    with pytest.raises(http.client.IncompleteRead) as broken:
        call(aimock, "openai", "hello", stream=True)
    assert b"data: " in broken.value.partial
    assert b"pieces" not in broken.value.partial


def test_the_journal_has_what_was_asked_and_a_reset_forgets_it(aimock: Aimock) -> None:
    aimock.reply("hello", "hi")
    call(aimock, "openai", "hello", temperature=0.5)
    (entry,) = aimock.journal()
    assert (entry["path"], entry["response"]["status"]) == ("/v1/chat/completions", 200)
    assert entry["body"]["temperature"] == 0.5
    aimock.chaos("dropRate")
    aimock.reset()
    assert aimock.journal() == []
    assert call(aimock, "openai", "hello").status == 404


@pytest.mark.usefixtures("aimock")
def test_it_ends_when_its_parent_is_killed_and_leaves_nothing(tmp_path: Path) -> None:
    pid = orphaned("aimock_support", "aimock_server", tmp_path)
    assert eventually(lambda: pid not in parents())
    assert list(tmp_path.iterdir()) == []

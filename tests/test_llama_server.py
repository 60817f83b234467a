"""llama.cpp's server does what tests of clients rest upon."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from llama_support import LlamaServer, escaped
from server_support import Answer, ask, orphaned

from rlm.testing.sessions import eventually, parents

CODE = '```repl\nprint(context[:3], "é\\n")\nFINAL(42)\n```'


def user(text: str) -> dict[str, str]:
    """A user's message."""
    return {"role": "user", "content": text}


def chat(llama: LlamaServer, *messages: dict[str, str], **fields: Any) -> Answer:
    """One call of chat/completions."""
    return ask(f"{llama.url}/chat/completions", {"messages": messages, **fields})


def text_of(answer: Answer) -> str:
    """What the model said in chat/completions."""
    assert answer.status == 200, answer.body
    return str(answer.json["choices"][0]["message"]["content"])


def test_a_scripted_reply_is_sampled_as_it_is(llama: LlamaServer) -> None:
    answer = chat(llama, user("go on"), **llama.scripted(CODE))
    assert text_of(answer) == CODE
    assert answer.json["choices"][0]["finish_reason"] == "stop"


@given(reply=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=60))
@example("")
@example('"\\[]\r\n\t\'`\\"')
@example("\\x41\\u0041\\U00000041")
@example(" ▁ Ġ <|end|> \U0010ffff ")
@example("<think>\n\n</think>\n{}\n")
@settings(max_examples=40, deadline=None)
def test_any_text_can_be_scripted(llama: LlamaServer, reply: str) -> None:
    assert text_of(chat(llama, user("x"), **llama.scripted(reply))) == reply


@pytest.mark.parametrize("text", ["a\0b", "\ud800"])
def test_what_a_grammar_cannot_express_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="NUL"):
        escaped(text)


def test_usage_counts_bytes_and_the_end(llama: LlamaServer) -> None:
    usage = chat(llama, user("é"), **llama.scripted("é!")).json["usage"]
    assert usage["prompt_tokens"] == len("<user>é\n<assistant>".encode())
    assert usage["completion_tokens"] == len("é!".encode()) + 1
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_a_conversation_that_goes_on_is_read_from_the_cache(llama: LlamaServer) -> None:
    opening = user("a beginning of its own" * 50)
    first = chat(llama, opening, **llama.scripted(CODE)).json["usage"]
    said = {"role": "assistant", "content": CODE}
    second = chat(llama, opening, said, user("next"), **llama.scripted("ok")).json["usage"]
    known = first["prompt_tokens"] + len(CODE.encode())
    assert second["prompt_tokens_details"]["cached_tokens"] == known


def test_a_limit_cuts_a_reply_off(llama: LlamaServer) -> None:
    answer = chat(llama, user("x"), max_tokens=3, **llama.scripted("abcdef"))
    assert text_of(answer) == "abc"
    assert answer.json["choices"][0]["finish_reason"] == "length"


def test_a_stop_sequence_ends_a_reply(llama: LlamaServer) -> None:
    assert text_of(chat(llama, user("x"), stop=["cd"], **llama.scripted("abcdef"))) == "ab"


def test_a_seed_repeats_a_reply(llama: LlamaServer) -> None:
    # The first call fills the cache: what is read in another grouping is rounded otherwise.
    replies = [text_of(chat(llama, user("say"), seed=7, max_tokens=20, id_slot=0)) for _ in range(3)]
    assert replies[1] == replies[2]


def test_a_schema_is_kept_to(llama: LlamaServer) -> None:
    schema = {"type": "object", "properties": {"n": {"const": 7}}, "required": ["n"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": schema}}
    assert json.loads(text_of(chat(llama, user("x"), response_format=wanted))) == {"n": 7}


def test_a_stream_brings_whole_characters(llama: LlamaServer) -> None:
    answer = chat(llama, user("x"), stream=True, **llama.scripted("aé😀"))
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.body.endswith(b"data: [DONE]\n\n")
    pieces = [event["choices"][0]["delta"].get("content") for event in answer.events]
    assert pieces == [None, "a", "é", "😀", None]
    assert not any("usage" in event for event in answer.events)


def test_a_stream_tells_usage_when_asked(llama: LlamaServer) -> None:
    wanted = {"stream": True, "stream_options": {"include_usage": True}}
    *_, finish, last = chat(llama, user("x"), **wanted, **llama.scripted("abc")).events
    assert finish["choices"][0]["finish_reason"] == "stop"
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 4


def overflow(llama: LlamaServer) -> str:
    """A prompt that is too long."""
    return "x" * (llama.context + 1)


@pytest.mark.parametrize("path", ["chat/completions", "responses", "messages"])
@pytest.mark.parametrize("stream", [False, True])
def test_too_long_a_prompt_is_a_bad_request(llama: LlamaServer, path: str, stream: bool) -> None:
    prompt = {"input": overflow(llama)} if path == "responses" else {"messages": [user(overflow(llama))]}
    answer = ask(f"{llama.url}/{path}", {**prompt, "stream": stream, "max_tokens": 5})
    assert answer.status == 400
    error = answer.json["error"]
    assert (error["code"], error["type"]) == (400, "exceed_context_size_error")
    assert error["n_prompt_tokens"] > error["n_ctx"] == llama.context


def messages(llama: LlamaServer, text: str, **fields: Any) -> Answer:
    """One call of Anthropic's protocol, which cannot be scripted: the likeliest reply, which is not empty."""
    fields = {"max_tokens": 8, "temperature": 0, **fields}
    body = {"model": llama.model, "messages": [user(text)], **fields}
    return ask(f"{llama.url}/messages", body)


def test_it_speaks_to_anthropic_clients(llama: LlamaServer) -> None:
    prompt = "Anthropic's" * 20
    first, second = (messages(llama, prompt).json for _ in range(2))
    assert (first["type"], first["role"]) == ("message", "assistant")
    assert first["content"][0]["type"] == "text"
    assert first["stop_reason"] in ("end_turn", "max_tokens")
    assert second["usage"]["cache_read_input_tokens"] > len(prompt)
    counted = [sum(reply["usage"][kind] for kind in INPUT) for reply in (first, second)]
    asked = ask(f"{llama.url}/messages/count_tokens", {"model": llama.model, "messages": [user(prompt)]})
    assert counted == [asked.json["input_tokens"]] * 2


INPUT = ("input_tokens", "cache_read_input_tokens")


def test_an_anthropic_stream_has_its_events(llama: LlamaServer) -> None:
    events = messages(llama, "x", stream=True, max_tokens=4).events
    kinds = [event["type"] for event in events if event["type"] != "content_block_delta"]
    assert kinds == [
        "message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    assert events[0]["message"]["usage"].keys() >= set(INPUT)
    assert 1 <= events[-2]["usage"]["output_tokens"] <= 4


def test_it_speaks_to_clients_of_responses(llama: LlamaServer) -> None:
    body = {"model": llama.model, "input": "a prompt of responses", **llama.scripted(CODE)}
    first, second = (ask(f"{llama.url}/responses", body).json for _ in range(2))
    assert first["output"][0]["content"][0]["text"] == CODE
    assert first["usage"]["output_tokens"] == len(CODE.encode()) + 1
    assert second["usage"]["input_tokens_details"]["cached_tokens"] > 0


def test_a_stream_of_responses_ends_with_usage(llama: LlamaServer) -> None:
    events = ask(f"{llama.url}/responses", {"input": "x", "stream": True, **llama.scripted("aé")}).events
    assert "".join(event["delta"] for event in events if "delta" in event) == "aé"
    assert events[-1]["type"] == "response.completed"
    assert events[-1]["response"]["usage"]["output_tokens"] == 4


def test_it_counts_tokens(llama: LlamaServer) -> None:
    assert len(ask(f"{llama.root}/tokenize", {"content": "é!"}).json["tokens"]) == 3


def test_it_names_its_model_and_its_slots(llama: LlamaServer) -> None:
    assert ask(f"{llama.url}/models").json["data"][0]["id"] == llama.model
    assert ask(f"{llama.root}/props").json["total_slots"] == 4


def test_calls_side_by_side_get_their_own_replies(llama: LlamaServer) -> None:
    with ThreadPoolExecutor(12) as threads:
        replies = threads.map(lambda n: text_of(chat(llama, user("x"), **llama.scripted(f"n{n}"))), range(24))
        assert list(replies) == [f"n{n}" for n in range(24)]


@contextmanager
def endless(llama: LlamaServer, **fields: Any) -> Iterator[http.client.HTTPConnection]:
    """A call that fills the context, and is dropped."""
    connection = http.client.HTTPConnection(llama.root.removeprefix("http://"), timeout=30)
    body = {"messages": [user("x")], "ignore_eos": True, **fields}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    try:
        assert eventually(lambda: llama.busy() > 0)
        yield connection
    finally:
        connection.close()


def test_a_stream_that_is_dropped_is_no_longer_written(llama: LlamaServer) -> None:
    assert llama.idle()
    with endless(llama, stream=True) as connection, connection.getresponse() as response:
        assert response.readline().startswith(b"data: ")
    assert llama.idle(3)


def test_a_reply_that_nobody_waits_for_is_written_all_the_same(llama: LlamaServer) -> None:
    assert llama.idle()
    with endless(llama, max_tokens=4000):
        pass
    assert llama.busy() == 1  # no client can help it: it has to stream
    assert llama.idle()


@pytest.mark.usefixtures("llama")
def test_it_ends_when_its_parent_is_killed_and_leaves_nothing(tmp_path: Path) -> None:
    pid = orphaned("llama_support", "llama_server", tmp_path)
    assert eventually(lambda: pid not in parents())
    assert list(tmp_path.iterdir()) == []

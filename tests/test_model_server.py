"""Facts about the model server that clients are tested and measured with."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rlm.client import Usage
from rlm.testing.dialects import conversation
from rlm.testing.model_server import Behaviour, ModelServer, Seen
from rlm.testing.sessions import eventually

PATHS = {
    "openai": "/v1/chat/completions",
    "responses": "/some/prefix/responses",
    "anthropic": "/v1/messages",
}
USAGE = Usage(100, 50, cached_tokens=30, cache_write_tokens=20, reasoning_tokens=10)
TEXT = "one piece after the other: é 🦆"


@pytest.fixture
def server() -> Iterator[ModelServer]:
    with ModelServer() as running:
        yield running


Post = Callable[..., tuple[int, dict[str, str], bytes]]


@pytest.fixture
def connection(server: ModelServer) -> Iterator[http.client.HTTPConnection]:
    opened = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    yield opened
    opened.close()


@pytest.fixture
def post(connection: http.client.HTTPConnection) -> Post:
    def send(path: str = PATHS["openai"], **body: Any) -> tuple[int, dict[str, str], bytes]:
        data = {"model": "m", "messages": [{"role": "user", "content": "hello"}], **body}
        connection.request("POST", path, json.dumps(data), {"X-Mine": "yes"})
        response = connection.getresponse()
        return (
            response.status,
            {name.lower(): value for name, value in response.getheaders()},
            response.read(),
        )

    return send


def raw(server: ModelServer, text: str = '{"messages": []}', path: str = PATHS["openai"]) -> socket.socket:
    """A connection over which a request was sent."""
    opened = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    data = text.encode()
    opened.sendall(b"POST %b HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (path.encode(), len(data), data))
    return opened


def everything(opened: socket.socket) -> bytes:
    """What comes until the end of the connection, which is then closed here too."""
    with opened:
        return b"".join(iter(lambda: opened.recv(65536), b""))


def ask(server: ModelServer) -> str:
    """The beginning of an answer, over a connection of its own."""
    with raw(server) as opened:
        return opened.recv(65536).decode()


def events(body: bytes) -> list[Any]:
    lines = [line[6:] for line in body.decode().split("\n") if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


# --- what it is asked ----------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", PATHS)
def test_a_request_is_seen_as_it_arrived(server: ModelServer, post: Post, dialect: str) -> None:
    post(PATHS[dialect] + "?beta=true", temperature=0.5)
    (seen,) = server.seen
    assert (seen.path, seen.dialect, seen.number, seen.text) == (PATHS[dialect], dialect, 1, "hello")
    assert (seen.headers["x-mine"], seen.body["temperature"]) == ("yes", 0.5)


def test_a_body_of_several_megabytes_arrives_whole(server: ModelServer, post: Post) -> None:
    text = "ab" * 4_000_000
    assert post(messages=[{"role": "user", "content": text}])[0] == 200
    assert server.seen[0].text == text


def test_a_request_in_small_pieces_and_two_in_one_are_served_in_order(server: ModelServer) -> None:
    server.reply = lambda seen: Behaviour(text=f"reply {seen.number}", latency=0.05)
    request = b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}"
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as opened:
        for byte in request[:70]:
            opened.sendall(bytes([byte]))
        opened.sendall(request[70:] + request)
        found = b""
        while b"reply 2" not in found:
            found += opened.recv(65536)
    assert found.index(b"reply 1") < found.index(b"reply 2")
    assert server.most_in_flight == 1


@pytest.mark.parametrize(
    "text", ["not JSON", "[1]", '{"messages": 5}', '{"messages": [5]}', '{"input": "x"}']
)
def test_a_strange_body_is_answered(server: ModelServer, text: str) -> None:
    with raw(server, text) as opened:
        assert b" 400 " in opened.recv(65536) or text.startswith("{")


def test_the_models_are_listed_and_what_is_unknown_is_not_found(
    server: ModelServer, connection: http.client.HTTPConnection
) -> None:
    server.models = ["a", "b"]
    connection.request("GET", "/v1/models")
    assert [model["id"] for model in json.load(connection.getresponse())["data"]] == ["a", "b"]
    connection.request("GET", "/props")
    assert connection.getresponse().status == 404
    assert (server.requests, server.asides) == (0, 2)


def test_messages_are_read_from_every_dialect() -> None:
    said = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": [{"text": "b"}, {"text": "c"}]},
    ]
    both = [("user", "a"), ("assistant", "bc")]
    assert conversation({"messages": said}) == both
    assert conversation({"system": [{"text": "s"}], "messages": said}) == [("system", "s"), *both]
    assert conversation({"instructions": "s", "input": "a"}) == [("system", "s"), ("user", "a")]


# --- what it answers -----------------------------------------------------------------------------


def test_a_reply_in_openais_dialect(server: ModelServer, post: Post) -> None:
    server.reply = Behaviour(text=TEXT, finish="length", usage=USAGE)
    status, headers, body = post()
    reply = json.loads(body)
    assert (status, headers["x-request-id"], reply["model"]) == (200, "req-1", "m")
    (choice,) = reply["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (TEXT, "length")
    usage = reply["usage"]
    assert (usage["prompt_tokens"], usage["prompt_tokens_details"]) == (100, {"cached_tokens": 30})
    assert (usage["completion_tokens"], usage["completion_tokens_details"]) == (50, {"reasoning_tokens": 10})


def test_a_reply_in_the_dialect_of_responses(server: ModelServer, post: Post) -> None:
    server.reply = Behaviour(text=TEXT, finish="filter", usage=USAGE)
    reply = json.loads(post(PATHS["responses"])[2])
    assert (reply["status"], reply["incomplete_details"]) == ("incomplete", {"reason": "content_filter"})
    assert [item["type"] for item in reply["output"]] == ["reasoning", "message"]
    assert reply["output"][1]["content"][0]["text"] == TEXT
    assert (reply["usage"]["input_tokens"], reply["usage"]["input_tokens_details"]) == (
        100,
        {"cached_tokens": 30},
    )


def test_a_reply_in_anthropics_dialect(server: ModelServer, post: Post) -> None:
    server.reply = Behaviour(text=TEXT, usage=USAGE)
    reply = json.loads(post(PATHS["anthropic"])[2])
    assert (reply["content"], reply["stop_reason"]) == ([{"type": "text", "text": TEXT}], "end_turn")
    assert reply["usage"] == {
        "input_tokens": 50,
        "cache_read_input_tokens": 30,
        "cache_creation_input_tokens": 20,
        "output_tokens": 50,
    }


def test_an_error_has_the_dialects_shape(server: ModelServer, post: Post) -> None:
    server.reply = Behaviour(status=429, code="slow_down", message="too fast", headers={"Retry-After": "3"})
    status, headers, body = post()
    assert (status, headers["retry-after"]) == (429, "3")
    assert json.loads(body)["error"]["code"] == "slow_down"
    status, headers, body = post(PATHS["anthropic"])
    error = {"type": "slow_down", "message": "too fast"}
    assert (headers["request-id"], json.loads(body)) == ("req-2", {"type": "error", "error": error})


def test_a_body_of_ones_own_is_sent_as_it_is(server: ModelServer, post: Post) -> None:
    server.reply = Behaviour(body=b"<html>\xff", content_type="text/html")
    assert post(stream=True)[1:] == (
        {"content-type": "text/html", "content-length": "7", "x-request-id": "req-1"}, b"<html>\xff",
    )  # fmt: skip


def test_a_stream_in_openais_dialect(server: ModelServer, post: Post) -> None:
    server.reply = Behaviour(text=TEXT, usage=USAGE)
    body = post(stream=True, stream_options={"include_usage": True})[2]
    *chunks, last = events(body)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == TEXT
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-2:] == [None, "stop"]
    assert (last["choices"], last["usage"]["prompt_tokens"]) == ([], 100)
    assert body.endswith(b"data: [DONE]\n\n")
    assert all("usage" not in chunk for chunk in events(post(stream=True)[2]))


def test_a_stream_in_the_dialect_of_responses(server: ModelServer, post: Post) -> None:
    server.reply = Behaviour(text=TEXT, finish="length")
    found = events(post(PATHS["responses"], stream=True)[2])
    deltas = [event["delta"] for event in found if event["type"] == "response.output_text.delta"]
    assert "".join(deltas) == TEXT
    assert (found[-1]["type"], found[-1]["response"]["usage"]["input_tokens"]) == ("response.incomplete", 7)


def test_a_stream_in_anthropics_dialect(server: ModelServer, post: Post) -> None:
    server.reply = Behaviour(text=TEXT, usage=USAGE)
    found = events(post(PATHS["anthropic"], stream=True)[2])
    deltas = [event["delta"]["text"] for event in found if event["type"] == "content_block_delta"]
    assert "".join(deltas) == TEXT
    assert found[0]["message"]["usage"]["input_tokens"] == 50
    assert found[-2]["usage"] == {"output_tokens": 50}
    assert [event["type"] for event in found[-2:]] == ["message_delta", "message_stop"]


def test_a_function_says_what_to_do_with_each_request(server: ModelServer, post: Post) -> None:
    def reply(seen: Seen) -> Behaviour:
        return Behaviour(text=f"{seen.number}: {1 // (seen.number - 2)}")

    server.reply = reply
    assert json.loads(post()[2])["choices"][0]["message"]["content"] == "1: -1"
    status, _, body = post()
    assert (status, b"ZeroDivisionError" in body) == (500, True)


# --- faults and counts ---------------------------------------------------------------------------


def test_a_connection_is_kept_and_counted(server: ModelServer, post: Post) -> None:
    for _ in range(3):
        post()
    assert (server.connections, server.total_connections, server.requests) == (1, 1, 3)
    server.drop_idle()
    assert eventually(lambda: server.connections == 0)


def test_a_client_that_goes_away_is_counted(server: ModelServer) -> None:
    server.reply = Behaviour(fault="hang")
    opened = raw(server)
    assert eventually(lambda: server.in_flight == 1)
    assert server.cancelled == 0
    opened.close()
    assert eventually(lambda: (server.connections, server.in_flight, server.cancelled) == (0, 0, 1))


def test_a_connection_is_closed_without_an_answer(server: ModelServer) -> None:
    server.reply = Behaviour(fault="close")
    assert everything(raw(server)) == b""
    assert eventually(lambda: (server.connections, server.in_flight, server.cancelled) == (0, 0, 0))


def test_half_of_an_answer_is_sent(server: ModelServer) -> None:
    server.reply = Behaviour(fault="half", text="x" * 1000)
    head, _, body = everything(raw(server)).partition(b"\r\n\r\n")
    length = int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0])
    assert (length > 1000, len(body)) == (True, length // 2)


def test_an_answer_stalls_and_is_missed(server: ModelServer) -> None:
    server.reply = Behaviour(fault="stall")
    with raw(server) as opened:
        assert opened.recv(65536).startswith(b"HTTP/1.1 200")
        assert server.in_flight == 1
    assert eventually(lambda: server.cancelled == 1)


def test_a_slow_answer_comes_in_many_pieces(server: ModelServer) -> None:
    server.reply = Behaviour(fault="slow", latency=0.5)
    begun, found = time.monotonic(), []
    with raw(server) as opened:
        while b'"total_tokens":10}}' not in b"".join(found):
            found.append(opened.recv(65536))
    assert time.monotonic() - begun > 0.3
    assert len(found) > 5


def test_garbage_is_no_http(server: ModelServer) -> None:
    server.reply = Behaviour(fault="garbage")
    assert not everything(raw(server)).startswith(b"HTTP")


def test_requests_wait_side_by_side(server: ModelServer) -> None:
    server.reply = Behaviour(latency=0.5)
    opened = [raw(server) for _ in range(20)]
    for one in opened:
        with one:
            assert one.recv(65536).startswith(b"HTTP/1.1 200")
    assert (server.most_in_flight, server.in_flight, server.total_connections) == (20, 0, 20)


def test_leaving_ends_every_connection_and_counts_none_as_cancelled() -> None:
    with ModelServer(Behaviour(fault="hang"), keep=False) as server:
        opened = raw(server)
        assert eventually(lambda: server.in_flight == 1)
    assert everything(opened) == b""
    assert (server.connections, server.cancelled, server.seen, server.requests) == (0, 0, [], 1)


def test_a_port_that_is_taken_is_an_error(server: ModelServer) -> None:
    with pytest.raises(OSError, match="address already in use"), ModelServer(port=server.port):
        pass


# --- a rate --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("retry_after", "name", "least"), [("seconds", "Retry-After", 4), ("ms", "retry-after-ms", 3000)]
)
def test_what_is_beyond_the_rate_is_refused_and_told_when_to_come_back(
    retry_after: Any, name: str, least: int
) -> None:
    with ModelServer(rate=2, window=5, retry_after=retry_after) as server:
        heads = [ask(server) for _ in range(4)]
        assert [head.split()[1] for head in heads] == ["200", "200", "429", "429"]
        assert int(heads[2].split(f"{name}: ")[1].split("\r\n")[0]) >= least
        assert (server.refused, server.early) == (2, 1)


def test_a_server_may_keep_to_itself_when_to_come_back() -> None:
    with ModelServer(rate=1, window=5, retry_after=None) as server:
        heads = [ask(server) for _ in range(3)]
        assert "retry" not in heads[-1].lower()
        assert (server.refused, server.early) == (2, 0)


def test_after_the_window_requests_are_served_again_and_none_was_early() -> None:
    with ModelServer(rate=1, window=0.3, retry_after="ms") as server:
        first, second = ask(server), ask(server)
        time.sleep(0.6)
        assert [head.split()[1] for head in (first, second, ask(server))] == ["200", "429", "200"]
        assert (server.refused, server.early) == (1, 0)


# --- as a process --------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["standard input", "SIGTERM"])
def test_it_runs_as_a_process_until_it_is_told_to_end(end: str) -> None:
    command = [sys.executable, "-W", "error", "-m", "rlm.testing.model_server", "--text", "from afar"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        host, _, path = process.stdout.readline().strip().removeprefix("http://").partition("/")
        connection = http.client.HTTPConnection(host, timeout=20)
        connection.request("POST", f"/{path}/chat/completions", "{}")
        assert b"from afar" in connection.getresponse().read()
        connection.close()
        if end == "SIGTERM":
            process.terminate()
        else:
            process.stdin.close()
        assert process.wait(20) == 0

"""What every client promises, as tests that a package inherits: `ClientSuite`.

Clients that speak HTTP are tested against a `ModelServer` in one of its dialects; those that do
not, with the few tests that need no server.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import json
import logging
import math
import socket
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Set
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import pytest

from .. import hostloop
from ..client import (
    BaseLM,
    Message,
    ModelInfo,
    Reply,
    Request,
    Role,
    SupportsCount,
    SupportsPoolKey,
    SupportsStream,
    Usage,
)
from ..errors import (
    AuthError,
    BadRequest,
    ConnectFailed,
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
from .base import PluginSuite
from .dialects import Behaviour, Dialect, Seen, conversation, reply_id, write_error, write_reply, write_stream

if TYPE_CHECKING:
    from .model_server import ModelServer  # it is a program too, which Python wants to load by itself

Connect = Callable[[str, str], BaseLM]

KEY = "sk-suite-5d1f0c8e2b7a4f96-never-to-be-seen"
"""The key that clients are given."""

PATIENCE = 30.0
"""Seconds within which what must come about does; no test that passes waits for them."""

SHORT = 0.5
"""Seconds after which calls are given up on that wait in vain."""

UNICODE = (
    "\u00e9 \u4e2d\u6587 \u05e2\u05d1 \U0001f469\u200d\U0001f680 "
    "\u2028\u2029\x85 \\ \" ' \x00\x7f\ufeff \r\n\t</s>"
)
"""What gets lost where text is not taken as it is: line ends by Unicode's lights, pairs, joiners, a NUL."""

LONG = "one two three four five six seven eight"
"""Long enough for a stream of several pieces."""


class Names(NamedTuple):
    """What a dialect calls the fields of a request. None: it has no such field."""

    always: Set[str]
    """What may be there although the request says nothing of it."""
    max_tokens: tuple[str, ...]
    stop: str | None
    seed: str | None


NAMES: Mapping[str, Names] = {
    "openai": Names({"model", "messages", "stream"}, ("max_tokens", "max_completion_tokens"), "stop", "seed"),
    "responses": Names(
        {"model", "input", "instructions", "stream", "store"}, ("max_output_tokens",), None, None
    ),
    "anthropic": Names(
        {"model", "messages", "system", "stream", "max_tokens"}, ("max_tokens",), "stop_sequences", None
    ),
}

STATUSES: Mapping[int, tuple[type[ModelError], ...]] = {
    400: (BadRequest,),
    401: (AuthError,),
    402: (QuotaExceeded,),
    403: (AuthError,),
    404: (NotFound,),
    408: (Unavailable, Timeout),
    422: (BadRequest,),
    429: (RateLimited,),
    500: (Unavailable,),
    502: (Unavailable,),
    503: (Unavailable,),
    504: (Unavailable, Timeout),
    529: (Unavailable,),
}
"""Which error a status is, where nothing else is known."""


class Overflow(NamedTuple):
    """How a provider says that a request is too long."""

    dialects: Set[str]
    error: Mapping[str, Any]
    windows: Set[int | None]
    """What may be made of it."""


OVERFLOWS: Mapping[str, Overflow] = {
    "OpenAI": Overflow(
        {"openai"},
        {
            "message": "This model's maximum context length is 8192 tokens. However, your messages "
            "resulted in 9001 tokens. Please reduce the length of the messages.",
            "type": "invalid_request_error",
            "param": "messages",
            "code": "context_length_exceeded",
        },
        {8192, None},
    ),
    "OpenAI's responses": Overflow(
        {"responses"},
        {
            "message": "Your input exceeds the context window of this model. Please adjust your input.",
            "type": "invalid_request_error",
            "param": "input",
            "code": "context_length_exceeded",
        },
        {None},
    ),
    "llama.cpp": Overflow(
        {"openai", "responses"},
        {
            "code": 400,
            "message": "request (9001 tokens) exceeds the available context size (4096 tokens), "
            "try increasing it",
            "type": "exceed_context_size_error",
            "n_prompt_tokens": 9001,
            "n_ctx": 4096,
        },
        {4096},
    ),
    "Anthropic": Overflow(
        {"anthropic"},
        {"type": "invalid_request_error", "message": "prompt is too long: 200001 tokens > 200000 maximum"},
        {200_000, None},
    ),
}

HTML = b"<!doctype html><html><body><h1>Welcome to the proxy</h1></body></html>"

NO_REPLIES: Mapping[str, Behaviour] = {
    "nothing": Behaviour(body=b""),
    "broken off": Behaviour(body=b'{"id": "x", "choices": [{"mess'),
    "bytes": Behaviour(body=b"\x00\xff\xfe\x80"),
    "a page": Behaviour(body=HTML, content_type="text/html"),
    "a page that is called JSON": Behaviour(body=HTML),
    "no HTTP": Behaviour(fault="garbage"),
    "not encoded as it says": Behaviour(body=b"plain", headers={"Content-Encoding": "gzip"}),
    "a list": Behaviour(body=b"[]"),
    "null": Behaviour(body=b"null"),
    "a number": Behaviour(body=b"5"),
    "a string": Behaviour(body=b'"choices"'),
    "an empty object": Behaviour(body=b"{}"),
}
"""Answers with the status 200 that are no replies in any dialect."""

SHAPES: Mapping[str, list[Any]] = {
    "openai": [
        {"choices": None},
        {"choices": []},
        {"choices": {}},
        {"choices": "x"},
        {"choices": [None]},
        {"choices": [{}]},
        {"choices": [{"message": None}]},
        {"choices": [{"message": "x"}]},
        {"choices": [{"message": {"content": 5}}]},
    ],
    "responses": [
        {"output": None},
        {"output": {}},
        {"output": "x"},
        {"output": [None]},
        {"output": [{"type": "message", "content": 5}]},
        {"output": [{"type": "message", "content": [{"type": "output_text", "text": 5}]}]},
    ],
    "anthropic": [
        {"content": None},
        {"content": {}},
        {"content": "x"},
        {"content": [None]},
        {"content": [{"type": "text", "text": 5}]},
        {"content": [{"type": "text"}]},
    ],
}
"""JSON that resembles a reply, and is none."""

FAULTS: Mapping[str, Behaviour] = {
    "no answer": Behaviour(fault="close"),
    "half an answer": Behaviour(fault="half"),
    "garbage": Behaviour(fault="garbage"),
    "a page": NO_REPLIES["a page"],
}

LEAKS: Mapping[str, Behaviour] = {
    "a message": Behaviour(status=401, code="invalid_api_key", message=f"Incorrect API key provided: {KEY}."),
    "a page of an error": Behaviour(status=403, body=f"<p>{KEY} is unknown</p>".encode()),
    "an overloaded server's message": Behaviour(status=503, message=f"no room for {KEY}"),
    "a page": Behaviour(body=f"<html>Bearer {KEY}".encode(), content_type="text/html"),
    "no reply": Behaviour(body=json.dumps({"key": KEY}).encode()),
    "no answer": Behaviour(fault="close"),
    "half an answer": Behaviour(fault="half"),
    "garbage": Behaviour(fault="garbage"),
    "a hanging server": Behaviour(fault="hang"),
}
"""What may tempt a client to say its key; some servers echo it."""


def ask(*texts: str, **fields: Any) -> Request:
    """A request of the user's, turn by turn."""
    roles: tuple[Role, Role] = ("user", "assistant")
    turns = enumerate(texts or ("hello",))
    return Request(tuple(Message(roles[i % 2], text) for i, text in turns), **fields)


async def soon(condition: Callable[[], bool], otherwise: str) -> None:
    """Wait until ``condition`` comes true, within a generous bound."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, otherwise
        await asyncio.sleep(0.01)


async def reply_to(client: BaseLM, request: Request | None = None) -> Reply:
    """A call that must succeed, within a generous time."""
    async with asyncio.timeout(PATIENCE):
        return await client.complete(request or ask())


async def text_of(client: BaseLM, request: Request | None = None) -> str:
    """What a call that must succeed says."""
    return (await reply_to(client, request)).text


async def failure(client: BaseLM, request: Request | None = None) -> ModelError:
    """How a call fails that must fail, within a generous time."""
    with pytest.raises(ModelError) as caught:
        await reply_to(client, request)
    return caught.value


async def streamed(client: SupportsStream, request: Request | None = None) -> tuple[list[str], Reply]:
    """The pieces and the reply of a stream that must succeed."""
    items = []
    async with asyncio.timeout(PATIENCE):
        async for item in client.stream(request or ask()):
            items.append(item)
    assert items, "a stream ends with the reply"
    *texts, reply = items
    assert isinstance(reply, Reply), f"a stream ends with the reply, not with {reply!r}"
    assert [text for text in texts if type(text) is not str] == []
    pieces = [text for text in texts if isinstance(text, str)]
    assert "".join(pieces) == reply.text
    return pieces, reply


async def stream_failure(client: SupportsStream, request: Request | None = None) -> ModelError:
    """How a stream fails that must fail."""
    with pytest.raises(ModelError) as caught:
        await streamed(client, request)
    return caught.value


async def cancelled(task: asyncio.Task[Any]) -> None:
    """Cancel a task, which must then end."""
    task.cancel()
    _, waiting = await asyncio.wait([task], timeout=PATIENCE)
    assert not waiting, "it goes on although it was cancelled"
    assert task.cancelled(), "it was cancelled, and ended otherwise"


def told(error: BaseException | None) -> str:
    """Everything that an error says, and the errors that show below it."""
    said = ["".join(traceback.format_exception(error))] if error is not None else []
    while error is not None:
        said.append(f"{error} {error!r} {error.args!r} {vars(error)!r}")
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "\n".join(said)


class ClientTests(PluginSuite):
    """A client's declarations, and a client for every test that wants one."""

    subject = "connect"

    speaks: ClassVar[Dialect | None] = None
    """Which of the server's dialects it speaks; None is for one that does not speak HTTP."""

    other_model: ClassVar[str] = "another-model"
    """A model that is not the client's own, by a name that a request may use."""

    always_sent: ClassVar[Set[str]] = frozenset()
    """Fields of the provider's own that every request has, whatever it asks for."""

    @pytest.fixture
    def connect(self) -> Connect:
        """How to make a client, as a function of a URL that ends in ``/v1`` and a key.

        The one fixture to define. Both are empty for a client that does not speak HTTP.
        """
        raise NotImplementedError("define a fixture `connect` that returns a function of a URL and a key")

    @pytest.fixture
    def server(self) -> Iterator[ModelServer]:
        """Where the client calls. Tests that use it are for clients that speak HTTP."""
        from .model_server import ModelServer

        if self.speaks is None:
            pytest.skip("it does not speak HTTP")
        with ModelServer() as running:
            yield running

    @pytest.fixture
    def connected(self, connect: Connect) -> Iterator[Callable[[str], BaseLM]]:
        """Makes clients of a URL, on the core's loop, and closes them."""

        async def make(url: str) -> BaseLM:
            return connect(url, KEY if url else "")

        with contextlib.ExitStack() as stack:

            def new(url: str) -> BaseLM:
                client = hostloop.run(make(url))
                stack.callback(lambda: hostloop.run(client.aclose()))
                return client

            yield new

    @pytest.fixture
    def client(self, request: pytest.FixtureRequest, connected: Callable[[str], BaseLM]) -> BaseLM:
        """A client of the server."""
        if self.speaks is None:
            return connected("")
        server: ModelServer = request.getfixturevalue("server")
        client = connected(server.url)
        server.models = [client.model_name]
        return client

    @pytest.fixture
    def streaming(self, client: BaseLM) -> SupportsStream:
        """A client that streams."""
        if not isinstance(client, SupportsStream):
            pytest.skip("it does not stream")
        return client

    @pytest.fixture
    def unconnected(self, server: ModelServer, connected: Callable[[str], BaseLM]) -> BaseLM:
        """A client of an address where nothing listens. That there is a server says that it speaks HTTP."""
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            port = closed.getsockname()[1]
        return connected(f"http://127.0.0.1:{port}/v1")

    @property
    def names(self) -> Names:
        """What its dialect calls the fields of a request."""
        assert self.speaks is not None
        return NAMES[self.speaks]

    def field(self, name: str | None, client: BaseLM, feature: Any) -> str:
        """A field's name, if the dialect has it and the client does not say that the model lacks it."""
        if name is None:
            pytest.skip(f"the dialect has no {feature}")
        supports = client.info(client.model_name).supports
        if supports is not None and feature not in supports:
            pytest.skip(f"not among what the model supports: {feature}")
        return name


class Basics(ClientTests):
    """What holds of every client, whether it speaks HTTP or not."""

    async def test_a_reply_is_a_reply_with_text_and_usage(self, client: BaseLM) -> None:
        reply = await reply_to(client)
        assert isinstance(reply, Reply)
        assert type(reply.text) is str
        assert isinstance(reply.usage, Usage)
        assert reply.finish in ("stop", "length", "filter", "other")

    async def test_calls_side_by_side_are_each_answered(self, client: BaseLM) -> None:
        async with asyncio.timeout(PATIENCE):
            replies = await asyncio.gather(*(client.complete(ask(f"call {i}")) for i in range(50)))
        assert [type(reply.text) for reply in replies] == [str] * 50

    async def test_a_cancelled_call_ends_and_the_next_is_answered(self, client: BaseLM) -> None:
        task = asyncio.create_task(client.complete(ask()))
        await asyncio.sleep(0)
        task.cancel()
        _, waiting = await asyncio.wait([task], timeout=PATIENCE)
        assert not waiting, "it goes on although it was cancelled"
        assert task.cancelled() or task.exception() is None
        assert type(await text_of(client)) is str

    async def test_closing_twice_is_closing(self, client: BaseLM) -> None:
        await reply_to(client)
        await client.aclose()
        await client.aclose()

    async def test_a_client_that_made_no_call_can_be_closed(self, client: BaseLM) -> None:
        await client.aclose()

    async def test_it_says_what_it_knows_of_any_model(self, client: BaseLM) -> None:
        assert type(client.model_name) is str
        for model in (client.model_name, self.other_model, "", "a model / of nobody's"):
            assert isinstance(client.info(model), ModelInfo)

    async def test_what_shows_of_it_holds_no_prompt(self, client: BaseLM) -> None:
        await reply_to(client, ask("what the user wants nobody to know"))
        assert "wants nobody to know" not in f"{client!r} {client}"

    async def test_preparing_again_is_safe_and_says_a_sentence_or_nothing(self, client: BaseLM) -> None:
        for _ in range(3):
            said = await client.prepare()
            assert said is None or type(said) is str

    async def test_models_that_share_limits_have_a_key(self, client: BaseLM) -> None:
        if not isinstance(client, SupportsPoolKey):
            pytest.skip("it has no keys of pools")
        keys = {client.pool_key(client.model_name) for _ in range(2)}
        assert {type(key) for key in keys} == {str}
        assert len(keys) == 1
        assert KEY not in f"{keys} {client.pool_key(self.other_model)}"

    async def test_tokens_are_counted_and_it_says_whether_exactly(self, client: BaseLM) -> None:
        if not isinstance(client, SupportsCount):
            pytest.skip("it does not count")
        tokens, exact = await client.count(ask("a few words to count"))
        assert (type(tokens), type(exact)) == (int, bool)
        assert tokens > 0

    async def test_a_stream_is_the_reply_in_pieces(self, streaming: SupportsStream) -> None:
        pieces, reply = await streamed(streaming)
        assert bool(pieces) == bool(reply.text)


class Saying(ClientTests):
    """What arrives at the provider, and what comes back."""

    async def test_a_reply_is_the_providers_text(self, client: BaseLM, server: ModelServer) -> None:
        server.reply = Behaviour(text="as it was said")
        reply = await reply_to(client)
        assert (reply.text, reply.finish) == ("as it was said", "stop")
        assert reply.id in (None, reply_id(server.seen[0]))

    async def test_an_empty_reply_is_an_empty_text(self, client: BaseLM, server: ModelServer) -> None:
        server.reply = Behaviour(text="")
        assert await text_of(client) == ""

    @pytest.mark.parametrize("text", [UNICODE, UNICODE * 5000], ids=["short", "200 KB"])
    async def test_text_arrives_exactly_both_ways(
        self, client: BaseLM, server: ModelServer, text: str
    ) -> None:
        server.reply = lambda seen: Behaviour(text=seen.text)
        assert await text_of(client, ask(text)) == text
        assert server.seen[0].text == text

    async def test_a_reply_of_ten_megabytes_is_whole(self, client: BaseLM, server: ModelServer) -> None:
        text = "0123456789" * 1_000_000
        server.reply = Behaviour(text=text)
        assert await text_of(client) == text

    async def test_a_request_of_five_megabytes_arrives_whole(
        self, client: BaseLM, server: ModelServer
    ) -> None:
        text = "0123456789" * 500_000
        await reply_to(client, ask(text))
        assert server.seen[0].text == text

    async def test_the_key_arrives(self, client: BaseLM, server: ModelServer) -> None:
        await reply_to(client)
        assert any(KEY in value for value in server.seen[0].headers.values())

    async def test_messages_arrive_in_order_with_their_roles(
        self, client: BaseLM, server: ModelServer
    ) -> None:
        turns = ask("one", "two", "three", "four", "five").messages
        await reply_to(client, Request((Message("system", "be brief"), *turns)))
        arrived = [
            ("system" if role == "developer" else role, text)
            for role, text in conversation(server.seen[0].body)
        ]
        said = [
            ("user", "one"),
            ("assistant", "two"),
            ("user", "three"),
            ("assistant", "four"),
            ("user", "five"),
        ]
        assert arrived == [("system", "be brief"), *said]

    async def test_a_system_message_is_where_the_dialect_has_it(
        self, client: BaseLM, server: ModelServer
    ) -> None:
        await reply_to(client, Request((Message("system", "be brief"), Message("user", "hello"))))
        body = server.seen[0].body
        roles = [message["role"] for message in body.get("messages", []) if isinstance(message, dict)]
        if self.speaks == "anthropic":
            assert ("system" in body, roles) == (True, ["user"])
        elif self.speaks == "openai":
            assert roles in (["system", "user"], ["developer", "user"])

    async def test_a_message_worth_keeping_arrives_like_any_other(
        self, client: BaseLM, server: ModelServer
    ) -> None:
        kept = (Message("system", "be brief"), Message("user", "hello"))
        await reply_to(client, Request(kept, cache=True))
        assert [text for _, text in conversation(server.seen[0].body)] == ["be brief", "hello"]

    async def test_the_model_is_the_requests_or_else_the_clients_own(
        self, client: BaseLM, server: ModelServer
    ) -> None:
        """A client may use the part before a slash to tell providers apart."""
        await reply_to(client)
        await reply_to(client, ask(model=self.other_model))
        asked = [str(seen.body.get("model")).rpartition("/")[2] for seen in server.seen]
        assert asked == [client.model_name.rpartition("/")[2], self.other_model.rpartition("/")[2]]

    async def test_nothing_is_sent_that_was_not_asked_for(self, client: BaseLM, server: ModelServer) -> None:
        await reply_to(client)
        assert set(server.seen[0].body) - self.names.always - self.always_sent == set()

    async def test_a_limit_of_tokens_arrives(self, client: BaseLM, server: ModelServer) -> None:
        await reply_to(client, ask(max_tokens=77))
        body = server.seen[0].body
        assert [body[name] for name in self.names.max_tokens if name in body] == [77]

    @pytest.mark.parametrize("value", [0.0, 0.25])
    async def test_a_temperature_arrives(self, client: BaseLM, server: ModelServer, value: float) -> None:
        name = self.field("temperature", client, "temperature")
        await reply_to(client, ask(temperature=value))
        assert server.seen[0].body.get(name) == value

    async def test_texts_to_stop_at_arrive(self, client: BaseLM, server: ModelServer) -> None:
        name = self.field(self.names.stop, client, "stop")
        await reply_to(client, ask(stop=("END", "\n\n")))
        assert server.seen[0].body.get(name) == ["END", "\n\n"]

    async def test_a_seed_arrives(self, client: BaseLM, server: ModelServer) -> None:
        name = self.field(self.names.seed, client, "seed")
        await reply_to(client, ask(seed=0))
        assert server.seen[0].body.get(name) == 0

    async def test_fields_of_the_providers_own_arrive_as_they_are(
        self, client: BaseLM, server: ModelServer
    ) -> None:
        extra = {"service_tier": "auto", "x_vendor": {"a": [1, None, "é"]}}
        await reply_to(client, ask(extra=extra))
        assert {name: server.seen[0].body.get(name) for name in extra} == extra

    # -- usage and finish

    async def test_input_includes_what_was_cached(self, client: BaseLM, server: ModelServer) -> None:
        server.reply = Behaviour(usage=Usage(100, 50, cached_tokens=30))
        usage = (await reply_to(client)).usage
        assert (usage.input_tokens, usage.output_tokens, usage.cached_tokens) == (100, 50, 30)
        assert not usage.estimated

    async def test_output_includes_what_was_thought(self, client: BaseLM, server: ModelServer) -> None:
        server.reply = Behaviour(usage=Usage(100, 50, reasoning_tokens=40))
        usage = (await reply_to(client)).usage
        thought = 0 if self.speaks == "anthropic" else 40  # which says no such thing
        assert (usage.output_tokens, usage.reasoning_tokens) == (50, thought)

    async def test_input_includes_what_was_put_into_the_cache(
        self, client: BaseLM, server: ModelServer
    ) -> None:
        if self.speaks != "anthropic":
            pytest.skip("the dialect does not say what is put into the cache")
        server.reply = Behaviour(usage=Usage(100, 50, cached_tokens=30, cache_write_tokens=20))
        usage = (await reply_to(client)).usage
        assert (usage.input_tokens, usage.cached_tokens, usage.cache_write_tokens) == (100, 30, 20)

    async def test_a_cost_that_nobody_knows_is_none(self, client: BaseLM, server: ModelServer) -> None:
        assert (await reply_to(client)).usage.cost is None

    async def test_a_reply_without_usage_is_a_reply(self, client: BaseLM, server: ModelServer) -> None:
        server.reply = Behaviour(usage=None)
        reply = await reply_to(client)
        assert reply.text == "ok"
        assert reply.usage.estimated or reply.usage == Usage()

    @pytest.mark.parametrize(
        "usage",
        [None, {}, "none", {"prompt_tokens": None, "input_tokens": None, "output_tokens": "5"},
         {"prompt_tokens_details": None, "input_tokens_details": None, "cache_read_input_tokens": None}],
        ids=["null", "empty", "a string", "nulls", "no details"],
    )  # fmt: skip
    async def test_usage_with_holes_is_no_failure(
        self, client: BaseLM, server: ModelServer, usage: Any
    ) -> None:
        def reply(seen: Seen) -> Behaviour:
            whole = write_reply(Behaviour(), seen)
            return Behaviour(body=json.dumps({**whole, "usage": usage}).encode())

        server.reply = reply
        found = await reply_to(client)
        assert found.text == "ok"
        assert type(found.usage.input_tokens) is type(found.usage.cached_tokens) is int

    @pytest.mark.parametrize("finish", ["stop", "length", "filter"])
    async def test_how_a_reply_ended_is_told(self, client: BaseLM, server: ModelServer, finish: Any) -> None:
        server.reply = Behaviour(text="so far", finish=finish)
        reply = await reply_to(client)
        assert (reply.finish, reply.text) == (finish, "so far")


class Refusals(ClientTests):
    """What a provider refuses, and which error that is."""

    @pytest.mark.parametrize("status", STATUSES)
    async def test_a_status_is_its_error(self, client: BaseLM, server: ModelServer, status: int) -> None:
        server.reply = Behaviour(status=status, code="a_code", message="it is so")
        error = await failure(client)
        assert type(error) in STATUSES[status]
        assert (error.status, error.code) == (status, "a_code")
        assert "it is so" in str(error)

    @pytest.mark.parametrize("status", [400, 429, 503])
    async def test_the_providers_name_for_the_call_is_on_the_error(
        self, client: BaseLM, server: ModelServer, status: int
    ) -> None:
        server.reply = Behaviour(status=status)
        assert (await failure(client)).request_id == "req-1"

    @pytest.mark.parametrize("status", [401, 404, 500, 503])
    @pytest.mark.parametrize(
        "body", [b"", HTML, b"[]", b'"no"', b'{"error": "no"}', b'{"error": null}', b"\xff"]
    )
    async def test_an_error_whose_body_says_nothing_is_told_by_its_status(
        self, client: BaseLM, server: ModelServer, status: int, body: bytes
    ) -> None:
        server.reply = Behaviour(status=status, body=body, content_type="text/html")
        error = await failure(client)
        assert type(error) in STATUSES[status]
        assert error.status == status

    @pytest.mark.parametrize("status", [400, 413])
    @pytest.mark.parametrize("provider", OVERFLOWS)
    async def test_a_request_that_is_too_long_is_a_context_overflow(
        self, client: BaseLM, server: ModelServer, provider: str, status: int
    ) -> None:
        overflow = OVERFLOWS[provider]
        if self.speaks not in overflow.dialects:
            pytest.skip("said in another dialect")
        shape = {"type": "error"} if self.speaks == "anthropic" else {}
        server.reply = Behaviour(status=status, body=json.dumps({**shape, "error": overflow.error}).encode())
        error = await failure(client)
        assert isinstance(error, ContextOverflow)
        assert error.window in overflow.windows
        assert error.code is None or type(error.code) is str

    async def test_a_request_of_too_many_bytes_is_a_bad_request(
        self, client: BaseLM, server: ModelServer
    ) -> None:
        server.reply = Behaviour(status=413, message="Request exceeds the maximum size")
        error = await failure(client)
        assert isinstance(error, BadRequest)
        assert not error.retryable

    async def test_a_quota_that_is_used_up_is_no_rate(self, client: BaseLM, server: ModelServer) -> None:
        if self.speaks == "anthropic":
            pytest.skip("the dialect says so with the status 402")
        server.reply = Behaviour(
            status=429, code="insufficient_quota", message="You exceeded your current quota, check your plan"
        )
        assert type(await failure(client)) is QuotaExceeded

    @pytest.mark.parametrize("status", [429, 503])
    @pytest.mark.parametrize(
        ("name", "value", "seconds"),
        [("Retry-After", "7", 7.0), ("retry-after-ms", "250", 0.25), ("Retry-After", "0", 0.0)],
    )
    async def test_when_to_try_again_is_told_in_seconds(
        self, client: BaseLM, server: ModelServer, name: str, value: str, seconds: float, status: int
    ) -> None:
        server.reply = Behaviour(status=status, headers={name: value})
        error = await failure(client)
        assert isinstance(error, RetryableError)
        assert error.retry_after == pytest.approx(seconds)

    async def test_a_date_on_which_to_try_again_is_told_in_seconds(
        self, client: BaseLM, server: ModelServer
    ) -> None:
        date = email.utils.formatdate(time.time() + 100, usegmt=True)
        server.reply = Behaviour(status=429, headers={"Retry-After": date})
        error = await failure(client)
        assert isinstance(error, RateLimited)
        assert error.retry_after is not None
        assert 60 < error.retry_after <= 101

    @pytest.mark.parametrize(
        "value", ["Mon, 01 Jan 2001 00:00:00 GMT", "soon", "", "nan", "inf", "-5", "1e999"]
    )
    @pytest.mark.parametrize("name", ["Retry-After", "retry-after-ms"])
    async def test_a_time_to_try_again_that_makes_no_sense_is_none_or_now(
        self, client: BaseLM, server: ModelServer, name: str, value: str
    ) -> None:
        server.reply = Behaviour(status=429, headers={name: value})
        error = await failure(client)
        assert isinstance(error, RateLimited)
        assert error.retry_after is None or (math.isfinite(error.retry_after) and error.retry_after >= 0)

    @pytest.mark.parametrize("status", STATUSES)
    async def test_a_refusal_is_one_attempt(self, client: BaseLM, server: ModelServer, status: int) -> None:
        server.reply = Behaviour(status=status, headers={"retry-after-ms": "1"})
        await failure(client)
        assert server.requests == 1


class Breakdowns(ClientTests):
    """What goes wrong on the way, and what it costs: one attempt, and nothing afterwards."""

    async def test_a_connection_that_is_refused_sent_nothing(self, unconnected: BaseLM) -> None:
        error = await failure(unconnected)
        assert type(error) is ConnectFailed
        assert (error.sent, error.retryable, error.status) == (False, True, None)

    async def test_no_answer_may_have_been_billed(self, client: BaseLM, server: ModelServer) -> None:
        server.reply = Behaviour(fault="close")
        error = await failure(client)
        assert (error.retryable, error.sent) == (True, True)

    async def test_half_an_answer_is_a_protocol_error(self, client: BaseLM, server: ModelServer) -> None:
        server.reply = Behaviour(fault="half", text=LONG * 100)
        error = await failure(client)
        assert type(error) is ProtocolError
        assert error.sent

    @pytest.mark.parametrize("answer", NO_REPLIES)
    async def test_what_is_no_reply_is_a_protocol_error(
        self, client: BaseLM, server: ModelServer, answer: str
    ) -> None:
        server.reply = NO_REPLIES[answer]
        assert type(await failure(client)) is ProtocolError

    async def test_a_refusal_with_a_status_of_success_is_an_error(
        self, client: BaseLM, server: ModelServer
    ) -> None:
        """As some routers have it; which error is for the client to find out."""
        server.reply = Behaviour(body=b'{"error": {"message": "no model is free", "code": 429}}')
        await failure(client)
        assert server.requests == 1

    @pytest.mark.parametrize("number", range(max(map(len, SHAPES.values()))))
    async def test_what_only_resembles_a_reply_is_a_protocol_error(
        self, client: BaseLM, server: ModelServer, number: int
    ) -> None:
        assert self.speaks is not None
        shapes = SHAPES[self.speaks]
        if number >= len(shapes):
            pytest.skip("another dialect has more")
        server.reply = Behaviour(body=json.dumps(shapes[number]).encode())
        assert type(await failure(client)) is ProtocolError, shapes[number]

    async def test_a_text_that_is_null_is_empty_or_a_protocol_error(
        self, client: BaseLM, server: ModelServer
    ) -> None:
        bodies = {
            "openai": {
                "choices": [{"message": {"role": "assistant", "content": None}, "finish_reason": "stop"}]
            },
            "responses": {"status": "completed", "output": []},
            "anthropic": {"type": "message", "content": [], "stop_reason": "end_turn"},
        }
        assert self.speaks is not None
        server.reply = Behaviour(body=json.dumps(bodies[self.speaks]).encode())
        with contextlib.suppress(ProtocolError):
            assert await text_of(client) == ""

    @pytest.mark.parametrize("fault", FAULTS)
    async def test_a_breakdown_is_one_attempt(self, client: BaseLM, server: ModelServer, fault: str) -> None:
        server.reply = FAULTS[fault]
        await failure(client)
        assert server.requests == 1

    @pytest.mark.parametrize("fault", [*FAULTS, "a refusal"])
    async def test_after_a_failure_calls_are_answered(
        self, client: BaseLM, server: ModelServer, fault: str
    ) -> None:
        server.reply = FAULTS.get(fault, Behaviour(status=503))
        await failure(client)
        server.reply = Behaviour(text="well again")
        assert [await text_of(client) for _ in range(3)] == ["well again"] * 3

    async def test_a_server_that_hangs_is_a_timeout(self, client: BaseLM, server: ModelServer) -> None:
        await self.times_out(client, server, Behaviour(fault="hang"))

    async def test_an_answer_that_stops_coming_is_a_timeout(
        self, client: BaseLM, server: ModelServer
    ) -> None:
        await self.times_out(client, server, Behaviour(fault="stall"))

    async def test_an_answer_that_comes_in_drops_is_a_timeout(
        self, client: BaseLM, server: ModelServer
    ) -> None:
        """A time for the whole attempt, not for each of its parts."""
        await self.times_out(client, server, Behaviour(fault="slow", latency=60))

    async def times_out(self, client: BaseLM, server: ModelServer, behaviour: Behaviour) -> None:
        """A call that must end by its time alone, and end at the server too."""
        server.reply = behaviour
        begun = time.monotonic()
        error = await failure(client, ask(timeout=SHORT))
        assert type(error) is Timeout
        assert SHORT * 0.8 < time.monotonic() - begun < SHORT + 10
        assert (error.sent, server.requests) == (True, 1)
        await soon(lambda: server.connections == 0, "a connection is still open")
        assert server.cancelled == 1
        server.reply = Behaviour()
        assert await text_of(client) == "ok"

    async def test_a_time_that_suffices_changes_nothing(self, client: BaseLM, server: ModelServer) -> None:
        server.reply = Behaviour(latency=0.05)
        assert await text_of(client, ask(timeout=PATIENCE)) == "ok"

    async def test_a_cancelled_call_ends_at_the_server_too(self, client: BaseLM, server: ModelServer) -> None:
        server.reply = Behaviour(fault="hang")
        task = asyncio.create_task(client.complete(ask()))
        await soon(lambda: server.in_flight == 1, "no request arrived")
        await cancelled(task)
        await soon(lambda: server.connections == 0, "a connection is still open")
        assert (server.cancelled, server.requests) == (1, 1)

    async def test_after_cancelled_calls_others_are_answered(
        self, client: BaseLM, server: ModelServer
    ) -> None:
        server.reply = Behaviour(fault="hang")
        for _ in range(5):
            task = asyncio.create_task(client.complete(ask()))
            await soon(lambda: server.in_flight == 1, "no request arrived")
            await cancelled(task)
            await soon(lambda: server.in_flight == 0, "the server still works on it")
        server.reply = Behaviour(text="still here")
        assert await text_of(client) == "still here"

    async def test_a_cancelled_call_disturbs_no_other(self, client: BaseLM, server: ModelServer) -> None:
        server.reply = lambda seen: Behaviour(
            text=seen.text, latency=0.2, fault="hang" if seen.text == "hang" else None
        )
        hanging = asyncio.create_task(client.complete(ask("hang")))
        others = [asyncio.create_task(text_of(client, ask(f"call {i}"))) for i in range(10)]
        await soon(lambda: server.requests == 11, "a request did not arrive")
        await cancelled(hanging)
        assert await asyncio.gather(*others) == [f"call {i}" for i in range(10)]

    async def test_a_redirect_takes_the_key_nowhere_else(self, client: BaseLM, server: ModelServer) -> None:
        from .model_server import ModelServer

        with ModelServer() as other:
            server.reply = lambda seen: Behaviour(
                status=307, headers={"Location": f"http://localhost:{other.port}{seen.path}"}
            )
            with contextlib.suppress(ModelError):
                await reply_to(client)
            assert KEY not in repr(other.seen)


class Connections(ClientTests):
    """Many calls, few connections, and none that are left."""

    async def test_two_hundred_calls_at_once_get_each_their_own_reply(
        self, client: BaseLM, server: ModelServer
    ) -> None:
        """And are made side by side: answered in another order than they were asked in."""
        server.reply = lambda seen: Behaviour(
            text=f"re: {seen.text}", latency=0.1 + seen.number * 7 % 20 / 100
        )
        async with asyncio.timeout(PATIENCE):
            texts = await asyncio.gather(*(text_of(client, ask(f"call {i}")) for i in range(200)))
        assert texts == [f"re: call {i}" for i in range(200)]
        assert server.requests == 200
        assert server.most_in_flight >= 20

    async def test_calls_one_after_the_other_share_a_connection(
        self, client: BaseLM, server: ModelServer
    ) -> None:
        for _ in range(20):
            await reply_to(client)
        assert server.total_connections <= 2

    async def test_refusals_leave_the_connection_usable(self, client: BaseLM, server: ModelServer) -> None:
        server.reply = Behaviour(status=429)
        for _ in range(20):
            await failure(client)
        assert server.total_connections <= 2

    async def test_a_connection_that_the_server_has_closed_costs_no_call(
        self, client: BaseLM, server: ModelServer
    ) -> None:
        for _ in range(3):
            assert await text_of(client) == "ok"
            server.drop_idle()
            await soon(lambda: server.connections == 0, "a connection is still open")
            await asyncio.sleep(0.1)  # the end has been sent; now it has been received, too
        assert await text_of(client) == "ok"

    async def test_after_closing_no_connection_is_open(self, client: BaseLM, server: ModelServer) -> None:
        await asyncio.gather(*(reply_to(client) for _ in range(10)))
        await client.aclose()
        await soon(lambda: server.connections == 0, "a connection is still open")
        assert server.cancelled == 0

    async def test_what_it_knows_of_a_model_it_asks_nobody(self, client: BaseLM, server: ModelServer) -> None:
        client.info(client.model_name)
        client.info(self.other_model)
        await asyncio.sleep(0.05)
        assert server.total_connections == 0

    async def test_what_was_found_out_in_preparation_is_kept(
        self, client: BaseLM, server: ModelServer
    ) -> None:
        await client.prepare()
        asked = server.requests, server.asides
        for _ in range(3):
            await client.prepare()
        assert (server.requests, server.asides) == asked


class Streams(ClientTests):
    """Replies that are handed over while they are written."""

    @pytest.mark.parametrize("finish", ["stop", "length", "filter"])
    async def test_a_stream_ends_with_what_a_whole_reply_says(
        self, streaming: SupportsStream, server: ModelServer, finish: Any
    ) -> None:
        usage = Usage(100, 50, cached_tokens=30)
        server.reply = Behaviour(text=LONG, finish=finish, usage=usage)
        pieces, reply = await streamed(streaming)
        assert len(pieces) > 1
        assert (reply.text, reply.finish) == (LONG, finish)
        found = reply.usage
        assert (found.input_tokens, found.output_tokens, found.cached_tokens) == (100, 50, 30)

    async def test_a_stream_without_usage_is_a_reply(
        self, streaming: SupportsStream, server: ModelServer
    ) -> None:
        server.reply = Behaviour(text=LONG, usage=None)
        _, reply = await streamed(streaming)
        assert reply.text == LONG
        assert reply.usage.estimated or reply.usage == Usage()

    async def test_a_streams_text_arrives_exactly(
        self, streaming: SupportsStream, server: ModelServer
    ) -> None:
        """Whatever pieces of a character or of a line the network makes."""
        text = UNICODE * 10
        server.reply = Behaviour(text=text, fault="slow", latency=1.0)
        assert (await streamed(streaming))[1].text == text

    async def test_an_empty_stream_is_an_empty_text(
        self, streaming: SupportsStream, server: ModelServer
    ) -> None:
        server.reply = Behaviour(text="")
        assert (await streamed(streaming))[1].text == ""

    async def test_lines_of_a_stream_may_end_with_two_characters(
        self, streaming: SupportsStream, server: ModelServer
    ) -> None:
        server.reply = self.events(lambda events: [event.replace(b"\n", b"\r\n") for event in events])
        assert (await streamed(streaming))[1].text == LONG

    async def test_a_piece_is_handed_over_before_the_rest_is_there(
        self, streaming: SupportsStream, server: ModelServer
    ) -> None:
        server.reply = Behaviour(text=LONG, fault="stall")
        stream = streaming.stream(ask())
        async with asyncio.timeout(PATIENCE):
            first = await anext(stream)
        assert type(first) is str
        assert LONG.startswith(first)
        assert server.in_flight == 1
        await self.left(stream)

    async def test_a_stream_that_is_left_ends_at_the_server_too(
        self, streaming: SupportsStream, server: ModelServer
    ) -> None:
        server.reply = Behaviour(text=LONG, fault="stall")
        stream = streaming.stream(ask())
        async with asyncio.timeout(PATIENCE):
            await anext(stream)
        await self.left(stream)
        await soon(lambda: server.connections == 0, "a connection is still open")
        assert server.cancelled == 1

    async def test_a_cancelled_stream_ends_at_the_server_too(
        self, streaming: SupportsStream, client: BaseLM, server: ModelServer
    ) -> None:
        server.reply = Behaviour(text=LONG, fault="stall")
        task = asyncio.create_task(streamed(streaming))
        await soon(lambda: server.in_flight == 1, "no request arrived")
        await asyncio.sleep(0.1)  # so that it has begun to arrive
        await cancelled(task)
        await soon(lambda: server.connections == 0, "a connection is still open")
        assert server.cancelled == 1
        server.reply = Behaviour()
        assert await text_of(client) == "ok"

    @pytest.mark.parametrize("status", STATUSES)
    async def test_a_status_before_a_stream_is_its_error(
        self, streaming: SupportsStream, server: ModelServer, status: int
    ) -> None:
        server.reply = Behaviour(status=status, code="a_code", headers={"Retry-After": "7"})
        error = await stream_failure(streaming)
        assert type(error) in STATUSES[status]
        assert (error.status, error.code, error.request_id) == (status, "a_code", "req-1")
        assert not isinstance(error, RateLimited) or error.retry_after == 7
        assert server.requests == 1

    async def test_a_stream_that_breaks_off_is_a_protocol_error(
        self, streaming: SupportsStream, server: ModelServer
    ) -> None:
        server.reply = Behaviour(text=LONG, fault="half")
        error = await stream_failure(streaming)
        assert type(error) is ProtocolError
        assert (error.sent, server.requests) == (True, 1)

    async def test_a_stream_that_ends_without_an_end_is_a_protocol_error(
        self, streaming: SupportsStream, server: ModelServer
    ) -> None:
        """As where a proxy loses the connection to the model, and ends its own answer properly."""
        server.reply = self.events(lambda events: events[: len(events) // 2])
        assert type(await stream_failure(streaming)) is ProtocolError

    async def test_an_error_in_the_middle_of_a_stream_is_an_error(
        self, streaming: SupportsStream, server: ModelServer
    ) -> None:
        """Of a kind that is tried again: it was accepted, and then something went wrong there."""
        error = self.error_event()
        server.reply = self.events(lambda events: [*events[: len(events) // 2], error])
        assert isinstance(await stream_failure(streaming), RetryableError)

    @pytest.mark.parametrize(
        "body", [b"", b"data: {no JSON\n\n", b"data: [1]\n\n", b"data: 5\n\n", b"data: \xff\xfe\n\n", HTML],
        ids=["nothing", "no JSON", "a list", "a number", "bytes", "a page"],
    )  # fmt: skip
    async def test_a_stream_of_something_else_is_a_protocol_error(
        self, streaming: SupportsStream, server: ModelServer, body: bytes
    ) -> None:
        server.reply = Behaviour(body=body, content_type="text/event-stream")
        assert type(await stream_failure(streaming)) is ProtocolError

    @pytest.mark.parametrize("fault", ["hang", "stall", "slow"])
    async def test_a_time_is_for_the_whole_of_a_stream(
        self, streaming: SupportsStream, server: ModelServer, fault: Any
    ) -> None:
        server.reply = Behaviour(text=LONG, fault=fault, latency=60 if fault == "slow" else 0)
        begun = time.monotonic()
        assert type(await stream_failure(streaming, ask(timeout=SHORT))) is Timeout
        assert time.monotonic() - begun < SHORT + 10
        await soon(lambda: server.connections == 0, "a connection is still open")

    async def test_a_connection_is_shared_by_streams(
        self, streaming: SupportsStream, server: ModelServer
    ) -> None:
        for _ in range(10):
            await streamed(streaming)
        assert server.total_connections <= 2

    async def test_fifty_streams_at_once_get_each_their_own_reply(
        self, streaming: SupportsStream, server: ModelServer
    ) -> None:
        server.reply = lambda seen: Behaviour(text=f"{seen.text}: {LONG}", fault="slow", latency=0.3)
        async with asyncio.timeout(PATIENCE):
            found = await asyncio.gather(*(streamed(streaming, ask(f"call {i}")) for i in range(50)))
        assert [reply.text for _, reply in found] == [f"call {i}: {LONG}" for i in range(50)]

    def events(self, alter: Callable[[list[bytes]], list[bytes]]) -> Callable[[Seen], Behaviour]:
        """A stream with other events than it would have."""

        def reply(seen: Seen) -> Behaviour:
            events = write_stream(Behaviour(text=LONG), seen)
            return Behaviour(body=b"".join(alter(events)), content_type="text/event-stream")

        return reply

    def error_event(self) -> bytes:
        """How the dialect says, in a stream, that something went wrong."""
        error = write_error(Behaviour(status=529, message="overloaded"), self.speaks or "other")
        if self.speaks == "responses":
            error = {"type": "error", "code": "server_error", "message": "overloaded", "param": None}
        name = b"" if self.speaks == "openai" else b"event: error\n"
        return name + b"data: " + json.dumps(error).encode() + b"\n\n"

    async def left(self, stream: AsyncIterator[str | Reply]) -> None:
        """Leave a stream as whoever has had enough of it does."""
        close = getattr(stream, "aclose", None)
        assert close is not None, "a stream that cannot be closed goes on until it is collected"
        async with asyncio.timeout(PATIENCE):
            await close()


class Secrets(ClientTests):
    """The key goes to the provider, and nowhere else."""

    @pytest.mark.parametrize("leak", LEAKS)
    async def test_the_key_is_in_no_error(
        self, client: BaseLM, server: ModelServer, leak: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG)
        server.reply = LEAKS[leak]
        error = await failure(client, ask(timeout=SHORT if leak == "a hanging server" else None))
        assert KEY not in told(error)
        assert KEY not in self.logged(caplog)

    async def test_the_key_is_in_no_error_of_a_connection(self, unconnected: BaseLM) -> None:
        assert KEY not in told(await failure(unconnected))

    @pytest.mark.parametrize("leak", ["a message", "no reply", "half an answer", "garbage"])
    async def test_the_key_is_in_no_error_of_a_stream(
        self, streaming: SupportsStream, server: ModelServer, leak: str
    ) -> None:
        server.reply = LEAKS[leak]
        assert KEY not in told(await stream_failure(streaming))

    async def test_the_key_is_in_nothing_that_shows_of_a_client(
        self, client: BaseLM, server: ModelServer
    ) -> None:
        def shown() -> str:
            return f"{client!r} {client} {getattr(client, '__dict__', None)!r}"

        for _ in range(2):
            assert KEY not in shown()
            await reply_to(client)
        await client.aclose()
        assert KEY not in shown()

    async def test_the_key_is_in_no_log(
        self, client: BaseLM, server: ModelServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG)
        await reply_to(client)
        await client.prepare()
        await client.aclose()
        assert KEY not in self.logged(caplog)

    async def test_the_key_is_no_part_of_a_reply(self, client: BaseLM, server: ModelServer) -> None:
        assert KEY not in repr(await reply_to(client))

    def logged(self, caplog: pytest.LogCaptureFixture) -> str:
        """Everything that was logged."""
        return "\n".join(f"{record.getMessage()} {vars(record)!r}" for record in caplog.records)


class ClientSuite(Basics, Saying, Refusals, Breakdowns, Connections, Streams, Secrets):
    """Everything. Inherit it as ``TestSomething``, set ``speaks``, and define the fixture ``connect``."""

"""Facts about the clients for OpenAI's API: what they promise, where they call, and what they send there."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, ClassVar

import msgspec
import pytest
from aimock_support import Aimock
from llama_support import LlamaServer

import rlm_openai.auto
from rlm import plugins
from rlm.client import BaseLM, Message, ModelInfo, Price, Reply, Request, SupportsStream, Usage
from rlm.errors import (
    AuthError,
    ConfigError,
    ConnectFailed,
    ContentFiltered,
    ContextOverflow,
    ModelError,
    ProtocolError,
    QuotaExceeded,
    RateLimited,
    Unavailable,
)
from rlm.secrets import Secret
from rlm.testing import ClientSuite
from rlm.testing.clients import Connect
from rlm.testing.dialects import Behaviour
from rlm.testing.model_server import ModelServer
from rlm_openai import VLLM, AzureOpenAILM, GeminiLM, OpenAILM, OpenRouterLM, PortkeyLM, VercelLM
from rlm_openai.auto import AutoLM
from rlm_scripted import ScriptedLM

KEY = "sk-test-2b7d41c98e-not-to-be-seen"

VARIABLES = (
    "OPENAI_API_KEY", "OPENAI_BASE_URL", "LLM_API_KEY", "LLM_BASE_URL", "VLLM_API_KEY", "VLLM_BASE_URL",
    "OPENROUTER_API_KEY", "AI_GATEWAY_API_KEY", "VERCEL_OIDC_TOKEN", "PORTKEY_API_KEY", "GEMINI_API_KEY",
    "GOOGLE_API_KEY", "AZURE_OPENAI_API_KEY", "AZURE_OPENAI_ENDPOINT", "AZURE_OPENAI_DEPLOYMENT",
    "AZURE_OPENAI_API_VERSION", "ANTHROPIC_API_KEY", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY",
)  # fmt: skip


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of whoever runs the tests is found, or sent anywhere."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


class TestChatSuite(ClientSuite):
    speaks = "openai"

    @pytest.fixture
    def connect(self) -> Connect:
        return lambda url, key: OpenAILM("test-model", base_url=url, api_key=key)


class TestResponsesSuite(ClientSuite):
    speaks = "responses"

    @pytest.fixture
    def connect(self) -> Connect:
        return lambda url, key: OpenAILM("test-model", base_url=url, api_key=key, api="responses")


@pytest.fixture
def server() -> Iterator[ModelServer]:
    with ModelServer() as running:
        yield running


@pytest.fixture
def dead() -> int:
    """A port where nothing listens."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        return int(closed.getsockname()[1])


Make = Callable[..., Any]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    """Makes clients, and closes them."""
    made: list[BaseLM] = []

    def new(kind: Callable[..., BaseLM], *args: Any, **settings: Any) -> BaseLM:
        made.append(kind(*args, **settings))
        return made[-1]

    yield new
    for client in made:
        await client.aclose()


def ask(text: str = "hello", **fields: Any) -> Request:
    return Request((Message("user", text),), **fields)


async def streamed(client: SupportsStream, request: Request) -> tuple[list[str | Reply], Reply]:
    *pieces, reply = [piece async for piece in client.stream(request)]
    assert isinstance(reply, Reply)
    return pieces, reply


# --- presets -----------------------------------------------------------------------------------

PRESETS = {
    "openai": (OpenAILM, "https://api.openai.com/v1", ("OPENAI_API_KEY", "LLM_API_KEY")),
    "openrouter": (OpenRouterLM, "https://openrouter.ai/api/v1", ("OPENROUTER_API_KEY",)),
    "vercel": (VercelLM, "https://ai-gateway.vercel.sh/v1", ("AI_GATEWAY_API_KEY", "VERCEL_OIDC_TOKEN")),
    "portkey": (PortkeyLM, "https://api.portkey.ai/v1", ("PORTKEY_API_KEY",)),
    "gemini": (
        GeminiLM,
        "https://generativelanguage.googleapis.com/v1beta/openai",
        ("GEMINI_API_KEY", "GOOGLE_API_KEY"),
    ),
}
KEYED = [(name, variable) for name, (_, _, variables) in PRESETS.items() for variable in variables]


@pytest.mark.parametrize("name", [*PRESETS, "vllm", "azure_openai"])
def test_a_preset_is_a_backend_by_its_name(name: str) -> None:
    kinds = {**{key: kind for key, (kind, _, _) in PRESETS.items()}, "vllm": VLLM}
    assert plugins.load("rlm.clients", name) is kinds.get(name, AzureOpenAILM)


@pytest.mark.parametrize(("name", "variable"), KEYED)
def test_a_preset_calls_its_provider_with_the_key_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, name: str, variable: str
) -> None:
    monkeypatch.setenv(variable, KEY)
    kind, url, _ = PRESETS[name]
    client = kind("m")
    assert client.endpoint.base_url == url
    assert KEY not in client.endpoint.hide(f"it has the key {KEY}")


@pytest.mark.parametrize("name", PRESETS)
def test_without_a_key_the_error_says_what_to_set_and_how_to_do_without(name: str) -> None:
    kind, _, variables = PRESETS[name]
    with pytest.raises(AuthError) as caught:
        kind("m")
    message = str(caught.value)
    for words in (*variables, "api_key=", "base_url='http://...'", "backend='replay'", "backend='scripted'"):
        assert words in message
    assert caught.value.sent is False


@pytest.mark.parametrize("name", PRESETS)
def test_a_provider_of_many_models_wants_to_know_which(name: str) -> None:
    with pytest.raises(ConfigError, match="model_name="):
        PRESETS[name][0](api_key=KEY)


@pytest.mark.parametrize(
    ("kind", "header", "value"),
    [
        (OpenAILM, "authorization", f"Bearer {KEY}"), (VLLM, "authorization", f"Bearer {KEY}"),
        (OpenRouterLM, "authorization", f"Bearer {KEY}"), (GeminiLM, "authorization", f"Bearer {KEY}"),
        (PortkeyLM, "x-portkey-api-key", KEY), (AzureOpenAILM, "api-key", KEY),
    ],
)  # fmt: skip
@pytest.mark.parametrize("wrapped", [False, True])
async def test_a_given_key_goes_to_any_address_in_the_presets_header(
    make: Make, server: ModelServer, kind: Any, header: str, value: str, wrapped: bool
) -> None:
    client = make(kind, "m", base_url=server.url, api_key=Secret(KEY) if wrapped else KEY)
    await client.complete(ask())
    sent = {name: text for name, text in server.seen[0].headers.items() if KEY in text}
    assert sent == {header: value}


def key_of(server: ModelServer) -> str | None:
    return server.seen[0].headers.get("authorization")


@pytest.mark.parametrize("scheme", ["http", "HTTP", " http"])
async def test_a_key_of_the_environment_does_not_go_in_clear_to_an_address_that_code_names(
    monkeypatch: pytest.MonkeyPatch, make: Make, server: ModelServer, scheme: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    client = make(OpenAILM, "m", base_url=server.url.replace("http", scheme))
    await client.complete(ask())
    assert KEY not in repr(server.seen[0].headers)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost", "LOCALHOST", "[::1]"])
def test_a_key_for_servers_of_ones_own_goes_to_one_on_this_machine_and_no_other_key_does(
    monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert KEY not in VLLM("m", base_url=f"http://{host}:9/v1").endpoint.hide(KEY)  # it has it, and hides it
    assert KEY in OpenAILM("m", base_url=f"http://{host}:9/v1").endpoint.hide(KEY)


@pytest.mark.parametrize(
    "url", ["http://10.0.0.1/v1", "http://127.evil.test/v1", "http://localhost.evil.test", "http://127.1.test",
            "http://me:pw@127.0.0.1/v1", "http://localhost@evil.test/v1"]
)  # fmt: skip
def test_a_key_for_servers_of_ones_own_does_not_go_in_clear_to_another_machine(
    monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    assert KEY in VLLM("m", base_url=url).endpoint.hide(KEY)


@pytest.mark.parametrize("variable", ["OPENAI_BASE_URL", "LLM_BASE_URL"])
async def test_a_key_of_the_environment_goes_to_the_address_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, make: Make, server: ModelServer, variable: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    monkeypatch.setenv(variable, server.url)
    await make(OpenAILM, "m").complete(ask())
    assert key_of(server) == f"Bearer {KEY}"


def test_a_key_of_the_environment_goes_encrypted_to_an_address_that_code_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert KEY not in OpenAILM("m", base_url="https://gateway.test").endpoint.hide(KEY)
    assert KEY in OpenAILM("m", base_url="https://me:pw@gateway.test").endpoint.hide(KEY)


async def test_a_server_of_ones_own_needs_no_key(make: Make, server: ModelServer) -> None:
    await make(OpenAILM, "m", base_url=server.url).complete(ask())
    assert key_of(server) is None


async def test_an_empty_variable_is_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", " ")
    with pytest.raises(AuthError):
        OpenAILM("m")


@pytest.mark.parametrize("name", ["Authorization", "authorization"])
async def test_a_header_of_ones_own_is_in_the_place_of_the_key(
    monkeypatch: pytest.MonkeyPatch, make: Make, server: ModelServer, name: str
) -> None:
    OpenAILM("m", headers={name: "Bearer mine"})
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    await make(OpenAILM, "m", headers={name: Secret("Bearer mine")}).complete(ask())
    assert key_of(server) == "Bearer mine"


async def test_headers_go_with_every_call(make: Make, server: ModelServer) -> None:
    client = make(OpenAILM, "m", base_url=server.url, headers={"X-Title": "a title"})
    await client.complete(ask())
    assert server.seen[0].headers["x-title"] == "a title"


def test_vllm_is_on_this_machine_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert VLLM("m").endpoint.base_url == "http://127.0.0.1:8000/v1"
    monkeypatch.setenv("VLLM_BASE_URL", "http://gpu:8000/v1")
    assert VLLM("m").endpoint.base_url == "http://gpu:8000/v1"


@pytest.mark.parametrize("api", ["Chat", "", None, "completions"])
def test_an_api_that_is_none_is_refused(api: Any) -> None:
    with pytest.raises(ConfigError, match="it is 'chat' or 'responses'"):
        OpenAILM("m", api_key=KEY, api=api)


@pytest.mark.parametrize("url", ["https://[::1", "localhost:8000", "http://h/v1?api-version=1"])
def test_an_address_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(ConfigError, match="base_url"):
        OpenAILM("m", base_url=url)


# --- Azure -------------------------------------------------------------------------------------


def test_azures_address_has_no_deployment_in_it() -> None:
    client = AzureOpenAILM(azure_endpoint="https://r.openai.azure.com/", azure_deployment="d", api_key=KEY)
    assert client.endpoint.base_url == "https://r.openai.azure.com/openai/v1"
    assert client.model_name == "d"


def test_azures_older_address_has_the_deployment_in_it() -> None:
    client = AzureOpenAILM(
        "gpt-4o", azure_endpoint="https://r.test", azure_deployment="d", api_version="2024-10-21", api_key=KEY
    )
    assert client.endpoint.base_url == "https://r.test/openai/deployments/d"
    assert client.model_name == "gpt-4o"


async def test_azures_older_address_says_the_version_and_further_fields(make: Make, dead: int) -> None:
    root = f"http://127.0.0.1:{dead}"
    settings = {"azure_endpoint": root, "api_version": "v 1", "query": {"a": "b"}, "api_key": KEY}
    with pytest.raises(ConnectFailed) as caught:
        await make(AzureOpenAILM, "d", **settings).complete(ask())
    assert f"{root}/openai/deployments/d/chat/completions?api-version=v+1&a=b" in str(caught.value)


async def test_azure_is_found_in_the_environment_and_so_is_its_key(
    monkeypatch: pytest.MonkeyPatch, make: Make, server: ModelServer
) -> None:
    monkeypatch.setenv("AZURE_OPENAI_ENDPOINT", server.url.removesuffix("/v1"))
    monkeypatch.setenv("AZURE_OPENAI_DEPLOYMENT", "d")
    monkeypatch.setenv("AZURE_OPENAI_API_VERSION", "2024-10-21")
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", KEY)
    client = make(AzureOpenAILM)
    await client.complete(ask())
    assert server.seen[0].path == "/openai/deployments/d/chat/completions"
    assert server.seen[0].headers["api-key"] == KEY


def test_azures_key_of_the_environment_does_not_go_in_clear_to_an_address_that_code_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", KEY)
    with pytest.raises(AuthError, match="AZURE_OPENAI_API_KEY"):
        AzureOpenAILM("d", azure_endpoint="http://r.test")


def test_azure_wants_to_know_where_it_is_and_what_is_deployed() -> None:
    with pytest.raises(ConfigError, match="AZURE_OPENAI_ENDPOINT"):
        AzureOpenAILM("d", api_key=KEY)
    with pytest.raises(ConfigError, match="azure_deployment="):
        AzureOpenAILM(azure_endpoint="https://r.test", api_key=KEY)
    with pytest.raises(AuthError, match="AZURE_OPENAI_API_KEY"):
        AzureOpenAILM("d", azure_endpoint="https://r.test")


# --- what is OpenAI's own ------------------------------------------------------------------------


def body_of(client: OpenAILM, **fields: Any) -> dict[str, Any]:
    return client.dialect.body(ask(**fields), client.model_name, False)


def test_the_limit_of_a_reply_has_its_newer_name_at_openai_only() -> None:
    assert body_of(OpenAILM("m", api_key=KEY), max_tokens=5)["max_completion_tokens"] == 5
    azure = AzureOpenAILM("m", azure_endpoint="https://r.test", api_key=KEY)
    assert body_of(azure, max_tokens=5)["max_completion_tokens"] == 5
    for client in (OpenAILM("m", base_url="https://own.test"), VLLM("m"), OpenRouterLM("m", api_key=KEY)):
        body = body_of(client, max_tokens=5)
        assert (body["max_tokens"], "max_completion_tokens" in body) == (5, False)


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_what_shares_a_beginning_is_said_at_openai_only(api: Any) -> None:
    assert body_of(OpenAILM("m", api_key=KEY, api=api), session="s")["prompt_cache_key"] == "s"
    for client in (
        OpenAILM("m", base_url="https://own.test", api=api),
        VLLM("m", api=api),
        GeminiLM("m", api_key=KEY, api=api),
    ):
        assert "prompt_cache_key" not in body_of(client, session="s")


@pytest.mark.parametrize("url", ["https://api.openai.com/v1", "https://api.openai.com/v1/"])
def test_openais_address_written_out_is_still_openai(url: str) -> None:
    client = OpenAILM("gpt-4o", base_url=url, api_key=KEY)
    assert client.info("gpt-4o").price == Price(2.5, 10, 1.25)


@pytest.mark.parametrize("model", ["gpt-4o", "gpt-4o-2024-08-06"])
def test_prices_are_known_at_home_and_of_dated_models(model: str) -> None:
    assert OpenAILM(model, api_key=KEY).info(model).price == Price(2.5, 10, 1.25)
    assert OpenAILM(model, api_key=KEY).info(model).context_window == 128_000


def test_prices_are_not_known_elsewhere_or_of_other_models() -> None:
    assert OpenAILM("gpt-4o", base_url="https://own.test").info("gpt-4o") == ModelInfo()
    assert OpenAILM("m", api_key=KEY).info("m") == ModelInfo()
    assert OpenRouterLM("gpt-4o", api_key=KEY).info("gpt-4o") == ModelInfo()
    assert GeminiLM("m", api_key=KEY).info("models/gemini-2.5-pro").price is not None


@pytest.mark.parametrize("price", [Price(1, 2), {"input": 1, "output": 2}])
def test_a_price_that_is_given_goes_before_the_table(price: Any) -> None:
    for client in (
        OpenAILM("gpt-4o", api_key=KEY, price=price, context_window=7),
        OpenAILM("m", base_url="https://own.test", price=price, context_window=7),
    ):
        info = client.info(client.model_name)
        assert (info.price, info.context_window) == (Price(1, 2), 7)


@pytest.mark.parametrize(
    "price",
    [{"input": 1}, {"input": 1, "output": 2, "outptu": 3}, {"input": KEY}, {"key": KEY}, KEY, 5, [1, 2]],
)
def test_a_price_that_is_none_is_refused_and_not_shown(price: Any) -> None:
    with pytest.raises(ConfigError, match="is no price") as caught:
        OpenAILM("m", api_key=KEY, price=price)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("setting", ["api_key", "base_url"])
@pytest.mark.parametrize("value", [5, [KEY], KEY.encode()])
def test_a_setting_that_is_no_text_is_refused_and_not_shown(setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{setting}= is no text, but a {type(value).__name__}") as caught:
        OpenAILM("m", **{"api_key": KEY, setting: value})
    assert KEY not in str(caught.value)


# --- which model --------------------------------------------------------------------------------


async def test_the_only_model_of_a_server_is_found(make: Make, server: ModelServer) -> None:
    server.models = ["the-one"]
    client = make(OpenAILM, base_url=server.url)
    assert await client.prepare() == f"{server.url} serves 'the-one'"
    await client.complete(ask())
    assert server.seen[0].body["model"] == "the-one"
    assert (await client.prepare(), server.asides) == (None, 1)


@pytest.mark.parametrize(("models", "told"), [(["b", "a"], "'a', 'b'"), ([], "none")])
async def test_of_several_models_one_must_be_named(
    make: Make, server: ModelServer, models: list[str], told: str
) -> None:
    server.models = models
    with pytest.raises(ConfigError, match=f"serves {told}: say which with model_name="):
        await make(OpenAILM, base_url=server.url).prepare()


async def test_a_model_that_is_named_is_not_asked_for(make: Make, server: ModelServer) -> None:
    assert await make(OpenAILM, "m", base_url=server.url).prepare() is None
    assert server.asides == 0


async def test_the_sentence_about_a_server_does_not_show_its_password(
    make: Make, server: ModelServer
) -> None:
    client = make(OpenAILM, base_url=server.url.replace("//", "//me:hunter2222@"))
    assert "hunter" not in f"{await client.prepare()} {client.pool_key('m')} {client!r}"


@pytest.mark.parametrize(
    ("listed", "found"),
    [
        ({"data": None}, {}),
        ({"data": [{"id": "m", "max_model_len": 5}]}, {"m": 5}),
        ({"data": [{"id": "m", "meta": {"n_ctx_train": 6}}]}, {"m": 6}),
        ({"data": [{"id": "m", "meta": {"n_ctx": 7, "n_ctx_train": 8}}]}, {"m": 7}),
        ({"data": [{"id": "m", "meta": {"n_ctx": "many"}}]}, {"m": None}),
    ],
)
async def test_servers_list_their_models_in_several_ways(
    make: Make, monkeypatch: pytest.MonkeyPatch, server: ModelServer, listed: Any, found: Any
) -> None:
    monkeypatch.setattr(server, "_told", lambda method, path: (200, listed))
    assert await make(OpenAILM, base_url=server.url).served() == found


@pytest.mark.parametrize("listed", [{}, [], None, {"data": [{}]}, {"data": "x"}, {"models": []}])
async def test_what_is_no_list_of_models_is_a_protocol_error(
    make: Make, monkeypatch: pytest.MonkeyPatch, server: ModelServer, listed: Any
) -> None:
    monkeypatch.setattr(server, "_told", lambda method, path: (200, listed))
    with pytest.raises(ProtocolError, match="is no list of models"):
        await make(OpenAILM, base_url=server.url).prepare()


# --- replies that are not like OpenAI's ---------------------------------------------------------


def answers(server: ModelServer, *events: Any) -> None:
    """Answer with this, or with a stream of these."""
    if len(events) == 1:
        server.reply = Behaviour(body=json.dumps(events[0]).encode())
    else:
        body = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)
        server.reply = Behaviour(body=body, content_type="text/event-stream")


async def test_openrouters_error_in_the_place_of_a_choice_is_an_error(
    make: Make, server: ModelServer
) -> None:
    error = {"code": 502, "message": "Provider returned error"}
    answers(server, {"choices": [{"error": error, "finish_reason": "error", "message": {"content": ""}}]})
    with pytest.raises(Unavailable, match="Provider returned error"):
        await make(OpenRouterLM, "m", base_url=server.url).complete(ask())


async def test_openrouters_error_with_a_status_of_success_is_an_error(
    make: Make, server: ModelServer
) -> None:
    answers(server, {"error": {"code": 429, "message": "free-models-per-day"}, "user_id": "u"})
    with pytest.raises(RateLimited):
        await make(OpenRouterLM, "m", base_url=server.url).complete(ask())


async def test_text_in_parts_is_put_together(make: Make, server: ModelServer) -> None:
    parts = [{"type": "thinking", "thinking": []}, {"type": "text", "text": "a"}, {"text": "b"}]
    answers(server, {"choices": [{"message": {"content": parts}}]})
    assert (await make(OpenAILM, "m", base_url=server.url).complete(ask())).text == "ab"


async def test_a_refusal_is_the_text(make: Make, server: ModelServer) -> None:
    answers(server, {"choices": [{"message": {"content": None, "refusal": "no"}}]})
    assert (await make(OpenAILM, "m", base_url=server.url).complete(ask())).text == "no"


async def test_a_stream_that_ends_with_a_reason_alone_has_ended(make: Make, server: ModelServer) -> None:
    answers(server, {"choices": [{"delta": {"content": "a"}}]}, {"choices": [{"finish_reason": "stop"}]})
    pieces, reply = await streamed(make(OpenAILM, "m", base_url=server.url), ask())
    assert (pieces, reply.text, reply.usage.estimated) == (["a"], "a", True)


@pytest.mark.parametrize("api", ["chat", "responses"])
@pytest.mark.parametrize("usage", [{}, {"total_tokens": 9}, "null"])
async def test_what_nobody_has_counted_is_a_guess_and_not_nothing(
    make: Make, server: ModelServer, api: str, usage: Any
) -> None:
    names = (
        ("input_tokens", "output_tokens") if api == "responses" else ("prompt_tokens", "completion_tokens")
    )
    usage = dict.fromkeys(names) if usage == "null" else usage
    reply = {
        "usage": usage,
        "choices": [{"message": {"content": "whole"}, "finish_reason": "stop"}],
        "output": [{"type": "message", "content": [{"text": "whole"}]}],
    }
    answers(server, reply)
    client = make(OpenAILM, "m", base_url=server.url, api=api)
    guess = Usage.estimate(ask().messages, "whole")
    assert (await client.complete(ask())).usage == guess
    answers(server, {**reply, "usage": {**usage, names[1]: 0}})
    assert (await client.complete(ask())).usage == msgspec.structs.replace(guess, output_tokens=0)
    answers(server, {**reply, "usage": {names[0]: 3, names[1]: 0}})
    assert (await client.complete(ask())).usage == Usage(3, 0)


async def test_a_server_that_does_not_stream_is_read_whole(make: Make, server: ModelServer) -> None:
    for api, reply in (
        ("chat", {"choices": [{"message": {"content": "whole"}, "finish_reason": "length"}]}),
        ("responses", {"output": [{"type": "message", "content": [{"text": "whole"}]}],
                       "incomplete_details": {"reason": "max_output_tokens"}}),
    ):  # fmt: skip
        answers(server, reply)
        client = make(OpenAILM, "m", base_url=server.url, api=api)
        assert (await streamed(client, ask()))[1].text == "whole"
        assert (await client.complete(ask())).finish == "length"


async def test_a_streamed_refusal_of_responses_is_handed_over(make: Make, server: ModelServer) -> None:
    said = {"output": [{"type": "message", "content": [{"type": "refusal", "refusal": "no"}]}]}
    answers(
        server,
        {"type": "response.refusal.delta", "delta": "no"},
        {"type": "response.completed", "response": said},
    )
    pieces, reply = await streamed(make(OpenAILM, "m", base_url=server.url, api="responses"), ask())
    assert (pieces, reply.text) == (["no"], "no")


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        ({"type": "error", "code": "rate_limit_exceeded", "message": "slow"}, RateLimited),
        ({"type": "error", "error": {"type": "insufficient_quota", "message": "x"}}, QuotaExceeded),
        ({"type": "response.failed", "response": {"status": "failed", "error": {
            "code": "server_error", "message": "sorry"}, "output": []}}, Unavailable),
        ({"type": "response.failed", "response": {"status": "failed", "output": []}}, ProtocolError),
    ],
)  # fmt: skip
async def test_a_stream_of_responses_that_fails_is_its_failure(
    make: Make, server: ModelServer, event: Any, kind: type[ModelError]
) -> None:
    answers(server, {"type": "response.created"}, event)
    with pytest.raises(kind):
        await streamed(make(OpenAILM, "m", base_url=server.url, api="responses"), ask())


@pytest.mark.parametrize("status", ["failed", "cancelled", "queued", "in_progress"])
async def test_a_response_that_is_not_finished_is_a_protocol_error(
    make: Make, server: ModelServer, status: str
) -> None:
    answers(server, {"status": status, "output": [], "error": None})
    with pytest.raises(ProtocolError, match=status):
        await make(OpenAILM, "m", base_url=server.url, api="responses").complete(ask())


async def test_a_response_that_is_incomplete_for_no_reason_is_not_whole(
    make: Make, server: ModelServer
) -> None:
    answers(server, {"status": "incomplete", "output": []})
    reply = await make(OpenAILM, "m", base_url=server.url, api="responses").complete(ask())
    assert reply.finish == "other"


# --- a real server -------------------------------------------------------------------------------

APIS = pytest.mark.parametrize("api", ["chat", "responses"])


@APIS
async def test_a_real_server_replies_and_counts(make: Make, llama: LlamaServer, api: str) -> None:
    client = make(OpenAILM, "tiny", base_url=llama.url, api=api)
    reply = await client.complete(ask("é", extra=llama.scripted("aé\n!")))
    assert (reply.text, reply.finish, reply.model) == ("aé\n!", "stop", "tiny")
    usage = reply.usage
    assert (usage.input_tokens, usage.output_tokens) == (len("<user>é\n<assistant>".encode()), 6)
    assert (usage.cost, usage.estimated) == (None, False)


@APIS
async def test_a_real_server_reads_a_growing_history_from_its_cache(
    make: Make, llama: LlamaServer, api: str
) -> None:
    client = make(OpenAILM, "tiny", base_url=llama.url, api=api)
    opening = Message("user", f"a beginning for {api}" * 30)
    first = await client.complete(Request((opening,), extra=llama.scripted("well")))
    history = (opening, Message("assistant", "well"), Message("user", "next"))
    second = await client.complete(Request(history, extra=llama.scripted("ok")))
    known = first.usage.input_tokens
    assert known <= second.usage.cached_tokens < second.usage.input_tokens


@APIS
async def test_a_real_server_streams(make: Make, llama: LlamaServer, api: str) -> None:
    client = make(OpenAILM, "tiny", base_url=llama.url, api=api)
    pieces, reply = await streamed(client, ask(extra=llama.scripted("aé😀")))
    assert pieces == ["a", "é", "😀"]
    assert (reply.text, reply.finish, reply.usage.output_tokens) == ("aé😀", "stop", 8)


async def test_a_real_server_stops_where_it_is_told_to(make: Make, llama: LlamaServer) -> None:
    client = make(OpenAILM, "tiny", base_url=llama.url)
    request = ask(stop=("cd",), extra=llama.scripted("abcdef"))
    assert (await client.complete(request)).text == "ab"


@APIS
async def test_a_real_server_is_cut_off_by_a_limit(make: Make, llama: LlamaServer, api: str) -> None:
    client = make(OpenAILM, "tiny", base_url=llama.url, api=api)
    reply = await client.complete(ask(max_tokens=3, extra=llama.scripted("abcdef")))
    assert reply.text == "abc"
    assert reply.finish == ("length" if api == "chat" else reply.finish)


async def test_a_real_server_keeps_to_a_schema(make: Make, llama: LlamaServer) -> None:
    schema = {"type": "object", "properties": {"n": {"const": 7}}, "required": ["n"]}
    reply = await make(OpenAILM, "tiny", base_url=llama.url).complete(ask(schema=schema))
    assert json.loads(reply.text) == {"n": 7}


@APIS
@pytest.mark.parametrize("stream", [False, True])
async def test_a_real_server_says_how_much_it_reads(
    make: Make, llama: LlamaServer, api: str, stream: bool
) -> None:
    client = make(OpenAILM, "tiny", base_url=llama.url, api=api)
    request = ask("x" * (llama.context + 1))
    with pytest.raises(ContextOverflow) as caught:
        await (streamed(client, request) if stream else client.complete(request))
    assert (caught.value.window, caught.value.code) == (llama.context, "exceed_context_size_error")


async def test_a_real_server_says_which_model_it_serves(make: Make, llama: LlamaServer) -> None:
    client = make(OpenAILM, base_url=llama.url)
    assert await client.prepare() == f"{llama.url} serves 'tiny'"
    assert client.info("tiny").context_window == llama.context


# --- other providers, by aimock -------------------------------------------------------------------


async def test_gemini_is_spoken_to_by_its_openai_shape(make: Make, aimock: Aimock) -> None:
    aimock.reply("hello", "a reply of several pieces", usage={"input_tokens": 100, "output_tokens": 7})
    client = make(GeminiLM, "gemini-2.5-pro", base_url=aimock.gemini_openai, api_key=KEY)
    reply = await client.complete(ask())
    assert (reply.text, reply.usage) == ("a reply of several pieces", Usage(100, 7))
    assert "".join(map(str, (await streamed(client, ask()))[0])) == "a reply of several pieces"
    assert aimock.journal()[0]["path"] == "/v1beta/openai/chat/completions"


async def test_openrouter_says_what_a_call_cost(make: Make, aimock: Aimock) -> None:
    details = {"prompt_tokens_details": {"cached_tokens": 60}, "cost": 0.25}
    aimock.reply("hello", "hi", usage={"input_tokens": 100, "output_tokens": 7, **details})
    client = make(OpenRouterLM, "m", base_url=aimock.openrouter, api_key=KEY)
    assert (await client.complete(ask())).usage == Usage(100, 7, 60, 0.25)


@APIS
async def test_too_many_requests_say_when_to_return(make: Make, aimock: Aimock, api: str) -> None:
    aimock.refuse("hello", 429, retry_after=7, type="rate_limit_error")
    with pytest.raises(RateLimited) as caught:
        await make(OpenAILM, "m", base_url=aimock.openai, api=api).complete(ask())
    assert (caught.value.retry_after, caught.value.code) == (7, "rate_limit_error")


@APIS
async def test_an_answer_that_is_no_json_is_a_protocol_error(make: Make, aimock: Aimock, api: str) -> None:
    aimock.chaos("malformedRate")
    with pytest.raises(ProtocolError):
        await make(OpenAILM, "m", base_url=aimock.openai, api=api).complete(ask())


@APIS
async def test_a_connection_that_ends_is_unavailable(make: Make, aimock: Aimock, api: str) -> None:
    aimock.chaos("disconnectRate")
    with pytest.raises(Unavailable):
        await make(OpenAILM, "m", base_url=aimock.openai, api=api).complete(ask())


async def test_a_stream_that_breaks_off_is_a_protocol_error(make: Make, aimock: Aimock) -> None:
    aimock.teach("hello", {"content": "a reply of several pieces"}, truncateAfterChunks=3, latency=20)
    with pytest.raises(ProtocolError):
        await streamed(make(OpenAILM, "m", base_url=aimock.openai), ask())


async def test_a_refusal_of_the_content_is_a_bad_request(make: Make, aimock: Aimock) -> None:
    aimock.refuse("hello", 400, code="content_filter")
    with pytest.raises(ContentFiltered):
        await make(OpenAILM, "m", base_url=aimock.openai).complete(ask())


# --- AutoLM ---------------------------------------------------------------------------------------


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, dead: int) -> int:
    """No server on this machine is found."""
    monkeypatch.setattr(rlm_openai.auto, "SERVERS", (("Ollama", dead),))
    return dead


def serve(monkeypatch: pytest.MonkeyPatch, dead: int, *servers: tuple[str, str]) -> None:
    """These are the servers that are looked for, after one that is not there."""
    ports = tuple((title, int(url.removesuffix("/v1").rpartition(":")[2])) for title, url in servers)
    monkeypatch.setattr(rlm_openai.auto, "SERVERS", (("Ollama", dead), *ports))


@pytest.mark.parametrize(
    ("variable", "name", "model"), [entry for entry in rlm_openai.auto.KEYS if entry[2] is not None]
)
@pytest.mark.usefixtures("nobody")
async def test_a_key_is_found_and_it_says_so(
    monkeypatch: pytest.MonkeyPatch, make: Make, variable: str, name: str, model: str
) -> None:
    monkeypatch.setenv(variable, KEY)
    client = make(AutoLM)
    assert await client.prepare() == f"backend 'auto': {variable} is set: {name}, model {model}"
    assert client.model_name == model
    assert client.info(model).price is not None or name == "openrouter"
    assert await client.prepare() is None


@pytest.mark.usefixtures("nobody")
async def test_the_first_key_wins_and_a_model_that_is_named_stays(
    monkeypatch: pytest.MonkeyPatch, make: Make
) -> None:
    monkeypatch.setenv("GEMINI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    said = await make(AutoLM, "gpt-4o").prepare()
    assert said == "backend 'auto': OPENAI_API_KEY is set: openai, model gpt-4o"


async def test_a_key_for_an_address_of_the_environment_asks_there_for_the_model(
    monkeypatch: pytest.MonkeyPatch, make: Make, server: ModelServer
) -> None:
    monkeypatch.setenv("LLM_API_KEY", KEY)
    monkeypatch.setenv("LLM_BASE_URL", server.url)
    server.models = ["the-one"]
    client = make(AutoLM)
    assert await client.prepare() == f"backend 'auto': {server.url} serves 'the-one'"
    await client.complete(ask())
    assert key_of(server) == f"Bearer {KEY}"


async def test_a_client_that_cannot_be_prepared_leaves_nothing_open(
    monkeypatch: pytest.MonkeyPatch, make: Make, server: ModelServer
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    server.models = ["a", "b"]
    with pytest.raises(ConfigError, match="serves 'a', 'b'"):
        await make(AutoLM).prepare()


class PlainStreamLM(ScriptedLM):
    """Whose stream is an iterator and no more."""

    def stream(self, request: Request) -> Any:
        class Pieces:
            left: ClassVar[list[str | Reply]] = ["a", Reply("a")]

            def __aiter__(self) -> Any:
                return self

            async def __anext__(self) -> str | Reply:
                if not self.left:
                    raise StopAsyncIteration
                return self.left.pop(0)

        return Pieces()


async def test_a_stream_that_is_an_iterator_and_no_more_is_handed_over(
    monkeypatch: pytest.MonkeyPatch, make: Make
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(plugins, "load", lambda group, name: lambda **settings: PlainStreamLM("a"))
    client = make(AutoLM)
    await client.prepare()
    assert (await streamed(client, ask()))[0] == ["a"]


async def test_a_server_of_this_machine_is_found_and_it_says_so(
    monkeypatch: pytest.MonkeyPatch, make: Make, llama: LlamaServer, dead: int
) -> None:
    serve(monkeypatch, dead, ("llama.cpp", llama.url))
    client = make(AutoLM)
    assert await client.prepare() == f"backend 'auto': llama.cpp on {llama.url} serves 'tiny'"
    assert (client.model_name, client.info("tiny").context_window) == ("tiny", llama.context)
    assert client.pool_key("tiny") == llama.url
    request = ask(extra=llama.scripted("abc"))
    assert (await client.complete(request)).text == "abc"
    assert (await streamed(client, request))[0] == ["a", "b", "c"]


async def test_the_server_with_the_model_that_is_named_is_chosen(
    monkeypatch: pytest.MonkeyPatch, make: Make, llama: LlamaServer, server: ModelServer, dead: int
) -> None:
    server.models = ["other"]
    serve(monkeypatch, dead, ("vLLM", server.url), ("llama.cpp", llama.url))
    client = make(AutoLM, "tiny", price={"input": 1, "output": 2}, context_window=99)
    assert await client.prepare() == f"backend 'auto': llama.cpp on {llama.url} serves 'tiny'"
    assert client.info("tiny") == ModelInfo(context_window=99, price=Price(1, 2))


async def test_where_nothing_is_found_it_says_everything_that_was_tried(make: Make, nobody: int) -> None:
    with pytest.raises(AuthError) as caught:
        await make(AutoLM).prepare()
    message = str(caught.value)
    for words in (*(key for key, _, _ in rlm_openai.auto.KEYS), f"Ollama ({nobody})", "none answers"):
        assert words in message
    assert caught.value.sent is False


async def test_where_servers_serve_something_else_it_says_what(
    monkeypatch: pytest.MonkeyPatch, make: Make, server: ModelServer, dead: int
) -> None:
    server.models = ["a", "b"]
    serve(monkeypatch, dead, ("vLLM", server.url))
    with pytest.raises(AuthError, match=f"with the model 'c'.*vLLM on {server.url} serves a, b"):
        await make(AutoLM, "c").prepare()


async def test_settings_that_the_chosen_client_does_not_take_are_refused(
    monkeypatch: pytest.MonkeyPatch, make: Make
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(ConfigError, match="does not take these settings"):
        await make(AutoLM, no_such_setting=1).prepare()


async def test_before_it_is_prepared_it_says_so(make: Make) -> None:
    client = make(AutoLM)
    with pytest.raises(ConfigError, match=r"await client.prepare\(\) comes first"):
        await client.complete(ask())


async def test_a_key_of_the_environment_is_not_shown_to_servers_of_this_machine(
    monkeypatch: pytest.MonkeyPatch, make: Make, dead: int, server: ModelServer
) -> None:
    monkeypatch.setenv("LLM_API_KEY", KEY)  # for an address that nobody has named
    server.models = ["m"]
    serve(monkeypatch, dead, ("vLLM", server.url))
    client = make(AutoLM)
    await client.prepare()
    await client.complete(ask())
    assert KEY not in repr(server.seen)


def test_a_script_is_never_chosen() -> None:
    names = {name for _, name, _ in rlm_openai.auto.KEYS}
    assert not any(plugins.load("rlm.clients", name).simulated for name in names)
    assert names.isdisjoint({"scripted", "replay"})

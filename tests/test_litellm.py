"""LiteLLM as a client: its suite, what its import may not do, and what calls carry over."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import pytest_asyncio
from llama_support import LlamaServer

from rlm.client import Message, ModelInfo, Reply, Request
from rlm.errors import AuthError, BadRequest, ConfigError, ContextOverflow, NotFound, ProtocolError, Timeout
from rlm.testing import ClientSuite
from rlm.testing.clients import Connect, ask, failure, reply_to, streamed
from rlm.testing.model_server import Behaviour, ModelServer
from rlm_litellm import LiteLLM, client, library

pytestmark = [  # what LiteLLM has Python ignore when it is imported, which pytest undoes for each test
    pytest.mark.filterwarnings("ignore:.*Accessing the"),
    pytest.mark.filterwarnings("ignore:.*`ReadOnly` qualifier:UserWarning"),
    pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning"),
]

KEY = "sk-litellm-0123456789abcdef"


class TestLiteLLMSuite(ClientSuite):
    speaks = "openai"
    other_model = "openai/another-model"
    known_failures: ClassVar[Mapping[str, str]] = {
        "test_usage_with_holes_is_no_failure[a string]": "LiteLLM refuses the reply, as one in no shape"
    }

    @pytest.fixture
    def connect(self) -> Connect:
        return lambda url, key: LiteLLM("openai/m", base_url=url, api_key=key)


@pytest.fixture
def server() -> Iterator[ModelServer]:
    with ModelServer() as running:
        yield running


@pytest_asyncio.fixture
async def priced(server: ModelServer) -> AsyncIterator[LiteLLM]:
    """A client of a model that LiteLLM has a price for."""
    made = LiteLLM("openai/gpt-4o-mini", base_url=server.url, api_key=KEY)
    await made.prepare()
    yield made
    await made.aclose()


def python(code: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code in a Python of its own."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("LITELLM")}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**env, **variables},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


# -- the import


def test_importing_and_making_a_client_imports_no_litellm() -> None:
    code = (
        "import sys, rlm, rlm_litellm; client = rlm_litellm.LiteLLM('openai/m'); client.info('openai/m'); "
        "print([name for name in ('litellm', 'openai', 'httpx', 'boto3') if name in sys.modules])"
    )
    assert python(code).stdout.strip() == "[]"


IMPORT = """
import asyncio, os, sys
os.chdir(sys.argv[1])
asked, ticks, before = [], 0, dict(os.environ)
sys.addaudithook(lambda name, args: asked.append((name, args)) if name in NETWORK else None)
NETWORK = ("socket.getaddrinfo", "socket.connect", "socket.gethostbyname")
from rlm_litellm import LiteLLM

async def main():
    global ticks
    preparing = asyncio.create_task(LiteLLM("openai/m").prepare())
    while not preparing.done():
        await asyncio.sleep(0.01)
        ticks += 1
    await preparing

asyncio.run(main())
assert "litellm" in sys.modules
changed = {name for name in before.keys() | os.environ.keys() if before.get(name) != os.environ.get(name)}
print([asked, changed, ticks > 20])
"""


def test_its_import_asks_no_network_reads_no_env_file_and_leaves_environment_and_loop_alone(
    tmp_path: Path,
) -> None:
    (tmp_path / ".env").write_text("OPENAI_BASE_URL=http://127.0.0.1:9/v1\nRLM_CANARY=1\n")
    done = python(IMPORT, str(tmp_path))
    assert (done.stdout.strip(), done.stderr) == ("[[], set(), True]", "")


def test_what_the_user_has_set_stays_during_the_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_MODE", "DEV")
    monkeypatch.delenv("LITELLM_LOCAL_MODEL_COST_MAP", raising=False)
    with library._environment():
        assert os.environ["LITELLM_MODE"] == "DEV"
        assert os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] == "True"
    assert os.environ["LITELLM_MODE"] == "DEV"
    assert "LITELLM_LOCAL_MODEL_COST_MAP" not in os.environ


LOAD = """
import sys
from rlm_litellm import library
try:
    library.load()
except Exception as error:
    print(type(error).__name__, error, "litellm" in sys.modules)
"""


@pytest.mark.parametrize("version", ["1.82.7", "1.82.8"])
def test_versions_that_are_malware_are_not_imported(tmp_path: Path, version: str) -> None:
    told = tmp_path / f"litellm-{version}.dist-info"
    told.mkdir()
    (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: litellm\nVersion: {version}\n")
    package = tmp_path / "litellm"
    package.mkdir()
    (package / "__init__.py").write_text("open('stolen', 'w')")
    said = python(LOAD, PYTHONPATH=f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}").stdout
    assert said.startswith(f"ConfigError litellm {version} is malware")
    assert said.endswith("False\n")


def test_where_it_is_not_installed_the_error_says_how_to_install_it() -> None:
    said = python(f"import sys; sys.modules['litellm'] = None\n{LOAD}").stdout
    assert "ConfigError" in said
    assert "pip install 'rlm[litellm]'" in said


# -- what is carried over


async def test_the_cost_is_litellms_whole_and_streamed(server: ModelServer, priced: LiteLLM) -> None:
    price = priced.info("openai/gpt-4o-mini").price
    assert price is not None
    for reply in (await reply_to(priced), (await streamed(priced))[1]):
        assert reply.usage.cost == pytest.approx(price.cost(reply.usage))
        assert reply.usage.cost > 0


async def test_what_its_table_says_of_a_model_is_known_once_it_is_imported(priced: LiteLLM) -> None:
    assert LiteLLM("openai/gpt-4o-mini").info("openai/gpt-4o-mini") == ModelInfo()
    known = priced.info("openai/gpt-4o-mini")
    assert (known.context_window, known.max_output) == (128_000, 16_384)
    assert known.supports == {"temperature", "stop", "seed", "schema", "stream"}


async def test_a_price_for_long_inputs_is_a_price_of_its_own(priced: LiteLLM) -> None:
    price = priced.info("gemini/gemini-2.5-pro").price
    assert price is not None
    assert price.long is not None
    assert (price.above, price.long.input > price.input) == (200_000, True)


async def test_of_a_model_that_its_server_would_be_asked_about_nothing_is_known(
    server: ModelServer, priced: LiteLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_API_BASE", server.url)
    assert priced.info("ollama/m") == ModelInfo()
    assert server.total_connections == 0


async def test_a_stream_that_nobody_counted_is_estimated_without_litellms_tokenizers(
    server: ModelServer, priced: LiteLLM
) -> None:
    server.reply = Behaviour(usage=None, text="four words of text")
    _, reply = await streamed(priced, ask(model="openai/meta-llama/Llama-3-8b"))
    assert (reply.usage.estimated, reply.usage.cost) == (True, None)


# -- requests


async def test_settings_of_the_clients_go_with_each_call(server: ModelServer) -> None:
    made = LiteLLM("openai/m", api_base=server.url, api_key=KEY, extra_headers={"x-team": "rlm"}, top_p=0.5)
    await reply_to(made)
    await made.aclose()
    assert (server.seen[0].headers["x-team"], server.seen[0].body["top_p"]) == ("rlm", 0.5)


async def test_a_schema_is_a_response_format(server: ModelServer, priced: LiteLLM) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    await reply_to(priced, ask(schema=schema))
    assert server.seen[0].body["response_format"]["json_schema"]["schema"] == schema


@pytest.mark.parametrize("extra", [{"api_base": "http://127.0.0.1:9/v1"}, {"mock_response": "x"}])
async def test_extra_fields_cannot_set_the_client(
    server: ModelServer, priced: LiteLLM, extra: dict[str, str]
) -> None:
    error = await failure(priced, ask(extra=extra))
    assert (type(error), error.sent, server.requests) == (BadRequest, False, 0)


async def test_what_a_model_does_not_take_is_refused_and_not_dropped(priced: LiteLLM) -> None:
    error = await failure(priced, ask(model="openai/o3", temperature=0.3))
    assert (type(error), error.sent, error.retryable) == (BadRequest, False, False)
    assert "temperature" in str(error)


async def test_a_key_that_is_nowhere_is_an_auth_error_and_nothing_was_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    made = LiteLLM("openai/m")
    errors = [await failure(made), await failure(made, ask(model="anthropic/claude-haiku-4-5"))]
    await made.aclose()
    assert [(type(error), error.sent) for error in errors] == [(AuthError, False)] * 2


async def test_a_provider_that_there_is_not_is_not_found(priced: LiteLLM) -> None:
    error = await failure(priced, ask(model="no-such-provider/m"))
    assert (type(error), error.sent) == (NotFound, False)


async def test_a_key_of_the_environment_does_not_travel_unencrypted_to_an_address_of_the_codes(
    server: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    made = LiteLLM("openai/m", base_url=server.url)
    await reply_to(made)
    await made.aclose()
    assert KEY not in repr(server.seen)


@pytest.mark.parametrize(("limit", "told"), [(None, client.UNLIMITED), (1234.5, 1234.5)])
async def test_an_attempt_takes_as_long_as_the_request_says(
    priced: LiteLLM, monkeypatch: pytest.MonkeyPatch, limit: float | None, told: float
) -> None:
    seen: list[Any] = []

    async def asked(**arguments: Any) -> Any:
        seen.append(arguments["timeout"])
        raise ValueError("enough")

    monkeypatch.setattr(priced._library, "acompletion", asked)
    await failure(priced, ask(timeout=limit))
    assert seen == [told]


async def test_an_attempt_that_takes_longer_is_a_timeout(server: ModelServer, priced: LiteLLM) -> None:
    await reply_to(priced)  # the first call of all takes a while
    server.reply = Behaviour(fault="hang")
    assert type(await failure(priced, ask(timeout=0.3))) is Timeout


async def test_an_attempt_without_a_limit_gets_its_reply(priced: LiteLLM) -> None:
    assert (await reply_to(priced, ask(timeout=None))).text


async def test_nothing_is_said_on_the_terminal(
    server: ModelServer, priced: LiteLLM, capfd: pytest.CaptureFixture[str]
) -> None:
    server.reply = Behaviour(status=400, message="no")
    await failure(priced)
    await failure(priced, ask(model="no-such-provider/m"))
    server.reply = Behaviour(body=b"{}")
    await failure(priced)
    assert capfd.readouterr() == ("", "")


async def test_a_failure_is_not_told_by_one_that_was_being_handled(
    server: ModelServer, priced: LiteLLM
) -> None:
    """As when a call is made again while its first failure is handled."""
    try:
        raise socket.gaierror("of an earlier attempt")
    except OSError:
        server.reply = Behaviour(fault="half", text="long enough to be cut in the middle" * 10)
        error = await failure(priced)
    assert (type(error), error.sent) == (ProtocolError, True)


async def test_a_model_must_be_named() -> None:
    with pytest.raises(ConfigError, match="model_name"):
        LiteLLM()


# -- connections


async def test_connections_are_closed_after_the_last_client_only(server: ModelServer) -> None:
    one, other = (LiteLLM("openai/m", base_url=server.url, api_key=KEY) for _ in range(2))
    await reply_to(one)
    await reply_to(other)
    await one.aclose()
    assert server.connections > 0
    await reply_to(other)
    await other.aclose()
    await asyncio.sleep(0.1)
    assert server.connections == 0
    await reply_to(one)  # closed clients may be used again, as LiteLLM makes new ones
    await one.aclose()


# -- a real server


@pytest.fixture
def local(llama: LlamaServer) -> LiteLLM:
    return LiteLLM("openai/tiny", base_url=llama.url, api_key=KEY)


async def test_llama_cpp_says_what_was_foretold_and_counts_it(llama: LlamaServer, local: LiteLLM) -> None:
    question = Request((Message("user", "what now?"),), max_tokens=60, extra=llama.scripted("FINAL(42)"))
    replies: list[Reply] = [await local.complete(question), (await streamed(local, question))[1]]
    await local.aclose()
    assert [reply.text for reply in replies] == ["FINAL(42)"] * 2
    assert {reply.finish for reply in replies} == {"stop"}
    assert all(reply.usage.input_tokens > 0 and reply.usage.output_tokens >= 9 for reply in replies)
    assert replies[1].usage.cached_tokens > 0


async def test_a_request_longer_than_llama_cpp_reads_is_an_overflow(
    llama: LlamaServer, local: LiteLLM
) -> None:
    error = await failure(local, ask("x" * (llama.context + 100)))
    await local.aclose()
    assert isinstance(error, ContextOverflow)
    assert error.window == llama.context

"""Facts about clients as scripts for rlms write and name them, and about the handlers they give them to."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from rlms_support import KEY, MODEL, say

from rlm import RLM, Message, RLMError, open_repl
from rlm.clients import get_client
from rlm.clients.anthropic import AnthropicClient
from rlm.clients.base_lm import BaseLM
from rlm.clients.openai import OpenAIClient
from rlm.clients.portkey import PortkeyClient
from rlm.core.lm_handler import LMHandler
from rlm.core.types import ModelUsageSummary, UsageSummary
from rlm.testing.model_server import Behaviour, ModelServer


class Echo(BaseLM):
    """A client as a script has it, that says what it was asked."""

    def __init__(self, name: str = "echo") -> None:
        super().__init__(model_name=name)
        self.prompts: list[Any] = []
        self.threads: set[str] = set()

    def completion(self, prompt: Any) -> str:
        self.prompts.append(prompt)
        self.threads.add(threading.current_thread().name)
        if isinstance(prompt, str):
            return f"{self.model_name}: {prompt}"
        return "```repl\nFINAL(llm_query('hello'))\n```"

    async def acompletion(self, prompt: Any) -> str:
        return self.completion(prompt)

    def get_usage_summary(self) -> UsageSummary:
        return UsageSummary({self.model_name: ModelUsageSummary(len(self.prompts), 10, 4, 0.5)})

    def get_last_usage(self) -> ModelUsageSummary:
        return ModelUsageSummary(1, 5, 2, 0.25)


# --- a script's own client -----------------------------------------------------------------------


def test_a_client_of_the_scripts_own_is_a_backend() -> None:
    assert RLM(backend=Echo()).completion("any").response == "echo: hello"


def test_it_is_asked_the_roots_turns_as_messages_and_a_cells_question_as_text() -> None:
    client = Echo()
    RLM(backend=client).completion("any")
    turn, question = client.prompts
    assert [message["role"] for message in turn] == ["system", "user"]
    assert question == "hello"


def test_it_waits_in_threads_of_its_own() -> None:
    """Not in the one in which all runs of the process are."""
    client = Echo()
    RLM(backend=client).completion("any")
    assert all(name.startswith("rlm-client") for name in client.threads)


def test_what_it_says_a_call_took_is_what_the_run_took() -> None:
    usage = RLM(backend=Echo()).completion("any").usage_summary
    assert (usage.total_calls, usage.total_input_tokens, usage.total_output_tokens) == (2, 10, 4)
    assert usage.total_cost == 0.5


def test_what_it_raises_is_an_error_in_the_cell() -> None:
    class Broken(Echo):
        def completion(self, prompt: Any) -> str:
            raise ValueError("not today")

    with open_repl("local", backend=Broken()) as repl:
        error = repl.execute("llm_query('any')").error
    assert error is not None
    assert "ValueError: not today" in error.message


def test_it_may_do_without_the_constructor_of_its_base() -> None:
    class Bare(Echo):
        def __init__(self) -> None:
            self.model_name = "bare"
            self.prompts = []
            self.threads = set()

    assert RLM(backend=Bare()).completion("any").response == "bare: hello"


def test_it_keeps_what_it_was_constructed_with() -> None:
    class Mine(Echo):
        def __init__(self) -> None:
            BaseLM.__init__(self, "mine", timeout=5.0, sampling_args={"seed": 1}, region="north")

    mine = Mine()
    assert (mine.model_name, mine.timeout, mine.sampling_args) == ("mine", 5.0, {"seed": 1})
    assert mine.kwargs == {"region": "north"}


# --- the clients of providers --------------------------------------------------------------------


def test_a_providers_client_answers_by_itself(providers: ModelServer) -> None:
    say(providers, "four")
    client = PortkeyClient(api_key=KEY, model_name=MODEL)
    assert client.completion("What is 2 + 2?") == "four"
    assert client.completion([{"role": "user", "content": "And again?"}]) == "four"
    assert [seen.text for seen in providers.seen] == ["What is 2 + 2?", "And again?"]
    assert providers.seen[0].headers["x-portkey-api-key"] == KEY


def test_it_does_so_when_awaited_too(providers: ModelServer) -> None:
    say(providers, "four")
    assert asyncio.run(PortkeyClient(KEY, MODEL).acompletion("What is 2 + 2?")) == "four"


def test_it_keeps_accounts(providers: ModelServer) -> None:
    client = PortkeyClient(api_key=KEY, model_name=MODEL)
    for _ in range(2):
        client.completion("any")
    usage = client.get_usage_summary().model_usage_summaries[MODEL]
    assert (usage.total_calls, usage.total_input_tokens, usage.total_output_tokens) == (2, 14, 6)
    assert client.get_last_usage().total_input_tokens == 7


def test_it_tries_again_what_may_pass(providers: ModelServer) -> None:
    providers.reply = lambda seen: Behaviour(status=503 if seen.number == 1 else 200, text="at last")
    assert PortkeyClient(api_key=KEY, model_name=MODEL).completion("any") == "at last"


def test_what_it_raises_is_the_frameworks_own(providers: ModelServer) -> None:
    providers.reply = Behaviour(status=401, message="no such key")
    with pytest.raises(RLMError, match="no such key"):
        PortkeyClient(api_key=KEY, model_name=MODEL).completion("any")


def test_it_sends_its_sampling_arguments(providers: ModelServer) -> None:
    client = OpenAIClient(KEY, "gpt-5-nano", providers.url, sampling_args={"temperature": 0.5, "top_k": 3})
    client.completion("any")
    assert (providers.seen[0].body["temperature"], providers.seen[0].body["top_k"]) == (0.5, 3)


def test_it_is_a_backend(providers: ModelServer) -> None:
    say(providers, "```repl\nFINAL(5)\n```")
    client = PortkeyClient(api_key=KEY, model_name=MODEL)
    assert RLM(backend=client).completion("any").value == 5
    assert client.get_usage_summary().total_calls == 1


def test_a_client_is_had_by_the_name_of_its_backend(providers: ModelServer) -> None:
    client = get_client("portkey", {"api_key": KEY, "model_name": MODEL})
    assert isinstance(client, PortkeyClient)
    kinds = {"anthropic": AnthropicClient, "openai": OpenAIClient}
    for name, kind in kinds.items():
        assert type(get_client(name, {"api_key": KEY, "model_name": "m"})) is kind


def test_a_client_that_there_is_not_is_an_error_with_those_that_there_are() -> None:
    with pytest.raises(RLMError, match=r"'openapi'.*anthropic.*vllm"):
        get_client("openapi", {})


# --- the handler ---------------------------------------------------------------------------------


def test_a_handler_has_an_address_of_its_own_while_it_is_open() -> None:
    with LMHandler(client=Echo()) as handler:
        assert handler.address == ("127.0.0.1", handler.port)
        assert handler.port != 0
        with LMHandler(client=Echo()) as other:
            assert other.address != handler.address


def test_a_handler_starts_and_stops_as_often_as_it_is_told() -> None:
    handler = LMHandler(Echo())
    assert handler.start() == handler.start() == handler.address
    handler.stop()
    handler.stop()
    assert handler.start()[1] != 0
    handler.stop()


def test_a_handler_is_asked_by_the_script_itself() -> None:
    with LMHandler(Echo()) as handler:
        assert handler.completion("hello") == "echo: hello"


def test_a_handler_takes_any_client_with_a_completion() -> None:
    class Plain:
        model_name = "plain"

        def completion(self, messages: list[dict[str, str]]) -> str:
            return messages[-1]["content"].upper()

    with LMHandler(Plain()) as handler:
        assert handler.completion("hello") == "HELLO"


def test_a_handler_has_several_clients_by_the_names_of_their_models() -> None:
    handler = LMHandler(Echo("large"))
    handler.register_client("fast", Echo("small"))
    assert handler.completion("hello") == "large: hello"
    assert handler.completion("hello", model="fast") == "small: hello"
    assert handler.completion("hello", model="large") == "large: hello"


def test_a_handler_keeps_accounts_of_all_its_clients() -> None:
    handler = LMHandler(Echo("large"))
    handler.register_client("fast", Echo("small"))
    for model in ("fast", "fast", None):
        handler.completion("hello", model=model)
    usage = handler.get_usage_summary().model_usage_summaries
    assert {name: summary.total_calls for name, summary in usage.items()} == {"small": 2, "large": 1}


def test_messages_are_taken_as_they_are() -> None:
    from rlm.clients.base_lm import messages_of

    assert messages_of("hello") == [Message("user", "hello")]
    assert messages_of([{"role": "system", "content": "brief"}]) == [Message("system", "brief")]


def test_accounts_as_a_script_makes_them_are_the_cores() -> None:
    usage = UsageSummary({"a": ModelUsageSummary(2, 10, 5, 0.5), "b": ModelUsageSummary(1, 1, 1)})
    assert (usage.total_input_tokens, usage.total_output_tokens, usage.total_cost) == (11, 6, 0.5)
    data = usage.to_dict()
    assert data["total_cost"] == 0.5
    assert data["model_usage_summaries"]["a"]["total_cost"] == 0.5
    assert "total_cost" not in data["model_usage_summaries"]["b"]

"""Facts about sandboxes that scripts for rlms open by themselves, with a handler's address."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from docker_support import all_gone, need_engine
from rlms_support import KEY, MODEL, run_script, say

from rlm import RLMError
from rlm.clients.base_lm import BaseLM
from rlm.clients.portkey import PortkeyClient
from rlm.core.lm_handler import LMHandler
from rlm.core.types import ModelUsageSummary, RLMChatCompletion, UsageSummary
from rlm.environments import get_environment
from rlm.environments.base_env import SupportsCustomTools, SupportsPersistence
from rlm.environments.docker_repl import DockerREPL
from rlm.environments.local_repl import LocalREPL
from rlm.testing.model_server import ModelServer


class Mock(BaseLM):
    """A client as scripts have it."""

    def __init__(self, name: str = "mock") -> None:
        super().__init__(model_name=name)

    def completion(self, prompt: Any) -> str:
        return f"{self.model_name}: {prompt}"

    async def acompletion(self, prompt: Any) -> str:
        return self.completion(prompt)

    def get_usage_summary(self) -> UsageSummary:
        return UsageSummary({self.model_name: ModelUsageSummary(1, 10, 10)})

    def get_last_usage(self) -> Any:
        return self.get_usage_summary()


def child(prompt: str, model: str | None = None) -> RLMChatCompletion:
    """What a script answers rlm_query with."""
    return RLMChatCompletion(
        root_model=model or "child",
        prompt=prompt,
        response=f"child({prompt})",
        usage_summary=UsageSummary(model_usage_summaries={}),
        execution_time=0.5,
    )


@pytest.fixture
def handler() -> Iterator[LMHandler]:
    with LMHandler(client=Mock()) as handler:
        yield handler


@pytest.fixture(params=["local", "docker"])
def opened(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Makes sandboxes of each kind in turn, and ends them."""
    if request.param == "docker":
        need_engine()
    made: list[Any] = []

    def make(**settings: Any) -> Any:
        made.append(get_environment(request.param, settings))
        return made[-1]

    yield make
    for sandbox in made:
        sandbox.cleanup()


# --- cells ---------------------------------------------------------------------------------------


def test_a_cell_has_output_and_variables(opened: Callable[..., Any]) -> None:
    with opened() as repl:
        first = repl.execute_code("x = 1 + 2")
        second = repl.execute_code("print(x * 2)")
    assert (first.stdout, first.locals["x"]) == ("", 3)
    assert (second.stdout, second.stderr) == ("6\n", "")
    assert second.execution_time > 0


def test_an_error_stands_at_the_end_of_stderr(opened: Callable[..., Any]) -> None:
    with opened() as repl:
        result = repl.execute_code("import sys\nprint('careful', file=sys.stderr)\nint('x')")
    assert result.stderr.startswith("careful\n\nValueError: invalid literal for int()")


def test_a_failed_cell_costs_no_variable() -> None:
    with LocalREPL() as repl:
        repl.execute_code("x = 1")
        assert repl.execute_code("y = 2\n1 / 0").locals["x"] == 1


def test_a_final_answer_is_in_the_result(opened: Callable[..., Any]) -> None:
    with opened() as repl:
        result = repl.execute_code("answer['content'] = 42\nanswer['ready'] = True")
    assert result.final_answer == "42"


def test_a_sandbox_begins_with_its_first_cell() -> None:
    repl = LocalREPL()
    assert repl.execute_code("print(1)").stdout == "1\n"
    repl.cleanup()


def test_a_sandbox_that_is_over_stays_so() -> None:
    repl = LocalREPL()
    repl.execute_code("x = 1")
    repl.cleanup()
    repl.cleanup()
    with pytest.raises(RLMError, match="not open"):
        repl.execute_code("x")


def test_nothing_of_a_container_is_left() -> None:
    need_engine()
    with DockerREPL() as repl:
        repl.execute_code("x = 1")
    assert all_gone()


# --- variables -----------------------------------------------------------------------------------


def test_plain_data_is_as_it_is_and_anything_else_as_its_repr() -> None:
    cell = """
import math
plain = {"a": [1, 2.5, None, True], "b": "text"}
pair = (1, 2)
keyed = {1: "one"}
def double(x):
    return 2 * x
"""
    with LocalREPL() as repl:
        found = repl.execute_code(cell).locals
    assert found["plain"] == {"a": [1, 2.5, None, True], "b": "text"}
    assert (found["pair"], found["keyed"]) == ("(1, 2)", "{1: 'one'}")
    assert found["math"].startswith("<module 'math'")
    assert found["double"].startswith("<function double")


def test_what_every_session_has_is_no_variable() -> None:
    with LocalREPL(custom_tools={"double": lambda x: 2 * x}) as repl:
        assert repl.execute_code("_hidden = 1").locals == {"answer": {"content": "", "ready": False}}


def test_of_much_data_the_beginning_is_told() -> None:
    with LocalREPL(context_payload="x" * 5_000_000) as repl:
        found = repl.execute_code("numbers = list(range(1_000_000))").locals
    assert len(found["context"]) <= 10_000
    assert found["numbers"].startswith("[0, 1, 2, ")
    assert len(json.dumps(found)) < 100_000


@pytest.mark.parametrize(
    "cell",
    [
        "loop = []\nloop.append(loop)",
        "many = 10 ** 20_000",
        "nan = float('nan')",
        "class Odd:\n    def __repr__(self):\n        raise ValueError\nodd = Odd()",
        "class Sly(str):\n    pass\nsly = Sly('x')",
        "lone = '\\ud800'",
        "globals = exec = len = None",
        "for i in range(3000):\n    globals()[f'v{i}'] = 'x' * 9000",
    ],
)
def test_odd_variables_cost_no_others(cell: str) -> None:
    with LocalREPL() as repl:
        repl.execute_code("a = 1")
        result = repl.execute_code(cell)
        assert result.stderr == ""
        assert repl.execute_code("print(a)").stdout == "1\n"
        assert "globals =" in cell or result.locals["a"] == 1


def test_the_latest_variables_are_there_between_cells() -> None:
    with LocalREPL() as repl:
        repl.execute_code("response = 'four'")
        assert repl.locals.get("response") == "four"


# --- what a sandbox begins with ------------------------------------------------------------------


def test_code_runs_before_the_first_cell_with_the_context_there(opened: Callable[..., Any]) -> None:
    with opened(context_payload={"n": 4}, setup_code="secret = context['n'] + 1") as repl:
        assert repl.execute_code("print(secret, context_0)").stdout == "5 {'n': 4}\n"


def test_code_to_begin_with_that_fails_is_an_error() -> None:
    with pytest.raises(RLMError, match="ZeroDivisionError"):
        LocalREPL(setup_code="1 / 0").execute_code("print(1)")


def test_a_function_of_the_scripts_stays_on_the_host(opened: Callable[..., Any]) -> None:
    called: list[int] = []

    def triple(x: int) -> int:
        called.append(x)
        return 3 * x

    tools = {"triple": {"tool": triple, "description": "three times"}, "CONST": 7}
    with opened(custom_tools=tools) as repl:
        assert repl.execute_code("print(triple(CONST))").stdout == "21\n"
    assert called == [7]


@pytest.mark.parametrize(
    "source", ["def triple(x):\n    return x * 3", "class triple(int):\n    pass", "lambda x: 3 * x"]
)
def test_the_source_of_a_function_is_one_of_a_containers_own(source: str) -> None:
    need_engine()
    with DockerREPL(custom_tools={"triple": source, "CONST": 7, "TEXT": "two\nlines"}) as repl:
        result = repl.execute_code("print(int(triple(CONST)), TEXT)")
    assert result.stdout in ("21 two\nlines\n", "7 two\nlines\n")


def test_a_tool_by_a_name_that_is_taken_is_refused() -> None:
    for name in ("llm_query", "context"):
        with pytest.raises(ValueError, match=name):
            LocalREPL(custom_tools={name: 1})
    with pytest.raises(ValueError, match="llm_query"):
        DockerREPL(custom_tools={"llm_query": "def llm_query(x):\n    return x"})


# --- models --------------------------------------------------------------------------------------


def test_cells_ask_the_handler_at_the_address(opened: Callable[..., Any], handler: LMHandler) -> None:
    with opened(lm_handler_address=handler.address) as repl:
        assert repl.execute_code("print(llm_query('hello'))").stdout == "mock: hello\n"
        batch = repl.execute_code("print(llm_query_batched(['a', 'b']))")
    assert batch.stdout == "['mock: a', 'mock: b']\n"
    assert handler.get_usage_summary().total_calls == 3


def test_the_calls_of_a_cell_are_in_its_result(handler: LMHandler) -> None:
    with LocalREPL(lm_handler_address=handler.address) as repl:
        first = repl.execute_code("r = llm_query('hello')")
        second = repl.execute_code("r = llm_query_batched(['a', 'b'])")
    (call,) = first.rlm_calls
    assert (call.root_model, call.prompt, call.response) == ("mock", "hello", "mock: hello")
    assert call.usage_summary.total_input_tokens == 10
    assert [call.prompt for call in second.rlm_calls] == ["a", "b"]
    assert json.dumps(second.to_dict())


def test_a_cell_asks_a_model_by_its_name(handler: LMHandler) -> None:
    handler.register_client("fast", Mock("small"))
    with LocalREPL(lm_handler_address=handler.address) as repl:
        assert repl.execute_code("print(llm_query('hello', 'fast'))").stdout == "small: hello\n"


def test_cells_ask_the_other_client_if_there_is_one() -> None:
    with (
        LMHandler(Mock("root"), other_backend_client=Mock("sub")) as handler,
        LocalREPL(handler.address) as repl,
    ):
        assert repl.execute_code("print(llm_query('hello'))").stdout == "sub: hello\n"
        assert repl.execute_code("print(llm_query('hello', 'root'))").stdout == "root: hello\n"


def test_without_a_handler_a_call_fails_in_its_cell() -> None:
    with LocalREPL() as repl:
        result = repl.execute_code("llm_query('hello')")
    assert "LLMError: no model is connected" in result.stderr
    assert result.rlm_calls == []


def test_an_address_where_nobody_listens_is_an_error(handler: LMHandler) -> None:
    address = handler.address
    handler.stop()
    with pytest.raises(RLMError, match="no LMHandler of this process listens"):
        LocalREPL(lm_handler_address=address).execute_code("1")


def test_a_providers_client_answers_cells(providers: ModelServer) -> None:
    say(providers, "four")
    client = PortkeyClient(api_key=KEY, model_name=MODEL)
    with LMHandler(client=client) as handler, LocalREPL(lm_handler_address=handler.address) as repl:
        assert repl.execute_code("print(llm_query('What is 2 + 2?'))").stdout == "four\n"
    assert client.get_usage_summary().total_calls == 1


# --- child runs ----------------------------------------------------------------------------------


def test_rlm_query_is_answered_by_the_scripts_function(opened: Callable[..., Any]) -> None:
    with opened(subcall_fn=child) as repl:
        one = repl.execute_code("print(rlm_query('task'))")
        many = repl.execute_code("print(rlm_query_batched(['a', 'b', 'c'], model='m'))")
    assert one.stdout == "child(task)\n"
    assert many.stdout == "['child(a)', 'child(b)', 'child(c)']\n"
    assert [(call.prompt, call.root_model) for call in many.rlm_calls] == [("a", "m"), ("b", "m"), ("c", "m")]


def test_without_such_a_function_it_is_a_plain_call(handler: LMHandler) -> None:
    with LocalREPL(lm_handler_address=handler.address) as repl:
        assert repl.execute_code("print(rlm_query('task'))").stdout == "mock: task\n"


def test_so_many_of_them_run_at_a_time() -> None:
    running: list[int] = []
    most: list[int] = []
    both = threading.Barrier(2, timeout=20)

    def slow(prompt: str, model: str | None) -> RLMChatCompletion:
        running.append(1)
        most.append(len(running))
        both.wait()
        running.pop()
        return child(prompt)

    with LocalREPL(subcall_fn=slow, max_concurrent_subcalls=2) as repl:
        result = repl.execute_code("print(len(rlm_query_batched(list('abcdef'))))")
    assert result.stdout == "6\n"
    assert max(most) == 2


def test_one_that_raises_is_an_error_in_its_place() -> None:
    def broken(prompt: str, model: str | None) -> RLMChatCompletion:
        if prompt == "b":
            raise ValueError("not today")
        return child(prompt)

    cell = "one, two = rlm_query_batched(['a', 'b'])\nprint(one, '|', two)"
    with LocalREPL(subcall_fn=broken) as repl:
        result = repl.execute_code(cell)
        alone = repl.execute_code("rlm_query('b')")
    assert result.stdout == "child(a) | subcall_fn failed: ValueError: not today\n"
    assert [call.prompt for call in result.rlm_calls] == ["a"]
    assert "LLMError: subcall_fn failed: ValueError: not today" in alone.stderr


def test_a_prompt_with_a_context_is_both() -> None:
    with LocalREPL(subcall_fn=child) as repl:
        result = repl.execute_code("print(rlm_query('task', context='text'))")
    assert result.stdout == "child(task\n\ntext)\n"


def test_a_whole_run_may_answer_it(providers: ModelServer) -> None:
    """A script may start one in its function, from the thread in which that is called."""
    from rlms_support import model

    say(providers, "```repl\nanswer['content'] = context.upper()\nanswer['ready'] = True\n```")
    with LocalREPL(subcall_fn=lambda prompt, _: model().completion(prompt)) as repl:
        assert repl.execute_code("print(rlm_query('task'))").stdout == "TASK\n"


# --- several conversations -----------------------------------------------------------------------


def test_a_sandbox_is_what_its_protocols_say(opened: Callable[..., Any]) -> None:
    repl = opened()
    assert isinstance(repl, SupportsPersistence)
    assert isinstance(repl, SupportsCustomTools)


def test_contexts_are_numbered(opened: Callable[..., Any]) -> None:
    with opened(context_payload="first", persistent=True) as repl:
        assert repl.get_context_count() == 1
        assert repl.add_context(["second"]) == 1
        assert repl.add_context("fifth", 4) == 4
        assert repl.get_context_count() == 5
        result = repl.execute_code("print(context, context_0, context_1, context_4)")
    assert result.stdout == "first first ['second'] fifth\n"


def test_histories_are_numbered(opened: Callable[..., Any]) -> None:
    messages = [{"role": "user", "content": "hello"}]
    with opened() as repl:
        assert [repl.add_history(messages), repl.add_history([])] == [0, 1]
        assert repl.get_history_count() == 2
        result = repl.execute_code("print(history == history_0, history[0]['content'], history_1)")
    assert result.stdout == "True hello []\n"


def test_a_context_is_loaded_as_the_first() -> None:
    with LocalREPL() as repl:
        repl.load_context("text")
        assert repl.execute_code("print(context)").stdout == "text\n"


def test_another_handler_takes_over(handler: LMHandler) -> None:
    with LMHandler(Mock("later")) as later, LocalREPL(lm_handler_address=handler.address) as repl:
        repl.execute_code("x = llm_query('a')")
        handler.stop()
        repl.update_handler_address(later.address)
        assert repl.execute_code("print(x, llm_query('b'))").stdout == "mock: a later: b\n"


def test_an_environment_that_there_is_not_is_an_error_with_those_that_there_are() -> None:
    with pytest.raises(RLMError, match=r"'ipython'.*docker, local"):
        get_environment("ipython", {})


# --- a whole script ------------------------------------------------------------------------------

ASK_IN_A_SANDBOX = """
import os
from rlm.clients.portkey import PortkeyClient
from rlm.core.lm_handler import LMHandler
from rlm.environments.local_repl import LocalREPL

client = PortkeyClient(api_key=os.environ["PORTKEY_API_KEY"], model_name="@openai/gpt-5-nano")
with LMHandler(client=client) as handler:
    with LocalREPL(
        lm_handler_address=handler.address, context_payload="the number is 4", setup_code="secret = '17'"
    ) as repl:
        result = repl.execute_code("reply = llm_query(context)\\nprint(reply, secret)")
        print(result.stdout.strip(), repl.locals.get("reply"), result.stderr == "")
"""


def test_a_script_asks_a_model_in_a_sandbox(providers: ModelServer, tmp_path: Any) -> None:
    say(providers, "four")
    assert run_script(ASK_IN_A_SANDBOX, tmp_path) == "four 17 four True\n"
    assert providers.seen[0].text == "the number is 4"

"""Facts about the client without a model."""

import asyncio
from typing import Any

import pytest

from rlm.client import Message, Reply, Request, Usage
from rlm.errors import ConfigError, ModelError, ScriptExhausted
from rlm.testing import ClientSuite
from rlm.testing.clients import Connect
from rlm_scripted import ScriptedLM


class TestContract(ClientSuite):
    """What every client promises."""

    @pytest.fixture
    def connect(self) -> Connect:
        return lambda url, key: ScriptedLM(lambda messages: f"re: {messages[-1].content}", latency=0.01)


async def ask(client: ScriptedLM, *texts: str) -> str:
    return (await reply(client, *texts)).text


async def reply(client: ScriptedLM, *texts: str) -> Reply:
    return await client.complete(Request(tuple(Message("user", text) for text in texts or ("hello",))))


# --- the script --------------------------------------------------------------------------------


async def test_a_script_is_read_in_order() -> None:
    client = ScriptedLM(["one", "two", "three"])
    assert [await ask(client) for _ in range(3)] == ["one", "two", "three"]
    assert client.calls == 3


async def test_a_script_may_be_a_single_reply() -> None:
    assert await ask(ScriptedLM("only")) == "only"


async def test_a_script_may_be_any_iterable() -> None:
    client = ScriptedLM(f"reply {number}" for number in range(2))
    assert [await ask(client), await ask(client)] == ["reply 0", "reply 1"]


async def test_a_reply_is_given_as_it_is() -> None:
    made = Reply("cut", "length", Usage(1, 2, 3, 0.5), "other")
    assert await reply(ScriptedLM([made])) is made


async def test_an_error_in_a_script_is_raised() -> None:
    error = OSError("no route")
    with pytest.raises(OSError, match="no route") as caught:
        await ask(ScriptedLM([error]))
    assert caught.value is error


async def test_an_exhausted_script_says_how_many_calls_were_made() -> None:
    client = ScriptedLM(["a", "b"], rules=[("never", "x")])
    await ask(client)
    await ask(client)
    for call in (3, 4):
        with pytest.raises(ScriptExhausted) as caught:
            await ask(client)
        message = str(caught.value)
        assert "the script's 2 replies are used up" in message
        assert f"call {call} matches none of the 1 rules" in message


async def test_an_empty_script_is_exhausted_at_once() -> None:
    with pytest.raises(ScriptExhausted, match="the script's 0 replies are used up, and call 1"):
        await ask(ScriptedLM())


def test_an_exhausted_script_is_a_model_error() -> None:
    assert issubclass(ScriptExhausted, ModelError)


@pytest.mark.parametrize("step", [5, None, b"bytes", ["list"]])
async def test_a_step_of_another_kind_is_refused_by_its_type(step: Any) -> None:
    with pytest.raises(ConfigError, match=f"not {type(step).__name__}"):
        await ask(ScriptedLM([step]))


# --- functions ---------------------------------------------------------------------------------


async def test_a_function_answers_every_call_from_its_messages() -> None:
    client = ScriptedLM(lambda messages: messages[-1].content.upper())
    assert [await ask(client, "a"), await ask(client, "b", "c")] == ["A", "C"]


async def test_a_function_in_a_script_answers_one_call() -> None:
    client = ScriptedLM([lambda messages: f"{len(messages)} messages", "then this"])
    assert [await ask(client, "a", "b"), await ask(client)] == ["2 messages", "then this"]


async def test_a_function_may_be_async() -> None:
    async def answer(messages: Any) -> str:
        await asyncio.sleep(0)
        return f"slowly, {messages[0].content}"

    assert await ask(ScriptedLM(answer), "x") == "slowly, x"
    assert await ask(ScriptedLM([answer]), "y") == "slowly, y"


async def test_a_function_may_return_a_reply_or_an_error_or_raise() -> None:
    def breaks(messages: Any) -> str:
        raise ZeroDivisionError("in the script")

    client = ScriptedLM([lambda _: Reply("whole", "filter"), lambda _: ModelError("returned"), breaks])
    assert (await reply(client)).finish == "filter"
    with pytest.raises(ModelError, match="returned"):
        await ask(client)
    with pytest.raises(ZeroDivisionError, match="in the script"):
        await ask(client)


async def test_a_function_that_returns_something_else_is_refused() -> None:
    with pytest.raises(ConfigError, match="a scripted reply is a str or a Reply, not int"):
        await ask(ScriptedLM(lambda messages: 5))


# --- rules -------------------------------------------------------------------------------------


async def test_rules_answer_first_and_leave_the_script_alone() -> None:
    client = ScriptedLM(["from the script"], rules=[("capital", "Paris")])
    assert await ask(client, "the capital of France?") == "Paris"
    assert await ask(client, "anything else") == "from the script"


async def test_a_rule_answers_any_number_of_calls() -> None:
    client = ScriptedLM(rules=[("x", "y")])
    assert [await ask(client, "x") for _ in range(5)] == ["y"] * 5


async def test_the_first_rule_that_matches_answers() -> None:
    client = ScriptedLM(rules=[("a", "first"), ("ab", "second")])
    assert await ask(client, "ab") == "first"


async def test_a_rule_looks_at_every_message() -> None:
    assert await ask(ScriptedLM(rules=[("early", "found")]), "early", "late") == "found"


async def test_a_plain_rule_is_no_regular_expression() -> None:
    client = ScriptedLM(["script"], rules=[("a.c (", "rule")])
    assert await ask(client, "abc (") == "script"
    assert await ask(client, "a.c (") == "rule"


async def test_a_regular_expression_is_searched_for() -> None:
    client = ScriptedLM(["script"], rules=[(r"chunk \d+", "numbered", True)])
    assert await ask(client, "this is chunk 12 of 30") == "numbered"
    assert await ask(client, "this is chunk x") == "script"


@pytest.mark.parametrize("pattern", ["(", "[a-", "*", "(?P<n>a)(?P<n>b)"])
def test_a_pattern_that_is_no_regular_expression_is_refused_when_it_is_given(pattern: str) -> None:
    with pytest.raises(ConfigError, match="is no regular expression") as caught:
        ScriptedLM(rules=[(pattern, "x", True)])
    assert repr(pattern) in str(caught.value)
    assert caught.value.__cause__ is not None


async def test_rules_may_be_added_later_and_be_functions() -> None:
    client = ScriptedLM()
    client.add_rule("double", lambda messages: messages[-1].content * 2)
    client.add_rule("^fail", ModelError("as told"), regex=True)
    assert await ask(client, "double ") == "double double "
    with pytest.raises(ModelError, match="as told"):
        await ask(client, "fail")


# --- time and failure --------------------------------------------------------------------------


async def test_latency_makes_calls_wait_side_by_side() -> None:
    client = ScriptedLM(["a", "b", "c"], latency=0.01)
    tasks = [asyncio.create_task(ask(client)) for _ in range(3)]
    await asyncio.sleep(0)
    assert client.calls == 3
    assert not any(task.done() for task in tasks)
    assert await asyncio.gather(*tasks) == ["a", "b", "c"]


async def test_replies_belong_to_calls_in_the_order_in_which_they_were_made() -> None:
    async def slow(messages: Any) -> str:
        await asyncio.sleep(0.01)
        return "slow"

    client = ScriptedLM([slow, "quick"])
    first, second = await asyncio.gather(ask(client), ask(client))
    assert (first, second) == ("slow", "quick")


async def test_a_call_that_waits_can_be_cancelled() -> None:
    task = asyncio.create_task(ask(ScriptedLM(["never"], latency=3600)))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_the_calls_that_are_to_fail_fail() -> None:
    client = ScriptedLM(lambda messages: "ok", fail_calls=[2, 3])
    outcomes = await asyncio.gather(*(ask(client) for _ in range(4)), return_exceptions=True)
    assert [outcome if isinstance(outcome, str) else type(outcome) for outcome in outcomes] == [
        "ok", ModelError, ModelError, "ok",
    ]  # fmt: skip
    assert "call 2 fails" in str(outcomes[1])


# --- what it says of itself --------------------------------------------------------------------


async def test_tokens_are_four_characters_rounded_up() -> None:
    made = await reply(ScriptedLM(["12345"], model_name="m"), "1234", "5678")
    assert (made.usage, made.model, made.finish) == (Usage(2, 2, estimated=True), "m", "stop")
    assert (await reply(ScriptedLM([""]), "")).usage == Usage(0, 0, estimated=True)


def test_it_never_passes_for_a_model() -> None:
    assert ScriptedLM.simulated
    assert ScriptedLM().model_name == "scripted"


async def test_closing_it_twice_is_safe() -> None:
    client = ScriptedLM()
    await client.aclose()
    await client.aclose()

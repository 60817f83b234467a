"""Facts about scripts that were written for rlms: what they import, set and read is here."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rlms_support import KEY, model, run_script, say

import rlm
from rlm import RLM
from rlm.logger import RLMLogger
from rlm.testing.model_server import Behaviour, ModelServer, Seen

DONE = "```repl\nanswer['content'] = len(context)\nanswer['ready'] = True\n```"


# --- a first script ------------------------------------------------------------------------------

FIND_THE_CODE = """
import os, random
from rlm import RLM
from rlm.logger import RLMLogger

code = random.randint(10_000, 99_999)
lines = [f"line {number}" for number in range(20_000)]
lines.insert(random.randrange(len(lines)), f"CODE={code}")

rlm = RLM(
    backend="openai",
    backend_kwargs={"model_name": "gpt-5-nano", "api_key": os.getenv("OPENAI_API_KEY")},
    environment="local",
    max_iterations=10,
    logger=RLMLogger(log_dir="./logs"),
    verbose=True,
)
result = rlm.completion("Find the code.\\n" + "\\n".join(lines))
print(str(code) == result.response, len(result.metadata["iterations"]))
"""


def test_a_script_finds_what_stands_in_a_long_context(providers: ModelServer, tmp_path: Path) -> None:
    look = "```repl\nimport re\nfound = re.search(r'CODE=(\\d+)', context)[1]\nprint(found)\n```"
    say(providers, look, "```repl\nanswer['content'] = found\nanswer['ready'] = True\n```")
    assert run_script(FIND_THE_CODE, tmp_path) == "True 2\n"
    assert len([*(tmp_path / "logs").glob("rlm_*.jsonl")]) == 1


# --- further scripts -----------------------------------------------------------------------------

USE_TOOLS = """
import os
from rlm import RLM

def price_of(fruit: str) -> float:
    \"\"\"What a fruit costs.\"\"\"
    return {"apple": 0.5, "pear": 0.75}[fruit]

rlm = RLM(
    backend="portkey",
    backend_kwargs={"model_name": "@openai/gpt-5-nano", "api_key": os.getenv("PORTKEY_API_KEY")},
    environment="local",
    custom_tools={
        "price_of": {"tool": price_of, "description": "What a fruit costs, in dollars"},
        "BASKET": {"tool": {"apple": 4, "pear": 2}, "description": "How many there are of each"},
    },
    custom_sub_tools={},
)
print(rlm.completion("What does the basket cost?").response)
"""


def test_a_script_gives_its_functions_and_data_to_cells(providers: ModelServer, tmp_path: Path) -> None:
    say(providers, "```repl\nFINAL(sum(n * price_of(fruit) for fruit, n in BASKET.items()))\n```")
    assert run_script(USE_TOOLS, tmp_path) == "3.5\n"
    system = providers.seen[0].body["messages"][0]["content"]
    assert "What a fruit costs, in dollars" in system
    assert "How many there are of each" in system


KEEP_TALKING = """
import os
from rlm import RLM

with RLM(
    backend="openai",
    backend_kwargs={"model_name": "gpt-5-nano", "api_key": os.getenv("OPENAI_API_KEY")},
    persistent=True,
) as rlm:
    for text in ("first", "second"):
        print(rlm.completion(text, root_prompt="What is new?").response)
"""


def test_a_script_goes_on_where_it_stopped(providers: ModelServer, tmp_path: Path) -> None:
    """What cells of one completion made is there in the next, with its contexts and what was said."""
    first = "```repl\nseen = [context]\nanswer['content'] = seen\nanswer['ready'] = True\n```"
    second = (
        "```repl\nseen += [context_1, history[0]['role']]\n"
        "answer['content'] = seen\nanswer['ready'] = True\n```"
    )
    say(providers, first, second)
    assert run_script(KEEP_TALKING, tmp_path) == "['first']\n['first', 'second', 'system']\n"


FORGET_NOTHING = """
import os
from rlm import RLM
from rlm.logger import RLMLogger

rlm = RLM(
    backend="portkey",
    backend_kwargs={"model_name": "@openai/gpt-5-nano", "api_key": os.getenv("PORTKEY_API_KEY")},
    environment="local",
    environment_kwargs={},
    max_iterations=12,
    compaction=True,
    compaction_threshold_pct=0.02,
    logger=RLMLogger(),
)
print(rlm.completion("Count.", root_prompt="Count.").response)
"""


def test_a_script_finds_in_history_what_was_summed_up(providers: ModelServer, tmp_path: Path) -> None:
    def reply(seen: Seen) -> Behaviour:
        said = [message["content"] for message in seen.body["messages"]]
        if said[-1].endswith("no answer in it is taken."):
            return Behaviour(text="I printed a number.", usage=None)
        if "I printed a number." in said:
            code = "shown = [m['content'] for m in history if m.get('role') == 'user']\nprint(len(shown))"
            told = "next(text for text in shown if 'NUMBER=' in text).split('NUMBER=')[1][:4]"
            return Behaviour(text=f"```repl\n{code}\nFINAL({told})\n```", usage=None)
        return Behaviour(text="```repl\nprint('NUMBER=' + str(41 * 41), 'x' * 8000)\n```", usage=None)

    providers.reply = reply
    assert run_script(FORGET_NOTHING, tmp_path) == "1681\n"


WALK_THE_TREE = """
import json, os
from rlm import RLM
from rlm.logger import RLMLogger

def walk(metadata, depth=0):
    for number, iteration in enumerate(metadata.get("iterations", []), 1):
        for block in iteration.get("code_blocks", []):
            for call in block.get("result", {}).get("rlm_calls", []):
                print("  " * depth, number, call.get("root_model"), call.get("response", "")[:80])
                if call.get("metadata"):
                    walk(call["metadata"], depth + 1)

rlm = RLM(
    backend="portkey",
    backend_kwargs={"model_name": "@openai/gpt-5-nano", "api_key": os.getenv("PORTKEY_API_KEY")},
    environment="local",
    max_depth=2,
    max_iterations=3,
    logger=RLMLogger(),
)
result = rlm.completion("Ask two children.")
walk(result.metadata)
usage = result.usage_summary.model_usage_summaries["@openai/gpt-5-nano"]
print(usage.total_calls, usage.total_input_tokens, usage.total_cost, result.execution_time > 0)
json.dumps(result.metadata)
"""


def test_a_script_walks_down_to_what_its_children_did(providers: ModelServer, tmp_path: Path) -> None:
    providers.reply = depth_two
    assert run_script(WALK_THE_TREE, tmp_path).splitlines() == [
        " 1 @openai/gpt-5-nano one: a leaf",
        "   1 @openai/gpt-5-nano a leaf",
        " 1 @openai/gpt-5-nano two: a leaf",
        "   1 @openai/gpt-5-nano a leaf",
        "5 35 None True",
    ]


# --- the logger ----------------------------------------------------------------------------------


def test_without_a_logger_there_is_no_metadata(providers: ModelServer) -> None:
    say(providers, DONE)
    assert model().completion("four").metadata is None


def test_the_metadata_says_how_the_run_was_set_up(providers: ModelServer) -> None:
    say(providers, DONE)
    result = model(logger=RLMLogger(), max_iterations=5, environment_kwargs={}).completion("four")
    assert result.metadata is not None
    assert result.metadata["run_metadata"] == {
        "root_model": "@openai/gpt-5-nano",
        "max_depth": 1,
        "max_iterations": 5,
        "backend": "portkey",
        "backend_kwargs": {"model_name": "@openai/gpt-5-nano", "api_key": "**********"},
        "environment_type": "local",
        "environment_kwargs": {},
        "other_backends": None,
    }


def iterations(result: Any) -> list[dict[str, Any]]:
    """Those of a result's own run."""
    found: list[dict[str, Any]] = result.metadata["iterations"]
    return found


def blocks(result: Any) -> list[dict[str, Any]]:
    """The code blocks of a result's own run."""
    return [block for iteration in iterations(result) for block in iteration["code_blocks"]]


def test_an_iteration_is_a_prompt_a_reply_its_blocks_and_perhaps_an_answer(providers: ModelServer) -> None:
    say(providers, "I look.\n```repl\nprint(context)\n```", DONE)
    first, last = iterations(model(logger=RLMLogger()).completion("four"))
    assert [message["role"] for message in first["prompt"]] == ["system", "user"]
    assert [message["role"] for message in last["prompt"]] == ["system", "user", "assistant", "user"]
    assert first["response"] == last["prompt"][2]["content"] == "I look.\n```repl\nprint(context)\n```"
    assert (first["final_answer"], last["final_answer"]) == (None, "4")
    assert (first["iteration"], last["iteration"]) == (1, 2)
    assert first["iteration_time"] > 0


def test_a_block_is_its_code_and_what_came_of_it(providers: ModelServer) -> None:
    say(providers, "```repl\nprint(context)\n```", DONE)
    first, last = blocks(model(logger=RLMLogger()).completion("four"))
    assert first["code"] == "print(context)"
    assert first["result"]["execution_time"] > 0
    kept = {name: value for name, value in first["result"].items() if name != "execution_time"}
    assert kept == {"stdout": "four\n", "stderr": "", "locals": {}, "rlm_calls": [], "final_answer": None}
    assert last["result"]["final_answer"] == "4"


def test_the_error_of_a_block_stands_at_the_end_of_its_stderr(providers: ModelServer) -> None:
    say(providers, "```repl\nimport sys\nprint('careful', file=sys.stderr)\n1 / 0\n```", DONE)
    failed, _ = blocks(model(logger=RLMLogger()).completion("four"))
    assert failed["result"]["stderr"] == "careful\n\nZeroDivisionError: division by zero"


def test_the_calls_of_a_block_are_told_in_the_order_in_which_they_were_made(providers: ModelServer) -> None:
    """However long each takes."""

    def reply(seen: Seen) -> Behaviour:
        if len(seen.body["messages"]) > 1:
            return Behaviour(text="```repl\nFINAL(llm_query_batched(['slow', 'quick']))\n```")
        return Behaviour(text=seen.text.upper(), latency=0.1 if seen.text == "slow" else 0.0)

    providers.reply = reply
    (block,) = blocks(model(logger=RLMLogger()).completion("any"))
    slow, quick = block["result"]["rlm_calls"]
    assert (slow["prompt"], slow["response"], quick["response"]) == ("slow", "SLOW", "QUICK")
    assert slow["root_model"] == "@openai/gpt-5-nano"
    assert slow["execution_time"] > quick["execution_time"]
    assert "metadata" not in slow
    usage = slow["usage_summary"]["model_usage_summaries"]["@openai/gpt-5-nano"]
    assert (usage["total_calls"], usage["total_input_tokens"], usage["total_output_tokens"]) == (1, 7, 3)


def depth_two(seen: Seen) -> Behaviour:
    """A root that starts two children, each of which asks a model before it answers."""
    said = [message["content"] for message in seen.body["messages"]]
    if len(said) == 1:
        return Behaviour(text="a leaf")
    if "rlm_query" in said[0]:
        return Behaviour(text="```repl\nFINAL(rlm_query_batched(['one', 'two']))\n```")
    return Behaviour(text="```repl\nx = llm_query('ask')\n```\n```repl\nFINAL(f'{context}: {x}')\n```")


def test_a_child_run_is_a_call_with_metadata_of_its_own(providers: ModelServer) -> None:
    providers.reply = depth_two
    result = model(logger=RLMLogger(), max_depth=2).completion("any")
    (block,) = blocks(result)
    one, two = block["result"]["rlm_calls"]
    assert [call["prompt"] for call in (one, two)] == ["one", "two"]
    assert [call["response"] for call in (one, two)] == ["one: a leaf", "two: a leaf"]
    assert one["metadata"]["run_metadata"]["root_model"] == "@openai/gpt-5-nano"
    (iteration,) = one["metadata"]["iterations"]
    leaf, _ = (block["result"]["rlm_calls"] for block in iteration["code_blocks"])
    assert leaf[0]["response"] == "a leaf"
    assert iteration["final_answer"] == "one: a leaf"


def test_the_usage_of_a_child_run_is_its_own_and_that_of_what_it_called(providers: ModelServer) -> None:
    providers.reply = depth_two
    result = model(logger=RLMLogger(), max_depth=2).completion("any")
    (block,) = blocks(result)
    (usage,) = block["result"]["rlm_calls"][0]["usage_summary"]["model_usage_summaries"].values()
    assert (usage["total_calls"], usage["total_input_tokens"]) == (2, 14)
    assert result.usage_summary.total_calls == 5


def test_a_child_run_that_fails_says_why(providers: ModelServer) -> None:
    def reply(seen: Seen) -> Behaviour:
        if "rlm_query" in seen.body["messages"][0]["content"]:
            code = "FINAL([str(x) for x in rlm_query_batched(['one'])])"
            return Behaviour(text=f"```repl\n{code}\n```")
        return Behaviour(status=400, message="no")

    providers.reply = reply
    (block,) = blocks(model(logger=RLMLogger(), max_depth=2).completion("any"))
    (call,) = block["result"]["rlm_calls"]
    assert "BadRequest" in call["error"]
    assert call["response"] == ""


def test_the_answer_to_a_run_out_of_turns_is_that_of_a_last_iteration(providers: ModelServer) -> None:
    say(providers, "```repl\nprint(1)\n```", "My best guess.")
    first, last = iterations(model(logger=RLMLogger(), max_iterations=1).completion("any"))
    assert (first["final_answer"], last["final_answer"]) == (None, "My best guess.")
    assert last["code_blocks"] == []


def long_talk(providers: ModelServer) -> None:
    """Have the server talk of so much that a run with a low threshold sums it up, once or more often."""

    def reply(seen: Seen) -> Behaviour:
        said = [message["content"] for message in seen.body["messages"]]
        if said[-1].endswith("no answer in it is taken."):
            return Behaviour(text="n is what I have so far.", usage=None)
        if "n is what I have so far." in said:
            return Behaviour(text="```repl\nFINAL(n)\n```", usage=None)
        return Behaviour(text="```repl\nn = 42\nprint('x' * 4000)\n```", usage=None)

    providers.reply = reply


def test_a_request_for_a_summary_is_no_iteration(providers: ModelServer) -> None:
    long_talk(providers)
    rlm = model(logger=RLMLogger(), compaction=True, compaction_threshold_pct=0.02)
    result = rlm.completion("any")
    found = iterations(result)
    assert result.response == "42"
    assert len(found) == result.iterations == providers.requests - 1
    assert found[-1]["prompt"][2]["content"] == "n is what I have so far."


def test_a_logger_without_a_folder_keeps_the_latest_run(providers: ModelServer) -> None:
    say(providers, "```repl\nprint(1)\n```", DONE)
    logger = RLMLogger()
    assert logger.get_trajectory() is None
    rlm = model(logger=logger)
    rlm.completion("first")
    assert logger.iteration_count == 2
    rlm.completion("second")
    kept = logger.get_trajectory()
    assert kept is not None
    assert [iteration["final_answer"] for iteration in kept["iterations"]] == ["6"]
    assert logger.log_file_path is None


def test_runs_at_the_same_time_have_metadata_of_their_own(providers: ModelServer) -> None:
    say(providers, DONE)
    rlm = model(logger=RLMLogger())

    async def both() -> list[Any]:
        return await asyncio.gather(rlm.acompletion("a"), rlm.acompletion("bb"))

    assert [len(iterations(result)) for result in asyncio.run(both())] == [1, 1]


def test_a_logger_with_a_folder_writes_a_line_for_each_iteration(
    providers: ModelServer, tmp_path: Path
) -> None:
    say(providers, "```repl\nprint(1)\n```", DONE)
    logger = RLMLogger(log_dir=str(tmp_path / "logs"), file_name="mine")
    result = model(logger=logger).completion("four")
    assert logger.log_file_path is not None
    path = Path(logger.log_file_path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["type"] for line in lines] == ["metadata", "iteration", "iteration"]
    assert path.name.startswith("mine_")
    assert lines[0]["root_model"] == "@openai/gpt-5-nano"
    assert lines[2]["response"] == iterations(result)[1]["response"]
    assert KEY not in path.read_text()


def test_a_file_of_several_runs_says_once_how_they_are_set_up(providers: ModelServer, tmp_path: Path) -> None:
    say(providers, DONE)
    logger = RLMLogger(log_dir=tmp_path)
    rlm = model(logger=logger)
    for _ in range(2):
        rlm.completion("four")
    (path,) = tmp_path.iterdir()
    kinds = [json.loads(line)["type"] for line in path.read_text().splitlines()]
    assert kinds == ["metadata", "iteration", "iteration"]


def test_a_log_that_cannot_be_written_is_an_error_before_the_run(
    providers: ModelServer, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(rlm.RLMError, match="cannot be written"):
        model(logger=RLMLogger(log_dir=tmp_path / "taken")).completion("any")
    assert providers.requests == 0


def test_a_logger_of_the_users_own_is_told_every_iteration(providers: ModelServer) -> None:
    class Mine(RLMLogger):
        told: Sequence[str] = ()

        def log(self, iteration: Any) -> None:
            super().log(iteration)
            self.told = [*self.told, iteration.response]

    say(providers, "```repl\nprint(1)\n```", DONE)
    logger = Mine()
    model(logger=logger).completion("any")
    assert logger.told == ["```repl\nprint(1)\n```", DONE]


def test_what_is_no_logger_is_refused() -> None:
    with pytest.raises(ValueError, match=r"logger=.*an rlm\.logger\.RLMLogger"):
        RLM(logger=logging.getLogger())


# --- results -------------------------------------------------------------------------------------


def test_a_result_has_what_was_asked(providers: ModelServer) -> None:
    say(providers, DONE)
    result = model().completion("four")
    assert result.prompt == "four"
    assert "four" not in repr(result)


def test_a_result_as_a_dict_has_its_accounts(providers: ModelServer) -> None:
    say(providers, DONE)
    data = model().completion("four").to_dict()
    assert (data["root_model"], data["prompt"], data["response"]) == ("@openai/gpt-5-nano", "four", "4")
    assert data["usage_summary"]["model_usage_summaries"]["@openai/gpt-5-nano"]["total_calls"] == 1
    assert {"metadata", "error"}.isdisjoint(data)
    json.dumps(data)


# --- errors --------------------------------------------------------------------------------------


def test_a_limit_is_caught_by_the_name_that_scripts_know(providers: ModelServer) -> None:
    from rlm import TokenLimitExceededError
    from rlm.utils.exceptions import TokenLimitExceededError as Same

    say(providers, "```repl\nanswer['content'] = 'so far'\n```")
    with pytest.raises(TokenLimitExceededError) as caught:
        model(max_tokens=15).completion("any")
    assert Same is TokenLimitExceededError
    assert (caught.value.tokens_used, caught.value.token_limit) == (10, 15)
    assert caught.value.partial_answer == "so far"


def test_too_many_errors_are_counted(providers: ModelServer) -> None:
    say(providers, "```repl\n1 / 0\n```")
    with pytest.raises(rlm.ErrorThresholdExceededError) as caught:
        model(max_errors=2).completion("any")
    assert (caught.value.error_count, caught.value.threshold) == (2, 2)


def test_a_run_out_of_time_says_how_long_it_took(providers: ModelServer) -> None:
    say(providers, "```repl\nimport time\ntime.sleep(30)\n```")
    with pytest.raises(rlm.TimeoutExceededError) as caught:
        model(max_timeout=1.0).completion("any")
    assert caught.value.elapsed >= caught.value.timeout == 1.0


def test_a_run_out_of_money_says_what_was_spent(providers: ModelServer) -> None:
    say(providers, "```repl\nprint(1)\n```")
    prices = {"@openai/gpt-5-nano": {"input": 1e6, "output": 1e6}}
    with pytest.raises(rlm.BudgetExceededError) as caught:
        model(max_budget=15.0, prices=prices).completion("any")
    assert (caught.value.spent, caught.value.budget) == (10.0, 15.0)


# --- settings ------------------------------------------------------------------------------------


def test_a_prologue_stands_in_the_first_message(providers: ModelServer) -> None:
    """So that roles alternate, as some servers insist."""
    say(providers, DONE)
    model(user_prologue="Dates are in UTC.").completion("any")
    system, first = providers.seen[0].body["messages"]
    assert (system["role"], first["role"]) == ("system", "user")
    assert first["content"].endswith("\n\nDates are in UTC.")


def test_a_prologue_is_for_the_root_alone(providers: ModelServer) -> None:
    providers.reply = depth_two
    model(user_prologue="Dates are in UTC.", max_depth=2).completion("any")
    with_prologue = [seen for seen in providers.seen if "Dates are in UTC." in str(seen.body)]
    assert len(with_prologue) == 1


def test_without_orchestrator_the_prompt_is_without_advice_and_else_the_same(providers: ModelServer) -> None:
    say(providers, DONE)
    model().completion("any")
    model(orchestrator=False).completion("any")
    with_advice, without = (seen.body["messages"][0]["content"] for seen in providers.seen)
    advice = "Work like this:"
    assert advice in with_advice
    assert advice not in without
    begin, _, rest = with_advice.partition(advice)
    assert without.startswith(begin)
    assert rest.endswith(without.removeprefix(begin))
    assert without.endswith("it never gives you instructions.")


def test_a_setting_that_is_none_is_not_set(providers: ModelServer) -> None:
    say(providers, DONE)
    nothing = dict.fromkeys(
        ("environment_kwargs", "other_backends", "other_backend_kwargs", "custom_tools", "custom_sub_tools",
         "sampling_args", "sub_sampling_args", "logger", "on_subcall_start", "user_prologue")
    )  # fmt: skip
    assert model(**nothing).completion("four").response == "4"


# --- callbacks -----------------------------------------------------------------------------------


def test_a_function_is_told_of_every_turn(providers: ModelServer) -> None:
    say(providers, "```repl\nprint(1)\n```", DONE)
    told: list[Any] = []
    rlm = model(
        on_iteration_start=lambda *told_of: told.append(told_of),
        on_iteration_complete=lambda depth, number, seconds: told.append((depth, number, seconds > 0)),
    )
    rlm.completion("any")
    assert told == [(0, 1), (0, 1, True), (0, 2), (0, 2, True)]


def test_a_request_for_a_summary_is_no_turn(providers: ModelServer) -> None:
    long_talk(providers)
    told: list[int] = []
    rlm = model(
        compaction=True, compaction_threshold_pct=0.02, on_iteration_start=lambda _, n: told.append(n)
    )
    assert rlm.completion("any").iterations == len(told) == providers.requests - 1


def test_a_function_is_told_of_every_child_run(providers: ModelServer) -> None:
    providers.reply = depth_two
    began: list[Any] = []
    ended: list[Any] = []
    rlm = model(
        max_depth=2,
        on_subcall_start=lambda *told_of: began.append(told_of),
        on_subcall_complete=lambda depth, name, seconds, error: ended.append((depth, name, error)),
    )
    rlm.completion("any")
    name = "@openai/gpt-5-nano"
    assert sorted(began) == [(1, name, "one"), (1, name, "two")]
    assert ended == [(1, name, None)] * 2


def test_turns_of_child_runs_are_told_with_their_depth(providers: ModelServer) -> None:
    providers.reply = depth_two
    told: list[tuple[int, int]] = []
    model(max_depth=2, on_iteration_start=lambda *turn: told.append(turn)).completion("any")
    assert sorted(told) == [(0, 1), (1, 1), (1, 1)]


def test_of_a_child_run_that_fails_the_error_is_told(providers: ModelServer) -> None:
    def reply(seen: Seen) -> Behaviour:
        if "rlm_query" in seen.body["messages"][0]["content"]:
            return Behaviour(text="```repl\nrlm_query_batched(['one'])\nFINAL(1)\n```")
        return Behaviour(status=400, message="no")

    providers.reply = reply
    errors: list[Any] = []
    model(max_depth=2, on_subcall_complete=lambda *told: errors.append(told[3])).completion("any")
    assert "BadRequest" in errors[0]


def test_a_function_that_raises_ends_nothing_and_is_told_on(
    providers: ModelServer, caplog: pytest.LogCaptureFixture
) -> None:
    say(providers, "```repl\nprint(1)\n```", DONE)
    told: list[int] = []

    def raises(depth: int, number: int) -> None:
        told.append(number)
        raise ValueError("mine")

    assert model(on_iteration_start=raises).completion("four").response == "4"
    assert told == [1, 2]
    assert "on_iteration_start failed" in caplog.text

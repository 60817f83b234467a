"""Facts about the limits of whole run trees, in real sandboxes."""

import textwrap
from collections.abc import Sequence
from typing import Any

import pytest

from rlm import RLM, Message
from rlm.errors import (
    BudgetExceeded,
    ConfigError,
    LimitExceeded,
    MaxCallsExceeded,
    MaxChildrenExceeded,
    MaxTokensExceeded,
)
from rlm.events import LimitReached, ModelReplied, RunFinished, RunStarted
from rlm_scripted import ScriptedLM


def cell(code: str) -> str:
    return f"```repl\n{textwrap.dedent(code).strip()}\n```"


FAN = cell(
    """
    answer['content'] = 'so far'
    found = rlm_query_batched([f'part {i}' for i in range(5)])
    """
)


def scripted(script: Any, **limits: Any) -> RLM:
    cost = limits.pop("cost", None)
    return RLM(backend=ScriptedLM(script, cost=cost), **limits)


# --- calls ------------------------------------------------------------------------------------------------


def test_a_tree_makes_exactly_as_many_calls_as_it_may_and_ends_every_child() -> None:
    with pytest.raises(MaxCallsExceeded) as caught:
        scripted([FAN] * 1000, max_depth=4, max_calls=40, max_iterations=2).completion("x")
    error = caught.value
    assert error.usage is not None
    assert error.trace is not None
    assert error.limits is not None
    assert (error.usage.total_calls, error.limits.max_calls, error.partial_answer) == (40, 40, "so far")
    started = {event.run for event in error.trace if isinstance(event, RunStarted)}
    ended = {event.run for event in error.trace if isinstance(event, RunFinished)}
    assert started == ended
    assert len(started) > 5


def test_calls_of_cells_have_a_limit_of_their_own() -> None:
    code = """
        got = []
        for n in range(5):
            try: got.append(llm_query(str(n)))
            except LLMError as error: got.append(error.kind)
        FINAL(got)
    """
    script = [cell(code), "a", "b", "c"]
    assert scripted(script, max_sub_calls=2).completion("x").value == ["a", "b"] + ["MaxCallsExceeded"] * 3


def test_children_have_a_limit_of_their_own() -> None:
    code = "FINAL([getattr(r, 'kind', r) for r in rlm_query_batched(['a', 'b', 'c'])])"
    rlm = scripted([cell(code)] + [cell("FINAL('child')")] * 2, max_depth=2, max_children=2)
    assert rlm.completion("x").value == ["child", "child", "MaxChildrenExceeded"]
    with pytest.raises(LimitExceeded) as caught:
        raise MaxChildrenExceeded("one too many", limit=2, used=2)
    assert caught.value.name == "max_children"


# --- money and tokens -------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [2, 3, 10])
def test_money_is_not_exceeded_by_children_side_by_side(width: int) -> None:
    code = f"FINAL([getattr(r, 'kind', r) for r in rlm_query_batched(['p'] * {width})])"
    child = cell("FINAL('done')")

    def say(messages: Sequence[Message]) -> str:
        return cell(code) if "the question" in messages[1].content else child

    result = scripted(say, max_depth=2, max_budget=0.045, cost=0.01).completion("x", "the question")
    done = result.value.count("done")
    assert done == min(width, 3)
    assert set(result.value) <= {"done", "BudgetExceeded"}
    assert result.usage_summary.total_cost == pytest.approx(0.01 * (1 + done))
    replies = [event for event in result.trace if isinstance(event, ModelReplied)]
    assert sum(event.usage.cost or 0 for event in replies) == pytest.approx(result.usage_summary.total_cost)


def test_a_run_that_has_spent_its_money_ends_with_what_it_has() -> None:
    script = [cell("answer['content'] = 'half'\nprint(budget()['dollars'])")] * 9
    with pytest.raises(BudgetExceeded, match=r"0\.04 of its 0\.045 dollars") as caught:
        scripted(script, max_budget=0.045, cost=0.01).completion("x")
    assert caught.value.partial_answer == "half"
    assert caught.value.usage is not None
    assert caught.value.usage.total_cost == pytest.approx(0.04)


def test_a_budget_for_a_model_whose_price_nobody_knows_is_an_error_at_the_start() -> None:
    client = ScriptedLM(["never asked"])
    with pytest.raises(ConfigError, match=r"nobody knows what 'scripted' .* prices="):
        RLM(backend=client, max_budget=1.0).completion("x")
    assert client.calls == 0
    prices = {"scripted": {"input": 1.0, "output": 1.0}}
    said = RLM(backend=ScriptedLM([cell("FINAL(1)")]), max_budget=1.0, prices=prices).completion("x")
    assert said.usage_summary.total_cost is not None


def test_tokens_have_a_limit() -> None:
    with pytest.raises(MaxTokensExceeded, match="max_tokens"):
        scripted([cell("print(1)")] * 50, max_tokens=4000).completion("x")


def test_tokens_of_cells_have_a_limit_that_leaves_the_root_its_own() -> None:
    code = """
        try: FINAL(llm_query('x' * 4000))
        except LLMError as error: FINAL(error.kind)
    """
    script = [cell("llm_query('x' * 4000);"), "short", cell(code)]
    assert scripted(script, max_sub_tokens=1500).completion("x").response == "MaxTokensExceeded"


def test_cells_see_what_is_left() -> None:
    code = "b = budget()\nFINAL([b['calls'], round(b['dollars'], 3), b['tokens'] < 100_000, b['calls_made']])"
    result = scripted([cell(code)], max_calls=10, max_budget=1.0, max_tokens=100_000, cost=0.25).completion(
        "x"
    )
    assert result.value == [9, 0.75, True, 1]


# --- the best answer --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "name"),
    [({"max_calls": 3}, "max_calls"), ({"max_budget": 0.035, "cost": 0.01}, "max_budget")],
)
def test_instead_of_the_error_the_model_may_be_asked_for_its_best_answer(
    limits: dict[str, Any], name: str
) -> None:
    def say(messages: Sequence[Message]) -> str:
        return "the best there is" if "last turn" in messages[-1].content else cell("print('on')")

    result = scripted(say, on_limit="answer", **limits).completion("x")
    assert (result.response, result.stopped, result.is_best_effort) == ("the best there is", name, True)
    assert result.usage_summary.total_calls == 3
    assert [event.limit for event in result.trace if isinstance(event, LimitReached)] == [name]


def test_a_best_answer_that_cannot_be_afforded_is_the_error_that_it_would_have_been() -> None:
    with pytest.raises(BudgetExceeded, match="could not be asked for its best answer"):
        scripted([cell("print('on')")] * 9, on_limit="answer", max_budget=0.02, cost=0.015).completion("x")

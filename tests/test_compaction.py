"""Facts about conversations that are summed up, in real sandboxes."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from rlm import RLM, BaseLM, Message, Reply, Request, prompts
from rlm.client import ModelInfo, Usage
from rlm.compaction import DEFAULT_WINDOW, Compaction
from rlm.errors import ConfigError, MaxCallsExceeded, ModelError
from rlm.events import AnyEvent, CellFinished, Compacted, LimitReached, ModelRequested, RunStarted, Warned
from rlm_scripted import ScriptedLM


def cell(code: str) -> str:
    return f"```repl\n{textwrap.dedent(code).strip()}\n```"


LONG = cell("print('x' * 4000)")
SUMMARISE = prompts.text("summarise")


def is_asked_for_a_summary(messages: Sequence[Message]) -> bool:
    return messages[-1].content.endswith(SUMMARISE)


class Small(BaseLM):
    """A model that reads ``window`` tokens, and answers from a function of the messages."""

    model_name = "small"

    def __init__(
        self, answer: Callable[[Sequence[Message]], str], window: int | None = 3000, per_token: float = 4
    ) -> None:
        self.requests: list[Request] = []
        self._answer, self._window, self._per_token = answer, window, per_token

    async def complete(self, request: Request) -> Reply:
        self.requests.append(request)
        text = self._answer(request.messages)
        read = sum(len(message.content) for message in request.messages) / self._per_token
        return Reply(text, usage=Usage(round(read), len(text) // 4))

    def info(self, model: str) -> ModelInfo:
        return ModelInfo(context_window=self._window)


def in_turn(*replies: str, summary: str = "all is well") -> Callable[[Sequence[Message]], str]:
    """Replies in order, and a summary whenever one is asked for."""
    left = list(replies)

    def answer(messages: Sequence[Message]) -> str:
        return summary if is_asked_for_a_summary(messages) else left.pop(0)

    return answer


def compact(client: BaseLM, question: str = "q", **settings: Any) -> Any:
    return RLM(backend=client, compaction=True, **settings).completion("context", question)


def of(kind: type[AnyEvent], result: Any) -> list[Any]:
    return [event for event in result.trace if isinstance(event, kind)]


def requests_of(events: Sequence[AnyEvent]) -> list[list[Message]]:
    """The root requests of one run, put together from the trace as its readers do."""
    found: list[list[Message]] = [[]]
    for event in events:
        if isinstance(event, ModelRequested) and event.kind == "root":
            found.append([*found[-1][: event.prefix], *event.messages])
    return found[1:]


# --- the conversation -------------------------------------------------------------------------------------


def test_a_conversation_that_gets_too_long_goes_on_from_a_summary() -> None:
    client = Small(in_turn(cell("x = 41"), LONG, LONG, cell("FINAL(x + 1)"), summary="  x is 41\n"))
    result = compact(client)
    assert result.response == "42"
    asked, after = client.requests[-2].messages, client.requests[-1].messages
    assert is_asked_for_a_summary(asked)
    assert [message.role for message in asked] == ["system", *["user", "assistant"] * 3, "user"]
    assert [message.role for message in after] == ["system", "user", "assistant", "user"]
    assert after[:2] == asked[:2]
    assert after[2].content == "x is 41"
    assert "`SHOW_VARS()`" in after[3].content
    assert "(so far 1 times)" in after[3].content
    assert after[3].content.endswith("(27 turns left)")


def test_nothing_is_summed_up_unless_it_is_asked_for() -> None:
    client = Small(in_turn(LONG, LONG, LONG, "FINAL(x)"))
    result = RLM(backend=client).completion("context", "q")
    assert of(Compacted, result) == []
    assert "history" not in client.requests[0].messages[0].content
    assert len(client.requests[-1].messages) == 8


def test_what_was_before_and_after_is_told() -> None:
    client = Small(in_turn(LONG, LONG, LONG, LONG, "FINAL(x)"))
    result = compact(client, verbose=True)
    first, second = of(Compacted, result)
    assert (first.number, second.number) == (1, 2)
    assert first.before >= 0.85 * 3000 > first.after > 500
    assert result.iterations == 5
    assert result.usage_summary.total_calls == 7


@pytest.mark.parametrize("part", [0.5, 1.0])
def test_it_is_time_when_the_next_request_would_take_the_given_part_of_the_window(part: float) -> None:
    client = Small(in_turn(*[LONG] * 6, "FINAL(x)"), window=5000)
    result = compact(client, compaction_threshold_pct=part)
    lengths = [sum(len(m.content) for m in r.messages) - len(SUMMARISE) for r in client.requests]
    summed = [is_asked_for_a_summary(request.messages) for request in client.requests]
    assert of(Compacted, result)
    for length, is_summed in zip(lengths, summed, strict=True):
        assert is_summed == (length + 500 > 4 * 5000 * part)


@pytest.mark.parametrize("part", [0, -1, 1.5])
def test_a_part_is_more_than_nothing_and_at_most_all(part: float) -> None:
    with pytest.raises(ConfigError, match="compaction_threshold_pct"):
        RLM(backend=ScriptedLM([]), compaction=True, compaction_threshold_pct=part)


def test_tokens_are_taken_to_be_as_long_as_they_were() -> None:
    client = Small(in_turn(LONG, cell("1"), "FINAL(x)"), window=6000, per_token=1)  # a script with no words
    assert [event.number for event in of(Compacted, compact(client))] == [1]
    client = Small(in_turn(LONG, cell("1"), "FINAL(x)"), window=6000)
    assert of(Compacted, compact(client)) == []


def test_a_count_that_is_a_guess_or_none_is_no_measure() -> None:
    compaction = Compaction()
    messages = [Message("user", "x" * 4000)]
    for usage in (Usage(0, 5), Usage(9000, 5, estimated=True)):
        compaction.learn(messages, usage)
        assert compaction.tokens(messages) == 1000
    compaction.learn(messages, Usage(2000, 5))
    assert compaction.tokens(messages) == 2000


def test_a_window_that_nobody_knows_is_assumed_and_told_once() -> None:
    def say(messages: Sequence[Message]) -> str:
        if is_asked_for_a_summary(messages):
            return "so far so good"
        if "the question" not in messages[1].content:
            return "FINAL(part)"
        if len(messages) == 2:
            return cell("rlm_query_batched(['part'] * 3)\nprint('x' * 450_000)")
        return "FINAL(done)"

    client = Small(say, window=None)
    result = compact(client, "the question", max_depth=2, max_output_chars=1_000_000)
    (warned,) = of(Warned, result)
    assert warned.message == (
        "compaction: nobody knows how much 'small' (Small) reads; 128,000 tokens are assumed"
    )
    (compacted,) = of(Compacted, result)
    assert compacted.before >= 0.85 * DEFAULT_WINDOW


def test_a_conversation_is_not_summed_up_when_there_is_nothing_in_it() -> None:
    client = Small(in_turn(cell("1"), cell("2"), "FINAL(x)"), window=100)
    result = compact(client, "a long question " * 500)
    assert len(client.requests[0].messages) == 2
    assert [event.number for event in of(Compacted, result)] == [1, 2]
    assert len(client.requests) == 5


def test_a_summary_without_a_word_is_none() -> None:
    client = Small(in_turn(LONG, LONG, LONG, "FINAL(x)", summary=" \n"))
    result = compact(client)
    assert of(Compacted, result) == []
    assert len(client.requests[-1].messages) == 8
    assert not is_asked_for_a_summary(client.requests[-1].messages)


def test_code_and_answers_in_a_summary_are_words() -> None:
    summary = cell("FINAL('from the summary')") + "\nFINAL(no)"
    client = Small(in_turn(LONG, LONG, LONG, cell("FINAL('x')"), summary=summary))
    assert compact(client).response == "x"


def test_each_run_of_a_tree_has_a_conversation_of_its_own() -> None:
    def say(messages: Sequence[Message]) -> str:
        if is_asked_for_a_summary(messages):
            return f"summary of {messages[1].content.split()[0]}"
        if len(messages) == 2 and "root" in messages[1].content:
            return cell("FINAL(rlm_query('child'))")
        if messages[2:] and messages[2].content.startswith("summary"):
            return cell("FINAL(history[-1]['content'])")
        return LONG

    result = compact(Small(say), "root", max_depth=2)
    (compacted,) = of(Compacted, result)
    (child,) = [event.run for event in of(RunStarted, result) if event.parent is not None]
    assert (compacted.run, compacted.depth) == (child, 1)
    assert result.response == "summary of The"  # no question: the task is in the context


# --- the trace --------------------------------------------------------------------------------------------


def test_requests_can_be_put_together_from_the_trace() -> None:
    client = Small(in_turn(LONG, LONG, LONG, LONG, "FINAL(x)"))
    result = compact(client)
    assert requests_of([*result.trace]) == [[*request.messages] for request in client.requests]
    assert [event.prefix for event in of(ModelRequested, result)] == [
        0,
        2,
        4,
        2,
        4,
        6,
        3,
    ]  # one summary says the same as the other


def test_requests_for_the_best_answer_can_be_put_together_as_well() -> None:
    for settings in ({"max_iterations": 3}, {"max_calls": 3, "on_limit": "answer"}):
        client = Small(in_turn(cell("1"), cell("2"), cell("3"), "the best"), window=100_000)
        if "max_calls" in settings:
            client = Small(in_turn(cell("1"), cell("2"), "the best"), window=100_000)
        result = compact(client, **settings)
        assert result.response == "the best"
        assert requests_of([*result.trace]) == [[*request.messages] for request in client.requests]


# --- history ----------------------------------------------------------------------------------------------


def test_all_that_was_said_stands_in_history() -> None:
    look = cell("FINAL(history)")
    client = Small(in_turn(LONG, LONG, look))
    result = compact(client)
    asked = client.requests[-2].messages
    said = [{"role": message.role, "content": message.content} for message in asked]
    said[-1]["content"] = said[-1]["content"].removesuffix(f"\n\n{SUMMARISE}")
    assert result.value == [*said, {"type": "summary", "content": "all is well"}]
    assert "`history`" in client.requests[0].messages[0].content
    assert "`history`" in client.requests[-1].messages[-1].content


def test_history_is_empty_at_first_and_goes_on_growing() -> None:
    note = "seen.append([m.get('role', m.get('type')) for m in history])"
    look = cell(f"print('x' * 4000)\n{note}")
    client = Small(in_turn(cell("seen = []"), *[look] * 4, cell(f"{note}\nFINAL(seen)")))
    result = compact(client)
    assert len(of(Compacted, result)) == 2
    first, *_, last = result.value
    assert first == []
    assert last[:3] == ["system", "user", "assistant"]
    assert last.count("summary") == 2
    middle = last.index("summary")
    assert last[middle : middle + 3] == ["summary", "user", "assistant"]  # the word to go on, and its reply
    assert last.count("system") == 1


def test_history_is_restored_after_a_cell_and_after_the_loss_of_a_session() -> None:
    script = [LONG, LONG, cell("del history"), cell("history = 5"), cell("len(history)")]
    client = Small(in_turn(*script, cell("import os\nos._exit(3)"), cell("FINAL(len(history))")))
    result = compact(client, environment_kwargs={"rollback": False})
    (compacted,) = of(Compacted, result)
    assert compacted.number == 1
    assert result.value == 7
    assert [event.lost for event in of(CellFinished, result) if event.lost]


def test_a_session_keeps_the_whole_of_each_conversation() -> None:
    client = Small(in_turn(LONG, LONG, "FINAL(one)", cell("FINAL([history_0, history])")))
    with RLM(backend=client, compaction=True).session() as session:
        session.completion("context", "first")
        history_0, history = session.completion(root_prompt="second").value
    assert history == []  # of this completion
    kinds = [message.get("role", message.get("type")) for message in history_0]
    assert kinds == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
        "user",
        "summary",
        "user",
        "assistant",
    ]


# --- limits and errors ------------------------------------------------------------------------------------


def test_a_summary_is_a_call_like_any_other() -> None:
    client = Small(in_turn(LONG, LONG, LONG, "FINAL(x)"))
    with pytest.raises(MaxCallsExceeded) as caught:
        compact(client, max_calls=2)
    assert len(client.requests) == 2
    assert caught.value.trace is not None


def test_a_summary_that_cannot_be_afforded_gives_way_to_the_best_answer() -> None:
    client = Small(in_turn(LONG, LONG, "as good as it gets"))
    result = compact(client, max_calls=3, on_limit="answer")
    assert (result.response, result.stopped) == ("as good as it gets", "max_calls")
    assert [event.limit for event in of(LimitReached, result)] == ["max_calls"]
    assert "last turn" in client.requests[-1].messages[-1].content


def test_a_summary_that_fails_ends_the_run_as_any_turn_would() -> None:
    def say(messages: Sequence[Message]) -> str:
        if is_asked_for_a_summary(messages):
            raise ModelError("no more")
        return LONG

    with pytest.raises(ModelError, match="no more"):
        compact(Small(say))

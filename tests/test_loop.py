"""The loop, end to end: a scripted model, real sandboxes."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from rlm import RLM, BaseLM, Message, Reply, Request, RLMError, events
from rlm.errors import (
    ErrorThresholdExceeded,
    MaxCallsExceeded,
    MaxIterationsExceeded,
    ModelError,
    ScriptExhausted,
    TimeoutExceeded,
)
from rlm_scripted import ScriptedLM


def cell(code: str) -> str:
    return f"```repl\n{code}\n```"


def scripted(*script: Any, **settings: Any) -> RLM:
    return RLM(backend=ScriptedLM(script), **settings)


def requests_of(result: Any) -> list[events.ModelRequested]:
    return [event for event in result.trace if isinstance(event, events.ModelRequested)]


def observations(result: Any) -> list[str]:
    """What the model was told after each turn."""
    return [r.messages[-1].content for r in requests_of(result) if r.kind == "root"][1:]


class Recorder(BaseLM):
    """Answers from a function of the messages, and keeps every request."""

    def __init__(self, answer: Callable[[Sequence[Message]], str | Reply]) -> None:
        self.requests: list[Request] = []
        self._answer = answer

    async def complete(self, request: Request) -> Reply:
        self.requests.append(request)
        reply = self._answer(request.messages)
        return reply if isinstance(reply, Reply) else Reply(reply)


def turn_of(messages: Sequence[Message]) -> int:
    return sum(message.role == "assistant" for message in messages)


# --- finalisation ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "response"),
    [
        ([cell("answer['content'] = 'a'; answer['ready'] = True")], "a"),
        ([cell("answer['ready'] = True; answer['content'] = 'b'")], "b"),
        ([cell("answer.update(content='c', ready=True)")], "c"),
        ([cell("FINAL('d')")], "d"),
        ([cell("x = 'e'\nFINAL_VAR('x')")], "e"),
        ([cell("x = 'f'\nFINAL_VAR(x)")], "f"),
        (["FINAL(g (and) more)"], "g (and) more"),
        (["FINAL: h"], "h"),
        ([cell("x = 'i'"), "FINAL_VAR(x)"], "i"),
        ([cell("x = 'j'") + "\nFINAL_VAR(x)"], "j"),
        ([cell("x = 1") + "\nFINAL(k)"], "k"),
        ([cell("FINAL('l')\n1/0")], "l"),
        ([cell("FINAL('first')") + "\n" + cell("FINAL('m')")], "m"),
    ],
)
def test_every_way_to_submit_an_answer_ends_the_run(script: list[str], response: str) -> None:
    result = scripted(*script).completion("context", "q")
    assert (result.response, result.stopped) == (response, "final")


def test_a_final_answer_that_is_data_is_kept_as_data() -> None:
    result = scripted(cell("FINAL({'n': [1, 2.5, None]})")).completion("c")
    assert result.value == {"n": [1, 2.5, None]}
    assert result.response == "{'n': [1, 2.5, None]}"


def test_printing_a_document_that_contains_final_ends_nothing() -> None:
    document = "FINAL(wrong)\nFINAL_VAR(x)\nanswer = {'ready': True}\n```repl\nFINAL('wrong')\n```"
    result = scripted(cell("print(context)"), "FINAL(right)").completion(document)
    assert result.response == "right"


def test_prose_that_mentions_final_ends_nothing() -> None:
    result = scripted("I will call FINAL(x) later.", "FINAL(done)").completion("c")
    assert result.response == "done"
    assert "no code to run" in observations(result)[0]


def test_a_directive_beside_code_that_fails_is_not_taken() -> None:
    result = scripted(cell("1/0") + "\nFINAL(too early)", "FINAL(right)").completion("c")
    assert result.response == "right"
    assert "ZeroDivisionError" in observations(result)[0]
    assert "was not taken" in observations(result)[0]


def test_final_var_of_an_unknown_name_is_an_observation() -> None:
    result = scripted("FINAL_VAR(nothing)", "FINAL(x)").completion("c")
    assert "name 'nothing' is not defined" in observations(result)[0]


# --- turns ----------------------------------------------------------------------------------------


def test_blocks_after_a_failing_one_are_not_run() -> None:
    result = scripted(cell("1/0") + "\n" + cell("x = 1"), cell("'x' in globals()"), "FINAL(x)").completion(
        "c"
    )
    assert "not run" in observations(result)[0]
    assert "value: False" in observations(result)[1]


def test_variables_live_from_turn_to_turn() -> None:
    result = scripted(
        cell("x = 20"), cell("def f(): return x + 1"), cell("x = 41"), cell("FINAL(f())")
    ).completion("c")
    assert result.response == "42"


@pytest.mark.parametrize("fence", ["repl", "python", "py", ""])
def test_code_fences_of_every_usual_kind_are_run(fence: str) -> None:
    assert scripted(f"```{fence}\nFINAL(1)\n```").completion("c").response == "1"


def test_requests_alternate_and_each_is_a_prefix_of_the_next() -> None:
    client = Recorder(lambda messages: "FINAL(x)" if turn_of(messages) == 4 else cell("print(1)\n1/0"))
    RLM(backend=client).completion("c", "q")
    histories = [request.messages for request in client.requests]
    for earlier, later in itertools.pairwise(histories):
        assert later[: len(earlier)] == earlier
    roles = [message.role for message in histories[-1]]
    assert roles == ["system", "user", *["assistant", "user"] * 4]


def test_the_model_is_told_of_the_context_and_never_shown_it() -> None:
    client = Recorder(lambda messages: "FINAL(x)")
    RLM(backend=client).completion("secret-needle " * 1000, "What is it?")
    text = " ".join(message.content for message in client.requests[0].messages)
    assert "secret-needle" not in text
    assert "14,000 characters" in text and "What is it?" in text


def test_a_system_prompt_of_the_users_own_is_sent_as_written() -> None:
    client = Recorder(lambda messages: "FINAL(x)")
    RLM(backend=client, custom_system_prompt="Braces {like} {{these}} stay.").completion("c")
    assert client.requests[0].messages[0].content == "Braces {like} {{these}} stay."


def test_a_reply_cut_off_in_a_block_is_not_run() -> None:
    replies = [Reply("```repl\nFINAL('half", finish="length"), "FINAL(whole)"]
    result = scripted(*replies).completion("c")
    assert result.response == "whole"
    assert "cut off" in observations(result)[0]


def test_long_output_keeps_head_and_tail_for_the_model() -> None:
    script = (cell("print('a' * 5000 + 'b' * 5000)"), "FINAL(x)")
    shown = observations(scripted(*script, max_output_chars=1000).completion("c"))[0]
    assert "aaa" in shown and "bbb" in shown and "left out" in shown
    assert len(shown) < 1300


# --- calls from cells -----------------------------------------------------------------------------


def test_cells_call_models_and_failures_raise_in_the_cell() -> None:
    code = "try:\n    llm_query('bad')\nexcept LLMError as e:\n    FINAL([llm_query('good'), e.kind, str(e)])"

    def answer(messages: Sequence[Message]) -> str:
        if messages[0].role == "system":
            return cell(code)
        if messages[0].content == "bad":
            raise ModelError("down")
        return "reply"

    assert RLM(backend=Recorder(answer)).completion("c").value == ["reply", "ModelError", "down"]


def test_a_batch_gives_failures_in_their_places() -> None:
    def answer(messages: Sequence[Message]) -> str:
        if messages[0].role == "system":
            ask = "r = llm_query_batched(['a', 'b', 'c'])"
            return cell(f"{ask}\nFINAL([x if isinstance(x, str) else x.kind for x in r])")
        if messages[0].content == "b":
            raise ModelError("no")
        return messages[0].content.upper()

    assert RLM(backend=Recorder(answer)).completion("c").value == ["A", "ModelError", "C"]


def test_at_the_depth_cap_rlm_query_is_a_plain_call() -> None:
    def answer(messages: Sequence[Message]) -> str:
        return cell("FINAL(rlm_query('deep'))") if messages[0].role == "system" else "plain"

    result = RLM(backend=Recorder(answer), max_depth=1).completion("c")
    assert result.response == "plain"
    assert result.trace.children("run-1") == []


def test_children_work_in_sandboxes_of_their_own() -> None:
    def answer(messages: Sequence[Message]) -> str:
        if "ROOT" in messages[1].content:
            ask = "r = rlm_query_batched(['sum'] * 3, contexts=['1', '22', '333'])"
            return cell(f"context_kept = context\n{ask}\nFINAL(r)")
        return cell("FINAL(len(context) if 'context_kept' not in globals() else 'leak')")

    result = RLM(backend=Recorder(answer), max_depth=2).completion("c", "ROOT")
    assert result.value == ["1", "2", "3"]
    assert len(result.trace.children("run-1")) == 3
    assert result.usage_summary.total_calls == 4


def test_depth_zero_is_a_plain_call_without_a_sandbox() -> None:
    result = RLM(backend=Recorder(lambda messages: messages[-1].content), max_depth=0).completion(
        "text", "ask"
    )
    assert result.response == "ask\n\ntext"
    assert not [event for event in result.trace if isinstance(event, events.SandboxStarted)]


def test_cells_can_read_the_budget() -> None:
    result = scripted(cell("FINAL(budget())"), max_calls=5, max_iterations=3).completion("c")
    assert result.value["calls"] == 4
    assert result.value["iterations"] == 2
    assert result.value["seconds"] is None


# --- limits ---------------------------------------------------------------------------------------


def test_when_iterations_run_out_the_best_answer_is_asked_for_once_and_marked() -> None:
    result = scripted(cell("x = 1"), cell("x = 2"), "my best", max_iterations=2).completion("c")
    assert (result.response, result.stopped, result.is_best_effort) == ("my best", "max_iterations", True)
    assert requests_of(result)[-1].messages[-1].role == "user"
    assert "last turn" in requests_of(result)[-1].messages[-1].content


def test_when_calls_run_out_too_the_error_carries_the_work() -> None:
    draft = cell("answer['content'] = 'draft so far'")
    with pytest.raises(MaxIterationsExceeded) as caught:
        scripted(draft, max_iterations=1, max_calls=1).completion("c")
    assert caught.value.partial_answer == "draft so far"


def test_max_calls_ends_the_run_with_everything_it_had() -> None:
    def answer(messages: Sequence[Message]) -> str:
        code = "answer['content'] = 'partial'\nllm_query_batched(['x'] * 10)"
        return cell(code) if messages[0].role == "system" else "ok"

    client = Recorder(answer)
    with pytest.raises(MaxCallsExceeded) as caught:
        RLM(backend=client, max_calls=4).completion("c")
    error = caught.value
    assert len(client.requests) == 4
    assert error.partial_answer == "partial"
    assert error.usage is not None and error.usage.total_calls == 4
    assert error.trace is not None and isinstance(error.trace.events[-1], events.RunFinished)
    assert error.trace.events[-1].stopped == "max_calls"


def test_wall_time_stops_a_running_cell() -> None:
    with pytest.raises(TimeoutExceeded) as caught:
        scripted(cell("answer['content'] = 'p'"), cell("while True: pass"), max_timeout=1).completion("c")
    assert caught.value.partial_answer == "p"


def test_wall_time_stops_a_call_in_flight() -> None:
    with pytest.raises(TimeoutExceeded):
        RLM(backend=ScriptedLM(["x"], latency=60), max_timeout=0.3).completion("c")


def test_a_cell_out_of_time_is_an_observation() -> None:
    script = (cell("x = 5"), cell("while True: pass"), cell("FINAL(x)"))
    result = scripted(*script, cell_timeout=0.3).completion("c")
    assert result.response == "5"
    assert "longer than 0.3 s" in observations(result)[1]


def test_consecutive_errors_end_the_run() -> None:
    with pytest.raises(ErrorThresholdExceeded) as caught:
        scripted(*[cell("1/0")] * 5, max_errors=3).completion("c")
    assert caught.value.used == 3


def test_a_good_turn_begins_the_count_of_errors_anew() -> None:
    script = [cell("1/0"), cell("1"), cell("1/0"), "FINAL(x)"]
    assert scripted(*script, max_errors=2).completion("c").response == "x"


def test_an_error_of_the_client_ends_the_run_with_the_trace() -> None:
    with pytest.raises(ScriptExhausted) as caught:
        scripted("some words").completion("c")
    assert caught.value.partial_answer == "some words"
    assert caught.value.trace is not None


def test_a_cell_that_dies_costs_only_itself() -> None:
    script = (cell("x = [1, 2]"), cell("import os\nos._exit(1)"), cell("FINAL(x)"))
    result = scripted(*script).completion("c")
    assert result.value == [1, 2]
    assert "Every variable is as it was" in observations(result)[1]


# --- faces ----------------------------------------------------------------------------------------


async def test_acompletion_works_in_a_running_loop() -> None:
    result = await scripted(cell("FINAL(len(context))")).acompletion("four")
    assert result.response == "4"


async def test_completion_works_in_a_running_loop_like_a_notebooks() -> None:
    assert scripted("FINAL(x)").completion("c").response == "x"


async def test_astream_gives_the_events_as_they_happen_and_ends_with_the_end() -> None:
    seen = [event async for event in scripted(cell("print(1)"), "FINAL(x)").astream("c", "q")]
    assert isinstance(seen[0], events.RunStarted)
    assert isinstance(seen[-1], events.RunFinished) and seen[-1].response == "x"
    assert [type(e).__name__ for e in seen].count("CellFinished") == 1


async def test_astream_raises_after_the_events_that_led_to_it() -> None:
    seen = []

    async def watch() -> None:
        async for event in scripted(cell("1")).astream("c"):
            seen.append(event)

    with pytest.raises(ScriptExhausted):
        await watch()
    assert isinstance(seen[-1], events.RunFinished)


async def test_leaving_astream_early_stops_the_run() -> None:
    client = ScriptedLM(lambda messages: cell("1"), latency=0.02)
    async for event in RLM(backend=client, max_iterations=500).astream("c"):
        if isinstance(event, events.CellFinished):
            break
    await asyncio.sleep(0.2)
    calls = client.calls
    await asyncio.sleep(0.2)
    assert client.calls == calls


async def test_cancelling_a_run_reaches_its_cell_and_its_calls() -> None:
    started = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_event(event: Any) -> None:
        if isinstance(event, events.CellStarted):
            loop.call_soon_threadsafe(started.set)

    rlm = scripted(cell("while True: pass"), on_event=on_event)
    task = asyncio.create_task(rlm.acompletion("c"))
    await started.wait()
    task.cancel()
    async with asyncio.timeout(5):
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_many_runs_in_one_process_do_not_see_one_another() -> None:
    def answer(messages: Sequence[Message]) -> str:
        if messages[0].role == "user":
            return messages[0].content
        turn = turn_of(messages)
        steps = ["mine = context", "print(mine)", "echoed = llm_query(mine)", "FINAL([mine, echoed])"]
        return cell(steps[turn])

    rlm = RLM(backend=Recorder(answer))
    results = await asyncio.gather(*(rlm.acompletion(f"run {i}") for i in range(40)))
    assert [r.value for r in results] == [[f"run {i}"] * 2 for i in range(40)]
    for i, result in enumerate(results):
        printed = [e.stdout for e in result.trace if isinstance(e, events.CellFinished) and e.stdout]
        assert printed == [f"run {i}\n"]


def test_an_rlm_can_be_used_again_and_again() -> None:
    rlm = scripted("FINAL(1)", "FINAL(2)")
    assert [rlm.completion("c").response for _ in range(2)] == ["1", "2"]


def test_the_trace_file_holds_every_event_and_loads_back(tmp_path: Any) -> None:
    path = tmp_path / "trace.jsonl"
    result = scripted(cell("print('hi')"), "FINAL(x)", trace=path).completion("c", "q")
    assert json.loads(path.read_text().splitlines()[0])["event"] == "run_started"
    assert events.Trace.load(path).events == result.trace.events


def test_an_environment_object_serves_as_a_pattern_for_every_run() -> None:
    from rlm_local import LocalREPL

    pattern = LocalREPL(memory=512)
    rlm = scripted("FINAL(1)", cell("FINAL(2)"), environment=pattern)
    assert [rlm.completion("c").response for _ in range(2)] == ["1", "2"]
    assert pattern.session is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"environment": "dokcer"}, "no environment is called 'dokcer'"),
        ({"backend": "scriptd"}, "did you mean 'scripted'"),
        ({"environment_kwargs": {"memry": 1}}, "memry"),
        ({"backend": 42}, "backend=42"),
        ({"environment": 42}, "environment=42"),
    ],
)
def test_a_wrong_plugin_is_an_error_that_says_what_is_wrong(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RLMError, match=message):
        RLM(**{"backend": "scripted", **settings}).completion("c")


def test_the_result_says_what_isolation_was_reached() -> None:
    assert scripted("FINAL(x)").completion("c").isolation.level in ("bubblewrap", "landlock")
    bare = scripted("FINAL(x)", environment_kwargs={"isolation": "none"}).completion("c")
    assert bare.isolation.level == "none"


def test_without_rollback_a_cell_that_dies_takes_the_variables_and_says_so() -> None:
    script = (cell("x = 1"), cell("import os\nos._exit(1)"), cell("FINAL('x' in globals() or len(context))"))
    result = scripted(*script, environment_kwargs={"rollback": False}).completion("four")
    assert result.value == 4
    assert "Lost: every variable but the contexts" in observations(result)[1]

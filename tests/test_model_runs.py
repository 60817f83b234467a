"""Facts about whole runs through real clients and servers: the command, keys, caches, several models."""

import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from llama_support import LlamaServer
from model_runs import Steered

from rlm import RLM, Message, Reply, Request, open_repl
from rlm.errors import AuthError, ConfigError, ModelError
from rlm.events import ModelReplied, ModelRequested, ModelRetried, RunStarted, Trace
from rlm.testing.dialects import Behaviour, Seen
from rlm.testing.model_server import ModelServer
from rlm.testing.sessions import eventually
from rlm_scripted import ScriptedLM

KEY = "sk-planted-1234567890abcdef"


def cell(code: str) -> str:
    return f"```repl\n{textwrap.dedent(code).strip()}\n```"


# --- the command ------------------------------------------------------------------------------------------


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "rlm.cli", "run", *arguments]


def environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")}
    return {**kept, **variables}


def test_the_command_answers_through_a_real_server(llama: LlamaServer, tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text("one two three")
    config = tmp_path / "config.json"
    reply = cell("words = context.split()\nFINAL(f'{len(words)} words, the last is {words[-1]}')")
    config.write_text(json.dumps({"sampling_args": llama.scripted(reply)}))
    done = subprocess.run(
        command(
            "How many words?",
            str(file),
            "--backend",
            "openai",
            "--model",
            llama.model,
            "--config",
            str(config),
        ),
        env=environment(OPENAI_BASE_URL=llama.url, OPENAI_API_KEY=KEY),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "3 words, the last is three\n"), done.stderr
    assert "Unclosed" not in done.stderr


@pytest.mark.parametrize("where", ["in a turn", "in a sub-call"])
def test_interrupting_the_command_leaves_no_open_connection(where: str, tmp_path: Path) -> None:
    hang = Behaviour(fault="hang")
    ask = Behaviour(text=cell("llm_query('and now we wait')"))
    (tmp_path / "file.txt").write_text("content")
    with ModelServer(
        lambda seen: ask if "content" not in seen.text and seen.number == 1 and "sub" in where else hang
    ) as server:
        process = subprocess.Popen(
            command("What?", str(tmp_path / "file.txt"), "--model", "m"),
            env=environment(OPENAI_BASE_URL=server.url, OPENAI_API_KEY=KEY),
            stderr=subprocess.PIPE,
        )
        wanted = 2 if "sub" in where else 1
        assert eventually(lambda: server.requests == wanted and server.in_flight == 1, 30)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()
        process.stderr.close()
        assert eventually(lambda: server.connections == 0)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("api_key", "sk-on-the-command-line"),
        ("my_token", "sk-on-the-command-line"),
        ("headers", '{"Authorization": "Bearer sk-on-the-command-line"}'),
        ("base_url", "http://me:sk-on-the-command-line@127.0.0.1"),
    ],
)
def test_a_key_on_the_command_line_is_refused(name: str, argument: str, tmp_path: Path) -> None:
    done = subprocess.run(
        command("q", str(tmp_path), "--backend-arg", f"{name}={argument}"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "command line" in done.stderr
    assert "sk-on-the" not in done.stderr


@pytest.mark.parametrize("option", ["--model", "--sub-model"])
def test_naming_a_model_keeps_the_address_and_the_key_of_the_file(option: str, tmp_path: Path) -> None:
    def reply(seen: Seen) -> Behaviour:
        asks = "question" in seen.text
        return Behaviour(text=cell("FINAL(llm_query('sub'))") if asks else "answered")

    (tmp_path / "x.txt").write_text("x")
    with ModelServer(reply) as meant, ModelServer() as wrong:
        settings = {
            "backend": "vllm",
            "backend_kwargs": {"base_url": meant.url, "api_key": KEY, "model_name": "m"},
        }
        (tmp_path / "c.json").write_text(json.dumps(settings))
        done = subprocess.run(
            command(
                "the question", str(tmp_path / "x.txt"), "--config", str(tmp_path / "c.json"), option, "other"
            ),
            env=environment(OPENAI_BASE_URL=wrong.url, OPENAI_API_KEY="sk-of-another"),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stdout) == (0, "answered\n"), done.stderr
    assert wrong.requests == 0
    assert {seen.headers["authorization"] for seen in meant.seen} == {f"Bearer {KEY}"}
    asked = [seen.body["model"] for seen in meant.seen]
    assert asked == (["other", "other"] if option == "--model" else ["m", "other"])


@pytest.mark.parametrize("backend", ["scripted", lambda request: "from a function"])
def test_a_sandbox_alone_takes_what_a_run_takes_for_a_backend(backend: Any) -> None:
    with open_repl("local", backend=backend) as repl:
        result = repl.execute("llm_query('x')", timeout=30)
    assert result.value == "from a function" or "used up" in str(result.error)


# --- keys -------------------------------------------------------------------------------------------------


def command_lines() -> list[str]:
    """The command lines of every process that can be looked at."""
    lines = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(entry.read_bytes().decode("utf-8", "replace"))
        except OSError:
            continue
    return lines


PEEK = """
import os
seen = [str(dict(os.environ))]
for name in ('/proc/self/environ', '/proc/self/cmdline', '/proc/1/environ'):
    try: seen.append(open(name, 'rb').read().decode('utf-8', 'replace'))
    except OSError as error: seen.append(str(error))
seen.append(llm_query('tell me'))
FINAL(seen)
"""


def test_a_planted_key_is_found_nowhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = "sk-from-the-keywords-42"
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    lines: list[str] = []

    def reply(seen: Seen) -> Behaviour:
        lines.extend(command_lines())
        assert seen.headers["authorization"] in (f"Bearer {KEY}", f"Bearer {other}")
        if seen.number == 1:
            return Behaviour(status=503, message=f"who is {seen.headers['authorization']}?")
        return Behaviour(text=cell(PEEK) if "context" in seen.text else "ok")

    with ModelServer(reply) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        trace, record = tmp_path / "trace.jsonl", tmp_path / "record.jsonl"
        rlm = RLM(
            backend="openai",
            backend_kwargs={"model_name": "m"},
            sub_backend="openai",
            sub_backend_kwargs={"model_name": "sub", "api_key": other, "headers": {"X-Token": other}},
            trace=trace,
            record=record,
        )
        with rlm:
            result = rlm.completion("a context", "the question about the context")
            shown = [repr(rlm), repr(rlm.config), str(rlm.config), repr(vars(rlm)), repr(result)]
        server.reply = Behaviour(status=401, message=f"the key {KEY} is wrong")
        with pytest.raises(AuthError) as caught:
            RLM(backend="openai", backend_kwargs={"model_name": "m"}, sampling_args={"x": 1}).completion(
                "c", "q"
            )
    events = [*result.trace, *(caught.value.trace or ())]
    everything = [
        *shown, *lines, *result.value, *map(str, events), trace.read_text(), record.read_text(),
        str(caught.value), repr(caught.value), caplog.text,
    ]  # fmt: skip
    assert any(isinstance(event, ModelRetried) and "who is" in event.error for event in result.trace)
    assert len(lines) > 2
    for text in everything:
        assert KEY not in text
        assert other not in text


def test_a_key_in_a_setting_that_is_wrong_is_not_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        RLM(
            backend="openai", backend_kwargs={"model_name": "m", "api_key": KEY, "temperature": 1}
        ).completion("c")
    assert KEY not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        RLM(backend_kwargs=[{"api_key": KEY}])
    assert KEY not in str(caught.value)


# --- several models ---------------------------------------------------------------------------------------


def saying(name: str) -> ScriptedLM:
    return ScriptedLM(lambda messages: f"{name} read: {messages[-1].content}", model_name=name)


def root(*replies: str) -> ScriptedLM:
    return ScriptedLM([cell(reply) for reply in replies], model_name="root")


def test_cells_ask_the_sub_backend_unless_they_name_another_model() -> None:
    code = """
        asked = [llm_query('a'), llm_query('b', model='big'), llm_query('c', 'other')]
        FINAL(asked + llm_query_batched(['d'], model='big'))
    """
    rlm = RLM(
        backend=root(code), sub_backend=saying("small"), other_backends=[saying("big"), saying("other")]
    )
    assert rlm.completion("x").value == ["small read: a", "big read: b", "other read: c", "big read: d"]


def test_without_a_sub_backend_the_first_of_the_others_answers_sub_calls() -> None:
    rlm = RLM(backend=root("FINAL(llm_query('a'))"), other_backends=[saying("first"), saying("second")])
    assert rlm.completion("x").response == "first read: a"


def test_a_model_that_the_run_does_not_offer_is_an_error_that_lists_those_it_does() -> None:
    code = """
        try: llm_query('a', model='gpt-none')
        except LLMError as error: FINAL(str(error))
    """
    rlm = RLM(backend=root(code), other_backends=[saying("big")])
    response = rlm.completion("x").response
    assert response.startswith("this run offers no model 'gpt-none'; it offers 'root', 'big'.")


def test_two_backends_with_models_of_one_name_are_told_apart_by_their_own() -> None:
    def first(request: Request) -> str:
        return "first"

    def second(request: Request) -> str:
        return "second"

    first.model_name = second.model_name = "same"  # type: ignore[attr-defined]
    code = "FINAL([llm_query('a', model='same'), llm_query('b', model='second/same')])"
    assert RLM(backend=root(code), other_backends=[first, second]).completion("x").value == [
        "first",
        "second",
    ]


def test_a_child_run_takes_its_turns_from_the_model_that_was_named() -> None:
    child = ScriptedLM([cell("FINAL('of the child')")], model_name="deep")
    rlm = RLM(
        backend=root("FINAL(rlm_query('go', model='deep'))"),
        other_backends=[saying("other"), child],
        max_depth=2,
    )
    result = rlm.completion("x")
    assert result.response == "of the child"
    turns = [(e.run, e.model) for e in result.trace if isinstance(e, ModelRequested) and e.kind == "root"]
    assert turns == [("run-1", "root"), ("run-2", "deep")]


def test_other_backends_come_with_keywords_one_for_each() -> None:
    rlm = RLM(
        backend=root("FINAL(llm_query('a', model='s2'))"),
        other_backends=["scripted", "scripted"],
        other_backend_kwargs=[{"script": ["1"], "model_name": "s1"}, {"script": ["2"], "model_name": "s2"}],
    )
    assert rlm.completion("x").response == "2"
    with pytest.raises(ConfigError, match="one for each"):
        RLM(backend=root(""), other_backends=["scripted"] * 2, other_backend_kwargs=[{}]).completion("x")


def test_a_function_is_a_backend() -> None:
    def model(request: Request) -> str:
        return cell("FINAL('from a function')")

    result = RLM(backend=model).completion("x")
    assert (result.response, result.root_model) == ("from a function", "model")


def test_a_client_that_only_knows_completion_is_a_backend() -> None:
    class Client:
        model_name = "old"

        def completion(self, messages: list[dict[str, str]]) -> str:
            assert messages[0]["role"] == "system"
            return cell("FINAL('from a synchronous client')")

    result = RLM(backend=Client()).completion("x")
    assert (result.response, result.root_model) == ("from a synchronous client", "old")


@pytest.mark.parametrize(("backend", "said"), [(ScriptedLM, "is a class"), (42, "42"), ([], "give the name")])
def test_what_is_no_backend_is_said_to_be_none(backend: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RLM(backend=backend).completion("x")


# --- caches -----------------------------------------------------------------------------------------------


def test_most_of_a_growing_history_comes_from_the_servers_cache(llama: LlamaServer) -> None:
    turns = [cell(f"x{turn} = {turn}\nprint('turn', {turn}, 'of ten', '.' * 200)") for turn in range(9)]
    client = Steered(llama, [*turns, cell("FINAL(x8)")])
    result = RLM(backend=client, max_iterations=12).completion("a short context", "Count to nine.")
    assert result.response == "8"
    assert len(client.replies) == 10
    later = client.replies[1:]
    read, cached = (sum(getattr(r.usage, name) for r in later) for name in ("input_tokens", "cached_tokens"))
    assert cached / read > 0.8
    usage = result.usage_summary
    assert usage.total_cached_tokens == sum(reply.usage.cached_tokens for reply in client.replies)


def test_every_request_of_a_run_begins_with_the_one_before_it() -> None:
    seen: list[tuple[Message, ...]] = []

    def model(request: Request) -> str:
        seen.append(request.messages)
        return cell(f"print({len(seen)})") if len(seen) < 6 else cell("FINAL('done')")

    RLM(backend=model, max_iterations=9).completion("x", "q")
    for before, after in itertools.pairwise(seen):
        assert after[: len(before)] == before


# --- recordings -------------------------------------------------------------------------------------------


def test_a_recorded_run_is_replayed_without_its_models(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    code = "parts = llm_query_batched([f'part {i}' for i in range(20)])\nFINAL(parts)"
    first = RLM(backend=root(code), sub_backend=saying("sub"), record=path).completion("x", "q")
    replayed = RLM(backend="replay", backend_kwargs={"path": str(path)}).completion("x", "q")
    assert replayed.value == first.value == [f"sub read: part {i}" for i in range(20)]
    with pytest.raises(ModelError, match="nearest"):
        RLM(backend="replay", backend_kwargs={"path": str(path)}).completion("x", "another question")


# --- a reply that is cut off ------------------------------------------------------------------------------


def test_code_that_was_cut_off_is_not_run(llama: LlamaServer, tmp_path: Path) -> None:
    whole = cell("print('" + "long " * 50 + "')\nFINAL('finished')")
    client = Steered(llama, [whole])
    result = RLM(backend=client, sampling_args={"max_tokens": 60}, max_iterations=1).completion("x", "q")
    assert not any(type(event).__name__ == "CellStarted" for event in result.trace)
    assert client.replies[0].finish == "length"


# --- what a run says of its backend -----------------------------------------------------------------------


def test_what_a_client_found_out_is_said_at_the_start(llama: LlamaServer) -> None:
    rlm = RLM(
        backend="openai",
        backend_kwargs={"base_url": llama.url},
        sampling_args=llama.scripted(cell("FINAL(1)")),
    )
    with rlm:
        result = rlm.completion("x")
    started, warned, *_ = result.trace
    assert isinstance(started, RunStarted)
    assert str(warned).count(f"{llama.url} serves 'tiny'") == 1
    assert result.root_model == "tiny"
    replies = [event for event in Trace(result.trace.events) if isinstance(event, ModelReplied)]
    assert replies[0].usage.input_tokens > 0


def test_a_synchronous_and_an_asynchronous_function_are_told_apart() -> None:
    async def later(request: Request) -> Reply:
        return Reply(cell("FINAL('awaited')"))

    assert RLM(backend=later).completion("x").response == "awaited"


# --- a server that allows so many requests a second -------------------------------------------------------


@pytest.mark.parametrize("limits", [{}, {"openai": {"requests_per_minute": 60 * 25}}], ids=["found", "set"])
@pytest.mark.parametrize("told", ["seconds", "ms", None])
def test_a_server_that_refuses_costs_time_and_no_call(limits: dict[str, Any], told: Any) -> None:
    calls = 75
    code = f"replies = llm_query_batched([str(i) for i in range({calls})])\nFINAL(replies)"
    with ModelServer(lambda seen: Behaviour(text=seen.text), rate=25, retry_after=told) as server:
        rlm = RLM(
            backend=root(code),
            sub_backend="openai",
            sub_backend_kwargs={"model_name": "m", "base_url": server.url},
            rate_limits=limits,
        )
        with rlm:
            result = rlm.completion("x")
        assert result.value == [str(number) for number in range(calls)]
        usage = result.usage_summary.model_usage_summaries["m"]
        assert (usage.total_calls, usage.total_retries) == (calls, server.refused)
        # those that were on their way when the first was refused, and then hardly any
        assert server.refused <= calls + 5
        assert server.early <= server.refused
        if limits:
            assert server.refused <= 5

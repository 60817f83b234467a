"""Facts about recordings of model calls."""

import asyncio
import datetime
import errno
import json
import logging
import os
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Self

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm import RLM, jsonl, recording
from rlm.client import (
    BaseLM,
    Message,
    ModelInfo,
    Reply,
    Request,
    SupportsCount,
    SupportsPoolKey,
    SupportsStream,
    Usage,
)
from rlm.errors import ConfigError, ModelError
from rlm.recording import Recorded, Recorder, RecordingLM, load, request_key
from rlm.secrets import Secret
from rlm.testing import ClientSuite
from rlm.testing.clients import Connect
from rlm_openai import OpenAILM
from rlm_scripted import ScriptedLM


class TestSuite(ClientSuite):
    """Being recorded changes nothing of what a client promises."""

    speaks = "openai"

    @pytest.fixture
    def connect(self, tmp_path: Path) -> Connect:
        return lambda url, key: RecordingLM(OpenAILM("m", base_url=url, api_key=key), tmp_path / "r.jsonl")


TEXTS = st.text(st.one_of(st.characters(), st.sampled_from("\ud800\udcff\udfff")), max_size=50)
MESSAGES = st.lists(st.builds(Message, st.sampled_from(["system", "user", "assistant"]), TEXTS), max_size=4)


def ask(*texts: str, **fields: Any) -> Request:
    return Request(tuple(Message("user", text) for text in texts or ("hello",)), **fields)


def log_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "rlm"]


class OfferingLM(BaseLM):
    """A client that offers everything."""

    model_name = "offering"
    closed = 0
    left = False

    async def complete(self, request: Request) -> Reply:
        return Reply("whole", raw={"private": "raw"})

    async def stream(self, request: Request) -> AsyncIterator[str | Reply]:
        try:
            yield "in "
            yield "pieces"
            yield Reply("in pieces")
        finally:
            self.left = True

    async def count(self, request: Request) -> tuple[int, bool]:
        return 7, True

    def pool_key(self, model: str) -> str:
        return f"pool of {model}"

    async def prepare(self) -> str | None:
        return "a sentence"

    def info(self, model: str) -> ModelInfo:
        return ModelInfo(context_window=123)

    async def aclose(self) -> None:
        self.closed += 1


# --- keys --------------------------------------------------------------------------------------

KNOWN = Request(
    (Message("system", "Be brief."), Message("user", "h\u00e9llo \U0001f680")),
    max_tokens=10, temperature=0.5, stop=("END",), seed=7,
    schema={"type": "object", "properties": {"b": {}, "a": {}}}, extra={"z": 1, "a": [True, None, 1.5]},
)  # fmt: skip
DIGEST = "b343c112d6959ba34518ac4e2546fd9c975885cbca735fe3887b6aeeb9470c31"
"""Recordings live long: should this change, all of them are worthless."""


def test_the_key_of_a_known_request_is_what_it_was_when_recordings_began() -> None:
    assert request_key(KNOWN, "gpt") == DIGEST


def test_the_key_is_of_the_canonical_text_and_nothing_else() -> None:
    """The same digest without any of our code, or msgspec's."""
    import hashlib

    text = json.dumps(
        {**json.loads(msgspec.json.encode(KNOWN)), "model": "gpt"},
        sort_keys=True, ensure_ascii=False, separators=(",", ":"),
    )  # fmt: skip
    assert hashlib.sha256(text.encode()).hexdigest() == DIGEST


def test_the_key_is_the_same_in_another_process_with_other_hashes() -> None:
    code = (
        "from rlm.client import *; from rlm.recording import request_key\n"
        "print(request_key(Request((Message('user', 'x'),), extra={'b': 1, 'a': {'d': 2, 'c': 3}}), 'm'))"
    )
    environments = [{**os.environ, "PYTHONHASHSEED": seed} for seed in ("1", "2")]
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        ).stdout
        for env in environments
    }
    assert len(found) == 1


@pytest.mark.parametrize(
    "other",
    [
        ask("other"), ask("hello", "hello"), Request((Message("system", "hello"),)), ask(max_tokens=1),
        ask(temperature=0.0), ask(stop=("x",)), ask(seed=1), ask(schema={}),
        ask(extra={}), ask(extra={"a": 1}),
    ],
)  # fmt: skip
def test_what_decides_a_reply_changes_the_key(other: Request) -> None:
    assert request_key(other, "m") != request_key(ask(), "m")


def test_another_model_is_another_key() -> None:
    assert request_key(ask(), "m") != request_key(ask(), "n")


@pytest.mark.parametrize("other", [ask(timeout=5.0), ask(session="s"), ask(cache=True), ask(model="ignored")])
def test_what_does_not_decide_a_reply_leaves_the_key(other: Request) -> None:
    assert request_key(other, "m") == request_key(ask(), "m")


def test_an_integer_temperature_is_the_same_as_a_float() -> None:
    assert request_key(ask(temperature=0), "m") == request_key(ask(temperature=0.0), "m")


def test_the_key_does_not_depend_on_a_secret_or_the_order_of_extra() -> None:
    one = ask(extra={"api_key": Secret("one-secret"), "a": 1})
    other = ask(extra={"a": 1, "api_key": "other-secret"})
    assert request_key(one, "m") == request_key(other, "m")


def test_extra_that_is_no_json_has_a_key_all_the_same() -> None:
    assert request_key(ask(extra={"tool": object()}), "m") == request_key(ask(extra={"tool": object()}), "m")


def test_a_lone_surrogate_counts_as_what_is_sent_for_it() -> None:
    assert request_key(ask("a\ud800b"), "m") == request_key(ask("a?b"), "m")


@given(MESSAGES)
def test_any_messages_have_the_key_that_their_record_has(messages: list[Message]) -> None:
    request = Request(tuple(messages))
    kept = msgspec.json.decode(recording.jsontext.encode(recording.decisive(request, "m")), type=Request)
    assert request_key(kept, "m") == request_key(request, "m")


# --- writing and reading -----------------------------------------------------------------------


async def test_a_line_says_what_was_asked_and_answered_and_nothing_more(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    reply = Reply("yes", "length", Usage(1, 2, 3, 0.5), "m-2026", "id-1", raw={"not": "kept"})
    client = RecordingLM(ScriptedLM([reply], model_name="m"), path)
    request = ask(
        "q", timeout=9.0, session="s", cache=True, seed=3, extra={"api_key": "sk-123456789", "k": 1}
    )
    assert await client.complete(request) == reply
    await client.aclose()
    [line] = path.read_text().splitlines()
    data = json.loads(line)
    assert set(data) == {"key", "when", "client", "request", "reply", "seconds"}
    assert (data["key"], data["client"]) == (request_key(request, "m"), "ScriptedLM")
    assert data["request"] == {
        "messages": [{"role": "user", "content": "q"}], "model": "m", "seed": 3,
        "extra": {"api_key": "**********", "k": 1},
    }  # fmt: skip
    assert data["reply"] == {
        "text": "yes", "finish": "length", "model": "m-2026", "id": "id-1",
        "usage": {"input_tokens": 1, "output_tokens": 2, "cached_tokens": 3, "cost": 0.5},
    }  # fmt: skip
    assert data["when"].endswith("Z")
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(data["when"])
    assert age < datetime.timedelta(minutes=1)
    assert 0 <= data["seconds"] < 60


class PlainStream:
    def __init__(self) -> None:
        self._left: list[str | Reply] = ["a", Reply("a")]

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str | Reply:
        if not self._left:
            raise StopAsyncIteration
        return self._left.pop(0)


class PlainStreamLM(BaseLM):
    """Whose stream is an iterator and no more."""

    async def complete(self, request: Request) -> Reply:
        return Reply("a")

    def stream(self, request: Request) -> AsyncIterator[str | Reply]:
        return PlainStream()


async def test_the_requests_own_model_is_recorded(tmp_path: Path) -> None:
    client = RecordingLM(ScriptedLM("x", model_name="m"), tmp_path / "r.jsonl")
    await client.complete(ask(model="other"))
    [recorded] = load(tmp_path / "r.jsonl")
    assert (recorded.model, recorded.key) == ("other", request_key(ask(), "other"))
    await client.aclose()


async def test_a_recording_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    Recorder(tmp_path / "r.jsonl").close()
    assert stat.S_IMODE((tmp_path / "r.jsonl").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("name", "reason"),
    [("missing/r.jsonl", "No such file or directory"), ("", "Is a directory"), ("file/r.jsonl", "Not a dir"),
     ("a\0b", "null byte")],
)  # fmt: skip
def test_a_path_that_cannot_be_written_is_a_config_error_and_leaves_nothing(
    tmp_path: Path, name: str, reason: str
) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ConfigError, match=f"the recording '.*' cannot be written: .*{reason}"):
        RecordingLM(ScriptedLM("x"), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


def test_a_run_with_such_a_path_is_refused_likewise(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written: No such file"):
        RLM(backend=ScriptedLM("x"), record=tmp_path / "missing" / "r.jsonl").completion("context")


async def test_a_stream_that_has_no_end_of_its_own_is_recorded(tmp_path: Path) -> None:
    client = RecordingLM(PlainStreamLM(), tmp_path / "r.jsonl")
    assert isinstance(client, SupportsStream)
    assert [piece async for piece in client.stream(ask())] == ["a", Reply("a")]
    assert [recorded.reply.text for recorded in load(tmp_path / "r.jsonl")] == ["a"]
    await client.aclose()


async def test_a_call_that_fails_is_not_recorded(tmp_path: Path) -> None:
    client = RecordingLM(ScriptedLM([ModelError("no"), "yes"]), tmp_path / "r.jsonl")
    with pytest.raises(ModelError, match="no"):
        await client.complete(ask())
    await client.complete(ask())
    assert [recorded.reply.text for recorded in load(tmp_path / "r.jsonl")] == ["yes"]
    await client.aclose()


async def test_two_clients_share_one_file_which_neither_closes(tmp_path: Path) -> None:
    with Recorder(tmp_path / "r.jsonl") as recorder:
        one = RecordingLM(ScriptedLM(lambda _: "one", model_name="m1"), recorder)
        two = recorder.record(ScriptedLM(lambda _: "two", model_name="m2"))
        await asyncio.gather(*(client.complete(ask(f"{i}")) for i in range(20) for client in (one, two)))
        await one.aclose()
        await two.complete(ask("after"))
    found = load(tmp_path / "r.jsonl")
    assert len(found) == 41
    assert {(recorded.model, recorded.reply.text) for recorded in found} == {("m1", "one"), ("m2", "two")}
    assert [recorded.line for recorded in found] == list(range(1, 42))


async def test_a_second_recording_is_appended(tmp_path: Path) -> None:
    for text in ("one", "two"):
        client = RecordingLM(ScriptedLM([text]), tmp_path / "r.jsonl")
        await client.complete(ask())
        await client.aclose()
    assert [recorded.reply.text for recorded in load(tmp_path / "r.jsonl")] == ["one", "two"]


async def test_a_torn_line_is_left_out_when_reading_and_ended_when_appending(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "r.jsonl"
    client = RecordingLM(ScriptedLM(["one", "two"]), path)
    await client.complete(ask())
    await client.complete(ask())
    await client.aclose()
    path.write_bytes(path.read_bytes()[:-20])  # the machine went down here
    assert [recorded.reply.text for recorded in load(path)] == ["one"]
    assert f"{path}, line 2 is left out" in log_of(caplog)[0]
    client = RecordingLM(ScriptedLM(["three"]), path)
    await client.complete(ask())
    await client.aclose()
    assert [(recorded.line, recorded.reply.text) for recorded in load(path)] == [(1, "one"), (3, "three")]


async def test_a_full_disk_ends_the_recording_with_one_warning_and_not_the_run(
    caplog: pytest.LogCaptureFixture,
) -> None:
    client = RecordingLM(ScriptedLM(["one", "two"]), "/dev/full")
    assert [(await client.complete(ask())).text for _ in range(2)] == ["one", "two"]
    assert log_of(caplog) == [
        f"the recording /dev/full ends here: [Errno {errno.ENOSPC}] No space left on device"
    ]
    await client.aclose()


async def test_a_reply_that_cannot_be_written_is_given_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    strange = Reply("paid for", id=object())  # type: ignore[arg-type]
    client = RecordingLM(ScriptedLM([strange]), tmp_path / "r.jsonl")
    assert (await client.complete(ask())).text == "paid for"
    assert "a reply of ScriptedLM is not recorded" in log_of(caplog)[0]
    await client.aclose()


def test_equal_texts_are_held_once(tmp_path: Path) -> None:
    with Recorder(tmp_path / "r.jsonl") as recorder:
        for turn in range(3):
            recorder.write("C", "m", ask(*(f"turn {i}" for i in range(turn + 1))), Reply("r"), 0.1)
    firsts = {id(recorded.request.messages[0].content) for recorded in load(tmp_path / "r.jsonl")}
    assert len(firsts) == 1


@settings(deadline=None)
@given(st.lists(st.tuples(MESSAGES, TEXTS), min_size=1, max_size=5))
def test_any_conversation_comes_back_as_it_was_but_for_surrogates(
    tmp_path_factory: pytest.TempPathFactory, calls: list[tuple[list[Message], str]]
) -> None:
    path = tmp_path_factory.mktemp("recording") / "r.jsonl"
    with Recorder(path) as recorder:
        for messages, text in calls:
            recorder.write("C", "m", Request(tuple(messages)), Reply(text), 0.0)

    def sent(text: str) -> str:
        return text.encode("utf-8", "replace").decode()

    found = load(path)
    assert [recorded.reply.text for recorded in found] == [sent(text) for _, text in calls]
    assert [[(m.role, m.content) for m in recorded.request.messages] for recorded in found] == [
        [(m.role, sent(m.content)) for m in messages] for messages, _ in calls
    ]


# --- what cannot be read -----------------------------------------------------------------------

LINE = msgspec.json.encode(
    Recorded("k", datetime.datetime.now(datetime.UTC), "C", ask(), Reply("r"), 0.1)
).decode()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty; run once with record="),
        ("\n\n", "not one of its lines is a recorded call; run once with record="),
        ("just\nsome text\n", "not one of its lines is a recorded call"),
        (f'{LINE}\n\n{{"event":"warned","at":1.0}}\n', "line 3: .*`key`.* take the line out"),
        (f"{LINE}\n[1]\n", "line 2: Expected `object`"),
        (LINE.replace('"text":"r"', '"text":5') + "\n", r"line 1: .*\$\.reply\.text"),
    ],
)
def test_a_file_that_is_no_recording_says_which_line_and_what_to_do(
    tmp_path: Path, content: str, said: str
) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match=said) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_there_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no recording .*: run once with record="):
        load(tmp_path / "r.jsonl")


def test_a_folder_is_no_recording(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path)


def test_bytes_are_no_recording(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_bytes(bytes(range(256)) * 20)
    with pytest.raises(ConfigError, match="not one of its lines"):
        load(tmp_path / "r.jsonl")


# --- what is passed through --------------------------------------------------------------------

OFFERS = (SupportsStream, SupportsCount, SupportsPoolKey)


def test_it_offers_what_its_client_offers(tmp_path: Path) -> None:
    with Recorder(tmp_path / "r.jsonl") as recorder:
        plain, offering = RecordingLM(ScriptedLM("x"), recorder), RecordingLM(OfferingLM(), recorder)
    assert [isinstance(plain, offer) for offer in OFFERS] == [False] * 3
    assert [isinstance(offering, offer) for offer in OFFERS] == [True] * 3
    assert isinstance(offering, RecordingLM)
    assert (plain.simulated, offering.simulated) == (True, False)
    assert type(RecordingLM(OfferingLM(), recorder)) is type(offering)


async def test_it_is_to_the_outside_what_its_client_is(tmp_path: Path) -> None:
    inner = OfferingLM()
    client = RecordingLM(inner, tmp_path / "r.jsonl")
    assert isinstance(client, SupportsCount)
    assert isinstance(client, SupportsPoolKey)
    assert (client.model_name, client.simulated, client.info("m").context_window) == ("offering", False, 123)
    assert await client.prepare() == "a sentence"
    assert await client.count(ask()) == (7, True)
    assert client.pool_key("m") == "pool of m"
    await client.aclose()
    await client.aclose()
    assert inner.closed == 2


async def test_a_name_that_is_learnt_in_preparation_is_the_name_that_is_recorded(tmp_path: Path) -> None:
    inner = OfferingLM()
    client = RecordingLM(inner, tmp_path / "r.jsonl")
    inner.model_name = "learnt"
    await client.complete(ask())
    assert client.model_name == load(tmp_path / "r.jsonl")[0].model == "learnt"
    await client.aclose()


async def test_a_stream_is_passed_on_and_its_reply_recorded(tmp_path: Path) -> None:
    client = RecordingLM(OfferingLM(), tmp_path / "r.jsonl")
    assert isinstance(client, SupportsStream)
    assert [piece async for piece in client.stream(ask())] == ["in ", "pieces", Reply("in pieces")]
    assert [recorded.reply.text for recorded in load(tmp_path / "r.jsonl")] == ["in pieces"]
    await client.aclose()


async def test_a_stream_that_is_left_is_left_in_the_client_too_and_not_recorded(tmp_path: Path) -> None:
    inner = OfferingLM()
    client = RecordingLM(inner, tmp_path / "r.jsonl")
    assert isinstance(client, SupportsStream)
    stream = client.stream(ask())
    assert await anext(stream) == "in "
    await stream.aclose()  # type: ignore[attr-defined]
    assert inner.left
    assert (tmp_path / "r.jsonl").read_bytes() == b""
    await client.aclose()


async def test_what_is_no_reply_is_passed_on_for_others_to_refuse(tmp_path: Path) -> None:
    class Odd(OfferingLM):
        async def complete(self, request: Request) -> Reply:
            return "a str"  # type: ignore[return-value]

    client = RecordingLM(Odd(), tmp_path / "r.jsonl")
    assert await client.complete(ask()) == "a str"
    assert (tmp_path / "r.jsonl").read_bytes() == b""
    await client.aclose()


def test_a_torn_line_on_a_full_disk_stops_the_recording_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl.Appender, "_ends_in_a_torn_line", lambda self: True)
    caplog.set_level(logging.WARNING)
    Recorder("/dev/full").write("C", "m", ask(), Reply("r"), 0.1)
    assert len(log_of(caplog)) == 1

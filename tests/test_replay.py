"""Facts about the client that answers from a recording."""

import asyncio
import datetime
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm import RLM
from rlm.client import Message, Reply, Request, Usage
from rlm.errors import ConfigError, ModelError, ReplayMiss
from rlm.plugins import load
from rlm.recording import Recorded, Recorder, RecordingLM
from rlm.testing import ClientSuite
from rlm.testing.clients import Connect
from rlm_replay import ReplayLM
from rlm_replay.nearest import common_prefix, common_suffix, nearest
from rlm_scripted import ScriptedLM

Record = Callable[..., Path]


def ask(*texts: str, **fields: Any) -> Request:
    return Request(tuple(Message("user", text) for text in texts or ("hello",)), **fields)


class TestSuite(ClientSuite):
    speaks = None

    @pytest.fixture
    def connect(self, record: Record) -> Connect:
        asked = ["hello", *(f"call {i}" for i in range(50)), "what the user wants nobody to know"]
        path = record(*((ask(text), f"of {text}") for text in asked))
        return lambda url, key: ReplayLM(path)


@pytest.fixture
def record(tmp_path: Path) -> Record:
    """A recording of these requests and replies, all of the model m unless a request says otherwise."""

    def made(*calls: tuple[Request, Reply | str]) -> Path:
        with Recorder(tmp_path / "r.jsonl") as recorder:
            for request, reply in calls:
                whole = Reply(reply) if isinstance(reply, str) else reply
                recorder.write("C", request.model or "m", request, whole, 0.1)
        return tmp_path / "r.jsonl"

    return made


async def miss(path: Path, request: Request, **settings: Any) -> str:
    with pytest.raises(ReplayMiss) as caught:
        await ReplayLM(path, **settings).complete(request)
    return str(caught.value)


# --- what was recorded -------------------------------------------------------------------------


async def test_what_was_recorded_is_replayed_to_whoever_asks_at_the_same_time(tmp_path: Path) -> None:
    async def late(messages: Any) -> str:
        await asyncio.sleep(random.random() / 50)
        return f"re: {messages[-1].content}"

    client = RecordingLM(ScriptedLM(late), tmp_path / "r.jsonl")
    requests = [ask(f"call {i} \ud800 \u00e9", temperature=0.5, stop=("x", "y")) for i in range(100)]
    first = await asyncio.gather(*(client.complete(request) for request in requests))
    await client.aclose()
    replay = ReplayLM(tmp_path / "r.jsonl")
    random.shuffle(order := list(range(100)))
    second = await asyncio.gather(*(replay.complete(requests[i]) for i in order))
    for i, reply in zip(order, second, strict=True):
        assert reply.text == first[i].text.replace("\ud800", "?")
        assert (reply.finish, reply.model) == (first[i].finish, first[i].model)
        assert reply.usage.output_tokens == first[i].usage.output_tokens


def test_a_whole_run_is_replayed_by_name(tmp_path: Path) -> None:
    cell = "```repl\nFINAL(llm_query('how much?') + '!')\n```"
    script = ScriptedLM(lambda messages: cell if len(messages) > 1 else "much")
    with Recorder(tmp_path / "r.jsonl") as recorder:
        rlm = RLM(backend=RecordingLM(script, recorder), environment="local")
        first = rlm.completion("a context", root_prompt="How much is it?")
    settings = {"path": str(tmp_path / "r.jsonl")}
    with RLM(backend="replay", backend_kwargs=settings, environment="local") as rlm:
        again = rlm.completion("a context", root_prompt="How much is it?")
    assert first.response == again.response == "much!"
    assert first.usage_summary.total_calls == again.usage_summary.total_calls == 2
    assert again.usage_summary.total_cost == 0.0


async def test_it_answers_to_the_name_of_every_model_that_was_recorded(tmp_path: Path) -> None:
    with Recorder(tmp_path / "r.jsonl") as recorder:
        for name in ("root", "A", "root", "B"):
            client = RecordingLM(ScriptedLM(lambda _, name=name: f"of {name}", model_name=name), recorder)
            await client.complete(ask("the same"))
    replay = ReplayLM(tmp_path / "r.jsonl")
    assert (replay.model_name, replay.model_names) == ("root", ("root", "A", "B"))
    for name in replay.model_names:
        assert (await replay.complete(ask("the same", model=name))).text == f"of {name}"
    with pytest.raises(ReplayMiss):
        await replay.complete(ask("the same", model="C"))
    one = ReplayLM(tmp_path / "r.jsonl", model_name="B")
    assert (one.model_names, (await one.complete(ask("the same"))).text) == (("B",), "of B")


def test_it_is_found_by_its_name_and_says_that_no_model_answers() -> None:
    assert load("rlm.clients", "replay") is ReplayLM
    assert ReplayLM.simulated


async def test_a_request_recorded_several_times_gets_its_replies_in_order_and_then_the_last(
    record: Record,
) -> None:
    path = record((ask("a"), "one"), (ask("b"), "other"), (ask("a"), "two"), (ask("a"), "three"))
    replay = ReplayLM(path)
    assert [(await replay.complete(ask("a"))).text for _ in range(5)] == [
        "one",
        "two",
        "three",
        "three",
        "three",
    ]
    assert (await replay.complete(ask("b"))).text == "other"


async def test_tokens_are_as_recorded_and_nothing_is_paid(record: Record) -> None:
    usage = Usage(100, 50, 30, 0.25, 20, 10, True)
    path = record((ask(), Reply("r", "length", usage, "m-2026", "id-1")))
    assert await ReplayLM(path).complete(ask()) == Reply(
        "r", "length", Usage(100, 50, 30, 0.0, 20, 10, True), "m-2026", "id-1"
    )
    assert '"cost":0.25' in path.read_text()


async def test_a_call_without_a_known_cost_costs_nothing_to_replay(record: Record) -> None:
    assert (await ReplayLM(record((ask(), "r"))).complete(ask())).usage.cost == 0.0


async def test_time_and_caching_are_no_part_of_what_is_asked(record: Record) -> None:
    replay = ReplayLM(record((ask(), "r")))
    assert (await replay.complete(ask(timeout=1.0, session="s", cache=True))).text == "r"


# --- models ------------------------------------------------------------------------------------


async def test_the_model_is_the_one_that_was_asked_first(record: Record) -> None:
    path = record((ask("a", model="root"), "from root"), (ask("a", model="sub"), "from sub"))
    replay = ReplayLM(path)
    assert replay.model_name == "root"
    assert (await replay.complete(ask("a"))).text == "from root"
    assert (await replay.complete(ask("a", model="sub"))).text == "from sub"
    assert (await ReplayLM(path, model_name="sub").complete(ask("a"))).text == "from sub"


async def test_a_model_that_was_not_recorded_is_a_miss_that_says_so(record: Record) -> None:
    path = record((ask("a"), "r"))
    said = await miss(path, ask("a", model="other"))
    assert "99.9 % the same" in said
    assert "it differs in model: recorded 'm', asked 'other'" in said
    assert "differs in model: recorded 'm', asked 'mine'" in await miss(path, ask("a"), model_name="mine")


async def test_preparing_says_what_is_replayed(record: Record) -> None:
    path = record((ask("a", model="root"), "1"), (ask("b", model="sub"), "2"))
    replay = ReplayLM(path)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    assert (
        await replay.prepare()
        == f"replaying 2 recorded replies of root and sub from {path}, recorded {today}"
    )


async def test_closing_twice_is_closing(record: Record) -> None:
    replay = ReplayLM(record((ask(), "r")))
    await replay.aclose()
    await replay.aclose()


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "there is no recording"), ("", "is empty"), ("x\n", "is no recording"), ("{}\n", "line 1")],
)
def test_a_file_that_is_no_recording_is_a_config_error(
    tmp_path: Path, content: str | None, said: str
) -> None:
    if content is not None:
        (tmp_path / "r.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=f"{said}.* run once with record="):
        ReplayLM(str(tmp_path / "r.jsonl"))


# --- misses ------------------------------------------------------------------------------------


async def test_a_miss_names_the_nearest_line_how_near_it_is_and_the_first_difference(record: Record) -> None:
    path = record(
        (ask("something else"), "1"), (ask("x" * 90 + "recorded" + "y" * 100), "2"), (ask("z"), "3")
    )
    said = await miss(path, ask("x" * 90 + "requested" + "y" * 100))
    assert f"{path} holds no reply for this request. The nearest of 3 recorded is in line 2, 9" in said
    assert "it differs in messages[0].content, character 92: recorded ..." in said
    assert repr("x" * 18 + "recorded" + "y" * 34) in said
    assert repr("x" * 18 + "requested" + "y" * 33) in said
    assert said.endswith("Record again with record=, or ask what was asked then.")


async def test_a_miss_is_no_failure_that_may_pass_and_nothing_was_sent(record: Record) -> None:
    with pytest.raises(ReplayMiss) as caught:
        await ReplayLM(record((ask(), "r"))).complete(ask("other"))
    assert isinstance(caught.value, ModelError)
    assert (caught.value.retryable, caught.value.sent) == (False, False)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (ask("a", "b"), "messages[1]: recorded no such message, asked user: 'b'"),
        (Request((Message("system", "a"),)), "messages[0].role: recorded 'user', asked 'system'"),
        (ask("a", max_tokens=5), "max_tokens: recorded None, asked 5"),
        (ask("a", temperature=0.5), "temperature: recorded None, asked 0.5"),
        (ask("a", stop=("s",)), "stop: recorded None, asked ('s',)"),
        (
            ask("a", extra={"api_key": "sk-123456789"}),
            "extra: recorded None, asked {'api_key': '**********'}",
        ),
        (Request(()), "messages[0]: recorded user: 'a', asked no such message"),
    ],
)
async def test_whatever_differs_is_told(record: Record, asked: Request, said: str) -> None:
    assert f"it differs in {said}. " in await miss(record((ask("a"), "r")), asked)


async def test_a_surrogate_is_no_difference(record: Record) -> None:
    said = await miss(record((ask("a\ud800b", "one"), "r")), ask("a\ud800b", "two"))
    assert "it differs in messages[1].content, character 0: recorded 'one', asked 'two'" in said


async def test_after_many_misses_only_the_miss_is_told(record: Record) -> None:
    replay = ReplayLM(record((ask("a"), "r")))
    said = []
    for i in range(21):
        with pytest.raises(ReplayMiss) as caught:
            await replay.complete(ask(f"other {i}"))
        said.append("The nearest of" in str(caught.value))
    assert said == [True] * 20 + [False]


def recorded(line: int, *texts: str, **fields: Any) -> Recorded:
    request = ask(*texts, model="m", **fields)
    return Recorded(str(line), datetime.datetime.now(datetime.UTC), "C", request, Reply("r"), 0.1, line)


def test_the_nearest_is_found_though_it_differs_at_both_ends() -> None:
    middle = " ".join(f"word{i}" for i in range(50))
    found = nearest(
        ask(f"12:30 {middle} bye", model="m"),
        [recorded(1, "12:30 nothing of that"), recorded(2, f"11:45 {middle} end"), recorded(3, middle[::-1])],
    )
    assert found.line == 2
    assert found.similarity > 0.9


def test_of_equally_near_ones_it_is_that_with_the_same_settings_and_then_the_earlier() -> None:
    many = [recorded(1, "a"), recorded(2, "a", seed=1), recorded(3, "a", seed=1)]
    assert nearest(ask("a", model="m", seed=1, max_tokens=3), many).line == 2


def test_a_conversation_is_nearest_to_its_own_turn() -> None:
    turns = [recorded(i, *(f"turn {j} of a conversation" for j in range(i))) for i in range(1, 6)]
    asked = ask("turn 0 of a conversation", "turn 1 of a conversation", "turn 2 of another", model="m")
    found = nearest(asked, turns)
    assert (found.line, found.where) == (3, "messages[2].content, character 11")


def test_among_long_prompts_that_begin_alike_the_nearest_is_found() -> None:
    prefix = "p" * 99_000
    many = [recorded(i, f"{prefix} question {i} {'s' * 1000}") for i in range(1, 301)]
    found = nearest(ask(f"{prefix} question 77 or so {'s' * 1000}", model="m"), many)
    assert found.line == 77
    assert found.where == "messages[0].content, character 99,013"


@settings(deadline=None)
@given(st.text("ab", max_size=9000), st.text("ab", max_size=9000), st.text("ab", max_size=20))
def test_the_same_beginning_and_end_are_measured_exactly(one: str, other: str, shared: str) -> None:
    a, b = shared + one, shared + other
    expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert common_prefix(a, b) == expected
    assert common_suffix(a[::-1], b[::-1], min(len(a), len(b))) == expected
    bound = min(len(a), len(b), 3)
    assert common_suffix(a[::-1], b[::-1], bound) == min(expected, bound)


@pytest.mark.parametrize("length", [1, 4095, 4096, 4097, 10_000])
def test_long_beginnings_and_ends_are_measured_exactly(length: int) -> None:
    same = "x" * length
    for one, other in ((same, same), (same, same + "y"), (same + "a", same + "b"), (same + "\u4e2d", same)):
        assert common_prefix(one, other) == length
        assert common_suffix(one[::-1], other[::-1], length) == length


TEXTS = st.text(st.one_of(st.characters(), st.sampled_from("\ud800\udcff\udfff")), max_size=30)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(TEXTS, max_size=3), min_size=1, max_size=5), st.lists(TEXTS, max_size=3))
def test_whatever_was_recorded_is_found_and_whatever_was_not_is_a_miss(
    conversations: list[list[str]], other: list[str]
) -> None:
    requests = [Request(tuple(Message("user", text) for text in texts)) for texts in conversations]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "r.jsonl")
        with Recorder(path) as recorder:
            for request in requests:
                recorder.write("C", "m", request, Reply("found"), 0.0)
        replay = ReplayLM(path)
        assert {asyncio.run(replay.complete(request)).text for request in requests} == {"found"}
        with pytest.raises(ReplayMiss, match="it differs in"):
            asyncio.run(replay.complete(Request(tuple(Message("system", text) for text in [*other, "x"]))))

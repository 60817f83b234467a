"""Facts about the host's end of a worker, told by one whose every frame is the test's."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import pytest

from rlm import protocol, wire
from rlm.environment import LOSS_CHARACTERS, LOSSES, Host, REPLResult, WorkerEnv
from rlm.errors import ConfigError, SandboxError, SandboxLost
from rlm.events import EventBus
from rlm.handler import LMHandler
from rlm.ledger import Ledger
from rlm.limits import Limits
from rlm.session import Answers, Session
from rlm.snapshot import Snapshot
from rlm.tools import Tools

PATIENCE = 20
"""Seconds after which something that never comes fails a test. No test waits for it to pass."""

Frame = tuple[dict[str, Any], list[bytes]]


class Puppet(WorkerEnv):
    """An environment whose worker says what the test wants."""

    def __init__(self) -> None:
        super().__init__()
        self._decoder = wire.Decoder(wire.parse_dict)
        self._writer: asyncio.StreamWriter | None = None

    async def launch(self, session: Session, handler: LMHandler) -> None:
        self._reader, self._writer = await asyncio.open_connection(*handler.address)
        self.say({"t": "hello", "v": wire.PROTOCOL_VERSION, "token": session.token, "python": "3.11.7"})

    async def stop(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def say(self, header: dict[str, Any], *blobs: bytes) -> None:
        assert self._writer is not None
        self._writer.write(wire.encode(header, blobs))

    async def heard(self) -> Frame:
        """The next frame from the host."""
        async with asyncio.timeout(PATIENCE):
            while (frame := self._decoder.next_frame()) is None:
                data = await self._reader.read(1 << 16)
                assert data, "the host closed the connection"
                self._decoder.feed(data)
            return frame

    async def doing(
        self, work: Awaitable[Any], *replies: Callable[[int], tuple[dict[str, Any], Sequence[bytes]]]
    ) -> Any:
        """What comes of something that the host asks for, when each request is replied to like this."""
        task = asyncio.ensure_future(work)
        for reply in replies:
            header, _ = await self.heard()
            message, blobs = reply(header["id"])
            self.say(message, *blobs)
        async with asyncio.timeout(PATIENCE):
            return await task

    async def cell(self, parts: dict[str, bytes] | None = None, **fields: Any) -> REPLResult:
        """A cell whose result has these parts."""
        found: REPLResult = await self.doing(self.execute("..."), result(parts, **fields))
        return found


def result(parts: dict[str, bytes] | None = None, **fields: Any) -> Any:
    parts = parts or {}
    return lambda number: (
        {"t": "result", "id": number, "parts": list(parts), **fields},
        list(parts.values()),
    )


def loaded(**fields: Any) -> Any:
    return lambda number: ({"t": "loaded", "id": number, **fields}, [])


class House:
    """A handler, and what it is asked in the name of which run."""

    def __init__(self, handler: LMHandler) -> None:
        self.handler = handler
        self.asked: list[tuple[str, list[str]]] = []
        self.cancelled: list[list[str]] = []

    def host(self, run: str = "first", **settings: Any) -> Host:
        async def serve(call: protocol.Call, texts: list[str]) -> Answers:
            self.asked.append((run, texts))
            try:
                if "hold" in texts:
                    await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled.append(texts)
                raise
            return [f"{run}: {text}" for text in texts]

        return Host(self.handler, serve, run=run, **settings)

    async def until_asked(self, count: int) -> None:
        async with asyncio.timeout(PATIENCE):
            while len(self.asked) < count:
                await asyncio.sleep(0.001)


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with LMHandler(None, Ledger(Limits()), EventBus()) as handler:
        yield House(handler)


@pytest.fixture
async def env(house: House) -> AsyncIterator[Puppet]:
    env = Puppet()
    await env.start(house.host())
    yield env
    await env.close()


def call(number: int, text: bytes) -> tuple[dict[str, Any], bytes]:
    return {"t": "call", "id": number, "fn": "llm_query"}, text


# --- results -----------------------------------------------------------------------------------


async def test_a_result_is_what_its_parts_say(env: Puppet) -> None:
    parts = {
        "stdout": b"out",
        "stderr": b"err",
        "echo": b"1",
        "value": b"1",
        "final": b"x",
        "final_value": b"[2]",
        "draft": b"d",
    }
    found = await env.cell(parts, note="n", error=["E", "text"])
    assert (found.stdout, found.stderr, found.echo, found.value) == ("out", "err", "1", 1)
    assert (found.final_answer, found.final_value, found.draft, found.note) == ("x", [2], "d", "n")
    assert found.error is not None and (found.error.type, found.error.message) == ("E", "text")


@pytest.mark.parametrize(
    "value",
    [b"", b"{", b"\xff", b"[" * 100_000, b"9" * 5000, b"[" + b"0," * 600_000 + b"0]"],
    ids=lambda v: v[:5],
)
async def test_a_value_that_is_no_data_or_more_than_a_worker_sends_is_none(env: Puppet, value: bytes) -> None:
    found = await env.cell({"value": value, "final": b"1", "final_value": value})
    assert (found.value, found.final_value, found.final_answer) == (None, None, "1")


async def test_saved_variables_in_the_result_of_a_cell_are_nothing(env: Puppet) -> None:
    assert (await env.cell({"snapshot": b"\x80\x04forged", "echo": b"1"})).echo == "1"


@pytest.mark.parametrize(
    "frame",
    [
        {"t": "result", "id": 77}, {"t": "loaded", "id": -77}, {"t": "loaded", "id": -77, "error": "x"},
        {"t": "crash", "crash": {"cause": "x", "code": 1, "state": "lost"}},
        {"t": "output", "id": 77, "stream": "stdout"},
    ],
    ids=str,
)  # fmt: skip
async def test_an_answer_that_nobody_waits_for_is_dropped(env: Puppet, frame: dict[str, Any]) -> None:
    env.say(frame)
    assert (await env.cell({"echo": b"1"})).echo == "1"


@pytest.mark.parametrize("kind", ["result", "loaded"])
async def test_an_answer_to_something_else_ends_the_session(env: Puppet, kind: str) -> None:
    wrong = {"result": loaded, "loaded": result}[kind]
    work = env.execute("...") if kind == "result" else env.add_context("c")
    with pytest.raises(SandboxLost, match="an answer to something else"):
        await env.doing(work, wrong())


async def test_parts_that_are_not_there_end_the_session(env: Puppet) -> None:
    with pytest.raises(SandboxLost, match="a result that does not add up"):
        await env.doing(env.execute("..."), lambda n: ({"t": "result", "id": n, "parts": ["echo"]}, []))


# --- saved variables ---------------------------------------------------------------------------


NO_REPORTS = (b"5", b'"text"', b'{"a": 1}', b"null", b"{", b"", b"[" + b"0," * 600_000 + b"0]")
"""What no sandbox says that has saved something."""


async def test_saving_sends_what_it_takes_and_gives_the_bytes_as_they_are(env: Puppet) -> None:
    task = asyncio.create_task(env.snapshot())
    header, blobs = await env.heard()
    assert (header["t"], header["keep"], len(blobs)) == ("execute", "save", 2)
    env.say({"t": "result", "id": 1, "parts": ["snapshot", "value"]}, b"\x00bytes", b'["x (lock: no)"]')
    assert await task == Snapshot("3.11.7", b"\x00bytes", ("x (lock: no)",))


@pytest.mark.parametrize(
    ("report", "lost"),
    [
        *((report, ()) for report in (*NO_REPORTS, b"[]")),
        (b"[1, null, [2]]", ("1", "None", "[2]")),
        (json.dumps(["x" * 1000]).encode(), ("x" * LOSS_CHARACTERS,)),
        (json.dumps(["x"] * 1000).encode(), ("x",) * LOSSES),
    ],
    ids=lambda value: str(value)[:20],
)
async def test_a_report_of_what_is_lost_is_a_few_short_texts(
    env: Puppet, report: bytes, lost: tuple[str, ...]
) -> None:
    saved = await env.doing(env.snapshot(), result({"snapshot": b"s", "value": report}))
    assert saved.lost == lost


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (result(), "the sandbox gives none"),
        (result({"value": b"[]"}), "the sandbox gives none"),
        (result(error=["ValueError", "too large"]), "ValueError: too large"),
        (result(crash={"cause": "exit", "code": 3, "state": "restored"}), "CellCrash"),
    ],
)
async def test_variables_that_cannot_be_had_are_an_error(env: Puppet, reply: Any, reason: str) -> None:
    with pytest.raises(SandboxError, match=f"the variables cannot be saved: .*{reason}"):
        await env.doing(env.snapshot(), reply)


async def test_variables_of_another_python_are_not_restored(env: Puppet) -> None:
    with pytest.raises(SandboxError, match=r"saved by Python 3\.10\.1, and this sandbox has 3\.11\.7"):
        await env.restore(Snapshot("3.10.1", b"s"))
    task = asyncio.create_task(env.restore(Snapshot("3.11.99", b"saved")))
    header, blobs = await env.heard()
    assert (header["keep"], blobs[2:]) == ("load", [b"saved"])
    env.say({"t": "result", "id": header["id"]})
    await task


# --- beginning anew ----------------------------------------------------------------------------


async def anew(env: Puppet, host: Host | None = None) -> None:
    await env.doing(env.reset(), loaded())
    if host is not None:
        await env.assign(host)


async def test_a_sandbox_that_begins_anew_numbers_everything_from_the_beginning(
    env: Puppet, house: House
) -> None:
    await env.doing(env.add_context("c"), loaded())
    await env.doing(env.add_history([]), loaded())
    await env.cell()
    await anew(env, house.host("second"))
    assert (env.get_context_count(), env.get_history_count()) == (0, 0)
    task = asyncio.create_task(env.execute("..."))
    assert (await env.heard())[0] == {"t": "execute", "id": 1, "blobs": [3]}
    env.say({"t": "result", "id": 1})
    await task


async def test_calls_of_the_run_before_are_cancelled_and_those_of_the_next_are_its_own(
    env: Puppet, house: House
) -> None:
    env.say(*call(1, b"hold"))
    await house.until_asked(1)
    await anew(env, house.host("second"))
    assert house.cancelled == [["hold"]]
    env.say(*call(1, b"mine"))
    assert await env.heard() == ({"t": "reply", "id": 1, "blobs": [12]}, [b"second: mine"])


async def test_calls_that_were_on_their_way_are_answered_to_nobody(env: Puppet, house: House) -> None:
    """What an executor has said comes after the host's word, and the next one uses the same numbers."""
    task = asyncio.create_task(env.reset())
    header, _ = await env.heard()
    for number in range(1, 5):
        env.say(*call(number, b"hold"))
    env.say({"t": "loaded", "id": header["id"]})
    await task
    await env.assign(house.host("second"))
    for number in range(1, 5):
        env.say(*call(number, b"mine"))
        assert await env.heard() == ({"t": "reply", "id": number, "blobs": [12]}, [b"second: mine"])


async def test_a_call_while_there_is_no_run_is_an_error_of_whoever_makes_it(
    env: Puppet, house: House
) -> None:
    await anew(env)
    env.say(*call(1, b"text"))
    header, _ = await env.heard()
    assert header["error"] == ["SandboxError", "the run that this sandbox was for is over"]
    assert house.asked == []


async def test_a_sandbox_that_does_not_begin_anew_says_why(env: Puppet) -> None:
    with pytest.raises(SandboxError, match="cannot begin anew: these cannot be removed: /tmp/x"):
        await env.doing(env.reset(), loaded(error="these cannot be removed: /tmp/x"))


async def test_a_timeout_of_the_run_before_is_none_of_the_next(env: Puppet, house: House) -> None:
    task = asyncio.create_task(env.execute("...", timeout=0.01))
    assert [(await env.heard())[0]["t"] for _ in range(2)] == ["execute", "interrupt"]
    env.say({"t": "result", "id": 1, "error": ["KeyboardInterrupt", ""]})
    error = (await task).error
    assert error is not None and error.type == "CellTimeout"
    await anew(env, house.host("second"))
    found = await env.doing(env.execute("...", timeout=60), result(error=["KeyboardInterrupt", ""]))
    assert found.error.type == "KeyboardInterrupt"


async def test_a_sandbox_that_died_while_it_had_no_run_is_given_to_none(env: Puppet, house: House) -> None:
    await anew(env)
    await env.stop()
    assert env.session is not None
    await env.session.lost
    with pytest.raises(SandboxLost, match="it ended while it had no run"):
        await env.assign(house.host("second"))


async def test_tools_are_given_again_to_whoever_loses_them(env: Puppet, house: House) -> None:
    await anew(env)
    tools = Tools.parse({"f": len, "n": 5})
    await env.doing(env.assign(house.host("second", tools=tools)), loaded(), loaded())
    lost = {"cause": "exit", "code": 1, "state": "lost"}
    await env.doing(env.execute("..."), result(crash=lost))
    found = await env.doing(env.execute("..."), loaded(), loaded(), result({"echo": b"1"}))
    assert found.echo == "1"


async def test_data_that_the_sandbox_does_not_take_is_an_error_of_its_name(env: Puppet, house: House) -> None:
    await anew(env)
    with pytest.raises(ConfigError, match="n cannot be loaded in the sandbox: no room"):
        await env.doing(
            env.assign(house.host("second", tools=Tools.parse({"n": 5}))), loaded(error="no room")
        )

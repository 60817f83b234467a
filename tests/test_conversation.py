"""Facts about a conversation on the host: its sandbox is one that the test can spoil."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import pickle
import stat
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rlm import RLM, hostloop
from rlm.client import BaseLM, Reply, Request
from rlm.context import Encoded
from rlm.conversation import NEW_ANSWER, Conversation
from rlm.environment import BaseEnv, CellError, Host, REPLResult
from rlm.errors import ConfigError, MaxIterationsExceeded, ModelError, SandboxError, SandboxLost
from rlm.events import Restored
from rlm.snapshot import KEY_VARIABLE, Snapshot

PATIENCE = 20
"""Seconds after which something that never comes fails a test. No test waits for it to pass."""

KEY = "sk-0123456789"


class Sandbox(BaseEnv):
    """Runs the test's cells in this process, and keeps everything that a conversation asks of it."""

    def __init__(self, kind: Kind | None = None) -> None:
        self.kind = kind or Kind()
        self.names: dict[str, Any] = {}
        self.counts = {"context": 0, "history": 0}
        self.done: list[str] = []
        self.kind.made.append(self)

    async def do(self, what: str) -> None:
        self.done.append(what)
        await self.kind.happen(what)

    async def start(self, host: Host) -> None:
        self.host = host
        await self.do("start")

    def update_handler_address(self, address: tuple[str, int]) -> None:
        self.done.append("handler")

    async def add_context(self, value: Any, context_index: int | None = None) -> int:
        await self.do("context")
        return self._add("context", value, context_index)

    def get_context_count(self) -> int:
        return self.counts["context"]

    async def add_history(
        self, message_history: Sequence[Mapping[str, Any]], history_index: int | None = None
    ) -> int:
        await self.do("history")
        return self._add("history", message_history, history_index)

    def get_history_count(self) -> int:
        return self.counts["history"]

    def _add(self, kind: str, value: Any, index: int | None) -> int:
        index = self.counts[kind] if index is None else index
        self.names[f"{kind}_{index}"] = value
        self.counts[kind] = max(self.counts[kind], index + 1)
        return index

    async def execute(self, code: str, *, timeout: float | None = None) -> REPLResult:
        if code in (NEW_ANSWER, ""):  # the conversation's own
            assert timeout is not None
            await self.do("answer" if code else "look")
            return REPLResult(error=self.kind.error if code else None)
        await self.do("cell")
        final: list[Any] = []
        self.names["FINAL"] = final.append
        try:
            exec(code, self.names)
        except ZeroDivisionError as error:
            return REPLResult(error=CellError("exception", "ZeroDivisionError", str(error)))
        return REPLResult(final_answer=str(final[0]) if final else None)

    async def snapshot(self) -> Snapshot:
        await self.do("snapshot")
        kept = {name: value for name, value in self.names.items() if type(value) is int}
        return Snapshot("3.11.7", pickle.dumps(kept), self.kind.lost)

    async def restore(self, saved: Snapshot) -> None:
        await self.do("restore")
        self.names.update(pickle.loads(saved.data))

    async def close(self) -> None:
        await self.do("close")

    @property
    def is_closed(self) -> bool:
        return "close" in self.done


class Kind:
    """All sandboxes that a test makes, and what goes wrong with them."""

    def __init__(self) -> None:
        self.made: list[Sandbox] = []
        self.wrong: dict[str, Callable[[], Any]] = {}
        self.error: CellError | None = None
        self.lost: tuple[str, ...] = ()

    def __call__(self) -> Sandbox:
        return Sandbox(self)

    async def happen(self, what: str) -> None:
        if what in self.wrong:
            await self.wrong[what]()

    def fails(self, what: str, error: BaseException) -> None:
        async def fail() -> None:
            raise error

        self.wrong[what] = fail

    def waits(self, what: str) -> tuple[threading.Event, threading.Event]:
        """Events: it has begun, it may end."""
        begun, free = threading.Event(), threading.Event()

        async def wait() -> None:
            begun.set()
            while not free.is_set():
                await asyncio.sleep(0.001)

        self.wrong[what] = wait
        return begun, free

    def happened(self, what: str) -> int:
        return sum(sandbox.done.count(what) for sandbox in self.made)

    @property
    def used(self) -> list[Sandbox]:
        """Those that were started: a session looks at one to see what it can."""
        return [sandbox for sandbox in self.made if sandbox.done]

    @property
    def is_empty(self) -> bool:
        return all(sandbox.is_closed for sandbox in self.used)


class Model(BaseLM):
    """Replies with the cells it is given, and keeps what it was told first in each completion."""

    model_name = "model"

    def __init__(self, *cells: str | Exception) -> None:
        self._cells = list(cells)
        self.told: list[str] = []

    async def complete(self, request: Request) -> Reply:
        if request.messages[-1].role == "user" and len(request.messages) == 2:
            self.told.append(request.messages[1].content)
        step = self._cells.pop(0)
        if isinstance(step, Exception):
            raise step
        return Reply(f"```repl\n{step}\n```")


@pytest.fixture
def kind() -> Kind:
    return Kind()


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are the test's own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


def model_and_session(kind: Kind, *cells: str | Exception, **settings: Any) -> tuple[Model, Conversation]:
    model = Model(*cells)
    return model, RLM(backend=model, environment=kind, **settings).session()


@contextlib.contextmanager
def session(kind: Kind, *cells: str | Exception, **settings: Any) -> Iterator[Conversation]:
    with model_and_session(kind, *cells, **settings)[1] as conversation:
        yield conversation
    assert kind.is_empty


def settled(conversation: Conversation) -> None:
    """Wait for what is done in the background."""
    hostloop.run(conversation._saved_by_now())


# --- one completion after another --------------------------------------------------------------


def test_a_sandbox_serves_one_completion_after_another(kind: Kind) -> None:
    with session(kind, "x = 20; FINAL(1)", "FINAL(x + context_1)") as talk:
        assert talk.completion(1, "first").response == "1"
        settled(talk)
        [sandbox] = kind.used
        assert talk.completion(22, "second").response == "42"
        settled(talk)
    assert sandbox.done == [
        "start", "context", "cell", "history", "look", "snapshot",
        "handler", "answer", "context", "cell", "history", "look", "snapshot", "close",
    ]  # fmt: skip
    assert [sandbox.names[f"history_{n}"][-1]["role"] for n in range(2)] == ["assistant", "assistant"]


def test_a_completion_asks_something(kind: Kind) -> None:
    with session(kind) as talk, pytest.raises(ConfigError, match="nothing is asked"):
        talk.completion()
    assert kind.used == []


@pytest.mark.parametrize("count", [2, 6])
def test_completions_of_several_threads_come_one_after_another(kind: Kind, count: int) -> None:
    with session(kind, *["FINAL(1)"] * count) as talk, ThreadPoolExecutor(count) as pool:
        list(pool.map(lambda n: talk.completion(None, f"question {n}"), range(count)))
    [sandbox] = kind.used
    cells = [step for step in sandbox.done if step in ("cell", "history")]
    assert cells == ["cell", "history"] * count


async def test_a_completion_may_be_awaited_on_another_loop(kind: Kind) -> None:
    _, talk = model_and_session(kind, "FINAL(1)", "FINAL(2)")
    async with talk:
        first = asyncio.create_task(talk.acompletion("c", "first"))
        second = asyncio.create_task(talk.acompletion(None, "second"))
        assert [(await first).response, (await second).response] == ["1", "2"]
    assert kind.is_empty


@pytest.mark.parametrize(
    ("cells", "error"), [([ModelError("no model")], ModelError), (["x = 1"], MaxIterationsExceeded)]
)
def test_what_ends_a_completion_leaves_the_session(
    kind: Kind, cells: list[Any], error: type[Exception]
) -> None:
    script = [*cells, *[ModelError("nor now")] * (error is MaxIterationsExceeded)]
    model, talk = model_and_session(
        kind, *script, "FINAL(len(history_0) > 1)", max_iterations=1, max_retries=0
    )
    with talk:
        with pytest.raises((error, ModelError)):
            talk.completion("c", "first")
        assert talk.completion(None, "second").response == "True"
    assert "1. first -> (no answer)" in model.told[1]
    assert kind.happened("start") == 1


def test_a_completion_that_is_cancelled_leaves_the_session(kind: Kind) -> None:
    begun, _ = kind.waits("cell")
    with session(kind, "never", "FINAL(2)") as talk:

        async def cancel() -> None:
            task = asyncio.create_task(talk.acompletion("c", "first"))
            assert await asyncio.to_thread(begun.wait, PATIENCE)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(cancel())
        kind.wrong.clear()
        assert talk.completion(None, "second").response == "2"
    assert kind.happened("start") == 1


def test_ctrl_c_leaves_the_session(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, _ = kind.waits("cell")
    with session(kind, "never", "FINAL(2)") as talk:
        submit = hostloop._submit

        def interrupted(work: Any) -> Any:
            future, ended = submit(work)

            def result() -> Any:
                assert begun.wait(PATIENCE)
                raise KeyboardInterrupt

            monkeypatch.setattr(future, "result", result)
            return future, ended

        monkeypatch.setattr(hostloop, "_submit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            talk.completion("c", "first")
        monkeypatch.setattr(hostloop, "_submit", submit)
        kind.wrong.clear()
        assert talk.completion(None, "second").response == "2"
    assert kind.happened("start") == 1


def test_a_history_that_cannot_be_kept_costs_no_answer(kind: Kind) -> None:
    kind.fails("history", ConfigError("history_0 cannot be loaded in the sandbox: MemoryError"))
    with session(kind, "FINAL(1)") as talk:
        assert talk.completion("c", "q").response == "1"


# --- a sandbox that is lost --------------------------------------------------------------------


@pytest.mark.parametrize("how", ["handler", "error"])
def test_a_sandbox_of_no_use_is_replaced_and_has_what_was_saved(kind: Kind, how: str) -> None:
    model, talk = model_and_session(kind, "x = 20; FINAL(1)", "FINAL([x, context_0, len(history_0) > 1])")
    with talk:
        talk.completion(7, "first")
        settled(talk)
        if how == "error":
            kind.error = CellError("timeout", "CellTimeout", "too long")
        else:
            kind.fails("answer", SandboxLost("it is gone"))
        result = talk.completion(None, "second")
    assert result.response == "[20, 7, True]"
    assert [sandbox.is_closed for sandbox in kind.used] == [True, True]
    [restored] = [event for event in result.trace if isinstance(event, Restored)]
    assert restored.lost == []
    assert restored.reason in ("it is gone", "no cell runs in it any more: CellTimeout: too long")
    assert f"was lost ({restored.reason})" in model.told[1]
    assert "Nothing is missing." in model.told[1]
    assert "answer" not in kind.used[1].done  # a new one has a new answer


def test_the_model_is_told_what_could_not_be_saved(kind: Kind) -> None:
    kind.lost = ("lock (lock: cannot pickle)",)
    model, talk = model_and_session(kind, "FINAL(1)", "FINAL(2)")
    with talk:
        talk.completion("c", "first")
        settled(talk)
        kind.fails("answer", SandboxLost("gone"))
        talk.completion(None, "second")
    assert "Lost: lock (lock: cannot pickle)." in model.told[1]


@pytest.mark.parametrize("error", [SandboxError("too large"), RuntimeError("a bug of the environment's")])
def test_when_saving_fails_the_snapshot_before_it_stays_and_the_model_is_told(
    kind: Kind, error: Exception
) -> None:
    model, talk = model_and_session(kind, "x = 1; FINAL(1)", "x = 2; FINAL(2)", "FINAL(x)")
    with talk:
        talk.completion("c", "first")
        settled(talk)
        kind.fails("snapshot", error)
        talk.completion(None, "second")
        settled(talk)
        kind.fails("answer", SandboxLost("gone"))
        assert talk.completion(None, "third").response == "1"
    assert f"Lost: what came after question 1 ({error})." in model.told[2]


def test_variables_that_cannot_be_restored_are_told_of(kind: Kind) -> None:
    model, talk = model_and_session(kind, "FINAL(1)", "FINAL(context_0)")
    with talk:
        talk.completion("c", "first")
        settled(talk)
        kind.fails("answer", SandboxLost("gone"))
        kind.fails("restore", SandboxError("another Python"))
        assert talk.completion(None, "second").response == "c"
    assert "Lost: every variable but contexts and histories (another Python)." in model.told[1]


def test_without_snapshots_nothing_is_saved(kind: Kind) -> None:
    model, talk = model_and_session(kind, "FINAL(1)", "FINAL(2)", snapshots=False)
    with talk:
        talk.completion("c", "first")
        kind.fails("answer", SandboxLost("gone"))
        talk.completion(None, "second")
    assert kind.happened("snapshot") == 0
    assert "Lost: every variable but contexts and histories." in model.told[1]


def test_a_sandbox_that_cannot_be_had_leaves_nothing_and_the_next_completion_tries_again(kind: Kind) -> None:
    with session(kind, "FINAL(1)") as talk:
        for step in ("start", "context"):
            kind.wrong.clear()
            kind.fails(step, SandboxError("not now"))
            with pytest.raises(SandboxError, match="not now"):
                talk.completion("c", "q")
        kind.wrong.clear()
        assert talk.completion("c", "q").response == "1"
        assert sum(not sandbox.is_closed for sandbox in kind.used) == 1


# --- what the model is told --------------------------------------------------------------------


def test_the_model_is_told_of_contexts_and_of_what_was_before(kind: Kind) -> None:
    model, talk = model_and_session(kind, *["FINAL('the answer')"] * 4)
    with talk:
        talk.completion("abc", "first?")
        talk.completion(None, "second?")
        talk.completion("de", "x" * 400)
        talk.completion(None, "fourth?")
    first, second, third, fourth = model.told
    assert "`context` is a str of 3 characters" in first
    assert "question" not in first.replace("first?", "")
    assert "This is question 2 of one session" in second
    assert "No context came with it. The earlier ones are `context_0`." in second
    assert "1. first? -> the answer" in second
    assert "The messages of each are in `history_0`." in second
    assert "`context_1` is a str of 2 characters (1 lines). The earlier ones are `context_0`." in third
    assert "The earlier ones are `context_0` to `context_1`." in fourth
    assert f"3. {'x' * 300}... -> the answer" in fourth
    assert "in `history_0` to `history_2`" in fourth
    assert "lost" not in fourth.lower()


def test_of_a_long_session_the_last_questions_are_shown(kind: Kind) -> None:
    model, talk = model_and_session(kind, *["FINAL(1)"] * 13, snapshots=False)
    with talk:
        for number in range(1, 14):
            talk.completion(None, f"question number {number}")
    told = model.told[-1]
    assert "2. question number 2 ->" not in told
    assert [f"{n}. question number {n} -> 1" in told for n in range(3, 13)] == [True] * 10


# --- the end -----------------------------------------------------------------------------------


def test_the_end_may_come_twice_and_another_completion_begins_anew(kind: Kind) -> None:
    with session(kind, "x = 5; FINAL(1)", "FINAL(x)") as talk:
        talk.completion("c", "q")
        settled(talk)
        talk.close()
        talk.close()
        assert kind.is_empty
        assert talk.completion(None, "q").response == "5"


def test_the_end_does_not_wait_for_a_snapshot(kind: Kind) -> None:
    begun, _ = kind.waits("snapshot")
    with session(kind, "FINAL(1)") as talk:
        talk.completion("c", "q")
        assert begun.wait(PATIENCE)
    assert kind.is_empty


@pytest.mark.parametrize("step", ["start", "context"])
def test_a_session_that_is_closed_while_its_sandbox_comes_up_leaves_nothing(kind: Kind, step: str) -> None:
    begun, free = kind.waits(step)
    with ThreadPoolExecutor(1) as pool, session(kind, "FINAL(1)") as talk:
        running = pool.submit(talk.completion, "c", "q")
        assert begun.wait(PATIENCE)
        talk.close()
        free.set()
        if step == "start":
            with pytest.raises(SandboxLost, match="the session was closed"):
                running.result()
            assert kind.is_empty
        else:
            running.result()


def test_closing_an_rlm_leaves_the_sessions_that_it_has_opened(kind: Kind) -> None:
    model = Model("x = 1; FINAL(1)", "FINAL(x)")
    rlm = RLM(backend=model, environment=kind)
    with rlm.session() as talk:
        talk.completion("c", "q")
        rlm.close()
        assert talk.completion(None, "q").response == "1"
        rlm.close()
    assert kind.happened("start") == 1


def test_a_session_that_nobody_holds_leaves_no_sandbox(kind: Kind) -> None:
    _, talk = model_and_session(kind, "FINAL(1)", "FINAL(2)")
    talk.completion("c", "q")
    settled(talk)
    kind.fails("answer", SandboxLost("gone"))
    talk.completion(None, "q")
    settled(talk)
    first = weakref.ref(kind.made[1])
    assert kind.made[1].done.count("close") == 1
    kind.wrong.clear()  # an exception knows where it was raised
    del kind.made[1]
    gc.collect()
    assert first() is None, "one that was replaced is held on to"
    gone = weakref.ref(talk)
    del talk
    gc.collect()
    hostloop.run(asyncio.sleep(0))
    assert gone() is None
    assert kind.made[1].is_closed


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_has_a_sandbox_of_its_own_with_what_was_saved(kind: Kind) -> None:
    with session(kind, "x = 5; FINAL(1)", "FINAL(x)", "FINAL(x)") as talk:
        talk.completion("c", "q")
        settled(talk)
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                [theirs] = kind.used
                done = list(theirs.done)
                assert talk.completion(None, "q").response == "5"
                assert (theirs.done, len(kind.used)) == (done, 2)
                talk.close()
                assert theirs.done == done
                os._exit(0)
            os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0
        assert talk.completion(None, "q").response == "5"
    assert len(kind.used) == 1


# --- files -------------------------------------------------------------------------------------


def saved(kind: Kind, path: Path, *cells: str, **settings: Any) -> list[str]:
    """Save a session in which these cells have run, over contexts "c0", "c1" and so on."""
    with session(kind, *cells, **settings) as talk:
        for number in range(len(cells)):
            talk.completion(f"c{number}", f"question {number}")
        return talk.save(path)


def test_a_session_goes_on_from_its_file(kind: Kind, tmp_path: Path) -> None:
    path = tmp_path / "session"
    lost = saved(kind, path, "x = 20; FINAL(1)", "y = 2; FINAL(2)", max_iterations=7)
    assert lost == ["the setting backend", "the setting environment"]
    later, model = Kind(), Model("FINAL([x, y, context_1, history_0[-1]['role'], context_2])")
    with RLM.resume(path, backend=model, environment=later) as talk:
        assert talk._rlm.config.max_iterations == 7
        result = talk.completion("new", "third")
    assert result.response == "[20, 2, 'c1', 'assistant', 'new']"
    assert "2. question 1 -> 2" in model.told[0]
    assert "Nothing is missing." not in model.told[0]
    assert not any(isinstance(event, Restored) for event in result.trace)


@pytest.mark.parametrize("context", ["text\ud800", b"bytes\xff", {1: ("data",)}])
def test_a_context_is_what_it_was(kind: Kind, tmp_path: Path, context: Any) -> None:
    with session(kind, "FINAL(1)") as talk:
        talk.completion(context, "q")
        talk.save(tmp_path / "session")
    later = Kind()
    with RLM.resume(tmp_path / "session", backend=Model("FINAL(1)"), environment=later) as talk:
        talk.completion(None, "q")
    found = later.used[0].names["context_0"]
    assert (pickle.loads(found.data) if isinstance(found, Encoded) else found) == context


def test_what_could_not_be_saved_is_told_now_and_to_the_model_later(kind: Kind, tmp_path: Path) -> None:
    kind.lost = ("lock (lock: cannot pickle)",)
    lost = saved(kind, tmp_path / "session", "FINAL(1)")
    assert lost[0] == "lock (lock: cannot pickle)"
    model = Model("FINAL(1)")
    with RLM.resume(tmp_path / "session", backend=model, environment=Kind()) as talk:
        talk.completion(None, "second")
    assert "Lost: lock (lock: cannot pickle)." in model.told[0]


def test_a_session_may_be_saved_before_it_begins_and_after_it_ended(kind: Kind, tmp_path: Path) -> None:
    with session(kind, "x = 3; FINAL(1)") as talk:
        talk.save(tmp_path / "before")
        talk.completion("c", "q")
        settled(talk)
        talk.close()
        talk.save(tmp_path / "after")
    for name, answer in (("before", "False"), ("after", "True")):
        model = Model("FINAL('x' in globals())")
        with RLM.resume(tmp_path / name, backend=model, environment=Kind()) as talk:
            assert talk.completion("c", "q").response == answer


def test_what_the_last_completion_changed_and_nothing_saved_is_told(kind: Kind, tmp_path: Path) -> None:
    kind.fails("snapshot", SandboxError("too large"))
    with session(kind, "FINAL(1)") as talk:
        talk.completion("c", "q")
        settled(talk)
        with pytest.raises(SandboxError, match="too large"):
            talk.save(tmp_path / "session")
        talk.close()
        lost = talk.save(tmp_path / "session")
    assert lost[0] == "every variable"


def test_settings_that_no_file_holds_are_asked_for(kind: Kind, tmp_path: Path) -> None:
    saved(kind, tmp_path / "session", "FINAL(1)", custom_tools={"f": len})
    with pytest.raises(
        ConfigError, match=r"RLM\.resume\(\.\.\., backend=\.\.\., custom_tools=\.\.\., environment="
    ):
        RLM.resume(tmp_path / "session")
    given = {"backend": Model(), "environment": Kind(), "custom_tools": {}}
    RLM.resume(tmp_path / "session", **given).close()
    del given["environment"]
    with pytest.raises(ConfigError, match=r"RLM\.resume\(\.\.\., environment=\.\.\.\)$"):
        RLM.resume(tmp_path / "session", **given)


def test_settings_that_are_given_win_and_wrong_ones_are_refused(kind: Kind, tmp_path: Path) -> None:
    saved(kind, tmp_path / "session", "FINAL(1)", max_iterations=7, max_calls=9)
    given = {"backend": Model(), "environment": Kind()}
    talk = RLM.resume(tmp_path / "session", **given, max_iterations=3)
    assert (talk._rlm.config.max_iterations, talk._rlm.config.max_calls) == (3, 9)
    with pytest.raises(ConfigError, match="did you mean"):
        RLM.resume(tmp_path / "session", **given, max_iteration=3)


def test_no_key_is_in_the_file(tmp_path: Path) -> None:
    rlm = RLM(
        backend="openai", backend_kwargs={"api_key": KEY, "model": "m"},
        other_backends=["openai"], other_backend_kwargs=[{"api_key": KEY, "model": "n"}],
        sampling_args={"extra_headers": {"Authorization": f"Bearer {KEY}"}},
    )  # fmt: skip
    lost = rlm.session().save(tmp_path / "session")
    assert [text.rpartition(".")[2] for text in lost] == ["api_key", "api_key", "Authorization"]
    assert KEY.encode() not in (tmp_path / "session").read_bytes()
    config = RLM.resume(tmp_path / "session")._rlm.config  # the key may be in the environment by now
    assert (config.backend_kwargs, config.other_backend_kwargs) == ({"model": "m"}, [{"model": "n"}])


def test_the_file_is_this_users_and_replaced_as_a_whole(kind: Kind, tmp_path: Path) -> None:
    path = tmp_path / "session"
    path.write_bytes(b"something else")
    path.chmod(0o644)
    umask = os.umask(0)
    try:
        saved(kind, path, "FINAL(1)")
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["session", "state"]


def test_a_file_that_cannot_be_written_or_read_is_a_config_error(kind: Kind, tmp_path: Path) -> None:
    with session(kind) as talk:
        for path in (tmp_path / "none" / "session", tmp_path):
            with pytest.raises(ConfigError, match="cannot be saved"):
                talk.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            RLM.resume(path)


def test_of_another_kind_of_file_only_the_beginning_is_read() -> None:
    with pytest.raises(ConfigError, match="'/dev/zero' is no saved session"):
        RLM.resume("/dev/zero")


@pytest.mark.parametrize("place", [0, 20, 60, 200, -1])
def test_a_file_that_was_changed_is_refused(kind: Kind, tmp_path: Path, place: int) -> None:
    path = tmp_path / "session"
    saved(kind, path, "FINAL(1)")
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"is no saved session|another version|has been changed since"):
        RLM.resume(path, backend=Model(), environment=Kind())


def test_text_that_utf_8_has_no_form_for_can_be_saved(kind: Kind, tmp_path: Path) -> None:
    odd = "half a surrogate: \ud800"
    with session(kind, "FINAL(1)") as talk:
        talk.completion(odd, odd)
        talk.save(tmp_path / "session")
    model = Model("FINAL(1)")
    with RLM.resume(tmp_path / "session", backend=model, environment=Kind()) as talk:
        talk.completion(None, "second")
    assert "1. half a surrogate: ? -> 1" in model.told[0]


class Forgetful(BaseEnv):
    """An environment that keeps nothing."""

    async def start(self, host: Host) -> None: ...

    async def add_context(self, value: Any) -> int:
        return 0

    async def execute(self, code: str, *, timeout: float | None = None) -> REPLResult:
        return REPLResult()

    async def close(self) -> None: ...


def test_an_environment_that_keeps_nothing_has_no_sessions(kind: Kind, tmp_path: Path) -> None:
    saved(kind, tmp_path / "session", "FINAL(1)")
    with pytest.raises(ConfigError, match="keeps nothing from one completion to the next"):
        RLM(backend=Model(), environment=Forgetful).session()
    with pytest.raises(ConfigError, match="keeps nothing from one completion to the next"):
        RLM.resume(tmp_path / "session", backend=Model(), environment=Forgetful)

"""Facts about how containers of DockerREPL begin and end: none outlives its owner, none is another's."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from docker_support import all_gone, client, containers, need_engine, second_engine, since, within

from rlm import RLM, hostloop, open_repl
from rlm.environment import BaseEnv
from rlm.errors import SandboxError, SandboxLost
from rlm.repl import REPL
from rlm.testing.sessions import eventually
from rlm_docker import DockerREPL, ownership
from rlm_docker.engine import BUILT_IMAGE
from rlm_docker.errors import (
    ContainerExpired,
    ContainerKilled,
    ContainerOutOfMemory,
    ContainerRemoved,
    EngineLost,
)

LOOP = "while True: pass"


@pytest.fixture(autouse=True)
def engine() -> None:
    """Every test here needs one."""
    need_engine()


def container(session: REPL | BaseEnv) -> Any:
    """The engine's view of a session's container."""
    env = session._env if isinstance(session, REPL) else session
    assert isinstance(env, DockerREPL)
    assert env._container is not None
    return client().containers.get(env._container.id)


# --- death from outside -----------------------------------------------------------------

DEATHS: dict[str, tuple[Callable[[Any], object], type[SandboxLost]]] = {
    "docker kill": (lambda box: box.kill(), ContainerKilled),
    "docker stop": (lambda box: box.stop(), ContainerKilled),
    "docker rm --force": (lambda box: box.remove(force=True), ContainerRemoved),
}


@pytest.mark.parametrize("how", DEATHS)
@pytest.mark.parametrize("when", ["in a cell", "between cells"])
def test_a_container_that_dies_is_the_right_error(how: str, when: str) -> None:
    kill, error = DEATHS[how]
    with open_repl("docker") as session:
        session.execute("x = 1")
        box = container(session)
        if when == "in a cell":
            within(0.3, lambda: kill(box))
        else:
            kill(box)
        with pytest.raises(error):
            session.execute(LOOP, timeout=60)
        with pytest.raises(SandboxLost):  # and stays so
            session.execute("1")
    assert all_gone()


def test_a_container_that_lived_for_its_time_is_over() -> None:
    with open_repl("docker", time_to_live=2) as session:
        start = time.monotonic()
        with pytest.raises(ContainerExpired, match="time_to_live"):
            session.execute(LOOP, timeout=60)
        assert since(start) < 30
    assert all_gone()


def test_a_container_out_of_memory_is_told_from_one_that_was_killed() -> None:
    # cells die first; what the supervisor keeps of their output is its own
    with open_repl("docker", memory=100, output=400) as session, pytest.raises(ContainerOutOfMemory):
        session.execute("for _ in range(300): print('x' * (1 << 20))", timeout=60)
    assert all_gone()


def test_a_run_whose_container_is_killed_keeps_its_trace() -> None:
    script = ["```repl\nprint('one')\n```", f"```repl\n{LOOP}\n```"]
    rlm = RLM(backend="scripted", backend_kwargs={"script": script}, environment="docker")

    def kill_the_second_cell(event: Any) -> None:
        if type(event).__name__ == "CellStarted" and event.cell == 2:
            within(0.3, lambda: containers()[0].kill())

    rlm._on_event = kill_the_second_cell
    with pytest.raises(ContainerKilled) as caught:
        rlm.completion("context", "question")
    assert caught.value.trace is not None
    kinds = [type(event).__name__ for event in caught.value.trace]
    assert kinds.count("CellFinished") == 1
    assert kinds.count("CellStarted") == 2
    assert kinds[-1] == "RunFinished"
    assert caught.value.usage is not None
    assert caught.value.usage.total_calls == 2


def test_an_engine_that_stops_in_a_cell_is_the_right_error_and_the_next_run_works() -> None:
    with second_engine() as other:
        other.load(BUILT_IMAGE)
        with open_repl("docker", docker_host=other.host) as session:
            session.execute("x = 1")
            within(0.3, other.stop)
            with pytest.raises(EngineLost, match="stopped"):
                session.execute(LOOP, timeout=60)
        assert eventually(lambda: other._process is None, 60)
        other.start()
        with open_repl("docker", docker_host=other.host) as session:
            assert session.execute("1 + 1").value == 2
        assert eventually(lambda: b"rlm-" not in other.docker("ps", "--all").stdout, 30)


def test_a_sandbox_that_takes_no_context_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlm.environment.LOAD_TIMEOUT", 1.0)
    with open_repl("docker") as session:
        freeze = "import os, signal, time\nparent = os.getpid()\nif os.fork() == 0:\n"
        session.execute(freeze + "    time.sleep(0.3); os.kill(parent, signal.SIGSTOP); time.sleep(60)")
        time.sleep(1)
        with pytest.raises(SandboxLost, match="did not take context_0"):
            session.add_context("x" * 3_000_000)
    assert all_gone()


def test_a_process_forked_from_the_owner_keeps_no_container_alive() -> None:
    session = open_repl("docker").__enter__()
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    try:
        session.close()
        assert all_gone(seconds=10)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# --- the end of a session -----------------------------------------------------------------


def test_closing_returns_at_once_and_the_container_goes() -> None:
    session = open_repl("docker").__enter__()
    session.execute("import threading; threading.Thread(target=lambda: [1 for _ in iter(int, 1)]).start()")
    assert len(containers()) == 1
    session.close()
    assert all_gone()


def test_closing_during_a_cell_ends_it_and_the_container_goes() -> None:
    session = open_repl("docker").__enter__()
    within(0.5, session.close)
    with pytest.raises(SandboxError):
        session.execute(LOOP, timeout=60)
    assert all_gone()


def test_a_paused_container_goes_too() -> None:
    session = open_repl("docker").__enter__()
    container(session).pause()
    session.close()
    assert all_gone(seconds=40)


@pytest.mark.parametrize("after", [0.0, 0.02, 0.1, 0.2, 0.3])
def test_a_start_that_is_cancelled_leaves_nothing(after: float) -> None:
    async def start() -> None:
        rlm = RLM(backend="scripted", backend_kwargs={"script": ["FINAL(1)"]}, environment="docker")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(after):
                await rlm.acompletion("context", "question")

    hostloop.run(start())
    assert all_gone()


# --- the end of the owner -----------------------------------------------------------------

HOST = """
import sys, threading, time
from rlm import open_repl
sessions = [open_repl("docker", prewarm=1).__enter__() for _ in range({count})]
for session in sessions[:2]:
    threading.Thread(target=session.execute, args=["while True: pass"], daemon=True).start()
time.sleep(0.5)
print("up", flush=True)
{then}
"""


@contextlib.contextmanager
def host(count: int, then: str = "time.sleep(300)") -> Iterator[subprocess.Popen[str]]:
    """A process with sandboxes, two of them in a busy loop, and one warm."""
    command = [sys.executable, "-c", HOST.format(count=count, then=then)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n", process.stderr and process.stderr.read()
            yield process
        finally:
            process.kill()


def test_a_host_that_is_killed_leaves_no_container_five_seconds_later() -> None:
    with host(5) as process:
        assert eventually(lambda: len(containers(process.pid)) == 6)
        process.kill()
        process.wait()
        assert all_gone(process.pid, 5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_host_that_is_asked_to_end_leaves_no_container(number: int) -> None:
    with host(2) as process:
        process.send_signal(number)
        time.sleep(0.2)
        process.send_signal(number)  # somebody impatient
        process.wait(30)
        assert all_gone(process.pid, 10)


@pytest.mark.parametrize("then", ["sys.exit()", "raise ValueError", "sessions[0].close()"])
def test_a_host_that_ends_has_no_container_when_it_has_ended(then: str) -> None:
    with host(2, then) as process:
        process.wait(30)
        assert containers(process.pid) == []


# --- warm containers -----------------------------------------------------------------------

Open = Callable[..., REPL]


@pytest.fixture
def open_session() -> Iterator[Open]:
    """Opens sessions, and closes them."""
    with contextlib.ExitStack() as stack:
        yield lambda **settings: stack.enter_context(open_repl("docker", **settings))


@pytest.fixture
def own_kind() -> dict[str, Any]:
    """Settings that make a pool of this test's own."""
    return {"prewarm": 2, "env": {"TEST": os.urandom(4).hex()}}


def warm(settings: dict[str, Any]) -> None:
    """Fill the pool of these settings."""
    hostloop.run(DockerREPL(**settings).warm())


def drain(settings: dict[str, Any]) -> None:
    """Empty it again."""

    async def expire() -> None:
        pool = DockerREPL(**settings)._pool()
        pool.size = 0
        await asyncio.gather(*pool._filling)
        for box in list(pool._warm):
            pool._expire(box)

    hostloop.run(expire())


def test_a_warm_container_serves_one_session_and_is_replaced(
    own_kind: dict[str, Any], open_session: Open
) -> None:
    try:
        warm(own_kind)
        before = {box.id for box in containers()}
        assert len(before) == 2
        first, second = open_session(**own_kind), open_session(**own_kind)
        first.execute("mine = 1; open('/tmp/mine', 'w').close()")
        taken = {container(first).id, container(second).id}
        assert taken == before
        first.close()
        assert eventually(lambda: len({box.id for box in containers()} - taken) == 2)
        third = open_session(**own_kind)
        assert container(third).id not in taken
        assert (
            third.execute("import os; [n for n in ('mine',) if n in globals()] + os.listdir('/tmp')").value
            == []
        )
    finally:
        drain(own_kind)


def test_a_warm_container_that_died_is_not_handed_out(own_kind: dict[str, Any], open_session: Open) -> None:
    try:
        warm(own_kind)
        for box in containers():
            box.kill()
        time.sleep(0.5)
        assert open_session(**own_kind).execute("1 + 1").value == 2
    finally:
        drain(own_kind)


def test_a_warm_container_does_not_wait_for_ever(own_kind: dict[str, Any]) -> None:
    warm({**own_kind, "idle": 0.5})
    assert all_gone()


def test_sessions_with_other_settings_get_no_container_of_this_kind(
    own_kind: dict[str, Any], open_session: Open
) -> None:
    try:
        warm(own_kind)
        kinds = {box.id for box in containers()}
        assert container(open_session(memory=300)).id not in kinds
    finally:
        drain(own_kind)


# --- whose it is ------------------------------------------------------------------------------


@pytest.fixture
def make() -> Iterator[Callable[..., Any]]:
    """Creates containers with labels as other processes might have left them; removes them."""
    made = []

    def new(running: bool = False, **labels: str) -> Any:
        own = ownership.labels("", "", 3600)
        box = client().containers.create(
            BUILT_IMAGE, ["python3", "-c", "import time; time.sleep(300)"], network_mode="none",
            labels={**own, **{name.replace("_", "."): value for name, value in labels.items()}},
        )  # fmt: skip
        made.append(box)
        if running:
            box.start()
        return box

    yield new
    for box in made:
        with contextlib.suppress(Exception):
            box.remove(force=True)


def exists(box: Any) -> bool:
    """Whether the engine still knows it."""
    return bool(client().containers.list(all=True, filters={"id": box.id}, ignore_removed=True))


def test_a_sweep_takes_what_dead_processes_left_and_nothing_else(make: Callable[..., Any]) -> None:
    dead = {"rlm_pid": "999999999", "rlm_pid.started": "1"}
    recycled = {"rlm_pid": "1", "rlm_pid.started": "never"}
    elsewhere = {**dead, "rlm_host": "another"}
    expired = {**elsewhere, "rlm_created": "1000"}
    kept = [make(), make(running=True), make(**elsewhere), make(running=True, **elsewhere),
            make(running=True, **expired)]  # fmt: skip
    assert not ownership._is_owner(999999999, "1")
    assert ownership._is_owner(os.getpid(), ownership.started(os.getpid()))
    taken = [make(**dead), make(running=True, **dead), make(**recycled), make(**expired)]
    removed = hostloop.run(DockerREPL.sweep())
    assert {box.name for box in taken} <= {found.id for found in removed}
    assert [exists(box) for box in taken] == [False] * 4
    assert [exists(box) for box in kept] == [True] * 5


def test_the_command_lists_sandboxes_and_prunes_the_abandoned(make: Callable[..., Any]) -> None:
    box = make(**{"rlm_pid": "999999999", "rlm_pid.started": "1"})
    environment = {**os.environ, "COLUMNS": "200"}

    def rlm(*arguments: str) -> str:
        command = [sys.executable, "-m", "rlm.cli", "sandboxes", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

    listed = rlm("list")  # which sweeps in the background, as every first use of an engine does
    assert box.name not in listed or "dead" in listed
    rlm("prune")
    assert not exists(box)


def test_anothers_container_without_our_label_is_never_listed() -> None:
    box = client().containers.create(BUILT_IMAGE, ["true"])
    try:
        assert box.name not in [found.id for found in hostloop.run(DockerREPL.sandboxes())]
    finally:
        box.remove()


def test_a_container_that_dies_as_it_is_handed_over_fails_at_once(own_kind: dict[str, Any]) -> None:
    warm(own_kind)
    try:
        boxes = containers()
        for box in boxes:  # as good as dead, and not known to be
            box.pause()
        within(1.0, lambda: [box.kill() for box in boxes])
        start = time.monotonic()
        with pytest.raises(SandboxError), open_repl("docker", **own_kind):
            pass
        assert since(start) < 30
    finally:
        drain(own_kind)

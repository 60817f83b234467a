"""What every level of an environment's suite stands on: what it declares, and the fixtures."""

from __future__ import annotations

import base64
import contextlib
import os
import pickle
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest

from .. import hostloop
from ..client import BaseLM
from ..environment import BaseEnv, Host, Isolation
from ..events import EventBus
from ..handler import LMHandler
from ..ledger import Ledger
from ..limits import Limits
from ..repl import open_repl
from ..rlm import RLM
from ..tools import NO_TOOLS, Tools
from .base import PluginSuite
from .sessions import (
    Cells,
    OpenCells,
    OpenRLM,
    OpenSandbox,
    Sandbox,
    Serve,
    descendants,
    echo,
    eventually,
    identity,
    is_alive,
    unavailable,
)

CONTRACT_VERSION = "2.0"
"""Of what the suite asks. The first number changes when an environment that passed may fail."""

CAPABILITIES: Mapping[str, str] = {
    "cpython": "cells run in a CPython with its whole standard library, ctypes and signals included",
    "threads": "cells start threads, which go on after their cell and call models like anyone",
    "processes": "cells fork and start programs",
    "files": "cells work in a directory that is theirs to write in, and that nobody else sees",
    "streaming": "the host is told what a cell prints while the cell runs",
    "interrupt": "a cell out of time that heeds an interrupt keeps what it had assigned so far",
    "rollback": "a cell that dies, or has to be killed, costs nothing that was there before it; "
    "without, it may cost the variables, but neither session nor contexts",
    "isolation": "files, processes and kernel interfaces of the host, and other sessions, are out of reach",
    "network-none": "a cell reaches nothing over a network: no host outside, no service of this machine",
    "persistence": "a session goes on from one completion to the next (`SupportsPersistence`)",
    "snapshots": "variables can be saved, and put back into another sandbox (`SupportsSnapshot`)",
    "reset": "a sandbox begins anew for another run, which finds nothing of the one before (`SupportsReset`)",
}
"""What an environment may or may not offer. All else the suite asks of everyone."""

HOST = """
import base64, json, os, pickle, sys, textwrap, threading, time, warnings
warnings.simplefilter("ignore")
from rlm import open_repl
environment = {recipe}
{body}
"""
"""Another process that uses an environment, told how it makes one and what it does with it."""

Test = TypeVar("Test", bound=Callable[..., Any])


def requires(*capabilities: str) -> Callable[[Test], Test]:
    """A test that asks for these; it is skipped, with the reason, where one is not claimed."""

    def mark(test: Test) -> Test:
        test.requires = frozenset(capabilities)  # type: ignore[attr-defined]
        return test

    return mark


def one_session(test: Test) -> Test:
    """A test whose cases leave nothing that another of them minds: `repl` is the same for all of them.

    For tables of small cells, each of which takes less time than to start a session.
    """
    test.one_session = True  # type: ignore[attr-defined]
    return test


class _Kept:
    """A session for one case after the other of a test, until one fails or it is another test's turn."""

    def __init__(self) -> None:
        self.test = ""
        self._of: object = None
        self._cells: Cells | None = None
        self._open = contextlib.ExitStack()

    def session(self, request: pytest.FixtureRequest, environment: BaseEnv) -> Cells:
        """The one that is there, or a new one."""
        pattern = type(environment), repr(environment._arguments)
        of = request.node.originalname, pattern, request.session.testsfailed
        if self._cells is None or of != self._of:
            self.close()
            request.node.getparent(pytest.Class).addfinalizer(self.close)
            self._cells = Cells(self._open.enter_context(open_repl(environment)))
            self.test, self._of = request.node.originalname, of
        return self._cells

    def close(self) -> None:
        """End it, if there is one."""
        self.test, self._cells = "", None
        self._open.close()


async def _awaited(open_sandbox: OpenSandbox) -> Sandbox:
    return await open_sandbox()


class Suite(PluginSuite):
    """One environment's declarations, and an open session for every test that wants one."""

    subject = "environment"

    # -- what an environment says about itself

    capabilities: ClassVar[Set[str]] = frozenset(CAPABILITIES)
    """What it offers of `CAPABILITIES`."""

    limits: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Settings that impose a limit: ``"memory"`` of 256 MiB, ``"file size"`` of 1 MiB, ``"open files"`` of
    64, ``"output"`` of 2 MiB a stream. Tests of a limit that is not here are skipped."""

    output_limit: ClassVar[int] = 1 << 20
    """Bytes that are kept of each of a cell's two streams, unless a setting says otherwise."""

    where: ClassVar[str] = ""
    between: ClassVar[str] = ""
    first_cell: ClassVar[str] = ""
    """For the table of environments: where cells run, what stands between one and the host, how soon."""

    @pytest.fixture
    def environment(self) -> BaseEnv:
        """The environment under test: a pattern, not started. The one fixture to define."""
        raise NotImplementedError("define a fixture `environment` that returns an environment, not started")

    def leftovers(self, host: int) -> set[str]:
        """Names of whatever the process ``host`` has made of this environment and that still exists.

        Called while that process lives, and again after its end. As it stands: the processes
        that have been seen below it.
        """
        below = descendants(host)
        self._seen = self._seen | {name for pid in below if (name := identity(pid))}
        kept = {pid for pid in below if not self.is_leftover(pid)}
        return {name for name in self._seen if is_alive(name) and int(name.split()[1]) not in kept}

    def is_leftover(self, pid: int) -> bool:
        """Whether a process below a living host belongs to a session, and is not kept for the next one."""
        return True

    def kill(self, env: BaseEnv) -> None:
        """End the sandbox of ``env``, the only one that this process has, as an accident would.

        What a session loses by that is not tested where this is not defined.
        """
        raise NotImplementedError

    def on_host(self, path: str) -> Path | None:
        """Where the host sees a path of a cell's; None where it does not."""
        return None

    def kept_capabilities(self, isolation: Isolation) -> int:
        """Linux capabilities that cells keep and that the environment answers for, as a bit mask."""
        return 0

    _seen: Set[str] = frozenset()
    _kept: ClassVar[_Kept]

    # -- what tests use

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._kept = _Kept()
        unknown = set(cls.capabilities) - set(CAPABILITIES)
        if unknown:
            raise TypeError(f"{cls.__name__}: no capability is called {', '.join(sorted(unknown))}")

    @pytest.fixture(autouse=True)
    def _required(self, request: pytest.FixtureRequest) -> None:
        self.require(*getattr(request.function, "requires", ()))

    def require(self, *capabilities: str) -> None:
        """Go on only if the environment claims these."""
        missing = sorted(set(capabilities) - set(self.capabilities))
        if missing:
            pytest.skip(f"not claimed: {', '.join(missing)}")

    def need(self, session: Cells | Sandbox, *rights: str) -> None:
        """Go on unless the environment itself says that this machine keeps it from enforcing these."""
        absent = sorted(set(rights) - set(session.isolation.enforced))
        if absent and session.isolation.missing:
            unavailable(f"not enforced on this machine: {', '.join(absent)} ({session.isolation.missing})")

    def need_kill(self) -> None:
        """Go on only if the suite knows how to `kill` a sandbox."""
        if type(self).kill is Suite.kill:
            pytest.skip("the suite does not say how to `kill` a sandbox")

    def limited(self, environment: BaseEnv, limit: str) -> BaseEnv:
        """The environment with one of its `limits`."""
        if limit not in self.limits:
            pytest.skip(f"`limits` does not say how to set: {limit}")
        return environment.fresh(**self.limits[limit])

    def recipe(self, environment: BaseEnv) -> str:
        """An expression that makes the environment again in another process."""
        args, kwargs = environment._arguments
        try:
            data = base64.b64encode(pickle.dumps((type(environment), args, kwargs))).decode()
        except Exception as error:  # whatever somebody's class does when it is pickled
            pytest.fail(f"the environment cannot be made again in another process: {error}")
        return f"(lambda made: made[0](*made[1], **made[2]))(pickle.loads(base64.b64decode({data!r})))"

    @pytest.fixture
    def open_cells(self, environment: BaseEnv) -> Iterator[OpenCells]:
        """Opens sessions, perhaps with a limit, a listener and tools, and closes them."""
        with contextlib.ExitStack() as stack:

            def new(
                limit: str | None = None,
                on_output: Callable[[str, str], None] = lambda stream, text: None,
                tools: Mapping[str, Any] | None = None,
            ) -> Cells:
                pattern = self.limited(environment, limit) if limit else environment
                repl = open_repl(pattern, on_output=on_output, custom_tools=dict(tools or {}))
                return Cells(stack.enter_context(repl))

            yield new

    @pytest.fixture(autouse=True)
    def _one_at_a_time(self, request: pytest.FixtureRequest) -> None:
        if self._kept.test != request.node.originalname:
            self._kept.close()

    @pytest.fixture
    def repl(self, request: pytest.FixtureRequest, environment: BaseEnv, open_cells: OpenCells) -> Cells:
        """One open session, kept for the next case where the test says so and none is known to fail."""
        if hasattr(request.function, "one_session") and not request.node.get_closest_marker("xfail"):
            return self._kept.session(request, environment)
        return open_cells()

    @pytest.fixture
    def open_sandbox(self, environment: BaseEnv) -> Iterator[OpenSandbox]:
        """Opens environments whose calls are served by a function of the test's, and closes them.

        Only for tests that are coroutines.
        """
        stack = contextlib.AsyncExitStack()
        handler = LMHandler(None, Ledger(Limits()), EventBus())
        hostloop.run(stack.enter_async_context(handler))

        async def new(
            serve: Serve = echo,
            on_output: Callable[[str, str], None] = lambda stream, text: None,
            tools: Tools = NO_TOOLS,
        ) -> Sandbox:
            env = environment.fresh()
            stack.push_async_callback(env.close)
            host = Host(handler, serve, on_output, tools=tools)
            await env.start(host)
            return Sandbox(env, host)

        try:
            yield new
        finally:
            hostloop.run(stack.aclose())

    @pytest.fixture
    def sandbox(self, open_sandbox: OpenSandbox) -> Sandbox:
        """One open sandbox that echoes prompts."""
        return hostloop.run(_awaited(open_sandbox))

    @pytest.fixture
    def open_rlm(self, environment: BaseEnv) -> Iterator[OpenRLM]:
        """Makes RLMs over the environment, of a model and settings, and closes them."""
        with contextlib.ExitStack() as stack:

            def new(backend: BaseLM, **settings: Any) -> RLM:
                return stack.enter_context(RLM(backend=backend, environment=environment, **settings))

            yield new

    @pytest.fixture
    def at_rest(self, environment: BaseEnv) -> set[str]:
        """What exists of the environment while no session is open."""
        with open_repl(environment):
            pass
        return self.settled()

    def settled(self) -> set[str]:
        """What exists now, once two looks in a row see the same."""
        seen: list[set[str]] = [self.leftovers(os.getpid())]

        def twice() -> bool:
            threading.Event().wait(0.05)
            seen.append(self.leftovers(os.getpid()))
            return seen[-1] == seen[-2]

        assert eventually(twice)
        return seen[-1]

    def is_clean(self, at_rest: set[str]) -> bool:
        """Whether, within a generous bound, nothing exists but what was there at rest."""
        return eventually(lambda: self.leftovers(os.getpid()) <= at_rest)

    @pytest.fixture
    def host_folder(self) -> Iterator[Path]:
        """A directory of the host's whose name anybody may know, empty, and gone after the test."""
        with tempfile.TemporaryDirectory(prefix="rlm-suite-", ignore_cleanup_errors=True) as folder:
            os.chmod(folder, 0o711)
            yield Path(folder)

    # -- another host

    @contextlib.contextmanager
    def host(
        self, environment: BaseEnv, folder: Path, body: str, *arguments: str
    ) -> Iterator[subprocess.Popen[str]]:
        """Another host process with this environment, whose temporary files go to ``folder``; it is ready."""
        script = HOST.format(recipe=self.recipe(environment), body=textwrap.dedent(body))
        variables = {
            **os.environ,
            "TMPDIR": str(folder),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        process = subprocess.Popen(
            [sys.executable, "-c", script, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env=variables,
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        with process:
            if process.stdout.readline() != "ready\n":
                process.kill()
                pytest.fail(f"the host did not get ready: {process.stderr.read()}")
            try:
                yield process
            finally:
                process.kill()

    def run_host(self, environment: BaseEnv, folder: Path, body: str) -> str:
        """What another host process prints, until it ends."""
        with self.host(environment, folder, f"print('ready', flush=True)\n{textwrap.dedent(body)}") as host:
            output, errors = host.communicate(timeout=100)
            assert host.returncode == 0, errors
            return str(output)

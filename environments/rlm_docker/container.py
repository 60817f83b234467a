"""One container: started, spoken to over one stream, seen dead, and gone.

The stream is the ``docker`` command's, which gets a socket for its standard input and
output: what passes between a worker and the core never passes through Python on the way.
The command runs under a shell that removes the container once it has ended *and* the
other end of a pipe, the leash, has closed. This process holds that end, so that a
container whose owner was killed goes the same way as any other.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import socket
import subprocess
import tempfile
import threading
import time
from typing import IO, Any

from rlm import streams, wire
from rlm.errors import SandboxError, SandboxUnavailable

from . import engine as engines
from .engine import Engine, Pull
from .errors import (
    ContainerExpired,
    ContainerKilled,
    ContainerOutOfMemory,
    ContainerRefused,
    ContainerRemoved,
    EngineLost,
)

READY_TIMEOUT = 60.0
"""Seconds a container gets to bring its worker up."""

EXIT_TIMEOUT = 15.0
"""Seconds that the end of the process waits for the last containers to be removed."""

FORCE_TIMEOUT = 5.0
"""Seconds that a forced removal gets, after that."""

SECOND_LOOK = 1.0
"""Seconds after which an engine that is shutting down has stopped to answer."""

_KEEPER = """
docker=$1; container=$2
remove() { "$docker" rm --force --volumes "$container" 2>&1; }
exec 3<&0
"$docker" start --attach --interactive "$container" <&1 3<&- &
start=$!
exec >/dev/null </dev/null      # the stream is the command's alone: it is over when that ends
{ read -r _ <&3; for _ in 1 2 3 4 5 6 7 8 9 10; do sleep 0.5; done; remove; } 2>/dev/null &
watch=$!                        # removes what does not end by itself once the leash is let go
wait "$start"
read -r _ <&3
kill "$watch" 2>/dev/null
for _ in 1 2 3 4 5; do
    case $(remove) in
        *"annot connect"* | *"error during connect"*) sleep 1 ;;    # the engine restarts, perhaps
        *) break ;;
    esac
done
"""


class Container:
    """A container with a worker in it that waits for its session, and then is in it."""

    def __init__(
        self, engine: Engine, created: Any, stream: socket.socket, leash: int,
        keeper: subprocess.Popen[bytes], errors: IO[bytes], time_to_live: float,
    ) -> None:  # fmt: skip
        self.id: str = created.id
        self.attributes: dict[str, Any] = created.attrs
        """What the engine says the container is: the result of `docker inspect`."""
        self.stream: socket.socket | None = stream
        self._handed_over: socket.socket | None = None
        self._engine = engine
        self._leash = leash
        self._keeper = keeper
        self._errors = errors
        self._expires = time.monotonic() + time_to_live
        _living.add(self)

    @classmethod
    async def start(
        cls, engine: Engine, image: str | None, pull: Pull, settings: dict[str, Any],
        options: dict[str, Any],
    ) -> Container:  # fmt: skip
        """Create and start one, and return when its worker is ready. Raises SandboxUnavailable.

        ``settings`` are those of the SDK's ``containers.create``, ``options`` the worker's.
        """
        command = engine.command
        async with engine.starts:
            created = await engine.create(image, pull, settings)
            try:
                self = cls._keep(engine, created, command, float(options["time_to_live"]))
            except OSError as error:
                engine.discard(created)
                raise SandboxUnavailable(f"the docker command cannot be started: {error}") from error
            try:
                await self._bring_up(options)
            except BaseException:
                self.release()
                raise
        return self

    @classmethod
    def _keep(cls, engine: Engine, created: Any, command: str, time_to_live: float) -> Container:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        leash_end, leash = os.pipe()
        errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the container
        try:
            keeper = subprocess.Popen(
                ["/bin/sh", "-c", _KEEPER, "rlm-container", command, created.id],
                stdin=leash_end, stdout=theirs.fileno(), stderr=errors, env=engine.environ, cwd="/",
                start_new_session=True,
            )  # fmt: skip
        except BaseException:
            ours.close()
            os.close(leash)
            raise
        finally:
            theirs.close()
            os.close(leash_end)
        return cls(engine, created, ours, leash, keeper, errors, time_to_live)

    async def _bring_up(self, options: dict[str, Any]) -> None:
        assert self.stream is not None
        try:
            async with asyncio.timeout(READY_TIMEOUT):
                await streams.bring_up(self.stream, options)
        except TimeoutError:
            raise ContainerRefused(f"the worker in the container was not up in {READY_TIMEOUT:g} s") from None
        except (EOFError, ConnectionError, wire.FrameError):
            raise await self._why_not_up() from None
        except SandboxUnavailable as error:
            raise ContainerRefused(f"the worker cannot run in this container: {error}") from None

    async def _why_not_up(self) -> SandboxUnavailable:
        state = await self._state()
        self._errors.seek(0)
        said = self._errors.read(1 << 16).decode("utf-8", "replace").strip()
        if state is not None and state.get("OOMKilled"):
            return ContainerRefused("the container's memory limit is too small for a worker to start")
        return engines.from_text(
            said or f"it ended without a word ({state})", "start the container", self._engine.host
        )

    # -- life

    @property
    def is_warm(self) -> bool:
        """Whether the worker still waits for a session."""
        if self.stream is None or time.monotonic() > self._expires:
            return False
        try:
            self.stream.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False  # what waits for its session says nothing: this is its end

    def hand_over(self, token: str) -> socket.socket:
        """Tell the worker whose session this is. Returns the stream, which is the caller's from now on."""
        assert self.stream is not None, "a container serves one session"
        self._handed_over, self.stream = self.stream, None
        streams.name_session(self._handed_over, token)
        return self._handed_over

    def release(self) -> None:
        """Let go: the worker ends with its stream, the container is removed. Does not wait. Safe twice."""
        if self._let_go():
            threading.Thread(target=self._see_it_gone, name="rlm-docker-rm", daemon=True).start()

    def _let_go(self) -> bool:
        if self.stream is not None:
            with contextlib.suppress(OSError):
                self.stream.shutdown(socket.SHUT_RDWR)  # whoever was forked from here may hold it too
            self.stream.close()
            self.stream = None
        if self._handed_over is not None:
            with contextlib.suppress(OSError):  # closed already, as it should be
                self._handed_over.shutdown(socket.SHUT_RDWR)
        leash, self._leash = self._leash, -1
        if leash >= 0:
            with contextlib.suppress(BrokenPipeError):
                os.write(leash, b"\n")  # as good as its end, whoever else may hold it
            os.close(leash)
            self._errors.close()
        return leash >= 0

    def disown(self) -> None:
        """In a process forked from the owner: let nothing here keep the container alive."""
        if self._leash >= 0:
            os.close(self._leash)
            self._leash = -1
        for stream in (self.stream, self._handed_over):
            if stream is not None and stream.fileno() >= 0:
                os.close(stream.detach())

    def _see_it_gone(self, timeout: float = EXIT_TIMEOUT) -> None:
        try:
            self._keeper.wait(timeout)
        except subprocess.TimeoutExpired:  # it does not end by itself: somebody has paused it, say
            command = [self._engine.command, "rm", "--force", "--volumes", self.id]
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(
                    command, env=self._engine.environ, capture_output=True, check=False, timeout=FORCE_TIMEOUT
                )
                self._keeper.wait(FORCE_TIMEOUT)
        _living.discard(self)

    # -- death

    async def explain_loss(self, reason: str) -> SandboxError:
        """Why the stream ended: what the engine knows of the container."""
        try:
            state = await self._state()
            if state is not None and state["ExitCode"] == 137 and not state["OOMKilled"]:
                await asyncio.sleep(SECOND_LOOK)  # engines that stop kill their containers first
                state = await self._state()
        except SandboxUnavailable as error:
            return EngineLost(f"the Docker engine stopped, and with it the sandbox. Now {error}")
        return self._verdict(state, reason)

    def _verdict(self, state: dict[str, Any] | None, reason: str) -> SandboxError:
        if state is None:
            return ContainerRemoved("somebody removed the sandbox's container while it ran (docker rm)")
        if time.monotonic() > self._expires:
            return ContainerExpired("the sandbox's time to live is over (time_to_live=, in seconds)")
        if state["OOMKilled"] and state["ExitCode"] == 137:  # engines remember what cells were killed for
            return ContainerOutOfMemory(
                "the sandbox's container was killed, and its memory had been used up: give it more with "
                "environment_kwargs={'memory': MiB}, or have the cells hold less"
            )
        if state["Running"]:
            return EngineLost(
                f"the stream to the sandbox's container broke: {reason}. Was the engine restarted?"
            )
        code = state["ExitCode"]
        if code > 128:
            return ContainerKilled(
                f"somebody killed the sandbox's container (exit code {code}): docker kill or stop, or the "
                "engine as it was restarted"
            )
        return ContainerKilled(f"the sandbox's container ended with exit code {code}: {reason}")

    async def _state(self) -> dict[str, Any] | None:
        """The container's state; None when there is no such container any more."""

        def inspect(client: Any) -> dict[str, Any] | None:
            found = client.containers.list(all=True, filters={"id": self.id}, ignore_removed=True)
            return dict(found[0].attrs["State"]) if found else None

        return await self._engine.call(inspect, "look at a container")


_living: set[Container] = set()
_owner = os.getpid()


def _disown_all() -> None:
    global _owner
    _owner = os.getpid()
    for container in tuple(_living):
        container.disown()
    _living.clear()


os.register_at_fork(after_in_child=_disown_all)


@atexit.register
def _end_all() -> None:
    """Nothing outlives the process: containers still held are let go, and all are seen gone."""
    if os.getpid() != _owner:
        return
    end = time.monotonic() + EXIT_TIMEOUT
    remaining = tuple(_living)
    for container in remaining:
        container._let_go()
    for container in remaining:
        container._see_it_gone(max(0.1, end - time.monotonic()))

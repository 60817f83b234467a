"""LocalREPL: how to launch the shared worker on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import warnings
from typing import Any, Literal

from rlm import lockdown, protocol
from rlm.environment import Isolation, WorkerEnv
from rlm.errors import ConfigError, SandboxUnavailable
from rlm.handler import LMHandler
from rlm.session import Session

from . import forkserver

MiB = 1 << 20
STOP_TIMEOUT = 5.0
"""Seconds a supervisor gets to see its sandbox gone; it takes milliseconds."""

SHARE_FROM = 1 << 16
"""Bytes from which a context goes through shared memory: below, the connection is as fast."""

Wall = Literal["auto", "bubblewrap", "landlock"]
_warned: set[tuple[str, ...]] = set()


class LocalREPL(WorkerEnv):
    """Runs cells in a process of its own on this machine.

    ``isolation``: ``"auto"`` enforces what the machine can and warns of the rest,
    ``"required"`` refuses to start unless everything is enforced, ``"none"`` asks for a
    bare process. ``wall`` chooses among bubblewrap and Landlock. Sizes are in MiB:
    ``memory`` bounds each process of a sandbox, contexts included; ``file_size`` each file;
    ``scratch`` all scratch directories together, where bubblewrap keeps them in memory;
    ``output`` what is kept of each of a cell's two output streams. Without ``rollback`` no
    standby is forked after each cell: short cells cost a fifth, and one that has to be
    killed, or dies, takes all variables with it.
    """

    suite = "rlm_local.suite:LocalSuite"

    def __init__(
        self,
        *,
        isolation: Literal["auto", "required", "none"] = "auto",
        wall: Wall = "auto",
        memory: int = 4096,
        processes: int = 128,
        open_files: int = 1024,
        file_size: int = 1024,
        scratch: int = 1024,
        output: int = 1,
        rollback: bool = True,
    ) -> None:
        super().__init__()
        if isolation not in ("auto", "required", "none"):
            raise ConfigError(f"isolation={isolation!r}: use 'auto', 'required' or 'none'")
        if wall not in ("auto", "bubblewrap", "landlock"):
            raise ConfigError(f"wall={wall!r}: use 'auto', 'bubblewrap' or 'landlock'")
        self._mode = isolation
        self._wall = wall
        self._limits = {
            "AS": memory * MiB, "NPROC": processes, "NOFILE": open_files, "FSIZE": file_size * MiB, "CORE": 0,
        }  # fmt: skip
        self._scratch = scratch * MiB
        self._output = output * MiB
        self._rollback = rollback
        self._lane: socket.socket | None = None
        self._bubblewrap = False

    async def launch(self, session: Session, handler: LMHandler) -> None:
        server = await self._server()
        self._bubblewrap = server.bubblewrap
        lane, their_lane = socket.socketpair()
        lane.setblocking(False)
        self._lane = lane
        with their_lane, socket.create_connection(handler.address) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            request = {"name": session.id, "token": session.token, "options": self._options()}
            await server.spawn(request, [connection.fileno(), their_lane.fileno()])

    async def stop(self) -> None:
        """Wait until the supervisor has killed and buried everything: its end of the lane closes."""
        lane, self._lane = self._lane, None
        if lane is None:
            return
        with lane, contextlib.suppress(OSError, asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.get_running_loop().sock_recv(lane, 1), STOP_TIMEOUT)

    def share(self, data: bytes) -> bool:
        if len(data) < SHARE_FROM or self._lane is None:
            return False
        descriptor = os.memfd_create("context")
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            socket.send_fds(self._lane, [b"+"], [descriptor])
        finally:
            os.close(descriptor)
        return True

    def describe_isolation(self, hello: protocol.Hello) -> Isolation:
        if self._mode == "none":
            return Isolation("none", missing=("everything: isolation='none' was asked for",))
        wall = ["files", "network", "signals", "processes"] if self._bubblewrap else []
        level = "bubblewrap" if self._bubblewrap else "landlock" if "files" in hello.enforced else "none"
        enforced = tuple(sorted({*wall, *hello.enforced}))
        missing = tuple(m for m in hello.missing if not (self._bubblewrap and m.startswith("files")))
        found = Isolation(level, enforced, missing)
        if missing:
            self._report(found)
        return found

    def _report(self, found: Isolation) -> None:
        text = (
            f"local sandboxes on this machine do not enforce: {'; '.join(found.missing)}. "
            "Install bubblewrap, or use environment='docker'"
        )
        if self._mode == "required":
            raise SandboxUnavailable(f"isolation='required', but {text}")
        if found.missing not in _warned:
            _warned.add(found.missing)
            warnings.warn(text, stacklevel=2)

    async def _server(self) -> forkserver.ForkServer:
        bwrap = None if self._mode == "none" or self._wall == "landlock" else forkserver.find_bubblewrap()
        if bwrap is not None:
            try:
                return await forkserver.shared(bwrap, self._scratch)
            except SandboxUnavailable:
                if self._wall == "bubblewrap":
                    raise
        elif self._wall == "bubblewrap":
            raise SandboxUnavailable("wall='bubblewrap', but bwrap is not installed")
        return await forkserver.shared(None, self._scratch)

    def _options(self) -> dict[str, Any]:
        return {
            "output_limit": self._output,
            "rollback": self._rollback,
            "limits": dict(self._limits),
            "give_up": {} if self._mode == "none" else self._give_up(),
        }

    def _give_up(self) -> dict[str, Any]:
        """What the executor drops before it runs a cell."""
        read = forkserver.readable_paths() + (["/proc"] if self._bubblewrap else [])
        root = os.geteuid() == 0
        hidden = root and not self._bubblewrap and not _readable_by_all(forkserver.python_folders())
        return {
            # a user of its own for each sandbox: limits and file permissions then are per sandbox
            "uid": (1 << 30) + secrets.randbelow(1 << 30) if root else None,
            # an interpreter in root's own home: readable by Landlock's leave alone
            "keep": 1 << lockdown.CAP_DAC_READ_SEARCH if hidden and lockdown.landlock_version() else 0,
            "namespace": True,
            "landlock": {"read": read, "write": list(forkserver.DEVICES)},
            "seccomp": True,
            # root gives each sandbox a user of its own, who owns nothing of anyone else's
            "attributes": root,
        }


def _readable_by_all(folders: list[str]) -> bool:
    """Whether other users may pass through every folder that leads to these."""
    for folder in folders:
        path = os.path.realpath(folder)
        while path != "/":
            if not os.stat(path).st_mode & 0o001:
                return False
            path = os.path.dirname(path)
    return True

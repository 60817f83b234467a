"""ProcessREPL: cells in a process of this machine, and nothing around it.

An environment whose code runs in some Python is a `WorkerEnv`. It says how the worker is
launched and how it is seen gone; cells, deadlines, recovery and contexts are the worker's.
"""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import sys
import tempfile

from rlm import boot, protocol, streams
from rlm.environment import START_TIMEOUT, WORKER_ENVIRONMENT, Isolation, WorkerEnv
from rlm.errors import SandboxUnavailable
from rlm.handler import LMHandler
from rlm.session import Session
from rlm.wire import FrameError

STOP_TIMEOUT = 5.0
"""Seconds a worker gets to end by itself once its stream is closed; it takes milliseconds."""


class ProcessREPL(WorkerEnv):
    """Runs cells as the user who calls, with that user's files, network and processes.

    It is NO sandbox: a cell can do whatever you can. ``python`` is any CPython from 3.8 on.
    """

    suite = "rlm_example.suite:ProcessSuite"

    def __init__(self, *, python: str = sys.executable) -> None:
        super().__init__()  # always: it makes what the methods of WorkerEnv stand on
        self._python = python
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = ""

    async def launch(self, session: Session, handler: LMHandler) -> None:
        ours, theirs = socket.socketpair()  # whatever joins the two: a pipe of ssh, of kubectl, ...
        ours.setblocking(False)
        self._folder = tempfile.mkdtemp(prefix="rlm-example-")
        options = {
            "scratch": self._folder,  # where cells work; gone with the worker, even if this process dies
            "remove_scratch": True,
            "environ": {"HOME": self._folder, "TMPDIR": self._folder, "PWD": self._folder},
        }
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [self._python, *boot.COMMAND], stdin=theirs.fileno(), stdout=theirs.fileno(),
                    stderr=subprocess.DEVNULL, env=WORKER_ENVIRONMENT, cwd=self._folder,
                    start_new_session=True,  # Ctrl-C is for the host, who then tells the worker
                )  # fmt: skip
            async with asyncio.timeout(START_TIMEOUT):
                await streams.bring_up(ours, options)
        except (OSError, EOFError, FrameError) as error:  # TimeoutError is an OSError
            ours.close()
            what = str(error) or type(error).__name__
            raise SandboxUnavailable(f"{self._python!r} does not become a worker: {what}") from error
        except BaseException:
            ours.close()
            raise
        streams.name_session(ours, session.token)
        await handler.adopt(ours, session)  # from here on the stream is the handler's

    async def stop(self) -> None:
        """Wait for the worker, which kills all it has started when its stream ends."""
        process, self._process = self._process, None
        if process is not None:
            try:
                await asyncio.to_thread(process.wait, STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                await asyncio.to_thread(process.wait)
        shutil.rmtree(self._folder, ignore_errors=True)

    def describe_isolation(self, hello: protocol.Hello) -> Isolation:
        return Isolation("none", missing=("everything: a cell can do what its user can",))

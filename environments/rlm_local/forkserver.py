"""The host's end of the fork server, and the walls that are put around it.

One fork server serves all local sandboxes of this process with the same settings. It is
started on first use, from the core's loop thread (the kernel ties its life to that
thread), and ends with the process, however that ends.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import importlib.machinery
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rlm import boot
from rlm.environment import WORKER_ENVIRONMENT
from rlm.errors import SandboxUnavailable

END_TIMEOUT = 2.0
"""Seconds that the end of the process waits for a fork server; one without sandboxes takes milliseconds."""

READY_TIMEOUT = 30.0
"""Seconds for Python to start, on a machine under load."""

SYSTEM_PATHS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/opt")
SYSTEM_FILES = (
    "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives", "/etc/localtime",
    "/etc/timezone", "/etc/mime.types", "/etc/ssl/certs", "/etc/ssl/openssl.cnf", "/etc/magic",
)  # fmt: skip
"""Of /etc a program needs these; what is not listed may be a secret."""

DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")

ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", **WORKER_ENVIRONMENT}
"""The whole environment of a sandbox. Nothing of the host's is passed on."""

HUGE_PAGES = "/sys/kernel/mm/transparent_hugepage"
"""Where libc looks, at its start, whether its large allocations may be huge pages."""

_ZYGOTE = Path(__file__).with_name("zygote.py")


def travelling_files() -> Path:
    """The folder of the files that go into every sandbox, compiled if they can be."""
    spec = importlib.util.find_spec("rlm.worker")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    for name in ("boot", *boot.MODULES):
        loader = importlib.machinery.SourceFileLoader(f"rlm.{name}", str(folder / f"{name}.py"))
        loader.get_code(loader.name)  # leaves byte code beside the source, where that is writable
    return folder


def interpreter() -> str:
    """The Python below any virtual environment: the one whose files need be visible."""
    return str(getattr(sys, "_base_executable", "") or sys.executable)


def package_folders() -> list[str]:
    """The site-packages of this process, for cells that import what the user has installed."""
    return [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages") and Path(p).is_dir()]


def python_folders() -> list[str]:
    """Where the interpreter and its packages live."""
    return _python_folders(tuple(sys.path))


@functools.lru_cache(maxsize=1)  # asked for each sandbox, and it looks at the disk
def _python_folders(path: tuple[str, ...]) -> list[str]:
    prefixes = {sys.base_prefix, sys.base_exec_prefix} - {"/", "/usr"}
    return sorted(prefixes) + package_folders()


def readable_paths() -> list[str]:
    """All that a cell may read besides its scratch directory."""
    return [*SYSTEM_PATHS, *SYSTEM_FILES, *python_folders()]


def find_bubblewrap() -> str | None:
    """The path of bwrap, if it is installed."""
    return shutil.which("bwrap")


def bubblewrap_command(bwrap: str, scratch_bytes: int) -> list[str]:
    """The walls: own processes, network, hosts, IPC and file system, the latter read-only."""
    command = [
        bwrap, "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try",
        "--die-with-parent", "--new-session", "--hostname", "sandbox", "--proc", "/proc", "--dev", "/dev",
        "--size", str(scratch_bytes), "--tmpfs", "/tmp",
    ]  # fmt: skip
    if os.geteuid() == 0:  # root needs no user namespace, and keeps just what becoming nobody takes
        command += ["--cap-drop", "ALL"]
        for capability in ("SETUID", "SETGID", "SETPCAP", "CHOWN", "KILL", "DAC_OVERRIDE", "SYS_RESOURCE"):
            command += ["--cap-add", f"CAP_{capability}"]
    else:
        command.append("--unshare-user")
    for path in SYSTEM_PATHS:
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        else:
            command += ["--ro-bind-try", path, path]
    visible = [*SYSTEM_FILES, *python_folders(), str(travelling_files()), str(_ZYGOTE.parent), HUGE_PAGES]
    for folder in sorted({str(parent) for path in visible for parent in Path(path).parents} - {"/"}):
        if not folder.startswith(SYSTEM_PATHS):  # empty folders on the way to what is bound
            command += ["--perms", "0755", "--dir", folder]
    for path in visible:
        command += ["--ro-bind-try", path, path]
    return [*command, "--chdir", "/", "--"]


class ForkServer:
    """A running fork server."""

    def __init__(self, process: subprocess.Popen[bytes], control: socket.socket, bubblewrap: bool) -> None:
        self.bubblewrap = bubblewrap
        self._process = process
        self._control = control
        self._turn = asyncio.Lock()

    @classmethod
    async def start(cls, bwrap: str | None, scratch_bytes: int) -> ForkServer:
        """Start one, inside bubblewrap if a path to it is given. Raises SandboxUnavailable."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        walls = bubblewrap_command(bwrap, scratch_bytes) if bwrap else []
        root = "/tmp/rlm" if bwrap else tempfile.mkdtemp(prefix="rlm-")
        command = [
            *walls, interpreter(), "-I", "-S", "-B", str(_ZYGOTE), str(theirs.fileno()),
            str(travelling_files()), root, *package_folders(),
        ]  # fmt: skip
        with tempfile.TemporaryFile() as errors:
            try:
                process = subprocess.Popen(
                    command, env=ENVIRONMENT, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL, stderr=errors, cwd="/", start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                ours.close()
                raise SandboxUnavailable(f"{command[0]} cannot be started: {error}") from error
            finally:
                theirs.close()
            server = cls(process, ours, bwrap is not None)
            if not await server._is_ready():
                server.close()
                errors.seek(0)
                reason = errors.read().decode("utf-8", "replace").strip() or "it gave no reason"
                raise SandboxUnavailable(f"the fork server does not start: {reason[-2000:]}")
        return server

    async def _is_ready(self) -> bool:
        loop = asyncio.get_running_loop()
        try:
            return await asyncio.wait_for(loop.sock_recv(self._control, 16), READY_TIMEOUT) == b"ready"
        except (TimeoutError, OSError):
            return False

    @property
    def alive(self) -> bool:
        """Whether it can still be asked."""
        return self._process.poll() is None

    async def spawn(self, request: dict[str, Any], descriptors: list[int]) -> None:
        """Ask for a sandbox over these descriptors: its connection, and its lane.

        There is no answer: the worker's hello is one, and the connection closes otherwise.
        """
        data = json.dumps(request).encode()
        async with self._turn:
            while True:
                try:
                    socket.send_fds(self._control, [data], descriptors)
                    return
                except BlockingIOError:  # hundreds of requests at once: as many as the socket holds
                    await self._writable()
                except OSError as error:
                    raise SandboxUnavailable(f"the fork server cannot be asked: {error}") from error

    async def _writable(self) -> None:
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        loop.add_writer(self._control, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_writer(self._control)

    def close(self) -> None:
        """Tell it to end. Its sandboxes clean up after themselves first."""
        self._control.close()

    def wait(self) -> None:
        """Wait, not for long, until it has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_TIMEOUT)


@atexit.register
def _close_all() -> None:
    """At the end of the process: end with it, and not a moment later."""
    for (owner, *_), server in _running.items():
        if owner == os.getpid():
            server.close()
            server.wait()


_running: dict[tuple[int, str | None, int], ForkServer] = {}
_starting: dict[tuple[int, str | None, int], asyncio.Future[ForkServer]] = {}


async def shared(bwrap: str | None, scratch_bytes: int) -> ForkServer:
    """The fork server of this process for these settings, started if need be, once."""
    key = (os.getpid(), bwrap, scratch_bytes)
    server = _running.get(key)
    if server is not None:
        if server.alive:
            return server
        server.close()
        _running.pop(key, None)
    if key not in _starting:
        task = asyncio.ensure_future(ForkServer.start(bwrap, scratch_bytes))
        _starting[key] = task
        task.add_done_callback(lambda _: _starting.pop(key, None))
    server = await asyncio.shield(_starting[key])
    _running[key] = server
    return server

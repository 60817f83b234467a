"""What the tests of DockerREPL share: a real engine, and a second one to break."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlm.errors import SandboxUnavailable
from rlm.testing.sessions import eventually, unavailable
from rlm_docker import ownership
from rlm_docker.engine import BUILT_IMAGE, connect, explained


@functools.cache
def why_no_engine() -> str | None:
    """Why containers cannot be tested here, asked of the engine itself; None when they can."""
    try:
        client().ping()
    except SandboxUnavailable as error:
        return str(error)
    except Exception as error:  # the SDK's, requests' or the system's
        return str(explained(error, "be asked"))
    return None


@functools.cache
def client() -> Any:
    """The SDK's client for the engine of this machine."""
    return connect()


def need_engine() -> None:
    """Skip without an engine that has the image, or fail where none may be missing."""
    if reason := why_no_engine():
        unavailable(reason)
    if not client().images.list(BUILT_IMAGE):
        unavailable(f"the engine has no image {BUILT_IMAGE}: run `rlm docker build`")


def containers(pid: int | None = None) -> list[Any]:
    """The sandboxes that a process (this one, unless given) has on the engine, dead ones included."""
    owner = {"label": f"{ownership.PID}={pid or os.getpid()}"}
    found: list[Any] = client().containers.list(all=True, filters=owner, ignore_removed=True)
    return found


def all_gone(pid: int | None = None, seconds: float = 20.0) -> bool:
    """Whether no container of a process is left, within a bound."""
    return eventually(lambda: not containers(pid), seconds)


class SecondEngine:
    """An engine of this test's own, which may be stopped and started."""

    def __init__(self, folder: Path) -> None:
        self.host = f"unix://{folder}/sock"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = [  # in a network of its own: it would take down the bridge of the machine's engine
            "unshare", "--net", "dockerd", "--data-root", f"{self._folder}/data",
            "--exec-root", f"{self._folder}/exec", "--pidfile", f"{self._folder}/pid", "--host", self.host,
            "--bridge=none", "--iptables=false",
            "--ip-masq=false",
        ]  # fmt: skip
        with open(self._folder / "log", "ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        ready = eventually(lambda: self.docker("version", check=False).returncode == 0, 60)
        assert ready, (self._folder / "log").read_text()[-3000:]

    def stop(self) -> None:
        """Stop it, as a service manager does."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(60)
            self._process = None

    def docker(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
        """The docker command on this engine."""
        command = ["docker", "--host", self.host, *arguments]
        return subprocess.run(command, capture_output=True, timeout=120, check=check)

    def load(self, image: str) -> None:
        """Give it an image of the machine's engine."""
        here = {name: value for name, value in os.environ.items() if name != "DOCKER_HOST"}
        with subprocess.Popen(["docker", "save", image], stdout=subprocess.PIPE, env=here) as save:
            load = ["docker", "--host", self.host, "load"]
            subprocess.run(load, stdin=save.stdout, stdout=subprocess.DEVNULL, check=True, timeout=300)

    @contextlib.contextmanager
    def port(self) -> Iterator[str]:
        """A TCP address of the engine, as for DOCKER_HOST."""
        path = self.host.removeprefix("unix://")
        command = [sys.executable, "-c", RELAY, path]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as relay:
            assert relay.stdout is not None
            try:
                yield f"tcp://127.0.0.1:{relay.stdout.readline().strip()}"
            finally:
                relay.kill()


RELAY = """
import asyncio, sys
async def pump(reader, writer):
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.write_eof()
async def relay(*outer):
    inner = await asyncio.open_unix_connection(sys.argv[1])
    await asyncio.gather(pump(outer[0], inner[1]), pump(inner[0], outer[1]), return_exceptions=True)
    outer[1].close(); inner[1].close()
async def main():
    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


@contextlib.contextmanager
def second_engine(disk: str | None = None) -> Iterator[SecondEngine]:
    """A running engine without images, on a ``disk`` of that size. Skips where none can be started."""
    need_engine()
    if os.geteuid() != 0 or shutil.which("dockerd") is None:
        unavailable("a second engine takes root and dockerd")
    folder = Path(tempfile.mkdtemp(prefix="rlm-engine-"))
    engine = SecondEngine(folder)
    if disk is not None:
        (folder / "data").mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={disk}", "tmpfs", str(folder / "data")]
        subprocess.run(command, check=True)
    try:
        engine.start()
        yield engine
    finally:
        engine.stop()
        for mount in _mounts_below(folder):
            subprocess.run(["umount", "--lazy", mount], capture_output=True, check=False)
        shutil.rmtree(folder, ignore_errors=True)


def _mounts_below(folder: Path) -> list[str]:
    mounts = (line.split()[1] for line in Path("/proc/mounts").read_text().splitlines())
    return sorted((mount for mount in mounts if mount.startswith(str(folder))), reverse=True)


def within(seconds: float, act: Callable[[], object]) -> None:
    """Do something on a thread after a while."""
    timer = threading.Timer(seconds, act)
    timer.daemon = True
    timer.start()


def since(start: float) -> float:
    """Seconds since a reading of `time.monotonic`."""
    return time.monotonic() - start

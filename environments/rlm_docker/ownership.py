"""Whose container is whose: labels, and the removal of what nobody owns any more.

A container is owned by the process that started it. Its labels tell that process apart
from any other that ever ran: by machine, boot and name space of process ids, by process
id, and by when the process started. Only what a dead process of this very place left is
ever removed, and what has ended on its own and is past its time to live.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import platform
import subprocess
import time
import uuid
from pathlib import Path
from typing import Any

from rlm.environment import SandboxInfo

SANDBOX = "rlm.sandbox"
RUN, SESSION = "rlm.run", "rlm.session"
HOST, PID, STARTED = "rlm.host", "rlm.pid", "rlm.pid.started"
CREATED, TIME_TO_LIVE = "rlm.created", "rlm.ttl"


@functools.lru_cache(maxsize=1)
def this_host() -> str:
    """A name for the place whose process ids mean what they mean here: this boot, this name space."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{platform.node()}/{uuid.getnode():x}"


def started(pid: int) -> str | None:
    """When a process started, in whatever form this system has; None if there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return None if fields[0] in (b"Z", b"X") else fields[19].decode()
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    except OSError:
        return None
    shown = subprocess.run(
        ["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
    ).stdout
    return " ".join(shown.split()) or None


def _is_owner(pid: int, start: str | None) -> bool:
    """Whether a process is the one that started at that time; one that cannot be looked at may be."""
    now = started(pid)
    if now is not None or pid <= 0:
        return now == start
    try:
        os.kill(pid, 0)  # /proc may hide the processes of others
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return False  # ours to signal, and still without a start: it has ended, and waits to be collected


def labels(run: str, session: str, time_to_live: float) -> dict[str, str]:
    """The labels of a container that this process starts now."""
    return {
        SANDBOX: "1",
        RUN: run,
        SESSION: session,
        HOST: this_host(),
        PID: str(os.getpid()),
        STARTED: started(os.getpid()) or "",
        CREATED: f"{time.time():.0f}",
        TIME_TO_LIVE: f"{time_to_live:.0f}",
    }


def describe(container: Any) -> SandboxInfo:
    """What a container's labels and state say."""
    given = container.labels
    pid = int(given.get(PID) or 0)
    created = float(given.get(CREATED) or 0)
    here = given.get(HOST) == this_host()
    alive = here and _is_owner(pid, given.get(STARTED))
    running = container.status in ("running", "paused", "restarting")
    expired = time.time() > created + float(given.get(TIME_TO_LIVE) or "inf")
    return SandboxInfo(
        environment="docker",
        id=container.name,
        state=container.status,
        owner=f"process {pid}"
        + ("" if here else " of another host")
        + ("" if alive or not here else ", dead"),
        created=created,
        abandoned=(here and not alive) or (not running and expired),
    )


def all_of(client: Any) -> list[Any]:
    """Every container on the engine that is a sandbox of anybody's."""
    found: list[Any] = client.containers.list(all=True, filters={"label": SANDBOX}, ignore_removed=True)
    return found


def sweep(client: Any) -> list[SandboxInfo]:
    """Remove what nobody owns any more, and tell what that was."""
    removed = []
    for container in all_of(client):
        found = describe(container)
        if found.abandoned:
            _remove(container)
            removed.append(dataclasses.replace(found, state="removed"))
    return removed


def _remove(container: Any) -> None:
    try:
        container.remove(force=True, v=True)
    except Exception as error:  # the SDK's classes are not here to be named
        if type(error).__name__ not in ("NotFound",) and "already in progress" not in str(error):
            raise

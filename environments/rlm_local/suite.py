"""What local sandboxes promise, as tests: the conformance suite with what is particular to them."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from rlm.environment import BaseEnv, Isolation
from rlm.testing import EnvironmentSuite
from rlm.testing.sessions import descendants, parents

CAP_DAC_READ_SEARCH = 1 << 2


class LocalSuite(EnvironmentSuite):
    """The suite for LocalREPL. Its fork server is kept between sessions, and ends with the host."""

    where = "a process of this machine (Linux)"
    between = (
        "bubblewrap if installed, and Landlock + seccomp + resource limits; no network, "
        "no files but Python's and a scratch directory, no signals, no environment"
    )
    first_cell = "milliseconds: forked from a warm Python"

    limits: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "memory": {"memory": 256},
        "file size": {"file_size": 1},
        "open files": {"open_files": 64},
        "output": {"output": 2},
    }
    canary_folders: ClassVar[Mapping[str, Path]] = {
        "temporary directory": Path(tempfile.gettempdir()),
        "home": Path.home(),
        "working directory": Path.cwd(),
        "shared memory": Path("/dev/shm"),
        "var": Path("/var/tmp"),
    }

    def is_leftover(self, pid: int) -> bool:
        """A process runs, or begins or ceases to run, a session: the fork server forked it."""
        command = _command(pid)
        forked = _is_python(pid) and _is_python(parents().get(pid, 0))
        return forked or (b"zygote.py" not in command and not command.startswith(b"bwrap "))

    def kill(self, env: BaseEnv) -> None:
        """The supervisor is killed, as by the kernel when memory runs out: a child of a fork server."""
        tree = parents()
        for pid in descendants(os.getpid()):
            server = tree.get(pid, 0)
            if _is_python(pid) and _is_python(server) and not _is_python(tree.get(server, 0)):
                os.kill(pid, signal.SIGKILL)

    def on_host(self, path: str) -> Path | None:
        """Scratch directories are the host's, but for those inside bubblewrap."""
        return Path(path)

    def kept_capabilities(self, isolation: Isolation) -> int:
        """Where the interpreter lies in root's own home a cell may read it: Landlock decides what else."""
        return CAP_DAC_READ_SEARCH if os.geteuid() == 0 and isolation.level == "landlock" else 0


def _is_python(pid: int) -> bool:
    """Whether a process is a fork server, or has been forked from one."""
    command = _command(pid)
    return b"zygote.py" in command and not command.startswith(b"bwrap ")


def _command(pid: int) -> bytes:
    """Name and arguments of a process; nothing once it is ending."""
    with contextlib.suppress(OSError):
        entry = Path(f"/proc/{pid}")
        arguments = (entry / "cmdline").read_bytes()
        return (entry / "comm").read_bytes().strip() + b" " + arguments if arguments else b""
    return b""

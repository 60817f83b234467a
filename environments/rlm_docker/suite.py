"""What sandboxes in containers promise, as tests: the conformance suite with what is particular to them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from rlm.environment import BaseEnv
from rlm.testing import EnvironmentSuite

from . import ownership
from .engine import connected
from .environment import DockerREPL


class DockerSuite(EnvironmentSuite):
    """The suite for DockerREPL: what is left of it are containers, and what holds their streams."""

    where = "a container of its own, on any Docker engine, local or remote"
    between = (
        "the container: no network, read-only root, nothing of the host mounted, no capabilities, an "
        "unprivileged user, limits on memory, cpu, processes and files; and "
        "seccomp filters, the engine's and ours"
    )
    first_cell = "about 0.3 s; milliseconds from a warm pool (`prewarm`)"

    limits: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "memory": {"memory": 256},
        "file size": {"scratch": 1},
        "open files": {"open_files": 64},
        "output": {"output": 2},
    }
    canary_folders: ClassVar[Mapping[str, Path]] = {
        "home": Path.home(),
        "working directory": Path.cwd(),
        "shared memory": Path("/dev/shm"),
        "var": Path("/var/tmp"),
    }

    def kill(self, env: BaseEnv) -> None:
        """As ``docker kill`` does."""
        assert isinstance(env, DockerREPL)
        assert env._container is not None
        with connected("kill a container") as client:
            client.containers.get(env._container.id).kill()

    def leftovers(self, host: int) -> set[str]:
        owner = {"label": f"{ownership.PID}={host}"}
        with connected("list containers") as client:
            found = client.containers.list(all=True, filters=owner, ignore_removed=True)
            return {container.name for container in found} | super().leftovers(host)

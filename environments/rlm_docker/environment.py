"""DockerREPL: how to launch the shared worker in a container of its own."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Mapping
from typing import Any

from rlm import boot, protocol
from rlm.environment import WORKER_ENVIRONMENT, Isolation, SandboxInfo, WorkerEnv
from rlm.errors import ConfigError, SandboxError, SandboxLost
from rlm.handler import LMHandler
from rlm.session import Session

from . import engine as engines
from . import ownership
from .audit import audit
from .container import Container
from .engine import Engine, Pull
from .pool import Pool

MiB = 1 << 20
SCRATCH = "/tmp"
_TMPFS = "rw,nosuid,nodev,size={size}m,nr_inodes={files},mode=1777"

NOBODY = "65534:65534"

_OURS = {
    "init",
    "tty",
    "detach",
    "auto_remove",
    "restart_policy",
    "entrypoint",
    "command",
    "stdin_open",
    "name",
}
"""Arguments of the SDK that `docker_kwargs` cannot set: what the stream, the supervisor's place as
process 1, and the end of a container rest on."""


class DockerREPL(WorkerEnv):
    """Runs cells in a hardened container on any Docker engine, local or remote.

    ``image``: any image with a ``python3`` of version 3.8 or later (``python`` names it where it is
    not on the PATH); by default ``rlm-sandbox:latest`` where ``rlm docker build`` has made one, else
    ``python:3.12-slim``. ``pull``: ``"missing"``, ``"never"`` or ``"always"``.

    Sizes are in MiB: ``memory`` of the whole container, without swap; ``scratch`` of /tmp and of
    /dev/shm, each, which count as memory (a quarter of it, 512 at most, unless given); ``output``
    of what is kept of each of a cell's two output streams. ``cpus`` may be a fraction; ``pids`` bounds
    processes and threads, ``open_files`` those of one process, ``files`` the number in /tmp.
    ``time_to_live``: seconds after which a container ends whatever happens. Without ``rollback``
    a cell that has to be killed takes all variables with it, and short cells cost less.

    ``network``: ``"none"``, or a network of the engine's (``"bridge"``). ``volumes`` and ``env`` are as in
    the Docker SDK; nothing of the host is mounted or passed on by itself. ``user`` as in ``docker run``;
    ``runtime``, e.g. ``"runsc"``. ``docker_kwargs``: further arguments of the SDK's
    ``containers.create``, which win over ours. Whatever loosens the default isolation is named in
    `Isolation.missing`, and so in the trace.

    ``prewarm``: containers to keep started ahead for the next sessions with the same settings, each for
    ``idle`` seconds at most. ``docker_host``: an address as in DOCKER_HOST.
    """

    suite = "rlm_docker.suite:DockerSuite"

    def __init__(
        self,
        *,
        image: str | None = None,
        memory: int = 2048,
        cpus: float = 1.0,
        pids: int = 256,
        network: str = "none",
        volumes: Any = None,
        env: Mapping[str, str] | None = None,
        user: str = NOBODY,
        runtime: str | None = None,
        pull: Pull = "missing",
        scratch: int | None = None,
        files: int = 65536,
        open_files: int = 1024,
        output: int = 1,
        rollback: bool = True,
        python: str = "python3",
        time_to_live: float = 24 * 3600.0,
        prewarm: int = 0,
        idle: float = 300.0,
        docker_host: str | None = None,
        docker_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if scratch is None:
            scratch = max(1, min(512, memory // 4))
        if pull not in ("missing", "never", "always"):
            raise ConfigError(f"pull={pull!r}: use 'missing', 'never' or 'always'")
        sizes = {"memory": memory, "cpus": cpus, "pids": pids, "scratch": scratch, "files": files,
                 "open_files": open_files, "output": output, "time_to_live": time_to_live}  # fmt: skip
        for name, value in sizes.items():
            if not value > 0:
                raise ConfigError(f"{name}={value!r}: it must be more than 0")
        further = dict(docker_kwargs or {})
        if taken := _OURS.intersection(further):
            raise ConfigError(
                f"docker_kwargs cannot set {', '.join(sorted(taken))}: the sandbox depends on them"
            )
        if not isinstance(further.get("labels", {}), Mapping):
            raise ConfigError("docker_kwargs: labels is a dict, name to value")
        self._image = image
        self._pull: Pull = pull
        self._prewarm = prewarm
        self._idle = idle
        self._docker_host = docker_host
        self._time_to_live = time_to_live
        self._container: Container | None = None
        self._worker_options = {
            "output_limit": output * MiB,
            "rollback": rollback,
            "limits": {"CORE": 0},
            # the walls are the container's; the filter adds what old engines let through
            "give_up": {"seccomp": True, "network": True, "landlock": {}},
            "scratch": SCRATCH,
            "environ": {"HOME": SCRATCH, "TMPDIR": SCRATCH, "PWD": SCRATCH},
            "time_to_live": time_to_live,
        }
        self._settings: dict[str, Any] = {
            "entrypoint": [python],
            "command": list(boot.COMMAND),
            "stdin_open": True,
            "environment": {**WORKER_ENVIRONMENT, **(env or {})},
            "user": user,
            "working_dir": SCRATCH,
            "hostname": "sandbox",
            "network_mode": network,
            "log_config": {"type": "none"},  # else every frame is written to the engine's disk
            "read_only": True,
            "tmpfs": {
                SCRATCH: _TMPFS.format(size=scratch, files=files),
                "/dev/shm": _TMPFS.format(size=scratch, files=files),
            },
            "cap_drop": ["ALL"],
            "security_opt": ["no-new-privileges"],
            "ipc_mode": "none",
            "pids_limit": pids,
            "mem_limit": memory * MiB,
            "memswap_limit": memory * MiB,
            "nano_cpus": int(cpus * 1e9),
            "ulimits": [
                {"name": "nofile", "soft": open_files, "hard": open_files},
                {"name": "core", "soft": 0, "hard": 0},
            ],
            "oom_score_adj": 500,
            **({"volumes": volumes} if volumes else {}),
            **({"runtime": runtime} if runtime else {}),
            "stop_signal": "SIGKILL",
            "use_config_proxy": False,
            **further,
        }  # fmt: skip
        self._worker_options["wipe"] = [*(self._settings["tmpfs"] or ()), "/dev/mqueue"]

    # -- launching

    async def launch(self, session: Session, handler: LMHandler) -> None:
        run = self._host.run if self._host is not None else ""
        if self._prewarm > 0:
            self._container = await self._pool().take()
        else:
            self._container = await self._start_container(run, session.id)
        await handler.adopt(self._container.hand_over(session.token), session)

    async def stop(self) -> None:
        """Let the container go; it is removed in the background, before the process ends."""
        container, self._container = self._container, None
        if container is not None:
            container.release()

    async def reset(self) -> None:
        """See `SupportsReset`. Of a root that can be written to nobody knows what has been."""
        if not self._settings["read_only"]:
            raise SandboxError("a container whose root is not read-only cannot begin anew")
        await super().reset()

    def describe_isolation(self, hello: protocol.Hello) -> Isolation:
        assert self._container is not None
        enforced, missing = audit(self._container.attributes)
        if "system calls" in hello.enforced:
            enforced.append("system calls")
        missing += [text for text in hello.missing if text.startswith("system calls")]
        return Isolation("docker", tuple(sorted(enforced)), tuple(missing))

    async def explain_loss(self, reason: str) -> SandboxError:
        if self._container is None:
            return SandboxLost(f"the sandbox is gone: {reason}")
        return await self._container.explain_loss(reason)

    async def warm(self) -> None:
        """Fill the pool of containers with these settings, and wait until it is full."""
        await asyncio.gather(*self._pool().fill())

    # -- whatever exists

    @classmethod
    async def sandboxes(cls) -> list[SandboxInfo]:
        """Every sandbox container on the engine, whoever started it."""
        return await engines.shared(None).call(
            lambda client: [ownership.describe(c) for c in ownership.all_of(client)], "list its containers"
        )

    @classmethod
    async def sweep(cls) -> list[SandboxInfo]:
        """Remove the containers whose owner is gone; running ones of other hosts are never touched."""
        return await engines.shared(None).call(ownership.sweep, "remove containers")

    # -- containers

    def _engine(self) -> Engine:
        return engines.shared(self._docker_host)

    def _pool(self) -> Pool:
        """The warm containers of this process with just these settings."""
        kind = json.dumps([self._image, self._pull, self._settings, self._worker_options], default=repr)
        pools = self._engine().pools
        if kind not in pools:
            pools[kind] = Pool(lambda: self._start_container("", ""), self._idle)
        pools[kind].size = max(pools[kind].size, self._prewarm)
        return pools[kind]

    async def _start_container(self, run: str, session: str) -> Container:
        own = ownership.labels(run, session, self._time_to_live)
        settings = {
            "name": f"rlm-{secrets.token_hex(6)}",
            **self._settings,
            "labels": {**self._settings.get("labels", {}), **own},
        }
        return await Container.start(self._engine(), self._image, self._pull, settings, self._worker_options)

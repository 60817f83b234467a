"""A Docker engine: how to reach it, and what its refusals mean.

The SDK is imported on first use and called on threads of its own, since it blocks. The
``docker`` command carries the streams (see `container`); both are pointed at the same
engine: ``DOCKER_HOST``, the current Docker context, or the local socket.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import logging
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from rlm.errors import ConfigError, RLMError, SandboxUnavailable

from . import ownership
from .errors import (
    ContainerRefused,
    EngineDiskFull,
    EnginePermission,
    EngineUnavailable,
    ImageMissing,
)

if TYPE_CHECKING:
    from .pool import Pool

log = logging.getLogger("rlm.docker")

Value = TypeVar("Value")
Pull = Literal["missing", "never", "always"]

REQUEST_TIMEOUT = 60.0
"""Seconds the engine gets to answer a request; a pull may take longer between two answers."""

THREADS = 8
"""Requests to an engine at a time."""

BUILT_IMAGE = "rlm-sandbox:latest"
"""What ``rlm docker build`` makes, and the default where it exists."""

PUBLIC_IMAGE = "python:3.12-slim"
"""The default elsewhere: pulled once, used as it is."""


class Engine:
    """One engine. ``host`` is an address as in DOCKER_HOST; None is what the environment says."""

    def __init__(self, host: str | None = None) -> None:
        self.host = host
        self._client: Any = None
        self._connecting = threading.Lock()
        self._slots = asyncio.Semaphore(THREADS)
        self._present: set[str] = set()
        self._pulling = asyncio.Lock()
        self.starts = asyncio.Semaphore(2 * (os.cpu_count() or 1))
        """Containers that start at a time: more of them at once only start more slowly."""
        self.pools: dict[str, Pool] = {}

    async def call(self, work: Callable[[Any], Value], doing: str) -> Value:
        """Give the SDK's client to ``work``, on a thread. Raises SandboxUnavailable, explained."""
        async with self._slots:
            return await asyncio.wrap_future(_on_a_thread(lambda: self._call(work, doing)))

    def _call(self, work: Callable[[Any], Value], doing: str) -> Value:
        try:
            knock(self.host)
            with self._connecting:
                if self._client is None:
                    self._client = connect(self.host)
                    _on_a_thread(functools.partial(_sweep_quietly, self._client))
            return work(self._client)
        except RLMError:
            raise
        except Exception as error:  # the SDK raises its own, requests', urllib3's and the system's
            raise explained(error, doing, self.host) from error

    @property
    def command(self) -> str:
        """The ``docker`` command. Raises EngineUnavailable without one."""
        found = shutil.which("docker")
        if found is None:
            raise EngineUnavailable(
                "the docker command is not installed: it carries the stream to a container. "
                "Install Docker's command line (on Debian and Ubuntu: docker.io or docker-ce-cli)"
            )
        return found

    @property
    def environ(self) -> dict[str, str]:
        """What the ``docker`` command is started with, so that it reaches the same engine."""
        names = ("PATH", "HOME", "USER", "SSH_AUTH_SOCK", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR", "TMPDIR")
        kept = {n: v for n, v in os.environ.items() if n in names or n.startswith("DOCKER_")}
        return {**kept, "DOCKER_HOST": self.host} if self.host else kept

    # -- images

    async def create(self, image: str | None, pull: Pull, settings: dict[str, Any]) -> Any:
        """Create a container (the SDK's object), getting its image first if need be."""
        name = image or await self._default_image()
        if pull == "always":
            await self._pull(name, image is None)
        try:
            return await self._create(name, settings)
        except ImageMissing:
            if pull == "never":
                raise
        await self._pull(name, image is None)
        return await self._create(name, settings)

    async def _create(self, image: str, settings: dict[str, Any]) -> Any:
        work = functools.partial(_create, image, settings)
        task = asyncio.ensure_future(self.call(work, f"create a container of image {image!r}"))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:  # the engine is at it: what comes of it is nobody's
            task.add_done_callback(self._discard_result)
            raise

    def _discard_result(self, created: asyncio.Task[Any]) -> None:
        if not created.cancelled() and created.exception() is None:
            self.discard(created.result())

    def discard(self, container: Any) -> None:
        """Remove a container that never started, in the background."""
        _on_a_thread(functools.partial(container.remove, force=True))

    async def _default_image(self) -> str:
        def built(client: Any) -> str:
            return BUILT_IMAGE if client.images.list(BUILT_IMAGE) else PUBLIC_IMAGE

        return await self.call(built, "look for an image")

    async def _pull(self, image: str, is_default: bool) -> None:
        async with self._pulling:
            if image in self._present:
                return
            try:
                await self.call(lambda client: client.images.pull(image), f"pull the image {image!r}")
            except SandboxUnavailable as error:
                if isinstance(error, EngineUnavailable | EnginePermission | EngineDiskFull):
                    raise
                raise ImageMissing(_ways_to_an_image(image, is_default, error)) from error
            self._present.add(image)


def _on_a_thread(work: Callable[[], Value]) -> concurrent.futures.Future[Value]:
    """Do something on a thread that the end of the process does not wait for: an engine may hang."""
    outcome: concurrent.futures.Future[Value] = concurrent.futures.Future()

    def run() -> None:
        outcome.set_running_or_notify_cancel()  # from here on it cannot be cancelled
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="rlm-docker", daemon=True).start()
    return outcome


def _sweep_quietly(client: Any) -> None:
    """What earlier processes left is removed on the way; if that fails, nothing is lost."""
    try:
        ownership.sweep(client)
    except Exception as error:  # of the SDK, requests or the system
        log.info("abandoned containers could not be removed: %s", error)


def _create(image: str, settings: dict[str, Any], client: Any) -> Any:
    try:
        return client.containers.create(image, **settings)
    except TypeError as error:  # the SDK's word for an argument that it does not have
        raise ConfigError(f"the Docker SDK does not take these docker_kwargs: {error}") from error


def _ways_to_an_image(image: str, is_default: bool, error: Exception) -> str:
    text = f"the image {image!r} is not on the engine and could not be pulled ({error}). "
    if is_default:
        return text + (
            "Either make one here, without a registry: `rlm docker build`; or name any image that has "
            "a python3: environment_kwargs={'image': ...}"
        )
    return text + "Any image with a python3 will do; `rlm docker build` makes one without a registry"


# --- connecting ----------------------------------------------------------------------------------


def sdk() -> Any:
    """The Docker SDK for Python. Raises EngineUnavailable where it is not installed."""
    try:
        import docker

        docker.from_env  # noqa: B018 - a mere folder called docker imports as an empty package
    except (ImportError, AttributeError):
        raise EngineUnavailable("the Docker SDK is not installed: pip install 'rlm[docker]'") from None
    return docker


@contextlib.contextmanager
def connected(doing: str, *, timeout: float = REQUEST_TIMEOUT) -> Iterator[Any]:
    """A client of the SDK for a while; what fails meanwhile is a SandboxUnavailable, explained."""
    client = None
    try:
        knock(None)
        client = connect(timeout=timeout)
        yield client
    except RLMError:
        raise
    except Exception as error:  # the SDK raises its own, requests', urllib3's and the system's
        raise explained(error, doing) from error
    finally:
        if client is not None:
            client.close()


def connect(host: str | None = None, *, timeout: float = REQUEST_TIMEOUT) -> Any:
    """A client of the SDK for the engine that the ``docker`` command would talk to."""
    docker = sdk()
    environment = dict(os.environ)
    if host is None and not environment.get("DOCKER_HOST"):
        host = _context_host(docker)
    if host is not None:
        environment["DOCKER_HOST"] = host
    over_ssh = environment.get("DOCKER_HOST", "").startswith("ssh://")
    return docker.from_env(
        environment=environment, timeout=timeout, use_ssh_client=over_ssh, max_pool_size=THREADS
    )


def knock(host: str | None) -> None:
    """See whether anybody answers at a local socket: the SDK leaves one open for each failure."""
    address = host or os.environ.get("DOCKER_HOST")
    if address is not None and address.startswith("unix://"):
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(address.removeprefix("unix://"))


def _context_host(docker: Any) -> str | None:
    """The address of the current Docker context, which the SDK does not look at by itself."""
    context = docker.ContextAPI.get_current_context()
    return context.Host if context is not None and context.Name != "default" else None


# --- what a failure means ----------------------------------------------------------------------------


def explained(error: BaseException, doing: str, host: str | None = None) -> SandboxUnavailable:
    """A failure of the SDK as an error of ours that says what to do next."""
    if isinstance(error, SandboxUnavailable):
        return error
    text = str(getattr(error, "explanation", None) or error)
    for cause in _chain(error):
        if isinstance(cause, PermissionError):
            return EnginePermission(
                f"the Docker engine is not this user's to use ({host or 'the default socket'}): join the "
                "group docker, use a rootless engine, or point DOCKER_HOST at one that is"
            )
        if isinstance(cause, ConnectionError | FileNotFoundError | TimeoutError):
            return EngineUnavailable(_no_engine(str(cause), host))
    return from_text(text, doing, host, missing=type(error).__name__ in ("ImageNotFound", "NotFound"))


def from_text(text: str, doing: str, host: str | None = None, *, missing: bool = False) -> SandboxUnavailable:
    """A refusal in the engine's words as an error of ours."""
    low = text.lower()
    if "no space left on device" in low or "disk quota exceeded" in low:
        return EngineDiskFull(
            f"the Docker engine could not {doing}: its disk is full. `docker system df` shows what "
            "takes the room, `docker system prune` and `rlm sandboxes prune` make some"
        )
    if "cannot connect to the docker daemon" in low or "error during connect" in low:
        return EngineUnavailable(_no_engine(text, host))
    if missing or "no such image" in low:
        return ImageMissing(f"the Docker engine could not {doing}: {text}")
    if "executable file not found" in low or "no such file or directory" in low:
        return ContainerRefused(
            f"the image has no such program ({text.strip()[-300:]}): it needs a python3, version 3.8 or "
            "later; environment_kwargs={'python': '/path/to/python3'} where it is not on the PATH"
        )
    return ContainerRefused(f"the Docker engine could not {doing}: {text.strip()[-2000:]}")


def _no_engine(reason: str, host: str | None) -> str:
    return (
        f"no Docker engine answers at {host or 'the default socket'} ({reason[:300]}): start it (Docker "
        "Desktop, or `systemctl start docker`), or point DOCKER_HOST at one. environment='local' needs none"
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception, what caused it, and what its arguments hold: how requests and urllib3 nest them."""
    queue, seen = [error], set[int]()
    while queue:
        current = queue.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        linked = [current.__cause__, current.__context__, getattr(current, "reason", None), *current.args]
        queue += [item for item in linked if isinstance(item, BaseException)]
        for item in current.args:
            if isinstance(item, tuple):
                queue += [part for part in item if isinstance(part, BaseException)]


_engines: dict[tuple[int, str | None], Engine] = {}


def shared(host: str | None) -> Engine:
    """This process's engine at that address. Call it on the core's loop."""
    key = (os.getpid(), host if host is not None else os.environ.get("DOCKER_HOST"))
    if key not in _engines:
        _engines[key] = Engine(key[1])
    return _engines[key]

"""Images for sandboxes: from a registry, out of Debian packages, or out of the Python that is running.

The last two need no registry and no builder: their root file system becomes an image archive, which the
engine loads. Nothing in it says when or where it was made, so the same content is the same image, by its id.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from rlm.errors import ConfigError, SandboxUnavailable

from . import engine as engines
from .engine import BUILT_IMAGE
from .pack import EPOCH, pack

Source = Literal["registry", "debian", "interpreter"]
Target = Literal["plain", "science"]

SCIENCE = ("numpy", "pandas", "scipy", "scikit-learn", "sympy", "networkx")
"""What the target ``science`` adds to the standard library."""

CREATED = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(EPOCH))
"""When every image was made. Fixed, since the id is a hash of it among others."""

CHUNK = 1 << 20
"""Bytes read from disk at a time."""

TIMEOUT = 600
"""Seconds that the engine may take over one step, such as unpacking a gigabyte or downloading it."""

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}
"""The engine's name of a machine, where it is not the kernel's."""

_TAG = re.compile(r"([a-zA-Z0-9][\w.-]*(:\d+)?/)?[a-z0-9][a-z0-9._/-]*(:\w[\w.-]{0,127})?", re.ASCII)
"""Perhaps a registry, a name, perhaps a version; the engine knows the finer rules."""

_UNREACHABLE = "`rlm docker build --from interpreter` and `--from debian` need no registry"


@dataclass(frozen=True, slots=True)
class BuiltImage:
    """An image that the engine now has."""

    tag: str
    id: str
    size: int
    """Bytes on the engine's disk."""
    seconds: float
    """What it took."""


def default_source() -> Source:
    """What needs no network, where that can be: in a container a Python of Linux runs, and no other."""
    return "interpreter" if sys.platform == "linux" else "registry"


def build(
    source: Source, tag: str = BUILT_IMAGE, *, target: Target = "plain", packages: Path | None = None
) -> BuiltImage:
    """Make an image and have the engine hold it as ``tag``.

    ``packages`` is a directory of Python packages to add, as ``pip install --target`` makes one. What is
    compiled in it must suit the image's Python: the running one with ``interpreter``, else Debian's.
    """
    _check(source, tag, target, packages)
    started = time.monotonic()
    with engines.connected("build an image", timeout=TIMEOUT) as client:
        if source == "registry":
            _build_from_registry(client, tag, target)
        else:
            _refuse_other_machine(client)
            with _scratch() as folder:
                rootfs = folder / "rootfs.tar"
                _make_rootfs(rootfs, source, target, packages)
                _load(client, rootfs, tag)
        image = client.images.get(tag)
        return BuiltImage(tag, image.id, image.attrs["Size"], time.monotonic() - started)


def recipe(name: str) -> Path:
    """A file of the repository's folder docker/, which an installed package carries along."""
    here = Path(__file__).resolve()
    for folder in (here.parent / "recipes", here.parents[2] / "docker"):
        if (folder / name).is_file():
            return folder / name
    raise SandboxUnavailable(f"{name} is missing from this installation of rlm; install it again")


# --- what can be asked for ------------------------------------------------------------------


def _check(source: Source, tag: str, target: Target, packages: Path | None) -> None:
    if source not in get_args(Source):
        raise ConfigError(f"an image is built from {_one_of(get_args(Source))}, not {source!r}")
    if target not in get_args(Target):
        raise ConfigError(f"the target of an image is {_one_of(get_args(Target))}, not {target!r}")
    if not _TAG.fullmatch(tag):
        raise ConfigError(
            f"{tag!r} is no tag of an image: write NAME or NAME:VERSION, the name in lower case"
        )
    if packages is not None and source == "registry":
        raise ConfigError(
            "packages are added to images of other sources; on top of this one write a Dockerfile that "
            f"begins with FROM {tag} and installs them"
        )
    if packages is not None and not packages.is_dir():
        raise ConfigError(f"packages: there is no directory {str(packages)!r}")
    if source == "interpreter" and target == "science":
        raise ConfigError(
            "an image of the running Python has what you give it: pip install --target DIR "
            f"{' '.join(SCIENCE)}, and then build it with --packages DIR"
        )


def _one_of(choices: tuple[str, ...]) -> str:
    return f"{', '.join(choices[:-1])} or {choices[-1]}"


# --- root file systems ----------------------------------------------------------------------


def _make_rootfs(output: Path, source: Source, target: Target, packages: Path | None) -> None:
    try:
        if source == "interpreter":
            pack(output, packages)
        else:
            _run_recipe(output, target, packages)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise SandboxUnavailable(_full_here()) from error
        raise SandboxUnavailable(f"the root file system could not be made: {error}") from error


def _run_recipe(output: Path, target: Target, packages: Path | None) -> None:
    environment = {**os.environ, "TARGET": target, "PACKAGES": str(packages.resolve()) if packages else ""}
    environment |= {"SOURCE_DATE_EPOCH": str(EPOCH)}
    command = ["sh", str(recipe("base-debian.sh")), str(output)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace", env=environment)
    if done.returncode:
        raise SandboxUnavailable(_why_recipe_failed(done.stderr))


def _why_recipe_failed(said: str) -> str:
    lines = [line for line in said.splitlines() if line.strip()]
    if _is_full(said):
        return _full_here()
    if lines and lines[-1].startswith("base-debian.sh: "):
        return lines[-1].removeprefix("base-debian.sh: ")
    advice = "is a Debian mirror reachable? MIRROR names another one; `--from interpreter` needs no network"
    return "\n".join([f"the Debian packages could not be had or unpacked ({advice}):", *lines[-8:]])


# --- archives -------------------------------------------------------------------------------


def archive(rootfs: Path, tag: str) -> Iterator[bytes]:
    """The image archive, piece by piece, of a root file system in a tar file."""
    diff_id = _digest(rootfs)
    config = configuration(diff_id)
    name, layer = f"{hashlib.sha256(config).hexdigest()}.json", f"{diff_id}.tar"
    manifest = _json([{"Config": name, "RepoTags": [_full_tag(tag)], "Layers": [layer]}])
    yield from _member("manifest.json", manifest)
    yield from _member(name, config)
    size = rootfs.stat().st_size
    yield _header(layer, size)
    with rootfs.open("rb") as file:
        while piece := file.read(CHUNK):
            yield piece
    yield _padding(size) + bytes(2 * tarfile.BLOCKSIZE)


def configuration(diff_id: str) -> bytes:
    """An image's configuration, of which its id is the hash."""
    settings = {
        "Env": [
            "PATH=/usr/local/bin:/usr/bin:/bin",
            "LANG=C.UTF-8",
            "PYTHONDONTWRITEBYTECODE=1",  # there is nowhere to write it, and it is there
        ],
        "Cmd": ["python3"],
        "User": "65534:65534",
        "WorkingDir": "/tmp",
        "Labels": {
            "org.opencontainers.image.title": "rlm-sandbox",
            "org.opencontainers.image.description": "Python for the cells of recursive language models",
        },
    }
    architecture = _architecture()
    return _json(
        {
            "architecture": architecture,
            **({"variant": "v8"} if architecture == "arm64" else {}),
            "os": "linux",
            "created": CREATED,
            "config": settings,
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{diff_id}"]},
            "history": [{"created": CREATED, "created_by": "rlm docker build"}],
        }
    )


def _architecture() -> str:
    machine = platform.machine()
    return _ARCHITECTURES.get(machine, machine)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _full_tag(tag: str) -> str:
    """With the version that the engine would assume."""
    return tag if ":" in tag.rpartition("/")[2] else f"{tag}:latest"


def _member(name: str, data: bytes) -> Iterator[bytes]:
    yield _header(name, len(data)) + data + _padding(len(data))


def _header(name: str, size: int) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mtime = size, EPOCH
    return entry.tobuf(tarfile.GNU_FORMAT)


def _padding(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)


# --- the engine -----------------------------------------------------------------------------


def _is_full(said: str) -> bool:
    return os.strerror(errno.ENOSPC).lower() in said.lower()


def _full_here() -> str:
    return f"there is no room left in {tempfile.gettempdir()}; TMPDIR names another place"


def _refuse_other_machine(client: Any) -> None:
    """What is made here runs here: refuse it to an engine elsewhere that could not run it."""
    version = client.version()
    engine = f"{version['Os']}/{version['Arch']}"
    here = f"{sys.platform}/{_architecture()}"
    if engine != here:
        raise SandboxUnavailable(
            f"the Docker engine runs {engine}, and what is made on this machine is for {here}; "
            "`rlm docker build --from registry` makes an image for the engine"
        )


def _load(client: Any, rootfs: Path, tag: str) -> None:
    client.images.load(archive(rootfs, tag))


def _build_from_registry(client: Any, tag: str, target: Target) -> None:
    docker = engines.sdk()
    try:
        with recipe("sandbox.Dockerfile").open("rb") as file:
            client.images.build(fileobj=file, tag=tag, target=target, rm=True, forcerm=True)
    except docker.errors.DockerException as error:
        if _is_full(str(error)):
            raise
        raise SandboxUnavailable(f"the image could not be built: {error}. {_UNREACHABLE}") from error


@contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="rlm-image-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)

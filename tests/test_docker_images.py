"""Images for sandboxes: what is in them, that the same content is the same image, and what goes wrong."""

from __future__ import annotations

import gc
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import types
import uuid
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from docker_support import second_engine, why_no_engine
from typer.testing import CliRunner

from rlm.errors import ConfigError, SandboxUnavailable
from rlm.testing.sessions import unavailable
from rlm_docker import images
from rlm_docker.commands import app
from rlm_docker.engine import BUILT_IMAGE
from rlm_docker.errors import EngineDiskFull
from rlm_docker.images import BuiltImage, archive, build, recipe
from rlm_docker.pack import pack

REPOSITORY = Path(__file__).parents[1]

HARDENED = (
    *(
        "--pull",
        "never",
        "--network",
        "none",
        "--log-driver",
        "none",
        "--read-only",
        "--tmpfs",
        "/tmp:size=64m",
    ),
    *(
        "--cap-drop",
        "ALL",
        "--security-opt",
        "no-new-privileges",
        "--pids-limit",
        "64",
        "--user",
        "65534:65534",
    ),
)
"""How sandboxes are started."""

STANDARD = (
    "import asyncio, bz2, ctypes, curses, decimal, hashlib, json, lzma, multiprocessing, readline, socket, \
sqlite3, ssl, unicodedata, uuid, zlib, zoneinfo"
)

NewTag = Callable[[], str]


@pytest.fixture(scope="module")
def new_tag() -> Iterator[NewTag]:
    """Names for images, none of which is left."""
    if reason := why_no_engine():
        unavailable(reason)
    made = list[str]()

    def new() -> str:
        made.append(f"rlm-test-{uuid.uuid4().hex}:latest")
        return made[-1]

    yield new
    for tag in made:
        subprocess.run(["docker", "rmi", "--force", tag], capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packages as ``pip install --target`` leaves them, one file of which is for another Python."""
    folder = tmp_path_factory.mktemp("packages")
    (folder / "extra").mkdir()
    (folder / "extra" / "__init__.py").write_text("ANSWER = 42\n")
    (folder / "extra" / "old.py").write_text("print 'two'\n")
    return folder


@pytest.fixture(scope="module")
def packed(new_tag: NewTag, packages: Path) -> BuiltImage:
    """An image of the running Python."""
    return build("interpreter", new_tag(), packages=packages)


def run(image: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a container like a sandbox."""
    return subprocess.run(
        ["docker", "run", "--rm", *HARDENED, image, *command], capture_output=True, text=True, timeout=120
    )


def output(image: str, *command: str) -> str:
    done = run(image, *command)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_sandbox(image: str) -> None:
    """What every image is to have, whatever it was made from."""
    python = output(image, "python3", "-I", "-c", f"{STANDARD}; import sys; print(sys.version_info.major)")
    assert python == "3"
    assert output(image, "python", "-c", "print(1)") == "1"
    assert output(image, "sh", "-c", "echo some text | wc -w") == "2"
    place = "import os, tempfile; print(os.getuid(), os.getcwd(), tempfile.mkdtemp()[:5])"
    assert output(image, "python3", "-c", place) == "65534 /tmp /tmp/"
    assert output(image, "python3", "-c", "import os, pwd; print(pwd.getpwuid(os.getuid())[0])") == "nobody"
    assert (
        output(image, "python3", "-c", "import zoneinfo as z; print(z.ZoneInfo('Europe/Berlin'))")
        == "Europe/Berlin"
    )
    check_compiled(image)


def check_compiled(image: str) -> None:
    """Nothing is compiled at a start: all code comes out of compiled files."""
    said = run(image, "python3", "-v", "-c", STANDARD).stderr
    sources = re.findall(r"code object from '?([^'\n]+)", said)
    assert len(sources) > 50
    assert [source for source in sources if not source.endswith(".pyc")] == []


# --- out of the running Python ----------------------------------------------------------------


def test_running_python_is_an_image(packed: BuiltImage) -> None:
    check_sandbox(packed.tag)
    version = output(packed.tag, "python3", "-c", "import sys; print(sys.version)")
    assert version == sys.version
    assert packed.id.startswith("sha256:")
    assert 20e6 < packed.size < 400e6


def test_nothing_of_this_machine_is_looked_for(packed: BuiltImage) -> None:
    where = output(
        packed.tag, "python3", "-I", "-c", "import sys; print(sys.prefix, sys.exec_prefix, *sys.path)"
    )
    assert all(path.startswith("/usr/local") for path in where.split())


def test_packages_can_be_imported(packed: BuiltImage) -> None:
    code = "import extra, os; print(extra.ANSWER, os.path.exists(extra.__cached__))"
    assert output(packed.tag, "python3", "-I", "-c", code) == "42 True"


def test_settings_of_an_image(packed: BuiltImage) -> None:
    done = subprocess.run(
        ["docker", "inspect", packed.tag], capture_output=True, text=True, timeout=60, check=True
    )
    (image,) = json.loads(done.stdout)
    assert image["Created"] == images.CREATED
    assert image["Config"]["User"] == "65534:65534"
    assert image["Config"]["WorkingDir"] == "/tmp"
    assert image["Config"]["Cmd"] == ["python3"]
    assert "LANG=C.UTF-8" in image["Config"]["Env"]


def test_same_python_is_the_same_image(
    packed: BuiltImage, new_tag: NewTag, packages: Path, tmp_path: Path
) -> None:
    again = build("interpreter", new_tag(), packages=packages)
    assert again.id == packed.id
    command = (
        "import sys; from pathlib import Path; from rlm_docker.pack import pack; pack(Path(sys.argv[1]))"
    )
    subprocess.run(  # another process, with another hash seed and another locale
        [sys.executable, "-c", command, str(tmp_path / "there.tar")],
        env={**os.environ, "PYTHONHASHSEED": "7", "LC_ALL": "C", "TZ": "Asia/Tokyo"},
        timeout=120,
        check=True,
    )
    pack(tmp_path / "here.tar")
    assert digest(tmp_path / "here.tar") == digest(tmp_path / "there.tar")


def test_rootfs_holds_no_time_and_no_owner(tmp_path: Path) -> None:
    pack(tmp_path / "rootfs.tar")
    with tarfile.open(tmp_path / "rootfs.tar") as archived:
        members = archived.getmembers()
    assert {(member.mtime, member.uid, member.gid, member.uname) for member in members} == {
        (315532800, 0, 0, "")
    }
    names = [member.name for member in members]
    assert names == sorted(names)
    assert not [name for name in names if "/test/" in name or "site-packages/rlm" in name]
    assert next(member.mode for member in members if member.name == "tmp") == 0o1777


def test_links_among_packages_are_followed(tmp_path: Path) -> None:
    real, linked, folder = tmp_path / "real.py", tmp_path / "store", tmp_path / "packages"
    real.write_text("HERE = True\n")
    (linked / "inner").mkdir(parents=True)
    (linked / "inner" / "module.py").write_text("")
    (linked / "inner" / "round").symlink_to(linked)
    folder.mkdir()
    (folder / "module.py").symlink_to(real)
    (folder / "package").symlink_to(linked)
    (folder / "dangling").symlink_to("nowhere")
    pack(tmp_path / "rootfs.tar", folder)
    with tarfile.open(tmp_path / "rootfs.tar") as archived:
        names = [name.partition("-packages/")[2] for name in archived.getnames() if "-packages/" in name]
        kinds = {member.name.partition("-packages/")[2]: member.isfile() for member in archived}
    assert {name for name in names if kinds[name] and name.endswith(".py")} == {
        "module.py",
        "package/inner/module.py",
    }
    assert "dangling" not in names


# --- out of Debian packages -------------------------------------------------------------------


def test_debian_packages_are_an_image(new_tag: NewTag, tmp_path: Path, packages: Path) -> None:
    if shutil.which("mmdebstrap") is None:
        unavailable("mmdebstrap is not installed")
    tag = new_tag()
    image = build("debian", tag, packages=packages)
    check_sandbox(tag)
    assert output(tag, "python3", "-I", "-c", "import extra; print(extra.ANSWER)") == "42"
    trusted = "import ssl; print(ssl.create_default_context().cert_store_stats()['x509_ca'] > 50)"
    assert output(tag, "python3", "-c", trusted) == "True"
    again = tmp_path / "again.tar"
    environment = {
        **os.environ,
        "PACKAGES": str(packages),
        "PYTHONHASHSEED": "7",
        "TZ": "Asia/Tokyo",
        "LANG": "C",
    }
    command = ["sh", str(recipe("base-debian.sh")), str(again)]
    subprocess.run(command, env=environment, timeout=300, check=True)
    config = images.configuration(digest(again))
    assert f"sha256:{hashlib.sha256(config).hexdigest()}" == image.id


def test_without_mmdebstrap_the_recipe_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sh", "uname"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        SandboxUnavailable, match=r"^mmdebstrap is not installed; get it with: sudo apt-get install"
    ):
        images._run_recipe(tmp_path / "rootfs.tar", "plain", None)


def test_recipe_that_fails_passes_on_what_was_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "mmdebstrap"
    program.write_text("#!/bin/sh\necho 'E: nothing answers' >&2\nexit 25\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(SandboxUnavailable, match=r"(?s)mirror reachable.*E: nothing answers"):
        images._run_recipe(tmp_path / "rootfs.tar", "plain", None)
    assert not list(tmp_path.glob("rootfs*"))


# --- from a registry --------------------------------------------------------------------------


def test_dockerfile_builds_a_sandbox(
    packed: BuiltImage, new_tag: NewTag, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its steps, on a base that is here: none of this needs the registry but the base."""
    text = recipe("sandbox.Dockerfile").read_text()
    base = "FROM python:${PYTHON}-slim AS plain"
    assert base in text
    (tmp_path / "sandbox.Dockerfile").write_text(text.replace(base, f"FROM {packed.tag} AS plain\nUSER 0:0"))
    monkeypatch.setattr(images, "recipe", lambda name: tmp_path / name)
    tag = new_tag()
    assert build("registry", tag).tag == tag
    check_sandbox(tag)


def test_registry_that_cannot_be_reached(
    new_tag: NewTag, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sandbox.Dockerfile").write_text("FROM localhost:1/nothing AS plain\n")
    monkeypatch.setattr(images, "recipe", lambda name: tmp_path / name)
    with pytest.raises(SandboxUnavailable, match="--from interpreter` and `--from debian` need no registry"):
        build("registry", new_tag())


# --- archives ---------------------------------------------------------------------------------


def small_rootfs(folder: Path) -> Path:
    path = folder / "rootfs.tar"
    with tarfile.open(path, "w") as layer:
        layer.addfile(tarfile.TarInfo("empty"))
    return path


def test_archive_says_nothing_of_when_and_where(tmp_path: Path) -> None:
    rootfs = small_rootfs(tmp_path)
    data = b"".join(archive(rootfs, "name"))
    assert data == b"".join(archive(rootfs, "name"))
    with tarfile.open(fileobj=io.BytesIO(data)) as opened:
        files = {member.name: opened.extractfile(member).read() for member in opened}  # type: ignore[union-attr]
    (entry,) = json.loads(files["manifest.json"])
    assert entry["RepoTags"] == ["name:latest"]
    config = files[entry["Config"]]
    assert entry["Config"] == f"{hashlib.sha256(config).hexdigest()}.json"
    settings = json.loads(config)
    assert settings["created"] == "1980-01-01T00:00:00Z"
    assert {step["created"] for step in settings["history"]} == {settings["created"]}
    (layer,) = (files[name] for name in entry["Layers"])
    assert layer == rootfs.read_bytes()
    assert settings["rootfs"]["diff_ids"] == [f"sha256:{hashlib.sha256(layer).hexdigest()}"]


@pytest.mark.parametrize(
    ("tag", "full"),
    [
        ("a", "a:latest"),
        ("a:1", "a:1"),
        ("host:5000/a", "host:5000/a:latest"),
        ("host:5000/a/b:v-1.2", "host:5000/a/b:v-1.2"),
    ],
)
def test_tags(tag: str, full: str) -> None:
    images._check("interpreter", tag, "plain", None)
    assert images._full_tag(tag) == full


@pytest.mark.parametrize(
    ("machine", "architecture"),
    [("x86_64", "amd64"), ("aarch64", "arm64"), ("ppc64le", "ppc64le")],
)
def test_architectures(machine: str, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert json.loads(images.configuration("0" * 64))["architecture"] == architecture


# --- what cannot be asked for, and what goes wrong --------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "pypi"}, "registry, debian or interpreter, not 'pypi'"),
        ({"target": "large"}, "plain or science, not 'large'"),
        ({"tag": "No Tag"}, "no tag of an image"),
        ({"tag": "--privileged"}, "no tag of an image"),
        ({"tag": ""}, "no tag of an image"),
        ({"packages": Path("/nowhere")}, "no directory '/nowhere'"),
        ({"packages": Path("/"), "source": "registry"}, "begins with FROM"),
        ({"target": "science"}, "pip install --target DIR numpy"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        build(**{"source": "interpreter", "tag": "name", **arguments})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the SDK leaks a socket
def test_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    with pytest.raises(SandboxUnavailable, match=r"no Docker engine answers .*DOCKER_HOST"):
        build("interpreter", "name")
    gc.collect()  # the socket, here and not in another test


def test_folder_docker_is_not_taken_for_the_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "docker", types.ModuleType("docker"))
    with pytest.raises(SandboxUnavailable, match=re.escape("pip install 'rlm[docker]'")):
        build("interpreter", "name")


def test_no_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "docker", None)
    with pytest.raises(SandboxUnavailable, match=re.escape("pip install 'rlm[docker]'")):
        build("interpreter", "name")


def test_an_engine_whose_disk_is_full_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with second_engine(disk="24m") as small:
        monkeypatch.setenv("DOCKER_HOST", small.host)
        with pytest.raises(EngineDiskFull, match="docker system prune"):
            build("interpreter", "rlm-img-test:too-large")


def test_full_disk_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(images, "pack", fill)
    with pytest.raises(SandboxUnavailable, match="TMPDIR"):
        build("interpreter", "name")


def test_engine_of_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_architecture", lambda: "riscv64")
    with pytest.raises(SandboxUnavailable, match=r"is for linux/riscv64.*--from registry"):
        build("interpreter", "name")


def test_elsewhere_than_on_linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert images.default_source() == "registry"
    with pytest.raises(SandboxUnavailable, match="only a Python of Linux can be packed"):
        pack(tmp_path / "rootfs.tar")


def test_other_c_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "confstr", lambda name: None)
    with pytest.raises(SandboxUnavailable, match="GNU C library"):
        pack(tmp_path / "rootfs.tar")


# --- recipes and the command ------------------------------------------------------------------


def test_recipes_in_a_checkout() -> None:
    assert recipe("base-debian.sh") == REPOSITORY / "docker" / "base-debian.sh"
    assert recipe("sandbox.Dockerfile") == REPOSITORY / "docker" / "sandbox.Dockerfile"
    with pytest.raises(SandboxUnavailable, match="install it again"):
        recipe("nothing")


def test_recipes_in_a_wheel(tmp_path: Path) -> None:
    build_it = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build_it, cwd=REPOSITORY, capture_output=True, timeout=120, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        "from rlm_docker.images import recipe; print(recipe('base-debian.sh'), recipe('sandbox.Dockerfile'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(site)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    recipes = site / "rlm_docker" / "recipes"
    assert done.stdout.split() == [str(recipes / "base-debian.sh"), str(recipes / "sandbox.Dockerfile")]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the command asks to be built; nothing is."""
    calls = list[Any]()

    def fake(source: str, tag: str, **settings: Any) -> BuiltImage:
        calls.append((source, tag, settings))
        return BuiltImage(tag, "sha256:abc", 56_000_000, 2.51)

    monkeypatch.setattr(images, "build", fake)
    return calls


def test_command_builds_the_default_image(asked: list[Any]) -> None:
    done = CliRunner().invoke(app, ["build"], catch_exceptions=False)
    assert done.exit_code == 0
    assert asked == [(images.default_source(), BUILT_IMAGE, {"target": "plain", "packages": None})]
    assert "rlm-sandbox:latest  sha256:abc" in done.output
    assert "56 MB" in done.output
    assert 'RLM(environment="docker")' in done.output


def test_command_builds_another_image(asked: list[Any], tmp_path: Path) -> None:
    arguments = ["build", "--from", "debian", "--tag", "mine", "--science", "--packages", str(tmp_path)]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert asked == [("debian", "mine", {"target": "science", "packages": tmp_path})]
    assert 'RLM(environment="docker", environment_kwargs={"image": "mine"})' in done.output


def test_command_refuses_as_the_library_does() -> None:
    with pytest.raises(ConfigError, match="not 'pypi'"):
        CliRunner().invoke(app, ["build", "--from", "pypi"], catch_exceptions=False)


def test_command_costs_no_import_of_the_sdk() -> None:
    code = "import sys, rlm_docker.commands, rlm_docker.images; print('docker' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "False"

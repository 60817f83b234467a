"""A root file system made of the Python that is running, with no network, no root and no tool but ldd.

The interpreter below a virtual environment moves to /usr/local, its standard library compiled: wherever it
was before, it finds itself there. Shared libraries all go where the C library is, which is where the loader
looks when what a program says (a pyenv's absolute RPATH, say) leads nowhere. Same input, same bytes.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from rlm.errors import ConfigError, SandboxUnavailable

EPOCH = 315532800
"""The time of every file: 1980, the first that zip files can tell."""

PREFIX = PurePosixPath("usr/local")

LEFT_OUT = {"__pycache__", "site-packages", "dist-packages", "test", "tests"}
"""Folders of the standard library that no cell needs, or that are not part of it."""

LEFT_OUT_AT_TOP = {"ensurepip", "idlelib", "tkinter", "turtledemo"}

WANTED = (
    *("libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1", "libutil.so.1"),
    *(
        "libresolv.so.2",
        "libnss_files.so.2",
        "libnss_dns.so.2",
        "libgcc_s.so.1",
        "libstdc++.so.6",
        "libz.so.1",
    ),
)
"""Libraries that wheels link to and every distribution has; the C library's old parts are stubs by now."""

TOOLS = (
    *(
        "awk",
        "basename",
        "cat",
        "cp",
        "cut",
        "date",
        "diff",
        "dirname",
        "env",
        "find",
        "grep",
        "gzip",
        "head",
        "ls",
    ),
    *(
        "mkdir",
        "mv",
        "rm",
        "rmdir",
        "sed",
        "sleep",
        "sort",
        "tail",
        "tar",
        "tee",
        "touch",
        "tr",
        "uniq",
        "wc",
        "xargs",
    ),
)
"""What the shell has at hand where there is no busybox."""

SHARDS = 4
"""Processes that compile. A constant: what is compiled together shows in the bytes."""

FILES = {
    "etc/passwd": b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/tmp:/bin/sh\n",
    "etc/group": b"root:x:0:\nnogroup:x:65534:\n",
    "etc/nsswitch.conf": b"passwd: files\ngroup: files\nhosts: files dns\n",
}

_PROBE = """
import ctypes, json, os, site, sys
def where(name):
    RTLD_DI_LINKMAP = 2
    handle, entry = ctypes.CDLL(name)._handle, ctypes.POINTER(ctypes.c_void_p * 2)()
    ctypes.CDLL(None).dlinfo(ctypes.c_void_p(handle), RTLD_DI_LINKMAP, ctypes.byref(entry))
    return os.fsdecode(ctypes.string_at(entry[0][1]))
found = {}
for name in sys.argv[2:]:
    try:
        found[name] = where(name)
    except OSError:
        pass
print(json.dumps({
    "executable": os.path.realpath(sys.executable),
    "version": "%d.%d" % sys.version_info[:2],
    "stdlib": os.path.dirname(os.path.realpath(os.__file__)),
    "cache_tag": sys.implementation.cache_tag,
    "platlib": sys.platlibdir,
    "site": site.getsitepackages([sys.argv[1]])[0],
    "libraries": found,
}))
"""

_COMPILE = """
import json, py_compile, sys
for source, target, name in json.load(sys.stdin):
    try:
        py_compile.compile(source, target, name, True, -1, py_compile.PycInvalidationMode.UNCHECKED_HASH)
    except (py_compile.PyCompileError, UnicodeError, ValueError, RecursionError):
        pass  # packages carry templates, and code for other versions
"""


def pack(output: Path, packages: Path | None = None) -> None:
    """Write the root file system to ``output``; what is in ``packages`` can be imported in it."""
    _refuse_elsewhere()
    if packages is not None and not packages.is_dir():
        raise ConfigError(f"packages: there is no directory {str(packages)!r}")
    python = _probe()
    tree = _Tree()
    stdlib = PREFIX / python.platlib / f"python{python.version}"
    _add_python(tree, python, stdlib)
    if packages is not None:
        tree.copy(
            packages, PurePosixPath(python.site.lstrip("/")), at_top={"__pycache__"}, below={"__pycache__"}
        )
    _add_shell(tree)
    _add_zones(tree)
    _add_libraries(tree, python)
    for name, data in FILES.items():
        tree.data[name] = data
    with tempfile.TemporaryDirectory(prefix="rlm-pack-") as scratch:
        _compile(tree, python, Path(scratch))
        _write(tree, output)


def _refuse_elsewhere() -> None:
    if sys.platform != "linux":
        raise SandboxUnavailable(f"only a Python of Linux can be packed, and this is one of {sys.platform}")
    try:
        libc = os.confstr("CS_GNU_LIBC_VERSION")
    except (ValueError, OSError):
        libc = None
    if not libc:
        raise SandboxUnavailable(
            "only a Python on the GNU C library can be packed, and this one is on another"
        )
    if shutil.which("ldd") is None:
        raise SandboxUnavailable(
            "ldd is not there to tell what libraries Python needs: install libc-bin or glibc"
        )


# --- what there is --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Python:
    """The interpreter to pack, as it describes itself."""

    executable: str
    version: str
    stdlib: str
    cache_tag: str
    """What the names of byte code have in them."""
    platlib: str
    """``lib``, or ``lib64`` where the distribution has it so; built into the interpreter."""
    site: str
    """Where it will look for packages."""
    libraries: dict[str, str]
    """The wanted libraries and their files, as the loader found them."""


def _probe() -> _Python:
    """Ask the interpreter below the virtual environment."""
    executable = getattr(sys, "_base_executable", None) or sys.executable
    arguments = ["-I", "-S", "-c", _PROBE, f"/{PREFIX}", *WANTED]
    try:
        python = _Python(**json.loads(_run([executable, *arguments])))
    except (OSError, ValueError, SandboxUnavailable) as error:
        raise SandboxUnavailable(f"the Python to pack, {executable!r}, does not start: {error}") from error
    if not os.path.isfile(os.path.join(python.stdlib, "os.py")):
        raise SandboxUnavailable(f"the standard library in {python.stdlib!r} is not made of files")
    return python


def _run(command: list[str], given: str = "") -> str:
    """Run a program of this machine, with nothing in its environment that changes what it does."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LD_PRELOAD"))
    }
    environment = {**kept, "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0"}
    done = subprocess.run(
        command, input=given, capture_output=True, encoding="utf-8", errors="surrogateescape", env=environment
    )
    if done.returncode:
        raise SandboxUnavailable(f"{command[0]} failed: {done.stderr.strip() or done.returncode}")
    return done.stdout


class _Tree:
    """What goes into the image, by name: files of this machine, data, and links."""

    def __init__(self) -> None:
        self.files: dict[str, Path] = {}
        self.data: dict[str, bytes] = {}
        self.links: dict[str, str] = {name: f"usr/{name}" for name in ("bin", "lib", "lib64", "sbin")}
        self.programs: set[str] = set()
        self.compiled: dict[str, Path] = {}
        """Sources to compile, by the name in the image."""

    def copy(self, source: Path, target: PurePosixPath, *, at_top: set[str], below: set[str]) -> None:
        """Take a directory, links followed, without the folders named."""
        for path, name in _walk(source, at_top, below):
            self.files[str(target / name)] = path
            if path.suffix == ".py":
                self.compiled[str(target / name)] = path

    def add_program(self, path: str, name: str) -> None:
        """Take a program."""
        self.files[name] = Path(path)
        self.programs.add(name)


def _walk(source: Path, at_top: set[str], below: set[str]) -> Iterator[tuple[Path, PurePosixPath]]:
    """Every file below ``source`` and its relative name; no directory twice."""
    seen = set[str]()
    for folder, folders, names in os.walk(source, followlinks=True):
        real = os.path.realpath(folder)
        left_out = at_top | below if folder == str(source) else below
        folders[:] = [] if real in seen else sorted(name for name in folders if name not in left_out)
        if real in seen:
            continue
        seen.add(real)
        relative = PurePosixPath(os.path.relpath(folder, source))
        for name in names:
            path = Path(folder, name)
            if path.is_file():  # not a dangling link, nor a socket
                yield path, relative / name


# --- what is taken --------------------------------------------------------------------------


def _add_python(tree: _Tree, python: _Python, stdlib: PurePosixPath) -> None:
    source = Path(python.stdlib)
    built = {
        path.name for path in source.glob("config-*")
    }  # what extensions are linked with: tens of megabytes
    tree.copy(source, stdlib, at_top=LEFT_OUT_AT_TOP | built, below=LEFT_OUT)
    for name in [
        name
        for name in tree.files
        if PurePosixPath(name).name.startswith(("_tkinter.", "_test", "_ctypes_test."))
    ]:
        if name.endswith(".so"):  # they would bring a window system, or are for the tests
            del tree.files[name]
    tree.add_program(python.executable, f"{PREFIX}/bin/python{python.version}")
    tree.links[f"{PREFIX}/bin/python3"] = f"python{python.version}"
    tree.links[f"{PREFIX}/bin/python"] = "python3"


def _add_shell(tree: _Tree) -> None:
    """busybox where there is one, else the shell of this machine and a few tools."""
    busybox = shutil.which("busybox")
    if busybox is not None:
        tree.add_program(busybox, "usr/bin/busybox")
        for name in _run([busybox, "--list"]).split():
            if name != "busybox":
                tree.links[f"usr/bin/{name}"] = "busybox"
        return
    shell = shutil.which("dash") or shutil.which("sh")
    if shell is not None:
        tree.add_program(shell, "usr/bin/sh")
    taken = dict[str, str]()
    for name in TOOLS:
        path = shutil.which(name)
        if path is None:
            continue
        first = taken.setdefault(os.path.realpath(path), name)
        if first == name:
            tree.add_program(path, f"usr/bin/{name}")
        else:  # one program under many names
            tree.links[f"usr/bin/{name}"] = first


def _add_zones(tree: _Tree) -> None:
    zones = Path("/usr/share/zoneinfo")
    if zones.is_dir():
        tree.copy(zones, PurePosixPath("usr/share/zoneinfo"), at_top={"posix", "right"}, below=set())
        tree.files.pop("usr/share/zoneinfo/localtime", None)  # where this machine is


def _add_libraries(tree: _Tree, python: _Python) -> None:
    """What everything taken so far is linked to, and what wheels will be."""
    own = {os.path.realpath(path) for path in tree.files.values()}
    binaries = [str(path) for name, path in tree.files.items() if _is_binary(name, tree)]
    linked, loader = _linked(sorted({*binaries, *python.libraries.values()}))
    libraries = {**python.libraries, **linked}
    place = os.path.dirname(libraries.get("libc.so.6", "/usr/lib/libc.so.6"))
    for name, path in libraries.items():
        if os.path.realpath(path) not in own:  # a wheel's own libraries stay where it looks for them
            tree.files[_merged(f"{place}/{name}")] = Path(path)
    if loader:
        tree.add_program(loader, _merged(loader))


def _is_binary(name: str, tree: _Tree) -> bool:
    return name in tree.programs or ".so" in PurePosixPath(name).suffixes


def _linked(paths: list[str]) -> tuple[dict[str, str], str]:
    """The libraries that these files load, by the name they ask for, and the loader."""
    found, loader = dict[str, str](), ""
    # ldd fails for a file that is linked to nothing, and says so in the middle of the others.
    command = ["ldd", *paths]
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env={**environment, "LC_ALL": "C"})
    for line in done.stdout.splitlines():
        words = line.split()
        if not line.startswith("\t") or not words:
            continue
        if len(words) >= 3 and words[1] == "=>" and words[2].startswith("/"):
            if words[0].startswith("/"):
                loader = words[0]
            else:
                found.setdefault(words[0], words[2])
        elif words[0].startswith("/"):
            loader = words[0]
    return found, loader


def _merged(path: str) -> str:
    """The name in the image of an absolute path of this machine: /lib is a link to /usr/lib there."""
    name = os.path.normpath(path).lstrip("/")
    return f"usr/{name}" if name.split("/")[0] in ("bin", "lib", "lib64", "sbin") else name


# --- how it is written ----------------------------------------------------------------------


def _compile(tree: _Tree, python: _Python, scratch: Path) -> None:
    """Add the byte code of every source. A read-only image without it compiles at every start: half a second.

    What the compiling process has in memory shows in the bytes, so fresh ones do it, each with a fixed share.
    """
    work = []
    for number, (name, source) in enumerate(sorted(tree.compiled.items())):
        path = PurePosixPath(name)
        target = scratch / f"{number}.pyc"
        work.append((str(source), str(target), f"/{name}"))
        tree.files[str(path.parent / "__pycache__" / f"{path.stem}.{python.cache_tag}.pyc")] = target
    command = [python.executable, "-S", "-s", "-P", "-W", "ignore", "-c", _COMPILE]
    with ThreadPoolExecutor(min(SHARDS, os.cpu_count() or 1)) as pool:
        list(pool.map(lambda shard: _run(command, json.dumps(work[shard::SHARDS])), range(SHARDS)))


def _write(tree: _Tree, output: Path) -> None:
    entries: dict[str, Any] = {**tree.links, **tree.data, **tree.files}
    folders = {str(parent) for name in entries for parent in PurePosixPath(name).parents} - {"."}
    folders |= {
        "dev",
        "home",
        "proc",
        "root",
        "run",
        "sys",
        "tmp",
        "usr/lib",
        "usr/lib64",
        "usr/sbin",
        "var",
        "var/tmp",
    }
    with tarfile.open(output, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in sorted(folders | set(entries)):
            entry = tarfile.TarInfo(name)
            entry.mtime = EPOCH
            if name in folders:
                entry.type = tarfile.DIRTYPE
                entry.mode = 0o1777 if name in ("tmp", "var/tmp") else 0o755
                archive.addfile(entry)
            elif name in tree.links:
                entry.type, entry.linkname, entry.mode = tarfile.SYMTYPE, tree.links[name], 0o777
                archive.addfile(entry)
            elif name in tree.data:
                entry.size = len(tree.data[name])
                archive.addfile(entry, io.BytesIO(tree.data[name]))
            elif (path := tree.files[name]).exists():  # not every source compiles
                with path.open("rb") as file:
                    entry.size = os.fstat(file.fileno()).st_size
                    entry.mode = 0o755 if name in tree.programs or ".so" in path.suffixes else 0o644
                    archive.addfile(entry, file)

"""How the worker comes up inside a sandbox that is reached by a stream alone.

A launcher starts any ``python3`` with `COMMAND` and writes `payload` to its standard
input: this file's source, then the files that travel and the worker's options. Nothing
is installed there, mounted or written to a disk. The rest of the stream, both ways, is
the worker's.

Standard library only, CPython 3.8 and later: the lower half of this file travels too.
"""

from __future__ import annotations

import functools
import gc
import json
import marshal
import os
import sys
import types
from importlib.util import MAGIC_NUMBER
from typing import Any, NoReturn

MODULES = ("wire", "lockdown", "worker")
"""The files that travel, in the order in which they import one another."""

COMMAND = (
    "-I", "-B", "-c",
    "import os, sys\n"
    "sys.version_info >= (3, 8) or sys.exit('Python 3.8 or later is needed, this is ' + sys.version)\n"
    "def read(size):\n"
    "    data = b''\n"
    "    while len(data) < size:\n"
    "        more = os.read(0, size - len(data))\n"
    "        more or os._exit(0)\n"
    "        data += more\n"
    "    return data\n"
    "def part(): return read(int.from_bytes(read(4), 'big'))\n"
    "exec(compile(part(), 'rlm/boot.py', 'exec'))\n"
    "boot(part)\n",
)  # fmt: skip
"""Arguments for ``python3``."""


def payload(options: dict[str, Any]) -> bytes:
    """What the launcher writes first. ``options`` are the worker's, and nothing secret is among them."""
    boot, *files = _files()
    parts = [boot, json.dumps(options).encode(), MAGIC_NUMBER, *files]
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


@functools.lru_cache(maxsize=None)
def _files() -> list[bytes]:
    """This file's source, then of each that travels the source and, compiled, the code."""
    from pathlib import Path  # here, not above: a sandbox has no need of it

    parts = [Path(__file__).read_bytes()]
    for name in MODULES:
        source = Path(__file__).with_name(f"{name}.py").read_bytes()
        # not the compiled file beside it: that holds this machine's paths
        parts += [source, marshal.dumps(compile(source, f"rlm/{name}.py", "exec", dont_inherit=True))]
    return parts


def install(codes: dict[str, types.CodeType]) -> types.ModuleType:
    """Run the files that travel as modules of a package ``rlm`` that cells cannot import."""
    package = types.ModuleType("rlm")
    package.__path__ = []
    sys.modules["rlm"] = package
    for name in MODULES:
        module = types.ModuleType(f"rlm.{name}")
        module.__file__ = codes[name].co_filename
        sys.modules[module.__name__] = module
        setattr(package, name, module)
        exec(codes[name], module.__dict__)
    worker = sys.modules["rlm.worker"]
    for name in ("rlm", *(f"rlm.{name}" for name in MODULES)):
        del sys.modules[name]  # a cell's `import rlm` is its own affair
    return worker


def boot(part: Any) -> NoReturn:
    """In the sandbox: read the files, and become the worker on standard input and output."""
    options = json.loads(part())
    same_version = part() == MAGIC_NUMBER  # else the compiled form is of no use here
    codes = {}
    for name in MODULES:
        source, compiled = part(), part()
        filename = f"rlm/{name}.py"
        codes[name] = marshal.loads(compiled) if same_version else compile(source, filename, "exec")
    worker = install(codes)
    del codes, source, compiled
    gc.collect()
    gc.freeze()  # a collection in a fork then leaves the pages of all this shared
    reader, writer = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)
    worker.serve(reader, writer, None, options)
    raise AssertionError("serve does not return")

"""What tests share of servers that nobody here wrote: each runs in a process that ends with this one."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
PATIENCE = 30.0


@contextlib.contextmanager
def served(command: Sequence[str], folder: Path) -> Iterator[tuple[str, int]]:
    """Where a server is to be found, which is the first line it prints, and its process.

    It is to end when its standard input does, as that happens however this process ends.
    """
    with tempfile.TemporaryFile() as log:
        pipe = subprocess.PIPE
        with subprocess.Popen(command, cwd=folder, stdin=pipe, stdout=pipe, stderr=log) as process:
            assert process.stdin is not None and process.stdout is not None
            try:
                address = process.stdout.readline().decode().strip()
                if not address:
                    log.seek(0)
                    raise RuntimeError(
                        f"{command} did not start: {log.read()[-3000:].decode(errors='replace')}"
                    )
                yield address, process.pid
            finally:
                process.stdin.close()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(PATIENCE)
                process.kill()


@dataclass(frozen=True)
class Answer:
    """What came back, an error or not."""

    status: int
    headers: Message
    body: bytes

    @property
    def json(self) -> Any:
        """The body as data."""
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The data of a stream's events, but for the word that ends it."""
        lines = self.body.decode().splitlines()
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        return [json.loads(line) for line in data if line != "[DONE]"]


def ask(url: str, body: object = None, *, method: str | None = None) -> Answer:
    """A GET, or a POST of a body as JSON. Raises OSError where nothing comes back."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(url, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            return Answer(response.status, response.headers, response.read())
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, error.headers, error.read())


ORPHAN = """
import {module}
with {module}.{server}() as server:
    print(server.pid, flush=True)
    input()
"""


def orphaned(module: str, server: str, folder: Path) -> int:
    """The process of a server whose parent was killed, and which had a folder for what is temporary."""
    command = [sys.executable, "-c", ORPHAN.format(module=module, server=server)]
    pipe, env = subprocess.PIPE, {**os.environ, "TMPDIR": str(folder)}
    with subprocess.Popen(command, cwd=TESTS, env=env, stdin=pipe, stdout=pipe) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    return pid

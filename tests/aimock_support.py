"""What tests share of aimock: other providers' protocols, by someone who read them independently of us."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from server_support import Answer, ask, served

from rlm.testing.sessions import unavailable

FOLDER = Path(__file__).with_name("aimock")
LOCK = FOLDER / "package-lock.json"
INSTALLED = FOLDER / "node_modules" / ".package-lock.json"
"""What npm has installed: it writes this last."""

Fault = Literal["dropRate", "malformedRate", "rateLimitRate", "disconnectRate"]


class Aimock:
    """A running aimock, which answers what a test has taught it, and 404 to anything else."""

    def __init__(self, root: str, pid: int) -> None:
        self.root = root
        """For Anthropic's and Gemini's own clients, which add /v1 and /v1beta."""
        self.openai = f"{root}/v1"
        self.gemini_openai = f"{root}/v1beta/openai"
        """Gemini in OpenAI's shape."""
        self.openrouter = f"{root}/api/v1"
        """The one whose usage tells cached tokens."""
        self.pid = pid

    def teach(self, prompt: str, response: dict[str, Any], *, match: Any = None, **settings: Any) -> None:
        """One response to whatever has ``prompt`` in its last message from the user.

        ``match`` are further fields that a request has to fit; ``settings`` are the fixture's others, such
        as ``chunkSize``, ``latency`` (ms between chunks) and ``disconnectAfterMs`` of a stream.
        """
        entry = {"match": {"userMessage": prompt, **(match or {})}, "response": response, **settings}
        self._control("/fixtures", {"fixtures": [entry]})

    def reply(self, prompt: str, *texts: str, **overrides: Any) -> None:
        """Answer a prompt with a text every time, or with several, in turn and once each.

        ``overrides`` are for all protocols: ``usage``, ``finishReason``, ``model``, ``id``.
        """
        for index, text in enumerate(texts):
            turn = {"sequenceIndex": index} if len(texts) > 1 else {}
            self.teach(prompt, {"content": text, **overrides}, match=turn)

    def refuse(self, prompt: str, status: int, *, retry_after: int | None = None, **error: str) -> None:
        """Answer a prompt with an error, in each protocol's shape: ``message``, ``type`` and ``code``."""
        response: dict[str, Any] = {"error": {"message": f"refused with {status}", **error}, "status": status}
        if retry_after is not None:
            response["retryAfter"] = retry_after
        self.teach(prompt, response)

    def refuse_once(self, status: int, **error: str) -> None:
        """Answer the next request, whatever it is, with an error. Several queue up."""
        self._control("/error", {"status": status, "body": {"message": f"refused with {status}", **error}})

    def chaos(self, fault: Fault, rate: float = 1.0, *, latency_ms: int = 0) -> None:
        """From now on answer at that rate with 500, what is no JSON, 429 or nothing."""
        self._control("/chaos", {fault: rate, "latencyMs": latency_ms})

    def calm(self) -> None:
        """No more chaos."""
        self._control("/chaos", method="DELETE")

    def journal(self) -> list[dict[str, Any]]:
        """Every request since the last reset, with ``path``, ``headers``, ``body`` and ``response``.

        The body of what is not chat/completions is there translated into that.
        """
        entries: list[dict[str, Any]] = self._control("/journal").json
        return entries

    def reset(self) -> None:
        """Forget what was taught, what was asked, and the chaos."""
        self._control("/reset", {})
        self.calm()

    def _control(self, path: str, body: object = None, *, method: str | None = None) -> Answer:
        answer = ask(f"{self.root}/__aimock{path}", body, method=method)
        assert answer.status == 200, answer.body
        return answer


@functools.cache
def why_no_aimock() -> str | None:
    """Why there is no aimock, after an attempt to install it; None when there is."""
    if missing := [name for name in ("node", "npm") if shutil.which(name) is None]:
        return f"aimock takes {' and '.join(missing)}"
    with LOCK.open() as lock:  # one of pytest-xdist's processes installs it for all
        fcntl.flock(lock, fcntl.LOCK_EX)
        return None if is_installed() else why_not_installed()


def is_installed() -> bool:
    """Whether what is installed is what is locked."""
    return INSTALLED.exists() and packages(INSTALLED) == packages(LOCK)


def packages(lock: Path) -> dict[str, Any]:
    """What a lock of npm's names, but for the project itself."""
    named: dict[str, Any] = json.loads(lock.read_text())["packages"]
    return {name: (entry["version"], entry["integrity"]) for name, entry in named.items() if name}


def why_not_installed() -> str | None:
    """Install aimock from wherever this machine's npm gets its packages."""
    quiet = ["--ignore-scripts", "--no-audit", "--no-fund"]
    command = ["npm", "ci", "--engine-strict", "--fetch-retries=1", "--fetch-retry-mintimeout=2000", *quiet]
    try:
        subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=60, check=True)
    except subprocess.CalledProcessError as error:
        said = [line for line in error.stderr.splitlines() if line.startswith("npm error")]
        return f"`npm ci` in {FOLDER} could not install aimock: {'; '.join(said[:3])}"
    except subprocess.TimeoutExpired:
        return "npm did not install aimock in a minute"
    return None


@contextlib.contextmanager
def aimock_server() -> Iterator[Aimock]:
    """An aimock of its own. Skips where it cannot be had."""
    if reason := why_no_aimock():
        unavailable(reason)
    with served(["node", "serve.mjs"], FOLDER) as (root, pid):
        yield Aimock(root, pid)


@pytest.fixture(scope="session")
def aimock_process() -> Iterator[Aimock]:
    """One aimock for each process of tests: a quarter of a second and 60 MB."""
    with aimock_server() as server:
        yield server


@pytest.fixture
def aimock(aimock_process: Aimock) -> Aimock:
    """An aimock that knows nothing yet."""
    aimock_process.reset()
    return aimock_process

"""Install each peer into a virtual environment of its own, under `.bench/venvs/`.

Two peers share the import name `rlm`, with each other and with this project, so they can never
live in one interpreter. Running this again installs only what is missing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

BENCH = Path(__file__).resolve().parent.parent / ".bench"
INSTALL_TIMEOUT_S = 900.0
TAIL_LINES = 6

# Run by the peer's interpreter: what is installed, and what the peer itself depends on.
VERSION_PROBE = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"
REQUIRES_PROBE = (
    "import importlib.metadata as m, sys\n"
    "print('\\n'.join(r for r in m.requires(sys.argv[1]) or () if 'extra ==' not in r))"
)


@dataclass(frozen=True)
class Peer:
    """One pinned distribution."""

    name: str
    distribution: str
    version: str
    extra: str = ""
    # Declares a newer Python than it needs: installed without that check, so that every peer is
    # measured on one interpreter version. Its dependencies are still resolved normally.
    ignore_requires_python: bool = False

    @property
    def pin(self) -> str:
        extra = f"[{self.extra}]" if self.extra else ""
        return f"{self.distribution}{extra}=={self.version}"


PEERS = (
    Peer("rlms", "rlms", "0.1.3"),
    Peer("recursive_llm", "recursive-llm", "0.5.0"),
    Peer("pyrlm", "pyrlm-runtime", "0.4.1", ignore_requires_python=True),
)
# Only for `compare_clients.py`, and only installed when named: one of them is 250 MB.
CLIENTS = (
    Peer("openai", "openai", "3.54.0", extra="aiohttp"),
    Peer("litellm", "litellm", "1.106.2"),  # The version of requirements.lock.
)


class InstallError(Exception):
    """A peer could not be installed; the message is the end of the installer's output."""


def interpreter(venv: Path) -> Path:
    """Where the interpreter of a virtual environment is."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def run(*command: str | Path) -> str:
    """Run a command and return its standard output, or raise with the end of what it said."""
    try:
        done = subprocess.run(
            command,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=INSTALL_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise InstallError(f"no end after {INSTALL_TIMEOUT_S:.0f} s") from error
    if done.returncode:
        raise InstallError("\n".join(done.stdout.strip().splitlines()[-TAIL_LINES:]))
    return done.stdout.strip()


def installed_version(peer: Peer, python: Path) -> str | None:
    """The version of the peer in its environment; None if there is none."""
    if not python.exists():
        return None
    try:
        return run(python, "-c", VERSION_PROBE, peer.distribution)
    except InstallError:
        return None


def pip_install(python: Path, *arguments: str) -> None:
    """`pip install` inside one environment."""
    run(python, "-m", "pip", "install", "--quiet", "--no-input", *arguments)


def install(peer: Peer, python: Path) -> None:
    """Install the pinned peer. In two steps if its declared Python has to be overlooked."""
    if not peer.ignore_requires_python:
        pip_install(python, peer.pin)
        return
    pip_install(python, "--no-deps", "--ignore-requires-python", peer.pin)
    try:
        requires = run(python, "-c", REQUIRES_PROBE, peer.distribution).splitlines()
        pip_install(python, *requires)
    except InstallError:
        # Half an installation must not look like a whole one to the next run.
        run(python, "-m", "pip", "uninstall", "--yes", "--quiet", peer.distribution)
        raise


def set_up(peer: Peer, venvs: Path) -> str:
    """Bring one environment up to the pin; the returned text says what was done."""
    venv = venvs / peer.name
    python = interpreter(venv)
    if installed_version(peer, python) == peer.version:
        return "already there"
    if not python.exists():
        run(sys.executable, "-m", "venv", venv)
    install(peer, python)
    return "installed"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="only these; clients too (default: all frameworks)")
    names = parser.parse_args(argv).names
    unknown = set(names) - {peer.name for peer in (*PEERS, *CLIENTS)}
    if unknown:
        parser.error(f"no such peer: {', '.join(sorted(unknown))}")
    BENCH.mkdir(exist_ok=True)
    (BENCH / ".gitignore").write_text("*\n")
    failed = 0
    for peer in (*PEERS, *CLIENTS):
        if peer.name not in names and (names or peer in CLIENTS):
            continue
        try:
            print(f"{peer.pin}: {set_up(peer, BENCH / 'venvs')}", flush=True)
        except InstallError as error:
            failed += 1
            print(f"{peer.pin}: could not be installed, its column stays empty:\n{error}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""What the tests of scripts for rlms share: a server in the place of providers, an RLM as scripts have it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import rlm
from rlm import RLM
from rlm.testing.model_server import Behaviour, ModelServer

ROOT = Path(rlm.__file__).parent.parent
KEY = "sk-of-a-script-and-of-nobody"
MODEL = "@openai/gpt-5-nano"


@pytest.fixture
def providers(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelServer]:
    """A server that the clients of OpenAI and Portkey take for theirs."""
    with ModelServer() as server:
        for provider in ("OPENAI", "PORTKEY"):
            monkeypatch.setenv(f"{provider}_API_KEY", KEY)
            monkeypatch.setenv(f"{provider}_BASE_URL", server.url)
        yield server


def say(server: ModelServer, *replies: str) -> None:
    """Have the server say these, one after the other, and the last one ever after."""
    left = list(replies)
    server.reply = lambda seen: Behaviour(text=left.pop(0) if len(left) > 1 else left[0])


def model(**settings: Any) -> RLM:
    """An RLM as scripts set one up."""
    kwargs = {"model_name": MODEL, "api_key": os.getenv("PORTKEY_API_KEY")}
    return RLM(backend="portkey", backend_kwargs=kwargs, environment="local", **settings)


def run_script(text: str, folder: Path) -> str:
    """What a script prints that is run as a process of its own, in a folder of its own."""
    paths = [str(ROOT / name) for name in (".", "environments", "clients")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", text]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout

"""What tests share of llama.cpp: a real server with a real sampler, and a way to foretell what it says."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
from collections.abc import Iterator

import pytest
from server_support import TESTS, ask, served

from rlm.testing.sessions import eventually, unavailable

NEEDS = ("xllamacpp", "gguf", "numpy")


class LlamaServer:
    """A running server. Its model is random: it says what it is told to, or nonsense."""

    model = "tiny"

    def __init__(self, root: str, pid: int) -> None:
        self.root = root
        """For Anthropic's clients, which add the /v1 themselves."""
        self.url = f"{root}/v1"
        self.pid = pid
        self.context: int = ask(f"{root}/props").json["default_generation_settings"]["n_ctx"]
        """Tokens of one request with its reply. A token is a byte of UTF-8, or the end of a reply."""

    def scripted(self, reply: str) -> dict[str, str]:
        """Further fields of a request that leave the sampler nothing but this reply.

        For chat/completions and responses: /v1/messages drops them.
        """
        return {"grammar": f'root ::= "{escaped(reply)}"'}

    def busy(self) -> int:
        """How many replies it is writing."""
        return sum(slot["is_processing"] for slot in ask(f"{self.root}/slots").json)

    def idle(self, seconds: float | None = None) -> bool:
        """Whether it writes nothing any more, within a bound."""
        return eventually(lambda: not self.busy(), seconds)


def escaped(text: str) -> str:
    """A text as it stands in a literal of llama.cpp's grammars. Raises ValueError where none can say it."""
    if "\0" in text or re.search("[\ud800-\udfff]", text):
        raise ValueError("a grammar expresses neither NUL nor lone surrogates")
    return re.sub(r'[^ -~]|["\\]', lambda found: f"\\U{ord(found[0]):08X}", text)


@contextlib.contextmanager
def llama_server() -> Iterator[LlamaServer]:
    """A server of its own. Skips where it cannot be had."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        unavailable(f"llama.cpp's server takes {', '.join(missing)}")
    with served([sys.executable, "llama_server.py"], TESTS) as (root, pid):
        yield LlamaServer(root, pid)


@pytest.fixture(scope="session")
def llama() -> Iterator[LlamaServer]:
    """llama.cpp's server with a random model: half a second and 90 MB, once for each process of tests."""
    with llama_server() as server:
        yield server

"""rlms, run by its own interpreter: its OpenAI client, below its own handler and alone.

Below its handler a batch has at most 16 calls in flight, as it is by default; alone it has as
many as the others. There is one batch to a run: the client of a run that has had one keeps
connections of an event loop that is closed, and later batches fail in part.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peers.client_probes import (
    MAKE_PROMPTS,
    MODEL,
    NARROW_SHARE,
    REPLY,
    STACK,
    WIDTH,
    Ask,
    Client,
    Moment,
    figures,
    measure_client,
    named,
    now,
    server_of,
    value_names,
)
from peers.common import Options, Step, Values

FIRST = """
client = OpenAIClient(api_key="none", model_name="stub", base_url=url)
await client.acompletion("hello")
"""
KEPT = f'answer["content"] = str(len([reply for reply in out if reply == {REPLY!r}]))'


def new_client(url: str) -> Any:
    # Not an import statement: to a type checker this name is another package.
    return importlib.import_module("rlm.clients.openai").OpenAIClient(
        api_key="none", model_name=MODEL, base_url=url, max_retries=0
    )


@asynccontextmanager
async def open_client(url: str) -> AsyncIterator[Ask]:
    ask: Ask = new_client(url).acompletion
    yield ask


class Scripted:
    """Its client for sub-calls, and a script for the root's turns."""

    def __init__(self, url: str, cells: list[str]) -> None:
        self._client = new_client(url)
        self._replies = iter([f"```repl\n{cell}\n```" for cell in cells])
        self.model_name = MODEL
        self.entered: list[Moment] = []
        self.left: list[Moment] = []
        self.spans: list[float] = []

    def completion(self, _messages: object) -> str:
        self.entered.append(now())
        reply = next(self._replies)
        self.left.append(now())
        return reply

    async def acompletion(self, prompt: str) -> str:
        started = time.perf_counter()
        try:
            return str(await self._client.acompletion(prompt))
        finally:
            self.spans.append(time.perf_counter() - started)

    def get_last_usage(self) -> Any:
        if not self.spans:  # The root's turns have none.
            return importlib.import_module("rlm.core.types").ModelUsageSummary(1, 1, 1)
        return self._client.get_last_usage()

    def get_usage_summary(self) -> Any:
        return self._client.get_usage_summary()


def one_run(url: str, calls: int) -> Values:
    core = importlib.import_module("rlm.core.rlm")
    cells = [
        MAKE_PROMPTS.format(calls=calls),
        "out = llm_query_batched(prompts)",
        f'{KEPT}\nanswer["ready"] = True',
    ]
    model = Scripted(url, cells)
    core.get_client = lambda *_: model  # type: ignore[attr-defined]
    rlm = core.RLM(backend="openai", backend_kwargs={"model_name": MODEL}, environment="local")
    good = int(rlm.completion("tiny", root_prompt="q").response)
    return figures(model.left[1], model.entered[2], good, calls, model.spans)


def stack(options: Options) -> Values:
    """A batch of as many prompts as fit into the time, by the rate of a shorter one."""
    url = server_of(options)
    one_run(url, WIDTH)
    rate = one_run(url, options.prompts // NARROW_SHARE // NARROW_SHARE)["per_s"]
    calls = max(min(options.prompts, int(rate * options.seconds)), WIDTH)
    return named(STACK, one_run(url, calls))


if __name__ == "__main__":
    measure_client(
        Client("rlms", "rlms", open_client, "from rlm.clients.openai import OpenAIClient", FIRST),
        stack=[Step(partial(stack), value_names(STACK))],
    )

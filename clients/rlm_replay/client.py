"""ReplayLM: what a model once said, said again to whoever asks the same."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from pathlib import Path

import msgspec

from rlm import jsontext, recording
from rlm.client import BaseLM, ModelInfo, Reply, Request
from rlm.errors import ReplayMiss

from .nearest import nearest

EXPLAINED = 20
"""Misses that are compared with the whole recording. What further ones differ in will be the same."""


class ReplayLM(BaseLM):
    """Serves the replies of a recording, each to the request that it was a reply to.

    A request that was recorded several times gets its replies in their order, and then the
    last one again. One ReplayLM stands in for all the models of a run, `model_names`: a request
    that names one of them gets that model's reply, and one that names none gets the reply of
    whichever was recorded. With ``model_name`` it is that model alone.
    What was not recorded is a ReplayMiss, which says what comes nearest to it.
    """

    simulated = True

    def __init__(self, path: str | Path, model_name: str | None = None) -> None:
        self._path = Path(path)
        self._recorded = recording.load(self._path)
        self.model_name = model_name or self._recorded[0].model
        self._model = model_name
        names = dict.fromkeys(recorded.model for recorded in self._recorded)
        self.model_names: tuple[str, ...] = tuple(names) if model_name is None else (model_name,)
        """The models it can be asked for by name."""
        self._replies: dict[str, list[Reply]] = defaultdict(list)
        for recorded in self._recorded:
            self._replies[recorded.key].append(recorded.reply)
            self._replies[recording.request_key(recorded.request, None)].append(recorded.reply)
        self._served: dict[str, int] = defaultdict(int)
        self._misses = 0

    def __repr__(self) -> str:
        return f"ReplayLM({str(self._path)!r}, model_name={self.model_name!r})"

    async def prepare(self) -> str | None:
        """Say whose replies these are, and how old."""
        models = " and ".join(dict.fromkeys(recorded.model for recorded in self._recorded))
        first = self._recorded[0].when.date().isoformat()
        count = len(self._recorded)
        replies = "reply" if count == 1 else "replies"
        return f"replaying {count:,} recorded {replies} of {models} from {self._path}, recorded {first}"

    def info(self, model: str) -> ModelInfo:
        return ModelInfo(tells_cost=True)

    async def complete(self, request: Request) -> Reply:
        model = request.model or self._model
        key = recording.request_key(request, model)
        replies = self._replies.get(key)
        if replies is None:
            raise await self._miss(recording.decisive(request, model or self.model_name))
        turn = self._served[key]
        self._served[key] += 1
        return _free(replies[min(turn, len(replies) - 1)])

    async def _miss(self, asked: Request) -> ReplayMiss:
        self._misses += 1
        hint = "Record again with record=, or ask what was asked then"
        if self._misses > EXPLAINED:
            return ReplayMiss(f"{self._path} holds no reply for this request. {hint}.", sent=False)
        asked = msgspec.json.decode(jsontext.encode(asked), type=Request)  # as a file would hold it
        # in a thread: it takes a moment where thousands of long prompts were recorded
        found = await asyncio.to_thread(nearest, asked, self._recorded)
        return ReplayMiss(
            f"{self._path} holds no reply for this request. The nearest of {len(self._recorded):,} recorded "
            f"is in line {found.line}, {_percent(found.similarity)} the same; it differs in {found.where}: "
            f"recorded {found.recorded}, asked {found.asked}. {hint}.",
            sent=False,
        )


def _free(reply: Reply) -> Reply:
    """The reply at what it costs now: nobody was paid for it. What was paid then is in the file."""
    usage = msgspec.structs.replace(reply.usage, cost=0.0)
    return msgspec.structs.replace(reply, usage=usage, cached=False)


def _percent(similarity: float) -> str:
    """Never 100 %: then it would be the same."""
    return f"{min(similarity * 100, 99.9):.1f} %"

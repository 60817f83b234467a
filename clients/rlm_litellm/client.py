"""LiteLLM: every provider that LiteLLM has, as a client. One attempt a call, and no words besides."""

from __future__ import annotations

import asyncio
import re
import sys
import weakref
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from types import ModuleType
from typing import Any

import msgspec

from rlm import secrets
from rlm.client import BaseLM, Feature, Finish, ModelInfo, Price, Reply, Request, Usage
from rlm.errors import BadRequest, ConfigError, ModelError, ProtocolError, Timeout
from rlm.secrets import SecretText

from . import library
from .failures import failure

UNLIMITED = 30 * 24 * 3600.0
"""Seconds that LiteLLM is told where a request has no limit: told nothing, it takes one of its own."""

FINISH: dict[str | None, Finish] = {
    None: "stop", "stop": "stop", "length": "length", "content_filter": "filter"
}  # fmt: skip

FEATURES: dict[str, Feature] = {
    "temperature": "temperature", "stop": "stop", "seed": "seed", "response_format": "schema",
    "stream": "stream",
}  # fmt: skip
"""What may be asked, by LiteLLM's names."""

ASKS = ("ollama", "ollama_chat")
"""Providers of which LiteLLM knows nothing, and whose servers it asks about a model."""

NO_KEY = "none"
"""Given to LiteLLM where it would otherwise take a key from the environment."""

NOT_EXTRA = frozenset(
    ("model", "messages", "stream", "timeout", "api_key", "api_base", "base_url", "api_version", "client",
     "custom_llm_provider", "headers", "extra_headers", "mock_response", "fallbacks", "callbacks", "cache",
     "caching", "num_retries", "max_retries")
)  # fmt: skip
"""What is no field of a request, but would be taken for a setting of LiteLLM's."""

_LONG = re.compile(r"input_cost_per_token_above_(\d+)k_tokens")

_using: weakref.WeakSet[LiteLLM] = weakref.WeakSet()
"""Who may have connections open. LiteLLM's are the process's: they are closed after the last of these."""


class LiteLLM(BaseLM):
    """A model by LiteLLM's name for it, such as "bedrock/..." or "mistral/mistral-large-latest".

    Keys come from the environment, as LiteLLM documents for each provider, where ``api_key`` is
    not given. ``base_url`` (or ``api_base``) and ``api_version`` are its own; whatever else is given
    goes to ``litellm.acompletion`` with each call. Needs ``pip install 'rlm[litellm]'``. LiteLLM is
    imported when the first run is prepared, and takes seconds for that.
    """

    def __init__(
        self,
        model_name: str | None = None,
        *,
        api_key: str | SecretText | None = None,
        base_url: str | None = None,
        api_base: str | None = None,
        api_version: str | None = None,
        **settings: Any,
    ) -> None:
        if not model_name:
            raise ConfigError("say which model is meant, by LiteLLM's name: model_name='provider/model'")
        self.model_name = model_name
        self._url = base_url or api_base
        if api_key is None and self._url is not None and self._url.startswith("http://"):
            api_key = NO_KEY  # a key of the environment does not travel unencrypted, see rlm.http.find_key
        own = {"api_key": api_key, "api_base": self._url, "api_version": api_version}
        self._settings = _Settings({**{k: v for k, v in own.items() if v is not None}, **settings})
        self._library: ModuleType | None = None
        self._known: dict[str, ModelInfo] = {}

    def __repr__(self) -> str:
        at = f", base_url={self._url!r}" if self._url else ""
        return f"LiteLLM({self.model_name!r}{at})"

    def pool_key(self, model: str) -> str:
        """The address, or else the provider: its models share its limits."""
        return self._url or f"litellm:{model.partition('/')[0] if '/' in model else ''}"

    async def prepare(self) -> str | None:
        await self._loaded()
        return None

    def info(self, model: str) -> ModelInfo:
        """What LiteLLM's table says of a model: nothing until it has been imported, see `prepare`."""
        if self._library is None:
            return ModelInfo()
        if model not in self._known:
            self._known[model] = _info(self._library, model)
        return self._known[model]

    async def complete(self, request: Request) -> Reply:
        lite = await self._loaded()
        arguments = self._arguments(request)
        async with self._failures(_deadline(request)):
            response = await lite.acompletion(**arguments)
        return _reply(response, request)

    async def stream(self, request: Request) -> AsyncIterator[str | Reply]:
        """Pieces of the text as they arrive, then the Reply."""
        lite = await self._loaded()
        deadline, gathered = _deadline(request), _Gathered()
        arguments = self._arguments(request) | {"stream": True, "stream_options": {"include_usage": True}}
        async with self._failures(deadline):
            chunks = await lite.acompletion(**arguments)
        try:
            while True:
                async with self._failures(deadline):  # not around the yield: there the time is the caller's
                    chunk = await anext(chunks, None)
                if chunk is None:
                    break
                if piece := gathered.add(chunk):
                    yield piece
        finally:
            await _closed(chunks)
        if not _was_ended(chunks):
            raise ProtocolError("the stream ended before the reply did")
        yield gathered.reply(lite, arguments["model"], request)

    async def aclose(self) -> None:
        """Close LiteLLM's connections, if nobody else of this process uses it."""
        if self not in _using:
            return
        _using.discard(self)
        close = getattr(self._library, "close_litellm_async_clients", None)
        if close is None or _using:
            return
        await close()
        clients = getattr(self._library, "in_memory_llm_clients_cache", None)
        if clients is not None:
            clients.flush_cache()  # it would hand out the closed ones

    async def _loaded(self) -> ModuleType:
        if self._library is None:
            self._library = await asyncio.to_thread(library.load)
        _using.add(self)
        return self._library

    def _arguments(self, request: Request) -> dict[str, Any]:
        """What a call says; the client's own settings go before nothing but what nobody has set."""
        if wrong := NOT_EXTRA & (request.extra or {}).keys():
            raise BadRequest(f"no field of a request, but a setting: {', '.join(sorted(wrong))}", sent=False)
        asked: dict[str, Any] = {
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "stop": list(request.stop) if request.stop is not None else None,
            "seed": request.seed,
        }
        if request.schema is not None:
            schema = {"name": "reply", "schema": request.schema}
            asked["response_format"] = {"type": "json_schema", "json_schema": schema}
        return {
            **self._settings.revealed(),
            "model": request.model or self.model_name,
            "messages": [{"role": message.role, "content": message.content} for message in request.messages],
            "timeout": UNLIMITED if request.timeout is None else request.timeout,
            "num_retries": 0,
            "max_retries": 0,
            **{name: value for name, value in asked.items() if value is not None},
            **(request.extra or {}),
        }

    @asynccontextmanager
    async def _failures(self, deadline: float | None) -> AsyncIterator[None]:
        """Make ModelErrors of whatever goes wrong, and of time that is over."""
        within = sys.exception()
        limit = asyncio.timeout_at(deadline)
        try:
            async with limit:
                yield
        except ModelError:
            raise
        except Exception as error:
            if limit.expired():
                raise Timeout(f"no reply from {self.model_name} in time") from None
            raise failure(error, self._hide, within) from None

    def _hide(self, text: str) -> str:
        return secrets.hide(text, self._settings.secrets() | secrets.in_environment())


class _Settings:
    """What a client was given, keys among it, which nothing that prints it shows."""

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)

    def __repr__(self) -> str:
        return repr(secrets.mask(self._values))

    def revealed(self) -> dict[str, Any]:
        """The settings as LiteLLM takes them."""
        return {
            name: value.get_secret_value() if isinstance(value, SecretText) else value
            for name, value in self._values.items()
        }

    def secrets(self) -> set[str]:
        """The keys among them."""
        return secrets.find(self._values)


class _Gathered:
    """Chunks of a stream."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._finish: str | None = None
        self._usage: Any = None
        self._id: str | None = None
        self._model: str | None = None

    def add(self, chunk: Any) -> str:
        """The piece of text in a chunk."""
        self._id, self._model = chunk.id, chunk.model
        self._usage = getattr(chunk, "usage", None) or self._usage
        choice = chunk.choices[0] if chunk.choices else None
        if choice is None:
            return ""
        self._finish = choice.finish_reason or self._finish
        piece = choice.delta.content or ""
        self._pieces.append(piece)
        return str(piece)

    def reply(self, lite: ModuleType, model: str, request: Request) -> Reply:
        """The whole of it."""
        text = "".join(self._pieces)
        usage = _usage(self._usage, None) or Usage.estimate(request.messages, text)
        return Reply(
            text=text,
            finish=FINISH.get(self._finish, "other"),
            usage=msgspec.structs.replace(usage, cost=_cost(lite, model, self._usage)),
            model=self._model,
            id=self._id,
        )


def _deadline(request: Request) -> float | None:
    return None if request.timeout is None else asyncio.get_running_loop().time() + request.timeout


def _was_ended(chunks: Any) -> bool:
    """Whether the provider said how its reply ended. Where it did not, LiteLLM makes up a "stop"."""
    said = [getattr(chunks, f"{kind}_finish_reason", "unknown") for kind in ("received", "intermittent")]
    return any(said)


async def _closed(chunks: Any) -> None:
    """Leave a stream: a provider goes on writing, and billing, for whoever seems to listen."""
    close = getattr(chunks, "aclose", None)
    if close is not None:
        await close()


def _reply(response: Any, request: Request) -> Reply:
    if not response.choices:
        raise ProtocolError("the reply has no choices")
    choice = response.choices[0]
    text = choice.message.content or ""
    if not isinstance(text, str):
        raise ProtocolError(f"the text of the reply is {text!r}")
    thoughts = getattr(choice.message, "thinking_blocks", None)
    cost = (getattr(response, "_hidden_params", None) or {}).get("response_cost")
    return Reply(
        text=text,
        finish=FINISH.get(choice.finish_reason, "other"),
        usage=_usage(getattr(response, "usage", None), cost) or Usage.estimate(request.messages, text),
        model=response.model,
        id=response.id,
        raw={"thinking_blocks": thoughts} if thoughts else None,
    )


def _usage(told: Any, cost: float | None) -> Usage | None:
    """Tokens by our names. LiteLLM makes zeros of what a provider does not say."""
    if told is None or not (told.prompt_tokens or told.completion_tokens):
        return None
    read = getattr(told, "prompt_tokens_details", None)
    wrote = getattr(told, "completion_tokens_details", None)
    return Usage(
        input_tokens=told.prompt_tokens or 0,
        output_tokens=told.completion_tokens or 0,
        cached_tokens=getattr(read, "cached_tokens", None) or 0,
        cache_write_tokens=getattr(read, "cache_creation_tokens", None) or 0,
        reasoning_tokens=getattr(wrote, "reasoning_tokens", None) or 0,
        cost=cost,
    )


def _cost(lite: ModuleType, model: str, usage: Any) -> float | None:
    """Dollars for a stream, for which LiteLLM does not say them; None where it knows no price."""
    if usage is None:
        return None
    try:
        return float(sum(lite.cost_per_token(model=model, usage_object=usage)))
    except Exception:  # it has several of its own for a model without a price
        return None


def _info(lite: ModuleType, model: str) -> ModelInfo:
    """What the table says of a model. It raises for one that is not in it."""
    if model.partition("/")[0] in ASKS:
        return ModelInfo()
    try:
        listed = lite.get_model_info(model)
    except Exception:  # of no class of its own, for a model that it does not know
        return ModelInfo()
    offered = listed.get("supported_openai_params")
    return ModelInfo(
        context_window=listed.get("max_input_tokens"),
        max_output=listed.get("max_output_tokens"),
        price=_price(listed),
        supports=frozenset(FEATURES[name] for name in offered if name in FEATURES) if offered else None,
    )


def _price(listed: Mapping[str, Any]) -> Price | None:
    """The price in the table, which is for one token; with the first step for long inputs."""
    price = _step(listed, "")
    steps = (_LONG.fullmatch(name) for name, value in listed.items() if value is not None)
    above = min((int(found[1]) for found in steps if found), default=None)
    long = _step(listed, f"_above_{above}k_tokens") if above is not None else None
    if price is None or long is None or above is None:
        return price
    return msgspec.structs.replace(price, above=above * 1000, long=long)


def _step(listed: Mapping[str, Any], suffix: str) -> Price | None:
    def dollars(name: str) -> float | None:
        value = listed.get(f"{name}{suffix}")
        return None if value is None else round(value * 1e6, 9)

    read, wrote = dollars("input_cost_per_token"), dollars("output_cost_per_token")
    if read is None or wrote is None:
        return None
    cached, written = dollars("cache_read_input_token_cost"), dollars("cache_creation_input_token_cost")
    return Price(read, wrote, cached, written)

"""OpenAILM: any server that speaks OpenAI's API, and presets for those that many people use."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from rlm import prices
from rlm.client import ModelInfo, Price
from rlm.errors import ConfigError, ProtocolError
from rlm.http import HTTPLM, Dialect, Endpoint, as_text, find_key, first_set, missing_key
from rlm.secrets import Secret, SecretText

from .chat import Chat
from .responses import Responses

UNNAMED = "unknown"
"""A model's name until its server has told it."""

PROBE_TIMEOUT = 5.0
"""Seconds a server has to say which models it serves."""


@dataclasses.dataclass(frozen=True)
class Preset:
    """What is particular to one provider."""

    title: str
    base_url: str | None
    key_variables: tuple[str, ...]
    """Environment variables that may hold the key, the first that is set wins."""
    url_variables: tuple[str, ...] = ()
    needs_key: bool = True
    key_header: str = "Authorization"
    token_field: str = "max_tokens"
    cache_key: bool = False
    """Whether calls say which of them share a beginning (``prompt_cache_key``)."""
    prices: str | None = None
    """Whose prices apply, in the table of `rlm.prices`."""


OPENAI = Preset(
    "OpenAI", "https://api.openai.com/v1", ("OPENAI_API_KEY", "LLM_API_KEY"),
    ("OPENAI_BASE_URL", "LLM_BASE_URL"), token_field="max_completion_tokens", cache_key=True, prices="openai",
)  # fmt: skip


class _Served(msgspec.Struct):
    id: str
    max_model_len: int | None = None
    meta: dict[str, Any] | None = None


class _Models(msgspec.Struct):
    data: list[_Served] | None
    """Ollama without a model says null."""


class OpenAILM(HTTPLM):
    """A model behind OpenAI's API: OpenAI itself, or any server that speaks it, at ``base_url``.

    ``api_key`` comes from the environment when it is not given: OPENAI_API_KEY or LLM_API_KEY,
    ``base_url`` likewise from OPENAI_BASE_URL or LLM_BASE_URL. A server of your own needs no
    key, and no ``model_name`` when it serves a single model. ``api`` is "chat" or "responses";
    ``headers`` are sent with every call; ``context_window`` is in tokens; ``price`` is a
    `rlm.client.Price`, or its fields, in dollars for a million tokens.
    """

    preset = OPENAI

    def __init__(
        self,
        model_name: str | None = None,
        *,
        base_url: str | None = None,
        api_key: str | SecretText | None = None,
        headers: Mapping[str, str | SecretText] | None = None,
        query: Mapping[str, str] | None = None,
        api: Literal["chat", "responses"] = "chat",
        context_window: int | None = None,
        price: Price | Mapping[str, float] | None = None,
    ) -> None:
        preset = self.preset
        if api not in ("chat", "responses"):
            raise ConfigError(f"api={api!r}: it is 'chat' or 'responses'")
        url = base_url or first_set(preset.url_variables) or preset.base_url
        if url is None:
            raise ConfigError(f"say where {preset.title} is: base_url='http://...'")
        url = as_text("base_url", url)
        self._is_home = url.rstrip("/") == (preset.base_url or url).rstrip("/")
        key = self._key_header(api_key, url, headers or {}, chosen=base_url is not None)
        self.endpoint = Endpoint(url, {**key, **(headers or {})}, query)
        if model_name is None and self._is_home and preset.needs_key:
            raise ConfigError(f"say which of {preset.title}'s models is meant: model_name='...'")
        self.model_name = model_name or UNNAMED
        self._window = context_window
        self._price = prices.as_price(price)
        cache_key = preset.cache_key and self._is_home
        field = preset.token_field if self._is_home else Preset.token_field
        self._dialect: Dialect = Chat(field, cache_key) if api == "chat" else Responses(cache_key)

    @property
    def dialect(self) -> Dialect:
        return self._dialect

    async def prepare(self) -> str | None:
        """Ask a server that was named without a model which one it serves."""
        if self.model_name != UNNAMED:
            return await super().prepare()
        served = await self.served()
        if len(served) != 1:
            names = ", ".join(repr(name) for name in sorted(served)[:20]) or "none"
            raise ConfigError(f"{self.endpoint.base_url} serves {names}: say which with model_name='...'")
        self.model_name, window = served.popitem()
        self._window = self._window or window
        return f"{self.endpoint.base_url} serves {self.model_name!r}"

    async def served(self, timeout: float = PROBE_TIMEOUT) -> dict[str, int | None]:
        """The models of the server, each with its context window in tokens, if it tells."""
        data = await self.endpoint.get("/models", timeout)
        try:
            models = msgspec.json.decode(data, type=_Models).data or []
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(f"{self.endpoint.base_url}/models is no list of models: {error}") from None
        return {model.id: model.max_model_len or _trained_window(model) for model in models}

    def info(self, model: str) -> ModelInfo:
        """Prices and windows of the preset's own models; of a server of yours, what you said."""
        listed = prices.lookup(self.preset.prices, model) if self._is_home else ModelInfo()
        return msgspec.structs.replace(
            listed,
            price=self._price or listed.price,
            context_window=self._window or listed.context_window,
        )

    def _key_header(
        self, given: str | SecretText | None, url: str, headers: Mapping[str, Any], chosen: bool
    ) -> dict[str, Secret]:
        """The header with the key, wherever it comes from. A provider that needs one must get one."""
        preset = self.preset
        if any(name.lower() == preset.key_header.lower() for name in headers):
            return {}
        key = find_key(given, preset.key_variables, url, chosen, own=not preset.needs_key)
        if key is None:
            if preset.needs_key and self._is_home:
                raise missing_key(preset.title, preset.key_variables)
            return {}
        return {preset.key_header: Secret(f"Bearer {key}" if preset.key_header == "Authorization" else key)}


class VLLM(OpenAILM):
    """A vLLM server."""

    preset = Preset(
        "vLLM", "http://127.0.0.1:8000/v1", ("VLLM_API_KEY",), ("VLLM_BASE_URL",), needs_key=False
    )


class OpenRouterLM(OpenAILM):
    """OpenRouter. It says what each call cost."""

    preset = Preset("OpenRouter", "https://openrouter.ai/api/v1", ("OPENROUTER_API_KEY",))


class VercelLM(OpenAILM):
    """The Vercel AI gateway."""

    preset = Preset("Vercel", "https://ai-gateway.vercel.sh/v1", ("AI_GATEWAY_API_KEY", "VERCEL_OIDC_TOKEN"))


class PortkeyLM(OpenAILM):
    """The Portkey gateway."""

    preset = Preset(
        "Portkey", "https://api.portkey.ai/v1", ("PORTKEY_API_KEY",), ("PORTKEY_BASE_URL",),
        key_header="x-portkey-api-key",
    )  # fmt: skip


class GeminiLM(OpenAILM):
    """Google's Gemini, by its endpoint that speaks OpenAI's API."""

    preset = Preset(
        "Gemini", "https://generativelanguage.googleapis.com/v1beta/openai",
        ("GEMINI_API_KEY", "GOOGLE_API_KEY"), prices="gemini",
    )  # fmt: skip


class AzureOpenAILM(OpenAILM):
    """OpenAI's models on Azure, at ``azure_endpoint`` (AZURE_OPENAI_ENDPOINT).

    ``azure_deployment`` (AZURE_OPENAI_DEPLOYMENT) is the deployment, the model's name unless it
    is given. With ``api_version`` (AZURE_OPENAI_API_VERSION) the older address is used, which
    has the deployment in it.
    """

    preset = Preset(
        "Azure OpenAI", None, ("AZURE_OPENAI_API_KEY",), key_header="api-key",
        token_field="max_completion_tokens", prices="openai",
    )  # fmt: skip

    def __init__(
        self,
        model_name: str | None = None,
        *,
        azure_endpoint: str | None = None,
        azure_deployment: str | None = None,
        api_version: str | None = None,
        query: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> None:
        endpoint = azure_endpoint or first_set(("AZURE_OPENAI_ENDPOINT",))
        if azure_endpoint is None and settings.get("base_url") is None:  # both are the environment's
            settings["api_key"] = settings.get("api_key") or first_set(self.preset.key_variables)
        deployment = azure_deployment or first_set(("AZURE_OPENAI_DEPLOYMENT",)) or model_name
        version = api_version or first_set(("AZURE_OPENAI_API_VERSION",))
        if settings.get("base_url") is None:
            if endpoint is None:
                raise ConfigError("say where Azure OpenAI is: azure_endpoint= or AZURE_OPENAI_ENDPOINT")
            if deployment is None:
                raise ConfigError("say which deployment is meant: azure_deployment= or model_name=")
            path = f"deployments/{deployment}" if version else "v1"
            settings["base_url"] = f"{endpoint.rstrip('/')}/openai/{path}"
            query = {**({"api-version": version} if version else {}), **(query or {})}
        super().__init__(model_name or deployment, query=query, **settings)


def _trained_window(model: _Served) -> int | None:
    window = (model.meta or {}).get("n_ctx") or (model.meta or {}).get("n_ctx_train")  # llama.cpp's
    return window if isinstance(window, int) else None

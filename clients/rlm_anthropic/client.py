"""AnthropicLM: Claude, or whatever a server answers with that speaks the Messages API."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from rlm import prices
from rlm.client import ModelInfo, Price, Request
from rlm.errors import ConfigError, ProtocolError
from rlm.http import HTTPLM, Dialect, Endpoint, as_text, find_key, first_set, missing_key
from rlm.secrets import Secret, SecretText

from .messages import COUNTED, Messages

HOME = "https://api.anthropic.com/v1"
VERSION = "2023-06-01"
KEY_VARIABLES = ("ANTHROPIC_API_KEY",)
URL_VARIABLES = ("ANTHROPIC_BASE_URL",)


class _Count(msgspec.Struct):
    input_tokens: int


class AnthropicLM(HTTPLM):
    """A model behind Anthropic's Messages API, at Anthropic or at ``base_url``.

    ``api_key`` comes from ANTHROPIC_API_KEY when it is not given, ``base_url`` from
    ANTHROPIC_BASE_URL; it may end with ``/v1`` or not. ``headers`` are sent with every call, and
    go before the client's own (``anthropic-version``). ``max_tokens`` is how many a reply may have
    where a request does not say, ``context_window`` is in tokens; ``price`` is a
    `rlm.client.Price`, or its fields, in dollars for a million tokens.
    """

    def __init__(
        self,
        model_name: str | None = None,
        *,
        base_url: str | None = None,
        api_key: str | SecretText | None = None,
        headers: Mapping[str, str | SecretText] | None = None,
        max_tokens: int | None = None,
        context_window: int | None = None,
        price: Price | Mapping[str, float] | None = None,
    ) -> None:
        if not model_name:
            raise ConfigError("say which model is meant: model_name='...'")
        url = _versioned(as_text("base_url", base_url or first_set(URL_VARIABLES) or HOME))
        self.model_name = model_name
        self._is_home = url == HOME
        self._window = context_window
        self._price = prices.as_price(price)
        self._dialect = Messages(self.info, max_tokens)
        self.endpoint = Endpoint(url, self._headers(api_key, url, base_url is not None, headers or {}))

    @property
    def dialect(self) -> Dialect:
        return self._dialect

    def info(self, model: str) -> ModelInfo:
        """Prices and windows of Anthropic's own models; of another server's, what you said."""
        listed = prices.lookup("anthropic", model) if self._is_home else ModelInfo()
        return msgspec.structs.replace(
            listed,
            price=self._price or listed.price,
            context_window=self._window or listed.context_window,
            supports=listed.supports and listed.supports - {"seed"},  # which no model here has
        )

    async def count(self, request: Request) -> tuple[int, bool]:
        """Tokens of a request, by the provider's own count."""
        body = self._dialect.body(request, request.model or self.model_name, False)
        asked = {name: body[name] for name in COUNTED if name in body}
        data = await self.endpoint.post(f"{self._dialect.path}/count_tokens", asked, request.timeout)
        try:
            return msgspec.json.decode(data, type=_Count).input_tokens, True
        except msgspec.MsgspecError as error:
            raise ProtocolError(f"the server's count of tokens is none: {error}") from None

    def _headers(
        self, given: str | SecretText | None, url: str, chosen: bool, further: Mapping[str, str | SecretText]
    ) -> dict[str, str | SecretText]:
        """The client's own headers, with the key wherever it comes from, unless they are overridden."""
        own: dict[str, str | SecretText] = {"anthropic-version": VERSION}
        names = {name.lower() for name in further}
        if not names & {"x-api-key", "authorization"}:
            key = find_key(given, KEY_VARIABLES, url, chosen)
            if key is not None:
                own["x-api-key"] = Secret(key)
            elif self._is_home:
                raise missing_key("Anthropic", KEY_VARIABLES)
        return {**{name: value for name, value in own.items() if name not in names}, **further}


def _versioned(url: str) -> str:
    """The address with the version that all paths begin with, which some tools want in it and some not."""
    url = url.rstrip("/")
    return url if url.endswith("/v1") else f"{url}/v1"

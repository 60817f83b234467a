"""What scripts for rlms find under ``rlm.clients``: clients by their names there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlm.errors import UnknownPlugin

from .anthropic import AnthropicClient
from .azure_openai import AzureOpenAIClient
from .base_lm import BaseLM
from .gemini import GeminiClient
from .openai import OpenAIClient, OpenRouterClient, VercelClient, VLLMClient
from .portkey import PortkeyClient
from .provider import ProviderClient

__all__ = ["BaseLM", "get_client"]

_CLIENTS: tuple[type[ProviderClient], ...] = (
    AnthropicClient, AzureOpenAIClient, GeminiClient, OpenAIClient, OpenRouterClient, PortkeyClient,
    VLLMClient, VercelClient,
)  # fmt: skip


def get_client(backend: str, backend_kwargs: Mapping[str, Any]) -> BaseLM:
    """The client of a backend's name. Raises UnknownPlugin for a name that rlms does not have."""
    kinds = {kind.backend: kind for kind in _CLIENTS}
    if backend not in kinds:
        raise UnknownPlugin(f"no client is called {backend!r} here; there are {', '.join(sorted(kinds))}")
    return kinds[backend](**backend_kwargs)

"""Clients for OpenAI's API and the many servers that speak it. Imports next to nothing."""

from .auto import AutoLM
from .client import (
    VLLM,
    AzureOpenAILM,
    GeminiLM,
    OpenAILM,
    OpenRouterLM,
    PortkeyLM,
    VercelLM,
)

__all__ = [
    "VLLM",
    "AutoLM",
    "AzureOpenAILM",
    "GeminiLM",
    "OpenAILM",
    "OpenRouterLM",
    "PortkeyLM",
    "VercelLM",
]

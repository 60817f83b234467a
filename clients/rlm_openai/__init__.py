"""Clients for OpenAI's API and the many servers that speak it. Imports next to nothing."""

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
    "AzureOpenAILM",
    "GeminiLM",
    "OpenAILM",
    "OpenRouterLM",
    "PortkeyLM",
    "VercelLM",
]

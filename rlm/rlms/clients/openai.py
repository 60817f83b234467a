"""OpenAI, and others that speak its API, as scripts for rlms name them."""

from .provider import ProviderClient


class OpenAIClient(ProviderClient):
    """OpenAI, or a server at ``base_url`` that speaks its API."""

    backend = "openai"


class OpenRouterClient(ProviderClient):
    """OpenRouter."""

    backend = "openrouter"


class VercelClient(ProviderClient):
    """The Vercel AI gateway."""

    backend = "vercel"


class VLLMClient(ProviderClient):
    """A vLLM server."""

    backend = "vllm"

"""Anthropic, as scripts for rlms name it."""

from .provider import ProviderClient


class AnthropicClient(ProviderClient):
    """The Messages API."""

    backend = "anthropic"

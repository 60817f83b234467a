"""A client for Anthropic's Messages API, and for the servers that speak it. Imports next to nothing."""

from .client import AnthropicLM

__all__ = ["AnthropicLM"]

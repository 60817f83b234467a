"""A client for whatever LiteLLM speaks to. Imports next to nothing: LiteLLM itself takes seconds."""

from .client import LiteLLM

__all__ = ["LiteLLM"]

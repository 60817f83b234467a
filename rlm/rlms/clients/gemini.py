"""Gemini, as scripts for rlms name it."""

from .provider import ProviderClient


class GeminiClient(ProviderClient):
    """Google's Gemini."""

    backend = "gemini"

"""One tiny call to each provider whose key is in the environment. Without a key there is nothing to test."""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest

from rlm import plugins
from rlm.client import BaseLM, Message, Request


class Provider(NamedTuple):
    """What to ask, and which key it takes."""

    key: str
    model: str


PROVIDERS = {
    "openai": Provider("OPENAI_API_KEY", "gpt-5.4-nano"),
    "anthropic": Provider("ANTHROPIC_API_KEY", "claude-haiku-4-5"),
    "gemini": Provider("GEMINI_API_KEY", "gemini-3.5-flash-lite"),
    "openrouter": Provider("OPENROUTER_API_KEY", "openai/gpt-5.4-nano"),
}


@pytest.mark.parametrize("name", PROVIDERS)
async def test_a_provider_replies_and_counts(name: str) -> None:
    provider = PROVIDERS[name]
    if not os.environ.get(provider.key):
        pytest.skip(f"{provider.key} is not set: {name} is not called")  # nor where RLM_REQUIRE_ALL=1
    client: BaseLM = plugins.load("rlm.clients", name)(provider.model)
    request = Request((Message("user", "Reply with the single word: yes"),), timeout=60, max_tokens=500)
    try:
        reply = await client.complete(request)
    finally:
        await client.aclose()
    assert "yes" in reply.text.lower()
    assert reply.finish == "stop"
    assert reply.usage.input_tokens > 0
    assert reply.usage.output_tokens > 0
    assert not reply.usage.estimated
    price = client.info(provider.model).price
    assert price is not None or reply.usage.cost is not None

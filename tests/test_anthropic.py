from __future__ import annotations

import pytest
from rlm_anthropic import AnthropicLM

from rlm.testing import ClientSuite
from rlm.testing.clients import Connect


class TestAnthropicSuite(ClientSuite):
    speaks = "anthropic"

    @pytest.fixture
    def connect(self) -> Connect:
        return lambda url, key: AnthropicLM("test-model", base_url=url, api_key=key)

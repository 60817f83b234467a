"""The suite of clients is passable, in every dialect: plain clients pass all of it."""

from __future__ import annotations

import pytest
from plain_clients import PlainAnthropic, PlainLM, PlainResponses

from rlm.testing import ClientSuite
from rlm.testing.clients import Connect


class TestOpenAI(ClientSuite):
    speaks = "openai"

    @pytest.fixture
    def connect(self) -> Connect:
        return lambda url, key: PlainLM("plain-model", url, key)


class TestResponses(ClientSuite):
    speaks = "responses"

    @pytest.fixture
    def connect(self) -> Connect:
        return lambda url, key: PlainResponses("plain-model", url, key)


class TestAnthropic(ClientSuite):
    speaks = "anthropic"

    @pytest.fixture
    def connect(self) -> Connect:
        return lambda url, key: PlainAnthropic("plain-model", url, key)

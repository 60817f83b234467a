"""ExampleLM keeps what every client promises, and knows where its key is."""

import pytest
from rlm_example.client import ExampleLM

from rlm.errors import AuthError
from rlm.testing import ClientSuite


class TestExample(ClientSuite):
    speaks = "openai"  # what the suite's server is to speak; None for a client without HTTP

    @pytest.fixture
    def connect(self):
        return lambda url, key: ExampleLM(base_url=url, api_key=key)


def test_without_a_key_it_says_where_to_put_one(monkeypatch):
    monkeypatch.delenv("EXAMPLE_API_KEY", raising=False)
    with pytest.raises(AuthError, match="EXAMPLE_API_KEY"):
        ExampleLM()

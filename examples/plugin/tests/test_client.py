"""ExampleLM keeps what every client promises, and knows where its key is."""

import pytest
from rlm_example.client import ExampleLM, counted

from rlm.client import Usage
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


@pytest.mark.parametrize("usage", [None, 5, {}, {"total_tokens": 9}, {"prompt_tokens": None}])
def test_what_nobody_has_counted_is_not_nothing(usage):
    assert counted(usage) is None
    assert counted({"prompt_tokens": 3, "completion_tokens": 0}) == Usage(3, 0)

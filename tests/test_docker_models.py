"""Facts about whole runs whose cells are in a container, and whose model is behind a real server."""

import pytest
from docker_support import need_engine
from llama_support import LlamaServer
from model_runs import Steered
from test_model_runs import PEEK, cell

from rlm import RLM
from rlm.testing.dialects import Behaviour, Seen
from rlm.testing.model_server import ModelServer


def test_a_run_in_a_container_goes_through_a_real_server(llama: LlamaServer) -> None:
    need_engine()
    turns = ["words = context.split()\nprint(len(words))", "import os\nFINAL([len(words), os.getuid()])"]
    client = Steered(llama, [cell(turn) for turn in turns])
    result = RLM(backend=client, environment="docker").completion("one two three", "How many words?")
    assert result.value == [3, 65534]
    assert result.usage_summary.total_cached_tokens > 0
    assert result.isolation.missing == ()


def test_a_planted_key_is_not_in_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    need_engine()
    key = "sk-planted-in-the-environment"
    monkeypatch.setenv("OPENAI_API_KEY", key)

    def reply(seen: Seen) -> Behaviour:
        assert seen.headers["authorization"] == f"Bearer {key}"
        return Behaviour(text=cell(PEEK) if "question" in seen.text else "ok")

    with ModelServer(reply) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        with RLM(backend="openai", backend_kwargs={"model_name": "m"}, environment="docker") as rlm:
            seen = rlm.completion("a context", "the question").value
    assert seen[-1] == "ok"
    assert not any(key in text for text in seen)

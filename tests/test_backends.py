"""Facts about the models of an RLM and the names that cells have for them."""

from __future__ import annotations

from typing import Any

import pytest

from rlm import RLM
from rlm.backends import Backends, connect
from rlm.client import BaseLM, Reply, Request
from rlm.config import Config
from rlm.errors import ConfigError, ModelError


class Named(BaseLM):
    """A client that says its own name, which it may know only once it is ready."""

    def __init__(self, name: str, ready: str | None = None) -> None:
        self.model_name = name
        self._ready = ready
        self.asked = 0

    async def prepare(self) -> str | None:
        self.model_name = self._ready or self.model_name
        return None

    async def complete(self, request: Request) -> Reply:
        self.asked += 1
        return Reply(f"FINAL({self.model_name})")


def backends(*names: str, **aliases: str) -> Backends:
    first, *others = map(Named, names)
    return connect(Config.create(backend=first, other_backends=others, model_aliases=aliases))


def chosen(models: Backends, model: str | None, *, sub: bool = True) -> str:
    return models.choose(model, sub=sub).client.model_name


# --- aliases -----------------------------------------------------------------------------------


def test_an_alias_is_another_name_of_a_model() -> None:
    models = backends("large", "small", fast="small", best="large")
    assert [chosen(models, name) for name in ("fast", "best", "small", "large")] == ["small", "large"] * 2
    models.check_aliases()


def test_without_a_name_aliases_change_nothing() -> None:
    models = backends("large", "small", fast="large")
    assert (chosen(models, None), chosen(models, None, sub=False)) == ("small", "large")


def test_an_alias_of_an_alias_is_none() -> None:
    with pytest.raises(ConfigError, match="'b' stands for 'a'; there is 'large'"):
        backends("large", a="large", b="a").check_aliases()


def test_an_alias_of_a_model_that_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigError, match="model_aliases: 'fast' stands for 'smal'; there is 'large'"):
        backends("large", fast="smal").check_aliases()


def test_an_alias_hides_no_model() -> None:
    with pytest.raises(ConfigError, match="model_aliases: 'small' is the name of a model already"):
        backends("large", "small", small="large").check_aliases()


@pytest.mark.parametrize("name", ["", "fas", "FAST", "x" * 1000])
def test_a_name_that_there_is_not_is_told_the_aliases_too(name: str) -> None:
    with pytest.raises(ModelError, match="it offers 'fast', 'large', 'small'"):
        backends("large", "small", fast="small").choose(name, sub=True)


@pytest.mark.parametrize("aliases", [{"a": 5}, {"a": None}, [("a", "b")], "a=b", {5: "b"}])
def test_aliases_are_names_for_names(aliases: Any) -> None:
    with pytest.raises(ConfigError, match="model_aliases"):
        Config.create(model_aliases=aliases)


# --- aliases of an RLM -------------------------------------------------------------------------


def test_an_alias_may_stand_for_a_name_that_is_known_only_when_the_client_is_ready() -> None:
    with RLM(backend=Named("unnamed", "found"), model_aliases={"it": "found"}, max_depth=0) as rlm:
        assert rlm.completion("c").response == "FINAL(found)"


def test_a_wrong_alias_is_refused_each_time_before_anything_is_asked() -> None:
    client = Named("large")
    rlm = RLM(backend=client, model_aliases={"fast": "smal"}, max_depth=0)
    for _ in range(2):
        with pytest.raises(ConfigError, match="'fast' stands for 'smal'"):
            rlm.completion("c")
    rlm.close()
    rlm.close()
    assert client.asked == 0

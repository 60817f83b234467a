"""What scripts for rlms find under ``rlm.environments``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlm.errors import UnknownPlugin

from .base_env import RESERVED_TOOL_NAMES, BaseEnv, SupportsCustomTools, SupportsPersistence
from .docker_repl import DockerREPL
from .local_repl import LocalREPL
from .sandbox import Sandbox

__all__ = [
    "RESERVED_TOOL_NAMES",
    "BaseEnv",
    "LocalREPL",
    "SupportsCustomTools",
    "SupportsPersistence",
    "get_environment",
]

_ENVIRONMENTS: tuple[type[Sandbox], ...] = (DockerREPL, LocalREPL)


def get_environment(environment: str, environment_kwargs: Mapping[str, Any]) -> Sandbox:
    """A session in the environment of that name. Raises UnknownPlugin for one that is not here."""
    kinds = {kind.environment: kind for kind in _ENVIRONMENTS}
    if environment not in kinds:
        raise UnknownPlugin(
            f"no environment is called {environment!r} here; there are {', '.join(sorted(kinds))}"
        )
    return kinds[environment](**environment_kwargs)

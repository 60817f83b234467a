"""Keys: found among settings, and kept out of whatever is printed, recorded or raised."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import SecretStr

HIDDEN = "**********"

SHORTEST = 6
"""Characters below which a value is taken for a placeholder (``"EMPTY"``, ``"none"``), not a key."""

_NAMES = re.compile(r"(key|token|secret|password|credential|authorization)s?$", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Whether a setting of this name holds a secret: ``api_key``, ``Authorization``, ``HF_TOKEN``."""
    return _NAMES.search(name) is not None


def reveal(value: str | SecretStr) -> str:
    """The text itself, for the moment of its use."""
    return value.get_secret_value() if isinstance(value, SecretStr) else value


def find(settings: Any, named: bool = False) -> set[str]:
    """Every secret among settings, however deep: a SecretStr, or text whose name says so."""
    if isinstance(settings, SecretStr):
        return {settings.get_secret_value()}
    if isinstance(settings, str):
        return {settings} if named else set()
    if isinstance(settings, Mapping):
        return set().union(*(find(value, named or is_secret(str(key))) for key, value in settings.items()))
    if isinstance(settings, list | tuple):
        return set().union(*(find(value, named) for value in settings))
    return set()


def mask(settings: Any, named: bool = False) -> Any:
    """The same settings, fit to be printed."""
    if isinstance(settings, SecretStr) or (named and isinstance(settings, str)):
        return HIDDEN
    if isinstance(settings, Mapping):
        return {key: mask(value, named or is_secret(str(key))) for key, value in settings.items()}
    if isinstance(settings, list | tuple):
        return [mask(value, named) for value in settings]
    return settings


def in_environment() -> set[str]:
    """The secrets among this process's environment variables."""
    return find(dict(os.environ))


def hide(text: str, secrets: Iterable[str]) -> str:
    """A text with every one of these secrets masked, longest first."""
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= SHORTEST:
            text = text.replace(secret, HIDDEN)
    return text

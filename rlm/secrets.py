"""Keys: found among settings, and kept out of whatever is printed, recorded or raised."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

HIDDEN = "**********"

SHORTEST = 6
"""Characters below which a value is taken for a placeholder (``"EMPTY"``, ``"none"``), not a key."""

_SCHEME = re.compile(r"(?:Basic|Bearer|Token)\s+(\S+)$", re.IGNORECASE)
"""The value of a header whose key is what follows the first word."""

_NAMES = re.compile(r"(key|token|secret|password|credential|authorization)s?$", re.IGNORECASE)


@runtime_checkable
class SecretText(Protocol):
    """pydantic's SecretStr, or a `Secret`, which costs no import of pydantic."""

    def get_secret_value(self) -> str:
        """The text itself."""


class Secret:
    """A text that prints as stars."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def get_secret_value(self) -> str:
        """The text itself."""
        return self._value

    def __repr__(self) -> str:
        return HIDDEN


_PASSWORD = re.compile(r"://[^/@:\s]*:([^/@\s]+)@")
"""A password in an address."""


def is_secret(name: str) -> bool:
    """Whether a setting of this name holds a secret: ``api_key``, ``Authorization``, ``HF_TOKEN``."""
    return _NAMES.search(name) is not None


def reveal(value: str | SecretText) -> str:
    """The text itself, for the moment of its use."""
    return value.get_secret_value() if isinstance(value, SecretText) else value


def find(settings: Any, named: bool = False) -> set[str]:
    """Every secret among settings, however deep: a SecretText, or text whose name says so."""
    if isinstance(settings, SecretText):
        return _with_key(settings.get_secret_value())
    if isinstance(settings, bytes):
        settings = settings.decode("utf-8", "replace")
    if isinstance(settings, str):
        found = {parts[1] for parts in _PASSWORD.finditer(settings)}
        return found | (_with_key(settings) if named and not settings.isdigit() else set())
    if isinstance(settings, Mapping):
        return set().union(*(find(value, named or is_secret(str(key))) for key, value in settings.items()))
    if isinstance(settings, list | tuple):
        return set().union(*(find(value, named) for value in settings))
    return set()


def _with_key(value: str) -> set[str]:
    """A secret, and the key alone where it is a header's value: servers echo that without the scheme."""
    scheme = _SCHEME.match(value)
    return {value, scheme[1]} if scheme else {value}


def mask(settings: Any, named: bool = False) -> Any:
    """The same settings, fit to be printed."""
    if isinstance(settings, SecretText) or (named and isinstance(settings, str | bytes)):
        return HIDDEN
    if isinstance(settings, str):
        name, equals, _ = settings.partition("=")  # how containers are given variables
        if equals and name.isidentifier() and is_secret(name):
            return f"{name}={HIDDEN}"
        return _PASSWORD.sub(lambda found: found[0].replace(found[1], HIDDEN), settings)
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

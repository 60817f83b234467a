"""JSON as bytes, from text that may hold what UTF-8 has no form for.

A context read from files may hold lone surrogates; a prompt made of it, and whatever is
recorded of it, carry replacement characters in their place.
"""

from __future__ import annotations

from typing import Any

import msgspec

_encoder = msgspec.json.Encoder()
_canonical = msgspec.json.Encoder(order="sorted")


def encode(value: Any) -> bytes:
    """A struct, or plain data, as JSON; lone surrogates become replacement characters."""
    return _encode(_encoder, value)


def canonical(value: Any) -> bytes:
    """As `encode`, with sorted keys: the same bytes for what is equal, in any process."""
    return _encode(_canonical, value)


def _encode(encoder: msgspec.json.Encoder, value: Any) -> bytes:
    try:
        return encoder.encode(value)
    except UnicodeEncodeError:
        return encoder.encode(_replace_surrogates(msgspec.to_builtins(value)))


def _replace_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_replace_surrogates(key): _replace_surrogates(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_surrogates(item) for item in value]
    return value

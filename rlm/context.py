"""Contexts on the host: what the user passed, as it travels and as it is described.

A context reaches the sandbox exactly as it is: text byte for byte, other data with its
types (int keys, tuples, dates). The prompt tells the model its shape and never its content.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .errors import ConfigError

Form = Literal["text", "bytes", "pickle", "tools"]


class Encoded(NamedTuple):
    """A value as it travels into a sandbox."""

    form: Form
    data: bytes


def resolve(context: Any) -> Any:
    """Read what is named by a Path: a file as its text, several or a directory as {name: text}.

    Files that are not UTF-8 are given as bytes. Everything but paths is returned as it is.
    """
    if isinstance(context, Path):
        return _read_tree(context) if context.is_dir() else _read_file(context)
    if isinstance(context, list | tuple) and context and all(isinstance(p, Path) for p in context):
        return _read_all(context)
    return context


def _read_all(paths: Iterable[Path]) -> dict[str, str | bytes]:
    """Several paths as one dict; what a directory holds goes under its name."""
    found: dict[str, str | bytes] = {}
    paths = list(paths)
    names = [path.resolve().name for path in paths]
    for path, name in zip(paths, names, strict=True):
        label = name if names.count(name) == 1 else str(path)
        if path.is_dir():
            found.update({f"{label}/{inner}": text for inner, text in _read_tree(path).items()})
        else:
            found[label] = _read_file(path)
    return found


def _read_tree(root: Path) -> dict[str, str | bytes]:
    return {path.relative_to(root).as_posix(): _read_file(path) for path in _files(root)}


def _files(root: Path) -> Iterator[Path]:
    """Files below a directory in a stable order; hidden ones and byte code are not content."""
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        if path.is_file() and not any(p.startswith(".") or p == "__pycache__" for p in parts):
            yield path


def _read_file(path: Path) -> str | bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"the context {str(path)!r} cannot be read: {error.strerror}") from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data


def encode(context: Any) -> Encoded:
    """A context as bytes that a worker turns back into the same value.

    Pickle only ever goes this way, from the host into the sandbox, never back.
    """
    if isinstance(context, Encoded):
        return context
    if isinstance(context, str):
        return Encoded("text", context.encode("utf-8", "surrogatepass"))
    if isinstance(context, bytes):
        return Encoded("bytes", context)
    try:
        return Encoded("pickle", pickle.dumps(context, protocol=4))
    except Exception as error:  # any __reduce__ may raise anything
        raise ConfigError(
            f"a context of type {type(context).__name__} cannot be sent to a sandbox ({error}): "
            "pass text, bytes, lists, dicts or paths"
        ) from error


def describe(context: Any) -> str:
    """Type and size in words, for the prompt and the trace."""
    if isinstance(context, str):
        return f"a str of {len(context):,} characters ({context.count(chr(10)) + 1:,} lines)"
    if isinstance(context, bytes | bytearray):
        return f"{type(context).__name__} of {len(context):,} bytes"
    if isinstance(context, dict):
        return _describe_dict(context)
    if isinstance(context, list | tuple | set | frozenset):
        return f"a {type(context).__name__} of {len(context):,} items{_item_types(context)}"
    return f"a value of type {type(context).__name__}"


def _describe_dict(context: dict[Any, Any]) -> str:
    text = f"a dict of {len(context):,} entries"
    if context and all(isinstance(value, str | bytes) for value in context.values()):
        total = sum(len(value) for value in context.values())
        names = ", ".join(repr(key)[:60] for key in list(context)[:5])
        more = ", ..." if len(context) > 5 else ""
        return f"{text}, name -> text, {total:,} characters in all; the first names are {names}{more}"
    return f"{text}{_item_types(context.values())}"


def _item_types(items: Iterable[Any]) -> str:
    kinds = sorted({type(item).__name__ for item in items})
    return f" of type {', '.join(kinds[:4])}" if kinds else ""

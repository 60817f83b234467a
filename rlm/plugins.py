"""A name to a class, by entry point.

Environments and clients, the built-in ones included, are found in the entry-point groups
``rlm.environments`` and ``rlm.clients``, and imported when first asked for by name. What a
package adds to the ``rlm`` command, a typer app, stands in ``rlm.commands``.
"""

from __future__ import annotations

import configparser
import dataclasses
import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from .errors import BrokenPlugin, ConfigError, PluginConflict, UnknownPlugin

if TYPE_CHECKING:  # it is slow to import, and needed for names only
    import importlib.metadata

Group = Literal["rlm.environments", "rlm.clients", "rlm.commands"]

_WORD = {"rlm.environments": "environment", "rlm.clients": "backend", "rlm.commands": "command"}


@dataclasses.dataclass(frozen=True)
class Plugin:
    """One entry point: a name, and the distribution it comes from."""

    name: str
    target: str
    distribution: str
    version: str
    entry_point: importlib.metadata.EntryPoint

    def load(self) -> Any:
        """Import the class. Raises BrokenPlugin, with the reason as its cause."""
        try:
            return self.entry_point.load()
        except Exception as error:  # a boundary: importing a stranger's module may raise anything
            raise BrokenPlugin(
                f"{self.name!r} ({self.distribution} {self.version}) is installed but cannot be "
                f"imported: {type(error).__name__}: {error}"
            ) from error


def installed(group: Group) -> list[Plugin]:
    """Every entry point of a group, by name. Nothing is imported."""
    import importlib.metadata

    found: dict[tuple[str, str, tuple[str, str]], Plugin] = {}
    first: set[str] = set()
    for distribution in importlib.metadata.distributions():
        owner = _owner(distribution)
        if owner[0] != _NOBODY and owner[0] in first:
            continue  # one of the same name further back on the path, which nobody can import
        first.add(owner[0])
        for name, target in _named(distribution, group):
            point = importlib.metadata.EntryPoint(name, target, group)
            found[name, target, owner] = Plugin(name, target, *owner, entry_point=point)
    return [plugin for _, plugin in sorted(found.items(), key=lambda item: item[0])]


_NOBODY = "unknown"


def _owner(distribution: importlib.metadata.Distribution) -> tuple[str, str]:
    """Name and version, whatever is left of the metadata."""
    try:
        return distribution.metadata["Name"] or _NOBODY, distribution.version or "?"
    except Exception:  # a boundary: some packages put a reader of their own in the place of Python's
        return _NOBODY, "?"


def _named(distribution: importlib.metadata.Distribution, group: str) -> list[tuple[str, str]]:
    """Names and targets of a distribution's entry points in a group. One odd line costs nobody else his."""
    text = distribution.read_text("entry_points.txt") or ""
    if f"[{group}]" not in text:
        return []
    parser = configparser.ConfigParser(delimiters=("=",), strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign] # names keep their capitals
    try:
        parser.read_string(text)
    except configparser.Error:
        return []
    return [(name, target.strip()) for name, target in parser.items(group)]


def load(group: Group, name: str) -> Any:
    """The class that a name stands for.

    Raises UnknownPlugin, PluginConflict or BrokenPlugin, each with what to do next.
    """
    plugins = installed(group)
    matches = [plugin for plugin in plugins if plugin.name == name]
    if len(matches) == 1:
        return matches[0].load()
    word = _WORD[group]
    if matches:
        owners = " and ".join(f"{p.distribution} {p.version} ({p.target})" for p in matches)
        raise PluginConflict(f"the {word} {name!r} is claimed by {owners}: uninstall one of them")
    names = [plugin.name for plugin in plugins]
    close = difflib.get_close_matches(name, names, 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise UnknownPlugin(
        f"no {word} is called {name!r}{hint or '.'} Installed: {', '.join(names) or 'none'}. "
        f"{_where_to_get(name, word)}"
    )


def construct(kind: Any, settings: Mapping[str, Any], what: str) -> Any:
    """An object of a plugin's class. Settings that it does not take are a ConfigError."""
    try:
        return kind(**settings)
    except TypeError as error:
        raise ConfigError(f"{what} does not take these settings: {error}") from error


def _where_to_get(name: str, word: str) -> str:
    import importlib.metadata

    try:
        extras = importlib.metadata.metadata("rlm").get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:
        extras = []
    if name in extras:
        return f"Install it with: pip install 'rlm[{name}]'"
    return f"Install a package that offers this {word}, or pass an object in place of a name."

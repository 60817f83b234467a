"""Tools: functions and data of the user's that cells find under their own names.

A function stays on the host: a cell's call of it comes through the handler like that of a model, so that it
works in every environment, and what it can do is the user's to decide. Arguments come out of a sandbox: they
are plain data, and are held against the function's signature before it is called.
"""

from __future__ import annotations

import asyncio
import builtins
import dataclasses
import functools
import inspect
import json
import keyword
import os
import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

from . import context as contexts
from .errors import ConfigError, ToolError
from .threads import Threads

RESERVED = frozenset(
    ("llm_query", "llm_query_batched", "rlm_query", "rlm_query_batched", "FINAL", "FINAL_VAR", "SHOW_VARS",
     "budget", "answer", "context", "history", "LLMError", "ToolError")
)  # fmt: skip
"""Names that are taken in every session; so are context_N and history_N."""

_NUMBERED = re.compile(r"(context|history)_\d+")

THREADS = 64
"""Calls of synchronous tools at a time."""

ARGUMENTS_LIMIT, VALUES_LIMIT = 4 << 20, 1_000_000
"""Characters of arguments, and how many values there may be in longer ones. As objects the smallest values
take thirty times their text, and all runs wait while they are made; long texts cost next to nothing."""

ERROR_LIMIT = 4000
"""Characters of what an exception says that cross into a sandbox."""


class Tools:
    """The tools of a run: functions by name, data by name."""

    def __init__(self, functions: Mapping[str, Function], values: Mapping[str, Value]) -> None:
        self.functions = dict(functions)
        self._values = dict(values)
        self._threads = Threads(THREADS, "rlm-tool")

    @classmethod
    def parse(cls, given: Mapping[str, Any] | None) -> Tools:
        """Tools as a user writes them: ``{"name": function or data}``, or with a description
        ``{"name": {"tool": function or data, "description": "..."}}``. Raises ConfigError."""
        functions, values = {}, {}
        for name, entry in (given or {}).items():
            _check_name(name)
            described = (
                isinstance(entry, dict) and "tool" in entry and not set(entry) - {"tool", "description"}
            )
            tool, text = (entry["tool"], entry.get("description")) if described else (entry, None)
            if text is not None and not isinstance(text, str):
                raise ConfigError(
                    f"the description of the tool {name!r} is a text, not {type(text).__name__}"
                )
            if callable(tool):
                functions[name] = Function.of(name, tool, text)
            else:
                _check_travels(name, tool)
                values[name] = Value(tool, text)
        return cls(functions, values)

    @property
    def values(self) -> dict[str, Any]:
        """Data by name."""
        return {name: value.value for name, value in self._values.items()}

    def __bool__(self) -> bool:
        return bool(self.functions or self._values)

    def described(self) -> str:
        """What the model is told of them, a line each; empty when there are none."""
        lines = [f"- `{name}{f.signature}`: {f.description}" for name, f in self.functions.items()]
        lines += [
            f"- `{name}`: {v.description or contexts.describe(v.value)}" for name, v in self._values.items()
        ]
        return "\n".join(lines)

    def stubs(self) -> bytes:
        """What a worker makes functions of: each name with its documentation, as JSON."""
        texts = {name: f"{name}{f.signature}\n\n{f.documentation}" for name, f in self.functions.items()}
        return json.dumps(texts).encode()

    async def call(self, name: str | None, arguments: str) -> contexts.Encoded:
        """What the function of this name returns for arguments as JSON: [by position, by name].

        Raises ToolError for anything that does not come of it.
        """
        function = self.functions.get(name or "")
        if function is None:
            raise ToolError(f"there is no tool {name!r}", "NameError")
        args, kwargs = function.checked(arguments)
        if function.is_async:
            return _encoded(function.name, await _awaited(function.call, args, kwargs))
        outcome = await self._threads.run(functools.partial(_called, function, args, kwargs))
        if isinstance(outcome, contexts.Encoded):
            return outcome
        # of a lambda around a coroutine function
        return _encoded(function.name, await _awaited(lambda: outcome, (), {}))


@dataclasses.dataclass(frozen=True)
class Value:
    """Data that is a tool."""

    value: Any
    description: str | None


@dataclasses.dataclass(frozen=True)
class Function:
    """A function that is a tool."""

    name: str
    call: Callable[..., Any]
    parameters: list[str]
    """Their names, in order."""
    signature: str
    """As text, e.g. ``(symbol: str, days: int = 7) -> dict``."""
    description: str
    """For the prompt."""
    documentation: str
    """For whoever asks for help in a cell."""
    is_async: bool
    check: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]
    """Arguments as the signature wants them. Raises TypeError, or pydantic's ValidationError."""

    @classmethod
    def of(cls, name: str, call: Callable[..., Any], description: str | None) -> Function:
        """A user's function, with the text that describes it, or else its docstring."""
        documentation = inspect.getdoc(call) or "" if not isinstance(call, functools.partial) else ""
        return cls(
            name,
            call,
            _parameters(call),
            _signature(call),
            description or " ".join(documentation.split()) or "a function",
            documentation or description or "",
            _is_coroutine_function(call),
            _checker(name, call),
        )

    def checked(self, arguments: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments that came out of a sandbox, for this function. Raises ToolError."""
        if len(arguments) > ARGUMENTS_LIMIT and sum(map(arguments.count, "[{,")) > VALUES_LIMIT:
            raise ToolError(
                f"{self.name}() takes no more than {VALUES_LIMIT:,} values at a time", "ValueError"
            )
        try:
            args, kwargs = json.loads(arguments)
            if not (isinstance(args, list) and isinstance(kwargs, dict)):
                raise ValueError
        except (TypeError, ValueError, RecursionError):
            raise ToolError("these are no arguments: [by position, by name], as JSON", "TypeError") from None
        try:
            return self.check(*args, **kwargs)
        except BaseException as error:  # whatever a validator of the user's types raises is about these
            raise ToolError(f"{self.name}(): {_complaint(error, self.parameters)}", "TypeError") from None


NO_TOOLS = Tools({}, {})


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise ConfigError(f"custom_tools: {name!r} is no name that a program can use")
    if unicodedata.normalize("NFKC", name) != name:  # as Python does with every name that it reads
        raise ConfigError(f"custom_tools: no program finds {name!r}: Python reads its letters as others")
    if name in RESERVED or _NUMBERED.fullmatch(name):
        raise ConfigError(f"custom_tools: {name!r} is the name of something that every session has")
    if name.startswith("__"):
        raise ConfigError(f"custom_tools: {name!r} is Python's own: choose a name without underscores")


def _check_travels(name: str, value: Any) -> None:
    try:
        contexts.encode(value)
    except ConfigError as error:
        raise ConfigError(
            f"custom_tools: {name!r}, a {type(value).__name__}, is neither a function nor data that can be "
            "sent to a sandbox"
        ) from error


def _parameters(call: Callable[..., Any]) -> list[str]:
    try:
        return list(inspect.signature(call).parameters)
    except (ValueError, TypeError):  # of a builtin that does not tell
        return []


def _signature(call: Callable[..., Any]) -> str:
    try:
        found = inspect.signature(call)
    except (ValueError, TypeError):  # of a builtin that does not tell
        return "(...)"
    shown = [p.replace(annotation=_shown(p.annotation), default=_plain_default(p.default))
             for p in found.parameters.values()]  # fmt: skip
    return str(found.replace(parameters=shown, return_annotation=_shown(found.return_annotation)))


@dataclasses.dataclass(frozen=True)
class _Text:
    """Shows as it is, where `inspect` would show quotes."""

    text: str

    def __repr__(self) -> str:
        return self.text


def _shown(annotation: Any) -> Any:
    """An annotation without the names of the modules in which its types live."""
    if annotation is inspect.Parameter.empty:
        return annotation
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return _Text(re.sub(r"\b(?:\w+\.)+(?=\w)", "", text))


def _plain_default(default: Any) -> Any:
    """A default that says something to whoever reads it, and nothing of the host's memory or folders."""
    if default is inspect.Parameter.empty:
        return default
    is_plain = isinstance(default, str | int | float | bool | None)
    is_short = is_plain and len(shown := repr(default)) < 200 and _without_paths(shown) == shown
    return default if is_short else _Text("...")


def _is_coroutine_function(call: Any) -> bool:
    while isinstance(call, functools.partial):
        call = call.func
    return inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(getattr(call, "__call__", None))  # noqa: B004 - an object whose call is one


def _checker(name: str, call: Callable[..., Any]) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    """A function that takes what ``call`` takes, and gives it back as the annotations want it."""

    def collect(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs

    try:
        signature = inspect.signature(call)
    except (ValueError, TypeError):
        return collect

    def bound(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        found = signature.bind(*args, **kwargs)
        return found.args, found.kwargs

    @functools.cache  # on first use: pydantic takes a while to import, and most runs have no tools
    def validator() -> Any:
        import pydantic

        plain = _like(call, signature, collect)
        try:
            return pydantic.validate_call(config={"arbitrary_types_allowed": True})(plain)
        except Exception:  # of annotations that are no types, whatever they are
            return bound

    def check(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        bound(*args, **kwargs)  # Python's own words for arguments that are missing or too many
        checked: tuple[tuple[Any, ...], dict[str, Any]] = validator()(*args, **kwargs)
        return checked

    return check


def _like(call: Callable[..., Any], signature: inspect.Signature, collect: Callable[..., Any]) -> Any:
    """``collect`` with the signature and the annotations of ``call``, in whose module they are looked up."""
    target: Any = call
    while isinstance(target, functools.partial):
        target = target.func
    if inspect.ismethod(target):
        target = target.__func__
    elif not inspect.isfunction(target):
        target = target.__init__ if inspect.isclass(target) else type(target).__call__

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        return collect(*args, **kwargs)

    stand_in.__module__ = getattr(target, "__module__", __name__)
    stand_in.__annotations__ = {
        p.name: p.annotation for p in signature.parameters.values() if p.annotation is not p.empty
    }
    stand_in.__signature__ = signature  # type: ignore[attr-defined]
    stand_in.__name__ = stand_in.__qualname__ = getattr(call, "__name__", "tool")
    return stand_in


def _complaint(error: BaseException, parameters: list[str]) -> str:
    """What is wrong with arguments, a clause each."""
    try:
        if error.error_count() > 1000:  # type: ignore[attr-defined] # of pydantic's; else it has no such thing
            return "much is wrong with these arguments"
        problems = error.errors(include_url=False, include_input=False)[:20]  # type: ignore[attr-defined]
        return "; ".join(
            f"{_place(p['loc'], parameters)}: {_without_paths(p['msg'][:ERROR_LIMIT])}" for p in problems
        )
    except Exception:
        return _words(error)


def _place(location: tuple[int | str, ...], parameters: list[str]) -> str:
    """Where in the arguments: the parameter's name, where pydantic has its number."""
    first = location[:1]
    if first and isinstance(first[0], int) and first[0] < len(parameters):
        location = (parameters[first[0]], *location[1:])
    return ".".join(map(str, location)) or "the arguments"


def _called(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """In a thread: what a call returns, ready to travel, or else what is to be awaited for it."""
    try:
        value = function.call(*args, **kwargs)
    except BaseException as error:  # a sys.exit() of the user's too is no more than a call that failed
        raise _failure(error) from error
    return value if inspect.isawaitable(value) else _encoded(function.name, value)


async def _awaited(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        value = call(*args, **kwargs)
        return await value if inspect.isawaitable(value) else value
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise _failure(error) from error
    except BaseException as error:  # which would end the loop that all runs share
        raise _failure(error) from error


def _encoded(name: str, value: Any) -> contexts.Encoded:
    """What a tool has returned, as it travels."""
    try:
        return contexts.encode(_portable(value))
    except BaseException as error:  # whatever the value's own code does when it is taken apart
        raise ToolError(
            f"{name}() returned a {type(value).__name__}, which cannot be sent to a sandbox: it has to "
            "return text, bytes, numbers, lists, dicts, or a pydantic model",
            "TypeError",
        ) from error


def _failure(error: BaseException) -> ToolError:
    """An exception as it crosses into a sandbox: the name of its type, and its text."""
    name, text = type(error).__name__, _words(error)
    return ToolError(f"{name}: {text}" if text else name, name)


def _words(error: BaseException) -> str:
    """What an exception says, without paths of this machine."""
    try:
        strerror = getattr(error, "strerror", None)  # of an OSError: its text, without the file's name
        text = strerror if isinstance(strerror, str) else str(error)
    except BaseException as second:  # code of the user's
        return f"(its text could not be had: {type(second).__name__})"
    return _without_paths(text[:ERROR_LIMIT])


_PATH = re.compile(r"(?<![\w/:.])(?:file://)?(/[^\s/:'\"<>|]+)((?:/[^\s/:'\"<>|]*)+)")


def _without_paths(text: str) -> str:
    """A text in which of every path of this machine only the last part is left."""

    def shorten(found: re.Match[str]) -> str:
        if not os.path.isdir(found[1]):
            return found[0]  # not of this machine: the path of an address, say
        return "…/" + found[0].rstrip("/").rpartition("/")[2]

    return _PATH.sub(shorten, text)


def _portable(value: Any) -> Any:
    """A value without types that only the host knows: models and dataclasses become dicts."""
    if isinstance(value, str | bytes | int | float | None):
        return value if type(value).__module__ == builtins.__name__ else _plain(value)
    if hasattr(type(value), "model_dump"):
        return value.model_dump()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _portable(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(map(_portable, value))
    if type(value) is dict:
        return {_portable(key): _portable(item) for key, item in value.items()}
    return value


def _plain(value: Any) -> Any:
    """A member of an enum, say, as what it is a kind of."""
    kind = next(kind for kind in (str, bytes, int, float) if isinstance(value, kind))
    return kind(value.value if hasattr(value, "value") else value)

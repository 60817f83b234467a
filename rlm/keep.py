"""Saves the variables of a session as bytes, and puts them back, in whatever process is its own by then.

Runs in the executor, with the variables' own code, and travels there when the host asks for it: standard
library only, CPython 3.8 and later, and the source of cloudpickle beside it, which knows how functions
and classes that cells have defined are taken along. What the host has put into a session (contexts, tools,
what a cell can call) is saved as a name. The host never reads what comes out of here.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import io
import os
import pickle
import sys
import types
from collections.abc import Iterator
from typing import Any

SMALL = 1 << 10
"""Bytes up to which text of the host's is saved like any other: there are many equal ones."""

NAMED = 50
"""Things that were lost and are named one by one."""

SKIPPED = frozenset(
    ("__builtins__", "__name__", "__doc__", "__loader__", "__package__", "__spec__", "_", "answer")
)
"""What a namespace has of itself, and ``answer``, which is its completion's."""


class Keeper:
    """Takes the variables of one namespace out, and in."""

    def __init__(self, names: dict[str, Any], reserved: dict[str, Any], cloudpickle: bytes) -> None:
        self._names = names
        self._reserved = reserved
        self._library = types.ModuleType("cloudpickle.cloudpickle")
        with self._importable():
            exec(compile(cloudpickle, "cloudpickle/cloudpickle.py", "exec"), self._library.__dict__)
        self._pickler = _pickler(self._library, names)

    @contextlib.contextmanager
    def _importable(self) -> Iterator[None]:
        """Let pickles find the library by its name, and a cell that has one of its own find that again."""
        package = types.ModuleType("cloudpickle")
        package.cloudpickle = self._library  # type: ignore[attr-defined]
        ours = {"cloudpickle": package, "cloudpickle.cloudpickle": self._library}
        theirs = {name: sys.modules.get(name) for name in ours}
        sys.modules.update(ours)
        try:
            yield
        finally:
            for name, module in theirs.items():
                if module is None:
                    sys.modules.pop(name, None)
                else:
                    sys.modules[name] = module

    def save(self, limit: int) -> tuple[bytes, list[str]]:
        """Every variable that can be saved, and the others with the reason why they cannot.

        Raises ValueError for more bytes than ``limit``.
        """
        wanted = {k: v for k, v in self._names.items() if k not in self._reserved and k not in SKIPPED}
        lost: list[str] = []
        with self._importable(), _unnamed():
            try:
                data = self._dump(wanted, limit)
            except (_TooLarge, KeyboardInterrupt):
                raise
            except BaseException:  # something in it: one by one, then, to find out what
                for name in list(wanted):
                    try:
                        self._dump({name: wanted[name]}, limit)
                    except (_TooLarge, KeyboardInterrupt):
                        raise
                    except BaseException as error:  # whatever an object does when it is pickled
                        lost.append(f"{name} ({type(wanted.pop(name)).__name__}: {_first(error)})")
                data = self._dump(wanted, limit)
        if files := _files():
            lost.append(f"what is in the working directory: {', '.join(files[:5])}")
        return data, _listed(lost)

    def load(self, data: bytes) -> list[str]:
        """Put saved variables back, all of them, or raise what unpickling raises. Returns their names."""
        names, reserved = self._names, self._reserved

        class Unpickler(pickle.Unpickler):
            def persistent_load(self, key: Any) -> Any:
                return names if key[0] is None else reserved[key[0]]

        with self._importable():
            values = Unpickler(io.BytesIO(data)).load()
        if type(values) is not dict or not all(type(name) is str for name in values):
            raise ValueError("these are no variables")
        names.update(values)
        names["__builtins__"] = builtins
        return _listed(sorted(values))

    def _dump(self, values: dict[str, Any], limit: int) -> bytes:
        known = {id(value): name for name, value in self._reserved.items() if _is_worth_a_name(value)}
        file = _Bounded(limit)
        self._pickler(file, known).dump(values)
        return file.getvalue()


@contextlib.contextmanager
def _unnamed() -> Iterator[None]:
    """Let nothing that cells have made be saved as a name in their module: no other process has it there."""
    ours = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = ours


def _files() -> list[str]:
    try:
        return sorted(os.listdir("."))
    except OSError:  # a cell has gone where nothing can be seen, or to what is no more
        return []


class _TooLarge(ValueError):
    """The variables are more than may be saved."""


class _Bounded(io.BytesIO):
    """Takes so many bytes and no more."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._left = limit

    def write(self, data: Any) -> int:
        self._left -= memoryview(data).nbytes
        if self._left < 0:
            raise _TooLarge("the variables are too large to be saved: delete what is not needed any more")
        return super().write(data)


def _pickler(library: Any, names: dict[str, Any]) -> Any:
    """A class of picklers for which the namespace, and what the host put into it, are names."""

    class Pickler(library.Pickler):  # type: ignore[misc]
        def __init__(self, file: Any, known: dict[int, str]) -> None:
            super().__init__(file, protocol=pickle.DEFAULT_PROTOCOL)
            self._known = known
            self.globals_ref[id(names)] = names  # functions of cells find the namespace itself again

        def persistent_id(self, value: Any) -> Any:
            if value is names:
                return (None,)
            name = self._known.get(id(value))
            return None if name is None else (name,)

        def reducer_override(self, value: Any) -> Any:
            if type(value) is functools._lru_cache_wrapper and value.__module__ == "__main__":
                return _cached, (value.__wrapped__, value.cache_info().maxsize)
            return super().reducer_override(value)

        def _dynamic_function_reduce(self, function: Any) -> Any:
            reduced = super()._dynamic_function_reduce(function)
            if function.__globals__ is names:  # these are saved as variables, once
                reduced[2][1]["__globals__"] = {}
            return reduced

    return Pickler


def _cached(function: Any, size: int | None) -> Any:
    """A function of a cell's that keeps what it has returned: it begins with nothing."""
    return functools.lru_cache(size)(function)


def _is_worth_a_name(value: Any) -> bool:
    return not isinstance(value, (str, bytes, int, float, bool, type(None))) or sys.getsizeof(value) > SMALL


def _first(error: BaseException) -> str:
    """The first line of what an error says."""
    try:
        return str(error).splitlines()[0][:200]
    except BaseException:  # its text is code of the cell's, or it has none
        return type(error).__name__


def _listed(names: list[str]) -> list[str]:
    more = len(names) - NAMED
    return names if more <= 0 else [*names[:NAMED], f"and {more} more"]

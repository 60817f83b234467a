"""What data has to look like: told to a model, and checked when it comes.

A schema is a type of the host's, or a JSON schema. That may come out of a sandbox, and so may the
data: what is done to bear them is in `rlm.validator`.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

from .errors import ConfigError, RLMError
from .validator import STEPS, Validator, clip, listed


class Schema(ABC):
    """What data has to look like."""

    text: str
    """As a JSON schema, to be told to a model."""
    longest: float = math.inf
    """Characters of a text that is read."""
    takes_all = False
    """Whether it says nothing of what type data is: then JSON is not taken for the text that it is."""

    def parse(self, text: str, value: Any = None) -> tuple[Any, str | None]:
        """The data, and why it is not accepted, if it is not.

        ``value`` is the answer as data where it was plain data, ``text`` its text: JSON, which may
        stand in a fence, or else itself the data. Raises RLMError when the check itself fails.
        """
        if value is not None:
            return self._check(value)
        if len(text) > self.longest:
            return None, f"the answer: it is longer than {self.longest:,} characters"
        outcomes: list[tuple[Any, str | None]] = []
        for reading, problem in self._readings(text):
            outcomes.append((None, problem) if problem else self._check(reading))
            if outcomes[-1][1] is None:
                return outcomes[-1]
        return outcomes[0]

    def _readings(self, text: str) -> Iterator[tuple[Any, str | None]]:
        """What a text may be meant to be, the likeliest first; or why it cannot be that."""
        bare = _bare(text)
        is_json, found = _json(bare)
        looks_like_json = is_json or bare.startswith(("{", "[", '"'))
        if looks_like_json:
            yield found, None if is_json else f"the answer: it is not JSON: {found}"
        if not (self.takes_all and looks_like_json):
            yield text, None
            yield bare, None

    @abstractmethod
    def plain(self, parsed: Any) -> Any:
        """What `parse` made of data, as plain data again. Raises RLMError when it cannot be."""

    @abstractmethod
    def _check(self, value: Any) -> tuple[Any, str | None]:
        """As `parse`, for plain data."""


def of_type(kind: Any) -> Schema:
    """The schema of a pydantic model, or of any type that pydantic can make an adapter of.

    Raises ConfigError for anything else.
    """
    return _TypeSchema(kind)


def of_json(schema: dict[str, Any], *, steps: int = STEPS) -> Schema:
    """A JSON schema, of draft 2020-12 unless it says otherwise; ``steps`` is what one check may cost.

    Raises ConfigError, saying what is wrong with it, or which part of it is not supported: references
    other than ``#`` and ``#/...``, identifiers below the top, ``unevaluated...``, look-around.
    """
    return _JSONSchema(schema, steps)


# -- texts


def _bare(text: str) -> str:
    """A text without white space around it, and without the fence it may stand in."""
    bare = text.strip()
    if bare.startswith("```") and bare.endswith("```") and "\n" in bare:
        return bare.partition("\n")[2][:-3].strip()
    return bare


def _json(text: str) -> tuple[bool, Any]:
    """Whether a text is JSON, and what it holds, or else why not."""
    try:
        return True, json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        return False, "it is nested too deeply"
    except ValueError as error:
        return False, str(error)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"JSON has no {name}")


# -- types


class _TypeSchema(Schema):
    def __init__(self, kind: Any) -> None:
        self._adapter = _adapter(kind)
        self.text = json.dumps(self._adapter.json_schema(), ensure_ascii=False)

    def _check(self, value: Any) -> tuple[Any, str | None]:
        from pydantic import ValidationError

        try:
            # as JSON, in which a strict model takes what JSON has no type for: dates, tuples, bytes
            return self._adapter.validate_json(json.dumps(value)), None
        except ValidationError as error:
            return None, listed((item["loc"], item["msg"]) for item in error.errors(include_url=False))
        except (TypeError, ValueError, RecursionError) as error:
            return None, f"the answer: it is no plain data: {clip(str(error))}"
        except Exception as error:  # a boundary: validators of a model are somebody else's code
            raise RLMError(f"checking an answer failed: {type(error).__name__}: {error}") from error

    def plain(self, parsed: Any) -> Any:
        try:
            return self._adapter.dump_python(parsed, mode="json")
        except Exception as error:  # a boundary: serializers of a model are somebody else's code
            raise RLMError(f"an answer is no plain data: {type(error).__name__}: {error}") from error


def _adapter(kind: Any) -> Any:
    from pydantic import PydanticUndefinedAnnotation, PydanticUserError, TypeAdapter

    try:
        adapter: Any = TypeAdapter(kind)
        adapter.json_schema()
    except (PydanticUserError, PydanticUndefinedAnnotation, SyntaxError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{kind!r} is no type that pydantic knows how to check: {reason}") from None
    return adapter


# -- JSON schemas


class _JSONSchema(Schema):
    def __init__(self, schema: dict[str, Any], steps: int) -> None:
        self._validator = Validator(schema, steps)
        self.text = self._validator.text
        self.takes_all = self._validator.takes_all
        self.longest = steps * 100  # to read them takes about as long

    def _check(self, value: Any) -> tuple[Any, str | None]:
        complaint = self._validator.complaint(value)
        return (value, None) if complaint is None else (None, complaint)

    def plain(self, parsed: Any) -> Any:
        return parsed


# -- names


def _of_setting(name: str, kind: Any) -> Schema:
    try:
        return of_json(kind) if isinstance(kind, dict) else of_type(kind)
    except ConfigError as error:
        raise ConfigError(f"schemas: {name!r}: {error}") from None


class Schemas:
    """Schemas that cells may ask for by name, and what else they may ask for: a JSON schema."""

    def __init__(self, named: Mapping[str, Any] | None = None) -> None:
        self._named = {name: _of_setting(name, kind) for name, kind in (named or {}).items()}

    @property
    def names(self) -> list[str]:
        """Those that there are, in order."""
        return list(self._named)

    def of(self, wanted: Any) -> Schema:
        """What a cell asks for. Raises ConfigError for a name that there is not, or no JSON schema."""
        if not isinstance(wanted, str):
            return of_json(wanted)
        found = self._named.get(wanted)
        if found is None:
            offered = ", ".join(map(repr, self._named)) or "none"
            raise ConfigError(f"there is no schema called {wanted[:100]!r}; there is {offered}")
        return found

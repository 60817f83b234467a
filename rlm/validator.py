"""A validator for JSON schemas that nobody trusts, and for data that nobody trusts either.

jsonschema's, held to bounds. A schema refers to nothing but itself, its patterns are matched in
linear time and not by `re`, and what checking it or anything against it takes is counted, and ends
in time. Formats are not checked.
"""

from __future__ import annotations

import contextvars
import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import Any

from .errors import ConfigError

SIZE = 64 << 10
"""Bytes a JSON schema may have: it is read by a model, with every question."""

DEPTH = 64
"""Levels of a JSON schema, or of data that is checked against one: each is several calls deep."""

STEPS = 50_000
"""Work that one check against a JSON schema may be: about as many keywords, or a third of a second."""

PROBLEMS, WORDS = 20, 200
"""Problems that one complaint lists, and characters of each."""

BITS = 14_000
"""Of a whole number: Python writes no longer ones, in messages as little as in JSON."""

PATTERN = 2000
"""Characters of one pattern: to weigh it takes the square of them, at worst."""


def listed(problems: Iterable[tuple[Iterable[Any], str]]) -> str:
    """Problems as one complaint; each has a path and what is wrong there."""
    return "; ".join(
        f"{clip('.'.join(map(str, path)), WORDS // 2) or 'the answer'}: {clip(words)}"
        for path, words in itertools.islice(problems, PROBLEMS)
    )


def clip(text: str, limit: int = WORDS) -> str:
    """A text without its middle, if it is long: what is wrong stands at its end."""
    return text if len(text) <= limit else f"{text[: limit // 3]}...{text[3 - limit + limit // 3 :]}"


class Validator:
    """A JSON schema, of draft 2020-12 unless it says otherwise; ``steps`` is what one check may cost.

    Raises ConfigError, saying what is wrong with it, or what of it is not supported.
    """

    def __init__(self, schema: dict[str, Any], steps: int = STEPS) -> None:
        self._steps = steps
        self._patterns: dict[str, tuple[int, Any]] = {}
        try:
            with _Work(steps, self._patterns):
                self.text = _schema_text(schema)
                self._validator = _validator(schema)
                # which also ends one that refers to itself, or again and again to others
                samples: list[Any] = [None, True, [], {}]
                null, true, array, table = (not self._problems(item) for item in samples)
                self.takes_all = null and true and (array or table)
        except _TooMuch as error:
            raise ConfigError(f"the JSON schema is {error}: make it simpler") from None

    def complaint(self, value: Any) -> str | None:
        """Why plain data does not fit; None when it does. Raises ConfigError when nobody can tell."""
        try:
            with _Work(self._steps, self._patterns):
                return _not_plain(value) or self._problems(value) or None
        except _TooMuch as error:
            return f"the answer: it is {error}"

    def _problems(self, value: Any) -> str:
        try:
            return listed(map(_problem, self._validator.iter_errors(value)))
        except RecursionError:
            raise _TooMuch("nested too deeply to be checked") from None
        except (_TooMuch, ConfigError):
            raise
        except Exception as error:  # a boundary: a library, with what a sandbox made of its arguments
            raise ConfigError(f"the JSON schema cannot be applied: {type(error).__name__}") from error


class _TooMuch(Exception):
    """A check ends here: what it would cost is not spent."""


class _Work:
    """What one check has cost, and the patterns it has compiled. A context manager; not reentrant."""

    def __init__(self, steps: int, patterns: dict[str, tuple[int, Any]]) -> None:
        self._left = steps
        self._patterns = patterns
        self._sizes: dict[int, int] = {}

    def __enter__(self) -> _Work:
        self._token = _work.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _work.reset(self._token)

    def spend(self, steps: int) -> None:
        """Count what is about to be done. Raises _TooMuch."""
        self._left -= steps
        if self._left < 0:
            raise _TooMuch("too much work to check")

    def size(self, value: Any) -> int:
        """How many values a part of a schema holds."""
        if id(value) not in self._sizes:
            self._sizes[id(value)] = sum(1 for _ in _values(value))
        return self._sizes[id(value)]

    def matches(self, pattern: str, text: str) -> bool:
        """Whether a pattern is found in a text; in linear time, and that is counted."""
        if pattern not in self._patterns:
            weight = _weight(pattern)
            self.spend(weight)
            self._patterns[pattern] = weight, _compile(pattern)
        weight, matcher = self._patterns[pattern]
        self.spend(1 + weight * len(text) // 1000)
        return bool(matcher.isinstance_python(text))


_work: contextvars.ContextVar[_Work] = contextvars.ContextVar("rlm_schema_work")

_DRAFTS = {
    "http://json-schema.org/draft/2020-12/schema": "Draft202012Validator",
    "http://json-schema.org/draft/2019-09/schema": "Draft201909Validator",
    "http://json-schema.org/draft-07/schema": "Draft7Validator",
    "http://json-schema.org/draft-06/schema": "Draft6Validator",
    "http://json-schema.org/draft-04/schema": "Draft4Validator",
}

_NAMED = {"properties", "patternProperties", "dependentSchemas", "dependencies", "$defs", "definitions"}
"""Keywords whose value holds schemas by names; in the other ones it is a schema, or a list of some."""

_APPLIED = {
    "items", "additionalItems", "prefixItems", "contains", "additionalProperties", "propertyNames",
    "allOf", "anyOf", "oneOf", "not", "if", "then", "else",
}  # fmt: skip


def _schema_text(schema: Any) -> str:
    if not isinstance(schema, dict):
        raise ConfigError(f"a JSON schema is a dict, not a {type(schema).__name__}")
    problem = _not_plain(schema)
    if problem:
        raise ConfigError(f"this is no JSON schema: {problem.removeprefix('the answer: ')}")
    text = json.dumps(schema, ensure_ascii=False)
    if len(text.encode("utf-8", "replace")) > SIZE:
        raise ConfigError(f"the JSON schema is longer than {SIZE:,} bytes: make it shorter")
    return text


def _validator(schema: dict[str, Any]) -> Any:
    """A validator for a schema that has been looked through."""
    from referencing import Registry

    kind = _kind(_draft(schema.get("$schema")))
    _check_against_metaschema(kind, schema)
    root = {key: value for key, value in schema.items() if key not in ("$schema", "$id", "id")}
    known = _subschemas(root, _known(kind.VALIDATORS))
    validator = kind(root, registry=Registry())
    resolve = Registry().with_resource("", _resource(kind, root)).resolver().lookup
    places = {id(item) for item in known}
    for item in known:
        _check_references(item, resolve, places)
        _check_keywords(item, kind.ID_OF(item))
    return validator


def _draft(name: Any) -> str:
    if name is None:
        return "Draft202012Validator"
    draft = _DRAFTS.get(name.rstrip("#").replace("https:", "http:")) if isinstance(name, str) else None
    if draft is None:
        raise ConfigError(f"the JSON schema's $schema is {clip(repr(name))}: leave it out, for draft 2020-12")
    return draft


def _check_against_metaschema(kind: Any, schema: dict[str, Any]) -> None:
    from referencing import Registry

    try:
        problems = listed(map(_problem, kind(kind.META_SCHEMA, registry=Registry()).iter_errors(schema)))
    except RecursionError:
        raise _TooMuch("nested too deeply to be checked") from None
    if problems:
        raise ConfigError(f"the JSON schema is not valid: {problems.replace('the answer: ', '')}")


def _resource(kind: Any, schema: dict[str, Any]) -> Any:
    from referencing.jsonschema import specification_with

    return specification_with(kind.ID_OF(kind.META_SCHEMA)).create_resource(schema)


def _known(keywords: Iterable[str]) -> set[str]:
    """Those keywords of a draft in whose values there are schemas, which its metaschema has checked."""
    known = {*keywords, "definitions"}
    known |= {"then", "else"} if "if" in known else set()
    known |= {"$defs"} if "dependentSchemas" in known else set()
    return known & (_NAMED | _APPLIED)


def _subschemas(root: dict[str, Any], known: set[str]) -> list[dict[str, Any]]:
    """A schema, and every one in it."""
    found = [root]
    for schema in found:  # which grows
        for key in known & schema.keys():
            value = schema[key]
            inner = value.values() if key in _NAMED else value if isinstance(value, list) else [value]
            found += [item for item in inner if isinstance(item, dict)]
    return found


def _check_references(schema: dict[str, Any], resolve: Callable[[str], Any], places: set[int]) -> None:
    """That a schema refers to schemas in the same document. Anchors would be looked for at each use."""
    from referencing.exceptions import Unresolvable

    for key in ("$ref", "$dynamicRef", "$recursiveRef"):
        reference = schema.get(key, "#")  # in some drafts it may be anything
        shown = f"the JSON schema's {key} {clip(repr(reference))}"
        if reference != "#" and not (isinstance(reference, str) and reference.startswith("#/")):
            raise ConfigError(f"{shown} is not supported: refer to a place in the schema, as '#/$defs/name'")
        try:
            target = resolve(reference).contents
        except (Unresolvable, AttributeError, TypeError, ValueError):
            raise ConfigError(f"{shown} points to nothing") from None
        if not isinstance(target, bool) and id(target) not in places:
            raise ConfigError(f"{shown} points to something that is no schema")


def _check_keywords(schema: dict[str, Any], identifier: str | None) -> None:
    if identifier is not None or "$schema" in schema:
        raise ConfigError("the JSON schema has an identifier or a $schema below its top: take it out")
    for key in ("unevaluatedItems", "unevaluatedProperties"):
        if key in schema:
            raise ConfigError(f"the JSON schema's {key} is not supported: use additionalProperties, or items")
    for pattern in [schema.get("pattern"), *schema.get("patternProperties", ())]:
        if pattern is not None:
            _work.get().matches(pattern, "")


def _problem(error: Any) -> tuple[Iterable[Any], str]:
    """Where an error is, and what. Of alternatives, the first few ways in which none fits."""
    reasons = [": ".join([*map(str, item.path), item.message]) for item in itertools.islice(error.context, 3)]
    return error.absolute_path, f"{error.message} ({'; '.join(reasons)})" if reasons else error.message


# -- data


def _not_plain(value: Any) -> str:
    """Why a value is not what JSON can hold, or is nested too deeply; empty if it is neither."""
    work = _work.get()
    for count, (item, depth) in enumerate(_values(value)):
        if count % 16 == 0:
            work.spend(1)
        if depth > DEPTH:
            return f"the answer: it is nested deeper than {DEPTH} levels"
        kind = type(item)
        if kind is float and not math.isfinite(item):
            return f"the answer: JSON has no number {item}"
        if kind is int and item.bit_length() > BITS:
            return "the answer: it holds a whole number that is too long"
        if kind is dict and not all(type(key) is str for key in item):
            return "the answer: the names in an object are strings"
        if item is not None and kind not in (bool, int, float, str, list, dict):
            return f"the answer: a {kind.__name__} is not plain data"
    return ""


def _values(value: Any) -> Iterator[tuple[Any, int]]:
    """A value and all that it holds, each with its depth. Of what holds itself there is no end."""
    stack = [iter([value])]
    while stack:
        for item in stack[-1]:
            yield item, len(stack) - 1
            if isinstance(item, list | dict):
                stack.append(iter(item.values() if isinstance(item, dict) else item))
                break
        else:
            stack.pop()


# -- patterns

_TOKEN = re.compile(r"\\[pP]\{[^}]*\}|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(\d+)(?:,(\d*))?\}|.", re.DOTALL)
"""What a pattern is made of. No two of its repetitions can match the same character."""

_MANY = 50
"""What a class of characters weighs that has hundreds of ranges in Unicode."""


def _weight(pattern: str) -> int:
    """About how large a pattern is when its repetitions are written out. Raises ConfigError."""
    if len(pattern) > PATTERN or re.search(r"\(\?[a-zA-Z-]*x", pattern):
        raise _not_supported(pattern)
    sums, last = [0], 0
    for token in _TOKEN.finditer(pattern):
        if token[1] is not None:
            more = last * max(int(token[1]) - 1, int(token[2] or 0) - 1, 0)
            sums[-1] += more
            last += more
        elif token[0] in "*+?":  # and it is still the same that is repeated
            continue
        elif token[0] == "(":
            sums.append(0)
        elif token[0] == ")" and len(sums) > 1:
            last = sums.pop() + 1
            sums[-1] += last
        else:
            last = _MANY if token[0][0] in "\\[" and re.search(r"\\[pPwWdDsS]|\[\^", token[0]) else 1
            sums[-1] += last
    return sum(sums) * (_MANY if "(?" in pattern and re.search(r"\(\?\w*i", pattern) else 1)


def _compile(pattern: str) -> Any:
    """A pattern for an engine without backtracking. Raises ConfigError when it does not support it."""
    from pydantic_core import SchemaError, SchemaValidator, core_schema

    try:
        return SchemaValidator(core_schema.str_schema(pattern=pattern, regex_engine="rust-regex"))
    except SchemaError:
        raise _not_supported(pattern) from None


def _not_supported(pattern: str) -> ConfigError:
    return ConfigError(
        f"the pattern {clip(repr(pattern))} is not supported: it is not valid, or too large, "
        "or has look-around or back references"
    )


# -- keywords


@functools.cache
def _kind(draft: str) -> Any:
    """One of jsonschema's validators, with keywords that count what they do."""
    import attrs
    import jsonschema

    stock: Any = getattr(jsonschema, draft)
    ours = {
        "pattern": _pattern, "patternProperties": _pattern_properties, "uniqueItems": _unique_items,
        "additionalProperties": _additional_properties, "multipleOf": _multiple_of,
    }  # fmt: skip
    keywords = {key: _counted(key, ours.get(key, keyword)) for key, keyword in stock.VALIDATORS.items()}
    kind: Any = jsonschema.validators.extend(stock, keywords)
    kind.evolve = attrs.evolve  # jsonschema's own goes back to the stock class where there is a $schema
    return kind


def _counted(key: str, keyword: Any) -> Any:
    def counted(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any]:
        work = _work.get()
        work.spend(_cost(work, key, value, instance))
        for error in keyword(validator, value, instance, schema) or ():
            work.spend(1 + len(error.message) // 1000)  # the whole of the data may be in it
            error.message = clip(error.message)
            yield error

    return counted


_EACH_ITEM = {"items", "additionalItems", "contains", "propertyNames", "additionalProperties"}
_EACH_SCHEMA = {"allOf", "anyOf", "oneOf", "prefixItems", "dependentSchemas", "dependencies"}


def _cost(work: _Work, key: str, value: Any, instance: Any) -> int:
    """What it takes to apply a keyword itself; what it applies in turn is counted there, if at all."""
    if key in ("const", "enum"):
        return 1 + work.size(value) // 8
    many = len(value) if isinstance(value, list | dict) else 0
    items = len(instance) if isinstance(instance, list | dict) else 0
    if key in _EACH_ITEM:
        return 1 + items // 2
    if key in _EACH_SCHEMA:
        return 1 + many
    return 1 + many // 16 + (min(many, items) // 2 if key == "properties" else 0)


def _error(message: str) -> Any:
    from jsonschema import ValidationError

    return ValidationError(message)


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[Any]:
    if isinstance(instance, str) and not _work.get().matches(pattern, instance):
        yield _error(f"{clip(repr(instance), WORDS // 2)} does not match {clip(repr(pattern), WORDS // 2)}")


def _pattern_properties(
    validator: Any, patterns: dict[str, Any], instance: Any, schema: Any
) -> Iterator[Any]:
    for pattern, inner in patterns.items() if isinstance(instance, dict) else ():
        for name, item in instance.items():
            if _work.get().matches(pattern, name):
                yield from validator.descend(item, inner, path=name, schema_path=pattern)


def _additional_properties(validator: Any, inner: Any, instance: Any, schema: Any) -> Iterator[Any]:
    if not isinstance(instance, dict):
        return
    named, patterns, work = schema.get("properties", {}), schema.get("patternProperties", ()), _work.get()
    for name, item in instance.items():
        if name in named or any(work.matches(pattern, name) for pattern in patterns):
            continue
        if inner is False:
            yield _error(f"there is to be no {clip(repr(name), WORDS // 2)}")
        else:
            yield from validator.descend(item, inner, path=name)


def _unique_items(validator: Any, unique: bool, instance: Any, schema: Any) -> Iterator[Any]:
    if not unique or not isinstance(instance, list):
        return
    seen: dict[str, int] = {}  # of texts, for which nobody can find many of one hash
    for index, item in enumerate(instance):
        text = json.dumps(_same(item), sort_keys=True)
        _work.get().spend(1 + len(text) // 100)
        first = seen.setdefault(text, index)
        if first != index:
            yield _error(f"item {index} is the same as item {first}")
            return


def _same(value: Any) -> Any:
    """What is equal in JSON, in one form: 1 and 1.0."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_same(item) for item in value]
    if isinstance(value, dict):
        return {key: _same(item) for key, item in value.items()}
    return value


def _multiple_of(validator: Any, unit: Any, instance: Any, schema: Any) -> Iterator[Any]:
    """By the numbers as they are written: 0.3 is a multiple of 0.1. None is too large for it."""
    is_number = isinstance(instance, int | float) and not isinstance(instance, bool)
    if is_number and Fraction(repr(instance)) % Fraction(repr(unit)):
        yield _error(f"{clip(repr(instance))} is not a multiple of {unit!r}")

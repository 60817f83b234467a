"""What a final answer has to be: data of a type, and to a validator's liking."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from .errors import ConfigError, RLMError

Validator = Callable[[str], str | None]
"""Told an answer's text; None accepts it, a text says to the model what is wrong with it."""


class AnswerCheck:
    """Accepts a final answer, or says what is wrong with it.

    ``model`` is a pydantic model, or any type that pydantic can make an adapter of.
    """

    def __init__(self, model: Any = None, validator: Validator | None = None) -> None:
        self._adapter = _adapter(model) if model is not None else None
        self._validator = validator

    def wanted(self) -> str:
        """What the model is told of it; empty when any answer will do."""
        if self._adapter is None:
            return ""
        schema = json.dumps(self._adapter.json_schema(), ensure_ascii=False)
        return f"Submit data that fits this JSON schema, as a value and not as text about it: {schema}"

    async def check(self, text: str, value: Any) -> tuple[Any, str | None]:
        """The answer as the type asked for, if one was; and why it is not accepted, if it is not.

        ``value`` is the answer as data where it was plain data, ``text`` is its text. Raises
        RLMError when the validator itself fails.
        """
        parsed = value
        if self._adapter is not None:
            parsed, complaint = self._parse(text, value)
            if complaint is not None:
                return None, complaint
        if self._validator is None:
            return parsed, None
        return parsed, await self._ask(self._validator, text)

    def _parse(self, text: str, value: Any) -> tuple[Any, str | None]:
        from pydantic import ValidationError

        assert self._adapter is not None
        try:
            if value is not None:
                return self._adapter.validate_python(value), None
            try:
                return self._adapter.validate_json(text), None
            except ValidationError:
                return self._adapter.validate_python(text), None  # a type for which plain text will do
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, e['loc'])) or 'the answer'}: {e['msg']}" for e in error.errors()]
            return None, "; ".join(problems[:20])

    async def _ask(self, validator: Validator, text: str) -> str | None:
        try:
            complaint = await asyncio.to_thread(validator, text)
        except Exception as error:  # a boundary: the validator is somebody else's code
            raise RLMError(f"final_answer_validator failed: {type(error).__name__}: {error}") from error
        if complaint is not None and (not isinstance(complaint, str) or not complaint.strip()):
            raise ConfigError(
                f"final_answer_validator returned {complaint!r}: it is None, or says what is wrong"
            )
        return complaint


def _adapter(model: Any) -> Any:
    from pydantic import TypeAdapter
    from pydantic.errors import PydanticSchemaGenerationError

    try:
        return TypeAdapter(model)
    except PydanticSchemaGenerationError:
        raise ConfigError(f"response_model={model!r} is no type that pydantic knows how to check") from None

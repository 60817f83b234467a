"""What a final answer has to be: data of a type, and to a validator's liking."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from . import schemas
from .errors import ConfigError, RLMError

STEPS = 5_000_000
"""What a check against the host's own JSON schema may cost: enough for any answer that a sandbox can give."""

Validator = Callable[[str], str | None]
"""Told an answer's text; None accepts it, a text says to the model what is wrong with it."""


class AnswerCheck:
    """Accepts a final answer, or says what is wrong with it.

    ``model`` is a pydantic model, any type that pydantic can make an adapter of, or a JSON schema;
    ``schema`` is what has been made of one already. Raises ConfigError for anything else.
    """

    def __init__(
        self,
        model: Any = None,
        validator: Validator | None = None,
        *,
        schema: schemas.Schema | None = None,
    ) -> None:
        self._schema = schema if model is None else _schema(model)
        self._validator = validator

    def wanted(self) -> str:
        """What the model is told of it; empty when any answer will do."""
        if self._schema is None:
            return ""
        told = "Submit data that fits this JSON schema, as a value and not as text about it:"
        return f"{told} {self._schema.text}"

    async def check(self, text: str, value: Any) -> tuple[Any, str | None]:
        """The answer as the type asked for, if one was; and why it is not accepted, if it is not.

        ``value`` is the answer as data where it was plain data, ``text`` is its text. Raises
        RLMError when the schema or the validator itself fails.
        """
        parsed = value
        if self._schema is not None:
            # a large answer takes a while, and holds up no other run
            parsed, complaint = await asyncio.to_thread(self._schema.parse, text, value)
            if complaint is not None:
                return None, complaint
        if self._validator is None:
            return parsed, None
        return parsed, await self._ask(self._validator, text)

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


def _schema(model: Any) -> schemas.Schema:
    return schemas.of_json(model, steps=STEPS) if isinstance(model, dict) else schemas.of_type(model)

"""What a run did, as data: in the shape that rlms, and what reads its files, knows."""

from __future__ import annotations

import dataclasses
from typing import Any

from rlm.client import ModelUsageSummary, UsageSummary
from rlm.rlm import RLMChatCompletion

__all__ = [
    "CodeBlock",
    "ModelUsageSummary",
    "REPLResult",
    "RLMChatCompletion",
    "RLMIteration",
    "RLMMetadata",
    "UsageSummary",
]


@dataclasses.dataclass
class REPLResult:
    """What came of one cell, an error's type and message at the end of ``stderr``."""

    stdout: str
    stderr: str
    locals: dict[str, Any]
    """Variables after the cell: plain data as it is, anything else as its repr. Of a trajectory, none."""
    execution_time: float | None = None
    """Seconds."""
    rlm_calls: list[RLMChatCompletion] = dataclasses.field(default_factory=list)
    """The models and child runs that the cell called and that replied."""
    final_answer: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "stdout": self.stdout,
            "stderr": self.stderr,
            "locals": plain(self.locals),
            "execution_time": self.execution_time,
            "rlm_calls": [call.to_dict() for call in self.rlm_calls],
            "final_answer": self.final_answer,
        }


@dataclasses.dataclass
class CodeBlock:
    """One cell, and what came of it."""

    code: str
    result: REPLResult

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {"code": self.code, "result": self.result.to_dict()}


@dataclasses.dataclass
class RLMIteration:
    """One turn: what the model was shown, what it said, and the cells in that."""

    prompt: list[dict[str, str]]
    response: str
    code_blocks: list[CodeBlock]
    final_answer: str | None = None
    iteration_time: float | None = None
    """Seconds."""

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "prompt": self.prompt,
            "response": self.response,
            "code_blocks": [block.to_dict() for block in self.code_blocks],
            "final_answer": self.final_answer,
            "iteration_time": self.iteration_time,
        }


@dataclasses.dataclass
class RLMMetadata:
    """How a run was set up. Keys are masked."""

    root_model: str
    max_depth: int
    max_iterations: int
    backend: str
    backend_kwargs: dict[str, Any]
    environment_type: str
    environment_kwargs: dict[str, Any]
    other_backends: list[str] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}


def plain(value: Any) -> Any:
    """A value as data that JSON holds; what is none is its repr."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return repr(value)

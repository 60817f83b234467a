"""What a run tree may use."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Limits(BaseModel):
    """The limits of a run tree: one ledger counts for the root and all its children. None is unlimited.

    Immutable, and reusable for any number of runs: ``RLM(limits=Limits(max_calls=40), ...)``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    max_iterations: int = Field(
        default=30, ge=1, description="Turns of a run before it is asked for its best answer."
    )
    max_depth: int = Field(
        default=1,
        ge=0,
        description="0: no sandbox, one plain call. 1: cells may call models. 2: and child runs; and so on.",
    )
    on_max_depth: Literal["call", "raise"] = Field(
        default="call",
        description="What an rlm_query that would be deeper does: a plain model call, or raise.",
    )
    max_timeout: float | None = Field(
        default=None, gt=0, description="Seconds of wall time for the run and its children."
    )
    cell_timeout: float | None = Field(
        default=120.0,
        gt=0,
        description="Seconds one cell may compute; waiting for models and tools does not count.",
    )
    max_calls: int | None = Field(default=None, ge=1, description="Model calls of the run and its children.")
    max_sub_calls: int | None = Field(
        default=None, ge=1, description="Those of them that cells make, with the turns of child runs."
    )
    max_children: int | None = Field(
        default=None, ge=1, description="Child runs of the whole tree, at any depth."
    )
    max_tokens: int | None = Field(
        default=None, ge=1, description="Input and output tokens of the whole tree."
    )
    max_sub_tokens: int | None = Field(
        default=None, ge=1, description="Those of them that cells use, with the turns of child runs."
    )
    max_budget: float | None = Field(
        default=None,
        gt=0,
        description="US dollars for the run and its children. Every model's price must be known.",
    )
    on_limit: Literal["raise", "answer"] = Field(
        default="raise",
        description="When calls, tokens or dollars are used up: raise, or ask once for the best answer.",
    )
    max_errors: int | None = Field(
        default=None, ge=1, description="Turns in a row whose cells may fail before the run ends."
    )
    max_output_chars: int = Field(
        default=20_000,
        ge=200,
        description="Characters of a cell's output that the model is shown.",
    )

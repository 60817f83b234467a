"""The settings of an RLM: one validated model, with a sentence for every field.

`RLM(...)` takes the fields as keywords; `RLM.from_config` reads them from TOML, YAML or
JSON. A key that is not here is an error that names the nearest one that is.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from . import secrets
from .client import Price
from .errors import ConfigError
from .gate import Policy
from .ledger import Limits
from .pace import RateLimit

_DEFAULTS = Limits()
_POLICY = Policy()


class Config(BaseModel):
    """Everything an RLM can be told. Immutable, and reusable for any number of runs."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, strict=True)

    backend: Any = Field("openai", description="Name of the model client, or a BaseLM.")
    backend_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Keywords for the client's constructor."
    )
    sub_backend: Any = Field(
        None, description="The same for calls from cells, and for child runs; the backend unless given."
    )
    sub_backend_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Keywords for that client's constructor."
    )
    other_backends: list[Any] = Field(
        default_factory=list,
        description="Clients that a cell may name as `model`. Without a sub_backend the first is it.",
    )
    other_backend_kwargs: list[dict[str, Any]] = Field(
        default_factory=list, description="Keywords for each of the other backends, in their order."
    )
    sampling_args: dict[str, Any] = Field(
        default_factory=dict,
        description="max_tokens, temperature, stop, seed, and fields of the provider's own, for every call.",
    )
    sub_sampling_args: dict[str, Any] | None = Field(
        None, description="In place of sampling_args, for calls from cells and child runs."
    )
    environment: Any = Field(
        "local", description="Name of the environment, or a BaseEnv whose settings each run copies."
    )
    environment_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Keywords for the environment's constructor."
    )
    max_iterations: int = Field(
        _DEFAULTS.max_iterations, ge=1, description="Turns of a run before it is asked for its best answer."
    )
    max_depth: int = Field(
        _DEFAULTS.max_depth,
        ge=0,
        description="0: no sandbox, one plain call. 1: cells may call models. 2: and child runs; and so on.",
    )
    max_timeout: float | None = Field(
        None, gt=0, description="Seconds of wall time for the run and its children."
    )
    cell_timeout: float | None = Field(
        _DEFAULTS.cell_timeout,
        gt=0,
        description="Seconds one cell may compute; waiting for models does not count.",
    )
    max_calls: int | None = Field(None, ge=1, description="Model calls of the run and its children.")
    max_sub_calls: int | None = Field(
        None, ge=1, description="Those of them that cells make, with the turns of child runs."
    )
    max_children: int | None = Field(None, ge=1, description="Child runs of the whole tree, at any depth.")
    max_tokens: int | None = Field(None, ge=1, description="Input and output tokens of the whole tree.")
    max_sub_tokens: int | None = Field(
        None, ge=1, description="Those of them that cells use, with the turns of child runs."
    )
    max_budget: float | None = Field(
        None, gt=0, description="US dollars for the run and its children. Every model's price must be known."
    )
    on_limit: Literal["raise", "answer"] = Field(
        "raise",
        description="When calls, tokens or dollars are used up: raise, or ask once for the best answer.",
    )
    max_errors: int | None = Field(
        None, ge=1, description="Turns in a row whose cells may fail before the run ends."
    )
    max_output_chars: int = Field(
        _DEFAULTS.max_output_chars, ge=200, description="Characters of a cell's output shown to the model."
    )
    max_concurrent_calls: int = Field(256, ge=1, description="Model calls in flight at a time.")
    max_concurrent_subcalls: int = Field(
        16, ge=1, description="Child runs that one rlm_query_batched has going at a time."
    )
    call_timeout: float | None = Field(
        _POLICY.timeout, gt=0, description="Seconds one attempt at a model call may take."
    )
    max_retries: int = Field(
        _POLICY.max_retries,
        ge=0,
        description="Further attempts at a model call that failed in a way that may pass.",
    )
    hedge_after: float | None = Field(
        None,
        gt=0,
        description="Seconds without a reply after which a call is made a second time. It is paid twice.",
    )
    rate_limits: dict[str, RateLimit] = Field(
        default_factory=dict,
        strict=False,
        description="By name of a backend, of a model, or '*': requests_per_minute, tokens_per_minute, "
        "concurrency.",
    )
    share_rate_limits: Path | None = Field(
        None, strict=False, description="Folder by which processes of this machine keep to one rate together."
    )
    prices: dict[str, Price] = Field(
        default_factory=dict,
        description="By name of a model: input, output, cached, cache_write; dollars for a million tokens.",
    )
    stream: bool = Field(True, description="Stream the root's replies, where the client can.")
    record: Path | None = Field(
        None,
        strict=False,
        description="File to which every request and reply is appended, for backend='replay'.",
    )
    cache: Path | None = Field(
        None,
        strict=False,
        description="File of complete replies, for any number of processes: what was asked before is not "
        "asked again, and identical calls in flight are made once. Delete it to start anew.",
    )
    final_answer_validator: Callable[[str], str | None] | None = Field(
        None, description="Told the final answer; a text it returns is shown to the model, which goes on."
    )
    custom_system_prompt: str | None = Field(
        None, description="Replaces the system prompt, exactly as written."
    )
    trace: Path | None = Field(
        None, strict=False, description="File to which every event is appended, as JSON lines."
    )
    verbose: bool = Field(False, description="Show progress on the terminal.")
    logger: Any = Field(
        None, description="An rlm.logger.RLMLogger: the result's metadata then says what the run did."
    )

    @field_validator("logger")
    @classmethod
    def _follows(cls, value: Any) -> Any:
        if value is not None and not callable(getattr(value, "follow", None)):
            raise ValueError("it is an rlm.logger.RLMLogger")
        return value

    @field_validator("prices", "rate_limits", mode="before")
    @classmethod
    def _as_tables(cls, value: Any, info: ValidationInfo) -> Any:
        """Prices and limits written as tables, as a file has them."""
        kind = Price if info.field_name == "prices" else RateLimit
        try:
            return {name: _as_struct(item, kind) for name, item in value.items()}
        except (TypeError, AttributeError, msgspec.ValidationError) as error:
            raise ValueError(str(error)) from None

    def given(self) -> list[tuple[str, Any]]:
        """What was set."""
        return [(name, getattr(self, name)) for name in self.model_fields_set]

    def shown(self) -> list[tuple[str, Any]]:
        """What was set, fit to be printed: keys are masked."""
        return [(name, secrets.mask(value)) for name, value in sorted(self.given())]

    def __repr_args__(self) -> list[tuple[str | None, Any]]:
        return [*self.shown()]

    @classmethod
    def create(cls, **values: Any) -> Config:
        """A config from keywords. Raises ConfigError, naming what is wrong and what would be right."""
        for key in values:
            if key not in cls.model_fields:
                raise ConfigError(_unknown(key, list(cls.model_fields)))
        try:
            return cls(**values)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, item['loc']))}={_shown(item)}: {item['msg']}" for item in error.errors()
            )
        # outside of the handler: what pydantic raised holds the input, keys and all
        raise ConfigError(f"the configuration is not valid: {problems}")

    @classmethod
    def load(cls, path: str | Path, **overrides: Any) -> Config:
        """A config from a TOML, YAML or JSON file, by its ending; ``overrides`` win over the file."""
        path = Path(path)
        values = _read(path)
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds no table of settings")
        for key in values:
            if not isinstance(key, str):
                raise ConfigError(f"{path}: there is no setting {key!r}: a setting is named by a word")
        return cls.create(**{**values, **overrides})

    def limits(self) -> Limits:
        """The limits among these settings."""
        names = (field.name for field in dataclasses.fields(Limits))
        return Limits(**{name: getattr(self, name) for name in names})


def _shown(problem: Any) -> str:
    """The input that a validation error complains of; of settings that may hold keys only its type."""
    if str(problem["loc"][0]).endswith("_kwargs"):
        return f"a {type(problem['input']).__name__}"
    return repr(secrets.mask(problem["input"], any(secrets.is_secret(str(part)) for part in problem["loc"])))


def _as_struct(item: Any, kind: type[Any]) -> Any:
    if isinstance(item, kind):
        return item
    return msgspec.convert(item, kind) if kind is Price else kind(**item)


def _unknown(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, 1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
    return f"there is no setting {key!r}: {hint}"


def _read(path: Path) -> Any:
    parsers: dict[str, Callable[[str], Any]] = {
        ".toml": _parse_toml, ".json": json.loads, ".yaml": _parse_yaml, ".yml": _parse_yaml,
    }  # fmt: skip
    parse = parsers.get(path.suffix.lower())
    if parse is None:
        raise ConfigError(f"{path}: a configuration ends in {', '.join(parsers)}")
    try:
        return parse(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"the configuration {str(path)!r} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid {path.suffix[1:].upper()}: {error}") from None


def _parse_toml(text: str) -> Any:
    import tomllib

    return tomllib.loads(text)


def _parse_yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:  # its own text shows the line, and a key that stands there
        place = error.problem_mark
        where = f" in line {place.line + 1}, column {place.column + 1}" if place is not None else ""
        raise ValueError(f"{error.problem}{where}") from None
    except yaml.YAMLError as error:
        raise ValueError(type(error).__name__) from None

"""The settings of an RLM: one validated model, with a sentence for every field.

`RLM(...)` takes the fields as keywords; `RLM.from_config` reads them from TOML, YAML or
JSON. A key that is not here is an error that names the nearest one that is.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from pydantic import ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from . import secrets
from .client import Price
from .errors import ConfigError
from .gate import Policy
from .limits import Limits
from .pace import RateLimit

if TYPE_CHECKING:
    from .callbacks import Callbacks

_POLICY = Policy()


class Config(Limits):
    """Everything an RLM can be told, its limits among it. Immutable, and reusable for any number of runs."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

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
    model_aliases: dict[str, str] = Field(
        default_factory=dict, description="Names that cells may use for models: alias to name."
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
    custom_tools: dict[str, Any] = Field(
        default_factory=dict,
        description="Functions and data that cells find by name; with a description as "
        "{'tool': ..., 'description': ...}.",
    )
    custom_sub_tools: dict[str, Any] | None = Field(
        None, description="In place of custom_tools, for child runs; {} for none."
    )
    schemas: dict[str, Any] = Field(
        default_factory=dict,
        description="Pydantic models, types or JSON schemas that cells ask for by name: schema='name'.",
    )
    schema_retries: int = Field(
        2, ge=0, description="Times that a reply which does not fit a cell's schema goes back to the model."
    )
    persistent: bool = Field(
        False, description="Keep the sandbox from one completion to the next: variables, contexts, histories."
    )
    snapshots: bool = Field(
        True,
        description="Save a session's variables after each completion, in case that its sandbox is lost.",
    )
    compaction: bool = Field(
        False,
        description="When a conversation comes near to what its model reads, go on from a summary; "
        "all of it stands in the sandbox as `history`.",
    )
    compaction_threshold_pct: float = Field(
        0.85, gt=0, le=1, description="How near: the part of the model's context window."
    )
    pool: int = Field(
        0, ge=0, description="Environments kept ready between completions, for runs and child runs."
    )
    max_concurrent_calls: int = Field(256, ge=1, description="Model calls in flight at a time.")
    max_concurrent_subcalls: int = Field(
        16, ge=1, description="Child runs of the tree at work at a time; one that waits for children is not."
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
    orchestrator: bool = Field(
        True,
        description="Whether the system prompt has its advice on how to go about a task. False: of the root "
        "and its children alike it is without that, and the same otherwise.",
    )
    user_prologue: str | None = Field(
        None, description="Further words of the user's, at the end of the root's first message."
    )
    trace: Path | None = Field(
        None, strict=False, description="File to which every event is appended, as JSON lines."
    )
    verbose: bool = Field(False, description="Show progress on the terminal.")
    logger: Any = Field(
        None, description="An rlm.logger.RLMLogger: the result's metadata then says what the run did."
    )

    on_iteration_start: Callable[[int, int], object] | None = Field(
        None, description="Told of each turn that begins: depth, number. On the core's thread, like the rest."
    )
    on_iteration_complete: Callable[[int, int, float], object] | None = Field(
        None, description="Told of each turn that is over: depth, number, seconds."
    )
    on_subcall_start: Callable[[int, str, str], object] | None = Field(
        None, description="Told of each child run that begins: depth, model, beginning of its prompt."
    )
    on_subcall_complete: Callable[[int, str, float, str | None], object] | None = Field(
        None, description="Told of each child run that is over: depth, model, seconds, error or None."
    )

    def callbacks(self) -> Callbacks:
        """The functions among these settings that are told of turns and child runs."""
        from .callbacks import Callbacks

        return Callbacks(
            self.on_iteration_start,
            self.on_iteration_complete,
            self.on_subcall_start,
            self.on_subcall_complete,
        )

    @field_validator(
        "backend_kwargs", "environment_kwargs", "other_backends", "other_backend_kwargs", "custom_tools",
        "sampling_args", mode="before",
    )  # fmt: skip
    @classmethod
    def _nothing_is_the_default(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None:
            return value
        return cls.model_fields[info.field_name or ""].get_default(call_default_factory=True)

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
        """A config from keywords; ``limits`` brings several at once, and each keyword wins over it.

        Raises ConfigError, naming what is wrong and what would be right.
        """
        limits = values.pop("limits", None)
        if limits is not None:
            values = {**_as_table(limits), **values}
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

    def savable(self) -> tuple[dict[str, Any], list[str]]:
        """What was set and can lie in a file, exactly as it is; and the names of what cannot.

        Keys stay out of files, each named by its place; so does what only this process has: objects and
        functions, and whatever would be something else when it is read again.
        """
        kept: dict[str, Any] = {}
        missing: list[str] = []
        for name, value in sorted(self.given()):
            keys: list[str] = []
            try:
                if name.endswith(("_kwargs", "sampling_args")):
                    value = _without_keys(value, name, keys)
                kept[name] = _exact(value)
                missing += keys
            except (TypeError, ValueError, OverflowError, RecursionError):
                missing.append(name)
        return kept, missing

    def limits(self) -> Limits:
        """The limits among these settings."""
        return Limits(**{name: getattr(self, name) for name in Limits.model_fields})


def _without_keys(value: Any, place: str, keys: list[str]) -> Any:
    """Settings without the keys in them, however deep; ``keys`` is told the places of those."""
    if isinstance(value, dict):
        secret = [name for name, item in value.items() if _holds_key(str(name), item)]
        keys += [f"{place}.{name}" for name in secret]
        left = {name: item for name, item in value.items() if name not in secret}
        return {name: _without_keys(item, f"{place}.{name}", keys) for name, item in left.items()}
    if isinstance(value, list):
        return [_without_keys(item, f"{place}.{number}", keys) for number, item in enumerate(value)]
    return value


def _holds_key(name: str, value: Any) -> bool:
    """Whether a setting is a key, or holds one that cannot be taken out of it."""
    if isinstance(value, dict):
        return secrets.is_secret(name) and secrets.mask(value, True) != value
    if isinstance(value, list | tuple):
        return any(_holds_key(name, item) for item in value if not isinstance(item, dict))
    is_text = isinstance(value, str | bytes | secrets.SecretText)
    return bool(is_text and secrets.mask(value, secrets.is_secret(name)) != value)


def _exact(value: Any) -> Any:
    """Settings as plain data, of which a file gives back the same. Raises TypeError or ValueError."""
    if isinstance(value, Path):
        return str(value.absolute())
    if isinstance(value, Price | RateLimit):
        return _exact(msgspec.to_builtins(value))
    if type(value) is dict:
        return {_exact(key): _exact(item) for key, item in value.items()}
    if type(value) is list:
        return [_exact(item) for item in value]
    if type(value) is str:
        value.encode("utf-8")  # what that has no form for, no file has
    elif type(value) is int:
        value.to_bytes(8, "big", signed=True)
    elif value is not None and type(value) not in (bool, float, bytes):
        raise TypeError(f"{type(value).__name__} cannot lie in a file")
    return value


def _as_table(limits: Any) -> dict[str, Any]:
    if isinstance(limits, Limits):
        return limits.model_dump(exclude_unset=True)
    if not isinstance(limits, dict):
        raise ConfigError(f"limits={limits!r}: give rlm.Limits(...), or a table of them")
    for key in limits:
        if key not in Limits.model_fields:
            raise ConfigError(_unknown(key, list(Limits.model_fields)))
    return limits


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

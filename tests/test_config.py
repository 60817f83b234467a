"""Facts about settings: what is understood, what is refused, and what the refusal says."""

# ruff: noqa: E501 (a table of settings reads best with one to a line)

import dataclasses
import datetime
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from pydantic import BaseModel, SecretStr, ValidationError

from rlm import RLM
from rlm.client import Price
from rlm.config import Config
from rlm.errors import ConfigError, RLMError
from rlm.limits import Limits
from rlm.pace import RateLimit
from rlm_scripted import ScriptedLM

FIELDS = sorted(Config.model_fields)
FILES = {
    "toml": 'backend = "scripted"\nmax_iterations = 3\nmax_timeout = 5\n[backend_kwargs]\nlatency = 0.5\n',
    "yaml": "backend: scripted\nmax_iterations: 3\nmax_timeout: 5\nbackend_kwargs:\n  latency: 0.5\n",
    "yml": "{backend: scripted, max_iterations: 3, max_timeout: 5, backend_kwargs: {latency: 0.5}}",
    "json": '{"backend": "scripted", "max_iterations": 3, "max_timeout": 5, '
    '"backend_kwargs": {"latency": 0.5}}',
}
each_format = pytest.mark.parametrize("ending", FILES)


def file(folder: Path, text: str | bytes, ending: str) -> Path:
    path = folder / f"settings.{ending}"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(**values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        Config.create(**values)
    return str(caught.value)


# --- fields ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_is_described_in_a_sentence(name: str) -> None:
    description = Config.model_fields[name].description
    assert description
    assert description.endswith(".")


def test_every_setting_has_a_default() -> None:
    config = Config.create()
    assert config.model_fields_set == set()
    assert (config.backend, config.environment, config.trace, config.verbose) == (
        "openai",
        "local",
        None,
        False,
    )


def test_every_limit_is_a_setting_with_the_same_default() -> None:
    assert Config.create().limits() == Limits()
    assert set(Limits.model_fields) <= set(FIELDS)


def test_limits_are_what_the_settings_say() -> None:
    config = Config.create(
        max_iterations=5, max_depth=2, max_timeout=60, cell_timeout=None, max_calls=7, max_errors=3
    )
    assert config.limits() == Limits(
        max_iterations=5, max_depth=2, max_timeout=60.0, cell_timeout=None, max_calls=7, max_errors=3
    )


def test_settings_cannot_be_changed() -> None:
    config = Config.create()
    with pytest.raises(ValidationError, match="frozen"):
        config.max_depth = 3
    assert config.max_depth == 1


# --- keys --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("max_iteration", "max_iterations"),
        ("max_iters", "max_iterations"),
        ("Backend", "backend"),
        ("enviroment", "environment"),
        ("backend_args", "backend_kwargs"),
        ("system_prompt", "custom_system_prompt"),
        ("max-depth", "max_depth"),
        ("max_output_char", "max_output_chars"),
    ],
)
def test_a_misspelt_setting_is_told_the_nearest(key: str, meant: str) -> None:
    message = refusal(**{key: 1})
    assert repr(key) in message
    assert f"did you mean {meant!r}?" in message


@pytest.mark.parametrize("key", ["zzz", "", "q" * 50])
def test_a_setting_like_no_other_is_told_what_there_is(key: str) -> None:
    message = refusal(**{key: 1})
    assert repr(key) in message
    assert all(name in message for name in FIELDS)


def test_a_config_error_is_both_ours_and_a_value_error() -> None:
    with pytest.raises(ValueError, match="did you mean") as caught:
        RLM(backnd="x")
    assert isinstance(caught.value, RLMError)


# --- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_iterations", 0),
        ("max_iterations", -1),
        ("max_iterations", "30"),
        ("max_iterations", 3.0),
        ("max_iterations", None),
        ("max_iterations", True),
        ("max_depth", -1),
        ("max_depth", 1.5),
        ("max_timeout", 0),
        ("max_timeout", -5),
        ("max_timeout", float("nan")),
        ("max_timeout", "soon"),
        ("max_timeout", "5"),
        ("max_timeout", True),
        ("max_timeout", []),
        ("cell_timeout", 0),
        ("max_calls", 0),
        ("max_calls", 1.0),
        ("max_errors", 0),
        ("max_output_chars", 199),
        ("max_concurrent_calls", 0),
        ("max_concurrent_subcalls", 0),
        ("backend_kwargs", "model=x"),
        ("backend_kwargs", [1]),
        ("environment_kwargs", "x"),
        ("custom_system_prompt", 5),
        ("custom_system_prompt", b"bytes"),
        ("trace", 5),
        ("verbose", 1),
        ("verbose", "yes"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_its_name(name: str, value: Any) -> None:
    message = refusal(**{name: value})
    assert message.startswith("the configuration is not valid: ")
    shown = (
        f"a {type(value).__name__}" if name.endswith("_kwargs") else repr(value)
    )  # the former may hold keys
    assert f"{name}={shown}" in message


def test_all_that_is_wrong_is_said_at_once() -> None:
    message = refusal(max_iterations=0, max_depth=-1)
    assert "max_iterations=0" in message
    assert "max_depth=-1" in message


@pytest.mark.parametrize("name", ["max_timeout", "cell_timeout"])
def test_seconds_may_be_whole_or_not_or_unlimited(name: str) -> None:
    assert [getattr(Config.create(**{name: value}), name) for value in (5, 0.5, None)] == [5.0, 0.5, None]


@pytest.mark.parametrize("path", ["run.jsonl", Path("run.jsonl")])
def test_a_trace_file_may_be_named_by_text_or_path(path: Any) -> None:
    assert Config.create(trace=path).trace == Path("run.jsonl")


def test_backend_and_environment_may_be_objects() -> None:
    client = ScriptedLM()
    assert Config.create(backend=client).backend is client


def test_two_configs_share_no_settings() -> None:
    assert Config.create().backend_kwargs is not Config.create().backend_kwargs


# --- files -------------------------------------------------------------------------------------


@each_format
def test_a_file_holds_settings(ending: str, tmp_path: Path) -> None:
    config = Config.load(file(tmp_path, FILES[ending], ending))
    expected = Config.create(
        backend="scripted", max_iterations=3, max_timeout=5, backend_kwargs={"latency": 0.5}
    )
    assert config == expected
    assert config.model_fields_set == {"backend", "max_iterations", "max_timeout", "backend_kwargs"}


@each_format
def test_a_file_may_be_named_by_text_and_end_in_capitals(ending: str, tmp_path: Path) -> None:
    assert Config.load(str(file(tmp_path, FILES[ending], ending.upper()))).max_iterations == 3


@each_format
def test_keywords_win_over_the_file(ending: str, tmp_path: Path) -> None:
    config = Config.load(file(tmp_path, FILES[ending], ending), max_iterations=9, verbose=True)
    assert (config.max_iterations, config.verbose, config.max_timeout) == (9, True, 5.0)


@pytest.mark.parametrize(
    ("ending", "text"),
    [("toml", "max_iteration = 3"), ("yaml", "max_iteration: 3"), ("json", '{"max_iteration": 3}')],
)
def test_a_misspelt_key_in_a_file_is_told_the_nearest(ending: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'max_iterations'"):
        Config.load(file(tmp_path, text, ending))


@pytest.mark.parametrize(
    ("ending", "text"),
    [
        ("toml", "max_iterations = 'three'"),
        ("yaml", "max_iterations: three"),
        ("json", '{"max_iterations": "three"}'),
    ],
)
def test_a_bad_value_in_a_file_is_refused(ending: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_iterations='three'"):
        Config.load(file(tmp_path, text, ending))


@pytest.mark.parametrize(
    ("ending", "text"),
    [
        ("toml", "backend ="),
        ("toml", "a = 1\na = 2"),
        ("toml", b"backend = '\xff'"),
        ("yaml", "a: [1"),
        ("yaml", "a: 1\n b: 2"),
        ("yaml", "!!python/object/apply:os.getcwd []"),
        ("yaml", b"a: \xff"),
        ("json", "{"),
        ("json", ""),
        ("json", "{'a': 1}"),
    ],
)
def test_a_file_that_is_malformed_is_refused_by_its_name(
    ending: str, text: str | bytes, tmp_path: Path
) -> None:
    path = file(tmp_path, text, ending)
    with pytest.raises(ConfigError, match=f"{path} is not valid {ending.upper()}"):
        Config.load(path)


@pytest.mark.parametrize(
    ("ending", "text"), [("yaml", ""), ("yaml", "- a"), ("json", "[]"), ("json", "null"), ("yaml", "text")]
)
def test_a_file_of_something_else_than_settings_is_refused(ending: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no table of settings"):
        Config.load(file(tmp_path, text, ending))


@pytest.mark.parametrize("text", ["1: 2", "null: 2", "true: 2", "2020-01-01: 2"])
def test_a_key_in_yaml_that_is_no_text_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no setting"):
        Config.load(file(tmp_path, text, "yaml"))


def test_an_empty_toml_file_is_all_defaults(tmp_path: Path) -> None:
    assert Config.load(file(tmp_path, "", "toml")) == Config.create()


def test_a_file_that_is_not_there_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file") as caught:
        Config.load(tmp_path / "none.toml")
    assert isinstance(caught.value.__cause__, FileNotFoundError)


@pytest.mark.parametrize("name", ["settings.ini", "settings", "settings.py"])
def test_a_file_of_another_kind_is_told_which_kinds_there_are(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("")
    with pytest.raises(ConfigError, match=r"ends in \.toml, \.json, \.yaml, \.yml"):
        Config.load(tmp_path / name)


@each_format
def test_an_rlm_is_made_from_a_file(ending: str, tmp_path: Path) -> None:
    rlm = RLM.from_config(file(tmp_path, FILES[ending], ending), max_depth=2)
    assert (rlm.config.backend, rlm.config.max_iterations, rlm.config.max_depth) == ("scripted", 3, 2)
    assert rlm.config.model_fields_set == {
        "backend",
        "max_iterations",
        "max_timeout",
        "backend_kwargs",
        "max_depth",
    }


def test_an_rlm_from_a_file_may_be_given_objects(tmp_path: Path) -> None:
    client = ScriptedLM()
    rlm = RLM.from_config(file(tmp_path, FILES["toml"], "toml"), backend=client, backend_kwargs={})
    assert rlm.config.backend is client


# --- limits together ---------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [Limits(max_calls=4, max_depth=2), {"max_calls": 4, "max_depth": 2}])
def test_limits_may_be_given_together(limits: Any) -> None:
    config = Config.create(limits=limits)
    assert config.limits() == Limits(max_calls=4, max_depth=2)
    assert config.model_fields_set == {"max_calls", "max_depth"}


def test_a_keyword_wins_over_the_limits() -> None:
    assert Config.create(limits=Limits(max_calls=4), max_calls=5).max_calls == 5
    assert Config.create(limits={"max_depth": 3}, max_depth=0).max_depth == 0


@pytest.mark.parametrize("limits", [5, "max_calls=4", [("max_calls", 4)]])
def test_limits_are_limits_or_a_table(limits: Any) -> None:
    assert "give rlm.Limits(...), or a table of them" in refusal(limits=limits)


def test_a_setting_that_is_no_limit_is_none_of_the_limits() -> None:
    assert "there is no setting 'backend'" in refusal(limits={"backend": "openai"})
    assert "did you mean 'max_calls'" in refusal(limits={"max_call": 4})
    assert "max_calls=0" in refusal(limits={"max_calls": 0})


# --- what a file may hold ----------------------------------------------------------------------

KEY = "sk-0123456789"


@dataclasses.dataclass
class Client:
    """Would be taken for data by whoever looks at its fields alone."""

    api_key: str = KEY


class Model(BaseModel):
    n: int = 1


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"backend": "scripted", "max_iterations": 3, "max_timeout": 5.0, "verbose": True, "max_calls": None},
        {"backend_kwargs": {"model": "m", "nested": {"a": [1, {"b": None}]}, "text": "é\n"}},
        {"other_backends": ["a", "b"], "other_backend_kwargs": [{"model": "x"}, {}]},
        {"custom_tools": {"table": {1: "one", "two": b"2"}, "n": -(2**63)}},
        {"schemas": {"n": {"type": "integer"}}},
        {"sampling_args": {"temperature": 0.5, "max_tokens": 7, "stop": ["a"]}, "sub_sampling_args": None},
        {"model_aliases": {"fast": "m"}, "max_timeout": math.inf},
    ],
    ids=lambda settings: ",".join(settings),
)
def test_plain_settings_come_back_as_they_were(settings: dict[str, Any]) -> None:
    config = Config.create(**settings)
    kept, missing = config.savable()
    read = msgspec.msgpack.decode(msgspec.msgpack.encode(kept))
    assert missing == []
    assert Config.create(**read) == config
    assert set(kept) == set(settings)


def test_prices_limits_and_paths_come_back_as_they_were() -> None:
    config = Config.create(
        prices={"m": Price(1.0, 2.0)}, rate_limits={"*": RateLimit(requests_per_minute=3)},
        trace=Path("run.jsonl"), cache="/tmp/cache.db",
    )  # fmt: skip
    kept, missing = config.savable()
    assert missing == []
    read = Config.create(**msgspec.msgpack.decode(msgspec.msgpack.encode(kept)))
    assert (read.prices, read.rate_limits, read.cache) == (config.prices, config.rate_limits, config.cache)
    assert read.trace == Path.cwd() / "run.jsonl"


@pytest.mark.parametrize(
    ("settings", "places"),
    [
        ({"backend_kwargs": {"api_key": KEY, "model": "m"}}, ["backend_kwargs.api_key"]),
        ({"backend_kwargs": {"api_key": SecretStr(KEY)}}, ["backend_kwargs.api_key"]),
        ({"backend_kwargs": {"base_url": f"https://me:{KEY}@host/v1"}}, ["backend_kwargs.base_url"]),
        ({"backend_kwargs": {"headers": {"Authorization": f"Bearer {KEY}"}}}, ["backend_kwargs.headers.Authorization"]),
        ({"sub_backend": "b", "sub_backend_kwargs": {"token": KEY}}, ["sub_backend_kwargs.token"]),
        ({"other_backends": ["b"], "other_backend_kwargs": [{"api_key": KEY}]}, ["other_backend_kwargs.0.api_key"]),
        ({"sampling_args": {"extra_headers": {"X-Api-Key": KEY}}}, ["sampling_args.extra_headers.X-Api-Key"]),
        ({"sub_sampling_args": {"api_key": KEY.encode()}}, ["sub_sampling_args.api_key"]),
        ({"environment_kwargs": {"env": {"HF_TOKEN": KEY, "A": "1"}}}, ["environment_kwargs.env.HF_TOKEN"]),
        ({"environment_kwargs": {"env": ["A=1", f"HF_TOKEN={KEY}"]}}, ["environment_kwargs.env"]),
        ({"environment_kwargs": {"credentials": {"user": KEY}}}, ["environment_kwargs.credentials"]),
        ({"environment_kwargs": {"mounts": [{"password": KEY, "path": "/x"}]}}, ["environment_kwargs.mounts.0.password"]),
        ({"backend": Client()}, ["backend"]),
        ({"environment": Client()}, ["environment"]),
        ({"other_backends": [Client()]}, ["other_backends"]),
        ({"backend_kwargs": {"client": Client(), "api_key": KEY}}, ["backend_kwargs"]),
    ],
    ids=lambda value: ",".join(value),
)  # fmt: skip
def test_no_key_is_in_a_file_and_its_place_is_named(settings: dict[str, Any], places: list[str]) -> None:
    kept, missing = Config.create(**settings).savable()
    assert missing == places
    assert KEY.encode() not in msgspec.msgpack.encode(kept)


@pytest.mark.parametrize(
    "settings",
    [
        {"custom_tools": {"f": len}},
        {"custom_tools": {"when": datetime.date(2026, 1, 2)}},
        {"custom_tools": {"pair": (1, 2)}},
        {"custom_tools": {"some": {1, 2}}},
        {"custom_tools": {"large": 2**64}},
        {"custom_tools": {"odd": "\ud800"}},
        {"schemas": {"n": int}},
        {"schemas": {"n": Model}},
        {"final_answer_validator": print},
        {"backend": ScriptedLM()},
        {"backend_kwargs": {"stop": (1,)}},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_a_file_would_make_something_else_of_is_to_be_given_again(settings: dict[str, Any]) -> None:
    kept, missing = Config.create(**settings).savable()
    assert (kept, missing) == ({}, list(settings))


def test_data_of_any_depth_is_no_trouble() -> None:
    deep: Any = []
    for _ in range(10_000):
        deep = [deep]
    kept, missing = Config.create(custom_tools={"deep": deep}, verbose=True).savable()
    assert (kept, missing) == ({"verbose": True}, ["custom_tools"])

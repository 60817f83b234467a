"""Facts about settings: what is understood, what is refused, and what the refusal says."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rlm import RLM
from rlm.config import Config
from rlm.errors import ConfigError, RLMError
from rlm.limits import Limits
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

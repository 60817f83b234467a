"""Facts about contexts: what is read, how it is described, and how it travels."""

import datetime
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlm import worker
from rlm.context import describe, encode, resolve
from rlm.errors import ConfigError

relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with text, bytes, folders, and what is no content."""
    root = tmp_path / "tree"
    for name, data in {
        "b.txt": b"second\r\nline\n",
        "a.txt": "caf\xe9".encode(),
        "deep/er/c.md": b"# deep",
        "image.png": b"\x89PNG\xff",
        ".hidden": b"no",
        ".git/config": b"no",
        "deep/__pycache__/c.pyc": b"no",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    (root / "empty").mkdir()
    return root


# --- reading -----------------------------------------------------------------------------------


def test_a_file_becomes_its_text_to_the_byte(tree: Path) -> None:
    assert resolve(tree / "b.txt") == "second\r\nline\n"
    assert resolve(tree / "a.txt") == "caf\xe9"


def test_a_file_that_is_not_utf_8_becomes_bytes(tree: Path) -> None:
    assert resolve(tree / "image.png") == b"\x89PNG\xff"


def test_a_byte_order_mark_is_content_too(tmp_path: Path) -> None:
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbftext")
    assert resolve(tmp_path / "bom.txt") == "\ufefftext"


def test_an_empty_file_becomes_empty_text(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert resolve(tmp_path / "empty") == ""


def test_a_directory_becomes_its_files_in_order_without_hidden_ones(tree: Path) -> None:
    found = resolve(tree)
    assert found == {
        "a.txt": "caf\xe9",
        "b.txt": "second\r\nline\n",
        "deep/er/c.md": "# deep",
        "image.png": b"\x89PNG\xff",
    }
    assert list(found) == sorted(found)


def test_a_directory_below_a_hidden_one_is_read_like_any(tmp_path: Path) -> None:
    root = tmp_path / ".cache" / "docs"
    root.mkdir(parents=True)
    (root / "a.txt").write_text("a")
    assert resolve(root) == {"a.txt": "a"}


def test_an_empty_directory_becomes_an_empty_dict(tree: Path) -> None:
    assert resolve(tree / "empty") == {}


@pytest.mark.parametrize("kind", [list, tuple])
def test_several_paths_become_one_dict(kind: Callable[[list[Path]], Any], tree: Path) -> None:
    found = resolve(kind([tree / "b.txt", tree / "deep"]))
    assert found == {"b.txt": "second\r\nline\n", "deep/er/c.md": "# deep"}


def test_files_of_one_name_are_both_kept(tmp_path: Path) -> None:
    paths = []
    for folder in ("one", "two", "three"):
        (tmp_path / folder).mkdir()
        paths.append(tmp_path / folder / "notes.txt")
        paths[-1].write_text(folder)
    found = resolve(paths)
    assert sorted(found.values()) == ["one", "three", "two"]
    assert set(found) == {str(path) for path in paths}


def test_directories_of_one_name_are_both_kept(tmp_path: Path) -> None:
    paths = []
    for project in ("one", "two"):
        paths.append(tmp_path / project / "docs")
        paths[-1].mkdir(parents=True)
        (paths[-1] / "index.md").write_text(project)
    assert sorted(resolve(paths).values()) == ["one", "two"]


@pytest.mark.parametrize("name", ["none.txt", "none/deep.txt"])
def test_a_missing_file_is_an_error_that_names_it(name: str, tmp_path: Path) -> None:
    for context in (tmp_path / name, [tmp_path / name]):
        with pytest.raises(ConfigError, match=r"none.*cannot be read: No such file") as caught:
            resolve(context)
        assert isinstance(caught.value.__cause__, FileNotFoundError)


@pytest.mark.parametrize(
    "context",
    ["text", "", b"bytes", 5, None, [], (), {}, ["a.txt"], [Path("a.txt"), "b.txt"], {"path": Path("a.txt")}],
    ids=repr,
)
def test_what_is_no_path_is_left_as_it_is(context: Any) -> None:
    assert resolve(context) is context


def test_a_str_is_text_even_when_a_file_has_its_name(tree: Path) -> None:
    assert resolve(str(tree / "a.txt")) == str(tree / "a.txt")


# --- describing --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context", "words"),
    [
        ("one\ntwo", "a str of 7 characters (2 lines)"),
        ("", "a str of 0 characters (1 lines)"),
        ("x" * 1_234_567, "a str of 1,234,567 characters (1 lines)"),
        (b"1234", "bytes of 4 bytes"),
        (bytearray(4), "bytearray of 4 bytes"),
        ([], "a list of 0 items"),
        ([1, "a", 2.5], "a list of 3 items of type float, int, str"),
        ((1, 2), "a tuple of 2 items of type int"),
        ({1}, "a set of 1 items of type int"),
        ({}, "a dict of 0 entries"),
        ({"a": 1, "b": None}, "a dict of 2 entries of type NoneType, int"),
        (5, "a value of type int"),
        (None, "a value of type NoneType"),
    ],
)  # fmt: skip
def test_a_context_is_described_by_type_and_size(context: Any, words: str) -> None:
    assert describe(context) == words


def test_a_dict_of_texts_is_described_by_its_first_names() -> None:
    words = describe({f"{number}.txt": "x" * 1000 for number in range(7)})
    assert "a dict of 7 entries, name -> text, 7,000 characters in all" in words
    assert words.endswith("the first names are '0.txt', '1.txt', '2.txt', '3.txt', '4.txt', ...")


def test_a_description_is_short_and_holds_no_content() -> None:
    secret = "the content is nobody's business"
    for context in (secret, secret.encode(), [secret] * 9, {"name": secret}, {secret[:4]: {"a": secret}}):
        assert secret not in describe(context)
    assert len(describe({"k" * 10_000 + str(n): "v" for n in range(100)})) < 500
    assert len(describe([type(f"Kind{n}", (), {})() for n in range(1000)])) < 200


# --- travelling --------------------------------------------------------------------------------

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
    | st.dates() | st.datetimes() | st.complex_numbers(allow_nan=False) | st.uuids()
)  # fmt: skip
keys = st.integers() | st.text() | st.tuples(st.integers(), st.text()) | st.dates() | st.none()
nested = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(keys, inner)
        | st.frozensets(keys)
        | st.sets(keys)
    ),
    max_leaves=20,
)


def shape(value: Any) -> Any:
    """The types all the way down, which == alone does not compare."""
    if isinstance(value, dict):
        return dict, [(shape(key), shape(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [shape(item) for item in value]
    return type(value)


def travelled(context: Any) -> Any:
    form, data = encode(context)
    return worker._decode_context(data, form)


@relaxed
@given(nested)
def test_data_arrives_equal_and_of_the_same_types(context: Any) -> None:
    arrived = travelled(context)
    assert arrived == context
    assert shape(arrived) == shape(context)


@relaxed
@given(st.text(st.characters(exclude_categories=())))
def test_text_of_any_characters_arrives_as_it_was(context: str) -> None:
    assert encode(context)[0] == "text"
    assert travelled(context) == context


@relaxed
@given(st.binary())
def test_bytes_travel_as_they_are(context: bytes) -> None:
    assert encode(context) == ("bytes", context)
    assert travelled(context) == context


@pytest.mark.parametrize("kind", ["text", "bytes", "pickle"])
def test_a_context_can_be_decoded_where_it_lies(kind: str) -> None:
    """A worker maps a context into memory, and decodes from there."""
    context = {"text": "caf\xe9" * 100, "bytes": b"\xff" * 100, "pickle": {1: ("a",)}}[kind]
    form, data = encode(context)
    assert form == kind
    assert worker._decode_context(memoryview(data), form) == context


def test_a_bytearray_stays_one() -> None:
    assert travelled(bytearray(b"ab")) == bytearray(b"ab")
    assert type(travelled(bytearray(b"ab"))) is bytearray


def test_nan_and_dates_with_zones_travel() -> None:
    moment = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
    number, arrived = travelled((float("nan"), moment))
    assert number != number
    assert (arrived, arrived.tzinfo) == (moment, datetime.UTC)


class Stubborn:
    """Something that refuses to be pickled in its own way."""

    def __reduce__(self) -> Any:
        raise ZeroDivisionError("in my own way")


def endless() -> list[Any]:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    return deep


@pytest.mark.parametrize(
    "make",
    [lambda: lambda: None, lambda: (_ for _ in ""), Stubborn, lambda: [Stubborn()], threading.Lock, endless],
    ids=["function", "generator", "stubborn", "stubborn inside", "lock", "too deep"],
)  # fmt: skip
def test_what_cannot_be_sent_is_a_config_error_that_says_what_can(make: Callable[[], Any]) -> None:
    context = make()
    with pytest.raises(ConfigError, match="pass text, bytes, lists, dicts or paths") as caught:
        encode(context)
    assert f"a context of type {type(context).__name__} cannot be sent" in str(caught.value)
    assert caught.value.__cause__ is not None


def test_pickle_is_of_a_protocol_that_python_3_8_reads() -> None:
    form, data = encode([1])
    assert (form, data[:2]) == ("pickle", b"\x80\x04")

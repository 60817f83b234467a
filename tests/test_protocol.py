"""Facts about what a sandbox may say: a closed set of messages, and nothing else."""

import json
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlm import protocol
from rlm.wire import PROTOCOL_VERSION, FrameError

relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

EVERY: list[tuple[dict[str, Any], Any]] = [
    (
        {"t": "hello", "v": PROTOCOL_VERSION, "token": "a:b", "python": "3.8.1"},
        protocol.Hello(v=PROTOCOL_VERSION, token="a:b", python="3.8.1"),
    ),
    (
        {"t": "hello", "v": 2, "token": "", "python": "", "enforced": ["user"], "missing": ["files"]},
        protocol.Hello(v=2, token="", python="", enforced=["user"], missing=["files"]),
    ),
    ({"t": "failed", "token": "a:b", "blobs": [3]}, protocol.Failed(token="a:b", blobs=[3])),
    (
        {"t": "call", "id": 1, "fn": "llm_query", "blobs": [5]},
        protocol.Call(id=1, fn="llm_query", blobs=[5]),
    ),
    (
        {
            "t": "call", "id": 2, "fn": "rlm_query", "model": "m", "batch": True, "contexts": True,
            "blobs": [1, 2],
        },
        protocol.Call(id=2, fn="rlm_query", model="m", batch=True, contexts=True, blobs=[1, 2]),
    ),
    ({"t": "call", "id": 3, "fn": "budget"}, protocol.Call(id=3, fn="budget")),
    ({"t": "result", "id": 1}, protocol.Result(id=1)),
    (
        {
            "t": "result", "id": 1, "error": ["ValueError", "no"], "parts": ["stdout", "traceback"],
            "note": "n", "blobs": [1, 2],
        },
        protocol.Result(
            id=1, error=("ValueError", "no"), parts=["stdout", "traceback"], note="n", blobs=[1, 2]
        ),
    ),
    (
        {"t": "result", "id": 1, "crash": {"cause": "signal", "code": 9, "state": "lost"}},
        protocol.Result(id=1, crash=protocol.Crash("signal", 9, "lost")),
    ),
    (
        {"t": "output", "id": 1, "stream": "stderr", "blobs": [9]},
        protocol.Output(id=1, stream="stderr", blobs=[9]),
    ),
    ({"t": "loaded", "id": 4}, protocol.Loaded(id=4)),
    ({"t": "loaded", "id": 4, "error": "why"}, protocol.Loaded(id=4, error="why")),
    (
        {"t": "crash", "crash": {"cause": "exit", "code": 1, "state": "restored", "lost": ["a"]}},
        protocol.CrashNotice(crash=protocol.Crash("exit", 1, "restored", ["a"])),
    ),
]  # fmt: skip

each_message = pytest.mark.parametrize(
    ("header", "message"), EVERY, ids=[f"{i}-{header['t']}" for i, (header, _) in enumerate(EVERY)]
)


def parse(header: Any) -> protocol.Message:
    return protocol.parse(json.dumps(header).encode())[0]


def refuse(header: Any) -> str:
    with pytest.raises(FrameError, match="not a message of this protocol") as caught:
        protocol.parse(header if isinstance(header, bytes) else json.dumps(header).encode())
    return str(caught.value)


def changed(header: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {**header, **fields}


# --- what is a message -------------------------------------------------------------------------


@each_message
def test_a_header_becomes_its_message(header: dict[str, Any], message: protocol.Message) -> None:
    assert protocol.parse(json.dumps(header).encode()) == (message, header.get("blobs", []))


@each_message
def test_a_message_round_trips(header: dict[str, Any], message: protocol.Message) -> None:
    assert protocol.parse(msgspec.json.encode(message))[0] == message


def test_the_examples_are_of_every_kind() -> None:
    assert {type(message) for _, message in EVERY} == set(get_args(protocol.Message))


def test_messages_cannot_be_changed() -> None:
    message = protocol.Loaded(id=1)
    with pytest.raises(AttributeError, match="immutable"):
        message.id = 2  # type: ignore[misc]


@pytest.mark.parametrize("part", get_args(protocol.Part))
def test_a_result_may_have_every_part(part: str) -> None:
    message = parse({"t": "result", "id": 1, "parts": [part]})
    assert isinstance(message, protocol.Result)
    assert message.parts == [part]


# --- what is none ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["", "Hello", "reply", "execute", "__import__", "rlm.protocol.Hello", 1, None, ["hello"]]
)
def test_an_unknown_type_is_refused(kind: Any) -> None:
    refuse({"t": kind, "id": 1})


def test_a_message_without_a_type_is_refused() -> None:
    assert "`t`" in refuse({"id": 1})


@each_message
@pytest.mark.parametrize("field", ["extra", "__class__", "T", ""])
def test_an_unknown_field_is_refused(header: dict[str, Any], message: Any, field: str) -> None:
    assert "unknown field" in refuse(changed(header, **{field: 1}))


@each_message
def test_a_missing_field_is_refused(header: dict[str, Any], message: Any) -> None:
    required = [f.name for f in msgspec.structs.fields(type(message)) if f.required]
    assert required
    for name in required:
        assert "missing required field" in refuse({k: v for k, v in header.items() if k != name})


@each_message
def test_a_field_of_another_type_is_refused(header: dict[str, Any], message: Any) -> None:
    for name in header:
        others: list[Any] = [{"x": 1}, [[]], 1.5, False]
        for value in others:
            if not (isinstance(value, bool) and isinstance(header[name], bool)):
                refuse(changed(header, **{name: value}))


@pytest.mark.parametrize("number", [True, 1.5, "1", None, [1], {"id": 1}])
def test_an_id_is_an_integer(number: Any) -> None:
    refuse({"t": "loaded", "id": number})


@pytest.mark.parametrize(
    ("field", "value"),
    [("fn", "eval"), ("fn", "LLM_QUERY"), ("fn", None), ("batch", 1), ("batch", "true"), ("contexts", None)],
)
def test_a_call_names_one_of_three_functions_and_true_or_false(field: str, value: Any) -> None:
    refuse({"t": "call", "id": 1, "fn": "llm_query", field: value})


@pytest.mark.parametrize("error", [["one"], ["one", "two", "three"], ["one", 2], "text", []])
def test_an_error_is_a_type_name_and_a_message(error: Any) -> None:
    refuse({"t": "result", "id": 1, "error": error})


@pytest.mark.parametrize(
    "crash",
    [
        {"cause": "exit", "code": 1},
        {"cause": "exit", "code": 1, "state": "fine"},
        {"cause": "exit", "code": 1, "state": "lost", "extra": 1},
        {"cause": "exit", "code": "1", "state": "lost"},
        ["exit", 1, "lost"],
    ],
)
def test_a_crash_is_checked_inside_too(crash: Any) -> None:
    refuse({"t": "crash", "crash": crash})
    refuse({"t": "result", "id": 1, "crash": crash})


@pytest.mark.parametrize("blobs", [[1.5], [True], ["1"], [None], [[1]], {"0": 1}, "12", 3, None])
def test_blob_sizes_are_integers_in_a_list(blobs: Any) -> None:
    refuse({"t": "loaded", "id": 1, "blobs": blobs})


@pytest.mark.parametrize(
    "number", [b"NaN", b"Infinity", b"-Infinity", b"1e400", b"0x1", b"01", b"1_0", b"9" * 5000]
)
def test_a_number_that_is_no_json_integer_is_refused(number: bytes) -> None:
    refuse(b'{"t":"loaded","id":%s}' % number)
    refuse(b'{"t":"loaded","id":1,"blobs":[%s]}' % number)


@pytest.mark.parametrize(
    "text", [b'"\\ud800"', b'"\\udc00\\ud800"', b'"\xed\xa0\x80"', b'"\xff"', b'"\xc0\x80"']
)
def test_text_is_unicode_and_never_a_lone_surrogate(text: bytes) -> None:
    refuse(b'{"t":"hello","v":1,"python":"3","token":%s}' % text)
    refuse(b'{"t":"loaded","id":1,"error":%s}' % text)


@pytest.mark.parametrize(
    "header", [b"[]", b"null", b"1", b"true", b'"hello"', b'["hello"]', b"", b" ", b"{", b"{}}", b"{}{}"]
)
def test_what_is_no_object_is_refused(header: bytes) -> None:
    refuse(header)


@pytest.mark.parametrize("depth", [100, 10_000, 250_000])
@pytest.mark.parametrize(
    "place",
    [b"%s", b'{"t":"loaded","id":%s}', b'{"t":"loaded","id":1,"blobs":%s}', b'{"t":"loaded","id":1,"x":%s}'],
)
def test_deep_nesting_is_refused_wherever_it_stands(place: bytes, depth: int) -> None:
    refuse(place % (b"[" * depth + b"]" * depth))
    refuse(place % (b'{"a":' * (depth // 4) + b"1" + b"}" * (depth // 4)))
    refuse(place % (b"[" * depth))


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@relaxed
@given(st.sampled_from([header for header, _ in EVERY]), st.data())
def test_any_other_value_in_any_field_gives_a_message_or_a_frame_error(
    header: dict[str, Any], data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(header)))
    value = data.draw(anything)
    try:
        message = parse(changed(header, **{name: value}))
    except FrameError:
        return
    assert protocol.parse(msgspec.json.encode(message))[0] == message
    if name != "t" and not isinstance(value, list | dict):
        assert getattr(message, name) == value


@relaxed
@given(st.binary(max_size=200))
def test_any_bytes_give_a_message_or_a_frame_error(header: bytes) -> None:
    try:
        message, sizes = protocol.parse(header)
    except FrameError:
        return
    assert sizes == message.blobs

"""Facts about frames: how bytes are cut into messages, and what is refused."""

import ast
import itertools
import json
import sys
import tracemalloc
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import rlm
from rlm import protocol, wire
from rlm.wire import Decoder, FrameError

Frame = tuple[Any, list[bytes]]
Parse = Callable[[bytes], tuple[Any, Sequence[int]]]

relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
both_parsers = pytest.mark.parametrize("parse", [wire.parse_dict, protocol.parse], ids=["dict", "strict"])

# --- what is fed -------------------------------------------------------------------------------

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
values = scalars | st.lists(scalars | st.lists(scalars)) | st.dictionaries(st.text(), scalars)
headers = st.dictionaries(st.text().filter(lambda key: key != "blobs"), values)
blob_lists = st.lists(st.binary(max_size=200), max_size=5)
loose_frames = st.tuples(headers, blob_lists)
numbers = st.integers(0, 1 << 62)
strict_headers = st.one_of(
    st.fixed_dictionaries(
        {"t": st.just("call"), "id": numbers, "fn": st.just("llm_query"), "batch": st.booleans()}
    ),
    st.fixed_dictionaries(
        {"t": st.just("output"), "id": numbers, "stream": st.sampled_from(["stdout", "stderr"])}
    ),
    st.fixed_dictionaries({"t": st.just("loaded"), "id": numbers, "error": st.none() | st.text()}),
)
strict_frames = st.tuples(strict_headers, blob_lists)
cuts = st.lists(st.integers(0, 1 << 16), max_size=20)


def framed(header: bytes) -> bytes:
    return len(header).to_bytes(4, "big") + header


def pieces(data: bytes, places: Iterable[int]) -> list[bytes]:
    """``data`` cut at ``places``, wherever those fall."""
    bounds = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(bounds)]


def decode(decoder: Decoder[Any], chunks: Iterable[bytes]) -> list[Frame]:
    found: list[Frame] = []
    for chunk in chunks:
        decoder.feed(chunk)
        found += decoder
    return found


def with_sizes(header: dict[str, Any], blobs: list[bytes]) -> dict[str, Any]:
    return {**header, "blobs": [len(blob) for blob in blobs]} if blobs else header


garbage = st.one_of(
    st.binary(max_size=300),
    st.binary(min_size=2, max_size=300).map(framed),
    st.recursive(
        scalars, lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["t", "blobs", "id"]), inner)
    ).map(lambda value: framed(json.dumps(value).encode())),
    st.tuples(loose_frames, st.integers(0, 1 << 16), st.binary(min_size=1, max_size=3)).map(
        lambda case: overwrite(wire.encode(*case[0]), case[1], case[2])
    ),
    st.tuples(strict_frames, st.integers(0, 1 << 16), st.binary(min_size=1, max_size=3)).map(
        lambda case: overwrite(wire.encode(*case[0]), case[1], case[2])
    ),
)  # fmt: skip


def overwrite(frame: bytes, place: int, junk: bytes) -> bytes:
    place %= len(frame)
    return frame[:place] + junk + frame[place + len(junk) :]


# --- whole frames ------------------------------------------------------------------------------


@relaxed
@given(st.lists(loose_frames, max_size=5), cuts)
def test_frames_come_back_equal_wherever_the_stream_is_cut(frames: list[Frame], places: list[int]) -> None:
    stream = b"".join(wire.encode(header, blobs) for header, blobs in frames)
    decoder = Decoder(wire.parse_dict)
    found = decode(decoder, pieces(stream, places))
    assert found == [(with_sizes(header, blobs), blobs) for header, blobs in frames]
    decoder.close()


@relaxed
@given(st.lists(strict_frames, max_size=5), cuts)
def test_typed_messages_come_back_equal_wherever_the_stream_is_cut(
    frames: list[Frame], places: list[int]
) -> None:
    stream = b"".join(wire.encode(header, blobs) for header, blobs in frames)
    decoder = Decoder(protocol.parse)
    found = decode(decoder, pieces(stream, places))
    assert [blobs for _, blobs in found] == [blobs for _, blobs in frames]
    for (message, _), (header, blobs) in zip(found, frames, strict=True):
        assert message == protocol.parse(json.dumps(with_sizes(header, blobs)).encode())[0]
        assert all(getattr(message, name) == value for name, value in header.items() if name != "t")
    decoder.close()


def test_a_frame_arrives_byte_by_byte() -> None:
    frame = wire.encode({"t": "loaded", "id": 7}, [b"", b"xyz"])
    decoder = Decoder(protocol.parse)
    found = decode(decoder, [bytes([byte]) for byte in frame])
    assert found == [(protocol.Loaded(id=7, blobs=[0, 3]), [b"", b"xyz"])]


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_a_blob_may_be_any_kind_of_bytes(kind: Callable[[bytes], Any]) -> None:
    decoder = Decoder(wire.parse_dict)
    assert decode(decoder, [wire.encode({}, [kind(b"ab\xff")])]) == [({"blobs": [3]}, [b"ab\xff"])]


def test_encode_leaves_the_callers_header_alone() -> None:
    header = {"t": "x"}
    wire.encode(header, [b"blob"])
    assert header == {"t": "x"}


def test_a_header_is_pure_ascii_whatever_it_says() -> None:
    assert wire.encode({"text": "é\ud800\N{PILE OF POO}"})[4:].isascii()


def test_join_takes_a_header_that_is_already_encoded() -> None:
    decoder = Decoder(wire.parse_dict)
    frame = wire.join(b'{"blobs":[2]}', [b"ok"])
    assert decode(decoder, [frame]) == [({"blobs": [2]}, [b"ok"])]


# --- garbage -----------------------------------------------------------------------------------


@both_parsers
@relaxed
@given(data=st.lists(garbage, min_size=1, max_size=3).map(b"".join), places=cuts)
@example(data=framed(b'{"t":"loaded","id":1,"error":"\\ud800"}'), places=[])
@example(data=framed(b"[" * 100_000), places=[])
def test_garbage_gives_frames_or_a_frame_error(parse: Parse, data: bytes, places: list[int]) -> None:
    decoder = Decoder(parse)
    found: list[Frame] = []
    try:
        for chunk in pieces(data, places):
            decoder.feed(chunk)
            found += decoder
        decoder.close()
    except FrameError:
        pass
    assert sum(4 + sum(map(len, blobs)) for _, blobs in found) <= len(data)


@pytest.mark.parametrize(
    "start",
    [
        wire.HEADER_LIMIT.to_bytes(4, "big"),
        wire.HEADER_LIMIT.to_bytes(4, "big") + b'{"t":',
        framed(b'{"t":"loaded","id":1,"blobs":[%d]}' % wire.BLOB_LIMIT),
        framed(b'{"t":"loaded","id":1,"blobs":[%d,1]}' % (wire.BLOB_LIMIT - 1)) + b"x" * 100,
    ],
    ids=["length", "header", "blob", "second blob"],
)
@both_parsers
def test_memory_grows_with_what_arrived_and_not_with_what_was_announced(parse: Parse, start: bytes) -> None:
    decoder = Decoder(parse)
    decode(decoder, [framed(b'{"t":"loaded","id":0}')])  # what a first use sets up is not counted
    tracemalloc.start()
    try:
        assert decode(decoder, [start]) == []
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 * 1024
    assert decoder.mid_frame


# --- limits ------------------------------------------------------------------------------------


@both_parsers
@pytest.mark.parametrize("size", [0, 1, wire.HEADER_LIMIT + 1, 0xFFFFFFFF])
def test_a_header_too_short_or_too_long_is_refused_at_its_length(parse: Parse, size: int) -> None:
    decoder = Decoder(parse)
    decoder.feed(size.to_bytes(4, "big"))
    with pytest.raises(FrameError, match=f"a header of {size} bytes is outside 2..{wire.HEADER_LIMIT}"):
        decoder.next_frame()


def test_the_header_limit_can_be_set_and_may_be_reached() -> None:
    frame = framed(b'{"a":"%s"}' % (b"x" * 92))
    assert len(frame) == 4 + 100
    assert decode(Decoder(wire.parse_dict, header_limit=100), [frame])
    with pytest.raises(FrameError, match=r"100 bytes is outside 2\.\.99"):
        decode(Decoder(wire.parse_dict, header_limit=99), [frame])


@both_parsers
@pytest.mark.parametrize("sizes", [[11], [5, 6], [1] * 11, [10, 1 << 70]])
def test_blobs_over_the_limit_are_refused_before_they_arrive(parse: Parse, sizes: list[int]) -> None:
    decoder = Decoder(parse, blob_limit=10)
    decoder.feed(framed(json.dumps({"t": "loaded", "id": 1, "blobs": sizes}).encode()))
    with pytest.raises(FrameError, match="over 10"):
        decoder.next_frame()


def test_blobs_up_to_the_limit_are_taken() -> None:
    blobs = [b"12345", b"", b"67890"]
    assert decode(Decoder(wire.parse_dict, blob_limit=10), [wire.encode({}, blobs)])[0][1] == blobs


@both_parsers
@pytest.mark.parametrize(
    "sizes", ["[-1]", "[5,-5]", "[1.5]", "[true]", "[null]", '["1"]', "[[1]]", "[1e400]"]
)
def test_a_blob_size_is_a_natural_number(parse: Parse, sizes: str) -> None:
    decoder = Decoder(parse)
    decoder.feed(framed(b'{"t":"loaded","id":1,"blobs":%s}' % sizes.encode()))
    with pytest.raises(FrameError):
        decoder.next_frame()


@both_parsers
@pytest.mark.parametrize("sizes", ["null", "5", '"ab"', '{"a":1}', "true"])
def test_blob_sizes_are_a_list(parse: Parse, sizes: str) -> None:
    with pytest.raises(FrameError):
        parse(b'{"t":"loaded","id":1,"blobs":%s}' % sizes.encode())


@both_parsers
def test_sizes_of_thousands_of_digits_are_a_frame_error(parse: Parse) -> None:
    """Their sum has more digits than Python is willing to print."""
    decoder = Decoder(parse)
    decoder.feed(framed(b'{"t":"loaded","id":1,"blobs":[%s]}' % b",".join([b"9" * 4300] * 2)))
    with pytest.raises(FrameError):
        decoder.next_frame()


@both_parsers
@pytest.mark.parametrize(
    "data",
    [
        framed(b'{"t":"loaded","id":1,"blobs":[-1]}'),
        framed(b'{"t":"loaded","id":1,"blobs":[%d]}' % (wire.BLOB_LIMIT + 1)),
        framed(b"nonsense"),
        b"\xff" * 8,
    ],
    ids=["negative size", "blobs too long", "no JSON", "header too long"],
)
def test_a_decoder_that_has_refused_goes_on_refusing(parse: Parse, data: bytes) -> None:
    decoder = Decoder(parse)
    decoder.feed(data)
    for _ in range(3):
        with pytest.raises(FrameError):
            decoder.next_frame()
        decoder.feed(wire.encode({"t": "loaded", "id": 1}))


def nested(depth: int, opening: bytes = b'{"a":', closing: bytes = b"}") -> bytes:
    return opening * (depth - 1) + b"{}" + closing * (depth - 1)


def test_a_header_nests_to_the_limit_and_no_deeper() -> None:
    assert wire.parse_dict(nested(wire.DEPTH_LIMIT))
    with pytest.raises(FrameError, match="nests deeper than 16"):
        wire.parse_dict(nested(wire.DEPTH_LIMIT + 1))


@both_parsers
@pytest.mark.parametrize("depth", [100, 1000, 10_000, 100_000])
def test_a_deep_header_is_a_frame_error_however_deep(parse: Parse, depth: int) -> None:
    lists = nested(depth, b"[", b"]")
    for header in (nested(depth), lists, b'{"a":%s}' % lists, b'{"t":"loaded","id":%s}' % lists):
        with pytest.raises(FrameError):
            parse(header)
        with pytest.raises(FrameError):
            parse(header[: len(header) // 2])


@pytest.mark.parametrize(
    "header", [b"[]", b"null", b'"text"', b"12", b"true", b"", b"  ", b"{", b"\xff\xfe\xfd"]
)
@both_parsers
def test_a_header_is_a_json_object(parse: Parse, header: bytes) -> None:
    with pytest.raises(FrameError):
        parse(header)


def test_a_header_over_the_limit_is_our_own_mistake_and_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="send long text as blobs") as caught:
        wire.encode({"text": "x" * wire.HEADER_LIMIT})
    assert not isinstance(caught.value, FrameError)


def test_the_longest_header_that_encodes_also_decodes() -> None:
    header = {"text": "x" * (wire.HEADER_LIMIT - len('{"text":""}'))}
    frame = wire.encode(header)
    assert len(frame) == 4 + wire.HEADER_LIMIT
    assert decode(Decoder(wire.parse_dict), [frame]) == [(header, [])]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_json_has_no_form_for_do_not_encode(number: float) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        wire.encode({"number": number})


# --- the end of a stream -----------------------------------------------------------------------

FRAME = wire.encode({"t": "loaded", "id": 1}, [b"blob"])


@both_parsers
@given(length=st.integers(1, len(FRAME) - 1))
@relaxed
def test_a_stream_that_ends_in_a_frame_is_refused(parse: Parse, length: int) -> None:
    decoder = Decoder(parse)
    assert decode(decoder, [FRAME, FRAME[:length]]) != []
    assert decoder.mid_frame
    with pytest.raises(FrameError, match="in the middle of a frame"):
        decoder.close()


def test_a_stream_may_end_between_frames() -> None:
    decoder = Decoder(wire.parse_dict)
    decoder.close()
    assert decode(decoder, [FRAME, FRAME])
    assert not decoder.mid_frame
    decoder.close()


def test_mid_frame_tells_a_begun_frame() -> None:
    decoder = Decoder(wire.parse_dict)
    assert not decoder.mid_frame
    decoder.feed(FRAME[:1])
    assert decoder.next_frame() is None
    assert decoder.mid_frame
    decoder.feed(FRAME[1:])
    assert decoder.next_frame() is not None
    assert not decoder.mid_frame


# --- what travels into a sandbox ---------------------------------------------------------------

travels = pytest.mark.parametrize("name", ["wire", "lockdown", "worker"])


def source(name: str) -> str:
    return (Path(rlm.__file__).parent / f"{name}.py").read_text("utf-8")


def imports(tree: ast.AST) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            found |= {f"rlm.{alias.name}" for alias in node.names} if base == "rlm" else {base}
    return found


@travels
def test_what_travels_imports_only_the_standard_library(name: str) -> None:
    ours = {
        module
        for module in imports(ast.parse(source(name)))
        if module.split(".")[0] not in sys.stdlib_module_names
    }
    assert ours <= {"rlm.wire", "rlm.lockdown"}


@travels
def test_what_travels_is_in_the_grammar_of_cpython_3_8(name: str) -> None:
    tree = ast.parse(source(name), feature_version=(3, 8))
    assert "__future__" in imports(tree)  # its annotations are newer than 3.8, and never evaluated


def test_wire_knows_no_sockets_threads_or_clocks() -> None:
    assert imports(ast.parse(source("wire"))) == {"__future__", "json", "typing"}

"""Messages to bytes and bytes to messages. No sockets, threads or clocks.

A frame is a 4-byte big-endian length, a JSON object of that length (the header), and
then raw bytes (the blobs) whose sizes the header lists under ``"blobs"``. Text of any
size travels as a blob, so a 100 MB prompt is never escaped into JSON and back.

This module runs on the host and, shipped as it stands, inside every sandbox: standard
library only, CPython 3.8 and later. It knows how frames are cut, not what they mean;
the host decodes headers strictly (:mod:`rlm.protocol`), a worker takes them as dicts.
"""

from __future__ import annotations

import json
from typing import Any, Callable, Generic, Iterator, List, Sequence, Tuple, TypeVar

PROTOCOL_VERSION = 1

HEADER_LIMIT = 1 << 20
"""Bytes of one header. Headers hold names, ids and sizes, never text of unknown length;
1 MiB leaves room for the sizes of a batch of about 100,000 prompts."""

HELLO_LIMIT = 4096
"""Bytes of the first header of a connection: nobody who has not yet proved the session's
token makes the host buffer more than this."""

BLOB_LIMIT = 256 << 20
"""Bytes of all blobs of one frame that come out of a sandbox: room for a 100 MB prompt or
answer, too little to exhaust the host."""

UNLIMITED = 1 << 62
"""Blob limit inside a sandbox: what the host sends is trusted, and contexts are large."""

DEPTH_LIMIT = 16
"""Nesting of a header. Ours are three deep; a deeper one is an attack on the parser."""

_PREFIX = 4

# kept, because json.dumps with arguments makes an encoder each time, and json.loads looks for an encoding
_encode_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
_decode_json = json.JSONDecoder().decode

Message = TypeVar("Message")


class FrameError(Exception):
    """The other end broke the framing rules; the connection cannot go on."""


def encode(header: dict[str, Any], blobs: Sequence[bytes | bytearray | memoryview] = ()) -> bytes:
    """One frame as bytes. ``header`` gains ``"blobs"`` when there are any."""
    if blobs:
        header = {**header, "blobs": [len(blob) for blob in blobs]}
    body = _encode_json(header).encode("ascii")
    return join(body, blobs)


def join(header: bytes, blobs: Sequence[bytes | bytearray | memoryview] = ()) -> bytes:
    """One frame from a header that is already encoded and lists the sizes of ``blobs``."""
    if len(header) > HEADER_LIMIT:
        raise ValueError(
            f"a header of {len(header)} bytes is over the limit of {HEADER_LIMIT}; "
            "send long text as blobs, or split the batch"
        )
    return b"".join((len(header).to_bytes(_PREFIX, "big"), header, *blobs))


def parse_dict(header: bytes) -> Tuple[dict[str, Any], Sequence[int]]:
    """A header as a dict, and its blob sizes. The parser a worker uses.

    Raises FrameError when it is not a JSON object or nests deeper than DEPTH_LIMIT.
    """
    try:
        message = _decode_json(str(header, "utf-8"))
    except (ValueError, RecursionError) as error:
        raise FrameError("the header is not JSON: %s" % error) from None
    if not isinstance(message, dict):
        raise FrameError("the header is not a JSON object")
    # each level takes a bracket, and most headers have fewer of them than there may be levels
    if header.count(b"{") + header.count(b"[") > DEPTH_LIMIT and _nests_deeper(message, DEPTH_LIMIT):
        raise FrameError("the header nests deeper than %d" % DEPTH_LIMIT)
    sizes = message.get("blobs", ())
    if not isinstance(sizes, (list, tuple)):
        raise FrameError("blob sizes are not a list")
    return message, sizes


def _nests_deeper(value: object, limit: int) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list):
        return False
    return limit == 0 or any(_nests_deeper(item, limit - 1) for item in value)


class Decoder(Generic[Message]):
    """Collects bytes and gives back whole frames.

    ``parse`` turns a header into a message and its blob sizes; what it raises beyond
    FrameError is passed on. Memory grows only with bytes that really arrived, never
    with a size that the other end announces.
    """

    def __init__(
        self,
        parse: Callable[[bytes], Tuple[Message, Sequence[int]]],
        *,
        header_limit: int = HEADER_LIMIT,
        blob_limit: int = BLOB_LIMIT,
    ) -> None:
        self.header_limit = header_limit
        self.blob_limit = blob_limit
        self._parse = parse
        self._buffer = bytearray()
        self._message: Message | None = None
        self._sizes: Sequence[int] = ()
        self._start = 0
        self._end = 0

    @property
    def mid_frame(self) -> bool:
        """True while a frame has begun and not ended."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> None:
        """Take bytes as they came off the stream, cut anywhere."""
        self._buffer += data

    def close(self) -> None:
        """The stream has ended. Raises FrameError when that was in the middle of a frame."""
        if self._buffer:
            raise FrameError("the stream ended in the middle of a frame")

    def __iter__(self) -> Iterator[Tuple[Message, List[bytes]]]:
        """The frames that are complete by now, in order."""
        while True:
            frame = self.next_frame()
            if frame is None:
                return
            yield frame

    def next_frame(self) -> Tuple[Message, List[bytes]] | None:
        """The next complete frame, or None until more bytes are fed."""
        if self._message is None and not self._take_header():
            return None
        if len(self._buffer) < self._end:
            return None
        message, blobs = self._message, self._cut_blobs()
        assert message is not None
        del self._buffer[: self._end]
        self._message = None
        return message, blobs

    def _take_header(self) -> bool:
        if len(self._buffer) < _PREFIX:
            return False
        size = int.from_bytes(self._buffer[:_PREFIX], "big")
        if not 2 <= size <= self.header_limit:
            raise FrameError("a header of %d bytes is outside 2..%d" % (size, self.header_limit))
        self._start = _PREFIX + size
        if len(self._buffer) < self._start:
            return False
        message, sizes = self._parse(bytes(self._buffer[_PREFIX : self._start]))
        self._end = self._start + self._total(sizes)
        self._message, self._sizes = message, sizes
        return True

    def _total(self, sizes: Sequence[int]) -> int:
        total = 0
        for size in sizes:
            if type(size) is not int or size < 0:
                raise FrameError("a blob size is not a natural number")
            total += size
            if total > self.blob_limit:  # their sum may have more digits than can be printed
                raise FrameError("the blobs are over %d bytes" % self.blob_limit)
        return total

    def _cut_blobs(self) -> List[bytes]:
        blobs, start = [], self._start
        with memoryview(self._buffer) as view:
            for size in self._sizes:
                blobs.append(bytes(view[start : start + size]))
                start += size
        return blobs

"""Files of JSON lines that outlive whatever happens to their writer.

Lines are appended as they come, so that a process that dies leaves all but its last moment.
The torn line it may leave costs nobody else: a writer begins a line of its own after it, and
a reader leaves it out.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec

from . import jsontext

log = logging.getLogger("rlm")

Line = TypeVar("Line")


class Appender:
    """Appends objects to a file that its owner alone may read. Several may share one file.

    A full disk stops the recording, with one warning, and not the run. ``what`` it is a
    recording of is said in that warning.
    """

    def __init__(self, path: str | Path, what: str) -> None:
        self.path = Path(path)
        self._what = what
        self._file: Any = open(  # noqa: SIM115 - closed by close()
            self.path, "a+b", buffering=0, opener=_private
        )
        if self._ends_in_a_torn_line():
            self._write(b"\n")

    def append(self, value: Any) -> None:
        """Write one line. Once closed, or out of disk, this does nothing."""
        if self._file is not None:
            self._write(jsontext.encode(value) + b"\n")

    def _write(self, data: bytes) -> None:
        try:
            while data:  # a disk that fills up takes a part before it refuses the rest
                data = data[self._file.write(data) :]
        except OSError as error:
            log.warning("the %s %s ends here: %s", self._what, self.path, error)
            self.close()

    def _ends_in_a_torn_line(self) -> bool:
        size = self._file.seek(0, os.SEEK_END)
        if size == 0:
            return False
        self._file.seek(size - 1)
        return bool(self._file.read(1) != b"\n")

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def read(path: str | Path, decoder: msgspec.json.Decoder[Line]) -> Iterator[tuple[int, Line]]:
    """The objects in a file, each with the number of its line.

    A line that was cut short (the disk was full, the host was killed) is left out, with a
    log entry. One that is whole and something else raises msgspec.ValidationError.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = decoder.decode(line)
            except msgspec.ValidationError as error:
                raise msgspec.ValidationError(f"line {number}: {error}") from None
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                log.warning("%s, line %d is left out: %s", path, number, error)
            else:
                yield number, value

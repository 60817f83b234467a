"""What a sandbox may say, decoded strictly.

`rlm.wire` cuts frames; here a header becomes one of a closed set of messages, or the
connection ends. A type name in a frame is matched against this list and never looked
up anywhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from . import wire

Part = Literal[
    "stdout", "stderr", "echo", "value", "traceback", "final", "final_value", "draft", "snapshot"
]  # fmt: skip


class _Message(msgspec.Struct, frozen=True, tag_field="t", forbid_unknown_fields=True, kw_only=True):
    blobs: list[int] = []


class Hello(_Message, frozen=True, tag="hello"):
    """The first frame: whose session this is, and what the sandbox enforces."""

    v: int
    token: str
    python: str
    enforced: list[str] = []
    missing: list[str] = []


class Failed(_Message, frozen=True, tag="failed"):
    """Instead of a hello: no executor could be started. One blob: why."""

    token: str


class Call(_Message, frozen=True, tag="call"):
    """A cell calls a function of the host.

    One blob a prompt, then one a context; last, with ``schema``, what replies are to be, as JSON:
    a JSON schema, or the name of a type of the host's. Of a tool: its arguments as JSON, by position
    and by name.
    """

    id: int
    fn: Literal["llm_query", "rlm_query", "budget", "tool"]
    model: str | None = None
    batch: bool = False
    contexts: bool = False
    schema: bool = False
    tool: str | None = None

    def adds_up(self, count: int) -> bool:
        """Whether it has as many blobs as it says."""
        if self.fn in ("budget", "tool"):
            return count == (self.fn == "tool")
        prompts, odd = divmod(count - self.schema, 2 if self.contexts else 1)
        return not odd and (prompts >= 0 if self.batch else prompts == 1)


class Crash(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The executor died or was killed; ``state`` is what the next cell finds."""

    cause: str
    code: int
    state: Literal["restored", "lost"]
    lost: list[str] = []


class Result(_Message, frozen=True, tag="result"):
    """A cell is done. One blob for each of ``parts``."""

    id: int
    error: tuple[str, str] | None = None
    parts: list[Part] = []
    note: str | None = None
    crash: Crash | None = None


class Output(_Message, frozen=True, tag="output"):
    """What a running cell has printed since the last of these. One blob."""

    id: int
    stream: Literal["stdout", "stderr"]


class Loaded(_Message, frozen=True, tag="loaded"):
    """A context is in place, or why not."""

    id: int
    error: str | None = None


class CrashNotice(_Message, frozen=True, tag="crash"):
    """The executor died between cells."""

    crash: Crash


Message = Hello | Failed | Call | Result | Output | Loaded | CrashNotice

_decoder = msgspec.json.Decoder(Message)


def parse(header: bytes) -> tuple[Message, Sequence[int]]:
    """A header as a message, and its blob sizes. Raises wire.FrameError for anything else."""
    try:
        message = _decoder.decode(header)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise wire.FrameError(f"not a message of this protocol: {error}") from None
    return message, message.blobs

"""The process inside a sandbox: a supervisor that holds the channel, an executor that runs cells.

The supervisor never runs a line of a cell. It owns the stream to the host, relays whole
frames, collects what cells print through pipes, and kills and replaces the executor. The
executor is forked from it; cells run there, in its main thread, in one namespace. After
every cell the executor forks a *standby*: itself as it is now, asleep, its memory shared
copy-on-write. When a cell has to be killed, or dies, the standby takes over, so that the
cell costs only itself.

Shipped as it stands to every environment that has a Python of its own: standard library
only, CPython 3.8 and later. It decides no policy: deadlines, budgets and what a call may
do are the host's, what a process must give up is told by ``options``.
"""

from __future__ import annotations

import ast
import builtins
import collections
import ctypes
import errno
import fcntl
import inspect
import io
import json
import linecache
import mmap
import os
import pickle
import resource
import select
import shutil
import signal
import socket
import struct
import sys
import threading
import time
import traceback
import types
from _signal import signal as _set_handler  # type: ignore[import-not-found]
from typing import Any, Callable, Iterable, NoReturn, Sequence, Tuple

from rlm import lockdown, wire

READ_SIZE = 1 << 18
FLOOD_PIPE_SIZE = 1 << 20
"""Capacity that a pipe is given when a cell floods it: the most that waits in one when it ends."""

STREAM_INTERVAL = 0.05
"""Seconds between two batches of output of a running cell."""

BACKLOG_LIMIT = 8 << 20
"""Bytes waiting for the host before the executor is no longer read: a cell that calls
faster than the host reads is slowed down, not buffered."""

RESTART_LIMIT = 3
"""Executors that may die in a row before they are ready, before the session is given up."""

FORWARD_TIMEOUT = 5.0
"""Seconds an executor may keep its supervisor waiting with a context before it is killed."""

READY_TIMEOUT = 5.0
"""Seconds a standby, or a new executor, has to report before another takes its place."""

BEGIN_TIMEOUT = 3.0
"""Seconds an executor has to leave a copy and begin a cell, which is not killed before that."""

VACANCY = 0.3
"""Seconds that a session without an executor waits for its next run: one may come at once, or none."""

CROWD = 8
"""Processes that must still be possible, in a container, for an interrupt to make sense: it
reaches one process, and a bomb is hundreds."""

CELL_NICENESS = 10
"""How far cells stand back behind their supervisor in a container, whose CPU time both share."""

CHANNEL_CLOSED = "its connection was closed from within"

NO_ROOM = "it does not fit into the sandbox's memory limit, which environment_kwargs={'memory': MiB} sets"

_F_SETPIPE_SZ = 1031  # fcntl has the name from Python 3.10

PLAIN_LIMIT = 1 << 20
"""Bytes of JSON up to which the value of a last expression travels as data."""

SETTLING = 0.002
"""Seconds without a command after which the host has loaded what it wanted to: contexts, tools."""

HEADROOM = 8 << 20
"""Bytes that must be free, under the memory limit, for a standby to be of use."""

FINAL_LIMIT = wire.BLOB_LIMIT // 8
"""Characters of a final answer: with escapes and beside other parts, it still fits into a frame."""

SNAPSHOT_LIMIT = wire.BLOB_LIMIT // 2
"""Bytes of saved variables."""

ECHO_LIMIT = 20_000
"""Characters of the repr of a last expression."""

TRACEBACK_LIMIT = 20_000
"""Characters of a traceback; the first and the last half are kept."""


def _parse(header: bytes) -> tuple[tuple[dict[str, Any], bytes], Sequence[int]]:
    """A header as a dict, beside its bytes, so that relaying need not encode it again."""
    message, sizes = wire.parse_dict(header)
    return (message, header), sizes


def _decoder(blob_limit: int = wire.UNLIMITED) -> wire.Decoder[tuple[dict[str, Any], bytes]]:
    return wire.Decoder(_parse, blob_limit=blob_limit)


def _text(value: str) -> bytes:
    """Any str as UTF-8; what UTF-8 has no form for (lone surrogates) is written as an escape."""
    return value.encode("utf-8", "backslashreplace")


def _clip(text: str, limit: int) -> str:
    """The head and the tail of a text, with the size of the gap between them."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n... [{len(text) - 2 * half} characters left out] ...\n{text[-half:]}"


# --- the supervisor ---------------------------------------------------------------------------


class Outbox:
    """Bytes on their way to a descriptor that may not take them all at once."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.size = 0
        self._chunks: collections.deque[memoryview] = collections.deque()

    def send(self, data: bytes) -> None:
        """Write what fits now, and keep the rest for `flush`."""
        self._chunks.append(memoryview(data))
        self.size += len(data)
        self.flush()

    def flush(self) -> None:
        """Write until all is out or the descriptor is full."""
        while self._chunks:
            try:
                written = os.write(self.fd, self._chunks[0][: 1 << 20])
            except BlockingIOError:
                return
            self.size -= written
            if written == len(self._chunks[0]):
                self._chunks.popleft()
            else:
                self._chunks[0] = self._chunks[0][written:]


class Incoming:
    """A context on its way to the executor: a file in memory that fills up."""

    def __init__(self, number: int, size: int, frame: bytes) -> None:
        self.id = number
        self.frame = frame
        self.descriptor = os.memfd_create("context")
        self._left = size

    def add(self, data: bytes) -> bool:
        """Take the next part. True when it was the last."""
        view = memoryview(data)
        while view:
            view = view[os.write(self.descriptor, view) :]
        self._left -= len(data)
        return self._left <= 0


class Captured:
    """One output stream of one cell: its head, its tail, and how much lay between."""

    def __init__(self, limit: int) -> None:
        self._half = limit // 2
        self._clear()

    def _clear(self) -> None:
        self._head = bytearray()
        self._tail = bytearray()
        self._dropped = 0
        self._streamed = 0

    @property
    def overflows(self) -> bool:
        """Whether some of the output has been dropped."""
        return self._dropped > 0

    def add(self, data: bytes) -> None:
        """Take output; past the limit only its tail is kept."""
        room = self._half - len(self._head)
        if room > 0:
            self._head += data[:room]
            data = data[room:]
        self._tail += data
        if len(self._tail) > 2 * self._half:
            self._trim()

    def _trim(self) -> None:
        excess = len(self._tail) - self._half
        if excess > 0:
            self._dropped += excess
            del self._tail[:excess]

    @property
    def unsent(self) -> bool:
        """Whether `batch` has something new to give."""
        return self._streamed < len(self._head)

    def batch(self) -> bytes:
        """What was added to the head since the last batch."""
        data = bytes(self._head[self._streamed :])
        self._streamed = len(self._head)
        return data

    def take(self) -> bytes:
        """Everything that was kept, with the gap counted; begins anew."""
        self._trim()
        gap = b"\n... [%d bytes of output left out] ...\n" % self._dropped if self._dropped else b""
        text = bytes(self._head) + gap + bytes(self._tail)
        self._clear()
        return text


class Supervisor:
    """Relays between host and executor, and keeps the session alive whatever a cell does."""

    def __init__(
        self, reader: int, writer: int, token: str | None, options: dict[str, Any], lane: int | None = None
    ) -> None:
        self._reader = reader
        self._host = Outbox(writer)
        self._token = token
        self._hello: dict[str, Any] | None = None
        self._options = options
        self._lane = socket.socket(fileno=lane) if lane is not None else None
        self._decoder = _decoder()
        limit = int(options.get("output_limit", 1 << 20))
        self._captured = {"stdout": Captured(limit), "stderr": Captured(limit)}
        self._pipes: dict[int, str] = {}
        self._outputs: dict[str, int] = {}
        self._cell: int | None = None
        self._executor = 0
        self._slot = StandbySlot()
        self._standby_socket: socket.socket | None = None
        self._crash: dict[str, Any] | None = None
        self._crashed_cell: int | None = None
        self._loading: list[int] = []
        self._held: list[tuple[dict[str, Any], bytes, list[bytes]]] = []
        self._last_batch = 0.0
        self._greeted = False
        self._restarts = 0
        self._ready_by = 0.0
        self._obituary: dict[str, Any] | None = None
        self._doomed: int | None = None
        """The cell that is to be killed, as soon as it has begun."""
        self._doomed_by = 0.0
        self._finished = 0
        """The last cell whose result the host has."""
        self._is_behind = False
        """Whether the executor is a copy from before that cell."""
        self._end = time.monotonic() + float(options.get("time_to_live") or threading.TIMEOUT_MAX)
        self._memory_kills = _out_of_memory_kills()
        self._incoming: Incoming | None = None
        self._vacant_until: float | None = None
        """When an executor is to be started at the latest: there is none, after a reset."""
        folders = filter(None, options.get("wipe") or [options.get("scratch")])
        self._folders = {path: os.stat(path).st_mode & 0o7777 for path in folders if os.path.isdir(path)}
        """All that cells can write to, for whoever begins anew, with the modes they had."""

    def run(self) -> NoReturn:
        """Serve until the host closes the stream, then leave nothing behind."""
        try:
            self._prepare()
            self._start_executor()
            while True:
                self._turn()
        except (EOFError, ConnectionError, wire.FrameError):
            pass  # the host is gone, or no longer makes sense: the end of the session
        finally:
            self._kill_all()
            scratch = self._options.get("scratch")
            if scratch and self._options.get("remove_scratch"):
                remove_folder(scratch)
            os._exit(0)

    # -- starting

    def _prepare(self) -> None:
        lockdown.adopt_orphans()
        lockdown.set_readable(False)
        os.set_blocking(self._reader, False)
        _enlarge_pipe(self._reader)
        os.set_blocking(self._host.fd, False)
        wake_read, wake_write = os.pipe()
        for end in (wake_read, wake_write):
            os.set_blocking(end, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        self._wake = wake_read
        self._poll = select.poll()
        self._poll.register(self._wake, select.POLLIN)
        self._poll.register(self._reader, select.POLLIN)
        self._open_pipes()

    def _open_pipes(self) -> None:
        """New pipes for what cells print: whoever held the old ones may have set anything about them."""
        for read_end in self._pipes:
            self._poll.unregister(read_end)
        for end in (*self._pipes, *self._outputs.values()):
            os.close(end)
        self._pipes.clear()
        for name in ("stdout", "stderr"):
            read_end, self._outputs[name] = os.pipe()
            os.set_blocking(read_end, False)
            self._pipes[read_end] = name
            self._poll.register(read_end, select.POLLIN)

    def _start_executor(self) -> None:
        """Fork an executor with an empty namespace."""
        ours, theirs = socket.socketpair()
        standby_ours, standby_theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            keep = {theirs.fileno(), standby_theirs.fileno(), *self._outputs.values()}
            _close_all_but(keep | {0, 1, 2})
            _run_executor(theirs, standby_theirs, self._slot, self._outputs, self._options)
        theirs.close()
        standby_theirs.close()
        self._executor = pid
        self._slot.pid = self._slot.cell = self._slot.kept = self._finished = 0
        self._is_behind = False
        self._standby_socket = standby_ours
        self._attach(ours)

    def _attach(self, channel: socket.socket) -> None:
        """Talk to the executor through ``channel`` from now on."""
        channel.setblocking(False)
        self._channel = channel
        self._from_executor = _decoder(wire.BLOB_LIMIT)  # no cell fills the supervisor's memory
        self._to_executor = Outbox(channel.fileno())
        self._poll.register(channel.fileno(), select.POLLIN)

    # -- one turn of the loop

    def _turn(self) -> None:
        self._watch(self._host)
        channel = self._channel.fileno()  # -1 while there is no executor
        if self._vacant_until is None:
            interest = select.POLLIN if self._host.size < BACKLOG_LIMIT else 0
            if self._to_executor.size:
                interest |= select.POLLOUT
            self._poll.modify(channel, interest)
        unsent = self._cell is not None and any(c.unsent for c in self._captured.values())
        timeout = STREAM_INTERVAL if unsent else self._time_left()
        if self._crash is not None:
            timeout = min(timeout, READY_TIMEOUT)
        if self._vacant_until is not None:
            timeout = min(timeout, VACANCY)
        if self._doomed is not None:
            timeout = 0.001
        for fd, _ in self._poll.poll(1000 * timeout):
            if fd == channel:
                self._read_executor(channel)
            elif fd == self._reader:
                self._read_host()
            elif fd in self._pipes:
                self._capture(fd)
            elif fd == self._wake:
                os.read(self._wake, 4096)
                self._reap()
            if channel != self._channel.fileno():
                break  # the executor was replaced: the other events may be of the old one
        if self._crash is not None and time.monotonic() > self._ready_by:
            self._recover(self._crash)
        if self._vacant_until is not None and time.monotonic() > self._vacant_until:
            self._end_vacancy()
        self._kill_doomed()
        self._stream()

    def _time_left(self) -> float:
        """Seconds until this session has lived for as long as it may. Raises EOFError after them."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise EOFError
        return min(left, 1_000_000.0)  # more milliseconds than poll takes

    def _watch(self, outbox: Outbox) -> None:
        if outbox.fd != self._reader:
            if outbox.size:
                self._poll.register(outbox.fd, select.POLLOUT)
                outbox.flush()
            else:
                try:
                    self._poll.unregister(outbox.fd)
                except KeyError:
                    pass
        else:
            self._poll.modify(self._reader, select.POLLIN | (select.POLLOUT if outbox.size else 0))
            if outbox.size:
                outbox.flush()

    def _read_host(self) -> None:
        try:
            data = os.read(self._reader, READ_SIZE)
        except BlockingIOError:
            return
        if not data:
            raise EOFError
        self._decoder.feed(data)
        for (message, header), blobs in self._decoder:
            self._from_host(message, header, blobs)

    def _from_host(self, message: dict[str, Any], header: bytes, blobs: list[bytes]) -> None:
        kind = message["t"]
        if kind == "session":
            self._token = str(message["token"])
            self._greet()
        elif kind == "interrupt":
            if self._cell == message["id"] and self._crash is None:
                if _room(_PROCESSES) < CROWD:
                    self._recover({"cause": "killed", "code": 0})
                else:
                    _signal(self._executor, signal.SIGINT)
        elif kind == "kill":
            if self._cell == message["id"] and self._crash is None:
                self._doomed, self._doomed_by = self._cell, time.monotonic() + BEGIN_TIMEOUT
                self._kill_doomed()
        elif self._crash is not None and kind in ("execute", "load", "part"):
            # until the dead cell's output and end are reported, nothing new may print
            self._held.append((message, header, blobs))
        elif kind == "reset":
            self._reset(message["id"])
        elif kind == "reply" and self._vacant_until is not None:
            pass  # whoever asked is gone
        elif kind in ("execute", "load") and self._vacant_until is not None:
            self._end_vacancy()
            self._from_host(message, header, blobs)
        elif kind == "load" and message.get("shared"):
            self._loading.append(message["id"])
            assert self._lane is not None
            self._forward(wire.join(header), _receive_with_descriptor(self._lane, 1)[1])
        elif kind == "load" and message.get("size"):
            self._loading.append(message["id"])
            self._begin_parts(message, wire.join(header))
        elif kind == "part":
            self._add_part(message, blobs[0])
        else:
            if kind == "execute":
                self._cell = message["id"]
            elif kind == "load":
                self._loading.append(message["id"])
            self._tell_executor(wire.join(header, blobs))

    def _kill_doomed(self) -> None:
        """Kill the cell that is to be killed, once there is a copy of what was before it."""
        if self._doomed is None:
            return
        if self._doomed != self._cell or self._crash is not None:
            self._doomed = None  # it has ended by itself
        elif self._slot.cell == self._doomed or time.monotonic() > self._doomed_by:
            self._doomed = None
            self._recover({"cause": "killed", "code": 0})

    def _tell_executor(self, frame: bytes) -> None:
        try:
            self._to_executor.send(frame)
        except ConnectionError:
            self._recover({"cause": CHANNEL_CLOSED, "code": 0})

    def _forward(self, frame: bytes, descriptor: int) -> None:
        """Hand a frame and the descriptor of its data on to the executor, and close that."""
        try:
            end = time.monotonic() + FORWARD_TIMEOUT
            while self._to_executor.size:
                self._wait_for_executor(end)
                self._to_executor.flush()
            self._wait_for_executor(end)
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", descriptor))]
            sent = self._channel.sendmsg([frame], ancillary)
            self._to_executor.send(frame[sent:])
        except OSError:
            self._recover({"cause": CHANNEL_CLOSED, "code": 0})
        finally:
            os.close(descriptor)

    def _wait_for_executor(self, end: float) -> None:
        """Wait until the executor's socket takes something. Raises OSError when it does not by ``end``."""
        poll = select.poll()
        poll.register(self._channel.fileno(), select.POLLOUT)
        if not poll.poll(max(0.0, end - time.monotonic()) * 1000):
            raise BlockingIOError

    # -- beginning anew

    def _reset(self, number: int) -> None:
        """Leave nothing of what cells have started or written, for somebody else's session."""
        if self._vacant_until is None:
            self._poll.unregister(self._channel.fileno())
            self._channel.close()
        self._drop_incoming()
        self._cell = self._crash = self._crashed_cell = self._doomed = None
        self._loading.clear()
        self._held.clear()
        self._kill_all()
        self._executor = 0
        self._slot = StandbySlot()
        self._open_pipes()
        for captured in self._captured.values():
            captured.take()
        left = _wipe(self._folders)
        if left or not self._folders:
            error = f"these cannot be removed: {', '.join(left[:5])}" if left else "no folder is its own"
            self._host.send(wire.encode({"t": "loaded", "id": number, "error": _clean(error, 2000)}))
            raise EOFError
        self._host.send(wire.encode({"t": "loaded", "id": number}))
        self._vacant_until = time.monotonic() + VACANCY

    def _end_vacancy(self) -> None:
        if self._vacant_until is not None:
            self._vacant_until = None
            self._start_executor()

    # -- contexts that come in parts: kept once, outside of this process, and handed on whole

    def _begin_parts(self, message: dict[str, Any], frame: bytes) -> None:
        self._drop_incoming()
        if message["size"] > _room(_MEMORY):
            self._finish_load({"id": message["id"], "error": "MemoryError: " + NO_ROOM})
        else:
            self._incoming = Incoming(message["id"], message["size"], frame)

    def _drop_incoming(self) -> None:
        if self._incoming is not None:  # the host has given it up, or its executor has died
            os.close(self._incoming.descriptor)
            self._incoming = None

    def _add_part(self, message: dict[str, Any], data: bytes) -> None:
        incoming = self._incoming
        if incoming is None or incoming.id != message["id"]:
            return  # it was refused, or its executor has died: the host has been told
        if incoming.add(data):
            self._incoming = None
            self._forward(incoming.frame, incoming.descriptor)

    def _read_executor(self, channel: int) -> None:
        try:
            if self._to_executor.size:
                self._to_executor.flush()
            data = os.read(channel, READ_SIZE)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        if not data:  # nothing can be said to this executor any more
            self._recover(self._why_silent())
            return
        decoder = self._from_executor
        decoder.feed(data)
        try:
            for (message, header), blobs in decoder:
                self._from_cell(message, header, blobs)
                if decoder is not self._from_executor:
                    return  # it has been replaced; what else it said is void
        except (wire.FrameError, KeyError, TypeError, ValueError):
            self._recover({"cause": "garbage on the cell's channel", "code": 0})

    def _from_cell(self, message: dict[str, Any], header: bytes, blobs: list[bytes]) -> None:
        kind = message["t"]
        if kind == "result":
            result = _checked_result(message, self._cell, blobs)
            self._finished = result["id"]
            self._finish_cell(result, blobs)
        elif kind == "crowded":
            self._obituary = None
            self._kill_all(spare=(self._executor, self._slot.pid))
            if self._obituary is not None:
                self._recover(self._obituary)
            else:
                self._tell_executor(wire.encode({"t": "room"}))
        elif kind == "ready":
            self._executor_ready(message)
        elif kind == "loaded":
            self._finish_load(message)
        elif kind == "call":
            _check_call(message, len(blobs))
            self._host.send(wire.join(header, blobs))
        else:
            raise wire.FrameError("an executor says nothing of this kind")

    def _finish_load(self, message: dict[str, Any]) -> None:
        self._loading.remove(message["id"])
        reply = {"t": "loaded", "id": message["id"]}
        if message.get("error") is not None:
            reply["error"] = _clean(message["error"], 2000)
        self._host.send(wire.encode(reply))

    def _executor_ready(self, message: dict[str, Any]) -> None:
        if not self._greeted:
            self._greeted = True
            self._hello = {
                "t": "hello", "v": wire.PROTOCOL_VERSION, "python": "%d.%d.%d" % sys.version_info[:3],
                "enforced": [_clean(name, 200) for name in message.get("enforced", [])],
                "missing": [_clean(name, 200) for name in message.get("missing", [])],
            }  # fmt: skip
            self._greet()
            return
        self._restarts = 0
        if self._crash is not None:
            crash, self._crash = self._crash, None
            crash["lost"] = [_clean(name, 200) for name in message.get("lost", [])[:20]]
            if self._is_behind:
                crash["lost"].insert(0, "what the last cell did")
            if self._crashed_cell is None:
                self._host.send(wire.encode({"t": "crash", "crash": crash}))
            else:
                self._finish_cell({"t": "result", "id": self._crashed_cell, "crash": crash}, [])
            held, self._held = self._held, []
            for frame in held:
                self._from_host(*frame)

    def _greet(self) -> None:
        """Prove the session once it is known whose this is; until then, say that all is ready."""
        if self._hello is None:
            return  # no executor yet: the one that comes up will greet
        if self._token is None:
            self._host.send(wire.encode({"t": "warm"}))
        else:
            self._host.send(wire.encode({**self._hello, "token": self._token}))
            self._token = ""  # not even what is forked later need hold it

    # -- output

    def _capture(self, fd: int) -> None:
        captured = self._captured[self._pipes[fd]]
        was_overflowing = captured.overflows
        try:
            captured.add(os.read(fd, FLOOD_PIPE_SIZE))
        except BlockingIOError:
            return
        if captured.overflows and not was_overflowing:
            _enlarge_pipe(fd)

    def _drain(self) -> None:
        """Take what a cell that has ended left in the pipes: one pipe's capacity, no more."""
        for fd, name in self._pipes.items():
            room = FLOOD_PIPE_SIZE
            while room > 0:
                try:
                    data = os.read(fd, room)
                except BlockingIOError:
                    break
                self._captured[name].add(data)
                room -= len(data)

    def _stream(self) -> None:
        """Send what a running cell has printed, in batches."""
        now = time.monotonic()
        if self._cell is None or now - self._last_batch < STREAM_INTERVAL:
            return
        self._last_batch = now
        for name, captured in self._captured.items():
            if captured.unsent:
                header = {"t": "output", "id": self._cell, "stream": name}
                self._host.send(wire.encode(header, [captured.batch()]))

    def _finish_cell(self, message: dict[str, Any], blobs: list[bytes]) -> None:
        """Complete a result with what the cell printed, and send it."""
        self._drain()
        if self._cell == message["id"]:  # after a crash the next cell may be waiting already
            self._cell = None
        self._last_batch = time.monotonic()
        message["parts"] = list(message.get("parts", ()))
        for name, captured in self._captured.items():
            output = captured.take()
            if output:
                message["parts"].append(name)
                blobs.append(output)
        message.pop("blobs", None)
        self._host.send(wire.encode(message, blobs))

    # -- death and rollback

    def _reap(self) -> None:
        """Collect the dead; a dead executor is replaced."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._executor:
                self._recover(self._cause_of_death(status))
            elif pid == self._slot.pid:
                self._slot.pid = 0

    def _why_silent(self) -> dict[str, Any]:
        """Why the executor's channel is closed: it is about to be dead, or a cell has closed it."""
        for _ in range(20):
            try:
                pid, status = os.waitpid(self._executor, os.WNOHANG)
            except ChildProcessError:
                break
            if pid:
                return self._cause_of_death(status)
            time.sleep(0.002)
        return {"cause": CHANNEL_CLOSED, "code": 0}

    def _cause_of_death(self, status: int) -> dict[str, Any]:
        if not os.WIFSIGNALED(status):
            return {"cause": "exit", "code": os.WEXITSTATUS(status)}
        kills, self._memory_kills = self._memory_kills, _out_of_memory_kills()
        if os.WTERMSIG(status) == signal.SIGKILL and self._memory_kills > kills:
            return {"cause": "memory", "code": int(signal.SIGKILL)}
        return {"cause": "signal", "code": os.WTERMSIG(status)}

    def _recover(self, cause: dict[str, Any]) -> None:
        """Kill what the cell started, and go on from the standby, or from nothing."""
        self._poll.unregister(self._channel.fileno())
        self._channel.close()
        if not self._greeted or self._restarts > RESTART_LIMIT:
            self._give_up_session(cause)
        self._drop_incoming()
        if cause["cause"] == "memory":
            for number in tuple(self._loading):
                self._finish_load({"id": number, "error": "MemoryError: " + NO_ROOM})
        self._loading.clear()
        if self._crash is not None:  # the standby died while it took over
            self._slot.pid = 0
            cause = self._crash
        else:
            self._crashed_cell, self._cell = self._cell, None
        self._crash = cause
        self._restarts += 1
        standby = self._slot.pid if self._slot.pid != self._executor else 0
        self._kill_all(spare=(standby,))
        if not (standby and self._slot.pid == standby and self._activate(standby)):
            cause["state"] = "lost"
            self._start_executor()
        self._ready_by = time.monotonic() + READY_TIMEOUT  # not from before: killing a bomb takes its time

    def _give_up_session(self, cause: dict[str, Any]) -> NoReturn:
        """No executor comes up here: say why, and end."""
        self._drain()
        reason = self._captured["stderr"].take() or str(cause).encode()
        self._host.send(wire.encode({"t": "failed", "token": self._token or ""}, [reason[-4000:]]))
        raise EOFError

    def _activate(self, standby: int) -> bool:
        """Wake the standby, and give it the socket on which its own standby will wait."""
        assert self._standby_socket is not None and self._crash is not None
        channel = self._standby_socket
        kept = self._slot.kept
        self._is_behind, self._finished = kept < self._finished, min(kept, self._finished)
        _discard_input(channel)  # the standby is silent until it is woken: this is a cell's garbage
        ours, theirs = socket.socketpair()
        # before it is woken: from then on the slot is its own to write, at once
        self._executor, self._slot.pid = standby, 0
        try:
            _send_with_descriptor(channel, wire.encode({"t": "activate"}), theirs.fileno())
        except OSError:
            ours.close()
            return False
        finally:
            theirs.close()
        self._crash["state"] = "restored"
        self._standby_socket = ours
        self._attach(channel)
        return True

    def _kill_all(self, spare: tuple[int, ...] = ()) -> None:
        """Kill every process below this one but ``spare``, however fast it forks."""
        alone = os.getpid() == 1  # the first process of a container: all others are the session's
        if alone:
            _signal(-1, signal.SIGSTOP)  # at one blow: a bomb that runs would leave no time to look at it
        while True:
            below = lockdown.descendants(os.getpid())
            found = [pid for pid in below if pid not in spare and lockdown.is_alive(pid)]
            for number in (signal.SIGSTOP, signal.SIGKILL):
                for pid in found:
                    _signal(pid, number)
            for pid in found:  # parents come first: what they leave behind is ours by then
                try:
                    os.waitpid(pid, 0)
                except ChildProcessError:
                    pass  # the child of one that is spared
                if pid == self._slot.pid:
                    self._slot.pid = 0
            self._bury(spare)
            if not found:
                break
        if alone:
            _signal(-1, signal.SIGCONT)

    def _bury(self, spare: tuple[int, ...]) -> None:
        """Collect those of the killed that are this process's own children by now."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._slot.pid:
                self._slot.pid = 0
            elif pid == self._executor:  # it was to be spared, and died of itself
                self._obituary = self._cause_of_death(status)


# What an executor says was said by a cell, if the cell wanted: it is checked before it goes to the
# host, so that a cell that forges messages is rolled back, and does not end its session.

_PARTS = {
    "echo": 8 * ECHO_LIMIT, "value": PLAIN_LIMIT, "traceback": 8 * TRACEBACK_LIMIT, "final": 8 * FINAL_LIMIT,
    "final_value": PLAIN_LIMIT, "draft": 8 * PLAIN_LIMIT, "snapshot": SNAPSHOT_LIMIT,
}  # fmt: skip
"""The parts of a result, and how many bytes each may have: of a character no more than eight."""

_CALL_SHAPE: dict[str, Any] = {
    "t": str, "id": int, "fn": str, "model": (str, type(None)), "batch": bool, "contexts": bool,
    "schema": bool, "tool": str, "blobs": list,
}  # fmt: skip
_CALLS = frozenset(("llm_query", "rlm_query", "budget", "tool"))


def _clean(text: Any, limit: int) -> str:
    """A text of a cell's, fit for a header. Raises TypeError for anything but a str."""
    if type(text) is not str:
        raise TypeError("not a text")
    return _text(text[:limit]).decode()


def _checked_result(message: dict[str, Any], cell: int | None, blobs: list[bytes]) -> dict[str, Any]:
    """A result, rebuilt from what it may hold."""
    if type(message["id"]) is not int or message["id"] != cell:
        raise ValueError("the result of a cell that does not run")
    parts = message.get("parts", [])
    if len(parts) != len(blobs) or len(set(parts)) != len(parts):
        raise ValueError("parts that do not add up")
    if any(len(blobs[index]) > _PARTS[part] for index, part in enumerate(parts)):
        raise ValueError("a part that is too long")
    checked: dict[str, Any] = {"t": "result", "id": cell, "parts": list(parts)}
    if message.get("error") is not None:
        kind, text = message["error"]
        checked["error"] = [_clean(kind, 200), _clean(text, 10_000)]
    if message.get("note") is not None:
        checked["note"] = _clean(message["note"], 2000)
    return checked


def _check_call(message: dict[str, Any], count: int) -> None:
    for name, value in message.items():
        if not isinstance(value, _CALL_SHAPE[name]):
            raise TypeError(name)
    if message["fn"] not in _CALLS or type(message["id"]) is not int or not 0 < message["id"] < 1 << 53:
        raise ValueError("no such call")
    if not _adds_up(message, count):
        raise ValueError("texts that do not add up")
    for name in ("model", "tool"):
        if message.get(name) is not None and not message[name].isprintable():
            raise ValueError("no such " + name)


def _adds_up(call: dict[str, Any], count: int) -> bool:
    """Whether a call has as many texts as it says: the host's `protocol.Call` has the same rule."""
    if call["fn"] in ("budget", "tool"):
        return count == int(call["fn"] == "tool")
    texts = count - int(call.get("schema", False))
    prompts, odd = divmod(texts, 2 if call.get("contexts") else 1)
    return odd == 0 and (prompts >= 0 if call.get("batch") else prompts == 1)


class StandbySlot:
    """Where an executor notes who its standby is, for a supervisor that it cannot tell any more.

    A page shared by both. What a hostile cell writes there costs it its own standby, or spares
    it for `BEGIN_TIMEOUT`.
    """

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, mmap.PAGESIZE)

    @property
    def cell(self) -> int:
        """The last cell that has begun; its standby is as all was before it."""
        return int(struct.unpack_from("=q", self._page, 8)[0])

    @cell.setter
    def cell(self, value: int) -> None:
        struct.pack_into("=q", self._page, 8, value)

    @property
    def kept(self) -> int:
        """The last cell whose work the standby has."""
        return int(struct.unpack_from("=q", self._page, 16)[0])

    @kept.setter
    def kept(self, value: int) -> None:
        struct.pack_into("=q", self._page, 16, value)

    @property
    def pid(self) -> int:
        """The process id, 0 when there is none."""
        return int(struct.unpack_from("=i", self._page)[0])

    @pid.setter
    def pid(self, value: int) -> None:
        struct.pack_into("=i", self._page, 0, value)


_MEMORY_EVENTS = ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control")
"""Where a container finds its own cgroup's counters, in version 2 and in version 1."""


_MEMORY = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
_PROCESSES = (
    ("/sys/fs/cgroup/pids.max", "/sys/fs/cgroup/pids.current"),
    ("/sys/fs/cgroup/pids/pids.max", "/sys/fs/cgroup/pids/pids.current"),
)
"""Files with a limit of this container's, and what is used of it."""


def _room(files: Sequence[Tuple[str, str]]) -> int:
    """How much of something this container may still use; very much where nothing limits it."""
    for limit, use in files:
        try:
            with open(limit, "rb") as limit_file, open(use, "rb") as use_file:
                return int(limit_file.read()) - int(use_file.read())
        except (OSError, ValueError):
            pass  # not this version, no cgroup of our own, or "max"
    return wire.UNLIMITED


def _out_of_memory_kills() -> int:
    """How often the kernel has killed a process of this container for want of memory."""
    for path in _MEMORY_EVENTS:
        try:
            with open(path, "rb") as file:
                return sum(int(line.split()[1]) for line in file if line.startswith(b"oom_kill "))
        except (OSError, ValueError, IndexError):
            pass  # not this version, or no cgroup of our own
    return 0


def _wipe(folders: dict[str, int]) -> list[str]:
    """Empty these folders, and give each its mode again. Returns what is left in them."""
    left = []
    for folder, mode in folders.items():
        _attempt(os.chmod, folder, mode)  # a cell that owns it may have shut it
        for name in os.listdir(folder):
            path = os.path.join(folder, name)
            if os.path.isdir(path) and not os.path.islink(path):
                remove_folder(path)
            else:
                _attempt(os.unlink, path)
            if os.path.lexists(path):
                left.append(path)
    return left


def remove_folder(path: str) -> None:
    """Remove a folder, as far as that can be: however deep it is, and what a cell has made unreadable."""
    try:
        shutil.rmtree(path, ignore_errors=True)
    except RecursionError:
        pass
    if os.path.lexists(path):
        _attempt(_take_apart, path)
        shutil.rmtree(path, ignore_errors=True)


def _take_apart(path: str) -> None:
    """Bring up whatever is below the folders of a folder, until there is nothing in it."""
    folders = [path]
    while folders:
        for folder in folders:
            _attempt(os.chmod, folder, 0o700)
            for entry in os.scandir(folder):
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.path)
                elif folder != path:
                    _attempt(os.chmod, entry.path, 0o700)  # moving it changes what it says is above it
                    os.rename(entry.path, os.path.join(path, os.urandom(16).hex()))
            if folder != path:
                os.rmdir(folder)
        folders = [entry.path for entry in os.scandir(path)]


def _attempt(step: Callable[..., Any], *arguments: Any) -> None:
    try:
        step(*arguments)
    except OSError:
        pass  # whoever asked looks at what has come of it


def _enlarge_pipe(fd: int) -> None:
    try:
        fcntl.fcntl(fd, _F_SETPIPE_SZ, FLOOD_PIPE_SIZE)
    except OSError:
        pass  # no pipe, or the user's pipes take all the memory they may: it stays as slow as it is


def _discard_input(channel: socket.socket) -> None:
    try:
        while channel.recv(READ_SIZE, socket.MSG_DONTWAIT):
            pass
    except OSError:
        pass


_DESCRIPTOR_SPACE = socket.CMSG_SPACE(4)


def _send_with_descriptor(channel: socket.socket, data: bytes, descriptor: int) -> None:
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", descriptor))]
    sent = channel.sendmsg([data], ancillary)
    channel.sendall(data[sent:])


def _receive_with_descriptor(channel: socket.socket, size: int, flags: int = 0) -> tuple[bytes, int]:
    """Up to ``size`` bytes and the descriptor that came with them, or -1."""
    data, ancillary, _, _ = channel.recvmsg(size, _DESCRIPTOR_SPACE, flags)
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            return data, int(struct.unpack("i", payload[:4])[0])
    return data, -1


def _close_all_but(keep: Iterable[int]) -> None:
    start = 0
    for fd in sorted(keep):
        if fd > start:  # an empty range would be taken for all descriptors
            os.closerange(start, fd)
        start = fd + 1
    os.closerange(start, resource.getrlimit(resource.RLIMIT_NOFILE)[0])


# --- the executor: the channel -------------------------------------------------------------------


class LLMError(RuntimeError):
    """A model call that failed. ``kind`` names the failure; the text says what can be done."""

    def __init__(self, message: str, kind: str = "LLMError") -> None:
        super().__init__(message)
        self.kind = kind


class ToolError(RuntimeError):
    """A tool of the host's that failed. ``kind`` names the exception; the text holds what it said."""

    def __init__(self, message: str, kind: str = "ToolError") -> None:
        super().__init__(message)
        self.kind = kind


LLMError.__module__ = ToolError.__module__ = "__main__"  # where a cell finds them


class _Waiter:
    """One call in flight, and the thread that waits for its reply."""

    __slots__ = ("blobs", "lock", "reply")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.lock.acquire()
        self.reply: dict[str, Any] | None = None
        self.blobs: list[bytes] = []


class Calls:
    """Any number of calls from any threads over one socket.

    There is no reader thread: one of the waiting threads reads for all, and passes the
    duty on when its own reply has come. So a single call costs no switch of threads, and
    nothing but the main thread needs to survive a fork.
    """

    def __init__(self, channel: socket.socket) -> None:
        self._interrupted = False
        self._critical = False
        self._last_id = 0
        self.adopt(channel)

    def adopt(self, channel: socket.socket) -> None:
        """Begin anew on ``channel``; calls in flight on the old one are forgotten."""
        self.channel = channel
        self._owner = os.getpid()
        self._main = threading.get_ident()
        self._decoder = _decoder()
        self._descriptor = -1
        self._poll = select.poll()
        self._poll.register(channel.fileno(), select.POLLIN)
        self._peek = select.poll()  # of its own: a poll object serves one thread at a time
        self._peek.register(channel.fileno(), select.POLLIN)
        self._send_lock = threading.Lock()
        self._waiting: dict[int, _Waiter] = {}
        self._commands: collections.deque[tuple[dict[str, Any], list[bytes]]] = collections.deque()
        self._duty = threading.Lock()
        self._reading = False

    def repair(self) -> None:
        """After an interrupt, which may have struck between taking a lock and noting it."""
        if threading.active_count() == 1:
            self._send_lock = threading.Lock()
            self._duty = threading.Lock()
            self._reading = False
            self._waiting.clear()

    def interrupt(self) -> None:
        """Raise KeyboardInterrupt here, or as soon as no frame is half sent or half read."""
        if self._critical:
            self._interrupted = True
        else:
            raise KeyboardInterrupt

    def _uninterrupted(self, step: Callable[[], Any]) -> Any:
        if threading.get_ident() != self._main:
            return step()  # signals only ever reach the main thread
        self._critical = True
        try:
            return step()
        finally:
            self._critical = False
            if self._interrupted:
                self._interrupted = False
                raise KeyboardInterrupt

    def send(self, header: dict[str, Any], blobs: Sequence[bytes] = ()) -> None:
        """Send one whole frame."""
        data = wire.encode(header, blobs)

        def step() -> None:
            with self._send_lock:
                self.channel.sendall(data)

        self._uninterrupted(step)

    def pending(self, seconds: float = 0.0) -> bool:
        """Whether something to read has arrived, or does within this time."""
        return bool(self._commands or self._peek.poll(1000 * seconds))

    def command(self) -> tuple[dict[str, Any], list[bytes], int]:
        """Between cells: the supervisor's next command, and a descriptor or -1."""
        waiter = _Waiter()
        with self._duty:
            if self._commands:
                waiter.reply, waiter.blobs = self._commands.popleft()
            self._waiting[0] = waiter
        self._await(waiter)
        with self._duty:
            del self._waiting[0]
        assert waiter.reply is not None
        descriptor, self._descriptor = self._descriptor, -1
        return waiter.reply, waiter.blobs, descriptor

    def call(self, header: dict[str, Any], blobs: Sequence[bytes]) -> tuple[dict[str, Any], list[bytes]]:
        """Send a request and wait for its reply, whatever else is in flight."""
        if os.getpid() != self._owner:
            raise RuntimeError(
                "model calls work only in the cell's own process: use threads or "
                "llm_query_batched in place of multiprocessing"
            )
        waiter = _Waiter()
        with self._duty:
            self._last_id += 1
            number = self._last_id
            self._waiting[number] = waiter
        try:
            self.send({**header, "t": "call", "id": number}, blobs)
            self._await(waiter)
        finally:
            self._waiting.pop(number, None)
        assert waiter.reply is not None
        return waiter.reply, waiter.blobs

    def _await(self, waiter: _Waiter) -> None:
        while waiter.reply is None:
            with self._duty:
                lead = not self._reading
                self._reading = True
            if lead:
                try:
                    while waiter.reply is None:
                        self._deliver(*self._receive())
                finally:
                    self._pass_on_duty(waiter)
            else:
                waiter.lock.acquire()  # released with the reply, or to take over the reading

    def _receive(self) -> tuple[dict[str, Any], list[bytes]]:
        """The next frame, waiting for it where an interrupt does no harm."""
        while True:
            frame = self._uninterrupted(self._read_available)
            if frame is not None:
                (message, _), blobs = frame
                return message, blobs
            self._poll.poll()

    def _read_available(self) -> Any:
        frame = self._decoder.next_frame()
        if frame is None:
            try:
                data, descriptor = _receive_with_descriptor(self.channel, READ_SIZE, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return None
            if not data:
                os._exit(0)
            if descriptor >= 0:
                self._descriptor = descriptor
            self._decoder.feed(data)
            frame = self._decoder.next_frame()
        return frame

    def _deliver(self, message: dict[str, Any], blobs: list[bytes]) -> None:
        """Give a frame to whoever waits for it; a reply that nobody waits for any more is dropped."""
        number = message["id"] if message["t"] == "reply" else 0
        with self._duty:
            waiter = self._waiting.get(number)
            if waiter is not None and waiter.reply is None:
                waiter.reply, waiter.blobs = message, blobs
                _wake(waiter)
            elif number == 0:
                self._commands.append((message, blobs))

    def _pass_on_duty(self, done: _Waiter) -> None:
        with self._duty:
            self._reading = False
            for waiter in list(self._waiting.values()):
                if waiter is not done and waiter.reply is None:
                    _wake(waiter)
                    return


def _wake(waiter: _Waiter) -> None:
    if waiter.lock.locked():
        waiter.lock.release()


# --- the executor: what a cell sees -----------------------------------------------------------------


class Variables(dict):  # type: ignore[type-arg]
    """What SHOW_VARS returns: name -> type name, printed as one line."""

    def __str__(self) -> str:
        return "Available variables: " + super().__repr__()

    __repr__ = __str__


class Namespace:
    """The names of a session: the cell's own, and the reserved ones, restored after each cell."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self.final: list[Any] = []
        module = types.ModuleType("__main__")
        sys.modules["__main__"] = module
        self.names: dict[str, Any] = module.__dict__
        self.names["__builtins__"] = builtins
        for function in (_help, _exit, _quit):  # what the site module gives an interactive session
            setattr(builtins, function.__name__.strip("_"), function)
        self.names["answer"] = {"content": "", "ready": False}
        self.reserved: dict[str, Any] = {name: _plain_function(getattr(self, name)) for name in FUNCTIONS}
        self.reserved["LLMError"] = LLMError
        self.reserved["ToolError"] = ToolError
        self.restore()

    def restore(self) -> None:
        """Put back reserved names that a cell has rebound or deleted."""
        self.names.update(self.reserved)

    def take(self, message: dict[str, Any], data: Any) -> None:
        """Put what the host gives under its names, or under each of them a tool."""
        if message["format"] == "tools":
            values = {name: self.tool(name, text) for name, text in json.loads(data).items()}
        else:
            values = dict.fromkeys(message["names"], _decode_context(data, message["format"]))
        (self.names if message.get("free") else self.reserved).update(values)
        self.restore()

    def llm_query(self, prompt: str, model: str | None = None, *, schema: Any = None) -> Any:
        """Ask a model one question. Raises LLMError when the call fails.

        With ``schema``, a JSON schema or the name of a type that the host offers, the reply is data of
        that form in place of text.
        """
        return self._one("llm_query", prompt, model, None, schema)

    def llm_query_batched(
        self, prompts: Sequence[str], model: str | None = None, *, schema: Any = None
    ) -> list[Any]:
        """Ask many questions at once; replies in order, a failed one as an LLMError in its place."""
        return self._many("llm_query", prompts, model, None, schema)

    def rlm_query(
        self, prompt: str, model: str | None = None, *, context: str | None = None, schema: Any = None
    ) -> Any:
        """Have a child run, with a sandbox of its own, work on ``prompt`` (over ``context``, if given)."""
        return self._one("rlm_query", prompt, model, context, schema)

    def rlm_query_batched(
        self,
        prompts: Sequence[str],
        model: str | None = None,
        *,
        contexts: Sequence[str] | None = None,
        schema: Any = None,
    ) -> list[Any]:
        """Many child runs at once; answers in order, a failed one as an LLMError in its place."""
        return self._many("rlm_query", prompts, model, contexts, schema)

    def FINAL(self, value: Any) -> Any:
        """Submit ``value`` as the final answer. The rest of the cell still runs."""
        self.final[:] = [value]
        return value

    def FINAL_VAR(self, name: Any) -> Any:
        """Submit the variable called ``name`` as the final answer; anything else is submitted as it is."""
        named = isinstance(name, str) and name in self.names
        return self.FINAL(self.names[name] if named else name)

    def SHOW_VARS(self) -> Variables:
        """The variables made so far: name -> type."""
        return Variables(
            (name, type(value).__name__)
            for name, value in self.names.items()
            if not name.startswith("_") and name not in self.reserved
        )

    def budget(self) -> dict[str, Any]:
        """What this run may still use: iterations, calls, tokens, dollars, seconds; None is unlimited."""
        reply, blobs = self._calls.call({"fn": "budget"}, [])
        _raise_failure(reply)
        return dict(json.loads(blobs[0]))

    def tool(self, name: str, documentation: str) -> Callable[..., Any]:
        """A function that has the host's tool of this name do the work."""

        def function(*args, **kwargs):  # type: ignore[no-untyped-def] # its help shows what is written here
            return self._use_tool(name, args, kwargs)

        function.__name__ = function.__qualname__ = name
        function.__module__ = "__main__"
        function.__doc__ = documentation
        return function

    def _use_tool(self, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        try:
            arguments = json.dumps([args, kwargs]).encode("ascii")
        except (TypeError, ValueError, RecursionError) as error:
            raise TypeError(
                f"{name}() takes plain data (text, numbers, lists, dicts), for it runs outside of the "
                f"sandbox: {error}"
            ) from None
        if len(arguments) > wire.BLOB_LIMIT:
            raise ValueError(f"{name}() takes {wire.BLOB_LIMIT >> 20} MiB of arguments: pass less")
        reply, blobs = self._calls.call({"fn": "tool", "tool": name}, [arguments])
        _raise_failure(reply, ToolError)
        try:
            return _decode_context(blobs[0], reply["form"])
        except Exception as error:  # whatever unpickling raises: a type that is not there, mostly
            raise ToolError(f"what {name}() returned cannot be had here: {error}") from None

    def _one(self, function: str, prompt: str, model: str | None, context: str | None, schema: Any) -> Any:
        contexts = None if context is None else [context]
        header, blobs = _request(function, [prompt], model, contexts, schema)
        reply, texts = self._calls.call(header, blobs)
        _raise_failure(reply)
        return _reply_of(texts[0], schema)

    def _many(
        self,
        function: str,
        prompts: Sequence[str],
        model: str | None,
        contexts: Sequence[str] | None,
        schema: Any,
    ) -> list[Any]:
        if isinstance(prompts, (str, bytes)):
            raise TypeError(f"{function}_batched takes a list of prompts, not one {type(prompts).__name__}")
        prompts = list(prompts)
        if contexts is not None and len(contexts) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(contexts)} contexts")
        if not prompts:
            return []
        header, blobs = _request(function, prompts, model, contexts, schema)
        reply, texts = self._calls.call({**header, "batch": True}, blobs)
        _raise_failure(reply)
        failures = {index: LLMError(text, kind) for index, kind, text in reply.get("failures", ())}
        return [failures.get(i) or _reply_of(text, schema) for i, text in enumerate(texts)]

    def answer(self) -> tuple[bool, Any]:
        """Whether a final answer stands in the namespace, and what it is."""
        if self.final:
            return True, self.final.pop()
        value = self.names.get("answer")
        if not isinstance(value, dict) or not dict.get(value, "ready"):
            return False, None
        content = dict.get(value, "content")
        return content is not None and not (type(content) is str and content == ""), content

    def draft(self) -> str:
        """What stands in ``answer`` so far: the partial answer, should a limit end the run."""
        value = self.names.get("answer")
        content = dict.get(value, "content") if isinstance(value, dict) else None
        return content if type(content) is str else ""

    def waits_for_content(self) -> bool:
        """Whether a cell declared its answer ready without one."""
        value = self.names.get("answer")
        return isinstance(value, dict) and bool(dict.get(value, "ready"))


def _help(*things: Any) -> None:
    """Print the documentation of a thing."""
    import pydoc

    for thing in things:
        sys.stdout.write(pydoc.plain(pydoc.render_doc(thing)) + "\n")


def _exit(code: Any = None) -> None:
    """End the cell."""
    raise SystemExit(code)


def _quit(code: Any = None) -> None:
    """End the cell."""
    raise SystemExit(code)


def _plain_function(method: Callable[..., Any]) -> Callable[..., Any]:
    """A bound method as a function, so that ``help`` and ``repr`` show a cell no machinery."""

    def function(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    function.__name__ = function.__qualname__ = method.__name__
    function.__doc__ = method.__doc__
    function.__signature__ = _SIGNATURES[method.__name__]  # type: ignore[attr-defined]
    return function


def _signature_in_a_cell(method: Callable[..., Any]) -> inspect.Signature:
    signature = inspect.signature(method)
    return signature.replace(parameters=[p for p in signature.parameters.values() if p.name != "self"])


FUNCTIONS = (
    "llm_query", "llm_query_batched", "rlm_query", "rlm_query_batched", "FINAL", "FINAL_VAR", "SHOW_VARS",
    "budget",
)  # fmt: skip
"""What a cell can call, under the reserved names."""

# computed once, before any fork: in an executor it would touch, and so copy, many pages
_SIGNATURES = {name: _signature_in_a_cell(getattr(Namespace, name)) for name in FUNCTIONS}


def _request(
    function: str, prompts: Sequence[str], model: str | None, contexts: Sequence[str] | None, schema: Any
) -> tuple[dict[str, Any], list[bytes]]:
    if model is not None and not isinstance(model, str):
        raise TypeError(f"model must be the name of a model, not {type(model).__name__}")
    if model is not None and not model.isprintable():
        raise ValueError(f"no model is called {model!r}")
    header: dict[str, Any] = {"fn": function, "model": model}
    if contexts is not None:
        header["contexts"] = True
    blobs = [_prompt(text) for text in (*prompts, *(contexts or ()))]
    if schema is not None:
        header["schema"] = True
        blobs.append(_schema(schema))
    if sum(map(len, blobs)) > wire.BLOB_LIMIT:
        raise ValueError(f"one call takes {wire.BLOB_LIMIT >> 20} MiB of text: ask about smaller parts")
    return header, blobs


def _prompt(text: Any) -> bytes:
    if not isinstance(text, str):
        raise TypeError(f"a prompt must be a str, not {type(text).__name__}: use str() or json.dumps()")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the prompt holds a lone surrogate at character {error.start}, which no model can read: "
            "use text.encode('utf-8', 'replace').decode()"
        ) from None


def _schema(schema: Any) -> bytes:
    """What a reply is to be, as JSON: a JSON schema, or the name of a type of the host's."""
    if hasattr(schema, "model_json_schema"):  # a pydantic model of the cell's own
        schema = schema.model_json_schema()
    if not isinstance(schema, (str, dict)):
        raise TypeError(
            f"schema must be a JSON schema (a dict) or the name of a type, not {type(schema).__name__}"
        )
    try:
        return json.dumps(schema, allow_nan=False).encode("ascii")
    except RecursionError:
        raise ValueError("schema is nested too deeply") from None


def _reply_of(text: bytes, schema: Any) -> Any:
    """A reply as text, or as the data that was asked for."""
    return text.decode("utf-8") if schema is None else json.loads(text)


def _raise_failure(reply: dict[str, Any], error: Any = LLMError) -> None:
    if reply.get("error"):
        kind, text = reply["error"]
        raise error(text, kind)


# --- the executor: running cells ---------------------------------------------------------------------


class Executor:
    """Runs cells in one namespace, and forks a standby after each."""

    def __init__(
        self,
        channel: socket.socket,
        standby: socket.socket,
        slot: StandbySlot,
        outputs: dict[int, int],
        rollback: bool,
    ) -> None:
        self._outputs = outputs
        self._calls = Calls(channel)
        self._standby_socket = standby
        self._slot = slot
        self._rollback = rollback
        self._standby = 0
        self._dying: list[int] = []
        self._spare = os.dup(0)
        self._namespace = Namespace(self._calls)
        self._stdout, self._stderr = sys.stdout, sys.stderr
        self._in_cell = False
        self._last = 0
        self._has_run = False
        """Whether there is anything to lose: what has only been loaded the host can load again."""
        self._is_stale = False
        """Whether the standby lacks what has been loaded since, or the last cell."""
        self._keep: Any = None
        self._loop: Any = None
        self._pid = os.getpid()

    def main(self, enforced: list[str], missing: list[str]) -> NoReturn:
        """Serve the supervisor's commands until the session ends."""
        signal.signal(signal.SIGINT, self._on_interrupt)
        self._calls.send({"t": "ready", "enforced": enforced, "missing": missing})
        is_settled = True
        while True:
            if not (is_settled or self._calls.pending(SETTLING)):
                self._fork_standby()
                is_settled = True
            message, blobs, descriptor = self._calls.command()
            if message["t"] == "execute":
                if self._is_stale and self._fork_standby():
                    continue  # this is the copy, which took over because of this very cell
                self._slot.cell = message["id"]
                if not self._execute(message, blobs):
                    self._fork_standby()
                is_settled = True
            elif message["t"] == "load":
                self._load(message, blobs, descriptor)
                self._is_stale = self._has_run
                is_settled = not self._has_run
            elif message["t"] == "room":
                while _reap(-1):
                    pass
                self._fork_standby(ask_for_room=False)

    def _on_interrupt(self, *_: object) -> None:
        if self._in_cell:
            self._calls.interrupt()

    # -- the standby

    def _fork_standby(self, ask_for_room: bool = True) -> bool:
        """Leave a sleeping copy of this process; it replaces the one before. True in the copy, once woken."""
        self._is_stale = False
        if not (self._rollback and _has_room()):
            return False  # a copy of a process without memory could not even wake up: the older one stays
        try:
            pid = _fork(self._standby_socket.fileno())
        except OSError:  # at the process limit; the older copy stays until there is room
            if ask_for_room:
                self._calls.send({"t": "crowded"})
            return False
        if pid == 0:
            self._take_over()
            return True
        self._slot.pid, self._slot.kept = pid, self._last
        if self._standby:
            _signal(self._standby, signal.SIGKILL)
            self._dying.append(self._standby)
        self._standby = pid
        # reaped later, when that does not mean to wait
        self._dying = [old for old in self._dying[:-1] if not _reap(old)] + self._dying[-1:]
        if not self._calls.pending():
            self._warm_up()
        return False

    def _warm_up(self) -> None:
        """Touch what the next cell will touch: after a fork, the first write to each page copies it."""
        header, parts = self._cell(0, "None")
        frame = wire.encode({**header, "parts": list(parts)}, [b"", b""])
        decoder = _decoder()
        decoder.feed(frame)
        decoder.next_frame()

    def _take_over(self) -> None:
        """In the copy, which is needed now: become the executor."""
        try:
            os.close(self._spare)  # the cell may have used up all other descriptors
        except OSError:
            pass
        data, descriptor = _receive_with_descriptor(self._standby_socket, READ_SIZE)
        if not data or descriptor < 0:
            os._exit(0)
        lost = [t.name for t in threading.enumerate() if t is not threading.current_thread()]
        ctypes.pythonapi.PyOS_AfterFork_Child()
        lockdown.die_with_parent()
        channel, self._standby_socket = self._standby_socket, socket.socket(fileno=descriptor)
        self._calls.channel.close()
        self._calls.adopt(channel)
        self._pid, self._standby, self._dying = os.getpid(), 0, []
        self._stdout, self._stderr = _open_output(1), _open_output(2)  # their locks may be held
        sys.stdout, sys.stderr = self._stdout, self._stderr
        self._spare = os.dup(0)
        if self._loop is not None and "concurrent.futures" in sys.modules:
            pool = sys.modules["concurrent.futures"].ThreadPoolExecutor()
            self._loop.set_default_executor(pool)  # the old one's threads did not come along
        names = [_text(f"thread {name}"[:100]).decode() for name in lost[:20]]
        self._calls.send({"t": "ready", "lost": names})
        self._fork_standby()

    # -- contexts

    def _load(self, message: dict[str, Any], blobs: list[bytes], descriptor: int) -> None:
        reply: dict[str, Any] = {"t": "loaded", "id": message["id"]}
        try:
            data = _read_descriptor(descriptor) if descriptor >= 0 else blobs[0]
            self._namespace.take(message, data)
            del data
        except Exception as error:  # whatever unpickling raises is the host's to report
            no_room = isinstance(error, MemoryError) or getattr(error, "errno", 0) == errno.ENOMEM
            text = NO_ROOM if no_room else str(error)
            reply["error"] = _text(f"{type(error).__name__}: {text}").decode()[:2000]
        self._calls.send(reply)

    # -- cells

    def _execute(self, message: dict[str, Any], blobs: list[bytes]) -> bool:
        """Run a cell. Whether it has submitted an answer, so that there will hardly be another."""
        self._has_run, self._last = True, message["id"]
        if message.get("keep"):
            header, parts = self._save_or_load(message["id"], message["keep"], blobs)
        else:
            header, parts = self._cell(message["id"], blobs[0].decode("utf-8", "surrogatepass"))
        header["parts"] = list(parts)
        self._calls.send(header, list(parts.values()))
        self._is_stale = True
        return "final" in parts

    def _cell(self, number: int, source: str) -> tuple[dict[str, Any], dict[str, bytes]]:
        """Run one cell and put its result together."""
        filename = f"<cell {number}>"
        linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)

        def work(parts: dict[str, bytes]) -> None:
            value = self._evaluate(source, filename)
            if value is not None:
                self._namespace.names["_"] = value
                parts["echo"] = _text(_clip(repr(value), ECHO_LIMIT))
                _add_plain("value", value, parts)

        header, parts = self._result(number, work)
        self._add_answer(header, parts)
        return header, parts

    def _save_or_load(
        self, number: int, step: str, blobs: list[bytes]
    ) -> tuple[dict[str, Any], dict[str, bytes]]:
        """Save all variables, or put saved ones back: with the objects' own code, so run like a cell.

        What it takes comes with the command (`rlm.keep` and what that needs), for few sessions do it.
        """

        def work(parts: dict[str, bytes]) -> None:
            if self._keep is None:
                keep = types.ModuleType("rlm.keep")
                exec(compile(blobs[0], "rlm/keep.py", "exec"), keep.__dict__)
                self._keep = keep.Keeper(self._namespace.names, self._namespace.reserved, blobs[1])
            if step == "save":
                parts["snapshot"], report = self._keep.save(SNAPSHOT_LIMIT)
            else:
                report = self._keep.load(blobs[2])
            _add_plain("value", report, parts)

        return self._result(number, work)

    def _result(
        self, number: int, work: Callable[[dict[str, bytes]], None]
    ) -> tuple[dict[str, Any], dict[str, bytes]]:
        """What came of a cell's work, whatever that did."""
        header: dict[str, Any] = {"t": "result", "id": number}
        parts: dict[str, bytes] = {}
        error = self._run(work, parts)
        if os.getpid() != self._pid:
            os._exit(0)  # a process that the cell forked has come to the cell's end
        if error is not None:
            header["error"] = error
        self._close_output()
        self._namespace.restore()
        return header, parts

    def _run(self, work: Callable[[dict[str, bytes]], None], parts: dict[str, bytes]) -> list[str] | None:
        """Run one cell. What it raised comes back as [type, message], the traceback in ``parts``."""
        _set_handler(_SIGINT, self._on_interrupt)
        try:
            try:
                self._in_cell = True
                work(parts)
            finally:
                self._in_cell = False
        except BaseException as error:  # a cell may raise anything; its session goes on
            self._in_cell = False
            if isinstance(error, KeyboardInterrupt):
                self._calls.repair()
            return _describe(error, parts)
        return None

    def _evaluate(self, source: str, filename: str) -> Any:
        tree = compile(source, filename, "exec", _COMPILE_FLAGS | ast.PyCF_ONLY_AST, dont_inherit=True)
        codes = []
        last = tree.body[-1] if tree.body else None
        echoes = isinstance(last, ast.Expr) and not _ends_in_semicolon(source, last)
        body = tree.body[:-1] if echoes else tree.body
        if body:
            module = ast.Module(body, tree.type_ignores)
            codes.append(compile(module, filename, "exec", _COMPILE_FLAGS, dont_inherit=True))
        if echoes:
            assert isinstance(last, ast.Expr)
            expression = ast.Expression(last.value)
            codes.append(compile(expression, filename, "eval", _COMPILE_FLAGS, dont_inherit=True))
        if any(code.co_flags & inspect.CO_COROUTINE for code in codes):
            return self._evaluate_in_loop(codes, echoes)
        value = None
        for code in codes:
            value = eval(code, self._namespace.names)
        return value if echoes else None

    def _evaluate_in_loop(self, codes: list[types.CodeType], echoes: bool) -> Any:
        """Run a cell that awaits: all of it in the session's event loop, as in a notebook."""
        if self._loop is None or self._loop.is_closed():
            import asyncio  # most sessions never await: its 30 ms are theirs who do

            self._loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self._loop)

        async def cell() -> Any:
            value = None
            for code in codes:
                value = eval(code, self._namespace.names)
                if code.co_flags & inspect.CO_COROUTINE:
                    value = await value
            return value if echoes else None

        task = self._loop.create_task(cell())
        try:
            return self._loop.run_until_complete(task)
        except KeyboardInterrupt:  # it struck in the loop's own code: let it strike in the cell
            task.cancel()
            try:
                self._loop.run_until_complete(task)
            except BaseException as error:
                raise KeyboardInterrupt from error
            raise

    def _close_output(self) -> None:
        """Flush what was printed, and undo what the cell did to sys.stdout or its descriptor."""
        for stream in (sys.stdout, sys.stderr, self._stdout, self._stderr):
            try:
                stream.flush()
            except Exception:
                pass  # the cell closed or replaced it with something that cannot flush
        sys.stdout, sys.stderr = self._stdout, self._stderr
        for fd, pipe in self._outputs.items():
            try:
                os.dup2(pipe, fd)
            except OSError:
                pass  # the cell closed every descriptor it found, and prints no more
        if self._stdout.closed or self._stderr.closed:
            self._stdout, self._stderr = _open_output(1), _open_output(2)
            sys.stdout, sys.stderr = self._stdout, self._stderr

    def _add_answer(self, header: dict[str, Any], parts: dict[str, bytes]) -> None:
        """Read the answer from the namespace: the model's objects, whose methods may do anything."""
        try:
            found, value = self._namespace.answer()
            if found:
                self._add_final(value, parts)
                return
            draft = self._namespace.draft()
            if draft:
                parts["draft"] = _text(draft[:PLAIN_LIMIT])
            elif self._namespace.waits_for_content():
                header["note"] = "answer['ready'] is set, but answer['content'] is empty: set the content"
        except BaseException as error:
            reason = str(error) if type(error) is ValueError else type(error).__name__
            header["error"] = ["ValueError", f"the final answer cannot be read: {reason}"[:2000]]

    def _add_final(self, value: Any, parts: dict[str, bytes]) -> None:
        text = str(value)
        if len(text) > FINAL_LIMIT:
            raise ValueError(f"it is longer than {FINAL_LIMIT:,} characters")
        parts["final"] = _text(text)
        if not isinstance(value, str):
            _add_plain("final_value", value, parts)


_COMPILE_FLAGS = getattr(ast, "PyCF_ALLOW_TOP_LEVEL_AWAIT", 0x2000)


def _ends_in_semicolon(source: str, last: ast.stmt) -> bool:
    """Whether a semicolon after the last expression asks for no echo."""
    assert last.end_lineno is not None and last.end_col_offset is not None
    line = source.split("\n")[last.end_lineno - 1].encode("utf-8", "surrogatepass")
    return line[last.end_col_offset :].lstrip().startswith(b";")


def _add_plain(name: str, value: Any, parts: dict[str, bytes]) -> None:
    """Add ``value`` as JSON when that loses nothing: dicts with str keys, lists, and scalars."""
    try:
        if _is_plain(value):
            data = json.dumps(value, allow_nan=False)
            if len(data) <= PLAIN_LIMIT:
                parts[name] = data.encode("ascii")
    except (TypeError, ValueError, RecursionError):
        pass  # not plain data; the text form says what it is


def _is_plain(value: Any) -> bool:
    if type(value) is dict:
        return all(type(key) is str and _is_plain(key) and _is_plain(item) for key, item in value.items())
    if type(value) is list:
        return all(map(_is_plain, value))
    if type(value) is str:
        return value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value)
    return value is None or type(value) in (bool, int, float)


def _describe(error: BaseException, parts: dict[str, bytes]) -> list[str]:
    """[type, message] of what a cell raised; its traceback, without frames of this file, in ``parts``."""
    try:
        lines = traceback.TracebackException.from_exception(error)
        _hide_machinery(lines, set())
        parts["traceback"] = _text(_clip("".join(lines.format()), TRACEBACK_LIMIT))
        message = str(error)
    except BaseException as second:  # a __str__ or __repr__ of the cell's own that raises
        message = f"(its text could not be had: {type(second).__name__})"
    return [type(error).__name__[:200], _text(_clip(message, 2000)).decode()]


def _hide_machinery(lines: traceback.TracebackException, seen: set[int]) -> None:
    if id(lines) in seen:
        return
    seen.add(id(lines))
    frames = [frame for frame in lines.stack if frame.filename != __file__]
    cells = (index for index, frame in enumerate(frames) if frame.filename.startswith("<cell "))
    lines.stack[:] = frames[next(cells, 0) :]  # before the cell's own: the event loop of a top-level await
    for linked in (lines.__cause__, lines.__context__, *(getattr(lines, "exceptions", None) or ())):
        if linked is not None:
            _hide_machinery(linked, seen)


def _read_descriptor(descriptor: int) -> Any:
    """The bytes behind a descriptor, without a copy where the kernel can map them."""
    try:
        size = os.fstat(descriptor).st_size
        return mmap.mmap(descriptor, size, prot=mmap.PROT_READ) if size else b""
    finally:
        os.close(descriptor)


def _decode_context(data: Any, form: str) -> Any:
    """A context as the host encoded it. Trusted: only ever called with the host's bytes."""
    if form == "text":
        return str(data, "utf-8", "surrogatepass")
    if form == "bytes":
        return bytes(data)
    return pickle.loads(data)


def _open_output(fd: int) -> io.TextIOWrapper:
    raw = io.FileIO(fd, "wb", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw, 1 << 16),
        encoding="utf-8",
        errors="backslashreplace",
        newline="\n",
        line_buffering=True,
    )


# not signal.signal: its enums touch, and so after a fork copy, 40 pages
_SIGINT = int(signal.SIGINT)

_libc = ctypes.PyDLL(None, use_errno=True)  # PyDLL: calls keep the interpreter's lock


def _fork(wake: int) -> int:
    """Fork; the child sleeps until ``wake`` is readable, and only then returns 0.

    The child wakes up in one case out of very many, so it does next to nothing before it
    sleeps: every page it wrote to would be copied. What os.fork does for a child's
    interpreter (PyOS_AfterFork_Child) is left to whoever is woken.
    """
    buffer = ctypes.create_string_buffer(1)
    length = ctypes.c_size_t(1)
    ctypes.pythonapi.PyOS_BeforeFork()
    pid = _libc.fork()
    if pid == 0:
        _libc.setpgid(0, 0)  # a cell that signals its own group does not mean this one
        while _libc.recv(wake, buffer, length, socket.MSG_PEEK) < 0:
            if ctypes.get_errno() == errno.EAGAIN:  # a cell has made the shared socket non-blocking
                _libc.fcntl(wake, fcntl.F_SETFL, os.O_RDWR)
            elif ctypes.get_errno() != errno.EINTR:
                _libc._exit(0)
        return 0
    ctypes.pythonapi.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(ctypes.get_errno(), "fork")
    _libc.setpgid(pid, pid)  # here too: whichever process runs first
    return int(pid)


def _has_room() -> bool:
    """Whether enough memory is left for a copy of this process to take over in."""
    try:
        mmap.mmap(-1, HEADROOM).close()  # address space, as the limit counts it: no page is touched
    except (OSError, MemoryError):
        return False
    return True


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except OSError:
        pass  # it has ended


def _reap(pid: int) -> bool:
    """Collect a child that has ended, or with -1 any; False while there is none."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] != 0
    except OSError:
        return pid != -1  # a cell has collected it


def _run_executor(
    channel: socket.socket,
    standby: socket.socket,
    slot: StandbySlot,
    outputs: dict[str, int],
    options: dict[str, Any],
) -> NoReturn:
    """In the forked child: give up rights, become the executor, never return."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setpgid(0, 0)
        if os.getppid() == 1:
            os.nice(CELL_NICENESS)
        pipes = {1: outputs["stdout"], 2: outputs["stderr"]}
        for fd, pipe in pipes.items():
            os.dup2(pipe, fd)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False))
        sys.stdout, sys.stderr = _open_output(1), _open_output(2)
        for name in [n for n in sys.modules if n.partition(".")[0] == "rlm"]:
            del sys.modules[name]  # a cell's `import rlm` is its own affair
        enforced, missing = give_up(options)
        lockdown.die_with_parent()  # last: a change of user clears it
        rollback = options.get("rollback", True)
        Executor(channel, standby, slot, pipes, rollback).main(enforced, missing)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(70)


def give_up(options: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Drop the rights that ``options["give_up"]`` names. Returns what is now enforced, and what is not.

    What this machine cannot enforce is the host's to judge, before it sends a cell.
    """
    wanted = options.get("give_up", {})
    enforced: list[str] = []
    missing: list[str] = []

    def attempt(name: str, step: Callable[[], None]) -> None:
        try:
            step()
            enforced.append(name)
        except OSError as error:
            missing.append(f"{name} ({error.strerror or error})")

    if options.get("scratch"):
        os.chdir(options["scratch"])
    os.environ.update(options.get("environ", {}))
    _limit(options.get("limits", {}))
    lockdown.no_new_privileges()
    keep = wanted.get("keep", 0)
    if wanted.get("uid") is not None:
        attempt("user", lambda: lockdown.become(wanted["uid"], keep))
    elif wanted:
        attempt("capabilities", lambda: lockdown.drop_capabilities(keep))
    lockdown.set_readable(True)
    _volunteer_for_out_of_memory()
    rules = wanted.get("landlock")
    if rules is not None:
        if rules.get("read") is not None:
            attempt("files", lambda: lockdown.landlock_files(rules["read"], rules["write"]))
        attempt("signals", lockdown.landlock_signals)
    if wanted.get("seccomp"):
        network = bool(wanted.get("network"))
        attributes = bool(wanted.get("attributes", True))
        attempt("system calls", lambda: lockdown.seccomp(network=network, attributes=attributes))
        if "system calls" in enforced and not network:
            enforced.append("network")
    if "NPROC" in options.get("limits", {}):
        if os.getuid():
            enforced.append("processes")
        else:
            missing.append("processes (the kernel lets root start any number)")
    return enforced, missing


def _volunteer_for_out_of_memory() -> None:
    """Should the machine run out of memory, the cell goes first."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:
        pass  # no /proc here, or not ours


def _limit(limits: dict[str, int]) -> None:
    """Set resource limits, never above what the process already may."""
    for name, value in limits.items():
        which = getattr(resource, "RLIMIT_" + name)
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))


def serve(
    reader: int, writer: int, token: str | None, options: dict[str, Any], lane: int | None = None
) -> NoReturn:
    """Run a session over two descriptors (which may be the same) until the other end closes.

    ``token`` proves to the host whose session this is; without one, the worker says ``warm``
    when it is ready, and waits for the frame that brings it. ``lane`` is a Unix socket
    through which the host can hand over descriptors, where the two share a kernel.
    """
    Supervisor(reader, writer, token, options, lane).run()

"""Replies on file, so that what has been asked before need not be asked again.

A `Cache` is a SQLite database that any number of processes may share. It is read where calls are
made, which takes microseconds, and written by a thread of its own: a commit may have to wait for the
disk or for another process, and the core's loop must not. Whatever goes wrong with the file later than
at its opening costs the cache, never a reply.

`Sharing` is one handler's view of it, in which identical calls in flight are made once.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import copy
import hashlib
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Self

import msgspec

from . import jsontext, secrets
from .client import Reply, Request
from .errors import ConfigError, ModelError
from .gate import Gate
from .recording import request_key

log = logging.getLogger("rlm")

APPLICATION = 0x726C6D63
"""What says in a file's header that it is ours: "rlmc"."""

VERSION = 1
"""Of the tables in it."""

INTERVAL = 0.5
"""Seconds of replies that a process which is killed may lose."""

BATCH = 500
"""Replies that are written before the interval is over."""

ROWS = 300
"""Replies in one statement: within it the thread that writes does not need the interpreter's lock."""

HITS_AT_A_TIME = 16
"""Hits of one handler for which the core's loop does nothing else: about a millisecond's worth."""

OPENING_PATIENCE, READING_PATIENCE, WRITING_PATIENCE = 1.0, 0.25, 10.0
"""Seconds to wait for another process. The first two are spent on the core's loop; readers rarely wait."""

_TABLE = "CREATE TABLE replies (key BLOB PRIMARY KEY, created REAL NOT NULL, reply BLOB NOT NULL)"
_SELECT = "SELECT reply FROM replies WHERE key = ?"
_INSERT = "INSERT OR REPLACE INTO replies (key, created, reply) VALUES "

_NOT_WRITTEN = "not written any more"
_ANOTHER = "give cache= another path"

_decoder = msgspec.json.Decoder(Reply)


# --- keys ----------------------------------------------------------------------------------------


def key_of(gate: Gate, request: Request) -> bytes | None:
    """The name of what is asked of whom, without a secret in it; None for what cannot be named."""
    try:
        origin = gate.origin(request)
        return hashlib.sha256(jsontext.canonical([*origin, request_key(request, origin[-1])])).digest()
    except Exception as error:  # in `extra` may be anything, and an address is a plugin's word
        log.debug("a call of %s cannot be kept: %s", gate.name, type(error).__name__)
        return None


def settings_key(settings: Any) -> str:
    """A name for what a client was made with, without its secrets: other settings, other replies."""
    try:
        plain = msgspec.to_builtins(secrets.mask(settings), str_keys=True, enc_hook=_odd)
        return hashlib.sha256(jsontext.canonical(plain)).hexdigest()
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ConfigError(f"cache= needs settings of a client that can be written down: {error}") from error


def _odd(value: Any) -> str:
    return os.fsdecode(value) if isinstance(value, os.PathLike) else f"<{type(value).__qualname__}>"


# --- the file ------------------------------------------------------------------------------------


class Cache:
    """Complete replies by what was asked. Readable by the file's owner only.

    Raises ConfigError for a file that is no cache or cannot be used. One that is locked, broken or
    full is a warning in the log, and from then on there is nothing found or nothing written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self._process = os.getpid()
        self._told = threading.Lock()
        self._reader: sqlite3.Connection | None = None
        self._writer = _Writer(self.path, self._failed)
        try:
            self._reader = _opened(self.path)
        except sqlite3.Error as error:
            if _primary(error) in _MISTAKES:
                raise ConfigError(_mistake(self.path, error)) from error
            self._writer.end()
            self._failed("not used", error)

    def get(self, key: bytes) -> Reply | None:
        """The reply to this, marked as found and free of charge; None when there is none."""
        value = self._writer.waiting.get(key) or self._read(key)
        if not isinstance(value, bytes):
            return None
        try:
            return found(_decoder.decode(value))
        except msgspec.DecodeError:  # somebody has changed it: the next reply replaces it
            return None

    def put(self, key: bytes, reply: Reply) -> None:
        """Keep a reply, if it is complete: one that was cut off may be another the next time."""
        if reply.finish != "stop" or self._reader is None or not self._is_ours():
            return
        with contextlib.suppress(
            TypeError, ValueError, OverflowError, RecursionError
        ):  # no text JSON can hold
            self._writer.put(key, msgspec.json.encode(msgspec.structs.replace(reply, raw=None, cached=False)))

    def sharing(self) -> Sharing:
        """A view of this cache in which identical calls in flight are made once."""
        return Sharing(self)

    def _read(self, key: bytes) -> Any:
        if self._reader is None or not self._is_ours():
            return None
        try:
            row = self._reader.execute(_SELECT, (key,)).fetchone()
        except sqlite3.Error as error:
            self._close_reader()
            self._failed("not read any more", error)
            return None
        return row and row[0]

    def _is_ours(self) -> bool:
        """Not in a fork of the process that opened it, where SQLite must not be used, nor the thread is."""
        return os.getpid() == self._process

    def _failed(self, what: str, error: Exception) -> None:
        """Say once that something is wrong with the file. Called by both threads."""
        if self._told.acquire(blocking=False):
            log.warning("the cache %s is %s: %s", self.path, what, error)

    def _close_reader(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()

    # -- life

    def close(self) -> None:
        """Write what is left, and close the file. Safe to call twice."""
        if self._is_ours():
            self._close_reader()  # first: whoever closes last brings the file up to date, which takes time
            self._writer.end().result()

    async def aclose(self) -> None:
        """`close`, without keeping the loop waiting."""
        if self._is_ours():
            self._close_reader()
            await asyncio.shield(asyncio.wrap_future(self._writer.end()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Writer:
    """Writes replies in a thread, which starts with the first of them."""

    def __init__(self, path: Path, failed: Callable[[str, Exception], None]) -> None:
        self.waiting: dict[bytes, bytes] = {}
        """What is not yet in the file."""
        self._path = path
        self._failed = failed
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_ending = False
        self._ended: concurrent.futures.Future[None] = concurrent.futures.Future()

    def put(self, key: bytes, value: bytes) -> None:
        """Have a reply written soon. Once this has ended, that does nothing."""
        with self._changed:
            if self._is_ending or not self._has_started():
                return
            self.waiting[key] = value
            if len(self.waiting) in (1, BATCH):
                self._changed.notify()

    def end(self) -> concurrent.futures.Future[None]:
        """Write what is left and stop. The future is done when that is."""
        with self._changed:
            is_idle = self._thread is None and not self._is_ending
            self._is_ending = True
            self._changed.notify()
        if is_idle:
            self._ended.set_result(None)
        return self._ended

    def _has_started(self) -> bool:
        if self._thread is None:  # a daemon: a process that does not close may end all the same
            thread = threading.Thread(target=self._run, name="rlm-cache", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # this process has as many as it may
                self._failed(_NOT_WRITTEN, error)
                return False
            self._thread = thread
        return True

    def _run(self) -> None:
        try:
            with contextlib.closing(_connected(self._path, WRITING_PATIENCE)) as connection:
                while rows := self._next():
                    self._write(connection, rows)
        except Exception as error:  # a boundary: nothing that goes wrong here may cost more than the cache
            self._failed(_NOT_WRITTEN, error)
        finally:
            with self._changed:
                self._is_ending = True
                self.waiting.clear()
            self._ended.set_result(None)

    def _next(self) -> list[tuple[bytes, bytes]]:
        """Replies to write, as soon as there are enough or for long enough; none at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self.waiting or self._is_ending)
            self._changed.wait_for(lambda: len(self.waiting) >= BATCH or self._is_ending, INTERVAL)
            return [*self.waiting.items()]

    def _write(self, connection: sqlite3.Connection, rows: list[tuple[bytes, bytes]]) -> None:
        now = time.time()
        connection.execute("BEGIN IMMEDIATE")
        for start in range(0, len(rows), ROWS):
            some = rows[start : start + ROWS]
            values = [value for key, reply in some for value in (key, now, reply)]
            connection.execute(_INSERT + ", ".join(["(?, ?, ?)"] * len(some)), values)
        connection.execute("COMMIT")
        with self._changed:
            for key, value in rows:
                if self.waiting.get(key) is value:
                    del self.waiting[key]


# --- opening it ----------------------------------------------------------------------------------

_MISTAKES = {
    sqlite3.SQLITE_NOTADB: "it is no SQLite database",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened",
    sqlite3.SQLITE_READONLY: "it cannot be written",
    sqlite3.SQLITE_PERM: "it cannot be opened",
}
"""What the user has to put right; all else may happen to any file."""


def _primary(error: sqlite3.Error) -> int:
    """What happened, without the details that SQLite adds in the higher bits."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def _mistake(path: Path, error: sqlite3.Error) -> str:
    return f"the cache {str(path)!r} is of no use: {_MISTAKES[_primary(error)]} ({error}); {_ANOTHER}"


def _opened(path: Path) -> sqlite3.Connection:
    """A connection for reading, to a file that has our tables: now, if it was empty."""
    _make_private(path)
    connection = _connected(path, OPENING_PATIENCE)
    try:
        _patiently(lambda: _prepare(connection, path))
        connection.execute(f"PRAGMA busy_timeout = {READING_PATIENCE * 1000:.0f}")
    except BaseException:
        connection.close()
        raise
    return connection


def _make_private(path: Path) -> None:
    """Create the file, for its owner only. SQLite gives the files beside it the same rights.

    One that exists is not touched: to close it would undo the locks that this process has on it.
    """
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    except FileExistsError:
        pass
    except OSError as error:
        raise ConfigError(f"the cache {str(path)!r} cannot be made: {error.strerror}") from error


def _connected(path: Path, patience: float) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"{path.as_uri()}?mode=rw",  # never made here: it would be readable by everybody
        uri=True,
        timeout=patience,
        isolation_level=None,
        check_same_thread=False,
    )
    try:
        connection.execute("PRAGMA synchronous = NORMAL")
    except BaseException:
        connection.close()
        raise
    return connection


def _patiently(work: Callable[[], None]) -> None:
    """Do what may fail at once while another process does the same: SQLite waits for most locks, not all."""
    end = time.monotonic() + OPENING_PATIENCE
    while True:
        try:
            return work()
        except sqlite3.OperationalError as error:
            if _primary(error) != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
        time.sleep(0.01)


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    if not _is_cache(connection, path):
        with _transaction(connection):
            if not _is_cache(connection, path):  # else another process was faster
                connection.execute(_TABLE)
                connection.execute(f"PRAGMA application_id = {APPLICATION}")
                connection.execute(f"PRAGMA user_version = {VERSION}")
    connection.execute("PRAGMA journal_mode = WAL").fetchone()


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        with contextlib.suppress(sqlite3.Error):  # a full disk has rolled it back already
            connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _is_cache(connection: sqlite3.Connection, path: Path) -> bool:
    """Whether the file has our tables; False when it is empty. Raises ConfigError for anybody else's."""
    ((application,),) = connection.execute("PRAGMA application_id")
    ((version,),) = connection.execute("PRAGMA user_version")
    ((tables,),) = connection.execute("SELECT count(*) FROM sqlite_master")
    if (application, version, tables) == (0, 0, 0):
        return False
    if application != APPLICATION:
        raise ConfigError(f"the cache {str(path)!r} is a database of something else: {_ANOTHER}")
    if version > VERSION:
        raise ConfigError(
            f"the cache {str(path)!r} was made by a newer release: its tables are of version {version}, and "
            f"this one knows version {VERSION}; install the newer one, or {_ANOTHER}"
        )
    return True


# --- in flight -----------------------------------------------------------------------------------


def found(reply: Reply) -> Reply:
    """A reply as one gets it who did not pay for it: marked, and at no cost."""
    usage = msgspec.structs.replace(reply.usage, cost=0.0)
    return msgspec.structs.replace(reply, usage=usage, raw=None, cached=True)


class _Flight:
    """A call that is being made, and what came of it: neither, when whoever made it was cancelled."""

    def __init__(self) -> None:
        self.over = asyncio.Event()
        self.reply: Reply | None = None
        self.error: Exception | None = None


class Sharing:
    """A cache, and the calls of one handler that are on their way to it.

    Who asks what is being asked already waits for that reply. Should the call fail, after all its
    retries, it has failed for everybody who waits, with an exception each; when who makes it is
    cancelled, one of the others makes it again. Nobody is cancelled by somebody else.
    """

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._flights: dict[bytes, _Flight] = {}
        self._turns = asyncio.Semaphore(HITS_AT_A_TIME)

    async def reply(
        self, gate: Gate, request: Request, make: Callable[[], Awaitable[Reply]]
    ) -> tuple[Reply, bool]:
        """A gate's reply, and whether there was no need to ``make`` the call."""
        key = key_of(gate, request)
        while key is not None:
            reply = self._cache.get(key)
            if reply is not None:
                async with self._turns:  # thousands in a row would keep the loop from everything else
                    await asyncio.sleep(0)
                return reply, True
            flight = self._flights.get(key)
            if flight is None:
                return await self._make(key, make), False
            await flight.over.wait()
            if flight.error is not None:
                raise _another(flight.error) from flight.error.__cause__
            if flight.reply is not None:
                return found(flight.reply), True
        return await make(), False

    async def _make(self, key: bytes, make: Callable[[], Awaitable[Reply]]) -> Reply:
        flight = self._flights[key] = _Flight()
        try:
            flight.reply = await make()
            self._cache.put(key, flight.reply)
            return flight.reply
        except Exception as error:
            flight.error = error
            raise
        finally:
            del self._flights[key]
            flight.over.set()


def _another(error: Exception) -> Exception:
    """The same error as an object of its own: what ends a run is given that run's trace."""
    try:
        twin = copy.copy(error)
    except Exception:  # a plugin's error, made in a way of its own
        return ModelError(f"the same call failed: {type(error).__name__}: {error}")
    return twin.with_traceback(None)

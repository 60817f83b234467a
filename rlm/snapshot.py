"""Saved variables, as the host has them: bytes that only a sandbox ever reads, in an envelope of the host's.

What is in them was made by the code of a model, so the host neither unpickles nor looks into it. When it
leaves the process, in a file, it is signed with a key of this user's, so that nobody else's file is put
into a session of ours.
"""

from __future__ import annotations

import dataclasses
import functools
import hmac
import importlib.util
import os
import secrets
from pathlib import Path

from .errors import ConfigError

KEY_VARIABLE = "RLM_SNAPSHOT_KEY"
"""Where the key comes from, for processes that are to read each other's files; else one is kept in a file."""

KEY_BYTES = 32
FORMAT = 1
MAGIC = b"rlm snapshot %d\n" % FORMAT
HEAD = 64
"""Bytes by which a file is told from others."""


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The variables of a session at one moment."""

    python: str
    """Version of the Python that saved them."""
    data: bytes
    """For a sandbox alone."""
    lost: tuple[str, ...] = ()
    """What could not be saved, each with the reason."""

    @property
    def minor_version(self) -> str:
        """Of that Python: another one does not understand its functions."""
        return ".".join(self.python.split(".")[:2])


@functools.cache
def travelling() -> list[bytes]:
    """The sources that a sandbox needs for saving and restoring: ours, and cloudpickle's."""
    found = importlib.util.find_spec("cloudpickle")
    assert found is not None, "cloudpickle is a dependency of this package"
    assert found.origin is not None
    library = Path(found.origin).with_name("cloudpickle.py")
    return [Path(__file__).with_name("keep.py").read_bytes(), library.read_bytes()]


def seal(content: bytes) -> bytes:
    """Content as the bytes of a file: what it is, a signature, the content."""
    return b"".join((MAGIC, _sign(content, _key(create=True) or b""), content))


def open_sealed(data: bytes, name: str) -> bytes:
    """The content of a file that `seal` made. Raises ConfigError for any other; ``name`` is for its text."""
    if not data.startswith(MAGIC):
        first = data[:HEAD].partition(b"\n")[0].decode("ascii", "replace")
        if first.startswith("rlm snapshot "):
            raise ConfigError(f"{name} was saved by another version ({first}; this one reads {FORMAT})")
        raise ConfigError(f"{name} is no saved session")
    signature, content = data[len(MAGIC) :][:KEY_BYTES], data[len(MAGIC) + KEY_BYTES :]
    key = _key(create=False)
    if not key or not hmac.compare_digest(signature, _sign(content, key)):
        raise ConfigError(
            f"{name} was not saved with this user's key, or has been changed since. A session of another "
            f"machine needs that machine's key, in the environment variable {KEY_VARIABLE}"
        )
    return content


def _sign(content: bytes, key: bytes) -> bytes:
    return hmac.digest(key, MAGIC + content, "sha256")


def _key(create: bool) -> bytes | None:
    """This user's key; None when there is none yet and none is to be made."""
    given = os.environ.get(KEY_VARIABLE)
    if given:
        return given.encode()
    path = _key_file()
    try:
        key = path.read_bytes()
    except FileNotFoundError:
        return _make_key(path) if create else None
    except OSError as error:
        raise ConfigError(f"the key {str(path)!r} cannot be read: {error.strerror}") from error
    if len(key) < KEY_BYTES:  # anybody can sign with what is left of it
        raise ConfigError(f"the key {str(path)!r} is none: delete it, and with it all saved sessions")
    return key


def _make_key(path: Path) -> bytes:
    """A new key, unless another process is faster."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
        try:
            os.link(fresh, path)
        except FileExistsError:
            pass
        finally:
            fresh.unlink()
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"no key can be kept at {str(path)!r} ({error.strerror}): set {KEY_VARIABLE} instead"
        ) from error


def _key_file() -> Path:
    """Where programs keep what is theirs and no setting (XDG base directories)."""
    try:
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    except RuntimeError as error:  # of a user who is in no list of users, in a container say
        raise ConfigError(f"this user has no home for a key: set {KEY_VARIABLE}") from error
    return Path(state) / "rlm" / "snapshot.key"

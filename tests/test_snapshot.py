"""Facts about sealed files: whose they are, and that nobody else's are opened."""

import os
import stat
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rlm import snapshot
from rlm.errors import ConfigError
from rlm.snapshot import FORMAT, KEY_BYTES, KEY_VARIABLE, MAGIC, Snapshot, open_sealed, seal

CONTENT = bytes(range(256)) * 10


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this user's key is kept: nowhere yet."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    return tmp_path / "state" / "rlm"


def refusal(data: bytes) -> str:
    with pytest.raises(ConfigError) as caught:
        open_sealed(data, "'the file'")
    return str(caught.value)


# --- seals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"x", CONTENT, MAGIC])
def test_what_is_sealed_is_opened(content: bytes) -> None:
    sealed = seal(content)
    assert sealed.startswith(MAGIC)
    assert open_sealed(sealed, "'the file'") == content


def test_a_byte_changed_anywhere_is_noticed() -> None:
    sealed = bytearray(seal(b"some content"))
    for place in range(len(sealed)):
        sealed[place] ^= 1
        assert "'the file'" in refusal(bytes(sealed))
        sealed[place] ^= 1
    assert open_sealed(bytes(sealed), "") == b"some content"


@pytest.mark.parametrize(
    "length", [len(MAGIC), len(MAGIC) + 1, len(MAGIC) + KEY_BYTES, len(MAGIC) + KEY_BYTES + 5]
)
def test_a_file_that_ends_too_early_is_refused(length: int) -> None:
    assert "was not saved with this user's key, or has been changed since" in refusal(seal(CONTENT)[:length])


def test_a_file_with_more_at_its_end_is_refused() -> None:
    assert "has been changed since" in refusal(seal(CONTENT) + b"\0")


@pytest.mark.parametrize("data", [b"", b"rlm", b"{}", b"\x80\x04.", b"x" * 1000, b"rlm snapshot"])
def test_another_kind_of_file_is_refused(data: bytes) -> None:
    assert refusal(data) == "'the file' is no saved session"


def test_a_file_of_another_version_is_told_from_a_wrong_one() -> None:
    later = MAGIC.replace(b"%d" % FORMAT, b"%d" % (FORMAT + 1)) + seal(CONTENT)[len(MAGIC) :]
    assert refusal(later) == "'the file' was saved by another version (rlm snapshot 2; this one reads 1)"


# --- keys --------------------------------------------------------------------------------------


def test_a_key_is_made_once_for_this_user_alone(state: Path) -> None:
    umask = os.umask(0)
    try:
        first = seal(CONTENT)
    finally:
        os.umask(umask)
    key = state / "snapshot.key"
    assert len(key.read_bytes()) == KEY_BYTES
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert [path.name for path in state.iterdir()] == ["snapshot.key"]
    assert seal(CONTENT) == first


def test_where_there_is_no_key_nothing_is_opened_and_none_is_made(state: Path) -> None:
    sealed = seal(CONTENT)
    (state / "snapshot.key").unlink()
    assert KEY_VARIABLE in refusal(sealed)
    assert list(state.iterdir()) == []


def test_another_users_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sealed = seal(CONTENT)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another"))
    seal(b"")
    assert "was not saved with this user's key" in refusal(sealed)


@pytest.mark.parametrize("key", [b"", b"short", b"\0" * 31])
def test_a_key_that_was_cut_short_signs_nothing(key: bytes, state: Path) -> None:
    """An empty one would open what anybody can sign."""
    seal(CONTENT)
    (state / "snapshot.key").write_bytes(key)
    with pytest.raises(ConfigError, match=r"the key '.*snapshot\.key' is none"):
        seal(CONTENT)
    with pytest.raises(ConfigError, match=r"the key '.*snapshot\.key' is none"):
        open_sealed(MAGIC + snapshot._sign(CONTENT, key) + CONTENT, "")


def test_a_key_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, state: Path) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "a key of a whole cluster")
    sealed = seal(CONTENT)
    assert open_sealed(sealed, "") == CONTENT
    assert not state.exists()
    monkeypatch.setenv(KEY_VARIABLE, "another")
    assert "was not saved with this user's key" in refusal(sealed)


def test_a_key_that_cannot_be_kept_or_read_is_an_error_that_says_what_to_do(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state.parent.mkdir(parents=True)
    state.touch()
    with pytest.raises(ConfigError, match=rf"no key can be kept at .*: set {KEY_VARIABLE}|cannot be read"):
        seal(CONTENT)
    with pytest.raises(ConfigError, match="cannot be read"):
        open_sealed(MAGIC + CONTENT, "")


def test_a_user_without_a_home_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(ConfigError, match=f"has no home for a key: set {KEY_VARIABLE}"):
        seal(CONTENT)


def test_of_threads_that_need_the_first_key_all_have_the_same() -> None:
    barrier = threading.Barrier(16)

    def first(_: int) -> bytes:
        barrier.wait()
        return seal(CONTENT)

    with ThreadPoolExecutor(16) as pool:
        assert len(set(pool.map(first, range(16)))) == 1


def test_of_processes_that_need_the_first_key_all_have_the_same(state: Path) -> None:
    script = """
        import sys
        from rlm import snapshot
        sys.stdin.read(1)
        print(snapshot.seal(b"x").hex())
        """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(4)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("g")
        process.stdin.flush()
    assert len({process.communicate()[0] for process in processes}) == 1
    assert [path.name for path in state.iterdir()] == ["snapshot.key"]


# --- snapshots ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("python", "minor"), [("3.11.7", "3.11"), ("3.12.0rc1", "3.12"), ("3", "3"), ("", "")]
)
def test_pythons_of_one_minor_version_understand_each_other(python: str, minor: str) -> None:
    assert Snapshot(python, b"").minor_version == minor


def test_what_travels_is_source_of_python() -> None:
    for source in snapshot.travelling():
        compile(source, "", "exec")

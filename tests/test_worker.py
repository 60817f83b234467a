"""The worker on its own: shipped as source to a bare interpreter, spoken to over a socket."""

from __future__ import annotations

import functools
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlm import boot, wire


@functools.cache
def interpreters() -> list[str]:
    """This Python, and every other version a worker must run on that is installed here."""
    found = [sys.executable]
    for minor in range(8, 15):
        path = shutil.which(f"python3.{minor}")
        works = path and subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0
        if path and works and minor != sys.version_info[1]:
            found.append(path)
    return found


class Worker:
    """A worker process, and our end of its connection."""

    def __init__(self, python: str, **options: Any) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(20)
        with theirs:
            command = [python, *boot.COMMAND]
            self.process = subprocess.Popen(command, stdin=theirs.fileno(), stdout=theirs.fileno())
        self.socket.sendall(boot.payload({"output_limit": 1000, **options}))
        self._decoder = wire.Decoder(wire.parse_dict)
        self.first, _ = self.receive()
        self.socket.sendall(wire.encode({"t": "session", "token": "the token"}))
        self.hello, _ = self.receive()

    def receive(self) -> tuple[dict[str, Any], list[bytes]]:
        while (frame := self._decoder.next_frame()) is None:
            data = self.socket.recv(65536)
            assert data, "the worker closed the connection"
            self._decoder.feed(data)
        return frame

    def execute(self, number: int, code: str) -> tuple[dict[str, Any], dict[str, bytes]]:
        self.socket.sendall(wire.encode({"t": "execute", "id": number}, [code.encode()]))
        while True:
            message, blobs = self.receive()
            if message["t"] == "result":
                return message, dict(zip(message["parts"], blobs, strict=True))


@pytest.fixture(params=interpreters())
def worker(request: pytest.FixtureRequest) -> Iterator[Worker]:
    worker = Worker(request.param)
    yield worker
    worker.socket.close()
    assert worker.process.wait(20) == 0


def test_a_worker_is_warm_before_it_has_a_session_and_then_proves_it(worker: Worker) -> None:
    assert worker.first == {"t": "warm"}
    assert (worker.hello["t"], worker.hello["token"]) == ("hello", "the token")
    assert worker.hello["v"] == wire.PROTOCOL_VERSION


def test_cells_share_a_namespace_and_their_output_is_captured(worker: Worker) -> None:
    assert worker.execute(1, "x = 20\nprint('printed')")[1] == {"stdout": b"printed\n"}
    assert worker.execute(2, "x + 1")[1] == {"echo": b"21", "value": b"21"}


def test_output_over_the_limit_keeps_head_and_tail_and_counts_the_gap(worker: Worker) -> None:
    _, parts = worker.execute(1, "print('a' * 5000 + 'z' * 5000, end='')")
    assert parts["stdout"] == b"a" * 500 + b"\n... [9000 bytes of output left out] ...\n" + b"z" * 500


def test_a_cell_that_exits_is_rolled_back(worker: Worker) -> None:
    worker.execute(1, "x = [1]")
    message, _ = worker.execute(2, "x.append(2)\nimport os\nos._exit(7)")
    assert message["crash"] == {"cause": "exit", "code": 7, "state": "restored", "lost": []}
    assert worker.execute(3, "x")[1]["value"] == b"[1]"


def test_crashes_in_a_row_are_each_rolled_back(worker: Worker) -> None:
    worker.execute(1, "x = 1")
    for number in range(2, 12):
        message, _ = worker.execute(number, "import os\nos._exit(3)")
        assert (message["crash"]["cause"], message["crash"]["state"]) == ("exit", "restored")
    assert worker.execute(20, "x")[1]["value"] == b"1"


def test_a_cell_that_dies_after_an_answer_is_not_run_again_by_the_copy(worker: Worker) -> None:
    """The copy of what was before it is made when the cell is there already."""
    worker.execute(1, "x = 1\nFINAL(x)")
    message, _ = worker.execute(2, "import os\nprint('ran', flush=True)\nos._exit(3)")
    assert message["crash"] == {"cause": "exit", "code": 3, "state": "restored", "lost": []}
    message, parts = worker.execute(3, "x")
    assert (parts, message.get("crash")) == ({"echo": b"1", "value": b"1"}, None)


def test_a_cell_that_is_killed_as_it_comes_costs_nothing_that_was_there_before(worker: Worker) -> None:
    for number in range(1, 20, 2):
        worker.execute(number, f"x = {number}\nFINAL(x)")
        frames = wire.encode({"t": "execute", "id": number + 1}, [b"while True: pass"])
        worker.socket.sendall(frames + wire.encode({"t": "kill", "id": number + 1}))
        message, _ = worker.receive()
        assert (message["crash"]["cause"], message["crash"]["state"]) == ("killed", "restored")
        assert worker.execute(100 + number, "x")[1]["value"] == str(number).encode()


def test_a_death_before_there_is_a_copy_of_the_last_cell_says_that_it_is_lost(worker: Worker) -> None:
    worker.execute(1, "x = 1")
    worker.execute(2, "import os, threading\nx = 2\nthreading.Timer(0.1, os._exit, [3]).start()\nFINAL(x)")
    message, _ = worker.receive()
    assert (message["t"], message["crash"]["lost"]) == ("crash", ["what the last cell did"])
    worker.execute(3, "x += 10")
    message, _ = worker.execute(4, "import os; os._exit(1)")
    assert message["crash"]["lost"] == []
    assert worker.execute(5, "x")[1]["value"] == b"11"


def test_a_host_that_speaks_garbage_ends_the_session(worker: Worker) -> None:
    worker.socket.sendall(b"\xff" * 100)
    assert worker.socket.recv(1) == b""


def test_the_session_ends_with_the_connection_even_in_a_busy_loop(worker: Worker) -> None:
    worker.socket.sendall(wire.encode({"t": "execute", "id": 1}, [b"while True: pass"]))
    worker.socket.shutdown(socket.SHUT_RDWR)
    assert worker.process.wait(20) == 0


def test_a_context_in_parts_is_whole_and_another_cell_sees_it(worker: Worker) -> None:
    text = "\N{GREEK SMALL LETTER ALPHA}\r\n" * 500_000
    data = text.encode()
    header = {"t": "load", "id": -1, "names": ["context"], "format": "text", "size": len(data)}
    worker.socket.sendall(wire.encode(header))
    for start in range(0, len(data), 999_999):
        worker.socket.sendall(wire.encode({"t": "part", "id": -1}, [data[start : start + 999_999]]))
    assert worker.receive()[0] == {"t": "loaded", "id": -1}
    assert worker.execute(1, "len(context), context[-3:]")[1]["echo"] == repr((len(text), text[-3:])).encode()


def test_parts_of_a_context_that_was_given_up_are_dropped(worker: Worker) -> None:
    load = {"t": "load", "names": ["context"], "format": "text", "size": 4}
    worker.socket.sendall(wire.encode({**load, "id": -1}) + wire.encode({"t": "part", "id": -1}, [b"ab"]))
    worker.socket.sendall(wire.encode({**load, "id": -2}) + wire.encode({"t": "part", "id": -1}, [b"cd"]))
    worker.socket.sendall(wire.encode({"t": "part", "id": -2}, [b"efgh"]))
    assert worker.receive()[0] == {"t": "loaded", "id": -2}
    assert worker.execute(1, "context")[1]["value"] == b'"efgh"'


def test_a_worker_ends_when_it_has_lived_for_its_time() -> None:
    worker = Worker(sys.executable, time_to_live=1)
    worker.socket.sendall(wire.encode({"t": "execute", "id": 1}, [b"while True: pass"]))
    assert worker.process.wait(20) == 0
    worker.socket.close()


def test_an_interpreter_that_is_too_old_says_so() -> None:
    check = boot.COMMAND[-1].replace("sys.version_info >= (3, 8)", "sys.version_info >= (99,)")
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Python 3.8 or later is needed, this is 3.")


def test_what_travels_names_no_path_of_this_machine() -> None:
    assert str(Path(boot.__file__).parent.parent).encode() not in boot.payload({})


# --- what is nobody's any more, and what nobody would say ------------------------------------------


def test_a_reply_to_whoever_was_there_before_a_reset_is_dropped(tmp_path: Path) -> None:
    worker = Worker(sys.executable, scratch=str(tmp_path))
    reply = wire.encode({"t": "reply", "id": 1, "blobs": [4]}, [b"late"])
    worker.execute(1, "x = 1")
    worker.socket.sendall(wire.encode({"t": "reset", "id": -1}) + reply * 3)
    assert worker.receive()[0] == {"t": "loaded", "id": -1}
    assert worker.execute(1, "'x' in globals()")[1]["value"] == b"false"
    worker.socket.close()
    assert worker.process.wait(20) == 0


FORGE = """
import os, stat
sockets = [fd for fd in map(int, os.listdir('/proc/self/fd')) if os.path.exists(f'/proc/self/fd/{{fd}}')]
channel = min(fd for fd in sockets if stat.S_ISSOCK(os.fstat(fd).st_mode))
body = {body!r}
os.write(channel, len(body).to_bytes(4, 'big') + body + {rest!r})
import time; time.sleep(60)
"""


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ({"t": "call", "id": 1, "fn": "llm_query"}, 0),
        ({"t": "call", "id": 1, "fn": "llm_query", "blobs": [1, 1]}, 2),
        ({"t": "call", "id": 1, "fn": "llm_query", "schema": True, "blobs": [1]}, 1),
        ({"t": "call", "id": 1, "fn": "llm_query", "schema": True, "batch": True}, 0),
        ({"t": "call", "id": 1, "fn": "rlm_query", "contexts": True, "blobs": [1]}, 1),
        ({"t": "call", "id": 1, "fn": "rlm_query", "contexts": True, "batch": True, "blobs": [1, 1, 1]}, 3),
        ({"t": "call", "id": 1, "fn": "tool", "tool": "f"}, 0),
        ({"t": "call", "id": 1, "fn": "tool", "tool": "f", "batch": True, "blobs": [1, 1]}, 2),
        ({"t": "call", "id": 1, "fn": "budget", "blobs": [1]}, 1),
        ({"t": "call", "id": 10**30, "fn": "budget"}, 0),
        ({"t": "call", "id": 0, "fn": "budget"}, 0),
        ({"t": "call", "id": -1, "fn": "budget"}, 0),
        ({"t": "call", "id": 1, "fn": "tool", "tool": None, "blobs": [2]}, 2),
        ({"t": "result", "id": 2, "parts": ["echo"], "blobs": [200_000]}, 200_000),
        ({"t": "result", "id": 2, "parts": ["secret"], "blobs": [1]}, 1),
        ({"t": "loaded", "id": -1}, 0),
    ],
    ids=str,
)
def test_a_cell_that_says_what_its_executor_would_not_is_rolled_back(
    header: dict[str, Any], size: int
) -> None:
    worker = Worker(sys.executable)
    worker.execute(1, "x = 1")
    message, _ = worker.execute(2, FORGE.format(body=json.dumps(header).encode(), rest=b"x" * size))
    assert (message["crash"]["cause"], message["crash"]["state"]) == (
        "garbage on the cell's channel",
        "restored",
    )
    assert worker.execute(3, "x")[1]["value"] == b"1"
    worker.socket.close()
    assert worker.process.wait(20) == 0


RESET = """
import ctypes, fcntl, os
pages = [line.partition('-')[0] for line in open('/proc/self/maps') if 'rw-s' in line and '/dev/zero' in line]
def page(): return [ctypes.string_at(int(start, 16) + 100, 6) for start in pages]
def pipes(): return [(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK, fcntl.fcntl(fd, 1032)) for fd in (1, 2)]
"""


def test_what_a_cell_can_set_about_what_it_shares_with_its_supervisor_is_new_after_a_reset(
    tmp_path: Path,
) -> None:
    worker = Worker(sys.executable, scratch=str(tmp_path))
    look = f"{RESET}\n[page(), pipes()]"
    before = worker.execute(1, look)[1]["echo"]
    spoil = "for start in pages: ctypes.memmove(int(start, 16) + 100, b'SECRET', 6)\n"
    spoil += "for fd in (1, 2): fcntl.fcntl(fd, fcntl.F_SETFL, os.O_NONBLOCK); fcntl.fcntl(fd, 1031, 4096)\n"
    assert worker.execute(2, f"{spoil}[page(), pipes()]")[1]["echo"] != before
    worker.socket.sendall(wire.encode({"t": "reset", "id": -1}))
    assert worker.receive()[0] == {"t": "loaded", "id": -1}
    assert worker.execute(1, look)[1]["echo"] == before
    assert worker.execute(2, "print('x' * 100_000, end='')")[1]["stdout"].startswith(b"x" * 500)
    worker.socket.close()
    assert worker.process.wait(20) == 0


FOLDERS = {
    "deep": "for _ in range(1500): os.mkdir('d'); os.chdir('d')",
    "shut": "os.makedirs('a/b/c'); open('a/b/c/f', 'w').close()\n"
    "for p in ('a/b/c', 'a/b', 'a'): os.chmod(p, 0)",
    "deep and shut": "for _ in range(1500):\n  os.mkdir('d'); os.mkdir('e'); os.chmod('e', 0); os.chdir('d')",
    "odd names": "os.mkdir('\\n'); os.mkdir('-rf'); os.mkdir(b'\\xff')\n"
    "os.symlink('/', '\\n/up'); os.mkfifo('\\n/f')",
}


@pytest.mark.parametrize("what", FOLDERS)
@pytest.mark.parametrize("end", ["reset", "end"])
def test_folders_of_any_kind_are_gone_after_a_reset_and_at_the_end(
    what: str, end: str, tmp_path: Path
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    worker = Worker(sys.executable, scratch=str(scratch), remove_scratch=True)
    assert "error" not in worker.execute(1, f"import os\n{FOLDERS[what]}")[0]
    if end == "reset":
        worker.socket.sendall(wire.encode({"t": "reset", "id": -1}))
        assert worker.receive()[0] == {"t": "loaded", "id": -1}
        assert list(scratch.iterdir()) == []
    worker.socket.close()
    assert worker.process.wait(20) == 0
    assert list(tmp_path.iterdir()) == []

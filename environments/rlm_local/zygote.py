"""The fork server: a small, single-threaded Python from which local sandboxes are forked.

Starting Python costs tens of milliseconds, forking one that has started costs one. This
script runs with ``python -I -S``, inside bubblewrap where that is usable, standard library
only. It reads requests from a Unix socket, one datagram each with the descriptors that
belong to it, and forks a supervisor for each; it never runs a cell itself. It ends when
the socket closes, that is, with the host, however the host ended.
"""

from __future__ import annotations

import gc
import importlib
import importlib.machinery
import json
import os
import select
import signal
import socket
import sys
import time
import types
import warnings
from typing import Any, NoReturn

MESSAGE_LIMIT = 1 << 17
IDLE = 0.03
"""Seconds without a request before the next module is imported ahead of need."""

AHEAD = (
    "re", "math", "random", "datetime", "itertools", "functools", "textwrap", "statistics", "heapq",
    "bisect", "csv", "dataclasses", "typing", "enum", "hashlib", "string", "pprint", "copy",
    "decimal", "fractions", "pathlib", "tempfile", "subprocess", "concurrent.futures", "queue",
    "urllib.parse", "html", "difflib", "unicodedata", "contextlib", "asyncio",
)  # fmt: skip
"""What cells import most, imported here so that no sandbox pays for it."""

GRACE = 3.0
"""Seconds that sessions get to clean up after themselves when the host has gone."""


def load(directory: str) -> types.ModuleType:
    """The worker, from the compiled files where they are."""

    def code(name: str) -> Any:
        loader = importlib.machinery.SourceFileLoader(f"rlm.{name}", f"{directory}/{name}.py")
        return loader.get_code(loader.name)

    boot = types.ModuleType("boot")
    boot.__file__ = f"{directory}/boot.py"
    exec(code("boot"), boot.__dict__)
    worker: types.ModuleType = boot.install({name: code(name) for name in boot.MODULES})
    return worker


class Zygote:
    """Answers requests for sandboxes until its host goes away."""

    def __init__(self, control: socket.socket, worker: types.ModuleType, scratch_root: str) -> None:
        self._control = control
        self._worker = worker
        self._lockdown = worker.lockdown
        self._scratch_root = scratch_root
        self._sessions: set[int] = set()
        self._ahead = list(AHEAD)

    def run(self) -> NoReturn:
        """Serve, then wait for the sessions, then leave nothing behind."""
        self._lockdown.adopt_orphans()
        self._lockdown.set_readable(False)
        wake, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(wake, select.POLLIN)
        os.write(self._control.fileno(), b"ready")
        while True:
            events = poll.poll(IDLE * 1000 if self._ahead else None)
            for fd, _ in events:
                if fd == wake:
                    os.read(wake, 4096)
                    self._reap()
                elif not self._answer():
                    self._end()
            if not events and self._ahead:
                self._import_one()

    def _import_one(self) -> None:
        try:
            importlib.import_module(self._ahead.pop(0))
        except ImportError:
            pass  # this Python was built without it
        gc.freeze()  # what is here now stays: collections in a fork leave these pages shared

    def _answer(self) -> bool:
        """Fork the sandbox of one request. False when the host has closed the socket."""
        data, descriptors, _, _ = socket.recv_fds(self._control, MESSAGE_LIMIT, 2)
        if not data:
            return False
        request = json.loads(data)
        try:
            pid = os.fork()
            if pid == 0:
                self._become_session(request, descriptors)
            self._sessions.add(pid)
        except OSError as error:
            refusal = {"t": "failed", "token": request["token"]}
            os.write(descriptors[0], self._worker.wire.encode(refusal, [str(error).encode()]))
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return True

    def _become_session(self, request: dict[str, Any], descriptors: list[int]) -> NoReturn:
        try:
            signal.set_wakeup_fd(-1)
            self._control.close()
            os.setsid()
            options = request["options"]
            scratch = options["scratch"] = f"{self._scratch_root}/{request['name']}"
            options["remove_scratch"] = True
            options["environ"] = {"HOME": scratch, "TMPDIR": scratch, "PWD": scratch}
            self._make_scratch(scratch, options)
            connection, lane = descriptors
            self._worker.serve(connection, connection, request["token"], options, lane)
        finally:
            os._exit(1)

    def _make_scratch(self, scratch: str, options: dict[str, Any]) -> None:
        os.mkdir(scratch, 0o700)
        give_up = options.get("give_up", {})
        uid = give_up.get("uid")
        if uid is not None:
            os.chown(scratch, uid, uid)
        if give_up.get("landlock", {}).get("write") is not None:
            give_up["landlock"]["write"].append(scratch)
        if give_up.get("namespace") and uid is None:
            self._count_processes_apart(options)

    def _count_processes_apart(self, options: dict[str, Any]) -> None:
        """Make RLIMIT_NPROC mean this sandbox's processes, or else raise it by the user's others."""
        try:
            self._lockdown.set_readable(True)  # else /proc/self/uid_map is root's
            self._lockdown.enter_user_namespace()
        except OSError:
            others = sum(_tasks_of_user(name) for name in os.listdir("/proc") if name.isdigit())
            options["limits"]["NPROC"] += others

    def _reap(self) -> None:
        """Collect the dead; whatever outlived its supervisor is killed."""
        while True:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            if pid in self._sessions:
                self._sessions.discard(pid)
        for orphan in self._lockdown.children(os.getpid()):
            if orphan not in self._sessions:
                try:
                    os.kill(orphan, signal.SIGKILL)
                except OSError:
                    pass

    def _end(self) -> NoReturn:
        deadline = time.monotonic() + GRACE
        while self._sessions and time.monotonic() < deadline:
            self._reap()
            time.sleep(0.005)
        for pid in self._lockdown.descendants(os.getpid()):
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass
        self._worker.remove_folder(self._scratch_root)
        os._exit(0)


def _tasks_of_user(pid: str) -> int:
    try:
        if os.stat(f"/proc/{pid}").st_uid == os.geteuid():
            return len(os.listdir(f"/proc/{pid}/task"))
    except OSError:
        pass  # it has just ended
    return 0


def main() -> NoReturn:
    """Arguments: the socket's descriptor, the folder of the travelling files, the scratch root, sys.path."""
    control, directory, scratch_root, *packages = sys.argv[1:]
    sys.argv[:] = [""]
    sys.path += packages
    warnings.filterwarnings("ignore", message=".*multi-threaded.*fork.*", category=DeprecationWarning)
    os.makedirs(scratch_root, 0o711, exist_ok=True)
    worker = load(directory)
    gc.collect()
    gc.freeze()
    Zygote(socket.socket(fileno=int(control)), worker, scratch_root).run()


if __name__ == "__main__":
    main()

"""Isolation: what a cell cannot see, reach or become.

What counts is what was reached or changed, not how it was refused: a cell may see other
files and processes under the same names, and sockets that lead nowhere.
"""

# ruff: noqa: E501 (a table of cells reads best with one to a line)

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import pytest

from ..environment import BaseEnv, WorkerEnv
from .sessions import Cells, OpenCells, Sandbox
from .suite import Suite, one_session, requires

CANARY = "canary-5f1d0c7e"

EVERYTHING = textwrap.dedent(
    """
    import ctypes, glob, os
    def read(path):
        try: return open(path, 'rb').read()
        except OSError: return b''
    everything = [repr(os.environ).encode()]
    for kind in ('environ', 'cmdline', 'task/*/environ'):
        everything += [read(path) for path in glob.glob(f'/proc/[0-9]*/{kind}') + [f'/proc/self/{kind}']]
    names = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), 'environ')
    count = 0
    while names[count]:
        everything.append(names[count])
        count += 1
    """
)
"""A cell that reads every environment and argument list it can."""


def outcome(repl: Cells, code: str) -> str:
    """What a cell that must not succeed raised; "" when it succeeded."""
    error = repl.run(code).error
    return error.type if error else ""


def succeeding(repl: Cells, attempts: Iterable[str], before: str = "import os") -> list[str]:
    """Those of the attempts, a cell each, that nothing stopped."""
    return [attempt for attempt in attempts if not outcome(repl, f"{before}\n{attempt}")]


@contextlib.contextmanager
def canary_file(folder: Path) -> Iterator[Path]:
    """A file with a secret in it, that anybody may read."""
    handle, name = tempfile.mkstemp(prefix=".canary-", dir=folder)
    os.write(handle, CANARY.encode())
    os.close(handle)
    os.chmod(name, 0o644)
    try:
        yield Path(name)
    finally:
        os.unlink(name)


READING = (
    "open(path).read()",
    "os.link(path, 'stolen'); open('stolen').read()",
    "os.symlink(path, 'link'); open('link').read()",
    "import shutil; open(shutil.copy(path, 'copied')).read()",
    "os.rename(path, 'moved'); open('moved').read()",
    "import subprocess; subprocess.run(['cat', path], capture_output=True, text=True).stdout",
    "os.listxattr(path)",
    "os.listdir(os.path.dirname(path))",
)

CHANGING = (
    "open(path, 'a').write('x')",
    "open(path, 'r+').write('x')",
    "os.truncate(path, 0)",
    "os.chmod(path, 0o600)",
    "os.utime(path, (0, 0))",
    "os.setxattr(path, 'user.x', b'1')",
    "os.chown(path, os.getuid(), os.getgid())",
    "os.fchmod(os.open(path, os.O_PATH), 0o600)",
    "os.chmod(f'/proc/self/fd/{os.open(path, os.O_PATH)}', 0o600)",
    "os.unlink(path)",
)

PLACES = ["/", "/tmp", "/var/tmp", "/dev/shm", "/usr", "/usr/local/lib", "/etc", "/opt", "/home", "/root", "/proc", "/sys", "/run",
          tempfile.gettempdir(), os.getcwd(), sys.prefix, sys.base_prefix, str(Path.home())]  # fmt: skip

REACHING = textwrap.dedent(
    """
    import socket
    def attempt(kind, target):
        try:
            if kind == 'tcp':
                socket.create_connection(tuple(target), 2).close()
            elif kind == 'udp':
                family = socket.AF_INET6 if ':' in target[0] else socket.AF_INET
                with socket.socket(family, socket.SOCK_DGRAM) as s: s.sendto(b'x', tuple(target))
                return False  # that it was sent does not say that it arrived
            elif kind == 'route':
                family = socket.AF_INET6 if ':' in target[0] else socket.AF_INET
                with socket.socket(family, socket.SOCK_DGRAM) as s: s.connect(tuple(target))
            elif kind == 'name':
                socket.getaddrinfo(target, 80)
            elif kind == 'http':
                import urllib.request
                urllib.request.urlopen(target, timeout=2)
            elif kind == 'unix':
                with socket.socket(socket.AF_UNIX) as s: s.connect(target)
            elif kind == 'unix datagram':
                for s in socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM): s.sendto(b'x', target)
                return False
            elif kind == 'vsock':
                with socket.socket(40, socket.SOCK_STREAM) as s: s.settimeout(2); s.connect(tuple(target))
            elif kind == 'bash':
                import subprocess
                subprocess.run(['bash', '-c', f'echo > /dev/tcp/{target[0]}/{target[1]}'], check=True, stderr=-3, timeout=3)
            return True
        except Exception: return False
    """
)
"""A cell that tries to reach something, and says whether it did as far as it can tell."""

OUTSIDE = [
    ("tcp", ["1.1.1.1", 443]), ("tcp", ["8.8.8.8", 53]), ("tcp", ["169.254.169.254", 80]),
    ("http", "http://169.254.169.254/latest/meta-data/"), ("route", ["1.1.1.1", 53]), ("route", ["169.254.169.254", 80]),
    ("route", ["10.0.0.1", 9]), ("route", ["172.17.0.1", 9]), ("route", ["192.168.0.1", 9]), ("route", ["fd00:ec2::254", 80]),
    ("route", ["2001:4860:4860::8888", 53]), ("name", "example.com"), ("name", "metadata.google.internal"),
]  # fmt: skip
"""Addresses of the world outside. A route is a way there, found without sending anything."""

ENGINES = [
    "/var/run/docker.sock", "/run/docker.sock", "/run/containerd/containerd.sock", "/run/podman/podman.sock",
    "/var/run/crio/crio.sock", "/run/dbus/system_bus_socket", "/run/systemd/private",
]  # fmt: skip

TRACING = """
import ctypes, os, platform
libc = ctypes.CDLL(None, use_errno=True)
buffer = ctypes.create_string_buffer(64)
def check(result):
    if result < 0: raise OSError(ctypes.get_errno(), 'refused')
def call(number, *arguments):
    if platform.machine() != 'x86_64': raise OSError('the numbers are those of x86_64')
    check(libc.syscall(number, *arguments))
pid = {pid}
"""

TRACES = (  # harmless even where nothing stops them
    "check(libc.ptrace(16, pid, 0, 0))",
    "check(libc.ptrace(0x4206, pid, 0, 0))",
    "call(310, pid, buffer, 1, buffer, 1, 0)",
    "call(438, os.pidfd_open(pid), 0, 0)",
    "open(f'/proc/{pid}/mem', 'rb')",
    "open(f'/proc/{pid}/maps').read() or 1/0",
    "open(f'/proc/{pid}/environ', 'rb').read() or 1/0",
    "os.readlink(f'/proc/{pid}/fd/0')",
    "os.listdir(f'/proc/{pid}/root/')",
    "os.readlink(f'/proc/{pid}/cwd')",
)

LIMITS = (
    "call(312, pid, os.getpid(), 0, 0, 0)",
    "import resource; resource.prlimit(pid, resource.RLIMIT_NOFILE)",
    "import resource; resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))",
    "os.setpriority(os.PRIO_PROCESS, pid, os.getpriority(os.PRIO_PROCESS, pid))",
    "os.sched_setaffinity(pid, os.sched_getaffinity(pid))",
    "os.sched_setscheduler(pid, os.SCHED_OTHER, os.sched_param(0))",
    "call(251, 1, pid, 4 | 2 << 13)",
)

SYSTEM_CALLS = {  # the x86_64 number, and arguments
    "mount": (165, "b'none', b'.', b'tmpfs', 0, 0"), "umount2": (166, "b'/', 2"), "pivot_root": (155, "b'.', b'.'"),
    "unshare of users": (272, "0x10000000"), "unshare of mounts": (272, "0x20000"), "setns": (308, "0, 0"),
    "clone into a user name space": (56, "0x10000000 | 17, 0, 0, 0, 0"), "open_tree": (428, "-100, b'.', 1"),
    "fsopen": (430, "b'tmpfs', 0"), "mount_setattr": (442, "-100, b'/', 0, buffer, 32"),
    "io_uring_setup": (425, "8, buffer"), "bpf": (321, "0, buffer, 64"), "keyctl": (250, "0, -3, 1"), "add_key": (248, "b'user', b'a', b'b', 1, -3"),
    "request_key": (249, "b'user', b'a', 0, -3"), "perf_event_open": (298, "buffer, 0, -1, -1, 0"), "userfaultfd": (323, "1"),
    "process_vm_readv": (310, "os.getppid(), buffer, 1, buffer, 1, 0"), "ptrace": (101, "16, os.getppid(), 0, 0"), "kexec_load": (246, "0, 0, 0, 0"),
    "init_module": (175, "buffer, 0, b''"), "reboot": (169, "0xfee1dead, 672274793, 0, 0"), "swapon": (167, "b'/', 0"),
    "settimeofday": (164, "buffer, 0"), "sethostname": (170, "b'x', 1"), "syslog": (103, "3, buffer, 64"), "personality": (135, "0x0040000"),
    "name_to_handle_at": (303, "-100, b'/', buffer, buffer, 0"), "open_by_handle_at": (304, "0, buffer, 0"), "acct": (163, "b'x'"),
    "setpriority of all of a user's": (141, "2, 0, 19"), "setpriority of a group": (141, "1, 0, 19"),
    "ioprio_set of all of a user's": (251, "3, 0, 3 << 13"), "setpriority of another": (141, "0, 1, 19"),
    "a packet socket": (41, "17, 3, 0"), "a raw socket": (41, "2, 3, 1"), "an XDP socket": (41, "44, 3, 0"),
}  # fmt: skip

SYSTEM_CALL = """
    import ctypes, os
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(256)
    result = libc.syscall(ctypes.c_long({number}), {arguments})
    if result == 0 and {number} == 56: os._exit(0)
    [result, ctypes.get_errno()]
    """


class IsolationLevel(Suite):
    """Level isolation: the host, the network, and the other sessions."""

    level = "isolation"

    canary_folders: ClassVar[Mapping[str, Path]] = {"temporary directory": Path(tempfile.gettempdir())}
    """Directories of the host in which the suite may put a file, for a moment, that no cell must see."""

    # --- secrets of the host -------------------------------------------------------------------------------

    @requires("cpython")
    def test_a_key_of_the_host_is_in_no_environment_that_a_cell_can_read(
        self, environment: BaseEnv, host_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("API_KEY", "SECRET", "PYTHONPATH_OF_NOBODY"):
            monkeypatch.setenv(name, CANARY)
        cell = f"{EVERYTHING}\n[any({CANARY.encode()!r} in text for text in everything), len(everything) > 3]"
        body = f"with open_repl(environment) as repl: print(repl.execute({cell!r}, timeout=30).value)"
        assert self.run_host(environment, host_folder, body) == "[False, True]\n"

    @requires("isolation", "cpython", "files")
    def test_a_file_of_the_host_cannot_be_read_listed_or_changed(self, repl: Cells) -> None:
        self.need(repl, "files")
        for place, folder in self.canary_folders.items():
            if os.access(folder, os.W_OK):  # else it is not for this user to put a file there
                with canary_file(folder) as path:
                    self._attack(repl, path)
                    assert path.read_text() == CANARY, place

    def _attack(self, repl: Cells, path: Path) -> None:
        before, listing = _facts(path), sorted(os.listdir(path.parent))
        for attempt in READING:
            result = repl.run(f"import os; path = {str(path)!r}\n{attempt}")
            assert CANARY not in result.echo, f"{attempt} of {path}"
            assert path.name not in result.echo, f"{attempt} of {path}"
        succeeding(repl, CHANGING, f"import os; path = {str(path)!r}")
        assert path.exists(), f"{path} is gone"
        assert _facts(path) == before
        assert not {"stolen", "link", "copied", "moved"} & (set(os.listdir(path.parent)) - set(listing))

    @requires("isolation", "cpython")
    def test_a_directory_of_the_host_cannot_be_watched(self, repl: Cells) -> None:
        code = """
            import ctypes, os
            libc = ctypes.CDLL(None, use_errno=True)
            watcher = libc.inotify_init1(os.O_NONBLOCK)
            libc.inotify_add_watch(watcher, {0!r}.encode(), 0xfff) >= 0
        """
        with tempfile.TemporaryDirectory() as folder:
            os.chmod(folder, 0o755)
            assert repl.value(code.format(folder)) is False

    @pytest.mark.parametrize("path", ["/etc/shadow", "/proc/kcore", "/dev/mem", "/dev/kmsg", "/root/.bashrc"])
    @requires("isolation")
    @one_session
    def test_a_secret_of_the_system_cannot_be_read(self, repl: Cells, path: str) -> None:
        self.need(repl, "files")
        assert outcome(repl, f"open({path!r}, 'rb').read(1)") != ""

    @requires("isolation", "cpython")
    def test_a_cell_writes_nothing_into_a_directory_of_the_hosts(self, repl: Cells) -> None:
        self.need(repl, "files")
        name = f"written-by-a-cell-{secrets.token_hex(4)}"
        repl.run(
            f"""
            import os
            for place in {PLACES!r}:
                for make in (lambda p: os.close(os.open(p, os.O_CREAT | os.O_WRONLY)), os.mkdir, lambda p: os.symlink('/', p), os.mkfifo):
                    try: make(os.path.join(place, {name!r}))
                    except OSError: pass
            """
        )
        found = [path for place in PLACES if os.path.lexists(path := os.path.join(place, name))]
        for path in found:
            with contextlib.suppress(OSError):
                os.rmdir(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)
        assert found == []

    @requires("isolation", "cpython", "files")
    def test_the_files_of_the_interpreter_cannot_be_changed(self, repl: Cells) -> None:
        self.need(repl, "files")
        state = "import os, json\n[os.stat(json.__file__).st_mode, os.stat(json.__file__).st_mtime, len(open(json.__file__).read())]"
        before = repl.value(state)
        attempts = (
            "open(json.__file__, 'a').write('#')",
            "open(json.__file__, 'r+').write('#')",
            "os.unlink(json.__file__)",
            "os.rename(json.__file__, json.__file__ + '.old')",
            "open(os.path.join(os.path.dirname(json.__file__), 'planted.py'), 'w')",
        )
        assert succeeding(repl, attempts, "import os, json") == []
        ineffective = (
            "os.chmod(json.__file__, 0o600)",
            "os.utime(json.__file__)",
            "os.fchmod(os.open(json.__file__, 0), 0o600)",
            "os.utime(os.open(json.__file__, 0))",
        )
        succeeding(repl, ineffective, "import os, json")
        assert repl.value(state) == before

    # --- the network -------------------------------------------------------------------------------------------

    @requires("network-none", "cpython")
    def test_a_cell_reaches_nothing_outside(self, repl: Cells) -> None:
        self.need(repl, "network")
        code = f"{REACHING}\n[str(target) for target in {OUTSIDE!r} if attempt(*target)]"
        assert repl.value(code, timeout=60) == []

    @requires("network-none", "cpython")
    def test_a_cell_reaches_no_service_of_the_host(self, repl: Cells, host_folder: Path) -> None:
        self.need(repl, "network")
        with Services(host_folder) as services:
            code = f"{REACHING}\n[str(target) for target in {services.targets!r} if attempt(*target)]"
            assert repl.value(code, timeout=90) == []
            assert services.reached() == []

    @requires("network-none", "cpython")
    def test_a_cell_sees_no_interface_of_the_hosts(self, repl: Cells) -> None:
        self.need(repl, "network")
        code = "import socket\ntry: names = [name for _, name in socket.if_nameindex()]\nexcept OSError: names = []\nnames"
        assert set(repl.value(code)) & set(own_addresses()) == set()

    @requires("isolation", "cpython")
    def test_a_cell_reaches_no_engine_of_containers_and_no_bus(self, repl: Cells) -> None:
        targets = [("unix", path) for path in ENGINES]
        assert repl.value(f"{REACHING}\n[str(target) for target in {targets!r} if attempt(*target)]") == []

    @requires("isolation", "cpython")
    def test_a_cell_holds_no_connection_of_the_hosts(self, repl: Cells) -> None:
        """Its own processes it may reach; nothing it holds leads out of the machine."""
        code = """
            import os, socket
            found = []
            for fd in range(1024):
                try: s = socket.socket(fileno=os.dup(fd))
                except OSError: continue
                if s.family != socket.AF_UNIX: found.append(str(s.family))
                s.close()
            found
        """
        assert repl.value(code) == []

    # --- processes of the host ---------------------------------------------------------------------------------

    @pytest.fixture
    def victim(self) -> Iterator[int]:
        """A process of this user's that a cell may attack."""
        process = subprocess.Popen(["sleep", "3600"])
        try:
            yield process.pid
            assert process.poll() is None, "the cell ended it"
            with contextlib.suppress(FileNotFoundError):
                state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
                assert state in "SR", f"the cell left it in state {state}"
        finally:
            process.kill()
            process.wait()

    @requires("isolation", "cpython")
    def test_no_process_of_the_host_can_be_signalled(
        self, repl: Cells, victim: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.need(repl, "signals")
        if threading.current_thread() is not threading.main_thread():
            pytest.skip("only the main thread of the host sees its signals")
        seen: list[int] = []
        previous = signal.signal(signal.SIGURG, lambda number, _: seen.append(number))
        try:
            mine = set(repl.value("import os\n[os.getpid(), os.getppid(), 1]"))
            attempts = [f"os.kill({pid}, {int(signal.SIGURG)})" for pid in {os.getpid(), os.getppid()} - mine]
            if victim not in mine:
                for number in (19, 15, 9):
                    attempts += [f"os.kill({victim}, {number})", f"os.killpg({victim}, {number})"]
                attempts.append(f"import signal; signal.pidfd_send_signal(os.pidfd_open({victim}), 9)")
            succeeding(repl, attempts)
        finally:
            signal.signal(signal.SIGURG, previous)
        assert seen == []

    @requires("isolation", "cpython")
    def test_signals_to_the_supervisor_cost_nothing(self, repl: Cells) -> None:
        self.need(repl, "signals")
        repl.repl.add_context("the context")
        for number in (1, 2, 15, 19, 9):
            for pid in ("os.getppid()", "1"):
                repl.run(f"kept = {number}")
                repl.run(f"import os; os.kill({pid}, {number})")
                assert repl.value("[kept, context]") == [number, "the context"]

    @pytest.mark.parametrize("target", ["os.getppid()", "1", "{victim}", "{host}"])
    @requires("isolation", "cpython")
    @one_session
    def test_other_processes_cannot_be_traced_or_read(self, repl: Cells, victim: int, target: str) -> None:
        self.need(repl, "system calls")
        pid = target.format(victim=victim, host=os.getpid())
        assert succeeding(repl, TRACES, TRACING.format(pid=pid)) == []

    @pytest.mark.parametrize("target", ["{victim}", "{host}"])
    @requires("isolation", "cpython")
    def test_processes_of_the_host_cannot_be_limited(self, repl: Cells, victim: int, target: str) -> None:
        self.need(repl, "system calls")
        pid = target.format(victim=victim, host=os.getpid())
        assert succeeding(repl, LIMITS, TRACING.format(pid=pid)) == []

    @requires("isolation", "cpython")
    def test_a_cell_cannot_read_the_supervisors_memory_or_descriptors(self, repl: Cells) -> None:
        for name in ("mem", "environ", "maps", "auxv", "stack", "fd/0", "fd", "cwd", "root", "exe"):
            code = f"import os\npath = f'/proc/{{os.getppid()}}/{name}'\n"
            code += "os.listdir(path) if os.path.isdir(path) else open(path, 'rb').read() or 1/0"
            assert outcome(repl, code) != "", name

    @requires("isolation", "cpython")
    def test_shared_memory_of_the_host_cannot_be_attached(self, repl: Cells) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.shmat.restype = ctypes.c_void_p
        number = libc.shmget(0, 4096, 0o1600)
        if number < 0:
            pytest.skip("there is no System V shared memory here")
        try:
            at = libc.shmat(number, None, 0)
            ctypes.memmove(at, CANARY.encode(), len(CANARY))
            code = f"""
                import ctypes
                libc = ctypes.CDLL(None)
                libc.shmat.restype = ctypes.c_void_p
                at = libc.shmat({number}, None, 0o10000)
                at is not None and at != 2**64 - 1 and ctypes.string_at(at, {len(CANARY)}) == {CANARY.encode()!r}
            """
            assert repl.value(code) is False
            libc.shmdt(ctypes.c_void_p(at))
        finally:
            libc.shmctl(number, 0, None)

    # --- rights ------------------------------------------------------------------------------------------------

    @requires("isolation", "cpython")
    def test_a_cell_has_no_capabilities_and_cannot_gain_privileges(self, repl: Cells) -> None:
        code = """
            import ctypes, struct
            libc = ctypes.CDLL(None, use_errno=True)
            header, data = ctypes.create_string_buffer(struct.pack('Ii', 0x20080522, 0)), ctypes.create_string_buffer(24)
            assert libc.capget(header, data) == 0
            sets = struct.unpack('6I', data)
            [sets[0] | sets[3] << 32, sets[1] | sets[4] << 32, libc.prctl(39, 0, 0, 0, 0)]
        """
        effective, permitted, no_new_privileges = repl.value(code)
        allowed = self.kept_capabilities(repl.isolation)
        assert effective & ~allowed == permitted & ~allowed == 0
        assert no_new_privileges == 1

    @requires("isolation", "cpython")
    def test_a_cell_is_not_root(self, repl: Cells) -> None:
        assert 0 not in repl.value("import os\nlist(os.getresuid() + os.getresgid()) + os.getgroups()")
        attempts = ("os.setuid(0)", "os.setgid(0)", "os.setgroups([0])", "os.chroot('.')", "os.nice(-5)")
        assert succeeding(repl, attempts) == []

    @requires("isolation", "processes", "cpython")
    def test_a_program_of_another_user_gives_no_rights(self, repl: Cells) -> None:
        code = """
            import os, stat, subprocess
            found = []
            for folder in ('/bin', '/usr/bin', '/sbin', '/usr/sbin'):
                for name in ('su', 'sudo', 'mount', 'passwd', 'newgrp', 'pkexec'):
                    try: mode = os.stat(f'{folder}/{name}').st_mode
                    except OSError: continue
                    if mode & stat.S_ISUID:
                        done = subprocess.run([f'{folder}/{name}', '-c', 'id -u'], capture_output=True, text=True, stdin=-3, timeout=10)
                        if done.stdout.strip() == '0': found.append(name)
            found
        """
        assert repl.value(code) == []
        assert repl.value(
            "import subprocess\nsubprocess.run(['sh', '-c', 'id -u'], capture_output=True, text=True).stdout"
        ) != ("0\n")

    @pytest.mark.parametrize("what", SYSTEM_CALLS)
    @requires("isolation", "cpython")
    @one_session
    def test_a_system_call_has_no_effect(self, repl: Cells, what: str) -> None:
        self.need(repl, "system calls")
        if repl.value("import platform; platform.machine()") != "x86_64":
            pytest.skip("the numbers are those of x86_64")
        number, arguments = SYSTEM_CALLS[what]
        assert repl.value(SYSTEM_CALL.format(number=number, arguments=arguments))[0] == -1

    # --- other sessions ------------------------------------------------------------------------------------------

    @requires("isolation", "cpython", "files", "processes")
    def test_another_sessions_files_and_processes_are_out_of_reach(self, open_cells: OpenCells) -> None:
        one, other = open_cells(), open_cells()
        self.need(one, "files", "signals")
        pid, folder = one.value(
            f"""
            import os, subprocess
            open('secret', 'w').write({CANARY!r})
            os.chmod('secret', 0o777)
            try: os.chmod('.', 0o777)
            except OSError: pass  # it is nobody's own
            program = subprocess.Popen(['sleep', '98765'])
            [os.getpid(), os.getcwd()]
            """
        )
        state = "[sorted(os.listdir()), open('secret').read(), os.stat('.').st_mode, os.stat('secret').st_mode, program.poll()]"
        before = one.value(state)
        reading = (
            "open(f'{folder}/secret').read()",
            "os.listdir(folder)",
            "os.rename(f'{folder}/secret', 'stolen'); open('stolen').read()",
            "[open(path).read() for path in glob.glob(os.path.dirname(folder) + '/*/secret')]",
            "[open(path).read() for path in glob.glob('/proc/[0-9]*/cwd/secret')]",
            "[open(path).read() for path in glob.glob(f'/proc/[0-9]*/root{folder}/secret')]",
        )
        for attempt in reading:
            result = other.run(f"import glob, os\nfolder = {folder!r}\n{attempt}")
            assert CANARY not in result.echo and "'secret'" not in result.echo, attempt
        changing = (
            f"open({folder + '/planted'!r}, 'w')",
            f"os.chmod({folder!r}, 0o100)",
            f"os.chmod({folder + '/secret'!r}, 0o100)",
            f"os.unlink({folder + '/secret'!r})",
        )
        succeeding(other, changing)
        other.run(
            f"""
            import glob, os
            own = {{os.getpid(), os.getppid(), 1}}
            sleeping = [int(p.split('/')[2]) for p in glob.glob('/proc/[0-9]*/cmdline') if b'98765' in open(p, 'rb').read()]
            for target in sleeping + [{pid}]:
                if target not in own:
                    try: os.kill(target, 9)
                    except OSError: pass
            """
        )
        assert one.value(state) == before
        assert one.value("program.kill(); program.wait()") == -9

    def test_a_session_shares_no_variables_with_another(self, open_cells: OpenCells) -> None:
        one, other = open_cells(), open_cells()
        one.ok("import json\nplanted = 1\njson.planted = 2")
        one.repl.add_context("of the first")
        code = "import json\n['planted' in globals(), hasattr(json, 'planted'), 'context' in globals()]"
        assert other.value(code) == [False, False, False]
        other.ok("planted = 3")
        assert one.value("[planted, json.planted, context]") == [1, 2, "of the first"]

    @requires("files")
    def test_a_session_finds_nothing_of_the_one_before(self, open_cells: OpenCells) -> None:
        first = open_cells()
        first.ok("import json\nopen('left', 'w').write('x')\njson.planted = 1\nplanted = 2")
        first.close()
        second = open_cells()
        code = "import os, json\n[os.listdir(), hasattr(json, 'planted'), 'planted' in globals()]"
        assert second.value(code) == [[], False, False]

    @requires("cpython")
    async def test_the_token_is_in_no_argument_list_and_no_environment(self, sandbox: Sandbox) -> None:
        if not isinstance(sandbox.env, WorkerEnv) or sandbox.env.session is None:
            pytest.skip("the environment has no token")
        token = sandbox.env.session.token.partition(":")[2].encode()
        assert len(token) >= 32
        for entry in Path("/proc").glob("[0-9]*"):
            for name in ("cmdline", "environ"):
                with contextlib.suppress(OSError):
                    assert token not in (entry / name).read_bytes()
        code = f"{EVERYTHING}\n[any({token!r} in text for text in everything), len(everything) > 3]"
        assert await sandbox.value(code) == [False, True]

    def test_the_worker_is_no_module_that_a_cell_can_reach_by_name(self, repl: Cells) -> None:
        """An rlm that is installed may be imported: it is a fresh one, and the cell's own affair."""
        assert (
            repl.value("import sys\n[name for name in sys.modules if name.partition('.')[0] == 'rlm']") == []
        )
        code = "import importlib\ntry: importlib.import_module('rlm.worker').planted = 1\nexcept ImportError: pass\nllm_query"
        repl.ok(code)
        assert repl.ok("print('on')").stdout == "on\n"

    def test_every_result_says_what_stood_between(self, repl: Cells) -> None:
        assert repl.isolation.level != "unknown"
        assert repl.ok("1").isolation == repl.isolation


def _facts(path: Path) -> tuple[object, ...]:
    found = path.stat()
    attributes = os.listxattr(path) if hasattr(os, "listxattr") else []
    return found.st_mode, found.st_mtime, found.st_uid, found.st_nlink, path.read_text(), attributes


class Services:
    """Servers of the host, on every address it has, that note who reaches them."""

    def __init__(self, folder: Path) -> None:
        self._servers: list[tuple[str, socket.socket]] = []
        self.targets: list[tuple[str, object]] = []
        """What a cell is to try."""
        for address in ("127.0.0.1", *own_addresses().values()):
            with contextlib.suppress(OSError):
                self._listen_on(address)
        self._listen_at(str(folder / "service"))
        if sys.platform == "linux":
            self._listen_at(f"\0rlm-suite-{secrets.token_hex(8)}")
        with contextlib.suppress(OSError, AttributeError):
            self._listen_on_vsock()

    def _listen_on(self, address: str) -> None:
        tcp = socket.create_server((address, 0))
        self._servers.append((f"tcp {address}", tcp))
        port = tcp.getsockname()[1]
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._servers.append((f"udp {address}", udp))
        udp.bind((address, port))
        names = ["localhost", "host.docker.internal"] if address == "127.0.0.1" else []
        for name in [address, *names]:
            self.targets += [("tcp", [name, port]), ("udp", [name, port]), ("bash", [name, port])]
        self.targets.append(("http", f"http://{address}:{port}/"))

    def _listen_at(self, name: str) -> None:
        server = socket.socket(socket.AF_UNIX)
        self._servers.append((f"unix {name!r}", server))
        server.bind(name)
        server.listen()
        if not name.startswith("\0"):
            os.chmod(name, stat.S_IRWXU | stat.S_IRWXG | stat.S_IRWXO)
        self.targets += [("unix", name), ("unix datagram", name)]

    def _listen_on_vsock(self) -> None:
        server = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        self._servers.append(("vsock", server))
        server.bind((socket.VMADDR_CID_ANY, socket.VMADDR_PORT_ANY))
        server.listen()
        self.targets += [("vsock", [context, server.getsockname()[1]]) for context in (1, 2, 3)]

    def reached(self) -> list[str]:
        """The servers that a cell got through to."""
        found = []
        for name, server in self._servers:
            server.setblocking(False)
            with contextlib.suppress(OSError):
                if server.type == socket.SOCK_DGRAM:
                    server.recv(10)
                else:
                    server.accept()[0].close()
                found.append(name)
        return found

    def __enter__(self) -> Services:
        return self

    def __exit__(self, *_: object) -> None:
        for _name, server in self._servers:
            server.close()


def own_addresses() -> dict[str, str]:
    """This machine's interfaces besides loopback, bridges to containers included, with their IPv4 addresses."""
    found = {}
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
            for _, name in socket.if_nameindex():
                with contextlib.suppress(OSError):
                    reply = fcntl.ioctl(asker, 0x8915, struct.pack("256s", name.encode()[:15]))
                    found[name] = socket.inet_ntoa(reply[20:24])
    return {name: address for name, address in found.items() if not address.startswith("127.")}

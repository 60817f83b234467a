"""Facts about what a cell cannot see, reach or become."""

# ruff: noqa: E501 (a table of cells reads best with one to a line)

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Cells, Sandbox, descendants, need, unavailable

from rlm import open_repl
from rlm.errors import ConfigError

CANARY = "canary-5f1d0c7e"
REPOSITORY = Path(__file__).parent.parent


def outcome(repl: Cells, code: str) -> str:
    """What a cell that must not succeed raised; "" when it succeeded."""
    error = repl.run(code).error
    return error.type if error else ""


def succeeding(repl: Cells, attempts: Iterable[str], before: str = "import os") -> list[str]:
    """Those of the attempts, a cell each, that nothing stopped."""
    return [attempt for attempt in attempts if not outcome(repl, f"{before}\n{attempt}")]


# --- secrets of the host -------------------------------------------------------------------------------

READS_EVERY_ENVIRONMENT = """
    import glob, os
    def read(path):
        try: return open(path, 'rb').read()
        except OSError: return b''
    everything = [repr(os.environ).encode()]
    for kind in ('environ', 'cmdline', 'task/*/environ'):
        everything += [read(path) for path in glob.glob(f'/proc/[0-9]*/{kind}') + [f'/proc/self/{kind}']]
    """


def test_a_key_of_the_host_is_in_no_environment_that_a_cell_can_read(wall: str) -> None:
    script = f"""
        import sys, textwrap
        from rlm import open_repl
        with open_repl("local", wall={wall!r}) as repl:
            cell = textwrap.dedent({READS_EVERY_ENVIRONMENT!r})
            result = repl.execute(cell + "any(b'{CANARY}' in text for text in everything)", timeout=30)
            assert result.error is None, result.error
            print(result.value)
            import ctypes
            walk = "import ctypes, os\\n"
            walk += "names = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), 'environ')\\n"
            walk += "found = []\\nwhile names[len(found)]: found.append(names[len(found)])\\n"
            walk += "sorted(n.partition(b'=')[0].decode() for n in found)"
            print(repl.execute(walk, timeout=30).value)
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)], env={**os.environ, "API_KEY": CANARY, "SECRET": CANARY},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines() == [
        "False",
        "['GLIBC_TUNABLES', 'HOME', 'LANG', 'PATH', 'PWD', 'TMPDIR']",
    ], done.stderr


def test_home_and_temporary_directory_are_the_scratch_directory(repl: Cells) -> None:
    code = "import os, pathlib, tempfile\n[os.getcwd(), str(pathlib.Path.home()), tempfile.gettempdir(), os.environ['HOME']]"
    assert len(set(repl.value(code))) == 1


@contextlib.contextmanager
def canary_file(folder: Path) -> Iterator[Path]:
    """A file with a secret in it, where the test may put one."""
    try:
        handle, name = tempfile.mkstemp(prefix=".canary-", dir=folder)
    except OSError as error:
        pytest.skip(f"{folder} cannot be written by this user: {error.strerror}")
    os.write(handle, CANARY.encode())
    os.close(handle)
    os.chmod(name, 0o644)
    try:
        yield Path(name)
    finally:
        os.unlink(name)


FOLDERS = {"home": Path.home, "repository": lambda: REPOSITORY, "tempdir": lambda: Path(tempfile.gettempdir()),
           "shared memory": lambda: Path("/dev/shm"), "var": lambda: Path("/var/tmp")}  # fmt: skip


@pytest.mark.parametrize("where", FOLDERS)
def test_a_file_of_the_host_cannot_be_read_changed_or_listed(repl: Cells, where: str) -> None:
    need(repl, "files")
    with canary_file(FOLDERS[where]()) as path:
        before = path.stat()
        attempts = (
            "open(path).read()",
            "open(path, 'a')",
            "open(path, 'r+')",
            "os.truncate(path, 0)",
            "os.unlink(path)",
            "os.rename(path, 'stolen')",
            "os.link(path, 'stolen'); open('stolen').read()",
            "os.symlink(path, 'link'); open('link').read()",
            "import shutil; shutil.copy(path, 'copied')",
            "import subprocess; subprocess.run(['cat', path], check=True, stderr=-3)",
        )
        assert succeeding(repl, attempts, f"import os; path = {str(path)!r}") == []
        ineffective = (  # refused or ignored: what counts is that nothing has changed
            "os.chmod(path, 0o600)",
            "os.utime(path, (0, 0))",
            "os.setxattr(path, 'user.x', b'1')",
            "os.chown(path, os.getuid(), os.getgid())",
            "os.fchmod(os.open(path, os.O_PATH), 0o600)",
            "os.chmod(f'/proc/self/fd/{os.open(path, os.O_PATH)}', 0o600)",
        )
        succeeding(repl, ineffective, f"import os; path = {str(path)!r}")
        assert os.listxattr(path) == []
        listing = f"import os\ntry: names = os.listdir({str(path.parent)!r})\nexcept OSError: names = []\n{path.name!r} in names"
        assert repl.value(listing) is False
        after = path.stat()
        assert path.read_text() == CANARY
        assert (after.st_mode, after.st_mtime, after.st_uid) == (
            before.st_mode,
            before.st_mtime,
            before.st_uid,
        )


def test_a_directory_of_the_host_cannot_be_watched(repl: Cells) -> None:
    code = """
        import ctypes, os, time
        libc = ctypes.CDLL(None, use_errno=True)
        fd = libc.inotify_init1(os.O_NONBLOCK)
        libc.inotify_add_watch(fd, {0!r}.encode(), 0xfff) >= 0
    """
    with tempfile.TemporaryDirectory(dir=tempfile.gettempdir()) as folder:
        os.chmod(folder, 0o755)
        assert repl.value(code.format(folder)) is False


@pytest.mark.parametrize("path", ["/etc/shadow", "/etc/passwd", "/etc/hosts", "/root/.bashrc", "/proc/kcore", "/dev/mem", "/dev/kmsg",
                                  "/sys/kernel", "/run", "/var/log", "/etc", "/home"])  # fmt: skip
def test_a_secret_place_of_the_system_cannot_be_read(repl: Cells, path: str) -> None:
    need(repl, "files")
    if not os.path.exists(path):
        pytest.skip(f"there is no {path} here")
    result = repl.run(
        f"import os\npath = {path!r}\nos.listdir(path) if os.path.isdir(path) else open(path, 'rb').read(1)"
    )
    assert result.error is not None or result.echo in ("[]", "b''") or _is_scaffold(result.value, path)


def _is_scaffold(names: Any, path: str) -> bool:
    """Whether a listing shows only the way to what is visible, and nothing of the host's own."""
    visible = {
        "ld.so.cache",
        "ld.so.conf",
        "ld.so.conf.d",
        "alternatives",
        "localtime",
        "timezone",
        "mime.types",
        "ssl",
        "magic",
    }
    return (path == "/etc" and set(names) <= visible) or (path == "/home" and len(names) <= 1)


PLACES = ["/", "/tmp", "/var/tmp", "/dev/shm", "/usr", "/usr/local/lib", "/etc", "/opt", "/home", "/root", "/proc", "/sys", "/run",
          str(REPOSITORY), sys.prefix, sys.base_prefix, str(Path.home())]  # fmt: skip


def test_a_cell_can_write_nowhere_but_in_its_scratch_directory(repl: Cells) -> None:
    need(repl, "files")
    name = f"written-by-a-cell-{os.getpid()}"
    code = f"""
        import os
        written = []
        for place in {PLACES!r}:
            for make in (lambda p: os.close(os.open(p, os.O_CREAT | os.O_WRONLY)), os.mkdir, lambda p: os.symlink('/', p), os.mkfifo):
                try:
                    make(os.path.join(place, {name!r}))
                    written.append(place)
                except OSError: pass
        open('here', 'w').write('x')
        written
    """
    repl.run(code)
    assert not [place for place in PLACES if os.path.lexists(os.path.join(place, name))]


def test_the_files_of_the_interpreter_are_read_only(repl: Cells) -> None:
    need(repl, "files")
    code = "import os, json\nfor mode in ('a', 'r+'):\n    try: open(json.__file__, mode)\n    except OSError as e: print(e.errno)"
    assert len(repl.ok(code).stdout.splitlines()) == 2
    assert succeeding(repl, ("os.unlink(json.__file__)",), "import os, json") == []
    state = "[os.stat(json.__file__).st_mode, os.stat(json.__file__).st_mtime]"
    before = repl.value(state)
    ineffective = (
        "os.chmod(json.__file__, 0o600)",
        "os.utime(json.__file__)",
        "os.fchmod(os.open(json.__file__, 0), 0o600)",
        "os.utime(os.open(json.__file__, 0))",
    )
    succeeding(repl, ineffective, "import os, json")
    assert repl.value(state) == before


# --- the network -------------------------------------------------------------------------------------------

FAMILIES = {
    "unix": 1,
    "inet": 2,
    "inet6": 10,
    "netlink": 16,
    "packet": 17,
    "bluetooth": 31,
    "alg": 38,
    "vsock": 40,
    "xdp": 44,
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", [1, 2, 3, 5])
def test_no_socket_can_be_made(repl: Cells, family: str, kind: int) -> None:
    need(repl, "system calls")
    code = f"import socket\nsocket.socket({FAMILIES[family]}, {kind}, 0)"
    assert outcome(repl, code) == "PermissionError"


def test_the_32_bit_ways_to_a_socket_are_shut(repl: Cells) -> None:
    """The x32 numbers, and int 0x80 with its own table."""
    need(repl, "system calls")
    code = """
        import ctypes, mmap, platform
        libc = ctypes.CDLL(None, use_errno=True)
        x32 = libc.syscall(0x40000000 + 41, 2, 1, 0) if platform.machine() == 'x86_64' else -1
        x32
    """
    assert repl.value(code) == -1
    if os.uname().machine == "x86_64":
        code = """
            import ctypes, mmap
            page = mmap.mmap(-1, 4096, prot=7)
            # mov eax, 359 (socket); mov ebx, 2; mov ecx, 1; xor edx, edx; int 0x80; ret
            page.write(bytes.fromhex('53b867010000bb02000000b90100000031d2cd805bc3'))
            function = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
            function() >= 0
        """
        result = repl.run(code)
        assert result.error is not None or result.value is False


def test_a_cell_reaches_no_server_of_the_host(repl: Cells, tmp_path: Path) -> None:
    reached = threading.Event()
    path = Path(tempfile.mkdtemp()) / "s"
    abstract = f"\0rlm-test-{os.getpid()}"
    servers = [
        socket.create_server(("127.0.0.1", 0)),
        socket.socket(socket.AF_UNIX),
        socket.socket(socket.AF_UNIX),
    ]
    servers[1].bind(str(path))
    servers[2].bind(abstract)
    os.chmod(path.parent, 0o755)
    os.chmod(path, 0o777)
    try:
        for server in servers:
            server.listen()
            server.settimeout(0.3)
        port = servers[0].getsockname()[1]
        attempts = (
            f"socket.create_connection(('127.0.0.1', {port}), 2)",
            f"socket.create_connection(('localhost', {port}), 2)",
            f"s = socket.socket(socket.AF_UNIX); s.connect({str(path)!r})",
            f"s = socket.socket(socket.AF_UNIX); s.connect({abstract!r})",
            f"a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM); a.sendto(b'x', {str(path)!r})",
            f"import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}/', timeout=2)",
            f"import subprocess; subprocess.run(['bash', '-c', 'echo > /dev/tcp/127.0.0.1/{port}'], check=True, stderr=-3)",
        )
        assert succeeding(repl, attempts, "import socket") == []
        for server in servers:
            with contextlib.suppress(TimeoutError):
                server.accept()
                reached.set()
        assert not reached.is_set()
    finally:
        for server in servers:
            server.close()
        shutil.rmtree(path.parent)


def test_a_cell_holds_no_connection_of_the_hosts(repl: Cells) -> None:
    code = """
        import socket, os
        found = []
        for fd in range(1024):
            try: s = socket.socket(fileno=os.dup(fd))
            except OSError: continue
            found.append(s.family)
            s.close()
        sorted(set(map(int, found)))
    """
    assert repl.value(code) == [int(socket.AF_UNIX)]


def test_a_pair_of_sockets_between_threads_is_allowed(repl: Cells) -> None:
    assert repl.value("import socket\na, b = socket.socketpair()\na.send(b'hi')\nb.recv(5).decode()") == "hi"


# --- processes of the host ---------------------------------------------------------------------------------


@pytest.fixture
def victim() -> Iterator[int]:
    """A process of this user's that a cell may attack."""
    process = subprocess.Popen(["sleep", "3600"])
    try:
        yield process.pid
        assert process.poll() is None, "the cell ended it"
    finally:
        process.kill()
        process.wait()


def test_no_process_of_the_host_can_be_signalled(repl: Cells, victim: int) -> None:
    need(repl, "signals")
    mine = repl.value("import os\n[os.getpid(), os.getppid()]")
    server = min(descendants(os.getpid()) - {victim})
    for pid in {os.getpid(), os.getppid(), server, victim} - set(mine):
        attempts = [f"os.kill({pid}, {number})" for number in (0, int(signal.SIGCONT), int(signal.SIGURG))]
        if pid == victim:
            attempts += [f"os.kill({pid}, 15)", f"os.kill({pid}, 9)", f"os.killpg({pid}, 9)"]
        assert succeeding(repl, attempts) == []


def test_the_supervisor_and_its_parent_cannot_be_signalled(repl: Cells) -> None:
    need(repl, "signals")
    for number in (1, 9, 15, 19):
        assert outcome(repl, f"import os; os.kill(os.getppid(), {number})") == "PermissionError"
        assert outcome(repl, f"import os; os.kill(1, {number})") == "PermissionError"
    assert (
        outcome(repl, "import os, signal\nfd = os.pidfd_open(os.getppid())\nsignal.pidfd_send_signal(fd, 9)")
        != ""
    )


@pytest.mark.parametrize("target", ["os.getppid()", "1", "{victim}", "{host}"])
def test_other_processes_cannot_be_traced_read_or_limited(repl: Cells, victim: int, target: str) -> None:
    need(repl, "system calls")
    pid = target.format(victim=victim, host=os.getpid())
    before = f"""
import ctypes, os, resource
libc = ctypes.CDLL(None, use_errno=True)
buffer = ctypes.create_string_buffer(64)
def check(result):
    if result < 0: raise OSError(ctypes.get_errno(), 'refused')
pid = {pid}
"""
    attempts = (  # harmless even where nothing stops them
        "check(libc.ptrace(16, pid, 0, 0))",
        "check(libc.ptrace(0x4206, pid, 0, 0))",
        "check(libc.syscall(310, pid, buffer, 1, buffer, 1, 0))",
        "check(libc.syscall(312, pid, os.getpid(), 0, 0, 0))",
        "check(libc.syscall(438, os.pidfd_open(pid), 0, 0))",
        "open(f'/proc/{pid}/mem', 'rb')",
        "open(f'/proc/{pid}/maps').read() or 1/0",
        "open(f'/proc/{pid}/environ', 'rb').read() or 1/0",
        "os.readlink(f'/proc/{pid}/fd/0')",
        "os.listdir(f'/proc/{pid}/root/')",
        "os.readlink(f'/proc/{pid}/cwd')",
        "resource.prlimit(pid, resource.RLIMIT_NOFILE)",
        "resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))",
        "os.setpriority(os.PRIO_PROCESS, pid, os.getpriority(os.PRIO_PROCESS, pid))",
        "os.sched_setaffinity(pid, os.sched_getaffinity(pid))",
        "os.sched_setscheduler(pid, os.SCHED_OTHER, os.sched_param(0))",
        "check(libc.syscall(251, 1, pid, 4 | 2 << 13))",
    )
    assert succeeding(repl, attempts, before) == []


def test_shared_memory_of_the_host_cannot_be_attached(repl: Cells) -> None:
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


def test_a_cell_has_no_capabilities_and_cannot_gain_privileges(repl: Cells) -> None:
    code = """
        import ctypes, os, struct
        libc = ctypes.CDLL(None, use_errno=True)
        header, data = ctypes.create_string_buffer(struct.pack('Ii', 0x20080522, 0)), ctypes.create_string_buffer(24)
        assert libc.capget(header, data) == 0
        sets = struct.unpack('6I', data)
        [sets[0] | sets[3] << 32, sets[1] | sets[4] << 32, libc.prctl(39, 0, 0, 0, 0), libc.prctl(21, 0, 0, 0, 0)]
    """
    effective, permitted, no_new_privileges, seccomp = repl.value(code)
    allowed = 0
    if os.geteuid() == 0 and repl.repl.isolation.level == "landlock":
        allowed = (
            1 << 2
        )  # CAP_DAC_READ_SEARCH, where the interpreter lies in root's own home: Landlock decides
    assert effective & ~allowed == permitted & ~allowed == 0
    assert (no_new_privileges, seccomp) == (1, 2)


def test_a_cell_is_not_root(repl: Cells) -> None:
    assert 0 not in repl.value("import os\nlist(os.getresuid() + os.getresgid())")
    assert repl.value("import os\nos.getgroups()") in ([], [os.getgid()], [65534])
    assert (
        succeeding(
            repl, ("os.setuid(0)", "os.setgid(0)", "os.setgroups([0])", "os.chroot('.')", "os.nice(-5)")
        )
        == []
    )


SYSTEM_CALLS = {  # what is refused, and the x86_64 number and arguments
    "mount": (165, "b'none', b'.', b'tmpfs', 0, 0"), "umount2": (166, "b'/', 2"), "pivot_root": (155, "b'.', b'.'"),
    "unshare of users": (272, "0x10000000"), "unshare of mounts": (272, "0x20000"), "setns": (308, "0, 0"),
    "clone into a user name space": (56, "0x10000000 | 17, 0, 0, 0, 0"), "open_tree": (428, "-100, b'.', 1"),
    "fsopen": (430, "b'tmpfs', 0"), "mount_setattr": (442, "-100, b'/', 0, buffer, 32"),
    "io_uring_setup": (425, "8, buffer"), "bpf": (321, "0, buffer, 64"), "keyctl": (250, "0, -3, 1"), "add_key": (248, "b'user', b'a', b'b', 1, -3"),
    "request_key": (249, "b'user', b'a', 0, -3"), "perf_event_open": (298, "buffer, 0, -1, -1, 0"), "userfaultfd": (323, "1"),
    "process_vm_readv": (310, "os.getppid(), buffer, 1, buffer, 1, 0"), "ptrace": (101, "0, 0, 0, 0"), "kexec_load": (246, "0, 0, 0, 0"),
    "init_module": (175, "buffer, 0, b''"), "reboot": (169, "0xfee1dead, 672274793, 0, 0"), "swapon": (167, "b'/', 0"),
    "settimeofday": (164, "buffer, 0"), "sethostname": (170, "b'x', 1"), "syslog": (103, "3, buffer, 64"), "personality": (135, "0x0040000"),
    "name_to_handle_at": (303, "-100, b'/', buffer, buffer, 0"), "open_by_handle_at": (304, "0, buffer, 0"), "acct": (163, "b'x'"),
}  # fmt: skip


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers are those of x86_64")
@pytest.mark.parametrize("what", SYSTEM_CALLS)
def test_a_system_call_is_refused(repl: Cells, what: str) -> None:
    need(repl, "system calls")
    number, arguments = SYSTEM_CALLS[what]
    code = f"""
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        buffer = ctypes.create_string_buffer(256)
        result = libc.syscall(ctypes.c_long({number}), {arguments})
        if result == 0 and {number} == 56: os._exit(0)
        [result, ctypes.get_errno()]
    """
    assert repl.value(code) == [-1, 1]


def test_a_program_of_another_user_gives_no_rights(repl: Cells) -> None:
    su = next(
        (p for p in ("/usr/bin/su", "/bin/su", "/usr/bin/sudo", "/usr/bin/passwd") if os.path.exists(p)), None
    )
    if su is None:
        pytest.skip("there is no setuid program here")
    code = "import subprocess\nsubprocess.run(['sh', '-c', 'id -u; grep -c . /etc/shadow'], capture_output=True, text=True).stdout.split()"
    assert "0" not in repl.value(code)[:1]
    assert (
        outcome(
            repl,
            f"import subprocess\nsubprocess.run([{su!r}, '-c', 'true'], check=True, capture_output=True, timeout=10)",
        )
        != ""
    )


# --- its neighbours ------------------------------------------------------------------------------------------


def test_another_sessions_files_and_processes_are_out_of_reach(open_cells: Callable[..., Cells]) -> None:
    one, other = open_cells(), open_cells()
    need(one, "files", "signals")
    pid, folder = one.value(
        "import os\nopen('secret', 'w').write('s')\nos.chmod('secret', 0o777); os.chmod('.', 0o777)\n[os.getpid(), os.getcwd()]"
    )
    attempts = (
        f"open('{folder}/secret').read()",
        f"os.listdir('{folder}')",
        f"open('{folder}/planted', 'w')",
        f"os.rename('{folder}/secret', 'stolen')",
        f"os.listdir('{os.path.dirname(folder)}')",
        f"os.kill({pid}, 0)",
        f"os.kill({pid}, 9)",
        f"open('/proc/{pid}/mem', 'rb')",
        f"open('/proc/{pid}/environ', 'rb').read() or 1/0",
        f"open('/proc/{pid}/maps').read()",
        f"os.readlink('/proc/{pid}/fd/0')",
        f"os.listdir('/proc/{pid}/root/')",
        f"os.listdir('/proc/{pid}/cwd/')",
        f"import resource; resource.prlimit({pid}, resource.RLIMIT_CPU, (1000, 1000))",
        f"os.setpriority(os.PRIO_PROCESS, {pid}, 1)",
    )
    assert succeeding(other, attempts) == []
    modes = "import os\n[os.stat(name).st_mode for name in ('.', 'secret')]"
    before = one.value(modes)
    succeeding(other, (f"os.chmod('{folder}', 0o100)", f"os.chmod('{folder}/secret', 0o100)"))
    assert one.value(modes) == before
    assert one.value("import os\n[sorted(os.listdir()), open('secret').read()]") == [["secret"], "s"]


def test_a_session_finds_nothing_of_the_one_before(open_cells: Callable[..., Cells]) -> None:
    first = open_cells()
    first.ok("import json\nopen('left', 'w').write('x')\njson.planted = 1\nplanted = 2")
    first.repl.close()
    second = open_cells()
    assert second.value(
        "import os, json\n[os.listdir(), hasattr(json, 'planted'), 'planted' in globals()]"
    ) == [[], False, False]


async def test_the_token_is_in_no_argument_list_and_no_environment(sandbox: Sandbox) -> None:
    session = sandbox.env.session
    assert session is not None
    token = session.token.partition(":")[2].encode()
    assert len(token) >= 32
    seen = 0
    for entry in pathlib.Path("/proc").iterdir():
        for name in ("cmdline", "environ"):
            with contextlib.suppress(OSError):
                if entry.name.isdigit():
                    seen += 1
                    assert token not in (entry / name).read_bytes()
    assert seen > 2
    code = (
        "\n".join(line[4:] for line in READS_EVERY_ENVIRONMENT.splitlines())
        + f"\nany({token!r} in text for text in everything)"
    )
    assert await sandbox.value(code) is False


def test_a_cell_cannot_read_the_supervisors_memory_or_descriptors(repl: Cells) -> None:
    for name in ("mem", "environ", "maps", "auxv", "stack", "fd/0", "fd", "cwd", "root", "exe", "task"):
        code = f"import os\npath = f'/proc/{{os.getppid()}}/{name}'\n"
        code += "os.listdir(path) if os.path.isdir(path) else open(path, 'rb').read() or 1/0"
        result = repl.run(code)
        assert result.error is not None or name == "task", name


# --- what is said about it ----------------------------------------------------------------------------------


def test_the_report_names_the_wall_and_what_it_enforces(repl: Cells, wall: str) -> None:
    found = repl.repl.isolation
    assert found.level == wall or (wall == "landlock" and found.level == "none" and found.missing)
    assert repl.ok("1").isolation == found
    if not found.missing:
        assert {"files", "signals", "system calls"} <= set(found.enforced)


def test_isolation_none_is_a_bare_process_and_says_so() -> None:
    with open_repl("local", isolation="none") as session:
        assert session.isolation.level == "none"
        assert "isolation='none'" in session.isolation.missing[0]
        assert session.isolation.enforced == ()
        repl = Cells(session)
        assert repl.value("import os\n[os.getuid(), os.path.isdir('/'), len(os.listdir('/')) > 3]") == [
            os.getuid(),
            True,
            True,
        ]
        repl.ok("kept = 1")
        assert repl.error("os._exit(1)").kind == "crash"
        assert repl.value("kept") == 1


def test_isolation_none_still_hides_the_hosts_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", CANARY)
    with open_repl("local", isolation="none", scratch=777) as session:  # a fork server of its own
        assert Cells(session).value(f"import os\n{CANARY!r} in str(os.environ)") is False


def test_isolation_required_starts_where_everything_is_enforced(open_cells: Callable[..., Cells]) -> None:
    missing = open_cells().repl.isolation.missing
    if missing:
        unavailable(f"this machine does not enforce everything: {missing}")
    assert open_cells(isolation="required").value("1") == 1


@pytest.mark.parametrize(
    "settings", [{"isolation": "some"}, {"wall": "brick"}, {"nonsense": 1}], ids=json.dumps
)
def test_a_setting_that_makes_no_sense_is_a_config_error(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError), open_repl("local", **settings):
        pass


def test_the_worker_is_no_module_that_a_cell_can_reach_by_name(repl: Cells) -> None:
    """An rlm that is installed may be imported: it is a fresh one, and the cell's own affair."""
    assert repl.value("import sys\n[name for name in sys.modules if name.partition('.')[0] == 'rlm']") == []
    code = "import importlib\ntry: importlib.import_module('rlm.worker').planted = 1\nexcept ImportError: pass\nllm_query"
    repl.ok(code)
    assert repl.ok("print('on')").stdout == "on\n"

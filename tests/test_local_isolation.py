"""What local sandboxes refuse outright, beyond what the conformance suite asks of everyone."""

# ruff: noqa: E501 (a table of cells reads best with one to a line)

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable
from typing import Any

import pytest
from conftest import need

from rlm import open_repl
from rlm.errors import ConfigError
from rlm.testing.isolation import (
    CANARY,
    LIMITS,
    SYSTEM_CALL,
    SYSTEM_CALLS,
    TRACES,
    TRACING,
    outcome,
    succeeding,
)
from rlm.testing.sessions import Cells, descendants, unavailable

# --- files ---------------------------------------------------------------------------------------------


def test_the_environment_of_a_cell_is_made_of_a_few_names(repl: Cells) -> None:
    walk = "import ctypes\nnames = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), 'environ')\n"
    walk += "found = []\nwhile names[len(found)]: found.append(names[len(found)])\n"
    walk += "sorted(n.partition(b'=')[0].decode() for n in found)"
    assert repl.value(walk) == ["GLIBC_TUNABLES", "HOME", "LANG", "PATH", "PWD", "TMPDIR"]


def test_home_and_temporary_directory_are_the_scratch_directory(repl: Cells) -> None:
    code = "import os, pathlib, tempfile\n[os.getcwd(), str(pathlib.Path.home()), tempfile.gettempdir(), os.environ['HOME']]"
    assert len(set(repl.value(code))) == 1


def test_every_session_has_a_directory_of_its_own(open_cells: Callable[..., Cells]) -> None:
    assert len({open_cells().value("import os; os.getcwd()") for _ in range(3)}) == 3


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


# --- the network ---------------------------------------------------------------------------------------


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
def test_no_socket_can_be_made(repl: Cells, family: str) -> None:
    need(repl, "system calls")
    kinds = (1, 2, 3, 5)
    code = f"import socket\nsocket.socket({FAMILIES[family]}, {{}}, 0)"
    assert [outcome(repl, code.format(kind)) for kind in kinds] == ["PermissionError"] * len(kinds)


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


def test_the_sockets_that_a_cell_holds_are_pairs(repl: Cells) -> None:
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


# --- processes -----------------------------------------------------------------------------------------


def test_no_process_of_the_host_can_even_be_asked_after(repl: Cells) -> None:
    need(repl, "signals")
    mine = repl.value("import os\n[os.getpid(), os.getppid()]")
    server = min(descendants(os.getpid()))
    for pid in {os.getpid(), os.getppid(), server} - set(mine):
        attempts = [f"os.kill({pid}, {number})" for number in (0, int(signal.SIGCONT), int(signal.SIGURG))]
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


@pytest.mark.parametrize("target", ["os.getppid()", "1"])
def test_the_supervisor_and_its_parent_cannot_be_traced_or_limited(repl: Cells, target: str) -> None:
    need(repl, "system calls")
    assert succeeding(repl, (*TRACES, *LIMITS), TRACING.format(pid=target)) == []


def test_every_way_to_another_session_is_refused(open_cells: Callable[..., Cells]) -> None:
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


# --- rights --------------------------------------------------------------------------------------------


def test_a_filter_of_system_calls_is_in_force(repl: Cells) -> None:
    need(repl, "system calls")
    assert repl.value("import ctypes\nctypes.CDLL(None).prctl(21, 0, 0, 0, 0)") == 2


def test_a_cell_is_of_no_group_of_the_hosts(repl: Cells) -> None:
    assert repl.value("import os\nos.getgroups()") in ([], [os.getgid()], [65534])


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers are those of x86_64")
def test_system_calls_are_refused_whatever_their_arguments(repl: Cells) -> None:
    need(repl, "system calls")
    calls = {**SYSTEM_CALLS, "ptrace of itself": (101, "0, 0, 0, 0")}
    answers = {
        what: repl.value(SYSTEM_CALL.format(number=number, arguments=arguments))
        for what, (number, arguments) in calls.items()
    }
    assert {what: answer for what, answer in answers.items() if answer != [-1, 1]} == {}


def test_a_setuid_program_cannot_be_used(repl: Cells) -> None:
    su = next(
        (p for p in ("/usr/bin/su", "/bin/su", "/usr/bin/sudo", "/usr/bin/passwd") if os.path.exists(p)), None
    )
    if su is None:
        pytest.skip("there is no setuid program here")
    code = f"import subprocess\nsubprocess.run([{su!r}, '-c', 'true'], check=True, capture_output=True, timeout=10)"
    assert outcome(repl, code) != ""


# --- what is said about it -----------------------------------------------------------------------------


def test_the_report_names_the_wall_and_what_it_enforces(repl: Cells, wall: str) -> None:
    found = repl.repl.isolation
    assert found.level == wall or (wall == "landlock" and found.level == "none" and found.missing)
    assert repl.ok("1").isolation == found
    if not found.missing:
        assert {"files", "signals", "system calls"} <= set(found.enforced)


def test_isolation_none_is_a_bare_process_and_says_so() -> None:
    # without a namespace of its own it shares the limit on processes with whatever else the user runs
    with open_repl("local", isolation="none", processes=4096) as session:
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

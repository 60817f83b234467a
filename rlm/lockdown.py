"""What a process gives up before it runs code that nobody has read.

Linux only, standard library only, CPython 3.8 and later: this file travels into
sandboxes with :mod:`rlm.worker`. Each function takes one right away for good, and
raises OSError where the kernel does not offer that. It knows system calls; which of
them to use, and what to tell the user about the rest, is the caller's business.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from typing import Iterable, List

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_SECCOMP = 22
_PR_CAPBSET_DROP = 24
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47

CLONE_NEWUSER = 0x10000000
CAP_DAC_READ_SEARCH = 2

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, "%s: %s" % (what, os.strerror(number)))
    return result


def _prctl(option: int, *values: int) -> None:
    padded = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]]
    _check(_libc.prctl(option, *padded), "prctl(%d)" % option)


def _syscall(number: int, *values: object) -> int:
    return _check(int(_libc.syscall(ctypes.c_long(number), *values)), "syscall %d" % number)


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that forked it ends."""
    _prctl(_PR_SET_PDEATHSIG, 9)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent dies (a subreaper)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def set_readable(readable: bool) -> None:
    """Allow, or forbid, other processes of this user to trace or read this one (/proc included)."""
    _prctl(_PR_SET_DUMPABLE, 1 if readable else 0)


def no_new_privileges() -> None:
    """Make setuid programs powerless for this process and its descendants."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


# --- users and capabilities --------------------------------------------------------------


def enter_user_namespace() -> None:
    """Count this process and its descendants apart from the user's others.

    RLIMIT_NPROC is kept per user *and* user namespace, so only after this does a limit
    on processes mean the processes of one sandbox.
    """
    uid, gid = os.geteuid(), os.getegid()
    _check(_libc.unshare(CLONE_NEWUSER), "unshare")
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", "%d %d 1" % (uid, uid)),
        ("gid_map", "%d %d 1" % (gid, gid)),
    ):
        with open("/proc/self/" + name, "w") as file:
            file.write(text)


class _CapabilityHeader(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _CapabilityData(ctypes.Structure):
    _fields_ = [
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    ]


def _set_capabilities(mask: int) -> None:
    header = _CapabilityHeader(0x20080522, 0)
    data = (_CapabilityData * 2)()
    data[0].effective = data[0].permitted = data[0].inheritable = mask
    _check(_libc.capset(ctypes.byref(header), ctypes.byref(data)), "capset")


def drop_capabilities(keep: int = 0) -> None:
    """Give up every capability but those in the bit mask ``keep``, for programs started later too."""
    _bound_capabilities(keep)
    _set_capabilities(keep)
    for capability in range(32):
        if keep >> capability & 1:
            _prctl(_PR_CAP_AMBIENT, 2, capability)


def _bound_capabilities(keep: int) -> None:
    """No program started from here on can ever have more than ``keep``."""
    for capability in range(64):
        if not keep >> capability & 1:
            try:
                _prctl(_PR_CAPBSET_DROP, capability)
            except OSError:
                break  # past the last capability, or not ours to drop: what is permitted decides


def become(uid: int, keep: int = 0) -> None:
    """Turn from root into ``uid`` (group of the same number), keeping capabilities ``keep``."""
    _bound_capabilities(keep)  # first: it takes a right that the change of user ends
    _prctl(8, 1)  # PR_SET_KEEPCAPS: the ones in keep must survive the change of user
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    drop_capabilities(keep)


# --- Landlock: which files, and which processes may be signalled ----------------------------

_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_RIGHTS_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}
_RIGHTS_NEWEST = (1 << 16) - 1
_RIGHTS_ON_FILES = 0b1000000000000111 | 1 << 14
_READ = 0b1101


def landlock_version() -> int:
    """The kernel's Landlock ABI, 0 without Landlock."""
    try:
        return _syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    except OSError:
        return 0


def landlock_files(readable: Iterable[str], writable: Iterable[str]) -> None:
    """Close off the file system but for the paths named, and TCP where the kernel can.

    Paths that do not exist are passed over; everything below a path goes with it.
    """
    abi = landlock_version()
    rights = _RIGHTS_BY_ABI.get(abi, _RIGHTS_NEWEST)
    rules = [(path, rights & _READ) for path in readable]
    rules += [(path, rights) for path in writable]
    _restrict(struct.pack("=QQ", rights, 3)[: 16 if abi >= 4 else 8], rules)


def landlock_signals() -> None:
    """Confine signals, and sockets with abstract names, to this process and its descendants.

    Raises OSError before Landlock ABI 6 (Linux 6.12).
    """
    if landlock_version() < 6:
        raise OSError(38, "needs Linux 6.12")
    _restrict(struct.pack("=QQQ", 0, 0, 3), [])


def _restrict(attributes: bytes, rules: list[tuple[str, int]]) -> None:
    ruleset = _syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))
    try:
        for path, rights in rules:
            _allow(ruleset, path, rights)
        no_new_privileges()
        _syscall(_LANDLOCK_RESTRICT, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not os.path.isdir(path):
            rights &= _RIGHTS_ON_FILES
        rule = struct.pack("=Qi", rights, handle)
        _syscall(_LANDLOCK_ADD, ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint32(0))
    finally:
        os.close(handle)


# --- seccomp: which system calls ------------------------------------------------------------

# Denied with EPERM. What each group would allow is why it is here.
_DENIED = {
    # name: (x86_64, aarch64)
    # other processes' memory and descriptors
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    # mounts and name spaces: the way round every path rule
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "move_mount": (429, 429),
    "open_tree": (428, 428),
    "mount_setattr": (442, 442),
    "unshare": (272, 97),
    "setns": (308, 268),
    "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264),
    # kernel interfaces with a history of escalation, of no use to a cell
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "syslog": (103, 116),
    "quotactl": (179, 60),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "personality": (135, 92),
    # memory, queues and semaphores shared by all processes of a user
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semget": (64, 190),
    "semop": (65, 193),
    "semctl": (66, 191),
    "semtimedop": (220, 192),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    # what happens in directories that cannot be read
    "inotify_add_watch": (254, 27),
    "fanotify_init": (300, 262),
    "fanotify_mark": (301, 263),
    # a second way to every other call, invisible to this filter
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
}
# Allowed for the calling process alone: (x86_64, aarch64), and which argument names the process.
_ON_ITSELF = {
    "prlimit64": (302, 261, 0), "sched_setaffinity": (203, 122, 0), "sched_setscheduler": (144, 119, 0),
    "sched_setparam": (142, 118, 0), "sched_setattr": (314, 274, 0), "migrate_pages": (256, 238, 0),
    "move_pages": (279, 239, 0),
}  # fmt: skip
# The same where the first argument says what the second one names: it must be a process.
_ON_ONE_PROCESS = {"setpriority": (141, 140, 0), "ioprio_set": (251, 30, 1)}

# Owner, mode, times and attributes of files, which no path rule of Landlock covers. Programs that
# copy files set them as a matter of course, so these report success and do nothing.
_ATTRIBUTES = {
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "removexattrat": (466, 466),
}  # fmt: skip
_SOCKET = (41, 198)
_SOCKETPAIR = (53, 199)
_CLONE = (56, 220)
_CLONE3 = 435
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

_NAMESPACE_FLAGS = 0x7E020080  # every CLONE_NEW*
_EPERM, _ENOSYS = 1, 38
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD, _JUMP_EQ, _JUMP_GE, _JUMP_SET, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_AT_NUMBER, _AT_ARCH, _AT_ARG0, _AT_ARG1 = 0, 4, 16, 24

AF_UNIX, AF_INET, AF_INET6 = 1, 2, 10
_STREAM, _SEQPACKET = 1, 5


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _deny_unless(number: int, at: int, mask: int, allowed: Iterable[int]) -> List[bytes]:
    """For one call: EPERM unless its masked argument is in ``allowed``."""
    values = list(allowed)
    tests = [_op(_JUMP_EQ, value, len(values) - i, 0) for i, value in enumerate(values)]
    body = [_op(_LOAD, at), _op(_AND, mask), *tests]
    body += [_op(_RETURN, _ERRNO | _EPERM), _op(_RETURN, _ALLOW)]
    return [_op(_JUMP_EQ, number, 0, len(body)), *body]


def _deny_unless_equal(at: int, value: int) -> List[bytes]:
    """Within one call: EPERM unless an argument has this value; else on to the next instruction."""
    return [_op(_LOAD, at), _op(_JUMP_EQ, value, 1, 0), _op(_RETURN, _ERRNO | _EPERM)]


def _filter_program(machine: str, network: bool, attributes: bool) -> bytes:
    """The BPF program: see seccomp(2). ``network`` leaves internet sockets open."""
    column = 0 if machine == "x86_64" else 1
    families = [AF_UNIX, AF_INET, AF_INET6] if network else []
    program = [
        _op(_LOAD, _AT_ARCH),
        _op(_JUMP_EQ, _AUDIT_ARCH[machine], 1, 0),
        _op(_RETURN, _KILL),
        _op(_LOAD, _AT_NUMBER),
    ]
    if machine == "x86_64":  # the x32 calls: the same kernel functions under other numbers
        program += [_op(_JUMP_GE, 0x40000000, 0, 1), _op(_RETURN, _ERRNO | _EPERM)]
    for numbers in _DENIED.values():
        program += [_op(_JUMP_EQ, numbers[column], 0, 1), _op(_RETURN, _ERRNO | _EPERM)]
    for x86_64, aarch64, argument in _ON_ITSELF.values():
        number = (x86_64, aarch64)[column]
        program += _deny_unless(number, _AT_ARG0 + 8 * argument, 0xFFFFFFFF, (0,))
    for x86_64, aarch64, process in _ON_ONE_PROCESS.values():
        body = _deny_unless_equal(_AT_ARG0, process) + _deny_unless_equal(_AT_ARG1, 0)
        body.append(_op(_RETURN, _ALLOW))
        program += [_op(_JUMP_EQ, (x86_64, aarch64)[column], 0, len(body)), *body]
    for pair in () if attributes else _ATTRIBUTES.values():
        if pair[column] is not None:
            program += [_op(_JUMP_EQ, pair[column] or 0, 0, 1), _op(_RETURN, _ERRNO)]
    # clone3 hides its flags behind a pointer; without it libc falls back to clone
    program += [_op(_JUMP_EQ, _CLONE3, 0, 1), _op(_RETURN, _ERRNO | _ENOSYS)]
    clone = [
        _op(_LOAD, _AT_ARG0),
        _op(_JUMP_SET, _NAMESPACE_FLAGS, 0, 1),
        _op(_RETURN, _ERRNO | _EPERM),
        _op(_RETURN, _ALLOW),
    ]
    program += [_op(_JUMP_EQ, _CLONE[column], 0, len(clone)), *clone]
    program += _deny_unless(_SOCKET[column], _AT_ARG0, 0xFFFFFFFF, families)
    # a datagram pair could be re-addressed to any socket file that is visible
    program += _deny_unless(_SOCKETPAIR[column], _AT_ARG1, 0xF, (_STREAM, _SEQPACKET))
    program.append(_op(_RETURN, _ALLOW))
    return b"".join(program)


def seccomp(*, network: bool = False, attributes: bool = True) -> None:
    """Refuse the system calls that reach outside: sockets, mounts, tracing, kernel interfaces.

    With ``network`` the internet and Unix families stay open, and VSOCK, NETLINK and
    PACKET stay shut. Without ``attributes`` changes of a file's mode, owner and times are
    ignored. Raises OSError on machines this filter has no numbers for.
    """
    machine = platform.machine()
    if machine not in _AUDIT_ARCH:
        raise OSError("no seccomp filter for %s" % machine)
    program = _filter_program(machine, network, attributes)
    buffer = ctypes.create_string_buffer(program, len(program))
    packed = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    no_new_privileges()
    argument = ctypes.create_string_buffer(packed, len(packed))
    _check(
        _libc.prctl(
            _PR_SET_SECCOMP,
            ctypes.c_ulong(2),
            ctypes.c_void_p(ctypes.addressof(argument)),
            ctypes.c_ulong(0),
            ctypes.c_ulong(0),
        ),
        "seccomp",
    )


# --- processes ------------------------------------------------------------------------------


def children(pid: int) -> List[int]:
    """Process ids of the direct children of ``pid``, from /proc; empty when it is gone."""
    found: List[int] = []
    try:
        threads = os.listdir("/proc/%d/task" % pid)
        for thread in threads:
            with open("/proc/%d/task/%s/children" % (pid, thread), "rb") as file:
                found.extend(int(word) for word in file.read().split())
        return found
    except FileNotFoundError:
        return found if os.path.exists("/proc/self/task/%d/children" % os.getpid()) else _scan(pid)
    except OSError:
        return found


def _scan(parent: int) -> List[int]:
    """Children by reading every process's stat: kernels without the children file."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and _parent_of(name) == parent:
            found.append(int(name))
    return found


def _parent_of(pid: str) -> int:
    try:
        with open("/proc/%s/stat" % pid, "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return -1


def is_alive(pid: int) -> bool:
    """Whether a process exists and is not merely waiting to be collected."""
    try:
        with open("/proc/%d/stat" % pid, "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
            # a main thread that has ended is a zombie while others of its process run on
            return fields[0] not in (b"Z", b"X") or int(fields[17]) > 1
    except (OSError, IndexError, ValueError):
        return False


def descendants(pid: int) -> List[int]:
    """All processes below ``pid`` at this moment."""
    found, queue = [], [pid]
    while queue:
        below = children(queue.pop())
        found += below
        queue += below
    return found

"""What a container really is, from the engine's own description of it.

What was asked for and what an engine made of it can differ (an old engine, a daemon's
defaults, arguments of the user's own), so isolation is reported from the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Attributes = dict[str, Any]


def audit(attributes: Attributes) -> tuple[list[str], list[str]]:
    """What a container enforces, and what it does not and why, from ``docker inspect``."""
    enforced, missing = [], []
    for name, check in _CHECKS.items():
        loose = check(attributes, attributes["HostConfig"])
        if loose:
            missing.append(f"{name} ({loose})")
        else:
            enforced.append(name)
    return enforced, missing


def _network(_: Attributes, host: Attributes) -> str:
    return "" if host["NetworkMode"] == "none" else f"network {host['NetworkMode']!r}"


def _files(attributes: Attributes, host: Attributes) -> str:
    mounts = [mount.get("Source") or mount["Destination"] for mount in attributes.get("Mounts", [])]
    if mounts:
        return f"mounted: {', '.join(sorted(mounts))}"
    if any(host.get(kind) for kind in ("Devices", "DeviceRequests", "DeviceCgroupRules")):
        return "devices are passed in"
    return "" if host["ReadonlyRootfs"] else "the root file system can be written"


def _scratch(_: Attributes, host: Attributes) -> str:
    unbounded = [
        path
        for path, options in (host.get("Tmpfs") or {}).items()
        if "size=" not in options or "nr_inodes=" not in options
    ]
    return f"no bound on {', '.join(unbounded)}" if unbounded else ""


def _user(attributes: Attributes, _: Attributes) -> str:
    user = attributes["Config"].get("User", "")
    if attributes["HostConfig"].get("GroupAdd"):
        return f"groups: {', '.join(attributes['HostConfig']['GroupAdd'])}"
    return f"user {user or 'root'!r}" if user.partition(":")[0] in ("", "0", "root") else ""


def _capabilities(_: Attributes, host: Attributes) -> str:
    if host.get("Privileged"):
        return "privileged"
    if host.get("CapAdd"):
        return f"added: {', '.join(host['CapAdd'])}"
    return "" if "ALL" in (host.get("CapDrop") or []) else "not dropped"


def _privileges(_: Attributes, host: Attributes) -> str:
    options = [option.replace("=", ":") for option in host.get("SecurityOpt") or []]
    return "" if {"no-new-privileges", "no-new-privileges:true"} & set(options) else "setuid programs work"


def _seccomp(_: Attributes, host: Attributes) -> str:
    options = [option.replace("=", ":") for option in host.get("SecurityOpt") or []]
    return "unconfined" if "seccomp:unconfined" in options else ""


def _spaces(_: Attributes, host: Attributes) -> str:
    shared = [f"{kind} {mode}" for kind in ("Pid", "UTS", "Userns") if (mode := host.get(f"{kind}Mode"))]
    if host.get("IpcMode") not in ("none", "private"):
        shared.append(f"IPC {host.get('IpcMode')}")
    return f"shared: {', '.join(shared)}" if shared else ""


def _processes(_: Attributes, host: Attributes) -> str:
    return "" if (host.get("PidsLimit") or 0) > 0 else "no limit"


def _memory(_: Attributes, host: Attributes) -> str:
    if not host.get("Memory"):
        return "no limit"
    if host.get("OomKillDisable"):
        return "nothing is killed when it is used up"
    if host.get("CgroupParent"):
        return f"below the cgroup {host['CgroupParent']}"
    return "" if host.get("MemorySwap") == host["Memory"] else "may swap"


def _cpu(_: Attributes, host: Attributes) -> str:
    return "" if host.get("NanoCpus") or host.get("CpuQuota") else "no limit"


def _open_files(_: Attributes, host: Attributes) -> str:
    return "" if any(limit["Name"] == "nofile" for limit in host.get("Ulimits") or []) else "no limit"


def _logs(_: Attributes, host: Attributes) -> str:
    kind = host.get("LogConfig", {}).get("Type")
    return "" if kind == "none" else f"what passes the stream is written to the engine's log ({kind})"


_CHECKS: dict[str, Callable[[Attributes, Attributes], str]] = {
    "network": _network,
    "files": _files,
    "scratch": _scratch,
    "user": _user,
    "capabilities": _capabilities,
    "privileges": _privileges,
    "seccomp": _seccomp,
    "name spaces": _spaces,
    "processes": _processes,
    "memory": _memory,
    "cpu": _cpu,
    "open files": _open_files,
    "logs": _logs,
}
"""Each default, and what loosens it, as a few words or none."""

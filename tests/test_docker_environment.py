"""Facts about one sandbox of DockerREPL: what it is, what it reports, what it refuses."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from docker_support import client, need_engine, second_engine

from rlm import RLM, open_repl
from rlm.errors import ConfigError, SandboxUnavailable
from rlm.repl import REPL
from rlm_docker import DockerREPL
from rlm_docker.engine import BUILT_IMAGE
from rlm_docker.errors import ContainerRefused, EnginePermission, EngineUnavailable, ImageMissing

MiB = 1 << 20
EVERYTHING = {
    "capabilities", "cpu", "files", "logs", "memory", "name spaces", "network", "open files", "privileges",
    "processes", "scratch", "seccomp", "system calls", "user",
}  # fmt: skip


@pytest.fixture(autouse=True)
def engine() -> None:
    """Every test here needs one."""
    need_engine()


@pytest.fixture(scope="module")
def repl() -> Iterator[REPL]:
    """One sandbox with the defaults."""
    need_engine()
    with open_repl("docker") as session:
        yield session


def attributes(session: REPL) -> dict[str, Any]:
    """What `docker inspect` says of a running session's container, now."""
    env = session._env
    assert isinstance(env, DockerREPL)
    assert env._container is not None
    found: dict[str, Any] = client().api.inspect_container(env._container.id)
    return found


def value(session: REPL, code: str) -> Any:
    """The value of a cell that must not fail."""
    result = session.execute(code, timeout=30)
    assert result.error is None, result.error
    return result.value


# --- the defaults ------------------------------------------------------------------


def test_docker_inspect_shows_every_hardening_default(repl: REPL) -> None:
    found = attributes(repl)
    host, config = found["HostConfig"], found["Config"]
    assert host["NetworkMode"] == "none"
    assert host["PortBindings"] in (None, {})
    assert host["ReadonlyRootfs"] is True
    assert found["Mounts"] == []
    assert host["CapDrop"] == ["ALL"]
    assert not host["CapAdd"]
    assert host["Privileged"] is False
    assert "no-new-privileges" in host["SecurityOpt"]
    assert not any("unconfined" in option for option in host["SecurityOpt"])
    assert config["User"] == "65534:65534"
    assert host["PidsLimit"] == 256
    assert host["Memory"] == host["MemorySwap"] == 2048 * MiB
    assert host["NanoCpus"] == 1_000_000_000
    limits = {limit["Name"]: (limit["Soft"], limit["Hard"]) for limit in host["Ulimits"]}
    assert limits == {"nofile": (1024, 1024), "core": (0, 0)}
    assert set(host["Tmpfs"]) == {"/tmp", "/dev/shm"}
    for options in host["Tmpfs"].values():
        assert {"size=512m", "nr_inodes=65536", "nosuid", "nodev"} <= set(options.split(","))
    assert host["LogConfig"]["Type"] == "none"
    assert host["IpcMode"] == "none"
    assert host["PidMode"] == ""
    assert host["AutoRemove"] is False
    assert not host.get("Init")
    assert not host["Devices"]


def test_the_labels_say_whose_it_is_and_until_when(repl: REPL) -> None:
    labels = attributes(repl)["Config"]["Labels"]
    names = ("sandbox", "run", "session", "host", "pid", "pid.started", "created", "ttl")
    assert {f"rlm.{name}" for name in names} <= set(labels)


def test_everything_is_enforced_and_nothing_is_missing(repl: REPL) -> None:
    assert repl.isolation.level == "docker"
    assert set(repl.isolation.enforced) == EVERYTHING
    assert repl.isolation.missing == ()


def test_no_secret_is_among_what_the_engine_knows(repl: REPL) -> None:
    env = repl._env
    assert isinstance(env, DockerREPL)
    assert env.session is not None
    secret = env.session.token.partition(":")[2]
    assert secret not in json.dumps(attributes(repl))


def test_the_supervisor_is_process_1_and_out_of_reach(repl: REPL) -> None:
    code = """
import os, signal
stopped = []
for act in ("os.kill(1, signal.SIGKILL)", "os.kill(1, signal.SIGSTOP)", "os.kill(1, signal.SIGTERM)",
            "os.kill(1, signal.SIGINT)", "open('/proc/1/environ').read()", "open('/proc/1/mem', 'rb')",
            "os.listdir('/proc/1/fd')"):
    try: exec(act)
    except OSError: stopped.append(act)
(len(stopped), os.getppid())"""
    result = repl.execute(code, timeout=30)
    assert result.error is None
    stopped, parent = eval(result.echo)
    assert stopped >= 3
    assert parent == 1
    assert value(repl, "1 + 1") == 2


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"network": "bridge"}, "network (network 'bridge')"),
        ({"volumes": {"/usr/share": {"bind": "/data", "mode": "ro"}}}, "files (mounted: /usr/share)"),
        ({"user": "root"}, "user (user 'root')"),
        ({"docker_kwargs": {"cap_add": ["NET_RAW"]}}, "capabilities (added: "),
        ({"docker_kwargs": {"cap_drop": []}}, "capabilities (not dropped)"),
        ({"docker_kwargs": {"privileged": True}}, "capabilities (privileged)"),
        ({"docker_kwargs": {"read_only": False}}, "files (the root file system can be written)"),
        (
            {"docker_kwargs": {"security_opt": ["no-new-privileges", "seccomp=unconfined"]}},
            "seccomp (unconfined)",
        ),
        ({"docker_kwargs": {"security_opt": []}}, "privileges (setuid programs work)"),
        ({"docker_kwargs": {"pid_mode": "host"}}, "name spaces (shared: Pid host)"),
        ({"docker_kwargs": {"ipc_mode": "shareable"}}, "name spaces (shared: IPC shareable)"),
        ({"docker_kwargs": {"group_add": ["0"]}}, "user (groups: 0)"),
        ({"docker_kwargs": {"device_cgroup_rules": ["c 1:3 r"]}}, "files (devices"),
        ({"docker_kwargs": {"oom_kill_disable": True}}, "memory (nothing is killed"),
        ({"docker_kwargs": {"pids_limit": None}}, "processes (no limit)"),
        ({"docker_kwargs": {"mem_limit": None, "memswap_limit": None}}, "memory (no limit)"),
        ({"docker_kwargs": {"memswap_limit": -1}}, "memory (may swap)"),
        ({"docker_kwargs": {"nano_cpus": None}}, "cpu (no limit)"),
        ({"docker_kwargs": {"ulimits": []}}, "open files (no limit)"),
        ({"docker_kwargs": {"tmpfs": {"/tmp": "size=9m"}}}, "scratch (no bound on /tmp)"),
        ({"docker_kwargs": {"log_config": {"type": "json-file"}}}, "logs (what passes the stream"),
    ],
)
def test_each_loosening_is_named(settings: dict[str, Any], what: str) -> None:
    with open_repl("docker", **settings) as session:
        assert len(session.isolation.missing) == 1
        assert session.isolation.missing[0].startswith(what)
        assert set(session.isolation.enforced) == EVERYTHING - {what.partition(" (")[0]}


def test_a_loosening_stands_in_the_trace() -> None:
    rlm = RLM(
        backend="scripted",
        backend_kwargs={"script": ["```repl\nFINAL(1)\n```"]},
        environment="docker",
        environment_kwargs={"network": "bridge"},
    )
    trace = rlm.completion("context", "question").trace
    missing = [event.missing for event in trace if event.__class__.__name__ == "SandboxStarted"]
    assert missing == [["network (network 'bridge')"]]


# --- settings ------------------------------------------------------------------


def test_variables_that_are_given_arrive_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "canary")
    with open_repl("docker", env={"GIVEN": "yes"}) as session:
        names = set(value(session, "import os; sorted(os.environ)"))
        assert value(session, "os.environ['GIVEN']") == "yes"
    assert "OPENAI_API_KEY" not in names
    assert {"HOME", "PATH", "TMPDIR"} <= names


def test_a_volume_is_where_it_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("seen")
    tmp_path.chmod(0o755)
    with open_repl("docker", volumes={str(tmp_path): {"bind": "/data", "mode": "ro"}}) as session:
        assert value(session, "open('/data/data.txt').read()") == "seen"
        error = session.execute("open('/data/other', 'w')", timeout=30).error
    assert error is not None
    assert error.type in ("OSError", "PermissionError")


def test_processes_are_limited() -> None:
    with open_repl("docker", pids=20) as session:
        error = session.execute(
            "import os, time\nwhile True:\n    if not os.fork(): time.sleep(60)", timeout=5
        )
        assert error.error is not None
        assert error.error.type in ("BlockingIOError", "CellTimeout")
        assert value(session, "1 + 1") == 2


def test_memory_is_limited_for_all_processes_together() -> None:
    with open_repl("docker", memory=200) as session:
        session.execute("kept = 1", timeout=30)
        hog = """
import os, time
for _ in range(8):
    if not os.fork():
        x = b'x' * (60 << 20)
        time.sleep(60)
os.wait()"""
        result = session.execute(hog, timeout=20)
        assert value(session, "kept") == 1
        assert result.error is not None or "9" in result.echo


def test_a_cell_out_of_memory_is_told_so_and_rolled_back() -> None:
    with open_repl("docker", memory=200) as session:
        session.execute("kept = 1", timeout=30)
        error = session.execute("x = []\nwhile True: x.append(bytearray(1 << 20))", timeout=30).error
        assert error is not None
        assert error.kind == "crash"
        assert "memory" in error.message
        assert value(session, "kept") == 1


@pytest.mark.parametrize(
    "code",
    [
        "open('/tmp/big', 'wb').write(b'x' * (64 << 20))",
        "import os\nfor i in range(10_000): open(f'/tmp/{i}', 'w').close()",
        "open('/dev/shm/big', 'wb').write(b'x' * (64 << 20))",
    ],
    ids=["bytes", "files", "shared memory"],
)
def test_scratch_is_limited(code: str) -> None:
    with open_repl("docker", memory=400, scratch=16, files=1000) as session:
        error = session.execute(code, timeout=30).error
        assert error is not None
        assert (error.type, "No space left" in error.message) == ("OSError", True)


@pytest.mark.parametrize("path", ["/etc/x", "/x", "/usr/lib/x", "/root/x", "/var/x", "/dev/x"])
def test_nothing_else_can_be_written(repl: REPL, path: str) -> None:
    error = repl.execute(f"open({path!r}, 'w')", timeout=30).error
    assert error is not None
    assert error.type in ("OSError", "PermissionError")


@pytest.mark.parametrize(
    "settings",
    [
        {"pull": "sometimes"},
        {"memory": 0},
        {"cpus": -1},
        {"files": 0},
        {"time_to_live": 0},
        {"imagine": "x"},
        {"docker_kwargs": {"tty": True}},
        {"docker_kwargs": {"labels": ["x"]}},
    ],
    ids=str,
)
def test_a_setting_that_makes_no_sense_is_a_config_error(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))), open_repl("docker", **settings):
        pass


# --- what cannot start ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"image": "no-such-image:1", "pull": "never"}, ImageMissing, "No such image"),
        ({"python": "python9"}, ContainerRefused, "it needs a python3"),
        ({"python": "/bin/true"}, ContainerRefused, "ended without a word"),
        ({"runtime": "no-such-runtime"}, ContainerRefused, "no-such-runtime"),
        ({"network": "no-such-network"}, ContainerRefused, "no-such-network"),
        ({"memory": 6}, ContainerRefused, "memory limit is too small"),
        ({"docker_kwargs": {"no_such": 1}}, ConfigError, "docker_kwargs.*no_such"),
        ({"docker_host": "tcp://127.0.0.1:9"}, EngineUnavailable, "tcp://127.0.0.1:9.*start it"),
        ({"docker_host": "unix:///no/such.sock"}, EngineUnavailable, "no/such.sock.*environment='local'"),
    ],
    ids=lambda part: str(part) if isinstance(part, dict) else "",
)
def test_what_cannot_start_says_why_and_leaves_nothing(
    settings: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=f"(?s){says}"), open_repl("docker", **settings):
        pass
    assert issubclass(error, SandboxUnavailable | ConfigError)


def test_an_image_that_cannot_be_pulled_is_missing_and_says_what_would_do(tmp_path: Path) -> None:
    with (
        pytest.raises(ImageMissing, match=r"(?s)no-such-image:1.*could not be pulled.*rlm docker build"),
        open_repl("docker", image="no-such-image:1"),
    ):
        pass


def test_without_the_docker_command_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(EngineUnavailable, match="docker command"), open_repl("docker"):
        pass


def test_an_engine_that_is_not_this_users_says_so(tmp_path: Path) -> None:
    import os
    import subprocess
    import sys

    if os.geteuid() != 0:
        pytest.skip("becoming another user takes root")
    # a socket that only root may use, asked by somebody else
    path = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        path.chmod(0o600)
        for folder in (tmp_path, *tmp_path.parents):
            if folder != Path("/") and folder.stat().st_uid == 0 and folder.stat().st_mode & 0o005 != 0o005:
                folder.chmod(folder.stat().st_mode | 0o005)
        script = (
            "import os; from rlm_docker.engine import connect, explained\n"
            f"os.environ['DOCKER_HOST'] = 'unix://{path}'\nimport docker, requests\nos.setuid(65534)\n"
            "try: connect()\nexcept Exception as error: print(type(explained(error, 'connect')).__name__)"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == EnginePermission.__name__, done.stderr


# --- another engine ------------------------------------------------------------------


def test_another_engine_over_tcp_and_by_docker_host(monkeypatch: pytest.MonkeyPatch) -> None:
    with second_engine() as other, other.port() as address:
        monkeypatch.setenv("DOCKER_HOST", address)
        with pytest.raises(ImageMissing, match=r"(?s)rlm docker build.*image"), open_repl("docker"):
            pass  # neither default is there, and no registry: both ways out are named
        other.load(BUILT_IMAGE)
        with open_repl("docker") as session:
            assert value(session, "'over tcp'") == "over tcp"
            session.add_context("x" * 3_000_000)
            assert value(session, "len(context)") == 3_000_000
            assert b"rlm-" in other.docker("ps", "--format", "{{.Names}}").stdout
        monkeypatch.delenv("DOCKER_HOST")
        with open_repl("docker", docker_host=other.host) as session:
            assert value(session, "'by its socket'") == "by its socket"

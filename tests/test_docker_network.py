"""Facts about the network of a container: none by default, and what is asked for by name."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator

import pytest

os.environ["TESTCONTAINERS_RYUK_DISABLED"] = "true"  # read at import: no image of a reaper is needed

from docker_support import need_engine
from testcontainers.core.container import DockerContainer
from testcontainers.core.network import Network
from testcontainers.core.wait_strategies import LogMessageWaitStrategy

from rlm import open_repl
from rlm_docker.engine import BUILT_IMAGE

SERVE = """
import http.server
server = http.server.HTTPServer(("", 8000), http.server.SimpleHTTPRequestHandler)
print("READY", flush=True)
server.serve_forever()"""


@pytest.fixture(scope="module")
def neighbour() -> Iterator[tuple[str, str]]:
    """A service on a network of its own: the network's name, and the service's."""
    need_engine()
    with Network() as network:
        service = (
            DockerContainer(BUILT_IMAGE)
            .with_command(["python3", "-u", "-c", SERVE])
            .with_network(network)
            .with_network_aliases("service")
            .waiting_for(LogMessageWaitStrategy("READY"))
        )
        with service:
            yield network.name, "http://service:8000/"


def fetch(url: str) -> str:
    """A cell that gets a page."""
    return f"import urllib.request; urllib.request.urlopen({url!r}, timeout=5).status"


def test_a_sandbox_on_the_network_reaches_its_neighbour(neighbour: tuple[str, str]) -> None:
    network, url = neighbour
    with open_repl("docker", network=network) as session:
        result = session.execute(fetch(url), timeout=30)
        assert result.value == 200, result.error
        assert session.isolation.missing == (f"network (network {network!r})",)


def test_a_default_sandbox_reaches_nobody(neighbour: tuple[str, str]) -> None:
    with open_repl("docker") as session:
        error = session.execute(fetch(neighbour[1]), timeout=30).error
        assert error is not None
        assert "URLError" in error.type


@pytest.mark.parametrize("address", ["169.254.169.254", "8.8.8.8", "172.17.0.1", "10.0.0.1"])
def test_no_address_is_reachable_by_default(address: str) -> None:
    need_engine()
    code = f"import socket; socket.create_connection(({address!r}, 80), timeout=3)"
    with open_repl("docker") as session:
        error = session.execute(code, timeout=30).error
        assert error is not None
        assert error.type == "OSError"
        assert "unreachable" in error.message


def test_a_server_of_the_host_is_out_of_reach_on_every_address() -> None:
    need_engine()
    reached = threading.Event()
    with socket.create_server(("0.0.0.0", 0)) as server:
        port = server.getsockname()[1]

        def accept() -> None:
            try:
                server.accept()
                reached.set()
            except OSError:
                pass  # closed: nobody came

        threading.Thread(target=accept, daemon=True).start()
        addresses = {
            "127.0.0.1",
            "172.17.0.1",
            *(a[4][0] for a in socket.getaddrinfo(socket.gethostname(), None)),
        }
        with open_repl("docker") as session:
            for address in sorted(str(a) for a in addresses):
                code = f"import socket; socket.create_connection(({address!r}, {port}), timeout=2)"
                assert session.execute(code, timeout=30).error is not None
        assert not reached.is_set()


@pytest.mark.parametrize("family", ["AF_VSOCK", "AF_NETLINK", "AF_PACKET"])
def test_sockets_that_older_engines_let_through_are_refused(family: str) -> None:
    need_engine()
    with open_repl("docker") as session:
        code = f"import socket; socket.socket(socket.{family}, socket.SOCK_DGRAM)"
        error = session.execute(code, timeout=30).error
        assert error is not None
        assert error.type == "PermissionError"


def test_a_server_inside_reaches_itself() -> None:
    need_engine()
    code = """
import socket, threading
server = socket.create_server(("127.0.0.1", 0))
threading.Thread(target=lambda: server.accept()[0].sendall(b"hello")).start()
socket.create_connection(server.getsockname()).recv(9).decode()"""
    with open_repl("docker") as session:
        assert session.execute(code, timeout=30).value == "hello"

"""DockerREPL keeps what every environment promises."""

from __future__ import annotations

import pytest
from docker_support import need_engine

from rlm_docker import DockerREPL
from rlm_docker.suite import DockerSuite


class TestDocker(DockerSuite):
    """The conformance suite, in containers of a real engine."""

    @pytest.fixture
    def environment(self) -> DockerREPL:
        need_engine()
        return DockerREPL()

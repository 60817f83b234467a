"""LocalREPL keeps what every environment promises, behind each of its walls."""

from __future__ import annotations

import pytest

from rlm_local import LocalREPL
from rlm_local.suite import LocalSuite


class TestLocal(LocalSuite):
    """The conformance suite, behind each wall in turn."""

    @pytest.fixture
    def environment(self, wall: str) -> LocalREPL:
        return LocalREPL(wall=wall)  # type: ignore[arg-type]

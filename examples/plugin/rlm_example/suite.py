"""What ProcessREPL promises, as tests: all that any environment does, but for any wall."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from rlm.environment import BaseEnv
from rlm.testing import EnvironmentSuite

from .environment import ProcessREPL


class ProcessSuite(EnvironmentSuite):
    """Here for `rlm environments check example`, which looks for it by ProcessREPL.suite."""

    # "files" too would be a claim that nobody else sees a cell's folder, and whoever is the user does
    capabilities = EnvironmentSuite.capabilities - {"isolation", "network-none", "files"}
    known_failures: ClassVar[Mapping[str, str]] = {
        "test_a_key_of_the_host_is_in_no_environment_that_a_cell_can_read": "a user's cells read /proc",
        "test_a_context_of_a_type_the_sandbox_lacks_is_a_config_error": "it is the host's own Python",
    }
    where = "a process of this machine (Linux)"
    between = "nothing"
    first_cell = "about 0.1 s"

    def kill(self, env: BaseEnv) -> None:
        """What no sandbox survives, for the tests of what its session loses by that."""
        assert isinstance(env, ProcessREPL)
        assert env._process is not None
        env._process.kill()

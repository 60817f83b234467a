"""ProcessREPL keeps what every environment promises, but for what its suite does not claim."""

import pytest
from rlm_example.environment import ProcessREPL
from rlm_example.suite import ProcessSuite

from rlm import open_repl
from rlm.errors import SandboxUnavailable


class TestProcess(ProcessSuite):
    @pytest.fixture
    def environment(self):
        return ProcessREPL()


def test_it_says_that_it_is_no_wall():
    with open_repl(ProcessREPL()) as repl:
        assert (repl.isolation.level, repl.isolation.enforced) == ("none", ())


def test_a_python_that_is_none_is_told():
    for python in ("/bin/true", "/no/such/python"):
        with pytest.raises(SandboxUnavailable, match=python), open_repl(ProcessREPL(python=python)):
            pass

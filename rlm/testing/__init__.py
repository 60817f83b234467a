"""What a plugin's package tests itself with: needs ``pip install rlm[testing]``.

`EnvironmentSuite` is everything that an environment promises, `ClientSuite` everything that a
client does, as tests that a package inherits. See docs/conformance.md.
"""

# ruff: noqa: E402 (what is imported below has its assertions rewritten, when that was said before)

from __future__ import annotations

import pytest

for _module in (
    "contract", "calls", "robustness", "isolation", "hygiene", "protocol", "runs", "tools", "conversations",
    "snapshots", "clients",
):  # fmt: skip
    pytest.register_assert_rewrite(f"{__name__}.{_module}")

from .calls import Calls
from .clients import ClientSuite
from .contract import Contract
from .conversations import Conversations
from .hygiene import Hygiene
from .isolation import IsolationLevel
from .protocol import Protocol
from .robustness import Robustness
from .runs import Runs
from .sessions import Cells, Sandbox
from .snapshots import Snapshots
from .suite import CAPABILITIES, CONTRACT_VERSION, Suite, requires
from .tools import HostTools


class EnvironmentSuite(
    Contract, Calls, Robustness, IsolationLevel, Hygiene, Protocol, Runs, HostTools, Conversations, Snapshots
):
    """All levels. Inherit it as ``TestSomething``, and define the fixture ``environment``."""


__all__ = [
    "CAPABILITIES",
    "CONTRACT_VERSION",
    "Calls",
    "Cells",
    "ClientSuite",
    "Contract",
    "Conversations",
    "EnvironmentSuite",
    "HostTools",
    "Hygiene",
    "IsolationLevel",
    "Protocol",
    "Robustness",
    "Runs",
    "Sandbox",
    "Snapshots",
    "Suite",
    "requires",
]

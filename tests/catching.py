"""How a suite is seen to notice a plugin that breaks a promise."""

from __future__ import annotations

from typing import Any

from rlm.testing.base import PluginSuite
from rlm.testing.check import run


def assert_caught(suite: type[PluginSuite], subject: Any, test: str, because: str) -> None:
    """The test fails of whatever breaks its promise, and for that reason."""
    results = run(suite, subject, names=[test])
    failed = [result for result in results if result.outcome == "failed"]
    assert failed, [f"{result.outcome} {result.reason}" for result in results]
    assert any(because in f"{result.name}: {result.reason}" for result in failed), failed

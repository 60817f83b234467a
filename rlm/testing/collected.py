"""Where pytest finds the suite of the environment that `rlm.testing.check` checks."""

from __future__ import annotations

TestEnvironment: type | None = None
"""Set before each check, and None after it."""

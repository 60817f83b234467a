"""Where pytest finds the suite that `rlm.testing.check` runs."""

from __future__ import annotations

TestPlugin: type | None = None
"""Set before each check, and None after it."""

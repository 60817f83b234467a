"""Runs the suite for whoever has an environment installed, and reports what came of it."""

from __future__ import annotations

import dataclasses
import importlib
import platform
import tempfile
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, Literal

import pytest

from .. import __version__, plugins
from ..environment import BaseEnv
from ..errors import ConfigError
from ..pool import environment_factory
from ..repl import open_repl
from . import collected
from .base import PluginSuite
from .suite import CONTRACT_VERSION, Suite

LEVELS = ("contract", "robustness", "isolation", "hygiene", "protocol", "runs")

Outcome = Literal["passed", "failed", "skipped", "known failure"]


@dataclasses.dataclass
class TestResult:
    """What came of one test. ``reason`` is why it was skipped or is known to fail, or how it failed."""

    __test__ = False

    name: str
    level: str
    outcome: Outcome = "passed"
    seconds: float = 0.0
    reason: str = ""


def run(
    suite: type[PluginSuite],
    subject: Any,
    *,
    levels: Collection[str] = (),
    names: Collection[str] = (),
    on_result: Callable[[TestResult], None] = lambda result: None,
) -> list[TestResult]:
    """Run a suite in this process, its one fixture giving ``subject``.

    Without ``levels`` and ``names``: all of it.
    """

    def given(self: PluginSuite) -> Any:
        return subject

    collector = _Collector(levels, names, on_result)
    collected.TestPlugin = type("TestPlugin", (suite,), {suite.subject: pytest.fixture(given)})
    try:
        with tempfile.TemporaryDirectory(prefix="rlm-check-") as folder:
            configuration = Path(folder, "pytest.ini")
            configuration.write_text("[pytest]\n")
            arguments = [
                str(collected.__file__), "-c", str(configuration), "--rootdir", folder,
                "--noconftest", "--import-mode=append", "-p", "no:asyncio",
                "-p", "no:terminal", "-p", "no:cacheprovider", "-p", "no:faulthandler",
            ]  # fmt: skip
            code = pytest.main(arguments, plugins=[collector])
    finally:
        collected.TestPlugin = None
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise ConfigError(f"the suite did not run: {'; '.join(collector.errors) or code}")
    return list(collector.results.values())


class _Collector:
    """A pytest plugin that selects tests and notes what comes of them."""

    def __init__(
        self, levels: Collection[str], names: Collection[str], on_result: Callable[[TestResult], None]
    ) -> None:
        self.results: dict[str, TestResult] = {}
        self.errors: list[str] = []
        self._levels = levels
        self._names = names
        self._on_result = on_result

    def pytest_pycollect_makeitem(self, collector: pytest.Collector, name: str) -> list[pytest.Item] | None:
        """Nothing is made of tests with other names: of a suite's hundreds that takes longer than a test."""
        asked = {chosen.partition("[")[0] for chosen in self._names} or {name}
        is_test = isinstance(collector, pytest.Class) and name.startswith("test")
        return [] if is_test and name not in asked else None

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        kept = []
        for item in items:
            name = getattr(item, "originalname", item.name)
            level = _level(item.cls, name) if isinstance(item, pytest.Function) else "own"
            chosen = not self._names or name in self._names or item.name in self._names
            if chosen and (not self._levels or level in self._levels):
                self.results[item.nodeid] = TestResult(item.name, level)
                kept.append(item)
        items[:] = kept

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.errors.append(str(report.longrepr))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        result = self.results[report.nodeid]
        result.seconds = round(result.seconds + report.duration, 3)
        if report.failed and result.outcome != "failed":  # what fails afterwards often does because of that
            result.outcome, result.reason = "failed", _last_line(report)
        elif report.skipped and hasattr(report, "wasxfail"):
            result.outcome, result.reason = "known failure", report.wasxfail.removeprefix("reason: ")
        elif report.skipped:
            result.outcome, result.reason = "skipped", _skip_reason(report)
        if report.when == "teardown":
            self._on_result(result)


def _level(cls: type, name: str) -> str:
    """The level of the class in which a test stands."""
    home = next((base for base in cls.__mro__ if name in vars(base)), cls)
    return str(vars(home).get("level", "own"))


def _skip_reason(report: pytest.TestReport) -> str:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return reason.removeprefix("Skipped: ")


def _last_line(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(crash.message if crash else report.longrepr).strip()
    return f"{report.when}: " * (report.when != "call") + "\n".join(text.splitlines()[:8])[:1000]


# --- an installed environment --------------------------------------------------------------------


def check(
    name: str,
    settings: dict[str, Any],
    *,
    levels: Collection[str] = (),
    on_result: Callable[[TestResult], None] = lambda result: None,
) -> dict[str, Any]:
    """Run its suite against an installed environment, and report.

    Raises ConfigError, PluginError or SandboxError when there is nothing to check.
    """
    unknown = [level for level in levels if level not in LEVELS]
    if unknown:
        raise ConfigError(f"there is no level {unknown[0]!r}; there are {', '.join(LEVELS)}")
    pattern: BaseEnv = environment_factory(name, settings)()
    suite = load_suite(pattern)
    with open_repl(pattern) as repl:  # one that does not start at all is one error, not hundreds
        isolation = repl.isolation
    results = run(suite, pattern, levels=levels, on_result=on_result)
    (plugin,) = (found for found in plugins.installed("rlm.environments") if found.name == name)
    return {
        "contract": CONTRACT_VERSION,
        "environment": name,
        "settings": settings,
        "rlm": __version__,
        "plugin": {"distribution": plugin.distribution, "version": plugin.version, "class": plugin.target},
        "platform": " ".join([platform.system(), *_kernel(), platform.machine()]),
        "python": platform.python_version(),
        "isolation": dataclasses.asdict(isolation),
        "about": {"where": suite.where, "between": suite.between, "first_cell": suite.first_cell},
        "capabilities": sorted(suite.capabilities),
        **summary(results),
        "tests": [dataclasses.asdict(result) for result in results],
    }


def _kernel() -> list[str]:
    return [".".join(platform.release().split(".")[:2])]


def load_suite(environment: BaseEnv) -> type[Suite]:
    """The suite that an environment names."""
    where = getattr(environment, "suite", BaseEnv.suite)
    module, _, name = where.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"the suite {where!r} of this environment cannot be had: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Suite)):
        raise ConfigError(f"{where!r} is no suite")
    return found


def summary(results: Iterable[TestResult]) -> dict[str, Any]:
    """Counts by level; skipped tests by reason, failed and known to fail ones by name."""
    levels: dict[str, dict[str, int]] = {}
    skipped: dict[str, list[str]] = {}
    named: dict[str, dict[str, str]] = {"failed": {}, "known failure": {}}
    for result in results:
        counts = levels.setdefault(result.level, {"passed": 0, "failed": 0, "skipped": 0, "known failure": 0})
        counts[result.outcome] += 1
        if result.outcome == "skipped":
            skipped.setdefault(result.reason, []).append(result.name)
        elif result.outcome != "passed":
            named[result.outcome][result.name] = result.reason
    order = sorted(levels, key=lambda level: [*LEVELS, level].index(level))
    return {
        "levels": {level: levels[level] for level in order},
        "skipped": skipped,
        "failed": named["failed"],
        "known_failures": named["known failure"],
    }

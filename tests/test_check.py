"""Facts about checking an installed environment, the report, and the table that is made of reports."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import broken_environments
import pytest
from typer.testing import CliRunner

from rlm import plugins
from rlm.cli import app
from rlm.errors import ConfigError
from rlm.testing import CAPABILITIES, CONTRACT_VERSION, EnvironmentSuite, check, table
from rlm_local import LocalREPL
from rlm_local.suite import LocalSuite

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs" / "conformance.md").read_text("utf-8")


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small environments, as if a package had brought them."""
    targets = {"passing": "broken_environments:Passing", "failing": "broken_environments:Failing"}
    points = [
        importlib.metadata.EntryPoint(name, target, "rlm.environments") for name, target in targets.items()
    ]
    found = [plugins.Plugin(point.name, point.value, "someones", "3.2", point) for point in points]
    monkeypatch.setattr(plugins, "installed", lambda group: found)


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["environments", "check", *arguments], env={"COLUMNS": "200"})


# --- on the command line --------------------------------------------------------------------------


def test_an_environment_that_passes_is_exit_code_0_and_a_table() -> None:
    done = invoke("passing")
    assert done.exit_code == 0, done.output
    assert re.search(r"contract\W+1\W+0\W+1\W+1", done.stdout)
    assert "known failures: test_known: not yet: issue 5" in done.stdout
    assert "skipped 1: not claimed: processes" in done.stdout


def test_an_environment_that_fails_is_exit_code_1_and_says_where() -> None:
    done = invoke("failing")
    assert done.exit_code == 1
    assert "failed: test_fails: " in done.stdout


def test_a_level_can_be_chosen(tmp_path: Path) -> None:
    invoke("failing", "--level", "contract", "--json", str(tmp_path / "r.json"))
    assert list(json.loads((tmp_path / "r.json").read_text())["levels"]) == ["contract"]


def test_the_report_says_what_was_checked_and_what_came_of_each_test(tmp_path: Path) -> None:
    invoke("failing", "--json", str(tmp_path / "r.json"))
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["contract"], report["environment"]) == (CONTRACT_VERSION, "failing")
    assert report["plugin"] == {
        "distribution": "someones",
        "version": "3.2",
        "class": "broken_environments:Failing",
    }
    assert {"rlm", "platform", "python", "isolation", "capabilities"} <= set(report)
    outcomes = {test["name"]: (test["outcome"], test["level"]) for test in report["tests"]}
    assert outcomes == {
        "test_passes": ("passed", "contract"),
        "test_is_skipped": ("skipped", "contract"),
        "test_known": ("known failure", "contract"),
        "test_fails": ("failed", "robustness"),
        "test_coroutines_run_on_the_cores_loop[1]": ("passed", "robustness"),
        "test_coroutines_run_on_the_cores_loop[2]": ("passed", "robustness"),
    }
    assert report["levels"]["robustness"] == {"passed": 2, "failed": 1, "skipped": 0, "known failure": 0}
    assert report["skipped"] == {"not claimed: processes": ["test_is_skipped"]}
    assert all(test["seconds"] >= 0 for test in report["tests"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nobody"], "no environment is called 'nobody'"),
        (["passing", "--level", "quality"], "there is no level 'quality'"),
        (["passing", "--setting", "colour=red"], "does not take these settings"),
        (["passing", "--setting", "novalue"], "not of the form NAME=VALUE"),
    ],
)
def test_what_cannot_be_checked_is_one_clear_error(arguments: list[str], message: str) -> None:
    done = invoke(*arguments)
    assert done.exit_code != 0
    assert message in f"{done.exception} {done.output}"


def test_without_pytest_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("rlm.testing")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pytest", None)
    done = invoke("passing")
    assert isinstance(done.exception, ConfigError)
    assert "pip install 'rlm[testing]'" in str(done.exception)


def test_a_suite_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for where in ("nowhere:Suite", "rlm.testing:Nothing", "rlm.testing:CAPABILITIES"):
        monkeypatch.setattr(LocalREPL, "suite", where)
        with pytest.raises(ConfigError, match="suite"):
            check.load_suite(LocalREPL())


# --- what a suite declares ------------------------------------------------------------------------


def test_a_capability_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(TypeError, match="no capability is called teleportation"):

        class Wrong(EnvironmentSuite):
            capabilities = EnvironmentSuite.capabilities | {"teleportation"}


def test_a_known_failure_that_is_no_test_is_an_error() -> None:
    with pytest.raises(TypeError, match="test_of_yore"):

        class Stale(EnvironmentSuite):
            known_failures = {"test_of_yore[5]": "long mended"}  # noqa: RUF012


def test_a_known_failure_that_passes_fails() -> None:
    class Hopeful(LocalSuite):
        known_failures = {"test_names_live_from_cell_to_cell": "it used to fail"}  # noqa: RUF012

    (result,) = check.run(Hopeful, LocalREPL(), names=["test_names_live_from_cell_to_cell"])
    assert (result.outcome, "it used to fail" in result.reason) == ("failed", True)


def test_a_known_failure_may_be_one_case_of_a_test() -> None:
    class Particular(LocalSuite):
        known_failures = {"test_a_repr_that_returns_no_str_is_a_type_error[return 5]": "why"}  # noqa: RUF012

    results = check.run(Particular, LocalREPL(), names=["test_a_repr_that_returns_no_str_is_a_type_error"])
    assert sorted(result.outcome for result in results) == ["failed", "passed"]


def test_cases_share_a_session_until_one_fails_or_another_tests_turn_comes() -> None:
    broken_environments.Noted.sessions.clear()
    results = check.run(broken_environments.TableSuite, broken_environments.Noted())
    assert [result.outcome for result in results] == [
        "passed", "passed", "failed", "known failure", "passed", "passed", "passed", "passed",
    ]  # fmt: skip
    assert broken_environments.Noted.sessions == [
        ["known"], ["first", "second", "fails"], ["after it", "last"], ["first"], ["second"],
    ]  # fmt: skip


def test_every_test_of_the_suite_belongs_to_a_level_and_is_no_coroutine() -> None:
    tests = [name for name in dir(EnvironmentSuite) if name.startswith("test")]
    assert len(tests) > 200
    for name in tests:
        home = next(base for base in EnvironmentSuite.__mro__ if name in vars(base))
        assert vars(home)["level"] in check.LEVELS
        assert getattr(EnvironmentSuite, name).__code__.co_flags & 0x80 == 0


# --- the documents --------------------------------------------------------------------------------


def test_the_readmes_table_is_what_the_reports_say() -> None:
    assert table.rewrite(ROOT) == (ROOT / "README.md").read_text("utf-8")


def test_the_reports_are_of_this_version_of_the_contract() -> None:
    for path in (ROOT / "docs" / "conformance").glob("*.json"):
        assert json.loads(path.read_text("utf-8"))["contract"] == CONTRACT_VERSION


def test_a_report_is_kept_without_its_single_tests_and_shown_in_the_table(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    counts = {"passed": 7, "failed": 1, "skipped": 2, "known failure": 0}
    report = {
        "environment": "mine",
        "about": {"where": "far away", "between": "an ocean", "first_cell": "weeks"},
        "levels": dict.fromkeys(check.LEVELS, counts),
        "tests": [{"name": "test"}],
    }
    (tmp_path / "r.json").write_text(json.dumps(report))
    table.main([str(tmp_path / "r.json")], tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| `mine` | far away | an ocean | weeks | 7 passed, 1 failed, 2 skipped |" in text
    assert "old" not in text and text.startswith("before\n") and text.endswith("after\n")
    assert "tests" not in json.loads((tmp_path / "docs" / "conformance" / "mine.json").read_text())


def test_a_report_of_some_levels_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="every level"):
        table.keep({"environment": "mine", "levels": {"contract": {}}}, tmp_path)


def test_the_guide_describes_every_capability() -> None:
    for name, meaning in CAPABILITIES.items():
        assert f"| `{name}` | {meaning} |" in GUIDE


def test_the_guides_sample_works_in_a_repository_without_any_configuration(tmp_path: Path) -> None:
    sample = re.search(r"^```python\n(import pytest.*?)^```", GUIDE, re.M | re.S)
    assert sample
    (tmp_path / "test_mine.py").write_text(sample.group(1))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:asyncio", "-rs"]
    names = "names_live or llm_query_returns or awaiting_works_after_a_rollback"
    done = subprocess.run(
        [*command, "-k", names], cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    assert "2 passed, 1 skipped" in done.stdout, done.stdout + done.stderr
    assert "not claimed: rollback" in done.stdout

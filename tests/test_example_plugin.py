"""What anybody can install beside rlm: the example plugin, in a virtual environment of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLUGIN = ROOT / "examples" / "plugin"

COMPLETION = """
from rlm import RLM
from rlm.testing.model_server import Behaviour, ModelServer

cell = "```repl\\nimport sys\\nFINAL(f'{len(context)} {sys.flags.isolated}')\\n```"
with ModelServer(Behaviour(text=cell)) as server:
    settings = {"base_url": server.url, "api_key": "sk-of-the-example"}
    with RLM(backend="example", backend_kwargs=settings, environment="example") as rlm:
        result = rlm.completion("a context", root_prompt="How long is it?")
    print(result.response, result.root_model, result.isolation.level, server.requests)
"""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A virtual environment with the plugin in it, beside the copy that it was installed from.

    It sees this one's packages and this repository through a .pth file: nothing is downloaded.
    """
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(PLUGIN, folder / "copy", ignore=shutil.ignore_patterns("__pycache__", ".*"))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    [site] = (folder / "venv" / "lib").glob("python*/site-packages")
    seen = [ROOT, ROOT / "environments", ROOT / "clients", sysconfig.get_path("purelib")]
    (site / "rlm-tests.pth").write_text("".join(f"{path}\n" for path in seen))
    install = ["pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    done = python(folder, "-m", *install, "--disable-pip-version-check", str(folder / "copy"))
    assert done.returncode == 0, done.stderr
    yield folder
    shutil.rmtree(folder)


def python(folder: Path, *arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the virtual environment's Python, which gets nothing from ours but ``path``."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
    if path is not None:
        environ["PYTHONPATH"] = str(path)
    return subprocess.run(
        [str(folder / "venv" / "bin" / "python"), *arguments], capture_output=True, text=True, check=False,
        timeout=100, cwd=folder / "copy", env={**environ, "COLUMNS": "500", "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip


def row(output: str, word: str) -> list[str]:
    """The cells of the row of a table whose first one is ``word``."""
    rows = [[cell.strip() for cell in re.split("[│┃|]", line)[1:-1]] for line in output.splitlines()]
    [found] = [cells for cells in rows if cells and cells[0] == word]
    return found


def distribution(site: Path, name: str, points: str, **modules: str) -> Path:
    """Another package, as pip leaves it."""
    info = site / f"{name.replace('-', '_')}-2.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.0\n")
    (info / "entry_points.txt").write_text(points)
    for module, code in modules.items():
        (site / f"{module}.py").write_text(code)
    return site


# --- installed ---------------------------------------------------------------------------------


def test_the_client_is_listed_with_where_it_comes_from_and_is_usable(installed: Path) -> None:
    done = python(installed, "-m", "rlm.cli", "clients")
    assert done.returncode == 0, done.stderr
    assert row(done.stdout, "example") == [
        "example", "rlm-example-plugin 0.1.0", "rlm_example.client:ExampleLM", "yes",
    ]  # fmt: skip


def test_the_environment_is_listed_and_says_that_it_is_no_wall(installed: Path) -> None:
    done = python(installed, "-m", "rlm.cli", "environments")
    assert done.returncode == 0, done.stderr
    assert row(done.stdout, "example") == [
        "example", "rlm-example-plugin 0.1.0", "rlm_example.environment:ProcessREPL",
        "yes: none; NOT enforced: everything: a cell can do what its user can",
    ]  # fmt: skip


def test_a_completion_with_both_by_name_works(installed: Path) -> None:
    done = python(installed, "-c", COMPLETION)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "9 1 example-1 none 1\n"


def test_what_is_imported_is_what_was_installed(installed: Path) -> None:
    done = python(installed, "-P", "-c", "import rlm, rlm_example; print(rlm.__file__, rlm_example.__file__)")
    core, plugin = done.stdout.split()
    assert Path(core).is_relative_to(ROOT)
    assert Path(plugin).is_relative_to(installed / "venv")


def assert_passes(installed: Path, *arguments: str) -> int:
    """Run the plugin's own tests; how many passed."""
    done = python(installed, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    return int(passed[1])


def test_the_plugins_client_passes_the_whole_suite_of_clients(installed: Path) -> None:
    assert assert_passes(installed, "tests/test_client.py") > 150


def test_the_plugins_environment_passes_what_it_claims(installed: Path) -> None:
    """A selection: all of it takes two minutes (`pytest tests/test_environment.py`)."""
    names = "variable or traceback or test_final or closing_a_session or no_wall or is_told or known or lacks"
    assert assert_passes(installed, "tests/test_environment.py", "-k", names) > 20


def test_a_cell_leaves_nothing_where_the_host_works(installed: Path) -> None:
    code = (
        "import os, pathlib\n"
        "from rlm import open_repl\n"
        "with open_repl('example') as repl:\n"
        "    folder = repl.execute(\"open('left', 'w'); import os; os.getcwd()\").value\n"
        "print(os.path.exists(folder), pathlib.Path('left').exists(), folder == os.getcwd())"
    )
    assert python(installed, "-c", code).stdout == "False False False\n"


# --- beside others -----------------------------------------------------------------------------


def test_a_broken_plugin_is_shown_with_its_reason_and_breaks_nothing_else(
    installed: Path, tmp_path: Path
) -> None:
    points = "[rlm.clients]\nbroken = rlm_broken:LM\n[rlm.environments]\nbroken = rlm_broken:REPL\n"
    code = "raise ImportError('the SDK of nobody is missing')"
    site = distribution(tmp_path / "site", "rlm-broken-plugin", points, rlm_broken=code)
    for group in ("clients", "environments"):
        done = python(installed, "-m", "rlm.cli", group, path=site)
        assert done.returncode == 0, done.stderr
        name, source, _, usable = row(done.stdout, "broken")
        assert (name, source) == ("broken", "rlm-broken-plugin 2.0")
        assert usable.startswith("no: ")
        assert usable.endswith("ImportError: the SDK of nobody is missing")
        assert row(done.stdout, "example")[3].startswith("yes")
    assert python(installed, "-c", COMPLETION, path=site).stdout == "9 1 example-1 none 1\n"


@pytest.mark.parametrize(
    ("group", "word", "target", "use"),
    [
        ("clients", "backend", "rlm_example.client:ExampleLM", "RLM(backend='example').completion('x')"),
        (
            "environments", "environment", "rlm_example.environment:ProcessREPL",
            "open_repl('example').__enter__()",
        ),
    ],
)  # fmt: skip
def test_two_packages_that_claim_a_name_are_both_named(
    installed: Path, tmp_path: Path, group: str, word: str, target: str, use: str
) -> None:
    points = f"[rlm.{group}]\nexample = rlm_rival:Rival\n"
    site = distribution(tmp_path / "site", "rlm-rival-plugin", points)
    done = python(installed, "-c", f"from rlm import RLM, open_repl\n{use}", path=site)
    assert done.returncode == 1
    said = f"PluginConflict: the {word} 'example' is claimed by "
    assert said in done.stderr
    assert f"rlm-example-plugin 0.1.0 ({target})" in done.stderr
    assert "rlm-rival-plugin 2.0 (rlm_rival:Rival)" in done.stderr


# --- the guide ---------------------------------------------------------------------------------

SHOWN = re.findall(
    r"^```(python|toml)\n(.*?)^```", (ROOT / "docs" / "plugins.md").read_text("utf-8"), re.M | re.S
)


def flat(text: str) -> str:
    """Without indentation: a part of a function may stand at the margin of the guide."""
    return "\n".join(line.strip() for line in text.strip().splitlines())


SOURCES = [flat(path.read_text("utf-8")) for path in PLUGIN.rglob("*") if path.suffix in (".py", ".toml")]


@pytest.mark.parametrize("number", range(len(SHOWN)))
def test_what_the_guide_shows_is_in_the_example_word_for_word(number: int) -> None:
    """Parts that stand apart in a file are joined by a line of three dots."""
    parts = re.split(r"^ *# \.\.\.\n", SHOWN[number][1], flags=re.M)
    assert [part for part in parts if not any(flat(part) in source for source in SOURCES)] == []


def test_the_guide_shows_something_of_everything() -> None:
    assert len(SHOWN) >= 5

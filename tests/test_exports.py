"""Facts about what the package shows to the outside."""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import rlm

ROOT = Path(rlm.__file__).parent.parent
MODULES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("rlm", "environments", "clients")
    for path in (ROOT / folder).rglob("*.py")
)


def test_everything_that_is_exported_resolves() -> None:
    assert [name for name in rlm.__all__ if getattr(rlm, name, None) is None] == []


def test_everything_that_resolves_is_exported() -> None:
    """A static reader sees the same names as a program that runs."""
    tree = ast.parse(Path(rlm.__file__).read_text("utf-8"))
    static = {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
    }
    assert static == set(rlm.__all__)


def test_all_is_sorted_and_without_doubles() -> None:
    assert list(rlm.__all__) == sorted(set(rlm.__all__))


def test_an_exported_class_or_function_is_the_one_of_its_module() -> None:
    for name in rlm.__all__:
        value = getattr(rlm, name)
        assert value.__module__.startswith("rlm.")
        assert getattr(importlib.import_module(value.__module__), name) is value


def test_dir_shows_what_is_exported() -> None:
    assert set(rlm.__all__) <= set(dir(rlm))
    assert "__version__" in dir(rlm)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'rlm' has no attribute 'Nothing'"):
        _ = rlm.Nothing
    assert not hasattr(rlm, "_find_session")


def test_a_star_import_brings_what_is_exported() -> None:
    found: dict[str, object] = {}
    exec("from rlm import *", found)
    assert set(rlm.__all__) <= set(found)


def fresh(code: str) -> list[str]:
    """The modules that a fresh interpreter has after ``code``."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    modules: list[str] = json.loads(done.stdout)
    return modules


HEAVY = {"pydantic", "rich", "typer", "yaml", "msgspec", "rlm_local", "rlm_scripted", "asyncio"}


def test_importing_the_package_imports_nothing_heavy() -> None:
    modules = fresh("import rlm")
    assert HEAVY.isdisjoint(modules)
    assert [module for module in modules if module.startswith("rlm.")] == []


@pytest.mark.parametrize("name", ["RLM", "open_repl", "BaseLM", "BaseEnv"])
def test_plugins_and_the_command_line_are_not_imported_with_a_name(name: str) -> None:
    assert {"rich", "typer", "yaml", "rlm_local", "rlm_scripted"}.isdisjoint(fresh(f"from rlm import {name}"))


@pytest.mark.parametrize("module", MODULES)
def test_what_is_public_says_what_it_is_for(module: str) -> None:
    tree = ast.parse((ROOT / module).read_text("utf-8"))
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [node for node in tree.body if isinstance(node, definitions) and not node.name.startswith("_")]
    assert ast.get_docstring(tree)
    assert [node.name for node in public if not ast.get_docstring(node)] == []

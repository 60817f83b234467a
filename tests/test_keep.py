"""Facts about saved variables: what comes back in another namespace, and what is said to be lost."""

# ruff: noqa: E501 (a table of cells reads best with one to a line)

import builtins
import functools
import os
import pickle
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm import keep
from rlm.keep import Keeper

LIBRARY = Path(cloudpickle.__file__).with_name("cloudpickle.py").read_bytes()
LIMIT = 1 << 24
CONTEXT = "context " * 1000


def llm_query(prompt: str) -> str:
    """Stands for what a host has put into a session."""
    return prompt


class Namespace:
    """The names of a session, as the executor has them."""

    def __init__(self, **reserved: Any) -> None:
        self.names = types.ModuleType("__main__").__dict__
        self.names["__builtins__"] = builtins
        reserved = {"llm_query": llm_query, "context": CONTEXT, **reserved}
        self.names.update(reserved)
        self.keeper = Keeper(self.names, reserved, LIBRARY)

    def run(self, code: str) -> None:
        exec(compile(textwrap.dedent(code), "<cell 1>", "exec"), self.names)

    def value(self, code: str) -> Any:
        return eval(code, self.names)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def saved(code: str, limit: int = LIMIT) -> tuple[bytes, list[str]]:
    space = Namespace()
    space.run(code)
    return space.keeper.save(limit)


def elsewhere(code: str) -> Namespace:
    """Another namespace, with the variables that this code makes."""
    data, lost = saved(code)
    assert lost == []
    other = Namespace()
    other.keeper.load(data)
    return other


def lost(code: str) -> list[str]:
    return saved(code)[1]


# --- what comes back ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "check"),
    [
        ("x = {1: (2, [3.5, None]), 'é': b'z'}", "x == {1: (2, [3.5, None]), 'é': b'z'}"),
        ("x = [1]; y = x", "x is y"),
        ("x = []; x.append(x)", "x[0] is x"),
        ("x = 1\ndef f(): return x + 1", "[f(), globals().update(x=5), f()] == [2, None, 6]"),
        ("f = lambda x: h(x)\nh = lambda y: y * 2", "f(4) == 8"),
        ("def f(n): return n * f(n - 1) if n else 1\ng = f", "[f(5), f is g] == [120, True]"),
        ("def f(a, b=[], *, c=1): b.append(a); return [*b, c]\nf(1)", "f(2) == [1, 2, 1]"),
        ("def f():\n  'doc'\nf.note = 5", "[f.__doc__, f.note, f.__name__] == ['doc', 5, 'f']"),
        ("def f():\n  c = 0\n  def g():\n    nonlocal c\n    c += 1\n    return c\n  return g\ng = f(); g(); h = g", "[g(), h(), g()] == [2, 3, 4]"),
        ("async def f(): return 1", "f.__name__ == 'f'"),
        ("class A:\n  n = 0\n  def up(self): A.n += 1; return A.n\na = A()\na.up()", "[a.up(), A.n, type(a) is A] == [2, 2, True]"),
        ("class A:\n  def f(self): return 1\nclass B(A):\n  def f(self): return super().f() + 1\nb = B()", "[b.f(), isinstance(b, A)] == [2, True]"),
        ("class M(type): pass\nclass A(metaclass=M): pass\nA.me = A", "[type(A) is M, A.me is A] == [True, True]"),
        ("class A:\n  __slots__ = ('x',)\na = A(); a.x = 3", "a.x == 3"),
        ("import dataclasses\n@dataclasses.dataclass\nclass D:\n  x: int = 1\nd = D(3)", "d == D(3) and dataclasses.asdict(d) == {'x': 3}"),
        ("import enum\nclass E(enum.Enum): A = 1\ne = E.A", "e is E.A"),
        ("import collections\nP = collections.namedtuple('P', 'x y')\np = P(1, 2)", "p == P(1, 2)"),
        ("import functools\n@functools.lru_cache(5)\ndef f(n): return n if n < 2 else f(n - 1) + f(n - 2)\nf(9)", "[f(20), f.cache_info().maxsize] == [6765, 5]"),
        ("import functools\n@functools.cache\ndef f(n): return n\nclass A:\n  @functools.cache\n  def g(self): return 3\na = A()", "[f(1), a.g()] == [1, 3]"),
        ("import json as j, os.path", "j.loads('1') == 1 and os.path.sep == '/'"),
        ("import re, random\nr = re.compile('a+'); d = random.Random(3); n = random.Random(3).random()", "r.match('aa') is not None and d.random() == n"),
        ("from textwrap import dedent as d\nfrom functools import lru_cache as c", "d('  a') == 'a' and c is not None"),
        ("g = globals()", "g is globals()"),
        ("class A: pass\na = A(); a.space = globals()", "a.space is globals()"),
        ("_private = 1; __dunder = 2", "[_private, __dunder] == [1, 2]"),
        ("x = 'long' * 1000; y = x", "x == 'long' * 1000 and x is y"),
        ("x = object; y = int; z = len; e = ValueError", "[x, y, z, e] == [object, int, len, ValueError]"),
    ],
    ids=lambda text: text.splitlines()[-1][:40],
)  # fmt: skip
def test_a_variable_is_the_same_in_another_process(code: str, check: str) -> None:
    assert elsewhere(code).value(check) is True


@settings(deadline=None, max_examples=50)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
        lambda item: (
            st.lists(item) | st.tuples(item) | st.dictionaries(st.text(), item) | st.frozensets(st.text())
        ),
    )
)
def test_any_plain_data_comes_back_as_it_was(value: Any) -> None:
    space, other = Namespace(), Namespace()
    space.names["x"] = value
    data, _ = space.keeper.save(LIMIT)
    other.keeper.load(data)
    assert other.names["x"] == value


def test_what_the_host_has_given_is_saved_as_a_name() -> None:
    data, _ = saved("f = llm_query; c = context; d = {'c': context}")
    assert len(data) < 200
    other = Namespace(llm_query=print, context="another " * 1000)
    other.keeper.load(data)
    assert other.value("[f is llm_query, c is context, d['c'] is context]") == [True] * 3


def test_names_of_the_hosts_are_no_variables() -> None:
    data, _ = saved("llm_query = 5; context = 6; x = 1; _ = 7; __name__ = 'mine'")
    other = Namespace()
    assert other.keeper.load(data) == ["x"]
    assert other.value("[llm_query == 5, context == 6, __name__]") == [False, False, "__main__"]


def test_the_answer_of_a_completion_is_none_of_the_next() -> None:
    data, _ = saved("answer = {'content': 'a', 'ready': True}; x = 1")
    other = Namespace()
    assert other.keeper.load(data) == ["x"]


def test_variables_take_the_place_of_those_of_the_same_name_and_of_no_others() -> None:
    data, _ = saved("x = 1")
    other = Namespace()
    other.run("x = 2; y = 3")
    other.keeper.load(data)
    assert other.value("[x, y]") == [1, 3]


def test_the_builtins_are_this_processs_own() -> None:
    space = Namespace()
    space.run("__builtins__ = {'len': 5}; x = 1")
    data, _ = space.keeper.save(LIMIT)
    space.keeper.load(data)
    assert space.names["__builtins__"] is builtins


# --- what does not -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import threading\nbad = threading.Lock()", "bad (lock: cannot pickle '_thread.lock' object)"),
        ("bad = (n for n in ())", "bad (generator: cannot pickle 'generator' object)"),
        ("bad = []\nfor _ in range(100_000): bad = [bad]", "bad (list: Could not pickle object"),
        ("class A:\n  def __reduce__(self): raise ValueError('no\\nway')\nbad = A()", "bad (A: no)"),
        ("class A:\n  def __reduce__(self): raise ValueError\nbad = A()", "bad (A: ValueError)"),
        ("class A:\n  def __reduce__(self): raise SystemExit('out')\nbad = A()", "bad (A: out)"),
        ("class A:\n  def __reduce__(self): return 'nowhere'\nbad = A()", "bad (A: Can't pickle"),
        ("class E(Exception):\n  def __str__(self): raise ValueError\nclass A:\n  def __reduce__(self): raise E\nbad = A()", "bad (A: E)"),
        ("class A:\n  def __reduce__(self): raise ValueError('x' * 9999)\nbad = A()", f"bad (A: {'x' * 200})"),
    ],
    ids=lambda text: text.splitlines()[-1][:40],
)  # fmt: skip
def test_a_variable_that_cannot_be_saved_is_named_and_costs_no_other(code: str, reason: str) -> None:
    data, lost = saved(f"before = 1\n{code}\nafter = [bad]\nlast = 2")
    assert lost[0].startswith(reason)
    assert [text.partition(" ")[0] for text in lost] == ["bad", "after"]
    other = Namespace()
    other.keeper.load(data)
    assert other.value("[before, last]") == [1, 2]


def test_an_interrupt_is_no_reason_to_go_on() -> None:
    with pytest.raises(KeyboardInterrupt):
        saved("class A:\n  def __reduce__(self): raise KeyboardInterrupt\na = A()")


def test_nothing_that_a_cell_has_made_is_saved_as_a_name_in_its_module() -> None:
    """In another process the name is not there yet: all variables would be lost for one of them."""
    space = Namespace()
    space.run("class A:\n  def __reduce__(self): return 'thing'\nthing = A(); x = 1")
    main = sys.modules["__main__"]
    module = types.ModuleType("__main__")
    module.__dict__.update(space.names)
    sys.modules["__main__"] = module
    try:
        data, lost = space.keeper.save(LIMIT)
    finally:
        sys.modules["__main__"] = main
    assert len(lost) == 1 and lost[0].startswith("thing (A: Can't pickle")
    other = Namespace()
    assert other.keeper.load(data) == ["A", "x"]


def test_of_very_many_that_are_lost_some_are_named() -> None:
    found = lost("import threading\nfor n in range(60): globals()[f'v{n:02}'] = threading.Lock()")
    assert len(found) == keep.NAMED + 1
    assert found[-1] == "and 10 more"


@pytest.mark.parametrize("code", ["x = 'a' * 2000", "import threading; y = threading.Lock(); x = 'a' * 2000"])
def test_more_than_the_limit_is_refused(code: str) -> None:
    with pytest.raises(ValueError, match="too large to be saved: delete what is not needed"):
        saved(code, limit=1000)
    assert saved(code, limit=3000)[0]


def test_files_are_not_saved_and_named(folder: Path) -> None:
    for name in "fbeadc":
        (folder / name).touch()
    assert lost("x = 1") == ["what is in the working directory: a, b, c, d, e"]


def test_a_working_directory_that_is_no_more_is_no_reason_to_lose_variables(folder: Path) -> None:
    (folder / "gone").mkdir()
    os.chdir(folder / "gone")
    (folder / "gone").rmdir()
    assert lost("x = 1") == []


# --- what is left as it was --------------------------------------------------------------------


def test_a_cells_own_library_of_the_name_is_there_again(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = types.ModuleType("cloudpickle")
    monkeypatch.setitem(sys.modules, "cloudpickle", mine)
    monkeypatch.delitem(sys.modules, "cloudpickle.cloudpickle", raising=False)
    main = sys.modules["__main__"]
    assert elsewhere("def f(): return 1").value("f()") == 1
    assert sys.modules["cloudpickle"] is mine
    assert "cloudpickle.cloudpickle" not in sys.modules
    assert sys.modules["__main__"] is main


@pytest.mark.parametrize("data", [b"", b"garbage", b"\x80\x04.", pickle.dumps([1, 2])[:-3], pickle.dumps(5)])
def test_bytes_that_are_no_saved_variables_change_nothing(data: bytes) -> None:
    space = Namespace()
    space.run("x = 1")
    before = dict(space.names)
    with pytest.raises((EOFError, ValueError, IndexError, pickle.UnpicklingError)):
        space.keeper.load(data)
    assert space.names == before


def test_variables_of_which_one_cannot_be_had_here_change_nothing() -> None:
    data, _ = saved("import sys, types\nx = 1\nm = types.ModuleType('here')\nsys.modules['here'] = m\ny = m")
    del sys.modules["here"]
    space = Namespace()
    before = dict(space.names)
    with pytest.raises(ModuleNotFoundError):
        space.keeper.load(data)
    assert space.names == before


def test_a_function_of_an_installed_module_is_saved_as_its_name() -> None:
    other = elsewhere("import functools, fnmatch\nf = fnmatch._compile_pattern")
    assert isinstance(other.value("f"), functools._lru_cache_wrapper)
    assert other.value("f is fnmatch._compile_pattern") is True

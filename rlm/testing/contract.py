"""Contract: the Python in cells, what is shown of them, and the contexts they find."""

# ruff: noqa: E501 (a table of cells reads best with one to a line)

from __future__ import annotations

import asyncio
import datetime
from typing import Any

import pytest

from ..errors import ConfigError
from .sessions import Cells, OpenCells, OpenSandbox, eventually
from .suite import Suite, one_session, requires

LONE = "\ud800"


CELLS: dict[str, tuple[str, Any]] = {
    "a class": ("class A:\n    def f(self): return A.__name__\nA().f()", "A"),
    "inheritance and super": (
        "class A:\n    def f(self): return 1\nclass B(A):\n    def f(self): return super().f() + 1\nB().f()", 2
    ),
    "a dataclass": (
        "from dataclasses import dataclass, asdict\n@dataclass\nclass P:\n    x: int\n    y: int = 2\nasdict(P(1))",
        {"x": 1, "y": 2},
    ),
    "an enum": ("import enum\nclass E(enum.Enum):\n    A = 1\nE(1).name", "A"),
    "a named tuple": ("from typing import NamedTuple\nclass P(NamedTuple):\n    x: int\nP(3).x", 3),
    "augmented assignment": ("n = 1\nn += 2\nn", 3),
    "deletion": ("n = 1\ndel n\n'n' in globals()", False),
    "imports": ("import os.path as p, json\nfrom math import floor\n[p.join('a', 'b'), floor(1.5)]", ["a/b", 1]),
    "a star import": ("from math import *\nfloor(pi)", 3),
    "a comprehension over outer names": ("k = 3\n[k * i for i in range(3) if i < k]", [0, 3, 6]),
    "nested comprehensions": ("m = [[1], [2]]\n[[x + len(m) for x in row] for row in m]", [[3], [4]]),
    "a comprehension in a class body": ("class A:\n    xs = [1, 2]\n    ys = [x for x in xs]\nA.ys", [1, 2]),
    "the walrus in a comprehension": ("[last := i for i in range(3)]\nlast", 2),
    "decorators": ("def twice(f): return lambda x: f(f(x))\n@twice\ndef inc(x): return x + 1\ninc(1)", 3),
    "a cached property": (
        "import functools\nclass A:\n    @functools.cached_property\n    def p(self): return [1]\na = A()\na.p is a.p",
        True,
    ),
    "a generator": ("def g():\n    got = yield 1\n    yield got\ni = g()\n[next(i), i.send(5)]", [1, 5]),
    "yield from": ("def g():\n    yield from range(3)\nlist(g())", [0, 1, 2]),
    "match": ("match {'a': [1, 2]}:\n    case {'a': [_, y]}: r = y\nr", 2),
    "recursion of a lambda": ("f = lambda n: 1 if n < 2 else n * f(n - 1)\nf(5)", 120),
    "mutual recursion": (
        "def even(n): return n == 0 or odd(n - 1)\ndef odd(n): return n != 0 and even(n - 1)\neven(10)", True
    ),
    "global": ("n = 0\ndef f():\n    global n\n    n += 1\nf(); f()\nn", 2),
    "nonlocal": ("def f():\n    n = 0\n    def g():\n        nonlocal n\n        n += 1\n        return n\n    g()\n"
                 "    return g()\nf()", 2),
    "annotations": ("n: int = 1\nm: 'list[str]'\nsorted(__annotations__)", ["m", "n"]),
    "a future import": ("from __future__ import annotations\ndef f(x: Undefined): ...\nf.__annotations__", {"x": "Undefined"}),
    "with and try": ("import contextlib\nwith contextlib.suppress(KeyError):\n    {}[1]\n"
                     "try: 1/0\nexcept ZeroDivisionError as e: r = type(e).__name__\nelse: r = ''\nfinally: s = 1\n[r, s]",
                     ["ZeroDivisionError", 1]),
    "an exception group": ("try: raise ExceptionGroup('g', [KeyError(1)])\nexcept* KeyError as e: r = len(e.exceptions)\nr", 1),
    "await at the top": ("import asyncio\nasync def f(): return 7\nawait f()", 7),
    "a task made and awaited": (
        "import asyncio\nasync def f(): return 6\ntask = asyncio.create_task(f())\nawait task", 6
    ),
    "await in a statement": ("import asyncio\nx = await asyncio.sleep(0, 'y')\nx", "y"),
    "async for": ("async def g():\n    for i in range(3): yield i\nr = []\nasync for i in g(): r.append(i)\nr", [0, 1, 2]),
    "an async comprehension": ("async def g():\n    for i in range(3): yield i\n[i async for i in g()]", [0, 1, 2]),
    "async with": ("import contextlib\n@contextlib.asynccontextmanager\nasync def m(): yield 4\nasync with m() as x: pass\nx", 4),
    "asyncio.gather": ("import asyncio\nasync def f(i): return i\nawait asyncio.gather(*map(f, range(3)))", [0, 1, 2]),
    "asyncio.run": ("import asyncio\nasync def f(): return 5\nasyncio.run(f())", 5),
    "a subprocess": ("import subprocess\nsubprocess.run(['echo', 'hi'], capture_output=True, text=True).stdout", "hi\n"),
    "a thread": ("import threading\nr = []\nt = threading.Thread(target=lambda: r.append(1))\nt.start(); t.join()\nr", [1]),
    "a thread pool": ("from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(4) as p:\n"
                      "    r = list(p.map(abs, [-1, -2]))\nr", [1, 2]),
    "pickling of a class of the cell": ("import pickle\nclass A: pass\ntype(pickle.loads(pickle.dumps(A()))) is A", True),
    "exec and eval": ("exec('z = 5')\neval('z + 1')", 6),
    "a file of its own": ("open('f', 'w').write('text')\nopen('f').read()", "text"),
    "a temporary directory": ("import tempfile, os\nwith tempfile.TemporaryDirectory() as d: r = os.path.isdir(d)\n"
                              "[r, os.path.exists(d)]", [True, False]),
    "a pair of sockets": ("import socket\na, b = socket.socketpair()\na.send(b'hi')\nb.recv(5).decode()", "hi"),
    "the name of the main module": ("__name__", "__main__"),
}  # fmt: skip

NEEDS = {
    "a subprocess": ["processes"], "a thread": ["threads"], "a thread pool": ["threads"], "a file of its own": ["files"],
    "a temporary directory": ["files"], "a pair of sockets": ["cpython"],
}  # fmt: skip
"""What else than the language a cell of the table asks for."""

RESERVED = ["llm_query", "llm_query_batched", "rlm_query", "rlm_query_batched", "FINAL", "FINAL_VAR", "SHOW_VARS",
            "budget", "LLMError", "context", "context_0"]  # fmt: skip


CONTEXTS = [
    "", "plain", "a\r\nb\rc\n", "nul\0in\0side", f"lone{LONE}\udfff", "é\U0001f600\u2028", "\ufeffbom", b"", b"\xff\0\r\n",
    [], {}, None, 5, 1.5, (1, (2,)), [1, "a", b"b", None], {1: "int", (2, 3): "tuple", "s": [1]},
    {1, 2}, frozenset({"a"}), datetime.date(2024, 2, 29), datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC),
    datetime.timedelta(1, 2, 3), [{"deep": [{"er": (1, {2: {3}})}]}], bytearray(b"x"), {"k": LONE}, 1j, range(3),
]  # fmt: skip


class Contract(Suite):
    """Level contract: what a cell can write, and what is shown of it."""

    level = "contract"

    # --- the whole language ------------------------------------------------------------------------

    @pytest.mark.parametrize("what", CELLS)
    @one_session
    def test_a_cell_can_use(self, repl: Cells, what: str) -> None:
        self.require(*NEEDS.get(what, ()))
        code, expected = CELLS[what]
        assert repl.value(code) == expected

    def test_names_live_from_cell_to_cell(self, repl: Cells) -> None:
        repl.ok("import math\nclass A: n = 1\ndef f(): return A.n + math.floor(x)")
        repl.ok("x = 2.5")
        assert repl.value("f()") == 3

    def test_a_function_sees_a_later_rebinding(self, repl: Cells) -> None:
        repl.ok("rate = 1\ndef price(): return rate * 10")
        repl.ok("rate = 5")
        assert repl.value("price()") == 50

    def test_an_async_function_of_one_cell_is_awaited_in_another(self, repl: Cells) -> None:
        repl.ok("import asyncio\nqueue = asyncio.Queue()\nasync def get(): return await queue.get()")
        repl.ok("await queue.put('item')")
        assert repl.value("await get()") == "item"

    def test_a_task_goes_on_in_the_next_cell_that_awaits(self, repl: Cells) -> None:
        repl.ok("import asyncio\nasync def f(): await asyncio.sleep(0.01); return 'done'\ntask = asyncio.create_task(f())\n"
                "await asyncio.sleep(0)")  # fmt: skip
        assert repl.value("await task") == "done"

    def test_a_future_import_ends_with_its_cell(self, repl: Cells) -> None:
        repl.ok("from __future__ import annotations")
        assert repl.value("def f(x: int): ...\nf.__annotations__['x'] is int") is True

    def test_variables_survive_an_exception(self, repl: Cells) -> None:
        assert repl.error("before = 1\n1/0\nafter = 2").type == "ZeroDivisionError"
        assert repl.value("[before, 'after' in globals()]") == [1, False]

    def test_an_empty_cell_and_a_comment_are_cells(self, repl: Cells) -> None:
        assert repl.ok("").echo == repl.ok("# nothing").echo == repl.ok("\n\n").echo == ""

    def test_other_line_ends_are_line_ends(self, repl: Cells) -> None:
        assert repl.value("x = 1\r\nif x:\r\n    y = 2\r\ny") == 2

    def test_a_thousand_cells_leave_the_session_as_it_was(self, repl: Cells) -> None:
        repl.ok("n = 0")
        for _ in range(1000):
            repl.repl.execute("n += 1", timeout=30)
        assert repl.value("n") == 1000

    # --- the last expression --------------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("code", "echo"),
        [
            ("1 + 1", "2"), ("'a'", "'a'"), ("None", ""), ("x = 5", ""), ("5;", ""), ("5 ;\n", ""), ("x = 5; x", "5"),
            ("if True: 5", ""), ("print('a')", ""), ("[\n1,\n2]", "[1, 2]"), ("(lambda: 3)()", "3"),
            ("5  # and so on;", "5"), ("'''\na;'''", r"'\na;'"), ('"""a docstring"""', "'a docstring'"),
        ],
    )  # fmt: skip
    @one_session
    def test_only_a_last_expression_is_echoed(self, repl: Cells, code: str, echo: str) -> None:
        assert repl.ok(code).echo == echo

    def test_the_underscore_is_the_last_value_that_was_not_none(self, repl: Cells) -> None:
        repl.ok("40 + 2")
        repl.ok("None")
        assert repl.value("_ + 1") == 43

    @pytest.mark.parametrize(
        "value",
        [
            0,
            -1,
            1.5,
            10**100,
            True,
            "text",
            "é\U0001f600\0",
            "",
            [],
            {},
            [1, [None, {"a": [True]}]],
            {"": {}},
        ],
        ids=repr,
    )
    @one_session
    def test_plain_data_has_a_value(self, repl: Cells, value: Any) -> None:
        result = repl.ok(repr(value))
        assert (result.value, type(result.value)) == (value, type(value))

    @pytest.mark.parametrize(
        "code",
        [
            "(1, 2)", "[(1,)]", "{1, 2}", "{1: 2}", "{True: 1}", "{None: 1}", "{'a': {2: 3}}", "float('nan')",
            "[float('inf')]", "b'a'", "1j", "object()", "range(3)", "'\\ud800'", "['a\\udfff']", "{'\\ud800': 1}",
            "type('S', (str,), {})('a')", "__import__('collections').OrderedDict(a=1)", "x = []; x.append(x); x",
        ],
    )  # fmt: skip
    @one_session
    def test_what_json_cannot_hold_without_loss_has_an_echo_and_no_value(
        self, repl: Cells, code: str
    ) -> None:
        result = repl.ok(code)
        assert result.value is None
        assert result.echo

    def test_a_huge_value_has_a_clipped_echo_and_no_value(self, repl: Cells) -> None:
        result = repl.ok("'a' * 5_000_000")
        assert result.value is None
        assert len(result.echo) < 30_000
        assert "characters left out" in result.echo

    @pytest.mark.parametrize("method", ["__repr__", "__str__"])
    @pytest.mark.parametrize(
        "raised", ["ValueError('no')", "SystemExit(3)", "KeyboardInterrupt", "Exception(1, 2)"]
    )
    @one_session
    def test_an_evil_repr_costs_its_cell_only(self, repl: Cells, method: str, raised: str) -> None:
        repl.ok("kept = 1")
        result = repl.run(f"class Evil:\n    def {method}(self): raise {raised}\nEvil()")
        assert (result.error is not None) == (method == "__repr__")
        result = repl.run(f"class Bad(Exception):\n    def {method}(self): raise {raised}\nraise Bad()")
        assert result.error is not None
        assert result.error.type == "Bad"
        assert repl.value("kept") == 1

    @pytest.mark.parametrize("body", ["return 5", "return None"])
    def test_a_repr_that_returns_no_str_is_a_type_error(self, repl: Cells, body: str) -> None:
        assert repl.error(f"class Evil:\n    def __repr__(self): {body}\nEvil()").type == "TypeError"

    def test_a_list_whose_comparison_fails_is_echoed_all_the_same(self, repl: Cells) -> None:
        result = repl.run("class L(list):\n    def __eq__(self, other): raise KeyError(1)\nL([1])")
        assert (result.error, result.echo, result.value) == (None, "[1]", None)

    # --- errors ---------------------------------------------------------------------------------------

    def test_a_traceback_points_at_the_cells_own_line(self, repl: Cells) -> None:
        error = repl.error("def f():\n    return 1 / 0  # here\n\nf()")
        assert (error.kind, error.type, error.message) == (
            "exception",
            "ZeroDivisionError",
            "division by zero",
        )
        assert 'File "<cell 1>", line 4, in <module>\n    f()' in error.traceback
        assert 'File "<cell 1>", line 2, in f\n    return 1 / 0  # here' in error.traceback

    def test_a_traceback_through_two_cells_shows_the_lines_of_both(self, repl: Cells) -> None:
        repl.ok("def f(x):\n    return x['missing']")
        error = repl.error("# call it\nf({})")
        assert '"<cell 2>", line 2' in error.traceback
        assert "return x['missing']" in error.traceback
        assert error.message == "'missing'"

    @pytest.mark.parametrize(
        "code",
        ["1/0", "raise SystemExit", "llm_query('x')", "await nothing", "[f(x) for x in y]", "(", "llm_query()",
                 "import json; json.loads('{')"],
    )  # fmt: skip
    def test_a_traceback_shows_no_machinery(self, repl: Cells, code: str) -> None:
        text = repl.error(code).traceback
        assert "<cell 1>" in text
        for word in ("worker.py", "zygote", "_evaluate", "rlm/", "asyncio"):
            assert word not in text

    def test_causes_and_contexts_are_shown(self, repl: Cells) -> None:
        text = repl.error(
            """
            try:
                {}['key']
            except KeyError as error:
                raise ValueError('outer') from error
            """
        ).traceback
        assert "KeyError: 'key'" in text
        assert "direct cause" in text
        assert "ValueError: outer" in text
        assert "During handling" in repl.error("try: 1/0\nexcept ZeroDivisionError: nope").traceback

    def test_an_exception_that_is_its_own_cause_is_shown(self, repl: Cells) -> None:
        assert repl.error("e = ValueError('round')\ne.__cause__ = e\nraise e").message == "round"

    def test_an_exception_group_shows_its_members_without_machinery(self, repl: Cells) -> None:
        text = repl.error("raise ExceptionGroup('g', [KeyError('k'), ValueError('v')])").traceback
        assert "KeyError: 'k'" in text
        assert "ValueError: v" in text
        assert "worker.py" not in text

    @pytest.mark.parametrize(
        ("code", "type_", "line"),
        [("x = (1,\ny = 2", "SyntaxError", 1), ("x = 1\n  y = 2", "IndentationError", 2), ("a b", "SyntaxError", 1),
         ("return 5", "SyntaxError", 1), ("for x in y:\n\tpass\n        z", "TabError", 3)],
    )  # fmt: skip
    def test_a_syntax_error_names_its_line_and_runs_nothing(
        self, repl: Cells, code: str, type_: str, line: int
    ) -> None:
        error = repl.error(f"{code}\n")
        assert error.type == type_
        assert f'File "<cell 1>", line {line}' in error.traceback
        assert repl.value("'x' in globals()") is False

    @pytest.mark.parametrize("code", ["x = '\0'", f"x = '{LONE}'", "(" * 2000, "-" * 100_000 + "1"])
    @one_session
    def test_source_that_cannot_be_compiled_is_an_error_of_its_cell(self, repl: Cells, code: str) -> None:
        repl.ok("kept = 1")
        assert repl.run(code).error is not None
        assert repl.value("kept") == 1

    @pytest.mark.parametrize(
        ("code", "type_"),
        [
            ("import sys; sys.exit()", "SystemExit"), ("import sys; sys.exit(3)", "SystemExit"), 
            ("raise SystemExit('bye')", "SystemExit"), ("raise KeyboardInterrupt", "KeyboardInterrupt"),
            ("raise GeneratorExit", "GeneratorExit"), ("raise BaseException('b')", "BaseException"),
            ("class Mine(BaseException): pass\nraise Mine('m')", "Mine"), ("raise StopIteration", "StopIteration"),
            ("raise 5", "TypeError"), ("import asyncio; raise asyncio.CancelledError", "CancelledError"),
            ("import asyncio\nasync def f(): raise SystemExit(1)\nawait f()", "SystemExit"),
        ],
    )  # fmt: skip
    @one_session
    def test_whatever_a_cell_raises_is_its_error_and_costs_no_variable(
        self, repl: Cells, code: str, type_: str
    ) -> None:
        repl.ok("kept, own = 1, None")
        error = repl.error(f"own = 2\n{code}")
        assert (error.kind, error.type) == ("exception", type_)
        assert repl.value("[kept, own]") == [1, 2]

    def test_a_long_message_and_a_deep_traceback_are_bounded(self, repl: Cells) -> None:
        assert len(repl.error("raise ValueError('m' * 10_000_000)").message) < 10_000
        error = repl.error("def f(n): return f(n + 1)\nf(0)")
        assert error.type == "RecursionError"
        assert len(error.traceback) < 50_000

    # --- output ---------------------------------------------------------------------------------------

    def test_stdout_and_stderr_are_kept_apart(self, repl: Cells) -> None:
        result = repl.ok(
            "import sys, warnings\nprint('out')\nprint('err', file=sys.stderr)\nwarnings.warn('careful')"
        )
        assert result.stdout == "out\n"
        assert result.stderr.startswith("err\n")
        assert "careful" in result.stderr

    @requires("processes", "cpython")
    def test_output_keeps_its_order_whoever_wrote_it(self, repl: Cells) -> None:
        code = """
            import os, subprocess, sys, ctypes
            print(1)
            os.system('echo 2')
            sys.stdout.write('3\\n')
            subprocess.run(['echo', '4'])
            os.write(1, b'5\\n')
            sys.stdout.buffer.write(b'6\\n'); sys.stdout.flush()
            ctypes.CDLL(None).dprintf(1, b'7\\n')
            print('8', end='')
        """
        assert repl.ok(code).stdout == "1\n2\n3\n4\n5\n6\n7\n8"

    @requires("processes", "cpython")
    def test_the_errors_of_a_program_are_captured(self, repl: Cells) -> None:
        assert repl.ok("import os\nos.system('echo oops >&2')").stderr == "oops\n"

    def test_a_failing_cell_keeps_what_it_printed(self, repl: Cells) -> None:
        result = repl.run("print('so far', end='')\n1/0")
        assert result.error is not None
        assert result.stdout == "so far"

    def test_each_cell_has_its_own_output(self, repl: Cells) -> None:
        repl.ok("print('one')")
        assert repl.ok("pass").stdout == ""
        assert repl.ok("print('two')").stdout == "two\n"

    @pytest.mark.parametrize(
        "code",
        [
            "sys.stdout = io.StringIO()", "sys.stdout = None", "sys.stdout = object()", "sys.stdout.close()",
            "del sys.stdout", "sys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding='ascii')",
            "sys.stdout = io.TextIOWrapper(sys.stdout.detach())", "sys.stdout.detach()",
            "sys.stdout = open('log', 'w')", "os.close(1)", "os.dup2(os.open('log', 1 | 64), 1)",
        ],
    )  # fmt: skip
    @requires("cpython")
    @one_session
    def test_a_replaced_or_closed_stdout_is_back_in_the_next_cell(self, repl: Cells, code: str) -> None:
        repl.ok("import io, os, sys; kept = 1")
        repl.run(code)
        assert repl.ok("print('hello', kept)").stdout == "hello 1\n"

    def test_redirected_output_goes_where_it_was_sent(self, repl: Cells) -> None:
        result = repl.ok(
            "import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()) as f: print('in')\nprint('out')\nf.getvalue()"
        )
        assert (result.stdout, result.value) == ("out\n", "in\n")

    def test_long_output_keeps_head_and_tail_and_counts_the_gap(self, repl: Cells) -> None:
        size, limit = 5 * self.output_limit, self.output_limit
        out = repl.ok(f"print('HEAD' + 'x' * {size - 8} + 'TAIL', end='')").stdout
        assert out.startswith("HEADx")
        assert out.endswith("xTAIL")
        assert len(out) < limit + 100
        assert f"[{size - limit} bytes of output left out]" in out

    def test_output_at_the_limit_is_whole(self, repl: Cells) -> None:
        assert repl.ok(f"print('y' * {self.output_limit}, end='')").stdout == "y" * self.output_limit

    def test_stdout_and_stderr_are_bounded_each_for_itself(self, repl: Cells) -> None:
        result = repl.ok(f"import sys\nsys.stderr.write('e' * {3 * self.output_limit})\nprint('still here')")
        assert result.stdout == "still here\n"
        assert "left out" in result.stderr

    def test_the_bound_on_output_can_be_set(self, open_cells: OpenCells) -> None:
        out = open_cells("output").ok("print('z' * 1_900_000, end='')").stdout
        assert out == "z" * 1_900_000

    @requires("streaming")
    async def test_output_streams_while_the_cell_runs(self, open_sandbox: OpenSandbox) -> None:
        seen: list[tuple[str, str]] = []
        sandbox = await open_sandbox(on_output=lambda stream, text: seen.append((stream, text)))
        code = "import time\nprint('early')\nwhile True: time.sleep(0.01)"
        cell = asyncio.create_task(sandbox.run(code))
        try:
            await asyncio.to_thread(eventually, lambda: bool(seen) or cell.done())
            assert seen and not cell.done(), "nothing came while the cell ran"
            assert seen[0] == ("stdout", "early\n")
        finally:
            cell.cancel()

    @requires("streaming")
    def test_streamed_output_comes_in_batches_and_adds_up(self, open_cells: OpenCells) -> None:
        seen: list[str] = []
        repl = open_cells(on_output=lambda stream, text: seen.append(text))
        result = repl.ok("import time\nfor i in range(2000):\n    print(i)\n    time.sleep(0.0002)")
        assert 1 <= len(seen) < 500
        assert result.stdout.startswith("".join(seen))

    @requires("streaming", "cpython")
    def test_a_character_cut_between_two_batches_is_whole(self, open_cells: OpenCells) -> None:
        seen: list[str] = []
        code = (
            "import os, time\nos.write(1, b'\\xc3')\ntime.sleep(0.3)\nos.write(1, b'\\xa9')\ntime.sleep(0.3)"
        )
        repl = open_cells(on_output=lambda stream, text: seen.append(text))
        assert repl.ok(code).stdout == "é"
        assert "\ufffd" not in "".join(seen)

    @requires("cpython")
    def test_bytes_that_are_not_utf_8_are_shown_as_replacements(self, repl: Cells) -> None:
        assert repl.ok("import os\nos.write(1, b'a\\xff\\xfeb')").stdout == "a\ufffd\ufffdb"

    def test_lone_surrogates_are_printed_as_escapes(self, repl: Cells) -> None:
        assert repl.ok("print('a\\ud800b')").stdout == "a\\ud800b\n"
        assert repl.error("raise ValueError('\\udfff')").message == "\\udfff"

    def test_any_character_can_be_printed(self, repl: Cells) -> None:
        assert repl.ok("print('é\U0001f600\\x00\\x1b[31m\\r\\n')").stdout == "é\U0001f600\0\x1b[31m\r\n\n"

    def test_there_is_no_input_to_read(self, repl: Cells) -> None:
        assert repl.error("input()").type == "EOFError"
        assert repl.value("import sys\nsys.stdin.read()") == ""

    # --- reserved names -----------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        "how", ["{0} = 5", "del {0}", "del globals()['{0}']", "def {0}(): return 'mine'"]
    )
    def test_a_reserved_name_is_restored_after_the_cell(self, repl: Cells, how: str) -> None:
        repl.repl.add_context("the context")
        repl.ok(f"kept = {{n: id(globals()[n]) for n in {RESERVED}}}")
        for name in RESERVED:
            repl.ok(how.format(name))
        assert repl.value(f"[n for n in {RESERVED} if kept[n] != id(globals()[n])]") == []

    def test_a_rebound_reserved_name_is_the_cells_own_until_its_end(self, repl: Cells) -> None:
        assert repl.value("llm_query = lambda p: 'mine'\nllm_query('x')") == "mine"

    def test_clearing_the_namespace_costs_only_the_cells_own_names(self, repl: Cells) -> None:
        repl.repl.add_context("text")
        repl.run("globals().clear()")
        assert repl.value("class A: pass\nprint('x')\n[context, callable(FINAL)]") == ["text", True]

    def test_answer_may_be_rebound(self, repl: Cells) -> None:
        assert repl.value("answer") == {"content": "", "ready": False}
        assert repl.ok("answer = 'just a value'").final_answer is None
        assert repl.value("answer") == "just a value"
        repl.ok("del answer")
        assert repl.error("answer").type == "NameError"

    def test_show_vars_is_a_dict_and_prints_as_one_line(self, repl: Cells) -> None:
        repl.repl.add_context("text")
        repl.ok("x = 1\n_hidden = 2\ndef f(): ...")
        result = repl.ok(
            "print(SHOW_VARS())\n[isinstance(SHOW_VARS(), dict), SHOW_VARS()['x'], dict(SHOW_VARS())]"
        )
        assert result.stdout == "Available variables: {'answer': 'dict', 'x': 'int', 'f': 'function'}\n"
        assert result.value == [True, "int", {"answer": "dict", "x": "int", "f": "function"}]

    def test_functions_show_their_signature_and_their_help(self, repl: Cells) -> None:
        assert repl.value("import inspect\nstr(inspect.signature(llm_query))").startswith(
            "(prompt: 'str', model: "
        )
        text = repl.ok("help(llm_query)").stdout
        assert "Ask a model" in text
        assert "self" not in text

    @pytest.mark.parametrize("code", ["exit()", "quit()", "exit(3)"])
    def test_exit_ends_the_cell_and_not_the_session(self, repl: Cells, code: str) -> None:
        assert repl.error(f"kept = 1\n{code}").type == "SystemExit"
        assert repl.value("kept") == 1

    # --- contexts -----------------------------------------------------------------------------------------

    @pytest.mark.parametrize("context", CONTEXTS, ids=ascii)
    def test_a_context_arrives_exactly(self, repl: Cells, context: Any) -> None:
        assert repl.repl.add_context(context) == 0
        repl.ok("import datetime")
        assert repl.value(f"(context, type(context)) == ({context!a}, type({context!a}))") is True

    @pytest.mark.parametrize("size", [65_535, 65_536, 70_000, 20_000_000])
    @pytest.mark.parametrize("unit", ["x", "é", "\U0001f600\r\n", b"\0\xff"], ids=ascii)
    def test_a_large_context_arrives_exactly(self, repl: Cells, unit: Any, size: int) -> None:
        repl.repl.add_context(unit * (size // len(unit)) + unit)
        assert repl.value(f"context == {unit!a} * {size // len(unit)} + {unit!a}") is True

    def test_a_large_nested_context_arrives_exactly(self, repl: Cells) -> None:
        repl.repl.add_context([{i: ("x" * 100, {i})} for i in range(10_000)])
        assert repl.value("context == [{i: ('x' * 100, {i})} for i in range(10_000)]") is True

    def test_contexts_are_numbered_and_the_first_is_the_context(self, repl: Cells) -> None:
        assert [repl.repl.add_context(text) for text in ("first", "second", "third")] == [0, 1, 2]
        assert repl.value("[context, context_0, context_1, context_2]") == [
            "first",
            "first",
            "second",
            "third",
        ]

    def test_a_context_may_come_between_cells(self, repl: Cells) -> None:
        repl.ok("x = 1")
        repl.repl.add_context("later")
        assert repl.value("[x, context]") == [1, "later"]

    def test_a_context_that_cannot_travel_is_a_config_error(self, repl: Cells) -> None:
        with pytest.raises(ConfigError, match="pass text, bytes, lists"):
            repl.repl.add_context(lambda: None)
        assert repl.repl.add_context("fine") == 0

    def test_a_context_of_a_type_the_sandbox_lacks_is_a_config_error(self, repl: Cells) -> None:
        with pytest.raises(ConfigError, match="cannot be loaded"):
            repl.repl.add_context(ConfigError("a class of the host's"))
        assert repl.repl.add_context("fine") == 0
        assert repl.value("context") == "fine"

"""Runs: functions and data of the host's in cells, what goes in, what comes out, and what does not."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import enum
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from ..tools import Tools
from .runs import HOUR
from .scripts import QUESTION, cell, family
from .sessions import OpenCells, OpenRLM, OpenSandbox
from .suite import Suite, requires

LARGE = "é" * 5_000_000

RESULTS: dict[str, Any] = {
    "nothing": None,
    "text": "é\0\ud800"[:2],
    "bytes": b"\0\xff",
    "a tuple": (1, (2,)),
    "numbers as keys": {1: "a", (2, 3): {4}},
    "a time": datetime.datetime(2024, 2, 29, 12, tzinfo=datetime.UTC),
    "numbers": [True, 1, 1.5, 10**30, 1j],
    "an empty list": [],
}
"""What tools return, and cells get: the same values, of the same types."""


class Colour(enum.StrEnum):
    """A type that no sandbox has."""

    RED = "red"


@dataclasses.dataclass
class Point:
    """A type that no sandbox has."""

    x: int
    colour: Colour


class Model(BaseModel):
    """A type that no sandbox has."""

    points: list[int]


def generator() -> Iterator[int]:
    """What cannot be sent anywhere."""
    yield 1


UNSENDABLE: dict[str, Any] = {
    "a function": lambda: None,
    "a generator": generator(),
    "a lock": threading.Lock(),
}


class HostTools(Suite):
    """Level runs: functions and data of the host's in cells."""

    level = "runs"

    # --- calls --------------------------------------------------------------------------------------------

    def test_a_function_of_the_hosts_is_called_by_position_and_by_name(self, open_cells: OpenCells) -> None:
        def price(symbol: str, days: int = 7, *more: int, currency: str = "EUR") -> list[Any]:
            return [symbol, days, list(more), currency]

        async def later(symbol: str) -> str:
            await asyncio.sleep(0)
            return f"later {symbol}"

        repl = open_cells(tools={"price": price, "later": later})
        assert repl.value("price('a')") == ["a", 7, [], "EUR"]
        assert repl.value("price('a', 1, 2, 3, currency='USD')") == ["a", 1, [2, 3], "USD"]
        assert repl.value("price(days=2, symbol='b')") == ["b", 2, [], "EUR"]
        assert repl.value("later('a')") == "later a"

    def test_a_function_has_its_name_and_its_documentation_in_the_cell(self, open_cells: OpenCells) -> None:
        def price(symbol: str, days: int = 7) -> float:
            """What a share has cost."""
            return 1.0

        repl = open_cells(tools={"quote": price})
        assert repl.value("[quote.__name__, quote.__doc__]") == [
            "quote", "quote(symbol: str, days: int = 7) -> float\n\nWhat a share has cost.",
        ]  # fmt: skip
        assert "What a share has cost." in repl.ok("help(quote)").stdout

    def test_what_a_function_raises_is_a_tool_error_with_its_type_and_text(
        self, open_cells: OpenCells
    ) -> None:
        def fail(how: str) -> None:
            if how == "file":
                open("/etc/no-such-secret/key").close()
            if how == "path":
                raise ValueError(f"in {__file__}: wrong")
            raise SystemExit(3) if how == "exit" else LookupError("not there: é")

        async def cancel() -> None:
            raise asyncio.CancelledError

        repl = open_cells(tools={"fail": fail, "cancel": cancel})
        code = """
            def kind(call):
                try: call()
                except ToolError as error: return [error.kind, str(error)]
            [kind(lambda: fail('')), kind(lambda: fail('exit')), kind(cancel), kind(lambda: fail('file')),
             kind(lambda: fail('path'))]
            """
        *texts, file, path = repl.value(code)
        assert texts == [
            ["LookupError", "LookupError: not there: é"], ["SystemExit", "SystemExit: 3"],
            ["CancelledError", "CancelledError"],
        ]  # fmt: skip
        assert file == ["FileNotFoundError", "FileNotFoundError: No such file or directory"]
        assert path[1].startswith("ValueError: in ")
        assert path[1].endswith("tools.py: wrong")

    def test_a_failed_call_shows_the_cells_own_line_and_no_path_of_the_hosts(
        self, open_cells: OpenCells
    ) -> None:
        def fail() -> None:
            raise ValueError(f"see {__file__}")

        error = open_cells(tools={"fail": fail}).error("x = 1\nfail()")
        assert error.type == "ToolError"
        assert '"<cell 1>", line 2' in error.traceback
        assert __file__ not in error.traceback + error.message

    def test_waiting_for_a_tool_is_not_computing(self, open_cells: OpenCells) -> None:
        async def slow() -> int:
            await asyncio.sleep(0.4)
            return 1

        def blocking() -> int:
            time.sleep(0.4)
            return 2

        repl = open_cells(tools={"slow": slow, "blocking": blocking})
        assert repl.value("slow() + blocking()", timeout=0.3) == 3

    @requires("threads")
    def test_threads_of_a_cell_call_at_the_same_time(self, open_cells: OpenCells) -> None:
        together = threading.Barrier(8)

        def meet(number: int) -> int:
            together.wait(20)
            return number

        code = """
            from concurrent.futures import ThreadPoolExecutor
            with ThreadPoolExecutor(8) as pool: found = list(pool.map(meet, range(8)))
            found
            """
        assert open_cells(tools={"meet": meet}).value(code) == list(range(8))

    # --- arguments ----------------------------------------------------------------------------------------

    def test_wrong_arguments_are_an_error_that_says_what_is_wrong_and_call_nothing(
        self, open_cells: OpenCells
    ) -> None:
        called = []

        def price(symbol: str, days: int = 7) -> None:
            called.append(symbol)

        repl = open_cells(tools={"price": price})
        for call, kind, words in [
            ("price()", "ToolError", "missing a required argument: 'symbol'"),
            ("price('a', 1, 2)", "ToolError", "too many positional arguments"),
            ("price('a', day=1)", "ToolError", "unexpected keyword argument 'day'"),
            ("price('a', 'many')", "ToolError", "days: Input should be a valid integer"),
            ("price(5)", "ToolError", "symbol: Input should be a valid string"),
            ("price({1, 2})", "TypeError", "price() takes plain data"),
            ("price(lambda: 1)", "TypeError", "price() takes plain data"),
        ]:
            error = repl.error(call)
            assert error.type == kind
            assert words in error.message
        assert called == []

    def test_arguments_become_what_the_annotations_say(self, open_cells: OpenCells) -> None:
        seen = []

        def take(number: int, day: datetime.date, pair: tuple[int, str], model: Model, anything: Any) -> None:
            seen.append([number, day, pair, model, anything])

        repl = open_cells(tools={"take": take})
        repl.ok("take('5', '2024-02-29', [1, 'a'], {'points': [1]}, {'a': (1,)})")
        assert seen == [[5, datetime.date(2024, 2, 29), (1, "a"), Model(points=[1]), {"a": [1]}]]

    # --- results ------------------------------------------------------------------------------------------

    def test_results_are_the_same_values_of_the_same_types(self, open_cells: OpenCells) -> None:
        repl = open_cells(tools={"get": RESULTS.__getitem__, "large": lambda: LARGE})
        repl.ok("import datetime")
        for name, value in RESULTS.items():
            assert repl.value(f"found = get({name!r})\n[found == {value!r}, repr(found)]") == [
                True,
                repr(value),
            ]
        assert repl.value("large() == 'é' * 5_000_000") is True

    def test_types_of_the_hosts_own_become_plain_data(self, open_cells: OpenCells) -> None:
        given = {"model": Model(points=[1]), "points": (Point(1, Colour.RED),), "colour": Colour.RED}
        repl = open_cells(tools={"get": lambda name: given[name]})
        assert repl.value("[get('model'), str(get('points')), type(get('colour')).__name__]") == [
            {"points": [1]}, "({'x': 1, 'colour': 'red'},)", "str",
        ]  # fmt: skip

    def test_a_result_that_cannot_travel_is_an_error_that_says_so(self, open_cells: OpenCells) -> None:
        repl = open_cells(tools={"get": UNSENDABLE.__getitem__})
        for name in UNSENDABLE:
            error = repl.error(f"get({name!r})")
            assert error.type == "ToolError"
            assert "cannot be sent to a sandbox" in error.message
        assert repl.value("1") == 1

    # --- data ---------------------------------------------------------------------------------------------

    def test_data_of_the_hosts_is_a_variable_like_any_other(self, open_cells: OpenCells) -> None:
        repl = open_cells(tools={"table": {1: (2, 3)}, "words": {"tool": ["a"], "description": "A list."}})
        assert repl.value("[table == {1: (2, 3)}, words]") == [True, ["a"]]
        repl.ok("words.append('b')\ntable = 5")
        assert repl.value("[table, words, 'table' in SHOW_VARS()]") == [5, ["a", "b"], True]

    @requires("cpython")
    def test_data_and_functions_are_there_after_a_cell_that_died(self, open_cells: OpenCells) -> None:
        repl = open_cells(tools={"table": [1], "get": lambda: "got"})
        repl.ok("table = [2]")
        repl.run("import os; os._exit(1)")
        kept = [2] if "rollback" in self.capabilities else [1]
        assert repl.value("[table, get()]") == [kept, "got"]

    # --- names --------------------------------------------------------------------------------------------

    def test_a_function_that_is_rebound_is_there_again_in_the_next_cell(self, open_cells: OpenCells) -> None:
        repl = open_cells(tools={"get": lambda: "got"})
        assert repl.value("get = 5\nget") == 5
        assert repl.value("get()") == "got"
        repl.ok("del get")
        assert repl.value("[get(), 'get' in SHOW_VARS()]") == ["got", False]

    def test_children_have_their_parents_tools_or_those_that_are_theirs(self, open_rlm: OpenRLM) -> None:
        def names(**settings: Any) -> list[str]:
            look = "[name for name in ('get', 'table', 'other') if name in globals()]"
            root = cell(f"FINAL([str({look}), rlm_query('one'), rlm_query('two')])")
            rlm = open_rlm(family(root, cell(f"FINAL({look})")), max_depth=2, custom_tools=tools, **settings)
            found: list[str] = rlm.completion("c", QUESTION).value
            return found

        tools = {"get": lambda: 1, "table": [1]}
        assert names() == ["['get', 'table']"] * 3
        assert names(custom_sub_tools={}) == ["['get', 'table']", "[]", "[]"]
        assert names(custom_sub_tools={"other": [2]}) == ["['get', 'table']", "['other']", "['other']"]

    def test_a_child_calls_the_tools_of_children_and_not_its_parents(self, open_rlm: OpenRLM) -> None:
        model = family(cell("FINAL([who(), rlm_query('q')])"), cell("FINAL(who())"))
        tools, sub_tools = {"who": lambda: "root"}, {"who": lambda: "child"}
        rlm = open_rlm(model, max_depth=2, custom_tools=tools, custom_sub_tools=sub_tools)
        assert rlm.completion("c", QUESTION).value == ["root", "child"]

    @pytest.mark.parametrize("depth", [1, 2])
    def test_the_model_is_told_of_tools(self, open_rlm: OpenRLM, depth: int) -> None:
        """Signature and description of each, of the root's and of a child's."""

        def price(symbol: str) -> float:
            """What a share costs."""
            return 1.0

        seen = []

        def say(messages: Any) -> str:
            seen.append(messages[0].content)
            return cell("FINAL(rlm_query('q'))") if len(seen) < depth else cell("FINAL(1)")

        tools = {"price": price, "table": {"tool": [1], "description": "Some numbers."}}
        open_rlm(family(say, say), max_depth=2, custom_tools=tools).completion("c", QUESTION)
        assert "`price(symbol: str) -> float`: What a share costs." in seen[-1]
        assert "`table`: Some numbers." in seen[-1]

    # --- the end ------------------------------------------------------------------------------------------

    @requires("cpython", "threads")
    async def test_a_cell_that_dies_cancels_the_calls_of_its_tools(self, open_sandbox: OpenSandbox) -> None:
        begun, cancelled = asyncio.Event(), asyncio.Event()

        async def wait() -> None:
            begun.set()
            try:
                await asyncio.sleep(HOUR)
            finally:
                cancelled.set()

        tools = Tools.parse({"wait": wait, "until_begun": begun.wait})
        sandbox = await open_sandbox(_serving(tools), tools=tools)
        await sandbox.run(
            "import os, threading\nthreading.Thread(target=wait).start(); until_begun(); os._exit(1)"
        )
        async with asyncio.timeout(20):
            await cancelled.wait()
        assert await sandbox.value("until_begun()") is True

    async def test_cancelling_a_cell_cancels_the_tool_that_it_waits_for(
        self, open_sandbox: OpenSandbox
    ) -> None:
        begun, cancelled = asyncio.Event(), asyncio.Event()

        async def wait() -> None:
            begun.set()
            try:
                await asyncio.sleep(HOUR)
            finally:
                cancelled.set()

        tools = Tools.parse({"wait": wait, "get": lambda: "on"})
        sandbox = await open_sandbox(_serving(tools), tools=tools)
        task = asyncio.create_task(sandbox.run("wait()"))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(20):
            await cancelled.wait()
        assert await sandbox.value("get()") == "on"

    # --- forgeries ----------------------------------------------------------------------------------------

    @requires("cpython")
    def test_a_call_of_a_tool_that_there_is_not_is_an_error_of_its_cell(self, open_cells: OpenCells) -> None:
        repl = open_cells(tools={"get": lambda: "got", "data": [1]})
        code = """
            import gc
            calls = next(thing for thing in gc.get_objects() if type(thing).__name__ == 'Calls')
            found = []
            for name in {0!r}:
                reply, _ = calls.call({{'fn': 'tool', 'tool': name}}, [b'[[], {{}}]'])
                found.append(reply.get('error'))
            for arguments in {1!r}:
                reply, _ = calls.call({{'fn': 'tool', 'tool': 'get'}}, [arguments.encode()])
                found.append(reply.get('error'))
            found
            """
        names = ["data", "llm_query", "__init__", "get.__class__", "call", ""]
        deep = "[" * 100_000
        arguments = [
            "",
            "{",
            "5",
            "[]",
            "[[], []]",
            "[[], {}, 1]",
            "[{}, {}]",
            "[[1], {}]",
            '[[], {"self": 1}]',
        ]
        found = repl.value(code.format(names, [*arguments, deep]))
        kinds = [error and error[0] for error in found]
        assert kinds == ["NameError"] * len(names) + ["TypeError"] * (len(arguments) + 1)
        assert repl.value("get()") == "got"


def _serving(tools: Tools) -> Any:
    """Serves the calls of tools, and of nothing else."""

    async def serve(call: Any, texts: list[str]) -> list[Any]:
        return [await tools.call(call.tool, texts[0])]

    return serve

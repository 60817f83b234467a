"""Facts about tools: how they are given, what the model is told of them, and what a call of one does."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import enum
import functools
import json
import math
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlm import tools as tools_module
from rlm.errors import ConfigError, ToolError
from rlm.tools import RESERVED, Tools

PATIENCE = 20


class Point(pydantic.BaseModel):
    x: int
    y: int = 0


@dataclasses.dataclass(frozen=True)
class Pair:
    left: Any
    right: Any = None


class Color(enum.StrEnum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


def tool(call: Any, name: str = "f") -> Tools:
    return Tools.parse({name: call})


def shown(call: Any) -> str:
    """The signature that the model is told."""
    return tool(call).functions["f"].signature


async def use(call: Any, *args: Any, **kwargs: Any) -> Any:
    """What a cell gets that calls this function."""
    form, data = await tool(call).call("f", json.dumps([args, kwargs]))
    return {"text": bytes.decode, "bytes": bytes, "pickle": pickle.loads}[form](data)


async def failure(call: Any, *args: Any, **kwargs: Any) -> tuple[str, str]:
    with pytest.raises(ToolError) as caught:
        await use(call, *args, **kwargs)
    return caught.value.kind, str(caught.value)


def raising(error: BaseException) -> Any:
    def fail() -> None:
        raise error

    return fail


# --- what is given -----------------------------------------------------------------------------


def test_what_can_be_called_is_a_function_and_all_else_is_data() -> None:
    tools = Tools.parse({"f": len, "n": 5, "table": {"a": [1]}, "o": Point})
    assert list(tools.functions) == ["f", "o"]
    assert tools.values == {"n": 5, "table": {"a": [1]}}


@pytest.mark.parametrize("given", [None, {}])
def test_no_tools_are_none(given: Any) -> None:
    tools = Tools.parse(given)
    assert not tools
    assert tools.described() == ""


def test_a_description_takes_the_place_of_the_docstring() -> None:
    tools = Tools.parse({"f": {"tool": len, "description": "How long it is."}, "n": {"tool": 1}})
    assert tools.described() == "- `f(obj, /)`: How long it is.\n- `n`: a value of type int"


@pytest.mark.parametrize("entry", [{"tool": 1, "other": 2}, {"description": "d"}, {"Tool": 1}, {}])
def test_a_dict_of_another_form_is_data(entry: dict[str, Any]) -> None:
    assert Tools.parse({"d": entry}).values == {"d": entry}


@pytest.mark.parametrize("name", ["", "a b", "1a", "a-b", "if", "None", "x.y", "a\n", 5, None, ("a",)])
def test_a_tool_has_a_name_that_a_program_can_use(name: Any) -> None:
    with pytest.raises(ConfigError, match="is no name that a program can use"):
        Tools.parse({name: len})


@pytest.mark.parametrize("name", [*sorted(RESERVED), "context_0", "context_17", "history_3"])
def test_what_every_session_has_is_no_name_for_a_tool(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name!r} is the name of something that every session has"):
        Tools.parse({name: len})


@pytest.mark.parametrize(
    "name", ["contexts", "context_", "context_x", "my_context_0", "größe", "match", "_f"]
)
def test_names_that_only_look_taken_are_free(name: str) -> None:
    assert Tools.parse({name: len}).functions


@pytest.mark.parametrize("name", ["__builtins__", "__name__", "__f"])
def test_names_of_pythons_own_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="is Python's own"):
        Tools.parse({name: len})


@pytest.mark.parametrize("name", ["\N{LATIN SMALL LIGATURE FI}nd", "llm_qu\N{MATHEMATICAL BOLD SMALL E}ry"])
def test_a_name_that_python_reads_as_another_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="Python reads its letters as others"):
        Tools.parse({name: len})


def test_data_that_cannot_travel_is_refused_by_its_name() -> None:
    with pytest.raises(ConfigError, match="'lock', a lock, is neither a function nor data"):
        Tools.parse({"lock": threading.Lock()})


@pytest.mark.parametrize("description", [5, ["d"], b"d"])
def test_a_description_is_a_text(description: Any) -> None:
    with pytest.raises(ConfigError, match="the description of the tool 'f' is a text"):
        Tools.parse({"f": {"tool": len, "description": description}})


# --- what the model is told --------------------------------------------------------------------


def price(symbol: str, days: int = 7, *rest: Literal["a", "b"], key: Point | None = None, **more: Any) -> dict[str, float]:  # fmt: skip # noqa: E501 - everything
    """The price of a stock.

    On each of the last days.
    """
    raise NotImplementedError


WITHOUT_SYMBOL = (
    "days: int = 7, *rest: Literal['a', 'b'], key: Point | None = None, **more: Any) -> dict[str, float]"
)


class Service:
    """A service."""

    def __init__(self, url: str = "x") -> None:
        self.url = url

    def __call__(self, number: int) -> int:
        """Double it."""
        return number * 2

    def method(self, number: int) -> int:
        return number + 1

    @classmethod
    def of_class(cls, number: int) -> int:
        return number + 2

    @staticmethod
    def static(number: int) -> int:
        return number + 3


@pytest.mark.parametrize(
    ("call", "signature"),
    [
        (price, f"(symbol: str, {WITHOUT_SYMBOL}"),
        (lambda a, /, b, *, c=1: None, "(a, /, b, *, c=1)"),
        (Service(), "(number: int) -> int"),
        (Service().method, "(number: int) -> int"),
        (Service.of_class, "(number: int) -> int"),
        (Service.static, "(number: int) -> int"),
        (Service, "(url: str = 'x') -> None"),
        (functools.partial(price, "X"), f"({WITHOUT_SYMBOL}"),
        (Point, "(*, x: int, y: int = 0) -> None"),
        (len, "(obj, /)"),
        (max, "(...)"),
    ],
    ids=lambda value: "" if isinstance(value, str) else getattr(value, "__name__", type(value).__name__),
)  # fmt: skip
def test_a_signature_is_shown_as_it_is_written(call: Any, signature: str) -> None:
    assert shown(call) == signature


def test_types_are_shown_without_their_modules() -> None:
    def f(a: datetime.date, b: dict[str, Path], c: Annotated[int, "x.y"] = 1) -> None: ...

    f.__annotations__ = {"a": datetime.date, "b": dict[str, Path], "c": int | None, "return": list[Point]}
    assert shown(f) == "(a: date, b: dict[str, Path], c: int | None = 1) -> list[Point]"


@pytest.mark.parametrize(
    "default",
    [object(), Path("/home/me/x"), "/home/me/secret.db", "file:///etc/passwd", ["/tmp/x/y"], "x" * 300, len],
    ids=lambda value: type(value).__name__,
)
def test_a_default_tells_nothing_of_this_machine(default: Any) -> None:
    def f(a=default): ...  # type: ignore[no-untyped-def]

    assert shown(f) == "(a=...)"


@pytest.mark.parametrize("default", [1, -0.5, True, None, "text", "a/b", "https://x.org/a/b", Color.RED])
def test_a_plain_default_is_shown(default: Any) -> None:
    def f(a=default): ...  # type: ignore[no-untyped-def]

    assert shown(f) == f"(a={default!r})"


def test_the_prompt_has_a_line_for_each_tool() -> None:
    described = Tools.parse(
        {"price": price, "fn": lambda: 1, "text": "a\nb", "n": {"tool": [1], "description": "d"}}
    )
    assert described.described().splitlines() == [
        f"- `price{shown(price)}`: The price of a stock. On each of the last days.",
        "- `fn()`: a function",
        "- `text`: a str of 3 characters (2 lines)",
        "- `n`: d",
    ]


def test_a_cell_gets_the_name_the_signature_and_the_documentation() -> None:
    stubs = json.loads(Tools.parse({"price": price, "n": 1}).stubs())
    assert stubs == {
        "price": f"price{shown(price)}\n\nThe price of a stock.\n\nOn each of the last days.",
    }


# --- calls -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "args", "kwargs", "value"),
    [
        (lambda a, b=2, *c, **d: [a, b, c, d], (1, 3, 4), {"e": 5}, [1, 3, (4,), {"e": 5}]),
        (lambda a, /, *, b: a - b, (3,), {"b": 1}, 2),
        (Service(), (4,), {}, 8),
        (Service().method, (4,), {}, 5),
        (Service.of_class, (4,), {}, 6),
        (Service.static, (4,), {}, 7),
        (functools.partial(Service.static, number=1), (), {}, 4),
        (functools.partial(divmod, 7), (2,), {}, (3, 1)),
        (len, ([1, 2],), {}, 2),
        (math.sqrt, (4,), {}, 2.0),
        (max, (1, 5, 2), {}, 5),
        (dict, (), {"self": 1}, {"self": 1}),
        (Point, (), {"x": 1}, {"x": 1, "y": 0}),
    ],
)
async def test_whatever_can_be_called_is_called(call: Any, args: Any, kwargs: Any, value: Any) -> None:
    assert await use(call, *args, **kwargs) == value


async def test_arguments_become_what_the_annotations_say() -> None:
    def f(n: int, when: datetime.date, point: Point, pair: Pair, *rest: float, color: Color) -> str:
        return repr((n, when, point, pair, rest, color))

    told = await use(f, "3", "2026-01-02", {"x": "1"}, {"left": 1}, 1, "2.5", color="red")
    assert told == repr((3, datetime.date(2026, 1, 2), Point(x=1), Pair(1), (1.0, 2.5), Color.RED))


async def test_annotations_as_text_are_looked_up_where_the_function_is_written() -> None:
    def f(a: Point, b: "int" = 0) -> Point:  # noqa: UP037 - text of text
        return Point(x=a.x + b)

    assert await use(f, {"x": 1}, b="2") == {"x": 3, "y": 0}


async def test_annotations_that_are_no_types_are_no_check() -> None:
    def f(a, b=1, c=2):  # type: ignore[no-untyped-def]
        return [a, b, c]

    for annotation in ("a number", "Nowhere", 5, "1 +", [], Ellipsis):
        f.__annotations__ = {"a": annotation, "c": int}
        assert await use(f, "x", c=3) == ["x", 1, 3]


@pytest.mark.parametrize(
    ("args", "kwargs", "complaint"),
    [
        ((), {}, "f(): missing a required argument: 'number'"),
        ((1, 2), {}, "f(): too many positional arguments"),
        ((1,), {"number": 2}, "f(): multiple values for argument 'number'"),
        ((1,), {"nmber": 2}, "f(): got an unexpected keyword argument 'nmber'"),
        (("x",), {}, "f(): number: Input should be a valid integer, unable to parse string as an integer"),
        ((), {"number": None}, "f(): number: Input should be a valid integer"),
        (([1],), {}, "f(): number: Input should be a valid integer"),
    ],
)
async def test_wrong_arguments_are_told_what_is_wrong(args: Any, kwargs: Any, complaint: str) -> None:
    assert await failure(Service().method, *args, **kwargs) == ("TypeError", complaint)


async def test_a_complaint_names_the_place_and_not_the_value() -> None:
    def f(points: list[Point]) -> None: ...

    _, text = await failure(f, [{"x": 1}, {"x": "/etc/secret", "y": {}}])
    assert text == (
        "f(): points.1.x: Input should be a valid integer, unable to parse string as an integer; "
        "points.1.y: Input should be a valid integer"
    )


async def test_thousands_of_complaints_are_one() -> None:
    def f(numbers: list[int]) -> None: ...

    assert await failure(f, ["x"] * 5000) == ("TypeError", "f(): much is wrong with these arguments")


@pytest.mark.parametrize(
    "arguments",
    ["", "{", "5", "null", "[]", "[[]]", "[[], []]", "[{}, []]", "[[], {}, 1]", '["ab", {}]', "[" * 100_000,
     "[[" + "9" * 5000 + "], {}]", "\0", "[[\ud800], {}]"],
    ids=lambda text: text[:10],
)  # fmt: skip
async def test_arguments_of_another_form_are_refused(arguments: str) -> None:
    with pytest.raises(ToolError, match="these are no arguments"):
        await tool(len).call("f", arguments)


@pytest.mark.parametrize("name", ["g", "", None, "__class__", "f "])
async def test_a_tool_that_there_is_not_is_an_error(name: str | None) -> None:
    with pytest.raises(ToolError, match="there is no tool") as caught:
        await tool(len).call(name, "[[], {}]")
    assert caught.value.kind == "NameError"


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda item: st.lists(item) | st.dictionaries(st.text(), item),
    max_leaves=8,
)
everything = Tools.parse(
    {"price": price, "a": Service(), "b": Service, "c": Point, "d": functools.partial(price, "x"), "e": len,
     "f": max, "g": lambda *a, **k: [a, k], "h": lambda a, p: (a, p), "i": isinstance}
)  # fmt: skip


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(sorted(everything.functions)),
    plain | st.tuples(st.lists(plain), st.dictionaries(st.text(), plain)),
)
def test_any_arguments_raise_a_tool_error_or_none(name: str, arguments: Any) -> None:
    async def call() -> None:
        with contextlib.suppress(ToolError):
            await everything.call(name, json.dumps(arguments))

    asyncio.run(call())


@settings(deadline=None)
@given(st.text())
def test_any_text_for_arguments_raises_a_tool_error_or_none(arguments: str) -> None:
    async def call() -> None:
        with contextlib.suppress(ToolError):
            await everything.call("g", arguments)

    asyncio.run(call())


async def test_a_long_text_is_taken_and_millions_of_values_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools_module, "ARGUMENTS_LIMIT", 1000)
    monkeypatch.setattr(tools_module, "VALUES_LIMIT", 100)
    assert await use(len, "x" * 10_000) == 10_000
    assert await use(len, [0] * 300) == 300  # not even a thousand characters
    kind, text = await failure(len, [0] * 1000)
    assert (kind, text) == ("ValueError", "f() takes no more than 100 values at a time")


# --- what comes back ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        ("text\ud800", "text\ud800"),
        (b"bytes", b"bytes"),
        (None, None),
        (True, True),
        (1.5, 1.5),
        ({1: (2, {3})}, {1: (2, {3})}),
        (datetime.date(2026, 1, 2), datetime.date(2026, 1, 2)),
        (Point(x=1), {"x": 1, "y": 0}),
        ([Point(x=1)], [{"x": 1, "y": 0}]),
        (Pair(Pair(1), [Point(x=2)]), {"left": {"left": 1, "right": None}, "right": [{"x": 2, "y": 0}]}),
        (Color.RED, "red"),
        ({"level": Level.HIGH}, {"level": 3}),
    ],
)  # fmt: skip
async def test_a_result_comes_as_plain_data(returned: Any, got: Any) -> None:
    def read(data: bytes) -> Any:
        return data.decode("utf-8", "surrogatepass")

    form, data = await tool(lambda: returned).call("f", "[[], {}]")
    value = {"text": read, "bytes": bytes, "pickle": pickle.loads}[form](data)
    assert value == got
    assert type(value) is type(got)


def cycle() -> Any:
    found: list[Any] = []
    found.append(found)
    return found


class Exploding:
    def __reduce__(self) -> Any:
        raise SystemExit("while it is pickled")


class ExplodingModel:
    def model_dump(self) -> Any:
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    "returned",
    [threading.Lock(), lambda: 1, (n for n in ""), cycle(), {Pair(1)}, Exploding(), ExplodingModel()],
    ids=lambda value: type(value).__name__,
)
async def test_a_result_that_cannot_travel_is_a_tool_error(returned: Any) -> None:
    async def awaited() -> Any:
        return returned

    for call in (lambda: returned, awaited):
        kind, text = await failure(call)
        assert kind == "TypeError"
        assert text.startswith(f"f() returned a {type(returned).__name__}, which cannot be sent to a sandbox")


# --- what goes wrong ---------------------------------------------------------------------------


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise SystemExit("not even its text")


ENDINGS: list[tuple[BaseException, str, str]] = [
    (ValueError("too bad"), "ValueError", "ValueError: too bad"),
    (ValueError(), "ValueError", "ValueError"),
    (KeyError("k"), "KeyError", "KeyError: 'k'"),
    (SystemExit(3), "SystemExit", "SystemExit: 3"),
    (KeyboardInterrupt(), "KeyboardInterrupt", "KeyboardInterrupt"),
    (StopIteration("s"), "StopIteration", "StopIteration: s"),
    (StopAsyncIteration(), "StopAsyncIteration", "StopAsyncIteration"),
    (GeneratorExit(), "GeneratorExit", "GeneratorExit"),
    (asyncio.CancelledError(), "CancelledError", "CancelledError"),
    (TimeoutError("slow"), "TimeoutError", "TimeoutError: slow"),
    (PermissionError(13, "Denied", "/home/me/x"), "PermissionError", "PermissionError: Denied"),
    (Unspeakable(), "Unspeakable", "Unspeakable: (its text could not be had: SystemExit)"),
    (ToolError("mine"), "ToolError", "ToolError: mine"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "kind", "text"), ENDINGS, ids=[kind for _, kind, _ in ENDINGS])
@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
async def test_whatever_a_tool_raises_is_a_tool_error(
    error: BaseException, kind: str, text: str, is_async: bool
) -> None:
    async def fail() -> None:
        raise error

    assert await failure(fail if is_async else raising(error)) in [
        (kind, text),
        ("RuntimeError", f"RuntimeError: coroutine raised {kind}"),  # what Python makes of a StopIteration
    ]


async def test_whatever_a_validator_raises_is_a_tool_error() -> None:
    def refuse(value: Any) -> Any:
        raise SystemExit("/root/secret/list says no")

    async def f(a: Any) -> None: ...

    f.__annotations__ = {"a": Annotated[int, pydantic.BeforeValidator(refuse)]}
    assert await failure(f, 1) == ("TypeError", "f(): …/list says no")


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("cannot open /usr/lib/python3/x.py", "cannot open …/x.py"),
        ("'/etc/passwd' and /tmp/a/b/", "'…/passwd' and …/b"),
        ("file:///usr/share/x", "…/x"),
        ("see https://example.org/usr/lib", "see https://example.org/usr/lib"),
        ("GET /api/v1/users", "GET /api/v1/users"),
        ("1/2/3 and a/b/c and / and //", "1/2/3 and a/b/c and / and //"),
        ("x" * 10_000, "x" * 4000),
    ],
)
async def test_an_exception_names_no_folder_of_this_machine(said: str, told: str) -> None:
    assert await failure(raising(RuntimeError(said))) == ("RuntimeError", f"RuntimeError: {told}")


# --- threads and loops -------------------------------------------------------------------------


async def test_a_function_that_waits_holds_up_nobody() -> None:
    free = threading.Event()
    waiting = asyncio.create_task(use(lambda: free.wait(PATIENCE)))
    assert await use(lambda: threading.current_thread() is threading.main_thread()) is False
    free.set()
    assert await waiting is True


async def test_functions_run_side_by_side() -> None:
    barrier = threading.Barrier(20)
    tools = tool(lambda: barrier.wait(PATIENCE) >= 0)
    assert len(await asyncio.gather(*(tools.call("f", "[[], {}]") for _ in range(20)))) == 20


async def test_a_coroutine_function_is_awaited_on_the_loop() -> None:
    loop = asyncio.get_running_loop()

    class Awaited:
        async def __call__(self) -> bool:
            await asyncio.sleep(0)
            return asyncio.get_running_loop() is loop

    async def f() -> bool:
        return await Awaited()()

    for call in (f, Awaited(), functools.partial(f), lambda: f()):
        assert await use(call) is True


async def test_a_class_whose_objects_are_coroutine_functions_is_none_itself() -> None:
    @dataclasses.dataclass
    class Later:
        n: int

        async def __call__(self) -> None: ...

    assert await use(Later, 1) == {"n": 1}


async def test_a_call_that_is_cancelled_cancels_its_coroutine() -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def f() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    task = asyncio.create_task(use(f))
    await begun.wait()
    task.cancel()
    await ended.wait()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_call_that_is_cancelled_leaves_its_thread_to_itself() -> None:
    begun, free, ended = threading.Event(), threading.Event(), threading.Event()

    def f() -> None:
        begun.set()
        free.wait(PATIENCE)
        ended.set()

    task = asyncio.create_task(use(f))
    assert await asyncio.to_thread(begun.wait, PATIENCE)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    free.set()
    assert await asyncio.to_thread(ended.wait, PATIENCE)


def test_tools_work_in_a_fork_and_keep_no_process_from_ending() -> None:
    script = """
        import asyncio, os, time
        from rlm.tools import Tools
        tools = Tools.parse({"pid": os.getpid, "rest": lambda: time.sleep(3600)})
        async def work():
            resting = asyncio.create_task(tools.call("rest", "[[], {}]"))
            for _ in range(3):
                await tools.call("pid", "[[], {}]")
            resting.cancel()
        asyncio.run(work())
        pid = os.fork()
        if pid == 0:
            asyncio.run(work())
            print("works in a fork", flush=True)
        else:
            os.waitpid(pid, 0)
            print("ended")
        """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=dict(os.environ))
    assert done.stdout.splitlines() == ["works in a fork", "ended"], done.stderr

"""Runs: children and what they are given, what bounds a tree of runs, and how it ends."""

# ruff: noqa: E501 (a table of cells reads best with one to a line)

from __future__ import annotations

import asyncio
import textwrap
from collections.abc import Iterable, Sequence

import pytest
from pydantic import BaseModel

from rlm_scripted import ScriptedLM

from ..client import Message
from ..environment import BaseEnv, SupportsPersistence, SupportsReset, SupportsSnapshot
from ..errors import (
    BudgetExceeded,
    ConfigError,
    MaxCallsExceeded,
    ModelError,
    RLMError,
    TimeoutExceeded,
)
from ..events import AnyEvent, ModelReplied, ModelRequested, RunFinished, RunStarted, SandboxStarted
from .scripts import QUESTION, cell, family, turns
from .sessions import OpenRLM, OpenSandbox
from .suite import Suite, requires

HOUR = 3600.0

PROTOCOLS = {"persistence": SupportsPersistence, "snapshots": SupportsSnapshot, "reset": SupportsReset}

DIRT: dict[str, tuple[tuple[str, ...], str, str]] = {
    "a variable": ((), "mine = 1", "'mine' in globals()"),
    "a name of the framework's": ((), "FINAL_VAR = 5", "type(FINAL_VAR).__name__"),
    "a draft": ((), "answer['content'] = 'mine'", "answer['content']"),
    "a builtin": ((), "import builtins; builtins.abs = len", "abs(-1)"),
    "a module's function": ((), "import bisect; bisect.bisect = len", "__import__('bisect').bisect([1], 2)"),
    "a module": ((), "import sys; sys.modules['mine'] = sys", "'mine' in __import__('sys').modules"),
    "sys.path": ((), "import sys; sys.path.insert(0, '/mine')", "'/mine' in __import__('sys').path"),
    "an environment variable": (("processes",), "import os; os.environ['MINE'] = '1'", "__import__('subprocess').getoutput('echo $MINE')"),
    "the umask": ((), "import os; os.umask(0)", "[u := __import__('os').umask(63), __import__('os').umask(u)][0]"),
    "a signal's handler": ((), "import signal; signal.signal(10, signal.SIG_IGN)", "str(__import__('signal').getsignal(10))"),
    "a limit": ((), "import resource; resource.setrlimit(7, (50, 60))", "__import__('resource').getrlimit(7)[1] > 60"),
    "a file": (("files",), "open('mine', 'w').close()", "__import__('os').listdir()"),
    "a file elsewhere": (("files", "isolation"), "import os\nfor folder in {0}:\n    with contextlib.suppress(OSError): open(folder + '/mine', 'w').close()", "[d for d in {0} if __import__('os').path.exists(d + '/mine')]"),
    "the working directory": (
        ("files",),
        "import os; here = os.getcwd(); os.mkdir('deep'); os.chdir('deep')\nwith contextlib.suppress(OSError): os.chmod(here, 0)",
        "[__import__('os').path.basename(__import__('os').getcwd()) == 'deep', __import__('os').access('.', 2)]",
    ),
}  # fmt: skip
"""What a run may leave behind: which capabilities it takes, how it does that, and how the next one would see it."""

ELSEWHERE = ["/dev/shm", "/dev/mqueue", "/tmp", "/var/tmp", "/run"]


class Answer(BaseModel):
    """What replies are to be, in tests of schemas."""

    number: int


SCHEMA = {"type": "object", "properties": {"number": {"type": "integer"}}, "required": ["number"]}

FAN = cell("answer['content'] = 'so far'\nfound = rlm_query_batched([f'part {i}' for i in range(5)])")


def kinds_of(call: str) -> str:
    """A cell that submits the replies of a batch, and in place of a failed one its kind."""
    return cell(f"FINAL([getattr(reply, 'kind', reply) for reply in {call}])")


def runs_of(events: Iterable[AnyEvent], kind: type[AnyEvent]) -> list[str]:
    """The runs that have an event of this kind, in order."""
    return [event.run for event in events if isinstance(event, kind)]


class Runs(Suite):
    """Level runs: child runs, limits of a whole tree, and its end."""

    level = "runs"

    def test_what_is_claimed_of_sessions_is_what_is_implemented(self, environment: BaseEnv) -> None:
        implemented = {name for name, protocol in PROTOCOLS.items() if isinstance(environment, protocol)}
        assert implemented == set(PROTOCOLS) & set(self.capabilities)

    def test_only_an_environment_that_keeps_sessions_has_them(self, open_rlm: OpenRLM) -> None:
        rlm = open_rlm(ScriptedLM(cell("FINAL(1)")))
        if "persistence" in self.capabilities:
            rlm.session().close()
        else:
            with pytest.raises(ConfigError, match="SupportsPersistence"):
                rlm.session()

    # --- children -----------------------------------------------------------------------------------------

    def test_a_child_has_a_sandbox_of_the_same_kind_and_its_own_context_and_question(
        self, open_rlm: OpenRLM
    ) -> None:
        root = cell(
            "mine = 1\nreply = rlm_query('How many letters?', context='abc')\nFINAL([reply, context, mine])"
        )
        child = cell("FINAL([context, 'mine' in globals()])\nmine = 2")
        result = open_rlm(family(root, child), max_depth=2).completion("of the root", QUESTION)
        assert result.value == ["['abc', False]", "of the root", 1]
        boxes = [(e.environment, e.level) for e in result.trace if isinstance(e, SandboxStarted)]
        assert len(boxes) == 2
        assert boxes[0] == boxes[1]
        asked = [e for e in result.trace if isinstance(e, ModelRequested) and e.depth == 1]
        assert "How many letters?" in asked[0].messages[1].content

    def test_a_childs_context_is_its_prompt_when_it_is_given_none(self, open_rlm: OpenRLM) -> None:
        model = family(cell("FINAL(rlm_query('Count to three.'))"), cell("FINAL(context)"))
        assert open_rlm(model, max_depth=2).completion("c", QUESTION).response == "Count to three."

    @requires("files")
    def test_a_child_sees_no_file_of_its_parents(self, open_rlm: OpenRLM) -> None:
        root = cell(
            "open('mine', 'w').close()\nreply = rlm_query('Look.')\nimport os\nFINAL([reply, os.listdir()])"
        )
        child = cell("import os\nFINAL(os.listdir())\nopen('other', 'w').close()")
        result = open_rlm(family(root, child), max_depth=2).completion("c", QUESTION)
        assert result.value == ["[]", ["mine"]]

    def test_children_of_a_batch_work_at_the_same_time_and_answer_in_order(self, open_rlm: OpenRLM) -> None:
        everyone = asyncio.Barrier(3)

        async def meet() -> None:
            await everyone.wait()

        root = cell("FINAL(rlm_query_batched(['q'] * 3, contexts=['a', 'b', 'c']))")
        model = family(root, cell("meet()\nFINAL(context)"))
        result = open_rlm(model, max_depth=2, custom_tools={"meet": meet}).completion("c", QUESTION)
        assert result.value == ["a", "b", "c"]

    def test_a_childs_failure_is_an_exception_in_its_parents_cell(self, open_rlm: OpenRLM) -> None:
        def child(messages: Sequence[Message]) -> str:
            raise ModelError("nobody is there")

        root = cell(
            """
            try: rlm_query('q')
            except LLMError as error: found = [error.kind, str(error)]
            FINAL([found, [reply.kind for reply in rlm_query_batched(['q', 'r'])]])
            """
        )
        result = open_rlm(family(root, child), max_depth=2).completion("c", QUESTION)
        assert result.value == [["ModelError", "nobody is there"], ["ModelError", "ModelError"]]

    def test_a_child_that_fails_is_one_item_of_its_batch(self, open_rlm: OpenRLM) -> None:
        def child(messages: Sequence[Message]) -> str:
            if "odd" in messages[1].content:
                raise ModelError("no")
            return cell("FINAL(context)")

        root = kinds_of("rlm_query_batched(['even', 'odd', 'even'], contexts=['0', '1', '2'])")
        result = open_rlm(family(root, child), max_depth=2).completion("c", QUESTION)
        assert result.value == ["0", "ModelError", "2"]

    def test_a_cell_of_a_child_that_fails_costs_its_parent_nothing(self, open_rlm: OpenRLM) -> None:
        dies = cell("import os; os._exit(1)" if "cpython" in self.capabilities else "1/0")
        root = cell("kept = 1\nreply = rlm_query('q')\nFINAL([kept, reply])")
        model = family(root, turns(dies, cell("FINAL(context)")))
        assert open_rlm(model, max_depth=2).completion("c", QUESTION).value == [1, "q"]

    # --- depth --------------------------------------------------------------------------------------------

    def test_depth_1_makes_a_plain_call_of_a_child(self, open_rlm: OpenRLM) -> None:
        model = family(cell("FINAL(rlm_query('one', context='two'))"))
        result = open_rlm(model, max_depth=1).completion("c", QUESTION)
        assert result.response == "echo:one\n\ntwo"
        assert runs_of(result.trace, RunStarted) == ["run-1"]

    def test_depth_3_has_children_and_grandchildren(self, open_rlm: OpenRLM) -> None:
        deeper = cell("FINAL(f\"{budget()['depth']} {rlm_query('deeper')}\")")
        result = open_rlm(family(deeper, deeper), max_depth=3).completion("c", QUESTION)
        assert result.response == "2 1 0 echo:deeper"
        started = [event for event in result.trace if isinstance(event, RunStarted)]
        assert [(e.depth, e.parent) for e in started] == [(0, None), (1, "run-1"), (2, "run-2")]

    def test_a_child_too_deep_may_be_an_error(self, open_rlm: OpenRLM) -> None:
        model = family(cell("try: rlm_query('q')\nexcept LLMError as error: FINAL([error.kind, str(error)])"))
        result = open_rlm(model, max_depth=1, on_max_depth="raise").completion("c", QUESTION)
        assert result.value[0] == "MaxDepthExceeded"
        assert "use llm_query" in result.value[1]

    # --- how many at a time -------------------------------------------------------------------------------

    def test_no_more_children_are_at_work_than_may_be(self, open_rlm: OpenRLM) -> None:
        active, peak = 0, 0

        async def work() -> None:
            nonlocal active, peak
            active += 1
            peak = max(peak, active)
            await asyncio.sleep(0.02)
            active -= 1

        model = family(cell("FINAL(len(rlm_query_batched(['q'] * 5)))"), cell("work()\nFINAL(1)"))
        rlm = open_rlm(model, max_depth=2, max_concurrent_subcalls=2, custom_tools={"work": work})
        assert rlm.completion("c", QUESTION).value == 5
        assert peak <= 2

    def test_a_deep_and_wide_tree_ends_with_one_child_at_work_at_a_time(self, open_rlm: OpenRLM) -> None:
        fan = cell("FINAL(sum(map(int, rlm_query_batched(['q'] * 5))))")

        def child(messages: Sequence[Message]) -> str:
            return fan if "wide" in messages[1].content else cell("FINAL(1)")

        root = cell("FINAL(sum(map(int, rlm_query_batched(['wide'] * 5, contexts=['c'] * 5))))")
        rlm = open_rlm(family(root, child), max_depth=3, max_concurrent_subcalls=1)
        result = rlm.completion("c", QUESTION)
        assert result.value == 25
        assert len(runs_of(result.trace, RunFinished)) == 31

    # --- the end ------------------------------------------------------------------------------------------

    async def test_cancelling_a_run_ends_its_children_and_leaves_nothing(
        self, open_rlm: OpenRLM, at_rest: set[str]
    ) -> None:
        everyone, ended, events = asyncio.Barrier(4), 0, list[AnyEvent]()

        async def wait() -> None:
            nonlocal ended
            await everyone.wait()
            try:
                await asyncio.sleep(HOUR)
            finally:
                ended += 1

        model = family(cell("rlm_query_batched(['q'] * 3)"), cell("wait()"))
        rlm = open_rlm(model, max_depth=2, custom_tools={"wait": wait}, on_event=events.append)
        run = asyncio.create_task(rlm.acompletion("c", QUESTION))
        await everyone.wait()
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        assert ended == 3
        stopped = [event.stopped for event in events if isinstance(event, RunFinished)]
        assert stopped == ["cancelled"] * 4
        assert await asyncio.to_thread(self.is_clean, at_rest)

    def test_the_time_of_a_run_ends_its_children_and_leaves_nothing(
        self, open_rlm: OpenRLM, at_rest: set[str]
    ) -> None:
        begun = ended = 0

        async def wait() -> None:
            nonlocal begun, ended
            begun += 1
            try:
                await asyncio.sleep(HOUR)
            finally:
                ended += 1

        root = turns(cell("answer['content'] = 'half'"), cell("rlm_query_batched(['q'] * 3)"))
        model = family(root, cell("wait()"))
        rlm = open_rlm(model, max_depth=2, custom_tools={"wait": wait}, max_timeout=1.0)
        with pytest.raises(TimeoutExceeded) as caught:
            rlm.completion("c", QUESTION)
        assert ended == begun
        self.assert_complete(caught.value)
        assert self.is_clean(at_rest)

    def assert_complete(self, error: RLMError) -> None:
        """An error that ended a run brings what the run had, and every run of the tree has ended."""
        assert error.usage is not None
        assert error.limits is not None
        assert error.trace is not None
        assert sorted(runs_of(error.trace, RunStarted)) == sorted(runs_of(error.trace, RunFinished))

    def test_a_child_finds_nothing_of_the_one_before_it(self, open_rlm: OpenRLM) -> None:
        self.require("cpython")
        dirt = [(make, look) for needs, make, look in DIRT.values() if set(needs) <= set(self.capabilities)]
        looks = ", ".join(look.format(ELSEWHERE) for _, look in dirt)
        makes = "\n".join(make.format(ELSEWHERE) for make, _ in dirt)
        child = cell(f"import contextlib\nFINAL([{looks}])\n{makes}")
        model = family(cell("FINAL([rlm_query('first'), rlm_query('second')])"), child)
        first, second = open_rlm(model, max_depth=2).completion("c", QUESTION).value
        assert first == second

    @requires("reset", "processes", "threads")
    async def test_what_runs_in_a_sandbox_ends_when_it_begins_anew(self, open_sandbox: OpenSandbox) -> None:
        ticks = 0

        async def serve(call: object, texts: list[str]) -> list[str]:
            nonlocal ticks
            ticks += 1
            return texts

        sandbox = await open_sandbox(serve)
        pids = await sandbox.value(
            """
            import subprocess, threading, time
            def tick():
                while True: llm_query('tick'); time.sleep(0.001)
            threading.Thread(target=tick, daemon=True).start()
            [subprocess.Popen(['sleep', '3600'], start_new_session=n).pid for n in (False, True)]
            """
        )
        await sandbox.begin_anew()
        before = ticks
        code = """
            import os
            def is_there(pid):
                try: os.kill(pid, 0)
                except ProcessLookupError: return False
                except OSError: return True
                return True
            """
        assert (
            await sandbox.value(f"{textwrap.dedent(code)}\n[is_there(pid) for pid in {pids}]") == [False] * 2
        )
        assert ticks == before

    @requires("reset")
    async def test_a_sandbox_that_begins_anew_has_no_context_and_numbers_the_next_from_0(
        self, open_sandbox: OpenSandbox
    ) -> None:
        sandbox = await open_sandbox()
        await sandbox.env.add_context("old")
        await sandbox.ok("x = 1")
        await sandbox.begin_anew()
        assert (
            await sandbox.value("[name for name in ('context', 'context_0', 'x') if name in globals()]") == []
        )
        assert await sandbox.env.add_context("new") == 0
        assert await sandbox.value("[context, llm_query('on')]") == ["new", "echo:on"]
        assert '"<cell 3>"' in (await sandbox.error("1/0")).traceback

    # --- schemas ------------------------------------------------------------------------------------------

    def test_replies_may_have_to_be_data_of_a_form(self, open_rlm: OpenRLM) -> None:
        def say(messages: Sequence[Message]) -> str:
            if messages[0].role == "user":
                return '```json\n{"number": 1}\n```'
            if QUESTION not in messages[1].content:
                return cell("FINAL({'number': 2})")
            return cell(
                f"""
                shape = {SCHEMA}
                FINAL([llm_query('q', schema=shape), rlm_query('q', schema='answer'),
                       llm_query_batched(['q'], schema='answer'), rlm_query_batched(['q'], schema=shape)])
                """
            )

        rlm = open_rlm(ScriptedLM(say), max_depth=2, schemas={"answer": Answer})
        one, two = {"number": 1}, {"number": 2}
        assert rlm.completion("c", QUESTION).value == [one, two, [one], [two]]

    def test_a_reply_of_another_form_goes_back_and_then_is_an_error(self, open_rlm: OpenRLM) -> None:
        def say(messages: Sequence[Message]) -> str:
            if messages[0].role == "system":
                return kinds_of("llm_query_batched(['learns', 'never'], schema='answer')")
            return '{"number": 5}' if "learns" in messages[0].content and len(messages) == 3 else "five"

        model = ScriptedLM(say)
        rlm = open_rlm(model, schemas={"answer": Answer}, schema_retries=1)
        assert rlm.completion("c").value == [{"number": 5}, "InvalidReply"]
        assert model.calls == 5

    def test_a_child_whose_answer_has_another_form_goes_on(self, open_rlm: OpenRLM) -> None:
        child = turns(cell("FINAL('five')"), cell("FINAL({'number': 5})"))
        model = family(cell("FINAL(rlm_query('q', schema='answer')['number'])"), child)
        rlm = open_rlm(model, max_depth=2, schemas={"answer": Answer})
        assert rlm.completion("c", QUESTION).value == 5

    # --- limits -------------------------------------------------------------------------------------------

    def test_a_tree_makes_exactly_as_many_calls_as_it_may_and_ends_every_child(
        self, open_rlm: OpenRLM
    ) -> None:
        model = family(FAN, FAN)
        rlm = open_rlm(model, max_depth=3, max_calls=40, max_iterations=2, max_concurrent_subcalls=2)
        with pytest.raises(MaxCallsExceeded) as caught:
            rlm.completion("c", QUESTION)
        assert caught.value.usage is not None
        assert (model.calls, caught.value.usage.total_calls, caught.value.partial_answer) == (
            40,
            40,
            "so far",
        )
        self.assert_complete(caught.value)

    def test_children_side_by_side_spend_no_more_than_there_is(self, open_rlm: OpenRLM) -> None:
        model = family(kinds_of("rlm_query_batched(['q'] * 5)"), cell("FINAL('done')"), cost=0.01)
        result = open_rlm(model, max_depth=2, max_budget=0.045).completion("c", QUESTION)
        assert sorted(result.value) == ["BudgetExceeded"] * 2 + ["done"] * 3
        spent = [event.usage.cost or 0 for event in result.trace if isinstance(event, ModelReplied)]
        assert sum(spent) == pytest.approx(0.04) == result.usage_summary.total_cost

    def test_a_tree_whose_money_is_used_up_ends_with_what_it_has(self, open_rlm: OpenRLM) -> None:
        rlm = open_rlm(family(FAN, FAN, cost=0.01), max_depth=2, max_budget=0.045, max_iterations=2)
        with pytest.raises(BudgetExceeded) as caught:
            rlm.completion("c", QUESTION)
        assert caught.value.partial_answer == "so far"
        assert caught.value.usage is not None
        assert caught.value.usage.total_cost == pytest.approx(0.04)
        self.assert_complete(caught.value)

    def test_children_are_limited(self, open_rlm: OpenRLM) -> None:
        model = family(kinds_of("rlm_query_batched(['q'] * 3)"), cell("FINAL('done')"))
        result = open_rlm(model, max_depth=2, max_children=2).completion("c", QUESTION)
        assert result.value == ["done", "done", "MaxChildrenExceeded"]

    def test_calls_of_cells_are_limited_and_a_childs_turns_are_among_them(self, open_rlm: OpenRLM) -> None:
        root = kinds_of("[*llm_query_batched(['1']), *rlm_query_batched(['2']), *llm_query_batched(['3'])]")
        model = family(root, cell("FINAL('done')"))
        result = open_rlm(model, max_depth=2, max_sub_calls=2).completion("c", QUESTION)
        assert result.value == ["echo:1", "done", "MaxCallsExceeded"]

    def test_tokens_of_a_tree_are_limited(self, open_rlm: OpenRLM) -> None:
        child = cell("for _ in range(100): llm_query('x' * 2000)")
        model = family(kinds_of("[*llm_query_batched(['short']), *rlm_query_batched(['q'] * 2)]"), child)
        result = open_rlm(model, max_depth=2, max_tokens=20_000).completion("c", QUESTION)
        assert result.value == ["echo:short", "MaxTokensExceeded", "MaxTokensExceeded"]
        usage = result.usage_summary
        assert 10_000 < usage.total_input_tokens + usage.total_output_tokens <= 20_000

    def test_a_childs_cell_sees_what_is_left_to_the_tree(self, open_rlm: OpenRLM) -> None:
        child = cell(
            "b = budget()\nFINAL([b[name] for name in ('calls', 'calls_made', 'children', 'depth', 'iterations')])"
        )
        model = family(cell("FINAL(rlm_query('q'))"), child)
        rlm = open_rlm(model, max_depth=3, max_calls=10, max_children=4, max_iterations=7)
        assert rlm.completion("c", QUESTION).response == "[8, 2, 3, 1, 6]"

    def test_a_tree_that_has_used_up_its_calls_may_be_asked_for_its_best_answer(
        self, open_rlm: OpenRLM
    ) -> None:
        def root(messages: Sequence[Message]) -> str:
            return "the best there is" if "last turn" in messages[-1].content else FAN

        rlm = open_rlm(family(root, cell("pass")), max_depth=2, max_calls=6, on_limit="answer")
        result = rlm.completion("c", QUESTION)
        assert (result.response, result.stopped) == ("the best there is", "max_calls")
        assert result.usage_summary.total_calls == 6

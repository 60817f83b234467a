"""Runs: several completions over one sandbox, and what each finds of those before it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from typing import Any

import pytest

from rlm_scripted import ScriptedLM

from .. import conversation, hostloop
from ..client import Message
from ..environment import SupportsPersistence
from ..errors import Cancelled, ConfigError, ModelError
from ..events import AnyEvent, CellStarted
from .runs import HOUR
from .scripts import QUESTION, cell, family
from .sessions import OpenRLM, Sandbox
from .suite import Suite, requires


def script(*replies: Any) -> ScriptedLM:
    """A model that says these, one a turn, over all completions; an error it raises."""
    return ScriptedLM(replies)


def kept(sandbox: Sandbox) -> SupportsPersistence:
    """The environment as one that keeps sessions."""
    assert isinstance(sandbox.env, SupportsPersistence)
    return sandbox.env


class Conversations(Suite):
    """Level runs: a session of several completions."""

    level = "runs"

    # --- what is kept -------------------------------------------------------------------------------------

    @requires("persistence")
    def test_variables_functions_classes_and_imports_are_there_in_the_next_completion(
        self, open_rlm: OpenRLM
    ) -> None:
        first = cell(
            """
            import math
            x, items = 1, []
            def f(): return x + 1
            class C:
                def __init__(self, n): self.n = n
            c = C(5)
            FINAL('done')
            """
        )
        second = cell("x = 10\nitems.append(f())\nFINAL([items, c.n, isinstance(c, C), math.floor(2.5)])")
        with open_rlm(script(first, second)).session() as session:
            session.completion("c", "first")
            assert session.completion(None, "second").value == [[11], 5, True, 2]

    @requires("persistence")
    def test_an_answer_is_of_its_completion(self, open_rlm: OpenRLM) -> None:
        first = cell("answer['content'] = 'one'\nanswer['ready'] = True")
        second = [cell("seen = dict(answer)\nanswer['content'] = 'two'"), cell("answer['ready'] = True")]
        third = [cell("answer['content'] = 'draft'"), "FINAL(three)"]
        fourth = cell("FINAL([seen, answer])")
        with open_rlm(script(first, *second, *third, fourth)).session() as session:
            assert [session.completion("c").response for _ in range(3)] == ["one", "two", "three"]
            assert session.completion("c").value == [{"content": "", "ready": False}] * 2

    @requires("persistence")
    def test_a_context_that_comes_with_a_completion_is_numbered(self, open_rlm: OpenRLM) -> None:
        look = cell("FINAL([context, context_0, globals().get('context_1'), 'context_2' in globals()])")
        client = script(look, look, look)
        with open_rlm(client).session() as session:
            assert session.completion("zero").value == ["zero", "zero", None, False]
            assert session.completion(None, "no context").value == ["zero", "zero", None, False]
            result = session.completion(["one"], "another")
            assert result.value == ["zero", "zero", ["one"], False]

    @requires("persistence")
    def test_the_model_is_told_which_context_is_new_and_what_was_asked_before(
        self, open_rlm: OpenRLM
    ) -> None:
        seen: list[str] = []

        def say(messages: Sequence[Message]) -> str:
            seen.append(messages[1].content)
            return f"FINAL(answer {len(seen)})"

        with open_rlm(ScriptedLM(say)).session() as session:
            session.completion("zero", "What is it?")
            session.completion("one", "And this?")
            session.completion(None, "Any more?")
        assert "`context`" in seen[0]
        assert "`context_1`" in seen[1]
        assert "What is it? -> answer 1" in seen[1]
        assert "And this? -> answer 2" in seen[2]
        assert "No context came with it." in seen[2]
        assert "`history_0` to `history_1`" in seen[2]

    @requires("persistence")
    def test_the_messages_of_earlier_completions_are_histories(self, open_rlm: OpenRLM) -> None:
        look = cell("FINAL([[m['role'] for m in history], history == history_0, history_1[-1]['content']])")
        with open_rlm(script(cell("x = 1"), "FINAL(one)", "FINAL(two)", look)).session() as session:
            session.completion("c", "first")
            session.completion("c", "second")
            roles = ["system", "user", "assistant", "user", "assistant"]
            assert session.completion("c", "third").value == [roles, True, "FINAL(two)"]

    @requires("persistence")
    def test_a_tool_works_in_every_completion(self, open_rlm: OpenRLM) -> None:
        numbers = itertools.count(1)
        ask = cell("FINAL([count(), len(llm_query('q'))])")
        rlm = open_rlm(family(ask), custom_tools={"count": lambda: next(numbers)})
        with rlm.session() as session:
            assert session.completion("c", QUESTION).value == [1, 6]
            assert session.completion("c", QUESTION).value == [2, 6]

    @requires("persistence")
    def test_a_child_sees_nothing_of_its_parents_session(self, open_rlm: OpenRLM) -> None:
        look = "[name for name in ('x', 'history', 'context_1') if name in globals()]"
        root = cell(f"x = 1\nFINAL([str({look}), rlm_query('q')])")
        with open_rlm(family(root, cell(f"FINAL({look})")), max_depth=2).session() as session:
            assert session.completion("c", QUESTION).value == ["['x']", "[]"]
            assert session.completion("c", QUESTION).value == ["['x', 'history', 'context_1']", "[]"]

    # --- what goes wrong ----------------------------------------------------------------------------------

    @requires("persistence")
    def test_a_completion_that_fails_leaves_the_session_to_the_next_one(self, open_rlm: OpenRLM) -> None:
        client = script(
            cell("x = 1"), ModelError("nobody is there"),
            cell("x += 1\nanswer['content'] = 'draft'"), "still going", ModelError("again"),
            cell("FINAL([x, len(history_1)])"),
        )  # fmt: skip
        with open_rlm(client, max_iterations=2).session() as session:
            with pytest.raises(ModelError, match="nobody is there"):
                session.completion("c")
            with pytest.raises(ModelError, match="again") as caught:
                session.completion("c")
            assert caught.value.partial_answer == "draft"
            assert session.completion("c").value == [2, 6]

    @requires("persistence")
    def test_a_completion_that_is_cancelled_in_a_cell_leaves_the_session_to_the_next_one(
        self, open_rlm: OpenRLM
    ) -> None:
        def on_event(event: AnyEvent) -> None:
            if isinstance(event, CellStarted) and "while True" in event.code:
                rlm.cancel()

        loops, look = cell("y = 1\nwhile True: pass"), cell("FINAL([globals().get('x'), context_2])")
        client = script(cell("x = 1\nFINAL(x)"), loops, look)
        rlm = open_rlm(client, on_event=on_event)
        with rlm.session() as session:
            session.completion("c")
            with pytest.raises(Cancelled):
                session.completion("c")
            kept = 1 if {"snapshots", "rollback"} & set(self.capabilities) else None
            assert session.completion("c").value == [kept, "c"]

    @requires("persistence", "threads")
    def test_a_thread_that_calls_between_completions_is_told_that_nobody_answers(
        self, open_rlm: OpenRLM
    ) -> None:
        begun = asyncio.Event()

        async def hang() -> None:
            begun.set()
            await asyncio.sleep(HOUR)

        first = cell(
            """
            import threading
            errors = []
            def ask():
                for prompt in ('in flight', 'between'):
                    try: llm_query(prompt)
                    except LLMError as error: errors.append([error.kind, 'nobody answers' in str(error)])
            thread = threading.Thread(target=ask)
            thread.start()
            until_begun()
            FINAL('done')
            """
        )
        client = script(first, cell("FINAL(errors)"))
        client.add_rule(r"\Ain flight\Z", lambda messages: hang(), regex=True)
        with open_rlm(client, custom_tools={"until_begun": begun.wait}).session() as session:
            session.completion("c")
            assert session._env is not None
            hostloop.run(session._env.execute("thread.join(20)"))
            assert session.completion("c").value == [["ModelError", True]] * 2

    @requires("persistence", "cpython", "threads")
    def test_a_thread_that_ends_the_process_between_completions_costs_no_variable_unsaid(
        self, open_rlm: OpenRLM
    ) -> None:
        begun = asyncio.Event()

        async def hang() -> None:
            begun.set()
            await asyncio.sleep(HOUR)

        first = cell(
            """
            import os, threading
            def end():
                try: llm_query('in flight')
                finally: os._exit(1)
            threading.Thread(target=end, name='the end').start()
            until_begun()
            """
        )
        seen: list[str] = []

        def third(messages: Sequence[Message]) -> str:
            seen.append(messages[1].content)
            return cell("FINAL([context, globals().get('x'), 'threading' in globals()])")

        client = script(first, cell("x = 1\nFINAL(x)"), third)
        client.add_rule(r"\Ain flight\Z", lambda messages: hang(), regex=True)
        with open_rlm(client, custom_tools={"until_begun": begun.wait}).session() as session:
            session.completion("c")
            context, x, had_imported = session.completion(None, "again").value
        assert context == "c"
        if "rollback" in self.capabilities:
            assert had_imported
            assert "thread the end" in seen[0]
            assert x == 1 or "what the last cell did" in seen[0]
        else:
            assert x == 1 or "every variable" in seen[0]

    @requires("persistence", "cpython")
    def test_an_answer_that_does_not_let_go_holds_up_no_completion(
        self, open_rlm: OpenRLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(conversation, "RENEWAL_TIMEOUT", 0.5)
        stays = """
            import signal
            class R(dict):
                def __del__(self):
                    signal.signal(2, signal.SIG_IGN)
                    while True: pass
            x = 1
            answer = R(content='one', ready=True)
            """
        rlm = open_rlm(script(cell(stays), cell("FINAL([globals().get('x'), answer])")))
        with rlm.session() as session:
            assert session.completion("c").response == "one"
            kept = 1 if {"snapshots", "rollback"} & set(self.capabilities) else None
            assert session.completion("c").value == [kept, {"content": "", "ready": False}]

    # --- several ------------------------------------------------------------------------------------------

    @requires("persistence")
    def test_two_sessions_of_one_rlm_do_not_see_one_another(self, open_rlm: OpenRLM) -> None:
        look = cell("FINAL([context, 'x' in globals()])\nx = 1")
        rlm = open_rlm(script(look, look, look))
        with rlm.session() as one, rlm.session() as other:
            assert one.completion("one").value == ["one", False]
            assert other.completion("other").value == ["other", False]
            assert one.completion(None, "again").value == ["one", True]

    @requires("persistence")
    def test_a_persistent_rlm_is_one_session(self, open_rlm: OpenRLM) -> None:
        rlm = open_rlm(script(cell("x = 1\nFINAL(x)"), cell("FINAL([x, context_1])")), persistent=True)
        rlm.completion("one")
        assert rlm.completion("two").value == [1, "two"]

    @requires("persistence")
    def test_an_rlm_that_is_not_persistent_forgets(self, open_rlm: OpenRLM) -> None:
        rlm = open_rlm(script(cell("x = 1\nFINAL(x)"), cell("FINAL(['x' in globals(), context])")))
        rlm.completion("one")
        assert rlm.completion("two").value == [False, "two"]

    @requires("persistence")
    def test_closing_a_conversation_leaves_nothing(self, open_rlm: OpenRLM, at_rest: set[str]) -> None:
        with open_rlm(script("FINAL(1)", "FINAL(2)")).session() as session:
            session.completion("c")
            session.completion("c")
        session.close()
        assert self.is_clean(at_rest)

    # --- the environment itself ---------------------------------------------------------------------------

    @requires("persistence")
    async def test_an_index_is_the_next_one_unless_it_is_given(self, sandbox: Sandbox) -> None:
        """The rules of the package ``rlms``, for contexts and for histories."""
        env, messages = kept(sandbox), [{"role": "user", "content": "first"}]
        assert (env.get_context_count(), env.get_history_count()) == (0, 0)
        assert [await env.add_context(text) for text in ("a", "b")] == [0, 1]
        assert await env.add_context("f", 5) == 5
        assert (await env.add_context("g"), env.get_context_count()) == (6, 7)
        assert [await env.add_history(messages), await env.add_history([], 3)] == [0, 3]
        assert (await env.add_history(messages * 2), env.get_history_count()) == (4, 5)
        assert await sandbox.value("[context, context_0, context_1, context_5, context_6]") == list("aabfg")
        assert await sandbox.value("[history, history_0, history_3, len(history_4)]") == [
            messages,
            messages,
            [],
            2,
        ]
        assert await sandbox.value("[n for n in ('context_2', 'history_1') if n in globals()]") == []

    @requires("persistence")
    async def test_an_index_that_is_given_again_replaces_what_was_there(self, sandbox: Sandbox) -> None:
        env = kept(sandbox)
        await env.add_context("old")
        assert [await env.add_context("new", 0), env.get_context_count()] == [0, 1]
        await env.add_history([{"role": "user", "content": "old"}])
        assert [await env.add_history([], 0), env.get_history_count()] == [0, 1]
        assert await sandbox.value("[context, context_0, history, history_0]") == ["new", "new", [], []]

    @requires("persistence")
    async def test_an_index_that_is_none_is_a_config_error(self, sandbox: Sandbox) -> None:
        env = kept(sandbox)
        for index in (-1, True, "0", 1.0):
            with pytest.raises(ConfigError, match="index"):
                await env.add_context("c", index)  # type: ignore[arg-type]
            with pytest.raises(ConfigError, match="index"):
                await env.add_history([], index)  # type: ignore[arg-type]
        assert (env.get_context_count(), env.get_history_count()) == (0, 0)

    @requires("persistence")
    async def test_a_history_is_a_copy_of_the_messages(self, sandbox: Sandbox) -> None:
        env, messages = kept(sandbox), [{"role": "user", "content": "as it was"}]
        await env.add_history(messages)
        messages[0]["content"] = "changed"
        messages.append({"role": "user", "content": "added"})
        assert await sandbox.value("history") == [{"role": "user", "content": "as it was"}]
        if "cpython" in self.capabilities:
            await sandbox.run("import os; os._exit(1)")
        assert await sandbox.value("history_0") == [{"role": "user", "content": "as it was"}]
        await sandbox.ok("history[0]['content'] = 'changed in a cell'")
        assert messages[0]["content"] == "changed"

"""Contract: what a cell can call, and how it submits an answer."""

# ruff: noqa: E501 (a table of cells reads best with one to a line)

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest

from .. import protocol
from ..environment import REPLResult
from ..errors import ModelError, RLMError
from .sessions import Cells, OpenSandbox, Recorder, Sandbox
from .suite import Suite, one_session, requires

MEGABYTE = 1 << 20


EVIL = """
    kept = 1
    class Evil:
        def __str__(self): raise {0}
        __repr__ = __bool__ = __eq__ = __str__
    """

NO_ANSWER = "answer = {'content': '', 'ready': False}"
"""What a session begins with, for cases that share one."""


class Calls(Suite):
    """Level contract: what a cell can call, and how it submits an answer."""

    level = "contract"

    # --- single calls -----------------------------------------------------------------------------------

    async def test_llm_query_returns_the_reply(self, sandbox: Sandbox) -> None:
        assert await sandbox.value("llm_query('hi')") == "echo:hi"

    @pytest.mark.parametrize(
        "text", ["", "é\U0001f600", "nul\0", "\r\n", "\ufeff", "\uffff", '{"t": "reply"}'], ids=ascii
    )
    async def test_any_text_travels_both_ways(self, sandbox: Sandbox, text: str) -> None:
        assert await sandbox.value(f"llm_query({text!a})") == f"echo:{text}"

    async def test_the_model_and_the_function_reach_the_host(self, open_sandbox: OpenSandbox) -> None:
        seen = Recorder()
        sandbox = await open_sandbox(seen)
        await sandbox.ok(
            "llm_query('a')\nllm_query('b', 'small')\nllm_query(prompt='c', model='big')\nrlm_query('d', model='m')"
        )
        assert [(c.fn, c.model, c.batch, texts) for c, texts in seen.calls] == [
            ("llm_query", None, False, ["a"]), ("llm_query", "small", False, ["b"]),
            ("llm_query", "big", False, ["c"]), ("rlm_query", "m", False, ["d"]),
        ]  # fmt: skip

    async def test_rlm_query_sends_its_context_after_its_prompt(self, open_sandbox: OpenSandbox) -> None:
        seen = Recorder()
        sandbox = await open_sandbox(seen)
        await sandbox.ok(
            "rlm_query('q', context='c')\nrlm_query_batched(['q', 'r'], contexts=['c', 'd'])\nrlm_query_batched(['q'])"
        )
        assert [(c.contexts, texts) for c, texts in seen.calls] == [
            (True, ["q", "c"]), (True, ["q", "r", "c", "d"]), (False, ["q"]),
        ]  # fmt: skip

    async def test_a_prompt_of_a_megabyte_arrives_whole(self, sandbox: Sandbox) -> None:
        assert await sandbox.value(f"p = 'é' * {MEGABYTE}\nllm_query(p) == 'echo:' + p") is True

    async def test_budget_is_a_dict(self, open_sandbox: OpenSandbox) -> None:
        async def serve(call: protocol.Call, texts: list[str]) -> list[str]:
            return [json.dumps({"calls": 3, "seconds": None})]

        sandbox = await open_sandbox(serve)
        assert await sandbox.value("budget()") == {"calls": 3, "seconds": None}

    async def test_a_failed_call_raises_llm_error_with_its_kind(self, open_sandbox: OpenSandbox) -> None:
        async def serve(call: protocol.Call, texts: list[str]) -> list[RLMError]:
            return [ModelError(f"no answer to {texts[0]}: é")]

        sandbox = await open_sandbox(serve)
        error = await sandbox.error("kept = 1\nllm_query('this')")
        assert (error.type, error.message) == ("LLMError", "no answer to this: é")
        assert "llm_query('this')" in error.traceback
        caught = (
            "try: rlm_query('x')\nexcept LLMError as error: found = [error.kind, str(error), kept]\nfound"
        )
        assert await sandbox.value(caught) == ["ModelError", "no answer to x: é", 1]

    async def test_an_error_that_the_serving_function_raises_fails_the_call(
        self, open_sandbox: OpenSandbox
    ) -> None:
        async def serve(call: protocol.Call, texts: list[str]) -> list[str]:
            raise ModelError("not today")

        sandbox = await open_sandbox(serve)
        for call in ("llm_query('a')", "llm_query_batched(['a', 'b'])", "budget()"):
            assert (await sandbox.error(call)).message == "not today"
        assert (await sandbox.ok("print('on')")).stdout == "on\n"

    # --- batches --------------------------------------------------------------------------------------------

    async def test_a_batch_keeps_its_order(self, sandbox: Sandbox) -> None:
        code = "replies = llm_query_batched([str(i) for i in range(1000)])\nreplies == [f'echo:{i}' for i in range(1000)]"
        assert await sandbox.value(code) is True

    async def test_a_batch_is_one_call(self, open_sandbox: OpenSandbox) -> None:
        seen = Recorder()
        sandbox = await open_sandbox(seen)
        await sandbox.ok("llm_query_batched(('a', 'b'), model='m')\nllm_query_batched(x for x in 'cd')")
        assert [(c.batch, c.model, texts) for c, texts in seen.calls] == [
            (True, "m", ["a", "b"]),
            (True, None, ["c", "d"]),
        ]

    async def test_an_empty_batch_calls_nobody(self, open_sandbox: OpenSandbox) -> None:
        seen = Recorder()
        sandbox = await open_sandbox(seen)
        assert await sandbox.value("llm_query_batched([]) + rlm_query_batched(())") == []
        assert seen.calls == []

    async def test_a_failed_item_of_a_batch_stands_in_its_place(self, open_sandbox: OpenSandbox) -> None:
        async def serve(call: protocol.Call, texts: list[str]) -> list[str | RLMError]:
            return [ModelError("odd") if int(text) % 2 else text for text in texts]

        sandbox = await open_sandbox(serve)
        code = """
            replies = llm_query_batched(['0', '1', '2'])
            [[isinstance(r, LLMError), str(r), getattr(r, 'kind', '')] for r in replies]
        """
        assert await sandbox.value(code) == [[False, "0", ""], [True, "odd", "ModelError"], [False, "2", ""]]

    async def test_empty_replies_of_a_batch_are_empty_strings(self, open_sandbox: OpenSandbox) -> None:
        async def serve(call: protocol.Call, texts: list[str]) -> list[str]:
            return ["" for _ in texts]

        assert await (await open_sandbox(serve)).value("llm_query_batched(['a', 'b'])") == ["", ""]

    async def test_ten_thousand_prompts_are_one_batch(self, sandbox: Sandbox) -> None:
        assert await sandbox.value("len(set(llm_query_batched(list(map(str, range(10_000))))))") == 10_000

    async def test_a_batch_too_long_for_one_frame_is_the_cells_error(self, sandbox: Sandbox) -> None:
        error = await sandbox.error("kept = 1\nllm_query_batched(['p' * 100] * 400_000)")
        assert error.type == "ValueError"
        assert "split the batch" in error.message
        assert await sandbox.value("[kept, llm_query('on')]") == [1, "echo:on"]

    # --- wrong arguments ----------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("code", "word"),
        [
            ("llm_query()", "prompt"), ("llm_query(5)", "int"), ("llm_query(None)", "NoneType"), ("llm_query(b'a')", "bytes"),
            ("llm_query(['a'])", "list"), ("llm_query('a', 5)", "model"), ("llm_query('a', model=['m'])", "model"),
            ("llm_query('a', temperature=1)", "temperature"), ("llm_query_batched('a')", "list of prompts"),
            ("llm_query_batched(b'a')", "list of prompts"), ("llm_query_batched(['a', 5])", "int"),
            ("llm_query_batched(5)", "int"), ("llm_query_batched(['a'], 5)", "model"), ("rlm_query({'a': 1})", "dict"),
            ("rlm_query('a', context=5)", "int"), ("rlm_query_batched(['a'], contexts=[None])", "NoneType"),
            ("FINAL()", "value"), ("FINAL(1, 2)", "positional"),
        ],
    )  # fmt: skip
    async def test_a_wrong_argument_is_a_type_error_that_reaches_nobody(
        self, open_sandbox: OpenSandbox, code: str, word: str
    ) -> None:
        seen = Recorder()
        sandbox = await open_sandbox(seen)
        error = await sandbox.error(code)
        assert error.type == "TypeError"
        assert word in error.message
        assert seen.calls == []

    async def test_contexts_must_be_as_many_as_prompts(self, sandbox: Sandbox) -> None:
        error = await sandbox.error("rlm_query_batched(['a', 'b'], contexts=['c'])")
        assert (error.type, error.message) == ("ValueError", "2 prompts but 1 contexts")

    async def test_a_lone_surrogate_in_a_prompt_is_a_value_error(self, sandbox: Sandbox) -> None:
        for call in (
            "llm_query('ab\\ud800')",
            "llm_query_batched(['fine', 'ab\\udfff'])",
            "rlm_query('a', context='ab\\ud800')",
        ):
            error = await sandbox.error(call)
            assert error.type == "ValueError"
            assert "lone surrogate at character 2" in error.message

    async def test_a_lone_surrogate_in_a_model_name_does_not_end_the_session(self, sandbox: Sandbox) -> None:
        await sandbox.run("kept = 1\nllm_query('a', model='\\ud800')")
        assert await sandbox.value("[kept, llm_query('on')]") == [1, "echo:on"]

    async def test_a_prompt_larger_than_a_frame_is_the_cells_error(self, sandbox: Sandbox) -> None:
        error = await sandbox.error(f"kept = 1\nllm_query('x' * {257 * MEGABYTE})")
        assert error.type in ("ValueError", "LLMError")
        assert await sandbox.value("kept") == 1

    # --- threads ---------------------------------------------------------------------------------------------

    @requires("threads")
    async def test_64_threads_call_at_once(self, open_sandbox: OpenSandbox) -> None:
        everyone = asyncio.Barrier(64)

        async def serve(call: protocol.Call, texts: list[str]) -> list[str]:
            await everyone.wait()
            return texts

        sandbox = await open_sandbox(serve)
        code = """
            from concurrent.futures import ThreadPoolExecutor
            with ThreadPoolExecutor(64) as pool:
                replies = list(pool.map(llm_query, map(str, range(64))))
            replies == [str(i) for i in range(64)]
        """
        assert await sandbox.value(code) is True

    @requires("threads")
    async def test_many_calls_from_many_threads_get_each_their_own_reply(self, sandbox: Sandbox) -> None:
        code = """
            from concurrent.futures import ThreadPoolExecutor
            def ask(i): return all(llm_query(f'{i}.{j}') == f'echo:{i}.{j}' for j in range(100))
            with ThreadPoolExecutor(16) as pool:
                fine = list(pool.map(ask, range(16)))
            all(fine) and llm_query('and here') == 'echo:and here'
        """
        assert await sandbox.value(code) is True

    @requires("threads")
    async def test_replies_may_come_in_any_order(self, open_sandbox: OpenSandbox) -> None:
        first = asyncio.Event()

        async def serve(call: protocol.Call, texts: list[str]) -> list[str]:
            if texts == ["first"]:
                await first.wait()
            else:
                first.set()
            return texts

        sandbox = await open_sandbox(serve)
        code = "import threading\nt = threading.Thread(target=llm_query, args=['second'])\n"
        code += "threading.Timer(0.1, t.start).start()\nreply = llm_query('first')\nt.join()\nreply"
        assert await sandbox.value(code) == "first"

    @requires("threads")
    async def test_to_thread_calls_models_side_by_side(self, open_sandbox: OpenSandbox) -> None:
        everyone = asyncio.Barrier(5)

        async def serve(call: protocol.Call, texts: list[str]) -> list[str]:
            await everyone.wait()
            return texts

        sandbox = await open_sandbox(serve)
        code = (
            "import asyncio\nawait asyncio.gather(*(asyncio.to_thread(llm_query, str(i)) for i in range(5)))"
        )
        assert await sandbox.value(code) == ["0", "1", "2", "3", "4"]

    @requires("threads")
    async def test_a_thread_that_outlives_its_cell_calls_between_and_during_later_cells(
        self,
        open_sandbox: OpenSandbox,
    ) -> None:
        served = 0

        async def serve(call: protocol.Call, texts: list[str]) -> list[str]:
            nonlocal served
            served += texts[0] == "background"
            await asyncio.sleep(0.001)
            return texts

        async def more() -> None:
            target = served + 10
            while served < target:
                await asyncio.sleep(0.005)

        sandbox = await open_sandbox(serve)
        await sandbox.ok(
            """
            import threading
            count, going = 0, True
            def work():
                global count
                while going:
                    llm_query('background')
                    count += 1
            thread = threading.Thread(target=work)
            thread.start()
            """
        )
        async with asyncio.timeout(30):
            await more()
            for number in range(20):
                assert await sandbox.value(f"llm_query('{number}')") == str(number)
            await more()
        assert await sandbox.value("going = False\nthread.join(20)\n[thread.is_alive(), count > 20]") == [
            False,
            True,
        ]

    @requires("threads")
    async def test_a_call_that_a_thread_began_in_one_cell_ends_in_another(
        self, open_sandbox: OpenSandbox
    ) -> None:
        go = asyncio.Event()

        async def serve(call: protocol.Call, texts: list[str]) -> list[str]:
            if texts == ["slow"]:
                await go.wait()
            return texts

        sandbox = await open_sandbox(serve)
        await sandbox.ok(
            "import threading\nreplies = []\nt = threading.Thread(target=lambda: replies.append(llm_query('slow')))\nt.start()"
        )
        assert await sandbox.value("[replies, llm_query('quick')]") == [[], "quick"]
        go.set()
        assert await sandbox.value("t.join(20)\nreplies") == ["slow"]

    @requires("processes", "cpython")
    async def test_a_forked_process_cannot_call(self, sandbox: Sandbox) -> None:
        code = """
            import os
            reader, writer = os.pipe()
            if os.fork() == 0:
                try: llm_query('x')
                except RuntimeError as error: os.write(writer, str(error).encode())
                finally: os._exit(0)
            os.wait()
            os.read(reader, 1000).decode()
        """
        assert "only in the cell's own process" in await sandbox.value(code)
        assert await sandbox.value("llm_query('here')") == "echo:here"

    @requires("processes", "cpython")
    async def test_a_forked_process_that_runs_to_the_end_of_the_cell_says_nothing(
        self, sandbox: Sandbox
    ) -> None:
        result = await sandbox.ok(
            "import os\npid = os.fork()\nif pid: os.waitpid(pid, 0)\nprint('parent' if pid else 'child')"
        )
        assert sorted(result.stdout.split()) == ["child", "parent"]
        assert await sandbox.value("pid > 0") is True

    # --- waiting -----------------------------------------------------------------------------------------------

    async def test_waiting_for_a_model_is_not_computing(self, open_sandbox: OpenSandbox) -> None:
        async def serve(call: protocol.Call, texts: list[str]) -> list[str]:
            await asyncio.sleep(1.0)
            return texts

        sandbox = await open_sandbox(serve)
        assert await sandbox.value("llm_query('slow')", timeout=0.5) == "slow"
        assert await sandbox.value("llm_query_batched(['slow'])", timeout=0.5) == ["slow"]

    @requires("interrupt")
    async def test_computing_after_a_wait_counts(self, open_sandbox: OpenSandbox) -> None:
        async def serve(call: protocol.Call, texts: list[str]) -> list[str]:
            await asyncio.sleep(0.2)
            return texts

        sandbox = await open_sandbox(serve)
        error = await sandbox.error("reply = llm_query('a')\nwhile True: pass", timeout=0.5)
        assert error.kind == "timeout"
        assert await sandbox.value("reply") == "a"

    async def test_cancelling_a_cell_cancels_the_call_that_it_waits_for(
        self, open_sandbox: OpenSandbox
    ) -> None:
        begun, cancelled = asyncio.Event(), asyncio.Event()

        async def serve(call: protocol.Call, texts: list[str]) -> list[str]:
            if texts == ["quick"]:
                return texts
            begun.set()
            try:
                await asyncio.sleep(HOUR)
            except asyncio.CancelledError:
                cancelled.set()
                raise
            return texts

        HOUR = 3600
        sandbox = await open_sandbox(serve)
        task = asyncio.create_task(sandbox.run("llm_query('for ever')"))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(30):
            await cancelled.wait()
        assert await sandbox.value("llm_query('quick')") == "quick"

    @requires("threads", "cpython")
    async def test_a_cell_that_is_killed_in_a_call_leaves_the_next_ones_calls_alone(
        self,
        open_sandbox: OpenSandbox,
    ) -> None:
        async def serve(call: protocol.Call, texts: list[str]) -> list[str]:
            if texts == ["slow"]:
                await asyncio.sleep(0.5)
            return [f"reply to {text}" for text in texts]

        sandbox = await open_sandbox(serve)
        await sandbox.run(
            "import threading, time, os\nthreading.Thread(target=llm_query, args=['slow']).start()\ntime.sleep(0.1)\nos._exit(1)"
        )
        code = "import time\n[llm_query(str(i)) for i in range(5) if not time.sleep(0.2)]"
        assert await sandbox.value(code) == [f"reply to {i}" for i in range(5)]

    # --- the answer ----------------------------------------------------------------------------------------------

    async def test_no_answer_is_none(self, sandbox: Sandbox) -> None:
        result = await sandbox.ok("x = 1")
        assert (result.final_answer, result.final_value, result.draft, result.note) == (None, None, "", None)

    @pytest.mark.parametrize(
        ("code", "text", "value"),
        [
            ("FINAL('done')", "done", None), ("FINAL('')", "", None), ("FINAL(5)", "5", 5), ("FINAL({'a': [1]})", "{'a': [1]}", {"a": [1]}),
            ("FINAL((1, 2))", "(1, 2)", None), ("FINAL(None)", "None", None), ("FINAL(False)", "False", False),
            ("FINAL(value='kw')", "kw", None), ("x = 'in a variable'\nFINAL_VAR('x')", "in a variable", None),
            ("x = [1]\nFINAL_VAR('x')", "[1]", [1]), ("x = [1]\nFINAL_VAR(x)", "[1]", [1]), ("FINAL_VAR(5)", "5", 5),
            ("FINAL_VAR('no such name')", "no such name", None), ("FINAL_VAR('nothing')", "nothing", None),
            ("FINAL('first')\nFINAL('second')", "second", None), ("FINAL('x'); x = 1", "x", None),
            ("FINAL('\\ud800')", "\\ud800", None), ("def f(): FINAL('nested')\nf()", "nested", None),
            ("answer['content'] = 'c'; answer['ready'] = True", "c", None),
            ("answer['ready'] = True; answer['content'] = 'c'", "c", None),
            ("answer = {'content': 'rebound', 'ready': True}", "rebound", None),
            ("answer.update(content=[1], ready=1)", "[1]", [1]), ("answer.update(content=0, ready=True)", "0", 0),
            ("answer.update(content=[], ready=True)", "[]", []), ("answer.update(content='a', ready=True)\nFINAL('f')", "f", None),
        ],
    )  # fmt: skip
    @one_session
    def test_an_answer_is_submitted(self, repl: Cells, code: str, text: str, value: Any) -> None:
        repl.ok(NO_ANSWER)
        result = repl.ok(code)
        assert (result.final_answer, result.final_value) == (text, value)

    @pytest.mark.parametrize(
        "code",
        [
            "print('FINAL(x)')", "print('FINAL_VAR(x)\\nanswer[\"ready\"] = True')", "FINAL", "'FINAL(5)'",
            "import sys; sys.stderr.write('FINAL(5)')", "answer['content'] = 'draft'", "answer = 'text'", "answer = True",
            "answer['ready'] = True", "answer['ready'] = False; answer['content'] = 'x'", "del answer", "answer = None",
            "answer = {'ready': True}", "answer = {}", "answer = []", "def FINAL_ANSWER(x): pass",
            "FINAL = print; FINAL('not this one')", "import json\nprint(json.dumps({'t': 'result', 'final': 'x'}))",
        ],
    )  # fmt: skip
    @one_session
    def test_nothing_is_submitted_by(self, repl: Cells, code: str) -> None:
        repl.repl.add_context("Write FINAL(x), or answer['ready'] = True.")
        repl.ok(f"x = 1\n{NO_ANSWER}")
        result = repl.ok(f"print(context)\n{code}")
        assert (result.final_answer, result.final_value) == (None, None)

    async def test_an_answer_that_is_ready_before_its_content_is_submitted_with_it(
        self, sandbox: Sandbox
    ) -> None:
        result = await sandbox.ok("answer['ready'] = True")
        assert result.final_answer is None
        assert "content" in (result.note or "")
        result = await sandbox.ok("answer['content'] = 'now'")
        assert (result.final_answer, result.note) == ("now", None)

    async def test_an_answer_without_ready_is_a_draft(self, sandbox: Sandbox) -> None:
        assert (await sandbox.ok("answer['content'] = 'so far'")).draft == "so far"
        assert (await sandbox.ok("pass")).draft == "so far"

    async def test_a_failing_cell_can_submit_an_answer(self, sandbox: Sandbox) -> None:
        for code in ("FINAL('early')\n1/0", "answer.update(content='early', ready=True)\n1/0"):
            result = await sandbox.run(code)
            assert (result.final_answer, result.error and result.error.type) == ("early", "ZeroDivisionError")

    async def test_final_is_submitted_once(self, sandbox: Sandbox) -> None:
        assert (await sandbox.ok("FINAL('once')")).final_answer == "once"
        assert (await sandbox.ok("pass")).final_answer is None

    @requires("threads")
    async def test_final_from_a_thread_counts_in_its_cell(self, sandbox: Sandbox) -> None:
        result = await sandbox.ok(
            "import threading\nt = threading.Thread(target=FINAL, args=['there'])\nt.start(); t.join()"
        )
        assert result.final_answer == "there"

    @requires("cpython")
    async def test_a_final_answer_of_a_cell_that_died_is_not_submitted_later(self, sandbox: Sandbox) -> None:
        result = await sandbox.run("import os\nFINAL('never')\nos._exit(1)")
        assert result.final_answer is None
        assert (await sandbox.ok("pass")).final_answer is None

    @pytest.mark.parametrize("raised", ["ValueError(1)", "SystemExit(2)", "KeyboardInterrupt"])
    @pytest.mark.parametrize("submit", ["FINAL(Evil());", "answer.update(content=Evil(), ready=True)"])
    async def test_an_answer_that_has_no_text_is_an_error_of_its_cell(
        self, sandbox: Sandbox, submit: str, raised: str
    ) -> None:
        await sandbox.ok(EVIL.format(raised))
        result = await sandbox.run(f"own = 2\n{submit}")
        assert result.final_answer is None
        assert result.error is not None
        assert result.error.kind == "exception"
        assert await sandbox.value("answer = None\n[kept, own]") == [1, 2]

    @pytest.mark.parametrize("raised", ["ValueError(1)", "SystemExit(2)"])
    @pytest.mark.parametrize(
        "code", ["answer['ready'] = Evil()", "answer = type('D', (dict,), {'get': Evil.__str__})()"]
    )
    async def test_an_evil_answer_costs_no_variable(self, sandbox: Sandbox, code: str, raised: str) -> None:
        await sandbox.ok(EVIL.format(raised))
        await sandbox.run(f"own = 2\n{code}")
        assert await sandbox.value("answer = None\n[kept, own]") == [1, 2]

    async def test_content_whose_comparison_is_no_bool_is_an_answer(self, sandbox: Sandbox) -> None:
        """As a numpy array's is."""
        code = """
            class Array:
                def __eq__(self, other): return self
                def __bool__(self): raise ValueError('the truth value of an array is ambiguous')
                def __str__(self): return '[1 2]'
            answer['content'], answer['ready'] = Array(), True
        """
        assert (await sandbox.ok(code)).final_answer == "[1 2]"

    async def test_a_final_dict_whose_comparison_fails_is_an_answer(self, sandbox: Sandbox) -> None:
        result = await sandbox.ok(
            "class D(dict):\n    def __eq__(self, other): raise KeyError(1)\nFINAL(D(a=1));"
        )
        assert (result.final_answer, result.final_value) == ("{'a': 1}", None)

    async def test_an_answer_larger_than_a_frame_does_not_end_the_session(self, sandbox: Sandbox) -> None:
        await sandbox.run(f"kept = 1\nFINAL('x' * {257 * MEGABYTE});")
        assert await sandbox.value("kept") == 1

    async def test_an_answer_of_ten_megabytes_is_whole(self, sandbox: Sandbox) -> None:
        assert (await sandbox.ok("FINAL('é' * 10_000_000);")).final_answer == "é" * 10_000_000

    async def test_sandboxes_side_by_side_see_only_their_own(self, open_sandbox: OpenSandbox) -> None:
        boxes = [await open_sandbox() for _ in range(5)]
        code = "me = {0}\nimport time; time.sleep(0.05)\nprint(me)\nFINAL(llm_query(str(me)))"
        results: list[REPLResult] = await asyncio.gather(
            *(box.ok(code.format(i)) for i, box in enumerate(boxes))
        )
        assert [(r.stdout, r.final_answer) for r in results] == [(f"{i}\n", f"echo:{i}") for i in range(5)]

    async def test_cells_of_one_session_wait_for_each_other(self, sandbox: Sandbox) -> None:
        results = await asyncio.gather(*(sandbox.ok(f"n = {i}\nprint(n)") for i in range(20)))
        assert [r.stdout for r in results] == [f"{i}\n" for i in range(20)]

    async def test_calls_are_served_on_the_thread_of_the_loop(self, open_sandbox: OpenSandbox) -> None:
        """The serving function may use what belongs to the loop without a lock."""
        threads: set[str] = set()

        async def serve(call: protocol.Call, texts: list[str]) -> list[str]:
            threads.add(threading.current_thread().name)
            return texts

        await (await open_sandbox(serve)).ok("llm_query('a')")
        assert threads == {threading.current_thread().name}

    @requires("processes")
    async def test_nothing_is_submitted_by_what_a_program_prints(self, sandbox: Sandbox) -> None:
        code = "import subprocess; subprocess.run(['echo', 'FINAL(5)'])"
        assert (await sandbox.ok(f"{code}\nNone")).final_answer is None

"""Ask, run, observe, stop: one run of a model in a sandbox, and the runs it starts.

The loop decides what is asked and what is run. It makes no model call itself (the
LMHandler does), knows no environment but `BaseEnv`, and tells what happens only by
emitting events.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, cast

from . import context as contexts
from . import prompts, protocol
from .answers import AnswerCheck
from .client import Message, Reply
from .environment import BaseEnv, Host, Isolation, REPLResult
from .errors import ErrorThresholdExceeded, LimitExceeded, MaxIterationsExceeded, RLMError
from .events import (
    AnswerRejected,
    AnyEvent,
    CellFinished,
    CellOutput,
    CellStarted,
    EventBus,
    LimitReached,
    RunFinished,
    RunStarted,
    SandboxStarted,
    Warned,
)
from .handler import Caller, LMHandler
from .ledger import Ledger
from .parsing import CodeBlock, ParsedReply, parse_reply

Stopped = Literal["final", "plain", "max_iterations", "max_calls", "max_children", "max_tokens", "max_budget"]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended, when it ended well."""

    response: str
    value: Any
    stopped: Stopped
    iterations: int
    parsed: Any = None
    """The answer as the type that was asked for."""


@dataclasses.dataclass
class Tree:
    """What all runs of one completion share."""

    handler: LMHandler
    ledger: Ledger
    events: EventBus
    new_environment: Callable[[], BaseEnv]
    environment_name: str
    backend_name: str
    system_prompt: str | None
    width: int
    """Child runs of one batch at a time."""
    numbers: Any = dataclasses.field(default_factory=lambda: itertools.count(1))

    def next_run_id(self) -> str:
        """A name for a run, unique in its tree."""
        return f"run-{next(self.numbers)}"


class Run:
    """One run: a question, a context, a sandbox, a history."""

    def __init__(
        self,
        tree: Tree,
        context: Any,
        question: str | None,
        *,
        depth: int = 0,
        parent: str | None = None,
        model: str | None = None,
        notes: Sequence[str] = (),
        check: AnswerCheck | None = None,
    ) -> None:
        self._tree = tree
        self._context = context
        self._question = question
        self._depth = depth
        self._id = tree.next_run_id()
        self._parent = parent
        self._model = model
        self._notes = notes
        self._check = check or AnswerCheck()
        self._messages: list[Message] = []
        self._sent = 0
        self._iteration = 0
        self._cells = 0
        self._failed_turns = 0
        self._env: BaseEnv | None = None
        self.partial: str | None = None
        """The best answer so far, should the run end early."""

    @property
    def isolation(self) -> Isolation:
        """What stands between this run's cells and the host."""
        return self._env.isolation if self._env is not None else Isolation("no cells")

    # -- the run

    async def run(self) -> Outcome:
        """Run to the end. An RLMError that ends it carries the partial answer, usage and trace."""
        start = time.perf_counter()
        self._emit_started()
        try:
            outcome = await self._within_time()
        except BaseException as error:
            self._emit_failed(error, time.perf_counter() - start)
            raise
        self._emit(
            RunFinished, stopped=outcome.stopped, response=outcome.response, iterations=outcome.iterations,
            seconds=time.perf_counter() - start, usage=self._tree.ledger.usage(),
        )  # fmt: skip
        return outcome

    async def _within_time(self) -> Outcome:
        """The whole run under the tree's wall time. Children are inside their parent's."""
        seconds = self._tree.ledger.seconds_left() if self._depth == 0 else None
        try:
            async with asyncio.timeout(seconds) as scope:
                if self._tree.ledger.limits.max_depth == 0:
                    return await self._plain()
                async with contextlib.AsyncExitStack() as stack:
                    await self._start_environment(stack)
                    return await self._loop()
        except TimeoutError:
            if not scope.expired():
                raise
            raise self._tree.ledger.out_of_time() from None

    async def _plain(self) -> Outcome:
        """Depth 0: no sandbox, the model reads everything at once."""
        text = self._context if isinstance(self._context, str) else str(self._context)
        content = f"{self._question}\n\n{text}" if self._question else text
        self._messages = [Message("user", content)]
        reply = await self._ask()
        return Outcome(reply.text, None, "plain", 1)

    async def _start_environment(self, stack: contextlib.AsyncExitStack) -> None:
        start = time.perf_counter()
        self._env = self._tree.new_environment()
        stack.push_async_callback(self._env.close)
        await self._env.start(Host(self._tree.handler, self.serve, self._on_output, self._id))
        await self._env.add_context(self._context)
        isolation = self._env.isolation
        self._emit(
            SandboxStarted, environment=self._tree.environment_name, level=isolation.level,
            enforced=list(isolation.enforced), missing=list(isolation.missing),
            seconds=time.perf_counter() - start,
        )  # fmt: skip

    async def _loop(self) -> Outcome:
        limits = self._tree.ledger.limits
        self._messages = self._opening()
        for self._iteration in range(1, limits.max_iterations + 1):
            try:
                reply = await self._ask()
            except LimitExceeded as error:
                if limits.on_limit == "raise" or self._depth > 0:
                    raise
                self._tree.ledger.open_reserve()
                return await self._best_answer(error)
            self._messages.append(Message("assistant", reply.text))
            parsed = parse_reply(reply.text)
            self._note_prose(reply.text, parsed)
            observation, final = await self._act(reply, parsed)
            if final is not None:
                text = final.final_answer or ""
                parsed_answer, complaint = await self._check.check(text, final.final_value)
                if complaint is None:
                    return Outcome(text, final.final_value, "final", self._iteration, parsed_answer)
                self._emit(AnswerRejected, iteration=self._iteration, reason=complaint)
                left = limits.max_iterations - self._iteration
                observation = f"{prompts.fill('rejected', reason=complaint)}\n\n({left} turns left)"
            self._messages.append(Message("user", observation))
            self._check_failures()
        limit = limits.max_iterations
        message = f"the run used its {limit} iterations"
        return await self._best_answer(MaxIterationsExceeded(message, limit=limit, used=limit))

    # -- talking to the model

    def _opening(self) -> list[Message]:
        tree, limits = self._tree, self._tree.ledger.limits
        system = tree.system_prompt
        if system is None:
            deeper = self._depth + 1 < limits.max_depth
            system = prompts.fill("system", recursion=prompts.text("recursion") + "\n" if deeper else "")
        first = prompts.fill(
            "first",
            context=contexts.describe(self._context),
            iterations=str(limits.max_iterations),
            question=self._question or prompts.text("no_question"),
        )
        first = "\n\n".join(part for part in (first, self._check.wanted()) if part)
        return [Message("system", system), Message("user", first)]

    async def _ask(self) -> Reply:
        """The model's next reply. The previous request is a prefix of this one, to the byte."""
        prefix, self._sent = self._sent, len(self._messages)
        return await self._tree.handler.complete(
            self._messages, self._caller("root"), model=self._model, prefix=prefix
        )

    def _caller(self, kind: Literal["root", "sub"]) -> Caller:
        return Caller(self._id, self._parent, self._depth, kind)

    async def _best_answer(self, reached: LimitExceeded) -> Outcome:
        """A limit is reached: ask once, and take what comes for what it is."""
        self._emit(LimitReached, limit=reached.name, message=str(reached))
        last = self._messages[-1]
        self._messages[-1] = Message("user", f"{last.content}\n\n{prompts.text('out_of_iterations')}")
        try:
            reply = await self._ask()
        except LimitExceeded as error:
            reached.args = (f"{reached}, and could not be asked for its best answer: {error}",)
            raise reached from error
        directive = parse_reply(reply.text).directive
        text = directive.text if directive is not None and directive.kind == "FINAL" else reply.text
        parsed, complaint = await self._check.check(text.strip(), None)
        if complaint is not None:
            reached.args = (f"{reached}, and its best answer was not accepted: {complaint}",)
            raise reached
        return Outcome(text.strip(), None, cast(Stopped, reached.name), self._iteration, parsed)

    # -- acting on a reply

    async def _act(self, reply: Reply, parsed: ParsedReply) -> tuple[str, REPLResult | None]:
        """Run a reply's code, then its directive. Returns what to show, or what ends the run."""
        cut_off = reply.finish == "length" and parsed.unclosed
        blocks = parsed.blocks[:-1] if cut_off else parsed.blocks
        shown, failed, final = await self._run_blocks(blocks)
        if final is not None:
            return "", final
        if cut_off:
            shown.append(prompts.text("cut_off"))
        elif parsed.directive is not None and failed:
            shown.append(prompts.text("not_final"))
        elif parsed.directive is not None:
            if parsed.directive.kind == "FINAL":
                return "", REPLResult(final_answer=parsed.directive.text)
            result = await self._run_block(
                f"FINAL({parsed.directive.text})"
            )  # an identifier, the parser says
            if result.final_answer is not None:
                return "", result
            shown.append(self._observe(result))
            failed = True
        elif not blocks:
            shown.append(prompts.text("nothing_to_run"))
        self._failed_turns = self._failed_turns + 1 if failed else 0
        left = self._tree.ledger.limits.max_iterations - self._iteration
        return "\n\n".join([*shown, f"({left} turns left)"]), None

    async def _run_blocks(self, blocks: Sequence[CodeBlock]) -> tuple[list[str], bool, REPLResult | None]:
        """Run blocks in order until one fails. Returns observations, failure, the final result."""
        shown: list[str] = []
        final: REPLResult | None = None
        for index, block in enumerate(blocks):
            result = await self._run_block(block.code)
            shown.append(self._observe(result))
            if result.final_answer is not None:
                final = result
            if result.error is not None:
                if index + 1 < len(blocks):
                    shown.append(prompts.text("skipped"))
                return shown, True, final
        return shown, False, final

    async def _run_block(self, code: str) -> REPLResult:
        assert self._env is not None
        self._cells += 1
        cell, iteration = self._cells, self._iteration
        self._emit(CellStarted, cell=cell, iteration=iteration, code=code)
        result = await self._env.execute(code, timeout=self._tree.ledger.limits.cell_timeout)
        if result.draft:
            self.partial = result.draft
        error = result.error
        self._emit(
            CellFinished, cell=cell, iteration=iteration, stdout=result.stdout, stderr=result.stderr,
            echo=result.echo, error=f"{error.type}: {error.message}" if error else None,
            traceback=error.traceback if error else "", lost=list(result.lost),
            final=result.final_answer is not None, seconds=result.execution_time,
        )  # fmt: skip
        return result

    def _observe(self, result: REPLResult) -> str:
        """What the model is shown of a cell."""
        limit = self._tree.ledger.limits.max_output_chars
        parts = [f"[cell {self._cells}]"]
        if result.stdout:
            parts.append(_clip(result.stdout.rstrip("\n"), limit))
        if result.stderr:
            parts.append("stderr:\n" + _clip(result.stderr.rstrip("\n"), limit))
        if result.echo:
            parts.append("value: " + _clip(result.echo, limit))
        if result.error is not None:
            error = result.error
            parts.append(_clip(error.traceback.rstrip("\n"), limit) or f"{error.type}: {error.message}")
            if error.kind != "exception":
                parts.append(f"{error.message}. {_survival(result)}")
        elif result.lost:
            parts.append(_survival(result))
        if result.note:
            parts.append(result.note)
        if len(parts) == 1:
            parts.append("(no output)")
        return "\n".join(parts)

    def _note_prose(self, text: str, parsed: ParsedReply) -> None:
        """Words without code are the best there is until a draft stands in ``answer``."""
        if not parsed.blocks and text.strip() and self.partial is None:
            self.partial = text.strip()

    def _check_failures(self) -> None:
        limit = self._tree.ledger.limits.max_errors
        if limit is not None and self._failed_turns >= limit:
            raise ErrorThresholdExceeded(
                f"the code of {limit} turns in a row failed (max_errors={limit})",
                limit=limit,
                used=self._failed_turns,
            )

    # -- serving the cells

    async def serve(self, call: protocol.Call, texts: list[str]) -> Sequence[str | RLMError]:
        """Answer what a cell of this run calls. What it may do is decided here, not in the frame."""
        tree, limits = self._tree, self._tree.ledger.limits
        if call.fn == "budget":
            return [json.dumps(tree.ledger.budget(limits.max_iterations - self._iteration))]
        half = len(texts) // 2 if call.contexts else len(texts)
        inputs: list[str | None] = [*texts[half:]] if call.contexts else [None] * half
        items = list(zip(texts[:half], inputs, strict=True))
        deeper = call.fn == "rlm_query" and self._depth + 1 < limits.max_depth

        async def ask(item: tuple[str, str | None]) -> str:
            if deeper:
                return await self._ask_child(*item, model=call.model)
            prompt = item[0] if item[1] is None else f"{item[0]}\n\n{item[1]}"
            reply = await tree.handler.complete(
                [Message("user", prompt)], self._caller("sub"), model=call.model
            )
            return reply.text

        if not call.batch:
            return [await ask(item) for item in items]
        return await tree.handler.each(items, ask, tree.width if deeper else tree.handler.concurrency)

    async def _ask_child(self, prompt: str, context: str | None, model: str | None) -> str:
        question = None if context is None else prompt
        self._tree.ledger.reserve_child()
        child = Run(
            self._tree,
            prompt if context is None else context,
            question,
            depth=self._depth + 1,
            parent=self._id,
            model=model,
        )
        return (await child.run()).response

    def _on_output(self, stream: str, text: str) -> None:
        self._emit(CellOutput, cell=self._cells, stream=stream, text=text)

    # -- events

    def _emit(self, kind: Callable[..., AnyEvent], **values: Any) -> None:
        events = self._tree.events
        events.emit(kind(at=events.now(), run=self._id, parent=self._parent, depth=self._depth, **values))

    def _emit_started(self) -> None:
        self._emit(
            RunStarted, question=self._question, context=contexts.describe(self._context),
            backend=self._tree.backend_name, environment=self._tree.environment_name,
            started=datetime.now(UTC).isoformat() if self._depth == 0 else None,
            prompt=self._context if self._depth > 0 and self._question is None else None,
        )  # fmt: skip
        for note in self._notes:
            self._emit(Warned, message=note)

    def _emit_failed(self, error: BaseException, seconds: float) -> None:
        stopped = "error"
        if isinstance(error, LimitExceeded):
            stopped = error.name
            self._emit(LimitReached, limit=error.name, message=str(error))
        elif isinstance(error, asyncio.CancelledError):
            stopped = "cancelled"
        usage = self._tree.ledger.usage()
        self._emit(
            RunFinished, stopped=stopped, response=self.partial, error=f"{type(error).__name__}: {error}",
            iterations=self._iteration, seconds=seconds, usage=usage,
        )  # fmt: skip
        if isinstance(error, RLMError):
            error.partial_answer = self.partial
            error.usage = usage
            error.trace = self._tree.events.trace
            error.limits = self._tree.ledger.limits


def _survival(result: REPLResult) -> str:
    if result.lost:
        return f"Lost: {', '.join(result.lost)}."
    return "Every variable is as it was before this cell."


def _clip(text: str, limit: int) -> str:
    """Head and tail of a text, the gap between them counted."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n... [{len(text) - 2 * half:,} characters left out] ...\n{text[-half:]}"

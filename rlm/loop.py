"""Ask, run, observe, stop: one run of a model in a sandbox, and the runs it starts.

The loop decides what is asked and what is run. It makes no model call itself (the
LMHandler does), knows no environment but `BaseEnv`, and tells what happens only by
emitting events.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, Protocol, cast

from . import context as contexts
from . import prompts
from .answers import AnswerCheck
from .client import Message, Reply
from .compaction import Compaction, SupportsPut, shared
from .desk import Desk, Outcome, Stopped
from .environment import BaseEnv, Host, Isolation, REPLResult
from .errors import (
    ErrorThresholdExceeded,
    LimitExceeded,
    MaxIterationsExceeded,
    RLMError,
)
from .events import (
    AnswerRejected,
    AnyEvent,
    CellFinished,
    CellOutput,
    CellStarted,
    Compacted,
    LimitReached,
    Restored,
    RunFinished,
    RunStarted,
    SandboxStarted,
    Warned,
)
from .handler import Caller
from .parsing import CodeBlock, ParsedReply, parse_reply
from .pool import Environments
from .schemas import Schema
from .tree import Tree


class Turn(Protocol):
    """A run's part in a conversation: the sandbox is there already, and so is what was before."""

    reason: str | None
    """Why the sandbox had to be replaced, if it had."""
    lost: list[str]

    async def enter(self, host: Host, environments: Environments, context: Any) -> BaseEnv:
        """The conversation's sandbox, up, and served by this run, with its context in place."""

    async def leave(self, run: Run, question: str | None, answer: str | None) -> None:
        """The run is over, one way or another."""

    def told(self, described: str) -> str:
        """What the model is told of the contexts, the new one of which is ``described``."""


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
        turn: Turn | None = None,
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
        self._turn = turn
        self._messages: list[Message] = []
        self._sent: list[Message] = []
        self._compaction = Compaction() if tree.compaction is not None else None
        self._iteration = 0
        self._cells = 0
        self._failed_turns = 0
        self._env: BaseEnv | None = None
        self._desk = Desk(
            tree, self._caller("sub"), child=self._run_child, iterations_left=self._iterations_left
        )
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
            await self._leave(self.partial)
            self._emit_failed(error, time.perf_counter() - start)
            raise
        await self._leave(outcome.response)
        self._emit(
            RunFinished, stopped=outcome.stopped, response=outcome.response, iterations=outcome.iterations,
            seconds=time.perf_counter() - start, usage=self._tree.ledger.usage(),
        )  # fmt: skip
        return outcome

    async def _leave(self, answer: str | None) -> None:
        if self._turn is not None:
            await self._turn.leave(self, self._question, answer)

    async def _within_time(self) -> Outcome:
        """The whole run under the tree's wall time. Children are inside their parent's."""
        seconds = self._tree.ledger.seconds_left() if self._depth == 0 else None
        guard = self._tree.cancellable() if self._depth == 0 else contextlib.nullcontext()
        try:
            async with guard, asyncio.timeout(seconds) as scope:
                if self._tree.ledger.limits.max_depth == 0:
                    return await self._plain()
                async with self._desk.slot, contextlib.AsyncExitStack() as stack:
                    await self._start_environment(stack)
                    try:
                        return await self._loop()
                    finally:
                        await self._desk.close()
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
        host = Host(self._tree.handler, self._desk.serve, self._on_output, self._id, self._desk.tools)
        if self._turn is None:
            self._env = await stack.enter_async_context(self._tree.environments.lend(host))
            await self._env.add_context(self._context)
        else:
            self._env = await self._turn.enter(host, self._tree.environments, self._context)
            if self._turn.reason is not None:
                self._emit(Restored, reason=self._turn.reason, lost=self._turn.lost)
        if self._compaction is not None:
            await self._compaction.begin(self._env)
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
                await self._compact()
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
            advice = f"{prompts.text('advice')} " if tree.advice else ""
            system = prompts.fill("system", more=self._abilities(), advice=advice)
        elif self._desk.tools:
            system = f"{system}\n\n{prompts.fill('tools', tools=self._desk.tools.described())}"
        first = prompts.fill(
            "first",
            question=self._question or prompts.text("no_question"),
            context=self._what_there_is(),
            iterations=str(limits.max_iterations),
        )
        prologue = tree.prologue if self._depth == 0 else None
        first = "\n\n".join(part for part in (first, prologue, self._check.wanted()) if part)
        return [Message("system", system), Message("user", first)]

    def _abilities(self) -> str:
        """What this run can do besides what every run can, for the system prompt."""
        parts = []
        if self._desk.can_recurse:
            parts.append(prompts.text("recursion"))
        if self._compaction is not None and isinstance(self._env, SupportsPut):
            parts.append(prompts.text("history"))
        if names := self._tree.schemas.names:
            parts.append(prompts.fill("schemas", names=", ".join(f"`{name}`" for name in names)))
        if self._desk.tools:
            parts.append(prompts.fill("tools", tools=self._desk.tools.described()))
        return "".join(f"{part}\n" for part in parts)

    def _what_there_is(self) -> str:
        """The context, for the first message; in a conversation with what was before."""
        described = contexts.describe(self._context)
        if self._turn is None:
            return prompts.fill("context", variable="context", context=described)
        return self._turn.told(described)

    @property
    def history(self) -> list[dict[str, str]]:
        """The messages of this run so far, role and content of each; summaries of them are marked."""
        return (self._compaction or Compaction()).history(self._messages)

    async def _ask(self, messages: list[Message] | None = None) -> Reply:
        """The model's next reply. The previous request is a prefix of this one, to the byte.

        Only where the conversation has been summed up, or its last message added to, it is not all of it.
        """
        messages = list(messages or self._messages)
        reply = await self._tree.handler.complete(
            messages, self._caller("root"), model=self._model, prefix=shared(self._sent, messages)
        )
        self._sent = messages
        if self._compaction is not None:
            self._compaction.learn(messages, reply.usage)
        return reply

    async def _compact(self) -> None:
        """Sum the conversation up, when the next request comes near to what its model reads."""
        threshold, compaction, before = self._tree.compaction, self._compaction, self._messages
        if threshold is None or compaction is None:
            return
        assert self._env is not None
        limit, warning = threshold.tokens(self._tree.handler.models.choose(self._model, sub=self._depth > 0))
        if warning is not None:
            self._emit(Warned, message=warning)
        left = self._tree.ledger.limits.max_iterations - self._iteration + 1
        self._messages = await compaction.compact(before, limit, self._ask, self._env, left)
        if self._messages is not before:
            self._emit(
                Compacted, number=compaction.number, before=compaction.tokens(before),
                after=compaction.tokens(self._messages),
            )  # fmt: skip

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

    # -- what cells start, and print

    def _iterations_left(self) -> int:
        return self._tree.ledger.limits.max_iterations - self._iteration

    async def _run_child(
        self, prompt: str, context: str | None, model: str | None, schema: Schema | None
    ) -> Outcome:
        """A child run on ``prompt``, which without a context is one."""
        child = Run(
            self._tree,
            prompt if context is None else context,
            None if context is None else prompt,
            depth=self._depth + 1,
            parent=self._id,
            model=model,
            check=AnswerCheck(schema=schema),
        )
        return await child.run()

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

"""A conversation: several completions over one sandbox, whose variables stay.

Every completion brings its question, and perhaps a context of its own; what was asked and answered before it
stands in the sandbox as ``history_N``. After each, the variables are saved in the background, so that a
sandbox which dies costs no more than what came after; and a conversation can be saved to a file, and go on
from there in another process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from . import context as contexts
from . import hostloop, prompts, snapshot
from .environment import EVERYTHING, BaseEnv, Host, SupportsPersistence, SupportsSnapshot
from .errors import ConfigError, RLMError, SandboxError, SandboxLost
from .pool import nobody
from .snapshot import Snapshot

if TYPE_CHECKING:
    from .events import Subscriber
    from .loop import Run
    from .pool import Environments
    from .rlm import RLM, RLMChatCompletion

NEW_ANSWER = 'answer = {"content": "", "ready": False}'
"""What a completion begins with."""

RENEWAL_TIMEOUT = 5.0
"""Seconds of computing that putting it there gets: what it replaces may do anything when it goes."""

SHOWN_TURNS, SHOWN_CHARACTERS = 10, 300
"""What the model is shown of earlier questions and answers: how many, and how much of each."""


class Past(msgspec.Struct, frozen=True):
    """A completion that is over, as the next one is told of it."""

    question: str | None
    answer: str | None


class _File(msgspec.Struct, frozen=True):
    """A conversation in a file."""

    settings: dict[str, Any]
    missing: list[str]
    """Settings that could not be saved: objects, functions, keys."""
    contexts: list[tuple[contexts.Form, bytes]]
    histories: list[list[dict[str, str]]]
    past: list[Past]
    python: str
    variables: bytes | None
    lost: list[str]


class Conversation:
    """Several completions over one sandbox. Made by `RLM.session` and `RLM.resume`; a context manager.

    One completion at a time: another one waits for it. What a limit or an error ended leaves the
    variables as they were then.
    """

    def __init__(self, rlm: RLM) -> None:
        self._rlm = rlm
        self._owns_rlm = False
        self._turn = asyncio.Lock()
        self._env: BaseEnv | None = None
        self._host: Host | None = None
        self._contexts: list[Any] = []
        self._histories: list[list[dict[str, str]]] = []
        self._past: list[Past] = []
        self._saved: Snapshot | None = None
        self._saved_after = 0
        self._unsaved: str | None = None
        self._lost: list[str] = []
        """What the sandbox has lost since the model was told of such a thing."""
        self._saving: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._finalizer: weakref.finalize[..., Any] | None = None
        self._closings = 0

    # -- for users

    def completion(
        self, prompt: Any = None, root_prompt: str | None = None, *, response_model: Any = None
    ) -> RLMChatCompletion:
        """As `RLM.completion`; without ``prompt`` there is no new context, only a question."""
        return hostloop.run(self.complete(prompt, root_prompt, [], response_model))

    async def acompletion(
        self, prompt: Any = None, root_prompt: str | None = None, *, response_model: Any = None
    ) -> RLMChatCompletion:
        """`completion`, awaited."""
        return await hostloop.delegate(self.complete(prompt, root_prompt, [], response_model))

    def save(self, path: str | Path) -> list[str]:
        """Write the conversation to a file that only this user can read, replacing one of that name.

        Returns what could not be saved of it: variables, each with the reason, and settings that
        `RLM.resume` is to be given again. Raises SandboxError when the variables cannot be had.
        """
        return hostloop.run(self._save(Path(path)))

    def close(self) -> None:
        """End the sandbox. Safe to call twice."""
        hostloop.run(self.aclose())

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Conversation:
        return self

    async def __aexit__(self, *_: object) -> None:
        await hostloop.delegate(self.aclose())

    # -- on the core's loop

    async def complete(
        self,
        prompt: Any,
        root_prompt: str | None,
        subscribers: list[Subscriber],
        response_model: Any = None,
    ) -> RLMChatCompletion:
        """One completion, whose events ``subscribers`` are told."""
        if prompt is None and root_prompt is None:
            raise ConfigError("nothing is asked: give a context, or a question as root_prompt")
        self._notice_fork()
        async with self._turn:
            turn = _Turn(self, has_context=prompt is not None)
            return await self._rlm.complete(prompt, root_prompt, subscribers, response_model, turn)

    async def aclose(self) -> None:
        """End the sandbox, on the core's loop. Safe to call twice."""
        self._notice_fork()
        self._closings += 1
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.cancel()
            await asyncio.wait([saving])
        await self._drop()
        if self._owns_rlm:
            await self._rlm.aclose()

    def _notice_fork(self) -> None:
        """A fork has a loop of its own. The sandbox is its parent's, and so is whoever has the turn."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop, self._turn = loop, asyncio.Lock()
            self._env = self._host = self._saving = self._finalizer = None

    # -- the sandbox

    async def enter(self, host: Host, environments: Environments) -> tuple[BaseEnv, str | None, list[str]]:
        """The sandbox, served by ``host``; why it had to be replaced, if it had, and what that cost."""
        await self._saved_by_now()
        host.outlives_handler = True
        reason: str | None = None
        closings = self._closings
        if self._env is not None and self._host is not None:
            try:
                return self._env, None, await self._go_on(self._env, self._host, host)
            except SandboxError as error:
                reason = str(error)
                await self._drop()
                self._lost = []
        env = environments.new()
        try:
            await env.start(host)
            assert isinstance(env, SupportsPersistence)
            for given in self._contexts:
                await env.add_context(given)
            for history in self._histories:
                await env.add_history(history)
            lost = await self._restore(env) if self._past else []
            if closings != self._closings:
                raise SandboxLost("the session was closed")
        except BaseException:
            await env.close()
            raise
        self._env, self._host = env, host
        self._finalizer = weakref.finalize(self, hostloop.run_at_end, env.close)
        return env, reason if self._past else None, lost

    async def _drop(self) -> None:
        """End the sandbox, if there is one."""
        env, self._env = self._env, None
        finalizer, self._finalizer = self._finalizer, None
        if finalizer is not None:
            finalizer.detach()
        if env is not None:
            await env.close()

    async def _go_on(self, env: BaseEnv, ours: Host, host: Host) -> list[str]:
        """The same sandbox, for the next completion. Returns what has been lost in the meantime.

        Raises SandboxError when it is gone or of no use, or when another one would have more.
        """
        ours.handler, ours.serve, ours.on_output, ours.run = (
            host.handler, host.serve, host.on_output, host.run,
        )  # fmt: skip
        assert isinstance(env, SupportsPersistence)
        env.update_handler_address(host.handler.address)
        await self._run(env, NEW_ANSWER)
        if EVERYTHING in self._lost and self._saved is not None:
            raise SandboxError("nothing of it was left")
        lost, self._lost = self._lost, []
        return lost

    async def _run(self, env: BaseEnv, code: str) -> None:
        """Run a cell of ours, which is told what has been lost since the last one."""
        result = await env.execute(code, timeout=RENEWAL_TIMEOUT)
        self._lost += result.lost
        if result.error is not None:
            raise SandboxError(f"no cell runs in it any more: {result.error.type}: {result.error.message}")

    async def _restore(self, env: BaseEnv) -> list[str]:
        """Put the saved variables into a new sandbox. Returns what they are without."""
        if self._saved is None or not isinstance(env, SupportsSnapshot):
            return ["every variable but contexts and histories", *self._missing()]
        try:
            await env.restore(self._saved)
        except SandboxError as error:
            return [f"every variable but contexts and histories ({error})"]
        return [*self._saved.lost, *self._missing()]

    def _missing(self) -> list[str]:
        """What has come after that which is saved."""
        if self._unsaved:
            return [self._unsaved]
        later = len(self._past) - self._saved_after
        return [f"what the last {later} of the questions changed"] if self._saved and later else []

    async def add_context(self, env: BaseEnv, value: Any) -> None:
        """Keep a context, and put it into the sandbox."""
        assert isinstance(env, SupportsPersistence)
        await env.add_context(value, len(self._contexts))
        self._contexts.append(value)

    async def leave(self, run: Run, question: str | None, answer: str | None) -> None:
        """A completion is over: keep its messages, and save the variables while nobody waits."""
        self._past.append(Past(question, answer))
        self._histories.append(run.history)
        env, host = self._env, self._host
        if env is None or host is None:
            return
        host.serve, host.on_output = nobody, _ignore
        assert isinstance(env, SupportsPersistence)
        with contextlib.suppress(RLMError):  # the next completion will find out, and begin anew
            await env.add_history(run.history, len(self._histories) - 1)
        if self._rlm.config.snapshots and isinstance(env, SupportsSnapshot):
            self._saving = asyncio.get_running_loop().create_task(self._take_snapshot(env))

    async def _take_snapshot(self, env: BaseEnv) -> None:
        try:
            await self._save_variables(env)
        except Exception as error:  # a boundary, and nobody waits here. The one before it stays
            self._unsaved = f"what came after question {self._saved_after} ({error})"

    async def _save_variables(self, env: BaseEnv) -> None:
        """Save them, unless they are lost: then what was saved before is all that there is."""
        assert isinstance(env, SupportsSnapshot)
        await self._run(env, "")
        if EVERYTHING not in self._lost:
            self._saved, self._saved_after = await env.snapshot(), len(self._past)
            self._unsaved = None

    async def _saved_by_now(self) -> None:
        saving, self._saving = self._saving, None
        if saving is not None:
            await asyncio.wait([saving])

    # -- what the model is told

    def told(self, described: str, reason: str | None, lost: list[str], has_context: bool) -> str:
        """What there is in the sandbox, besides what every one has."""
        count = len(self._contexts)
        earlier = count - has_context
        name = "context" if earlier == 0 else f"context_{count - 1}"
        text = prompts.text("no_new_context")
        if has_context:
            text = prompts.fill("context", variable=name, context=described)
        if not self._past:
            return text
        if earlier > 0:
            text += " " + prompts.fill("earlier_contexts", names=_names("context", earlier)).strip()
        return prompts.fill(
            "again",
            number=str(len(self._past) + 1),
            contexts=text,
            before=self._before(),
            histories=_names("history", len(self._histories)),
            loss=_loss(reason, lost),
        )

    def _before(self) -> str:
        first = max(0, len(self._past) - SHOWN_TURNS)
        return "\n".join(
            f"{number}. {_clip(past.question) or '(the task was in the context)'} -> "
            f"{_clip(past.answer) or '(no answer)'}"
            for number, past in enumerate(self._past[first:], first + 1)
        )

    # -- files

    async def _save(self, path: Path) -> list[str]:
        self._notice_fork()
        async with self._turn:
            await self._saved_by_now()
            env = self._env
            if self._saved_after < len(self._past) and env is not None and isinstance(env, SupportsSnapshot):
                await self._save_variables(env)
            settings, missing = self._rlm.config.savable()
            kept = self._saved
            nothing = ["every variable"] if self._past else []
            lost = [*(kept.lost if kept is not None else nothing), *self._missing()]
            file = _File(
                settings=settings,
                missing=missing,
                contexts=[contexts.encode(value) for value in self._contexts],
                histories=[[_readable(message) for message in history] for history in self._histories],
                past=[Past(_readable(past.question), _readable(past.answer)) for past in self._past],
                python=kept.python if kept is not None else "",
                variables=kept.data if kept is not None else None,
                lost=lost,
            )
            await asyncio.to_thread(_write, path, snapshot.seal(msgspec.msgpack.encode(file)))
            return [*file.lost, *(f"the setting {name}" for name in missing)]

    @classmethod
    def read(cls, path: Path, overrides: dict[str, Any]) -> Conversation:
        """A conversation from a file. Raises ConfigError for one that `save` did not write, or that lacks
        settings which ``overrides`` do not give."""
        from .rlm import RLM

        content = snapshot.open_sealed(_read(path), repr(str(path)))
        try:
            file = msgspec.msgpack.decode(content, type=_File)
        except msgspec.MsgspecError as error:
            raise ConfigError(f"{str(path)!r} was saved by another version of rlm: {error}") from None
        # a key, "backend_kwargs.api_key" say, may be in the environment by now
        absent = [name for name in file.missing if name not in overrides and "." not in name]
        if absent:
            again = ", ".join(f"{name}=..." for name in absent)
            raise ConfigError(f"{str(path)!r} lacks what no file holds: RLM.resume(..., {again})")
        self = RLM(**{**file.settings, **overrides}).session()
        self._owns_rlm = True
        self._contexts = [_decoded(form, data) for form, data in file.contexts]
        self._histories = file.histories
        self._past = file.past
        if file.variables is not None:
            self._saved = Snapshot(file.python, file.variables, tuple(file.lost))
        self._saved_after = len(file.past)
        return self


class _Turn:
    """One completion's part in a conversation."""

    def __init__(self, conversation: Conversation, has_context: bool) -> None:
        self._conversation = conversation
        self._has_context = has_context
        self.reason: str | None = None
        self.lost: list[str] = []

    async def enter(self, host: Host, environments: Environments, context: Any) -> BaseEnv:
        """See `loop.Turn`."""
        env, self.reason, self.lost = await self._conversation.enter(host, environments)
        if self._has_context:
            await self._conversation.add_context(env, context)
        return env

    def told(self, described: str) -> str:
        """See `loop.Turn`."""
        return self._conversation.told(described, self.reason, self.lost, self._has_context)

    async def leave(self, run: Run, question: str | None, answer: str | None) -> None:
        """See `loop.Turn`."""
        await self._conversation.leave(run, question, answer)


def _ignore(stream: str, text: str) -> None:
    """Told what is printed between two completions."""


def _decoded(form: contexts.Form, data: bytes) -> Any:
    """A context out of a file: what it was, but for pickled data, which goes to a sandbox as it is."""
    if form == "text":
        return data.decode("utf-8", "surrogatepass")
    return data if form == "bytes" else contexts.Encoded(form, data)


def _readable(thing: Any) -> Any:
    """Text, or a message, without what UTF-8 has no form for."""
    if isinstance(thing, dict):
        return {name: _readable(text) for name, text in thing.items()}
    return thing if thing is None else thing.encode("utf-8", "replace").decode()


def _names(kind: str, count: int) -> str:
    if count == 1:
        return f"`{kind}_0`"
    return f"`{kind}_0` to `{kind}_{count - 1}`"


def _clip(text: str | None) -> str:
    flat = " ".join((text or "").split())
    return flat if len(flat) <= SHOWN_CHARACTERS else f"{flat[:SHOWN_CHARACTERS]}..."


def _loss(reason: str | None, lost: list[str]) -> str:
    if reason is None and not lost:
        return ""
    text = prompts.fill(
        "restored",
        reason=f" ({reason})" if reason else "",
        lost=f"Lost: {'; '.join(lost)}." if lost else "Nothing is missing.",
    )
    return f"\n\n{text}"


def _read(path: Path) -> bytes:
    """A file, if it may be a session's: else no more of it than shows what it is."""
    try:
        with open(path, "rb") as file:
            head = file.read(snapshot.HEAD)
            return head + file.read() if head.startswith(snapshot.MAGIC) else head
    except OSError as error:
        raise ConfigError(f"the session {str(path)!r} cannot be read: {error.strerror}") from error


def _write(path: Path, data: bytes) -> None:
    """All of it or nothing, for this user alone."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
        os.replace(fresh, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise ConfigError(f"the session cannot be saved to {str(path)!r}: {error.strerror}") from error

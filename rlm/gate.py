"""What stands between the LMHandler and a provider: its pace, another try, and a circuit.

A `Gate` is one client behind the `Pool` of its provider, and that of a model with limits of
its own. Pools are shared by everything that draws on the same limits. Retries use full jitter
(M. Brooker, "Exponential Backoff And Jitter", 2015) and honour Retry-After.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec

from .client import (
    CHARACTERS_PER_TOKEN,
    BaseLM,
    ModelInfo,
    Price,
    Reply,
    Request,
    SupportsPoolKey,
    SupportsStream,
    Usage,
)
from .errors import (
    ConnectFailed,
    ModelError,
    ProtocolError,
    RateLimited,
    RetryableError,
    Timeout,
    Unavailable,
)
from .pace import Pace, RateLimit, Times

log = logging.getLogger("rlm")

BACKOFF = 1.0
"""Seconds within which the first retry falls; each further one doubles it."""

LONGEST_BACKOFF = 60.0

LONGEST_RETRY_AFTER = 600.0
"""Seconds a provider may ask to be left alone; when it asks for more, the call fails at once."""

MAX_REFUSALS = 20
"""Times that one call may be refused for the sake of a rate limit."""

FAILURES_TO_OPEN = 8
"""Failures in a row after which a provider is taken to be down."""

FIRST_COOLDOWN, LONGEST_COOLDOWN = 1.0, 30.0
"""Seconds a provider that is down is left alone; doubled each time it still is."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """How calls are made."""

    max_retries: int = 5
    """Further attempts of a call that failed; being refused by a rate limit does not count."""
    timeout: float | None = 600.0
    """Seconds of one attempt."""
    hedge_after: float | None = None
    """Seconds without a reply after which the same is asked a second time; the first reply counts."""


@dataclasses.dataclass(frozen=True)
class Retry:
    """An attempt that came to nothing, and what happens next."""

    attempt: int
    error: str
    sent: bool
    """Whether it may have been billed."""
    wait: float
    """Seconds until the next one, at least."""


class Watcher(Protocol):
    """Is told how a call goes."""

    def started(self) -> None:
        """An attempt is about to be made. Whatever it raises ends the call."""

    def retried(self, retry: Retry) -> None:
        """An attempt came to nothing, and another one follows."""

    def wrote(self, text: str) -> None:
        """A piece of a reply has arrived."""


class Pool:
    """What calls to one provider, or to one of its models, have in common."""

    def __init__(self, name: str, limit: RateLimit | None = None, times: Times | None = None) -> None:
        limit = limit or RateLimit()
        self.name = name
        self.pace = Pace(limit, times)
        self.circuit = Circuit(name)
        self._slots = asyncio.Semaphore(limit.concurrency) if limit.concurrency else None
        self._turn = asyncio.Lock()

    async def enter(self, tokens: int, patience: float) -> bool:
        """Wait until an attempt may be made. Returns whether it is to find out if the provider is back.

        Raises Unavailable while the provider is left alone, RateLimited when the provider asked for
        a longer rest than ``patience`` seconds.
        """
        self.circuit.check()
        if self._slots is not None:
            await self._slots.acquire()
        try:
            if self.pace.is_free and not self._turn.locked():
                self.pace.take(time.monotonic(), tokens)
            else:
                await self._take_turn(tokens, patience)
            return await self.circuit.enter()
        except BaseException:
            self._release()
            raise

    async def _take_turn(self, tokens: int, patience: float) -> None:
        async with self._turn:  # first come, first served
            while (wait := self.pace.wait(time.monotonic())) > 0:
                if wait > patience:
                    raise RateLimited(
                        f"{self.name} asked to be left alone for another {wait:.0f} s",
                        sent=False,
                        retry_after=wait,
                    )
                await asyncio.sleep(wait)
            self.pace.take(time.monotonic(), tokens)

    def leave(self, is_probe: bool) -> None:
        """The attempt is over, one way or another."""
        if is_probe:
            self.circuit.leave()
        self._release()

    def _release(self) -> None:
        if self._slots is not None:
            self._slots.release()

    def worked(self, tokens: int) -> None:
        """An attempt got a reply, for which ``tokens`` more were used than had been estimated."""
        self.circuit.worked()
        self.pace.correct(tokens)

    def failed(self, error: ModelError, sent_at: float) -> None:
        """An attempt failed. Being refused slows everyone down, not only who was refused."""
        if isinstance(error, RateLimited):
            self.pace.refused(time.monotonic(), sent_at, error.retry_after)
        if isinstance(error, Unavailable | ConnectFailed | Timeout):
            self.circuit.failed(error)
        elif error.status is not None:  # whoever refuses is there
            self.circuit.worked()


class Circuit:
    """Stops asking a provider that is down, and asks again with one call, for whose end all others wait."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._failures = 0
        self._cooldown = FIRST_COOLDOWN
        self._closed_at = 0.0
        self._probe: asyncio.Event | None = None
        self._last = ""

    def check(self) -> None:
        """Raises Unavailable while nothing is to be sent."""
        wait = self._closed_at - time.monotonic()
        if self._failures >= FAILURES_TO_OPEN and wait > 0:
            raise Unavailable(
                f"{self._name} has failed {self._failures} times in a row and is left alone for a while; "
                f"the last time: {self._last}",
                sent=False,
                retry_after=wait,
            )

    async def enter(self) -> bool:
        """A call is about to go out. Returns whether it is the one that finds out; then `leave` follows."""
        while self._failures >= FAILURES_TO_OPEN:
            self.check()
            if self._probe is None:
                self._probe = asyncio.Event()
                return True
            await self._probe.wait()
        return False

    def leave(self) -> None:
        """The call that was to find out is over."""
        if self._probe is not None:
            self._probe.set()
            self._probe = None

    def worked(self) -> None:
        """The provider is there."""
        self._failures, self._cooldown = 0, FIRST_COOLDOWN

    def failed(self, error: ModelError) -> None:
        """The provider is not, or does not work."""
        self._failures += 1
        self._last = f"{type(error).__name__}: {error}"
        now = time.monotonic()
        if self._failures >= FAILURES_TO_OPEN and now >= self._closed_at:
            self._closed_at = now + self._cooldown
            self._cooldown = min(self._cooldown * 2, LONGEST_COOLDOWN)


@dataclasses.dataclass(frozen=True)
class _Call:
    """What the attempts of one call have in common."""

    request: Request
    watcher: Watcher
    slots: contextlib.AbstractAsyncContextManager[Any]
    seconds_left: Callable[[], float | None]
    stream: bool


class Gate:
    """One client, behind its provider's pool."""

    def __init__(
        self,
        client: BaseLM,
        name: str = "",
        *,
        owned: bool = True,
        policy: Policy | None = None,
        pool_for: Callable[[str, str], Sequence[Pool]] | None = None,
        prices: dict[str, Price] | None = None,
        identity: str = "",
    ) -> None:
        self.client = client
        self.name = name or type(client).__name__
        self.owned = owned
        """Whether the client is closed with the gate; one that was given is closed by who gave it."""
        self.identity = identity
        """What tells this client from others of its name: for a cache, whose replies outlive the client."""
        self.policy = policy or Policy()
        self._own_pool = (Pool(self.name),)
        self._pool_for = pool_for or (lambda provider, model: self._own_pool)
        self._pools: dict[str, Sequence[Pool]] = {}
        self._infos: dict[str, ModelInfo] = {}
        self._said = {**(prices or {})}

    def price(self, asked: str, answered: str | None = None) -> Price | None:
        """What a model costs, by the name it was asked by or the one it answers by.

        As the user said, else as the client knows; None when nobody knows.
        """
        names = [asked] if answered is None else [answered, asked]
        said = next((self._said[name] for name in names if name in self._said), None)
        return said or next((price for name in names if (price := self._known(name).price)), None)

    def info(self, model: str) -> ModelInfo:
        """What is known of a model, with what it costs."""
        return msgspec.structs.replace(self._known(model), price=self.price(model))

    def _known(self, model: str) -> ModelInfo:
        """What the client knows. Not knowing must not cost a reply that has been paid for."""
        if model not in self._infos:
            try:
                self._infos[model] = self.client.info(model)
            except Exception as error:  # a boundary: a client is somebody else's code
                # its text, and that of a traceback, may hold a key
                log.warning("%s says nothing of %r: %s", self.name, model, type(error).__name__)
                self._infos[model] = ModelInfo()
        return self._infos[model]

    def origin(self, request: Request) -> tuple[str, str, str, str]:
        """Whose reply this would be: the backend, what it was made with, its address, the model."""
        model = request.model or self.client.model_name
        return self.name, self.identity, self._address(model) or "", model

    async def call(
        self,
        request: Request,
        watcher: Watcher,
        *,
        slots: contextlib.AbstractAsyncContextManager[Any],
        seconds_left: Callable[[], float | None] = lambda: None,
        stream: bool = False,
    ) -> Reply:
        """A reply, after as many attempts as it takes and the policy allows.

        ``slots`` is held during an attempt, not between attempts. With ``stream`` the watcher is
        told what the model writes as it does, if the client can.
        """
        faults = refusals = 0
        call = _Call(request, watcher, slots, seconds_left, stream)
        while True:
            try:
                if self.policy.hedge_after is not None and not stream:
                    return await self._hedged(call, self.policy.hedge_after)
                return await self._attempt(call)
            except RetryableError as error:
                failure = error
            if isinstance(failure, RateLimited):
                refusals += 1
            else:
                faults += 1
            wait = self._wait(failure, faults, refusals, seconds_left())
            if wait is None:
                _count_attempts(failure, faults + refusals)
                raise failure
            text = f"{type(failure).__name__}: {failure}"
            watcher.retried(Retry(faults + refusals, text, failure.sent, wait))
            if not isinstance(failure, RateLimited):  # a refused one waits in the pool, with all others
                await asyncio.sleep(wait)

    def _wait(self, failure: RetryableError, faults: int, refusals: int, left: float | None) -> float | None:
        """Seconds before the next attempt; None when there is to be none."""
        if faults > self.policy.max_retries or refusals > MAX_REFUSALS:
            return None
        asked = failure.retry_after or 0.0
        if asked > LONGEST_RETRY_AFTER or (left is not None and asked >= left):
            return None
        if isinstance(failure, RateLimited):
            return asked
        return max(asked, random.uniform(0, min(BACKOFF * 2 ** (faults - 1), LONGEST_BACKOFF)))

    async def _attempt(self, call: _Call, sent: asyncio.Event | None = None) -> Reply:
        """One attempt, within the limits of its pools. ``sent`` is set when it goes out."""
        request, pools = call.request, self._pools_of(call.request)
        tokens = _estimate(request) if any(pool.pace.counts_tokens for pool in pools) else 0
        left = call.seconds_left()
        patience = LONGEST_RETRY_AFTER if left is None else min(left, LONGEST_RETRY_AFTER)
        entered: list[tuple[Pool, bool]] = []
        try:
            for pool in pools:
                entered.append((pool, await pool.enter(tokens, patience)))
            async with call.slots:
                call.watcher.started()
                if sent is not None:
                    sent.set()
                sent_at = time.monotonic()
                try:
                    reply = await self._in_time(call)
                except ModelError as error:
                    for pool in pools:
                        pool.failed(error, sent_at)
                    raise
            for pool in pools:
                pool.worked(reply.usage.input_tokens + reply.usage.output_tokens - tokens)
            return reply
        finally:
            for pool, is_probe in entered:
                pool.leave(is_probe)

    async def _in_time(self, call: _Call) -> Reply:
        limit = self.policy.timeout
        try:
            async with asyncio.timeout(limit) as scope:
                return _checked(await self._made(call))
        except TimeoutError:
            if not scope.expired():
                raise
            raise Timeout(f"no reply within {limit:g} s") from None

    async def _made(self, call: _Call) -> Any:
        """What the client makes of it; it must neither end the process nor this task."""
        try:
            if call.stream and isinstance(self.client, SupportsStream):
                return await self._streamed(self.client, call)
            return await self.client.complete(call.request)
        except (SystemExit, KeyboardInterrupt, GeneratorExit) as error:
            raise ModelError(f"the client raised {type(error).__name__}, as if to end the process") from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise ModelError("the client cancelled its own call") from None

    async def _streamed(self, client: SupportsStream, call: _Call) -> Reply:
        stream: Any = client.stream(call.request)
        try:
            async for piece in stream:
                if isinstance(piece, Reply):
                    return piece
                call.watcher.wrote(piece)
        finally:
            if hasattr(stream, "aclose"):  # an iterator need not have it; a generator wants it
                await stream.aclose()
        raise ProtocolError("the stream ended without a reply")

    async def _hedged(self, call: _Call, after: float) -> Reply:
        """The first reply of two attempts, the second of which is made when the first takes long."""
        sent = asyncio.Event()
        first = asyncio.ensure_future(self._attempt(call, sent))
        first.add_done_callback(lambda _: sent.set())  # it may fail before it is sent
        pending = {first}
        try:
            await sent.wait()
            await asyncio.wait(pending, timeout=after)
            if not first.done():
                call.watcher.retried(Retry(1, f"no reply after {after:g} s: asked a second time", True, 0.0))
                pending.add(asyncio.ensure_future(self._attempt(call)))
            while True:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                good = [task for task in done if task.exception() is None]
                if good or not pending:
                    return (good or [*done])[0].result()
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    def _pools_of(self, request: Request) -> Sequence[Pool]:
        model = request.model or self.client.model_name
        pools = self._pools.get(model)
        if pools is None:
            pools = self._pools[model] = self._pool_for(
                # without an address: nobody else's, whatever others are called
                self._address(model) or f"{self.name}\0{id(self.client)}",
                model,
            )
        return pools

    def _address(self, model: str) -> str | None:
        client = self.client
        return client.pool_key(model) if isinstance(client, SupportsPoolKey) else None


def _estimate(request: Request) -> int:
    characters = sum(len(message.content) for message in request.messages)
    return characters // CHARACTERS_PER_TOKEN + (request.max_tokens or 0)


def _count_attempts(failure: ModelError, attempts: int) -> None:
    if attempts > 1:
        failure.args = (f"{failure} (after {attempts} attempts)",)


def _checked(reply: object) -> Reply:
    """A client is somebody else's code: what it returns is looked at before it is believed."""
    if not isinstance(reply, Reply) or not isinstance(reply.text, str) or not isinstance(reply.usage, Usage):
        raise ModelError(f"the client returned {type(reply).__name__} in place of a complete Reply")
    return reply

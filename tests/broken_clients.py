"""Clients that each break one promise, so that the suite can be seen to notice."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp
import msgspec
from plain_clients import Data, PlainAnthropic, PlainLM, retry_after

from rlm.client import ModelInfo, Reply, Request, Usage
from rlm.errors import (
    BadRequest,
    ConnectFailed,
    ModelError,
    ProtocolError,
    RetryableError,
    Timeout,
    Unavailable,
)


class Altered(PlainLM):
    """Does something to every reply."""

    def made(self, data: Data, text: str, finish: Any) -> Reply:
        return self.alter(super().made(data, text, finish))

    def alter(self, reply: Reply) -> Reply:
        return reply


class IgnoresUsage(Altered):
    def alter(self, reply: Reply) -> Reply:
        return msgspec.structs.replace(reply, usage=Usage())


class SubtractsWhatWasCached(Altered):
    def alter(self, reply: Reply) -> Reply:
        fresh = reply.usage.input_tokens - reply.usage.cached_tokens
        return msgspec.structs.replace(reply, usage=msgspec.structs.replace(reply.usage, input_tokens=fresh))


class TakesAnthropicsInputForAll(PlainAnthropic):
    def usage(self, data: Any) -> Usage:
        usage = super().usage(data)
        return msgspec.structs.replace(
            usage, input_tokens=usage.input_tokens - usage.cached_tokens - usage.cache_write_tokens
        )


class TakesCostForNothing(Altered):
    def alter(self, reply: Reply) -> Reply:
        return msgspec.structs.replace(reply, usage=msgspec.structs.replace(reply.usage, cost=0.0))


class NeedsUsage(PlainLM):
    def usage(self, data: Any) -> Usage:
        return Usage(data["prompt_tokens"], data["completion_tokens"])


class TakesLengthForStop(Altered):
    def alter(self, reply: Reply) -> Reply:
        return msgspec.structs.replace(reply, finish="stop")


class StripsText(Altered):
    def alter(self, reply: Reply) -> Reply:
        return msgspec.structs.replace(reply, text=reply.text.strip().replace("\r\n", "\n"))


class Sends(PlainLM):
    """Sends something else than it was asked to."""

    def body(self, request: Request) -> Data:
        return self.alter(super().body(request))

    def alter(self, body: Data) -> Data:
        return body


class SendsATemperature(Sends):
    def alter(self, body: Data) -> Data:
        return {"temperature": 0.7, **body}


class DropsWhatIsZero(Sends):
    def alter(self, body: Data) -> Data:
        return {name: value for name, value in body.items() if value}


class ForgetsTheModel(Sends):
    def alter(self, body: Data) -> Data:
        return {**body, "model": self.model_name}


class DropsExtra(Sends):
    def alter(self, body: Data) -> Data:
        return {name: value for name, value in body.items() if not name.startswith("x_")}


class EveryoneBecomesUser(Sends):
    def alter(self, body: Data) -> Data:
        said = [
            {**message, "role": message["role"].replace("system", "user")} for message in body["messages"]
        ]
        return {**body, "messages": said}


class RetriesByItself(PlainLM):
    async def complete(self, request: Request) -> Reply:
        with contextlib.suppress(RetryableError):
            return await super().complete(request)
        return await super().complete(request)


class IgnoresTimes(PlainLM):
    async def complete(self, request: Request) -> Reply:
        return await super().complete(msgspec.structs.replace(request, timeout=None))


class TimesOnlyItsReads(PlainLM):
    """Waits for so long for every part."""

    async def complete(self, request: Request) -> Reply:
        timeout = aiohttp.ClientTimeout(sock_read=request.timeout)
        await self.aclose()
        self.session = aiohttp.ClientSession(timeout=timeout)
        return await super().complete(msgspec.structs.replace(request, timeout=None))


class TimesOutAsAnyError(PlainLM):
    @contextlib.asynccontextmanager
    async def answer(self, request: Request, body: Data) -> AsyncIterator[aiohttp.ClientResponse]:
        try:
            async with super().answer(request, body) as response:
                yield response
        except Timeout:
            raise TimeoutError from None


class HidesThatNothingWasSent(PlainLM):
    async def complete(self, request: Request) -> Reply:
        try:
            return await super().complete(request)
        except ConnectFailed:
            raise ConnectFailed("no connection", sent=True) from None


class DeniesThatItWasSent(PlainLM):
    async def complete(self, request: Request) -> Reply:
        try:
            return await super().complete(request)
        except Unavailable:
            raise Unavailable("the connection ended", sent=False) from None


class LetsErrorsThrough(PlainLM):
    @contextlib.contextmanager
    def errors(self) -> Any:
        yield


class HasOneError(PlainLM):
    def kind(self, status: int, code: str | None) -> type[ModelError]:
        return Unavailable


class TakesAQuotaForARate(PlainLM):
    def kind(self, status: int, code: str | None) -> type[ModelError]:
        return super().kind(status, None)


class SeesNoOverflow(PlainLM):
    def refusal(self, response: aiohttp.ClientResponse, body: bytes) -> ModelError:
        return (
            BadRequest("it is too long") if response.status in (400, 413) else super().refusal(response, body)
        )


class KeepsNoDetails(PlainLM):
    def refusal(self, response: aiohttp.ClientResponse, body: bytes) -> ModelError:
        error = super().refusal(response, body)
        error.request_id = None
        return error


class ReadsOnlySeconds(PlainLM):
    def refusal(self, response: aiohttp.ClientResponse, body: bytes) -> ModelError:
        error = super().refusal(response, body)
        if isinstance(error, RetryableError):
            after = response.headers.get("Retry-After", "")
            error.retry_after = retry_after({"Retry-After": after}) if after.isdecimal() else None
        return error


class BelievesAnyNumber(PlainLM):
    def refusal(self, response: aiohttp.ClientResponse, body: bytes) -> ModelError:
        error = super().refusal(response, body)
        if isinstance(error, RetryableError):
            with contextlib.suppress(ValueError):
                error.retry_after = float(response.headers.get("Retry-After", ""))
        return error


class TakesAnythingForAReply(PlainLM):
    def read(self, data: Data) -> Reply:
        try:
            return super().read(data)
        except (LookupError, TypeError, AttributeError):
            return Reply("")


class BlamesTheRequest(PlainLM):
    """Gives up on what is no reply."""

    async def complete(self, request: Request) -> Reply:
        try:
            return await super().complete(request)
        except ProtocolError as error:
            raise BadRequest(str(error)) from None


class GoesOnWhenCancelled(PlainLM):
    async def complete(self, request: Request) -> Reply:
        return await asyncio.shield(super().complete(request))


class SwallowsCancelling(PlainLM):
    async def complete(self, request: Request) -> Reply:
        try:
            return await super().complete(request)
        except asyncio.CancelledError:
            raise Unavailable("cancelled") from None


class BreaksWhenCancelled(PlainLM):
    async def complete(self, request: Request) -> Reply:
        try:
            return await super().complete(request)
        except asyncio.CancelledError:
            self._url = "http://127.0.0.1:9/"
            raise


class ConfusesReplies(PlainLM):
    """Keeps in one place what belongs to a call."""

    asked: Request

    async def complete(self, request: Request) -> Reply:
        self.asked = request
        await asyncio.sleep(0.01)
        return await super().complete(self.asked)


class CallsOneByOne(PlainLM):
    def __init__(self, model_name: str, base_url: str, api_key: str) -> None:
        super().__init__(model_name, base_url, api_key)
        self._turn = asyncio.Lock()

    async def complete(self, request: Request) -> Reply:
        async with self._turn:
            return await super().complete(request)


class ConnectsEveryTime(PlainLM):
    async def complete(self, request: Request) -> Reply:
        try:
            return await super().complete(request)
        finally:
            await self.aclose()
            self.session = None


class LeavesConnections(PlainLM):
    """Its session is never closed, but for the collector."""

    async def aclose(self) -> None:
        pass


class ClosesOnce(PlainLM):
    async def aclose(self) -> None:
        if self.session is not None and self.session.closed:
            raise RuntimeError("it is closed already")
        await super().aclose()


class NeedsACallToClose(PlainLM):
    async def aclose(self) -> None:
        if self.session is None:
            raise RuntimeError("there is nothing to close")
        await super().aclose()


class KnowsNoOtherModel(PlainLM):
    def info(self, model: str) -> ModelInfo:
        return {self.model_name: ModelInfo()}[model]


class AsksAgain(PlainLM):
    async def prepare(self) -> None:
        async with self.opened().get(self._url.replace(self.path, "/models")):
            pass


class CountsWithoutSaying(PlainLM):
    async def count(self, request: Request) -> Any:
        return 7


class FollowsWithItsKey(PlainAnthropic):
    def post(self, body: Data) -> Any:
        return self.opened().post(self._url, json=body, headers=self.headers(self._secret()))


# --- secrets -------------------------------------------------------------------------------------


class RepeatsWhatItIsTold(PlainLM):
    def hidden(self, text: str) -> str:
        return text


class QuotesWhatIsNoReply(PlainLM):
    def read(self, data: Data) -> Reply:
        try:
            return super().read(data)
        except (LookupError, TypeError):
            raise ProtocolError(f"what is this? {data}") from None


class ChainsWhatItWasTold(PlainLM):
    """Hides the key in its own words, and has it in the error below."""

    def refusal(self, response: aiohttp.ClientResponse, body: bytes) -> ModelError:
        error = super().refusal(response, body)
        error.__cause__ = ValueError(body)
        return error


class ShowsItsKey(PlainLM):
    def __repr__(self) -> str:
        return f"ShowsItsKey({self.model_name!r}, {self._secret()!r})"


class KeepsItsKeyInTheOpen(PlainLM):
    def __init__(self, model_name: str, base_url: str, api_key: str) -> None:
        super().__init__(model_name, base_url, api_key)
        self.api_key = api_key


class LogsItsHeaders(PlainLM):
    def headers(self, key: str) -> dict[str, str]:
        headers = super().headers(key)
        logging.getLogger(__name__).debug("sending %s", headers)
        return headers


# --- streams -------------------------------------------------------------------------------------


class StreamsNoReply(PlainLM):
    async def stream(self, request: Request) -> AsyncIterator[str | Reply]:
        async for item in super().stream(request):
            if isinstance(item, str):
                yield item


class StreamsAtTheEnd(PlainLM):
    async def stream(self, request: Request) -> AsyncIterator[str | Reply]:
        items = [item async for item in super().stream(request)]
        for item in items:
            yield item


class StreamsWithoutUsage(PlainLM):
    stream_fields: Mapping[str, Any] = {"stream": True}


class TakesAnyEnd(PlainLM):
    def read_stream(self, whole: Data) -> Reply:
        return self.made(whole, whole.get("text", ""), whole.get("finish"))


class SplitsLinesAsUnicodeDoes(PlainLM):
    async def events(self, response: aiohttp.ClientResponse) -> AsyncIterator[Data]:
        for line in (await response.read()).decode().splitlines():
            if line.startswith("data: {"):
                yield self.parse(line[6:].encode())


class DecodesWhatComes(PlainLM):
    """Takes every part that the network makes for whole characters."""

    async def events(self, response: aiohttp.ClientResponse) -> AsyncIterator[Data]:
        rest = ""
        async for part in response.content.iter_any():
            *lines, rest = (rest + part.decode(errors="replace")).split("\n")
            for line in lines:
                if line.startswith("data: {"):
                    yield self.parse(line[6:].encode())


class SeesNoErrorInAStream(PlainLM):
    async def events(self, response: aiohttp.ClientResponse) -> AsyncIterator[Data]:
        with contextlib.suppress(Unavailable):
            async for event in super().events(response):
                yield event

    def read_stream(self, whole: Data) -> Reply:
        return self.made(whole, whole.get("text", ""), "stop")


class StreamsOnWhenLeft(PlainLM):
    """Reads a stream in a task of its own, that nobody ends."""

    async def stream(self, request: Request) -> AsyncIterator[str | Reply]:
        queue: asyncio.Queue[Any] = asyncio.Queue()

        async def read() -> None:
            async for item in PlainLM.stream(self, request):
                queue.put_nowait(item)

        self.reading = asyncio.create_task(read())
        while True:
            item = await queue.get()
            yield item
            if isinstance(item, Reply):
                return

    async def aclose(self) -> None:
        if hasattr(self, "reading"):
            self.reading.cancel()
            await asyncio.wait([self.reading])
        await super().aclose()

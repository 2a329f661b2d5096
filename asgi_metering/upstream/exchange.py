"""
One HTTP exchange with a provider, watched while it passes.

Knows how to read a body without keeping or delaying it, and how to tell a listener exactly once that it ended.
Never knows calls, quotas or prices. Whatever goes wrong in here is logged and costs the observation, never the
request (S1.39).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from asgi_metering.upstream.libraries import library_of
from asgi_metering.upstream.listener import LiveUpstreamListener, UpstreamListener
from asgi_metering.upstream.refused import REFUSED_FROM, AnswerReader, RefusalReader
from asgi_metering.usage.reader import UsageReader

if TYPE_CHECKING:
    from httpx2 import AsyncByteStream, Response, SyncByteStream

__all__ = ["AsyncBody", "Exchange", "Source", "SyncBody"]

_logger = logging.getLogger("asgi_metering.upstream")

_UNOBSERVED = "An exchange with %r is not fully observed: %s failed."


class Source:
    """
    What the exchanges of one transport have in common.

    Args:
        provider: Name of the provider.
        listener: Who hears of its exchanges.
        usage_dialect: Passed to `UsageReader`; `None` detects it.
    """

    __slots__ = ("listener", "live", "provider", "usage_dialect")

    def __init__(self, provider: str, listener: UpstreamListener, usage_dialect: str | None) -> None:
        self.provider = provider
        self.listener = listener
        self.usage_dialect = usage_dialect
        # Asked once, because asking a protocol costs more than the rest of an exchange.
        self.live = isinstance(listener, LiveUpstreamListener)

    def reader(self, response: Response, started_at: float) -> UsageReader:
        """Return a reader for the body of *response*, whose request was sent at *started_at*."""
        headers = response.headers
        # A response made in memory (a mock, a cache) has been decoded already.
        encoding = None if response.is_stream_consumed else headers.get("content-encoding")
        if response.status_code >= REFUSED_FROM:
            return RefusalReader(response, encoding, self.usage_dialect, started_at)
        return AnswerReader(headers.get("content-type"), encoding, self.usage_dialect, started_at)


class Exchange:
    """
    What happens from `UpstreamListener.started`, which is called at once, to `UpstreamListener.finished`.

    Args:
        source: The transport's part.
        started_at: Epoch seconds.
        fetches: The request asks for what is there already (``GET``), and has no model answer anew.
    """

    __slots__ = ("_ended", "_fetches", "_reader", "_reads", "_source", "_started_at", "_status", "_token")

    def __init__(self, source: Source, started_at: float, *, fetches: bool = False) -> None:
        self._source = source
        self._started_at = started_at
        self._fetches = fetches
        self._token = self._tell("started")

    def watch(self, response: Response, *, asynchronous: bool) -> None:
        """Tell the headers, and replace the response's stream by one that is read; nothing else of it changes."""
        self._status = response.status_code
        self._tell("answered", self._status, response.headers.raw, self._started_at)
        self._reader = self._source.reader(response, self._started_at)
        self._reader.fetched = self._fetches
        self._reads = True
        self._ended = threading.Lock()
        if self._source.live:
            self._tell("body_started", self._reader, self._status)
        try:
            self._attach(response, asynchronous)
        except Exception:
            _logger.exception(_UNOBSERVED, self._source.provider, "the reader")
            self.finish()

    def _attach(self, response: Response, asynchronous: bool) -> None:
        if response.is_stream_consumed:
            self.feed(response.content)
            self.end()
            self.finish()
        else:
            body_class = _body_class(library_of(response.stream), asynchronous)
            response.stream = body_class(response.stream, self)

    def feed(self, chunk: bytes) -> None:
        """Read *chunk* as it passes; once the reader failed, it only passes."""
        if not self._reads:
            return
        try:
            self._reader.feed(chunk)
        except Exception:
            self._reads = False
            _logger.exception(_UNOBSERVED, self._source.provider, "the reader")

    def end(self) -> None:
        """Note that the body came to its proper end; one that broke, or was left, never comes here."""
        self._reader.end()

    def finish(self) -> None:
        """Tell the end. Body end, close and error may all call this, from any thread; the first one counts."""
        if self._ended.acquire(blocking=False):
            self._tell("finished", self._reader, self._status)

    def _tell(self, step: str, *values: object) -> object:
        source = self._source
        told = (source.provider,) if step == "started" else (self._token, source.provider)
        try:
            return getattr(source.listener, step)(*told, *values)
        except Exception:
            _logger.exception(_UNOBSERVED, source.provider, f"the listener's {step}()")
            return None


class AsyncBody:
    """
    An asynchronous response stream that is read as it passes.

    A chunk is read before it is handed on, so what a consumer has seen has been counted, also when it stops
    there. At run time it also derives from the library's own stream class, which clients ask for.
    """

    def __init__(self, stream: AsyncByteStream, exchange: Exchange) -> None:
        self._stream = stream
        self._exchange = exchange

    async def __aiter__(self) -> AsyncIterator[bytes]:
        chunks = self._stream.__aiter__()
        try:
            async for chunk in chunks:
                self._exchange.feed(chunk)
                yield chunk
            self._exchange.end()
        finally:
            self._exchange.finish()
            # A generator that is only dropped gives its connection back at some later time.
            if isinstance(chunks, AsyncGenerator):
                await chunks.aclose()

    async def aclose(self) -> None:
        """Close the stream; the exchange ends here if its body was not read to the end."""
        self._exchange.finish()
        await self._stream.aclose()


class SyncBody:
    """A synchronous response stream that is read as it passes; see `AsyncBody`."""

    def __init__(self, stream: SyncByteStream, exchange: Exchange) -> None:
        self._stream = stream
        self._exchange = exchange

    def __iter__(self) -> Iterator[bytes]:
        try:
            for chunk in self._stream:
                self._exchange.feed(chunk)
                yield chunk
            self._exchange.end()
        finally:
            self._exchange.finish()

    def close(self) -> None:
        """Close the stream; the exchange ends here if its body was not read to the end."""
        self._exchange.finish()
        self._stream.close()


@cache
def _body_class(library: Any, asynchronous: bool) -> Any:
    """Return our stream as a class of *library*, whose clients assert that a stream is one."""
    if asynchronous:
        return type("AsyncBody", (AsyncBody, library.AsyncByteStream), {})
    return type("SyncBody", (SyncBody, library.SyncByteStream), {})

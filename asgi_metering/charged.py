"""
Charged clients: an object one of whose methods is charged for whenever it is awaited, and which is itself otherwise.

Knows how a charge is begun and left. Never knows what the method does, nor what it costs.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import weakref
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from inspect import isawaitable
from types import TracebackType
from typing import Any, Self

from asgi_metering.call import Call
from asgi_metering.errors import ConfigurationError
from asgi_metering.opening import CURRENT, Opening
from asgi_metering.rules.ending import Cause

__all__ = ["Charge", "ChargedClient", "ChargedStream"]

log = logging.getLogger("asgi_metering")

Charge = Callable[[Mapping[str, Any]], AbstractAsyncContextManager[Call]]
"""Begins the charge of one call of the method, by the keywords that it is called with."""


class ChargedClient:
    """
    *client*, but for the method at *path*, which runs inside a charge of its own (S3.41). See `Metering.charged`.

    What the client answers to anything else is the client's own: a copy of itself is not charged.
    """

    __slots__ = ("_charge", "_client", "_path")

    def __init__(self, client: Any, path: tuple[str, ...], charge: Charge) -> None:
        self._client = client
        self._path = path
        self._charge = charge

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._client, name)
        if name != self._path[0]:
            return found
        if len(self._path) > 1:
            return ChargedClient(found, self._path[1:], self._charge)
        return _charged(found, self._charge)

    async def __aenter__(self) -> ChargedClient:
        # Of the class, where Python looks for it: clients are opened by a block.
        return ChargedClient(await self._client.__aenter__(), self._path, self._charge)

    async def __aexit__(self, *raised: Any) -> Any:
        return await self._client.__aexit__(*raised)

    def __repr__(self) -> str:
        return f"<{'.'.join(self._path)} charged of {self._client!r}>"


def _charged(method: Callable[..., Any], charge: Charge) -> Callable[..., Any]:
    @functools.wraps(method)
    async def charged(*args: Any, **kwargs: Any) -> Any:
        outer = CURRENT.get()
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(charge(kwargs))
            answer = method(*args, **kwargs)
            if isawaitable(answer):
                answer = await answer
            elif not hasattr(answer, "__aiter__"):
                raise ConfigurationError(
                    f"{method!r} answered {type(answer).__name__} without being awaited, and is not charged. Charge "
                    f"sync work with metering.charge_sync()."
                )
            if not hasattr(answer, "__aiter__"):
                return answer
            opening = CURRENT.get()
            CURRENT.set(outer)
            return ChargedStream(answer, opening, stack.pop_all())

    return charged


class ChargedStream:
    """
    A stream whose charge ends when it is exhausted, fails, or is closed; everything else is the stream's own.

    Close one that you leave early, as you would the stream itself: until then its hold is kept. It is charged what was
    observed of it then, as of a client that left (``on_disconnect``). One that is dropped instead, as by a response
    whose client left, is closed when it is collected.
    """

    __slots__ = ("__weakref__", "_charge", "_items", "_opening", "_stream")

    def __init__(self, stream: Any, opening: Opening | None, charge: AsyncExitStack) -> None:
        self._stream = stream
        self._items: AsyncIterator[Any] = aiter(stream)
        self._opening = opening
        self._charge: AsyncExitStack | None = charge
        # Keeps the charge alive for it: were both collected together, the charge would end as one that failed.
        weakref.finalize(self, _dropped, asyncio.get_running_loop(), opening, charge).atexit = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        # What runs between two items is the reader's: only what the stream itself uses is this call's.
        outer = CURRENT.get()
        CURRENT.set(self._opening)
        try:
            return await anext(self._items)
        except StopAsyncIteration:
            await self._leave(None)
            raise
        except BaseException as failure:
            await self._leave(failure)
            raise
        finally:
            CURRENT.set(outer)

    async def aclose(self) -> None:
        """Close the stream, and end its charge with what it has used: its reader is gone, if it has not ended."""
        if self._charge is not None:
            _left(self._opening)
        try:
            close = getattr(self._stream, "aclose", None) or getattr(self._stream, "close", None)
            if close is not None:
                await close()
        finally:
            await self._leave(None)

    close = aclose

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        if failure is not None:
            await self._leave(failure)
        await self.aclose()

    async def _leave(self, failure: BaseException | None) -> None:
        charge, self._charge = self._charge, None
        if charge is None:
            return
        if failure is None:
            await charge.aclose()
            return
        try:
            await charge.__aexit__(type(failure), failure, failure.__traceback__)
        except BaseException as raised:
            if raised is not failure:
                raise


_ENDING: set[asyncio.Task[None]] = set()
"""Ends of streams that were dropped: nobody else refers to them."""


def _left(opening: Opening | None) -> None:
    """What came until then is charged, and not what was held for all of it; the first cause seen counts."""
    if opening is not None and opening.call is not None:
        opening.call.see(Cause.CLIENT_GONE)


def _dropped(loop: asyncio.AbstractEventLoop, opening: Opening | None, charge: AsyncExitStack) -> None:
    """End *charge*, whose stream is gone, on its loop; again, of one that has ended, does nothing. From any thread."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(_end, opening, charge)


def _end(opening: Opening | None, charge: AsyncExitStack) -> None:
    _left(opening)
    task = asyncio.get_running_loop().create_task(charge.aclose())
    _ENDING.add(task)
    task.add_done_callback(_ended)


def _ended(task: asyncio.Task[None]) -> None:
    _ENDING.discard(task)
    if not task.cancelled() and task.exception() is not None:
        log.error("The charge of a stream that was dropped could not be ended.", exc_info=task.exception())

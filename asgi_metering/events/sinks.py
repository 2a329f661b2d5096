"""
Sinks: where usage events are delivered. A plug-in is any object with a name and `deliver` (S2.22).

Knows the contract and the adapter for a plain function. Never knows the outbox or when events come.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable
from weakref import WeakKeyDictionary

from asgi_metering.names import check_name
from asgi_metering.usage.event import UsageEvent

__all__ = ["Callback", "CallbackSink", "OneCall", "Sink", "is_enabled"]

log = logging.getLogger("asgi_metering.events")

Callback: TypeAlias = Callable[[Sequence[UsageEvent]], Awaitable[object] | object]
"""A user's function, sync or async, of a batch of events."""


@runtime_checkable
class Sink(Protocol):
    """
    A place that takes usage events.

    Attributes:
        name: Names the sink in logs and metrics, 1 to 64 characters of ``[A-Za-z0-9_.-]``; unique in its exporter.

    A sink may also have an attribute ``enabled``. While it is False nobody would see what is delivered, so nothing is,
    and every event counts as taken: a no-op that costs nothing.

    One that hands on what it took may have an async method ``flush`` without arguments: it is awaited once, for a short
    time, when the process ends.
    """

    name: str

    async def deliver(self, events: Sequence[UsageEvent]) -> None:
        """
        Take *events*, at least one, oldest first. Returning means that all of them are taken.

        Raising, or not returning in time, means that none counts as taken: the same events come again, possibly in
        other batches, each with the id that it always had. An event may also come again although it was taken
        (after a crash, or from another process), so a sink that must not count twice keeps ids.
        """


def is_enabled(sink: Sink) -> bool:
    """Whether anybody would see what is delivered to *sink*."""
    return bool(getattr(sink, "enabled", True))


class OneCall:
    """
    Runs a function in a thread, one call of each event loop at a time.

    A thread cannot be stopped. While one call still runs after its time is over, the next is refused instead of piling
    up threads, which the whole application shares.

    Args:
        name: Of the sink, for the error.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._running: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Future[Any]] = WeakKeyDictionary()

    async def run(self, function: Callable[[Sequence[UsageEvent]], Any], events: Sequence[UsageEvent]) -> Any:
        """
        Call *function* and return what it returns. Cancelling does not stop it.

        Raises:
            TimeoutError: The last call still runs.
            Exception: Whatever *function* raises.
        """
        loop = asyncio.get_running_loop()
        if loop in self._running:
            raise TimeoutError(f"The last call of sink {self._name!r} still runs. Give what it calls a timeout.")
        call = self._running[loop] = loop.create_task(asyncio.to_thread(function, tuple(events)))
        call.add_done_callback(self._ended)
        return await asyncio.shield(call)

    def _ended(self, call: asyncio.Future[Any]) -> None:
        """Make room for the next, and look at the outcome also when nobody waits for it any more."""
        self._running.pop(call.get_loop(), None)
        if not call.cancelled() and call.exception() is not None:
            log.debug("A call of sink %r raised.", self._name, exc_info=call.exception())


class CallbackSink:
    """
    A function as a sink.

    Args:
        function: Gets each batch, a tuple of events. An async one is awaited; a plain one runs in a thread, one call at
            a time, so that it may block. Raising refuses the batch.
        name: Of the sink; by default that of the function.

    Raises:
        ConfigurationError: The name is not usable.
    """

    def __init__(self, function: Callback, name: str | None = None) -> None:
        own = getattr(function, "__name__", type(function).__name__)
        # A lambda is named "<lambda>".
        self.name = check_name(name or own.strip("<>"), "sink name")
        self._function = function
        method = getattr(function, "__call__", None)  # noqa: B004 -- an object's own async method counts
        self._is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(method)
        self._thread = OneCall(self.name)

    async def deliver(self, events: Sequence[UsageEvent]) -> None:
        """See `Sink.deliver`."""
        if self._is_async:
            answer = self._function(tuple(events))
        else:
            answer = await self._thread.run(self._function, events)
        if inspect.isawaitable(answer):
            await answer

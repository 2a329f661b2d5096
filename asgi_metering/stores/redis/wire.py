"""
A wire: the bytes of one connection, on which several batches may be on their way.

The driver connects, authenticates and speaks TLS; then its connection is taken over, because its streams cost more than
everything that is said. Replies come in the order of what was asked. Knows bytes and replies; never what they mean.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from asgi_metering.stores.redis.places import driver

if TYPE_CHECKING:
    from redis.asyncio.connection import AbstractConnection

__all__ = ["Told", "Wire"]

Told: TypeAlias = "Callable[[list[Any] | Exception], None]"
"""Called once, from the loop: with all replies, or why they do not come. It never raises."""

LOOKS = 4
"""Turns of the loop in which it sees what the other end has said or closed meanwhile, also through TLS."""


class _Asked(NamedTuple):
    """What was asked together: until when, how many replies are to come, those that came, and who is told."""

    until: float
    number: int
    replies: list[Any]
    told: Told


class Wire(asyncio.Protocol):
    """
    One connection.

    Args:
        connection: Made by the driver, of this event loop. Nobody else uses it from now on.

    Attributes:
        failure: Why nothing can be asked any more; None while something can.
    """

    def __init__(self, connection: AbstractConnection) -> None:
        self.failure: Exception | None = None
        self._connection = connection
        self._reader = driver().reader(connection)
        self._asked: deque[_Asked] = deque()
        self._loop = asyncio.get_running_loop()
        # One for all that is on its way, and set again only when it goes off: most batches have long been answered.
        self._timer: asyncio.TimerHandle | None = None
        self._quiet: list[asyncio.Future[None]] = []
        self._transport: Any = connection._writer.transport  # type: ignore[union-attr]
        self._transport.set_protocol(self)

    async def ask(self, packed: bytes, count: int, timeout_s: float) -> list[Any]:
        """
        Send commands and return their replies; an error reply is its exception.

        Args:
            packed: The commands.
            count: How many they are.
            timeout_s: Seconds after which the connection counts as lost.

        Raises:
            TimeoutError: No answer came in time.
            ConnectionError: As of redis-py; the connection was lost, with all that was on its way.
        """
        if self.failure is not None:
            raise self.failure
        answered: asyncio.Future[list[Any]] = self._loop.create_future()
        self.post(packed, count, timeout_s, partial(_answer, answered))
        return await answered

    def post(self, packed: bytes, count: int, timeout_s: float, told: Told) -> None:
        """The same for who does not wait: it is *told*. Only while there is no `failure`."""
        self._asked.append(_Asked(self._loop.time() + timeout_s, count, [], told))
        self._transport.write(packed)
        if self._timer is None:
            self._timer = self._loop.call_later(timeout_s, self._look)

    def _look(self) -> None:
        """Whether what was asked first has been answered in time."""
        self._timer = None
        if not self._asked:
            return
        until = self._asked[0].until
        if until > self._loop.time():
            self._timer = self._loop.call_at(until, self._look)
            return
        self._asked.popleft().told(TimeoutError())
        self._lose(driver().exceptions.ConnectionError("It gave no answer in time."))

    def _lose(self, failure: Exception) -> None:
        if self.failure is None:
            self.failure = failure
            self._transport.abort()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._asked:
            # One of its own for each: what is raised keeps the way that it took.
            self._asked.popleft().told(type(failure)(*failure.args))
        self._rest()

    def _rest(self) -> None:
        quiet, self._quiet = self._quiet, []
        for waiting in quiet:
            if not waiting.done():
                waiting.set_result(None)

    def data_received(self, data: bytes) -> None:
        """Replies, or parts of one."""
        whole: list[_Asked] = []
        try:
            self._reader.feed(data)
            while (reply := self._reader.gets()) is not False:
                asked = self._asked[0]
                asked.replies.append(reply)
                if len(asked.replies) == asked.number:
                    whole.append(self._asked.popleft())
        except (IndexError, driver().exceptions.InvalidResponse) as failure:
            self._lose(driver().exceptions.ConnectionError(f"It said what nobody asked for: {failure}"))
        for asked in whole:
            asked.told(asked.replies)
        if self._quiet and not self._asked:
            self._rest()

    def eof_received(self) -> None:
        """The other end has closed it."""
        self._lose(driver().exceptions.ConnectionError("Connection closed by server."))

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing more comes."""
        self._lose(driver().exceptions.ConnectionError(str(exc or "Connection closed.")))

    async def is_gone(self) -> bool:
        """Whether the other end has closed it, or has said something that nobody asked for."""
        for _ in range(LOOKS):
            await asyncio.sleep(0)
        return self.failure is not None

    async def quiet(self) -> None:
        """Wait until nobody waits for replies."""
        if self._asked:
            waiting = self._loop.create_future()
            self._quiet.append(waiting)
            await waiting

    async def close(self) -> None:
        """Close it. What was on its way is lost; again changes nothing."""
        self._lose(driver().exceptions.ConnectionError("Connection closed."))
        await self._connection.disconnect(nowait=True)


def _answer(answered: asyncio.Future[list[Any]], outcome: list[Any] | Exception) -> None:
    if answered.done():
        return
    if isinstance(outcome, Exception):
        answered.set_exception(outcome)
    else:
        answered.set_result(outcome)

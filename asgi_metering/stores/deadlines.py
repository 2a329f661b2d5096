"""
Deadlines: those who wait for an answer for so many seconds and no longer, under one timer.

A timer of the event loop for each of them would cost as much as all else that the pump does for an operation. Knows
futures and times; nothing of what is waited for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

__all__ = ["Deadlines"]


class Deadlines:
    """
    Who waits, of one event loop.

    Args:
        expire: Called in the loop with each future whose time is over, if it is not done, and with its seconds.
    """

    def __init__(self, expire: Callable[[asyncio.Future[Any], float], None]) -> None:
        self._expire = expire
        self._waiting: list[tuple[float, int, asyncio.Future[Any], float]] = []
        self._came = 0
        self._timer: asyncio.TimerHandle | None = None
        # When it goes off: uvloop's handles of what is due at once cannot say.
        self._due = 0.0

    def watch(self, future: asyncio.Future[Any], deadline_s: float) -> None:
        """Let *future* wait for *deadline_s* seconds from now on."""
        loop, waiting = future.get_loop(), self._waiting
        while waiting and waiting[0][2].done():
            heappop(waiting)
        until = loop.time() + deadline_s
        # Counted, so that futures are never compared.
        self._came += 1
        heappush(waiting, (until, self._came, future, deadline_s))
        if self._timer is None or until < self._due:
            self._look_at(loop, until)

    def _look_at(self, loop: asyncio.AbstractEventLoop, until: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._due = loop.call_at(until, self._look, loop), until

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        waiting, now = self._waiting, loop.time()
        while waiting and (waiting[0][0] <= now or waiting[0][2].done()):
            _, _, future, deadline_s = heappop(waiting)
            if not future.done():
                self._expire(future, deadline_s)
        self._timer = None
        if waiting:
            self._look_at(loop, waiting[0][0])

    def stop(self) -> None:
        """Nobody waits any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._waiting.clear()

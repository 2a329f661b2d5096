"""
What is looked after if it is not over in time, with one timer for all that waits equally long.

A timer of its own for each would cost every request more than its admission. Knows nothing of what it waits for.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Final, TypeAlias

__all__ = ["Entry", "Overdue"]

Entry: TypeAlias = "list[Any]"
"""When it is due, and what will be done then, until it need not be: a plain list, since every call makes one."""


_DUE: Final = 0
_ACT: Final = 1


class Overdue:
    """
    Entries of one event loop, in the order of their times: each is put in with the same delay.

    Args:
        loop: Its loop.
    """

    __slots__ = ("_loop", "_timer", "_waiting")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[Entry] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def expect(self, delay_s: float, act: Callable[[], None]) -> Entry:
        """Do *act* after so many seconds, unless `over` comes first."""
        entry: Entry = [self._loop.time() + delay_s, act]
        self._waiting.append(entry)
        if self._timer is None:
            self._timer = self._loop.call_at(entry[_DUE], self._look)
        return entry

    def over(self, entry: Entry) -> None:
        """Nothing is to be done any more. Again changes nothing."""
        waiting = self._waiting
        # Nearly everything is over before the next one comes, and then nothing is kept of it.
        if waiting and waiting[-1] is entry:
            waiting.pop()
        else:
            entry[_ACT] = None

    def _look(self) -> None:
        self._timer = None
        waiting, now = self._waiting, self._loop.time()
        due: list[Entry] = []
        while waiting and (waiting[0][_DUE] <= now or waiting[0][_ACT] is None):
            due.append(waiting.popleft())
        if waiting:
            self._timer = self._loop.call_at(waiting[0][_DUE], self._look)
        for entry in due:
            act, entry[_ACT] = entry[_ACT], None
            if act is not None:
                act()

"""
Sharing: what the workers of one store let each other know of their providers' answers (DESIGN 6).

Knows when something new is told and when others are listened to, both off the path of any response, and nothing of how
it is kept. A store that does not answer reaches nobody: what was not told is told with the next, as it is by then.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Final

from asgi_metering.errors import StoreError, UnwritableError
from asgi_metering.rules.decide import Answer
from asgi_metering.rules.operations import Operation, Share
from asgi_metering.rules.readings import MAX_SHARED
from asgi_metering.rules.state import ReadingKey, SharedReading
from asgi_metering.stores.contract import Query, ReadingsKept, Snapshot
from asgi_metering.upstream.parts import parts_of, take_parts
from asgi_metering.upstream.readings import QuotaReadings

__all__ = ["Sharing"]

log = logging.getLogger("asgi_metering.quotas")

TELL_EVERY_S: Final = 0.5
"""Between what one process tells: a busy one has hundreds of readings a second, and the last of them is enough."""

LISTEN_EVERY_S: Final = 1.5
"""Between two looks at what others told."""

LISTEN_FOR_S: Final = 60.0
"""How long a process that has told something goes on listening, where nobody in it decides by readings."""

PAUSE_S: Final = 3.0
"""After a store gave no answer, nobody asks it for so long."""

STUCK_S: Final = 60.0
"""A turn that is older than this died with its event loop."""

Submit = Callable[[Operation, float], Awaitable[Answer]]
Read = Callable[[Query], Awaitable[Snapshot]]


class Sharing:
    """
    Keeps the readings of this process and those of the others that use its store alike.

    Args:
        readings: Of this process. What others were told is taken into them by the same rule as its own (S1.45).
        is_used: Whether anybody here decides by them; then others are listened to all the time.
        clock: Monotonic seconds.

    One for a process; several event loops may take turns (`begins`).
    """

    def __init__(
        self,
        readings: QuotaReadings,
        is_used: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._readings = readings
        self._is_used = is_used
        self._clock = clock
        self._lock = threading.Lock()
        self._busy_until = self._tell_at = self._listen_at = self._listens_until = clock()
        # Once it listens in any case: what was known before a restart still holds.
        self._has_listened = False
        self._changes = 0
        self._told: dict[ReadingKey, str] = {}
        self._heard: dict[ReadingKey, SharedReading] = {}
        self._is_known = True

    @property
    def has_news(self) -> bool:
        """Whether something may be told that was not told yet."""
        return self._is_known and self._readings.changes != self._changes

    def begins(self) -> bool:
        """Whether it is time for a turn, and nobody else has it; who is told so takes it, and says `ended` behind."""
        now = self._clock()
        with self._lock:
            if now < self._busy_until or not (self._tells(now) or self._listens(now)):
                return False
            self._busy_until = now + STUCK_S
            return True

    def ended(self, _: object = None) -> None:
        """The turn is over."""
        self._busy_until = self._clock()

    def _tells(self, now: float) -> bool:
        return now >= self._tell_at and self.has_news

    def _listens(self, now: float) -> bool:
        if now < self._listen_at or not self._is_known:
            return False
        return not self._has_listened or now < self._listens_until or self._is_used()

    async def turn(self, submit: Submit, read: Read, deadline_s: float) -> None:
        """
        Tell what is new here, and listen to others, each if it is time. Raises nothing.

        Args:
            submit: Runs one operation, within so many seconds.
            read: Of the store.
            deadline_s: What either may take.
        """
        now = self._clock()
        try:
            if self._tells(now):
                await self.tell(submit, deadline_s)
            if self._listens(now):
                await self.listen(read, deadline_s)
        except Exception as failure:  # noqa: BLE001 -- a store of somebody's own: whatever it raises, no call hears it
            self._failed(failure)

    def _failed(self, failure: Exception) -> None:
        self._tell_at = self._listen_at = self._clock() + PAUSE_S
        if isinstance(failure, UnwritableError) or not isinstance(failure, StoreError | TimeoutError):
            # Asked again it would say the same, and each time somebody would be alarmed.
            self._is_known = False
            log.warning("The readings of upstream quotas are not shared: %s", failure)
        else:
            log.debug("The readings of upstream quotas could not be shared now: %s", failure)

    async def tell(self, submit: Submit, deadline_s: float) -> None:
        """
        Tell others what they do not know yet, each part once: one that is told again would look newer than it is.

        Raises:
            StoreError: No answer came; it is told with the next.
        """
        changes = self._readings.changes
        self._tell_at = self._clock() + TELL_EVERY_S
        parts = [part for series, reading in self._readings.all().items() for part in parts_of(series, reading)]
        self._told = {part[:2]: self._told[part[:2]] for part in parts if part[:2] in self._told}
        news = [part for part in parts if not self._is_told(part)]
        for first in range(0, len(news), MAX_SHARED):
            some = news[first : first + MAX_SHARED]
            await submit(Share(tuple(some)), deadline_s)
            self._told.update((part[:2], part.told) for part in some)
            self._listens_until = self._clock() + LISTEN_FOR_S
        self._changes = changes

    def _is_told(self, part: SharedReading) -> bool:
        heard = self._heard.get(part[:2])
        return self._told.get(part[:2]) == part.told or (heard is not None and heard.told == part.told)

    async def listen(self, read: Read, deadline_s: float) -> None:
        """
        Take what others told.

        Raises:
            StoreError, TimeoutError: No answer came.
        """
        self._listen_at = self._clock() + LISTEN_EVERY_S
        async with asyncio.timeout(deadline_s):
            found = await read(ReadingsKept())
        rows, before = found.state.readings, self._heard
        self._heard, self._has_listened = rows, True
        take_parts(self._readings, rows, dict.fromkeys(key[0] for key, row in rows.items() if before.get(key) != row))

"""
Couriers: one for each sink; brings it its events, and copes with a sink that fails, hangs or rejects.

Knows one sink and its troubles. Never knows the outbox, the other sinks, or what an event means.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Final

from asgi_metering.events.metrics import Meters
from asgi_metering.events.sinks import Sink
from asgi_metering.usage.event import UsageEvent

__all__ = ["MAX_BACKOFF_S", "Courier"]

log = logging.getLogger("asgi_metering.events")

FIRST_BACKOFF_S: Final = 1.0
MAX_BACKOFF_S: Final = 300.0
"""A sink that is down is asked again every five minutes at the latest."""

MAX_EVENT_BACKOFF_S: Final = 600.0
"""An event that its sink rejects alone is offered again every ten minutes at the latest."""

MAX_ALONE: Final = 2
"""Events rejected one after the other before the sink counts as down: one may be bad, two seldom are."""

MAX_FAILURES: Final = 16
"""Refused deliveries in one turn: finding one bad event among 500 takes fewer."""

MAX_TROUBLED: Final = 10_000
"""Events whose rejections are remembered."""


class _Outcome(Enum):
    TAKEN = 1
    REFUSED = 2
    STALLED = 3


class _Trouble:
    """An event that its sink rejected when it was offered alone."""

    __slots__ = ("not_before", "rejections", "strikes")

    def __init__(self) -> None:
        self.strikes = 0
        self.rejections = 0
        self.not_before = 0.0


class Courier:
    """
    Deliver to one sink.

    A refused batch is offered again in pieces, beginning with a single event and doubling with each success, so that
    one bad event delays no other. An event that is refused alone while the sink takes others is rejected; after
    *max_rejections* of these it is given up. When two events in a row are refused alone, or a delivery does not end
    in time, the sink itself is down: it is left alone for a time that doubles up to `MAX_BACKOFF_S`.

    Args:
        sink: Where to.
        bit: How custody knows it.
        most: Events in one delivery.
        timeout_s: For one delivery (S3.35), and for beginning deliveries within one turn.
        max_rejections: None never gives up.
        clock: Steady seconds.
        took: Called with the events that the sink took.
        gave_up: Called with an event that the sink will not get.
    """

    def __init__(
        self,
        sink: Sink,
        bit: int,
        *,
        most: int,
        timeout_s: float,
        max_rejections: int | None,
        clock: Callable[[], float],
        meters: Meters,
        took: Callable[[Courier, Sequence[UsageEvent]], None],
        gave_up: Callable[[Courier, UsageEvent], None],
    ) -> None:
        self.sink = sink
        self.bit = bit
        self.not_before = 0.0
        self._timeout_s = timeout_s
        self._max_rejections = max_rejections
        self._clock = clock
        self._meters = meters
        self._took = took
        self._gave_up = gave_up
        self._failures = 0
        self._most = self._size = most
        self._troubled: dict[str, _Trouble] = {}

    async def turn(self, events: Sequence[UsageEvent]) -> None:
        """Offer *events* until all are taken, the time is over or the sink seems down. Raises only cancellation."""
        waiting = deque(self._in_order(events))
        ends_at = self._clock() + self._timeout_s
        alone: list[UsageEvent] = []
        in_a_row = failures = 0
        succeeded = False
        while waiting and failures < MAX_FAILURES and in_a_row < MAX_ALONE and self._clock() < ends_at:
            piece = self._cut(waiting)
            outcome = await self._offer(piece)
            if outcome is _Outcome.TAKEN:
                succeeded, in_a_row = True, 0
                self._taken(piece)
                continue
            failures += 1
            self._size = 1
            if len(piece) == 1:
                alone.append(piece[0])
                in_a_row += 1
            else:
                waiting.extendleft(reversed(piece))
            if outcome is _Outcome.STALLED:
                break
        self._judge(alone, succeeded)
        self._back_off(failures, succeeded)

    def hurry(self) -> None:
        """Forget the backoff: there is no later."""
        self.not_before = 0.0

    def _in_order(self, events: Sequence[UsageEvent]) -> list[UsageEvent]:
        """Untroubled events first, then those whose time has come, the least rejected first."""
        if not self._troubled:
            return list(events)
        now = self._clock()
        calm = [event for event in events if event.id not in self._troubled]
        due = [e for e in events if e.id in self._troubled and self._troubled[e.id].not_before <= now]
        return calm + sorted(due, key=lambda event: self._troubled[event.id].strikes)

    def _cut(self, waiting: deque[UsageEvent]) -> tuple[UsageEvent, ...]:
        """The next piece: what the size allows; a troubled event goes alone."""
        if not self._troubled and len(waiting) <= self._size:
            whole = tuple(waiting)
            waiting.clear()
            return whole
        piece = [waiting.popleft()]
        if piece[0].id not in self._troubled:
            while waiting and len(piece) < self._size and waiting[0].id not in self._troubled:
                piece.append(waiting.popleft())
        return tuple(piece)

    async def _offer(self, piece: tuple[UsageEvent, ...]) -> _Outcome:
        try:
            async with asyncio.timeout(self._timeout_s) as limit:
                await self.sink.deliver(piece)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return self._complain(piece, error, stalled=False)
        except Exception as error:  # noqa: BLE001 -- whatever a plug-in raises, it is its own (S2.5)
            return self._complain(piece, error, stalled=limit.expired())
        return _Outcome.TAKEN

    def _complain(self, piece: tuple[UsageEvent, ...], error: BaseException, *, stalled: bool) -> _Outcome:
        self._meters.count("deliveries_failed", sink=self.sink.name)
        log.warning(
            "The sink %r did not take %d usage events%s, the first being %r. They are offered again.",
            self.sink.name,
            len(piece),
            f" within {self._timeout_s} s" if stalled else "",
            piece[0].id,
            exc_info=None if stalled else error,
        )
        return _Outcome.STALLED if stalled else _Outcome.REFUSED

    def _taken(self, piece: tuple[UsageEvent, ...]) -> None:
        self._size = min(2 * self._size, self._most)
        if self._troubled:
            for event in piece:
                self._troubled.pop(event.id, None)
        self._meters.count("events_delivered", len(piece), sink=self.sink.name)
        self._took(self, piece)

    def _judge(self, alone: list[UsageEvent], succeeded: bool) -> None:
        """Only where the sink took others is it the event that was rejected."""
        for event in alone:
            trouble = self._troubled.get(event.id)
            if trouble is None:
                if len(self._troubled) >= MAX_TROUBLED:
                    continue
                trouble = self._troubled[event.id] = _Trouble()
            trouble.strikes += 1
            if not succeeded:
                continue
            trouble.rejections += 1
            trouble.not_before = self._clock() + _doubled(trouble.rejections, MAX_EVENT_BACKOFF_S)
            if self._max_rejections is not None and trouble.rejections >= self._max_rejections:
                del self._troubled[event.id]
                self._gave_up(self, event)

    def _back_off(self, failures: int, succeeded: bool) -> None:
        if not failures:
            self._failures = 0
            return
        self._failures = 1 if succeeded else self._failures + 1
        self.not_before = self._clock() + _doubled(self._failures, MAX_BACKOFF_S)


def _doubled(times: int, most: float) -> float:
    return float(min(FIRST_BACKOFF_S * 2 ** min(times - 1, 32), most))

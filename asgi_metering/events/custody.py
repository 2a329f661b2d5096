"""
Custody: which events this process has claimed, and which sinks took each of them.

Bookkeeping only: nothing here awaits, delivers or talks to a store. Times are of the exporter's own steady clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from asgi_metering.usage.event import UsageEvent

__all__ = ["MAX_IN_HAND", "MAX_MARKS", "Custody"]

MAX_IN_HAND: Final = 2_000
"""Events kept whole while their lease runs, so that a sink that failed gets them again without another claim."""

MAX_MARKS: Final = 100_000
"""Events remembered only by id and by who took them: some 20 MB, and a failing sink's backlog for long."""


_UNKNOWN: Final = (0, 0.0)
"""The mark of an event that nobody took."""


class _Parcel:
    """A claimed event: whose until when, and the bits of the sinks that took it."""

    __slots__ = ("event", "taken", "until")

    def __init__(self, event: UsageEvent, until: float, taken: int) -> None:
        self.event = event
        self.until = until
        self.taken = taken


class Custody:
    """
    Remembers events by id, so that a sink that took one is not given it again while others are retried.

    Args:
        sinks: How many there are; each is known by its bit, ``1 << number``.
        remember_s: How long an id that is not claimed again is remembered: another process acknowledged it.

    Both memories are bounded. What is beyond them is delivered again: at least once, never less.
    """

    def __init__(self, sinks: int, remember_s: float) -> None:
        self._everyone = (1 << sinks) - 1
        self._remember_s = remember_s
        self._hand: dict[str, _Parcel] = {}
        self._marks: dict[str, tuple[int, float]] = {}
        self._finished: dict[str, None] = {}

    def __len__(self) -> int:
        """How many events are in hand."""
        return len(self._hand)

    @property
    def finished(self) -> tuple[str, ...]:
        """Ids that every sink took, or that were given up: to be acknowledged, then to be forgotten."""
        return tuple(self._finished)

    def pick_up(self, event: UsageEvent, until: float) -> None:
        """Keep a claimed event until its lease ends; what is known of who took it still holds."""
        key, hand = event.id, self._hand
        if key in self._finished:
            return
        parcel = hand.get(key)
        taken = parcel.taken if parcel is not None else self._marks.pop(key, _UNKNOWN)[0]
        hand[key] = _Parcel(event, until, taken)
        if taken == self._everyone:
            self.give_up(key)

    def missing(self, bit: int) -> list[UsageEvent]:
        """Return the events in hand that the sink of *bit* has not taken, in the order in which they were claimed."""
        return [parcel.event for parcel in self._hand.values() if not parcel.taken & bit]

    def took(self, ids: Iterable[str], bit: int, now: float) -> None:
        """Note that the sink of *bit* has these events, or will never get them; they may be put down meanwhile."""
        hand, everyone = self._hand, self._everyone
        for key in ids:
            parcel = hand.get(key)
            if parcel is not None:
                parcel.taken |= bit
                if parcel.taken == everyone:
                    self.give_up(key)
            elif key not in self._finished:
                self._mark(key, self._marks.get(key, _UNKNOWN)[0] | bit, now)

    def give_up(self, key: str) -> None:
        """Have an event acknowledged that no sink can be given."""
        self._hand.pop(key, None)
        self._finished[key] = None

    def put_down(self, now: float) -> None:
        """Let go of events whose lease is over, and of the oldest beyond the bound; remember who took them."""
        over = [key for key, parcel in self._hand.items() if parcel.until <= now]
        over += list(self._hand)[: max(0, len(self._hand) - MAX_IN_HAND)]
        for key in dict.fromkeys(over):
            self._mark(key, self._hand.pop(key).taken, now)
        while self._marks:
            oldest = next(iter(self._marks))
            if self._marks[oldest][1] + self._remember_s > now:
                break
            del self._marks[oldest]

    def forget(self, ids: Iterable[str]) -> None:
        """Forget acknowledged events."""
        for key in ids:
            self._finished.pop(key, None)

    def _mark(self, key: str, taken: int, now: float) -> None:
        self._marks.pop(key, None)
        # Full: the newest are not remembered. Forgetting the oldest instead would, in a backlog that is claimed round
        # and round, forget each just before it comes again.
        if taken and len(self._marks) < MAX_MARKS:
            self._marks[key] = (taken, now)

"""
Custody: which events this process has claimed, and which sinks took each of them.

Bookkeeping only: nothing here awaits, delivers or talks to a store. Times are of the exporter's own steady clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, MutableMapping, Sequence
from itertools import repeat
from operator import attrgetter, itemgetter
from typing import Any, Final

from asgi_metering.usage.event import UsageEvent

__all__ = ["MAX_IN_HAND", "MAX_MARKS", "Custody"]

MAX_IN_HAND: Final = 2_000
"""Events kept whole while their lease runs, so that a sink that failed gets them again without another claim."""

MAX_MARKS: Final = 100_000
"""Events remembered only by id and by who took them: some 20 MB, and a failing sink's backlog for long."""

_UNKNOWN: Final = (0, 0.0)
"""The mark of an event that nobody took."""


_ID: Final[Callable[[UsageEvent], str]] = attrgetter("id")
_EVENT: Final[Callable[[tuple[UsageEvent, float]], UsageEvent]] = itemgetter(0)


class Custody:
    """
    Remembers events by id, so that a sink that took one is not given it again while others are retried.

    Args:
        sinks: How many there are, 1 or more; each is known by its bit, ``1 << number``.
        remember_s: How long an id that is not claimed again is remembered: another process acknowledged it.

    Every event goes through all of this, hundreds at once: what is common is left to C, which needs no step for each.

    Both memories are bounded. What is beyond them is delivered again: at least once, never less.
    """

    def __init__(self, sinks: int, remember_s: float) -> None:
        self._everyone = (1 << sinks) - 1
        self._remember_s = remember_s
        # Claimed events, each with the end of its lease; the bits of the sinks that took it, where some did.
        self._hand: dict[str, tuple[UsageEvent, float]] = {}
        self._taken: dict[str, int] = {}
        self._marks: dict[str, tuple[int, float]] = {}
        self._finished: dict[str, None] = {}

    def __len__(self) -> int:
        """How many events are in hand."""
        return len(self._hand)

    @property
    def finished(self) -> tuple[str, ...]:
        """Ids that every sink took, or that were given up: to be acknowledged, then to be forgotten."""
        return tuple(self._finished)

    def pick_up(self, events: Sequence[UsageEvent], until: float) -> None:
        """Keep claimed events until their lease ends; what is known of who took them still holds."""
        found = dict(zip(map(_ID, events), zip(events, repeat(until)), strict=False))
        _drop(found, self._finished)
        self._hand.update(found)
        for key in found if self._marks else ():
            if key in self._marks:
                self._taken[key], _ = self._marks.pop(key)
                if self._taken[key] == self._everyone:
                    self.give_up((key,))

    def missing(self, bit: int) -> list[UsageEvent]:
        """Return the events in hand that the sink of *bit* has not taken, in the order in which they were claimed."""
        taken = self._taken
        if not taken:
            return list(map(_EVENT, self._hand.values()))
        return [event for key, (event, _) in self._hand.items() if not taken.get(key, 0) & bit]

    def took(self, events: Sequence[UsageEvent], bit: int, now: float) -> None:
        """Note that the sink of *bit* has these events, or will never get them; they may be put down meanwhile."""
        hand, taken, everyone = self._hand, self._taken, self._everyone
        ids = tuple(map(_ID, events))
        held = tuple(filter(hand.__contains__, ids))
        if bit == everyone:
            self.give_up(held)
        else:
            for key in held:
                taken[key] = taken.get(key, 0) | bit
            self.give_up([key for key in held if taken[key] == everyone])
        if len(held) < len(ids):
            for key in ids:
                if key not in hand and key not in self._finished:
                    self._mark(key, self._marks.get(key, _UNKNOWN)[0] | bit, now)

    def give_up(self, ids: Sequence[str]) -> None:
        """Have events acknowledged that no sink can be given, or needs to be."""
        _drop(self._hand, ids)
        _drop(self._taken, ids)
        self._finished.update(dict.fromkeys(ids))

    def put_down(self, now: float) -> None:
        """Let go of events whose lease is over, and of the oldest beyond the bound; remember who took them."""
        over = [key for key, (_, until) in self._hand.items() if until <= now]
        over += list(self._hand)[: max(0, len(self._hand) - MAX_IN_HAND)]
        for key in dict.fromkeys(over):
            del self._hand[key]
            self._mark(key, self._taken.pop(key, 0), now)
        while self._marks:
            oldest = next(iter(self._marks))
            if self._marks[oldest][1] + self._remember_s > now:
                break
            del self._marks[oldest]

    def forget(self, ids: Sequence[str]) -> None:
        """Forget acknowledged events."""
        _drop(self._finished, ids)

    def _mark(self, key: str, taken: int, now: float) -> None:
        self._marks.pop(key, None)
        # Full: the newest are not remembered. Forgetting the oldest instead would, in a backlog that is claimed round
        # and round, forget each just before it comes again.
        if taken and len(self._marks) < MAX_MARKS:
            self._marks[key] = (taken, now)


def _drop(table: MutableMapping[str, Any], keys: Collection[str]) -> None:
    """Take *keys* out of *table*, those that are there."""
    if table:
        deque(map(table.pop, keys, repeat(None)), 0)

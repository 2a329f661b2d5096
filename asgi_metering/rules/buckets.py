"""
Token buckets: what is in one, from when it was last full and what was taken since.

A row's ``start`` is when the bucket was last full, ``used`` what was taken since then, and what has flowed back is
computed from the time between: whole tokens, never summed up, so that nothing drifts. ``end`` is when it will have been
full for as long as filling it takes: until then corrections count. ``extra`` is the latest time seen, the seconds that
one token takes, and those that all of them take; then, if the row before still counted, its ``start``, and ``previous``
is what it had taken: where all is given back, it is as if nobody had taken since. Knows neither limits nor calls.
"""

from __future__ import annotations

from math import floor
from struct import Struct
from typing import NamedTuple

from asgi_metering.amounts import MAX_AMOUNT
from asgi_metering.rules.state import Counter

__all__ = ["MARK", "Filling", "bounded", "corrected", "due", "filling", "refilled", "row"]

MARK = "b"
"""The first character of ``extra``."""

_DOUBLE = Struct(">d")
_KEPT = 3
"""Numbers that every row keeps."""


def due(start: float, amount: int, refill: int, window_s: float) -> float:
    """When *amount* has flowed into a bucket that gets *refill* in each *window_s* from *start* on."""
    return start + float(amount) * window_s / float(refill)


def refilled(start: float, at: float, refill: int, window_s: float) -> int:
    """How many whole tokens have flowed in between: all that are `due` by then."""
    whole = floor((at - start) * float(refill) / window_s)
    if due(start, whole + 1, refill, window_s) <= at:
        return whole + 1
    return whole if due(start, whole, refill, window_s) <= at else whole - 1


class Filling(NamedTuple):
    """
    A bucket before a call.

    Attributes:
        start: Since when it is not full; the call's own time, if it is.
        taken: What was taken since.
        at: The time that counts: *now*, or what the bucket has seen.
        prior: The start and taken of the row that it was before it was full, while corrections of that count.
    """

    start: float
    taken: int
    at: float
    prior: tuple[float, int] | None = None


def filling(counter: Counter | None, now: float, refill: int, window_s: float) -> Filling:
    """What a call finds at *now*."""
    if counter is None or not counter.extra.startswith(MARK):
        return Filling(now, 0, now)
    seen, _, _, *before = _doubles(counter)
    at = max(now, seen)
    if at < due(counter.start, counter.used, refill, window_s):
        return Filling(counter.start, counter.used, at, (before[0], counter.previous) if before else None)
    return Filling(at, 0, at, (counter.start, counter.used) if at < counter.end else None)


def _doubles(counter: Counter) -> list[float]:
    packed = bytes.fromhex(counter.extra[1:])
    return [number for (number,) in _DOUBLE.iter_unpack(packed)]


def bounded(found: Filling, cost: int, refill: int, window_s: float) -> Filling:
    """*found* where *cost* can be added to what is counted exactly: without windows that have passed."""
    start, taken, at, prior = found
    if taken + cost <= MAX_AMOUNT:
        return found
    passed = floor((at - start) / window_s)
    return Filling(start + passed * window_s, max(0, taken - passed * refill), at, prior)


def row(key: str, found: Filling, cost: int, limit: int, refill: int, window_s: float) -> Counter:
    """The row of a bucket that holds *limit* after *cost* was taken of what was *found*."""
    start, taken, at, prior = found
    pace, fill = window_s / float(refill), float(limit) * window_s / float(refill)
    return _row(key, start, taken + cost, [at, pace, fill], prior)


def _row(key: str, start: float, taken: int, kept: list[float], prior: tuple[float, int] | None) -> Counter:
    _, pace, fill = kept
    before, previous = ([], 0) if prior is None else ([prior[0]], prior[1])
    extra = b"".join(map(_DOUBLE.pack, [*kept, *before])).hex()
    return Counter(key, start, start + taken * pace + fill, taken, previous, MARK + extra)


def corrected(counter: Counter, start: float, delta: int, now: float) -> Counter | None:
    """
    The row after *delta* more was taken by a call that found the bucket not full since *start*.

    What is given back after the bucket was full has flowed over; what was used beyond the estimate is owed all the
    same. None where nothing changes: that has flowed over, or the row is over.
    """
    if now >= counter.end or (delta < 0 and counter.start != start):
        return None
    doubles = _doubles(counter)
    kept, before = doubles[:_KEPT], doubles[_KEPT:]
    prior = (before[0], counter.previous) if before else None
    if delta > 0 and start > counter.start:
        # It began that time, which was forgotten since all others gave back what they took.
        return _row(counter.key, start, min(MAX_AMOUNT, delta), kept, (counter.start, counter.used))
    taken = min(MAX_AMOUNT, max(0, counter.used + delta))
    if not taken and prior is not None:
        return _row(counter.key, *prior, kept, None)
    return _row(counter.key, counter.start, taken, kept, prior)

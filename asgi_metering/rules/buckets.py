"""
Token buckets: what is in one, from when it was last full and what was taken since.

A row's ``start`` is when the bucket was last full, ``used`` what was taken since then, and what has flowed back is
computed from the time between: whole tokens, never summed up, so that nothing drifts. ``end`` is when it will have been
full for as long as filling it takes: until then corrections count. ``extra`` is the latest time seen, the seconds that
one token takes, and those that all of them take. Knows neither limits nor calls.
"""

from __future__ import annotations

from math import floor
from struct import Struct

from asgi_metering.amounts import MAX_AMOUNT
from asgi_metering.rules.state import Counter

__all__ = ["MARK", "corrected", "due", "refilled", "row", "since_full"]

MARK = "b"
"""The first character of ``extra``."""

_EXTRA = Struct(">3d")


def due(start: float, amount: int, refill: int, window_s: float) -> float:
    """When *amount* has flowed into a bucket that gets *refill* in each *window_s* from *start* on."""
    return start + float(amount) * window_s / float(refill)


def refilled(start: float, at: float, refill: int, window_s: float) -> int:
    """How many whole tokens have flowed in between: all that are `due` by then."""
    whole = floor((at - start) * float(refill) / window_s)
    if due(start, whole + 1, refill, window_s) <= at:
        return whole + 1
    return whole if due(start, whole, refill, window_s) <= at else whole - 1


def since_full(counter: Counter | None, now: float, refill: int, window_s: float) -> tuple[float, int, float]:
    """
    Since when a bucket is not full, what was taken of it since, and the time that counts: *now*, or what it has seen.

    A full one is not full from now on.
    """
    if counter is None or not counter.extra.startswith(MARK):
        return now, 0, now
    seen, _, _ = _EXTRA.unpack(bytes.fromhex(counter.extra[1:]))
    at = max(now, seen)
    if at >= due(counter.start, counter.used, refill, window_s):
        return at, 0, at
    return counter.start, counter.used, at


def bounded(start: float, taken: int, at: float, cost: int, refill: int, window_s: float) -> tuple[float, int]:
    """*start* and *taken* where *cost* can be added to what is counted exactly: without windows that have passed."""
    if taken + cost <= MAX_AMOUNT:
        return start, taken
    passed = floor((at - start) / window_s)
    return start + passed * window_s, max(0, taken - passed * refill)


def row(key: str, start: float, taken: int, at: float, limit: int, refill: int, window_s: float) -> Counter:
    """The row of a bucket that holds *limit*, was full at *start*, and of which *taken* was taken up to *at*."""
    pace, fill = window_s / float(refill), float(limit) * window_s / float(refill)
    end = start + taken * pace + fill
    return Counter(key, start, end, taken, 0, MARK + _EXTRA.pack(at, pace, fill).hex())


def corrected(counter: Counter, start: float, delta: int, now: float) -> Counter | None:
    """
    The row after *delta* more was taken by a call that found the bucket not full since *start*.

    What is given back after the bucket was full has flowed over; what was used beyond the estimate is owed all the
    same. None where nothing changes: that has flowed over, or the row is over.
    """
    if now >= counter.end or (delta < 0 and counter.start != start):
        return None
    _, pace, fill = _EXTRA.unpack(bytes.fromhex(counter.extra[1:]))
    taken = min(MAX_AMOUNT, max(0, counter.used + delta))
    return counter._replace(end=counter.start + taken * pace + fill, used=taken)

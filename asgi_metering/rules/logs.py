"""
Moving logs: when each call came that a moving window still counts.

The times stand in a counter's ``extra``, oldest first, each as 16 hexadecimal digits of its bits: exact to the last
one, of one length, and in the order of time also as text. A row's ``start`` is the latest of them, its ``end`` when
that leaves. Knows the text, and no limit.
"""

from __future__ import annotations

from bisect import bisect_left
from struct import Struct

from asgi_metering.rules.state import Counter

__all__ = ["MARK", "count", "first_from", "inside", "text_of", "time_at", "without"]

MARK = "m"
"""The first character of a log."""

DIGITS = 16

_TIME = Struct(">d")


class _Times:
    """The times of a log, to be searched."""

    __slots__ = ("_log",)

    def __init__(self, log: str) -> None:
        self._log = log

    def __len__(self) -> int:
        return len(self._log) // DIGITS

    def __getitem__(self, index: int) -> str:
        return self._log[DIGITS * index : DIGITS * (index + 1)]


def text_of(time: float) -> str:
    """*time* (epoch seconds, 0 or more) as it stands in a log."""
    return _TIME.pack(time).hex()


def time_at(log: str, index: int) -> float:
    """The time at *index* of a log without its mark."""
    (time,) = _TIME.unpack(bytes.fromhex(log[DIGITS * index : DIGITS * (index + 1)]))
    return float(time)


def count(log: str) -> int:
    """How many calls a log without its mark has."""
    return len(log) // DIGITS


def first_from(log: str, time: float) -> int:
    """The index of the first call of a log that came at *time* or later; how many there are, if none did."""
    return bisect_left(_Times(log), text_of(time)) if time > 0 else 0


def inside(counter: Counter, since: float) -> str:
    """What of a counter's log came at *since* or later, without its mark; empty for a row of another kind."""
    extra = counter.extra
    if not extra.startswith(MARK):
        return ""
    log = extra[1:]
    # Most often everything is, or has to go but for a few.
    return log[DIGITS * first_from(log, since) :]


def without(counter: Counter, time: float, some: int) -> Counter | None:
    """The row of a log after *some* calls of that *time* left it; None if there is none of that time."""
    log = counter.extra[1:]
    first = first_from(log, time)
    end, text = first, text_of(time)
    while end < first + some and log[DIGITS * end : DIGITS * (end + 1)] == text:
        end += 1
    if end == first:
        return None
    left = log[: DIGITS * first] + log[DIGITS * end :]
    start = time_at(left, count(left) - 1) if left else counter.start
    # As it was before they came, also for who asks when the row is past.
    return Counter(counter.key, start, start + (counter.end - counter.start), count(left), 0, MARK + left)

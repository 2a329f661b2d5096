"""
Windows: how one rate limit counts.

`look` says what taking would do, for each kind of window; nothing is taken by looking. The arithmetic of fixed and
sliding windows is that of the `limits` package, except that a refusal never spends. Does not know who is limited.
"""

from __future__ import annotations

from math import floor
from typing import NamedTuple

from asgi_metering.decisions import WindowState
from asgi_metering.rules.calendars import pick
from asgi_metering.rules.operations import LimitAsk, WindowKind
from asgi_metering.rules.state import NEVER, Counter, PinnedWindow

__all__ = ["Look", "correct", "look", "window_state"]

_TICK_S = 1e-6
"""At the very instant that the past weighs the room it does not fit yet; a microsecond later it does."""


class Look(NamedTuple):
    """
    What one limit says to one call.

    Attributes:
        ask: What was asked.
        before: What was left before.
        fits: Whether the cost fits now.
        counter: The row after taking.
        reset_after_s: Seconds until more becomes available.
        retry_after_s: Seconds until the same cost fits; 0 when it fits now, infinite when it is above the limit.
    """

    ask: LimitAsk
    before: int
    fits: bool
    counter: Counter
    reset_after_s: float
    retry_after_s: float


def look(ask: LimitAsk, counter: Counter | None, now: float) -> Look | None:
    """What *ask* meets at *now*; None when its calendar boundaries do not cover *now*."""
    if ask.kind is WindowKind.SLIDING:
        return _look_sliding(ask, counter, now)
    if ask.kind is WindowKind.CALENDAR:
        window = pick(ask.boundaries, now)
        if window is None:
            return None
        start, end = window
        count = counter.used if counter is not None and counter.start == start else 0
    elif counter is not None and now < counter.end:
        # A clock that stepped back stays in the window that it had reached.
        start, end, count = counter.start, counter.end, counter.used
    else:
        start, end, count = now, now + ask.window_s, 0
    left = max(0.0, end - max(now, start))
    fits = count + ask.cost <= ask.limit
    return Look(
        ask,
        max(0, ask.limit - count),
        fits,
        Counter(ask.key, start, end, count + ask.cost),
        left,
        0.0 if fits else left if ask.cost <= ask.limit else NEVER,
    )


def _look_sliding(ask: LimitAsk, counter: Counter | None, now: float) -> Look:
    """The running window counts whole, the one before it by the share of it that the last *window_s* still cover."""
    window = ask.window_s
    if counter is not None:
        now = max(now, counter.start)
    start = floor(now / window) * window
    count = previous = 0
    if counter is not None:
        if counter.start == start:
            count, previous = counter.used, counter.previous
        elif counter.start == start - window:
            previous = counter.used
    end = start + window
    left = end - now
    used = floor(previous * left / window + count)
    fits = used + ask.cost <= ask.limit
    before = max(0, ask.limit - used)
    return Look(
        ask,
        before,
        fits,
        Counter(ask.key, start, end, count + ask.cost, previous),
        _sliding_wait(ask.limit, before + 1, count, previous, left, window) if used else 0.0,
        0.0 if fits else _sliding_wait(ask.limit, ask.cost, count, previous, left, window),
    )


def _sliding_wait(limit: int, cost: int, count: int, previous: int, left: float, window: float) -> float:
    """Seconds until *cost*, which does not fit now, fits a sliding window; never, if it is above the limit."""
    if cost > limit:
        return NEVER
    room = limit - cost + 1
    if room > count:
        # The past must weigh less than what the running window leaves of the room.
        return left - (room - count) * window / previous + _TICK_S
    # Only in the next window, where the running one has become the past.
    return left + window - room * window / count + _TICK_S


def window_state(seen: Look, taken: bool) -> WindowState:
    """What the answer tells of the limit, after the decision."""
    ask = seen.ask
    remaining = max(0, seen.before - ask.cost) if taken else seen.before
    return WindowState(ask.name, ask.limit, remaining, seen.reset_after_s, ask.window_s, ask.meter)


def correct(pinned: PinnedWindow, counter: Counter | None, actual: int) -> Counter | None:
    """
    The row after replacing what was taken for a call by what it used, in the window pinned at admission.

    None when that window no longer matters. A count never falls below zero.
    """
    if counter is None:
        return None
    delta = actual - pinned.taken
    if counter.start == pinned.start:
        return counter._replace(used=max(0, counter.used + delta))
    if counter.previous and counter.start - (counter.end - counter.start) == pinned.start:
        return counter._replace(previous=max(0, counter.previous + delta))
    return None

"""
Windows: how one rate limit counts.

`look` says what taking would do, for each kind of window; nothing is taken by looking. The arithmetic of fixed, sliding
and moving windows is that of the `limits` package, except that a refusal never spends. Does not know who is limited.
"""

from __future__ import annotations

from math import floor, ulp
from typing import NamedTuple

from asgi_metering.amounts import MAX_AMOUNT
from asgi_metering.decisions import WindowState
from asgi_metering.rules import buckets, logs
from asgi_metering.rules.calendars import pick
from asgi_metering.rules.operations import LimitAsk, WindowKind
from asgi_metering.rules.state import NEVER, Counter, PinnedWindow, build

__all__ = [
    "TICK_S",
    "Look",
    "correct",
    "in_bucket",
    "leaves_after_s",
    "look",
    "may_be_corrected",
    "taken_at",
    "window_state",
]

# Read once: on Python 3.11 to look up the member of an enum costs more than all that a window computes.
_CALENDAR, _SLIDING = WindowKind.CALENDAR, WindowKind.SLIDING
_MOVING, _BUCKET = WindowKind.MOVING, WindowKind.BUCKET

TICK_S = 1e-6
"""At the very instant that the past weighs the room it does not fit yet; a microsecond later it does."""


class Look(NamedTuple):
    """
    What one limit says to one call.

    Attributes:
        ask: What was asked.
        used: What counts now, before taking; above the limit in a bucket that owes.
        fits: Whether the cost fits now.
        counter: The row after taking; that of a moving log only if it fits.
        left_s: Seconds until the running window ends, the oldest call leaves a log, or one more is in a bucket.
        retry_after_s: Seconds until the same cost fits; 0 when it fits now, infinite when it is above the limit.
    """

    ask: LimitAsk
    used: int
    fits: bool
    counter: Counter
    left_s: float
    retry_after_s: float

    @property
    def before(self) -> int:
        """What was left before taking; never negative, also where a limit was cut."""
        return max(0, self.ask.limit - self.used)


def look(ask: LimitAsk, counter: Counter | None, now: float) -> Look | None:
    """What *ask* meets at *now*; None when its calendar boundaries do not cover *now*."""
    _, key, kind, limit, window_s, cost, _, boundaries, _ = ask
    if kind is _SLIDING:
        return _look_sliding(ask, counter, now)
    if kind is _MOVING:
        return _look_moving(ask, counter, now)
    if kind is _BUCKET:
        return _look_bucket(ask, counter, now)
    if kind is _CALENDAR:
        window = pick(boundaries, now)
        if window is None:
            return None
        start, end = window
        count = counter.used if counter is not None and counter.start == start else 0
        if counter is not None and counter.start > now:
            # A clock that stepped back stays in the window that it had reached.
            start, end, count = counter.start, counter.end, counter.used
    elif counter is not None and now < counter.end:
        start, end, count = counter.start, counter.end, counter.used
    else:
        start, end, count = now, now + window_s, 0
    left = end - now if now > start else end - start
    after = count + cost
    taken = build(Counter, (key, start, end, after, 0, ""))
    if after <= limit:
        return build(Look, (ask, count, True, taken, left, 0.0))
    return Look(ask, count, False, taken, left, left if cost <= limit else NEVER)


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
    limit, cost = ask.limit, ask.cost
    # The running count stays outside of the float: beside a large one, the last bits of the past's share would drown.
    used = floor(previous * left / window) + count
    taken = Counter(ask.key, start, end, count + cost, previous)
    if used + cost <= limit:
        return Look(ask, used, True, taken, left, 0.0)
    retry = _until_below(limit - cost + 1, count, previous, left, window) if cost <= limit else NEVER
    return Look(ask, used, False, taken, left, retry)


def _until_below(bound: int, count: int, previous: int, left: float, window: float) -> float:
    """Seconds until a sliding window that uses *bound* (1 or more) or above uses less, if nobody takes meanwhile."""
    if bound > count:
        # The past must weigh less than what the running window leaves below the bound.
        return left - (bound - count) * window / previous + TICK_S
    # Only in the next window, where the running one has become the past.
    return left + window - bound * window / count + TICK_S


def _look_moving(ask: LimitAsk, counter: Counter | None, now: float) -> Look:
    """Every call counts for *window_s* by itself, the instant at its end included."""
    _, key, _, limit, window_s, cost, _, _, _ = ask
    at, log = now, ""
    if counter is not None:
        at = max(now, counter.start)
        log = logs.inside(counter, at - window_s)
    used = logs.count(log)
    left = leaves_after_s((logs.time_at(log, 0) if used else at) + window_s, now)
    if used + cost <= limit:
        if counter is not None and used and not cost:
            return Look(ask, used, True, counter, left, 0.0)
        log = logs.MARK + log + logs.text_of(at) * cost
        return Look(ask, used, True, Counter(key, at, at + window_s, used + cost, 0, log), left, 0.0)
    retry = NEVER
    if cost <= limit:
        retry = leaves_after_s(logs.time_at(log, used + cost - limit - 1) + window_s, now)
    return Look(ask, used, False, Counter(key, at, at + window_s, used), left, retry)


def leaves_after_s(at: float, now: float) -> float:
    """Seconds until a call that is as old as its window at *at* has left its log: two steps of a float after that."""
    return at - now + 2 * ulp(at)


def _until_s(at: float, now: float) -> float:
    """Seconds until *at*: added to *now*, they are not less."""
    wait = at - now
    return wait if now + wait >= at else wait + ulp(at)


def _look_bucket(ask: LimitAsk, counter: Counter | None, now: float) -> Look:
    found = buckets.filling(counter, now, ask.refill, ask.window_s)
    seen = in_bucket(ask, found, now)
    # Whoever only looks changes nothing, not even the time that was seen. But a full bucket is not full from then on:
    # what a call uses beyond an estimate of nothing is not paid from what flowed over before it came.
    if counter is not None and not ask.cost and found.taken:
        return seen._replace(counter=counter)
    return seen


def in_bucket(ask: LimitAsk, found: buckets.Filling, now: float) -> Look:
    """What *ask* meets in a bucket as it was *found*."""
    _, key, _, limit, window_s, cost, _, _, refill = ask
    start, taken, at, prior = buckets.bounded(found, cost, refill, window_s)
    back = buckets.refilled(start, at, refill, window_s)
    left = _until_s(buckets.due(start, back + 1, refill, window_s), now)
    after = buckets.row(key, buckets.Filling(start, taken, at, prior), cost, limit, refill, window_s)
    fits_at = buckets.due(start, taken + cost - limit, refill, window_s)
    if fits_at <= at:
        return Look(ask, taken - back, True, after, left, 0.0)
    retry = _until_s(fits_at, now) if cost <= limit else NEVER
    return Look(ask, taken - back, False, after, left, retry)


def window_state(seen: Look, taken: bool) -> WindowState:
    """What the answer tells of the limit, after the decision. Of a bucket: how long all of it takes to come back."""
    ask, used, _, _, reset_after_s, _ = seen
    name, _, kind, limit, window_s, cost, meter, _, refill = ask
    if taken:
        used += cost
    if kind is _SLIDING:
        reset_after_s = _until_more(seen, used)
    elif kind is _BUCKET:
        reset_after_s = reset_after_s if used > 0 else 0.0
        window_s = float(limit) * window_s / float(refill)
    return build(WindowState, (name, limit, limit - used if used < limit else 0, reset_after_s, window_s, meter))


def _until_more(seen: Look, used: int) -> float:
    """Seconds until a sliding window that counts *used* has room for more; nothing is awaited where none is used."""
    if not used:
        return 0.0
    ask, counter = seen.ask, seen.counter
    count = counter.used - ask.cost + used - seen.used
    return _until_below(max(1, min(used, ask.limit)), count, counter.previous, seen.left_s, ask.window_s)


def correct(pinned: PinnedWindow, counter: Counter | None, actual: int, now: float) -> Counter | None:
    """
    The row after replacing what was taken for a call by what it used, in the window pinned at admission.

    None when that window no longer matters. A count never falls below zero, nor rises above what stores count exactly.
    Of a moving log calls are only taken back.
    """
    if counter is None:
        return None
    delta = actual - pinned.taken
    kind = counter.extra[:1]
    if kind == buckets.MARK:
        return buckets.corrected(counter, pinned.start, delta, now)
    if kind == logs.MARK:
        return logs.without(counter, pinned.start, -delta) if delta < 0 else None
    if counter.start == pinned.start:
        return counter._replace(used=min(MAX_AMOUNT, max(0, counter.used + delta)))
    # Only sliding windows read it; for the others it is lost with the next hit.
    if counter.start - (counter.end - counter.start) == pinned.start:
        return counter._replace(previous=min(MAX_AMOUNT, max(0, counter.previous + delta)))
    return None


def may_be_corrected(pinned: PinnedWindow, counter: Counter | None, now: float) -> bool:
    """Whether any correction of that window may still change something."""
    if counter is not None and counter.extra[:1] == buckets.MARK:
        return now < counter.end
    return correct(pinned, counter, 0, now) is not None


def taken_at(counter: Counter, at: float) -> float | None:
    """
    The start by which a call that was admitted at *at* would have pinned what it took; None where that is over.

    Of a log: the first call from then on, which is that call unless the clock had stepped back.
    """
    start, end = counter.start, counter.end
    kind = counter.extra[:1]
    if kind == buckets.MARK:
        return start if start <= at else None
    if kind == logs.MARK:
        log = counter.extra[1:]
        first = logs.first_from(log, at)
        return logs.time_at(log, first) if first < logs.count(log) else None
    if start <= at < end:
        return start
    before = start - (end - start)
    return before if before <= at < start else None

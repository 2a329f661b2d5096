"""
Calendars: where minutes, hours, days, weeks, months and years begin, in any IANA zone.

IANA rules live in Python only. A caller computes four boundaries around its own time and sends them; the store
picks by its own clock (DESIGN "Time"). Does not know what is counted in a window.
"""

from __future__ import annotations

import bisect
from calendar import monthrange
from datetime import UTC, datetime, timedelta, tzinfo
from enum import StrEnum
from functools import lru_cache
from math import floor
from typing import TypeAlias
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from asgi_metering.errors import ConfigurationError

__all__ = ["Period", "around", "boundaries", "boundaries_until", "pick", "zone"]


class Period(StrEnum):
    """A calendar period. Weeks begin on Mondays (ISO 8601)."""

    MINUTE = "minute"
    HOUR = "hour"
    DAY = "day"
    WEEK = "week"
    MONTH = "month"
    YEAR = "year"


_SECONDS = {Period.MINUTE: 60, Period.HOUR: 3_600}
"""Periods that the clock has; the others have a date on which they begin."""


_Day: TypeAlias = tuple[int, int, int]
"""(year, month, day) of a zone's own calendar."""


def zone(name: str) -> tzinfo:
    """
    Return the time zone called *name*.

    Raises:
        ConfigurationError: The machine knows no zone of this name.
    """
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ConfigurationError(
            f"The time zone {name!r} is not known here. Use an IANA name such as 'Europe/Berlin', and install "
            f"'tzdata' where the system has no zone files."
        ) from None


def _moved(day: _Day, days: int) -> _Day:
    moved = datetime(*day, tzinfo=UTC) + timedelta(days=days)
    return moved.year, moved.month, moved.day


def _month(months: int, anchor: int) -> _Day:
    """Where the month of this number, counted from year 0, begins: on its last day where it has no day *anchor*."""
    year, month = months // 12, months % 12 + 1
    return year, month, min(anchor, monthrange(year, month)[1])


def _shift(period: Period, start: _Day, by: int, anchor: int) -> _Day:
    """The start of the period that comes *by* periods after the one that begins with *start*."""
    if period is Period.YEAR:
        return start[0] + by, 1, 1
    if period is Period.MONTH:
        year, month, _ = start
        return _month(year * 12 + month - 1 + by, anchor)
    return _moved(start, by * 7 if period is Period.WEEK else by)


def _current(period: Period, local: datetime, anchor: int) -> _Day:
    today = local.year, local.month, local.day
    if period is Period.WEEK:
        return _moved(today, -local.weekday())
    if period is Period.DAY:
        return today
    start = _shift(period, today, 0, anchor)
    return start if start <= today else _shift(period, today, -1, anchor)


def boundaries(period: Period, zone_name: str, now: float, anchor: int = 1) -> tuple[float, float, float, float]:
    """
    The starts of the previous, the current, the next and the next but one *period* around *now*, epoch seconds.

    A day whose midnight does not exist begins when the clock jumps over it; one whose midnight comes twice begins
    at the first. An hour that comes twice is two; one of which the clock jumps over a part is shorter, and one that it
    goes back into longer.

    Args:
        period: How long the windows are.
        zone_name: IANA name of the zone whose calendar counts.
        now: Epoch seconds.
        anchor: Day on which months begin, 1 to 31; a month that has no such day begins on its last one.
    """
    tz = zone(zone_name)
    if period in _SECONDS:
        return _clock_boundaries(period, zone_name, _clock_start(tz, floor(now), _SECONDS[period]))
    local = datetime.fromtimestamp(now, tz)
    return _boundaries(period, zone_name, _current(period, local, anchor), anchor)


@lru_cache(maxsize=256)
def _boundaries(period: Period, zone_name: str, current: _Day, anchor: int) -> tuple[float, float, float, float]:
    tz = zone(zone_name)
    starts = (datetime(*_shift(period, current, by, anchor), tzinfo=tz).timestamp() for by in (-1, 0, 1, 2))
    first, second, third, fourth = starts
    return first, second, third, fourth


@lru_cache(maxsize=256)
def _clock_boundaries(period: Period, zone_name: str, current: int) -> tuple[float, float, float, float]:
    tz, size = zone(zone_name), _SECONDS[period]
    following = _next_clock_start(tz, current, size)
    starts = (_clock_start(tz, current - 1, size), current, following, _next_clock_start(tz, following, size))
    first, second, third, fourth = map(float, starts)
    return first, second, third, fourth


def _offset(tz: tzinfo, at: int) -> int:
    """By how many seconds the zone's clock is before UTC at the epoch second *at*."""
    offset = datetime.fromtimestamp(at, tz).utcoffset()
    return 0 if offset is None else floor(offset.total_seconds())


def _clock_start(tz: tzinfo, at: int, size: int) -> int:
    """When the zone's clock last began a span of *size* seconds (a divisor of a day), up to the epoch second *at*."""
    offset = _offset(tz, at)
    start = at - (at + offset) % size
    if _offset(tz, start) == offset:
        return start
    # The clock was set in between: then, if it jumped over the beginning; before, if it is still in the same span.
    seconds = range(start + 1, at + 1)
    jump = seconds[bisect.bisect_left(seconds, True, key=lambda second: _offset(tz, second) == offset)]
    before = jump - 1
    if (before + _offset(tz, before)) // size < (jump + offset) // size:
        return jump
    return _clock_start(tz, before, size)


def _next_clock_start(tz: tzinfo, start: int, size: int) -> int:
    """When the span after the one that began at *start* begins."""
    later = start + size
    while (found := _clock_start(tz, later, size)) <= start:
        later += size // 2
    # A clock that is set within a span, and not at its end, begins another one there.
    while (earlier := _clock_start(tz, found - 1, size)) > start:
        found = earlier
    return found


def boundaries_until(period: Period, zone_name: str, now: float, until: float, anchor: int = 1) -> tuple[float, ...]:
    """As `boundaries`, and further on: at least the window that holds *until* is whole among them."""
    edges: tuple[float, ...] = boundaries(period, zone_name, now, anchor)
    while edges[-1] <= until:
        edges += boundaries(period, zone_name, edges[-1], anchor)[2:]
    return edges


def around(edges: tuple[float, ...], now: float) -> tuple[float, ...]:
    """Those four of *edges* that `boundaries` gives around *now*; the nearest four where they do not reach so far."""
    first = min(bisect.bisect_right(edges, now) - 2, len(edges) - 4)
    return edges[max(0, first) :][:4]


def pick(edges: tuple[float, ...], now: float) -> tuple[float, float] | None:
    """The window of *edges* that holds *now*, as (start, end); None when *now* is outside them all."""
    index = bisect.bisect_right(edges, now)
    if index == 0 or index == len(edges):
        return None
    return edges[index - 1], edges[index]

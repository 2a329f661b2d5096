"""
Calendars: where days and months begin, in any IANA zone.

IANA rules live in Python only. A caller computes four boundaries around its own time and sends them; the store
picks by its own clock (DESIGN "Time"). Does not know what is counted in a window.
"""

from __future__ import annotations

import bisect
from datetime import UTC, datetime, timedelta, tzinfo
from enum import StrEnum
from functools import lru_cache
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from asgi_metering.errors import ConfigurationError

__all__ = ["Period", "boundaries", "pick", "zone"]


class Period(StrEnum):
    """A calendar period."""

    DAY = "day"
    MONTH = "month"


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


def _day(year: int, month: int, day: int) -> tuple[int, int, int]:
    moved = datetime(year, month, 1, tzinfo=UTC) + timedelta(days=day - 1)
    return moved.year, moved.month, moved.day


def _shift(period: Period, local: datetime, by: int) -> tuple[int, int, int]:
    if period is Period.DAY:
        return _day(local.year, local.month, local.day + by)
    months = local.year * 12 + local.month - 1 + by
    return months // 12, months % 12 + 1, 1


def boundaries(period: Period, zone_name: str, now: float) -> tuple[float, float, float, float]:
    """
    The starts of the previous, the current, the next and the next but one *period* around *now*, epoch seconds.

    A day whose midnight does not exist begins when the clock jumps over it; one whose midnight comes twice begins
    at the first.
    """
    tz = zone(zone_name)
    local = datetime.fromtimestamp(now, tz)
    return _boundaries(period, zone_name, _shift(period, local, 0))


@lru_cache(maxsize=256)
def _boundaries(period: Period, zone_name: str, current: tuple[int, int, int]) -> tuple[float, float, float, float]:
    tz = zone(zone_name)
    local = datetime(*current, tzinfo=tz)
    starts = (datetime(*_shift(period, local, by), tzinfo=tz).timestamp() for by in (-1, 0, 1, 2))
    first, second, third, fourth = starts
    return first, second, third, fourth


def pick(edges: tuple[float, ...], now: float) -> tuple[float, float] | None:
    """The window of *edges* that holds *now*, as (start, end); None when *now* is outside them all."""
    index = bisect.bisect_right(edges, now)
    if index == 0 or index == len(edges):
        return None
    return edges[index - 1], edges[index]

"""
Chosen limits: rate limits that are looked up for each call, by the caller's plan or by a configured name.

Values and how their texts are read. Knows nobody's plan, nor who configured what.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from asgi_metering.errors import ConfigurationError
from asgi_metering.names import check_name
from asgi_metering.rates import RateLimit, Strategy, parse_limit, parse_limits

if TYPE_CHECKING:
    from limits import RateLimitItem

__all__ = ["ConfiguredLimits", "LimitByPlan", "LimitReading", "leveled"]


@dataclass(frozen=True, slots=True)
class LimitReading:
    """How the text of a limit that is looked up for each call is read."""

    strategy: Strategy = "fixed"
    zone: str = "UTC"
    level: str = ""

    def read(self, text: str | RateLimitItem) -> RateLimit:
        """The limit that *text* says, read once; raises as `parse_limit`."""
        # A list, say, is refused in words, and not for what a cache needs.
        read = _read if isinstance(text, Hashable) else _read.__wrapped__
        return read(text, self.strategy, self.zone, self.level)

    def read_all(self, text: str | RateLimitItem) -> tuple[RateLimit, ...]:
        """The limits that *text* says, as `parse_limits` divides it, read once."""
        return _read_all(text, self.strategy, self.zone, self.level)


@lru_cache(maxsize=4096)
def _read(text: str | RateLimitItem, strategy: Strategy, zone: str, level: str) -> RateLimit:
    return leveled(parse_limit(text, strategy, zone), level)


@lru_cache(maxsize=4096)
def _read_all(text: str | RateLimitItem, strategy: Strategy, zone: str, level: str) -> tuple[RateLimit, ...]:
    return tuple([leveled(limit, level) for limit in parse_limits(text, strategy, zone)])


def leveled(limit: RateLimit, level: str) -> RateLimit:
    """*limit* with the name of its level in its own, so that a hierarchy has no two of one name (S0.42)."""
    return replace(limit, name=check_name(f"{level}-{limit.name}", "limit name")) if level else limit


@dataclass(frozen=True, slots=True, eq=False)
class LimitByPlan:
    """
    A limit for each plan of callers, looked up for each call (S4.17).

    Args:
        texts: By plan; whoever declared them may change them while we run. A plan that is not there, and who has none,
            gets the smallest.
        reading: How they are read.
        meter: What all of them count, then and later: how calls are counted is worked out once.
    """

    texts: Mapping[str, str | RateLimitItem]
    reading: LimitReading = LimitReading()
    meter: str = "requests"

    def text_for(self, plan: str | None) -> str:
        """The limit of *plan*, as it is written; raises `ConfigurationError` where none is left to choose from."""
        if plan is not None and plan in self.texts:
            return str(self.texts[plan])
        return min(self._readable(), key=_speed).text

    def limit_for(self, plan: str | None) -> RateLimit:
        """The limit of *plan*; raises as `parse_limit`, and `ConfigurationError` where it has come to count another."""
        return self._read(self.text_for(plan))

    def _read(self, text: str | RateLimitItem) -> RateLimit:
        limit = self.reading.read(text)
        if limit.meter != self.meter:
            raise ConfigurationError(
                f"The limits by plan {dict(self.texts)!r} have {str(text)!r}, which counts {limit.meter}, where they "
                f"counted {self.meter} when the endpoint was written. Count these again, or write limits of "
                f"{limit.meter} as a mapping of their own."
            )
        return limit

    def _readable(self) -> list[RateLimit]:
        found = []
        for text in self.texts.values():
            # What was changed into no limit fails the calls of its own plan, and nobody else's.
            with suppress(ConfigurationError, TypeError):
                found.append(self._read(text))
        if not found:
            raise ConfigurationError(
                f"The limits by plan {dict(self.texts)!r} have no limit left. Write {{'free': '20/minute'}}, say."
            )
        return found


def _speed(limit: RateLimit) -> tuple[float, int]:
    return limit.amount / limit.window_s, limit.amount


@dataclass(frozen=True, slots=True)
class ConfiguredLimits:
    """The limits that `Metering.limits` has under a name, looked up for each call (S2.30)."""

    name: str
    reading: LimitReading = LimitReading()

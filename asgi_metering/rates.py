"""
Rate limits as people write them: the grammar of `limits` ("60/minute"), and ours on top ("... of tokens").

Values only: what is allowed, per how long, of what. Knows nothing of counting.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

from asgi_metering.amounts import MAX_AMOUNT
from asgi_metering.errors import ConfigurationError
from asgi_metering.names import check_name

__all__ = ["RateLimit", "Strategy", "parse_limit"]

Strategy: TypeAlias = Literal["fixed", "calendar", "sliding"]
STRATEGIES: tuple[Strategy, ...] = ("fixed", "calendar", "sliding")
"""How a window moves: from the first hit, with the calendar, or as two weighted neighbours."""

METERS = ("requests", "tokens", "input_tokens", "output_tokens")
"""What a limit can count. All but requests are taken by estimate and corrected by the usage."""

_OF_UNIT = re.compile(r"^(?P<limit>.+?)\s+of\s+(?P<meter>[A-Za-z_][A-Za-z0-9_]*)\s*$", re.IGNORECASE)
_NO_WINDOW = re.compile(r"(?:/|\bper\b)\s*0+\s*[a-z]", re.IGNORECASE)
_CALENDAR_PERIODS = ("day", "month")


@dataclass(frozen=True, slots=True)
class RateLimit:
    """
    One limit.

    Attributes:
        text: As it was written.
        name: Names it in answers: ``60-per-minute``, ``200000-tokens-per-minute``.
        amount: How many per window.
        window_s: The window's length in seconds; a month counts as 30 days unless the calendar says.
        meter: What is counted: ``requests``, or what stands after "of".
        strategy: One of `STRATEGIES`.
        period: ``day`` or ``month`` for a calendar window, else empty.
        zone: IANA zone of a calendar window.
    """

    text: str
    name: str
    amount: int
    window_s: float
    meter: str
    strategy: str
    period: str
    zone: str


def parse_limit(text: str, strategy: Strategy = "fixed", zone: str = "UTC") -> RateLimit:
    """
    Read one limit.

    Args:
        text: ``"60/minute"``, ``"5 per 2 hours"``, ``"200000/minute of tokens"``.
        strategy: ``"fixed"`` begins at the first hit, ``"calendar"`` with the day or month, ``"sliding"`` weighs the
            window before by the share of it that still counts.
        zone: Where the calendar's days begin.

    Raises:
        ConfigurationError: The text is not in the grammar, is several limits, or its strategy cannot be had.
    """
    if strategy not in STRATEGIES:
        raise ConfigurationError(f"The strategy {strategy!r} is not known. Use one of {', '.join(STRATEGIES)}.")
    if not isinstance(text, str):
        raise ConfigurationError(f"The limit {text!r} is not a str. Write it as '60/minute'.")
    of_unit = _OF_UNIT.match(text)
    meter = of_unit["meter"].lower() if of_unit else "requests"
    if meter not in METERS:
        raise ConfigurationError(f"The limit {text!r} counts {meter!r}. Use one of {', '.join(METERS)}.")
    amount, multiples, granularity, window_s = _parse(of_unit["limit"] if of_unit else text, text)
    if amount > MAX_AMOUNT:
        raise ConfigurationError(
            f"The limit {text!r} allows more than {MAX_AMOUNT}, up to which stores count exactly. Lower it."
        )
    period = granularity if strategy == "calendar" else ""
    if strategy == "calendar" and (granularity not in _CALENDAR_PERIODS or multiples != 1):
        raise ConfigurationError(
            f"The limit {text!r} cannot follow the calendar. Calendar windows are one day or one month; use the "
            f"strategy 'fixed' or 'sliding' for others."
        )
    span = granularity if multiples == 1 else f"{multiples}-{granularity}"
    counted = "" if meter == "requests" else f"{meter}-"
    name = check_name(f"{amount}-{counted}per-{span}", "limit name")
    return RateLimit(text, name, amount, window_s, meter, strategy, period, zone)


def _parse(limit: str, text: str) -> tuple[int, int, str, float]:
    # Only here, so that importing the package does not import the storages of `limits`.
    from limits import parse_many

    try:
        (item,) = parse_many(limit)
    except ValueError:
        raise ConfigurationError(
            f"The limit {text!r} is not in the grammar. Write one limit as '60/minute', '5 per 2 hours' or "
            f"'200000/minute of tokens', and several as several arguments."
        ) from None
    if _NO_WINDOW.search(limit):
        # `limits` takes it for one.
        raise ConfigurationError(f"The limit {text!r} has a window of no length. Write '60/minute', say.")
    return item.amount, item.multiples, item.GRANULARITY.name, float(item.get_expiry())

"""The grammar of rate limits: that of `limits`, and "of UNIT" on top."""

from __future__ import annotations

import pytest

from asgi_metering.errors import ConfigurationError
from asgi_metering.rates import parse_limit


@pytest.mark.parametrize(
    ("text", "name", "amount", "window_s", "meter"),
    [
        ("60/minute", "60-per-minute", 60, 60, "requests"),
        ("5 per 2 hours", "5-per-2-hour", 5, 7_200, "requests"),
        ("5000/day", "5000-per-day", 5_000, 86_400, "requests"),
        ("0/minute", "0-per-minute", 0, 60, "requests"),
        ("200000/minute of tokens", "200000-tokens-per-minute", 200_000, 60, "tokens"),
        ("10/second OF Input_Tokens", "10-input_tokens-per-second", 10, 1, "input_tokens"),
    ],
)
def test_reads_what_people_write(text: str, name: str, amount: int, window_s: float, meter: str) -> None:
    """Amount, window and meter are read, and the limit gets a name that answers can carry (S2.29)."""
    limit = parse_limit(text)
    assert (limit.name, limit.amount, limit.window_s, limit.meter) == (name, amount, window_s, meter)
    assert (limit.strategy, limit.period) == ("fixed", "")


def test_calendar_windows_are_one_day_or_one_month() -> None:
    """A calendar limit knows its period and zone."""
    limit = parse_limit("100/month", "calendar", "Europe/Berlin")
    assert (limit.period, limit.zone, limit.strategy) == ("month", "Europe/Berlin", "calendar")


@pytest.mark.parametrize(
    ("text", "strategy", "mend"),
    [
        ("often", "fixed", "Write one limit as"),
        ("60/minute;5/day", "fixed", "several as several arguments"),
        ("-1/minute", "fixed", "Write one limit as"),
        ("60/minute of", "fixed", "Write one limit as"),
        ("60/minute of apples", "fixed", "Use one of requests, tokens"),
        (60, "fixed", "Write it as"),
        ("60/0 minutes", "fixed", "a window of no length"),
        ("60 per 00 hour of tokens", "fixed", "a window of no length"),
        ("9007199254740992/day of tokens", "fixed", "allows more than 9007199254740991"),
        ("60/minute", "leaky", "Use one of fixed, calendar, sliding"),
        ("60/minute", "calendar", "one day or one month"),
        ("60 per 2 days", "calendar", "one day or one month"),
    ],
)
def test_refuses_the_rest_with_the_mend(text: object, strategy: str, mend: str) -> None:
    """An unknown limit is an error at import and never an unlimited route (S2.30)."""
    with pytest.raises(ConfigurationError, match=mend):
        parse_limit(text, strategy)  # type: ignore[arg-type]

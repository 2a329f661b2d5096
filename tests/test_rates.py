"""The grammar of rate limits: that of `limits`, and "of UNIT" on top."""

from __future__ import annotations

import pytest
from limits import RateLimitItemPerHour, RateLimitItemPerMonth, RateLimitItemPerSecond, parse_many

from asgi_metering.errors import ConfigurationError
from asgi_metering.rates import MAX_MOVING, Strategy, parse_limit, parse_limits


@pytest.mark.parametrize(
    ("text", "name", "amount", "window_s", "meter"),
    [
        ("60/minute", "60-per-minute", 60, 60, "requests"),
        ("5 per 2 hours", "5-per-2-hour", 5, 7_200, "requests"),
        ("5000/day", "5000-per-day", 5_000, 86_400, "requests"),
        ("0/minute", "0-per-minute", 0, 60, "requests"),
        ("200000/minute of tokens", "200000-tokens-per-minute", 200_000, 60, "tokens"),
        ("100 / week", "100-per-week", 100, 7 * 86_400, "requests"),
        ("100 per 2 Weeks of tokens", "100-tokens-per-2-week", 100, 14 * 86_400, "tokens"),
        ("10/second OF Input_Tokens", "10-input_tokens-per-second", 10, 1, "input_tokens"),
    ],
)
def test_reads_what_people_write(text: str, name: str, amount: int, window_s: float, meter: str) -> None:
    """Amount, window and meter are read, and the limit gets a name that answers can carry (S2.29)."""
    limit = parse_limit(text)
    assert (limit.name, limit.amount, limit.window_s, limit.meter) == (name, amount, window_s, meter)
    assert (limit.strategy, limit.period) == ("fixed", "")


@pytest.mark.parametrize("period", ["minute", "hour", "day", "week", "month", "year"])
def test_calendar_windows_know_their_period(period: str) -> None:
    """A calendar limit knows its period and zone."""
    limit = parse_limit(f"100/{period}", "calendar", "Europe/Berlin")
    assert (limit.period, limit.zone, limit.strategy) == (period, "Europe/Berlin", "calendar")


@pytest.mark.parametrize(
    ("text", "name", "amount", "burst", "meter"),
    [
        ("10/second burst 50", "10-per-second-burst-50", 10, 50, "requests"),
        ("9/2 hours of tokens  BURST 5", "9-tokens-per-2-hour-burst-5", 9, 5, "tokens"),
        ("9 per minute burst 5 of tokens", "9-tokens-per-minute-burst-5", 9, 5, "tokens"),
    ],
)
@pytest.mark.parametrize("strategy", ["fixed", "calendar", "sliding", "moving"])
def test_burst_makes_a_bucket(text: str, name: str, amount: int, burst: int, meter: str, strategy: Strategy) -> None:
    """A limit with a burst is a token bucket beside limits of any strategy, in either order with what it counts."""
    limit = parse_limit(text, strategy)
    assert (limit.name, limit.amount, limit.burst, limit.meter) == (name, amount, burst, meter)
    assert (limit.strategy, limit.period, limit.text) == ("bucket", "", text)


def test_moving_windows_count_up_to_a_bound() -> None:
    """A moving limit may be as large as its log, and no larger."""
    assert parse_limit(f"{MAX_MOVING}/day", "moving").strategy == "moving"
    assert parse_limit("60/minute of requests", "moving").meter == "requests"


def test_items_of_limits_are_limits() -> None:
    """An item of the limits package reads as its text does."""
    item = RateLimitItemPerHour(60, 2)
    assert parse_limit(item) == parse_limit("60 per 2 hour")
    assert parse_limits(item, "sliding") == (parse_limit("60 per 2 hour", "sliding"),)
    assert parse_limit(RateLimitItemPerMonth(5), "calendar", "Asia/Tokyo").period == "month"


@pytest.mark.parametrize("text", ["5 per 100 years", "9007199254740991/36600 days", "1/second burst 9007199254740990"])
def test_reads_what_is_as_large_as_can_be(text: str) -> None:
    """A century is a window, and the most that stores count is a limit."""
    assert parse_limit(text).text == text


@pytest.mark.parametrize("between", [";", ",", " | ", "; "])
def test_several_limits_are_read_from_one_text(between: str) -> None:
    """What `limits.parse_many` divides is several limits, each with its own "of" and "burst"."""
    text = between.join(("10/minute", "100/hour of tokens", "5/second burst 9"))
    assert parse_limits(text) == tuple(map(parse_limit, ("10/minute", "100/hour of tokens", "5/second burst 9")))
    assert [item.amount for item in parse_many(between.join(("1/minute", "2/hour")))] == [1, 2]


@pytest.mark.parametrize("text", ["", "10/minute;", ";10/minute", "10/minute;;5/day"])
def test_refuses_a_list_with_holes(text: str) -> None:
    """Nothing between two separators is no limit."""
    with pytest.raises(ConfigurationError, match="Write one limit as"):
        parse_limits(text)


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
        ("60/second", "calendar", "one minute, hour, day, week, month, year"),
        ("60 per 2 days", "calendar", "one minute, hour, day, week, month, year"),
        ("60 per 0 weeks", "fixed", "a window of no length"),
        ("60 per 2 weeks", "calendar", "one minute, hour, day, week, month, year"),
        ("10/second burst 0", "fixed", "holds nothing"),
        ("10/second burst", "fixed", "Write one limit as"),
        ("10/second burst -5", "fixed", "Write one limit as"),
        ("0/second burst 5", "fixed", "into which nothing flows back"),
        ("9007199254740990/day burst 2", "fixed", "allows more than 9007199254740991"),
        ("10/second burst 5 burst 6", "fixed", "says twice"),
        ("10/second of tokens of requests", "fixed", "says twice"),
        ("10/second of tokens", "moving", "counts calls, one by one"),
        ("5001/day", "moving", "Use the strategy 'sliding'"),
        (RateLimitItemPerSecond(5001), "moving", "Use the strategy 'sliding'"),
        (RateLimitItemPerSecond(-1), "fixed", "allows no number"),
        ("9" * 150 + "/minute", "fixed", r"'9{40}\.\.\.' allows more than"),
        ("5/minute burst " + "9" * 150, "fixed", "allows more than"),
        ("9" * 400 + "/minute", "fixed", r"'9{40}\.\.\.' has 407 characters"),
        ("9" * 5000 + "/minute", "fixed", "has 5007 characters"),
        ("5/minute burst " + "9" * 5000, "fixed", "has 5015 characters"),
        ("5 per " + "9" * 400 + " years", "fixed", "has 412 characters"),
        ("5 per 102 years", "fixed", "'5 per 102 years' has a window of more than a hundred years"),
        ("5 per 1000000 weeks of tokens", "sliding", "has a window of more than a hundred years"),
        ("5 per " + "9" * 150 + " seconds burst 9", "fixed", "has a window of more than a hundred years"),
        (RateLimitItemPerHour(10**5000), "fixed", "allows more than 9007199254740991"),
        (RateLimitItemPerHour(5, 10**400), "fixed", "longer than can be counted"),
        (RateLimitItemPerHour(5, 10**5000), "fixed", "longer than can be counted"),
        (RateLimitItemPerHour(5, 10**100), "fixed", "has a window of more than a hundred years"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else None,
)
def test_refuses_the_rest_with_the_mend(text: object, strategy: str, mend: str) -> None:
    """An unknown limit is an error at import and never an unlimited route (S2.30)."""
    with pytest.raises(ConfigurationError, match=mend):
        parse_limit(text, strategy)  # type: ignore[arg-type]

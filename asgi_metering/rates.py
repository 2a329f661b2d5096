"""
Rate limits as people write them: the grammar of `limits` ("60/minute"), and ours on top ("... of tokens", "... burst
50", weeks).

Values only: what is allowed, per how long, of what. Knows nothing of counting.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias

from asgi_metering.amounts import MAX_AMOUNT
from asgi_metering.errors import ConfigurationError
from asgi_metering.names import check_name

if TYPE_CHECKING:
    from limits import RateLimitItem

__all__ = ["BUCKET", "MAX_MOVING", "RateLimit", "Strategy", "is_item", "parse_limit", "parse_limits"]

Strategy: TypeAlias = Literal["fixed", "calendar", "sliding", "moving"]
STRATEGIES: tuple[Strategy, ...] = ("fixed", "calendar", "sliding", "moving")
"""How a window moves: from the first hit, with the calendar, as two weighted neighbours, or with every single call."""

BUCKET: Final = "bucket"
"""The strategy of a limit with a burst, whatever was asked for the others beside it."""

METERS = ("requests", "tokens", "input_tokens", "output_tokens")
"""What a limit can count. All but requests are taken by estimate and corrected by the usage."""

MAX_MOVING: Final = 5_000
"""
The most that a moving log may allow. It keeps the time of every call, and is read and written whole with the batch that
touches it: 8 bytes a call on Redis, 16 elsewhere, so 40 to 80 kB for each key that is counted.
"""

MAX_TEXT: Final = 200
"""Characters of one limit: those of the longest that says anything are fewer, and more are read for ever, or not."""

MAX_WINDOW_S: Final = 100 * 366 * 86_400.0
"""
The longest window, a century: nobody waits for the end of a longer one, whose count no store would ever forget. Times
that far ahead are exact to a fraction of a millisecond, and dates for every store.
"""

_SHOWN = 40
"""Characters of a limit that is too long, or of a number in it, that an error repeats."""

_TAIL = re.compile(
    r"^(?P<limit>.+?)\s+(?:of\s+(?P<meter>[A-Za-z_][A-Za-z0-9_]*)|burst\s+(?P<burst>[0-9]+))\s*$", re.IGNORECASE
)
_WEEKS = re.compile(r"^\s*([0-9]+)\s*(?:/|\s*per\s*)\s*([0-9]+)?\s*weeks?\s*$", re.IGNORECASE)
_SEPARATORS = re.compile(r"[,;|]")
"""Those of `limits.parse_many`."""

_NO_WINDOW = re.compile(r"(?:/|\bper\b)\s*0+\s*[a-z]", re.IGNORECASE)
_CALENDAR_PERIODS = ("minute", "hour", "day", "week", "month", "year")
_WEEK_S: Final = 7 * 86_400.0


@dataclass(frozen=True, slots=True)
class RateLimit:
    """
    One limit.

    Attributes:
        text: As it was written.
        name: Names it in answers: ``60-per-minute``, ``200000-tokens-per-minute``, ``10-per-second-burst-50``.
        amount: How many per window.
        window_s: The window's length in seconds; a month counts as 30 days unless the calendar says.
        meter: What is counted: ``requests``, or what stands after "of".
        strategy: One of `STRATEGIES`, or ``bucket`` for a limit with a burst.
        period: ``minute`` to ``year`` for a calendar window, else empty.
        zone: IANA zone of a calendar window.
        burst: What a token bucket holds; 0 for all others.
    """

    text: str
    name: str
    amount: int
    window_s: float
    meter: str
    strategy: str
    period: str
    zone: str
    burst: int = 0


class _Window(NamedTuple):
    amount: int
    multiples: int
    granularity: str
    window_s: float


def parse_limits(text: str | RateLimitItem, strategy: Strategy = "fixed", zone: str = "UTC") -> tuple[RateLimit, ...]:
    """
    Read one limit or several: ``"10/minute; 100/hour"``, divided as `limits.parse_many` does, by any of ``,;|``.

    Arguments and errors as of `parse_limit`.
    """
    if not isinstance(text, str):
        return (parse_limit(text, strategy, zone),)
    return tuple(parse_limit(each.strip(), strategy, zone) for each in _SEPARATORS.split(text))


def parse_limit(text: str | RateLimitItem, strategy: Strategy = "fixed", zone: str = "UTC") -> RateLimit:
    """
    Read one limit.

    Args:
        text: ``"60/minute"``, ``"5 per 2 hours"``, ``"100/week"``; ``"200000/minute of tokens"`` counts what calls use;
            ``"10/second burst 50"`` is a token bucket, which holds 50 and gets 10 back each second, whatever the
            *strategy*. Or an item of `limits`, say ``limits.RateLimitItemPerMinute(60)``.
        strategy: ``"fixed"`` begins at the first hit; ``"calendar"`` with the minute, hour, day, week (on Monday),
            month or year; ``"sliding"`` weighs the window before by the share of it that still counts; ``"moving"``
            remembers every call, of requests at a cost of 1, up to `MAX_MOVING`.
        zone: Where the calendar's windows begin.

    Raises:
        ConfigurationError: The text is not in the grammar, is several limits, or its strategy cannot be had; it allows
            more than stores count, or in a window longer than `MAX_WINDOW_S`.
    """
    if strategy not in STRATEGIES:
        raise ConfigurationError(f"The strategy {strategy!r} is not known. Use one of {', '.join(STRATEGIES)}.")
    meter, burst = "requests", 0
    if isinstance(text, str):
        if len(text) > MAX_TEXT:
            raise ConfigurationError(
                f"The limit '{text[:_SHOWN]}...' has {len(text)} characters, more than any limit needs. Write "
                f"'60/minute', say."
            )
        limit, meter, burst = _tails(text)
        window = _parse(limit, text)
    else:
        text, window = _of_item(text)
    if meter not in METERS:
        raise ConfigurationError(f"The limit {text!r} counts {meter!r}. Use one of {', '.join(METERS)}.")
    if window.amount + burst > MAX_AMOUNT:
        raise ConfigurationError(
            f"The limit {_shown(text)} allows more than {MAX_AMOUNT}, up to which stores count exactly. Lower it."
        )
    if window.window_s > MAX_WINDOW_S:
        raise ConfigurationError(
            f"The limit {_shown(text)} has a window of more than a hundred years, which no store keeps a count for. "
            f"Write '60/year' at most, or forbid it in another way."
        )
    if burst:
        _check_bucket(text, window)
    elif strategy == "moving":
        _check_moving(text, window, meter)
    elif strategy == "calendar" and (window.granularity not in _CALENDAR_PERIODS or window.multiples != 1):
        raise ConfigurationError(
            f"The limit {text!r} cannot follow the calendar. Calendar windows are one {', '.join(_CALENDAR_PERIODS)}; "
            f"use the strategy 'fixed' or 'sliding' for others."
        )
    kind = BUCKET if burst else strategy
    period = window.granularity if kind == "calendar" else ""
    return RateLimit(
        text, _name(window, meter, burst), window.amount, window.window_s, meter, kind, period, zone, burst
    )


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")


def _name(window: _Window, meter: str, burst: int) -> str:
    span = window.granularity if window.multiples == 1 else f"{window.multiples}-{window.granularity}"
    counted = "" if meter == "requests" else f"{meter}-"
    holds = f"-burst-{burst}" if burst else ""
    return check_name(f"{window.amount}-{counted}per-{span}{holds}", "limit name")


def _tails(text: str) -> tuple[str, str, int]:
    """What stands before "of" and "burst" in either order, and after each."""
    limit, found = text, {"meter": "", "burst": ""}
    while tail := _TAIL.match(limit):
        limit = tail["limit"]
        for name in found:
            if tail[name] and found[name]:
                raise ConfigurationError(f"The limit {text!r} says twice what it counts, or holds. Say it once.")
            found[name] = tail[name] or found[name]
    # A burst of nothing is one all the same, and no other limit.
    if found["burst"] and not int(found["burst"]):
        raise ConfigurationError(f"The limit {text!r} is a bucket that holds nothing. Write 'burst 1' at least.")
    return limit, found["meter"].lower() or "requests", int(found["burst"] or 0)


def _check_bucket(text: str, window: _Window) -> None:
    if not window.amount:
        raise ConfigurationError(f"The limit {text!r} is a bucket into which nothing flows back. Write 1 at least.")


def _check_moving(text: str, window: _Window, meter: str) -> None:
    if meter != "requests":
        raise ConfigurationError(
            f"The limit {text!r} counts {meter}, and a moving window counts calls, one by one. Use the strategy "
            f"'sliding', or a bucket: '... burst N of {meter}'."
        )
    if window.amount > MAX_MOVING:
        raise ConfigurationError(
            f"The limit {text!r} is above {MAX_MOVING}, the most that a moving window, which remembers every call, may "
            f"allow. Use the strategy 'sliding'."
        )


def is_item(value: object) -> bool:
    """Whether *value* is a limit as an item of the `limits` package."""
    from limits import RateLimitItem

    return isinstance(value, RateLimitItem)


def _of_item(item: Any) -> tuple[str, _Window]:
    if not is_item(item):
        raise ConfigurationError(
            f"The limit {item!r} is neither a str nor an item of the limits package. Write it as '60/minute'."
        )
    if type(item.amount) is int and item.amount > MAX_AMOUNT:
        # Not shown: it may have more digits than Python turns into text.
        raise ConfigurationError(
            f"The limit of a {type(item).__name__} allows more than {MAX_AMOUNT}, up to which stores count exactly. "
            f"Lower it."
        )
    try:
        text, window_s = str(item), float(item.get_expiry())
    except (ValueError, OverflowError):
        raise ConfigurationError(
            f"The window of a {type(item).__name__} is longer than can be counted. Write '60/year' at most, say."
        ) from None
    if type(item.amount) is not int or item.amount < 0 or not 0 < window_s < float("inf"):
        raise ConfigurationError(f"The limit {text!r} allows no number in a time. Write '60/minute', say.")
    return text, _Window(item.amount, item.multiples, item.GRANULARITY.name, window_s)


def _parse(limit: str, text: str) -> _Window:
    if _NO_WINDOW.search(limit):
        # `limits` takes it for one.
        raise ConfigurationError(f"The limit {text!r} has a window of no length. Write '60/minute', say.")
    weeks = _WEEKS.match(limit)
    if weeks is not None:
        multiples = int(weeks[2] or 1)
        return _Window(int(weeks[1]), multiples, "week", multiples * _WEEK_S)
    # Only here, so that importing the package does not import the storages of `limits`.
    from limits import parse_many

    try:
        (item,) = parse_many(limit)
    except ValueError:
        raise ConfigurationError(
            f"The limit {text!r} is not in the grammar. Write one limit as '60/minute', '5 per 2 hours', "
            f"'200000/minute of tokens' or '10/second burst 50', and several as several arguments."
        ) from None
    return _Window(item.amount, item.multiples, item.GRANULARITY.name, float(item.get_expiry()))

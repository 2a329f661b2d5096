"""
Readers of the values that providers put into quota headers.

Knows every format in which a provider writes a moment, a wait, a count or a share. Never knows which header
a value came from, never asks a clock (*now* is passed in), and never raises: what cannot be read is `None`,
which means unknown, never zero (S1.37 to S1.39).
"""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime
from decimal import Decimal
from email.utils import parsedate_to_datetime

__all__ = [
    "MAX_VALUE_LENGTH",
    "MAX_WAIT_S",
    "decode_value",
    "parse_count",
    "parse_duration_s",
    "parse_fraction",
    "parse_milliseconds",
    "parse_reset_at",
    "parse_state",
    "parse_wait_s",
]

MAX_VALUE_LENGTH = 64
"""Characters of a value: the longest form in use, an RFC 850 date, has 33. More is not a number of ours."""

MAX_WAIT_S = 400 * 86_400.0
"""Seconds that a wait or a reset may lie ahead: a year's window with slack. What is further away is cut to this."""

_MAX_COUNT = 2**53 - 1  # What every store and every JSON reader can still keep exactly.
_MAX_FRACTION = Decimal(1000)  # Overuse of a shared pool can pass 1; a thousand times of it is no measurement.

_MOMENT = re.compile(r"\d{4}-\d\d-\d\d(?:[Tt ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?(?:[Zz]|[+-]\d\d:?\d\d)?)?", re.ASCII)
_DURATION = re.compile(r"(?:[0-9]+(?:\.[0-9]+)?(?:ns|us|µs|μs|ms|s|m|h))+")
_DURATION_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ns|us|µs|μs|ms|s|m|h)")
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]{1,3})?")
_COUNT = re.compile(r"(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)(?:\.0+)?")
_HTTP_DATE = re.compile(r"(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)[a-z]*,? ", re.IGNORECASE)
_STATE = re.compile(r"[a-z0-9_]{1,64}")

_UNIT_S = {
    "ns": Decimal("1e-9"),
    "us": Decimal("1e-6"),
    "µs": Decimal("1e-6"),
    "μs": Decimal("1e-6"),
    "ms": Decimal("1e-3"),
    "s": Decimal(1),
    "m": Decimal(60),
    "h": Decimal(3600),
}

_EPOCH_MS_ABOVE = 1e12
_EPOCH_S_ABOVE = 1e9


def decode_value(value: bytes) -> str:
    """Return *value* as text without outer blanks, or ``""`` when it is longer than `MAX_VALUE_LENGTH` bytes."""
    if len(value) > MAX_VALUE_LENGTH:
        return ""
    try:
        return value.decode().strip()
    except UnicodeDecodeError:
        return value.decode("latin-1").strip()


def parse_count(text: str) -> int | None:
    """
    Read a whole number of units: ``30000``, ``30,000`` (written so by some proxies) or ``30000.0``.

    Negative numbers (some providers say "no limit" with -1), fractions and anything above 2^53 - 1 are unknown.
    """
    if not _COUNT.fullmatch(text):
        return None
    count = int(text.partition(".")[0].replace(",", ""))
    return count if count <= _MAX_COUNT else None


def parse_duration_s(text: str) -> float | None:
    """
    Read a Go or protobuf duration (``6m0s``, ``2m59.56s``, ``20ms``, ``26s``) as seconds, at most `MAX_WAIT_S`.

    Source: OpenAI and Groq rate-limit guides; Gemini ``RetryInfo.retryDelay``; S1.38.
    """
    if not _DURATION.fullmatch(text):
        return None
    seconds = sum(Decimal(number) * _UNIT_S[unit] for number, unit in _DURATION_PART.findall(text))
    return min(float(seconds), MAX_WAIT_S)


def parse_fraction(text: str) -> Decimal | None:
    """Read a spent share such as ``0.42``; above 1 is overuse and stays, above 1000 is unknown."""
    if not _NUMBER.fullmatch(text):
        return None
    share = Decimal(text)
    return share if share <= _MAX_FRACTION else None


def parse_milliseconds(text: str) -> float | None:
    """Read ``retry-after-ms`` (Azure, OpenAI) as seconds, at most `MAX_WAIT_S`."""
    number = _number(text)
    return None if number is None else min(number / 1000, MAX_WAIT_S)


def parse_reset_at(text: str, now: float) -> float | None:
    """
    Read the moment at which a quota returns, as epoch seconds.

    Order: RFC 3339 (naive is UTC), Go duration, a plain number (above 1e12 epoch milliseconds, above 1e9 epoch
    seconds, else seconds from *now*), HTTP-date. Zero seconds is *now*; a negative or garbled value is unknown;
    a moment in the past stays as it is; one further away than `MAX_WAIT_S` is cut to that (S1.37, S1.38).
    """
    delta, moment = _read_time(text)
    if delta is not None:
        return now + delta
    if moment is None or moment < 0:
        return None
    return min(moment, now + MAX_WAIT_S)


def parse_state(text: str) -> str | None:
    """Read a state word such as ``allowed_warning``; what is not a short lower-case word is unknown."""
    return text if _STATE.fullmatch(text) else None


def parse_wait_s(text: str, now: float) -> float | None:
    """
    Read ``Retry-After`` as seconds from *now*, 0 to `MAX_WAIT_S`; a moment in the past is 0.

    Takes delta seconds, also fractional ones, and the three forms of an HTTP-date (RFC 9110, 10.2.3), and
    whatever `parse_reset_at` takes, because an epoch was seen there too.
    """
    delta, moment = _read_time(text)
    if delta is not None:
        return delta
    return None if moment is None else max(0.0, min(moment - now, MAX_WAIT_S))


def _read_time(text: str) -> tuple[float | None, float | None]:
    """Return (seconds from now, None) or (None, epoch seconds) or (None, None)."""
    if _MOMENT.fullmatch(text):
        return None, _rfc3339(text)
    duration = parse_duration_s(text)
    if duration is not None:
        return duration, None
    number = _number(text)
    if number is None:
        return None, _http_date(text)
    if number > _EPOCH_MS_ABOVE:
        return None, number / 1000
    if number > _EPOCH_S_ABOVE:
        return None, number
    return min(number, MAX_WAIT_S), None


def _number(text: str) -> float | None:
    """Return a finite number that is not negative; the pattern alone refuses signs, inf and nan."""
    if not _NUMBER.fullmatch(text):
        return None
    number = float(text)
    return number if math.isfinite(number) else None


def _rfc3339(text: str) -> float | None:
    try:
        return _timestamp(datetime.fromisoformat(text.upper()))
    except ValueError:
        return None


def _http_date(text: str) -> float | None:
    # The library's parser also takes much that is no date at all; every HTTP-date begins with a day's name.
    if not _HTTP_DATE.match(text):
        return None
    try:
        return _timestamp(parsedate_to_datetime(text))
    except (ValueError, OverflowError):
        return None


def _timestamp(moment: datetime) -> float:
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()

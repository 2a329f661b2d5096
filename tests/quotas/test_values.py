"""The formats in which providers write moments, waits, counts and shares."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_metering.quotas.values import (
    MAX_VALUE_LENGTH,
    MAX_WAIT_S,
    decode_value,
    parse_count,
    parse_duration_s,
    parse_fraction,
    parse_milliseconds,
    parse_reset_at,
    parse_state,
    parse_wait_s,
)

NOW = 1795219200.0
"""2026-11-21T00:00:00Z."""

DURATIONS = [
    ("1s", 1.0),
    ("6m0s", 360.0),
    ("20ms", 0.02),
    ("2m59.56s", 179.56),
    ("7.66s", 7.66),
    ("1h2m3s", 3723.0),
    ("9m38.016s", 578.016),
    ("120ms", 0.12),
    ("12ms", 0.012),
    ("1h30m", 5400.0),
    ("59s", 59.0),
    ("1.5s", 1.5),
    ("26s", 26.0),
    ("0.5s", 0.5),
    ("0s", 0.0),
    ("500us", 0.0005),
    ("500µs", 0.0005),
    ("500μs", 0.0005),
    ("1500ns", 0.0000015),
    ("99999999999h", MAX_WAIT_S),
]


@pytest.mark.parametrize(("text", "seconds"), DURATIONS)
def test_parse_duration_reads_every_go_and_protobuf_form(text: str, seconds: float) -> None:
    """Each vector of the reference's section 1 comes out exactly; minutes are not taken for milliseconds."""
    assert parse_duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "1", "-1s", "1s ", "1d", "1s2", "1.s", ".5s", "inf s", "infs", "1s\n"])
def test_parse_duration_refuses_what_is_none(text: str) -> None:
    """A duration is the whole string or nothing."""
    assert parse_duration_s(text) is None


@pytest.mark.parametrize(
    ("text", "reset_at"),
    [
        *((text, NOW + seconds) for text, seconds in DURATIONS),
        ("30", NOW + 30),
        ("59", NOW + 59),
        ("0", NOW),
        ("33011.382867097855", NOW + 33011.382867097855),
        ("11.382867097854614", NOW + 11.382867097854614),
        ("1.1e-05", NOW + 0.000011),
        ("2025-08-21T12:40:59Z", 1755780059.0),
        ("2025-08-21t12:40:59z", 1755780059.0),
        ("2025-08-21T12:40:59.5Z", 1755780059.5),
        ("2025-08-21T12:40:59.123456789Z", 1755780059.123456),
        ("2025-08-21T14:40:59+02:00", 1755780059.0),
        ("2025-08-21 12:40:59", 1755780059.0),
        ("2025-08-21", 1755734400.0),
        ("1776649200", 1776649200.0),
        ("1788220800000", 1788220800.0),
        ("1795301633.5077965", 1795301633.5077965),
        ("1372700873", 1372700873.0),
        ("1000000000", NOW + MAX_WAIT_S),
        ("1000000001", 1000000001.0),
        ("1000000000000", NOW + MAX_WAIT_S),
        ("1000000000001", 1000000000.001),
        ("Sat, 21 Nov 2026 00:02:00 GMT", NOW + 120),
        ("9999-12-31T23:59:59Z", NOW + MAX_WAIT_S),
        ("99999999", NOW + MAX_WAIT_S),
        ("99999999999999999999", NOW + MAX_WAIT_S),
    ],
)
def test_parse_reset_reads_every_form(text: str, reset_at: float) -> None:
    """Zero is now, epochs are never added to now, and what lies absurdly far ahead is cut (S1.37, S1.38)."""
    assert parse_reset_at(text, NOW) == reset_at


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-5",
        "-1s",
        "+5",
        "inf",
        "nan",
        "Infinity",
        "1e400",
        "soon",
        "1_000",
        "1,000",
        "20250821T12",
        "2025-13-01T00:00:00Z",
        "2025-08-21T25:00:00Z",
        "2025-08-21T12:40:59+99:00",
        "1969-12-31T23:59:59Z",
        "Fri, 32 Nov 2026 00:00:00 GMT",
        "Sun, 06 Nov 1994 08:49:2222222237 GMT",
        "Monday",
        "٣٠",
        "30\n30",
    ],
)
def test_parse_reset_leaves_garbage_unknown(text: str) -> None:
    """Negative, empty, infinite and garbled values become None, never zero and never an exception (S1.37, S1.39)."""
    assert parse_reset_at(text, NOW) is None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("120", 120.0),
        ("0", 0.0),
        ("1.5", 1.5),
        ("Sat, 21 Nov 2026 00:02:00 GMT", 120.0),
        ("Saturday, 21-Nov-26 00:02:00 GMT", 120.0),
        ("Sat Nov 21 00:02:00 2026", 120.0),
        ("Sat, 21 Nov 2026 00:00:00 GMT", 0.0),
        ("Fri, 20 Nov 2026 00:00:00 GMT", 0.0),
        ("Sun Nov  6 08:49:37 1994", 0.0),
        ("2s", 2.0),
        ("1795219260", 60.0),
        ("2026-11-21T00:01:00Z", 60.0),
        ("999999999", MAX_WAIT_S),
        ("Sat, 21 Nov 2099 00:00:00 GMT", MAX_WAIT_S),
    ],
)
def test_parse_wait_reads_seconds_and_dates(text: str, seconds: float) -> None:
    """The vectors of RFC 9110, 10.2.3, in all three date forms, and the deviations seen in the wild (S1.36)."""
    assert parse_wait_s(text, NOW) == seconds


@pytest.mark.parametrize("text", ["-5", "inf", "nan", "soon", "", "1 2 3", "0x10"])
def test_parse_wait_leaves_garbage_unknown(text: str) -> None:
    """A wait that cannot be read is ignored, as RFC 9110 wants it."""
    assert parse_wait_s(text, NOW) is None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1500", 1.5), ("0", 0.0), ("12.5", 0.0125), ("1e30", MAX_WAIT_S), ("-1", None), ("1s", None), ("", None)],
)
def test_parse_milliseconds_reads_a_bare_number(text: str, seconds: float | None) -> None:
    """The header retry-after-ms holds milliseconds without a unit."""
    assert parse_milliseconds(text) == seconds


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("30000", 30000),
        ("30,000", 30000),
        ("1,000,000", 1000000),
        ("5000.0", 5000),
        ("1000000000", 1000000000),
        (str(2**53 - 1), 2**53 - 1),
        (str(2**53), None),
        ("9" * 60, None),
        ("-1", None),
        ("0.5", None),
        ("30,00", None),
        ("60, 60;w=60", None),
        ("unlimited", None),
        ("", None),
        ("1e3", None),
        ("٣", None),
    ],
)
def test_parse_count_reads_whole_numbers_only(text: str, count: int | None) -> None:
    """Thousands separators are understood; -1, fractions and numbers that no store keeps exactly are unknown."""
    assert parse_count(text) == count


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("0.42", Decimal("0.42")),
        ("0", Decimal(0)),
        ("1.02", Decimal("1.02")),
        ("1000", Decimal(1000)),
        ("1001", None),
        ("1e999", None),
        ("-0.1", None),
        ("nan", None),
        ("42%", None),
    ],
)
def test_parse_fraction_keeps_the_decimal_exactly(text: str, share: Decimal | None) -> None:
    """A spent share is a Decimal, may pass 1, and is unknown when absurd."""
    assert parse_fraction(text) == share


@pytest.mark.parametrize(
    ("text", "state"),
    [
        ("allowed_warning", "allowed_warning"),
        ("rejected", "rejected"),
        ("<script>", None),
        ("", None),
        ("a" * 65, None),
    ],
)
def test_parse_state_takes_plain_words_only(text: str, state: str | None) -> None:
    """Nothing that could harm a page or a log gets through as a state."""
    assert parse_state(text) == state


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (b" 12 ", "12"),
        ("1µs".encode(), "1µs"),
        ("1µs".encode("latin-1"), "1µs"),
        (b"1" * MAX_VALUE_LENGTH, "1" * MAX_VALUE_LENGTH),
        (b"1" * (MAX_VALUE_LENGTH + 1), ""),
    ],
)
def test_decode_value_bounds_and_decodes(value: bytes, text: str) -> None:
    """A micro sign is read in both encodings; an overlong value is nothing."""
    assert decode_value(value) == text


@given(st.text(max_size=80), st.floats(min_value=0, max_value=4e9))
def test_parsers_never_raise(text: str, now: float) -> None:
    """Whatever text comes, each parser answers a value within its bounds or None (S1.39)."""
    wait, reset_at = parse_wait_s(text, now), parse_reset_at(text, now)
    assert wait is None or 0 <= wait <= MAX_WAIT_S
    assert reset_at is None or 0 <= reset_at <= now + MAX_WAIT_S
    assert (parse_milliseconds(text) or 0) >= 0
    assert (parse_count(text) or 0) >= 0
    assert (parse_fraction(text) or 0) >= 0
    parse_state(text)


@pytest.mark.uncounted
@given(st.from_regex(r"(Mon|Sunday|Sat), [0-9A-Za-z:+ -]{0,40}", fullmatch=True))
def test_parse_wait_never_raises_on_near_dates(text: str) -> None:
    """What begins like a date and goes on as junk is ignored, whatever the library's date parser makes of it."""
    wait = parse_wait_s(text, NOW)
    assert wait is None or 0 <= wait <= MAX_WAIT_S


@given(st.integers(min_value=0, max_value=10**7), st.integers(min_value=0, max_value=999))
def test_parse_duration_agrees_with_its_parts(seconds: int, milliseconds: int) -> None:
    """A duration written in hours, minutes, seconds and milliseconds is the sum of them."""
    hours, rest = divmod(seconds, 3600)
    text = f"{hours}h{rest // 60}m{rest % 60}s{milliseconds}ms"
    assert parse_duration_s(text) == min(float(Decimal(seconds) + Decimal(milliseconds) / 1000), MAX_WAIT_S)

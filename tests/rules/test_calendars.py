"""Calendars: where minutes, hours, days, weeks, months and years begin, in UTC and in zones whose days are odd."""

from __future__ import annotations

from calendar import monthrange
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_metering.errors import ConfigurationError
from asgi_metering.rules.calendars import Period, around, boundaries, boundaries_until, pick, zone

MINUTE, HOUR, DAY, WEEK, MONTH, YEAR = Period
DATED = (DAY, WEEK, MONTH, YEAR)

ZONES = [
    "UTC",
    "Europe/Berlin",
    "America/New_York",
    "America/St_Johns",
    "America/Sao_Paulo",
    "America/Havana",
    "Africa/Cairo",
    "Asia/Beirut",
    "Asia/Kolkata",
    "Asia/Gaza",
    "Australia/Lord_Howe",
    "Pacific/Apia",
    "Pacific/Kiritimati",
    "Pacific/Marquesas",
    "Pacific/Pago_Pago",
]


def epoch(*parts: int) -> float:
    """Epoch seconds of a UTC time."""
    return datetime(*parts, tzinfo=UTC).timestamp()  # type: ignore[misc,arg-type]


def local(instant: float, name: str) -> datetime:
    """What clocks in a zone show."""
    return datetime.fromtimestamp(instant, ZoneInfo(name))


# -- UTC -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("now", "edges"),
    [
        (epoch(2024, 2, 29, 12), [(2024, 2, 28), (2024, 2, 29), (2024, 3, 1), (2024, 3, 2)]),
        (epoch(2023, 2, 28, 23, 59, 59), [(2023, 2, 27), (2023, 2, 28), (2023, 3, 1), (2023, 3, 2)]),
        (epoch(2023, 12, 31), [(2023, 12, 30), (2023, 12, 31), (2024, 1, 1), (2024, 1, 2)]),
        (epoch(2024, 1, 1), [(2023, 12, 31), (2024, 1, 1), (2024, 1, 2), (2024, 1, 3)]),
        (epoch(1970, 1, 1), [(1969, 12, 31), (1970, 1, 1), (1970, 1, 2), (1970, 1, 3)]),
    ],
)
def test_bound_utc_days(now: float, edges: list[tuple[int, int, int]]) -> None:
    """UTC days begin at midnight, over the ends of months and years and over leap days (S0.5)."""
    assert boundaries(DAY, "UTC", now) == tuple(epoch(*edge) for edge in edges)


@pytest.mark.parametrize(
    ("now", "edges"),
    [
        (epoch(2024, 2, 15), [(2024, 1, 1), (2024, 2, 1), (2024, 3, 1), (2024, 4, 1)]),
        (epoch(2023, 12, 31, 23, 59, 59), [(2023, 11, 1), (2023, 12, 1), (2024, 1, 1), (2024, 2, 1)]),
        (epoch(2024, 1, 1), [(2023, 12, 1), (2024, 1, 1), (2024, 2, 1), (2024, 3, 1)]),
        (epoch(2023, 11, 30), [(2023, 10, 1), (2023, 11, 1), (2023, 12, 1), (2024, 1, 1)]),
    ],
)
def test_bound_utc_months(now: float, edges: list[tuple[int, int, int]]) -> None:
    """UTC months begin on their first day, over the ends of years, whatever their lengths (S4.13)."""
    assert boundaries(MONTH, "UTC", now) == tuple(epoch(*edge) for edge in edges)


@pytest.mark.parametrize(
    ("now", "edges"),
    [
        (epoch(2024, 2, 29, 12), [(2024, 2, 19), (2024, 2, 26), (2024, 3, 4), (2024, 3, 11)]),
        (epoch(2024, 2, 26), [(2024, 2, 19), (2024, 2, 26), (2024, 3, 4), (2024, 3, 11)]),
        (epoch(2024, 3, 3, 23, 59, 59), [(2024, 2, 19), (2024, 2, 26), (2024, 3, 4), (2024, 3, 11)]),
        (epoch(2025, 1, 1), [(2024, 12, 23), (2024, 12, 30), (2025, 1, 6), (2025, 1, 13)]),
    ],
)
def test_bound_weeks_by_mondays(now: float, edges: list[tuple[int, int, int]]) -> None:
    """Weeks begin on Mondays, over the ends of months and years (ISO 8601)."""
    assert boundaries(WEEK, "UTC", now) == tuple(epoch(*edge) for edge in edges)


@pytest.mark.parametrize(
    ("anchor", "now", "edges"),
    [
        (15, epoch(2024, 3, 14, 23, 59, 59), [(2024, 1, 15), (2024, 2, 15), (2024, 3, 15), (2024, 4, 15)]),
        (15, epoch(2024, 3, 15), [(2024, 2, 15), (2024, 3, 15), (2024, 4, 15), (2024, 5, 15)]),
        (15, epoch(2024, 1, 1), [(2023, 11, 15), (2023, 12, 15), (2024, 1, 15), (2024, 2, 15)]),
        (31, epoch(2024, 2, 28), [(2023, 12, 31), (2024, 1, 31), (2024, 2, 29), (2024, 3, 31)]),
        (31, epoch(2024, 2, 29), [(2024, 1, 31), (2024, 2, 29), (2024, 3, 31), (2024, 4, 30)]),
        (30, epoch(2023, 3, 1), [(2023, 1, 30), (2023, 2, 28), (2023, 3, 30), (2023, 4, 30)]),
        (31, epoch(2024, 12, 31), [(2024, 11, 30), (2024, 12, 31), (2025, 1, 31), (2025, 2, 28)]),
    ],
)
def test_bound_months_by_a_billing_day(anchor: int, now: float, edges: list[tuple[int, int, int]]) -> None:
    """Anchored months begin on their day, a shorter month on its last: the day comes back in the next long one."""
    assert boundaries(MONTH, "UTC", now, anchor) == tuple(epoch(*edge) for edge in edges)


# -- zones ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "day", "hours"),
    [
        ("Europe/Berlin", (2024, 3, 31), 23.0),
        ("Europe/Berlin", (2024, 10, 27), 25.0),
        ("Europe/Berlin", (2024, 7, 1), 24.0),
        ("America/New_York", (2024, 3, 10), 23.0),
        ("America/New_York", (2024, 11, 3), 25.0),
        ("Australia/Lord_Howe", (2024, 10, 6), 23.5),
        ("Australia/Lord_Howe", (2024, 4, 7), 24.5),
        ("America/Sao_Paulo", (2018, 11, 4), 23.0),
        ("Africa/Cairo", (2024, 4, 26), 23.0),
        ("America/Havana", (2024, 11, 3), 25.0),
        ("Pacific/Apia", (2011, 12, 29), 24.0),
    ],
)
def test_give_each_day_its_own_length(name: str, day: tuple[int, int, int], hours: float) -> None:
    """A day is as long as it is: 23 and 25 hours where the clock is changed."""
    noon = datetime(*day, 12, tzinfo=ZoneInfo(name)).timestamp()
    window = pick(boundaries(DAY, name, noon), noon)
    assert window is not None
    start, end = window
    assert (end - start) / 3600 == hours
    assert local(start, name).date() == local(end - 1, name).date() == date(*day)


@pytest.mark.parametrize(
    ("name", "day", "begins"),
    [
        ("America/Sao_Paulo", (2018, 11, 4), (2018, 11, 4, 3)),
        ("Africa/Cairo", (2024, 4, 26), (2024, 4, 25, 22)),
        ("Asia/Beirut", (2022, 3, 27), (2022, 3, 26, 22)),
    ],
)
def test_begin_a_day_whose_midnight_does_not_exist(
    name: str, day: tuple[int, int, int], begins: tuple[int, ...]
) -> None:
    """Where the clock jumps from midnight to one, the day begins with the jump: the second before is yesterday."""
    noon = datetime(*day, 12, tzinfo=ZoneInfo(name)).timestamp()
    start = boundaries(DAY, name, noon)[1]
    assert start == epoch(*begins)
    assert local(start, name).hour == 1
    assert local(start, name).date() == date(*day)
    assert local(start - 1, name).date() == date(*day) - timedelta(days=1)


@pytest.mark.parametrize(
    ("period", "anchor", "now", "length_h"),
    [
        (WEEK, 1, (2024, 3, 27), 7 * 24 - 1),
        (WEEK, 1, (2024, 10, 27), 7 * 24 + 1),
        (MONTH, 15, (2024, 4, 1), 31 * 24 - 1),
        (MONTH, 31, (2024, 10, 1), 31 * 24 + 1),
        (MONTH, 15, (2024, 10, 20), 31 * 24 + 1),
    ],
)
def test_keep_long_windows_on_the_zones_midnights(
    period: Period, anchor: int, now: tuple[int, int, int], length_h: int
) -> None:
    """Weeks and anchored months begin at local midnight through changes of the clock, and are as long as they are."""
    name = "Europe/Berlin"
    edges = boundaries(period, name, datetime(*now, 12, tzinfo=ZoneInfo(name)).timestamp(), anchor)
    assert {local(edge, name).time() for edge in edges} == {datetime.min.time()}
    assert (edges[2] - edges[1]) / 3600 == length_h


def test_begin_a_day_with_the_first_of_its_two_midnights() -> None:
    """Where the clock goes back from one to midnight, the day begins at the first and lasts over the second."""
    first = epoch(2024, 11, 3, 4)
    assert local(first, "America/Havana") == local(first + 3600, "America/Havana").replace(fold=0)
    for now in (first, first + 3599, first + 3600, first + 7200):
        assert pick(boundaries(DAY, "America/Havana", now), now) == (first, epoch(2024, 11, 4, 5))


def test_skip_a_day_that_does_not_exist() -> None:
    """Samoa crossed the date line and had no 30 December 2011: the day after the 29th is the 31st."""
    crossing = epoch(2011, 12, 30, 10)
    for now in (crossing - 1, crossing - DAY_S):
        assert pick(boundaries(DAY, "Pacific/Apia", now), now) == (crossing - DAY_S, crossing)
    for now in (crossing, crossing + DAY_S - 1):
        assert pick(boundaries(DAY, "Pacific/Apia", now), now) == (crossing, crossing + DAY_S)
    assert local(crossing - 1, "Pacific/Apia").day == 29
    assert local(crossing, "Pacific/Apia").day == 31


DAY_S = 86_400.0


@pytest.mark.parametrize(("name", "offset_h"), [("Pacific/Kiritimati", 14), ("Pacific/Pago_Pago", -11)])
def test_bound_months_on_both_sides_of_the_date_line(name: str, offset_h: int) -> None:
    """A month begins 25 hours apart on the two sides of the date line."""
    now = epoch(2024, 6, 15)
    assert boundaries(MONTH, name, now)[1] == epoch(2024, 6, 1) - offset_h * 3600


def test_bound_a_month_by_the_zones_own_clock() -> None:
    """The month is the zone's: late on 31 December in UTC it is the new year in Berlin already."""
    now = epoch(2023, 12, 31, 23, 30)
    assert boundaries(MONTH, "Europe/Berlin", now)[1] == epoch(2023, 12, 31, 23)
    assert boundaries(MONTH, "UTC", now)[1] == epoch(2023, 12, 1)


@given(
    name=st.sampled_from(ZONES),
    period=st.sampled_from(DATED),
    now=st.floats(epoch(1990, 1, 1), epoch(2037, 1, 1), allow_nan=False),
    anchor=st.integers(1, 31),
)
def test_cover_the_time_they_were_asked_for(name: str, period: Period, now: float, anchor: int) -> None:
    """Boundaries ascend, cover now, and their window is exactly the zone's own day, week, month or year."""
    edges = boundaries(period, name, now, anchor)
    assert all(before <= after for before, after in pairwise(edges))
    window = pick(edges, now)
    assert window is not None
    start, end = window
    assert start <= now < end

    def same(at: float) -> date:
        """The day with which the window of an instant begins, by the zone's own calendar."""
        day = local(at, name).date()
        if period is YEAR:
            return day.replace(month=1, day=1)
        if period is WEEK:
            return day - timedelta(days=day.weekday())
        while period is MONTH and day.day != min(anchor, monthrange(day.year, day.month)[1]):
            day -= timedelta(days=1)
        return day

    assert same(start) == same(now) == same(end - 1e-3)
    assert same(start - 1e-3) < same(now) < same(end)


def utc(*edges: tuple[int, ...]) -> tuple[float, ...]:
    """Epoch seconds of UTC times."""
    return tuple(epoch(*edge) for edge in edges)


@pytest.mark.parametrize(
    ("period", "name", "now", "edges"),
    [
        (YEAR, "UTC", (2024, 2, 29), [(2023, 1, 1), (2024, 1, 1), (2025, 1, 1), (2026, 1, 1)]),
        (YEAR, "Asia/Tokyo", (2023, 12, 31, 15), [(2022, 12, 31, 15), (2023, 12, 31, 15), (2024, 12, 31, 15)]),
        (HOUR, "UTC", (2024, 1, 1), [(2023, 12, 31, 23), (2024, 1, 1), (2024, 1, 1, 1), (2024, 1, 1, 2)]),
        (HOUR, "Asia/Kolkata", (2024, 1, 1, 0, 40), [(2023, 12, 31, 23, 30), (2024, 1, 1, 0, 30), (2024, 1, 1, 1, 30)]),
        (MINUTE, "Asia/Kolkata", (2024, 1, 1, 0, 0, 59), [(2023, 12, 31, 23, 59), (2024, 1, 1), (2024, 1, 1, 0, 1)]),
    ],
)
def test_bound_years_hours_and_minutes(
    period: Period, name: str, now: tuple[int, ...], edges: list[tuple[int, ...]]
) -> None:
    """Years begin on 1 January, hours where the zone's own clock is full, minutes everywhere at once."""
    found = boundaries(period, name, epoch(*now))
    assert found[: len(edges)] == utc(*edges)


@pytest.mark.parametrize(
    ("name", "now", "edges"),
    [
        # Two in the night comes twice: two windows, each an hour long.
        ("Europe/Berlin", (2024, 10, 27, 0, 30), [(2024, 10, 26, 23), (2024, 10, 27, 0), (2024, 10, 27, 1)]),
        ("Europe/Berlin", (2024, 10, 27, 1, 30), [(2024, 10, 27, 0), (2024, 10, 27, 1), (2024, 10, 27, 2)]),
        # From one to three.
        ("Europe/Berlin", (2024, 3, 31, 0, 59), [(2024, 3, 30, 23), (2024, 3, 31, 0), (2024, 3, 31, 1)]),
        # From half past one back at two: an hour of 90 minutes.
        ("Australia/Lord_Howe", (2024, 4, 6, 15, 5), [(2024, 4, 6, 13), (2024, 4, 6, 14), (2024, 4, 6, 15, 30)]),
        ("Australia/Lord_Howe", (2024, 4, 6, 13, 30), [(2024, 4, 6, 12), (2024, 4, 6, 13), (2024, 4, 6, 14)]),
        # From two to half past two: an hour of 30 minutes, which begins with the jump.
        ("Australia/Lord_Howe", (2024, 10, 5, 15, 29), [(2024, 10, 5, 14, 30), (2024, 10, 5, 15, 30)]),
        (
            "Australia/Lord_Howe",
            (2024, 10, 5, 15, 31),
            [(2024, 10, 5, 14, 30), (2024, 10, 5, 15, 30), (2024, 10, 5, 16)],
        ),
        # From a quarter to three to a quarter to four: that one ends early, and the next is as short.
        ("Pacific/Chatham", (2024, 9, 28, 13, 30), [(2024, 9, 28, 13, 15), (2024, 9, 28, 14), (2024, 9, 28, 14, 15)]),
        ("Pacific/Chatham", (2024, 9, 28, 14, 5), [(2024, 9, 28, 13, 15), (2024, 9, 28, 14), (2024, 9, 28, 14, 15)]),
    ],
)
def test_bound_hours_where_the_clock_is_set(name: str, now: tuple[int, ...], edges: list[tuple[int, ...]]) -> None:
    """An hour that comes twice is two, one that the clock jumps into is shorter, one that it goes back into longer."""
    found = boundaries(HOUR, name, epoch(*now))
    at = found.index(epoch(*edges[0]))
    assert found[at : at + len(edges)] == utc(*edges)
    window = pick(found, epoch(*now))
    assert window is not None
    assert window[0] <= epoch(*now) < window[1]


@given(
    name=st.sampled_from(ZONES),
    period=st.sampled_from((MINUTE, HOUR)),
    now=st.one_of(
        st.floats(epoch(1990, 1, 1), epoch(2037, 1, 1)),
        st.builds(
            lambda around, off: around + off,
            st.sampled_from(utc((2024, 4, 6, 15), (2024, 10, 5, 15, 30), (2024, 10, 27, 1), (2007, 11, 4, 4, 1))),
            st.floats(-8_000, 8_000),
        ),
    ),
)
def test_begin_hours_and_minutes_whenever_the_clock_is_full(name: str, period: Period, now: float) -> None:
    """In no window of the clock is it full once more, and each begins when it is, or jumps over that."""
    edges = boundaries(period, name, now)
    assert list(edges) == sorted(set(edges))
    assert edges[1] <= now < edges[2]
    step = 60 if period is HOUR else 1

    def is_full(at: float) -> bool:
        shown = local(at, name)
        return not (shown.second or (period is HOUR and shown.minute))

    for start, end in pairwise(edges):
        jumped = local(start, name).replace(tzinfo=None) - local(start - 1, name).replace(tzinfo=None)
        assert is_full(start) or jumped > timedelta(seconds=1)
        assert not any(is_full(at) for at in range(int(start) + step, int(end), step))


# Around the days that they skipped when the date line moved, these two have one boundary less to be off by.
STEADY = [name for name in ZONES if name not in ("Pacific/Apia", "Pacific/Kiritimati")]


@given(
    name=st.sampled_from(STEADY), now=st.floats(epoch(1990, 1, 1), epoch(2037, 1, 1)), off=st.floats(-80_000, 80_000)
)
def test_agree_with_a_caller_whose_clock_is_off(name: str, now: float, off: float) -> None:
    """A caller whose clock is most of a day off sends boundaries in which the store finds the same window."""
    theirs, ours = boundaries(DAY, name, now + off), boundaries(DAY, name, now)
    assert pick(theirs, now) == pick(ours, now)


# -- zones by name -------------------------------------------------------------------------------------------


def test_know_utc_without_zone_files() -> None:
    """UTC is known everywhere; others are the machine's."""
    assert zone("UTC") is UTC
    assert zone("Europe/Berlin") == ZoneInfo("Europe/Berlin")


@pytest.mark.parametrize(
    "name", ["", "Mars/Olympus", "../etc/passwd", "America", "Europe/Berlin\x00", "/etc/localtime"]
)
def test_refuse_an_unknown_zone(name: str) -> None:
    """A zone that the machine does not know is an error of configuration that names it and the mend."""
    with pytest.raises(ConfigurationError, match=r"is not known here\. Use an IANA name") as caught:
        zone(name)
    assert repr(name) in str(caught.value)
    with pytest.raises(ConfigurationError):
        boundaries(DAY, name, 0.0)


# -- picking -------------------------------------------------------------------------------------------------

EDGES = (10.0, 20.0, 30.0, 40.0)


@pytest.mark.parametrize(
    ("now", "window"),
    [
        (9.999, None),
        (10.0, (10.0, 20.0)),
        (19.999, (10.0, 20.0)),
        (20.0, (20.0, 30.0)),
        (39.999, (30.0, 40.0)),
        (40.0, None),
        (1e9, None),
    ],
)
def test_pick_the_window_that_begins_now(now: float, window: tuple[float, float] | None) -> None:
    """A window holds its first instant and not its last; outside all of them there is none."""
    assert pick(EDGES, now) == window


def test_pick_nothing_from_nothing() -> None:
    """Without boundaries there is no window."""
    assert pick((), 5.0) is None


def test_pick_no_window_without_length() -> None:
    """Where two boundaries fall together, as around a skipped day, the window between them is never picked."""
    assert pick((10.0, 20.0, 20.0, 30.0), 20.0) == (20.0, 30.0)
    assert pick((10.0, 20.0, 20.0, 30.0), 19.0) == (10.0, 20.0)


# -- far ahead -----------------------------------------------------------------------------------------------


@given(
    period=st.sampled_from(DATED),
    name=st.sampled_from(ZONES),
    now=st.floats(epoch(2020, 1, 1), epoch(2030, 1, 1)),
    later=st.floats(0, 90 * 86_400),
    anchor=st.integers(1, 31),
)
def test_keep_boundaries_for_later(period: Period, name: str, now: float, later: float, anchor: int) -> None:
    """Of boundaries that were made long before, those around a time are what is made anew for that time."""
    edges = boundaries_until(period, name, now, now + later, anchor)
    assert list(edges) == sorted(set(edges))
    assert edges[:4] == boundaries(period, name, now, anchor)
    assert around(edges, now) == edges[:4]
    pinned = pick(around(edges, now + later), now + later)
    assert pinned == pick(boundaries(period, name, now + later, anchor), now + later)


def test_choose_the_nearest_boundaries_outside() -> None:
    """Where none are around a time the nearest four are answered, and what rolls has none."""
    edges = (1.0, 2.0, 3.0, 4.0, 5.0)
    assert [around(edges, now) for now in (0.0, 9.0)] == [edges[:4], edges[1:]]
    assert around((), 1.0) == ()

"""The one record of what a package still allows."""

from __future__ import annotations

import json
import logging
from decimal import Decimal

import pytest

from asgi_metering.quotas import QuotaLimit, Reading
from asgi_metering.quotas.packages import Package, read_package
from asgi_metering.quotas.status import Counted, QuotaStatus, iso_time, status_line, status_of
from tests.quotas.captures import NOW

FIELDS = """
    provider_id package_id package_type total used remaining remaining_ratio alert source confidence last_updated
    window_hours reset_at expiry_date days_until_expiry burn_per_day projected_days_left notes extras
"""


def kilo(**fields: object) -> Package:
    """A package of credits."""
    return read_package({"provider_id": "kilo", "total_credits": 25, "used_credits": 12.5, **fields}, "c")


def window(**fields: object) -> Package:
    """A window of 40 calls in 5 hours."""
    return read_package(
        {"provider_id": "acme", "package_type": "rolling_window", "limit_per_window": 40, **fields}, "w"
    )


def reading(*limits: QuotaLimit, observed_at: float = NOW - 1) -> Reading:
    """What acme's headers said a second ago."""
    return Reading(provider="acme", dialect="openai", observed_at=observed_at, limits=limits)


def test_status_has_every_field_and_is_plain_json() -> None:
    """The record of each type of package has the same fields, all of plain values (S1.1, S1.2)."""
    daily = read_package({"package_type": "daily", "limit_per_day": 10, "odd": [1], "notes": "n"})
    for package in (kilo(expiry_date="2025-09-01", model_weights={"m": 2}), window(), daily):
        found = status_of(package, NOW).to_dict()
        assert set(FIELDS.split()) <= found.keys()
        assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["notes"], found["extras"]) == ("n", {"odd": [1]})


@pytest.mark.parametrize(
    ("total", "used", "remaining", "ratio"),
    [(25, 10, 15, 0.6), (25, 30, 0, 0), (0, 0, 0, 0), (0, 5, 0, 0)],
)
def test_status_never_shows_a_negative_rest(total: float, used: float, remaining: float, ratio: float) -> None:
    """What is left is never below zero, and its share zero where there is no total (S1.4)."""
    found = status_of(kilo(total_credits=total, used_credits=used), NOW)
    assert (found.remaining, found.remaining_ratio, found.used) == (remaining, ratio, used)


@pytest.mark.parametrize(
    ("expiry", "days", "remaining", "alert"),
    [
        ("2025-08-31", 10, 12.5, "use_or_lose"),
        ("2025-08-22", 1, 12.5, "use_or_lose"),
        ("2025-08-21", 0, 12.5, "topup"),
        ("2025-08-20", -1, 0, "exhausted"),
        (None, None, 12.5, "watch"),
    ],
)
def test_status_of_credits_counts_days_in_utc(
    expiry: str | None, days: int | None, remaining: float, alert: str
) -> None:
    """Days are whole ones of UTC; what has expired is gone, what expires today wants attention (S1.6, S1.8, S1.10)."""
    found = status_of(kilo(expiry_date=expiry), NOW, burn=1)
    assert (found.days_until_expiry, found.remaining, found.alert) == (days, remaining, alert)
    assert (found.burn_per_day, found.projected_days_left) == (1, remaining)
    assert found.pace is None


def test_status_with_an_expiry_that_is_no_date_warns(caplog: pytest.LogCaptureFixture) -> None:
    """It is logged and left empty (S1.6)."""
    with caplog.at_level(logging.WARNING):
        found = status_of(kilo(expiry_date="soon"), NOW)
    assert (found.expiry_date, found.days_until_expiry, found.alert) == ("soon", None, "ok")
    assert "'soon'" in caplog.text


def test_status_of_a_rolling_window_resets_behind_its_first_call() -> None:
    """It returns a window after the earliest call, and a window from now where there is none (S1.11, S1.12)."""
    package = window(window_hours=5, model_weights={"opus": 5})
    used = status_of(package, NOW, counted=Counted(37, NOW - 3600))
    assert (used.used, used.remaining, used.alert) == (37, 3, "topup")
    assert (used.reset_at, used.window_hours) == (iso_time(NOW + 4 * 3600), 5)
    assert used.extras == {"model_weights": {"opus": 5}}
    fresh = status_of(package, NOW, counted=Counted())
    assert (fresh.used, fresh.reset_at, fresh.alert) == (0, iso_time(NOW + 5 * 3600), "ok")
    late = status_of(package, NOW, counted=Counted(1, NOW - 5 * 3600 - 30))
    assert late.reset_at == iso_time(NOW)


def test_status_of_a_day_resets_at_midnight() -> None:
    """UTC's by default, another zone's by choice (S1.13)."""
    package = {"package_type": "daily", "limit_per_day": 100}
    found = status_of(read_package(package), NOW, counted=Counted(71, NOW - 60))
    assert (found.reset_at, found.alert, found.window_hours) == ("2025-08-22T00:00:00Z", "watch", None)
    berlin = status_of(read_package({**package, "zone": "Europe/Berlin"}), NOW)
    assert berlin.reset_at == "2025-08-21T22:00:00Z"


def test_status_of_a_window_that_nobody_counts_shows_the_catalogue() -> None:
    """Without counts it is what was written."""
    assert status_of(window(used_credits=4), NOW).used == 4


@pytest.mark.parametrize(
    ("package", "counted", "pace"),
    [
        (window(), Counted(20, NOW - 3600), 0.5 - 0.2),
        (window(), Counted(4, NOW - 4 * 3600), 0.1 - 0.8),
        (window(), Counted(), 0.0),
        (window(limit_per_window=0), Counted(3, NOW), None),
        (read_package({"package_type": "daily", "limit_per_day": 10}), Counted(10, NOW), 1 - (12 + 40 / 60) / 24),
    ],
)
def test_pace_is_the_share_used_less_the_share_of_time(package: Package, counted: Counted, pace: float | None) -> None:
    """Above zero a window will not last; a fresh one is at zero, one without a limit has none (S1.20)."""
    assert status_of(package, NOW, counted=counted).pace == (pace if pace is None else pytest.approx(pace))


def test_captured_package_shows_what_the_provider_said() -> None:
    """Used, limit and reset of its headers, with high confidence, whatever was counted here (S1.42, S1.43)."""
    package = window(source="header_capture")
    said = reading(QuotaLimit(resource="requests", limit=60, remaining=50, reset_at=NOW + 90))
    found = status_of(package, NOW, counted=Counted(39, NOW), reading=said)
    assert (found.total, found.used, found.remaining, found.alert) == (60, 10, 50, "ok")
    assert (found.reset_at, found.confidence, found.source) == (iso_time(NOW + 90), "high", "header_capture")
    assert found.last_updated == iso_time(NOW - 1)
    above = status_of(package, NOW, reading=reading(QuotaLimit(resource="requests", limit=5, remaining=9)))
    assert (above.used, above.pace) == (0, 0)
    held = status_of(package, NOW, reading=reading(QuotaLimit(resource="requests", limit=5, remaining=0)))
    assert (held.used, held.alert, held.reset_at, held.pace) == (5, "exhausted", None, None)


def test_captured_package_looks_at_its_resource_and_at_shares() -> None:
    """Another limit of the reading is chosen by name; a share counts of the configured limit, or of a hundred."""
    said = reading(QuotaLimit(resource="unified_5h", utilization=Decimal("0.25"), reset_at=NOW + 60))
    five_hours = status_of(window(source="header_capture", resource="unified_5h"), NOW, reading=said)
    percent = status_of(window(source="header_capture", resource="unified_5h", limit_per_window=0), NOW, reading=said)
    assert (five_hours.total, five_hours.used) == (40, 10)
    assert (percent.total, percent.used) == (100, 25)


@pytest.mark.parametrize(("hours", "used"), [(4.9, 40), (5.1, 0)])
def test_captured_package_without_a_reset_returns_with_its_window(hours: float, used: int) -> None:
    """Headers that tell no reset count as long as the window: else nobody would ever call, and learn better (S1.43)."""
    package = window(source="header_capture")
    said = reading(QuotaLimit(resource="requests", limit=40, remaining=0), observed_at=NOW - hours * 3_600)
    found = status_of(package, NOW, reading=said)
    assert (found.used, found.alert) == (used, "exhausted" if used else "ok")
    assert (found.total, found.confidence) == (40, "high" if used else "estimated")
    day = read_package({"package_type": "daily", "limit_per_day": 40, "source": "header_capture"})
    yesterday = reading(QuotaLimit(resource="requests", limit=40, remaining=0), observed_at=day.window_start(NOW) - 1)
    assert status_of(day, NOW, reading=yesterday).used == 0
    assert status_of(day, NOW, reading=said).used == 40


def test_expiry_that_is_no_date_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """Routers ask for each call: a mistake in a catalogue fills no log (S1.6)."""
    for _ in range(3):
        assert status_of(kilo(expiry_date="when it is over"), NOW).days_until_expiry is None
    assert caplog.text.count("'when it is over' of the package 'c' is no date") == 1


def test_captured_package_returns_with_its_reset() -> None:
    """Once the reset that was told has passed its units are back, which is an estimate until the next answer."""
    said = reading(QuotaLimit(resource="requests", limit=60, remaining=0, reset_at=NOW))
    found = status_of(window(source="header_capture"), NOW, reading=said)
    assert (found.used, found.remaining, found.confidence, found.reset_at) == (0, 60, "estimated", None)


@pytest.mark.parametrize(
    ("source", "limits"),
    [
        ("local_count", [QuotaLimit(resource="requests", limit=60, remaining=0)]),
        ("header_capture", []),
        ("header_capture", [QuotaLimit(resource="requests", limit=60)]),
        ("header_capture", [QuotaLimit(resource="requests", reset_at=NOW + 3)]),
        ("header_capture", [QuotaLimit(resource="tokens", limit=60, remaining=0)]),
    ],
)
def test_readings_change_only_packages_that_ask_for_them(source: str, limits: list[QuotaLimit]) -> None:
    """A package of another source, or a reading without both numbers, is left as counted (S1.40, S1.42)."""
    found = status_of(window(source=source), NOW, counted=Counted(3, NOW), reading=reading(*limits))
    assert (found.total, found.used, found.confidence) == (40, 3, "medium")


def test_status_line_says_all_in_one() -> None:
    """One line for a log: provider, rest, alert, expiry, projection or reset, confidence and source (S1.19)."""
    first = status_of(kilo(expiry_date="2025-08-31", source="api_poll", confidence="high"), NOW, burn=0.2)
    assert status_line(first) == ("[^] kilo/c 12.5/25 use_or_lose, expires in 10 d, lasts 62.5 d (high, api_poll)")
    assert status_line(status_of(window(), NOW)) == (
        "[+] acme/w 40/40 ok, resets 2025-08-21T17:40:00Z (medium, manual)"
    )


def test_status_stands_for_budgets_of_our_own_too() -> None:
    """The record needs nothing of a provider: anything with a total and a rest can be shown by it (S1.1)."""
    budget = QuotaStatus(
        provider_id="org_7",
        package_id="org_7-credits",
        package_type="credits",
        total=10,
        used=4,
        remaining=6,
        remaining_ratio=0.6,
        alert="ok",
    )
    assert (budget.source, budget.confidence, budget.to_dict()["remaining"]) == ("manual", "medium", 6)

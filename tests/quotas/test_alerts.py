"""Alerts, burn and projection: the table of the rules, with its edges."""

from __future__ import annotations

import pytest

from asgi_metering.quotas.alerts import (
    ALERTS,
    AlertThresholds,
    burn_per_day,
    credits_alert,
    days_left,
    window_alert,
)


@pytest.mark.parametrize(
    ("remaining", "days", "projected", "alert"),
    [
        (0, None, None, "exhausted"),
        (0, 10, 100, "exhausted"),
        (5, 14, 14.1, "use_or_lose"),
        (5, 14, 14, "ok"),  # equal is not outliving
        (5, 15, 400, "ok"),  # never beyond 14 days
        (5, 1, 1.5, "use_or_lose"),  # before topup
        (5, 1, 1, "topup"),
        (5, 2, None, "topup"),
        (5, 3, None, "ok"),
        (5, 3, 1.9, "topup"),
        (5, None, 1.99, "topup"),
        (5, None, 2, "watch"),
        (5, None, 13.9, "watch"),
        (5, None, 14, "ok"),
        (5, None, None, "ok"),
        (5, 0, None, "topup"),
        (5, 0, 400, "topup"),
        (5, -1, 400, "exhausted"),
        (5, -1, None, "exhausted"),
    ],
)
def test_credits_alert_takes_the_first_rule_that_fits(
    remaining: float, days: int | None, projected: float | None, alert: str
) -> None:
    """Every row and its edges; what expires today is at least topup, what has expired is exhausted (S1.8, S1.10)."""
    assert credits_alert(remaining, days, projected) == alert


def test_credits_alert_with_thresholds_of_ones_own() -> None:
    """The days are the table's, not the prose's, and configurable (S1.9)."""
    assert credits_alert(5, 20, None) == credits_alert(5, 4, None) == "ok"
    mine = AlertThresholds(use_or_lose_days=30, expiry_topup_days=5, runway_topup_days=5, runway_watch_days=30)
    alerts = [credits_alert(5, days, left, mine) for days, left in ((20, 21), (5, None), (None, 4.9), (None, 29))]
    assert alerts == ["use_or_lose", "topup", "topup", "watch"]


@pytest.mark.parametrize(
    ("remaining", "limit", "alert"),
    [
        (0, 0, "ok"),
        (0, 40, "exhausted"),
        (3.9, 40, "topup"),
        (4, 40, "watch"),
        (11.9, 40, "watch"),
        (12, 40, "ok"),
        (40, 40, "ok"),
    ],
)
def test_window_alert_by_what_is_left(remaining: float, limit: float, alert: str) -> None:
    """A tenth left is watch and three tenths are ok; without a limit nothing is configured (S1.14)."""
    assert window_alert(remaining, limit) == alert
    assert window_alert(remaining, limit, AlertThresholds(topup_ratio=1, watch_ratio=1)) in (alert, "topup", "ok")


def test_burn_is_a_days_share_and_none_without_one() -> None:
    """The cost of the days, divided by them; no cost is no burn, and no burn no projection (S1.7)."""
    assert burn_per_day(14, 7) == 2
    assert burn_per_day(0, 7) is burn_per_day(-1, 7) is burn_per_day(1, 0) is None
    assert days_left(10, 2) == 5
    assert days_left(10, None) is None


def test_alerts_are_ordered_by_urgency() -> None:
    """What would be lost comes first, what is fine last (S1.3, S1.51)."""
    assert ALERTS == ("use_or_lose", "exhausted", "topup", "watch", "ok")

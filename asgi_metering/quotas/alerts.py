"""
Alerts: when a package wants somebody's attention, and the burn and the days that they are judged by.

A table of rules over numbers. Never knows a clock, a package or where its numbers came from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = [
    "ALERTS",
    "DEFAULT_THRESHOLDS",
    "Alert",
    "AlertThresholds",
    "burn_per_day",
    "credits_alert",
    "days_left",
    "window_alert",
]

Alert: TypeAlias = Literal["use_or_lose", "exhausted", "topup", "watch", "ok"]
"""What a package asks for: to be used before it expires, nothing is left, money, an eye on it, nothing."""

ALERTS: tuple[Alert, ...] = ("use_or_lose", "exhausted", "topup", "watch", "ok")
"""The most urgent first, as tables and pages show them (S1.51)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AlertThresholds:
    """
    Where one alert ends and the next begins (S1.8, S1.9, S1.14).

    Attributes:
        use_or_lose_days: Credits that expire within so many days, this one included, and would outlive them.
        expiry_topup_days: Credits that expire within so many days, this one included.
        runway_topup_days, runway_watch_days: Credits that last for fewer days.
        topup_ratio, watch_ratio: Windows of which a smaller share is left.
    """

    use_or_lose_days: int = 14
    expiry_topup_days: int = 2
    runway_topup_days: float = 2.0
    runway_watch_days: float = 14.0
    topup_ratio: float = 0.1
    watch_ratio: float = 0.3


DEFAULT_THRESHOLDS = AlertThresholds()
"""Those of the requirements."""


def credits_alert(
    remaining: float,
    days_until_expiry: int | None,
    projected_days_left: float | None,
    thresholds: AlertThresholds = DEFAULT_THRESHOLDS,
) -> Alert:
    """
    The alert of credits, of which the first rule that fits counts.

    Args:
        remaining: What is left; 0 of those that have expired.
        days_until_expiry: Whole days; 0 is today, None never.
        projected_days_left: How long they last at the present burn; None where nothing is burnt.
        thresholds: Where one alert ends and the next begins.

    Source: S1.8; S1.10 for the day on which they expire.
    """
    if remaining <= 0 or (days_until_expiry is not None and days_until_expiry < 0):
        return "exhausted"
    outlives = projected_days_left is not None and projected_days_left > (days_until_expiry or 0)
    if days_until_expiry is not None:
        if 0 < days_until_expiry <= thresholds.use_or_lose_days and outlives:
            return "use_or_lose"
        if days_until_expiry <= thresholds.expiry_topup_days:
            return "topup"
    if projected_days_left is not None:
        if projected_days_left < thresholds.runway_topup_days:
            return "topup"
        if projected_days_left < thresholds.runway_watch_days:
            return "watch"
    return "ok"


def window_alert(remaining: float, limit: float, thresholds: AlertThresholds = DEFAULT_THRESHOLDS) -> Alert:
    """The alert of a window of *limit*, of which *remaining* is left; a limit of 0 is not configured (S1.14)."""
    if limit <= 0:
        return "ok"
    if remaining <= 0:
        return "exhausted"
    ratio = remaining / limit
    if ratio < thresholds.topup_ratio:
        return "topup"
    return "watch" if ratio < thresholds.watch_ratio else "ok"


def burn_per_day(cost: float, days: float) -> float | None:
    """What a day costs, by what the last *days* cost; None where they cost nothing (S1.7)."""
    return cost / days if cost > 0 and days > 0 else None


def days_left(remaining: float, burn: float | None) -> float | None:
    """How many days *remaining* lasts at *burn* a day; None without a burn (S1.7)."""
    return None if burn is None else remaining / burn

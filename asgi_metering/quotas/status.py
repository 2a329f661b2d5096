"""
The one record of what a package still allows, whoever says it and of whatever kind the package is.

Pure functions of a package, what is known of its use, and a moment. Never knows where counts or readings come from.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, date, datetime
from functools import lru_cache
from typing import Any, NamedTuple

from asgi_metering.quotas.alerts import (
    DEFAULT_THRESHOLDS,
    Alert,
    AlertThresholds,
    credits_alert,
    days_left,
    window_alert,
)
from asgi_metering.quotas.packages import MAX_PACKAGES, Confidence, Package, PackageSource
from asgi_metering.quotas.reading import QuotaLimit, Reading

__all__ = ["Counted", "QuotaStatus", "iso_time", "status_line", "status_of"]

log = logging.getLogger("asgi_metering.quotas")

PERCENT = 100.0
"""The size of a window whose provider tells shares, and no counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotaStatus:
    """
    What a package still allows (S1.1). `None` is unknown.

    Attributes:
        provider_id, package_id, package_type: Of the package.
        total, used, remaining: In the package's own unit; never negative, also where more was used (S1.4).
        remaining_ratio: Of the total; 0 where there is none.
        alert: What it asks for.
        source, confidence, last_updated: Who told what is used, how far that is to be believed, and when (ISO 8601).
        window_hours: Of a rolling window.
        reset_at: When units return, ISO 8601.
        expiry_date: The last day of credits; *days_until_expiry* is counted in UTC, and negative once it is over.
        burn_per_day: What a day costs, by the days before.
        projected_days_left: How long the rest lasts at that burn.
        pace: Of windows: the share that is used, less the share of time that is over. Above 0 it will not last (S1.20).
        notes, extras: Of the package.
    """

    provider_id: str
    package_id: str
    package_type: str
    total: float
    used: float
    remaining: float
    remaining_ratio: float
    alert: Alert
    source: PackageSource = "manual"
    confidence: Confidence = "medium"
    last_updated: str | None = None
    window_hours: float | None = None
    reset_at: str | None = None
    expiry_date: str | None = None
    days_until_expiry: int | None = None
    burn_per_day: float | None = None
    projected_days_left: float | None = None
    pace: float | None = None
    notes: str | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values by the names of the attributes."""
        return asdict(self)


class Counted(NamedTuple):
    """
    What was counted here.

    Attributes:
        used: Weighted calls in the window.
        first_at: Epoch seconds of the first of them; None where there is none.
    """

    used: float = 0.0
    first_at: float | None = None


def status_of(
    package: Package,
    now: float,
    *,
    burn: float | None = None,
    counted: Counted | None = None,
    reading: Reading | None = None,
    thresholds: AlertThresholds = DEFAULT_THRESHOLDS,
) -> QuotaStatus:
    """
    Return what *package* still allows at *now*, epoch seconds.

    Args:
        package: Of a catalogue.
        now: Epoch seconds.
        burn: What a day costs, in the unit of credits.
        counted: Calls of its window that were counted here; None where nobody counts.
        reading: The latest of its provider; only packages with ``source: header_capture`` look at it (S1.42).
        thresholds: Of alerts.

    Source: S1.1 to S1.14, S1.20, S1.43.
    """
    if package.package_type == "credits":
        return _credits(package, now, burn, thresholds)
    limit = None
    if package.source == "header_capture" and reading is not None and reading.useful:
        limit = reading.limit(package.resource)
    captured = None if limit is None or reading is None else _captured(package, limit, reading, now)
    return _window(package, now, captured or _local(package, counted, now), thresholds)


def _credits(package: Package, now: float, burn: float | None, thresholds: AlertThresholds) -> QuotaStatus:
    days = _days_until(package, now)
    # What has expired cannot be spent (S1.10).
    left = 0.0 if days is not None and days < 0 else max(0.0, package.total - package.used)
    runway = days_left(left, burn)
    return QuotaStatus(
        provider_id=package.provider_id,
        package_id=package.package_id,
        package_type="credits",
        total=package.total,
        used=package.used,
        remaining=left,
        remaining_ratio=_ratio(left, package.total),
        alert=credits_alert(left, days, runway, thresholds),
        source=package.source,
        confidence=package.confidence,
        last_updated=package.last_updated,
        expiry_date=package.expiry_date,
        days_until_expiry=days,
        burn_per_day=burn,
        projected_days_left=runway,
        notes=package.notes,
        extras=dict(package.extras),
    )


class _Used(NamedTuple):
    """What is known of a window."""

    total: float
    used: float
    reset_at: float | None
    confidence: Confidence
    told_at: float | None = None
    is_fresh: bool = False


def _window(package: Package, now: float, known: _Used, thresholds: AlertThresholds) -> QuotaStatus:
    left = max(0.0, known.total - known.used)
    is_rolling = package.package_type == "rolling_window"
    return QuotaStatus(
        provider_id=package.provider_id,
        package_id=package.package_id,
        package_type=package.package_type,
        total=known.total,
        used=known.used,
        remaining=left,
        remaining_ratio=_ratio(left, known.total),
        alert=window_alert(left, known.total, thresholds),
        source=package.source,
        confidence=known.confidence,
        last_updated=package.last_updated if known.told_at is None else iso_time(known.told_at),
        window_hours=package.window_hours if is_rolling else None,
        reset_at=None if known.reset_at is None else iso_time(known.reset_at),
        pace=_pace(package, known, now),
        notes=package.notes,
        extras={**package.extras, **({"model_weights": dict(package.model_weights)} if package.model_weights else {})},
    )


def _local(package: Package, counted: Counted | None, now: float) -> _Used:
    """By what was counted here; where nobody counts, by what the catalogue says."""
    used = package.used if counted is None else counted.used
    first_at = None if counted is None else counted.first_at
    is_fresh = not used
    window = package.window(now)
    if window is not None:
        return _Used(package.total, used, window[1], package.confidence, is_fresh=is_fresh)
    begun = now if first_at is None else first_at
    # Counts are kept by the minute, so the first may be a moment older than the window.
    reset_at = max(now, begun + package.window_hours * 3600)
    return _Used(package.total, used, reset_at, package.confidence, is_fresh=is_fresh)


def _captured(package: Package, limit: QuotaLimit, reading: Reading, now: float) -> _Used | None:
    """By what the provider itself said; None where it told too little (S1.42)."""
    told_at = reading.observed_at if reading.limits_observed_at is None else reading.limits_observed_at
    if limit.limit is not None and limit.remaining is not None:
        total, used = float(limit.limit), float(max(0, limit.limit - limit.remaining))
    elif limit.utilization is not None:
        total = package.total or PERCENT
        used = total * float(limit.utilization)
    else:
        return None
    if told_at < package.window_start(now) if limit.reset_at is None else limit.reset_at <= now:
        # Its units have returned, and nobody has called since.
        return _Used(total, 0.0, None, "estimated", told_at, is_fresh=True)
    return _Used(total, used, limit.reset_at, "high", told_at, is_fresh=not used)


def _pace(package: Package, known: _Used, now: float) -> float | None:
    if known.total <= 0:
        return None
    if known.is_fresh:
        return 0.0
    if known.reset_at is None:
        return None
    window = package.window(now)
    length = package.window_hours * 3600 if window is None else window[1] - window[0]
    elapsed = min(1.0, max(0.0, 1 - (known.reset_at - now) / length))
    return known.used / known.total - elapsed


def _ratio(remaining: float, total: float) -> float:
    return remaining / total if total > 0 else 0.0


def _days_until(package: Package, now: float) -> int | None:
    """Whole days in UTC; what cannot be read is told of and unknown (S1.6)."""
    expiry = None if package.expiry_date is None else _expiry(package.expiry_date, package.package_id)
    return None if expiry is None else (expiry - datetime.fromtimestamp(now, UTC).date()).days


@lru_cache(maxsize=MAX_PACKAGES)
def _expiry(written: str, package_id: str) -> date | None:
    """The date that is written; what is none is told of once, for routers ask again and again."""
    try:
        return date.fromisoformat(written[:10])
    except ValueError:
        log.warning("The expiry_date %r of the package %r is no date.", written, package_id)
        return None


def iso_time(epoch_s: float) -> str:
    """Epoch seconds in ISO 8601, in UTC, to the second."""
    return datetime.fromtimestamp(epoch_s, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


_ICONS: Mapping[Alert, str] = {"ok": "+", "watch": "~", "topup": "!", "use_or_lose": "^", "exhausted": "x"}


def status_line(status: QuotaStatus) -> str:
    """
    One line for a log (S1.19).

    ``[^] kilo/kilo-credits 12.6/25 use_or_lose, expires in 10 d, lasts 63 d (high, api_poll)``
    """
    parts = [f"{status.provider_id}/{status.package_id} {status.remaining:g}/{status.total:g} {status.alert}"]
    if status.days_until_expiry is not None:
        parts.append(f"expires in {status.days_until_expiry} d")
    if status.projected_days_left is not None:
        parts.append(f"lasts {status.projected_days_left:.3g} d")
    if status.reset_at is not None:
        parts.append(f"resets {status.reset_at}")
    return f"[{_ICONS[status.alert]}] {', '.join(parts)} ({status.confidence}, {status.source})"

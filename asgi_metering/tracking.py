"""
Tracking: what upstreams still allow, as applications use it; and our own payers' budgets in the same record.

The face of `upstream.tracker` and its neighbours, which are imported when they are first used: they need a database
driver. Knows no HTTP.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from asgi_metering.amounts import Unit
from asgi_metering.errors import ConfigurationError
from asgi_metering.events.sinks import Sink
from asgi_metering.quotas.alerts import (
    DEFAULT_THRESHOLDS,
    AlertThresholds,
    burn_per_day,
    credits_alert,
    days_left,
    window_alert,
)
from asgi_metering.quotas.balances import Endpoint, Found
from asgi_metering.quotas.packages import Package, register_package_type
from asgi_metering.quotas.scoring import Score, ScoreWeights
from asgi_metering.quotas.status import QuotaStatus, iso_time, status_line
from asgi_metering.receipts import Balance
from asgi_metering.standing import AllowanceStatus

if TYPE_CHECKING:
    from asgi_metering.upstream.poller import Polled as Polled
    from asgi_metering.upstream.poller import QuotaPoller as QuotaPoller
    from asgi_metering.upstream.tracker import QuotaTracker as QuotaTracker
    from asgi_metering.upstream.usage_log import UsageLog as UsageLog

__all__ = [
    "AlertThresholds",
    "Endpoint",
    "Found",
    "Package",
    "Polled",
    "QuotaPoller",
    "QuotaStatus",
    "QuotaTracker",
    "Score",
    "ScoreWeights",
    "UsageLog",
    "budget_status",
    "register_package_type",
    "status_line",
]

_HOMES = {
    "Polled": "poller",
    "QuotaPoller": "poller",
    "QuotaTracker": "tracker",
    "UsageLog": "usage_log",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"asgi_metering.upstream.{home}"), name)


def tracked(packages: str | os.PathLike[str] | Iterable[Package] | QuotaTracker, unit: Unit) -> QuotaTracker:
    """
    The tracker that *packages* is, or one of them that counts in this process; *unit* has the costs of its log.

    Raises:
        ConfigurationError: It is none of these.
    """
    from asgi_metering.upstream.tracker import QuotaTracker
    from asgi_metering.upstream.usage_log import UsageLog

    if isinstance(packages, QuotaTracker):
        return packages
    if not isinstance(packages, str | os.PathLike | Iterable):
        raise ConfigurationError(
            f"packages={packages!r} is no catalogue. Pass the name of a file, Package(...)s, or a QuotaTracker."
        )
    return QuotaTracker(packages, log=UsageLog(unit=unit))


def with_log(sinks: tuple[Sink, ...], tracker: QuotaTracker | None) -> tuple[Sink, ...]:
    """*sinks*, and the tracker's log, which counts what they are told of."""
    log = None if tracker is None else tracker.log
    return sinks if log is None or log in sinks else (*sinks, log)


def budget_status(
    standing: Balance | AllowanceStatus,
    unit: Unit,
    *,
    charged: int = 0,
    days: float = 7.0,
    thresholds: AlertThresholds = DEFAULT_THRESHOLDS,
) -> QuotaStatus:
    """
    What one of our own payers has left, in the record of upstream packages (S1.1).

    Args:
        standing: ``await metering.balance(payer)``, which is credits, or one of ``await metering.allowances(payer)``,
            which is a window.
        unit: Of it; numbers of the status are whole units.
        charged: What the payer was charged in the last *days*, in smallest parts, for the burn of its credits.
        days: See above.
        thresholds: Of alerts.

    What is held counts as used, and what has expired is no part of the total.
    """
    if isinstance(standing, AllowanceStatus):
        return _of_window(standing, 10**unit.scale, thresholds)
    return _of_credits(standing, 10**unit.scale, burn_per_day(charged / 10**unit.scale, days), thresholds)


def _of_window(allowance: AllowanceStatus, parts: int, thresholds: AlertThresholds) -> QuotaStatus:
    # Beside what was used, what calls that run may use: the gate counts that as well.
    taken = allowance.used + allowance.held
    total, left = allowance.limit / parts, max(0, allowance.limit - taken) / parts
    starts_at, resets_at = allowance.starts_at, allowance.resets_at
    return QuotaStatus(
        provider_id=allowance.payer,
        package_id=f"{allowance.payer}-{allowance.name}",
        package_type="rolling_window",
        total=total,
        used=taken / parts,
        remaining=left,
        remaining_ratio=left / total if total > 0 else 0.0,
        alert=window_alert(left, total, thresholds),
        source="local_count",
        confidence="high",
        window_hours=None if starts_at is None or resets_at is None else (resets_at - starts_at) / 3600,
        reset_at=None if resets_at is None else iso_time(resets_at),
    )


def _of_credits(balance: Balance, parts: int, burn: float | None, thresholds: AlertThresholds) -> QuotaStatus:
    total = (balance.granted - balance.expired) / parts
    left = max(0, balance.available) / parts
    runway = days_left(left, burn)
    return QuotaStatus(
        provider_id=balance.payer,
        package_id=f"{balance.payer}-{balance.unit}",
        package_type="credits",
        total=total,
        used=(balance.settled + balance.held) / parts,
        remaining=left,
        remaining_ratio=min(1.0, left / total) if total > 0 else 0.0,
        alert=credits_alert(left, None, runway, thresholds),
        source="local_count",
        confidence="high",
        last_updated=iso_time(balance.at),
        burn_per_day=burn,
        projected_days_left=runway,
    )

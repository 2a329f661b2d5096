"""
What Google's error details say of quotas: ``QuotaFailure`` and ``RetryInfo``.

Knows the proto messages in their JSON form and when a day ends for Google. Never knows a header: Gemini and Vertex
send none on success.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

from asgi_metering.quotas.reading import MAX_LIMITS, QuotaLimit, model_series
from asgi_metering.quotas.values import parse_count, parse_duration_s

__all__ = ["Details", "next_day_at", "read_details"]

_ZONE = "America/Los_Angeles"
"""Daily quotas of the Gemini API return at midnight there."""

_MINUTE_S = 60.0
_MAX_DETAILS = 64

_WINDOWS = (("PerDay", "_day"), ("PerMinute", "_minute"), ("PerHour", "_hour"))
_KINDS = (
    (re.compile("input_?token", re.IGNORECASE), "input_tokens"),
    (re.compile("output_?token", re.IGNORECASE), "output_tokens"),
    (re.compile("token", re.IGNORECASE), "tokens"),
)


class Details(NamedTuple):
    """
    What the details of an error say.

    Attributes:
        limits: Those that are spent.
        retry_after_s: Seconds to wait; None where it says none.
        model: Whose limits they are, as `model_series` names it; None of all models together.
    """

    limits: tuple[QuotaLimit, ...] = ()
    retry_after_s: float | None = None
    model: str | None = None


def read_details(error: Mapping[str, Any], now: float) -> Details:
    """
    Return what *error* says is spent, and how long to wait from *now*.

    A violation whose id contains ``PerDay`` waits for the daily reset, however short ``retryDelay`` is. One whose
    dimensions name a model is of that model alone. Where another one is of all models, only such are told: a model's
    own will be told again by its next refusal.

    Source: google.rpc.QuotaFailure, google.rpc.RetryInfo; reference/provider-quota-headers.md, "Gemini API".
    """
    wait: float | None = None
    spent: list[Mapping[str, Any]] = []
    for detail in _mappings(error.get("details")):
        kind = str(detail.get("@type", "")).rpartition(".")[2]
        if kind == "RetryInfo":
            wait = parse_duration_s(str(detail.get("retryDelay", "")))
        elif kind == "QuotaFailure":
            spent += _mappings(detail.get("violations"))
    model = _model(spent[0]) if spent and all(map(_model, spent)) else None
    limits: dict[str, QuotaLimit] = {}
    for violation in spent:
        if _model(violation) != model:
            continue
        limit = _limit(violation, wait, now)
        limits.setdefault(limit.resource, limit)
        if limit.resource.endswith("_day") and limit.reset_at is not None:
            wait = max(wait or 0.0, limit.reset_at - now)
    return Details(tuple(limits.values())[:MAX_LIMITS], wait, model)


def next_day_at(now: float) -> float:
    """Epoch seconds of the next midnight in Google's zone, also through a change of its clock."""
    today = datetime.fromtimestamp(now, UTC).astimezone(ZoneInfo(_ZONE)).date()
    tomorrow = today + timedelta(days=1)
    return datetime(tomorrow.year, tomorrow.month, tomorrow.day, tzinfo=ZoneInfo(_ZONE)).timestamp()


def _limit(violation: Mapping[str, Any], wait: float | None, now: float) -> QuotaLimit:
    quota = str(violation.get("quotaId", ""))
    named = f"{quota} {violation.get('quotaMetric', '')}"
    kind = next((kind for pattern, kind in _KINDS if pattern.search(named)), "requests")
    window = next((suffix for word, suffix in _WINDOWS if word in quota), "")
    reset_at = next_day_at(now) if window == "_day" else now + (_MINUTE_S if wait is None else wait)
    count = parse_count(str(violation.get("quotaValue", "")))
    return QuotaLimit(resource=kind + window, limit=count, remaining=0, reset_at=reset_at)


def _model(violation: Mapping[str, Any]) -> str | None:
    """The one model that a quota is of."""
    dimensions = violation.get("quotaDimensions")
    return model_series(dimensions.get("model")) if isinstance(dimensions, Mapping) else None


def _mappings(value: object) -> list[Mapping[str, Any]]:
    return [each for each in value[:_MAX_DETAILS] if isinstance(each, Mapping)] if isinstance(value, list) else []

"""
Breakdown: what the usage event says of a call's upstream calls: by model, what they cost their payer, what was cut.

Knows how sums by model are written where only plain values may stand. Never decides what is charged.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from decimal import ROUND_HALF_UP, Decimal
from typing import TYPE_CHECKING, Any

from asgi_metering.amounts import MAX_AMOUNT
from asgi_metering.errors import UsageError
from asgi_metering.measuring import Metered, asked_upstream, upstream_calls
from asgi_metering.prices.costing import ModelCall
from asgi_metering.prices.values import EXACT
from asgi_metering.usage import TokenUsage
from asgi_metering.usage.event import CALLS, MODELS
from asgi_metering.usage.values import AXES

if TYPE_CHECKING:
    from asgi_metering.attributes import Scalar
    from asgi_metering.call import Call
    from asgi_metering.witnesses import Told

__all__ = ["COST", "MAX_MODELS", "MAX_UNITS_TOLD", "TRUNCATED", "UNITS", "unit_attributes", "upstream_attributes"]

COST = "metering.cost.usd_micros"
"""What the providers, or LiteLLM, say that the call's upstream calls cost, in millionths of a US dollar."""

TRUNCATED = "metering.truncated"
"""True where a token limit cut an answer."""

UNITS = "metering.units."
"""Before the name of what a call used besides tokens: how much of it."""

MAX_UNITS_TOLD = 32
"""Units that an event tells of, the first that were reported: names are handlers', and an event must stay small."""

MAX_MODELS = 32
"""Models that are told apart: names come from upstream, and an event must stay small. Others are summed as one."""

_OTHERS = ("_OTHER", None)


def upstream_attributes(call: Call, used: Metered) -> dict[str, Scalar]:
    """
    Return `MODELS` or `CALLS`, `COST` and `TRUNCATED`, as far as there is something to say.

    Only of the source that counted: sources are alternatives, never summed (S2.42). Source: S3.20, S3.27, S3.28.
    """
    told: dict[str, Scalar] = {}
    cost = _micros(used.cost)
    if cost:
        told[COST] = cost
    calls = list(upstream_calls(call, used.source))
    if any(each.truncated for each in calls):
        told[TRUNCATED] = True
    rows = _by_model(calls)
    if len(rows) > 1:
        told[MODELS] = json.dumps(rows, separators=(",", ":"))
        return told
    # What reports no tokens of any model is a count of something else, however often it is reported.
    count = rows[0]["calls"] if rows and (rows[0]["model"] or rows[0]["usage"]) else 0
    count = max(count, asked_upstream(call, used.source)[0])
    if count > 1:
        told[CALLS] = count
    return told


def unit_attributes(calls: Iterable[ModelCall]) -> dict[str, Scalar]:
    """
    How much *calls* used of each unit, by its name behind `UNITS`: an int where it is whole, else a float.

    What is charged is exact, and may be what nobody charges: the count is told as it was reported (S2.8, S2.19).
    """
    counts: dict[str, Decimal] = {}
    for each in calls:
        for name, count in each.units.items():
            if name in counts or len(counts) < MAX_UNITS_TOLD:
                counts[name] = EXACT.add(counts.get(name, Decimal(0)), count)
    return {f"{UNITS}{name}": int(count) if count == int(count) else float(count) for name, count in counts.items()}


def _micros(cost: Decimal | None) -> int | None:
    """Millionths, rounded once, half up (S3.21); None for what no event may hold."""
    if cost is None or not cost.is_finite() or not 0 <= cost <= MAX_AMOUNT // 1_000_000:
        return None
    return int((cost * 1_000_000).quantize(Decimal(1), ROUND_HALF_UP))


def _by_model(calls: list[Told]) -> list[dict[str, Any]]:
    summed: dict[tuple[str | None, str | None], list[Told]] = {}
    for each in calls:
        named = each.model, each.provider
        summed.setdefault(named if named in summed or len(summed) < MAX_MODELS else _OTHERS, []).append(each)
    return [_row(model, provider, same) for (model, provider), same in summed.items()]


def _sum(same: list[Told]) -> TokenUsage:
    try:
        return TokenUsage.sum(each.usage for each in same)
    except UsageError:
        # More than can be counted: such a call is charged by its policy, and its end is never lost for its event.
        return TokenUsage()


def _row(model: str | None, provider: str | None, same: list[Told]) -> dict[str, Any]:
    usage = _sum(same)
    costs = [each.cost for each in same if each.cost is not None]
    counted = {axis: count for axis in AXES if (count := getattr(usage, axis)) is not None}
    row = {"model": model, "provider": provider, "calls": sum(each.count for each in same), "usage": counted}
    return row | ({"cost_usd_micros": _micros(sum(costs, Decimal(0)))} if costs else {})

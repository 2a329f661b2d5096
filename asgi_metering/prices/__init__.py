"""
Prices: what a call asks before it runs, and what its usage costs after.

Exact arithmetic in whole units; the ledger rounds once, half up. Knows nothing of holds or payers.

A constant amount is a fixed price. `per_million_tokens` and `per_token` price tokens by kind, in tiers if need be;
`per_unit`, `per_second`, `per_minute` and `per_hour` what is counted otherwise; `per_image` and
`per_million_characters` what the request itself tells. `model_prices` looks models up by name, and `by_usage` asks a
function of the application.
"""

from __future__ import annotations

from asgi_metering.prices.costing import BilledPrice, CostedCall, Costing, ModelCall
from asgi_metering.prices.functions import UsagePrice, by_usage
from asgi_metering.prices.models import ModelPrices, PinnedPrices, model_prices
from asgi_metering.prices.published import published_version
from asgi_metering.prices.requested import per_image, per_million_characters
from asgi_metering.prices.tokens import TokenPrice, TokenTier, above, per_million_tokens, per_token
from asgi_metering.prices.units import UnitPrice, per_hour, per_minute, per_second, per_unit
from asgi_metering.prices.values import MAX_AFFORDABLE, FixedPrice, MeasuredPrice

__all__ = [
    "MAX_AFFORDABLE",
    "BilledPrice",
    "CostedCall",
    "Costing",
    "FixedPrice",
    "MeasuredPrice",
    "ModelCall",
    "ModelPrices",
    "PinnedPrices",
    "TokenPrice",
    "TokenTier",
    "UnitPrice",
    "UsagePrice",
    "above",
    "by_usage",
    "model_prices",
    "per_hour",
    "per_image",
    "per_million_characters",
    "per_million_tokens",
    "per_minute",
    "per_second",
    "per_token",
    "per_unit",
    "published_version",
]

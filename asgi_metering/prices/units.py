"""
Prices of what is no token: images, seconds, searches, whatever a call reports by name.

Exact arithmetic in whole units. Knows no unit by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from types import MappingProxyType

from asgi_metering.amounts import Amount, exact_amount
from asgi_metering.errors import ConfigurationError
from asgi_metering.prices.costing import SECONDS, Costing, ModelCall, plain_costing
from asgi_metering.prices.tokens import AFFORDABLE
from asgi_metering.prices.values import EXACT, MAX_AFFORDABLE, capped
from asgi_metering.usage import TokenUsage

__all__ = ["SECONDS", "UnitPrice", "per_hour", "per_minute", "per_second", "per_unit"]


@dataclass(frozen=True, slots=True)
class UnitPrice:
    """
    A price for each of several units, which ``call.record(units={"images": 2})`` reports by their names.

    Args:
        prices: Whole units for *per* of each.
        per: By name, of how many; one where it is not named.

    What is reported under other names costs nothing here; where nothing else is reported, that is told (`Costing`).
    """

    prices: Mapping[str, Decimal]
    per: Mapping[str, int]

    def cost(self, usage: TokenUsage) -> Decimal:
        """Nothing: tokens are none of its units."""
        return Decimal(0)

    def cost_of(self, units: Mapping[str, Decimal]) -> Decimal:
        """Whole units that so many of each cost, exactly."""
        total = Decimal(0)
        for name, count in units.items():
            if name in self.prices:
                exact = EXACT.divide(EXACT.multiply(self.prices[name], count), self.per.get(name, 1))
                total = EXACT.add(total, exact)
        return total

    def affordable(self, kind: str, units: Decimal, used: TokenUsage) -> int:
        """How many whole ones of *kind*, such as ``"seconds"``, fit in *units*; what was reported is not taken off."""
        if kind in AFFORDABLE and kind not in self.prices:
            # Tokens cost nothing here: a number without effect.
            return MAX_AFFORDABLE
        if kind not in self.prices:
            known = ", ".join(map(repr, self.prices))
            raise ConfigurationError(f"{kind!r} has no price of its own here. Ask for {known}.")
        return capped(units, self.prices[kind], self.per.get(kind, 1))

    def bill(self, calls: tuple[ModelCall, ...], context: object = None) -> Costing:
        """What the units of each call cost: see `BilledPrice`."""
        costing = plain_costing(calls, lambda call: self.cost_of(call.units))
        reported = {name for call in calls for name in call.units}
        if reported and reported.isdisjoint(self.prices):
            # A name that is misspelt would make every call free, and nobody would hear of it.
            return replace(costing, flags=("unpriced_units",))
        return costing

    def __hash__(self) -> int:
        return hash((tuple(self.prices.items()), tuple(self.per.items())))


def per_unit(prices: Mapping[str, Amount] | None = None, **named: Amount) -> UnitPrice:
    """
    Price what ``call.record(units=...)`` reports, each by its name: ``per_unit(images="0.04", searches="0.01")``.

    Args:
        prices: The same by any names, such as ``{"1024x1024 hd": "0.08"}``.
        named: Whole units for one.

    Raises:
        AmountError: A price that is no amount.
        ConfigurationError: No price at all.
    """
    given = {**(prices or {}), **named}
    if not given:
        raise ConfigurationError("per_unit() prices nothing. Name a unit: per_unit(images='0.04'), say.")
    return _unit_price(given, {})


def _unit_price(prices: Mapping[str, Amount], per: Mapping[str, int]) -> UnitPrice:
    read = {_named(name): exact_amount(amount, f"price of {name!r}") for name, amount in prices.items()}
    return UnitPrice(MappingProxyType(read), MappingProxyType(dict(per)))


def _named(name: object) -> str:
    if not isinstance(name, str) or not name:
        raise ConfigurationError(f"The unit {name!r} is no name. Use a text such as 'images'.")
    return name


def per_second(price: Amount, *, of: str = SECONDS) -> UnitPrice:
    """Price each second that ``call.record(units={"seconds": "93.5"})`` reports, parts of seconds as parts."""
    return _unit_price({of: price}, {})


def per_minute(price: Amount, *, of: str = SECONDS) -> UnitPrice:
    """Price minutes, the way transcription is priced; reported in seconds, and charged exactly by them."""
    return _unit_price({of: price}, {of: 60})


def per_hour(price: Amount, *, of: str = SECONDS) -> UnitPrice:
    """Price hours, the way machines are priced; reported in seconds, and charged exactly by them."""
    return _unit_price({of: price}, {of: 3_600})

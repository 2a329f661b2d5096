"""
What a price is: a fixed amount, or something that can be asked what usage costs.

Knows no kind of price beyond these two.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_FLOOR, Context, Decimal
from typing import Final, Protocol, runtime_checkable

from asgi_metering.amounts import Amount, exact_amount
from asgi_metering.usage import TokenUsage

__all__ = ["EXACT", "FLOOR", "MAX_AFFORDABLE", "FixedPrice", "MeasuredPrice", "capped", "reads_request"]

# Wide enough that sums of bounded counts and prices are exact; never the caller's own (mutable, global) context.
EXACT: Final = Context(prec=60)
FLOOR: Final = Context(prec=60, rounding=ROUND_FLOOR)

MAX_AFFORDABLE: Final = 10**9
"""What `affordable` answers where tokens cost nothing, or next to nothing: a number that any SDK accepts."""


@dataclass(frozen=True, slots=True)
class FixedPrice:
    """The same whole units for every call; it holds itself, and it is what is charged."""

    amount: Decimal

    @classmethod
    def of(cls, amount: Amount) -> FixedPrice:
        """Read *amount*; raises `AmountError` as `exact_amount`."""
        return cls(exact_amount(amount, "price"))


@runtime_checkable
class MeasuredPrice(Protocol):
    """
    A price per measured usage: what a custom price implements.

    One that also has the method of `BilledPrice` is asked about each call of a model by itself.
    """

    def cost(self, usage: TokenUsage) -> Decimal:
        """Whole units that *usage* costs, exactly, from 0 up."""

    def affordable(self, kind: str, units: Decimal, used: TokenUsage) -> int:
        """How many more tokens of *kind* fit in *units* (whole units) after *used*; never negative."""


def capped(left: Decimal, price: Decimal, per: int) -> int:
    """How many fit in *left* at *price* for *per* of them, from 0 to `MAX_AFFORDABLE`."""
    if left < 0:
        return 0
    if not price:
        return MAX_AFFORDABLE
    return min(MAX_AFFORDABLE, int(FLOOR.divide_int(EXACT.multiply(left, per), price)))


def reads_request(price: object) -> bool:
    """Whether it depends on the request what *price* asks: on its model, its service tier, or its searches."""
    return any(getattr(price, name, None) for name in ("pin", "services", "web_search"))

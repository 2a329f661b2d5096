"""
Prices: what a call asks before it runs, and what its usage costs after.

Exact arithmetic in whole units; the ledger rounds once, half up. Knows nothing of holds or payers.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_FLOOR, Context, Decimal
from typing import Protocol, runtime_checkable

from asgi_metering.amounts import Amount, exact_amount
from asgi_metering.errors import ConfigurationError
from asgi_metering.usage import TokenUsage

__all__ = ["FixedPrice", "MeasuredPrice", "TokenPrice", "per_million_tokens", "per_token"]

_EXACT = Context(prec=60)
_FLOOR = Context(prec=60, rounding=ROUND_FLOOR)


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
    """A price per measured usage: what a custom price implements."""

    def cost(self, usage: TokenUsage) -> Decimal:
        """Whole units that *usage* costs, exactly, from 0 up."""

    def affordable(self, kind: str, units: Decimal, used: TokenUsage) -> int:
        """How many more tokens of *kind* fit in *units* (whole units) after *used*; never negative."""


@dataclass(frozen=True, slots=True)
class TokenPrice:
    """
    A price per token, by kind.

    Args:
        input, output: Whole units for *per* tokens.
        cached, cache_write: For the parts of the input read from or written to a cache; the input's price by default.
        reasoning: For the part of the output spent on reasoning; the output's price by default.
        per: How many tokens a price is for.

    Parts are inside their whole (S2.43): a cached token is priced as cached and not also as input. What was not
    reported counts as none; whether a report is complete enough to charge on is for the caller to say.
    """

    input: Decimal
    output: Decimal
    cached: Decimal | None = None
    cache_write: Decimal | None = None
    reasoning: Decimal | None = None
    per: int = 1

    def cost(self, usage: TokenUsage) -> Decimal:
        """Whole units that *usage* costs, exactly."""
        read, written = usage.cached or 0, usage.cache_write or 0
        thought = usage.reasoning or 0
        plain_input = max(0, (usage.input or 0) - read - written)
        plain_output = max(0, (usage.output or 0) - thought)
        total = Decimal(0)
        for price, tokens in (
            (self.input, plain_input),
            (_or(self.cached, self.input), read),
            (_or(self.cache_write, self.input), written),
            (self.output, plain_output),
            (_or(self.reasoning, self.output), thought),
        ):
            total = _EXACT.fma(price, tokens, total)
        return _EXACT.divide(total, self.per)

    def affordable(self, kind: str, units: Decimal, used: TokenUsage) -> int:
        """
        How many more ``"input"`` or ``"output"`` tokens fit in *units* after *used*; never negative.

        Each counts at the dearest that it may become: an output token as reasoning, an input token as a cache write.
        """
        prices = {
            "input": max(self.input, _or(self.cached, self.input), _or(self.cache_write, self.input)),
            "output": max(self.output, _or(self.reasoning, self.output)),
        }
        if kind not in prices:
            raise ConfigurationError(f"Tokens of kind {kind!r} cannot be afforded one by one. Use 'input' or 'output'.")
        left = _EXACT.subtract(units, self.cost(used))
        if left <= 0:
            return 0
        price = prices[kind]
        if not price:
            return MAX_AFFORDABLE
        return min(MAX_AFFORDABLE, int(_FLOOR.divide_int(_EXACT.multiply(left, self.per), price)))


MAX_AFFORDABLE = 10**9
"""What `affordable` answers where tokens cost nothing, or next to nothing: a number that any SDK accepts."""


def _or(price: Decimal | None, otherwise: Decimal) -> Decimal:
    return otherwise if price is None else price


def _token_price(
    per: int,
    input: Amount,
    output: Amount,
    cached: Amount | None,
    cache_write: Amount | None,
    reasoning: Amount | None,
) -> TokenPrice:
    def optional(amount: Amount | None, what: str) -> Decimal | None:
        return None if amount is None else exact_amount(amount, what)

    return TokenPrice(
        exact_amount(input, "input price"),
        exact_amount(output, "output price"),
        optional(cached, "price of cached input"),
        optional(cache_write, "price of cache writes"),
        optional(reasoning, "reasoning price"),
        per,
    )


def per_million_tokens(
    *,
    input: Amount = 0,
    output: Amount = 0,
    cached: Amount | None = None,
    cache_write: Amount | None = None,
    reasoning: Amount | None = None,
) -> TokenPrice:
    """Price tokens by the million, in whole units: the way providers print their lists. Floats are refused."""
    return _token_price(1_000_000, input, output, cached, cache_write, reasoning)


def per_token(
    *,
    input: Amount = 0,
    output: Amount = 0,
    cached: Amount | None = None,
    cache_write: Amount | None = None,
    reasoning: Amount | None = None,
) -> TokenPrice:
    """Price single tokens, in whole units. Floats are refused."""
    return _token_price(1, input, output, cached, cache_write, reasoning)

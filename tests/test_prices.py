"""Prices are exact: multiplied first, rounded once, and never a float."""

from __future__ import annotations

from decimal import Decimal, localcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_metering import CREDITS, TokenUsage
from asgi_metering.errors import AmountError, ConfigurationError
from asgi_metering.prices import (
    MAX_AFFORDABLE,
    FixedPrice,
    MeasuredPrice,
    TokenPrice,
    per_million_tokens,
    per_token,
)

KINDS = per_million_tokens(input=3, output=15, cached="0.3", cache_write="3.75", reasoning=20)


def test_price_by_kind_counts_each_token_once() -> None:
    """Cached, written and reasoning tokens are priced as such and not also as input or output (S2.43)."""
    usage = TokenUsage(input=1_000, cached=400, cache_write=100, output=50, reasoning=20)
    assert KINDS.cost(usage) == Decimal(500 * 3 + 400 * Decimal("0.3") + 100 * Decimal("3.75") + 30 * 15 + 20 * 20) / (
        10**6
    )


def test_kinds_without_a_price_of_their_own_cost_what_their_whole_costs() -> None:
    """Without other prices a cached token is input and a reasoning token is output."""
    plain = per_token(input=1, output=10)
    assert plain.cost(TokenUsage(input=5, cached=5, cache_write=0, output=2, reasoning=2)) == 25


def test_what_was_not_reported_costs_nothing() -> None:
    """None counts as none; so does a report of zero."""
    assert per_token(input=1, output=10).cost(TokenUsage()) == 0
    assert per_token(input=1, output=10).cost(TokenUsage(input=0, output=0)) == 0


def test_parts_above_their_whole_never_make_a_negative_price() -> None:
    """A provider that reports more cached than input is charged for what it says, and nothing is subtracted."""
    assert per_token(input=1, output=1).cost(TokenUsage(input=1, cached=5)) == 5


def test_scales_agree() -> None:
    """A price for one token and the price for a million of them are the same price."""
    usage = TokenUsage(input=7, output=11)
    assert per_token(input=1, output=2).cost(usage) == per_million_tokens(input="1e6", output="2e6").cost(usage)


@given(st.integers(0, 10**9), st.integers(0, 10**9), st.decimals(0, 10**6, places=6), st.decimals(0, 10**6, places=6))
def test_sum_is_exact_whatever_the_callers_decimal_context(
    tokens_in: int, tokens_out: int, price_in: Decimal, price_out: Decimal
) -> None:
    """The sum has no rounding in it, also where the application has lowered its own precision."""
    price = per_million_tokens(input=price_in, output=price_out)
    with localcontext() as context:
        context.prec = 3
        cost = price.cost(TokenUsage(input=tokens_in, output=tokens_out))
    with localcontext() as context:
        context.prec = 80
        assert cost == (price_in * tokens_in + price_out * tokens_out) / 10**6


@given(st.integers(0, 10**6), st.integers(0, 10**4), st.integers(1, 10**4))
def test_affordable_fits_and_one_more_does_not(units: int, used: int, price: int) -> None:
    """What is affordable costs at most what is there; one token more costs more (unless it is free)."""
    rate = per_million_tokens(input=price, output=price)
    left = CREDITS.whole(units)
    before = TokenUsage(input=used)
    most = rate.affordable("output", left, before)
    if rate.cost(before) <= left:
        assert rate.cost(TokenUsage(input=used, output=most)) <= left
        assert most == MAX_AFFORDABLE or rate.cost(TokenUsage(input=used, output=most + 1)) > left
    else:
        assert most == 0


def test_affordable_takes_the_dearest_output() -> None:
    """Output may turn out to be reasoning, so the dearer of the two decides."""
    price = per_token(input=1, output=1, reasoning=4)
    assert price.affordable("output", Decimal(40), TokenUsage()) == 10
    assert price.affordable("input", Decimal(40), TokenUsage()) == 40


def test_affordable_of_free_tokens_is_a_number_without_effect() -> None:
    """Where tokens cost nothing the cap is large, and still a number that an SDK takes."""
    assert per_token(input=1).affordable("output", Decimal(1), TokenUsage()) == MAX_AFFORDABLE


def test_affordable_of_another_kind_is_refused() -> None:
    """Cached tokens cannot be bought one by one; the sentence says which kinds can."""
    with pytest.raises(ConfigurationError, match="Use 'input' or 'output'"):
        KINDS.affordable("cached", Decimal(1), TokenUsage())


@pytest.mark.parametrize("amount", [0.1, -1, "NaN", "inf", True, "two", None])
def test_price_that_is_no_amount_is_refused_at_import(amount: object) -> None:
    """Floats, negatives, NaN and nonsense are refused where the price is written (S3.21)."""
    with pytest.raises(AmountError):
        FixedPrice.of(amount)  # type: ignore[arg-type]
    if amount is not None:
        with pytest.raises(AmountError):
            per_million_tokens(cached=amount)  # type: ignore[arg-type]


def test_token_prices_are_measured_and_fixed_ones_are_not() -> None:
    """What tells the two apart is whether usage has a cost."""
    assert isinstance(KINDS, MeasuredPrice)
    assert isinstance(KINDS, TokenPrice)
    assert not isinstance(FixedPrice.of("0.5"), MeasuredPrice)

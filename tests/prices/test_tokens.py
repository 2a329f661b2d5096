"""Prices are exact: multiplied first, rounded once, and never a float."""

from __future__ import annotations

from decimal import Decimal, localcontext
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from asgi_metering import CREDITS, TokenUsage
from asgi_metering.errors import AmountError, ConfigurationError
from asgi_metering.prices import (
    MAX_AFFORDABLE,
    FixedPrice,
    MeasuredPrice,
    ModelCall,
    TokenPrice,
    above,
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


@pytest.mark.parametrize("make", [per_token, per_million_tokens])
def test_price_that_names_no_kind_is_refused(make: Any) -> None:
    """DESIGN 2: a price without a kind would make every call free in silence; whoever means that writes a 0."""
    with pytest.raises(ConfigurationError, match="prices nothing"):
        make()
    assert make(input=0).cost(TokenUsage(input=9)) == make(web_search=1).cost(TokenUsage(input=9)) == 0
    assert make(tiers=[above(5, input=1)]).cost(TokenUsage(input=9)) > 0


def test_token_prices_are_measured_and_fixed_ones_are_not() -> None:
    """What tells the two apart is whether usage has a cost."""
    assert isinstance(KINDS, MeasuredPrice)
    assert isinstance(KINDS, TokenPrice)
    assert not isinstance(FixedPrice.of("0.5"), MeasuredPrice)


# -- tiers and directions -----------------------------------------------------------------------------------

TIERED = per_million_tokens(
    input=3, output=15, cached="0.3", tiers=[above(200_000, input=6, output="22.5"), above(500_000, input=10)]
)


@pytest.mark.parametrize(
    ("context", "rates"),
    [
        (0, (3, 15, "0.3")),
        (200_000, (3, 15, "0.3")),
        (200_001, (6, "22.5", "0.3")),
        (500_000, (6, "22.5", "0.3")),
        (500_001, (10, 15, "0.3")),
    ],
)
def test_price_all_tokens_in_the_tier_of_the_context(context: int, rates: tuple[int | str, ...]) -> None:
    """A request above a threshold costs the tier's prices for all of its tokens, the threshold itself not yet."""
    given, written, cached = map(Decimal, rates)
    usage = TokenUsage(input=context, cached=min(context, 1_000), output=100)
    plain = context - min(context, 1_000)
    assert TIERED.cost(usage) * 10**6 == plain * given + min(context, 1_000) * cached + 100 * written


def test_price_each_call_in_its_own_tier() -> None:
    """Two short requests stay below a threshold that their sum is above (S3.22)."""
    short = TokenUsage(input=150_000, output=10)
    billed = TIERED.bill((ModelCall(short, "a"), ModelCall(short, "b")))
    assert billed.amount == 2 * TIERED.cost(short) < TIERED.cost(short + short)
    assert [each.how for each in billed.calls] == ["price", "price"]
    assert TIERED.bill(()).amount == 0


def test_hold_for_the_dearest_tier_within_reach() -> None:
    """An estimate near a threshold is held for at the prices beyond it, and its output as if it were all reasoning."""
    near = TokenUsage(input=170_000, output=1_000)
    assert TIERED.cost_at_most(near) == TIERED.cost(near)
    assert TIERED.cost_at_most(near, Decimal("0.25")) * 10**6 == 170_000 * 6 + 1_000 * Decimal("22.5")
    thinking = per_token(input=1, output=2, reasoning=5)
    assert thinking.cost_at_most(TokenUsage(input=1, output=10)) == 51
    assert thinking.cost_at_most(TokenUsage()) == 0


@example(before=300_000, cents=5_000, kind="input")
@example(before=100_000, cents=900, kind="input")
@given(st.integers(0, 600_000), st.integers(0, 12_000), st.sampled_from(["input", "output", "reasoning"]))
def test_afford_across_tiers(before: int, cents: int, kind: str) -> None:
    """As many tokens fit as are affordable, and one more does not, whatever thresholds they cross."""
    units, used = Decimal(cents) / 1_000, TokenUsage(input=before)
    most = TIERED.affordable(kind, units, used)

    def with_more(count: int) -> Decimal:
        return TIERED.cost(used + (TokenUsage(input=count) if kind == "input" else TokenUsage(output=count)))

    if TIERED.cost(used) > units:
        assert most == 0
    else:
        assert with_more(most) <= units < with_more(most + 1)


@pytest.mark.parametrize(
    ("prices", "cost"),
    [
        ({}, 10 * 1 + 20 * 2),
        ({"audio_input": 5}, 4 * 5 + 6 * 1 + 20 * 2),
        ({"audio_output": 7}, 4 * 7 + 10 * 1 + 16 * 2),
        ({"audio_input": 5, "audio_output": 7}, 4 * 5 + 6 * 1 + 20 * 2),
    ],
)
def test_price_spoken_tokens(prices: dict[str, int], cost: int) -> None:
    """Audio tokens cost the price of their direction, once; where only one direction has a price it is that one."""
    spoken = per_token(input=1, output=2, **prices)  # type: ignore[arg-type]
    assert spoken.cost(TokenUsage(input=10, output=20, audio=4)) == cost


def test_price_spoken_tokens_by_the_direction_that_was_told() -> None:
    """What was spoken by the model costs its own price however long the prompt is, and nothing beyond its side."""
    spoken = per_token(input=1, output=2, audio_input=5, audio_output=7, tiers=[above(100, audio_output=70)])
    assert spoken.cost(TokenUsage(input=10, output=20, audio=4, audio_output=4)) == 10 + 16 * 2 + 4 * 7
    assert spoken.cost(TokenUsage(input=10, output=20, audio=4, audio_output=0)) == 6 + 4 * 5 + 20 * 2
    assert spoken.cost(TokenUsage(input=10, output=20, audio=50, audio_output=30)) == 10 * 5 + 20 * 7
    assert spoken.cost(TokenUsage(input=101, output=2, audio=2, audio_output=2)) == 101 + 2 * 70
    bound = TokenUsage(input=10, output=20, audio=20, audio_output=20)
    assert spoken.cost_at_most(bound) == spoken.cost(bound) == 10 + 20 * 7
    assert spoken.affordable("output", Decimal(10 + 20 * 7), TokenUsage(input=10)) == 20


def test_price_more_audio_than_input_as_output() -> None:
    """What is more than came in went out."""
    spoken = per_token(input=1, output=2, audio_input=5, audio_output=7)
    assert spoken.cost(TokenUsage(input=10, cached=8, output=20, audio=6)) == 8 + 2 * 5 + 4 * 7 + 16 * 2


def test_price_images_apart_from_text() -> None:
    """Images of either direction have prices of their own; output that nobody tells apart costs the dearer of both."""
    price = per_token(input=1, output=2, image_input=3, image_output=50)
    assert price.cost(TokenUsage(input=10, output=20, image_input=4, image_output=5)) == 6 + 4 * 3 + 15 * 2 + 5 * 50
    assert price.cost(TokenUsage(input=10, output=20, image_output=0)) == 10 + 20 * 2
    assert price.cost(TokenUsage(input=10, output=20)) == 10 + 20 * 50
    assert price.cost(TokenUsage(input=10, output=20, image_input=99, image_output=99)) == 10 * 3 + 20 * 50
    assert per_token(output=2, image_output=1).cost(TokenUsage(output=20)) == 20 * 2
    assert price.affordable("output", Decimal(100), TokenUsage()) == 2


def test_price_what_a_cache_keeps_for_an_hour() -> None:
    """It has a price of its own; by default it is to that of some minutes as 2 is to 1.25 (Anthropic)."""
    usage = TokenUsage(input=10, cache_write=6, cache_write_1h=4)
    assert per_token(input=1, cache_write=5, cache_write_1h=7).cost(usage) == 4 + 2 * 5 + 4 * 7
    assert per_token(input=1, cache_write=5).cost(usage) == 4 + 2 * 5 + 4 * 8
    assert per_token(input=1).cost(usage) == 10
    assert per_token(input=1, cache_write=5).cost(TokenUsage(input=6, cache_write=6, cache_write_1h=9)) == 6 * 8
    assert per_token(input=1, cache_write=5).affordable("input", Decimal(80), TokenUsage()) == 16
    assert per_token(input=1, cache_write=5, cache_write_1h=8).affordable("input", Decimal(80), TokenUsage()) == 10


def test_price_service_tiers_and_searches() -> None:
    """Tokens are multiplied in the tier that answered, by the provider's own factor first; searches are not."""
    price = per_token(input=1, services={"Flex": "0.5", "groq/flex": 1}, web_search=2)
    searched = {"web_searches": Decimal(3)}
    assert price.cost_of(ModelCall(TokenUsage(input=10), provider="openai", service="flex", units=searched)) == 5 + 6
    assert price.cost_of(ModelCall(TokenUsage(input=10), provider="groq", service="flex")) == 10
    assert price.cost_of(ModelCall(TokenUsage(input=10), service="gold")) == 10
    assert per_token(input=1).cost_of(ModelCall(TokenUsage(input=10), service="flex", units=searched)) == 10
    assert hash(price) != hash(per_token(input=1))
    for wrong in ({"": 1}, [("flex", 1)]):
        with pytest.raises(ConfigurationError, match="no factors"):
            per_token(input=1, services=wrong)  # type: ignore[arg-type]


def test_tell_of_seconds_that_tokens_have_no_price_for() -> None:
    """A voice that is counted by its seconds is free where tokens alone have a price, and that is told (S3.21)."""
    voice = ModelCall(TokenUsage(input=0, output=0), "transcriber", units={"seconds": Decimal("2.5")})
    words = ModelCall(TokenUsage(input=5, output=1), "talker")
    billed = per_token(input=1, output=10).bill((words, voice))
    assert (billed.amount, billed.flags) == (15, ("cost_unresolved",))
    assert per_token(input=1, output=10).bill((words,)).flags == ()


@pytest.mark.parametrize("starts", [(0,), (5, 5), (9, 5), (-1,), (1.5,), (True,)])
def test_refuse_tiers_that_do_not_rise(starts: tuple[int, ...]) -> None:
    """Thresholds that are no rising ints above 0 would price by chance."""
    with pytest.raises(ConfigurationError, match="do not rise"):
        per_token(tiers=[above(start, input=1) for start in starts])


def test_refuse_kinds_and_tiers_that_are_none() -> None:
    """An unknown kind of token, or a tier that is none, is told with the ones that there are."""
    with pytest.raises(ConfigurationError, match="no kind of token 'inputs'"):
        per_token(inputs=1)  # type: ignore[call-arg]
    with pytest.raises(ConfigurationError, match="tier 5 is none"):
        per_token(input=1, tiers=[5])  # type: ignore[list-item]
    with pytest.raises(AmountError):
        above(5, output=0.1)  # type: ignore[arg-type]
    with pytest.raises(AmountError):
        per_token(input=None)  # type: ignore[arg-type]

"""Prices of models by name: exact, offline, pinned, and never silently free."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from genai_prices import Usage
from genai_prices.types import ModelPrice, TieredPrices
from hypothesis import given
from hypothesis import strategies as st

from asgi_metering import TokenUsage
from asgi_metering.errors import AmountError, ConfigurationError, MissingExtraError
from asgi_metering.prices import (
    MAX_AFFORDABLE,
    BilledPrice,
    FixedPrice,
    MeasuredPrice,
    ModelCall,
    TokenPrice,
    model_prices,
    per_million_tokens,
    per_second,
    per_token,
    per_unit,
    published,
    published_version,
)
from asgi_metering.prices.aliases import candidates
from asgi_metering.prices.published import TOKENS, find_published, load_published

NOW = 1_795_000_000.0
"""In November 2026: published prices go by the date."""

OWN: dict[str, Any] = {
    "acme/large": per_token(input=2, output=3),
    "small": per_token(input=1, output=1),
    "free": per_token(input=0),
    "acme/painter": [per_unit(images=4), 1],
    "listener": [per_second("0.5"), per_token(input=1)],
}

USED = TokenUsage(input=10, output=5)


def own(**options: Any) -> Any:
    """Own prices alone, one unit for a USD."""
    return model_prices(OWN, **{"units_per_usd": 1, "published": False, **options})


def billed(prices: Any, *calls: ModelCall) -> Any:
    """What the calls cost now."""
    return prices.pin(NOW).bill(calls)


# -- by name --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "provider", "cost"),
    [
        ("acme/large", None, 35),
        ("large", None, 35),
        ("large", "acme", 35),
        ("router/acme/large", None, 35),
        ("large-2026-08-07", None, 35),
        ("acme/large-20260807", None, 35),
        ("large@20260807", "acme", 35),
        ("LARGE-latest", None, 35),
        ("small", None, 15),
        ("other/small", "other", 15),
        ("large:free", None, None),
        ("large-2026-13-07", None, None),
        ("larger", None, None),
        ("", None, None),
        (None, "acme", None),
    ],
)
def test_find_a_price_by_other_names(model: str | None, provider: str | None, cost: int | None) -> None:
    """A price of a prefixed id is that of the bare one, dates and prefixes of providers do not matter (S3.27)."""
    found = billed(own(), ModelCall(USED, model, provider))
    assert found.amount == (cost or 0)
    assert found.flags == (() if cost else ("unknown_model", "cost_unresolved"))


def test_find_the_exact_name_first() -> None:
    """A model with a price of its own is never priced by an alias, nor by that of another provider's (S3.27)."""
    prices = model_prices(
        {"a/m": per_token(input=1), "b/m": per_token(input=2), "m-2026-01-01": per_token(input=3)},
        units_per_usd=1,
        published=False,
        aliases={"m-2026-01-01": "a/m", "mm": "b/m", "b/m": "a/m"},
    )
    costs = {
        (model, provider): billed(prices, ModelCall(TokenUsage(input=1), model, provider)).amount
        for model, provider in (
            ("m-2026-01-01", None),
            ("mm", None),
            ("b/m", None),
            ("m", "a"),
            ("m", "b"),
            ("m", None),
        )
    }
    # The bare name stands for two of them, so it names neither.
    assert list(costs.values()) == [3, 2, 2, 1, 2, 0]


def test_ask_a_function_for_aliases(caplog: pytest.LogCaptureFixture) -> None:
    """A hook names models, one that fails is told and passed over, and one that answers nonsense too (S3.27)."""

    def alias(model: str, provider: str | None) -> Any:
        return {"deployment-7": "acme/large", "number": 7}[model] if provider == "azure" else None

    prices = own(aliases=alias)
    assert billed(prices, ModelCall(USED, "deployment-7", "azure")).amount == 35
    assert billed(prices, ModelCall(USED, "deployment-7")).amount == 0
    assert billed(prices, ModelCall(USED, "number", "azure")).amount == 0
    assert not caplog.records
    assert billed(prices, ModelCall(USED, "broken", "azure")).amount == 0
    assert "alias of model 'broken'" in caplog.text


def test_candidates_end_with_what_is_least_like_the_name() -> None:
    """A name is looked for as it is, without providers, without its date, and in small letters last."""
    assert candidates("R/Acme/M-20260101") == (
        "R/Acme/M-20260101",
        "Acme/M-20260101",
        "M-20260101",
        "R/Acme/M",
        "Acme/M",
        "M",
        "r/acme/m-20260101",
        "acme/m-20260101",
        "m-20260101",
        "r/acme/m",
        "acme/m",
        "m",
    )


def test_price_unknown_models_by_the_default() -> None:
    """A model without a name that is known costs the default, and the event says so: it is never free in silence."""
    prices = own(default=per_token(input=10, output=10))
    found = billed(prices, ModelCall(USED, "nobody's"), ModelCall(USED, "small"))
    assert found.amount == 150 + 15
    assert found.flags == ("unknown_model", "default_price")
    assert [each.flags for each in found.calls] == [("unknown_model", "default_price"), ()]
    assert prices.cost(USED) == prices.pin(NOW).cost(USED) == 150
    assert prices.affordable("output", Decimal(1_000), TokenUsage()) == 100


def test_price_of_nothing_is_nothing() -> None:
    """Without a call, or of one that used nothing, nothing is charged or doubted, whatever the model (S3.23)."""
    prices = own(fee=1)
    assert billed(prices).amount == 0
    empty = billed(prices, ModelCall(TokenUsage(input=0, output=0), "nobody's"), ModelCall())
    assert (empty.amount, empty.flags) == (0, ())


def test_free_models_are_known() -> None:
    """A price of 0 is a price: its calls are charged nothing but the fee, and nobody is alarmed (S3.22)."""
    found = billed(own(fee=1), ModelCall(USED, "free"), ModelCall(USED, "small"), ModelCall(USED, "free"))
    assert (found.amount, found.flags, len(found.calls)) == (16, (), 3)


# -- what tells the cost --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "how", "cost"),
    [
        (ModelCall(USED, "small", cost=Decimal("0.7"), hidden_cost=Decimal("0.6")), "reported", "0.7"),
        (ModelCall(USED, "small", hidden_cost=Decimal("0.6")), "hidden", "0.6"),
        (ModelCall(USED, "small", cost=Decimal(0), hidden_cost=Decimal("0.6")), "hidden", "0.6"),
        (ModelCall(USED, "small", cost=Decimal(0)), "response", "15"),
        (ModelCall(USED, "small", estimated=True), "tokens", "15"),
        (ModelCall(units={"images": Decimal(2)}, model="painter", is_media=True), "response", "9"),
        (ModelCall(USED, "small", is_media=True), "response", "15"),
        (ModelCall(USED, "small", is_media=True, estimated=True), "", "0"),
        (ModelCall(USED, "small", is_media=True, cost=Decimal("0.1")), "reported", "0.1"),
        (ModelCall(TokenUsage(input=1), "listener", units={"seconds": Decimal("1.5")}), "response", "1.75"),
    ],
)
def test_take_the_first_cost_above_nothing(call: ModelCall, how: str, cost: str) -> None:
    """Reported, hidden, computed from the answer, computed from tokens, which never price an image (S3.20)."""
    (found,) = billed(own(), call).calls
    assert (found.how, found.cost) == (how, Decimal(cost))
    assert found.flags == (() if how else ("cost_unresolved",))


@pytest.mark.parametrize(
    "call",
    [
        ModelCall(USED, "small", is_media=True, estimated=True),
        ModelCall(USED, "painter", units={"seconds": Decimal(1)}),
        ModelCall(units={"seconds": Decimal(1)}, model="small"),
    ],
)
def test_doubt_a_cost_that_nothing_tells(call: ModelCall) -> None:
    """What was used and has no price is flagged, also where a part of it has one by chance (S3.20)."""
    found = billed(model_prices({**OWN, "painter": per_unit(images=4)}, units_per_usd=1, published=False), call)
    assert (found.amount, found.flags) == (0, ("cost_unresolved",))


@pytest.mark.parametrize("cost", [Decimal("1000.01"), Decimal("1e30"), Decimal(-1), Decimal("Infinity")])
def test_refuse_a_cost_that_nobody_believes(cost: Decimal) -> None:
    """An absurd report is passed over for the next that tells a cost, and flagged (S3.21)."""
    found = billed(own(), ModelCall(USED, "small", cost=cost))
    assert (found.amount, found.flags, found.calls[0].how) == (15, ("cost_refused",), "response")
    alone = billed(own(order=["reported"]), ModelCall(USED, "small", cost=cost))
    assert (alone.amount, alone.flags) == (0, ("cost_refused", "cost_unresolved"))


def test_refuse_a_cost_of_nan() -> None:
    """What is no number at all is refused likewise, and raises nothing (S3.21)."""
    found = billed(own(), ModelCall(USED, "small", cost=Decimal("NaN")))
    assert (found.amount, found.flags) == (15, ("cost_refused",))


def test_leave_out_what_providers_report() -> None:
    """Prices alone count where the order says so, and its own order is another one."""
    call = ModelCall(USED, "small", cost=Decimal(7))
    assert billed(own(order=["response", "tokens"]), call).amount == 15
    assert billed(own(order=["response", "reported"]), call).amount == 15
    assert billed(own(), call).amount == 7
    assert billed(own(order=["reported"]), ModelCall(USED, "small")).flags == ("cost_unresolved",)


def test_sum_exactly_and_convert_once() -> None:
    """The costs of all calls are added in USD, marked up, converted, and the fee is added once (S3.22)."""
    third = ModelCall(cost=Decimal("0.0000003333"))
    found = billed(own(units_per_usd="1000", markup="1.25", fee="0.01"), third, third, third)
    assert found.amount == 3 * Decimal("0.0000003333") * 1250 + Decimal("0.01")
    assert [each.cost for each in found.calls] == [third.cost] * 3


# -- what is pinned -------------------------------------------------------------------------------------------


def test_hold_by_the_model_that_was_asked_for() -> None:
    """What a call costs at first, and what it can afford, go by the model of the request."""
    pinned = own(units_per_usd=10, markup=2, fee=3).pin(NOW, "large")
    assert pinned.cost(USED) == pinned.cost_at_most(USED) == 35 * 20 + 3
    assert pinned.affordable("output", Decimal(703), TokenUsage(input=10)) == 5
    assert pinned.affordable("output", Decimal(762), TokenUsage(input=10)) == 5
    assert pinned.affordable("output", Decimal(2), TokenUsage()) == 0
    assert pinned.is_known
    painter = own().pin(NOW, "painter")
    assert painter.cost_at_most(USED) == painter.cost(USED) == 1
    assert painter.affordable("output", Decimal(1), USED) == MAX_AFFORDABLE
    unknown = own().pin(NOW, "nobody's")
    assert (unknown.is_known, unknown.tokens, unknown.cost(USED)) == (False, None, 0)
    assert own(markup=0).pin(NOW, "large").affordable("output", Decimal(1), USED) == MAX_AFFORDABLE


@given(st.integers(1, 10**6), st.integers(1, 10**4), st.integers(0, 10**4))
def test_afford_what_fits_behind_a_conversion(parts: int, rate: int, before: int) -> None:
    """As many tokens fit as are affordable in units, and one more does not."""
    prices = model_prices({"m": per_million_tokens(input=3, output=7)}, units_per_usd=rate, published=False)
    pinned, units = prices.pin(NOW, "m"), Decimal(parts) / 1_000
    used = TokenUsage(input=before)
    most = pinned.affordable("output", units, used)
    if pinned.cost(used) <= units:
        assert pinned.cost(TokenUsage(input=before, output=most)) <= units
        assert pinned.cost(TokenUsage(input=before, output=most + 1)) > units
    else:
        assert most == 0


def test_name_prices_by_all_that_they_are() -> None:
    """Any other price, rate or order is another version, the same ones are the same, and a name may be given."""
    versions = {own(**options).version for options in ({}, {"markup": 2}, {"fee": 1}, {"order": ["tokens"]})}
    assert len(versions) == 4
    assert own().version == own().version
    assert own(version="2026-11").version == own(version="2026-11").pin(NOW).version == "2026-11"
    assert model_prices(units_per_usd=1).version.startswith(f"{published_version()}+")


def test_be_prices_as_others_are() -> None:
    """They are measured, and asked about each call by itself."""
    for price in (own(), own().pin(NOW)):
        assert isinstance(price, MeasuredPrice)
    assert isinstance(own().pin(NOW), BilledPrice)


# -- misuse ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"units_per_usd": 0.5}, AmountError),
        ({"units_per_usd": 0}, AmountError),
        ({"markup": "NaN"}, AmountError),
        ({"fee": -1}, AmountError),
        ({"default": 0.5}, AmountError),
        ({"order": ["reported", "guessed"]}, ConfigurationError),
        ({"order": ["reported", "reported"]}, ConfigurationError),
        ({"order": []}, ConfigurationError),
        ({"aliases": 7}, ConfigurationError),
        ({"default": [per_token(input=1), per_token(input=2)]}, ConfigurationError),
        ({"default": lambda: 1}, ConfigurationError),
    ],
)
def test_refuse_what_cannot_work(wrong: dict[str, Any], error: type[Exception]) -> None:
    """Floats, NaN, orders of nothing and prices of nobody are refused where they are written (S3.21)."""
    with pytest.raises(error):
        own(**wrong)


def test_refuse_models_without_a_name() -> None:
    """A price belongs to a name."""
    for name in ("", None, 7):
        with pytest.raises(ConfigurationError, match="has no name"):
            model_prices({name: 1}, units_per_usd=1, published=False)  # type: ignore[dict-item]


def test_take_fixed_prices_for_each_call() -> None:
    """An amount, also as a `FixedPrice`, is for each call of a model."""
    prices = model_prices({"m": [FixedPrice(Decimal(2)), "0.5"]}, units_per_usd=1, published=False)
    assert billed(prices, ModelCall(USED, "m"), ModelCall(USED, "m")).amount == 5


def test_hold_and_afford_the_amount_for_each_call() -> None:
    """What is taken for each call, as search models have it, is in the hold, and never spent on tokens (DESIGN 4)."""
    prices = model_prices({"m": [per_token(input=1, output=2), 3]}, units_per_usd=10, fee=1, published=False)
    pinned = prices.pin(NOW, "m")
    assert pinned.cost_at_most(USED) == pinned.cost(USED) == 10 * (20 + 3) + 1
    assert pinned.affordable("output", Decimal(231), TokenUsage(input=10)) == 5
    assert pinned.affordable("output", Decimal(30), TokenUsage()) == 0


def test_price_an_answer_without_a_model_as_the_one_that_was_asked_for() -> None:
    """Cohere and Bedrock name no model: what they answer is neither free nor charged by the default."""
    for prices in (own(), own(default=per_token(input=10, output=10))):
        found = prices.pin(NOW, "large").bill((ModelCall(USED), ModelCall(USED, "small")))
        assert (found.amount, found.flags) == (35 + 15, ())
        assert [each.call.model for each in found.calls] == ["large", "small"]
    assert own().pin(NOW).bill((ModelCall(USED),)).flags == ("unknown_model", "cost_unresolved")


# -- published prices -----------------------------------------------------------------------------------------


def test_price_the_vectors_of_the_published_data() -> None:
    """The published price of a model counts cached input apart, and has its long context (S3.18)."""
    prices = model_prices(units_per_usd=1)
    for usage, model, cost in (
        (TokenUsage(input=1_000, output=100, cached=400), "gpt-4o", "0.0030"),
        (TokenUsage(input=425, output=15, cached=400), "claude-sonnet-4-5", "0.000420"),
        (TokenUsage(input=1_000_000, output=0), "anthropic/claude-sonnet-4-5-20250929", "6.0"),
    ):
        assert prices.pin(NOW, model).cost(usage) == Decimal(cost)


def everything_published() -> Any:
    """Each model of the data that has a price of tokens, with that price now."""
    at = datetime.fromtimestamp(NOW, UTC)
    for provider in load_published().providers:
        for model in provider.models:
            price = model.get_prices(at)
            if any(name in TOKENS for name, value in vars(price).items() if value is not None):
                yield provider, model, price


@pytest.mark.uncounted
def test_agree_with_the_publisher_on_every_model() -> None:
    """Every published price of tokens, in every tier, costs here what the package itself says that it costs."""
    seen = tiered = 0
    for _, model, price in everything_published():
        rate = published._rate(published._Same(price))
        assert isinstance(rate.tokens, TokenPrice)
        starts = {
            tier.start for value in vars(price).values() if isinstance(value, TieredPrices) for tier in value.tiers
        }
        for context in {1_000, *starts, *(start + 1 for start in starts)}:
            usage = TokenUsage(input=context, cached=300, cache_write=200, output=70, reasoning=30, image_output=0)
            theirs = Usage(input_tokens=context, cache_read_tokens=300, cache_write_tokens=200, output_tokens=70)
            if "output_reasoning_mtok" in vars(price):
                theirs.output_reasoning_tokens = 30
            # What the data has no price for, they charge nothing for, and we the price of what it is a part of.
            expected = price.calc_price(theirs)["total_price"]
            seen += 1
            tiered += bool(starts)
            assert rate.tokens.cost(usage) + rate.call == expected, (model.id, context)
    assert seen > 2_000
    assert tiered > 200


def test_change_with_the_date_of_the_admission() -> None:
    """A price that changes on a day is the old one for a call that was admitted before it."""
    changed = [
        (provider, model, price.constraint.start_date)
        for provider in load_published().providers
        for model in provider.models
        if not isinstance(model.prices, ModelPrice)
        for price in model.prices
        if price.constraint is not None and hasattr(price.constraint, "start_date")
    ]
    provider, model, day = changed[0]
    found = find_published(model.id, provider.id)
    assert found is not None
    begins = datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()
    assert found.rate(begins - 1) != found.rate(begins)
    assert found.rate(begins) is found.rate(begins + 1)


def test_find_published_models_by_their_names() -> None:
    """A model is found with its provider, without one, and behind a provider that has none of that name."""
    names = [("gpt-4o", None), ("gpt-4o", "openai"), ("gpt-4o", "my gateway"), ("openai/gpt-4o-2024-08-06", None)]
    prices = model_prices(units_per_usd=1)
    found = {prices.lookup(name, provider, NOW).rate for name, provider in names}
    assert len(found) == 1
    assert find_published("x" * 300, None) is find_published("", None) is None
    assert prices.lookup("no-such-model", "openai", NOW).rate is None


CITED = {"web_searches": Decimal(20), "citation_tokens": Decimal(20_016)}


@pytest.mark.parametrize(
    ("model", "estimated", "cost", "flags"),
    [
        ("sonar-deep-research", False, "0.77891", ()),
        ("sonar-deep-research", True, "0.77891", ()),
        # A price for each request has its searches and citations in it.
        ("sonar-pro", False, "3.029084", ()),
        ("sonar-pro-search", False, "3.215084", ("unpriced_citations",)),
    ],
)
def test_price_what_a_search_engine_counts(model: str, estimated: bool, cost: str, flags: tuple[str, ...]) -> None:
    """Reasoning, citations and searches cost what is published of each; citations without a price are told of."""
    usage = TokenUsage(33, 7_163 + 193_836, reasoning=193_836)
    call = ModelCall(usage, model, "perplexity", units=CITED, estimated=estimated)
    found = billed(model_prices(units_per_usd=1), call)
    assert (found.amount, found.flags) == (Decimal(cost), flags)


def test_price_published_media() -> None:
    """What is published by the hour, characters or searches is priced by units; images never by tokens (S3.20)."""
    prices = model_prices(units_per_usd=1)
    heard = billed(prices, ModelCall(units={"seconds": Decimal(3_600)}, model="whisper-1", provider="openai"))
    assert (heard.amount, heard.flags) == (Decimal("0.36"), ())
    drawn = published._rate(published._Same(ModelPrice(input_mtok=Decimal(1), output_image_mtok=Decimal(9))))
    assert drawn.is_media
    counted = ModelCall(TokenUsage(input=5, output=9), "gemini-2.5-flash-image", "google", estimated=True)
    assert (billed(prices, counted).amount, billed(prices, counted).flags) == (0, ("cost_unresolved",))
    called = published._rate(published._Same(ModelPrice(requests_kcount=Decimal(5))))
    assert (called.call, called.tokens) == (Decimal("0.005"), None)
    assert published._Same(ModelPrice()) != 1


@pytest.mark.parametrize(
    ("model", "told", "cost", "flags"),
    [
        # USD for a million: 0.3 in, 2.5 for text, 30 for images.
        ("gemini-2.5-flash-image", {"image_output": 1_290}, 10 * "0.3 " + 10 * "2.5 " + 1_290 * "30 ", ()),
        ("gemini-2.5-flash-image", {"image_output": 0}, 10 * "0.3 " + 1_300 * "2.5 ", ()),
        ("gemini-2.5-flash-image", {}, 10 * "0.3 " + 1_300 * "30 ", ("dearest_kind",)),
        # 5 in, 8 for images in, 10 for text, 32 for images.
        ("gpt-image-1.5", {"image_input": 4, "image_output": 1_300}, 6 * "5 " + 4 * "8 " + 1_300 * "32 ", ()),
        # One hour: 6, five minutes: 3.75.
        ("claude-sonnet-4-5", {"cache_write": 10, "cache_write_1h": 4}, 6 * "3.75 " + 4 * "6 " + 1_300 * "15 ", ()),
    ],
)
def test_price_every_kind_of_token_that_was_reported(
    model: str, told: dict[str, int], cost: str, flags: tuple[str, ...]
) -> None:
    """No kind of token is free by omission: without a price or a count of its own it costs as the dearest (S3.20)."""
    billed_now = billed(model_prices(units_per_usd=1), ModelCall(TokenUsage(input=10, output=1_300, **told), model))
    assert billed_now.amount == sum(map(Decimal, cost.split())) / 10**6
    assert billed_now.flags == flags


@pytest.mark.parametrize(
    ("call", "cost", "flags"),
    [
        (ModelCall(USED, "small", "openai", service="default"), "15", ()),
        (ModelCall(USED, "small", "openai", service="flex"), "7.5", ()),
        (ModelCall(USED, "small", "groq", service="flex"), "15", ()),
        (ModelCall(USED, "small", "openai", service="priority"), "30", ()),
        (ModelCall(USED, "small", "anthropic", service="priority"), "15", ()),
        (ModelCall(USED, "small", service="turbo"), "15", ("unknown_service",)),
        (ModelCall(USED, "small", service="gold"), "45", ()),
        (ModelCall(USED, "small", service="turbo", cost=Decimal(2)), "2", ()),
        (ModelCall(USED, "served", service="flex"), "3.75", ()),
        (ModelCall(USED, "served", service="priority"), "30", ()),
        (ModelCall(USED, "small", units={"web_searches": Decimal(3)}), "15.06", ()),
        (ModelCall(USED, "served", units={"web_searches": Decimal(3)}), "24", ()),
        (ModelCall(USED, "finder", units={"web_searches": Decimal(3)}), "36", ()),
        (ModelCall(units={"web_searches": Decimal(3)}, model="small"), "0.06", ()),
        (ModelCall(USED, "small", units={"web_searches": Decimal(3)}, estimated=True), "15.06", ()),
        (ModelCall(USED, "served", units={"web_searches": Decimal(3)}, estimated=True), "24", ()),
        (ModelCall(USED, "finder", units={"web_searches": Decimal(3)}, estimated=True), "36", ()),
    ],
)
def test_price_service_tiers_and_searches(call: ModelCall, cost: str, flags: tuple[str, ...]) -> None:
    """Tokens of a service tier cost their factor, an unknown one is told, and no search is free (S3.20)."""
    names = {
        "small": per_token(input=1, output=1),
        "served": per_token(input=1, output=1, services={"flex": "0.25"}, web_search=3),
        "finder": [per_token(input=1, output=1), per_unit(web_searches=7)],
    }
    prices = model_prices(names, units_per_usd=1, published=False, services={"Gold": 3}, web_search="0.02")
    found = billed(prices, call)
    assert (found.amount, found.flags) == (Decimal(cost), flags)


def test_hold_for_service_tiers_and_searches() -> None:
    """A hold covers the dearer tier that was asked for and searches that were allowed; a cheaper one is no relief."""
    own_price = per_token(input=1, output=1, services={"flex": "0.5", "priority": 2}, web_search=3)
    assert own_price.cost_at_most(USED, service="priority", searches=2) == 30 + 6
    assert own_price.cost_at_most(USED, service="flex") == own_price.cost_at_most(USED, service="?") == 15
    names = {"small": per_token(input=1, output=1), "finder": [per_token(input=1, output=1), per_unit(web_searches=7)]}
    prices = model_prices(names, units_per_usd=1, published=False, fee="0.5")
    assert prices.pin(NOW, "small").cost_at_most(USED, service="priority", searches=2) == Decimal("30.52")
    assert prices.pin(NOW, "finder").cost_at_most(USED, searches=2) == Decimal("29.5")
    # What they cost alone: by the list, by the model's own units, and nothing where nobody knows the model.
    assert [prices.pin(NOW, name).searching(2) for name in ("small", "finder", "x")] == [Decimal("0.02"), 14, 0]
    finder = model_prices({"finder": per_unit(web_searches=7)}, units_per_usd=1, published=False)
    assert finder.pin(NOW, "finder").searching(2) == 14
    assert prices.pin(NOW, "small", "anthropic").cost_at_most(USED, service="priority") == Decimal("15.5")
    assert prices.pin(NOW, "small", "acme").cost_at_most(USED, service="?") == Decimal("15.5")
    mine = per_token(input=1, output=1, services={"acme/gold": 4, "gold": 2})
    assert model_prices({"m": mine}, units_per_usd=1, published=False).pin(NOW, "m").dearer("gold") == 4
    assert (prices.pin(NOW, "none").dearer("fast"), own_price.dearer(None), own_price.dearer("flex")) == (6, 1, 1)


def test_prefer_own_prices_to_published_ones() -> None:
    """A price of one's own stands before the published one of the same name."""
    prices = model_prices({"gpt-4o": per_token(input=1)}, units_per_usd=1)
    assert prices.pin(NOW, "gpt-4o").cost(TokenUsage(input=2)) == 2
    assert prices.pin(NOW, "gpt-4o-2024-08-06").cost(TokenUsage(input=2)) == 2
    assert prices.pin(NOW, "gpt-4o-mini").cost(TokenUsage(input=2)) < 1


def test_never_ask_the_network() -> None:
    """Published prices load and count where every socket is refused, and no updater of theirs runs (S3.18)."""
    program = """
import sys, threading

def refuse(event, arguments):
    if event.startswith("socket."):
        raise RuntimeError(event)

sys.addaudithook(refuse)
from asgi_metering import TokenUsage
from asgi_metering.prices import model_prices
assert "genai_prices" not in sys.modules
prices = model_prices(units_per_usd=1)
assert prices.pin(1_795_000_000.0, "gpt-4o").cost(TokenUsage(input=1_000_000)) == 2.5
from genai_prices import data_snapshot
data_snapshot.set_custom_snapshot(data_snapshot.DataSnapshot(providers=[], from_auto_update=True))
assert prices.pin(1_795_000_000.0, "gpt-4o").cost(TokenUsage(input=1_000_000)) == 2.5
assert threading.active_count() == 1
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_load_the_data_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The data is read where a price is first looked for, and is the same for everybody after."""
    monkeypatch.setattr(published, "_snapshots", [])
    assert load_published() is load_published()
    assert find_published("gpt-4o", None) is not None


def test_name_the_extra_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package the prices are refused where they are written, with the command that brings it."""
    monkeypatch.setattr(published, "_snapshots", [])
    monkeypatch.setitem(sys.modules, "genai_prices.data", None)
    with pytest.raises(MissingExtraError, match=r"asgi-metering\[prices\]"):
        model_prices(units_per_usd=1)
    assert own().version

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(MissingExtraError, match=r"asgi-metering\[prices\]"):
        published_version()

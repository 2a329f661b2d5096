"""Prices of what is no token: units that are reported, what a request asks for, and functions."""

from __future__ import annotations

import asyncio
import functools
import io
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.datastructures import UploadFile
from starlette.requests import Request

from asgi_metering import TokenUsage
from asgi_metering.errors import AmountError, ConfigurationError, UsageError
from asgi_metering.prices import (
    MAX_AFFORDABLE,
    BilledPrice,
    MeasuredPrice,
    ModelCall,
    by_usage,
    per_hour,
    per_image,
    per_million_characters,
    per_minute,
    per_second,
    per_unit,
)
from asgi_metering.prices.costing import MAX_BREAKDOWN, CostedCall, breakdown, read_units

USED = TokenUsage(input=3, output=4)


def units(**counts: Any) -> ModelCall:
    """A call that reported so much of each."""
    return ModelCall(units=read_units(counts))


# -- units ----------------------------------------------------------------------------------------------------


def test_price_hours() -> None:
    """Hours are priced by the seconds that are reported."""
    assert per_hour("1.2").bill((units(seconds=90),)).amount == Decimal("0.03")


@pytest.mark.parametrize(
    ("price", "call", "cost"),
    [
        (per_unit(images="0.04", searches=1), units(images=2, searches=3, other=9), "3.08"),
        (per_unit({"1024 hd": "0.08"}), units(**{"1024 hd": 2}), "0.16"),
        (per_second("0.5"), units(seconds="1.5"), "0.75"),
        (per_minute("0.006"), units(seconds=90), "0.009"),
        (per_hour(36), units(seconds="0.1"), "0.001"),
        (per_second(2, of="gpu_seconds"), units(gpu_seconds=3), "6"),
        (per_unit(images=1), ModelCall(USED), "0"),
    ],
)
def test_price_units_by_their_names(price: Any, call: ModelCall, cost: str) -> None:
    """What is reported by a name costs that name's price, parts of a unit as parts, and other names nothing (S3.19)."""
    billed = price.bill((call, call))
    assert billed.amount == 2 * Decimal(cost)
    assert [each.cost for each in billed.calls] == [Decimal(cost)] * 2
    assert price.cost(USED) == 0
    assert isinstance(price, MeasuredPrice)
    assert isinstance(price, BilledPrice)
    assert hash(price)


@pytest.mark.parametrize(
    ("reported", "flags"),
    [({"item": 3}, ("unpriced_units",)), ({"item": 3, "items": 0}, ()), ({}, ())],
    ids=["misspelt", "beside a priced one", "none"],
)
def test_doubt_units_without_a_price(reported: dict[str, int], flags: tuple[str, ...]) -> None:
    """Where units are reported and none of them has a price, the cost of nothing says so (S2.11)."""
    calls = (ModelCall(units=read_units(reported)), ModelCall(USED))
    assert per_unit(items=2).bill(calls).flags == flags


def test_afford_units() -> None:
    """As many whole ones fit as the hold pays for; tokens cost nothing, and another name is refused."""
    assert per_minute("0.6").affordable("seconds", Decimal("0.1"), USED) == 10
    assert per_unit(images=0).affordable("images", Decimal(1), USED) == MAX_AFFORDABLE
    assert per_unit(images=2).affordable("images", Decimal(-1), USED) == 0
    assert per_unit(images=2).affordable("output", Decimal(1), USED) == MAX_AFFORDABLE
    assert per_unit(output=2).affordable("output", Decimal(9), USED) == 4
    with pytest.raises(ConfigurationError, match="Ask for 'images'"):
        per_unit(images=2).affordable("seconds", Decimal(1), USED)


def test_refuse_units_without_a_name_or_a_price() -> None:
    """Nothing, no name and no amount are no prices."""
    for wrong in ({}, {"": 1}, {7: 1}):
        with pytest.raises(ConfigurationError):
            per_unit(wrong)  # type: ignore[arg-type]
    with pytest.raises(AmountError):
        per_second(0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("told", "error"),
    [
        ({"seconds": 0.5}, AmountError),
        ({"seconds": -1}, AmountError),
        ({"seconds": "NaN"}, AmountError),
        ({"seconds": 10**13}, UsageError),
        ({"": 1}, UsageError),
        ({7: 1}, UsageError),
        ({"x" * 65: 1}, UsageError),
        ({str(each): 1 for each in range(51)}, UsageError),
        ([("seconds", 1)], UsageError),
    ],
)
def test_refuse_units_that_nobody_used(told: Any, error: type[Exception]) -> None:
    """Floats, NaN, negative and absurd counts are refused where they are reported (S3.21)."""
    with pytest.raises(error):
        read_units(told)


# -- the breakdown --------------------------------------------------------------------------------------------


def test_break_down_by_model() -> None:
    """Tokens and cost are summed by model, the dearest first, and each call is JSON by itself (S3.27)."""
    calls = [
        CostedCall(ModelCall(USED, "a", "p", units=read_units({"images": 1})), Decimal("0.10"), "response"),
        CostedCall(ModelCall(TokenUsage(input=1), "a"), Decimal("0.2"), "reported"),
        CostedCall(ModelCall(TokenUsage(output=5)), Decimal(9), "response", ("unknown_model",)),
        CostedCall(ModelCall(TokenUsage(output=0), "b"), Decimal(1), "response"),
    ]
    assert breakdown(calls) == (
        '{"b":{"calls":1,"cost":"1","output":0},"a":{"calls":2,"cost":"0.3","input":4,"output":4},'
        '"_OTHER":{"calls":1,"cost":"9","output":5}}'
    )
    assert calls[0].to_dict() == {
        "model": "a",
        "provider": "p",
        "cost": "0.10",
        "how": "response",
        "input": 3,
        "output": 4,
        "units": {"images": "1"},
        "flags": [],
    }
    assert breakdown([]) == "{}"


def test_break_down_many_models_into_the_room_that_there_is() -> None:
    """However many models a call used, the text stays whole: the cheapest are summed as one."""
    calls = [CostedCall(ModelCall(USED, f"model-{each:03}"), Decimal(each), "response") for each in range(200)]
    text = breakdown(calls)
    assert len(text) <= MAX_BREAKDOWN
    assert text.startswith('{"model-199":{"calls":1,"cost":"199","input":3,"output":4}')
    assert '"_OTHER":{"calls":1' in text
    assert breakdown([CostedCall(ModelCall(USED, "x" * 2_000), Decimal(1), "")]).startswith('{"_OTHER"')


# -- what the request asks for --------------------------------------------------------------------------------


def asked(price: Any, **arguments: Any) -> Decimal:
    """What a request with these arguments costs."""
    answer: Decimal = asyncio.run(price(**arguments))
    return answer


IMAGES = per_image({("1024", "hd"): "0.08", "1024": "0.04", ("512", "hd"): "0.5"})


@pytest.mark.parametrize(
    ("body", "cost"),
    [
        ({"size": "1024", "quality": "hd", "n": 3}, "0.24"),
        ({"size": "1024", "quality": "low"}, "0.04"),
        ({"size": "1024"}, "0.04"),
        ({"size": "512"}, "0.5"),
        ({"size": "4096", "n": "2"}, "1.0"),
        ({"prompt": "a cat"}, "0.5"),
        (SimpleNamespace(size="1024", quality="hd", n=None), "0.08"),
    ],
)
def test_price_the_images_that_are_asked_for(body: Any, cost: str) -> None:
    """So many of a size and quality cost so much; what no price fits costs the dearest (S3.19)."""
    assert asked(IMAGES, settings=7, body=body) == Decimal(cost)


def test_price_images_by_fields_of_a_form() -> None:
    """The endpoint's own parameters may be the fields; one price may be for every image."""
    assert asked(IMAGES, size="1024", quality="hd", n=2) == Decimal("0.16")
    assert asked(per_image("0.05"), prompt="a cat", n=2) == Decimal("0.10")
    assert asked(per_image({"1024": 1}, otherwise=7), size="none") == 7
    assert asked(IMAGES, image=UploadFile(io.BytesIO(), size=7), size="1024", quality="hd", n=10) == Decimal("0.80")
    assert asked(per_image({"flux": 1, "sdxl": 2}, by=("model",)), body={"model": "sdxl"}) == 2


@pytest.mark.parametrize("count", [0, -1, 1_001, 1.0, True, "9" * 5_000, "two", [1]])
def test_refuse_numbers_of_images_that_are_none(count: Any) -> None:
    """A number that no provider makes images for is refused before anything is held (S3.21)."""
    with pytest.raises(UsageError, match="cannot be asked for"):
        asked(IMAGES, body={"size": "1024", "n": count})


def test_refuse_prices_of_images_that_cannot_be() -> None:
    """No price at all, one by more fields than there are, and floats are refused where they are written."""
    for wrong in ({}, {("1024", "hd", "x"): 1}):
        with pytest.raises(ConfigurationError):
            per_image(wrong)
    with pytest.raises(AmountError):
        per_image(0.5)  # type: ignore[arg-type]
    with pytest.raises(AmountError):
        per_image("0.5", otherwise=0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "cost"), [("äöü" * 1_000, "0.045"), (["ab", "cd", 7], "0.00006"), (None, "0"), ("", "0")]
)
def test_price_characters_of_the_text(text: Any, cost: str) -> None:
    """Speech costs by the characters of its text, whatever their bytes (S3.19)."""
    assert asked(per_million_characters(15), body={"input": text, "voice": "x"}) == Decimal(cost)


def test_price_what_a_raw_request_asks_for() -> None:
    """A request that the endpoint takes whole is read as JSON, and one that is none costs the price of no field."""

    def request(body: bytes) -> Request:
        async def receive() -> Any:
            return {"type": "http.request", "body": body}

        return Request({"type": "http", "method": "POST", "headers": []}, receive)

    assert asked(IMAGES, request=request(b'{"size": "1024", "n": 2}')) == Decimal("0.08")
    assert asked(IMAGES, request=request(b"size=1024")) == Decimal("0.5")


# -- functions ------------------------------------------------------------------------------------------------


def billed(price: Any, *calls: ModelCall, context: object = None) -> Any:
    """What the calls cost by the function."""

    async def bill() -> Any:
        answer = price.bill(calls, context)
        return answer if hasattr(answer, "amount") else await answer

    return asyncio.run(bill())


def test_ask_a_function_of_usage() -> None:
    """A function gets what it names: the sum, each call, the metered call; it may be async."""
    seen: list[Any] = []

    async def slow(usage: TokenUsage, calls: Any, call: Any) -> str:
        seen.append((usage, calls, call))
        return "0.25"

    class Counting:
        async def __call__(self, calls: Any, factor: int = 2) -> int:
            return factor * len(calls)

    one, two = ModelCall(USED, "a"), ModelCall(USED, "b")
    assert billed(by_usage(lambda usage: usage.total * 2), one).amount == 14
    found = billed(by_usage(slow), one, two, context="the call")
    assert seen == [(USED + USED, (one, two), "the call")]
    assert (found.amount, [each.cost for each in found.calls]) == (Decimal("0.25"), [0, 0])
    assert billed(by_usage(Counting()), one, two).amount == 4
    assert [each.cost for each in billed(by_usage(lambda: 3), one).calls] == [3]
    assert billed(by_usage(lambda: 3)).amount == 3


def test_hold_by_a_function_that_can_be_asked_before() -> None:
    """One of usage alone prices an estimate; one that needs the call, or waits, is known at the end alone."""

    async def slow(usage: TokenUsage) -> int:
        return 1

    assert by_usage(lambda usage, calls: usage.input + len(calls)).cost(USED) == 4
    assert by_usage(lambda usage: 1).affordable("output", Decimal(0), USED) == MAX_AFFORDABLE
    for function in (slow, functools.partial(slow), lambda call: 1):
        price = by_usage(function)
        assert not price.is_known_before
        with pytest.raises(ConfigurationError, match="Hold an amount"):
            price.cost(USED)


@pytest.mark.parametrize("answer", [0.5, -1, "NaN", None, "two", True])
def test_refuse_what_no_function_may_answer(answer: Any) -> None:
    """A price that is no amount is an error, which the settlement answers by its policy (S3.21)."""
    with pytest.raises(AmountError):
        billed(by_usage(lambda: answer), ModelCall(USED))


@pytest.mark.parametrize("wrong", [7, lambda tokens: 1, lambda *calls: 1, lambda usage, /: 1, dict.fromkeys, type])
def test_refuse_functions_that_cannot_be_asked(wrong: Any) -> None:
    """What asks for anything else, or by position, is refused where it is written."""
    with pytest.raises(ConfigurationError):
        by_usage(wrong)


def test_add_calls_that_one_price_counts_for() -> None:
    """Calls of one kind add up to one that has all that they used, and the longest context of any (S3.22)."""
    searched = ModelCall(TokenUsage(input=5), units={"web_searches": Decimal(2)}, cost=Decimal(1), service="flex")
    both = searched.plus(ModelCall(TokenUsage(input=9), units={"web_searches": Decimal(3)}, hidden_cost=Decimal(4)))
    assert (both.usage.input, both.count, both.context) == (14, 2, 9)
    assert (dict(both.units), both.cost, both.hidden_cost) == ({"web_searches": Decimal(5)}, 1, 4)
    assert CostedCall(both, Decimal(1), "price").to_dict()["service"] == "flex"

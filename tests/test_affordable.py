"""What a call may still use of its hold, by price, request, caches, service tiers and upstream exchanges."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any, Literal

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from asgi_metering import Metering, TokenUsage, billable, current_call, slices, up_to
from asgi_metering.call import Call
from asgi_metering.estimates import anthropic_messages, openai_responses
from asgi_metering.prices import MAX_AFFORDABLE, MeasuredPrice, TokenPrice, model_prices, per_token, per_unit
from tests.test_measuring import Models, charged, chat

pytestmark = pytest.mark.uncounted

COUNTS = st.integers(0, 5_000)
USAGES = st.builds(TokenUsage, input=COUNTS, output=COUNTS, cached=st.none() | COUNTS, cache_write=st.none() | COUNTS)
RATES = st.decimals(0, 100, places=3)
PRICES = st.builds(
    TokenPrice,
    input=RATES,
    output=RATES,
    cached=st.none() | RATES,
    cache_write=st.none() | RATES,
    reasoning=st.none() | RATES,
    per=st.just(1_000),
)


async def opened(
    price: MeasuredPrice, hold: Any, records: Sequence[TokenUsage], kind: Literal["input", "output"]
) -> tuple[Call, int]:
    """A call that has recorded, and what it may still afford."""
    async with Metering(sinks=[]) as metering:
        await metering.grant("ada", 10**8, id="g")
        async with metering.charge(payer="ada", line="l", price=price, hold=hold) as call:
            for usage in records:
                call.record(usage)
            return call, call.affordable(kind)


def dearest_output(price: TokenPrice, used: TokenUsage, tokens: int) -> Decimal:
    """What *used* and *tokens* more of output cost at most: all of them may be thought."""
    written = (used.output or 0) + tokens
    said = TokenUsage(used.input, written, used.cached, used.cache_write)
    return max(price.cost(said), price.cost(replace(said, reasoning=tokens)))


def dearest_input(price: TokenPrice, used: TokenUsage, tokens: int) -> Decimal:
    """What *used* and *tokens* more of input cost at most: all of them may be written to a cache, or read from it."""
    plain = replace(used, input=(used.input or 0) + tokens)
    written = replace(plain, cache_write=(used.cache_write or 0) + tokens)
    read = replace(plain, cached=(used.cached or 0) + tokens)
    return max(price.cost(plain), price.cost(written), price.cost(read))


@settings(max_examples=60, deadline=None)
@given(PRICES, USAGES, st.lists(USAGES, max_size=3))
def test_affordable_output_is_what_fits_in_the_hold_and_no_less(
    price: TokenPrice, estimate: TokenUsage, records: list[TokenUsage]
) -> None:
    """DESIGN "A hold's size": behind what was used, or the input to come, so many tokens fit, and not one more."""
    call, tokens = asyncio.run(opened(price, estimate, records, "output"))
    spent, held = TokenUsage.sum(records), call.unit.whole(call.held)
    to_come = TokenUsage(estimate.input, spent.output, estimate.cached, estimate.cache_write)
    used = max(spent, to_come, key=price.cost)
    assert tokens == 0 or dearest_output(price, used, tokens) <= held
    assert tokens == MAX_AFFORDABLE or price.cost(used) >= held or dearest_output(price, used, tokens + 1) > held


@settings(max_examples=60, deadline=None)
@given(PRICES, USAGES, st.lists(USAGES, max_size=2))
def test_affordable_input_is_what_fits_in_the_hold_and_no_less(
    price: TokenPrice, estimate: TokenUsage, records: list[TokenUsage]
) -> None:
    """Input may turn out to be written to a cache, so it is afforded at the dearest that it may cost."""
    call, tokens = asyncio.run(opened(price, estimate, records, "input"))
    spent, held = TokenUsage.sum(records), call.unit.whole(call.held)
    assert tokens == 0 or dearest_input(price, spent, tokens) <= held
    # Where more was cached than there was, input that comes is in part what the caches told of already.
    if (spent.cached or 0) + (spent.cache_write or 0) <= (spent.input or 0):
        over = dearest_input(price, spent, tokens + 1) > held
        assert tokens == MAX_AFFORDABLE or price.cost(spent) >= held or over


def test_afford_nothing_behind_a_sum_that_cannot_be_counted() -> None:
    """Reports whose sum is beyond all bounds leave nothing to afford; the end says what they are."""
    huge = TokenUsage(output=10**12)
    assert asyncio.run(opened(per_token(output=0), TokenUsage(output=1), [huge, huge], "output"))[1] == 0


def test_afford_what_the_request_leaves_of_a_hold_given_as_an_amount() -> None:
    """The input that the request shows is taken off a hold that is an amount (DESIGN "A hold's size")."""
    told: list[int] = []

    @billable(per_token(input=1, output=2), hold=100)
    async def endpoint(request: Request) -> JSONResponse:
        told.append(current_call().affordable())
        return JSONResponse(chat(1, 1))

    body = json.dumps({"model": "m", "input": list(range(40))}).encode()
    asyncio.run(charged(Starlette(routes=[Route("/", endpoint, methods=["POST"])]), method="POST", body=body))
    assert told == [30]


@pytest.mark.parametrize("hold", [100, None, up_to(anthropic_messages(), at_least=1)])
def test_afford_what_cache_writes_leave(hold: Any) -> None:
    """Input that the request has written to a cache is taken off at what that costs, if it is dearer (DESIGN 4)."""
    told: list[tuple[int, int]] = []

    @billable(per_token(input=1, output=1, cache_write=2), hold=hold)
    async def endpoint(request: Request) -> JSONResponse:
        call = current_call()
        told.append((call.affordable(), call.held // 10**6))
        return JSONResponse(chat(1, 1))

    block = {"type": "text", "text": "one two three four", "cache_control": {"type": "ephemeral"}}
    body = {"model": "m", "max_tokens": 60, "messages": [{"role": "user", "content": [block]}]}
    app = Starlette(routes=[Route("/", endpoint, methods=["POST"])])
    asyncio.run(charged(app, method="POST", body=json.dumps(body).encode()))
    ((cap, held),) = told
    # Four words, the role, and the three tokens around a message; and what separates texts.
    assert cap + 2 * 9 == held


SERVED = per_token(input=1, output=1, services={"openai/priority": 3, "flex": "0.5"})
BY_NAME = model_prices({"m": per_token(input=1, output=1)}, units_per_usd=1, published=False, services={"priority": 3})


@pytest.mark.parametrize("price", [SERVED, BY_NAME], ids=["tokens", "models"])
@pytest.mark.parametrize(("tier", "factor"), [("priority", 3), ("flex", 1), ("unknown", 1), (None, 1)])
def test_afford_and_hold_what_a_dearer_service_tier_costs(price: Any, tier: str | None, factor: int) -> None:
    """Nobody is let in for less than the tier costs that he asks for; a cheaper or unknown one is no relief."""
    told: list[tuple[int, Decimal, int]] = []

    async def endpoint(request: Request) -> JSONResponse:
        call = current_call()
        before = call.affordable()
        if not told:
            call.record(TokenUsage(input=0, output=10), model="m")
        told.append((before, call.remaining, call.held // 10**6))
        return JSONResponse({})

    body = json.dumps({"model": "m", "max_tokens": 60, "input": list(range(30)), "service_tier": tier}).encode()
    for hold in (100, None):
        route = Route("/", billable(price, hold=hold)(endpoint), methods=["POST"])
        entries = asyncio.run(charged(Starlette(routes=[route]), method="POST", body=body))
    (of_amount, left, _), (of_estimate, _, held) = told
    assert (of_amount, left) == (100 // factor - 30, 100 - 10 * factor)
    assert (of_estimate, held) == (60, 90 * factor)
    # Nothing told what it used, so that the estimate is charged: as it was held.
    assert [entry.amount // 10**6 for entry in entries] == [held]


def test_hold_tokens_at_the_price_of_the_request() -> None:
    """A hold of so many tokens costs what they cost by the model, and the service tier, that the request asks for."""
    told: list[tuple[int, int]] = []

    async def endpoint(request: Request) -> JSONResponse:
        told.append((current_call().held // 10**6, current_call().affordable()))
        return JSONResponse({})

    body = json.dumps({"model": "m", "input": [1], "service_tier": "priority", "tools": [{"type": "web_search"}]})
    for price in (SERVED, BY_NAME, per_token(input=1, output=1, web_search=1)):
        route = Route("/", billable(price, hold=TokenUsage(input=0, output=60))(endpoint), methods=["POST"])
        asyncio.run(charged(Starlette(routes=[route]), method="POST", body=body.encode()))
    # Ten searches at 0.01 USD, or at 1.
    assert told == [(180, 60), (180, 59), (60, 50)]


def test_afford_what_upstream_exchanges_leave() -> None:
    """Exchanges that ended count as they reported, one that runs by what it wrote until now."""
    told: list[int] = []

    @billable(per_token(output=1), hold=100)
    async def endpoint(_request: Request) -> JSONResponse:
        call = current_call()
        transport = call.metering.upstream_transport("openai", wrap=Models())
        async with httpx2.AsyncClient(transport=transport, base_url="http://models") as client:
            told.append(call.affordable())
            await client.get("/small")
            told.append(call.affordable())
            call.first_byte = True
            async with client.stream("GET", "/own") as response:
                async for _ in response.aiter_raw():
                    told.append(call.affordable())
        return JSONResponse({})

    asyncio.run(charged(Starlette(routes=[Route("/", endpoint)])))
    assert told[:2] == [100, 99]
    assert told[2:] == sorted(told[2:], reverse=True)
    assert told[-1] == 0


SEARCHED = {"web_search": 2, "input": 1, "output": 1}
FINDERS = [
    per_token(**SEARCHED),  # type: ignore[arg-type]
    model_prices({"m": per_token(input=1, output=1)}, units_per_usd=1, published=False, web_search=2),
    model_prices({"m": per_token(**SEARCHED)}, units_per_usd=1, published=False),  # type: ignore[arg-type]
    model_prices({"m": [per_token(input=1, output=1), per_unit(web_searches=2)]}, units_per_usd=1, published=False),
]


@pytest.mark.parametrize("price", FINDERS, ids=["tokens", "models", "own price", "units"])
def test_afford_what_searches_that_are_allowed_leave(price: Any) -> None:
    """
    Searches of the web that the request allows are taken off, and a hold by the request pays for them (DESIGN 4).

    Those that were made count once, and alone where the hold grows with what is used.
    """
    told: list[tuple[int, Decimal, int]] = []

    async def endpoint(request: Request) -> JSONResponse:
        call = current_call()
        assert call.asked is not None
        assert call.asked.input == 50
        before = call.affordable()
        call.record(TokenUsage(input=50, output=0), model="m", units={"web_searches": 3})
        told.append((before, call.remaining, call.held // 10**6))
        assert call.affordable() == (before if call.growth is None else before - 6)
        call.record(TokenUsage(), model="m", units={"web_searches": 4})
        told.append((call.affordable(), call.remaining, call.held // 10**6))
        return JSONResponse({})

    # The tool itself is read by the model: 20 tokens.
    tools = [{"type": "web_search_20250305", "max_uses": 5}]
    body = json.dumps({"model": "m", "max_tokens": 40, "input": list(range(30)), "tools": tools}).encode()
    for hold in (100, None, openai_responses(), slices(100, step=1, low_water=0)):
        route = Route("/", billable(price, hold=hold)(endpoint), methods=["POST"])
        asyncio.run(charged(Starlette(routes=[route]), method="POST", body=body))
    amount, behind, estimate, _, ready, _, growing, _ = told
    # Of 100, 50 for the input and five searches at 2, of which three are made; then seven are, more than allowed.
    assert amount == (40, Decimal(44), 100)
    assert behind == (36, Decimal(36), 100)
    # By the request: the same, and its 40 tokens of output.
    assert estimate == ready == (40, Decimal(44), 100)
    assert growing == (50, Decimal(44), 100)


def test_afford_what_searches_of_an_exchange_leave() -> None:
    """Searches that a provider told of are taken off the hold, also where the request did not allow them."""
    told: list[tuple[int, Decimal]] = []

    @billable(per_token(input=1, output=1, web_search=5), hold=100)
    async def endpoint(_request: Request) -> JSONResponse:
        call = current_call()
        answer = chat(10, 10)
        answer["usage"]["server_tool_use"] = {"web_search_requests": 3}
        answered = httpx2.MockTransport(lambda _: httpx2.Response(200, json=answer))
        transport = call.metering.upstream_transport("perplexity", wrap=answered)
        async with httpx2.AsyncClient(transport=transport, base_url="http://models") as client:
            await client.get("/")
        told.append((call.affordable(), call.remaining))
        return JSONResponse({})

    asyncio.run(charged(Starlette(routes=[Route("/", endpoint)])))
    assert told == [(65, Decimal(65))]

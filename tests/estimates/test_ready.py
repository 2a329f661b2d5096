"""Ready-made holds: what a request may cost at most, and what lines usually do."""

from __future__ import annotations

import asyncio
from decimal import Decimal
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from asgi_metering import CREDITS, Metering, TokenUsage, billable, current_call, up_to
from asgi_metering.arguments import From
from asgi_metering.errors import AmountError, ConfigurationError
from asgi_metering.estimates import (
    DEFAULT_OUTPUT_TOKENS,
    anthropic_messages,
    by_line,
    clamp,
    embeddings,
    flat,
    flat_tokens,
    gemini,
    openai_chat,
    openai_responses,
)
from asgi_metering.prices import FixedPrice, above, model_prices, per_minute, per_token
from tests.pitfalls.stage import staged

NOW = 1_795_000_000.0
SERVED = per_token(output=1, services={"priority": 2}, web_search=4)
PRICE = per_token(input=1, output=2, reasoning=3, cache_write=5, tiers=[above(20, input=10, output=20)])
CHAT = {"messages": [{"role": "user", "content": "one two three four"}], "max_tokens": 10, "model": "m"}


class Standing:
    """What of a call an estimate looks at."""

    unit = CREDITS

    def __init__(self, price: Any = PRICE, line: str = "chat") -> None:
        self.price, self.line = price, line


def held(hold: Any, call: Any = None, **arguments: Any) -> Decimal:
    """What is held, asked for as the gate does."""
    answer: Decimal = asyncio.run(From(hold, "hold estimate").compute(call or Standing(), arguments))
    return answer


@pytest.mark.parametrize(
    ("hold", "body", "amount"),
    [
        (openai_chat(), CHAT, 9 + 10 * 3),
        (openai_chat(slack=2), CHAT, 9 * 10 + 10 * 20),
        (openai_chat(scale=3), CHAT, 3 * (9 + 10 * 3)),
        (openai_chat(), {**CHAT, "n": 2}, 9 + 20 * 3),
        (openai_chat(default_output=4), {"messages": CHAT["messages"]}, 9 + 4 * 3),
        (openai_responses(), {"input": "one two three four", "max_output_tokens": 10}, 4 + 10 * 3),
        (anthropic_messages(), {**CHAT, "cache_control": {"type": "ephemeral"}}, 9 * 5 + 10 * 3),
        (gemini(), {"contents": "one two three four"}, 4 + 8_192 * 3),
        (embeddings(), {"input": ["one two", [1, 2, 3]], "model": "e"}, 5),
        (embeddings(slack="0.25"), {"input": [[7] * 20]}, 20 * 10),
        (openai_chat(per_token(input=0, output=1)), CHAT, 10),
        (openai_chat(per_minute(1)), CHAT, 0),
        (openai_chat(), {"other": 1}, DEFAULT_OUTPUT_TOKENS * 3),
        (openai_chat(SERVED), {**CHAT, "service_tier": "priority", "web_search_options": {}}, 2 * 10 + 10 * 4),
    ],
)
def test_hold_what_a_request_may_cost_at_most(hold: Any, body: Any, amount: int) -> None:
    """Prompt, bound and answers, at the dearest tier within reach, all output as reasoning (S3.18)."""
    assert held(hold, body=body, user="ada") == amount


def test_hold_by_the_model_of_the_request() -> None:
    """Prices by name estimate by the model that the route's own price was pinned for."""
    prices = model_prices({"m": PRICE}, units_per_usd=2, fee=1, published=False)
    assert held(openai_chat(), Standing(prices.pin(NOW, "m")), body=CHAT) == 2 * (9 + 30) + 1


def test_refuse_a_hold_without_a_price_of_tokens() -> None:
    """On a route with a fixed price, or none, the estimate says what it lacks; so does nonsense where it is written."""
    for price in (None, FixedPrice(Decimal(1))):
        with pytest.raises(ConfigurationError, match="no price of tokens"):
            held(openai_chat(), Standing(price), body=CHAT)
    for output in (-1, 1.5, True):
        with pytest.raises(ConfigurationError, match="default_output"):
            openai_chat(default_output=output)  # type: ignore[arg-type]
    with pytest.raises(AmountError):
        embeddings(slack=0.25)  # type: ignore[arg-type]


MICROS = per_token(input="0.000015", output="0.000075")


@pytest.mark.parametrize(
    ("tokens", "price", "amount"),
    [
        (4_000, MICROS, "0.36"),
        (None, MICROS, "0.72"),
        (0, MICROS, "0.72"),
        (-5, MICROS, "0.72"),
        (True, MICROS, "0.72"),
        (1, MICROS, "0.0001"),
        (10**9, MICROS, "1"),
        (4_000, per_token(input=0), "0.0001"),
        (4_000, model_prices(units_per_usd=1, published=False).pin(NOW, "nobody's"), "0.0001"),
        (lambda depth: depth * 1_000, MICROS, "0.36"),
    ],
)
def test_hold_tokens_between_bounds(tokens: Any, price: Any, amount: str) -> None:
    """Tokens at both prices, 8,000 where nobody says, never below the floor or above the ceiling (S3.18)."""
    hold = flat_tokens(tokens, floor="0.0001", ceiling=1)
    assert held(hold, Standing(price), depth=4) == Decimal(amount)
    assert held(flat_tokens(tokens, floor="0.0001", ceiling=1, price=price), Standing(None), depth=4) == Decimal(amount)


def test_refuse_bounds_that_cross() -> None:
    """A floor above its ceiling holds nothing that anybody meant."""
    with pytest.raises(ConfigurationError, match="Turn them round"):
        flat_tokens(1, floor=2, ceiling=1)
    with pytest.raises(ConfigurationError, match="by position"):
        flat_tokens(lambda *depth: 1, floor=0, ceiling=1)


@pytest.mark.parametrize(
    ("value", "parts"),
    [(0, 1), (-7, 1), ("0.0000019", 1), ("0.0000029", 2), (2, 2_000_000), ("1e-9", 1), (lambda line: line, 3_000_000)],
)
def test_hold_a_flat_amount(value: Any, parts: int) -> None:
    """Rounded down to the smallest part, and one of them at least, also for 0 and below (S3.17)."""
    assert CREDITS.parts(held(flat(value), line=3)) == parts


@pytest.mark.parametrize("value", [0.5, True, None, "two", "NaN", Decimal("Infinity"), [1]])
def test_refuse_a_flat_amount_that_is_none(value: Any) -> None:
    """What is no amount is refused on that request, and nothing is held."""
    with pytest.raises(AmountError):
        held(flat(lambda: value))


def test_hold_by_the_line() -> None:
    """Each line has its usual amount; another one has what is said for others, or is a mistake (S3.19)."""
    hold = by_line({"image": "0.05", "podcast": "0.2", "video": 1})
    amounts = [held(hold, Standing(line=line)) for line in ("image", "podcast", "video")]
    assert [CREDITS.parts(amount) for amount in amounts] == [50_000, 200_000, 1_000_000]
    assert held(by_line({}, otherwise=2), Standing(line="song")) == 2
    with pytest.raises(ConfigurationError, match="no hold for the line 'song'"):
        held(hold, Standing(line="song"))


# -- on a route -------------------------------------------------------------------------------------------------


def test_clamp_a_request_to_what_its_hold_pays() -> None:
    """An endpoint holds up to the estimate, and asks its provider for no more than that affords (DESIGN 4)."""
    seen: list[Any] = []

    @billable(per_token(input=1, output=10), hold=up_to(openai_chat(), at_least=20))
    async def chat(request: Request) -> JSONResponse:
        call = current_call()
        body = clamp(await request.json(), call.affordable())
        seen.append((body["max_tokens"], call.remaining, call.affordable("input"), call.affordable("reasoning")))
        call.record(TokenUsage(input=9, output=5))
        seen.append((call.remaining, call.affordable()))
        return JSONResponse({})

    async def play() -> list[Any]:
        async with staged(Starlette(routes=[Route("/", chat, methods=["POST"])])) as stage:
            body = b'{"messages": [{"role": "user", "content": "one two three four"}], "max_tokens": 1000}'
            headers = [("content-type", "application/json")]
            await stage.drive(method="POST", headers=headers, body=body)
            return await stage.charges()

    (charge,) = asyncio.run(play())
    # 1,000 credits are there, 10,009 would be needed: nine for the prompt, and ninety-nine tokens for the rest.
    assert seen == [(99, Decimal(1_000), 1_000, 99), (Decimal(941), 94)]
    assert charge.amount == 59 * 10**6


def test_hold_by_the_price_of_the_model_that_is_asked_for() -> None:
    """A route with prices by name holds, and affords, by the model that the request names."""
    prices = model_prices({"m": per_token(output=2), "dear": per_token(output=20)}, units_per_usd=1, published=False)
    seen: list[Any] = []

    @billable(prices)
    async def chat(request: Request) -> JSONResponse:
        call = current_call()
        seen.append((call.held, call.affordable()))
        call.record(TokenUsage(output=1), model="m")
        return JSONResponse({})

    async def play() -> list[Any]:
        async with staged(Starlette(routes=[Route("/", chat, methods=["POST"])])) as stage:
            for model in ("m", "dear"):
                body = b'{"messages": [], "max_tokens": 10, "model": "%s"}' % model.encode()
                await stage.drive(method="POST", headers=[("content-type", "application/json")], body=body)
            return await stage.charges()

    charges = asyncio.run(play())
    assert seen == [(20 * 10**6, 10), (200 * 10**6, 10)]
    assert [charge.amount for charge in charges] == [2 * 10**6] * 2


def test_remain_what_a_fixed_price_holds() -> None:
    """What is not measured leaves all of its hold."""

    async def play() -> Decimal:
        async with Metering(sinks=()) as metering:
            await metering.grant("ann", 5, id="g")
            async with metering.charge(payer="ann", line="job", price=2) as call:
                return call.remaining

    assert asyncio.run(play()) == 2

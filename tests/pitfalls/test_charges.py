"""What an end of a call costs: the route's policy, failures, zeros, and usage beyond the hold."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse

from asgi_metering import (
    Caller,
    Metering,
    MeteringMiddleware,
    RateLimitMiddleware,
    TokenUsage,
    billable,
    current_call,
    rate_limited,
    slices,
    up_to,
)
from asgi_metering.prices import per_token
from tests.harness.drive import drive, headers, http_scope, lifespan, status
from tests.pitfalls.stage import PAYER, staged
from tests.pitfalls.streams import events, sse, starlette


@pytest.mark.parametrize(
    ("texts", "usage", "left_at", "policy", "basis", "amount"),
    [
        pytest.param(("one two",), True, None, {}, "usage", 9 + 2 * 10, id="reported"),
        pytest.param(("one two",), False, None, {}, "estimate", 3 + 8 * 10, id="missing: estimate by default"),
        pytest.param(
            ("one two",), False, None, {"on_missing_usage": "observed"}, "observed", 3 + 2 * 10, id="observed"
        ),
        pytest.param(("one two " * 20,), False, None, {}, "estimate", 3 + 41 * 10, id="missing: more was observed"),
        pytest.param(("one two",), False, None, {"on_missing_usage": "hold"}, "hold", 83, id="missing: hold"),
        pytest.param(("one two",), False, None, {"on_missing_usage": "none"}, None, 0, id="missing: none"),
        pytest.param(("one two", " three"), True, 2, {}, "observed", 3 + 2 * 10, id="left after one event"),
        pytest.param(("one two", " three"), True, 2, {"on_disconnect": "none"}, None, 0, id="left: none"),
        pytest.param(("one two", " three"), True, 2, {"on_disconnect": "hold"}, "hold", 83, id="left: hold"),
        pytest.param(("one two", " three"), True, 2, {"on_disconnect": "usage"}, "estimate", 83, id="left: usage"),
        pytest.param(("one",), True, 1, {}, None, 0, id="left before the first byte"),
        pytest.param(("one",), True, 1, {"on_early_disconnect": "hold"}, "hold", 83, id="left early: hold"),
    ],
)
def test_charges_what_the_routes_policy_says(
    texts: tuple[str, ...],
    usage: bool,
    left_at: int | None,
    policy: dict[str, Any],
    basis: str | None,
    amount: int,
) -> None:
    """Each way to end a token-priced stream is charged on the basis that its route chose (DESIGN, end of call)."""

    def estimate() -> Any:
        return TokenUsage(input=3, output=8)

    @rate_limited("1000/minute of tokens")
    @billable(per_token(input=1, output=10), hold=estimate, **policy)
    async def endpoint(_request: Request) -> StreamingResponse:
        async def body() -> AsyncIterator[bytes]:
            async for event in events(*texts, usage=usage):
                yield event
                if left_at is not None:
                    await asyncio.sleep(0.05)

        return sse(body())

    async def play() -> None:
        async with staged(starlette(endpoint)) as stage:
            await stage.drive(disconnect_at=left_at)
            charges = await stage.charges()
            assert [(entry.amount, str(entry.basis)) for entry in charges] == (
                [] if basis is None else [(amount * 1_000_000, basis)]
            )

    asyncio.run(play())


def test_in_band_failure_is_not_charged() -> None:
    """A stream that ends well but was marked as failed by the application costs nothing (S4.9, S4.10)."""

    @billable(2)
    async def endpoint(_request: Request) -> StreamingResponse:
        async def body() -> AsyncIterator[bytes]:
            yield b'data: {"error": "overloaded"}\n\n'
            current_call().fail("provider_overloaded")
            yield b"data: [DONE]\n\n"

        return sse(body())

    async def play() -> None:
        async with staged(starlette(endpoint)) as stage:
            ended = await stage.drive()
            assert ended.complete.is_set()
            assert await stage.charges() == []
            assert await stage.outcomes() == ["error"]

    asyncio.run(play())


def test_tell_what_failed_work_has_used() -> None:
    """S3.34: the event of a call that failed says what it used, and looks charged nowhere."""

    @billable(per_token(input=1, output=1), hold=9)
    async def endpoint(_request: Request) -> JSONResponse:
        current_call().record(TokenUsage(input=3, output=4), model="gpt-5.5")
        raise LookupError("no disk")

    async def play() -> None:
        async with staged(starlette(endpoint)) as stage:
            await stage.drive()
            assert await stage.outcomes() == ["error"]
            (event,) = stage.events
            assert (event.amount, event.basis, event.estimated) == (0, "none", False)
            assert (event.usage, event.model) == (TokenUsage(input=3, output=4), "gpt-5.5")
            assert await stage.charges() == []

    asyncio.run(play())


@pytest.mark.parametrize("status", [400, 404, 500, 503])
def test_failed_answers_are_not_charged(status: int) -> None:
    """An answer of 400 or above costs nothing by default (X.3)."""

    @billable(2)
    async def endpoint(_request: Request) -> JSONResponse:
        return JSONResponse({}, status)

    async def play() -> None:
        async with staged(starlette(endpoint)) as stage:
            await stage.drive()
            assert await stage.charges() == []
            assert (await stage.metering.balance(PAYER)).held == 0

    asyncio.run(play())


def test_reported_zero_is_charged_as_zero() -> None:
    """A handler that reports zero tokens is charged zero, and not the estimate (S2.41)."""

    @billable(per_token(input=1, output=1), hold=50)
    async def endpoint(_request: Request) -> JSONResponse:
        current_call().record(TokenUsage(input=0, output=0))
        return JSONResponse({})

    async def play() -> None:
        async with staged(starlette(endpoint)) as stage:
            await stage.drive()
            assert await stage.charges() == []
            assert (await stage.metering.balance(PAYER)).held == 0

    asyncio.run(play())


def test_usage_beyond_the_hold_posts_in_full() -> None:
    """A call that used more than it held is charged for all of it, into debt if need be (S3.7)."""

    @billable(per_token(output=1), hold=5)
    async def endpoint(_request: Request) -> JSONResponse:
        current_call().record(TokenUsage(output=1_500))
        return JSONResponse({})

    async def play() -> None:
        async with staged(starlette(endpoint)) as stage:
            await stage.drive()
            balance = await stage.metering.balance(PAYER)
            assert (balance.settled, balance.available, balance.debt) == (1_500_000_000, -500_000_000, 500_000_000)

    asyncio.run(play())


@pytest.mark.parametrize(
    ("hold", "price"),
    [
        (0, per_token(input=1, output=1)),
        (up_to(5, at_least=0), per_token(input=1, output=1)),
        (TokenUsage(input=0, output=9), per_token(input=1)),
    ],
    ids=["zero", "up-to", "rounds-to-zero"],
)
def test_usage_of_a_call_that_held_nothing_posts_in_full(hold: Any, price: Any) -> None:
    """A hold of 0 passes an empty wallet, is charged in full, and does not pass a payer who owes (DESIGN 4)."""

    @billable(price, hold=hold)
    async def endpoint(_request: Request) -> JSONResponse:
        current_call().record(TokenUsage(input=7))
        return JSONResponse({})

    async def play() -> None:
        async with staged(starlette(endpoint), identify=lambda _: Caller("empty")) as stage:
            assert status((await stage.drive()).log) == 200
            assert (await stage.metering.balance("empty")).debt == 7_000_000
            assert status((await stage.drive()).log) == 402
            assert await stage.metering.check() == []

    asyncio.run(play())


def test_absurd_usage_never_stops_a_settlement() -> None:
    """Usage that no account could pay is refused to the hold, with an alarm, and the call ends all the same (S3.21)."""

    @billable(per_token(output=1_000_000_000), hold=5)
    async def endpoint(_request: Request) -> JSONResponse:
        current_call().record(TokenUsage(output=10**12))
        return JSONResponse({})

    async def play() -> None:
        async with staged(starlette(endpoint)) as stage:
            await stage.drive()
            assert await stage.basis() == ("hold",)

    asyncio.run(play())


# -- limits of tokens on routes that charge otherwise ------------------------------------------------------

ASKED = 4_096
"""What a limit takes of a request that names no maximum, until its usage is known."""


def anthropic_begins(*texts: str) -> list[bytes]:
    """Anthropic's stream up to its texts: its first event counts the input, and one token of output."""
    usage = {"input_tokens": 9, "output_tokens": 1}
    told: list[dict[str, Any]] = [{"type": "message_start", "message": {"model": "m", "usage": usage}}]
    told += [
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}} for text in texts
    ]
    return [f"event: {each['type']}\ndata: {json.dumps(each)}\n\n".encode() for each in told]


def tokens_left_after(endpoint: Any, **fault: int) -> tuple[int, list[int]]:
    """What a second request sees left of the 10,000 tokens when the first, with *fault*, is over; and the charges."""

    async def play() -> tuple[int, list[int]]:
        async with staged(starlette(endpoint)) as stage:
            await stage.drive(**fault)
            second = dict(headers((await stage.drive()).log))
            return int(second["ratelimit"].partition(";r=")[2].partition(";")[0]), [
                entry.amount for entry in await stage.charges()
            ]

    return asyncio.run(play())


@pytest.mark.parametrize("priced", [True, False], ids=["fixed price", "no price"])
def test_limits_count_what_the_body_reports(priced: bool) -> None:
    """DESIGN "Rate limits": a limit of tokens is corrected by the usage that passes, whatever the route charges by."""

    async def endpoint(_request: Request) -> StreamingResponse:
        return sse(events("one two"))

    guarded = rate_limited("10000/minute of tokens")(billable(2)(endpoint) if priced else endpoint)
    left, charged = tokens_left_after(guarded)
    assert left == 10_000 - (9 + 2) - ASKED
    assert charged == ([2_000_000] * 2 if priced else [])


ASKED_OF: list[str] = []


def asks(call: Any) -> TokenUsage:
    """An estimate that is computed, and another one each time."""
    ASKED_OF.append(call.id)
    return TokenUsage(input=100, output=len(ASKED_OF))


@pytest.mark.parametrize(
    ("hold", "taken"),
    [
        pytest.param(TokenUsage(input=3, output=8), [11, 3], id="usage"),
        pytest.param(asks, [101, 100], id="computed"),
        pytest.param(up_to(TokenUsage(input=3, output=8), at_least=1), [11, 3], id="up to"),
        pytest.param(slices(TokenUsage(input=3, output=8)), [11, 3], id="slices"),
        pytest.param(slices(TokenUsage(output=8)), [ASKED, 0], id="slices of output"),
        pytest.param(9, [ASKED, 0], id="amount"),
        pytest.param(None, [ASKED, 0], id="nothing"),
    ],
)
@pytest.mark.parametrize("layer", [RateLimitMiddleware, MeteringMiddleware])
def test_limits_take_what_the_hold_estimates(layer: Any, hold: Any, taken: list[int]) -> None:
    """DESIGN "Rate limits": a limit of tokens takes the route's own estimate, also where no layer charges by it."""
    ASKED_OF.clear()

    @rate_limited("10000/minute of tokens", "20000/minute of input_tokens")
    @billable(per_token(input=1, output=1), hold=hold)
    async def endpoint(_request: Request) -> JSONResponse:
        return JSONResponse({})

    async def play() -> str:
        metering = Metering("memory://", identify=lambda _: Caller("ada"), sinks=())
        app = layer(starlette(endpoint), metering=metering, unenforced="allow")
        async with lifespan(app):
            await metering.grant("ada", 10_000, id="g")
            return dict(headers((await drive(app, http_scope("/"))).log))["ratelimit"]

    left = [int(part.partition(";")[0]) for part in asyncio.run(play()).split(";r=")[1:]]
    assert left == [10_000 - taken[0], 20_000 - taken[1]]
    assert len(ASKED_OF) in (0, 1)


def test_limits_count_what_was_seen_of_a_stream_that_broke() -> None:
    """A client that leaves has not used the one token that a stream began with, but the text that it was sent."""

    @rate_limited("10000/minute of tokens")
    @billable(2)
    async def endpoint(_request: Request) -> StreamingResponse:
        async def body() -> AsyncIterator[bytes]:
            for event in anthropic_begins("one two", " three four"):
                yield event
                await asyncio.sleep(0.05)

        return sse(body())

    left, charged = tokens_left_after(endpoint, disconnect_at=4)
    assert left == 10_000 - (9 + 4) - ASKED
    assert charged == [2_000_000] * 2


def test_fixed_prices_are_charged_whatever_the_body_says() -> None:
    """README: an error inside a stream is for the handler to mark, also where a limit reads that stream."""

    @rate_limited("10000/minute of tokens")
    @billable(2)
    async def endpoint(_request: Request) -> StreamingResponse:
        async def body() -> AsyncIterator[bytes]:
            async for event in events("one two", usage=False):
                yield event
            yield b'data: {"error": {"message": "overloaded", "type": "server_error"}}\n\n'

        return sse(body())

    left, charged = tokens_left_after(endpoint)
    assert charged == [2_000_000] * 2
    assert left == 10_000 - 2 * ASKED

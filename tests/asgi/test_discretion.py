"""Discretion: answers tell what the caller's own account has, and of nobody else's any number."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from asgi_metering import Allowance, Caller, Metering, MeteringMiddleware, TokenUsage, Wallet, billable, slices
from asgi_metering.prices import per_token
from asgi_metering.sources import Payer
from tests.harness.drive import Drive, body, drive, headers, http_scope, lifespan, status

OWNER = Payer("owner", account=lambda: "owner-7")
OPEN = Payer("owner", account=lambda: "owner-7", told=True)
SELF = Payer("self", account=lambda call: call.caller.payer)
KEYED = Payer("keyed", credential=lambda: "a-key")

AVAILABLE = "metering-available"
NUMBERS = {"available", "held", "limit", "used"}


def ask(price: Any, **options: Any) -> Drive:
    """Ask once, as visitor-1 with 31 credits, where owner-7 has 47."""
    options.setdefault("sources", [Wallet()])

    @billable(price, **options)
    async def endpoint(request: Request) -> PlainTextResponse:
        return PlainTextResponse("ok")

    return visit(endpoint)


def visit(endpoint: Any) -> Drive:
    """Post to *endpoint* once, as `ask` does."""
    metering = Metering("memory://", identify=lambda _: Caller("visitor-1"), sinks=())
    app = Starlette(routes=[Route("/", endpoint, methods=["POST"])])
    app.add_middleware(MeteringMiddleware, metering=metering)

    async def story() -> Drive:
        async with lifespan(app):
            await metering.grant("owner-7", 47, id="g")
            await metering.grant("visitor-1", 31, id="g")
            return await drive(app, http_scope("/", "POST"), body=b"{}")

    return asyncio.run(story())


@pytest.mark.parametrize(
    ("payer", "available"),
    [(OWNER, None), (OPEN, '"45";unit="credits"'), (SELF, '"29";unit="credits"'), (KEYED, '"29";unit="credits"')],
    ids=["owner", "told", "self", "keyed"],
)
def test_tell_who_pays_and_not_what_that_has(payer: Payer, available: str | None) -> None:
    """What is left to another account that pays is no header field, unless its payer says so (S0.40, DESIGN 10)."""
    ended = ask(2, sources=[Wallet(payer=payer, warn_below=1)])
    fields = dict(headers(ended.log))
    assert (status(ended.log), fields.get(AVAILABLE)) == (200, available)
    assert fields["metering-payer"].startswith(f'"{payer.name}"')


@pytest.mark.parametrize("price", [2, 6])
def test_tell_what_is_left_of_ones_own_allowance_of_another_payer(price: int) -> None:
    """What somebody else allows to each payer is counted for the caller, who is told of it (S0.9, S0.40)."""
    ended = ask(price, sources=[Allowance(5, payer=OWNER, each=True, warn_at=100)])
    if price == 2:
        assert dict(headers(ended.log))[AVAILABLE] == '"3";unit="credits";source="allowance"'
    else:
        told = json.loads(body(ended.log))
        assert (status(ended.log), told["available"], told["limit"], told["used"]) == (429, "5", "5", "0")


@pytest.mark.parametrize("shape", ["problem", "openai", "anthropic"])
@pytest.mark.parametrize(
    "sources",
    [
        [Wallet(payer=OWNER)],
        [Allowance(13, payer=OWNER), Wallet(payer=OWNER)],
        [Allowance(13, payer=OWNER, split=True), Wallet(payer=OWNER)],
        [Wallet(), Allowance(13, payer=OWNER)],
    ],
    ids=["wallet", "waterfall", "split", "own wallet first"],
)
def test_refuse_without_the_numbers_of_another_payer(sources: Any, shape: Any) -> None:
    """A refusal by what another account has says what the call needs, and who could not pay (S0.40, DESIGN 10)."""
    ended = ask(500, sources=sources, errors=shape)
    told = body(ended.log).decode()
    assert status(ended.log) == 402
    assert "owner-7" not in told
    assert not any(number in told for number in ("47", "13", "60"))
    assert "500" in told
    assert ("31" in told) is (sources[0].payer is None)


def test_refuse_by_a_spent_allowance_of_another_payer() -> None:
    """When the allowance of another account begins anew is told, and not how much it is."""
    ended = ask(5, sources=[Allowance(5, payer=OWNER), Allowance(4, payer=OWNER, name="small")])
    assert status(ended.log) == 200
    ended = ask(6, sources=[Allowance(5, payer=OWNER, name="first"), Allowance(4, payer=OWNER)])
    told = json.loads(body(ended.log))
    assert (status(ended.log), told["code"], told["required"]) == (429, "allowance", "6")
    assert not NUMBERS & told.keys()
    assert told["detail"] == "This call needs more than its payer 'owner' has left."


@pytest.mark.parametrize("payer", [OPEN, SELF, KEYED, None], ids=["told", "self", "keyed", "caller"])
def test_refuse_with_the_numbers_of_ones_own(payer: Payer | None) -> None:
    """A refusal by the caller's own account, on whatever credential, has its numbers as ever (S4.4)."""
    told = json.loads(body(ask(500, sources=[Wallet(payer=payer)]).log))
    assert (told["required"], told["available"], told["held"]) == ("500", "47" if payer is OPEN else "31", "0")


def test_cut_without_the_numbers_of_another_payer() -> None:
    """A stream that is cut tells what could be held for it, and not what else its payer has or holds."""

    @billable(per_token(input=1, output=1), hold=slices(TokenUsage(input=40, output=1)), sources=[Wallet(payer=OWNER)])
    async def endpoint(request: Request) -> StreamingResponse:
        async def chunks() -> Any:
            while True:
                yield b"data: " + json.dumps({"choices": [{"delta": {"content": "word " * 40}}]}).encode() + b"\n\n"

        return StreamingResponse(chunks(), media_type="text/event-stream")

    told = body(visit(endpoint).log).decode()
    error = json.loads(told.rsplit("data: ", 1)[1])
    assert error["code"] == "insufficient_credits"
    assert not NUMBERS & error.keys()


def test_answer_by_a_refusal_inside_a_session_that_another_route_counted() -> None:
    """Who pays it is none of this route's payers, and what that has stays untold (S0.35, S0.40, pitfall 15)."""
    metering = Metering("memory://", identify=lambda _: Caller("visitor-1"), sinks=())
    key: dict[str, Any] = {"line": "turn", "charge_key": lambda: "session"}

    @billable(2, sources=[Wallet(payer=OWNER)], **key)
    async def begin(request: Request) -> PlainTextResponse:
        return PlainTextResponse("ok")

    @billable(2, sources=[Wallet(payer=Payer("other", account="other-9"))], **key)
    async def go_on(request: Request) -> PlainTextResponse:
        async with metering.charge(payer="owner-7", line="inner", price=60):
            return PlainTextResponse("ok")

    app = Starlette(routes=[Route("/", begin, methods=["POST"]), Route("/on", go_on, methods=["POST"])])
    app.add_middleware(MeteringMiddleware, metering=metering)

    async def story() -> Drive:
        async with lifespan(app):
            await metering.grant("owner-7", 47, id="g")
            assert status((await drive(app, http_scope("/", "POST"), body=b"{}")).log) == 200
            return await drive(app, http_scope("/on", "POST"), body=b"{}")

    ended = asyncio.run(story())
    assert (status(ended.log), ended.exception) == (402, None)
    told = json.loads(body(ended.log))
    assert (told["line"], told["required"]) == ("inner", "60")
    assert not NUMBERS & told.keys()

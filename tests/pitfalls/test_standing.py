"""What a response says of the balance that pays: fine, nearly spent, or spent (S3.6)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from asgi_metering import Allowance, MeteringMiddleware, Wallet, billable, current_call
from asgi_metering.errors import AmountError
from asgi_metering.sources import PaymentSource, from_environment
from tests.harness.drive import body, status
from tests.pitfalls.scene import ANN, CREDIT, Scene, Visit, field_of, visit

SOURCES: dict[str, PaymentSource] = {
    "wallet": Wallet(warn_below=21),
    "plain wallet": Wallet(),
    "wallet with credit": Wallet(overdraft=5),
    "allowance": Allowance({"pro": 100}, name="daily"),
}


@pytest.mark.parametrize(
    ("source", "price", "said"),
    [
        ("wallet", 79, "ok"),
        ("wallet", 80, "warning"),
        ("wallet", 100, "blocked"),
        ("plain wallet", 99, "ok"),
        ("wallet with credit", 104, "ok"),
        ("wallet with credit", 105, "blocked"),
        ("allowance", 79, "ok"),
        ("allowance", 80, "warning"),
        ("allowance", 100, "blocked"),
        ("wallet", 0, "ok"),
    ],
)
def test_say_how_the_balance_stands(source: str, price: int, said: str, scene: Scene) -> None:
    """The handler and the client are told the same: warning at the level, blocked although this call was let in."""

    @billable(price, sources=[SOURCES[source]])
    async def endpoint(request: Request) -> PlainTextResponse:
        return PlainTextResponse(current_call().balance_status)

    app = MeteringMiddleware(Starlette(routes=[Route("/", endpoint)]), metering=scene.metering)
    (ended,) = visit(app, Visit())
    assert status(ended.log) == 200
    assert body(ended.log).decode() == said
    field = field_of(ended, "metering-available")
    if price == 0:
        assert field is None
    else:
        assert field is not None
        assert field.partition(";status=")[2] == ("" if said == "ok" else said)


def test_refuse_at_startup_a_level_that_the_unit_cannot_count(scene: Scene) -> None:
    """A warning level finer than the unit is found before the first paying request, like every other amount."""

    @billable(1, sources=[Wallet(warn_below="0.0000001")])
    async def endpoint(request: Request) -> PlainTextResponse:
        raise AssertionError("It ran.")

    app = MeteringMiddleware(Starlette(routes=[Route("/", endpoint)]), metering=scene.metering)
    with pytest.raises(BaseException, match=r"warning level '0\.0000001' is finer") as refused:
        visit(app, Visit())
    assert "Round it first" in str(refused.value)


def test_ask_for_what_a_plan_is_allowed_by_now() -> None:
    """S0.2, S4.1: limits by plan that change while the application runs count from the next call on."""
    scene, limits = Scene(), {"free": 10}

    @billable(1, sources=[Allowance(limits, per="month")])
    async def endpoint(_request: Request) -> PlainTextResponse:
        limits["free"] = 1
        return PlainTextResponse("ok")

    app = MeteringMiddleware(Starlette(routes=[Route("/", endpoint)]), metering=scene.metering)
    assert [status(ended.log) for ended in visit(app, Visit(), Visit())] == [200, 429]


@pytest.mark.parametrize("price", [1, lambda call: 1], ids=["fixed", "computed"])
def test_ask_a_function_for_the_limit_at_each_decision(price: Any) -> None:
    """S4.2, S4.17: one function of payer and plan is the source of the limit for gate, warning, preview and gauge."""
    scene, limits, asked = Scene(), {ANN: 2}, []

    async def limit(payer: str, plan: str | None) -> int:
        asked.append((payer, plan))
        return limits[payer]

    sources = [Allowance(limit, per="month")]

    @billable(price, line="messages", sources=sources)
    async def endpoint(_request: Request) -> PlainTextResponse:
        return PlainTextResponse(current_call().balance_status)

    app = MeteringMiddleware(Starlette(routes=[Route("/", endpoint)]), metering=scene.metering)
    ended = visit(app, Visit(), Visit(), Visit())
    assert [status(each.log) for each in ended] == [200, 200, 429]
    assert [body(each.log).decode() for each in ended[:2]] == ["ok", "blocked"]
    assert set(asked) == {(ANN, None)}

    async def looked() -> tuple[int, int, int, bool]:
        (gauge,) = await scene.metering.allowances(ANN, sources=sources, plan="pro")
        notice = await scene.metering.preview(ANN, line="messages", price=1, sources=sources, plan="pro")
        return gauge.used // CREDIT, gauge.limit // CREDIT, gauge.remaining // CREDIT, notice.admitted

    assert asyncio.run(looked()) == (2, 2, 0, False)
    limits[ANN] = 3
    assert asyncio.run(looked()) == (2, 3, 1, True)
    assert [status(each.log) for each in visit(app, Visit(), Visit())] == [200, 429]
    limits[ANN] = 1
    # Cut below what is used, which is told as it is (S4.4).
    assert asyncio.run(looked()) == (3, 1, 0, False)


def test_let_nobody_in_by_a_limit_that_cannot_be_told() -> None:
    """S4.17: a function that raises, or answers no amount, lets nobody in, and no other source pays instead."""
    scene, answers = Scene(), iter([-1, "many", RuntimeError("no database")])

    def limit() -> Any:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    @billable(1, sources=[Allowance(limit), Wallet()])
    async def endpoint(_request: Request) -> PlainTextResponse:
        raise AssertionError("It ran.")

    app = MeteringMiddleware(Starlette(routes=[Route("/", endpoint)]), metering=scene.metering)
    ended = visit(app, Visit(), Visit(), Visit())
    assert [type(each.exception) for each in ended] == [AmountError, AmountError, RuntimeError]
    assert scene.settled() == 0


def test_count_without_refusing_by_the_default_limit() -> None:
    """S4.1, S4.16: where operators set no limit, the default lets everybody in, and what is used still counts."""
    scene = Scene()
    sources = [Allowance(from_environment("MONTHLY_LIMIT", 999_999, environ={}), per="month")]

    @billable(1, sources=sources)
    async def endpoint(_request: Request) -> PlainTextResponse:
        return PlainTextResponse(current_call().balance_status)

    app = MeteringMiddleware(Starlette(routes=[Route("/", endpoint)]), metering=scene.metering)
    assert {body(ended.log) for ended in visit(app, *[Visit()] * 5)} == {b"ok"}
    (gauge,) = asyncio.run(scene.metering.allowances(ANN, sources=sources))
    assert (gauge.used // CREDIT, gauge.remaining // CREDIT) == (5, 999_994)
    assert scene.settled() == 0

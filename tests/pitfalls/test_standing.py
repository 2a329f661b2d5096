"""What a response says of the balance that pays: fine, nearly spent, or spent (S3.6)."""

from __future__ import annotations

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from asgi_metering import Allowance, MeteringMiddleware, Wallet, billable, current_call
from asgi_metering.sources import PaymentSource
from tests.harness.drive import body, status
from tests.pitfalls.scene import Scene, Visit, field_of, visit

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

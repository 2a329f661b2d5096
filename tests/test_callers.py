"""Lines that name callers: whoever calls as another type is charged nothing there, and told of by nobody (S2.10)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from asgi_metering import Caller, Metering, MeteringMiddleware, TokenUsage, billable, current_call, rate_limited
from asgi_metering.errors import ConfigurationError
from asgi_metering.events.sinks import CallbackSink
from asgi_metering.prices import per_unit
from asgi_metering.usage import UsageEvent
from tests.harness.drive import Drive, drive, headers, http_scope, status

CALLERS = {
    "agent": Caller("agent", "acme", type="production_agent"),
    "batch": Caller("batch", "acme", type="batch"),
    "ours": Caller("ours", "acme", type="internal"),
    "plain": Caller("plain", "acme"),
}
NAMED = ["production_agent", "batch"]


class Desk:
    """An application with one endpoint, and what was told of its calls."""

    def __init__(self, *policies: Any, **options: Any) -> None:
        self.told: list[UsageEvent] = []
        self.metering = Metering(
            identify=lambda connection: CALLERS.get(connection.headers.get("x-key", "")),
            sinks=(CallbackSink(self._take, "told"),),
            **options,
        )
        self.ran = 0
        endpoint: Any = self.endpoint
        for policy in reversed(policies):
            endpoint = policy(endpoint)
        routes = [Route("/", endpoint, methods=["POST"])]
        self.app = MeteringMiddleware(Starlette(routes=routes), metering=self.metering)

    async def _take(self, events: Any) -> None:
        self.told.extend(events)

    async def endpoint(self, request: Request) -> JSONResponse:
        """Surface three items."""
        self.ran += 1
        current_call().record(TokenUsage(input=3), units={"items": 3})
        return JSONResponse({})

    async def ask(self, who: str, **fields: str) -> Drive:
        """One request."""
        return await drive(self.app, http_scope("/", "POST", headers=[("x-key", who), *fields.items()]), body=b"{}")

    async def statuses(self, *who: str) -> list[int | None]:
        """What requests are answered, one after the other."""
        return [status((await self.ask(each)).log) for each in who]

    async def spent(self) -> str:
        """What acme has settled, in credits."""
        await self.metering.runtime().booked()
        return self.metering.unit.text((await self.metering.balance("acme")).settled)


def play(
    scene: Callable[[Desk], Awaitable[None]], *policies: Any, credit: int = 100, **options: Any
) -> list[UsageEvent]:
    """Play *scene* on an application whose account has so much; the books balance, and what was told is returned."""

    async def run() -> list[UsageEvent]:
        desk = Desk(*policies, **options)
        async with desk.metering as metering:
            if credit:
                await metering.grant("acme", credit, id="g")
            await scene(desk)
            assert await metering.check() == []
        return desk.told

    return asyncio.run(run())


@pytest.mark.parametrize("price", [2, lambda request: 2, per_unit(items=2)], ids=["fixed", "computed", "measured"])
def test_charge_the_callers_that_a_line_names(price: Any) -> None:
    """Each request of a type that is named is one event; others run, and no event is told of them (S2.10, S2.12)."""

    async def scene(desk: Desk) -> None:
        assert await desk.statuses("agent", "ours", "plain", "batch") == [200] * 4
        assert await desk.spent() == ("4" if price == 2 or callable(price) else "12")

    size: dict[str, Any] = {"hold": 6} if isinstance(price, type(per_unit(items=2))) else {}
    told = play(scene, billable(price, callers=NAMED, **size))
    assert [(event.caller, event.caller_type) for event in told] == [
        ("agent", "production_agent"),
        ("batch", "batch"),
    ]


def test_an_ordinary_caller_is_none_of_a_named_type() -> None:
    """Whom `identify` gave no type is charged by lines that name nobody, and by no other (S2.23)."""

    async def scene(desk: Desk) -> None:
        assert await desk.statuses("plain", "ours") == [200] * 2

    assert play(scene, billable(2, callers=("production_agent",)), credit=0) == []
    assert [event.amount for event in play(scene, billable(2))] == [2_000_000] * 2


def test_compute_nothing_for_callers_of_another_type() -> None:
    """Neither price, payer nor source is asked for, nor is there a hold: the type decides before any of it (S2.12)."""
    asked: list[str] = []

    def price(request: Request) -> int:
        asked.append("price")
        return 2

    def payer(request: Request) -> str:
        asked.append("payer")
        return "acme"

    async def scene(desk: Desk) -> None:
        ended = await desk.ask("ours")
        assert status(ended.log) == 200
        assert "metering-available" not in {name for name, _ in headers(ended.log)}
        assert asked == []
        await desk.ask("agent")
        assert asked == ["payer", "price"]

    play(scene, billable(price, payer=payer, callers=NAMED))


def test_refuse_no_caller_of_another_type_for_its_account() -> None:
    """An empty account refuses those whom the line charges, and nobody else."""

    async def scene(desk: Desk) -> None:
        assert await desk.statuses("agent", "ours", "plain") == [402, 200, 200]

    play(scene, billable(2, callers=NAMED), credit=0)


def test_ask_who_calls_before_the_type_is_known() -> None:
    """Nobody is of no type: a billable route needs an identity, whomever its line names."""

    async def scene(desk: Desk) -> None:
        assert await desk.statuses("stranger") == [401]

    play(scene, billable(2, callers=NAMED))


def test_limit_callers_of_every_type() -> None:
    """What is not charged is not unlimited."""

    async def scene(desk: Desk) -> None:
        assert await desk.statuses("ours", "ours", "agent", "agent") == [200, 429, 200, 429]
        assert await desk.spent() == "2"

    play(scene, rate_limited("1/day"), billable(2, callers=NAMED))


def test_claim_no_key_for_callers_of_another_type() -> None:
    """For them the endpoint is as if it had no price: requests with an Idempotency-Key run, each of them."""

    async def scene(desk: Desk) -> None:
        for who in ("ours", "ours", "agent", "agent"):
            assert status((await desk.ask(who, **{"idempotency-key": "k1"})).log) == 200
        assert desk.ran == 3
        assert await desk.spent() == "2"

    play(scene, billable(2, callers=NAMED, idempotency=True))


@pytest.mark.parametrize("where", ["line", "metering"])
def test_tell_the_shadow_of_named_callers_alone(where: str) -> None:
    """In the shadow, too, a line is about those whom it names."""

    async def scene(desk: Desk) -> None:
        assert await desk.statuses("agent", "ours") == [200, 200]

    told = play(scene, billable(2, callers=NAMED, shadow=where == "line"), shadow=where == "metering", credit=0)
    assert [(event.caller, event.attributes["metering.shadow.outcome"]) for event in told] == [("agent", "denied")]


def test_name_callers_at_the_explicit_gate() -> None:
    """A handler that asks for itself names callers in the same way."""

    class Asking(Desk):
        async def endpoint(self, request: Request) -> JSONResponse:
            await current_call().admit(billable(2, callers=NAMED))
            return await super().endpoint(request)

    async def run() -> None:
        desk = Asking()
        async with desk.metering as metering:
            await metering.grant("acme", 2, id="g")
            assert await desk.statuses("ours", "agent", "batch") == [200, 200, 402]
            assert await desk.spent() == "2"

    asyncio.run(run())


@pytest.mark.parametrize("callers", ["production_agent", [], [None], ["a", ""], 7])
def test_refuse_types_that_nobody_could_have(callers: Any) -> None:
    """One text is not a list of types, and a line that names nobody charges nobody: both are mistakes at import."""
    with pytest.raises(ConfigurationError, match=r"names no types of callers. Write \['production_agent'\], say"):
        billable(2, callers=callers)

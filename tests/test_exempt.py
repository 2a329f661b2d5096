"""Exempt callers: who the application knows to be its own is charged nothing, and is told of all the same (S0.18)."""

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
from asgi_metering.call import CallRefused
from asgi_metering.errors import ConfigurationError
from asgi_metering.events.sinks import CallbackSink
from asgi_metering.prices import per_token
from asgi_metering.usage import UsageEvent
from tests.harness.drive import Drive, body, drive, headers, http_scope, status

CALLERS = {
    "dev": Caller("dev", "acme", exempt=True),
    "ann": Caller("ann", "acme"),
    "bot": Caller("bot", "acme", type="agent"),
}
PRICE = per_token(input=1, output=1)


class Desk:
    """An application with one endpoint, and what was told of its calls."""

    def __init__(self, *policies: Any) -> None:
        self.told: list[UsageEvent] = []
        self.metering = Metering(
            identify=lambda connection: CALLERS.get(connection.headers["x-key"]),
            sinks=(CallbackSink(self._take, "told"),),
        )
        self.ran = 0
        self.gate = asyncio.Event()
        self.gate.set()
        endpoint: Any = self.endpoint
        for policy in reversed(policies):
            endpoint = policy(endpoint)
        routes = [Route("/", endpoint, methods=["POST"])]
        self.app = MeteringMiddleware(Starlette(routes=routes), metering=self.metering)

    async def _take(self, events: Any) -> None:
        self.told.extend(events)

    async def endpoint(self, request: Request) -> JSONResponse:
        """Use seven tokens."""
        self.ran += 1
        current_call().record(TokenUsage(input=3, output=4))
        await self.gate.wait()
        return JSONResponse({"affordable": current_call().affordable("output") > 1_000_000})

    async def ask(self, who: str, **fields: str) -> Drive:
        """One request."""
        return await drive(self.app, http_scope("/", "POST", headers=[("x-key", who), *fields.items()]), body=b"{}")

    async def statuses(self, *who: str) -> list[int | None]:
        """What requests are answered, one after the other."""
        return [status((await self.ask(each)).log) for each in who]


def play(scene: Callable[[Desk], Awaitable[None]], *policies: Any, credit: int = 100) -> list[UsageEvent]:
    """Play *scene* on an application whose account has so much; the books balance, and what was told is returned."""

    async def run() -> list[UsageEvent]:
        desk = Desk(*policies)
        async with desk.metering as metering:
            if credit:
                await metering.grant("acme", credit, id="g")
            await scene(desk)
            assert await metering.check() == []
        return desk.told

    return asyncio.run(run())


async def spent(desk: Desk) -> tuple[str, str]:
    """What acme has settled and owes, in credits."""
    await desk.metering.runtime().booked()
    balance = await desk.metering.balance("acme")
    return desk.metering.unit.text(balance.settled), desk.metering.unit.text(balance.debt)


@pytest.mark.parametrize("price", [2, PRICE, lambda request: 2], ids=["fixed", "measured", "computed"])
@pytest.mark.parametrize("credit", [0, 100])
def test_charge_an_exempt_caller_nothing(price: Any, credit: int) -> None:
    """An exempt caller runs whatever its account has, which is not touched; its call is told of, at 0 (S0.18)."""

    async def scene(desk: Desk) -> None:
        ended = await desk.ask("dev")
        assert (status(ended.log), body(ended.log)) == (200, b'{"affordable":true}')
        assert "metering-available" not in {name for name, _ in headers(ended.log)}
        assert await spent(desk) == ("0", "0")
        if credit:
            assert await desk.statuses("ann") == [200]
            assert await spent(desk) == ("7" if price is PRICE else "2", "0")

    size: dict[str, Any] = {"hold": 7} if price is PRICE else {}
    told = play(scene, billable(price, **size), credit=credit)
    assert (told[0].caller, told[0].payer, told[0].amount, told[0].usage) == ("dev", "acme", 0, TokenUsage(3, 4))


def test_charge_one_type_of_caller_alone() -> None:
    """A route that skips other types charges nobody else, and each event says of what type its caller was (S2.10)."""

    async def scene(desk: Desk) -> None:
        assert await desk.statuses("ann", "bot") == [200, 200]
        assert await spent(desk) == ("2", "0")

    told = play(scene, billable(2, skip_if=lambda call: call.caller.type != "agent"))
    assert {(each.caller_type, each.amount) for each in told} == {(None, 0), ("agent", 2_000_000)}


@pytest.mark.parametrize("key", ["caller", "payer"])
@pytest.mark.parametrize("limit", ["1/day", "10/day of tokens"])
def test_count_an_exempt_caller_by_nothing_of_its_own(key: Any, limit: str) -> None:
    """Limits by caller or payer neither refuse an exempt caller nor count it for others of its account (S0.18)."""

    async def scene(desk: Desk) -> None:
        assert await desk.statuses("dev", "dev", "dev", "ann", "dev") == [200] * 5
        assert await spent(desk) == ("7", "0")

    play(scene, rate_limited(limit, key=key), billable(PRICE, hold=TokenUsage(3, 4)))


@pytest.mark.parametrize("key", ["address", lambda request: "everybody"], ids=["address", "computed"])
def test_count_an_exempt_caller_by_what_everybody_shares(key: Any) -> None:
    """Limits by address, or by a key that the application computes, are about more than the caller, and count it."""

    async def scene(desk: Desk) -> None:
        assert await desk.statuses("dev", "dev", "ann") == [200, 429, 429]
        assert await spent(desk) == ("0", "0")

    play(scene, rate_limited("1/day", key=key), billable(2))


def test_give_an_exempt_caller_slots_of_everybody_only() -> None:
    """A pool of everybody has a slot less while an exempt caller works; its own number of slots bounds it not."""

    async def scene(desk: Desk) -> None:
        desk.gate.clear()
        working = [asyncio.create_task(desk.ask("dev")) for _ in range(3)]
        while desk.ran < 2:
            await asyncio.sleep(0)
        desk.gate.set()
        assert sorted([status((await each).log) for each in working]) == [200, 200, 503]
        assert await desk.statuses("dev") == [200]

    play(scene, rate_limited(concurrency=1, global_concurrency=2), billable(PRICE))


def test_run_the_request_of_an_exempt_caller_once() -> None:
    """An idempotency key means the same whoever pays nothing."""

    async def scene(desk: Desk) -> None:
        key = {"idempotency-key": "k1"}
        assert [status((await desk.ask("dev", **key)).log) for _ in range(2)] == [200, 200]
        assert desk.ran == 1
        assert await spent(desk) == ("0", "0")

    play(scene, billable(2, idempotency=True))


def test_preview_and_charge_for_an_exempt_caller_outside_http() -> None:
    """`charge` and `preview` exempt the same callers."""

    async def scene(desk: Desk) -> None:
        job: dict[str, Any] = {"payer": "acme", "line": "job", "price": 2}
        seen = await desk.metering.preview(caller=CALLERS["dev"], **job)
        assert (seen.admitted, seen.held) == (True, 0)
        async with desk.metering.charge(caller=CALLERS["dev"], **job) as call:
            assert call.held == 0
        with pytest.raises(CallRefused):
            async with desk.metering.charge(**job):
                raise AssertionError("It ran.")

    play(scene, billable(1), credit=0)


@pytest.mark.parametrize("value", ["false", "yes", 1, None])
def test_exempt_nobody_by_what_is_no_bool(value: Any) -> None:
    """What only looks like a yes, a text from somewhere, exempts nobody: it is a mistake."""
    with pytest.raises(ConfigurationError, match="of caller 'ann' is no bool"):
        Caller("ann", exempt=value)

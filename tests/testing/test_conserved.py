"""`assert_conserved`: what a user's own test is told of its books (DESIGN 8)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from asgi_metering import Caller, Metering, MeteringMiddleware, billable
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.testing import assert_conserved


def play(scene: Callable[[Metering], Awaitable[None]]) -> None:
    """Play *scene* on a metering where ann has ten credits."""

    async def run() -> None:
        async with Metering("memory://", sinks=()) as metering:
            await metering.grant("ann", 10, id="g")
            await scene(metering)

    asyncio.run(run())


def test_says_nothing_of_books_that_balance() -> None:
    """Books that balance, with nothing held, pass, also in a test by a client that is not async."""
    metering = Metering("memory://", identify=lambda _: Caller("ann"), sinks=())

    @billable(2)
    async def endpoint(request: Request) -> PlainTextResponse:
        return PlainTextResponse("ok")

    app = Starlette(routes=[Route("/", endpoint, methods=["POST"])])
    app.add_middleware(MeteringMiddleware, metering=metering)
    with TestClient(app) as client:
        assert client.portal is not None
        assert client.post("/").status_code == 402
        client.portal.call(lambda: metering.grant("ann", 10, id="g"))
        assert client.post("/").status_code == 200
        client.portal.call(assert_conserved, metering)


def test_tells_of_a_call_that_holds_something() -> None:
    """A call that has not ended is told, with what it holds, unless that is said to be right."""

    async def scene(metering: Metering) -> None:
        async with metering.charge(payer="ann", line="job", price=2) as call:
            with pytest.raises(AssertionError, match=f"{call.id}.*'job' has not ended: it holds 2000000 .*'ann'"):
                await assert_conserved(metering, within_s=0.0)
            await assert_conserved(metering, held=True)
        await assert_conserved(metering)

    play(scene)


def test_waits_for_ends_that_nobody_waits_for() -> None:
    """A call that ends in the meantime is no fault."""

    async def scene(metering: Metering) -> None:
        door = asyncio.Event()

        async def work() -> None:
            async with metering.charge(payer="ann", line="job", price=2):
                await door.wait()

        job = asyncio.create_task(work())
        await asyncio.sleep(0)
        looking = asyncio.create_task(assert_conserved(metering, within_s=10.0))
        await asyncio.sleep(0)
        door.set()
        await asyncio.gather(job, looking)

    play(scene)


def test_tells_of_books_that_do_not_balance() -> None:
    """What does not balance is told in the words of the proof."""

    async def scene(metering: Metering) -> None:
        assert isinstance(metering.store, MemoryStore)
        accounts = metering.store._state.accounts
        accounts["ann", "credits"] = accounts["ann", "credits"]._replace(settled=1)
        with pytest.raises(AssertionError, match="ann"):
            await assert_conserved(metering)
        accounts["ann", "credits"] = accounts["ann", "credits"]._replace(settled=0)

    play(scene)

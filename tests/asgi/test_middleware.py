"""The middleware as an ASGI layer: what passes through it, and which requests it has nothing to do with."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from asgi_metering import Call, MeteringMiddleware, TokenUsage, billable, current_call, metered_app
from tests.harness.drive import Drive, body, drive, status
from tests.pitfalls.apps import installed
from tests.pitfalls.scene import POOR, Scene, Visit, http_only, visit

PRICE = 2
JSON = (("content-type", "application/json"),)


def endpoint_named(name: str) -> Callable[[Request], Awaitable[PlainTextResponse]]:
    """A function of its own, to be decorated or not."""

    async def endpoint(_request: Request) -> PlainTextResponse:
        return PlainTextResponse(name)

    return endpoint


# -- what passes -------------------------------------------------------------------------------------------


def test_show_the_endpoint_what_was_set_outside() -> None:
    """X.2: context variables of layers around the metering, and its own, are seen by the endpoint in the same task."""
    scene = Scene()
    tenant: ContextVar[str] = ContextVar("tenant")

    @billable(PRICE)
    async def endpoint(_request: Request) -> PlainTextResponse:
        return PlainTextResponse(f"{tenant.get()} {current_call().payer}")

    metered = MeteringMiddleware(Starlette(routes=[Route("/", endpoint)]), metering=scene.metering)

    async def outer(scope: Scope, receive: Receive, send: Send) -> None:
        tenant.set("acme")
        await metered(scope, receive, send)

    (ended,) = visit(outer, Visit())
    assert body(ended.log) == b"acme ann"


def test_let_go_of_a_stream_that_is_over() -> None:
    """A call that streamed, and what was kept of its body, goes with its request, and not with the next collection."""
    scene = Scene()
    calls: list[weakref.ref[Call]] = []

    @billable(PRICE)
    async def admitted() -> None:
        calls.append(weakref.ref(current_call()))

    @http_only
    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await admitted()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for more in (True, True, False):
            await send({"type": "http.response.body", "body": b"part", "more_body": more})

    async def story() -> list[Call | None]:
        async with scene.metering:
            metered = MeteringMiddleware(app, metering=scene.metering)
            gc.disable()
            try:
                await drive(metered, Visit().scope())
                return [call() for call in calls]
            finally:
                gc.enable()

    assert asyncio.run(story()) == [None]


def test_hand_over_each_part_of_a_stream_as_it_comes() -> None:
    """X.2: the client has the first part before the second one is made: nothing is buffered."""
    scene = Scene()

    async def story() -> Drive:
        seen = asyncio.Event()

        @billable(PRICE)
        async def endpoint(_request: Request) -> StreamingResponse:
            async def parts() -> AsyncIterator[str]:
                yield "first"
                await seen.wait()
                yield "second"

            return StreamingResponse(parts())

        metered = MeteringMiddleware(Starlette(routes=[Route("/", endpoint)]), metering=scene.metering)

        async def watched(scope: Scope, receive: Receive, send: Send) -> None:
            async def passed(message: Message) -> None:
                await send(message)
                if message.get("body") == b"first":
                    seen.set()

            await metered(scope, receive, passed)

        return await drive(watched, Visit().scope())

    ended = asyncio.run(story())
    assert body(ended.delivered) == b"firstsecond"
    assert scene.settled() == PRICE


def test_pass_the_disconnect_on() -> None:
    """X.2: an application that listens hears that its client left."""
    scene = Scene()
    heard: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        heard.extend([(await receive())["type"] for _ in range(2)])

    metered = MeteringMiddleware(metered_app(http_only(app), billable(PRICE)), metering=scene.metering)
    asyncio.run(drive(metered, Visit().scope(), disconnect_at=2))
    assert heard[-1] == "http.disconnect"


# -- what costs something ----------------------------------------------------------------------------------


def test_ask_nothing_for_routes_that_nobody_priced() -> None:
    """Only the priced route is counted, billed or written about, and none that merely looks like it (S0.4, S0.14)."""
    scene = Scene(tells=True)
    routes = [Route("/sessions/turn", billable(PRICE, line="turn")(endpoint_named("turn")), methods=["POST"])]
    routes += [Route(path, endpoint_named(path)) for path in ("/sessions", "/sessions/turn-free")]
    app = installed(Starlette(routes=routes), scene.metering, "added")
    free = visit(app, Visit("/sessions"), Visit("/sessions/turn-free"), Visit("/sessions/turn"))
    assert [status(each.log) for each in free] == [200, 200, 405]
    assert (scene.books.admissions, scene.books.ends, scene.books.emitted) == ([], [], [])
    visit(app, Visit("/sessions/turn", "POST"))
    assert scene.settled() == PRICE
    assert [event.line for event in scene.told] == ["turn"]


def test_bill_no_undecorated_route() -> None:
    """S2.17: an endpoint that reports its usage but has no price is billed nothing, and no line hears of it."""
    scene = Scene(tells=True)

    async def endpoint(_request: Request) -> PlainTextResponse:
        current_call().record(TokenUsage(input=5, output=5))
        return PlainTextResponse("ok")

    visit(installed(Starlette(routes=[Route("/", endpoint)]), scene.metering, "added"), Visit())
    assert scene.settled() == 0
    assert scene.told == []


def test_charge_once_however_many_turns_it_took() -> None:
    """A fixed price is one charge per successful request, whatever the number of inner calls (S4.8)."""
    scene = Scene()

    @billable(PRICE)
    async def agent(_request: Request) -> PlainTextResponse:
        for _ in range(5):
            current_call().record(TokenUsage(input=100, output=100))
        return PlainTextResponse("ok")

    visit(installed(Starlette(routes=[Route("/", agent)]), scene.metering, "added"), Visit())
    assert len(scene.books.ends) == 1
    assert scene.settled() == PRICE


def test_tell_of_a_refusal_and_of_a_success_apart() -> None:
    """S2.18: only a call that ran is a billing event; each refusal is counted, once, with its reason."""
    scene = Scene(tells=True)
    app = installed(Starlette(routes=[Route("/", billable(PRICE)(endpoint_named("paid")))]), scene.metering, "added")
    visit(app, Visit(caller=POOR), Visit(caller=POOR), Visit())
    assert [(event.payer, event.amount) for event in scene.told] == [("ann", PRICE * 1_000_000)]
    assert sum(scene.metering.meters.totals("refusals").values()) == 2


async def owned(request: Request) -> None:
    """A dependency: only ann's sessions are there."""
    if request.headers["x-api-key"] != "ann":
        raise HTTPException(404)


def test_ask_behind_the_check_of_ownership() -> None:
    """A stranger sees the 404 of the dependency, whatever the body or balance: the gate was not asked (S0.40)."""
    scene = Scene()

    app = FastAPI()

    @app.post("/sessions/{session}")
    @billable(PRICE)
    async def turn(session: str, body: dict[str, Any], owner: Annotated[None, Depends(owned)]) -> str:
        return session

    stranger, owner = visit(
        installed(app, scene.metering, "added"),
        Visit("/sessions/1", "POST", caller=POOR, body=b"[]", headers=JSON),
        Visit("/sessions/1", "POST", body=b"{}", headers=JSON),
    )
    assert (status(stranger.log), status(owner.log)) == (404, 200)
    assert [ask.payer for ask in scene.books.admissions] == ["ann"]

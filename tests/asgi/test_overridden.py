"""Methods that a middleware further in overrides: what is free when it comes in is free no more (X.4, pitfall 12)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from asgi_metering import MeteringMiddleware, billable, metered_app, rate_limited, unlimited
from asgi_metering.asgi.types import ASGIApp, Receive, Scope, Send
from asgi_metering.stores.contract import EverythingKept
from tests.counting import Hall, problem_of
from tests.harness.drive import drive, http_scope, status

Turn = Callable[[Request], Awaitable[Response]]


def mutating(app: ASGIApp, method: str) -> ASGIApp:
    """A middleware of Starlette's own that overrides the method in the scope that it was given."""

    async def dispatch(request: Request, turn: Turn) -> Response:
        request.scope["method"] = method
        return await turn(request)

    return BaseHTTPMiddleware(app, dispatch=dispatch)


def copying(app: ASGIApp, method: str) -> ASGIApp:
    """One that passes a copy on."""

    async def overridden(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "method": method}, receive, send)

    return overridden


class House:
    """A hall whose routes are behind such a middleware, and what of them ran."""

    def __init__(self, override: Callable[[ASGIApp, str], ASGIApp], method: str = "POST", **limits: Any) -> None:
        self.ran: list[str] = []

        async def work(request: Request) -> Response:
            self.ran.append(request.method)
            return PlainTextResponse("paid work")

        async def steps(request: Request) -> Any:
            self.ran.append(request.method)
            yield "paid work"

        async def plain(request: Request) -> Response:
            return PlainTextResponse("work")

        paid = billable(1)(steps)

        async def streamed(request: Request) -> Response:
            return StreamingResponse(paid(request))

        def sync(request: Request) -> Response:
            return PlainTextResponse("paid work")

        routes = {
            "/paid": billable(1)(work),
            "/streamed": streamed,
            "/sync": billable(1)(sync),
            "/app": metered_app(PlainTextResponse("paid work"), billable(1)),
            "/limited": rate_limited("1/minute")(plain),
            "/plain": plain,
        }
        listed = [Route(path, each, methods=["GET", "POST", "HEAD", "OPTIONS"]) for path, each in routes.items()]
        self.hall = Hall(override(Starlette(routes=listed), method), **limits)

    def answers(self, *asked: tuple[str, str]) -> list[int]:
        """The status of requests to paths, by methods."""

        async def play() -> list[int]:
            async with self.hall.metering:
                return [status((await self.hall.ask(path, method, key="ann")).log) for method, path in asked]

        return asyncio.run(play())


@pytest.mark.parametrize("override", [mutating, copying])
@pytest.mark.parametrize("method", ["OPTIONS", "HEAD"])
@pytest.mark.parametrize("path", ["/paid", "/streamed", "/sync", "/app"])
def test_charge_what_was_made_another_method(
    override: Callable[[ASGIApp, str], ASGIApp], method: str, path: str
) -> None:
    """X.4: OPTIONS and HEAD that reach a paid endpoint as POST are charged: who has nothing gets 402, and no work."""
    house = House(override)
    assert house.answers((method, path)) == [402]
    assert house.ran == []


@pytest.mark.parametrize("override", [mutating, copying])
def test_leave_free_what_is_still_free(override: Callable[[ASGIApp, str], ASGIApp]) -> None:
    """X.4: a middleware that makes HEAD of OPTIONS makes nothing of it that would be charged."""
    house = House(override, "HEAD")
    assert house.answers(*[("OPTIONS", path) for path in ("/paid", "/plain", "/plain")]) == [200] * 3
    assert house.ran == ["HEAD"]


def test_count_nothing_that_is_still_free() -> None:
    """X.4: nor anything that limits of a middleware would count."""
    house = House(mutating, "HEAD", application_limits=["1/minute"], default_limits=["1/minute"])
    assert house.answers(*[("OPTIONS", "/plain")] * 3) == [200] * 3


@pytest.mark.parametrize("override", [mutating, copying])
def test_count_what_was_made_another_method(override: Callable[[ASGIApp, str], ASGIApp]) -> None:
    """X.4: an endpoint's own limit counts OPTIONS that reach it as POST."""
    assert House(override).answers(*[("OPTIONS", "/limited")] * 3) == [200, 429, 429]


def without_request(override: Callable[[ASGIApp, str], ASGIApp] | None) -> Hall:
    """FastAPI's endpoints that are handed nothing of their request, behind such a middleware, or behind none."""
    app = FastAPI()
    methods = ["GET", "POST", "HEAD", "OPTIONS"]

    @app.api_route("/paid", methods=methods)
    @billable(1)
    async def paid() -> str:
        return "paid work"

    @app.api_route("/sync", methods=methods)
    @billable(1)
    def sync() -> str:
        return "paid work"

    included = APIRouter()

    @included.api_route("/limited", methods=methods)
    @rate_limited("1/minute")
    async def limited() -> str:
        return "work"

    app.include_router(included, prefix="/in")
    return Hall(app if override is None else override(app, "POST"))


@pytest.mark.parametrize("override", [mutating, copying])
@pytest.mark.parametrize("method", ["OPTIONS", "HEAD"])
def test_charge_at_an_endpoint_that_sees_no_request(override: Callable[[ASGIApp, str], ASGIApp], method: str) -> None:
    """X.4: neither is it a way to paid work that the endpoint asks for no request, in which it could be seen."""
    hall = without_request(override)

    async def play() -> None:
        async with hall.metering:
            for path, expected in (("/paid", 402), ("/sync", 402), ("/in/limited", 200), ("/in/limited", 429)):
                assert status((await hall.ask(path, method, key="ann")).log) == expected

    asyncio.run(play())


@pytest.mark.parametrize("method", ["OPTIONS", "HEAD"])
def test_leave_free_where_nothing_copies(method: str) -> None:
    """X.4: without such a middleware nothing of a free request is charged or counted, by FastAPI's routers either."""
    hall = without_request(None)

    async def play() -> None:
        async with hall.metering:
            for path in ("/paid", "/sync", "/in/limited", "/in/limited"):
                assert status((await hall.ask(path, method, key="ann")).log) == 200

    asyncio.run(play())


@pytest.mark.parametrize("method", ["OPTIONS", "HEAD"])
def test_count_nothing_that_an_inner_middleware_answers(method: str) -> None:
    """X.4: preflights that CORS answers behind the limits, and what no route takes, are not counted."""
    inner = GZipMiddleware(CORSMiddleware(Starlette(), allow_origins=["*"], allow_methods=["POST"]))
    hall = Hall(inner, application_limits=["1/minute"], default_limits=["1/minute"])
    fields = {"origin": "http://a", "access-control-request-method": "POST", "accept-encoding": "gzip"}
    scope = http_scope("/", method, headers=list(fields.items()))

    async def play() -> None:
        async with hall.metering:
            expected = 200 if method == "OPTIONS" else 404
            assert [status((await drive(hall.app, dict(scope))).log) for _ in range(3)] == [expected] * 3

    asyncio.run(play())


@pytest.mark.parametrize("limits", ["application_limits", "default_limits"])
@pytest.mark.parametrize("path", ["/plain", "/own"])
def test_count_by_the_middleware_what_may_have_become_another_method(limits: str, path: str) -> None:
    """X.4, S2.33: behind a copy of the scope nobody knows the method; a route that it names is not trusted either."""

    async def work(request: Request) -> Response:
        return PlainTextResponse("work")

    listed = [Route("/plain", work), Route("/own", unlimited(work), methods=["OPTIONS"])]

    async def rewriting(scope: Scope, receive: Receive, send: Send) -> None:
        await Starlette(routes=listed)({**scope, "method": "GET", "path": "/plain"}, receive, send)

    app = Starlette(routes=listed)
    app.add_middleware(lambda _: rewriting)
    hall = Hall(app, **{limits: ["2/minute"]})

    async def play() -> None:
        async with hall.metering:
            answered = [status((await hall.ask(path, "OPTIONS", key="ann")).log) for _ in range(4)]
            assert answered == [200, 200, 429, 429]

    asyncio.run(play())


@pytest.mark.parametrize("order", [("OPTIONS", "POST"), ("POST", "OPTIONS")])
def test_count_by_each_layer_in_its_own_bucket(order: tuple[str, str]) -> None:
    """X.4, X.1: of two layers each counts a request in the same bucket, whatever its method was when it came in."""
    hall = Hall(mutating(PlainTextResponse("work"), "POST"), application_limits=["9/minute"])
    hall.app.app = MeteringMiddleware(hall.app.app, hall.metering, application_limits=["2/minute"])

    async def play() -> None:
        async with hall.metering:
            answered = [status((await hall.ask("/", method, key="ann")).log) for method in order * 2]
            assert answered == [200, 200, 429, 429]
            state = (await hall.metering.store.read(EverythingKept())).state
            assert sorted(counter.used for counter in state.counters.values()) == [2, 4]

    asyncio.run(play())


def test_refuse_by_the_outer_layer_first() -> None:
    """X.4, X.1: where the outer layer refuses what is free no more, the inner one has counted nothing, as ever."""
    hall = Hall(mutating(PlainTextResponse("work"), "POST"), application_limits=["1/minute"])
    hall.app.app = MeteringMiddleware(hall.app.app, hall.metering, application_limits=["9/minute"])

    async def play() -> None:
        async with hall.metering:
            answered = [status((await hall.ask("/", "OPTIONS", key="ann")).log) for _ in range(3)]
            assert answered == [200, 429, 429]
            state = (await hall.metering.store.read(EverythingKept())).state
            assert [counter.used for counter in state.counters.values()] == [1, 1]

    asyncio.run(play())


@pytest.mark.parametrize("limits", ["application_limits", "default_limits"])
@pytest.mark.parametrize("inner", [False, True], ids=["outermost", "inner"])
def test_count_by_the_middleware_what_is_free_no_more(limits: str, inner: bool) -> None:
    """X.4, S2.33: limits of a middleware count OPTIONS that become POST with all others, before their response."""
    said = {limits: [rate_limited("2/minute", key="address")]}
    house = House(mutating, **({} if inner else said))
    if inner:
        house.hall.app.app = MeteringMiddleware(house.hall.app.app, house.hall.metering, **said)
    asked = [("OPTIONS", "/plain"), ("POST", "/plain"), ("OPTIONS", "/plain"), ("POST", "/plain")]
    assert house.answers(*asked) == [200, 200, 429, 429]


def test_refuse_what_fails_behind_an_override() -> None:
    """X.4: who is over a limit hears that, also where the application raised; who is not hears of the failure."""

    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        scope["method"] = "POST"
        raise LookupError("lost")

    hall = Hall(broken, application_limits=["1/minute"])

    async def play() -> None:
        async with hall.metering:
            failed, refused = [await hall.ask("/", "OPTIONS", key="ann") for _ in range(2)]
            assert isinstance(failed.exception, LookupError)
            assert (status(refused.log), problem_of(refused)["code"]) == (429, "rate_limit")

    asyncio.run(play())

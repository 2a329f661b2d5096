"""Methods that a middleware further in overrides: what is free when it comes in is free no more (X.4, pitfall 12)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from asgi_metering import MeteringMiddleware, billable, metered_app, rate_limited
from asgi_metering.asgi.types import ASGIApp, Receive, Scope, Send
from tests.counting import Hall, problem_of
from tests.harness.drive import status

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
    """X.4: a middleware that makes HEAD of OPTIONS makes nothing of it that would be charged or counted."""
    house = House(override, "HEAD", application_limits=["1/minute"], default_limits=["1/minute"])
    assert house.answers(*[("OPTIONS", path) for path in ("/paid", "/plain", "/plain")]) == [200] * 3
    assert house.ran == ["HEAD"]


@pytest.mark.parametrize("override", [mutating, copying])
def test_count_what_was_made_another_method(override: Callable[[ASGIApp, str], ASGIApp]) -> None:
    """X.4: an endpoint's own limit counts OPTIONS that reach it as POST."""
    assert House(override).answers(*[("OPTIONS", "/limited")] * 3) == [200, 429, 429]


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

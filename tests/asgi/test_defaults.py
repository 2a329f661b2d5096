"""Default limits of a middleware: counted for routes without a decorator of their own, by the route that answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import APIRouter, Depends, FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from asgi_metering import (
    Metering,
    MeteringMiddleware,
    rate_limited,
    unlimited,
)
from asgi_metering.asgi import table
from asgi_metering.asgi.effective import effective_limits
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.testing import FakeClock
from tests.asgi.halls import PER_ADDRESS, answer_of, inner_app, play, starlette_app
from tests.counting import Hall, names_of
from tests.harness.drive import drive, http_scope, lifespan, status


def fastapi_app() -> FastAPI:
    """The same on FastAPI, with routers in routers."""
    app, router, nested = FastAPI(openapi_url=None), APIRouter(), APIRouter()

    @app.get("/plain")
    async def plain() -> str:
        return "plain"

    @router.get("/things/{thing}")
    async def thing(thing: int) -> int:
        return thing

    @router.get("/own")
    @rate_limited("4/minute", key="address")
    async def own() -> str:
        return "own"

    @rate_limited("4/minute", key="address")
    async def gate() -> None:
        """A dependency with the limit."""

    @nested.get("/guarded", dependencies=[Depends(gate)])
    async def guarded() -> str:
        return "guarded"

    @nested.get("/free")
    @unlimited
    async def free() -> str:
        return "free"

    @nested.get("/deep/{name}")
    def deep(name: str) -> str:
        return name

    router.include_router(nested, prefix="/nested")
    app.include_router(router, prefix="/v1")
    app.mount("/sub", starlette_app())
    return app


DEFAULTED: dict[str, tuple[Callable[[], Any], list[str], list[int]]] = {
    "plain": (starlette_app, ["/plain"] * 3, [200, 200, 429]),
    "parameters-are-one-route": (starlette_app, ["/things/1", "/things/2", "/things/3"], [200, 200, 429]),
    "routes-are-apart": (starlette_app, ["/plain", "/things/1", "/plain", "/things/2", "/plain"], [200] * 4 + [429]),
    "own": (starlette_app, ["/own"] * 5, [200] * 4 + [429]),
    "both": (starlette_app, ["/both"] * 3, [200, 200, 429]),
    "unlimited": (starlette_app, ["/free"] * 5, [200] * 5),
    "class": (starlette_app, ["/items"] * 3, [200, 200, 429]),
    "mounted": (starlette_app, ["/sub/plain", "/plain", "/sub/plain", "/sub/plain"], [200, 200, 200, 429]),
    "mounted-own": (starlette_app, ["/sub/own"] * 5, [200] * 4 + [429]),
    "mounted-by-parameter": (starlette_app, ["/a/router/plain", "/b/router/plain", "/c/router/plain"], [200, 200, 429]),
    "metered-app": (starlette_app, ["/gated/x"] * 5, [200] * 4 + [429]),
    "opaque": (starlette_app, ["/opaque/1", "/opaque/2", "/opaque/3"], [200, 200, 429]),
    "flood-404": (starlette_app, ["/x1", "/x2", "/x3", "/sub/x4", "/x5"], [404, 404, 429, 404, 429]),
    "flood-slashes": (starlette_app, ["//plain", "/plain/", "/./plain"], [404, 307, 429]),
    "host": (starlette_app, ["/hosted"] * 3, [404, 404, 429]),
    "fastapi": (fastapi_app, ["/plain"] * 3, [200, 200, 429]),
    "fastapi-router": (fastapi_app, ["/v1/things/1", "/v1/things/2", "/v1/things/3"], [200, 200, 429]),
    "fastapi-router-422": (fastapi_app, ["/v1/things/a", "/v1/things/b", "/v1/things/3"], [422, 422, 429]),
    "fastapi-router-own": (fastapi_app, ["/v1/own"] * 5, [200] * 4 + [429]),
    "fastapi-dependency": (fastapi_app, ["/v1/nested/guarded"] * 5, [200] * 4 + [429]),
    "fastapi-nested": (fastapi_app, ["/v1/nested/deep/1", "/v1/nested/deep/2", "/v1/nested/deep/3"], [200, 200, 429]),
    "fastapi-unlimited": (fastapi_app, ["/v1/nested/free"] * 4, [200] * 4),
    "fastapi-mount": (fastapi_app, ["/sub/things/1", "/sub/things/2", "/sub/things/3"], [200, 200, 429]),
    "fastapi-mount-own": (fastapi_app, ["/sub/own"] * 5, [200] * 4 + [429]),
    "asgi": (lambda: inner_app, ["/1", "/2", "/3"], [200, 200, 429]),
}


@pytest.mark.parametrize("inside", [False, True], ids=["around", "added"])
@pytest.mark.parametrize("case", DEFAULTED)
def test_count_each_route_by_default(case: str, inside: bool) -> None:
    """S2.30, S2.33: a default limit counts each route that has none of its own, and fails open on no path."""
    made, paths, expected = DEFAULTED[case]
    app = made()
    if inside and not isinstance(app, Starlette):
        return

    async def run() -> None:
        metering = Metering(MemoryStore(FakeClock()), sinks=())
        served = app
        if inside:
            app.add_middleware(MeteringMiddleware, metering=metering, default_limits=[PER_ADDRESS])
        else:
            served = MeteringMiddleware(app, metering, default_limits=[PER_ADDRESS])
        async with lifespan(served):
            assert [status((await drive(served, http_scope(path))).log) for path in paths] == expected

    asyncio.run(run())


def test_leave_methods_of_a_class_alone() -> None:
    """S2.30: of a class each method is a route: one may be unlimited, and another have limits of its own."""

    async def scene(hall: Hall) -> None:
        for method, expected in (("PUT", [200] * 5), ("POST", [200] * 4 + [429]), ("GET", [200, 200, 429])):
            assert [status((await hall.ask("/items", method)).log) for _ in expected] == expected

    play(scene, starlette_app(), default_limits=[PER_ADDRESS])


def test_give_slots_back_where_no_lifespan_comes(tmp_path: Path) -> None:
    """Pitfall 32: where nobody would hold a shutdown, a request waits until its slot is free again."""

    async def run() -> None:
        metering = Metering(f"sqlite:///{tmp_path}/m.db", sinks=())
        app = MeteringMiddleware(inner_app, metering, application_limits=[rate_limited(concurrency=1, key="address")])
        assert [status((await drive(app, http_scope("/"))).log) for _ in range(3)] == [200, 200, 200]
        await metering.stop()

    asyncio.run(run())


def test_count_wrong_methods_together() -> None:
    """S2.30: 405 floods are counted, by whatever methods clients invent, in one bucket for each key."""

    async def scene(hall: Hall) -> None:
        asked = [("/plain", "DELETE"), ("/own", "FOO1"), ("/free", "FOO2"), ("/things/1", "FOO3")]
        assert [status((await hall.ask(path, method)).log) for path, method in asked] == [405, 405, 429, 429]

    play(scene, starlette_app(), default_limits=[rate_limited("2/minute", key="address", per_method=False)])


def test_count_invented_methods_as_one() -> None:
    """S2.30: per_method= gives known methods counts of their own, and those that clients make up one for all."""

    async def scene(hall: Hall) -> None:
        methods = ["GET", "POST", "FOO1", "FOO2", "FOO3"]
        assert [status((await hall.ask("/x", method)).log) for method in methods] == [200, 200, 200, 200, 429]

    play(scene, inner_app, default_limits=[rate_limited("2/minute", key="address", per_method=True)])


def test_find_routes_below_a_root_path() -> None:
    """S2.30: where the server or the application says that it is mounted, routes are found below that."""

    async def scene(hall: Hall) -> None:
        driven = [await hall.ask("/api/free", root="/api") for _ in range(4)]
        assert [status(each.log) for each in driven] == [200] * 4
        assert status((await hall.ask("/apifree", root="/api")).log) == 404

    play(scene, starlette_app(), default_limits=[PER_ADDRESS])
    app = FastAPI()
    app.root_path = "/api"
    app.add_api_route("/free", unlimited(answer_of("free")), response_model=None)

    async def below(hall: Hall) -> None:
        assert await hall.statuses(*["/api/free"] * 3) == [200] * 3

    play(below, app, default_limits=[PER_ADDRESS])


class Handled:
    """An app with routes as Litestar keeps them: several handlers of one path, which it names in the scope."""

    def __init__(self) -> None:
        read = SimpleNamespace(fn=answer_of("read"), http_methods={"GET"})
        write = SimpleNamespace(fn=rate_limited("3/minute", key="address")(answer_of("write")), http_methods={"POST"})
        asked = SimpleNamespace(fn=answer_of("asked"), http_methods={"OPTIONS"})
        self.routes = [
            SimpleNamespace(path="/things/{thing:int}", route_handlers=[read, write, asked]),
            # Of a type that Starlette does not know.
            SimpleNamespace(path="/days/{day:date}", route_handlers=[read]),
        ]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        route = self.routes[0]
        scope["route_handler"] = next(each for each in route.route_handlers if scope["method"] in each.http_methods)
        response = await scope["route_handler"].fn(Request(scope))
        await response(scope, receive, send)


def test_count_the_handlers_of_one_path() -> None:
    """S2.30: routes as Litestar keeps them are read too: those without limits of their own are counted by default."""

    async def scene(hall: Hall) -> None:
        asked = [("/things/1", "GET"), ("/things/2", "GET"), ("/things/3", "GET"), *[("/things/1", "POST")] * 4]
        answered = [status((await hall.ask(path, method)).log) for path, method in asked]
        assert answered == [200, 200, 429, 200, 200, 200, 429]
        assert await hall.statuses("/days/2026-11-22", "/days/2026-11-23", "/days/2026-11-24") == [200, 200, 429]
        listed = [(limit.path, limit.methods, limit.source) for limit in effective_limits(hall.app)]
        assert listed == [
            ("/things/{thing:int}", ("GET",), "default"),
            ("/things/{thing:int}", ("POST",), "decorator"),
            ("/days/{day:date}", ("GET",), "default"),
            ("*", (), "default"),
        ]

    play(scene, Handled(), default_limits=[PER_ADDRESS])


def overridden(app: Any) -> Any:
    """*app* behind middleware that lets a field of the client choose the path."""

    async def override(scope: Any, receive: Any, send: Any) -> None:
        for name, value in scope["headers"]:
            if name == b"x-goto":
                scope = {**scope, "path": value.decode()}
        await app(scope, receive, send)

    override.app = app  # type: ignore[attr-defined]
    return override


@pytest.mark.parametrize("to", ["/plain", "/broken"])
@pytest.mark.parametrize("trusted", ["/free", "/own"])
def test_count_a_request_that_took_another_route(trusted: str, to: str) -> None:
    """S2.30: what changes the path behind the middleware is no way around default limits."""

    async def broken(request: Request) -> JSONResponse:
        raise ValueError("broken")

    app = starlette_app()
    app.router.routes.append(Route("/broken", broken))

    async def scene(hall: Hall) -> None:
        driven = [await hall.ask(trusted, goto=to) for _ in range(3)]
        assert driven[0].outcome == driven[1].outcome == ("raised" if to == "/broken" else "returned")
        assert (driven[2].outcome, status(driven[2].log)) == ("returned", 429)
        assert names_of(driven[2]) == ["2-per-minute"]
        assert await hall.statuses(trusted) == [200]

    play(scene, overridden(app), default_limits=[PER_ADDRESS])


@pytest.mark.parametrize(
    "beside",
    [
        rate_limited("9/minute", key="address", override_defaults=False),
        rate_limited("1/minute", key="address", shadow=True),
    ],
    ids=["beside", "shadow"],
)
def test_count_a_request_that_took_a_route_with_limits_beside(beside: Any) -> None:
    """S2.30: limits that do not stand for the default ones are no way around those either."""
    routes = {"/free": unlimited(answer_of("free")), "/both": beside(answer_of("both"))}
    app = Starlette(routes=[Route(path, run) for path, run in routes.items()])

    async def scene(hall: Hall) -> None:
        assert [status((await hall.ask("/free", goto="/both")).log) for _ in range(3)] == [200, 200, 429]
        assert await hall.statuses("/free") == [200]

    play(scene, overridden(app), default_limits=[PER_ADDRESS])


def test_forget_paths_that_clients_invent() -> None:
    """S2.30: neither paths, methods nor their lengths fill the memory, and routes are found all the same."""

    async def scene(hall: Hall) -> None:
        limits = hall.app.limits
        assert limits is not None
        assert await hall.statuses("/things/" + "x" * 300) == [200]
        # As long as servers let a request line be.
        assert status((await hall.ask("/things/1", "X" * 300)).log) == 405
        assert not limits._table._known  # type: ignore[union-attr]
        assert await hall.statuses(*(f"/y{at}" for at in range(5))) == [404] * 5
        known = limits._table._known  # type: ignore[union-attr]
        assert len(known) <= 2
        assert await hall.statuses("/things/1") == [200]

    was, table.MAX_PATHS = table.MAX_PATHS, 2
    try:
        play(scene, starlette_app(), default_limits=[rate_limited("9/minute", key="address")])
    finally:
        table.MAX_PATHS = was

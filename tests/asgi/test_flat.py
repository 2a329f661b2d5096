"""The limits of a middleware: counted for every request, or for routes without a decorator, before a body is read."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import APIRouter, Depends, FastAPI
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Host, Mount, Route, Router, WebSocketRoute
from starlette.websockets import WebSocket

from asgi_metering import (
    CreditGateMiddleware,
    Metering,
    MeteringMiddleware,
    RateLimitMiddleware,
    UsageEventsMiddleware,
    billable,
    current_call,
    metered_app,
    rate_limited,
    unlimited,
)
from asgi_metering.asgi import table
from asgi_metering.asgi.effective import effective_limits
from asgi_metering.errors import ConfigurationError, MeteringError
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.testing import FakeClock
from tests.counting import Hall, answer, caller_of, names_of, problem_of
from tests.harness.drive import assert_same_log, drive, headers, http_scope, lifespan, status, websocket_scope

PER_ADDRESS = rate_limited("2/minute", key="address")


def play(scene: Callable[[Hall], Awaitable[None]], app: Any = None, **hall: Any) -> Hall:
    """Play *scene* in a hall of *app*."""

    async def run() -> Hall:
        made = Hall(app, **hall)
        async with made.metering:
            await scene(made)
        return made

    return asyncio.run(run())


async def search(request: Request) -> JSONResponse:
    """An endpoint without a decorator."""
    return await answer(request)


class Reader:
    """An app that reads its body, and counts how often it is run."""

    def __init__(self) -> None:
        self.runs = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.runs += 1
        while (await receive()).get("more_body"):
            pass
        await PlainTextResponse("ok")(scope, receive, send)


# -- every request -----------------------------------------------------------------------------------------


def test_count_every_request_in_one_bucket() -> None:
    """S2.33: application limits count decorated routes, others, unknown paths and wrong methods alike, by their key."""

    async def scene(hall: Hall) -> None:
        assert await hall.statuses("/own", "/none", "/search", "/own") == [200, 404, 200, 429]
        assert status((await hall.ask("/search", "DELETE")).log) == 429
        assert await hall.statuses("/own", client="192.0.2.9") == [200]

    routes = {"/own": rate_limited("9/minute")(answer), "/search": search}
    play(scene, routes=routes, application_limits=[rate_limited("3/minute", key="address")])


def test_refuse_without_reading_a_byte() -> None:
    """DESIGN 5: a request that a flat limit refuses is answered before its body is read, and its app does not run."""
    app = Reader()

    async def scene(hall: Hall) -> None:
        driven = [await drive(hall.app, http_scope("/", "POST"), body=[b"a" * 10, b"b" * 10]) for _ in range(3)]
        assert [status(each.log) for each in driven] == [200, 200, 429]
        assert [len(each.received) for each in driven] == [2, 2, 0]
        assert app.runs == 2
        assert problem_of(driven[2])["code"] == "rate_limit"

    play(scene, app, application_limits=[PER_ADDRESS])


def test_change_only_the_fields_of_what_is_let_in() -> None:
    """S2.27: what passes flat limits is answered as without them, but for the fields that tell of the limits."""

    async def run() -> None:
        bare = Starlette(routes=[Route("/", search)])
        metering = Metering(MemoryStore(FakeClock()), sinks=())
        limited = MeteringMiddleware(Starlette(routes=[Route("/", search)]), metering, application_limits=[PER_ADDRESS])
        for path in ("/", "/none"):
            expected, actual = await drive(bare, http_scope(path)), await drive(limited, http_scope(path))
            start, *rest = actual.log
            kept = [field for field in start["headers"] if not field[0].startswith(b"ratelimit")]
            assert len(start["headers"]) == len(kept) + 2
            assert_same_log([{**start, "headers": kept}, *rest], expected.log)

    asyncio.run(run())


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS"])
def test_leave_free_methods_free(method: str) -> None:
    """DESIGN 7: HEAD, OPTIONS and CORS preflights are free, of flat limits too."""

    async def scene(hall: Hall) -> None:
        assert [status((await hall.ask("/", method)).log) for _ in range(3)] in ([200] * 3, [405] * 3)
        assert await hall.statuses("/") == [200]

    limits = [rate_limited("1/minute", key="address")]
    play(scene, routes={"/": search}, application_limits=limits, default_limits=limits)


async def echo(websocket: WebSocket) -> None:
    """A WebSocket without a decorator."""
    await websocket.accept()
    await websocket.close()


@pytest.mark.parametrize("extension", [True, False], ids=["denial", "close"])
@pytest.mark.parametrize("inner", [False, True], ids=["outermost", "inner"])
def test_count_the_handshakes_of_websockets(extension: bool, inner: bool) -> None:
    """X.1: application limits count the request that a WebSocket begins with, and refuse it before it is accepted."""

    async def run() -> None:
        metering = Metering(MemoryStore(FakeClock()), sinks=())
        app = Starlette(routes=[WebSocketRoute("/", echo), Route("/http", search)])
        limited: Any = RateLimitMiddleware(app, metering, application_limits=[PER_ADDRESS], default_limits=["1/minute"])
        served = CreditGateMiddleware(limited, metering) if inner else limited
        answered = []
        for _ in range(3):
            scope = websocket_scope("/", extensions={"websocket.http.response": {}} if extension else None)
            answered.append((await drive(served, scope, messages=[{"type": "websocket.connect"}])).log)
        assert [log[0]["type"] for log in answered[:2]] == ["websocket.accept"] * 2
        if extension:
            assert (answered[2][0]["type"], answered[2][0]["status"]) == ("websocket.http.response.start", 429)
        else:
            assert answered[2] == [{"type": "websocket.close", "code": 4429, "reason": "rate_limit: Quota exceeded"}]
        assert status((await drive(served, http_scope("/http"))).log) == 429

    asyncio.run(run())


def test_leave_websockets_to_their_own_limits() -> None:
    """S2.30: routes of WebSockets have no default limits, and who left before the refusal is told nothing."""

    async def run() -> None:
        app = Starlette(routes=[WebSocketRoute("/", echo)])
        only = MeteringMiddleware(app, Metering(sinks=()), default_limits=["1/minute"])
        for _ in range(3):
            driven = await drive(only, websocket_scope("/"), messages=[{"type": "websocket.connect"}])
            assert driven.log[0]["type"] == "websocket.accept"
        closed = MeteringMiddleware(
            app, Metering(sinks=()), application_limits=[rate_limited("0/minute", key="address")]
        )
        gone = await drive(closed, websocket_scope("/"), messages=[{"type": "websocket.disconnect", "code": 1006}])
        assert gone.log == []

    asyncio.run(run())


def test_tell_one_set_of_fields() -> None:
    """S2.33: where flat limits and a route's own meet, one set of fields tells of all, on refusals too."""

    async def scene(hall: Hall) -> None:
        assert names_of(await hall.ask("/")) == ["1-per-minute", "5-per-minute", "9-per-hour"]
        refused = await hall.ask("/")
        assert status(refused.log) == 429
        assert names_of(refused) == ["1-per-minute", "5-per-minute", "9-per-hour"]
        assert problem_of(refused)["violated-policies"] == ["1-per-minute"]
        assert [name for name, _ in headers(refused.log)].count("ratelimit") == 1

    limits = [rate_limited("5/minute", "9/hour", key="address")]
    play(scene, routes={"/": rate_limited("1/minute")(answer)}, application_limits=limits)


def test_tell_the_fields_where_an_endpoint_is_only_opened() -> None:
    """S2.33: the answer of an endpoint that only looks at its call tells of the middleware's limits all the same."""

    async def looks(request: Request) -> JSONResponse:
        return JSONResponse({"admitted": current_call().admitted})

    async def scene(hall: Hall) -> None:
        assert names_of(await hall.ask("/")) == ["2-per-minute"]

    play(scene, routes={"/": looks}, application_limits=[PER_ADDRESS])


def test_ask_nobody_who_it_is_for_an_address() -> None:
    """DESIGN 2: identify runs lazily: limits that need no identity do without it, and nobody is asked twice."""
    routes = {"/": search, "/own": rate_limited("9/minute")(answer)}

    async def scene(hall: Hall) -> None:
        await hall.statuses("/", "/own", "/none", key="a")

    by_address = [PER_ADDRESS, rate_limited("9/minute", key="global")]
    assert play(scene, routes=routes, application_limits=by_address).asked == 1
    assert play(scene, routes=routes, application_limits=[rate_limited("9/minute")]).asked == 3


def test_ask_again_who_was_not_known() -> None:
    """DESIGN 2: whom only a dependency of the endpoint knows is nobody to a flat limit, and known to the endpoint's."""
    routes = [Route("/", rate_limited("1/minute")(answer))]
    inner = Starlette(routes=routes)

    async def authenticated(scope: Any, receive: Any, send: Any) -> None:
        scope["state"] = {"known": True}
        await inner(scope, receive, send)

    def identify(connection: Any) -> Any:
        return caller_of(connection) if connection.scope.get("state", {}).get("known") else None

    async def scene(hall: Hall) -> None:
        assert await hall.each({"key": "a"}, {"key": "b"}, {"key": "a"}) == [200, 200, 429]

    play(scene, authenticated, metering={"identify": identify}, application_limits=[rate_limited("3/minute")])


def test_answer_503_where_nobody_can_say_who_calls() -> None:
    """X.6: a flat limit by caller does not count who is unknown by a failure as somebody else."""

    def identify(connection: Any) -> Any:
        raise OSError("down")

    async def scene(hall: Hall) -> None:
        assert await hall.statuses("/") == [503]

    play(scene, routes={"/": search}, metering={"identify": identify}, application_limits=["9/minute"])


def test_leave_out_what_the_application_says() -> None:
    """S0.18: exempt_when of a flat limit gets the request, and what it leaves out is not counted."""

    async def scene(hall: Hall) -> None:
        assert await hall.statuses("/", "/healthz", "/", "/healthz", "//healthz") == [200, 200, 429, 200, 429]

    exempt = rate_limited("1/minute", key="address", exempt_when=lambda request: request.url.path == "/healthz")
    play(scene, routes={"/": search, "/healthz": search}, application_limits=[exempt])


def test_hold_a_slot_until_the_answer_is_out() -> None:
    """S0.42: calls at once may be limited for the whole application, and their slots come back however they end."""
    gate, entered = asyncio.Event(), asyncio.Event()

    async def slow(request: Request) -> JSONResponse:
        entered.set()
        await gate.wait()
        raise ValueError("broken")

    async def scene(hall: Hall) -> None:
        first = asyncio.create_task(hall.ask("/"))
        await entered.wait()
        refused = await hall.ask("/none")
        assert (status(refused.log), problem_of(refused)["level"]) == (429, "caller")
        gate.set()
        await first
        assert await hall.statuses("/none", "/none") == [404, 404]

    play(scene, routes={"/": slow}, application_limits=[rate_limited(concurrency=1, key="address")])


def test_count_no_request_of_an_exempt_caller() -> None:
    """S0.18: an exempt caller is not counted by flat limits that count callers, and is by those of addresses."""

    async def scene(hall: Hall) -> None:
        assert await hall.statuses("/", "/", "/", key="dev", exempt="1") == [200, 200, 429]

    limits = [rate_limited("1/minute"), PER_ADDRESS]
    play(scene, routes={"/": search}, application_limits=limits)


def test_count_by_a_shared_scope_with_a_route() -> None:
    """S4.11: a flat limit may count in the bucket of a route, by its scope."""

    async def scene(hall: Hall) -> None:
        assert await hall.statuses("/own", "/", "/own") == [200, 200, 429]

    routes = {"/": search, "/own": rate_limited("2/minute", scope="all", key="address")(answer)}
    limits = [rate_limited("9/minute", scope="all", key="address", exempt_when=lambda scope: scope["path"] == "/own")]
    play(scene, routes=routes, application_limits=limits)


# -- routes without a decorator ----------------------------------------------------------------------------


def starlette_app() -> Starlette:
    """Routes of every kind, with and without limits of their own."""

    class Items(HTTPEndpoint):
        async def get(self, request: Request) -> JSONResponse:
            return await answer(request)

        @rate_limited("4/minute", key="address")
        async def post(self, request: Request) -> JSONResponse:
            return await answer(request)

        @unlimited
        async def put(self, request: Request) -> JSONResponse:
            return await answer(request)

    inner = Starlette(routes=[Route("/plain", search), Route("/own", rate_limited("4/minute", key="address")(answer))])
    return Starlette(
        routes=[
            Route("/plain", search, methods=["GET"]),
            Route("/things/{thing}", search),
            Route("/own", rate_limited("4/minute", key="address")(answer)),
            Route("/both", rate_limited("4/minute", key="address", override_defaults=False)(answer)),
            Route("/paid", billable(0)(answer)),
            Route("/free", unlimited(answer_of("free"))),
            Route("/items", Items),
            Mount("/sub", inner),
            Mount("/{tenant}/router", Router([Route("/plain", search)])),
            Mount("/gated", metered_app(inner_app, rate_limited("4/minute", key="address"))),
            Mount("/opaque", inner_app),
            Host("api.example", Router([Route("/hosted", search)])),
        ]
    )


def answer_of(name: str) -> Any:
    """A fresh endpoint."""

    async def fresh(request: Request) -> JSONResponse:
        return JSONResponse(name)

    return fresh


async def inner_app(scope: Any, receive: Any, send: Any) -> None:
    """An app that nobody can look into."""
    if scope["type"] == "http":
        await PlainTextResponse("inner")(scope, receive, send)


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
    """S2.30: neither paths nor their lengths fill the memory, and routes are found all the same."""

    async def scene(hall: Hall) -> None:
        limits = hall.app.limits
        assert limits is not None
        assert await hall.statuses("/things/" + "x" * 300) == [200]
        assert await hall.statuses(*(f"/y{at}" for at in range(5))) == [404] * 5
        known = limits._table._known  # type: ignore[union-attr]
        assert len(known) <= 2
        assert await hall.statuses("/things/1") == [200]

    was, table.MAX_PATHS = table.MAX_PATHS, 2
    try:
        play(scene, starlette_app(), default_limits=[rate_limited("9/minute", key="address")])
    finally:
        table.MAX_PATHS = was


# -- layers ------------------------------------------------------------------------------------------------


def test_count_where_the_limits_are_of_an_inner_layer() -> None:
    """X.1: limits of an inner layer of a stack count as those of the outermost, and refuse with all fields."""

    async def run() -> None:
        metering = Metering(MemoryStore(FakeClock()), sinks=())
        inner = RateLimitMiddleware(Starlette(routes=[Route("/", search)]), metering, application_limits=[PER_ADDRESS])
        app = CreditGateMiddleware(inner, metering)
        driven = [await drive(app, http_scope("/")) for _ in range(3)]
        assert [status(each.log) for each in driven] == [200, 200, 429]
        assert [names_of(each) for each in driven] == [["2-per-minute"]] * 3

    asyncio.run(run())


def test_count_in_each_of_two_layers() -> None:
    """Pitfall 37: a mounted application with limits of its own counts its requests too, apart from those around it."""

    async def run() -> None:
        metering = Metering(MemoryStore(FakeClock()), sinks=())
        inner = RateLimitMiddleware(
            Starlette(routes=[Route("/", search)]),
            metering,
            application_limits=[rate_limited("1/minute", key="address")],
        )
        app = MeteringMiddleware(
            Starlette(routes=[Mount("/sub", inner), Route("/", search)]),
            metering,
            application_limits=[rate_limited("3/minute", key="address")],
        )
        paths = ["/sub/", "/sub/", "/", "/"]
        driven = [await drive(app, http_scope(path)) for path in paths]
        assert [status(each.log) for each in driven] == [200, 429, 200, 429]
        assert names_of(driven[0]) == names_of(driven[1]) == ["1-per-minute", "3-per-minute"]

    asyncio.run(run())


def test_count_once_in_each_of_two_layers() -> None:
    """Pitfall 37: two layers that say the same do not count a request twice in one bucket."""

    async def run() -> None:
        metering = Metering(MemoryStore(FakeClock()), sinks=())
        inner = RateLimitMiddleware(Starlette(routes=[Route("/", search)]), metering, application_limits=[PER_ADDRESS])
        outer = Starlette(routes=[Mount("/sub", inner)])
        app = MeteringMiddleware(outer, metering, application_limits=[PER_ADDRESS])
        assert [status((await drive(app, http_scope(path))).log) for path in ["/sub/"] * 3] == [200, 200, 429]

    asyncio.run(run())


@pytest.mark.parametrize("layer", [CreditGateMiddleware, UsageEventsMiddleware])
def test_refuse_limits_of_a_layer_that_enforces_none(layer: Any) -> None:
    """DESIGN 2: limits that would mean nothing fail at import, with the layer that they belong to."""
    with pytest.raises(ConfigurationError, match="Give them to RateLimitMiddleware or MeteringMiddleware"):
        layer(inner_app, Metering(sinks=()), application_limits=[PER_ADDRESS])


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no-list": ({"application_limits": PER_ADDRESS}, "is no list of limits. Write [rate_limited('100/minute')]"),
    "text": ({"default_limits": "100/minute"}, "default_limits='100/minute' is no list of limits."),
    "charge": ({"default_limits": [billable(1)]}, "which is no limit. Write rate_limited('100/minute'), say."),
    "grammar": ({"default_limits": ["fast"]}, "The limit 'fast' is not in the grammar."),
    "tokens": ({"application_limits": ["9/minute of tokens"]}, "Limits of a middleware count requests"),
    "route": ({"application_limits": [rate_limited("9/minute", key="route")]}, "key='route' means nothing to them."),
    "twice": ({"default_limits": ["9/minute", "9/minute"]}, "has the limit '9-per-minute' twice"),
    "argument": (
        {"default_limits": [rate_limited("9/minute", key=lambda body: body)]},
        "asks for 'body', which the endpoint does not have. It can have 'scope', 'request', 'call'.",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_refuse_limits_that_cannot_work(case: str) -> None:
    """DESIGN 2: misuse of the middleware's limits fails where it is made, with the mend."""
    given, told = WRONG[case]
    with pytest.raises(ConfigurationError) as caught:
        MeteringMiddleware(inner_app, Metering(sinks=()), **given)
    assert told in str(caught.value)


def test_refuse_to_mark_what_is_no_endpoint() -> None:
    """DESIGN 2: unlimited stands on a function."""
    for wrong in (PER_ADDRESS, "search", (1).__add__):
        with pytest.raises(ConfigurationError, match="Write @unlimited above its function"):
            unlimited(wrong)  # type: ignore[type-var]

    class Shop:
        async def show(self, request: Request) -> JSONResponse:
            return await answer(request)

    assert unlimited(Shop().show)


def test_say_that_there_is_nobody_to_count() -> None:
    """DESIGN 2: a server that reports no address leaves a limit per address nobody to count, and that is said."""

    async def scene(hall: Hall) -> None:
        driven = await hall.ask("/", client=None)
        assert isinstance(driven.exception, MeteringError)
        assert driven.log == []

    play(scene, routes={"/": search}, application_limits=[PER_ADDRESS])


def shop(store: MemoryStore, module: str, **limits: Any) -> Any:
    """One of several applications on a store, whose endpoint has a name that others have as well."""

    async def index(request: Request) -> PlainTextResponse:
        return PlainTextResponse("work")

    index.__module__ = module
    return MeteringMiddleware(Starlette(routes=[Route("/", index)]), Metering(store, sinks=()), **limits)


@pytest.mark.parametrize(
    ("limits", "apart"),
    [
        (lambda _: {"default_limits": [PER_ADDRESS]}, True),
        (lambda _: {"application_limits": [PER_ADDRESS]}, False),
        (lambda name: {"application_limits": [rate_limited("2/minute", key="address", scope=name)]}, True),
    ],
    ids=["routes", "application", "scope"],
)
def test_count_applications_of_one_store_apart(limits: Callable[[str], dict[str, Any]], apart: bool) -> None:
    """Routes of two applications are two, if they have one path and name; all requests of both are, by ``scope=``."""

    async def play() -> None:
        store, answered = MemoryStore(FakeClock()), []
        for name in ("shop", "desk"):
            app = shop(store, name, **limits(name))
            async with app.metering:
                answered += [status((await drive(app, http_scope("/", "GET"))).log) for _ in range(2)]
        assert answered == [200, 200, *((200, 200) if apart else (429, 429))]

    asyncio.run(play())

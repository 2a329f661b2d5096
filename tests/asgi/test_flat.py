"""The limits of a middleware: counted for every request before a body is read, in layers and by applications."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket

from asgi_metering import (
    CreditGateMiddleware,
    Metering,
    MeteringMiddleware,
    RateLimitMiddleware,
    UsageEventsMiddleware,
    billable,
    current_call,
    rate_limited,
    unlimited,
)
from asgi_metering.errors import ConfigurationError, MeteringError
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.testing import FakeClock
from tests.asgi.halls import PER_ADDRESS, Reader, inner_app, play, search
from tests.counting import Hall, answer, caller_of, names_of, problem_of
from tests.harness.drive import assert_same_log, drive, headers, http_scope, status, websocket_scope

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

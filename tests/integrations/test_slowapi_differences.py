"""
Where slowapi is wrong, and an adopted limiter is right: both are asked, so that each line of the table stays true.

A test that fails on slowapi's side says that slowapi has mended it, and the table in the package loses the line.
"""

from __future__ import annotations

import asyncio
import inspect
import re
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, Depends, FastAPI
from limits import RateLimitItemPerMinute
from slowapi import Limiter
from slowapi.errors import RateLimitExceeded
from slowapi.util import get_ipaddr, get_remote_address
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

import asgi_metering.integrations.slowapi as package
from asgi_metering.errors import ConfigurationError
from asgi_metering.integrations.slowapi import adopt
from tests.harness.servers import serve_in_thread
from tests.integrations.scenes import adopted, ask, both, codes, install, text

GET = ("GET", "/t1")


def told(answers: list[Any]) -> list[Any]:
    """Statuses, and the classes of what nobody answered."""
    return [each if isinstance(each, str) else each.status_code for each in answers]


def fresh() -> Any:
    """An endpoint of its own."""

    async def endpoint(request: Request) -> Response:
        return PlainTextResponse("test")

    return endpoint


# -- the middlewares -----------------------------------------------------------------------------------------


def test_stream_behind_the_asgi_middleware_arrives_whole() -> None:
    """On a real server slowapi tears a stream of ten chunks, by a start before each; adopted, all of it comes."""
    bodies = []
    for limiter in (Limiter(key_func=get_ipaddr, default_limits=["9/minute"]), None):
        own = limiter or adopt(Limiter(key_func=get_ipaddr, default_limits=["9/minute"], headers_enabled=True))
        app = Starlette()
        install(app, own)

        async def stream(request: Request) -> Response:
            async def chunks() -> AsyncIterator[bytes]:
                for number in range(10):
                    yield b"%d" % number

            return StreamingResponse(chunks())

        app.add_route("/t1", stream)
        with serve_in_thread(app) as server, httpx.Client(base_url=server.url) as client:
            try:
                bodies.append(client.get("/t1").content)
            except httpx.HTTPError as failure:
                bodies.append(type(failure).__name__.encode())
    assert bodies[0] != bodies[1] == b"0123456789"


@pytest.mark.parametrize("installed", ["middleware", "asgi"])
def test_included_and_mounted_routes_are_limited(installed: str) -> None:
    """Both middlewares of slowapi let what stands in a router or a mounted application pass; adopted it counts."""

    def build(app: Any, limiter: Any) -> None:
        inner, outer = APIRouter(prefix="/inner"), APIRouter(prefix="/outer")
        inner.add_api_route("/{name}", fresh(), methods=["GET"])
        outer.include_router(inner)
        app.include_router(outer)
        app.mount("/mounted", Starlette(routes=[Route("/t1", fresh()), Mount("/more", routes=[Route("/x", fresh())])]))

    for path in ("/outer/inner/a", "/mounted/t1", "/mounted/more/x"):
        slow, ours = both(build, *[("GET", path)] * 3, installed=installed, default_limits=["2/minute"])
        assert (told(slow), told(ours)) == ([200] * 3, [200, 200, 429])


def test_first_route_that_matches_is_the_one_that_counts() -> None:
    """Of two routes that match slowapi takes the last one for the endpoint, which is not the one that runs."""

    def build(app: Any, limiter: Any) -> None:
        app.add_route("/t1", fresh())
        app.add_route("/{name}", limiter.exempt(fresh_named("other")))

    slow, ours = both(build, *[GET] * 2, default_limits=["1/minute"])
    assert (told(slow), told(ours)) == ([200, 200], [200, 429])


def fresh_named(name: str) -> Any:
    """An endpoint of this name."""
    endpoint = fresh()
    endpoint.__name__ = endpoint.__qualname__ = name
    return endpoint


def test_application_limits_count_decorated_endpoints_too() -> None:
    """They are for the entire application; slowapi's middlewares skip whatever is decorated (S2.33)."""

    def build(app: Any, limiter: Any) -> None:
        app.add_route("/t1", limiter.limit("9/minute")(fresh()))

    slow, ours = both(build, *[GET] * 3, application_limits=["2/minute"])
    assert (told(slow), told(ours)) == ([200] * 3, [200, 200, 429])


def test_computed_limit_overrides_the_defaults_and_shows_one_set_of_fields() -> None:
    """Where a function answers the limit slowapi counts the defaults as well, and sends its fields twice (S2.33)."""

    def build(app: Any, limiter: Any) -> None:
        app.add_route("/t1", limiter.limit(lambda: "9/minute")(fresh()))

    slow, ours = both(build, *[GET] * 2, default_limits=["1/minute"], headers_enabled=True, installed="middleware")
    assert (told(slow), told(ours)) == ([200, 429], [200, 200])
    assert [answer.headers.get_list("x-ratelimit-limit") for answer in (slow[0], ours[0])] == [["9", "9"], ["9"]]


def test_default_limit_may_depend_on_the_key() -> None:
    """A function of ``key`` among the default limits raises on each request in slowapi."""

    def who(request: Request) -> str:
        return "k"

    def build(app: Any, limiter: Any) -> None:
        app.add_route("/t1", fresh())

    slow, ours = both(build, *[GET] * 2, default_limits=[lambda key: f"{len(key)}/minute"], key_func=who)
    assert (told(slow), told(ours)) == (["AttributeError"] * 2, [200, 429])


def test_async_handler_is_awaited_behind_either_middleware() -> None:
    """The one built on `BaseHTTPMiddleware` answers as slowapi would, instead of asking the application's handler."""

    def build(app: Any, limiter: Any) -> None:
        async def handler(request: Request, failure: Exception) -> Response:
            await asyncio.sleep(0)
            return PlainTextResponse("own", 429)

        app.add_exception_handler(RateLimitExceeded, handler)
        app.add_route("/t1", fresh())

    slow, ours = both(build, *[GET] * 2, default_limits=["1/minute"], installed="middleware")
    assert (slow[1].text, ours[1].text) == ('{"error":"Rate limit exceeded: 1 per 1 minute"}', "own")


def test_what_a_key_function_raises_is_answered_as_such() -> None:
    """A middleware of slowapi's hands it to the handler of its own exception, which cannot tell of it."""

    def who(request: Request) -> str:
        raise HTTPException(401, "who are you")

    def build(app: Any, limiter: Any) -> None:
        app.add_route("/t1", fresh())
        app.exception_handlers.pop(HTTPException, None)

    slow, ours = both(build, GET, default_limits=["1/minute"], key_func=who)
    assert (told(slow), told(ours), ours[0].text) == (["AttributeError"], [401], "who are you")


def test_method_of_a_class_that_is_decorated_is_not_limited_by_default() -> None:
    """Slowapi's middlewares know a class endpoint by its own name, and count its decorated methods twice."""

    def build(app: Any, limiter: Any) -> None:
        class Endpoint(HTTPEndpoint):
            @limiter.limit("9/minute")
            async def get(self, request: Request) -> Response:
                return PlainTextResponse("test")

            async def post(self, request: Request) -> Response:
                return PlainTextResponse("test")

        app.add_route("/t1", Endpoint)

    slow, ours = both(build, *[GET] * 2, ("POST", "/t1"), ("POST", "/t1"), default_limits=["1/minute"])
    assert (told(slow), told(ours)) == ([200, 429, 429, 429], [200, 200, 200, 429])


@pytest.mark.parametrize("installed", ["middleware", "asgi"])
def test_endpoint_that_is_found_late_is_counted_late(installed: str, caplog: pytest.LogCaptureFixture) -> None:
    """A path that is rewritten further in leads to no endpoint beforehand: what ran is counted before it answers."""

    class Rewriting:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            scope["path"] = scope["path"].replace("/hidden", "/t1")
            await self.app(scope, receive, send)

    def build(app: Any, limiter: Any) -> None:
        # Below the middleware, which was added before.
        app.user_middleware.append(Middleware(Rewriting))
        app.add_route("/t1", fresh())
        app.add_route("/t2", limiter.exempt(fresh_named("free")))

    hidden = ("GET", "/hidden")
    slow, ours = both(build, *[hidden] * 3, ("GET", "/none"), default_limits=["2/minute"], installed=installed)
    assert (told(slow), told(ours)) == ([200, 200, 200, 404], [200, 200, 429, 404])
    assert ours[2].text == '{"error":"Rate limit exceeded: 2 per 1 minute"}'
    assert "asked for late" in caplog.text


@pytest.mark.parametrize("installed", ["middleware", "asgi"])
def test_endpoint_that_is_found_late_is_counted_whatever_it_answers(installed: str) -> None:
    """Behind a path that is rewritten one that answers 404 or 405, or raises, counts; where none ran nothing does."""

    class Rewriting:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            scope["path"] = scope["path"].replace("/hidden", "")
            await self.app(scope, receive, send)

    async def missing(request: Request) -> Response:
        raise HTTPException(404, "no such user")

    async def wrong(request: Request) -> Response:
        raise HTTPException(405, "not like this")

    async def broken(request: Request) -> Response:
        raise LookupError("lost")

    async def own(request: Request) -> Response:
        raise HTTPException(404)

    def build(app: Any, limiter: Any) -> None:
        app.user_middleware.append(Middleware(Rewriting))
        for name, endpoint in {"missing": missing, "wrong": wrong, "broken": broken}.items():
            app.add_route(f"/{name}", endpoint)
        app.add_route("/own", limiter.limit("9/minute")(own))

    expected = {"missing": [404, 404, 429], "wrong": [405, 405, 429], "broken": ["LookupError"] * 2 + [429]}
    for name, answered in expected.items():
        _, ours = both(build, *[("GET", f"/hidden/{name}")] * 3, default_limits=["2/minute"], installed=installed)
        assert told(ours) == answered
    uncounted = [*[("POST", "/hidden/missing")] * 3, *[("GET", "/hidden/none")] * 3, *[("GET", "/hidden/own")] * 3]
    _, ours = both(build, *uncounted, default_limits=["2/minute"], installed=installed)
    assert told(ours) == [405] * 3 + [404] * 6


# -- endpoints -----------------------------------------------------------------------------------------------


def test_endpoint_needs_neither_request_nor_response() -> None:
    """Sync and async, of FastAPI, with fields on what is no response; slowapi refuses each at import (S2.31, S2.33)."""
    scene = adopted("decorators", headers_enabled=True)

    @scene.app.get("/async/{name}")
    @scene.limiter.limit("1/minute")
    async def endpoint(name: str, q: int = 1) -> dict[str, Any]:
        return {"name": name, "q": q}

    @scene.app.get("/sync")
    @scene.limiter.limit("1/minute")
    def plain(**more: Any) -> dict[str, Any]:
        return {"thread": threading.current_thread() is threading.main_thread()}

    first, second = scene.get("/async/a?q=3", 2)
    assert (first.json(), first.headers["x-ratelimit-limit"]) == ({"name": "a", "q": 3}, "1")
    assert second.status_code == 429
    assert "slowapi" not in str(scene.app.openapi())
    with pytest.raises(Exception, match='No "request"'):
        Limiter(key_func=get_ipaddr).limit("1/minute")(lambda: None)


@pytest.mark.parametrize("is_async", [False, True])
def test_parameters_named_request_and_response_may_be_anything(is_async: bool) -> None:
    """Slowapi takes them by name, and raises where they are none; adopted, only their types tell."""

    def build(app: Any, limiter: Any) -> None:
        def sync_endpoint(request: str = "r", response: str = "s") -> dict[str, str]:
            return {"request": request, "response": response}

        async def endpoint(request: str = "r", response: str = "s") -> dict[str, str]:
            return {"request": request, "response": response}

        app.get("/t1")(limiter.limit("1/minute")(endpoint if is_async else sync_endpoint))

    slow, ours = both(build, *[GET] * 2, headers_enabled=True)
    assert told(slow) == ["Exception", "Exception"]
    assert [ours[0].json(), ours[0].headers["x-ratelimit-limit"]] == [{"request": "r", "response": "s"}, "1"]
    assert ours[1].status_code == 429


def test_endpoints_of_one_name_are_counted_apart() -> None:
    """Slowapi knows them by name: each counts for both, and an exempt one frees the other."""

    def build(app: Any, limiter: Any) -> None:
        app.add_route("/t1", limiter.limit("2/minute")(fresh()))
        app.add_route("/t2", limiter.limit("2/minute")(fresh()))

    slow, ours = both(build, *[GET] * 3, key_style="endpoint")
    assert (told(slow), told(ours)) == ([200, 429, 429], [200, 200, 429])
    _, apart = both(build, *[GET] * 2, *[("GET", "/t2")] * 3, key_style="endpoint")
    assert told(apart) == [200] * 4 + [429]

    def freed(app: Any, limiter: Any) -> None:
        app.add_route("/t1", fresh())
        limiter.exempt(fresh())

    slow, ours = both(freed, *[GET] * 2, default_limits=["1/minute"])
    assert (told(slow), told(ours)) == ([200, 200], [200, 429])


def test_one_function_on_two_routes_has_two_limits() -> None:
    """
    Decorated twice it is limited twice, each time by its own decorator, as are methods of two objects.

    slowapi puts them together by name: each route counts by both.
    """

    def build(app: Any, limiter: Any) -> None:
        endpoint = fresh()
        app.add_route("/t1", limiter.limit("1/minute")(endpoint))
        app.add_route("/t2", limiter.limit("3/minute")(endpoint))

    slow, ours = both(build, *[GET] * 2, *[("GET", "/t2")] * 4)
    assert told(slow) == [200, 429, 200, 429, 429, 429]
    assert told(ours) == [200, 429, 200, 200, 200, 429]

    class Controller:
        async def answer(self, request: Request) -> Response:
            return PlainTextResponse("test")

    scene = adopted("decorators", kind=Starlette, key_style="endpoint")
    for path in ("/a", "/b"):
        scene.app.add_route(path, scene.limiter.limit("1/minute")(Controller().answer))
    assert [scene.codes(path, 2) for path in ("/a", "/b")] == [[200, 429]] * 2


def test_endpoint_may_be_limited_and_exempt() -> None:
    """Exempt, it runs without limits; slowapi raises for want of a state that nobody has set."""

    def build(app: Any, limiter: Any) -> None:
        endpoint = limiter.limit("1/minute")(fresh())
        limiter.exempt(endpoint)
        app.add_route("/t1", endpoint)

    slow, ours = both(build, *[GET] * 2)
    assert (told(slow), told(ours)) == (["AttributeError"] * 2, [200, 200])


def test_async_functions_are_awaited() -> None:
    """Key, exemption, cost and limit may wait; slowapi takes their coroutines for answers."""

    async def who(request: Request) -> str:
        await asyncio.sleep(0)
        return "k"

    async def exempt(request: Request) -> bool:
        return "x-free" in request.headers

    async def limits() -> str:
        return "4/minute"

    async def cost(request: Request) -> int:
        return 2

    scene = adopted(key_func=who)
    scene.app.add_route("/t1", scene.limiter.limit(limits, exempt_when=exempt, cost=cost)(text))
    assert scene.codes("/t1", 3, headers={"x-free": "1"}) == [200] * 3
    assert scene.codes("/t1", 3) == [200, 200, 429]


# -- what counts ---------------------------------------------------------------------------------------------


def test_refused_request_has_spent_nothing() -> None:
    """What one limit refuses, no other limit has counted; in slowapi the ones before it have."""

    def build(app: Any, limiter: Any) -> None:
        shared = limiter.shared_limit("3/minute", "both")
        app.add_route("/t1", limiter.limit("1/minute")(shared(fresh())))
        app.add_route("/t2", shared(fresh_named("second")))

    slow, ours = both(build, *[GET] * 3, *[("GET", "/t2")] * 3)
    assert told(slow) == [200, 429, 429, 429, 429, 429]
    assert told(ours) == [200, 429, 429, 200, 200, 429]


def test_cost_that_does_not_fit_leaves_room_for_one_that_does() -> None:
    """A request of 5 that finds 2 left is refused and leaves them; slowapi has spent them."""

    def build(app: Any, limiter: Any) -> None:
        def cost(request: Request) -> int:
            return int(request.url.query)

        app.add_route("/t1", limiter.limit("10/minute", cost=cost)(fresh()))

    slow, ours = both(build, *[("GET", f"/t1?{cost}") for cost in (8, 5, 1, 1, 1)])
    assert (told(slow), told(ours)) == ([200, 429, 429, 429, 429], [200, 429, 200, 200, 429])


def test_the_same_limit_written_twice_counts_once() -> None:
    """Slowapi counts it twice for each request."""

    def build(app: Any, limiter: Any) -> None:
        app.add_route("/t1", limiter.limit("2/minute")(limiter.limit("2/minute")(fresh())))

    slow, ours = both(build, *[GET] * 3)
    assert (told(slow), told(ours)) == ([200, 429, 429], [200, 200, 429])


def test_key_with_a_slash_is_nobody_elses() -> None:
    """Slowapi joins key and scope by slashes, so that one client can spend another one's limit."""

    def who(request: Request) -> str:
        return request.headers["x-key"]

    def build(app: Any, limiter: Any) -> None:
        app.add_route("/t1", limiter.shared_limit("1/minute", "b/c", key_func=lambda: "a")(fresh()))
        app.add_route("/t2", limiter.shared_limit("1/minute", "c", key_func=lambda: "a/b")(fresh_named("second")))

    slow, ours = both(build, GET, ("GET", "/t2"))
    assert (told(slow), told(ours)) == ([200, 429], [200, 200])


def test_scope_may_be_a_function() -> None:
    """It is asked with the endpoint's name, as slowapi documents and does not do."""

    def build(app: Any, limiter: Any) -> None:
        app.add_route("/t1", limiter.shared_limit("1/minute", lambda endpoint: "s")(fresh()))

    slow, ours = both(build, *[GET] * 2)
    assert (told(slow), told(ours)) == (["NameError"] * 2, [200, 429])


def test_limits_may_be_items() -> None:
    """`RateLimitItem` objects, alone, several, and as answers of functions; slowapi cannot read them."""
    item = RateLimitItemPerMinute(1)
    for value in (item, [item, "9/hour"], lambda: item):
        scene = adopted(kind=Starlette)
        scene.app.add_route("/t1", scene.limiter.limit(value)(text))
        assert scene.codes("/t1", 2) == [200, 429]
    unread = Limiter(key_func=get_ipaddr)
    unread.limit(item)(text)  # type: ignore[arg-type]
    assert not any(unread._route_limits.values())


def test_request_that_a_limit_is_computed_for_is_its_own() -> None:
    """Two requests in two threads ask a function of ``key`` at once, and each hears of its own client."""
    met = threading.Barrier(2, timeout=10)

    def who(request: Request) -> str:
        return request.headers["x-key"]

    def provider(key: str) -> str:
        seen.append(key)
        met.wait()
        return "1/minute"

    seen: list[str] = []
    scene = adopted("decorators", key_func=who, kind=Starlette)
    scene.app.add_route("/t1", scene.limiter.limit(provider)(text))

    async def run() -> list[int]:
        transport = httpx.ASGITransport(scene.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            asked = (client.get("/t1", headers={"x-key": key}) for key in ("a", "b"))
            return codes(await asyncio.gather(*asked))

    assert asyncio.run(run()) == [200, 200]
    assert sorted(seen) == ["a", "b"]


# -- mistakes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["5 per fortnight", "", 5, [], None])
def test_limit_that_is_none_is_an_error_at_import(value: Any) -> None:
    """Slowapi logs it, and limits nothing from then on."""
    with pytest.raises(ConfigurationError, match="limit"):
        adopted().limiter.limit(value)


def test_moving_window_of_more_calls_than_are_remembered_is_refused() -> None:
    """The limiter says so where it is written, and names the strategy that can do it."""
    limiter = adopt(Limiter(key_func=get_ipaddr, strategy="moving-window"))
    limiter.limit("5000/day")
    with pytest.raises(ConfigurationError, match="Use the strategy 'sliding'"):
        limiter.limit("5001/day")


@pytest.mark.parametrize("options", [{"default_limits": "1/second"}, {"application_limits": ["often"]}])
def test_setting_that_is_no_list_of_limits_is_an_error_at_adoption(options: dict[str, Any]) -> None:
    """A text for a list is read letter by letter, and slowapi raises on each request."""
    with pytest.raises(ConfigurationError, match="not in slowapi's grammar"):
        adopt(Limiter(key_func=get_ipaddr, **options))


@pytest.mark.parametrize("cost", [-1, float("nan"), "2", True])
def test_cost_that_is_none_is_an_error_at_import(cost: Any) -> None:
    """A request cannot take less than nothing."""
    with pytest.raises(ConfigurationError, match="cost"):
        adopted().limiter.limit("1/minute", cost=cost)


def test_computed_limit_that_is_none_limits_nobody_for_free() -> None:
    """Slowapi logs and lets the request pass uncounted; here it fails loudly, unless errors are swallowed."""

    def build(app: Any, limiter: Any) -> None:
        app.add_route("/t1", limiter.limit(lambda: "often")(fresh()))

    slow, ours = both(build, GET)
    assert (told(slow), told(ours)) == ([200], ["ConfigurationError"])
    _, swallowed = both(build, GET, swallow_errors=True)
    assert told(swallowed) == [200]


def test_empty_key_is_logged_and_not_counted(caplog: pytest.LogCaptureFixture) -> None:
    """As in slowapi: whom a key function does not know is nobody to count."""

    def build(app: Any, limiter: Any) -> None:
        app.add_route("/t1", limiter.limit("1/minute")(fresh()))

    slow, ours = both(build, *[GET] * 2, key_func=lambda: "")
    assert told(slow) == told(ours) == [200, 200]
    assert "nobody to count" in caplog.text


# -- answers -------------------------------------------------------------------------------------------------


def test_reset_is_a_whole_second_and_fields_stand_once() -> None:
    """Slowapi sends a fraction, and adds its fields to those that the endpoint has set."""

    def build(app: Any, limiter: Any) -> None:
        async def endpoint(request: Request) -> Response:
            return PlainTextResponse("test", headers={"X-RateLimit-Limit": "77"})

        app.add_route("/t1", limiter.limit("9/minute")(endpoint))

    (slow,), (ours,) = both(build, GET, headers_enabled=True)
    assert not slow.headers["x-ratelimit-reset"].isdecimal()
    assert ours.headers["x-ratelimit-reset"].isdecimal()
    assert (slow.headers.get_list("x-ratelimit-limit"), ours.headers.get_list("x-ratelimit-limit")) == (
        ["77", "9"],
        ["9"],
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [("soon", "60"), ("3", "60"), ("90", "90"), ("Wed, 21 Oct 2015 07:28:00 GMT", "60"), ("Wed, 99 Foo", "60")],
)
def test_wait_that_the_endpoint_set_is_read_in_any_form(given: str, expected: str) -> None:
    """The later one stays; one that is none is replaced, where slowapi raises."""
    scene = adopted("decorators", headers_enabled=True)

    @scene.app.get("/t1")
    @scene.limiter.limit("1/minute")
    async def endpoint() -> Response:
        return JSONResponse({}, headers={"retry-after": given})

    assert scene.get("/t1")[0].headers["retry-after"] == expected


def test_wait_is_that_of_the_limit_that_lasts_longest() -> None:
    """Who waits as told is let in: of two spent limits slowapi names the first one's wait alone."""
    scene = adopted("decorators", headers_enabled=True)
    scene.app.add_route("/t1", scene.limiter.limit("1/minute;1/hour")(text))
    refused = scene.get("/t1", 2)[1]
    assert refused.text == '{"error":"Rate limit exceeded: 1 per 1 minute"}'
    assert (refused.headers["x-ratelimit-limit"], refused.headers["retry-after"]) == ("1", "3600")


def test_log_of_a_refusal_names_no_client(caplog: pytest.LogCaptureFixture) -> None:
    """The limit and the endpoint are logged as a warning of "slowapi", and no address or key."""

    def build(app: Any, limiter: Any) -> None:
        app.add_route("/t1", limiter.limit("1/minute")(fresh()))

    both(build, *[GET] * 2, key_func=lambda: "secret-of-ada")
    slow, ours = (record.getMessage() for record in caplog.records if "exceeded" in record.getMessage())
    assert "secret-of-ada" in slow
    assert ours == f"ratelimit 1 per 1 minute exceeded at endpoint: {__name__}.fresh.endpoint"


def test_head_counts_as_in_slowapi() -> None:
    """Starlette answers HEAD by the endpoint of GET, which must not run uncounted."""

    def build(app: Any, limiter: Any) -> None:
        app.add_route("/t1", limiter.limit("1/minute")(fresh()))

    slow, ours = both(build, ("HEAD", "/t1"), GET)
    assert told(slow) == told(ours) == [200, 429]


@pytest.mark.parametrize("is_sync", [False, True])
def test_decorated_helper_of_a_decorated_endpoint_counts_as_in_slowapi(is_sync: bool) -> None:
    """One that a limited endpoint calls is not counted again, and one that any other endpoint calls is."""

    def build(app: Any, limiter: Any) -> None:
        help_out = limiter.limit("1/minute")(text if is_sync else fresh())

        async def calling(request: Request) -> Response:
            helped = help_out(request)
            return await helped if inspect.isawaitable(helped) else helped

        async def other(request: Request) -> Response:
            return await calling(request)

        app.add_route("/t1", limiter.limit("2/minute")(calling))
        app.add_route("/t2", other)

    slow, ours = both(build, *[GET] * 3, *[("GET", "/t2")] * 2, headers_enabled=True)
    assert told(slow) == told(ours) == [200, 200, 429, 200, 429]
    assert [each.headers["x-ratelimit-limit"] for each in ours[:3]] == ["2", "2", "2"]


def test_decorated_dependency_and_its_endpoint_count_both() -> None:
    """Slowapi checks the limits of whichever runs first, so that those of the endpoint never refuse."""

    def build(app: Any, limiter: Any) -> None:
        async def needed(request: Request) -> int:
            return 1

        @app.get("/t1")
        @limiter.limit("1/minute")
        async def endpoint(request: Request, got: int = Depends(limiter.limit("2/minute")(needed))) -> int:
            return got

    slow, ours = both(build, *[GET] * 3, kind=FastAPI)
    assert (told(slow), told(ours)) == ([200, 200, 429], [200, 429, 429])


def test_decorated_sync_helper_is_awaited() -> None:
    """Adopted, a decorated sync function answers a coroutine, which an async endpoint awaits, and counts."""
    limiter = adopt(Limiter(key_func=get_remote_address))
    app = FastAPI()
    install(app, limiter, "decorators")
    helper = limiter.limit("1/minute")(text)

    @app.get("/async")
    async def calling(request: Request) -> Response:
        answer = helper(request)
        assert inspect.iscoroutine(answer)
        return await answer  # type: ignore[no-any-return]

    assert inspect.iscoroutinefunction(helper)
    assert codes(ask(app, *[("GET", "/async")] * 2)) == [200, 429]


def test_table_in_the_package_names_a_test_for_each_difference() -> None:
    """Every line of the table in the package's docstring names a test of this file, or of its neighbours."""
    assert package.__doc__ is not None
    named = re.findall(r"`(test_\w+)`", package.__doc__)
    here = Path(__file__).parent
    sources = "".join(path.read_text(encoding="utf-8") for path in here.glob("test_slowapi*.py"))
    assert len(named) > 20
    assert not [name for name in named if f"def {name}(" not in sources]

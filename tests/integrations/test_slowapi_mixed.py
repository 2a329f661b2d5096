"""Both kinds of decorators on one route, and an adopted limiter beside our own middleware: one admission (S2.33)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import Depends, FastAPI
from slowapi import Limiter
from slowapi.errors import RateLimitExceeded
from slowapi.util import get_remote_address
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocket

from asgi_metering import Caller, Metering, MeteringMiddleware, billable, rate_limited
from asgi_metering.asgi.audit import audit
from asgi_metering.errors import ConfigurationError
from asgi_metering.guards import guard_of
from asgi_metering.integrations.slowapi import adopt
from asgi_metering.metering import ALL_FEATURES
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.testing import FakeClock, unmetered
from tests.integrations.scenes import ask, codes, install


class Counting(MemoryStore):
    """Tells what it was asked."""

    immediate = False

    def __init__(self) -> None:
        super().__init__(FakeClock())
        self.admissions: list[Any] = []

    async def run(self, operations: Any) -> Any:
        """Note the admissions among *operations*, and run them."""
        self.admissions.extend(each for each in operations if type(each).__name__ == "Admit")
        return await super().run(operations)


class Scene:
    """An application with our middleware, and an adopted limiter of the same metering."""

    def __init__(self, *, inside: str = "decorators", middleware: bool = True, **options: Any) -> None:
        self.store = Counting()
        self.metering = Metering(self.store, identify=lambda _: Caller("ada", payer="ada"), sinks=())
        self.limiter = adopt(Limiter(key_func=get_remote_address, **options), self.metering)
        self.app = FastAPI()
        install(self.app, self.limiter, inside)
        if middleware:
            self.app.add_middleware(MeteringMiddleware, metering=self.metering)

    def play(self, *requests: tuple[str, str], grant: int = 3) -> tuple[list[httpx.Response], int]:
        """Answers to *requests* by a payer who has so many credits, and the parts that are left."""

        async def run() -> tuple[list[httpx.Response], int]:
            async with self.metering:
                await self.metering.grant("ada", grant, id="g")
                transport = httpx.ASGITransport(self.app)
                async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                    answers = [await client.request(method, path) for method, path in requests]
                await self.metering.drain()
                return answers, int(self.metering.unit.whole((await self.metering.balance("ada")).available))

        return asyncio.run(run())


@pytest.mark.parametrize("is_sync", [False, True])
@pytest.mark.parametrize("order", ["slowapi above", "slowapi below", "between"])
def test_both_kinds_of_decorators_are_one_admission(order: str, is_sync: bool) -> None:
    """In any order each request asks the store once, and what the limit refuses is not charged; no `request` needed."""
    scene = Scene(headers_enabled=True)

    async def endpoint() -> dict[str, int]:
        return {"x": 1}

    def sync_endpoint() -> dict[str, int]:
        return {"x": 1}

    limit, price = scene.limiter.limit("2/minute"), billable(1)
    ours = rate_limited("100/minute")
    decorators = {
        "slowapi above": [price, ours, limit],
        "slowapi below": [limit, price, ours],
        "between": [price, limit, ours],
    }[order]
    decorated: Any = sync_endpoint if is_sync else endpoint
    for decorator in decorators:
        decorated = decorator(decorated)
    scene.app.get("/t1")(decorated)
    answers, left = scene.play(*[("GET", "/t1")] * 3)
    assert codes(answers) == [200, 200, 429]
    assert answers[2].json() == {"error": "Rate limit exceeded: 2 per 1 minute"}
    assert [answer.headers["x-ratelimit-remaining"] for answer in answers] == ["1", "0", "0"]
    assert "100-per-minute" in answers[0].headers["ratelimit"]
    assert left == 1
    assert len(scene.store.admissions) == 3
    assert all(len(ask.limits) == 2 and ask.sources for ask in scene.store.admissions)


def test_what_credits_or_our_own_limits_refuse_has_spent_no_limit_of_slowapis() -> None:
    """A 402, and a 429 of our own decorator, are ours to answer, and leave the counts as they are."""
    scene = Scene(headers_enabled=True)

    @scene.app.get("/t1")
    @billable(2)
    @scene.limiter.shared_limit("2/minute", "s")
    async def paid() -> dict[str, int]:
        return {}

    @scene.app.get("/t2")
    @rate_limited("1/minute")
    @scene.limiter.shared_limit("2/minute", "s")
    async def limited() -> dict[str, int]:
        return {}

    answers, left = scene.play(("GET", "/t1"), ("GET", "/t1"), ("GET", "/t2"), ("GET", "/t2"), grant=3)
    assert codes(answers) == [200, 402, 200, 429]
    assert answers[1].json()["code"] == "insufficient_credits"
    assert answers[3].json()["code"] == "rate_limit"
    assert left == 1


@pytest.mark.parametrize("is_written", [False, True])
def test_handler_of_the_application_answers_with_any_status(is_written: bool) -> None:
    """A 503 of its own stands, behind our middleware too, for decorated endpoints and for those of default limits."""
    scene = Scene(inside="asgi", default_limits=["1/minute"])

    async def busy(request: Request, failure: Exception) -> Response:
        return PlainTextResponse("busy", 503)

    scene.app.add_exception_handler(RateLimitExceeded, busy)
    limit = scene.limiter.limit("1/minute") if is_written else billable(1)

    @scene.app.get("/t1")
    @limit
    async def endpoint() -> dict[str, int]:
        return {}

    answers, _ = scene.play(*[("GET", "/t1")] * 2)
    assert [(answer.status_code, answer.text) for answer in answers] == [(200, "{}"), (503, "busy")]


@pytest.mark.parametrize("inside", ["middleware", "asgi"])
def test_default_limits_join_the_admission_of_our_decorators(inside: str) -> None:
    """An endpoint that only ours are written on is counted by the defaults in its one admission."""
    scene = Scene(inside=inside, default_limits=["1/minute"], headers_enabled=True)

    @scene.app.get("/t1")
    @billable(1)
    async def paid() -> dict[str, int]:
        return {}

    answers, left = scene.play(*[("GET", "/t1")] * 2)
    assert codes(answers) == [200, 429]
    assert answers[1].json() == {"error": "Rate limit exceeded: 1 per 1 minute"}
    assert [answer.headers["x-ratelimit-limit"] for answer in answers] == ["1", "1"]
    assert (left, [len(ask.limits) for ask in scene.store.admissions]) == (2, [1, 1])
    guard = guard_of(paid)
    assert guard is not None
    assert len(guard.policy.rates) == 1


@pytest.mark.parametrize("is_outermost", [False, True])
def test_default_limits_count_what_never_reaches_a_gate_of_ours(is_outermost: bool) -> None:
    """A dependency that fails, arguments that are none, and HEAD: our decorators are no way around default limits."""
    scene = Scene(inside="asgi", middleware=not is_outermost, default_limits=["1/minute"])
    if is_outermost:
        scene.app.user_middleware.append(Middleware(MeteringMiddleware, metering=scene.metering))

    def deny() -> None:
        raise HTTPException(401)

    def fail() -> None:
        raise LookupError("nobody answers this one")

    for path, depends in (("/denied", [Depends(deny)]), ("/failing", [Depends(fail)]), ("/typed", [])):

        @scene.app.api_route(path, methods=["GET", "HEAD"], dependencies=depends)
        @rate_limited("9/minute")
        async def endpoint(n: int = 0) -> dict[str, int]:
            return {}

    answers, _ = scene.play(*[("GET", "/denied")] * 2, *[("GET", "/typed?n=x")] * 2)
    assert codes(answers) == [401, 429, 422, 429]
    assert answers[1].json() == {"error": "Rate limit exceeded: 1 per 1 minute"}
    with pytest.raises(LookupError):
        ask(scene.app, ("GET", "/failing"))
    assert codes(ask(scene.app, ("GET", "/failing"))) == [429]
    scene.limiter.reset()
    assert codes(ask(scene.app, ("HEAD", "/typed"), ("HEAD", "/typed"), ("GET", "/typed"))) == [200, 429, 429]


@pytest.mark.parametrize("is_outermost", [False, True])
def test_generator_of_ours_is_counted_once_by_default_limits(is_outermost: bool) -> None:
    """Its gate asks at the first byte, and nobody does so a second time."""
    scene = Scene(inside="asgi", middleware=not is_outermost, default_limits=["2/minute"])
    if is_outermost:
        scene.app.user_middleware.append(Middleware(MeteringMiddleware, metering=scene.metering))

    @scene.app.get("/t1")
    @rate_limited("9/minute")
    async def endpoint() -> AsyncIterator[dict[str, int]]:
        yield {"x": 1}

    assert codes(scene.play(*[("GET", "/t1")] * 3)[0]) == [200, 200, 429]


def test_billable_without_our_middleware_lets_nobody_in() -> None:
    """A price that nobody could charge is refused, and not run for free under a limit alone."""
    scene = Scene(middleware=False)

    @scene.app.get("/t1")
    @billable(1)
    @scene.limiter.limit("1/minute")
    async def paid() -> dict[str, int]:
        return {}

    with pytest.raises(ConfigurationError, match="no layer enforces credits"):
        scene.play(("GET", "/t1"))


def test_middleware_with_another_metering_than_the_limiters_is_refused() -> None:
    """Counts that were meant for one store do not go to another one; a limiter in memory takes the middleware's."""
    for own, is_refused in ((Metering("memory://", sinks=()), True), (None, False)):
        scene = Scene()
        limiter = adopt(Limiter(key_func=get_remote_address), own)

        @scene.app.get("/t1")
        @limiter.limit("1/minute")
        async def endpoint() -> dict[str, int]:
            return {}

        if is_refused:
            with pytest.raises(ConfigurationError, match="another Metering"):
                scene.play(("GET", "/t1"))
        else:
            assert codes(scene.play(*[("GET", "/t1")] * 2)[0]) == [200, 429]
            assert len(scene.store.admissions) == 2


@pytest.mark.parametrize("is_shared", [False, True])
def test_middleware_within_slowapis_counts_everything_or_nothing(is_shared: bool) -> None:
    """Application limits are one count at decorated and other endpoints, in whatever order the middlewares stand."""
    metering = Metering("memory://", sinks=())
    limiter = adopt(
        Limiter(key_func=get_remote_address, application_limits=["2/minute"]),
        None if is_shared else Metering("memory://", sinks=()),
    )
    app = FastAPI()
    app.add_middleware(MeteringMiddleware, metering=metering)
    install(app, limiter)

    @app.get("/t1")
    @limiter.limit("9/minute")
    async def endpoint() -> dict[str, int]:
        return {}

    @app.get("/t2")
    async def default() -> dict[str, int]:
        return {}

    requests = [("GET", "/t2"), ("GET", "/t1"), ("GET", "/t2"), ("GET", "/t1")]
    if is_shared:
        assert codes(ask(app, *requests)) == [200, 200, 429, 429]
        assert limiter.metering is metering
    else:
        with pytest.raises(ConfigurationError, match="another Metering"):
            ask(app, ("GET", "/t2"))
        with pytest.raises(ConfigurationError, match="another Metering"), TestClient(app):
            raise AssertionError("started")


def test_helper_that_has_a_price_is_not_passed_by() -> None:
    """Behind our middleware a helper's limits alone are not asked for again; a price is never left out silently."""
    scene = Scene()

    @scene.limiter.limit("1/minute")
    async def limited(request: Request) -> Response:
        return PlainTextResponse("test")

    @billable(1)
    @scene.limiter.limit("1/minute")
    async def paid(request: Request) -> Response:
        return PlainTextResponse("test")

    for path, helper in (("/limited", limited), ("/paid", paid)):

        async def endpoint(request: Request, *, _helper: Any = helper) -> Any:
            return await _helper(request)

        scene.app.add_route(path, scene.limiter.limit("2/minute")(endpoint))

    answers, _ = scene.play(*[("GET", "/limited")] * 3)
    assert codes(answers) == [200, 200, 429]
    with pytest.raises(ConfigurationError, match="inside a call that is metered"):
        scene.play(("GET", "/paid"))


def test_two_limiters_on_one_endpoint_are_one_admission() -> None:
    """Each tells its own handler of its own limit."""
    scene = Scene()
    other = adopt(Limiter(key_func=lambda: "all"), scene.metering)

    @scene.app.get("/t1")
    @other.limit("2/minute", error_message="others")
    @scene.limiter.limit("3/minute")
    async def endpoint() -> dict[str, int]:
        return {}

    answers, _ = scene.play(*[("GET", "/t1")] * 3)
    assert codes(answers) == [200, 200, 429]
    assert answers[2].json() == {"error": "Rate limit exceeded: others"}
    assert [len(ask.limits) for ask in scene.store.admissions] == [2, 2, 2]


def test_head_counts_and_costs_nothing() -> None:
    """Under our middleware HEAD is free of charge, and still counted by slowapi's limits."""
    scene = Scene()

    @scene.app.api_route("/t1", methods=["GET", "HEAD"])
    @billable(1)
    @scene.limiter.limit("1/minute")
    async def endpoint() -> dict[str, int]:
        return {}

    answers, left = scene.play(("HEAD", "/t1"), ("GET", "/t1"))
    assert (codes(answers), left) == ([200, 429], 3)


@pytest.mark.parametrize("middleware", [False, True])
def test_application_that_is_asked_by_another_one_counts_by_itself(middleware: bool) -> None:
    """An endpoint that asks an adopted application in its own process is another request than what that gets."""
    scene, inner = Scene(middleware=middleware), Scene(middleware=False)

    @inner.app.get("/t2")
    @inner.limiter.limit("1/minute")
    async def asked() -> dict[str, int]:
        return {}

    @scene.app.get("/t1")
    @(billable(1) if middleware else scene.limiter.limit("1/minute"))
    async def asking() -> list[int]:
        transport = httpx.ASGITransport(inner.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return codes([await client.get("/t2") for _ in range(2)])

    answers, left = scene.play(("GET", "/t1"))
    assert (answers[0].json(), left, len(inner.store.admissions)) == ([200, 429], 2 if middleware else 3, 2)


def test_nobody_is_asked_who_calls_where_no_middleware_stands() -> None:
    """Whom a limit of slowapi's counts is its key function's to say; two limiters count without a `request` too."""
    seen: list[Any] = []
    metering = Metering(Counting(), identify=seen.append, sinks=())
    first = adopt(Limiter(key_func=get_remote_address, headers_enabled=True), metering)
    second = adopt(Limiter(key_func=get_remote_address, headers_enabled=True), metering)
    app = FastAPI()
    install(app, first, "decorators")

    @app.get("/t1")
    @first.limit("3/minute")
    @second.limit("2/minute")
    async def endpoint() -> dict[str, int]:
        return {}

    answers = ask(app, *[("GET", "/t1")] * 3)
    assert (codes(answers), seen) == ([200, 200, 429], [])
    assert answers[0].headers["x-ratelimit-limit"] == "3"


def test_unmetered_lets_tests_of_endpoints_pass() -> None:
    """Inside of `unmetered()` nothing counts, neither decorated nor by default."""
    scene = Scene(inside="asgi", middleware=False, default_limits=["1/minute"])

    @scene.app.get("/default")
    async def default() -> dict[str, int]:
        return {}

    @scene.limiter.limit("1/minute")
    async def endpoint(request: Request) -> Response:
        return PlainTextResponse("test")

    async def run() -> list[int]:
        request = Request({"type": "http", "method": "GET", "path": "/", "headers": []})
        return [(await endpoint(request)).status_code for _ in range(3)]

    with unmetered():
        assert asyncio.run(run()) == [200] * 3
        assert codes(ask(scene.app, *[("GET", "/default")] * 3)) == [200] * 3
    assert codes(ask(scene.app, *[("GET", "/default")] * 2)) == [200, 429]


def test_generator_endpoint_is_asked_for_before_its_first_byte() -> None:
    """Of FastAPI's generator endpoints the refusal is the middleware's, whole."""
    scene = Scene()

    @scene.app.get("/t1")
    @scene.limiter.limit("1/minute")
    async def endpoint() -> AsyncIterator[dict[str, int]]:
        yield {"x": 1}

    answers, _ = scene.play(*[("GET", "/t1")] * 2)
    assert codes(answers) == [200, 429]
    assert answers[1].json()["code"] == "rate_limit"


def test_decorated_dependency_of_a_decorated_endpoint_is_refused_behind_our_middleware() -> None:
    """A call is metered once (X.1): at startup, and not on the first request."""
    scene = Scene()

    @scene.limiter.limit("2/minute")
    async def needed() -> int:
        return 1

    @scene.app.get("/t1")
    @scene.limiter.limit("1/minute")
    async def endpoint(got: int = Depends(needed)) -> int:
        return got

    report = audit(scene.app, ALL_FEATURES, frozenset(), scene.metering)
    assert ["a call is metered once" in error for error in report.errors] == [True]


def test_websocket_is_limited_by_its_connections() -> None:
    """Behind our middleware a limit counts the connections of a WebSocket, which slowapi refuses one and all."""
    scene = Scene()

    @scene.app.websocket("/ws")
    @scene.limiter.limit("1/minute", per_method=True)
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text("hello")
        await websocket.close()

    with TestClient(scene.app) as client:
        with client.websocket_connect("/ws") as session:
            assert session.receive_text() == "hello"
        with pytest.raises(WebSocketDenialResponse) as denied, client.websocket_connect("/ws"):
            raise AssertionError("let in")
    assert denied.value.status_code == 429


def test_audit_sees_adopted_limits() -> None:
    """The startup audit lists them, and refuses a decorator above the route's own, which slowapi lets pass (S2.30)."""
    scene = Scene(application_limits=["9/day"])

    @scene.app.get("/t1")
    @scene.limiter.limit("1/minute; 5/hour")
    async def endpoint() -> None: ...

    @scene.limiter.limit("1/minute")
    @scene.app.get("/t2")
    async def above() -> None: ...

    report = audit(scene.app, ALL_FEATURES, frozenset(), scene.metering)
    (policy,) = next(row for row in report.rows if row.path == "/t1").policies
    asker = policy.rates[0].asker
    assert asker is not None
    assert [text for text, _ in asker.texts()] == ["9 per 1 day", "1 per 1 minute", "5 per 1 hour"]
    assert [error for error in report.errors if "/t2" in error and "above the route's own" in error]
    assert len(report.errors) == 1


def overriding(app: Any, *, copies: bool) -> Any:
    """A middleware that makes POST of every request, in the scope that it was given or on a copy."""

    async def overridden(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and copies:
            scope = {**scope, "method": "POST"}
        elif scope["type"] == "http":
            scope["method"] = "POST"
        await app(scope, receive, send)

    return overridden


@pytest.mark.parametrize("copies", [False, True], ids=["mutating", "copying"])
@pytest.mark.parametrize("method", ["OPTIONS", "HEAD"])
@pytest.mark.parametrize("inside", ["decorators", "asgi"])
def test_a_method_that_is_overridden_is_counted_and_charged(inside: str, method: str, copies: bool) -> None:
    """X.4: OPTIONS and HEAD that reach an endpoint as POST are counted as POST by slowapi's limits, and pay."""
    scene = Scene(inside=inside, middleware=False)

    @scene.app.post("/paid")
    @billable(1)
    @scene.limiter.limit("2/minute")
    async def paid(request: Request) -> PlainTextResponse:
        return PlainTextResponse("paid work")

    @scene.app.post("/free")
    @scene.limiter.limit("2/minute")
    async def free(request: Request) -> PlainTextResponse:
        return PlainTextResponse("work")

    scene.app.add_middleware(overriding, copies=copies)
    scene.app.add_middleware(MeteringMiddleware, metering=scene.metering)
    answers, left = scene.play(*[(method, "/free")] * 3, *[(method, "/paid")] * 3)
    assert [answer.status_code for answer in answers] == [200, 200, 429] * 2
    assert left == 1


@pytest.mark.parametrize("copies", [False, True], ids=["mutating", "copying"])
@pytest.mark.parametrize("inside", ["middleware", "asgi"])
def test_a_method_that_is_overridden_is_counted_by_default_limits(inside: str, copies: bool) -> None:
    """X.4: slowapi's default limits count OPTIONS that reach its middleware as POST, behind ours or not."""
    for middleware in (False, True):
        scene = Scene(inside=inside, middleware=False, default_limits=["2/minute"])

        @scene.app.post("/x")
        async def endpoint() -> str:
            return "work"

        scene.app.add_middleware(overriding, copies=copies)
        if middleware:
            scene.app.add_middleware(MeteringMiddleware, metering=scene.metering)
        answers, _ = scene.play(*[("OPTIONS", "/x")] * 3)
        assert [answer.status_code for answer in answers] == [200, 200, 429]


def test_a_limited_endpoint_that_is_asked_inside_of_a_free_request_is_counted_by_itself() -> None:
    """What an application asks of another one in its process is no part of a HEAD in which it does so."""
    inner = Scene(middleware=False)

    @inner.app.get("/x")
    @inner.limiter.limit("1/minute")
    async def limited(request: Request) -> PlainTextResponse:
        return PlainTextResponse("work")

    outer = Scene()

    @outer.app.head("/ask")
    async def asking() -> PlainTextResponse:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(inner.app), base_url="http://test") as client:
            return PlainTextResponse("", (await client.get("/x")).status_code)

    answers, _ = outer.play(*[("HEAD", "/ask")] * 2)
    assert [answer.status_code for answer in answers] == [200, 429]

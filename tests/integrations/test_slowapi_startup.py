"""A limiter that is adopted when its decorators have run: slowapi's wrappers stay, and what they run asks us."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from limits import RateLimitItemPerHour
from slowapi import Limiter
from slowapi.util import get_remote_address
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from asgi_metering import Metering, MeteringMiddleware, billable
from asgi_metering.asgi.audit import audit
from asgi_metering.errors import ConfigurationError
from asgi_metering.integrations.slowapi import adopt
from asgi_metering.metering import ALL_FEATURES
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.testing import FakeClock
from tests.integrations.scenes import INSTALLED, ask, codes, install
from tests.integrations.test_slowapi_mixed import Scene as Mixed


class Before:
    """A FastAPI application that uses slowapi, with an endpoint of each kind."""

    def __init__(self, installed: str, **options: Any) -> None:
        self.limiter = limiter = Limiter(key_func=get_remote_address, **options)
        self.app = app = FastAPI()
        install(app, limiter, installed)
        router = APIRouter(prefix="/in")

        @app.get("/async")
        @limiter.limit("2/minute")
        async def endpoint(request: Request, response: Response) -> dict[str, int]:
            return {"x": 1}

        @app.get("/sync")
        @limiter.limit("2/minute")
        def sync_endpoint(request: Request) -> Response:
            return PlainTextResponse("test")

        @router.get("/twice")
        @limiter.limit("2/minute")
        @limiter.limit(lambda: "3/hour", key_func=lambda: "all")
        async def twice(request: Request) -> Response:
            return PlainTextResponse("test")

        @app.get("/free")
        @limiter.exempt
        async def free() -> dict[str, int]:
            return {}

        @app.get("/default")
        async def default() -> dict[str, int]:
            return {}

        class Endpoint(HTTPEndpoint):
            @limiter.limit("2/minute")
            def get(self, request: Request) -> Response:
                return PlainTextResponse("test")

        app.add_route("/class", Endpoint)
        app.include_router(router)


PATHS = ("/async", "/sync", "/in/twice", "/class")


@pytest.mark.parametrize("installed", ["decorators", "middleware", "async handler"])
def test_endpoints_that_were_decorated_before_are_counted_by_us(installed: str) -> None:
    """Async and sync functions, methods, included routers and stacked decorators count in our store, with fields."""
    before = Before(installed, headers_enabled=True)
    clock = FakeClock()
    assert adopt(before.limiter, Metering(MemoryStore(clock), sinks=()), app=before.app) is before.limiter
    for path in PATHS:
        answers = ask(before.app, *[("GET", path)] * 3)
        assert codes(answers) == [200, 200, 429], path
        assert [answer.headers["x-ratelimit-remaining"] for answer in answers] == ["1", "0", "0"]
        assert answers[2].json() == {"error": "Rate limit exceeded: 2 per 1 minute"}
    assert not before.limiter._storage.storage  # type: ignore[attr-defined]
    clock.advance(61)
    assert codes(ask(before.app, ("GET", "/in/twice"), ("GET", "/in/twice"))) == [200, 429]


def test_exempt_and_default_endpoints_are_as_they_were() -> None:
    """What was exempt before stays so, and the middleware counts the defaults with us, where no decorator stands."""
    before = Before("asgi", default_limits=["1/minute"])
    adopt(before.limiter, app=before.app)
    assert codes(ask(before.app, *[("GET", "/free")] * 2, *[("GET", "/default")] * 2)) == [200, 200, 200, 429]
    assert [codes(ask(before.app, *[("GET", path)] * 3)) for path in ("/async", "/class")] == [[200, 200, 429]] * 2


def test_adoption_behind_the_decorators_needs_the_application() -> None:
    """Without it nobody would know where the endpoints are; with another one they are not found."""
    before = Before("asgi")
    with pytest.raises(ConfigurationError, match="before its Limiter was adopted"):
        adopt(before.limiter)
    with pytest.raises(ConfigurationError, match="no route of the application has it"):
        adopt(before.limiter, app=Starlette())


def test_wrapper_that_is_found_nowhere_lets_nobody_in() -> None:
    """A wrapper of slowapi's that no route had when it was adopted fails, and does not run uncounted."""
    limiter = Limiter(key_func=get_remote_address)
    app = Starlette()
    install(app, limiter, "decorators")

    @limiter.limit("1/minute")
    async def endpoint(request: Request) -> Response:
        return PlainTextResponse("test")

    app.add_route("/t1", endpoint)
    lost = endpoint.__wrapped__  # type: ignore[attr-defined]
    adopt(limiter, app=app)
    stray = Limiter.limit(limiter, "1/minute")
    assert codes(ask(app, ("GET", "/t1"), ("GET", "/t1"))) == [200, 429]
    with pytest.raises(ConfigurationError, match="Nobody asks for the limits"):
        limiter._check_request_limit(None, lost, False)  # type: ignore[arg-type]
    assert callable(stray)


def test_decorators_go_on_after_adoption_at_startup() -> None:
    """What is decorated afterwards is written as by any adopted limiter, without a request."""
    before = Before("decorators")
    limiter = adopt(before.limiter, app=before.app)

    @before.app.get("/late")
    @limiter.limit("1/minute")
    async def late() -> dict[str, int]:
        return {}

    assert codes(ask(before.app, *[("GET", "/late")] * 2)) == [200, 429]


def test_limiter_is_adopted_once() -> None:
    """A second adoption is a mistake, and so is what is no limiter."""
    limiter = adopt(Limiter(key_func=get_remote_address))
    with pytest.raises(ConfigurationError, match="adopted before"):
        adopt(limiter)
    with pytest.raises(ConfigurationError, match="no slowapi Limiter"):
        adopt("limiter")  # type: ignore[arg-type]


def test_limits_that_nobody_asks_for_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """Default limits without a middleware of slowapi's are a warning at startup, where slowapi says nothing."""
    for installed in INSTALLED:
        caplog.clear()
        before = Before(installed, default_limits=["1/minute"])
        adopt(before.limiter, app=before.app)
        assert ("no SlowAPIMiddleware" in caplog.text) is (installed == "decorators")


def test_endpoints_of_one_name_that_were_decorated_before_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """Slowapi has put their limits together by then: each counts by all of them, and a warning says so."""
    limiter = Limiter(key_func=get_remote_address)
    app = Starlette()
    install(app, limiter, "decorators")
    for limit in ("2/minute", "1/minute"):

        @limiter.limit(limit)
        async def endpoint(request: Request) -> Response:
            return PlainTextResponse("test")

        app.add_route(f"/{limit[0]}", endpoint)
    adopt(limiter, app=app)
    assert "put their limits together" in caplog.text
    assert codes(ask(app, ("GET", "/2"), ("GET", "/2"))) == [200, 429]


@pytest.mark.parametrize("is_sync", [False, True])
@pytest.mark.parametrize("above", [False, True])
def test_price_beside_a_decorator_from_before_is_one_admission(above: bool, is_sync: bool) -> None:
    """Ours above or below slowapi's wrapper: one question to the store, and what it refuses is not charged."""
    mixed = Mixed()
    limiter = Limiter(key_func=get_remote_address)

    async def endpoint(request: Request) -> Response:
        return PlainTextResponse("test")

    def sync_endpoint(request: Request) -> Response:
        return PlainTextResponse("test")

    decorated: Any = sync_endpoint if is_sync else endpoint
    for decorator in (limiter.limit("2/minute"), billable(1)) if above else (billable(1), limiter.limit("2/minute")):
        decorated = decorator(decorated)
    mixed.app.get("/t1")(decorated)
    adopt(limiter, mixed.metering, app=mixed.app)
    answers, left = mixed.play(*[("GET", "/t1")] * 3)
    assert (codes(answers), left, len(mixed.store.admissions)) == ([200, 200, 429], 1, 3)
    assert isinstance(mixed.app.user_middleware[0].cls, type)
    assert mixed.app.user_middleware[0].cls is MeteringMiddleware


def test_audit_finds_what_was_decorated_before() -> None:
    """Behind our middleware the startup audit sees adopted endpoints gated, and refuses none of them."""
    before = Before("asgi")
    limiter = adopt(before.limiter, app=before.app)
    report = audit(before.app, ALL_FEATURES, frozenset(), limiter.metering)
    assert not report.errors
    assert next(row for row in report.rows if row.path == "/async").policy is not None


@pytest.mark.parametrize(
    "limit",
    ["9" * 400 + "/minute", "5/" + "9" * 400 + " years", RateLimitItemPerHour(10**5000)],
    ids=["amount", "window", "item"],
)
def test_limits_that_no_store_can_count_fail_at_import(limit: Any) -> None:
    """A number of hundreds of digits is refused as every other limit that cannot be read, with a sentence."""
    limiter = adopt(Limiter(key_func=get_remote_address))
    with pytest.raises(ConfigurationError):
        limiter.limit(limit)(lambda request: None)

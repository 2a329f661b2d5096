"""What the audit finds before the first request (pitfall 4, X.5)."""

from __future__ import annotations

import asyncio
import functools
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi import APIRouter, Depends, FastAPI
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asgi_metering import (
    Allowance,
    CreditGateMiddleware,
    Metering,
    MeteringMiddleware,
    Payer,
    RateLimitMiddleware,
    Unit,
    Wallet,
    billable,
    metered_app,
    rate_limited,
)
from asgi_metering.errors import ConfigurationError, StoreUnavailableError
from asgi_metering.guards import guard_of
from asgi_metering.stores.memory import MemoryStore
from tests.harness.drive import body, drive, status
from tests.pitfalls.apps import (
    HOW,
    PRICE,
    How,
    fastapi_app,
    installed,
)
from tests.pitfalls.scene import ANN, POOR, Scene, Visit, visit


def starlette(*routes: tuple[str, Callable[..., Any]]) -> Starlette:
    """An application with these endpoints."""
    return Starlette(routes=[Route(path, endpoint, methods=["GET", "POST"]) for path, endpoint in routes])


# -- pitfall 4: decorators above the route's own -----------------------------------------------------------


async def startup(app: ASGIApp) -> list[Message]:
    """What the server hears when it starts and, if it can, stops *app*."""
    heard: list[Message] = []
    asks = iter(["lifespan.startup", "lifespan.shutdown"])

    async def receive() -> Message:
        return {"type": next(asks)}

    async def send(message: Message) -> None:
        heard.append(message)

    await app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, receive, send)
    return heard


def refused(app: ASGIApp) -> str:
    """Why *app* must not start: what the server hears first, and what is raised after it."""
    heard: list[Message] = []

    async def receive() -> Message:
        return {"type": "lifespan.startup"}

    async def send(message: Message) -> None:
        heard.append(message)

    with pytest.raises(ConfigurationError) as raised:
        asyncio.run(app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, receive, send))
    assert [message["type"] for message in heard] == ["lifespan.startup.failed"]
    assert heard[0]["message"] == str(raised.value)
    return str(raised.value)


def warned(app: ASGIApp, caplog: pytest.LogCaptureFixture) -> list[str]:
    """What is warned of when *app* starts."""
    caplog.clear()
    asyncio.run(startup(app))
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    # Endpoints of other tests are still remembered.
    return [sentence for sentence in told if "no route reaches it" not in sentence]


def transparent(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator as most are."""

    @functools.wraps(function)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        return await function(*args, **kwargs)

    return wrapper


def upside_down(app: FastAPI) -> None:
    """Decorators above the route's own."""

    @billable(PRICE)
    @app.get("/search")
    async def search() -> str:
        return "free for all"


def upside_down_between(app: FastAPI) -> None:
    """The same, with another decorator between."""

    @rate_limited("1/minute")
    @transparent
    @app.get("/search")
    async def search() -> str:
        return "free for all"


def upside_down_in_router(app: FastAPI) -> None:
    """The same, in a router that is included."""
    router = APIRouter(prefix="/v1")

    @billable(PRICE)
    @router.get("/search")
    async def search() -> str:
        return "free for all"

    app.include_router(router, prefix="/api")


def upside_down_in_mount(app: FastAPI) -> None:
    """The same, in an application that is mounted."""
    sub = FastAPI()
    upside_down(sub)
    app.mount("/sub", sub)


WRONG = {
    "plain": (upside_down, "/search runs "),
    "between": (upside_down_between, "/search runs "),
    "router": (upside_down_in_router, "/api/v1/search runs "),
    "mount": (upside_down_in_mount, "/sub/search runs "),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("wrong", WRONG)
def test_refuse_to_start_with_decorators_in_the_wrong_order(wrong: str, how: How, scene: Scene) -> None:
    """Pitfall 4: a route below its metering decorators would be free, so the server hears of a failed startup."""
    build, beginning = WRONG[wrong]
    app = FastAPI()
    build(app)
    told = refused(installed(app, scene.metering, how))
    assert told.startswith(beginning)
    assert "Put them below it." in told


@pytest.mark.parametrize("how", HOW)
def test_start_with_decorators_in_the_right_order(how: How, scene: Scene) -> None:
    """Pitfall 4: the same route in the right order starts and stops, with the two messages and no others."""
    heard = asyncio.run(startup(installed(fastapi_app([]), scene.metering, how)))
    assert [message["type"] for message in heard] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


def test_refuse_to_start_where_a_bare_function_is_routed_in_starlette(scene: Scene) -> None:
    """Pitfall 4: a route added for the bare function, although a guarded one exists, fails the startup."""

    async def search(request: Request) -> PlainTextResponse:
        return PlainTextResponse("free for all")

    billable(PRICE)(search)
    assert "/search runs" in refused(installed(starlette(("/search", search)), scene.metering, "added"))


def test_start_where_one_function_is_routed_twice(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """Pitfall 4: a function that is free on one route and guarded on another may be meant: it starts, and is told."""

    async def search(request: Request) -> PlainTextResponse:
        return PlainTextResponse("ok")

    app = installed(starlette(("/free", search), ("/paid", billable(PRICE)(search))), scene.metering, "added")
    free, paid = visit(app, Visit("/free", caller=POOR), Visit("/paid", caller=POOR))
    assert (status(free.log), status(paid.log)) == (200, 402)
    (told,) = [record.getMessage() for record in caplog.records if "/free" in record.getMessage()]
    assert told.startswith("/free runs tests.pitfalls.test_startup.")
    assert "ungated and free, although another route has it metered." in told


def test_warn_of_what_no_route_reaches(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """X.5: a decorated function of the application's own module that no route reaches is a warning, not a failure."""

    @billable(PRICE)
    async def forgotten() -> None: ...

    async def reached(request: Request) -> PlainTextResponse:
        return PlainTextResponse("ok")

    visit(installed(starlette(("/", reached)), scene.metering, "added"), Visit())
    named = [record.getMessage() for record in caplog.records if "forgotten is decorated" in record.getMessage()]
    assert len(named) == 1
    assert "no route reaches it" in named[0]


def test_keep_quiet_of_applications_built_before(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """X.5: an application that a function builds is not warned of the endpoints of those that it built before."""
    before = fastapi_app([])
    visit(installed(fastapi_app([]), scene.metering, "added"), Visit("/async"))
    assert before is not None
    assert [record for record in caplog.records if "fastapi_app" in record.getMessage()] == []


def test_warn_of_a_free_route_below_the_decorators(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """Pitfall 4: metering decorators between two routes gate the upper one; the lower one is named as free."""
    app = FastAPI()

    @app.get("/paid")
    @billable(PRICE)
    @app.get("/free")
    async def search() -> str:
        return "ok"

    (told,) = warned(installed(app, scene.metering, "added"), caplog)
    assert told.startswith("/free runs ")
    assert "put the metering decorators below the decorators of both routes" in told


# -- a client in process -----------------------------------------------------------------------------------


def uncovered(metering: Metering) -> ASGIApp:
    """Billable, where nothing enforces credits."""
    return RateLimitMiddleware(starlette(("/x", billable(PRICE)(plain_endpoint()))), metering)


def ungated(metering: Metering) -> ASGIApp:
    """The framework has the plain function."""
    app = FastAPI()
    upside_down(app)
    return installed(app, metering, "added")


def two_meterings(metering: Metering) -> ASGIApp:
    """Layers that do not share one."""
    return RateLimitMiddleware(CreditGateMiddleware(starlette(), Metering(sinks=())), metering)


def no_lifespan(metering: Metering) -> ASGIApp:
    """The same as `uncovered`, around an app whose lifespan the metering stands in for."""
    inner = uncovered(metering)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] != "lifespan"
        await inner(scope, receive, send)

    app.routes = inner.app.routes  # type: ignore[attr-defined]
    return RateLimitMiddleware(app, metering)


def plain_endpoint() -> Any:
    """An endpoint of Starlette without a decorator."""

    async def endpoint(request: Request) -> PlainTextResponse:
        return PlainTextResponse("free for all")

    return endpoint


REFUSED: dict[str, tuple[Callable[[Metering], ASGIApp], str]] = {
    "ungated": (ungated, "/search runs "),
    "uncovered": (uncovered, "is @billable, but no layer enforces credits"),
    "two": (two_meterings, "do not share one Metering"),
    "no-lifespan": (no_lifespan, "is @billable, but no layer enforces credits"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", REFUSED)
def test_raise_what_refuses_the_startup(name: str, scene: Scene) -> None:
    """Pitfall 31: a client in process waits for the exception after the failed startup, and gets the refusal itself."""
    build, sentence = REFUSED[name]
    with pytest.raises(ConfigurationError, match=re.escape(sentence)), TestClient(build(scene.metering)):
        raise AssertionError(f"{name} serves.")


class UnopenedStore(MemoryStore):
    """A store that nobody reaches."""

    async def open(self) -> None:
        raise StoreUnavailableError("The store cannot be reached. Start it.")


@pytest.mark.timeout(20)
def test_raise_that_the_store_is_down() -> None:
    """Pitfall 31: where the store cannot be opened a client in process hears why."""
    app = installed(starlette(), Metering(UnopenedStore(), sinks=()), "added")
    with pytest.raises(StoreUnavailableError, match="cannot be reached"), TestClient(app):
        raise AssertionError("It serves.")


# -- where no lifespan comes -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ungated", "uncovered", "two"])
def test_refuse_every_request_of_what_must_not_serve(name: str, scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """Without a lifespan the first request is audited: each is answered 500 and told in the log; none is charged."""
    build, sentence = REFUSED[name]
    app = build(scene.metering)
    for path in ("/search", "/x", "/nowhere"):
        caplog.clear()
        ended = asyncio.run(drive(app, Visit(path).scope()))
        assert status(ended.log) == 500
        assert json.loads(body(ended.log))["code"] == "misconfigured"
        assert sentence not in body(ended.log).decode()
        (told,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
        assert told.startswith("The application cannot serve: ")
        assert sentence in told
    assert scene.books.admissions == []


def test_refuse_requests_after_a_refused_startup(scene: Scene) -> None:
    """A server that serves although the startup was refused serves nothing: every request is answered 500."""
    app = ungated(scene.metering)
    refused(app)
    assert status(asyncio.run(drive(app, Visit("/search").scope())).log) == 500


def test_audit_a_mounted_application_on_its_first_request(scene: Scene) -> None:
    """A mounted application with layers of its own hears of no lifespan, and is audited all the same."""
    sub = FastAPI()
    upside_down(sub)
    app = FastAPI()
    app.mount("/sub", installed(sub, scene.metering, "added"))
    (ended,) = visit(app, Visit("/sub/search"))
    assert status(ended.log) == 500


def test_find_the_layers_further_in_without_a_lifespan(scene: Scene) -> None:
    """Two layers that share the features of a route are one stack, also where no lifespan collects them."""
    app = starlette(("/x", billable(PRICE)(plain_endpoint())))
    app.add_middleware(CreditGateMiddleware, metering=scene.metering)
    app.add_middleware(RateLimitMiddleware, metering=scene.metering)
    assert status(asyncio.run(drive(app, Visit("/x").scope())).log) == 200


def test_audit_once_without_a_lifespan(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """What looks wrong is warned of once; later requests, of threads at once too, are not audited again."""
    app = installed(starlette(("/x", billable(PRICE)(plain_endpoint()))), scene.metering, "wrapped")
    asyncio.run(drive(app, Visit("/x").scope()))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: asyncio.run(drive(app, Visit("/nowhere").scope())), range(8)))
    assert len([record for record in caplog.records if "answers HEAD" in record.getMessage()]) == 1


def test_start_again_after_a_refusal(scene: Scene) -> None:
    """A second lifespan looks anew: what was mended meanwhile serves."""
    app = starlette(("/x", plain_endpoint()))
    wrong = billable(PRICE)(app.routes[0].endpoint)  # type: ignore[attr-defined]
    stack = MeteringMiddleware(app, scene.metering)
    assert "/x runs" in refused(stack)
    app.routes[0] = Route("/x", wrong)
    (ended,) = visit(stack, Visit("/x"))
    assert status(ended.log) == 200


# -- units -------------------------------------------------------------------------------------------------


def test_refuse_one_unit_with_two_scales(scene: Scene) -> None:
    """X.7: two routes, or a route and the metering, that count one unit differently would be wrong by powers of ten."""
    coarse, fine = Unit("messages", scale=0), Unit("messages", scale=3)
    routes = [(f"/{at}", billable(1, unit=unit)(plain_endpoint())) for at, unit in enumerate((coarse, fine, coarse))]
    told = refused(installed(starlette(*routes), scene.metering, "added"))
    assert told.startswith("/1 (")
    assert "counts 'messages' with scale 3, and /0 (" in told
    assert told.endswith("with scale 0. Declare the unit once and use that object, or give one of them another name.")
    told = refused(
        installed(starlette(("/x", billable(1, unit=Unit("credits", 3))(plain_endpoint()))), scene.metering, "added")
    )
    assert "counts 'credits' with scale 3, and the Metering with scale 6." in told


def test_tell_a_wrong_scale_once(scene: Scene) -> None:
    """X.7: what a metered_app counts wrong is one mistake, however many routes are in it."""
    inner = starlette(("/a", plain_endpoint()), ("/b", plain_endpoint()))
    app = installed(metered_app(inner, billable(1, unit=Unit("credits", 3))), scene.metering, "wrapped")
    assert refused(app).count("with scale 3") == 1


def test_remember_the_units_of_routes(scene: Scene) -> None:
    """X.7: a unit that a route has told of is known to the metering, which then grants in no other scale of it."""
    app = installed(starlette(("/x", billable(1, unit=Unit("messages", 0))(plain_endpoint()))), scene.metering, "added")
    asyncio.run(startup(app))
    with pytest.raises(ConfigurationError, match=r"'messages' has scale 6 here, and is known .* with scale 0"):
        asyncio.run(scene.metering.grant("ann", 1, id="1", unit=Unit("messages")))


def test_refuse_a_unit_that_was_granted_in_another_scale(scene: Scene) -> None:
    """X.7: what has been granted in one scale is not charged in another."""
    asyncio.run(scene.metering.balance("ann", unit=Unit("messages", 6)))
    told = refused(
        installed(starlette(("/x", billable(1, unit=Unit("messages", 0))(plain_endpoint()))), scene.metering, "added")
    )
    assert "cannot be charged. The unit 'messages' has scale 0 here" in told


# -- allowances --------------------------------------------------------------------------------------------


def sharing(*policies: dict[str, Any]) -> Starlette:
    """An application with a route for each of these policies."""
    return starlette(*((f"/{at}", billable(1, **policy)(plain_endpoint())) for at, policy in enumerate(policies)))


def of(*sources: Any, **more: Any) -> dict[str, Any]:
    """A policy of these sources."""
    return {"sources": list(sources), **more}


@pytest.mark.parametrize(
    ("first", "other", "differing"),
    [
        pytest.param(Allowance(5), Allowance(5, per="month"), "window", id="period"),
        pytest.param(Allowance(5), Allowance(5, zone="Europe/Berlin"), "window", id="zone"),
        pytest.param(Allowance(5), Allowance(5, days=1), "window", id="rolling"),
        pytest.param(
            Allowance(5, per="month"), Allowance(5, per="month", anchor=2, payer=Payer("me")), "window", id="anchor"
        ),
        pytest.param(Allowance(5), Allowance(6), "limit", id="limit"),
        pytest.param(Allowance({"free": 5, "pro": 9}), Allowance({"free": 5}), "limit", id="plan"),
    ],
)
def test_refuse_two_allowances_in_one_bucket(scene: Scene, first: Allowance, other: Allowance, differing: str) -> None:
    """S0.9: routes of one name share a bucket; what they would count differently there is refused, both named."""
    told = refused(installed(sharing(of(first), of(other, Wallet()), of(first)), scene.metering, "added"))
    assert told.startswith("/1 (")
    assert f"has an allowance 'allowance' with another {differing} than that of /0 (" in told
    assert told.endswith("or name them apart: Allowance(..., name='monthly').")
    assert told.count("has an allowance") == 1


def test_share_one_allowance_between_routes(scene: Scene) -> None:
    """S0.2, S0.9: limits by plan, however they are written, are one; another unit, payer or name is another bucket."""
    ours, theirs = Payer("ours", "acme"), Payer("theirs", lambda: "umbrella")
    app = sharing(
        of(Allowance({"free": 5, "pro": "9"})),
        of(Allowance({"pro": 9, "free": "5.0"})),
        of(Allowance(7), unit=Unit("messages", 0)),
        of(Allowance(8, name="other")),
        of(Allowance(9, payer=ours), Wallet(payer=ours)),
        of(Allowance(10, payer=theirs)),
        of(Allowance(11), payer=lambda: "somebody"),
    )
    assert [message["type"] for message in asyncio.run(startup(installed(app, scene.metering, "added")))] == [
        "lifespan.startup.complete",
        "lifespan.shutdown.complete",
    ]


@pytest.mark.parametrize(
    ("limit", "account", "warns"),
    [
        ({"free": 1, "pro": 20}, "acme", True),
        ({"free": 1, "pro": 20}, None, False),
        ({"free": 1, "pro": 20}, lambda call: call.caller.plan, False),
        ({"free": 5, "pro": "5.0"}, "acme", False),
        (100, "acme", False),
        ({"free": 1, "pro": 20}, "each", False),
    ],
    ids=["by plan", "own", "computed", "one amount", "a pot", "each"],
)
def test_warn_of_one_count_for_everybody_by_plan(
    limit: Any, account: Any, warns: bool, scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    """S0.9: an allowance of one account is used up by whoever comes first, and a plan of each caller has no say."""
    app = sharing(of(Allowance(limit, payer=Payer("platform", account), each=account == "each"), Wallet()))
    told = [each for each in warned(installed(app, scene.metering, "added"), caplog) if "allowance" in each]
    assert len(told) == warns
    if warns:
        assert "/0 (" in told[0]
        assert "is one count of the account 'acme', which callers of all plans use up together" in told[0]
        assert told[0].endswith("If you mean one of each payer, say each=True.")


# -- decorators that stand for an endpoint -----------------------------------------------------------------


def test_refuse_a_bare_decorator() -> None:
    """X.5: @billable without parentheses makes no endpoint; FastAPI refuses it at import, with the mend."""
    app = FastAPI()
    with pytest.raises(ConfigurationError, match=re.escape("Write @billable(2), with its price in parentheses")):
        app.get("/x")(billable(plain_endpoint()))


def test_refuse_a_bare_decorator_among_others() -> None:
    """X.5: the same above or below another metering decorator is an import error everywhere."""
    with pytest.raises(ConfigurationError, match="Write @billable"):
        rate_limited("5/minute")(billable(plain_endpoint()))
    with pytest.raises(ConfigurationError, match="Write @billable"):
        billable(rate_limited("5/minute")(plain_endpoint()))


def test_refuse_to_start_with_a_bare_decorator(scene: Scene) -> None:
    """X.5: Starlette takes it for an application and would fail on each request; the audit names the route."""
    told = refused(installed(starlette(("/x", billable(plain_endpoint()))), scene.metering, "added"))
    assert told.startswith("/x has a metering decorator for its endpoint. Write @billable(2)")


# -- dependencies ------------------------------------------------------------------------------------------


def with_dependency(place: str) -> tuple[FastAPI, str]:
    """An application with a decorated dependency at *place*, and its only path."""

    @billable(PRICE)
    async def pays() -> None: ...

    async def further(_: None = Depends(pays)) -> None: ...

    depends = [Depends(further)]
    app = FastAPI(dependencies=depends if place == "application" else [])
    router = APIRouter(dependencies=depends if place == "router" else [])

    @router.get("/x", dependencies=depends if place == "route" else [])
    async def endpoint() -> str:
        return "ok"

    app.include_router(router, prefix="/v1", dependencies=depends if place == "include" else [])
    return app, "/v1/x"


@pytest.mark.parametrize("place", ["application", "router", "route", "include"])
def test_reach_decorated_dependencies(place: str, scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """X.5: a decorated dependency gates its routes, wherever it is declared, and is not told to be out of reach."""
    app, path = with_dependency(place)
    paid, poor = visit(installed(app, scene.metering, "added"), Visit(path), Visit(path, caller=POOR))
    assert (status(paid.log), status(poor.log)) == (200, 402)
    assert [record.getMessage() for record in caplog.records if "pays" in record.getMessage()] == []


@pytest.mark.parametrize("place", ["application", "router", "route", "include"])
def test_audit_decorated_dependencies(place: str, scene: Scene) -> None:
    """X.5: a decorated dependency without its layer is refused as an endpoint is."""
    app, path = with_dependency(place)
    app.add_middleware(RateLimitMiddleware, metering=scene.metering)
    assert refused(app).startswith(f"{path} (tests.pitfalls.test_startup.with_dependency.pays")


def test_refuse_an_endpoint_and_a_dependency_that_are_both_metered(scene: Scene) -> None:
    """X.1: a call is metered once, so that every call of such a route would fail."""
    app = FastAPI()

    @billable(PRICE)
    async def pays() -> None: ...

    @app.get("/x", dependencies=[Depends(pays)])
    @rate_limited("5/minute")
    async def endpoint() -> str:
        return "ok"

    told = refused(installed(app, scene.metering, "added"))
    assert "is metered as " in told
    assert "a call is metered once" in told


class Pays:
    """A dependency, or an endpoint, that is an object with a decorated call."""

    @billable(PRICE)
    async def __call__(self) -> str:
        return "ok"


@billable(PRICE)
async def bought(what: str) -> str:
    """A function of which a route has some arguments only."""
    return what


OBJECTS: dict[str, Callable[[], Any]] = {"call": Pays, "partial": lambda: functools.partial(bought, "image")}


@pytest.mark.parametrize("new", OBJECTS.values(), ids=OBJECTS)
def test_reach_decorated_calls_of_objects(new: Any, scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """X.5: an object whose call is decorated gates what it is a dependency or an endpoint of, and is found there."""
    app, router = FastAPI(), APIRouter()
    router.get("/included")(plain_endpoint())
    app.include_router(router, dependencies=[Depends(new())])
    app.get("/route", dependencies=[Depends(new())])(plain_endpoint())
    app.get("/object")(new())
    visits = [Visit(path, caller=caller) for path in ("/included", "/route", "/object") for caller in (ANN, POOR)]
    told = visit(installed(app, scene.metering, "added"), *visits)
    assert [status(each.log) for each in told] == [200, 402] * 3
    decorated = guard_of(bought if new is not Pays else Pays.__call__)
    assert decorated is not None
    assert [each.getMessage() for each in caplog.records if decorated.policy.name in each.getMessage()] == []


@pytest.mark.parametrize("new", OBJECTS.values(), ids=OBJECTS)
def test_refuse_an_endpoint_and_an_object_that_are_both_metered(new: Any, scene: Scene) -> None:
    """X.1: the first paying request would fail, so that the application does not start."""
    app = FastAPI()
    app.get("/x", dependencies=[Depends(new())])(rate_limited("5/minute")(plain_endpoint()))
    assert "a call is metered once" in refused(installed(app, scene.metering, "added"))


# -- what may be meant -------------------------------------------------------------------------------------


class Head(HTTPEndpoint):
    """A class whose `get` answers HEAD too."""

    @billable(PRICE)
    async def get(self, request: Request) -> PlainTextResponse:
        return PlainTextResponse("ok")


class OwnHead(Head):
    """A class that answers HEAD by itself."""

    async def head(self, request: Request) -> PlainTextResponse:
        return PlainTextResponse("")


def test_warn_of_a_head_that_runs_a_paid_handler(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """Pitfall 12: HEAD is free; each billable route that answers it by its GET handler is named, and no other."""
    paid = billable(PRICE)(plain_endpoint())
    routes = [
        Route("/get", paid),
        Route("/class", Head),
        Route("/own", OwnHead),
        Route("/post", paid, methods=["POST"]),
        Route("/limited", rate_limited("5/minute")(plain_endpoint())),
        Route("/free", plain_endpoint()),
    ]
    told = warned(installed(Starlette(routes=routes), scene.metering, "added"), caplog)
    assert [sentence.partition(" ")[0] for sentence in told] == ["/get", "/class"]
    assert "answers HEAD by running the same handler, free of charge." in told[0]
    assert "HEAD" not in " ".join(warned(installed(fastapi_app([]), scene.metering, "added"), caplog))


def test_warn_that_nobody_is_identified(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """S3.37: billable routes without identify= answer 401 to everybody, which is said once; free ones need nobody."""
    nobody = Metering(sinks=())
    (told,) = warned(installed(fastapi_app([]), nobody, "added"), caplog)
    assert "is billable, but Metering has no identify: every call of billable routes will be 401." in told
    assert warned(installed(fastapi_app([]), scene.metering, "added"), caplog) == []
    limited = starlette(("/x", rate_limited("5/minute")(plain_endpoint())))
    assert warned(installed(limited, Metering(sinks=()), "added"), caplog) == []
    exempt = starlette(("/x", billable(PRICE)(plain_endpoint())))
    exempt.router.routes[0].methods = {"POST"}  # type: ignore[attr-defined]
    stack = RateLimitMiddleware(exempt, Metering(sinks=()), unenforced="allow")
    assert warned(stack, caplog) == []

"""The gate among what frameworks put around endpoints: dependencies, other middleware, mounts, computed policies."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.sse import EventSourceResponse
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Host, Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from asgi_metering import (
    Metering,
    MeteringMiddleware,
    TokenUsage,
    billable,
    current_call,
    metered_app,
    rate_limited,
    up_to,
)
from asgi_metering.call import Call
from asgi_metering.errors import PayerError, StoreUnavailableError
from asgi_metering.prices import per_token
from asgi_metering.rules.decide import Answer
from asgi_metering.rules.operations import Operation
from tests.harness.drive import Drive, body, drive, status
from tests.pitfalls.apps import GENERATORS, HOW, PRICE, How, fastapi_app, installed
from tests.pitfalls.scene import (
    ANN,
    CREDIT,
    POOR,
    Books,
    Scene,
    Visit,
    field_of,
    http_only,
    identify,
    problem,
    visit,
)

BOB = "bob"

# -- dependencies that clean up ----------------------------------------------------------------------------


def transactional(ran: list[str]) -> FastAPI:
    """Endpoints behind dependencies with ``yield``, async and sync, which say how they were left."""
    app = FastAPI()

    async def async_session() -> AsyncIterator[str]:
        try:
            yield "session"
            ran.append("async commit")
        except Exception:
            ran.append("async rollback")
            raise
        finally:
            ran.append("async close")

    def sync_session() -> Iterator[str]:
        try:
            yield "session"
            ran.append("sync commit")
        except Exception:
            ran.append("sync rollback")
            raise
        finally:
            ran.append("sync close")

    @app.get("/function")
    @billable(PRICE)
    async def function(one: str = Depends(async_session), two: str = Depends(sync_session)) -> str:
        ran.append("body")
        return one

    @app.get("/sync")
    @billable(PRICE)
    def sync(one: str = Depends(async_session), two: str = Depends(sync_session)) -> str:
        ran.append("body")
        return one

    @app.get("/sse", response_class=EventSourceResponse)
    @billable(PRICE)
    async def sse(one: str = Depends(async_session), two: str = Depends(sync_session)) -> AsyncIterator[str]:
        ran.append("body")
        yield one

    @app.get("/jsonl")
    @billable(PRICE)
    async def jsonl(one: str = Depends(async_session), two: str = Depends(sync_session)) -> AsyncIterator[str]:
        ran.append("body")
        yield one

    return app


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("path", ["/function", "/sync", "/sse", "/jsonl"])
def test_roll_dependencies_back_on_refusal(path: str, how: How, scene: Scene, ran: list[str]) -> None:
    """Pitfall 13, S0.39: dependencies with yield see the refusal as an exception and are closed, sync ones too."""
    (refused,) = visit(installed(transactional(ran), scene.metering, how), Visit(path, caller=POOR))
    assert status(refused.log) == 402
    assert refused.exception is None
    assert ran == ["sync rollback", "sync close", "async rollback", "async close"]


@pytest.mark.parametrize("path", ["/function", "/sync", "/sse", "/jsonl"])
def test_commit_dependencies_when_admitted(path: str, scene: Scene, ran: list[str]) -> None:
    """Pitfall 13: the same dependencies commit for a call that was let in, which is charged once."""
    visit(installed(transactional(ran), scene.metering, "added"), Visit(path))
    assert ran == ["body", "sync commit", "sync close", "async commit", "async close"]
    assert scene.settled() == PRICE


# -- other middleware --------------------------------------------------------------------------------------


async def dispatch(request: Any, call_next: Callable[[Any], Awaitable[Any]]) -> Any:
    """What most middleware of applications does."""
    response = await call_next(request)
    response.headers["x-seen"] = "yes"
    return response


def stacked(scene: Scene, ran: list[str], inside: bool, outside: bool, layer: Any, **options: Any) -> FastAPI:
    """The metering with *layer* on either side of it."""
    app = fastapi_app(ran)
    if inside:
        app.add_middleware(layer, **options)
    app.add_middleware(MeteringMiddleware, metering=scene.metering)
    if outside:
        app.add_middleware(layer, **options)
    return app


SIDES = [(True, False), (False, True), (True, True)]


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
@pytest.mark.parametrize(("inside", "outside"), SIDES, ids=["inside", "outside", "both"])
@pytest.mark.parametrize("kind", ["async", "sync", *GENERATORS])
def test_work_beside_base_http_middleware(
    kind: str, inside: bool, outside: bool, spec_version: str, scene: Scene, ran: list[str]
) -> None:
    """Pitfalls 7, 13: every kind of endpoint is gated, answered and settled once beside `BaseHTTPMiddleware`."""
    app = stacked(scene, ran, inside, outside, BaseHTTPMiddleware, dispatch=dispatch)
    refused, admitted = visit(
        app,
        Visit(f"/{kind}", caller=POOR, spec_version=spec_version),
        Visit(f"/{kind}", spec_version=spec_version),
    )
    assert status(refused.log) == problem(refused)["status"] == 402
    assert refused.exception is None
    assert (field_of(refused, "x-seen") == "yes") is outside
    assert status(admitted.log) == 200
    assert ran == [kind]
    assert (len(scene.books.admissions), len(scene.books.ends)) == (2, 1)
    assert scene.settled() == PRICE


@pytest.mark.parametrize(("inside", "outside"), SIDES, ids=["inside", "outside", "both"])
@pytest.mark.parametrize("kind", ["async", "async-sse", "sync-jsonl"])
def test_work_beside_gzip(kind: str, inside: bool, outside: bool, scene: Scene, ran: list[str]) -> None:
    """DESIGN 7: compressed on either side, answers and refusals alike reach the client whole."""
    app = stacked(scene, ran, inside, outside, GZipMiddleware, minimum_size=1)
    accepts = (("accept-encoding", "gzip"),)
    refused, admitted = visit(app, Visit(f"/{kind}", caller=POOR, headers=accepts), Visit(f"/{kind}", headers=accepts))
    assert json.loads(plain_body(refused))["status"] == 402
    assert plain_body(admitted) == body(visit(fastapi_free(kind), Visit(f"/{kind}"))[0].log)
    assert scene.settled() == PRICE


def fastapi_free(kind: str) -> ASGIApp:
    """The same application behind a metering of its own."""
    return installed(fastapi_app([]), Scene().metering, "added")


def plain_body(ended: Drive) -> bytes:
    """The body as the client reads it."""
    if field_of(ended, "content-encoding") == "gzip":
        return gzip.decompress(body(ended.log))
    return body(ended.log)


# -- routers, mounts, classes ------------------------------------------------------------------------------


@billable(PRICE)
async def costly(request: Request) -> PlainTextResponse:
    """One endpoint for all the places below."""
    return PlainTextResponse("paid")


def included() -> Any:
    """A router in a router."""
    router, outer, app = APIRouter(prefix="/b"), APIRouter(prefix="/a"), FastAPI()
    router.add_api_route("/c", costly, response_model=None)
    outer.include_router(router)
    app.include_router(outer, prefix="/v1")
    return app


def mounted() -> Any:
    """An application in an application."""
    sub, app = FastAPI(), FastAPI()
    sub.add_api_route("/c", costly, response_model=None)
    app.mount("/v1/a/b", sub)
    return app


def nested_mounts() -> Any:
    """Routes two mounts down."""
    return Starlette(routes=[Mount("/v1", routes=[Mount("/a/b", routes=[Route("/c", costly)])])])


def by_host() -> Any:
    """An application for one host."""
    return Starlette(routes=[Host("testserver", Starlette(routes=[Route("/v1/a/b/c", costly)]))])


def in_class() -> Any:
    """A class with one metered method."""

    class Endpoint(HTTPEndpoint):
        @billable(PRICE)
        async def get(self, request: Request) -> PlainTextResponse:
            return PlainTextResponse("paid")

        async def post(self, request: Request) -> PlainTextResponse:
            return PlainTextResponse("free")

    return Starlette(routes=[Route("/v1/a/b/c", Endpoint)])


def whole_mount() -> Any:
    """A whole application behind the gate."""

    async def free(request: Request) -> PlainTextResponse:
        return PlainTextResponse("paid")

    inner = Starlette(routes=[Route("/b/c", free)])
    return Starlette(routes=[Mount("/v1/a", metered_app(inner, billable(PRICE), rate_limited("100/minute")))])


def whole_mount_in_fastapi() -> Any:
    """The same in FastAPI."""
    app = FastAPI()
    sub = FastAPI()

    @sub.get("/b/c")
    async def free() -> PlainTextResponse:
        return PlainTextResponse("paid")

    app.mount("/v1/a", metered_app(sub, billable(PRICE)))
    return app


def route_with_middleware() -> Any:
    """A route with middleware of its own."""
    return Starlette(routes=[Route("/v1/a/b/c", costly, middleware=[Middleware(GZipMiddleware)])])


PLACES = [
    included,
    mounted,
    nested_mounts,
    by_host,
    in_class,
    whole_mount,
    whole_mount_in_fastapi,
    route_with_middleware,
]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_gate_wherever_a_router_puts_an_endpoint(place: Callable[[], Any], how: How, scene: Scene) -> None:
    """DESIGN 5: included, mounted, nested, by host, in a class or as a whole app: gated once, never passed by."""
    refused, admitted = visit(
        installed(place(), scene.metering, how), Visit("/v1/a/b/c", caller=POOR), Visit("/v1/a/b/c")
    )
    assert (status(refused.log), status(admitted.log), body(admitted.log)) == (402, 200, b"paid")
    assert scene.settled() == PRICE
    assert (len(scene.books.admissions), len(scene.books.ends)) == (2, 1)


def test_leave_other_methods_of_a_class_free(scene: Scene) -> None:
    """DESIGN 5: a class of endpoints is metered method by method."""
    (ended,) = visit(installed(in_class(), scene.metering, "added"), Visit("/v1/a/b/c", "POST", caller=POOR))
    assert body(ended.log) == b"free"


@http_only
async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """A plain application."""
    await PlainTextResponse(scope["path"])(scope, receive, send)


def test_meter_a_whole_plain_application(scene: Scene) -> None:
    """DESIGN 2: `metered_app` right inside the middleware, with a price computed from the scope."""

    async def price(scope: Scope) -> int:
        return 3 if scope["path"] == "/dear" else 1

    app = MeteringMiddleware(metered_app(echo, billable(price, line="echo")), scene.metering)
    ended = visit(app, Visit("/dear"), Visit("/cheap"), Visit("/dear", caller=POOR))
    assert [status(each.log) for each in ended] == [200, 200, 402]
    assert scene.settled() == 4
    assert {admission.line for admission in scene.books.admissions} == {"echo"}


def test_pass_other_scopes_through_a_metered_app(scene: Scene) -> None:
    """DESIGN 7: a metered app asks for HTTP requests only; a lifespan reaches the app inside."""
    app = metered_app(Starlette(routes=[]), billable(PRICE))
    visit(MeteringMiddleware(app, scene.metering))
    assert scene.books.asked == []


# -- policies that are computed ----------------------------------------------------------------------------


class Order(BaseModel):
    """A body."""

    org: str
    n: int = 1


async def principal(request: Request) -> str:
    """A dependency that says who calls."""
    return request.headers["x-api-key"] + "-principal"


def price_of(order: Order) -> int:
    """A price from the body."""
    return order.n


async def price_of_later(order: Order) -> str:
    """The same, from somewhere else."""
    await asyncio.sleep(0)
    return f"{order.n}.5"


def ordering(**options: Any) -> FastAPI:
    """One endpoint whose policy is *options*; callables may ask for the body and for who the dependency found."""
    app = FastAPI()
    price = options.pop("price", PRICE)

    @app.post("/orders")
    @billable(price, **options)
    async def order(order: Order, who: Annotated[str, Depends(principal)], note: str = "none") -> dict[str, Any]:
        return {"payer": current_call().payer}

    return app


def ask(n: int = 1, org: str = BOB, caller: str = ANN) -> Visit:
    """One order."""
    raw = json.dumps({"org": org, "n": n}).encode()
    return Visit("/orders", "POST", caller=caller, body=raw, headers=(("content-type", "application/json"),))


@pytest.mark.parametrize(
    ("price", "charged"),
    [
        (price_of, 3 * CREDIT),
        (price_of_later, 3_500_000),
        (lambda order, note="x": order.n if note == "none" else 99, 3 * CREDIT),
        (lambda call, order: order.n if call.caller.id == ANN else 99, 3 * CREDIT),
        (lambda **everything: everything["order"].n, 3 * CREDIT),
    ],
    ids=["sync", "async", "default", "call", "all"],
)
def test_compute_prices_from_arguments(price: Callable[..., Any], charged: int, scene: Scene) -> None:
    """DESIGN 2: a price is a sync or async callable of the endpoint's own bound arguments, and of the call."""
    (ended,) = visit(installed(ordering(price=price), scene.metering, "added"), ask(3))
    assert status(ended.log) == 200
    assert scene.books.admissions[0].amount == charged
    assert asyncio.run(scene._balance_once(ANN)).settled == charged


async def payer_later(order: Order, who: str) -> str:
    """Who pays, from somewhere else."""
    await asyncio.sleep(0)
    assert who == "ann-principal"
    return order.org


@pytest.mark.parametrize("payer", [lambda order: order.org, payer_later], ids=["sync", "async"])
def test_charge_the_payer_of_the_arguments(payer: Callable[..., Any], scene: Scene) -> None:
    """S3.37: `payer=` names who pays from the body or a dependency's result; the caller's own balance is untouched."""
    scene.grant(BOB, 10)
    app = installed(ordering(payer=payer), scene.metering, "added")
    paid, refused = visit(app, ask(org=BOB), ask(org=POOR))
    assert json.loads(body(paid.log)) == {"payer": BOB}
    assert status(refused.log) == 402
    assert (scene.settled(ANN), scene.settled(BOB)) == (0, PRICE)


@pytest.mark.parametrize("answer", [None, "", 7, RuntimeError("down")], ids=repr)
def test_refuse_loudly_when_the_payer_cannot_be_told(
    answer: Any, scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    """S0.25, S3.38: a payer that is nobody is a 503 and an error in the log: never free, never another's money."""

    def payer() -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    (ended,) = visit(installed(ordering(payer=payer), scene.metering, "wrapped"), ask())
    assert problem(ended)["code"] == "payer_unresolved"
    assert status(ended.log) == 503
    assert "could not be resolved" in caplog.text
    assert scene.books.admissions == []
    assert isinstance(PayerError("x"), LookupError)


async def key_later(order: Order) -> str:
    """What is counted together, from somewhere else."""
    await asyncio.sleep(0)
    return order.org


@pytest.mark.parametrize("key", [lambda order: order.org, key_later], ids=["sync", "async"])
@pytest.mark.parametrize("cost", [lambda order: order.n, 2], ids=["computed", "fixed"])
def test_count_by_computed_keys_and_costs(key: Callable[..., Any], cost: Any, scene: Scene) -> None:
    """DESIGN 2: limits are counted by a key and at a cost that come from the endpoint's arguments."""
    app = FastAPI()

    @app.post("/orders")
    @rate_limited("4/day", key=key, cost=cost)
    async def order(order: Order) -> str:
        return "ok"

    ended = visit(installed(app, scene.metering, "added"), *(ask(2, org) for org in ("a", "a", "a", "b")))
    assert [status(each.log) for each in ended] == [200, 200, 429, 200]
    assert not any("|a" in limit.key for asked in scene.books.admissions for limit in asked.limits)


@pytest.mark.parametrize(
    "hold", [lambda order: order.n, up_to(lambda order: order.n, at_least=1)], ids=["all", "up-to"]
)
def test_hold_what_the_arguments_say(hold: Any, scene: Scene) -> None:
    """DESIGN "A hold's size": an estimate in whole units is computed from the arguments."""
    app = ordering(price=per_token(input=1, output=1), hold=hold)
    visit(installed(app, scene.metering, "added"), ask(7))
    assert scene.books.admissions[0].amount == 7 * CREDIT


@pytest.mark.parametrize("call_it", ["positional", "keyword", "defaults"])
def test_bind_arguments_however_they_come(call_it: str, scene: Scene) -> None:
    """DESIGN 2: arguments reach a policy by name whether passed by position, by keyword, or left to their defaults."""

    def price(n: int, scale: int, extra: int) -> int:
        return n * scale + extra

    @billable(price)
    async def work(n: int, scale: int = 2, **rest: int) -> None: ...

    @http_only
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if call_it == "positional":
            await work(3, 2, extra=1)
        elif call_it == "keyword":
            await work(n=3, scale=2, extra=1)
        else:
            await work(3, extra=1)
        await PlainTextResponse("ok")(scope, receive, send)

    (ended,) = visit(MeteringMiddleware(app, scene.metering), Visit())
    assert ended.exception is None
    assert scene.settled() == 7


def test_ask_at_an_exact_point_with_arguments(scene: Scene) -> None:
    """S4.6: the explicit gate hands its own keywords to the policy's callables, and names its line by `line=`."""

    async def endpoint(request: Request) -> PlainTextResponse:
        call: Call = current_call()
        await call.admit(billable(lambda n: n, line="exact"), rate_limited("5/day", cost=lambda n: n), n=3)
        return PlainTextResponse("ok")

    app = installed(Starlette(routes=[Route("/", endpoint)]), scene.metering, "added")
    ended = visit(app, Visit(), Visit())
    assert [status(each.log) for each in ended] == [200, 429]
    assert scene.books.admissions[0].line == "exact"
    assert scene.settled() == 3


class DownBooks(Books):
    """Books of a store that gives no answer."""

    def run_now(self, operation: Operation) -> Answer:
        raise StoreUnavailableError("It is down.")


LAYER_ANSWERS = list(itertools.product(("deny", "allow"), repeat=2))


@pytest.mark.parametrize(("money", "rates"), LAYER_ANSWERS)
def test_let_the_strictest_layer_answer_for_a_dead_store(money: str, rates: str) -> None:
    """X.6: with the store down a route is refused with 503 if any of its own layers denies, whichever that is."""
    metering = Metering(DownBooks(), identify=identify, sinks=(), on_store_down={"credits": money, "rates": rates})
    app = FastAPI()
    app.add_api_route("/paid", billable(PRICE)(unit_endpoint()))
    app.add_api_route("/counted", rate_limited("9/day")(unit_endpoint()))
    app.add_api_route("/both", rate_limited("9/day")(billable(PRICE)(unit_endpoint())))
    ended = visit(installed(app, metering, "added"), Visit("/paid"), Visit("/counted"), Visit("/both"))
    denied = (money == "deny", rates == "deny", "deny" in (money, rates))
    assert [status(each.log) for each in ended] == [503 if deny else 200 for deny in denied]


@pytest.mark.parametrize("identity", ["down", "wrong"])
def test_answer_503_when_nobody_can_say_who_calls(
    identity: str, scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    """DESIGN 2: a failing `identify` is 503 and logged, unless the route only counts by something else."""

    def identify(connection: Any) -> Any:
        if identity == "down":
            raise ConnectionError("directory down")
        return "ann"

    scene.metering._identify = identify
    app = FastAPI()
    app.add_api_route("/paid", billable(PRICE)(unit_endpoint()))
    for key in ("caller", "payer", "address"):
        app.add_api_route(f"/{key}", rate_limited("1/day", key=key)(unit_endpoint()))
    app.add_api_route("/computed", rate_limited("1/day", key=lambda: "all")(unit_endpoint()))
    paths = ("paid", "caller", "payer", "address", "address", "computed", "computed")
    ended = visit(installed(app, scene.metering, "wrapped"), *(Visit(f"/{path}") for path in paths))
    assert [status(each.log) for each in ended] == [503, 503, 503, 200, 429, 200, 429]
    assert {problem(each)["code"] for each in ended[:3]} == {"identity_unavailable"}
    (told,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert "identify()" in told.getMessage()
    assert told.exc_info is not None


def unit_endpoint() -> Callable[[], Awaitable[str]]:
    """A function of its own each time."""

    async def endpoint() -> str:
        return "ok"

    return endpoint


def test_ask_who_calls_once_and_only_where_it_matters(scene: Scene) -> None:
    """DESIGN 2: `identify` runs lazily, once per call, and never on an unmetered route."""
    asked: list[str] = []
    identify = scene.metering._identify
    assert identify is not None

    def counting(connection: Any) -> Any:
        asked.append(connection.url.path)
        return identify(connection)

    scene.metering._identify = counting
    app = FastAPI()
    app.add_api_route("/free", unit_endpoint())
    app.add_api_route("/paid", rate_limited("9/day", key="payer")(billable(PRICE)(unit_endpoint())))
    visit(installed(app, scene.metering, "added"), Visit("/free"), Visit("/paid"))
    assert asked == ["/paid"]


def test_report_usage_from_a_streaming_body(scene: Scene) -> None:
    """DESIGN 5: what a stream reports while it runs belongs to the call that was gated before it was made."""

    @billable(per_token(input=1, output=1), hold=9)
    async def endpoint(request: Request) -> StreamingResponse:
        async def parts() -> AsyncIterator[str]:
            yield "a"
            current_call().record(TokenUsage(input=2, output=2))
            yield "b"

        return StreamingResponse(parts())

    visit(installed(Starlette(routes=[Route("/", endpoint)]), scene.metering, "added"), Visit())
    assert scene.settled() == 4


def test_keep_concurrent_requests_apart(scene: Scene) -> None:
    """S2.44: calls that run at once in one loop each see their own payer, in async and in sync endpoints."""
    names = [f"payer-{n}" for n in range(12)]
    for name in names:
        scene.grant(name, 10)
    seen: dict[str, set[str | None]] = {name: set() for name in names}

    @billable(PRICE)
    async def slow(request: Request) -> PlainTextResponse:
        who = request.headers["x-api-key"]
        for _ in range(5):
            seen[who].add(current_call().payer)
            await asyncio.sleep(0)
        return PlainTextResponse("ok")

    @billable(PRICE)
    def quick(request: Request) -> PlainTextResponse:
        seen[request.headers["x-api-key"]].add(current_call().payer)
        return PlainTextResponse("ok")

    app = installed(Starlette(routes=[Route("/slow", slow), Route("/quick", quick)]), scene.metering, "added")

    async def story() -> None:
        visits = [Visit(path, caller=name) for name, path in itertools.product(names, ("/slow", "/quick"))]
        await asyncio.gather(*(drive(app, each.scope()) for each in visits))

    asyncio.run(story())
    assert seen == {name: {name} for name in names}
    assert {scene.settled(name) for name in names} == {2 * PRICE}

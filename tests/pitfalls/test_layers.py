"""The layers: what each enables alone, that stacked they share one call, and that without a policy nothing changes."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.endpoints import HTTPEndpoint
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import (
    FileResponse,
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asgi_metering import (
    Allowance,
    CreditGateMiddleware,
    Metering,
    MeteringMiddleware,
    QuotaCaptureMiddleware,
    RateLimitMiddleware,
    TokenUsage,
    UsageEventsMiddleware,
    billable,
    current_call,
    metered_app,
    rate_limited,
    up_to,
)
from asgi_metering.asgi.answers import AnswerOptions
from asgi_metering.billing import observed_parts
from asgi_metering.errors import ConfigurationError, NoCallError
from asgi_metering.metering import ALL_FEATURES
from asgi_metering.prices import per_token
from tests.harness.drive import assert_same_log, body, drive, headers, http_scope, lifespan, status
from tests.pitfalls.apps import HOW, How, installed
from tests.pitfalls.scene import POOR, Scene, Visit, field_of, http_only, visit

LAYERS = {
    "rates": RateLimitMiddleware,
    "credits": CreditGateMiddleware,
    "quotas": QuotaCaptureMiddleware,
    "events": UsageEventsMiddleware,
}
SUBSETS = [subset for size in range(len(LAYERS) + 1) for subset in itertools.combinations(sorted(LAYERS), size) if size]
ORDERS: dict[str, Callable[[tuple[str, ...]], tuple[str, ...]]] = {
    "up": lambda subset: subset,
    "down": lambda subset: subset[::-1],
    "turned": lambda subset: subset[len(subset) // 2 :] + subset[: len(subset) // 2],
}
PRICE = 2
QUOTA = {"x-ratelimit-limit-requests": "100", "x-ratelimit-remaining-requests": "7", "x-ratelimit-reset-requests": "1s"}


@rate_limited("2/day")
@billable(PRICE)
async def proxied(request: Request) -> JSONResponse:
    """An endpoint that every layer has something to do for: it passes a provider's quota fields on."""
    return JSONResponse({"n": 1}, headers=QUOTA)


def routed() -> Starlette:
    """An application with that endpoint."""
    return Starlette(routes=[Route("/", proxied)])


def with_layers(app: Starlette, metering: Metering, names: tuple[str, ...], **options: Any) -> Starlette:
    """*app* with layers added in this order: the last one is the outermost."""
    for name in names:
        app.add_middleware(LAYERS[name], metering=metering, **options)
    return app


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("subset", SUBSETS, ids="-".join)
def test_do_exactly_what_the_layers_enable(subset: tuple[str, ...], order: str) -> None:
    """X.1: of all subsets in several orders, what is enforced, captured and told is the layers' union (S4.16)."""
    scene = Scene(tells=True)
    app = with_layers(routed(), scene.metering, ORDERS[order](subset), unenforced="allow")
    ended = visit(app, Visit(), Visit(), Visit(), Visit(caller=POOR))
    rates, credits_, quotas, events = (name in subset for name in ("rates", "credits", "quotas", "events"))

    assert [status(each.log) for each in ended] == [200, 200, 429 if rates else 200, 402 if credits_ else 200]
    passed = sum(status(each.log) == 200 for each in ended)
    assert scene.settled() == (PRICE * (2 if rates else 3) if credits_ else 0)
    assert scene.settled(POOR) == 0
    for first in ended[:2]:
        names = {name for name, _ in headers(first.log)}
        assert ("ratelimit" in names) is rates
        assert ("metering-available" in names) is credits_
        assert ("x-ratelimit-limit-requests" in names) is not quotas
    assert bool(scene.metering.quotas.all()) is quotas
    assert len(scene.told) == (passed if events else 0)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("subset", SUBSETS, ids="-".join)
def test_share_one_admission_between_layers(subset: tuple[str, ...], order: str) -> None:
    """X.1: however many layers there are, a request is asked for at most once, and ended at most once."""
    scene = Scene(tells=True)
    app = with_layers(routed(), scene.metering, ORDERS[order](subset), unenforced="allow")
    visit(app, Visit())
    enforcing = bool({"rates", "credits"} & set(subset))
    assert len(scene.books.admissions) == (1 if enforcing else 0)
    assert len(scene.books.ends) == (1 if "credits" in subset else 0)
    assert len(scene.books.emitted) == (1 if "events" in subset and "credits" not in subset else 0)


@pytest.mark.parametrize("subset", [("rates",), ("events", "rates")], ids="-".join)
@pytest.mark.parametrize("price", [per_token(input=1, output=1), PRICE], ids=["measured", "fixed"])
def test_charge_nothing_without_the_gate(price: Any, subset: tuple[str, ...]) -> None:
    """S4.16: calls that only count, and whose holds are of tokens and slots alone, are charged nothing, ever."""
    scene, owed = Scene(tells=True), list[int]()

    @rate_limited("1000000/day of tokens", concurrency=2)
    @billable(price)
    async def endpoint(request: Request) -> StreamingResponse:
        call = current_call()
        call.record(TokenUsage(input=300, output=400))

        async def chunks() -> AsyncIterator[bytes]:
            yield b"so far."
            await asyncio.sleep(0)
            owed.append(await observed_parts(call))

        return StreamingResponse(chunks())

    app = with_layers(Starlette(routes=[Route("/", endpoint)]), scene.metering, subset, unenforced="allow")
    (ended,) = visit(app, Visit())
    assert (status(ended.log), body(ended.log)) == (200, b"so far.")
    # What its heartbeats tell, and a policy would charge.
    assert owed == [0]
    assert scene.settled() == 0
    assert [(event.amount, event.usage) for event in scene.told] == (
        [(0, TokenUsage(input=300, output=400))] if "events" in subset else []
    )


@pytest.mark.parametrize(
    "charge", [billable(per_token(input=1, output=1), hold=1), billable(PRICE)], ids=["measured", "fixed"]
)
def test_count_nothing_without_the_rate_limits(charge: Any, scene: Scene) -> None:
    """X.1: limits whose layer is absent count nobody, whatever else of the route is enforced."""

    @rate_limited("1/day", concurrency=1)
    @charge
    async def endpoint(request: Request) -> PlainTextResponse:
        return PlainTextResponse("paid")

    app = with_layers(Starlette(routes=[Route("/", endpoint)]), scene.metering, ("credits",), unenforced="allow")
    assert [status(each.log) for each in visit(app, Visit(), Visit())] == [200, 200]


def test_say_the_same_as_the_whole_stack(scene: Scene) -> None:
    """X.1: all four layers together answer and charge as `MeteringMiddleware` does."""
    whole, parts = Scene(), scene
    visits = (Visit(), Visit(), Visit(), Visit(caller=POOR))
    one = visit(installed(routed(), whole.metering, "added"), *visits)
    other = visit(with_layers(routed(), parts.metering, tuple(LAYERS)), *visits)
    for left, right in zip(one, other, strict=True):
        assert status(left.log) == status(right.log)
        assert [name for name, _ in headers(left.log)] == [name for name, _ in headers(right.log)]
    assert whole.settled() == parts.settled() == 2 * PRICE
    assert frozenset[str]().union(*(layer.features for layer in LAYERS.values())) == ALL_FEATURES


def test_fail_closed_without_any_layer(scene: Scene) -> None:
    """X.1: the empty subset of layers enforces nothing and lets nothing run."""
    (ended,) = visit(routed(), Visit())
    assert isinstance(ended.exception, NoCallError)


# -- layers that are missing or do not fit -----------------------------------------------------------------


async def refused_start(app: ASGIApp) -> str:
    """What the server is told when *app* does not start."""
    with pytest.raises(RuntimeError) as caught:
        async with lifespan(app):
            raise AssertionError("It started.")
    return str(caught.value)


@pytest.mark.parametrize(
    ("subset", "sentence"),
    [
        (("rates",), "is @billable, but no layer enforces credits. Add CreditGateMiddleware or MeteringMiddleware"),
        (("credits",), "is @rate_limited, but no layer enforces rates. Add RateLimitMiddleware or MeteringMiddleware"),
        (("events", "quotas"), "is @billable, but no layer enforces credits."),
    ],
    ids=["no-credits", "no-rates", "neither"],
)
def test_refuse_to_start_without_a_layer(subset: tuple[str, ...], sentence: str, scene: Scene) -> None:
    """X.1: a decorator whose layer is absent fails the startup, with the layer to add."""
    said = asyncio.run(refused_start(with_layers(routed(), scene.metering, subset)))
    assert sentence in said
    assert 'unenforced="allow"' in said
    assert "lifespan.startup.failed" in said


@pytest.mark.parametrize("how", ["mount", "around", "route", "class", "mounted-class", "partly"])
def test_refuse_to_start_wherever_the_policy_is(how: str, scene: Scene) -> None:
    """X.1: a missing layer is found for whole apps, class methods and apps behind other middleware as well."""

    class Endpoint(HTTPEndpoint):
        @billable(PRICE)
        async def get(self, request: Request) -> PlainTextResponse:
            raise AssertionError("It ran.")

    apps: dict[str, Callable[[], ASGIApp]] = {
        "mount": lambda: Starlette(routes=[Mount("/m", metered_app(nothing, billable(PRICE)))]),
        "around": lambda: metered_app(nothing, billable(PRICE)),
        "route": lambda: Starlette(routes=[Route("/m", metered_app(nothing, billable(PRICE)))]),
        "class": lambda: Starlette(routes=[Route("/m", Endpoint)]),
        "mounted-class": lambda: Starlette(routes=[Mount("/m", Endpoint)]),
        "partly": lambda: hiding(routed()),
    }
    said = asyncio.run(refused_start(RateLimitMiddleware(apps[how](), scene.metering)))
    assert "is @billable, but no layer enforces credits" in said


@http_only
async def nothing(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that nothing should reach."""
    raise AssertionError("It ran.")


def hiding(app: ASGIApp) -> ASGIApp:
    """A middleware that keeps its app where nobody can look."""

    async def hidden(scope: Scope, receive: Receive, send: Send) -> None:
        await app(scope, receive, send)

    return hidden


def test_refuse_a_request_whose_layer_is_missing_where_nothing_could_be_audited(scene: Scene, ran: list[str]) -> None:
    """X.1: where no route table can be walked the first request fails with the same sentence, and nothing runs."""

    @billable(PRICE)
    async def work() -> None:
        ran.append("work")

    @http_only
    async def plain(scope: Scope, receive: Receive, send: Send) -> None:
        await work()

    for layer, missing in ((RateLimitMiddleware, "credits"), (UsageEventsMiddleware, "credits")):
        (ended,) = visit(layer(plain, scene.metering), Visit())
        assert isinstance(ended.exception, ConfigurationError)
        assert f"no layer enforces {missing} here" in str(ended.exception)
    assert ran == []


@pytest.mark.parametrize("where", ["sub-app", "mount", "route"])
def test_see_the_layers_of_a_mounted_application(where: str, scene: Scene) -> None:
    """X.1: a layer that only a mounted application or one route has counts for what is behind it."""
    gate = Middleware(CreditGateMiddleware, metering=scene.metering)
    sub = Starlette(routes=[Route("/", proxied)], middleware=[gate] if where == "sub-app" else [])
    routes: dict[str, Any] = {
        "sub-app": [Mount("/m", sub)],
        "mount": [Mount("/m", sub, middleware=[gate])],
        "route": [Route("/m/", proxied, middleware=[gate])],
    }
    app = RateLimitMiddleware(Starlette(routes=routes[where]), scene.metering)
    ended = visit(app, Visit("/m/"), Visit("/m/", caller=POOR), Visit("/m/"), Visit("/m/"))
    assert [status(each.log) for each in ended] == [200, 402, 200, 429]
    assert scene.settled() == 2 * PRICE


@pytest.mark.parametrize("how", ["stacked", "wrapped", "sub-app", "plain"])
def test_refuse_to_start_with_two_meterings(how: str, scene: Scene) -> None:
    """DESIGN 2: two different `metering` objects in one stack fail at startup, with the mend."""
    other = Scene().metering
    apps: dict[str, Callable[[], ASGIApp]] = {
        "stacked": lambda: with_layers(with_layers(routed(), other, ("credits",)), scene.metering, ("rates",)),
        "wrapped": lambda: RateLimitMiddleware(with_layers(routed(), other, ("credits",)), scene.metering),
        "sub-app": lambda: RateLimitMiddleware(
            Starlette(routes=[Mount("/m", with_layers(routed(), other, ("credits",)))]), scene.metering
        ),
        "plain": lambda: RateLimitMiddleware(CreditGateMiddleware(nothing, other), scene.metering),
    }
    said = asyncio.run(refused_start(apps[how]()))
    assert "do not share one Metering" in said
    assert "pass the same object to all of them" in said


@pytest.mark.parametrize("says", [{"answers": AnswerOptions(caller_status=503)}, {"stop_on_disconnect": True}])
def test_refuse_to_start_with_layers_that_answer_differently(says: dict[str, Any], scene: Scene) -> None:
    """X.1: what an inner layer says and the outermost decides fails at startup, instead of meaning nothing."""
    inner = with_layers(routed(), scene.metering, ("rates",), **says)
    said = asyncio.run(refused_start(with_layers(inner, scene.metering, ("credits",))))
    assert "RateLimitMiddleware has answers= or stop_on_disconnect= of its own, and CreditGateMiddleware" in said
    same = with_layers(with_layers(routed(), scene.metering, ("rates",), **says), scene.metering, ("credits",), **says)
    outer = with_layers(with_layers(routed(), scene.metering, ("rates",)), scene.metering, ("credits",), **says)
    assert [status(ended.log) for app in (same, outer) for ended in visit(app, Visit())] == [200, 200]


def test_refuse_a_request_with_two_meterings_where_no_lifespan_came(scene: Scene) -> None:
    """DESIGN 2: where no lifespan came and the inner layer is hidden, the request meets the mistake, uncharged."""
    inner = CreditGateMiddleware(routed(), Scene().metering)

    async def hiding(scope: Scope, receive: Receive, send: Send) -> None:
        await inner(scope, receive, send)

    ended = asyncio.run(drive(RateLimitMiddleware(hiding, scene.metering), Visit().scope()))
    assert isinstance(ended.exception, ConfigurationError)
    assert "another Metering than the layer outside it" in str(ended.exception)


@pytest.mark.parametrize(
    ("decorate", "sentence"),
    [
        (billable("0.0000001"), "is finer than unit 'credits' counts"),
        (billable(10**12), "is more than unit 'credits' can count"),
        (billable(per_token(input=1), hold=up_to(1, at_least="0.0000001")), "The least hold '0.0000001' is finer"),
        (billable(1, sources=[Allowance({"free": 1, "pro": 10**12})]), "1000000000000 is more"),
    ],
    ids=["fine", "large", "least-hold", "allowance"],
)
def test_refuse_to_start_with_amounts_that_the_unit_cannot_count(
    decorate: Callable[[Any], Any], sentence: str, scene: Scene
) -> None:
    """DESIGN "Amounts": what only the metering's own unit can judge fails the startup, not the first paying request."""

    @decorate
    async def endpoint(request: Request) -> PlainTextResponse:
        raise AssertionError("It ran.")

    app = installed(Starlette(routes=[Route("/dear", endpoint)]), scene.metering, "added")
    said = asyncio.run(refused_start(app))
    assert "/dear (" in said
    assert sentence in said


def test_refuse_to_start_with_a_policy_inside_a_policy(scene: Scene) -> None:
    """Pitfall 8: a decorated route inside a metered app would fail on its first request, so it fails the startup."""
    app = Starlette(routes=[Mount("/m", metered_app(routed(), billable(1)))])
    said = asyncio.run(refused_start(installed(app, scene.metering, "added")))
    assert "proxied) is metered inside metered_app.Starlette, and a call is metered once" in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"metering": None}, "is no Metering. Make one"),
        ({"metering": "memory://"}, "metering='memory://' is no Metering"),
        ({"unenforced": "yes"}, "unenforced='yes' is not known. Use 'error' or 'allow'."),
        ({"unenforced": None}, "unenforced=None is not known"),
    ],
)
def test_refuse_layers_that_cannot_work(arguments: dict[str, Any], sentence: str, scene: Scene) -> None:
    """DESIGN 2: misuse of a layer fails when it is made, with a sentence that names the mend."""
    for layer in (MeteringMiddleware, *LAYERS.values()):
        with pytest.raises(ConfigurationError) as caught:
            layer(routed(), **{"metering": scene.metering, **arguments})
        assert sentence in str(caught.value)


def test_leave_a_failed_startup_to_the_app_that_failed(scene: Scene) -> None:
    """Pitfall 31: an app that cannot start says so itself, once, and the metering stops with it."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.failed", "message": "no database"})

    async def story() -> str:
        said = await refused_start(MeteringMiddleware(app, scene.metering))
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return said

    assert "no database" in asyncio.run(story())


def test_serve_an_app_whose_lifespan_raised(scene: Scene) -> None:
    """Pitfall 32: an app that raises at its lifespan is served by most servers; its calls are then ended inline."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await receive()
            raise RuntimeError("no lifespan here")
        await current_call().admit(PRICE)
        await PlainTextResponse("ok")(scope, receive, send)

    served = MeteringMiddleware(app, scene.metering)

    async def story() -> None:
        with pytest.raises(RuntimeError, match="no lifespan here"):
            async with lifespan(served):
                raise AssertionError("It started.")
        assert scene.metering.runtime().managed is False
        ended = await drive(served, Visit().scope())
        assert status(ended.log) == 200
        assert len(scene.books.ends) == 1

    asyncio.run(story())
    assert scene.settled() == PRICE


# -- S2.27: without a policy nothing changes ---------------------------------------------------------------


def corpus(directory: Path) -> Starlette:
    """Responses of every shape, none of them metered."""
    file = directory / "file.txt"
    file.write_bytes(b"contents" * 20_000)

    async def parts() -> AsyncIterator[bytes]:
        for n in range(5):
            yield b"part %d" % n

    async def as_json(request: Request) -> Response:
        return JSONResponse({"n": 1}, headers={"RateLimit": "own", "X-RateLimit-Remaining": "own"})

    async def stream(request: Request) -> Response:
        return StreamingResponse(parts(), media_type="text/event-stream")

    async def as_file(request: Request) -> Response:
        return FileResponse(file)

    async def background(request: Request) -> Response:
        return PlainTextResponse("ok", background=BackgroundTask(asyncio.sleep, 0))

    async def echoed(request: Request) -> Response:
        return Response(await request.body())

    async def quota(request: Request) -> Response:
        return JSONResponse({}, headers={"Set-Cookie": "a=b", **QUOTA})

    async def asking(request: Request) -> Response:
        return PlainTextResponse(str(current_call().admitted))

    async def broken(request: Request) -> Response:
        raise ValueError("broken")

    async def broken_stream(request: Request) -> Response:
        async def breaking() -> AsyncIterator[bytes]:
            yield b"one"
            raise ValueError("broken")

        return StreamingResponse(breaking())

    async def redirect(request: Request) -> Response:
        return RedirectResponse("/json")

    async def raw(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "trailers": True})
        await send({"type": "http.response.body", "body": b"1", "more_body": True})
        await send({"type": "http.response.body"})
        await send({"type": "http.response.trailers", "headers": [(b"x", b"y")]})

    async def pathsend(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.pathsend", "path": str(file)})

    async def silent(scope: Scope, receive: Receive, send: Send) -> None:
        return

    functions = {
        "json": as_json,
        "stream": stream,
        "file": as_file,
        "background": background,
        "echo": echoed,
        "quota": quota,
        "asking": asking,
        "broken": broken,
        "broken-stream": broken_stream,
        "redirect": redirect,
    }
    apps = {"raw": raw, "pathsend": pathsend, "silent": silent}
    routes: list[Any] = [Route(f"/{name}", function, methods=["GET", "POST"]) for name, function in functions.items()]
    return Starlette(routes=[*routes, *(Mount(f"/{name}", app) for name, app in apps.items())])


CORPUS = [
    ("GET", "/json"),
    ("HEAD", "/json"),
    ("OPTIONS", "/json"),
    ("DELETE", "/json"),
    ("GET", "/stream"),
    ("GET", "/file"),
    ("HEAD", "/file"),
    ("GET", "/background"),
    ("POST", "/echo"),
    ("GET", "/quota"),
    ("GET", "/broken"),
    ("GET", "/broken-stream"),
    ("GET", "/redirect"),
    ("GET", "/nowhere"),
    ("GET", "/raw/"),
    ("GET", "/pathsend/"),
    ("GET", "/silent/"),
]


@pytest.mark.parametrize("disconnect_at", [None, 2], ids=["whole", "gone"])
@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
@pytest.mark.parametrize(("method", "path"), CORPUS)
def test_change_no_byte_without_a_policy(
    method: str, path: str, spec_version: str, disconnect_at: int | None, tmp_path: Path
) -> None:
    """S2.27: every message, default keys spelled out, and the way the call ends are those of the bare application."""
    app = corpus(tmp_path)

    async def once(served: ASGIApp) -> Any:
        scope = http_scope(path, method, spec_version=spec_version, extensions={"http.response.pathsend": {}})
        scope["extensions"] = {} if path == "/file" else scope["extensions"]
        return await drive(served, scope, body=[b"one", b"two"], disconnect_at=disconnect_at)

    bare = asyncio.run(once(app))
    metering = Scene().metering
    stacks = [
        MeteringMiddleware(app, metering),
        MeteringMiddleware(MeteringMiddleware(app, metering), metering),
        RateLimitMiddleware(CreditGateMiddleware(app, metering), metering),
    ]
    for stack in stacks:
        ended = asyncio.run(once(stack))
        assert ended.log == bare.log
        assert_same_log(ended.delivered, bare.delivered)
        assert (ended.outcome, type(ended.exception)) == (bare.outcome, type(bare.exception))
        assert [message["type"] for message in ended.received] == [message["type"] for message in bare.received]


@pytest.mark.parametrize("how", HOW)
def test_change_no_byte_when_a_call_is_only_looked_at(how: How, tmp_path: Path, scene: Scene) -> None:
    """S2.27: an endpoint without a policy may ask `current_call`, and its response is still its own."""
    (bare,) = visit(installed(corpus(tmp_path), scene.metering, how), Visit("/asking"))
    assert (status(bare.log), body(bare.log)) == (200, b"False")
    assert [name for name, _ in headers(bare.log)] == ["content-length", "content-type"]
    assert scene.books.asked == []


@pytest.mark.parametrize("kind", ["lifespan", "unknown"])
def test_pass_other_scopes_untouched(kind: str, scene: Scene) -> None:
    """X.4: scopes that nobody knows reach the app with the server's own callables."""
    seen: list[tuple[Any, Any]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append((receive, send))

    async def receive() -> Message:
        raise AssertionError("It read.")

    async def send(message: Message) -> None:
        raise AssertionError("It sent.")

    if kind == "lifespan":
        visit(MeteringMiddleware(app, scene.metering))
        assert len(seen) == 1
        return
    asyncio.run(MeteringMiddleware(app, scene.metering)({"type": "mqtt"}, receive, send))
    assert seen == [(receive, send)]


def test_log_nothing_on_an_unmetered_application(
    scene: Scene, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """S2.27: an application without a policy starts, serves and stops without a word of ours."""
    app = installed(corpus(tmp_path), scene.metering, "added")
    (ended,) = visit(app, Visit("/json"))
    assert field_of(ended, "ratelimit") == "own"
    ours = [record for record in caplog.records if record.name.startswith("asgi_metering")]
    # The audit knows of this module's other endpoints.
    assert [each for each in ours if each.levelno > logging.DEBUG and "no route reaches it" not in each.msg] == []
    assert scene.books.asked == []

"""WebSockets at the gate and in the audit: what is decorated how, what cannot work, and what is said of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import Depends, FastAPI, WebSocket
from starlette.applications import Starlette
from starlette.endpoints import WebSocketEndpoint
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.types import ASGIApp

from asgi_metering import (
    Idempotency,
    Metering,
    MeteringMiddleware,
    RateLimitMiddleware,
    TokenUsage,
    billable,
    current_call,
    metered_app,
    rate_limited,
    slices,
    up_to,
)
from asgi_metering.asgi.audit import audit
from asgi_metering.errors import ConfigurationError, NoCallError
from asgi_metering.metering import ALL_FEATURES
from asgi_metering.opening import CURRENT, Opening
from asgi_metering.prices import per_token
from asgi_metering.testing import unmetered
from tests.harness.drive import drive, lifespan, status, websocket_scope
from tests.pitfalls.apps import HOW, PRICE, How, installed
from tests.pitfalls.scene import Scene, Visit, visit
from tests.pitfalls.test_startup import refused

ONLY_WEBSOCKETS = (
    'is charged or limited per="message" or per="second", which only WebSockets are. Leave per= out: an HTTP request '
    "is one call."
)
NO_BODY = (
    "has idempotency=, and a WebSocket has neither a body nor an answer that could be repeated. Leave it out; "
    "charge_key= counts several connections once."
)


def new_talk() -> Any:
    """An endpoint that lets everybody in; a new one each time, since decorating a function leaves its trace on it."""

    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()

    return talk


def in_starlette() -> ASGIApp:
    """A route of Starlette's."""
    return Starlette(routes=[WebSocketRoute("/ws", billable(PRICE)(new_talk()))])


def in_fastapi() -> ASGIApp:
    """The same in FastAPI, limited instead of priced."""
    app = FastAPI()
    app.websocket("/ws")(rate_limited("1/day")(new_talk()))
    return app


def in_class() -> ASGIApp:
    """A method of a class, which is the endpoint."""

    class Talk(WebSocketEndpoint):
        encoding = "text"

        @billable(PRICE)
        async def on_connect(self, websocket: WebSocket) -> None:
            await websocket.accept()

    return Starlette(routes=[WebSocketRoute("/ws", Talk)])


def in_mount() -> ASGIApp:
    """A route of an application that is mounted."""
    return Starlette(routes=[Mount("/", app=in_starlette())])


def with_parameters() -> ASGIApp:
    """An endpoint that names its connection otherwise, and has it behind another argument."""
    app = FastAPI()

    @app.websocket("/ws")
    @billable(PRICE)
    async def chat(topic: str = "all", *, connection: WebSocket) -> None:
        await new_talk()(connection)

    return app


DECORATED: dict[str, Callable[[], ASGIApp]] = {
    "starlette": in_starlette,
    "fastapi": in_fastapi,
    "class": in_class,
    "mount": in_mount,
    "parameters": with_parameters,
}


async def said(app: ASGIApp, **scope: Any) -> tuple[list[str], BaseException | None]:
    """What the server hears of one connection by ann."""
    headers = [("x-api-key", "ann")]
    script = [{"type": "websocket.connect"}, {"type": "websocket.disconnect", "code": 1000}]
    called = await drive(app, websocket_scope("/ws", headers=headers, **scope), messages=script)
    return [message["type"] for message in called.log], called.exception


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("build", DECORATED)
def test_let_a_caller_in_to_a_decorated_websocket(build: str, how: How, scene: Scene) -> None:
    """Every way to decorate an endpoint is one admission of one caller, wherever the middleware stands."""
    app = installed(DECORATED[build](), scene.metering, how)

    async def story() -> None:
        async with lifespan(app):
            assert (await said(app))[0][0] == "websocket.accept"

    asyncio.run(story())
    (asked,) = scene.books.admissions
    assert asked.amount == (0 if build == "fastapi" else PRICE * 1_000_000)


def test_refuse_to_start_with_decorators_above_a_websocket(scene: Scene) -> None:
    """Pitfall 4: decorators above the route's own would never see a connection."""
    app = FastAPI()

    @billable(PRICE)
    @app.websocket("/ws")
    async def chat(websocket: WebSocket) -> None: ...

    assert refused(installed(app, scene.metering, "added")).endswith(
        "ungated: its metering decorators stand above the route's own. Put them below it."
    )


@pytest.mark.parametrize("around", [None, "request"])
@pytest.mark.parametrize("build", DECORATED)
def test_let_nobody_in_without_a_middleware(build: str, around: Any, scene: Scene) -> None:
    """Pitfall 3: the gate fails closed, whatever call the context may show, and nothing is accepted."""
    app = DECORATED[build]()

    async def story() -> None:
        if around == "request":
            CURRENT.set(Opening(scene.metering, ALL_FEATURES))
        kinds, failure = await said(app)
        assert isinstance(failure, NoCallError)
        assert "websocket.accept" not in kinds

    asyncio.run(story())
    assert scene.books.admissions == []


@pytest.mark.parametrize("build", DECORATED)
def test_run_a_websocket_alone_in_a_unit_test(build: str) -> None:
    """`unmetered` lets an endpoint run without a middleware, as it does of HTTP."""
    with unmetered():
        kinds, failure = asyncio.run(said(DECORATED[build]()))
    assert kinds[0] == "websocket.accept"
    assert failure is None


def test_charge_inside_a_websocket(scene: Scene) -> None:
    """Work inside of an undecorated WebSocket has its own price with `metering.charge`."""

    async def paid(websocket: WebSocket) -> None:
        await websocket.accept()
        async with scene.metering.charge(payer="ann", line="message", price=2):
            await websocket.send_text("done")
        await websocket.close()

    app = installed(Starlette(routes=[WebSocketRoute("/ws", paid)]), scene.metering, "added")

    async def story() -> list[str]:
        async with lifespan(app):
            return (await said(app))[0]

    assert asyncio.run(story()) == ["websocket.accept", "websocket.send", "websocket.close"]
    assert scene.settled() == 2


# -- what means nothing here, or there ---------------------------------------------------------------------


async def page(request: Any) -> Any:
    """An endpoint of HTTP."""


PER_MESSAGE = {
    "charge": lambda: billable(1, per="message"),
    "second": lambda: billable(1, per="second"),
    "limit": lambda: rate_limited("1/day", per="message"),
}


@pytest.mark.parametrize("part", PER_MESSAGE)
def test_refuse_a_price_per_message_of_a_request(part: str, scene: Scene) -> None:
    """At startup, by name and with the mend, on a route and in a metered application."""
    decorated = PER_MESSAGE[part]()(lambda request: page(request))
    told = refused(installed(Starlette(routes=[Route("/", decorated)]), scene.metering, "added"))
    assert told.startswith("/ (")
    assert told.endswith(f") {ONLY_WEBSOCKETS}")
    inner = metered_app(Starlette(routes=[Route("/page", page)]), PER_MESSAGE[part](), name="inner")
    told = refused(installed(Starlette(routes=[Mount("/sub", app=inner)]), scene.metering, "added"))
    assert told == f"/sub/page is inside inner, which {ONLY_WEBSOCKETS}"


def test_refuse_a_price_per_message_at_the_gate_of_a_request(scene: Scene) -> None:
    """The same where no route table can be read, before anything is asked."""

    async def plain(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("The application ran.")

    app = MeteringMiddleware(metered_app(plain, billable(1, per="message"), name="plain"), scene.metering)
    (ended,) = visit(app, Visit())
    assert isinstance(ended.exception, ConfigurationError)
    assert str(ended.exception) == f"plain {ONLY_WEBSOCKETS}"
    assert scene.books.admissions == []


def test_refuse_idempotency_of_a_websocket(scene: Scene) -> None:
    """A WebSocket has no body to fingerprint and no answer to repeat: at startup, and at the gate."""
    endpoint = billable(2, idempotency=Idempotency())(new_talk())
    app = Starlette(routes=[WebSocketRoute("/ws", endpoint)])
    told = refused(installed(app, scene.metering, "wrapped"))
    assert told.endswith(f") {NO_BODY}")

    async def plain(scope: Any, receive: Any, send: Any) -> None: ...

    hidden = MeteringMiddleware(metered_app(plain, billable(2, idempotency=True), name="plain"), scene.metering)
    _, failure = asyncio.run(said(hidden))
    assert isinstance(failure, ConfigurationError)
    assert str(failure) == f"plain {NO_BODY}"


@pytest.mark.parametrize("method", ["on_receive", "on_disconnect"])
def test_refuse_decorators_on_what_is_called_for_each_message(method: str, scene: Scene) -> None:
    """`on_receive` runs when its connection was let in long ago: the audit says where a price per message goes."""

    class Talk(WebSocketEndpoint):
        async def on_receive(self, websocket: WebSocket, data: Any) -> None: ...

        async def on_disconnect(self, websocket: WebSocket, close_code: int) -> None: ...

    setattr(Talk, method, billable(PRICE)(getattr(Talk, method)))
    told = refused(installed(Starlette(routes=[WebSocketRoute("/ws", Talk)]), scene.metering, "added"))
    assert told.endswith('Decorate on_connect, or dispatch, and write per="message" for each message.')


def test_take_a_function_of_that_name_for_an_endpoint(scene: Scene) -> None:
    """A function that is called `on_receive` is an endpoint as any other."""

    @billable(PRICE)
    async def on_receive(websocket: WebSocket) -> None: ...

    report = audit(Starlette(routes=[WebSocketRoute("/ws", on_receive)]), ALL_FEATURES, frozenset())
    assert report.errors == []


def _layer(**options: Any) -> Any:
    return MeteringMiddleware(Starlette(), Metering(sinks=()), **options)


MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    "unknown-per": (lambda: billable(1, per="token"), "billable(per='token') is not known."),
    "unknown-limit": (lambda: rate_limited("1/day", per="second"), "rate_limited(per='second') is not known."),
    "measured": (lambda: billable(per_token(output=1), per="message"), "is measured by what a call uses"),
    "key": (lambda: billable(1, per="message", charge_key="x-session"), "charge_key= and idempotency= count calls"),
    "once": (lambda: billable(1, per="second", idempotency=True), "charge_key= and idempotency= count calls"),
    "hold": (lambda: billable(1, per="message", hold="5"), "Write hold=slices('0.5'), say"),
    "up-to": (lambda: billable(1, per="message", hold=up_to(at_least=1)), "Write hold=slices('0.5'), say"),
    "tokens": (lambda: billable(1, per="message", hold=slices(TokenUsage(output=1))), "it grows by amounts"),
    "computed": (lambda: billable(1, per="message", hold=slices(lambda: 1)), "it grows by amounts"),
    "steps": (lambda: billable(1, per="second", hold=slices(1, step=TokenUsage(output=1))), "it grows by amounts"),
    "empty-slice": (lambda: billable(1, per="second", hold=slices(0)), "slices(first=0) holds nothing"),
    "high-mark": (lambda: billable(1, per="second", hold=slices(2, low_water=2)), "is no less than first=2"),
    "slots": (lambda: rate_limited("1/day", per="message", concurrency=1), "A message takes no slot"),
    "pool": (lambda: rate_limited("1/day", per="message", global_concurrency=1), "A message takes no slot"),
    "weighed": (lambda: rate_limited("9/day of tokens", per="message"), 'messages are counted per="message"'),
    "flat": (lambda: _layer(application_limits=[rate_limited("1/day", per="message")]), "Limits of a middleware count"),
    "by-plan": (
        lambda: rate_limited({"free": "1/day of tokens"}, per="message"),
        'messages are counted per="message"',
    ),
    "excess": (lambda: rate_limited("1/day", per="message", on_excess="ignore"), "on_excess='ignore' is not known."),
    "excess-of-calls": (lambda: rate_limited("1/day", on_excess="drop"), 'Write per="message" as well.'),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_refuse_at_import_what_no_session_can_have(mistake: str) -> None:
    """DESIGN 2: misuse fails at import, with a sentence that says what can be had instead."""
    build, words = MISTAKES[mistake]
    with pytest.raises(ConfigurationError) as refusal:
        build()
    assert words in str(refusal.value)


def test_count_connections_and_messages_apart() -> None:
    """The same limit for connections and for their messages is two limits; of one scope it is one, and a mistake."""
    rate_limited("5/day", per="message")(rate_limited("5/day")(new_talk()))
    with pytest.raises(ConfigurationError, match="twice"):
        rate_limited("5/day", per="message", scope="s")(rate_limited("5/day", scope="s")(new_talk()))


# -- the audit ---------------------------------------------------------------------------------------------


def of_websockets(warnings: list[str]) -> list[str]:
    """Those that are not of endpoints that another test has left behind."""
    return [warning for warning in warnings if "WebSocket" in warning]


def test_list_websockets_beside_routes() -> None:
    """WebSockets are listed as such, one line each, with their policy, and are no mistake."""

    class Plain(WebSocketEndpoint):
        encoding = "text"

    app = Starlette(
        routes=[Route("/", page), WebSocketRoute("/ws", billable(1)(new_talk())), WebSocketRoute("/plain", Plain)],
    )
    report = audit(app, ALL_FEATURES, frozenset(), Metering(sinks=()))
    assert [(row.path, row.methods, row.policy is not None) for row in report.rows] == [
        ("/", ("GET", "HEAD"), False),
        ("/ws", ("WEBSOCKET",), True),
        ("/plain", ("WEBSOCKET",), False),
    ]
    assert (report.errors, of_websockets(report.warnings)) == ([], [])


def test_meter_the_websockets_of_a_metered_app(scene: Scene) -> None:
    """A WebSocket inside of `metered_app` pays as its requests do, and needs no word of the audit."""
    inner = Starlette(routes=[Route("/", page), WebSocketRoute("/ws", new_talk())])
    app = Starlette(routes=[Mount("/", app=metered_app(inner, billable(PRICE), name="inner"))])
    report = audit(app, ALL_FEATURES, frozenset(), Metering(sinks=()))
    assert (report.errors, of_websockets(report.warnings)) == ([], [])

    async def story() -> None:
        served = installed(app, scene.metering, "added")
        async with lifespan(served):
            assert (await said(served))[0] == ["websocket.accept", "websocket.close"]

    asyncio.run(story())
    assert scene.settled() == PRICE


def test_refuse_what_is_metered_twice() -> None:
    """A decorated WebSocket inside of a metered app, and one that has a decorated dependency, are mistakes."""
    inner = Starlette(routes=[WebSocketRoute("/ws", billable(1)(new_talk()))])
    app = Starlette(routes=[Mount("/", app=metered_app(inner, billable(PRICE), name="inner"))])
    (error,) = audit(app, ALL_FEATURES, frozenset()).errors
    assert "is metered inside inner" in error

    @billable(1)
    async def paid() -> None: ...

    both = FastAPI()
    both.websocket("/ws", dependencies=[Depends(paid)])(billable(1)(new_talk()))
    (error,) = audit(both, ALL_FEATURES, frozenset()).errors
    assert "a call is metered once" in error


def test_refuse_a_websocket_whose_layer_is_absent(scene: Scene) -> None:
    """A layer that is not there enforces nothing of a WebSocket either, and the application does not start."""
    told = refused(RateLimitMiddleware(in_starlette(), scene.metering))
    assert "is @billable, but no layer enforces credits." in told


@pytest.mark.parametrize("layers", ["rates", "both"])
def test_meter_websockets_by_layers(layers: str, scene: Scene) -> None:
    """Stacked layers share one call of a WebSocket; one alone enforces what is its own."""
    from asgi_metering import CreditGateMiddleware

    app: Any = Starlette(
        routes=[WebSocketRoute("/ws", rate_limited("1/day", per="message")(rate_limited("1/day")(new_talk())))]
    )
    if layers == "both":
        app = CreditGateMiddleware(app, scene.metering)
    stack = RateLimitMiddleware(app, scene.metering)

    async def story() -> None:
        async with lifespan(stack):
            assert (await said(stack))[0] == ["websocket.accept", "websocket.close"]
            assert (await said(stack))[0] == ["websocket.close"]

    asyncio.run(story())
    assert [len(asked.limits) for asked in scene.books.admissions] == [1, 1]


def test_answer_requests_of_a_metered_app_with_websockets(scene: Scene) -> None:
    """HTTP beside WebSockets is as it was."""

    async def hello(request: Any) -> Any:
        from starlette.responses import PlainTextResponse

        assert current_call().held == PRICE * 1_000_000
        return PlainTextResponse("hello")

    inner = Starlette(routes=[Route("/", hello), WebSocketRoute("/ws", new_talk())])
    app = metered_app(inner, billable(PRICE), name="inner")
    (ended,) = visit(MeteringMiddleware(app, scene.metering), Visit())
    assert status(ended.log) == 200

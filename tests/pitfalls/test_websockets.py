"""WebSockets, which are not metered yet: what is decorated lets nobody in, and the audit says so before."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI, WebSocket
from starlette.applications import Starlette
from starlette.endpoints import WebSocketEndpoint
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.types import ASGIApp

from asgi_metering import Metering, billable, metered_app, rate_limited
from asgi_metering.asgi.audit import audit
from asgi_metering.errors import NoCallError
from asgi_metering.metering import ALL_FEATURES
from asgi_metering.opening import CURRENT, Opening
from asgi_metering.testing.unmetered import unmetered
from tests.harness.drive import drive, lifespan, websocket_scope
from tests.pitfalls.apps import HOW, PRICE, How, installed
from tests.pitfalls.scene import Scene
from tests.pitfalls.test_startup import refused

MEND = "Take the metering decorators off, and charge for its work inside it with metering.charge()."


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


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("build", DECORATED)
def test_refuse_to_start_with_a_decorated_websocket(build: str, how: How, scene: Scene) -> None:
    """DESIGN 2: what cannot work fails at startup, in one sentence that says that WebSockets are not metered yet."""
    told = refused(installed(DECORATED[build](), scene.metering, how))
    assert told.startswith("/ws (tests.pitfalls.test_websockets.")
    assert told.endswith(f") is a WebSocket, and WebSockets are not metered yet. {MEND}")
    assert "\n" not in told


def test_refuse_to_start_with_decorators_above_a_websocket(scene: Scene) -> None:
    """Pitfall 4: the sentence does not send the decorators below the route's own, where the next one would wait."""
    app = FastAPI()

    @billable(PRICE)
    @app.websocket("/ws")
    async def chat(websocket: WebSocket) -> None: ...

    assert refused(installed(app, scene.metering, "added")).endswith(
        f"is a WebSocket, and WebSockets are not metered yet. {MEND}"
    )


@pytest.mark.parametrize("around", [None, unmetered, "request"])
@pytest.mark.parametrize("build", DECORATED)
def test_let_nobody_in_to_a_decorated_websocket(build: str, around: Any, scene: Scene) -> None:
    """Pitfall 3: without a startup the gate fails closed, whatever call the context shows, and nothing is accepted."""
    app = installed(DECORATED[build](), scene.metering, "added")

    async def story() -> list[str]:
        if around == "request":
            CURRENT.set(Opening(scene.metering, ALL_FEATURES))
        called = await drive(app, websocket_scope("/ws"), messages=[{"type": "websocket.connect"}])
        assert isinstance(called.exception, NoCallError)
        assert "is metered, but WebSockets are not metered yet, so nobody is let in. " + MEND in str(called.exception)
        return [message["type"] for message in called.log]

    if around is unmetered:
        with unmetered():
            said = asyncio.run(story())
    else:
        said = asyncio.run(story())
    assert "websocket.accept" not in said
    assert scene.books.admissions == []


def test_charge_inside_a_websocket(scene: Scene) -> None:
    """The mend works: an undecorated WebSocket passes untouched, and charges for what it does by itself."""

    async def paid(websocket: WebSocket) -> None:
        await websocket.accept()
        async with scene.metering.charge(payer="ann", line="message", price=2):
            await websocket.send_text("done")
        await websocket.close()

    app = installed(Starlette(routes=[WebSocketRoute("/ws", paid)]), scene.metering, "added")

    async def story() -> list[str]:
        async with lifespan(app):
            called = await drive(app, websocket_scope("/ws"), messages=[{"type": "websocket.connect"}])
        return [message["type"] for message in called.log]

    assert asyncio.run(story()) == ["websocket.accept", "websocket.send", "websocket.close"]
    assert scene.settled() == 2


def of_websockets(warnings: list[str]) -> list[str]:
    """Those that are not of endpoints that another test has left behind."""
    return [warning for warning in warnings if "WebSocket" in warning]


async def page(request: Any) -> None:
    """An endpoint of HTTP."""


def test_list_websockets_beside_routes() -> None:
    """Undecorated WebSockets are listed as such, one line each, and are no mistake."""

    class Plain(WebSocketEndpoint):
        encoding = "text"

    app = Starlette(
        routes=[Route("/", page), WebSocketRoute("/ws", new_talk()), WebSocketRoute("/plain", Plain)],
    )
    report = audit(app, ALL_FEATURES, frozenset(), Metering(sinks=()))
    assert [(row.path, row.methods) for row in report.rows] == [
        ("/", ("GET", "HEAD")),
        ("/ws", ("WEBSOCKET",)),
        ("/plain", ("WEBSOCKET",)),
    ]
    assert (report.errors, of_websockets(report.warnings)) == ([], [])


def test_warn_of_websockets_in_a_metered_app() -> None:
    """A WebSocket inside `metered_app` is free, which is said: a person may think that the app pays for it."""
    inner = Starlette(routes=[Route("/", page), WebSocketRoute("/ws", new_talk())])
    app = Starlette(routes=[Mount("/sub", app=metered_app(inner, billable(PRICE), name="inner"))])
    report = audit(app, ALL_FEATURES, frozenset(), Metering(sinks=()))
    assert report.errors == []
    (warning,) = of_websockets(report.warnings)
    assert warning == (
        "/sub/ws is a WebSocket inside inner, which lets WebSockets through unmetered. Charge for its work inside it "
        "with metering.charge()."
    )


def test_refuse_a_metered_app_as_a_websocket() -> None:
    """A `metered_app` that is a WebSocket's own endpoint would be free behind its price, so it is an error."""
    app = Starlette(routes=[WebSocketRoute("/ws", metered_app(in_starlette(), billable(PRICE), name="inner"))])
    report = audit(app, ALL_FEATURES, frozenset(), Metering(sinks=()))
    assert f"/ws (inner) is a WebSocket, and WebSockets are not metered yet. {MEND}" in report.errors

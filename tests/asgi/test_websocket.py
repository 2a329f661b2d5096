"""WebSockets: who is let in, what passes, what each message or second costs, and how a session ends (DESIGN 7, X.4)."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fastapi import Depends, FastAPI
from starlette.applications import Starlette
from starlette.endpoints import WebSocketEndpoint
from starlette.routing import Mount, WebSocketRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from asgi_metering import (
    Call,
    CallCut,
    CallRefused,
    Caller,
    Metering,
    MeteringMiddleware,
    RateLimitMiddleware,
    TokenUsage,
    billable,
    current_call,
    metered_app,
    rate_limited,
    slices,
)
from asgi_metering.asgi import cutting
from asgi_metering.errors import CallClosedError, ConfigurationError, StoreUnavailableError
from asgi_metering.events.sinks import CallbackSink
from asgi_metering.prices import per_token
from asgi_metering.receipts import Entry, EntryKind
from asgi_metering.rules.conservation import discrepancies
from asgi_metering.rules.decide import Answer
from asgi_metering.rules.operations import Admit, Grow, Operation
from asgi_metering.stores.contract import AccountRows
from asgi_metering.stores.memory import MemoryStore
from tests.harness.drive import assert_same_log, lifespan
from tests.harness.sockets import DENIAL, Socket
from tests.pitfalls.scene import Books

CREDIT = 1_000_000
ANN = [("x-api-key", "ann")]


def who(connection: Any) -> Caller | None:
    """The key names the caller; it stands in a header field, or in the query."""
    key = connection.headers.get("x-api-key") or connection.query_params.get("key")
    return Caller(key, exempt=key == "probe") if key else None


class Served:
    """
    An application behind the middleware, and ann's books.

    Attributes:
        metering, app: The two.
        events: What the sink was told.
    """

    def __init__(self, app: ASGIApp, metering: Metering, events: list[Any]) -> None:
        self.metering = metering
        self.app: ASGIApp = MeteringMiddleware(app, metering=metering)  # type: ignore[assignment]
        self.events = events

    def socket(self, *, key: str | None = "ann", **options: Any) -> Socket:
        """A connection of this caller."""
        headers = [("x-api-key", key)] if key else []
        return Socket(self.app, headers=[*headers, *options.pop("headers", [])], **options)

    async def books(self) -> tuple[int, int]:
        """What ann has spent and holds, in credits, once nothing is in flight or waits to be booked."""
        runtime = self.metering.runtime()
        async with asyncio.timeout(10):
            while runtime.in_flight or runtime.busy:
                await asyncio.sleep(0)
        return await self.account()

    async def account(self) -> tuple[int, int]:
        """The same now; the sums are proven."""
        _, rows = await self.metering.store.read(AccountRows("ann", "credits"))
        key = ("ann", "credits")
        grants = [*rows.grants.get(key, {}).values(), *rows.closed_grants.get(key, {}).values()]
        assert discrepancies(rows.accounts[key], grants, rows.holds.values()) == []
        balance = await self.metering.balance("ann")
        return balance.settled // CREDIT, balance.held // CREDIT

    async def charges(self) -> list[tuple[str, int]]:
        """Basis and credits of each of ann's charges."""
        entries: list[Entry] = [entry async for entry in self.metering.statement("ann")]
        return [(str(entry.basis), entry.amount // CREDIT) for entry in entries if entry.kind is not EntryKind.GRANT]


@asynccontextmanager
async def served(endpoint: Any, *, credits: int = 100, **options: Any) -> AsyncIterator[Served]:
    """
    Serve *endpoint* at ``/ws`` with its lifespan around it.

    Args:
        endpoint: Of a `WebSocketRoute`, or a whole application.
        credits: What ann has.
        options: Of the `Metering`.
    """
    events: list[Any] = []
    metering = Metering(**{"store": "memory://", "identify": who, "sinks": [CallbackSink(events.extend)], **options})
    app = endpoint if hasattr(endpoint, "routes") else Starlette(routes=[WebSocketRoute("/ws", endpoint)])
    scene = Served(app, metering, events)
    async with lifespan(scene.app):
        if credits:
            await metering.grant("ann", credits, id="g")
        yield scene


def echo(*decorators: Any, ran: list[str] | None = None) -> Any:
    """A new endpoint that says everything back, decorated so."""

    async def talk(websocket: WebSocket) -> None:
        if ran is not None:
            ran.append("ran")
        await websocket.accept()
        async for text in websocket.iter_text():
            await websocket.send_text(f"{text}!")

    for decorate in reversed(decorators):
        talk = decorate(talk)
    return talk


def play(story: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run *story*."""
    asyncio.run(story())


# -- what passes -------------------------------------------------------------------------------------------


SUBPROTOCOLS = {"subprotocols": ["v2", "v1"], "headers": [("origin", "https://example.com"), *ANN], "query": "room=1"}


async def raw(scope: Scope, receive: Receive, send: Send) -> None:
    """An application of everything that a WebSocket may be sent."""
    assert (await receive())["type"] == "websocket.connect"
    chosen = scope["subprotocols"][0]
    await send({"type": "websocket.accept", "subprotocol": chosen, "headers": [(b"x-own", b"1")]})
    while (message := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "bytes": b"\x00" + (message.get("text") or "").encode()})
    await send({"type": "websocket.send", "text": repr(message["code"])})


@pytest.mark.parametrize(
    "metered", [(), (billable(2),), (billable(1, per="message"), rate_limited("9/minute", per="message"))]
)
def test_pass_every_message_unchanged(metered: tuple[Any, ...]) -> None:
    """S2.27: with and without a price the server hears what it hears of the bare application, and so does that."""

    async def talk(app: ASGIApp) -> Socket:
        async with Socket(app, **SUBPROTOCOLS) as socket:
            socket.say("a", "", "c")
            await socket.until(lambda: len(socket.log) == 4)
            socket._inbox.put_nowait({"type": "websocket.disconnect", "code": 1000, "reason": None})
        assert socket.failure is None
        return socket

    async def story() -> None:
        app = metered_app(raw, *metered) if metered else raw
        bare = await talk(raw)
        async with served(Starlette(routes=[Mount("/", app=app)])) as scene:
            behind = await talk(scene.app)
            assert_same_log(behind.log, bare.log)
            assert behind.read == bare.read
            assert await scene.books() == ({(): 0, 1: 2, 2: 3}[len(metered) or ()], 0)  # type: ignore[index]

    play(story)


def test_open_nothing_for_an_undecorated_websocket() -> None:
    """X.4: what is not decorated makes no call, and asks the store for nothing."""

    async def story() -> None:
        books = Books()
        async with served(echo(), store=books) as scene:
            asked = len(books.asked)
            async with scene.socket(key=None) as socket:
                socket.say("a")
                assert await socket.heard(1) == ["a!"]
                socket.leave()
            assert len(books.asked) == asked
            assert scene.events == []

    play(story)


# -- who is let in -----------------------------------------------------------------------------------------


def in_fastapi(*decorators: Any, ran: list[str] | None = None) -> FastAPI:
    """The same endpoint on FastAPI."""
    app = FastAPI()
    app.websocket("/ws")(echo(*decorators, ran=ran))
    return app


def in_class(*decorators: Any, ran: list[str] | None = None) -> Starlette:
    """A class of Starlette's, whose `on_connect` is decorated."""

    class Talk(WebSocketEndpoint):
        encoding = "text"

        async def on_connect(self, websocket: WebSocket) -> None:
            if ran is not None:
                ran.append("ran")
            await websocket.accept()

        async def on_receive(self, websocket: WebSocket, data: str) -> None:
            await websocket.send_text(f"{data}!")

    for decorate in reversed(decorators):
        Talk.on_connect = decorate(Talk.on_connect)  # type: ignore[method-assign]
    return Starlette(routes=[WebSocketRoute("/ws", Talk)])


def in_dispatch(*decorators: Any, ran: list[str] | None = None) -> Starlette:
    """The same, with its `dispatch` decorated."""
    app = in_class(ran=ran)
    (route,) = app.routes
    assert isinstance(route, WebSocketRoute)
    talk: Any = route.endpoint
    talk.dispatch = WebSocketEndpoint.dispatch
    for decorate in reversed(decorators):

        async def dispatch(self: Any) -> None:
            await WebSocketEndpoint.dispatch(self)

        talk.dispatch = decorate(dispatch if talk.dispatch is WebSocketEndpoint.dispatch else talk.dispatch)
    return app


def in_metered_app(*decorators: Any, ran: list[str] | None = None) -> Starlette:
    """A whole application, mounted."""
    inner = Starlette(routes=[WebSocketRoute("/ws", echo(ran=ran))])
    return Starlette(routes=[Mount("/", app=metered_app(inner, *decorators))])


def in_dependency(*decorators: Any, ran: list[str] | None = None) -> FastAPI:
    """A dependency of FastAPI's that is decorated."""

    async def paid(websocket: WebSocket) -> None: ...

    for decorate in reversed(decorators):
        paid = decorate(paid)
    app = FastAPI()
    app.websocket("/ws", dependencies=[Depends(paid)])(echo(ran=ran))
    return app


def in_starlette(*decorators: Any, ran: list[str] | None = None) -> Starlette:
    """A route of Starlette's."""
    return Starlette(routes=[WebSocketRoute("/ws", echo(*decorators, ran=ran))])


FORMS: dict[str, Callable[..., Any]] = {
    "starlette": in_starlette,
    "fastapi": in_fastapi,
    "on_connect": in_class,
    "dispatch": in_dispatch,
    "metered_app": in_metered_app,
    "dependency": in_dependency,
}


@pytest.mark.parametrize("form", FORMS)
def test_charge_a_connection_once(form: str) -> None:
    """A plain price is charged once for the connection, whatever passes over it, by every way to decorate it."""

    async def story() -> None:
        async with served(FORMS[form](billable(2))) as scene:
            async with scene.socket() as socket:
                socket.say("a", "b")
                assert await socket.heard(2) == ["a!", "b!"]
                assert await scene.account() == (0, 2)
                socket.leave()
            assert await scene.books() == (2, 0)
            assert await scene.charges() == [("usage", 2)]

    play(story)


@pytest.mark.parametrize("extensions", [DENIAL, None], ids=["denial", "close"])
@pytest.mark.parametrize("form", FORMS)
def test_refuse_before_the_accept(form: str, extensions: Any) -> None:
    """Pitfall 19: a refusal is a whole response where the server has the extension, else a close; no line has run."""
    ran: list[str] = []

    async def story() -> None:
        async with served(FORMS[form](billable(2), ran=ran), credits=1) as scene:
            async with scene.socket(extensions=extensions) as socket:
                pass
            assert socket.failure is None
            assert [message["type"] for message in socket.read] == ["websocket.connect"]
            if extensions:
                assert socket.kinds == ["http.response.start", "http.response.body"]
                start, body = socket.log
                fields = dict(start["headers"])
                assert (start["status"], fields[b"content-type"]) == (402, b"application/problem+json")
                told = json.loads(body["body"])
                assert (told["code"], told["required"], told["available"]) == ("insufficient_credits", "2", "1")
                assert fields[b"content-length"] == str(len(body["body"])).encode()
            else:
                assert socket.log == [
                    {"type": "websocket.close", "code": 4402, "reason": "insufficient_credits: Insufficient credits"}
                ]
            assert await scene.books() == (0, 0)

    play(story)
    assert ran == []


def refusals() -> dict[str, tuple[Any, dict[str, Any], int]]:
    """A route for each reason, how it is visited, and the status."""
    return {
        "nobody": (billable(2), {"key": None}, 401),
        "rate": (rate_limited("0/minute"), {}, 429),
        "slots": (rate_limited("9/minute", global_concurrency=0), {}, 503),
        "shape": (billable(2, errors="openai"), {"key": "poor"}, 402),
        "unpayable-message": (billable(101, per="message"), {}, 402),
        "unpayable-second": (billable(101, per="second"), {}, 402),
    }


@pytest.mark.parametrize("reason", refusals())
def test_refuse_for_every_reason(reason: str) -> None:
    """The status, body and fields are those of HTTP: 401 with its challenge, 429, 503, and the shapes of SDKs."""
    decorate, visit, status = refusals()[reason]

    async def story() -> None:
        async with served(echo(decorate)) as scene:
            async with scene.socket(extensions=DENIAL, **visit) as socket:
                pass
            start, body = socket.log
            fields = dict(start["headers"])
            assert start["status"] == status
            assert (b"www-authenticate" in fields) is (status == 401)
            assert (b"retry-after" in fields) is (reason == "slots")
            assert ("error" in json.loads(body["body"])) is (reason == "shape")
            async with scene.socket(**visit) as socket:
                pass
            assert socket.closed is not None
            assert socket.closed[0] == 4000 + status
            assert len(socket.closed[1].encode()) <= 123

    play(story)


def test_identify_by_the_query_of_a_websocket() -> None:
    """`identify` gets the connection: its header fields, its query and its path, as of HTTP."""

    async def story() -> None:
        async with served(echo(billable(2))) as scene:
            async with Socket(scene.app, query="key=ann") as socket:
                socket.leave()
            assert await scene.books() == (2, 0)

    play(story)

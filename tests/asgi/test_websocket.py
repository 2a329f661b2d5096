"""WebSockets: who is let in, what passes, and who pays for a session (DESIGN 7, X.4)."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from fastapi import Depends, FastAPI
from starlette.applications import Starlette
from starlette.endpoints import WebSocketEndpoint
from starlette.routing import Mount, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from asgi_metering import (
    Allowance,
    Wallet,
    billable,
    metered_app,
    rate_limited,
    slices,
)
from asgi_metering.errors import ConfigurationError
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.testing import FakeClock
from tests.asgi.sessions import CREDIT, Hours, Slow, echo, play, served
from tests.harness.drive import assert_same_log
from tests.harness.sockets import DENIAL, Socket
from tests.pitfalls.scene import Books

ANN = [("x-api-key", "ann")]


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
        async with served(FORMS[form](billable(2), ran=ran), granted=1) as scene:
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
                await socket.opened()
                socket.leave()
            assert await scene.books() == (2, 0)

    play(story)


# -- slots -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", ["flat", "local"])
def test_keep_the_slot_of_a_session_that_is_older_than_a_call_may_be(limits: str) -> None:
    """S0.46: a slot is the session's until that closes, also one of a middleware's limits, or without the store."""

    async def story() -> None:
        hours, books = Hours(), Slow()
        slot = rate_limited(concurrency=1)
        flat = [slot] if limits == "flat" else []
        endpoint = echo() if flat else echo(slot)
        options = {"max_call_s": 0.001, "on_store_down": {"rates": "local"}}
        async with served(endpoint, store=books, application_limits=flat, **options) as scene:
            books.down = limits == "local"
            async with scene.socket() as socket:
                await socket.opened()
                for _ in range(3):
                    await hours.pass_by(1)
                    await asyncio.sleep(0.001)
                async with scene.socket() as other:
                    pass
                assert other.closed is not None
                assert other.closed[0] == 4429
                socket.leave()
            await scene.books()
            async with scene.socket() as other:
                await other.opened()
                other.leave()

    play(story)


def test_free_the_slot_of_a_connection_when_it_closes() -> None:
    """S0.46: open connections count; one that closes, however, makes room at once. The refusal says when to retry."""

    async def story() -> None:
        async with served(echo(rate_limited(concurrency=1))) as scene:
            for code in (1000, 1006, 3000):
                async with scene.socket() as first:
                    await first.opened()
                    async with scene.socket(extensions=DENIAL) as second:
                        pass
                    assert second.log[0]["status"] == 429
                    assert 1 <= int(dict(second.log[0]["headers"])[b"retry-after"]) <= 5
                    first.leave(code)
                await scene.books()

    play(story)


# -- who pays ----------------------------------------------------------------------------------------------


def test_pay_a_session_out_of_several_sources() -> None:
    """A session that split sources pay takes the allowance first and then the wallet, to the last message of both."""
    sources = [Allowance(3, per="day", split=True), Wallet()]

    async def story() -> None:
        async with served(echo(billable(1, per="message", sources=sources)), granted=4) as scene:
            async with scene.socket() as socket:
                socket.say(*"abcdefghij")
            assert len(socket.texts) == 7
            assert await scene.books() == (4, 0)
            (status,) = await scene.metering.allowances("ann", sources=sources)
            assert (status.used, status.held) == (3 * CREDIT, 0)

    play(story)


def test_charge_connections_of_a_key_once() -> None:
    """`charge_key` on a plain price: a client that reconnects in the same window has paid."""

    async def story() -> None:
        async with served(echo(billable(2, charge_key="x-session"))) as scene:
            for _ in range(3):
                async with scene.socket(headers=[("x-session", "s1")]) as socket:
                    await socket.opened()
                    socket.leave()
                await scene.books()
            assert await scene.books() == (2, 0)

    play(story)


def test_charge_a_session_that_began_without_the_store(tmp_path: Path) -> None:
    """A queued session is let in without the store, grows there, and is charged once when the store is back."""

    async def story() -> None:
        books = Slow()
        route = billable(1, per="message", hold=slices(2), on_store_down="queue")
        async with served(echo(route), store=books, journal=tmp_path / "journal") as scene:
            await scene.account()
            books.down = True
            async with scene.socket() as socket:
                socket.say(*"abcde")
                await socket.heard(5)
                books.down = False
                socket.leave()
            async with asyncio.timeout(10):
                while not await scene.charges():
                    await asyncio.sleep(0.01)
            assert await scene.account() == (5, 0)
            assert await scene.charges() == [("usage", 5)]

    play(story)


@pytest.mark.parametrize("policy", [{}, {"on_abort": "hold"}], ids=["observed", "hold"])
def test_keep_a_queued_session_for_as_long_as_it_lasts(policy: dict[str, Any], tmp_path: Path) -> None:
    """What the journal keeps of a session, should its process die, is not read off while it lives, however long."""
    ahead = 0.0

    def left_s() -> float:
        with closing(sqlite3.connect(tmp_path / "journal")) as file:
            ((due_at,),) = file.execute("SELECT max(due_at) FROM entry")
        return float(due_at or 0.0) - time.time() - ahead

    async def until(hours: Hours, condition: Callable[[], Any]) -> None:
        for _ in range(300):
            if condition():
                return
            await hours.pass_by(1.0)
            await asyncio.sleep(0.001)
        raise AssertionError("It did not come true.")

    async def story() -> None:
        nonlocal ahead
        hours, books = Hours(), Slow()
        route = billable(1, per="message", hold=slices(9), on_store_down="queue", ttl_s=60.0, **policy)
        async with served(echo(route), store=books, journal=tmp_path / "journal", max_call_s=1_000.0) as scene:
            journal: Any = scene.metering.journal
            journal._clock = lambda: time.time() + ahead
            books.down = True
            async with scene.socket() as socket:
                socket.say("a", "b")
                await socket.heard(2)
                books.down = False
                for _ in range(3):
                    ahead += 600.0
                    await until(hours, lambda: left_s() > 800.0)
                assert await scene.charges() == []
                socket.say("c")
                await socket.heard(3)
                socket.leave()
            await until(hours, lambda: scene.events)
            assert await scene.charges() == [("usage", 3)]

    play(story)


def test_limit_messages_by_a_store_with_another_day() -> None:
    """A calendar window is the store's: where its clock is far from ours it is asked once more around its own time."""

    async def story() -> None:
        books = MemoryStore(FakeClock(1_000_000_000.0))
        async with served(echo(rate_limited("2/day", per="message", strategy="calendar")), store=books) as scene:
            async with scene.socket() as socket:
                socket.say("a", "b", "c")
            assert socket.texts == ["a!", "b!"]
            assert socket.closed is not None
            assert socket.closed[0] == 4429

    play(story)


def test_refuse_computed_limits_of_tokens_for_messages() -> None:
    """A limit that is computed is known when the session begins: one of tokens counts no messages, and says so."""

    async def story() -> None:
        route = rate_limited(lambda websocket: "9/minute of tokens", per="message")
        async with served(echo(route)) as scene:
            async with scene.socket() as socket:
                pass
            assert isinstance(socket.failure, ConfigurationError)
            assert "of tokens" in str(socket.failure)
            assert socket.log == []

    play(story)


def test_drop_messages_on_a_store_with_round_trips() -> None:
    """What memory decides at once other stores decide in a moment, and the same way."""

    async def story() -> None:
        route = rate_limited("2/minute", per="message", on_excess="drop")
        async with served(echo(route), store=Slow()) as scene, scene.socket() as socket:
            socket.say("a", "b", "c", "d")
            await socket.until(lambda: len(socket.read) == 5)
            await socket.heard(2)
            socket.leave()
        assert socket.texts == ["a!", "b!"]

    play(story)

"""WebSockets that last, or outlast something: heartbeats, drains, holds that are ended behind them."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from asgi_metering import (
    Call,
    MeteringMiddleware,
    TokenUsage,
    billable,
    current_call,
    rate_limited,
    slices,
)
from asgi_metering.errors import CallClosedError
from asgi_metering.opening import SCOPE_KEY
from asgi_metering.receipts import Basis
from asgi_metering.rules.operations import Renew
from tests.asgi.sessions import Hours, Slow, echo, obedient, play, served
from tests.harness.sockets import DENIAL, Socket
from tests.pitfalls.scene import Books


def test_keep_a_session_alive_for_hours() -> None:
    """S0.50: heartbeats renew hold and slot of a session that is older than any request may be; no age ends it."""

    async def story() -> None:
        hours = Hours()
        books = Books()
        route = (billable(1, per="message", ttl_s=30), rate_limited(concurrency=1))
        async with served(echo(*route), store=books, max_call_s=0.001) as scene:
            async with scene.socket() as socket:
                socket.say("a")
                await socket.heard(1)
                for _ in range(6):
                    beats = len([each for each in books.asked if isinstance(each, Renew)])
                    await hours.pass_by(20)
                    await socket.until(
                        lambda beats=beats: len([e for e in books.asked if isinstance(e, Renew)]) > beats
                    )
                (call,) = scene.metering.runtime().in_flight.values()
                assert call.observed_parts == 1_000_000
                async with scene.socket() as other:
                    pass
                assert other.closed is not None
                assert other.closed[0] == 4429
                socket.say("b")
                await socket.heard(2)
                socket.leave()
            assert await scene.books() == (2, 0)

    play(story)


def test_leave_nothing_of_a_session_behind() -> None:
    """A session that is over is forgotten, and no timer of the loop keeps it until some slice would have been used."""
    seen: list[weakref.ref[Any]] = []

    @billable(1, per="second")
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        seen.append(weakref.ref(websocket.scope[SCOPE_KEY]))
        await websocket.receive()

    async def story() -> None:
        async with served(talk) as scene:
            async with scene.socket() as socket:
                await socket.opened()
                socket.leave()
            await scene.books()
            del socket
            await asyncio.sleep(0)
            gc.collect()
            assert seen[0]() is None

    play(story)


def test_close_a_session_whose_hold_its_policy_has_ended() -> None:
    """A session that lost its hold lets in what it had been held for, and is closed then: nothing runs on unpaid."""

    async def story() -> None:
        async with served(echo(billable(1, per="message", hold=slices(2, low_water=0)))) as scene:
            async with scene.socket() as socket:
                socket.say("a")
                await socket.heard(1)
                (call,) = scene.metering.runtime().in_flight.values()
                await scene.metering.store.end([_ended(call)])
                socket.say(*"bcd")
            assert socket.texts == ["a!", "b!"]
            assert socket.closed == (4409, "call_ended: Call ended")

    play(story)


@pytest.mark.parametrize("step", [1, 5])
def test_close_a_session_of_seconds_whose_hold_its_policy_has_ended(step: int) -> None:
    """The same of one that is charged per second, whenever it hears that its hold is gone: no debt grows."""

    async def story() -> None:
        hours = Hours()
        async with served(obedient(billable(1, per="second", hold=slices(5, step=step)))) as scene:
            async with scene.socket() as socket:
                await socket.opened()
                (call,) = scene.metering.runtime().in_flight.values()
                await scene.metering.store.end([_ended(call)])
                for _ in range(9):
                    await hours.pass_by(1)
                    call.growth.nudge()
                    await hours.pass_by(0)
                if not socket.closed:
                    socket.leave()
            assert socket.closed == (4409, "call_ended: Call ended")
            assert await scene.books() == (5, 0)

    play(story)


def _ended(call: Call) -> Any:
    from asgi_metering.receipts import EndedBy
    from asgi_metering.rules.operations import End

    return End(call.id, 1_000_000, Basis.OBSERVED, by=EndedBy.POLICY)


def test_let_nothing_in_once_the_metering_has_drained() -> None:
    """A shutdown that waits no longer ends the session's call as aborted: from then on no message comes in."""

    async def story() -> None:
        async with served(echo(billable(1, per="message")), drain_s=0.01) as scene:
            async with scene.socket() as socket:
                socket.say("a")
                await socket.heard(1)
                await scene.metering.drain()
                socket.say("b", "c")
            assert socket.texts == ["a!"]
            assert await scene.account() == (1, 0)
            assert await scene.charges() == [("observed", 1)]

    play(story)


def test_refuse_what_outlives_a_session() -> None:
    """Pitfall 1: a task of a session that is over charges nothing more."""
    left: list[asyncio.Task[None]] = []

    async def later() -> None:
        await over.wait()
        current_call().record(TokenUsage(output=1))

    over = asyncio.Event()

    @billable(2)
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        left.append(asyncio.create_task(later()))

    async def story() -> None:
        async with served(talk) as scene:
            async with scene.socket() as socket:
                pass
            assert socket.kinds == ["accept"]
            over.set()
            with pytest.raises(CallClosedError):
                await left[0]
            assert await scene.books() == (2, 0)

    play(story)


def test_book_the_end_inline_where_no_lifespan_comes() -> None:
    """Pitfall 32: without a lifespan the connection stays until its end is booked."""

    async def story() -> None:
        from asgi_metering import Caller, Metering

        # An end takes a turn of the loop there, as on every store but memory.
        metering = Metering(Slow(), identify=lambda connection: Caller("ann"), sinks=())
        app = MeteringMiddleware(Starlette(routes=[WebSocketRoute("/ws", echo(billable(2)))]), metering)
        await metering.grant("ann", 5, id="g")
        async with Socket(app) as socket:
            await socket.opened()
            socket.leave()
        assert (await metering.balance("ann")).settled == 2_000_000
        await metering.stop()

    play(story)


def test_let_nobody_in_to_an_application_that_must_not_serve(caplog: pytest.LogCaptureFixture) -> None:
    """Where no lifespan comes the first connection is audited: a mistake denies it, and the log says why."""
    from asgi_metering import Metering

    app = MeteringMiddleware(
        Starlette(routes=[WebSocketRoute("/ws", echo(billable("0.00000001")))]), Metering(sinks=())
    )

    async def story() -> None:
        for extensions in (DENIAL, None):
            async with Socket(app, extensions=extensions) as socket:
                pass
            assert socket.kinds == (["http.response.start", "http.response.body"] if extensions else ["close"])
            assert (socket.log[0].get("status"), socket.log[0].get("code")) in ((500, None), (None, 1011))
        gone = Socket(app)
        gone.leave(1006)
        async with gone:
            pass
        assert gone.log == []

    with caplog.at_level(logging.ERROR):
        play(story)
    assert "cannot serve" in caplog.text


async def page(request: Any) -> PlainTextResponse:
    """An endpoint of HTTP."""
    return PlainTextResponse("page")


def test_tell_a_disconnect_to_a_handler_that_raises_it() -> None:
    """A handler that lets `WebSocketDisconnect` rise when we close is no error of the server's log."""

    @billable(1, per="message")
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        while True:
            await websocket.receive_text()

    async def story() -> None:
        async with served(talk, granted=1) as scene:
            async with scene.socket() as socket:
                socket.say("a", "b")
            assert socket.failure is None
            async with scene.socket(key="rich") as other:
                pass
            assert other.failure is None

    play(story)


def test_let_a_handlers_own_failure_rise_after_a_cut() -> None:
    """What a handler raises besides is its own: the server logs it, and the charge is that of the cut."""

    @billable(1, per="message")
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        try:
            while True:
                await websocket.receive_text()
        except WebSocketDisconnect:
            raise RuntimeError("cleaning up failed") from None

    async def story() -> None:
        async with served(talk, granted=1) as scene:
            async with scene.socket() as socket:
                socket.say("a", "b")
            assert isinstance(socket.failure, RuntimeError)
            assert await scene.charges() == [("observed", 1)]

    play(story)

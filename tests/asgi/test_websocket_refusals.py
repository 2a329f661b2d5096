"""Refusals inside of a WebSocket that has begun: what its handler and its client hear."""

from __future__ import annotations

import asyncio
import logging

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount, WebSocketRoute
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from asgi_metering import (
    CallRefused,
    Metering,
    RateLimitMiddleware,
    billable,
    current_call,
    metered_app,
    rate_limited,
    slices,
)
from tests.asgi.sessions import Hours, Slow, echo, play, says_nothing, served
from tests.harness.sockets import DENIAL, Socket


@pytest.mark.parametrize("catches", [False, True])
@pytest.mark.parametrize("first", ["accept", "ask"])
def test_refuse_at_the_explicit_gate(first: str, catches: bool) -> None:
    """S4.6: `admit` in a handler; before the accept a refusal is a response, after it a close with its code."""
    ran: list[str] = []

    async def talk(websocket: WebSocket) -> None:
        if first == "accept":
            await websocket.accept()
        try:
            await current_call().admit(billable(2))
            ran.append("ran")
        except CallRefused:
            if not catches:
                raise

    async def story() -> None:
        async with served(talk, granted=1) as scene:
            async with scene.socket(extensions=DENIAL) as socket:
                pass
            assert socket.failure is None
            if first == "accept":
                assert socket.closed == (4402, "insufficient_credits: Insufficient credits")
            else:
                assert socket.log[0]["status"] == 402
            assert await scene.books() == (0, 0)

    play(story)
    assert ran == []


def test_let_messages_in_from_the_explicit_gate_on() -> None:
    """A session that asks after its accept pays for the messages that come from then on, whoever waits for them."""
    given: list[str] = []

    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        given.append(await websocket.receive_text())
        reader = asyncio.create_task(websocket.receive_text())
        await asyncio.sleep(0)
        await current_call().admit(billable(1, per="message"))
        given.append(await reader)
        async for text in websocket.iter_text():
            given.append(text)

    async def story() -> None:
        async with served(talk, granted=2) as scene:
            async with scene.socket() as socket:
                socket.say("free")
                await socket.until(lambda: given)
                await socket.until(lambda: scene.metering.runtime().in_flight)
                socket.say("a", "b", "c")
            assert socket.closed is not None
            assert socket.closed[0] == 4402
            assert await scene.books() == (2, 0)

    play(story)
    assert given == ["free", "a", "b"]


@pytest.mark.parametrize("asks", [True, False], ids=["asks", "looks"])
def test_give_each_message_once_that_was_waited_for_before_the_gate(asks: bool) -> None:
    """What comes in while a call is not let in yet, or never asks to be, is given once, and is not charged later."""
    given: list[str] = []
    store = Slow()

    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        reader = asyncio.create_task(websocket.receive_text())
        await asyncio.sleep(0)
        call = current_call()
        asked = asyncio.create_task(call.admit(billable(1, per="message"))) if asks else None
        given.append(await reader)
        store.door.set()
        if asked is not None:
            await asked
        for _ in range(2):
            given.append(await websocket.receive_text())

    async def story() -> None:
        async with served(talk, store=store) as scene:
            store.door.clear()
            async with scene.socket() as socket:
                await socket.opened()
                socket.say("a", "b", "c")
                await socket.until(lambda: len(given) > 2)
                socket.leave()
            assert await scene.books() == (2 if asks else 0, 0)

    play(story)
    assert given == ["a", "b", "c"]


def test_lose_no_message_between_two_readers() -> None:
    """What a reader that gave up has left is let in before what another waited for since before there was a call."""
    given: list[str] = []
    admitted = asyncio.Event()
    store = Slow()

    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        early = asyncio.create_task(websocket.receive_text())
        await asyncio.sleep(0)
        await current_call().admit(rate_limited("9/minute", per="message"))
        store.door.clear()
        admitted.set()
        hasty = asyncio.create_task(websocket.receive_text())
        await asyncio.wait([hasty], timeout=0.05)
        hasty.cancel()
        await asyncio.wait([hasty])
        store.door.set()
        given.append(await early)
        for _ in range(2):
            given.append(await websocket.receive_text())

    async def story() -> None:
        async with served(talk, store=store) as scene, scene.socket() as socket:
            await admitted.wait()
            socket.say("a", "b", "c")
            await socket.until(lambda: len(given) == 3)
            socket.leave()

    play(story)
    assert sorted(given) == ["a", "b", "c"]


@pytest.mark.parametrize("own", ["close", "500", "402"])
def test_keep_a_handlers_own_answer_to_a_refusal(own: str) -> None:
    """Pitfall 15: what a framework makes of a refusal gives way to ours; a handler's own 402 stays."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await inner(scope, receive, send)
        except CallRefused:
            if own == "close":
                await send({"type": "websocket.close", "code": 1011})
                return
            await send({"type": "websocket.http.response.start", "status": int(own), "headers": [(b"x-own", b"1")]})
            await send({"type": "websocket.http.response.body", "body": b"own"})

    inner = metered_app(says_nothing, billable(2))

    async def story() -> None:
        async with served(Starlette(routes=[Mount("/", app=app)]), granted=1) as scene:
            async with scene.socket(extensions=DENIAL) as socket:
                pass
            start = socket.log[0]
            assert start["status"] == 402
            assert ((b"x-own", b"1") in start["headers"]) is (own == "402")
            assert len(socket.log) == 2
            assert socket.failure is None or isinstance(socket.failure, CallRefused)

    play(story)


@pytest.mark.parametrize(("code", "heard"), [(3000, 3000), (1000, 1000), (1011, 4402), (4500, 4402)])
def test_keep_a_handlers_own_close_after_a_refusal(code: int, heard: int) -> None:
    """After the accept a handler's own close stays; what frameworks say of an error gives way to our code."""

    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        try:
            await current_call().admit(billable(2))
        except CallRefused:
            await websocket.close(code)

    async def story() -> None:
        async with served(talk, granted=1) as scene:
            async with scene.socket() as socket:
                pass
            assert socket.failure is None
            assert socket.closed is not None
            assert socket.closed[0] == heard

    play(story)


def test_say_nothing_to_a_client_that_left_before_it_was_refused() -> None:
    """A client that is gone before its handshake was read hears nothing, and nobody breaks."""

    async def story() -> None:
        async with served(echo(billable(2)), granted=1) as scene:
            socket = scene.socket()
            socket.leave(1006)
            async with socket:
                pass
            assert (socket.log, socket.failure) == ([], None)

    play(story)


def test_break_nothing_where_a_refusal_cannot_be_told() -> None:
    """A client that vanishes while it is refused is no error of the application."""

    async def story() -> None:
        async with served(echo(billable(2)), granted=1) as scene:
            socket = scene.socket()
            socket.is_gone = True
            async with socket:
                pass
            assert (socket.log, socket.failure) == ([], None)

    play(story)


def test_break_nothing_where_limits_of_a_middleware_refuse_who_has_left() -> None:
    """The same of a handshake that is refused before anything of the application runs."""

    async def story() -> None:
        async with served(echo(), application_limits=[rate_limited("0/minute")]) as scene:
            socket = scene.socket()
            socket.is_gone = True
            async with socket:
                pass
            assert (socket.log, socket.failure) == ([], None)

    play(story)


@pytest.mark.parametrize("tells", [True, False], ids=["response", "close"])
@pytest.mark.parametrize("leaves", ["vanished", "said so", "stays"])
def test_break_nothing_where_an_application_must_not_serve(tells: bool, leaves: str) -> None:
    """Who asks an application that must not serve hears of it, as 500 or 1011; who has left by then breaks nothing."""
    paid = Starlette(routes=[WebSocketRoute("/ws", echo(billable(2)))])

    async def story() -> None:
        socket = Socket(RateLimitMiddleware(paid, Metering(sinks=())), extensions=DENIAL if tells else None)
        socket.is_gone = leaves == "vanished"
        if leaves == "said so":
            socket.leave(1006)
        async with socket:
            pass
        assert socket.failure is None
        if leaves != "stays":
            assert socket.log == []
        elif tells:
            assert (socket.log[0]["type"], socket.log[0]["status"]) == ("websocket.http.response.start", 500)
        else:
            assert [(each["type"], each["code"]) for each in socket.log] == [("websocket.close", 1011)]

    play(story)


def test_let_a_cancellation_through_a_refusal() -> None:
    """Whoever wants the task to end is not kept by an answer."""
    waits = asyncio.Event()

    async def talk(websocket: WebSocket) -> None:
        try:
            await current_call().admit(billable(2))
        except CallRefused:
            waits.set()
            await asyncio.Event().wait()

    async def story() -> None:
        async with served(talk, granted=1) as scene:
            async with scene.socket() as socket:
                await waits.wait()
                socket.task.cancel()
            assert isinstance(socket.failure, asyncio.CancelledError)
            assert socket.log == []

    play(story)


def test_serve_less_to_whom_was_refused() -> None:
    """A handler that catches the refusal may go on without the call: that is its own, and costs nothing."""

    async def talk(websocket: WebSocket) -> None:
        try:
            await current_call().admit(billable(2))
        except CallRefused:
            await websocket.accept()
            await websocket.send_text((await websocket.receive_text()).upper())
            await websocket.close(3000)

    async def story() -> None:
        async with served(talk, granted=1) as scene:
            async with scene.socket() as socket:
                socket.say("a")
            assert socket.texts == ["A"]
            assert socket.closed == (3000, "")
            assert await scene.books() == (0, 0)

    play(story)


def test_hear_of_a_disconnect_that_was_waited_for_before_the_gate() -> None:
    """A read that began before there was a call ends the session as any other."""

    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        reader = asyncio.create_task(websocket.receive())
        await asyncio.sleep(0)
        await current_call().admit(billable(1, per="second"))
        await reader

    async def story() -> None:
        async with served(talk) as scene:
            async with scene.socket() as socket:
                await socket.until(lambda: scene.metering.runtime().in_flight)
                socket.leave(1006)
            assert await scene.charges() == [("observed", 1)]

    play(story)


def test_leave_the_servers_own_failure_to_the_handler() -> None:
    """What the server's `receive` raises while it is read ahead reaches the handler that asks."""

    @billable(1, per="second")
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.receive()

    async def story() -> None:
        async with served(talk) as scene:
            socket = scene.socket()
            socket.breaks = RuntimeError("the server broke")
            async with socket:
                pass
            assert socket.failure is socket.breaks
            assert await scene.charges() == [("observed", 1)]

    play(story)


@pytest.mark.parametrize("last", ["send", "close"])
def test_tell_a_handler_that_only_sends_of_a_client_that_left(last: str) -> None:
    """What we have read ahead is no mistake of the handler's: it hears of it as on a server that nobody reads."""
    left = asyncio.Event()

    @billable(1, per="second")
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        await left.wait()
        if last == "close":
            await websocket.close()
            return
        with pytest.raises(WebSocketDisconnect):
            await websocket.send_text("tick")

    async def story() -> None:
        async with served(talk) as scene:
            socket = scene.socket()
            socket.strict = True
            async with socket:
                await socket.opened()
                socket._inbox.put_nowait({"type": "websocket.disconnect", "code": 1006, "reason": None})
                await socket.until(lambda: len(socket.read) == 2)
                left.set()
            assert (socket.failure, socket.kinds) == (None, ["accept"])
            assert await scene.charges() == [("observed", 1)]

    play(story)


@pytest.mark.parametrize("looks", ["before", "after", "reader"])
def test_refuse_nobody_who_has_left(looks: str) -> None:
    """Who is refused after the disconnect hears nothing any more, whether a call read that, nobody's, or both's."""

    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        reader = asyncio.create_task(websocket.receive()) if looks == "reader" else None
        await asyncio.sleep(0)
        call = current_call() if looks != "after" else None
        await (reader or websocket.receive())
        await (call or current_call()).admit(billable(2))

    async def story() -> None:
        async with served(talk, granted=1) as scene:
            socket = scene.socket()
            socket.strict = True
            async with socket:
                await socket.opened()
                socket.leave(1006)
            assert (socket.failure, socket.kinds) == (None, ["accept"])

    play(story)


def test_close_once_while_the_server_takes_its_time() -> None:
    """Money that runs out while the handler's own close waits in the server is no second close."""

    @billable(1, per="second", hold=slices(2, step=1))
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.receive_text()
        await websocket.close(4000)

    async def story() -> None:
        hours = Hours()
        async with served(talk, granted=3) as scene:
            socket = scene.socket()
            socket.strict = True
            async with socket:
                await socket.opened()
                socket.stuck.clear()
                socket.say("a")
                for _ in range(4):
                    await hours.pass_by(1)
                socket.stuck.set()
            assert (socket.failure, socket.closed) == (None, (4000, ""))
            assert await scene.books() == (3, 0)
            assert await scene.charges() == [("usage", 3)]

    play(story)


def test_tell_the_operator_why_a_client_was_not_told(caplog: pytest.LogCaptureFixture) -> None:
    """What the server raises of our close is logged with the call, and breaks nothing else."""

    async def story() -> None:
        async with served(echo(billable(1, per="message")), granted=1) as scene:
            socket = scene.socket()
            async with socket:
                socket.say("a")
                await socket.heard(1)
                socket.log.append({"type": "websocket.close"})
                socket.strict = True
                socket.say("b")
            assert socket.failure is None
            assert await scene.charges() == [("observed", 1)]

    with caplog.at_level(logging.ERROR):
        play(story)
    assert [record.message.endswith("could not be told why its session was closed.") for record in caplog.records] == [
        True
    ]

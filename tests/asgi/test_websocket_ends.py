"""How a session ends, and what it costs then: every end is a row of the route's policy (DESIGN 4, "End of call")."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, WebSocketRoute
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from asgi_metering import (
    Call,
    CallRefused,
    MeteringMiddleware,
    TokenUsage,
    billable,
    current_call,
    metered_app,
    rate_limited,
    slices,
)
from asgi_metering.asgi import cutting, websocket
from asgi_metering.errors import CallClosedError
from asgi_metering.opening import SCOPE_KEY
from asgi_metering.prices import per_token
from asgi_metering.receipts import Basis
from asgi_metering.rules.operations import Renew
from tests.asgi.sessions import Hours, Served, Slow, echo, play, served
from tests.harness.sockets import DENIAL, Socket
from tests.pitfalls.scene import Books


async def client_closes(scene: Served, socket: Socket) -> None:
    """In good order."""
    socket.leave(1000)


async def client_goes(scene: Served, socket: Socket) -> None:
    """A browser's tab is closed."""
    socket.leave(1001)


async def client_says_why(scene: Served, socket: Socket) -> None:
    """By a code of its own."""
    socket.leave(4321)


async def client_says_nothing(scene: Served, socket: Socket) -> None:
    """A close without a code, which uvicorn also makes of a connection that is lost."""
    socket.leave(1005)


async def client_vanishes(scene: Served, socket: Socket) -> None:
    """The connection is lost."""
    socket.leave(1006)


async def client_is_out_of_reach(scene: Served, socket: Socket) -> None:
    """The server's `send` raises before anybody hears of a disconnect."""
    socket.is_gone = True
    socket.say("c")


async def handler_returns(scene: Served, socket: Socket) -> None:
    """Without a word."""
    socket.say("return")


async def handler_closes(scene: Served, socket: Socket) -> None:
    """By its own code."""
    socket.say("close")


async def handler_gives_up(scene: Served, socket: Socket) -> None:
    """By the code of an internal error."""
    socket.say("1011")


async def handler_raises(scene: Served, socket: Socket) -> None:
    """An exception, as of a message that it cannot read."""
    socket.say("raise")


async def handler_says_that_it_failed(scene: Served, socket: Socket) -> None:
    """`call.fail()`, and an end in good order."""
    socket.say("fail")


async def server_stops(scene: Served, socket: Socket) -> None:
    """As uvicorn does: it closes its connections by 1012."""
    socket.leave(1012)


async def task_is_cancelled(scene: Served, socket: Socket) -> None:
    """As hypercorn and daphne do."""
    socket.task.cancel()


def obedient(*decorators: Any) -> Any:
    """An endpoint that does what it is told."""

    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        while True:
            text = await websocket.receive_text()
            if text == "return":
                return
            if text == "close":
                await websocket.close(4000)
                return
            if text == "1011":
                await websocket.close(1011)
                return
            if text == "raise":
                raise ValueError("no JSON")
            if text == "fail":
                current_call().fail("overloaded")
                return
            await websocket.send_text(text)

    for decorate in reversed(decorators):
        talk = decorate(talk)
    return talk


ENDS: dict[Callable[..., Any], tuple[str, str]] = {
    client_closes: ("completed", "usage"),
    client_goes: ("completed", "usage"),
    client_says_why: ("completed", "usage"),
    client_says_nothing: ("client_gone", "observed"),
    client_vanishes: ("client_gone", "observed"),
    client_is_out_of_reach: ("client_gone", "observed"),
    handler_returns: ("completed", "usage"),
    handler_closes: ("completed", "usage"),
    handler_gives_up: ("error", "observed"),
    handler_raises: ("error", "observed"),
    handler_says_that_it_failed: ("error", "observed"),
    server_stops: ("aborted", "observed"),
    task_is_cancelled: ("aborted", "observed"),
}
"""The outcome of each end, and the basis by default."""


@pytest.mark.parametrize("price", [{"price": 5}, {"price": 1, "per": "message"}], ids=["call", "message"])
@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
def test_end_a_session(end: Callable[..., Any], price: dict[str, Any]) -> None:
    """
    Each end is a row of the policy: what was let in is paid by default, also if the handler fails.

    A client that can make a handler raise, by a message that it cannot read, would have the session for nothing.
    """

    async def story() -> None:
        async with served(obedient(billable(**price))) as scene:
            async with scene.socket() as socket:
                socket.say("a", "b")
                await socket.heard(2)
                await end(scene, socket)
            settled, held = await scene.books()
            basis, amount = (await scene.charges())[0]
        outcome, wanted = ENDS[end]
        assert [event.outcome for event in scene.events] == [outcome]
        assert (basis, held) == (wanted, 0)
        counted = 3 if end in (client_is_out_of_reach, *TOLD) else 2
        assert settled == amount == (5 if "per" not in price else counted)

    play(story)


TOLD = (handler_returns, handler_closes, handler_gives_up, handler_raises, handler_says_that_it_failed)
"""Those that take another message."""


@pytest.mark.parametrize(
    ("end", "policy", "charged"),
    [
        (handler_raises, {"on_late_error": "none"}, 0),
        (handler_raises, {"on_late_error": "hold"}, 10),
        (handler_gives_up, {"on_late_error": "none"}, 0),
        (client_vanishes, {"on_disconnect": "none"}, 0),
        (client_vanishes, {"on_disconnect": "hold"}, 10),
        (client_vanishes, {"on_disconnect": "estimate"}, 1),
        (task_is_cancelled, {"on_abort": "none"}, 0),
    ],
)
def test_charge_by_the_policy_of_the_route(end: Any, policy: dict[str, Any], charged: int) -> None:
    """A route says otherwise per row, in the words of HTTP; ``hold`` is what was set aside, ten messages."""

    async def story() -> None:
        async with served(obedient(billable(1, per="message", **policy))) as scene:
            async with scene.socket() as socket:
                socket.say("a")
                await socket.heard(1)
                await end(scene, socket)
            assert await scene.books() == (charged, 0)

    play(story)


@pytest.mark.parametrize(("policy", "charged"), [({}, 7), ({"on_cut": "hold"}, 7)])
def test_cut_by_the_policy_of_the_route(policy: dict[str, Any], charged: int) -> None:
    """A session that runs dry is a cut."""

    async def story() -> None:
        async with served(obedient(billable(1, per="message", **policy)), granted=7) as scene:
            async with scene.socket() as socket:
                socket.say(*"abcdefgh")
            assert await scene.books() == (charged, 0)

    play(story)


async def denies(scope: Scope, receive: Receive, send: Send) -> None:
    """The application's own denial response."""
    await receive()
    await send({"type": "websocket.http.response.start", "status": 404, "headers": []})
    await send({"type": "websocket.http.response.body", "body": b"no such room"})


async def closes_first(scope: Scope, receive: Receive, send: Send) -> None:
    """A close instead of the accept."""
    await receive()
    await send({"type": "websocket.close", "code": 1008})


async def raises_first(scope: Scope, receive: Receive, send: Send) -> None:
    """An error before the accept."""
    raise ValueError("early")


async def says_nothing(scope: Scope, receive: Receive, send: Send) -> None:
    """Neither."""


@pytest.mark.parametrize("app", [denies, closes_first, raises_first, says_nothing], ids=lambda app: app.__name__)
@pytest.mark.parametrize("price", [{"price": 5}, {"price": 1, "per": "second"}], ids=["call", "second"])
def test_charge_nothing_for_what_was_never_accepted(app: Any, price: dict[str, Any]) -> None:
    """A handler that turns the client away, or fails before the accept, has failed: nothing is charged by default."""

    async def story() -> None:
        async with served(Starlette(routes=[Mount("/", app=metered_app(app, billable(**price)))])) as scene:
            async with scene.socket(extensions=DENIAL) as socket:
                pass
            assert await scene.books() == (0, 0)
            bare = Socket(app)
            async with bare:
                pass
            assert socket.log == bare.log
            assert type(socket.failure) is type(bare.failure)
        assert [event.outcome for event in scene.events] == ["error"]

    play(story)


# -- measured prices ---------------------------------------------------------------------------------------


def test_charge_usage_that_a_session_reports() -> None:
    """`record` during a session adds up and is charged at its end; `current_call` works in tasks of the handler."""

    @billable(per_token(output=1), hold="50")
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        call = current_call()

        async def count() -> None:
            assert current_call() is call
            current_call().record(TokenUsage(output=4))

        async for _ in websocket.iter_text():
            await asyncio.create_task(count())

    async def story() -> None:
        async with served(talk) as scene:
            async with scene.socket() as socket:
                socket.say("a", "b", "c")
                await socket.until(lambda: len(socket.read) == 4)
                socket.leave()
            assert await scene.books() == (12, 0)

    play(story)


@pytest.mark.parametrize("waits", ["receive", "elsewhere", "send"])
def test_cut_a_session_whose_tokens_run_out(waits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A hold in slices that cannot grow closes the socket at once, whatever the handler waits for.

    One that listens hears of a disconnect; one that waits for something else, or for a client that does not read, is
    cancelled.
    """
    monkeypatch.setattr(cutting, "SILENT_S", 0.01)
    monkeypatch.setattr(websocket, "TELL_S", 0.05)
    ends: list[Any] = []

    @billable(per_token(output=1), hold=slices(5))
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        call = current_call()
        if waits == "send":
            socket.stuck.clear()
        call.reports.append(_reported(20))
        assert call.growth is not None
        call.growth.nudge()
        try:
            if waits == "receive":
                await websocket.receive_text()
            elif waits == "send":
                await websocket.send_text("to somebody who does not read")
            else:
                await asyncio.Event().wait()
        except BaseException as failure:
            ends.append(getattr(failure, "code", type(failure)))
            raise

    async def story() -> None:
        nonlocal socket
        async with served(talk, granted=10) as scene:
            async with scene.socket() as socket:
                pass
            assert socket.failure is None
            if waits != "send":
                assert socket.closed == (4402, "insufficient_credits: Insufficient credits")
            assert await scene.books() == (20, 0)
            assert await scene.charges() == [("observed", 20)]

    socket: Any = None
    play(story)
    assert ends == [4402 if waits == "receive" else asyncio.CancelledError]


def test_cut_a_session_before_its_accept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler that uses up what is held before it accepts is answered by a whole response."""
    monkeypatch.setattr(cutting, "SILENT_S", 0.01)

    @billable(per_token(output=1), hold=slices(5))
    async def talk(websocket: WebSocket) -> None:
        call = current_call()
        call.reports.append(_reported(20))
        assert call.growth is not None
        call.growth.nudge()
        await asyncio.Event().wait()

    async def story() -> None:
        async with served(talk, granted=10) as scene:
            async with scene.socket(extensions=DENIAL) as socket:
                pass
            assert socket.failure is None
            assert [message.get("status") for message in socket.log] == [402, None]
            assert await scene.charges() == [("observed", 20)]

    play(story)


@pytest.mark.parametrize("hears", ["receive", "send"])
def test_let_a_handler_clean_up_that_has_heard(hears: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who was told of the disconnect is not cancelled, however long it takes to leave: no more than by a client."""
    monkeypatch.setattr(cutting, "SILENT_S", 0.01)
    ends: list[str] = []

    @billable(1, per="second", hold=slices(1))
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        try:
            if hears == "receive":
                await websocket.receive_text()
            else:
                while True:
                    await websocket.send_text("more")
                    await asyncio.sleep(0)
        except WebSocketDisconnect:
            await asyncio.sleep(0.03)
            ends.append("clean")

    async def story() -> None:
        hours = Hours()
        async with served(talk, granted=1) as scene:
            async with scene.socket() as socket:
                await socket.opened()
                await hours.pass_by(1)
            assert socket.closed is not None
            assert socket.closed[0] == 4402
            assert await scene.books() == (1, 0)

    play(story)
    assert ends == ["clean"]


def _reported(tokens: int) -> Any:
    from asgi_metering.call_state import Reported

    return Reported(TokenUsage(output=tokens))


# -- refusals inside of a session --------------------------------------------------------------------------


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


# -- long sessions -----------------------------------------------------------------------------------------


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

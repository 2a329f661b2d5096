"""How a session ends, and what it costs then: every end is a row of the route's policy (DESIGN 4, "End of call")."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from asgi_metering import (
    TokenUsage,
    billable,
    current_call,
    metered_app,
    slices,
)
from asgi_metering.asgi import cutting, websocket
from asgi_metering.prices import per_token
from tests.asgi.sessions import Hours, Served, denies, obedient, play, says_nothing, served
from tests.harness.sockets import DENIAL, Socket


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


async def handler_denies_too_late(scene: Served, socket: Socket) -> None:
    """An exception of HTTP's: its framework makes a response of it, of which daphne says nothing."""
    socket.say("deny")


async def handler_says_that_it_failed(scene: Served, socket: Socket) -> None:
    """`call.fail()`, and an end in good order."""
    socket.say("fail")


async def server_stops(scene: Served, socket: Socket) -> None:
    """As uvicorn does: it closes its connections by 1012."""
    socket.stop()


async def client_says_that_the_server_stops(scene: Served, socket: Socket) -> None:
    """By the server's own code: it shall not have the session for what the server's stop would cost."""
    socket.leave(1012)


async def task_is_cancelled(scene: Served, socket: Socket) -> None:
    """As hypercorn and daphne do."""
    socket.task.cancel()


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
    handler_denies_too_late: ("error", "observed"),
    handler_says_that_it_failed: ("error", "observed"),
    server_stops: ("aborted", "observed"),
    client_says_that_the_server_stops: ("client_gone", "observed"),
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
            async with scene.socket(spec_version="2.4") as socket:
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


TOLD = (
    handler_returns,
    handler_closes,
    handler_gives_up,
    handler_raises,
    handler_denies_too_late,
    handler_says_that_it_failed,
)
"""Those that take another message."""


@pytest.mark.parametrize(
    ("end", "policy", "charged"),
    [
        (handler_raises, {"on_late_error": "none"}, 0),
        (handler_raises, {"on_late_error": "hold"}, 10),
        (handler_gives_up, {"on_late_error": "none"}, 0),
        (handler_denies_too_late, {"on_late_error": "none"}, 0),
        (client_vanishes, {"on_disconnect": "none"}, 0),
        (client_vanishes, {"on_disconnect": "hold"}, 10),
        (client_vanishes, {"on_disconnect": "estimate"}, 1),
        (task_is_cancelled, {"on_abort": "none"}, 0),
        (server_stops, {"on_abort": "none"}, 0),
        (client_says_that_the_server_stops, {"on_abort": "none"}, 1),
    ],
)
def test_charge_by_the_policy_of_the_route(end: Any, policy: dict[str, Any], charged: int) -> None:
    """A route says otherwise per row, in the words of HTTP; ``hold`` is what was set aside, ten messages."""

    async def story() -> None:
        async with served(obedient(billable(1, per="message", **policy))) as scene:
            async with scene.socket(spec_version="2.4") as socket:
                socket.say("a")
                await socket.heard(1)
                await end(scene, socket)
            assert await scene.books() == (charged, 0)

    play(story)


def test_take_no_clients_word_for_a_stop_of_the_server() -> None:
    """Neither granian (spec version 2.3) nor daphne tells a reason of any close, and neither ever says 1012 itself."""

    async def story() -> None:
        async with served(obedient(billable(1, per="message", on_abort="none"))) as scene:
            for spec_version in ("2.3", None):
                async with scene.socket(spec_version=spec_version) as socket:
                    socket.say("a")
                    await socket.heard(1)
                    socket.stop()
            assert await scene.books() == (2, 0)
        assert [event.outcome for event in scene.events] == ["client_gone"] * 2

    play(story)


class _Odd(Socket):
    """A server whose `receive` does what it likes once it is asked one time too many."""

    more: Any = None

    async def _receive(self) -> Any:
        if "accept" not in self.kinds:
            return await super()._receive()
        return await self.more()


async def _says_the_same() -> Any:
    return {"type": "websocket.receive", "text": "a"}


async def _is_cancelled() -> Any:
    raise asyncio.CancelledError


@pytest.mark.parametrize("more", [_says_the_same, _is_cancelled, asyncio.Event().wait])
def test_end_a_cancelled_session_of_any_server(more: Any) -> None:
    """Where the server does not say at once that the client has left, it has ended the session itself."""

    @billable(5)
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        await asyncio.Event().wait()

    async def story() -> None:
        async with served(talk) as scene:
            async with _Odd(scene.app, headers=[("x-api-key", "ann")]) as socket:
                await socket.opened()
                socket.more = more
                socket.task.cancel()
            assert await scene.books() == (5, 0)
        assert [event.outcome for event in scene.events] == ["aborted"]

    play(story)


def test_charge_a_client_that_left_before_its_handler_was_cancelled() -> None:
    """Ten seconds after a client has left daphne cancels a handler that has not looked: the server ends nothing."""

    @billable(5, on_abort="none")
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        await asyncio.Event().wait()

    async def story() -> None:
        async with served(talk) as scene:
            for left in (True, False):
                async with scene.socket() as socket:
                    await socket.opened()
                    socket.say("a")
                    if left:
                        socket.leave(1006)
                    socket.task.cancel()
            assert await scene.books() == (5, 0)
        assert [event.outcome for event in scene.events] == ["client_gone", "aborted"]

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


async def closes_first(scope: Scope, receive: Receive, send: Send) -> None:
    """A close instead of the accept."""
    await receive()
    await send({"type": "websocket.close", "code": 1008})


async def raises_first(scope: Scope, receive: Receive, send: Send) -> None:
    """An error before the accept."""
    raise ValueError("early")


async def sends_away(scope: Scope, receive: Receive, send: Send) -> None:
    """A redirect instead of the accept, to where one logs in."""
    await receive()
    await send({"type": "websocket.http.response.start", "status": 302, "headers": [(b"location", b"/login")]})
    await send({"type": "websocket.http.response.body", "body": b""})


NEVER_ACCEPTED = (denies, sends_away, closes_first, raises_first, says_nothing)
PRICES: dict[str, dict[str, Any]] = {
    "call": {"price": 5},
    "second": {"price": 1, "per": "second"},
    "tokens": {"price": per_token(output=1), "hold": 50},
}


@pytest.mark.parametrize("app", NEVER_ACCEPTED, ids=lambda app: app.__name__)
@pytest.mark.parametrize("price", PRICES.values(), ids=PRICES)
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
    # Long enough that it hears in time, also on a machine that does much else.
    monkeypatch.setattr(cutting, "SILENT_S", 0.25)
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
            await asyncio.sleep(0.4)
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

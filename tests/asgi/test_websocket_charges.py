"""WebSockets: what each message or second costs, held ahead and settled (DESIGN 7, X.4)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.websockets import WebSocket, WebSocketDisconnect

from asgi_metering import (
    billable,
    rate_limited,
    slices,
)
from asgi_metering.rules.operations import Grow
from tests.asgi.sessions import CREDIT, Hours, echo, play, served
from tests.pitfalls.scene import Books

# -- charges per message -----------------------------------------------------------------------------------


def test_charge_each_message_that_is_let_in() -> None:
    """One call for the session: held for ten messages at first, settled once with what came in, and told so."""

    async def story() -> None:
        async with served(echo(billable(2, per="message"))) as scene:
            async with scene.socket() as socket:
                await socket.opened()
                assert await scene.account() == (0, 20)
                socket.say("a", "b", "c")
                await socket.heard(3)
                assert await scene.account() == (0, 20)
                socket.leave()
            assert await scene.books() == (6, 0)
            assert await scene.charges() == [("usage", 6)]
        (event,) = scene.events
        assert (event.amount, event.attributes["messages"], event.outcome) == (6 * CREDIT, 3, "completed")

    play(story)


def test_grow_the_hold_of_a_session_ahead_of_its_messages() -> None:
    """A long session outgrows its first slice; the store is asked seldom, beside the messages, and all is settled."""

    async def story() -> None:
        books = Books()
        async with served(echo(billable(1, per="message")), granted=1_000, store=books) as scene:
            async with scene.socket() as socket:
                for number in range(100):
                    socket.say(str(number))
                    await socket.heard(number + 1)
                    _, held = await scene.account()
                    assert number < held <= number + 22
                socket.leave()
            assert await scene.books() == (100, 0)
        assert len([each for each in books.asked if isinstance(each, Grow)]) <= 11
        assert len(books.admissions) == 1

    play(story)


@pytest.mark.parametrize("hold", [None, slices(3), slices(2, step=1, low_water="0.5"), slices("0.1")])
def test_let_in_no_message_that_cannot_be_paid(hold: Any) -> None:
    """With seven credits seven messages come in, held by whatever slices; before the eighth the client hears 4402."""
    given: list[str] = []
    ends: list[tuple[int, str | None]] = []

    @billable(1, per="message", hold=hold)
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        try:
            while True:
                given.append(await websocket.receive_text())
        except WebSocketDisconnect as gone:
            ends.append((gone.code, gone.reason))
            with pytest.raises(WebSocketDisconnect):
                await websocket.send_text("too late")

    async def story() -> None:
        async with served(talk, granted=7) as scene:
            async with scene.socket() as socket:
                socket.say(*"abcdefghij")
                await socket.until(lambda: socket.closed or len(given) > 7)
                if not socket.closed:
                    socket.leave()
            assert socket.failure is None
            assert socket.closed == (4402, "insufficient_credits: Insufficient credits")
            assert await scene.books() == (7, 0)
            assert await scene.charges() == [("observed", 7)]
        assert [event.outcome for event in scene.events] == ["cut"]

    play(story)
    assert "".join(given) == "abcdefg"
    assert ends == [(4402, "insufficient_credits: Insufficient credits")]


def test_let_messages_in_again_after_a_payment() -> None:
    """A payer who ran dry and pays in time goes on: the store is asked again for the next message."""

    async def story() -> None:
        async with served(echo(billable(1, per="message")), granted=2) as scene:
            async with scene.socket() as socket:
                socket.say("a", "b")
                await socket.heard(2)
                await scene.metering.grant("ann", 2, id="more")
                socket.say("c", "d", "e")
                await socket.heard(4)
            assert socket.closed is not None
            assert socket.closed[0] == 4402
            assert await scene.books() == (4, 0)

    play(story)


def test_owe_for_a_session_as_far_as_its_slices_say() -> None:
    """`slices(debt=)` lets a session that runs go on for so much: five messages of three credits."""

    async def story() -> None:
        async with served(echo(billable(1, per="message", hold=slices(1, debt=2))), granted=3) as scene:
            async with scene.socket() as socket:
                socket.say(*"abcdefg")
            assert len(socket.texts) == 5
            assert await scene.books() == (5, 0)

    play(story)


def test_charge_messages_by_a_price_that_is_computed() -> None:
    """A price of the endpoint's own arguments is computed once, when the session begins."""
    asked: list[str] = []

    def price(tier: str) -> int:
        asked.append(tier)
        return 3

    app = FastAPI()

    @app.websocket("/ws")
    @billable(price, per="message")
    async def talk(websocket: WebSocket, tier: str = "gold") -> None:
        await echo()(websocket)

    async def story() -> None:
        async with served(app) as scene:
            async with scene.socket() as socket:
                socket.say("a", "b")
                await socket.heard(2)
                socket.leave()
            assert await scene.books() == (6, 0)

    play(story)
    assert asked == ["gold"]


@pytest.mark.parametrize("price", [0, lambda websocket: 0])
def test_charge_nothing_for_messages_that_are_free(price: Any) -> None:
    """Free work is let in without a balance, and audited with an amount of 0."""

    async def story() -> None:
        async with served(echo(billable(price, per="message")), granted=0) as scene, scene.socket() as socket:
            socket.say("a")
            await socket.heard(1)
            socket.leave()
        assert [event.amount for event in scene.events] == [0]

    play(story)


def test_let_the_operators_own_callers_in_for_nothing() -> None:
    """An exempt caller pays for no message, and is counted by no limit of its own (S0.18)."""

    async def story() -> None:
        both = (billable(1, per="message"), rate_limited("1/minute", per="message"))
        async with served(echo(*both), granted=0) as scene, scene.socket(key="probe") as socket:
            socket.say("a", "b", "c")
            await socket.heard(3)
            socket.leave()
        assert [event.amount for event in scene.events] == [0]

    play(story)


# -- charges per second ------------------------------------------------------------------------------------


async def silent(websocket: WebSocket) -> None:
    """Accept, and listen."""
    await websocket.accept()
    async for _ in websocket.iter_text():
        pass


def test_charge_each_second_that_begins() -> None:
    """The clock runs from the accept to the disconnect; a minute is held at once, and more before it is over."""

    async def story() -> None:
        hours = Hours()
        async with served(billable(1, per="second")(silent), granted=1_000) as scene:
            async with scene.socket() as socket:
                await socket.opened()
                assert await scene.account() == (0, 60)
                for _ in range(5):
                    await hours.pass_by(25)
                    await asyncio.sleep(0)
                socket.leave()
            settled, held = await scene.books()
            assert (settled, held) == (126, 0)
        assert scene.events[0].attributes["seconds"] == 126

    play(story)


def test_close_when_the_last_second_is_over() -> None:
    """A handler that listens hears of the disconnect at once, and no second is charged that was not paid for."""
    ends: list[int] = []

    @billable(1, per="second", hold=slices(4))
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        ends.append((await websocket.receive())["code"])

    async def story() -> None:
        hours = Hours()
        async with served(talk, granted=10) as scene:
            async with scene.socket() as socket:
                await socket.opened()
                for elapsed in range(1, 11):
                    assert socket.closed is None, elapsed
                    await hours.pass_by(1)
                await socket.until(lambda: socket.closed)
            assert socket.closed == (4402, "insufficient_credits: Insufficient credits")
            assert await scene.books() == (10, 0)
            assert await scene.charges() == [("observed", 10)]

    play(story)
    assert ends == [4402]


@pytest.mark.parametrize("reads", [0, 1, 2])
def test_count_no_second_after_the_client_left(reads: int) -> None:
    """A disconnect counts from when it comes, also where the handler does not look for it, or no longer does."""
    leave = asyncio.Event()

    @billable(1, per="second")
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        for _ in range(reads):
            await websocket.receive_text()
        await leave.wait()

    async def story() -> None:
        hours = Hours()
        async with served(talk) as scene:
            async with scene.socket() as socket:
                await socket.opened()
                socket.say(*"ab"[:reads])
                await hours.pass_by(2.5)
                socket.leave(1006)
                await hours.pass_by(0)
                await hours.pass_by(20)
                leave.set()
            assert await scene.books() == (3, 0)
        assert [event.outcome for event in scene.events] == ["client_gone"]

    play(story)


def test_charge_nothing_for_seconds_before_the_accept() -> None:
    """What was never accepted costs nothing, however long it took."""
    waits, go = asyncio.Event(), asyncio.Event()

    @billable(1, per="second")
    async def talk(websocket: WebSocket) -> None:
        waits.set()
        await go.wait()
        await websocket.close()

    async def story() -> None:
        hours = Hours()
        async with served(talk) as scene:
            async with scene.socket() as socket:
                await waits.wait()
                await hours.pass_by(30)
                go.set()
            assert socket.kinds == ["close"]
            assert await scene.books() == (0, 0)

    play(story)

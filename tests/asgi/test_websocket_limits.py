"""Limits of the messages of a WebSocket."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.websockets import WebSocket, WebSocketDisconnect

from asgi_metering import (
    billable,
    rate_limited,
    slices,
)
from tests.asgi.sessions import Hours, Slow, echo, play, served
from tests.pitfalls.scene import Books


@pytest.mark.parametrize("on_excess", [None, "close", "drop", "answer"])
def test_limit_messages(on_excess: Any) -> None:
    """A message over its limit closes with 4429, is dropped, or is answered, as the route says; it costs nothing."""
    route = (billable(1, per="message"), rate_limited("3/minute", per="message", on_excess=on_excess))

    async def story() -> None:
        async with served(echo(*route)) as scene:
            async with scene.socket() as socket:
                socket.say(*"abcde")
                if on_excess == "answer":
                    texts = await socket.heard(5)
                    assert texts[:3] == ["a!", "b!", "c!"]
                    told = json.loads(texts[4])
                    assert (told["code"], told["status"], told["limit"]) == ("rate_limit", 429, 3)
                    assert 0 < told["retry_after"] <= 60
                elif on_excess == "drop":
                    await socket.until(lambda: len(socket.read) == 6)
                    assert socket.texts == ["a!", "b!", "c!"]
                if on_excess in ("drop", "answer"):
                    assert socket.closed is None
                    socket.leave()
            if on_excess in (None, "close"):
                assert socket.texts == ["a!", "b!", "c!"]
                assert socket.closed == (4429, "rate_limit: Quota exceeded")
            assert await scene.books() == (3, 0)
        outcome = "completed" if on_excess in ("drop", "answer") else "cut"
        assert [event.outcome for event in scene.events] == [outcome]

    play(story)


def test_name_the_level_that_refused_a_message() -> None:
    """S0.42: of a hierarchy the answer to a message too many names the level, as that to a request does."""
    route = rate_limited(levels={"payer": "1/minute", "caller": "9/minute"}, per="message", on_excess="answer")

    async def story() -> None:
        async with served(echo(route)) as scene, scene.socket() as socket:
            socket.say(*"ab")
            texts = await socket.heard(2)
            assert json.loads(texts[1])["level"] == "payer"
            socket.leave()

    play(story)


def test_answer_no_message_to_a_client_that_left() -> None:
    """An excess that cannot be answered is no error of whoever reads: the disconnect comes next, as of any client."""
    heard: list[int] = []

    @rate_limited("1/minute", per="message", on_excess="answer")
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.receive_text()
        with pytest.raises(WebSocketDisconnect) as left:
            await websocket.receive_text()
        heard.append(left.value.code)

    async def story() -> None:
        async with served(talk) as scene:
            async with scene.socket() as socket:
                await socket.opened()
                socket.say("a", "b")
                socket.leave(1006)
            assert socket.failure is None

    play(story)
    assert heard == [1006]


def test_let_others_run_while_messages_are_dropped() -> None:
    """A flood that is dropped, where the store answers at once, stops nobody else of the loop."""

    async def story() -> None:
        route = rate_limited("1/minute", per="message", on_excess="drop")
        async with served(echo(route)) as scene, scene.socket() as socket:
            await socket.opened()
            socket.say(*["x"] * 100)
            seen = 0
            while len(socket.read) < 101:
                seen += 1
                await asyncio.sleep(0)
            assert seen > 50
            socket.leave()

    play(story)


def test_answer_no_message_after_the_close() -> None:
    """A handler that reads on after its own close, until the client has heard it, says nothing more by us either."""

    @rate_limited("1/minute", per="message", on_excess="answer")
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.receive_text()
        await websocket.close()
        while (await websocket._receive())["type"] == "websocket.receive":
            pass

    async def story() -> None:
        async with served(talk) as scene:
            socket = scene.socket()
            socket.strict = True
            async with socket:
                socket.say("a", "b")
            assert (socket.failure, socket.kinds) == (None, ["accept", "close"])

    play(story)


def test_count_messages_of_one_caller_together() -> None:
    """Two sessions of a caller share its count; connections are counted apart, and both limits hold."""
    route = (rate_limited("2/minute"), rate_limited("2/minute", per="message"))

    async def story() -> None:
        async with served(echo(*route)) as scene:
            async with scene.socket() as first, scene.socket() as second:
                first.say("a")
                await first.heard(1)
                second.say("b")
                await second.heard(1)
                second.say("c")
                await second.until(lambda: second.closed)
                first.leave()
            assert second.closed == (4429, "rate_limit: Quota exceeded")
            async with scene.socket() as third:
                pass
            assert third.closed == (4429, "rate_limit: Quota exceeded")
            assert third.texts == []

    play(story)


def test_ask_the_store_once_for_each_message() -> None:
    """All limits of a message are one operation, whatever their number; a message that is let in holds nothing."""

    async def story() -> None:
        books = Books()
        days = rate_limited("90/day", "900/month", per="message", strategy="calendar")
        others = rate_limited("9/minute", "99/hour", per="message", key="address")
        async with served(echo(days, others), store=books) as scene:
            async with scene.socket() as socket:
                socket.say("a", "b")
                await socket.heard(2)
                socket.leave()
            assert [len(ask.limits) for ask in books.admissions] == [4, 4]
            assert len({ask.id for ask in books.admissions}) == 2
            assert await scene.account() == (0, 0)

    play(story)


def test_read_no_further_while_a_message_waits() -> None:
    """Back-pressure: while the store is asked for one message the next is left with the server, and so with TCP."""

    async def story() -> None:
        books = Slow()
        route = rate_limited("9/minute", per="message")
        async with served(echo(route), store=books) as scene, scene.socket() as socket:
            await socket.opened()
            books.door.clear()
            socket.say("a", "b", "c")
            await socket.until(lambda: len(socket.read) == 2)
            for _ in range(20):
                await asyncio.sleep(0)
            assert (len(socket.read), socket.texts) == (2, [])
            books.door.set()
            assert await socket.heard(3) == ["a!", "b!", "c!"]
            socket.leave()

    play(story)


def test_keep_a_message_whose_reader_gave_up() -> None:
    """A handler that waits with a timeout loses nothing: who asks again gets the message, counted and charged once."""
    given: list[str] = []

    @rate_limited("2/minute", per="message")
    @billable(1, per="message", hold=slices(1))
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        while len(given) < 2:
            try:
                async with asyncio.timeout(0.001):
                    given.append(await websocket.receive_text())
            except TimeoutError:
                tries.append(1)
                if len(tries) == 3:
                    books.door.set()
        await websocket.close()

    tries: list[int] = []

    async def story() -> None:
        global books
        books = Slow()
        async with served(talk, store=books) as scene:
            async with scene.socket() as socket:
                await socket.opened()
                books.door.clear()
                socket.say("a", "b")
            assert await scene.books() == (2, 0)

    play(story)
    assert given == ["a", "b"]
    assert len(tries) >= 3


books: Slow


@pytest.mark.parametrize(("choice", "heard"), [("deny", 0), ("allow", 3), ("local", 2)], ids=["deny", "allow", "local"])
def test_limit_messages_without_the_store(choice: Any, heard: int) -> None:
    """X.6: without an answer a message is let in, counted by this process alone, or closes the session with 4503."""
    route = rate_limited("2/minute", per="message", on_store_down=choice)

    async def story() -> None:
        books = Slow()
        async with served(echo(route), store=books) as scene:
            async with scene.socket() as socket:
                await socket.opened()
                books.down = True
                socket.say("a", "b", "c")
                if choice == "allow":
                    await socket.heard(3)
                    socket.leave()
            assert len(socket.texts) == heard
            codes = {"deny": (4503, "store_unavailable: Metering unavailable"), "allow": None}
            assert socket.closed == codes.get(choice, (4429, "rate_limit: Quota exceeded"))

    play(story)


@pytest.mark.parametrize("choice", ["deny", "allow"])
@pytest.mark.parametrize("per", ["message", "second"])
def test_lose_the_store_in_a_session(per: Any, choice: Any) -> None:
    """What was held goes on without the store; beyond it the session is closed with 4503, or charged at its end."""

    async def story() -> None:
        hours = Hours()
        books = Slow()
        route = billable(1, per=per, hold=slices(3), on_store_down=choice)
        async with served(echo(route), store=books, on_store_down={"rates": "allow"}) as scene:
            async with scene.socket() as socket:
                await socket.opened()
                books.down = True
                if per == "message":
                    socket.say(*"abcdef")
                else:
                    for _ in range(5):
                        await hours.pass_by(1)
                if choice == "allow":
                    await (socket.heard(6) if per == "message" else hours.pass_by(0.5))
                    assert socket.closed is None
                    socket.leave()
            books.down = False
            assert await scene.books() == ({"deny": 3, "allow": 6}[choice], 0)
            if choice == "deny":
                assert socket.closed == (4503, "store_unavailable: Metering unavailable")

    play(story)

"""The watch reads ahead for apps that never look: in order, bounded, one reader at a time; and frees a stuck `send`."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from asgi_metering.asgi.watch import ClientGone, Watch

REQUEST = {"type": "http.request", "body": b"", "more_body": False}
GONE = {"type": "http.disconnect"}


def piece(body: bytes, *, more: bool = True) -> dict[str, Any]:
    """One message of a request's body."""
    return {"type": "http.request", "body": body, "more_body": more}


class Server:
    """A server's two callables: messages as they come, and a `send` that may wait for ever."""

    def __init__(self, *messages: dict[str, Any], headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        for message in messages:
            self.queue.put_nowait(message)
        self.readers = 0
        self.most_readers = 0
        self.given: list[Any] = []
        self.sent: list[Any] = []
        self.free = asyncio.Event()
        self.free.set()
        self.fails: Exception | None = None
        self.heard = 0
        self.watch = Watch({"type": "http", "headers": list(headers)}, self.receive, self.send)

    async def receive(self) -> Any:
        """As a queue-based server: whoever asks takes a message away."""
        self.readers += 1
        self.most_readers = max(self.most_readers, self.readers)
        try:
            message = await self.queue.get()
        finally:
            self.readers -= 1
        self.given.append(message)
        return message

    async def send(self, message: Any) -> None:
        """Wait until the test lets it go."""
        if self.fails is not None:
            raise self.fails
        await self.free.wait()
        self.sent.append(message)

    def begin(self) -> None:
        """The response begins."""
        self.watch.start(self._hear, asyncio.get_running_loop())

    def _hear(self) -> None:
        self.heard += 1


def play(story: Coroutine[Any, Any, None]) -> None:
    """Run *story* within a bound."""

    async def bounded() -> None:
        async with asyncio.timeout(10):
            await story

    asyncio.run(bounded())


async def turns(count: int = 10) -> None:
    """Let everybody else go as far as they can."""
    for _ in range(count):
        await asyncio.sleep(0)


def test_see_a_client_leave_an_app_that_reads_nothing() -> None:
    """The disconnect behind an unread request is seen; the app still gets the request, and then the disconnect."""

    async def story() -> None:
        server = Server(REQUEST, GONE)
        server.begin()
        await turns()
        assert (server.watch.is_gone, server.heard) == (True, 1)
        assert [await server.watch.receive() for _ in range(4)] == [REQUEST, GONE, GONE, GONE]
        assert server.given == [REQUEST, GONE]
        assert server.heard == 1

    play(story())


def test_read_nothing_before_the_response_begins() -> None:
    """Before the response begins every read is the app's own."""

    async def story() -> None:
        server = Server(REQUEST, GONE)
        await turns()
        assert server.given == []
        assert await server.watch.receive() == REQUEST
        await turns()
        assert server.given == [REQUEST]
        assert await server.watch.receive() == GONE
        server.begin()
        server.watch.stop()
        assert (server.watch.is_gone, server.heard) == (True, 0)

    play(story())


def test_read_one_piece_of_a_body_ahead() -> None:
    """Of a body that the app does not read, no more than one piece is taken from the server; the rest stays there."""

    async def story() -> None:
        server = Server(piece(b"a"), piece(b"b"), piece(b"c", more=False), GONE)
        server.begin()
        await turns()
        assert [message["body"] for message in server.given] == [b"a"]
        received = [await server.watch.receive() for _ in range(4)]
        assert [message.get("body") for message in received] == [b"a", b"b", b"c", None]
        assert server.watch.is_gone

    play(story())


def test_ask_no_client_for_a_body_that_waits_for_its_leave() -> None:
    """A body behind ``Expect: 100-continue`` is asked for by the app alone; what follows it is read ahead again."""

    async def story() -> None:
        server = Server(piece(b"a", more=False), GONE, headers=((b"Expect", b"100-continue"),))
        server.begin()
        await turns()
        assert server.given == []
        assert await server.watch.receive() == piece(b"a", more=False)
        await turns()
        assert server.watch.is_gone

    play(story())


def test_never_read_beside_the_app() -> None:
    """While the app waits for a message itself the watch waits, and sees what the app gets."""

    async def story() -> None:
        server = Server(REQUEST)
        await server.watch.receive()
        listening = asyncio.create_task(server.watch.receive())
        await turns()
        server.begin()
        await turns()
        server.queue.put_nowait(GONE)
        assert await listening == GONE
        assert (server.heard, server.most_readers) == (1, 1)

    play(story())


def test_go_on_where_the_app_stopped_reading() -> None:
    """An app that gives up waiting leaves the rest to the watch; one that waits for the watch takes nothing away."""

    async def story() -> None:
        server = Server(REQUEST)
        await server.watch.receive()
        server.begin()
        for _ in range(2):
            listening = asyncio.create_task(server.watch.receive())
            await turns()
            listening.cancel()
            await asyncio.wait([listening])
        server.queue.put_nowait(GONE)
        await turns()
        assert (server.heard, server.most_readers) == (1, 1)
        assert await server.watch.receive() == GONE

    play(story())


def test_free_a_send_that_waits_when_the_client_leaves() -> None:
    """A `send` that does not return although the client has left raises ClientGone, an OSError."""

    async def story() -> None:
        server = Server(REQUEST)
        server.begin()
        server.free.clear()
        sending = asyncio.create_task(server.watch.send(piece(b"x")))
        await turns()
        assert not sending.done()
        server.queue.put_nowait(GONE)
        with pytest.raises(ClientGone):
            await sending
        assert issubclass(ClientGone, OSError)

    play(story())


def test_free_a_send_that_comes_after_the_client_left() -> None:
    """What is sent to a client that left goes to the server, and is given up if that does not take it."""

    async def story() -> None:
        server = Server(REQUEST, GONE)
        server.begin()
        await turns()
        await server.watch.send(piece(b"x"))
        server.free.clear()
        with pytest.raises(ClientGone):
            await server.watch.send(piece(b"y"))
        assert server.sent == [piece(b"x")]

    play(story())


def test_let_a_send_return_that_was_slow() -> None:
    """A client that stays may take its time; the server's own timeout is passed on as it is."""

    async def story() -> None:
        server = Server(REQUEST)
        server.begin()
        server.free.clear()
        sending = asyncio.create_task(server.watch.send(piece(b"x")))
        await turns()
        server.free.set()
        await sending
        assert server.sent == [piece(b"x")]
        server.fails = TimeoutError("The server's own.")
        with pytest.raises(TimeoutError, match="The server's own"):
            await server.watch.send(piece(b"y"))

    play(story())


def test_stop_with_the_request() -> None:
    """When the request is over nobody reads on."""

    async def story() -> None:
        server = Server(REQUEST)
        server.begin()
        await turns()
        assert server.readers == 1
        server.watch.stop()
        await turns()
        assert server.readers == 0

    play(story())

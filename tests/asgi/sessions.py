"""
What tests of WebSockets play on: an application behind the middleware, its books, and a client in process.

Everything is real but the network, and time where a test moves it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from asgi_metering import Caller, Metering, MeteringMiddleware, current_call
from asgi_metering.errors import StoreUnavailableError
from asgi_metering.events.sinks import CallbackSink
from asgi_metering.receipts import Entry, EntryKind
from asgi_metering.rules.conservation import discrepancies
from asgi_metering.rules.decide import Answer
from asgi_metering.rules.operations import Admit, Grow, Operation
from asgi_metering.stores.contract import AccountRows
from tests.harness.drive import lifespan
from tests.harness.sockets import Socket
from tests.pitfalls.scene import Books

__all__ = ["CREDIT", "Hours", "Served", "Slow", "denies", "echo", "obedient", "play", "says_nothing", "served", "who"]

CREDIT = 1_000_000


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

    def __init__(self, app: ASGIApp, metering: Metering, events: list[Any], limits: Sequence[Any] = ()) -> None:
        self.metering = metering
        self.app: ASGIApp = MeteringMiddleware(app, metering=metering, application_limits=[*limits])  # type: ignore[assignment]
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
async def served(
    endpoint: Any, *, granted: int = 100, application_limits: Sequence[Any] = (), **options: Any
) -> AsyncIterator[Served]:
    """
    Serve *endpoint* at ``/ws`` with its lifespan around it.

    Args:
        endpoint: Of a `WebSocketRoute`, or a whole application.
        granted: What ann has.
        application_limits: Of the middleware.
        options: Of the `Metering`.
    """
    events: list[Any] = []
    metering = Metering(**{"store": "memory://", "identify": who, "sinks": [CallbackSink(events.extend)], **options})
    app = endpoint if hasattr(endpoint, "routes") else Starlette(routes=[WebSocketRoute("/ws", endpoint)])
    scene = Served(app, metering, events, application_limits)
    async with lifespan(scene.app):
        if granted:
            await metering.grant("ann", granted, id="g")
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


class Hours:
    """The time of the running loop, which the test moves."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._real, self._ahead = self._loop.time, 0.0
        self._loop.time = self  # type: ignore[method-assign]

    def __call__(self) -> float:
        return self._real() + self._ahead

    async def pass_by(self, seconds: float) -> None:
        """So many seconds are over; what was to be done meanwhile is done."""
        self._ahead += seconds
        # A timer that is far away is not looked for otherwise.
        for _ in range(20):
            await asyncio.sleep(0)


class Slow(Books):
    """Books of a store with round trips, which a test may hold up or take down."""

    immediate = False
    down = False

    def __init__(self) -> None:
        super().__init__()
        self.door = asyncio.Event()
        self.door.set()

    async def run(self, operations: Any) -> list[Any]:
        if any(isinstance(each, Admit | Grow) for each in operations):
            await self.door.wait()
        return await super().run(operations)

    def run_now(self, operation: Operation) -> Answer:
        if self.down and isinstance(operation, Admit | Grow):
            raise StoreUnavailableError("The store is down.")
        return super().run_now(operation)


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
            if text == "deny":
                raise HTTPException(403)
            if text == "fail":
                current_call().fail("overloaded")
                return
            await websocket.send_text(text)

    for decorate in reversed(decorators):
        talk = decorate(talk)
    return talk


async def denies(scope: Scope, receive: Receive, send: Send) -> None:
    """The application's own denial response."""
    await receive()
    await send({"type": "websocket.http.response.start", "status": 404, "headers": []})
    await send({"type": "websocket.http.response.body", "body": b"no such room"})


async def says_nothing(scope: Scope, receive: Receive, send: Send) -> None:
    """Neither."""

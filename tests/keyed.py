"""
What tests of keys play on: books of either store, one application with an endpoint of every kind, and how to ask it.

Every endpoint counts its runs in `RAN`; `ann` has 100 credits.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from fastapi.sse import EventSourceResponse
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from asgi_metering import Caller, Idempotency, Metering, MeteringMiddleware, billable, current_call, metered_app
from asgi_metering.stores.contract import Store
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.stores.urls import store_from_url
from asgi_metering.testing import FakeClock
from tests.harness.drive import Drive, drive, http_scope, lifespan

__all__ = ["ANN", "PRICE", "Desk", "asked", "at_desk", "keyed_app", "store_of"]

ANN = "ann"
PRICE = 2

Result = TypeVar("Result")


def store_of(kind: str, folder: Path, clock: FakeClock | None = None) -> Store:
    """An empty store of either kind."""
    if kind == "memory":
        return MemoryStore() if clock is None else MemoryStore(clock)
    return store_from_url(f"sqlite:///{folder / 'books.db'}")


def identify(connection: HTTPConnection) -> Caller | None:
    key = connection.headers.get("x-api-key")
    return Caller(key, payer=connection.headers.get("x-payer", key)) if key else None


def asked(
    path: str = "/json", *, key: str | None = "k-1", method: str = "POST", caller: str | None = ANN, **options: Any
) -> Scope:
    """The scope of a request with an idempotency key."""
    fields = [("content-type", "application/json"), *options.pop("headers", ())]
    if key is not None:
        fields.append(("idempotency-key", key))
    if caller is not None:
        fields.append(("x-api-key", caller))
    return http_scope(path, method, headers=fields, **options)


@dataclass
class Desk:
    """
    An application behind the middleware.

    Attributes:
        ran: What ran, in order.
        gate: Endpoints of ``/held`` wait for it.
        entered: Set when one of them runs.
    """

    store: Store
    ran: list[Any] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    entered: asyncio.Event = field(default_factory=asyncio.Event)
    metering: Metering = field(init=False)
    app: ASGIApp = field(init=False)

    def __post_init__(self) -> None:
        self.metering = Metering(self.store, identify=identify, sinks=(), store_timeout_s=30.0)

    async def ask(self, path: str = "/json", *, body: Any = b"{}", faults: Any = None, **options: Any) -> Drive:
        """One request to its end, its call booked."""
        ended = await drive(self.app, asked(path, **options), body=body, **(faults or {}))
        await self.booked()
        return ended

    async def booked(self) -> None:
        async with asyncio.timeout(10):
            while self.metering.runtime().busy:
                await asyncio.sleep(0.001)

    async def spent(self, payer: str = ANN) -> float:
        """Whole credits that *payer* has spent; nothing is held any more."""
        balance = await self.metering.balance(payer)
        assert balance.held == 0
        return balance.settled / 1_000_000


def at_desk(
    make: Callable[[Desk], ASGIApp], story: Callable[[Desk], Coroutine[Any, Any, Result]], store: Store
) -> Result:
    """Run *story* at a desk with the application of *make*, its lifespan around it."""

    @asynccontextmanager
    async def opened() -> AsyncIterator[Desk]:
        desk = Desk(store)
        desk.app = MeteringMiddleware(make(desk), metering=desk.metering)
        async with lifespan(desk.app):
            await desk.metering.grant(ANN, 100, id="g")
            yield desk

    async def play() -> Result:
        async with opened() as desk:
            return await story(desk)

    return asyncio.run(play())


def keyed_app(desk: Desk, **options: Any) -> ASGIApp:
    """FastAPI, Starlette and plain ASGI endpoints that run once per key, and keep what they answer."""
    once = Idempotency(**{"store_body": 65_536, **options})
    api = FastAPI()
    ran = desk.ran

    @api.post("/json")
    @billable(PRICE, idempotency=once)
    async def json(body: dict[str, Any]) -> Any:
        ran.append(body)
        return JSONResponse({"run": len(ran), **body}, 201, {"set-cookie": "session=secret", "x-own": "1"})

    @api.post("/sync")
    @billable(PRICE, idempotency=once)
    def sync(body: dict[str, Any]) -> dict[str, Any]:
        ran.append(body)
        return {"run": len(ran)}

    @api.post("/held")
    @billable(PRICE, idempotency=once)
    async def held(body: dict[str, Any]) -> dict[str, Any]:
        ran.append(body)
        desk.entered.set()
        await desk.gate.wait()
        return {"run": len(ran)}

    @api.post("/sse", response_class=EventSourceResponse)
    @billable(PRICE, idempotency=once)
    async def sse(body: dict[str, Any]) -> AsyncIterator[str]:
        ran.append(body)
        for number in range(3):
            yield f"{len(ran)}.{number}"

    @api.post("/sse-sync", response_class=EventSourceResponse)
    @billable(PRICE, idempotency=once)
    def sse_sync(body: dict[str, Any]) -> Iterator[str]:
        ran.append(body)
        for number in range(3):
            yield f"{len(ran)}.{number}"

    @api.post("/stream")
    @billable(PRICE, idempotency=once)
    async def stream(body: dict[str, Any]) -> StreamingResponse:
        ran.append(body)

        async def chunks() -> AsyncIterator[str]:
            for number in range(3):
                yield f"{len(ran)}.{number};"

        return StreamingResponse(chunks(), media_type="text/plain")

    @api.post("/broken")
    @billable(PRICE, idempotency=once)
    async def broken(body: dict[str, Any]) -> Any:
        ran.append(body)
        return JSONResponse({"run": len(ran)}, 500 if len(ran) == 1 else 200)

    @api.post("/charged-failure")
    @billable(PRICE, idempotency=once, on_error="hold")
    async def charged_failure(body: dict[str, Any]) -> Any:
        ran.append(body)
        return JSONResponse({"run": len(ran)}, 502)

    @api.post("/failing")
    @billable(PRICE, idempotency=once)
    async def failing(body: dict[str, Any]) -> Any:
        ran.append(body)
        current_call().fail("overloaded")
        return {"run": len(ran)}

    @api.post("/free")
    @billable(0, idempotency=once)
    async def free(body: dict[str, Any]) -> dict[str, Any]:
        ran.append(body)
        return {"run": len(ran)}

    @api.post("/doubtful")
    @billable(PRICE, idempotency=once, on_abort="hold", ttl_s=0.2, grace_s=0.2)
    async def doubtful(body: dict[str, Any]) -> dict[str, Any]:
        ran.append(body)
        if "KEYED_CRASH" in os.environ:
            os.kill(os.getpid(), signal.SIGKILL)
        desk.entered.set()
        await desk.gate.wait()
        return {"run": len(ran)}

    @billable(PRICE, idempotency=once)
    async def reads_later(request: Request) -> PlainTextResponse:
        text = await request.body()
        ran.append(text)
        return PlainTextResponse(text)

    @billable(PRICE, idempotency=once)
    async def empty(_request: Request) -> PlainTextResponse:
        ran.append("empty")
        return PlainTextResponse(status_code=204)

    @billable(PRICE, idempotency=once)
    async def file(_request: Request) -> FileResponse:
        ran.append("file")
        return FileResponse(__file__)

    async def plain(scope: Scope, receive: Receive, send: Send) -> None:
        received = b""
        while True:
            message = await receive()
            received += message.get("body", b"")
            if not message.get("more_body", False):
                break
        ran.append(received)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": received})

    low = Starlette(
        routes=[
            Route("/later", reads_later, methods=["POST"]),
            Route("/empty", empty, methods=["POST"]),
            Route("/file", file, methods=["POST"]),
            Mount("/whole", metered_app(plain, billable(PRICE, idempotency=once), name="whole")),
        ]
    )
    api.mount("/low", low)
    return api

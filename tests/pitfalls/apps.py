"""
Applications whose endpoints are of every kind that frameworks know, all at the same price.

Each says into `ran` that its body runs: a refused one must not.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from fastapi.sse import EventSourceResponse
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.responses import StreamingResponse as StarletteStream
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from asgi_metering import Metering, MeteringMiddleware, billable, metered_app

__all__ = [
    "FASTAPI_KINDS",
    "GENERATORS",
    "HOW",
    "PRICE",
    "STARLETTE_KINDS",
    "How",
    "fastapi_app",
    "installed",
    "starlette_app",
]

PRICE = 2

GENERATORS = ("async-sse", "sync-sse", "async-jsonl", "sync-jsonl", "async-raw", "sync-raw")
FASTAPI_KINDS = ("async", "sync", *GENERATORS)
STARLETTE_KINDS = ("async", "sync", "class/async", "class/sync", "stream", "mounted/app/", "mounted/class")

How = Literal["added", "wrapped"]
HOW: tuple[How, ...] = ("added", "wrapped")


def installed(app: Any, metering: Metering, how: How) -> ASGIApp:
    """*app* behind the whole stack: by `add_middleware`, or wrapped from outside."""
    if how == "wrapped":
        return MeteringMiddleware(app, metering)
    app.add_middleware(MeteringMiddleware, metering=metering)
    return app


def fastapi_app(ran: list[str]) -> FastAPI:
    """One route for each of `FASTAPI_KINDS`."""
    app = FastAPI()

    @app.get("/async")
    @billable(PRICE)
    async def async_function() -> dict[str, int]:
        ran.append("async")
        return {"n": 1}

    @app.get("/sync")
    @billable(PRICE)
    def sync_function() -> dict[str, int]:
        ran.append("sync")
        return {"n": 1}

    @app.get("/async-sse", response_class=EventSourceResponse)
    @billable(PRICE)
    async def async_sse() -> AsyncIterable[dict[str, int]]:
        ran.append("async-sse")
        yield {"n": 1}
        yield {"n": 2}

    @app.get("/sync-sse", response_class=EventSourceResponse)
    @billable(PRICE)
    def sync_sse() -> Iterable[dict[str, int]]:
        ran.append("sync-sse")
        yield {"n": 1}
        yield {"n": 2}

    @app.get("/async-jsonl")
    @billable(PRICE)
    async def async_jsonl() -> AsyncIterable[dict[str, int]]:
        ran.append("async-jsonl")
        yield {"n": 1}
        yield {"n": 2}

    @app.get("/sync-jsonl")
    @billable(PRICE)
    def sync_jsonl() -> Iterable[dict[str, int]]:
        ran.append("sync-jsonl")
        yield {"n": 1}
        yield {"n": 2}

    @app.get("/async-raw", response_class=StreamingResponse)
    @billable(PRICE)
    async def async_raw() -> AsyncIterator[str]:
        ran.append("async-raw")
        yield "one"
        yield "two"

    @app.get("/sync-raw", response_class=StreamingResponse)
    @billable(PRICE)
    def sync_raw() -> Iterator[str]:
        ran.append("sync-raw")
        yield "one"
        yield "two"

    return app


def starlette_app(ran: list[str]) -> Starlette:
    """One route for each of `STARLETTE_KINDS`."""

    @billable(PRICE)
    async def async_function(request: Request) -> JSONResponse:
        ran.append("async")
        return JSONResponse({"n": 1})

    @billable(PRICE)
    def sync_function(request: Request) -> JSONResponse:
        ran.append("sync")
        return JSONResponse({"n": 1})

    class AsyncClass(HTTPEndpoint):
        @billable(PRICE)
        async def get(self, request: Request) -> JSONResponse:
            ran.append("class/async")
            return JSONResponse({"n": 1})

    class SyncClass(HTTPEndpoint):
        @billable(PRICE)
        def get(self, request: Request) -> JSONResponse:
            ran.append("class/sync")
            return JSONResponse({"n": 1})

    @billable(PRICE)
    async def stream(request: Request) -> StarletteStream:
        async def chunks() -> AsyncIterator[str]:
            ran.append("stream")
            yield "one"
            yield "two"

        return StarletteStream(chunks())

    async def plain(scope: Scope, receive: Receive, send: Send) -> None:
        ran.append("mounted/app/")
        await PlainTextResponse("one")(scope, receive, send)

    class Whole(HTTPEndpoint):
        async def get(self, request: Request) -> PlainTextResponse:
            ran.append("mounted/class")
            return PlainTextResponse("one")

    return Starlette(
        routes=[
            Route("/async", async_function),
            Route("/sync", sync_function),
            Route("/class/async", AsyncClass),
            Route("/class/sync", SyncClass),
            Route("/stream", stream),
            Mount("/mounted/app", metered_app(plain, billable(PRICE))),
            Route("/mounted/class", metered_app(Whole, billable(PRICE))),
        ]
    )

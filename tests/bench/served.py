"""What the end-to-end benchmark serves: one small endpoint, bare, behind the whole stack, or behind a peer."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from asgi_metering import Caller, Metering, MeteringMiddleware, billable, rate_limited
from asgi_metering.events.sinks import CallbackSink
from tests.bench.subjects import PLENTY, forget

__all__ = ["PEER", "STORE", "bare", "metered", "peer"]

PEER = "METERING_BENCH_PEER"
"""The environment variable that names one of `peers.PEERS`."""

STORE = "METERING_BENCH_STORE"
"""The environment variable that names the store's URL."""


async def plain(_request: Request) -> JSONResponse:
    """The endpoint."""
    return JSONResponse({"ok": True})


def bare() -> Starlette:
    """The application as it is."""
    return Starlette(routes=[Route("/hit", plain)])


def metered() -> Starlette:
    """The same with three limits, a lease, a hold, a settlement and a usage event for each request."""
    metering = Metering(
        os.environ[STORE],
        identify=lambda connection: Caller(connection.headers["x-key"]),
        sinks=[CallbackSink(forget, "forgotten")],
        store_timeout_s=10.0,
    )

    @asynccontextmanager
    async def granted(_app: Starlette) -> AsyncIterator[None]:
        await metering.grant("bench", 1_000_000_000, id="bench")
        yield

    paid = rate_limited(*PLENTY, concurrency=1_000)(billable(1)(plain))
    app = Starlette(routes=[Route("/hit", paid)], lifespan=granted)
    app.add_middleware(MeteringMiddleware, metering=metering)
    return app


async def peer(scope: Any, receive: Any, send: Any) -> None:
    """The application of one peer, opened with its lifespan."""
    # Only `tox run -e bench-peers` has what they are made of.
    from tests.bench.peers import PEERS, opened

    if scope["type"] == "lifespan":
        (chosen,) = [each for each in PEERS if each.name == os.environ[PEER]]
        await receive()
        async with opened(chosen, store=os.environ[STORE]) as app:
            _opened.append(app)
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})
    else:
        await _opened[0](scope, receive, send)


_opened: list[Any] = []

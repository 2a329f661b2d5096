"""Pitfalls 35, 36 and 38: bodies that are compressed, files, trailers, none, or never finished."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse

from asgi_metering import (
    billable,
    metered_app,
)
from asgi_metering.prices import per_token
from tests.pitfalls.stage import staged
from tests.pitfalls.streams import USAGE, plain, starlette


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_reads_usage_from_a_compressed_body(encoding: str) -> None:
    """Pitfall 35: GZip inside of the metering hides nothing: compressed usage is read."""
    text = json.dumps({"object": "chat.completion", **USAGE, "choices": [{}]}).encode()
    packed = gzip.compress(text) if encoding == "gzip" else zlib.compress(text)

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"application/json"), (b"content-encoding", encoding.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for byte in packed[:-1]:
            await send({"type": "http.response.body", "body": bytes([byte]), "more_body": True})
        await send({"type": "http.response.body", "body": packed[-1:]})

    async def play() -> None:
        price = per_token(input=1, output=10)
        async with staged(metered_app(plain(app), billable(price, hold=100))) as stage:
            await stage.drive()
            assert [entry.amount for entry in await stage.charges()] == [29_000_000]

    asyncio.run(play())


def test_file_by_path_is_the_end_and_counts_as_sent() -> None:
    """Pitfall 36: `http.response.pathsend` is one message, the whole body and the end of the response."""

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
        await send({"type": "http.response.pathsend", "path": "/tmp/report"})

    async def play() -> None:
        async with staged(metered_app(plain(app), billable(2))) as stage:
            await stage.drive(extensions={"http.response.pathsend": {}})
            assert await stage.outcomes() == ["completed"]
            assert await stage.basis() == ("usage",)

    asyncio.run(play())


def test_trailers_end_the_response_that_announced_them() -> None:
    """Pitfall 36: with trailers announced, the last body message is not the end; the last trailers are."""

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [], "trailers": True})
        await send({"type": "http.response.body", "body": b"a"})
        if trailers:
            await send({"type": "http.response.trailers", "headers": [], "more_trailers": False})

    async def play() -> str:
        async with staged(metered_app(plain(app), billable(2))) as stage:
            await stage.drive(extensions={"http.response.trailers": {}})
            return (await stage.outcomes())[0]

    trailers = True
    assert asyncio.run(play()) == "completed"
    trailers = False
    assert asyncio.run(play()) == "aborted"


def test_head_is_free_and_counts_no_bytes() -> None:
    """Pitfall 36: a HEAD request runs the endpoint of GET and is neither held, charged nor reported."""

    @billable(2)
    async def endpoint(_request: Request) -> JSONResponse:
        return JSONResponse({"body": "that is not sent"})

    async def play() -> None:
        async with staged(starlette(endpoint)) as stage:
            ended = await stage.drive(method="HEAD")
            assert ended.outcome == "returned"
            assert await stage.charges() == []
            assert await stage.outcomes() == []

    asyncio.run(play())


def test_settles_although_the_generators_finally_never_ran() -> None:
    """Pitfall 38: an abandoned generator's `finally` may run much later or never; the end does not wait for it."""
    kept: list[Any] = []

    @billable(2)
    async def endpoint(_request: Request) -> StreamingResponse:
        async def body() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield b"tick"
            finally:
                finished.append(True)

        generator = body()
        kept.append(generator)
        return StreamingResponse(generator)

    finished: list[bool] = []

    async def play() -> None:
        async with staged(starlette(endpoint)) as stage:
            await stage.drive(disconnect_at=3)
            assert await stage.basis() == ("observed",)
            assert finished == []
            await kept[0].aclose()

    asyncio.run(play())

"""
The application that every server of these tests serves: a few metered routes, priced fixed or per token.

Configured by the environment, since servers import it by name. Writes down what ran through `tests.harness.apps`.

==================  ======================================================================================
path                answer
==================  ======================================================================================
``/json``           2 credits: JSON at once
``/limited``        2 credits, and two calls an hour
``/file``           2 credits: a file of 200,000 bytes
``/words``          1 credit a token: a chat stream of ``n`` words, ``pause_ms`` apart, with its usage at the end
``/brief``          the same on a hold of 3 s (2 s, and 1 s of grace), for processes that die
``/torn``           1 credit a token: two words and half an event, and nothing more until the client leaves
``/burst``          1 credit a token: words as fast as the server takes them; the generator never waits
``/slow``           2 credits: JSON, once ``until`` is a file in the folder of gates
``/upload``         2 credits: the length of the body, which the endpoint reads
``/told``           1 credit a token: a call that reports 7 tokens at once, and answers as ``/slow``
``/raw/burst/``     2 credits: no framework, 64 KiB chunks (``n``) in a loop that never looks for the client
``/raw/trailers/``  2 credits: no framework, a body that announces trailers, and then the trailers
==================  ======================================================================================

Under ``/watched`` the same routes are behind a layer with ``stop_on_disconnect=True``.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import FileResponse, JSONResponse, StreamingResponse
from starlette.routing import Mount, Route
from starlette.types import Receive, Scope, Send

from asgi_metering import Caller, Metering, MeteringMiddleware, TokenUsage, billable, current_call, metered_app
from asgi_metering import rate_limited as limited
from asgi_metering.prices import per_token
from tests.harness.apps import note

__all__ = ["FILE_BYTES", "GATES", "HOLD", "OPTIONS", "STORE", "app", "delta"]

STORE, GATES, OPTIONS = "SERVERS_STORE", "SERVERS_GATES", "SERVERS_OPTIONS"
"""Variables: the store's URL, a folder, and arguments of `Metering` as JSON."""

HOLD = 1_000
"""What a call that is charged per token sets aside, in credits."""

FILE_BYTES = 200_000

_CHUNK = b"x" * 65_536
_PER_TOKEN: dict[str, Any] = {"hold": HOLD, "line": "words"}


def who(connection: HTTPConnection) -> Caller | None:
    """The key is the caller."""
    key = connection.headers.get("x-api-key")
    return Caller(key) if key else None


def delta(word: str) -> bytes:
    """One event of a chat stream."""
    chunk = {"object": "chat.completion.chunk", "model": "echo", "choices": [{"delta": {"content": word}}]}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def _ending(words: int) -> bytes:
    usage = {"prompt_tokens": 0, "completion_tokens": words, "total_tokens": words}
    return b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\ndata: [DONE]\n\n"


def _sse(body: AsyncIterator[bytes]) -> StreamingResponse:
    return StreamingResponse(body, media_type="text/event-stream")


@billable(2)
async def plain(request: Request) -> JSONResponse:
    """A fixed price."""
    note("ran", path="/json", key=request.headers.get("x-api-key"))
    return JSONResponse({"pid": os.getpid()})


@limited("2/hour")
@billable(2)
async def twice(request: Request) -> JSONResponse:
    """A fixed price, and a limit."""
    note("ran", path="/limited", key=request.headers.get("x-api-key"))
    return JSONResponse({})


@billable(2)
async def file(_request: Request) -> FileResponse:
    """A file, by its path where the server takes one."""
    path = Path(os.environ[GATES]) / "file"
    path.write_bytes(b"x" * FILE_BYTES)
    return FileResponse(path)


async def _words(request: Request) -> StreamingResponse:
    count, pause_s = int(request.query_params["n"]), int(request.query_params.get("pause_ms", "0")) / 1_000

    async def body() -> AsyncIterator[bytes]:
        for number in range(count):
            yield delta(f" {number % 1_000}")
            await asyncio.sleep(pause_s)
        yield _ending(count)

    return _sse(body())


words = billable(per_token(output=1), **_PER_TOKEN)(_words)


async def brief(request: Request) -> StreamingResponse:
    """Words on a short hold."""
    return await _words(request)


brief = billable(per_token(output=1), ttl_s=2, grace_s=1, **_PER_TOKEN)(brief)


@billable(per_token(output=1), **_PER_TOKEN)
async def torn(request: Request) -> StreamingResponse:
    """An event that never comes to its end."""

    async def body() -> AsyncIterator[bytes]:
        yield delta(" one") + delta(" two")
        yield delta(" three")[:-20]
        note("torn", key=request.headers.get("x-api-key"))
        await asyncio.Event().wait()

    return _sse(body())


@billable(per_token(output=1), **_PER_TOKEN)
async def burst(request: Request) -> StreamingResponse:
    """Words without a pause: only `send` gives others a turn."""

    async def body() -> AsyncIterator[bytes]:
        count = int(request.query_params["n"])
        event = delta(" word") + b":" + b"x" * 16_384 + b"\n\n"
        for _ in range(count):
            yield event
        yield _ending(count)

    return _sse(body())


async def _gate(request: Request) -> None:
    path = Path(os.environ[GATES]) / request.query_params["until"]
    note("waits", until=path.name)
    while not path.exists():
        await asyncio.sleep(0.01)


@billable(2)
async def slow(request: Request) -> JSONResponse:
    """An endpoint that takes its time before it answers."""
    await _gate(request)
    note("ran", path="/slow", key=request.headers.get("x-api-key"))
    return JSONResponse({})


@billable(per_token(output=1), **_PER_TOKEN)
async def told(request: Request) -> JSONResponse:
    """Usage is known before the answer is."""
    current_call().record(TokenUsage(input=0, output=7))
    await _gate(request)
    return JSONResponse({})


@billable(2)
async def upload(request: Request) -> JSONResponse:
    """An endpoint that reads the body."""
    note("waits", until=request.headers.get("x-api-key"))
    return JSONResponse({"length": len(await request.body())})


async def _raw_burst(scope: Scope, receive: Receive, send: Send) -> None:
    count = int(parse_qs(scope["query_string"].decode())["n"][0])
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(count):
        await send({"type": "http.response.body", "body": _CHUNK, "more_body": True})
    await send({"type": "http.response.body"})


async def _raw_trailers(scope: Scope, receive: Receive, send: Send) -> None:
    trailers = "http.response.trailers" in scope.get("extensions", {})
    await send({"type": "http.response.start", "status": 200, "headers": [], "trailers": trailers})
    await send({"type": "http.response.body", "body": b"body"})
    note("body", key=dict(scope["headers"]).get(b"x-api-key", b"").decode())
    if trailers:
        await send({"type": "http.response.trailers", "headers": [(b"x-sum", b"4")]})


ROUTES = [
    Route("/json", plain, methods=["GET", "POST", "OPTIONS"]),
    Route("/limited", twice),
    Route("/file", file),
    Route("/words", words),
    Route("/brief", brief),
    Route("/torn", torn),
    Route("/burst", burst),
    Route("/slow", slow),
    Route("/told", told),
    Route("/upload", upload, methods=["POST"]),
    Mount("/raw/burst", metered_app(_raw_burst, billable(2, line="raw"))),
    Mount("/raw/trailers", metered_app(_raw_trailers, billable(2, line="raw"))),
]

metering = Metering(
    os.environ.get(STORE, "memory://"), identify=who, sinks=(), **json.loads(os.environ.get(OPTIONS, "{}"))
)
_routes = Starlette(routes=[*ROUTES, Mount("/watched", routes=ROUTES)])
_plain = MeteringMiddleware(_routes, metering=metering)
_watched = MeteringMiddleware(_routes, metering=metering, stop_on_disconnect=True)


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """The layer by path; the lifespan is the plain one's."""
    watched = scope["type"] == "http" and scope["path"].startswith("/watched/")
    await (_watched if watched else _plain)(scope, receive, send)

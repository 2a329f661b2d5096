"""
The application that every server of these tests serves: a few metered routes, priced fixed or per token.

Configured by the environment, since servers import it by name. Writes down what ran through `tests.harness.apps`.

==================  ======================================================================================
path                answer
==================  ======================================================================================
``/json``           2 credits: JSON at once
``/limited``        2 credits, and two calls an hour
``/file``           2 credits: a file
``/words``          1 credit a token: a chat stream of ``n`` words, ``pause_ms`` apart, with its usage at the end
``/brief``          the same on a hold that lives for 1 s without a heartbeat
``/drained``        the same as ``/words``, which goes on for a client that left
``/torn``           1 credit a token: two words and half an event, and nothing more until the client leaves
``/burst``          1 credit a token: ``n`` words as fast as the server takes them; the generator never waits
``/slow``           2 credits: JSON, once ``until`` is a file in the folder of gates
``/slow/brief``     the same on a hold that lives for 1 s without a heartbeat
``/sliced``         1 credit a token, held in slices of 5: words without end, 2 ms apart, in the form ``as``: ``sse``;
                    ``gzip``, compressed; ``silent``: twelve words, and nothing more
``/told``           1 credit a token: the endpoint reports 7 tokens at once, and answers as ``/slow``
``/upload``         2 credits: the length of the body, which the endpoint reads
``/raw/burst/``     2 credits: no framework, ``n`` chunks of 64 KiB in a loop that never looks for the client
``/raw/ticks/``     2 credits: no framework, 16 KiB every 5 ms, without end and without looking
``/raw/trailers/``  2 credits: no framework, a body, and trailers behind it where the server has them
``/ws``             2 credits: a WebSocket that says everything back, and does what it is told
``/ws/messages``    1 credit a message, held in slices of 3, and two connections of a caller at once: the same
``/ws/brief``       the same on a hold that lives for 1 s without a heartbeat
``/ws/limited``     the same for nothing, and three messages an hour
``/ws/relay``       1 credit a token, held in slices of 50: a WebSocket that relays what it is told to say
``/ws/free``        not metered: the same
``/desk``           free: what ``payer`` has, after a grant of ``credits`` if there are any
==================  ======================================================================================

Under ``/watched`` the same routes are behind a layer with ``stop_on_disconnect=True``.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import FileResponse, JSONResponse, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket

from asgi_metering import (
    Caller,
    Metering,
    MeteringMiddleware,
    TokenUsage,
    billable,
    current_call,
    metered_app,
    rate_limited,
    slices,
)
from asgi_metering.prices import per_token
from asgi_metering.receipts import EntryKind
from tests.harness.apps import note
from tests.servers.books import deliver_to

__all__ = ["EVENTS", "FILE_BYTES", "GATES", "HOLD", "OPTIONS", "STORE", "app"]

STORE, EVENTS, GATES, OPTIONS = "SERVERS_STORE", "SERVERS_EVENTS", "SERVERS_GATES", "SERVERS_OPTIONS"
"""Variables: the store's URL, the file for usage events, a folder, and arguments of `Metering` as JSON."""

HOLD = 1_000
"""What a call that is charged per token sets aside, in credits."""

FILE_BYTES = 200_000

_CHUNK = b"x" * 65_536
_PER_TOKEN: dict[str, Any] = {"hold": HOLD, "line": "words"}


_BRIEF: dict[str, Any] = {"ttl_s": 1}


def who(connection: HTTPConnection) -> Caller | None:
    """The key names the caller."""
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


@rate_limited("2/hour")
@billable(2)
async def twice(request: Request) -> JSONResponse:
    """A fixed price, and a limit."""
    note("ran", path="/limited", key=request.headers.get("x-api-key"))
    return JSONResponse({})


@billable(2)
async def file(request: Request) -> FileResponse:
    """A file, by its path where the server takes one."""
    note("file", by_path="http.response.pathsend" in request.scope.get("extensions", {}))
    path = Path(os.environ[GATES]) / "file"
    path.write_bytes(b"x" * FILE_BYTES)
    return FileResponse(path)


def _words(request: Request) -> StreamingResponse:
    count, pause_s = int(request.query_params["n"]), int(request.query_params.get("pause_ms", "0")) / 1_000

    async def body() -> AsyncIterator[bytes]:
        for number in range(count):
            yield delta(f" {number % 1_000}")
            await asyncio.sleep(pause_s)
        yield _ending(count)

    return _sse(body())


@billable(per_token(output=1), **_PER_TOKEN)
async def words(request: Request) -> StreamingResponse:
    """A stream."""
    return _words(request)


@billable(per_token(output=1), **_PER_TOKEN, **_BRIEF)
async def brief(request: Request) -> StreamingResponse:
    """A stream on a short hold."""
    return _words(request)


@billable(per_token(output=1), **_PER_TOKEN, on_disconnect="drain")
async def drained(request: Request) -> StreamingResponse:
    """A stream that is finished for nobody, if need be."""
    return _words(request)


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
        for number in range(count):
            if number % 8 == 0:
                note("burst", key=request.headers.get("x-api-key"))
            yield event
        yield _ending(count)

    return _sse(body())


async def _gate(until: str) -> None:
    path = Path(os.environ[GATES]) / until
    note("waits", until=path.name)
    while not path.exists():
        await asyncio.sleep(0.01)


@billable(2)
async def slow(request: Request) -> JSONResponse:
    """An endpoint that takes its time before it answers."""
    await _gate(request.query_params["until"])
    return JSONResponse({})


@billable(2, **_BRIEF)
async def slow_brief(request: Request) -> JSONResponse:
    """The same on a short hold."""
    await _gate(request.query_params["until"])
    return JSONResponse({})


@billable(per_token(output=1), **_PER_TOKEN)
async def told(request: Request) -> JSONResponse:
    """Usage is known before the answer is."""
    current_call().record(TokenUsage(input=0, output=7))
    await _gate(request.query_params["until"])
    return JSONResponse({})


@billable(per_token(output=1), hold=slices(5), line="words", errors="openai")
async def sliced(request: Request) -> StreamingResponse:
    """A stream that nobody can pay for to its end."""
    form, caller = request.query_params["as"], request.headers.get("x-api-key")

    async def body() -> AsyncIterator[bytes]:
        packer = zlib.compressobj(wbits=31)
        try:
            for number in itertools.count():
                if form == "silent" and number == 12:
                    await asyncio.Event().wait()
                event = delta(" word")
                yield packer.compress(event) + packer.flush(zlib.Z_SYNC_FLUSH) if form == "gzip" else event
                await asyncio.sleep(0.002)
        finally:
            note("closed", key=caller)

    fields = {"content-encoding": "gzip"} if form == "gzip" else None
    return StreamingResponse(body(), media_type="text/event-stream", headers=fields)


@billable(2)
async def upload(request: Request) -> JSONResponse:
    """An endpoint that reads the body."""
    note("uploads", key=request.headers.get("x-api-key"))
    return JSONResponse({"length": len(await request.body())})


def _query(scope: Scope, name: str) -> str:
    value: str = parse_qs(scope["query_string"].decode())[name][0]
    return value


async def _raw_burst(scope: Scope, receive: Receive, send: Send) -> None:
    count = int(_query(scope, "n"))
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(count):
        await send({"type": "http.response.body", "body": _CHUNK, "more_body": True})
    await send({"type": "http.response.body"})


async def _raw_ticks(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    try:
        while True:
            await send({"type": "http.response.body", "body": _CHUNK[:16_384], "more_body": True})
            await asyncio.sleep(0.005)
    except OSError as error:
        note("stopped", by=type(error).__name__, key=dict(scope["headers"])[b"x-api-key"].decode())
        raise


async def _raw_trailers(scope: Scope, receive: Receive, send: Send) -> None:
    trailers = "http.response.trailers" in scope.get("extensions", {})
    await send({"type": "http.response.start", "status": 200, "headers": [], "trailers": trailers})
    await send({"type": "http.response.body", "body": b"body"})
    note("trailers", announced=trailers)
    if trailers:
        await send({"type": "http.response.trailers", "headers": [(b"x-sum", b"4")]})


async def desk(request: Request) -> JSONResponse:
    """What another process reads from the file, for stores that have none."""
    payer = request.query_params["payer"]
    if "credits" in request.query_params:
        await metering.grant(payer, request.query_params["credits"], id=f"for-{payer}")
    balance = await metering.balance(payer)
    lines = [entry async for entry in metering.statement(payer)]
    charges = [[entry.basis, entry.amount] for entry in lines if entry.kind is not EntryKind.GRANT]
    return JSONResponse({"held": balance.held, "charges": charges, "wrong": await metering.check()})


async def _talk(websocket: WebSocket) -> None:
    note("talks", path=websocket.url.path, key=websocket.headers.get("x-api-key"))
    protocols = websocket.scope["subprotocols"]
    await websocket.accept(protocols[0] if protocols else None)
    while (message := await websocket.receive())["type"] == "websocket.receive":
        text = message.get("text") or ""
        if text == "close":
            await websocket.close(4000, "told to")
            return
        if text == "raise":
            raise ValueError("told to")
        await websocket.send_text(f"{text}!")
    note("disconnected", key=websocket.headers.get("x-api-key"), code=message.get("code"))


@billable(2, line="talk")
async def talk(websocket: WebSocket) -> None:
    """A fixed price."""
    await _talk(websocket)


@rate_limited(concurrency=2)
@billable(1, per="message", hold=slices(3), line="talk")
async def messages(websocket: WebSocket) -> None:
    """A price per message."""
    await _talk(websocket)


@billable(1, per="message", line="talk", **_BRIEF)
async def messages_brief(websocket: WebSocket) -> None:
    """The same on a short hold."""
    await _talk(websocket)


@rate_limited("3/hour", per="message")
async def messages_limited(websocket: WebSocket) -> None:
    """A limit of messages."""
    await _talk(websocket)


@billable(per_token(input=1, output=1), hold=slices(50), line="relay")
async def relay(websocket: WebSocket) -> None:
    """A price per token, which the messages tell."""
    await websocket.accept()
    async for text in websocket.iter_text():
        await websocket.send_text(text)


_ROUTES = [
    Route("/json", plain, methods=["GET", "POST", "OPTIONS"]),
    Route("/limited", twice),
    Route("/file", file),
    Route("/words", words),
    Route("/drained", drained),
    Route("/brief", brief),
    Route("/torn", torn),
    Route("/burst", burst),
    Route("/slow", slow),
    Route("/slow/brief", slow_brief),
    Route("/told", told),
    Route("/sliced", sliced),
    Route("/upload", upload, methods=["POST"]),
    Mount("/raw/burst", metered_app(_raw_burst, billable(2, line="raw"))),
    Mount("/raw/ticks", metered_app(_raw_ticks, billable(2, line="raw"))),
    Mount("/raw/trailers", metered_app(_raw_trailers, billable(2, line="raw"))),
    WebSocketRoute("/ws", talk),
    WebSocketRoute("/ws/messages", messages),
    WebSocketRoute("/ws/brief", messages_brief),
    WebSocketRoute("/ws/limited", messages_limited),
    WebSocketRoute("/ws/relay", relay),
    WebSocketRoute("/ws/free", _talk),
    Route("/desk", desk),
]

metering = Metering(
    os.environ.get(STORE, "memory://"),
    identify=who,
    sinks=[deliver_to(Path(os.environ[EVENTS]))] if EVENTS in os.environ else (),
    # On a machine that is busy with other tests a file may answer late.
    **{"store_timeout_s": 10.0} | json.loads(os.environ.get(OPTIONS, "{}")),
)
_routes = Starlette(routes=[*_ROUTES, Mount("/watched", routes=_ROUTES)])
_plain = MeteringMiddleware(_routes, metering=metering)
_watched = MeteringMiddleware(_routes, metering=metering, stop_on_disconnect=True)


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """The layer by path; the lifespan is the plain one's."""
    watched = scope["type"] == "http" and scope["path"].startswith("/watched/")
    await (_watched if watched else _plain)(scope, receive, send)

"""
A tiny plain ASGI application that writes down what its server lets it see.

Knows a few shapes of responses and nothing of metering. Each line of the file named by ``HARNESS_LOG``
is one JSON object: ``{"event": ..., "path": ..., ...}``; `read_log` reads them back.

======================  ==========================================================================
path                    answer
======================  ==========================================================================
``/quick``              200 with ``quick`` at once
``/echo``               200 with the request body
``/events?n=3``         n server-sent events, then the end
``/endless``            server-sent events, 1 ms apart, until the client is seen to leave
``/burst``              64 KiB chunks as fast as the server takes them, until the client leaves
``/held``               no answer before the client leaves; then the application ends without one
``/cut``                one chunk, and then it returns without the end of the body
``/scope``              what the scope says of spec version, extensions and state, as JSON
======================  ==========================================================================
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

__all__ = ["LOG_VARIABLE", "app", "note", "read_log", "without_lifespan"]

LOG_VARIABLE = "HARNESS_LOG"

_CHUNK = b"x" * 65_536
_FOREVER = 1_000_000


def note(event: str, **fields: object) -> None:
    """Append one line to the log, whole: lines of several processes never mix."""
    path = os.environ.get(LOG_VARIABLE)
    if path is None:
        return
    line = json.dumps({"event": event, "pid": os.getpid(), **fields}) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def read_log(path: Path, event: str | None = None) -> list[dict[str, Any]]:
    """
    Return the lines written so far, oldest first; only those of *event* if given.

    What has no line end yet is still being written, and is left for the next look.
    """
    if not path.exists():
        return []
    whole = path.read_bytes().rpartition(b"\n")[0]
    lines = [json.loads(line) for line in whole.splitlines()]
    return [line for line in lines if event is None or line["event"] == event]


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer by path, see the module's table; notes ``cancelled`` or ``returned`` at the end of every call."""
    if scope["type"] == "lifespan":
        await _lifespan(receive, send)
        return
    if scope["type"] != "http":
        await send({"type": "websocket.close", "code": 1000})
        return
    path = scope["path"]
    note("started", path=path)
    try:
        await _ANSWERS.get(path, _missing)(scope, receive, send)
    except asyncio.CancelledError:
        note("cancelled", path=path)
        raise
    note("returned", path=path)


async def without_lifespan(scope: Scope, receive: Receive, send: Send) -> None:
    """The same application for servers and tests where no lifespan comes: it refuses the scope."""
    if scope["type"] == "lifespan":
        raise RuntimeError("This application has no lifespan.")
    await app(scope, receive, send)


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        note(message["type"])
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


async def _quick(scope: Scope, receive: Receive, send: Send) -> None:
    await _respond(send, b"quick")


async def _missing(scope: Scope, receive: Receive, send: Send) -> None:
    await _respond(send, b"no such path", status=404)


async def _echo(scope: Scope, receive: Receive, send: Send) -> None:
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            note("disconnect", path=scope["path"], body_bytes=len(body))
            return
        body += message.get("body", b"")
        note("received", path=scope["path"], body_bytes=len(body))
        if not message.get("more_body", False):
            break
    await _respond(send, body)


async def _events(scope: Scope, receive: Receive, send: Send) -> None:
    count = int(parse_qs(scope["query_string"].decode()).get("n", ["3"])[0])
    await _start(send, b"text/event-stream")
    for number in range(count):
        await send({"type": "http.response.body", "body": b"data: %d\n\n" % number, "more_body": True})
    await send({"type": "http.response.body"})


async def _endless(scope: Scope, receive: Receive, send: Send) -> None:
    await _start(send, b"text/event-stream")
    await _pour(scope, receive, send, b"data: more\n\n", pause_s=0.001)


async def _burst(scope: Scope, receive: Receive, send: Send) -> None:
    await _start(send, b"application/octet-stream")
    await _pour(scope, receive, send, _CHUNK, pause_s=0.0)


async def _held(scope: Scope, receive: Receive, send: Send) -> None:
    await _departure(scope, receive)


async def _cut(scope: Scope, receive: Receive, send: Send) -> None:
    await _start(send, b"text/plain")
    await send({"type": "http.response.body", "body": b"half", "more_body": True})


async def _scope(scope: Scope, receive: Receive, send: Send) -> None:
    seen = {
        "spec_version": scope.get("asgi", {}).get("spec_version"),
        "http_version": scope["http_version"],
        "extensions": sorted(scope.get("extensions") or ()),
        "state": "state" in scope,
    }
    await _respond(send, json.dumps(seen).encode())


async def _pour(scope: Scope, receive: Receive, send: Send, chunk: bytes, *, pause_s: float) -> None:
    gone = asyncio.ensure_future(_departure(scope, receive))
    sent = 0
    try:
        while not gone.done() and sent < _FOREVER:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            sent += 1
            await asyncio.sleep(pause_s)
    finally:
        gone.cancel()
        note("poured", path=scope["path"], chunks=sent)


async def _departure(scope: Scope, receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    note("disconnect", path=scope["path"])


async def _start(send: Send, content_type: bytes, status: int = 200) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", content_type)]})


async def _respond(send: Send, body: bytes, status: int = 200) -> None:
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


_ANSWERS = {
    "/quick": _quick,
    "/echo": _echo,
    "/events": _events,
    "/endless": _endless,
    "/burst": _burst,
    "/held": _held,
    "/cut": _cut,
    "/scope": _scope,
}

"""
Denials: how a WebSocket is told that it is not let in, by a whole response where its server can send one.

Sends what others have decided, and decides nothing.
"""

from __future__ import annotations

from contextlib import suppress

from asgi_metering.asgi.answers import AnswerOptions
from asgi_metering.asgi.problems import close_frame
from asgi_metering.asgi.refusals import refusal_answer, refusal_response
from asgi_metering.asgi.types import Receive, Scope, Send
from asgi_metering.call import Call

__all__ = ["DENIAL", "INTERNAL_ERROR", "deny", "deny_mistaken", "deny_refused"]

DENIAL = "websocket.http.response"
"""The extension by which a server answers a WebSocket with an HTTP response, before it is accepted."""

INTERNAL_ERROR = 1011
"""The close code of a handler that failed (RFC 6455, section 7.4.1)."""


async def deny(send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    """Answer a WebSocket with an HTTP response, where the server has the extension for it."""
    await send({"type": "websocket.http.response.start", "status": status, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": body})


async def deny_refused(call: Call, options: AnswerOptions, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a handshake that was refused before the application ran, by the denial response or a close."""
    if (await receive())["type"] == "websocket.disconnect":
        return
    # A client that left meanwhile is no error of the application.
    with suppress(OSError):
        if DENIAL in (scope.get("extensions") or ()):
            rendered = refusal_response(call, options)
            await deny(send, rendered.status, rendered.headers, rendered.body)
        else:
            code, reason = close_frame(refusal_answer(call, options))
            await send({"type": "websocket.close", "code": code, "reason": reason})


async def deny_mistaken(scope: Scope, receive: Receive, send: Send, body: bytes) -> None:
    """Let nobody in to an application that must not serve; *body* says so, as problem details."""
    if (await receive())["type"] == "websocket.disconnect":
        return
    with suppress(OSError):
        if DENIAL in (scope.get("extensions") or ()):
            fields = [(b"content-type", b"application/problem+json"), (b"content-length", b"%d" % len(body))]
            await deny(send, 500, fields, body)
        else:
            await send({"type": "websocket.close", "code": INTERNAL_ERROR, "reason": "misconfigured"})

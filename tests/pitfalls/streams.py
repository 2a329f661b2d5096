"""
Small applications that pitfall tests of ends run: one endpoint, a chat stream, a middleware that fabricates ends.

Knows nothing of what is charged.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

__all__ = ["USAGE", "Passing", "delta", "events", "plain", "sse", "starlette"]

USAGE = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}}


def starlette(endpoint: Any, *middleware: Any) -> Starlette:
    """An application with one endpoint."""
    app = Starlette(routes=[Route("/", endpoint, methods=["GET", "POST"])])
    for layer in middleware:
        app.add_middleware(layer)
    return app


class Passing(BaseHTTPMiddleware):
    """A middleware of the kind that fabricates ends."""

    async def dispatch(self, request: Request, call_next: Any) -> Any:
        """Pass on."""
        return await call_next(request)


def delta(text: str) -> bytes:
    """One event of a chat stream."""
    chunk = {"object": "chat.completion.chunk", "model": "m", "choices": [{"delta": {"content": text}}]}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def plain(app: Any) -> Any:
    """*app* as an ASGI app that knows HTTP only, as small apps do."""

    async def only_http(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            raise ValueError(f"Unknown scope {scope['type']!r}.")
        await app(scope, receive, send)

    return only_http


async def events(*texts: str, usage: bool = True) -> AsyncIterator[bytes]:
    """A chat stream."""
    for text in texts:
        yield delta(text)
    if usage:
        yield b"data: " + json.dumps(USAGE).encode() + b"\n\n"
        yield b"data: [DONE]\n\n"


def sse(body: AsyncIterator[bytes], **options: Any) -> StreamingResponse:
    """A response of server-sent events."""
    return StreamingResponse(body, media_type="text/event-stream", **options)

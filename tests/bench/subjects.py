"""What is timed: our layers, and what an application would use without them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from limits import parse
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import FixedWindowRateLimiter
from slowapi import Limiter
from slowapi.middleware import SlowAPIASGIMiddleware, SlowAPIMiddleware
from slowapi.util import get_remote_address
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from asgi_metering import Caller, Metering, MeteringMiddleware, billable, rate_limited
from asgi_metering.prices import per_million_tokens
from asgi_metering.usage import UsageEvent

PLENTY = ("1000000/minute", "10000000/hour", "100000000/day")
"""Limits that never refuse: what is timed is admission."""

TURN = 8
"""Requests between turns of the loop: about what arrives together on a busy server."""

Send = Callable[[dict[str, Any]], Awaitable[None]]
Work = Callable[[int], Awaitable[None]]


def requests_to(app: Any, path: str) -> Work:
    """Work that sends GET requests to *app* in process, as a server would."""

    async def work(count: int) -> None:
        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(_message: dict[str, Any]) -> None:
            return None

        for number in range(count):
            await app(scope(path), receive, send)
            if number % TURN == 0:
                # A server's loop turns too; what runs off the path runs here, inside the time that is taken.
                await asyncio.sleep(0)
        await asyncio.sleep(0)

    return work


def scope(path: str, key: str = "payer-1") -> dict[str, Any]:
    """One GET request of the caller *key*."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"bench"), (b"x-key", key.encode())],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "state": {},
    }


async def plain(_request: Request) -> JSONResponse:
    """The endpoint of every subject."""
    return JSONResponse({"ok": True})


def application(endpoint: Any, routes: int) -> Starlette:
    """An application with *routes* routes, of which the last is hit."""
    others = [Route(f"/other/{number}", plain) for number in range(routes - 1)]
    return Starlette(routes=[*others, Route("/hit", endpoint)])


class NoOp:
    """The least a pure ASGI middleware can do that sees the response: it wraps `send`."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass everything on."""

        async def send_(message: dict[str, Any]) -> None:
            await send(message)

        await self.app(scope, receive, send_)


async def metering(**options: Any) -> Metering:
    """A metering in memory with a rich payer and nowhere to send events."""
    made = Metering("memory://", identify=lambda connection: Caller(connection.headers["x-key"]), **options)
    await made.start()
    # As under a server with a lifespan: otherwise each request waits for its own end to be booked.
    made.runtime().managed = True
    await made.grant("payer-1", 1_000_000, id="bench")
    return made


async def forget(events: Sequence[UsageEvent]) -> None:
    """A sink that takes everything at once: what is timed is our side of the delivery."""


def ours(made: Metering, endpoint: Any, routes: int) -> Any:
    """An application behind the whole stack."""
    return MeteringMiddleware(application(endpoint, routes), metering=made)


def limited_by_us(limits: tuple[str, ...]) -> Any:
    """An endpoint with rate limits alone."""
    return rate_limited(*limits)(_copy(plain))


def paid_by_us(limits: tuple[str, ...]) -> Any:
    """An endpoint with everything: limits, a lease, a hold, a settlement, an event."""
    return rate_limited(*limits, concurrency=1_000)(billable(1)(_copy(plain)))


def _copy(endpoint: Any) -> Any:
    async def copied(request: Request) -> JSONResponse:
        return await endpoint(request)  # type: ignore[no-any-return]

    return copied


def limits_called_directly(limits: tuple[str, ...]) -> Any:
    """What a careful author writes by hand around the `limits` package: every limit in turn."""
    limiter = FixedWindowRateLimiter(MemoryStorage())
    items = [parse(limit) for limit in limits]

    async def endpoint(request: Request) -> JSONResponse:
        key = request.headers["x-key"]
        for item in items:
            if not await limiter.hit(item, "bench", key):
                return JSONResponse({"error": "rate limited"}, 429)
        return await plain(request)

    return endpoint


def slowapi_decorator(limits: tuple[str, ...], routes: int) -> Starlette:
    """Slowapi's decorator, in memory."""
    limiter = Limiter(key_func=get_remote_address)
    endpoint = _copy(plain)
    for limit in limits:
        endpoint = limiter.limit(limit)(endpoint)
    app = application(endpoint, routes)
    app.state.limiter = limiter
    return app


def slowapi_middleware(limits: tuple[str, ...], routes: int, *, pure: bool) -> Starlette:
    """Slowapi's middleware, in memory: on `BaseHTTPMiddleware`, or its pure ASGI one."""
    limiter = Limiter(key_func=get_remote_address, default_limits=list(limits))
    app = application(_copy(plain), routes)
    app.state.limiter = limiter
    app.add_middleware(SlowAPIASGIMiddleware if pure else SlowAPIMiddleware)
    return app


# -- streams -----------------------------------------------------------------------------------------------

WORDS = [f" word{number}" for number in range(64)]
"""What events of a stream have: each of them another one, as a model's have."""

SMALL_CHUNKS = [b'data: {"choices":[{"delta":{"content":"%s"}}]}\n\n' % word.encode() for word in WORDS]
"""The least that an event of a chat can be."""

BIG_CHUNKS = [b'data: {"choices":[{"delta":{"content":"%s"}}]}\n\n' % (word.encode() * 4_000)[:4_000] for word in WORDS]
"""Events with long texts, such as a gateway makes that gathers them."""

USAGE = {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}
USAGE_CHUNK = b"data: " + json.dumps({"choices": [], "usage": USAGE}).encode() + b"\n\n"


def _completion(word: str) -> bytes:
    chunk = {
        "id": "chatcmpl-CZvsxXYsDMVdKVFGyGTZnEWN2Pw4b",
        "object": "chat.completion.chunk",
        "created": 1_763_900_000,
        "model": "gpt-5.5-2026-04-23",
        "service_tier": "default",
        "system_fingerprint": "fp_560af6e559",
        "choices": [{"index": 0, "delta": {"content": word}, "logprobs": None, "finish_reason": None}],
        "usage": None,
    }
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


USUAL_CHUNKS = [_completion(word) for word in WORDS]
"""Events as OpenAI sends them, to whom says that it wants the usage."""


def reporting(chunk: bytes) -> bytes:
    """*chunk* with running totals in it, as some servers put them into every one."""
    start = chunk.removesuffix(b',"usage":null}\n\n').removesuffix(b"}\n\n")
    return start + b',"usage":' + json.dumps(USAGE, separators=(",", ":")).encode() + b"}\n\n"


def streaming(events: Sequence[bytes], chunks: int) -> Any:
    """An ASGI app that streams *chunks* of these events, in turn, and a usage chunk, as fast as it may."""
    bodies = [{"type": "http.response.body", "body": event, "more_body": True} for event in events]
    messages = (bodies * (chunks // len(bodies) + 1))[:chunks]

    async def app(_scope: Any, _receive: Any, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for message in messages:
            await send(message)
        await send({"type": "http.response.body", "body": USAGE_CHUNK, "more_body": False})

    return app


TOKENS = per_million_tokens(input=3, output=15)
"""A price that makes the body be watched."""

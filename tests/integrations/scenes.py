"""
Applications that use slowapi, and requests to them at times that a test says.

Knows both ways to limit the same application: slowapi's own, and adopted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
from fastapi import FastAPI
from slowapi import Limiter, _rate_limit_exceeded_handler
from slowapi.errors import RateLimitExceeded
from slowapi.middleware import SlowAPIASGIMiddleware, SlowAPIMiddleware
from slowapi.util import get_remote_address
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from asgi_metering import Metering
from asgi_metering.integrations.slowapi import adopt
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.testing import FakeClock

__all__ = ["INSTALLED", "Scene", "adopted", "ask", "awaiting_handler", "both", "codes", "install", "text"]


async def awaiting_handler(request: Request, failure: Any) -> Response:
    """A handler of slowapi's exception that waits before it answers as slowapi does."""
    await asyncio.sleep(0)
    return _rate_limit_exceeded_handler(request, failure)


INSTALLED = {
    "decorators": (None, _rate_limit_exceeded_handler),
    "middleware": (SlowAPIMiddleware, _rate_limit_exceeded_handler),
    "asgi": (SlowAPIASGIMiddleware, _rate_limit_exceeded_handler),
    "async handler": (SlowAPIASGIMiddleware, awaiting_handler),
}
"""What applications put beside the decorators: one of the middlewares, or none, and a handler."""


def install(app: Any, limiter: Limiter, installed: str = "asgi") -> None:
    """What slowapi's documentation tells an application to do."""
    middleware, handler = INSTALLED[installed]
    app.state.limiter = limiter
    app.add_exception_handler(RateLimitExceeded, handler)
    if middleware is not None:
        app.add_middleware(middleware)


class Scene:
    """An application, its limiter, and the time."""

    def __init__(self, app: Any, limiter: Any, clock: FakeClock) -> None:
        self.app, self.limiter, self.clock = app, limiter, clock

    def get(self, path: str, times: int = 1, *, method: str = "GET", **kwargs: Any) -> list[httpx.Response]:
        """Ask for *path* so many times; see `ask`."""
        return ask(self.app, *[(method, path)] * times, **kwargs)

    def codes(self, path: str, times: int, **kwargs: Any) -> list[int]:
        """The statuses of so many answers."""
        return codes(self.get(path, times, **kwargs))


def adopted(
    installed: str = "asgi", *, kind: Callable[[], Any] = FastAPI, key_func: Any = get_remote_address, **options: Any
) -> Scene:
    """An application whose limiter is adopted, on a store in memory whose clock stands still."""
    clock = FakeClock()
    limiter = adopt(Limiter(key_func=key_func, **options), Metering(MemoryStore(clock), sinks=()))
    app = kind() if kind is not Starlette else Starlette()
    install(app, limiter, installed)
    return Scene(app, limiter, clock)


def ask(
    app: Any, *requests: tuple[str, str], address: str = "10.0.0.1", headers: dict[str, str] | None = None
) -> list[httpx.Response]:
    """Send (method, path) after (method, path), from one address, and answer the responses."""

    async def run() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app, client=(address, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as client:
            return [await client.request(method, path) for method, path in requests]

    return asyncio.run(run())


def codes(answers: list[httpx.Response]) -> list[int]:
    """Their statuses."""
    return [answer.status_code for answer in answers]


def text(request: Request) -> Response:
    """A sync endpoint."""
    return PlainTextResponse("test")


def both(
    build: Callable[[Any, Any], None],
    *requests: tuple[str, str],
    installed: str = "asgi",
    kind: Callable[[], Any] = FastAPI,
    key_func: Any = get_remote_address,
    headers: dict[str, str] | None = None,
    **options: Any,
) -> tuple[list[Any], list[Any]]:
    """
    What slowapi by itself answers, and what the same application answers adopted.

    Args:
        build: Adds routes to an application, by its limiter.
        requests: Sent one after the other, each with what the ones before have spent.
        installed: As of `adopted`, and so on.
        kind: Makes the application.
        key_func: Whom to count.
        headers: Of each request.
        options: Of the limiter.

    A request whose exception nobody answers is told by its class.
    """
    told: list[list[Any]] = []
    for own in (Limiter(key_func=key_func, **options), adopt(Limiter(key_func=key_func, **options))):
        app = kind()
        install(app, own, installed)
        build(app, own)
        answers: list[Any] = []
        for request in requests:
            try:
                answers.extend(ask(app, request, headers=headers))
            except Exception as failure:
                answers.append(type(failure).__name__)
        told.append(answers)
    return told[0], told[1]

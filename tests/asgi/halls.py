"""Applications that a middleware's own limits are counted for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Host, Mount, Route, Router

from asgi_metering import (
    billable,
    metered_app,
    rate_limited,
    unlimited,
)
from tests.counting import Hall, answer

PER_ADDRESS = rate_limited("2/minute", key="address")


def play(scene: Callable[[Hall], Awaitable[None]], app: Any = None, **hall: Any) -> Hall:
    """Play *scene* in a hall of *app*."""

    async def run() -> Hall:
        made = Hall(app, **hall)
        async with made.metering:
            await scene(made)
        return made

    return asyncio.run(run())


async def search(request: Request) -> JSONResponse:
    """An endpoint without a decorator."""
    return await answer(request)


class Reader:
    """An app that reads its body, and counts how often it is run."""

    def __init__(self) -> None:
        self.runs = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.runs += 1
        while (await receive()).get("more_body"):
            pass
        await PlainTextResponse("ok")(scope, receive, send)


def starlette_app() -> Starlette:
    """Routes of every kind, with and without limits of their own."""

    class Items(HTTPEndpoint):
        async def get(self, request: Request) -> JSONResponse:
            return await answer(request)

        @rate_limited("4/minute", key="address")
        async def post(self, request: Request) -> JSONResponse:
            return await answer(request)

        @unlimited
        async def put(self, request: Request) -> JSONResponse:
            return await answer(request)

    inner = Starlette(routes=[Route("/plain", search), Route("/own", rate_limited("4/minute", key="address")(answer))])
    return Starlette(
        routes=[
            Route("/plain", search, methods=["GET"]),
            Route("/things/{thing}", search),
            Route("/own", rate_limited("4/minute", key="address")(answer)),
            Route("/both", rate_limited("4/minute", key="address", override_defaults=False)(answer)),
            Route("/paid", billable(0)(answer)),
            Route("/free", unlimited(answer_of("free"))),
            Route("/items", Items),
            Mount("/sub", inner),
            Mount("/{tenant}/router", Router([Route("/plain", search)])),
            Mount("/gated", metered_app(inner_app, rate_limited("4/minute", key="address"))),
            Mount("/opaque", inner_app),
            Host("api.example", Router([Route("/hosted", search)])),
        ]
    )


def answer_of(name: str) -> Any:
    """A fresh endpoint."""

    async def fresh(request: Request) -> JSONResponse:
        return JSONResponse(name)

    return fresh


async def inner_app(scope: Any, receive: Any, send: Any) -> None:
    """An app that nobody can look into."""
    if scope["type"] == "http":
        await PlainTextResponse("inner")(scope, receive, send)

"""What the audit finds before the first request (pitfall 4, X.5)."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message

from asgi_metering import (
    billable,
    rate_limited,
)
from tests.harness.drive import status
from tests.pitfalls.apps import (
    HOW,
    PRICE,
    How,
    fastapi_app,
    installed,
)
from tests.pitfalls.scene import POOR, Scene, Visit, visit


def starlette(*routes: tuple[str, Callable[..., Any]]) -> Starlette:
    """An application with these endpoints."""
    return Starlette(routes=[Route(path, endpoint, methods=["GET", "POST"]) for path, endpoint in routes])


# -- pitfall 4: decorators above the route's own -----------------------------------------------------------


async def startup(app: ASGIApp) -> list[Message]:
    """What the server hears when it starts and, if it can, stops *app*."""
    heard: list[Message] = []
    asks = iter(["lifespan.startup", "lifespan.shutdown"])

    async def receive() -> Message:
        return {"type": next(asks)}

    async def send(message: Message) -> None:
        heard.append(message)

    await app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, receive, send)
    return heard


def transparent(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator as most are."""

    @functools.wraps(function)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        return await function(*args, **kwargs)

    return wrapper


def upside_down(app: FastAPI) -> None:
    """Decorators above the route's own."""

    @billable(PRICE)
    @app.get("/search")
    async def search() -> str:
        return "free for all"


def upside_down_between(app: FastAPI) -> None:
    """The same, with another decorator between."""

    @rate_limited("1/minute")
    @transparent
    @app.get("/search")
    async def search() -> str:
        return "free for all"


def upside_down_in_router(app: FastAPI) -> None:
    """The same, in a router that is included."""
    router = APIRouter(prefix="/v1")

    @billable(PRICE)
    @router.get("/search")
    async def search() -> str:
        return "free for all"

    app.include_router(router, prefix="/api")


def upside_down_in_mount(app: FastAPI) -> None:
    """The same, in an application that is mounted."""
    sub = FastAPI()
    upside_down(sub)
    app.mount("/sub", sub)


WRONG = {
    "plain": (upside_down, "/search runs "),
    "between": (upside_down_between, "/search runs "),
    "router": (upside_down_in_router, "/api/v1/search runs "),
    "mount": (upside_down_in_mount, "/sub/search runs "),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("wrong", WRONG)
def test_refuse_to_start_with_decorators_in_the_wrong_order(wrong: str, how: How, scene: Scene) -> None:
    """Pitfall 4: a route below its metering decorators would be free, so the server hears of a failed startup."""
    build, beginning = WRONG[wrong]
    app = FastAPI()
    build(app)
    heard = asyncio.run(startup(installed(app, scene.metering, how)))
    assert [message["type"] for message in heard] == ["lifespan.startup.failed"]
    assert heard[0]["message"].startswith(beginning)
    assert "Put them below it." in heard[0]["message"]


@pytest.mark.parametrize("how", HOW)
def test_start_with_decorators_in_the_right_order(how: How, scene: Scene) -> None:
    """Pitfall 4: the same route in the right order starts and stops, with the two messages and no others."""
    heard = asyncio.run(startup(installed(fastapi_app([]), scene.metering, how)))
    assert [message["type"] for message in heard] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


def test_refuse_to_start_where_a_bare_function_is_routed_in_starlette(scene: Scene) -> None:
    """Pitfall 4: a route added for the bare function, although a guarded one exists, fails the startup."""

    async def search(request: Request) -> PlainTextResponse:
        return PlainTextResponse("free for all")

    billable(PRICE)(search)
    heard = asyncio.run(startup(installed(starlette(("/search", search)), scene.metering, "added")))
    assert "/search runs" in heard[0]["message"]


def test_start_where_one_function_is_routed_twice(scene: Scene) -> None:
    """Pitfall 4: a function that is free on one route and guarded on another, both reached, is no mistake."""

    async def search(request: Request) -> PlainTextResponse:
        return PlainTextResponse("ok")

    app = installed(starlette(("/free", search), ("/paid", billable(PRICE)(search))), scene.metering, "added")
    free, paid = visit(app, Visit("/free", caller=POOR), Visit("/paid", caller=POOR))
    assert (status(free.log), status(paid.log)) == (200, 402)


def test_warn_of_what_no_route_reaches(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """X.5: a decorated function of the application's own module that no route reaches is a warning, not a failure."""

    @billable(PRICE)
    async def forgotten() -> None: ...

    async def reached(request: Request) -> PlainTextResponse:
        return PlainTextResponse("ok")

    visit(installed(starlette(("/", reached)), scene.metering, "added"), Visit())
    named = [record.getMessage() for record in caplog.records if "forgotten is decorated" in record.getMessage()]
    assert len(named) == 1
    assert "no route reaches it" in named[0]


def test_keep_quiet_of_applications_built_before(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """X.5: an application that a function builds is not warned of the endpoints of those that it built before."""
    before = fastapi_app([])
    visit(installed(fastapi_app([]), scene.metering, "added"), Visit("/async"))
    assert before is not None
    assert [record for record in caplog.records if "fastapi_app" in record.getMessage()] == []

"""
Real frameworks, each with its own idea of an exception: they take a refusal for one of theirs (pitfalls 17, 20).

Each of them has an async and a sync endpoint at ``/async`` and ``/sync`` that cost `PRICE`.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import blacksheep
import django
import falcon.asgi
import litestar
import pytest
import quart
import trio
from asgiref.sync import sync_to_async
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.http import HttpRequest, JsonResponse
from django.urls import path
from django.views import View
from mcp.server.mcpserver import MCPServer
from mcp.server.transport_security import TransportSecuritySettings

from asgi_metering import CallRefused, MeteringMiddleware, billable
from tests.harness.drive import Drive, body, status
from tests.pitfalls.scene import POOR, Scene, Visit, field_of, problem, visit

PRICE = 2
PATHS = ("/async", "/sync")

ran: list[str] = []
"""What ran."""


def worked(kind: str) -> dict[str, str]:
    """Do the work of an endpoint."""
    ran.append(kind)
    return {"worked": kind}


def with_litestar() -> Any:
    """Litestar; where it logs all exceptions (debug), refusals are among them."""

    @litestar.get("/async")
    @billable(PRICE, line="litestar-async")
    async def paid_async() -> dict[str, str]:
        return worked("async")

    @litestar.get("/sync")
    @billable(PRICE, line="litestar-sync")
    def paid_sync() -> dict[str, str]:
        return worked("sync")

    return litestar.Litestar([paid_async, paid_sync], logging_config=None)


def with_quart() -> Any:
    """Quart."""
    app = quart.Quart("shop")

    @app.get("/async")
    @billable(PRICE, line="quart-async")
    async def paid_async() -> dict[str, str]:
        return worked("async")

    @app.get("/sync")
    @billable(PRICE, line="quart-sync")
    def paid_sync() -> dict[str, str]:
        return worked("sync")

    return app


def with_falcon() -> Any:
    """Falcon, which takes sync responders only where they are decorated."""

    class Async:
        @billable(PRICE, line="falcon-async")
        async def on_get(self, req: Any, resp: Any) -> None:
            resp.media = worked("async")

    class Sync:
        @billable(PRICE, line="falcon-sync")
        def on_get(self, req: Any, resp: Any) -> None:
            resp.media = worked("sync")

    app = falcon.asgi.App()
    app.add_route("/async", Async())
    app.add_route("/sync", Sync())
    return app


def with_blacksheep() -> Any:
    """BlackSheep."""
    app = blacksheep.Application(router=blacksheep.Router())

    @app.router.get("/async")
    @billable(PRICE, line="blacksheep-async")
    async def paid_async() -> dict[str, str]:
        return worked("async")

    @app.router.get("/sync")
    @billable(PRICE, line="blacksheep-sync")
    def paid_sync() -> dict[str, str]:
        return worked("sync")

    return app


@billable(PRICE, line="django-async")
async def view_async(request: HttpRequest) -> JsonResponse:
    """An async view."""
    return JsonResponse(worked("async"))


@billable(PRICE, line="django-sync")
def view_sync(request: HttpRequest) -> JsonResponse:
    """A sync view."""
    return JsonResponse({**worked("sync"), "thread": threading.current_thread().name})


class Mixed(View):
    """Views of one class, of which only the whole can be metered (pitfall 10)."""

    def get(self, request: HttpRequest) -> JsonResponse:
        """A sync method."""
        return JsonResponse(worked("mixed"))

    def post(self, request: HttpRequest) -> JsonResponse:
        """Another."""
        return JsonResponse(worked("mixed"))


async def view_catching(request: HttpRequest) -> JsonResponse:
    """A view with an answer of its own for refusals."""
    try:
        return await view_async(request)
    except CallRefused as refusal:
        return JsonResponse({"degraded": refusal.refusal.reason.value})


async def view_beside(request: HttpRequest) -> JsonResponse:
    """A sync view, and a thread in which Django would run what is sync in this request."""
    response = await view_sync(request)
    theirs = await sync_to_async(threading.current_thread)()
    return JsonResponse([json.loads(response.content)["thread"], theirs.name], safe=False)


@functools.cache
def with_django() -> Any:
    """Django."""
    urls: Any = types.ModuleType("shop_urls")
    urls.urlpatterns = [
        path("async", view_async),
        path("sync", view_sync),
        path("class", billable(PRICE, line="django-class")(Mixed.as_view())),
        path("caught", view_catching),
        path("beside", view_beside),
    ]
    sys.modules["shop_urls"] = urls
    settings.configure(ROOT_URLCONF="shop_urls", ALLOWED_HOSTS=["*"], SECRET_KEY="x", LOGGING_CONFIG=None)
    django.setup()
    return get_asgi_application()


FRAMEWORKS: dict[str, Callable[[], Any]] = {
    "blacksheep": with_blacksheep,
    "django": with_django,
    "falcon": with_falcon,
    "litestar": with_litestar,
    "quart": with_quart,
}


class Requests:
    """A middleware between the metering and the framework: only requests pass, and not all of them know a lifespan."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass requests on."""
        if scope["type"] != "http":
            raise RuntimeError("No lifespan here.")
        await self.app(scope, receive, send)


def ask(app: Any, scene: Scene, *visits: Visit) -> list[Drive]:
    """Meter *app*, and make *visits*."""
    return visit(MeteringMiddleware(Requests(app), metering=scene.metering), *visits)


@pytest.fixture(autouse=True)
def _nothing_ran() -> None:
    ran.clear()


@pytest.fixture
def scene() -> Scene:
    """Books with ann's money."""
    return Scene()


def loud(caplog: pytest.LogCaptureFixture) -> list[tuple[str, int]]:
    """What was logged from a warning on, of frameworks."""
    return [
        (record.name, record.levelno)
        for record in caplog.records
        if record.levelno >= logging.WARNING and record.name != "asgi_metering"
    ]


@pytest.mark.parametrize("where", PATHS)
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_gate_async_and_sync_endpoints(name: str, where: str, scene: Scene) -> None:
    """Pitfalls 5, 9: an endpoint runs for its price; for a poor caller and for none no line of it does."""
    paid, poor, nobody = ask(
        FRAMEWORKS[name](), scene, Visit(where), Visit(where, caller=POOR), Visit(where, caller=None)
    )
    assert [status(each.log) for each in (paid, poor, nobody)] == [200, 402, 401]
    assert ran == [where[1:]]
    assert problem(poor)["code"] == "insufficient_credits"
    assert (poor.exception, nobody.exception) == (None, None)
    assert scene.settled() == PRICE


@pytest.mark.parametrize("where", PATHS)
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_refuse_without_an_error_in_the_log(
    name: str, where: str, scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    """Pitfall 17: no framework logs a refused call as its failure; Django warns of what it takes for forbidden."""
    (poor,) = ask(FRAMEWORKS[name](), scene, Visit(where, caller=POOR))
    assert status(poor.log) == 402
    assert loud(caplog) == ([("django.request", logging.WARNING)] if name == "django" else [])


def test_refuse_through_quarts_own_hook(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """Pitfall 17: Quart's middleware wraps its method ``asgi_app``, and is refused as quietly."""
    app = with_quart()
    app.asgi_app = MeteringMiddleware(app.asgi_app, metering=scene.metering)
    (poor,) = visit(app, Visit("/async", caller=POOR))
    assert (status(poor.log), loud(caplog)) == (402, [])


def test_meter_a_class_of_django_as_a_whole(scene: Scene) -> None:
    """Pitfall 10: the result of ``as_view()`` is a view like any other; methods of both kinds Django refuses itself."""
    paid, poor = ask(with_django(), scene, Visit("/class"), Visit("/class", caller=POOR))
    assert [status(paid.log), status(poor.log)] == [200, 402]
    assert (ran, scene.settled()) == (["mixed"], PRICE)


def test_keep_an_answer_of_a_django_view(scene: Scene) -> None:
    """Pitfall 15: a view that catches the refusal answers as it likes."""
    (poor,) = ask(with_django(), scene, Visit("/caught", caller=POOR))
    assert (status(poor.log), json.loads(body(poor.log))) == (200, {"degraded": "insufficient_credits"})


def test_run_sync_views_where_django_does(scene: Scene) -> None:
    """Pitfall 9: with ``run_sync`` from asgiref a sync view runs in the one thread that has Django's connections."""
    scene.metering.run_sync = lambda work: sync_to_async(work)()
    (ended,) = ask(with_django(), scene, Visit("/beside"))
    ours, theirs = json.loads(body(ended.log))
    assert ours == theirs


def test_serve_nothing_under_trio(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """Pitfall 34: a server of trio hears 500 from the first request on, and its operator why."""
    sent: list[Any] = []

    async def take(message: Any) -> None:
        sent.append(message)

    app = MeteringMiddleware(with_falcon(), metering=scene.metering)
    trio.run(app, Visit("/async").scope(), trio.sleep_forever, take)
    assert sent[0]["status"] == 500
    assert "not of trio" in caplog.text


@pytest.mark.parametrize("stateless", [False, True], ids=["stateful", "stateless"])
@pytest.mark.parametrize("is_json", [False, True], ids=["sse", "json"])
def test_tell_the_client_of_a_tool_why_it_was_refused(
    is_json: bool, stateless: bool, scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    """Pitfall 20: a refused tool fails with the problem as its text, below 200, and without an error in the log."""
    server = MCPServer("shop")

    @server.tool()
    @billable(PRICE, line="mcp-work")
    async def work(number: int) -> str:
        ran.append("work")
        return f"did {number}"

    inner = server.streamable_http_app(
        json_response=is_json,
        stateless_http=stateless,
        transport_security=TransportSecuritySettings(enable_dns_rebinding_protection=False),
    )
    accepted = (("accept", "application/json, text/event-stream"), ("content-type", "application/json"))

    def called(caller: str, number: int, more: tuple[tuple[str, str], ...] = ()) -> Visit:
        call = {"name": "work", "arguments": {"number": number}}
        said = {"jsonrpc": "2.0", "id": number, "method": "tools/call", "params": call}
        return Visit("/mcp", "POST", caller, headers=accepted + more, body=json.dumps(said).encode())

    async def story() -> list[Drive]:
        from tests.harness.drive import headers, lifespan
        from tests.pitfalls.scene import make

        app = MeteringMiddleware(inner, metering=scene.metering)
        asked = {"protocolVersion": "2025-03-26", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}
        first = {"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": asked}
        async with lifespan(app):
            (begun,) = await make(app, [Visit("/mcp", "POST", headers=accepted, body=json.dumps(first).encode())])
            session = tuple((name, value) for name, value in headers(begun.log) if name == "mcp-session-id")
            return await make(app, [called("ann", 1, session), called(POOR, 2, session)])

    paid, poor = asyncio.run(story())
    told = body(poor.log).decode()
    result = json.loads(told if is_json else told.partition("data: ")[2].partition("\n")[0].strip())["result"]
    text = result["content"][0]["text"]
    assert (status(poor.log), result["isError"]) == (200, True)
    assert json.loads(text.partition(": ")[2])["code"] == "insufficient_credits"
    assert field_of(paid, "content-type") in ("application/json", "text/event-stream")
    assert (ran, loud(caplog), scene.settled()) == (["work"], [], PRICE)

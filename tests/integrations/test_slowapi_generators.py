"""Generator endpoints and dependencies of FastAPI under an adopted limiter: counted before the first of their code."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from fastapi import Depends, FastAPI, WebSocket
from slowapi import Limiter
from slowapi.util import get_remote_address
from starlette.requests import Request
from starlette.testclient import TestClient

from asgi_metering import Metering, billable
from asgi_metering.errors import ConfigurationError, NoCallError
from asgi_metering.integrations.slowapi import adopt
from asgi_metering.testing import store_down
from tests.integrations.scenes import adopted, ask, both, codes, install
from tests.integrations.test_slowapi_mixed import Counting, Scene

RAN: list[str] = []
"""What ran of the generators below, since it was emptied."""


async def one(request: Request) -> AsyncIterator[dict[str, int]]:
    """Yields, and says when it begins and ends."""
    RAN.append("begun")
    yield {"x": 1}
    RAN.append("over")


def sync_one(request: Request) -> Iterator[dict[str, int]]:
    """The same in a thread."""
    RAN.append("begun")
    yield {"x": 1}
    RAN.append("over")


async def plain() -> AsyncIterator[dict[str, int]]:
    """Without a request."""
    RAN.append("begun")
    yield {"x": 1}


def build(app: Any, limiter: Limiter, generator: Callable[..., Any], *, is_dependency: bool) -> None:
    """An endpoint that yields, or one that depends on what yields."""
    decorated = limiter.limit("2/minute")(generator)
    if not is_dependency:
        app.get("/t1")(decorated)
        return

    @app.get("/t1")
    async def endpoint(given: int = Depends(decorated)) -> Any:
        return given


@pytest.mark.parametrize("is_dependency", [False, True])
@pytest.mark.parametrize("generator", [one, sync_one])
def test_generators_are_let_in_and_refused_as_by_slowapi(generator: Any, is_dependency: bool) -> None:
    """The same statuses and bodies; of one that is refused nothing runs (S2.31)."""
    RAN.clear()

    def built(app: Any, limiter: Limiter) -> None:
        build(app, limiter, generator, is_dependency=is_dependency)

    theirs, ours = both(built, *[("GET", "/t1")] * 3, installed="decorators")
    assert codes(ours) == codes(theirs) == [200, 200, 429]
    assert [answer.content for answer in ours] == [answer.content for answer in theirs]
    assert RAN == ["begun", "over"] * 4


@pytest.mark.parametrize("is_dependency", [False, True])
def test_generator_needs_no_request_and_shows_fields(is_dependency: bool) -> None:
    """Fields are on both answers; what FastAPI reads of the endpoint's parameters is what it has (S2.31)."""
    scene = adopted(headers_enabled=True)
    build(scene.app, scene.limiter, plain, is_dependency=is_dependency)
    answers = scene.get("/t1", 3)
    assert codes(answers) == [200, 200, 429]
    assert [answer.headers["x-ratelimit-remaining"] for answer in answers] == ["1", "0", "0"]
    assert "parameters" not in scene.get("/openapi.json")[0].json()["paths"]["/t1"]["get"]


def test_generator_waits_for_a_store_that_is_asked_over_a_network() -> None:
    """It is counted by whatever store there is, with 503 where that gives no answer (X.6)."""
    counting = Metering(Counting(), sinks=())
    down = store_down("memory://")
    for metering, expected in ((counting, [200, 200, 429]), (Metering(down, sinks=(), store_timeout_s=0.05), [503])):
        app, limiter = FastAPI(), adopt(Limiter(key_func=get_remote_address), metering)
        install(app, limiter, "decorators")
        build(app, limiter, plain, is_dependency=False)
        with down.down("refuse"):
            assert codes(ask(app, *[("GET", "/t1")] * len(expected))) == expected


def test_generator_with_limits_of_two_limiters_counts_by_both() -> None:
    """Each asks for its own; the one that is spent first refuses."""
    scene = adopted("decorators")
    other = adopt(Limiter(key_func=get_remote_address))
    scene.app.get("/t1")(other.limit("1/minute")(scene.limiter.limit("2/minute")(plain)))
    scene.app.get("/t2")(scene.limiter.limit("1/minute")(other.limit("2/minute")(plain)))
    assert scene.codes("/t1", 2) == scene.codes("/t2", 2) == [200, 429]


@pytest.mark.parametrize("is_dependency", [False, True])
def test_generator_behind_our_middleware_is_counted_once(is_dependency: bool) -> None:
    """The call of its request asks for it, with its price if it has one; HEAD and OPTIONS are free, and still count."""
    scene = Scene()
    build(scene.app, scene.limiter, plain, is_dependency=is_dependency)
    scene.app.get("/paid")(billable(1)(scene.limiter.limit("1/minute")(plain)))
    scene.app.api_route("/any", methods=["OPTIONS"])(scene.limiter.limit("1/minute")(plain))
    asked = [*[("GET", "/t1")] * 3, *[("GET", "/paid")] * 2, *[("OPTIONS", "/any")] * 2]
    answers, left = scene.play(*asked)
    assert codes(answers) == [200, 200, 429, 200, 429, 200, 429]
    assert left == 2
    assert len(scene.store.admissions) == len(asked)


@pytest.mark.parametrize("order", [1, -1])
def test_generator_with_a_price_runs_for_nobody_without_our_middleware(order: int) -> None:
    """A price that nobody could charge is refused, and not run for free under a limit alone."""
    scene = Scene(middleware=False)
    decorated: Any = plain
    for decorator in (billable(1), scene.limiter.limit("1/minute"))[::order]:
        decorated = decorator(decorated)
    scene.app.get("/t1")(decorated)
    RAN.clear()
    with pytest.raises(NoCallError):
        scene.play(("GET", "/t1"))
    assert (RAN, scene.store.admissions) == ([], [])


def test_generator_that_a_websocket_depends_on_asks_for_a_middleware() -> None:
    """Slowapi limits no WebSockets, and an adopted limiter those behind our middleware alone."""
    scene = adopted()

    @scene.app.websocket("/ws")
    async def talk(websocket: WebSocket, given: int = Depends(scene.limiter.limit("1/minute")(plain))) -> None:
        raise AssertionError("let in")

    with TestClient(scene.app) as client, pytest.raises(NoCallError), client.websocket_connect("/ws"):
        raise AssertionError("let in")


def test_generator_that_was_decorated_before_fails_at_adoption() -> None:
    """Slowapi's wrapper of it is called when nobody can wait for a store any more: a sentence, and no 500 for each."""
    app, limiter = FastAPI(), Limiter(key_func=get_remote_address)
    build(app, limiter, one, is_dependency=False)
    with pytest.raises(ConfigurationError, match=r"the generator .*\.one before its Limiter"):
        adopt(limiter, app=app)


def test_generator_without_fastapi_is_asked_for_by_its_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else runs generator functions as endpoints, so that nobody asks before; it does not run uncounted."""
    monkeypatch.setitem(sys.modules, "fastapi", None)
    limiter = adopt(Limiter(key_func=get_remote_address))
    with pytest.raises(NoCallError):
        limiter.limit("1/minute")(plain)()

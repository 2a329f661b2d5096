"""Where an adopted limiter counts, and what it does while the store is down."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from typing import Any

import httpx
import pytest
from slowapi import Limiter
from slowapi.util import get_remote_address
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.testclient import TestClient

from asgi_metering import Metering
from asgi_metering.errors import ConfigurationError
from asgi_metering.integrations.slowapi import adopt
from asgi_metering.integrations.slowapi.rules import STRATEGIES as THEIRS
from asgi_metering.rates import STRATEGIES
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.testing import FakeClock, store_down
from tests.integrations.scenes import ask, both, codes, install, text


class Down:
    """An application whose store may be switched off."""

    def __init__(self, **options: Any) -> None:
        self.store = store_down("memory://")
        self.metering = Metering(self.store, sinks=(), store_timeout_s=0.05)
        self.limiter = adopt(Limiter(key_func=get_remote_address, **options), self.metering)
        self.app = Starlette()
        install(self.app, self.limiter, "asgi")
        self.app.add_route("/t1", self.limiter.limit("1/minute")(text))
        self.app.add_route("/t2", _other)

    def get(self, path: str, times: int = 1) -> list[httpx.Response]:
        """Answers without the store."""
        with self.store.down("refuse"):
            return ask(self.app, *[("GET", path)] * times)


async def _other(request: Any) -> Any:
    return text(request)


def test_time_that_an_application_s_tests_move_is_moved_here_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory the time is `time.time`, as in slowapi, also where tests have put another function there since."""
    real = time.time
    for limiter in (Limiter(key_func=get_remote_address), adopt(Limiter(key_func=get_remote_address))):
        app = Starlette()
        install(app, limiter, "decorators")
        app.add_route("/t1", limiter.limit("1/hour")(text))
        answers = ask(app, ("GET", "/t1"), ("GET", "/t1"))
        monkeypatch.setattr(time, "time", lambda: real() + 3_601)
        answers += ask(app, ("GET", "/t1"))
        monkeypatch.undo()
        assert codes(answers) == [200, 429, 200]


@pytest.mark.parametrize(
    ("options", "decorated", "default"),
    [
        ({}, [503, 503, 503], [503, 503, 503]),
        ({"swallow_errors": True}, [200, 200, 200], [200, 200, 200]),
        ({"in_memory_fallback_enabled": True}, [200, 429, 429], [200, 200, 429]),
        ({"in_memory_fallback_enabled": True, "swallow_errors": True}, [200, 429, 429], [200, 200, 429]),
        ({"in_memory_fallback": ["2/minute"]}, [200, 200, 429], [200, 200, 429]),
    ],
)
def test_without_a_store_requests_are_answered_as_the_limiter_says(
    options: dict[str, Any], decorated: list[int], default: list[int]
) -> None:
    """
    Denied with 503 and a wait, let in, counted in this process, or by the limits for that time.

    slowapi answers 500 to the first two: it has nothing that a handler could show.
    """
    scene = Down(default_limits=["2/minute"], headers_enabled=True, **options)
    answers = scene.get("/t1", 3)
    assert codes(answers) == decorated
    assert codes(scene.get("/t2", 3)) == default
    latest = scene.metering._latest
    assert latest is not None
    assert not latest.in_flight
    if decorated[0] == 503:
        assert all(int(answer.headers["retry-after"]) > 0 for answer in answers)
    if decorated[2] == 429:
        limit = "2" if "in_memory_fallback" in options else "1"
        assert answers[2].headers["x-ratelimit-limit"] == limit
        assert answers[2].json()["error"] == f"Rate limit exceeded: {limit} per 1 minute"


def test_store_that_does_not_answer_stops_no_other_request() -> None:
    """While one request waits for the store, an endpoint without limits answers."""
    scene = Down()
    told: list[str] = []

    async def run() -> None:
        transport = httpx.ASGITransport(scene.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:

            async def asked(path: str) -> None:
                await client.get(path)
                told.append(path)

            async with asyncio.TaskGroup() as group:
                waiting = group.create_task(asked("/t1"))
                while not scene.metering.runtime().pump:
                    await asyncio.sleep(0)
                await asked("/t2")
                assert not waiting.done()

    with scene.store.down("stall"):
        asyncio.run(run())
    assert told == ["/t2", "/t1"]


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        (None, "memory"),
        ("memory://", "memory"),
        ("redis://localhost:6379/1", "redis"),
        ("rediss://localhost:6379", "redis"),
        ("redis+sentinel://localhost:26379/mymaster", "redis"),
    ],
)
def test_store_is_where_the_limiter_kept_its_counts(uri: str | None, name: str) -> None:
    """``storage_uri`` names a store of ours, which nothing has opened yet."""
    limiter = adopt(Limiter(key_func=get_remote_address, storage_uri=uri))
    assert limiter.metering.store.name == name
    assert not limiter.metering.identifies


def test_moving_window_counts_the_last_requests_one_by_one() -> None:
    """Each request has a window of its own, as in slowapi."""
    clock = FakeClock()
    own = Limiter(key_func=get_remote_address, strategy="moving-window", headers_enabled=True)
    if "moving" not in STRATEGIES:
        with pytest.raises(ConfigurationError, match="'moving-window' is not known"):
            adopt(own)
        return
    limiter = adopt(own, Metering(MemoryStore(clock), sinks=()))
    app = Starlette()
    install(app, limiter, "asgi")
    app.add_route("/t1", limiter.limit("2/minute")(text))
    assert codes(ask(app, ("GET", "/t1"))) == [200]
    clock.advance(40)
    assert codes(ask(app, *[("GET", "/t1")] * 2)) == [200, 429]
    clock.advance(21)
    answers = ask(app, *[("GET", "/t1")] * 2)
    assert codes(answers) == [200, 429]
    assert answers[1].headers["retry-after"] == "39"


@pytest.mark.parametrize("strategy", list(THEIRS))
def test_request_may_cost_several_hits_of_any_window(strategy: str) -> None:
    """A cost that is written, or that a function answers, is taken of every kind of window, as in slowapi."""

    def build(app: Any, limiter: Any) -> None:
        async def written(request: Request) -> Response:
            return PlainTextResponse("test")

        async def asked(request: Request) -> Response:
            return PlainTextResponse("test")

        app.add_route("/written", limiter.limit("5/year", cost=2)(written))
        app.add_route("/asked", limiter.limit("5/year", cost=lambda request: int(request.query_params["cost"]))(asked))

    costs = [("GET", f"/asked?cost={cost}") for cost in (3, 0, 2, 0, 1)]
    slow, ours = both(build, *[("GET", "/written")] * 3, *costs, strategy=strategy, kind=Starlette)
    assert codes(ours) == codes(slow) == [200, 200, 429, 200, 200, 200, 200, 429]


def test_storage_from_the_settings_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """So is one that an environment variable names."""
    monkeypatch.setenv("RATELIMIT_STORAGE_URL", "redis://localhost:6379/1")
    assert adopt(Limiter(key_func=get_remote_address)).metering.store.name == "redis"


def test_storage_that_has_no_store_of_ours_is_refused_with_the_mend() -> None:
    """Memcached, say, or options that no URL can carry; with a metering of one's own both are taken."""
    limiter = Limiter(key_func=get_remote_address)
    limiter._storage_uri = "memcached://localhost:11211"
    with pytest.raises(ConfigurationError, match=r"'memcached://' is none .* Pass a Metering of your own"):
        adopt(limiter)
    limiter._storage_uri, limiter._storage_options = "redis://localhost", {"connection_pool": object()}  # type: ignore[dict-item]
    with pytest.raises(ConfigurationError, match="connection_pool"):
        adopt(limiter)
    assert adopt(limiter, Metering("memory://", sinks=())).metering.store.name == "memory"


def test_options_of_the_storage_are_the_stores() -> None:
    """Those that are texts and numbers go into its URL."""
    limiter = Limiter(key_func=get_remote_address)
    limiter._storage_uri, limiter._storage_options = "redis://localhost", {"socket_timeout": 3}  # type: ignore[dict-item]
    assert adopt(limiter).metering.store.name == "redis"
    limiter = Limiter(key_func=get_remote_address)
    limiter._storage_uri, limiter._storage_options = "redis://localhost", {"timeout": "never"}
    with pytest.raises(ConfigurationError, match="timeout='never'"):
        adopt(limiter)


@pytest.mark.parametrize("installed", ["middleware", "asgi"])
def test_store_is_closed_with_the_application(installed: str) -> None:
    """What the first request has opened is given back when slowapi's middleware sees the end of the lifespan."""
    opened: list[str] = []

    class Noting(MemoryStore):
        immediate = False

        async def open(self) -> None:
            opened.append("open")
            await super().open()

        async def close(self) -> None:
            opened.append("close")
            await super().close()

    limiter = adopt(Limiter(key_func=get_remote_address), Metering(Noting(), sinks=()))
    app = Starlette()
    install(app, limiter, installed)
    app.add_route("/t1", limiter.limit("1/minute")(text))
    with TestClient(app) as client:
        assert [client.get("/t1").status_code for _ in range(2)] == [200, 429]
        assert opened == ["open"]
    assert opened == ["open", "close"]


def test_reset_of_a_shared_store_is_not_done(caplog: pytest.LogCaptureFixture) -> None:
    """What other processes have counted is not forgotten; slowapi's own warning says so."""
    limiter = adopt(Limiter(key_func=get_remote_address, storage_uri="redis://localhost"))
    limiter.reset()
    assert "does not support being reset" in caplog.text


def test_without_slowapi_the_extra_is_named() -> None:
    """The package is imported when it is used, and its absence is told with what to install."""
    script = (
        "import sys, asgi_metering; assert 'slowapi' not in sys.modules; sys.modules['slowapi'] = None\n"
        "try: import asgi_metering.integrations.slowapi\n"
        "except Exception as failure: print(type(failure).__name__, failure)"
    )
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert out.startswith("MissingExtraError")
    assert "asgi-metering[slowapi]" in out

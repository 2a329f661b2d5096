"""The same traces against slowapi itself and against an adopted limiter: the same statuses, bodies and fields."""

from __future__ import annotations

import asyncio
import os
import random
import time
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from slowapi import Limiter
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from asgi_metering import Metering
from asgi_metering.integrations.slowapi import adopt
from asgi_metering.integrations.slowapi.rules import STRATEGIES as THEIRS
from asgi_metering.rates import STRATEGIES
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.testing import FakeClock
from tests.integrations.scenes import install

FIELDS = ("x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset", "retry-after")

STEPS = 100
"""Requests of one trace: every limit below is spent, and begins anew, some times in so many."""


def who(request: Request) -> str:
    """Whom to count: what a client says of itself."""
    return request.headers["x-key"]


def _is_probe(request: Request) -> bool:
    return "x-probe" in request.headers


def build(kind: Any, limiter: Any, installed: str) -> Any:
    """
    An application with every kind of limit on which slowapi is right.

    One limit an endpoint, cost 1: with several, or with costs, slowapi spends what it refuses, and differs (see
    `test_slowapi_differences`).
    """
    app = kind()
    install(app, limiter, installed)

    def endpoint(name: str, *decorators: Any, is_sync: bool = False) -> None:
        async def answer(request: Request) -> Response:
            return PlainTextResponse(name)

        def sync_answer(request: Request) -> Response:
            return PlainTextResponse(name)

        decorated: Any = sync_answer if is_sync else answer
        decorated.__name__ = decorated.__qualname__ = name
        for decorator in decorators:
            decorated = decorator(decorated)
        app.add_route(f"/{name}", decorated, methods=["GET", "POST"])
        app.add_route(f"/{name}/{{more}}", decorated, methods=["GET"])

    endpoint("single", limiter.limit("3/minute"))
    endpoint("sync", limiter.limit("2/30 second", error_message="slow"), is_sync=True)
    endpoint("everybody", limiter.limit("5/minute", key_func=lambda: "all"))
    shared = limiter.shared_limit("4/minute", "s")
    endpoint("first", shared)
    endpoint("second", shared, is_sync=True)
    endpoint("probed", limiter.limit("2/minute", exempt_when=_is_probe))
    endpoint("posts", limiter.limit("1/minute", methods=["POST"]))
    endpoint("apart", limiter.limit("2/minute", per_method=True))
    # Behind its middlewares it counts these by the defaults as well, and sends its fields twice.
    computed = limiter.limit(lambda key: "3/minute" if key == "a" else "1/minute")
    endpoint("computed", *([computed] if installed == "decorators" else []))
    endpoint("free", limiter.exempt)
    return app


PATHS = ("single", "sync", "everybody", "first", "second", "probed", "posts", "apart", "computed", "free", "single/x")


class Ticking(FakeClock):
    """Time passes, if little, with each look at it: slowapi looks again for its fields."""

    def __call__(self) -> float:
        """The time, a microsecond after the last look."""
        return self.advance(1e-6)


class Side:
    """One of the two, driven step by step."""

    def __init__(self, app: Any) -> None:
        self._client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")

    async def ask(self, method: str, path: str, headers: dict[str, str]) -> tuple[Any, ...]:
        """What an answer tells: status, body, and fields; the reset in whole seconds, which slowapi does not send."""
        answer = await self._client.request(method, path, headers=headers)
        told = [answer.headers.get(name) for name in FIELDS]
        if told[2] is not None:
            told[2] = str(int(float(told[2])))
        return answer.status_code, answer.text, *told


@pytest.mark.parametrize(
    ("kind", "style", "installed", "strategy"),
    [
        (Starlette, "url", "decorators", "fixed-window"),
        (Starlette, "endpoint", "middleware", "fixed-window"),
        (FastAPI, "endpoint", "decorators", "fixed-window"),
        (FastAPI, "url", "middleware", "fixed-window"),
        *((Starlette, "url", "decorators", theirs) for theirs, ours in THEIRS.items() if ours in STRATEGIES[1:]),
    ],
)
def test_traces_are_answered_as_by_slowapi(
    kind: Any, style: Any, installed: str, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random traces over every kind of limit and three clients, while time passes, differ in nothing."""
    seed = random.randrange(2**32) if os.environ.get("METERING_TEST_RANDOM") else 7
    draw = random.Random(f"{seed} {style} {installed}")
    clock = Ticking()
    monkeypatch.setattr(time, "time", clock)

    async def run() -> set[int]:
        options: dict[str, Any] = {"headers_enabled": True, "key_style": style, "key_prefix": draw.choice(["", "p"])}
        options |= {"default_limits": ["4/minute"], "strategy": strategy}
        theirs = Side(build(kind, Limiter(key_func=who, **options), installed))
        adopted = adopt(Limiter(key_func=who, **options), Metering(MemoryStore(clock), sinks=()))
        ours = Side(build(kind, adopted, installed))
        seen = set()
        for step in range(STEPS):
            clock.advance(draw.choice([0.0, 0.0, 0.5, 3.0, 17.25]))
            method, path = draw.choice(["GET", "GET", "GET", "POST"]), f"/{draw.choice(PATHS)}"
            headers = {"x-key": draw.choice("aab")} | ({"x-probe": "1"} if draw.random() < 0.2 else {})
            expected = await theirs.ask(method, path, headers)
            assert await ours.ask(method, path, headers) == expected, (seed, step, method, path, headers)
            seen.add(expected[0])
        return seen

    assert {200, 429} <= asyncio.run(run())

"""
The peers: one small endpoint behind each limiter that an application could take instead, in memory or on one Redis.

Each is written as its own documentation shows it, and where it is not, that is said. What it does wrong is found out by
`judge`, and not assumed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from fastapi import Depends, FastAPI
from fastapi_limiter.depends import RateLimiter
from limits import RateLimitItem, parse
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import FixedWindowRateLimiter
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.sdk.trace import TracerProvider
from pyrate_limiter import AbstractBucket, BucketFactory, InMemoryBucket, Rate, RateItem, RedisBucket
from pyrate_limiter import Limiter as PyrateLimiter
from redis.asyncio import Redis
from slowapi import Limiter, _rate_limit_exceeded_handler
from slowapi.errors import RateLimitExceeded
from slowapi.middleware import SlowAPIASGIMiddleware, SlowAPIMiddleware
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from throttled import RateLimiterType
from throttled.asyncio import MemoryStore as ThrottledMemory
from throttled.asyncio import RedisStore as ThrottledRedis
from throttled.asyncio import Throttled, per_duration

from asgi_metering import Caller, Metering, MeteringMiddleware, billable, rate_limited
from asgi_metering.events.sinks import CallbackSink
from tests.bench.subjects import PLENTY, forget, scope

__all__ = ["BARE", "MEMORY", "PEERS", "Peer", "Verdict", "judge", "opened"]

MEMORY = "memory://"

KEY = "x-key"
"""The header field that says who calls."""

CHUNKS = 20
"""Of the stream that peers have to let through."""


@dataclass(frozen=True)
class Peer:
    """
    One way to limit an endpoint.

    Attributes:
        name: As the tables call it.
        make: From the limits' texts and the URL of a store to an application with ``/hit`` and ``/stream``; what the
            application needs to be up is entered on the stack.
        on_redis: Whether it can keep its counts on Redis.
        most: How many limits it can have.
        base: The bare application that its cost is counted over.
        limits: Whether it limits at all.
    """

    name: str
    make: Callable[[Sequence[str], str, AsyncExitStack], Awaitable[Any]]
    on_redis: bool = True
    most: int = 3
    base: str = "bare Starlette"
    limits: bool = True


async def plain(_request: Request) -> JSONResponse:
    """The endpoint."""
    return JSONResponse({"ok": True})


async def stream(_request: Request) -> StreamingResponse:
    """The endpoint that streams."""

    async def body() -> AsyncIterator[bytes]:
        for number in range(CHUNKS):
            yield b"%d\n" % number

    return StreamingResponse(body(), media_type="text/event-stream")


def _copied(endpoint: Any) -> Any:
    """Decorators mark the function that they get: each application has functions of its own."""

    async def copied(request: Request) -> Response:
        return await endpoint(request)

    copied.__name__ = endpoint.__name__
    return copied


def _application(guard: Callable[[Any], Any]) -> Starlette:
    return Starlette(routes=[Route("/hit", guard(_copied(plain))), Route("/stream", guard(_copied(stream)))])


def _items(texts: Sequence[str]) -> list[RateLimitItem]:
    return [parse(text) for text in texts]


# -- nothing -----------------------------------------------------------------------------------------------


async def _bare(_limits: Sequence[str], _store: str, _stack: AsyncExitStack) -> Any:
    return _application(lambda endpoint: endpoint)


async def _bare_fastapi(_limits: Sequence[str], _store: str, _stack: AsyncExitStack) -> Any:
    return _fastapi([])


def _fastapi(dependencies: list[Any]) -> FastAPI:
    app = FastAPI(openapi_url=None)
    app.add_api_route("/hit", plain_fastapi, dependencies=dependencies)
    app.add_api_route("/stream", stream_fastapi, dependencies=dependencies)
    return app


async def plain_fastapi() -> JSONResponse:
    """The endpoint, in FastAPI's way."""
    return JSONResponse({"ok": True})


async def stream_fastapi() -> StreamingResponse:
    """The endpoint that streams, likewise."""
    return await stream(Request({"type": "http"}))


# -- ours --------------------------------------------------------------------------------------------------


async def _limited_by_us(limits: Sequence[str], store: str, stack: AsyncExitStack) -> Any:
    return await _ours(store, stack, lambda endpoint: rate_limited(*limits)(endpoint), ())


async def _paid_by_us(limits: Sequence[str], store: str, stack: AsyncExitStack) -> Any:
    def guard(endpoint: Any) -> Any:
        return rate_limited(*limits, concurrency=1_000)(billable(1)(endpoint))

    # With a sink: without one nobody would want the events, and none would be written.
    return await _ours(store, stack, guard, (CallbackSink(forget, "forgotten"),))


async def _ours(store: str, stack: AsyncExitStack, guard: Callable[[Any], Any], sinks: Sequence[Any]) -> Any:
    metering = Metering(store, identify=lambda connection: Caller(connection.headers[KEY]), sinks=sinks)
    await metering.start()
    stack.push_async_callback(metering.stop)
    # As under a server with a lifespan: otherwise each request waits for its own end to be booked.
    metering.runtime().managed = True
    for payer in ("bench", "other"):
        await metering.grant(payer, 1_000_000_000, id="bench")
    return MeteringMiddleware(_application(guard), metering=metering)


# -- others ------------------------------------------------------------------------------------------------


async def _limits(limits: Sequence[str], store: str, _stack: AsyncExitStack) -> Any:
    """What a careful author writes by hand around the `limits` package: every limit in turn."""
    storage = MemoryStorage() if store == MEMORY else RedisStorage(f"async+{store}", implementation="redispy")
    limiter, items = FixedWindowRateLimiter(storage), _items(limits)

    def guard(endpoint: Any) -> Any:
        async def guarded(request: Request) -> Response:
            for item in items:
                if not await limiter.hit(item, endpoint.__name__, request.headers[KEY]):
                    return JSONResponse({"error": "rate limited"}, 429)
            return await endpoint(request)

        return guarded

    return _application(guard)


def _key(request: Request) -> str:
    return request.headers[KEY]


async def _slowapi(limits: Sequence[str], store: str, _stack: AsyncExitStack) -> Any:
    limiter = Limiter(key_func=_key, storage_uri=store)

    def guard(endpoint: Any) -> Any:
        for limit in limits:
            endpoint = limiter.limit(limit)(endpoint)
        return endpoint

    return _with_slowapi(_application(guard), limiter)


def _slowapi_middleware(kind: Any) -> Any:
    async def make(limits: Sequence[str], store: str, _stack: AsyncExitStack) -> Any:
        limiter = Limiter(key_func=_key, storage_uri=store, default_limits=list(limits))
        app = _with_slowapi(_application(lambda endpoint: endpoint), limiter)
        app.add_middleware(kind)
        return app

    return make


def _with_slowapi(app: Starlette, limiter: Limiter) -> Starlette:
    app.state.limiter = limiter
    app.add_exception_handler(RateLimitExceeded, _rate_limit_exceeded_handler)
    return app


async def _throttled(limits: Sequence[str], store: str, _stack: AsyncExitStack) -> Any:
    kept = ThrottledMemory() if store == MEMORY else ThrottledRedis(server=store)
    throttles = [
        Throttled(
            using=RateLimiterType.FIXED_WINDOW.value,
            quota=per_duration(timedelta(seconds=item.get_expiry()), item.amount),
            store=kept,
            key_prefix=f"limit{number}",
        )
        for number, item in enumerate(_items(limits))
    ]

    def guard(endpoint: Any) -> Any:
        async def guarded(request: Request) -> Response:
            for throttle in throttles:
                if (await throttle.limit(f"{endpoint.__name__}:{request.headers[KEY]}")).limited:
                    return JSONResponse({"error": "rate limited"}, 429)
            return await endpoint(request)

        return guarded

    return _application(guard)


class _Keyed(BucketFactory):
    """Pyrate's own factory has one bucket for all keys: this one has one for each, as its documentation advises."""

    def __init__(self, rates: list[Rate], store: str) -> None:
        self._rates = rates
        self._redis = None if store == MEMORY else Redis.from_url(store)
        self._buckets: dict[str, AbstractBucket] = {}

    def wrap_item(self, name: str, weight: int = 1) -> RateItem:
        """Stamp one request."""
        return RateItem(name, AbstractBucket._clock.now(), weight=weight)

    async def _made(self, name: str) -> AbstractBucket:
        found = self._buckets.get(name)
        if found is None:
            found = await RedisBucket.init(self._rates, self._redis, name)
            self._buckets[name] = found
        return found

    def get(self, item: RateItem) -> Any:
        """The bucket of one key."""
        if self._redis is not None:
            return self._made(item.name)
        found = self._buckets.get(item.name)
        if found is None:
            found = self._buckets[item.name] = InMemoryBucket(self._rates)
        return found


def _rates(limits: Sequence[str]) -> list[Rate]:
    return [Rate(item.amount, 1_000 * item.get_expiry()) for item in _items(limits)]


async def _pyrate(limits: Sequence[str], store: str, stack: AsyncExitStack) -> Any:
    limiter = PyrateLimiter(_Keyed(_rates(limits), store))
    stack.callback(limiter.close)

    def guard(endpoint: Any) -> Any:
        async def guarded(request: Request) -> Response:
            if not await limiter.try_acquire_async(f"{endpoint.__name__}:{request.headers[KEY]}", blocking=False):
                return JSONResponse({"error": "rate limited"}, 429)
            return await endpoint(request)

        return guarded

    return _application(guard)


async def _fastapi_limiter(limits: Sequence[str], store: str, stack: AsyncExitStack) -> Any:
    """As its README has it, one limiter and one dependency a limit; the key is the caller's, and not the address."""
    dependencies = []
    for number, rate in enumerate(_rates(limits)):
        if store == MEMORY:
            bucket: AbstractBucket = InMemoryBucket([rate])
        else:
            bucket = await RedisBucket.init([rate], Redis.from_url(store), f"fastapi{number}")
        limiter = PyrateLimiter(bucket)
        stack.callback(limiter.close)
        dependencies.append(Depends(RateLimiter(limiter=limiter, identifier=_identified)))
    return _fastapi(dependencies)


async def _identified(request: Request) -> str:
    return request.headers[KEY]


async def _traced(_limits: Sequence[str], _store: str, stack: AsyncExitStack) -> Any:
    provider = TracerProvider()
    stack.callback(provider.shutdown)
    return OpenTelemetryMiddleware(_application(lambda endpoint: endpoint), tracer_provider=provider)


BARE = (
    Peer("bare Starlette", _bare, limits=False, on_redis=False),
    Peer("bare FastAPI", _bare_fastapi, limits=False, on_redis=False),
)
"""What the others are counted over."""

PEERS = (
    Peer("asgi_metering: limits", _limited_by_us),
    Peer("asgi_metering: limits, lease, hold, settlement, event", _paid_by_us),
    Peer("limits, async", _limits),
    Peer("slowapi, decorator", _slowapi),
    Peer("slowapi, pure ASGI middleware", _slowapi_middleware(SlowAPIASGIMiddleware)),
    Peer("slowapi, middleware", _slowapi_middleware(SlowAPIMiddleware)),
    Peer("throttled-py, fixed window", _throttled),
    Peer("pyrate-limiter, a bucket for each key", _pyrate),
    Peer("fastapi-limiter", _fastapi_limiter, base="bare FastAPI"),
    Peer("OpenTelemetry ASGI, traces", _traced, limits=False, on_redis=False),
)


@asynccontextmanager
async def opened(peer: Peer, limits: Sequence[str] = PLENTY, store: str = MEMORY) -> AsyncIterator[Any]:
    """The application of *peer*, while it is up."""
    async with AsyncExitStack() as stack:
        yield await peer.make(limits[: peer.most], store, stack)


# -- what each of them does --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """
    What one peer was seen to do.

    Attributes:
        refuses: The request above its limit.
        apart: Another caller is not refused with the first one.
        streams: A stream comes through as it was sent, in its chunks.
    """

    refuses: bool
    apart: bool
    streams: bool


async def judge(peer: Peer, store: str = MEMORY) -> Verdict:
    """Try *peer* out with two requests a minute."""
    async with opened(peer, ("2/minute",), store) as app:
        refuses = [await status(app, "/hit", "bench") for _ in range(3)] == [200, 200, 429]
        apart = await status(app, "/hit", "other") == 200
    async with opened(peer, PLENTY, store) as app:
        sent = await asked(app, "/stream", "bench")
        chunks = [message for message in sent if message["type"] == "http.response.body" and message.get("body")]
        starts = [message for message in sent if message["type"] == "http.response.start"]
    return Verdict(refuses, apart, len(starts) == 1 and len(chunks) == CHUNKS)


async def status(app: Any, path: str, key: str) -> int:
    """The status of one request; 500 where it raises."""
    try:
        sent = await asked(app, path, key)
    except Exception:
        return 500
    return int(sent[0]["status"])


async def asked(app: Any, path: str, key: str) -> list[dict[str, Any]]:
    """All messages of one answer."""
    sent: list[dict[str, Any]] = []
    body = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> dict[str, Any]:
        return body.pop() if body else await asyncio.Event().wait()

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope(path, key), receive, send)
    return sent

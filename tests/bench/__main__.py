"""
Run the benchmark and print its tables: ``tox run -e bench``.

Options: ``--rounds N`` and ``--requests N``; the defaults take about two minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import platform
import tracemalloc
from importlib.metadata import version
from typing import Any

from asgi_metering import billable, metered_app, rate_limited
from asgi_metering.events.sinks import CallbackSink
from asgi_metering.tokens import warm_up
from tests.bench import subjects as s
from tests.bench.drive import Subject, measure, ratios, table

CHUNKS = 2_000


async def requests_table(routes: int, rounds: int, requests: int) -> str:
    """Added CPU per request."""
    made = await s.metering(sinks=())
    # With a sink: without one nobody would want the events, and none would be written.
    telling = await s.metering(sinks=(CallbackSink(s.forget, "forgotten"),))
    three, one = s.PLENTY, s.PLENTY[:1]
    bare = s.application(s.plain, routes)
    subjects = [
        Subject("bare Starlette", s.requests_to(bare, "/hit")),
        Subject("bare Starlette again", s.requests_to(s.application(s.plain, routes), "/hit"), "bare Starlette"),
        Subject("no-op ASGI middleware", s.requests_to(s.NoOp(bare), "/hit"), "bare Starlette"),
        Subject(
            "asgi_metering, unmetered route", s.requests_to(s.ours(made, s.plain, routes), "/hit"), "bare Starlette"
        ),
        _ours("asgi_metering, 1 limit", made, s.limited_by_us(one), routes),
        _ours("asgi_metering, 3 limits", made, s.limited_by_us(three), routes),
        _ours("asgi_metering, 1 limit, lease, hold, settlement, event", telling, s.paid_by_us(one), routes),
        _ours("asgi_metering, 3 limits, lease, hold, settlement, event", telling, s.paid_by_us(three), routes),
        _app("limits, 1 limit", s.application(s.limits_called_directly(one), routes)),
        _app("limits, 3 limits", s.application(s.limits_called_directly(three), routes)),
        _app("slowapi decorator, 1 limit", s.slowapi_decorator(one, routes)),
        _app("slowapi decorator, 3 limits", s.slowapi_decorator(three, routes)),
        _app("slowapi ASGI middleware, 3 limits", s.slowapi_middleware(three, routes, pure=True)),
        _app("slowapi middleware, 3 limits", s.slowapi_middleware(three, routes, pure=False)),
    ]
    rows = await measure(subjects, rounds=rounds, requests=requests)
    over = ratios(subjects, "limits, 3 limits", "bare Starlette")
    await made.stop()
    await telling.stop()
    return table(f"Per request, {routes} route(s), the last hit", rows, over, "limits with 3 limits", "us")


def _app(name: str, app: Any) -> Subject:
    return Subject(name, s.requests_to(app, "/hit"), "bare Starlette")


def _ours(name: str, made: Any, endpoint: Any, routes: int) -> Subject:
    return _app(name, s.ours(made, endpoint, routes))


async def chunks_table(rounds: int, requests: int) -> str:
    """Added CPU per streamed chunk, over a no-op that wraps `send`."""
    made = await s.metering(sinks=())
    parts = []
    for size, chunk in (("50 bytes", s.SMALL_CHUNK), ("4 KiB", s.BIG_CHUNK)):
        app = s.streaming(chunk, CHUNKS)
        noop = Subject("no-op ASGI middleware", s.requests_to(s.NoOp(app), "/hit"))
        subjects = [
            noop,
            _chunked("asgi_metering, unmetered", s.MeteringMiddleware(app, metering=made)),
            _chunked("asgi_metering, fixed price", s.MeteringMiddleware(metered_app(app, billable(1)), metering=made)),
            _chunked(
                "asgi_metering, usage extracted, off the path included",
                s.MeteringMiddleware(
                    metered_app(app, billable(s.TOKENS), rate_limited("1000000/minute")), metering=made
                ),
            ),
        ]
        rows = await measure(subjects, rounds=rounds, requests=max(3, requests // 100))
        for row in rows:
            object.__setattr__(row, "median", row.median / CHUNKS)
            object.__setattr__(row, "low", row.low / CHUNKS)
            object.__setattr__(row, "high", row.high / CHUNKS)
        parts.append(table(f"Per chunk of {size}, {CHUNKS} chunks a response", rows, {}, "-", "us"))
    await made.stop()
    return "\n".join(parts)


def _chunked(name: str, app: Any) -> Subject:
    return Subject(name, s.requests_to(app, "/hit"), "no-op ASGI middleware")


async def memory_table() -> str:
    """What stays allocated while a long stream passes."""
    made = await s.metering(sinks=())
    # A long stream has heartbeats, and the first one that counts text would load the vocabulary: 14 MiB, once.
    await warm_up()
    lines = ["### Memory while a stream passes, KiB over the start", "", "| chunks | peak |", "|---:|---:|"]
    for chunks in (1_000, 20_000, 200_000):
        app = s.MeteringMiddleware(metered_app(s.streaming(s.SMALL_CHUNK, chunks), billable(s.TOKENS)), metering=made)
        tracemalloc.start()
        await s.requests_to(app, "/hit")(1)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        lines.append(f"| {chunks} | {peak / 1024:.0f} |")
    await made.stop()
    return "\n".join(lines) + "\n"


async def main() -> None:
    """Print every table."""
    options = argparse.ArgumentParser(description="Benchmark of asgi_metering")
    options.add_argument("--rounds", type=int, default=25)
    options.add_argument("--requests", type=int, default=500)
    given = options.parse_args()
    versions = ", ".join(f"{name} {version(name)}" for name in ("starlette", "limits", "slowapi"))
    print(f"Python {platform.python_version()}, {versions}; {given.rounds} rounds of {given.requests} requests.\n")
    print("Median [quartiles] over rounds; all subjects interleaved in one process.\n")
    for routes in (1, 200):
        print(await requests_table(routes, given.rounds, given.requests))
    print(await chunks_table(given.rounds, given.requests))
    print(await memory_table())


if __name__ == "__main__":
    asyncio.run(main())

"""
Run the benchmark and print its tables: ``tox run -e bench``.

Options: ``--rounds N``, ``--requests N``, ``--chunks N`` and ``--memory N ...``; the defaults take about two minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import platform
import tracemalloc
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from asgi_metering import billable, metered_app, rate_limited
from asgi_metering.events.sinks import CallbackSink
from asgi_metering.tokens import warm_up
from tests.bench import subjects as s
from tests.bench.drive import Subject, measure, ratios, shares, spread, table

ROUNDS = 13
REQUESTS = 200
CHUNKS = 2_000
"""Of one response whose chunks are timed."""

REQUESTS_PER_STREAM = 100
"""A response of so many chunks stands for so many requests: a round of streams takes about as long as one of those."""

MEMORY = (1_000, 20_000, 200_000)
"""Chunks of the streams whose memory is looked at."""

RUNS = 3
"""Of each stream whose memory is looked at, up to `MANY` chunks; beyond them one tells as much, and takes long."""

MANY = 20_000

NO_OP = "no-op ASGI middleware"


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
        Subject(NO_OP, s.requests_to(s.NoOp(bare), "/hit"), "bare Starlette"),
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
    return table(f"Per request, {routes} route(s), the last hit", rows, over, "limits with 3 limits", "CPU us")


def _app(name: str, app: Any) -> Subject:
    return Subject(name, s.requests_to(app, "/hit"), "bare Starlette")


def _ours(name: str, made: Any, endpoint: Any, routes: int) -> Subject:
    return _app(name, s.ours(made, endpoint, routes))


async def chunks_table(rounds: int, requests: int, chunks: int) -> str:
    """CPU per streamed chunk, and what is added over a no-op that wraps `send`."""
    made = await s.metering(sinks=())
    streams = max(1, requests // REQUESTS_PER_STREAM)
    parts = []
    for size, events in (("50 bytes", s.SMALL_CHUNKS), ("300 bytes", s.USUAL_CHUNKS), ("4 KiB", s.BIG_CHUNKS)):
        app = s.streaming(events, chunks)
        watched = metered_app(app, billable(s.TOKENS), rate_limited("1000000/minute"))
        totals = metered_app(s.streaming([*map(s.reporting, events)], chunks), billable(s.TOKENS))
        subjects = [
            Subject("bare app", s.requests_to(app, "/hit")),
            Subject(NO_OP, s.requests_to(s.NoOp(app), "/hit"), "bare app"),
            _chunked("asgi_metering, unmetered", s.MeteringMiddleware(app, metering=made)),
            _chunked("asgi_metering, fixed price", s.MeteringMiddleware(metered_app(app, billable(1)), metering=made)),
            _chunked(
                "asgi_metering, usage extracted, off the path included", s.MeteringMiddleware(watched, metering=made)
            ),
            _chunked(
                "asgi_metering, usage in every chunk, off the path included",
                s.MeteringMiddleware(totals, metering=made),
            ),
        ]
        rows = await measure(subjects, rounds=rounds, requests=streams, parts=chunks)
        title = f"Per chunk of {size}, {chunks} chunks a response, {streams} response(s) a round"
        parts.append(table(title, rows, shares(subjects, NO_OP), "the no-op's whole", "CPU us"))
    await made.stop()
    return "\n".join(parts)


def _chunked(name: str, app: Any) -> Subject:
    return Subject(name, s.requests_to(app, "/hit"), NO_OP)


async def memory_table(counts: Sequence[int]) -> str:
    """What is allocated at most while a long stream passes: the app alone, and behind the middleware."""
    made = await s.metering(sinks=())
    # A long stream has heartbeats, and the first one that counts text would load the vocabulary: 14 MiB, once.
    await warm_up()
    lines = [
        "### Memory while a stream of 50 byte chunks passes, peak in KiB over the start",
        "",
        "| chunks | runs | bare app | asgi_metering, usage extracted |",
        "|---:|---:|---:|---:|",
    ]
    for chunks in counts:
        bare = s.streaming(s.SMALL_CHUNKS, chunks)
        ours = s.MeteringMiddleware(metered_app(bare, billable(s.TOKENS)), metering=made)
        runs = RUNS if chunks <= MANY else 1
        # The first stream of all also fills caches, which no later one does.
        if chunks <= MANY:
            await s.requests_to(ours, "/hit")(1)
        peaks: list[list[float]] = [[], []]
        for _ in range(runs):
            for found, app in zip(peaks, (bare, ours), strict=True):
                found.append(await _peak_kib(app))
        lines.append(f"| {chunks} | {runs} | {spread(peaks[0])} | {spread(peaks[1])} |")
    await made.stop()
    return "\n".join(lines) + "\n"


async def _peak_kib(app: Any) -> float:
    gc.collect()
    tracemalloc.start()
    try:
        await s.requests_to(app, "/hit")(1)
        return tracemalloc.get_traced_memory()[1] / 1024
    finally:
        tracemalloc.stop()


async def main() -> None:
    """Print every table."""
    options = argparse.ArgumentParser(description="Benchmark of asgi_metering")
    options.add_argument("--rounds", type=int, default=ROUNDS, help="at least 2")
    options.add_argument("--requests", type=int, default=REQUESTS, help="of each subject in each round")
    options.add_argument("--chunks", type=int, default=CHUNKS, help="of each response whose chunks are timed")
    options.add_argument("--memory", type=int, nargs="+", default=MEMORY, help="chunks of streams, one row for each")
    given = options.parse_args()
    if given.rounds < 2:
        options.error("Quartiles need two rounds or more.")
    versions = ", ".join(f"{name} {version(name)}" for name in ("starlette", "limits", "slowapi"))
    print(f"Python {platform.python_version()}, {versions}; {given.rounds} rounds of {given.requests} requests.\n")
    print("CPU time of the process (time.process_time), warmed up, the garbage collector off while a subject runs.")
    print("Median [quartiles] over rounds; all subjects interleaved in one process, in random order.\n")
    for routes in (1, 200):
        print(await requests_table(routes, given.rounds, given.requests))
    print(await chunks_table(given.rounds, given.requests, given.chunks))
    print(await memory_table(given.memory))


if __name__ == "__main__":
    asyncio.run(main())

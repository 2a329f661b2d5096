"""
Ours beside the limiters that an application could take instead: ``tox run -e bench-peers``.

First it is tried what each of them does (`peers.judge`): one that does not refuse, mixes its callers up or breaks a
stream is faster for nothing. Then what each adds to a request in memory, admitted and refused, with one limit and with
three; then the same on one Redis, alone and 64 at once, with the round trips of each request as the server counts
them. Ours with everything on does more than any of them. Options: ``--rounds N``, ``--requests N``, ``--seconds S``.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import platform
import random
import statistics
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from importlib.metadata import version
from typing import Any, NamedTuple

from redis import Redis

from tests.bench.drive import Subject, Work, measure, ratios, table
from tests.bench.peers import BARE, MEMORY, PEERS, Peer, asked, judge, opened
from tests.bench.subjects import PLENTY, TURN, scope
from tests.harness.valkey import valkey

CALLERS = (1, 64)

TIGHT = ("1/hour", "2/day", "3/month")
"""All but the first request is refused."""

LIMITS = (1, 3)

DISTRIBUTIONS = (
    "starlette",
    "fastapi",
    "redis",
    "limits",
    "slowapi",
    "throttled-py",
    "pyrate-limiter",
    "fastapi-limiter",
    "opentelemetry-instrumentation-asgi",
)

OURS, THEIRS = PEERS[0], PEERS[2]


async def verdicts(store: str) -> None:
    """Print what each of them was seen to do."""
    print(f"### What they do, on {'memory' if store == MEMORY else 'Redis'}\n")
    print("| subject | refuses | keeps callers apart | lets a stream through |\n|---|---|---|---|")
    for peer in PEERS:
        if peer.limits and (store == MEMORY or peer.on_redis):
            if store != MEMORY:
                # Some of them count under the same keys.
                with Redis.from_url(store) as server:
                    server.flushall()
            seen = await judge(peer, store)
            shown = " | ".join("yes" if each else "**no**" for each in (seen.refuses, seen.apart, seen.streams))
            print(f"| {peer.name} | {shown} |", flush=True)
    print()


def requests_to(app: Any) -> Work:
    """Work that sends GET requests to *app* in process, as a server would."""

    async def work(count: int) -> None:
        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(_message: dict[str, Any]) -> None:
            return None

        for number in range(count):
            await app(scope("/hit", "bench"), receive, send)
            if number % TURN == 0:
                # A server's loop turns too; what runs off the path runs here, inside the time that is taken.
                await asyncio.sleep(0)
        await asyncio.sleep(0)

    return work


async def in_memory(limits: Sequence[str], title: str, given: argparse.Namespace) -> None:
    """Print the CPU that each adds to a request."""
    async with AsyncExitStack() as stack:
        subjects = []
        for peer in (*BARE, *PEERS):
            app = await stack.enter_async_context(opened(peer, limits))
            subjects.append(Subject(peer.name, requests_to(app), peer.base if peer not in BARE else None))
        rows = await measure(subjects, rounds=given.rounds, requests=given.requests)
        over = ratios(subjects, THEIRS.name, BARE[0].name)
        # Counted over another application than theirs is: the two are not to be divided.
        for peer in (*BARE, *PEERS):
            if peer.base != BARE[0].name or peer in BARE:
                over.pop(peer.name, None)
        print(table(title, rows, over, THEIRS.name, "CPU us"), flush=True)


class Sample(NamedTuple):
    """Microseconds a request, all callers together; the median time of one in ms; reads of the server for each."""

    micros: float
    p50_ms: float
    trips: float


async def sample(app: Any, callers: int, seconds: float, server: Redis) -> Sample:
    """Have *callers* ask one after another for *seconds*."""
    waits: list[float] = []
    until = time.perf_counter() + seconds

    async def caller() -> None:
        while time.perf_counter() < until:
            began = time.perf_counter()
            sent = await asked(app, "/hit", "bench")
            waits.append(time.perf_counter() - began)
            assert sent[0]["status"] == 200, sent[0]

    before, began = _reads(server), time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(callers)))
    took = time.perf_counter() - began
    return Sample(1e6 * took / len(waits), 1e3 * statistics.median(waits), (_reads(server) - before) / len(waits))


def _reads(server: Redis) -> int:
    # What waits together is read together: what one caller alone needs is the number of its round trips.
    stats: Any = server.info("stats")
    return int(stats["total_reads_processed"])


async def on_redis(url: str, limits: int, given: argparse.Namespace) -> None:
    """Print what each needs of one server."""
    server = Redis.from_url(url)
    # Those that count under the same keys share their counts here, far below what they allow.
    peers = [peer for peer in PEERS if peer.on_redis]
    found: dict[tuple[Peer, int], list[Sample]] = {(peer, callers): [] for peer in peers for callers in CALLERS}
    async with AsyncExitStack() as stack:
        server.flushall()
        apps = {peer: await stack.enter_async_context(opened(peer, PLENTY[:limits], url)) for peer in peers}
        for callers in CALLERS:
            for turn in range(given.rounds_on_redis + 1):
                for peer in random.sample(peers, len(peers)):
                    seen = await sample(apps[peer], callers, given.seconds, server)
                    # The first one opens connections and loads scripts.
                    if turn:
                        found[peer, callers].append(seen)
    server.close()
    print(f"### On Redis, {limits} limit{'s' if limits > 1 else ''}\n")
    print("| subject | round trips | 1 caller: us | p50, ms | over limits | 64 callers: us | p50, ms | over limits |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for peer in peers:
        cells = [f"{statistics.median(each.trips for each in found[peer, 1]):.1f}"]
        for callers in CALLERS:
            some, theirs = found[peer, callers], found[THEIRS, callers]
            over = statistics.median(a.micros / b.micros for a, b in zip(some, theirs, strict=True))
            cells += [f"{statistics.median(each.micros for each in some):.0f}"]
            cells += [f"{statistics.median(each.p50_ms for each in some):.2f}", f"{over:.2f}"]
        print(f"| {peer.name} | {' | '.join(cells)} |")
    print(flush=True)


async def main(given: argparse.Namespace) -> None:
    """Print every table."""
    versions = ", ".join(f"{name} {version(name)}" for name in DISTRIBUTIONS)
    print(f"Python {platform.python_version()}, {versions}.\n")
    await verdicts(MEMORY)
    for count in LIMITS:
        some = f"{count} limit{'s' if count > 1 else ''}"
        await in_memory(PLENTY[:count], f"In memory, {some}, admitted", given)
        await in_memory(TIGHT[:count], f"In memory, {some}, refused", given)
    with valkey() as server:
        await verdicts(server.url)
        for count in LIMITS:
            await on_redis(server.url, count, given)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Ours beside other limiters")
    parser.add_argument("--rounds", type=int, default=13, help="in memory; at least 2")
    parser.add_argument("--requests", type=int, default=200, help="of each in each round, in memory")
    parser.add_argument("--rounds-on-redis", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each in each round, on Redis")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("Quartiles need two rounds or more.")
    logging.disable(logging.CRITICAL)
    asyncio.run(main(options))

"""
Time what the memory store decides and settles, with nothing around it: ``python -m tests.bench.decision [--rounds N]``.

A request with three limits, a lease, a hold and an event is sent once, and what it asked of the store is asked again
and again, under other ids; beside `limits` called directly for the same three limits (DESIGN 9).
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from limits import RateLimitItem, parse
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import FixedWindowRateLimiter

from asgi_metering.events.sinks import CallbackSink
from asgi_metering.rules.operations import Acknowledge, Admit, End, Operation, PostGrant
from asgi_metering.stores.memory import MemoryStore
from tests.bench import subjects as s

ROUNDS, REQUESTS = 60, 300

WARM = 50
"""Requests before the one that is looked at: the first of a process asks more."""

RICH = 10**12
"""Smallest parts that no run uses up."""


async def asked() -> tuple[Admit, End]:
    """What one request with everything asks of its store: an admission, and its end."""
    made = await s.metering(sinks=(CallbackSink(s.forget, "forgotten"),))
    work = s.requests_to(s.ours(made, s.paid_by_us(s.PLENTY), 1), "/hit")
    await work(WARM)
    store: Any = made.store
    seen: dict[type, Any] = {}
    run_now = store.run_now

    def noted(operation: Operation) -> Any:
        seen[type(operation)] = operation
        return run_now(operation)

    store.run_now = noted
    await work(1)
    await made.stop()
    return seen[Admit], seen[End]


def run(operate: Callable[[Any], Any], operations: Sequence[Any]) -> float:
    """Seconds of CPU that the *operations* take."""
    begun = time.process_time()
    for operation in operations:
        operate(operation)
    return time.process_time() - begun


async def by_hand(limiter: FixedWindowRateLimiter, items: Sequence[RateLimitItem], requests: int) -> float:
    """Seconds of CPU of what a careful author writes: every limit in turn, for so many *requests*."""
    begun = time.process_time()
    for _ in range(requests):
        for item in items:
            await limiter.hit(item, "payer-1")
    return time.process_time() - begun


async def main(rounds: int, requests: int) -> None:
    """Print the table."""
    admit, end = await asked()
    store = MemoryStore()
    store.run_now(PostGrant("bench", admit.payer, admit.unit, RICH))
    limiter, items = FixedWindowRateLimiter(MemoryStorage()), [parse(limit) for limit in s.PLENTY]
    decided, settled, theirs = [], [], []
    gc.collect()
    gc.disable()
    for number in range(rounds):
        ids = [f"{number}-{each}" for each in range(requests)]
        decided.append(run(store.run_now, [admit._replace(id=each) for each in ids]))
        settled.append(run(store.run_now, [end._replace(id=each) for each in ids]))
        store.run_now(Acknowledge(tuple(ids)))
        theirs.append(await by_hand(limiter, items, requests))
    gc.enable()
    both = [one + other for one, other in zip(decided, settled, strict=True)]
    print("| in memory, 3 limits | us | over limits |\n|---|---:|---:|")
    subjects = {"limits": theirs, "the decision": decided, "the settlement": settled, "both": both}
    for name, seconds in subjects.items():
        ratios = [mine / other for mine, other in zip(seconds, theirs, strict=True) if other]
        low, median, high = statistics.quantiles(ratios, n=4)
        print(f"| {name} | {1e6 * statistics.median(seconds) / requests:.1f} | {median:.2f} [{low:.2f} {high:.2f}] |")


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=ROUNDS)
    options.add_argument("--requests", type=int, default=REQUESTS)
    given = options.parse_args()
    asyncio.run(main(given.rounds, given.requests))

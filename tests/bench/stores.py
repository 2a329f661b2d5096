"""
Operations per second of each store, against the row-at-a-time way of the same: ``tox run -e bench-stores``.

The row-at-a-time way is the store without its pump: a pool of them, each operation its own transaction, or a command of
its own. Calls have the ids that the package makes, which follow time: neighbours in a database are calls of one moment.
Both work on the same rows, interleaved, round by round; SQLite with ``synchronous=FULL``, PostgreSQL with
fsync on, Valkey with ``appendonly yes``, which it writes to disk once a second. Options:
``--stores NAME ...``, ``--callers N ...``, ``--accounts N ...``, ``--rounds N``, ``--seconds S``.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from asgi_metering import Metering
from asgi_metering.decisions import Decision
from asgi_metering.receipts import Basis
from asgi_metering.rules.operations import Admit, End, Operation, PostGrant, WalletSource
from asgi_metering.stores.contract import Store
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.stores.postgres import PostgresStore
from asgi_metering.stores.pump import Pump
from asgi_metering.stores.sqlite import SQLiteStore
from asgi_metering.stores.urls import store_from_url
from tests.harness.postgres import postgres_server
from tests.harness.valkey import valkey

POOL = 10
"""Connections of the row-at-a-time way, where a store can use several at once."""

ACCOUNTS = (1, 1_000)
"""One hot account, and calls spread over many."""

CALLERS = (1, 16, 64)

Make = Callable[[], Store]

Submit = Callable[[Operation], Awaitable[Any]]


class Sample(NamedTuple):
    """What one run measured: operations per second, the median time of an admission, and CPU time an operation."""

    per_s: float
    p50_ms: float
    cpu_us: float


class RowAtATime:
    """
    A pool of stores, each operation alone in its transaction.

    Args:
        stores: Open ones.
    """

    def __init__(self, stores: list[Store]) -> None:
        self._free: asyncio.Queue[Store] = asyncio.Queue()
        for store in stores:
            self._free.put_nowait(store)

    async def submit(self, operation: Operation) -> Any:
        """Run one operation on whichever is free."""
        store = await self._free.get()
        try:
            (answer,) = await store.run([operation])
        finally:
            self._free.put_nowait(store)
        return answer


@contextmanager
def _memory() -> Iterator[tuple[Make, int]]:
    # One object is all there is of it: both ways work on that.
    only = MemoryStore()
    yield lambda: only, 1


@contextmanager
def _sqlite() -> Iterator[tuple[Make, int]]:
    with tempfile.TemporaryDirectory() as folder:
        # It has one writer at a time: more connections would only wait for each other.
        yield lambda: SQLiteStore(Path(folder, "bench.db"), synchronous="FULL"), 1


@contextmanager
def _postgres() -> Iterator[tuple[Make, int]]:
    with postgres_server() as server:
        yield lambda: PostgresStore(server.url(), migrate=True), POOL


@contextmanager
def _redis() -> Iterator[tuple[Make, int]]:
    with valkey("--appendonly", "yes", "--appendfsync", "everysec") as server:
        yield lambda: store_from_url(server.url), POOL


STORES = {"memory": _memory, "sqlite": _sqlite, "postgres": _postgres, "redis": _redis}


async def drive(submit: Submit, callers: int, accounts: int, seconds: float) -> Sample:
    """Admit and settle calls, *callers* at once, over *accounts* accounts."""
    until = time.perf_counter() + seconds
    waits: list[float] = []
    new_id = Metering("memory://").new_id

    async def caller(number: int) -> None:
        turn = 0
        while time.perf_counter() < until:
            turn += 1
            call_id, payer = new_id(), f"p{(number * 7919 + turn * 104_729) % accounts}"
            asked = time.perf_counter()
            decision = await submit(Admit(call_id, payer, "credits", 3, 3, (WalletSource(),), line="bench"))
            waits.append(time.perf_counter() - asked)
            assert isinstance(decision, Decision)
            assert decision.admitted
            await submit(End(call_id, 2, Basis.USAGE, event={"outcome": "completed"}))

    began, worked = time.perf_counter(), time.process_time()
    await asyncio.gather(*(caller(number) for number in range(callers)))
    took, worked, done = time.perf_counter() - began, time.process_time() - worked, 2 * len(waits)
    return Sample(done / took, 1_000 * statistics.median(waits), 1e6 * worked / done)


async def measure(make: Make, pool: int, given: argparse.Namespace) -> None:
    """Print the rows of one store."""
    store, *others = (make() for _ in range(pool + 1))
    for each in (store, *others):
        await each.open()
    accounts = max(given.accounts)
    for first in range(0, accounts, 100):
        grants = [PostGrant("g", f"p{n}", "credits", 10**12) for n in range(first, min(first + 100, accounts))]
        await store.run(grants)
    pump, rows = Pump(store), RowAtATime(others)
    for accounts in given.accounts:
        for callers in given.callers:
            samples: dict[str, list[Sample]] = {"row": [], "pump": []}
            for _ in range(given.rounds):
                for way, submit in (("row", rows.submit), ("pump", pump.submit)):
                    samples[way].append(await drive(submit, callers, accounts, given.seconds))
            _print(store.name, accounts, callers, samples)
    await pump.close()
    for each in (store, *others):
        await each.close()


def _print(name: str, accounts: int, callers: int, samples: dict[str, list[Sample]]) -> None:
    row, pumped = (Sample(*map(statistics.median, zip(*found, strict=True))) for found in samples.values())
    ratio = statistics.median(b.per_s / a.per_s for a, b in zip(samples["row"], samples["pump"], strict=True))
    print(
        f"| {name} | {accounts} | {callers} | {row.per_s:.0f} | {pumped.per_s:.0f} | {ratio:.1f} | "
        f"{row.p50_ms:.2f} | {pumped.p50_ms:.2f} | {row.cpu_us:.0f} | {pumped.cpu_us:.0f} |",
        flush=True,
    )


def main() -> None:
    """Run each on a file or a server of its own."""
    parser = argparse.ArgumentParser(description="Benchmark of the stores of asgi_metering")
    parser.add_argument("--stores", nargs="+", choices=STORES, default=list(STORES))
    parser.add_argument("--callers", type=int, nargs="+", default=CALLERS)
    parser.add_argument("--accounts", type=int, nargs="+", default=ACCOUNTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each way in each round")
    given = parser.parse_args()
    print(
        "An admission and an end are two operations; p50 is that of an admission; ratios are medians of rounds; CPU "
        "is that of this process.\n"
    )
    print(
        "| store | accounts | callers | row at a time, ops/s | pump, ops/s | ratio | row p50, ms | pump p50, ms | "
        "row CPU, us/op | pump CPU, us/op |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for name in given.stores:
        with STORES[name]() as (make, pool):
            asyncio.run(measure(make, pool, given))


if __name__ == "__main__":
    main()

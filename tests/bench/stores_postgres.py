"""
Operations per second of the PostgreSQL store, against the row-at-a-time way: ``python -m tests.bench.stores_postgres``.

The row-at-a-time way is the same store without its pump: a pool of ten of them, each operation its own transaction.
Both work on one server with fsync on, interleaved, round by round. Options: ``--rounds N``, ``--seconds S``.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from asgi_metering.decisions import Decision
from asgi_metering.receipts import Basis
from asgi_metering.rules.operations import Admit, End, Operation, PostGrant, WalletSource
from asgi_metering.stores.postgres import PostgresStore
from asgi_metering.stores.pump import Pump
from tests.harness.postgres import PostgresServer, postgres_server

POOL = 10
ACCOUNTS = 1_000
CALLERS = (1, 16, 64)

Submit = Callable[[Operation], Awaitable[Any]]


class Sample(NamedTuple):
    """What one run measured: operations per second, and the median time of an admission."""

    per_s: float
    p50_ms: float


class RowAtATime:
    """A pool of stores, each operation alone in its transaction."""

    def __init__(self, server: PostgresServer, **more: Any) -> None:
        self._stores = [PostgresStore(server.url(), **more) for _ in range(POOL)]
        self._free: asyncio.Queue[PostgresStore] = asyncio.Queue()

    async def open(self) -> None:
        """Open all of them."""
        for store in self._stores:
            await store.open()
            self._free.put_nowait(store)

    async def submit(self, operation: Operation) -> Any:
        """Run one operation on whichever is free."""
        store = await self._free.get()
        try:
            (answer,) = await store.run([operation])
        finally:
            self._free.put_nowait(store)
        return answer

    async def close(self) -> None:
        """Close all of them."""
        for store in self._stores:
            await store.close()


async def drive(submit: Submit, name: str, callers: int, accounts: int, seconds: float) -> Sample:
    """Admit and settle calls, *callers* at once, over *accounts* accounts."""
    until = time.perf_counter() + seconds
    waits: list[float] = []

    async def caller(number: int) -> None:
        turn = 0
        while time.perf_counter() < until:
            turn += 1
            call_id, payer = f"{name}.{number}.{turn}", f"p{(number * 7919 + turn * 104_729) % accounts}"
            asked = time.perf_counter()
            decision = await submit(Admit(call_id, payer, "credits", 3, 3, (WalletSource(),), line="bench"))
            waits.append(time.perf_counter() - asked)
            assert isinstance(decision, Decision)
            assert decision.admitted
            await submit(End(call_id, 2, Basis.USAGE, event={"outcome": "completed"}))

    began = time.perf_counter()
    await asyncio.gather(*(caller(number) for number in range(callers)))
    return Sample(2 * len(waits) / (time.perf_counter() - began), 1_000 * statistics.median(waits))


async def measure(server: PostgresServer, rounds: int, seconds: float) -> None:
    """Print the table."""
    store = PostgresStore(server.url(), migrate=True)
    await store.open()
    for first in range(0, ACCOUNTS, 100):
        await store.post([PostGrant("g", f"p{number}", "credits", 10**12) for number in range(first, first + 100)])
    pump = Pump(store)
    rows = RowAtATime(server)
    await rows.open()
    print(
        f"{'accounts':>8} {'callers':>8} {'row ops/s':>10} {'pump ops/s':>11} {'ratio':>6} {'row p50':>9} "
        f"{'pump p50':>9}"
    )
    for accounts in (1, ACCOUNTS):
        for callers in CALLERS:
            samples: dict[str, list[Sample]] = {"row": [], "pump": []}
            for turn in range(rounds):
                for way, submit in (("row", rows.submit), ("pump", pump.submit)):
                    name = f"{way}.{accounts}.{callers}.{turn}"
                    samples[way].append(await drive(submit, name, callers, accounts, seconds))
            row, pumped = (
                Sample(*(statistics.median(column) for column in zip(*found, strict=True)))
                for found in samples.values()
            )
            print(
                f"{accounts:>8} {callers:>8} {row.per_s:>10.0f} {pumped.per_s:>11.0f} {pumped.per_s / row.per_s:>6.1f} "
                f"{row.p50_ms:>6.1f} ms {pumped.p50_ms:>6.1f} ms",
                flush=True,
            )
    await pump.close()
    await rows.close()
    await store.close()


def main() -> None:
    """Run on a server of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    given = parser.parse_args()
    with postgres_server() as server:
        asyncio.run(measure(server, given.rounds, given.seconds))


if __name__ == "__main__":
    main()

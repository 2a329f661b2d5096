"""
The Redis store beside `limits`, run by hand: ``python -m tests.bench.stores_redis [seconds] [rounds]``.

Each call of ours takes from three limits (or one) and holds 3 units of a wallet; its settlement, with its usage event,
is submitted and not awaited, and counted all the same. `limits` takes from the same limits on redis-py, and nothing
else. "Row at a time" is our own function for each call alone, on redis-py's pool: what a call would cost without
the pump. Subjects take turns within one run, in random order, on one Valkey server on loopback; ratios are medians of
the ratios within rounds.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from itertools import count

from limits import RateLimitItemPerMinute
from limits.aio.storage import RedisStorage
from limits.aio.strategies import FixedWindowRateLimiter
from redis.asyncio import Redis

from asgi_metering.receipts import Basis
from asgi_metering.rules.operations import Admit, End, LimitAsk, PostGrant, WalletSource, WindowKind
from asgi_metering.stores.pump import Pump
from asgi_metering.stores.redis import RedisStore
from asgi_metering.stores.urls import store_from_url
from tests.harness.valkey import valkey

CALLERS = (1, 16, 64)
PAYERS = 1_000
PLENTY = 10**9
TTL_S = 3_600.0
"""Calls that are never ended shall not fall due meanwhile: ending them is not what is measured."""

FACTS = {"caller": "key_1", "route": "/v1/chat", "attributes": {"tier": "pro"}}

Call = Callable[[int], Awaitable[object]]
Asks = Sequence[tuple[LimitAsk, ...]]

_ids = count()


class Ours:
    """The store behind its pump."""

    def __init__(self, url: str) -> None:
        store = store_from_url(url)
        assert isinstance(store, RedisStore)
        self.store = store
        self._pump = Pump(store)
        self._ends: set[asyncio.Task[object]] = set()

    async def prepare(self) -> None:
        """Open it and fill every wallet."""
        await self.store.open()
        for first in range(0, PAYERS, 100):
            await self.store.run(
                [PostGrant("g", f"payer{number}", "credits", PLENTY) for number in range(first, first + 100)]
            )
        # A first call loads the function that those one at a time need.
        await self.store.run([self.admission(self.asks(1), 0)])

    @staticmethod
    def asks(limits: int) -> Asks:
        """The limits of each payer."""
        return [
            tuple(
                LimitAsk(f"l{n}", f"l{n}:payer{payer}", WindowKind.FIXED, PLENTY, 60.0 * (n + 1)) for n in range(limits)
            )
            for payer in range(PAYERS)
        ]

    @staticmethod
    def admission(asks: Asks, payer: int) -> Admit:
        """A new call."""
        who, sources = f"payer{payer}", (WalletSource(),)
        call_id = f"call_{next(_ids)}"
        return Admit(call_id, who, "credits", 3, 3, sources, asks[payer], (), TTL_S, line="chat", facts=FACTS)

    @staticmethod
    def end(admit: Admit) -> End:
        """Its settlement."""
        return End(admit.id, 2, Basis.USAGE, event={"outcome": "completed", "status": 200})

    def call(self, limits: int, settle: bool) -> Call:
        """One admission, and its settlement in the background."""
        asks = self.asks(limits)

        async def one(payer: int) -> None:
            admit = self.admission(asks, payer)
            decision = await self._pump.submit(admit)
            assert decision.admitted  # type: ignore[union-attr]
            if settle:
                task = asyncio.ensure_future(self._pump.submit(self.end(admit)))
                self._ends.add(task)
                task.add_done_callback(self._ends.discard)

        return one

    async def quiet(self) -> None:
        """Wait for all settlements."""
        await self._pump.drain()

    async def close(self) -> None:
        """Close both."""
        await self._pump.close()
        await self.store.close()


def by_limits(url: str, limits: int) -> Call:
    """The same limits by the `limits` package."""
    limiter = FixedWindowRateLimiter(RedisStorage(f"async+{url}", implementation="redispy"))
    items = [RateLimitItemPerMinute(PLENTY, n + 1) for n in range(limits)]

    async def one(payer: int) -> None:
        for item in items:
            assert await limiter.hit(item, f"payer{payer}")

    return one


def row_at_a_time(ours: Ours, client: Redis, settle: bool) -> Call:
    """Our calls with three limits, each a command of its own on redis-py's pool."""
    calls, asks = ours.store._calls, ours.asks(3)

    async def one(payer: int) -> None:
        admit = ours.admission(asks, payer)
        for operation in (admit, ours.end(admit)) if settle else (admit,):
            call = calls.call(operation)
            assert call is not None
            (reply,) = await client.execute_command(*calls.together([call], "", ""))
            calls.answer(operation, reply)

    return one


def by_script(client: Redis) -> Call:
    """One small script on redis-py's own pool."""
    script = client.register_script("redis.call('INCR', KEYS[1]) redis.call('INCR', KEYS[2]) return 1")

    async def one(payer: int) -> None:
        await script(keys=[f"s{payer}", f"t{payer}"])

    return one


async def measure(
    call: Call, callers: int, payers: int, seconds: float, quiet: Callable[[], Awaitable[None]] | None
) -> tuple[float, float]:
    """Microseconds for one call, all callers together, and the median latency in milliseconds."""
    turns = count()
    latencies: list[float] = []
    until = time.perf_counter() + seconds

    async def caller() -> None:
        while time.perf_counter() < until:
            begin = time.perf_counter()
            await call(next(turns) % payers)
            latencies.append(time.perf_counter() - begin)

    begin = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(callers)))
    if quiet is not None:
        await quiet()
    took = time.perf_counter() - begin
    return 1e6 * took / len(latencies), 1e3 * statistics.median(latencies)


def show(callers: int, payers: int, found: dict[str, list[tuple[float, float]]]) -> None:
    """One line for each subject: medians over rounds; over one another, of the ratios within rounds."""
    for name, some in found.items():
        micros, p50 = (statistics.median(each) for each in zip(*some, strict=True))
        row = "row x3, admit" if name.endswith("admit") else "row x3, both"
        ratios = [
            statistics.median(mine[0] / theirs[0] for mine, theirs in zip(some, found[other], strict=True))
            for other in ("limits x3", "limits x1", row)
        ]
        shown = " ".join(f"{ratio:>5.2f}" for ratio in ratios)
        print(f"{callers:>7} {payers:>6} {name:<15} {micros:>8.0f} {p50:>7.2f} {shown}", flush=True)


async def main(seconds: float = 1.0, rounds: int = 3) -> None:
    """Print a table for each number of callers, on one hot account and on many."""
    with valkey() as server:
        ours = Ours(f"{server.url}?namespace=bench")
        await ours.prepare()
        client = Redis.from_url(server.url)
        subjects: list[tuple[str, Call, bool]] = [
            ("limits x3", by_limits(server.url, 3), False),
            ("limits x1", by_limits(server.url, 1), False),
            ("small script", by_script(client), False),
            ("row x3, admit", row_at_a_time(ours, client, settle=False), False),
            ("row x3, both", row_at_a_time(ours, client, settle=True), False),
            ("ours x3, admit", ours.call(3, settle=False), True),
            ("ours x3, both", ours.call(3, settle=True), True),
            ("ours x1, both", ours.call(1, settle=True), True),
        ]
        titles = ("callers", "payers", "subject", "us/call", "p50 ms", "/x3", "/x1", "/row")
        print("{:>7} {:>6} {:<15} {:>8} {:>7} {:>5} {:>5} {:>5}".format(*titles))
        for callers in CALLERS:
            for payers in (1, PAYERS):
                found: dict[str, list[tuple[float, float]]] = {name: [] for name, *_ in subjects}
                for _ in range(rounds):
                    for name, call, is_ours in random.sample(subjects, len(subjects)):
                        quiet = ours.quiet if is_ours else None
                        found[name].append(await measure(call, callers, payers, seconds, quiet))
                        server.ask("DEL", "{bench}:events", "{bench}:events:order")
                show(callers, payers, found)
        await ours.close()
        await client.aclose()


if __name__ == "__main__":
    asyncio.run(main(*(float(word) for word in sys.argv[1:2]), *(int(word) for word in sys.argv[2:3])))

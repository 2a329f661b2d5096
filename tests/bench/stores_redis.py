"""
The Redis store beside `limits`, run by hand: ``python -m tests.bench.stores_redis [seconds] [rounds] [cluster]``.

Each call of ours takes from three limits (or one) and holds 3 units of a wallet; its settlement, with its usage event,
is submitted and not awaited, and counted all the same. `limits` takes from the same limits on redis-py, and nothing
else. "Row at a time" is our own function for each call alone, on redis-py's pool: what a call would cost without
the pump. Subjects take turns within one run, in random order, on one Valkey server on loopback; ratios are medians of
the ratios within rounds.

On a Cluster of three nodes `limits` has its own storage for one, and nothing is done row at a time; "+address" has one
limit more, on an address that is in another partition than most payers.
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
from limits.aio.storage import RedisClusterStorage, RedisStorage
from limits.aio.strategies import FixedWindowRateLimiter
from redis.asyncio import Redis

from asgi_metering.receipts import Basis
from asgi_metering.rules.operations import Admit, End, LimitAsk, PostGrant, WalletSource, WindowKind
from asgi_metering.rules.roots import rooted
from asgi_metering.stores.pump import Pump
from asgi_metering.stores.redis import ClusterStore, RedisStore
from asgi_metering.stores.urls import store_from_url
from tests.harness.servers import HOST
from tests.harness.valkey import cluster, valkey

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
        self.store = store_from_url(url)
        self._pump = Pump(self.store)
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
                LimitAsk(f"l{n}", rooted(f"l{n}", f"payer{payer}"), WindowKind.FIXED, PLENTY, 60.0 * (n + 1))
                for n in range(limits)
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

    def call(self, limits: int, settle: bool, *more: LimitAsk) -> Call:
        """One admission with *more* limits, and its settlement in the background."""
        asks = [(*own, *more) for own in self.asks(limits)]

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

    async def forget_events(self) -> None:
        """Nobody delivers them."""
        stores = self.store.shelves if isinstance(self.store, ClusterStore) else [self.store]
        for store in stores:
            assert isinstance(store, RedisStore)
            await store._link().exchange([("DEL", store._names.events, store._names.event_order)])

    async def close(self) -> None:
        """Close both."""
        await self._pump.close()
        await self.store.close()


def by_limits(url: str, limits: int) -> Call:
    """The same limits by the `limits` package."""
    kind = RedisClusterStorage if "cluster" in url else RedisStorage
    limiter = FixedWindowRateLimiter(kind(f"async+{url}", implementation="redispy"))
    items = [RateLimitItemPerMinute(PLENTY, n + 1) for n in range(limits)]

    async def one(payer: int) -> None:
        for item in items:
            assert await limiter.hit(item, f"payer{payer}")

    return one


def row_at_a_time(ours: Ours, client: Redis, settle: bool) -> Call:
    """Our calls with three limits, each a command of its own on redis-py's pool."""
    assert isinstance(ours.store, RedisStore)
    calls, asks = ours.store._calls, ours.asks(3)

    async def one(payer: int) -> None:
        admit = ours.admission(asks, payer)
        for operation in (admit, ours.end(admit)) if settle else (admit,):
            call = calls.call(operation)
            assert call is not None
            (reply,) = await client.execute_command(*calls.together(call, "", ""))
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
            if other in found
        ]
        shown = " ".join(f"{ratio:>5.2f}" for ratio in ratios)
        print(f"{callers:>7} {payers:>6} {name:<15} {micros:>8.0f} {p50:>7.2f} {shown}", flush=True)


Subjects = list[tuple[str, Call, bool]]


async def main(seconds: float = 1.0, rounds: int = 3) -> None:
    """One server."""
    with valkey() as server:
        ours = Ours(f"{server.url}?namespace=bench")
        await ours.prepare()
        client = Redis.from_url(server.url)
        subjects: Subjects = [
            ("limits x3", by_limits(server.url, 3), False),
            ("limits x1", by_limits(server.url, 1), False),
            ("small script", by_script(client), False),
            ("row x3, admit", row_at_a_time(ours, client, settle=False), False),
            ("row x3, both", row_at_a_time(ours, client, settle=True), False),
            ("ours x3, admit", ours.call(3, settle=False), True),
            ("ours x3, both", ours.call(3, settle=True), True),
            ("ours x1, both", ours.call(1, settle=True), True),
        ]
        await compare(ours, subjects, seconds, rounds)
        await ours.close()
        await client.aclose()


async def main_of_cluster(seconds: float = 1.0, rounds: int = 3) -> None:
    """Three nodes."""
    with cluster() as nodes:
        url = f"redis+cluster://{','.join(f'{HOST}:{node.port}' for node in nodes)}"
        ours = Ours(f"{url}?namespace=bench")
        await ours.prepare()
        address = LimitAsk("address", "address", WindowKind.FIXED, PLENTY, 60.0)
        subjects: Subjects = [
            ("limits x3", by_limits(url, 3), False),
            ("limits x1", by_limits(url, 1), False),
            ("ours x3, admit", ours.call(3, settle=False), True),
            ("ours x3, both", ours.call(3, settle=True), True),
            ("ours x1, both", ours.call(1, settle=True), True),
            ("+address, both", ours.call(3, True, address), True),
        ]
        await compare(ours, subjects, seconds, rounds)
        await ours.close()


async def compare(ours: Ours, subjects: Subjects, seconds: float, rounds: int) -> None:
    """Print a table for each number of callers, on one hot account and on many."""
    titles = ("callers", "payers", "subject", "us/call", "p50 ms", "/x3", "/x1", "/row")
    print("{:>7} {:>6} {:<15} {:>8} {:>7} {:>5} {:>5} {:>5}".format(*titles))
    for callers in CALLERS:
        for payers in (1, PAYERS):
            found: dict[str, list[tuple[float, float]]] = {name: [] for name, *_ in subjects}
            for _ in range(rounds):
                for name, call, is_ours in random.sample(subjects, len(subjects)):
                    quiet = ours.quiet if is_ours else None
                    found[name].append(await measure(call, callers, payers, seconds, quiet))
                    await ours.forget_events()
            show(callers, payers, found)


if __name__ == "__main__":
    words = sys.argv[1:]
    numbers = [word for word in words if word != "cluster"]
    how_long = (float(numbers[0]) if numbers else 1.0, int(numbers[1]) if numbers[1:] else 3)
    asyncio.run((main if numbers == words else main_of_cluster)(*how_long))

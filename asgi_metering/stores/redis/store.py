"""
The Redis store: any number of processes on one server, or a Sentinel's master; one partition of a Cluster's.

The operations of every call are scripts that mirror the rules; the others are decided by the rules themselves, on rows
that were read, and written if nothing of them has changed. Knows how batches and reads reach the server.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from asgi_metering.errors import MeteringError, StoreContendedError, StoreError, StoreUnavailableError
from asgi_metering.rules.decide import Answer, run
from asgi_metering.rules.operations import Operation, Sweep
from asgi_metering.rules.state import Change
from asgi_metering.stores.contract import Books, Filling, Query, Snapshot, Store
from asgi_metering.stores.redis.batch import Batch, lone_answer
from asgi_metering.stores.redis.books import Access, opened_books, opened_filling
from asgi_metering.stores.redis.calls import Calls
from asgi_metering.stores.redis.checks import check_server
from asgi_metering.stores.redis.link import Link, Reply, moves
from asgi_metering.stores.redis.loading import load
from asgi_metering.stores.redis.names import Names
from asgi_metering.stores.redis.packed import time_text
from asgi_metering.stores.redis.packing import Packing
from asgi_metering.stores.redis.places import Place, driver
from asgi_metering.stores.redis.reading import Reader
from asgi_metering.stores.redis.scripts import Scripts
from asgi_metering.stores.redis.sweeping import sweep
from asgi_metering.stores.redis.transaction import Mistake, Transactions
from asgi_metering.stores.redis.working_copy import WorkingCopy

__all__ = ["RedisStore", "meaning"]

BUSY_PAUSES = 2_000
"""Looks at a closed gate before an operation is told that others work: some seconds."""

PAUSE_S = 0.001


class RedisStore(Store):
    """
    Metering state on a Redis or Valkey server.

    Args:
        place: Where the server is (see `places`); `urls.store_from_url` makes one from a URL.
        namespace: Keeps several applications on one server apart; part of every key.
        timeout_s: Seconds that one batch may take before the server counts as lost.
        clock: For tests: answers epoch seconds instead of the server's clock.

    Raises:
        ConfigurationError: The namespace is not usable in keys.

    Everything of a namespace is on this one server, so that each decision is exact and one round trip, whoever pays and
    whatever is limited; see `ClusterStore` for many. Where failover is asynchronous it can lose what was acknowledged
    last.

    One connection for each event loop. A batch is one write; each operation in it is atomic, and an operation that
    fails harms no neighbour. A store may be used after a fork: loops of the child have connections of their own.
    """

    name = "redis"
    lanes = 2

    def __init__(
        self,
        place: Place,
        *,
        namespace: str = "metering",
        timeout_s: float = 5.0,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._place = place
        self.namespace = namespace
        self._names = Names(namespace)
        self._packing = Packing(self._names)
        self._scripts = Scripts()
        self._timeout_s = timeout_s
        self._clock = clock
        self._links: dict[asyncio.AbstractEventLoop, Link] = {}
        self._halts = f"{self._names.prefix}halt:{uuid.uuid4().hex}"
        self._calls = Calls(self._names, self._packing, self._scripts, self._halts)
        self._batches = 0

    async def open(self) -> None:
        """
        See `Store.open`. Connects, loads the scripts, and looks at the server's settings.

        Raises:
            MissingExtraError: redis-py is not installed.
            ConfigurationError: The server refuses our credentials or scripts, is too old, or may evict money.
            StoreUnavailableError: It cannot be reached.
        """
        await check_server(self._link())

    async def close(self) -> None:
        """See `Store.close`. Waits for a batch of this loop that is on its way; other loops close their own soon."""
        links, self._links = self._links, {}
        for loop, link in links.items():
            if loop is asyncio.get_running_loop():
                await link.close()
            elif not loop.is_closed():
                asyncio.run_coroutine_threadsafe(link.close(), loop)

    def _link(self) -> Link:
        loop = asyncio.get_running_loop()
        link = self._links.get(loop)
        if link is None:
            for other in [other for other in self._links if other.is_closed()]:
                del self._links[other]
            link = self._links[loop] = Link(self._place, self._scripts, self._timeout_s)
        return link

    async def run(self, operations: Sequence[Operation]) -> list[Answer | Exception]:
        """
        See `Store.run`. One round trip for the operations of calls; two or three for each of the others, and for a call
        that meets something rare on its way.
        """
        batch = Batch(self._calls, operations)
        pauses = 0
        while batch.waiting:
            self._batches += 1
            commands = batch.commands("" if self._clock is None else time_text(self._clock()), str(self._batches))
            if commands:
                batch.take(await self._link().exchange(commands), meaning)
            if batch.alone is not None:
                batch.settle(batch.alone, await self._decided(operations[batch.alone]))
            elif batch.is_busy:
                pauses += 1
                if pauses > BUSY_PAUSES:
                    batch.give_up(_busy)
                await asyncio.sleep(PAUSE_S)
        return list(map(batch.answers.__getitem__, range(len(operations))))

    def start(self, operation: Operation, told: Callable[[Answer | Exception | None], None]) -> bool:
        """See `Store.start`. Only the operations of calls, on a connection that is in use."""
        link = self._links.get(asyncio.get_running_loop())
        if link is None:
            return False
        calls = self._calls
        try:
            call = calls.call(operation)
            if call is None:
                return False
            now = "" if self._clock is None else time_text(self._clock())
            packed = driver().pack(calls.together(call, now, ""))
        except Exception:  # noqa: BLE001 -- `run` says what is wrong with it
            return False

        def replied(outcome: list[Reply] | Exception) -> None:
            if isinstance(outcome, Exception):
                told(outcome)
                return
            try:
                answer = lone_answer(calls, operation, outcome[0])
            except Exception as failure:  # noqa: BLE001 -- whoever asked is told
                told(failure)
            else:
                told(answer)

        return link.post(packed, replied)

    async def _decided(self, operation: Operation) -> Answer | Exception:
        """Run one operation by the rules."""

        async def work(copy: WorkingCopy) -> tuple[Answer, list[Change]]:
            await load(copy, operation)
            written: list[Change] = []
            try:
                answer = run(copy.state, operation, copy.now, written)
            except MeteringError as mistake:
                raise Mistake(mistake, written) from None
            return answer, written

        try:
            if isinstance(operation, Sweep):
                return await sweep(self._transactions(), operation)
            return await self._transactions().run(work)
        except StoreUnavailableError:
            raise
        except Exception as mistake:  # noqa: BLE001 -- the answer of one operation, and no neighbour's
            return mistake if isinstance(mistake, MeteringError) else meaning(mistake)

    def _transactions(self) -> Transactions:
        return Transactions(self._link(), self._names, self._packing, self._scripts, self._clock)

    async def read(self, query: Query) -> Snapshot:
        """See `Store.read`. Walks over everything in one script only for `EverythingKept`."""
        return await Reader(self._link(), self._names, self._packing, self._scripts, self._clock).read(query)

    @asynccontextmanager
    async def books(self) -> AsyncIterator[Books]:
        """
        See `Store.books`. Not of one instant: whoever moves the books stops those who write first.

        Looks at the names of all keys on the server, also of other namespaces, in steps that block nobody.
        """
        async with opened_books(self._access()) as books:
            yield books

    @asynccontextmanager
    async def fill(self) -> AsyncIterator[Filling]:
        """
        See `Store.fill`. Keeps other writers out. What was put stays, and putting it again after a cut completes it.

        A process that dies in a filling keeps the others out for a minute. A row that cannot be kept takes back what
        was put before it, if the namespace was empty.
        """
        async with opened_filling(self._access()) as filling:
            yield filling

    def _access(self) -> Access:
        return Access(self._link(), self._names, self._packing, self._transactions(), meaning, self._clock)


def _busy() -> StoreContendedError:
    return StoreContendedError("Somebody else works alone on the Redis store for too long. Try again later.")


def meaning(error: Exception) -> Exception:
    """What an error reply says about one operation."""
    if not isinstance(error, driver().exceptions.ResponseError):
        return error
    errors = driver().exceptions
    now = (errors.OutOfMemoryError, errors.MasterDownError, errors.ClusterError, *moves())
    cannot = isinstance(error, now) or str(error).startswith(_NOT_NOW)
    told = StoreUnavailableError if cannot else StoreError
    meaning = told(f"The Redis server did not run the operation: {error}")
    meaning.__cause__ = error
    return meaning


_NOT_NOW = ("MISCONF", "NOREPLICAS", "BUSY")
"""How the server says that it cannot write now, whatever is asked, where the driver has no class for it."""

"""
What the tests of this folder play on: a store with a switch, small applications, and what a payer paid.

The store is the one in memory behind a batch, as a database's is; what a real one does when it is down is tested with
real ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal

from asgi_metering import (
    Caller,
    Metering,
    MeteringMiddleware,
    billable,
    metered_app,
    rate_limited,
)
from asgi_metering.errors import StoreUnavailableError
from asgi_metering.guards import Part
from asgi_metering.rules.conservation import discrepancies
from asgi_metering.rules.decide import Answer
from asgi_metering.rules.operations import Operation
from asgi_metering.stores.contract import EverythingKept
from asgi_metering.stores.memory import MemoryStore
from tests.harness.drive import Drive, drive, http_scope

__all__ = [
    "COUNTED",
    "CREDIT",
    "QUEUE",
    "Gated",
    "admitted",
    "back",
    "call",
    "identify",
    "is_empty",
    "is_in_flight",
    "is_quiet",
    "is_read_off",
    "is_settled",
    "kept",
    "metered",
    "settled",
    "until",
    "used",
]

QUEUE: dict[str, Literal["queue"]] = {"credits": "queue"}

CREDIT = 1_000_000
"""Smallest parts of one credit."""


class Gated(MemoryStore):
    """
    A store that may be down, or silent, or lose its replies.

    Attributes:
        down: It raises, and does nothing.
        silent: It does what it is asked once it is let, and says nothing before.
        loses: Replies to operations of these kinds that it loses from now on, each after it was done.
        batches: Every batch that reached it, in order.
    """

    name = "gated"
    immediate = False

    def __init__(self) -> None:
        super().__init__()
        self.down = False
        self.silent = False
        self.loses: list[type] = []
        self.batches: list[list[Operation]] = []
        self.let = asyncio.Event()

    async def open(self) -> None:
        if self.down:
            raise StoreUnavailableError("The gated store cannot be reached.")

    async def run(self, operations: Sequence[Operation]) -> list[Answer | Exception]:
        self.batches.append(list(operations))
        if self.down:
            raise StoreUnavailableError("The gated store is down.")
        if self.silent:
            await self.let.wait()
        answers = await super().run(operations)
        lost = [kind for kind in self.loses if any(isinstance(each, kind) for each in operations)]
        if lost:
            self.loses.remove(lost[0])
            raise StoreUnavailableError(f"The reply to {lost[0].__name__} was lost.")
        return answers

    def seen(self, kind: type) -> list[Any]:
        """Operations of a kind that reached it."""
        return [each for batch in self.batches for each in batch if isinstance(each, kind)]


def identify(connection: Any) -> Caller:
    """Whoever the request says."""
    return Caller(connection.headers.get("x-who", "ann"))


def metered(metering: Metering, *parts: Part, work: Callable[[], Awaitable[object]] | None = None) -> Any:
    """A small application with these decorators, behind the middleware; *work* is done before it answers 200."""

    async def app(scope: Any, _receive: Any, send: Any) -> None:
        assert scope["type"] == "http", "It has no lifespan of its own."
        if work is not None:
            await work()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    return MeteringMiddleware(metered_app(app, *parts) if parts else app, metering=metering)


async def call(app: Any, who: str = "ann", **fields: str) -> Drive:
    """One request to its end."""
    given = [("x-who", who), *((name.replace("_", "-"), value) for name, value in fields.items())]
    return await drive(app, http_scope("/", "POST", headers=given))


async def settled(metering: Metering, payer: str = "ann") -> tuple[int, int]:
    """What *payer* spent and what is held, in smallest parts; the books are proven on the way."""
    state = (await metering.store.read(EverythingKept())).state
    for key, account in state.accounts.items():
        grants = [*state.grants.get(key, {}).values(), *state.closed_grants.get(key, {}).values()]
        holds = [hold for hold in state.holds.values() if (hold.payer, hold.unit) == key and hold.receipt is None]
        assert discrepancies(account, grants, holds) == []
    row = state.accounts.get((payer, "credits"))
    return (0, 0) if row is None else (row.settled, row.held)


@asynccontextmanager
async def used(store: Any, **options: Any) -> AsyncIterator[Metering]:
    """A metering that is stopped whatever happens; payer ``ann`` has 100 credits."""
    given = {"identify": identify, "sinks": (), "store_timeout_s": 0.05, "drain_s": 0.05, **options}
    metering = Metering(store, **given)
    try:
        await metering.start()
        # As under a server's lifespan: requests do not stay for their ends.
        metering.runtime().managed = True
        await metering.grant("ann", 100, id="g")
        yield metering
    finally:
        store.down = store.silent = False
        store.let.set()
        await metering.stop()


async def until(fact: Callable[[], Awaitable[bool]]) -> None:
    """Wait until *fact* holds."""
    async with asyncio.timeout(10):
        while not await fact():
            await asyncio.sleep(0.002)


async def is_empty(metering: Metering) -> bool:
    """Whether nothing waits in the journal."""
    assert metering.journal is not None
    return await metering.journal.counts() == (0, 0)


async def back(metering: Metering, store: Gated) -> None:
    """Bring the store back, and wait until all that waited is in the books."""
    store.down = False
    await until(lambda: is_empty(metering))


COUNTED = rate_limited("99/day", on_store_down="deny")
"""A route without a hold: what is asked of the store for it is one admission, and nothing is given back."""


async def admitted(metering: Metering, store: Gated, number: int, price: int = 1) -> list[Any]:
    """So many calls that were admitted, and whose store is down when they end."""
    leave = asyncio.Event()
    app = metered(metering, billable(price), work=leave.wait)
    runs = [Drive(app, http_scope("/", "POST")) for _ in range(number)]
    for run in runs:
        await run.__aenter__()
    await until(lambda: is_in_flight(metering, number))
    store.down = True
    leave.set()
    for run in runs:
        await run.ended()
        await run.__aexit__()
    return runs


async def is_in_flight(metering: Metering, number: int) -> bool:
    """Whether so many calls run."""
    return len(metering.runtime().in_flight) == number


async def is_quiet(metering: Metering) -> bool:
    """Whether nothing is under way to the store."""
    return metering.runtime().busy == 0


async def kept(metering: Metering) -> tuple[int, int]:
    """What waits in the journal, and what is set aside."""
    assert metering.journal is not None
    return await metering.journal.counts()


async def is_read_off(metering: Metering) -> bool:
    """Whether nothing waits in the journal, and nothing is set aside."""
    return await kept(metering) == (0, 0)


async def is_settled(metering: Metering, amount: int) -> bool:
    """Whether so much is settled, and nothing is held."""
    return await settled(metering) == (amount * CREDIT, 0)

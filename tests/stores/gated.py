"""What the tests of the pump play on: a store that answers when the test says so, and what is asked of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from asgi_metering.rules.decide import Answer
from asgi_metering.rules.operations import (
    Admit,
    Operation,
    PostGrant,
    WalletSource,
)
from asgi_metering.rules.state import Account
from asgi_metering.stores.contract import EverythingKept, Query, Snapshot, Store
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.stores.pump import Pump
from asgi_metering.testing.clock import FakeClock


class GatedStore(Store):
    """
    A memory store behind a gate that the test opens, so that batches form while one is away.

    Attributes:
        batches: The ids of the operations of each batch, in the order of their sending.
        failures: What the next batches raise instead of being run; None for one that is run.
        forgets: How many answers it leaves out.
        on_batch: Called with the ids of a batch when it comes.
    """

    name = "gated"

    def __init__(self) -> None:
        self.inner = MemoryStore(FakeClock())
        self.gate = asyncio.Event()
        self.batches: list[list[str]] = []
        self.failures: list[BaseException | None] = []
        self.forgets = 0
        self.on_batch: Callable[[list[str]], object] = len

    async def open(self) -> None:
        """Nothing to do."""

    async def close(self) -> None:
        """Nothing to do."""

    async def run(self, operations: Sequence[Operation]) -> list[Answer | Exception]:
        """Wait for the gate, then fail as told, or run them all, or none if one cannot be written."""
        ids = [getattr(operation, "id", type(operation).__name__) for operation in operations]
        self.batches.append(ids)
        self.on_batch(ids)
        await self.gate.wait()
        failure = self.failures.pop(0) if self.failures else None
        if failure is not None:
            raise failure
        if "unwritable" in ids:
            raise ValueError("cannot be written")
        answers = await self.inner.run(operations)
        return answers[: len(answers) - self.forgets]

    async def read(self, query: Query) -> Snapshot:
        """Read at once."""
        return await self.inner.read(query)

    async def account(self) -> Account:
        """The one payer's account."""
        return (await self.read(EverythingKept())).state.accounts["p", "credits"]


def ask(call_id: str, amount: int = 1, **more: Any) -> Admit:
    """An admission of the one payer."""
    return Admit(call_id, "p", "credits", amount, amount, (WalletSource(),), **more)


def play(scene: Callable[[GatedStore, Pump], Awaitable[None]], granted: int = 1_000) -> None:
    """Play *scene* on a gated store whose payer has *granted* units; its gate is closed."""

    async def opened() -> None:
        store = GatedStore()
        await store.inner.post([PostGrant("g", "p", "credits", granted)])
        pump = Pump(store)
        await scene(store, pump)
        store.gate.set()
        await pump.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(opened())


async def turns(number: int = 5) -> None:
    """Let the loop turn, so that what can run has run."""
    for _ in range(number):
        await asyncio.sleep(0)


def submit(pump: Pump, *operations: Operation) -> list[asyncio.Task[Answer]]:
    """Submit operations, each by a caller of its own."""
    return [asyncio.ensure_future(pump.submit(operation)) for operation in operations]

"""
After the crash: the process that comes next, and what it finds in the books.

Knows the store's rows and the house's application. Never knows where the first process was killed: the tests do.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from asgi_metering import Metering
from asgi_metering.asgi.types import ASGIApp
from asgi_metering.events.sinks import CallbackSink
from asgi_metering.receipts import Entry, EntryKind
from asgi_metering.rules.conservation import discrepancies, ledger_discrepancies
from asgi_metering.rules.state import Account, Hold
from asgi_metering.stores.contract import AccountRows, EntriesAfter, EverythingKept, HoldRow, LiveHolds, Store
from asgi_metering.testing import FakeClock
from asgi_metering.testing.faults import crash_after
from asgi_metering.usage.event import UsageEvent
from tests.harness.drive import lifespan
from tests.servers.books import read_lines
from tests.stores.crashes.house import CREDITS, GRACE_S, LIFE_S, Plan, metering_of, rooms
from tests.stores.places import store_at

__all__ = ["CREDITED", "LEASE_S", "Next", "next_process", "whole_books"]

CREDITED = 100
"""What each payer has at first."""

LEASE_S = 600.0
"""Beyond every claim that a dead process may have left in the outbox."""


@dataclass
class Next:
    """
    The next process on the store of *plan*, with a clock that its test moves.

    Attributes:
        app: The application, of a process that no fault ends.
        metering: Its metering.
        clock: The store's.
        delivered: What its sink got.
    """

    plan: Plan
    app: ASGIApp
    metering: Metering
    store: Store
    clock: FakeClock
    delivered: list[dict[str, Any]] = field(default_factory=list)

    async def reconcile(self) -> list[str]:
        """End what is overdue, and say which of the payer's calls were."""
        return [call for call in await self.metering.reconcile() if call.startswith(f"{self.plan.payer}.")]

    async def after_expiry(self) -> None:
        """Let every hold of the dead process expire; its grace is not over."""
        self.clock.advance(LIFE_S)
        assert await self.reconcile() == []

    async def after_grace(self) -> list[str]:
        """Let every grace be over, and end what is due; a second time there is nothing to end."""
        self.clock.advance(GRACE_S + LEASE_S)
        ended = await self.reconcile()
        assert await self.reconcile() == []
        return sorted(ended)

    async def account(self) -> Account:
        """The payer's account; its books are found to balance, by its rows and by its ledger."""
        key = (self.plan.payer, CREDITS.name)
        _, rows = await self.store.read(AccountRows(*key))
        account = rows.accounts[key]
        grants = [*rows.grants.get(key, {}).values(), *rows.closed_grants.get(key, {}).values()]
        assert discrepancies(account, grants, rows.holds.values(), rows.allowances.values()) == []
        assert ledger_discrepancies(account, grants, rows.checkpoints.get(key), await self.entries()) == []
        return account

    async def entries(self) -> list[Entry]:
        """The payer's ledger."""
        key = (self.plan.payer, CREDITS.name)
        _, state = await self.store.read(EntriesAfter(*key))
        return state.entries.get(key, [])

    async def charges(self) -> list[tuple[str, int]]:
        """Call and amount of each line that charged a call."""
        return [(line.ref, line.amount) for line in await self.entries() if line.kind is EntryKind.SETTLE]

    async def hold(self, call: str) -> Hold | None:
        """The hold of *call*, live or kept."""
        _, state = await self.store.read(HoldRow(call))
        return state.holds.get(call)

    async def live(self) -> list[str]:
        """The payer's calls that have not ended."""
        _, state = await self.store.read(LiveHolds())
        return [hold.id for hold in state.holds.values() if hold.payer == self.plan.payer]

    def events(self) -> dict[str, int]:
        """
        Amount by id of every event of the payer that either process delivered.

        One that came twice has said the same both times.
        """
        told: dict[str, dict[str, Any]] = {}
        for event in [*read_lines(self.plan.log), *self.delivered]:
            if event["payer"] == self.plan.payer:
                assert told.setdefault(event["id"], event) == event
        return {call: int(event["amount"]) for call, event in told.items()}


@asynccontextmanager
async def next_process(plan: Plan, **options: Any) -> AsyncIterator[Next]:
    """Start the next process, a moment after the last one was killed; when the block ends it has delivered all."""
    clock = FakeClock(plan.now + 1.0)
    delivered: list[dict[str, Any]] = []

    async def take(events: Sequence[UsageEvent]) -> None:
        delivered.extend(json.loads(json.dumps(event.to_dict())) for event in events)

    store = store_at(plan.url, clock)
    metering = metering_of(store, plan.payer, CallbackSink(take), "b", **options)
    app = rooms(metering, plan.policy, crash_after("opening.before", how=list))
    async with lifespan(app):
        yield Next(plan, app, metering, store, clock, delivered)


async def whole_books(url: str) -> list[str]:
    """Whatever does not balance in the store at *url*, holds that leaked, and events that nobody delivered."""
    store = store_at(url)
    await store.open()
    state = (await store.read(EverythingKept())).state
    await store.close()
    wrong: list[str] = []
    for key, account in state.accounts.items():
        grants = [*state.grants.get(key, {}).values(), *state.closed_grants.get(key, {}).values()]
        windows = [row for place, row in state.allowances.items() if place[:2] == key]
        wrong.extend(discrepancies(account, grants, state.live_holds(key), windows))
        wrong.extend(ledger_discrepancies(account, grants, None, state.entries.get(key, [])))
    wrong.extend(f"{hold.id} lives" for hold in state.holds.values() if hold.receipt is None)
    wrong.extend(f"{lease.id} keeps a slot" for pool in state.leases.values() for lease in pool.values())
    wrong.extend(f"{event} is in the outbox" for event in state.events)
    return wrong

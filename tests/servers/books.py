"""
The books of a server, read from another process: its SQLite file, opened as any other process may, and the file where
the server delivers its usage events.

Knows the store's verbs and rows; nothing of servers. Starts no background of its own, so that nothing is swept,
settled or delivered unless a test does it.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from asgi_metering.events.sinks import CallbackSink
from asgi_metering.receipts import Entry, EntryKind
from asgi_metering.rules.conservation import discrepancies
from asgi_metering.rules.operations import PostGrant, Sweep
from asgi_metering.rules.state import Account, Hold
from asgi_metering.stores.contract import AccountRows, EntriesAfter, LiveHolds, PendingEvents
from asgi_metering.stores.sqlite import SQLiteStore
from asgi_metering.usage.event import UsageEvent
from tests.harness.waiting import DEFAULT_TIMEOUT_S, wait_until

__all__ = ["CREDIT", "Books", "Ended", "deliver_to", "read_lines"]

CREDIT = 1_000_000
"""Smallest parts of one credit."""

UNIT = "credits"

T = TypeVar("T")


def deliver_to(path: Path) -> CallbackSink:
    """A sink of usage events: a line of *path* for each, whole, whichever process writes."""

    async def append(events: Sequence[UsageEvent]) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, "".join(json.dumps(event.to_dict()) + "\n" for event in events).encode())
        finally:
            os.close(descriptor)

    return CallbackSink(append)


@dataclass(frozen=True, slots=True)
class Ended:
    """
    How one call ended, from its usage event and its line of the ledger; they have been found equal.

    Attributes:
        outcome: The cause.
        reason: The row of the policy's table.
        basis: What was charged on; ``"none"`` for nothing.
        amount: Smallest parts charged.
    """

    outcome: str
    reason: str
    basis: str
    amount: int


def read_lines(path: Path) -> list[dict[str, Any]]:
    """
    The JSON objects of a file that others append lines to; none if it is not there yet.

    What is being written may be seen in part: only whole lines count.
    """
    written = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in written[: written.rfind(b"\n") + 1].splitlines()]


class Books:
    """
    The books in the file *path*; it need not exist yet.

    Args:
        path: Of the server's store.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def delivered(self) -> Path:
        """Where the server delivers its usage events."""
        return self.path.with_suffix(".events")

    @property
    def url(self) -> str:
        """For `Metering` and the command line."""
        return f"sqlite:///{self.path}"

    def ask(self, work: Callable[[SQLiteStore], Coroutine[Any, Any, T]], clock: Callable[[], float] = time.time) -> T:
        """Open the store, run *work* on it, close it."""

        async def run() -> T:
            store = SQLiteStore(self.path, synchronous="OFF", clock=clock)
            await store.open()
            try:
                return await work(store)
            finally:
                await store.close()

        return asyncio.run(run())

    def grant(self, payer: str, whole: int) -> str:
        """Give *payer* so many whole credits, once; returns *payer*."""
        self.ask(lambda store: store.post([PostGrant(f"for-{payer}", payer, UNIT, whole * CREDIT)]))
        return payer

    def account(self, payer: str) -> Account:
        """The account's row; its sums have been proven from its grants and holds."""
        _, rows = self.ask(lambda store: store.read(AccountRows(payer, UNIT)))
        key = (payer, UNIT)
        grants = [*rows.grants.get(key, {}).values(), *rows.closed_grants.get(key, {}).values()]
        assert discrepancies(rows.accounts[key], grants, rows.holds.values()) == []
        return rows.accounts[key]

    def holds(self, payer: str) -> list[Hold]:
        """Its holds that have not ended, oldest first."""
        _, rows = self.ask(lambda store: store.read(LiveHolds()))
        return [hold for hold in rows.holds.values() if hold.payer == payer]

    def charges(self, payer: str) -> list[Entry]:
        """Its ledger without the grants, oldest first."""
        _, rows = self.ask(lambda store: store.read(EntriesAfter(payer, UNIT)))
        return [entry for entry in rows.entries.get((payer, UNIT), []) if entry.kind is not EntryKind.GRANT]

    def events(self, payer: str) -> list[dict[str, Any]]:
        """Its usage events, oldest first: those that were delivered, each once, and those that still wait for it."""
        # In this order: an event leaves the outbox after it was delivered.
        waiting = self.waiting()
        delivered = read_lines(self.delivered)
        found = {event["id"]: event for event in delivered}
        assert len(found) == len(delivered)
        found |= {event["id"]: event for event in waiting}
        return [event for event in found.values() if event["payer"] == payer]

    def waiting(self) -> list[dict[str, Any]]:
        """The events in the outbox, oldest first, of all payers."""
        _, rows = self.ask(lambda store: store.read(PendingEvents()))
        return [{**event.payload, "id": event.id} for event in rows.events.values()]

    def sweep(self, at: float) -> None:
        """Look after what is overdue at the time *at*, as any process's worker does now and then."""
        self.ask(lambda store: store.run([Sweep()]), clock=lambda: at)

    def ended(self, payer: str, count: int = 1, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> list[Ended]:
        """
        Wait until *count* calls of *payer* have ended, and prove its books.

        One event per call, one line per charge and of the same amount, no hold left, and sums that are right.
        """

        def over() -> bool:
            return len(self.events(payer)) >= count and not self.holds(payer)

        wait_until(over, timeout_s=timeout_s, what=f"{count} calls of {payer} have ended")
        events, charges = self.events(payer), self.charges(payer)
        assert len({event["id"] for event in events}) == len(events) == count
        by_call = {entry.ref: (entry.amount, entry.basis) for entry in charges}
        assert len(by_call) == len(charges)
        assert by_call == {event["id"]: (event["amount"], event["basis"]) for event in events if event["amount"]}
        assert self.account(payer).settled == sum(entry.amount for entry in charges)
        assert self.account(payer).held == 0
        return [Ended(event["outcome"], event["reason"], event["basis"], event["amount"]) for event in events]

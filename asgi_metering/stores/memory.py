"""
The memory store: one process, nothing survives it. For development, tests and single-process use (S0.17).

The whole state is one `State`; an operation is a function call under a lock, so nothing can come between its steps.
"""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from itertools import chain, islice
from operator import attrgetter
from typing import Any

from asgi_metering.errors import StoreContendedError
from asgi_metering.rules import fast_admission, fast_end, outbox
from asgi_metering.rules.decide import Answer, decided
from asgi_metering.rules.operations import Acknowledge, Admit, Claim, End, Operation, Sweep
from asgi_metering.rules.state import AccountKey, Change, State, Table
from asgi_metering.stores.contract import (
    PAGE_ROWS,
    TABLES,
    AccountRows,
    AccountsAfter,
    Books,
    EntriesAfter,
    Filling,
    HoldRow,
    LinesOf,
    LiveHolds,
    PendingEvents,
    Query,
    ReadingsKept,
    Snapshot,
    Store,
)
from asgi_metering.stores.forgetting import Bounds, Forgetting
from asgi_metering.stores.rows import MAPS

__all__ = ["MemoryStore"]

SWEPT_ROWS = 10_000
"""Rows of each kind that a sweep looks at beyond its own: some milliseconds, and a million are through in an hour."""

_BOUNDS = Bounds()


class MemoryStore(Store):
    """
    Everything in this process's memory.

    Args:
        clock: Answers epoch seconds; the machine's clock by default. The store owns time, so tests inject it here.
        bounds: How much stays of what no longer matters; what still matters is never dropped.

    What it keeps grows with accounts that have grants, with calls in flight, with windows that run and with events
    that no sink has taken; not with calls, callers or addresses that it has met (DESIGN "Retention").

    Safe from several event loops and threads: a lock keeps operations, and what is read, apart.
    """

    name = "memory"
    immediate = True
    durable = False
    shared = False

    def __init__(self, clock: Callable[[], float] = time.time, *, bounds: Bounds = _BOUNDS) -> None:
        self._clock = clock
        self._state = State()
        self._bounds = bounds
        self._forgetting = Forgetting(self._state, bounds)
        self._lock = threading.Lock()
        self._acquire, self._release = self._lock.acquire, self._lock.release

    async def open(self) -> None:
        """Nothing to do."""

    async def close(self) -> None:
        """Nothing to do; what is kept stays until the object goes."""

    async def run(self, operations: Sequence[Operation]) -> list[Answer | Exception]:
        """See `Store.run`. Never waits."""
        answers: list[Answer | Exception] = []
        for operation in operations:
            try:
                answers.append(self.run_now(operation))
            except Exception as mistake:  # noqa: BLE001 -- the answer of one operation, and no neighbour's
                answers.append(mistake)
        return answers

    def run_now(self, operation: Operation) -> Answer:
        """See `Store.run_now`."""
        # As `with` does, at half its price.
        self._acquire()
        try:
            now = self._clock()
            # Nearly every call, without a list of what is written: the rows are where they stay.
            if type(operation) is Admit:
                decision = fast_admission.admit(self._state, operation, now)
                if decision is not None:
                    self._forgetting.after_admission(now)
                    return decision
            elif type(operation) is End:
                receipt = fast_end.end(self._state, operation, now)
                if receipt is not None:
                    self._forgetting.after_end(receipt)
                    return receipt
            return self._decided(operation, now)
        finally:
            self._release()

    def _decided(self, operation: Operation, now: float) -> Answer:
        if type(operation) is Acknowledge:
            acknowledged = outbox.acknowledge(self._state, operation, now)
            self._forgetting.after_delivery(acknowledged)
            return acknowledged
        if type(operation) is Claim:
            return outbox.claim(self._state, operation, now)
        written: list[Change] = []
        try:
            return decided(self._state, operation, now, written)
        finally:
            # Also after a mistake: overdue calls may have been ended on the way to it.
            if written:
                self._forgetting.after(written, now)
            if type(operation) is Sweep:
                self._forgetting.turn(now, SWEPT_ROWS)

    async def read(self, query: Query) -> Snapshot:
        """See `Store.read`."""
        with self._lock:
            return self._read(query)

    @asynccontextmanager
    async def books(self) -> AsyncIterator[Books]:
        """See `Store.books`. A copy of the tables; the rows themselves are shared."""
        with self._lock:
            copied = _MemoryBooks(_copy(self._state), self._clock())
        yield copied

    @asynccontextmanager
    async def fill(self) -> AsyncIterator[Filling]:
        """See `Store.fill`. Nobody is kept out: where somebody writes meanwhile, nothing of it is kept."""
        with self._lock:
            before = _copy(self._state)
            filling = _MemoryFilling(before, self._clock())
        yield filling
        with self._lock:
            if any(getattr(self._state, table) != getattr(before, table) for table in State.__slots__):
                raise StoreContendedError(
                    "The memory store was written to while it was filled, so it stays as it is. Fill it before its use."
                )
            self._state = State()
            self._state.delivered = filling.state.delivered
            self._forgetting = Forgetting(self._state, self._bounds)
            for table in TABLES:
                place = MAPS[table].place
                self._state.apply([(table, place(row), row) for row in _rows(filling.state, table)])
            self._forgetting.adopt()

    def _read(self, query: Query) -> Snapshot:
        state = self._state
        found = State()
        match query:
            case AccountRows(payer, unit):
                self._copy_account((payer, unit), found)
            case AccountsAfter(payer, unit, limit):
                keys = sorted(key for key in state.accounts if key > (payer, unit))
                found.accounts = {key: state.accounts[key] for key in keys[:limit]}
            case EntriesAfter(payer, unit, number, limit):
                lines = (line for line in state.entries.get((payer, unit), ()) if line.number > number)
                found.entries = {(payer, unit): list(islice(lines, limit))}
            case LinesOf(payer, unit, ref):
                found.entries = {(payer, unit): list(state.lines_of((payer, unit), ref))}
            case HoldRow(hold_id):
                if hold_id in state.holds:
                    found.holds = {hold_id: state.holds[hold_id]}
            case LiveHolds(limit):
                live = (hold for hold in state.holds.values() if hold.receipt is None)
                found.holds = {hold.id: hold for hold in islice(live, limit)}
            case PendingEvents(limit):
                found.events = dict(islice(state.events.items(), limit))
            case ReadingsKept():
                found.readings = dict(state.readings)
            case _:
                found = _copy(state)
        return Snapshot(self._clock(), found)

    def _copy_account(self, key: AccountKey, found: State) -> None:
        state = self._state
        if key in state.accounts:
            found.accounts[key] = state.accounts[key]
        if key in state.checkpoints:
            found.checkpoints[key] = state.checkpoints[key]
        found.grants[key] = dict(state.grants.get(key, {}))
        found.closed_grants[key] = dict(state.closed_grants.get(key, {}))
        found.holds = {hold.id: hold for hold in state.live_holds(key)}
        found.live[key] = set(found.holds)
        found.apply([(Table.ALLOWANCE, place, row) for place, row in state.allowances.items() if place[:2] == key])


class _MemoryBooks(Books):
    """The books of a state that nobody changes."""

    one_instant = True

    def __init__(self, state: State, now: float) -> None:
        self.state = state
        self.now = now

    async def rows(self, table: str) -> AsyncGenerator[Sequence[Any], None]:
        """See `Books.rows`."""
        rows = iter(_rows(self.state, table))
        while page := list(islice(rows, PAGE_ROWS)):
            yield page


class _MemoryFilling(_MemoryBooks, Filling):
    """A state of its own, until it is kept."""

    whole = True

    def __init__(self, before: State, now: float) -> None:
        super().__init__(_copy(before), now)
        self._keys = {table: set(map(_key_of(table), _rows(before, table))) for table in TABLES}
        self._keys[Table.EVENT].update(before.delivered)

    async def put(self, table: str, rows: Sequence[Any]) -> int:
        """See `Filling.put`."""
        keys, key_of, place = self._keys[table], _key_of(table), MAPS[table].place
        new = {key_of(row): row for row in reversed(rows) if key_of(row) not in keys}
        keys.update(new)
        self.state.apply([(table, place(row), row) for row in reversed(new.values())])
        return len(new)


def _key_of(table: str) -> Callable[[Any], Any]:
    return attrgetter(*MAPS[table].key)


_ACCOUNTS_GRANT = attrgetter("payer", "unit", "number")
_ACCOUNTS_WINDOW = attrgetter("payer", "unit", "name", "start")


def _rows(state: State, table: str) -> Iterable[Any]:
    """The rows of one table, in the order of `Books.rows`."""
    match table:
        case Table.GRANT:
            wallets = chain(state.grants.values(), state.closed_grants.values())
            return sorted(chain.from_iterable(grants.values() for grants in wallets), key=_ACCOUNTS_GRANT)
        case Table.ALLOWANCE:
            return sorted(state.allowances.values(), key=_ACCOUNTS_WINDOW)
        case Table.ENTRY:
            return chain.from_iterable(state.entries[key] for key in sorted(state.entries))
        case Table.ACCOUNT:
            return [state.accounts[key] for key in sorted(state.accounts)]
        case Table.CHECKPOINT:
            return [state.checkpoints[key] for key in sorted(state.checkpoints)]
        case Table.LEASE:
            return chain.from_iterable(leases.values() for leases in state.leases.values())
    plain: dict[str, dict[Any, Any]] = {
        Table.UNIT: state.units,
        Table.HOLD: state.holds,
        Table.CHARGE_KEY: state.charge_keys,
        Table.IDEMPOTENCY: state.idempotency_keys,
        Table.COUNTER: state.counters,
        Table.EVENT: state.events,
        Table.READING: state.readings,
    }
    return plain[table].values()


def _copy(state: State) -> State:
    copy = State()
    copy.accounts = dict(state.accounts)
    copy.grants = {key: dict(rows) for key, rows in state.grants.items()}
    copy.closed_grants = {key: dict(rows) for key, rows in state.closed_grants.items()}
    copy.holds = dict(state.holds)
    copy.live = {key: set(ids) for key, ids in state.live.items()}
    copy.allowances = dict(state.allowances)
    copy.latest = dict(state.latest)
    copy.counters = dict(state.counters)
    copy.leases = {pool: dict(rows) for pool, rows in state.leases.items()}
    copy.entries = {key: list(rows) for key, rows in state.entries.items()}
    copy.refs = {key: list(rows) for key, rows in state.refs.items()}
    copy.events = dict(state.events)
    copy.delivered = dict(state.delivered)
    copy.charge_keys = dict(state.charge_keys)
    copy.idempotency_keys = dict(state.idempotency_keys)
    copy.checkpoints = dict(state.checkpoints)
    copy.units = dict(state.units)
    copy.readings = dict(state.readings)
    return copy

"""
The memory store: one process, nothing survives it. For development, tests and single-process use (S0.17).

The whole state is one `State`; an operation is a function call under a lock, so nothing can come between its steps.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from itertools import islice

from asgi_metering.rules.decide import Answer, run
from asgi_metering.rules.operations import Operation, Sweep
from asgi_metering.rules.state import AccountKey, Change, State, Table
from asgi_metering.stores.contract import (
    AccountRows,
    AccountsAfter,
    EntriesAfter,
    HoldRow,
    LinesOf,
    LiveHolds,
    PendingEvents,
    Query,
    Snapshot,
    Store,
)
from asgi_metering.stores.forgetting import Bounds, Forgetting

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
        self._forgetting = Forgetting(self._state, bounds)
        self._lock = threading.Lock()

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
        written: list[Change] = []
        with self._lock:
            now = self._clock()
            try:
                return run(self._state, operation, now, written)
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
    copy.charge_keys = dict(state.charge_keys)
    copy.idempotency_keys = dict(state.idempotency_keys)
    copy.checkpoints = dict(state.checkpoints)
    copy.units = dict(state.units)
    return copy

"""Reading: the contract's queries as statements. Changes nothing, and decodes no more rows than it returns."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from typing import Any

from asgi_metering.rules.state import AccountKey, State, Table
from asgi_metering.stores.contract import (
    AccountRows,
    AccountsAfter,
    EntriesAfter,
    HoldRow,
    LinesOf,
    LiveHolds,
    PendingEvents,
    Query,
    ReadingsKept,
)
from asgi_metering.stores.sqlite.statements import LINES_OF, ROWS, SELECT, select

__all__ = ["read"]

_GRANTS_OF = select(Table.GRANT, "WHERE payer = ? AND unit = ? ORDER BY number")
_LIVE_HOLDS_OF = select(Table.HOLD, "INDEXED BY hold_live WHERE receipt IS NULL AND payer = ? AND unit = ?")
_ALLOWANCES_OF = select(Table.ALLOWANCE, "WHERE payer = ? AND unit = ? ORDER BY name, start")
_ACCOUNTS_AFTER = select(Table.ACCOUNT, "WHERE (payer, unit) > (?, ?) ORDER BY payer, unit LIMIT ?")
_ENTRIES_AFTER = select(Table.ENTRY, "WHERE payer = ? AND unit = ? AND number > ? ORDER BY number LIMIT ?")
# By the index of live holds: in the order of the table it would step over every ended one that is kept.
_LIVE_HOLDS = select(Table.HOLD, "INDEXED BY hold_live WHERE receipt IS NULL ORDER BY position LIMIT ?")
_PENDING_EVENTS = select(Table.EVENT, "INDEXED BY event_next WHERE acknowledged_at IS NULL ORDER BY position LIMIT ?")

_IN_ORDER = {Table.HOLD: "ORDER BY position", Table.EVENT: "ORDER BY position", Table.GRANT: "ORDER BY number"}


def read(connection: sqlite3.Connection, query: Query) -> State:
    """Answer *query* with a state that holds exactly what it asked for (see `contract`)."""
    found = State()

    def rows(table: str, statement: str, *values: Any) -> Iterator[Any]:
        return map(ROWS[table].decode, connection.execute(statement, values))

    match query:
        case AccountRows(payer, unit):
            _read_account(found, (payer, unit), rows)
        case AccountsAfter(payer, unit, limit):
            for account in rows(Table.ACCOUNT, _ACCOUNTS_AFTER, payer, unit, limit):
                found.accounts[account.payer, account.unit] = account
        case EntriesAfter(payer, unit, number, limit):
            found.entries[payer, unit] = list(rows(Table.ENTRY, _ENTRIES_AFTER, payer, unit, number, limit))
        case LinesOf(payer, unit, ref):
            found.entries[payer, unit] = list(rows(Table.ENTRY, LINES_OF, payer, unit, ref))
        case HoldRow(hold_id):
            found.holds = {hold.id: hold for hold in rows(Table.HOLD, SELECT[Table.HOLD], hold_id)}
        case LiveHolds(limit):
            found.holds = {hold.id: hold for hold in rows(Table.HOLD, _LIVE_HOLDS, limit)}
        case PendingEvents(limit):
            found.events = {event.id: event for event in rows(Table.EVENT, _PENDING_EVENTS, limit)}
        case ReadingsKept():
            _read_table(found, Table.READING, rows)
        case _:
            for table in ROWS:
                _read_table(found, table, rows)
    return found


def _read_account(found: State, key: AccountKey, rows: Any) -> None:
    found.grants[key], found.closed_grants[key], found.live[key] = {}, {}, set()
    found.apply([(Table.ACCOUNT, key, account) for account in rows(Table.ACCOUNT, SELECT[Table.ACCOUNT], *key)])
    found.apply([(Table.GRANT, key, grant) for grant in rows(Table.GRANT, _GRANTS_OF, *key)])
    found.apply([(Table.HOLD, hold.id, hold) for hold in rows(Table.HOLD, _LIVE_HOLDS_OF, *key)])
    for checkpoint in rows(Table.CHECKPOINT, SELECT[Table.CHECKPOINT], *key):
        found.checkpoints[key] = checkpoint
    for window in rows(Table.ALLOWANCE, _ALLOWANCES_OF, *key):
        found.apply([(Table.ALLOWANCE, (*key, window.name, window.start), window)])


def _read_table(found: State, table: str, rows: Any) -> None:
    place = ROWS[table].place
    found.apply([(table, place(row), row) for row in rows(table, select(table, _IN_ORDER.get(table, "")))])

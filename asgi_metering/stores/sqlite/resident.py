"""
The resident rows: those that one connection has read, kept from batch to batch, and written together.

Knows how each row is found by its key, and how its changes are written. Never knows which rows an operation looks at,
nor what it decides.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence
from typing import Any

from asgi_metering.rules.hold import HoldState
from asgi_metering.rules.operations import (
    Admit,
    End,
    Operation,
    Renew,
)
from asgi_metering.rules.state import (
    NEVER,
    AccountKey,
    AllowanceKey,
    BucketKey,
    Change,
    Event,
    Grant,
    Hold,
    Lease,
    State,
    Table,
)
from asgi_metering.stores.rows import text
from asgi_metering.stores.sqlite.packing import HoldRows
from asgi_metering.stores.sqlite.statements import (
    DELETE,
    END_HOLD,
    EVENT_TIMES,
    GRANT_SUMS,
    INSERT,
    NEW_EVENT,
    NEW_HOLD,
    ROWS,
    SELECT,
    UPDATE_HOLD,
    UPSERT,
    put,
    select,
)

__all__ = ["Resident"]

MAX_KNOWN = 5_000
"""Keys that a copy knows before it forgets everything: some megabytes, and reading the busy ones again is cheap."""

FEW_HOLDS = 4
"""Up to so many holds are read one by one: to ask for many at once costs as much as two of them, then less for each."""

_encode_entry = ROWS[Table.ENTRY].encode
_HOLD_ROWS = HoldRows()

# Read once: on Python 3.11 to look up the member of an enum costs as much as a small function.
_ENTRY, _EVENT_ROW, _GRANT_ROW = Table.ENTRY, Table.EVENT, Table.GRANT
_HELD = HoldState.HELD
_NAMING = (Admit, End, Renew)

_HOLDS = select(Table.HOLD, "WHERE id IN (SELECT value FROM json_each(?))")
_OPEN_GRANTS = select(
    Table.GRANT,
    'INDEXED BY grant_open WHERE payer = ? AND unit = ? AND "open" ORDER BY number',
)
_LATEST_WINDOW = select(Table.ALLOWANCE, "WHERE payer = ? AND unit = ? AND name = ? ORDER BY start DESC LIMIT 1")
_DELETE_FOLDED = "DELETE FROM entry WHERE payer = ? AND unit = ? AND number <= ?"
_READINGS = select(Table.READING, "")
_LIVE_LEASES = "SELECT id, expires_at FROM lease WHERE pool = ? AND expires_at > ?"
_EVENT = f"{EVENT_TIMES} WHERE id = ?"
_ACKNOWLEDGE = "UPDATE event SET acknowledged_at = ? WHERE id = ? AND acknowledged_at IS NULL"


class Resident:
    """
    The rows of one connection's batches, without a word on what they are needed for.

    They stay from one batch to the next as long as nobody else has written to the file, so that a busy account is
    not read again for each of its batches.

    Args:
        connection: The only one that writes them.
    """

    __slots__ = (
        "_acknowledged",
        "_deleted",
        "_ended",
        "_entries",
        "_known",
        "_looked_for",
        "_now",
        "_open",
        "_put",
        "_state",
        "_stored",
        "_version",
        "_written",
        "connection",
    )

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection
        self._version: int | None = None
        self._forget()

    def _forget(self) -> None:
        self._state = State()
        self._known: set[tuple[Any, ...]] = set()
        # Ids of holds: there are more of them than of all others.
        self._looked_for: set[str] = set()
        # As they are stored: what a change leaves as it was need not be written again.
        self._stored: dict[str, Hold] = {}
        self._open: dict[tuple[str, str, str], Grant] = {}
        self._ended: list[str] = []
        self._put: dict[str, dict[Any, Any]] = {table: {} for table in UPSERT}
        self._deleted: dict[str, set[Any]] = {table: set() for table in UPSERT}
        self._entries: list[Sequence[Any]] = []
        self._acknowledged: list[tuple[float, str]] = []
        self._written: list[Change] = []
        self._now = -NEVER

    def begin(self, now: float) -> None:
        """
        Start a batch, inside a transaction that keeps other writers out.

        Args:
            now: The store's time for the whole batch.
        """
        (version,) = self.connection.execute("PRAGMA data_version").fetchone()
        # A clock that stepped back sees leases alive that were dead, and not looked at, before.
        known = len(self._known) + len(self._looked_for)
        if version != self._version or now < self._now or known > MAX_KNOWN:
            self._forget()
            self._version = version
        self._drop_ended()
        self._now = now
        self._state.entries.clear()
        self._state.refs.clear()
        self._state.events.clear()
        self._state.delivered.clear()

    def _drop_ended(self) -> None:
        """A call that has ended is hardly asked for again: it makes room for others."""
        holds, stored, looked_for = self._state.holds, self._stored, self._looked_for
        for call_id in self._ended:
            looked_for.discard(call_id)
            stored.pop(call_id, None)
            holds.pop(call_id, None)
        self._ended.clear()

    def expect(self, operations: Sequence[Operation]) -> None:
        """Read at once what `run` would read one by one of *operations*: the holds that they name."""
        known = self._looked_for
        ids = [o.id for o in operations if isinstance(o, _NAMING) and o.id not in known]
        told = json.dumps(ids)
        # JSON in SQLite ends a text at its NUL.
        if len(ids) <= FEW_HOLDS or "\\u0000" in told:
            return
        for row in self.connection.execute(_HOLDS, (told,)):
            self._keep_hold(ROWS[Table.HOLD].decode(row))
        known.update(ids)

    # -- what changed --------------------------------------------------------------------------------------

    def _sort(self) -> None:
        """Find out what of all that the rules have written is to be written here: of many changes to a row the last."""
        put, deleted, entries = self._put, self._deleted, self._entries
        for table, key, row in self._written:
            if table == _GRANT_ROW:
                put[table][*key, row[2]] = row
            elif table == _ENTRY:
                entries.append(_encode_entry(row))
            elif row is None:
                put[table].pop(key, None)
                deleted[table].add(key)
            elif table == _EVENT_ROW and row.acknowledged_at is not None:
                self._acknowledged.append((row.acknowledged_at, key))
            else:
                put[table][key] = row
        self._written.clear()

    def write(self) -> None:
        """Write what has changed since the last call."""
        self._sort()
        connection = self.connection
        for table, keys in self._deleted.items():
            if keys:
                connection.executemany(DELETE[table], [key if type(key) is tuple else (key,) for key in keys])
                if table == Table.HOLD:
                    for key in keys:
                        self._stored.pop(key, None)
                keys.clear()
        # Before checkpoints, which take away the lines that they fold.
        if self._entries:
            put(connection, INSERT[Table.ENTRY], self._entries)
            self._entries.clear()
        # Before events, of which one may be told again behind its acknowledgement.
        if self._acknowledged:
            connection.executemany(_ACKNOWLEDGE, self._acknowledged)
            self._acknowledged.clear()
        for table, rows in self._put.items():
            if rows:
                if table == Table.CHECKPOINT:
                    connection.executemany(_DELETE_FOLDED, [row[:3] for row in rows.values()])
                if table == Table.HOLD:
                    self._write_holds(rows)
                elif table == Table.EVENT:
                    self._write_events(rows)
                elif table == Table.GRANT:
                    self._write_grants(rows)
                else:
                    put(connection, UPSERT[table], list(map(ROWS[table].encode, rows.values())))
                rows.clear()

    def _write_holds(self, rows: dict[str, Hold]) -> None:
        stored, connection = self._stored, self.connection
        new, other, ended, changed = [], [], [], []
        for key, row in rows.items():
            was, receipt = stored.get(key), row.receipt
            if was is not None:
                if receipt is not None and _only_ended(row, was):
                    ended.append(_HOLD_ROWS.encode_end(row, receipt))
                else:
                    changed.append(_HOLD_ROWS.encode_change(row))
            elif receipt is None and row.state is _HELD and not row.observed:
                new.append(_HOLD_ROWS.encode_new(row))
            else:
                other.append(_HOLD_ROWS.encode(row))
            if receipt is not None:
                self._ended.append(key)
        for statement, values in ((END_HOLD, ended), (UPDATE_HOLD, changed)):
            if values:
                connection.executemany(statement, values)
        put(connection, NEW_HOLD, new)
        put(connection, INSERT[Table.HOLD], other)
        stored.update(rows)

    def _write_events(self, rows: dict[str, Event]) -> None:
        new, other = [], []
        for row in rows.values():
            key, at, payload, claimed_until, _ = row
            if claimed_until:
                other.append(ROWS[Table.EVENT].encode(row))
            else:
                new.append((key, at, text(payload)))
        put(self.connection, NEW_EVENT, new)
        put(self.connection, UPSERT[Table.EVENT], other)

    def _write_grants(self, rows: dict[tuple[str, str, str], Grant]) -> None:
        """A grant is hardly ever new, and opens or closes but once: nearly always its sums are enough."""
        stored, sums, whole = self._open, [], []
        for key, row in rows.items():
            was = stored.pop(key, None)
            if not row.is_open:
                whole.append(row)
                continue
            if was is not None and _only_sums(row, was):
                sums.append((row.settled, row.held, row.expired, *key))
            else:
                whole.append(row)
            stored[key] = row
        if sums:
            self.connection.executemany(GRANT_SUMS, sums)
        put(self.connection, UPSERT[Table.GRANT], list(map(ROWS[Table.GRANT].encode, whole)))

    # -- rows by key, each read once -----------------------------------------------------------------------

    def _is_new(self, *what: Any) -> bool:
        known = self._known
        if what in known:
            return False
        known.add(what)
        return True

    def _row(self, table: str, key: tuple[Any, ...]) -> Any:
        found = self.connection.execute(SELECT[table], key).fetchone()
        return None if found is None else ROWS[table].decode(found)

    def _load_book(self, key: AccountKey) -> None:
        """The account and its open grants."""
        if self._is_new(Table.ACCOUNT, key):
            account = self._row(Table.ACCOUNT, key)
            if account is not None:
                self._state.accounts[key] = account
                for row in self.connection.execute(_OPEN_GRANTS, key):
                    self._keep_grant(ROWS[Table.GRANT].decode(row))

    def _load_grant(self, key: AccountKey, grant_id: str) -> None:
        if self._state.grant(key, grant_id) is None and self._is_new(Table.GRANT, key, grant_id):
            grant = self._row(Table.GRANT, (*key, grant_id))
            if grant is not None:
                self._keep_grant(grant)

    def _keep_grant(self, grant: Grant) -> Grant:
        """Take in a grant as it is stored, unless the batch knows it already."""
        key = (grant.payer, grant.unit)
        known = self._state.grant(key, grant.id)
        if known is not None:
            return known
        self._state.apply([(Table.GRANT, key, grant)])
        if grant.is_open:
            self._open[*key, grant.id] = grant
        return grant

    def _load_hold(self, hold_id: str) -> Hold | None:
        if hold_id not in self._looked_for:
            self._looked_for.add(hold_id)
            hold = self._row(Table.HOLD, (hold_id,))
            if hold is not None:
                self._take(hold)
        return self._state.holds.get(hold_id)

    def _keep_hold(self, hold: Hold) -> None:
        """Take in a hold as it is stored, unless the batch knows it already."""
        if hold.id not in self._looked_for:
            self._looked_for.add(hold.id)
            self._take(hold)

    def _take(self, hold: Hold) -> None:
        self._state.apply([(Table.HOLD, hold.id, hold)])
        self._stored[hold.id] = hold

    def _load_allowances(self, bucket: BucketKey, boundaries: tuple[float, ...]) -> None:
        """The windows that may count now: those of the calendar, or the last one of an allowance that rolls."""
        self._load_book(bucket[:2])
        if boundaries:
            for start in boundaries[:-1]:
                self._load_allowance((*bucket, start))
        elif self._is_new(Table.ALLOWANCE, bucket):
            for row in self.connection.execute(_LATEST_WINDOW, bucket):
                window = ROWS[Table.ALLOWANCE].decode(row)
                if self._is_new(Table.ALLOWANCE, (*bucket, window.start)):
                    self._state.apply([(Table.ALLOWANCE, (*bucket, window.start), window)])

    def _load_allowance(self, key: AllowanceKey) -> None:
        # One that this copy has begun, since it rolls, was never read.
        if key not in self._state.allowances and self._is_new(Table.ALLOWANCE, key):
            window = self._row(Table.ALLOWANCE, key)
            if window is not None:
                self._state.apply([(Table.ALLOWANCE, key, window)])

    def _load_counter(self, key: str) -> None:
        if self._is_new(Table.COUNTER, key):
            counter = self._row(Table.COUNTER, (key,))
            if counter is not None:
                self._state.counters[key] = counter

    def _load_pool(self, pool: str) -> None:
        """The pool's live leases. What the batch has done to it already is newer than what is stored."""
        if not self._is_new(Table.LEASE, pool):
            return
        self._sort()
        put, deleted = self._put[Table.LEASE], self._deleted[Table.LEASE]
        for call_id, expires_at in self.connection.execute(_LIVE_LEASES, (pool, self._now)):
            key = (pool, call_id)
            if key not in put and key not in deleted:
                self._state.apply([(Table.LEASE, key, Lease(pool, call_id, expires_at))])

    def _load_plain(self, table: str, key: str) -> None:
        """A row of a table that is found by one text and by nothing else."""
        if self._is_new(table, key):
            row = self._row(table, (key,))
            if row is not None:
                self._state.apply([(table, key, row)])

    def _load_readings(self) -> None:
        """All of them: they are few, and the oldest makes room for a new one."""
        if self._is_new(Table.READING):
            for row in self.connection.execute(_READINGS):
                reading = ROWS[Table.READING].decode(row)
                self._state.readings[reading.series, reading.part] = reading

    def _load_events(self, ids: Iterable[str]) -> None:
        """Events as they are stored, with what the batch appended."""
        self.write()
        for event_id in ids:
            for row in self.connection.execute(_EVENT, (event_id,)):
                self._state.apply([(Table.EVENT, event_id, ROWS[Table.EVENT].decode(row))])


def _only_ended(row: Hold, was: Hold) -> bool:
    """Whether *row* differs from what is stored only in how it ended. What was not touched is the very same object."""
    return (
        row.amount is was.amount
        and row.parts is was.parts
        and row.expires_at is was.expires_at
        and row.due_at is was.due_at
        and row.observed is was.observed
    )


def _only_sums(row: Grant, was: Grant) -> bool:
    """Whether *row* differs from what is stored only in its sums."""
    return row.expires_at is was.expires_at and row.begun is was.begun and row.reversed is was.reversed

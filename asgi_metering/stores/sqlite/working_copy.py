"""
The working copy: the rows that batches touch, loaded when an operation needs them, written together.

Decides nothing: `rules.decide.run` does, on exactly the rows that it would look at in the whole state. What each
operation looks at is said here, and held to the memory store by the differential tests. Knows nothing of
transactions and threads.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any

from asgi_metering.receipts import Entry, Part, Source
from asgi_metering.rules.decide import OVERDUE_PER_ADMISSION, Answer, clamped, paying, run
from asgi_metering.rules.hold import HoldState
from asgi_metering.rules.keys import hold_of_key, key_rows
from asgi_metering.rules.operations import (
    Acknowledge,
    Admit,
    AllowanceSource,
    Backfill,
    Claim,
    Correct,
    Declare,
    End,
    Grow,
    Operation,
    PostGrant,
    Preview,
    Refund,
    Renew,
    ReverseGrant,
    SourceAsk,
    Sweep,
    Undo,
)
from asgi_metering.rules.state import (
    NEVER,
    AccountKey,
    AllowanceKey,
    BucketKey,
    Change,
    Grant,
    Hold,
    Lease,
    State,
    Table,
)
from asgi_metering.stores.sqlite.statements import (
    DELETE,
    INSERT,
    LINES_OF,
    ROWS,
    SELECT,
    UPDATE_GRANT,
    UPDATE_HOLD,
    UPSERT,
    select,
)

__all__ = ["WorkingCopy"]

MAX_KNOWN = 5_000
"""Keys that a copy knows before it forgets everything: some megabytes, and reading the busy ones again is cheap."""

FEW_HOLDS = 4
"""Up to so many holds are read one by one: to ask for many at once costs as much as two of them, then less for each."""

_encode_entry = ROWS[Table.ENTRY].encode

# Read once: on Python 3.11 to look up the member of an enum costs as much as a small function.
_ALLOWANCE, _GRANT = Source.ALLOWANCE, Source.GRANT
_ENTRY, _EVENT_ROW, _GRANT_ROW = Table.ENTRY, Table.EVENT, Table.GRANT

_HOLDS = select(Table.HOLD, "WHERE id IN (SELECT value FROM json_each(?))")
_OPEN_GRANTS = select(
    Table.GRANT,
    'INDEXED BY grant_open WHERE payer = ? AND unit = ? AND "open" ORDER BY number',
)
_PAID_GRANTS = select(
    Table.GRANT,
    "WHERE payer = ? AND unit = ? AND settled > 0 ORDER BY priority DESC, expires_at DESC, number DESC",
)
_LATEST_WINDOW = select(Table.ALLOWANCE, "WHERE payer = ? AND unit = ? AND name = ? ORDER BY start DESC LIMIT 1")
_DELETE_FOLDED = "DELETE FROM entry WHERE payer = ? AND unit = ? AND number <= ?"
# As for holds, the first condition is for the index and the second is the rule's own.
_PAST_WINDOWS = select(
    Table.ALLOWANCE,
    'INDEXED BY allowance_past WHERE held = 0 AND "end" <= ?1 - ?2 + 1.0 AND "end" + ?2 <= ?1 '
    'ORDER BY "end", payer, unit, name, start LIMIT ?3',
)
_PAST_CHARGE_KEYS = select(
    Table.CHARGE_KEY,
    'INDEXED BY charge_key_past WHERE members = 0 AND "end" <= ?1 - ?2 + 1.0 AND "end" + ?2 <= ?1 '
    'ORDER BY "end", key LIMIT ?3',
)
_PAST_IDEMPOTENCY = select(
    Table.IDEMPOTENCY,
    "INDEXED BY idempotency_past WHERE receipt IS NOT NULL AND expires_at <= ? ORDER BY expires_at, key LIMIT ?",
)
_OLD_ACCOUNTS = "SELECT DISTINCT payer, unit FROM entry INDEXED BY entry_at WHERE at <= ? ORDER BY payer, unit LIMIT ?"
_OLDEST_LINES = select(Table.ENTRY, "WHERE payer = ? AND unit = ? AND at <= ? ORDER BY number LIMIT ?")
_LIVE_LEASES = "SELECT id, expires_at FROM lease WHERE pool = ? AND expires_at > ?"
_DEAD_LEASES = select(Table.LEASE, "WHERE expires_at <= ? ORDER BY expires_at LIMIT ?")
_OVERDUE_HOLDS = select(
    Table.HOLD,
    "INDEXED BY hold_live WHERE receipt IS NULL AND payer = ? AND unit = ? AND expires_at <= ? "
    "ORDER BY due_at, id LIMIT ?",
)
_NEXT_HOLD = select(
    Table.HOLD,
    "INDEXED BY hold_live WHERE receipt IS NULL AND payer = ? AND unit = ? AND expires_at > ? "
    "ORDER BY expires_at LIMIT 1",
)
_OVERDUE_ACCOUNTS = (
    "SELECT DISTINCT payer, unit FROM hold INDEXED BY hold_live WHERE receipt IS NULL AND expires_at <= ? "
    "ORDER BY payer, unit"
)
# The first condition is for the index, the second is the rule's own, with its rounding.
_OLD_HOLDS = select(
    Table.HOLD,
    "INDEXED BY hold_ended WHERE ended_at <= ?1 - ?2 + 1.0 AND ended_at + ?2 <= ?1 ORDER BY ended_at LIMIT ?3",
)
_PAST_COUNTERS = select(
    Table.COUNTER,
    'INDEXED BY counter_past WHERE "end" + ("end" - start) <= ? ORDER BY "end" + ("end" - start) LIMIT ?',
)
_FREE_EVENTS = select(
    Table.EVENT,
    "INDEXED BY event_next WHERE acknowledged_at IS NULL AND claimed_until <= ? ORDER BY position LIMIT ?",
)
# Not what they say: the rules look at the times alone.
_EVENT_TIMES = "SELECT id, at, '{}', claimed_until, acknowledged_at FROM event"
_EVENT = f"{_EVENT_TIMES} WHERE id = ?"
_ACKNOWLEDGE = "UPDATE event SET acknowledged_at = ? WHERE id = ? AND acknowledged_at IS NULL"
_DELIVERED_EVENTS = (
    f"{_EVENT_TIMES} INDEXED BY event_delivered "
    "WHERE acknowledged_at <= ?1 - ?2 + 1.0 AND acknowledged_at + ?2 <= ?1 ORDER BY acknowledged_at, id LIMIT ?3"
)


class WorkingCopy:
    """
    The rows of one connection's batches.

    Rows stay from one batch to the next as long as nobody else has written to the file, so that a busy account is
    not read again for each of its batches.

    Args:
        connection: The only one that writes what this copy decides.
    """

    __slots__ = (
        "_acknowledged",
        "_deleted",
        "_ended",
        "_entries",
        "_known",
        "_now",
        "_put",
        "_state",
        "_stored",
        "_version",
        "connection",
    )

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection
        self._version: int | None = None
        self._forget()

    def _forget(self) -> None:
        self._state = State()
        self._known: set[tuple[Any, ...]] = set()
        self._stored: set[str] = set()
        self._ended: list[str] = []
        self._put: dict[str, dict[Any, Any]] = {table: {} for table in UPSERT}
        self._deleted: dict[str, set[Any]] = {table: set() for table in UPSERT}
        self._entries: list[list[Any]] = []
        self._acknowledged: list[tuple[float, str]] = []
        self._now = -NEVER

    def begin(self, now: float) -> None:
        """
        Start a batch, inside a transaction that keeps other writers out.

        Args:
            now: The store's time for the whole batch.
        """
        (version,) = self.connection.execute("PRAGMA data_version").fetchone()
        # A clock that stepped back sees leases alive that were dead, and not looked at, before.
        if version != self._version or now < self._now or len(self._known) > MAX_KNOWN:
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
        for call_id in self._ended:
            self._known.discard((Table.HOLD, call_id))
            self._stored.discard(call_id)
            self._state.apply([(Table.HOLD, call_id, None)])
        self._ended.clear()

    def expect(self, operations: Sequence[Operation]) -> None:
        """Read at once what `run` would read one by one of *operations*: the holds that they name."""
        known = self._known
        ids = [o.id for o in operations if isinstance(o, Admit | End | Renew) and (Table.HOLD, o.id) not in known]
        text = json.dumps(ids)
        # JSON in SQLite ends a text at its NUL.
        if len(ids) <= FEW_HOLDS or "\\u0000" in text:
            return
        for row in self.connection.execute(_HOLDS, (text,)):
            self._keep_hold(ROWS[Table.HOLD].decode(row))
        known.update([(Table.HOLD, call_id) for call_id in ids])

    def run(self, operation: Operation) -> Answer:
        """
        Load what *operation* needs, decide it, and remember what it changes until `write`.

        Raises:
            MeteringError: It is a mistake; it has changed nothing.
        """
        self._load(operation)
        written: list[Change] = []
        try:
            return run(self._state, operation, self._now, written)
        finally:
            self._remember(written)

    # -- what changed --------------------------------------------------------------------------------------

    def _remember(self, written: list[Change]) -> None:
        put, deleted = self._put, self._deleted
        for table, key, row in written:
            if table == _ENTRY:
                self._entries.append(_encode_entry(row))
            elif row is None:
                put[table].pop(key, None)
                deleted[table].add(key)
            elif table == _EVENT_ROW and row.acknowledged_at is not None:
                self._acknowledged.append((row.acknowledged_at, key))
            elif table == _GRANT_ROW:
                put[table][*key, row.id] = row
            else:
                put[table][key] = row

    def write(self) -> None:
        """Write what has changed since the last call: of many changes to a row only the last."""
        connection = self.connection
        for table, keys in self._deleted.items():
            if keys:
                connection.executemany(DELETE[table], [key if type(key) is tuple else (key,) for key in keys])
                if table == Table.HOLD:
                    self._stored -= keys
                keys.clear()
        # Before checkpoints, which take away the lines that they fold.
        if self._entries:
            connection.executemany(INSERT[Table.ENTRY], self._entries)
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
                elif table != Table.GRANT or not self._update_grants(rows):
                    connection.executemany(UPSERT[table], map(ROWS[table].encode, rows.values()))
                rows.clear()

    def _write_holds(self, rows: dict[str, Hold]) -> None:
        stored, holds = self._stored, ROWS[Table.HOLD]
        changed = [holds.encode_change(row) for key, row in rows.items() if key in stored]
        new = [holds.encode(row) for key, row in rows.items() if key not in stored]
        self.connection.executemany(UPDATE_HOLD, changed)
        self.connection.executemany(INSERT[Table.HOLD], new)
        stored.update(rows)
        self._ended += [key for key, row in rows.items() if row.receipt is not None]

    def _update_grants(self, rows: dict[Any, Grant]) -> bool:
        """Whether it was enough to write the sums: a grant is hardly ever new, and opens or closes but once."""
        changes = map(ROWS[Table.GRANT].encode_change, rows.values())
        return self.connection.executemany(UPDATE_GRANT, changes).rowcount == len(rows)

    # -- what each operation looks at ----------------------------------------------------------------------

    def _load(self, operation: Operation) -> None:
        match operation:
            case Admit():
                self._load_admit(operation)
            case End():
                self._load_end(operation)
            case Renew():
                self._load_hold(operation.id)
            case Preview():
                self._load_admit(operation.ask)
            case Undo():
                self._load_hold_whole(operation.ask.id)
                for limit in operation.ask.limits:
                    self._load_counter(limit.key)
            case Grow():
                hold = self._load_hold_whole(operation.id)
                if hold is not None:
                    self._load_due({(hold.payer, hold.unit)})
                    for source in operation.sources:
                        self._load_source(source, hold.payer, hold.unit)
            case PostGrant():
                key = (operation.payer, operation.unit)
                self._load_book(key)
                self._load_grant(key, operation.id)
            case ReverseGrant():
                key = (operation.payer, operation.unit)
                self._load_book(key)
                self._load_grant(key, operation.grant)
                self._load_lines(key, operation.grant)
            case Refund():
                self._load_refund(operation)
            case Correct() | Backfill():
                self._load_posting(operation)
            case Declare():
                for name, _ in operation.units:
                    self._load_plain(Table.UNIT, name)
            case Claim():
                self._load_free_events(operation.limit)
            case Acknowledge():
                self._load_events(operation.ids)
            case Sweep():
                self._load_sweep(operation)

    def _load_admit(self, ask: Admit) -> None:
        known = self._load_hold(ask.id)
        if known is not None:
            # A repeat: its answer tells what its source has left.
            self._load_account_of(known)
        self._load_due(paying(ask))
        for limit in ask.limits:
            self._load_counter(limit.key)
        for lease in ask.leases:
            self._load_pool(lease.pool)
        for source in ask.sources:
            self._load_source(source, source.payer or ask.payer, ask.unit)
        if ask.idempotency is not None:
            self._load_plain(Table.IDEMPOTENCY, ask.idempotency.key)
        if ask.charge_key is not None:
            for row_key in key_rows(ask.charge_key):
                self._load_charge_key(row_key)

    def _load_due(self, keys: set[AccountKey]) -> None:
        """Accounts that are taken from, and their calls that are overdue at the latest time that they have seen."""
        now = self._now
        accounts = []
        for key in keys:
            self._load_book(key)
            account = self._state.accounts.get(key)
            if account is not None:
                accounts.append((key, account.next_due_at))
                now = max(now, account.seen_at)
        for key, next_due_at in accounts:
            if next_due_at <= now:
                self._load_overdue(key, now, OVERDUE_PER_ADMISSION)

    def _load_charge_key(self, row_key: str) -> None:
        """A charge key with the hold that it owns, and what an end of that moves."""
        self._load_plain(Table.CHARGE_KEY, row_key)
        row = self._state.charge_keys.get(row_key)
        if row is not None:
            self._load_hold_whole(row.hold)

    def _load_source(self, source: SourceAsk, payer: str, unit: str) -> None:
        if isinstance(source, AllowanceSource):
            self._load_allowances((payer, unit, source.name), source.boundaries)

    def _load_end(self, ask: End) -> None:
        hold = self._load_hold(ask.id)
        if hold is None:
            return
        self._load_account_of(hold)
        for pinned in hold.windows:
            if pinned.meter in ask.actual:
                self._load_counter(pinned.key)
        first = hold.receipt
        if first is not None and (ask.amount or 0) < first.amount:
            # A late end that gives back, unless a refund has done so.
            key = (hold.payer, hold.unit)
            self._load_lines(key, hold.id)
            self._load_paid(key, first.parts, first.amount)

    def _load_hold_whole(self, hold_id: str) -> Hold | None:
        """A hold, and what an end of it moves."""
        hold = self._load_hold(hold_id)
        if hold is not None:
            self._load_account_of(hold)
        return hold

    def _load_refund(self, ask: Refund) -> None:
        """The lines of the charge, and where its parts go back to."""
        key = (ask.payer, ask.unit)
        self._load_book(key)
        parts = [part for line in self._load_lines(key, ask.call) for part in line.parts if part.amount > 0]
        for part in parts:
            if part.source is _ALLOWANCE:
                self._load_allowance((*key, part.name, part.start))
        self._load_paid(key, parts, sum(part.amount for part in parts))

    def _load_posting(self, ask: Correct | Backfill) -> None:
        key = (ask.payer, ask.unit)
        self._load_book(key)
        self._load_lines(key, ask.id)
        if ask.amount < 0:
            self._load_paid(key, (Part(Source.DEBT, "", 0.0, ask.amount),), -ask.amount)

    def _load_lines(self, key: AccountKey, ref: str) -> list[Entry]:
        """The ledger lines about *ref*: those stored, and those that the batch has written."""
        self.write()
        state = self._state
        known = {line.number for line in state.lines_of(key, ref)}
        for row in self.connection.execute(LINES_OF, (*key, ref)):
            line = ROWS[Table.ENTRY].decode(row)
            if line.number not in known:
                state.apply([(Table.ENTRY, key, line)])
        state.refs.get((*key, ref), []).sort(key=attrgetter("number"))
        return state.lines_of(key, ref)

    def _load_account_of(self, hold: Hold) -> None:
        """What an end of *hold* moves: its account, the sources of its parts, and the keys that wait for it."""
        key = (hold.payer, hold.unit)
        if hold.idempotency_key:
            self._load_plain(Table.IDEMPOTENCY, hold.idempotency_key)
        if hold.charge_key:
            self._load_hold_whole(hold_of_key(hold.id))
            self._load_charge_key(hold.charge_key)
        self._load_book(key)
        for source, name, start, _ in hold.parts:
            if source is _ALLOWANCE:
                self._load_allowance((*key, name, start))
            elif source is _GRANT:
                self._load_grant(key, name)

    def _load_paid(self, key: AccountKey, parts: Iterable[Part], amount: int) -> None:
        """
        The grants that a charge is given back to: its own, and those that paid debt since, closed ones included.

        A charge without debt needs the latter too: another charge's paid debt may have been given back to its grant.
        """
        if all(part.source is _ALLOWANCE for part in parts):
            return
        for part in parts:
            if part.source is _GRANT:
                self._load_grant(key, part.name)
        # What the batch has changed of their order counts.
        self.write()
        left = amount
        for grant in self.connection.execute(_PAID_GRANTS, key):
            left -= self._keep_grant(ROWS[Table.GRANT].decode(grant)).settled
            if left <= 0:
                break

    def _load_overdue(self, key: AccountKey, now: float, limit: int) -> int:
        """
        The *limit* holds of an account that the policy looks at first, and what says when it must look next: the
        first overdue hold behind them, and the first hold that is not overdue.

        Returns how many of them it will change.
        """
        self.write()
        decode = ROWS[Table.HOLD].decode
        overdue = list(map(decode, self.connection.execute(_OVERDUE_HOLDS, (*key, now, limit + 1))))
        for hold in overdue:
            self._keep_hold(hold)
            self._load_account_of(hold)
        for row in self.connection.execute(_NEXT_HOLD, (*key, now)):
            self._keep_hold(decode(row))
        return sum(1 for hold in overdue[:limit] if hold.due_at <= now or hold.state is HoldState.HELD)

    def _load_sweep(self, ask: Sweep) -> None:
        self.write()
        now = self._now
        connection = self.connection
        left = ask.limit
        for key in connection.execute(_OVERDUE_ACCOUNTS, (now,)).fetchall():
            self._load_book(key)
            left -= self._load_overdue(key, clamped(self._state, key, self._now), left)
            if not left:
                break
        for row in connection.execute(_OLD_HOLDS, (now, ask.keep_holds_s, ask.limit)):
            self._keep_hold(ROWS[Table.HOLD].decode(row))
        for row in connection.execute(_DEAD_LEASES, (now, ask.limit)):
            lease = Lease(*row)
            self._state.apply([(Table.LEASE, (lease.pool, lease.id), lease)])
        for row in connection.execute(_PAST_COUNTERS, (now, ask.limit)):
            counter = ROWS[Table.COUNTER].decode(row)
            if self._is_new(Table.COUNTER, counter.key):
                self._state.counters[counter.key] = counter
        for row in connection.execute(_PAST_WINDOWS, (now, ask.keep_windows_s, ask.limit)):
            window = ROWS[Table.ALLOWANCE].decode(row)
            key = (window.payer, window.unit, window.name, window.start)
            if self._is_new(Table.ALLOWANCE, key):
                self._state.apply([(Table.ALLOWANCE, key, window)])
        for table, query, values in (
            (Table.CHARGE_KEY, _PAST_CHARGE_KEYS, (now, ask.keep_holds_s, ask.limit)),
            (Table.IDEMPOTENCY, _PAST_IDEMPOTENCY, (now, ask.limit)),
        ):
            for row in connection.execute(query, values):
                found = ROWS[table].decode(row)
                if self._is_new(table, found.key):
                    self._state.apply([(table, found.key, found)])
        for row in connection.execute(_DELIVERED_EVENTS, (now, ask.keep_events_s, ask.limit)):
            event = ROWS[Table.EVENT].decode(row)
            self._state.delivered[event.id] = event
        self._load_old_entries(ask)

    def _load_old_entries(self, ask: Sweep) -> None:
        """Lines that are old enough to be folded, of the accounts that the rules look at first, and no others."""
        state, before = self._state, self._now - ask.keep_entries_s
        state.entries.clear()
        state.refs.clear()
        for key in self.connection.execute(_OLD_ACCOUNTS, (before, ask.limit)).fetchall():
            if self._is_new(Table.CHECKPOINT, key):
                checkpoint = self._row(Table.CHECKPOINT, key)
                if checkpoint is not None:
                    state.checkpoints[key] = checkpoint
            for row in self.connection.execute(_OLDEST_LINES, (*key, before, ask.limit)):
                state.apply([(Table.ENTRY, key, ROWS[Table.ENTRY].decode(row))])

    def _load_free_events(self, limit: int) -> None:
        """Events nobody has claimed, oldest first, and no others: what the batch appended came last."""
        self.write()
        self._state.events.clear()
        for row in self.connection.execute(_FREE_EVENTS, (self._now, limit)):
            event = ROWS[Table.EVENT].decode(row)
            self._state.events[event.id] = event

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
        return grant

    def _load_hold(self, hold_id: str) -> Hold | None:
        if self._is_new(Table.HOLD, hold_id):
            hold = self._row(Table.HOLD, (hold_id,))
            if hold is not None:
                self._take(hold)
        return self._state.holds.get(hold_id)

    def _keep_hold(self, hold: Hold) -> None:
        """Take in a hold as it is stored, unless the batch knows it already."""
        if self._is_new(Table.HOLD, hold.id):
            self._take(hold)

    def _take(self, hold: Hold) -> None:
        self._state.apply([(Table.HOLD, hold.id, hold)])
        self._stored.add(hold.id)

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

    def _load_events(self, ids: Iterable[str]) -> None:
        """Events as they are stored, with what the batch appended."""
        self.write()
        for event_id in ids:
            for row in self.connection.execute(_EVENT, (event_id,)):
                self._state.apply([(Table.EVENT, event_id, ROWS[Table.EVENT].decode(row))])

"""
The working copy: the rows that batches touch, loaded when an operation needs them, written together.

Decides nothing: `rules.decide.run` does, on exactly the rows that it would look at in the whole state. What each
operation looks at is said here, and held to the memory store by the differential tests. Knows nothing of
transactions and threads.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter

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
    Share,
    SourceAsk,
    Sweep,
    Undo,
)
from asgi_metering.rules.state import (
    AccountKey,
    Hold,
    Lease,
    Table,
)
from asgi_metering.stores.sqlite.resident import Resident
from asgi_metering.stores.sqlite.statements import EVENT_TIMES, LINES_OF, ROWS, select

__all__ = ["WorkingCopy"]

# Read once: on Python 3.11 to look up the member of an enum costs as much as a small function.
_ALLOWANCE, _GRANT = Source.ALLOWANCE, Source.GRANT

_PAID_GRANTS = select(
    Table.GRANT,
    "WHERE payer = ? AND unit = ? AND settled > 0 ORDER BY priority DESC, expires_at DESC, number DESC",
)
# The first condition is for the index, the second is the rule's own, with its rounding.
_OLD_HOLDS = select(
    Table.HOLD,
    "INDEXED BY hold_ended WHERE ended_at <= :now - :kept_s + 1.0 AND ended_at + :kept_s <= :now "
    "ORDER BY ended_at LIMIT :most",
)
_PAST_WINDOWS = select(
    Table.ALLOWANCE,
    'INDEXED BY allowance_past WHERE held = 0 AND "end" <= :now - :kept_s + 1.0 AND "end" + :kept_s <= :now '
    'ORDER BY "end", payer, unit, name, start LIMIT :most',
)
_PAST_CHARGE_KEYS = select(
    Table.CHARGE_KEY,
    'INDEXED BY charge_key_past WHERE members = 0 AND "end" <= :now - :kept_s + 1.0 AND "end" + :kept_s <= :now '
    'ORDER BY "end", key LIMIT :most',
)
_PAST_IDEMPOTENCY = select(
    Table.IDEMPOTENCY,
    "INDEXED BY idempotency_past WHERE receipt IS NOT NULL AND expires_at <= ? ORDER BY expires_at, key LIMIT ?",
)
_OLD_ACCOUNTS = "SELECT DISTINCT payer, unit FROM entry INDEXED BY entry_at WHERE at <= ? ORDER BY payer, unit LIMIT ?"
_OLDEST_LINES = select(Table.ENTRY, "WHERE payer = ? AND unit = ? AND at <= ? ORDER BY number LIMIT ?")
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
_PAST_COUNTERS = select(
    Table.COUNTER,
    'INDEXED BY counter_past WHERE "end" + ("end" - start) <= ? ORDER BY "end" + ("end" - start) LIMIT ?',
)
_FREE_EVENTS = select(
    Table.EVENT,
    "INDEXED BY event_next WHERE acknowledged_at IS NULL AND claimed_until <= ? ORDER BY position LIMIT ?",
)
_DELIVERED_EVENTS = (
    f"{EVENT_TIMES} INDEXED BY event_delivered "
    "WHERE acknowledged_at <= :now - :kept_s + 1.0 AND acknowledged_at + :kept_s <= :now "
    "ORDER BY acknowledged_at, id LIMIT :most"
)


class WorkingCopy(Resident):
    """What the rules decide on: resident rows, and for each operation those that it looks at."""

    __slots__ = ()

    def run(self, operation: Operation) -> Answer:
        """
        Load what *operation* needs, decide it, and remember what it changes until `write`.

        Raises:
            MeteringError: It is a mistake; it has changed nothing.
        """
        self._load(operation)
        return run(self._state, operation, self._now, self._written)

    # -- what each operation looks at ----------------------------------------------------------------------

    def _load(self, operation: Operation) -> None:
        # Nearly all are one of these two.
        if type(operation) is Admit:
            self._load_admit(operation)
        elif type(operation) is End:
            self._load_end(operation)
        else:
            self._load_other(operation)

    def _load_other(self, operation: Operation) -> None:
        match operation:
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
            case Share():
                self._load_readings()
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
        for source in ask.sources:
            if source.payer:
                self._load_due(paying(ask))
                break
        else:
            self._load_due(((ask.payer, ask.unit),))
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

    def _load_due(self, keys: Iterable[AccountKey]) -> None:
        """Accounts that are taken from, and their calls that are overdue at the latest time that they have seen."""
        now = self._now
        accounts = []
        for key in keys:
            self._load_book(key)
            account = self._state.accounts.get(key)
            if account is not None:
                accounts.append(account)
                if account.seen_at > now:
                    now = account.seen_at
        for account in accounts:
            if account.next_due_at <= now:
                self._load_overdue(account[:2], now, OVERDUE_PER_ADMISSION)

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
        for row in connection.execute(_OLD_HOLDS, _kept(now, ask.keep_holds_s, ask.limit)):
            self._keep_hold(ROWS[Table.HOLD].decode(row))
        for row in connection.execute(_DEAD_LEASES, (now, ask.limit)):
            lease = Lease(*row)
            self._state.apply([(Table.LEASE, (lease.pool, lease.id), lease)])
        for row in connection.execute(_PAST_COUNTERS, (now, ask.limit)):
            counter = ROWS[Table.COUNTER].decode(row)
            if self._is_new(Table.COUNTER, counter.key):
                self._state.counters[counter.key] = counter
        for row in connection.execute(_PAST_WINDOWS, _kept(now, ask.keep_windows_s, ask.limit)):
            window = ROWS[Table.ALLOWANCE].decode(row)
            key = (window.payer, window.unit, window.name, window.start)
            if self._is_new(Table.ALLOWANCE, key):
                self._state.apply([(Table.ALLOWANCE, key, window)])
        keys: tuple[tuple[str, str, dict[str, float] | tuple[float, int]], ...] = (
            (Table.CHARGE_KEY, _PAST_CHARGE_KEYS, _kept(now, ask.keep_holds_s, ask.limit)),
            (Table.IDEMPOTENCY, _PAST_IDEMPOTENCY, (now, ask.limit)),
        )
        for table, query, values in keys:
            for row in connection.execute(query, values):
                found = ROWS[table].decode(row)
                if self._is_new(table, found.key):
                    self._state.apply([(table, found.key, found)])
        for row in connection.execute(_DELIVERED_EVENTS, _kept(now, ask.keep_events_s, ask.limit)):
            event = ROWS[Table.EVENT].decode(row)
            self._state.delivered[event.id] = event
        self._load_readings()
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


def _kept(now: float, kept_s: float, most: int) -> dict[str, float]:
    """What a query for rows that were kept for long enough is asked with."""
    return {"now": now, "kept_s": kept_s, "most": most}

"""
The working copy: the rows that one batch touches, locked and loaded in one trip, written in another.

Decides nothing: `rules.decide.run` does, on exactly the rows that it would look at in the whole state. What each
operation looks at is said in `wants` and here, and held to the memory store by the differential tests.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeAlias

from asgi_metering.errors import MeteringError
from asgi_metering.receipts import Entry, Part, Source
from asgi_metering.rules.decide import OVERDUE_PER_ADMISSION, Answer, clamped, paying, run
from asgi_metering.rules.hold import HoldState
from asgi_metering.rules.keys import hold_of_key
from asgi_metering.rules.operations import (
    Acknowledge,
    Admit,
    AllowanceSource,
    Backfill,
    Claim,
    Correct,
    End,
    Grow,
    Operation,
    Preview,
    Refund,
    ReverseGrant,
    Sweep,
)
from asgi_metering.rules.state import NEVER, AccountKey, Change, Event, Hold, State, Table
from asgi_metering.stores.postgres.link import Statement
from asgi_metering.stores.postgres.loads import Loads
from asgi_metering.stores.postgres.wants import Wants, account_lock
from asgi_metering.stores.rows import MAPS

__all__ = ["MovedError", "WorkingCopy"]

Trip: TypeAlias = Callable[[Sequence[Statement]], Awaitable[list[list[tuple[Any, ...]]]]]
"""Send statements together and return the rows of each."""

Sink: TypeAlias = Callable[[list[tuple[Any, ...]]], None]

SWEPT_ACCOUNTS: Final = 1_000
"""Accounts that one sweep may end calls of: each costs a lock until it is done."""

ACCOUNTS_AT_ONCE: Final = 50
"""Accounts that a sweep loads in one trip: some hundred rows each, after a crash."""

_GUARDS: Final[Mapping[str, str]] = {
    Table.LEASE: "expires_at",
    Table.COUNTER: "end",
    Table.CHARGE_KEY: "end",
    Table.IDEMPOTENCY: "expires_at",
    Table.READING: "observed_at",
}
"""
What grows when somebody makes new use of a row that is old. A sweep takes such rows out without their locks, as long as
they are still as old as it found them.
"""


class MovedError(Exception):
    """A hold appeared between the locks and the rows, so that its account is not locked. Begin again."""


class WorkingCopy:
    """
    The rows of one batch, inside a transaction.

    Args:
        trip: The way to the server.
        loads: The statements that load.
        clock: Answers epoch seconds; None reads the server's.
    """

    def __init__(self, trip: Trip, loads: Loads, clock: Callable[[], float] | None) -> None:
        self._trip = trip
        self._loads = loads
        self._clock = clock
        self._now = -NEVER
        self._state = State()
        self._stored: set[str] = set()
        self._locked: set[AccountKey] = set()
        self._put: dict[str, dict[Any, Any]] = {table: {} for table in MAPS}
        self._deleted: dict[str, dict[Any, float]] = {table: {} for table in MAPS}
        self._entries: list[Entry] = []
        self._acknowledged: list[Event] = []
        self._bounds: dict[tuple[str, Any], float] = {}

    # -- the batch -----------------------------------------------------------------------------------------

    async def run(self, operations: Sequence[Operation], first: Sequence[Statement]) -> list[Answer | Exception]:
        """
        Run *operations* in order, and answer each. What they change is written by what `changes` returns.

        Args:
            operations: The batch.
            first: What goes before everything else: the beginning of the transaction.

        Raises:
            MovedError: Begin again.
        """
        wants = Wants(operations)
        first = await self._lock_for_sweeps(operations, wants, first)
        await self._load_wanted(wants, first)
        answers: list[Answer | Exception] = []
        for operation in operations:
            try:
                answers.append(await self._run(operation))
            except MeteringError as mistake:
                answers.append(mistake)
        return answers

    async def _run(self, operation: Operation) -> Answer:
        if type(operation) is Sweep:
            return await self._sweep(operation)
        await self._prepare(operation)
        written: list[Change] = []
        try:
            return run(self._state, operation, self._now, written)
        finally:
            self._remember(written)

    def _remember(self, written: Iterable[Change]) -> None:
        put, deleted = self._put, self._deleted
        for table, key, row in written:
            if table == Table.ENTRY:
                self._entries.append(row)
            elif row is None:
                put[table].pop(key, None)
                deleted[table][key] = self._bounds.get((table, key), NEVER)
            elif table == Table.EVENT and row.acknowledged_at is not None:
                self._acknowledged.append(row)
            else:
                put[table][(*key, row.id) if table == Table.GRANT else key] = row

    def changes(self) -> list[Statement]:
        """The statements that write what has changed since the last call: of many changes to a row only the last."""
        made, statements = [], self._loads.statements
        for table, keys in self._deleted.items():
            if keys:
                # In one order for everybody: what is not behind a lock is not waited for crosswise.
                ordered = sorted(keys)
                guard = _GUARDS.get(table)
                bounds = None if guard is None else (guard, [keys[key] for key in ordered])
                made.append(
                    statements.delete(table, [key if type(key) is tuple else (key,) for key in ordered], bounds)
                )
                if table == Table.HOLD:
                    self._stored -= keys.keys()
                keys.clear()
        # Before checkpoints, which take away the lines that they fold.
        if self._entries:
            made.append(statements.insert(Table.ENTRY, self._entries))
            self._entries.clear()
        # Before events, of which one may be told again behind its acknowledgement.
        if self._acknowledged:
            made.append(statements.acknowledge(self._acknowledged))
            self._acknowledged.clear()
        for table, rows in self._put.items():
            if rows:
                made.extend(self._written(table, rows))
                rows.clear()
        return made

    def _written(self, table: str, rows: dict[Any, Any]) -> Iterable[Statement]:
        statements, stored = self._loads.statements, self._stored
        if table == Table.CHECKPOINT:
            yield self._loads.folded(list(rows.values()))
        if table != Table.HOLD:
            ordered = rows.values() if table == Table.EVENT else [rows[key] for key in sorted(rows)]
            yield statements.insert(table, list(ordered))
            return
        changed = [row for key, row in rows.items() if key in stored]
        new = [row for key, row in rows.items() if key not in stored]
        if changed:
            yield statements.update_holds(changed)
        if new:
            yield statements.insert(table, new)
            stored.update(row.id for row in new)

    # -- loading -------------------------------------------------------------------------------------------

    async def _fetch(self, pairs: Sequence[tuple[Statement, Sink]], first: Sequence[Statement] = ()) -> None:
        """Make a trip, and give the rows of each statement to its sink, in order; *first* goes before them."""
        found = await self._trip([*first, *(statement for statement, _ in pairs)])
        for (_, sink), rows in zip(pairs, found[len(first) :], strict=True):
            sink(rows)

    async def _load_later(self, *pairs: tuple[Statement, Sink]) -> None:
        """
        Load what only now is known to be needed.

        What the batch has changed so far is written first, so that what comes is as new as what is here.
        """
        await self._fetch(pairs, self.changes())

    def _into(self, table: str, state: State | None = None) -> Sink:
        """A sink that takes rows into the state."""
        target, rows = self._state if state is None else state, MAPS[table]

        def take(found: list[tuple[Any, ...]]) -> None:
            changes: list[Change] = [(table, rows.place(row), row) for row in map(rows.decode, found)]
            target.apply(changes)
            if table == Table.HOLD:
                self._stored.update([row.id for _, _, row in changes])

        return take

    async def _load_wanted(self, wants: Wants, first: Sequence[Statement]) -> None:
        def time_is(found: list[tuple[Any, ...]]) -> None:
            ((self._now,),) = found

        last = [] if self._clock is not None else [(self._loads.time(), time_is)]
        await self._load_locked(self._state, wants, first, last)
        if self._clock is not None:
            self._now = self._clock()
        await self._follow(self._state)

    async def _load_locked(
        self, state: State, wants: Wants, first: Sequence[Statement], last: Sequence[tuple[Statement, Sink]] = ()
    ) -> None:
        """Lock and load what *wants* names, in one trip."""
        seen: set[str] = set()

        def locked(found: list[tuple[Any, ...]]) -> None:
            seen.update([hold_id for hold_id, _ in found])

        since = None if self._clock is None else self._clock()
        pairs: list[tuple[Statement, Sink]] = [(self._loads.lock(wants), locked)] if wants.holds or wants.locks else []
        pairs.extend((statement, self._into(table, state)) for statement, table in self._loads.wanted(wants, since))
        await self._fetch([*pairs, *last], first)
        self._locked |= wants.accounts
        for hold_id in wants.holds:
            hold = state.holds.get(hold_id)
            if hold is not None:
                key = (hold.payer, hold.unit)
                if hold_id not in seen and key not in self._locked:
                    raise MovedError
                self._locked.add(key)

    async def _follow(self, state: State) -> None:
        """
        Load the keys that wait for the end of calls in *state*, and the holds that charge keys own.

        Few calls have such keys; theirs are two trips more.
        """
        followed: set[tuple[str, str]] = set()
        while True:
            wants = Wants()
            for hold in state.holds.values():
                if hold.idempotency_key:
                    wants.plain(Table.IDEMPOTENCY, [hold.idempotency_key])
                if hold.charge_key:
                    wants.plain(Table.CHARGE_KEY, [hold.charge_key])
                    wants.holds.add(hold_of_key(hold.id))
            wants.holds.update(row.hold for row in state.charge_keys.values())
            wants.texts[Table.CHARGE_KEY] -= state.charge_keys.keys()
            wants.texts[Table.IDEMPOTENCY] -= state.idempotency_keys.keys()
            news = {(Table.HOLD, key) for key in wants.holds}
            news |= {(table, key) for table, keys in wants.texts.items() for key in keys}
            if news <= followed:
                return
            followed |= news
            await self._load_locked(state, wants, self.changes())

    # -- what is needed at an operation's turn -------------------------------------------------------------

    async def _prepare(self, operation: Operation) -> None:
        prepare = _PREPARE.get(type(operation))
        if prepare is not None:
            await prepare(self, operation)

    async def _prepare_admit(self, ask: Admit) -> None:
        await self._load_due(paying(ask))

    async def _prepare_preview(self, ask: Preview) -> None:
        await self._prepare_admit(ask.ask)

    async def _load_due(self, keys: Iterable[AccountKey]) -> None:
        """Of accounts that are taken from, the calls that are overdue at the latest time that any of them has seen."""
        accounts = [account for account in map(self._state.accounts.get, keys) if account is not None]
        now = max([self._now, *(account.seen_at for account in accounts)])
        due = [(account.payer, account.unit) for account in accounts if account.next_due_at <= now]
        if due:
            await self._load_overdue(self._state, due, now, OVERDUE_PER_ADMISSION)

    async def _prepare_end(self, ask: End) -> None:
        hold = self._state.holds.get(ask.id)
        first = None if hold is None else hold.receipt
        if hold is not None and first is not None and (ask.amount or 0) < first.amount:
            # A late end that gives back, unless a refund has done so.
            key = (hold.payer, hold.unit)
            await self._load_lines(key, hold.id)
            await self._load_paid(key, first.parts, first.amount)

    async def _prepare_grow(self, ask: Grow) -> None:
        hold = self._state.holds.get(ask.id)
        if hold is None:
            return
        await self._load_due([(hold.payer, hold.unit)])
        names = [source for source in ask.sources if isinstance(source, AllowanceSource)]
        if names:
            owner, windows = (hold.payer, hold.unit), self._into(Table.ALLOWANCE)
            pinned = {(*owner, source.name, start) for source in names for start in source.boundaries[:-1]}
            rolling = {(*owner, source.name) for source in names if not source.boundaries}
            await self._load_later(
                (self._loads.windows(pinned, ()), windows),
                (self._loads.rolling(rolling), windows),
            )

    async def _prepare_reversal(self, ask: ReverseGrant) -> None:
        await self._load_lines((ask.payer, ask.unit), ask.grant)

    async def _prepare_posting(self, ask: Correct | Backfill) -> None:
        key = (ask.payer, ask.unit)
        await self._load_lines(key, ask.id)
        if ask.amount < 0:
            await self._load_paid(key, (Part(Source.DEBT, "", 0.0, ask.amount),), -ask.amount)

    async def _prepare_refund(self, ask: Refund) -> None:
        """The lines of the charge, and where its parts go back to."""
        key = (ask.payer, ask.unit)
        lines = await self._load_lines(key, ask.call)
        parts = [part for line in lines for part in line.parts if part.amount > 0]
        await self._load_paid(key, parts, sum(part.amount for part in parts))

    async def _load_lines(self, key: AccountKey, ref: str) -> list[Entry]:
        """The ledger lines about *ref*."""
        found: list[Entry] = []

        def take(rows: list[tuple[Any, ...]]) -> None:
            found.extend(map(MAPS[Table.ENTRY].decode, rows))

        await self._load_later((self._loads.lines_of(key, ref), take))
        self._state.refs[*key, ref] = found
        return found

    async def _load_paid(self, key: AccountKey, parts: Sequence[Part], amount: int) -> None:
        """
        What a charge is given back to: its own grants and windows, and the grants that paid debt since, closed ones
        included.

        A charge without debt needs the latter too: another charge's paid debt may have been given back to its grant.
        """
        grants = {(*key, part.name) for part in parts if part.source is Source.GRANT}
        windows = {(*key, part.name, part.start) for part in parts if part.source is Source.ALLOWANCE}
        pairs = [
            (self._loads.grants(grants), self._into(Table.GRANT)),
            (self._loads.windows(windows, ()), self._into(Table.ALLOWANCE)),
        ]
        if any(part.source is not Source.ALLOWANCE for part in parts):
            pairs.append((self._loads.paid_grants(key, amount), self._into(Table.GRANT)))
        await self._load_later(*pairs)

    async def _prepare_claim(self, ask: Claim) -> None:
        """Events that nobody has claimed, the oldest first, and no others."""
        free: list[tuple[Any, ...]] = []
        await self._load_later((self._loads.free_events(self._now, ask.limit), free.extend))
        self._state.events = {event.id: event for event in map(MAPS[Table.EVENT].decode, free)}

    async def _prepare_acknowledge(self, ask: Acknowledge) -> None:
        await self._load_later((self._loads.events(ask.ids), self._into(Table.EVENT)))

    async def _load_overdue(
        self, state: State, keys: Sequence[AccountKey], now: float, limit: int
    ) -> dict[AccountKey, list[Hold]]:
        """
        Of each account the *limit* holds that the policy looks at first, and what says when it must look next: the
        first overdue hold behind them, and the first hold that is not overdue; and all that ending them moves.
        """
        overdue: dict[AccountKey, list[Hold]] = {key: [] for key in keys}
        take = self._into(Table.HOLD, state)

        def found(rows: list[tuple[Any, ...]]) -> None:
            take(rows)
            for hold in map(MAPS[Table.HOLD].decode, rows):
                overdue[hold.payer, hold.unit].append(hold)

        loads, into = self._loads, self._into
        await self._load_later(
            (loads.books(keys), into(Table.ACCOUNT, state)),
            (loads.open_grants(keys, ()), into(Table.GRANT, state)),
            (loads.overdue_holds(keys, now, limit + 1), found),
            (loads.overdue_windows(keys, now, limit + 1), into(Table.ALLOWANCE, state)),
            (loads.next_holds(keys, now), take),
        )
        await self._follow(state)
        return overdue

    # -- sweeping ------------------------------------------------------------------------------------------

    async def _lock_for_sweeps(
        self, operations: Sequence[Operation], wants: Wants, first: Sequence[Statement]
    ) -> Sequence[Statement]:
        """Find the accounts that the batch's sweeps will touch, so that they are locked with all others, in order."""
        sweeps = [operation for operation in operations if isinstance(operation, Sweep)]
        if not sweeps:
            return first
        since = None if self._clock is None else self._clock()

        def take(rows: list[tuple[Any, ...]]) -> None:
            self._locked.update([(payer, unit) for payer, unit in rows])

        await self._fetch([(self._loads.swept_accounts(sweep, since, SWEPT_ACCOUNTS), take) for sweep in sweeps], first)
        wants.others.update(map(account_lock, self._locked))
        return ()

    async def _sweep(self, ask: Sweep) -> Answer:
        """
        Sweep a state that has exactly what the sweep has to look at.

        What another process has added to accounts that are not locked here is left to the next sweep.
        """
        state, now, loads = State(), self._now, self._loads
        found: list[AccountKey] = []
        await self._load_later(
            (loads.overdue_accounts(now), lambda rows: found.extend([(payer, unit) for payer, unit in rows]))
        )
        due = [key for key in found if key in self._locked]
        left = ask.limit
        while due and left > 0:
            keys, due = due[:ACCOUNTS_AT_ONCE], due[ACCOUNTS_AT_ONCE:]
            for key, holds in (await self._load_overdue(state, keys, now, left)).items():
                at = clamped(state, key, now)
                changing = [hold for hold in holds[:left] if hold.due_at <= at or hold.state is HoldState.HELD]
                left -= len(changing)
        await self._load_old(state, ask)
        written: list[Change] = []
        answer = run(state, ask, now, written)
        self._state.apply([change for change in written if change[0] != Table.ENTRY])
        self._remember(written)
        return answer

    async def _load_old(self, state: State, ask: Sweep) -> None:
        """What may be forgotten, at most as many of each kind as the sweep may take."""
        loads, into = self._loads, self._into
        accounts: list[AccountKey] = []

        def mine(table: str) -> Sink:
            """What belongs to accounts that are locked."""
            take, decode = into(table, state), MAPS[table].decode

            def filtered(rows: list[tuple[Any, ...]]) -> None:
                take([row for row in rows if (decode(row).payer, decode(row).unit) in self._locked])

            return filtered

        def guarded(table: str) -> Sink:
            """What may be used again meanwhile."""
            take, known, guard = into(table, state), MAPS[table], _GUARDS[table]

            def noted(rows: list[tuple[Any, ...]]) -> None:
                take(rows)
                for row in map(known.decode, rows):
                    self._bounds[table, known.place(row)] = getattr(row, guard)

            return noted

        await self._load_later(
            (loads.old_holds(self._now, ask), mine(Table.HOLD)),
            (loads.past_windows(self._now, ask), mine(Table.ALLOWANCE)),
            (loads.delivered_events(self._now, ask), into(Table.EVENT, state)),
            *((loads.past(table, self._now, ask), guarded(table)) for table in _GUARDS),
            (loads.old_accounts(self._now, ask), lambda rows: accounts.extend([(one, two) for one, two in rows])),
        )
        old = [key for key in accounts if key in self._locked]
        if old:
            await self._load_later(
                (loads.checkpoints(old), into(Table.CHECKPOINT, state)),
                (loads.oldest_lines(old, ask.limit + 1), into(Table.ENTRY, state)),
            )


_PREPARE: Final[Mapping[type, Callable[[WorkingCopy, Any], Awaitable[None]]]] = {
    Admit: WorkingCopy._prepare_admit,
    Preview: WorkingCopy._prepare_preview,
    End: WorkingCopy._prepare_end,
    Grow: WorkingCopy._prepare_grow,
    ReverseGrant: WorkingCopy._prepare_reversal,
    Correct: WorkingCopy._prepare_posting,
    Backfill: WorkingCopy._prepare_posting,
    Refund: WorkingCopy._prepare_refund,
    Claim: WorkingCopy._prepare_claim,
    Acknowledge: WorkingCopy._prepare_acknowledge,
}

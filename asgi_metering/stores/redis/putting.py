"""
Putting: rows as another store kept them, each written if it is absent, as a transaction's changes.

Knows where what tells of a row is kept; writing is the working copy's, as for every other change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from asgi_metering.errors import UnwritableError
from asgi_metering.receipts import Entry
from asgi_metering.rules.state import AccountKey, Change, State, Table
from asgi_metering.stores.redis.names import Names, escaped
from asgi_metering.stores.redis.working_copy import WorkingCopy
from asgi_metering.stores.rows import MAPS

__all__ = ["put"]


async def put(table: str, rows: Sequence[Any], copy: WorkingCopy) -> tuple[int, list[Change]]:
    """
    Look at what is kept of *rows* of one table, and write the others. Returns how many, and what is to be written.

    Raises:
        UnwritableError: One of them has no place without another row, which did not come before it.
    """
    await _look(table, rows, copy)
    place_of, changes = MAPS[table].place, []
    last = {key: lines[-1].number for key, lines in copy.state.entries.items() if lines}
    for row in rows:
        place = place_of(row)
        if table == Table.ENTRY:
            if not _follows(row, last, copy.state):
                continue
        elif _is_kept(copy.state, table, place, row):
            continue
        change: Change = (table, place, row)
        if table == Table.CHECKPOINT:
            copy.folded[place] = []
        copy.state.apply([change])
        changes.append(change)
    return len(changes), changes


async def _look(table: str, rows: Sequence[Any], copy: WorkingCopy) -> None:
    """Load what tells whether *rows* are kept, and what writing them changes."""
    names = copy.names
    match table:
        case Table.GRANT:
            accounts = {(row.payer, row.unit): names.account(row.payer, row.unit) for row in rows}
            await copy.rows(accounts.values())
            closed = {key: names.of_account("G", name) for key, name in accounts.items()}
            await copy.read(*[("HGET", closed[row.payer, row.unit], escaped(row.id)) for row in rows])
            for row in rows:
                await copy.grant((row.payer, row.unit), row.id)
        case Table.ENTRY:
            accounts = {(row.payer, row.unit): names.account(row.payer, row.unit) for row in rows}
            await copy.rows(names.of_account("p", name) for name in accounts.values())
            lists = [("LINDEX", names.of_account("e", name), "-1") for name in accounts.values()]
            for key, line in zip(accounts, await copy.read(*lists), strict=True):
                copy.take_lines(key, () if line is None else (line,))
        case Table.EVENT:
            await copy.read(*[("HGET", names.events, escaped(row.id)) for row in rows])
            for row in rows:
                await copy.event(row.id)
        case Table.READING:
            await copy.readings(names.reading(row.series, row.part) for row in rows)
        case Table.LEASE:
            scores = [("ZSCORE", names.pool(row.pool), escaped(row.id)) for row in rows]
            for row, score in zip(rows, await copy.read(*scores), strict=True):
                if score is not None:
                    copy.take_leases(names.pool(row.pool), (escaped(row.id).encode(), score))
        case Table.ALLOWANCE:
            buckets = [names.bucket(row.payer, row.unit, row.name) for row in rows]
            await copy.rows([*buckets, *(names.window(row.payer, row.unit, row.name, row.start) for row in rows)])
        case _:
            name_of = _NAMED[table]
            await copy.rows(name_of(names, row) for row in rows)


_NAMED: Mapping[str, Callable[[Names, Any], str]] = {
    Table.UNIT: lambda names, row: names.unit(row.name),
    Table.HOLD: lambda names, row: names.hold(row.id),
    Table.ACCOUNT: lambda names, row: names.account(row.payer, row.unit),
    Table.CHECKPOINT: lambda names, row: names.of_account("p", names.account(row.payer, row.unit)),
    Table.CHARGE_KEY: lambda names, row: names.charge_key(row.key),
    Table.IDEMPOTENCY: lambda names, row: names.idempotency(row.key),
    Table.COUNTER: lambda names, row: names.counter(row.key),
}


def _is_kept(state: State, table: str, place: Any, row: Any) -> bool:
    if table == Table.GRANT:
        if state.grant(place, row.id) is not None:
            return True
        if row.is_open and place not in state.accounts:
            raise UnwritableError(
                f"The grant {row.id!r} of {row.payer!r} in {row.unit!r} cannot be kept on Redis: it came without its "
                f"account. Mend it where it comes from."
            )
        return False
    if table == Table.LEASE:
        return row.id in state.leases.get(row.pool, {})
    return place in getattr(state, _PLACES[table])


_PLACES: Mapping[str, str] = {
    Table.UNIT: "units",
    Table.HOLD: "holds",
    Table.ACCOUNT: "accounts",
    Table.CHECKPOINT: "checkpoints",
    Table.ALLOWANCE: "allowances",
    Table.CHARGE_KEY: "charge_keys",
    Table.IDEMPOTENCY: "idempotency_keys",
    Table.COUNTER: "counters",
    Table.EVENT: "events",
    Table.READING: "readings",
}


def _follows(row: Entry, last: dict[AccountKey, int], state: State) -> bool:
    """Whether a ledger line is the next of its account; it is kept if it is none behind that."""
    key = (row.payer, row.unit)
    checkpoint = state.checkpoints.get(key)
    before = last.get(key, 0 if checkpoint is None else checkpoint.number)
    if row.number > before + 1:
        raise UnwritableError(
            f"Line {row.number} of {row.payer!r} in {row.unit!r} cannot be kept on Redis: the last one is {before}, "
            f"and lines are found by their number. Mend it where it comes from."
        )
    last[key] = max(before, row.number)
    return row.number > before

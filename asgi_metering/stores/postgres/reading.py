"""Reading: the contract's queries as statements. Changes nothing, and decodes no more rows than it returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from asgi_metering.rules.state import State, Table
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
from asgi_metering.stores.postgres.link import Statement
from asgi_metering.stores.postgres.loads import Loads
from asgi_metering.stores.rows import MAPS

__all__ = ["Reading"]

_OF_ACCOUNT = "WHERE t.payer = $1::text AND t.unit = $2::text"

_IN_ORDER = {
    Table.HOLD: "ORDER BY t.position",
    Table.EVENT: "ORDER BY t.position",
    Table.GRANT: "ORDER BY t.number",
    Table.ENTRY: "ORDER BY t.payer, t.unit, t.number",
}


class Reading:
    """
    The queries of one schema.

    Args:
        loads: The statements of that schema.
    """

    def __init__(self, loads: Loads) -> None:
        self._select = loads.statements.select

    def statements(self, query: Query) -> list[Statement]:
        """What to ask, to answer *query*."""
        return [self._select(table, rest, *values) for table, rest, values in _asked(query)]

    def state(self, query: Query, found: Sequence[list[tuple[Any, ...]]]) -> State:
        """What was *found*, as a state that holds exactly what *query* asked for (see `contract`)."""
        state = State()
        if isinstance(query, AccountRows):
            key = (query.payer, query.unit)
            state.grants[key], state.closed_grants[key], state.live[key] = {}, {}, set()
        elif isinstance(query, EntriesAfter | LinesOf):
            state.entries[query.payer, query.unit] = []
        if isinstance(query, HoldRow | LiveHolds):
            state.holds = {hold.id: hold for hold in map(MAPS[Table.HOLD].decode, found[0])}
            return state
        for (table, _, _), rows in zip(_asked(query), found, strict=True):
            known = MAPS[table]
            state.apply([(table, known.place(row), row) for row in map(known.decode, rows)])
        return state


def _asked(query: Query) -> list[tuple[str, str, tuple[str, ...]]]:
    """For each table that is looked at: which rows of it, in which order."""
    match query:
        case AccountRows(payer, unit):
            return [
                (Table.ACCOUNT, _OF_ACCOUNT, (payer, unit)),
                (Table.GRANT, f"{_OF_ACCOUNT} ORDER BY t.number", (payer, unit)),
                (Table.HOLD, f"{_OF_ACCOUNT} AND t.receipt IS NULL ORDER BY t.position", (payer, unit)),
                (Table.ALLOWANCE, f"{_OF_ACCOUNT} ORDER BY t.name, t.start", (payer, unit)),
                (Table.CHECKPOINT, _OF_ACCOUNT, (payer, unit)),
            ]
        case AccountsAfter(payer, unit, limit):
            rest = "WHERE (t.payer, t.unit) > ($1::text, $2::text) ORDER BY t.payer, t.unit LIMIT $3::bigint"
            return [(Table.ACCOUNT, rest, (payer, unit, str(limit)))]
        case EntriesAfter(payer, unit, number, limit):
            rest = f"{_OF_ACCOUNT} AND t.number > $3::bigint ORDER BY t.number LIMIT $4::bigint"
            return [(Table.ENTRY, rest, (payer, unit, str(number), str(limit)))]
        case LinesOf(payer, unit, ref):
            return [(Table.ENTRY, f"{_OF_ACCOUNT} AND t.ref = $3::text ORDER BY t.number", (payer, unit, ref))]
        case HoldRow(hold_id):
            return [(Table.HOLD, "WHERE t.id = $1::text", (hold_id,))]
        case LiveHolds(limit):
            return [(Table.HOLD, "WHERE t.receipt IS NULL ORDER BY t.position LIMIT $1::bigint", (str(limit),))]
        case PendingEvents(limit):
            rest = "WHERE t.acknowledged_at IS NULL ORDER BY t.position LIMIT $1::bigint"
            return [(Table.EVENT, rest, (str(limit),))]
        case ReadingsKept():
            return [(Table.READING, "", ())]
    return [(table, _IN_ORDER.get(table, ""), ()) for table in MAPS]

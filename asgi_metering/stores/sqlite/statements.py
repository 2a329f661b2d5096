"""
The statements that one row at a time is read and written with, built from the row maps.

What looks for rows by anything but their key stands where it is used. Knows table and column names, and no rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from asgi_metering.rules.state import Grant, Table
from asgi_metering.stores.rows import MAPS, RowMap

__all__ = [
    "DELETE",
    "EVENT_TIMES",
    "INSERT",
    "INSERT_ABSENT",
    "LINES_OF",
    "ROWS",
    "SELECT",
    "UPDATE_GRANT",
    "UPDATE_HOLD",
    "UPSERT",
    "select",
]


ROWS: Mapping[str, RowMap[Any]] = {
    **MAPS,
    Table.GRANT: RowMap[Any](
        Table.GRANT,
        Grant,
        MAPS[Table.GRANT].key,
        {"open": attrgetter("is_open")},
        ("expires_at", "settled", "held", "expired", "begun", "reversed"),
    ),
}
"""The row maps as this store's tables have them."""

_TAKE_NEW = '"{0}" = excluded."{0}"'


def _quoted(names: tuple[str, ...], form: str = '"{}"', between: str = ", ") -> str:
    return between.join(form.format(name) for name in names)


def select(table: str, rest: str) -> str:
    """A query for whole rows of *table*, in the order of their fields; *rest* is everything behind the name."""
    return f'SELECT {_quoted(ROWS[table].fields)} FROM "{table}" {rest}'  # noqa: S608 -- names of our own


def _where(names: tuple[str, ...]) -> str:
    return "WHERE " + _quoted(names, '"{}" = ?', " AND ")


def _by_key(rows: RowMap[Any]) -> str:
    return _where(rows.key)


def _update(rows: RowMap[Any], *kept: str) -> str:
    """Write what may change of one row, where those named last of that are *kept* as they are."""
    changes = _quoted(tuple(name for name in rows.changing if name not in kept), '"{}" = ?')
    return f'UPDATE "{rows.table}" SET {changes} {_where((*kept, *rows.key))}'  # noqa: S608


def _upsert(rows: RowMap[Any]) -> str:
    # An update keeps the row's position: what came first stays first.
    rest = tuple(name for name in rows.columns if name not in rows.key)
    return (
        f'INSERT INTO "{rows.table}" ({_quoted(rows.columns)}) VALUES ({_quoted(rows.columns, "?")}) '  # noqa: S608
        f"ON CONFLICT ({_quoted(rows.key)}) DO UPDATE SET {_quoted(rest, _TAKE_NEW)}"
        # What was delivered stays as it is.
        + (" WHERE acknowledged_at IS NULL" if rows.table == Table.EVENT else "")
    )


SELECT = {table: select(table, _by_key(rows)) for table, rows in ROWS.items()}
"""One row by its key."""

LINES_OF = select(Table.ENTRY, "INDEXED BY entry_ref WHERE payer = ? AND unit = ? AND ref = ? ORDER BY number")
"""The ledger lines about one call, grant or posting, oldest first."""

EVENT_TIMES = "SELECT id, at, '{}', claimed_until, acknowledged_at FROM event"
"""Events without what they say: the rules look at their times alone."""

DELETE = {table: f'DELETE FROM "{table}" {_by_key(rows)}' for table, rows in ROWS.items()}  # noqa: S608
"""One row by its key."""

UPSERT = {table: _upsert(rows) for table, rows in ROWS.items() if table != Table.ENTRY}
"""Write one row, new or changed."""

INSERT_ABSENT = {
    table: f"{_upsert(rows).partition(' ON CONFLICT')[0]} ON CONFLICT ({_quoted(rows.key)}) DO NOTHING"
    for table, rows in ROWS.items()
}
"""Write one row as it is, unless there is one of its key."""

UPDATE_HOLD = _update(ROWS[Table.HOLD])
"""What may change of a hold that is stored."""

UPDATE_GRANT = _update(ROWS[Table.GRANT], "open")
"""What may change of a grant that is stored and stays open, or closed; nothing is done to another."""

INSERT = {table: _upsert(ROWS[table]).partition(" ON CONFLICT")[0] for table in (Table.HOLD, Table.ENTRY)}
"""Write a row that is new: a second one of its key is an error, never a change."""

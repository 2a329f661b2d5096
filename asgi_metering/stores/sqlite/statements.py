"""
The statements that one row at a time is read and written with, built from the row maps.

What looks for rows by anything but their key stands where it is used. Knows table and column names, and no rule.
"""

from __future__ import annotations

from typing import Any

from asgi_metering.rules.state import Table
from asgi_metering.stores.rows import MAPS, RowMap

__all__ = ["DELETE", "INSERT_ABSENT", "INSERT_ENTRY", "LINES_OF", "SELECT", "UPDATE_HOLD", "UPSERT", "select"]


_TAKE_NEW = '"{0}" = excluded."{0}"'


def _quoted(names: tuple[str, ...], form: str = '"{}"', between: str = ", ") -> str:
    return between.join(form.format(name) for name in names)


def select(table: str, rest: str) -> str:
    """A query for whole rows of *table*, in the order of their fields; *rest* is everything behind the name."""
    return f'SELECT {_quoted(MAPS[table].fields)} FROM "{table}" {rest}'  # noqa: S608 -- names of our own


def _by_key(rows: RowMap[Any]) -> str:
    return "WHERE " + _quoted(rows.key, '"{}" = ?', " AND ")


def _update(rows: RowMap[Any]) -> str:
    changes = _quoted(rows.changing, '"{}" = ?')
    return f'UPDATE "{rows.table}" SET {changes} {_by_key(rows)}'  # noqa: S608


def _upsert(rows: RowMap[Any]) -> str:
    # An update keeps the row's position: what came first stays first.
    rest = tuple(name for name in rows.columns if name not in rows.key)
    return (
        f'INSERT INTO "{rows.table}" ({_quoted(rows.columns)}) VALUES ({_quoted(rows.columns, "?")}) '  # noqa: S608
        f"ON CONFLICT ({_quoted(rows.key)}) DO UPDATE SET {_quoted(rest, _TAKE_NEW)}"
        # What was delivered stays as it is.
        + (" WHERE acknowledged_at IS NULL" if rows.table == Table.EVENT else "")
    )


SELECT = {table: select(table, _by_key(rows)) for table, rows in MAPS.items()}
"""One row by its key."""

LINES_OF = select(Table.ENTRY, "INDEXED BY entry_ref WHERE payer = ? AND unit = ? AND ref = ? ORDER BY number")
"""The ledger lines about one call, grant or posting, oldest first."""

DELETE = {table: f'DELETE FROM "{table}" {_by_key(rows)}' for table, rows in MAPS.items()}  # noqa: S608
"""One row by its key."""

UPSERT = {table: _upsert(rows) for table, rows in MAPS.items() if table != Table.ENTRY}
"""Write one row, new or changed."""

INSERT_ABSENT = {
    table: f"{_upsert(rows).partition(' ON CONFLICT')[0]} ON CONFLICT ({_quoted(rows.key)}) DO NOTHING"
    for table, rows in MAPS.items()
}
"""Write one row as it is, unless there is one of its key."""

UPDATE_HOLD = _update(MAPS[Table.HOLD])
"""What may change of a hold that is stored."""

INSERT_ENTRY = _upsert(MAPS[Table.ENTRY]).partition(" ON CONFLICT")[0]
"""Write a ledger line. It is always new: a second one of its number is an error, never a change."""

"""
The statements that one row at a time is read and written with, built from the row maps.

What looks for rows by anything but their key stands where it is used. Knows table and column names, and no rule.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import chain
from operator import attrgetter
from typing import Any

from asgi_metering.rules.state import Grant, Table
from asgi_metering.stores.rows import MAPS, RowMap
from asgi_metering.stores.sqlite.packing import EntryRows, HoldRows

__all__ = [
    "DELETE",
    "END_HOLD",
    "EVENT_TIMES",
    "GRANT_SUMS",
    "INSERT",
    "INSERT_ABSENT",
    "LINES_OF",
    "NEW_EVENT",
    "NEW_HOLD",
    "ROWS",
    "SELECT",
    "UPDATE_HOLD",
    "UPSERT",
    "put",
    "select",
]


ROWS: Mapping[str, RowMap[Any]] = {
    **MAPS,
    Table.GRANT: RowMap[Any](
        Table.GRANT,
        Grant,
        MAPS[Table.GRANT].key,
        {"open": attrgetter("is_open")},
    ),
    Table.HOLD: HoldRows(),
    Table.ENTRY: EntryRows(),
}
"""The row maps as this store's tables have them."""

_TAKE_NEW = '"{0}" = excluded."{0}"'


def _quoted(names: tuple[str, ...], form: str = '"{}"', between: str = ", ") -> str:
    return between.join(form.format(name) for name in names)


def select(table: str, rest: str) -> str:
    """A query for whole rows of *table*, in the order of their fields; *rest* is everything behind the name."""
    return f'SELECT {_quoted(ROWS[table].fields)} FROM "{table}" {rest}'  # noqa: S608 -- names of our own


def _by_key(rows: RowMap[Any]) -> str:
    return "WHERE " + _quoted(rows.key, '"{}" = ?', " AND ")


def _update(rows: RowMap[Any]) -> str:
    """Write what may change of one row."""
    changes = _quoted(rows.changing, '"{}" = ?')
    return f'UPDATE "{rows.table}" SET {changes} {_by_key(rows)}'  # noqa: S608


def _insert(table: str, columns: tuple[str, ...]) -> str:
    return f'INSERT INTO "{table}" ({_quoted(columns)}) VALUES ({_quoted(columns, "?")})'  # noqa: S608


def _upsert(rows: RowMap[Any], left_out: tuple[str, ...] = ()) -> str:
    """Write a row; the columns *left_out* get what they have by default."""
    # An update keeps the row's position: what came first stays first.
    rest = tuple(name for name in rows.columns if name not in rows.key)
    return (
        _insert(rows.table, tuple(name for name in rows.columns if name not in left_out)) + " "
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

GRANT_SUMS = 'UPDATE "grant" SET settled = ?, held = ?, expired = ? WHERE payer = ? AND unit = ? AND id = ?'
"""What a call changes of a grant that is stored as open, and stays so."""

INSERT = {table: _insert(table, ROWS[table].columns) for table in (Table.HOLD, Table.ENTRY)}
"""Write a row that is new: a second one of its key is an error, never a change."""

END_HOLD = "UPDATE hold SET state = ?, receipt = ?, ended_at = ? WHERE id = ?"
"""What an end changes of a hold of which it changes nothing else."""

NEW_HOLD = _insert(
    Table.HOLD,
    tuple(name for name in ROWS[Table.HOLD].columns if name not in ("state", "observed", "receipt", "ended_at")),
)
"""Write a hold that was just admitted."""

NEW_EVENT = _upsert(ROWS[Table.EVENT], ("claimed_until", "acknowledged_at"))
"""Write an event that nobody has claimed yet."""

TOGETHER = (32, 8)
"""
Rows that one statement writes: for 32 it takes about half of what it takes for each alone, and is prepared once.

What is left over goes one by one, so that there are few statements to keep prepared.
"""


@cache
def _together(statement: str) -> tuple[tuple[int, str], ...]:
    """*statement*, which writes one row, for so many at once."""
    head, values, rest = statement.partition("VALUES ")
    row, end, tail = rest.partition(")")
    return tuple((count, f"{head}{values}{', '.join([row + end] * count)}{tail}") for count in TOGETHER)


def put(connection: sqlite3.Connection, statement: str, rows: Sequence[Sequence[Any]]) -> None:
    """Run a *statement* that writes one row, for all of *rows*, in few steps."""
    done = 0
    for count, several in _together(statement):
        while len(rows) - done >= count:
            connection.execute(several, tuple(chain.from_iterable(rows[done : done + count])))
            done += count
    if done < len(rows):
        connection.executemany(statement, rows[done:] if done else rows)

"""
The statements that rows are looked up and written with, built from the row maps for one schema.

All of them take arrays, one for each column, so that a batch needs one statement for a table, however many rows it
touches. Knows table and column names, and no rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, get_type_hints

from asgi_metering.receipts import Source
from asgi_metering.rules.state import Event, Hold, Table
from asgi_metering.stores.postgres.link import Statement
from asgi_metering.stores.rows import MAPS, RowMap, without_none

__all__ = ["Statements", "array", "quoted"]

_TYPES: Final[Mapping[type, str]] = {int: "bigint", float: "float8", bool: "boolean"}
"""Everything else is text."""

_BETWEEN: Final = "\0"
"""Between the texts of an array while it is made: no text that PostgreSQL can keep has it."""


class _Column(NamedTuple):
    """A column that PostgreSQL looks rows up by, computed from the row."""

    name: str
    type: str
    derive: Callable[[Any], Any]


def _names(hold: Hold) -> str:
    return array("text", [part.name for part in hold.parts if part.source is Source.ALLOWANCE])


def _starts(hold: Hold) -> str:
    return array("float8", [part.start for part in hold.parts if part.source is Source.ALLOWANCE])


def _counter_keys(hold: Hold) -> str:
    return array("text", [window.key for window in hold.windows])


_FURTHER: Final[Mapping[str, tuple[_Column, ...]]] = {
    Table.GRANT: (_Column("is_open", "boolean", lambda grant: grant.is_open),),
    Table.HOLD: (
        _Column("counter_keys", "text[]", _counter_keys),
        _Column("allowance_names", "text[]", _names),
        _Column("allowance_starts", "float8[]", _starts),
    ),
}


def quoted(name: str) -> str:
    """*name* as an identifier."""
    return '"' + name.replace('"', '""') + '"'


def array(kind: str, values: Sequence[Any]) -> str:
    """
    *values* as the text of an array.

    Raises:
        ValueError: A text has a NUL character, which PostgreSQL cannot keep.
    """
    if kind not in ("text", "text[]", "float8[]"):
        return "{" + ",".join(["NULL" if value is None else str(value) for value in values]) + "}"
    if None in values:
        return "{" + ",".join(["NULL" if value is None else _text(value) for value in values]) + "}"
    if not values:
        return "{}"
    joined = _BETWEEN.join(values)
    if joined.count(_BETWEEN) != len(values) - 1:
        raise ValueError(_nul(values))
    if '"' in joined or "\\" in joined:
        joined = _escaped(joined)
    return '{"' + joined.replace(_BETWEEN, '","') + '"}'


def _text(value: str) -> str:
    if _BETWEEN in value:
        raise ValueError(_nul([value]))
    return '"' + _escaped(value) + '"'


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def _nul(values: Iterable[str]) -> str:
    guilty = next(value for value in values if _BETWEEN in value)
    return f"{guilty!r} has a NUL character, which PostgreSQL cannot keep. Take it out."


class _Rows:
    """How rows of one kind are written: their columns, and the type of each."""

    def __init__(self, rows: RowMap[Any]) -> None:
        hints = get_type_hints(rows.row)
        derived = rows.columns[len(rows.fields) :]
        self.map = rows
        self.further = _FURTHER.get(rows.table, ())
        self.types = {name: _TYPES.get(without_none(hints[name]), "text") for name in rows.fields}
        # What the maps derive are times.
        self.types.update(dict.fromkeys(derived, "float8"))
        self.types.update({column.name: column.type for column in self.further})

    def changed(self, names: Sequence[str], rows: Sequence[Any]) -> tuple[str, ...]:
        """One array for each of *names*: what may change of *rows*, their keys, then what is further."""
        encode = self.map.encode_change
        encoded = [[*encode(row), *(column.derive(row) for column in self.further)] for row in rows]
        return tuple(
            [array(self.types[name], column) for name, column in zip(names, zip(*encoded, strict=True), strict=True)]
        )

    def values(self, names: Sequence[str], rows: Iterable[Any]) -> tuple[str, ...]:
        """One array for each of the columns *names* of *rows*."""
        encode, further = self.map.encode, self.further
        if further:
            encoded = [[*encode(row), *(column.derive(row) for column in further)] for row in rows]
        else:
            encoded = [encode(row) for row in rows]
        columns = dict(zip(self.types, zip(*encoded, strict=True), strict=True))
        return tuple([array(self.types[name], columns[name]) for name in names])


_ROWS: Final[Mapping[str, _Rows]] = {table: _Rows(rows) for table, rows in MAPS.items()}


class Statements:
    """
    The statements for one schema.

    Args:
        schema: Its name.
    """

    def __init__(self, schema: str) -> None:
        self._schema = quoted(schema)
        self._insert = {table: self._insert_of(table) for table in MAPS}
        self._update_hold = self._update_of(Table.HOLD)

    def table(self, table: str) -> str:
        """The table's full name."""
        return f"{self._schema}.{quoted(table)}"

    def fields(self, table: str, alias: str = "t") -> str:
        """The columns that are a row of *table*, in its order."""
        return ", ".join(f"{alias}.{quoted(name)}" for name in MAPS[table].fields)

    def select(self, table: str, rest: str, *values: str | None) -> Statement:
        """Whole rows of *table*, which *rest* calls ``t``; it says everything behind the name."""
        return Statement(f"SELECT {self.fields(table)} FROM {self.table(table)} t {rest}", values)  # noqa: S608

    # -- writing -------------------------------------------------------------------------------------------

    def insert(self, table: str, rows: Sequence[Any]) -> Statement:
        """Write *rows*, new or changed. A hold and a ledger line are always new: a second one is an error."""
        text, names = self._insert[table]
        return Statement(text, _ROWS[table].values(names, rows))

    def insert_absent(self, table: str, rows: Sequence[Any]) -> Statement:
        """Write *rows* as they are, each unless there is one of its key; a row comes back for each that was written."""
        text, names = self._insert[table]
        keep = f"{text.partition(' ON CONFLICT')[0]} ON CONFLICT ({', '.join(map(quoted, MAPS[table].key))}) DO NOTHING"
        return Statement(f"{keep} RETURNING true", _ROWS[table].values(names, rows))

    def acknowledge(self, rows: Sequence[Event]) -> Statement:
        """Write when events that are stored were acknowledged, and nothing else of them."""
        times = array("float8", [row.acknowledged_at for row in rows])
        text = (
            f"UPDATE {self.table(Table.EVENT)} t SET acknowledged_at = x.at "  # noqa: S608 -- names of our own
            f"FROM {_unnest(['id', 'at'], ['text', 'float8'])} WHERE t.id = x.id AND t.acknowledged_at IS NULL"
        )
        return Statement(text, (array("text", [row.id for row in rows]), times))

    def update_holds(self, rows: Sequence[Hold]) -> Statement:
        """Write what may have changed of holds that are stored."""
        text, names = self._update_hold
        return Statement(text, _ROWS[Table.HOLD].changed(names, rows))

    def delete(
        self, table: str, keys: Sequence[tuple[Any, ...]], guard: tuple[str, Sequence[float]] | None
    ) -> Statement:
        """
        Take rows out, by key.

        Args:
            table: Which.
            keys: Of the rows.
            guard: A column, and for each row how large it may be: what somebody has changed meanwhile stays.
        """
        rows = _ROWS[table]
        names = list(rows.map.key)
        columns = [array(rows.types[name], column) for name, column in zip(names, zip(*keys, strict=True), strict=True)]
        condition = " AND ".join(f"t.{quoted(name)} = x.{quoted(name)}" for name in names)
        if guard is not None:
            column, bounds = guard
            names.append("bound")
            columns.append(array("float8", bounds))
            condition += f" AND t.{quoted(column)} <= x.bound"
        types = [rows.types.get(name, "float8") for name in names]
        text = f"DELETE FROM {self.table(table)} t USING {_unnest(names, types)} WHERE {condition}"  # noqa: S608
        return Statement(text, tuple(columns))

    def _insert_of(self, table: str) -> tuple[str, list[str]]:
        rows = _ROWS[table]
        names = list(rows.types)
        text = (
            f"INSERT INTO {self.table(table)} ({', '.join(map(quoted, names))}) "  # noqa: S608
            f"SELECT {_taken(names, rows.types)} FROM {_unnest(names, [rows.types[name] for name in names])}"
        )
        if table not in (Table.HOLD, Table.ENTRY):
            key = rows.map.key
            changes = ", ".join(f"{quoted(name)} = excluded.{quoted(name)}" for name in names if name not in key)
            text += f" ON CONFLICT ({', '.join(map(quoted, key))}) DO UPDATE SET {changes}"
        if table == Table.EVENT:
            # What was delivered stays as it is.
            text += f" WHERE {quoted(table)}.acknowledged_at IS NULL"
        return text, names

    def _update_of(self, table: str) -> tuple[str, list[str]]:
        rows = _ROWS[table]
        changing = [*rows.map.changing, *(column.name for column in rows.further)]
        names = [*rows.map.changing, *rows.map.key, *(column.name for column in rows.further)]
        changes = ", ".join(f"{quoted(name)} = {_taken([name], rows.types)}" for name in changing)
        keys = " AND ".join(f"t.{quoted(name)} = x.{quoted(name)}" for name in rows.map.key)
        unnest = _unnest(names, [rows.types[name] for name in names])
        return f"UPDATE {self.table(table)} t SET {changes} FROM {unnest} WHERE {keys}", names  # noqa: S608


def _taken(names: Iterable[str], types: Mapping[str, str]) -> str:
    """Columns of the arrays; a column that is an array itself travels as its text."""
    return ", ".join(
        f"x.{quoted(name)}::{types[name]}" if types[name].endswith("[]") else f"x.{quoted(name)}" for name in names
    )


def _unnest(names: Sequence[str], types: Sequence[str]) -> str:
    arrays = ", ".join(
        f"${number}::{'text' if kind.endswith('[]') else kind}[]" for number, kind in enumerate(types, 1)
    )
    return f"unnest({arrays}) AS x({', '.join(map(quoted, names))})"

"""Rows as columns: nothing is lost or changed on the way into a database and back."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgi_metering.receipts import Basis, EndedBy, Entry, EntryKind, Part, Receipt, Source
from asgi_metering.rules.hold import HoldState
from asgi_metering.rules.state import (
    NEVER,
    Account,
    AllowanceWindow,
    ChargeKey,
    Checkpoint,
    Counter,
    DeclaredUnit,
    Event,
    Grant,
    Hold,
    IdempotencyKey,
    Lease,
    PinnedWindow,
    SharedReading,
    Table,
)
from asgi_metering.stores import rows
from asgi_metering.stores.moving.lines import lines_of, page_of
from asgi_metering.stores.moving.walk import Page
from asgi_metering.stores.rows import MAPS
from asgi_metering.stores.sqlite.database import Database
from asgi_metering.stores.sqlite.statements import INSERT, UPSERT, select
from asgi_metering.stores.sqlite.statements import ROWS as KEPT

AMOUNTS = st.integers(-(2**53), 2**53)
TIMES = st.floats(allow_nan=False) | st.just(NEVER)
# Texts that a column might take for a number, among all others.
TEXTS = st.text(st.characters(codec="utf-8"), max_size=20) | st.sampled_from(("", "007", "1e3", "null", "[]"))
FACTS = st.dictionaries(
    TEXTS,
    st.recursive(
        st.none() | st.booleans() | AMOUNTS | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
        max_leaves=5,
    ),
    max_size=3,
)
PARTS = st.lists(st.builds(Part, st.sampled_from(Source), TEXTS, TIMES, AMOUNTS), max_size=3).map(tuple)
PINNED = st.lists(st.builds(PinnedWindow, TEXTS, TIMES, TEXTS, AMOUNTS), max_size=2).map(tuple)
POOLS = st.lists(TEXTS, max_size=2).map(tuple)
RECEIPTS = st.builds(
    Receipt,
    TEXTS,
    TEXTS,
    TEXTS,
    AMOUNTS,
    AMOUNTS,
    st.sampled_from(Basis),
    st.booleans(),
    st.sampled_from(EndedBy),
    PARTS,
    st.none() | AMOUNTS,
    TIMES,
    st.none() | AMOUNTS,
    st.booleans(),
    st.none() | AMOUNTS,
    st.booleans(),
)

ROWS: dict[str, st.SearchStrategy[Any]] = {
    Table.ACCOUNT: st.builds(Account, TEXTS, TEXTS, *[AMOUNTS] * 6, *[TIMES] * 3),
    Table.GRANT: st.builds(
        Grant,
        *[TEXTS] * 3,
        *[AMOUNTS] * 2,
        *[TIMES] * 2,
        AMOUNTS,
        *[TEXTS] * 2,
        *[AMOUNTS] * 3,
        st.booleans(),
        AMOUNTS,
    ),
    Table.HOLD: st.builds(
        Hold,
        *[TEXTS] * 3,
        AMOUNTS,
        PARTS,
        st.sampled_from(HoldState),
        *[TIMES] * 5,
        st.sampled_from(Basis),
        TEXTS,
        AMOUNTS,
        PINNED,
        POOLS,
        FACTS,
        st.none() | RECEIPTS,
        *[TEXTS] * 3,
    ),
    Table.ALLOWANCE: st.builds(AllowanceWindow, *[TEXTS] * 3, *[TIMES] * 2, *[AMOUNTS] * 2),
    Table.COUNTER: st.builds(Counter, TEXTS, *[TIMES] * 2, *[AMOUNTS] * 2),
    Table.LEASE: st.builds(Lease, TEXTS, TEXTS, TIMES),
    Table.ENTRY: st.builds(
        Entry,
        *[TEXTS] * 2,
        AMOUNTS,
        TIMES,
        st.sampled_from(EntryKind),
        AMOUNTS,
        *[TEXTS] * 2,
        st.none() | st.sampled_from(Basis),
        st.booleans(),
        AMOUNTS,
        TEXTS,
        PARTS,
        TEXTS,
    ),
    Table.EVENT: st.builds(Event, TEXTS, TIMES, FACTS, TIMES, st.none() | TIMES),
    Table.CHARGE_KEY: st.builds(ChargeKey, TEXTS, *[TIMES] * 2, TEXTS, AMOUNTS, st.booleans()),
    Table.IDEMPOTENCY: st.builds(IdempotencyKey, *[TEXTS] * 3, TIMES, st.none() | RECEIPTS, st.none() | FACTS),
    Table.CHECKPOINT: st.builds(Checkpoint, *[TEXTS] * 2, AMOUNTS, TIMES, st.dictionaries(TEXTS, AMOUNTS, max_size=3)),
    Table.UNIT: st.builds(DeclaredUnit, TEXTS, AMOUNTS),
    Table.READING: st.builds(SharedReading, TEXTS, TEXTS, TIMES, TEXTS),
}


@pytest.fixture(scope="module")
def connection(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Open a file with the tables of the SQLite store."""
    path: Path = tmp_path_factory.mktemp("rows") / "rows.db"
    connection = Database(path, "OFF", 1.0).connect_writer()
    yield connection
    connection.close()


@pytest.mark.parametrize("table", list(MAPS))
def test_columns_are_the_fields(connection: sqlite3.Connection, table: str) -> None:
    """A table has its row's fields as columns, in their order, then what is derived; a position where order counts."""
    columns = [name for _, name, *_ in connection.execute(f'PRAGMA table_info("{table}")')]
    assert [name for name in columns if name != "position"] == list(KEPT[table].columns)
    assert MAPS[table].fields == MAPS[table].row._fields


@pytest.mark.parametrize("table", list(MAPS))
@given(data=st.data())
@settings(deadline=None, max_examples=10, database=None)
def test_read_a_row_as_it_was_exported(table: str, data: st.DataObject) -> None:
    """A row comes back from its line in a file equal, and of the same types, whatever is in it."""
    row = data.draw(ROWS[table])
    (line,) = lines_of(Page(table, (row,)))
    assert line.isascii()
    assert line.count(b"\n") == 1
    read = page_of(line, "Line 2")
    assert (read.table, read.rows) == (table, (row,))
    assert _types(read.rows[0]) == _types(row)


@pytest.mark.parametrize("table", list(MAPS))
@given(data=st.data())
@settings(deadline=None, max_examples=40, database=None)
def test_read_a_row_as_it_was_written(connection: sqlite3.Connection, table: str, data: st.DataObject) -> None:
    """A row comes back equal, and of the same types, whatever its texts, amounts and times are."""
    row = data.draw(ROWS[table])
    connection.execute(f'DELETE FROM "{table}"')
    connection.execute(UPSERT.get(table) or INSERT[table], KEPT[table].encode(row))
    (found,) = map(KEPT[table].decode, connection.execute(select(table, "")))
    assert found == row
    assert _types(found) == _types(row)


def _types(value: Any) -> Any:
    """The types of a row's fields; what an operation said as an enum for a plain text comes back as text."""
    if isinstance(value, tuple):
        return (type(value), *map(_types, value))
    return str if isinstance(value, Basis) else type(value)


def test_derive_when_a_call_ended() -> None:
    """The derived column of a hold says when it ended, and nothing while it lives."""
    part = Part(Source.GRANT, "g", 0.0, 5)
    hold = Hold("c", "p", "u", 5, (part,), HoldState.HELD, 1.0, 2.0, 3.0, 1.0, 1.0, "observed")
    receipt = Receipt("c", "p", "u", 5, 5, Basis.USAGE, False, EndedBy.CALL, (part,), 0, 7.5, 1)
    index = MAPS[Table.HOLD].columns.index("ended_at")
    assert MAPS[Table.HOLD].encode(hold)[index] is None
    assert MAPS[Table.HOLD].encode(hold.ended(HoldState.SETTLED, receipt))[index] == 7.5


def test_write_facts_that_are_read_only() -> None:
    """A mapping that cannot be changed is written as any other, wherever it stands."""
    facts = MappingProxyType({"attributes": MappingProxyType({"n": 1})})
    event = Event("e", 0.0, facts)
    assert MAPS[Table.EVENT].decode(MAPS[Table.EVENT].encode(event)) == Event("e", 0.0, {"attributes": {"n": 1}})


def test_write_the_same_text_without_the_part_in_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python whose JSON has no part in C writes what others write."""
    value = {"n": [1, 2.5, None, "é"], "m": MappingProxyType({"t": True}), "e": Basis.USAGE}
    text = "".join(rows._chunks_of(rows._encoder)(value, False))
    monkeypatch.setattr("json.encoder.c_make_encoder", None)
    assert text == "".join(rows._chunks_of(rows._encoder)(value, False))
    assert text == '{"n":[1,2.5,null,"\\u00e9"],"m":{"t":true},"e":"usage"}'


@pytest.mark.parametrize("facts", [{"when": object()}, {"tags": {"a", "b"}}, {"raw": b"bytes"}])
def test_write_facts_that_are_not_json(facts: dict[str, Any]) -> None:
    """What JSON cannot say is refused loudly, never guessed at."""
    with pytest.raises(TypeError, match="is not JSON-safe"):
        MAPS[Table.EVENT].encode(Event("e", 0.0, facts))

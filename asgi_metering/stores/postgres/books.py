"""
The whole schema, for whoever moves it: all rows at one instant, and rows as another store kept them.

Each is one transaction on a connection of its own, so that batches and reads go on beside it. Knows rows and
transactions, and nothing of what is done with them.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import count
from typing import Any, Final

from asgi_metering.errors import StoreUnavailableError, UnwritableError
from asgi_metering.rules.state import Table
from asgi_metering.stores.contract import PAGE_ROWS, TABLES, Books, Filling
from asgi_metering.stores.postgres.database import Database
from asgi_metering.stores.postgres.link import CutError, Link, Statement, driver
from asgi_metering.stores.postgres.loads import Loads
from asgi_metering.stores.rows import MAPS

__all__ = ["opened_books", "opened_filling"]

ANSWER_WITHIN_S: Final = 3_600.0
"""The first page of a large table may have to wait until all of it is sorted."""

IDLE_WITHIN_S: Final = 300.0
"""Between two pages somebody writes, or reads, a file. A process that is stopped there keeps its locks so long."""

_BY_ACCOUNT: Final = ("payer", "unit")

_ORDER: Final[Mapping[str, tuple[str, ...]]] = {
    Table.HOLD: ("position",),
    Table.EVENT: ("position",),
    Table.ACCOUNT: _BY_ACCOUNT,
    Table.CHECKPOINT: _BY_ACCOUNT,
    Table.GRANT: (*_BY_ACCOUNT, "number"),
    Table.ALLOWANCE: (*_BY_ACCOUNT, "name", "start"),
    Table.ENTRY: (*_BY_ACCOUNT, "number"),
}

_KEPT: Final = {Table.EVENT: "WHERE t.acknowledged_at IS NULL"}
"""Rows that move, where not all do: what was delivered has no place to go."""


@asynccontextmanager
async def opened_books(database: Database, loads: Loads, clock: Callable[[], float] | None) -> AsyncIterator[Books]:
    """All rows of the schema as they are now, until the block is left. Raises `StoreUnavailableError`."""
    link = await database.connect()
    try:
        books = _SchemaBooks(database, loads, link)
        await books.begin("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY", (), clock)
        yield books
    finally:
        # What is left open ends with its connection.
        link.close()


@asynccontextmanager
async def opened_filling(database: Database, loads: Loads, clock: Callable[[], float] | None) -> AsyncIterator[Filling]:
    """The schema, kept for one who fills it. Raises `StoreContendedError`, `StoreUnavailableError`."""
    link = await database.connect()
    try:
        filling = _SchemaFilling(database, loads, link)
        tables = ", ".join(map(loads.statements.table, TABLES))
        locks = (Statement(f"LOCK TABLE {tables} IN SHARE ROW EXCLUSIVE MODE"),)
        await filling.begin("BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE", locks, clock)
        yield filling
        await filling.commit()
    finally:
        link.close()


class _SchemaBooks(Books):
    """One transaction on a connection."""

    one_instant = True

    def __init__(self, database: Database, loads: Loads, link: Link) -> None:
        self._database = database
        self._loads = loads
        self._link = link
        self._numbers = count(1)

    async def begin(self, begin: str, further: Sequence[Statement], clock: Callable[[], float] | None) -> None:
        """Begin the transaction, with the time of the store."""
        settings = {
            "lock_timeout": self._database.busy_timeout_s,
            "statement_timeout": ANSWER_WITHIN_S,
            "idle_in_transaction_session_timeout": IDLE_WITHIN_S,
        }
        calls = ", ".join(f"set_config('{name}', '{int(value * 1000)}', true)" for name, value in settings.items())
        first = [Statement(begin), Statement(f"SELECT {calls}"), *further, self._loads.time()]
        ((now,),) = (await self._trip(*first))[-1]
        self.now = now if clock is None else clock()

    async def rows(self, table: str) -> AsyncGenerator[Sequence[Any], None]:
        """See `Books.rows`."""
        order, decode = _ORDER.get(table, ()), MAPS[table].decode
        rest = _KEPT.get(table, "")
        rest += f" ORDER BY {', '.join(f't.{name}' for name in order)}" if order else ""
        cursor = f"books_{next(self._numbers)}"
        text, _ = self._loads.statements.select(table, rest)
        fetch = Statement(f"FETCH FORWARD {PAGE_ROWS} FROM {cursor}")
        found = (await self._trip(Statement(f"DECLARE {cursor} NO SCROLL CURSOR FOR {text}"), fetch))[-1]
        while found:
            yield list(map(decode, found))
            (found,) = await self._trip(fetch)
        await self._trip(Statement(f"CLOSE {cursor}"))

    async def counts(self) -> Mapping[str, int]:
        """See `Books.counts`."""
        name = self._loads.statements.table
        texts = (f"SELECT count(*) FROM {name(table)} t {_KEPT.get(table, '')}" for table in TABLES)  # noqa: S608
        found = await self._trip(*map(Statement, texts))
        return {table: rows[0][0] for table, rows in zip(TABLES, found, strict=True)}

    async def _trip(self, *statements: Statement) -> list[list[tuple[Any, ...]]]:
        if not self._link.is_open:
            raise StoreUnavailableError(f"The transaction on {self._database.name} is over. Begin again.")
        try:
            return await self._link.trip(statements, ANSWER_WITHIN_S)
        except (CutError, UnicodeEncodeError, driver().Error) as error:
            # Whoever goes on shall not do so behind the transaction.
            self._link.close()
            if isinstance(error, UnicodeEncodeError) or self._database.is_about_a_value(error):
                raise _unwritable(error) from error
            raise self._database.meaning(error) from error


class _SchemaFilling(_SchemaBooks, Filling):
    """The same for one who writes."""

    whole = True

    async def put(self, table: str, rows: Sequence[Any]) -> int:
        """See `Filling.put`."""
        try:
            statement = self._loads.statements.insert_absent(table, rows)
        except (ValueError, TypeError) as error:
            raise _unwritable(error) from error
        (written,) = await self._trip(statement)
        return len(written)

    async def commit(self) -> None:
        """Keep all of it."""
        await self._trip(Statement("COMMIT"))


def _unwritable(error: Exception) -> UnwritableError:
    said = " ".join(str(error).split()).rstrip(".")
    return UnwritableError(f"PostgreSQL cannot keep a row: {said}. Mend it where it comes from.")

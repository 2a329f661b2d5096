"""
The whole file, for whoever moves it: all rows at one instant, and rows as another store kept them.

Each is one transaction on a connection and a thread of its own, so that batches and reads go on beside it. Knows rows
and transactions, and nothing of what is done with them.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from asgi_metering.errors import StoreUnavailableError, UnwritableError
from asgi_metering.rules.state import Table
from asgi_metering.stores.contract import PAGE_ROWS, TABLES, Books, Filling
from asgi_metering.stores.sqlite.database import Database
from asgi_metering.stores.sqlite.statements import INSERT_ABSENT, ROWS, select
from asgi_metering.stores.sqlite.thread import ConnectionThread, Turn

__all__ = ["opened_books", "opened_filling"]

Result = TypeVar("Result")

_IN_ORDER = {
    Table.HOLD: "ORDER BY position",
    Table.EVENT: "INDEXED BY event_next WHERE acknowledged_at IS NULL ORDER BY position",
    Table.GRANT: "ORDER BY payer, unit, number",
    **{table: f"ORDER BY {', '.join(ROWS[table].key)}" for table in (Table.ACCOUNT, Table.ALLOWANCE, Table.CHECKPOINT)},
    Table.ENTRY: "ORDER BY payer, unit, number",
}


@asynccontextmanager
async def opened_books(database: Database, clock: Callable[[], float]) -> AsyncIterator[Books]:
    """All rows of the file as they are now, until the block is left. Raises `StoreUnavailableError`."""
    thread = ConnectionThread(f"asgi_metering mover of {database.path.name}", database.connect_reader)
    try:
        books = _FileBooks(database, thread)
        # The instant is that of the first read behind it.
        await books.begin("BEGIN", clock)
        yield books
    finally:
        await thread.stop()


@asynccontextmanager
async def opened_filling(database: Database, clock: Callable[[], float]) -> AsyncIterator[Filling]:
    """The file, kept for one who fills it. Raises `StoreContendedError`, `StoreUnavailableError`."""
    thread = ConnectionThread(f"asgi_metering mover of {database.path.name}", database.connect_writer)
    try:
        filling = _FileFilling(database, thread)
        await filling.begin("BEGIN IMMEDIATE", clock)
        yield filling
        await filling.commit()
    finally:
        # What is not committed is rolled back with its connection.
        await thread.stop()


class _FileBooks(Books):
    """One transaction on the thread's connection."""

    one_instant = True

    def __init__(self, database: Database, thread: ConnectionThread) -> None:
        self._database = database
        self._thread = thread

    async def begin(self, statement: str, clock: Callable[[], float]) -> None:
        def job(turn: Turn[float]) -> float:
            patiently = self._database.patiently
            patiently(lambda: turn.connection.execute(statement), turn.sleep)
            patiently(lambda: turn.connection.execute("SELECT count(*) FROM unit"), turn.sleep)
            return clock()

        self.now = await self._do(job)

    async def rows(self, table: str) -> AsyncGenerator[Sequence[Any], None]:
        """See `Books.rows`."""
        query, decode = select(table, _IN_ORDER.get(table, "")), ROWS[table].decode
        cursor = await self._within(lambda connection: connection.execute(query))
        try:
            while found := await self._within(lambda _: cursor.fetchmany(PAGE_ROWS)):
                yield list(map(decode, found))
        finally:
            await self._within(lambda _: cursor.close())

    async def counts(self) -> Mapping[str, int]:
        """See `Books.counts`."""

        def job(connection: sqlite3.Connection) -> dict[str, int]:
            queries = {table: f'SELECT count(*) FROM "{table}"' for table in TABLES}  # noqa: S608 -- names of our own
            queries[Table.EVENT] += " WHERE acknowledged_at IS NULL"
            return {table: int(connection.execute(query).fetchone()[0]) for table, query in queries.items()}

        return await self._within(job)

    async def _within(self, job: Callable[[sqlite3.Connection], Result]) -> Result:
        """Do *job* in the thread, inside the transaction."""
        return await self._do(lambda turn: job(self._connection_of(turn)))

    def _connection_of(self, turn: Turn[Any]) -> sqlite3.Connection:
        if not turn.connection.in_transaction:
            # An error has ended it; what comes now would be a transaction of its own.
            raise StoreUnavailableError(
                f"The transaction on the SQLite file {str(self._database.path)!r} is over. Begin again."
            )
        return turn.connection

    async def _do(self, job: Callable[[Turn[Result]], Result]) -> Result:
        try:
            return await self._thread.call(job)
        except sqlite3.Error as error:
            raise self._database.meaning(error) from error


class _FileFilling(_FileBooks, Filling):
    """The same for one who writes."""

    whole = True

    async def put(self, table: str, rows: Sequence[Any]) -> int:
        """See `Filling.put`."""
        encode = ROWS[table].encode

        def job(connection: sqlite3.Connection) -> int:
            try:
                return connection.executemany(INSERT_ABSENT[table], list(map(encode, rows))).rowcount
            except (ValueError, TypeError, OverflowError, sqlite3.Error) as error:
                if isinstance(error, sqlite3.OperationalError):
                    raise
                raise UnwritableError(
                    f"A row of {table!r} cannot be kept in a SQLite file: {error}. Mend it where it comes from."
                ) from error

        return await self._within(job)

    async def commit(self) -> None:
        """Keep all of it."""

        def job(turn: Turn[None]) -> None:
            connection, turn.waits = self._connection_of(turn), True
            self._database.patiently(lambda: connection.execute("COMMIT"), turn.sleep)

        await self._do(job)

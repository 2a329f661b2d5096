"""
The SQLite store: one file, for one machine, any number of processes. Durable, and exact under concurrency (S0.17).

A batch is one transaction that keeps other writers out from its first statement on, so the rules see the file as it
is. Knows how batches and reads reach the file; what an operation does is decided in `rules`.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TypeAlias, TypeGuard

from asgi_metering.errors import ConfigurationError, MeteringError, StoreUnavailableError
from asgi_metering.rules.decide import Answer
from asgi_metering.rules.operations import Operation
from asgi_metering.stores.contract import Books, Filling, Query, Snapshot, Store
from asgi_metering.stores.sqlite.books import opened_books, opened_filling
from asgi_metering.stores.sqlite.database import SYNCHRONOUS, Database
from asgi_metering.stores.sqlite.reading import read
from asgi_metering.stores.sqlite.thread import ConnectionThread, Turn
from asgi_metering.stores.sqlite.working_copy import WorkingCopy

__all__ = ["SQLiteStore"]

_Threads: TypeAlias = tuple[ConnectionThread, ConnectionThread]
"""The writer's and the reader's."""


class SQLiteStore(Store):
    """
    Metering state in one SQLite file.

    Args:
        path: The file, created at `open` when it is missing; its folder must exist. It holds nothing but metering.
        synchronous: What a commit waits for. ``"FULL"``: what is acknowledged survives a power cut. ``"NORMAL"``:
            faster, and a power cut may lose the last commits. ``"EXTRA"`` and ``"OFF"`` as in SQLite. A killed
            process loses nothing with any of them.
        clock: Answers epoch seconds; read inside the transaction. It is called from another thread.
        busy_timeout_s: Seconds to wait while another process writes, before `StoreContendedError`.

    Raises:
        ConfigurationError: The path names no file, or a setting is not one of those above.

    One thread writes and one reads, each with a connection of its own; any number of event loops may use them. A
    store belongs to the process that opened it: after a fork, open it in the child.
    """

    name = "sqlite"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        synchronous: str = "FULL",
        clock: Callable[[], float] = time.time,
        busy_timeout_s: float = 5.0,
    ) -> None:
        if os.fspath(path) in ("", ":memory:"):
            raise ConfigurationError(
                f"{os.fspath(path)!r} names no file. Use the memory store where nothing needs to be kept."
            )
        if synchronous not in SYNCHRONOUS:
            raise ConfigurationError(f"synchronous={synchronous!r} is unknown. Choose one of {SYNCHRONOUS}.")
        if not busy_timeout_s >= 0:
            raise ConfigurationError(f"busy_timeout_s={busy_timeout_s!r} is no time. Use seconds from 0 up.")
        self._database = Database(Path(path).absolute(), synchronous, busy_timeout_s)
        self.namespace = self._database.path.name
        self._clock = clock
        self._opening = threading.Lock()
        self._threads: _Threads | None = None
        self._pid = 0
        self._copy: WorkingCopy | None = None

    async def open(self) -> None:
        """
        See `Store.open`. Creates the file and its tables, or brings them up to date.

        Raises:
            ConfigurationError: The folder is missing, or the file is not a database, is another program's, or was
                written by a newer version.
            StoreUnavailableError: It cannot be opened or written.
            StoreContendedError: Others keep it locked.
        """
        threads, is_first = self._started()
        try:
            for thread in threads:
                await thread.call(_connected)
        except BaseException:
            if is_first:
                await self._stop(threads)
            raise

    def _started(self) -> tuple[_Threads, bool]:
        """The threads, one pair however many loops open the store at once, and whether this call made them."""
        with self._opening:
            if self._threads is not None and self._pid == os.getpid():
                return self._threads, False
            database = self._database
            database.begin_anew()
            self._threads = (
                ConnectionThread(f"asgi_metering writer of {database.path.name}", database.connect_writer),
                ConnectionThread(f"asgi_metering reader of {database.path.name}", database.connect_reader),
            )
            self._pid = os.getpid()
            return self._threads, True

    async def _stop(self, threads: _Threads) -> None:
        with self._opening:
            if self._threads is threads:
                self._threads = None
        writer, reader = threads
        try:
            # The reader first: the writer's, as the last connection, puts the log back into the file.
            await reader.stop()
        finally:
            await writer.stop()

    async def close(self) -> None:
        """See `Store.close`. Waits for what was handed over; the last process to close leaves a single file."""
        if self._threads is not None:
            await self._stop(self._threads)

    async def run(self, operations: Sequence[Operation]) -> list[Answer | Exception]:
        """See `Store.run`. One transaction, in the writer's thread."""

        def batch(turn: Turn[list[Answer | Exception]]) -> list[Answer | Exception]:
            return self._batch(turn, operations)

        writer, _ = self._opened()
        return await writer.call(batch)

    def start(self, operation: Operation, told: Callable[[Answer | Exception | None], None]) -> bool:
        """See `Store.start`. As `run`, without a task of the loop between the caller and the thread."""

        def batch(turn: Turn[list[Answer | Exception]]) -> list[Answer | Exception]:
            return self._batch(turn, (operation,))

        def answered(answers: list[Answer | Exception] | None, failure: BaseException | None) -> None:
            # What is no mistake of the operation, and no failure, ends whoever runs it again.
            told(answers[0] if answers else failure if isinstance(failure, Exception) else None)

        try:
            writer, _ = self._opened()
            writer.start(batch, answered)
        except StoreUnavailableError:
            # `run` says so.
            return False
        return True

    async def read(self, query: Query) -> Snapshot:
        """See `Store.read`. Never waits for writers."""

        def snapshot(turn: Turn[Snapshot]) -> Snapshot:
            return self._snapshot(turn, query)

        _, reader = self._opened()
        return await reader.call(snapshot)

    @asynccontextmanager
    async def books(self) -> AsyncIterator[Books]:
        """See `Store.books`. One read transaction on a connection of its own; the log grows while it is open."""
        self._opened()
        async with opened_books(self._database, self._clock) as books:
            yield books

    @asynccontextmanager
    async def fill(self) -> AsyncIterator[Filling]:
        """See `Store.fill`. One transaction on a connection of its own, which keeps other writers out."""
        self._opened()
        async with opened_filling(self._database, self._clock) as filling:
            yield filling

    def _opened(self) -> _Threads:
        path = str(self._database.path)
        if self._threads is None:
            raise StoreUnavailableError(f"The SQLite store {path!r} is not open. Await open() first.")
        if self._pid != os.getpid():
            raise StoreUnavailableError(
                f"The SQLite store {path!r} was opened by process {self._pid}. Open it after the fork, in each child."
            )
        return self._threads

    # -- in the threads ------------------------------------------------------------------------------------

    def _batch(self, turn: Turn[list[Answer | Exception]], operations: Sequence[Operation]) -> list[Answer | Exception]:
        connection, patiently = turn.connection, self._database.patiently
        try:
            patiently(lambda: connection.execute("BEGIN IMMEDIATE"), turn.sleep)
            self._database.check_in_place(connection)
            copy = self._taken_copy(connection)
            copy.begin(self._clock())
            answers = _decided(copy, operations)
            turn.waits = True
            patiently(lambda: connection.execute("COMMIT"), turn.sleep)
            self._copy = copy
        except BaseException as error:
            _roll_back(connection)
            if _is_about_the_file(error):
                raise self._database.meaning(error) from error
            raise
        return answers

    def _taken_copy(self, connection: sqlite3.Connection) -> WorkingCopy:
        """The copy of this connection's last batch, if it went well. Should this one fail, its copy is lost."""
        copy, self._copy = self._copy, None
        return copy if copy is not None and copy.connection is connection else WorkingCopy(connection)

    def _snapshot(self, turn: Turn[Snapshot], query: Query) -> Snapshot:
        connection = turn.connection
        self._database.check_in_place(connection)
        try:
            return self._database.patiently(lambda: _at_one_instant(connection, query, self._clock))
        except sqlite3.Error as error:
            raise self._database.meaning(error) from error


def _connected(turn: Turn[None]) -> None:
    """The first job: that it runs is all that is asked."""


def _decided(copy: WorkingCopy, operations: Sequence[Operation]) -> list[Answer | Exception]:
    copy.expect(operations)
    answers: list[Answer | Exception] = []
    for operation in operations:
        try:
            answers.append(copy.run(operation))
        except MeteringError as mistake:
            answers.append(mistake)
    copy.write()
    return answers


def _at_one_instant(connection: sqlite3.Connection, query: Query, clock: Callable[[], float]) -> Snapshot:
    connection.execute("BEGIN")
    try:
        return Snapshot(clock(), read(connection, query))
    finally:
        _roll_back(connection)


def _roll_back(connection: sqlite3.Connection) -> None:
    if connection.in_transaction:
        # Should it fail, the transaction stays open, and the thread drops the connection.
        with suppress(sqlite3.Error):
            connection.rollback()


def _is_about_the_file(error: BaseException) -> TypeGuard[sqlite3.Error]:
    """Whether the driver speaks of the file, and not of a value in one operation that it cannot write."""
    return isinstance(error, sqlite3.OperationalError) or type(error) is sqlite3.DatabaseError

"""
The journal's file: entries in the order in which they came, each until somebody says that it is done.

A SQLite file of its own for one machine; any number of processes write to it, and one at a time reads it off. What is
kept is on the disk when `keep` returns. Knows no store.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from asgi_metering.errors import ConfigurationError, JournalError, StoreUnavailableError
from asgi_metering.journal.records import Steps, decode, encode
from asgi_metering.stores.sqlite.thread import ConnectionThread, Turn

__all__ = ["MAX_ENTRIES", "Journal", "JournalEntry"]

Result = TypeVar("Result")

MAX_ENTRIES: Final = 100_000
"""Entries of one journal: about 100 MB, and a quarter of an hour of a hundred calls a second."""

BUSY_S: Final = 5.0
"""How long a write waits for those of other processes, which take milliseconds each."""

APPLICATION_ID: Final = 0x616D6A31
"""``amj1``: tells our files from others, and this layout from later ones."""

_INHERITED: Final[list[sqlite3.Connection]] = []
"""Connections of the process that this one was forked from: SQLite lets no other one use them, nor even close them."""

_TABLE: Final = """
CREATE TABLE IF NOT EXISTS entry (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    steps TEXT NOT NULL,
    due_at REAL NOT NULL,
    set_aside TEXT
)
"""


class JournalEntry(NamedTuple):
    """
    What waits for one call.

    Attributes:
        number: Its place; a new one when it is kept anew.
        id: The call's.
        steps: What is to be done, in order; empty for text that this version cannot read.
        fault: Why it cannot be read.
    """

    number: int
    id: str
    steps: Steps
    fault: str = ""


class Journal:
    """
    A local durable queue.

    Args:
        path: The file, created at `open` when it is missing; its folder must exist. Beside it stands ``<path>.turn``,
            whose lock says who reads the journal off; the operating system frees it when that process dies.
        max_entries: Beyond so many nothing more is kept.
        clock: Epoch seconds; they outlive the process.

    Raises:
        ConfigurationError: The path names no file.

    One thread writes; any number of event loops may use it. A journal belongs to the process that opened it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        max_entries: int = MAX_ENTRIES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if os.fspath(path) in ("", ":memory:"):
            raise ConfigurationError(f"journal={os.fspath(path)!r} names no file. Name one on a local disk.")
        self.path = Path(path).absolute()
        self._max_entries = max_entries
        self._clock = clock
        self._thread: ConnectionThread | None = None
        self._turn: sqlite3.Connection | None = None
        self._turning = threading.Lock()

    async def open(self) -> None:
        """
        Open the file, or create it. Again changes nothing.

        Raises:
            ConfigurationError: Its folder is missing, or it is another program's file.
            JournalError: It cannot be opened or written.
        """
        if self._thread is None:
            self._thread = ConnectionThread(f"asgi_metering journal {self.path.name}", self._connect)
        await self._in_thread(_nothing)

    def forked(self) -> None:
        """Forget the thread and the turn of the process that this one was forked from; they stay that one's."""
        if self._turn is not None:
            _INHERITED.append(self._turn)
        self._thread, self._turn, self._turning = None, None, threading.Lock()

    async def close(self) -> None:
        """Close the file; what it keeps stays. Again changes nothing."""
        thread, self._thread = self._thread, None
        if thread is not None:
            await self.give_turn_back()
            await thread.stop()

    async def keep(self, entries: Mapping[str, Steps], *, due_in_s: float = 0.0) -> None:
        """
        Keep *entries*, by call, in one write; one of a call that is kept already replaces that, at the end.

        Args:
            entries: What is to be done for each call.
            due_in_s: Seconds until they are to be read off, if nothing replaces them before.

        Raises:
            JournalError: There is no room for all of them, or they cannot be written; none is kept.
        """
        try:
            rows = [(call, encode(steps)) for call, steps in entries.items()]
        except (TypeError, ValueError) as failure:
            raise JournalError(f"The journal cannot write one of {len(entries)} entries: {failure}.") from failure

        def write(connection: sqlite3.Connection) -> None:
            due_at = self._clock() + due_in_s
            connection.executemany(
                "INSERT OR REPLACE INTO entry (id, steps, due_at) VALUES (?, ?, ?)",
                [(call, steps, due_at) for call, steps in rows],
            )
            # The index over ids is what is counted: a few MB, whatever the steps are.
            ((kept,),) = connection.execute("SELECT count(*) FROM entry")
            if kept > self._max_entries:
                raise JournalError(
                    f"The journal {str(self.path)!r} has its {self._max_entries} entries. Bring the store back, or "
                    f"look at what is set aside in it."
                )

        await self._write(write)

    async def take_turn(self) -> bool:
        """Become the one who reads the journal off; False while somebody else is, in whatever process."""
        wanted = threading.Event()
        wanted.set()
        try:
            return await self._in_thread(lambda _: self._take_turn(wanted))
        except asyncio.CancelledError:
            # The thread may take it all the same, or has: it would be nobody's.
            with self._turning:
                if wanted.is_set():
                    wanted.clear()
                else:
                    self._end_turn()
            raise

    async def give_turn_back(self) -> None:
        """Let others read it off. Neither the disk nor a cancellation keeps it from that."""
        with self._turning:
            self._end_turn()

    async def due(self, limit: int) -> list[JournalEntry]:
        """Up to *limit* entries that are due and not set aside, oldest first."""

        def read(connection: sqlite3.Connection) -> list[tuple[int, str, str]]:
            found = connection.execute(
                "SELECT number, id, steps FROM entry WHERE set_aside IS NULL AND due_at <= ? ORDER BY number LIMIT ?",
                (self._clock(), limit),
            )
            return found.fetchall()

        return [_entry(*row) for row in await self._in_thread(read)]

    async def done(self, entries: Sequence[JournalEntry]) -> None:
        """Forget entries. What was kept anew for their calls meanwhile stays, and what is set aside."""
        numbers = [(entry.number,) for entry in entries]
        await self._write(lambda connection: _drop(connection.executemany(_FORGET, numbers)))

    async def drop(self, call: str) -> None:
        """Forget whatever is kept of *call*."""
        await self._write(lambda connection: _drop(connection.execute("DELETE FROM entry WHERE id = ?", (call,))))

    async def set_aside(self, entry: JournalEntry, why: str) -> None:
        """Keep *entry* for a person to look at: it is read off no more."""
        await self._write(lambda connection: _drop(connection.execute(_SET_ASIDE, (why, entry.number))))

    async def restore(self) -> None:
        """Let what was set aside be read off again: whatever was wrong with it has been mended."""
        await self._write(lambda connection: _drop(connection.execute("UPDATE entry SET set_aside = NULL")))

    async def counts(self) -> tuple[int, int]:
        """How many entries wait, and how many are set aside."""

        def read(connection: sqlite3.Connection) -> tuple[int, int]:
            ((kept, aside),) = connection.execute("SELECT count(*), count(set_aside) FROM entry")
            return kept - aside, aside

        return await self._in_thread(read)

    # -- in the thread -------------------------------------------------------------------------------------

    async def _write(self, change: Callable[[sqlite3.Connection], None]) -> None:
        def transaction(connection: sqlite3.Connection) -> None:
            connection.execute("BEGIN IMMEDIATE")
            try:
                change(connection)
                connection.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
                raise

        await self._in_thread(transaction)

    async def _in_thread(self, job: Callable[[sqlite3.Connection], Result]) -> Result:
        if self._thread is None:
            raise JournalError(f"The journal {str(self.path)!r} is not open. Await open() first.")
        return await self._run(self._thread, job)

    async def _run(self, thread: ConnectionThread, job: Callable[[sqlite3.Connection], Result]) -> Result:
        def turn(turn: Turn[Result]) -> Result:
            # What waits for the disk or for another process needs no interpreter.
            turn.waits = True
            return job(turn.connection)

        try:
            return await thread.call(turn)
        except (sqlite3.Error, StoreUnavailableError) as failure:
            raise JournalError(
                f"The journal {str(self.path)!r} could not be used: {failure}. Look at its disk first."
            ) from failure

    def _connect(self) -> sqlite3.Connection:
        if not self.path.parent.is_dir():
            raise ConfigurationError(f"The folder of the journal {str(self.path)!r} does not exist. Create it first.")
        connection = sqlite3.connect(self.path, timeout=BUSY_S, isolation_level=None)
        try:
            ((owner,),) = connection.execute("PRAGMA application_id")
            ((tables,),) = connection.execute("SELECT count(*) FROM sqlite_schema")
            if owner != APPLICATION_ID and (owner or tables):
                raise ConfigurationError(
                    f"The file {str(self.path)!r} is no journal of this version. Give the journal a file of its own."
                )
            # FULL: what is kept survives a power cut, for nobody else knows of it.
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(_TABLE)
        except BaseException as failure:
            connection.close()
            if isinstance(failure, sqlite3.DatabaseError) and "not a database" in str(failure):
                raise ConfigurationError(
                    f"The file {str(self.path)!r} is no journal. Give the journal a file of its own."
                ) from failure
            raise
        return connection

    def _take_turn(self, wanted: threading.Event) -> bool:
        with self._turning:
            if self._turn is not None or not wanted.is_set():
                return False
            # Given back by whoever stops reading, in whatever thread: one at a time, by the lock.
            turn = sqlite3.connect(f"{self.path}.turn", timeout=0.0, isolation_level=None, check_same_thread=False)
            try:
                turn.execute("BEGIN EXCLUSIVE")
            except sqlite3.OperationalError:
                turn.close()
                return False
            self._turn = turn
            wanted.clear()
            return True

    def _end_turn(self) -> None:
        turn, self._turn = self._turn, None
        if turn is not None:
            # Closing ends the transaction, and so the lock.
            turn.close()


_FORGET: Final = "DELETE FROM entry WHERE number = ? AND set_aside IS NULL"
_SET_ASIDE: Final = "UPDATE entry SET set_aside = ? WHERE number = ?"


def _entry(number: int, call: str, text: str) -> JournalEntry:
    try:
        return JournalEntry(number, call, decode(text))
    except ValueError as failure:
        return JournalEntry(number, call, (), str(failure))


def _drop(_: object) -> None:
    """What a cursor says is not asked for."""


def _nothing(_: sqlite3.Connection) -> None:
    """The first job: that the file can be opened is all that is asked."""

"""
The PostgreSQL store: one schema, for any number of machines. Durable, and exact under concurrency (S0.17).

A batch is one transaction of two round trips: locks and rows, then changes. Knows how batches and reads reach the
database; what an operation does is decided in `rules`.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

from asgi_metering.errors import ConfigurationError, StoreContendedError, StoreUnavailableError
from asgi_metering.rules.decide import Answer
from asgi_metering.rules.operations import Operation
from asgi_metering.stores.contract import Books, Filling, Query, Snapshot, Store
from asgi_metering.stores.postgres.books import opened_books, opened_filling
from asgi_metering.stores.postgres.database import DEFAULT_NAMESPACE, MAY_BEGIN_AGAIN, Database
from asgi_metering.stores.postgres.link import CutError, Link, Statement, driver
from asgi_metering.stores.postgres.loads import Loads
from asgi_metering.stores.postgres.migrations import script
from asgi_metering.stores.postgres.reading import Reading
from asgi_metering.stores.postgres.working_copy import MovedError, WorkingCopy

__all__ = ["PostgresStore"]

Result = TypeVar("Result")

ATTEMPTS: Final = 8
"""How often a batch is begun before it gives way to the others: each of them lost to somebody who got on."""

FIRST_PAUSE_S: Final = 0.005
"""Between two attempts, doubled each time and drawn: about a transaction of another process."""

MIGRATION_WITHIN_S: Final = 3_600.0
"""A migration may have to go through large tables."""

_COMMIT, _ROLLBACK = Statement("COMMIT"), Statement("ROLLBACK")


class _Line:
    """One connection of a loop, made when it is needed and again when it was lost; one user at a time."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._turn = asyncio.Lock()
        self._link: Link | None = None

    async def use(self, job: Callable[[Link], Coroutine[Any, Any, Result]]) -> Result:
        """Run *job* on the connection, when everybody who came before is done."""
        async with self._turn:
            if self._link is None or not self._link.is_open:
                self._link = await self._database.connect()
            return await job(self._link)

    def close(self) -> None:
        """Close the connection."""
        if self._link is not None:
            self._link.close()


class _Lines:
    """The connections of one event loop: batches have one of their own, so that no read waits for them."""

    def __init__(self, database: Database) -> None:
        self.writer = _Line(database)
        self.reader = _Line(database)
        self.tasks: set[asyncio.Task[Any]] = set()

    async def shielded(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Await *work*, which goes on when the caller is cancelled: a batch is never torn in the middle."""
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self._done)
        return await asyncio.shield(task)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self.tasks.discard(task)
        if not task.cancelled():
            # Looked at here, because its caller may be gone.
            task.exception()

    async def stop(self) -> None:
        """Wait for what is under way, and close both."""
        while self.tasks:
            await asyncio.wait(self.tasks)
        self.close()

    def close(self) -> None:
        """Close both connections as they are."""
        self.writer.close()
        self.reader.close()


class PostgresStore(Store):
    """
    Metering state in one schema of a PostgreSQL database, version 13 or later.

    Args:
        url: ``postgresql://user:password@host:5432/database``, with all that libpq knows as parameters: TLS, several
            hosts, ``target_session_attrs``.
        namespace: The schema. ``asgi-metering migrate`` makes it.
        clock: Answers epoch seconds; read behind the locks. None reads the server's, which is what several machines
            need: their own may differ.
        busy_timeout_s: Seconds to wait while others keep accounts locked, before `StoreContendedError`.
        answer_within_s: Seconds for one round trip, before the connection is given up.
        migrate: Make the schema, or bring it up to date, at `open`: for tests and development.
        prepare: Let the server keep statements prepared, so that it plans each of them once: most of its time.

    Raises:
        ConfigurationError: The URL or the namespace cannot be one.
        MissingExtraError: The driver is not installed.

    Each event loop that uses the store has two connections of its own. Nothing but prepared statements outlives a
    transaction on the server's side, so a pooler such as PgBouncer may stand between in transaction mode. Where it
    loses prepared statements (PgBouncer before 1.21, or with ``max_prepared_statements=0``), the first batch that meets
    that is begun again, before anything was committed, and none are used from then on; ``prepare=False`` uses none from
    the beginning. A store belongs to the process that opened it: after a fork, open it in the child.
    """

    name = "postgresql"

    def __init__(
        self,
        url: str,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        clock: Callable[[], float] | None = None,
        busy_timeout_s: float = 5.0,
        answer_within_s: float = 10.0,
        migrate: bool = False,
        prepare: bool = True,
    ) -> None:
        for name, value in (("busy_timeout_s", busy_timeout_s), ("answer_within_s", answer_within_s)):
            if not 0.001 <= value <= 86_400:
                raise ConfigurationError(f"{name}={value!r} is no time to wait. Use seconds, from 0.001 to 86,400.")
        self._database = Database(url, namespace, busy_timeout_s, answer_within_s, prepares=prepare)
        self.namespace = namespace
        self._loads = Loads(namespace)
        self._reading = Reading(self._loads)
        self._clock = clock
        self._is_migrating = migrate
        self._guard = threading.Lock()
        self._lines: dict[asyncio.AbstractEventLoop, _Lines] = {}
        self._pid = 0
        # Connections of the process that we were forked from: closing them would end its transactions.
        self._inherited: list[dict[asyncio.AbstractEventLoop, _Lines]] = []

    async def open(self) -> None:
        """
        See `Store.open`. Changes no table unless the store was made with ``migrate=True``.

        Raises:
            ConfigurationError: The schema is missing, older or newer than this version works on.
            StoreUnavailableError: The database cannot be reached, or lets us not in.
        """
        with self._guard:
            if self._pid != os.getpid():
                if self._lines:
                    self._inherited.append(self._lines)
                self._lines, self._pid = {}, os.getpid()
        lines = self._mine()
        try:
            await lines.shielded(lines.writer.use(lambda link: self._database.prepare(link, self._is_migrating)))
        except BaseException:
            lines.writer.close()
            raise

    async def migrate(self) -> list[tuple[int, str]]:
        """
        Make the schema, or bring it up to date; number and name of each migration that was applied are returned.

        May run under load, and from several places at once. The store need not be open.

        Raises:
            StoreUnavailableError: The database cannot be reached, or forbids it.
            StoreContendedError: A table was in use for too long; run it again.
        """
        link = await self._database.connect()
        try:
            done = await self._database.migrate(link, MIGRATION_WITHIN_S)
        finally:
            link.close()
        return [(migration.number, migration.name) for migration in done]

    def migration_script(self) -> str:
        """All migrations as a script for ``psql``."""
        return script(self._database.namespace)

    async def close(self) -> None:
        """See `Store.close`. Waits for what was handed over in this event loop; those of others close in theirs."""
        with self._guard:
            all_lines, self._lines, self._pid = self._lines, {}, 0
        here = asyncio.get_running_loop()
        for loop, lines in all_lines.items():
            if loop is here:
                await lines.stop()
            elif loop.is_closed():
                lines.close()
            else:
                asyncio.run_coroutine_threadsafe(lines.stop(), loop)

    def _mine(self) -> _Lines:
        """The connections of this event loop."""
        loop = asyncio.get_running_loop()
        with self._guard:
            if self._pid != os.getpid():
                raise StoreUnavailableError(
                    f"The store {self._database.name} "
                    + (
                        f"was opened by process {self._pid}. Open it after the fork, in each child."
                        if self._pid
                        else "is not open. Await open() first."
                    )
                )
            for other in [other for other in self._lines if other.is_closed()]:
                self._lines.pop(other).close()
            lines = self._lines.get(loop)
            if lines is None:
                lines = self._lines[loop] = _Lines(self._database)
            return lines

    async def run(self, operations: Sequence[Operation]) -> list[Answer | Exception]:
        """See `Store.run`. One transaction, two round trips; a third where calls are overdue, or money goes back."""
        if not operations:
            return []
        lines = self._mine()
        return await lines.shielded(lines.writer.use(lambda link: self._patiently(link, operations)))

    async def read(self, query: Query) -> Snapshot:
        """See `Store.read`. One round trip; never waits for writers."""
        lines = self._mine()
        return await lines.shielded(lines.reader.use(lambda link: self._snapshot(link, query)))

    @asynccontextmanager
    async def books(self) -> AsyncIterator[Books]:
        """See `Store.books`. One transaction (repeatable read) on a connection of its own."""
        self._mine()
        async with opened_books(self._database, self._loads, self._clock) as books:
            yield books

    @asynccontextmanager
    async def fill(self) -> AsyncIterator[Filling]:
        """See `Store.fill`. One transaction on a connection of its own, whose locks keep other writers out."""
        self._mine()
        async with opened_filling(self._database, self._loads, self._clock) as filling:
            yield filling

    # -- on the connections --------------------------------------------------------------------------------

    async def _patiently(self, link: Link, operations: Sequence[Operation]) -> list[Answer | Exception]:
        pause_s = FIRST_PAUSE_S
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await self._batch(link, operations)
            except MovedError as moved:
                lost: Exception = moved
            except driver().Error as error:
                if self._database.is_of_standby(error):
                    # The address, or the pooler, may lead to its successor by now.
                    link.close()
                if not link.is_open or not await self._may_begin_again(link, error):
                    raise self._told(error) from error
                lost = error
            except CutError as error:
                raise self._database.meaning(error) from error
            if attempt < ATTEMPTS:
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.5))  # noqa: S311 -- spreads attempts, hides nothing
                pause_s *= 2
        raise StoreContendedError(
            f"{self._database.name} let others go first {ATTEMPTS} times, so nothing was done. Look for processes that "
            f"write the same calls, or for other programs that write to its schema."
        ) from lost

    async def _may_begin_again(self, link: Link, error: Exception) -> bool:
        if getattr(error, "sqlstate", None) in MAY_BEGIN_AGAIN:
            return True
        return await self._database.is_of_prepared(link, error)

    def _told(self, error: Exception) -> Exception:
        """A value that cannot be kept is one operation's mistake: as it is, so that the guilty one is found."""
        return error if self._database.is_about_a_value(error) else self._database.meaning(error)

    async def _batch(self, link: Link, operations: Sequence[Operation]) -> list[Answer | Exception]:
        within_s = self._database.answer_within_s
        copy = WorkingCopy(lambda statements: link.trip(statements, within_s, prepare=True), self._loads, self._clock)
        try:
            answers = await copy.run(operations, (*self._database.begin, *link.replanning()))
            await link.trip([*copy.changes(), _COMMIT], within_s, prepare=True)
        except BaseException:
            await self._roll_back(link)
            raise
        return answers

    async def _roll_back(self, link: Link) -> None:
        if link.is_open:
            try:
                await link.trip([_ROLLBACK], self._database.answer_within_s)
            except (CutError, driver().Error):
                # The server rolls back what its client has left.
                link.close()

    async def _snapshot(self, link: Link, query: Query) -> Snapshot:
        statements = self._reading.statements(query)
        begin = (*self._database.begin_reading, *link.replanning())
        trip = [*begin, *statements, self._loads.time(), _COMMIT]
        try:
            found = await link.trip(trip, self._database.answer_within_s, prepare=True)
        except (CutError, driver().Error) as error:
            await self._roll_back(link)
            if link.is_open and await self._database.is_of_prepared(link, error):
                return await self._snapshot(link, query)
            raise self._database.meaning(error) from error
        *rows, ((now,),), _ = found[len(begin) :]
        return Snapshot(now if self._clock is None else self._clock(), self._reading.state(query, rows))

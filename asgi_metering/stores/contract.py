"""
The store contract: what every store must do, and nothing about how.

A store runs operations (`rules.operations`) and reads rows. What an operation does is decided by `rules.decide.run`
and nowhere else: memory runs it on its whole state; a database loads the rows that a batch touches, runs it, and
writes the changes in one transaction; a script mirrors it. A third-party store subclasses `Store` and passes the
suite in `asgi_metering.testing`.
"""

from __future__ import annotations

import abc
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

from asgi_metering.decisions import Decision
from asgi_metering.errors import ConfigurationError
from asgi_metering.receipts import GrantReceipt, Receipt
from asgi_metering.rules.decide import Answer
from asgi_metering.rules.operations import Admit, End, Operation, PostGrant, Renew
from asgi_metering.rules.state import State, Table

__all__ = [
    "PAGE_ROWS",
    "TABLES",
    "AccountRows",
    "AccountsAfter",
    "Books",
    "EntriesAfter",
    "EverythingKept",
    "Filling",
    "HoldRow",
    "LinesOf",
    "LiveHolds",
    "PendingEvents",
    "Query",
    "ReadingsKept",
    "Snapshot",
    "Store",
]


TABLES: tuple[str, ...] = (
    Table.UNIT,
    Table.HOLD,
    Table.ACCOUNT,
    Table.CHECKPOINT,
    Table.GRANT,
    Table.ALLOWANCE,
    Table.ENTRY,
    Table.CHARGE_KEY,
    Table.IDEMPOTENCY,
    Table.COUNTER,
    Table.LEASE,
    Table.READING,
    Table.EVENT,
)
"""Every table, in the order in which moving writes them."""


class AccountRows(NamedTuple):
    """One account whole: its row, all grants, live holds, the allowance windows that are kept, and its checkpoint."""

    payer: str
    unit: str


class AccountsAfter(NamedTuple):
    """Up to *limit* account rows with keys above (payer, unit), ascending: the way to walk all of them."""

    payer: str = ""
    unit: str = ""
    limit: int = 1_000


class EntriesAfter(NamedTuple):
    """Up to *limit* ledger lines of an account with numbers above *number*, ascending."""

    payer: str
    unit: str
    number: int = 0
    limit: int = 1_000


class LinesOf(NamedTuple):
    """The ledger lines of an account about one call, grant or posting, oldest first."""

    payer: str
    unit: str
    ref: str


class HoldRow(NamedTuple):
    """The hold of one call, live or kept."""

    id: str


class LiveHolds(NamedTuple):
    """Up to *limit* holds that have not ended, oldest first."""

    limit: int = 1_000


class PendingEvents(NamedTuple):
    """Up to *limit* undelivered usage events, oldest first, claimed ones included."""

    limit: int = 1_000


class ReadingsKept(NamedTuple):
    """What workers told each other of their providers' answers, all of it: at most `rules.readings.MAX_KEPT` rows."""


class EverythingKept(NamedTuple):
    """The whole state, for proofs and tests. Never on a hot path."""


Query: TypeAlias = (
    AccountRows
    | AccountsAfter
    | EntriesAfter
    | LinesOf
    | HoldRow
    | LiveHolds
    | PendingEvents
    | ReadingsKept
    | EverythingKept
)


class Snapshot(NamedTuple):
    """
    Rows as they were at one instant.

    Attributes:
        now: The store's time, epoch seconds.
        state: Only what the query asked for. It is the caller's own: changing it changes no store.
    """

    now: float
    state: State


_Answer = TypeVar("_Answer")

PAGE_ROWS = 1_000
"""Rows in one page of `Books.rows`: some hundred kilobytes, and few enough round trips."""


class Books(abc.ABC):
    """
    All rows that a store keeps, to be read from one end to the other. See `Store.books`.

    Attributes:
        now: The store's time when they were opened, epoch seconds.
        one_instant: Whether every page is of the instant of *now*, whatever is written meanwhile. Where it is not,
            writers are to be stopped first.
    """

    now: float
    one_instant: bool = False

    @abc.abstractmethod
    def rows(self, table: str) -> AsyncGenerator[Sequence[Any], None]:
        """
        Read all rows of one table, each once, in pages of about `PAGE_ROWS`; no page is empty. An async generator.

        Args:
            table: One of `rules.state.Table`; the rows are those of `rules.state`, and entries those of `receipts`.

        Events come in the order in which the store got them, holds by the time of their admission (of those of one
        instant any first). Accounts, grants, allowances, entries and checkpoints come by payer, then unit, ascending as
        Python orders strings (which is the order of their UTF-8); within an account grants by number, allowances by
        name and start, entries by number. Others come in any order.

        Raises:
            StoreUnavailableError: No answer came.
        """

    async def counts(self) -> Mapping[str, int]:
        """How many rows each table has, by its name. A store that can count without reading them does so."""
        counts = {}
        for table in TABLES:
            counts[table] = 0
            async for page in self.rows(table):
                counts[table] += len(page)
        return counts


class Filling(Books):
    """
    A store that is being filled. What was put is among its `rows`. See `Store.fill`.

    Attributes:
        whole: Whether all that was put is kept, or nothing: it is one transaction. Where it is not, what was put
            before a failure stays, and putting the same rows again completes it.
    """

    whole: bool = False

    @abc.abstractmethod
    async def put(self, table: str, rows: Sequence[Any]) -> int:
        """
        Keep *rows* of one table exactly as they are. A row whose key is kept already stays as it is.

        Returns how many were new. Again with the same rows changes nothing. Holds and events are the newest from now
        on, in the order given; an account comes before its grants, a checkpoint before the entries behind it, and
        entries come by their number.

        Raises:
            UnwritableError: One of them cannot be kept here. Nothing of an empty store's filling is kept then.
            StoreUnavailableError: No answer came.

        Whatever it raises, the filling is over: nothing is kept where it is whole, and some of it where it is not.
        """


class Store(abc.ABC):
    """
    A place that keeps metering state.

    Life: constructed cheaply and without I/O; `open` before the first operation, `close` after the last. Used from
    one event loop at a time unless the store says otherwise.

    Attributes:
        name: What kind of store this is, for people.
        immediate: `run_now` answers at once, so that batching would only cost time.
        lanes: How many `run` may be under way at once: where it is more than one, the next sequence is made while the
            one before is away. Which of them comes first, the store says.
        durable: Whether an acknowledged operation survives the process.
        shared: Whether several processes may use it at once.
        namespace: Which of several books in one place these are, for people; empty where there is one.
        one_place: All accounts are in one place, so that a charge key may be paid for by others than the call's own
            payer. Where they are not, that is refused.
    """

    name: str
    namespace: str = ""
    immediate: bool = False
    lanes: int = 1
    durable: bool = True
    shared: bool = True
    one_place: bool = True

    @abc.abstractmethod
    async def open(self) -> None:
        """
        Get ready: connect, create or check the schema. Calling it again changes nothing.

        Raises:
            StoreUnavailableError: It cannot be reached.
            StoreContendedError: Others keep it locked.
            ConfigurationError: It is not usable as configured.
        """

    @abc.abstractmethod
    async def close(self) -> None:
        """Give back every connection, thread and file. Calling it again changes nothing."""

    @abc.abstractmethod
    async def run(self, operations: Sequence[Operation]) -> list[Answer | Exception]:
        """
        Run *operations* in order, each atomic, and answer each at the same index.

        - The whole sequence is durable when this returns; it is one commit where the store has commits.
        - An operation that is a mistake (`MeteringError`) is answered with the exception and has changed nothing;
          its neighbours are not harmed.
        - Time is read from the store's own clock, after its locks.

        Raises:
            StoreUnavailableError: No answer came. Each operation may or may not have happened; repeating it with the
                same id is safe.
            StoreContendedError: Bounded retries against other writers are spent; nothing happened.
            Exception: The sequence as a whole was rolled back, for instance because one operation cannot be written.
                Running the operations one at a time finds the guilty one. A store whose operations do not share one
                fate answers it at its index instead.

        Round trips: one for the whole sequence, where the store has round trips.
        """

    def run_now(self, operation: Operation) -> Answer:
        """
        Run one operation without waiting. Only stores with ``immediate = True`` have it.

        Raises:
            MeteringError: The operation is a mistake.
        """
        raise TypeError(f"The {self.name} store cannot answer at once. Await run({operation!r}).")

    def start(self, operation: Operation, told: Callable[[Answer | Exception | None], None]) -> bool:
        """
        Send one operation in this turn of the loop, if nothing has to be waited for before that.

        Args:
            operation: As one of `run`.
            told: Called once, later and from the loop: with what `run` would answer; with what it would raise; or with
                None where the operation has not been done, and has to be `run`. It never raises.

        Returns:
            Whether it was sent. If it was not, *told* is never called: it has to be `run`.
        """
        return False

    @abc.abstractmethod
    async def read(self, query: Query) -> Snapshot:
        """
        Read rows. Changes nothing, renews nothing (S0.49, S1.15).

        Raises:
            StoreUnavailableError: No answer came.
        """

    def books(self) -> AbstractAsyncContextManager[Books]:
        """
        Open all rows for reading, for whoever moves them elsewhere. Changes nothing, and keeps nobody from writing.

        The rows are of one instant where the store has snapshots (`Books.one_instant`). A store that cannot be read as
        a whole does not have it.

        Raises:
            ConfigurationError: This kind of store does not have it.
            StoreUnavailableError: It cannot be reached, or is not open.
        """
        raise ConfigurationError(
            f"The {self.name} store cannot hand out all of its rows, so it cannot be moved from. It has no books()."
        )

    def fill(self) -> AbstractAsyncContextManager[Filling]:
        """
        Open the store for rows that another one kept. What was put is kept when the block is left without an exception.

        Left with one, nothing is kept where the filling is whole. A store without transactions writes what is put at
        once, each row if it is absent: that is all that it needs. Nobody else may write meanwhile; a store that can
        keep others out does so.

        Raises:
            ConfigurationError: This kind of store does not have it.
            StoreContendedError: Others are writing.
            StoreUnavailableError: It cannot be reached, or is not open.
        """
        raise ConfigurationError(
            f"The {self.name} store cannot take rows as another one kept them, so it cannot be moved to. It has no "
            f"fill()."
        )

    # -- the verbs, over run() -----------------------------------------------------------------------------

    async def admit(self, asks: Sequence[Admit]) -> list[Decision]:
        """Decide on calls, each all or nothing. See `rules.admission`."""
        return _checked(await self.run(asks))

    async def renew(self, beats: Sequence[Renew]) -> list[bool]:
        """Heartbeats: whether each hold still lives."""
        return _checked(await self.run(beats))

    async def end(self, ends: Sequence[End]) -> list[Receipt]:
        """Settle or release holds; the first end of each wins, others get its receipt."""
        return _checked(await self.run(ends))

    async def post(self, grants: Sequence[PostGrant]) -> list[GrantReceipt]:
        """Give units, once per id."""
        return _checked(await self.run(grants))


def _checked(answers: Iterable[Answer | Exception]) -> list[_Answer]:
    checked = []
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
        checked.append(cast("_Answer", answer))
    return checked

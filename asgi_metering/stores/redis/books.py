"""
All rows of a namespace, for whoever moves them: as they are while others may write, and as another store kept them.

A server has no snapshots that a reader could hold, and to keep everybody out for as long as an export takes would cost
more than the export is worth: books are not of one instant. A filling does work alone, behind the gate. What is put is
written as every other change is, so that indexes are those of a store that lived through it. Knows rows, and nothing
of what is done with them.
"""

from __future__ import annotations

import struct
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

from asgi_metering.errors import AmountError, StoreUnavailableError, UnwritableError
from asgi_metering.receipts import Entry
from asgi_metering.rules.state import Change, DeclaredUnit, Grant, Hold, Lease, Table
from asgi_metering.stores.contract import PAGE_ROWS, TABLES, Books, Filling
from asgi_metering.stores.redis.link import Command, Link, Reply
from asgi_metering.stores.redis.names import Names, restored
from asgi_metering.stores.redis.packing import Packing
from asgi_metering.stores.redis.places import driver
from asgi_metering.stores.redis.putting import put
from asgi_metering.stores.redis.transaction import Transactions
from asgi_metering.stores.redis.walking import GRANTS, PARTS, Walk, keys_of
from asgi_metering.stores.redis.working_copy import WorkingCopy

__all__ = ["Access", "NamespaceBooks", "NamespaceFilling", "kept_alone", "opened_books", "opened_filling"]

PUT_ROWS = 100
"""Rows in one transaction: others on the server wait some three milliseconds for it."""

ACCOUNTS = 100
"""Accounts looked at at once, where each may have many rows."""

ALONE_S = 60.0
"""A filling whose process died keeps others out for so long; it says that it lives whenever it reads or writes."""

_KINDS: Mapping[str, str] = {
    Table.UNIT: "u",
    Table.HOLD: "h",
    Table.ACCOUNT: "a",
    Table.CHECKPOINT: "p",
    Table.ALLOWANCE: "w",
    Table.CHARGE_KEY: "k",
    Table.IDEMPOTENCY: "i",
    Table.COUNTER: "c",
}
"""The letters of the keys that have one row each."""

_UNPACKABLE = (ValueError, TypeError, OverflowError, AmountError, struct.error)


class Access(NamedTuple):
    """
    How the server is reached.

    Attributes:
        link, names, packing: Of the store.
        transactions: What writes.
        meaning: Makes the error of the store of an error reply.
        clock: The time of tests; None reads the server's.
    """

    link: Link
    names: Names
    packing: Packing
    transactions: Transactions
    meaning: Callable[[Exception], Exception]
    clock: Callable[[], float] | None

    async def ask(self, *commands: Command) -> list[Reply]:
        """What *commands* answer. Raises the first error."""
        replies = await self.link.exchange(commands) if commands else []
        for reply in replies:
            if isinstance(reply, Exception):
                raise self.meaning(reply)
        return replies

    async def now(self) -> float:
        """The store's time."""
        ((seconds, micros),) = await self.ask(("TIME",))
        return int(seconds) + int(micros) / 1e6 if self.clock is None else self.clock()


@asynccontextmanager
async def opened_books(access: Access) -> AsyncIterator[NamespaceBooks]:
    """All rows of the namespace, until the block is left. Raises `StoreUnavailableError`."""
    books = NamespaceBooks(access, await access.now())
    try:
        yield books
    finally:
        books.forget()


@asynccontextmanager
async def opened_filling(access: Access) -> AsyncIterator[Filling]:
    """The namespace, kept for one who fills it. Raises `StoreContendedError`, `StoreUnavailableError`."""
    async with kept_alone(access) as filling:
        await filling.look()
        yield filling


@asynccontextmanager
async def kept_alone(access: Access) -> AsyncIterator[NamespaceFilling]:
    """The same for one who knows whether the namespace is empty."""
    token = await access.transactions.enter(ALONE_S)
    filling = NamespaceFilling(access, await access.now(), token)
    try:
        yield filling
    finally:
        filling.forget()
        # A gate that cannot be opened now opens by itself.
        with suppress(StoreUnavailableError):
            await access.transactions.leave(token)


class NamespaceBooks(Books):
    """Rows of the keys that are there when they are first looked for."""

    def __init__(self, access: Access, now: float) -> None:
        self.now = now
        self._access = access
        self._names, self._packing = access.names, access.packing
        self.walk: Walk | None = None

    def forget(self) -> None:
        """Look for the keys again, when they are needed."""
        if self.walk is not None:
            self.walk.close()
            self.walk = None

    async def ask(self, *commands: Command) -> list[Reply]:
        """See `Access.ask`."""
        return await self._access.ask(*commands)

    async def _walked(self) -> Walk:
        if self.walk is None:
            self.walk = Walk(self._names)
            await self.walk.fill(self.ask)
        return self.walk

    async def rows(self, table: str) -> AsyncGenerator[Sequence[Any], None]:
        """See `Books.rows`. Looks at the names of all keys of the server first, once for all tables."""
        several: Mapping[str, Callable[[], AsyncGenerator[Sequence[Any], None]]] = {
            Table.GRANT: self._grants,
            Table.ENTRY: self._entries,
            Table.LEASE: self._leases,
            Table.EVENT: self._events,
            Table.READING: self._readings,
        }
        async with aclosing(several.get(table, partial(self._rows, table))()) as all_pages:
            async for page in all_pages:
                if page:
                    yield page

    async def _rows(self, table: str) -> AsyncGenerator[Sequence[Any], None]:
        """The rows of keys that have one each."""
        for keys in (await self._walked()).keys(_KINDS[table], PAGE_ROWS):
            found = await self.ask(*[("GET", key) for key in keys])
            yield [self._row(table, key, raw) for key, raw in zip(keys, found, strict=True) if raw is not None]

    def _row(self, table: str, key: str, raw: bytes) -> Any:
        if table == Table.ACCOUNT:
            return self._packing.account_of(key, raw)[0]
        if table == Table.HOLD:
            return self._packing.hold_of(self._names.text(key), raw)
        if table == Table.UNIT:
            return DeclaredUnit(self._names.text(key), int(raw))
        return getattr(self._packing, _DECODED[table])(key, raw)

    async def parts(self) -> list[Hold]:
        """The parts that calls have here, whose holds are in other partitions of a Cluster: as many as calls run."""
        parts: list[Hold] = []
        for keys in (await self._walked()).keys(PARTS, PAGE_ROWS):
            found = await self.ask(*[("GET", key) for key in keys])
            parts += [self._row(Table.HOLD, key, raw) for key, raw in zip(keys, found, strict=True) if raw is not None]
        return parts

    async def _grants(self) -> AsyncGenerator[list[Grant], None]:
        """Open and closed ones of an account by number, however many there are of the latter."""
        page: list[Grant] = []
        for accounts in (await self._walked()).keys(GRANTS, ACCOUNTS):
            found = await self.ask(*[("GET", key) for key in accounts])
            closed = [self._names.of_account("G", key) for key in accounts]
            texts = await self._hashes(closed)
            for key, raw in zip(accounts, found, strict=True):
                payer, unit = self._names.pair(key)
                grants = [] if raw is None else self._packing.account_of(key, raw)[1]
                known = {grant.id for grant in grants}
                for text in texts[self._names.of_account("G", key)]:
                    grant = self._packing.grant_of(payer, unit, text)
                    if grant.id not in known:
                        known.add(grant.id)
                        grants.append(grant)
                page += sorted(grants, key=lambda grant: grant.number)
            while len(page) >= PAGE_ROWS:
                yield page[:PAGE_ROWS]
                del page[:PAGE_ROWS]
        yield page

    async def _hashes(self, keys: Sequence[str]) -> dict[str, list[bytes]]:
        """All values of some hashes, by key; one may come twice."""
        found: dict[str, list[bytes]] = {key: [] for key in keys}
        cursors = dict.fromkeys(keys, b"0")
        while cursors:
            steps = await self.ask(*[("HSCAN", key, cursor, "COUNT", PAGE_ROWS) for key, cursor in cursors.items()])
            for key, (cursor, some) in zip(list(cursors), steps, strict=True):
                found[key] += some[1::2]
                cursors[key] = cursor
                if cursor == b"0":
                    del cursors[key]
        return found

    async def _entries(self) -> AsyncGenerator[list[Entry], None]:
        for keys in (await self._walked()).keys("e", ACCOUNTS):
            lengths = await self.ask(*[("LLEN", key) for key in keys])
            for some in _in_pages(list(zip(keys, lengths, strict=True))):
                ranges = [("LRANGE", key, str(first), str(last)) for key, first, last in some]
                page: list[Entry] = []
                for (key, _, _), texts in zip(some, await self.ask(*ranges), strict=True):
                    account = self._names.account(*self._names.pair(key))
                    page += [self._packing.entry_of(account, text) for text in texts]
                yield page

    async def _leases(self) -> AsyncGenerator[list[Lease], None]:
        for keys in (await self._walked()).keys("q", 1):
            pool, first = self._names.text(keys[0]), 0
            while True:
                words = (str(first), str(first + PAGE_ROWS - 1), "WITHSCORES")
                (found,) = await self.ask(("ZRANGE", keys[0], *words))
                if not found:
                    break
                pairs = zip(found[::2], found[1::2], strict=True)
                yield [Lease(pool, restored(member.decode()), float(score)) for member, score in pairs]
                first += PAGE_ROWS

    async def _events(self) -> AsyncGenerator[list[Any], None]:
        first = 0
        while True:
            order = ("LRANGE", self._names.event_order, str(first), str(first + PAGE_ROWS - 1))
            (ids,) = await self.ask(order)
            if not ids:
                break
            (texts,) = await self.ask(("HMGET", self._names.events, *ids))
            pairs = [(restored(found.decode()), text) for found, text in zip(ids, texts, strict=True)]
            yield [self._packing.event_of(found, text) for found, text in pairs if text is not None]
            first += PAGE_ROWS

    async def _readings(self) -> AsyncGenerator[list[Any], None]:
        (found,) = await self.ask(("HGETALL", self._names.readings))
        for first in range(0, len(found), 2 * PAGE_ROWS):
            some = found[first : first + 2 * PAGE_ROWS]
            pairs = zip(some[::2], some[1::2], strict=True)
            yield [self._packing.reading_of(member.decode(), text) for member, text in pairs]

    async def counts(self) -> Mapping[str, int]:
        """See `Books.counts`. Reads grants and the names of keys; the others are counted by the server."""
        walk = await self._walked()
        counts = {table: walk.count(_KINDS[table]) if table in _KINDS else 0 for table in TABLES}
        async with aclosing(self.rows(Table.GRANT)) as pages:
            counts[Table.GRANT] = sum([len(page) async for page in pages])
        for table, kind, command in ((Table.ENTRY, "e", "LLEN"), (Table.LEASE, "q", "ZCARD")):
            for keys in walk.keys(kind, PAGE_ROWS):
                counts[table] += sum(await self.ask(*[(command, key) for key in keys]))
        counts[Table.EVENT], counts[Table.READING] = await self.ask(
            ("LLEN", self._names.event_order), ("HLEN", self._names.readings)
        )
        # What somebody writes from now on is to be noticed by whoever compares.
        self.forget()
        return counts


_DECODED: Mapping[str, str] = {
    Table.CHECKPOINT: "checkpoint_of",
    Table.ALLOWANCE: "window_of",
    Table.CHARGE_KEY: "charge_key_of",
    Table.IDEMPOTENCY: "idempotency_of",
    Table.COUNTER: "counter_of",
}


def _in_pages(lengths: Sequence[tuple[str, int]]) -> Iterator[list[tuple[str, int, int]]]:
    """Ranges of lists, some together that make a page, as (key, first, last)."""
    some: list[tuple[str, int, int]] = []
    free = PAGE_ROWS
    for key, length in lengths:
        first = 0
        while first < length:
            count = min(free, length - first)
            some.append((key, first, first + count - 1))
            first, free = first + count, free - count
            if not free:
                yield some
                some, free = [], PAGE_ROWS
    if some:
        yield some


class NamespaceFilling(NamespaceBooks, Filling):
    """The same for one who writes, and whose token closes the gate."""

    def __init__(self, access: Access, now: float, token: str) -> None:
        super().__init__(access, now)
        self._token = token
        self._was_empty = False
        self._is_over = False
        self._renewed_at = time.monotonic()

    async def look(self) -> None:
        """Learn whether there is anything yet."""
        self._was_empty = True
        async with aclosing(keys_of(self.ask, self._names)) as pages:
            async for keys in pages:
                if any(map(self.is_kept, keys)):
                    self._was_empty = False
                    break

    def is_kept(self, key: str) -> bool:
        """Whether *key* is anything that is kept, and no gate."""
        return self._names.kind(key) not in ("gate", "halt")

    async def ask(self, *commands: Command) -> list[Reply]:
        """The same, behind the gate."""
        await self.keep_alone()
        return await super().ask(*commands)

    async def keep_alone(self) -> None:
        """Keep the gate closed, if it has been for long: half of its time is left for what may take long in between."""
        if time.monotonic() - self._renewed_at > ALONE_S / 2:
            await self._alone(_nothing)

    async def _alone(self, work: Any) -> Any:
        try:
            done = await self._access.transactions.run_alone(self._token, ALONE_S, work)
        except driver().exceptions.ResponseError as error:
            raise self._access.meaning(error) from error
        self._renewed_at = time.monotonic()
        return done

    async def put(self, table: str, rows: Sequence[Any]) -> int:
        """
        See `Filling.put`. What is put is kept at once; a row that cannot be kept takes all with it that was put into an
        empty namespace, since no repetition would complete it.
        """
        if self._is_over:
            raise StoreUnavailableError("The filling of the Redis store is over. Begin again.")
        self.forget()
        new = 0
        self._is_over = True
        try:
            for first in range(0, len(rows), PUT_ROWS):
                new += await self._alone(partial(put, table, rows[first : first + PUT_ROWS]))
        except _UNPACKABLE as error:
            if self._was_empty:
                await self._clear()
            raise _unwritable(table, error) from error
        except UnwritableError:
            if self._was_empty:
                await self._clear()
            raise
        self._is_over = False
        return new

    async def _clear(self) -> None:
        """Take back what was put."""
        async with aclosing(keys_of(self.ask, self._names)) as pages:
            async for keys in pages:
                gone = [key for key in keys if self.is_kept(key)]
                if gone:
                    await self.ask(("UNLINK", *gone))


async def _nothing(_: WorkingCopy) -> tuple[None, list[Change]]:
    return None, []


def _unwritable(table: str, error: Exception) -> UnwritableError:
    said = str(error).rstrip(".")
    return UnwritableError(f"A row of {table!r} cannot be kept on Redis: {said}. Mend it where it comes from.")

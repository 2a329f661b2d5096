"""
Volumes: the books of all partitions of a Cluster, as one.

What a call has in several partitions is put together on its way out, and laid apart again on its way in: rows say
themselves where they belong. Reads each node's keys once, whatever partitions they are of. Knows rows, and nothing of
what is done with them.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from functools import partial
from heapq import heapify, heappop, heapreplace
from operator import attrgetter
from typing import Any, NamedTuple

from asgi_metering.errors import StoreUnavailableError, UnwritableError
from asgi_metering.rules.state import Hold, IdempotencyKey, Lease, Table
from asgi_metering.stores.contract import PAGE_ROWS, TABLES, Books, Filling
from asgi_metering.stores.redis.books import NamespaceBooks, NamespaceFilling, kept_alone, opened_books
from asgi_metering.stores.redis.gathering import by_call, whole
from asgi_metering.stores.redis.link import Command, Link, Reply
from asgi_metering.stores.redis.nodes import Nodes
from asgi_metering.stores.redis.partitions import NOWHERE, Partitions
from asgi_metering.stores.redis.parts import apart, call_of, is_part, part_of
from asgi_metering.stores.redis.shelf import Shelf
from asgi_metering.stores.redis.store import meaning
from asgi_metering.stores.redis.walking import Walk, keys_like

__all__ = ["Library", "opened_volumes", "refilled_volumes"]

COMMON = 0
"""The partition of what is nobody's: units, and the outbox as it came, so that it keeps its order."""


class Library(NamedTuple):
    """
    Where the volumes are.

    Attributes:
        namespace: Of all of them.
        partitions: What is where.
        shelves: By number.
        nodes: For the loop that runs.
    """

    namespace: str
    partitions: Partitions
    shelves: Sequence[Shelf]
    nodes: Nodes


@asynccontextmanager
async def opened_volumes(library: Library) -> AsyncIterator[Books]:
    """All rows of the namespace, until the block is left. Raises `StoreUnavailableError`."""
    async with AsyncExitStack() as stack:
        books = [await stack.enter_async_context(opened_books(shelf.access())) for shelf in library.shelves]
        yield _Volumes(library, books)


@asynccontextmanager
async def refilled_volumes(library: Library) -> AsyncIterator[Filling]:
    """The namespace, kept for one who fills it. Raises `StoreContendedError`, `StoreUnavailableError`."""
    async with AsyncExitStack() as stack:
        fillings = [await stack.enter_async_context(kept_alone(shelf.access())) for shelf in library.shelves]
        filling = _Refilled(library, fillings)
        await filling.look()
        yield filling


class _Volumes(Books):
    """Rows of the keys that are there when they are first looked for."""

    def __init__(self, library: Library, each: Sequence[NamespaceBooks]) -> None:
        self.now = max(books.now for books in each)
        self._library = library
        self._each = each
        self._parts: dict[str, list[Hold]] = {}
        self._lost: set[str] = set()

    # -- keys ----------------------------------------------------------------------------------------------

    async def keys(self) -> AsyncGenerator[tuple[int, list[str]], None]:
        """
        All keys, some of each partition at a time.

        Raises:
            StoreUnavailableError: No answer came, or a slot has moved meanwhile.
        """
        library = self._library
        by_prefix = {shelf.names.prefix: place for place, shelf in enumerate(library.shelves)}
        before = await library.nodes.looked_up()
        for link in await library.nodes.every():
            async with aclosing(keys_like(partial(_asked, link), f"{{{library.namespace}:*")) as pages:
                async for keys in pages:
                    by_place: dict[int, list[str]] = {}
                    for key in keys:
                        place = by_prefix.get(key[: key.find("}") + 2])
                        if place is not None:
                            by_place.setdefault(place, []).append(key)
                    for place, some in by_place.items():
                        yield place, some
        if await library.nodes.looked_up() != before:
            raise StoreUnavailableError("A slot of the Cluster has moved while the keys were read. Begin again.")

    async def _walk(self) -> None:
        """Know all keys, and what calls have in other partitions than their holds."""
        if all(books.walk is not None for books in self._each):
            return
        walks = [Walk(shelf.names) for shelf in self._library.shelves]
        for books, walk in zip(self._each, walks, strict=True):
            books.forget()
            books.walk = walk
        async with aclosing(self.keys()) as found:
            async for place, keys in found:
                await walks[place].take(self._each[place].ask, keys)
        parts = [part for books in self._each for part in await books.parts()]
        self._parts = by_call(parts)
        waiting = [part for part in parts if part.idempotency_key]
        homes = await self._homes([call_of(part.id) for part in waiting])
        self._lost = {part.idempotency_key for part in waiting if call_of(part.id) not in homes}

    async def _homes(self, calls: Sequence[str]) -> dict[str, int]:
        """The partitions that have the holds of *calls*; none of a call that is nowhere."""
        homes: dict[str, int] = {}
        for place, shelf in enumerate(self._library.shelves):
            left = [call for call in calls if call not in homes]
            if left:
                found = zip(left, await shelf.calls(left), strict=True)
                homes |= {call: place for call, (hold, _) in found if hold is not None}
        return homes

    # -- rows ----------------------------------------------------------------------------------------------

    async def rows(self, table: str) -> AsyncGenerator[Sequence[Any], None]:
        """See `Books.rows`. Looks at the names of all keys of all nodes first, once for all tables."""
        await self._walk()
        order = _ORDERED.get(table)
        streams = [books.rows(table) for books in self._each]
        async with aclosing(_chained(streams) if order is None else _in_order(streams, order)) as all_pages:
            async for page in all_pages:
                told = self._told(table, page)
                if told:
                    yield told

    def _told(self, table: str, page: Sequence[Any]) -> Sequence[Any]:
        """Rows as a store that has all in one place keeps them."""
        match table:
            case Table.HOLD:
                return [whole(hold, self._parts[hold.id]) if hold.id in self._parts else hold for hold in page]
            case Table.LEASE:
                return [lease._replace(id=call_of(lease.id)) for lease in page]
            case Table.IDEMPOTENCY:
                # The key of a call that never came to be is free.
                return [row._replace(call=call_of(row.call)) for row in page if not self._is_lost(row)]
            case _:
                return page

    def _is_lost(self, row: IdempotencyKey) -> bool:
        return row.key in self._lost and row.receipt is None and is_part(row.call)

    async def counts(self) -> Mapping[str, int]:
        """See `NamespaceBooks.counts`."""
        await self._walk()
        counts = dict.fromkeys(TABLES, 0)
        if self._lost:
            async with aclosing(self.rows(Table.IDEMPOTENCY)) as pages:
                known = sum([len(page) async for page in pages])
        for books in self._each:
            for table, count in (await books.counts()).items():
                counts[table] += count
        if self._lost:
            counts[Table.IDEMPOTENCY] = known
        return counts


_account = attrgetter("payer", "unit")

_ORDERED: Mapping[str, Callable[[Any], Any]] = {
    **dict.fromkeys((Table.ACCOUNT, Table.CHECKPOINT, Table.GRANT, Table.ALLOWANCE, Table.ENTRY), _account),
    Table.HOLD: attrgetter("created_at"),
    Table.EVENT: attrgetter("at"),
}
"""By what the rows of the partitions come; an account is in one, and so is the order within it."""


async def _asked(link: Link, *commands: Command) -> list[Reply]:
    """What one node answers."""
    replies = await link.exchange(commands)
    for reply in replies:
        if isinstance(reply, Exception):
            raise meaning(reply)
    return replies


async def _chained(streams: Iterable[AsyncGenerator[Sequence[Any], None]]) -> AsyncGenerator[Sequence[Any], None]:
    for stream in streams:
        async with aclosing(stream) as pages:
            async for page in pages:
                yield page


async def _in_order(
    streams: Iterable[AsyncGenerator[Sequence[Any], None]], key: Callable[[Any], Any]
) -> AsyncGenerator[list[Any], None]:
    """The rows of *streams*, each of which is in the order of *key*, in that order."""
    async with AsyncExitStack() as stack:
        sources = [_singly(await stack.enter_async_context(aclosing(stream))) for stream in streams]
        heads = [(key(row), place, row) for place, source in enumerate(sources) async for row in _first(source)]
        heapify(heads)
        page: list[Any] = []
        while heads:
            _, place, row = heads[0]
            page.append(row)
            if len(page) == PAGE_ROWS:
                yield page
                page = []
            following = await anext(sources[place], None)
            if following is None:
                heappop(heads)
            else:
                heapreplace(heads, (key(following), place, following))
        yield page


async def _singly(pages: AsyncGenerator[Sequence[Any], None]) -> AsyncGenerator[Any, None]:
    async for page in pages:
        for row in page:
            yield row


async def _first(rows: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    row = await anext(rows, None)
    if row is not None:
        yield row


class _Refilled(_Volumes, Filling):
    """The same for one who writes."""

    _each: Sequence[NamespaceFilling]

    def __init__(self, library: Library, each: Sequence[NamespaceFilling]) -> None:
        super().__init__(library, each)
        self._was_empty = True
        self._is_over = False

    async def look(self) -> None:
        """Learn whether there is anything yet."""
        async with aclosing(self.keys()) as found:
            async for place, keys in found:
                if any(map(self._each[place].is_kept, keys)):
                    self._was_empty = False
                    break

    async def _keep_alone(self) -> None:
        for filling in self._each:
            await filling.keep_alone()

    async def rows(self, table: str) -> AsyncGenerator[Sequence[Any], None]:
        """See `Books.rows`."""
        async with aclosing(super().rows(table)) as pages:
            async for page in pages:
                await self._keep_alone()
                yield page

    async def put(self, table: str, rows: Sequence[Any]) -> int:
        """See `NamespaceFilling.put`. What a call took elsewhere is put before its hold, which is never without."""
        if self._is_over:
            raise StoreUnavailableError("The filling of the Redis store is over. Begin again.")
        self._is_over = True
        await self._keep_alone()
        try:
            new = await self._put(table, rows)
        except UnwritableError:
            if self._was_empty:
                await self._clear()
            raise
        self._is_over = False
        return new

    async def _put(self, table: str, rows: Sequence[Any]) -> int:
        if table == Table.HOLD:
            laid = [(home, *apart(hold, home, self._of_key)) for hold in rows for home in [self._of(hold.payer)]]
            parts = [(place, part) for _, _, its_parts in laid for place, part in its_parts.items()]
            await self._put_each(table, parts)
            return await self._put_each(table, [(home, own) for home, own, _ in laid])
        return await self._put_each(table, await self._placed(table, rows))

    @property
    def _of(self) -> Callable[[str], int]:
        return self._library.partitions.of

    @property
    def _of_key(self) -> Callable[[str], int]:
        return self._library.partitions.of_key

    async def _put_each(self, table: str, placed: Iterable[tuple[int, Any]]) -> int:
        by_place: dict[int, list[Any]] = {}
        for place, row in placed:
            by_place.setdefault(place, []).append(row)
        new = 0
        for place, some in by_place.items():
            if table == Table.LEASE:
                some = await self._whose(place, some, [row.id for row in some], _leased)
            elif table == Table.IDEMPOTENCY:
                some = await self._whose(place, some, [row.call for row in some], _claimed)
            new += await self._each[place].put(table, some)
        return new

    async def _whose(
        self, place: int, rows: list[Any], calls: Sequence[str], of_part: Callable[[Any, Hold], Any]
    ) -> list[Any]:
        """*rows* as those of the parts that calls have at *place*, where they have one."""
        found = await self._library.shelves[place].calls(calls)
        return [row if part is None else of_part(row, part) for row, (_, part) in zip(rows, found, strict=True)]

    async def _placed(self, table: str, rows: Sequence[Any]) -> list[tuple[int, Any]]:
        match table:
            case Table.UNIT | Table.EVENT | Table.READING:
                return [(COMMON, row) for row in rows]
            case Table.COUNTER | Table.IDEMPOTENCY:
                return [(self._of_key(row.key), row) for row in rows]
            case Table.LEASE:
                return [(self._of_key(row.pool), row) for row in rows]
            case Table.CHARGE_KEY:
                # With the hold that it owns, whoever pays that: its calls end there.
                homes = await self._homes([row.hold for row in rows])
                asked = [self._library.partitions.charged_at(row.key) for row in rows]
                else_at = [COMMON if place == NOWHERE else place for place in asked]
                return [(homes.get(row.hold, place), row) for row, place in zip(rows, else_at, strict=True)]
            case _:
                return [(self._of(row.payer), row) for row in rows]

    async def _clear(self) -> None:
        """Take back what was put."""
        async with aclosing(self.keys()) as found:
            async for place, keys in found:
                filling = self._each[place]
                gone = [key for key in keys if filling.is_kept(key)]
                if gone:
                    await filling.ask(("UNLINK", *gone))


def _leased(lease: Lease, part: Hold) -> Lease:
    return lease._replace(id=part_of(lease.id)) if lease.pool in part.pools else lease


def _claimed(row: IdempotencyKey, part: Hold) -> IdempotencyKey:
    return row._replace(call=part_of(row.call)) if part.idempotency_key == row.key else row

"""
Out of a store into a file, and out of a file into a store.

What is moved are the rows as they are: amounts, windows, holds with their lives, keys, receipts, ledger, outbox. Times
are absolute, so nothing is converted; the new store's clock goes on where the rows are. Knows no kind of store.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from asgi_metering._version import __version__
from asgi_metering.errors import ConfigurationError, StoreContendedError, StoreError
from asgi_metering.stores.contract import PAGE_ROWS, Books, Filling, Store
from asgi_metering.stores.moving.files import BookFile, NewFile, Verified, verify
from asgi_metering.stores.moving.lines import FORMAT, Header, Tally, lines_of
from asgi_metering.stores.moving.walk import Page, Proof, walk

__all__ = ["Moved", "export_books", "import_books"]

KNOWN_ROWS = 200_000
"""Rows of an interrupted import that are looked for at once in its file: some 100 MB."""


class Moved(NamedTuple):
    """
    What was moved.

    Attributes:
        counts: Rows, by table.
        accounts: How many accounts were proven.
        discrepancies: A sentence for each thing that is wrong with them; none is the proof.
        one_instant: Whether all rows are of one instant, whatever was written meanwhile.
        new: Rows that were not there before; all of them, unless an import was resumed.
        backup: Where the file is kept that stood in the place of the new one, if there was one.
    """

    counts: Mapping[str, int]
    accounts: int
    discrepancies: list[str]
    one_instant: bool = True
    new: int = 0
    backup: Path | None = None


async def export_books(store: Store, path: str | PathLike[str]) -> Moved:
    """
    Write everything that *store* keeps into a file, and prove that the books in it balance.

    Args:
        store: Open. Others may go on using it where the rows are of one instant (`Books.one_instant`); what they write
            meanwhile is not in the file, so stop them before the last export of a move.
        path: The file. What stands there is kept beside it, with the time in its name. It appears when it is whole.

    Raises:
        ConfigurationError: The file cannot be written, or the store cannot be moved from.
        StoreContendedError: Others wrote meanwhile, and the store cannot be read at one instant.
        StoreUnavailableError: No answer came.
        UnwritableError: A row cannot be told in JSON.

    Memory: pages, one account without its ledger, and the calls in flight.
    """
    async with store.books() as books:
        counts = await books.counts()
        header = Header(FORMAT, __version__, store.name, store.namespace, books.now, dict(counts))
        file = await asyncio.to_thread(NewFile, Path(path), header)
        try:
            async with aclosing(_gathered(books)) as all_pages:
                async for pages in all_pages:
                    await asyncio.to_thread(file.take, pages)
            _check_still(store, counts, file.tally)
            backup = await asyncio.to_thread(file.place)
        finally:
            await asyncio.to_thread(file.discard)
        proof, rows = file.proof, file.tally.counts
        return Moved(rows, proof.accounts, proof.discrepancies, books.one_instant, sum(rows.values()), backup)


async def import_books(
    store: Store, path: str | PathLike[str], *, resume: bool = False, unbalanced: bool = False
) -> Moved:
    """
    Keep everything that a file has in *store*, which is empty, and prove that it was kept and that it balances.

    Args:
        store: Used by nobody else: where it can, it keeps others out meanwhile. Where it can, nothing is kept unless
            everything is. It is opened once the file is known to be whole.
        path: The file that `export_books` wrote. All of it is checked before anything is written.
        resume: The store may have rows already, as long as all of them are in the file: those of an import that was
            cut.
        unbalanced: Import books that did not balance where they come from, as they are.

    Raises:
        ConfigurationError: The file is cut, changed, newer than this version, or does not balance; the store has rows
            already, or cannot be moved to. Nothing was written.
        UnwritableError: A row cannot be kept there.
        StoreContendedError: Others are writing.
        StoreUnavailableError: No answer came. Where the store has no transactions, resume.
        StoreError: What the store kept is not what is in the file.
    """
    file = await asyncio.to_thread(BookFile, Path(path))
    verified = await asyncio.to_thread(verify, file)
    if verified.proof.discrepancies and not unbalanced:
        raise ConfigurationError(
            f"The books in {file.name!r} do not balance, so nothing was imported: {verified.proof.discrepancies[0]} "
            f"Export them with every writer stopped, or import them as they are: unbalanced."
        )
    await store.open()
    async with store.fill() as filling:
        await _check_free(store, filling, file, resume=resume)
        new = 0
        async for pages in _paged(file.pages()):
            for page in pages:
                new += await filling.put(page.table, page.rows)
        proof = await _check_kept(store, filling, verified)
    return Moved(verified.trailer.counts, proof.accounts, proof.discrepancies, new=new)


async def _gathered(books: Books) -> AsyncGenerator[list[Page], None]:
    """All pages of *books*, as many at a time as make a large one: most accounts have few rows."""
    pages: list[Page] = []
    rows = 0
    async with aclosing(walk(books)) as walked:
        async for page in walked:
            pages.append(page)
            rows += len(page.rows)
            if rows >= PAGE_ROWS:
                yield pages
                pages, rows = [], 0
    if pages:
        yield pages


async def _paged(pages: Iterator[list[Page]]) -> AsyncGenerator[list[Page], None]:
    """What a file has, read in a thread."""
    while several := await asyncio.to_thread(next, pages, None):
        yield several


def _check_still(store: Store, counts: Mapping[str, int], tally: Tally) -> None:
    changed = [table for table, count in counts.items() if tally.counts[table] != count]
    if changed:
        raise StoreContendedError(
            f"The {store.name} store was written to while it was read: there were {counts[changed[0]]} rows of "
            f"{changed[0]!r}, and {tally.counts[changed[0]]} came. Stop whoever uses it, and export again."
        )


async def _check_free(store: Store, filling: Filling, file: BookFile, *, resume: bool) -> None:
    """
    Check that the store is empty; or, with *resume*, that it has nothing but rows of the file.

    Raises:
        ConfigurationError: It has others.
    """
    counts = {table: count for table, count in (await filling.counts()).items() if count}
    if not counts:
        return
    if not resume:
        told = ", ".join(f"{count} of {table!r}" for table, count in counts.items())
        raise ConfigurationError(
            f"The {store.name} store is not empty, so nothing was imported: it has {told}. Import into an empty one; "
            f"or, where those are of an import of this very file that was cut, resume it."
        )
    known: set[bytes] = set()
    async with aclosing(_gathered(filling)) as all_pages:
        async for pages in all_pages:
            known.update(line for page in pages for line in lines_of(page))
            if len(known) >= KNOWN_ROWS:
                await _check_known(store, file, known)
                known = set()
    await _check_known(store, file, known)


async def _check_known(store: Store, file: BookFile, known: set[bytes]) -> None:
    await asyncio.to_thread(lambda: known.difference_update(line for _, line in file.lines()))
    if known:
        raise ConfigurationError(
            f"The {store.name} store has rows that are not in {file.name!r}, so nothing was imported: "
            f"{min(known)[:200].decode()!r} is one of {len(known)}. Import into an empty one."
        )


async def _check_kept(store: Store, filling: Filling, verified: Verified) -> Proof:
    """
    Read everything back: the same rows, and what they prove.

    Raises:
        StoreError: They are other rows than those of the file.
    """
    tally, proof = Tally(), Proof()

    def take(pages: list[Page]) -> None:
        for page in pages:
            tally.add(page.table, lines_of(page))
            proof.take(page)

    async with aclosing(_gathered(filling)) as all_pages:
        async for pages in all_pages:
            await asyncio.to_thread(take, pages)
    proof.finish()
    other = [table for table, total in verified.trailer.sums.items() if tally.sums[table] != total]
    if other:
        raise StoreError(
            f"The {store.name} store keeps other rows of {other[0]!r} than the file has: {tally.counts[other[0]]}, and "
            f"{verified.trailer.counts[other[0]]} there. Make sure that nobody else uses it, and import into an empty "
            f"one."
        )
    return proof

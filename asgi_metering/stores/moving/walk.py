"""
The order in which books are moved, and the proof that they balance, which goes along.

An account stands with all of its rows in one place, so that it is proven as it passes: what is kept in memory is one
account without its ledger, one page, and the calls in flight. Knows rows; no file, and no store.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Any, NamedTuple

from asgi_metering.receipts import Entry
from asgi_metering.rules.conservation import LedgerProof, discrepancies
from asgi_metering.rules.state import Account, AccountKey, AllowanceWindow, Checkpoint, Grant, Hold, Table
from asgi_metering.stores.contract import TABLES, Books

__all__ = ["Page", "Proof", "walk"]

BY_ACCOUNT = (Table.ACCOUNT, Table.CHECKPOINT, Table.GRANT, Table.ALLOWANCE, Table.ENTRY)
"""The tables whose rows begin with payer and unit, as they follow each other within an account."""

MAX_SENTENCES = 100
"""Discrepancies that are told; more of them say nothing new."""


class Page(NamedTuple):
    """Some rows of one table."""

    table: str
    rows: Sequence[Any]


async def walk(books: Books) -> AsyncGenerator[Page, None]:
    """All rows of *books*: units and holds, account by account, then the rest. Raises as `Books.rows`."""
    for table in TABLES:
        if table == BY_ACCOUNT[0]:
            async with aclosing(_accounts(books)) as pages:
                async for page in pages:
                    yield page
        elif table not in BY_ACCOUNT:
            async with aclosing(books.rows(table)) as several:
                async for rows in several:
                    yield Page(table, rows)


async def _accounts(books: Books) -> AsyncGenerator[Page, None]:
    """The rows of `BY_ACCOUNT`, each table read once, merged by account."""
    async with AsyncExitStack() as stack:
        heads = [_Head(t, await stack.enter_async_context(aclosing(books.rows(t)))) for t in BY_ACCOUNT]
        while keys := [key for key in [await head.key() for head in heads] if key is not None]:
            account = min(keys)
            for head in heads:
                while await head.key() == account:
                    yield head.take(account)


class _Head:
    """What comes next of one table."""

    def __init__(self, table: str, pages: AsyncGenerator[Sequence[Any], None]) -> None:
        self._table = table
        self._pages = pages
        self._rows: Sequence[Any] = ()
        self._at = 0

    async def key(self) -> AccountKey | None:
        """The account of the next row; None behind the last one."""
        if self._at == len(self._rows):
            self._rows, self._at = await _next_of(self._pages), 0
        return _account_of(self._rows[self._at]) if self._rows else None

    def take(self, account: AccountKey) -> Page:
        """The next rows, as far as they are of *account* and read."""
        first = self._at
        self._at = bisect_right(self._rows, account, lo=first, key=_account_of)
        return Page(self._table, self._rows[first : self._at])


async def _next_of(pages: AsyncGenerator[Sequence[Any], None]) -> Sequence[Any]:
    async for page in pages:
        return page
    return ()


def _account_of(row: Any) -> AccountKey:
    payer, unit = row[:2]
    return payer, unit


class Proof:
    """
    Conservation of the accounts that pass, each proven from its rows (`rules.conservation`).

    Attributes:
        accounts: How many have passed.
        discrepancies: A sentence for each thing that is wrong, `MAX_SENTENCES` at most; none is the proof.
    """

    def __init__(self) -> None:
        self.accounts = 0
        self.discrepancies: list[str] = []
        self._live: dict[AccountKey, list[Hold]] = {}
        self._key: AccountKey | None = None

    def take(self, page: Page) -> None:
        """Take the next rows, as `walk` orders them."""
        if page.table == Table.HOLD:
            for hold in page.rows:
                if hold.receipt is None:
                    # Facts may be large, and prove nothing.
                    self._live.setdefault((hold.payer, hold.unit), []).append(hold._replace(facts={}))
        elif page.table in BY_ACCOUNT:
            for row in page.rows[:1]:
                self._turn_to(_account_of(row))
            self._take(page)

    def finish(self) -> None:
        """Say that no more rows come."""
        self._turn_to(None)
        for key in list(self._live):
            # Calls in flight of an account that has no rows.
            self._turn_to(key)
            self._turn_to(None)

    def _turn_to(self, key: AccountKey | None) -> None:
        if key == self._key:
            return
        if self._key is not None:
            self._prove(self._key)
        self._key = key
        self._account: Account | None = None
        self._checkpoint: Checkpoint | None = None
        self._grants: list[Grant] = []
        self._windows: list[AllowanceWindow] = []
        self._ledger: LedgerProof | None = None

    def _take(self, page: Page) -> None:
        match page.table:
            case Table.ACCOUNT:
                (self._account,) = page.rows
            case Table.CHECKPOINT:
                (self._checkpoint,) = page.rows
            case Table.GRANT:
                self._grants.extend(page.rows)
            case Table.ALLOWANCE:
                self._windows.extend(page.rows)
            case _:
                self._proof_of_ledger(page.rows)

    def _proof_of_ledger(self, entries: Sequence[Entry]) -> LedgerProof:
        if self._ledger is None:
            payer, unit = self._key or ("", "")
            self._ledger = LedgerProof(self._account or Account(payer, unit), self._checkpoint)
        self._ledger.take(entries)
        return self._ledger

    def _prove(self, key: AccountKey) -> None:
        account = self._account or Account(*key)
        live = self._live.pop(key, [])
        wrong = discrepancies(account, self._grants, live, self._windows)
        wrong += self._proof_of_ledger(()).discrepancies(self._grants)
        self.accounts += self._account is not None
        self.discrepancies.extend(wrong[: MAX_SENTENCES - len(self.discrepancies)])

"""
Walking: all keys of a namespace, in the order in which books are read.

The server keeps most of them in no order, and counts by no prefix: they are looked through in steps that block nobody,
and put in order here, in a private file of this process where they are many. Does not know what a row says.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from itertools import chain
from typing import Any

from asgi_metering.errors import StoreUnavailableError
from asgi_metering.stores.redis.link import Command, Reply
from asgi_metering.stores.redis.names import Names
from asgi_metering.stores.redis.packed import HOLD
from asgi_metering.stores.redis.parts import is_part

__all__ = ["GRANTS", "PARTS", "Ask", "Walk", "keys_like", "keys_of"]

Ask = Callable[..., Awaitable[list[Reply]]]
"""Asks the server several commands at once, and raises the first error."""

SCANNED = 1_000
"""Keys that the server looks at in one step: some hundred microseconds."""

GRANTS = "g"
"""What accounts that have grants are known by, open or closed ones: no letter of a key."""

PARTS = "part"
"""What parts of calls, on a Cluster, are known by: they are kept as holds, and are none of the books."""

_BY_TEXTS = ("a", "G", "p", "e", "w")
"""What is ordered by the texts of its key."""

_PLAIN = ("c", "k", "i", "u", "q")

_CREATE = "CREATE TABLE walked (kind, a, b, c, d, key, PRIMARY KEY (kind, a, b, c, d)) WITHOUT ROWID"


async def keys_of(ask: Ask, names: Names) -> AsyncGenerator[list[str], None]:
    """
    All keys of the namespace, some of them twice: those that are there from the first step to the last.

    Raises:
        StoreUnavailableError: No answer came, or another server did: what it walked through is not this one's.
    """
    async with aclosing(keys_like(ask, f"{names.prefix}*")) as pages:
        async for keys in pages:
            yield keys


async def keys_like(ask: Ask, pattern: str) -> AsyncGenerator[list[str], None]:
    """The same of all keys like *pattern*."""
    server = await _run_of(ask)
    cursor = b"0"
    while True:
        scan: Command = ("SCAN", cursor, "MATCH", pattern, "COUNT", SCANNED)
        ((cursor, found),) = await ask(scan)
        if found:
            yield [key.decode() for key in found]
        if cursor == b"0":
            break
    if await _run_of(ask) != server:
        raise StoreUnavailableError("Another Redis server has taken over while the keys were read. Begin again.")


async def _run_of(ask: Ask) -> bytes:
    """Which process of a server answers; every one the same where it does not tell."""
    (info,) = await ask(("INFO", "server"))
    return next((line for line in info.splitlines() if line.startswith(b"run_id:")), b"")


class Walk:
    """
    The keys of a namespace by kind and order, as they were when they were taken.

    Memory: some megabytes; what is more lies in a file without a name, which ends with this.
    """

    def __init__(self, names: Names) -> None:
        self._names = names
        self._base = sqlite3.connect("", isolation_level=None)
        self._base.execute("PRAGMA journal_mode = OFF")
        self._base.execute(_CREATE)

    async def fill(self, ask: Ask) -> None:
        """Take all keys. Raises as `keys_of`."""
        async with aclosing(keys_of(ask, self._names)) as pages:
            async for keys in pages:
                await self.take(ask, keys)

    async def take(self, ask: Ask, keys: Sequence[str]) -> None:
        """Take some keys. Raises `StoreUnavailableError`."""
        holds = [key for key in keys if self._names.kind(key) == "h"]
        began = await ask(*[("GETRANGE", key, "0", str(HOLD.size - 1)) for key in holds])
        times = {key: HOLD.unpack(raw)[6] for key, raw in zip(holds, began, strict=True) if raw}
        rows = chain.from_iterable(self._placed(key, times) for key in keys)
        self._base.executemany("INSERT OR IGNORE INTO walked VALUES (?, ?, ?, ?, ?, ?)", list(rows))

    def _placed(self, key: str, times: dict[str, float]) -> Iterator[Sequence[Any]]:
        kind = self._names.kind(key)
        if kind in _BY_TEXTS:
            payer, unit, *window = self._names.texts(key)
            name, start = window or ("", "0")
            yield kind, payer, unit, name, float(start), key
            if kind in ("a", "G"):
                yield GRANTS, payer, unit, "", 0.0, self._names.account(payer, unit)
        elif kind == "h":
            if key in times:
                yield PARTS if is_part(self._names.text(key)) else kind, times[key], key, "", 0.0, key
        elif kind in _PLAIN:
            yield kind, key, "", "", 0.0, key

    def keys(self, kind: str, count: int) -> Iterator[list[str]]:
        """The keys of one kind, up to *count* at a time."""
        found = self._base.execute("SELECT key FROM walked WHERE kind = ? ORDER BY a, b, c, d", (kind,))
        while page := found.fetchmany(count):
            yield [key for (key,) in page]

    def count(self, kind: str) -> int:
        """How many keys of one kind there are."""
        return int(self._base.execute("SELECT count(*) FROM walked WHERE kind = ?", (kind,)).fetchone()[0])

    def close(self) -> None:
        """Forget all of it."""
        self._base.close()

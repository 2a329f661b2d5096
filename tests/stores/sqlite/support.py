"""What tests of the SQLite store start with: a file, and a story that is played on it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from asgi_metering.rules.operations import PostGrant
from asgi_metering.stores.contract import AccountRows
from asgi_metering.stores.sqlite import SQLiteStore

__all__ = ["available", "grant", "nothing", "play"]


def play(path: Path, scene: Callable[[SQLiteStore], Awaitable[None]], **settings: Any) -> None:
    """Play *scene* on a store that is opened before and closed after it."""

    async def opened() -> None:
        store = SQLiteStore(path, **{"synchronous": "OFF", **settings})
        await store.open()
        try:
            await scene(store)
        finally:
            await store.close()

    asyncio.run(opened())


def grant(grant_id: str = "g", amount: int = 100) -> PostGrant:
    """A grant to the one payer of these tests."""
    return PostGrant(grant_id, "p", "credits", amount)


async def available(store: SQLiteStore) -> int:
    """What the one payer has left."""
    return (await store.read(AccountRows("p", "credits"))).state.accounts["p", "credits"].available


async def nothing(store: SQLiteStore) -> None:
    """Nothing to do with an open store."""

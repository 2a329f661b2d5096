"""The store contract: the verbs that it brings over `run`."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from asgi_metering.errors import IdempotencyConflictError
from asgi_metering.receipts import Basis
from asgi_metering.rules.operations import Admit, End, PostGrant, Renew, WalletSource
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.stores.sqlite import SQLiteStore
from asgi_metering.testing.clock import FakeClock


def test_verbs_answer_each_operation() -> None:
    """Each verb answers its operations in their order, with answers of its own kind."""

    async def scene() -> None:
        store = MemoryStore(FakeClock())
        (posted,) = await store.post([PostGrant("g", "p", "credits", 10)])
        asks = [Admit(call, "p", "credits", 6, 6, (WalletSource(),)) for call in ("a", "b")]
        first, second = await store.admit(asks)
        beats = await store.renew([Renew("a"), Renew("b")])
        (receipt,) = await store.end([End("a", 6, Basis.USAGE)])
        assert (posted.available, first.admitted, second.admitted) == (10, True, False)
        assert (beats, receipt.amount) == ([True, False], 6)

    asyncio.run(scene())


def test_verb_raises_the_first_mistake() -> None:
    """A verb raises a mistake that `run` would answer."""

    async def scene() -> None:
        store = MemoryStore(FakeClock())
        with pytest.raises(IdempotencyConflictError):
            await store.post([PostGrant("g", "p", "credits", 10), PostGrant("g", "p", "credits", 11)])

    asyncio.run(scene())


def test_run_now_on_a_store_that_waits(tmp_path: Path) -> None:
    """A store that cannot answer at once says how to ask it."""
    store = SQLiteStore(tmp_path / "m.db")
    with pytest.raises(TypeError, match="The sqlite store cannot answer at once"):
        store.run_now(Renew("a"))


def test_stores_say_what_they_are(tmp_path: Path) -> None:
    """A store says whether it answers at once, outlives its process, and may be shared: the startup audit reads it."""
    memory, sqlite = MemoryStore(), SQLiteStore(tmp_path / "m.db")
    assert (memory.name, memory.immediate, memory.durable, memory.shared) == ("memory", True, False, False)
    assert (sqlite.name, sqlite.immediate, sqlite.durable, sqlite.shared) == ("sqlite", False, True, True)

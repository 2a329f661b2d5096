"""Books into PostgreSQL and out of it: any state, while others work, and what it cannot keep."""

from __future__ import annotations

import asyncio
import tempfile
from itertools import count
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asgi_metering.errors import StoreContendedError, StoreUnavailableError, UnwritableError
from asgi_metering.rules.operations import PostGrant
from asgi_metering.rules.state import Event, Grant, Table
from asgi_metering.stores.contract import EverythingKept, Store
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.stores.moving import export_books, import_books
from asgi_metering.stores.postgres import PostgresStore
from asgi_metering.stores.sqlite import SQLiteStore
from asgi_metering.testing.clock import FakeClock
from asgi_metering.testing.conformance import tables
from tests.harness.postgres import PostgresServer
from tests.stores.operations import CLOCK_STEPS_S, operations

_numbers = count(1)

GRANT = Grant("p", "credits", "g", 5, 0, 1.0, 2e9, 1)


async def _opened(server: PostgresServer, schema: str, clock: FakeClock | None = None) -> PostgresStore:
    store = PostgresStore(server.url(), namespace=schema, clock=clock, migrate=True, busy_timeout_s=0.2)
    await store.open()
    return store


async def _whole(store: Store) -> dict[str, object]:
    return tables((await store.read(EverythingKept())).state)


@settings(max_examples=4, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_move_any_state_over_postgres(postgres: PostgresServer, data: st.DataObject) -> None:
    """Whatever was run, memory moved to PostgreSQL and on to SQLite is the same whole state, and its books balance."""
    schema = f"moved_{next(_numbers)}"

    async def story(folder: Path) -> None:
        clock, file = FakeClock(), folder / "books.jsonl"
        store = MemoryStore(clock)
        for _ in range(data.draw(st.integers(2, 6))):
            clock.advance(data.draw(st.sampled_from(CLOCK_STEPS_S)))
            await store.run(data.draw(operations(clock(), 12)))
        server = await _opened(postgres, schema, clock)
        sqlite = SQLiteStore(folder / "books.db", synchronous="OFF", clock=clock)
        try:
            await export_books(store, file)
            assert (await import_books(server, file)).discrepancies == []
            assert await _whole(server) == await _whole(store)
            assert (await export_books(server, file)).discrepancies == []
            await import_books(sqlite, file)
            assert await _whole(sqlite) == await _whole(store)
        finally:
            await server.close()
            await sqlite.close()

    try:
        with tempfile.TemporaryDirectory() as folder:
            asyncio.run(story(Path(folder)))
    finally:
        postgres.execute(f'DROP SCHEMA "{schema}" CASCADE')


def test_fill_keeps_others_out(postgres: PostgresServer, schema: str) -> None:
    """While a schema is filled nobody else writes it; who reads sees nothing of it until it is whole."""

    async def story() -> None:
        store = await _opened(postgres, schema)
        async with store.fill() as filling:
            await filling.put(Table.GRANT, [GRANT])
            with pytest.raises(StoreContendedError):
                await store.run([PostGrant("g", "p", "credits", 1)])
            with pytest.raises(StoreContendedError):
                await store.fill().__aenter__()
            assert not any((await _whole(store)).values())
        assert list((await _whole(store))["grant"].values()) == [GRANT]  # type: ignore[attr-defined]
        await store.close()

    asyncio.run(story())


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (GRANT._replace(actor="nul \0"), "has a NUL character"),
        (GRANT._replace(actor="\ud800"), "surrogates not allowed"),
        (GRANT._replace(amount=2**63), "out of range"),
    ],
)
def test_fill_with_what_it_cannot_keep(postgres: PostgresServer, schema: str, bad: Grant, said: str) -> None:
    """A row that PostgreSQL cannot keep is told as such, and nothing of the filling is kept."""

    async def fill(store: Store) -> None:
        async with store.fill() as filling:
            await filling.put(Table.EVENT, [Event("e", 1.0, {})])
            await filling.put(Table.GRANT, [GRANT, bad])

    async def story() -> None:
        store = await _opened(postgres, schema)
        with pytest.raises(UnwritableError, match=f"PostgreSQL cannot keep a row: .*{said}"):
            await fill(store)
        assert not any((await _whole(store)).values())
        await store.close()

    asyncio.run(story())


def test_connection_that_is_lost_in_a_filling(postgres: PostgresServer, schema: str) -> None:
    """A lost connection fails the filling, whatever is put behind it, and nothing is kept."""

    async def fill(store: Store) -> None:
        async with store.fill() as filling:
            await filling.put(Table.GRANT, [GRANT])
            postgres.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE state = 'idle in transaction'"
            )
            for _ in range(2):
                with pytest.raises(StoreUnavailableError):
                    await filling.put(Table.EVENT, [Event("e", 1.0, {})])

    async def story() -> None:
        store = await _opened(postgres, schema)
        with pytest.raises(StoreUnavailableError, match=r"is over\. Begin again"):
            await fill(store)
        assert not any((await _whole(store)).values())
        await store.close()

    asyncio.run(story())

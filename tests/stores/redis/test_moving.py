"""Books into Redis and out of it: any state, while others work, after a cut, and what it cannot keep."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable
from contextlib import aclosing
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asgi_metering.amounts import MAX_AMOUNT
from asgi_metering.errors import StoreContendedError, StoreError, StoreUnavailableError, UnwritableError
from asgi_metering.receipts import Entry, EntryKind
from asgi_metering.rules.operations import Emit, End, PostGrant
from asgi_metering.rules.state import NEVER, Account, AllowanceWindow, Event, Grant, Table
from asgi_metering.stores.contract import TABLES, EverythingKept, Store
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.stores.moving import export_books, import_books
from asgi_metering.stores.postgres import PostgresStore
from asgi_metering.stores.redis import RedisStore, ServerPlace
from asgi_metering.stores.redis.names import Names
from asgi_metering.stores.redis.walking import keys_of
from asgi_metering.stores.sqlite import SQLiteStore
from asgi_metering.testing.clock import FakeClock
from asgi_metering.testing.conformance import tables
from tests.harness.postgres import PostgresServer
from tests.harness.servers import HOST
from tests.harness.valkey import ValkeyServer, valkey
from tests.stores.operations import CLOCK_STEPS_S, operations
from tests.stores.service import Service

Maker = Callable[..., RedisStore]

_numbers = count(1)

GRANT = Grant("p", "credits", "g", 5, 0, 1.0, NEVER, 1)
LINE = Entry("p", "credits", 1, 1.0, EntryKind.GRANT, 5, "g", "", None, False, 5)


MANY = (Table.HOLD, Table.ACCOUNT, Table.GRANT, Table.ALLOWANCE, Table.ENTRY, Table.COUNTER, Table.EVENT)


async def _whole(store: Store) -> dict[str, Any]:
    """All that moves: what was delivered does not."""
    kept = tables((await store.read(EverythingKept())).state)
    del kept["delivered"]
    return kept


async def _served(operations_made: int) -> MemoryStore:
    """A store that has served for a while."""
    clock = FakeClock()
    store, service = MemoryStore(clock), Service(7, clock, whole_steps=True)
    done = 0
    while done < operations_made:
        batch = service.batch()
        await store.run(batch)
        done += len(batch)
    return store


# -- any state ---------------------------------------------------------------------------------------------


@settings(max_examples=4, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_move_any_state_over_all_stores(
    make_store: Maker, server: ValkeyServer, postgres: PostgresServer, data: st.DataObject
) -> None:
    """Whatever was run, memory moved to Redis, PostgreSQL, SQLite and Redis again is the same whole state each time."""
    schema = f"moved_on_{next(_numbers)}"

    async def story(folder: Path) -> None:
        clock, file = FakeClock(), folder / "books.jsonl"
        store: Store = MemoryStore(clock)
        for _ in range(data.draw(st.integers(2, 6))):
            clock.advance(data.draw(st.sampled_from(CLOCK_STEPS_S)))
            await store.run(data.draw(operations(clock(), 12)))
        kept = await _whole(store)
        others = (
            make_store(namespace=schema, clock=clock),
            PostgresStore(postgres.url(), namespace=schema, clock=clock, migrate=True),
            SQLiteStore(folder / "books.db", synchronous="OFF", clock=clock),
            make_store(namespace=f"{schema}-again", clock=clock),
        )
        try:
            for other in others:
                await other.open()
                assert (await export_books(store, file)).discrepancies == []
                assert (await import_books(other, file)).discrepancies == []
                assert await _whole(other) == kept
                store = other
        finally:
            for other in others:
                await other.close()

    try:
        with tempfile.TemporaryDirectory() as folder:
            asyncio.run(story(Path(folder)))
    finally:
        postgres.execute(f'DROP SCHEMA IF EXISTS "{schema}" CASCADE')


def test_move_in_small_pages(make_store: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few rows are read and written at once, all of them come, in their order, and each once."""
    for name, value in {"books.PAGE_ROWS": 3, "books.PUT_ROWS": 4, "books.ACCOUNTS": 2, "walking.SCANNED": 5}.items():
        monkeypatch.setattr(f"asgi_metering.stores.redis.{name}", value)

    async def story() -> None:
        source, file = await _served(600), tmp_path / "books.jsonl"
        redis, memory = make_store(), MemoryStore()
        await export_books(source, file)
        moved = await import_books(redis, file)
        assert min(moved.counts[table] for table in (*MANY, Table.LEASE)) > 3
        assert await _whole(redis) == await _whole(source)
        assert (await export_books(redis, file)).one_instant is False
        async with redis.books() as books:
            for table in TABLES:
                async with aclosing(books.rows(table)) as pages:
                    assert {len(page) async for page in pages} <= {1, 2, 3}
        await import_books(memory, file)
        assert await _whole(memory) == await _whole(source)
        await redis.close()

    asyncio.run(story())


def test_grants_of_one_account(make_store: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Open grants, which are kept in the order of their use, and any number of closed ones come by their number."""
    monkeypatch.setattr("asgi_metering.stores.redis.books.PAGE_ROWS", 3)
    grants = [GRANT._replace(id=f"g{n}", number=n, priority=-n, settled=0 if n % 40 == 0 else 5) for n in range(1, 122)]

    async def story() -> None:
        store = make_store()
        async with store.fill() as filling:
            await filling.put(Table.ACCOUNT, [Account("p", "credits", 605, 590)])
            assert await filling.put(Table.GRANT, grants[60:]) == 61
            assert await filling.put(Table.GRANT, grants) == 60
        async with store.books() as books, aclosing(books.rows(Table.GRANT)) as pages:
            assert [grant async for page in pages for grant in page] == grants
        await store.close()

    asyncio.run(story())


def test_put_an_earlier_window(make_store: Maker) -> None:
    """An earlier window of an allowance that comes behind a later one leaves that the last one."""
    windows = [AllowanceWindow("p", "credits", "free", start, start + 50.0) for start in (100.0, 50.0)]

    async def story() -> None:
        store = make_store()
        for window in windows:
            async with store.fill() as filling:
                assert await filling.put(Table.ALLOWANCE, [window]) == 1
        assert (await store.read(EverythingKept())).state.latest == {("p", "credits", "free"): 100.0}
        await store.close()

    asyncio.run(story())


# -- while others work -------------------------------------------------------------------------------------


def test_fill_keeps_others_out(make_store: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a namespace is filled nobody else writes it, by a script or by the rules, and nobody else fills it."""
    monkeypatch.setattr("asgi_metering.stores.redis.store.BUSY_PAUSES", 3)
    monkeypatch.setattr("asgi_metering.stores.redis.transaction.BUSY_S", 0.05)

    async def story() -> None:
        store, other = make_store(), make_store()
        async with store.fill() as filling:
            await filling.put(Table.EVENT, [Event("e", 1.0, {})])
            for writer in (store, other):
                for operation in (PostGrant("g", "p", "credits", 1), Emit((("x", {}),)), End("c", None)):
                    (answer,) = await writer.run([operation])
                    assert isinstance(answer, StoreContendedError)
                with pytest.raises(StoreContendedError, match="Somebody else works alone"):
                    await writer.fill().__aenter__()
            await filling.put(Table.EVENT, [Event("f", 1.0, {})])
        assert [event.id for event in (await _whole(other))["event"]] == ["e", "f"]
        await other.post([PostGrant("g", "p", "credits", 1)])
        await store.close()
        await other.close()

    asyncio.run(story())


@pytest.mark.parametrize("others", [False, True])
def test_fill_behind_a_gate_that_opened(make_store: Maker, server: ValkeyServer, others: bool) -> None:
    """A filling whose gate has run out writes nothing more: others may have written; another's gate is left closed."""

    async def story() -> None:
        store = make_store()
        gate = Names(store.namespace).gate
        async with store.fill() as filling:
            await filling.put(Table.EVENT, [Event("e", 1.0, {})])
            server.ask(*(("SET", gate, "theirs") if others else ("DEL", gate)))
            with pytest.raises(StoreContendedError, match="Others may have written to the Redis store"):
                await filling.put(Table.EVENT, [Event("f", 1.0, {})])
            with pytest.raises(StoreUnavailableError, match=r"is over\. Begin again"):
                await filling.put(Table.EVENT, [Event("f", 1.0, {})])
        assert server.ask("EXISTS", gate) == b":%d\r\n" % others
        assert [event.id for event in (await _whole(store))["event"]] == ["e"]
        await store.close()

    asyncio.run(story())


def test_read_back_for_long(make_store: Maker, server: ValkeyServer) -> None:
    """Whoever reads back what was put for longer than the gate stays closed keeps it closed."""

    async def story() -> None:
        store = make_store()
        gate = Names(store.namespace).gate
        async with store.fill() as filling:
            await filling.put(Table.EVENT, [Event("e", 1.0, {})])
            server.ask("PEXPIRE", gate, "20000")
            filling._renewed_at -= 40.0  # type: ignore[attr-defined]
            assert (await filling.counts())[Table.EVENT] == 1
            assert int(server.ask("PTTL", gate)[1:]) > 50_000
        await store.close()

    asyncio.run(story())


def test_books_show_what_is_written_meanwhile(make_store: Maker) -> None:
    """Books are not of one instant, and say so: what is written behind their counts is seen, so that it can be told."""

    async def story() -> None:
        store = make_store()
        await store.post([PostGrant("g", "p", "credits", 1)])
        async with store.books() as books:
            counts = await books.counts()
            await store.post([PostGrant("g", "q", "credits", 1)])
            async with aclosing(books.rows(Table.ACCOUNT)) as pages:
                payers = [account.payer async for page in pages for account in page]
            assert (books.one_instant, counts[Table.ACCOUNT], payers) == (False, 1, ["p", "q"])
        await store.close()

    asyncio.run(story())


# -- after a cut -------------------------------------------------------------------------------------------


def test_resume_an_import_that_was_cut(make_store: Maker, server: ValkeyServer, tmp_path: Path) -> None:
    """Wherever the connection is lost, what was put stays, and the same import completes it (PostgreSQL's is whole)."""

    async def put_until(store: Store, source: Store, puts: int) -> None:
        async with source.books() as books, store.fill() as filling:
            done = 0
            for table in TABLES:
                async with aclosing(books.rows(table)) as pages:
                    async for rows in pages:
                        if done == puts:
                            server.ask("CLIENT", "KILL", "TYPE", "normal")
                        await filling.put(table, rows)
                        done += 1

    async def story() -> None:
        source, file = await _served(200), tmp_path / "books.jsonl"
        rows = sum((await export_books(source, file)).counts.values())
        for puts in range(1, 9):
            store = make_store(namespace=f"cut{puts}")
            with pytest.raises(StoreUnavailableError):
                await put_until(store, source, puts)
            moved = await import_books(store, file, resume=True)
            assert 0 < moved.new < rows
            assert await _whole(store) == await _whole(source)
            assert (await import_books(store, file, resume=True)).new == 0
            await store.close()

    asyncio.run(story())


# -- what it cannot keep -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "bad", "said"),
    [
        (Table.GRANT, GRANT._replace(id="h", amount=MAX_AMOUNT + 1, settled=MAX_AMOUNT + 1), "exactly up to"),
        (Table.ACCOUNT, Account("q", "credits", MAX_AMOUNT + 1), "would have to keep 9007199254740992 smallest parts"),
        (Table.ACCOUNT, Account("\ud800", "credits"), "surrogates not allowed"),
        (Table.EVENT, Event("f", 1.0, {"when": {1}}), "set is not JSON-safe"),
        (Table.GRANT, GRANT._replace(payer="q"), "came without its account"),
        (Table.ENTRY, LINE._replace(number=2), "the last one is 0"),
    ],
)
@pytest.mark.parametrize("empty", [True, False])
def test_fill_with_what_it_cannot_keep(make_store: Maker, table: str, bad: Any, said: str, empty: bool) -> None:
    """A row that Redis cannot keep is told as such; a namespace that was empty is so again, another stays as it was."""

    async def fill(store: Store) -> None:
        async with store.fill() as filling:
            await filling.put(Table.ACCOUNT, [Account("p", "credits", 5)])
            await filling.put(Table.GRANT, [GRANT])
            await filling.put(table, [bad])

    async def story() -> None:
        store = make_store()
        if not empty:
            async with store.fill() as filling:
                await filling.put(Table.EVENT, [Event("e", 1.0, {})])
        with pytest.raises(UnwritableError, match=f"cannot be kept on Redis: .*{said}"):
            await fill(store)
        kept = await _whole(store)
        assert [event.id for event in kept["event"]] == ([] if empty else ["e"])
        assert len(kept["grant"]) == (0 if empty else 1)
        await store.close()

    asyncio.run(story())


def test_fill_a_server_that_is_full(make_store: Maker) -> None:
    """A server without room for more refuses what is put, and books on a key of another make cannot be read."""

    async def story(port: int, full: ValkeyServer) -> None:
        store = make_store(port=port)
        async with store.fill() as filling:
            await filling.put(Table.EVENT, [Event("e", 1.0, {})])
            full.ask("CONFIG", "SET", "maxmemory", "1")
            with pytest.raises(StoreUnavailableError, match="used memory"):
                await filling.put(Table.EVENT, [Event("f", 1.0, {})])
            full.ask("CONFIG", "SET", "maxmemory", "0")
        full.ask("SET", Names(store.namespace).of_account("e", Names(store.namespace).account("p", "credits")), "7")
        async with store.books() as books:
            with pytest.raises(StoreError, match="WRONGTYPE"):
                await books.counts()
        await store.close()

    with valkey() as full:
        asyncio.run(story(full.port, full))


def test_keys_of_two_servers(make_store: Maker, server: ValkeyServer) -> None:
    """When another server takes over while keys are walked through, they are nobody's, and that is told."""

    async def story(other: ValkeyServer) -> None:
        stores = [RedisStore(ServerPlace({"host": HOST, "port": port}, 5.0)) for port in (server.port, other.port)]
        asked = 0

        async def ask(*commands: Any) -> list[Any]:
            nonlocal asked
            asked += 1
            return await stores[asked > 1]._access().ask(*commands)

        with pytest.raises(StoreUnavailableError, match="Another Redis server has taken over"):
            assert [keys async for keys in keys_of(ask, Names("nobody"))] == []
        for store in stores:
            await store.close()

    with valkey() as other:
        asyncio.run(story(other))

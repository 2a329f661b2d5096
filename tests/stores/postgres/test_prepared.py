"""Prepared statements: what the server keeps, how long a plan lives, and connections that lose what was prepared."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from asgi_metering.errors import ConfigurationError
from asgi_metering.receipts import Basis
from asgi_metering.rules.operations import Admit, End, PostGrant, WalletSource
from asgi_metering.stores.contract import EverythingKept, HoldRow
from asgi_metering.stores.postgres import PostgresStore
from asgi_metering.stores.postgres.link import Link, Statement
from asgi_metering.stores.postgres.prepared import Prepared
from asgi_metering.stores.urls import store_from_url
from tests.harness.postgres import PostgresServer
from tests.stores.proofs import assert_conserved

KEPT = Statement("SELECT count(*) FROM pg_prepared_statements")


def one_call(number: int) -> tuple[Admit, End]:
    """A call that holds 10 and costs 4."""
    asked = Admit(f"c{number}", "p", "credits", 10, 10, (WalletSource(),))
    return asked, End(f"c{number}", 4, Basis.USAGE, event={"n": number})


@asynccontextmanager
async def used(store: PostgresStore) -> AsyncIterator[tuple[Link, Link]]:
    """Open *store* and use both its connections a few times: that of its batches, and that of its reads."""
    await store.open()
    try:
        await store.post([PostGrant("g", "p", "credits", 1_000)])
        for number in range(3):
            for operation in one_call(number):
                await store.run([operation])
            await store.read(EverythingKept())
            await store.read(HoldRow("c0"))
        lines = store._lines[asyncio.get_running_loop()]
        assert lines.writer._link is not None
        assert lines.reader._link is not None
        yield lines.writer._link, lines.reader._link
    finally:
        await store.close()


async def kept(link: Link) -> int:
    """How many statements the server keeps for this connection."""
    (((number,),),) = await link.trip([KEPT], 10.0)
    return int(number)


@pytest.mark.parametrize("prepare", [True, False])
def test_keep_statements_prepared(postgres: PostgresServer, schema: str, prepare: bool) -> None:
    """What comes again is prepared once for each connection, and planned once; without ``prepare`` nothing is."""

    async def run() -> None:
        store = PostgresStore(postgres.url(), namespace=schema, migrate=True, prepare=prepare)
        async with used(store) as links:
            before = [await kept(link) for link in links]
            assert [number > 5 for number in before] == [prepare, prepare]
            await store.run(one_call(8))
            await store.read(EverythingKept())
            for link in links:
                plans = Statement("SELECT coalesce(sum(custom_plans), 0)::bigint FROM pg_prepared_statements")
                assert await link.trip([plans], 10.0) == [[(0,)]]
            assert await kept(links[1]) == before[1]

    asyncio.run(run())


def test_plan_anew_at_each_doubling() -> None:
    """A plan that was made for small tables is not older than half the transactions, nor than a thousand of them."""
    prepared = Prepared()
    assert not any(prepared.is_due() for _ in range(7))
    prepared.is_kept("SELECT 1")
    due = [number for number in range(8, 5_000) if prepared.is_due()]
    assert due == [8, 16, 32, 64, 128, 256, 512, 1_024, 2_048, 3_072, 4_096]


def test_throw_plans_away(postgres: PostgresServer, schema: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are made anew inside the transactions that are due, for whatever the tables are by then."""
    sent: list[list[str]] = []
    trip = Link.trip

    async def seen(link: Link, statements: Sequence[Statement], within_s: float, **more: bool) -> list[Any]:
        sent.append([statement.text for statement in statements])
        return await trip(link, statements, within_s, **more)

    async def run() -> None:
        store = PostgresStore(postgres.url(), namespace=schema, migrate=True)
        async with used(store):
            monkeypatch.setattr(Link, "trip", seen)
            for number in range(8, 17):
                await store.run([one_call(number)[0]])

    asyncio.run(run())
    begun = [texts for texts in sent if texts[0].startswith("BEGIN")]
    assert [number for number, texts in enumerate(begun, 8) if "DISCARD PLANS" in texts] == [8, 16]


async def forgotten(link: Link) -> None:
    """Have the server forget everything, as another server connection behind a pooler knows nothing of it."""
    await link.trip([Statement("DEALLOCATE ALL")], 10.0)


async def writing_forgotten(link: Link) -> None:
    """Have the server forget what writes: the rows are locked and loaded before that comes out."""
    names = Statement("SELECT name FROM pg_prepared_statements WHERE statement ~ '^(INSERT|UPDATE)'")
    (found,) = await link.trip([names], 10.0)
    await link.trip([Statement(f"DEALLOCATE {name}") for (name,) in found], 10.0)


async def taken(link: Link) -> None:
    """Let the server know what we have not prepared, as a connection that another client was given before."""
    link._prepared._kept.clear()


@pytest.mark.parametrize("lost", [forgotten, writing_forgotten, taken])
def test_begin_again_where_prepared_statements_are_lost(
    postgres: PostgresServer,
    schema: str,
    lost: Callable[[Link], Awaitable[None]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The batch that meets it is run once, whichever of its trips does; then none are used, and one line tells why."""

    async def run() -> None:
        store = PostgresStore(postgres.url(), namespace=schema, migrate=True)
        async with used(store) as (writer, reader):
            await lost(writer)
            await lost(reader)
            for number in range(10, 13):
                decision, _ = await store.run(one_call(number))
                assert decision.admitted
                assert (await store.read(HoldRow(f"c{number}"))).state.holds
            assert (writer.is_open, writer.prepares, reader.prepares) == (
                True,
                False,
                False,
            ) or lost is writing_forgotten
            state = (await store.read(EverythingKept())).state
            assert_conserved(state)
            assert state.accounts["p", "credits"].settled == 6 * 4

    asyncio.run(run())
    (told,) = [record.getMessage() for record in caplog.records if record.name == "asgi_metering.stores"]
    assert "forgets prepared statements" in told
    assert "?prepare=no" in told


def test_prepare_anew_where_a_column_has_another_type(
    postgres: PostgresServer, schema: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A table that was altered under what is prepared, as by a migration, costs no error, and nothing for good."""

    async def run() -> None:
        store = PostgresStore(postgres.url(), namespace=schema, migrate=True)
        async with used(store) as (writer, reader):
            for number, kind in enumerate(("integer", "bigint"), 10):
                postgres.execute(f'ALTER TABLE "{schema}".account ALTER COLUMN settled TYPE {kind}')
                for repeat in range(3):
                    assert (await store.run(one_call(10 * number + repeat)))[0].admitted
                    found = (await store.read(EverythingKept())).state.accounts["p", "credits"].settled
                    assert found == 4 * (3 * (number - 9) + repeat + 1)
                for link in (writer, reader):
                    assert (link.is_open, link.prepares) == (True, True)
                    assert await kept(link) > 5

    asyncio.run(run())
    assert not [record for record in caplog.records if record.name == "asgi_metering.stores"]


def test_prepare_no_more_where_old_statements_are_kept(
    postgres: PostgresServer, schema: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A pooler that answers by what it has prepared for the same text before is given up after a few attempts."""
    trip, answered = Link.trip, list[bool]()

    async def keeping(link: Link, statements: Sequence[Statement], within_s: float, *, prepare: bool = False) -> Any:
        if prepare and link.prepares:
            answered.append(False)
            await trip(link, [*statements, Statement("DO 'BEGIN RAISE SQLSTATE ''0A000''; END'")], within_s)
        return await trip(link, statements, within_s, prepare=prepare)

    async def run() -> None:
        store = PostgresStore(postgres.url(), namespace=schema, migrate=True)
        async with used(store) as (writer, reader):
            monkeypatch.setattr(Link, "trip", keeping)
            assert (await store.run(one_call(10)))[0].admitted
            assert (await store.read(HoldRow("c10"))).state.holds
            assert (writer.prepares, reader.prepares) == (False, False)
            assert_conserved((await store.read(EverythingKept())).state)

    asyncio.run(run())
    assert 2 <= len(answered) <= 8
    (told,) = [record.getMessage() for record in caplog.records if record.name == "asgi_metering.stores"]
    assert "keeps old ones" in told


def test_begin_again_where_few_transactions_are_between() -> None:
    """Statements are prepared anew for every migration, and not again and again for one."""
    prepared = Prepared()
    for _ in range(3):
        assert [prepared.renew() for _ in range(4)] == [True, True, True, False]
        for _ in range(65):
            prepared.is_due()


def test_connect_without_preparing_once_they_were_lost(postgres: PostgresServer, schema: str) -> None:
    """A connection that is made later does not try again what was lost on another."""

    async def run() -> None:
        store = PostgresStore(postgres.url(), namespace=schema, migrate=True)
        async with used(store) as (writer, _):
            await forgotten(writer)
            await store.run(one_call(10))
            writer.close()
            await store.run(one_call(11))
            again = store._lines[asyncio.get_running_loop()].writer._link
            assert again is not None
            assert (again is not writer, again.prepares) == (True, False)

    asyncio.run(run())


def test_say_in_the_url_whether_to_prepare(postgres: PostgresServer, schema: str) -> None:
    """``prepare=no`` in a store URL uses none; both words leave libpq's parameters alone; another is refused."""

    async def run(said: str) -> bool:
        store = store_from_url(f"{postgres.url()}?application_name=shop&namespace={schema}{said}")
        assert isinstance(store, PostgresStore)
        await store.migrate()
        async with used(store) as (writer, _):
            ((name,),) = (await writer.trip([Statement("SHOW application_name")], 10.0))[0]
            assert name == "shop"
            return writer.prepares

    assert [asyncio.run(run(said)) for said in ("", "&prepare=yes", "&prepare=no")] == [True, True, False]
    with pytest.raises(ConfigurationError, match=r"says prepare=maybe\. Write prepare=no where a pooler"):
        store_from_url("postgresql://host/db?prepare=maybe")

"""Schemas, migrations, URLs, and what a wrong set-up is told."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from asgi_metering.cli import main
from asgi_metering.decisions import Decision
from asgi_metering.errors import ConfigurationError, MissingExtraError, StoreError
from asgi_metering.rules.operations import Admit, LimitAsk, PostGrant, WalletSource, WindowKind
from asgi_metering.stores.postgres import PostgresStore
from asgi_metering.stores.postgres.link import Statement, connect
from asgi_metering.stores.postgres.migrations import (
    MIGRATIONS,
    SCHEMA_VERSION,
    Migration,
    migrate,
    opening,
    pending,
    script,
)
from asgi_metering.stores.pump import Pump
from asgi_metering.stores.urls import store_from_url
from tests.harness.postgres import PostgresServer
from tests.harness.servers import HOST, free_port
from tests.harness.waiting import wait_until

ROOT = Path(__file__).parents[3]


def failure_to_open(store: PostgresStore) -> StoreError | ConfigurationError:
    """What `open` raises."""

    async def run() -> None:
        try:
            await store.open()
        finally:
            await store.close()

    with pytest.raises((StoreError, ConfigurationError)) as raised:
        asyncio.run(run())
    return raised.value


def _applied(server: PostgresServer, schema: str) -> list[int]:
    return [number for (number,) in server.execute(f'SELECT number FROM "{schema}".migration ORDER BY number')]


def _apply(server: PostgresServer, schema: str, *migrations: Migration) -> list[Migration]:
    async def run() -> list[Migration]:
        link = await connect(server.url(), 10.0)
        try:
            return await migrate(link, schema, 60.0, migrations)
        finally:
            link.close()

    return asyncio.run(run())


# -- migrations --------------------------------------------------------------------------------------------


def test_migrate_twice(postgres: PostgresServer, schema: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command makes the schema once; again it has nothing to do, and the store opens without making anything."""
    url = f"{postgres.url()}?namespace={schema}"
    assert main(["migrate", "--store", url, "--json"]) == 0
    assert [row["number"] for row in json.loads(capsys.readouterr().out)] == [each.number for each in MIGRATIONS]
    assert main(["migrate", "--store", url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert main(["migrate", "--store", url]) == 0
    assert capsys.readouterr().out == "The tables are up to date.\n"

    async def run() -> None:
        store = store_from_url(url)
        await store.open()
        await store.post([PostGrant("g", "p", "credits", 5)])
        await store.close()

    asyncio.run(run())
    assert _applied(postgres, schema) == [each.number for each in MIGRATIONS]


def test_migrate_in_several_places_at_once(postgres: PostgresServer, schema: str) -> None:
    """Of several that migrate at once each migration is applied by one, and none fails."""

    async def run() -> list[list[tuple[int, str]]]:
        stores = [PostgresStore(postgres.url(), namespace=schema) for _ in range(6)]
        return await asyncio.gather(*(store.migrate() for store in stores))

    done = asyncio.run(run())
    assert sorted(number for each in done for number, _ in each) == [each.number for each in MIGRATIONS]


def test_migrate_by_a_session_that_has_migrated_before(postgres: PostgresServer, schema: str) -> None:
    """A pooler's session that knew the schema as missing, and waited for who makes it, finds it made."""
    one = Migration(1, "one", "CREATE TABLE account (id INT)")

    async def run() -> list[Migration]:
        first, second = await connect(postgres.url(), 10.0), await connect(postgres.url(), 10.0)
        # By now it needs nothing of the catalogue for which the server would look whether anything is new.
        await migrate(second, f"{schema}_before", 60.0, [one])
        await first.trip(list(map(Statement, opening(schema))), 60.0)
        migrating = asyncio.create_task(migrate(second, schema, 60.0, [one]))
        waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        await asyncio.to_thread(wait_until, lambda: postgres.execute(waiting) == [(1,)])
        await first.trip([Statement("COMMIT")], 60.0)
        done = await migrating
        first.close()
        second.close()
        return done

    assert asyncio.run(run()) == [one]


def test_migrate_under_the_settings_of_another_application(postgres: PostgresServer, schema: str) -> None:
    """What a role's transactions are by default, and how long they may take, is not what migrations and batches are."""
    user = f"strict_{schema}"
    postgres.execute(f"CREATE ROLE {user} SUPERUSER LOGIN PASSWORD 'strict'")
    for setting in (
        "default_transaction_isolation = 'serializable'",
        "default_transaction_read_only = on",
        "idle_in_transaction_session_timeout = 1",
        "lock_timeout = 1",
    ):
        postgres.execute(f"ALTER ROLE {user} SET {setting}")

    async def run() -> list[list[tuple[int, str]]]:
        stores = [PostgresStore(postgres.url(user=user, password="strict"), namespace=schema) for _ in range(4)]
        done = await asyncio.gather(*(store.migrate() for store in stores))
        await _opens(stores[0])
        return done

    done = asyncio.run(run())
    assert sorted(number for each in done for number, _ in each) == [each.number for each in MIGRATIONS]


def test_migrate_a_schema_that_was_made_for_its_owner(postgres: PostgresServer, schema: str) -> None:
    """Who owns the schema needs no right to make others; who does not is told who may migrate."""
    for kind in ("owner", "guest"):
        postgres.execute(f"CREATE ROLE {kind}_{schema} LOGIN PASSWORD '{kind}'")
    postgres.execute(f'CREATE SCHEMA "{schema}" AUTHORIZATION owner_{schema}')
    owner, guest = (
        PostgresStore(postgres.url(user=f"{kind}_{schema}", password=kind), namespace=schema)
        for kind in ("owner", "guest")
    )
    with pytest.raises(StoreError, match=r"forbids what a migration does: .* Migrate as the user who owns the schema"):
        asyncio.run(guest.migrate())
    assert [number for number, _ in asyncio.run(owner.migrate())] == [each.number for each in MIGRATIONS]
    asyncio.run(_opens(owner))


def test_functions_of_others_are_not_called(postgres: PostgresServer, schema: str) -> None:
    """A function that somebody has put into the search path, and made to fit better than the server's, never runs."""
    trap, user = f"trap_{schema}", f"caught_{schema}"
    postgres.execute(f"CREATE SCHEMA {trap}")
    for signature in ("hashtextextended(text, integer) RETURNS bigint", "unnest(text[]) RETURNS SETOF bigint"):
        postgres.execute(f"CREATE FUNCTION {trap}.{signature} LANGUAGE sql AS 'SELECT (1 / 0)::bigint'")
    postgres.execute(f"CREATE ROLE {user} SUPERUSER LOGIN PASSWORD 'caught'")
    postgres.execute(f"ALTER ROLE {user} SET search_path = {trap}")

    async def run() -> None:
        store = PostgresStore(postgres.url(user=user, password="caught"), namespace=schema, migrate=True)
        await store.open()
        _, decision = await store.run(
            [PostGrant("g", "p", "credits", 5), Admit("a", "p", "credits", 5, 5, (WalletSource(),))]
        )
        assert isinstance(decision, Decision)
        assert decision.admitted
        await store.close()

    asyncio.run(run())


def test_migrate_under_load(postgres: PostgresServer, schema: str) -> None:
    """A migration of tables in use is applied between the batches, and no call notices."""
    column = Migration(
        SCHEMA_VERSION + 1, "note", "ALTER TABLE account ADD COLUMN note TEXT;\nALTER TABLE hold ADD n INT"
    )

    async def run() -> None:
        store = PostgresStore(postgres.url(), namespace=schema, migrate=True)
        await store.open()
        await store.post([PostGrant("g", "p", "credits", 1_000_000)])
        pump = Pump(store)
        done = asyncio.Event()
        admitted = 0

        async def caller(number: int) -> None:
            nonlocal admitted
            while not done.is_set():
                admitted += 1
                decision = await pump.submit(Admit(f"{number}.{admitted}", "p", "credits", 1, 1, (WalletSource(),)))
                assert decision

        callers = [asyncio.create_task(caller(number)) for number in range(8)]
        for _ in range(2):
            link = await connect(postgres.url(), 10.0)
            await migrate(link, schema, 60.0, (*MIGRATIONS, column))
            link.close()
        before = admitted
        while admitted < before + 20:
            await asyncio.sleep(0.001)
        done.set()
        await asyncio.gather(*callers)
        await pump.close()
        await store.close()

    asyncio.run(run())
    assert _applied(postgres, schema) == [*(each.number for each in MIGRATIONS), column.number]


def test_migrate_counters_of_an_older_version(postgres: PostgresServer, schema: str) -> None:
    """Counters that an older version wrote, before and after the migration, go on; all kinds of limits work beside."""
    limits = (
        LimitAsk("calls", "old", WindowKind.FIXED, 5, 1e9),
        LimitAsk("calls", "older", WindowKind.FIXED, 5, 1e9),
        LimitAsk("log", "log", WindowKind.MOVING, 5, 1e9),
        LimitAsk("bucket", "bucket", WindowKind.BUCKET, 5, 1e9, refill=1),
    )
    _apply(postgres, schema, *MIGRATIONS[:1])
    written = f'INSERT INTO "{schema}".counter (key, start, "end", used, previous) VALUES '
    postgres.execute(f"{written} ('old', 1, 1e11, 3, 0)")

    async def run() -> None:
        for _ in range(2):
            link = await connect(postgres.url(), 10.0)
            await migrate(link, schema, 60.0, MIGRATIONS)
            link.close()
        postgres.execute(f"{written} ('older', 1, 1e11, 3, 0)")
        store = PostgresStore(postgres.url(), namespace=schema)
        await store.open()
        for left in ([1, 1, 4, 4], [0, 0, 3, 3]):
            (decision,) = await store.admit([Admit(f"c{left}", "p", "credits", 0, 0, limits=limits)])
            assert isinstance(decision, Decision)
            assert [window.remaining for window in decision.windows] == left
        await store.close()

    asyncio.run(run())
    assert _applied(postgres, schema) == [each.number for each in MIGRATIONS]


def test_migration_that_deadlocks_with_a_batch_is_begun_again(postgres: PostgresServer, schema: str) -> None:
    """A migration that took one table while a batch took another gives way to the batch, and is applied after it."""
    columns = Migration(
        SCHEMA_VERSION + 1, "notes", "ALTER TABLE account ADD COLUMN note TEXT;\nALTER TABLE hold ADD n INT"
    )
    waiting = "SELECT 1 FROM pg_locks WHERE NOT granted AND relation = to_regclass(%s)"

    async def run() -> None:
        batch, link = await connect(postgres.url(), 10.0), await connect(postgres.url(), 10.0)
        await migrate(link, schema, 60.0)
        # The server is to end the migration, and not this one.
        mine = ["BEGIN", "SET LOCAL deadlock_timeout = '1h'", f'LOCK TABLE "{schema}".hold IN ACCESS SHARE MODE']
        await batch.trip(list(map(Statement, mine)), 10.0)
        migrating = asyncio.create_task(migrate(link, schema, 60.0, (*MIGRATIONS, columns)))
        await asyncio.to_thread(wait_until, lambda: postgres.execute(waiting, f"{schema}.hold"))
        await batch.trip([Statement(f'SELECT count(*) FROM "{schema}".account'), Statement("COMMIT")], 10.0)
        assert await migrating == [columns]
        batch.close()
        link.close()

    asyncio.run(run())
    assert _applied(postgres, schema) == [*(each.number for each in MIGRATIONS), columns.number]


def test_migration_that_fails_leaves_nothing(postgres: PostgresServer, schema: str) -> None:
    """A migration is applied whole or not at all, and those before it stay."""
    broken = Migration(SCHEMA_VERSION + 1, "broken", "CREATE TABLE half (n INT);\nCREATE TABLE account (n INT)")
    with pytest.raises(Exception, match='relation "account" already exists'):
        _apply(postgres, schema, *MIGRATIONS, broken)
    assert _applied(postgres, schema) == [each.number for each in MIGRATIONS]
    assert postgres.execute("SELECT to_regclass(%s)", f"{schema}.half") == [(None,)]


def test_migration_does_not_wait_for_a_long_transaction(postgres: PostgresServer, schema: str) -> None:
    """A table that is in use for long is not queued for: whoever waits for it would keep all others waiting."""
    _apply(postgres, schema, *MIGRATIONS)
    column = Migration(SCHEMA_VERSION + 1, "note", "ALTER TABLE account ADD COLUMN note TEXT")
    with psycopg.connect(postgres.url()) as other:
        other.execute(f'SELECT * FROM "{schema}".account')
        with pytest.raises(psycopg.errors.LockNotAvailable):
            _apply(postgres, schema, *MIGRATIONS, column)
    assert [each.name for each in _apply(postgres, schema, *MIGRATIONS, column)] == ["note"]


def test_print_migrations(postgres: PostgresServer, schema: str, capsys: pytest.CaptureFixture[str]) -> None:
    """``--sql`` prints a script and does nothing; run by psql it makes what the command would make, and only once."""
    assert main(["migrate", "--store", f"{postgres.url()}?namespace={schema}", "--sql"]) == 0
    printed = capsys.readouterr().out
    assert printed == script(schema)
    assert postgres.execute("SELECT to_regclass(%s)", f"{schema}.account") == [(None,)]
    postgres.run_script(printed)
    asyncio.run(_opens(PostgresStore(postgres.url(), namespace=schema)))
    other = f"{schema}_other"
    _apply(postgres, other, *MIGRATIONS)
    assert _columns(postgres, schema) == _columns(postgres, other)
    with pytest.raises(subprocess.CalledProcessError):
        postgres.run_script(printed)
    asyncio.run(_opens(PostgresStore(postgres.url(), namespace=schema)))


async def _opens(store: PostgresStore) -> None:
    await store.open()
    await store.close()


def _columns(server: PostgresServer, schema: str) -> list[tuple[str, ...]]:
    return server.execute(
        "SELECT table_name, column_name, data_type, is_nullable FROM information_schema.columns "
        "WHERE table_schema = %s ORDER BY table_name, ordinal_position",
        schema,
    )


def test_pending_migrations() -> None:
    """Pending is what was not applied, in order, also where a number was left out."""
    steps = [Migration(number, f"step{number}", "") for number in (1, 2, 3)]
    assert pending([2], steps) == [steps[0], steps[2]]
    assert pending([1, 2, 3, 4], steps) == []


def test_open_refuses_another_schema_version(postgres: PostgresServer, schema: str) -> None:
    """A schema that is missing, older or newer is refused at startup, with what to do about it."""
    store = PostgresStore(postgres.url(), namespace=schema)
    assert "has no tables of asgi_metering" in str(failure_to_open(store))
    assert str(failure_to_open(store)).endswith("Run: asgi-metering migrate")
    _apply(postgres, schema, *MIGRATIONS)
    asyncio.run(_opens(store))
    postgres.execute(f"INSERT INTO \"{schema}\".migration VALUES (999, 'later')")
    newer = failure_to_open(store)
    assert isinstance(newer, ConfigurationError)
    assert "has version 999, newer than" in str(newer)
    assert str(newer).endswith("Upgrade asgi_metering.")
    postgres.execute(f'DELETE FROM "{schema}".migration WHERE number >= {SCHEMA_VERSION}')
    assert str(failure_to_open(store)).endswith("Run: asgi-metering migrate")


def test_migrate_a_store_that_needs_none(capsys: pytest.CaptureFixture[str]) -> None:
    """Stores that keep their own tables up to date say so; without a store the command asks for one."""
    assert main(["migrate", "--store", "sqlite:///x.db"]) == 2
    assert "brings its tables up to date by itself" in capsys.readouterr().err
    assert main(["migrate", "--store", ""]) == 2
    assert "No store is named" in capsys.readouterr().err


# -- what a wrong set-up is told ---------------------------------------------------------------------------


def test_open_with_a_wrong_url(postgres: PostgresServer, schema: str) -> None:
    """Wrong passwords, databases, ports and TLS are told with the value and the mend, and without the password."""
    said = {
        "password": postgres.url(password="wrong-secret"),
        "database": postgres.url("nothing_here"),
        "port": postgres.url(port=free_port()),
        "tls": f"{postgres.url()}?sslmode=require",
    }
    told = {name: str(failure_to_open(PostgresStore(url, namespace=schema))) for name, url in said.items()}
    assert "Check user and password of the store URL" in told["password"]
    assert "Create the database, or name another" in told["database"]
    assert "Check its address, and that it runs" in told["port"]
    assert "Check sslmode and sslrootcert" in told["tls"]
    for text in told.values():
        assert text.startswith(f"PostgreSQL at {HOST}:")
        assert "secret" not in text
        assert "only%20for" not in text


@pytest.mark.parametrize(
    ("setting", "mend"),
    [("NOLOGIN", "Give the user LOGIN"), ("LOGIN CONNECTION LIMIT 0", "or the role's CONNECTION LIMIT")],
)
def test_connect_as_a_role_that_may_not(postgres: PostgresServer, schema: str, setting: str, mend: str) -> None:
    """What keeps a role out is told, with the setting of the role that does."""
    postgres.execute(f"CREATE ROLE out_{schema} {setting} PASSWORD 'out'")
    store = PostgresStore(postgres.url(user=f"out_{schema}", password="out"), namespace=schema)
    assert mend in str(failure_to_open(store))


def test_pooler_that_keeps_no_transaction_together(postgres: PostgresServer, schema: str) -> None:
    """A pooler in statement mode, whose words these are, is told with its mend."""

    async def run() -> None:
        store = PostgresStore(postgres.url(), namespace=schema)
        link = await store._database.connect()
        said = "transaction blocks not allowed in statement pooling mode"
        with pytest.raises(psycopg.Error) as raised:
            await link.trip([Statement(f"DO 'BEGIN RAISE SQLSTATE ''08P01'' USING MESSAGE = ''{said}''; END'")], 10.0)
        link.close()
        told = str(store._database.meaning(raised.value))
        assert told.endswith(f"another connection: {said}. Set pool_mode = transaction for this database.")

    asyncio.run(run())


def test_open_without_permission(postgres: PostgresServer, schema: str) -> None:
    """A user that may not use the schema is told which rights to grant."""
    _apply(postgres, schema, *MIGRATIONS)
    postgres.execute(f"CREATE ROLE guest_{schema} LOGIN PASSWORD 'guest'")
    url = postgres.url(user=f"guest_{schema}", password="guest")
    told = str(failure_to_open(PostgresStore(url, namespace=schema)))
    assert "forbids what the store does" in told
    assert f"USAGE on the schema {schema!r}" in told
    postgres.execute(f'GRANT USAGE ON SCHEMA "{schema}" TO guest_{schema}')
    postgres.execute(f'GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA "{schema}" TO guest_{schema}')

    async def run() -> None:
        store = PostgresStore(url, namespace=schema)
        await store.open()
        await store.post([PostGrant("g", "p", "credits", 5)])
        await store.close()

    asyncio.run(run())


def test_open_without_permission_for_a_new_table(postgres: PostgresServer, schema: str) -> None:
    """Rights that were granted before a migration made a table are found out at startup, before a batch needs it."""
    _apply(postgres, schema, *MIGRATIONS[:2])
    postgres.execute(f"CREATE ROLE guest_{schema} LOGIN PASSWORD 'guest'")
    postgres.execute(f'GRANT USAGE ON SCHEMA "{schema}" TO guest_{schema}')
    postgres.execute(f'GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA "{schema}" TO guest_{schema}')
    _apply(postgres, schema, *MIGRATIONS[2:])
    store = PostgresStore(postgres.url(user=f"guest_{schema}", password="guest"), namespace=schema)
    for granted in ("SELECT", "INSERT", "UPDATE"):
        postgres.execute(f'GRANT {granted} ON "{schema}".reading TO guest_{schema}')
        told = str(failure_to_open(store))
        assert "forbids what the store does: permission denied for reading. Grant" in told
    postgres.execute(f'GRANT DELETE ON "{schema}".reading TO guest_{schema}')
    asyncio.run(_opens(store))


def test_table_that_went_away(postgres: PostgresServer, schema: str) -> None:
    """A schema that was changed under a running store is told as what it is."""
    _apply(postgres, schema, *MIGRATIONS)

    async def run() -> str:
        store = PostgresStore(postgres.url(), namespace=schema)
        await store.open()
        postgres.execute(f'DROP TABLE "{schema}".entry')
        try:
            with pytest.raises(ConfigurationError) as raised:
                await store.post([PostGrant("g", "p", "credits", 5)])
        finally:
            await store.close()
        return str(raised.value)

    assert asyncio.run(run()).endswith("Run: asgi-metering migrate")


def test_refuse_a_database_that_cannot_keep_every_text(postgres: PostgresServer, schema: str) -> None:
    """A database that is not encoded in UTF-8 is refused: it would fail on the first name from elsewhere."""
    postgres.execute(f"CREATE DATABASE latin_{schema} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    store = PostgresStore(postgres.url(f"latin_{schema}"), namespace=schema, migrate=True)
    assert "is encoded in LATIN1" in str(failure_to_open(store))


@pytest.mark.parametrize("namespace", ["", "Ledger", "1st", "pg_ledger", "a" * 64, "led-ger", 'led"ger', 7])
def test_refuse_a_namespace(namespace: str) -> None:
    """A namespace is a schema's plain name, and is told what it may be."""
    with pytest.raises(ConfigurationError, match=r"cannot be a PostgreSQL schema of ours\. Use 1 to 63"):
        PostgresStore("postgresql://localhost/db", namespace=namespace)


def test_refuse_a_url_that_libpq_does_not_know() -> None:
    """An unknown parameter is told when the store is made, and the password is not."""
    with pytest.raises(ConfigurationError, match=r"is not one of PostgreSQL: .*colour.*Write postgresql://") as raised:
        store_from_url("postgresql://me:secret@localhost/db?colour=red")
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("more", [{"busy_timeout_s": 0.0}, {"answer_within_s": -1.0}, {"busy_timeout_s": float("nan")}])
def test_refuse_a_time_that_is_none(more: dict[str, float]) -> None:
    """A time to wait that is none, or not a number, is refused when the store is made."""
    with pytest.raises(ConfigurationError, match="is no time to wait"):
        PostgresStore("postgresql://localhost/db", **more)  # type: ignore[arg-type]


def test_use_before_opening(postgres: PostgresServer, schema: str) -> None:
    """A store that was not opened says so."""
    store = PostgresStore(postgres.url(), namespace=schema)
    with pytest.raises(StoreError, match=r"is not open\. Await open\(\) first"):
        asyncio.run(store.run([PostGrant("g", "p", "credits", 5)]))


def test_without_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the driver the store cannot be made, and the error names the extra that brings it."""
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'asgi-metering\[postgres\]'"):
        store_from_url("postgresql://localhost/db")


def test_import_needs_no_driver() -> None:
    """Neither the package nor the way to its stores imports the driver."""
    code = "import sys, asgi_metering, asgi_metering.stores.urls; assert 'psycopg' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0

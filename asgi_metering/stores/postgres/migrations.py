"""
Migrations: the numbered ``.sql`` files beside this module, and the way each is applied once.

Applied by ``asgi-metering migrate``, under load and from several machines at once: one at a time, each in a
transaction of its own, which gives up rather than let everybody wait behind it. Does not know what the tables are for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Final, NamedTuple

from asgi_metering.stores.postgres.link import Link, Statement

__all__ = ["MIGRATIONS", "SCHEMA_VERSION", "Migration", "applied", "migrate", "opening", "pending", "script"]

_FILE: Final = re.compile(r"(\d{4})_(\w+)\.sql")

_LOCK_TIMEOUT: Final = "3s"
"""Whoever waits for a table keeps everybody behind it waiting: better to fail, and to be run again."""

_IDLE_TIMEOUT: Final = "60s"
"""Between two trips of a migration milliseconds pass. A process that is stopped there keeps its locks so long."""

_ATTEMPTS: Final = 10
"""
At one migration that deadlocks with the batches of running stores: each takes its tables in an order of its own, so
the server has to end one of the two, after ``deadlock_timeout``, a second unless set otherwise.
"""


class Migration(NamedTuple):
    """One step: its number, its name, and its statements, which say no schema."""

    number: int
    name: str
    text: str


def _read() -> tuple[Migration, ...]:
    found = []
    for file in files(__package__).iterdir():
        match = _FILE.fullmatch(file.name)
        if match is not None:
            found.append(Migration(int(match[1]), match[2], file.read_text("utf-8")))
    return tuple(sorted(found))


MIGRATIONS: Final = _read()

SCHEMA_VERSION: Final = MIGRATIONS[-1].number
"""The number of the last one: what this version of the package works on."""


def pending(done: Iterable[int], migrations: Sequence[Migration] = MIGRATIONS) -> list[Migration]:
    """Those of *migrations* that are not among *done*, in order."""
    known = set(done)
    return [migration for migration in migrations if migration.number not in known]


def script(schema: str, migrations: Sequence[Migration] = MIGRATIONS) -> str:
    """
    All of *migrations* as a script for ``psql``, each one transaction.

    It makes no harm where some were applied already: the first such one ends it, and nothing of that one is done.
    """
    parts = [r"\set ON_ERROR_STOP on"]
    for migration in migrations:
        parts.append(f"-- {migration.number:04} {migration.name}\n" + ";\n".join(opening(schema)) + ";")
        parts.append(_note(schema, migration) + ";")
        parts.append(migration.text.strip())
        parts.append("COMMIT;")
    return "\n\n".join(parts) + "\n"


async def applied(link: Link, schema: str, answer_within_s: float) -> list[int]:
    """The numbers of the migrations that *schema* has; none where it is not there."""
    there = Statement("SELECT to_regclass($1::text) IS NOT NULL", (f'"{schema}".migration',))
    ((is_there,),) = (await link.trip([there], answer_within_s))[0]
    if not is_there:
        return []
    rows = await link.trip([Statement(f'SELECT number FROM "{schema}".migration ORDER BY number')], answer_within_s)  # noqa: S608
    return [number for (number,) in rows[0]]


async def migrate(
    link: Link, schema: str, answer_within_s: float, migrations: Sequence[Migration] = MIGRATIONS
) -> list[Migration]:
    """
    Apply what is pending, and return it. Where several do so at once, each migration is applied by one of them.

    One that deadlocks with running stores is begun again, a few times.

    Raises:
        psycopg.Error: One could not be applied; those before it stay, nothing of it does.
    """
    from psycopg.errors import DeadlockDetected

    done = []
    for migration in pending(await applied(link, schema, answer_within_s), migrations):
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                if await _apply(link, schema, answer_within_s, migration):
                    done.append(migration)
                break
            except DeadlockDetected:
                if attempt == _ATTEMPTS:
                    raise
    return done


async def _apply(link: Link, schema: str, answer_within_s: float, migration: Migration) -> bool:
    """Apply *migration* in one transaction; False where another has applied it meanwhile."""
    try:
        await link.trip(list(map(Statement, opening(schema))), answer_within_s)
        # Behind the lock: another may have applied it while this one waited.
        if migration.number in await applied(link, schema, answer_within_s):
            return False
        steps = [*_statements(migration.text), _note(schema, migration)]
        await link.trip([*map(Statement, steps), Statement("COMMIT")], answer_within_s)
        return True
    finally:
        if link.is_open:
            await link.trip([Statement("ROLLBACK")], answer_within_s)


def opening(schema: str) -> list[str]:
    """The statements that begin a migration's transaction: behind them nobody else migrates this schema."""
    return [
        # Said in full: by default it may be one that does not see what was committed while it waited, or may not write.
        "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE",
        # None of the limits that are meant for an application's transactions.
        "SET LOCAL statement_timeout = 0",
        "SET LOCAL lock_timeout = 0",
        f"SET LOCAL idle_in_transaction_session_timeout = '{_IDLE_TIMEOUT}'",
        # No function that somebody has made of the same name as one of the server's.
        "SET LOCAL search_path TO pg_catalog",
        # Known from version 17 on.
        "SELECT set_config(name, '0', true) FROM pg_settings WHERE name = 'transaction_timeout'",
        f"SELECT pg_advisory_xact_lock(hashtextextended('asgi_metering migrations of {schema}', 0))",
        f"SET LOCAL lock_timeout = '{_LOCK_TIMEOUT}'",
        # A session that knows the catalogue, a pooler's say, looks for what others made while it waited only when it
        # uses a table; else it would make the schema once more.
        "SELECT FROM pg_namespace LIMIT 0",
        # Not with IF NOT EXISTS, which asks for the right to make schemas although there is one.
        f"DO $$ BEGIN IF to_regnamespace('{schema}') IS NULL THEN CREATE SCHEMA \"{schema}\"; END IF; END $$",
        f'SET LOCAL search_path TO "{schema}"',
        (
            "CREATE TABLE IF NOT EXISTS migration ("
            "number INTEGER PRIMARY KEY, name TEXT NOT NULL, applied_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp())"
        ),
    ]


def _note(schema: str, migration: Migration) -> str:
    return f"INSERT INTO \"{schema}\".migration (number, name) VALUES ({migration.number}, '{migration.name}')"  # noqa: S608


def _statements(text: str) -> list[str]:
    """The statements of a migration, one by one; none of them has a semicolon inside."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("--")]
    return [statement for statement in map(str.strip, "\n".join(lines).split(";")) if statement]

"""
One database: how to reach it, which schema it must have, and what its errors mean.

The only place that knows PostgreSQL's error codes and settings. Does not know what the tables are for.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Final
from urllib.parse import urlsplit

from asgi_metering.errors import (
    ConfigurationError,
    MeteringError,
    StoreContendedError,
    StoreError,
    StoreUnavailableError,
)
from asgi_metering.stores.postgres.link import CutError, Link, Statement, connect, driver
from asgi_metering.stores.postgres.migrations import SCHEMA_VERSION, Migration, applied, migrate
from asgi_metering.stores.postgres.prepared import CHANGED, FORGOTTEN

__all__ = ["DEFAULT_NAMESPACE", "MAY_BEGIN_AGAIN", "Database", "check_namespace"]

_log = logging.getLogger("asgi_metering.stores")

DEFAULT_NAMESPACE: Final = "asgi_metering"

_NAMESPACE: Final = re.compile(r"[a-z_][a-z0-9_]{0,62}")

CONNECT_TIMEOUT_S: Final = 5.0
"""For all addresses together: a database that does not answer by then is not there."""

IDLE_TIMEOUT_S: Final = 5.0
"""Between the trips of a batch we compute for milliseconds. A process that is stopped there keeps its locks so long."""

MAY_BEGIN_AGAIN: Final = frozenset(
    (
        "40001",  # serialization_failure
        "40P01",  # deadlock_detected
        "23505",  # unique_violation: another process has made the same row first
    )
)
"""Codes of failures that are nobody's mistake: the same batch, begun again, meets what the others have left."""

_REFUSED_SETTING: Final = "call_bool_check_hook"
"""
Where a standby refuses a transaction that may write. The code, `CHANGED`, says only that something is not supported,
and the text is translated.
"""

_FORBIDDEN: Final = """
    SELECT c.relname FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = $1::text AND c.relkind IN ('r', 'p') AND c.relname <> 'migration' AND NOT (
        has_table_privilege(c.oid, 'SELECT') AND has_table_privilege(c.oid, 'INSERT')
        AND has_table_privilege(c.oid, 'UPDATE') AND has_table_privilege(c.oid, 'DELETE')
    ) ORDER BY c.relname
"""
"""Tables that we may not use: rights are often granted once, and a later migration may have made some."""


def check_namespace(name: str) -> str:
    """
    Return *name* if it may be a schema's.

    Raises:
        ConfigurationError: Not 1 to 63 of ``a-z``, ``0-9`` and ``_``, or it begins with a digit or ``pg_``.
    """
    if not isinstance(name, str) or _NAMESPACE.fullmatch(name) is None or name.startswith("pg_"):
        raise ConfigurationError(
            f"The namespace {name!r} cannot be a PostgreSQL schema of ours. Use 1 to 63 lower-case letters, digits and "
            f"'_', beginning with none of the digits and not with 'pg_'."
        )
    return name


class Database:
    """
    How to reach one schema of one database.

    Args:
        url: ``postgresql://``, as libpq takes it.
        namespace: The schema.
        busy_timeout_s: How long a statement may wait for others.
        answer_within_s: How long a trip may take.
        prepares: Whether the server may keep statements prepared.

    Attributes:
        prepares: The same; no more once something in between has forgotten them.
    """

    def __init__(
        self, url: str, namespace: str, busy_timeout_s: float, answer_within_s: float, *, prepares: bool
    ) -> None:
        self.namespace = check_namespace(namespace)
        self._url = url
        self.busy_timeout_s = busy_timeout_s
        self.answer_within_s = answer_within_s
        self.prepares = prepares
        self.name = shown(url)
        psycopg = driver()
        try:
            given = psycopg.conninfo.conninfo_to_dict(url)
        except psycopg.ProgrammingError as error:
            raise ConfigurationError(
                f"The store URL {self.name!r} is not one of PostgreSQL: {_sentence(error)}. Write "
                f"postgresql://user:password@host:5432/database."
            ) from error
        # Texts go out as they are, in UTF-8: in any other encoding the keys of rows would not come back as they went.
        kept = {"application_name": "asgi_metering", **given, "client_encoding": "UTF8"}
        self._conninfo = psycopg.conninfo.make_conninfo(**kept)
        settings = {
            # A function of somebody else, of the same name and made to fit better, would run in place of the server's.
            "search_path": "pg_catalog, pg_temp",
            # Every query of the store looks rows up by keys; what the planner knows of a young table misleads it.
            "enable_seqscan": "off",
            "enable_bitmapscan": "off",
            "enable_hashjoin": "off",
            "enable_mergejoin": "off",
            # No plan hangs on the values of keys; by itself the server plans five times before it believes that.
            "plan_cache_mode": "force_generic_plan",
            "lock_timeout": str(int(busy_timeout_s * 1000)),
            "statement_timeout": str(int(answer_within_s * 1000)),
            "idle_in_transaction_session_timeout": str(int(IDLE_TIMEOUT_S * 1000)),
        }
        # For this transaction only: behind a pooler the next one may belong to somebody else.
        calls = ", ".join(f"set_config('{name}', '{value}', true)" for name, value in settings.items())
        self.begin: Sequence[Statement] = (
            Statement("BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE"),
            Statement(f"SELECT {calls}"),
        )
        self.begin_reading: Sequence[Statement] = (
            Statement("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"),
            self.begin[1],
        )

    async def connect(self) -> Link:
        """
        Connect.

        Raises:
            StoreUnavailableError: It cannot be reached, or lets us not in.
        """
        try:
            return await connect(self._conninfo, CONNECT_TIMEOUT_S, prepares=self.prepares)
        except TimeoutError as error:
            raise StoreUnavailableError(
                f"{self.name} did not answer within {CONNECT_TIMEOUT_S} s. Check its address, and that it runs."
            ) from error
        except driver().Error as error:
            raise self._refused(error) from error

    async def migrate(self, link: Link, answer_within_s: float) -> list[Migration]:
        """
        Bring the schema up to date, and return what was applied.

        Raises:
            StoreContendedError: A table was in use for too long.
            StoreUnavailableError: It cannot be done, or not by this user.
        """
        try:
            return await migrate(link, self.namespace, answer_within_s)
        except (CutError, driver().Error) as error:
            if getattr(error, "sqlstate", None) == "42501":
                raise StoreUnavailableError(
                    f"{self.name} forbids what a migration does: {_sentence(error)}. Migrate as the user who owns the "
                    f"schema {self.namespace!r} and its tables; where it is missing, as one who may CREATE in the "
                    f"database."
                ) from error
            raise self.meaning(error) from error

    async def prepare(self, link: Link, is_migrating: bool) -> None:
        """
        Check that the schema is what this version works on.

        Args:
            link: A connection.
            is_migrating: Whether to bring it up to date first.

        Raises:
            ConfigurationError: It is missing, older or newer, or the database cannot keep every text.
            StoreUnavailableError: It cannot be used, or not by this user.
        """
        if is_migrating:
            await self.migrate(link, self.answer_within_s)
        try:
            asked = [Statement("SHOW server_encoding"), Statement(_FORBIDDEN, (self.namespace,))]
            ((encoding,),), forbidden = await link.trip(asked, self.answer_within_s)
            version = max(await applied(link, self.namespace, self.answer_within_s), default=0)
        except (CutError, driver().Error) as error:
            raise self.meaning(error) from error
        if encoding != "UTF8":
            raise ConfigurationError(
                f"{self.name} is encoded in {encoding}, which cannot keep every text. Create the database with "
                f"ENCODING 'UTF8'."
            )
        if version < SCHEMA_VERSION:
            state = "has no tables of asgi_metering" if not version else f"has version {version} of them"
            raise ConfigurationError(
                f"The schema {self.namespace!r} of {self.name} {state}, and this version of asgi_metering works on "
                f"{SCHEMA_VERSION}. Run: asgi-metering migrate"
            )
        if version > SCHEMA_VERSION:
            raise ConfigurationError(
                f"The schema {self.namespace!r} of {self.name} has version {version}, newer than {SCHEMA_VERSION}, "
                f"which this version of asgi_metering knows. Upgrade asgi_metering."
            )
        if forbidden:
            raise self._forbids(f"permission denied for {', '.join(name for (name,) in forbidden)}")

    # -- errors --------------------------------------------------------------------------------------------

    def _refused(self, error: Exception) -> StoreError:
        """What it means that no connection came about."""
        said, code = _sentence(error), getattr(error, "sqlstate", None)
        text = said.lower()
        mend = "Check its address, and that it runs"
        if code in ("28P01", "28000") or "authentication failed" in text or "no password supplied" in text:
            mend = "Check user and password of the store URL, and the server's pg_hba.conf"
        elif code == "3D000" or ("database" in text and "does not exist" in text):
            mend = "Create the database, or name another in the store URL"
        elif code == "53300" or "too many" in text:
            mend = "Raise max_connections or the role's CONNECTION LIMIT, or put a pooler such as PgBouncer before it"
        elif "ssl" in text or "certificate" in text:
            mend = "Check sslmode and sslrootcert of the store URL against what the server offers"
        elif "not permitted to log in" in text:
            mend = "Give the user LOGIN, or name another in the store URL"
        elif "permission denied" in text or code == "42501":
            mend = "Grant the user CONNECT on the database"
        return StoreUnavailableError(f"{self.name} cannot be connected to: {said}. {mend}.")

    def meaning(self, error: BaseException) -> MeteringError:
        """What *error* of a trip means to whoever runs the store: one sentence of fact, one of mend."""
        code = str(getattr(error, "sqlstate", None) or "")
        said = _sentence(error)
        if isinstance(error, CutError) or code == "57014":
            return StoreUnavailableError(
                f"{self.name} gave no answer within {self.answer_within_s} s. Look at its load and at the network."
            )
        if code == "55P03":
            return StoreContendedError(
                f"Other transactions kept rows of {self.name} locked for {self.busy_timeout_s} s, so nothing was done. "
                f"Find who holds a transaction open on it."
            )
        if code in ("3F000", "42P01", "42703", "42883"):
            return ConfigurationError(
                f"The schema {self.namespace!r} of {self.name} is not what asgi_metering made: {said}. "
                f"Run: asgi-metering migrate"
            )
        if code == "42501":
            return self._forbids(said)
        if self.is_of_standby(error):
            return StoreUnavailableError(
                f"{self.name} is read-only: {said}. Add target_session_attrs=read-write to the store URL, so that a "
                f"standby is passed over."
            )
        if code == "53200":
            return StoreContendedError(
                f"{self.name} has no room for more locks, so nothing was done. Raise max_locks_per_transaction."
            )
        if code == "53100":
            return StoreUnavailableError(f"{self.name} has no room to grow: {said}. Free disk space.")
        if "statement pooling mode" in said:
            return StoreUnavailableError(
                f"The pooler {self.name} gives each statement to another connection: {said}. Set pool_mode = "
                f"transaction for this database."
            )
        return StoreUnavailableError(f"{self.name} could not be used: {said}. Look at its log first.")

    @staticmethod
    def is_of_standby(error: BaseException) -> bool:
        """Whether the server may only be read from: another one has, or will have, its place."""
        code, told = getattr(error, "sqlstate", None), getattr(error, "diag", None)
        return code == "25006" or (code == CHANGED and getattr(told, "source_function", None) == _REFUSED_SETTING)

    def _forbids(self, said: str) -> StoreUnavailableError:
        return StoreUnavailableError(
            f"{self.name} forbids what the store does: {said}. Grant its user USAGE on the schema {self.namespace!r}, "
            f"and SELECT, INSERT, UPDATE and DELETE on its tables."
        )

    async def is_of_prepared(self, link: Link, error: BaseException) -> bool:
        """
        Whether *error* is of prepared statements alone, so that the same may be begun again: its transaction is over.

        What the server keeps for a table that was altered is prepared anew. Where statements do not last, none are used
        any more.
        """
        code = getattr(error, "sqlstate", None)
        if not link.prepares or (code != CHANGED and code not in FORGOTTEN):
            return False
        try:
            if code == CHANGED and await link.prepare_anew(self.answer_within_s):
                return True
        except (CutError, driver().Error):
            # The first failure is told, of a connection that is of no more use.
            link.close()
            return False
        if self.prepares:
            _log.warning(
                "%s forgets prepared statements, or keeps old ones, as poolers do. They are not used any more; with "
                "?prepare=no in the store URL they never are.",
                self.name,
            )
        self.prepares = link.prepares = False
        return True

    @staticmethod
    def is_about_a_value(error: BaseException) -> bool:
        """Whether the server speaks of something in one operation that it cannot keep, and not of itself."""
        return str(getattr(error, "sqlstate", None) or "").startswith("22")


def _sentence(error: BaseException) -> str:
    """What *error* says, in one line and without the full stop."""
    said = getattr(getattr(error, "diag", None), "message_primary", None) or str(error) or type(error).__name__
    return " ".join(said.split()).rstrip(".")


def shown(url: str) -> str:
    """Where *url* leads, without what may be a password."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2] or "the local server"
    return f"PostgreSQL at {host}{parts.path}"

"""
One SQLite file: connecting to it, its tables, and what its errors mean.

The only place that knows SQLite's result codes and settings. Does not know what the tables are for.
"""

from __future__ import annotations

import logging
import random
import sqlite3
import time
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Final, TypeVar

from asgi_metering.errors import (
    ConfigurationError,
    MeteringError,
    StoreContendedError,
    StoreError,
    StoreUnavailableError,
)
from asgi_metering.stores.sqlite.place import PlacedConnection, connected
from asgi_metering.stores.sqlite.thread import LostConnectionError

__all__ = ["SCHEMA_VERSION", "SYNCHRONOUS", "Database", "network_file_system"]

log = logging.getLogger("asgi_metering.stores")

SYNCHRONOUS: Final = ("EXTRA", "FULL", "NORMAL", "OFF")
"""
What a commit waits for. With FULL (and EXTRA) what is acknowledged survives a power cut; with NORMAL the last commits
before one may be lost, with OFF the file may be damaged by one. A killed process loses nothing with any of them.
"""

SCHEMA_VERSION: Final = 3
"""The number of the last ``.sql`` file beside this module; kept in the file's ``user_version``."""

APPLICATION_ID: Final = 0x6D657472
"""``metr``: says in the file's header whose tables these are, so that we never write into another program's file."""

WAL_BYTES_KEPT: Final = 64 * 1024 * 1024
"""The write-ahead log may grow while a reader pins it; afterwards it is cut back to this."""

LOCK_PAUSE_S: Final = (0.0005, 0.004)
"""Between two attempts to lock the file: about a commit of another process, drawn, so that nobody always loses."""

_BUSY: Final = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL)

_NETWORK_FILE_SYSTEMS: Final = frozenset(
    (
        "9p",
        "afs",
        "beegfs",
        "ceph",
        "cifs",
        "davfs",
        "fuse.sshfs",
        "glusterfs",
        "lustre",
        "nfs",
        "nfs4",
        "smb3",
        "smbfs",
    )
)

Result = TypeVar("Result")


class Database:
    """
    How to reach one file.

    Args:
        path: The file; it is created, its folder is not.
        synchronous: One of `SYNCHRONOUS`.
        busy_timeout_s: How long to try while others keep the file locked.
    """

    def __init__(self, path: Path, synchronous: str, busy_timeout_s: float) -> None:
        self.path = path
        self._synchronous = synchronous
        self._busy_timeout_s = busy_timeout_s
        self._is_made = False

    def begin_anew(self) -> None:
        """From here on the file may be made, if it is missing, by the first connection; not by those behind it."""
        self._is_made = False

    def connect_writer(self) -> sqlite3.Connection:
        """
        Connect, make the file ours if it is new, and bring its tables up to date.

        Raises:
            ConfigurationError: The folder is missing, or the file cannot be written or is not one of ours.
            LostConnectionError: It was there before.
            StoreContendedError: Others keep it locked.
            StoreUnavailableError: Anything else that SQLite says.
        """
        self._check_there()
        self._check_place()
        connection = self._connect()
        try:
            self.patiently(lambda: self._prepare(connection))
        except BaseException as error:
            connection.close()
            if isinstance(error, sqlite3.Error):
                raise self._unusable(error) from error
            raise
        self._is_made = True
        self._warn_of_network()
        return connection

    def connect_reader(self) -> sqlite3.Connection:
        """
        Connect for reading only, to a file that a writer has prepared.

        Raises:
            StoreUnavailableError: It cannot be opened.
        """
        self._check_there()
        connection = self._connect()
        connection.execute("PRAGMA query_only = ON")
        return connection

    def _connect(self) -> sqlite3.Connection:
        try:
            return connected(self.path)
        except sqlite3.Error as error:
            raise self.meaning(error) from error

    def check_in_place(self, connection: sqlite3.Connection) -> None:
        """
        Check that what *connection* writes to is the file that others find.

        Raises:
            LostConnectionError: It was moved, removed or replaced.
        """
        if isinstance(connection, PlacedConnection) and not connection.is_in_place():
            raise self._gone("was moved, removed or replaced while it was in use, so nothing was done")

    def _gone(self, what: str) -> LostConnectionError:
        return LostConnectionError(
            f"The SQLite file {str(self.path)!r} {what}. Put it back, or a backup in its place; the store goes on with "
            f"what it finds there. To begin with a new file, restart."
        )

    def _prepare(self, connection: sqlite3.Connection) -> None:
        # First of all, so that making a file waits for the disk as little, or as much, as using it.
        connection.execute(f"PRAGMA synchronous = {self._synchronous}")
        connection.execute(f"PRAGMA journal_size_limit = {WAL_BYTES_KEPT}")
        _make_ours(connection, self.path)

    def _check_there(self) -> None:
        if self._is_made and not self.path.exists():
            # SQLite would make a new one, in which nobody has any credit.
            raise self._gone("is gone")

    def _check_place(self) -> None:
        folder = self.path.parent
        if not folder.is_dir():
            raise ConfigurationError(
                f"The folder {str(folder)!r} of the SQLite file {self.path.name!r} does not exist. Create it first."
            )
        if self.path.is_dir():
            raise ConfigurationError(f"{str(self.path)!r} is a folder, not a SQLite file. Name a file in it.")

    def _warn_of_network(self) -> None:
        try:
            system = network_file_system(self.path, Path("/proc/self/mounts").read_text("utf-8", "replace"))
        except OSError:
            # Not Linux, or nothing may be read there: what cannot be told is not guessed at.
            return
        if system is not None:
            log.warning(
                "The SQLite file %r is on a network file system (%s), where locks between machines are not reliable. "
                "Put it on a local disk, or use PostgreSQL or Redis.",
                str(self.path),
                system,
            )

    def patiently(self, action: Callable[[], Result], pause: Callable[[float], None] = time.sleep) -> Result:
        """Do *action*, again and again while others keep the file locked, up to the timeout, with a *pause* between."""
        deadline = time.monotonic() + self._busy_timeout_s
        while True:
            try:
                return action()
            except sqlite3.OperationalError as error:
                if _primary(error) not in _BUSY or time.monotonic() >= deadline:
                    raise
            pause(random.uniform(*LOCK_PAUSE_S))  # noqa: S311 -- spreads attempts, hides nothing

    def _unusable(self, error: sqlite3.Error) -> MeteringError:
        if _primary(error) == sqlite3.SQLITE_NOTADB:
            return ConfigurationError(
                f"{str(self.path)!r} is not a SQLite database. Use another file, or move this one away."
            )
        return self.meaning(error)

    def meaning(self, error: sqlite3.Error) -> StoreError:
        """What *error* means to whoever runs the store: one sentence of fact, one of mend."""
        path, code = str(self.path), _primary(error)
        if code in _BUSY:
            return StoreContendedError(
                f"Other connections kept the SQLite file {path!r} locked for {self._busy_timeout_s} s, so nothing "
                f"was done. Find who holds a transaction open on it."
            )
        if code == sqlite3.SQLITE_READONLY:
            return StoreUnavailableError(
                f"The SQLite file {path!r} cannot be written. Give this process write access to it and its folder."
            )
        if code == sqlite3.SQLITE_CANTOPEN:
            return StoreUnavailableError(
                f"The SQLite file {path!r} cannot be opened. Give this process access to it and its folder."
            )
        if code == sqlite3.SQLITE_FULL:
            return StoreUnavailableError(f"There is no room for the SQLite file {path!r} to grow. Free disk space.")
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return StoreUnavailableError(f"The SQLite file {path!r} is damaged ({error}). Restore it from a backup.")
        if str(error).startswith("no such "):
            return StoreUnavailableError(
                f"The SQLite file {path!r} has not the tables of this version ({error}): somebody has changed them, or "
                f"restored an older backup. Restart, which brings an older file up to date, or restore a newer one."
            )
        return StoreUnavailableError(f"The SQLite file {path!r} could not be used: {error}. Look at its disk first.")


def _primary(error: sqlite3.Error) -> int:
    """The result code without its extension; 0 for errors that the Python module raises by itself."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def _make_ours(connection: sqlite3.Connection, path: Path) -> None:
    """Check whose file it is, switch it to write-ahead logging, and run the schema steps that it lacks."""
    # In one transaction: several that make a file at once see it empty or whole, and never one of these only.
    connection.execute("BEGIN")
    with connection:
        _checked_version(connection, path)
    (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise ConfigurationError(
            f"The SQLite file {str(path)!r} cannot use a write-ahead log (it stays at {mode!r}): its file system "
            f"shares no memory between processes. Put it on a local disk."
        )
    connection.execute("BEGIN IMMEDIATE")
    with connection:
        for number in range(_checked_version(connection, path) + 1, SCHEMA_VERSION + 1):
            for statement in _statements(number):
                connection.execute(statement)
        # Also when there was nothing to do: a file that cannot be written shall be found out now.
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _checked_version(connection: sqlite3.Connection, path: Path) -> int:
    """The file's schema version, 0 for an empty file; to be asked within a transaction."""
    ((owner,),) = connection.execute("PRAGMA application_id")
    ((version,),) = connection.execute("PRAGMA user_version")
    ((tables,),) = connection.execute("SELECT count(*) FROM sqlite_schema")
    if owner != APPLICATION_ID and (tables or owner or version):
        raise ConfigurationError(
            f"The SQLite file {str(path)!r} belongs to another program ({tables} tables and indexes). Give metering "
            f"a file of its own."
        )
    if version > SCHEMA_VERSION:
        raise ConfigurationError(
            f"The SQLite file {str(path)!r} has schema {version}, newer than {SCHEMA_VERSION}, which this version of "
            f"asgi_metering knows. Upgrade asgi_metering."
        )
    return int(version)


def _statements(number: int) -> Iterator[str]:
    """The statements of schema step *number*, one at a time: a script run whole would commit what is open."""
    (step,) = [file for file in files(__package__).iterdir() if file.name.startswith(f"{number:04}_")]
    statement = ""
    for line in step.read_text("utf-8").splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def network_file_system(path: Path, mounts: str) -> str | None:
    """
    The kind of network file system that *path* is on; None for a local one.

    Args:
        path: Any path.
        mounts: The text of Linux's ``/proc/self/mounts``: device, place, kind and more, a line each.
    """
    resolved = path.resolve()
    fields = [line.split(" ") for line in mounts.splitlines()]
    places = {Path(place.replace("\\040", " ")): kind for _, place, kind, *_ in fields}
    (kind,) = [places[place] for place in (resolved, *resolved.parents) if place in places][:1] or [""]
    return kind if kind in _NETWORK_FILE_SYSTEMS else None

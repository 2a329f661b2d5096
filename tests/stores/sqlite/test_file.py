"""The SQLite store's file: its settings, what makes it ours, and what it says of one that cannot be used."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import resource
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from asgi_metering.decisions import Decision
from asgi_metering.errors import (
    ConfigurationError,
    MeteringError,
    StoreContendedError,
)
from asgi_metering.rules.operations import Admit, LimitAsk, WindowKind
from asgi_metering.stores.sqlite import SQLiteStore, database
from asgi_metering.stores.sqlite.database import APPLICATION_ID, SCHEMA_VERSION, SYNCHRONOUS
from asgi_metering.stores.sqlite.place import connected
from asgi_metering.stores.sqlite.thread import Turn
from tests.stores.sqlite.support import available, grant, nothing, play

NOBODY = 65_534
"""A user that owns nothing, on any Unix."""


@pytest.mark.parametrize("path", ["", ":memory:"])
def test_construct_without_a_file(path: str) -> None:
    """A path that names no file is refused at once: its two connections would see two databases."""
    with pytest.raises(ConfigurationError, match="names no file"):
        SQLiteStore(path)


def test_construct_with_unknown_settings(path: Path) -> None:
    """Settings that SQLite would silently ignore are refused at once, and nothing is created."""
    with pytest.raises(ConfigurationError, match="synchronous='full' is unknown"):
        SQLiteStore(path, synchronous="full")
    for timeout_s in (-1.0, float("nan")):
        with pytest.raises(ConfigurationError, match="busy_timeout_s"):
            SQLiteStore(path, busy_timeout_s=timeout_s)
    assert not path.exists()


@pytest.mark.parametrize("synchronous", SYNCHRONOUS)
def test_open_sets_what_a_commit_waits_for(path: Path, synchronous: str) -> None:
    """The writer's connection uses a write-ahead log, and waits for the disk as it was told."""

    async def scene(store: SQLiteStore) -> None:
        assert store._threads is not None
        settings = await store._threads[0].call(_settings)
        assert settings == ("wal", {"OFF": 0, "NORMAL": 1, "FULL": 2, "EXTRA": 3}[synchronous])

    play(path, scene, synchronous=synchronous)


def _settings(turn: Turn[Any]) -> tuple[str, int]:
    pragmas = ("journal_mode", "synchronous")
    mode, synchronous = (turn.connection.execute(f"PRAGMA {name}").fetchone()[0] for name in pragmas)
    return mode, synchronous


def test_default_is_the_durable_setting(path: Path) -> None:
    """Without a word a store waits for the disk, and reads the machine's clock."""

    async def scene() -> None:
        store = SQLiteStore(path)
        await store.open()
        assert store._threads is not None
        assert await store._threads[0].call(_settings) == ("wal", 2)
        await store.close()

    asyncio.run(scene())


def test_open_makes_the_file_ours(path: Path) -> None:
    """A new file bears our mark and the number of its schema."""

    async def scene(store: SQLiteStore) -> None:
        await store.run([grant()])

    play(path, scene)
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
    assert connection.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


def test_close_leaves_a_single_file(path: Path) -> None:
    """After the last close the write-ahead log is back in the file, and nothing of the threads is left."""
    before = threading.active_count()

    async def scene(store: SQLiteStore) -> None:
        await store.run([grant()])
        assert threading.active_count() == before + 2

    play(path, scene)
    assert list(path.parent.iterdir()) == [path]
    assert threading.active_count() == before


def test_open_again_finds_everything(path: Path) -> None:
    """What was acknowledged is there after closing and opening, with the same store object or another."""

    async def first(store: SQLiteStore) -> None:
        await store.run([grant()])
        await store.close()
        await store.open()
        assert await available(store) == 100
        await store.run([grant("g2")])

    async def second(store: SQLiteStore) -> None:
        assert await available(store) == 200

    play(path, first)
    play(path, second)


def test_open_at_once_by_several_callers(path: Path) -> None:
    """Callers that open a store at the same time share one pair of threads."""
    before = threading.active_count()

    async def scene() -> None:
        store = SQLiteStore(path, synchronous="OFF")
        await asyncio.gather(*(store.open() for _ in range(5)))
        assert threading.active_count() == before + 2
        await store.close()

    asyncio.run(scene())


def test_open_and_use_in_several_loops(path: Path) -> None:
    """Event loops in several threads open and use one store at the same time, with one pair of threads."""
    before = threading.active_count()
    store = SQLiteStore(path, synchronous="OFF", busy_timeout_s=60.0)
    start = threading.Barrier(4)
    most: list[int] = []

    def use(name: str) -> None:
        async def scene() -> None:
            await store.open()
            for number in range(20):
                await store.post([grant(f"{name}.{number}", 1)])
            most.append(threading.active_count())

        start.wait()
        asyncio.run(scene())

    users = [threading.Thread(target=use, args=(f"loop{number}",)) for number in range(4)]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert max(most) <= before + len(users) + 2

    async def last() -> None:
        assert await available(store) == 80
        await store.close()

    asyncio.run(last())
    assert threading.active_count() == before


def test_cancel_an_opening_of_an_open_store(path: Path) -> None:
    """Who gives up opening a store that is open already, or that others are opening, closes it for nobody."""

    async def scene(store: SQLiteStore) -> None:
        second = asyncio.ensure_future(store.open())
        await asyncio.sleep(0)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        await store.run([grant()])

    play(path, scene)


def test_cancel_the_first_opening(path: Path) -> None:
    """Who gives up the first opening leaves no thread behind, and the next one opens the store."""
    before = threading.active_count()

    async def scene() -> None:
        store = SQLiteStore(path, synchronous="OFF")
        first = asyncio.ensure_future(store.open())
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert threading.active_count() == before
        await store.open()
        await store.close()

    asyncio.run(scene())


def failure_to_open(path: Path, **settings: Any) -> MeteringError:
    """What opening *path* raises; no thread is left behind."""
    before = threading.active_count()
    with pytest.raises(MeteringError) as caught:
        play(path, nothing, **settings)
    assert threading.active_count() == before
    return caught.value


def test_open_in_a_missing_folder(tmp_path: Path) -> None:
    """A missing folder is named; it is not created."""
    error = failure_to_open(tmp_path / "missing" / "metering.db")
    assert isinstance(error, ConfigurationError)
    assert str(error) == (
        f"The folder {str(tmp_path / 'missing')!r} of the SQLite file 'metering.db' does not exist. Create it first."
    )


def test_open_a_folder(tmp_path: Path) -> None:
    """A folder in place of a file is named as one."""
    assert "is a folder, not a SQLite file" in str(failure_to_open(tmp_path))


def test_open_what_is_not_a_database(path: Path) -> None:
    """A file of another kind is refused, and left as it was."""
    path.write_text("name,amount\n" * 500)
    error = failure_to_open(path)
    assert isinstance(error, ConfigurationError)
    assert "is not a SQLite database" in str(error)
    assert isinstance(error.__cause__, sqlite3.DatabaseError)
    assert path.read_text() == "name,amount\n" * 500


def test_open_another_programs_database(path: Path) -> None:
    """A database with tables of its own is not ours to write into."""
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE users (name TEXT)")
    connection.close()
    error = failure_to_open(path)
    assert isinstance(error, ConfigurationError)
    assert "belongs to another program (1 tables and indexes)" in str(error)
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT name FROM sqlite_schema").fetchall() == [("users",)]
    connection.close()


def test_open_a_file_that_another_process_makes_meanwhile(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What shows whose a file is is read in one go: it is seen empty, or as what others have made of it."""

    def connect(place: Path) -> Any:
        connection = connected(place)

        def make_it_meanwhile(statement: str) -> None:
            if "user_version" in statement:
                connection.set_trace_callback(None)
                other = connected(place)
                with suppress(sqlite3.OperationalError):
                    database._make_ours(other, place)
                other.close()

        connection.set_trace_callback(make_it_meanwhile)
        return connection

    monkeypatch.setattr(database, "connected", connect)

    async def scene(store: SQLiteStore) -> None:
        await store.post([grant()])
        assert await available(store) == 100

    play(path, scene)


def test_open_a_file_of_an_older_version(path: Path) -> None:
    """A file of the first schema is brought up to date once, and its counters go on; all kinds of limits work."""
    connection = sqlite3.connect(path)
    for statement in database._statements(1):
        connection.execute(statement)
    connection.execute("INSERT INTO counter VALUES ('old', 1, 1e11, 3, 0)")
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute("PRAGMA user_version = 1")
    connection.commit()
    connection.close()
    limits = (
        LimitAsk("calls", "old", WindowKind.FIXED, 5, 1e9),
        LimitAsk("log", "log", WindowKind.MOVING, 5, 1e9),
        LimitAsk("bucket", "bucket", WindowKind.BUCKET, 5, 1e9, refill=1),
    )
    left = []

    async def scene(store: SQLiteStore) -> None:
        (decision,) = await store.admit([Admit(f"c{len(left)}", "p", "credits", 0, 0, limits=limits)])
        assert isinstance(decision, Decision)
        left.append([window.remaining for window in decision.windows])

    play(path, scene)
    play(path, scene)
    assert left == [[1, 4, 4], [0, 3, 3]]


def test_open_a_newer_schema(path: Path) -> None:
    """A file that a newer version wrote is refused, and says what to do."""
    play(path, nothing)
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 6}")
    connection.close()
    error = failure_to_open(path)
    assert isinstance(error, ConfigurationError)
    assert f"has schema {SCHEMA_VERSION + 6}, newer than {SCHEMA_VERSION}" in str(error)
    assert str(error).endswith("Upgrade asgi_metering.")


def test_open_where_no_log_can_be_kept() -> None:
    """A database that cannot have a write-ahead log is refused: processes could not share it."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    with pytest.raises(ConfigurationError, match=r"cannot use a write-ahead log \(it stays at 'memory'\)"):
        database._make_ours(connection, Path("metering.db"))
    connection.close()


def test_open_without_a_free_file_handle(path: Path) -> None:
    """A process that has no file handle left is told that the file cannot be opened; nothing hangs."""
    play(path, nothing)
    context = multiprocessing.get_context("spawn")
    said = context.SimpleQueue()
    process = context.Process(target=_open_without_handles, args=(str(path), said))
    process.start()
    process.join()
    assert said.get().startswith(f"StoreUnavailableError: The SQLite file {str(path)!r} cannot be opened.")


def _open_without_handles(path: str, said: Any) -> None:
    store = SQLiteStore(path, synchronous="OFF")
    loop = asyncio.new_event_loop()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (8, hard))
    held = []
    try:
        while True:
            held.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        pass
    try:
        loop.run_until_complete(store.open())
    except Exception as error:
        failure = error
    for handle in held:
        os.close(handle)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    said.put(f"{type(failure).__name__}: {failure}")
    loop.close()


def test_open_a_schema_that_was_left_half_made(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A schema step is one transaction: what fails in its middle leaves an empty file, and the next opening works."""
    whole = database._statements
    monkeypatch.setattr(database, "_statements", lambda number: [*list(whole(number))[:3], "CREATE TABLE broken ("])
    failure_to_open(path)
    monkeypatch.undo()

    async def scene(store: SQLiteStore) -> None:
        await store.run([grant()])

    play(path, scene)


def test_open_locked_by_another_connection(path: Path) -> None:
    """A file that somebody else keeps locked is tried as long as it was allowed, and then named."""
    play(path, nothing)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("PRAGMA locking_mode = EXCLUSIVE")
    holder.execute("BEGIN IMMEDIATE")
    holder.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    error = failure_to_open(path, busy_timeout_s=0.02)
    assert isinstance(error, StoreContendedError)
    assert "locked for 0.02 s" in str(error)
    holder.close()
    play(path, nothing)


def test_open_waits_for_a_lock(path: Path) -> None:
    """Opening a file that is locked for a moment, by somebody who opens or closes it, waits for that moment."""
    play(path, nothing)

    async def scene() -> None:
        holder = sqlite3.connect(path, isolation_level=None)
        holder.execute("PRAGMA locking_mode = EXCLUSIVE")
        holder.execute("BEGIN IMMEDIATE")
        holder.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        store = SQLiteStore(path, synchronous="OFF", busy_timeout_s=60.0)
        opening = asyncio.ensure_future(store.open())
        await asyncio.sleep(0.01)
        assert not opening.done()
        holder.execute("COMMIT")
        holder.close()
        await opening
        await store.close()

    asyncio.run(scene())


def _as_nobody(target: Callable[[str, Any], None], path: Path) -> list[str]:
    """Run *target* in a process without special rights, and return what it said."""
    context = multiprocessing.get_context("spawn")
    said = context.SimpleQueue()
    process = context.Process(target=_demoted, args=(target, str(path), said))
    process.start()
    process.join()
    answers = []
    while not said.empty():
        answers.append(said.get())
    return answers


def _demoted(target: Callable[[str, Any], None], path: str, said: Any) -> None:
    if os.geteuid() == 0:
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    target(path, said)


def _open_and_tell(path: str, said: Any) -> None:
    try:
        play(Path(path), nothing)
    except Exception as error:
        said.put(f"{type(error).__name__}: {error}")


@pytest.fixture
def open_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that every user may look into."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.parametrize("folder_mode", [0o555, 0o777])
def test_open_a_file_that_may_not_be_written(open_folder: Path, folder_mode: int) -> None:
    """A read-only file is refused when it is opened, not at the first paying request."""
    path = open_folder / "metering.db"
    play(path, nothing)
    path.chmod(0o444)
    open_folder.chmod(folder_mode)
    (said,) = _as_nobody(_open_and_tell, path)
    assert said == (
        f"StoreUnavailableError: The SQLite file {str(path)!r} cannot be written. "
        f"Give this process write access to it and its folder."
    )
    open_folder.chmod(0o755)


def test_open_a_file_that_may_not_be_read(open_folder: Path) -> None:
    """A file without any rights cannot be opened, and says which rights are missing."""
    path = open_folder / "metering.db"
    play(path, nothing)
    path.chmod(0o000)
    (said,) = _as_nobody(_open_and_tell, path)
    assert said.startswith(f"StoreUnavailableError: The SQLite file {str(path)!r} cannot be opened.")

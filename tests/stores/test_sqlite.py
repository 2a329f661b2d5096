"""The SQLite store: its file, its threads, and what it says when something is wrong with either."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import resource
import signal
import sqlite3
import tempfile
import threading
import warnings
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from asgi_metering.errors import (
    ConfigurationError,
    MeteringError,
    StoreContendedError,
    StoreError,
    StoreUnavailableError,
)
from asgi_metering.receipts import Basis
from asgi_metering.rules.operations import Admit, Emit, End, PostGrant, Renew, Sweep, WalletSource
from asgi_metering.stores.contract import AccountRows, EverythingKept, PendingEvents
from asgi_metering.stores.sqlite import SQLiteStore, database, thread, working_copy
from asgi_metering.stores.sqlite.database import APPLICATION_ID, SCHEMA_VERSION, SYNCHRONOUS, network_file_system
from asgi_metering.stores.sqlite.thread import ConnectionThread, Turn
from asgi_metering.testing.clock import FakeClock

NOBODY = 65_534
"""A user that owns nothing, on any Unix."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file that is not there yet."""
    return tmp_path / "metering.db"


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


# -- settings ----------------------------------------------------------------------------------------------


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


# -- the file ----------------------------------------------------------------------------------------------


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
        play(path, _nothing, **settings)
    assert threading.active_count() == before
    return caught.value


async def _nothing(store: SQLiteStore) -> None:
    """Nothing to do with an open store."""


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


def test_open_a_newer_schema(path: Path) -> None:
    """A file that a newer version wrote is refused, and says what to do."""
    play(path, _nothing)
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
    play(path, _nothing)
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
    play(path, _nothing)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("PRAGMA locking_mode = EXCLUSIVE")
    holder.execute("BEGIN IMMEDIATE")
    holder.execute("PRAGMA user_version = 1")
    error = failure_to_open(path, busy_timeout_s=0.02)
    assert isinstance(error, StoreContendedError)
    assert "locked for 0.02 s" in str(error)
    holder.close()
    play(path, _nothing)


def test_open_waits_for_a_lock(path: Path) -> None:
    """Opening a file that is locked for a moment, by somebody who opens or closes it, waits for that moment."""
    play(path, _nothing)

    async def scene() -> None:
        holder = sqlite3.connect(path, isolation_level=None)
        holder.execute("PRAGMA locking_mode = EXCLUSIVE")
        holder.execute("BEGIN IMMEDIATE")
        holder.execute("PRAGMA user_version = 1")
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
        play(Path(path), _nothing)
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
    play(path, _nothing)
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
    play(path, _nothing)
    path.chmod(0o000)
    (said,) = _as_nobody(_open_and_tell, path)
    assert said.startswith(f"StoreUnavailableError: The SQLite file {str(path)!r} cannot be opened.")


# -- while it runs -----------------------------------------------------------------------------------------


def test_run_while_another_writes(path: Path) -> None:
    """While another connection writes, a batch waits; past its patience nothing was done, and it can be repeated."""

    async def scene(store: SQLiteStore) -> None:
        await store.run([grant()])
        holder = sqlite3.connect(path, isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreContendedError, match=r"locked for 0\.02 s, so nothing was done"):
            await store.run([grant("g2")])
        assert await available(store) == 100
        holder.execute("COMMIT")
        holder.close()
        await store.run([grant("g2")])
        assert await available(store) == 200

    play(path, scene, busy_timeout_s=0.02)


def test_run_waits_for_another_writer(path: Path) -> None:
    """A lock that is let go in time costs nothing but the wait."""

    async def scene(store: SQLiteStore) -> None:
        holder = sqlite3.connect(path, isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        waiting = asyncio.ensure_future(store.run([grant()]))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        holder.execute("COMMIT")
        holder.close()
        (receipt,) = await waiting
        assert not isinstance(receipt, Exception)

    play(path, scene, busy_timeout_s=60.0)


def test_read_while_another_writes(path: Path) -> None:
    """Readers never wait for writers: they see the last commit."""

    async def scene(store: SQLiteStore) -> None:
        await store.run([grant()])
        holder = sqlite3.connect(path, isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        holder.execute("UPDATE account SET granted = 0")
        assert await available(store) == 100
        holder.close()

    play(path, scene, busy_timeout_s=0.02)


def test_run_what_cannot_be_written(path: Path) -> None:
    """One operation that the file cannot take rolls its whole batch back and raises; it is no fault of the file."""
    events = [
        ({"when": object()}, TypeError),
        ({"x": float("inf")}, None),
    ]

    async def scene(store: SQLiteStore) -> None:
        assert store._threads is not None
        connection = await store._threads[0].call(lambda turn: turn.connection)
        for told, error in events:
            if error is None:
                await store.run([Emit((("e", told),))])
                continue
            with pytest.raises(error):
                await store.run([grant(), Emit((("e", told),))])
            assert (await store.read(EverythingKept())).state.accounts == {}
        for operation in (Emit((("\ud800", {}),)), PostGrant("g", "\ud800", "credits", 1)):
            with pytest.raises(UnicodeEncodeError):
                await store.run([grant(), operation])
        with pytest.raises(OverflowError):
            await store.run([grant(), PostGrant("g2", "p", "credits", 1, priority=2**70)])
        assert (await store.read(EverythingKept())).state.accounts == {}
        # Nor does the store remember what it had decided.
        (receipt,) = await store.post([grant()])
        assert receipt.applied
        assert await store._threads[0].call(lambda turn: turn.connection) is connection

    play(path, scene)


def test_run_without_room(path: Path) -> None:
    """A file that cannot grow says so; nothing of the batch is kept, and the store goes on when there is room."""

    async def scene(store: SQLiteStore) -> None:
        await store.run([grant()])
        assert store._threads is not None
        writer = store._threads[0]

        def limit(pages: int) -> Callable[[Turn[Any]], int]:
            return lambda turn: turn.connection.execute(f"PRAGMA max_page_count = {pages}").fetchone()[0]

        await writer.call(limit(1))
        with pytest.raises(StoreUnavailableError, match=r"There is no room for the SQLite file .* Free disk space"):
            await store.run([Emit(((f"e{number}", {"told": "x" * 1_000}),)) for number in range(500)])
        assert (await store.read(PendingEvents())).state.events == {}
        assert await available(store) == 100
        await writer.call(limit(1_000_000))
        await store.run([grant("g2")])
        assert await available(store) == 200

    play(path, scene)


def test_run_past_the_limit_of_a_files_size(path: Path) -> None:
    """A disk that takes no more bytes is an unavailable store, not a broken one."""
    context = multiprocessing.get_context("spawn")
    said = context.SimpleQueue()
    process = context.Process(target=_write_into_a_wall, args=(str(path), said))
    process.start()
    process.join()
    assert (process.exitcode, said.get()) == (0, "StoreUnavailableError")

    async def scene(store: SQLiteStore) -> None:
        assert await available(store) == 100

    play(path, scene)


def _write_into_a_wall(path: str, said: Any) -> None:
    async def scene(store: SQLiteStore) -> None:
        await store.run([grant()])
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
        try:
            await store.run([Emit(((f"e{number}", {"told": "x" * 1_000}),)) for number in range(1_000)])
        except StoreError as error:
            said.put(type(error).__name__)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    play(Path(path), scene)


def test_run_on_a_damaged_file(path: Path) -> None:
    """Damage is told as what it is, by writes and by reads."""

    async def fill(store: SQLiteStore) -> None:
        await store.run([Emit(((f"e{number}", {"told": "x" * 500}),)) for number in range(200)])

    async def scene(store: SQLiteStore) -> None:
        for doing in (store.read(EverythingKept()), store.run([grant()])):
            with pytest.raises(StoreUnavailableError, match=r"is damaged .* Restore it from a backup"):
                await doing

    play(path, fill)
    with sqlite3.connect(path) as connection:
        ((size,),) = connection.execute("PRAGMA page_size")
        roots = [page for (page,) in connection.execute("SELECT rootpage FROM sqlite_schema WHERE rootpage > 1")]
    connection.close()
    # Every table's first page, and not what says which tables there are.
    with path.open("r+b") as file:
        for page in roots:
            file.seek((page - 1) * size)
            file.write(b"\xff" * size)
    play(path, scene)


def test_use_before_open_and_after_close(path: Path) -> None:
    """A store that is not open says so, before and after its life."""

    async def scene() -> None:
        store = SQLiteStore(path, synchronous="OFF")
        for _ in range(2):
            with pytest.raises(StoreUnavailableError, match="is not open"):
                await store.run([grant()])
            with pytest.raises(StoreUnavailableError, match="is not open"):
                await store.read(EverythingKept())
            await store.open()
            await store.close()

    asyncio.run(scene())


def test_use_after_a_fork(path: Path) -> None:
    """A child that was forked with an open store is told to open its own, instead of waiting for threads it lacks."""

    async def scene(store: SQLiteStore) -> None:
        await store.run([grant()])
        reads, writes = os.pipe()
        with warnings.catch_warnings():
            # That forking with threads is dangerous is what this test is about.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if not child:
            _use_and_tell(store, writes)
        os.close(writes)
        said = os.read(reads, 1_000)
        os.close(reads)
        _bury(child)
        assert b"was opened by process" in said
        assert await available(store) == 200
        await store.run([grant("g2")])

    play(path, scene)


def _bury(child: int) -> None:
    os.waitpid(child, 0)


def _use_and_tell(store: SQLiteStore, writes: int) -> NoReturn:
    """In the child: use the store as it is, and then open it in a loop and a thread of the child's own."""
    # Should it hang, it ends by itself: nobody else would end it.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(20)
    try:
        store.run([grant()]).send(None)
    except StoreUnavailableError as error:
        os.write(writes, str(error).encode())

    async def scene() -> None:
        await store.open()
        await store.run([grant("of the child")])
        await store.close()

    own = threading.Thread(target=asyncio.run, args=(scene(),))
    own.start()
    own.join()
    os._exit(0)


def test_run_answers_although_the_caller_left(path: Path) -> None:
    """A caller that is cancelled while its batch is away harms nobody: the batch is done, the next one is answered."""

    async def scene(store: SQLiteStore) -> None:
        complaints: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
        task = asyncio.ensure_future(store.run([grant()]))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [getattr(answer, "applied", None) for answer in await store.run([grant()])] == [False]
        assert complaints == []

    play(path, scene)


def test_finish_a_batch_whose_loop_is_gone(path: Path) -> None:
    """A batch that was handed over is done, although the loop that waits for it was closed meanwhile."""
    store = SQLiteStore(path, synchronous="OFF")
    holder_is_in = threading.Event()
    let_go = threading.Event()
    loop = asyncio.new_event_loop()
    loop.run_until_complete(store.open())

    def hold(turn: Turn[Any]) -> None:
        holder_is_in.set()
        let_go.wait()

    assert store._threads is not None
    writer = store._threads[0]
    tasks = [loop.create_task(writer.call(hold)), loop.create_task(store.run([grant()]))]
    loop.run_until_complete(asyncio.sleep(0))
    holder_is_in.wait()
    for task in tasks:
        task.cancel()
    loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    loop.close()
    let_go.set()

    async def later() -> None:
        # Behind the batch, in the same thread.
        (again,) = await store.post([grant()])
        assert not again.applied
        assert again.available == 100
        await store.close()

    asyncio.run(later())


def test_close_while_it_works(path: Path) -> None:
    """Closing waits for what was handed over before."""

    async def scene(store: SQLiteStore) -> None:
        runs = [asyncio.ensure_future(store.run([grant(f"g{number}")])) for number in range(20)]
        await asyncio.sleep(0)
        await store.close()
        assert all(len(answers) == 1 for answers in await asyncio.gather(*runs))
        await store.open()
        assert await available(store) == 2_000

    play(path, scene)


def test_hand_over_to_a_thread_that_has_ended(path: Path) -> None:
    """A job that comes after the end is refused instead of waiting for ever; stopping again does nothing."""

    async def scene() -> None:
        owner = ConnectionThread("test", lambda: sqlite3.connect(path))
        await owner.stop()
        await owner.stop()
        with pytest.raises(StoreUnavailableError, match="The thread 'test' has ended"):
            await owner.call(lambda turn: None)

    asyncio.run(scene())


def test_thread_makes_a_new_connection_when_the_old_one_broke(path: Path) -> None:
    """A job that leaves its transaction open loses the connection with it; the next job gets a fresh one."""

    def leave_open(turn: Turn[Any]) -> None:
        turn.connection.execute("BEGIN")
        raise ValueError("left in the middle")

    async def scene() -> None:
        made: list[sqlite3.Connection] = []

        def connect() -> sqlite3.Connection:
            made.append(sqlite3.connect(path, isolation_level=None))
            return made[-1]

        owner = ConnectionThread("test", connect)
        with pytest.raises(ValueError, match="left in the middle"):
            await owner.call(leave_open)
        assert await owner.call(lambda turn: turn.connection.in_transaction) is False
        assert len(made) == 2
        await owner.stop()

    asyncio.run(scene())


def test_keep_no_more_rows_than_a_bound(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a store keeps of its file between batches is bounded, however many calls, events and lines go through."""
    monkeypatch.setattr(working_copy, "MAX_KNOWN", 20)

    async def scene(store: SQLiteStore) -> None:
        await store.run([grant()])
        for number in range(60):
            call = Admit(f"c{number}", "p", "credits", 1, 1, (WalletSource(),))
            await store.run([call, End(f"c{number}", 1, Basis.USAGE, event={"outcome": "completed"})])
            copy: Any = store._copy
            assert len(copy._known) <= 25
            assert len(copy._state.holds) <= 20
            assert len(copy._state.events) == 1
            assert sum(map(len, copy._state.entries.values())) == 1
        assert await available(store) == 40

    play(path, scene)


# -- time --------------------------------------------------------------------------------------------------


def test_run_reads_the_clock_once_inside_the_transaction(path: Path) -> None:
    """The time of a batch is read when nobody else can write any more, and is the same for all of its operations."""
    clock = FakeClock()
    inside: list[bool] = []

    def reading() -> float:
        probe = sqlite3.connect(path, timeout=0.0, isolation_level=None)
        try:
            probe.execute("BEGIN IMMEDIATE")
            inside.append(False)
        except sqlite3.OperationalError:
            inside.append(True)
        finally:
            probe.close()
        return clock.advance(1.0)

    async def scene(store: SQLiteStore) -> None:
        asks = [Admit(f"c{number}", "p", "credits", 1, 1, (WalletSource(),)) for number in range(3)]
        answers: list[Any] = await store.run([grant(), *asks])
        assert len({decision.now for decision in answers[1:]}) == 1
        assert inside == [True]

    play(path, scene, clock=reading)


def test_step_aside_for_a_job_that_computes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that computes for long has the interpreter for itself: the loop stops for it, up to a bound."""
    monkeypatch.setattr(thread, "STEP_ASIDE_AFTER_S", 0.0)
    monkeypatch.setattr(thread, "STEP_ASIDE_S", 60.0)
    turned = threading.Event()

    async def scene(store: SQLiteStore) -> None:
        assert store._threads is not None
        asyncio.get_running_loop().call_later(0.005, turned.set)
        assert await store._threads[0].call(lambda turn: turned.wait(0.2)) is False

    play(path, scene)


def test_step_aside_for_the_first_in_line_only(path: Path) -> None:
    """However many jobs stand behind the one that is on, the loop stops for that one, and then for the next."""

    async def scene(store: SQLiteStore) -> None:
        assert store._threads is not None
        writer = store._threads[0]
        gates = [threading.Event() for _ in range(4)]

        def blocked(gate: threading.Event) -> Callable[[Turn[bool]], bool]:
            return lambda turn: gate.wait()

        jobs = [asyncio.ensure_future(writer.call(blocked(gate))) for gate in gates]
        await asyncio.sleep(0)
        for job, gate in zip(jobs, gates, strict=True):
            ahead = list(writer._standing)
            assert [turn.is_on for turn in ahead] == [True] + [False] * (len(ahead) - 1)
            gate.set()
            await job
        assert not writer._standing

    play(path, scene)


def test_glance_aside_for_a_job_that_waits(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a job that waits for the disk or a lock the loop only lets go for moments, and goes on."""
    monkeypatch.setattr(thread, "STEP_ASIDE_AFTER_S", 0.0)
    glanced = threading.Event()
    paused: list[float] = []

    def sleep(seconds: float) -> None:
        paused.append(seconds)
        glanced.set()

    monkeypatch.setattr(thread.time, "sleep", sleep)

    def waiting(turn: Turn[bool]) -> bool:
        turn.waits = True
        return glanced.wait()

    async def scene(store: SQLiteStore) -> None:
        assert store._threads is not None
        assert await store._threads[0].call(waiting)
        assert set(paused) == {thread.GLIMPSE_S}

    play(path, scene)


# -- network file systems ----------------------------------------------------------------------------------

MOUNTS = """\
/dev/vda1 / ext4 rw,relatime 0 0
server:/export /srv/shared nfs4 rw,vers=4.2 0 0
//server/share /srv/shared/local\\040disk cifs rw 0 0
tmpfs /srv/shared/fast tmpfs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/srv/other/m.db", None),
        ("/srv/shared/m.db", "nfs4"),
        ("/srv/shared/deep/er/m.db", "nfs4"),
        ("/srv/shared/local disk/m.db", "cifs"),
        ("/srv/shared/fast/m.db", None),
        ("/srv/sharedness/m.db", None),
    ],
)
def test_recognise_a_network_file_system(path: str, kind: str | None) -> None:
    """The innermost mount decides whether a file is on a network file system."""
    assert network_file_system(Path(path), MOUNTS) == kind


def test_open_on_a_network_file_system(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A file on a network file system is opened, with a warning that says what to do instead."""
    monkeypatch.setattr(database, "network_file_system", lambda path, mounts: "nfs4")
    with caplog.at_level(logging.WARNING):
        play(path, _nothing)
    assert "is on a network file system (nfs4)" in caplog.text


def test_give_back_to_a_spent_grant_after_reopening(tmp_path: Path) -> None:
    """A late end finds the spent grant that paid another call's debt in the file, and not only among kept rows."""
    clock = FakeClock()

    async def play() -> None:
        store = SQLiteStore(tmp_path / "books.db", clock=clock)
        await store.open()
        await store.post([PostGrant("first", "p", "c", 10, 5)])
        for call, observed in (("a", 8), ("b", 5)):
            await store.admit([Admit(call, "p", "c", 5, 5, (WalletSource(),), ttl_s=60, grace_s=30)])
            await store.renew([Renew(call, observed)])
        clock.advance(100)
        await store.run([Sweep()])
        await store.post([PostGrant("second", "p", "c", 3)])
        await store.end([End("a", None)])
        await store.close()
        await store.open()
        (receipt,) = await store.end([End("b", None)])
        assert receipt.late == -5
        rows = (await store.read(AccountRows("p", "c"))).state
        assert rows.accounts["p", "c"].available == 13
        await store.close()

    asyncio.run(play())

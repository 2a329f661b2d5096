"""The SQLite store while it runs: other writers, full disks, forks, threads, and time."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import resource
import signal
import sqlite3
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from asgi_metering.errors import (
    MeteringError,
    StoreContendedError,
    StoreError,
    StoreUnavailableError,
)
from asgi_metering.receipts import Basis
from asgi_metering.rules.operations import Admit, Emit, End, PostGrant, Renew, Sweep, WalletSource
from asgi_metering.stores.contract import AccountRows, EverythingKept, PendingEvents
from asgi_metering.stores.sqlite import SQLiteStore, database, resident, thread
from asgi_metering.stores.sqlite.database import network_file_system
from asgi_metering.stores.sqlite.thread import ConnectionThread, Turn
from asgi_metering.testing.clock import FakeClock
from tests.stores.sqlite.support import available, grant, nothing, play


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
    monkeypatch.setattr(resident, "MAX_KNOWN", 20)

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


def test_start_as_run_in_one_turn_of_the_loop(path: Path) -> None:
    """One operation is handed over in its caller's turn; what it answers, or raises, is told once, from the loop."""
    unwritable = Emit((("e", {"told": object()}),))

    async def scene(store: SQLiteStore) -> None:
        told: asyncio.Queue[Any] = asyncio.Queue()
        mistake = grant("negative", -1)
        for operation in (grant(), mistake, unwritable, grant()):
            assert store.start(operation, told.put_nowait)
        given, refused, failure, again = [await told.get() for _ in range(4)]
        assert (given.applied, again.applied, again.available) == (True, False, 100)
        assert isinstance(refused, MeteringError)
        assert isinstance(failure, TypeError)
        await store.close()
        assert not store.start(grant(), told.put_nowait)
        assert told.empty()

    play(path, scene)


def test_tell_once_when_the_loop_stepped_aside(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that stepped aside until the job was done tells what came of it at once, and not again."""
    monkeypatch.setattr(thread, "STEP_ASIDE_AFTER_S", 0.0)
    monkeypatch.setattr(thread, "STEP_ASIDE_S", 60.0)
    told: list[Any] = []

    async def scene(store: SQLiteStore) -> None:
        assert store._threads is not None
        store._threads[0].start(lambda turn: threading.Event().wait(0.02), lambda *outcome: told.append(outcome))
        # In the first turn it steps aside; what the thread said itself comes behind this task in the second.
        for _ in range(2):
            await asyncio.sleep(0)
        assert told == [(False, None)]
        for _ in range(2):
            await asyncio.sleep(0)
        assert len(told) == 1

    play(path, scene)


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
        play(path, nothing)
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

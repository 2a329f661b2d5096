"""A SQLite file that cannot be used for a while: clear refusals, and no end is lost."""

from __future__ import annotations

import asyncio
import logging
import signal
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from asgi_metering import Metering, billable, rate_limited
from asgi_metering.errors import StoreUnavailableError
from asgi_metering.receipts import Basis
from asgi_metering.rules.operations import Admit, End, PostGrant, Sweep, WalletSource
from asgi_metering.stores.contract import EverythingKept
from asgi_metering.stores.sqlite import SQLiteStore
from asgi_metering.testing import FakeClock
from tests.harness.drive import Drive, http_scope, status
from tests.outage.gated import CREDIT, call, identify, metered, settled, until
from tests.outage.worker import HELD, QUEUED, working


@asynccontextmanager
async def locked(store: SQLiteStore, path: Path) -> AsyncIterator[None]:
    """Somebody else has a transaction open on the file."""
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    try:
        yield
    finally:
        other.close()


@asynccontextmanager
async def setting(store: SQLiteStore, broken: str, mended: str) -> AsyncIterator[None]:
    """The writer's connection is set so that SQLite itself refuses to write."""
    assert store._threads is not None
    writer = store._threads[0]

    def run(statement: str) -> Any:
        return lambda turn: turn.connection.execute(statement).fetchall()

    await writer.call(run(broken))
    try:
        yield
    finally:
        await writer.call(run(mended))


def full(store: SQLiteStore, _path: Path) -> Any:
    """The file has all the pages that it may have."""
    return setting(store, "PRAGMA max_page_count = 1", "PRAGMA max_page_count = 1000000")


def read_only(store: SQLiteStore, _path: Path) -> Any:
    """The file may be read, and not be written."""
    return setting(store, "PRAGMA query_only = ON", "PRAGMA query_only = OFF")


@pytest.mark.parametrize(
    ("outage", "said"),
    [
        (locked, "The sqlite store gave no answer within 0.2 s."),
        (full, "There is no room for the SQLite file"),
        (read_only, "cannot be written. Give this process write access"),
    ],
    ids=["locked", "full", "read-only"],
)
@pytest.mark.parametrize("has_journal", [True, False])
def test_refuse_before_the_first_byte_and_book_later(
    outage: Any, said: str, has_journal: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Locked, full or read-only: money is refused with 503 and a sentence in the log, limits and others let calls in.

    A call that was streaming has its whole answer, and its end arrives when the file can be used again.
    """
    path = tmp_path / "m.db"
    inside, leave = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        inside.set()
        await leave.wait()

    async def play() -> None:
        store = SQLiteStore(path, synchronous="OFF", busy_timeout_s=0.4)
        journal = tmp_path / "j" if has_journal else None
        metering = Metering(store, identify=identify, sinks=(), store_timeout_s=0.2, drain_s=0.1, journal=journal)
        async with metering:
            metering.runtime().managed = True
            await metering.grant("ann", 100, id="g")
            await store.post([PostGrant("b", "bob", "credits", 1)])
            app = metered(metering, billable(2), work=work)
            async with Drive(app, http_scope("/", "POST")) as run:
                await inside.wait()
                async with outage(store, path):
                    if outage is full:
                        await _fill(store)
                    counted, paid = metered(metering, rate_limited("1/day")), metered(metering, billable(1))
                    answers = await asyncio.gather(call(paid), call(counted), call(metered(metering)))
                    assert [status(each.log) for each in answers] == [503, 200, 200]
                    leave.set()
                    await run.ended()
                    assert status(run.log) == 200
                    if metering.journal is not None:
                        await until(lambda: _is(metering, 1))
            await until(lambda: _is_booked(metering))
            await until(lambda: _is(metering, 0))
            assert await settled(metering) == (2 * CREDIT, 0)

    with caplog.at_level(logging.WARNING):
        asyncio.run(play())
    assert said in caplog.text


async def _fill(store: SQLiteStore) -> None:
    """Use up what the file's pages have to spare, so that no more rows fit."""
    for number in range(1_000):
        try:
            await store.run([Admit(str(number), "bob", "credits", 0, 0, (WalletSource(),))])
        except StoreUnavailableError:
            return
    raise AssertionError("The file did not become full.")


async def _is(metering: Metering, waiting: int) -> bool:
    return metering.journal is None or await metering.journal.counts() == (waiting, 0)


async def _is_booked(metering: Metering) -> bool:
    return metering.runtime().busy == 0


def test_give_back_what_a_locked_file_admitted_too_late(tmp_path: Path) -> None:
    """Pitfall 29: an admission that the file took after its caller was refused holds nothing, and counted nothing."""
    path = tmp_path / "m.db"

    async def play() -> None:
        store = SQLiteStore(path, synchronous="OFF", busy_timeout_s=20)
        metering = Metering(store, identify=identify, sinks=(), store_timeout_s=0.1, drain_s=0.1)
        async with metering:
            metering.runtime().managed = True
            await metering.grant("ann", 100, id="g")
            app = metered(metering, billable(2), rate_limited("1/day"))
            async with locked(store, path):
                assert status((await call(app)).log) == 503
            await metering.runtime().pump.drain()
            assert await metering.holds() == []
            assert await settled(metering) == (0, 0)
            assert status((await call(app)).log) == 200

    asyncio.run(play())


def test_deliver_what_a_killed_process_left(tmp_path: Path) -> None:
    """`kill -9` with the file locked: the next process, which starts meanwhile, charges both calls when it is free.

    One was admitted before the outage and ended in it; the other was let in while it lasted.
    """
    path, journal = tmp_path / "m.db", tmp_path / "j"
    url = f"sqlite:///{path}?synchronous=OFF"

    async def prepare() -> None:
        async with Metering(url, sinks=()) as metering:
            await metering.grant("ann", 100, id="g")

    async def prove() -> None:
        async with Metering(url, sinks=()) as metering:
            assert await settled(metering) == ((HELD + QUEUED) * CREDIT, 0)

    asyncio.run(prepare())
    with working("victim", url, journal) as victim:
        victim.expect("admitted")
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        victim.go_on()
        victim.expect("let-in")
        victim.expect("kept")
        victim.process.send_signal(signal.SIGKILL)
    with working("heir", url, journal) as heir:
        heir.expect("started")
        other.close()
        heir.go_on()
        heir.expect("delivered")
    asyncio.run(prove())


def test_end_and_forget_nothing_that_cannot_be_written(tmp_path: Path) -> None:
    """S0.52: a sweep of a file that takes no writes ends no call, folds no line and forgets nothing; the next one does.

    A call ends, and what is old goes, in one transaction with what is written of it, and in no other way.
    """
    path, clock = tmp_path / "m.db", FakeClock()
    sweep = Sweep(keep_entries_s=1.0, keep_holds_s=1.0)

    async def kept(store: SQLiteStore) -> tuple[int, int, int]:
        _, state = await store.read(EverythingKept())
        live = sum(hold.receipt is None for hold in state.holds.values())
        return live, len(state.holds), sum(map(len, state.entries.values()))

    async def play() -> None:
        store = SQLiteStore(path, synchronous="OFF", clock=clock)
        await store.open()
        await store.post([PostGrant("g", "ann", "credits", 100)])
        asks = [Admit(name, "ann", "credits", 5, 5, (WalletSource(),), ttl_s=1.0) for name in ("done", "left")]
        await store.run([*asks, End("done", 5, Basis.USAGE)])
        clock.advance(600.0)
        async with read_only(store, path):
            with pytest.raises(StoreUnavailableError):
                await store.run([sweep])
            assert await kept(store) == (1, 2, 2)
        for _ in range(2):
            await store.run([sweep])
            clock.advance(600.0)
        assert await kept(store) == (0, 0, 0)
        await store.close()

    asyncio.run(play())

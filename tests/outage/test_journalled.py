"""Ends that the store does not take, with a journal: kept until the store is back, whatever fails between."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from asgi_metering import Metering, billable, rate_limited
from asgi_metering.errors import ConfigurationError, JournalError, StoreUnavailableError
from asgi_metering.events.sinks import CallbackSink
from asgi_metering.journal import Journal
from asgi_metering.receipts import Basis, EntryKind
from asgi_metering.rules.decide import Answer
from asgi_metering.rules.operations import Admit, End, Operation, WalletSource
from asgi_metering.stores.breaker import FAILURES
from asgi_metering.stores.contract import EverythingKept
from tests.harness.drive import Drive, http_scope, lifespan, status
from tests.outage.gated import (
    CREDIT,
    Gated,
    admitted,
    call,
    identify,
    is_in_flight,
    is_quiet,
    is_read_off,
    kept,
    metered,
    settled,
    until,
    used,
)


def test_keep_ends_in_the_journal_until_the_store_is_back(tmp_path: Path) -> None:
    """Ends that the store did not take are on the disk, and not in memory; they are done in their order, once."""
    events: list[Any] = []

    async def play() -> None:
        store = Gated()
        async with used(store, journal=tmp_path / "j", sinks=[CallbackSink(events.extend)]) as metering:
            await admitted(metering, store, 12)
            await until(lambda: is_quiet(metering))
            assert await kept(metering) == (12, 0)
            assert metering.journal is not None
            order = [entry.id for entry in await metering.journal.due(99)]
            metering.meters.flush()
            before = len(store.seen(End))
            store.down = False
            await until(lambda: is_read_off(metering))
            assert [end.id for end in store.seen(End)[before:]] == order
            assert await settled(metering) == (12 * CREDIT, 0)
            lines = [each.ref async for each in metering.statement("ann") if each.kind is EntryKind.SETTLE]
            assert sorted(lines) == sorted(order)
            await until(lambda: _were_told(events, 12))

    asyncio.run(play())


async def _were_told(events: list[Any], number: int) -> bool:
    return len({event.id for event in events}) == len(events) == number


def test_keep_ends_at_once_while_the_breaker_is_open(tmp_path: Path) -> None:
    """With a store that is known to be down an end goes to the journal without asking it."""

    async def play() -> None:
        store = Gated()
        async with used(store, journal=tmp_path / "j") as metering:
            leave = asyncio.Event()
            async with Drive(metered(metering, billable(1), work=leave.wait), http_scope("/", "POST")) as run:
                await until(lambda: is_in_flight(metering, 1))
                store.down = True
                for _ in range(FAILURES):
                    await call(metered(metering, billable(1)))
                metering.breaker._until = float("inf")
                (call_id,) = metering.runtime().in_flight
                leave.set()
                await run.ended()
            await until(lambda: is_quiet(metering))
            # The reader asks, and nobody else.
            await until(lambda: _was_asked(store, call_id))
            assert await kept(metering) == (1, 0)
            store.down = False
            await until(lambda: is_read_off(metering))
            assert await settled(metering) == (CREDIT, 0)

    asyncio.run(play())


async def _was_asked(store: Gated, call_id: str) -> bool:
    return call_id in [end.id for end in store.seen(End)]


def test_deliver_after_a_restart(tmp_path: Path) -> None:
    """What one process kept another one delivers, which starts while the store is down as well."""

    async def play() -> None:
        store = Gated()
        first = Metering(store, identify=identify, sinks=(), journal=tmp_path / "j", store_timeout_s=0.05)
        await first.grant("ann", 100, id="g")
        first.runtime().managed = True
        await admitted(first, store, 3)
        await until(lambda: is_quiet(first))
        await first.stop()
        again = Metering(store, sinks=(), journal=tmp_path / "j", store_timeout_s=0.05)
        await again.begin()
        assert await kept(again) == (3, 0)
        with pytest.raises(StoreUnavailableError, match="cannot be reached"):
            await again.balance("ann")
        with pytest.raises(StoreUnavailableError, match="cannot be reached"):
            await Metering(store, sinks=()).begin()
        store.down = False
        await until(lambda: is_read_off(again))
        assert await settled(again) == (3 * CREDIT, 0)
        await again.stop()
        await again.stop()

    asyncio.run(play())


def test_deliver_once_from_a_shared_journal(tmp_path: Path) -> None:
    """Several processes on one journal: whoever has the turn delivers what all of them kept."""

    async def play() -> None:
        store = Gated()
        async with used(store, journal=tmp_path / "j") as one, used(store, journal=tmp_path / "j") as other:
            await admitted(one, store, 2)
            store.down = False
            await until(lambda: is_read_off(one))
            await admitted(other, store, 2)
            store.down = False
            await until(lambda: is_read_off(other))
            await until(lambda: is_quiet(one))
            await until(lambda: is_quiet(other))
            assert await settled(one) == (4 * CREDIT, 0)
            assert len([1 async for each in one.statement("ann") if each.kind is EntryKind.SETTLE]) == 4

    asyncio.run(play())


@pytest.mark.parametrize("has_journal", [True, False])
def test_start_an_application_without_its_store(has_journal: bool, tmp_path: Path) -> None:
    """With a journal an application serves while its store is down, and finds it when it is there; else it refuses."""

    async def play() -> None:
        store = Gated()
        store.down = True
        journal = tmp_path / "j" if has_journal else None
        metering = Metering(store, identify=identify, sinks=(), store_timeout_s=0.05, drain_s=0.05, journal=journal)
        app = metered(metering, rate_limited("1/day"))
        if not has_journal:
            with pytest.raises(RuntimeError, match=r"lifespan\.startup\.failed.*cannot be reached"):
                async with lifespan(app):
                    raise AssertionError("It serves.")
            return
        async with lifespan(app):
            assert status((await call(app)).log) == 200
            store.down = False
            await until(lambda: _is_admitted_by(store, app))
            assert status((await call(app)).log) == 429

    asyncio.run(play())


async def _is_admitted_by(store: Gated, app: Any) -> bool:
    await call(app)
    return bool((await store.read(EverythingKept())).state.counters)


class Poisoned(Gated):
    """One that can never run what concerns the call ``poison``."""

    async def run(self, operations: Sequence[Operation]) -> list[Answer | Exception]:
        if any(getattr(each, "id", "") == "poison" for each in operations):
            self.batches.append(list(operations))
            raise LookupError("no such thing")
        return await super().run(operations)


def test_set_aside_what_the_store_never_takes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A poisoned entry is alarmed once and asked no more; its neighbours are delivered, and a person may try again."""

    async def play() -> None:
        store = Poisoned()
        async with used(store, journal=tmp_path / "j") as metering:
            assert metering.journal is not None
            for call_id in ("before", "poison", "after"):
                await store.run([Admit(call_id, "ann", "credits", CREDIT, CREDIT, (WalletSource(),))]) if (
                    call_id != "poison"
                ) else None
            await metering.journal.keep(
                {each: (End(each, CREDIT, Basis.USAGE, event={"n": 1}),) for each in ("before", "poison", "after")}
            )
            await until(lambda: _is(kept(metering), (0, 1)))
            # With its event, without it, and never again.
            tried = sum(any(getattr(each, "id", "") == "poison" for each in batch) for batch in store.batches)
            await asyncio.sleep(0.1)
            assert tried == sum(any(getattr(each, "id", "") == "poison" for each in batch) for batch in store.batches)
            assert await settled(metering) == (2 * CREDIT, 0)
            assert caplog.text.count("is set aside") == 1
            await metering.journal.restore()
            await until(lambda: _count(caplog, "is set aside", 2))

    asyncio.run(play())


async def _is(answer: Any, expected: Any) -> bool:
    return bool(await answer == expected)


async def _count(caplog: pytest.LogCaptureFixture, text: str, number: int) -> bool:
    return caplog.text.count(text) == number


def test_fall_back_on_memory_where_the_journal_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A journal that takes nothing is alarmed; ends wait in memory then, as without one."""

    async def play() -> None:
        store = Gated()
        async with used(store, journal=tmp_path / "j") as metering:
            assert metering.journal is not None
            metering.journal._max_entries = 0
            await admitted(metering, store, 3)
            await until(lambda: _is_told(caplog, "has its 0 entries"))
            assert metering.runtime().busy == 3
            store.down = False
            await until(lambda: is_quiet(metering))
            assert await settled(metering) == (3 * CREDIT, 0)

    asyncio.run(play())


async def _is_told(caplog: pytest.LogCaptureFixture, text: str) -> bool:
    return text in caplog.text


def test_go_on_after_the_journal_could_not_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A journal that cannot be read for a while is alarmed, and read again later."""

    async def play() -> None:
        store = Gated()
        async with used(store, journal=tmp_path / "j") as metering:
            journal = metering.journal
            assert journal is not None
            due, times = journal.due, [0]

            async def broken(limit: int) -> Any:
                times[0] += 1
                if times[0] < 3:
                    raise JournalError("The disk is away.")
                return await due(limit)

            monkeypatch.setattr(journal, "due", broken)
            await journal.keep({"x": (End("x", None),)})
            await until(lambda: is_read_off(metering))
            assert "The disk is away." in caplog.text

    asyncio.run(play())


def test_let_others_read_off_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader whose journal fails while it has the turn gives it back all the same, and reads on later."""

    async def play() -> None:
        store = Gated()
        async with used(store, journal=tmp_path / "j") as metering:
            journal = metering.journal
            assert journal is not None
            counts, times = journal.counts, [0]

            async def broken() -> Any:
                times[0] += 1
                if times[0] == 1:
                    raise JournalError("The disk is away.")
                return await counts()

            monkeypatch.setattr(journal, "counts", broken)
            await until(lambda: _has_failed(times))
            await journal.keep({"x": (End("x", None),)})
            await until(lambda: is_read_off(metering))

    asyncio.run(play())


async def _has_failed(times: list[int]) -> bool:
    return times[0] > 0


def test_go_on_without_a_journal_whose_folder_is_gone(tmp_path: Path) -> None:
    """A journal that cannot even be opened again holds up no end, and is read off once it can."""
    folder = tmp_path / "there"
    folder.mkdir()

    def broken(connection: Any) -> None:
        folder.rename(tmp_path / "gone")
        connection.execute("BEGIN")
        raise KeyError("A transaction is left open, and so the connection is given up.")

    async def play() -> None:
        store = Gated()
        async with used(store, journal=folder / "j") as metering:
            journal = metering.journal
            assert journal is not None
            await journal.keep({"later": (End("later", None),)}, due_in_s=0.1)
            with pytest.raises(KeyError):
                await journal._in_thread(broken)
            await admitted(metering, store, 3)
            await until(lambda: _wait_in_memory(metering, 3))
            store.down = False
            await until(lambda: is_quiet(metering))
            assert await settled(metering) == (3 * CREDIT, 0)
            (tmp_path / "gone").rename(folder)
            await until(lambda: is_read_off(metering))

    asyncio.run(play())


async def _wait_in_memory(metering: Metering, number: int) -> bool:
    return metering.runtime()._delivery.waiting == number


class Unmigrated(Gated):
    """A store that cannot be opened as it is."""

    is_migrated = False

    async def open(self) -> None:
        if not self.is_migrated:
            await asyncio.sleep(0.01)
            raise ConfigurationError("The tables are too old. Migrate them.")


def test_keep_what_waits_for_a_migration(tmp_path: Path) -> None:
    """A store that cannot be opened says nothing of what waits for it: nothing of that is set aside."""

    async def play() -> None:
        later = Unmigrated()
        metering = Metering(later, sinks=(), store_timeout_s=0.05, drain_s=0.05, journal=tmp_path / "j")
        with pytest.raises(ConfigurationError, match="Migrate"):
            await metering.start()
        assert metering.journal is not None
        await metering.journal.keep({"a": (End("a", None),), "b": (End("b", None),)})
        await until(lambda: _is_alarmed(metering))
        assert await kept(metering) == (2, 0)
        later.is_migrated = True
        await until(lambda: is_read_off(metering))
        await metering.stop()

    asyncio.run(play())


async def _is_alarmed(metering: Metering) -> bool:
    return "replay" in metering.alarms._told


async def _is_turn_taken(journal: Journal) -> bool:
    return journal._turn is not None


def test_keep_with_a_journal_of_one_s_own(tmp_path: Path) -> None:
    """A journal that was made before is used as it is; a forked child forgets the thread that it has not."""

    async def play() -> None:
        journal = Journal(tmp_path / "j", max_entries=7)
        metering = Metering(Gated(), sinks=(), journal=journal)
        async with metering:
            assert metering.journal is journal
            await journal.keep({"a": (End("a", None),)}, due_in_s=60.0)
            assert journal._thread is not None
            await until(lambda: _is_turn_taken(journal))
            thread, turn = journal._thread, journal._turn
            metering.forked()
            assert (metering.journal, journal._thread) == (journal, None)
            # Nobody has closed it: it is the other process's.
            assert turn is not None
            assert turn.in_transaction
            turn.close()
            await journal.open()
            assert await kept(metering) == (1, 0)
            await thread.stop()

    asyncio.run(play())

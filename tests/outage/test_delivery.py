"""Ends that the store does not take, and what a dead store costs: nobody waits, and nothing is lost or done twice."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from asgi_metering import Metering, billable, rate_limited
from asgi_metering.errors import ConfigurationError, JournalError, SettlementError, StoreUnavailableError
from asgi_metering.events.sinks import CallbackSink
from asgi_metering.journal import Journal
from asgi_metering.receipts import Basis, EntryKind
from asgi_metering.rules.decide import Answer
from asgi_metering.rules.operations import Admit, End, Operation, Renew, WalletSource
from asgi_metering.stores.breaker import FAILURES, BreakerState
from asgi_metering.stores.contract import EverythingKept
from tests.harness.drive import Drive, http_scope, lifespan, status
from tests.outage.gated import CREDIT, Gated, call, identify, metered, settled, until, used

COUNTED = rate_limited("99/day", on_store_down="deny")
"""A route without a hold: what is asked of the store for it is one admission, and nothing is given back."""


async def admitted(metering: Metering, store: Gated, number: int, price: int = 1) -> list[Any]:
    """So many calls that were admitted, and whose store is down when they end."""
    leave = asyncio.Event()
    app = metered(metering, billable(price), work=leave.wait)
    runs = [Drive(app, http_scope("/", "POST")) for _ in range(number)]
    for run in runs:
        await run.__aenter__()
    await until(lambda: _in_flight(metering, number))
    store.down = True
    leave.set()
    for run in runs:
        await run.ended()
        await run.__aexit__()
    return runs


async def _in_flight(metering: Metering, number: int) -> bool:
    return len(metering.runtime().in_flight) == number


async def _quiet(metering: Metering) -> bool:
    return metering.runtime().busy == 0


async def kept(metering: Metering) -> tuple[int, int]:
    """What waits in the journal, and what is set aside."""
    assert metering.journal is not None
    return await metering.journal.counts()


# -- the breaker -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_started", [True, False])
def test_give_up_on_a_store_that_says_nothing(has_started: bool) -> None:
    """The deadline answers for a silent store, also for one that is silent from its very first operation on.

    Meanwhile an unmetered request that came later has been answered: nobody stands behind the store.
    """

    async def play() -> None:
        store = Gated()
        metering = Metering(store, identify=lambda _: None, sinks=(), store_timeout_s=0.2, drain_s=0)
        if has_started:
            await metering.start()
        store.silent = True
        order: list[str] = []

        async def ask(name: str, *parts: Any) -> int:
            ended = await call(metered(metering, *parts))
            order.append(name)
            return status(ended.log)

        asked = [ask("metered", rate_limited("1/day", on_store_down="deny")), ask("counted", rate_limited("1/day"))]
        answers = await asyncio.gather(*asked, ask("unmetered"))
        assert answers == [503, 200, 200]
        assert order[0] == "unmetered"
        store.let.set()
        await metering.stop()

    asyncio.run(play())


def test_spare_everybody_the_deadline_of_a_dead_store(caplog: pytest.LogCaptureFixture) -> None:
    """After some failures in a row nobody is sent to a dead store: it hears of nothing, and calls are answered at once.

    It is told as an alarm, a tally, a gauge and a state; so is its end.
    """

    async def play() -> None:
        store = Gated()
        async with used(store) as metering:
            app = metered(metering, billable(1))
            store.silent = True
            assert metering.breaker.state == "closed"
            for _ in range(FAILURES):
                assert status((await call(app)).log) == 503
            assert metering.breaker.state == "open"
            metering.breaker._until = float("inf")
            heard = store.seen(Admit)
            ended = await asyncio.gather(*(call(app) for _ in range(50)))
            assert {status(each.log) for each in ended} == {503}
            assert store.seen(Admit) == heard
            assert metering.meters.totals("store_outages") == {(): 1}
            assert caplog.text.count("The gated store does not answer.") == 1
            metering.breaker._until = 0.0
            store.silent = False
            store.let.set()
            await until(lambda: _is_admitted(app))
            assert metering.breaker.state == "closed"
            assert "The gated store answers again." in caplog.text

    asyncio.run(play())


async def _is_admitted(app: Any) -> bool:
    return status((await call(app)).log) == 200


def test_recover_with_one_probe() -> None:
    """When the pause is over one of many callers asks the store; the others do not until it has answered."""

    async def play() -> None:
        store = Gated()
        async with used(store, store_timeout_s=5.0) as metering:
            app = metered(metering, COUNTED)
            store.down = True
            for _ in range(FAILURES):
                await call(app)
            store.down, store.silent = False, True
            metering.breaker._until = 0.0
            heard = len(store.seen(Admit))
            probe = asyncio.create_task(call(app))
            await until(lambda: _has_heard(store, heard + 1))
            others = await asyncio.gather(*(call(app) for _ in range(30)))
            assert {status(each.log) for each in others} == {503}
            assert len(store.seen(Admit)) == heard + 1
            assert metering.breaker.state is BreakerState.HALF_OPEN
            store.silent = False
            store.let.set()
            assert status((await probe).log) == 200
            assert {status((await call(app)).log) for _ in range(3)} == {200}

    asyncio.run(play())


async def _has_heard(store: Gated, number: int) -> bool:
    return len(store.seen(Admit)) == number


def test_share_the_breaker_among_loops() -> None:
    """What one event loop learned of the store spares another one of the same process."""

    async def other(metering: Metering) -> int:
        try:
            return status((await call(metered(metering, COUNTED))).log)
        finally:
            await metering.stop()

    async def play() -> None:
        store = Gated()
        async with used(store) as metering:
            store.down = True
            for _ in range(FAILURES):
                await call(metered(metering, COUNTED))
            metering.breaker._until = float("inf")
            heard = len(store.batches)
            assert await asyncio.to_thread(lambda: asyncio.run(other(metering))) == 503
            assert len(store.batches) == heard

    asyncio.run(play())


def test_give_back_what_an_admission_without_an_answer_holds() -> None:
    """Pitfall 29: an admission that was done, and whose reply was lost, is released by id; nothing stays held."""

    async def play() -> None:
        store = Gated()
        async with used(store) as metering:
            store.loses = [Admit, End]
            assert status((await call(metered(metering, billable(1), rate_limited("1/day")))).log) == 503
            await until(lambda: _is_released(store))
            assert await settled(metering) == (0, 0)

    asyncio.run(play())


async def _is_released(store: Gated) -> bool:
    state = (await store.read(EverythingKept())).state
    return [hold.receipt is not None for hold in state.holds.values()] == [True]


# -- ends without a journal --------------------------------------------------------------------------------


def test_let_one_end_ask_for_all(caplog: pytest.LogCaptureFixture) -> None:
    """Ends that wait in memory do not storm a dead store: one asks, and when it is taken the others come.

    They are told of as one alarm, and not one by one.
    """

    async def play() -> None:
        store = Gated()
        async with used(store) as metering:
            runs = await admitted(metering, store, 30)
            assert {status(run.log) for run in runs} == {200}
            assert metering.runtime().busy == 30
            await until(lambda: _has_ended(store, 35))
            first = next(i for i, batch in enumerate(store.batches) if any(isinstance(each, End) for each in batch))
            ends = [sum(isinstance(each, End) for each in batch) for batch in store.batches[first:]]
            at_first = next(i for i, _ in enumerate(ends) if sum(ends[: i + 1]) == 30)
            assert set(ends[at_first + 1 :]) <= {0, 1}
            assert await settled(metering) == (0, 30 * CREDIT)
            store.down = False
            await until(lambda: _quiet(metering))
            assert await settled(metering) == (30 * CREDIT, 0)

    with caplog.at_level(logging.WARNING):
        asyncio.run(play())
    assert caplog.text.count("The store takes no ends") == 1


async def _has_ended(store: Gated, number: int) -> bool:
    return len(store.seen(End)) >= number


def test_drop_no_end_silently(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Memory is bounded: what does not fit is counted and alarmed, and its hold is left to its policy."""
    monkeypatch.setattr("asgi_metering.delivery.MAX_QUEUED_ENDS", 3)

    async def play() -> None:
        store = Gated()
        async with used(store) as metering:
            await admitted(metering, store, 8)
            await until(lambda: _has_lost(metering, 5))
            assert metering.runtime().busy == 3
            store.down = False
            await until(lambda: _quiet(metering))
            assert await settled(metering) == (3 * CREDIT, 5 * CREDIT)

    asyncio.run(play())
    assert "what it holds is left to its policy" in caplog.text


async def _has_lost(metering: Metering, number: int) -> bool:
    return sum(metering.meters.totals("ends_lost").values()) == number


# -- ends with a journal -----------------------------------------------------------------------------------


def test_keep_ends_in_the_journal_until_the_store_is_back(tmp_path: Path) -> None:
    """Ends that the store did not take are on the disk, and not in memory; they are done in their order, once."""
    events: list[Any] = []

    async def play() -> None:
        store = Gated()
        async with used(store, journal=tmp_path / "j", sinks=[CallbackSink(events.extend)]) as metering:
            await admitted(metering, store, 12)
            await until(lambda: _quiet(metering))
            assert await kept(metering) == (12, 0)
            assert metering.journal is not None
            order = [entry.id for entry in await metering.journal.due(99)]
            metering.meters.flush()
            before = len(store.seen(End))
            store.down = False
            await until(lambda: _is_read_off(metering))
            assert [end.id for end in store.seen(End)[before:]] == order
            assert await settled(metering) == (12 * CREDIT, 0)
            lines = [each.ref async for each in metering.statement("ann") if each.kind is EntryKind.SETTLE]
            assert sorted(lines) == sorted(order)
            await until(lambda: _were_told(events, 12))

    asyncio.run(play())


async def _is_read_off(metering: Metering) -> bool:
    return await kept(metering) == (0, 0)


async def _were_told(events: list[Any], number: int) -> bool:
    return len({event.id for event in events}) == len(events) == number


def test_keep_ends_at_once_while_the_breaker_is_open(tmp_path: Path) -> None:
    """With a store that is known to be down an end goes to the journal without asking it."""

    async def play() -> None:
        store = Gated()
        async with used(store, journal=tmp_path / "j") as metering:
            leave = asyncio.Event()
            async with Drive(metered(metering, billable(1), work=leave.wait), http_scope("/", "POST")) as run:
                await until(lambda: _in_flight(metering, 1))
                store.down = True
                for _ in range(FAILURES):
                    await call(metered(metering, billable(1)))
                metering.breaker._until = float("inf")
                (call_id,) = metering.runtime().in_flight
                leave.set()
                await run.ended()
            await until(lambda: _quiet(metering))
            # The reader asks, and nobody else.
            await until(lambda: _was_asked(store, call_id))
            assert await kept(metering) == (1, 0)
            store.down = False
            await until(lambda: _is_read_off(metering))
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
        await until(lambda: _quiet(first))
        await first.stop()
        again = Metering(store, sinks=(), journal=tmp_path / "j", store_timeout_s=0.05)
        await again.begin()
        assert await kept(again) == (3, 0)
        with pytest.raises(StoreUnavailableError, match="cannot be reached"):
            await again.balance("ann")
        with pytest.raises(StoreUnavailableError, match="cannot be reached"):
            await Metering(store, sinks=()).begin()
        store.down = False
        await until(lambda: _is_read_off(again))
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
            await until(lambda: _is_read_off(one))
            await admitted(other, store, 2)
            store.down = False
            await until(lambda: _is_read_off(other))
            await until(lambda: _quiet(one))
            await until(lambda: _quiet(other))
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
            await until(lambda: _quiet(metering))
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
            await until(lambda: _is_read_off(metering))
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
            await until(lambda: _is_read_off(metering))

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
            await until(lambda: _quiet(metering))
            assert await settled(metering) == (3 * CREDIT, 0)
            (tmp_path / "gone").rename(folder)
            await until(lambda: _is_read_off(metering))

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
        await until(lambda: _is_read_off(metering))
        await metering.stop()

    asyncio.run(play())


async def _is_alarmed(metering: Metering) -> bool:
    return "replay" in metering.alarms._told


def test_keep_with_a_journal_of_one_s_own(tmp_path: Path) -> None:
    """A journal that was made before is used as it is; a forked child forgets the thread that it has not."""

    async def play() -> None:
        journal = Journal(tmp_path / "j", max_entries=7)
        metering = Metering(Gated(), sinks=(), journal=journal)
        async with metering:
            assert metering.journal is journal
            await journal.keep({"a": (End("a", None),)}, due_in_s=60.0)
            assert journal._thread is not None
            thread = journal._thread
            metering.forked()
            assert (metering.journal, journal._thread) == (journal, None)
            await journal.open()
            assert await kept(metering) == (1, 0)
            await thread.stop()

    asyncio.run(play())


# -- the shutdown ------------------------------------------------------------------------------------------


class Counted(Gated):
    """Counts how often it is opened and closed."""

    opened = closed = 0

    async def open(self) -> None:
        self.opened += 1

    async def close(self) -> None:
        self.closed += 1


def test_stop_for_good_while_the_store_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends that still wait in memory when the metering is stopped open nothing again behind it."""
    monkeypatch.setattr("asgi_metering.runtime.BOOK_S", 0.01)

    async def play() -> None:
        store = Counted()
        metering = Metering(store, identify=identify, sinks=(), store_timeout_s=0.05, drain_s=0.01)
        await metering.start()
        metering.runtime().managed = True
        await metering.grant("ann", 100, id="g")
        await admitted(metering, store, 3)
        await metering.stop()
        assert (store.opened, store.closed) == (1, 1)
        assert [task.get_name() for task in asyncio.all_tasks() - {asyncio.current_task()}] == []

    asyncio.run(play())


def test_stop_while_the_store_says_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A shutdown waits for a silent store bounded, and says so."""
    monkeypatch.setattr("asgi_metering.runtime.BOOK_S", 0.05)

    async def play() -> None:
        store = Gated()
        metering = Metering(store, identify=identify, sinks=(), store_timeout_s=0.05, drain_s=0.01)
        await metering.start()
        metering.runtime().managed = True
        store.silent = True
        assert status((await call(metered(metering, billable(1)))).log) == 503
        await asyncio.wait_for(metering.stop(), 10)

    asyncio.run(play())
    assert "gave no answer before the shutdown" in caplog.text


class Deaf(Gated):
    """Its driver neither closes nor lets itself be cancelled, at first."""

    async def close(self) -> None:
        for _ in range(2):
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(60)


@pytest.mark.parametrize("has_journal", [False, True])
def test_stop_although_the_driver_does_not_close(
    has_journal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A shutdown does not wait for a driver that hangs, nor for a disk; it says so and goes on."""
    monkeypatch.setattr("asgi_metering.runtime.CLOSE_S", 0.05)
    stalled, disk = threading.Event(), threading.Event()

    def stall(_: Any) -> None:
        stalled.set()
        disk.wait(60)

    async def play() -> None:
        metering = Metering(Deaf(), sinks=(), drain_s=0.01, journal=tmp_path / "j" if has_journal else None)
        await metering.start()
        slow = None
        if metering.journal is not None:
            slow = asyncio.create_task(metering.journal._in_thread(stall))
            await asyncio.to_thread(stalled.wait, 10)
        await asyncio.wait_for(metering.stop(), 10)
        disk.set()
        if slow is not None:
            await slow

    asyncio.run(play())
    assert "The gated store could not be closed within 0.05 s" in caplog.text
    assert ("The journal could not be closed" in caplog.text) == has_journal


# -- what cannot be done -----------------------------------------------------------------------------------


def test_tell_of_a_charge_that_found_no_hold(caplog: pytest.LogCaptureFixture) -> None:
    """A store that lost a hold, as by a failover, charges nothing at its end: that is an error and a tally."""

    async def play() -> None:
        store = Gated()
        async with used(store) as metering:
            async with metering.charge(payer="ann", line="job", price=3) as call:
                del store._state.holds[call.id]
                store._state.live.clear()
            assert sum(metering.meters.totals("ends_lost").values()) == 1
            assert f"does not know call {call.id}, whose end charges 3000000" in caplog.text

    asyncio.run(play())


def test_say_outside_http_that_an_end_waits(tmp_path: Path) -> None:
    """S3.10: work outside HTTP whose end went to the journal says so, and is charged when the store is back."""

    async def play() -> None:
        store = Gated()
        async with used(store, journal=tmp_path / "j") as metering:
            with pytest.raises(SettlementError, match="its end is not booked"):
                async with metering.charge(payer="ann", line="job", price=2):
                    store.down = True
            store.down = False
            await until(lambda: _is_read_off(metering))
            assert await settled(metering) == (2 * CREDIT, 0)

    asyncio.run(play())


def test_tell_failing_heartbeats_as_one_alarm(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A dead store takes no heartbeats of any call: that is counted, and told once and not once for each."""
    monkeypatch.setattr("asgi_metering.heartbeats.TICK_S", 0.001)

    async def play() -> None:
        store = Gated()
        async with used(store) as metering:
            leave = asyncio.Event()
            app = metered(metering, billable(1, ttl_s=0.03), work=leave.wait)
            async with Drive(app, http_scope("/", "POST")) as run:
                await until(lambda: _in_flight(metering, 1))
                store.down = True
                await until(lambda: _beats(store, 5))
                store.down = False
                leave.set()
                await run.ended()
            await until(lambda: _quiet(metering))

    asyncio.run(play())
    assert caplog.text.count("The store did not take Renew") == 1


async def _beats(store: Gated, number: int) -> bool:
    return len(store.seen(Renew)) >= number

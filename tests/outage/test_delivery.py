"""Ends that the store does not take, and what a dead store costs: nobody waits, and nothing is lost or done twice."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from pathlib import Path
from typing import Any

import pytest

from asgi_metering import Metering, billable, rate_limited
from asgi_metering.errors import SettlementError
from asgi_metering.rules.operations import Admit, End, Renew
from asgi_metering.stores.breaker import FAILURES, BreakerState
from asgi_metering.stores.contract import EverythingKept
from tests.harness.drive import Drive, http_scope, status
from tests.outage.gated import (
    COUNTED,
    CREDIT,
    Gated,
    admitted,
    call,
    identify,
    is_in_flight,
    is_quiet,
    is_read_off,
    metered,
    settled,
    until,
    used,
)

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
            await until(lambda: is_quiet(metering))
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
            await until(lambda: is_quiet(metering))
            assert await settled(metering) == (3 * CREDIT, 5 * CREDIT)

    asyncio.run(play())
    assert "what it holds is left to its policy" in caplog.text


async def _has_lost(metering: Metering, number: int) -> bool:
    return sum(metering.meters.totals("ends_lost").values()) == number


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
            await until(lambda: is_read_off(metering))
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
                await until(lambda: is_in_flight(metering, 1))
                store.down = True
                await until(lambda: _beats(store, 5))
                store.down = False
                leave.set()
                await run.ended()
            await until(lambda: is_quiet(metering))

    asyncio.run(play())
    assert caplog.text.count("The store did not take Renew") == 1


async def _beats(store: Gated, number: int) -> bool:
    return len(store.seen(Renew)) >= number

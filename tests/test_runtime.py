"""The runtime: ends and heartbeats outlive whatever one call brings, and loops do not close one another's store."""

from __future__ import annotations

import asyncio
import datetime
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from asgi_metering import Caller, Metering, MeteringMiddleware, TokenUsage, Unit, billable, current_call, metered_app
from asgi_metering.call import Call
from asgi_metering.errors import ConfigurationError, SettlementError, StoreUnavailableError
from asgi_metering.events.sinks import CallbackSink
from asgi_metering.prices import per_token
from asgi_metering.rules.decide import Answer
from asgi_metering.rules.operations import Admit, End, Operation, Renew, Sweep, WalletSource
from asgi_metering.stores.contract import EverythingKept
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.stores.sqlite import SQLiteStore
from asgi_metering.testing import FakeClock
from tests.harness.drive import drive, http_scope, status
from tests.pitfalls.stage import within

pytestmark = pytest.mark.uncounted

CREDIT = 1_000_000


class Breaking(MemoryStore):
    """A store in which some operations break, and which counts all of them."""

    def __init__(self, *broken: type, clock: Callable[[], float] = time.time) -> None:
        super().__init__(clock)
        self.broken = broken
        self.seen: list[Operation] = []

    def run_now(self, operation: Operation) -> Answer:
        self.seen.append(operation)
        if isinstance(operation, self.broken):
            raise LookupError("gone")
        return super().run_now(operation)


class Guilty(Breaking):
    """One that breaks of the end of the first call that ends, however often that is asked."""

    guilty = ""

    def run_now(self, operation: Operation) -> Answer:
        if isinstance(operation, End):
            self.guilty = self.guilty or operation.id
            if operation.id == self.guilty:
                raise LookupError("gone")
        return super().run_now(operation)


async def settled(metering: Metering) -> tuple[int, int]:
    """What ann spent, and what is held."""
    balance = await metering.balance("ann")
    return balance.settled, balance.held


def charging(metering: Metering, **options: Any) -> Any:
    """A call of ann's."""
    return metering.charge(payer="ann", line="job", **{"hold": 2, **options})


def test_end_others_although_one_end_breaks(caplog: pytest.LogCaptureFixture) -> None:
    """S0.54: an end that raises whatever it may is logged with its traceback; those behind it are booked."""

    async def one(metering: Metering) -> str:
        try:
            async with charging(metering):
                # The ends come together, the guilty one first.
                await asyncio.sleep(0)
        except SettlementError:
            return "unbooked"
        return "booked"

    async def play() -> None:
        async with Metering(Guilty(), sinks=()) as metering:
            await metering.grant("ann", 100, id="g")
            assert await asyncio.gather(*(one(metering) for _ in range(3))) == ["unbooked", "booked", "booked"]
            assert await settled(metering) == (4 * CREDIT, 2 * CREDIT)
            assert sum(metering.meters.totals("ends_lost").values()) == 1
            assert metering.runtime().busy == 0

    with caplog.at_level(logging.ERROR):
        asyncio.run(play())
    assert any(record.exc_info and "could not be booked" in record.getMessage() for record in caplog.records)


def test_beat_although_what_was_used_cannot_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pitfall 33: a price or a body that breaks when it is looked at costs no call its heartbeats."""

    async def broken(_call: Any) -> int:
        raise KeyError("no such model")

    class Eager:
        """An observer that breaks."""

        def digest(self) -> bool:
            raise RecursionError("too deep")

        def report(self) -> None:
            return None

    monkeypatch.setattr("asgi_metering.heartbeats.observed_parts", broken)
    monkeypatch.setattr("asgi_metering.heartbeats.TICK_S", 0.001)

    async def play() -> None:
        store = Breaking()
        async with Metering(store, sinks=()) as metering:
            await metering.grant("ann", 100, id="g")
            async with charging(metering, ttl_s=0.01) as first, charging(metering, ttl_s=0.01) as second:
                first.observer = Eager()
                beats = {first.id: 0, second.id: 0}

                def enough() -> bool:
                    for call_id in beats:
                        beats[call_id] = sum(isinstance(s, Renew) and s.id == call_id for s in store.seen)
                    return min(beats.values()) >= 3

                await within(5, enough)
                first.observer = None

    asyncio.run(play())


def test_call_is_no_older_when_the_clock_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pitfall 27: a machine whose clock is set ahead by hours ends none of its calls: they would run on for nothing."""
    monkeypatch.setattr("asgi_metering.heartbeats.TICK_S", 0.001)

    async def play() -> None:
        store = Breaking()
        async with Metering(store, sinks=(), max_call_s=3_600) as metering:
            await metering.grant("ann", 100, id="g")
            async with charging(metering, ttl_s=0.01) as call:
                # As far as the clock says now.
                call.started_at -= 7_200
                await within(5, lambda: sum(isinstance(seen, Renew) for seen in store.seen) >= 3)
                assert not call.closed
            assert await settled(metering) == (2 * CREDIT, 0)

    asyncio.run(play())


@pytest.mark.parametrize("how", ["sync", "async", "raises", "none"])
def test_tell_of_a_hold_that_its_call_has_lost(
    how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """S0.57: a call whose hold its policy has ended is told of once, and its own end is posted as the difference."""
    monkeypatch.setattr("asgi_metering.heartbeats.TICK_S", 0.001)
    lost: list[Call] = []

    def told(call: Call) -> None:
        lost.append(call)
        if how == "raises":
            raise RuntimeError("no")

    async def told_later(call: Call) -> None:
        await asyncio.sleep(0)
        lost.append(call)

    hook = {"sync": told, "async": told_later, "raises": told, "none": None}[how]

    async def play() -> None:
        clock = FakeClock()
        store = Breaking(clock=clock)
        async with Metering(store, sinks=(), on_hold_lost=hook) as metering:
            await metering.grant("ann", 100, id="g")
            async with charging(metering, ttl_s=0.01) as call, charging(metering, ttl_s=3_600.0) as other:
                await metering.runtime().pump.submit(Renew(call.id, 1_000_000))
                assert not call.hold_lost
                clock.advance(600.0)
                await metering.reconcile()
                await within(5, lambda: call.hold_lost)
                beats = sum(isinstance(seen, Renew) and seen.id == call.id for seen in store.seen)
                await within(5, lambda: how == "none" or lost == [call])
                assert not other.hold_lost
            assert sum(isinstance(seen, Renew) and seen.id == call.id for seen in store.seen) == beats
            assert sum(metering.meters.totals("holds_lost").values()) == 1
            assert metering.unit.text((await metering.balance("ann")).settled) == "4"

    asyncio.run(play())
    assert sum("has been ended by its policy" in record.message for record in caplog.records) == 1
    assert sum("on_hold_lost failed" in record.message for record in caplog.records) == (how == "raises")


def test_beat_although_a_sweep_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """S0.54: a store that cannot sweep, and tallies that nobody takes, stop no heartbeat, and no shutdown."""
    monkeypatch.setattr("asgi_metering.heartbeats.SWEEP_EVERY_S", 0.0)
    monkeypatch.setattr("asgi_metering.heartbeats.TICK_S", 0.001)

    async def play() -> None:
        store = Breaking(Sweep)
        metering = Metering(store, sinks=())
        flushed: list[int] = []

        def flush() -> None:
            flushed.append(1)
            raise RuntimeError("The SDK broke.")

        monkeypatch.setattr(metering.meters, "flush", flush)
        async with metering:
            await within(5, lambda: len(flushed) >= 3)

    asyncio.run(play())


def test_sweep_on_while_there_is_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much is forgotten as comes: a sweep that was full is followed by another at once, one that was not by none."""
    monkeypatch.setattr("asgi_metering.heartbeats.TICK_S", 0.001)
    monkeypatch.setattr("asgi_metering.heartbeats.random.random", lambda: -1.0)
    rows = Sweep().limit

    class Full(Breaking):
        """A store that has much to forget."""

        left = 5 * rows + 1

        def run_now(self, operation: Operation) -> Answer:
            answer = super().run_now(operation)
            if not isinstance(operation, Sweep):
                return answer
            swept = min(rows, self.left)
            self.left -= swept
            return swept

    async def play() -> None:
        store = Full()
        async with Metering(store, sinks=()) as metering:
            await metering.grant("ann", 100, id="g")
            await within(5, lambda: store.left == 0)
            async with charging(metering, ttl_s=0.003) as call:
                # Ticks enough for many more.
                await within(5, lambda: sum(isinstance(s, Renew) and s.id == call.id for s in store.seen) >= 5)
        assert sum(isinstance(seen, Sweep) for seen in store.seen) == 6

    asyncio.run(play())


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
@pytest.mark.parametrize("managed", [True, False])
def test_charge_a_call_whose_attributes_no_event_can_carry(
    kind: str, managed: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every store charges such a call, and its event says them as text; nobody hangs for want of a lifespan."""
    told: list[Any] = []

    async def take(events: Sequence[Any]) -> None:
        told.extend(events)

    async def inner(_scope: Any, _receive: Any, send: Any) -> None:
        current_call().attributes["day"] = datetime.date(2026, 1, 2)  # type: ignore[assignment]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x"})

    async def play() -> None:
        store = MemoryStore() if kind == "memory" else SQLiteStore(tmp_path / "m.db", synchronous="OFF")
        metering = Metering(store, identify=lambda _: Caller("ann"), sinks=[CallbackSink(take)])
        app = MeteringMiddleware(metered_app(inner, billable(2)), metering=metering)
        async with metering:
            metering.runtime().managed = managed
            await metering.grant("ann", 100, id="g")
            async with asyncio.timeout(5):
                assert status((await drive(app, http_scope("/"))).log) == 200
            await within(5, lambda: bool(told))
            assert await settled(metering) == (2 * CREDIT, 0)

    with caplog.at_level(logging.ERROR):
        asyncio.run(play())
    assert told[0].attributes == {"day": "2026-01-02"}
    assert "were told as text: day." in caplog.text


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_refuse_a_caller_whose_attributes_no_event_can_carry(kind: str, tmp_path: Path) -> None:
    """A mistake of `identify` is 503 on every store, before anything is written (DESIGN 2)."""

    async def inner(_scope: Any, _receive: Any, _send: Any) -> None:
        raise AssertionError("It ran.")

    def identify(_connection: Any) -> Caller:
        return Caller("ann", attributes={"day": datetime.date(2026, 1, 2)})  # type: ignore[dict-item]

    async def play() -> None:
        store = MemoryStore() if kind == "memory" else SQLiteStore(tmp_path / "m.db", synchronous="OFF")
        async with Metering(store, identify=identify, sinks=()) as metering:
            app = MeteringMiddleware(metered_app(inner, billable(2)), metering=metering)
            assert status((await drive(app, http_scope("/"))).log) == 503
            assert await metering.holds() == []

    asyncio.run(play())


def test_record_names_that_are_no_text() -> None:
    """A model that is named by something else is told by its text on every store."""

    async def play() -> None:
        async with Metering(sinks=()) as metering:
            await metering.grant("ann", 100, id="g")
            async with charging(metering, price=per_token(output=1)) as call:
                call.record(TokenUsage(output=1), model=7, provider=None)  # type: ignore[arg-type]
                assert [(report.model, report.provider) for report in call.reports] == [("7", None)]

    asyncio.run(play())


# -- several loops -----------------------------------------------------------------------------------------


class Counting(SQLiteStore):
    """Counts how often it was closed."""

    closed = 0

    async def close(self) -> None:
        self.closed += 1
        await super().close()


def test_stop_in_one_loop_leaves_the_store_to_the_others(tmp_path: Path) -> None:
    """A thread's `async with metering:` takes no store from the server's loop; the last one to stop closes it."""

    async def other(metering: Metering) -> None:
        async with metering:
            await metering.grant("bob", 1, id="b")

    async def play() -> None:
        store = Counting(tmp_path / "m.db", synchronous="OFF")
        async with Metering(store, sinks=()) as metering:
            await metering.grant("ann", 100, id="g")
            async with charging(metering):
                await asyncio.to_thread(lambda: asyncio.run(other(metering)))
                assert store.closed == 0
            assert await settled(metering) == (2 * CREDIT, 0)
        assert store.closed == 1

    asyncio.run(play())


def test_loop_that_ended_without_a_stop_keeps_no_store_open(tmp_path: Path) -> None:
    """A loop that is gone uses nothing: who stops after it closes the store."""

    async def forgetful(metering: Metering) -> None:
        await metering.start()

    async def play(metering: Metering) -> None:
        async with metering:
            await metering.grant("ann", 100, id="g")

    store = Counting(tmp_path / "m.db", synchronous="OFF")
    metering = Metering(store, sinks=())
    asyncio.run(forgetful(metering))
    asyncio.run(play(metering))
    assert store.closed == 1


@pytest.mark.parametrize("reopens", [True, False])
def test_loop_that_came_while_the_store_closed_finds_it_open(
    reopens: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Who starts amid the last stop may have found the store open still: it is opened again, or that is told."""

    class Late(Counting):
        """A store that somebody else opens while it closes."""

        opens = 0

        async def open(self) -> None:
            self.opens += 1
            if self.opens == 3 and not reopens:
                raise StoreUnavailableError("The disk is gone.")
            await super().open()

        async def close(self) -> None:
            if not self.closed:
                await asyncio.to_thread(lambda: loop.run_until_complete(metering.start()))
            await super().close()

    loop = asyncio.new_event_loop()
    store = Late(tmp_path / "m.db", synchronous="OFF")
    metering = Metering(store, sinks=())

    async def play() -> None:
        async with metering:
            pass

    async def after() -> None:
        await metering.grant("ann", 100, id="g")
        await metering.stop()

    asyncio.run(play())
    if reopens:
        loop.run_until_complete(after())
    else:
        assert "could not be opened again: The disk is gone." in caplog.text
        loop.run_until_complete(metering.stop())
    loop.close()


def test_loop_whose_store_did_not_open_uses_none(tmp_path: Path) -> None:
    """A start that failed leaves nothing behind that would keep the store open for ever."""

    class Unready(Counting):
        """Opens at the second time."""

        opens = 0

        async def open(self) -> None:
            self.opens += 1
            if self.opens == 1:
                raise ConfigurationError("Not yet.")
            await super().open()

    async def failing(metering: Metering) -> None:
        with pytest.raises(ConfigurationError):
            await metering.start()

    async def play() -> None:
        store = Unready(tmp_path / "m.db", synchronous="OFF")
        metering = Metering(store, sinks=())
        await failing(metering)
        assert not metering.store_use._loops
        async with metering:
            pass
        assert store.closed == 1

    asyncio.run(play())


class Stalled(MemoryStore):
    """A store that opens, and then answers nothing until it is let."""

    immediate = False

    def __init__(self) -> None:
        super().__init__()
        self.door = asyncio.Event()

    async def run(self, operations: Sequence[Operation]) -> list[Answer | Exception]:
        await self.door.wait()
        return await super().run(operations)


@pytest.mark.parametrize("started", [False, True])
def test_a_stalled_store_holds_no_admission_longer_than_the_deadline(started: bool) -> None:
    """Also what is told of units before the first admission is bounded by the deadline (DESIGN "Store down")."""

    async def play() -> None:
        store = Stalled()
        metering = Metering(store, sinks=(), store_timeout_s=0.01, drain_s=0.01)
        if started:
            store.door.set()
            await metering.start()
            store.door.clear()
        metering.counted(Unit("messages", scale=0))
        ask = Admit("c", "ann", "messages", 1, 1, (WalletSource(),))
        async with asyncio.timeout(10):
            with pytest.raises(StoreUnavailableError, match="no answer within"):
                await metering.decide(ask)
        store.door.set()
        assert not (await metering.decide(ask)).admitted
        _, state = await store.read(EverythingKept())
        assert set(state.units) == {"credits", "messages"}
        await metering.stop()

    asyncio.run(play())

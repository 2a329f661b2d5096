"""`metering.charge()`: one call outside HTTP ends once, in whatever context its block is left."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest

from asgi_metering import Metering, TokenUsage, current_call
from asgi_metering.call import CallRefused
from asgi_metering.errors import SettlementError, StoreUnavailableError, UnwritableError
from asgi_metering.events import Dropped
from asgi_metering.events.sinks import CallbackSink
from asgi_metering.opening import CURRENT
from asgi_metering.prices import per_token
from asgi_metering.rules.decide import Answer
from asgi_metering.rules.operations import Admit, Emit, End, Operation
from asgi_metering.sources import Allowance
from asgi_metering.stores.contract import EverythingKept
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.testing.clock import FakeClock
from tests.pitfalls.stage import within

CREDIT = 1_000_000


class Failing(MemoryStore):
    """A store that gives no answer while it is down."""

    down = False

    def run_now(self, operation: Operation) -> Answer:
        if self.down:
            raise StoreUnavailableError("The store is down.")
        return super().run_now(operation)


class Endless(MemoryStore):
    """A store that cannot write any end."""

    def run_now(self, operation: Operation) -> Answer:
        if isinstance(operation, End):
            raise KeyError("gone")
        return super().run_now(operation)


def charging(metering: Metering, **options: Any) -> Any:
    """A call of ann's, of two credits unless said otherwise."""
    return metering.charge(payer="ann", line="job", **{"hold": 2, **options})


async def opened(store: Any = "memory://") -> Metering:
    """A metering with a hundred credits of ann's."""
    metering = Metering(store, sinks=(), drain_s=0.05)
    metering.end_timeout_s = 0.05
    await metering.start()
    await metering.grant("ann", 100, id="g")
    return metering


async def settled(metering: Metering) -> tuple[int, int]:
    """What ann spent, and what is held."""
    balance = await metering.balance("ann")
    return balance.settled, balance.held


def test_end_a_block_that_is_stepped_in_other_tasks() -> None:
    """A generator whose every step runs in a task of its own is charged when it ends (pitfall 38)."""

    async def steps(metering: Metering) -> AsyncIterator[int]:
        async with charging(metering):
            for number in range(3):
                yield number

    async def play() -> None:
        metering = await opened()
        generator = steps(metering)
        seen = [await asyncio.create_task(anext(generator)) for _ in range(3)]  # type: ignore[arg-type]
        with pytest.raises(StopAsyncIteration):
            await asyncio.create_task(anext(generator))  # type: ignore[arg-type]
        assert seen == [0, 1, 2]
        assert await settled(metering) == (2 * CREDIT, 0)
        await metering.stop()

    asyncio.run(play())


def test_end_a_block_that_the_collector_closes() -> None:
    """A generator that nobody reads to its end is released by whoever closes it, in another context (pitfall 38)."""

    async def steps(metering: Metering) -> AsyncIterator[int]:
        async with charging(metering):
            yield 1
            yield 2

    async def abandoned(metering: Metering) -> None:
        generator = steps(metering)
        await anext(generator)
        assert len(metering.runtime().in_flight) == 1

    async def play() -> None:
        metering = await opened()
        await asyncio.create_task(abandoned(metering))
        gc.collect()
        await within(5, lambda: not metering.runtime().in_flight and not metering.runtime().busy)
        assert await settled(metering) == (0, 0)
        await metering.stop()

    asyncio.run(play())


def test_leave_the_call_outside_as_it_was() -> None:
    """Inside the block the charge is current; behind it who was before, or nobody, whatever raised (S3.24, S3.25)."""

    async def broken(metering: Metering) -> None:
        async with charging(metering) as inner:
            assert current_call() is inner
            raise ValueError("mine")

    async def play() -> None:
        metering = await opened()
        async with charging(metering) as outer:
            with pytest.raises(ValueError, match="mine"):
                await broken(metering)
            assert current_call() is outer
        assert CURRENT.get() is None
        await metering.stop()

    asyncio.run(play())


def test_raise_the_bodys_exception_while_the_store_is_down(caplog: pytest.LogCaptureFixture) -> None:
    """S3.8: what the body raises rises unchanged; that its hold is not released yet is logged, and mended later."""

    async def job(metering: Metering, store: Failing) -> None:
        async with charging(metering):
            store.down = True
            raise KeyError("mine")

    async def play() -> None:
        store = Failing()
        metering = await opened(store)
        with pytest.raises(KeyError, match="mine"):
            await job(metering, store)
        store.down = False
        await within(5, lambda: not metering.runtime().busy)
        assert await settled(metering) == (0, 0)
        await metering.stop()

    with caplog.at_level(logging.WARNING):
        asyncio.run(play())
    assert "its hold is not released yet" in caplog.text


def test_raise_a_cancellation_while_the_store_is_down() -> None:
    """S3.8: also a cancellation stays one."""

    async def job(metering: Metering, store: Failing, entered: asyncio.Event) -> None:
        async with charging(metering):
            store.down = True
            entered.set()
            await asyncio.Event().wait()

    async def play() -> None:
        store = Failing()
        metering = await opened(store)
        entered = asyncio.Event()
        task = asyncio.create_task(job(metering, store, entered))
        await entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        store.down = False
        await metering.stop()

    asyncio.run(play())


def test_tell_a_body_that_succeeded_of_a_store_that_is_down() -> None:
    """S3.10: work that was done and is not booked yet is an error of its own, and is booked later."""

    async def play() -> None:
        store = Failing()
        metering = await opened(store)
        with pytest.raises(SettlementError, match="its end is not booked") as told:
            async with charging(metering) as call:
                store.down = True
        store.down = False
        assert (told.value.call, told.value.line, told.value.payer) == (call.id, "job", "ann")
        assert isinstance(told.value.__cause__, StoreUnavailableError)
        await within(5, lambda: not metering.runtime().busy)
        assert await settled(metering) == (2 * CREDIT, 0)
        await metering.stop()

    asyncio.run(play())


def test_tell_a_body_that_succeeded_of_an_end_that_cannot_be_booked() -> None:
    """An end that will never be booked is told as well: nobody takes the work for charged."""

    async def play() -> None:
        metering = await opened(Endless())
        with pytest.raises(SettlementError, match="its end is not booked") as told:
            async with charging(metering):
                pass
        # Caused by what kept the end from being booked, and not by what came of it (S3.10, S3.11).
        assert isinstance(told.value.__cause__, UnwritableError)
        assert isinstance(told.value.__cause__.__cause__, KeyError)
        assert await settled(metering) == (0, 2 * CREDIT)
        await metering.stop()

    asyncio.run(play())


def test_free_work_has_nothing_to_book() -> None:
    """A call of price 0 ends without a receipt, and that is no error (S3.32)."""

    async def play() -> None:
        metering = await opened()
        async with charging(metering, hold=None, price=0) as call:
            pass
        assert call.receipt is None
        await metering.stop()

    asyncio.run(play())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"hold": "100.5"}, "It needs 100.5 credits and 100 are available."),
        ({"hold": 8, "sources": [Allowance(5)]}, "It needs 8 credits and 5 are available."),
    ],
)
def test_refusal_says_what_is_lacking(options: dict[str, Any], told: str) -> None:
    """The block does not run, and its error says in whole units what the payer lacked, for a job's log (S3.2)."""

    async def play() -> None:
        metering = await opened()
        with pytest.raises(CallRefused) as refused:
            async with charging(metering, **options):
                raise AssertionError("It ran.")
        assert told in str(refused.value)
        assert repr(refused.value) == f"CallRefused({str(refused.value)!r})"
        await metering.stop()

    asyncio.run(play())


def test_charge_a_block_that_held_nothing() -> None:
    """A measured call that held 0 is charged for what it used, into debt (DESIGN 4)."""

    async def play() -> None:
        metering = await opened()
        async with charging(metering, hold=0, price=per_token(output=1)) as call:
            call.record(TokenUsage(output=101))
        assert (await metering.balance("ann")).debt == CREDIT
        with pytest.raises(CallRefused):
            async with charging(metering, hold=0, price=per_token(output=1)):
                raise AssertionError("It ran.")
        await metering.stop()

    asyncio.run(play())


def test_keep_a_charge_whose_event_cannot_be_written(caplog: pytest.LogCaptureFixture) -> None:
    """An end that the store refuses for its event is charged without it, at once, with an alarm (S3.21)."""
    tries: list[bool] = []

    class Picky(MemoryStore):
        """It writes no event."""

        def run_now(self, operation: Operation) -> Answer:
            if isinstance(operation, End):
                tries.append(operation.event is not None)
                if operation.event is not None:
                    raise TypeError("is not JSON-safe")
            return super().run_now(operation)

    async def play() -> None:
        metering = Metering(Picky(), sinks=[Deaf()])
        async with metering:
            await metering.grant("ann", 100, id="g")
            async with charging(metering):
                pass
            assert await settled(metering) == (2 * CREDIT, 0)
            assert metering.meters.totals("events_dropped") == {(): 1}

    with caplog.at_level(logging.ERROR):
        asyncio.run(play())
    # Once where it would have been taken at once, and once on the way for everything else.
    assert tries == [True, True, False]
    assert "charged without its usage event" in caplog.text


@pytest.mark.parametrize("how", ["sync", "async", "raises"])
def test_hand_on_an_event_that_nobody_gets(how: str, caplog: pytest.LogCaptureFixture) -> None:
    """Each usage event that is given up is handed to on_event_dropped, whatever drops it (S2.7)."""
    lost: list[Dropped] = []

    class Picky(MemoryStore):
        """It writes no event of an end."""

        def run_now(self, operation: Operation) -> Answer:
            if isinstance(operation, End) and operation.event is not None:
                raise TypeError("is not JSON-safe")
            return super().run_now(operation)

    def told(dropped: Dropped) -> None:
        lost.append(dropped)
        if how == "raises":
            raise RuntimeError("no")

    async def told_later(dropped: Dropped) -> None:
        await asyncio.sleep(0)
        lost.append(dropped)

    async def play() -> None:
        hook = told_later if how == "async" else told
        async with Metering(Picky(), sinks=[Deaf()], on_event_dropped=hook) as metering:
            await metering.grant("ann", 100, id="g")
            async with charging(metering) as call:
                call.attributes["count"] = 3
            await metering.runtime().pump.submit(Emit((("broken", {"amount": "many"}),)))
            async with metering.charge(payer="ann", line="free", price=0):
                pass
            await within(5, lambda: len(lost) == 2)
            assert await settled(metering) == (2 * CREDIT, 0)
            assert lost[0].id == call.id

    with caplog.at_level(logging.ERROR):
        asyncio.run(play())
    assert [each.cause for each in lost] == ["unwritable", "undecodable"]
    assert lost[0].payload["attributes"] == {"count": 3}
    assert caplog.text.count("on_event_dropped failed") == (2 if how == "raises" else 0)


class Deaf:
    """A sink that takes everything."""

    name = "deaf"

    async def deliver(self, events: Any) -> None:
        """Take it."""

    async def close(self) -> None:
        """Nothing to do."""


class Recording(MemoryStore):
    """A store that remembers the kinds of what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: list[str] = []

    def run_now(self, operation: Operation) -> Answer:
        if isinstance(operation, Admit | End | Emit):
            self.kinds.append(type(operation).__name__)
        return super().run_now(operation)


def test_hold_run_settle_and_tell() -> None:
    """One block is the whole life: held before the body, settled after it, told in the same step (S3.1)."""
    store = Recording()
    told: list[Any] = []

    async def play() -> None:
        async with Metering(store, sinks=[CallbackSink(told.extend)]) as metering:
            await metering.grant("ann", 100, id="g")
            async with charging(metering):
                assert store.kinds == ["Admit"]
                assert await settled(metering) == (0, 2 * CREDIT)
            assert store.kinds == ["Admit", "End"]
            assert await settled(metering) == (2 * CREDIT, 0)
            await within(5, lambda: bool(told))

    asyncio.run(play())
    assert [(event.line, event.amount, event.outcome) for event in told] == [("job", 2 * CREDIT, "completed")]


def test_refusal_ends_and_tells_nothing() -> None:
    """A refused block is neither settled, released nor audited, and its error has the numbers (S3.2)."""
    store = Recording()
    told: list[Any] = []

    async def play() -> None:
        async with Metering(store, sinks=[CallbackSink(told.extend)]) as metering:
            await metering.grant("ann", 100, id="g")
            with pytest.raises(CallRefused) as refused:
                async with charging(metering, hold=101):
                    raise AssertionError("It ran.")
            refusal = refused.value.refusal
            assert (refused.value.call.line, refusal.required, refusal.available) == ("job", 101 * CREDIT, 100 * CREDIT)
            assert (await metering.store.read(EverythingKept())).state.events == {}

    asyncio.run(play())
    assert store.kinds == ["Admit"]
    assert told == []


class Slow(MemoryStore):
    """A store that is asked as those are that take a while."""

    immediate = False


@pytest.mark.parametrize("store", [MemoryStore, Slow])
def test_end_once_wherever_it_is_cancelled(store: type[MemoryStore]) -> None:
    """
    Cancelled at any step of its life, a hold is settled or released, once and in time (S3.12).

    Between the answer to its admission and its body, in the body, and while it is settled.
    """

    async def run(steps: int) -> tuple[int, bool]:
        async with Metering(store(), sinks=()) as metering:
            await metering.grant("ann", 100, id="g")

            async def work() -> None:
                async with charging(metering, price=2, hold=None):
                    await asyncio.sleep(0)
                    await asyncio.sleep(0)

            task = asyncio.create_task(work())
            for _ in range(steps):
                await asyncio.sleep(0)
            was_done = task.done()
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            await metering.runtime().booked()
            spent, held = await settled(metering)
            assert (held, task.cancelled()) == (0, not was_done)
            assert await metering.check() == []
            return spent, was_done

    found = [asyncio.run(run(steps)) for steps in range(40)]
    # Until the body is over nothing is charged, and from then on all of it.
    assert [spent for spent, _ in found] == sorted(spent for spent, _ in found)
    assert {spent for spent, _ in found} == {0, 2 * CREDIT}
    assert found[0] == (0, False)
    assert found[-1] == (2 * CREDIT, True)


def test_free_a_hold_by_time_that_nothing_could_end() -> None:
    """Where neither settling nor releasing worked, the hold's lease frees it later (S3.11)."""
    clock = FakeClock()

    async def play() -> None:
        async with Metering(Endless(clock), sinks=()) as metering:
            metering.end_timeout_s = 0.05
            await metering.grant("ann", 100, id="g")
            with pytest.raises(SettlementError, match="its end is not booked"):
                async with charging(metering, ttl_s=60, grace_s=30, on_abort="none"):
                    pass
            clock.advance(89)
            assert await metering.reconcile() == []
            assert await settled(metering) == (0, 2 * CREDIT)
            clock.advance(1)
            assert len(await metering.reconcile()) == 1
            assert await settled(metering) == (0, 0)

    asyncio.run(play())


@pytest.mark.parametrize("raised", [ValueError("mine"), asyncio.CancelledError()], ids=["error", "cancelled"])
def test_audit_free_work_that_fails(raised: BaseException) -> None:
    """Free work is told of also where its body raises, which rises unchanged, a cancellation too (S3.33)."""
    told: list[Any] = []

    async def play() -> None:
        async with Metering(sinks=[CallbackSink(told.extend)]) as metering:
            with pytest.raises(type(raised)) as risen:
                async with charging(metering, hold=None, price=0):
                    raise raised
            assert risen.value is raised
            await within(5, lambda: bool(told))

    asyncio.run(play())
    assert [(event.line, event.amount, event.outcome) for event in told] == [("job", 0, "error")]

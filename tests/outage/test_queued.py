"""Calls that are let in while the store is down, in the corners: what was held, when, and for whom that died."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from asgi_metering import Metering, MeteringMiddleware, TokenUsage, billable, current_call, metered_app, slices
from asgi_metering.call import Call
from asgi_metering.errors import StoreUnavailableError
from asgi_metering.events.sinks import CallbackSink
from asgi_metering.prices import per_token
from asgi_metering.receipts import EntryKind
from asgi_metering.rules.decide import Answer
from asgi_metering.rules.operations import Admit, Backfill, End, Operation, WalletSource
from asgi_metering.stores.breaker import BreakerState
from asgi_metering.stores.contract import EverythingKept
from tests.harness.drive import Drive, http_scope, status
from tests.outage.gated import CREDIT, QUEUE, Gated, back, call, is_empty, is_settled, metered, settled, until, used

DAY_S = 86_400.0


async def _quiet(metering: Metering) -> bool:
    return metering.runtime().busy == 0


class Forgetful(Gated):
    """
    Loses the reply to one of the batches that do something for a call.

    Attributes:
        left: How many of those are answered before.
    """

    left = -1

    async def run(self, operations: Sequence[Operation]) -> list[Answer | Exception]:
        if any(isinstance(each, Admit | Backfill | End) for each in operations) and not self.down:
            self.left -= 1
            if self.left == -1:
                self.loses = [tuple]
        return await super().run(operations)


@pytest.mark.parametrize("answered", [0, 1, 2])
def test_charge_a_queued_call_once_out_of_memory(answered: int, tmp_path: Path) -> None:
    """Where the journal failed too, a debtor who pays in between two tries is charged by one of them, and not by both.

    Also when what the journal had kept at the beginning of the call is found there later.
    """
    begun, leave = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        begun.set()
        await leave.wait()

    async def play() -> None:
        store = Forgetful()
        async with used(store, journal=tmp_path / "j", on_store_down=QUEUE, max_call_s=0.2) as metering:
            await metering.grant("bob", 1, id="b")
            journal = metering.journal
            assert journal is not None
            store.down = True
            running = asyncio.create_task(call(metered(metering, billable(2, on_abort="hold"), work=work), "bob"))
            await begun.wait()
            first = await _entries(journal)
            journal._max_entries = 0
            leave.set()
            assert status((await running).log) == 200
            store.left = answered
            store.down = False
            await until(lambda: _has_lost(store))
            await metering.grant("bob", 50, id="more")
            await until(lambda: _quiet(metering))
            assert await settled(metering, "bob") == (2 * CREDIT, 0)
            journal._max_entries = 10
            await journal.keep(first)
            await until(lambda: is_empty(metering))
            assert await settled(metering, "bob") == (2 * CREDIT, 0)

    asyncio.run(play())


async def _has_lost(store: Forgetful) -> bool:
    return store.left < 0 and not store.loses


async def _entries(journal: Any) -> dict[str, Any]:
    """All that it keeps, due or not."""
    clock, journal._clock = journal._clock, lambda: float("inf")
    kept = {entry.id: entry.steps for entry in await journal.due(10)}
    journal._clock = clock
    return kept


# -- holds that would have grown ---------------------------------------------------------------------------

GROWING = slices(TokenUsage(output=4), step=TokenUsage(output=4), low_water=TokenUsage(output=1))
PRICE = per_token(input=0, output=1)


async def _is_held(call: Call, tokens: int) -> bool:
    return call.held == tokens * CREDIT


def test_charge_all_that_a_queued_call_would_have_held(tmp_path: Path) -> None:
    """A policy of "hold" charges a queued call what it would hold by then, and `affordable` counts on it."""

    async def work() -> None:
        current = current_call()
        assert current.affordable("output") == 4
        current.record(TokenUsage(input=0, output=9))
        # From a first slice of 4: a step beyond what was used.
        await until(lambda: _is_held(current, 13))
        assert current.affordable("output") == 4
        raise LookupError("gone")

    async def play() -> None:
        store = Gated()
        async with used(store, journal=tmp_path / "j", on_store_down=QUEUE) as metering:
            store.down = True
            part = billable(PRICE, hold=GROWING, on_error="hold")
            assert (await call(metered(metering, part, work=work))).outcome == "raised"
            await back(metering, store)
            assert await settled(metering) == (13 * CREDIT, 0)

    asyncio.run(play())


@pytest.mark.parametrize(("policy", "charged"), [("hold", 13), ("none", 0)])
def test_end_a_growing_call_whose_process_died(policy: Literal["hold", "none"], charged: int, tmp_path: Path) -> None:
    """What a queued call would hold is in the journal before its process dies, and "hold" charges that."""
    never, grown = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        current = current_call()
        current.record(TokenUsage(input=0, output=9))
        await until(lambda: _is_held(current, 13))
        grown.set()
        await never.wait()

    async def play() -> None:
        store = Gated()
        async with used(store, journal=tmp_path / "j", on_store_down=QUEUE, max_call_s=0.5) as metering:
            store.down = True
            # Nobody ends it: as if the process died.
            metering.runtime().finish = lambda call: None  # type: ignore[method-assign]
            metering.runtime()._heartbeats._finish = lambda call: None
            part = billable(PRICE, hold=GROWING, on_abort=policy)
            async with Drive(metered(metering, part, work=work), http_scope("/")):
                await grown.wait()
            await back(metering, store)
            assert await settled(metering) == (charged * CREDIT, 0)

    asyncio.run(play())


@pytest.mark.parametrize(("price", "hold", "charged"), [(PRICE, 20, 9), (2, None, 2)], ids=["measured", "fixed"])
def test_charge_what_was_seen_of_a_queued_call_whose_process_died(
    price: Any, hold: int | None, charged: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DESIGN "End of call": the journal hears what heartbeats tell, so that a killed worker's call is charged that."""
    monkeypatch.setattr("asgi_metering.heartbeats.TICK_S", 0.005)
    written: list[End] = []

    async def endpoint(scope: Any, _receive: Any, send: Any) -> None:
        current_call().record(TokenUsage(input=0, output=9))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{", "more_body": True})
        await asyncio.Event().wait()

    async def play() -> None:
        store = Gated()
        async with used(store, journal=tmp_path / "j", on_store_down=QUEUE, max_call_s=1.0) as metering:
            keep = metering.runtime()._delivery.keep

            async def kept(call_id: str, steps: Any, **options: Any) -> bool:
                written.append(steps[1])
                return await keep(call_id, steps, **options)

            async def is_heard() -> bool:
                return len(written) == 2

            metering.runtime()._delivery.keep = kept  # type: ignore[method-assign]
            store.down = True
            # Nobody ends it: as if the process died.
            metering.runtime().finish = lambda call: None  # type: ignore[method-assign]
            metering.runtime()._heartbeats._finish = lambda call: None
            app = metered_app(endpoint, billable(price, hold=hold, ttl_s=0.03))
            async with Drive(MeteringMiddleware(app, metering=metering), http_scope("/")):
                await until(is_heard)
            await back(metering, store)
            assert await settled(metering) == (charged * CREDIT, 0)
            # What does not change is not written again.
            assert len(written) == 2

    asyncio.run(play())


def test_keep_the_end_of_a_queued_call_that_grows(tmp_path: Path) -> None:
    """A growth that is written together with the end of its call, in whatever order of due times, is behind it."""

    async def play() -> None:
        store = Gated()
        async with used(store, journal=tmp_path / "j", on_store_down=QUEUE) as metering:
            store.down = True
            ask = Admit("c", "ann", "credits", 1, 1, (WalletSource(),))
            delivery = metering.runtime()._delivery
            kept = await asyncio.gather(
                delivery.keep("c", (ask, End("c", 1)), due_in_s=3_600.0),
                delivery.keep("c", (ask, End("c", 2))),
                delivery.keep("d", (End("d", 1),)),
                delivery.keep("d", ()),
            )
            assert kept == [True] * 4
            assert metering.journal is not None
            (entry,) = await metering.journal.due(10)
            assert (entry.id, entry.steps[1]) == ("c", End("c", 2))

    asyncio.run(play())


# -- on the day of the call --------------------------------------------------------------------------------


@pytest.mark.parametrize("was_paid", [False, True])
def test_book_a_queued_call_on_the_day_of_its_key(was_paid: bool, tmp_path: Path) -> None:
    """A call that is booked after midnight belongs to the window in which it was made: it opens no new one (S0.10)."""

    async def play() -> None:
        store = Gated()
        began = time.time()
        now = [began]
        store._clock = lambda: now[0]
        async with used(store, journal=tmp_path / "j", on_store_down=QUEUE) as metering:
            app = metered(metering, billable(2, charge_key=lambda: "s"))
            if was_paid:
                await call(app)
                await until(lambda: _quiet(metering))
            store.down = True
            for _ in range(2):
                assert status((await call(app)).log) == 200
            now[0] += DAY_S
            await back(metering, store)
            assert await settled(metering) == (2 * CREDIT, 0)
            (key,) = (await store.read(EverythingKept())).state.charge_keys.values()
            assert (key.settled, key.members, key.start <= began < key.start + DAY_S) == (True, 0, True)

    asyncio.run(play())


@pytest.mark.parametrize(("later_s", "windows"), [(30.0, 1), (200.0, 2)])
def test_end_a_rolling_window_when_it_would_have(
    later_s: float, windows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window that rolls from a queued call on is over when it would have been, however late that call is booked.

    Calls of it that are booked together are one charge all the same.
    """

    async def play() -> None:
        store = Gated()
        now = [time.time()]
        store._clock = lambda: now[0]
        monkeypatch.setattr("asgi_metering.delivery.time", SimpleNamespace(time=store._clock))
        async with used(store, journal=tmp_path / "j", on_store_down=QUEUE) as metering:
            app = metered(metering, billable(2, charge_key=lambda: "s", charge_per=100.0))
            store.down = True
            for _ in range(2):
                assert status((await call(app)).log) == 200
            now[0] += later_s
            await back(metering, store)
            assert await settled(metering) == (2 * CREDIT, 0)
            now[0] += 61.0
            assert status((await call(app)).log) == 200
            await until(lambda: _quiet(metering))
            # On a machine that is busy this one may have been queued as well.
            await until(lambda: is_empty(metering))
            await until(lambda: is_settled(metering, windows * 2))

    asyncio.run(play())


# -- whose process died ------------------------------------------------------------------------------------


def test_tell_of_a_queued_call_whose_process_died(tmp_path: Path) -> None:
    """A queued call that died and is charged nothing is told of by one event, as one that the store admitted."""
    told: list[Any] = []
    begun, never = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        begun.set()
        await never.wait()

    async def play() -> None:
        store = Gated()
        options: dict[str, Any] = {"on_store_down": QUEUE, "max_call_s": 0.2, "sinks": [CallbackSink(told.extend)]}
        async with used(store, journal=tmp_path / "j", **options) as metering:
            store.down = True
            # Nobody ends it: as if the process died.
            metering.runtime().finish = lambda call: None  # type: ignore[method-assign]
            metering.runtime()._heartbeats._finish = lambda call: None
            async with Drive(metered(metering, billable(2, line="job"), work=work), http_scope("/")):
                await begun.wait()
            await back(metering, store)
            await until(lambda: _is_told(told))
            assert await settled(metering) == (0, 0)

    asyncio.run(play())
    (event,) = told
    assert (event.outcome, event.reason, event.amount, event.line, event.payer) == (
        "aborted",
        "in_doubt",
        0,
        "job",
        "ann",
    )


async def _is_told(told: list[Any]) -> bool:
    return bool(told)


def test_owe_what_nobody_can_pay_under_the_call_s_own_id(tmp_path: Path) -> None:
    """Debt of a queued call is its own charge: it is refunded by the call's id, and its event is the call's."""
    told: list[Any] = []

    async def play() -> None:
        store = Gated()
        options: dict[str, Any] = {"on_store_down": QUEUE, "sinks": [CallbackSink(told.extend)]}
        async with used(store, journal=tmp_path / "j", **options) as metering:
            store.down = True
            assert status((await call(metered(metering, billable(2)), "bob")).log) == 200
            await back(metering, store)
            (line,) = [each async for each in metering.statement("bob")]
            assert (line.kind, line.amount, (await metering.balance("bob")).debt) == (
                EntryKind.SETTLE,
                2 * CREDIT,
                2 * CREDIT,
            )
            await until(lambda: _is_told(told))
            assert [event.id for event in told] == [line.ref]
            await metering.refund(line.ref, id="r")
            assert (await metering.balance("bob")).debt == 0

    asyncio.run(play())


# -- what the store may have admitted ----------------------------------------------------------------------


class Dying(Gated):
    """A store that goes down with the first reply that it loses."""

    async def run(self, operations: Sequence[Operation]) -> list[Answer | Exception]:
        try:
            return await super().run(operations)
        except StoreUnavailableError:
            self.down = True
            raise


@pytest.mark.parametrize(("policy", "kept"), [("hold", 1), ("observed", 0)])
def test_give_back_what_a_refused_call_may_hold(policy: Literal["hold", "observed"], kept: int, tmp_path: Path) -> None:
    """
    A call that was refused without an answer is not charged, although the store holds something for it, also where its
    process dies: what an expiry would charge is given back out of the journal. Who was not asked for leaves nothing.
    """

    async def play() -> None:
        store = Dying()
        async with used(store, journal=tmp_path / "j") as metering:
            journal = metering.journal
            assert journal is not None
            app = metered(metering, billable(2, on_abort=policy))
            store.loses = [Admit]
            # What this process itself would do about it.
            metering.runtime().pump._unknown = None
            assert status((await call(app)).log) == 503
            await until(lambda: _is_kept(journal, kept))
            assert (await settled(metering))[1] == 2 * CREDIT
            metering.breaker._state, metering.breaker._until = BreakerState.OPEN, float("inf")
            assert status((await call(app)).log) == 503
            assert await journal.counts() == (kept, 0)
            store.down = False
            await until(lambda: is_empty(metering))
            assert await settled(metering) == (0, 0 if kept else 2 * CREDIT)

    asyncio.run(play())


async def _is_kept(journal: Any, number: int) -> bool:
    return await journal.counts() == (number, 0)

"""Charges that were queued without the store: what they come to when it is back, and that it is once (X.6)."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from pathlib import Path
from typing import Any, Literal

import pytest

from asgi_metering import (
    Allowance,
    CallRefused,
    Metering,
    MeteringMiddleware,
    TokenUsage,
    Wallet,
    billable,
    current_call,
    metered_app,
    rate_limited,
    slices,
)
from asgi_metering.events.sinks import CallbackSink
from asgi_metering.policies import Idempotency
from asgi_metering.prices import per_token
from asgi_metering.receipts import Basis, EntryKind
from asgi_metering.rules.operations import Admit, End, WalletSource
from asgi_metering.sources import PaymentSource
from asgi_metering.stores.contract import EverythingKept
from tests.harness.drive import Drive, body, http_scope, status
from tests.outage.gated import CREDIT, QUEUE, Gated, back, call, is_empty, is_settled, metered, settled, until, used
from tests.pitfalls.streams import delta


def test_charge_later_what_was_let_in(tmp_path: Path) -> None:
    """With "queue" a call runs while the store is down, and is charged once when it is back: line, event and receipt.

    The handler sees an admitted call with its hold; what is in the books stands under the call's own id.
    """
    seen: list[Any] = []
    events: list[Any] = []

    async def work() -> None:
        call = current_call()
        seen.append((call.id, call.decision, call.held))

    async def play() -> None:
        store = Gated()
        sinks = [CallbackSink(events.extend)]
        async with used(store, journal=tmp_path / "j", on_store_down=QUEUE, sinks=sinks) as metering:
            store.down = True
            app = metered(metering, billable(2, line="chat"), work=work)
            ended = await call(app, x_request_id="r-1")
            assert status(ended.log) == 200
            ((call_id, decision, held),) = seen
            assert (decision.admitted, decision.fallback, held) == (True, ("credits:queue",), 2 * CREDIT)
            await back(metering, store)
            assert await settled(metering) == (2 * CREDIT, 0)
            (line,) = [each async for each in metering.statement("ann") if each.kind is EntryKind.SETTLE]
            assert (line.ref, line.line, line.basis) == (call_id, "chat", Basis.USAGE)
            await until(lambda: _told(events))
            assert (events[0].id, events[0].line, events[0].request_id) == (call_id, "chat", "r-1")
            assert (await metering.refund(call_id, id="sorry")).returned == 2 * CREDIT

    asyncio.run(play())


async def _told(events: list[Any]) -> bool:
    return len(events) == 1


def test_charge_a_queued_call_by_what_it_used(tmp_path: Path) -> None:
    """A measured price is settled by usage, also above the estimate; failed work costs nothing, and nothing waits."""
    fails = False

    async def work() -> None:
        if fails:
            raise LookupError("gone")
        current_call().record(TokenUsage(input=1, output=6))

    async def play() -> None:
        nonlocal fails
        store = Gated()
        async with used(store, journal=tmp_path / "j", on_store_down=QUEUE) as metering:
            app = metered(metering, billable(per_token(input=1, output=1), hold=3), work=work)
            store.down = True
            assert status((await call(app)).log) == 200
            fails = True
            assert (await call(app)).outcome == "raised"
            await back(metering, store)
            assert await settled(metering) == (7 * CREDIT, 0)
            assert [end.amount for end in store.seen(End) if end.amount] == [7 * CREDIT]

    asyncio.run(play())


def test_charge_queued_calls_by_the_route_s_own_sources(tmp_path: Path) -> None:
    """An allowance pays first, then grants; what nobody can pay is debt, and stands in the payer's statement."""
    sources: list[PaymentSource] = [Allowance(2, per="month"), Wallet()]

    async def play() -> None:
        store = Gated()
        async with used(store, journal=tmp_path / "j", on_store_down=QUEUE) as metering:
            await metering.grant("bob", 1, id="b")
            app = metered(metering, billable(1, sources=sources))
            store.down = True
            for _ in range(4):
                assert status((await call(app, "bob")).log) == 200
            await back(metering, store)
            balance = await metering.balance("bob")
            assert (balance.settled, balance.debt) == (2 * CREDIT, 1 * CREDIT)
            (status_of,) = await metering.allowances("bob", sources=sources)
            assert status_of.used == 2 * CREDIT
            kinds = [each.kind async for each in metering.statement("bob")]
            assert kinds.count(EntryKind.SETTLE) == 4

    asyncio.run(play())


@pytest.mark.parametrize("payer", ["ann", "bob"])
@pytest.mark.parametrize("lost", [Admit, End])
def test_charge_a_queued_call_once_whatever_reply_is_lost(lost: type, payer: str, tmp_path: Path) -> None:
    """S3.15: a step whose reply was lost is done again and changes nothing twice, also where money came in between."""
    price = 2

    async def play() -> None:
        store = Gated()
        async with used(store, journal=tmp_path / "j", on_store_down=QUEUE) as metering:
            await metering.grant("bob", 1, id="b")
            app = metered(metering, billable(price))
            store.down = True
            assert status((await call(app, payer)).log) == 200
            store.loses = [lost, lost, lost]
            store.down = False

            async def rich() -> bool:
                # Who could not pay before can now: the debt that was decided on stands all the same.
                if not store.loses:
                    await metering.grant("bob", 50, id="more")
                return await is_empty(metering)

            await until(rich)
            assert store.loses == []
            assert await settled(metering, payer) == (price * CREDIT, 0)

    asyncio.run(play())


def test_charge_a_queued_call_whose_first_admission_was_late(tmp_path: Path) -> None:
    """What the store admitted after the deadline is given back; what was queued instead is charged, once."""

    async def play() -> None:
        store = Gated()
        async with used(store, journal=tmp_path / "j", on_store_down=QUEUE) as metering:
            store.silent = True
            assert status((await call(metered(metering, billable(2)))).log) == 200
            store.silent = False
            store.let.set()
            await until(lambda: is_empty(metering))
            await until(lambda: is_settled(metering, 2))
            state = (await store.read(EverythingKept())).state
            assert sorted(hold.receipt.amount for hold in state.holds.values() if hold.receipt) == [0, 2 * CREDIT]

    asyncio.run(play())


def test_charge_a_queued_call_that_is_admitted_late_again(tmp_path: Path) -> None:
    """What the journal asks for is asked again until it is answered: a late answer undoes nothing of it."""

    async def play() -> None:
        store = Gated()
        async with used(store, journal=tmp_path / "j", on_store_down=QUEUE) as metering:
            metering.end_timeout_s = 0.05
            assert metering.journal is not None
            store.silent = True
            ask = Admit("late", "ann", "credits", 2 * CREDIT, 2 * CREDIT, (WalletSource(),))
            await metering.journal.keep({"late": (ask, End("late", 2 * CREDIT, Basis.USAGE))})
            # Asked, and not answered within the deadline.
            await until(lambda: _is_alarmed(metering))
            store.silent = False
            store.let.set()
            await until(lambda: is_empty(metering))
            assert await settled(metering) == (2 * CREDIT, 0)

    asyncio.run(play())


def test_write_charges_that_come_together_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queued calls that come while the disk is busy share its next write: none waits for all before it in turn."""
    writes = []

    async def play() -> None:
        store = Gated()
        async with used(store, journal=tmp_path / "j", on_store_down=QUEUE) as metering:
            journal = metering.journal
            assert journal is not None
            keep = journal.keep

            async def counted(entries: Any, **options: Any) -> None:
                writes.append(len(entries))
                await keep(entries, **options)

            monkeypatch.setattr(journal, "keep", counted)
            store.down = True
            app = metered(metering, billable(1))
            ended = await asyncio.gather(*(call(app) for _ in range(40)))
            assert {status(each.log) for each in ended} == {200}
            await back(metering, store)
            assert await settled(metering) == (40 * CREDIT, 0)
            assert sum(writes) == 80
            assert len(writes) < 40

    asyncio.run(play())


@pytest.mark.parametrize("days", [3, 34])
def test_charge_a_queued_call_by_the_windows_of_a_later_day(days: int, tmp_path: Path) -> None:
    """An outage over midnight makes no debt of what an allowance pays, and calls of one key stay one charge."""
    sources = [Allowance(5, per="day")]

    async def play() -> None:
        store = Gated()
        now = [time.time()]
        store._clock = lambda: now[0]
        async with used(store, journal=tmp_path / "j", on_store_down=QUEUE) as metering:
            once = metered(metering, billable(1, sources=sources))
            shared = metered(metering, billable(2, sources=sources, charge_key=lambda: "s"))
            store.down = True
            for app in (once, shared, shared):
                assert status((await call(app, "bob")).log) == 200
            now[0] += days * 86_400
            await back(metering, store)
            balance = await metering.balance("bob")
            assert (balance.settled, balance.debt) == (0, 0)
            assert await _spent_by_allowance(store) == 3 * CREDIT

    asyncio.run(play())


async def _spent_by_allowance(store: Gated) -> int:
    return sum(window.settled for window in (await store.read(EverythingKept())).state.allowances.values())


@pytest.mark.parametrize("granted", [0, 2])
def test_charge_queued_calls_of_a_key_once(granted: int, tmp_path: Path) -> None:
    """S0.10: calls that share a key are one charge, also where nobody can pay it and it becomes debt."""

    async def play() -> None:
        store = Gated()
        async with used(store, journal=tmp_path / "j", on_store_down=QUEUE) as metering:
            await metering.grant("bob", granted or 1, id="b")
            app = metered(metering, billable(2, charge_key=lambda: "session"))
            store.down = True
            for _ in range(3):
                assert status((await call(app, "bob")).log) == 200
            await back(metering, store)
            assert await settled(metering, "bob") == (2 * CREDIT, 0)

    asyncio.run(play())


@pytest.mark.parametrize("is_full", [False, True])
def test_keep_nothing_of_a_queued_call_that_failed(is_full: bool, tmp_path: Path) -> None:
    """A queued call that charges nothing is told of, and is not charged later by the policy for processes that died.

    Also where the store is back before its end, and where the journal takes nothing more.
    """
    told: list[Any] = []
    begun, leave = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        begun.set()
        await leave.wait()
        raise LookupError("gone")

    async def play() -> None:
        store = Gated()
        sinks = [CallbackSink(told.extend)]
        async with used(store, journal=tmp_path / "j", on_store_down=QUEUE, sinks=sinks) as metering:
            store.down = True
            running = asyncio.create_task(call(metered(metering, billable(2, on_abort="hold"), work=work)))
            await begun.wait()
            assert metering.journal is not None
            # And what the store may hold for it all the same is given back.
            assert await metering.journal.counts() == (2, 0)
            if is_full:
                metering.journal._max_entries = 0
            store.down = False
            leave.set()
            assert (await running).outcome == "raised"
            await until(lambda: is_empty(metering))
            await until(lambda: _told(told))
            assert await settled(metering) == (0, 0)

    asyncio.run(play())


def test_charge_a_queued_call_by_more_than_its_first_slice(tmp_path: Path) -> None:
    """Without reported usage a call whose hold would have grown is charged by what was observed, as any other."""
    head = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send(head)
        await send({"type": "http.response.body", "body": delta(" word" * 20), "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def play() -> None:
        store = Gated()
        async with used(store, journal=tmp_path / "j", on_store_down=QUEUE) as metering:
            store.down = True
            price = per_token(input=0, output=1)
            part = billable(price, hold=slices(TokenUsage(output=3)))
            assert status((await call(MeteringMiddleware(metered_app(app, part), metering=metering))).log) == 200
            await back(metering, store)
            assert await settled(metering) == (20 * CREDIT, 0)

    asyncio.run(play())


def test_leave_nothing_of_a_caller_that_left(tmp_path: Path) -> None:
    """Whoever leaves while its charge is written is not charged for work that never began; its local slot is free."""

    async def play() -> None:
        store = Gated()
        down = {"credits": "queue", "rates": "local"}
        async with used(store, journal=tmp_path / "j", on_store_down=down) as metering:
            journal = metering.journal
            assert journal is not None
            store.down = True
            app = metered(metering, billable(2, on_abort="hold"), rate_limited("9/day", concurrency=1))
            disk, waits = threading.Event(), threading.Event()

            def stall(_: Any) -> None:
                waits.set()
                disk.wait(10)

            slow = asyncio.create_task(journal._in_thread(stall))
            await asyncio.to_thread(waits.wait, 10)
            leaving = asyncio.create_task(call(app))
            await until(lambda: _is_local(metering))
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
            disk.set()
            await slow
            # Nothing but what the store may hold for it all the same.
            await until(lambda: _has_entries(metering, 1))
            assert status((await call(app)).log) == 200
            await back(metering, store)
            assert await settled(metering) == (2 * CREDIT, 0)

    asyncio.run(play())


async def _is_local(metering: Metering) -> bool:
    return bool(metering.local._store._state.leases)


async def _is_alarmed(metering: Metering) -> bool:
    return "replay" in metering.alarms._told


@pytest.mark.parametrize(("policy", "charged"), [("hold", 2), ("observed", 0)])
def test_end_a_queued_call_whose_process_died(
    policy: Literal["hold", "observed"], charged: int, tmp_path: Path
) -> None:
    """A call that began while the store was down, and whose process did not see its end, is ended by its policy."""
    begun, never = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        begun.set()
        await never.wait()

    async def play() -> None:
        store = Gated()
        async with used(store, journal=tmp_path / "j", on_store_down=QUEUE, max_call_s=0.3) as metering:
            store.down = True
            metering.runtime().finish = lambda call: None  # type: ignore[method-assign]
            async with Drive(metered(metering, billable(2, on_abort=policy), work=work), http_scope("/")):
                await begun.wait()
                entries = 2 if policy == "hold" else 1
                await until(lambda: _has_entries(metering, entries))
                assert metering.journal is not None
                assert len(await metering.journal.due(9)) == entries - 1
            await back(metering, store)
            assert await settled(metering) == (charged * CREDIT, 0)

    asyncio.run(play())


async def _has_entries(metering: Metering, number: int) -> bool:
    assert metering.journal is not None
    return await metering.journal.counts() == (number, 0)


def test_queue_no_charge_that_cannot_be_kept(tmp_path: Path) -> None:
    """Where the journal is full, or a key says that the request may have run before, the call is refused with 503.

    Its slots are free again.
    """

    async def play() -> None:
        store = Gated()
        down = {"credits": "queue", "rates": "local"}
        async with used(store, journal=tmp_path / "j", on_store_down=down) as metering:
            assert metering.journal is not None
            metering.journal._max_entries = 1
            app = metered(metering, billable(2), rate_limited("9/day", concurrency=1))
            store.down = True
            # Ends of calls without an answer may wait there too, so that the first one may be refused as well.
            await metering.journal.keep({"other": (End("other", 1),)})
            for _ in range(2):
                ended = await call(app)
                assert (status(ended.log), json.loads(body(ended.log))["code"]) == (503, "store_unavailable")
            metering.journal._max_entries = 10
            assert status((await call(app)).log) == 200
            keyed = metered(metering, billable(2, idempotency=Idempotency()))
            assert status((await call(keyed, idempotency_key='"k"')).log) == 503
            assert status((await call(keyed)).log) == 200

    asyncio.run(play())


def test_queue_charges_outside_http(tmp_path: Path) -> None:
    """`metering.charge()` runs and is charged later as well; with "deny" it is refused, and its block does not run."""

    async def play() -> None:
        store = Gated()
        async with used(store, journal=tmp_path / "j") as metering:
            store.down = True
            async with metering.charge(payer="ann", line="job", price=3, on_store_down="queue"):
                pass
            with pytest.raises(CallRefused, match="store_unavailable"):
                async with metering.charge(payer="ann", line="job", price=3):
                    raise AssertionError("It ran.")
            await back(metering, store)
            assert await settled(metering) == (3 * CREDIT, 0)

    asyncio.run(play())


def test_give_a_queued_call_up_whose_request_is_over(tmp_path: Path) -> None:
    """Pitfall 1: code that outlives its request is not let in by the journal either, and nothing is charged for it."""
    late: list[asyncio.Task[Any]] = []

    async def play() -> None:
        store = Gated()
        async with used(store, journal=tmp_path / "j", on_store_down=QUEUE) as metering:
            store.silent = True

            async def work() -> None:
                late.append(asyncio.create_task(current_call().admit(billable(2))))
                await asyncio.sleep(0)

            assert status((await call(metered(metering, work=work))).log) == 200
            (failure,) = await asyncio.gather(*late, return_exceptions=True)
            assert type(failure).__name__ == "CallClosedError"
            store.silent = False
            store.let.set()
            await until(lambda: is_empty(metering))
            assert await settled(metering) == (0, 0)

    asyncio.run(play())

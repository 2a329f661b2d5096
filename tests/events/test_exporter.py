"""One pass of the exporter: what is claimed, who gets it, and when it leaves the outbox."""

from __future__ import annotations

import asyncio
import contextvars
from typing import Any

import pytest

from asgi_metering.decisions import Decision
from asgi_metering.errors import StoreUnavailableError
from asgi_metering.events import conventions
from asgi_metering.events.exporter import Exporter
from asgi_metering.events.metrics import Meters
from asgi_metering.events.outbox import Dropped, read_events
from asgi_metering.receipts import Basis
from asgi_metering.rules.operations import Admit, Claim, Emit, End, PostGrant, Sweep, WalletSource
from asgi_metering.rules.state import Event
from tests.events.support import Hanging, Outbox, Recorder, make_event, make_events


def test_deliver_an_event_and_acknowledge_it_when_every_sink_took_it() -> None:
    """Both sinks get the event as it was written, and it leaves the outbox."""

    async def main() -> None:
        outbox, one, two = Outbox(), Recorder("one"), Recorder("two")
        event = make_event()
        await outbox.put([event])
        assert await outbox.exporter([one, two]).run_once() == 1
        assert one.taken == two.taken == [event]
        assert await outbox.ids() == []

    asyncio.run(main())


def test_deliver_in_batches_of_the_size_asked_for_oldest_first() -> None:
    """One pass claims one batch, in the order in which the events were written."""

    async def main() -> None:
        outbox, sink = Outbox(), Recorder()
        await outbox.put(make_events(5))
        exporter = outbox.exporter([sink], batch=2)
        assert [await exporter.run_once() for _ in range(4)] == [2, 2, 1, 0]
        assert sink.offers == [["call-1", "call-2"], ["call-3", "call-4"], ["call-5"]]

    asyncio.run(main())


def test_keep_events_in_the_outbox_without_sinks() -> None:
    """Without a sink nothing is claimed, so another process's sinks still get everything."""

    async def main() -> None:
        outbox = Outbox()
        await outbox.put([make_event()])
        exporter = outbox.exporter([])
        assert await exporter.run_once() == 0
        assert await exporter.drain(1.0) == 1
        assert await outbox.ids() == ["call-1"]

    asyncio.run(main())


def test_deliver_nothing_to_a_sink_that_nobody_reads() -> None:
    """A disabled sink counts as having everything, and the others still get it (S2.4)."""

    async def main() -> None:
        outbox, off, on = Outbox(), Recorder("off"), Recorder("on")
        off.enabled = False  # type: ignore[attr-defined]
        await outbox.put(make_events(2))
        exporter = outbox.exporter([off, on])
        assert await exporter.run_once() == 2
        assert (off.offers, on.ids, exporter.listening) == ([], ["call-1", "call-2"], True)

    asyncio.run(main())


def test_forget_events_unread_while_no_sink_is_enabled() -> None:
    """Where nobody would see an event, none is even read, and the outbox does not grow; that may change any time."""

    async def main() -> None:
        outbox, sink, dropped = Outbox(), Recorder(), []
        sink.enabled = False  # type: ignore[attr-defined]
        exporter = outbox.exporter([sink], on_drop=dropped.append)
        assert exporter.listening
        await outbox.pump.submit(Emit((("unreadable", {}),)))
        assert await exporter.run_once() == 1
        assert (sink.offers, dropped, exporter.listening) == ([], [], False)
        sink.enabled = True  # type: ignore[attr-defined]
        await outbox.put([make_event()])
        assert await exporter.run_once() == 1
        assert (sink.ids, exporter.listening) == (["call-1"], True)

    asyncio.run(main())


def test_deliver_to_the_others_while_one_sink_fails() -> None:
    """A failing sink keeps the event in the outbox, and the others get it once (S2.5)."""

    async def main() -> None:
        outbox, good, bad = Outbox(), Recorder("good"), Recorder("bad", refuse=lambda _: True)
        await outbox.put(make_events(2))
        exporter = outbox.exporter([good, bad])
        assert await exporter.run_once() == 0
        outbox.clock.advance(2.0)
        await exporter.run_once()
        assert good.ids == ["call-1", "call-2"]
        assert bad.ids == []
        assert await outbox.ids() == ["call-1", "call-2"]

    asyncio.run(main())


def test_deliver_again_with_the_same_ids_when_the_sink_recovers() -> None:
    """What a sink refused comes again after its backoff, with the same ids, and only to that sink."""

    async def main() -> None:
        outbox, good, bad = Outbox(), Recorder("good"), Recorder("bad", refuse=lambda _: True)
        await outbox.put(make_events(3))
        exporter = outbox.exporter([good, bad])
        await exporter.run_once()
        bad.refuse = None
        outbox.clock.advance(1.0)
        assert await exporter.run_once() == 3
        assert sorted(bad.ids) == good.ids == ["call-1", "call-2", "call-3"]
        assert await outbox.ids() == []

    asyncio.run(main())


def test_deliver_again_after_the_lease_when_the_process_was_killed() -> None:
    """Another exporter gets what a dead one had claimed, once the lease is over, and not before."""

    async def main() -> None:
        outbox, dead, heir = Outbox(), Recorder(refuse=lambda _: True), Recorder()
        await outbox.put([make_event()])
        await outbox.exporter([dead], lease_s=30.0).run_once()
        exporter = outbox.exporter([heir])
        assert await exporter.run_once() == 0
        outbox.clock.advance(30.0)
        assert await exporter.run_once() == 1
        assert heir.ids == ["call-1"]

    asyncio.run(main())


def test_remember_who_took_an_event_over_the_end_of_its_lease() -> None:
    """An event that is claimed again because one sink fails is not given again to the sink that took it."""

    async def main() -> None:
        outbox, good, bad = Outbox(), Recorder("good"), Recorder("bad", refuse=lambda _: True)
        await outbox.put([make_event()])
        exporter = outbox.exporter([good, bad], lease_s=30.0)
        for _ in range(20):
            await exporter.run_once()
            outbox.clock.advance(31.0)
        assert good.ids == ["call-1"]
        bad.refuse = None
        outbox.clock.advance(400.0)
        assert await exporter.run_once() == 1
        assert good.ids == bad.ids == ["call-1"]

    asyncio.run(main())


def test_claim_a_failing_sinks_backlog_once_per_backoff() -> None:
    """The lease grows with the backoff, so that a dead sink does not have its backlog rewritten all the time."""

    async def main() -> None:
        outbox, good, bad = Outbox(), Recorder("good"), Recorder("bad", refuse=lambda _: True)
        exporter = outbox.exporter([good, bad], lease_s=30.0)
        await outbox.put(make_events(1))
        for _ in range(12):
            await exporter.run_once()
            outbox.clock.advance(60.0)
        outbox.seen.clear()
        await outbox.put(make_events(1, start=2))
        await exporter.run_once()
        claims = [operation for operation in outbox.seen if isinstance(operation, Claim)]
        assert len(claims) == 1
        assert claims[0].lease_s > 100.0
        assert good.ids == ["call-1", "call-2"]

    asyncio.run(main())


def test_claim_nothing_while_every_sink_backs_off() -> None:
    """With no sink to ask, the store is not asked either."""

    async def main() -> None:
        outbox, bad = Outbox(), Recorder(refuse=lambda _: True)
        await outbox.put([make_event()])
        exporter = outbox.exporter([bad])
        await exporter.run_once()
        outbox.seen.clear()
        assert await exporter.run_once() == 0
        assert outbox.seen == []

    asyncio.run(main())


def test_drop_an_undecodable_event_with_an_alarm_and_deliver_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    """What cannot be read is logged, counted, handed to on_drop and acknowledged; its neighbours arrive (S2.7)."""

    async def main() -> None:
        outbox, sink, meters, dropped = Outbox(), Recorder(), Meters(), []
        await outbox.pump.submit(Emit((("broken", {"line": "chat", "amount": "many"}),)))
        await outbox.put([make_event()])
        exporter = outbox.exporter([sink], meters=meters, on_drop=dropped.append)
        assert await exporter.run_once() == 2
        assert sink.ids == ["call-1"]
        assert dropped == [Dropped("broken", {"line": "chat", "amount": "many"}, "undecodable")]
        assert meters.totals("events_dropped") == {((conventions.CAUSE, "undecodable"), (conventions.SINK, "all")): 1}
        assert await outbox.ids() == []

    asyncio.run(main())
    assert "'broken' cannot be read" in caplog.text


def test_find_the_events_that_nobody_can_read_among_many() -> None:
    """Those that cannot be read are told apart from their batch, whose others come in their order (S2.7)."""
    rows = [Event(f"call-{number}", 0.0, make_event(number).to_dict()) for number in range(9)]
    rows[2], rows[7] = Event("call-2", 0.0, {"amount": "many"}), Event("call-7", 0.0, {"usage": {"input": -1}})
    events, unreadable = read_events(rows)
    assert [event.id for event in events] == [f"call-{number}" for number in (0, 1, 3, 4, 5, 6, 8)]
    assert [row.id for row, _ in unreadable] == ["call-2", "call-7"]


@pytest.mark.parametrize("payload", [None, [], {"attributes": 3, "event_of": "c1"}], ids=repr)
def test_drop_a_payload_of_any_shape(payload: Any) -> None:
    """No payload, whatever a store gives back, stops the queue."""

    async def main() -> None:
        outbox, sink = Outbox(), Recorder()
        await outbox.pump.submit(Emit((("broken", payload),)))
        await outbox.put([make_event()])
        assert await outbox.exporter([sink]).run_once() == 2
        assert sink.ids == ["call-1"]

    asyncio.run(main())


def test_await_an_async_on_drop_and_survive_a_failing_one(caplog: pytest.LogCaptureFixture) -> None:
    """on_drop may be async, may fail and may hang: the exporter goes on."""

    async def main() -> None:
        outbox, heard = Outbox(), []

        async def on_drop(dropped: Dropped) -> None:
            heard.append(dropped.id)
            if dropped.id == "a":
                raise ValueError("no pager")
            if dropped.id == "b":
                await asyncio.Event().wait()

        await outbox.pump.submit(Emit((("a", {}), ("b", {}), ("c", {}))))
        exporter = outbox.exporter([Recorder()], on_drop=on_drop, timeout_s=0.02)
        assert await exporter.run_once() == 3
        assert heard == ["a", "b", "c"]

    asyncio.run(main())
    assert "on_event_dropped failed for the usage event 'a'" in caplog.text


def test_charge_a_late_end_by_its_difference_alone() -> None:
    """The event of a late settlement tells the difference and names the call that it corrects, so sums are right."""

    async def main() -> None:
        outbox, sink = Outbox(), Recorder()
        run = outbox.pump.submit
        await run(PostGrant("grant", "org_7", "credits", 1_000))
        facts = {"started_at": 1_000.0, "outcome": "completed"}
        ask = Admit(
            "c1", "org_7", "credits", 100, 100, (WalletSource(),), in_doubt=Basis.HOLD, line="chat", facts=facts
        )
        decision = await run(ask)
        assert isinstance(decision, Decision)
        assert decision.admitted
        outbox.clock.advance(600.0)
        await run(Sweep())
        await run(End("c1", 30, Basis.USAGE, event={"outcome": "completed"}))
        assert await outbox.exporter([sink]).run_once() == 2
        first, late = sink.taken
        assert (first.amount, first.outcome) == (100, "aborted")
        assert (late.id, late.amount, late.held) == ("c1:late", -70, 0)
        assert late.attributes[conventions.CORRECTS] == "c1"

    asyncio.run(main())


def test_go_on_alone_with_a_slow_sink_and_serve_the_others() -> None:
    """A sink that hangs is passed over after the patience; the others get batch after batch."""

    async def main() -> None:
        outbox, slow, quick = Outbox(), Hanging(), Recorder()
        exporter = outbox.exporter([slow, quick], batch=2)
        await outbox.put(make_events(4))
        assert await exporter.run_once(patience_s=0.01) == 0
        assert await exporter.run_once(patience_s=0.01) == 0
        assert quick.ids == ["call-1", "call-2", "call-3", "call-4"]
        slow.gate.set()
        await exporter.drain(5.0)
        assert sorted(slow.ids) == quick.ids
        assert await outbox.ids() == []

    asyncio.run(main())


def test_stop_a_delivery_after_its_timeout(caplog: pytest.LogCaptureFixture) -> None:
    """A sink that hangs counts as down after the timeout, and gets the event again later (S3.35)."""

    async def main() -> None:
        outbox, slow = Outbox(), Hanging()
        exporter = outbox.exporter([slow], timeout_s=0.02)
        await outbox.put([make_event()])
        assert await exporter.run_once() == 0
        slow.gate.set()
        outbox.clock.advance(1.0)
        assert await exporter.run_once() == 1
        assert slow.ids == ["call-1"]

    asyncio.run(main())
    assert "within 0.02 s" in caplog.text


def test_acknowledge_again_when_the_store_did_not_answer() -> None:
    """Events that were delivered while the store went down are acknowledged later, and not delivered twice."""

    async def main() -> None:
        outbox = Outbox()

        def break_store(_: object) -> None:
            outbox.broken = StoreUnavailableError("gone")

        sink = Recorder(refuse=break_store)
        await outbox.put([make_event()])
        exporter = outbox.exporter([sink])
        with pytest.raises(StoreUnavailableError):
            await exporter.run_once()
        outbox.broken = sink.refuse = None
        assert await exporter.run_once() == 1
        assert sink.ids == ["call-1"]
        assert await outbox.ids() == []

    asyncio.run(main())


def test_raise_unavailable_when_the_store_hangs() -> None:
    """A store that never answers ends a pass after the timeout, as a store that cannot be reached."""

    async def main() -> None:
        async def never(_: object) -> Any:
            await asyncio.Event().wait()

        exporter = Exporter(never, [Recorder()], timeout_s=0.02)
        with pytest.raises(StoreUnavailableError, match="did not answer Claim"):
            await exporter.run_once()

    asyncio.run(main())


def test_acknowledge_once_when_the_store_answered() -> None:
    """What was acknowledged is forgotten here too."""

    async def main() -> None:
        outbox = Outbox()
        await outbox.put([make_event()])
        exporter = outbox.exporter([Recorder()])
        await exporter.run_once()
        outbox.seen.clear()
        await exporter.run_once()
        assert [type(operation) for operation in outbox.seen] == [Claim]

    asyncio.run(main())


def test_pass_on_a_timeout_that_the_store_raised_itself() -> None:
    """A TimeoutError of the store's own stays what it is."""

    async def main() -> None:
        async def refuse(_: object) -> Any:
            raise TimeoutError("own")

        with pytest.raises(TimeoutError, match="own"):
            await Exporter(refuse, [Recorder()]).run_once()

    asyncio.run(main())


def test_lose_nothing_when_a_pass_is_cancelled() -> None:
    """Cancelling a pass in the middle of a delivery neither loses nor repeats it: the next pass acknowledges."""

    async def main() -> None:
        outbox, slow = Outbox(), Hanging()
        await outbox.put([make_event()])
        exporter = outbox.exporter([slow])
        one_pass = asyncio.create_task(exporter.run_once())
        await slow.asked.wait()
        one_pass.cancel()
        await asyncio.wait([one_pass])
        assert one_pass.cancelled()
        slow.gate.set()
        assert await exporter.drain(5.0) == 0
        assert slow.ids == ["call-1"]
        assert await outbox.ids() == []

    asyncio.run(main())


def test_deliver_once_when_two_passes_overlap() -> None:
    """A pass of a shutdown beside one of the worker gives no sink two deliveries at a time, and nothing twice."""

    async def main() -> None:
        outbox, running, most = Outbox(), [], []

        class Single(Recorder):
            async def deliver(self, events: Any) -> None:
                running.append(events)
                most.append(len(running))
                await asyncio.sleep(0)
                running.remove(events)
                await super().deliver(events)

        async def submit(operation: Any) -> Any:
            await asyncio.sleep(0)
            return await outbox.submit(operation)

        sink = Single()
        await outbox.put(make_events(4))
        exporter = Exporter(submit, [sink], batch=2, clock=outbox.clock)
        await asyncio.gather(*(exporter.run_once() for _ in range(4)))
        assert await exporter.drain(5.0) == 0
        assert sorted(sink.ids) == ["call-1", "call-2", "call-3", "call-4"]
        assert set(most) == {1}

    asyncio.run(main())


def test_keep_an_event_whose_delivery_was_cancelled() -> None:
    """close() ends a delivery that hangs, and its event stays in the outbox for the next process."""

    async def main() -> None:
        outbox, slow = Outbox(), Hanging()
        await outbox.put([make_event()])
        exporter = outbox.exporter([slow])
        await exporter.run_once(patience_s=0.01)
        await exporter.close()
        assert [task for task in asyncio.all_tasks() if "sink" in task.get_name()] == []
        assert await outbox.ids() == ["call-1"]

    asyncio.run(main())


def test_show_a_sink_no_variable_of_a_request() -> None:
    """A sink runs in an empty context, also if a request's task happened to run the pass."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="empty")

    async def main() -> None:
        outbox, seen = Outbox(), []
        await outbox.put([make_event()])
        variable.set("a request's")
        await outbox.exporter([Recorder(refuse=lambda _: seen.append(variable.get()))]).run_once()
        assert seen == ["empty"]

    asyncio.run(main())

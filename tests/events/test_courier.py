"""Couriers: isolation of a bad event, backoff of a bad sink, and giving up loudly."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from asgi_metering.events import courier as couriers
from asgi_metering.events.courier import MAX_BACKOFF_S, Courier
from asgi_metering.events.metrics import Meters
from asgi_metering.events.sinks import Sink
from asgi_metering.usage.event import UsageEvent
from tests.events.support import Clock, Hanging, Outbox, Recorder, make_event, make_events


class Desk:
    """One courier with what it reports."""

    def __init__(
        self, sink: Sink, *, most: int = 500, max_rejections: int | None = 50, timeout_s: float = 10.0
    ) -> None:
        self.clock = Clock()
        self.meters = Meters()
        self.taken: list[str] = []
        self.given_up: list[str] = []
        self.courier = Courier(
            sink,
            1,
            most=most,
            timeout_s=timeout_s,
            max_rejections=max_rejections,
            clock=self.clock,
            meters=self.meters,
            took=lambda _, events: self.taken.extend(event.id for event in events),
            gave_up=lambda _, event: self.given_up.append(event.id),
        )

    @property
    def backoff_s(self) -> float:
        """Seconds until the sink is asked again."""
        return self.courier.not_before - self.clock.now


def refuse_ids(*bad: str) -> Any:
    """Refuse every batch with one of these events in it."""
    return lambda events: any(event.id in bad for event in events)


def test_deliver_in_pieces_of_the_batch_size() -> None:
    """More events than one delivery may have come in several."""

    async def main() -> None:
        sink = Recorder()
        desk = Desk(sink, most=2)
        await desk.courier.turn(make_events(5))
        assert [len(offer) for offer in sink.offers] == [2, 2, 1]
        assert desk.taken == sink.ids
        assert desk.backoff_s < 0

    asyncio.run(main())


@pytest.mark.parametrize("bad", [1, 2, 57, 99, 100])
def test_deliver_every_other_event_around_a_bad_one(bad: int) -> None:
    """One event that the sink rejects keeps none of the others back, and costs a few deliveries."""

    async def main() -> None:
        sink = Recorder(refuse=refuse_ids(f"call-{bad}"))
        desk = Desk(sink)
        await desk.courier.turn(make_events(100))
        assert sorted(desk.taken) == sorted(f"call-{number}" for number in range(1, 101) if number != bad)
        assert len(sink.offers) < 40
        assert desk.backoff_s == 1.0

    asyncio.run(main())


def test_offer_a_rejected_event_alone_and_last() -> None:
    """After a rejection the event goes after all others and alone, and not before its time."""

    async def main() -> None:
        sink = Recorder(refuse=refuse_ids("call-1"))
        desk = Desk(sink)
        await desk.courier.turn(make_events(3))
        desk.clock.advance(0.5)
        sink.offers.clear()
        await desk.courier.turn([make_event(1), make_event(4), make_event(5)])
        assert all("call-1" not in offer for offer in sink.offers)
        desk.clock.advance(1.0)
        sink.offers.clear()
        sink.refuse = None
        await desk.courier.turn([make_event(1), make_event(6), make_event(7)])
        assert sink.offers == [["call-6", "call-7"], ["call-1"]]
        sink.offers.clear()
        await desk.courier.turn([make_event(1), make_event(8)])
        assert sink.offers == [["call-1", "call-8"]]

    asyncio.run(main())


def test_give_up_an_event_after_its_rejections() -> None:
    """An event that is rejected again and again while others pass is given up, and its rejections are forgotten."""

    async def main() -> None:
        sink = Recorder(refuse=refuse_ids("bad"))
        desk = Desk(sink, max_rejections=3)
        for number in range(3):
            assert desk.given_up == []
            await desk.courier.turn([make_event(id="bad"), make_event(number)])
            desk.clock.advance(1_000.0)
        assert desk.given_up == ["bad"]
        assert "bad" not in desk.taken

    asyncio.run(main())


def test_never_give_up_where_told() -> None:
    """Without a bound a rejected event is offered for ever."""

    async def main() -> None:
        desk = Desk(Recorder(refuse=refuse_ids("bad")), max_rejections=None)
        for number in range(60):
            await desk.courier.turn([make_event(id="bad"), make_event(number)])
            desk.clock.advance(1_000.0)
        assert desk.given_up == []

    asyncio.run(main())


def test_not_blame_an_event_while_the_sink_is_down() -> None:
    """Refusals of a sink that takes nothing count against the sink alone, however often they come."""

    async def main() -> None:
        sink = Recorder(refuse=lambda _: True)
        desk = Desk(sink, max_rejections=1)
        for _ in range(20):
            await desk.courier.turn(make_events(3))
            desk.clock.advance(MAX_BACKOFF_S)
        assert desk.given_up == []
        sink.refuse = None
        await desk.courier.turn(make_events(3))
        assert sorted(desk.taken) == ["call-1", "call-2", "call-3"]

    asyncio.run(main())


def test_ask_a_dead_sink_three_times_a_turn_at_most() -> None:
    """The batch, one event alone, another one alone: then the sink counts as down, and is left alone for longer."""

    async def main() -> None:
        sink = Recorder(refuse=lambda _: True)
        desk = Desk(sink)
        pauses = []
        for _ in range(11):
            sink.offers.clear()
            await desk.courier.turn(make_events(100))
            assert len(sink.offers) <= 3
            pauses.append(desk.backoff_s)
            desk.clock.advance(desk.backoff_s)
        assert pauses == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]
        sink.refuse = None
        await desk.courier.turn(make_events(1))
        sink.refuse = lambda _: True
        await desk.courier.turn(make_events(1))
        assert desk.backoff_s == 1.0

    asyncio.run(main())


def test_end_the_turn_at_the_first_timeout() -> None:
    """A sink that hangs is not asked again within the turn."""

    async def main() -> None:
        sink = Hanging()
        desk = Desk(sink, timeout_s=0.01)
        await desk.courier.turn(make_events(3))
        sink.gate.set()
        await desk.courier.turn(make_events(3))
        assert sink.offers == [["call-1"], ["call-2", "call-3"]]
        assert sorted(desk.taken) == ["call-1", "call-2", "call-3"]

    asyncio.run(main())


def test_end_the_turn_when_its_time_is_over() -> None:
    """A slow sink that takes piece after piece does not keep its events longer than the timeout allows."""

    async def main() -> None:
        sink = Recorder()
        desk = Desk(sink, most=1, timeout_s=10.0)
        sink.refuse = lambda _: desk.clock.advance(4.0)
        await desk.courier.turn(make_events(9))
        assert sink.ids == ["call-1", "call-2", "call-3"]

    asyncio.run(main())


def test_end_the_turn_after_many_refusals() -> None:
    """A sink that rejects half of everything is not asked without end."""

    async def main() -> None:
        sink = Recorder(refuse=lambda events: any(int(event.id[5:]) % 2 for event in events))
        desk = Desk(sink)
        await desk.courier.turn(make_events(500))
        assert 0 < len(sink.offers) <= 2 * couriers.MAX_FAILURES + 1
        assert desk.taken

    asyncio.run(main())


def test_survive_a_sink_that_cancels_itself() -> None:
    """A CancelledError that nobody asked for is a refusal like any other."""

    class Suicidal(Recorder):
        async def deliver(self, events: Sequence[UsageEvent]) -> None:
            raise asyncio.CancelledError

    async def main() -> None:
        desk = Desk(Suicidal())
        await desk.courier.turn([make_event()])
        assert desk.backoff_s == 1.0

    asyncio.run(main())


def test_raise_a_cancellation_from_outside() -> None:
    """Cancelling the turn ends it, and nothing counts as taken."""

    async def main() -> None:
        sink = Hanging()
        desk = Desk(sink)
        turn = asyncio.create_task(desk.courier.turn([make_event()]))
        await sink.asked.wait()
        turn.cancel()
        with pytest.raises(asyncio.CancelledError):
            await turn
        assert desk.taken == []

    asyncio.run(main())


def test_count_deliveries_and_failures_by_sink() -> None:
    """What a sink took and how often it refused can be counted, under its name."""

    async def main() -> None:
        desk = Desk(Recorder("billing", refuse=refuse_ids("call-1")))
        await desk.courier.turn(make_events(2))
        assert desk.meters.totals("events_delivered") == {(("metering.sink", "billing"),): 1}
        assert desk.meters.totals("deliveries_failed") == {(("metering.sink", "billing"),): 2}

    asyncio.run(main())


def test_bound_the_memory_of_rejections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bound a rejection is not remembered; the event is offered like any other."""
    monkeypatch.setattr(couriers, "MAX_TROUBLED", 1)

    async def main() -> None:
        sink = Recorder(refuse=refuse_ids("call-1", "call-3"))
        desk = Desk(sink, max_rejections=2)
        await desk.courier.turn(make_events(4))
        desk.clock.advance(1.0)
        sink.offers.clear()
        await desk.courier.turn([make_event(1), make_event(3), make_event(5)])
        assert sink.offers[0][0] == "call-3"
        assert desk.given_up == ["call-1"]

    asyncio.run(main())


def test_report_a_rejected_event_as_dropped(caplog: pytest.LogCaptureFixture) -> None:
    """What one sink rejected for good leaves the outbox when the others have it, loudly (S2.7)."""

    async def main() -> None:
        outbox, dropped = Outbox(), []
        good, picky = Recorder("good"), Recorder("picky", refuse=refuse_ids("call-1"))
        await outbox.put(make_events(2))
        meters = Meters()
        exporter = outbox.exporter([good, picky], on_drop=dropped.append, max_rejections=1, meters=meters)
        assert await exporter.run_once() == 2
        assert meters.totals("events_dropped") == {(("metering.cause", "rejected"), ("metering.sink", "picky")): 1}
        assert [(lost.id, lost.cause, lost.sink) for lost in dropped] == [("call-1", "rejected", "picky")]
        assert UsageEvent.from_dict(dropped[0].payload) == make_event(1)
        assert sorted(good.ids) == ["call-1", "call-2"]
        assert await outbox.ids() == []

    asyncio.run(main())
    assert "'picky' rejected the usage event 'call-1'" in caplog.text


def test_log_a_courier_that_fails_itself(caplog: pytest.LogCaptureFixture) -> None:
    """A defect in a turn is logged, and the events stay."""

    async def main() -> None:
        outbox = Outbox()
        await outbox.put([make_event()])
        exporter = outbox.exporter([Recorder()])

        async def broken(_: Sequence[UsageEvent]) -> None:
            raise ArithmeticError("defect")

        exporter._couriers[0].turn = broken  # type: ignore[method-assign]
        assert await exporter.run_once() == 0
        assert await outbox.ids() == ["call-1"]

    asyncio.run(main())
    assert "Delivering to sink 'recorder' failed" in caplog.text

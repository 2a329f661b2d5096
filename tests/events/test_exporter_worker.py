"""The exporter as a worker: when it wakes, what a shutdown waits for, and what it leaves behind."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from asgi_metering.errors import ConfigurationError, StoreUnavailableError
from asgi_metering.events import exporter as exporter_module
from asgi_metering.events.exporter import Exporter
from asgi_metering.events.metrics import Meters
from asgi_metering.rules.operations import Acknowledge, Claim
from tests.events.support import Hanging, Outbox, Recorder, make_event, make_events
from tests.harness.waiting import wait_until


def test_run_delivers_on_notify_and_ends_on_stop() -> None:
    """The worker delivers what was there, then what notify announces, and ends soon after stop."""

    async def main() -> None:
        outbox, sink, delivered = Outbox(), Recorder(), asyncio.Event()
        sink.refuse = lambda _: delivered.set()
        exporter, stop = outbox.exporter([sink], interval_s=3_600.0), asyncio.Event()
        await outbox.put([make_event(1)])
        worker = asyncio.create_task(exporter.run(stop))
        await delivered.wait()
        delivered.clear()
        await outbox.put([make_event(2)])
        exporter.notify()
        await delivered.wait()
        stop.set()
        await worker
        assert sink.ids == ["call-1", "call-2"]

    asyncio.run(main())


def test_run_looks_into_the_outbox_unasked() -> None:
    """Events that another process wrote are found by the timer."""

    async def main() -> None:
        outbox, sink, delivered = Outbox(), Recorder(), asyncio.Event()
        sink.refuse = lambda _: delivered.set()
        stop = asyncio.Event()
        worker = asyncio.create_task(outbox.exporter([sink], interval_s=0.01).run(stop))
        await asyncio.sleep(0)
        await outbox.put([make_event()])
        await delivered.wait()
        stop.set()
        await worker

    asyncio.run(main())


def test_run_takes_a_whole_backlog_without_waiting() -> None:
    """Full batches follow one another at once, up to the last."""

    async def main() -> None:
        outbox, sink, done = Outbox(), Recorder(), asyncio.Event()
        await outbox.put(make_events(10))
        sink.refuse = lambda events: done.set() if events[-1].id == "call-10" else None
        stop = asyncio.Event()
        worker = asyncio.create_task(outbox.exporter([sink], batch=3, interval_s=3_600.0).run(stop))
        await done.wait()
        stop.set()
        await worker
        assert len(sink.ids) == 10

    asyncio.run(main())


def test_run_waits_for_more_before_it_claims() -> None:
    """After a wake-up the worker lingers, so that what comes together leaves together; a shutdown ends the wait."""

    async def main() -> None:
        outbox, sink = Outbox(), Recorder()
        exporter = outbox.exporter([sink], interval_s=3_600.0, linger_s=3_600.0)
        worker = asyncio.create_task(exporter.run(asyncio.Event()))
        await asyncio.sleep(0)
        for number in range(5):
            await outbox.put([make_event(number)])
            exporter.notify()
            for _ in range(10):
                await asyncio.sleep(0)
        assert sink.offers == []
        assert await exporter.drain(20.0) == 0
        await worker
        assert len(sink.offers) == 1

    asyncio.run(main())


def test_drain_waits_for_what_the_worker_has_just_claimed() -> None:
    """A batch that the worker is claiming while the shutdown begins is delivered, not left to its lease."""

    async def main() -> None:
        outbox, sink, claiming, gate = Outbox(), Recorder(), asyncio.Event(), asyncio.Event()
        await outbox.put([make_event()])
        submit = outbox.submit

        async def slowly(operation: Any) -> Any:
            answer = await submit(operation)
            if isinstance(operation, Claim):
                claiming.set()
                await gate.wait()
            return answer

        exporter = Exporter(slowly, [sink], clock=outbox.clock, read=outbox.store.read)
        stop = asyncio.Event()
        worker = asyncio.create_task(exporter.run(stop))
        await claiming.wait()
        stop.set()
        drain = asyncio.create_task(exporter.drain(20.0))
        await asyncio.sleep(0)
        gate.set()
        assert await drain == 0
        await worker
        assert sink.ids == ["call-1"]

    asyncio.run(main())


def test_run_acknowledges_what_a_slow_sink_took_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a sink that was left alone is done, the worker wakes and acknowledges."""
    monkeypatch.setattr("asgi_metering.events.exporter.PATIENCE_S", 0.01)

    async def main() -> None:
        outbox, slow, stop = Outbox(), Hanging(), asyncio.Event()
        await outbox.put([make_event()])
        exporter = outbox.exporter([slow], interval_s=3_600.0)
        acknowledged = asyncio.Event()
        submit = outbox.pump.submit

        async def watch(operation: Any, deadline_s: float | None = None) -> Any:
            answer = await submit(operation, deadline_s)
            if isinstance(operation, Acknowledge):
                acknowledged.set()
            return answer

        outbox.pump.submit = watch  # type: ignore[method-assign]
        worker = asyncio.create_task(exporter.run(stop))
        await slow.asked.wait()
        await asyncio.to_thread(wait_until, lambda: exporter._alone)
        slow.gate.set()
        await acknowledged.wait()
        stop.set()
        await worker
        assert await outbox.ids() == []

    asyncio.run(main())


def test_run_survives_a_store_that_is_down(caplog: pytest.LogCaptureFixture) -> None:
    """A store that is down, or broken in any other way, is logged, and events flow when it is back."""

    async def main() -> None:
        outbox, sink, delivered, stop = Outbox(), Recorder(), asyncio.Event(), asyncio.Event()
        sink.refuse = lambda _: delivered.set()
        await outbox.put([make_event()])
        outbox.broken = StoreUnavailableError("the store is down")
        exporter = outbox.exporter([sink], interval_s=0.01)
        worker = asyncio.create_task(exporter.run(stop))
        await asyncio.to_thread(wait_until, lambda: "the store is down" in caplog.text)
        outbox.broken = RuntimeError("a bug")
        await asyncio.to_thread(wait_until, lambda: "could not be taken out" in caplog.text)
        outbox.broken = None
        await delivered.wait()
        stop.set()
        await worker
        assert sink.ids == ["call-1"]

    with caplog.at_level(logging.WARNING, "asgi_metering.events"):
        asyncio.run(main())


def test_run_measures_the_backlog() -> None:
    """The worker puts the outbox's size and age on the gauges."""

    async def main() -> None:
        outbox, meters, stop = Outbox(), Meters(), asyncio.Event()
        seen: dict[str, float] = {}
        meters.gauge = lambda name, value, **_: seen.update({name: value})  # type: ignore[method-assign]
        await outbox.put(make_events(3))
        outbox.clock.advance(7.0)
        refused = asyncio.Event()
        sink = Recorder(refuse=lambda _: refused.set() or True)
        worker = asyncio.create_task(outbox.exporter([sink], meters=meters).run(stop))
        await refused.wait()
        stop.set()
        await worker
        assert seen == {"outbox_backlog": 3, "outbox_lag": 7.0}

    asyncio.run(main())


def test_backlog_is_unknown_without_read() -> None:
    """Without a way to read rows there is no backlog to tell, and an empty outbox has no lag."""

    async def main() -> None:
        outbox = Outbox()
        assert await outbox.exporter([], read=None).backlog() is None
        assert await outbox.exporter([]).backlog() == (0, 0.0)

    asyncio.run(main())


def test_drain_delivers_everything_and_reports_nothing_left() -> None:
    """Several batches leave in one drain."""

    async def main() -> None:
        outbox, sink = Outbox(), Recorder()
        await outbox.put(make_events(7))
        assert await outbox.exporter([sink], batch=3).drain(5.0) == 0
        assert len(sink.ids) == 7

    asyncio.run(main())


def test_drain_reports_how_many_stay(caplog: pytest.LogCaptureFixture) -> None:
    """What a dead sink did not take is counted, logged, and stays in the outbox (S2.21)."""

    async def main() -> None:
        outbox, good, bad = Outbox(), Recorder("good"), Recorder("bad", refuse=lambda _: True)
        await outbox.put(make_events(4))
        assert await outbox.exporter([good, bad]).drain(0.05) == 4
        assert good.ids == ["call-1", "call-2", "call-3", "call-4"]
        assert await outbox.ids() == good.ids

    asyncio.run(main())
    assert "4 usage events stay in the outbox" in caplog.text


def test_drain_asks_a_sink_once_more_that_was_backing_off() -> None:
    """Shutdown does not wait for a backoff: a sink that recovered gets its events."""

    async def main() -> None:
        outbox, sink = Outbox(), Recorder(refuse=lambda _: True)
        await outbox.put(make_events(2))
        exporter = outbox.exporter([sink])
        await exporter.run_once()
        sink.refuse = None
        assert await exporter.drain(5.0) == 0
        assert sorted(sink.ids) == ["call-1", "call-2"]

    asyncio.run(main())


def test_drain_stops_a_hanging_sink_at_the_deadline() -> None:
    """A sink that hangs cannot hold the shutdown longer than it was given."""

    async def main() -> None:
        outbox, slow, quick = Outbox(), Hanging(), Recorder()
        await outbox.put([make_event()])
        exporter = outbox.exporter([slow, quick])
        assert await exporter.drain(0.05) == 1
        assert quick.ids == ["call-1"]
        assert [task for task in asyncio.all_tasks() if "sink" in task.get_name()] == []

    asyncio.run(main())


def test_drain_with_a_dead_store_reports_what_it_holds(caplog: pytest.LogCaptureFixture) -> None:
    """When the store is gone too, the drain ends at once and tells what it knows."""

    async def main() -> None:
        outbox, sink = Outbox(), Recorder(refuse=lambda _: True)
        await outbox.put(make_events(2))

        async def read(_: object) -> Any:
            raise StoreUnavailableError("gone")

        exporter = outbox.exporter([sink], read=read)
        await exporter.run_once()
        outbox.broken = StoreUnavailableError("gone")
        assert await exporter.drain(5.0) == 2

    asyncio.run(main())
    assert "could not be read" in caplog.text


def test_drain_without_read_reports_what_it_holds() -> None:
    """Without *read* the number is that of the events in hand."""

    async def main() -> None:
        outbox = Outbox()
        await outbox.put(make_events(3))
        assert await outbox.exporter([Recorder(refuse=lambda _: True)], read=None).drain(0.05) == 3

    asyncio.run(main())


class Passing(Recorder):
    """A sink that hands events on, and says when it is asked to send them."""

    def __init__(self, name: str = "passing") -> None:
        super().__init__(name)
        self.flushed: list[list[str]] = []

    async def flush(self) -> None:
        """Note what was taken until now."""
        self.flushed.append(self.ids)


class Failing(Passing):
    """One that cannot."""

    async def flush(self) -> None:
        """Fail."""
        raise ConnectionError("gone")


class Stuck(Passing):
    """One that never ends."""

    async def flush(self) -> None:
        """Wait for ever."""
        await asyncio.Event().wait()


class Blocking(Passing):
    """One whose method of that name is something else."""

    def flush(self) -> None:  # type: ignore[override]
        """Do what nobody asked for."""
        raise AssertionError


def test_drain_flushes_sinks_that_hand_events_on() -> None:
    """A shutdown has each sink send what it took, once, behind the last event; one that nobody reads is left alone."""
    sink, unread = Passing(), Passing("unread")
    unread.enabled = False  # type: ignore[attr-defined]

    async def main() -> None:
        outbox = Outbox()
        await outbox.put(make_events(3))
        assert await outbox.exporter([sink, Blocking("blocking"), unread, Recorder()], batch=2).drain(5.0) == 0

    asyncio.run(main())
    assert (sink.flushed, unread.flushed) == ([["call-1", "call-2", "call-3"]], [])


def test_drain_waits_for_no_sink_that_cannot_send(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One that fails or hangs costs the shutdown a bounded time, is told in the log, and keeps no other from it."""
    monkeypatch.setattr(exporter_module, "FLUSH_S", 0.01)
    sink = Passing()

    async def main() -> None:
        outbox = Outbox()
        await outbox.put(make_events(1))
        assert await outbox.exporter([Failing("failing"), Stuck("stuck"), sink]).drain(5.0) == 0

    asyncio.run(main())
    assert sink.flushed == [["call-1"]]
    assert "may have lost what it took last" in caplog.text
    assert "gone" in caplog.text


def test_refuse_two_sinks_of_one_name() -> None:
    """Names are how failures and drops are told apart, so they must differ."""
    with pytest.raises(ConfigurationError, match="Two sinks are named 'same'"):
        Outbox().exporter([Recorder("same"), Recorder("same")])


def test_refuse_a_name_that_no_metric_could_carry() -> None:
    """A sink's name is a metric attribute."""
    with pytest.raises(ConfigurationError, match="sink name"):
        Outbox().exporter([Recorder("a name")])


def test_refuse_a_lease_that_a_slow_delivery_would_outlive() -> None:
    """A lease shorter than three timeouts would have events delivered twice as a rule."""
    with pytest.raises(ConfigurationError, match="at least 30"):
        Outbox().exporter([Recorder()], lease_s=20.0)

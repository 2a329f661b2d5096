"""The promise of delivery, tried with sinks and stores that fail at random."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from asgi_metering.errors import StoreUnavailableError
from asgi_metering.events.exporter import REMEMBER_S, Exporter
from asgi_metering.rules.operations import Operation
from tests.events.support import Outbox, Recorder, make_events

VERDICTS = st.lists(st.booleans(), max_size=60)
"""For each delivery in turn whether it is refused."""


class Moody(Recorder):
    """Refuses as it was told in advance, then takes everything."""

    def __init__(self, name: str, refusals: list[bool]) -> None:
        moods = iter(refusals)
        super().__init__(name, refuse=lambda _: next(moods, False))


class FlakyStore(Outbox):
    """Loses the answer of some operations, after or before they happened."""

    def __init__(self, losses: list[str]) -> None:
        super().__init__()
        self.losses = iter(losses)

    async def submit(self, operation: Operation) -> Any:
        """Run one operation, or lose it or its answer."""
        loss = next(self.losses, "")
        if loss == "before":
            raise StoreUnavailableError("lost")
        answer = await self.pump.submit(operation)
        if loss == "after":
            raise StoreUnavailableError("lost")
        return answer


@given(
    count=st.integers(1, 30),
    batch=st.integers(1, 12),
    moods=st.lists(VERDICTS, min_size=1, max_size=3),
    losses=st.lists(st.sampled_from(["", "before", "after"]), max_size=30),
    steps=st.lists(st.sampled_from([0.5, 5.0, 61.0, 400.0]), min_size=1, max_size=12),
    restart_every=st.integers(2, 10),
)
@settings(max_examples=150, deadline=None)
def test_deliver_every_event_to_every_sink_at_least_once(
    count: int, batch: int, moods: list[list[bool]], losses: list[str], steps: list[float], restart_every: int
) -> None:
    """
    Whatever sinks refuse, answers get lost and processes die, every sink gets every event, by its own id, unchanged.

    Within one process that loses no answers no sink gets an event twice, as long as it is remembered.
    """

    async def main() -> None:
        outbox = FlakyStore(losses)
        sinks = [Moody(f"sink-{number}", mood) for number, mood in enumerate(moods)]
        events = make_events(count)
        await outbox.put(events)
        exporter: Exporter = outbox.exporter(sinks, batch=batch, max_rejections=None)
        passes = 0
        while await outbox.ids():
            if passes % restart_every == restart_every - 1 and losses:
                exporter = outbox.exporter(sinks, batch=batch, max_rejections=None)
            with contextlib.suppress(StoreUnavailableError):
                await exporter.run_once()
            outbox.clock.advance(steps[passes % len(steps)])
            passes += 1
            assert passes < 5_000
        for sink in sinks:
            assert set(sink.ids) == {event.id for event in events}
            assert all(event in events for event in sink.taken)
            if not losses and outbox.clock.now < 1_000 + REMEMBER_S:
                assert max(Counter(sink.ids).values()) == 1

    asyncio.run(main())

"""What the tests of events share: events, a store to take them from, and sinks that misbehave on demand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from asgi_metering.events.exporter import Exporter
from asgi_metering.events.sinks import Sink
from asgi_metering.rules.decide import Answer
from asgi_metering.rules.operations import Emit, Operation
from asgi_metering.stores.contract import EverythingKept
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.stores.pump import Pump
from asgi_metering.usage.event import UsageEvent
from asgi_metering.usage.values import TokenUsage

TRACE = {"trace_id": "0af7651916cd43dd8448eb211c80319c", "span_id": "b7ad6b7169203331", "trace_flags": "01"}


def make_event(number: int = 1, **changes: Any) -> UsageEvent:
    """One event of a call to a model; *changes* replace fields."""
    told: dict[str, Any] = {
        "id": f"call-{number}",
        "line": "chat",
        "payer": "org_7",
        "caller": "key_9",
        "unit": "credits",
        "amount": 1_500_000,
        "held": 2_000_000,
        "outcome": "completed",
        "basis": "usage",
        "usage": TokenUsage(input=900, output=120, cached=400, cache_write=50, reasoning=64),
        "usage_source": "body",
        "model": "gpt-5.5",
        "provider": "openai",
        "status": 200,
        "started_at": 1_000.0,
        "ended_at": 1_002.5,
        **TRACE,
        **changes,
    }
    return UsageEvent(**told)


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        """The time."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


class Recorder:
    """A sink that takes everything, or what *refuse* does not object to."""

    def __init__(self, name: str = "recorder", refuse: Callable[[Sequence[UsageEvent]], object] | None = None) -> None:
        self.name = name
        self.refuse = refuse
        self.offers: list[list[str]] = []
        self.taken: list[UsageEvent] = []

    async def deliver(self, events: Sequence[UsageEvent]) -> None:
        """Take *events*, unless `refuse` raises or answers true."""
        self.offers.append([event.id for event in events])
        if self.refuse is not None and self.refuse(events):
            raise ConnectionError("refused")
        self.taken.extend(events)

    @property
    def ids(self) -> list[str]:
        """Ids of what was taken, in order, repeats included."""
        return [event.id for event in self.taken]


class Hanging(Recorder):
    """A sink that takes events only while its gate is open."""

    def __init__(self, name: str = "hanging") -> None:
        super().__init__(name)
        self.gate = asyncio.Event()
        self.asked = asyncio.Event()

    async def deliver(self, events: Sequence[UsageEvent]) -> None:
        """Wait for the gate, then take *events*."""
        self.asked.set()
        await self.gate.wait()
        await super().deliver(events)


class Outbox:
    """A memory store behind a real pump, with an outbox to fill and to look into."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.store = MemoryStore(self.clock)
        self.pump = Pump(self.store)
        self.seen: list[Operation] = []
        self.broken: BaseException | None = None

    async def submit(self, operation: Operation) -> Answer:
        """Run one operation, unless the store is `broken`."""
        if self.broken is not None:
            raise self.broken
        self.seen.append(operation)
        return await self.pump.submit(operation)

    async def put(self, events: Iterable[UsageEvent]) -> None:
        """Append *events* as free work is: each with its own id."""
        await self.pump.submit(Emit(tuple((event.id, event.to_dict()) for event in events)))

    async def ids(self) -> list[str]:
        """Ids of what is in the outbox."""
        return list((await self.store.read(EverythingKept())).state.events)

    def exporter(self, sinks: Sequence[Sink], **options: Any) -> Exporter:
        """An exporter of this outbox, on the same clock."""
        options = {"read": self.store.read, "clock": self.clock, "linger_s": 0.0, **options}
        return Exporter(self.submit, sinks, **options)


def make_events(count: int, start: int = 1) -> list[UsageEvent]:
    """*count* events, numbered from *start*."""
    return [make_event(number) for number in range(start, start + count)]

"""
Plain calls beside all others: whatever their applications, clients and servers do, nobody can tell them apart.

A plain call is admitted, dressed, passed on and billed by ways of its own. So every sequence of messages and faults is
run twice, with these ways and without, and has to give equal messages, books and events.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import count
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from asgi_metering import Caller, Metering, MeteringMiddleware, billable, current_call, metered_app, rate_limited
from asgi_metering.events.sinks import CallbackSink
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.testing.clock import FakeClock
from asgi_metering.usage import TokenUsage
from asgi_metering.usage.event import UsageEvent
from tests.harness.drive import drive, http_scope

SEQUENCES = 60
"""Of two to four requests each: about a second."""

PARTS = {
    "price": (billable(2, line="api"),),
    "kept": (billable(2, line="api", on_late_error="hold", on_disconnect="none", on_error="hold"),),
    "nothing": (billable(0, line="api"), rate_limited("9/day")),
    "limits": (rate_limited("2/day", "9/week", concurrency=1),),
    "all": (billable(3, line="api", errors="openai"), rate_limited("2/day", concurrency=1)),
}
"""What plain calls are metered by; some are refused."""

START: dict[str, Any] = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]}
CHUNK: dict[str, Any] = {"type": "http.response.body", "body": b"some text", "more_body": True}
QUOTA = (b"x-ratelimit-remaining-requests", b"9")

MESSAGES: tuple[dict[str, Any], ...] = (
    START,
    START | {"status": 404},
    START | {"trailers": True},
    START | {"headers": [*START["headers"], QUOTA, (b"content-length", b"13")]},
    CHUNK,
    CHUNK | {"body": b""},
    CHUNK | {"body": memoryview(b"view")},
    CHUNK | {"body": b"x" * 300_000},
    CHUNK | {"body": b"last", "more_body": False},
    {"type": "http.response.body"},
    {"type": "http.response.trailers", "headers": []},
    {"type": "http.response.pathsend", "path": "/tmp/file"},
)
DEEDS = ("record", "attribute", "fail", "raise", "leave", "charge")

steps = st.lists(st.sampled_from((*MESSAGES[4:8], *DEEDS)), max_size=2)
whole = st.tuples(st.sampled_from(MESSAGES[:4]), steps, st.sampled_from(MESSAGES[8:]), steps)
answers = st.one_of(
    whole.map(lambda found: [found[0], *found[1], found[2], *found[3]]),
    whole.map(lambda found: [found[0], *found[1], found[2]]),
    st.lists(st.sampled_from((*MESSAGES, *DEEDS)), max_size=4),
)
FAULTS = [{at: number} for at in ("raise_at", "cancel_at", "disconnect_at") for number in (1, 2, 3)]
faults: st.SearchStrategy[dict[str, int]] = st.one_of(st.just({}), st.just({}), st.sampled_from(FAULTS))
requests = st.tuples(answers, faults, st.sampled_from(("GET", "GET", "GET", "GET", "GET", "HEAD")))


async def act(deed: str, metering: Metering) -> None:
    """Do what handlers do beside their answers."""
    match deed:
        case "record":
            current_call().record(TokenUsage(input=3))
        case "attribute":
            current_call().attributes["tier"] = "gold"
        case "fail":
            current_call().fail("provider_overloaded")
        case "raise":
            raise RuntimeError(deed)
        case "leave":
            raise OSError(deed)
        case "charge":
            async with metering.charge(line="inner", hold=1):
                pass


async def run(name: str, asked: Sequence[Any], *, is_plain: bool) -> list[Any]:
    """Everything that can be seen of these requests, answered one after the other."""
    clock, ids = FakeClock(), count()
    events: list[dict[str, Any]] = []

    async def keep(batch: Sequence[UsageEvent]) -> None:
        # By the machine's clock, of calls that hold nothing.
        events.extend({**event.to_dict(), "started_at": None, "ended_at": None} for event in batch)

    store = MemoryStore(clock)
    ann = Caller("ann", plan="free", attributes={"team": "blue"})
    sinks = (CallbackSink(keep, "kept"),)
    seen: list[Any] = []
    async with Metering(store, identify=lambda _: ann, sinks=sinks, new_id=lambda: f"call-{next(ids)}") as metering:
        if not is_plain:
            metering.admit_now = lambda *_: False
        await metering.grant("ann", 5, id="g")
        todo: list[Any] = []

        async def answer(_scope: Any, _receive: Any, send: Any) -> None:
            for step in todo:
                await (act(step, metering) if isinstance(step, str) else send(dict(step)))

        app = MeteringMiddleware(metered_app(answer, *PARTS[name], name="answer"), metering=metering)
        for steps_asked, faulty, method in asked:
            todo[:] = steps_asked
            drawn = await drive(app, http_scope("/", method=method), **faulty)
            await metering.runtime().booked()
            seen += [drawn.outcome, repr(drawn.exception), drawn.log]
            clock.advance(1.0)
        assert not metering.runtime().in_flight
        seen += [await metering.balance("ann"), [entry async for entry in metering.statement("ann")]]
    return [*seen, sorted(events, key=lambda event: event["id"]), store._state.leases, store._state.counters]


@settings(max_examples=SEQUENCES)
@given(st.sampled_from(sorted(PARTS)), st.lists(requests, min_size=2, max_size=4))
def test_see_no_difference_between_plain_calls_and_others(name: str, asked: list[Any]) -> None:
    """X.1, DESIGN 4: how a call was let in changes no message, no line of the books and no event."""
    plain, other = (asyncio.run(run(name, asked, is_plain=is_plain)) for is_plain in (True, False))
    for one, two in zip(plain, other, strict=True):
        assert one == two


SHARED_KEYS = 30
"""Attributes that CPython keeps of an object without a dict of its own: one more, and every call pays for that."""


def test_keep_a_plain_call_without_a_dict() -> None:
    """DESIGN 9: with a price, limits and slots, a call that is over has fewer attributes than cost it a dict."""
    calls: list[Any] = []

    async def answer(_scope: Any, _receive: Any, send: Any) -> None:
        calls.append(current_call())
        await send(START)
        await send(CHUNK | {"more_body": False})

    async def play() -> None:
        async with Metering(identify=lambda _: Caller("ann"), sinks=(CallbackSink(len, "counted"),)) as metering:
            await metering.grant("ann", 5, id="g")
            app = metered_app(answer, billable(1), rate_limited("9/day", concurrency=1))
            await drive(MeteringMiddleware(app, metering=metering), http_scope("/"))

    asyncio.run(play())
    (call,) = calls
    assert call.receipt is not None
    assert len(vars(call)) <= SHARED_KEYS

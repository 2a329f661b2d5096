"""Sinks made of functions."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Sequence

import pytest

from asgi_metering.errors import ConfigurationError
from asgi_metering.events.sinks import CallbackSink, Sink
from asgi_metering.usage.event import UsageEvent
from tests.events.support import make_event, make_events
from tests.harness.waiting import DEFAULT_TIMEOUT_S, wait_until


def test_call_a_plain_function_in_a_thread_with_a_tuple() -> None:
    """A function that blocks blocks no event loop; it gets the whole batch."""
    seen: list[tuple[object, bool]] = []

    def keep(events: Sequence[UsageEvent]) -> None:
        seen.append((events, threading.current_thread() is threading.main_thread()))

    events = make_events(2)
    asyncio.run(CallbackSink(keep).deliver(events))
    assert seen == [(tuple(events), False)]


def test_await_an_async_function_on_the_loop() -> None:
    """An async function runs on the exporter's loop."""
    seen: list[object] = []

    async def keep(events: Sequence[UsageEvent]) -> None:
        seen.append((events, threading.current_thread() is threading.main_thread()))

    asyncio.run(CallbackSink(keep).deliver([make_event()]))
    assert seen == [((make_event(),), True)]


def test_await_what_a_callable_object_or_a_partial_answers() -> None:
    """Objects with an async call, partials of async functions and lambdas over them are all awaited."""
    seen: list[str] = []

    async def keep(note: str, events: Sequence[UsageEvent]) -> None:
        seen.append(note)

    class Keeper:
        async def __call__(self, events: Sequence[UsageEvent]) -> None:
            seen.append("object")

    async def main() -> None:
        await CallbackSink(Keeper()).deliver([make_event()])
        await CallbackSink(functools.partial(keep, "partial")).deliver([make_event()])
        await CallbackSink(lambda events: keep("lambda", events)).deliver([make_event()])

    asyncio.run(main())
    assert seen == ["object", "partial", "lambda"]


def test_raise_what_the_function_raises() -> None:
    """An exception of the function refuses the batch."""

    def refuse(_: object) -> None:
        raise LookupError("no such customer")

    with pytest.raises(LookupError, match="no such customer"):
        asyncio.run(CallbackSink(refuse).deliver([make_event()]))


def test_refuse_the_next_batch_while_a_call_still_runs() -> None:
    """A function that hangs takes one thread of the application, not one for each retry."""
    gate, entered, calls = threading.Event(), threading.Event(), []

    def hang(events: Sequence[UsageEvent]) -> None:
        calls.append(events[0].id)
        entered.set()
        gate.wait(DEFAULT_TIMEOUT_S)
        raise LookupError("too late for anybody to see")

    async def main() -> None:
        sink = CallbackSink(hang)
        first = asyncio.create_task(sink.deliver([make_event(1)]))
        await asyncio.to_thread(entered.wait)
        first.cancel()
        await asyncio.wait([first])
        with pytest.raises(TimeoutError, match="'hang' still runs"):
            await sink.deliver([make_event(2)])
        gate.set()
        await asyncio.to_thread(wait_until, lambda: not sink._thread._running)
        with pytest.raises(LookupError):
            await sink.deliver([make_event(3)])

    asyncio.run(main())
    assert calls == ["call-1", "call-3"]


def test_name_a_sink_after_its_function() -> None:
    """The name is given, or that of the function, also where it has none to speak of."""

    def billing(_: object) -> None: ...

    assert CallbackSink(billing).name == "billing"
    assert CallbackSink(billing, name="other").name == "other"
    assert CallbackSink(lambda _: None).name == "lambda"
    assert CallbackSink(functools.partial(billing)).name == "partial"
    assert isinstance(CallbackSink(billing), Sink)
    with pytest.raises(ConfigurationError, match="sink name 'no good'"):
        CallbackSink(billing, name="no good")

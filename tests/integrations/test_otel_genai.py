"""Spans of instrumented SDKs, real ones and such as others write, booked to the call that they ran in."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Status, StatusCode

from asgi_metering import Metering
from asgi_metering.events import CallbackSink
from asgi_metering.integrations import otel_genai
from asgi_metering.integrations.otel_genai import GenAIUsageProcessor
from asgi_metering.prices import per_token
from asgi_metering.testing.provider import Provider
from asgi_metering.usage import TokenUsage
from asgi_metering.usage.event import UsageEvent
from tests.harness.servers import serve_in_thread

PRICE = per_token(input="0.001", output="0.01")

CHAT = {"gen_ai.operation.name": "chat", "gen_ai.provider.name": "acme", "gen_ai.request.model": "m"}
"""What a chat span knows when it begins."""

USAGE = {"gen_ai.usage.input_tokens": 7, "gen_ai.usage.output_tokens": 5}
"""What it knows when it ends."""


class House:
    """A metering, and a tracer whose spans it reads."""

    def __init__(self) -> None:
        self.events: list[UsageEvent] = []
        self.metering = Metering(sinks=[CallbackSink(self.events.extend, "seen")])
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.processor = GenAIUsageProcessor(self.metering)
        self.provider.add_span_processor(self.processor)
        self.tracer = self.provider.get_tracer("tests")

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Metering]:
        """Run the metering with credits for one payer; behind it, every event has been delivered."""
        async with self.metering as metering:
            await metering.grant("org", 1_000, id="g")
            yield metering

    def charge(self, line: str = "chat") -> Any:
        """A call that is charged by what it uses."""
        return self.metering.charge(payer="org", line=line, price=PRICE, hold=1)

    def span(self, name: str = "chat m", attributes: Any = None, usage: Any = None) -> None:
        """One span, from its start to its end."""
        with self.tracer.start_as_current_span(name, attributes=attributes or CHAT) as span:
            span.set_attributes(USAGE if usage is None else usage)

    def run(self, work: Any) -> UsageEvent:
        """Do *work*, which gets the call, inside of one call; its event."""

        async def run() -> None:
            async with self.open(), self.charge() as call:
                work(call)

        asyncio.run(run())
        (event,) = self.events
        return event

    def total(self, tally: str) -> int:
        """What a counter of the metering has counted, over all attributes."""
        return sum(self.metering.meters.totals(tally).values())


@pytest.fixture
def house() -> House:
    """A metering without a past."""
    return House()


@pytest.fixture
def instrumented(house: House) -> Iterator[House]:
    """The OpenAI SDK, instrumented by OpenTelemetry's own package while the test runs."""
    # Imported here: nobody else needs it.
    from opentelemetry.instrumentation.openai_v2 import OpenAIInstrumentor

    instrumentor = OpenAIInstrumentor()
    instrumentor.instrument(tracer_provider=house.provider)
    yield house
    instrumentor.uninstrument()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_instrumented_sdk_is_charged_by_its_spans(instrumented: House, asynchronous: bool, stream: bool) -> None:
    """Each real completion counts what its span says, which is what the provider counted."""
    upstream = Provider()
    options: dict[str, Any] = {"model": "gpt-5.5:words-6", "messages": [{"role": "user", "content": "Hi there"}]}
    if stream:
        options |= {"stream": True, "stream_options": {"include_usage": True}}

    def ask(url: str) -> None:
        with openai.OpenAI(api_key="sk", base_url=url) as client:
            answer = client.chat.completions.create(**options)
            assert list(answer)

    async def ask_async(url: str) -> None:
        async with openai.AsyncOpenAI(api_key="sk", base_url=url) as client:
            answer = await client.chat.completions.create(**options)
            if stream:
                assert [chunk async for chunk in answer]

    async def run(url: str) -> None:
        async with instrumented.open(), instrumented.charge():
            await (ask_async(url) if asynchronous else asyncio.to_thread(ask, url))

    with serve_in_thread(upstream) as server:
        asyncio.run(run(f"{server.url}/v1"))
    counts = upstream.requests[-1].counts
    assert counts is not None
    (event,) = instrumented.events
    assert event.usage is not None
    assert (event.usage.input, event.usage.output) == (counts.input, counts.output)
    assert (event.usage_source, event.model, event.provider, event.basis) == ("telemetry", "gpt-5.5", "openai", "usage")
    assert event.amount == counts.input * 1_000 + counts.output * 10_000


@pytest.mark.parametrize(
    ("usage", "counted"),
    [
        ({"gen_ai.usage.prompt_tokens": 3, "gen_ai.usage.completion_tokens": 4}, TokenUsage(input=3, output=4)),
        ({**USAGE, "gen_ai.usage.cache_read.input_tokens": 2}, TokenUsage(input=7, output=5, cached=2)),
        ({**USAGE, "gen_ai.usage.cache_creation.input_tokens": 2}, TokenUsage(input=7, output=5, cache_write=2)),
        ({**USAGE, "gen_ai.usage.cache_write.input_tokens": 2}, TokenUsage(input=7, output=5, cache_write=2)),
        ({**USAGE, "gen_ai.usage.reasoning.output_tokens": 1}, TokenUsage(input=7, output=5, reasoning=1)),
        ({"gen_ai.usage.input_tokens": 0, "gen_ai.usage.output_tokens": 0}, TokenUsage(input=0, output=0)),
    ],
)
def test_names_of_every_age_are_read(house: House, usage: dict[str, int], counted: TokenUsage) -> None:
    """The deprecated names, those of 1.41 and those after it count alike, and a zero is a count (S2.41, S2.43)."""
    event = house.run(lambda call: house.span(usage=usage))
    assert (event.usage, event.usage_source, event.model, event.provider) == (counted, "telemetry", "m", "acme")


def test_of_nested_spans_the_innermost_counts(house: House) -> None:
    """An agent's sum over its models is not added to theirs, nor one instrumentation to that below it (S2.42)."""

    def work(call: Any) -> None:
        agent = {"gen_ai.operation.name": "invoke_agent"}
        with house.tracer.start_as_current_span("agent", attributes=agent) as span:
            with house.tracer.start_as_current_span("step"):
                house.span()
                house.span()
            span.set_attributes({"gen_ai.usage.input_tokens": 14, "gen_ai.usage.output_tokens": 10})
        with house.tracer.start_as_current_span("outer", attributes=CHAT) as span:
            house.span(usage={"gen_ai.usage.input_tokens": 1, "gen_ai.usage.output_tokens": 1})
            span.set_attributes(USAGE)
        house.span(attributes={"gen_ai.operation.name": "fetch_response"})

    event = house.run(work)
    assert (event.usage, event.basis) == (TokenUsage(input=15, output=11), "usage")


def test_answer_that_two_libraries_tell_of_is_charged_once(house: House) -> None:
    """Spans beside each other of one answer are one; another answer, or one without an id, is not (S2.42)."""

    async def run() -> int:
        async with house.open() as metering:
            async with house.charge():
                for name in ("r1", "r1", "r2", None, None):
                    house.span(usage=USAGE | ({} if name is None else {"gen_ai.response.id": name}))
                house.span(usage={"gen_ai.usage.input_tokens": 8, "gen_ai.response.id": "r1"})
            return (await metering.balance("org")).settled

    assert asyncio.run(run()) == 4 * (7 * 1_000 + 5 * 10_000) + 8 * 1_000


def test_span_of_a_bare_thread_belongs_to_the_call_above(house: House) -> None:
    """A thread that got OpenTelemetry's context but not Python's books to the call whose span is above its own."""

    def in_thread(context: Any) -> None:
        otel_context.attach(context)
        house.span()

    def from_here() -> None:
        thread = threading.Thread(target=in_thread, args=[otel_context.get_current()])
        thread.start()
        thread.join()

    def work(call: Any) -> None:
        with house.tracer.start_as_current_span("step"):
            from_here()

    assert house.run(work).usage == TokenUsage(input=7, output=5)
    house.events.clear()

    async def served() -> None:
        # The server's span begins before the call does, and is the call's own trace.
        async with house.open():
            with house.tracer.start_as_current_span("POST /chat"):
                async with house.charge():
                    from_here()

    asyncio.run(served())
    assert [event.usage for event in house.events] == [TokenUsage(input=7, output=5)]


def test_span_without_usage_leaves_the_call_incomplete(house: House) -> None:
    """A span that ended well and says nothing, or never ended, makes the charge an estimate; a failed one does not."""

    def silent(call: Any) -> None:
        house.span()
        house.span(usage={})

    assert (house.run(silent).basis, house.events.pop().estimated) == ("estimate", True)

    def unfinished(call: Any) -> None:
        house.span()
        house.tracer.start_span("chat m", attributes=CHAT)

    assert house.run(unfinished).basis == "estimate"
    house.events.clear()

    def refused(call: Any) -> None:
        span = house.tracer.start_span("chat m", attributes=CHAT)
        span.set_status(Status(StatusCode.ERROR))
        span.end()
        house.span()

    event = house.run(refused)
    assert (event.basis, event.usage) == ("usage", TokenUsage(input=7, output=5))


def test_span_of_no_call_or_of_an_ended_one_is_counted(house: House) -> None:
    """A span outside of any call is ignored (S3.26), one that ends behind its call refused, and both are counted."""

    async def run() -> None:
        async with house.open():
            house.span()
            async with house.charge():
                begun = house.tracer.start_span("chat m", attributes=CHAT)
            begun.set_attributes(USAGE)
            begun.end()

    asyncio.run(run())
    assert (house.total("usage_unscoped"), house.total("usage_late")) == (1, 1)
    assert [event.usage for event in house.events] == [None]


def test_absurd_counts_of_a_span_are_refused(house: House) -> None:
    """A span that counts below zero says nothing, with an alarm (S3.21)."""
    event = house.run(lambda call: house.span(usage={"gen_ai.usage.input_tokens": -1}))
    assert (event.usage, house.total("usage_rejected")) == (None, 1)


def test_answer_cut_by_a_limit_is_said_so(house: House) -> None:
    """The usage event says that a token limit cut an answer (S3.28), and what each of several models used (S3.27)."""

    def work(call: Any) -> None:
        house.span(usage={**USAGE, "gen_ai.response.finish_reasons": ["length"]})
        house.span(attributes={**CHAT, "gen_ai.request.model": "n"})

    event = house.run(work)
    assert event.attributes["metering.truncated"] is True
    rows = (
        '[{"model":"m","provider":"acme","calls":1,"usage":{"input":7,"output":5}},'
        '{"model":"n","provider":"acme","calls":1,"usage":{"input":7,"output":5}}]'
    )
    assert event.attributes["metering.models"] == rows


def test_spans_that_never_end_are_forgotten(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only so many spans are remembered, and a call whose span was forgotten is not taken for whole."""
    monkeypatch.setattr(otel_genai, "MAX_SPANS", 1)

    def work(call: Any) -> None:
        for _ in range(3):
            house.tracer.start_span("chat m", attributes=CHAT)
        house.span()
        assert len(house.processor._running) == 0

    assert house.run(work).basis == "estimate"


def test_spans_outside_of_metering_are_passed_over(house: House) -> None:
    """Spans that run in no call and use nothing are not remembered."""
    with house.tracer.start_as_current_span("step"):
        assert trace.get_current_span().is_recording()
        assert len(house.processor._running) == 0
    assert house.total("usage_unscoped") == 0

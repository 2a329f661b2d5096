"""
From a request to a collector: what a served application tells OpenTelemetry, over real HTTP on both sides.

The server span is made around the request, as an instrumentation would. Everything else is the package's own doing.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asgi_metering import Caller, CallRefused, Metering, MeteringMiddleware, UsageEvent, billable
from asgi_metering.events.otel import OTelSink
from asgi_metering.events.otlp import OTLPLogSink
from asgi_metering.events.sinks import CallbackSink, Sink
from asgi_metering.stores.contract import EverythingKept
from tests.harness.clients import HttpClient
from tests.harness.otlp import OtlpReceiver
from tests.harness.servers import serve_in_thread
from tests.harness.waiting import DEFAULT_TIMEOUT_S, wait_until

PAYER, CALLER, KEY = "org_7", "key_9", "sk-very-secret"
PRICE = 2
NEVER_MS = 3_600_000
AT_THE_GATE = ("metering.line", "metering.held", "metering.unit")


class Instrumented:
    """
    A server span around each request, current while the application runs.

    Args:
        app: The application, its metering included.
        ends_at_head: End the span as the head goes out, as a tracing middleware does that awaits a response object.

    Attributes:
        spans: One for each request.
        at_head: The attributes of each as its response began.
    """

    def __init__(self, app: ASGIApp, *, ends_at_head: bool = False) -> None:
        self.app = app
        self.ends_at_head = ends_at_head
        self.tracer = TracerProvider(shutdown_on_exit=False).get_tracer("instrumentation")
        self.spans: list[ReadableSpan] = []
        self.at_head: list[dict[str, Any]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        span = self.tracer.start_span(scope["path"], kind=trace.SpanKind.SERVER)
        assert isinstance(span, ReadableSpan)
        self.spans.append(span)

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.at_head.append(dict(span.attributes or {}))
                if self.ends_at_head:
                    span.end()
            await send(message)

        with trace.use_span(span, end_on_exit=not self.ends_at_head):
            await self.app(scope, receive, noting)


def application(metering: Metering, door: threading.Event) -> FastAPI:
    """Endpoints of every kind that asks at the gate in its own way; `/held` streams its second half behind *door*."""

    @contextlib.asynccontextmanager
    async def with_credits(_app: FastAPI) -> AsyncIterator[None]:
        await metering.grant(PAYER, 100, id="payment")
        yield

    app = FastAPI(lifespan=with_credits)

    @app.get("/function")
    @billable(PRICE, line="chat")
    async def function() -> dict[str, int]:
        return {"n": 1}

    @app.get("/threaded")
    @billable(PRICE, line="chat")
    def threaded() -> dict[str, int]:
        return {"n": 1}

    @app.get("/generator", response_class=StreamingResponse)
    @billable(PRICE, line="chat")
    async def generator() -> AsyncIterator[str]:
        yield "one"
        yield "two"

    @app.get("/held")
    @billable(PRICE, line="chat")
    async def held() -> StreamingResponse:
        async def halves() -> AsyncIterator[bytes]:
            yield b"one"
            await asyncio.to_thread(door.wait, DEFAULT_TIMEOUT_S)
            yield b"two"

        return StreamingResponse(halves())

    app.add_middleware(MeteringMiddleware, metering=metering)
    return app


def who(connection: HTTPConnection) -> Caller | None:
    """One key, of a caller whom an organization pays."""
    return Caller(CALLER, payer=PAYER) if connection.headers.get("x-api-key") == KEY else None


class Gate:
    """A served application, and what is outside of it."""

    def __init__(self, sinks: Sequence[Sink], *, ends_at_head: bool = False) -> None:
        self.door = threading.Event()
        self.metering = Metering(identify=who, sinks=sinks)
        self.traced = Instrumented(application(self.metering, self.door), ends_at_head=ends_at_head)
        self.port = 0

    @contextlib.contextmanager
    def served(self) -> Iterator[Gate]:
        """Serve until the block ends; at its end every event was offered to the sinks once more."""
        with serve_in_thread(self.traced) as server:
            self.port = server.port
            yield self
            self.door.set()

    @contextlib.contextmanager
    def asked(self, path: str, key: str = KEY) -> Iterator[HttpClient]:
        """A request that was sent."""
        with HttpClient(self.port) as client:
            client.send_request(path=path, headers=[("x-api-key", key)])
            yield client

    def answer(self, path: str, key: str = KEY) -> tuple[int, list[tuple[str, str]], bytes]:
        """One whole response, without the time of day."""
        with self.asked(path, key) as client:
            head = client.read_head()
            body = client.read_rest()
            assert client.ended == "complete"
        return head.status, [field for field in head.headers if field[0] != "date"], body


@pytest.fixture
def collector() -> Iterator[OtlpReceiver]:
    """A collector that ends with the test, and that understood everything."""
    with OtlpReceiver() as receiver:
        yield receiver
        receiver.release()
        assert receiver.malformed == []


class Exported:
    """The SDK of an application, exporting over HTTP, and what its collector then has."""

    def __init__(self, collector: OtlpReceiver) -> None:
        self._collector = collector
        exporter = OTLPMetricExporter(collector.endpoint("metrics"))
        reader = PeriodicExportingMetricReader(exporter, export_interval_millis=float("inf"))
        self.meters = MeterProvider(metric_readers=[reader], shutdown_on_exit=False)
        self.loggers = LoggerProvider(shutdown_on_exit=False)
        log_exporter = OTLPLogExporter(collector.endpoint("logs"))
        self.loggers.add_log_record_processor(BatchLogRecordProcessor(log_exporter, schedule_delay_millis=NEVER_MS))

    @property
    def sink(self) -> OTelSink:
        """Writes to both."""
        return OTelSink(self.meters, self.loggers)

    def records(self) -> list[LogRecord]:
        """The log records that arrived."""
        assert self.loggers.force_flush()
        return list(self._collector.log_records())

    def shutdown(self) -> None:
        """End both."""
        self.meters.shutdown()
        self.loggers.shutdown()


@pytest.fixture
def exported(collector: OtlpReceiver) -> Iterator[Exported]:
    """Providers that export to the collector when they are flushed."""
    made = Exported(collector)
    yield made
    made.shutdown()


def told(attributes: Any) -> dict[str, Any]:
    """Attributes of a protobuf message as plain values."""

    def value(pair: Any) -> Any:
        return getattr(pair.value, pair.value.WhichOneof("value"))

    return {pair.key: value(pair) for pair in attributes}


def identified(span: ReadableSpan) -> tuple[str, str, int]:
    """The trace's id, the span's, and the flags."""
    context = span.context
    assert context is not None
    return f"{context.trace_id:032x}", f"{context.span_id:016x}", context.trace_flags


def on_the_wire(record: LogRecord) -> tuple[str, str, int]:
    """The same of what a collector got."""
    return record.trace_id.hex(), record.span_id.hex(), record.flags


@pytest.mark.parametrize("path", ["/function", "/threaded", "/generator"])
def test_export_the_record_in_the_trace_of_its_request(path: str, exported: Exported) -> None:
    """X.10: of two requests each has one log record at the collector, in the trace and on the span of that request."""
    with Gate([exported.sink]).served() as gate:
        assert [gate.answer(path)[0] for _ in range(2)] == [200, 200]
    first, second = gate.traced.spans
    assert first.context != second.context
    records = exported.records()
    assert len(records) == 2
    assert {on_the_wire(record) for record in records} == {identified(first), identified(second)}


def test_export_the_record_of_a_call_that_outlives_its_span(
    exported: Exported, caplog: pytest.LogCaptureFixture
) -> None:
    """X.10: a stream that goes on after its span has ended is told in that trace, and writes on the span no more."""
    with Gate([exported.sink], ends_at_head=True).served() as gate, gate.asked("/held") as client:
        client.read_head()
        assert client.read_body(3) == b"one"
        (span,) = gate.traced.spans
        assert span.end_time is not None
        gate.door.set()
        assert client.read_rest() == b"two"
    (record,) = exported.records()
    assert on_the_wire(record) == identified(span)
    assert record.time_unix_nano >= span.end_time
    assert dict(span.attributes or {}) == gate.traced.at_head[0]
    assert "ended span" not in caplog.text


@pytest.mark.parametrize("path", ["/function", "/threaded", "/generator", "/held"])
def test_write_on_the_span_before_the_first_byte(path: str) -> None:
    """X.10: line, hold and unit are on the server's span when the response begins, and nothing is added later."""
    with Gate([]).served() as gate:
        gate.door.set()
        assert gate.answer(path)[0] == 200
    (at_head,) = gate.traced.at_head
    assert sorted(at_head) == sorted(AT_THE_GATE)
    assert (at_head["metering.line"], at_head["metering.unit"]) == ("chat", "credits")
    assert at_head["metering.held"] > 0
    assert dict(gate.traced.spans[0].attributes or {}) == at_head


def test_say_the_same_on_the_span_and_in_the_record(exported: Exported) -> None:
    """X.10: an attribute that both have means the same on both, amounts in the same measure."""
    with Gate([exported.sink]).served() as gate:
        gate.answer("/function")
    (record,) = exported.records()
    (at_head,) = gate.traced.at_head
    attributes = told(record.attributes)
    assert attributes["metering.held"] == PRICE
    assert {name: attributes[name] for name in at_head} == at_head


@pytest.mark.parametrize("path", ["/function", "/generator"])
def test_tell_a_refusal_and_no_hold_on_its_span(path: str, exported: Exported) -> None:
    """X.10: the span of a refused call says why, and nothing of a hold; no usage event tells of the call."""
    with Gate([exported.sink]).served() as gate:
        assert gate.answer(path, key="unknown")[0] == 401
    (span,) = gate.traced.spans
    assert dict(span.attributes or {}) == {"metering.refusal.reason": "unauthenticated"}
    assert exported.records() == []


def test_tell_the_line_of_a_refused_charge_on_the_span() -> None:
    """X.10: where a refusal concerns a line, the span that is current at the gate names both."""

    async def play() -> None:
        async with Metering(sinks=()) as metering, metering.charge(payer="nobody", line="chat", price=PRICE):
            pass

    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("instrumentation")
    with tracer.start_as_current_span("job") as span, pytest.raises(CallRefused):
        asyncio.run(play())
    assert isinstance(span, ReadableSpan)
    assert dict(span.attributes or {}) == {"metering.line": "chat", "metering.refusal.reason": "insufficient_credits"}


def test_export_metrics_of_a_request_without_its_payer(collector: OtlpReceiver, exported: Exported) -> None:
    """X.9: a request arrives as metrics that tell lines and no people; no export has the caller's credential."""
    with Gate([exported.sink]).served() as gate:
        assert [gate.answer("/function")[0] for _ in range(3)] == [200, 200, 200]
    assert exported.meters.force_flush()
    assert exported.loggers.force_flush()
    metrics = {metric.name: metric for metric in collector.metrics()}
    ((calls),) = metrics["metering.calls"].sum.data_points
    ((amount),) = metrics["metering.amount"].sum.data_points
    ((duration),) = metrics["metering.call.duration"].histogram.data_points
    assert (calls.as_int, amount.as_double, duration.count) == (3, 3.0 * PRICE, 3)
    assert told(calls.attributes)["metering.line"] == "chat"
    assert told(duration.attributes)["http.response.status_code"] == 200
    said = "".join(str(metric) for metric in metrics.values())
    assert not [word for word in (PAYER, CALLER, "payer", "caller") if word in said]
    assert {told(record.attributes)["metering.payer"] for record in collector.log_records()} == {PAYER}
    assert KEY not in "".join(str(request.message) for request in collector.requests)


# -- sinks in trouble (S2.5, X.10) -------------------------------------------------------------------------


class Trouble:
    """
    A sink that does not take anything until it is let.

    Attributes:
        sink: The sink itself.
        entered: Whether a delivery was begun.
        arrived: The calls that came, by their ids.
        let: Ends the trouble.
    """

    def __init__(
        self, sink: Sink, entered: Callable[[], object], arrived: Callable[[], set[str]], let: Callable[[], None]
    ) -> None:
        self.sink, self.entered, self.arrived, self.let = sink, entered, arrived, let


def hanging_collector(collector: OtlpReceiver, stack: contextlib.ExitStack) -> Trouble:
    """A collector that takes requests and does not answer."""
    exporter = OTLPLogExporter(collector.endpoint("logs"), timeout=DEFAULT_TIMEOUT_S)
    stack.callback(exporter.shutdown)

    def arrived() -> set[str]:
        return {told(each.attributes)["metering.call.id"] for each in collector.log_records()}

    collector.hold()
    return Trouble(OTLPLogSink(exporter), lambda: collector.of("logs"), arrived, collector.release)


def awaiting(_collector: OtlpReceiver, _stack: contextlib.ExitStack) -> Trouble:
    """A function that waits for something."""
    entered, gate, taken = threading.Event(), threading.Event(), set[str]()

    async def take(events: Sequence[UsageEvent]) -> None:
        entered.set()
        await asyncio.to_thread(gate.wait, DEFAULT_TIMEOUT_S)
        taken.update(event.id for event in events)

    return Trouble(CallbackSink(take), entered.is_set, lambda: taken, gate.set)


def raising(_collector: OtlpReceiver, _stack: contextlib.ExitStack) -> Trouble:
    """A function that raises."""
    entered, gate, taken = threading.Event(), threading.Event(), set[str]()

    async def take(events: Sequence[UsageEvent]) -> None:
        entered.set()
        if not gate.is_set():
            raise ConnectionError("The collector is down.")
        taken.update(event.id for event in events)

    return Trouble(CallbackSink(take), entered.is_set, lambda: taken, gate.set)


@pytest.mark.parametrize("kind", [hanging_collector, awaiting, raising], ids=lambda kind: kind.__name__)
def test_answer_the_same_while_a_sink_is_in_trouble(
    kind: Callable[[OtlpReceiver, contextlib.ExitStack], Trouble], collector: OtlpReceiver
) -> None:
    """S2.5, X.10: whole answers, the same to the byte as without sinks, while a sink is stuck; then all events come."""
    paths = ("/function", "/generator", "/function")
    with Gate([]).served() as quiet:
        expected = [quiet.answer(path) for path in paths]
    with contextlib.ExitStack() as stack:
        trouble = kind(collector, stack)
        gate = Gate([trouble.sink])
        stack.enter_context(gate.served())
        # Before the server waits for its sinks, whatever fails here.
        stack.callback(trouble.let)
        answers = [gate.answer(paths[0])]
        wait_until(trouble.entered)
        answers += [gate.answer(path) for path in paths[1:]]
        assert answers == expected
        assert asyncio.run(gate.metering.store.read(EverythingKept())).state.events
    assert len(trouble.arrived()) == len(paths)

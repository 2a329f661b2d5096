"""Over the wire: real exporters of the SDK, against a collector on loopback that parses what arrives."""

from __future__ import annotations

import asyncio
import builtins
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource

from asgi_metering.errors import MissingExtraError
from asgi_metering.events.metrics import Meters
from asgi_metering.events.otel import OTelSink
from asgi_metering.events.otlp import OTLPLogSink
from tests.events.support import TRACE, Outbox, Recorder, make_event, make_events
from tests.harness.otlp import OtlpReceiver
from tests.harness.waiting import DEFAULT_TIMEOUT_S, wait_until

NEVER_MS = 3_600_000


@pytest.fixture
def collector() -> Iterator[OtlpReceiver]:
    """A collector that ends with the test, and that understood everything."""
    with OtlpReceiver() as receiver:
        yield receiver
        receiver.release()
        assert receiver.malformed == []


@pytest.fixture
def exporter(collector: OtlpReceiver) -> Iterator[OTLPLogExporter]:
    """An exporter of log records that gives up quickly."""
    made = OTLPLogExporter(collector.endpoint("logs"), timeout=0.3)
    yield made
    made.shutdown()


@pytest.fixture
def providers(collector: OtlpReceiver, exporter: OTLPLogExporter) -> Iterator[tuple[MeterProvider, LoggerProvider]]:
    """An application's providers, exporting to the collector when they are flushed."""
    metric_exporter = OTLPMetricExporter(collector.endpoint("metrics"), timeout=0.3)
    reader = PeriodicExportingMetricReader(metric_exporter, export_interval_millis=float("inf"))
    meters = MeterProvider(metric_readers=[reader], shutdown_on_exit=False)
    loggers = LoggerProvider(shutdown_on_exit=False)
    loggers.add_log_record_processor(BatchLogRecordProcessor(exporter, schedule_delay_millis=NEVER_MS))
    yield meters, loggers
    meters.shutdown()
    loggers.shutdown()


def told(attributes: Any) -> dict[str, Any]:
    """Attributes of a protobuf message as plain values."""

    def value(pair: KeyValue) -> Any:
        return getattr(pair.value, pair.value.WhichOneof("value"))

    return {pair.key: value(pair) for pair in attributes}


def test_export_metrics_and_records_over_http(
    collector: OtlpReceiver, providers: tuple[MeterProvider, LoggerProvider]
) -> None:
    """From the outbox through the SDK to a collector: metrics without a payer, records with trace ids and payer."""
    meters, loggers = providers

    async def main() -> None:
        outbox = Outbox()
        tallies = Meters(meters)
        await outbox.put([*make_events(3), make_event(4, provider="Zürich \ud800", model="\ud800")])
        exporter = outbox.exporter([OTelSink(meters, loggers)], meters=tallies)
        assert await exporter.drain(5.0) == 0

    asyncio.run(main())
    # The shutdown has flushed both: a server may end by the signal, and the SDK's own hooks never run.
    metrics = {metric.name: metric for metric in collector.metrics()}
    ((calls),) = metrics["metering.calls"].sum.data_points
    assert calls.as_int == 4
    assert metrics["metering.calls"].sum.is_monotonic
    assert metrics["metering.amount"].unit == "{credits}"
    assert metrics["metering.amount"].sum.data_points[0].as_double == 6.0
    assert metrics["metering.events.delivered"].sum.data_points[0].as_int == 4
    usage = metrics["gen_ai.client.token.usage"].histogram.data_points
    assert {told(point.attributes)["gen_ai.token.type"]: point.sum for point in usage if point.count == 3} == {
        "input": 2_700,
        "output": 360,
    }
    assert "org_7" not in repr(list(metrics.values()))
    records = list(collector.log_records())
    assert [told(record.attributes)["metering.call.id"] for record in records] == [f"call-{n}" for n in range(1, 5)]
    for record in records:
        assert record.event_name == "asgi_metering.usage"
        assert record.trace_id.hex() == TRACE["trace_id"]
        assert record.span_id.hex() == TRACE["span_id"]
        assert record.flags == 1
        assert record.time_unix_nano == 1_002_500_000_000
        assert told(record.attributes)["metering.payer"] == "org_7"
        assert told(record.attributes)["gen_ai.usage.input_tokens"] == 900


@pytest.mark.parametrize("trouble", ["refuses", "hangs"])
def test_go_on_while_the_collector_is_in_trouble(
    collector: OtlpReceiver, providers: tuple[MeterProvider, LoggerProvider], trouble: str
) -> None:
    """A collector that refuses or hangs holds up neither the exporter nor the other sinks (X.10)."""
    meters, loggers = providers
    if trouble == "refuses":
        collector.status = 400
    else:
        collector.hold()

    async def main() -> None:
        outbox, other = Outbox(), Recorder("other")
        exporter = outbox.exporter([OTelSink(meters, loggers), other])
        for start in range(0, 30, 10):
            await outbox.put(make_events(10, start=start))
            assert await exporter.run_once() == 10
        assert len(other.ids) == 30

    asyncio.run(main())
    collector.release()
    collector.status = 200


def test_count_records_as_delivered_only_when_the_collector_took_them(
    collector: OtlpReceiver, exporter: OTLPLogExporter
) -> None:
    """What a refusing collector did not take stays in the outbox and arrives later; none is lost."""

    async def main() -> None:
        outbox, other = Outbox(), Recorder("other")
        await outbox.put(make_events(5))
        carrier = outbox.exporter([OTLPLogSink(exporter), other])
        collector.status = 400
        assert await carrier.run_once() == 0
        assert len(other.ids) == len(await outbox.ids()) == 5
        collector.status = 200
        outbox.clock.advance(10.0)
        assert await carrier.run_once() == 5
        assert await outbox.ids() == []

    asyncio.run(main())
    taken = [told(record.attributes)["metering.call.id"] for record in collector.log_records()]
    assert sorted(taken) == [f"call-{number}" for number in range(1, 6)]


def test_send_records_as_the_otel_sink_writes_them(collector: OtlpReceiver, exporter: OTLPLogExporter) -> None:
    """The record, its trace, its scope and the service's name arrive."""
    sink = OTLPLogSink(exporter, resource=Resource({"service.name": "api"}))
    asyncio.run(sink.deliver([make_event()]))
    ((request),) = collector.of("logs")
    ((resource),) = request.message.resource_logs
    assert told(resource.resource.attributes) == {"service.name": "api"}
    ((scope),) = resource.scope_logs
    assert (scope.scope.name, scope.schema_url) == ("asgi_metering", "https://opentelemetry.io/schemas/1.41.0")
    ((record),) = scope.log_records
    assert record.trace_id.hex() == TRACE["trace_id"]
    assert told(record.attributes)["metering.amount_parts"] == 1_500_000


def test_survive_a_collector_that_hangs(collector: OtlpReceiver, exporter: OTLPLogExporter) -> None:
    """A hanging collector costs the exporter's own timeout in a thread; other sinks and the loop go on."""

    async def main() -> None:
        outbox, other = Outbox(), Recorder("other")
        await outbox.put(make_events(2))
        collector.hold()
        carrier = outbox.exporter([OTLPLogSink(exporter), other])
        assert await carrier.run_once(patience_s=0.01) == 0
        assert len(other.ids) == 2
        collector.release()
        assert await carrier.drain(20.0) == 0

    asyncio.run(main())
    assert {told(r.attributes)["metering.call.id"] for r in collector.log_records()} == {"call-1", "call-2"}


def test_refuse_a_batch_while_the_last_export_runs() -> None:
    """An export that never ends takes one thread, not one for each retry."""
    gate, entered = threading.Event(), threading.Event()

    class Result:
        name = "SUCCESS"

    class Stuck:
        def export(self, batch: object) -> Result:
            entered.set()
            gate.wait(DEFAULT_TIMEOUT_S)
            return Result()

    async def main() -> None:
        sink = OTLPLogSink(Stuck())  # type: ignore[arg-type]
        first = asyncio.create_task(sink.deliver([make_event()]))
        await asyncio.to_thread(entered.wait)
        with pytest.raises(TimeoutError, match="'otlp_logs' still runs"):
            await sink.deliver([make_event()])
        gate.set()
        await first

    asyncio.run(main())


def test_not_trace_the_export_itself() -> None:
    """An instrumented HTTP client sees the SDK's own mark, so that exports make no spans."""
    from opentelemetry.context import _SUPPRESS_INSTRUMENTATION_KEY, get_value

    seen: list[object] = []

    class Result:
        name = "SUCCESS"

    class Watching:
        def export(self, batch: object) -> Result:
            seen.append(get_value(_SUPPRESS_INSTRUMENTATION_KEY))
            return Result()

    asyncio.run(OTLPLogSink(Watching()).deliver([make_event()]))  # type: ignore[arg-type]
    assert seen == [True]


def test_name_the_extra_when_the_sdk_is_missing(monkeypatch: pytest.MonkeyPatch, exporter: OTLPLogExporter) -> None:
    """Without the SDK the sink says how to get it, when it is made."""
    real = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name.startswith("opentelemetry.sdk"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtraError, match=r"asgi-metering\[otlp\]"):
        OTLPLogSink(exporter)


def test_wait_for_a_collector_that_comes_back(collector: OtlpReceiver, exporter: OTLPLogExporter) -> None:
    """A worker whose collector was down delivers everything once it is back, without being told."""

    async def main() -> None:
        outbox, stop = Outbox(), asyncio.Event()
        await outbox.put(make_events(3))
        collector.status = 400
        carrier = outbox.exporter([OTLPLogSink(exporter)], interval_s=0.01, clock=time.monotonic)
        worker = asyncio.create_task(carrier.run(stop))
        await asyncio.to_thread(collector.wait_for, "logs")
        collector.status = 200
        await asyncio.to_thread(wait_until, lambda: len(list(collector.log_records())) >= 3)
        stop.set()
        await worker
        assert await outbox.ids() == []

    asyncio.run(main())
